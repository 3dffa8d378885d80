"""What run.json says of a run, and whether options and data are still those."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ... import __version__, storage
from ...checks import check
from .. import data, evaluation
from ..options import FORMAT, open_chosen_source


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json: "options", "data", "parameters" and "versions".

    Raises:
        ValueError: the file is missing, damaged or foreign.
    """
    path = folder / "run.json"
    check("run", path.is_file(), "folder must hold run.json", f"{folder} without it")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"run: folder must hold a whole run.json, got {path}: {error}") from None
    found = content.get("format") if isinstance(content, dict) else None
    rule = f"run.json must be of format {FORMAT!r}"
    check("run", found == FORMAT, rule, f"{found!r} in {path}")
    for name in ("options", "data"):
        there = isinstance(content.get(name), dict)
        check("run", there, f"run.json must hold {name}", f"{path} without")
    return content


def describe(source: data.Source) -> dict[str, Any]:
    """What is kept of the data: shape, scaling, sigma_data and the number of rows of each part."""
    train = source.parts.train
    # Only where there are some: run.json of data without labels or columns is what it was.
    classes = {} if source.labels is None else {"classes": list(source.labels.names)}
    columns = {"columns": list(source.columns)} if source.columns else {}
    return columns | {
        "spec": source.spec,
        "shape": list(source.shape),
        "scaling": source.scaling.as_dict(),
        "std": float(source.std),
        "n_train": None if train is None else len(train),  # a stream has no known end
        "n_validation": len(source.validation),
        "n_test": len(source.test),
        **classes,
    }


def launch_name() -> str | None:
    """The --rdzv-id of torchrun, where it has one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def begun_by_launch(folder: Path) -> bool:
    """Whether the launch that started this process has begun the run in the folder before.

    torchrun starts processes again with the same command line: after a failure, which it counts,
    and when a host comes or goes, which it does not count.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return True
    try:
        begun = read_run(folder).get("launch")
    except (ValueError, OSError):  # none there, or another process is replacing it
        return False
    return begun is not None and begun == launch_name()


def versions() -> dict[str, str]:
    """Of what the run was made with."""
    return {"hos_ext": __version__, "torch": torch.__version__, "python": platform.python_version()}


def refuse_changes(what: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Names what differs from what the run was started with.

    Raises:
        ValueError: something does.
    """
    changed = [
        f"{key} ({old.get(key)} there, {new.get(key)} now)"
        for key in dict.fromkeys([*old, *new])
        if not alike(old.get(key), new.get(key))
    ]
    rule = f"{what} must be those that the run was started with"
    check("run", not changed, rule, ", ".join(changed))


def alike(old: Any, new: Any) -> bool:
    """Equal, but for the rounding of statistics: that depends on the number of threads."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(alike(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(alike, old, new))
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-6)
    return bool(old == new)


def scaling_of(facts: Mapping[str, Any]) -> data.Scaling:
    """The scaling of the data that a model was trained on."""
    return data.Scaling.from_dict(facts["data"]["scaling"])


def open_data(
    facts: Mapping[str, Any], spec: str | None = None, test_spec: str | None = None
) -> data.Source:
    """The data of a run, opened again, and the same as before.

    Args:
        facts: of the run.
        spec: where the data lie now, if not where they lay; likewise test_spec. Their shape, their
            scale and the sizes of their parts must be those of the run.

    Raises:
        ValueError: they are not what they were.
        OSError, RuntimeError: they cannot be read.
    """
    moved = {"data": spec, "test_data": test_spec}
    options = {**facts["options"], **{k: v for k, v in moved.items() if v is not None}}
    source = open_chosen_source(options)
    now = describe(source)
    if spec is not None:
        now["spec"] = facts["data"]["spec"]
    refuse_changes("data", facts["data"], now)
    return source


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a whole file of JSON, or none."""
    storage.write_whole(path, json_text(content).encode())


def json_text(content: Mapping[str, Any]) -> str:
    """Indented JSON; null for numbers that JSON lacks, such as the ESS of what never moved."""
    return json.dumps(evaluation.plain_json(dict(content)), indent=2, allow_nan=False) + "\n"
