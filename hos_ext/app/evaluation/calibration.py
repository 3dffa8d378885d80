"""Whether covariances are as large as the errors, and the scalar that makes them so."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checks import check, check_count, check_number
from ...conditions import condition_rows, move_conditions
from ...schedules import draw_sigma
from ...scores import Model, model_scores
from ...tweedie.posterior import posterior
from ...uncertainty.calibration import calibration, recalibration_factor
from .. import data
from .denoising import Denoised, join, known
from .rows import chunk_rows, held_out, to_device

COVERAGE_LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_COMPONENTS = 4


@torch.no_grad()
def recalibrate(
    model: Model,
    source: data.Source,
    *,
    sigma_range: tuple[float, float] = (0.1, 1.2),
    seed: int,
    limit: int = 256,
) -> float:
    """One scalar a for all noise levels: a C is calibrated at tau = sigma / 2 on validation rows.

    Levels are log-uniform over sigma_range. In units of sigma every level has the same tau = 1/2,
    and scaled scores stay what they are, so that one call of `recalibration_factor` pools them.

    Args:
        model: `model(x, sigma) -> Scores`, in eval mode.
        source: see `data.open_source`.
        sigma_range: smallest and largest sigma, data units.
        seed: of dequantisation, levels and noise.
        limit: at most so many rows, the first; their posteriors are held in memory in float64.

    Returns:
        a > 0.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind; no validation rows;
            as `recalibration_factor`.
    """
    where = "recalibrate"
    low, high = (check_number(where, "sigma_range", value) for value in sigma_range)
    check(where, low <= high, "sigma_range must be increasing", sigma_range)
    limit = check_count(where, "limit", limit)
    rows = held_out(where, source, "validation", seed).up_to(limit)
    x0 = rows.clean()
    sigma = draw_sigma(len(x0), (low, high), seed=seed, offset=rows.offset)
    level = sigma.view(-1, *[1] * (x0.dim() - 1))
    noise = rows.noise(x0)
    # The model takes x in data units; what is in units of sigma has one tau for all levels.
    unit_x0, unit_x, x, sigma = (
        to_device(model, value)
        for value in (x0 / level, x0 / level + noise, x0 + level * noise, sigma)
    )
    conditions, size = move_conditions(rows.conditions, x.device), chunk_rows(x0.shape[1:])
    found = []
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        told = condition_rows(conditions, part)
        scores = model_scores(where, model, x[part], sigma[part], told)
        found.append(posterior(unit_x[part], scores, 1.0))
    return recalibration_factor(unit_x0, join(found), tau=0.5)


def calibration_figures(result: Denoised, recalibration: float) -> dict[str, float]:
    """`calibration` as it is and, with tau = sigma / 2, as a predictive check.

    Args:
        result: of samples whose truth is known.
        recalibration: scalar of the covariance, > 0: see `recalibrate`.

    Returns:
        {"sigma", "mahalanobis", "trace_ratio", "predictive", "n" (samples)}. Each of the three
        comes again as "..._recalibrated", with the covariance times `recalibration`.

    Raises:
        ValueError: the clean samples are not known; as `calibration`.
    """
    x0 = known("calibration_figures", result)
    raw, tau = result.posterior, result.sigma / 2
    scaled = raw.recalibrated(recalibration)
    figures = calibration(x0, raw)
    recalibrated = calibration(x0, scaled)
    predictive = calibration(x0, raw, tau=tau)
    predictive_recalibrated = calibration(x0, scaled, tau=tau)
    return {
        "sigma": result.sigma,
        **figures,
        **{f"{name}_recalibrated": value for name, value in recalibrated.items()},
        "predictive": predictive["mahalanobis"],
        "predictive_recalibrated": predictive_recalibrated["mahalanobis"],
        "n": len(x0),
    }


def coverage(result: Denoised, scale: float = 1.0) -> Tensor:
    """Share of the entries in their central interval of probability COVERAGE_LEVELS.

    Shape (L,), on the CPU. The covariance is multiplied by `scale`.
    """
    error = (known("evaluate", result) - result.posterior.mean).double()
    variance = scale * result.posterior.covariance.diagonal().double().reshape(error.shape)
    # NaN where the variance is negative: inside nowhere. `searchsorted` would go astray at a NaN.
    probability = torch.erf(error.abs() / (2 * variance).sqrt()).flatten()
    probability = probability.nan_to_num(math.inf).sort().values
    levels = torch.tensor(COVERAGE_LEVELS, dtype=torch.float64, device=error.device)
    inside = torch.searchsorted(probability, levels, right=True)
    return inside.double().cpu() / probability.numel()


def component_sums(result: Denoised, rows: int) -> dict[str, Tensor]:
    """Sums over the first rows: (v^T e)^2 and eigenvalues (k,), |e|^2 and the trace of C."""
    error = (known("evaluate", result) - result.posterior.mean)[:rows].flatten(1).double()
    covariance = result.posterior.covariance.rows(slice(rows))
    k = min(_COMPONENTS, error.shape[1])
    values = error.new_full((k,), math.nan)
    along = values
    if bool(covariance.diag.isfinite().all() & covariance.factor.isfinite().all()):
        pairs = covariance.eigh(k)
        values = pairs[0].double().sum(0)
        along = (error.unsqueeze(1) @ pairs[1].double()).squeeze(1).square().sum(0)
    return {
        "along": along.cpu(),
        "values": values.cpu(),
        "square": error.square().sum().cpu(),
        "trace": covariance.trace().double().sum().cpu(),
    }
