"""The values that networks and densities return, and the protocols that they meet.

The words of the package: everything else speaks in them and none of them imports a room.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .checks import check_like, check_tensor, positive


class Scores(NamedTuple):
    """What a network returns at noise level sigma, in scaled quantities (all of order one).

    Fields:
        scaled_score: sigma * s1. Shape (B, *dims).
        c: 1 + sigma^2 * diag, the diagonal part of alpha^2 Cov[x0 | x] / sigma^2. Shape (B, *dims).
        factor: sigma * U with s2 = diag + U diag(sign) U^T. Shape (B, D, r), D in row-major order
            of dims; None is rank 0.
        sign: +1 or -1 for each column of factor. Shape (r,); None is all +1.
    """

    scaled_score: Tensor
    c: Tensor
    factor: Tensor | None = None
    sign: Tensor | None = None

    def unscaled(self, sigma: float | Tensor) -> UnscaledScores:
        """s1, the diagonal of s2 and U. sigma: float or (B,), > 0."""
        where = "Scores.unscaled"
        check_tensor(where, "scaled_score", self.scaled_score)
        check_tensor(
            where, "c", self.c, like=self.scaled_score, shape=tuple(self.scaled_score.shape)
        )
        s = positive(where, "sigma", sigma, self.scaled_score)
        factor = scaled_factor(where, self.factor, self.scaled_score, 1 / s)
        return UnscaledScores(self.scaled_score / s, (self.c - 1) / s.square(), factor, self.sign)


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
        s = positive(where, "sigma", sigma, self.score)
        factor = scaled_factor(where, self.factor, self.score, s)
        return Scores(self.score * s, 1 + self.diag * s.square(), factor, self.sign)


class DenseScores(NamedTuple):
    """The scores themselves with the whole Hessian, for small D or an analytic density.

    Fields:
        score: s1. Shape (B, *dims). Units 1/data.
        hessian: s2, symmetric. Shape (B, D, D), D in row-major order of dims. Units 1/data^2.
    """

    score: Tensor
    hessian: Tensor


@runtime_checkable
class SymmetricOperator(Protocol):
    """A batch of symmetric matrices (B, D, D), known by what they answer.

    `DPLR`, `ScoreHessian` and `DenseOperator` of `hos_ext.linalg` are such operators.
    """

    @property
    def shape(self) -> torch.Size:
        """(B, D, D)."""

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""

    def matvec(self, v: Tensor) -> Tensor:
        """The product with v. v and the result: shape (B, D) or (B, D, k)."""

    def diagonal(self) -> Tensor:
        """The diagonal. Shape (B, D)."""

    def dense(self) -> Tensor:
        """The matrices themselves. Shape (B, D, D)."""

    def rows(self, index: Tensor | slice) -> SymmetricOperator:
        """The matrices of these samples of the batch."""


class MatrixFreeScores(NamedTuple):
    """Scores whose Hessian is known by its products alone, for `sample(method="ozaki_lanczos")`.

        def score_fn(x):
            hessian = ScoreHessian(score, x, symmetrize=True, check=False)
            return MatrixFreeScores(hessian.score.reshape(x.shape), hessian)

    Fields:
        score: s1. Shape (B, *dims). Units 1/data.
        hessian: s2 at the same points, symmetric. Shape (B, D, D). Units 1/data^2.
    """

    score: Tensor
    hessian: SymmetricOperator


AnyScores: TypeAlias = Tensor | UnscaledScores | DenseScores | MatrixFreeScores
"""s1 alone, or with the Hessian in one of the three forms that samplers know."""


Level: TypeAlias = float | Tensor
"""A noise level sigma or a signal scale alpha: one for all samples, or one for each."""


class Model(Protocol):
    """A network: scaled scores of noisy samples x (B, *dims) at sigma, a float or (B,)."""

    def __call__(self, x: Tensor, sigma: Tensor | float, /) -> Scores: ...


ScoreFn: TypeAlias = Callable[[Tensor], AnyScores]
"""Maps points x (B, *dims) to their scores, each row by itself."""

LogDensity: TypeAlias = Callable[[Tensor], Tensor]
"""Maps points x (B, *dims) to log p(x), shape (B,); a constant may be missing."""


def score_of(scores: AnyScores) -> Tensor:
    """s1 of what a score function returned."""
    return scores if isinstance(scores, Tensor) else scores.score


def model_scores(where: str, model: Model, x: Tensor, sigma: Tensor | float) -> Scores:
    """What `model(x, sigma)` returns: `Scores` whose scaled_score is like x."""
    scores = model(x, sigma)
    if not isinstance(scores, Scores):
        raise TypeError(f"{where}: model must return Scores, got {type(scores).__name__}")
    check_like(where, "scaled_score from model", scores.scaled_score, x)
    return scores


def scaled_factor(where: str, factor: Tensor | None, like: Tensor, times: Tensor) -> Tensor | None:
    """factor times a value of `positive`."""
    if factor is None:
        return None
    check_tensor(where, "factor", factor, like=like)
    return factor * times.reshape(-1, 1, 1)


# ------------------------------------------------------------------------------ Tweedie's formula
#
# With x = alpha x0 + sigma z. Here for plain tensors, because `hos_ext.densities` stands on words
# alone; `hos_ext.tweedie.posterior` has them for matrices that are never formed.


def tweedie_mean(x: Tensor, score: Tensor, sigma: Level, alpha: Level) -> Tensor:
    """E[x0 | x] = (x + sigma^2 s1) / alpha. The levels broadcast against x.

    Example:
        >>> import torch
        >>> tweedie_mean(torch.tensor([[2.0]]), torch.tensor([[-0.25]]), 2.0, 1.0)
        tensor([[1.]])
    """
    return (x + sigma**2 * score) / alpha


def tweedie_covariance(
    hessian: Tensor, identity: float | Tensor, sigma: Level, alpha: Level
) -> Tensor:
    """Cov[x0 | x] = (sigma / alpha)^2 (I + sigma^2 s2).

    Args:
        hessian: s2 as a matrix, or its diagonal, or v^T s2 v along directions v.
        identity: I in the same form: a matrix, 1, or |v|^2.
        sigma, alpha: the levels, shaped to broadcast.

    Example:
        >>> import torch
        >>> tweedie_covariance(torch.tensor([-0.125]), 1.0, 2.0, 1.0)
        tensor([2.])
    """
    return (sigma / alpha) ** 2 * (identity + sigma**2 * hessian)
