"""What an item leaves behind: cells as they finish, then a table, a figure and its settings.

A cell is the smallest piece that is computed alone, such as one training run. Its settings are all
that its result depends on; both are appended to ITEM.jsonl as one line, and a cell whose settings
are there already is not computed again. Several processes share the cells of an item: each takes
what no other one has in hand, and waits for those at the end. ITEM.md and ITEM.csv hold the table,
ITEM.png the figure, ITEM.json what the cells took, where, and at which commits.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from matplotlib.figure import Figure

from bench import rows
from hos_ext.app.evaluation import plain_json
from hos_ext.storage import write_whole

WIDTH = 7.0
# One colour for each contestant, on every figure of the paper's items.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#1f6fb4", "#d9622b", "#3d8f5f", "#7d5ba6", "#8a8a8a"
_HEAD = """# The paper's tables and figures, ours beside the paper's

Meng, Song, Li and Ermon, "Estimating High Order Gradients of the Data Distribution by Denoising",
NeurIPS 2021, arXiv:2111.04726. Every item is one command, `python -m bench.paper ITEM`; numbers
marked as the paper's are printed there, all others were measured here. What the paper does not
give (covariances, mixture parameters, steps, batches) is fixed in `bench/paper/sets.py` and in the
texts below: ratios and orderings can be compared, absolute values cannot. Every seed that was run
is in the tables. Under each item stand machine, commits and time; ITEM.csv holds its table in full
precision, ITEM.jsonl every cell with its settings, seed, machine, commit and time, ITEM.json their
sum. [findings.md](findings.md) says in words what they show, which goals are missed and by how
much, and what was tried.
"""


class Unfinished(RuntimeError):
    """Cells of this item are not there yet and are not, or cannot be, computed here."""


class Folders(NamedTuple):
    """Of the data, None where it is not known, and of the runs of training."""

    data: Path | None
    runs: Path


class Record:
    """The folder of one item.

    Args:
        item: its name, such as "table1".
        out: the folder of all items.
        quick: small settings, to show that the item works; its numbers mean nothing.
        render: compute nothing.
        folders: where data and trained models are; no result depends on that.
    """

    def __init__(
        self,
        item: str,
        out: Path,
        *,
        quick: bool = False,
        render: bool = False,
        folders: Folders | None = None,
    ) -> None:
        self.item, self.out, self.quick, self.render = item, out, quick, render
        self.folders = folders or Folders(None, out / "runs")
        self.computed = 0
        self._used: list[dict[str, Any]] = []
        self._compared: list[dict[str, str]] = []
        self._sections: list[str] = []
        self._rows: list[dict[str, Any]] = []
        out.mkdir(parents=True, exist_ok=True)

    def cells(
        self,
        work: Sequence[Mapping[str, Any]],
        compute: Callable[..., Any],
        *,
        of: str = "",
        placed: bool = False,
    ) -> list[Any]:
        """The results of `compute(**settings)` for each settings, from the file where they are.

        Args:
            work: settings of each cell: plain JSON, keyword arguments of compute.
            compute: returns plain JSON.
            of: the item that the cells belong to, if it is another one.
            placed: compute takes `self.folders` before the settings.

        Raises:
            Unfinished: cells are missing, and this record only renders.
        """
        path = self.out / f"{of or self.item}.jsonl"
        kind = compute.__name__
        keys = [_key(kind, settings) for settings in work]
        known = _known(path)
        left = [k for k, key in enumerate(keys) if key not in known]
        if left and self.render:
            raise Unfinished(f"{self.item}: {len(left)} of {len(keys)} cells are not computed yet")
        if left:
            here = rows.environment()
            given = [self.folders] if placed else []
            # Those that others have in hand come again at the end, and are waited for.
            turns = [(k, False) for k in left] + [(k, True) for k in left]
            hands = self.folders.runs / f"{path.stem}.lock"
            hands.parent.mkdir(parents=True, exist_ok=True)
            with hands.open("w") as file:
                for k, wait in turns:
                    if keys[k] in known:
                        continue
                    with _claimed(file, keys[k], wait) as mine:
                        known = _known(path)
                        if not mine or keys[k] in known:
                            continue
                        began = time.perf_counter()
                        result = plain_json(compute(*given, **work[k]))
                        line = {
                            "kind": kind,
                            "settings": dict(work[k]),
                            "seconds": round(time.perf_counter() - began, 2),
                            **here,
                            "result": result,
                        }
                        _append(path, line)
                        known[keys[k]] = json.loads(json.dumps(line))
                        self.computed += 1
        self._used += [known[key] for key in keys]
        return [known[key]["result"] for key in keys]

    def adopt(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """What was measured elsewhere: "settings", "seconds" and the environment of a row."""
        self._used += [dict(line) for line in lines]

    def compare(self, quantity: str, paper: str, ours: str) -> None:
        """A line of the table at the head of the page of all items."""
        self._compared.append({"quantity": quantity, "paper": paper, "ours": ours})

    def text(self, paragraph: str) -> None:
        """A paragraph of the page."""
        self._sections.append(paragraph)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of the page; the first row's keys are its columns. Its rows join the csv file."""
        columns = list(rows[0])
        lines = [
            "| " + " | ".join(columns) + " |",
            "|" + " --- |" * len(columns),
            *("| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows),
        ]
        self._sections.append(f"### {title}\n\n" + "\n".join(lines))

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of the csv file, in full precision."""
        self._rows += [dict(row) for row in rows]

    def figure(self, figure: Figure, caption: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        write_whole(self.out / f"{self.item}.png", buffer.getvalue())
        self._sections.append(f"![{caption}]({self.item}.png)\n\n{caption}")

    def close(self, title: str) -> None:
        """Writes the page, the csv file and the settings."""
        places = ("machine", "device", "torch", "commit", "dirty", "date")
        facts = {
            "item": self.item,
            "title": title,
            "quick": self.quick,
            "compared": self._compared,
            "cells": len(self._used),
            "seconds": round(sum(line["seconds"] for line in self._used), 1),
            **{key: sorted({str(line[key]) for line in self._used}) for key in places},
            "settings": _ranges([line["settings"] for line in self._used]),
        }
        warning = "\n\nA quick run: it shows that the item works, its numbers mean nothing."
        head = f"## {title}" + warning * self.quick
        origin = (
            f"{facts['cells']} cells, {facts['seconds']:,.0f} s in all, on "
            f"{', '.join(facts['machine'])} ({', '.join(facts['device'])}), torch "
            f"{', '.join(facts['torch'])}, commit {', '.join(facts['commit'])}."
        )
        page = "\n\n".join([head, *self._sections, origin]) + "\n"
        write_whole(self.out / f"{self.item}.md", page.encode())
        if self._rows:
            text = io.StringIO()
            columns = list(dict.fromkeys(key for row in self._rows for key in row))
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)
            write_whole(self.out / f"{self.item}.csv", text.getvalue().encode())
        write_whole(self.out / f"{self.item}.json", (json.dumps(facts, indent=1) + "\n").encode())


def write_page(out: Path, items: Sequence[str], missing: Mapping[str, str]) -> None:
    """README.md: a table of all items, ours beside the paper's, then the pages that are there.

    Args:
        items: in their order on the page.
        missing: why an item has no page, or what its page lacks.
    """
    lines = ["| item | quantity | the paper's | ours |", "|" + " --- |" * 4]
    pages = []
    for item in items:
        path = out / f"{item}.json"
        if not path.exists():
            lines.append(f"| {item} | not run: {missing.get(item, 'no cells')} | | |")
            continue
        facts = json.loads(path.read_text())
        pages.append((out / f"{item}.md").read_text())
        name = f"[{item}]({item}.md)" + " (quick)" * facts["quick"]
        if item in missing:
            lines.append(f"| {name} | older than its cells: {missing[item]} | | |")
        for row in facts["compared"] or [{"quantity": facts["title"], "paper": "", "ours": ""}]:
            lines.append(f"| {name} | {row['quantity']} | {row['paper']} | {row['ours']} |")
    write_whole(out / "README.md", "\n".join([_HEAD, *lines, "", *pages]).encode())


def panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes (rows, columns), `height` inches for each row."""
    figure = Figure(figsize=(WIDTH, height * rows), dpi=160, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.title.set_fontsize(8)
        axis.xaxis.label.set_fontsize(8)
        axis.yaxis.label.set_fontsize(8)
    return figure, axes


def legend(figure: Figure, axes: Any) -> None:
    """One legend above all axes, with one entry for each label on any of them."""
    found: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()), list(found), loc="outside upper center", ncols=4, fontsize=6
    )


