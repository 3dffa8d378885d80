"""Training: the engine, its options, checkpoints and precision.

`engine` says what a step is, `options` what can be chosen, `batches` what a step draws,
`checkpoints` how it is kept, `launch` on which devices and processes, `faults` what ends it early.
"""

from .checkpoints import History, list_checkpoints
from .engine import Trained, train
from .faults import Lost, NotFinite, OutOfMemory, Stopped, name_lost
from .launch import is_main
from .options import OBJECTIVE, TrainingOptions, check_options
from .precision import check_precision
from .trackers import Reporter

__all__ = [
    "OBJECTIVE",
    "History",
    "Lost",
    "NotFinite",
    "OutOfMemory",
    "Reporter",
    "Stopped",
    "Trained",
    "TrainingOptions",
    "check_options",
    "check_precision",
    "is_main",
    "list_checkpoints",
    "name_lost",
    "train",
]
