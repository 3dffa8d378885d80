"""The options of a run, one plain dict: from a command line or a file to data and model.

`table` describes each option once, `reading` makes given ones of their kinds, `completing` fills in
what depends on data and model, and `models` builds the network. Everything in the dict is plain
JSON.
"""

from .completing import complete, open_chosen_source, training_options
from .models import build_model
from .reading import FORMAT, read_config, read_options
from .table import DATA, FOLDER, MODEL, OBJECTIVE, OBJECTIVES, OPTIONS, TRAINING, Option

__all__ = [
    "DATA",
    "FOLDER",
    "FORMAT",
    "MODEL",
    "OBJECTIVE",
    "OBJECTIVES",
    "OPTIONS",
    "TRAINING",
    "Option",
    "build_model",
    "complete",
    "open_chosen_source",
    "read_config",
    "read_options",
    "training_options",
]
