"""What ends a training early: numbers that are not finite, memory, signals, lost processes."""

from __future__ import annotations

import math
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from .batches import Batch
from .checkpoints import named


class NotFinite(RuntimeError):
    """A loss or a gradient stopped being finite. The last checkpoint is from before."""


class OutOfMemory(RuntimeError):
    """A step did not fit in memory."""


class Stopped(RuntimeError):
    """A signal ended the run after a whole step; `signal` is its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class Lost(RuntimeError):
    """Another process stopped, or did not answer in time. The last checkpoint is from before."""


def bad_rows(losses: Tensor, batch: Batch) -> str:
    """The samples whose loss is not finite, with their noise levels; empty if there are none."""
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return ""
    shown = ", ".join(f"{int(batch.rows[i])} (sigma {float(batch.sigma[i]):.4g})" for i in bad[:5])
    return f"sample{'s' if len(bad) > 1 else ''} {shown}{' ...' if len(bad) > 5 else ''}"


def check_finite(
    values: Mapping[str, float | None], step: int, kept: Path | None, bad: str = ""
) -> None:
    """Stops where a value, by its name, is not finite.

    Args:
        values: what is judged; None is passed over.
        step: of the training.
        kept: the newest checkpoint.
        bad: the samples that are at fault, in words.

    Raises:
        NotFinite: names the first value, the step, the samples, and the checkpoint.
    """
    for name, value in values.items():
        got = f"{value} at step {step}" + (f" in {bad}" if bad else "")
        if value is not None and not math.isfinite(value):
            raise NotFinite(
                f"train: {name} must stay finite, got {got}; last good checkpoint: {named(kept)}"
            )


@contextmanager
def catch_signals(wanted: bool) -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, so that a step is finished first; a second one acts at once.

    Not where processes depend on each other: they would wait for one that has stopped.
    """
    received: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    # What was ignored before stays so: SIGINT in the background of a script.
    kinds = [kind for kind, handler in before.items() if handler is not signal.SIG_IGN]

    def note(number: int, _: object) -> None:
        received.append(number)
        for kind in kinds:
            signal.signal(kind, before[kind])

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield received
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])


@contextmanager
def name_memory(size: int, batch_size: int, place: torch.device) -> Iterator[None]:
    """Inside, a lack of memory is an `OutOfMemory` that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in words):
            raise
        raise OutOfMemory(
            f"train: a step must fit in the memory of {place}, got {size} samples at a time "
            f"(batch_size {batch_size}): raise accumulate, or lower batch_size, rank or the size "
            "of the model, or turn gradient checkpointing on"
        ) from error


@contextmanager
def name_lost(where: str, timeout: int, at: Callable[[], str]) -> Iterator[None]:
    """Inside, what gloo and NCCL say of another process is a `Lost` that says where and what to do.

    Args:
        where: the public function.
        timeout: of the group of processes, in seconds.
        at: says when it happened, and which checkpoint is the last.
    """
    try:
        yield
    except RuntimeError as error:
        told = str(error).strip()
        if not isinstance(error, dist.DistError) and "gloo" not in told:
            raise
        told = re.sub(r"^\[[^]]*\] ", "", told.splitlines()[0]).partition(" This is typically")[0]
        raise Lost(
            f"{where}: every process must answer within timeout {timeout} s, got none from another "
            f"{at()} ({told}); what stopped first is in the log of that process"
        ) from error
