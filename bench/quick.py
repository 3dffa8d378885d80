"""The gate of speed and memory in two minutes: `python -m bench.quick`, or make bench-quick.

Best of three interleaved medians, float32, two threads, against the goals in `goals`; a goal may be
missed by 15 %. With --all every goal, in about a quarter of an hour. Prints what was required and
measured, and fails where a goal is missed. On a loaded machine the small calls miss theirs: the
load average is printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch

from . import cases, goals, memory, rows

SHAPE = (32, 784, 20)
HALVED = [(16, 784, 20), (32, 392, 20), (32, 784, 10)]
LINEAR = 2.2  # half of B, D or r: half of the memory, and some room


def wanted(chosen: Iterable[goals.Goal]) -> dict[tuple[str, str, rows.Shape], set[str]]:
    """The contestants that the goals need, case by case."""
    names: dict[tuple[str, str, rows.Shape], set[str]] = {}
    for goal in chosen:
        names.setdefault(goal[:3], {"hos_ext"}).update({goal.own, *goal.against})
    return names


def speed(chosen: Sequence[goals.Goal], seconds: float) -> Iterator[goals.Verdict]:
    """Measures case after case; only the chosen goals are judged."""
    for case, names in wanted(chosen).items():
        torch.manual_seed(0)
        measured = cases.measure(cases.build(*case, only=names), seconds=seconds, least=1)
        yield from (verdict for verdict in measured.verdicts if verdict.goal in chosen)


def growth_of_memory() -> Iterator[tuple[str, float]]:
    """The peak of a loss over that at half of B, D or r, and the figure."""
    op = "d2sm_vr_loss"
    own = memory.peak_mib("loss", op, "hos_ext", *SHAPE)
    for shape in HALVED:
        ratio = own / memory.peak_mib("loss", op, "hos_ext", *shape)
        yield f"{op} peak memory {SHAPE}, {own:.1f} MiB, over that at {shape}", ratio


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.quick", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every goal, the slow ones too")
    everything = parser.parse_args(arguments).all
    torch.set_num_threads(rows.THREADS)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.compile's of itself
    here, began = rows.environment(), time.monotonic()
    print(f"{here['machine']}; torch {here['torch']}; load {os.getloadavg()[0]:.1f} at the start")
    chosen = [goal for goal in goals.GOALS if everything or goal.quick]
    missed = 0
    for verdict in speed(chosen, 3.0 if everything else 1.0):
        missed += verdict.missed
        print(verdict.line(), flush=True)
    for what, ratio in growth_of_memory():
        bad = not ratio <= LINEAR
        missed += bad
        print(f"{what:90} {ratio:12.4g} {f'<= {LINEAR}x':>9} {'MISSED' if bad else 'ok'}")
    print(f"{missed} goals missed" if missed else "all goals hold", end="")
    print(f" (slack {goals.SLACK:.0%}), {time.monotonic() - began:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
