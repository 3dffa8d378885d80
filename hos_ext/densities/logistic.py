"""Mixtures of logistic laws, by coordinates or jointly: their scores by quadrature."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..checks import check_number
from .base import (
    LOG_2PI,
    check_leading,
    check_like,
    check_noise,
    check_points,
    check_positive,
    choose_components,
    draw_normal,
    log_weights,
    moved_to,
    seeded_generator,
    symmetrise_third,
    tweedie_covariance,
    tweedie_mean,
    weighted_covariance,
    weighted_mean,
    weighted_third_moment,
)

# log of a density and its first three derivatives
_Derivatives: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


class ProductLogisticMixture:
    """Independent coordinates, each a K-part mixture of logistic laws.

    p(x) = prod_i sum_k weights_ik Logistic(x_i; locations_ik, scales_ik). All s_k are diagonal.

    Args:
        weights: shape (D, K), positive, each row summing to one. float32 or float64.
        locations: shape (D, K). Units of the data.
        scales: shape (D, K), positive. Units of the data (standard deviation: pi / sqrt(3) scales).
        noise: standard deviation of Gaussian noise added to every coordinate, >= 0. With noise the
            density has no closed form: 1-D quadrature in float64, with absolute errors below
            1e-12 / scale^k in s_k.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes, dtypes or devices disagree, or a value is out of its range.
    """

    def __init__(
        self, weights: Tensor, locations: Tensor, scales: Tensor, noise: float = 0.0
    ) -> None:
        check_leading("ProductLogisticMixture", "locations", locations, 2)
        check_like("ProductLogisticMixture", "weights", weights, locations, locations.shape)
        check_like("ProductLogisticMixture", "scales", scales, locations, locations.shape)
        check_positive("ProductLogisticMixture", "scales", scales)
        self._log_weights = log_weights("ProductLogisticMixture", weights)
        self.weights, self.locations, self.scales = weights, locations, scales
        self.noise = check_number("ProductLogisticMixture", "noise", noise, positive=False)
        self.dim = locations.shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ProductLogisticMixture:
        """The same density on another device or in another dtype."""
        moved = moved_to(device, dtype, self.weights, self.locations, self.scales)
        return ProductLogisticMixture(moved[0], moved[1], moved[2], self.noise)

    def sample(self, n: int, *, seed: int) -> Tensor:
        """n independent draws, shape (n, D); the same seed gives the same draws on one device."""
        generator = seeded_generator("ProductLogisticMixture", n, seed, self.locations)
        part = choose_components(self.weights, n, generator)
        location = self.locations.gather(1, part).mT
        scale = self.scales.gather(1, part).mT
        return _logistic_draws(location, scale, self.noise, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p at x (B, D), shape (B,), normalised."""
        return self._coordinates("log_prob", x)[0].sum(-1)

    def score(self, x: Tensor) -> Tensor:
        """s1 at x (B, D), shape (B, D)."""
        return self._coordinates("score", x)[1]

    def hessian(self, x: Tensor) -> Tensor:
        """s2 at x (B, D), diagonal, shape (B, D, D)."""
        return torch.diag_embed(self._coordinates("hessian", x)[2])

    def hessian_diag(self, x: Tensor) -> Tensor:
        """The diagonal of s2 at x (B, D), shape (B, D)."""
        return self._coordinates("hessian_diag", x)[2]

    def third(self, x: Tensor) -> Tensor:
        """s3 at x (B, D), zero off its space diagonal, shape (B, D, D, D)."""
        return _space_diagonal(self._coordinates("third", x)[3])

    def noisy(self, sigma: float, alpha: float = 1.0) -> ProductLogisticMixture:
        """The law of alpha x + sigma z: locations and scales times alpha, noise added."""
        sigma, alpha = check_noise("ProductLogisticMixture.noisy", sigma, alpha)
        noise = math.hypot(alpha * self.noise, sigma)
        locations, scales = alpha * self.locations, alpha * self.scales
        return ProductLogisticMixture(self.weights, locations, scales, noise)

    def posterior_mean(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """E[x | alpha x + sigma z = x_noisy] by Tweedie's formula, shape (B, D)."""
        name = "ProductLogisticMixture.posterior_mean"
        sigma, alpha = check_noise(name, sigma, alpha)
        check_points(name, x_noisy, self.locations, self.dim, "x_noisy")
        wide = self.to(dtype=torch.float64).noisy(sigma, alpha)
        return tweedie_mean(x_noisy, wide.score(x_noisy.double()), sigma, alpha)

    def posterior_covariance(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """Cov[x | alpha x + sigma z = x_noisy] by Tweedie's formula, shape (B, D, D)."""
        name = "ProductLogisticMixture.posterior_covariance"
        sigma, alpha = check_noise(name, sigma, alpha)
        check_points(name, x_noisy, self.locations, self.dim, "x_noisy")
        wide = self.to(dtype=torch.float64).noisy(sigma, alpha)
        return tweedie_covariance(x_noisy, wide.hessian(x_noisy.double()), sigma, alpha)

    def _coordinates(self, method: str, x: Tensor) -> _Derivatives:
        """log of each coordinate's density and its derivatives, each (B, D)."""
        check_points(f"ProductLogisticMixture.{method}", x, self.locations, self.dim)
        parts = _logistic(x.unsqueeze(-1), self.locations, self.scales, self.noise)
        return _mixture(self._log_weights + parts[0], *parts[1:])


class JointLogisticMixture:
    """A K-part mixture over whole vectors; within a part the coordinates are independent logistics.

    p(x) = sum_k weights_k prod_i Logistic(x_i; locations_ki, scales_ki). s2 is dense.

    Args:
        weights: shape (K,), positive, summing to one. float32 or float64.
        locations: shape (K, D). Units of the data.
        scales: shape (K, D), positive. Units of the data (standard deviation: pi / sqrt(3) scales).
        noise: standard deviation of Gaussian noise added to every coordinate, >= 0. With noise the
            density has no closed form: 1-D quadrature in float64, with absolute errors below
            1e-12 / scale^k in s_k.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes, dtypes or devices disagree, or a value is out of its range.
    """

    def __init__(
        self, weights: Tensor, locations: Tensor, scales: Tensor, noise: float = 0.0
    ) -> None:
        check_leading("JointLogisticMixture", "locations", locations, 2)
        k, self.dim = locations.shape
        check_like("JointLogisticMixture", "weights", weights, locations, (k,))
        check_like("JointLogisticMixture", "scales", scales, locations, (k, self.dim))
        check_positive("JointLogisticMixture", "scales", scales)
        self._log_weights = log_weights("JointLogisticMixture", weights)
        self.weights, self.locations, self.scales = weights, locations, scales
        self.noise = check_number("JointLogisticMixture", "noise", noise, positive=False)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> JointLogisticMixture:
        """The same density on another device or in another dtype."""
        moved = moved_to(device, dtype, self.weights, self.locations, self.scales)
        return JointLogisticMixture(moved[0], moved[1], moved[2], self.noise)

    def sample(self, n: int, *, seed: int) -> Tensor:
        """n independent draws, shape (n, D); the same seed gives the same draws on one device."""
        generator = seeded_generator("JointLogisticMixture", n, seed, self.locations)
        part = choose_components(self.weights, n, generator)
        return _logistic_draws(self.locations[part], self.scales[part], self.noise, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p at x (B, D), shape (B,), normalised."""
        return (self._log_weights + self._parts("log_prob", x)[0].sum(-1)).logsumexp(-1)

    def score(self, x: Tensor) -> Tensor:
        """s1 = E_r[g] at x (B, D), shape (B, D): r the responsibilities, g the parts' scores."""
        r, g, _, _ = self._weighted("score", x)
        return weighted_mean(r, g)

    def hessian(self, x: Tensor) -> Tensor:
        """s2 = E_r[diag l''] + Cov_r[g] at x (B, D), shape (B, D, D)."""
        r, g, second, _ = self._weighted("hessian", x)
        return torch.diag_embed(weighted_mean(r, second)) + weighted_covariance(r, g)

    def hessian_diag(self, x: Tensor) -> Tensor:
        """The diagonal of s2 at x (B, D), shape (B, D), without a D x D object."""
        r, g, second, _ = self._weighted("hessian_diag", x)
        centred = g - weighted_mean(r, g).unsqueeze(-2)
        return weighted_mean(r, second + centred.square())

    def third(self, x: Tensor) -> Tensor:
        """s3 = E_r[c c c] + sym3(E_r[diag l'' (x) c]) + E_r[diag l'''], shape (B, D, D, D)."""
        r, g, second, third = self._weighted("third", x)
        centred = g - weighted_mean(r, g).unsqueeze(-2)
        mixed = torch.diag_embed((centred * r.unsqueeze(-1)).mT @ second)
        within = _space_diagonal(weighted_mean(r, third))
        return weighted_third_moment(r, centred) + symmetrise_third(mixed.movedim(1, -1)) + within

    def noisy(self, sigma: float, alpha: float = 1.0) -> JointLogisticMixture:
        """The law of alpha x + sigma z: locations and scales times alpha, noise added."""
        sigma, alpha = check_noise("JointLogisticMixture.noisy", sigma, alpha)
        noise = math.hypot(alpha * self.noise, sigma)
        locations, scales = alpha * self.locations, alpha * self.scales
        return JointLogisticMixture(self.weights, locations, scales, noise)

    def posterior_mean(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """E[x | alpha x + sigma z = x_noisy] by Tweedie's formula, shape (B, D)."""
        name = "JointLogisticMixture.posterior_mean"
        sigma, alpha = check_noise(name, sigma, alpha)
        check_points(name, x_noisy, self.locations, self.dim, "x_noisy")
        wide = self.to(dtype=torch.float64).noisy(sigma, alpha)
        return tweedie_mean(x_noisy, wide.score(x_noisy.double()), sigma, alpha)

    def posterior_covariance(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """Cov[x | alpha x + sigma z = x_noisy] by Tweedie's formula, shape (B, D, D)."""
        name = "JointLogisticMixture.posterior_covariance"
        sigma, alpha = check_noise(name, sigma, alpha)
        check_points(name, x_noisy, self.locations, self.dim, "x_noisy")
        wide = self.to(dtype=torch.float64).noisy(sigma, alpha)
        return tweedie_covariance(x_noisy, wide.hessian(x_noisy.double()), sigma, alpha)

    def _parts(self, method: str, x: Tensor) -> _Derivatives:
        """log of each part's coordinate densities and their derivatives, each (B, K, D)."""
        check_points(f"JointLogisticMixture.{method}", x, self.locations, self.dim)
        return _logistic(x.unsqueeze(-2), self.locations, self.scales, self.noise)

    def _weighted(self, method: str, x: Tensor) -> _Derivatives:
        log_parts, first, second, third = self._parts(method, x)
        return (self._log_weights + log_parts.sum(-1)).softmax(-1), first, second, third


# --------------------------------------------------------------------------------------- logistic


def _logistic(x: Tensor, location: Tensor, scale: Tensor, noise: float) -> _Derivatives:
    """log density and three derivatives of Logistic(location, scale) + N(0, noise^2) at x."""
    if noise == 0:
        return _clean_logistic(x, location, scale)
    shape = (x.shape[0], *location.shape)
    y, m, s = (v.expand(shape).flatten().double() for v in (x, location, scale))
    value, first, second, third = (
        v.reshape(shape).to(x.dtype) for v in _noisy_logistic(y, m, s, noise)
    )
    return value, first, second, third


def _clean_logistic(x: Tensor, location: Tensor, scale: Tensor) -> _Derivatives:
    """l' = -tanh(u/2) / s, l'' = -sech^2(u/2) / (2 s^2), l''' = -l'' tanh(u/2) / s, u = (x-m)/s."""
    u = (x - location) / scale
    value = u + 2 * logsigmoid(-u) - scale.log()
    slope = (u / 2).tanh() / scale
    second = -2 * u.sigmoid() * (-u).sigmoid() / scale.square()  # 1 - tanh^2 loses the far tails
    return value, -slope, second, -second * slope


def _noisy_logistic(y: Tensor, m: Tensor, s: Tensor, noise: float) -> _Derivatives:
    """The convolution of a logistic with N(0, noise^2) at flat float64 y, by the trapezoid rule.

    The noisy density is a continuous mixture of the clean one shifted, so its derivatives are
    `_mixture` of the clean derivatives over p(t | y): no division by the noise, no cancellation.
    The integrand is analytic within pi s of the real axis: steps of s / 3 and 0.8 noise leave
    relative errors near 1e-13; its tails are cut where they have fallen by exp(-36).
    """
    if y.numel() == 0:
        return y, y, y, y
    low, high = _quadrature_range(y, m, s, noise)
    steps = (high - low) / (s / 3).clamp(max=0.8 * noise)
    n = 2 + int(steps.nan_to_num(posinf=0).max())  # points that are not finite give NaN below
    grid = torch.linspace(0, 1, n, dtype=y.dtype, device=y.device)
    rows = max(1, 2**16 // n)  # a chunk stays in cache
    columns = []
    for start in range(0, y.numel(), rows):
        chunk = slice(start, start + rows)
        y_, m_, s_, low_, high_ = (v[chunk].unsqueeze(-1) for v in (y, m, s, low, high))
        t = low_ + (high_ - low_) * grid
        log_step = ((high_ - low_) / (n - 1)).log()
        value, first, second, third = _clean_logistic(t, m_, s_)
        log_kernel = -((y_ - t) / noise).square() / 2 - LOG_2PI / 2 - math.log(noise)
        columns.append(_mixture(value + log_kernel + log_step, first, second, third))
    value, first, second, third = (torch.cat(v) for v in zip(*columns, strict=True))
    return value, first, second, third


@torch.no_grad()
def _quadrature_range(y: Tensor, m: Tensor, s: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Where f(t) = log Logistic(t; m, s) - (y - t)^2 / (2 noise^2) is within 36 of its maximum.

    f is concave with f'' <= -1/noise^2, and |log Logistic'| <= 1/s: the maximum lies between m and
    y and within noise^2 / s of y, the range within sqrt(72) noise of the maximum. Bisection.
    """

    def height(t: Tensor) -> Tensor:
        return _clean_logistic(t, m, s)[0] - ((y - t) / noise).square() / 2

    reach = noise**2 / s
    low = torch.where(y > m, torch.maximum(m, y - reach), y)
    high = torch.where(y > m, y, torch.minimum(m, y + reach))
    ratio = float((noise / s).max())
    for _ in range(max(0, math.ceil(math.log2(4 * ratio * max(1.0, ratio))))):
        mode = (low + high) / 2
        rising = (y - mode) / noise**2 - ((mode - m) / (2 * s)).tanh() / s > 0
        low, high = torch.where(rising, mode, low), torch.where(rising, high, mode)
    mode = (low + high) / 2
    floor = height(mode) - 36
    edges = []
    for sign in (-1.0, 1.0):
        inside, outside = torch.zeros_like(y), torch.full_like(y, 9 * noise)
        for _ in range(max(4, math.ceil(math.log2(max(1.0, ratio))) + 4)):
            middle = (inside + outside) / 2
            above = height(mode + sign * middle) > floor
            inside = torch.where(above, middle, inside)
            outside = torch.where(above, outside, middle)
        edges.append(mode + sign * outside)
    return edges[0], edges[1]


def _mixture(log_parts: Tensor, first: Tensor, second: Tensor, third: Tensor) -> _Derivatives:
    """1-D mixture over the last axis: log density and three derivatives from those of the parts.

    s2 = E[l''] + Var[l'], s3 = E[l'''] + 3 Cov[l'', l'] + kappa_3[l'] over the responsibilities.
    """
    value = log_parts.logsumexp(-1)
    r = log_parts.softmax(-1)
    score = (r * first).sum(-1)
    centred = first - score.unsqueeze(-1)
    hessian = (r * (second + centred.square())).sum(-1)
    cubic = (r * (third + centred * (3 * second + centred.square()))).sum(-1)
    return value, score, hessian, cubic


def _logistic_draws(
    location: Tensor, scale: Tensor, noise: float, generator: torch.Generator
) -> Tensor:
    """location + scale logit(u), plus noise; u in float64, so that float32 tails are not cut."""
    u = torch.rand(location.shape, generator=generator, dtype=torch.float64, device=location.device)
    draws = location + scale * u.clamp(min=2.0**-54).logit().to(location.dtype)
    if noise > 0:
        draws = draws + noise * draw_normal(location.shape, generator, location)
    return draws


def _space_diagonal(value: Tensor) -> Tensor:
    """(B, D) on the diagonal i = j = l of zeros (B, D, D, D)."""
    return torch.diag_embed(torch.diag_embed(value))
