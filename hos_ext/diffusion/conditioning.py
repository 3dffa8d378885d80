"""What a measurement changes of a Gaussian: the shift of its mean, and its covariance.

In closed form where A is a mask or a matrix, by conjugate gradients where A is two functions. The
formulas are those of `condition` and `condition_mean`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check, check_count, check_number
from ..linalg.dplr import DPLR
from .measurement import Problem, first_of

# ---------------------------------------------------------------------------------- closed forms


def closed_form(
    where: str, problem: Problem, covariance: DPLR, residual: Tensor
) -> tuple[Tensor, Callable[[], DPLR]]:
    """The shift (B, D) in the dtype of the covariance, and C_y, in float64, when it is asked for:
    the formula of `condition`. Small noise makes N and K ill-conditioned: they are float64."""
    operator, v = problem.operator, problem.variance
    assert isinstance(operator, Tensor)
    d, u = covariance.diag.double(), covariance.factor
    masked = operator.dtype == torch.bool
    if masked:
        observed = operator.flatten().nonzero().squeeze(1)
        d_seen = d.index_select(1, observed)
        total = d_seen + v
        seen = u.index_select(1, observed).double() / total.sqrt().unsqueeze(-1)
        white = residual / total.sqrt()
        kept = torch.ones_like(d).index_copy(1, observed, v / total)
        gain = torch.zeros_like(d).index_copy(1, observed, d_seen / total * residual)
    else:
        u = u.double()
        weighted = operator * d.unsqueeze(1)
        root = _cholesky(where, problem, weighted @ operator.mT + v.diag())
        seen = torch.linalg.solve_triangular(root, operator @ u, upper=False)
        white = torch.linalg.solve_triangular(root, residual.unsqueeze(-1), upper=False).squeeze(-1)
        lost = torch.linalg.solve_triangular(root, weighted, upper=False).mT  # E
        gain = (lost @ white.unsqueeze(-1)).squeeze(-1)
    sign = d.new_ones(covariance.rank) if covariance.sign is None else covariance.sign.to(d.dtype)
    signed = bool((sign < 0).any())
    inner = sign.diag() + seen.mT @ seen  # K
    evidence = seen.mT @ white.unsqueeze(-1)
    if signed:
        # S is positive definite, so that K has as many negative eigenvalues as there are signs -1,
        # in every sample.
        values, vectors = torch.linalg.eigh(inner)
        size = values.abs()
        rounding = covariance.rank * torch.finfo(d.dtype).eps * size.amax(1)
        refuse_small_noise(where, problem, size.amin(1) <= rounding)
        weight = vectors @ (vectors.mT @ evidence / values.unsqueeze(-1))
    else:
        inner_root = _cholesky(where, problem, inner)
        weight = torch.cholesky_solve(evidence, inner_root)

    def columns_of(weight: Tensor) -> Tensor:
        """W weight, for weight (B, r, k)."""
        out = u.to(weight.dtype) @ weight
        return out * kept.unsqueeze(-1) if masked else out - lost @ (seen @ weight)

    def law() -> DPLR:
        signs = None
        if signed:
            half, signs = vectors * size.rsqrt().unsqueeze(1), sign.sort().values
        else:
            unit = torch.eye(u.shape[2], dtype=u.dtype, device=u.device).expand_as(inner)
            half = torch.linalg.solve_triangular(inner_root.mT, unit, upper=True)
        factor = columns_of(half)  # half half^T is K^-1, up to the signs
        if masked:
            return DPLR(d * kept, factor, signs)
        signs = torch.cat([sign if signs is None else signs, -torch.ones_like(v)])
        return DPLR(d, torch.cat([factor, lost], -1), signs)

    if masked:
        weight = weight.to(u.dtype)  # nothing cancels in its W
    return (gain + columns_of(weight).squeeze(-1)).to(covariance.dtype), law


def _cholesky(where: str, problem: Problem, matrix: Tensor) -> Tensor:
    """L of N or K, refused where a pivot is no more than the rounding of its entry."""
    root: Tensor
    root, info = torch.linalg.cholesky_ex(matrix)
    entry, pivot = (a.diagonal(dim1=1, dim2=2) for a in (matrix, root))
    rounding = matrix.shape[1] * torch.finfo(matrix.dtype).eps * entry
    refuse_small_noise(where, problem, (info != 0) | ~(pivot.square() > rounding).all(1))
    return root


def refuse_small_noise(
    where: str, problem: Problem, bad: Tensor, why: str = "to be told from rounding in float64"
) -> None:
    """Raises for the first sample that is bad (B,): it takes a noise too small to be resolved."""
    check(
        where,
        not bool(bad.any()),
        f"noise_std must be large enough {why}",
        lambda: f"{problem.variance.min().sqrt().item():g} for sample {first_of(bad)}",
    )


# --------------------------------------------------------------------------- conjugate gradients


def iterated(
    where: str,
    problem: Problem,
    covariance: DPLR,
    residual: Tensor,
    dims: tuple[int, ...],
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    """The shift (B, D) for an operator of functions."""
    scale = problem.variance.rsqrt().to(residual.dtype)

    def spread(u: Tensor) -> Tensor:
        """C A^T V^-1/2 u."""
        return covariance.matvec(problem.adjoint(where, scale * u, dims).flatten(1))

    def matvec(u: Tensor) -> Tensor:
        back = spread(u).reshape(len(u), *dims)
        return u + scale * problem.forward(where, back)

    solution, _ = conjugate_gradients(where, matvec, scale * residual, tolerance, max_iterations)
    return spread(solution)


def conjugate_gradients(
    where: str,
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    """x with |b - M x| <= tolerance |b| in each sample, and its number of iterations (B,).

    M is symmetric positive definite. A sample that is done stays as it is. A sample whose |b|^2 is
    not finite gets NaN, without an iteration.
    """
    square = b.square().sum(1, keepdim=True)
    x, r, p = torch.zeros_like(b).where(square.isfinite(), torch.nan), b, b
    target = tolerance**2 * square
    iterations = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    for _ in range(max_iterations):
        active = square > target
        if not bool(active.any()):
            return x, iterations
        iterations += active.squeeze(1)
        product = matvec(p)
        step = (square / (p * product).sum(1, keepdim=True)).where(active, 0.0)
        x, r = x + step * p, r - step * product
        after = r.square().sum(1, keepdim=True).where(active, square)
        p = r + (after / square).where(active, 0.0) * p
        square = after
    active = square > target
    if not bool(active.any()):
        return x, iterations
    sample = int(active.squeeze(1).nonzero()[0])
    reached = (square[sample] / target[sample]).sqrt().item() * tolerance
    raise RuntimeError(
        f"{where}: conjugate gradients must converge to {tolerance:g}, got a residual of "
        f"{reached:.2g} after {max_iterations} iterations for sample {sample} (raise tolerance or "
        "max_iterations, or give the operator as a matrix or a mask)"
    )


def check_stop(where: str, tolerance: float | None, max_iterations: int, y: Tensor) -> float:
    """The tolerance, after checks of both."""
    check_count(where, "max_iterations", max_iterations)
    if tolerance is None:
        return 1e-4 if y.dtype == torch.float32 else 1e-6
    return check_number(where, "tolerance", tolerance)
