"""Devices and processes: accelerate's engine, and what a launcher may ask of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ...checks import require
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
    """
    accelerate = require("train", "accelerate")
    cpu = options.device == "cpu" or not torch.accelerator.is_available()
    _check_launcher(options.mixed_precision)
    if options.tracker != "none" and out is None:
        raise ValueError(
            f"train: out must be a folder for the tracker {options.tracker!r}, got None"
        )
    if accelerate.state.is_initialized():
        _check_unchanged(accelerate.state.AcceleratorState(), options.mixed_precision, cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if cpu and launched > 1:
        # gloo that connects all at once has been seen to wait for ever after an elastic restart.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    accelerator = accelerate.Accelerator(
        # Told so, it makes a group of CPU processes; not told, each would train alone.
        cpu=cpu,
        mixed_precision=options.mixed_precision,
        # As a plugin: accelerate launch puts a number of its own into the environment, which wins
        # over the plain argument.
        gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(
            num_steps=options.accumulate, sync_with_dataloader=False
        ),
        log_with=None if options.tracker == "none" else options.tracker,
        project_dir=None if out is None else str(out),
    )
    world = accelerator.num_processes
    if world != launched:
        raise RuntimeError(
            f"train: the processes of the launcher must form one group, got {launched} processes "
            f"and a group of {world}"
        )
    if options.batch_size % (world * options.accumulate):
        raise ValueError(
            f"train: batch_size must be a multiple of {world} processes x accumulate "
            f"{options.accumulate}, got {options.batch_size}"
        )
    return accelerator


def _check_launcher(mixed_precision: str) -> None:
    """Refuses by name what a launcher asks for beside data parallelism."""
    for flag in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _is_on(f"ACCELERATE_USE_{flag}"):
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


def _check_unchanged(before: Any, mixed_precision: str, cpu: bool) -> None:
    """accelerate keeps what the first engine of a process was asked for.

    It would give the wrong device without a word.
    """
    cpu = cpu or _is_on("ACCELERATE_USE_CPU")
    for what, old, new in (
        ("mixed_precision", before.mixed_precision, mixed_precision),
        ("whether device is the CPU", before.device.type == "cpu", cpu),
    ):
        if old != new:
            raise ValueError(
                f"train: {what} must stay the same within a process, {old!r}, got {new!r}"
            )


def _is_on(flag: str) -> bool:
    return os.environ.get(flag, "false").lower() in ("true", "1")


def check_starts(step: int) -> None:
    """Each process reads the checkpoints itself: on a disk of its own it may find others."""
    steps = require("train", "accelerate.utils").gather_object([step])
    if len(set(steps)) > 1:
        raise RuntimeError(
            "train: every process must find the same checkpoints (out on a disk that all share), "
            f"got those of steps {', '.join(map(str, steps))}"
        )
