"""Long chains and long training, in shares: nothing grows, and every NaN is counted.

    python python_tests/faults/soak.py --minutes 10
    make soak

Chains: 10^5 chains of a normal law in two dimensions, towards 10^4 steps. A share is some steps of
all of them, handed on by the state. In each share some chains, other ones each time, are given a
score that is NaN at one step: those and no others must be counted as diverged, and they start anew.
Training: the smallest model, towards 10^7 steps, in shares that resume from a checkpoint.

The resident size is sampled after each share, and a line is fitted through the second half of the
samples. Threads and open files are counted. `soak.json` keeps how far all of it has come.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hos_ext import sampling
from hos_ext.app import cli

RECORD = Path(__file__).with_name("soak.json")
CHAINS, SHARE, BAD = 100_000, 20, 37
SMALL = ["--model=mlp", "--rank=0", "--width=4", "--head-width=4", "--depth=1", "--head-depth=1"]
SMALL += ["--batch-size=2", "--tracker=none", "--decay=constant", "--save-every=1000000"]


def resident() -> int:
    """Bytes that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sample_of_process() -> tuple[int, int, int]:
    """Resident bytes, threads and open files."""
    return resident(), threading.active_count(), len(os.listdir("/proc/self/fd"))


def fitted(samples: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Slope of the resident size over the second half, and whether it is within its noise."""
    half = np.array(samples[len(samples) // 2 :], dtype=float)
    if len(half) < 4:
        return {"samples": len(samples)}
    x, y = np.arange(len(half)), half[:, 0] / 2**20
    (slope, _), residual, *_ = np.polyfit(x, y, 1, full=True)
    noise = float(np.sqrt(residual.sum() / max(len(x) - 2, 1) / np.square(x - x.mean()).sum()))
    return {
        "samples": len(samples),
        "slope_MiB_a_share": round(float(slope), 4),
        "standard_error": round(noise, 4),
        "threads": sorted({int(n) for n in half[:, 1]}),
        "files": sorted({int(n) for n in half[:, 2]}),
    }


def soak_chains(until: float, record: dict[str, Any]) -> None:
    """Shares of steps of all chains; what was injected and what was counted must be equal."""
    state: Any = None
    samples = []
    rng = np.random.default_rng(record["shares"])
    while time.monotonic() < until and record["steps"] < 10_000:
        bad = torch.from_numpy(rng.choice(CHAINS, BAD, replace=False))
        at, call = int(rng.integers(SHARE)), 0

        def score(x: torch.Tensor, bad=bad, at=at) -> torch.Tensor:
            nonlocal call
            found = -x
            if call == at:
                found = found.index_fill(0, bad, torch.nan)
            call += 1
            return found

        options: dict[str, Any] = {"step_size": 0.1, "n_steps": SHARE, "thin": SHARE}
        if state is None:
            start = torch.zeros(CHAINS, 2)
            chains = sampling.sample(score, start, seed=record["shares"], **options)
        else:
            chains = sampling.sample(score, state=state, **options)
        counted = chains.stats["diverged"].nonzero().flatten()
        if not torch.equal(counted, bad.sort().values):
            record["miscounted"] += 1
        others = torch.ones(CHAINS, dtype=torch.bool).index_fill(0, bad, False)
        if not bool(chains.state["x"][others].isfinite().all()):
            record["miscounted"] += 1
        state = chains.state
        state["x"][bad] = 0.0
        record["shares"] += 1
        record["steps"] += SHARE
        record["injected"] += BAD
        record["counted"] += len(counted)
        samples.append(sample_of_process())
    record["memory"] = fitted(samples)


def soak_training(until: float, record: dict[str, Any]) -> None:
    """Shares of training steps of one run, each resumed from the checkpoint before."""
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "x.npy", np.random.default_rng(0).normal(size=(64, 2)))
        run, steps, share = str(Path(folder) / "run"), 0, 500
        while time.monotonic() < until and record["steps"] < 10**7:
            steps += share
            words = ["resume", run, "--steps", str(steps)]
            if steps == share:
                words = ["train", "--data", f"npy:{folder}/x.npy", "--out", run, *SMALL]
                words += ["--steps", str(steps)]
            assert cli.run(words) == 0
            record["steps"] += share
            samples.append(sample_of_process())
    record["memory"] = fitted(samples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "command": "soak.py",
        "chains": {
            "chains": CHAINS,
            "shares": 0,
            "steps": 0,
            "injected": 0,
            "counted": 0,
            "miscounted": 0,
        },
        "training": {"steps": 0},
        "minutes": 0.0,
    }
    if RECORD.exists():
        record |= json.loads(RECORD.read_text(encoding="utf-8"))
    start = time.monotonic()
    soak_chains(start + 30 * asked.minutes, record["chains"])
    soak_training(start + 60 * asked.minutes, record["training"])
    record["minutes"] = round(record["minutes"] + (time.monotonic() - start) / 60, 1)
    print(json.dumps(record, indent=2))
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record["chains"]["miscounted"] > 0


if __name__ == "__main__":
    sys.exit(main())
