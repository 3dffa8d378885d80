"""Gaussian laws and their mixtures: scores of every order at every noise level, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import (
    LOG_2PI,
    check_leading,
    check_like,
    check_noise,
    check_points,
    cholesky_factor,
    choose_components,
    draw_normal,
    inverse_triangular,
    log_weights,
    moved_to,
    noisy_covariance,
    seeded_generator,
    symmetrise_third,
    weighted_covariance,
    weighted_mean,
    weighted_third_moment,
)


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
        check_leading("Gaussian", "mean", mean, 1)
        check_like("Gaussian", "covariance", covariance, mean, (mean.shape[0], mean.shape[0]))
        self.mean, self.covariance, self.dim = mean, covariance, mean.shape[0]
        self._cholesky = cholesky_factor("Gaussian", "covariance", covariance)
        self._whiten = inverse_triangular(self._cholesky)
        self._precision = self._whiten.mT @ self._whiten

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Gaussian:
        """The same density on another device or in another dtype."""
        mean, covariance = moved_to(device, dtype, self.mean, self.covariance)
        return Gaussian(mean, covariance)

    def sample(self, n: int, *, seed: int) -> Tensor:
        """n independent draws, shape (n, D); the same seed gives the same draws on one device."""
        generator = seeded_generator("Gaussian", n, seed, self.mean)
        return self.mean + draw_normal((n, self.dim), generator, self.mean) @ self._cholesky.mT

    def log_prob(self, x: Tensor) -> Tensor:
        """log p at x (B, D), shape (B,), normalised."""
        white = self._centred("log_prob", x) @ self._whiten.mT
        log_det = self._whiten.diagonal().log().sum()
        return log_det - (white.square().sum(-1) + self.dim * LOG_2PI) / 2

    def score(self, x: Tensor) -> Tensor:
        """s1 = -P (x - mean), P the inverse covariance, at x (B, D), shape (B, D)."""
        return -(self._centred("score", x) @ self._precision)

    def hessian(self, x: Tensor) -> Tensor:
        """s2 = -P at x (B, D), shape (B, D, D)."""
        check_points("Gaussian.hessian", x, self.mean, self.dim)
        return -self._precision.repeat(x.shape[0], 1, 1)

    def hessian_diag(self, x: Tensor) -> Tensor:
        """The diagonal of s2 at x (B, D), shape (B, D)."""
        check_points("Gaussian.hessian_diag", x, self.mean, self.dim)
        return -self._precision.diagonal().repeat(x.shape[0], 1)

    def third(self, x: Tensor) -> Tensor:
        """s3 = 0 at x (B, D), shape (B, D, D, D)."""
        check_points("Gaussian.third", x, self.mean, self.dim)
        return x.new_zeros(x.shape[0], self.dim, self.dim, self.dim)

    def noisy(self, sigma: float, alpha: float = 1.0) -> Gaussian:
        """The law of alpha x + sigma z: N(alpha mean, alpha^2 covariance + sigma^2 I)."""
        sigma, alpha = check_noise("Gaussian.noisy", sigma, alpha)
        return Gaussian(alpha * self.mean, noisy_covariance(self.covariance, sigma, alpha))

    def posterior_mean(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """E[x | alpha x + sigma z = x_noisy], shape (B, D)."""
        sigma, alpha = check_noise("Gaussian.posterior_mean", sigma, alpha)
        check_points("Gaussian.posterior_mean", x_noisy, self.mean, self.dim, "x_noisy")
        gain = self.noisy(sigma, alpha)._precision @ self.covariance
        return self.mean + alpha * (x_noisy - alpha * self.mean) @ gain

    def posterior_covariance(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """Cov[x | alpha x + sigma z = x_noisy] = sigma^2 S P, shape (B, D, D)."""
        sigma, alpha = check_noise("Gaussian.posterior_covariance", sigma, alpha)
        check_points("Gaussian.posterior_covariance", x_noisy, self.mean, self.dim, "x_noisy")
        covariance = sigma**2 * self.covariance @ self.noisy(sigma, alpha)._precision
        return covariance.repeat(x_noisy.shape[0], 1, 1)

    def _centred(self, method: str, x: Tensor) -> Tensor:
        check_points(f"Gaussian.{method}", x, self.mean, self.dim)
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
        check_leading("GaussianMixture", "means", means, 2)
        k, self.dim = means.shape
        check_like("GaussianMixture", "weights", weights, means, (k,))
        check_like("GaussianMixture", "covariances", covariances, means, (k, self.dim, self.dim))
        self._log_weights = log_weights("GaussianMixture", weights)
        self.weights, self.means, self.covariances = weights, means, covariances
        self._cholesky = cholesky_factor("GaussianMixture", "covariances", covariances)
        self._whiten = inverse_triangular(self._cholesky)
        self._precision = self._whiten.mT @ self._whiten

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GaussianMixture:
        """The same density on another device or in another dtype."""
        return GaussianMixture(*moved_to(device, dtype, self.weights, self.means, self.covariances))

    def sample(self, n: int, *, seed: int) -> Tensor:
        """n independent draws, shape (n, D); the same seed gives the same draws on one device."""
        generator = seeded_generator("GaussianMixture", n, seed, self.means)
        part = choose_components(self.weights, n, generator)
        noise = draw_normal((n, self.dim), generator, self.means)
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
        return weighted_mean(r, g)

    def hessian(self, x: Tensor) -> Tensor:
        """s2 = E_r[-P] + Cov_r[g] at x (B, D), shape (B, D, D)."""
        r, g = self._weighted("hessian", x)
        return weighted_covariance(r, g) - torch.einsum("bk,kij->bij", r, self._precision)

    def hessian_diag(self, x: Tensor) -> Tensor:
        """The diagonal of s2 at x (B, D), shape (B, D), without a D x D object."""
        r, g = self._weighted("hessian_diag", x)
        centred = g - weighted_mean(r, g).unsqueeze(-2)
        return weighted_mean(r, centred.square()) - r @ self._precision.diagonal(dim1=-2, dim2=-1)

    def third(self, x: Tensor) -> Tensor:
        """s3 = E_r[c c c] + sym3(E_r[-P (x) c]), c = g - s1, at x (B, D), shape (B, D, D, D)."""
        r, g = self._weighted("third", x)
        centred = g - weighted_mean(r, g).unsqueeze(-2)
        mixed = -torch.einsum("bkl,kij->bijl", centred * r.unsqueeze(-1), self._precision)
        return weighted_third_moment(r, centred) + symmetrise_third(mixed)

    def noisy(self, sigma: float, alpha: float = 1.0) -> GaussianMixture:
        """The law of alpha x + sigma z: means alpha m_k, covariances alpha^2 S_k + sigma^2 I."""
        sigma, alpha = check_noise("GaussianMixture.noisy", sigma, alpha)
        covariances = noisy_covariance(self.covariances, sigma, alpha)
        return GaussianMixture(self.weights, alpha * self.means, covariances)

    def posterior_mean(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """E[x | alpha x + sigma z = x_noisy], shape (B, D)."""
        sigma, alpha = check_noise("GaussianMixture.posterior_mean", sigma, alpha)
        check_points("GaussianMixture.posterior_mean", x_noisy, self.means, self.dim, "x_noisy")
        r, g = self.noisy(sigma, alpha)._weighted("posterior_mean", x_noisy)
        return weighted_mean(r, self._posterior_means(g, alpha))

    def posterior_covariance(self, x_noisy: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """Cov[x | alpha x + sigma z = x_noisy], shape (B, D, D)."""
        sigma, alpha = check_noise("GaussianMixture.posterior_covariance", sigma, alpha)
        check_points(
            "GaussianMixture.posterior_covariance", x_noisy, self.means, self.dim, "x_noisy"
        )
        noisy = self.noisy(sigma, alpha)
        r, g = noisy._weighted("posterior_covariance", x_noisy)
        within = sigma**2 * self.covariances @ noisy._precision
        between = weighted_covariance(r, self._posterior_means(g, alpha))
        return torch.einsum("bk,kij->bij", r, within) + between

    def _posterior_means(self, noisy_scores: Tensor, alpha: float) -> Tensor:
        """m_k - alpha S_k g_k, the posterior mean within each part, (B, K, D)."""
        shift = torch.einsum("kij,bkj->bki", self.covariances, noisy_scores)
        return self.means - alpha * shift

    def _parts(self, method: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """log(weight_k N_k(x)), (B, K), and the score of each part, (B, K, D)."""
        check_points(f"GaussianMixture.{method}", x, self.means, self.dim)
        centred = x.unsqueeze(-2) - self.means
        white = torch.einsum("kij,bkj->bki", self._whiten, centred)
        log_det = self._whiten.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_parts = log_det - (white.square().sum(-1) + self.dim * LOG_2PI) / 2
        scores = -torch.einsum("kij,bki->bkj", self._whiten, white)
        return self._log_weights + log_parts, scores

    def _weighted(self, method: str, x: Tensor) -> tuple[Tensor, Tensor]:
        log_parts, scores = self._parts(method, x)
        return log_parts.softmax(-1), scores
