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

from . import ops
from .checks import show
from .dplr import DPLR, low_rank_eigh
from .matrix_functions import (
    Function,
    LanczosResult,
    Spectrum,
    dense_spectrum,
    isotropic_spectrum,
    lanczos,
    matrix_rows,
    spectrum_apply,
    spectrum_logdet,
)
from .reference import phi1, treat_curvature
from .tweedie import DenseScores, UnscaledScores

Scores: TypeAlias = Tensor | UnscaledScores | DenseScores
ScoreFunction: TypeAlias = Callable[[Tensor], Scores]
LogDensity: TypeAlias = Callable[[Tensor], Tensor]


class Point(NamedTuple):
    """A batch of states with what the user's functions gave there."""

    x: Tensor  # (B, *dims)
    scores: Scores
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
    score_fn: ScoreFunction, x: Tensor, method: str, log_prob: LogDensity | None = None
) -> Point:
    """The scores (and log density) at x, checked."""
    scores = score_fn(x)
    if isinstance(scores, UnscaledScores):
        _check_low_rank(scores, x)
    elif isinstance(scores, DenseScores):
        _check_dense(scores, x)
    elif method in ("langevin", "mala"):
        _check_like_x("score", scores, x)
    else:
        raise TypeError(
            "sample: score_fn must return UnscaledScores(score, diag, factor) or"
            f" DenseScores(score, hessian) for method {method!r}, got {type(scores).__name__}"
        )
    return Point(x, scores, None if log_prob is None else _check_log_prob(log_prob(x), x))


def _check_low_rank(scores: UnscaledScores, x: Tensor) -> None:
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
    if sign is not None and sign.shape != factor.shape[-1:]:
        raise ValueError(
            f"sample: sign from score_fn must have shape {tuple(factor.shape[-1:])} (one for "
            f"each column), got {tuple(sign.shape)}"
        )


