"""The training engine: a fixed number of steps on any source and model, on one process or many.

Everything random is a function of (seed, step, global row): batches, augmentation, dequantisation,
noise levels, noise. A step does not depend on what ran before it but through the weights, so a run
resumed from a checkpoint repeats the one that was not stopped bit for bit (CPU, same threads), and
ranks and micro-batches draw what one batch would. Engines: accelerate (devices, processes, bf16,
trackers), `torch.optim.swa_utils` (EMA), safetensors and rich; extra `app`.
"""

from __future__ import annotations

import logging
import math
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from ... import storage
from ...checks import check, check_callable, check_flag, check_kind, refuse_dropout, said_by
from ...progress import show_progress
from ..data import Source, as_source
from .batches import Batch, draw_batch, draw_validation, gradient_variance, losses, validation_loss
from .checkpoints import (
    History,
    State,
    check_plain,
    checkpoint_path,
    found_checkpoints,
    load_checkpoint,
    named,
    save_checkpoint,
)
from .faults import Stopped, bad_rows, catch_signals, check_finite, name_lost, name_memory
from .launch import check_starts, check_whole, open_accelerator
from .options import TrainingOptions
from .precision import check_precision
from .trackers import Reporter, start_tracker, track

_LOG = logging.getLogger("hos_ext.train")
# What the progress shows of a step.
_FIGURES = {"loss": "loss {:.4g} an entry", "error": "denoising error {:.3f} sigma^2"}


class Trained(NamedTuple):
    """What a training gives.

    Attributes:
        model: the EMA model in eval mode.
        history: the curve.
        step: steps done.
        resumed_from: the step that it went on from.
        source: the data as they were trained on; `source.scaling` says what data units are.
    """

    model: nn.Module
    history: list[History]
    step: int
    resumed_from: int
    source: Source


def train(
    model: nn.Module,
    data: Any,
    options: TrainingOptions,
    *,
    validation: Any = None,
    out: Path | str | None = None,
    resume: bool = False,
    report: Reporter | None = None,
    facts: dict[str, Any] | None = None,
    progress: bool = False,
) -> Trained:
    """Trains `model` on `data` by `score_matching_loss`.

    AdamW (no decay on biases), linear warm-up then a cosine to zero, clipped gradients, exponential
    moving average of the weights, log-uniform noise levels. Under `torchrun` or `accelerate launch`
    every process calls this with the same arguments: the global batch is split over processes, and
    the first process writes.

    Args:
        model: `model(x, sigma) -> Scores`. Trained in place; parameters that need no gradient are
            neither trained nor saved.
        data: a Source, as `data.open_source` and `data.as_source` make it; or what `as_source`
            takes: a tensor, an array, a `Dataset` or `DataLoader` of torch, a data set of Hugging
            Face. It says what exactness each keeps.
        options: what the training does. batch_size must be a multiple of processes x accumulate.
        validation: rows for the curve, which are not trained on, as in `as_source`: a number of
            rows that are held out, or data apart. None for a Source, which has such rows.
        out: run folder for checkpoints/ and logs/. None: nothing is written. Without resume there
            must be no checkpoints in it.
        resume: go on from the newest whole checkpoint in out. A damaged one is named in a warning
            and passed over; without any the run starts at step 0.
        report: called with the EMA model and the step at every tenth row of the history, in the
            first process; returns scalars and images (uint8 arrays (n, H, W, 3)) for the tracker.
        facts: plain JSON, stored in every checkpoint.
        progress: shows the loss of an entry, the denoising error in units of sigma^2, rate and time
            left: a bar on a terminal, elsewhere a line every few seconds by `logging` (of level
            INFO, which `logging.basicConfig(level="INFO")` shows); needs rich. Rows of the curve
            and checkpoints are logged as DEBUG in any case.

    Returns:
        The model, its curve, and where it started.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind; a checkpoint of
            another run, or some where none are wanted; arithmetic that would ruin variance
            reduction; dropout; FSDP, DeepSpeed.
        NotFinite: names the step, the term, the samples and their noise levels, and the last
            checkpoint.
        OutOfMemory: says what to lower.
        Lost: another process stopped, or did not answer within options.timeout.
        Stopped: SIGTERM or SIGINT came (one process): the step was finished and saved.
        OSError: out cannot be written to, or the disk is full.
        RuntimeError: an extra is missing; processes that see different checkpoints.

    Example:
        >>> options = TrainingOptions(steps=1000, augment="distort")
        >>> trained = train(model, data.open_source("digits"), options, out="runs/mine")
    """
    check_kind("train", "model", model, nn.Module)
    check_kind("train", "options", options, TrainingOptions)
    check_flag("train", resume=resume, progress=progress)
    if report is not None:
        check_callable("train", "report", report)
    refuse_dropout("train", model)
    check_whole(model)
    size = options.batch_size
    with said_by("train", "as_source"):
        told: dict[str, Any] = {}
        if not isinstance(data, Source) and "label" in getattr(model, "conditions", ()):
            told = {"label": "label", "num_classes": _classes(model)}
        source = as_source(
            data, seed=options.seed, validation=validation, test=0, batch_size=size, **told
        )
    _check_labels(model, source)
    accelerator = open_accelerator(options, out)
    check_precision(
        options.objective,
        options.sigma_range,
        source.std,
        mixed_precision=options.mixed_precision,
        device=accelerator.device.type,
    )
    run = _Training(model, source, options, accelerator)
    folder = None if out is None else Path(out) / "checkpoints"
    if folder is not None:
        check_plain(options.objective, facts)
        run.start_from(folder, resume)
    start, steps = run.step, options.steps
    with name_lost("train", options.timeout, run.place):
        check_starts(start)
    if start >= steps:
        return run.trained(start)
    if folder is not None and accelerator.is_main_process:
        storage.check_writable(folder)
        storage.remove_leftovers(folder)
    with (
        name_lost("train", options.timeout, run.place),
        run.on_devices(),
        show_progress(
            "train",
            progress and accelerator.is_main_process,
            "training",
            steps,
            done=start,
            figures=_FIGURES,
        ) as show,
        catch_signals(accelerator.num_processes == 1) as received,
        name_memory(run.size, options.batch_size, accelerator.device),
    ):
        for step in range(start + 1, steps + 1):
            loss, error = run.take_step(step)
            if step % run.window == 0 or step == steps:
                run.end_row(report)
            stop = bool(received)  # once: a signal may come at any line
            if folder is not None and (step % options.save_every == 0 or step == steps or stop):
                run.save(folder, facts or {})
            show(step, loss=loss, error=error)
            if stop and step < steps:
                break
    if options.tracker != "none":
        accelerator.end_training()
    if run.step < steps:
        name = signal.Signals(received[0]).name
        message = (
            f"train: {name} stopped it after step {run.step}; last checkpoint: {named(run.kept)}"
        )
        raise Stopped(message, received[0])
    return run.trained(start)


