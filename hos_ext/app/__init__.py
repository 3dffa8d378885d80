"""The application: it trains, reads files, and draws.

    data          sources of samples, one file a source          training    the engine
    options       of a run, from a file or a command line         runs        a training as a folder
    evaluation    how good a model came out                       plots       one file a figure
    results       the files that commands write                   demo        train, check, report
    cli           `hos-ext`, one file a command

The library never imports it. Its rooms are imported when they are first asked for.
"""

import importlib
from types import ModuleType

_ROOMS = (
    "cli",
    "data",
    "demo",
    "evaluation",
    "options",
    "plots",
    "report",
    "results",
    "runs",
    "training",
)


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
