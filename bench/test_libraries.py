"""Peers that exist as packages; one that cannot be measured is named with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import floors, libraries, rows
from .conftest import alone


@pytest.mark.parametrize("shape", [(10, 2, 0), (1000, 784, 0)])
def test_langevin_step(
    benchmark: Any,
    record: Callable[..., None],
    note: Callable[[str], None],
    tiny: bool,
    shape: Any,
) -> None:
    shape = (50, 3, 0) if tiny else shape
    try:
        steps = libraries.langevin_steps(*shape[:2])
    except libraries.NotMeasured as reason:
        note(str(reason))
        pytest.skip(str(reason))
    times = libraries.measure(steps, tiny=tiny)
    moved = 3 * shape[0] * shape[1] * floors.FLOAT
    floor_us = floors.copy_us(moved, rows.THREADS)
    record(
        [
            rows.row(
                *("langevin_step", name, "forward", shape),
                timing=timing,
                moved=moved,
                floor_us=floor_us,
            )
            for name, timing in times.items()
        ]
    )
    benchmark.group = "langevin_step"
    alone(benchmark, ("hos_ext", steps["hos_ext"]), times, tiny)


@pytest.mark.parametrize("shape", [(1000, 2, 0), (1000, 784, 0)])
def test_mala(
    benchmark: Any,
    record: Callable[..., None],
    note: Callable[[str], None],
    tiny: bool,
    shape: Any,
) -> None:
    shape = (50, 3, 0) if tiny else shape
    try:
        steps, rates = libraries.mala(*shape[:2])
    except libraries.NotMeasured as reason:
        note(str(reason))
        pytest.skip(str(reason))
    times = libraries.measure(steps, tiny=tiny)
    mode = f"{libraries.MALA_STEPS} steps"
    record([rows.row("mala", name, mode, shape, timing=t) for name, t in times.items()])
    ratio = times["blackjax"].median / times["hos_ext"].median
    note(
        f"mala {shape}: blackjax over hos_ext {ratio:.4g}x; acceptance {rates['blackjax']:.3f} and "
        f"{rates['hos_ext']:.3f}"
    )
    benchmark.group = "mala"
    alone(benchmark, ("hos_ext", steps["hos_ext"]), times, tiny)


@pytest.mark.parametrize("peer", [libraries.fused_langevin, libraries.second_order_loss])
def test_other_peers_are_named(note: Callable[[str], None], peer: Callable[[], None]) -> None:
    with pytest.raises(libraries.NotMeasured) as reason:
        peer()
    note(str(reason.value))
