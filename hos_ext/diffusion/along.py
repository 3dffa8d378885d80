"""A model that knows plain noise, taken along a schedule.

Networks of this package, heads and `ModelScore` are called in variance-exploding coordinates, x =
x0 + sigma z. The samplers go down a schedule, x_t = alpha x0 + sigma z. x_t / alpha is a sample
with the plain noise sigma / alpha, and scaled quantities do not change: the score of x_t is that of
x_t / alpha over alpha, so sigma s1 is the same for both, and likewise c and sigma U.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check, check_callable, check_samples, check_tensor, positive
from ..schedules import Schedule, check_schedule
from ..scores import ScoreModel, Scores


class AlongSchedule(nn.Module):
    """`model(x_t, sigma) -> Scores` along a schedule, from a model in variance-exploding ones.

    It is for all that takes a schedule: reverse processes, `log_likelihood`, `tweedie_denoise`, and
    `ScoreMatchingLoss(schedule=...)`. So a network trained with plain noise, sigma alone, samples
    along any schedule whose sigma / alpha stays in its range: a rectified flow, say. A network that
    was trained along the schedule itself needs no `AlongSchedule`.

    Args:
        model: `model(x, sigma, **model_kwargs)` at x = x0 + sigma z -> sigma * s1 as x (a
            `ModelScore`: then c of the result is None), or -> `Scores` (a `SecondOrderHead`).
        schedule: a `Schedule`. It is called at x_t / alpha and sigma / alpha.

    Attributes:
        model, schedule: as they were given.

    Raises:
        TypeError: model is not callable, schedule is none.

    Example:
        A network that gives the velocity of a rectified flow samples as every model does.

        >>> import torch
        >>> from hos_ext import ModelScore, Rectified
        >>> from hos_ext.diffusion import AlongSchedule, prior, probability_flow_ode
        >>> flow = Rectified()
        >>> def net(x, t):  # exact for data N(0, I / 4)
        ...     t = t.unsqueeze(1)
        ...     return (t - (1 - t) / 4) / (t**2 + (1 - t) ** 2 / 4) * x
        >>> model = AlongSchedule(ModelScore(net, flow, "flow"), flow)
        >>> start = prior((1000, 2), flow, data_std=0.5, seed=0)
        >>> x = probability_flow_ode(model, start, flow, n_steps=20)
        >>> bool((x.std(0) - 0.5).abs().max() < 0.05)
        True
    """

    def __init__(self, model: ScoreModel, schedule: Schedule) -> None:
        super().__init__()
        where = "AlongSchedule"
        check_callable(where, "model", model)
        check_schedule(where, schedule)
        self.model, self.schedule = model, schedule
        self._ends = tuple(schedule.sigma(t) for t in (schedule.t_min, schedule.t_max))

    def forward(self, x: Tensor, sigma: Tensor | float, **model_kwargs: Any) -> Scores:
        """The scaled scores at x = alpha x0 + sigma z.

        Args:
            x: noisy samples. Shape (B, *dims), float32 or float64. Data units.
            sigma: sigma(t) of the schedule. Float or shape (B,). Data units.
            model_kwargs: conditions, handed on to the model.

        Raises:
            TypeError, ValueError: x or sigma does not fit, sigma is none of the schedule; what the
                model raises.
        """
        where = "AlongSchedule"
        check_samples(where, "x", x)
        level = positive(where, "sigma", sigma, x)
        alpha, wide = levels_along(where, self.schedule, level, self._ends)
        alpha, ratio = alpha.to(level), (wide / alpha).to(level)
        out = self.model(x / alpha.reshape(-1, *[1] * (x.dim() - 1)), ratio, **model_kwargs)
        if isinstance(out, Scores):
            return out
        check_tensor(where, "what model returns", out, like=x, shape=tuple(x.shape))
        return Scores(out, None)  # type: ignore[arg-type]


def levels_along(
    where: str, schedule: Schedule, sigma: Tensor, ends: tuple[float, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """alpha and sigma at the time that goes with sigma, in float64 on the CPU.

    Args:
        where: the public function.
        schedule: a `Schedule`.
        sigma: 0-d or one value a row, checked, in the dtype of x; it may be rounded to beyond the
            ends of the schedule.
        ends: sigma at t_min and at t_max, where they are known.

    Returns:
        Both () or (B,), as sigma is.

    Raises:
        ValueError: sigma is none of the schedule.
    """
    # On the CPU: where t is found by bisection these are hundreds of tiny operations.
    wide = sigma.flatten().cpu().double() if sigma.dim() else sigma.cpu().double()
    low, high = ends or (schedule.sigma(schedule.t_min), schedule.sigma(schedule.t_max))
    slack = 1 + 2 * torch.finfo(sigma.dtype).eps  # the ends, rounded to the dtype of x
    bad = (wide < low / slack) | (wide > high * slack)
    rule = f"sigma must be in [{low:g}, {high:g}], the noise levels of the schedule"
    got = f"{wide[bad].flatten()[0]:g}" if bool(bad.any()) else ""
    check(where, not got, rule, got)
    t = schedule.t_of_sigma(wide.clamp(low, high))
    return schedule.alpha(t), schedule.sigma(t)
