"""The leading eigenpairs of diag(d) + U diag(sign) U^T without a D x D matrix, certified by counts.

`DPLR.eigh` calls `leading_vectors`. Krylov steps with products alone need thousands of iterations
where eigenvalues cluster at the top; a solve just above the wanted eigenvalue, which Woodbury's
identity makes as cheap as a product, separates them at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops.noise import draw_normal
from ..random import STREAM_POSTERIOR, Key
from .woodbury import Parts, count_above, low_rank_eigh, solve

_TOLERANCE = 1e-12  # residual of an eigenpair over the norm of the matrix
_ROUGH = 1e-5  # the same where Krylov steps end and inverse iteration begins
_STEPS = 100


def leading_vectors(parts: Parts, k: int) -> Tensor | None:
    """The k leading eigenvectors (1, D, k) of a batch of one in float64.

    Rational Krylov steps come first, then inverse iteration. A count of eigenvalues (Sylvester's
    law) finds any that the iteration missed.

    Args:
        parts: of a batch of one, float64, finite.
        k: 1 <= k, and r + 4 k <= D.

    Returns:
        Orthonormal columns, the largest eigenvalue first; None without convergence.
    """
    matrix, columns, norm = _orthogonal(parts)
    tolerance, rough = _TOLERANCE * norm, _ROUGH * norm
    diagonal = matrix.diag + (matrix.factor.square() * matrix.sign).sum(-1)
    units = matrix.diag.new_zeros((*matrix.diag.shape, k))
    units.scatter_(1, diagonal.topk(k).indices.unsqueeze(1), 1.0)
    basis = torch.cat([columns, units], -1)
    for attempt in range(_STEPS):
        ritz, vectors, residual = _rayleigh_ritz(matrix, basis, 2 * k)
        worst = max(residual[:k])
        if worst > rough:
            # Rational Krylov: M solved just above the first Ritz value that is not near.
            j = next(j for j in range(k) if residual[j] > rough)
            step = _solve_near(matrix, ritz[j], max(residual[j], 1e-2 * rough), vectors)
            for _ in range(2):  # twice: one pass leaves the rounding of near parallels
                step = step - vectors @ (vectors.mT @ step)
                step = step / step.norm(dim=1, keepdim=True).clamp_min(1e-300)
            basis = torch.cat([vectors, step], -1)
        elif worst > tolerance:
            # Inverse iteration, each vector by itself. The basis must not keep the old ones:
            # Rayleigh-Ritz mixes vectors of close eigenvalues, pure with polluted alike.
            near = [max(residual[j], tolerance) / 4 for j in range(k)]
            steps = [
                _solve_near(matrix, ritz[j], near[j], vectors[..., j : j + 1]) for j in range(k)
            ]
            basis = torch.cat(steps, -1)
        else:
            missed = first_missed(matrix, [x + 10 * tolerance for x in ritz[:k]], 2 * norm)
            if missed is None:
                return vectors[..., :k]
            shape = (1, matrix.diag.shape[1], k)
            fresh = draw_normal(Key(0, attempt), STREAM_POSTERIOR, shape, matrix.diag)
            basis = torch.cat([vectors, _solve_near(matrix, missed, tolerance, fresh)], -1)
    return None


def first_missed(parts: Parts, limits: list[float], high: float) -> float | None:
    """The first eigenvalue above its limit, for a batch of one, by counts and bisection.

    Eigenvalue number j (from 0) is at most limits[j] if at most j eigenvalues exceed that.
    None if this holds for all.
    """
    for j, low in enumerate(limits):
        if int(count_above(parts, low)) > j:
            for _ in range(50):
                middle = (low + high) / 2
                if int(count_above(parts, middle)) > j:
                    low = middle
                else:
                    high = middle
            return high
    return None


def fix_signs(vectors: Tensor) -> Tensor:
    """Vectors (B, D, k) whose entry of largest modulus is positive: a choice among +-v."""
    peak = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * torch.where(peak < 0, -1.0, 1.0).to(vectors.dtype)


def _orthogonal(parts: Parts) -> tuple[Parts, Tensor, float]:
    """The same matrix with orthogonal columns, these normalised, and a bound of its norm.

    Cancelling or dependent columns would cost the solves their digits.
    """
    columns, weight = low_rank_eigh(parts.factor, parts.sign)
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    kept = weight[0].abs() > 1e-15 * largest
    columns, weight = columns[..., kept], weight[0, kept]
    matrix = Parts(parts.diag, columns * weight.abs().sqrt(), weight.sign())
    return matrix, columns, float(parts.diag.abs().max()) + largest or 1.0


def _rayleigh_ritz(
    parts: Parts, basis: Tensor, keep: int
) -> tuple[list[float], Tensor, list[float]]:
    """Leading Ritz values, vectors (1, D, m) and residual norms, for a batch of one."""
    basis = torch.linalg.qr(basis)[0]
    product = ops.hessian_matvec(parts.diag, parts.factor, basis, sign=parts.sign)
    projected = basis.mT @ product
    values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
    values, rotation = values[..., -keep:].flip(-1), rotation[..., -keep:].flip(-1)
    vectors = basis @ rotation
    residual = (product @ rotation - vectors * values.unsqueeze(1)).norm(dim=1)
    return values[0].tolist(), vectors, residual[0].tolist()


def _solve_near(parts: Parts, value: float, distance: float, x: Tensor) -> Tensor:
    """(value + distance - M)^-1 x, columns normalised; poles are kept distance / 10 away."""
    gap = value + distance - parts.diag
    least = torch.full_like(gap, distance / 10)
    gap = torch.where(gap.abs() < least, torch.copysign(least, gap), gap)
    out = solve(Parts(gap, parts.factor, -parts.sign), x)[0]
    length: Tensor = out.norm(dim=1, keepdim=True)
    return out / length.clamp_min(1e-300)
