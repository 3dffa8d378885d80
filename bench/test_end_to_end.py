"""A training step and a sampling step from data to update, D = 784, batch 40 (the authors')."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import memory, networks, rows, timer
from .conftest import alone

BATCH = 40
CASES = [(network, rank) for network in ("MLP", "UNet") for rank in (20, 50)]


def _race(
    record: Callable[..., None],
    op: str,
    case: tuple[str, int],
    steps: dict[str, Callable[[], Any]],
    tiny: bool,
) -> dict[str, timer.Timing]:
    network, rank = case
    times = timer.measure(steps, seconds=0, least=1 if tiny else 2, blocks=1 if tiny else 3)
    for name, timing in times.items():
        peak = None
        if not tiny and not name.endswith("loss"):
            peak = memory.peak_mib(op.removesuffix("_step"), network, name, rank)
        shape = (BATCH, 784, rank)
        record([rows.row(op, name, network, shape, timing=timing, peak_mib=peak)])
    return times


@pytest.mark.parametrize(("network", "rank"), CASES)
def test_training_step(
    benchmark: Any,
    record: Callable[..., None],
    note: Callable[[str], None],
    tiny: bool,
    network: str,
    rank: int,
) -> None:
    dims = networks.IMAGE[network]
    if tiny:
        dims, rank = (9,) if network == "MLP" else (1, 4, 4), 2
    batch = 3 if tiny else BATCH
    steps = networks.training_steps(network, rank, dims=dims, batch=batch)
    first = {name: [steps[name]()] for name in ("hos_ext", "dense")}
    timer.agree(first, against="dense", rtol=1e-4)
    times = _race(record, "training_step", (network, rank), steps, tiny)
    own, dense = times["hos_ext"].median, times["dense"].median
    share, dense_share = times["hos_ext loss"].median / own, times["dense loss"].median / dense
    note(
        f"training_step {network} r {rank}: dense over hos_ext {dense / own:.4g}x; the loss is "
        f"{share:.1%} of the step, of the dense step {dense_share:.1%}"
    )
    benchmark.group = f"training step {network}"
    alone(benchmark, ("hos_ext", steps["hos_ext"]), times, tiny)


@pytest.mark.parametrize(("network", "rank"), CASES)
def test_sampling_step(
    benchmark: Any,
    record: Callable[..., None],
    note: Callable[[str], None],
    tiny: bool,
    network: str,
    rank: int,
) -> None:
    dims = networks.IMAGE[network]
    if tiny:
        dims, rank = (9,) if network == "MLP" else (1, 4, 4), 2
    batch = 3 if tiny else BATCH
    steps = networks.sampling_steps(network, rank, dims=dims, batch=batch)
    for step in steps.values():
        step()
    times = _race(record, "sampling_step", (network, rank), steps, tiny)
    forward = times["network"].median
    shares = {
        name: f"{name} {times[name].median / forward:.3g}x" for name in steps if name != "network"
    }
    note(f"sampling_step {network} r {rank}, over the network alone: {', '.join(shares.values())}")
    benchmark.group = f"sampling step {network}"
    alone(benchmark, ("ozaki", steps["ozaki"]), times, tiny)
