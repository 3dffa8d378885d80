"""Noise schedules: alpha and sigma of the marginal x_t = alpha(t) x0 + sigma(t) z, and its SDE.

The forward SDE is dx = -(beta(t) / 2) x dt + g(t) dw, so that alpha' = -beta alpha / 2 and
(sigma^2)' = g^2 - beta sigma^2. Every schedule has the same methods (`Schedule`); a time is a float
(a float comes back) or a 0-d or (B,) tensor (a tensor of its dtype comes back, computed in float64)
in [t_min, t_max], where alpha > 0 and sigma > 0. Sources: Song et al. 2021 (arXiv:2011.13456) for
VE, VP and sub-VP, Nichol and Dhariwal 2021 (arXiv:2102.09672) for the cosine, Karras et al. 2022
(arXiv:2206.00364) for EDM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from . import ops
from .checks import check_count, check_int, check_tensor, per_sample
from .random import STREAM_SIGMA, STREAM_TIME

_Time = TypeVar("_Time", bound=float | Tensor)


class Schedule:
    """What all schedules share. Not made itself: take VE, VP, CosineVP, SubVP, EDM or DiscreteVP.

    Attributes:
        t_min, t_max: the times in use; noise grows from t_min to t_max.

    Raises:
        TypeError, ValueError: from every method that takes t: it is no float and no 0-d or (B,)
            tensor of float32 or float64, or it is out of [t_min, t_max]. Likewise `t_of_sigma`.
    """

    @property
    def t_min(self) -> float:
        raise NotImplementedError

    @property
    def t_max(self) -> float:
        raise NotImplementedError

    def alpha(self, t: _Time) -> _Time:
        """Scale of the clean sample, > 0."""
        return self._at("alpha", self._alpha, t)

    def sigma(self, t: _Time) -> _Time:
        """Standard deviation of the noise, > 0. Units of the data."""
        return self._at("sigma", self._sigma, t)

    def beta(self, t: _Time) -> _Time:
        """Rate of the drift, -2 alpha' / alpha >= 0. Units 1/time."""
        return self._at("beta", self._beta, t)

    def diffusion(self, t: _Time) -> _Time:
        """g, the standard deviation of the forward noise per square root of time."""
        return self._at("diffusion", lambda u: self._diffusion2(u).sqrt(), t)

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """-(beta(t) / 2) x. x (B, *dims), float32 or float64; t a float or (B,)."""
        check_tensor(f"{self._name()}.drift", "x", x)
        return -per_sample(f"{self._name()}.drift", "beta", self.beta(t), x) / 2 * x

    def t_of_sigma(self, sigma: _Time) -> _Time:
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

    def t_of_ratio(self, ratio: _Time) -> _Time:
        """The time at which sigma(t) / alpha(t), the noise in units of the data, is the given one.

        That is the sigma of x / alpha = x0 + (sigma / alpha) z, which a denoiser for plain noise is
        asked for. By bisection in float64, within [t_min, t_max].
        """
        where = f"{self._name()}.t_of_ratio"
        ends = (self.sigma(t) / self.alpha(t) for t in (self.t_min, self.t_max))
        wide = _checked(where, "ratio", ratio, *ends)
        low, high = torch.full_like(wide, self.t_min), torch.full_like(wide, self.t_max)
        for _ in range(60):
            middle = (low + high) / 2
            short = self._sigma(middle) < wide * self._alpha(middle)
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return _like((low + high) / 2, ratio)

    def times(self, n: int) -> Tensor:
        """The grid of the samplers: n + 1 times from t_max down to t_min, float64, on the CPU.

        Equal steps in t; for EDM equal steps in t^(1 / rho).
        """
        check_count(f"{self._name()}.times", "n", n)
        grid = self._grid(torch.linspace(0, 1, n + 1, dtype=torch.float64))
        grid[0], grid[-1] = self.t_max, self.t_min  # not a rounding off
        return grid

    def sample_t(
        self,
        n: int,
        *,
        seed: int | Tensor,
        offset: int | Tensor = 0,
        first: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """n random times for training, a function of (seed, offset, first + row) alone.

        Uniform on [t_min, t_max]; EDM: log sigma is N(p_mean, p_std^2), conditioned on
        [sigma_min, sigma_max]; DiscreteVP: uniform on the integers 0 ... N - 1.

        Args:
            n: how many.
            seed: 64-bit key, an int or a 0-d int64 tensor.
            offset: second key, such as the training step; likewise.
            first: global index of row 0: ranks and micro-batches draw what one batch would.
            dtype: float32 or float64; torch's default.
            device: torch's default.

        Returns:
            Shape (n,).

        Raises:
            TypeError, ValueError: an argument out of range or of the wrong kind.
        """
        check_int(f"{self._name()}.sample_t", "n", n, 2**63)
        u = ops.uniform(
            (n,),
            seed=seed,
            offset=offset,
            first=first,
            stream=STREAM_TIME,
            dtype=torch.float64,  # 2^-32 steps: float32 would round some to 0 and 1
            device=device,
        )
        return self._quantile(u).to(dtype or torch.get_default_dtype())

    # The formulas: float64 tensor in, float64 tensor out.

    def _alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _beta(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _diffusion2(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def _grid(self, part: Tensor) -> Tensor:
        """The time a fraction of the way down from t_max."""
        return self.t_max + part * (self.t_min - self.t_max)

    def _quantile(self, u: Tensor) -> Tensor:
        """The inverse distribution function of `sample_t`."""
        return self.t_min + u * (self.t_max - self.t_min)

    def _at(self, method: str, formula: Callable[[Tensor], Tensor], t: _Time) -> _Time:
        wide = _checked(f"{self._name()}.{method}", "t", t, self.t_min, self.t_max)
        return _like(formula(wide), t)

    def _name(self) -> str:
        return type(self).__name__


class _Exploding(Schedule):
    """alpha = 1, beta = 0."""

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _beta(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


@dataclass(frozen=True)
class VE(_Exploding):
    """Variance exploding: sigma(t) = sigma_min (sigma_max / sigma_min)^t, t in [0, 1]."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        _check_parameters(self, 0.0, "sigma_min", "sigma_max")

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return 1.0

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (t * math.log(self.sigma_max / self.sigma_min)).exp()

    def _diffusion2(self, t: Tensor) -> Tensor:
        return 2 * math.log(self.sigma_max / self.sigma_min) * self._sigma(t).square()

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return (sigma / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(_Exploding):
    """sigma(t) = t in [sigma_min, sigma_max]; grid and training law of Karras et al. 2022.

    Grid: t^(1 / rho) falls in equal steps (Eq. 5). Training: log sigma ~ N(p_mean, p_std^2), here
    conditioned on [sigma_min, sigma_max] (a part of 2e-5 is left out at the default values).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        _check_parameters(self, 0.0, "sigma_min", "sigma_max")
        _check_parameters(self, 0.0, "rho")
        _check_parameters(self, -math.inf, "p_mean")
        _check_parameters(self, 0.0, "p_std")

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _diffusion2(self, t: Tensor) -> Tensor:
        return 2 * t

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clone()

    def _grid(self, part: Tensor) -> Tensor:
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        grid: Tensor = (high + part * (low - high)) ** self.rho
        return grid

    def _quantile(self, u: Tensor) -> Tensor:
        ends = u.new_tensor([self.sigma_min, self.sigma_max]).log()
        low, high = torch.special.ndtr((ends - self.p_mean) / self.p_std)
        z = torch.special.ndtri(low + u * (high - low))
        sigma: Tensor = (self.p_mean + self.p_std * z).exp()
        return sigma.clamp(self.sigma_min, self.sigma_max)


class _Preserving(Schedule):
    """alpha = exp(-B / 2), sigma^2 = 1 - exp(-B), g^2 = beta = B'; a child gives B, B' and t(B)."""

    def _integral(self, t: Tensor) -> Tensor:
        """B(t), the integral of beta; to full relative precision where it is small."""
        raise NotImplementedError

    def _t_of_integral(self, b: Tensor) -> Tensor:
        raise NotImplementedError

    def _alpha(self, t: Tensor) -> Tensor:
        return (-self._integral(t) / 2).exp()

    def _sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def _diffusion2(self, t: Tensor) -> Tensor:
        return self._beta(t)

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._t_of_integral(-torch.log1p(-sigma.square()))


@dataclass(frozen=True)
class VP(_Preserving):
    """Variance preserving: beta(t) = beta_min + t (beta_max - beta_min), t in [t_min, t_max].

    alpha^2 + sigma^2 = 1. sigma(t) ~ sqrt(beta_min t) vanishes at t = 0, hence t_min > 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_parameters(self, 0.0, "beta_min")
        if not _number(self, "beta_max") >= self.beta_min:
            raise ValueError(
                f"{self._name()}: beta_max must be at least beta_min, got {self.beta_max}"
            )
        _check_parameters(self, 0.0, "t_min", "t_max")
        _check_ends(self)

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _t_of_integral(self, b: Tensor) -> Tensor:
        # The root of the quadratic without the difference of its two large terms.
        slope = self.beta_max - self.beta_min
        return 2 * b / (self.beta_min + (self.beta_min**2 + 2 * slope * b).sqrt())


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-variance preserving: alpha as `VP`, sigma = 1 - exp(-B), g^2 = beta (1 - exp(-2 B))."""

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def _diffusion2(self, t: Tensor) -> Tensor:
        return self._beta(t) * -torch.expm1(-2 * self._integral(t))

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._t_of_integral(-torch.log1p(-sigma))


@dataclass(frozen=True)
class CosineVP(_Preserving):
    """alpha(t) = cos(a) / cos(a0), a = (pi / 2) (t + s) / (1 + s), a0 = a at t = 0; VP otherwise.

    alpha(1) = 0 and beta(1) is infinite, hence t_max < 1. The default leaves alpha = 0.008 and
    beta = 370: the first Euler steps of a reverse SDE overshoot if they are longer than 2 / beta.
    """

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        _check_parameters(self, 0.0, "s")
        _check_parameters(self, 0.0, "t_min", "t_max")
        if self.t_max >= 1:
            raise ValueError(f"CosineVP: t_max must be below 1 (alpha(1) = 0), got {self.t_max}")
        _check_ends(self)

    @property
    def _start(self) -> float:
        """a0."""
        return math.pi / 2 * self.s / (1 + self.s)

    def _turn(self, t: Tensor) -> Tensor:
        """a - a0."""
        return math.pi / 2 / (1 + self.s) * t

    def _integral(self, t: Tensor) -> Tensor:
        # cos(a) / cos(a0) = 1 - (2 sin^2((a - a0) / 2) + sin(a - a0) tan(a0)): no cancellation.
        turn = self._turn(t)
        lost = 2 * (turn / 2).sin().square() + turn.sin() * math.tan(self._start)
        return -2 * torch.log1p(-lost)

    def _beta(self, t: Tensor) -> Tensor:
        return math.pi / (1 + self.s) * (self._start + self._turn(t)).tan()

    def _t_of_integral(self, b: Tensor) -> Tensor:
        # sin^2 a = sin^2 a0 + sigma^2 cos^2 a0, and sin(a - a0) sin(a + a0) = sigma^2 cos^2 a0.
        sin0, cos0 = math.sin(self._start), math.cos(self._start)
        gained = -torch.expm1(-b) * cos0**2
        sin, cos = (sin0**2 + gained).sqrt(), (-b / 2).exp() * cos0
        turn = torch.atan2(gained / (sin * cos0 + cos * sin0), cos * cos0 + sin * sin0)
        return turn * (1 + self.s) * 2 / math.pi


@dataclass(frozen=True, eq=False)
class DiscreteVP(_Preserving):
    """Variance preserving, from a table: alpha(i)^2 = alphas_cumprod[i], t in [0, N - 1].

    Between integers B = -log alpha^2 is a cubic. Its slope at an integer is the harmonic mean of
    the differences of B on both sides, which keeps B rising (Fritsch and Butland 1984,
    doi:10.1137/0905021), and at the ends that of a parabola. So beta = B' is positive and
    continuous, as steps of second order need. Make it by `from_alphas_cumprod`.
    """

    alphas_cumprod: Tensor
    # (4, N - 1): the coefficients of B in p, a part p of the way from i to i + 1.
    _cubics: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table, where = self.alphas_cumprod, "DiscreteVP"
        check_tensor(where, "alphas_cumprod", table, dtypes=(torch.float64,))
        if table.dim() != 1 or len(table) < 2:
            raise ValueError(
                f"{where}: alphas_cumprod must have shape (N,), N >= 2, got {tuple(table.shape)}"
            )
        bad = ~((table > 0) & (table < 1))
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"{where}: alphas_cumprod must lie in (0, 1), where alpha > 0 and sigma > 0, got "
                f"{table[i].item()} at {i}"
            )
        rising = table.log().diff() >= 0
        if bool(rising.any()):
            i = int(rising.nonzero()[0]) + 1
            raise ValueError(
                f"{where}: alphas_cumprod must decrease, got {table[i].item()} after "
                f"{table[i - 1].item()} at {i}"
            )
        nodes = -table.log()
        rise = nodes.diff()
        slopes = torch.cat([rise[:1], 2 / (1 / rise[:-1] + 1 / rise[1:]), rise[-1:]])
        if len(rise) > 1:
            slopes[0] = 2 * rise[0] ** 2 / (rise[0] + rise[1])
            slopes[-1] = 2 * rise[-1] ** 2 / (rise[-1] + rise[-2])
        bend = slopes[:-1] + slopes[1:] - 2 * rise
        cubics = torch.stack([nodes[:-1], slopes[:-1], rise - slopes[:-1] - bend, bend])
        object.__setattr__(self, "_cubics", cubics)

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(len(self.alphas_cumprod) - 1)

    def _at_part(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients at t, and its part."""
        low = t.detach().floor().long().clamp_max(len(self.alphas_cumprod) - 2)
        return self._cubics.to(t)[:, low], t - low

    def _integral(self, t: Tensor) -> Tensor:
        return _cubic(*self._at_part(t))

    def _beta(self, t: Tensor) -> Tensor:
        return _cubic_slope(*self._at_part(t))

    def _t_of_integral(self, b: Tensor) -> Tensor:
        cubics = self._cubics.to(b)
        low = (torch.searchsorted(cubics[0], b.detach(), right=True) - 1).clamp_min(0)
        cubic, part = cubics[:, low], torch.zeros_like(b)
        with torch.no_grad():
            for digit in range(1, 54):  # bisection, to the last bit of the part
                half = part + 0.5**digit
                part = torch.where(_cubic(cubic, half) <= b, half, part)
        # One Newton step, for the derivative in b.
        return low + part + (b - _cubic(cubic, part)) / _cubic_slope(cubic, part)

    def _quantile(self, u: Tensor) -> Tensor:
        return (u * len(self.alphas_cumprod)).floor()


def draw_sigma(
    n: int, sigma_range: tuple[float, float], *, seed: int, offset: int = 0, first: int = 0
) -> Tensor:
    """Noise levels, log-uniform over sigma_range = (low, high). Shape (n,), float32, on the CPU.

    A function of (seed, offset, first + row), as the noise of `ops.normal` is.
    """
    low, high = map(math.log, sigma_range)
    u = ops.uniform(
        (n,), seed=seed, offset=offset, first=first, stream=STREAM_SIGMA, dtype=torch.float64
    )
    return (low + (high - low) * u).exp().float()


def from_alphas_cumprod(
    alphas_cumprod: Tensor | np.ndarray[Any, Any] | Sequence[float],
) -> DiscreteVP:
    """The schedule of a diffusers scheduler: `from_alphas_cumprod(scheduler.alphas_cumprod)`.

    Args:
        alphas_cumprod: alpha^2 at t = 0 ... N - 1, decreasing, in (0, 1). Shape (N,). A table whose
            last entry is 0 (diffusers' rescale_betas_zero_snr=True) has no score there: leave that
            entry out.

    Returns:
        `DiscreteVP`.

    Raises:
        TypeError, ValueError: it is no such table.
    """
    try:
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        kind = type(alphas_cumprod).__name__
        raise TypeError(
            f"from_alphas_cumprod: alphas_cumprod must be an array of numbers, got {kind}"
        ) from None
    return DiscreteVP(table.detach().clone())


def _cubic(coefficients: Tensor, p: Tensor) -> Tensor:
    a, b, c, d = coefficients.unbind()
    return a + p * (b + p * (c + p * d))


def _cubic_slope(coefficients: Tensor, p: Tensor) -> Tensor:
    _, b, c, d = coefficients.unbind()
    return b + p * (2 * c + p * 3 * d)


# ----------------------------------------------------------------------------------------- checks


def check_schedule(where: str, schedule: object) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{where}: schedule must be a Schedule, got {type(schedule).__name__}")


def _checked(where: str, name: str, value: float | Tensor, low: float, high: float) -> Tensor:
    """A time or sigma as a float64 tensor, in [low, high] to the rounding of its own dtype."""
    if isinstance(value, Tensor):
        check_tensor(where, name, value)
        if value.dim() > 1:
            raise ValueError(
                f"{where}: {name} must be a float or have shape () or (B,), got "
                f"{tuple(value.shape)}"
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{where}: {name} must be a float or a Tensor, got {type(value).__name__}")
    else:
        value = torch.tensor(float(value), dtype=torch.float64)
    if not torch.compiler.is_compiling():
        ends = value.new_tensor([low, high])
        bad = ~((value >= ends[0]) & (value <= ends[1]))
        if bool(bad.any()):
            raise ValueError(
                f"{where}: {name} must be in [{low:g}, {high:g}], got {value[bad].flatten()[0]:g}"
            )
    # Apple's GPUs have no float64.
    return value if value.device.type == "mps" else value.double()


def _like(result: Tensor, value: _Time) -> _Time:
    """A float for a float, a tensor of its dtype for a tensor."""
    if isinstance(value, Tensor):
        return cast(_Time, result.to(value.dtype))
    return cast(_Time, result.item())


def _number(schedule: Schedule, name: str) -> float:
    value = getattr(schedule, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{type(schedule).__name__}: {name} must be a float, got {type(value).__name__}"
        )
    if not math.isfinite(value):
        raise ValueError(f"{type(schedule).__name__}: {name} must be finite, got {value}")
    return value


def _check_parameters(schedule: Schedule, least: float, *names: str) -> None:
    """Fields that must be finite and strictly increasing, the first of them above `least`."""
    for before, name in zip(("", *names), names, strict=False):
        value = _number(schedule, name)
        if not value > least:
            rule = f"greater than {before}" if before else "positive"
            raise ValueError(f"{type(schedule).__name__}: {name} must be {rule}, got {value}")
        least = value


def _check_ends(schedule: Schedule) -> None:
    """alpha > 0 and sigma > 0 at the ends; both may underflow."""
    for name, value in (
        ("alpha(t_max)", schedule.alpha(schedule.t_max)),
        ("sigma(t_min)", schedule.sigma(schedule.t_min)),
    ):
        if not value > 0:
            raise ValueError(f"{type(schedule).__name__}: {name} must be positive, got {value}")
