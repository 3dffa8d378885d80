"""The gate of speed and memory in two minutes: `python -m bench.quick`, or make bench-quick.

Compares float32 at two threads, best of three interleaved medians, with what this repository has
recorded for this kind of processor (`recorded`), and fails where a figure is worse by more than
15 %. A case that is worse is measured again, twice at most: what has become slower is so each time.
Goals that are not reached are listed at the end and fail nothing.

--all takes the slow cases too, in about a quarter of an hour. --record measures each case three
times and writes the figures down, for a quiet machine and a new kind of processor or kernel. On a
loaded machine the small calls come out worse: the load average is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from . import cases, goals, memory, recorded, rows

SHAPE = (32, 784, 20)
HALVED = [(16, 784, 20), (32, 392, 20), (32, 784, 10)]
LINEAR = 2.2  # half of B, D or r: half of the memory, and some room
TRIES = 3


def wanted(chosen: Iterable[goals.Goal]) -> dict[tuple[str, str, rows.Shape], set[str]]:
    """The contestants that the goals need, case by case."""
    names: dict[tuple[str, str, rows.Shape], set[str]] = {}
    for goal in chosen:
        names.setdefault(goal[:3], {"hos_ext"}).update({goal.own, *goal.against})
    return names


def speed(
    chosen: Sequence[goals.Goal],
    seconds: float,
    known: Mapping[str, float],
    least: int = 1,
) -> Iterator[tuple[goals.Goal, list[float]]]:
    """Measures case after case; a case again where a figure is worse than a known one.

    Args:
        chosen: the goals whose figures are wanted.
        seconds: about how long a case takes.
        known: recorded figures by `Goal.describe`.
        least: measurements of each case.

    Yields:
        Each goal with its figures, one a measurement.
    """
    for case, names in wanted(chosen).items():
        torch.manual_seed(0)
        built = cases.build(*case, only=names)
        found: dict[goals.Goal, list[float]] = {}
        for attempt in range(TRIES):
            for goal, figure in cases.measure(built, seconds=seconds, least=1).verdicts:
                if goal in chosen and figure is not None:
                    found.setdefault(goal, []).append(figure)
            if attempt + 1 >= least and not any(slower(g, f, known) for g, f in found.items()):
                break
        yield from found.items()


def slower(goal: goals.Goal, figures: Sequence[float], known: Mapping[str, float]) -> bool:
    """Whether every one of the figures is worse than the recorded one."""
    than = known.get(goal.describe())
    return than is not None and all(recorded.slower(goal, figure, than) for figure in figures)


def line(goal: goals.Goal, figures: Sequence[float], known: Mapping[str, float]) -> str:
    """The best figure, what is recorded, and the judgement."""
    than = known.get(goal.describe())
    before = "not recorded" if than is None else f"recorded {than:.4g}"
    mark = "SLOWER" if slower(goal, figures, known) else "" if than is None else "ok"
    return f"{goal.describe():90} {goal.best(figures):12.4g} {before:>16} {mark}".rstrip()


def growth_of_memory() -> Iterator[tuple[str, float]]:
    """The peak of a loss over that at half of B, D or r, and the figure."""
    op = "d2sm_vr_loss"
    own = memory.peak_mib("loss", op, "hos_ext", *SHAPE)
    for shape in HALVED:
        ratio = own / memory.peak_mib("loss", op, "hos_ext", *shape)
        yield f"{op} peak memory {SHAPE}, {own:.1f} MiB, over that at {shape}", ratio


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.quick", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the slow cases too")
    parser.add_argument("--record", action="store_true", help="write the figures down")
    options = parser.parse_args(arguments)
    torch.set_num_threads(rows.THREADS)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.compile's of itself
    here, began = rows.environment(), time.monotonic()
    level = recorded.level()
    print(f"{here['machine']}, {level}; torch {here['torch']}; load {os.getloadavg()[0]:.1f}")
    chosen = [g for g in goals.GOALS if (options.all or g.quick) and g.op != goals.NEIGHBOURS]
    known = {} if options.record else recorded.figures(level)
    failed, short, found = 0, [], {}
    seconds, least = 3.0 if options.all else 1.0, TRIES if options.record else 1
    for goal, figures in speed(chosen, seconds, known, least):
        failed += slower(goal, figures, known)
        found[goal.describe()] = statistics.median(figures)
        short += [] if goal.reached(goal.best(figures)) else [(goal, goal.best(figures))]
        print(line(goal, figures, known), flush=True)
    for what, ratio in growth_of_memory():
        bad = not ratio <= LINEAR
        failed += bad
        print(f"{what:90} {ratio:12.4g} {f'<= {LINEAR}x':>16} {'MORE' if bad else 'ok'}")
    if short:
        print("goals not reached (they fail nothing):")
    for goal, figure in short:
        print(f"  {goal.describe():88} {figure:12.4g} {goal.bound():>16}")
    if options.record:
        recorded.write(found, level)
        print(f"{len(found)} figures of {level} recorded in {recorded.PATH.relative_to(rows.ROOT)}")
    missing = sum(what not in known for what in found)
    if missing and not options.record:
        print(f"{missing} cases have no figure for {level}: record them with --record")
    print(f"{failed} worse than recorded" if failed else "nothing is worse than recorded", end="")
    print(f" (slack {recorded.SLACK:.0%}), {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
