"""A case is an operator at one mode and size with its contestants, whose results have been checked.

The benches and the quick gate time the same cases; `goals` names those that have goals.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hos_ext

from . import floors, goals, peers, rows, timer
from .goals import BOTH, FORWARD, TINY
from .rows import Shape

STEP_SIZE = 0.1
# What the dense formulation may hold: about seven batches of D x D float32 matrices in training
# (measured: 528 MiB at B 32, D 784). Where it would need more, it is not run and so reported.
MEMORY_LIMIT = 2 << 30
DENSE_MATRICES = 7


class Case(NamedTuple):
    """Contestants that agree; the slow ones are timed apart, or the others would get few rounds."""

    op: str
    mode: str
    shape: Shape
    fast: dict[str, Callable[[], Any]]
    slow: dict[str, Callable[[], Any]]
    work: floors.Work | None


def dense_bytes(shape: Shape) -> int:
    """What the dense formulation of a variance-reduced loss holds at its peak."""
    batch, size, _ = shape
    return DENSE_MATRICES * batch * size * size * floors.FLOAT


def build(op: str, mode: str, shape: Shape, only: Container[str] | None = None) -> Case:
    """The case with its results checked.

    Args:
        op: "d2sm_loss", "d2sm_vr_loss", "ozaki_step", "assemble_hessian", "alternating, coarse",
            "alternating, fine" or "threads".
        mode: "forward" without gradients, or "forward+backward".
        shape: B, D, r.
        only: names of the contestants wanted; None is all.

    Raises:
        ValueError: contestants disagree.
    """
    torch.compiler.reset()  # sizes before this one would count as recompilations
    if op in ("d2sm_loss", "d2sm_vr_loss"):
        return _loss(op, mode, shape, only)
    if op == "ozaki_step":
        return _step_gradient(shape) if mode == BOTH else _step(shape, only)
    if op == "assemble_hessian":
        return _assembly(shape, only)
    if op == "threads":
        return _threads(shape)
    return _alternating(op)


def _keep(contestants: dict[str, Any], only: Container[str] | None) -> dict[str, Any]:
    return {name: c for name, c in contestants.items() if only is None or name in only}


def _loss(op: str, mode: str, shape: Shape, only: Container[str] | None) -> Case:
    points = 3 if op == "d2sm_vr_loss" else 1
    losses = peers.d2sm_vr_losses() if points == 3 else peers.d2sm_losses()
    inputs = peers.second_order_inputs(*shape, points=points)
    if dense_bytes(shape) > MEMORY_LIMIT or mode == FORWARD:
        del losses["dense"]
    call = peers.forward_backward if mode == BOTH else peers.forward
    steps = {name: call(loss, inputs) for name, loss in _keep(losses, only).items()}
    if points == 3 and mode == BOTH:
        steps |= _keep({"kernels": peers.kernels(inputs)}, only)
    checked = steps if "eager" in steps else {"eager": call(losses["eager"], inputs)} | steps
    results = {name: [t.clone() for t in step()] for name, step in checked.items()}
    timer.agree(results, against="eager", rtol=1e-4)
    slow = {"dense": steps.pop("dense")} if "dense" in steps else {}
    work = floors.d2sm_loss(shape, points=points, backward=mode == BOTH)
    return Case(op, mode, shape, steps, slow, work)


def _step(shape: Shape, only: Container[str] | None) -> Case:
    batch, size, _ = shape
    inputs = peers.step_inputs(batch, size)
    steps = _keep(peers.ozaki_steps(inputs, STEP_SIZE), only)
    with torch.no_grad():
        peers.check_ozaki_steps(steps, inputs, STEP_SIZE)
    slow = {name: steps.pop(name) for name in ("eager", "compiled") if name in steps}
    if batch * size < 4 << 20:
        steps, slow = steps | slow, {}
    return Case("ozaki_step", FORWARD, shape, steps, slow, floors.step(shape))


def _step_gradient(shape: Shape) -> Case:
    batch, size, _ = shape
    inputs = peers.step_inputs(batch, size)
    steps = {
        name: peers.forward_backward(function, inputs)
        for name, function in peers.ozaki_gradients(inputs, STEP_SIZE).items()
    }
    results = {name: [t.clone() for t in step()] for name, step in steps.items()}
    timer.agree(results, against="eager", rtol=1e-4)
    return Case("ozaki_step", BOTH, shape, steps, {}, floors.step(shape, backward=True))


def _assembly(shape: Shape, only: Container[str] | None) -> Case:
    steps = _keep(peers.assemblies(peers.hessian_inputs(*shape)), only)
    with torch.no_grad():
        results = {name: [step().clone()] for name, step in steps.items()}
    timer.agree(results, against="hos_ext", rtol=1e-5)
    return Case("assemble_hessian", FORWARD, shape, steps, {}, floors.assembly(shape))


def _threads(shape: Shape) -> Case:
    """The loss with one thread and with two: each call sets its number first."""
    step = peers.forward_backward(hos_ext.d2sm_vr_loss, peers.second_order_inputs(*shape, points=3))

    def with_threads(count: int) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            torch.set_num_threads(count)
            return step()

        return call

    steps = {"one thread": with_threads(1), "two threads": with_threads(2)}
    results = {name: [t.clone() for t in call()] for name, call in steps.items()}
    timer.agree(results, against="one thread", rtol=1e-6)
    return Case("threads", BOTH, shape, steps, {}, None)


def _alternating(op: str) -> Case:
    """torch's operators and ours by themselves, and by turns: neither may slow the other down."""
    if op == "alternating, coarse":
        matrix, size = torch.randn(512, 512), (1000, 784)
        out = torch.empty(512, 512)
        other: Callable[[], Tensor] = lambda: torch.mm(matrix, matrix, out=out)  # noqa: E731
    else:
        vector, size = torch.randn(200_000), (1000, 32)
        other = lambda: torch.relu(vector)  # noqa: E731
    x, score, diag = peers.step_inputs(*size)
    state = torch.empty_like(x)

    def own() -> Tensor:
        return hos_ext.ozaki_step(x, score, diag, STEP_SIZE, seed=1, out=state)

    def both() -> None:
        other()
        own()

    return Case(op, FORWARD, TINY, {"torch": other, "hos_ext": own, "both": both}, {}, None)


