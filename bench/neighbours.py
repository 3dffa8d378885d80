"""A training alone on the machine, and beside a busy process on every core.

The contestants differ in how OpenMP's threads wait: `passive`, as the command line has it, and
`spinning`, OpenMP's own choice. Each is a whole `hos-ext train` of the digits, from its start to
its end; what is beside busy neighbours is cut off after `LIMIT` seconds.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hos_ext import idle

from .rows import ROOT
from .timer import Timing

STEPS, ROUNDS, LIMIT = 300, 3, 120.0
# Another runtime's setting: that the user has decided is all it says to ours.
WAITING: dict[str, dict[str, str]] = {"passive": {}, "spinning": {"KMP_BLOCKTIME": "200"}}


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds(waiting: str, steps: int, limit: float = LIMIT) -> float:
    """Wall time of a training, at most `limit`."""
    environment = {k: v for k, v in os.environ.items() if k not in idle.SAID} | WAITING[waiting]
    command = [sys.executable, "-m", "hos_ext.app.cli", "train", "--data", "digits"]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--steps", str(steps), "--out", str(Path(folder) / "run"), "--quiet"]
        began = time.perf_counter()
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=limit)
        return time.perf_counter() - began


def measure(
    steps: int = STEPS, rounds: int = ROUNDS, neighbours: int | None = None
) -> dict[str, Timing]:
    """Times by name: "passive", "spinning", and each of them "beside".

    Args:
        steps: of each training.
        rounds: of all of them, interleaved.
        neighbours: busy processes; None is one a core.
    """
    count = len(os.sched_getaffinity(0)) if neighbours is None else neighbours
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for waiting in WAITING:
            found.setdefault(waiting, []).append(seconds(waiting, steps))
        with busy(count):
            for waiting in WAITING:
                found.setdefault(f"{waiting} beside", []).append(seconds(waiting, steps))
    return {
        name: Timing(
            min(t) * 1e6, statistics.median(t) * 1e6, max(t) * 1e6, statistics.mean(t) * 1e6
        )
        for name, t in found.items()
    }
