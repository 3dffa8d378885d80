"""Training: the engine, its options, checkpoints and precision.

`engine` says what a step is, `options` what can be chosen, `batches` what a step draws,
`checkpoints` how it is kept, `devices` and `launch` on what it runs, `estimate` how much memory it
takes, `faults` what ends it early.
"""

from .checkpoints import History, list_checkpoints
from .devices import check_device
from .engine import Trained, train
from .estimate import Memory, estimate_memory
from .faults import Lost, NotFinite, OutOfMemory, Stopped, name_lost
from .launch import is_main
from .options import OBJECTIVE, TrainingOptions, check_options
from .precision import check_precision
from .trackers import Reporter

__all__ = [
    "OBJECTIVE",
    "History",
    "Lost",
    "Memory",
    "NotFinite",
    "OutOfMemory",
    "Reporter",
    "Stopped",
    "Trained",
    "TrainingOptions",
    "check_device",
    "check_options",
    "check_precision",
    "estimate_memory",
    "is_main",
    "list_checkpoints",
    "name_lost",
    "train",
]