def _check_dense(scores: DenseScores, x: Tensor) -> None:
    _check_like_x("score", scores.score, x)
    hessian, size = scores.hessian, x.shape[1:].numel()
    if not isinstance(hessian, Tensor) or hessian.shape != (len(x), size, size):
        raise ValueError(
            f"sample: hessian from score_fn must have shape ({len(x)}, {size}, {size}), "
            f"got {show(hessian)}"
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


def _check_kind(name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype != x.dtype or value.device != x.device:
        raise ValueError(
            f"sample: {name} from score_fn must be {x.dtype} on {x.device} like x, "
            f"got {value.dtype} on {value.device}"
        )


def _score(here: Point) -> Tensor:
    return here.scores if isinstance(here.scores, Tensor) else here.scores.score


def _diagonal(here: Point) -> Tensor:
    """The curvature along each coordinate: the diagonal of s2, not the D of D + U U^T."""
    scores = here.scores
    if isinstance(scores, DenseScores):
        return scores.hessian.diagonal(dim1=1, dim2=2).reshape(here.x.shape)
    assert isinstance(scores, UnscaledScores)  # `evaluate` saw to it
    if scores.factor is None:
        return scores.diag
    squares = scores.factor.square()
    if scores.sign is not None:
        squares = squares * scores.sign.to(squares.dtype)
    return scores.diag + squares.sum(-1).view(here.x.shape)


def _hessian(here: Point) -> DPLR | Tensor | None:
    """s2 as it came; None where only s1 did."""
    scores = here.scores
    if isinstance(scores, UnscaledScores):
        return DPLR(scores.diag.flatten(1), scores.factor, scores.sign)
    return scores.hessian if isinstance(scores, DenseScores) else None


def _matvec(hessian: DPLR | Tensor, v: Tensor) -> Tensor:
    if isinstance(hessian, DPLR):
        return hessian.matvec(v)
    return (hessian @ v.unsqueeze(-1)).squeeze(-1)


# ------------------------------------------------------------------------------------ transitions


def transition(method: str, here: Point, step_size: float | Tensor, curvature: str) -> Transition:
    """The law of the next state under a method whose normal law has a closed form."""
    x, score = here.x.flatten(1), _score(here).flatten(1)
    h = torch.as_tensor(step_size, dtype=x.dtype, device=x.device).reshape(-1, 1)
    if method == "langevin":
        return _diagonal_law(x + h * score, (2 * h).sqrt().expand_as(x))
    if method == "ozaki":
        y = h * treat_curvature(_diagonal(here).flatten(1), curvature)
        return _diagonal_law(x + h * phi1(y) * score, (2 * h * phi1(2 * y)).sqrt())
    hessian = _hessian(here)
    assert hessian is not None  # `evaluate` saw to it
    if method == "ozaki_cayley" and isinstance(hessian, DPLR):
        return _woodbury_law(x, score, hessian, h, curvature)
    if method == "ozaki_isotropic":
        spectrum = _isotropic(hessian)
    else:
        matrix = hessian.dense() if isinstance(hessian, DPLR) else hessian
        spectrum = dense_spectrum(matrix, where="sample: hessian from score_fn")
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
    kernel, good = _cayley_kernel(hessian, h, curvature)
    root = (2 * h).sqrt()
    lost = torch.where(good, 0.0, torch.nan).to(x.dtype).unsqueeze(1)

    def draw(z: Tensor) -> Tensor:
        push = torch.where(good.unsqueeze(1), h * score + root * z, 0.0)
        return x + kernel.solve(push) + lost

    def log_density(y: Tensor) -> Tensor:
        white = (kernel.matvec(y - x) - h * score) / root
        scale = kernel.logdet() - x.shape[1] * root.log().squeeze(1)
        return -white.square().sum(1) / 2 + scale + lost.squeeze(1)

    return Transition(draw, log_density)


def _cayley_kernel(hessian: DPLR, h: Tensor, curvature: str) -> tuple[DPLR, Tensor]:
    """K = I - h A / 2 > 0, and the rows where there is one; others hold the identity.

    "raw" has one where h s2 < 2. Where s2 is negative definite A = s2. Elsewhere the eigenvalues of
    a diagonal plus low-rank matrix are not at hand, and the treatment goes by congruence: with
    E = -min(d, 0) or |d| (bounded away from 0) and V = E^-1/2 U,
        s2 = -E^1/2 (I - V S V^T) E^1/2,    I - V S V^T -> its positive part, or its modulus,
    which leaves A <= 0, continuous in s2, and equal to the spectral treatment where they commute.
    """
    half = h / 2
    finite = (half * hessian.diag).isfinite().all(1)
    finite = finite & (half.unsqueeze(-1) * hessian.factor).isfinite().flatten(1).all(1)
    diag = torch.where(finite.unsqueeze(1), hessian.diag, -1.0)
    factor = torch.where(finite[:, None, None], hessian.factor, 0.0)
    sign = diag.new_ones(hessian.rank) if hessian.sign is None else hessian.sign
    shape = half.sqrt().unsqueeze(-1) * factor
    if curvature == "raw":
        kernel = DPLR(1 - half * diag, shape, -sign)
        good = finite & kernel.is_positive_definite()
        blank = good[:, None]
        kernel = DPLR(
            torch.where(blank, kernel.diag, 1.0), torch.where(blank.unsqueeze(1), shape, 0.0), -sign
        )
        return kernel, good
    negative = DPLR(-diag, factor, -sign).is_positive_definite().unsqueeze(1)
    floor = torch.finfo(diag.dtype).eps ** 0.5 / h
    size = diag.abs() if curvature == "abs" else -diag.clamp_max(0)
    size = torch.maximum(size, floor.expand_as(size))
    root = size.sqrt().unsqueeze(-1)
    basis, lam = low_rank_eigh(factor / root, sign)
    lam = 1 - (1 - lam).abs() if curvature == "abs" else lam.clamp_max(1)
    columns = half.sqrt().unsqueeze(-1) * root * basis
    # Signs are shared by the batch, but not those of lam: one set of columns for each.
    up = columns * lam.clamp_min(0).sqrt().unsqueeze(1)
    down = columns * (-lam).clamp_min(0).sqrt().unsqueeze(1)
    treated = torch.cat([shape * 0, up, down], -1)
    plain = torch.cat([shape, up * 0, down * 0], -1)
    ones = diag.new_ones(lam.shape[1])
    kernel = DPLR(
        1 + half * torch.where(negative, -diag, size),
        torch.where(negative.unsqueeze(-1), plain, treated),
        torch.cat([-sign, -ones, ones]),
    )
    return kernel, finite


def _isotropic(hessian: DPLR | Tensor) -> Spectrum:
    if isinstance(hessian, Tensor):
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
) -> Lanczos | None:
    """One step from x into out."""
    here = evaluate(score_fn, x, method)
    score = _score(here)
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
    x, hessian = here.x.flatten(1), _hessian(here)
    assert hessian is not None  # `evaluate` saw to it
    h = torch.as_tensor(step_size, dtype=x.dtype, device=x.device).reshape(-1, 1)
    rows = matrix_rows(hessian, step_size)

    def drift(y: Tensor) -> Tensor:
        return phi1(treat_curvature(y, curvature))

    def noise(y: Tensor) -> Tensor:
        return phi1(2 * treat_curvature(y, curvature)).sqrt()

    def apply(function: Function, v: Tensor) -> LanczosResult:
        return lanczos(rows, v, [function], tolerance=tolerance, max_iterations=max_iterations)

    push, spread = apply(drift, _score(here).flatten(1)), apply(noise, z)
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
    # The user's functions never see a state that is not finite.
    new = torch.where(finite.unsqueeze(1), new, x.flatten(1))
    there = evaluate(score_fn, new.view(x.shape), method, log_prob)
    backward = transition(proposal, there, step_size, curvature)
    ratio = log_ratio(forward, backward, here, there)
    lost = ratio.isnan() | ~finite
    probability = torch.where(lost, 0.0, ratio.double().clamp_max(0).exp())
    u = ops.uniform(
        x.shape[:1],
        seed=seed,
        offset=offset,
        first=first,
        stream=ops.STREAM_ACCEPT,
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
    difference = ((_score(here) + _score(there)).flatten(1) * dx).sum(1) / 2
    before, after = _hessian(here), _hessian(there)
    if before is None or after is None:
        return difference
    return difference - (dx * (_matvec(after, dx) - _matvec(before, dx))).sum(1) / 12


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


def _pick_scores(pick: Callable[[Tensor, Tensor], Tensor], new: Scores, old: Scores) -> Scores:
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
