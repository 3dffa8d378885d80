"""The algebra of diag(d) + U diag(sign) U^T through small matrices: solve, determinant, counts.

`DPLR` calls these functions. They take its parts, which it has checked, and do not check again.
Everything costs O(D r^2); nothing is D x D.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .derivatives import attach_values, derivative_wanted, low_rank_change, without_derivative

_SMALL = 1e-2  # how much smaller than its bound in `_capacity` a row must be to be kept


class Parts(NamedTuple):
    """The parts of diag(d) + U diag(sign) U^T, one dtype and device.

    Attributes:
        diag: d. Shape (B, D).
        factor: U. Shape (B, D, r).
        sign: +1 or -1 for each column of U. Shape (r,).
    """

    diag: Tensor
    factor: Tensor
    sign: Tensor

    @property
    def rank(self) -> int:
        return self.factor.shape[2]


class _Capacity(NamedTuple):
    diag: Tensor  # d with 1 in the rows kept. (B, D)
    lift: Tensor  # E: a column e_i / sqrt(t_i) for each row kept. (B, D, c)
    inner: Tensor  # K. (B, c + r, c + r)
    inverse: Tensor  # 1 / d over the eliminated rows, 0 elsewhere. (B, D)


def solve(parts: Parts, b: Tensor) -> tuple[Tensor, Tensor]:
    """M^-1 b for b (B, D, k) by Woodbury's identity, and LAPACK's info (B,) of the small solve."""
    factor = parts.factor
    _, lift, inner, inverse = _capacity(parts)
    inverse = inverse.unsqueeze(-1)
    right = torch.cat([lift.mT @ b, -(factor.mT @ (inverse * b))], 1)
    with _one_thread(inner):
        solution, info = torch.linalg.solve_ex(inner, right)
    z, y = solution.split([lift.shape[-1], parts.rank], 1)
    return inverse * (b - factor @ y) + lift @ z, info


def logdet(parts: Parts) -> Tensor:
    """log det M by the determinant lemma. Shape (B,). -inf at zero, NaN where it is negative."""
    diag, lift, inner, _ = _capacity(parts)
    with _one_thread(inner):
        sign, logabs = torch.linalg.slogdet(inner)
    # A column of lift is e_i / sqrt(t) (or zero): it divided the determinant by t.
    length = lift.square().sum(1)
    extra = length.where(length > 0, 1.0).log().sum(-1)
    value: Tensor = diag.abs().log().sum(-1) + logabs - extra
    sign = sign * diag.sign().prod(-1) * (-parts.sign).prod()
    value = value.masked_fill(sign < 0, torch.nan)
    # More zeros than columns: singular, which `_capacity` does not represent.
    singular = (parts.diag == 0).sum(-1) > parts.rank
    return value.masked_fill(singular, -torch.inf)


def count_above(parts: Parts, value: float | Tensor) -> Tensor:
    """How many eigenvalues exceed value, a float or (B, 1). Shape (B,).

    Sylvester's law on [[A, U], [U^T, -S]], A = diag(d - value): its inertia is that of -S plus
    that of A + U S U^T. It is also that of the eliminated rows of A plus that of K.
    """
    diag, lift, inner, _ = _capacity(parts._replace(diag=parts.diag - value))
    # Each column of lift is one positive too many: 1 in d', or 1 in K where it is not used.
    above = (torch.linalg.eigvalsh(inner) > 0).sum(-1) - lift.shape[-1]
    count: Tensor = (diag > 0).sum(-1) + above - (parts.sign < 0).sum()
    return count


@torch.no_grad()
def is_positive_definite(parts: Parts) -> Tensor:
    """Whether every eigenvalue is > 0, by counting them. Shape (B,). False where not finite."""
    finite = is_finite(parts)
    diag = parts.diag.where(finite.unsqueeze(-1), 1.0)
    factor = parts.factor.where(finite[:, None, None], 0.0)
    # In float64, so that the count holds up to a condition number of 1e15.
    count = count_above(Parts(diag.double(), factor.double(), parts.sign.double()), 0.0)
    zeros = (diag == 0).sum(-1)
    definite: Tensor = finite & (zeros <= parts.rank) & (count == diag.shape[1])
    return definite


def is_finite(parts: Parts) -> Tensor:
    """Whether every entry is finite. Shape (B,)."""
    return parts.diag.isfinite().all(-1) & parts.factor.isfinite().all(-1).all(-1)


def low_rank_eigh(factor: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenpairs of U diag(sign) U^T by an r x r eigenproblem, any rank (r > D too).

    Args:
        factor: U. Shape (B, D, r), float32 or float64.
        sign: +1 or -1 for each column, in that dtype. Shape (r,).

    Returns:
        Q (B, D, m), orthonormal columns, and lam (B, m), m = min(D, r), ascending, with
        U diag(sign) U^T = Q diag(lam) Q^T. lam is differentiable once. Where some are equal each
        by itself has no derivative, but symmetric functions of them have, and it is right. Q is
        not differentiable.

    Raises:
        RuntimeError: on a gradient of Q (forward mode gives NaN), or on a second derivative.

    Example:
        >>> import torch
        >>> from hos_ext.linalg import low_rank_eigh
        >>> basis, values = low_rank_eigh(torch.tensor([[[2.0], [0.0]]]), torch.tensor([-1.0]))
        >>> values
        tensor([[-4.]])
    """
    where, still = "low_rank_eigh", factor.detach()
    q, r = torch.linalg.qr(still)
    lam, rotation = torch.linalg.eigh((r * sign) @ r.mT)
    basis = q @ rotation
    if not derivative_wanted(factor):
        return basis, lam
    lam = attach_values(lam, basis, low_rank_change(where, factor, sign))
    return without_derivative(where, basis, factor), lam


