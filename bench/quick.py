"""The bars of speed and memory in under two minutes: `python -m bench.quick`, or make bench-quick.

Best of three interleaved medians, float32, two threads; a bar may be missed by 15 %. Prints what
was required and measured, and fails where a bar is missed. On a loaded machine the small calls miss
theirs: the load average is printed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import memory, peers, timer

SHAPE = (32, 784, 20)
HALVED = [(16, 784, 20), (32, 392, 20), (32, 784, 10)]
SLACK = 0.15


class Bar(NamedTuple):
    """A measured figure and its bound: at least, or at most, or None (for information)."""

    what: str
    measured: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    def holds(self) -> bool:
        if self.at_least is not None and not self.measured >= self.at_least * (1 - SLACK):
            return False
        return self.at_most is None or self.measured <= self.at_most * (1 + SLACK)

    def required(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"


def loss_bars() -> list[Bar]:
    inputs = peers.second_order_inputs(*SHAPE, points=3)
    steps = {
        name: peers.forward_backward(loss, inputs) for name, loss in peers.d2sm_vr_losses().items()
    }
    timer.agree({name: step() for name, step in steps.items()}, against="eager", rtol=1e-4)
    dense = steps.pop("dense")
    fast = timer.measure(steps)
    slow = timer.measure({"hos_ext": steps["hos_ext"], "dense": dense}, sample=0.05, least=1)
    what = f"d2sm_vr_loss forward+backward {SHAPE}"
    own = fast["hos_ext"].median
    return [
        Bar(f"{what}, hos_ext", own / 1e3, "ms"),
        Bar("  eager / hos_ext", fast["eager"].median / own, "x"),
        Bar("  compiled / hos_ext", fast["compiled"].median / own, "x", at_least=2.5),
        Bar("  lean / hos_ext", fast["lean"].median / own, "x"),
        Bar("  lean compiled / hos_ext", fast["lean compiled"].median / own, "x"),
        Bar("  dense / hos_ext", slow["dense"].median / slow["hos_ext"].median, "x", at_least=300),
    ]


@torch.no_grad()
def step_bars() -> list[Bar]:
    inputs = peers.step_inputs(1000, 784)
    steps = peers.ozaki_steps(inputs, 0.1)
    peers.check_ozaki_steps(steps, inputs, 0.1)
    large = timer.measure(steps)
    tiny_inputs = peers.step_inputs(10, 2)
    tiny_steps = {
        name: step
        for name, step in peers.ozaki_steps(tiny_inputs, 0.1).items()
        if name != "compiled"
    }
    peers.check_ozaki_steps(tiny_steps, tiny_inputs, 0.1)
    tiny = timer.measure(tiny_steps)
    own = large["hos_ext"].median
    return [
        Bar("ozaki_step with noise (1000, 784), hos_ext", own / 1e3, "ms"),
        Bar("  eager / hos_ext", large["eager"].median / own, "x", at_least=10),
        Bar("  compiled / hos_ext", large["compiled"].median / own, "x", at_least=8),
        Bar("ozaki_step (10, 2), hos_ext", tiny["hos_ext"].median, "us", at_most=10),
        *(
            Bar(f"  {name}", tiny[name].median, "us")
            for name in ("hos_ext out=", "hos_ext unseeded", "eager")
        ),
    ]


def memory_bars() -> list[Bar]:
    """Linear in B, D and r: half of one of them, half of the memory, and some room."""
    op = "d2sm_vr_loss"
    own = memory.peak_mib("hos_ext", op, SHAPE)
    bars = [
        Bar(f"{op} peak extra memory {SHAPE}, hos_ext", own, "MiB"),
        *(
            Bar(f"  {name}", memory.peak_mib(name, op, SHAPE), "MiB")
            for name in ("eager", "lean", "dense")
        ),
    ]
    return bars + [
        Bar(f"  hos_ext, over that at {shape}", own / memory.peak_mib("hos_ext", op, shape), "x",
            at_most=2.2)
        for shape in HALVED
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    if arguments:
        print(f"bench.quick: takes no arguments, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    torch.set_num_threads(timer.THREADS)
    torch.manual_seed(0)
    here = timer.environment()
    print(f"{here['machine']}; torch {here['torch']}; load {os.getloadavg()[0]:.1f} at the start")
    missed = 0
    for group in (loss_bars, step_bars, memory_bars):
        for bar in group():
            mark = "" if bar.at_least is None and bar.at_most is None else "ok"
            if not bar.holds():
                mark, missed = "MISSED", missed + 1
            print(f"{bar.what:58} {bar.measured:9.4g} {bar.unit:4} {bar.required():8} {mark}")
    print(f"{missed} bars missed" if missed else "all bars hold", f"(slack {SLACK:.0%})")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
