"""Peak extra memory of one call, in a process of its own.

Resident memory counts what the kernels allocate as well as torch. Results count, inputs do not.

    python -m bench.memory loss d2sm_vr_loss hos_ext 32 784 20
    python -m bench.memory second_order MLP "row loop" 0
    python -m bench.memory training UNet dense 20
    python -m bench.memory sampling UNet cayley 20
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

from . import networks, peers, rows

LOSSES = {"d2sm_loss": (1, peers.d2sm_losses), "d2sm_vr_loss": (3, peers.d2sm_vr_losses)}


def peak_mib(kind: str, *arguments: object) -> float:
    """MiB by which one call's peak lies above what was resident before, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", kind, *map(str, arguments)],
        cwd=rows.ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(done.stdout)


def _loss(op: str, variant: str, *sizes: str) -> Callable[[], Any]:
    batch, size, rank = map(int, sizes)
    points, losses = LOSSES[op]
    loss = losses()[variant]
    # A small step first: libraries loaded, threads started, autograd ready.
    peers.forward_backward(loss, peers.second_order_inputs(4, 32, 2, points=points))()
    inputs = peers.second_order_inputs(batch, size, rank, points=points)
    return peers.forward_backward(loss, inputs)


def _second_order(network: str, variant: str, rank: str) -> Callable[[], Any]:
    call = networks.second_order(network, [int(rank)] if int(rank) else [])[variant].call
    networks.score_network(network)(torch.zeros(1, *networks.DIMS[network]))
    return call


def _training(network: str, loss: str, rank: str) -> Callable[[], Any]:
    step = networks.training_steps(network, int(rank), dims=networks.IMAGE[network])[loss]
    step()  # the optimiser's state, which stays
    return step


def _sampling(network: str, method: str, rank: str) -> Callable[[], Any]:
    steps = networks.sampling_steps(network, int(rank), dims=networks.IMAGE[network])
    steps["network"]()
    return steps[method]


KINDS: dict[str, Callable[..., Callable[[], Any]]] = {
    "loss": _loss,
    "second_order": _second_order,
    "training": _training,
    "sampling": _sampling,
}


def _status(key: str) -> float:
    """A line of /proc/self/status, MiB. Unlike getrusage's peak it is not the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


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
    kind, *rest = arguments
    torch.set_num_threads(rows.THREADS)
    print(extra_mib(KINDS[kind](*rest)))


if __name__ == "__main__":
    main(sys.argv[1:])
