"""Runs of training as folders: prepare, train or go on, load, and say what is there.

A finished run holds run.json (options, facts of the data, versions), checkpoints/, logs/, model/,
training.png and, written last, metrics.json.
"""

from .facts import json_text, open_data, read_run, scaling_of, write_json
from .loading import finished, info, load_run
from .work import PARTS, Run, fit, prepare

__all__ = [
    "PARTS",
    "Run",
    "finished",
    "fit",
    "info",
    "json_text",
    "load_run",
    "open_data",
    "prepare",
    "read_run",
    "scaling_of",
    "write_json",
]