def mean_std(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over the seeds; NaN where a value is missing."""
    numbers = [float("nan") if v is None else float(v) for v in values]
    mean = sum(numbers) / len(numbers)
    spread = sum((v - mean) ** 2 for v in numbers) / max(len(numbers) - 1, 1)
    return mean, spread**0.5


def plus_minus(values: Sequence[float | None]) -> str:
    mean, std = mean_std(values)
    return f"{mean:.4g} ± {std:.2g}"


def _key(kind: str, settings: Mapping[str, Any]) -> str:
    return json.dumps([kind, settings], sort_keys=True)


def _known(path: Path) -> dict[str, dict[str, Any]]:
    return {_key(line["kind"], line["settings"]): line for line in _lines(path)}


@contextmanager
def _claimed(file: TextIO, key: str, wait: bool) -> Iterator[bool]:
    """Whether this process has a cell in hand: a byte of a file that all of them lock.

    It is free when its process ends, however that ends.
    """
    place = zlib.crc32(key.encode())
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, place)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; the rest of one that was being written is left out."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line in one piece, on a line of its own whatever stood at the end."""
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        whole = file.tell() == 0
        if not whole:
            file.seek(-1, io.SEEK_END)
            whole = file.read(1) == b"\n"
        file.write(b"\n" * (not whole) + json.dumps(line, allow_nan=False).encode() + b"\n")


def _ranges(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values that each setting took, in order of appearance."""
    found: dict[str, list[Any]] = {}
    for each in settings:
        for key, value in each.items():
            values = found.setdefault(key, [])
            if value not in values:
                values.append(value)
    return found


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
