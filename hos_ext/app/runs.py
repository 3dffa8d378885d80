"""Runs of training as folders: prepare, train or go on, load, and say what is there.

`prepare` does every check and no work, `fit` the work. A finished run holds run.json (options,
facts of the data, versions), checkpoints/, logs/, model/, training.png and, written last,
metrics.json.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import __version__, storage
from ..checks import check
from ..nn import files as pretrained
from . import data, evaluation, plots, training
from .options import FORMAT, build_model, complete, open_source, training_options

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
    given: Mapping[str, Any], out: Path, *, force: bool = False, resume: bool = False
) -> Run:
    """Checks everything that can be checked before the work; writes nothing but the folder.

    Args:
        given: options by name; those left out get their defaults.
        out: the run folder.
        force: a run that is there may be replaced.
        resume: a run that is there is continued; its options must be these.

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
    model = build_model(options, source.shape)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "options": options,
        "data": describe(source),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": versions(),
    }
    if there and resume:
        stored = read_run(out)
        longer = options["decay"] == "constant" and options["steps"] > stored["options"]["steps"]
        same = {"steps": stored["options"]["steps"]} if longer else {}
        _refuse_changes("options", stored["options"], options | same)
        _refuse_changes("data", stored["data"], facts["data"])
    storage.check_writable(out)
    return Run(out, options, source, model, facts, resume)


def _refuse_changes(what: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [
        f"{key} ({old.get(key)} there, {new.get(key)} now)"
        for key in dict.fromkeys([*old, *new])
        if not _alike(old.get(key), new.get(key))
    ]
    rule = f"{what} must be those that the run was started with"
    check("run", not changed, rule, ", ".join(changed))


def _alike(old: Any, new: Any) -> bool:
    """Equal, but for the rounding of statistics: that depends on the number of threads."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_alike(old[key], new[key]) for key in old)
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-6)
    return bool(old == new)


def holds_run(out: Path) -> str | None:
    """The first part of a run that is in the folder."""
    return next((name for name in PARTS if (out / name).exists()), None)


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json: "options", "data", "parameters" and "versions".

    Raises:
        ValueError: the file is missing, damaged or foreign.
    """
    path = folder / "run.json"
    check("run", path.is_file(), "folder must hold run.json", f"{folder} without it")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"run: folder must hold a whole run.json, got {path}: {error}") from None
    found = content.get("format") if isinstance(content, dict) else None
    rule = f"run.json must be of format {FORMAT!r}"
    check("run", found == FORMAT, rule, f"{found!r} in {path}")
    return content


def describe(source: data.Source) -> dict[str, Any]:
    """What is kept of the data: shape, scaling, sigma_data and the number of rows of each part."""
    train = source.parts.train
    return {
        "spec": source.spec,
        "shape": list(source.shape),
        "scaling": source.scaling.as_dict(),
        "std": float(source.std),
        "n_train": None if train is None else len(train),  # a stream has no known end
        "n_validation": len(source.validation),
        "n_test": len(source.test),
    }


def versions() -> dict[str, str]:
    return {"hos_ext": __version__, "torch": torch.__version__, "python": platform.python_version()}


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
            report=_tracked(run.source, run.options),
            progress=progress and main,
        )
    return _finish(run, trained, time.perf_counter() - start) if main else {}


@contextmanager
def _replacing(run: Run) -> Iterator[None]:
    """Writes run.json; a run that it replaces comes back if there is no checkpoint at the end."""
    aside, path = run.out / ".replaced", run.out / "run.json"
    if not run.resume:
        _move_parts(run.out, aside)
    if not path.exists() or not _alike(read_run(run.out)["options"], run.options):
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
    factor = evaluation.recalibrate(trained.model, run.source, (low, high), seed=options["seed"])
    facts = run.facts | {"step": trained.step, "recalibration": factor}
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
        "validation_loss": last.validation,
        "validation_error": last.validation_first / size,
        "recalibration": factor,
        "seconds": seconds,
        "steps_per_second": (trained.step - trained.resumed_from) / seconds,
        "threads": torch.get_num_threads(),
    }
    history = [row._asdict() for row in trained.history]
    write_json(run.out / "metrics.json", {"train": figures, "history": history})
    return figures


def _tracked(source: data.Source, options: Mapping[str, Any]) -> training.Report:
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


def load_run(folder: Path, *, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The model of a finished run, or of its model folder alone, and its facts.

    Args:
        folder: of the run, or of the model.
        device: for the model; "auto" is a GPU if there is one.

    Returns:
        The EMA model in eval mode, and what run.json holds with "step" and "recalibration".

    Raises:
        ValueError: the folder holds no model of a run, a damaged one, or a run without one yet.
    """
    there = (folder / "model").exists() or not (folder / "run.json").exists()
    got = f"{folder} without model (go on with it by hos-ext resume {folder})"
    check("load_run", there, "folder must hold a finished run", got)
    place = folder / "model" if (folder / "model").is_dir() else folder
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError):  # torch without CUDA asserts
        raise ValueError(
            f"load_run: device must be auto, cpu, or one that is there, got {device!r}"
        ) from None
    model, config = pretrained.load_model(place, device=device)
    facts: Any = config.get("run")
    good = isinstance(facts, dict) and facts.get("format") == FORMAT
    check("load_run", good, "folder must hold the model of a run", f"{place} without its facts")
    return model, facts


def finished(folder: Path, steps: int | None = None) -> bool:
    """Whether the run of a folder has come to its last step and has written all of its parts.

    Args:
        folder: of the run.
        steps: the last step; None is that of run.json.
    """
    path = folder / "metrics.json"
    if not path.exists():
        return False
    done = json.loads(path.read_text(encoding="utf-8"))["train"]["steps"]
    return bool(done == (steps or read_run(folder)["options"]["steps"]))


def scaling_of(facts: Mapping[str, Any]) -> data.Scaling:
    """The scaling of the data that a model was trained on."""
    return data.Scaling.from_dict(facts["data"]["scaling"])


def open_data(facts: Mapping[str, Any]) -> data.Source:
    """The data of a run, opened again, and the same as before.

    Raises:
        ValueError: they are not what they were.
        OSError, RuntimeError: they cannot be read.
    """
    source = open_source(facts["options"])
    _refuse_changes("data", facts["data"], describe(source))
    return source


def info(folder: Path) -> dict[str, Any]:
    """What a run folder or the model folder of a run holds, damage included; plain JSON.

    Raises:
        ValueError: neither.
    """
    if not (folder / "run.json").exists():
        _, facts = load_run(folder)
        return {"state": "a model", **facts}
    facts = read_run(folder)
    checkpoints = {path.name: wrong or "whole" for path, wrong in training.list_checkpoints(folder)}
    state = "finished" if finished(folder) else "not finished"
    content = {"state": state, **facts, "checkpoints": checkpoints}
    if state == "finished":
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        content |= {"figures": metrics["train"]}
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    storage.write_whole(path, json_text(content).encode())


def json_text(content: Mapping[str, Any]) -> str:
    """Indented JSON; null for numbers that JSON lacks, such as the ESS of what never moved."""
    return json.dumps(evaluation.plain_json(dict(content)), indent=2, allow_nan=False) + "\n"
