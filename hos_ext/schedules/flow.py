"""Schedules of flow matching: the line from the clean sample to the noise, and any curve like it.

Flow matching (Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003) names the
path x_t = alpha(t) x0 + sigma(t) z itself, and a network learns its velocity dx_t / dt = alpha' x0
+ sigma' z. The SDE with the same marginals follows from the two functions and their slopes: with
w = alpha sigma' - alpha' sigma,

    beta = -2 alpha' / alpha,    g^2 = 2 sigma w / alpha,    (sigma / alpha)' = w / alpha^2.

Here t = 0 is the data and t = 1 the noise, as in Stable Diffusion 3 and diffusers. Where a text has
it the other way round, write its path in 1 - t and change the sign of its velocity.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from ..checks import as_float, check, check_callable, check_number, is_number, show
from .base import Schedule, Time, check_parameters, number

Curve: TypeAlias = Callable[[Tensor], Tensor]
"""Maps times, a float64 tensor of any shape, to values of the same shape, each time by itself."""

_POINTS = 1025  # where the functions of an `Interpolant` are looked at


class Flow(Schedule):
    """A path given by alpha, sigma and their slopes; a child gives these and t(sigma)."""

    @abstractmethod
    def _alpha_slope(self, t: Tensor) -> Tensor:
        """alpha'(t)."""

    @abstractmethod
    def _sigma_slope(self, t: Tensor) -> Tensor:
        """sigma'(t)."""

    def _beta(self, t: Tensor) -> Tensor:
        return -2 * self._alpha_slope(t) / self._alpha(t)

    def _diffusion2(self, t: Tensor) -> Tensor:
        alpha, sigma = self._alpha(t), self._sigma(t)
        w = alpha * self._sigma_slope(t) - self._alpha_slope(t) * sigma
        return 2 * sigma * w / alpha


