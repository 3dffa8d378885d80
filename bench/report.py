"""The recorded rows as tables and plots: `python -m bench.report`, or make bench-report.

Writes report.md beside the rows, and the figures of `plots` for the machine of the last row. For
each operator a table, a line for each size and a column for each variant: microseconds (or MiB),
and for the others the ratio to hos_ext. Of rows alike but for date and commit the last one counts.

--archive first moves the rows that later ones replace to history.csv, and writes the table of
docs/speed.md anew from those that are left.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import goals, growth, networks, plots, speed_page
from .rows import RESULTS, Row, archive, read

PLACE = ("machine", "device", "torch", "threads")
CASE = ("mode", "dtype", "B", "D", "r")
UNITS = {"us_p50": "microseconds (median)", "peak_mib": "peak extra memory, MiB"}
# With tables of their own.
WHOLE = ("second_order_score", "training_step", "sampling_step")


def render(rows: Sequence[Row]) -> str:
    """Markdown: for each machine and number of threads the tables that its rows allow."""
    blocks = []
    for place in dict.fromkeys(tuple(row[key] for key in PLACE) for row in rows):
        here = [row for row in rows if tuple(row[key] for key in PLACE) == place]
        machine, device, version, threads = place
        commits = dict.fromkeys(
            f"{row['date']} {row['commit']}{' (dirty)' * (row['dirty'] == 'True')}" for row in here
        )
        title = f"## {machine} ({device}), {threads} threads, torch {version}"
        blocks.append(f"{title}\n\n{', '.join(commits)}")
        blocks += [_goals(here), *_operators(here), _growth(here), _floors(here)]
        blocks += [_second_order(here), _steps(here)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def medians(rows: Iterable[Row], key: str = "us_p50") -> dict[tuple[str, ...], dict[str, float]]:
    """For each (op, mode, dtype, B, D, r) the last value of each variant."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row[key]:
            case = (row["op"], *(row[name] for name in CASE))
            found.setdefault(case, {})[row["variant"]] = float(row[key])
    return found


