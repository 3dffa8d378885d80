"""How far a training is: a bar on a terminal, else a line of the log every few seconds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from ...checks import require

# What to call after each step: its number, the loss of an entry, and the denoising error.
Show = Callable[[int, float, float], None]

log = logging.getLogger(__package__)
# Seconds between two lines where there is no terminal.
EVERY = 5.0


class Pace:
    """Smooth means of the last steps, and how fast they go.

    Attributes:
        loss: of an entry, the mean over about fifty steps.
        error: of denoising, over sigma^2, likewise.
        rate: steps a second.
    """

    def __init__(self, done: int, steps: int) -> None:
        self.loss, self.error, self.rate = math.nan, math.nan, 0.0
        self._done, self._steps, self._begin = done, steps, time.perf_counter()

    def add(self, step: int, loss: float, error: float) -> None:
        """Takes the figures of a step."""
        new = math.isnan(self.loss)
        self.loss = loss if new else 0.98 * self.loss + 0.02 * loss
        self.error = error if new else 0.98 * self.error + 0.02 * error
        self.rate = (step - self._done) / max(time.perf_counter() - self._begin, 1e-9)

    def line(self, step: int) -> str:
        """Where the training is, in words."""
        left = timedelta(seconds=round((self._steps - step) / self.rate))
        return (
            f"step {step} of {self._steps}: loss {self.loss:.4g} an entry, denoising error "
            f"{self.error:.3f} sigma^2, {self.rate:.1f} steps/s, {left} left"
        )


@contextmanager
def show_progress(wanted: bool, done: int, steps: int) -> Iterator[Show]:
    """Yields the function to call after each step.

    On a terminal and in a notebook it moves a bar, on stderr. Elsewhere, where a bar would be
    written over and over, it logs a line every few seconds.

    Args:
        wanted: whether anything is shown.
        done: steps before this training goes on.
        steps: at which it ends.

    Raises:
        RuntimeError: rich is missing.
    """
    if not wanted:
        yield lambda step, loss, error: None
        return
    console = require("train", "rich.console").Console(stderr=True)
    require("train", "rich.progress")
    if console.is_terminal or console.is_jupyter:
        with _bar(console, done, steps) as show:
            yield show
    else:
        yield _lines(done, steps)


def _lines(done: int, steps: int) -> Show:
    pace, last = Pace(done, steps), time.perf_counter()

    def show(step: int, loss: float, error: float) -> None:
        nonlocal last
        pace.add(step, loss, error)
        now = time.perf_counter()
        if now - last >= EVERY:
            last = now
            log.info(pace.line(step))

    return show


@contextmanager
def _bar(console: Any, done: int, steps: int) -> Iterator[Show]:
    progress = require("train", "rich.progress")
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]:.4g} an entry"),
        progress.TextColumn("error {task.fields[error]:.3f} sigma²"),
        progress.TextColumn("{task.fields[rate]:.1f} steps/s"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
    )
    pace = Pace(done, steps)
    with progress.Progress(*columns, console=console) as bar:
        begun = {"loss": math.nan, "error": math.nan, "rate": 0.0}
        task = bar.add_task("training", total=steps, completed=done, **begun)

        def show(step: int, loss: float, error: float) -> None:
            pace.add(step, loss, error)
            now = {"loss": pace.loss, "error": pace.error, "rate": pace.rate}
            bar.update(task, completed=step, **now)

        yield show