class _Training:
    """A training under way: the step that it has come to, and all that the next one changes.

    Attributes:
        step, history, sums, kept: see `State`; during a step, `step` is its number.
        model, ema: the weights, and their average.
        network: the model as accelerate wraps it.
        batch: what this process drew last.
        held_out: the validation rows of the curve.
        size: rows of a micro-batch of this process.
        window: steps of a row of the curve.
        entries: D, of a sample.
    """

    def __init__(
        self, model: nn.Module, source: Source, options: TrainingOptions, accelerator: Any
    ) -> None:
        self.model, self.source, self.options = model, source, options
        self.accelerator = accelerator
        self.size = options.batch_size // (accelerator.num_processes * options.accumulate)
        self.window = options.log_every or max(1, options.steps // 50)
        self.entries = math.prod(source.shape)
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: Any = _optimizer(self.weights, options)
        # Before prepare: under bf16 that puts a forward into the model whose copy calls the
        # original.
        self.ema = swa_utils.AveragedModel(model.to(accelerator.device), avg_fn=self._average)
        self.step, self.history, self.sums, self.kept = State.fresh()
        self.batch: Batch

    def _average(self, old: Tensor, new: Tensor, _: Tensor | int) -> Tensor:
        # step = updates before + 1
        return new.lerp(old, min(self.options.ema_decay, self.step / (9 + self.step)))

    def start_from(self, folder: Path, resume: bool) -> None:
        """Restores the newest whole checkpoint; without resume there must be none."""
        if resume:
            self.step, self.history, self.sums, self.kept = load_checkpoint(
                folder, self.model, self.ema, self.optimizer, self.options.deciding()
            )
        elif self.accelerator.is_main_process and (there := found_checkpoints(folder)):
            raise ValueError(f"train: out must hold no checkpoints without resume, got {there[-1]}")

    def on_devices(self) -> ExitStack:
        """Readies model, optimiser, tracker and validation rows; the model is put back at exit."""
        prepared = self.accelerator.prepare(self.model, self.optimizer)
        self.network, self.optimizer = prepared
        start_tracker(self.accelerator, self.options.tracker, self.step + 1)
        self.held_out = draw_validation(self.source, self.options).to(self.accelerator.device)
        stack = ExitStack()
        stack.callback(self.accelerator.unwrap_model, self.network, keep_fp32_wrapper=False)
        return stack

    def take_step(self, step: int) -> tuple[float, float]:
        """One step of the optimiser, on all processes; gives loss and first term of an entry."""
        self.step = step
        for group in self.optimizer.param_groups:
            group["lr"] = _rate(self.options, step - 1)
        terms, bad = self._backward()
        norm = self.accelerator.clip_grad_norm_(self.weights, self.options.max_grad_norm)
        means: list[float] = [*terms.tolist(), float(norm)]
        loss, first, second, length = means
        judged = {
            "the first-order term": first,
            "the second-order term": second,
            "the sum of the terms": loss,
            "the norm of the gradient": length,
        }
        check_finite(judged, step, self.kept, bad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.model)
        self.sums = [a + b for a, b in zip(self.sums, [*means, 1.0], strict=True)]
        return loss / self.entries, first / self.entries

    def _backward(self) -> tuple[Tensor, str]:
        """Gradients of the mean loss; the means of loss, first and second term; bad samples."""
        accelerator, options = self.accelerator, self.options
        world, totals, bad = accelerator.num_processes, torch.zeros(3, dtype=torch.float64), ""
        for micro in range(options.accumulate):
            begin = (micro * world + accelerator.process_index) * self.size
            batch = draw_batch(self.source, options, self.step, begin, begin + self.size)
            self.batch = batch = batch.to(accelerator.device)
            with accelerator.accumulate(self.network):
                values = losses(self.network, batch, options.objective)
                accelerator.backward(values[0].mean())
            totals += values.detach().cpu().double().mean(1)  # Apple's GPUs have no float64
            bad = bad or bad_rows(values[0], batch)
        if world > 1:
            totals = accelerator.reduce(totals.to(accelerator.device), "mean")
        return totals / options.accumulate, bad

    def end_row(self, report: Reporter | None) -> None:
        """Ends a row of the curve: in the first process it is measured, kept and tracked."""
        sums, self.sums = self.sums, [0.0] * 5
        if not self.accelerator.is_main_process:
            return
        options = self.options
        loss, first, second, length = (total / sums[-1] for total in sums[:-1])
        validation = validation_loss(self.ema, self.held_out, options.objective)
        spread = gradient_variance(self.model, self.weights, self.batch, options.objective)
        if spread is not None:
            spread *= len(self.batch.x0) / options.batch_size
        rate = _rate(options, self.step)
        entry = [value / self.entries for value in (loss, first, validation[1])]
        row = History(self.step, loss, first, second, rate, *validation, length, spread, *entry)
        judged = {f"the {name} of the curve": value for name, value in row._asdict().items()}
        check_finite(judged, self.step, self.kept)
        self.history.append(row)
        _LOG.debug(
            f"step {row.step}: loss {row.loss_per_entry:.4g} an entry, denoising error "
            f"{row.error:.3f} sigma^2, on validation {row.validation_error:.3f} sigma^2, gradient "
            f"{length:.3g}, learning rate {rate:.3g}"
        )
        if options.tracker != "none":
            last = self.step == options.steps
            track(self.accelerator, self.history, self.ema.module, report, last)

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Writes a checkpoint, in the first process; the others wait for it."""
        path = checkpoint_path(folder, self.step)
        if self.accelerator.is_main_process:
            content = {
                "step": self.step,
                "options": self.options.deciding(),
                "facts": facts,
                "history": [list(row) for row in self.history],
                "sums": self.sums,
            }
            save_checkpoint(
                folder,
                self.model,
                self.ema,
                self.optimizer,
                content,
                self.options.keep,
                self.kept,
            )
            _LOG.debug(f"wrote {path}")
            self.kept = path  # before the wait: it is there, whoever is lost
        self.accelerator.wait_for_everyone()
        self.kept = path

    def place(self) -> str:
        """The step that it has come to and its last checkpoint, in words."""
        return f"at step {self.step}; last checkpoint: {named(self.kept)}"

    def trained(self, start: int) -> Trained:
        """What `train` returns, for a run that started after step `start`."""
        return Trained(self.ema.module.eval(), self.history, self.step, start, self.source)


def _check_labels(model: nn.Module, source: Source) -> None:
    """Refuses a conditional model without labels, labels without one, and other classes."""
    takes = "label" in getattr(model, "conditions", ())
    classes = _classes(model)
    if source.labels is None:
        rule = "data must have labels for a model that takes them (open_source has label=)"
        check("train", not takes, rule, f"none in {source.spec}")
        return
    count = len(source.labels.names)
    rule = f"model must take label= (num_classes={count}) for data with labels"
    check("train", takes, rule, f"{type(model).__name__} without")
    rule = f"model must have num_classes={count}, the classes of the data"
    check("train", classes in (None, count), rule, classes)


def _classes(model: nn.Module) -> int | None:
    """How many classes a model has, if it says so."""
    classes: int | None = getattr(getattr(model, "head", model), "num_classes", None)
    return classes


def _optimizer(weights: list[nn.Parameter], options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW, whose decay spares biases and other vectors."""
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.99), fused=True)


def _rate(options: TrainingOptions, t: int) -> float:
    """Learning rate of the step after t steps."""
    if options.decay == "constant":
        # Steps may be added later: the rate does not depend on them.
        return options.learning_rate * min((t + 1) / max(1, options.warm_up), 1.0)
    warm_up = max(1, min(options.warm_up, options.steps // 10))
    warm = options.learning_rate * min((t + 1) / warm_up, 1.0)
    return warm * (1 + math.cos(math.pi * t / options.steps)) / 2
