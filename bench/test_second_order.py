"""The paper's Table 2, extended: the second-order score at a batch of points.

Our head, as diagonal and factor or as matrices, against automatic differentiation of a score
network; seven interleaved runs, mean and median. Where rows of the U-Net's Jacobians are a share of
the work, the time is that of the whole (`networks.Scaled`), and one whole run is put beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from . import networks, rows, second_order, timer
from .conftest import alone
from .second_order import OP


@pytest.mark.parametrize("network", ["MLP", "UNet"])
def test_second_order_score(
    benchmark: Any,
    record: Callable[..., None],
    note: Callable[[str], None],
    tiny: bool,
    network: str,
) -> None:
    ranks = networks.RANKS[:1] if tiny else networks.RANKS
    found, times, made = second_order.measure(network, ranks, tiny=tiny)
    record(made)
    _note_ratios(note, network, found, times)
    benchmark.group = f"{OP} {network}"
    benchmark.extra_info["medians_us"] = {name: t.median for name, t in times.items()}
    name = f"hos_ext structured, r {ranks[0]}"
    alone(benchmark, (name, found[name].call), times, tiny)


def _note_ratios(
    note: Callable[[str], None],
    network: str,
    found: dict[str, networks.Scaled],
    times: dict[str, timer.Timing],
) -> None:
    """The bars of the paper: 84 times for the MLP at r = 20, 500 for the U-Net at every rank."""
    for name, scaled in found.items():
        if not scaled.rank:
            continue
        rivals = {n: times[n].median for n, s in found.items() if s.mode == scaled.mode}
        rivals = {n: t for n, t in rivals.items() if not found[n].rank}
        best = min(rivals, key=rivals.__getitem__)
        line = f"{OP} {network} {name}: {rivals[best] / times[name].median:.4g}x over {best}"
        if "row loop" in rivals:
            line += f", {rivals['row loop'] / times[name].median:.4g}x over the row loop"
        note(line)


def test_one_whole_run_of_the_row_loop(record: Callable[..., None], tiny: bool) -> None:
    """Every row of the U-Net's Jacobians, once: what the scaled time must come to."""
    x, score = networks.points("UNet"), networks.score_network("UNet")
    start = time.perf_counter()
    networks.row_loop(score, x, 3 if tiny else x[0].numel())
    taken = 1e6 * (time.perf_counter() - start)
    timing = timer.Timing(taken, taken, taken, taken)
    shape = (networks.BATCH, x[0].numel(), 0)
    record([rows.row(OP, "row loop, one whole run", "UNet Hessian", shape, timing=timing)])
