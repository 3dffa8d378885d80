"""`score_matching_loss` as a module that draws its own noise levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import (
    check,
    check_first,
    check_int,
    check_number,
    check_samples,
    range_of,
    said_by,
)
from ..conditions import Conditions
from ..ops._checks import check_counter
from ..ops.noise import uniform
from ..random import STREAM_TIME, Key, seed_from
from ..schedules import Schedule, check_schedule
from ..scores import Model
from .score_matching import (
    RECOMMENDED,
    Objective,
    check_objective,
    refuse_rounding,
    score_matching_loss,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ScoreMatchingLoss(nn.Module):
    """`score_matching_loss` as a module that draws the noise levels too, for any training loop.

    `loss = criterion(model, batch)` in a plain loop or in Lightning's `training_step`. In training
    mode every call is one step: levels and noise are functions of (seed, step, first + row). The
    step is a buffer, so that a run resumed from a checkpoint draws what it would have drawn. Under
    torch.distributed every rank draws the rows behind those of the ranks before it. In evaluation
    mode the step stands still: the same draws at each call, or those of `step`.

    Args:
        sigma: noise level, a float; or (low, high), drawn log-uniformly for each sample; None with
            a schedule. Data units.
        schedule: a `Schedule`; times are drawn by its `sample_t`. Along a flow, give the model as
            `hos_ext.diffusion.AlongSchedule(model, schedule)`: see `Rectified`.
        alpha: signal scale, with a fixed sigma.
        seed: key of all draws.
        generator: a `torch.Generator` in place of seed, which is drawn from it here, once.
        options: what is fitted, as `score_matching_loss` describes it: gamma, variance_reduction,
            first_order, diagonal, scale_free, detach_score, centred, reduction.

    Raises:
        TypeError, ValueError: sigma and schedule are both given or neither, or sigma is not
            positive; what `score_matching_loss` raises, at the call.

    Example:
        >>> import hos_ext, torch
        >>> model = hos_ext.MLP((2,), 1)
        >>> criterion = hos_ext.ScoreMatchingLoss((0.1, 1.0), centred=True)
        >>> criterion(model, torch.zeros(4, 2)).shape, int(criterion.step)
        (torch.Size([]), 1)
    """

    step: Tensor

    def __init__(
        self,
        sigma: float | tuple[float, float] | None = None,
        *,
        schedule: Schedule | None = None,
        alpha: float = 1.0,
        seed: int = 0,
        generator: torch.Generator | None = None,
        **options: Unpack[Objective],
    ) -> None:
        super().__init__()
        where = "ScoreMatchingLoss"
        known = sorted(Objective.__annotations__)
        for name in sorted(options.keys() - known):
            raise TypeError(f"{where}: options must be of {', '.join(known)}, got {name}")
        check_objective(where, **options)
        if schedule is not None:
            check_schedule(where, schedule)
        self.alpha = check_number(where, "alpha", alpha)
        fixed = isinstance(sigma, (int, float))
        check(where, self.alpha == 1 or fixed, "alpha must be 1 but with a fixed sigma", alpha)
        rule = "exactly one of sigma and schedule must be given"
        got = "neither" if sigma is None else "both"
        check(where, (sigma is None) != (schedule is None), rule, got)
        if isinstance(sigma, tuple):
            sigma = range_of(where, "sigma", sigma)
            rising = sigma[0] < sigma[1]
            check(where, rising, "sigma must be a float or (low, high)", sigma)
        elif sigma is not None:
            sigma = check_number(where, "sigma", sigma)
        seed = check_int(where, "seed", seed_from(where, seed, generator, 0), 2**63)
        self.sigma, self.schedule, self.seed, self.options = sigma, schedule, seed, options
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        model: Model,
        x0: Tensor,
        *,
        step: Tensor | int | None = None,
        first: int | None = None,
        model_kwargs: Conditions | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            model: `model(x, sigma) -> Scores`.
            x0: clean samples. Shape (B, *dims). Data units.
            step: number of the step, in place of the module's own, which then stands still.
            first: global index of row 0, for micro-batches of one step. None: the rank times the
                rows of the batch under torch.distributed (the same number on every rank), else 0.
            model_kwargs: conditions of the model, as `score_matching_loss` takes them.

        Returns:
            As `score_matching_loss`: a scalar, or (B,) with reduction="none".

        Raises:
            TypeError, ValueError: what `score_matching_loss` raises.
        """
        where = "ScoreMatchingLoss"
        check_samples(where, "x0", x0)
        if step is not None:
            step = check_counter(where, "step", step, 2**56, x0.device)
        if first is None:
            spread = torch.distributed.is_available() and torch.distributed.is_initialized()
            first = torch.distributed.get_rank() * len(x0) if spread else 0
        first = check_first(where, first, x0.shape)
        key = Key(self.seed, self.step.clone() if step is None else step, first)
        if self.training and step is None:
            self.step += 1
        self._refuse_rounding(where, model, x0)
        sigma, alpha = self._levels(x0, key)
        draws: dict[str, Any] = key._asdict()
        with said_by(where, "score_matching_loss"):
            loss: Tensor = score_matching_loss(
                model,
                x0,
                sigma,
                alpha=alpha,
                model_kwargs=model_kwargs,
                **draws,
                **self.options,
            )
        return loss

    def _refuse_rounding(self, where: str, model: Model, x0: Tensor) -> None:
        """The lowest level, at the first call and not when it is drawn one day."""
        reduced = self.options.get("variance_reduction", RECOMMENDED["variance_reduction"])
        if not reduced and self.options.get("first_order") != "vr":
            return
        if self.schedule is not None:
            t = self.schedule.t_min
            ratio = self.schedule.sigma(t) / self.schedule.alpha(t)
        else:
            assert self.sigma is not None  # the schedule's absence says so
            low = self.sigma[0] if isinstance(self.sigma, tuple) else self.sigma
            ratio = low / self.alpha
        centred = self.options.get("centred", RECOMMENDED["centred"])
        refuse_rounding(where, model, x0, ratio, 1.0, centred)

    def _levels(self, x0: Tensor, key: Key) -> tuple[Tensor | float, Tensor | float]:
        """sigma and alpha of a batch."""
        draws: dict[str, Any] = {**key._asdict(), "dtype": torch.float64, "device": x0.device}
        if self.schedule is not None:
            t = self.schedule.sample_t(len(x0), **draws)
            return self.schedule.sigma(t).to(x0.dtype), self.schedule.alpha(t).to(x0.dtype)
        if isinstance(self.sigma, tuple):
            low, high = self.sigma
            u = uniform((len(x0),), stream=STREAM_TIME, **draws)
            return (low * (high / low) ** u).to(x0.dtype), self.alpha
        assert self.sigma is not None  # the schedule's absence says so
        return self.sigma, self.alpha
