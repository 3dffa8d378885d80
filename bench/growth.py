"""The sizes along which growth is measured, and the exponents fitted to what was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from . import cases, timer
from .rows import Row, Shape


class Line(NamedTuple):
    """Sizes along one axis with the two others fixed; sizes from which memory is measured."""

    axis: int  # in (B, D, r)
    base: Shape
    sizes: tuple[int, ...]
    memory_from: int

    def at(self, size: int) -> Shape:
        shape = list(self.base)
        shape[self.axis] = size
        return (shape[0], shape[1], shape[2])


LINES = {
    "B": Line(0, (0, 784, 20), (1, 4, 16, 64, 256), 16),
    # up to 3 x 256 x 256, an image in colours
    "D": Line(1, (1, 0, 16), (64, 256, 1024, 4096, 8192, 32768, 196608), 1024),
    "r": Line(2, (8, 784, 0), (2, 4, 8, 16, 32, 64, 128, 256), 16),
}
# The Gram matrices take over from the reading of the factor somewhere here.
RANK_KNEE = 32
# Below, calls cost more than work.
ASYMPTOTIC = {"B": 16, "D": 4096, "r": RANK_KNEE}


def shapes(axis: str, *, dense: bool = False) -> list[Shape]:
    """The shapes of a line; for the dense formulation those within `cases.MEMORY_LIMIT`."""
    line = LINES[axis]
    found = [line.at(size) for size in line.sizes]
    return [s for s in found if not dense or cases.dense_bytes(s) <= cases.MEMORY_LIMIT]


def memory_shapes(axis: str, *, dense: bool = False) -> list[Shape]:
    """Those of them whose peak stands out from the process."""
    line = LINES[axis]
    return [s for s in shapes(axis, dense=dense) if s[line.axis] >= line.memory_from]


def dense_end(axis: str) -> float:
    """The size at which the dense formulation reaches `cases.MEMORY_LIMIT`; inf along r."""
    batch, size, _ = LINES[axis].base
    if axis == "B":
        return cases.MEMORY_LIMIT / cases.dense_bytes((1, size, 0))
    return (
        (cases.MEMORY_LIMIT / cases.dense_bytes((batch, 1, 0))) ** 0.5 if axis == "D" else math.inf
    )


def points(rows: Iterable[Row], axis: str, variant: str, key: str) -> dict[int, float]:
    """Size -> value of a column, for the rows of the loss that lie on a line; the last counts."""
    line = LINES[axis]
    found: dict[int, float] = {}
    for row in rows:
        shape = (int(row["B"]), int(row["D"]), int(row["r"]))
        on_line = shape[line.axis] in line.sizes and shape == line.at(shape[line.axis])
        same = row["op"] == "d2sm_vr_loss" and row["mode"] == "forward+backward"
        if same and on_line and row["variant"] == variant and row[key]:
            found[shape[line.axis]] = float(row[key])
    return dict(sorted(found.items()))


class Exponent(NamedTuple):
    """k of value ~ size^k from `low` to `high`."""

    variant: str
    axis: str
    key: str
    low: int
    high: int
    value: float


def exponents(rows: Iterable[Row]) -> list[Exponent]:
    """The fits over each whole line, and over its parts: beyond the overhead, around the knee."""
    rows = list(rows)
    found = []
    for key in ("us_p50", "peak_mib"):
        for axis in LINES:
            for variant in ("hos_ext", "eager", "dense"):
                all_points = points(rows, axis, variant, key)
                knee = ASYMPTOTIC[axis]
                parts = [
                    all_points,
                    {s: v for s, v in all_points.items() if s <= knee and axis == "r"},
                    {s: v for s, v in all_points.items() if s >= knee},
                ]
                for part in parts:
                    if len(part) >= 3:
                        slope = timer.fitted_exponent(list(part), list(part.values()))
                        found.append(Exponent(variant, axis, key, min(part), max(part), slope))
    return list(dict.fromkeys(found))
