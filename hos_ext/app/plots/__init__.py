"""Figures of posteriors, calibration, training and chains: one file a figure.

A figure is 4.6 inches wide with text of 7 to 9 points: shown at the width of a phone it keeps about
its natural size. Functions return a `matplotlib.figure.Figure` (extra `app`), no pyplot state is
touched, and one colour means one thing on every figure. Samples of dims (H, W) and (C, H, W) are
shown as images, C = 3 in colour and other C as the mean over C; at most 3 rows of 2, and all other
dims, are signals, shown as lines of their entries in order.
"""

from .calibration import BAND, calibration_figure
from .chains import Trace, chains_figure, spread_figure
from .denoising import denoising_figure, uncertainty_grid
from .pictures import pictures_figure
from .style import png
from .training import training_figure
from .uncertainty import uncertainty_figure

__all__ = [
    "BAND",
    "Trace",
    "calibration_figure",
    "chains_figure",
    "denoising_figure",
    "pictures_figure",
    "png",
    "spread_figure",
    "training_figure",
    "uncertainty_figure",
    "uncertainty_grid",
]
