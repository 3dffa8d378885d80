"""Samples before and after denoising, with what is not known about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ...checks import check_count, require
from . import samples
from .style import BESIDE, BLUE, GREY, array, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..evaluation import Denoised


def denoising_figure(result: Denoised, *, rows: int = 4) -> Figure:
    """Noisy, denoised and true samples, standard deviation, first eigenvectors of Cov[x0 | x].

    Args:
        result: samples at one noise level; the first `rows` are shown.
        rows: samples, one in a row.

    Returns:
        Figure. Of images: a line on the standard deviation marks the outline of denoised ink; in
        colour images it is the root mean square over the channels. Under each of the first four
        eigenvectors is its share of the posterior variance. Its sign means nothing: the largest
        entry is shown positive, red, or in colour images above grey.
        Of signals: left the noisy values as dots, the mean with a band of two standard deviations,
        and the true values; right the eigenvectors.
    """
    rows = check_count("denoising_figure", "rows", rows)
    rows = min(rows, len(result.x))
    known = result.posterior.mean if result.x0 is None else result.x0
    scale = samples.scale_of(known[:rows])
    share, vectors = samples.components(result, rows, samples.COMPONENTS)
    if scale.kind == "lines":
        return _lines(result, rows, share, vectors)
    return _images(result, rows, scale, share, vectors)


def _images(
    result: Denoised, rows: int, scale: samples.Scale, share: Tensor, vectors: Tensor
) -> Figure:
    """`denoising_figure` for images."""
    mean, std = result.posterior.mean[:rows], result.posterior.std[:rows]
    shown = {"noisy": result.x, "denoised": mean}
    if result.x0 is not None:
        shown["true"] = result.x0
    names = [f"vector {i + 1}" if i == 0 else str(i + 1) for i in range(share.shape[1])]
    titles = [*shown, "std", *names]
    columns, place = len(titles), len(shown)
    cell = samples.cell_height(mean.shape[1:], columns)
    height = 0.2 + rows * (cell + 0.17) + 0.55
    figure = new_figure(height, layout=None)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        top=1 - 0.2 / height,
        bottom=0.6 / height,
        wspace=0.1,
        hspace=0.17 / cell,
    )
    top = samples.top_std(std)
    image: Any = None
    for i, line in enumerate(axes):
        for ax, values in zip(line, shown.values(), strict=False):
            samples.show(ax, values[i], scale)
        image = samples.show_std(line[place], std[i], top, mean[i], scale)
        for j, ax in enumerate(line[place + 1 :]):
            samples.show_vector(ax, vectors[i, ..., j], share[i, j], scale)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=7.5, pad=3)
    samples.std_bar(figure, image, height, scale)
    return figure


def _lines(result: Denoised, rows: int, share: Tensor, vectors: Tensor) -> Figure:
    """`denoising_figure` for signals and vectors."""
    figure = new_figure(0.35 + 1.15 * rows)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True, width_ratios=[1.5, 1.0])
    mark = samples.point_mark(result.x[0].numel())
    for i, (ax, right) in enumerate(axes):
        noisy, mean, std = (
            array(values[i].flatten())
            for values in (result.x, result.posterior.mean, result.posterior.std)
        )
        entries = np.arange(len(mean))
        ax.plot(entries, noisy, ".", color=GREY, ms=6 if mark else 3, label="noisy")
        ax.fill_between(entries, mean - 2 * std, mean + 2 * std, color=BLUE, alpha=0.25, lw=0)
        ax.plot(entries, mean, color=BLUE, lw=1.2, marker=mark, ms=3, label="mean ± 2 std")
        if result.x0 is not None:
            clean = array(result.x0[i].flatten())
            ax.plot(entries, clean, color="black", lw=0.7, marker=mark, ms=2, label="true")
        samples.vector_lines(right, vectors[i], share[i], mark)
        right.legend(**BESIDE)
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
    samples.name_entries(axes)
    return figure


def uncertainty_grid(result: Denoised, *, rows: int = 4) -> np.ndarray[Any, Any]:
    """`denoising_figure` as pixels, for trackers.

    Args:
        result, rows: as in `denoising_figure`.

    Returns:
        Shape (height, width, 3), uint8.
    """
    figure = denoising_figure(result, rows=rows)
    canvas = require("plots", "matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
