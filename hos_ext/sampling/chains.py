"""The driver of Markov chains, driven by learned or exact scores of a density p.

`sample` holds the chains, takes steps (`methods`) and stores every `thin`-th state. Steps are in
MALA time: `step_size` is h, the drift is h * score and the noise sqrt(2 h) z; the eps of Meng et
al. 2021 (arXiv:2111.04726, Eqs. 19, 20) is 2 h. Noise depends on (seed, step, global chain) alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import (
    check,
    check_callable,
    check_flag,
    check_kind,
    is_int,
    require,
    row_index,
    rows_at,
)
from ..conditions import Conditions, check_conditions, condition_rows
from ..display import SHOWN, axes_of, thumbnail
from ..progress import show_progress
from ..random import Key, seed_from
from ..records import RowRecord, unusual
from ..scores import LogDensity, ScoreFn
from .arguments import ChainState, begin_chains, check_dtype, check_step_size, whole
from .methods.base import Report, Rule, Step, StepOptions
from .methods.coins import warn_bound
from .methods.line import DEFAULT_RULE
from .methods.metropolis import Metropolis
from .methods.registry import Method, make_step
from .watch import Watch, Watched, warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class ChainOptions(StepOptions, total=False):
    """The arguments of `sample` that its kin hand on to it, with its defaults.

    Attributes:
        method, burn_in, thin, log_prob, chunk_size, model_kwargs: see `sample`.
        curvature, tolerance, max_iterations, rule: see `StepOptions`.
    """

    method: Method
    burn_in: int
    thin: int
    log_prob: LogDensity | None
    chunk_size: int | None
    model_kwargs: Conditions | None


@dataclass(frozen=True, eq=False, repr=False)
class Chains(RowRecord):
    """What a run gives.

    Attributes:
        draws: the states that were kept. Shape (chain, draw, *dims).
        stats: statistics of the run by name; `sample` lists them.
        state: what the next run goes on from.
    """

    draws: Tensor
    stats: dict[str, Any]
    state: ChainState

    def _summary(self) -> str:
        chains, draws, *dims = self.draws.shape
        return ", ".join([f"{chains} x {draws} x {tuple(dims)}", *unusual(self.draws)])

    def _repr_html_(self) -> str:
        """For notebooks: where the first chains ended."""
        kept = self.draws.shape[1]
        return thumbnail(repr(self), [self.draws[:SHOWN, -1]] if kept else [])

    def plot(self, ax: Axes | None = None, *, entry: int = 0) -> Axes:
        """The trace of one entry: its value along the draws, a line for each of the first chains.

        Args:
            ax: matplotlib axes; None makes new ones.
            entry: its place in the flattened sample.

        Returns:
            The axes.

        Raises:
            TypeError: ax is no axes.
            ValueError: entry is outside the sample.
            RuntimeError: matplotlib is missing (pip install hos_ext[cli]).
        """
        where, flat = "Chains.plot", self.draws[:SHOWN].detach().flatten(2).cpu().double()
        size = flat.shape[2]
        inside = is_int(entry) and 0 <= entry < size
        check(where, inside, f"entry must be in 0 ... {size - 1}", entry)
        ax = axes_of(where, ax)
        for number, line in enumerate(flat[:, :, entry].numpy()):
            ax.plot(range(len(line)), line, lw=0.8, label=f"chain {number}")
        ax.set(xlabel="draw", ylabel=f"entry {entry}", xlim=(0, max(flat.shape[1] - 1, 1)))
        return ax

    def __getitem__(self, index: int | slice | Tensor) -> Chains:
        """Some chains, with their statistics. Chains that follow one another can be gone on with
        from their `state`, exactly; of others it lacks `first_chain`, which numbers their noise.
        """
        where, chains = "Chains[index]", len(self.draws)
        index = row_index(where, index, chains)
        draws = rows_at(where, self.draws, index)
        stats = {
            name: value[index] if isinstance(value, Tensor) and value.shape == (chains,) else value
            for name, value in self.stats.items()
        }
        state: Any = {**self.state, "x": self.state["x"][index]}
        numbers = torch.arange(chains, device=draws.device)[index]
        if len(numbers) and not bool((numbers.diff() == 1).all()):
            del state["first_chain"]
        elif len(numbers):
            state["first_chain"] += int(numbers[0])
        return Chains(draws, stats, state)

    def to_arviz(self, name: str = "x") -> Any:
        """The draws and the per-chain statistics as ArviZ data (an xarray DataTree).

        Args:
            name: variable name of the draws.

        Returns:
            Groups "posterior", with `name` of shape (chain, draw, *dims), and "sample_stats", with
            what `stats` holds for each chain (no draw axis); the rest of `stats` in its attributes.

        Raises:
            RuntimeError: arviz-base is missing (pip install hos_ext[cli]).

        Example:
            >>> import torch
            >>> chains = sample(lambda x: -x, torch.zeros(2, 3), step_size=0.1, n_steps=5)
            >>> sorted(chains.to_arviz("image").children)
            ['posterior', 'sample_stats']
        """
        where, kind = "Chains.to_arviz", type(self.draws).__name__
        check_kind(where, "name", name, str)
        many = isinstance(self.draws, Tensor) and self.draws.dim() >= 2
        check(where, many, "draws must have shape (chain, draw, *dims)", kind)
        check_kind(where, "stats", self.stats, dict)
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
    score_fn: ScoreFn,
    init: Tensor | None = None,
    *,
    method: Method = "langevin",
    step_size: float | Tensor,
    n_steps: int,
    burn_in: int = 0,
    thin: int = 1,
    log_prob: LogDensity | None = None,
    curvature: str = "clamp",
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
    rule: Rule = DEFAULT_RULE,
    seed: int | None = None,
    first_chain: int = 0,
    chunk_size: int | None = None,
    state: ChainState | None = None,
    progress: bool = False,
    model_kwargs: Conditions | None = None,
    generator: torch.Generator | None = None,
) -> Chains:
    """Run Markov chains from `init`, all chains side by side.

    With A the Hessian s2 after its curvature treatment and phi1(y) = (e^y - 1) / y:

        "langevin" (Eq. 19)   x' = x + h s1 + sqrt(2 h) z
        "ozaki" (Eq. 20)      x' = x + h phi1(h A) s1 + sqrt(2 h phi1(2 h A)) z, A = diag s2
        "ozaki_full"          the same with the whole s2, by an eigendecomposition of D x D matrices
        "ozaki_isotropic"     the same for s2 = c I + U diag(sign) U^T, by one of r x r
        "ozaki_lanczos"       the same for any s2, by products with it, to a relative `tolerance`
        "ozaki_cayley"        x' = x + (I - h A / 2)^-1 (h s1 + sqrt(2 h) z), the whole s2

    The classes of `hos_ext.sampling.methods` say what each leaves invariant on a Gaussian. In
    short: methods with the whole s2 keep it for every h, "ozaki" does if its precision is diagonal,
    "langevin" does not. On other densities all have a bias that vanishes with h.

    "mala" and "mh_..." propose the step of the like-named method ("mala": Langevin) and accept it
    by Metropolis and Hastings. With `log_prob` they leave p invariant for every h. Without it
    log p(x') - log p(x) is the integral of the score along the segment, by a `rule`. The default
    takes the scores at both ends. That is exact on Gaussians; elsewhere the law has a bias that
    vanishes faster than that of the unadjusted step. "simpson" and "lobatto-n" evaluate the score
    between the ends and make the bias small, and a `TwoCoin` leaves none (`methods.Metropolis`).
    There is no adjusted form of "ozaki_lanczos".

    The noise of a step is a function of (seed, step, first_chain + row). So the chains are the same
    for any `chunk_size`, in a run resumed from `state`, and over processes with `first_chain`. They
    are so bitwise if the score of a row does not depend on the rows beside it (analytic densities),
    and to rounding for networks.

    A chain whose state holds a NaN or an infinity has diverged. It is neither stopped nor
    restarted. An unadjusted step only adds to the state, so that it stays non-finite, in `draws`
    too, and `stats` marks it (as it does a finite state whose sum overflows: it is about to
    diverge). An adjusted chain rejects such a proposal, and one whose acceptance ratio is NaN, and
    `stats` counts it. The other chains are not affected.

    Finite chains can run away too, most often where a learned score is asked outside the range of
    its data. So runs of at least 8 steps are watched: how far they spread against their start, how
    |x| drifts, the energy and the R-hat of their last part. A run beyond the wide bounds of
    `hos_ext.sampling.watch`, or with chains that diverged, gives one `RunawayWarning` with these
    numbers. Chains within the bounds may still be wrong: compare them with draws of p where there
    are such (`law_error`).

    Args:
        score_fn: maps x of shape (rows, *dims) to the score s1 of the same shape, dtype and device
            ("langevin", "mala"), to UnscaledScores, to DenseScores (not for "ozaki_isotropic"), or
            to MatrixFreeScores ("langevin", "ozaki_lanczos": any model, differentiated).
            It is called once a step, without gradients, with at most `chunk_size` rows; adjusted
            methods call it once more at the start, and as often as their `rule` asks. x may be a
            buffer that later steps overwrite, and what score_fn returns may be one too.
        init: start of every chain. Shape (chain, *dims), floating point; float32 or float64 for all
            methods but "langevin" and "ozaki". It is not changed. None if `state` is given.
        method: one of `method_names()`: those above, and those that `register_step` added. Or a
            step, such as `Metropolis(MyStep())`, or its class.
        step_size: h > 0, in squared units of the data; h = eps / 2 in the paper's eps. Float, 0-d
            tensor, or one for each chain, shape (chain,), on the device of init.
        n_steps: steps after the burn-in. n_steps // thin draws are kept (see `state`).
        burn_in: steps thrown away first, counted in this call.
        thin: keep every thin-th state.
        log_prob: maps x (rows, *dims) to log p + constant, shape (rows,); for adjusted methods.
        curvature: what becomes of an eigenvalue l > 0 of s2 (for "ozaki" of its diagonal):
            "clamp" makes it min(l, 0), a Langevin step there; "abs" makes it -|l|; "raw" leaves it
            (it may overflow, and has no Cayley step if h l >= 2: divergences). "ozaki_cayley" with
            UnscaledScores treats an s2 that is not negative definite by congruence
            (`methods.OzakiCayley`). "langevin" and "mala" ignore it.
        tolerance: relative error at which "ozaki_lanczos" stops, in (0, 1).
        max_iterations: most products with s2 for each of drift and noise. None: min(D, 200).
        rule: of adjusted methods without a log_prob: "trapezoid", "simpson", "lobatto-2" ...
            "lobatto-16", or a `TwoCoin`. See `methods.Metropolis`.
        seed: key of the noise, 0 ... 2^64 - 1. None draws one from torch's default generator; it is
            in `state`.
        first_chain: global index of the first chain, for chains split over processes.
        chunk_size: chains run this many at a time, which bounds the memory of score_fn. None: all.
        state: `state` of earlier Chains: goes on from there, with its seed and its first_chain.
            60 steps and 40 more are 100 steps, the places of the draws included. The method and the
            step size may change; give the same ones to continue exactly.
        generator: a `torch.Generator` in place of seed, which is drawn from it.
        progress: shows a bar on a terminal, elsewhere a line every few seconds by `logging`, of
            level INFO; needs rich, which `pip install hos_ext[cli]` brings.
        model_kwargs: conditions of the density, such as class labels: both functions are called as
            `score_fn(x, **model_kwargs)`. Each tensor has one row for each chain, and chunks get
            the rows of their chains. They are not in `state`: give them again to go on.

    Returns:
        Chains. `draws` has shape (chain, draw, *dims), the dtype and the device of init. `stats`
        has "method", "step_size", "seconds" (wall time), "n_score_evaluations" (for each chain;
        rounded up where chunks differ) and, of shape (chain,), "divergences" (the steps of this
        call that ended in a non-finite state; adjusted: that were rejected for it) and "diverged"
        (bool, the last state, or its score if adjusted, is non-finite). Adjusted methods add
        "acceptance" (chain,), the mean acceptance probability of the steps after the burn-in,
        "log_ratio", "log_prob" or "scores", and with "scores" the name of the "rule". A `TwoCoin`
        adds, of shape (chain,), "coin_evaluations" (scores that this chain asked for between the
        ends), "undecided", "bound_exceeded" (steps and points) and "bound_used"; see there.
        "ozaki_lanczos" adds, of shape (chain,), "lanczos_error" (the largest relative error
        estimate), "lanczos_iterations" (in all) and "lanczos_unconverged" (steps that ended above
        the tolerance). The watch adds "ran_away" (bool, finite but beyond a bound) and, to runs of
        at least 8 steps, "spread", "drift" and "energy", all of shape (chain,), "sizes" (chain,
        looks), rms |x| at steps evenly spread after the burn-in, and the float "r_hat".
        `state` resumes the run.

    Raises:
        ValueError: an argument out of range, an unknown method or curvature, a score of another
            shape, dtype or device than x, a Hessian that is not symmetric, or not isotropic plus
            low rank for "ozaki_isotropic".
        TypeError: an argument or a score of the wrong kind.
        RuntimeError: progress=True without rich.

    References:
        Meng et al. 2021, Eqs. 19, 20; Roberts & Tweedie 1996 (the adjusted step).

    Example:
        >>> import torch
        >>> chains = sample(lambda x: -x, torch.zeros(3, 2), step_size=0.1, n_steps=8, thin=2)
        >>> chains.draws.shape
        torch.Size([3, 4, 2])
        >>> more = sample(lambda x: -x, state=chains.state, step_size=0.1, n_steps=8, thin=2)
        >>> more.state["step"]
        16
    """
    step = make_step(
        method, curvature=curvature, tolerance=tolerance, max_iterations=max_iterations, rule=rule
    )
    check_callable("sample", "score_fn", score_fn)
    if log_prob is not None:
        check_callable("sample", "log_prob", log_prob)
    check_flag("sample", progress=progress)
    unadjusted = f"log_prob must be None for the unadjusted method {step.name!r}"
    check("sample", log_prob is None or step.adjusted, unadjusted, "one")
    most = 2**31  # a longer run is continued from its state
    n_steps, burn_in = whole("n_steps", n_steps, 0, most), whole("burn_in", burn_in, 0, most)
    thin = whole("thin", thin, 1)
    seed = seed_from("sample", seed, generator)
    start = begin_chains(init, seed, first_chain, state)
    x, chains, total = start["x"], len(start["x"]), burn_in + n_steps
    check_dtype("sample", step.name, x, step.dtypes)
    chunk = max(chains, 1) if chunk_size is None else whole("chunk_size", chunk_size, 1)
    check_step_size(step_size, x)
    conditions = check_conditions("sample", model_kwargs, chains, "init")

    since_draw = start["since_draw"] % thin if burn_in == 0 else 0
    draws = x.new_empty((chains, (since_draw + n_steps) // thin, *x.shape[1:]))
    tally = Tally.zeros(step.keeps, chains, x.device)
    watch = Watch(x, step_size, burn_in, n_steps)
    began = time.perf_counter()
    steps, calls = total * -(-chains // chunk), 0
    with torch.no_grad(), show_progress("sample", progress, step.name, steps) as show:
        for low in range(0, chains, chunk):
            rows = slice(low, low + chunk)
            h = step_size[rows] if isinstance(step_size, Tensor) and step_size.dim() else step_size
            score, density = bound(score_fn, log_prob, condition_rows(conditions, rows))
            watched = Watched(score, watch, adjusted=step.adjusted)
            walk, counts = step.walk(watched, density, x[rows], h), tally.rows(rows)
            first = start["first_chain"] + low
            for k in range(total):
                watched.before(k, rows)
                report = walk.advance(Key(start["seed"], start["step"] + k, first))
                watched.after(walk)
                counts.add(report, warm=k < burn_in)
                draw, rest = divmod(since_draw + k + 1 - burn_in, thin)
                if k >= burn_in and rest == 0:
                    draws[rows, draw - 1] = walk.x
                show(low // chunk * total + k + 1)
            calls += watched.calls * len(walk.x)
            counts.diverged.copy_(walk.diverged())
            x[rows] = walk.x
    stats = {
        "method": step.name,
        "step_size": step_size,
        "seconds": time.perf_counter() - began,
        "n_score_evaluations": -(-calls // chains) if chains else total + step.adjusted,
        **tally.figures(n_steps),
        **watch.figures(),
    }
    if step.adjusted:
        stats |= log_ratio_of(step, log_prob)
    end = start.copy()
    end["step"] += total
    end["since_draw"] = (since_draw + n_steps) % thin
    warn("sample", stats, stacklevel=2)
    warn_bound("sample", stats, total, stacklevel=2)
    return Chains(draws, stats, end)


def log_ratio_of(step: Step, log_prob: LogDensity | None) -> dict[str, str]:
    """What the acceptance of an adjusted step rests on, for `stats`."""
    if log_prob is not None:
        return {"log_ratio": "log_prob"}
    return {
        "log_ratio": "scores",
        **({"rule": step.rule.name} if isinstance(step, Metropolis) else {}),
    }


def bound(
    score_fn: ScoreFn, log_prob: LogDensity | None, conditions: Conditions
) -> tuple[ScoreFn, LogDensity | None]:
    """Both functions as functions of x alone, under these conditions."""
    if not conditions:
        return score_fn, log_prob
    if log_prob is not None:
        log_prob = partial(log_prob, **conditions)
    return partial(score_fn, **conditions), log_prob


class Tally(NamedTuple):
    """What is counted for each chain along a run, in place."""

    keeps: Mapping[str, str]
    values: dict[str, Tensor]
    diverged: Tensor

    @classmethod
    def zeros(cls, keeps: Mapping[str, str], chains: int, device: torch.device) -> Tally:
        """The tally of no steps, for what a step keeps and for divergences."""
        keeps = {"divergences": "count", **keeps}
        kinds = {"count": torch.int64, "max": torch.float64, "mean": torch.float64}
        values = {
            name: torch.zeros(chains, dtype=kinds[how], device=device)
            for name, how in keeps.items()
        }
        return cls(keeps, values, torch.zeros(chains, dtype=torch.bool, device=device))

    def rows(self, rows: slice) -> Tally:
        """The part of some chains, which shares memory."""
        values = {name: value[rows] for name, value in self.values.items()}
        return Tally(self.keeps, values, self.diverged[rows])

    def add(self, report: Report, *, warm: bool) -> None:
        """Puts a step to the others. warm: it belongs to the burn-in, so that means pass it by."""
        for name, value in report.items():
            how, total = self.keeps[name], self.values[name]
            if how == "max":
                torch.maximum(total, value.double(), out=total)
            elif how == "count" or not warm:
                total.add_(value)

    def figures(self, n_steps: int) -> dict[str, Any]:
        """The statistics of a run, each of shape (chain,)."""
        values = {
            name: value / n_steps if self.keeps[name] == "mean" else value
            for name, value in self.values.items()
        }
        return {"divergences": values.pop("divergences"), "diverged": self.diverged, **values}
