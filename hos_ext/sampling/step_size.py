"""Finding the step size of a chain: by effective samples per cost, or by the acceptance rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..random import fresh_seed
from .chains import ADJUSTED, ChainState, begin_chains, check_dtype, check_method, sample
from .diagnostics import min_ess
from .transitions import LogDensity, ScoreFunction, evaluate, metropolis_step, own, score_of


class StepSizeSearch(NamedTuple):
    """What `search_step_size` found, and what it saw on the way."""

    step_size: float  # the best
    step_sizes: list[float]  # all that were tried
    rates: list[float]  # smallest ESS per score evaluation; 0 where a chain diverged


class StepSizeAdaptation(NamedTuple):
    """What `adapt_step_size` found, and the chains it warmed up."""

    step_size: float
    acceptance: list[float]  # mean acceptance probability over the living chains, step by step
    step_sizes: list[float]  # the step size of each step
    divergences: Tensor  # (chain,), steps rejected because something was not finite
    diverged: Tensor  # (chain,), bool: not finite from the start, and not counted in acceptance
    state: ChainState  # to go on with `sample`


def search_step_size(
    score_fn: ScoreFunction,
    init: Tensor,
    step_sizes: Sequence[float],
    *,
    n_steps: int,
    ess_method: str = "bulk",
    seed: int | None = 0,
    **options: Any,
) -> StepSizeSearch:
    """The step size with the largest smallest-ESS per score evaluation (the paper's rule).

    Every candidate runs the same chains with the same noise, so that the result is a function of
    the arguments. For an unadjusted method the rate says how fast the chain forgets, not how far
    its law is from p, and favours large steps: compare with an adjusted one, or bound `step_sizes`.

    Args:
        score_fn, init: as for `sample`.
        step_sizes: the candidates h > 0, in squared units of the data.
        n_steps: steps of each run after its burn-in; at least 4 draws must be kept.
        ess_method: a method of `ess`: "cutoff" is the rule used with such figures.
        seed: key of the noise; None draws one, for all candidates, from torch's default generator.
        options: further arguments of `sample`: method, burn_in, thin, log_prob, curvature, ...

    Returns:
        StepSizeSearch. A rate counts the draws of all chains over the score evaluations of all
        chains; it is 0 where a chain diverged or ESS is undefined.

    Raises:
        ValueError: no candidates, or none with a positive rate; and as `sample` and `ess`.
        TypeError, RuntimeError: as `sample` and `ess`.

    Reference:
        Meng et al. 2021, section 5 (step sizes searched for the largest ESS).
    """
    candidates = [check_number("search_step_size", "step_sizes", h) for h in step_sizes]
    if not candidates:
        raise ValueError("search_step_size: step_sizes must hold at least one step size, got none")
    if "step_size" in options:
        raise ValueError(
            "search_step_size: step_size must not be given beside step_sizes, got "
            f"{options['step_size']}"
        )
    if seed is None:
        seed = fresh_seed()
    rates = []
    for h in candidates:
        chains = sample(score_fn, init, step_size=h, n_steps=n_steps, seed=seed, **options)
        rate = 0.0
        if not bool(chains.stats["diverged"].any()):
            size = min_ess(chains.draws, method=ess_method)
            cost = chains.stats["n_score_evaluations"] * len(init)
            rate = 0.0 if math.isnan(size) else size / cost
        rates.append(rate)
    best = max(range(len(rates)), key=rates.__getitem__)
    if rates[best] == 0:
        raise ValueError(
            "search_step_size: step_sizes must hold one that gives finite chains that move, got "
            f"{candidates}"
        )
    return StepSizeSearch(candidates[best], candidates, rates)


@torch.no_grad()
def adapt_step_size(
    score_fn: ScoreFunction,
    init: Tensor,
    *,
    method: str,
    step_size: float,
    n_steps: int,
    target: float = 0.574,
    log_prob: LogDensity | None = None,
    curvature: str = "clamp",
    seed: int | None = None,
    first_chain: int = 0,
) -> StepSizeAdaptation:
    """Warm up adjusted chains and find the step size whose acceptance is `target`.

    Dual averaging on log h: with the mean acceptance a_t at step t of all chains that began at a
    finite state with a finite score (the others can never move),
        m += (target - a_t - m) / (t + 10),    log h = log(10 h_0) - sqrt(t) m / 0.05,
    and the answer is the average of log h, step t entering it with weight t^-0.75. The law of a
    chain whose step size still changes is not p: go on from `state` with the step size fixed.

    Args:
        score_fn, init, log_prob, curvature, seed, first_chain: as for `sample`.
        method: an adjusted method of `sample`.
        step_size: h_0 > 0, where to start, in squared units of the data.
        n_steps: steps, >= 1; one score evaluation each.
        target: acceptance probability aimed at, in (0, 1). 0.574 is the best of MALA as D grows.

    Returns:
        StepSizeAdaptation. The same arguments give the same result.

    Raises:
        ValueError: an argument out of range, an unadjusted method, or an acceptance that does not
            come down to the target at any step size (an exact method on a Gaussian accepts every
            step); and as `sample`.
        TypeError: as `sample`.

    Reference:
        Nesterov 2009, doi:10.1007/s10107-007-0149-x; Hoffman & Gelman 2014, section 3.2 (its
        constants); Roberts & Rosenthal 1998 (0.574).
    """
    where = "adapt_step_size"
    check_method(where, method, curvature, ADJUSTED)
    start = check_number(where, "step_size", step_size)
    check_count(where, "n_steps", n_steps, limit=2**56)
    if not check_number(where, "target", target) < 1:
        raise ValueError(f"{where}: target must be below 1, got {target}")
    state = begin_chains(init, seed, first_chain, None)
    if len(state["x"]) == 0:
        raise ValueError(f"{where}: init must hold at least one chain, got none")
    check_dtype(where, method, state["x"])
    here = own(evaluate(score_fn, state["x"], method, log_prob))
    alive = _finite(here.x) & _finite(score_of(here))
    if here.log_prob is not None:
        alive &= ~here.log_prob.isnan()
    if not bool(alive.any()):
        raise ValueError(
            f"{where}: init must hold a chain with a finite state, score and log_prob, got none of "
            f"{len(alive)}"
        )
    divergences = torch.zeros(len(alive), dtype=torch.int64, device=alive.device)
    h, log_mean, missing = start, 0.0, 0.0
    acceptance, step_sizes = [], []
    for t in range(1, n_steps + 1):
        here, probability, lost = metropolis_step(
            method,
            score_fn,
            log_prob,
            here,
            step_size=h,
            curvature=curvature,
            seed=state["seed"],
            offset=state["step"],
            first=first_chain,
        )
        state["step"] += 1
        divergences += lost
        acceptance.append(float(probability[alive].mean()))
        step_sizes.append(h)
        missing += (target - acceptance[-1] - missing) / (t + 10)
        log_h = math.log(10 * start) - math.sqrt(t) / 0.05 * missing
        if not abs(log_h - math.log(start)) < 46:
            raise ValueError(
                f"{where}: target must be met between step sizes 1e-20 and 1e20 times step_size, "
                f"got acceptance {acceptance[-1]:.3g} at step size {h:.3g}"
            )
        weight = t**-0.75
        log_mean = weight * log_h + (1 - weight) * log_mean
        h = math.exp(log_h)
    state["x"] = here.x
    return StepSizeAdaptation(
        math.exp(log_mean), acceptance, step_sizes, divergences, ~alive, state
    )


def _finite(x: Tensor) -> Tensor:
    return x.flatten(1).isfinite().all(1)
