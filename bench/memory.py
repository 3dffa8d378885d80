"""Peak extra memory of one step of a loss, forward and backward, in a process of its own.

Resident memory counts what the kernels allocate as well as torch. Gradients count, inputs do not.

    python -m bench.memory hos_ext d2sm_vr_loss 32 784 20
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import peers, timer

LOSSES = {"d2sm_loss": (1, peers.d2sm_losses), "d2sm_vr_loss": (3, peers.d2sm_vr_losses)}


def peak_mib(variant: str, op: str, shape: tuple[int, int, int]) -> float:
    """MiB by which one step's peak lies above what was resident before, in a fresh process."""
    arguments = [variant, op, *map(str, shape)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", *arguments],
        cwd=timer.ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(done.stdout)


def _status(key: str) -> float:
    """A line of /proc/self/status, MiB. Unlike getrusage's peak it is not the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def _measure(variant: str, op: str, shape: tuple[int, int, int]) -> float:
    points, losses = LOSSES[op]
    loss = losses()[variant]
    # A small step first: libraries loaded, threads started, autograd ready.
    peers.forward_backward(loss, peers.second_order_inputs(4, 32, 2, points=points))()
    step = peers.forward_backward(loss, peers.second_order_inputs(*shape, points=points))
    return extra_mib(step)


def extra_mib(step: Callable[[], Any]) -> float:
    """MiB by which the peak of a call lies above what was resident before, in this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    kept = step()
    peak = _status("VmHWM") - before
    del kept
    return peak


def main(arguments: list[str]) -> None:
    variant, op, *sizes = arguments
    torch.set_num_threads(timer.THREADS)
    batch, size, rank = map(int, sizes)
    print(_measure(variant, op, (batch, size, rank)))


if __name__ == "__main__":
    main(sys.argv[1:])
