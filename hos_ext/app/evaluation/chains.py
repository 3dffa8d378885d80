"""Chains of the density of noisy samples, driven by a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...checks import check, check_number
from ...sampling import diagnostics
from ...sampling.chains import Chains, sample
from ...scores import Model, Scores, UnscaledScores


def run_chains(
    model: Model,
    init: Tensor,
    sigma: float,
    *,
    method: str,
    step_size: float,
    n_steps: int,
    burn_in: int,
    thin: int = 1,
    seed: int,
    **options: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Chains of the density of noisy samples at one sigma, with their figures.

    Args:
        model: `model(x, sigma) -> Scores`; its unscaled scores drive the chains.
        init: one start for each chain. Shape (chain, *dims), on the device of the model.
        sigma: noise level, > 0. Data units.
        method, step_size, n_steps, burn_in, thin, seed: as in `sampling.sample`: any method but
            "ozaki_isotropic", which asks for scores that few models give.
        options: its further arguments, such as curvature, chunk_size and progress.

    Returns:
        draws (chain, draw, *dims), and {"method", "step_size", "min_ess", "us_per_step"}: the
        smallest effective sample size of any entry, all chains together (NaN for fewer than 4
        draws), and the time of one step of all chains, network included. Adjusted methods add
        "acceptance", the mean over steps and chains.

    Raises:
        ValueError, TypeError: as `sampling.sample`.
        RuntimeError: chains diverged.
    """
    score_fn = scores_at(model, check_number("run_chains", "sigma", sigma))
    settings: dict[str, Any] = {"method": method, "step_size": step_size, "seed": seed}
    sample(score_fn, init, n_steps=3, **settings, **(options | {"progress": False}))  # warm-up
    chains = sample(
        score_fn, init, n_steps=n_steps, burn_in=burn_in, thin=thin, **settings, **options
    )
    refuse_diverged("run_chains", "step_size", step_size, chains, method)
    enough = chains.draws.shape[1] >= 4
    figures = {
        "method": method,
        "step_size": step_size,
        "min_ess": diagnostics.min_ess(chains.draws) if enough else math.nan,
        "us_per_step": 1e6 * chains.stats["seconds"] / max(burn_in + n_steps, 1),
    }
    if "acceptance" in chains.stats:
        figures["acceptance"] = float(chains.stats["acceptance"].mean())
    return chains.draws, figures


def scores_at(model: Model, sigma: float) -> Callable[..., UnscaledScores]:
    """The scores of the noisy density at one sigma, as `sampling.sample` takes them."""
    conditional: Callable[..., Scores] = model
    return lambda x, **model_kwargs: conditional(x, sigma, **model_kwargs).unscaled(sigma)


def refuse_diverged(where: str, name: str, step_size: float, chains: Chains, method: str) -> None:
    """Raises RuntimeError where chains diverged; `name` is what the caller has for step size."""
    diverged = chains.stats["diverged"]
    check(
        where,
        not diverged.any(),
        f"{name} must keep the chains finite",
        lambda: (
            f"{step_size:g} with which {int(diverged.sum())} of {len(diverged)} {method} "
            "chains diverged"
        ),
        RuntimeError,
    )
