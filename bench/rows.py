"""The measured rows: one dictionary with the keys `COLUMNS` each, appended to a CSV file.

results/README.md says what the columns mean. Rows are never edited.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .timer import Timing

COLUMNS = (
    *("date", "commit", "dirty", "machine", "device", "torch"),
    *("threads", "op", "variant", "mode", "dtype", "B", "D", "r"),
    *("us_p20", "us_p50", "us_p80", "us_mean", "peak_mib", "gbps", "share_of_floor"),
)
THREADS = 2
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Row = dict[str, str]
Shape = tuple[int, int, int]


def environment() -> Row:
    """Where and when: the first columns of a row."""
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short=10", "HEAD"),
        "dirty": str(bool(status)),
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores",
        "device": "cpu",
        "torch": torch.__version__,
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def row(
    op: str,
    variant: str,
    mode: str,
    shape: Shape,
    *,
    dtype: str = "float32",
    threads: int | None = None,
    timing: Timing | None = None,
    peak_mib: float | None = None,
    moved: int | None = None,
    floor_us: float | None = None,
) -> Row:
    """One line of results without its environment.

    Args:
        op, variant, mode, dtype: as results/README.md says.
        shape: B, D and r.
        threads: of torch; None is what it has now.
        timing: microseconds of a call.
        peak_mib: peak extra memory of a call.
        moved: bytes that a call must read and write at least.
        floor_us: time below which no call can be.
    """
    numbers: dict[str, float | None] = dict.fromkeys(COLUMNS[-7:])
    if timing is not None:
        numbers |= {"us_p20": timing.p20, "us_p50": timing.median, "us_p80": timing.p80}
        numbers["us_mean"] = timing.mean
        numbers["gbps"] = None if moved is None else moved / timing.median / 1e3
        numbers["share_of_floor"] = None if floor_us is None else floor_us / timing.median
    numbers["peak_mib"] = peak_mib
    return {
        "threads": str(torch.get_num_threads() if threads is None else threads),
        "op": op,
        "variant": variant,
        "mode": mode,
        "dtype": dtype,
        **dict(zip(("B", "D", "r"), map(str, shape), strict=True)),
        **{name: "" if value is None else f"{value:.6g}" for name, value in numbers.items()},
    }


def append(
    path: Path, rows: Sequence[Mapping[str, str]], *, place: Mapping[str, str] | None = None
) -> None:
    """Appends rows with their environment; old rows stay as they are.

    Args:
        path: of the file; created where it does not exist.
        rows: made by `row`.
        place: what a GPU adds to the environment or says otherwise; new columns come last.

    Raises:
        ValueError: the file has other columns.
    """
    where = environment() | dict(place or {})
    columns = (*COLUMNS, *(name for name in where if name not in COLUMNS))
    text = path.read_text() if path.exists() else ""
    if text and text.splitlines()[0] != ",".join(columns):
        raise ValueError(f"append: {path} must have the columns {','.join(columns)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not text:
            writer.writeheader()
        writer.writerows({**where, **line} for line in rows)


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


FIGURES = COLUMNS[-7:]
WHAT = ("machine", "device", "torch", "threads", "op", "variant", "mode", "dtype", "B", "D", "r")


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that count, and those that later rows replace.

    A later row replaces one that measured the same thing in the same place, if it has all the
    figures which that one has: times and memory may come from two rows.
    """
    today: list[Row] = []
    history: list[Row] = []
    later: dict[tuple[str, ...], set[str]] = {}
    for row in reversed(rows):
        known = later.setdefault(tuple(row[name] for name in WHAT), set())
        filled = {name for name in FIGURES if row[name]}
        (history if filled <= known else today).append(row)
        known |= filled
    return today[::-1], history[::-1]


def archive(path: Path) -> int:
    """Moves the rows that later ones replace to history.csv beside; how many they were."""
    today, history = split(read(path))
    if not history:
        return 0
    older = path.with_name("history.csv")
    past = read(older) if older.exists() else []
    for target, lines in ((older, past + history), (path, today)):
        beside = target.with_suffix(".tmp")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        os.replace(beside, target)
    return len(history)
