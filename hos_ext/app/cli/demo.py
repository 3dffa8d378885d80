"""`hos-ext demo`."""

from pathlib import Path
from typing import Annotated

import typer

from .. import demo as demonstration
from ..options import OPTIONS
from .common import Device, Force, Seed, console, program
from .errors import checking
from .output import talks


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("demo"),
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = OPTIONS["steps"].default,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only, to see that it runs.")
    ] = False,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Train on real digits, denoise with uncertainty, check it, sample; write a report.

    Examples:

      hos-ext demo

      hos-ext demo --quick --out demo-quick

    Writes report.html, its figures and metrics.json, and the run itself to OUT/run.
    """
    with checking():
        job = demonstration.prepare(
            out, seed=seed, steps=steps, quick=quick, device=device, force=force
        )
    terminal = console()
    demonstration.run_demo(
        job, out, program=program(), quick=quick, console=terminal, progress=talks()
    )
