"""Mixtures of logistic laws, by coordinates or jointly: their scores by quadrature."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..checks import check_number
from .base import Density
from .mixtures import (
    LOG_2PI,
    centred,
    choose_parts,
    draw_normal,
    symmetrise_third,
    weighted_covariance,
    weighted_mean,
    weighted_third_moment,
)
from .parameters import check_all_positive, check_leading, check_other, log_weights, placed

Law = TypeVar("Law", bound="_LogisticMixture")


class _Derivatives(NamedTuple):
    """The log of a density of one coordinate and its three derivatives, of one shape."""

    log_prob: Tensor
    score: Tensor
    hessian_diag: Tensor
    third: Tensor


class _Noisy(NamedTuple):
    """The same of a logistic with noise at y, and the law of its clean value t given y."""

    derivatives: _Derivatives
    shift: Tensor  # E[t] - location
    variance: Tensor


class _LogisticMixture(Density):
    """What both mixtures share: parameters, noise, and posteriors by the moments of quadrature."""

    def __init__(
        self,
        weights: Tensor,
        locations: Tensor,
        scales: Tensor,
        *,
        noise_std: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        weights, locations, scales = placed(name, device, dtype, weights, locations, scales)
        check_leading(name, "locations", locations, 2)
        self.dim, weights_shape = self._sizes(*locations.shape)
        check_other(name, "weights", weights, locations, weights_shape)
        check_other(name, "scales", scales, locations, tuple(locations.shape))
        check_all_positive(name, "scales", scales)
        self._log_weights = log_weights(name, weights)
        self.weights, self.locations, self.scales = weights, locations, scales
        self.noise_std = check_number(name, "noise_std", noise_std, positive=False)

    @staticmethod
    @abstractmethod
    def _sizes(rows: int, columns: int) -> tuple[int, tuple[int, ...]]:
        """D and the shape of weights, from the shape of locations."""

    def _summary(self) -> str:
        noise = f", noise_std {self.noise_std:g}" if self.noise_std else ""
        return f"{self.weights.shape[-1]} components, D={self.dim}{noise}"

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.weights, self.locations, self.scales

    def _like(self: Law, *tensors: Tensor) -> Law:
        weights, locations, scales = tensors
        return type(self)(weights, locations, scales, noise_std=self.noise_std)

    def _noisy(self: Law, sigma: float, alpha: float) -> Law:
        """Locations and scales times alpha, noise added."""
        noise_std = math.hypot(alpha * self.noise_std, sigma)
        locations, scales = alpha * self.locations, alpha * self.scales
        return type(self)(self.weights, locations, scales, noise_std=noise_std)

    def _posterior_parts(
        self, x: Tensor, sigma: float, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log density of each part at x, and mean and variance of x0 within it, in float64.

        Not by Tweedie's formula, which cancels at a large sigma. x0 is a logistic t / alpha with
        noise of its own, which is normal given t and x.
        """
        own, total = self.noise_std, math.hypot(alpha * self.noise_std, sigma)
        found = _noisy_logistic(x, alpha * self.locations, alpha * self.scales, total)
        rest, gain = (sigma / total) ** 2, alpha * (own / total) ** 2
        mean = rest * (self.locations + found.shift / alpha) + gain * x
        variance = (rest / alpha) ** 2 * found.variance + (own * sigma / total) ** 2
        return found.derivatives.log_prob, mean, variance


