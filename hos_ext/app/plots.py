"""Figures of posteriors, calibration, training and chains, and the report that holds them.

A figure is 4.6 inches wide with text of 7 to 9 points: shown at the width of a phone it keeps about
its natural size. Functions return a `matplotlib.figure.Figure` (extra `app`), no pyplot state is
touched, and one colour means one thing on every figure. Samples of dims (H, W) and (C, H, W) are
shown as images, C = 3 in colour and other C as the mean over C; at most 3 rows of 2, and all other
dims, are signals, shown as lines of their entries in order.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .evaluation import Denoised
    from .training.checkpoints import History

_WIDTH = 4.6
_BLUE, _ORANGE, _GREY = "#1f6fb4", "#d9622b", "#8a8a8a"
_LINES = (_BLUE, _ORANGE, "#3d8f5f", "#7d5ba6")
_COMPONENTS = 4
# What the recalibrated predictive figure is asked to lie in.
BAND = (0.8, 1.25)

# A legend beside its axes: on a signal there is no free corner to count on.
_BESIDE: dict[str, Any] = {
    "fontsize": 6.5,
    "frameon": False,
    "loc": "center left",
    "bbox_to_anchor": (1.0, 0.5),
    "handlelength": 1.0,
    "handletextpad": 0.4,
    "borderaxespad": 0.2,
}


def _figure(height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    module = require("plots", "matplotlib.figure")
    figure: Figure = module.Figure(figsize=(_WIDTH, height), dpi=200, layout=layout)
    return figure


class _Scale(NamedTuple):
    """How samples are shown: "grey", "colour" or "lines", between these values, in this map."""

    kind: str
    low: float
    high: float
    cmap: str

    @property
    def ink(self) -> bool:
        """Dark on white, as on paper."""
        return self.cmap == "gray_r"


def _scale(samples: Tensor) -> _Scale:
    """The range -1 ... 1 where all samples (n, *dims) lie in it, or else theirs.

    Grey images are ink on paper where more than half of the entries are near the low end.
    """
    dims = samples.shape[1:]
    flat = samples.detach().flatten().float()
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (-1.0, 1.0)
    if low >= -1 and high <= 1:
        low, high = -1.0, 1.0
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        low, high = -1.0, 1.0
    lines = len(dims) not in (2, 3) or (len(dims) == 2 and dims[0] <= 3)
    kind = "lines" if lines else "colour" if len(dims) == 3 and dims[0] == 3 else "grey"
    paper = len(flat) > 0 and float(flat.median()) < low + (high - low) / 4
    return _Scale(kind, low, high, "gray_r" if paper and kind == "grey" else "gray")


def _plane(values: Tensor) -> Any:
    """An array (H, W) of an image with or without channels: their mean."""
    return (values if values.dim() == 2 else values.mean(0)).detach().cpu().numpy()


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(linewidth=0.4, color=_GREY)


def _show(ax: Axes, sample: Tensor, scale: _Scale) -> None:
    """One sample in data units, without axes."""
    _bare(ax)
    if scale.kind == "lines":
        ax.plot(sample.detach().flatten().cpu().numpy(), color=_BLUE, lw=0.8)
        ax.set_ylim(scale.low, scale.high)
    elif scale.kind == "colour":
        unit = ((sample - scale.low) / (scale.high - scale.low)).clamp(0, 1)
        ax.imshow(unit.detach().permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    else:
        ax.imshow(
            _plane(sample),
            interpolation="nearest",
            cmap=scale.cmap,
            vmin=scale.low,
            vmax=scale.high,
        )


def _show_std(ax: Axes, std: Tensor, top: float) -> Any:
    """Standard deviations, over channels their root mean square."""
    _bare(ax)
    if std.dim() == 3:
        std = std.square().mean(0).sqrt()
    return ax.imshow(_plane(std), interpolation="nearest", cmap="magma", vmin=0.0, vmax=top)


def _outline(ax: Axes, mean: Tensor, scale: _Scale) -> None:
    """The edge of the ink of a denoised image, half-way between paper and ink."""
    values, middle = _plane(mean), (scale.low + scale.high) / 2
    if scale.ink and values.min() < middle < values.max():
        ax.contour(values, levels=[middle], colors="white", linewidths=0.7)


def _show_vector(ax: Axes, vector: Tensor, scale: _Scale) -> None:
    """An eigenvector, which `eigh` gives with its largest entry positive, over that entry: red and
    blue, or in colour about grey."""
    _bare(ax)
    unit = (vector / vector.abs().max()).detach()
    if scale.kind == "colour":
        shown = ((1 + unit) / 2).permute(1, 2, 0).cpu().numpy()
        ax.imshow(shown, interpolation="nearest")
    else:
        ax.imshow(_plane(unit), interpolation="nearest", cmap="RdBu_r", vmin=-1.0, vmax=1.0)


def _components(result: Denoised, rows: int, k: int) -> tuple[Tensor, Tensor]:
    """Shares of the variance (rows, k) and eigenvectors (rows, *dims, k) of the first rows."""
    covariance = result.posterior.covariance.rows(slice(rows))
    values, vectors = covariance.eigh(min(k, covariance.shape[1]))
    share = values / covariance.trace().unsqueeze(-1)
    return share, vectors.reshape(*result.noisy[:rows].shape, -1)


def _percent(share: Tensor) -> str:
    percent = 100 * float(share)
    return f"{percent:.0f} %" if percent >= 1 else f"{percent:.1g} %"


def _std_label(scale: _Scale) -> str:
    if scale.ink and (scale.low, scale.high) == (-1, 1):
        return "std of a pixel (white is -1, ink 1)"
    return f"std of a pixel (images are shown from {scale.low:.3g} to {scale.high:.3g})"


def _std_bar(figure: Figure, image: Any, height: float, label: str) -> None:
    """The colour bar of the standard deviations, at the foot of the figure."""
    bar = figure.colorbar(
        image,
        cax=figure.add_axes((0.28, 0.36 / height, 0.44, 0.06 / height)),
        orientation="horizontal",
    )
    bar.set_label(label, fontsize=7, labelpad=1)
    bar.ax.tick_params(labelsize=7)


def _cell(dims: Sequence[int], columns: int) -> float:
    """Height of an image, in inches, in a row of so many; tall images get less than their width."""
    width = 0.9 * 0.98 * _WIDTH / columns
    return width * min(max(dims[-2] / dims[-1], 0.4), 1.6)


def denoising_figure(result: Denoised, *, rows: int = 4) -> Figure:
    """Noisy, denoised and true samples, standard deviation, first four eigenvectors of Cov[x | x~].

    Args:
        result: samples at one noise level; the first `rows` are shown.
        rows: samples, one in a row.

    Returns:
        Figure. Of images: a line on the standard deviation marks the outline of denoised ink; in
        colour images it is the root mean square over the channels. Under each eigenvector is its
        share of the posterior variance. Its sign means nothing: the largest entry is shown
        positive, red, or in colour images above grey.
        Of signals: left the noisy values as dots, the mean with a band of two standard deviations,
        and the true values; right the eigenvectors.
    """
    check_count("denoising_figure", "rows", rows)
    rows = min(rows, len(result.noisy))
    mean, std = result.posterior.mean[:rows], result.posterior.std[:rows]
    clean = None if result.clean is None else result.clean[:rows]
    scale = _scale(mean if clean is None else clean)
    share, vectors = _components(result, rows, _COMPONENTS)
    if scale.kind == "lines":
        return _denoising_lines(result, rows, share, vectors)
    k = share.shape[1]
    titles = ["noisy", "denoised", *([] if clean is None else ["true"]), "std"]
    place = len(titles) - 1
    titles += [f"vector {i + 1}" if i == 0 else str(i + 1) for i in range(k)]
    columns = len(titles)
    cell = _cell(mean.shape[1:], columns)
    height = 0.2 + rows * (cell + 0.17) + 0.55
    figure = _figure(height, layout=None)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        top=1 - 0.2 / height,
        bottom=0.6 / height,
        wspace=0.1,
        hspace=0.17 / cell,
    )
    top = _top(std)
    image: Any = None
    for i in range(rows):
        shown = [result.noisy[i], mean[i], *([] if clean is None else [clean[i]])]
        for ax, sample in zip(axes[i], shown, strict=False):
            _show(ax, sample, scale)
        image = _show_std(axes[i, place], std[i], top)
        _outline(axes[i, place], mean[i], scale)
        for j in range(k):
            ax = axes[i, place + 1 + j]
            _show_vector(ax, vectors[i, ..., j], scale)
            ax.set_xlabel(_percent(share[i, j]), fontsize=6.5, labelpad=1)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=7.5, pad=3)
    _std_bar(figure, image, height, _std_label(scale))
    return figure


def _top(std: Tensor) -> float:
    """The upper end of a scale of standard deviations; NaN is a negative variance."""
    return float(std.nan_to_num(0.0).max()) or 1.0


def _denoising_lines(result: Denoised, rows: int, share: Tensor, vectors: Tensor) -> Figure:
    """`denoising_figure` for signals and vectors."""
    figure = _figure(0.35 + 1.15 * rows)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True, width_ratios=[1.5, 1.0])
    mark = "o" if result.noisy[0].numel() <= 40 else None  # few entries: each is seen
    for i in range(rows):
        noisy, mean, std = (
            values[i].detach().flatten().cpu().numpy()
            for values in (result.noisy, result.posterior.mean, result.posterior.std)
        )
        entries = np.arange(len(mean))
        ax, right = axes[i]
        ax.plot(entries, noisy, ".", color=_GREY, ms=6 if mark else 3, label="noisy")
        ax.fill_between(entries, mean - 2 * std, mean + 2 * std, color=_BLUE, alpha=0.25, lw=0)
        ax.plot(entries, mean, color=_BLUE, lw=1.2, marker=mark, ms=3, label="mean ± 2 std")
        if result.clean is not None:
            clean = result.clean[i].detach().flatten().cpu().numpy()
            ax.plot(entries, clean, color="black", lw=0.7, marker=mark, ms=2, label="true")
        for j, color in zip(range(share.shape[1]), _LINES, strict=False):
            vector = vectors[i, ..., j].detach().flatten().cpu().numpy()
            text = _percent(share[i, j])
            right.plot(entries, vector, color=color, lw=0.9, marker=mark, ms=2.5, label=text)
        right.axhline(0.0, color=_GREY, lw=0.4)
        right.legend(**_BESIDE)
        for each in (ax, right):
            each.tick_params(labelsize=7)
    axes[0, 0].legend(
        fontsize=7,
        frameon=False,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        columnspacing=0.8,
        handletextpad=0.4,
        borderaxespad=0.1,
    )
    axes[0, 1].set_title("eigenvectors", fontsize=7.5, pad=4)
    _name_entries(axes)
    return figure


def _name_entries(axes: Any) -> None:
    """The axis of entries: whole numbers."""
    ticker = require("plots", "matplotlib.ticker")
    for ax in axes[-1]:
        ax.set_xlabel("entry", fontsize=7.5)
        ax.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True, min_n_ticks=1))


def uncertainty_figure(results: Sequence[Denoised], *, rows: int = 3) -> Figure:
    """The same samples at several noise levels: where the doubt is, and in which directions.

    Above, noisy sample and standard deviation (the root of the covariance's diagonal) at each
    level, on one scale; below, the eigenvectors at the middle one of the levels. Meng et al. 2021
    show these of MNIST as Figs. 3 and 4. Signals: left the standard deviation at all levels, right
    the eigenvectors.

    Args:
        results: `denoise` of the same samples, one for each level, in the order shown; at most 4.
        rows: samples shown, the first ones.

    Raises:
        ValueError: no results, more than 4, or rows out of range.
    """
    check_count("uncertainty_figure", "rows", rows)
    if not 1 <= len(results) <= 4:
        raise ValueError(f"uncertainty_figure: results must be 1 to 4 levels, got {len(results)}")
    rows = min(rows, *(len(result.noisy) for result in results))
    middle = results[len(results) // 2]
    clean = middle.clean
    means = middle.posterior.mean[:rows]
    scale = _scale(means if clean is None else clean[:rows])
    stds = [result.posterior.std[:rows] for result in results]
    if scale.kind == "lines":
        return _uncertainty_lines(results, rows, stds, middle)
    left = "denoised" if clean is None else "true"
    columns = max(1 + 2 * len(results), 5)
    share, vectors = _components(middle, rows, columns - 1)
    cell = _cell(means.shape[1:], columns)
    block = rows * cell + (rows - 1) * 0.06
    lower = rows * (cell + 0.17)
    height = 0.24 + block + 0.36 + lower + 0.5
    figure = _figure(height, layout=None)

    def grid(bottom: float, tall: float, gap: float) -> Any:
        spec = figure.add_gridspec(
            rows,
            columns,
            left=0.01,
            right=0.99,
            bottom=bottom / height,
            top=(bottom + tall) / height,
            wspace=0.1,
            hspace=gap / cell,
        )
        return spec.subplots(squeeze=False)

    upper = grid(0.5 + lower + 0.36, block, 0.06)
    under = grid(0.5 + 0.17, lower - 0.17, 0.17)
    for ax in upper[:, 1 + 2 * len(results) :].flatten():
        ax.axis("off")
    for ax in under[:, 1 + share.shape[1] :].flatten():
        ax.axis("off")
    top = max(_top(std) for std in stds)
    image: Any = None
    for i in range(rows):
        _show(upper[i, 0], means[i] if clean is None else clean[i], scale)
        for j, result in enumerate(results):
            _show(upper[i, 1 + 2 * j], result.noisy[i], scale)
            image = _show_std(upper[i, 2 + 2 * j], stds[j][i], top)
            _outline(upper[i, 2 + 2 * j], result.posterior.mean[i], scale)
        _show(under[i, 0], means[i], scale)
        for k in range(share.shape[1]):
            _show_vector(under[i, 1 + k], vectors[i, ..., k], scale)
            under[i, 1 + k].set_xlabel(_percent(share[i, k]), fontsize=6.5, labelpad=1)
    upper[0, 0].set_title(left, fontsize=7.5, pad=3)
    for j, result in enumerate(results):
        # One title over both columns of the level.
        title = f"sigma {result.sigma:g}" + (": noisy, std" if len(results) <= 3 else "")
        upper[0, 1 + 2 * j].set_title(title, fontsize=7.5, pad=3, x=1.05)
    under[0, 0].set_title("denoised", fontsize=7.5, pad=3)
    under[0, 1].set_title(
        f"eigenvectors at sigma {middle.sigma:g}, share of the variance",
        fontsize=7.5,
        pad=3,
        loc="left",
    )
    _std_bar(figure, image, height, _std_label(scale))
    return figure


def _uncertainty_lines(
    results: Sequence[Denoised], rows: int, stds: Sequence[Tensor], middle: Denoised
) -> Figure:
    share, vectors = _components(middle, rows, _COMPONENTS)
    figure = _figure(0.35 + 1.15 * rows)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True)
    mark = "o" if middle.noisy[0].numel() <= 40 else None
    for i in range(rows):
        ax, right = axes[i]
        for j, (result, std) in enumerate(zip(results, stds, strict=True)):
            values = std[i].detach().flatten().cpu().numpy()
            shade = 0.3 + 0.7 * (j + 1) / len(results)
            label = f"sigma {result.sigma:g}"
            ax.plot(values, color=_BLUE, alpha=shade, lw=1.1, marker=mark, ms=2.5, label=label)
        for j, color in zip(range(share.shape[1]), _LINES, strict=False):
            vector = vectors[i, ..., j].detach().flatten().cpu().numpy()
            text = _percent(share[i, j])
            right.plot(vector, color=color, lw=0.9, marker=mark, ms=2.5, label=text)
        right.axhline(0.0, color=_GREY, lw=0.4)
        ax.set_ylim(bottom=0.0)
        for each in (ax, right):
            each.tick_params(labelsize=7)
            each.legend(**_BESIDE)
    axes[0, 0].set_title("std", fontsize=7.5, pad=4)
    axes[0, 1].set_title(f"eigenvectors at sigma {middle.sigma:g}", fontsize=7.5, pad=4)
    _name_entries(axes)
    return figure


def uncertainty_grid(result: Denoised, *, rows: int = 4) -> np.ndarray[Any, Any]:
    """`denoising_figure` as pixels, for trackers: uint8, shape (height, width, 3)."""
    figure = denoising_figure(result, rows=rows)
    canvas = require("plots", "matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


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
    """
    figure = _figure(4.6)
    first, second = figure.subplots(2, 1, height_ratios=[1.0, 1.5])
    first.axvspan(*BAND, color=_GREY, alpha=0.18, lw=0)
    first.axvline(1.0, color=_GREY, lw=0.8)
    marks = (
        ("mahalanobis", "Mahalanobis, raw", "D", _GREY),
        ("predictive", "predictive, raw", "o", _ORANGE),
        ("predictive_recalibrated", "predictive, recalibrated", "o", _BLUE),
    )
    figures = list(BAND)
    for key, label, marker, color in marks:
        points = [
            (float(row[key]), place)
            for place, row in enumerate(rows)
            if row[key] is not None and 0 < row[key] < math.inf
        ]
        figures += [value for value, _ in points]
        first.scatter(
            [value for value, _ in points],
            [place for _, place in points],
            label=label,
            marker=marker,
            color=color,
            s=26,
        )
    first.set_xscale("log")
    ratio = max(figures) / min(figures)
    low, high = min(figures) * min(0.9, ratio**-0.04), max(figures) * max(1.1, ratio**0.04)
    first.set_xlim(low, high)
    wide = ratio > 8  # room for fewer numbers
    choice = (
        (1e-3, 0.01, 0.1, 0.3, 1, 3, 10, 100, 1e3, 1e4)
        if wide
        else (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)
    )
    ticks = [t for t in choice if low <= t <= high]
    first.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    first.set_xticks([], minor=True)
    first.set_yticks(range(len(rows)), [f"sigma {row['sigma']:g}" for row in rows], fontsize=8)
    first.set_ylim(len(rows) - 0.5, -0.5)
    first.legend(
        fontsize=7,
        frameon=False,
        ncols=3,
        loc="lower center",
        bbox_to_anchor=(0.45, 1.0),
        columnspacing=0.8,
        handletextpad=0.1,
    )
    first.set_xlabel("mean squared error over what the covariance expects", fontsize=8)

    second.plot([0, 1], [0, 1], color=_GREY, lw=0.8)
    if results is None:
        curves = [
            (row["coverage"]["levels"], row["coverage"]["recalibrated"], row["sigma"])
            for row in rows
        ]
    else:
        curves = [_coverage(result, recalibration) for result in results]
    for (nominal, covered, sigma), style in zip(
        curves, ("-", "--", ":", "-.") * len(curves), strict=False
    ):
        second.plot(nominal, covered, style, color=_BLUE, lw=1.4, label=f"sigma {sigma:g}")
    second.set(xlim=(0, 1), ylim=(0, 1))
    second.set_xlabel("probability of the interval mean ± q std", fontsize=8)
    second.set_ylabel("share of true values inside", fontsize=8)
    second.tick_params(labelsize=8)
    second.legend(fontsize=7.5, frameon=False)
    return figure


def _coverage(result: Denoised, recalibration: float) -> tuple[list[float], list[float], float]:
    """Nominal probabilities, shares of the entries inside, and sigma."""
    if result.clean is None:
        raise ValueError("calibration_figure: results must hold the clean samples, got None")
    nominal = torch.linspace(0.02, 0.98, 49)
    spread = recalibration**0.5 * result.posterior.std
    ratio = ((result.clean - result.posterior.mean) / spread).abs().flatten().cpu()
    ratio = ratio.nan_to_num(math.inf, math.inf).sort().values  # NaN: a negative variance
    inside = torch.searchsorted(ratio, torch.erfinv(nominal) * 2**0.5, right=True)
    return nominal.tolist(), (inside / len(ratio)).tolist(), result.sigma


def chains_figure(rows: Sequence[tuple[str, Tensor]], *, columns: int = 8) -> Figure:
    """Rows of samples with a title each, such as the starts and the ends of chains.

    Args:
        rows: (title, samples (n, *dims) in data units), all of the same dims.
        columns: samples shown in a row.
    """
    # One range for all rows: that of the last one, the clean ones where there are such.
    scale = _scale(rows[-1][1][:columns])
    dims = rows[0][1].shape[1:]
    cell = 0.5 if scale.kind == "lines" else _cell(dims, columns)
    height = len(rows) * (cell + 0.24)
    figure = _figure(height, layout=None)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        top=1 - 0.22 / height,
        bottom=0.02 / height,
        wspace=0.1,
        hspace=0.24 / cell,
    )
    for line, (title, samples) in zip(axes, rows, strict=True):
        for ax in line:
            ax.axis("off")
        for ax, sample in zip(line, samples, strict=False):
            ax.axis("on")
            _show(ax, sample, scale)
        line[0].set_title(title, fontsize=8, loc="left", pad=3)
    return figure


