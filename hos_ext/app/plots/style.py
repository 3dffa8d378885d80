"""What all figures share: width, colours, legends, and the way to a file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from ...checks import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.6  # inches
BLUE, ORANGE, GREY = "#1f6fb4", "#d9622b", "#8a8a8a"
LINES = (BLUE, ORANGE, "#3d8f5f", "#7d5ba6")

# A legend beside its axes: on a signal there is no free corner to count on.
BESIDE: dict[str, Any] = {
    "fontsize": 6.5,
    "frameon": False,
    "loc": "center left",
    "bbox_to_anchor": (1.0, 0.5),
    "handlelength": 1.0,
    "handletextpad": 0.4,
    "borderaxespad": 0.2,
}


def new_figure(height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of the common width and this height, in inches."""
    module = require("plots", "matplotlib.figure")
    figure: Figure = module.Figure(figsize=(WIDTH, height), dpi=200, layout=layout)
    return figure


def array(values: Tensor) -> np.ndarray[Any, Any]:
    """Values of any shape as matplotlib takes them."""
    found: np.ndarray[Any, Any] = values.detach().cpu().numpy()
    return found


def whole_ticks(ax: Axes, most: int) -> None:
    """Whole numbers, at most so many, along the horizontal axis."""
    ticker = require("plots", "matplotlib.ticker")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(most, integer=True, min_n_ticks=1))


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, without a date in it: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