class ProductLogisticMixture(_LogisticMixture):
    """Independent coordinates, each a K-part mixture of logistic laws.

    p(x) = prod_i sum_k weights_ik Logistic(x_i; locations_ik, scales_ik). All s_k are diagonal.

    Args:
        weights: shape (D, K), positive, each row summing to one. float32 or float64.
        locations: shape (D, K). Units of the data.
        scales: shape (D, K), positive. Units of the data (standard deviation: pi / sqrt(3) scales).
        noise_std: standard deviation of Gaussian noise added to every coordinate, >= 0. With noise
            the density has no closed form: 1-D quadrature in float64, with absolute errors below
            1e-12 / scale^k in s_k.
        device, dtype: as in `Gaussian`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes, dtypes or devices disagree, or a value is out of its range.

    Example:
        >>> import torch
        >>> from hos_ext.densities import ProductLogisticMixture
        >>> one = torch.ones(2, 1)
        >>> law = ProductLogisticMixture(one, 0 * one, one)
        >>> law.hessian(torch.zeros(1, 2))
        tensor([[[-0.5000,  0.0000],
                 [ 0.0000, -0.5000]]])
    """

    @staticmethod
    def _sizes(rows: int, columns: int) -> tuple[int, tuple[int, ...]]:
        return rows, (rows, columns)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        part = choose_parts(self.weights, n, generator)
        location = self.locations.gather(1, part).mT
        scale = self.scales.gather(1, part).mT
        return _logistic_draws(location, scale, self.noise_std, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        return self._coordinates(x).log_prob.sum(-1)

    def _score(self, x: Tensor) -> Tensor:
        return self._coordinates(x).score

    def _hessian(self, x: Tensor) -> Tensor:
        return torch.diag_embed(self._coordinates(x).hessian_diag)

    def _hessian_diag(self, x: Tensor) -> Tensor:
        return self._coordinates(x).hessian_diag

    def _third(self, x: Tensor) -> Tensor:
        return _space_diagonal(self._coordinates(x).third)

    def _posterior_mean(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        return self._posterior_moments(x, sigma, alpha)[0]

    def _posterior_covariance(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        return torch.diag_embed(self._posterior_moments(x, sigma, alpha)[1])

    def _posterior_moments(self, x: Tensor, sigma: float, alpha: float) -> tuple[Tensor, Tensor]:
        """Mean and variance of each coordinate, (B, D)."""
        parts = self._posterior_parts(x.unsqueeze(-1), sigma, alpha)
        r = (self._log_weights + parts[0]).softmax(-1)
        mean = (r * parts[1]).sum(-1)
        return mean, (r * (parts[2] + (parts[1] - mean.unsqueeze(-1)).square())).sum(-1)

    def _coordinates(self, x: Tensor) -> _Derivatives:
        """log of each coordinate's density and its derivatives, each (B, D)."""
        parts = _logistic(x.unsqueeze(-1), self.locations, self.scales, self.noise_std)
        return _mixture(parts._replace(log_prob=self._log_weights + parts.log_prob))


class JointLogisticMixture(_LogisticMixture):
    """A K-part mixture over whole vectors; within a part the coordinates are independent logistics.

    p(x) = sum_k weights_k prod_i Logistic(x_i; locations_ki, scales_ki). s2 is dense. With r the
    responsibilities, g the score of a part, l2 and l3 the next derivatives of its coordinates, and
    c = g - E_r[g]:

        s1 = E_r[g]     s2 = E_r[diag l2] + Cov_r[g]
        s3 = E_r[c c c] + sym3(E_r[diag l2 (x) c]) + E_r[diag l3]

    Args:
        weights: shape (K,), positive, summing to one. float32 or float64.
        locations: shape (K, D). Units of the data.
        scales: shape (K, D), positive. Units of the data (standard deviation: pi / sqrt(3) scales).
        noise_std: standard deviation of Gaussian noise added to every coordinate, >= 0; as in
            `ProductLogisticMixture`.
        device, dtype: as in `Gaussian`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes, dtypes or devices disagree, or a value is out of its range.

    Example:
        >>> import torch
        >>> from hos_ext.densities import JointLogisticMixture
        >>> corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
        >>> law = JointLogisticMixture(torch.tensor([0.5, 0.5]), corners, torch.ones(2, 2))
        >>> law.noisy(sigma=3.0, alpha=2.0).locations
        tensor([[-2., -2.],
                [ 2.,  2.]])
    """

    @staticmethod
    def _sizes(rows: int, columns: int) -> tuple[int, tuple[int, ...]]:
        return columns, (rows,)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        part = choose_parts(self.weights, n, generator)
        return _logistic_draws(self.locations[part], self.scales[part], self.noise_std, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        return (self._log_weights + self._parts(x).log_prob.sum(-1)).logsumexp(-1)

    def _score(self, x: Tensor) -> Tensor:
        r, parts = self._weighted(x)
        return weighted_mean(r, parts.score)

    def _hessian(self, x: Tensor) -> Tensor:
        r, parts = self._weighted(x)
        within = torch.diag_embed(weighted_mean(r, parts.hessian_diag))
        return within + weighted_covariance(r, parts.score)

    def _hessian_diag(self, x: Tensor) -> Tensor:
        r, parts = self._weighted(x)
        return weighted_mean(r, parts.hessian_diag + centred(r, parts.score).square())

    def _third(self, x: Tensor) -> Tensor:
        r, parts = self._weighted(x)
        c = centred(r, parts.score)
        mixed = torch.diag_embed((c * r.unsqueeze(-1)).mT @ parts.hessian_diag)
        within = _space_diagonal(weighted_mean(r, parts.third))
        return weighted_third_moment(r, c) + symmetrise_third(mixed.movedim(1, -1)) + within

    def _posterior_mean(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        parts = self._posterior_parts(x.unsqueeze(-2), sigma, alpha)
        return weighted_mean(self._responsibilities(parts[0]), parts[1])

    def _posterior_covariance(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        log_prob, mean, variance = self._posterior_parts(x.unsqueeze(-2), sigma, alpha)
        r = self._responsibilities(log_prob)
        within = torch.diag_embed(weighted_mean(r, variance))
        return within + weighted_covariance(r, mean)

    def _responsibilities(self, log_prob: Tensor) -> Tensor:
        """(B, K), from the log density of each coordinate in each part, (B, K, D)."""
        return (self._log_weights + log_prob.sum(-1)).softmax(-1)

    def _parts(self, x: Tensor) -> _Derivatives:
        """log of each part's coordinate densities and their derivatives, each (B, K, D)."""
        return _logistic(x.unsqueeze(-2), self.locations, self.scales, self.noise_std)

    def _weighted(self, x: Tensor) -> tuple[Tensor, _Derivatives]:
        """The responsibilities (B, K), and the parts' derivatives."""
        parts = self._parts(x)
        return self._responsibilities(parts.log_prob), parts


# ---------------------------------------------------------------- one coordinate, with noise


def _logistic(x: Tensor, location: Tensor, scale: Tensor, noise_std: float) -> _Derivatives:
    """log density and three derivatives of Logistic(location, scale) + N(0, noise_std^2) at x."""
    if noise_std == 0:
        return _clean_logistic(x, location, scale)
    found = _noisy_logistic(x.double(), location.double(), scale.double(), noise_std).derivatives
    return _Derivatives(*(v.to(x.dtype) for v in found))


def _clean_logistic(x: Tensor, location: Tensor, scale: Tensor) -> _Derivatives:
    """l' = -tanh(u/2) / s, l'' = -sech^2(u/2) / (2 s^2), l''' = -l'' tanh(u/2) / s, u = (x-m)/s."""
    u = (x - location) / scale
    log_prob = u + 2 * logsigmoid(-u) - scale.log()
    slope = (u / 2).tanh() / scale
    # 1 - tanh^2 loses the far tails.
    hessian_diag = -2 * u.sigmoid() * (-u).sigmoid() / scale.square()
    return _Derivatives(log_prob, -slope, hessian_diag, -hessian_diag * slope)


def _noisy_logistic(y: Tensor, m: Tensor, s: Tensor, noise_std: float) -> _Noisy:
    """A logistic convolved with N(0, noise_std^2) at float64 y, by the trapezoid rule.

    The integrand is analytic within pi s of the real axis: steps of s / 3 and 0.8 noise_std leave
    relative errors near 1e-13; its tails are cut where they have fallen by exp(-36).
    """
    shape = torch.broadcast_shapes(y.shape, m.shape)
    y, m, s = (v.expand(shape).flatten() for v in (y, m, s))
    columns = []
    if y.numel() > 0:
        low, high = _quadrature_range(y, m, s, noise_std)
        steps = (high - low) / (s / 3).clamp(max=0.8 * noise_std)
        n = 2 + int(steps.nan_to_num(posinf=0).max())  # points that are not finite give NaN below
        grid = torch.linspace(0, 1, n, dtype=y.dtype, device=y.device)
        rows = max(1, 2**16 // n)  # a chunk stays in cache
        for start in range(0, y.numel(), rows):
            chunk = slice(start, start + rows)
            y_, m_, s_, low_, high_ = (v[chunk].unsqueeze(-1) for v in (y, m, s, low, high))
            t = low_ + (high_ - low_) * grid
            log_step = ((high_ - low_) / (n - 1)).log()
            clean = _clean_logistic(t, m_, s_)
            log_kernel = -((y_ - t) / noise_std).square() / 2 - LOG_2PI / 2 - math.log(noise_std)
            clean = clean._replace(log_prob=clean.log_prob + log_kernel + log_step)
            columns.append(_noisy_values(clean, t, y_, m_, noise_std))
    values = [torch.cat(v) for v in zip(*columns, strict=True)] or [y] * 6
    values = [v.reshape(shape) for v in values]
    return _Noisy(_Derivatives(*values[:4]), *values[4:])


def _noisy_values(
    clean: _Derivatives, t: Tensor, y: Tensor, m: Tensor, noise_std: float
) -> tuple[Tensor, ...]:
    """log density and three derivatives at y, E[t | y] - m and Var[t | y], from points t (B, n).

    The noisy density is a continuous mixture of the clean one shifted: its derivatives are
    `_mixture` of the clean derivatives over p(t | y). It is also one of normal laws, so that they
    are cumulants of t over powers of the noise. Each sum cancels where its terms are large: the
    first at noise above the scale, the second below. The one with the smaller terms is taken.
    """
    shifted = _mixture(clean)
    r = clean.log_prob.softmax(-1)
    shift = (r * (t - m)).sum(-1)
    centred = (t - m) - shift.unsqueeze(-1)
    away = (t - y) / noise_std**2
    variance = (r * centred.square()).sum(-1)
    score = (r * away).sum(-1)
    slope = clean.score - shifted.score.unsqueeze(-1)
    cube = (centred / noise_std**2) ** 3
    pairs = (
        (shifted.score, (r * clean.score.abs()).sum(-1), score, (r * away.abs()).sum(-1)),
        (
            shifted.hessian_diag,
            (r * (clean.hessian_diag.abs() + slope.square())).sum(-1),
            (variance / noise_std**2 - 1) / noise_std**2,
            (variance / noise_std**2 + 1) / noise_std**2,
        ),
        (
            shifted.third,
            (r * (clean.third + slope * (3 * clean.hessian_diag + slope.square())).abs()).sum(-1),
            (r * cube).sum(-1),
            (r * cube.abs()).sum(-1),
        ),
    )
    chosen = (torch.where(ours < theirs, b, a) for a, theirs, b, ours in pairs)
    return shifted.log_prob, *chosen, shift, variance


@torch.no_grad()
def _quadrature_range(y: Tensor, m: Tensor, s: Tensor, noise_std: float) -> tuple[Tensor, Tensor]:
    """Where f(t) = log Logistic(t; m, s) - (y - t)^2 / (2 noise_std^2) is within 36 of its maximum.

    f is concave with f'' <= -1/noise_std^2, and |log Logistic'| <= 1/s: the maximum lies between m
    and y and within noise_std^2 / s of y, the range within sqrt(72) noise_std of the maximum.
    Bisection.
    """

    def height(t: Tensor) -> Tensor:
        return _clean_logistic(t, m, s).log_prob - ((y - t) / noise_std).square() / 2

    reach = noise_std**2 / s
    low = torch.where(y > m, torch.maximum(m, y - reach), y)
    high = torch.where(y > m, y, torch.minimum(m, y + reach))
    ratio = float((noise_std / s).max())
    for _ in range(max(0, math.ceil(math.log2(4 * ratio * max(1.0, ratio))))):
        mode = (low + high) / 2
        rising = (y - mode) / noise_std**2 - ((mode - m) / (2 * s)).tanh() / s > 0
        low, high = torch.where(rising, mode, low), torch.where(rising, high, mode)
    mode = (low + high) / 2
    floor = height(mode) - 36
    edges = []
    for sign in (-1.0, 1.0):
        inside, outside = torch.zeros_like(y), torch.full_like(y, 9 * noise_std)
        for _ in range(max(4, math.ceil(math.log2(max(1.0, ratio))) + 4)):
            middle = (inside + outside) / 2
            above = height(mode + sign * middle) > floor
            inside = torch.where(above, middle, inside)
            outside = torch.where(above, outside, middle)
        edges.append(mode + sign * outside)
    return edges[0], edges[1]


def _mixture(parts: _Derivatives) -> _Derivatives:
    """1-D mixture over the last axis, from the parts, whose log_prob includes their log weight.

    s2 = E[l''] + Var[l'], s3 = E[l'''] + 3 Cov[l'', l'] + kappa_3[l'] over the responsibilities.
    """
    r = parts.log_prob.softmax(-1)
    score = (r * parts.score).sum(-1)
    c = parts.score - score.unsqueeze(-1)
    hessian_diag = (r * (parts.hessian_diag + c.square())).sum(-1)
    third = (r * (parts.third + c * (3 * parts.hessian_diag + c.square()))).sum(-1)
    return _Derivatives(parts.log_prob.logsumexp(-1), score, hessian_diag, third)


def _logistic_draws(
    location: Tensor, scale: Tensor, noise_std: float, generator: torch.Generator
) -> Tensor:
    """location + scale logit(u), plus noise; u in float64, so that float32 tails are not cut."""
    u = torch.rand(location.shape, generator=generator, dtype=torch.float64, device=location.device)
    draws = location + scale * u.clamp(min=2.0**-54).logit().to(location.dtype)
    if noise_std > 0:
        draws = draws + noise_std * draw_normal(location.shape, generator, location)
    return draws


def _space_diagonal(value: Tensor) -> Tensor:
    """(B, D) on the diagonal i = j = l of zeros (B, D, D, D)."""
    return torch.diag_embed(torch.diag_embed(value))
