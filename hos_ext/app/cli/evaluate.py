"""`hos-ext evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ... import storage
from ...checks import require
from .. import evaluation, results, runs
from .common import (
    NOISE,
    Data,
    Device,
    DryRun,
    Force,
    Json,
    Out,
    RunFolder,
    Seed,
    TestData,
    console,
    default_levels,
    noise_level,
    place_of,
)
from .conditions import Condition, chosen_class, of_class
from .errors import checking

# Columns of the printed table: heading, and name of the figure.
_COLUMNS = {
    "sigma": "sigma",
    "error noisy": "mse_noisy",
    "denoised": "mse_denoised",
    "Mahalanobis": "mahalanobis",
    "predictive": "predictive",
    "recalibrated": "predictive_recalibrated",
}


def evaluate(
    folder: RunFolder,
    sigma: Annotated[
        str | None,
        typer.Option(
            help="Levels such as 0.2,0.4,0.8, data units. Default: three of those trained.",
            rich_help_panel=NOISE,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Held-out samples. Default: all.")
    ] = None,
    condition: Condition = None,
    seed: Seed = 0,
    device: Device = "auto",
    data: Data = None,
    test_data: TestData = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Check on held-out samples whether the uncertainty is calibrated; print and write it.

    Examples:

      hos-ext evaluate runs/mnist

      hos-ext evaluate runs/mnist --sigma 0.3 --limit 200

    A figure of 1 is calibrated; above, errors are larger than the covariance says. Writes
    evaluate.json, calibration.png and uncertainty.png (the covariance at each level, its
    eigenvectors); for density: data also the errors of both scores against the exact ones.
    """
    with checking():
        model, facts = runs.load_run(folder, device=device)
        place = place_of("evaluate", folder, out)
        levels = _levels(facts, sigma)
        results.refuse_existing("evaluate", place, results.EVALUATE_FILES, force=force)
        storage.check_writable(place, make=not dry_run)
        chosen_class("evaluate", facts, condition)
        source = of_class("evaluate", runs.open_data(facts, data, test_data), facts, condition)
    if dry_run:
        return _say_plan(place, levels, min(limit or len(source.test), len(source.test)), as_json)
    report = evaluation.evaluate(
        model, source, levels, recalibration=facts["recalibration"], seed=seed, limit=limit
    )
    pictures = results.evaluated(model, source, levels, report, seed=seed)
    results.write(place, {"evaluate.json": runs.json_text(report).encode(), **pictures})
    if as_json:
        print(runs.json_text(report), end="")
    terminal = console(shown=not as_json)
    terminal.print(_table(report))
    for row in report["levels"]:
        if row["conformal"] is not None:
            terminal.print(_regions(row))
    for row in report["accuracy"] or []:
        terminal.print(
            f"sigma {row['sigma']:g}: relative squared error of s1 {row['s1_relative']:.3g}, "
            f"of the diagonal of s2 {row['s2_diag_relative']:.3g}"
        )
    terminal.print(f"wrote {', '.join(results.EVALUATE_FILES)} to {place}")


def _say_plan(place: Path, levels: list[float], count: int, as_json: bool) -> None:
    """What a --dry-run says."""
    if as_json:
        plan = {"n": count, "sigma": levels, "out": str(place), "files": results.EVALUATE_FILES}
        print(runs.json_text(plan), end="")
    at = ", ".join(f"{level:g}" for level in levels)
    console(shown=not as_json).print(
        f"dry run: would evaluate {count} held-out samples at sigma {at} and write "
        f"{', '.join(results.EVALUATE_FILES)} to {place}"
    )


def _levels(facts: Mapping[str, Any], typed: str | None) -> list[float]:
    """The noise levels typed, or three between the ends of the range trained."""
    if typed is None:
        return default_levels(facts)
    try:
        wanted = [float(word) for word in typed.split(",")]
    except ValueError:
        raise ValueError(f"evaluate: --sigma must be numbers with commas, got {typed}") from None
    return [noise_level("evaluate", facts, level) for level in dict.fromkeys(wanted)]


def _regions(row: Mapping[str, Any]) -> str:
    """How often regions of guaranteed coverage held the truth at one level."""
    found = row["conformal"]
    simultaneous, share = found["simultaneous"], found["share"]
    return (
        f"sigma {row['sigma']:g}: conformal regions at {found['level']:.0%} held all entries at "
        f"once in {simultaneous['covered']:.1%} of the samples (Gaussian intervals "
        f"{simultaneous['covered_gaussian']:.1%}), {share['covered']:.1%} had at least "
        f"{found['least_share']:.0%} of their entries inside ({share['covered_gaussian']:.1%})"
    )


def _table(report: Mapping[str, Any]) -> Any:
    """The figures of each level, for the terminal."""
    table = require("cli", "rich.table").Table(title=f"{report['n']} held-out samples")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in report["levels"]:
        shown = (row[key] for key in _COLUMNS.values())
        table.add_row(*("-" if value is None else f"{value:.4g}" for value in shown))
    return table
