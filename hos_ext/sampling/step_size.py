"""Finding the step size of a chain: by effective samples per cost, or by the acceptance rate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import (
    check,
    check_callable,
    check_count,
    check_number,
    check_samples,
    one_of,
    said_by,
    show,
)
from ..conditions import Conditions, check_conditions
from ..random import Key, fresh_seed, seed_from
from ..records import Record
from ..scores import LogDensity, ScoreFn
from .arguments import ChainState, begin_chains, check_dtype
from .chains import ChainOptions, Tally, bound, sample
from .diagnostics import ESS_KINDS, min_ess
from .methods.base import CURVATURES, Rule
from .methods.coins import warn_bound
from .methods.line import DEFAULT_RULE
from .methods.metropolis import MetropolisWalk
from .methods.points import Point
from .methods.registry import Method, make_step
from .watch import RunawayWarning

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, eq=False, repr=False)
class StepSizeSearch(Record):
    """What `search_step_size` found, and what it saw on the way.

    Attributes:
        step_size: the best one.
        step_sizes: all that were tried.
        rates: smallest ESS a score evaluation for each; 0 where a chain diverged.
    """

    step_size: float
    step_sizes: list[float]
    rates: list[float]

    def _summary(self) -> str:
        return f"step_size {self.step_size:.4g}, best of {len(self.step_sizes)}"


@dataclass(frozen=True, eq=False, repr=False)
class StepSizeAdaptation(Record):
    """What `adapt_step_size` found, and the chains it warmed up.

    Attributes:
        step_size: the one to go on with.
        acceptance: mean acceptance probability over the living chains, step by step.
        step_sizes: the step size of each step.
        divergences: steps rejected because something was not finite. Shape (chain,).
        diverged: not finite from the start, and not counted in acceptance. bool, shape (chain,).
        state: to go on with `sample`.
    """

    step_size: float
    acceptance: list[float]
    step_sizes: list[float]
    divergences: Tensor
    diverged: Tensor
    state: ChainState

    def _summary(self) -> str:
        steps, chains = len(self.step_sizes), len(self.diverged)
        return f"step_size {self.step_size:.4g} after {steps} steps of {chains} chains"


def search_step_size(
    score_fn: ScoreFn,
    init: Tensor,
    step_sizes: Sequence[float],
    *,
    n_steps: int,
    ess_kind: str = "bulk",
    seed: int | None = 0,
    first_chain: int = 0,
    progress: bool = False,
    generator: torch.Generator | None = None,
    **options: Unpack[ChainOptions],
) -> StepSizeSearch:
    """The step size that gives most effective samples a score evaluation (the paper's rule).

    The rate of a step size is the smallest ESS of any dimension over the score evaluations. Every
    candidate runs the same chains with the same noise, so that the result is a function of the
    arguments. For an unadjusted method the rate says how fast the chain forgets. It does not say
    how far its law is from p, and so it favours large steps: compare with an adjusted method, or
    bound `step_sizes`.

    Args:
        score_fn, init: as for `sample`.
        step_sizes: the candidates h > 0, in squared units of the data.
        n_steps: steps of each run after its burn-in; at least 4 draws must be kept.
        ess_kind: a kind of `ess`: "cutoff" is the rule used with such figures.
        seed: key of the noise; None draws one, for all candidates, from torch's default generator.
        generator: a `torch.Generator` in place of seed, which is drawn from it once.
        first_chain, progress: as for `sample`.
        options: further arguments of `sample`, see `ChainOptions`.

    Returns:
        StepSizeSearch. A rate counts the draws of all chains over the score evaluations of all
        chains; it is 0 where a chain diverged or ran away, or ESS is undefined.

    Raises:
        ValueError: no candidates, or none with a positive rate; and as `sample` and `ess`.
        TypeError, RuntimeError: as `sample` and `ess`.

    References:
        Meng et al. 2021, section 5 (step sizes searched for the largest ESS).

    Example:
        >>> import torch
        >>> start = torch.zeros(4, 1, dtype=torch.float64)
        >>> found = search_step_size(
        ...     lambda x: -x, start, [0.01, 1.0], n_steps=50, ess_kind="cutoff"
        ... )
        >>> found.step_size
        1.0
    """
    where = "search_step_size"
    check_callable(where, "score_fn", score_fn)
    check_samples(where, "init", init)
    one_of(where, "ess_kind", ess_kind, ESS_KINDS)
    many = isinstance(step_sizes, (list, tuple)) or getattr(step_sizes, "ndim", 0) == 1
    rule = "step_sizes must be a sequence of numbers"
    check(where, many, rule, lambda: show(step_sizes), TypeError)
    candidates = [check_number(where, "step_sizes", h) for h in step_sizes]
    check(where, candidates, "step_sizes must hold at least one step size", "none")
    given = dict(options).get("step_size")
    check(where, given is None, "step_size must not be given beside step_sizes", given)
    seed = seed_from(where, seed, generator, 0)
    if seed is None:
        seed = fresh_seed()
    rates = []
    for h in candidates:
        with said_by(where, "sample"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RunawayWarning)  # the rate says it
            chains = sample(
                score_fn,
                init,
                step_size=h,
                n_steps=n_steps,
                seed=seed,
                first_chain=first_chain,
                progress=progress,
                **options,
            )
        rate = 0.0
        if not bool((chains.stats["diverged"] | chains.stats["ran_away"]).any()):
            with said_by(where, "min_ess", draws="the draws kept"):
                size = min_ess(chains.draws, kind=ess_kind)
            cost = chains.stats["n_score_evaluations"] * len(init)
            rate = 0.0 if math.isnan(size) else size / cost
        rates.append(rate)
    best = max(range(len(rates)), key=rates.__getitem__)
    rule = "step_sizes must hold one that gives finite chains that move"
    check(where, rates[best] > 0, rule, candidates)
    return StepSizeSearch(candidates[best], candidates, rates)


@torch.no_grad()
def adapt_step_size(
    score_fn: ScoreFn,
    init: Tensor,
    *,
    method: Method,
    step_size: float,
    n_steps: int,
    target: float = 0.574,
    log_prob: LogDensity | None = None,
    curvature: str = "clamp",
    rule: Rule = DEFAULT_RULE,
    seed: int | None = None,
    first_chain: int = 0,
    model_kwargs: Conditions | None = None,
    generator: torch.Generator | None = None,
) -> StepSizeAdaptation:
    """Warm up adjusted chains and find the step size whose acceptance is `target`.

    Dual averaging on log h: with the mean acceptance a_t at step t of all chains that began at a
    finite state with a finite score (the others can never move),
        m += (target - a_t - m) / (t + 10),    log h = log(10 h_0) - sqrt(t) m / 0.05,
    and the answer is the average of log h, step t entering it with weight t^-0.75. The law of a
    chain whose step size still changes is not p: go on from `state` with the step size fixed.

    Args:
        score_fn, init, log_prob, curvature, rule, seed, first_chain, model_kwargs, generator: as
            for `sample`.
        method: an adjusted method of `sample`: a name of `method_names(adjusted=True)`, or a
            `Metropolis`.
        step_size: h_0 > 0, where to start, in squared units of the data.
        n_steps: steps, >= 1; one score evaluation each, and those of the rule.
        target: acceptance probability aimed at, in (0, 1). 0.574 is the best of MALA as D grows.
            A `TwoCoin` accepts at most about half: aim at 0.35 or so.

    Returns:
        StepSizeAdaptation. The same arguments give the same result.

    Raises:
        ValueError: an argument out of range, an unadjusted method, or an acceptance that does not
            come down to the target at any step size (an exact method on a Gaussian accepts every
            step); and as `sample`.
        TypeError: as `sample`.

    References:
        Nesterov 2009, doi:10.1007/s10107-007-0149-x; Hoffman & Gelman 2014, section 3.2 (its
        constants); Roberts & Rosenthal 1998 (0.574).

    Example:
        >>> import torch
        >>> warm = adapt_step_size(
        ...     lambda x: -x**3, torch.ones(4, 2), method="mala", step_size=0.1, n_steps=20, seed=0
        ... )
        >>> warm.state["step"], len(warm.step_sizes)
        (20, 20)
    """
    where = "adapt_step_size"
    one_of(where, "curvature", curvature, CURVATURES)
    step = make_step(method, where=where, adjusted=True, curvature=curvature, rule=rule)
    h0 = check_number(where, "step_size", step_size)
    n_steps = check_count(where, "n_steps", n_steps, limit=2**56)
    check(where, check_number(where, "target", target) < 1, "target must be below 1", target)
    check_callable(where, "score_fn", score_fn)
    if log_prob is not None:
        check_callable(where, "log_prob", log_prob)
    with said_by(where, "sample"):
        seed = seed_from(where, seed, generator)
        state = begin_chains(init, seed, first_chain, None)
    check(where, len(state["x"]), "init must hold at least one chain", "none")
    check_dtype(where, step.name, state["x"], step.dtypes)
    conditions = check_conditions(where, model_kwargs, len(state["x"]), "init")
    walk = step.walk(*bound(score_fn, log_prob, conditions), state["x"], h0)
    assert isinstance(walk, MetropolisWalk)  # the step is adjusted
    alive = _alive(walk.here)
    living = "init must hold a chain with a finite state, score and log_prob"
    check(where, bool(alive.any()), living, f"none of {len(alive)}")
    tally = Tally.zeros(step.keeps, len(alive), alive.device)
    h, log_mean, missing = h0, 0.0, 0.0
    acceptance, step_sizes = [], []
    for t in range(1, n_steps + 1):
        walk.step_size = h
        report = walk.advance(Key(state["seed"], state["step"], state["first_chain"]))
        state["step"] += 1
        tally.add(report, warm=False)
        acceptance.append(float(report["acceptance"][alive].mean()))
        step_sizes.append(h)
        missing += (target - acceptance[-1] - missing) / (t + 10)
        log_h = math.log(10 * h0) - math.sqrt(t) / 0.05 * missing
        met = "target must be met between step sizes 1e-20 and 1e20 times step_size"
        got = f"acceptance {acceptance[-1]:.3g} at step size {h:.3g}"
        check(where, abs(log_h - math.log(h0)) < 46, met, got)
        weight = t**-0.75
        log_mean = weight * log_h + (1 - weight) * log_mean
        h = math.exp(log_h)
    state["x"] = walk.x
    figures = tally.figures(n_steps)
    warn_bound(where, figures, None, stacklevel=3)  # torch.no_grad is between
    return StepSizeAdaptation(
        math.exp(log_mean), acceptance, step_sizes, figures["divergences"], ~alive, state
    )


def _alive(here: Point) -> Tensor:
    """Which chains can move: a finite state and score, and a log density that is no NaN. (B,)."""
    alive = here.x.flatten(1).isfinite().all(1) & here.score.flatten(1).isfinite().all(1)
    return alive if here.log_prob is None else alive & ~here.log_prob.isnan()
