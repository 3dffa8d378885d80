"""How good a model of digits came out: denoising errors, calibration and chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import data, diagnostics, ops
from .calibrate import calibration, recalibration_factor
from .samplers import sample
from .training import SIGMA_RANGE, draw_sigma
from .tweedie import Posterior, Scores, UnscaledScores, posterior

Model = Callable[[Tensor, Tensor | float], Scores]

_STREAM_NOISE = 34
# Second keys of the noise on validation and test digits, the same for every model.
_VALIDATION_OFFSET, _TEST_OFFSET = 1, 2


class Denoised(NamedTuple):
    """Held-out digits at one noise level: clean and noisy (n, 8, 8), and the posteriors."""

    sigma: float
    clean: Tensor
    noisy: Tensor
    posterior: Posterior


@torch.no_grad()
def denoise(model: Model, grey: Tensor, sigma: float, *, seed: int) -> Denoised:
    """Dequantises digits, adds noise of level sigma, and gives the posterior of what was there."""
    clean = data.dequantise(grey, seed=seed, offset=_TEST_OFFSET)
    noisy = clean + sigma * ops.normal(
        clean.shape, seed=seed, offset=_TEST_OFFSET, stream=_STREAM_NOISE
    )
    return Denoised(sigma, clean, noisy, posterior(noisy, model(noisy, sigma), sigma))


@torch.no_grad()
def recalibrate(
    model: Model, grey: Tensor, sigma_range: tuple[float, float] = SIGMA_RANGE, *, seed: int
) -> float:
    """One scalar a for every noise level: a C is calibrated at tau = sigma / 2 on these digits.

    Levels are log-uniform over sigma_range. In units of sigma every level has the same tau = 1/2,
    and scaled scores stay what they are, so that one call of `recalibration_factor` pools them.
    """
    clean = data.dequantise(grey, seed=seed, offset=_VALIDATION_OFFSET)
    sigma = draw_sigma(len(clean), sigma_range, seed=seed, offset=_VALIDATION_OFFSET)
    noise = ops.normal(clean.shape, seed=seed, offset=_VALIDATION_OFFSET, stream=_STREAM_NOISE)
    unit = clean / sigma.view(-1, 1, 1)
    scores = model(clean + sigma.view(-1, 1, 1) * noise, sigma)
    return recalibration_factor(unit, posterior(unit + noise, scores, 1.0), tau=0.5)


def denoising_errors(result: Denoised) -> dict[str, float]:
    """Mean squared error of a pixel, noisy and denoised, in squared data units."""
    noisy = (result.noisy - result.clean).square().mean()
    denoised = (result.posterior.mean - result.clean).square().mean()
    return {"sigma": result.sigma, "mse_noisy": float(noisy), "mse_denoised": float(denoised)}


def calibration_figures(result: Denoised, recalibration: float) -> dict[str, float]:
    """`calibration` as it is and, with tau = sigma / 2, as a predictive check."""
    raw, tau = result.posterior, result.sigma / 2
    scaled = raw.recalibrated(recalibration)
    figures = calibration(result.clean, raw)
    recalibrated = calibration(result.clean, scaled)
    predictive = calibration(result.clean, raw, tau=tau)
    predictive_recalibrated = calibration(result.clean, scaled, tau=tau)
    return {
        "sigma": result.sigma,
        **figures,
        **{f"{name}_recalibrated": value for name, value in recalibrated.items()},
        "predictive": predictive["mahalanobis"],
        "predictive_recalibrated": predictive_recalibrated["mahalanobis"],
        "n": len(result.clean),
    }


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
) -> tuple[Tensor, dict[str, Any]]:
    """Chains of the density of noisy digits at one sigma, with their figures.

    Args:
        model: its unscaled scores drive the chains.
        init: one start for each chain. Shape (chain, 8, 8).
        sigma, method, step_size, n_steps, burn_in, thin, seed: as in `samplers.sample`.

    Returns:
        draws (chain, draw, 8, 8), and {"method", "step_size", "min_ess", "us_per_step"}: the
        smallest effective sample size of any pixel, all chains together, and the time of one step
        of all chains, network included.

    Raises:
        RuntimeError: chains diverged.
    """

    def score_fn(x: Tensor) -> UnscaledScores:
        return model(x, sigma).unscaled(sigma)

    sample(score_fn, init, method=method, step_size=step_size, n_steps=3, seed=seed)  # warm-up
    chains = sample(
        score_fn,
        init,
        method=method,
        step_size=step_size,
        n_steps=n_steps,
        burn_in=burn_in,
        thin=thin,
        seed=seed,
    )
    diverged = int(chains.stats["diverged"].sum())
    if diverged:
        raise RuntimeError(
            f"run_chains: step_size must keep the chains finite, got {step_size} with which "
            f"{diverged} of {len(init)} {method} chains diverged"
        )
    return chains.draws, {
        "method": method,
        "step_size": step_size,
        "min_ess": diagnostics.min_ess(chains.draws),
        "us_per_step": 1e6 * chains.stats["seconds"] / (burn_in + n_steps),
    }