@dataclass(frozen=True)
class Rectified(Flow):
    """Rectified flow: x_t = (1 - t) x0 + t z, a straight line; t in [t_min, t_max] within (0, 1).

    alpha = 1 - t, sigma = t, beta = 2 / (1 - t), g^2 = 2 t / (1 - t), velocity z - x0. Both ends
    are left out. At t = 0 there is no noise: the score of the data need not exist, and the
    velocity does not tell it. At t = 1 there is no signal: alpha = 0, and beta and g diverge. The
    velocity itself is finite at both.

    An error e of sigma s1 is one of e / (1 - t) in the velocity. So a network that learns scores
    along this line is best taken as `hos_ext.diffusion.AlongSchedule(network, Rectified())`, also
    in training: it then sees x / alpha and sigma / alpha, and its errors fade towards t = 1.

    Attributes:
        t_min, t_max: the times in use. At 0.98 sigma / alpha is 49, much as at the end of `VE`.
            Networks that give the velocity itself may go on to 0.999 and beyond.
        shift: how much of the grid and of the random times lies near the noise. A time t becomes
            shift t / (1 + (shift - 1) t), so that sigma / alpha is multiplied by shift. 1: evenly
            spread; Stable Diffusion 3 takes 3 for large pictures.
        logit_normal: (mean, standard deviation) of log(t / (1 - t)) in training, before the shift,
            conditioned on [t_min, t_max]; (0, 1) in Stable Diffusion 3. None: uniform.

    References:
        Esser et al. 2024, arXiv:2403.03206: section 3.1 (logit-normal), Eq. 23 (shift).

    Example:
        >>> from hos_ext import Rectified
        >>> schedule = Rectified(shift=3.0)
        >>> schedule.alpha(0.25), schedule.sigma(0.25)
        (0.75, 0.25)
        >>> [round(t, 3) for t in schedule.times(4).tolist()]
        [0.98, 0.879, 0.728, 0.481, 0.001]
    """

    t_min: float = 1e-3
    t_max: float = 0.98
    shift: float = 1.0
    logit_normal: tuple[float, float] | None = None

    _because = " (sigma = 0 at t = 0, alpha = 0 at t = 1)"

    def __post_init__(self) -> None:
        where = self._name()
        for name in ("t_min", "t_max"):
            number(self, name)
        rule = "t_min must be positive (sigma = 0 at t = 0, where the score is not defined)"
        check(where, self.t_min > 0, rule, self.t_min)
        rule = "t_max must be below 1 (alpha = 0 at t = 1: no signal, beta = 2 / (1 - t) diverges)"
        check(where, self.t_max < 1, rule, self.t_max)
        check_parameters(self, 0.0, "t_min", "t_max")
        check_parameters(self, 0.0, "shift")
        if self.logit_normal is not None:
            pair, rule = self.logit_normal, "logit_normal must be (mean, standard deviation)"
            fine = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(is_number, pair))
            check(where, fine, rule, lambda: show(pair), TypeError)
            check(where, math.isfinite(as_float(pair[0])), "logit_normal must be finite", pair)
            check_number(where, "the standard deviation of logit_normal", pair[1])
            object.__setattr__(self, "logit_normal", tuple(map(float, pair)))

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _alpha_slope(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def _sigma_slope(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _diffusion2(self, t: Tensor) -> Tensor:
        return 2 * t / (1 - t)  # w is 1

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clone()

    def _t_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)

    def _evenly(self, part: Tensor) -> Tensor:
        """The time a part of the way from t_min to t_max, even steps before the shift."""
        low, high = (_shifted(t, 1 / self.shift) for t in (self.t_min, self.t_max))
        times = _shifted(low + part * (high - low), self.shift)
        return times.clamp(self.t_min, self.t_max)

    def _grid(self, part: Tensor) -> Tensor:
        return self._evenly(1 - part)

    def _quantile(self, u: Tensor) -> Tensor:
        if self.logit_normal is None:
            return self._evenly(u)
        mean, std = (as_float(value) for value in self.logit_normal)
        mean += math.log(self.shift)
        ends = u.new_tensor([self.t_min, self.t_max]).logit()
        low, high = torch.special.ndtr((ends - mean) / std)
        t: Tensor = (mean + std * torch.special.ndtri(low + u * (high - low))).sigmoid()
        return t.clamp(self.t_min, self.t_max)


class Interpolant(Flow):
    """Any path x_t = alpha(t) x0 + sigma(t) z, given by its two functions.

    Noise must grow: sigma and sigma / alpha rise with t. So sigma tells the time, and networks are
    told sigma alone. This, and the slopes where they are given, is looked at once, at 1025 times.

    Args:
        alpha, sigma: differentiable functions of a float64 tensor of times, of values > 0 on
            [t_min, t_max], of the same shape.
        t_min, t_max: the times in use, of any sign.
        alpha_slope, sigma_slope: their derivatives, as functions of the same kind. None:
            by automatic differentiation.

    Raises:
        TypeError: a function is none, or returns something else than a tensor.
        ValueError: a value is not finite, alpha or sigma not positive, sigma or sigma / alpha does
            not rise, or a slope is not the derivative. The message has the time.

    References:
        Albergo and Vanden-Eijnden 2023, arXiv:2209.15571.

    Example:
        The quarter circle alpha = cos, sigma = sin, whose noise and signal add up to one.

        >>> import math, torch
        >>> from hos_ext.schedules import Interpolant
        >>> circle = Interpolant(
        ...     lambda t: torch.cos(math.pi / 2 * t),
        ...     lambda t: torch.sin(math.pi / 2 * t),
        ...     t_min=1e-3,
        ...     t_max=0.999,
        ... )
        >>> round(circle.alpha(0.5) ** 2 + circle.sigma(0.5) ** 2, 12)
        1.0
        >>> round(circle.t_of_sigma(circle.sigma(0.3)), 12)
        0.3
    """

    def __init__(
        self,
        alpha: Curve,
        sigma: Curve,
        *,
        t_min: float,
        t_max: float,
        alpha_slope: Curve | None = None,
        sigma_slope: Curve | None = None,
    ) -> None:
        where = self._name()
        curves = {"alpha": alpha, "sigma": sigma}
        slopes = {"alpha_slope": alpha_slope, "sigma_slope": sigma_slope}
        for name, curve in {**curves, **slopes}.items():
            if curve is not None:
                check_callable(where, name, curve)
        self._ends = (t_min, t_max)
        for name in ("t_min", "t_max"):
            number(self, name)
        check(where, t_min < t_max, "t_max must be greater than t_min", t_max)
        self._curves = curves | {name: slope for name, slope in slopes.items() if slope}
        self._look()

    @property
    def t_min(self) -> float:
        return self._ends[0]

    @property
    def t_max(self) -> float:
        return self._ends[1]

    def __repr__(self) -> str:
        return f"Interpolant(t_min={self.t_min:g}, t_max={self.t_max:g})"

    def _alpha(self, t: Tensor) -> Tensor:
        return self._value("alpha", t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self._value("sigma", t)

    def _alpha_slope(self, t: Tensor) -> Tensor:
        return self._slope("alpha", t)

    def _sigma_slope(self, t: Tensor) -> Tensor:
        return self._slope("sigma", t)

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        with torch.no_grad():
            t = self._bisect(lambda t: self._sigma(t) < sigma, sigma)
            slope = self._sigma_slope(t)
        return t + (sigma - self._sigma(t).detach()) / slope  # for the derivative in sigma

    def _value(self, name: str, t: Tensor) -> Tensor:
        value = self._curves[name](t)
        where, kind = self._name(), type(value).__name__
        check(where, isinstance(value, Tensor), f"{name}(t) must be a Tensor", kind, TypeError)
        fine = value.shape == t.shape
        check(where, fine, f"{name}(t) must have the shape of t", tuple(value.shape))
        return value.to(t.dtype)

    def _slope(self, name: str, t: Tensor) -> Tensor:
        if f"{name}_slope" in self._curves:
            return self._value(f"{name}_slope", t)
        # Not autograd.grad, which asks too little of t inside torch.func's transforms.
        value, pull_back = torch.func.vjp(lambda t: self._value(name, t), t)[:2]
        slope: Tensor = pull_back(torch.ones_like(value))[0]
        return slope

    def _look(self) -> None:
        """Refuses functions that are no path from data to noise."""
        where = self._name()
        t = torch.linspace(self.t_min, self.t_max, _POINTS, dtype=torch.float64)
        values = {name: self._value(name, t).detach() for name in self._curves}
        alpha, sigma = values["alpha"], values["sigma"]

        def hold(good: Tensor, rule: str, value: Tensor) -> None:
            def got() -> str:
                i = int((~good).nonzero()[0])
                return f"{value[i].item():g} at t = {t[i].item():g}"

            check(where, bool(good.all()), rule, got)

        for name, value in values.items():
            hold(value.isfinite(), f"{name}(t) must be finite in [t_min, t_max]", value)
        rule = "alpha(t) must be positive (alpha = 0 has no signal, and beta and g diverge)"
        hold(alpha > 0, rule, alpha)
        rule = "sigma(t) must be positive (sigma = 0 has no noise, and no score)"
        hold(sigma > 0, rule, sigma)
        first = torch.ones(1, dtype=torch.bool)
        rises = torch.cat([sigma.diff() > 0, first])
        hold(rises, "sigma(t) must rise, for it tells networks the time", sigma)
        rises = torch.cat([(sigma / alpha).diff() > 0, first])
        rule = "sigma(t) / alpha(t) must rise, t_min being the data (else write the path in 1 - t)"
        hold(rises, rule, sigma / alpha)
        step = (self.t_max - self.t_min) * 1e-5
        for name in ("alpha", "sigma"):
            rule = f"the slope of {name}(t) must be its derivative (by torch, or {name}_slope)"
            try:
                slope = self._slope(name, t).detach()
            except RuntimeError as error:  # as for a function that goes through numpy
                reason = str(error).partition("\n")[0]
                raise ValueError(f"{where}: {rule}, got {reason}") from None
            hold(slope.isfinite(), f"the slope of {name}(t) must be finite", slope)
            inner = t[1:-1]
            rise = self._value(name, inner + step) - self._value(name, inner - step)
            away = (slope[1:-1] - rise.detach() / (2 * step)).abs()
            close = away <= 1e-3 * (slope.abs() + slope.abs().mean())[1:-1]
            close = torch.cat([first, close, first])
            hold(close, rule, slope)


def _shifted(t: Time, shift: float) -> Time:
    """The time at which sigma / alpha is shift times that at t."""
    return cast(Time, shift * t / (1 + (shift - 1) * t))
