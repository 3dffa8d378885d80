"""Markov chains driven by learned or exact scores of a density p.

`sample` holds the state, calls the user's `score_fn`, calls one step operator of `ops` and stores
every `thin`-th state. A step is one function of this file and one entry of `_STEPS`. Steps are in
MALA time: `step_size` is h, the drift h * score, the noise sqrt(2 h) z; the eps of Meng et al. 2021
(arXiv:2111.04726, Eqs. 19, 20) is 2 h. Noise depends on (seed, step, global chain) alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import ops
from .checks import require, show
from .tweedie import UnscaledScores

ScoreFunction = Callable[[Tensor], Tensor | UnscaledScores]


class ChainState(TypedDict):
    """What a run needs to go on; plain values, so `torch.save` and `weights_only=True` take it."""

    x: Tensor  # (chain, *dims), the last state of every chain
    step: int  # steps taken since the first init, burn-in included: the next noise offset
    since_draw: int  # steps since the last kept draw, < thin
    seed: int
    first_chain: int


class Chains(NamedTuple):
    """Draws with the chain axis first, statistics of the run, and the state to resume from."""

    draws: Tensor  # (chain, draw, *dims)
    stats: dict[str, Any]
    state: ChainState


def sample(
    score_fn: ScoreFunction,
    init: Tensor | None = None,
    *,
    method: str = "langevin",
    step_size: float | Tensor,
    n_steps: int,
    burn_in: int = 0,
    thin: int = 1,
    curvature: str = "clamp",
    seed: int | None = None,
    first_chain: int = 0,
    chunk_size: int | None = None,
    state: ChainState | None = None,
    progress: bool = False,
) -> Chains:
    """Run unadjusted Markov chains from `init`, all chains side by side.

    "langevin" (Eq. 19):  x' = x + h s1 + sqrt(2 h) z
    "ozaki" (Eq. 20):     x' = x + h phi1(h d) s1 + sqrt(2 h phi1(2 h d)) z,
                          elementwise with d the diagonal of s2, phi1(y) = (e^y - 1) / y

    h = `step_size` = eps / 2 in the paper's eps. On a Gaussian of precision P, "langevin" has the
    stationary covariance P^-1 (I - h P / 2)^-1 and is stable if h p_max < 2. "ozaki" keeps the
    Gaussian exactly for every h if P is diagonal. If not, the stationary covariance C solves
    C = A C A^T + S with A = I - M P, M = h phi1(-h diag P), S = 2 h phi1(-2 h diag P): it loses
    its correlations as h grows, and is stable for every h if P < 2 diag(P). Neither method is
    Metropolis-adjusted: on other densities both have a bias that vanishes with h.

    The noise of a step is a function of (seed, step, first_chain + row): any `chunk_size`, a run
    resumed from `state`, and chains split over processes with `first_chain` give the same chains;
    bitwise if the score of a row does not depend on the rows beside it (analytic densities), to
    rounding for networks.

    A chain whose state holds a NaN or an infinity has diverged. It is neither stopped nor
    restarted: a step only adds to the state, so that it stays non-finite, in `draws` too, and
    `stats` marks it (as it does a finite state whose sum overflows: it is about to diverge). The
    other chains are not affected.

    Args:
        score_fn: maps x of shape (rows, *dims) to the score s1 of the same shape, dtype and device
            ("langevin"), or to UnscaledScores, which "ozaki" needs for the diagonal of s2, low-rank
            part included. Called once a step, without gradients, with at most `chunk_size` rows.
            x is a buffer that later steps overwrite: clone it to keep it.
        init: start of every chain. Shape (chain, *dims), floating point. It is not changed. None if
            `state` is given.
        method: "langevin" or "ozaki".
        step_size: h > 0, in squared units of the data. Float, 0-d tensor, or one for each chain,
            shape (chain,), on the device of init.
        n_steps: steps after the burn-in. n_steps // thin draws are kept (see `state`).
        burn_in: steps thrown away first, counted in this call.
        thin: keep every thin-th state.
        curvature: what "ozaki" does with d > 0: "clamp" uses min(d, 0) (a Langevin step there),
            "abs" -|d|, "raw" d as it is (may overflow: a divergence). "langevin" ignores it.
        seed: key of the noise, 0 ... 2^64 - 1. None draws one from torch's default generator; it is
            in `state`.
        first_chain: global index of the first chain, for chains split over processes.
        chunk_size: chains run this many at a time, which bounds the memory of score_fn. None: all.
        state: `state` of earlier Chains: goes on from there, with its seed and its first_chain.
            60 steps and 40 more are 100 steps, the places of the draws included. The method and the
            step size may change; give the same ones to continue exactly.
        progress: shows a progress bar; needs rich, which `pip install hos_ext[app]` brings.

    Returns:
        Chains. `draws` has shape (chain, draw, *dims), the dtype and the device of init. `stats`
        has "method", "step_size", "n_score_evaluations" (for each chain), "divergences" (shape
        (chain,), the steps of this call that ended in a non-finite state) and "diverged" (shape
        (chain,), bool, the last state is non-finite). `state` resumes the run.

    Raises:
        ValueError: an argument out of range, an unknown method or curvature, a score of another
            shape, dtype or device than x.
        TypeError: an argument or a score of the wrong kind.
        RuntimeError: progress=True without rich.
    """
    step = _STEPS.get(method) if isinstance(method, str) else None
    if step is None:
        known = ", ".join(repr(name) for name in _STEPS)
        raise ValueError(f"sample: method must be one of {known}, got {method!r}")
    if curvature not in ("clamp", "abs", "raw"):
        raise ValueError(
            f"sample: curvature must be one of 'clamp', 'abs', 'raw', got {curvature!r}"
        )
    n_steps = _whole("n_steps", n_steps, 0)
    burn_in = _whole("burn_in", burn_in, 0)
    thin = _whole("thin", thin, 1)
    begin = _begin(init, seed, first_chain, state)
    x, first, seed = begin["x"], begin["first_chain"], begin["seed"]
    chains = x.shape[0]
    chunk = max(chains, 1) if chunk_size is None else _whole("chunk_size", chunk_size, 1)
    _check_step_size(step_size, x)

    since_draw = begin["since_draw"] % thin if burn_in == 0 else 0
    draws = x.new_empty((chains, (since_draw + n_steps) // thin, *x.shape[1:]))
    divergences = torch.zeros(chains, dtype=torch.int64, device=x.device)
    total = burn_in + n_steps
    with torch.no_grad(), _progress_bar(progress, method, total * -(-chains // chunk)) as advance:
        for low in range(0, chains, chunk):
            rows = slice(low, low + chunk)
            h = step_size[rows] if isinstance(step_size, Tensor) and step_size.dim() else step_size
            # Two buffers in turn: a fresh output for each step can cost more, in page faults,
            # than the step.
            current, spare, count = x[rows], torch.empty_like(x[rows]), divergences[rows]
            for k in range(total):
                step(
                    score_fn,
                    current,
                    spare,
                    step_size=h,
                    curvature=curvature,
                    seed=seed,
                    offset=begin["step"] + k,
                    first=first + low,
                )
                current, spare = spare, current
                count += _non_finite(current)
                draw, rest = divmod(since_draw + k + 1 - burn_in, thin)
                if k >= burn_in and rest == 0:
                    draws[rows, draw - 1] = current
                advance()
            if total % 2:
                x[rows] = current
    stats = {
        "method": method,
        "step_size": step_size,
        "n_score_evaluations": total,
        "divergences": divergences,
        "diverged": _non_finite(x),
    }
    end = ChainState(
        x=x,
        step=begin["step"] + total,
        since_draw=(since_draw + n_steps) % thin,
        seed=seed,
        first_chain=first,
    )
    return Chains(draws, stats, end)


# ------------------------------------------------------------------------------------------ steps


def _langevin(
    score_fn: ScoreFunction,
    x: Tensor,
    out: Tensor,
    *,
    step_size: float | Tensor,
    curvature: str,
    seed: int,
    offset: int,
    first: int,
) -> None:
    """One Langevin step (Eq. 19) from x into out."""
    scores = score_fn(x)
    score = scores.score if isinstance(scores, UnscaledScores) else scores
    _check_like_x("score", score, x)
    ops.langevin_step(x, score, step_size, seed=seed, offset=offset, first=first, out=out)


def _ozaki(
    score_fn: ScoreFunction,
    x: Tensor,
    out: Tensor,
    *,
    step_size: float | Tensor,
    curvature: str,
    seed: int,
    offset: int,
    first: int,
) -> None:
    """One diagonal Ozaki step (Eq. 20) from x into out."""
    scores = score_fn(x)
    if not isinstance(scores, UnscaledScores):
        raise TypeError(
            "sample: score_fn must return UnscaledScores(score, diag, factor) for method 'ozaki', "
            f"got {type(scores).__name__}"
        )
    _check_like_x("score", scores.score, x)
    _check_like_x("diag", scores.diag, x)
    ops.ozaki_step(
        x,
        scores.score,
        _hessian_diagonal(scores, x),
        step_size,
        seed=seed,
        offset=offset,
        first=first,
        curvature=curvature,
        out=out,
    )


def _hessian_diagonal(scores: UnscaledScores, x: Tensor) -> Tensor:
    """The curvature along each coordinate: the diagonal of s2, not the D of D + U U^T."""
    factor, sign = scores.factor, scores.sign
    if factor is None:
        return scores.diag
    size = x.shape[1:].numel()
    if not isinstance(factor, Tensor) or factor.shape[:-1] != (len(x), size):
        raise ValueError(
            f"sample: factor from score_fn must have shape ({len(x)}, {size}, r), "
            f"got {show(factor)}"
        )
    if factor.dtype != x.dtype or factor.device != x.device:
        raise ValueError(
            f"sample: factor from score_fn must be {x.dtype} on {x.device} like x, "
            f"got {factor.dtype} on {factor.device}"
        )
    squares = factor.square()
    if sign is not None:
        if sign.shape != factor.shape[-1:]:
            raise ValueError(
                f"sample: sign from score_fn must have shape {tuple(factor.shape[-1:])} (one for "
                f"each column), got {tuple(sign.shape)}"
            )
        squares = squares * sign.to(x.dtype)
    return scores.diag + squares.sum(-1).view(x.shape)


_STEPS: dict[str, Callable[..., None]] = {"langevin": _langevin, "ozaki": _ozaki}


def _non_finite(x: Tensor) -> Tensor:
    """Whether a row holds a NaN or an infinity, or is about to (its sum overflows). Shape (B,).

    By the sum, in one pass: isfinite().all() costs 40 times that, as much as an Ozaki step.
    """
    total = x.flatten(1).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return ~total.isfinite()


# ----------------------------------------------------------------------------------------- checks


def _begin(
    init: Tensor | None, seed: int | None, first_chain: int, state: ChainState | None
) -> ChainState:
    """The state a run starts from, with its own copy of x."""
    first_chain = _whole("first_chain", first_chain, 0)
    if seed is not None:
        seed = _whole("seed", seed, 0)
        if seed >= 2**64:
            raise ValueError(f"sample: seed must be below 2**64, got {seed}")
    if (init is None) == (state is None):
        both = "neither" if init is None else "both"
        raise ValueError(f"sample: exactly one of init and state must be given, got {both}")
    if state is None:
        start = ChainState(
            x=_check_init("init", init),
            step=0,
            since_draw=0,
            seed=int(torch.randint(2**63 - 1, ())) if seed is None else seed,
            first_chain=first_chain,
        )
    else:
        if not isinstance(state, dict) or ChainState.__required_keys__ - state.keys():
            raise TypeError(f"sample: state must be the state of Chains, got {_kind(state)}")
        if seed not in (None, state["seed"]):
            raise ValueError(
                f"sample: seed must be None or {state['seed']} as in state, got {seed}"
            )
        if first_chain not in (0, state["first_chain"]):
            raise ValueError(
                f"sample: first_chain must be 0 or {state['first_chain']} as in state, "
                f"got {first_chain}"
            )
        start = state.copy()
        _check_init("state['x']", state["x"])
    start["x"] = start["x"].detach().clone(memory_format=torch.contiguous_format)
    return start


def _check_init(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"sample: {name} must be a tensor, got {type(x).__name__}")
    if x.dim() < 2 or 0 in x.shape[1:]:
        raise ValueError(
            f"sample: {name} must have shape (chain, *dims) with at least one entry in a chain, "
            f"got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"sample: {name} must be floating point, got {x.dtype}")
    return x


def _check_step_size(step_size: float | Tensor, x: Tensor) -> None:
    if isinstance(step_size, bool) or not isinstance(step_size, (int, float, Tensor)):
        raise TypeError(
            f"sample: step_size must be a float or a tensor, got {type(step_size).__name__}"
        )
    h = step_size.detach() if isinstance(step_size, Tensor) else torch.tensor(float(step_size))
    if h.dim() and h.shape != x.shape[:1]:
        raise ValueError(
            f"sample: step_size must be a float or have shape ({x.shape[0]},), "
            f"got shape {tuple(h.shape)}"
        )
    if h.dim() and h.device != x.device:
        raise ValueError(f"sample: step_size must be on {x.device} like x, got {h.device}")
    bad = ~(h.isfinite() & (h > 0))
    if bad.any():
        raise ValueError(f"sample: step_size must be positive and finite, got {float(h[bad][0])}")


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
    if value.dtype != x.dtype or value.device != x.device:
        raise ValueError(
            f"sample: {name} from score_fn must be {x.dtype} on {x.device} like x, "
            f"got {value.dtype} on {value.device}"
        )


def _whole(name: str, value: int, minimum: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        raise TypeError(f"sample: {name} must be an integer, got {type(value).__name__}") from None
    if whole < minimum:
        raise ValueError(f"sample: {name} must be at least {minimum}, got {whole}")
    return whole


def _kind(value: object) -> str:
    """What to call a wrong state in an error."""
    return f"keys {sorted(value)}" if isinstance(value, dict) else type(value).__name__


@contextmanager
def _progress_bar(wanted: bool, description: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields the function to call after each step."""
    if not wanted:
        yield lambda: None
        return
    with require("sample", "rich.progress").Progress() as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
