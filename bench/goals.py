"""The goals of speed, all of them, and what measured medians say of them.

"eager" and "compiled" are the closed form of `hos_ext.ops.reference` and torch.compile of it. The
form written for speed alone, "lean" and "lean compiled" (`peers`), is measured beside them in every
case and has no goal: its float32 value loses digits as sigma goes to 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .rows import Shape

BOTH, FORWARD = "forward+backward", "forward"


class Goal(NamedTuple):
    """A bound on one figure of one case.

    Attributes:
        op, mode, shape: the case.
        against: the contestants that `own` is compared with, by the fastest of them (at_least) or
            by the sum of their times (at_most). Empty: the microseconds of `own` by itself.
        at_least: least ratio of their time to that of `own`.
        at_most: largest ratio of the time of `own` to theirs; or microseconds.
        own: the contestant that has the goal.
        quick: whether `bench.quick` measures it; the others would take it beyond two minutes.
    """

    op: str
    mode: str
    shape: Shape
    against: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None
    own: str = "hos_ext"
    quick: bool = True

    def figure(self, medians: Mapping[str, float]) -> float | None:
        """What was measured; None where a contestant is missing."""
        if not {self.own, *self.against} <= medians.keys():
            return None
        own, others = medians[self.own], [medians[name] for name in self.against]
        if self.at_least is not None:
            return min(others) / own
        return own / sum(others) if others else own

    def reached(self, figure: float) -> bool:
        """Whether a figure is as good as the goal. NaN is not."""
        if self.at_least is not None:
            return figure >= self.at_least
        return self.at_most is not None and figure <= self.at_most

    def best(self, figures: Sequence[float]) -> float:
        """The best of some figures."""
        return max(figures) if self.at_least is not None else min(figures)

    def describe(self) -> str:
        what = f"{self.op} {self.mode} {self.shape}"
        if self.at_least is not None:
            return f"{what}: {' or '.join(self.against)} over {self.own}"
        over = f" over {' + '.join(self.against)}" if self.against else ""
        return f"{what}: {self.own}{over}"

    def bound(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}x"
        return f"<= {self.at_most:g}{'x' if self.against else ' us'}"


# (B, D, r): over the eager closed form, over torch.compile of it, over D x D matrices.
_D2SM_VR: dict[Shape, tuple[float, float, float | None]] = {
    (32, 784, 20): (9, 3.5, 500),
    (64, 784, 50): (8, 3.5, 300),
    (256, 100, 20): (6, 3.5, 45),
    (16, 3072, 20): (9, 3.5, None),  # cannot run within `cases.MEMORY_LIMIT`
    (1024, 2, 2): (5, 3, 4),
    (8, 784, 200): (3.3, 2.7, 14),
}
# Without gradients: over eager, over compiled.
_D2SM_VR_FORWARD: dict[Shape, tuple[float, float]] = {
    shape: (3, 2.5) if shape[2] == 200 else (5, 3.5) for shape in _D2SM_VR
}
# One step with its noise: over eager, over compiled; and the same into `out=`.
_OZAKI: dict[Shape, tuple[float, float]] = {
    (10, 2, 0): (10, 10),
    (1000, 2, 0): (10, 10),
    (1000, 784, 0): (10, 12),
    (4096, 3072, 0): (10, 8),
}
_OZAKI_OUT: dict[Shape, tuple[float, float]] = {
    (1000, 784, 0): (12, 15),
    (4096, 3072, 0): (40, 15),
}
# Over the fastest that torch has, into a fresh tensor; and into `out=`.
_ASSEMBLE: dict[Shape, float] = {(32, 784, 20): 3, (64, 100, 20): 1.3, (64, 96, 20): 1.3}
_ASSEMBLE_OUT: dict[Shape, float] = {(32, 784, 20): 2}

TINY = (10, 2, 0)
# Trainings beside a busy process on every core; batch, entries and rank of the digits.
NEIGHBOURS, WHOLE_RUN, DIGITS = "training beside neighbours", "whole run", (64, 64, 10)
SIZES = tuple(_D2SM_VR)
STEPS = tuple(_OZAKI)
MATRICES = tuple(_ASSEMBLE)
# Compilation of these takes longer than all else that the quick gate does.
_COMPILED_QUICKLY = {(32, 784, 20), (1024, 2, 2), *list(_OZAKI)[:3]}
_DENSE_QUICKLY = {(32, 784, 20), (256, 100, 20), (1024, 2, 2)}


def _all() -> Iterable[Goal]:
    loss, step, assemble = "d2sm_vr_loss", "ozaki_step", "assemble_hessian"
    for shape, (eager, compiled, dense) in _D2SM_VR.items():
        quick = shape in _COMPILED_QUICKLY
        yield Goal(loss, BOTH, shape, ("eager",), eager)
        yield Goal(loss, BOTH, shape, ("compiled",), compiled, quick=quick)
        if dense is not None:
            yield Goal(loss, BOTH, shape, ("dense",), dense, quick=shape in _DENSE_QUICKLY)
    for shape, (eager, compiled) in _D2SM_VR_FORWARD.items():
        yield Goal(loss, FORWARD, shape, ("eager",), eager)
        yield Goal(loss, FORWARD, shape, ("compiled",), compiled, quick=False)
    for own, table in (("hos_ext", _OZAKI), ("hos_ext out=", _OZAKI_OUT)):
        for shape, (eager, compiled) in table.items():
            quick = shape in _COMPILED_QUICKLY
            yield Goal(step, FORWARD, shape, ("eager",), eager, own=own)
            yield Goal(step, FORWARD, shape, ("compiled",), compiled, own=own, quick=quick)
    fresh = ("bmm", "baddbmm", "bmm compiled", "baddbmm compiled")
    for shape, ratio in _ASSEMBLE.items():
        yield Goal(assemble, FORWARD, shape, fresh, ratio)
    for shape, ratio in _ASSEMBLE_OUT.items():
        yield Goal(assemble, FORWARD, shape, ("bmm out=",), ratio, own="hos_ext out=")
    yield Goal(step, FORWARD, TINY, (), at_most=6)
    yield Goal(step, BOTH, TINY, ("eager",), 2.5)
    for kind in ("coarse", "fine"):
        yield Goal(f"alternating, {kind}", FORWARD, TINY, ("torch", "hos_ext"), at_most=1.1,
                   own="both", quick=False)  # fmt: skip
    for own, over, most in (("passive beside", "passive", 3), ("passive", "spinning", 1.03)):
        yield Goal(NEIGHBOURS, WHOLE_RUN, DIGITS, (over,), at_most=most, own=own, quick=False)
    for shape in ((32, 784, 20), (64, 784, 50)):
        yield Goal("threads", BOTH, shape, ("one thread",), 1.7, own="two threads", quick=False)


GOALS = tuple(_all())


# On a GPU: (B, D, r) of d2sm_vr_loss; "floor" is the time of `floors` at the rates measured there.
GPU_SIZES: tuple[Shape, ...] = (
    (4096, 784, 20),
    (1024, 784, 50),
    (512, 3072, 50),
    (65536, 2, 2),
    (16, 196608, 16),
)
GPU_STEP, GPU_MATRIX = (65536, 1024, 0), (64, 3072, 50)
GPU_LATENCIES: tuple[Shape, ...] = ((10, 2, 0), (1000, 784, 0))
LATENCY, MEMORY = "host latency", "memory"


def _all_gpu() -> Iterable[Goal]:
    loss, step = "d2sm_vr_loss", "ozaki_step"
    for shape in GPU_SIZES:
        yield Goal(loss, BOTH, shape, ("floor",), 0.6)
        yield Goal(loss, BOTH, shape, ("compiled",), 3)
        yield Goal(loss, BOTH, shape, ("dense",), 100)
        yield Goal(loss, MEMORY, shape, ("inputs", "gradients"), at_most=1.3)
    yield Goal(step, FORWARD, GPU_STEP, ("floor",), 0.9)
    yield Goal(step, FORWARD, GPU_STEP, ("eager",), 5)
    yield Goal(step, FORWARD, GPU_STEP, ("compiled",), 1)
    for shape in GPU_LATENCIES:
        yield Goal(step, LATENCY, shape, ("compiled",), 3)
    yield Goal("assemble_hessian", FORWARD, GPU_MATRIX, ("fill",), 0.85)
    yield Goal(
        "assemble_hessian",
        FORWARD,
        GPU_MATRIX,
        ("bmm", "baddbmm", "bmm compiled", "baddbmm compiled"),
        1,
    )


GPU_GOALS = tuple(_all_gpu())


class Verdict(NamedTuple):
    """A goal with what was measured: None is not measured."""

    goal: Goal
    figure: float | None

    @property
    def reached(self) -> bool | None:
        return None if self.figure is None else self.goal.reached(self.figure)

    def line(self) -> str:
        shown = "not measured" if self.figure is None else f"{self.figure:.4g}"
        mark = {None: "", True: "reached", False: "NOT REACHED"}[self.reached]
        return f"{self.goal.describe():90} {shown:>12} {self.goal.bound():>9} {mark}".rstrip()


def judge(
    op: str,
    mode: str,
    shape: Shape,
    *groups: Mapping[str, float],
    among: Iterable[Goal] = GOALS,
) -> list[Verdict]:
    """The verdicts on one case.

    Args:
        op, mode, shape: the case.
        among: the goals that count.
        groups: medians of contestants that were timed together; the first group with all those
            that a goal names counts.
    """
    verdicts = []
    for goal in among:
        if (op, mode, shape) == goal[:3]:
            figures = [goal.figure(medians) for medians in groups]
            known = [figure for figure in figures if figure is not None]
            verdicts.append(Verdict(goal, known[0] if known else None))
    return verdicts
