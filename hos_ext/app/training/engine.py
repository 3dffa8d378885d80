"""The training engine: a fixed number of steps on any source and model, on one process or many.

Everything random is a function of (seed, step, global row): batches, augmentation, dequantisation,
noise levels, noise. A step does not depend on what ran before it but through the weights, so a run
resumed from a checkpoint repeats the one that was not stopped bit for bit (CPU, same threads), and
ranks and micro-batches draw what one batch would. Engines: accelerate (devices, processes, bf16,
trackers), `torch.optim.swa_utils` (EMA), safetensors and rich; extra `app`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from ... import storage
from ...checks import check_count, check_int, check_number, one_of, refuse_dropout, require
from ...losses.score_matching import score_matching_loss
from ...schedules import draw_sigma
from ...scores import Model
from .. import data
from .checkpoints import (
    History,
    State,
    checkpoint_path,
    found_checkpoints,
    load_checkpoint,
    named,
    save_checkpoint,
)
from .precision import check_precision

# Scalars and images (uint8 arrays (n, H, W, 3)) of a model, for a tracker.
Report = Callable[[nn.Module, int], tuple[dict[str, float], dict[str, Any]]]

# The joint loss of `score_matching_loss`, its second-order term centred at the learned mean. By
# Eq. 33 the digits reach the same predictive calibration, but a first eigenvector along s1 keeps
# 5 to 10 times the variance there is: at these noise levels the target z z^T is as large as |z|^2
# along s1 where kappa is below 1.
OBJECTIVE: dict[str, Any] = {"variance_reduction": False, "centred": True}
# Rows of the validation part that the curve is drawn from.
_VALIDATION_ROWS = 192
# What a step computes depends on these: a run goes on with the same ones or not at all.
_DECIDING = (
    "steps",
    "batch_size",
    "learning_rate",
    "decay",
    "weight_decay",
    "warm_up",
    "max_grad_norm",
    "ema_decay",
    "sigma_range",
    "objective",
    "augment",
    "seed",
    "mixed_precision",
)
_OPTIONS = {*_DECIDING, "accumulate", "device", "save_every", "keep", "log_every"}


class Trained(NamedTuple):
    """The EMA model in eval mode, the curve, the steps done, and the step that was resumed from."""

    model: nn.Module
    history: list[History]
    step: int
    resumed_from: int


class NotFinite(RuntimeError):
    """A loss or a gradient stopped being finite. The last checkpoint is from before."""


class OutOfMemory(RuntimeError):
    """A step did not fit in memory."""


class Stopped(RuntimeError):
    """A signal ended the run after a whole step; `signal` is its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def check_options(options: dict[str, Any]) -> None:
    """Refuses arguments of `train` that are out of range; those not given are not looked at.

    Raises:
        ValueError: an option out of range.
        TypeError: an option of the wrong kind.
    """
    for name in ("steps", "batch_size", "save_every", "keep", "accumulate", "log_every"):
        if options.get(name) is not None:
            check_count("train", name, options[name])
    check_count("train", "warm_up", options.get("warm_up", 0), least=0)
    check_int("train", "seed", options.get("seed", 0), 2**63)
    for name in ("learning_rate", "max_grad_norm"):
        check_number("train", name, options.get(name, 1.0))
    check_number("train", "weight_decay", options.get("weight_decay", 0.0), positive=False)
    decay = check_number("train", "ema_decay", options.get("ema_decay", 0.5), positive=False)
    if decay >= 1:
        raise ValueError(f"train: ema_decay must be below 1, got {decay:g}")
    one_of("train", "mixed_precision", options.get("mixed_precision", "no"), ("no", "bf16"))
    one_of("train", "decay", options.get("decay", "cosine"), ("cosine", "constant"))
    one_of("train", "device", options.get("device", "auto"), ("auto", "cpu"))
    sigma_range = options.get("sigma_range", (0.1, 1.2))
    try:
        low, high = sigma_range
        good = 0 < low <= high < math.inf
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"train: sigma_range must be (low, high) with 0 < low <= high, got {sigma_range}"
        )
    rows, parts = options.get("batch_size"), options.get("accumulate", 1)
    if rows is not None and rows % parts:
        raise ValueError(f"train: accumulate must divide batch_size {rows}, got {parts}")


