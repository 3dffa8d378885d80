"""What all schedules share: the public methods around the formulas of each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from .. import ops
from ..checks import (
    WIDE,
    as_float,
    check,
    check_count,
    check_int,
    check_kind,
    check_tensor,
    dtype_of,
    is_number,
    per_sample,
    said_by,
)
from ..random import STREAM_TIME

Time = TypeVar("Time", bound=float | Tensor)


class Schedule(ABC):
    """What all schedules share; VE, VP, CosineVP, SubVP, EDM, DiscreteVP, Rectified are made.

    Another one gives t_min, t_max and the formulas: `_alpha`, `_sigma`, `_beta`, `_diffusion2` and
    `_t_of_sigma`, float64 tensors in and out. The public methods check t and keep its kind.

    Attributes:
        t_min, t_max: the times in use; noise grows from t_min to t_max.

    Raises:
        TypeError, ValueError: from every method that takes t: it is no float and no 0-d or (B,)
            tensor of float32 or float64, or it is out of [t_min, t_max]. Likewise `t_of_sigma`.

    Example:
        >>> from hos_ext import VP
        >>> schedule = VP()
        >>> round(schedule.alpha(0.5) ** 2 + schedule.sigma(0.5) ** 2, 6)
        1.0
        >>> round(schedule.t_of_sigma(schedule.sigma(0.5)), 6)
        0.5
        >>> schedule.times(4)
        tensor([1.0000, 0.7502, 0.5005, 0.2508, 0.0010], dtype=torch.float64)
    """

    # Why times beyond the ends are refused, for messages.
    _because = ""

    @property
    @abstractmethod
    def t_min(self) -> float: ...

    @property
    @abstractmethod
    def t_max(self) -> float: ...

    def alpha(self, t: Time) -> Time:
        """Scale of the clean sample, > 0."""
        return self._at("alpha", self._alpha, t)

    def sigma(self, t: Time) -> Time:
        """Standard deviation of the noise, > 0. Units of the data."""
        return self._at("sigma", self._sigma, t)

    def beta(self, t: Time) -> Time:
        """Rate of the drift, -2 alpha' / alpha; >= 0 where alpha falls. Units 1/time."""
        return self._at("beta", self._beta, t)

    def alpha_slope(self, t: Time) -> Time:
        """alpha', the derivative of `alpha` in t. Units 1/time."""
        return self._at("alpha_slope", self._alpha_slope, t)

    def sigma_slope(self, t: Time) -> Time:
        """sigma', the derivative of `sigma` in t. Units of the data/time."""
        return self._at("sigma_slope", self._sigma_slope, t)

    def diffusion(self, t: Time) -> Time:
        """g, the standard deviation of the forward noise per square root of time."""
        return self._at("diffusion", lambda u: self._diffusion2(u).sqrt(), t)

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """-(beta(t) / 2) x. x (B, *dims), float32 or float64; t a float or (B,)."""
        where = f"{self._name()}.drift"
        check_tensor(where, "x", x)
        beta = self._at("drift", self._beta, t)
        return -per_sample(where, "t", beta, x) / 2 * x

    def t_of_sigma(self, sigma: Time) -> Time:
        """The time at which `sigma(t)` is the given one; to rounding, within [t_min, t_max].

        Where sigma(t) is flat (VP near t_max, sigma near 1) a rounded sigma hardly tells the time:
        use float64 there.
        """
        where = f"{self._name()}.t_of_sigma"
        low, high = self.sigma(self.t_min), self.sigma(self.t_max)
        # sigma_max itself may be a rounding beyond sigma(t_max).
        wide = _checked(where, "sigma", sigma, low * (1 - 1e-12), high * (1 + 1e-12))
        t = self._t_of_sigma(wide.clamp(low, high)).clamp(self.t_min, self.t_max)
        return _like(t.where(wide > low, self.t_min).where(wide < high, self.t_max), sigma)

    def t_of_ratio(self, ratio: Time) -> Time:
        """The time at which sigma(t) / alpha(t), the noise in units of the data, is the given one.

        That is the sigma of x / alpha = x0 + (sigma / alpha) z, which a denoiser for plain noise is
        asked for. In float64, within [t_min, t_max].
        """
        where = f"{self._name()}.t_of_ratio"
        low, high = (self.sigma(t) / self.alpha(t) for t in (self.t_min, self.t_max))
        wide = _checked(where, "ratio", ratio, low, high)
        return _like(self._t_of_ratio(wide).clamp(self.t_min, self.t_max), ratio)

    def times(self, n: int) -> Tensor:
        """The grid of the samplers: n + 1 times from t_max down to t_min, float64, on the CPU.

        Equal steps in t; for EDM equal steps in t^(1 / rho), for Rectified before its shift.
        """
        n = check_count(f"{self._name()}.times", "n", n)
        grid = self._grid(torch.linspace(0, 1, n + 1, dtype=torch.float64))
        grid[0], grid[-1] = self.t_max, self.t_min  # not a rounding off
        return grid

    def sample_t(
        self,
        n: int,
        *,
        seed: int | Tensor | None = None,
        offset: int | Tensor = 0,
        first: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n random times for training, a function of (seed, offset, first + row) alone.

        Uniform on [t_min, t_max]; EDM: log sigma is N(p_mean, p_std^2), conditioned on
        [sigma_min, sigma_max]; DiscreteVP: uniform on the integers 0 ... N - 1; Rectified: shifted,
        and logit-normal where asked.

        Args:
            n: how many.
            seed: 64-bit key, an int or a 0-d int64 tensor.
            offset: second key, such as the training step; likewise.
            first: global index of row 0: ranks and micro-batches draw what one batch would.
            dtype: float32 or float64; torch's default.
            device: torch's default.
            generator: a `torch.Generator` in place of seed, which is drawn from it.

        Returns:
            Shape (n,).

        Raises:
            TypeError, ValueError: an argument out of range or of the wrong kind.
        """
        where = f"{self._name()}.sample_t"
        n = check_int(where, "n", n, 2**63)
        dtype = dtype_of(where, "dtype", dtype, WIDE)
        with said_by(where, "uniform", shape="n"):
            u = ops.uniform(
                (n,),
                seed=seed,
                offset=offset,
                first=first,
                stream=STREAM_TIME,
                dtype=torch.float64,  # 2^-32 steps: float32 would round some to 0 and 1
                device=device,
                generator=generator,
            )
        return self._quantile(u).to(dtype)

    # The formulas: float64 tensor in, float64 tensor out.

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor:
        """alpha(t)."""

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor:
        """sigma(t)."""

    @abstractmethod
    def _beta(self, t: Tensor) -> Tensor:
        """beta(t) = -2 alpha' / alpha."""

    @abstractmethod
    def _diffusion2(self, t: Tensor) -> Tensor:
        """g(t)^2 = (sigma^2)' + beta sigma^2."""

    @abstractmethod
    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        """The inverse of `_sigma`."""

    def _alpha_slope(self, t: Tensor) -> Tensor:
        """alpha'(t)."""
        return -self._beta(t) * self._alpha(t) / 2

    def _sigma_slope(self, t: Tensor) -> Tensor:
        """sigma'(t)."""
        sigma = self._sigma(t)
        return (self._diffusion2(t) / sigma - self._beta(t) * sigma) / 2

    def _t_of_ratio(self, ratio: Tensor) -> Tensor:
        """The inverse of sigma(t) / alpha(t)."""
        return self._bisect(lambda t: self._sigma(t) < ratio * self._alpha(t), ratio)

    def _bisect(self, early: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """The times, shaped as like, up to which `early` holds."""
        low, high = torch.full_like(like, self.t_min), torch.full_like(like, self.t_max)
        for _ in range(60):
            middle = (low + high) / 2
            short = early(middle)
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return (low + high) / 2

    def _grid(self, part: Tensor) -> Tensor:
        """The time a fraction of the way down from t_max."""
        return self.t_max + part * (self.t_min - self.t_max)

    def _quantile(self, u: Tensor) -> Tensor:
        """The inverse distribution function of `sample_t`."""
        return self.t_min + u * (self.t_max - self.t_min)

    def _at(self, method: str, formula: Callable[[Tensor], Tensor], t: Time) -> Time:
        where = f"{self._name()}.{method}"
        wide = _checked(where, "t", t, self.t_min, self.t_max, self._because)
        return _like(formula(wide), t)

    def _name(self) -> str:
        return type(self).__name__


# ----------------------------------------------------------------------------------------- checks


def check_schedule(where: str, schedule: object) -> None:
    """A schedule."""
    check_kind(where, "schedule", schedule, Schedule)


def _checked(
    where: str, name: str, value: float | Tensor, low: float, high: float, because: str = ""
) -> Tensor:
    """A time or sigma as a float64 tensor, in [low, high] to the rounding of its own dtype."""
    if isinstance(value, Tensor):
        check_tensor(where, name, value)
        rule = f"{name} must be a float or have shape () or (B,)"
        check(where, value.dim() <= 1, rule, tuple(value.shape))
    else:
        rule = f"{name} must be a float or a Tensor"
        check(where, is_number(value), rule, type(value).__name__, TypeError)
        value = torch.tensor(as_float(value), dtype=torch.float64)
    if not torch.compiler.is_compiling():
        # Not new_tensor: torch cannot make one like a view with its negative bit set.
        ends = torch.tensor([low, high], dtype=value.dtype, device=value.device)
        good = (value >= ends[0]) & (value <= ends[1])
        check(where, not good.is_meta, f"{name} must hold values", "a meta tensor")
        rule = f"{name} must be in [{low:g}, {high:g}]{because}"
        check(where, bool(good.all()), rule, lambda: f"{value[~good].flatten()[0]:g}")
    # Apple's GPUs have no float64.
    return value if value.device.type == "mps" else value.double()


def _like(result: Tensor, value: Time) -> Time:
    """A float for a float, a tensor of its dtype for a tensor."""
    if isinstance(value, Tensor):
        return cast(Time, result.to(value.dtype))
    return cast(Time, result.item())


def number(schedule: Schedule, name: str) -> float:
    """A field that must be a finite number."""
    where = type(schedule).__name__
    value: float = getattr(schedule, name)
    check(where, is_number(value), f"{name} must be a float", type(value).__name__, TypeError)
    check(where, math.isfinite(as_float(value)), f"{name} must be finite", value)
    return value


def check_parameters(schedule: Schedule, least: float, *names: str) -> None:
    """Fields that must be finite and strictly increasing, the first of them above `least`."""
    for before, name in zip(("", *names), names, strict=False):
        value = number(schedule, name)
        rule = f"{name} must be {f'greater than {before}' if before else 'positive'}"
        check(type(schedule).__name__, value > least, rule, value)
        least = value


def check_ends(schedule: Schedule) -> None:
    """alpha > 0 and sigma > 0 at the ends; both may underflow."""
    for name, value in (
        ("alpha(t_max)", schedule.alpha(schedule.t_max)),
        ("sigma(t_min)", schedule.sigma(schedule.t_min)),
    ):
        check(type(schedule).__name__, value > 0, f"{name} must be positive", value)
