"""Symmetric operators in one interface: dense matrices, rows of any operator, Hessians of scores.

`SymmetricOperator` (in `hos_ext.scores`) is what all of them answer. `DPLR` and `ScoreHessian` meet
it themselves; `DenseOperator` wraps a matrix, `BatchRows` a part of the batch of another operator.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from ..checks import check, check_shape, check_tensor, kind_name, rows_at
from ..scores import DenseScores, MatrixFreeScores, SymmetricOperator, UnscaledScores
from .dplr import DPLR


class DenseOperator:
    """A batch of dense symmetric matrices as a `SymmetricOperator`.

    Args:
        matrix: shape (B, D, D), float32 or float64. That it is symmetric is not checked.

    Raises:
        TypeError: matrix is not a Tensor.
        ValueError: it has another shape or dtype.

    Example:
        >>> import torch
        >>> operator = DenseOperator(torch.tensor([[[2.0, 1.0], [1.0, 3.0]]]))
        >>> operator.matvec(torch.tensor([[1.0, 0.0]]))
        tensor([[2., 1.]])
        >>> operator.diagonal()
        tensor([[2., 3.]])
    """

    def __init__(self, matrix: Tensor):
        check_matrix("DenseOperator", matrix)
        self.matrix = matrix

    @classmethod
    def of(cls, matrix: Tensor) -> DenseOperator:
        """The same for a matrix that has been checked."""
        operator = cls.__new__(cls)
        operator.matrix = matrix
        return operator

    @property
    def shape(self) -> torch.Size:
        """(B, D, D)."""
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return self.matrix.device

    def matvec(self, v: Tensor) -> Tensor:
        """The product with v. v and the result: shape (B, D) or (B, D, k)."""
        check_vectors("DenseOperator.matvec", v, self)
        return (self.matrix @ v.unsqueeze(-1)).squeeze(-1) if v.dim() == 2 else self.matrix @ v

    def diagonal(self) -> Tensor:
        """The diagonal. Shape (B, D)."""
        return self.matrix.diagonal(dim1=1, dim2=2)

    def dense(self) -> Tensor:
        """The matrix itself. Shape (B, D, D)."""
        return self.matrix

    def rows(self, index: Tensor | slice) -> DenseOperator:
        """The matrices of these samples of the batch."""
        return DenseOperator.of(rows_at("DenseOperator.rows", self.matrix, index))


class BatchRows:
    """Some rows of an operator whose products must go through the whole batch.

    A score function sees all of its batch or nothing, since it may hold one noise level for each
    row. The product with some rows is therefore the product with all rows, the others zero.

    Args:
        whole: the operator of the whole batch.
        index: the rows to keep: a slice or an int64 tensor.

    Example:
        >>> import torch
        >>> whole = DenseOperator(torch.tensor([[[2.0]], [[3.0]]]))
        >>> BatchRows(whole, slice(1, 2)).matvec(torch.ones(1, 1))
        tensor([[3.]])
    """

    def __init__(self, whole: SymmetricOperator, index: Tensor | slice):
        where, kind = "BatchRows", type(whole).__name__
        rule = "whole must be a SymmetricOperator"
        try:
            count, device = whole.shape[0], whole.device
        except (AttributeError, TypeError, IndexError):
            raise TypeError(f"{where}: {rule}, got {kind}") from None
        self.whole = whole
        self.index = rows_at(where, torch.arange(count, device=device), index)

    @property
    def shape(self) -> torch.Size:
        """(n, D, D) for n rows."""
        return torch.Size((len(self.index), *self.whole.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return self.whole.dtype

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return self.whole.device

    def matvec(self, v: Tensor) -> Tensor:
        """The product with v. v and the result: shape (n, D) or (n, D, k)."""
        check_vectors("BatchRows.matvec", v, self)
        padded = v.new_zeros((self.whole.shape[0], *v.shape[1:]))
        padded[self.index] = v
        return self.whole.matvec(padded)[self.index]

    def diagonal(self) -> Tensor:
        """The diagonal. Shape (n, D)."""
        return self.whole.diagonal()[self.index]

    def dense(self) -> Tensor:
        """The matrices themselves. Shape (n, D, D)."""
        return self.whole.dense()[self.index]

    def rows(self, index: Tensor | slice) -> BatchRows:
        """The matrices of these rows among the rows."""
        return BatchRows(self.whole, rows_at("BatchRows.rows", self.index, index))


def as_operator(where: str, matrix: SymmetricOperator | Tensor) -> SymmetricOperator:
    """An operator as it is, a dense matrix (B, D, D) wrapped. where: the function in errors."""
    if isinstance(matrix, SymmetricOperator):
        return matrix
    check_matrix(where, matrix)
    return DenseOperator.of(matrix)


def check_vectors(where: str, v: Tensor, matrix: SymmetricOperator) -> None:
    """(B, D) or (B, D, k), in the dtype and on the device of a matrix (B, D, D)."""
    check_tensor(where, "v", v)
    check_shape(where, "v", v, tuple(matrix.shape[:2]), (*matrix.shape[:2], "k"))
    check(where, v.dtype == matrix.dtype, f"v must have dtype {matrix.dtype}", v.dtype)
    check(where, v.device == matrix.device, f"v must be on {matrix.device}", v.device)


def check_matrix(where: str, matrix: Tensor) -> None:
    """Refuse what is not (B, D, D), float32 or float64."""
    check_tensor(where, "matrix", matrix)
    if matrix.dim() != 3 or matrix.shape[1] != matrix.shape[2]:
        raise ValueError(f"{where}: matrix must have shape (B, D, D), got {tuple(matrix.shape)}")


@singledispatch
def hessian_of(scores: object) -> SymmetricOperator | None:
    """s2 as an operator, from whatever a score function returned; None where it returned s1 alone.

    Operators of all containers are made here, and a new container joins by `hessian_of.register`.
    What is checked of each as a chain walks, `hos_ext.sampling` knows itself.

    Args:
        scores: s1 (B, *dims), `UnscaledScores`, `DenseScores` or `MatrixFreeScores`.

    Returns:
        A `SymmetricOperator` (B, D, D), units 1/data^2, or None.

    Raises:
        TypeError: scores is of another kind.

    Example:
        >>> import torch
        >>> from hos_ext import UnscaledScores
        >>> hessian_of(UnscaledScores(torch.zeros(1, 2), torch.tensor([[-1.0, -2.0]]))).diagonal()
        tensor([[-1., -2.]])
    """
    raise TypeError(f"hessian_of: scores must hold scores, got {kind_name(scores)}")


@hessian_of.register(Tensor)
def _(scores: Tensor) -> None:
    return None


@hessian_of.register(UnscaledScores)
def _(scores: UnscaledScores) -> DPLR:
    return DPLR.of(scores.diag.flatten(1), scores.factor, scores.sign)


@hessian_of.register(DenseScores)
def _(scores: DenseScores) -> DenseOperator:
    return DenseOperator.of(scores.hessian)


@hessian_of.register(MatrixFreeScores)
def _(scores: MatrixFreeScores) -> SymmetricOperator:
    return scores.hessian