def table(header: Sequence[str], lines: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Markdown, the first `left` columns aligned to the left."""
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, marks, *lines))


def verdicts(rows: Sequence[Row]) -> list[goals.Verdict]:
    """Every goal of that device with what the recorded medians say of it."""
    found = medians(rows)
    wanted = goals.GOALS if all(row["device"] == "cpu" for row in rows) else goals.GPU_GOALS
    judged = {}
    for (op, mode, dtype, *sizes), values in found.items():
        if dtype == "float32":
            batch, size, rank = map(int, sizes)
            for verdict in goals.judge(op, mode, (batch, size, rank), values, among=wanted):
                judged[verdict.goal] = verdict
    return [judged.get(goal, goals.Verdict(goal, None)) for goal in wanted]


def _goals(rows: Sequence[Row]) -> str:
    judged = verdicts(rows)
    if all(verdict.figure is None for verdict in judged):
        return ""
    lines = []
    for verdict in judged:
        shown = "not measured" if verdict.figure is None else f"{verdict.figure:.3g}"
        mark = {None: "", True: "yes", False: "no"}[verdict.reached]
        lines.append([verdict.goal.describe(), shown, verdict.goal.bound(), mark])
    return "Goals.\n\n" + table(["case", "measured", "goal", "reached"], lines)


def _operators(rows: Sequence[Row]) -> list[str]:
    blocks = []
    for op in dict.fromkeys(row["op"] for row in rows if row["op"] not in WHOLE):
        for key, unit in UNITS.items():
            cases = {c: v for c, v in medians(rows, key).items() if c[0] == op}
            if not cases:
                continue
            variants = list(dict.fromkeys(name for values in cases.values() for name in values))
            lines = [
                [*case[1:], *(_cell(name, values) for name in variants)]
                for case, values in cases.items()
            ]
            heading = f"{op}: {unit}; in brackets over that of hos_ext."
            blocks.append(f"{heading}\n\n{table([*CASE, *variants], lines, left=len(CASE))}")
    return blocks


def _cell(variant: str, values: Mapping[str, float]) -> str:
    if variant not in values:
        return ""
    value = f"{values[variant]:,.1f}"
    if variant == "hos_ext" or "hos_ext" not in values:
        return value
    return f"{value} ({values[variant] / values['hos_ext']:.3g}x)"


def _floors(rows: Sequence[Row]) -> str:
    """GB/s, and the share of the floor: 1 where nothing is left to gain."""
    lines = {
        tuple(row[k] for k in ("op", *CASE)): [f"{float(row['gbps']):.3g}",
                                               f"{float(row['share_of_floor']):.0%}"]
        for row in rows
        if row["variant"] == "hos_ext" and row["share_of_floor"]
    }  # fmt: skip
    if not lines:
        return ""
    cells = [[*case, *values] for case, values in lines.items()]
    header = ["op", *CASE, "GB/s", "share of the floor"]
    return "hos_ext beside its floor.\n\n" + table(header, cells, left=len(CASE) + 1)


def _growth(rows: Sequence[Row]) -> str:
    fits = growth.exponents(rows)
    if not fits:
        return ""
    lines = [
        [f.variant, "time" if f.key == "us_p50" else "memory", f.axis, str(f.low), str(f.high),
         f"{f.value:.2f}"]
        for f in fits
    ]  # fmt: skip
    header = ["variant", "of", "in", "from", "to", "exponent"]
    limit = growth.cases.MEMORY_LIMIT / 2**30
    return (
        f"Growth of d2sm_vr_loss, forward and backward: value ~ size^exponent. The dense line ends "
        f"at {limit:g} GiB: D = {growth.dense_end('D'):,.0f} for one sample.\n\n"
    ) + table(header, lines, left=3)


def _last(rows: Iterable[Row], op: str) -> dict[tuple[str, str, str], Row]:
    """The last values of (mode, r, variant): times and memory from one row or from two."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row["op"] == op:
            key = (row["mode"], row["r"], row["variant"])
            found[key] = found.get(key, {}) | {k: v for k, v in row.items() if v}
    return found


def _second_order(rows: Sequence[Row]) -> str:
    """The paper's Table 2, extended: over the strongest rival, and over the row loop."""
    found = _last(rows, "second_order_score")
    if not found:
        return ""
    lines = []
    for (mode, rank, variant), row in found.items():
        if mode.endswith("score"):
            continue
        rivals = {
            name: float(r["us_p50"])
            for (m, _, name), r in found.items()
            if m == mode and not name.startswith("hos_ext") and not name.endswith("whole run")
        }
        own, cells = float(row["us_p50"]), ["", ""]
        if variant.startswith("hos_ext") and rivals:
            best = min(rivals, key=rivals.__getitem__)
            cells[0] = f"{rivals[best] / own:,.4g}x ({best})"
            cells[1] = f"{rivals['row loop'] / own:,.4g}x" if "row loop" in rivals else ""
        mean, peak = f"{float(row['us_mean']) / 1e3:,.4g}", row.get("peak_mib", "")
        peak = f"{float(peak):,.1f}" if peak else ""
        name = variant.split(",")[0] if variant.startswith("hos_ext") else variant
        shown_rank = rank if variant.startswith("hos_ext") else ""
        lines.append([mode, name, shown_rank, mean, f"{own / 1e3:,.4g}", peak, *cells])
    header = ["question", "variant", "r", "mean, ms", "median, ms", "peak MiB",
              "over the strongest", "over the row loop"]  # fmt: skip
    return (
        f"Second-order score at {networks.BATCH} points (the paper's Table 2, extended); seven "
        "runs.\n\n"
    ) + table(header, lines, left=2)


def _steps(rows: Sequence[Row]) -> str:
    """Training and sampling steps: dense over ours, and what of a step is the loss."""
    blocks = []
    training, sampling = _last(rows, "training_step"), _last(rows, "sampling_step")
    for title, found, base in (
        ("Training steps", training, "hos_ext"),
        ("Sampling steps", sampling, "network"),
    ):
        if not found:
            continue
        lines = []
        for (network, rank, variant), row in found.items():
            own = float(row["us_p50"])
            whole = (network, rank, variant.removesuffix(" loss"))
            share = ""
            if variant.endswith(" loss") and whole in found:
                share = f"{own / float(found[whole]['us_p50']):.1%}"
            over = ""
            if (network, rank, base) in found and not variant.endswith(" loss"):
                over = f"{own / float(found[network, rank, base]['us_p50']):,.3g}x"
            peak = f"{float(row['peak_mib']):,.1f}" if "peak_mib" in row else ""
            lines.append([network, rank, variant, f"{own / 1e3:,.4g}", over, share, peak])
        header = ["network", "r", "variant", "ms", f"over {base}", "share of the step", "peak MiB"]
        blocks.append(f"{title}, D = 784, batch 40.\n\n{table(header, lines, left=3)}")
    return "\n\n".join(blocks)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="?", type=Path, default=RESULTS / "cpu.csv")
    parser.add_argument("--out", type=Path, help="folder of report.md and the figures")
    parser.add_argument("--archive", action="store_true", help="move older rows, write the page")
    options = parser.parse_args(arguments)
    if options.archive and options.rows.exists():
        print(f"{archive(options.rows)} rows moved to history.csv")
    rows = read(options.rows) if options.rows.exists() else []
    if not rows:
        parser.error(f"no rows in {options.rows}: run make bench first")
    out = options.out or options.rows.parent
    out.mkdir(parents=True, exist_ok=True)
    place = [rows[-1][key] for key in PLACE]
    figures = plots.write([row for row in rows if [row[key] for key in PLACE] == place], out)
    images = "\n\n".join(f"![{title}]({name})" for name, title in figures.items())
    text = f"# Measurements\n\n{render(rows)}" + (f"\n{images}\n" if images else "")
    (out / "report.md").write_text(text)
    if options.archive:
        speed_page.write(medians([row for row in rows if [row[key] for key in PLACE] == place]))
    print(render(rows), end="")
    print(f"{out / 'report.md'}, {', '.join(figures) or 'no figures'}")


if __name__ == "__main__":
    main()
