"""Extreme eigenpairs of any symmetric operator from its products: block Lanczos with restarts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check, check_count, check_flag, check_kind, check_number
from ..ops.noise import draw_normal
from ..random import STREAM_START, Key
from ..records import RowRecord, unusual
from ..scores import SymmetricOperator
from .dplr import DPLR, check_whole
from .rational_krylov import fix_signs

_DENSE = 64  # the matrix is formed up to this D
_CAPACITY = 64  # columns of the Krylov basis before it is restarted, or 6 k if that is more
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs(RowRecord):
    """Extreme eigenpairs of each matrix of a batch, and how well they are one.

    Attributes:
        values: the most extreme first. Shape (B, k).
        vectors: orthonormal columns. Shape (B, D, k).
        residuals: |A v - value v|; an eigenvalue lies within it. Shape (B, k).
        products: vectors multiplied with each matrix.
        converged: whether all k residuals meet the tolerance. bool, shape (B,).

    Example:
        >>> import torch
        >>> from hos_ext.linalg import DPLR, eigenpairs
        >>> pairs = eigenpairs(DPLR(torch.tensor([[3.0, 1.0, 2.0]])), 1, largest=False)
        >>> pairs.vectors.squeeze(-1), pairs.converged
        (tensor([[0., 1., 0.]]), tensor([True]))
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: Tensor

    def _summary(self) -> str:
        batch, size, columns = self.vectors.shape
        return ", ".join([f"B={batch}, D={size}, k={columns}", *unusual(self.vectors)])


class _Ritz(NamedTuple):
    values: Tensor  # the k largest, descending. (B, k)
    vectors: Tensor  # (B, D, k)
    residual: Tensor  # A v - value v. (B, D, k)
    length: Tensor  # its norm. (B, k)
    largest: Tensor  # modulus among all Ritz values. (B, 1)
    rotation: Tensor  # from the basis to all Ritz vectors. (B, m, m)


@torch.no_grad()
def eigenpairs(
    operator: SymmetricOperator,
    k: int,
    *,
    largest: bool = True,
    tolerance: float | None = None,
    max_products: int | None = None,
    where: str = "eigenpairs",
) -> Eigenpairs:
    """The k largest or smallest eigenvalues and their eigenvectors, with their residuals.

    For D <= 64: `dense()` and LAPACK. Otherwise block Lanczos: a block of k vectors grows into
    a Krylov basis, kept orthonormal; each step adds the residuals of the leading Ritz pairs,
    and a full basis restarts from the best half of its own. All samples take part until the
    last has converged. Deterministic: the start is fixed, and each vector's entry of largest
    modulus is positive.

    Args:
        operator: symmetric matrices (B, D, D).
        k: 1 <= k <= D.
        largest: the largest eigenvalues, else the smallest (algebraically).
        tolerance: of the residual |A v - value v| over the largest modulus among the Ritz
            values, > 0; None is 1e-9 (float64) or 1e-4 (float32). The error of an eigenvalue is
            about the square of that, the angle of a vector that over its relative gap.
        max_products: >= k; stop before more (not for D <= 64). None is 100 + 20 k.
        where: the function named in errors.

    Returns:
        Eigenpairs. For a matrix that is not symmetric the pairs are about those of its symmetric
        part, the residuals end near its asymmetry, and converged is False.

    Raises:
        TypeError: k or max_products is not an int.
        ValueError: k, tolerance or max_products out of range, or a product is not finite.

    Example:
        >>> import torch
        >>> from hos_ext.linalg import DPLR, eigenpairs
        >>> eigenpairs(DPLR(torch.tensor([[3.0, 1.0, 2.0]])), 2).values
        tensor([[3., 2.]])
    """
    check_kind(where, "operator", operator, SymmetricOperator)
    check_flag(where, largest=largest)
    if isinstance(operator, DPLR):
        check_whole(where, "operator", operator)
    square = len(operator.shape) == 3 and operator.shape[1] == operator.shape[2]
    check(where, square, "operator must have shape (B, D, D)", tuple(operator.shape))
    size = operator.shape[1]
    k = check_count(where, "k", k)
    check(where, k <= size, f"k must be in 1..{size}", k)
    if tolerance is None:
        tolerance = _TOLERANCE[operator.dtype]
    tolerance = check_number(where, "tolerance", tolerance)
    if max_products is None:
        max_products = 100 + 20 * k
    max_products = check_count(where, "max_products", max_products, least=k)
    direction = 1 if largest else -1
    if size <= _DENSE:
        basis = torch.eye(size, dtype=operator.dtype, device=operator.device).expand(operator.shape)
        pairs, products = _rayleigh_ritz(where, basis, direction * operator.dense(), k), size
    else:
        pairs, products = _krylov(where, operator, k, direction, tolerance, max_products)
    converged = (pairs.length <= tolerance * pairs.largest).all(-1)
    vectors = fix_signs(pairs.vectors)
    return Eigenpairs(direction * pairs.values, vectors, pairs.length, products, converged)


