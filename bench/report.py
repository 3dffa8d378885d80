"""The recorded rows as markdown tables: `python -m bench.report [bench/results/cpu.csv]`.

A line for each operator and size, a column for each variant: microseconds (or MiB) and, for the
others, the ratio to hos_ext. Of rows that differ in date and commit alone, the last one counts.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PLACE = ("machine", "device", "torch")
CASE = ("op", "mode", "dtype", "B", "D", "r")
UNITS = {"us_median": "Time, microseconds (median)", "peak_mib": "Peak extra memory, MiB"}


def render(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: for each machine a table of times and a table of memory."""
    blocks = []
    for place in dict.fromkeys(tuple(row[key] for key in PLACE) for row in rows):
        here = [row for row in rows if tuple(row[key] for key in PLACE) == place]
        machine, device, version = place
        commits = dict.fromkeys(
            f"{row['date']} {row['commit']}{' (dirty)' * (row['dirty'] == 'True')}" for row in here
        )
        blocks.append(f"## {machine} ({device}), torch {version}\n\n{', '.join(commits)}")
        blocks += [
            f"{title}; in brackets over that of hos_ext.\n\n{_table(here, key)}"
            for key, title in UNITS.items()
            if any(row[key] for row in here)
        ]
    return "\n\n".join(blocks) + "\n"


def _table(rows: Sequence[Mapping[str, str]], key: str) -> str:
    rows = [row for row in rows if row[key]]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        case = tuple(row[name] for name in CASE)
        cases.setdefault(case, {})[row["variant"]] = float(row[key])
    lines = [
        "| " + " | ".join([*CASE, *variants]) + " |",
        "|" + " --- |" * len(CASE) + " ---: |" * len(variants),
    ]
    for case, values in cases.items():
        cells = [_cell(name, values) for name in variants]
        lines.append("| " + " | ".join([*case, *cells]) + " |")
    return "\n".join(lines)


def _cell(variant: str, values: Mapping[str, float]) -> str:
    if variant not in values:
        return ""
    value = f"{values[variant]:,.1f}"
    if variant == "hos_ext" or "hos_ext" not in values:
        return value
    return f"{value} ({values[variant] / values['hos_ext']:.3g}x)"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: Sequence[str]) -> None:
    path = Path(arguments[0]) if arguments else Path(__file__).parent / "results" / "cpu.csv"
    print(render(read(path)), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
