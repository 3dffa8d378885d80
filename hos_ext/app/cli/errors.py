"""What went wrong, as one line and an exit code.

0: done. 1: the work failed (disk, missing extra). 2: wrong arguments, found before the work starts.
3: the loss or a gradient stopped being finite. 4: out of memory. 5: chains or generated samples ran
away from the data (--allow-divergence keeps them, and the code is 0). 130 or 143: stopped by SIGINT
or SIGTERM (training leaves a checkpoint: `hos-ext resume`).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import training

CODES = (
    "Exit codes: 0 done; 1 the work failed; 2 wrong arguments; 3 the loss stopped being finite; "
    "4 out of memory; 5 chains or samples ran away; 130 or 143 stopped by SIGINT or SIGTERM."
)


class WrongArgument(Exception):
    """An argument of the user that was refused before the work started."""


class RanAway(Exception):
    """Chains or samples that left the law of the data, and were not to be kept."""


@contextmanager
def checking() -> Iterator[None]:
    """Inside, what is refused is an argument of the user, and not the work gone wrong."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise WrongArgument(str(error)) from error


def judge(command: str, alarm: str, *, allowed: bool) -> None:
    """Raises `RanAway` for what an alarm says, or warns of it where --allow-divergence was given.

    Args:
        command: whose results they are.
        alarm: what is wrong with them; empty if nothing is.
        allowed: whether they are kept all the same.
    """
    if alarm and allowed:
        warnings.warn(f"{command}: {alarm}", stacklevel=2)
    elif alarm:
        raise RanAway(
            f"{command}: {alarm}. Nothing was written; --allow-divergence keeps the files"
        )


def explain(error: BaseException) -> tuple[str, int]:
    """The message and the exit code of an error that a command raised."""
    message = str(error)
    # Abort is what typer makes of an interrupt.
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "stopped", 130
    if isinstance(error, training.Stopped):
        return message, 128 + error.signal
    if isinstance(error, WrongArgument):
        return message, 2
    if isinstance(error, training.NotFinite):
        return message, 3
    if isinstance(error, RanAway):
        return message, 5
    if isinstance(error, (training.OutOfMemory, torch.OutOfMemoryError, MemoryError)):
        return message or "out of memory", 4
    if isinstance(error, (ValueError, TypeError, RuntimeError, OSError)):
        return message, 1
    # Usage errors: of click, or of the copy of click that newer versions of typer hold.
    if hasattr(error, "format_message"):
        return error.format_message(), 2
    return f"{type(error).__name__}: {message}", 1
