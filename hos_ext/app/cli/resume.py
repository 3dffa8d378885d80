"""`hos-ext resume`."""

from pathlib import Path
from typing import Annotated

import typer

from .. import runs
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
        if steps is not None and steps != planned and not more:
            raise ValueError(
                f"resume: --steps must be {planned}, as before, unless the run has --decay "
                f"constant and gets more of them (for another run: hos-ext train --config "
                f"{folder / 'run.json'} --steps {steps} --out NEW), got {steps}"
            )
        if runs.finished(folder) and not more:
            return say_finished(folder)
        job = runs.prepare(options | ({"steps": steps} if more else {}), folder, resume=True)
    work(job)
