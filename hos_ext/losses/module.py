"""`score_matching_loss` as a module that draws its own noise levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..checks import check_int, check_number
from ..random import STREAM_TIME
from ..schedules import Schedule, check_schedule
from ..scores import Model
from .score_matching import score_matching_loss

_OPTIONS = {
    "gamma",
    "variance_reduction",
    "first_order",
    "diagonal",
    "scale_free",
    "detach_score",
    "centred",
    "reduction",
}


class ScoreMatchingLoss(nn.Module):
    """`score_matching_loss` as a module that draws the noise levels too, for any training loop.

    `loss = criterion(model, batch)` in a plain loop or in Lightning's `training_step`. In training
    mode every call is one step: levels and noise are functions of (seed, step, first + row), and
    the step is a buffer, so that a run resumed from a checkpoint draws what it would have drawn.
    Under torch.distributed every rank draws the rows behind those of the ranks before it. In
    evaluation mode the step stands still: the same draws at each call, or those of `step`.

    Args:
        sigma: noise level, a float; or (low, high), drawn log-uniformly for each sample; None with
            a schedule. Data units.
        schedule: a `Schedule`; times are drawn by its `sample_t`.
        alpha: signal scale, with a fixed sigma.
        seed: key of all draws.
        options: further arguments of `score_matching_loss`: gamma, variance_reduction, diagonal,
            centred, ...

    Raises:
        TypeError, ValueError: sigma and schedule are both given or neither, or sigma is not
            positive; what `score_matching_loss` raises, at the call.
    """

    step: Tensor

    def __init__(
        self,
        sigma: float | tuple[float, float] | None = None,
        *,
        schedule: Schedule | None = None,
        alpha: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        where = "ScoreMatchingLoss"
        unknown = sorted(options.keys() - _OPTIONS)
        if unknown:
            raise TypeError(
                f"{where}: options must be of {', '.join(sorted(_OPTIONS))}, got {unknown[0]}"
            )
        if schedule is not None:
            check_schedule(where, schedule)
        self.alpha = check_number(where, "alpha", alpha)
        if alpha != 1 and not isinstance(sigma, (int, float)):
            raise ValueError(f"{where}: alpha must be 1 but with a fixed sigma, got {alpha}")
        if (sigma is None) == (schedule is None):
            both = "neither" if sigma is None else "both"
            raise ValueError(
                f"{where}: exactly one of sigma and schedule must be given, got {both}"
            )
        if isinstance(sigma, tuple):
            if len(sigma) != 2 or not sigma[0] < sigma[1]:
                raise ValueError(f"{where}: sigma must be a float or (low, high), got {sigma}")
            sigma = (check_number(where, "sigma", sigma[0]), check_number(where, "sigma", sigma[1]))
        elif sigma is not None:
            sigma = check_number(where, "sigma", sigma)
        check_int(where, "seed", seed, 2**63)
        self.sigma, self.schedule, self.seed, self.options = sigma, schedule, seed, options
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(
        self, model: Model, x: Tensor, *, step: Tensor | int | None = None, first: int | None = None
    ) -> Tensor:
        """The loss of one batch.

        Args:
            model: `model(x, sigma) -> Scores`.
            x: clean samples. Shape (B, *dims).
            step: number of the step, in place of the module's own, which then stands still.
            first: global index of row 0, for micro-batches of one step. None: the rank times the
                rows of the batch under torch.distributed (the same number on every rank), else 0.
        """
        if first is None:
            spread = torch.distributed.is_available() and torch.distributed.is_initialized()
            first = torch.distributed.get_rank() * len(x) if spread else 0
        offset = self.step.clone() if step is None else step
        if self.training and step is None:
            self.step += 1
        alpha: Tensor | float = self.alpha
        sigma: Any = self.sigma
        keys: dict[str, Any] = {"seed": self.seed, "offset": offset, "first": first}
        if self.schedule is not None:
            t = self.schedule.sample_t(len(x), dtype=torch.float64, device=x.device, **keys)
            alpha, sigma = self.schedule.alpha(t).to(x.dtype), self.schedule.sigma(t).to(x.dtype)
        elif isinstance(self.sigma, tuple):
            low, high = self.sigma
            u = ops.uniform(
                (len(x),), stream=STREAM_TIME, dtype=torch.float64, device=x.device, **keys
            )
            sigma = (low * (high / low) ** u).to(x.dtype)
        loss: Tensor = score_matching_loss(model, x, sigma, alpha=alpha, **keys, **self.options)
        return loss
