"""Markov chains driven by learned or exact scores of a density p.

`sample` holds the state, takes steps of `transitions` and stores every `thin`-th state. Steps are
in MALA time: `step_size` is h, the drift h * score, the noise sqrt(2 h) z; the eps of Meng et al.
2021 (arXiv:2111.04726, Eqs. 19, 20) is 2 h. Noise depends on (seed, step, global chain) alone.
"""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ..checks import WIDE, check_number, one_of, require
from ..random import fresh_seed
from .transitions import (
    LogDensity,
    ScoreFunction,
    evaluate,
    metropolis_step,
    own,
    score_of,
    unadjusted_step,
)

UNADJUSTED = (
    "langevin",
    "ozaki",
    "ozaki_full",
    "ozaki_isotropic",
    "ozaki_lanczos",
    "ozaki_cayley",
)
ADJUSTED = ("mala", "mh_ozaki", "mh_ozaki_full", "mh_ozaki_isotropic", "mh_ozaki_cayley")


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

    def to_arviz(self, name: str = "x") -> Any:
        """The draws and the per-chain statistics as ArviZ data (an xarray DataTree).

        Args:
            name: variable name of the draws.

        Returns:
            Groups "posterior", with `name` of shape (chain, draw, *dims), and "sample_stats", with
            what `stats` holds for each chain (no draw axis); the rest of `stats` in its attributes.

        Raises:
            RuntimeError: arviz-base is missing (pip install hos_ext[app]).
        """
        base, tree = require("to_arviz", "arviz_base"), require("to_arviz", "xarray").DataTree
        chains = len(self.draws)
        rows, rest = {}, {}
        for key, value in self.stats.items():
            if isinstance(value, Tensor) and value.shape == (chains,):
                rows[key] = value.cpu().numpy()
            elif isinstance(value, (str, int, float)):
                rest[key] = value
        draws = self.draws.detach().to("cpu", torch.promote_types(self.draws.dtype, torch.float32))
        with warnings.catch_warnings():  # many short chains are what we run
            warnings.filterwarnings("ignore", message="Found chain dimension to be longer")
            groups = {
                "posterior": base.dict_to_dataset({name: draws.numpy()}),
                "sample_stats": base.dict_to_dataset(rows, sample_dims=["chain"], attrs=rest),
            }
        return tree.from_dict(groups)