def _capacity(parts: Parts) -> _Capacity:
    """The small matrix K that stands for M in solves, determinants and counts.

    M x = b is [[A, U], [U^T, -S]] [x; y] = [b; 0] with A = diag(d), S = diag(sign). With q_i =
    |d_i| / |U_i|^2 and g the (r+1)-th smallest of them, at most 1, rows with q_i <= _SMALL g
    would cost digits as divisors: they, at most r, stay as unknowns z, x_i = z_i / sqrt(t_i)
    with t_i = g |U_i|^2. The others are eliminated, which leaves
        K = [[diag(d_i / t_i), E^T U], [U^T E, -(S + U^T A^-1 U)]]
    with columns e_i / sqrt(t_i) in E; samples with fewer such rows have zero columns and 1 in
    K. No divisor is much too small: U^T annuls some vector on the r + 1 rows of smallest q,
    which M only multiplies by d, so that M (rows scaled) has condition number 1 / g or more.
    d' is d with 1 in the rows kept, and for zeros beyond rank, where M is singular.
    """
    d, factor, sign = parts
    rank = parts.rank
    norm = factor.detach().square().sum(-1)
    ratio = d.detach().abs() / norm.clamp_min(torch.finfo(d.dtype).tiny)
    lowest, rows = ratio.topk(min(rank + 1, ratio.shape[-1]), largest=False)
    bound = torch.ones_like(norm[:, :1])
    if rank < ratio.shape[-1]:
        bound = lowest[:, rank:].clamp_max(1.0)
    used = lowest[:, :rank] <= _SMALL * bound
    count = int(used.sum(-1).max()) if used.numel() else 0
    rows, used = rows[:, :count], used[:, :count]
    scale = bound.where(bound > 0, 1.0) * norm.gather(-1, rows)
    height = used / scale.where(scale > 0, 1.0).sqrt()
    lift = norm.new_zeros((*norm.shape, count))
    lift = lift.scatter(1, rows.unsqueeze(1), height.unsqueeze(1))
    kept = torch.zeros_like(norm, dtype=torch.bool).scatter(-1, rows, used)
    diag = d.where(~kept & (d != 0), 1.0)
    inverse = ~kept / diag
    corner = (d.gather(-1, rows) * height.square()).where(used, 1.0)
    edge = lift.mT @ factor
    low_rank = factor.mT @ (factor * inverse.unsqueeze(-1))
    upper = torch.cat([torch.diag_embed(corner), edge], -1)
    lower = torch.cat([edge.mT, -torch.diag(sign) - low_rank], -1)
    return _Capacity(diag, lift, torch.cat([upper, lower], 1), inverse)


@contextmanager
def _one_thread(matrices: Tensor) -> Iterator[None]:
    """For LU of a batch on the CPU: MKL's threads inside torch's can wait for ever (torch 2.13)."""
    threads = torch.get_num_threads()
    if threads == 1 or not matrices.is_cpu or torch.compiler.is_compiling():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
