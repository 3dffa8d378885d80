"""Pictures of any size before and after denoising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...checks import check
from . import samples
from .style import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..evaluation import Picture

_MOST = 600  # pixels along an axis that a figure can show


def pictures_figure(found: Sequence[Picture]) -> Figure:
    """Noisy and denoised pictures and their standard deviations, each picture in a row.

    Args:
        found: pictures, of one size or of several. At most 600 pixels along an axis are shown,
            evenly chosen.

    Returns:
        Figure. All pictures share one range of values and one of standard deviations.
    """
    check("pictures_figure", found, "found must hold pictures", "none")
    shown = [[_thinned(each) for each in (one.x, one.mean, one.std)] for one in found]
    scale = samples.scale_of(torch.cat([row[1].flatten() for row in shown]).reshape(1, -1, 1, 1))
    colour = shown[0][1].shape[0] == 3
    scale = scale._replace(kind="colour" if colour else "grey", cmap="gray")
    top = max(samples.top_std(row[2]) for row in shown)
    cells = [samples.cell_height(row[1].shape[1:], 3) for row in shown]
    height = 0.2 + sum(cells) + 0.17 * len(cells) + 0.55
    figure = new_figure(height, layout=None)
    axes = figure.subplots(len(shown), 3, squeeze=False, height_ratios=cells)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.2 / height, bottom=0.6 / height, wspace=0.05, hspace=0.05
    )
    image: Any = None
    for line, (noisy, mean, std) in zip(axes, shown, strict=True):
        samples.show(line[0], noisy, scale)
        samples.show(line[1], mean, scale)
        image = samples.show_std(line[2], std, top, mean, scale)
    for ax, title in zip(axes[0], ("noisy", "denoised", "std"), strict=True):
        ax.set_title(title, fontsize=7.5, pad=3)
    samples.std_bar(figure, image, height, scale)
    return figure


def _thinned(values: Tensor) -> Tensor:
    """Every k-th pixel."""
    step = -(-max(values.shape[1:]) // _MOST)
    return values[:, ::step, ::step]
