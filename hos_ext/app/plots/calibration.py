"""Calibration at each noise level, and how often intervals hold the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .style import BLUE, GREY, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..evaluation import Denoised

# What the recalibrated predictive figure is asked to lie in.
BAND = (0.8, 1.25)

# Name, label, marker and colour of each figure.
_MARKS = (
    ("mahalanobis", "Mahalanobis, raw", "D", GREY),
    ("predictive", "predictive, raw", "o", ORANGE),
    ("predictive_recalibrated", "predictive, recalibrated", "o", BLUE),
)
_TICKS = (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)
_WIDE_TICKS = (1e-3, 0.01, 0.1, 0.3, 1, 3, 10, 100, 1e3, 1e4)
_Curve = tuple[Sequence[float], Sequence[float], float]  # probabilities, shares, sigma


def calibration_figure(
    rows: Sequence[dict[str, Any]],
    results: Sequence[Denoised] | None = None,
    *,
    recalibration: float = 1.0,
) -> Figure:
    """Calibration at each noise level, before and after recalibration, and coverage of intervals.

    Args:
        rows: {"sigma", "mahalanobis", "predictive", "predictive_recalibrated"} for each level; the
            "levels" of `evaluation.evaluate` hold them, and "coverage" besides. What is None or
            not positive is left out.
        results: the same levels, for the coverage of the intervals mean +- q std of each entry;
            None: from "coverage".
        recalibration: the scalar of the covariance, for the coverage of results.

    Returns:
        Figure: above, the figures on a log scale (1 is calibrated, right of it overconfident, BAND
        shaded); below, how often a true entry lies in its central interval against how
        often it should.

    Raises:
        ValueError: results do not hold the clean samples.
    """
    if results is None:
        shares = [(row["coverage"], row["sigma"]) for row in rows]
        curves = [(each["levels"], each["recalibrated"], sigma) for each, sigma in shares]
    else:
        curves = [_coverage(result, recalibration) for result in results]
    figure = new_figure(4.6)
    first, second = figure.subplots(2, 1, height_ratios=[1.0, 1.5])
    _show_figures(first, rows)
    _show_coverage(second, curves)
    return figure


def _show_figures(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """The figures of each level as points, one level a line."""
    ax.axvspan(*BAND, color=GREY, alpha=0.18, lw=0)
    ax.axvline(1.0, color=GREY, lw=0.8)
    figures = list(BAND)
    for key, label, marker, color in _MARKS:
        points = [
            (float(row[key]), place)
            for place, row in enumerate(rows)
            if row[key] is not None and 0 < row[key] < math.inf
        ]
        values = [value for value, _ in points]
        places = [place for _, place in points]
        ax.scatter(values, places, label=label, marker=marker, color=color, s=26)
        figures += values
    ax.set_xscale("log")
    ratio = max(figures) / min(figures)
    low, high = min(figures) * min(0.9, ratio**-0.04), max(figures) * max(1.1, ratio**0.04)
    ax.set_xlim(low, high)
    known = _WIDE_TICKS if ratio > 8 else _TICKS  # room for fewer numbers
    ticks = [t for t in known if low <= t <= high]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    ax.set_xticks([], minor=True)
    ax.set_yticks(range(len(rows)), [f"sigma {row['sigma']:g}" for row in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.legend(
        fontsize=7,
        frameon=False,
        ncols=3,
        loc="lower center",
        bbox_to_anchor=(0.45, 1.0),
        columnspacing=0.8,
        handletextpad=0.1,
    )
    ax.set_xlabel("mean squared error over what the covariance expects", fontsize=8)


def _show_coverage(ax: Axes, curves: Sequence[_Curve]) -> None:
    """Shares inside against nominal probabilities, one curve a level."""
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    styles = ("-", "--", ":", "-.") * len(curves)
    for (nominal, covered, sigma), style in zip(curves, styles, strict=False):
        ax.plot(nominal, covered, style, color=BLUE, lw=1.4, label=f"sigma {sigma:g}")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.set_xlabel("probability of the interval mean ± q std", fontsize=8)
    ax.set_ylabel("share of true values inside", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=7.5, frameon=False)


def _coverage(result: Denoised, scale: float) -> _Curve:
    """The curve of a result whose covariance is multiplied by `scale`."""
    if result.x0 is None:
        raise ValueError("calibration_figure: results must hold the clean samples, got None")
    nominal = torch.linspace(0.02, 0.98, 49)
    spread = scale**0.5 * result.posterior.std
    ratio = ((result.x0 - result.posterior.mean) / spread).abs().flatten().cpu()
    ratio = ratio.nan_to_num(math.inf, math.inf).sort().values  # NaN: a negative variance
    inside = torch.searchsorted(ratio, torch.erfinv(nominal) * 2**0.5, right=True)
    return nominal.tolist(), (inside / len(ratio)).tolist(), result.sigma
