"""Figures of the recorded rows: bars of ratios, lines of growth with their floors, Table 2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from . import goals, growth
from .rows import Row, Shape

COLOURS = {
    "hos_ext": "#0072b2",
    "eager": "#e69f00",
    "compiled": "#d55e00",
    "lean": "#b0b0b0",
    "lean compiled": "#707070",
    "dense": "#cc79a7",
}
Case = tuple[str, str, Shape]


def write(rows: Sequence[Row], out: Path) -> dict[str, str]:
    """Writes what the rows allow; file name -> title."""
    made = {
        "ratios.png": ("Time over that of hos_ext", ratios(rows)),
        "growth.png": ("Growth of the loss in B, D and r", lines(rows)),
        "second_order.png": ("Second-order score at a batch of points", second_order(rows)),
    }
    for name, (_, figure) in made.items():
        if figure is not None:
            FigureCanvasAgg(figure).print_png(out / name)
    return {name: title for name, (title, figure) in made.items() if figure is not None}


def _cases(rows: Iterable[Row]) -> dict[Case, dict[str, float]]:
    """The medians of the cases that have goals, at two threads."""
    wanted = {goal[:3] for goal in goals.GOALS if goal.at_least is not None}
    found: dict[Case, dict[str, float]] = {}
    for row in rows:
        shape = (int(row["B"]), int(row["D"]), int(row["r"]))
        case = (row["op"], row["mode"], shape)
        if case in wanted and row["us_p50"]:
            found.setdefault(case, {})[row["variant"]] = float(row["us_p50"])
    return {c: v for c, v in found.items() if "hos_ext" in v and len(v) > 1}


def ratios(rows: Sequence[Row]) -> Figure | None:
    """For each case a bar for each rival; a tick where its goal is."""
    cases = _cases(rows)
    if not cases:
        return None
    bars = [(c, name) for c, values in cases.items() for name in values if name in COLOURS]
    bars = [(c, name) for c, name in bars if name != "hos_ext"]
    others = [(c, n) for c, v in cases.items() for n in v if n.startswith(("bmm", "baddbmm"))]
    bars = [bar for bar in bars + others if bar[0] in cases]
    bars.sort(key=lambda bar: list(cases).index(bar[0]))
    aims = {
        (goal[:3], name): goal.at_least
        for goal in goals.GOALS
        for name in goal.against
        if goal.own == "hos_ext"
    }
    figure = Figure(figsize=(9, 1 + 0.19 * len(bars)), layout="constrained")
    ax = figure.add_subplot()
    labels, before = [], None
    for place, (case, name) in enumerate(bars):
        ratio = cases[case][name] / cases[case]["hos_ext"]
        ax.barh(place, ratio, color=COLOURS.get(name, "#999999"), height=0.8)
        aim = aims.get((case, name))
        if aim is not None:
            ax.plot([aim, aim], [place - 0.45, place + 0.45], color="black", linewidth=1.5)
        op, mode, shape = case
        shown = f"{op} {mode} {shape}  " if case != before else ""
        labels.append(f"{shown}{name}")
        before = case
    ax.set_yticks(range(len(bars)), labels, fontsize=6)
    ax.set_xscale("log")
    ax.axvline(1, color="black", linewidth=0.8)
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ax.set_xlabel("time over that of hos_ext (black ticks: goals)")
    return figure


def lines(rows: Sequence[Row]) -> Figure | None:
    """Time and memory over B, D and r; dashed the floor; dotted the end of the dense form."""
    keys = {"us_p50": "microseconds", "peak_mib": "peak MiB"}
    found = {
        (key, axis, variant): growth.points(rows, axis, variant, key)
        for key in keys
        for axis in growth.LINES
        for variant in ("hos_ext", "eager", "dense")
    }
    if not any(len(points) > 1 for points in found.values()):
        return None
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(len(keys), len(growth.LINES), squeeze=False)
    for down, (key, unit) in enumerate(keys.items()):
        for across, axis in enumerate(growth.LINES):
            ax = panels[down][across]
            for variant in ("hos_ext", "eager", "dense"):
                points = found[key, axis, variant]
                if points:
                    ax.plot(list(points), list(points.values()), "o-", markersize=3,
                            color=COLOURS[variant], label=variant)  # fmt: skip
            own = found["us_p50", axis, "hos_ext"]
            share = growth.points(rows, axis, "hos_ext", "share_of_floor")
            if key == "us_p50" and share:
                floor = {size: own[size] * share[size] for size in share if size in own}
                ax.plot(list(floor), list(floor.values()), "--", color="black", label="floor")
            if found[key, axis, "dense"] and growth.dense_end(axis) < 1e9:
                ax.axvline(growth.dense_end(axis), linestyle=":", color=COLOURS["dense"],
                           label="dense: memory limit")  # fmt: skip
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.xaxis.set_minor_formatter(NullFormatter())  # they run into one another
            ax.set_xlabel(axis)
            ax.set_ylabel(unit)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize=7, frameon=False)
    return figure


def second_order(rows: Sequence[Row]) -> Figure | None:
    """Our head over its rank; level lines for automatic differentiation."""
    kept = [r for r in rows if r["op"] == "second_order_score" and r["us_p50"]]
    networks = [n for n in ("MLP", "UNet") if any(r["mode"] == f"{n} Hessian" for r in kept)]
    if not networks:
        return None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for ax, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks,
                           strict=True):  # fmt: skip
        own: dict[str, dict[int, float]] = {}
        rivals: dict[str, float] = {}
        for row in kept:
            if row["mode"] != f"{network} Hessian":
                continue
            name, value = row["variant"], float(row["us_p50"]) / 1e3
            if name.startswith("hos_ext"):
                own.setdefault(name.split(",")[0], {})[int(row["r"])] = value
            elif not name.endswith("whole run"):
                rivals[name] = value
        for name, points in own.items():
            style = "o-" if "structured" in name else "s--"
            ax.plot(list(points), list(points.values()), style, color=COLOURS["hos_ext"],
                    markersize=4, label=name)  # fmt: skip
        palette = ("#d55e00", "#e69f00", "#cc79a7", "#999999", "#009e73")
        for place, (name, value) in enumerate(rivals.items()):
            ax.axhline(value, color=palette[place % len(palette)], label=name)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("rank of the head")
        ax.set_ylabel("ms")
        ax.set_title(network)
        ax.legend(
            fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3
        )
    return figure
