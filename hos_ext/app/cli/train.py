"""`hos-ext train`."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ...checks import check
from .. import runs, training
from ..options import FOLDER, OPTIONS, Option, read_config, training_options
from .common import DryRun, Force, console, program
from .errors import checking
from .output import talks


def _takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Puts `options.OPTIONS` before the parameters of a command, each None unless it is typed."""
    places = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=_typed(name, option),
        )
        for name, option in OPTIONS.items()
    ]
    own = inspect.signature(command).parameters.values()
    places += [each for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD]
    changed: Any = command
    changed.__signature__ = inspect.Signature(places)
    changed.__annotations__ = {place.name: place.annotation for place in places}
    return command


def _typed(name: str, option: Option) -> Any:
    """An option of a run as typer's annotation."""
    flag, default = "--" + name.replace("_", "-"), option.words
    if not default and option.kind is not bool:
        value = option.default if isinstance(option.default, list) else [option.default]
        default = ",".join(map(str, value))
    kind = str if option.kind is list else option.kind
    explained = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=option.help + (f" Default: {default}." if default else ""),
        rich_help_panel=option.panel,
        show_default=False,
    )
    return Annotated[kind | None, explained]


@_takes_options
def train(
    out: Annotated[
        Path | None,
        typer.Option(help="Default: runs/NAME, after the data.", rich_help_panel=FOLDER),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Options from .yaml, .toml, .json or a run.json; what is typed here wins.",
            rich_help_panel=FOLDER,
        ),
    ] = None,
    go_on: Annotated[
        bool,
        typer.Option(
            "--continue",
            help="Go on where the run in --out stopped, if there is one with these options.",
            rich_help_panel=FOLDER,
        ),
    ] = False,
    force: Force = False,
    dry_run: DryRun = False,
    **typed: Any,
) -> None:
    """Train a second-order score model: score, and covariance of what noise hid.

    Examples:

      hos-ext train --data parquet:mnist/train.parquet --out runs/mnist

      hos-ext train --data folder:photos --model unet --diagonal --sigma 0.1,1

      torchrun --nproc-per-node 2 -m hos_ext.app.cli train --data npy:signals.npy

    Writes run.json (every option), checkpoints, TensorBoard logs, training.png, metrics.json
    and model/. Stopped or killed, it goes on by hos-ext resume RUN.
    """
    with checking():
        given = {} if config is None else read_config(config)
        given |= {name: value for name, value in typed.items() if value is not None}
        folder = out or Path(given.get("out") or default_out(given))
        hosts = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        rule = (
            "--force on several hosts must come with a --rdzv-id of this launch alone (a host that "
            "comes or goes starts all again, and the run would be replaced once more)"
        )
        check("train", not force or hosts == 1 or runs.launch_name(), rule, "none")
        again = runs.begun_by_launch(folder)
        job = runs.prepare(
            given, folder, force=force and not again, resume=go_on or again, make=not dry_run
        )
    if job.resume and runs.finished(folder, job.options["steps"]):
        say_finished(folder)
    else:
        work(job, dry_run=dry_run)


def default_out(given: Mapping[str, Any]) -> str:
    """runs/ and a name after the data: runs/mnist for parquet:.../mnist/train.parquet."""
    path = Path(str(given.get("data", OPTIONS["data"].default)).partition(":")[2] or "digits")
    stem = path.stem if path.stem not in ("train", "data") else path.absolute().parent.name
    return "runs/" + "".join(c if c.isalnum() or c in "-_" else "-" for c in stem)


def say_finished(folder: Path) -> None:
    """Says that a run has nothing left to do."""
    steps = runs.read_run(folder)["options"]["steps"]
    console().print(f"{folder} is finished: {steps} steps. Nothing to do.")


def _scales(known: Mapping[str, Any]) -> str:
    """How floating data come to data units, in words."""
    scaling = known["scaling"]
    if scaling["levels"]:
        return f"\n{scaling['levels']} levels, brought to [-1, 1]"
    if isinstance(scaling["mean"], list):
        each = zip(known["columns"], scaling["mean"], scaling["std"], strict=True)
        listed = ", ".join(f"{name} {mean:g} +- {std:g}" for name, mean, std in each)
        return f"\nstandardised by mean and standard deviation of each column: {listed}"
    return f"\nstandardised by mean {scaling['mean']:g}, standard deviation {scaling['std']:g}"


def work(job: runs.Run, *, dry_run: bool = False) -> None:
    """Trains what `runs.prepare` has checked, and says what goes in and what came out."""
    terminal, known = console(), job.facts["data"]
    if training.is_main():
        terminal.print(
            f"{known['spec']}: {known['n_train'] or 'a stream of'} samples of shape "
            f"{tuple(known['shape'])} to train on, {known['n_validation']} to tune on, "
            f"{known['n_test']} to report on{_scales(known)}\n"
            f"{job.options['model']}, rank {job.options['rank']}, "
            f"{job.facts['parameters']:,} parameters; {job.options['steps']} steps; to {job.out}"
        )
    if dry_run:
        return _say_plan(job)
    figures = runs.fit(job, progress=talks())
    if not figures:
        return
    terminal.print(
        f"{figures['steps']} steps in {figures['seconds']:.0f} s, validation error "
        f"{figures['validation_error']:.3f} sigma^2, recalibration factor "
        f"{figures['recalibration']:.3f}"
    )
    terminal.print(f"next: {program()} denoise {job.out}")


def _say_plan(job: runs.Run) -> None:
    """What a --dry-run adds: how much memory a step takes, and what would be written."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = training_options(job.options)
    memory = training.estimate_memory(job.model, job.source, chosen, processes=processes)
    if not training.is_main():
        return
    saved = -(-chosen.steps // chosen.save_every)
    held, needed = (f"{count / 2**20:.1f} MiB" for count in memory[:2])
    console().print(
        f"dry run: each process would hold about {held} of weights, their average, gradients and "
        f"moments, and {needed} of activations "
        f"for {memory.rows} samples at a time\nwould write {', '.join(runs.PARTS)} to {job.out}, a "
        f"checkpoint every {chosen.save_every} steps ({saved} in all, the last {chosen.keep} kept)"
    )
