"""Runs as they lie in their folders: loaded, and said what is there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checks import check
from ...nn import files as pretrained
from .. import training
from ..options import FORMAT
from .facts import read_run, scaling_of


def load_run(folder: Path, *, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The model of a finished run, or of its model folder alone, and its facts.

    Args:
        folder: of the run, or of the model.
        device: for the model; "auto" is a GPU if there is one.

    Returns:
        The EMA model in eval mode, and what run.json holds with "step" and "recalibration".

    Raises:
        ValueError: the folder holds no model of a run, a damaged one, or a run without one yet.
    """
    there = (folder / "model").exists() or not (folder / "run.json").exists()
    got = f"{folder} without model (go on with it by hos-ext resume {folder})"
    check("load_run", there, "folder must hold a finished run", got)
    place = folder / "model" if (folder / "model").is_dir() else folder
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    training.check_device("load_run", "device", device)
    model, config = pretrained.load_model(place, device=device)
    facts: Any = config.get("run")
    good = isinstance(facts, dict) and facts.get("format") == FORMAT
    check("load_run", good, "folder must hold the model of a run", f"{place} without its facts")
    try:
        low, high = facts["options"]["sigma"]
        numbers = [low, high, facts["recalibration"], facts["data"]["std"], *facts["data"]["shape"]]
        good = all(type(each) in (int, float) and 0 < each < math.inf for each in numbers)
        scaling_of(facts)
    except (KeyError, TypeError, ValueError):
        good = False
    check("load_run", good, "folder must hold the facts of a run", f"{place} with others")
    return model, facts


def finished(folder: Path, steps: int | None = None) -> bool:
    """Whether the run of a folder has come to its last step and has written all of its parts.

    Args:
        folder: of the run.
        steps: the last step; None is that of run.json.
    """
    path = folder / "metrics.json"
    if not path.exists():
        return False
    done = _figures(path)["steps"]
    return bool(done == (steps or read_run(folder)["options"].get("steps")))


def _figures(path: Path) -> dict[str, Any]:
    """What metrics.json says of training, with "steps"."""
    try:
        found = json.loads(path.read_bytes())["train"]
        found["steps"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        got = f"{path}: {type(error).__name__} {error}"
        raise ValueError(f"run: folder must hold a whole metrics.json, got {got}") from None
    return dict(found)


def info(folder: Path) -> dict[str, Any]:
    """What a run folder or the model folder of a run holds, damage included; plain JSON.

    Raises:
        ValueError: neither.
    """
    if not (folder / "run.json").exists():
        _, facts = load_run(folder)
        return {"state": "a model", **facts}
    facts = read_run(folder)
    checkpoints = {path.name: wrong or "whole" for path, wrong in training.list_checkpoints(folder)}
    state = "finished" if finished(folder) else "not finished"
    content = {"state": state, **facts, "checkpoints": checkpoints}
    if state == "finished":
        content |= {"figures": _figures(folder / "metrics.json")}
    return content
