"""Table 2: the time of the second-order score, from the suite's rows or measured here.

`bench.second_order` is the one place of the measurement. Rows that `make bench` has recorded are
taken, those of every machine; where there are none the item measures its own.
"""

from __future__ import annotations

from typing import Any

import torch

from bench import networks, rows, second_order

from .record import BLUE, GREY, ORANGE, Record, panels

# Printed in the paper (TITAN Xp, 7 runs): rank to milliseconds; None is automatic differentiation.
# For the MLP the unit is printed as "s": a micro sign was evidently lost.
PAPER = {
    "MLP": {None: 32.1, 20: 0.380, 50: 0.377, 200: 0.546, 1000: 1.84},
    "UNet": {None: 34_600.0, 20: 67.9, 50: 72.5, 200: 68.8, 1000: 69.4},
}
_RUN = "row loop"


def score_times(network: str, ranks: list[int], tiny: bool) -> list[dict[str, str]]:
    """The rows of one network, with the suite's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(rows.THREADS)
    try:
        torch.manual_seed(0)
        return second_order.measure(network, ranks, tiny=tiny)[2]
    finally:
        torch.set_num_threads(before)


def recorded() -> list[dict[str, str]]:
    """The suite's rows of this operator: of rows alike but for date and commit the last one."""
    path = rows.RESULTS / "cpu.csv"
    found = {}
    for row in rows.read(path) if path.exists() else []:
        if row["op"] == second_order.OP:
            names = ("machine", "device", "torch", "threads", "mode", "r", "variant")
            found[tuple(row[name] for name in names)] = row
    return list(found.values())


def run(record: Record) -> None:
    ranks = list(networks.RANKS[:1] if record.quick else networks.RANKS)
    lines = [] if record.quick else recorded()
    if lines:
        record.adopt(
            [
                {"settings": {"mode": row["mode"], "variant": row["variant"], "r": row["r"]},
                 "seconds": 0.0, **row}
                for row in lines
            ]
        )  # fmt: skip
    else:
        own = list(networks.DIMS)[: 1 if record.quick else None]
        work = [{"network": name, "ranks": ranks, "tiny": record.quick} for name in own]
        cells = record.cells(work, score_times)
        here: dict[str, str] = {"machine": "this machine", "device": "", "torch": ""}
        lines = [here | row for cell in cells for row in cell]
    record.text(
        f"The second-order score at {networks.BATCH} points: the learned head, as diagonal and "
        "factor (`structured`) or as D x D matrices (`assembled`), against automatic "
        "differentiation of the score network, row by row as in the paper or vectorised. "
        f"{second_order.RUNS} interleaved runs. MLP: D = 100, U-Net: D = 784. Of the U-Net's "
        "Jacobians 28 rows are computed and scaled to all. The paper's times are of a TITAN Xp, "
        "ours of the machine in the title: compare the ratios."
    )
    places = dict.fromkeys((row["machine"], row["device"], row["torch"]) for row in lines)
    figure, axes = panels(1, 2, 2.4)
    for place in places:
        own = [row for row in lines if (row["machine"], row["device"], row["torch"]) == place]
        for network, axis in zip(PAPER, axes.flat, strict=True):
            _network(record, network, own, place, axis if place == next(iter(places)) else None)
    record.figure(
        figure,
        "Milliseconds of the second-order score by rank; dashed: the paper's. Grey: automatic "
        "differentiation, row by row and the best of the others.",
    )
    record.rows(lines)
    record.close("Table 2: time of the second-order score")


def _network(
    record: Record,
    network: str,
    lines: list[dict[str, str]],
    place: tuple[str, str, str],
    axis: Any,
) -> None:
    """The table of a network on a machine, its lines of the first page, and its panel."""
    times: dict[str, dict[tuple[str, int], float]] = {"Hessian": {}, "diagonal": {}}
    for row in lines:
        name, _, question = row["mode"].partition(" ")
        if name == network and question in times:
            variant = row["variant"].split(", r ")[0]
            times[question][variant, int(row["r"])] = float(row["us_p50"]) / 1e3
    printed = PAPER[network]
    table = []
    for question, found in times.items():
        rivals = {
            name: time
            for (name, rank), time in found.items()
            if not rank and not name.endswith("whole run")
        }
        if not rivals:
            continue
        best = min(rivals, key=rivals.__getitem__)
        for (name, rank), time in found.items():
            line: dict[str, Any] = {
                "question": question, "variant": name, "r": rank or "", "ms": f"{time:,.4g}",
            }  # fmt: skip
            if rank:
                over = f"{rivals[best] / time:,.4g}x ({best})"
                line["over the row loop"] = f"{rivals[_RUN] / time:,.4g}x" if _RUN in rivals else ""
                line["over the best rival"] = over
            ours = rank if name == "hos_ext structured" else None
            if question == "Hessian" and (ours or name == _RUN):
                theirs = printed.get(ours)
                if theirs is not None:
                    line["paper, ms"] = f"{theirs:,.4g}"
                    autodiff = printed[None]
                    line["paper, over autodiff"] = f"{autodiff / theirs:.3g}x" if ours else ""
            table.append(line)
        if question == "Hessian" and _RUN in rivals:
            for (name, rank), time in found.items():
                if name == "hos_ext structured" and rank == 20:
                    record.compare(
                        f"{network}, rank 20: autodiff over the head ({', '.join(place[:2])})",
                        f"{printed[None] / printed[20]:.0f}x",
                        f"{rivals[_RUN] / time:,.0f}x, over the best rival "
                        f"{rivals[best] / time:,.0f}x",
                    )
    if not table:
        return
    keys = {key: "" for line in table for key in line}
    record.table(f"{network}, {', '.join(filter(None, place))}", [keys | line for line in table])
    if axis is None:
        return
    found = times["Hessian"]
    for name, colour in (("hos_ext structured", BLUE), ("hos_ext assembled", ORANGE)):
        points = sorted((rank, time) for (n, rank), time in found.items() if n == name)
        if points:
            axis.loglog(*zip(*points, strict=True), ".-", color=colour, label=name)
    ranks = [rank for rank in printed if rank is not None]
    axis.loglog(ranks, [printed[r] for r in ranks], "--", color=BLUE, linewidth=0.8,
                label="the paper's")  # fmt: skip
    axis.axhline(printed[None], color=GREY, linestyle="--", linewidth=0.8)
    for (name, rank), time in found.items():
        if not rank and (name == _RUN or time == min(t for (_, r), t in found.items() if not r)):
            axis.axhline(time, color=GREY, linewidth=0.8)
    axis.set_title(network, fontsize=8)
    axis.set_xlabel("rank", fontsize=7)
    axis.set_ylabel("ms", fontsize=7)
    axis.legend(fontsize=5)
