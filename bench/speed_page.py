"""The table of docs/speed.md, written from the recorded rows by `bench.report --archive`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .goals import BOTH, FORWARD
from .rows import ROOT, Shape

PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- from bench/results: begin -->", "<!-- end -->"
RIVALS = ("eager", "compiled", "dense")
NOT_RUN = {(16, 3072, 20): "not run: 604 MB a batch of matrices"}  # see `cases.MEMORY_LIMIT`
LOSS, STEP = "d2sm_vr_loss", "ozaki_step"
LINES: tuple[tuple[str, str, str, Shape], ...] = (
    ("`d2sm_vr_loss` forward and backward, B 32, D 784, r 20", LOSS, BOTH, (32, 784, 20)),
    ("the same, B 64, D 784, r 50", LOSS, BOTH, (64, 784, 50)),
    ("the same, B 256, D 100, r 20", LOSS, BOTH, (256, 100, 20)),
    ("the same, B 16, D 3072, r 20", LOSS, BOTH, (16, 3072, 20)),
    ("the same, B 1024, D 2, r 2", LOSS, BOTH, (1024, 2, 2)),
    ("the same, B 8, D 784, r 200", LOSS, BOTH, (8, 784, 200)),
    ("the first row without gradients", LOSS, FORWARD, (32, 784, 20)),
    ("`ozaki_step` with its noise, 1000 x 784", STEP, FORWARD, (1000, 784, 0)),
    ("`ozaki_step`, 10 x 2, no gradient", STEP, FORWARD, (10, 2, 0)),
    ("the same, forward and backward", STEP, BOTH, (10, 2, 0)),
)

Medians = Mapping[tuple[str, ...], Mapping[str, float]]


def table(found: Medians) -> str:
    """Our time, and how many times as long each rival takes.

    Args:
        found: microseconds by variant, for each (op, mode, dtype, B, D, r).
    """
    lines = [
        "| work | hos_ext | eager closed form | `torch.compile` of it | D x D |",
        "|---|---|---|---|---|",
    ]
    for name, op, mode, shape in LINES:
        values = found[(op, mode, "float32", *map(str, shape))]
        own = values["hos_ext"]
        cells = [times(values[rival] / own) if rival in values else "" for rival in RIVALS]
        cells[-1] = cells[-1] or (NOT_RUN.get(shape, "") if mode == BOTH else "")
        lines.append(f"| {name} | {duration(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"


def duration(us: float) -> str:
    return f"{us:.1f} us" if us < 100 else f"{us:.0f} us" if us < 1000 else f"{us / 1000:.1f} ms"


def write(found: Medians, page: Path = PAGE) -> None:
    """Puts the table between the marks of the page; all else stays."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    beside = page.with_suffix(".tmp")
    made = f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}"
    beside.write_text(made, encoding="utf-8")
    os.replace(beside, page)
