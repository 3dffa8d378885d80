"""A training beside one busy process on every core: what waiting threads cost there."""

from __future__ import annotations

from collections.abc import Callable

from . import goals, neighbours, rows
from .conftest import VERDICTS


def test_training_beside_neighbours(
    record: Callable[[list[rows.Row]], None], note: Callable[[str], None], tiny: bool
) -> None:
    times = neighbours.measure(2, 1) if tiny else neighbours.measure()
    case = (goals.NEIGHBOURS, goals.WHOLE_RUN, goals.DIGITS)
    medians = {name: timing.median for name, timing in times.items()}
    VERDICTS.extend(goals.judge(*case, medians))
    op, mode, shape = case
    record([rows.row(op, name, mode, shape, timing=t) for name, t in times.items()])
    for waiting in neighbours.WAITING:
        ratio = medians[f"{waiting} beside"] / medians[waiting]
        note(f"{waiting} threads: beside busy neighbours {ratio:.2f}x the time alone")