class Measured(NamedTuple):
    """The times of a case; the ratios to "hos_ext" (or to its first); the verdicts of its goals."""

    case: Case
    times: dict[str, timer.Timing]
    ratios: dict[str, float]
    verdicts: list[goals.Verdict]

    def rows(self) -> list[rows.Row]:
        work = self.case.work
        floor_us = None if work is None else floors.floor_us(work)
        return [
            rows.row(
                *(self.case.op, name, self.case.mode, self.case.shape),
                timing=timing,
                moved=None if work is None else work.moved,
                floor_us=floor_us,
            )
            for name, timing in self.times.items()
        ]


def measure(case: Case, *, seconds: float = 3.0, least: int = 3) -> Measured:
    """The best of three medians of each contestant.

    Args:
        case: what to time.
        seconds: about how long, for the fast ones.
        least: rounds of each of three blocks at least, for the slow ones.
    """
    with torch.set_grad_enabled(case.mode != FORWARD):
        times = timer.measure(case.fast, seconds=seconds)
        groups = [{name: t.median for name, t in times.items()}]
        if case.slow:
            own = {name: c for name, c in case.fast.items() if name.startswith("hos_ext")}
            apart = timer.measure(own | case.slow, sample=0.05, least=least, seconds=0)
            groups.append({name: t.median for name, t in apart.items()})
            times |= {name: apart[name] for name in case.slow}
    base = "hos_ext" if "hos_ext" in groups[0] else next(iter(groups[0]))
    ratios = {name: t / group[base] for group in reversed(groups) for name, t in group.items()}
    return Measured(case, times, ratios, goals.judge(*case[:3], *groups))