def sample(
    score_fn: ScoreFunction,
    init: Tensor | None = None,
    *,
    method: str = "langevin",
    step_size: float | Tensor,
    n_steps: int,
    burn_in: int = 0,
    thin: int = 1,
    log_prob: LogDensity | None = None,
    curvature: str = "clamp",
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
    seed: int | None = None,
    first_chain: int = 0,
    chunk_size: int | None = None,
    state: ChainState | None = None,
    progress: bool = False,
) -> Chains:
    """Run Markov chains from `init`, all chains side by side.

    With A the Hessian s2 after its curvature treatment and phi1(y) = (e^y - 1) / y:

        "langevin" (Eq. 19)   x' = x + h s1 + sqrt(2 h) z
        "ozaki" (Eq. 20)      x' = x + h phi1(h A) s1 + sqrt(2 h phi1(2 h A)) z, A = diag s2
        "ozaki_full"          the same with the whole s2, by an eigendecomposition of D x D matrices
        "ozaki_isotropic"     the same for s2 = c I + U diag(sign) U^T, by one of r x r
        "ozaki_lanczos"       the same for any s2, by products with it, to a relative `tolerance`
        "ozaki_cayley"        x' = x + (I - h A / 2)^-1 (h s1 + sqrt(2 h) z), the whole s2

    h = `step_size` = eps / 2 in the paper's eps. What each leaves invariant on a Gaussian of
    precision P: "ozaki_full", "ozaki_isotropic" and "ozaki_cayley" the Gaussian itself for every h;
    "ozaki_lanczos" too, to its tolerance. "langevin" has the covariance P^-1 (I - h P / 2)^-1 and
    is stable if h p_max < 2. "ozaki" is exact for every h if P is diagonal; if not, its covariance
    C solves C = B C B^T + S with B = I - M P, M = h phi1(-h diag P), S = 2 h phi1(-2 h diag P): it
    loses its correlations as h grows, and is stable for every h if P < 2 diag(P). On other
    densities all have a bias that vanishes with h.

    "mala", "mh_ozaki", "mh_ozaki_full", "mh_ozaki_isotropic" and "mh_ozaki_cayley" propose the step
    of the like-named method and accept it by Metropolis and Hastings. With `log_prob` they leave p
    invariant for every h. Without it log p(x') - log p(x) is estimated from the scores at both
    ends, by the trapezoid rule corrected with s2 (without s2, the plain rule): exact on Gaussians,
    elsewhere the law has a bias that vanishes faster than that of the unadjusted step. (The density
    of a Lanczos step has no closed form, hence no adjusted form of it.)

    The noise of a step is a function of (seed, step, first_chain + row): any `chunk_size`, a run
    resumed from `state`, and chains split over processes with `first_chain` give the same chains;
    bitwise if the score of a row does not depend on the rows beside it (analytic densities), to
    rounding for networks.

    A chain whose state holds a NaN or an infinity has diverged. It is neither stopped nor
    restarted: an unadjusted step only adds to the state, so that it stays non-finite, in `draws`
    too, and `stats` marks it (as it does a finite state whose sum overflows: it is about to
    diverge). An adjusted chain rejects such a proposal, and one whose acceptance ratio is NaN, and
    `stats` counts it. The other chains are not affected.

    Args:
        score_fn: maps x of shape (rows, *dims) to the score s1 of the same shape, dtype and device
            ("langevin", "mala"), to UnscaledScores, to DenseScores (not for "ozaki_isotropic"), or
            to MatrixFreeScores ("langevin", "ozaki_lanczos": any model, differentiated).
            Called once a step, without gradients, with at most `chunk_size` rows; adjusted methods
            call it once more at the start. x may be a buffer that later steps overwrite, and what
            score_fn returns may be one too.
        init: start of every chain. Shape (chain, *dims), floating point; float32 or float64 for all
            methods but "langevin" and "ozaki". It is not changed. None if `state` is given.
        method: one of the above.
        step_size: h > 0, in squared units of the data. Float, 0-d tensor, or one for each chain,
            shape (chain,), on the device of init.
        n_steps: steps after the burn-in. n_steps // thin draws are kept (see `state`).
        burn_in: steps thrown away first, counted in this call.
        thin: keep every thin-th state.
        log_prob: maps x (rows, *dims) to log p + constant, shape (rows,); for adjusted methods.
        curvature: what becomes of an eigenvalue l > 0 of s2 (for "ozaki" of its diagonal):
            "clamp" min(l, 0) (a Langevin step there), "abs" -|l|, "raw" l as it is (may overflow,
            and has no Cayley step if h l >= 2: divergences). "ozaki_cayley" with UnscaledScores
            treats an s2 that is not negative definite by congruence (`transitions._cayley_kernel`).
            "langevin" and "mala" ignore it.
        tolerance: relative error at which "ozaki_lanczos" stops, > 0.
        max_iterations: most products with s2 for each of drift and noise. None: min(D, 200).
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
        has "method", "step_size", "seconds" (wall time), "n_score_evaluations" (for each chain)
        and, of shape (chain,), "divergences" (the steps of this call that ended in a non-finite
        state; adjusted: that were rejected for it) and "diverged" (bool, the last state, or its
        score if adjusted, is non-finite). Adjusted methods add "acceptance" (chain,), the mean
        acceptance probability of the steps after the burn-in, and "log_ratio", "log_prob" or
        "scores". "ozaki_lanczos" adds, of shape (chain,), "lanczos_error" (the largest relative
        error estimate), "lanczos_iterations" (in all) and "lanczos_unconverged" (steps that ended
        above the tolerance). `state` resumes the run.

    Raises:
        ValueError: an argument out of range, an unknown method or curvature, a score of another
            shape, dtype or device than x, a Hessian that is not symmetric, or not isotropic plus
            low rank for "ozaki_isotropic".
        TypeError: an argument or a score of the wrong kind.
        RuntimeError: progress=True without rich.

    Reference:
        Meng et al. 2021, Eqs. 19, 20; Roberts & Tweedie 1996 (the adjusted step).
    """
    check_method("sample", method, curvature, (*UNADJUSTED, *ADJUSTED))
    adjusted = method in ADJUSTED
    if log_prob is not None and not adjusted:
        raise ValueError(
            f"sample: log_prob must be None for the unadjusted method {method!r}, got one"
        )
    n_steps = _whole("n_steps", n_steps, 0)
    burn_in = _whole("burn_in", burn_in, 0)
    thin = _whole("thin", thin, 1)
    tolerance = check_number("sample", "tolerance", tolerance)
    if tolerance >= 1:
        raise ValueError(f"sample: tolerance must be below 1, got {tolerance:g}")
    if max_iterations is not None:
        max_iterations = _whole("max_iterations", max_iterations, 1)
    begin = begin_chains(init, seed, first_chain, state)
    x, first, seed = begin["x"], begin["first_chain"], begin["seed"]
    check_dtype("sample", method, x)
    chains = x.shape[0]
    chunk = max(chains, 1) if chunk_size is None else _whole("chunk_size", chunk_size, 1)
    _check_step_size(step_size, x)

    since_draw = begin["since_draw"] % thin if burn_in == 0 else 0
    draws = x.new_empty((chains, (since_draw + n_steps) // thin, *x.shape[1:]))
    tally = _tally(chains, x.device)
    total = burn_in + n_steps
    started = time.perf_counter()
    with torch.no_grad(), _progress_bar(progress, method, total * -(-chains // chunk)) as advance:
        for low in range(0, chains, chunk):
            rows = slice(low, low + chunk)
            h = step_size[rows] if isinstance(step_size, Tensor) and step_size.dim() else step_size
            # Two buffers in turn: a fresh output for each step can cost more, in page faults,
            # than the step.
            current, spare = x[rows], torch.empty_like(x[rows])
            counts = _Tally(*(each[rows] for each in tally))
            here = own(evaluate(score_fn, current, method, log_prob)) if adjusted else None
            for k in range(total):
                keys = {"seed": seed, "offset": begin["step"] + k, "first": first + low}
                if here is not None:
                    here, probability, lost = metropolis_step(
                        method,
                        score_fn,
                        log_prob,
                        here,
                        step_size=h,
                        curvature=curvature,
                        **keys,
                    )
                    current = here.x
                    counts.divergences.add_(lost)
                    if k >= burn_in:
                        counts.acceptance.add_(probability)
                else:
                    report = unadjusted_step(
                        method,
                        score_fn,
                        current,
                        spare,
                        step_size=h,
                        curvature=curvature,
                        tolerance=tolerance,
                        max_iterations=max_iterations,
                        at_start=k == 0,
                        **keys,
                    )
                    current, spare = spare, current
                    counts.divergences.add_(_non_finite(current))
                    if report is not None:
                        torch.maximum(counts.error, report.error.double(), out=counts.error)
                        counts.iterations.add_(report.iterations)
                        counts.unconverged.add_(~report.converged)
                draw, rest = divmod(since_draw + k + 1 - burn_in, thin)
                if k >= burn_in and rest == 0:
                    draws[rows, draw - 1] = current
                advance()
            counts.diverged.copy_(_non_finite(current))
            if here is not None:
                counts.diverged.logical_or_(_non_finite(score_of(here)))
            if current.data_ptr() != x[rows].data_ptr():
                x[rows] = current
    stats = {
        "method": method,
        "step_size": step_size,
        "seconds": time.perf_counter() - started,
        "n_score_evaluations": total + adjusted,
        "divergences": tally.divergences,
        "diverged": tally.diverged,
    }
    if adjusted:
        stats["acceptance"] = tally.acceptance / n_steps
        stats["log_ratio"] = "scores" if log_prob is None else "log_prob"
    if method == "ozaki_lanczos":
        stats["lanczos_error"] = tally.error
        stats["lanczos_iterations"] = tally.iterations
        stats["lanczos_unconverged"] = tally.unconverged
    end = ChainState(
        x=x,
        step=begin["step"] + total,
        since_draw=(since_draw + n_steps) % thin,
        seed=seed,
        first_chain=first,
    )
    return Chains(draws, stats, end)


class _Tally(NamedTuple):
    """What is counted for each chain along the run, in place."""

    divergences: Tensor
    diverged: Tensor
    acceptance: Tensor
    error: Tensor
    iterations: Tensor
    unconverged: Tensor


def _tally(chains: int, device: torch.device) -> _Tally:
    dtypes = (torch.int64, torch.bool, torch.float64, torch.float64, torch.int64, torch.int64)
    return _Tally(*(torch.zeros(chains, dtype=dtype, device=device) for dtype in dtypes))


def _non_finite(x: Tensor) -> Tensor:
    """Whether a row holds a NaN or an infinity, or is about to (its sum overflows). Shape (B,).

    By the sum, in one pass: isfinite().all() costs 40 times that, as much as an Ozaki step.
    """
    total = x.flatten(1).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return ~total.isfinite()


# ----------------------------------------------------------------------------------------- checks


def check_method(where: str, method: object, curvature: object, methods: Sequence[str]) -> None:
    one_of(where, "method", method, methods)
    one_of(where, "curvature", curvature, ("clamp", "abs", "raw"))


def check_dtype(where: str, method: str, x: Tensor) -> None:
    """Half precision is for the two fused steps."""
    if method not in ("langevin", "ozaki") and x.dtype not in WIDE:
        raise ValueError(
            f"{where}: init must have dtype float32, float64 for method {method!r}, got {x.dtype}"
        )


def begin_chains(
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
            seed=fresh_seed() if seed is None else seed,
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
    if isinstance(step_size, Tensor):
        if not step_size.is_floating_point():
            raise ValueError(f"sample: step_size must be floating, got {step_size.dtype}")
        if step_size.requires_grad:
            raise ValueError("sample: step_size must not require grad, got requires_grad=True")
    h = step_size if isinstance(step_size, Tensor) else torch.tensor(float(step_size))
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
