"""The device that a training asks for, by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...checks import check

# What accelerate reads, where one process shall not take the first GPU.
_ASKED = "ACCELERATE_TORCH_DEVICE"


def check_device(where: str, name: str, value: Any) -> None:
    """auto, or a device that this machine has: cpu, cuda, cuda:1."""
    rule = f"{name} must be auto, cpu, cuda or cuda:N"
    check(where, isinstance(value, str), rule, repr(value), TypeError)
    if value == "auto":
        return
    try:
        device = torch.device(value)
    except RuntimeError:
        device = None
    check(where, device is not None and device.type != "meta", rule, repr(value))
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError):  # torch without CUDA asserts
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        rule = f"{name} must be a device of this machine ({there})"
        check(where, False, rule, repr(value))


def on_cpu(device: str) -> bool:
    """Whether a device that has been checked is the CPU, and said so."""
    return device != "auto" and torch.device(device).type == "cpu"


def check_same_device(before: torch.device, asked: str) -> None:
    """accelerate keeps the device of the first training of a process, without a word."""
    if asked == "auto":
        return
    wanted = torch.device(asked)
    same = wanted.type == before.type and wanted.index in (None, before.index or 0)
    check("train", same, f"device must stay the same within a process, {before}", asked)


@contextmanager
def asking_for(device: str, processes: int) -> Iterator[None]:
    """Inside, accelerate takes the device that is named, for a training of one process.

    Raises:
        ValueError: a number is asked for by several processes.
    """
    named = device != "auto" and not on_cpu(device)
    rule = "device must be auto, cpu or cuda where there are several processes: each has its own"
    check("train", processes == 1 or not named or torch.device(device).index is None, rule, device)
    if not named or processes > 1:
        yield
        return
    before = os.environ.get(_ASKED)
    os.environ[_ASKED] = device
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ASKED]
        else:
            os.environ[_ASKED] = before