def training_figure(history: Sequence[History], *, size: int | None = None) -> Figure:
    """Denoising error over the steps, in units of sigma^2: training, and EMA weights on validation.

    The first-order term: the mean of |x - m|^2 / sigma^2 over the noise levels, over the number of
    entries if that is given; then 1 is the noisy sample itself. The first fifth of the rows may lie
    outside. Below, where the history has them, the norm of the gradient and of its noise.

    Args:
        history: as `training.train` returns it.
        size: entries of a sample; None: the sum over them is shown.
    """
    norms = [getattr(row, "gradient_norm", None) for row in history]
    variances = [getattr(row, "gradient_variance", None) for row in history]
    panels = 1 if None in norms else 2
    figure = _figure(2.5 if panels == 1 else 4.0)
    ax, *more = figure.subplots(
        panels, 1, sharex=True, squeeze=False, height_ratios=[1.5, 1.0][:panels]
    )[:, 0]
    steps, entries = [row.step for row in history], size or 1
    training = [row.first / entries for row in history]
    held_out = [row.validation_first / entries for row in history]
    dot = "o" if len(steps) == 1 else None  # a line of one point is not seen
    ax.plot(steps, training, color=_GREY, lw=1.2, marker=dot, label="training")
    ax.plot(steps, held_out, color=_BLUE, lw=1.6, marker=dot, label="validation, averaged weights")
    settled = training[len(history) // 5 :] + held_out[len(history) // 5 :]
    margin = 0.05 * (max(settled) - min(settled)) or 0.05
    ax.set_ylim(min(settled) - margin, max(settled) + margin)
    ax.set_ylabel("squared error / sigma²" + (", sum" if size is None else ""), fontsize=8)
    ax.legend(fontsize=8, frameon=False)
    for lower in more:
        lower.plot(steps, norms, color=_GREY, lw=1.2, marker=dot, label="norm")
        noise = [math.sqrt(max(value, 0.0)) for value in variances if value is not None]
        if len(noise) == len(steps):
            lower.plot(steps, noise, color=_ORANGE, lw=1.2, marker=dot, label="norm of its noise")
        lower.set_yscale("log")
        low, high = lower.get_ylim()
        ladder = [m * 10.0**k for k in range(-12, 13) for m in (1, 2, 5)]
        if high / low > 30:  # room for fewer numbers
            ladder = ladder[::3]
        ticks = [tick for tick in ladder if low <= tick <= high]
        lower.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        lower.set_yticks([], minor=True)
        lower.set_ylabel("gradient", fontsize=8)
        lower.legend(fontsize=8, frameon=False)
    for each in (ax, *more):
        each.tick_params(labelsize=8)
    each.set_xlabel("step", fontsize=8)
    ticker = require("plots", "matplotlib.ticker")
    each.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
    return figure


def spread_figure(rows: Sequence[tuple[str, float, Tensor]], exact: Tensor) -> Figure:
    """Standard deviation of each entry over the draws of chains, against what it should be.

    Args:
        rows: (method, step size, standard deviation, shape dims); one axes for each method.
        exact: the standard deviation of the density that the chains should sample. Shape dims.
    """
    methods = list(dict.fromkeys(method for method, *_ in rows))
    figure = _figure(2.7)
    axes = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)[0]
    span = [0.9 * float(exact.min()), 1.05 * float(exact.max())]
    for ax, name in zip(axes, methods, strict=True):
        ax.plot(span, span, color=_GREY, lw=0.8)
        chosen = [(step, std) for method, step, std in rows if method == name]
        for (step, std), color in zip(chosen, (_BLUE, _ORANGE, _GREY), strict=False):
            ax.scatter(
                exact.detach().flatten().cpu().numpy(),
                std.detach().flatten().cpu().numpy(),
                s=7,
                color=color,
                label=f"h = {step:.3g}",
                lw=0,
            )
        ax.set_title(name, fontsize=8.5)
        ax.set_xlabel("std of a pixel, exact", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=7.5, frameon=False, handletextpad=0.1, markerscale=1.6)
    axes[0].set_ylabel("of the chains", fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, without a date in it: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
