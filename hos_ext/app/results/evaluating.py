"""The files of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...scores import Model
from .. import data, evaluation, plots

EVALUATE_FILES = ("evaluate.json", "calibration.png", "uncertainty.png")


def evaluated(
    model: Model,
    source: data.Source,
    sigmas: Sequence[float],
    report: Mapping[str, Any],
    *,
    seed: int,
) -> dict[str, bytes]:
    """The pictures of `evaluate`: calibration, and the covariance at up to four of the levels.

    Args:
        model, source, sigmas, seed: as `evaluation.evaluate` took them.
        report: what it returned.

    Returns:
        The content of each of EVALUATE_FILES but the first, by name.

    Raises:
        RuntimeError: matplotlib is missing.
    """
    count = min(4, len(source.test))
    results = [
        evaluation.denoise_held_out(
            model, source, sigma, count=count, seed=seed, recalibration=report["recalibration"]
        )
        for sigma in sigmas[:4]
    ]
    figures = (plots.calibration_figure(report["levels"]), plots.uncertainty_figure(results))
    return dict(zip(EVALUATE_FILES[1:], map(plots.png, figures), strict=True))
