"""`hos-ext resume`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ...checks import check
from .. import runs
from .common import DryRun
from .errors import checking
from .train import say_finished, work


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
    steps: Annotated[
        int | None,
        typer.Option(
            help="More than before: only where the run has --decay constant. A cosine brings "
            "the learning rate to zero at the last step."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda or cuda:N. Default: as before."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Go on with a run that was stopped or killed, from its last whole checkpoint.

    Example:

      hos-ext resume runs/mnist

    On one CPU process it ends with the weights that an uninterrupted run would have. A
    checkpoint that is damaged is passed over, and said so.
    """
    with checking():
        options = runs.read_run(folder)["options"]
        planned = options["steps"]
        more = steps is not None and steps > planned and options["decay"] == "constant"
        check(
            "resume",
            more or steps in (None, planned),
            f"--steps must be {planned}, as before, unless the run has --decay constant and gets "
            f"more of them (for another run: hos-ext train --config {folder / 'run.json'} "
            f"--steps {steps} --out NEW)",
            steps,
        )
        if runs.finished(folder) and not more:
            return say_finished(folder)
        changed: dict[str, Any] = {"steps": steps} if more else {}
        changed |= {} if device is None else {"device": device}
        job = runs.prepare(options | changed, folder, resume=True, make=not dry_run)
    work(job, dry_run=dry_run)
