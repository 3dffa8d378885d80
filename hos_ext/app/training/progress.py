"""The progress bar of a training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...checks import require


@contextmanager
def progress_bar(wanted: bool, done: int, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Yields the function to call after each step, with the step and its loss."""
    if not wanted:
        yield lambda step, loss: None
        return
    progress = require("train", "rich.progress")
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]:.1f}"),
        progress.TextColumn("{task.fields[rate]:.1f} steps/s"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
    )
    begin = time.perf_counter()
    smooth = math.nan
    with progress.Progress(*columns) as bar:
        task = bar.add_task("training", total=steps, completed=done, loss=math.nan, rate=0.0)

        def show(step: int, loss: float) -> None:
            nonlocal smooth
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            rate = (step - done) / (time.perf_counter() - begin)
            bar.update(task, completed=step, loss=smooth, rate=rate)

        yield show
