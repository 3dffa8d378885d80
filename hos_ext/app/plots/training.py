"""How a training went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .style import BLUE, GREY, ORANGE, new_figure, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..training import History


def training_figure(history: Sequence[History], *, size: int | None = None) -> Figure:
    """Denoising error and loss over the steps: training, and EMA weights on validation.

    The error is the first-order term, the mean of |x0 - m|^2 / sigma^2 over the noise levels. With
    `size` error and loss are those of an entry, and the noisy sample itself has the error 1.

    Args:
        history: as `training.train` returns it.
        size: entries of a sample; None: the sums over them are shown.

    Returns:
        Figure: above, the errors; then the loss, and, where the history has them, the norm of the
        gradient and of its noise. Errors and losses of the first fifth of the rows may lie outside.
    """
    has_norms = all(hasattr(row, "gradient_norm") for row in history)
    panels = 3 if has_norms else 2
    figure = new_figure(5.4 if has_norms else 3.9)
    axes = figure.subplots(
        panels, 1, sharex=True, squeeze=False, height_ratios=[1.5, 1.2, 1.0][:panels]
    )[:, 0]
    errors = ([row.first for row in history], [row.validation_first for row in history])
    _show_pair(axes[0], history, errors, "squared error / sigma²", size)
    axes[0].legend(fontsize=8, frameon=False)
    losses = ([row.loss for row in history], [row.validation for row in history])
    _show_pair(axes[1], history, losses, "loss" if size is None else "loss / entry", size)
    if has_norms:
        _show_gradient(axes[2], history)
    for ax in axes:
        ax.tick_params(labelsize=8)
    axes[-1].set_xlabel("step", fontsize=8)
    whole_ticks(axes[-1], 8)
    return figure


def _show_pair(
    ax: Axes,
    history: Sequence[History],
    pair: tuple[list[float], list[float]],
    name: str,
    size: int | None,
) -> None:
    """A figure of the training and of the validation samples."""
    steps, dot = [row.step for row in history], _dot(history)
    training, held_out = ([value / (size or 1) for value in values] for values in pair)
    ax.plot(steps, training, color=GREY, lw=1.2, marker=dot, label="training")
    ax.plot(steps, held_out, color=BLUE, lw=1.6, marker=dot, label="validation, averaged weights")
    settled = training[len(history) // 5 :] + held_out[len(history) // 5 :]
    margin = 0.05 * (max(settled) - min(settled)) or 0.05
    ax.set_ylim(min(settled) - margin, max(settled) + margin)
    ax.set_ylabel(name + (", sum" if size is None else ""), fontsize=8)


def _show_gradient(ax: Axes, history: Sequence[History]) -> None:
    """The norm of the gradient, and of its noise where every row has it."""
    steps, dot = [row.step for row in history], _dot(history)
    norms = [row.gradient_norm for row in history]
    variances = [row.gradient_variance for row in history]
    ax.plot(steps, norms, color=GREY, lw=1.2, marker=dot, label="norm")
    noise = [math.sqrt(max(value, 0.0)) for value in variances if value is not None]
    if len(noise) == len(steps):
        ax.plot(steps, noise, color=ORANGE, lw=1.2, marker=dot, label="norm of its noise")
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ladder = [m * 10.0**k for k in range(-12, 13) for m in (1, 2, 5)]
    if high / low > 30:  # room for fewer numbers
        ladder = ladder[::3]
    ticks = [tick for tick in ladder if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_yticks([], minor=True)
    ax.set_ylabel("gradient", fontsize=8)
    ax.legend(fontsize=8, frameon=False)


def _dot(history: Sequence[History]) -> str | None:
    """A marker for a line of one point, which is not seen without."""
    return "o" if len(history) == 1 else None
