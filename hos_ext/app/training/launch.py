"""Devices and processes: accelerate's engine, and what a launcher may ask of it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checks import check, require
from .devices import asking_for, check_same_device, on_cpu
from .faults import name_lost
from .options import TrainingOptions


def is_main() -> bool:
    """Whether this process is the one that writes: the only one, or the first of a launcher's."""
    return int(os.environ.get("RANK", "0")) == 0


def open_accelerator(options: TrainingOptions, out: Path | str | None) -> Any:
    """accelerate's engine for the device, the processes and the tracker.

    Args:
        options: of the training.
        out: the folder of the tracker's logs.

    Raises:
        ValueError: a launcher or an earlier training of this process asked for something else, or
            batch_size cannot be split.
        RuntimeError: accelerate is missing, or the processes form no group.
        Lost: another process did not come.
    """
    accelerate = require("train", "accelerate")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    cpu = on_cpu(options.device) or not torch.accelerator.is_available()
    _check_launcher(options.mixed_precision)
    if accelerate.state.is_initialized():
        _check_unchanged(accelerate.state.AcceleratorState(), options.mixed_precision, cpu)
        check_same_device(accelerate.state.AcceleratorState().device, options.device)
    tracker = None if options.tracker == "none" else options.tracker
    rule = f"out must be a folder for the tracker {tracker!r}"
    check("train", tracker is None or out is not None, rule, out)
    if cpu and launched > 1:
        # gloo that connects all at once has been seen to wait for ever after an elastic restart.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # The microsecond is for accelerate, which drops a value that is its default for another
    # backend: gloo would then wait for half an hour.
    wait = timedelta(seconds=options.timeout, microseconds=1)
    with (
        name_lost("train", options.timeout, lambda: "at the start"),
        asking_for(options.device, launched),
    ):
        accelerator = accelerate.Accelerator(
            # Told so, it makes a group of CPU processes; not told, each would train alone.
            cpu=cpu,
            mixed_precision=options.mixed_precision,
            # As a plugin: accelerate launch puts a number of its own into the environment, which
            # wins over the plain argument.
            gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(
                num_steps=options.accumulate, sync_with_dataloader=False
            ),
            kwargs_handlers=[accelerate.utils.InitProcessGroupKwargs(timeout=wait)],
            log_with=tracker,
            project_dir=None if out is None else str(out),
        )
    world, parts, rows = accelerator.num_processes, options.accumulate, options.batch_size
    rule = "the processes of the launcher must form one group"
    got = f"{launched} processes and a group of {world}"
    check("train", world == launched, rule, got, RuntimeError)
    rule = f"batch_size must be a multiple of {world} processes x accumulate {parts}"
    check("train", rows % (world * parts) == 0, rule, rows)
    return accelerator


def check_whole(model: nn.Module) -> None:
    """Refuses a model whose weights `fully_shard` has spread over processes."""
    spread = [name for name, p in model.named_parameters() if hasattr(p, "full_tensor")]
    rule = "model must hold its weights whole in every process (no fully_shard)"
    check("train", not spread, rule, lambda: f"parts of {spread[0]}")


def _check_launcher(asked: str) -> None:
    """Refuses by name what a launcher asks for beside data parallelism."""
    untested = "it has not been tested"
    # Tried with fully_shard: the moving average cannot be taken of parts (torch: mixed Tensor and
    # DTensor), the first process alone measures and writes. On CPUs accelerate trains by DDP
    # without a word.
    shards = "its parts of weights cannot be averaged, measured or saved by one process"
    reasons = {"FSDP": shards, "DEEPSPEED": untested, "MEGATRON_LM": untested}
    for flag, reason in (reasons | {"PARALLELISM_CONFIG": untested}).items():
        got = f"ACCELERATE_USE_{flag}: {reason}"
        rule = "the launcher must use data parallelism (DDP)"
        check("train", not _is_on(f"ACCELERATE_USE_{flag}"), rule, got)
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", asked)
    rule = f"mixed_precision must be that of the launcher, {given!r}"
    check("train", given == asked, rule, repr(asked))


def _check_unchanged(before: Any, precision: str, cpu: bool) -> None:
    """accelerate keeps what the first training of a process asked for, without a word."""
    rule = f"mixed_precision must stay the same within a process, {before.mixed_precision!r}"
    check("train", before.mixed_precision == precision, rule, repr(precision))
    was, now = before.device.type == "cpu", cpu or _is_on("ACCELERATE_USE_CPU")
    rule = f"whether device is the CPU must stay the same within a process, {was}"
    check("train", was == now, rule, now)


def _is_on(flag: str) -> bool:
    return os.environ.get(flag, "false").lower() in ("true", "1")


def check_starts(step: int) -> None:
    """Each process reads the checkpoints itself: on a disk of its own it may find others."""
    steps = require("train", "accelerate.utils").gather_object([step])
    rule = "every process must find the same checkpoints (out on a disk that all share)"
    got = f"those of steps {', '.join(map(str, steps))}"
    check("train", len(set(steps)) == 1, rule, got, RuntimeError)
