"""Functions of batched symmetric matrices applied to vectors, without D x D where that is possible.

`isotropic_spectrum` is exact for c I + U diag(sign) U^T through an r x r eigenproblem;
`dense_spectrum` is the eigen-decomposition of a dense matrix; `lanczos` serves every other matrix,
from products alone, to a tolerance, and says how well it did.
A row (sample) with NaN or inf gives NaN in that row and leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check, check_tensor, per_sample, said_by
from ..records import RowRecord, unusual
from ..scores import SymmetricOperator
from .derivatives import (
    Change,
    attach,
    attach_values,
    change_of_product,
    dense_change,
    derivative_wanted,
    low_rank_change,
    shifted_change,
    without_derivative,
)
from .dplr import DPLR
from .operator import as_operator
from .woodbury import low_rank_eigh

Function = Callable[[Tensor], Tensor]  # of eigenvalues, elementwise
Matvec = Callable[[Tensor], Tensor]  # (n, D) -> (n, D)
MatvecOfRows = Callable[[slice | Tensor], Matvec]  # an index of the batch -> their matvec

_SYMMETRY = {torch.float32: 1e-5, torch.float64: 1e-10}  # allowed asymmetry over largest entry
_SPREAD = 8  # allowed spread of a constant diagonal, in machine epsilons


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum(RowRecord):
    """Q diag(values) Q^T + rest (I - Q Q^T) for each sample of a batch.

    Attributes:
        basis: Q, orthonormal columns. Shape (B, D, m).
        values: the eigenvalues of these columns. Shape (B, m).
        rest: the other D - m eigenvalues, all equal. Shape (B,); None where m = D.

    Example:
        >>> import torch
        >>> from hos_ext.linalg import Spectrum, spectrum_apply
        >>> axis = torch.tensor([[[1.0], [0.0]]])
        >>> spectrum = Spectrum(axis, torch.tensor([[4.0]]), torch.ones(1))
        >>> spectrum_apply(spectrum, torch.sqrt, torch.ones(1, 2))
        tensor([[2., 1.]])
    """

    basis: Tensor
    values: Tensor
    rest: Tensor | None

    def _summary(self) -> str:
        batch, size, columns = self.basis.shape
        return ", ".join([f"B={batch}, D={size}, m={columns}", *unusual(self.basis)])


@dataclass(frozen=True, eq=False, repr=False)
class _Derived(Spectrum):
    """A spectrum of a matrix that is differentiated, with the change of that matrix.

    What is made of it, as its rows, is a plain spectrum: its basis refuses gradients.
    """

    change: Change

    def _names(self) -> tuple[str, ...]:
        return "basis", "values", "rest"

    def replace(self, **changes: Any) -> Spectrum:  # type: ignore[override]
        return Spectrum(self.basis, self.values, self.rest).replace(**changes)


def dense_spectrum(matrix: Tensor, *, where: str = "dense_spectrum") -> Spectrum:
    """Eigenvalues and eigenvectors of dense symmetric matrices.

    Args:
        matrix: shape (B, D, D), D >= 1. float32 or float64. Symmetric to 1e-5 (float32) or 1e-10
            (float64) of its largest entry; the symmetric part is used.
        where: the function named in errors.

    Returns:
        Spectrum with m = D. NaN values for a sample that is not finite. Derivatives as
        `spectrum_apply` says; basis by itself has none.

    Raises:
        TypeError: matrix is not a Tensor.
        ValueError: it has another shape or dtype, or is not symmetric.
        RuntimeError: on a gradient of basis (forward mode gives NaN).

    Example:
        >>> import torch
        >>> from hos_ext.linalg.spectrum import dense_spectrum
        >>> dense_spectrum(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])).values
        tensor([[1., 3.]])
    """
    check_tensor(where, "matrix", matrix)
    check(where, not matrix.is_meta, "matrix must hold values", "a meta tensor")
    square = matrix.dim() == 3 and matrix.shape[1] == matrix.shape[2] > 0
    check(where, square, "matrix must have shape (B, D, D), D >= 1", tuple(matrix.shape))
    usable, finite = check_symmetric(where, matrix)
    even = usable / 2 + usable.mT / 2
    values, basis = torch.linalg.eigh(even.detach())
    values = values.where(finite.unsqueeze(-1), torch.nan)
    if not derivative_wanted(matrix):
        return Spectrum(basis, values, None)
    change = dense_change(where, even)
    values = attach_values(values, basis, change)
    return _Derived(without_derivative(where, basis, even), values, None, change)


def check_symmetric(where: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse matrices (B, D, D) that are not symmetric.

    Args:
        where: the function named in errors.
        matrix: shape (B, D, D), float32 or float64.

    Returns:
        The matrices with 0 in place of those that are not finite, and which are finite (B,).

    Raises:
        ValueError: a difference beyond 1e-5 (float32) or 1e-10 (float64) of the largest entry.

    Example:
        >>> import torch
        >>> from hos_ext.linalg.spectrum import check_symmetric
        >>> check_symmetric("f", torch.eye(2).unsqueeze(0))[1]
        tensor([True])
    """
    finite = matrix.isfinite().all(-1).all(-1)
    usable = matrix.where(finite[:, None, None], 0.0)
    difference = (usable - usable.mT).abs().amax((-1, -2))
    bad = difference > _SYMMETRY[matrix.dtype] * usable.abs().amax((-1, -2))
    _refuse(where, bad, "matrix must be symmetric", "difference", difference)
    return usable, finite


