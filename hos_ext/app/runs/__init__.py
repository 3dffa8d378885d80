"""Runs of training as folders: prepare, train or go on, load, and say what is there.

A finished run holds run.json (options, facts of the data, versions), checkpoints/, logs/, model/,
training.png and, written last, metrics.json.
"""

from .facts import (
    begun_by_launch,
    json_text,
    launch_name,
    open_data,
    read_run,
    scaling_of,
    write_json,
)
from .loading import finished, info, load_run
from .work import PARTS, Run, fit, prepare

__all__ = [
    "PARTS",
    "Run",
    "begun_by_launch",
    "finished",
    "fit",
    "info",
    "json_text",
    "launch_name",
    "load_run",
    "open_data",
    "prepare",
    "read_run",
    "scaling_of",
    "write_json",
]
