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

_HELD = 1e-2  # relative error of a variance that a covariance may have

# ---------------------------------------------------------------------------------- closed forms


def closed_form(
    where: str, problem: Problem, covariance: DPLR, residual: Tensor
) -> tuple[Tensor, Callable[[], DPLR]]:
    """The shift (B, D) in the dtype of the covariance, and C_y, in float64, when it is asked for:
    the formula of `condition`. Small noise makes N and K ill-conditioned: they are float64."""
    operator, v = problem.operator, problem.variance
    assert isinstance(operator, Tensor)
    d, u = covariance.diag.double(), covariance.factor
    sign = d.new_ones(covariance.rank) if covariance.sign is None else covariance.sign.to(d.dtype)
    order = sign.argsort(descending=True, stable=True)  # those of sign -1 last, for K
    u = u.index_select(2, order)
    masked = operator.dtype == torch.bool
    if masked:
        observed = operator.flatten().nonzero().squeeze(1)
        d_seen = d.index_select(1, observed)
        total = d_seen + v
        seen = u.index_select(1, observed).double() / total.sqrt().unsqueeze(-1)
        white = residual / total.sqrt()
        # Not 1 - d / total, which cancels where the noise is small.
        kept = torch.ones_like(d).index_copy(1, observed, v / total)
        gain = torch.zeros_like(d).index_copy(1, observed, d_seen / total * residual)
    else:
        u = u.double()
        weighted = operator * d.unsqueeze(1)
        matrix, columns = weighted @ operator.mT + v.diag(), operator @ u
        size = matrix.diagonal(dim1=1, dim2=2) + columns.square().sum(2)
        root = _cholesky(where, problem, matrix, size)
        seen = torch.linalg.solve_triangular(root, columns, upper=False)
        white = torch.linalg.solve_triangular(root, residual.unsqueeze(-1), upper=False).squeeze(-1)
        lost = torch.linalg.solve_triangular(root, weighted, upper=False).mT  # E
        gain = (lost @ white.unsqueeze(-1)).squeeze(-1)
    inner, ordered = _inner_root(where, problem, seen, int((sign < 0).sum())), sign[order]
    unit = torch.eye(len(sign), dtype=inner.dtype, device=inner.device).expand_as(inner)
    half = torch.linalg.solve_triangular(inner.mT, unit, upper=True)  # K^-1 = half sign half^T
    evidence = half.mT @ (seen.mT @ white.unsqueeze(-1))
    weight = half @ (ordered.unsqueeze(-1) * evidence)

    def columns_of(weight: Tensor) -> Tensor:
        """W weight, for weight (B, r, k)."""
        out = u.to(weight.dtype) @ weight
        return out * kept.unsqueeze(-1) if masked else out - lost @ (seen @ weight)

    def law() -> DPLR:
        factor = columns_of(half.index_select(2, order.argsort()))
        if masked:
            return DPLR(d * kept, factor, covariance.sign)
        return DPLR(d, torch.cat([factor, lost], -1), torch.cat([sign, -torch.ones_like(v)]))

    if masked:
        weight = weight.to(u.dtype)  # nothing cancels in its W
    return (gain + columns_of(weight).squeeze(-1)).to(covariance.dtype), law


def _inner_root(where: str, problem: Problem, seen: Tensor, minus: int) -> Tensor:
    """R, lower triangular, with K = diag(sign) + seen^T seen = R diag(sign) R^T; sign +1 first.

    The block of the signs -1 has the Schur complement -(I - seen^T seen + X^T X): negative
    definite, since S is positive definite. No eigenvectors, which have no derivatives at ties.
    """
    plus = seen.shape[2] - minus
    first, last = seen.split([plus, minus], 2)
    one = torch.ones(seen.shape[2], dtype=seen.dtype, device=seen.device).diag()
    root = _cholesky(where, problem, one[:plus, :plus] + first.mT @ first)
    if minus == 0:
        return root
    edge = torch.linalg.solve_triangular(root, first.mT @ last, upper=False)
    gram, lifted = last.mT @ last, one[:minus, :minus] + edge.mT @ edge
    size = (lifted + gram).diagonal(dim1=1, dim2=2)
    corner = _cholesky(where, problem, lifted - gram, size)
    upper = torch.cat([root, root.new_zeros(len(root), plus, minus)], 2)
    return torch.cat([upper, torch.cat([edge.mT, corner], 2)], 1)