def _refuse(where: str, bad: Tensor, rule: str, what: str, sizes: Tensor) -> None:
    """Raises where a sample is bad, with its size and number."""
    check(
        where,
        not bool(bad.any()),
        rule,
        lambda: f"a {what} of {sizes[bad][0].item():.3g} for sample {int(bad.nonzero()[0])}",
    )


def isotropic_spectrum(
    diag: Tensor,
    factor: Tensor | None,
    *,
    sign: Tensor | None = None,
    where: str = "isotropic_spectrum",
) -> Spectrum:
    """Eigenvalues and eigenvectors of c I + U diag(sign) U^T: c + mu on the columns of U, else c.

    With U = Q R these are those of the r x r matrix R diag(sign) R^T (any rank, r > D too).

    Args:
        diag: c, repeated. Shape (B, D), D >= 1. float32 or float64.
        factor: U. Shape (B, D, r), same dtype and device; None is r = 0.
        sign: +-1 for each column. Shape (r,); None is all +1.
        where: the function named in errors.

    Returns:
        Spectrum with m = min(D, r). NaN values and rest for a sample that is not finite, or whose
        U U^T overflows. Derivatives as `spectrum_apply` says; basis by itself has none.

    Raises:
        TypeError: an argument is not a Tensor.
        ValueError: diag is not constant within a sample (8 machine epsilons are allowed), or the
            arguments do not make a DPLR.
        RuntimeError: on a gradient of basis (forward mode gives NaN).

    Example:
        >>> import torch
        >>> from hos_ext.linalg.spectrum import isotropic_spectrum
        >>> spectrum = isotropic_spectrum(torch.ones(1, 3), torch.tensor([[[2.0], [0.0], [0.0]]]))
        >>> spectrum.values, spectrum.rest
        (tensor([[5.]]), tensor([1.]))
    """
    with said_by(where, "DPLR"):
        matrix = DPLR(diag, factor, sign)
    finite = diag.isfinite().all(-1) & matrix.factor.square().sum((-1, -2)).isfinite()
    level = diag.where(finite.unsqueeze(-1), 0.0)
    spread = level.amax(-1) - level.amin(-1)
    bad = spread > _SPREAD * torch.finfo(diag.dtype).eps * level.abs().amax(-1)
    _refuse(where, bad, "diag must be constant within each sample", "spread", spread)
    columns = matrix.factor.where(finite[:, None, None], 0.0)
    basis, mu = low_rank_eigh(columns.detach(), matrix.parts.sign)
    rest = level[:, 0].where(finite, torch.nan)
    values = rest.detach().unsqueeze(-1) + mu
    whole = mu.shape == diag.shape
    if not derivative_wanted(diag, columns):
        return Spectrum(basis, values, None if whole else rest)
    change = low_rank_change(where, columns, matrix.parts.sign)
    change = shifted_change(where, change, rest)
    values = attach_values(values, basis, change)
    basis = without_derivative(where, basis, columns)
    return _Derived(basis, values, None if whole else rest, change)


