"""Trackers: where the curve of a training, its figures and its pictures are shown."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from ...checks import one_of, require
from .checkpoints import History

# Scalars and images (uint8 arrays (n, H, W, 3)) of a model, for a tracker.
Reporter = Callable[[nn.Module, int], tuple[dict[str, float], dict[str, Any]]]


def check_tracker(where: str, name: str, tracker: str) -> None:
    """accelerate goes on without a word where the package of a tracker is missing."""
    if tracker == "none":
        return
    require(where, "accelerate")
    known = require(where, "accelerate.tracking").LOGGER_TYPE_TO_CLASS
    one_of(where, name, tracker, ("none", *known))
    if tracker == "tensorboard":  # an extra brings it
        require(where, tracker)
    try:
        importlib.import_module(tracker)
    except ImportError as error:
        raise RuntimeError(
            f"{where}: {tracker} must be installed for {name} {tracker!r}, got: {error}"
        ) from error


def start_tracker(accelerator: Any, tracker: str, step: int) -> None:
    """Opens the tracker's logs; `step` is the first that will be written.

    Rows after the checkpoint that a stopped run wrote are written anew.
    """
    if tracker != "none":
        again = {"purge_step": step} if tracker == "tensorboard" else {}
        accelerator.init_trackers("logs", init_kwargs={tracker: again})


def track(
    accelerator: Any, history: list[History], model: nn.Module, report: Reporter | None, last: bool
) -> None:
    """Sends the newest row of the curve, and at every tenth and at the last row a report."""
    row = history[-1]._asdict()
    step = row.pop("step")
    accelerator.log({name: v for name, v in row.items() if v is not None}, step=step)
    if report is None or (len(history) % 10 and not last):
        return
    scalars, images = report(model, step)
    accelerator.log(scalars, step=step)
    for each in accelerator.trackers:
        if images and hasattr(each, "log_images"):
            options = {"dataformats": "NHWC"} if each.name == "tensorboard" else {}
            each.log_images(images, step=step, **options)
