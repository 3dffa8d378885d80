"""Where chains start and end, and how widely they spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from . import samples
from .style import BLUE, GREY, ORANGE, array, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def chains_figure(rows: Sequence[tuple[str, Tensor]], *, columns: int = 8) -> Figure:
    """Rows of samples with a title each, such as the starts and the ends of chains.

    Args:
        rows: (title, samples (n, *dims) in data units), all of the same dims.
        columns: samples shown in a row.

    Returns:
        Figure, all rows on one scale.
    """
    # One range for all rows: that of the last one, the clean ones where there are such.
    scale = samples.scale_of(rows[-1][1][:columns])
    dims = rows[0][1].shape[1:]
    cell = 0.5 if scale.kind == "lines" else samples.cell_height(dims, columns)
    height = len(rows) * (cell + 0.24)
    figure = new_figure(height, layout=None)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        top=1 - 0.22 / height,
        bottom=0.02 / height,
        wspace=0.1,
        hspace=0.24 / cell,
    )
    for line, (title, shown) in zip(axes, rows, strict=True):
        for ax in line:
            ax.axis("off")
        for ax, sample in zip(line, shown, strict=False):
            ax.axis("on")
            samples.show(ax, sample, scale)
        line[0].set_title(title, fontsize=8, loc="left", pad=3)
    return figure


def spread_figure(rows: Sequence[tuple[str, float, Tensor]], exact: Tensor) -> Figure:
    """Standard deviation of each entry over the draws of chains, against what it should be.

    Args:
        rows: (method, step size, standard deviation, shape dims); one axes for each method.
        exact: the standard deviation of the density that the chains should sample. Shape dims.

    Returns:
        Figure: a point is an entry; on the diagonal the chains have the right spread.
    """
    methods = list(dict.fromkeys(method for method, *_ in rows))
    figure = new_figure(2.7)
    axes = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)[0]
    span = [0.9 * float(exact.min()), 1.05 * float(exact.max())]
    for ax, name in zip(axes, methods, strict=True):
        ax.plot(span, span, color=GREY, lw=0.8)
        chosen = [(step, std) for method, step, std in rows if method == name]
        for (step, std), color in zip(chosen, (BLUE, ORANGE, GREY), strict=False):
            expected, found = array(exact.flatten()), array(std.flatten())
            ax.scatter(expected, found, s=7, color=color, label=f"h = {step:.3g}", lw=0)
        ax.set_title(name, fontsize=8.5)
        ax.set_xlabel("std of a pixel, exact", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=7.5, frameon=False, handletextpad=0.1, markerscale=1.6)
    axes[0].set_ylabel("of the chains", fontsize=8)
    return figure
