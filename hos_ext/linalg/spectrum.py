"""Functions of batched symmetric matrices applied to vectors, without D x D where that is possible.

`isotropic_spectrum` is exact for c I + U diag(sign) U^T through an r x r eigenproblem;
`dense_spectrum` is the eigen-decomposition of a dense matrix; `lanczos` serves every other matrix,
from products alone, to a tolerance, and says how well it did.
A row (sample) with NaN or inf gives NaN in that row and leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_tensor, per_sample
from ..scores import SymmetricOperator
from .dplr import DPLR
from .operator import as_operator
from .woodbury import low_rank_eigh

Function = Callable[[Tensor], Tensor]  # of eigenvalues, elementwise
Matvec = Callable[[Tensor], Tensor]  # (n, D) -> (n, D)
Rows = Callable[[slice | Tensor], Matvec]  # an index of the batch -> the matvec of these rows

_SYMMETRY = {torch.float32: 1e-5, torch.float64: 1e-10}  # allowed asymmetry over largest entry
_SPREAD = 8  # allowed spread of a constant diagonal, in machine epsilons


# --------------------------------------------------------------------------------------- spectra


class Spectrum(NamedTuple):
    """Q diag(values) Q^T + rest (I - Q Q^T) for each sample of a batch."""

    basis: Tensor  # Q, orthonormal columns. Shape (B, D, m)
    values: Tensor  # eigenvalues of these columns. Shape (B, m)
    rest: Tensor | None  # the other D - m eigenvalues, all equal. Shape (B,); None where m = D


def dense_spectrum(matrix: Tensor, *, where: str = "dense_spectrum") -> Spectrum:
    """Eigenvalues and eigenvectors of dense symmetric matrices.

    Args:
        matrix: shape (B, D, D), D >= 1. float32 or float64. Symmetric to 1e-5 (float32) or 1e-10
            (float64) of its largest entry; the symmetric part is used.
        where: the function named in errors.

    Returns:
        Spectrum with m = D. NaN values for a sample that is not finite.

    Raises:
        TypeError: matrix is not a Tensor.
        ValueError: it has another shape or dtype, or is not symmetric.
    """
    check_tensor(where, "matrix", matrix)
    if matrix.dim() != 3 or matrix.shape[1] != matrix.shape[2] or matrix.shape[1] == 0:
        raise ValueError(
            f"{where}: matrix must have shape (B, D, D), D >= 1, got {tuple(matrix.shape)}"
        )
    usable, finite = check_symmetric(where, matrix)
    values, basis = torch.linalg.eigh(usable / 2 + usable.mT / 2)
    return Spectrum(basis, values.where(finite.unsqueeze(-1), torch.nan), None)


def check_symmetric(where: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse matrices (B, D, D) that are not symmetric; 0 in place of those not finite, and which.

    Raises:
        ValueError: a difference beyond 1e-5 (float32) or 1e-10 (float64) of the largest entry.
    """
    finite = matrix.isfinite().all(-1).all(-1)
    usable = matrix.where(finite[:, None, None], 0.0)
    difference = (usable - usable.mT).abs().amax((-1, -2))
    bad = difference > _SYMMETRY[matrix.dtype] * usable.abs().amax((-1, -2))
    if bool(bad.any()):
        raise ValueError(
            f"{where}: matrix must be symmetric, got a difference of"
            f" {difference[bad][0].item():.3g} for sample {int(bad.nonzero()[0])}"
        )
    return usable, finite


def isotropic_spectrum(
    diag: Tensor,
    factor: Tensor | None,
    sign: Tensor | None = None,
    *,
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
        U U^T overflows.

    Raises:
        TypeError: an argument is not a Tensor.
        ValueError: diag is not constant within a sample (8 machine epsilons are allowed), or the
            arguments do not make a DPLR.
    """
    matrix = DPLR(diag, factor, sign)
    finite = diag.isfinite().all(-1) & matrix.factor.square().sum((-1, -2)).isfinite()
    level = diag.where(finite.unsqueeze(-1), 0.0)
    spread = level.amax(-1) - level.amin(-1)
    bad = spread > _SPREAD * torch.finfo(diag.dtype).eps * level.abs().amax(-1)
    if bool(bad.any()):
        raise ValueError(
            f"{where}: diag must be constant within each sample, got a spread of"
            f" {spread[bad][0].item():.3g} for sample {int(bad.nonzero()[0])}"
        )
    columns = matrix.factor.where(finite[:, None, None], 0.0)
    basis, mu = low_rank_eigh(columns, matrix.parts.sign)
    rest = level[:, 0].where(finite, torch.nan)
    return Spectrum(basis, rest.unsqueeze(-1) + mu, None if mu.shape == diag.shape else rest)


def spectrum_apply(spectrum: Spectrum, function: Function, v: Tensor) -> Tensor:
    """f(A) v = f(c) v + Q ((f(c + mu) - f(c)) * Q^T v) for v (B, D); Q f(values) Q^T v if m = D.

    `function` is elementwise and sees (B, m), then (B, 1): per-sample parameters are (B, 1).
    """
    basis, values, rest = spectrum
    weight = function(values)
    projected = basis.mT @ v.unsqueeze(-1)
    if rest is None:
        return (basis @ (weight.unsqueeze(-1) * projected)).squeeze(-1)
    common = function(rest.unsqueeze(-1))
    return common * v + (basis @ ((weight - common).unsqueeze(-1) * projected)).squeeze(-1)


def spectrum_logdet(spectrum: Spectrum, function: Function) -> Tensor:
    """log det f(A) = sum log f over all D eigenvalues, f as in `spectrum_apply`. Shape (B,).

    -inf where an f is zero, NaN where one is negative.
    """
    basis, values, rest = spectrum
    total = function(values).log().sum(-1)
    if rest is None:
        return total
    return total + (basis.shape[1] - basis.shape[2]) * function(rest.unsqueeze(-1)).log().squeeze(1)


def matrix_rows(matrix: SymmetricOperator | Tensor, scale: float | Tensor = 1.0) -> Rows:
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
    """
    operator = as_operator("matrix_rows", matrix)
    like = torch.empty((), dtype=operator.dtype, device=operator.device).expand(operator.shape[:2])
    column = per_sample("matrix_rows", "scale", scale, like)

    def rows_of(rows: slice | Tensor) -> Matvec:
        part = operator.rows(rows)
        factor = column if column.dim() == 0 else column[rows]
        return lambda v: factor * part.matvec(v)

    return rows_of