def spectrum_apply(spectrum: Spectrum, function: Function, v: Tensor) -> Tensor:
    """f(A) v = f(c) v + Q ((f(c + mu) - f(c)) * Q^T v) for v (B, D); Q f(values) Q^T v if m = D.

    Args:
        spectrum: of A.
        function: f, elementwise. It sees (B, m), then (B, 1): per-sample parameters are (B, 1).
        v: shape (B, D).

    Returns:
        Shape (B, D). Differentiable in v, in the parameters of f, and once in the matrix, in
        reverse and in forward mode, wherever f is smooth: also where eigenvalues are equal.

    Raises:
        RuntimeError: on a second derivative in the matrix.

    Example:
        >>> import torch
        >>> from hos_ext.linalg.spectrum import isotropic_spectrum, spectrum_apply
        >>> spectrum = isotropic_spectrum(torch.ones(1, 2), torch.tensor([[[2.0], [0.0]]]))
        >>> spectrum_apply(spectrum, lambda y: y.square(), torch.ones(1, 2))
        tensor([[25.,  1.]])
    """
    basis, values, rest = spectrum.basis, spectrum.values, spectrum.rest
    if isinstance(spectrum, _Derived):
        basis, values = basis.detach(), values.detach()
        rest = None if rest is None else rest.detach()
        value = spectrum_apply(Spectrum(basis, values, rest), function, v)
        columns = v.unsqueeze(-1)
        change = change_of_product(basis, values, rest, spectrum.change, function, columns)
        return attach(value, change.squeeze(-1))
    weight = function(values)
    projected = basis.mT @ v.unsqueeze(-1)
    if rest is None:
        return (basis @ (weight.unsqueeze(-1) * projected)).squeeze(-1)
    common = function(rest.unsqueeze(-1))
    return common * v + (basis @ ((weight - common).unsqueeze(-1) * projected)).squeeze(-1)


def spectrum_logdet(spectrum: Spectrum, function: Function) -> Tensor:
    """log det f(A) = sum log f over all D eigenvalues, f as in `spectrum_apply`.

    Returns:
        Shape (B,). -inf where an f is zero, NaN where one is negative.

    Example:
        >>> import torch
        >>> from hos_ext.linalg.spectrum import isotropic_spectrum, spectrum_logdet
        >>> spectrum = isotropic_spectrum(torch.ones(1, 2), torch.tensor([[[2.0], [0.0]]]))
        >>> spectrum_logdet(spectrum, torch.exp)
        tensor([6.])
    """
    basis, values, rest = spectrum.basis, spectrum.values, spectrum.rest
    total = function(values).log().sum(-1)
    if rest is None:
        return total
    return total + (basis.shape[1] - basis.shape[2]) * function(rest.unsqueeze(-1)).log().squeeze(1)


def matrix_rows(matrix: SymmetricOperator | Tensor, scale: float | Tensor = 1.0) -> MatvecOfRows:
    """The products of `lanczos` for scale * matrix.

    Args:
        matrix: any operator, of which D x D is formed neither here nor later; or a dense matrix
            (B, D, D), whose symmetry is not checked (`dense_spectrum` does that).
        scale: float or (B,), finite; the step size of an Ozaki step.

    Returns:
        A function that maps an index of the batch to the product with these rows.

    Raises:
        TypeError: matrix or scale has a wrong type.
        ValueError: their shapes or dtypes are wrong, or scale is not finite.

    Example:
        >>> import torch
        >>> from hos_ext.linalg import DPLR
        >>> from hos_ext.linalg.spectrum import matrix_rows
        >>> rows = matrix_rows(DPLR(torch.ones(3, 2)), torch.tensor([1.0, 2.0, 3.0]))
        >>> rows(slice(1, None))(torch.ones(2, 2))
        tensor([[2., 2.],
                [3., 3.]])
    """
    operator = as_operator("matrix_rows", matrix)
    like = torch.empty((), dtype=operator.dtype, device=operator.device).expand(operator.shape[:2])
    column = per_sample("matrix_rows", "scale", scale, like)

    def rows_of(rows: slice | Tensor) -> Matvec:
        part = operator.rows(rows)
        times = column if column.dim() == 0 else column[rows]
        return lambda v: times * part.matvec(v)

    return rows_of
