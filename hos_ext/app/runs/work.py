"""The work of a run: `prepare` does every check and no work, `fit` the work."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ... import storage
from ...checks import check
from ...nn import files as pretrained
from .. import data, evaluation, plots, training
from ..options import FORMAT, build_model, complete, training_options
from .facts import alike, describe, launch_name, read_run, refuse_changes, versions, write_json

# What a run leaves in its folder.
PARTS = ("run.json", "checkpoints", "logs", "model", "training.png", "metrics.json")


class Run(NamedTuple):
    """A run that has passed every check: where, with what, and whether it goes on from there."""

    out: Path
    options: dict[str, Any]
    source: data.Source
    model: nn.Module
    facts: dict[str, Any]
    resume: bool


def prepare(
    given: Mapping[str, Any],
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    make: bool = True,
) -> Run:
    """Checks everything that can be checked before the work; writes nothing but the folder.

    Args:
        given: options by name; those left out get their defaults.
        out: the run folder.
        force: a run that is there may be replaced.
        resume: a run that is there is continued; its options must be these, but for the device.
        make: the folder is made; else not even that is written.

    Raises:
        ValueError, TypeError, OSError: an option, the data or the folder will not do.
        RuntimeError: an extra is missing.
    """
    # Under torchrun the main process alone judges the folder: the others would see its files.
    there = holds_run(out) if training.is_main() else None
    rule = (
        f"out must hold no run (resume it by `hos-ext resume {out}` or --continue, replace it by "
        "--force)"
    )
    check("train", not there or resume or force, rule, f"{out} with {there}")
    # For convolutions it is on unless it is switched off.
    torch.backends.cudnn.allow_tf32 = bool(given.get("tf32"))
    torch.backends.cuda.matmul.allow_tf32 = bool(given.get("tf32"))
    options, source = complete(given)
    classes = None if source.labels is None else len(source.labels.names)
    model = build_model(options, source.shape, classes)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "options": options,
        "data": describe(source),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": versions(),
    }
    if name := launch_name():
        facts["launch"] = name
    if there and resume:
        stored = read_run(out)
        longer = options["decay"] == "constant" and options["steps"] > stored["options"]["steps"]
        same = {"steps": stored["options"]["steps"]} if longer else {}
        # How long a process waits changes no number, nor does where it runs but for rounding. A
        # run may be older than an option.
        same |= {name: stored["options"].get(name) for name in ("timeout", "device")}
        refuse_changes("options", stored["options"], options | same)
        refuse_changes("data", stored["data"], facts["data"])
    storage.check_writable(out, make=make)
    return Run(out, options, source, model, facts, resume)


def holds_run(out: Path) -> str | None:
    """The first part of a run that is in the folder."""
    return next((name for name in PARTS if (out / name).exists()), None)


def fit(run: Run, *, progress: bool = False) -> dict[str, Any]:
    """Trains, recalibrates, and writes the parts of the run; for a prepared run, on every rank.

    Until the new run has a checkpoint, a run that it replaces comes back when it fails.

    Returns:
        "train" of metrics.json on the main process, {} on the others.

    Raises:
        RuntimeError: what `training.train` raises.
        OSError: the disk.
    """
    main, start = training.is_main(), time.perf_counter()
    with _replacing(run) if main else nullcontext():
        trained = training.train(
            run.model,
            run.source,
            training_options(run.options),
            out=run.out,
            resume=run.resume,
            facts=run.facts,
            report=tracked(run.source, run.options),
            progress=progress and main,
        )
    return _finish(run, trained, time.perf_counter() - start) if main else {}


@contextmanager
def _replacing(run: Run) -> Iterator[None]:
    """Writes run.json; a run that it replaces comes back if there is no checkpoint at the end."""
    aside, path = run.out / ".replaced", run.out / "run.json"
    if not run.resume:
        _move_parts(run.out, aside)
    if not path.exists() or not alike(read_run(run.out)["options"], run.options):
        write_json(path, run.facts)
    try:
        yield
    except BaseException:
        if not run.resume and not training.list_checkpoints(run.out):
            _move_parts(run.out, None)
            _move_parts(aside, run.out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _finish(run: Run, trained: training.Trained, seconds: float) -> dict[str, Any]:
    """Recalibrates, and writes model/, training.png and, last, metrics.json."""
    options, size = run.options, math.prod(run.source.shape)
    low, high = options["sigma"]
    scale = evaluation.recalibrate(
        trained.model, run.source, sigma_range=(low, high), seed=options["seed"]
    )
    facts = run.facts | {"step": trained.step, "recalibration": scale}
    pretrained.save_model(trained.model, run.out / "model", run=facts)
    storage.write_whole(
        run.out / "training.png", plots.png(plots.training_figure(trained.history, size=size))
    )
    last = trained.history[-1]
    figures = {
        **{key: run.facts["data"][key] for key in ("n_train", "n_validation", "n_test")},
        "data": "scikit-learn digits, 8x8, dequantised"
        if options["data"] == "digits"
        else options["data"],
        "seed": options["seed"],
        "steps": trained.step,
        "batch_size": options["batch_size"],
        "rank": options["rank"],
        "parameters": run.facts["parameters"],
        "sigma_range": options["sigma"],
        "loss": last.loss,
        "loss_per_entry": last.loss / size,
        "validation_loss": last.validation,
        "validation_error": last.validation_first / size,
        "recalibration": scale,
        "seconds": seconds,
        "steps_per_second": (trained.step - trained.resumed_from) / seconds,
        "threads": torch.get_num_threads(),
    }
    history = [row._asdict() for row in trained.history]
    write_json(run.out / "metrics.json", {"train": figures, "history": history})
    return figures


def tracked(source: data.Source, options: Mapping[str, Any]) -> training.Reporter:
    """For a tracker: calibration on validation rows, and their uncertainty as a picture."""
    low, high = options["sigma"]
    count = min(64, len(source.validation))

    def report(model: nn.Module, step: int) -> tuple[dict[str, float], dict[str, Any]]:
        result = evaluation.denoise_held_out(
            model, source, (low * high) ** 0.5, part="validation", count=count, seed=options["seed"]
        )
        figures = evaluation.calibration_figures(result, 1.0)
        names = ("mahalanobis", "trace_ratio", "predictive")
        picture = plots.uncertainty_grid(result, rows=min(count, 4))
        return {n: figures[n] for n in names}, {"uncertainty": picture[None]}

    return report


def _move_parts(folder: Path, place: Path | None) -> None:
    """Moves the parts of a run into another folder, or removes them."""
    for name in PARTS:
        part = folder / name
        if not part.exists():
            continue
        if place is not None:
            place.mkdir(exist_ok=True)
            part.rename(place / name)
        elif part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()
