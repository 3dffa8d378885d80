"""What several commands share: their options, the noise level, the terminal."""

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...checks import check, require
from ..options import FOLDER
from .output import talks

if TYPE_CHECKING:
    from rich.console import Console

NOISE = "Noise"  # a panel of --help

RunFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="A run folder, the model folder of a run, or user/name of the hub."
    ),
]
Sigma = Annotated[
    float | None,
    typer.Option(
        help="Noise level, data units (8-bit pixels: [-1, 1]). Default: 0.4, or the nearest "
        "one trained; files need one.",
        rich_help_panel=NOISE,
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Of every random choice of this command.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Where the data of the run lie now, such as npy:PATH, if they have moved.",
        rich_help_panel=FOLDER,
    ),
]
TestData = Annotated[
    str | None,
    typer.Option("--test-data", help="Likewise of the test set.", rich_help_panel=FOLDER),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder to write to. Default: the run folder.", rich_help_panel=FOLDER),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what is there.", rich_help_panel=FOLDER)
]
AllowDivergence = Annotated[
    bool,
    typer.Option(
        "--allow-divergence",
        help="Write the files of chains or samples that ran away too, with a warning.",
        rich_help_panel=FOLDER,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout and nothing else, for programs.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything, say what would be done, and write nothing.",
        rich_help_panel=FOLDER,
    ),
]


def noise_level(
    command: str,
    facts: Mapping[str, Any],
    sigma: float | None,
    *,
    raw_sigma: float | None = None,
    scale: float = 1.0,
) -> float:
    """The noise level in data units, within the range trained.

    Args:
        command: whose option it is, for errors.
        facts: of the run.
        sigma: in data units; None is 0.4, or the nearest level trained.
        raw_sigma: in raw units, instead.
        scale: raw units in one data unit.

    Returns:
        A level in the range trained; near an end it is that end.

    Raises:
        ValueError: both are given, or the level is outside of the range trained.
    """
    if raw_sigma is not None:
        check(command, sigma is None, "--raw-sigma must come without --sigma", "both")
        sigma = raw_sigma / scale
    low, high = facts["options"]["sigma"]
    level = min(max(0.4, low), high) if sigma is None else sigma
    for end in (low, high):
        if math.isclose(level, end):
            return float(end)
    name, unit = ("--sigma", 1.0) if raw_sigma is None else ("--raw-sigma", scale)
    rule = f"{name} must be in the range trained, {unit * low:g} to {unit * high:g}"
    check(command, low <= level <= high, rule, f"{unit * level:g}")
    return level


def default_levels(facts: Mapping[str, Any]) -> list[float]:
    """Three noise levels between the ends of the range trained."""
    low, high = facts["options"]["sigma"]
    wanted = [float(f"{low * (high / low) ** t:.3g}") for t in (0.25, 0.5, 0.75)]
    wanted = [min(max(level, low), high) for level in wanted]  # rounding may leave them
    return [noise_level("evaluate", facts, level) for level in dict.fromkeys(wanted)]


def check_available(command: str, option: str, count: int, available: int) -> None:
    """A count of held-out samples, at most those that there are."""
    rule = f"{option} must be at most {available}, the held-out samples"
    check(command, count <= available, rule, count)


def available(command: str, option: str, count: int | None, usual: int, there: int) -> int:
    """How many held-out samples are taken: as asked for, or the usual number, or all there are."""
    if count is None:
        return min(usual, there)
    check_available(command, option, count, there)
    return count


def console(*, shown: bool = True) -> "Console":
    """The terminal: numbers are not coloured, lines not broken; with --quiet it is silent."""
    quiet = not (shown and talks())
    made: Console = require("cli", "rich.console").Console(
        highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=quiet
    )
    return made


def place_of(command: str, folder: Path, out: Path | None) -> Path:
    """The folder that a command writes to: --out, or that of the run."""
    rule = f"--out must be given where RUN is no folder ({folder} is a model of the hub)"
    check(command, out is not None or folder.is_dir(), rule, "none")
    return out or folder


def program() -> str:
    """How the reader calls this command again: a path if the shell would not find the name."""
    called = Path(sys.argv[0])
    here = os.path.relpath(called)
    local = called.name == "hos-ext" and os.sep in here and not here.startswith(os.pardir)
    return here if local else "hos-ext"
