"""The time of the second-order score: what the suite and the paper's Table 2 both measure."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import memory, networks, rows, timer

RUNS = 7
OP = "second_order_score"


def check(found: dict[str, networks.Scaled]) -> None:
    """The Jacobians agree; the assembled head is what the structured one says."""
    whole = {
        name: [scaled.call()]
        for name, scaled in found.items()
        if scaled.mode == "Hessian" and not scaled.rank and not name.startswith("jacfwd")
    }
    timer.agree(whole, against="row loop", rtol=1e-4)
    rows_, columns = whole["row loop"][0], {}
    side = rows_.shape[1]  # the block that rows and columns share
    for name, scaled in found.items():
        if name.startswith("jacfwd"):
            columns[name] = [scaled.call()[:, :, :side].mT]
    timer.agree({"row loop": [rows_[:, :, :side]]} | columns, against="row loop", rtol=1e-4)
    for name, scaled in found.items():
        if name.startswith("hos_ext assembled"):
            own = found[name.replace("assembled", "structured")].call()
            dense = torch.diag_embed(own.diag.flatten(1)) + own.factor @ own.factor.mT
            results = {"structured": [dense], name: [scaled.call()]}
            timer.agree(results, against="structured", rtol=1e-5)


def measure(
    network: str, ranks: Sequence[int], *, tiny: bool = False
) -> tuple[dict[str, networks.Scaled], dict[str, timer.Timing], list[rows.Row]]:
    """Checks the contestants, then seven interleaved runs of each, and their peak memory.

    Returns:
        The contestants, the time of the whole work of each, and their rows.
    """
    found = networks.second_order(network, ranks, tiny=tiny)
    check(found)
    size = networks.points(network)[0].numel()
    measured = timer.measure(
        {name: scaled.call for name, scaled in found.items()},
        seconds=0,
        least=2 if tiny else RUNS,
        blocks=1,
    )
    once = measured["score"].median
    times = {name: found[name].whole(timing, once) for name, timing in measured.items()}
    made = []
    for name, timing in times.items():
        scaled = found[name]
        shape = (networks.BATCH, size, scaled.rank)
        peak = None
        if not tiny and name != "score":
            peak = memory.peak_mib("second_order", network, name, scaled.rank)
            peak += scaled.missing / 2**20
        made.append(
            rows.row(OP, name, f"{network} {scaled.mode}", shape, timing=timing, peak_mib=peak)
        )
    return found, times, made
