"""How time and memory grow: linear in B and D, quadratic in r only once r is large.

The dense formulation beside it ends where `cases.MEMORY_LIMIT` does: by its size, not by running
out of memory. The exponents are fitted by `report` from the rows.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from . import cases, goals, growth, memory, peers, rows, timer
from .conftest import alone

OP = "d2sm_vr_loss"


@pytest.mark.parametrize("variant", ["hos_ext", "eager", "dense"])
@pytest.mark.parametrize("axis", growth.LINES)
def test_time(
    benchmark: Any, record: Callable[..., None], tiny: bool, axis: str, variant: str
) -> None:
    losses = peers.d2sm_vr_losses()
    shapes = growth.shapes(axis, dense=variant == "dense")[: 2 if tiny else None]
    times = {}
    for shape in shapes:  # one after the other: all inputs at once would not fit
        inputs = peers.second_order_inputs(*shape, points=3)
        step = peers.forward_backward(losses[variant], inputs)
        values = {"eager": peers.forward(losses["eager"], inputs)(), variant: step()[:1]}
        timer.agree(values, against="eager", rtol=1e-4)
        sizes = {variant: step}
        times[shape] = timer.measure(sizes, seconds=0.01 if tiny else 1.5, least=3)[variant]
        work = cases.floors.d2sm_loss(shape, points=3, backward=True)
        record(
            [
                rows.row(
                    *(OP, variant, goals.BOTH, shape),
                    timing=times[shape],
                    moved=work.moved,
                    floor_us=cases.floors.floor_us(work),
                )
            ]
        )
    benchmark.group = f"growth of time with {axis}"
    alone(benchmark, (variant, step), {variant: times[shapes[-1]]}, tiny=True)


@pytest.mark.parametrize("variant", ["hos_ext", "eager", "dense"])
@pytest.mark.parametrize("axis", growth.LINES)
def test_memory(record: Callable[..., None], tiny: bool, axis: str, variant: str) -> None:
    """Peak extra memory, from sizes on at which pages do not blur it."""
    for shape in growth.memory_shapes(axis, dense=variant == "dense")[: 1 if tiny else None]:
        peak = memory.peak_mib("loss", OP, variant, *shape)
        record([rows.row(OP, variant, goals.BOTH, shape, peak_mib=peak)])


@pytest.mark.parametrize("shape", [(32, 784, 20), (64, 784, 50)])
def test_two_threads_against_one(race: Callable[..., Any], tiny: bool, shape: Any) -> None:
    race(cases.build("threads", goals.BOTH, (3, 5, 2) if tiny else shape))


@pytest.mark.parametrize("kind", ["coarse", "fine"])
def test_alternating_with_torch(race: Callable[..., Any], kind: str) -> None:
    race(cases.build(f"alternating, {kind}", goals.FORWARD, goals.TINY))


_TEAM = """
import os, torch, hos_ext
from bench import peers
def team(batch, size, rank):
    torch.set_num_threads(1)  # torch's own operators on the inputs start none
    steps = peers.step_inputs(batch, size)
    inputs = peers.second_order_inputs(batch, size, rank, points=3)
    torch.set_num_threads(2)
    hos_ext.ozaki_step(*steps, 0.1)
    hos_ext.d2sm_vr_loss(*inputs)
    return len(os.listdir("/proc/self/task"))
print(team(2, 2, 1), team(10, 2, 2), team(64, 784, 20))
"""


def test_small_inputs_wake_no_threads() -> None:
    """In a process that has none yet, small calls start no thread; a large one does."""
    done = subprocess.run(
        [sys.executable, "-c", _TEAM], cwd=rows.ROOT, check=True, capture_output=True, text=True
    )
    first, small, large = map(int, done.stdout.split())
    assert first == small < large