def _krylov(
    where: str,
    operator: SymmetricOperator,
    k: int,
    direction: int,
    tolerance: float,
    max_products: int,
) -> tuple[_Ritz, int]:
    """The k largest eigenpairs of direction times the matrix, and the products spent."""
    batch, size, _ = operator.shape
    capacity = min(size, max(_CAPACITY, 6 * k))
    basis = image = torch.empty((batch, size, 0), dtype=operator.dtype, device=operator.device)

    def random_block(offset: int) -> Tensor:
        return draw_normal(Key(0, offset), STREAM_START, (batch, size, k), basis)

    block, products = random_block(0), 0
    while True:
        block = _orthonormal(block, basis)
        basis = torch.cat([basis, block], -1)
        image = torch.cat([image, direction * operator.matvec(block)], -1)
        products += block.shape[-1]
        pairs = _rayleigh_ritz(where, basis, image, k)
        room = min(k, size - basis.shape[-1])
        done = bool((pairs.length <= tolerance * pairs.largest).all())
        if done or room == 0 or products + room > max_products:
            return pairs, products
        # What has converged to rounding would add noise alone: a fresh direction instead.
        spent = (pairs.length <= torch.finfo(basis.dtype).eps * pairs.largest).unsqueeze(1)
        block = torch.where(spent, random_block(products), pairs.residual)[..., :room]
        if basis.shape[-1] + room > capacity:
            kept = pairs.rotation[..., : capacity // 2]
            basis, image = basis @ kept, image @ kept


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """The block made orthonormal, and orthogonal to an orthonormal basis."""
    block = block / block.norm(dim=1, keepdim=True)
    for _ in range(2):  # twice: one pass leaves the rounding of near parallels
        block = torch.linalg.qr(block - basis @ (basis.mT @ block))[0]
    return block


def _rayleigh_ritz(where: str, basis: Tensor, image: Tensor, k: int) -> _Ritz:
    """The k largest Ritz pairs of A from an orthonormal basis (B, D, m) and its image under A."""
    finite = image.isfinite().all(-1).all(-1)
    check(
        where,
        bool(finite.all()),
        "products must be finite",
        lambda: f"NaN or inf for row {int((~finite).nonzero()[0])}",
    )
    projected = basis.mT @ image
    ritz, rotation = torch.linalg.eigh((projected + projected.mT).double() / 2)
    values, rotation = ritz.flip(-1).to(basis.dtype), rotation.flip(-1).to(basis.dtype)
    vectors = basis @ rotation[..., :k]
    residual = image @ rotation[..., :k] - vectors * values[:, None, :k]
    largest = values.abs().amax(-1, keepdim=True)
    return _Ritz(values[:, :k], vectors, residual, residual.norm(dim=1), largest, rotation)
