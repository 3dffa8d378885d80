"""The figures that this repository's kernels have reached, by kind of processor, for the gate.

A ratio between two programs depends on the width of vectors far more than on the clock. So each
instruction set that the native module knows has its own figures, in results/recorded.csv.
`python -m bench.quick --record` writes those of the machine it runs on.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from hos_ext import build_info

from . import rows
from .goals import Goal

PATH = rows.RESULTS / "recorded.csv"
COLUMNS = ("level", "case", "figure", "date", "commit", "machine", "torch")
SLACK = 0.15  # below what is recorded, before the gate fails


def level() -> str:
    """The instruction set in use here."""
    return str(build_info()["cpu_level"])


def read(path: Path | None = None) -> dict[tuple[str, str], rows.Row]:
    """The recorded rows by level and case; of `PATH`, if no other is given."""
    path = path or PATH
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["level"], row["case"]): row for row in csv.DictReader(file)}


def figures(here: str, path: Path | None = None) -> dict[str, float]:
    """The figures of a level, by case."""
    return {case: float(r["figure"]) for (its, case), r in read(path).items() if its == here}


def write(found: Mapping[str, float], here: str, path: Path | None = None) -> None:
    """Puts figures of a level in the place of its former ones; all others stay."""
    kept, place = read(path), rows.environment()
    for case, figure in found.items():
        line = {"level": here, "case": case, "figure": f"{figure:.4g}"} | place
        kept[here, case] = {name: line[name] for name in COLUMNS}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept[key] for key in sorted(kept))
    path = path or PATH
    beside = path.with_suffix(".tmp")
    beside.write_text(text.getvalue(), encoding="utf-8")
    os.replace(beside, path)


def slower(goal: Goal, figure: float, than: float) -> bool:
    """Whether a figure of a goal is worse than the recorded one by more than the slack."""
    if goal.at_least is not None:
        return not figure >= than * (1 - SLACK)
    return not figure <= than * (1 + SLACK)
