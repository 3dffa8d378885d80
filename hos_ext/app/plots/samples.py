"""Samples, their standard deviations and their eigenvectors, each on axes of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .style import BLUE, GREY, LINES, WIDTH, array, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..evaluation import Denoised

COMPONENTS = 4


class Scale(NamedTuple):
    """How samples are shown: "grey", "colour" or "lines", between these values, in this map."""

    kind: str
    low: float
    high: float
    cmap: str

    @property
    def ink(self) -> bool:
        """Dark on white, as on paper."""
        return self.cmap == "gray_r"


def scale_of(samples: Tensor) -> Scale:
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
    return Scale(kind, low, high, "gray_r" if paper and kind == "grey" else "gray")


# --------------------------------------------------------------------------------------- images


def cell_height(dims: Sequence[int], columns: int) -> float:
    """Height of an image, in inches, in a row of so many; tall images get less than their width."""
    width = 0.9 * 0.98 * WIDTH / columns
    return width * min(max(dims[-2] / dims[-1], 0.4), 1.6)


def show(ax: Axes, sample: Tensor, scale: Scale) -> Any:
    """One sample in data units, without ticks; returns the image where it is one."""
    _bare(ax)
    if scale.kind == "lines":
        entries = sample.numel()
        ax.plot(array(sample.flatten()), color=BLUE, lw=0.8, marker=point_mark(entries), ms=1.5)
        ax.set_ylim(scale.low, scale.high)
        return None
    if scale.kind == "colour":
        unit = ((sample - scale.low) / (scale.high - scale.low)).clamp(0, 1)
        return ax.imshow(array(unit.permute(1, 2, 0)), interpolation="nearest")
    return ax.imshow(
        _plane(sample),
        interpolation="nearest",
        cmap=scale.cmap,
        vmin=scale.low,
        vmax=scale.high,
    )


def show_std(ax: Axes, std: Tensor, top: float, mean: Tensor, scale: Scale) -> Any:
    """Standard deviations, over channels their root mean square, with the outline of the ink."""
    _bare(ax)
    if std.dim() == 3:
        std = std.square().mean(0).sqrt()
    image = ax.imshow(_plane(std), interpolation="nearest", cmap="magma", vmin=0.0, vmax=top)
    # The edge of the ink of the denoised image, half-way between paper and ink.
    values, middle = _plane(mean), (scale.low + scale.high) / 2
    if scale.ink and values.min() < middle < values.max():
        ax.contour(values, levels=[middle], colors="white", linewidths=0.7)
    return image


def show_vector(ax: Axes, vector: Tensor, share: Tensor, scale: Scale) -> None:
    """An eigenvector, which `eigh` gives with its largest entry positive, over that entry: red and
    blue, or in colour about grey. Below it is its share of the variance."""
    _bare(ax)
    unit = vector / vector.abs().max()
    if scale.kind == "colour":
        ax.imshow(array(((1 + unit) / 2).permute(1, 2, 0)), interpolation="nearest")
    else:
        ax.imshow(_plane(unit), interpolation="nearest", cmap="RdBu_r", vmin=-1.0, vmax=1.0)
    ax.set_xlabel(percent(share), fontsize=6.5, labelpad=1)


def _plane(values: Tensor) -> Any:
    """An array (H, W) of an image with or without channels: their mean."""
    return array(values if values.dim() == 2 else values.mean(0))


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(linewidth=0.4, color=GREY)


def top_std(std: Tensor) -> float:
    """The upper end of a scale of standard deviations; NaN is a negative variance."""
    return float(std.nan_to_num(0.0).max()) or 1.0


def std_bar(figure: Figure, image: Any, height: float, scale: Scale) -> None:
    """The colour bar of the standard deviations, at the foot of the figure."""
    if scale.ink and (scale.low, scale.high) == (-1, 1):
        label = "std of a pixel (white is -1, ink 1)"
    else:
        label = f"std of a pixel (images are shown from {scale.low:.3g} to {scale.high:.3g})"
    bar = figure.colorbar(
        image,
        cax=figure.add_axes((0.28, 0.36 / height, 0.44, 0.06 / height)),
        orientation="horizontal",
    )
    bar.set_label(label, fontsize=7, labelpad=1)
    bar.ax.tick_params(labelsize=7)


def value_bar(figure: Figure, image: Any, foot: float, height: float, scale: Scale) -> None:
    """What the values of images are, in data units; images in colour have no bar, but a line.

    Args:
        figure: of this height, in inches.
        image: one of those shown.
        foot: where the bar lies, a part of the height.
    """
    if scale.kind == "colour":
        text = f"values from {scale.low:.3g} (dark) to {scale.high:.3g} (light), data units"
        figure.text(0.5, foot, text, fontsize=7, ha="center", va="center")
        return
    place = figure.add_axes((0.28, foot, 0.44, 0.06 / height))
    bar = figure.colorbar(image, cax=place, orientation="horizontal")
    bar.set_label("value of a pixel (data units)", fontsize=7, labelpad=1)
    bar.ax.tick_params(labelsize=6.5, pad=1, length=2)


# -------------------------------------------------------------------------------------- signals


def point_mark(entries: int) -> str | None:
    """The marker of a line: with few entries each is seen."""
    return "o" if entries <= 40 else None


def vector_lines(ax: Axes, vectors: Tensor, share: Tensor, mark: str | None) -> None:
    """Eigenvectors (*dims, k) of a signal as lines, named by their shares (k,) of the variance."""
    for j, color in zip(range(len(share)), LINES, strict=False):
        vector = array(vectors[..., j].flatten())
        ax.plot(vector, color=color, lw=0.9, marker=mark, ms=2.5, label=percent(share[j]))
    ax.axhline(0.0, color=GREY, lw=0.4)


def name_entries(axes: Any) -> None:
    """The axis of entries: whole numbers."""
    for ax in axes[-1]:
        ax.set_xlabel("entry", fontsize=7.5)
        whole_ticks(ax, 4)


# --------------------------------------------------------------------------------- eigenvectors


def components(result: Denoised, rows: int, k: int) -> tuple[Tensor, Tensor]:
    """Shares of the variance (rows, k) and eigenvectors (rows, *dims, k) of the first rows."""
    covariance = result.posterior.covariance.rows(slice(rows))
    values, vectors = covariance.eigh(min(k, covariance.shape[1]))
    share = values / covariance.trace().unsqueeze(-1)
    return share, vectors.reshape(*result.x[:rows].shape, -1)


def percent(share: Tensor) -> str:
    """A share in percent, with a digit where it is below one."""
    value = 100 * float(share)
    return f"{value:.0f} %" if value >= 1 else f"{value:.1g} %"
