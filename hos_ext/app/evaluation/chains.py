"""Chains of the density of noisy samples, driven by a model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...checks import check_number
from ...sampling import RunawayWarning, diagnostics, watch
from ...sampling.chains import Chains, sample
from ...scores import Model, Scores, UnscaledScores
from .. import data
from .rows import held_out

# Bounds on chains that start from draws of the law that they should keep: how much wider or
# narrower they may be, by the standard deviation and by the median distance from the centre alike,
# and how far the size of a chain may exceed that of the largest held-out sample.
SPREAD, SIZE = 2.0, 3.0


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
    reference: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Chains of the density of noisy samples at one sigma, with their figures.

    Args:
        model: `model(x, sigma) -> Scores`; its unscaled scores drive the chains.
        init: one start for each chain. Shape (chain, *dims), on the device of the model.
        sigma: noise level, > 0. Data units.
        method, step_size, n_steps, burn_in, thin, seed: as in `sampling.sample`: any method but
            "ozaki_isotropic", which asks for scores that few models give.
        reference: draws of the density, such as `noisy_held_out`. Shape (n, *dims).
        options: its further arguments, such as curvature, chunk_size and progress.

    Returns:
        draws (chain, draw, *dims), and {"method", "step_size", "min_ess", "us_per_step"}: the
        smallest effective sample size of any entry, all chains together (NaN for fewer than 4
        draws), and the time of one step of all chains, network included. Adjusted methods add
        "acceptance", the mean over steps and chains. A reference adds "spread" and
        "energy_distance", see `sampling.LawError`. Chains that are not finite have NaN.

    Raises:
        ValueError, TypeError: as `sampling.sample`.
    """
    score_fn = scores_at(model, check_number("run_chains", "sigma", sigma))
    settings: dict[str, Any] = {"method": method, "step_size": step_size, "seed": seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunawayWarning)
        sample(score_fn, init, n_steps=3, **settings, **(options | {"progress": False}))  # warm-up
    chains = sample(
        score_fn, init, n_steps=n_steps, burn_in=burn_in, thin=thin, **settings, **options
    )
    enough = chains.draws.shape[1] >= 4
    figures = {
        "method": method,
        "step_size": step_size,
        "min_ess": diagnostics.min_ess(chains.draws) if enough else math.nan,
        "us_per_step": 1e6 * chains.stats["seconds"] / max(burn_in + n_steps, 1),
    }
    if "acceptance" in chains.stats:
        figures["acceptance"] = float(chains.stats["acceptance"].mean())
    if reference is not None:
        figures |= law_of(chains.draws, reference)
    return chains.draws, figures


def noisy_held_out(source: data.Source, sigma: float, *, count: int, seed: int) -> Tensor:
    """Test rows under noise of this level, at most so many: draws of the density of noisy data.

    Args:
        source: see `data.open_source`.
        sigma: noise level, > 0. Data units.
        count: rows, at most.
        seed: of dequantisation and noise.

    Returns:
        Shape (n, *dims), float32, data units, on the CPU.
    """
    rows = held_out("noisy_held_out", source, "test", seed).up_to(count)
    x0 = rows.clean()
    return x0 + sigma * rows.noise(x0)


def clean_held_out(source: data.Source, *, count: int, seed: int) -> Tensor:
    """Test rows in data units, at most so many. Shape (n, *dims), float32, on the CPU."""
    return held_out("clean_held_out", source, "test", seed).up_to(count).clean()


def law_of(draws: Tensor, reference: Tensor) -> dict[str, float]:
    """How far the law of chains is from that of reference samples; NaN if they are not finite."""
    rows = draws.flatten(0, 1)
    if not bool(rows.isfinite().all()) or len(rows) < 2 or len(reference) < 2:
        return {"spread": math.nan, "energy_distance": math.nan}
    found = diagnostics.law_error(rows, reference.to(rows))
    return {"spread": found.spread, "energy_distance": found.energy_distance}


def chains_alarm(chains: Chains, starts: Tensor, reference: Tensor) -> str:
    """What is wrong with chains that started from draws of their law; empty if nothing is.

    Besides the bounds of `sampling.watch`, the last half of the draws is compared with the
    reference: chains that began in the law must stay as wide as it is.

    Args:
        chains: what the run gave.
        starts: where they started. Shape (chain, *dims).
        reference: draws of the law, `noisy_held_out`. Shape (n, *dims).
    """
    said = watch.findings(chains.stats)
    kept = ~chains.stats["diverged"]
    if not kept.any():
        return watch.alarm(said)
    late = chains.draws[kept, chains.draws.shape[1] // 2 :].flatten(0, 1).double()
    starts, reference = (each.to(late).flatten(1) for each in (starts, reference))
    late, centre = late.flatten(1), reference.mean(0)
    ratios = [_ratio(late, starts, reference, centre, size) for size in (_root_mean, _median)]
    if all(r > SPREAD for r in ratios) or all(r < 1 / SPREAD for r in ratios):
        word = "wider" if ratios[0] > 1 else "narrower"
        said.append(
            f"the chains have become {word} than the noisy held-out samples that they started "
            f"from: {ratios[0]:.3g} times by the standard deviation, {ratios[1]:.3g} times by the "
            f"median distance (bounds {1 / SPREAD:g} and {SPREAD:g})"
        )
    most = float(_sizes(torch.cat([reference, starts])).max())
    sizes = chains.stats["sizes"][kept, -1] if "sizes" in chains.stats else None
    if sizes is not None and float(sizes.max()) > SIZE * most:
        said.append(
            f"|x| of {int((sizes > SIZE * most).sum())} chains is above {SIZE:g} times that of "
            f"any held-out sample: up to {float(sizes.max()):.3g} against {most:.3g}"
        )
    return watch.alarm(said)


def _ratio(
    late: Tensor,
    starts: Tensor,
    reference: Tensor,
    centre: Tensor,
    size: Callable[[Tensor], float],
) -> float:
    """Size of the late draws over that of the law, whose starts are allowed to be unusual; 1 where
    one held-out sample is all there is, which has no size to compare with."""
    now, begin, right = (size(each - centre) for each in (late, starts, reference))
    low, high = min(begin, right), max(begin, right)
    if high == 0:
        return 1.0
    return now / high if now > high else now / low if now < low else 1.0


def _sizes(x: Tensor) -> Tensor:
    """rms |x| over the entries, one a row."""
    return x.double().square().mean(1).sqrt()


def _root_mean(x: Tensor) -> float:
    return float(_sizes(x).square().mean().sqrt())


def _median(x: Tensor) -> float:
    return float(_sizes(x).median())


def scores_at(model: Model, sigma: float) -> Callable[..., UnscaledScores]:
    """The scores of the noisy density at one sigma, as `sampling.sample` takes them."""
    conditional: Callable[..., Scores] = model
    return lambda x, **model_kwargs: conditional(x, sigma, **model_kwargs).unscaled(sigma)
