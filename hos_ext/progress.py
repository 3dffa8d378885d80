"""How far a long work is: a bar on a terminal, else a line of the log every few seconds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from .checks import require

# What to call after each step: its number, and figures by name.
Tell = Callable[..., None]

# Seconds between two lines where there is no terminal.
EVERY = 5.0


class Pace:
    """Smooth means of what the last steps told, and how fast they go.

    Attributes:
        means: of each figure over about fifty steps.
        rate: steps a second.
    """

    def __init__(self, done: int, total: int, figures: Mapping[str, str]) -> None:
        self.means, self.rate = dict.fromkeys(figures, math.nan), 0.0
        self._done, self._total, self._figures = done, total, figures
        self._begin = time.perf_counter()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the figures of a step."""
        for name, value in values.items():
            mean = self.means[name]
            self.means[name] = value if math.isnan(mean) else 0.98 * mean + 0.02 * value
        self.rate = (step - self._done) / max(time.perf_counter() - self._begin, 1e-9)

    def words(self) -> list[str]:
        """The figures and the rate."""
        told = [text.format(self.means[name]) for name, text in self._figures.items()]
        return [*told, f"{self.rate:.1f} steps/s"]

    def line(self, step: int) -> str:
        """Where the work is."""
        left = timedelta(seconds=round((self._total - step) / self.rate))
        return f"step {step} of {self._total}: {', '.join(self.words())}, {left} left"


@contextmanager
def show_progress(
    where: str,
    wanted: bool,
    name: str,
    total: int,
    *,
    done: int = 0,
    figures: Mapping[str, str] | None = None,
) -> Iterator[Tell]:
    """Yields the function to call after each step.

    On a terminal and in a notebook it moves a bar, on stderr. Elsewhere, where a bar would be
    written over and over, it logs a line every few seconds, to the logger hos_ext.`where`.

    Args:
        where: the public function that works.
        wanted: whether anything is shown.
        name: of the work, before the bar.
        total: steps at which it ends.
        done: steps before this work goes on.
        figures: what each step tells, by name, as text to format: {"loss": "loss {:.3g}"}.

    Raises:
        RuntimeError: rich is missing.
    """
    if not wanted:
        yield lambda step, **values: None
        return
    progress = require(where, "rich.progress")
    console = require(where, "rich.console").Console(stderr=True)
    pace, log = Pace(done, total, figures or {}), logging.getLogger(f"hos_ext.{where}")
    if not (console.is_terminal or console.is_jupyter):
        yield _lines(pace, log)
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[told]}"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total, completed=done, told=" ".join(pace.words()))

        def tell(step: int, **values: float) -> None:
            pace.add(step, values)
            bar.update(task, completed=step, told=" ".join(pace.words()))

        yield tell


def _lines(pace: Pace, log: Any) -> Tell:
    """Lines of the log in place of a bar."""
    last = time.perf_counter()

    def tell(step: int, **values: float) -> None:
        nonlocal last
        pace.add(step, values)
        now = time.perf_counter()
        if now - last >= EVERY:
            last = now
            log.info(pace.line(step))

    return tell
