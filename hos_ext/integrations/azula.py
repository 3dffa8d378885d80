"""A score model as the denoiser that other libraries expect, its covariance still at hand.

`MeanDenoiser` is a plain module: deepinv and loops of one's own take it as it is. azula has classes
of its own: `azula_denoiser` makes one, for its samplers and its guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import as_float, check, check_number, check_samples, positive, require
from ..conditions import check_conditions
from ..schedules import Schedule, check_schedule
from ..scores import Model, model_scores
from ..tweedie.posterior import Posterior, posterior


class MeanDenoiser(nn.Module):
    """`denoiser(x, sigma)` -> E[x0 | x], for x = x0 + sigma z, as deepinv's denoisers are called.

    deepinv makes a prior of such a module, `deepinv.optim.ScorePrior(MeanDenoiser(model))`. The
    score of that prior is then the model's. deepinv's images lie in [0, 1]. Where the model was
    trained in other units, `shift` and `scale` say how: x_model = (x - shift) / scale.

    Args:
        model: `model(x, sigma) -> Scores`, trained with alpha = 1, or with the schedule's alpha.
        schedule: of a model trained with alpha: it is called with alpha x at the time at which
            sigma(t) / alpha(t) is the sigma asked for, which must lie within the schedule.
        shift: a number, in the units of x.
        scale: a number, > 0. Units of x over units of the model.

    Raises:
        TypeError: the model returns something else; an argument of the wrong kind.
        ValueError: x, sigma or what the model returns does not fit, or scale is not positive.

    Example:
        >>> import hos_ext, torch
        >>> from hos_ext.integrations import MeanDenoiser
        >>> denoiser = MeanDenoiser(hos_ext.MLP((2,), 1))
        >>> denoiser(torch.ones(1, 2), 1.0)  # a fresh model is that of standard normal samples
        tensor([[0.5000, 0.5000]], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        model: Model,
        *,
        schedule: Schedule | None = None,
        shift: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        where = "MeanDenoiser"
        if schedule is not None:
            check_schedule(where, schedule)
        self.model, self.schedule = model, schedule
        self.scale = check_number(where, "scale", scale)
        fine = (
            isinstance(shift, (int, float))
            and not isinstance(shift, bool)
            and math.isfinite(as_float(shift))
        )
        check(where, fine, "shift must be a finite number", f"{shift!r}")
        self.shift = float(shift)

    def forward(self, x: Tensor, sigma: float | Tensor, **options: Any) -> Tensor:
        """The posterior mean. x (B, *dims); sigma a float, or any shape with 1 or B elements.

        Of further options of the caller the model gets those that its attribute `conditions` names,
        such as label. The others, such as deepinv's own, are not used.
        """
        return self.posterior(x, sigma, **_known_to(self.model, options)).mean

    def posterior(self, x: Tensor, sigma: float | Tensor, **model_kwargs: Any) -> Posterior:
        """Mean and covariance of the clean sample, in the units of x, under these conditions."""
        where = "MeanDenoiser"
        check_samples(where, "x", x)
        level = _levels(where, sigma, x) / self.scale
        inside = (x - self.shift) / self.scale
        alpha = torch.ones_like(level)
        if self.schedule is not None:
            t = self.schedule.t_of_ratio(level.double())
            level, alpha = self.schedule.sigma(t).to(x), self.schedule.alpha(t).to(x)
            inside = alpha.reshape(-1, *[1] * (x.dim() - 1)) * inside
        conditions = check_conditions(where, model_kwargs, len(x))
        scores = model_scores(where, self.model, inside, level, conditions)
        answer = posterior(inside, scores, level, alpha)
        covariance = answer.covariance.scale(self.scale**2)
        return Posterior(answer.mean * self.scale + self.shift, covariance)


def azula_denoiser(model: Model, schedule: Schedule | Any) -> Any:
    """An `azula.denoise.Denoiser` whose posterior is Gaussian with the model's own moments.

    It returns azula's `GaussianPosterior` (mean, and the variance of each entry), with the whole
    `hos_ext.Posterior` beside it as `posterior`.

    Args:
        model: `model(x, sigma) -> Scores`.
        schedule: a `Schedule` of this package, whose [t_min, t_max] becomes azula's [0, 1], or one
            of azula. The model must have been trained with its (alpha, sigma).

    Returns:
        A module: `denoiser(x_t, t)` for azula's samplers.

    Raises:
        TypeError: schedule is none.
        RuntimeError: azula is not installed.

    Example:
        >>> import hos_ext
        >>> from hos_ext.integrations import azula_denoiser
        >>> model = hos_ext.MLP((2,), 1)
        >>> denoiser = azula_denoiser(model, hos_ext.VP())  # doctest: +SKIP
    """
    azula = require("azula_denoiser", "azula.denoise")
    fine, got = isinstance(schedule, Schedule) or callable(schedule), type(schedule).__name__
    check("azula_denoiser", fine, "schedule must be a Schedule, or one of azula", got, TypeError)

    class SecondOrderDenoiser(azula.Denoiser):  # type: ignore[misc, name-defined]
        """Made by `hos_ext.integrations.azula_denoiser`."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.schedule = _levels_of(schedule) if isinstance(schedule, Schedule) else schedule

        def forward(self, x_t: Tensor, t: Tensor, **options: Any) -> Any:
            alpha, sigma = (v.expand(len(x_t)).to(x_t) for v in self.schedule(t))
            told = check_conditions(
                "azula_denoiser", _known_to(self.model, options), len(x_t), "x_t"
            )
            scores = model_scores("azula_denoiser", self.model, x_t, sigma, told)
            answer = posterior(x_t, scores, sigma, alpha)
            variance = answer.covariance.diagonal().reshape(x_t.shape)
            result = azula.GaussianPosterior(mean=answer.mean, var=variance)
            result.posterior = answer
            return result

    return SecondOrderDenoiser()


def _known_to(model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that are conditions of the model."""
    names = getattr(model, "conditions", ())
    return {name: value for name, value in options.items() if name in names}


def _levels_of(schedule: Schedule) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """azula's schedule: a time in [0, 1] -> alpha, sigma."""

    def levels(t: Tensor) -> tuple[Tensor, Tensor]:
        inside = schedule.t_min + t.clamp(0, 1) * (schedule.t_max - schedule.t_min)
        return schedule.alpha(inside), schedule.sigma(inside)

    return levels


def _levels(where: str, sigma: float | Tensor, x: Tensor) -> Tensor:
    """sigma as (B,), from a float or from any shape with one element for all or for each."""
    dense = isinstance(sigma, Tensor) and sigma.layout is torch.strided
    if isinstance(sigma, Tensor) and dense and sigma.dim() > 0 and sigma.numel() in (1, len(x)):
        sigma = sigma.reshape(-1).expand(len(x))
    return positive(where, "sigma", sigma, x).reshape(-1).expand(len(x))
