"""The values that networks and densities return, and the protocols that they meet.

The words of the package: everything else speaks in them and none of them imports a room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .checks import (
    check,
    check_callable,
    check_like,
    check_low_rank,
    check_tensor,
    kind_name,
    positive,
)
from .records import RowRecord, sizes


@dataclass(frozen=True, eq=False, repr=False)
class Scores(RowRecord):
    """What a network returns at noise level sigma, in scaled quantities (all of order one).

    Attributes:
        scaled_score: sigma * s1. Shape (B, *dims).
        c: 1 + sigma^2 * diag, the diagonal part of alpha^2 Cov[x0 | x] / sigma^2. Shape (B, *dims).
        factor: sigma * U with s2 = diag + U diag(sign) U^T. Shape (B, D, r), D in row-major order
            of dims; None is rank 0.
        sign: +1 or -1 for each column of factor. Shape (r,); None is all +1.

    Example:
        >>> import torch
        >>> from hos_ext import Scores
        >>> scores = Scores(scaled_score=torch.tensor([[-1.0]]), c=torch.tensor([[0.5]]))
        >>> scores.unscaled(sigma=2.0).diag
        tensor([[-0.1250]])
    """

    scaled_score: Tensor
    c: Tensor
    factor: Tensor | None = None
    sign: Tensor | None = None

    def _summary(self) -> str:
        return sizes(self.scaled_score, _rank(self.factor))

    def unscaled(self, sigma: float | Tensor) -> UnscaledScores:
        """s1, the diagonal of s2 and U.

        Args:
            sigma: noise standard deviation, units of the data. float or (B,), > 0.

        Raises:
            ValueError: shapes, dtypes or devices disagree, or sigma is not positive.
        """
        where, score = "Scores.unscaled", self.scaled_score
        check_tensor(where, "scaled_score", score)
        check_tensor(where, "c", self.c, like=score, shape=tuple(score.shape))
        s = positive(where, "sigma", sigma, score)
        check_low_rank(where, self.factor, self.sign, score)
        factor = None if self.factor is None else self.factor * (1 / s).reshape(-1, 1, 1)
        return UnscaledScores(score / s, (self.c - 1) / s.square(), factor, self.sign)


@dataclass(frozen=True, eq=False, repr=False)
class UnscaledScores(RowRecord):
    """The scores themselves.

    Attributes:
        score: s1. Shape (B, *dims). Units 1/data.
        diag: d with s2 = diag(d) + U diag(sign) U^T. Shape (B, *dims). Units 1/data^2.
        factor: U. Shape (B, D, r), D in row-major order of dims; None is rank 0. Units 1/data.
        sign: +1 or -1 for each column of factor. Shape (r,); None is all +1.

    Example:
        >>> import torch
        >>> from hos_ext import UnscaledScores
        >>> scores = UnscaledScores(torch.tensor([[-0.5]]), torch.tensor([[-0.125]]))
        >>> scores.scaled(sigma=2.0).c
        tensor([[0.5000]])
    """

    score: Tensor
    diag: Tensor
    factor: Tensor | None = None
    sign: Tensor | None = None

    def _summary(self) -> str:
        return sizes(self.score, _rank(self.factor))

    def scaled(self, sigma: float | Tensor) -> Scores:
        """sigma s1, 1 + sigma^2 diag, sigma U.

        Args:
            sigma: noise standard deviation, units of the data. float or (B,), > 0.

        Raises:
            ValueError: shapes, dtypes or devices disagree, or sigma is not positive.
        """
        where = "UnscaledScores.scaled"
        check_tensor(where, "score", self.score)
        check_tensor(where, "diag", self.diag, like=self.score, shape=tuple(self.score.shape))
        s = positive(where, "sigma", sigma, self.score)
        check_low_rank(where, self.factor, self.sign, self.score)
        factor = None if self.factor is None else self.factor * s.reshape(-1, 1, 1)
        return Scores(self.score * s, 1 + self.diag * s.square(), factor, self.sign)


@dataclass(frozen=True, eq=False, repr=False)
class DenseScores(RowRecord):
    """The scores themselves with the whole Hessian, for small D or an analytic density.

    Attributes:
        score: s1. Shape (B, *dims). Units 1/data.
        hessian: s2, symmetric. Shape (B, D, D), D in row-major order of dims. Units 1/data^2.

    Example:
        >>> import torch
        >>> from hos_ext.densities import Gaussian
        >>> from hos_ext.scores import DenseScores
        >>> law, x = Gaussian(torch.zeros(2), torch.eye(2)), torch.ones(3, 2)
        >>> DenseScores(law.score(x), law.hessian(x)).hessian.shape
        torch.Size([3, 2, 2])
    """

    score: Tensor
    hessian: Tensor

    def _summary(self) -> str:
        return sizes(self.score)


@runtime_checkable
class SymmetricOperator(Protocol):
    """A batch of symmetric matrices (B, D, D), known by what they answer.

    `DPLR`, `ScoreHessian` and `DenseOperator` of `hos_ext.linalg` are such operators, and any class
    with these members is one.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR
        >>> isinstance(DPLR(torch.ones(1, 2)), SymmetricOperator)
        True
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