def _cholesky(where: str, problem: Problem, matrix: Tensor, size: Tensor | None = None) -> Tensor:
    """L of a matrix, refused where its rounding is more than 1e-3 of its smallest eigenvalue.

    Scaled to the diagonal `size` (B, m), that of the matrix, or of the terms that make it up if
    they are larger. The pivots alone do not tell: rounding grows from a small one to the next.
    """
    root: Tensor
    root, info = torch.linalg.cholesky_ex(matrix)
    size = matrix.diagonal(dim1=1, dim2=2) if size is None else size
    with torch.no_grad():
        # |L^-1 size^1/2|^2 is the sum of the inverse eigenvalues.
        spread = torch.linalg.solve_triangular(root, size.sqrt().diag_embed(), upper=False)
        lost = torch.finfo(matrix.dtype).eps * spread.square().sum((1, 2))
    refuse_small_noise(where, problem, (info != 0) | ~(lost <= 1e-3))
    return root


@torch.no_grad()
def round_law(where: str, problem: Problem, prior: DPLR, exact: DPLR, hint: str = "") -> DPLR:
    """C_y, `exact`, in the dtype of the prior, refused where that does not hold its variances.

    Those of the entries, and with a matrix A all those along its rows. diag(d) - E E^T cancels
    there. They are compared with A C_y A^T = V S^-1 A C A^T, which does not cancel. In float64 the
    comparison rounds as C_y does: variances near its rounding are refused too.
    """
    rounded = exact.to(prior.dtype)
    variance = exact.diagonal()
    bad = ~_close(rounded.to(variance.dtype).diagonal(), variance).all(1)
    operator, v = problem.operator, problem.variance
    if isinstance(operator, Tensor) and operator.dtype != torch.bool and len(v):
        clean = _along(operator, prior)
        root, info = torch.linalg.cholesky_ex(clean + v.diag())
        wanted = v.unsqueeze(-1) * torch.cholesky_solve(clean, root)
        wanted, held = (wanted + wanted.mT) / 2, _along(operator, rounded)
        sizes, variance, found = (a.diagonal(dim1=1, dim2=2) for a in (clean, wanted, held))
        rounding = 4 * torch.finfo(v.dtype).eps * sizes
        bad |= (info != 0) | ~(_close(found, variance) & (rounding <= _HELD * variance)).all(1)
        # Combinations of rows, each row to unit variance. Like rows have some of variance zero.
        positive = variance > 0
        unit = positive / variance.where(positive, 1.0).sqrt()
        unit = unit.unsqueeze(1) * unit.unsqueeze(2)
        amplified = (sizes / variance.where(positive, 1.0)).amax(1)
        slack = 16 * len(v) * torch.finfo(v.dtype).eps * amplified
        slack = slack.unsqueeze(-1) + ~positive
        for sign in (1, -1):
            gap = unit * (_HELD * wanted + sign * (held - wanted)) + torch.diag_embed(slack)
            bad |= torch.linalg.cholesky_ex(gap)[1] != 0
    why = f"for {prior.dtype} to hold the posterior variances{hint}"
    refuse_small_noise(where, problem, bad, why)
    return rounded


def _close(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).abs() <= _HELD * wanted


def _along(operator: Tensor, matrix: DPLR) -> Tensor:
    """A M A^T in float64, (B, m, m)."""
    diag, factor, sign = (t.double() for t in matrix.parts)
    columns = operator @ factor
    return (operator * diag.unsqueeze(1)) @ operator.mT + (columns * sign) @ columns.mT


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