def is_main() -> bool:
    """Whether this process is the one that writes: the only one, or the first of a launcher's."""
    return int(os.environ.get("RANK", "0")) == 0


# ----------------------------------------------------------------------------------------- the loop


def train(
    model: nn.Module,
    source: data.Source,
    *,
    out: Path | str | None = None,
    steps: int,
    batch_size: int = 128,
    accumulate: int = 1,
    learning_rate: float = 4e-3,
    decay: str = "cosine",
    weight_decay: float = 0.1,
    warm_up: int = 300,
    max_grad_norm: float = 5.0,
    ema_decay: float = 0.998,
    sigma_range: tuple[float, float] = (0.1, 1.2),
    objective: dict[str, Any] | None = None,
    augment: str = "none",
    seed: int = 0,
    mixed_precision: str = "no",
    device: str = "auto",
    save_every: int = 500,
    keep: int = 3,
    log_every: int | None = None,
    tracker: str = "none",
    report: Report | None = None,
    resume: bool = False,
    facts: dict[str, Any] | None = None,
    progress: bool = False,
) -> Trained:
    """Trains `model` on `source` by `score_matching_loss`.

    AdamW (no decay on biases), linear warm-up then a cosine to zero, clipped gradients, exponential
    moving average of the weights, log-uniform noise levels. Under `torchrun` or `accelerate launch`
    every process calls this with the same arguments: the global batch is split over processes, and
    the first process writes.

    Args:
        model: `model(x, sigma) -> Scores`. Trained in place; parameters that need no gradient are
            neither trained nor saved.
        source: see `data.open_source`; `train` is trained on, `validation` gives the curve only.
        out: run folder for checkpoints/ and logs/. None: nothing is written. Without resume there
            must be no checkpoints in it.
        steps: optimiser steps, >= 1.
        batch_size: samples in a step, over all processes; a multiple of processes x accumulate.
        accumulate: micro-batches of a step: less memory for the same step.
        learning_rate: after the warm-up.
        decay: "cosine" to zero at `steps`, or "constant": then a run may be resumed with more
            steps, and is the one that had them from the start.
        weight_decay: of the weight matrices, >= 0.
        warm_up: steps; with a cosine at most a tenth of all.
        max_grad_norm: longer gradients are scaled down to it.
        ema_decay: of the average, >= 0 and < 1. Early on it is lowered to (1 + t) / (10 + t).
        sigma_range: smallest and largest sigma, data units.
        objective: options of `score_matching_loss`; None is `OBJECTIVE`.
        augment: see `data.augment`.
        seed: of every random choice here.
        mixed_precision: "no" or "bf16" (the network under autocast, the loss in float32). fp16 is
            not offered: its loss scaling skips steps.
        device: "auto" (an accelerator where there is one) or "cpu".
        save_every: steps between checkpoints.
        keep: whole checkpoints kept.
        log_every: steps between rows of the history. None: about 50 rows in all.
        tracker: name of an accelerate tracker ("tensorboard", "wandb", ...), or "none".
        report: called with the EMA model and the step at every tenth row of the history, in the
            first process; returns scalars and images (uint8 arrays (n, H, W, 3)) for the tracker.
        resume: go on from the newest whole checkpoint in out. A damaged one is named in a warning
            and passed over; without any the run starts at step 0.
        facts: plain JSON, stored in every checkpoint.
        progress: shows loss, rate and time left; needs rich.

    Returns:
        Trained.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind; a checkpoint of
            another run, or some where none are wanted; arithmetic that would ruin variance
            reduction; dropout; FSDP, DeepSpeed.
        NotFinite: names the step, the term, the samples and their noise levels, and the last
            checkpoint.
        OutOfMemory: says what to lower.
        Stopped: SIGTERM or SIGINT came (one process): the step was finished and saved.
        OSError: out cannot be written to, or the disk is full.
        RuntimeError: an extra is missing; processes that see different checkpoints.
    """
    options = {name: value for name, value in locals().items() if name in _OPTIONS}
    check_options(options)
    objective = dict(OBJECTIVE if objective is None else objective)
    refuse_dropout("train", model)
    accelerator = _accelerator(mixed_precision, device, accumulate, tracker, out)
    world, place = accelerator.num_processes, accelerator.device
    check_precision(
        objective, sigma_range, source.std, mixed_precision=mixed_precision, device=place.type
    )
    if batch_size % (world * accumulate):
        raise ValueError(
            f"train: batch_size must be a multiple of {world} processes x accumulate "
            f"{accumulate}, got {batch_size}"
        )
    size = batch_size // (world * accumulate)

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)
    step = 0

    def average(old: Tensor, new: Tensor, _: Tensor | int) -> Tensor:
        return new.lerp(old, min(ema_decay, step / (9 + step)))  # step = updates before + 1

    # Before prepare: under bf16 that puts a forward into the model whose copy calls the original.
    ema = swa_utils.AveragedModel(model.to(place), avg_fn=average)
    deciding = {name: options[name] for name in _DECIDING} | {
        "objective": objective,
        "sigma_range": list(sigma_range),
    }
    main = accelerator.is_main_process
    folder = None if out is None else Path(out) / "checkpoints"
    state = State(0, [], [0.0] * 5, None)
    if folder is not None:
        _check_json({"objective": objective, "facts": facts})
        if resume:
            state = load_checkpoint(folder, model, ema, optimizer, deciding)
        elif main and (there := found_checkpoints(folder)):
            raise ValueError(f"train: out must hold no checkpoints without resume, got {there[-1]}")
    start, history, sums, kept = state
    _check_starts(require("train", "accelerate.utils").gather_object([start]))
    if start >= steps:
        return Trained(ema.module.eval(), history, start, start)
    if main and folder is not None:
        storage.check_writable(folder)
        storage.remove_leftovers(folder)
    network, optimizer = accelerator.prepare(model, optimizer)
    if tracker != "none":
        # Rows after the checkpoint that a stopped run wrote are written anew.
        again = {"purge_step": start + 1} if tracker == "tensorboard" else {}
        accelerator.init_trackers("logs", init_kwargs={tracker: again})

    # Where steps may be added later the rate does not depend on them.
    warm_up = max(1, min(warm_up, steps // 10) if decay == "cosine" else warm_up)
    rate = partial(_rate, learning_rate, decay, warm_up, steps)
    window = log_every or max(1, steps // 50)
    draw = partial(_draw, source, batch_size, size, augment, sigma_range, seed, place)
    held_out = _validation(source, sigma_range, seed, place)
    with (
        ExitStack() as stack,
        _progress_bar(progress and main, start, steps) as show,
        _signals(world == 1) as received,
        _memory(size, batch_size, place),
    ):
        stack.callback(accelerator.unwrap_model, network, keep_fp32_wrapper=False)
        for step in range(start + 1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = rate(step - 1)
            totals, bad = torch.zeros(3, dtype=torch.float64), ""
            for micro in range(accumulate):
                batch = draw(step, (micro * world + accelerator.process_index) * size)
                with accelerator.accumulate(network):
                    values = _losses(network, batch, objective, seed, step)
                    accelerator.backward(values[0].mean())
                totals += values.detach().cpu().double().mean(1)  # Apple's GPUs have no float64
                bad = bad or _bad_rows(values[0], batch)
            norm = accelerator.clip_grad_norm_(trained, max_grad_norm)
            if world > 1:
                totals = accelerator.reduce(totals.to(place), "mean")
            means = [*(totals / accumulate).tolist(), float(norm)]
            _check_finite(means, step, bad, kept)
            optimizer.step()
            optimizer.zero_grad()
            ema.update_parameters(model)
            sums = [a + b for a, b in zip(sums, [*means, 1.0], strict=True)]

            if step % window == 0 or step == steps:
                if main:
                    loss, first, second, length = (total / sums[-1] for total in sums[:-1])
                    validation = _validation_loss(ema, held_out, objective, seed)
                    spread = _gradient_variance(model, trained, batch, objective, seed, step)
                    if spread is not None:
                        spread *= len(batch.x) / batch_size
                    row = History(
                        step, loss, first, second, rate(step), *validation, length, spread
                    )
                    _check_row(row, kept)
                    history.append(row)
                    if tracker != "none":
                        _track(accelerator, history, ema.module, report, step == steps)
                sums = [0.0] * 5
            stop = bool(received)  # once: a signal may come at any line
            if folder is not None and (step % save_every == 0 or step == steps or stop):
                if main:
                    content = {
                        "step": step,
                        "options": deciding,
                        "facts": facts or {},
                        "history": [list(row) for row in history],
                        "sums": sums,
                    }
                    save_checkpoint(folder, model, ema, optimizer, content, keep, kept)
                accelerator.wait_for_everyone()
                kept = checkpoint_path(folder, step)
            show(step, means[0])
            if stop and step < steps:
                break
    if tracker != "none":
        accelerator.end_training()
    if step < steps:
        name = signal.Signals(received[0]).name
        message = f"train: {name} stopped it after step {step}; last checkpoint: {named(kept)}"
        raise Stopped(message, received[0])
    return Trained(ema.module.eval(), history, steps, start)


def _rate(learning_rate: float, decay: str, warm_up: int, steps: int, t: int) -> float:
    """Learning rate of the step after t steps."""
    warm = learning_rate * min((t + 1) / warm_up, 1.0)
    return warm * (1 + math.cos(math.pi * t / steps)) / 2 if decay == "cosine" else warm


def _accelerator(
    mixed_precision: str, device: str, accumulate: int, tracker: str, out: Path | str | None
) -> Any:
    """accelerate's engine; what a launcher asks for beside it is refused by name."""
    accelerate = require("train", "accelerate")
    for flag in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{flag}", "false").lower() in ("true", "1"):
            raise ValueError(
                f"train: the launcher must use data parallelism (DDP), got ACCELERATE_USE_{flag}: "
                "not supported until it has been tested"
            )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", mixed_precision)
    if asked != mixed_precision:
        raise ValueError(
            f"train: mixed_precision must be that of the launcher, {asked!r}, got "
            f"{mixed_precision!r}"
        )
    if tracker != "none" and out is None:
        raise ValueError(f"train: out must be a folder for the tracker {tracker!r}, got None")
    if tracker == "tensorboard":
        require("train", "tensorboard")
    # As a plugin: accelerate launch puts a number of its own into the environment, which wins over
    # the plain argument.
    plugin = accelerate.utils.GradientAccumulationPlugin(
        num_steps=accumulate, sync_with_dataloader=False
    )
    cpu = device == "cpu" or not torch.accelerator.is_available()
    if accelerate.state.is_initialized():
        # accelerate keeps what the first engine of a process was asked for: the wrong device even
        # without a word.
        before = accelerate.state.AcceleratorState()
        asked_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
        for what, old, new in (
            ("mixed_precision", before.mixed_precision, mixed_precision),
            ("whether device is the CPU", before.device.type == "cpu", cpu or asked_cpu),
        ):
            if old != new:
                raise ValueError(
                    f"train: {what} must stay the same within a process, {old!r}, got {new!r}"
                )
    if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # gloo that connects all at once has been seen to wait for ever after an elastic restart.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    engine = accelerate.Accelerator(
        # Told so, it makes a group of CPU processes; not told, each would train alone.
        cpu=cpu,
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=plugin,
        log_with=None if tracker == "none" else tracker,
        project_dir=None if out is None else str(out),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if engine.num_processes != launched:
        raise RuntimeError(
            f"train: the processes of the launcher must form one group, got {launched} processes "
            f"and a group of {engine.num_processes}"
        )
    return engine


class _Batch(NamedTuple):
    """Rows [first, first + n) of the global batch of a step: samples, levels, rows of the set."""

    x: Tensor
    sigma: Tensor
    first: int
    rows: Tensor


def _draw(
    source: data.Source,
    batch_size: int,
    size: int,
    augment: str,
    sigma_range: tuple[float, float],
    seed: int,
    place: torch.device,
    step: int,
    first: int,
) -> _Batch:
    keys = {"seed": seed, "offset": step, "first": first}
    rows, raw = source.batch(step - 1, batch_size, seed=seed, start=first, stop=first + size)
    raw = data.augment(raw, augment, levels=source.scaling.levels, batch_size=batch_size, **keys)
    x = source.scaling.forward(raw, **keys)
    sigma = draw_sigma(size, sigma_range, **keys)
    return _Batch(x.to(place), sigma.to(place), first, rows)


def _losses(
    network: Model, batch: _Batch, objective: dict[str, Any], seed: int, offset: int
) -> Tensor:
    """Loss, first and second term of each sample. Shape (3, B)."""
    loss, terms = score_matching_loss(
        network,
        batch.x,
        batch.sigma,
        **objective,
        seed=seed,
        offset=offset,
        first=batch.first,
        reduction="none",
        return_terms=True,
    )
    return torch.stack([loss, terms["first"], terms["second"]])


def _validation(
    source: data.Source, sigma_range: tuple[float, float], seed: int, place: torch.device
) -> _Batch:
    """The held-out rows of the curve, under noise that stays the same."""
    rows = torch.arange(min(len(source.validation), _VALIDATION_ROWS))
    x = source.scaling.forward(source.validation[rows], seed=seed, offset=0)
    sigma = draw_sigma(len(rows), sigma_range, seed=seed, offset=0)
    return _Batch(x.to(place), sigma.to(place), 0, rows)


@torch.no_grad()
def _validation_loss(
    model: Model, batch: _Batch, objective: dict[str, Any], seed: int
) -> tuple[float, float]:
    """The loss and its first term on the held-out rows, in parts of 128."""
    total = torch.zeros(3, dtype=torch.float64)
    for low in range(0, len(batch.x), 128):
        part = slice(low, low + 128)
        some = _Batch(batch.x[part], batch.sigma[part], low, batch.rows[part])
        total += _losses(model, some, objective, seed, 0).cpu().double().sum(1)
    loss, first, _ = (total / len(batch.x)).tolist()
    return loss, first


def _gradient_variance(
    model: Model,
    trained: list[nn.Parameter],
    batch: _Batch,
    objective: dict[str, Any],
    seed: int,
    step: int,
) -> float | None:
    """Trace of the covariance of the gradient of the mean loss over such a batch.

    The halves' gradients g, g' are independent, each with twice the variance of their mean:
    E |g - g'|^2 = 4 Var. Of an odd batch the last row is left out.
    """
    half = len(batch.x) // 2
    if half == 0:
        return None
    gradients = []
    for low in (0, half):
        part = slice(low, low + half)
        some = _Batch(batch.x[part], batch.sigma[part], batch.first + low, batch.rows[part])
        loss = _losses(model, some, objective, seed, step)[0].mean()
        gradients.append(torch.autograd.grad(loss, trained, materialize_grads=True))
    apart = sum(float((a - b).square().sum()) for a, b in zip(*gradients, strict=True))
    return apart / 4 * (2 * half / len(batch.x))


def _bad_rows(losses: Tensor, batch: _Batch) -> str:
    """The samples whose loss is not finite, with their noise levels; empty if there are none."""
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return ""
    named = ", ".join(f"{int(batch.rows[i])} (sigma {float(batch.sigma[i]):.4g})" for i in bad[:5])
    return f"sample{'s' if len(bad) > 1 else ''} {named}{' ...' if len(bad) > 5 else ''}"


def _check_finite(values: list[float], step: int, bad: str, kept: Path | None) -> None:
    names = ("the first-order term", "the second-order term", "the sum of the terms")
    order = (*values[1:3], values[0], values[3])
    for name, value in zip((*names, "the norm of the gradient"), order, strict=True):
        if not math.isfinite(value):
            where = f" in {bad}" if bad else ""
            raise NotFinite(
                f"train: {name} must stay finite, got {value} at step {step}{where}; "
                f"last good checkpoint: {named(kept)}"
            )


def _check_row(row: History, kept: Path | None) -> None:
    for name, value in row._asdict().items():
        if value is not None and not math.isfinite(value):
            raise NotFinite(
                f"train: the {name} of the curve must stay finite, got {value} at step {row.step}; "
                f"last good checkpoint: {named(kept)}"
            )


def _check_starts(steps: list[int]) -> None:
    """Each process reads the checkpoints itself: on a disk of its own it may find others."""
    if len(set(steps)) > 1:
        raise RuntimeError(
            "train: every process must find the same checkpoints (out on a disk that all share), "
            f"got those of steps {', '.join(map(str, steps))}"
        )


def _check_json(given: dict[str, Any]) -> None:
    """Refuses at once what no checkpoint could hold."""
    for name, value in given.items():
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"train: {name} must be plain JSON, got: {error}") from None
        if name == "objective" and json.loads(text) != value:  # no run could be resumed with it
            raise TypeError(f"train: {name} must be plain JSON, got {value}")


def _track(
    accelerator: Any,
    history: list[History],
    model: nn.Module,
    report: Report | None,
    last: bool,
) -> None:
    row = history[-1]._asdict()
    step = row.pop("step")
    accelerator.log({name: v for name, v in row.items() if v is not None}, step=step)
    if report is None or (len(history) % 10 and not last):
        return
    scalars, images = report(model, step)
    accelerator.log(scalars, step=step)
    for each in accelerator.trackers:
        if images and hasattr(each, "log_images"):
            options = {"dataformats": "NHWC"} if each.name == "tensorboard" else {}
            each.log_images(images, step=step, **options)


@contextmanager
def _signals(wanted: bool) -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, so that a step is finished first; a second one acts at once.

    Not where processes depend on each other: they would wait for one that has stopped.
    """
    received: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    # What was ignored before stays so: SIGINT in the background of a script.
    kinds = [kind for kind, handler in before.items() if handler is not signal.SIG_IGN]

    def note(number: int, _: object) -> None:
        received.append(number)
        for kind in kinds:
            signal.signal(kind, before[kind])

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield received
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])


@contextmanager
def _memory(size: int, batch_size: int, place: torch.device) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in words):
            raise
        raise OutOfMemory(
            f"train: a step must fit in the memory of {place}, got {size} samples at a time "
            f"(batch_size {batch_size}): raise accumulate, or lower batch_size, rank or the size "
            "of the model, or turn gradient checkpointing on"
        ) from error


@contextmanager
def _progress_bar(wanted: bool, done: int, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Yields the function to call after each step, with the step and its loss."""
    if not wanted:
        yield lambda step, loss: None
        return
    progress = require("train", "rich.progress")
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]:.1f}"),
        progress.TextColumn("{task.fields[rate]:.1f} steps/s"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
    )
    begin = time.perf_counter()
    smooth = math.nan
    with progress.Progress(*columns) as bar:
        task = bar.add_task("training", total=steps, completed=done, loss=math.nan, rate=0.0)

        def show(step: int, loss: float) -> None:
            nonlocal smooth
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            rate = (step - done) / (time.perf_counter() - begin)
            bar.update(task, completed=step, loss=smooth, rate=rate)

        yield show
