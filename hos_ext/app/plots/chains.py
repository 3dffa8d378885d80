"""Where chains start and end, and how widely they spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from . import samples
from .style import BLUE, GREY, ORANGE, array, new_figure, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLE, _FOOT, _TRACE = 0.24, 0.5, 1.5  # heights in inches


class Trace(NamedTuple):
    """How large the states of chains were along a run.

    Attributes:
        sizes: rms |x| over the entries, as `stats["sizes"]`. Shape (chain, looks). Data units.
        n_steps: over which the looks are evenly spread.
        reference: samples of the law that the chains should have. Shape (n, *dims). Data units.
    """

    sizes: Tensor
    n_steps: int
    reference: Tensor


def chains_figure(
    rows: Sequence[tuple[str, Tensor]], trace: Trace | None = None, *, columns: int = 8
) -> Figure:
    """Rows of samples with a title each, such as the starts and the ends of chains.

    Args:
        rows: (title, samples (n, *dims) in data units), all of the same dims.
        trace: how large the chains were; drawn below the samples.
        columns: samples shown in a row.

    Returns:
        Figure, all rows on one scale, which is on the axes of signals and on a bar below images.
    """
    # One range for all rows: that of the last one, the clean ones where there are such.
    scale = samples.scale_of(rows[-1][1][:columns])
    dims = rows[0][1].shape[1:]
    lines = scale.kind == "lines"
    cell = 0.5 if lines else samples.cell_height(dims, columns)
    below = _TRACE if trace is not None and trace.sizes.shape[1] else 0.0
    height = len(rows) * (cell + _TITLE) + _FOOT + below
    figure = new_figure(height, layout=None)
    grid = figure.add_gridspec(
        len(rows),
        columns,
        left=0.125 if lines else 0.01,
        right=0.99,
        top=1 - 0.22 / height,
        bottom=(_FOOT + below) / height,
        wspace=0.1,
        hspace=_TITLE / cell,
    )
    axes = [[figure.add_subplot(grid[i, j]) for j in range(columns)] for i in range(len(rows))]
    image = None
    for line, (title, shown) in zip(axes, rows, strict=True):
        for ax in line:
            ax.axis("off")
        for ax, sample in zip(line, shown, strict=False):
            ax.axis("on")
            image = samples.show(ax, sample, scale)
        line[0].set_title(title, fontsize=8, loc="left", pad=3)
    if lines:
        _name_signals(axes, dims.numel(), scale)
    elif image is not None:
        samples.value_bar(figure, image, (0.25 + below) / height, height, scale)
    if trace is not None and below:
        bottom = 0.36 / height
        _show_trace(figure.add_axes((0.12, bottom, 0.86, (below - 0.5) / height)), trace)
    return figure


def _name_signals(axes: Sequence[Sequence[Axes]], entries: int, scale: samples.Scale) -> None:
    """The axes of signals: values on the first of each row, entries on the last row."""
    for line in axes:
        line[0].set_yticks([scale.low, scale.high])
        line[0].tick_params(labelsize=6, length=2, pad=1)
    middle = axes[len(axes) // 2][0]
    middle.set_ylabel("value (data units)", fontsize=6.5, labelpad=1)
    for ax in axes[-1]:
        if ax.axison:
            ax.set_xticks([0, entries - 1] if entries > 1 else [0])
            ax.tick_params(labelsize=6, length=2, pad=1)
            ax.set_xlabel("entry", fontsize=6.5, labelpad=1)


def _show_trace(ax: Axes, trace: Trace) -> None:
    """Each chain is a line; the band has nine of ten reference samples."""
    sizes = array(trace.sizes)
    looks = sizes.shape[1]
    steps = (np.arange(looks) + 1) * trace.n_steps // looks
    right = array(trace.reference.double().flatten(1).square().mean(1).sqrt())
    low, high = np.quantile(right, [0.05, 0.95])
    ax.axhspan(low, high, color=ORANGE, alpha=0.25, lw=0, label="9 of 10 held-out samples")
    ax.plot(steps, np.where(np.isfinite(sizes), sizes, np.nan).T, color=BLUE, lw=0.6, alpha=0.7)
    if np.nanmax(sizes, initial=0.0, where=np.isfinite(sizes)) > 30 * high:
        ax.set_yscale("log")
    ax.set_xlabel("step after the burn-in", fontsize=7.5, labelpad=1)
    ax.set_ylabel("rms |x| (data units)", fontsize=7.5)
    ax.tick_params(labelsize=7)
    whole_ticks(ax, 6)
    ax.legend(fontsize=6.5, frameon=False, loc="lower right")


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
        ax.set_xlabel("std of an entry, exact\n(data units)", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=7.5, frameon=False, handletextpad=0.1, markerscale=1.6)
    axes[0].set_ylabel("of the chains (data units)", fontsize=8)
    return figure
