"""Posterior moments of the clean sample, from scores of the noisy density (Tweedie's formula).

Setting: x = alpha * x0 + sigma * z with z standard normal; s1 and s2 are the gradient and the
Hessian of log p(x), the density of the noisy sample. The formulas are equations 4, 7-10 and 18 of
Meng et al. 2021 (arXiv:2111.04726) with alpha. Networks speak in scaled quantities (`Scores`), all
of order one at every noise level; `UnscaledScores` are s1 and s2 themselves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal

from .checks import check_tensor
from .dplr import DPLR, per_sample


class Scores(NamedTuple):
    """What a network returns at noise level sigma, in scaled quantities (all of order one).

    Fields:
        score: sigma * s1. Shape (B, *dims).
        c: 1 + sigma^2 * diag, the diagonal part of alpha^2 Cov[x0 | x] / sigma^2. Shape (B, *dims).
        factor: sigma * U with s2 = diag + U diag(sign) U^T. Shape (B, D, r), D in row-major order
            of dims; None is rank 0.
        sign: +1 or -1 for each column of factor. Shape (r,); None is all +1.
    """

    score: Tensor
    c: Tensor
    factor: Tensor | None = None
    sign: Tensor | None = None

    def unscaled(self, sigma: float | Tensor) -> UnscaledScores:
        """s1, the diagonal of s2 and U. sigma: float or (B,), > 0."""
        where = "Scores.unscaled"
        check_tensor(where, "score", self.score)
        check_tensor(where, "c", self.c, like=self.score, shape=tuple(self.score.shape))
        s = _positive(where, "sigma", sigma, self.score)
        factor = _factor(where, self.factor, self.score, 1 / s)
        return UnscaledScores(self.score / s, (self.c - 1) / s.square(), factor, self.sign)


class UnscaledScores(NamedTuple):
    """The scores themselves.

    Fields:
        score: s1. Shape (B, *dims). Units 1/data.
        diag: d with s2 = diag(d) + U diag(sign) U^T. Shape (B, *dims). Units 1/data^2.
        factor: U. Shape (B, D, r), D in row-major order of dims; None is rank 0. Units 1/data.
        sign: +1 or -1 for each column of factor. Shape (r,); None is all +1.
    """

    score: Tensor
    diag: Tensor
    factor: Tensor | None = None
    sign: Tensor | None = None

    def scaled(self, sigma: float | Tensor) -> Scores:
        """sigma s1, 1 + sigma^2 diag, sigma U. sigma: float or (B,), > 0."""
        where = "UnscaledScores.scaled"
        check_tensor(where, "score", self.score)
        check_tensor(where, "diag", self.diag, like=self.score, shape=tuple(self.score.shape))
        s = _positive(where, "sigma", sigma, self.score)
        factor = _factor(where, self.factor, self.score, s)
        return Scores(self.score * s, 1 + self.diag * s.square(), factor, self.sign)


class Posterior(NamedTuple):
    """The first two moments of the clean sample given the noisy one, read as a Gaussian.

    Fields:
        mean: E[x0 | x]. Shape (B, *dims). Units of the data.
        covariance: Cov[x0 | x] of the flattened sample, a DPLR (B, D, D). Units data^2.

    Drawing from it, its density and its principal components treat the posterior as N(mean,
    covariance); mean and covariance themselves are those of the true posterior if the scores are.
    """

    mean: Tensor
    covariance: DPLR

    @property
    def std(self) -> Tensor:
        """Standard deviation of each entry. Shape (B, *dims). NaN where the model's variance is
        negative, which an unconstrained head may produce."""
        return self.covariance.diagonal().sqrt().reshape(self.mean.shape)

    def sample(self, n: int, *, seed: int | None = None, offset: int = 0, first: int = 0) -> Tensor:
        """n draws of N(mean, covariance). Shape (n, B, *dims); arguments as `DPLR.sample`."""
        draws = self.covariance.sample(n, seed=seed, offset=offset, first=first)
        return self.mean + draws.reshape(n, *self.mean.shape)

    def principal_components(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues (B, k) of the covariance and their eigenvectors (B, D, k)."""
        return self.covariance.eigh(k)

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, covariance), natural logarithm.

        Args:
            x: a clean sample for each posterior. Shape (B, *dims), dtype and device of mean.

        Returns:
            Shape (B,). NaN where x or mean holds NaN, or the covariance NaN or inf.

        Raises:
            ValueError: x does not fit, or a finite covariance is not positive definite.
        """
        where = "Posterior.log_prob"
        check_tensor(where, "x", x, like=self.mean, shape=tuple(self.mean.shape))
        diag, factor = self.covariance.diag, self.covariance.factor
        finite = diag.isfinite().all(-1) & factor.isfinite().flatten(1).all(-1)
        covariance = DPLR(
            diag.where(finite[:, None], 1.0),
            factor.where(finite[:, None, None], 0.0),
            self.covariance.sign,
        )
        bad = ~covariance.is_positive_definite()
        if bool(bad.any()):
            item = int(bad.nonzero()[0])
            raise ValueError(
                "Posterior.log_prob: covariance must be positive definite, "
                f"got one that is not at batch {item}"
            )
        error = (x - self.mean).flatten(1)
        distance = (error * covariance.solve(error)).sum(-1)
        constant = error.shape[1] * math.log(2 * math.pi)
        value = -(distance + covariance.logdet() + constant) / 2
        return value.where(finite, torch.nan)

    def recalibrated(self, factor: float | Tensor) -> Posterior:
        """The posterior with its covariance times factor: a float or (B,), > 0."""
        _positive("Posterior.recalibrated", "factor", factor, self.mean)
        return Posterior(self.mean, self.covariance.scale(factor))

    def to_distribution(self) -> LowRankMultivariateNormal:
        """The posterior as a torch distribution over the flattened sample (event shape (D,)).

        Raises:
            ValueError: the covariance has a sign -1 or a diagonal part that is not positive, which
                that class cannot hold.
        """
        diag, sign = self.covariance.diag, self.covariance.sign
        if sign is not None and bool((sign < 0).any()):
            raise ValueError(
                f"Posterior.to_distribution: signs must all be +1, got {sign.tolist()}"
            )
        bad = ~(diag > 0)
        if bool(bad.any()):
            raise ValueError(
                "Posterior.to_distribution: the diagonal part of the covariance must be positive, "
                f"got {diag[bad][0].item()}"
            )
        factor = self.covariance.factor
        if self.covariance.rank == 0:  # that class needs a column
            factor = torch.zeros_like(diag).unsqueeze(-1)
        return LowRankMultivariateNormal(self.mean.flatten(1), factor, diag)


# ------------------------------------------------------------------------------------ moments


def posterior(
    x: Tensor, scores: Scores, sigma: float | Tensor, alpha: float | Tensor = 1.0
) -> Posterior:
    """Mean and covariance of the clean sample given the noisy one, from a network's output.

    E[x0 | x] = (x + sigma (sigma s1)) / alpha,
    Cov[x0 | x] = (sigma^2 / alpha^2) (diag(c) + F diag(sign) F^T) with F = sigma U.
    Since c is 1 + sigma^2 diag itself, small posterior variances carry no cancellation.

    Args:
        x: the noisy sample. Shape (B, *dims). float32 or float64.
        scores: a `Scores` at x and sigma, dtype and device of x.
        sigma: noise standard deviation, units of the data. float or (B,), > 0; a tensor is taken
            in x's dtype.
        alpha: signal scale. float or (B,), > 0.

    Returns:
        A `Posterior`.

    Raises:
        TypeError: scores is not a `Scores`.
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.
    """
    if not isinstance(scores, Scores):
        raise TypeError(f"posterior: scores must be a Scores, got {type(scores).__name__}")
    _samples("posterior", "x", x)
    _like("posterior", "scores.score", scores.score, x)
    _like("posterior", "scores.c", scores.c, x)
    s = _positive("posterior", "sigma", sigma, x)
    a = _positive("posterior", "alpha", alpha, x)
    ratio = s / a
    factor = _factor("posterior", scores.factor, x, ratio)
    covariance = DPLR((ratio.square() * scores.c).flatten(1), factor, scores.sign)
    return Posterior((x + s * scores.score) / a, covariance)


def posterior_mean(
    x: Tensor, score: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0
) -> Tensor:
    """E[x0 | x] = (x + sigma^2 s1) / alpha (Eq. 4).

    Args:
        x: the noisy sample. Shape (B, *dims). float32 or float64.
        score: s1 at x, same shape, dtype and device. Units 1/data.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.

    Returns:
        Shape (B, *dims). Units of the data.

    Raises:
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.
    """
    _like("posterior_mean", "score", score, x)
    s = _positive("posterior_mean", "sigma", sigma, x)
    return (x + s.square() * score) / _positive("posterior_mean", "alpha", alpha, x)


def posterior_covariance(
    diag: Tensor,
    factor: Tensor | None,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    sign: Tensor | None = None,
) -> DPLR:
    """Cov[x0 | x] = (sigma^4 / alpha^2) (s2 + I / sigma^2), s2 = diag + U diag(sign) U^T.

    Where diag is near -1/sigma^2 (a sharp posterior at small sigma) the sum cancels; `posterior`
    takes c = 1 + sigma^2 diag from a network and does not.

    Args:
        diag: diagonal part of s2. Shape (B, *dims). float32 or float64. Units 1/data^2.
        factor: U. Shape (B, D, r), or None. Units 1/data.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.
        sign: +1 or -1 for each column of U. Shape (r,); None is all +1.

    Returns:
        DPLR (B, D, D). Units data^2.

    Raises:
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.
    """
    _samples("posterior_covariance", "diag", diag)
    s = _positive("posterior_covariance", "sigma", sigma, diag)
    a = _positive("posterior_covariance", "alpha", alpha, diag)
    factor = _factor("posterior_covariance", factor, diag, s.square() / a)
    return DPLR(((s / a).square() * (1 + s.square() * diag)).flatten(1), factor, sign)


def second_moment(
    x: Tensor,
    score: Tensor,
    diag: Tensor,
    factor: Tensor | None,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    sign: Tensor | None = None,
) -> DPLR:
    """E[x0 x0^T | x] = (sigma^4 / alpha^2) (s2 + I / sigma^2 + J J^T), J = s1 + x / sigma^2.

    The mean is one more column beside the scaled factor, with sign +1.

    Args:
        x: the noisy sample. Shape (B, *dims). float32 or float64.
        score: s1 at x. Shape (B, *dims). Units 1/data.
        diag, factor, sigma, alpha, sign: as `posterior_covariance`.

    Returns:
        DPLR (B, D, D) of rank r + 1. Units data^2.

    Raises:
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.
    """
    _samples("second_moment", "x", x)
    _like("second_moment", "diag", diag, x)
    mean = posterior_mean(x, score, sigma, alpha).flatten(1)
    covariance = posterior_covariance(diag, factor, sigma, alpha, sign=sign)
    return covariance + DPLR(torch.zeros_like(mean), mean.unsqueeze(-1))


# -------------------------------------------------------------------------------- conversions


def score_from_eps(eps: Tensor, sigma: float | Tensor) -> Tensor:
    """s1 = -E[z | x] / sigma, from a noise prediction (any alpha). eps (B, *dims)."""
    check_tensor("score_from_eps", "eps", eps)
    return -eps / _positive("score_from_eps", "sigma", sigma, eps)


def eps_from_score(score: Tensor, sigma: float | Tensor) -> Tensor:
    """E[z | x] = -sigma s1, the noise prediction (any alpha). score (B, *dims)."""
    check_tensor("eps_from_score", "score", score)
    return -score * _positive("eps_from_score", "sigma", sigma, score)


def score_from_x0(
    x: Tensor, x0: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0
) -> Tensor:
    """s1 = (alpha E[x0 | x] - x) / sigma^2, from a denoised sample. x, x0 (B, *dims)."""
    _like("score_from_x0", "x0", x0, x)
    s = _positive("score_from_x0", "sigma", sigma, x)
    return (_positive("score_from_x0", "alpha", alpha, x) * x0 - x) / s.square()


def x0_from_score(
    x: Tensor, score: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0
) -> Tensor:
    """E[x0 | x] = (x + sigma^2 s1) / alpha: `posterior_mean` under its name in diffusion."""
    return posterior_mean(x, score, sigma, alpha)


def score_from_v(x: Tensor, v: Tensor, sigma: float | Tensor, alpha: float | Tensor) -> Tensor:
    """s1 from a velocity prediction E[v | x], v = alpha z - sigma x0. x, v (B, *dims).

    With x = alpha x0 + sigma z: z = (sigma x + alpha v) / (alpha^2 + sigma^2) and s1 = -z / sigma.
    Any alpha and sigma; in the variance-preserving case the denominator is 1.
    """
    _like("score_from_v", "v", v, x)
    s = _positive("score_from_v", "sigma", sigma, x)
    a = _positive("score_from_v", "alpha", alpha, x)
    return -(s * x + a * v) / (s * (a.square() + s.square()))


def v_from_score(x: Tensor, score: Tensor, sigma: float | Tensor, alpha: float | Tensor) -> Tensor:
    """E[v | x] = -(sigma / alpha) (x + (alpha^2 + sigma^2) s1), v as in `score_from_v`."""
    _like("v_from_score", "score", score, x)
    s = _positive("v_from_score", "sigma", sigma, x)
    a = _positive("v_from_score", "alpha", alpha, x)
    return -(s / a) * (x + (a.square() + s.square()) * score)


def hessian_from_jacobian(
    jacobian: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0
) -> Tensor:
    """s2 = (alpha J - I) / sigma^2 from the Jacobian J of the denoiser x -> E[x0 | x].

    Args:
        jacobian: d E[x0 | x]_i / d x_j, as vmap(jacrev(denoiser))(x) gives it. Shape
            (B, *dims, *dims). float32 or float64.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.

    Returns:
        Shape (B, D, D). Symmetric if J is; a network's Jacobian is so only approximately.

    Raises:
        ValueError: jacobian is not (B, *dims, *dims); sigma or alpha is not positive.
    """
    where = "hessian_from_jacobian"
    check_tensor(where, "jacobian", jacobian)
    half = jacobian.dim() // 2
    dims = jacobian.shape[1 : 1 + half]
    if half == 0 or jacobian.dim() % 2 == 0 or dims != jacobian.shape[1 + half :]:
        got = tuple(jacobian.shape)
        raise ValueError(f"{where}: jacobian must have shape (B, *dims, *dims), got {got}")
    flat = jacobian.reshape(jacobian.shape[0], dims.numel(), dims.numel())
    s = _positive(where, "sigma", sigma, flat)
    scaled = _positive(where, "alpha", alpha, flat) * flat
    return (scaled - torch.eye(dims.numel(), dtype=flat.dtype, device=flat.device)) / s.square()


# ------------------------------------------------------------------------------------ helpers


def _positive(where: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A positive float, 0-d or (B,) value in like's dtype, shaped to broadcast against it."""
    column = per_sample(where, name, value, like)
    if not bool((column > 0).all()):
        worst = column[~(column > 0)].flatten()[0].item()
        raise ValueError(f"{where}: {name} must be positive, got {worst}")
    return column


def _samples(where: str, name: str, x: Tensor) -> None:
    """Refuse what cannot be flattened to (B, D)."""
    check_tensor(where, name, x)
    if x.dim() < 2:
        raise ValueError(f"{where}: {name} must have shape (B, *dims), got {tuple(x.shape)}")


def _like(where: str, name: str, value: Tensor, x: Tensor) -> None:
    """Refuse a value that has not the shape, dtype and device of x, and an x that is no data."""
    check_tensor(where, "x", x)
    check_tensor(where, name, value, like=x, shape=tuple(x.shape))


def _factor(where: str, factor: Tensor | None, like: Tensor, times: Tensor) -> Tensor | None:
    """factor times a value of `_positive`."""
    if factor is None:
        return None
    check_tensor(where, "factor", factor, like=like)
    return factor * times.reshape(-1, 1, 1)
