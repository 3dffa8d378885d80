"""Markov chains at falling noise levels, without a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check, check_callable, check_int, check_number, check_samples, said_by
from ..conditions import Conditions, check_conditions
from ..random import seed_from
from ..sampling.chains import Chains, sample
from ..sampling.methods import Method, StepOptions, make_step
from ..scores import Model, UnscaledScores, model_scores
from .inputs import check_options, descending, noise_key
from .steps import chain_scores, chain_state

if TYPE_CHECKING:
    from typing_extensions import Unpack


def annealed_langevin(
    model: Model,
    init: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    method: Method = "langevin",
    step_size: float = 0.1,
    n_steps: int,
    thin: int = 1,
    seed: int | None = None,
    first_chain: int = 0,
    chunk_size: int | None = None,
    model_kwargs: Conditions | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[StepOptions],
) -> Chains:
    """Markov chains at falling noise levels, each level started where the last one ended.

    Args:
        model: `model(x, sigma) -> Scores`, at these sigmas. "langevin" uses the score alone, and
            so does "mala" where c is None.
        init: start of every chain. Shape (chain, *dims), float32 or float64. It is not changed.
        sigmas: descending noise levels, > 0. Units of the data.
        method: a method of `sample`.
        step_size: h of `sample` in units of sigma^2, > 0.
        n_steps: steps at each level.
        thin, seed, generator, first_chain, chunk_size: as `sample`. The number of the step goes on
            from level to level: no noise is used twice.
        model_kwargs: conditions, such as class labels: `model(x, sigma, **model_kwargs)`, with one
            row for each chain in each tensor.
        options: further arguments of `sample`, see `StepOptions`.

    Returns:
        Chains of the last level, whose target is the data with noise sigmas[-1]. In `stats`
        "seconds", "n_score_evaluations" and "divergences" are sums over all levels; the rest, such
        as "acceptance", is that of the last one. A chain that the scores make non-finite is counted
        there, as in `sample`.

    Raises:
        TypeError, ValueError: an argument out of range or of the wrong kind; what `sample` raises.

    References:
        Song and Ermon 2019, arXiv:1907.05600, Algorithm 1.

    Example:
        >>> import torch
        >>> from hos_ext import Scores
        >>> from hos_ext.diffusion import annealed_langevin
        >>> def model(x, sigma):  # exact for data N(0, I)
        ...     c = 1 / (1 + sigma.unsqueeze(1) ** 2)
        ...     return Scores(-sigma.unsqueeze(1) * c * x, c.expand_as(x))
        >>> init = torch.zeros(4, 2)
        >>> chains = annealed_langevin(model, init, [2.0, 0.5], n_steps=20, seed=0)
        >>> chains.draws.shape
        torch.Size([4, 20, 2])
    """
    where = "annealed_langevin"
    check_samples(where, "init", init)
    rule = "init must have shape (chain, *dims) with at least one entry in a chain"
    check(where, init.shape[1:].numel(), rule, lambda: tuple(init.shape))
    check_callable(where, "model", model)
    levels = descending(where, "sigmas", sigmas, 1)
    check(where, levels[-1] > 0, "sigmas must be positive", levels[-1])
    relative = check_number(where, "step_size", step_size)
    check_options(where, options, StepOptions)
    with said_by(where, "sample"):
        step = make_step(method, where=where, **options)
    n_steps = check_int(where, "n_steps", n_steps, 2**31)
    first_chain = check_int(where, "first_chain", first_chain, 2**63)
    conditions = check_conditions(where, model_kwargs, len(init), "init")
    seed = seed_from(where, seed, generator)
    state = chain_state(init, noise_key(where, init.shape, seed, first=first_chain), step=0)
    sums: dict[str, Any] = {"seconds": 0.0, "n_score_evaluations": 0, "divergences": 0}
    for sigma in levels:
        # Positional only: the names of conditions are the model's.
        def score_fn(x: Tensor, level: float = sigma, /, **given: Any) -> Tensor | UnscaledScores:
            column = x.new_full((len(x),), level)
            return chain_scores(model_scores(where, model, x, column, given), level, step)

        last = sigma == levels[-1]
        with said_by(where, "sample"):
            chains = sample(
                score_fn,
                method=step,
                step_size=relative * sigma**2,
                n_steps=n_steps if last else 0,
                burn_in=0 if last else n_steps,
                thin=thin,
                chunk_size=chunk_size,
                model_kwargs=conditions,
                state=state,
            )
        state = chains.state
        sums = {name: total + chains.stats[name] for name, total in sums.items()}
    return Chains(chains.draws, {**chains.stats, **sums}, state)