@dataclass(frozen=True, eq=False, repr=False)
class MatrixFreeScores(RowRecord):
    """Scores whose Hessian is known by its products alone, for `sample(method="ozaki_lanczos")`.

    Attributes:
        score: s1. Shape (B, *dims). Units 1/data.
        hessian: s2 at the same points, symmetric. Shape (B, D, D). Units 1/data^2.

    Example:
        >>> import torch
        >>> from hos_ext.linalg import ScoreHessian
        >>> from hos_ext.scores import MatrixFreeScores
        >>> def score_fn(x):
        ...     hessian = ScoreHessian(lambda x: -x, x, symmetrize=True, check=False)
        ...     return MatrixFreeScores(hessian.score, hessian)
        >>> score_fn(torch.ones(1, 2)).score
        tensor([[-1., -1.]])
    """

    score: Tensor
    hessian: SymmetricOperator

    def _summary(self) -> str:
        return sizes(self.score, type(self.hessian).__name__)


def _rank(factor: Tensor | None) -> str:
    return f"rank {factor.shape[-1] if isinstance(factor, Tensor) else 0}"


AnyScores: TypeAlias = Tensor | UnscaledScores | DenseScores | MatrixFreeScores
"""s1 alone, or with the Hessian in one of the three forms that samplers know."""


def score_of(score: AnyScores) -> Tensor:
    """s1 itself, of what holds it. Anything else as it is, for the check that follows: `Scores`
    hold sigma s1, and are refused there.

    Example:
        >>> import torch
        >>> from hos_ext import UnscaledScores
        >>> from hos_ext.scores import score_of
        >>> score_of(UnscaledScores(torch.tensor([[2.0]]), torch.tensor([[-1.0]])))
        tensor([[2.]])
    """
    if isinstance(score, (UnscaledScores, DenseScores, MatrixFreeScores)):
        return score.score
    return score


Level: TypeAlias = float | Tensor
"""A noise level sigma or a signal scale alpha: one for all samples, or one for each."""


class Model(Protocol):
    """A network: scaled scores of noisy samples x (B, *dims) at sigma, a float or (B,).

    A conditional one is called as `model(x, sigma, **model_kwargs)` (see `hos_ext.conditions`).

    Example:
        >>> import torch
        >>> from hos_ext import Scores, posterior
        >>> def model(x, sigma):  # the exact scores of data from N(0, I)
        ...     c = torch.full_like(x, 1 / (1 + sigma**2))
        ...     return Scores(-sigma * x / (1 + sigma**2), c)
        >>> posterior(torch.ones(1, 2), model(torch.ones(1, 2), 1.0), 1.0).mean
        tensor([[0.5000, 0.5000]])
    """

    def __call__(self, x: Tensor, sigma: Tensor | float, /) -> Scores: ...


ScoreModel: TypeAlias = Callable[..., Tensor | Scores]
"""A first-order network: maps x (B, *dims) and sigma, a float or (B,), to its score, as x, or
`Scores`. A conditional one takes its conditions by name besides."""

FirstOrderScore: TypeAlias = Callable[[Tensor], Tensor]
"""Maps points x (B, *dims) to s1, as x, each row by itself."""

ScoreFn: TypeAlias = Callable[[Tensor], AnyScores]
"""Maps points x (B, *dims) to their scores, each row by itself."""

LogDensity: TypeAlias = Callable[[Tensor], Tensor]
"""Maps points x (B, *dims) to log p(x), shape (B,); a constant may be missing."""


def model_scores(
    where: str,
    model: Model,
    x: Tensor,
    sigma: Tensor | float,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Scores:
    """What `model(x, sigma)` returns: `Scores` whose scaled_score is like x.

    Args:
        where: the function named in errors.
        model: the network.
        x: noisy samples. Shape (B, *dims).
        sigma: noise standard deviation, as the model takes it.
        model_kwargs: conditions of the model, checked.

    Raises:
        TypeError: the model returned something else.
        ValueError: scaled_score has another shape, dtype or device than x.

    Example:
        >>> import torch
        >>> from hos_ext import Scores
        >>> from hos_ext.scores import model_scores
        >>> x = torch.ones(1, 2)
        >>> model_scores("f", lambda x, sigma: Scores(-x, x), x, torch.tensor(1.0)).scaled_score
        tensor([[-1., -1.]])
    """
    check_callable(where, "model", model)
    conditional: Callable[..., Scores] = model
    scores = conditional(x, sigma, **(model_kwargs or {}))
    good = isinstance(scores, Scores)
    check(where, good, "model must return Scores", lambda: kind_name(scores), TypeError)
    check_like(where, "scaled_score from model", scores.scaled_score, x)
    return scores


# ------------------------------------------------------------------------------ Tweedie's formula
#
# With x = alpha x0 + sigma z. Here for plain tensors, because `hos_ext.densities` stands on words
# alone; `hos_ext.tweedie.posterior` has them for matrices that are never formed.


def tweedie_mean(x: Tensor, score: Tensor, sigma: Level, alpha: Level) -> Tensor:
    """E[x0 | x] = (x + sigma^2 s1) / alpha. The levels broadcast against x.

    Example:
        >>> import torch
        >>> from hos_ext.scores import tweedie_mean
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
        >>> from hos_ext.scores import tweedie_covariance
        >>> tweedie_covariance(torch.tensor([-0.125]), 1.0, 2.0, 1.0)
        tensor([2.])
    """
    return (sigma / alpha) ** 2 * (identity + sigma**2 * hessian)
