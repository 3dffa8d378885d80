"""One step of a chain: from scores at x to the next state, for every method of `samplers.sample`.

With A the Hessian s2 after its curvature treatment, h the step size (eps / 2 of Meng et al. 2021):

    langevin   x + h s1 + sqrt(2 h) z
    ozaki      x + h phi1(h A) s1 + sqrt(2 h phi1(2 h A)) z,      phi1(y) = (e^y - 1) / y
    cayley     x + (I - h A / 2)^-1 (h s1 + sqrt(2 h) z)

"ozaki" takes the diagonal of s2 for A; "ozaki_full", "ozaki_isotropic" and "ozaki_lanczos" are
three ways to the whole of it. A Metropolis-adjusted step draws from the same normal law, whose
density it needs: all but Lanczos have one in closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..checks import show
from ..linalg.dplr import DPLR
from ..linalg.jacobian import ScoreHessian
from ..linalg.lanczos import LanczosResult, lanczos
from ..linalg.operator import hessian_of
from ..linalg.spectrum import (
    Function,
    Spectrum,
    check_symmetric,
    dense_spectrum,
    isotropic_spectrum,
    matrix_rows,
    spectrum_apply,
    spectrum_logdet,
)
from ..ops.reference import phi1, treat_curvature
from ..random import STREAM_ACCEPT
from ..scores import (
    AnyScores,
    DenseScores,
    MatrixFreeScores,
    ScoreFn,
    SymmetricOperator,
    UnscaledScores,
)
from ..scores import LogDensity as LogDensity

ScoreFunction: TypeAlias = ScoreFn


class Point(NamedTuple):
    """A batch of states with what the user's functions gave there."""

    x: Tensor  # (B, *dims)
    scores: AnyScores
    log_prob: Tensor | None  # (B,)


class Transition(NamedTuple):
    """The normal law of the next state, flat (B, D), given the present one."""

    draw: Callable[[Tensor], Tensor]  # standard normals -> the next state
    log_density: Callable[[Tensor], Tensor]  # the next state -> log density + D/2 log(2 pi), (B,)


class Lanczos(NamedTuple):
    """How a Lanczos step went, each (B,)."""

    error: Tensor  # the larger relative error estimate of drift and noise
    iterations: Tensor  # products with the Hessian, drift and noise together
    converged: Tensor


# ------------------------------------------------------------------------------------- evaluation


def evaluate(
    score_fn: ScoreFunction,
    x: Tensor,
    method: str,
    log_prob: LogDensity | None = None,
    *,
    first: bool = True,
) -> Point:
    """The scores (and log density) at x, checked; the values of signs at the first call alone."""
    scores = score_fn(x)
    if isinstance(scores, UnscaledScores):
        _check_low_rank(scores, x, first)
    elif isinstance(scores, DenseScores):
        _check_dense(scores, x)
        if method in ("mala", "mh_ozaki", "ozaki_lanczos"):  # others use `dense_spectrum`
            check_symmetric("sample: hessian from score_fn", scores.hessian)
    elif isinstance(scores, MatrixFreeScores) and method in ("langevin", "ozaki_lanczos"):
        _check_like_x("score", scores.score, x)
        _check_products(scores.hessian, x)
    elif method in ("langevin", "mala"):
        _check_like_x("score", scores, x)
    else:
        raise TypeError(
            "sample: score_fn must return UnscaledScores(score, diag, factor) or"
            f" DenseScores(score, hessian) for method {method!r}, got {type(scores).__name__}"
        )
    return Point(x, scores, None if log_prob is None else _check_log_prob(log_prob(x), x))


def _check_low_rank(scores: UnscaledScores, x: Tensor, first: bool) -> None:
    _check_like_x("score", scores.score, x)
    _check_like_x("diag", scores.diag, x)
    factor, sign, size = scores.factor, scores.sign, x.shape[1:].numel()
    if factor is None:
        return
    if not isinstance(factor, Tensor) or factor.shape[:-1] != (len(x), size):
        raise ValueError(
            f"sample: factor from score_fn must have shape ({len(x)}, {size}, r), "
            f"got {show(factor)}"
        )
    _check_kind("factor", factor, x)
    if sign is None:
        return
    if not isinstance(sign, Tensor):
        raise TypeError(f"sample: sign from score_fn must be a tensor, got {type(sign).__name__}")
    if sign.shape != factor.shape[-1:]:
        raise ValueError(
            f"sample: sign from score_fn must have shape {tuple(factor.shape[-1:])} (one for "
            f"each column), got {tuple(sign.shape)}"
        )
    if sign.device != x.device:
        raise ValueError(f"sample: sign from score_fn must be on {x.device}, got {sign.device}")
    if first and not bool((sign.abs() == 1).all()):
        raise ValueError(f"sample: sign from score_fn must hold +1 or -1, got {sign.tolist()}")


