"""Analytic densities: exact scores of the noisy law to any needed order, exact posteriors, samples.

The noisy law is that of alpha x + sigma z with x from the density and z standard normal.
`noisy(sigma, alpha)` returns it as a density of the same class, so `d.noisy(sigma).score(x)` is the
s1 that a network trained at sigma should learn, `hessian` its s2 and `third` its s3. Gaussians and
Gaussian mixtures are closed forms; noisy logistics are 1-D quadratures in float64.
All points are `(B, D)` in the dtype and on the device of the parameters (float32 or float64).
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .checks import check_number

# log of a density and its first three derivatives
_Derivatives: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

_LOG_2PI = math.log(2 * math.pi)


class Gaussian:
    """The normal law N(mean, covariance) in D dimensions.

    Args:
        mean: shape (D,), float32 or float64. Units of the data.
        covariance: shape (D, D), symmetric positive definite, same dtype and device.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes, dtypes or devices disagree, or the covariance is not positive definite.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        _check_leading("Gaussian", "mean", mean, 1)
        _check_like("Gaussian", "covariance", covariance, mean, (mean.shape[0], mean.shape[0]))
        self.mean, self.covariance, self.dim = mean, covariance, mean.shape[0]
        self._cholesky = _cholesky("Gaussian", "covariance", covariance)
        self._whiten = _inverse_triangular(self._cholesky)
        self._precision = self._whiten.mT @ self._whiten

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Gaussian:
        """The same density on another device or in another dtype."""
        mean, covariance = _moved(device, dtype, self.mean, self.covariance)
        return Gaussian(mean, covariance)

    def sample(self, n: int, *, seed: int) -> Tensor:
        """n independent draws, shape (n, D); the same seed gives the same draws on one device."""
        generator = _generator("Gaussian", n, seed, self.mean)
        return self.mean + _randn((n, self.dim), generator, self.mean) @ self._cholesky.mT

    def log_prob(self, x: Tensor) -> Tensor:
        """log p at x (B, D), shape (B,), normalised."""
        white = self._centred("log_prob", x) @ self._whiten.mT
        log_det = self._whiten.diagonal().log().sum()
        return log_det - (white.square().sum(-1) + self.dim * _LOG_2PI) / 2

    def score(self, x: Tensor) -> Tensor:
        """s1 = -P (x - mean), P the inverse covariance, at x (B, D), shape (B, D)."""
        return -(self._centred("score", x) @ self._precision)

    def hessian(self, x: Tensor) -> Tensor:
        """s2 = -P at x (B, D), shape (B, D, D)."""
        _check_points("Gaussian.hessian", x, self.mean, self.dim)
        return -self._precision.repeat(x.shape[0], 1, 1)

    def hessian_diag(self, x: Tensor) -> Tensor:
        """The diagonal of s2 at x (B, D), shape (B, D)."""
        _check_points("Gaussian.hessian_diag", x, self.mean, self.dim)
        return -self._precision.diagonal().repeat(x.shape[0], 1)

    def third(self, x: Tensor) -> Tensor:
        """s3 = 0 at x (B, D), shape (B, D, D, D)."""
        _check_points("Gaussian.third", x, self.mean, self.dim)
        return x.new_zeros(x.shape[0], self.dim, self.dim, self.dim)

    def noisy(self, sigma: float, alpha: float = 1.0) -> Gaussian:
        """The law of alpha x + sigma z: N(alpha mean, alpha^2 covariance + sigma^2 I)."""
        sigma, alpha = _check_noise("Gaussian.noisy", sigma, alpha)
        return Gaussian(alpha * self.mean, _noisy_covariance(self.covariance, sigma, alpha))

    def posterior_mean(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """E[x | alpha x + sigma z = x_noisy], shape (B, D)."""
        sigma, alpha = _check_noise("Gaussian.posterior_mean", sigma, alpha)
        _check_points("Gaussian.posterior_mean", x_noisy, self.mean, self.dim, "x_noisy")
        gain = self.noisy(sigma, alpha)._precision @ self.covariance
        return self.mean + alpha * (x_noisy - alpha * self.mean) @ gain

    def posterior_covariance(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """Cov[x | alpha x + sigma z = x_noisy] = sigma^2 S P, shape (B, D, D)."""
        sigma, alpha = _check_noise("Gaussian.posterior_covariance", sigma, alpha)
        _check_points("Gaussian.posterior_covariance", x_noisy, self.mean, self.dim, "x_noisy")
        covariance = sigma**2 * self.covariance @ self.noisy(sigma, alpha)._precision
        return covariance.repeat(x_noisy.shape[0], 1, 1)

    def _centred(self, method: str, x: Tensor) -> Tensor:
        _check_points(f"Gaussian.{method}", x, self.mean, self.dim)
        return x - self.mean


class GaussianMixture:
    """sum_k weights_k N(means_k, covariances_k) in D dimensions.

    Args:
        weights: shape (K,), positive, summing to one (the remaining rounding is divided out).
            float32 or float64.
        means: shape (K, D). Units of the data.
        covariances: shape (K, D, D), each symmetric positive definite.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes, dtypes or devices disagree, the weights are not positive with sum one,
            or a covariance is not positive definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        _check_leading("GaussianMixture", "means", means, 2)
        k, self.dim = means.shape
        _check_like("GaussianMixture", "weights", weights, means, (k,))
        _check_like("GaussianMixture", "covariances", covariances, means, (k, self.dim, self.dim))
        self._log_weights = _log_weights("GaussianMixture", weights)
        self.weights, self.means, self.covariances = weights, means, covariances
        self._cholesky = _cholesky("GaussianMixture", "covariances", covariances)
        self._whiten = _inverse_triangular(self._cholesky)
        self._precision = self._whiten.mT @ self._whiten

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GaussianMixture:
        """The same density on another device or in another dtype."""
        return GaussianMixture(*_moved(device, dtype, self.weights, self.means, self.covariances))

    def sample(self, n: int, *, seed: int) -> Tensor:
        """n independent draws, shape (n, D); the same seed gives the same draws on one device."""
        generator = _generator("GaussianMixture", n, seed, self.means)
        part = _choose(self.weights, n, generator)
        noise = _randn((n, self.dim), generator, self.means)
        draws = self.means[part]
        for k in range(self.means.shape[0]):
            draws[part == k] += noise[part == k] @ self._cholesky[k].mT
        return draws

    def log_prob(self, x: Tensor) -> Tensor:
        """log p at x (B, D), shape (B,), normalised."""
        return self._parts("log_prob", x)[0].logsumexp(-1)

    def score(self, x: Tensor) -> Tensor:
        """s1 = E_r[g] at x (B, D), shape (B, D): r the responsibilities, g the parts' scores."""
        r, g = self._weighted("score", x)
        return _average(r, g)

    def hessian(self, x: Tensor) -> Tensor:
        """s2 = E_r[-P] + Cov_r[g] at x (B, D), shape (B, D, D)."""
        r, g = self._weighted("hessian", x)
        return _covariance(r, g) - torch.einsum("bk,kij->bij", r, self._precision)

    def hessian_diag(self, x: Tensor) -> Tensor:
        """The diagonal of s2 at x (B, D), shape (B, D), without a D x D object."""
        r, g = self._weighted("hessian_diag", x)
        centred = g - _average(r, g).unsqueeze(-2)
        return _average(r, centred.square()) - r @ self._precision.diagonal(dim1=-2, dim2=-1)

    def third(self, x: Tensor) -> Tensor:
        """s3 = E_r[c c c] + sym3(E_r[-P (x) c]), c = g - s1, at x (B, D), shape (B, D, D, D)."""
        r, g = self._weighted("third", x)
        centred = g - _average(r, g).unsqueeze(-2)
        mixed = -torch.einsum("bkl,kij->bijl", centred * r.unsqueeze(-1), self._precision)
        return _third_moment(r, centred) + _sym3(mixed)

    def noisy(self, sigma: float, alpha: float = 1.0) -> GaussianMixture:
        """The law of alpha x + sigma z: means alpha m_k, covariances alpha^2 S_k + sigma^2 I."""
        sigma, alpha = _check_noise("GaussianMixture.noisy", sigma, alpha)
        covariances = _noisy_covariance(self.covariances, sigma, alpha)
        return GaussianMixture(self.weights, alpha * self.means, covariances)

    def posterior_mean(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """E[x | alpha x + sigma z = x_noisy], shape (B, D)."""
        sigma, alpha = _check_noise("GaussianMixture.posterior_mean", sigma, alpha)
        _check_points("GaussianMixture.posterior_mean", x_noisy, self.means, self.dim, "x_noisy")
        r, g = self.noisy(sigma, alpha)._weighted("posterior_mean", x_noisy)
        return _average(r, self._posterior_means(g, alpha))

    def posterior_covariance(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """Cov[x | alpha x + sigma z = x_noisy], shape (B, D, D)."""
        sigma, alpha = _check_noise("GaussianMixture.posterior_covariance", sigma, alpha)
        _check_points(
            "GaussianMixture.posterior_covariance", x_noisy, self.means, self.dim, "x_noisy"
        )
        noisy = self.noisy(sigma, alpha)
        r, g = noisy._weighted("posterior_covariance", x_noisy)
        within = sigma**2 * self.covariances @ noisy._precision
        between = _covariance(r, self._posterior_means(g, alpha))
        return torch.einsum("bk,kij->bij", r, within) + between

    def _posterior_means(self, noisy_scores: Tensor, alpha: float) -> Tensor:
        """m_k - alpha S_k g_k, the posterior mean within each part, (B, K, D)."""
        shift = torch.einsum("kij,bkj->bki", self.covariances, noisy_scores)
        return self.means - alpha * shift

    def _parts(self, method: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """log(weight_k N_k(x)), (B, K), and the score of each part, (B, K, D)."""
        _check_points(f"GaussianMixture.{method}", x, self.means, self.dim)
        centred = x.unsqueeze(-2) - self.means
        white = torch.einsum("kij,bkj->bki", self._whiten, centred)
        log_det = self._whiten.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_parts = log_det - (white.square().sum(-1) + self.dim * _LOG_2PI) / 2
        scores = -torch.einsum("kij,bki->bkj", self._whiten, white)
        return self._log_weights + log_parts, scores

    def _weighted(self, method: str, x: Tensor) -> tuple[Tensor, Tensor]:
        log_parts, scores = self._parts(method, x)
        return log_parts.softmax(-1), scores


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
        _check_leading("ProductLogisticMixture", "locations", locations, 2)
        _check_like("ProductLogisticMixture", "weights", weights, locations, locations.shape)
        _check_like("ProductLogisticMixture", "scales", scales, locations, locations.shape)
        _check_positive("ProductLogisticMixture", "scales", scales)
        self._log_weights = _log_weights("ProductLogisticMixture", weights)
        self.weights, self.locations, self.scales = weights, locations, scales
        self.noise = check_number("ProductLogisticMixture", "noise", noise, positive=False)
        self.dim = locations.shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ProductLogisticMixture:
        """The same density on another device or in another dtype."""
        moved = _moved(device, dtype, self.weights, self.locations, self.scales)
        return ProductLogisticMixture(moved[0], moved[1], moved[2], self.noise)

    def sample(self, n: int, *, seed: int) -> Tensor:
        """n independent draws, shape (n, D); the same seed gives the same draws on one device."""
        generator = _generator("ProductLogisticMixture", n, seed, self.locations)
        part = _choose(self.weights, n, generator)
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
        sigma, alpha = _check_noise("ProductLogisticMixture.noisy", sigma, alpha)
        noise = math.hypot(alpha * self.noise, sigma)
        locations, scales = alpha * self.locations, alpha * self.scales
        return ProductLogisticMixture(self.weights, locations, scales, noise)

    def posterior_mean(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """E[x | alpha x + sigma z = x_noisy] by Tweedie's formula, shape (B, D)."""
        name = "ProductLogisticMixture.posterior_mean"
        sigma, alpha = _check_noise(name, sigma, alpha)
        _check_points(name, x_noisy, self.locations, self.dim, "x_noisy")
        wide = self.to(dtype=torch.float64).noisy(sigma, alpha)
        return _tweedie_mean(x_noisy, wide.score(x_noisy.double()), sigma, alpha)

    def posterior_covariance(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """Cov[x | alpha x + sigma z = x_noisy] by Tweedie's formula, shape (B, D, D)."""
        name = "ProductLogisticMixture.posterior_covariance"
        sigma, alpha = _check_noise(name, sigma, alpha)
        _check_points(name, x_noisy, self.locations, self.dim, "x_noisy")
        wide = self.to(dtype=torch.float64).noisy(sigma, alpha)
        return _tweedie_covariance(x_noisy, wide.hessian(x_noisy.double()), sigma, alpha)

    def _coordinates(self, method: str, x: Tensor) -> _Derivatives:
        """log of each coordinate's density and its derivatives, each (B, D)."""
        _check_points(f"ProductLogisticMixture.{method}", x, self.locations, self.dim)
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
        _check_leading("JointLogisticMixture", "locations", locations, 2)
        k, self.dim = locations.shape
        _check_like("JointLogisticMixture", "weights", weights, locations, (k,))
        _check_like("JointLogisticMixture", "scales", scales, locations, (k, self.dim))
        _check_positive("JointLogisticMixture", "scales", scales)
        self._log_weights = _log_weights("JointLogisticMixture", weights)
        self.weights, self.locations, self.scales = weights, locations, scales
        self.noise = check_number("JointLogisticMixture", "noise", noise, positive=False)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> JointLogisticMixture:
        """The same density on another device or in another dtype."""
        moved = _moved(device, dtype, self.weights, self.locations, self.scales)
        return JointLogisticMixture(moved[0], moved[1], moved[2], self.noise)

    def sample(self, n: int, *, seed: int) -> Tensor:
        """n independent draws, shape (n, D); the same seed gives the same draws on one device."""
        generator = _generator("JointLogisticMixture", n, seed, self.locations)
        part = _choose(self.weights, n, generator)
        return _logistic_draws(self.locations[part], self.scales[part], self.noise, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p at x (B, D), shape (B,), normalised."""
        return (self._log_weights + self._parts("log_prob", x)[0].sum(-1)).logsumexp(-1)

    def score(self, x: Tensor) -> Tensor:
        """s1 = E_r[g] at x (B, D), shape (B, D): r the responsibilities, g the parts' scores."""
        r, g, _, _ = self._weighted("score", x)
        return _average(r, g)

    def hessian(self, x: Tensor) -> Tensor:
        """s2 = E_r[diag l''] + Cov_r[g] at x (B, D), shape (B, D, D)."""
        r, g, second, _ = self._weighted("hessian", x)
        return torch.diag_embed(_average(r, second)) + _covariance(r, g)

    def hessian_diag(self, x: Tensor) -> Tensor:
        """The diagonal of s2 at x (B, D), shape (B, D), without a D x D object."""
        r, g, second, _ = self._weighted("hessian_diag", x)
        centred = g - _average(r, g).unsqueeze(-2)
        return _average(r, second + centred.square())

    def third(self, x: Tensor) -> Tensor:
        """s3 = E_r[c c c] + sym3(E_r[diag l'' (x) c]) + E_r[diag l'''], shape (B, D, D, D)."""
        r, g, second, third = self._weighted("third", x)
        centred = g - _average(r, g).unsqueeze(-2)
        mixed = torch.diag_embed((centred * r.unsqueeze(-1)).mT @ second)
        within = _space_diagonal(_average(r, third))
        return _third_moment(r, centred) + _sym3(mixed.movedim(1, -1)) + within

    def noisy(self, sigma: float, alpha: float = 1.0) -> JointLogisticMixture:
        """The law of alpha x + sigma z: locations and scales times alpha, noise added."""
        sigma, alpha = _check_noise("JointLogisticMixture.noisy", sigma, alpha)
        noise = math.hypot(alpha * self.noise, sigma)
        locations, scales = alpha * self.locations, alpha * self.scales
        return JointLogisticMixture(self.weights, locations, scales, noise)

    def posterior_mean(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """E[x | alpha x + sigma z = x_noisy] by Tweedie's formula, shape (B, D)."""
        name = "JointLogisticMixture.posterior_mean"
        sigma, alpha = _check_noise(name, sigma, alpha)
        _check_points(name, x_noisy, self.locations, self.dim, "x_noisy")
        wide = self.to(dtype=torch.float64).noisy(sigma, alpha)
        return _tweedie_mean(x_noisy, wide.score(x_noisy.double()), sigma, alpha)

    def posterior_covariance(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """Cov[x | alpha x + sigma z = x_noisy] by Tweedie's formula, shape (B, D, D)."""
        name = "JointLogisticMixture.posterior_covariance"
        sigma, alpha = _check_noise(name, sigma, alpha)
        _check_points(name, x_noisy, self.locations, self.dim, "x_noisy")
        wide = self.to(dtype=torch.float64).noisy(sigma, alpha)
        return _tweedie_covariance(x_noisy, wide.hessian(x_noisy.double()), sigma, alpha)

    def _parts(self, method: str, x: Tensor) -> _Derivatives:
        """log of each part's coordinate densities and their derivatives, each (B, K, D)."""
        _check_points(f"JointLogisticMixture.{method}", x, self.locations, self.dim)
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
        log_kernel = -((y_ - t) / noise).square() / 2 - _LOG_2PI / 2 - math.log(noise)
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
        draws = draws + noise * _randn(location.shape, generator, location)
    return draws


# ---------------------------------------------------------------------------------------- moments


def _average(r: Tensor, value: Tensor) -> Tensor:
    """E_r[value] for r (B, K), value (B, K, D)."""
    return (r.unsqueeze(-2) @ value).squeeze(-2)


def _covariance(r: Tensor, value: Tensor) -> Tensor:
    """Cov_r[value], (B, D, D); centred first, since E[v v^T] - E[v] E[v]^T cancels."""
    centred = value - _average(r, value).unsqueeze(-2)
    return (centred * r.unsqueeze(-1)).mT @ centred


def _third_moment(r: Tensor, centred: Tensor) -> Tensor:
    """E_r[c c c], (B, D, D, D)."""
    return torch.einsum("bki,bkj,bkl->bijl", centred * r.unsqueeze(-1), centred, centred)


def _sym3(value: Tensor) -> Tensor:
    """A_ij b_l -> A_ij b_l + A_il b_j + A_jl b_i, for value (B, D, D, D) symmetric in i, j."""
    return value + value.permute(0, 1, 3, 2) + value.permute(0, 3, 1, 2)


def _space_diagonal(value: Tensor) -> Tensor:
    """(B, D) on the diagonal i = j = l of zeros (B, D, D, D)."""
    return torch.diag_embed(torch.diag_embed(value))


def _noisy_covariance(covariance: Tensor, sigma: float, alpha: float) -> Tensor:
    """alpha^2 S + sigma^2 I."""
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return alpha**2 * covariance + sigma**2 * identity


def _tweedie_mean(x_noisy: Tensor, score: Tensor, sigma: float, alpha: float) -> Tensor:
    """(x_noisy + sigma^2 s1) / alpha, from a float64 score."""
    return ((x_noisy.double() + sigma**2 * score) / alpha).to(x_noisy.dtype)


def _tweedie_covariance(x_noisy: Tensor, hessian: Tensor, sigma: float, alpha: float) -> Tensor:
    """(sigma / alpha)^2 (I + sigma^2 s2), from a float64 s2: for a large sigma the sum cancels."""
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return ((sigma / alpha) ** 2 * (identity + sigma**2 * hessian)).to(x_noisy.dtype)


# ---------------------------------------------------------------------------------- random numbers


def _generator(name: str, n: int, seed: int, like: Tensor) -> torch.Generator:
    for argument, value in (("n", n), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}.sample: {argument} must be an int, got {value!r}")
    if n < 0:
        raise ValueError(f"{name}.sample: n must be >= 0, got {n}")
    generator = torch.Generator(device=like.device)
    if like.device.type == "cpu":  # it keeps 32 bits of a seed: the others are mixed in
        seed = (seed ^ (seed >> 32) * 0x9E3779B1) & 0xFFFFFFFF if seed >> 32 else seed
    return generator.manual_seed(seed)


def _randn(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _choose(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n parts drawn with the given weights, weights.shape[:-1] + (n,), int64."""
    if n == 0:
        return torch.zeros(*weights.shape[:-1], 0, dtype=torch.int64, device=weights.device)
    return weights.multinomial(n, replacement=True, generator=generator)


# ----------------------------------------------------------------------------------------- checks


def _check_leading(name: str, argument: str, value: Tensor, ndim: int) -> None:
    """The parameter that sets sizes, dtype and device of the others."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: {argument} must be float32 or float64, got {value.dtype}")
    if value.dim() != ndim or value.numel() == 0:
        rule = f"{ndim} non-empty dimension{'s' if ndim > 1 else ''}"
        raise ValueError(f"{name}: {argument} must have {rule}, got shape {tuple(value.shape)}")
    _check_finite(name, argument, value)


def _check_like(
    name: str, argument: str, value: Tensor, like: Tensor, shape: tuple[int, ...]
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dtype != like.dtype:
        raise ValueError(f"{name}: {argument} must have dtype {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: {argument} must be on {like.device}, got {value.device}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name}: {argument} must have shape {tuple(shape)}, got {tuple(value.shape)}"
        )
    _check_finite(name, argument, value)


def _check_finite(name: str, argument: str, value: Tensor) -> None:
    bad = value[~value.isfinite()]
    if bad.numel() > 0:
        raise ValueError(f"{name}: {argument} must be finite, got {float(bad[0])}")


def _check_positive(name: str, argument: str, value: Tensor) -> None:
    if not bool((value > 0).all()):
        raise ValueError(f"{name}: {argument} must be positive, got {float(value.min()):g}")


def _log_weights(name: str, weights: Tensor) -> Tensor:
    """log of the weights, normalised over the last axis within the rounding that is allowed."""
    _check_positive(name, "weights", weights)
    total = weights.sum(-1, keepdim=True)
    worst = total.flatten()[(total - 1).abs().argmax()]
    if abs(float(worst) - 1) > 1e-5:
        raise ValueError(f"{name}: weights must sum to one, got {float(worst):g}")
    return (weights / total).log()


def _cholesky(name: str, argument: str, covariance: Tensor) -> Tensor:
    """The lower Cholesky factor of symmetric positive definite matrices."""
    gap = float((covariance - covariance.mT).abs().max())
    if gap > 1e-5 * float(covariance.abs().max()):
        raise ValueError(f"{name}: {argument} must be symmetric, got a difference of {gap:g}")
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(covariance)
    if bool(info.any()):
        smallest = float(torch.linalg.eigvalsh(covariance).min())
        raise ValueError(
            f"{name}: {argument} must be positive definite, got smallest eigenvalue {smallest:g}"
        )
    return factor


def _inverse_triangular(factor: Tensor) -> Tensor:
    """W = L^-1, so that |W v|^2 = v^T P v and W^T W = P = (L L^T)^-1."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse


def _check_points(name: str, x: Tensor, like: Tensor, dim: int, argument: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(x).__name__}")
    if x.dim() != 2 or x.shape[1] != dim:
        raise ValueError(f"{name}: {argument} must have shape (B, {dim}), got {tuple(x.shape)}")
    if x.dtype != like.dtype:
        raise ValueError(f"{name}: {argument} must have dtype {like.dtype}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: {argument} must be on {like.device}, got {x.device}")


def _check_noise(name: str, sigma: float, alpha: float) -> tuple[float, float]:
    return check_number(name, "sigma", sigma), check_number(name, "alpha", alpha)


def _moved(
    device: torch.device | str | None, dtype: torch.dtype | None, *parameters: Tensor
) -> list[Tensor]:
    return [p.to(device=device or p.device, dtype=dtype or p.dtype) for p in parameters]
