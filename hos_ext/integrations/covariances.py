"""Diagonal plus low-rank matrices of other libraries: linear_operator (of GPyTorch), azula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check, check_kind, kind_name, require
from ..linalg.dplr import DPLR, check_whole


def to_linear_operator(matrix: DPLR) -> Any:
    """A DPLR as a linear operator of the package linear_operator.

    Args:
        matrix: (B, D, D).

    Returns:
        `LowRankRootAddedDiagLinearOperator`, which solves through r x r matrices as a DPLR does;
        a `DiagLinearOperator` where the rank is 0. Columns of sign -1 have no such class: what they
        make is subtracted, and solves go by Cholesky or conjugate gradients. Shape (B, D, D).

    Raises:
        TypeError: matrix is not a DPLR.
        RuntimeError: linear_operator is missing (pip install hos_ext[adapters]).

    Example:
        >>> import torch
        >>> from hos_ext import DPLR
        >>> from hos_ext.integrations import to_linear_operator
        >>> matrix = DPLR(torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0], [1.0]]]))
        >>> to_linear_operator(matrix).to_dense()
        tensor([[[2., 1.],
                 [1., 3.]]])
    """
    where = "to_linear_operator"
    check_kind(where, "matrix", matrix, DPLR)
    check_whole(where, "matrix", matrix)
    operators = require(where, "linear_operator.operators")
    found = operators.DiagLinearOperator(matrix.diag)
    plus, minus = _by_sign(matrix)
    if plus.shape[-1]:
        root = operators.LowRankRootLinearOperator(plus)
        found = operators.LowRankRootAddedDiagLinearOperator(root, found)
    return found if minus.shape[-1] == 0 else found - operators.LowRankRootLinearOperator(minus)


def from_linear_operator(operator: Any) -> DPLR:
    """A linear operator of the package linear_operator, where it is diagonal plus low rank.

    Args:
        operator: a `LowRankRootAddedDiagLinearOperator` or another diagonal plus the square of a
            root, or one of the two alone. Shape (B, D, D), or (D, D), which is a batch of one.

    Raises:
        TypeError: operator is of another kind.
        ValueError: it has another shape.
        RuntimeError: linear_operator is missing.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR
        >>> from hos_ext.integrations import from_linear_operator, to_linear_operator
        >>> matrix = DPLR(torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0], [1.0]]]))
        >>> from_linear_operator(to_linear_operator(matrix)).dense()
        tensor([[[2., 1.],
                 [1., 3.]]])
    """
    where = "from_linear_operator"
    operators = require(where, "linear_operator.operators")
    diagonal, root = operators.DiagLinearOperator, operators.RootLinearOperator
    parts = (operator,)
    if isinstance(operator, operators.AddedDiagLinearOperator):
        parts = operator.linear_ops
    fine = all(isinstance(part, (diagonal, root)) for part in parts)
    rule = "operator must be a diagonal plus a root: LowRankRootAddedDiagLinearOperator"
    check(where, fine, rule, lambda: _names(operator), TypeError)
    rule, shape = "operator must have shape (D, D) or (B, D, D)", tuple(operator.shape)
    check(where, len(shape) in (2, 3), rule, shape)
    batch, size = (1 if len(shape) == 2 else shape[0]), shape[-1]
    diag, factor = torch.zeros((), dtype=operator.dtype, device=operator.device), None
    for part in parts:
        if isinstance(part, diagonal):
            diag = part.diagonal()
        else:
            value = part.root.to_dense()
            factor = value.expand(batch, *value.shape[-2:])
    return DPLR(diag.expand(batch, size).contiguous(), factor)


def to_azula(matrix: DPLR, dims: Sequence[int] | None = None) -> Any:
    """The DPLR of one sample as a covariance of azula.

    Args:
        matrix: (1, D, D): azula's classes hold one matrix for all samples. `matrix[3]` takes one of
            a batch.
        dims: shape of a sample, of D entries; None is (D,).

    Returns:
        `DPLRCovariance` where all signs are +1, `DMLRCovariance` where all are -1,
        `DiagonalCovariance` where the rank is 0.

    Raises:
        TypeError: matrix is not a DPLR.
        ValueError: matrix holds another number of samples, dims another number of entries, or signs
            are mixed, for which azula has no class.
        RuntimeError: azula is missing (pip install hos_ext[adapters]).

    Example:
        >>> import torch
        >>> from hos_ext import DPLR
        >>> from hos_ext.integrations import to_azula
        >>> matrix = DPLR(torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0], [1.0]]]))
        >>> to_azula(matrix) @ torch.tensor([1.0, 0.0])  # doctest: +SKIP
        tensor([2., 1.])
    """
    where = "to_azula"
    check_kind(where, "matrix", matrix, DPLR)
    check_whole(where, "matrix", matrix)
    rule = "matrix must hold one sample (matrix[0] takes one)"
    check(where, len(matrix) == 1, rule, len(matrix))
    size = matrix.diag.shape[1]
    shape = (size,) if dims is None else tuple(dims)
    check(where, math.prod(shape) == size, f"dims must have {size} entries", shape)
    covariance = require(where, "azula.linalg.covariance")
    diag = matrix.diag[0].reshape(shape)
    plus, minus = (part[0].reshape(*shape, -1) for part in _by_sign(matrix))
    mixed = plus.shape[-1] and minus.shape[-1]
    check(where, not mixed, "signs of matrix must be equal", lambda: matrix.parts.sign.tolist())
    if minus.shape[-1]:
        return covariance.DMLRCovariance(diag, minus)
    return (
        covariance.DPLRCovariance(diag, plus)
        if matrix.rank
        else (covariance.DiagonalCovariance(diag))
    )


def from_azula(covariance: Any) -> DPLR:
    """A covariance of azula as a DPLR, of one sample with flattened entries.

    Args:
        covariance: `DPLRCovariance`, `DMLRCovariance` or `DiagonalCovariance`.

    Returns:
        DPLR (1, D, D).

    Raises:
        TypeError: covariance is of another kind: an isotropic one does not know its size, a full
            one has no low rank.
        RuntimeError: azula is missing.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR
        >>> from hos_ext.integrations import from_azula, to_azula
        >>> from_azula(to_azula(DPLR(torch.tensor([[1.0, 2.0]])))).dense()  # doctest: +SKIP
        tensor([[[1., 0.],
                 [0., 2.]]])
    """
    where = "from_azula"
    module = require(where, "azula.linalg.covariance")
    kinds = (module.DPLRCovariance, module.DMLRCovariance, module.DiagonalCovariance)
    check_kind(where, "covariance", covariance, kinds)
    diag = covariance.D.reshape(1, -1)
    if isinstance(covariance, module.DiagonalCovariance):
        return DPLR(diag)
    factor = covariance.V.reshape(1, diag.shape[1], -1)
    minus = isinstance(covariance, module.DMLRCovariance)
    return DPLR(diag, factor, -diag.new_ones(factor.shape[-1]) if minus else None)


def _by_sign(matrix: DPLR) -> tuple[Tensor, Tensor]:
    """The columns of sign +1 and those of sign -1. Shape (B, D, r) each."""
    negative = matrix.parts.sign < 0
    return matrix.factor[..., ~negative], matrix.factor[..., negative]


def _names(operator: Any) -> str:
    """The class of an operator, with those of its parts."""
    parts = [type(part).__name__ for part in getattr(operator, "linear_ops", ())]
    return f"{kind_name(operator)} of {', '.join(parts)}" if parts else kind_name(operator)
