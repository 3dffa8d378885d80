"""Training: the engine, its checkpoints and precision."""

from .checkpoints import History, checkpoints
from .engine import (
    OBJECTIVE,
    NotFinite,
    OutOfMemory,
    Report,
    Stopped,
    Trained,
    check_options,
    is_main,
    train,
)
from .precision import check_precision

__all__ = [
    "OBJECTIVE",
    "History",
    "NotFinite",
    "OutOfMemory",
    "Report",
    "Stopped",
    "Trained",
    "check_options",
    "check_precision",
    "checkpoints",
    "is_main",
    "train",
]
