"""All figures of a model on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...checks import check_count, check_number
from ...scores import Model
from ...uncertainty.conformal import Conformal
from .. import data
from .accuracy import accuracy
from .calibration import COVERAGE_LEVELS, calibration_figures, component_sums, coverage
from .denoising import Denoised, denoise_rows, denoising_errors
from .plain import plain_json
from .regions import region_figures, region_means, regions_of
from .rows import HeldOut, held_out, noise_levels

# Rows of which `evaluate` takes eigenvectors: 10 to 25 ms each from 784 to 3072 entries.
_SPECTRA = 128
_TRUTH_ROWS = 1024


@torch.no_grad()
def evaluate(
    model: Model,
    source: data.Source,
    sigmas: Iterable[float],
    *,
    recalibration: float = 1.0,
    seed: int,
    part: str = "test",
    limit: int | None = None,
) -> dict[str, Any]:
    """All figures of a model on held-out rows, as plain JSON: numbers that do not exist are None.

    Args:
        model: `model(x, sigma) -> Scores`, in eval mode.
        source: see `data.open_source`.
        sigmas: noise levels, > 0. Data units.
        recalibration: scalar of the covariance, fitted on other rows: see `recalibrate`.
        seed: of dequantisation and noise.
        part: "test" or "validation".
        limit: at most so many rows, the first; None is all of them.

    Returns:
        {"source", "part", "dims", "n" (rows), "seed", "recalibration", "levels", "accuracy"}.
        "accuracy" is that of `accuracy`, None where the source has no true density. "levels" has
        for each sigma the figures of `denoising_errors` and of `calibration_figures`, and

            variance      what the posterior expects "mse_denoised" to be, raw
            coverage      {"levels", "raw", "recalibrated"}: the share of the entries inside their
                          central interval of each nominal probability. A negative variance holds
                          nothing.
            components    {"n", "share", "expected"}: of the first n rows, the share of the squared
                          error that lies along the leading eigenvectors of each covariance, and
                          the share that the eigenvalues give them.
            conformal     regions of guaranteed coverage made from the validation rows, and how
                          they do on these: {"level", "least_share", "rows" (of validation), for
                          "share" and "simultaneous" {"covered", "half_width" and the same for
                          Gaussian intervals, "..._gaussian"}}; see `uncertainty.conformal`. None
                          where there are too few validation rows, and for that part itself.
    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind; the part is empty.
    """
    where = "evaluate"
    levels = noise_levels(where, sigmas)
    scale = check_number(where, "recalibration", recalibration)
    rows = held_out(where, source, part, seed)
    if limit is not None:
        limit = check_count(where, "limit", limit)
        rows = rows.up_to(limit)
    n, truth = len(rows), source.truth
    exact = None
    if truth is not None:
        exact = accuracy(model, truth, levels, n=min(n, _TRUTH_ROWS), seed=seed, dims=source.shape)
    report: dict[str, Any] = plain_json(
        {
            "source": source.spec,
            "part": part,
            "dims": list(source.shape),
            "n": n,
            "seed": seed,
            "recalibration": scale,
            "levels": [
                _level(
                    model,
                    rows,
                    sigma,
                    scale,
                    regions_of(model, source, sigma, scale, seed) if part == "test" else {},
                )
                for sigma in levels
            ],
            "accuracy": exact,
        }
    )
    return report


def _level(
    model: Model, rows: HeldOut, sigma: float, scale: float, regions: dict[str, Conformal]
) -> dict[str, Any]:
    """The figures of `evaluate` at one noise level: sums over the rows, chunk by chunk."""
    sums: dict[str, Tensor | float] = {}
    for chunk in rows.chunks():
        result = denoise_rows(model, chunk, sigma)
        means = _means(result, scale) | region_means(result, regions, scale)
        added = {name: len(chunk) * mean for name, mean in means.items()}
        spectra = min(len(chunk), _SPECTRA - chunk.first)
        if spectra > 0:
            added |= component_sums(result, spectra)
        for name, total in added.items():
            sums[name] = sums.get(name, 0.0) + total
    n = len(rows)
    figures: dict[str, Any] = {}
    for name in ("mse_noisy", "mse_denoised", "variance", "mahalanobis", "predictive"):
        figures[name] = float(sums[name]) / n
        if f"{name}_recalibrated" in sums:
            figures[f"{name}_recalibrated"] = float(sums[f"{name}_recalibrated"]) / n
    # A ratio of means, not the mean of the ratios of chunks.
    error, variance = figures["mse_denoised"], figures["variance"]
    ratio = error / variance if variance else math.nan
    return {
        "sigma": sigma,
        "n": n,
        **figures,
        "trace_ratio": ratio,
        "trace_ratio_recalibrated": ratio / scale,
        "coverage": {
            "levels": list(COVERAGE_LEVELS),
            "raw": torch.as_tensor(sums["coverage"] / n).tolist(),
            "recalibrated": torch.as_tensor(sums["coverage_recalibrated"] / n).tolist(),
        },
        "components": {
            "n": min(n, _SPECTRA),
            "share": torch.as_tensor(sums["along"] / sums["square"]).tolist(),
            "expected": torch.as_tensor(sums["values"] / sums["trace"]).tolist(),
        },
        "conformal": region_figures(sums, regions, n),
    }


def _means(result: Denoised, scale: float) -> dict[str, Tensor | float]:
    """Figures of a chunk that are means over its rows."""
    trace = result.posterior.covariance.trace().double().mean()
    return {
        **denoising_errors(result),
        **calibration_figures(result, scale),
        "variance": float(trace) / result.x[0].numel(),
        "coverage": coverage(result),
        "coverage_recalibrated": coverage(result, scale),
    }
