"""Gaussian laws and their mixtures: scores of every order at every noise level, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

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
from .parameters import check_leading, check_other, log_weights, placed, whitening


class Gaussian(Density):
    """The normal law N(mean, covariance) in D dimensions.

    Args:
        mean: shape (D,), float32 or float64. Units of the data.
        covariance: shape (D, D), symmetric positive definite, same dtype and device.
        device, dtype: where the parameters are kept and as what, float32 or float64; None is as
            they come.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes, dtypes or devices disagree, or the covariance is not positive definite.

    Example:
        >>> import torch
        >>> from hos_ext.densities import Gaussian
        >>> law = Gaussian(torch.zeros(2), torch.diag(torch.tensor([1.0, 4.0])))
        >>> law.score(torch.ones(1, 2))
        tensor([[-1.0000, -0.2500]])
        >>> law.posterior_mean(torch.ones(1, 2), sigma=1.0)
        tensor([[0.5000, 0.8000]])
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        mean, covariance = placed("Gaussian", device, dtype, mean, covariance)
        check_leading("Gaussian", "mean", mean, 1)
        self.dim = mean.shape[0]
        check_other("Gaussian", "covariance", covariance, mean, (self.dim, self.dim))
        self.mean, self.covariance = mean, covariance
        self._white = whitening("Gaussian", "covariance", covariance)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.mean, self.covariance

    def _like(self, *tensors: Tensor) -> Gaussian:
        return Gaussian(*tensors)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        return (
            self.mean + draw_normal((n, self.dim), generator, self.mean) @ self._white.cholesky.mT
        )

    def _log_prob(self, x: Tensor) -> Tensor:
        white = (x - self.mean) @ self._white.inverse.mT
        log_det = self._white.inverse.diagonal().log().sum()
        return log_det - (white.square().sum(-1) + self.dim * LOG_2PI) / 2

    def _score(self, x: Tensor) -> Tensor:
        """-P (x - mean), P the inverse covariance."""
        return -((x - self.mean) @ self._white.precision)

    def _hessian(self, x: Tensor) -> Tensor:
        return -self._white.precision.repeat(x.shape[0], 1, 1)

    def _hessian_diag(self, x: Tensor) -> Tensor:
        return -self._white.precision.diagonal().repeat(x.shape[0], 1)

    def _third(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.dim, self.dim, self.dim)

    def _noisy(self, sigma: float, alpha: float) -> Gaussian:
        """N(alpha mean, alpha^2 covariance + sigma^2 I)."""
        return Gaussian(alpha * self.mean, _noisy_covariance(self.covariance, sigma, alpha))

    def _posterior_mean(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        gain = self._noised("posterior_mean", sigma, alpha)._white.precision @ self.covariance
        return self.mean + alpha * (x - alpha * self.mean) @ gain

    def _posterior_covariance(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        """sigma^2 S P, the same at every x; P is the precision of the noisy law."""
        covariance = (
            sigma**2
            * self.covariance
            @ self._noised("posterior_covariance", sigma, alpha)._white.precision
        )
        return covariance.repeat(x.shape[0], 1, 1)


class GaussianMixture(Density):
    """sum_k weights_k N(means_k, covariances_k) in D dimensions.

    With r the responsibilities, g_k the scores of the parts, P_k their precisions and
    c = g - E_r[g]:

        s1 = E_r[g]     s2 = Cov_r[g] - E_r[P]     s3 = E_r[c c c] + sym3(E_r[-P (x) c])

    Args:
        weights: shape (K,), positive, summing to one (the remaining rounding is divided out).
            float32 or float64.
        means: shape (K, D). Units of the data.
        covariances: shape (K, D, D), each symmetric positive definite.
        device, dtype: as in `Gaussian`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes, dtypes or devices disagree, the weights are not positive with sum one,
            or a covariance is not positive definite.

    Example:
        >>> import torch
        >>> from hos_ext.densities import GaussianMixture
        >>> means = torch.tensor([[-1.0], [1.0]])
        >>> law = GaussianMixture(torch.tensor([0.5, 0.5]), means, torch.ones(2, 1, 1))
        >>> law.hessian(torch.zeros(1, 1))
        tensor([[[0.]]])
        >>> law.noisy(sigma=1.0).covariances.flatten()
        tensor([2., 2.])
    """

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = "GaussianMixture"
        weights, means, covariances = placed(name, device, dtype, weights, means, covariances)
        check_leading(name, "means", means, 2)
        k, self.dim = means.shape
        check_other(name, "weights", weights, means, (k,))
        check_other(name, "covariances", covariances, means, (k, self.dim, self.dim))
        self._log_weights = log_weights(name, weights)
        self.weights, self.means, self.covariances = weights, means, covariances
        self._white = whitening(name, "covariances", covariances)

    def _summary(self) -> str:
        return f"{len(self.weights)} components, D={self.dim}"

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.weights, self.means, self.covariances

    def _like(self, *tensors: Tensor) -> GaussianMixture:
        return GaussianMixture(*tensors)

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        part = choose_parts(self.weights, n, generator)
        noise = draw_normal((n, self.dim), generator, self.means)
        draws = self.means[part]
        for k in range(self.means.shape[0]):
            draws[part == k] += noise[part == k] @ self._white.cholesky[k].mT
        return draws

    def _log_prob(self, x: Tensor) -> Tensor:
        return self._parts(x)[0].logsumexp(-1)

    def _score(self, x: Tensor) -> Tensor:
        return weighted_mean(*self._weighted(x))

    def _hessian(self, x: Tensor) -> Tensor:
        r, g = self._weighted(x)
        within = torch.einsum("bk,kij->bij", r, self._white.precision)
        return weighted_covariance(r, g) - within

    def _hessian_diag(self, x: Tensor) -> Tensor:
        r, g = self._weighted(x)
        within = r @ self._white.precision.diagonal(dim1=-2, dim2=-1)
        return weighted_mean(r, centred(r, g).square()) - within

    def _third(self, x: Tensor) -> Tensor:
        r, g = self._weighted(x)
        c = centred(r, g)
        mixed = -torch.einsum("bkl,kij->bijl", c * r.unsqueeze(-1), self._white.precision)
        return weighted_third_moment(r, c) + symmetrise_third(mixed)

    def _noisy(self, sigma: float, alpha: float) -> GaussianMixture:
        """Means alpha m_k, covariances alpha^2 S_k + sigma^2 I."""
        covariances = _noisy_covariance(self.covariances, sigma, alpha)
        return GaussianMixture(self.weights, alpha * self.means, covariances)

    def _posterior_mean(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        r, g = self._noised("posterior_mean", sigma, alpha)._weighted(x)
        return weighted_mean(r, self._posterior_means(g, alpha))

    def _posterior_covariance(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        noisy = self._noised("posterior_covariance", sigma, alpha)
        r, g = noisy._weighted(x)
        within = sigma**2 * self.covariances @ noisy._white.precision
        between = weighted_covariance(r, self._posterior_means(g, alpha))
        return torch.einsum("bk,kij->bij", r, within) + between

    def _posterior_means(self, noisy_scores: Tensor, alpha: float) -> Tensor:
        """m_k - alpha S_k g_k, the posterior mean within each part, (B, K, D)."""
        shift = torch.einsum("kij,bkj->bki", self.covariances, noisy_scores)
        return self.means - alpha * shift

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log(weight_k N_k(x)), (B, K), and the score of each part, (B, K, D)."""
        inverse = self._white.inverse
        white = torch.einsum("kij,bkj->bki", inverse, x.unsqueeze(-2) - self.means)
        log_det = inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_parts = log_det - (white.square().sum(-1) + self.dim * LOG_2PI) / 2
        scores = -torch.einsum("kij,bki->bkj", inverse, white)
        return self._log_weights + log_parts, scores

    def _weighted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The responsibilities r, (B, K), and the score of each part, (B, K, D)."""
        log_parts, scores = self._parts(x)
        return log_parts.softmax(-1), scores


def _noisy_covariance(covariance: Tensor, sigma: float, alpha: float) -> Tensor:
    """alpha^2 S + sigma^2 I."""
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return alpha**2 * covariance + sigma**2 * identity
