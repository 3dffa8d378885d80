"""Guidance for linear inverse problems y = A x0 + n, n ~ N(0, V), V = diag(noise_std^2).

With x0 | x ~ N(m, C) at noise level sigma (`posterior`; C is a DPLR) the law of x0 | x, y is
    N(m + shift, C_y),  shift = C A^T S^-1 (y - A m),  C_y = C - C A^T S^-1 A C,  S = A C A^T + V,
and since dm/dx = (alpha / sigma^2) C, the score of p(x | y) is s1 + (alpha / sigma^2) shift: the
learned covariance stands for backprop through the network. Exact if x0 is Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..checks import (
    check,
    check_count,
    check_kind,
    check_number,
    check_samples,
    check_tensor,
    positive,
    refuse_dropout,
)
from ..linalg.dplr import DPLR
from ..ops.noise import draw_normal
from ..random import STREAM_ADJOINT, Key
from ..schedules import Schedule, check_schedule
from ..scores import Model, Scores, model_scores
from ..tweedie.posterior import Posterior, posterior

# A matrix (m, D), a boolean mask of shape dims, or (A x, A^T y) on batches.
Operator: TypeAlias = Tensor | tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def condition(
    posterior: Posterior, y: Tensor, operator: Tensor, noise_std: float | Tensor
) -> Posterior:
    """x0 | x, y: the whole Gaussian, mean and covariance, for a mask or a matrix.

    With C = diag(d) + U diag(sign) U^T, x0 = m + sqrt(d) z1 + U z2. Given z2, y tells about z1
    through N = A diag(d) A^T + V = L L^T; then about z2 through the columns L^-1 A U that are left:

        C_y = diag(d) - E E^T + W K^-1 W^T,   E = diag(d) A^T L^-T,  W = U - E L^-1 A U,
        K = diag(sign) + (L^-1 A U)^T (L^-1 A U),   rank r.

    For a mask diag(d) - E E^T is diagonal, d v / (d + v) at observed entries, without cancellation.
    All of it is computed in float64, whatever the dtype of the result.

    Args:
        posterior: of x0 given the noisy sample. mean (B, *dims), float32 or float64; covariance
            with diagonal part >= 0 (> 0 as a whole where a sign is -1).
        y: measurements. Shape (B, m), or (1, m) for one shared by all samples; dtype and device of
            the mean.
        operator: a boolean mask of shape dims, true where observed (inpainting): A x is x[:, mask],
            so m = mask.sum(), row-major; O(D r^2). Or a matrix A, shape (m, D), D in row-major
            order of dims; O(m D r + m^2 D + m^3) for each sample.
        noise_std: standard deviation of n, > 0 (at 0 S may be singular). Float, or (m,), one for
            each measurement. Units of y.

    Returns:
        Posterior. Its covariance has rank r for a mask (signs as before), r + m for a matrix (m
        columns of sign -1).

    Raises:
        TypeError: an argument of the wrong kind; an operator of functions.
        ValueError: shapes, dtypes or devices disagree; noise_std is not positive; y or the matrix
            is not finite; the covariance is not finite or negative; noise_std is too small for
            float64, or, with a matrix, for the dtype of the mean to hold the variances.
    """
    where = "condition"
    if not isinstance(operator, Tensor):
        raise TypeError(
            f"{where}: operator must be a boolean mask or a matrix, got {type(operator).__name__} "
            "(for functions, whose C_y is no DPLR, condition_mean gives the mean)"
        )
    problem = _problem(where, y, operator, noise_std)
    mean, covariance = _moments(where, posterior)
    shift, law = _dense(where, problem, covariance, _residual(where, problem, mean))
    exact = law()
    rounded = exact.to(mean.dtype)
    if operator.dtype != torch.bool:
        # diag(d) - E E^T cancels, and float32 may keep no digit of it.
        variance = exact.diagonal()
        bad = ((rounded.diagonal() - variance).abs() > 0.1 * variance).any(1)
        _refuse(where, problem, bad, f"for {mean.dtype} to hold the posterior variances")
    return Posterior(mean + shift.reshape(mean.shape), rounded)


def condition_mean(
    posterior: Posterior,
    y: Tensor,
    operator: Operator,
    noise_std: float | Tensor,
    *,
    tolerance: float | None = None,
    max_iterations: int = 1000,
) -> Tensor:
    """E[x0 | x, y] = m + C A^T S^-1 (y - A m), for every kind of operator.

    Masks and matrices: as `condition`. Functions: conjugate gradients on the whitened system
    V^-1/2 S V^-1/2 = I + V^-1/2 A C A^T V^-1/2, whose condition number is 1 + |A C A^T| / noise^2;
    each iteration calls both functions once. Every sample stops by itself.

    Args:
        posterior, noise_std: as `condition`; with functions noise_std is a float or has the shape
            ydims of one measurement.
        y: measurements. Shape (B, *ydims), or (1, *ydims) for one shared by all samples.
        operator: as `condition`, or a pair (matvec, rmatvec): A from (B, *dims) to (B, *ydims), and
            its adjoint, each linear and sample by sample. <A v, u> = <v, A^T u> is checked once.
        tolerance: of the residual over the right side, both whitened, > 0. None is 1e-4 in float32,
            1e-6 in float64.
        max_iterations: of conjugate gradients, >= 1.

    Returns:
        As posterior.mean.

    Raises:
        TypeError, ValueError: as `condition`; functions that are not adjoint to each other.
        RuntimeError: no convergence.
    """
    where = "condition_mean"
    problem = _problem(where, y, operator, noise_std)
    tolerance = _check_stop(where, tolerance, max_iterations, problem.y)
    mean, covariance = _moments(where, posterior)
    residual = _residual(where, problem, mean)
    if isinstance(operator, Tensor):
        shift = _dense(where, problem, covariance, residual)[0]
    else:
        dims = tuple(mean.shape[1:])
        shift = _iterate(where, problem, covariance, residual, dims, tolerance, max_iterations)
    return mean + shift.reshape(mean.shape)


def guided(
    model: Model,
    y: Tensor,
    operator: Operator,
    noise_std: float | Tensor,
    schedule: Schedule,
    *,
    with_covariance: bool = True,
    tolerance: float | None = None,
    max_iterations: int = 1000,
) -> Model:
    """A model of p(x_t | y), for the samplers of `diffusion`, from a model of p(x_t).

        sigma s1' = sigma s1 + (alpha / sigma) shift,   diag(c') + F' diag(sign') F'^T = (alpha /
        sigma)^2 C_y,

    with `shift` and C_y of `condition` at every call: the first two moments of the model are
    matched, nothing is differentiated. Exact for Gaussian x0 with its exact scores; elsewhere the
    law of x0 | x_t is taken for Gaussian, an error that vanishes with sigma.

    Args:
        model: `model(x, sigma) -> Scores`.
        y, operator, noise_std, tolerance, max_iterations: as `condition_mean`. With y of B rows
            every call must have B rows: no chunk_size in the samplers.
        schedule: a `Schedule`: the alpha that goes with sigma.
        with_covariance: False: the score alone and c = NaN, which `reverse_sde`,
            `probability_flow_ode` and first-order correctors do not look at and second-order steps
            refuse. The only choice for an operator of functions, whose C_y is no DPLR.

    Returns:
        A function (x, sigma) -> Scores. It raises what `condition_mean` and the model raise.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range; a model with active
            dropout.

    References:
        Boys et al. 2023, arXiv:2310.06721 (moment matching, there by backprop); Song et al. 2023,
        Pseudoinverse-guided diffusion (C = r^2 I, the score by backprop).
    """
    where = "guided"
    refuse_dropout(where, model)
    check_schedule(where, schedule)
    check_kind(where, "with_covariance", with_covariance, bool)
    rule = "with_covariance must be False for an operator of functions (C_y is no DPLR)"
    check(where, not (with_covariance and isinstance(operator, tuple)), rule, True)
    problem = _problem(where, y, operator, noise_std)
    tolerance = _check_stop(where, tolerance, max_iterations, problem.y)

    def conditioned(x: Tensor, sigma: Tensor | float, /) -> Scores:
        check_samples(where, "x", x)
        scores = model_scores(where, model, x, sigma)
        level = positive(where, "sigma", sigma, x)
        alpha = schedule.alpha(schedule.t_of_sigma(sigma))
        ratio = positive(where, "alpha", alpha, x) / level
        mean, spread = _moments(where, posterior(x, scores, sigma, alpha))
        residual = _residual(where, problem, mean)
        c, factor, sign = torch.full_like(x, torch.nan), None, None
        if isinstance(operator, Tensor):
            shift, law = _dense(where, problem, spread, residual)
            if with_covariance:
                scaled = law().to(x.dtype).scale(ratio.square().flatten())
                c, factor, sign = scaled.diag.reshape(x.shape), scaled.factor, scaled.sign
        else:
            dims = tuple(x.shape[1:])
            shift = _iterate(where, problem, spread, residual, dims, tolerance, max_iterations)
        return Scores(scores.scaled_score + ratio * shift.reshape(x.shape), c, factor, sign)

    return conditioned


# ------------------------------------------------------------------------------- the measurement


class _Problem(NamedTuple):
    """A measurement that has been checked by itself."""

    y: Tensor  # (B or 1, *ydims)
    operator: Operator  # a matrix in float64
    variance: Tensor  # of each measurement, (m,), float64

    def forward(self, where: str, v: Tensor) -> Tensor:
        """A v, flattened, for v (B, *dims); float64 where A is a matrix."""
        if not isinstance(self.operator, Tensor):
            out = self.operator[0](v)
            shape = (len(v), *self.y.shape[1:])
            check_tensor(where, "matvec(x)", out, like=self.y, shape=shape, because=" like y")
            return out.flatten(1)
        if self.operator.dtype == torch.bool:
            return v[:, self.operator]
        return v.double().flatten(1) @ self.operator.mT

    def adjoint(self, where: str, u: Tensor, dims: tuple[int, ...] | None) -> Tensor:
        """A^T u as functions give it, (B, *dims), for u (B, m); dims of None: not known yet."""
        assert isinstance(self.operator, tuple)
        out = self.operator[1](u.reshape(len(u), *self.y.shape[1:]))
        shape = None if dims is None else (len(u), *dims)
        check_tensor(where, "rmatvec(y)", out, like=self.y, shape=shape)
        return out


def _problem(where: str, y: Tensor, operator: Operator, noise_std: float | Tensor) -> _Problem:
    """All checks that need no x."""
    check_samples(where, "y", y)
    if isinstance(operator, Tensor):
        _check_dense_operator(where, y, operator)
    else:
        pair = isinstance(operator, tuple) and len(operator) == 2 and all(map(callable, operator))
        rule = "operator must be a matrix, a boolean mask or two functions (matvec, rmatvec)"
        check(where, pair, rule, type(operator).__name__, TypeError)
    finite = y.isfinite()
    check(where, bool(finite.all()), "y must be finite", lambda: y[~finite][0].item())
    variance = _variances(where, y, noise_std)
    if isinstance(operator, Tensor):
        return _Problem(
            y, operator if operator.dtype == torch.bool else operator.double(), variance
        )
    problem = _Problem(y, operator, variance)
    _check_adjoint(where, problem)
    return problem


def _check_dense_operator(where: str, y: Tensor, operator: Tensor) -> None:
    """A mask or a matrix, with as many measurements as y has."""
    if operator.dtype == torch.bool:
        count, rows = int(operator.sum()), "true entries in the mask"
    else:
        check_tensor(where, "operator", operator, like=y, because=" like y")
        rule = "operator must be a matrix (m, D) or a boolean mask"
        check(where, operator.dim() == 2, rule, f"shape {tuple(operator.shape)}")
        finite = operator.isfinite()
        rule = "operator must be finite"
        check(where, bool(finite.all()), rule, lambda: operator[~finite][0].item())
        count, rows = operator.shape[0], "rows of the matrix"
    check(where, operator.device == y.device, f"operator must be on {y.device}", operator.device)
    rule, shape = f"y must have shape (B, {count}) for {count} {rows}", tuple(y.shape)
    check(where, shape[1:] == (count,), rule, shape)


def _variances(where: str, y: Tensor, noise_std: float | Tensor) -> Tensor:
    """The variance of each measurement (m,), float64."""
    if not isinstance(noise_std, Tensor) or noise_std.dim() == 0:
        std = check_number(where, "noise_std", noise_std)
        return y.new_full((y.shape[1:].numel(),), std**2, dtype=torch.float64)
    shape, because = tuple(y.shape[1:]), " as one measurement"
    check_tensor(where, "noise_std", noise_std, like=y, shape=shape, because=because)
    good = (noise_std > 0) & noise_std.isfinite()
    rule = "noise_std must be finite and > 0"
    check(where, bool(good.all()), rule, lambda: f"{noise_std[~good][0].item():g}")
    return noise_std.flatten().double().square()


def _check_adjoint(where: str, problem: _Problem) -> None:
    """<A v, u> = <v, A^T u> for one random u and v."""
    y = problem.y

    u = draw_normal(Key(0, 0), STREAM_ADJOINT, (1, len(problem.variance)), y)
    back = problem.adjoint(where, u, None)
    v = draw_normal(Key(0, 1), STREAM_ADJOINT, back.shape, y)
    there = problem.forward(where, v)
    left, right = float((there * u).sum()), float((v * back).sum())
    # Far above the rounding of either side, below what two unrelated operators give by chance.
    size = float(there.norm() * u.norm() + v.norm() * back.norm())
    adjoint = abs(left - right) <= torch.finfo(y.dtype).eps ** 0.5 * size
    got = f"<A v, u> = {left:g} and <v, A^T u> = {right:g} for random u, v"
    check(where, adjoint, "rmatvec must be the adjoint of matvec", got)


def _moments(where: str, posterior: Posterior) -> tuple[Tensor, DPLR]:
    """Mean and covariance, the latter finite and not negative."""
    mean, covariance = check_kind(where, "posterior", posterior, Posterior)
    diag, factor, of = covariance.diag, covariance.factor, "of the posterior covariance"
    for part, value in (("diagonal part", diag), ("factor", factor)):
        # A finite sum shows it too, several times faster.
        finite = bool(value.sum().isfinite()) or bool(value.isfinite().all())
        check(where, finite, f"{part} {of} must be finite", partial(_not_finite, value))
    low = diag < 0
    check(
        where,
        not bool(low.any()),
        f"diagonal part {of} must be at least 0",
        lambda: f"{diag[low][0].item():g} for sample {_first_of(low.any(1))}",
    )
    if covariance.sign is not None and bool((covariance.sign < 0).any()):
        bad = ~covariance.is_positive_definite()
        check(
            where,
            not bool(bad.any()),
            "the posterior covariance must be positive definite",
            lambda: f"one that is not for sample {_first_of(bad)}",
        )
    return mean, covariance


def _not_finite(value: Tensor) -> float:
    return value[~value.isfinite()][0].item()


def _first_of(bad: Tensor) -> int:
    return int(bad.nonzero()[0])


def _residual(where: str, problem: _Problem, mean: Tensor) -> Tensor:
    """y - A m, shape (B, m), after the checks that need an x; float64 unless A is functions."""
    y, operator = problem.y, problem.operator
    check_tensor(where, "y", y, like=mean, because=" like x")
    check(
        where,
        len(y) in (1, len(mean)),
        f"y must have 1 row or {len(mean)} like x",
        f"{len(y)} (a sampler's chunk_size must not split the rows)",
    )
    if not isinstance(operator, Tensor):
        return y.flatten(1) - problem.forward(where, mean)
    dims, shape = tuple(mean.shape[1:]), tuple(operator.shape)
    if operator.dtype == torch.bool:
        check(where, shape == dims, f"operator must be a mask of shape {dims} like one x", shape)
    else:
        size = mean.shape[1:].numel()
        rule = f"operator must have {size} columns for x of dims {dims}"
        check(where, shape[1] == size, rule, shape[1])
    return y.double().flatten(1) - problem.forward(where, mean)


# ---------------------------------------------------------------------------------- closed forms


def _dense(
    where: str, problem: _Problem, covariance: DPLR, residual: Tensor
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
        _refuse(where, problem, size.amin(1) <= rounding)
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


def _cholesky(where: str, problem: _Problem, matrix: Tensor) -> Tensor:
    """L of N or K, refused where a pivot is no more than the rounding of its entry."""
    root: Tensor
    root, info = torch.linalg.cholesky_ex(matrix)
    entry, pivot = (a.diagonal(dim1=1, dim2=2) for a in (matrix, root))
    rounding = matrix.shape[1] * torch.finfo(matrix.dtype).eps * entry
    _refuse(where, problem, (info != 0) | ~(pivot.square() > rounding).all(1))
    return root


def _refuse(
    where: str, problem: _Problem, bad: Tensor, why: str = "to be told from rounding in float64"
) -> None:
    """Raises for the first sample that is bad (B,): it takes a noise too small to be resolved."""
    check(
        where,
        not bool(bad.any()),
        f"noise_std must be large enough {why}",
        lambda: f"{problem.variance.min().sqrt().item():g} for sample {_first_of(bad)}",
    )


# --------------------------------------------------------------------------- conjugate gradients


def _iterate(
    where: str,
    problem: _Problem,
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

    solution, _ = _conjugate_gradients(where, matvec, scale * residual, tolerance, max_iterations)
    return spread(solution)


def _conjugate_gradients(
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


def _check_stop(where: str, tolerance: float | None, max_iterations: int, y: Tensor) -> float:
    """The tolerance, after checks of both."""
    check_count(where, "max_iterations", max_iterations)
    if tolerance is None:
        return 1e-4 if y.dtype == torch.float32 else 1e-6
    return check_number(where, "tolerance", tolerance)