def _check_dense(scores: DenseScores, x: Tensor) -> None:
    _check_like_x("score", scores.score, x)
    hessian, size = scores.hessian, x.shape[1:].numel()
    if not isinstance(hessian, Tensor) or hessian.shape != (len(x), size, size):
        raise ValueError(
            f"sample: hessian from score_fn must have shape ({len(x)}, {size}, {size}), "
            f"got {show(hessian)}"
        )
    _check_kind("hessian", hessian, x)


def _check_products(hessian: object, x: Tensor) -> None:
    size = x.shape[1:].numel()
    if not isinstance(hessian, ScoreHessian):
        raise TypeError(
            f"sample: hessian from score_fn must be a ScoreHessian, got {type(hessian).__name__}"
        )
    if tuple(hessian.shape) != (len(x), size, size):
        raise ValueError(
            f"sample: hessian from score_fn must have shape ({len(x)}, {size}, {size}), got "
            f"{tuple(hessian.shape)}"
        )
    _check_kind("hessian", hessian, x)


def _check_log_prob(value: object, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != x.shape[:1] or not value.is_floating_point():
        raise ValueError(
            f"sample: log_prob must return floating point of shape ({len(x)},), got {show(value)}"
        )
    return value


def _check_like_x(name: str, value: object, x: Tensor) -> None:
    """Refuse a score or diagonal that does not match x."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"sample: {name} from score_fn must be a tensor, got {type(value).__name__}"
        )
    if value.shape != x.shape:
        raise ValueError(
            f"sample: {name} from score_fn must have shape {tuple(x.shape)} like x, "
            f"got {tuple(value.shape)}"
        )
    _check_kind(name, value, x)


def _check_kind(name: str, value: Tensor | ScoreHessian, x: Tensor) -> None:
    if value.dtype != x.dtype or value.device != x.device:
        raise ValueError(
            f"sample: {name} from score_fn must be {x.dtype} on {x.device} like x, "
            f"got {value.dtype} on {value.device}"
        )


def score_of(here: Point) -> Tensor:
    return here.scores if isinstance(here.scores, Tensor) else here.scores.score


def _diagonal(here: Point) -> Tensor:
    """The curvature along each coordinate: the diagonal of s2, not the D of D + U U^T."""
    return _hessian(here).diagonal().reshape(here.x.shape)


def _hessian(here: Point) -> SymmetricOperator:
    hessian = hessian_of(here.scores)
    assert hessian is not None  # `evaluate` saw to it
    return hessian


# ------------------------------------------------------------------------------------ transitions


def transition(method: str, here: Point, step_size: float | Tensor, curvature: str) -> Transition:
    """The law of the next state under a method whose normal law has a closed form."""
    x, score = here.x.flatten(1), score_of(here).flatten(1)
    h = torch.as_tensor(step_size, dtype=x.dtype, device=x.device).reshape(-1, 1)
    if method == "langevin":
        return _diagonal_law(x + h * score, (2 * h).sqrt().expand_as(x))
    if method == "ozaki":
        y = h * treat_curvature(_diagonal(here).flatten(1), curvature)
        return _diagonal_law(x + h * phi1(y) * score, (2 * h * phi1(2 * y)).sqrt())
    hessian = _hessian(here)
    if method == "ozaki_cayley" and isinstance(hessian, DPLR):
        return _woodbury_law(x, score, hessian, h, curvature)
    if method == "ozaki_isotropic":
        spectrum = _isotropic(hessian)
    else:
        spectrum = dense_spectrum(hessian.dense(), where="sample: hessian from score_fn")
    drift, noise = _spectral_functions(method, h, curvature)
    return _spectral_law(x, score, spectrum, drift, noise)


def _spectral_functions(method: str, h: Tensor, curvature: str) -> tuple[Function, Function]:
    """The functions of an eigenvalue that multiply s1 and z."""
    if method == "ozaki_cayley":

        def inverse(values: Tensor) -> Tensor:
            return _positive_or_nan(1 - h * treat_curvature(values, curvature) / 2).reciprocal()

        return lambda v: h * inverse(v), lambda v: (2 * h).sqrt() * inverse(v)
    return (
        lambda v: h * phi1(h * treat_curvature(v, curvature)),
        lambda v: (2 * h * phi1(2 * h * treat_curvature(v, curvature))).sqrt(),
    )


def _diagonal_law(mean: Tensor, std: Tensor) -> Transition:
    def log_density(y: Tensor) -> Tensor:
        return -(((y - mean) / std).square() / 2 + std.log()).sum(1)

    return Transition(lambda z: mean + std * z, log_density)


def _spectral_law(
    x: Tensor, score: Tensor, spectrum: Spectrum, drift: Function, noise: Function
) -> Transition:
    mean = x + spectrum_apply(spectrum, drift, score)

    def draw(z: Tensor) -> Tensor:
        return mean + spectrum_apply(spectrum, noise, z)

    def log_density(y: Tensor) -> Tensor:
        white = spectrum_apply(spectrum, lambda v: noise(v).reciprocal(), y - mean)
        return -white.square().sum(1) / 2 - spectrum_logdet(spectrum, noise)

    return Transition(draw, log_density)


def _woodbury_law(x: Tensor, score: Tensor, hessian: DPLR, h: Tensor, curvature: str) -> Transition:
    """Cayley: K = I - h A / 2 is diagonal plus low rank, and one Woodbury solve is a step."""
    parts = _cayley_kernels(hessian, h.expand(len(x), 1), curvature)
    root = (2 * h).sqrt()

    def draw(z: Tensor) -> Tensor:
        push, new = h * score + root * z, torch.full_like(x, torch.nan)
        for rows, kernel in parts:
            new[rows] = x[rows] + kernel.solve(push[rows])
        return new

    def log_density(y: Tensor) -> Tensor:
        moved, value = y - x, torch.full_like(x[:, 0], torch.nan)
        push, scale = h * score, root.expand(len(x), 1)
        for rows, kernel in parts:
            white = (kernel.matvec(moved[rows]) - push[rows]) / scale[rows]
            volume = kernel.logdet() - x.shape[1] * scale[rows, 0].log()
            value[rows] = volume - white.square().sum(1) / 2
        return value

    return Transition(draw, log_density)


def _cayley_kernels(hessian: DPLR, h: Tensor, curvature: str) -> list[tuple[Tensor, DPLR]]:
    """K = I - h A / 2 > 0 for the rows of the batch that have one; (row numbers, K) in groups.

    "raw" has one where h s2 < 2. Where s2 is negative definite A = s2; elsewhere `_treated_kernel`.
    """
    half = h / 2
    sign = hessian.diag.new_ones(hessian.rank) if hessian.sign is None else hessian.sign
    shape = half.sqrt().unsqueeze(-1) * hessian.factor
    size = _bounded(hessian.diag, half)
    v = hessian.factor / size.sqrt().unsqueeze(-1)
    total = (half * hessian.diag).square() + v.square().sum(-1) + shape.square().sum(-1)
    rows = total.sum(1).isfinite().nonzero().squeeze(1)
    diag, shape, half = hessian.diag[rows], shape[rows], half[rows]
    plain = DPLR.of(1 - half * diag, shape, -sign)
    if curvature == "raw":
        good = plain.is_positive_definite().nonzero().squeeze(1)
        return [(rows[good], plain.rows(good))]
    negative = DPLR.of(-half * diag, shape, -sign).is_positive_definite()
    kept, rest = negative.nonzero().squeeze(1), (~negative).nonzero().squeeze(1)
    groups = [(rows[kept], plain.rows(kept))]
    if len(rest):
        at = rows[rest]
        kernel = _treated_kernel(diag[rest] <= 0, size[at], v[at], sign, half[rest], curvature)
        groups.append((at, kernel))
    return groups


def _treated_kernel(
    down: Tensor, size: Tensor, v: Tensor, sign: Tensor, half: Tensor, curvature: str
) -> DPLR:
    """K = I - half A, A <= 0 the Hessian s2 = diag(d) + U S U^T treated by congruence.

    down is d <= 0, size the diagonal of E and v is V, of what follows.

    The eigenvalues of s2 are not at hand. With E = |d| (bounded away from 0), V = E^-1/2 U and
    J = diag(-sign d),
        s2 = -E^1/2 N E^1/2,  N = J - V S V^T,    A = -E^1/2 f(N) E^1/2,
    f the positive part ("clamp") or the modulus ("abs"). A is s2 itself if s2 <= 0, continuous in
    s2, and what the spectral treatment gives where that commutes with E. N is J but on the span Q
    of the columns of V, those of each sign of d by themselves:
        f(N) = f(J) + Q (f(Q^T N Q) - Q^T f(J) Q) Q^T.
    """
    sides = [_span(v.where(side.unsqueeze(-1), 0.0)) for side in (down, ~down)]
    q = torch.cat(sides, -1)
    j = torch.where(down, 1.0, -1.0).to(size)
    fj = torch.where(down, 1.0, 1.0 if curvature == "abs" else 0.0).to(size)
    inside = q.mT @ v
    values, vectors = torch.linalg.eigh(q.mT @ (j.unsqueeze(-1) * q) - (inside * sign) @ inside.mT)
    values = values.abs() if curvature == "abs" else values.clamp_min(0)
    change = (vectors * values.unsqueeze(1)) @ vectors.mT - q.mT @ (fj.unsqueeze(-1) * q)
    weight, rotation = torch.linalg.eigh(change)
    columns = (half * size).sqrt().unsqueeze(-1) * (q @ rotation)
    # Signs are shared by the batch, those of the weights are not: one set of columns for each.
    both = [columns * w.clamp_min(0).sqrt().unsqueeze(1) for w in (weight, -weight)]
    ones = torch.ones_like(weight[0])
    return DPLR.of(1 + half * size * fj, torch.cat(both, -1), torch.cat([ones, -ones]))


def _bounded(diag: Tensor, half: Tensor) -> Tensor:
    """|d|, at least sqrt(eps) / h: what that changes in h d is lost in rounding."""
    floor = torch.finfo(diag.dtype).eps ** 0.5 / (2 * half)
    return torch.maximum(diag.abs(), floor.expand_as(diag))


def _span(v: Tensor) -> Tensor:
    """Orthonormal columns (B, D, m) with the span of those of v, zero beyond its rank."""
    basis, values = torch.linalg.svd(v, full_matrices=False)[:2]
    least = torch.finfo(v.dtype).eps * max(v.shape[1:]) * values[:, :1]
    kept: Tensor = basis * ((values > least) & (values > 0)).unsqueeze(1)
    return kept


def _isotropic(hessian: SymmetricOperator) -> Spectrum:
    if not isinstance(hessian, DPLR):
        raise TypeError(
            "sample: score_fn must return UnscaledScores(score, diag, factor) for method "
            "'ozaki_isotropic', got DenseScores"
        )
    return isotropic_spectrum(
        hessian.diag, hessian.factor, hessian.sign, where="sample: scores from score_fn"
    )


def _positive_or_nan(value: Tensor) -> Tensor:
    """NaN where a Cayley step does not exist: the chain then counts as diverged."""
    return torch.where(value > 0, value, torch.nan)


# ------------------------------------------------------------------------------------------ steps


def unadjusted_step(
    method: str,
    score_fn: ScoreFunction,
    x: Tensor,
    out: Tensor,
    *,
    step_size: float | Tensor,
    curvature: str,
    seed: int,
    offset: int,
    first: int,
    tolerance: float,
    max_iterations: int | None,
    at_start: bool,
) -> Lanczos | None:
    """One step from x into out."""
    here = evaluate(score_fn, x, method, first=at_start)
    score = score_of(here)
    if method == "langevin":
        ops.langevin_step(x, score, step_size, seed=seed, offset=offset, first=first, out=out)
        return None
    if method == "ozaki":
        ops.ozaki_step(
            x,
            score,
            _diagonal(here),
            step_size,
            seed=seed,
            offset=offset,
            first=first,
            curvature=curvature,
            out=out,
        )
        return None
    z = _normals(x, seed, offset, first)
    if method == "ozaki_lanczos":
        new, report = _lanczos_step(here, z, step_size, curvature, tolerance, max_iterations)
    else:
        new, report = transition(method, here, step_size, curvature).draw(z), None
    out.copy_(new.view(x.shape))
    return report


def _normals(x: Tensor, seed: int, offset: int, first: int) -> Tensor:
    """The standard normals of a step, flat (B, D)."""
    z = ops.normal(x.shape, seed=seed, offset=offset, first=first, dtype=x.dtype, device=x.device)
    return z.flatten(1)


def _lanczos_step(
    here: Point,
    z: Tensor,
    step_size: float | Tensor,
    curvature: str,
    tolerance: float,
    max_iterations: int | None,
) -> tuple[Tensor, Lanczos]:
    """The full Ozaki step with products by s2 alone: one Krylov space for s1, one for z."""
    x = here.x.flatten(1)
    h = torch.as_tensor(step_size, dtype=x.dtype, device=x.device).reshape(-1, 1)
    rows = matrix_rows(_hessian(here), step_size)

    def drift(y: Tensor) -> Tensor:
        return phi1(treat_curvature(y, curvature))

    def noise(y: Tensor) -> Tensor:
        return phi1(2 * treat_curvature(y, curvature)).sqrt()

    def apply(function: Function, v: Tensor) -> LanczosResult:
        return lanczos(rows, v, [function], tolerance=tolerance, max_iterations=max_iterations)

    push, spread = apply(drift, score_of(here).flatten(1)), apply(noise, z)
    report = Lanczos(
        torch.maximum(push.error, spread.error),
        push.iterations + spread.iterations,
        push.converged & spread.converged,
    )
    return x + h * push.values[0] + (2 * h).sqrt() * spread.values[0], report


def metropolis_step(
    method: str,
    score_fn: ScoreFunction,
    log_prob: LogDensity | None,
    here: Point,
    *,
    step_size: float | Tensor,
    curvature: str,
    seed: int,
    offset: int,
    first: int,
) -> tuple[Point, Tensor, Tensor]:
    """One Metropolis-adjusted step: the next point, the acceptance probability, and divergences.

    The log ratio is log p(x') - log p(x) + log q(x | x') - log q(x' | x); without `log_prob`, its
    first difference is the trapezoid rule along the segment, corrected by its end slopes:
        (s1 + s1') . dx / 2 - dx^T (s2' - s2) dx / 12,
    in error by O(|dx|^5) (without s2, the plain rule: O(|dx|^3)). A proposal that is not finite, or
    whose ratio is NaN, is rejected and marked.
    """
    x = here.x
    proposal = method.removeprefix("mh_").replace("mala", "langevin")
    forward = transition(proposal, here, step_size, curvature)
    new = forward.draw(_normals(x, seed, offset, first))
    finite = new.isfinite().all(1)
    # The user's functions see no proposal that is not finite.
    new = torch.where(finite.unsqueeze(1), new, x.flatten(1))
    there = evaluate(score_fn, new.view(x.shape), method, log_prob, first=False)
    backward = transition(proposal, there, step_size, curvature)
    ratio = log_ratio(forward, backward, here, there)
    lost = ratio.isnan() | ~finite
    probability = torch.where(lost, 0.0, ratio.double().clamp_max(0).exp())
    u = ops.uniform(
        x.shape[:1],
        seed=seed,
        offset=offset,
        first=first,
        stream=STREAM_ACCEPT,
        dtype=torch.float64,
        device=x.device,
    )
    return _choose(u < probability, there, here), probability, lost


def log_ratio(forward: Transition, backward: Transition, here: Point, there: Point) -> Tensor:
    """log of p(there) q(here | there) / (p(here) q(there | here)), shape (B,)."""
    x, y = here.x.flatten(1), there.x.flatten(1)
    proposals = backward.log_density(x) - forward.log_density(y)
    return proposals + _log_prob_difference(here, there)


def _log_prob_difference(here: Point, there: Point) -> Tensor:
    """log p(there) - log p(here), or its estimate from scores alone."""
    if here.log_prob is not None and there.log_prob is not None:
        return there.log_prob - here.log_prob
    dx = (there.x - here.x).flatten(1)
    difference = ((score_of(here) + score_of(there)).flatten(1) * dx).sum(1) / 2
    before, after = hessian_of(here.scores), hessian_of(there.scores)
    if before is None or after is None:
        return difference
    return difference - (dx * (after.matvec(dx) - before.matvec(dx))).sum(1) / 12


def own(here: Point) -> Point:
    """The point in memory of its own: a captured graph reuses its outputs at the next call."""
    return _choose(torch.ones(len(here.x), dtype=torch.bool, device=here.x.device), here, here)


def _choose(accept: Tensor, there: Point, here: Point) -> Point:
    """`there` in the accepted rows, `here` in the others, in memory of its own."""

    def pick(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(accept.reshape(-1, *[1] * (new.dim() - 1)), new, old)

    log_prob = None
    if there.log_prob is not None and here.log_prob is not None:
        log_prob = pick(there.log_prob, here.log_prob)
    return Point(pick(there.x, here.x), _pick_scores(pick, there.scores, here.scores), log_prob)


def _pick_scores(
    pick: Callable[[Tensor, Tensor], Tensor], new: AnyScores, old: AnyScores
) -> AnyScores:
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return pick(new, old)
    if isinstance(new, DenseScores) and isinstance(old, DenseScores):
        return DenseScores(pick(new.score, old.score), pick(new.hessian, old.hessian))
    if isinstance(new, UnscaledScores) and isinstance(old, UnscaledScores):
        factor = None
        if new.factor is not None and old.factor is not None:
            factor = pick(new.factor, old.factor)
        score, diag = pick(new.score, old.score), pick(new.diag, old.diag)
        return UnscaledScores(score, diag, factor, new.sign)
    raise TypeError(
        "sample: score_fn must return the same kind of scores at every call, got "
        f"{type(new).__name__} after {type(old).__name__}"
    )
