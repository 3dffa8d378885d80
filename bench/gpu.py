"""The operators on a GPU: `python -m bench.gpu --record bench/results/gpu.csv`, or make gpu.

Times of the device by CUDA events: before each sample the L2 cache is overwritten and the queue
held back, so that the events see neither warm inputs nor the host. Host latency is wall time of
calls that nothing waits for. Contestants are checked against each other, then take turns; medians.
Floors are at the rates measured here: a copy of large buffers, a float32 product without TF32.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hos_ext

from . import cases, floors, goals, peers, report, rows, timer
from .goals import BOTH, FORWARD, LATENCY, MEMORY
from .rows import Row, Shape

SCRUBBED = 512 << 20  # bytes, several times any L2 cache
CYCLES_PER_US = 2000  # of _sleep, about
Calls = Mapping[str, Callable[[], Any]]


def place(command: str) -> Row:
    """What a row says of the GPU."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "command": command,
    }


@cache
def _scrubber() -> Tensor:
    return torch.empty(SCRUBBED // 4, dtype=torch.int32, device="cuda")


def device_us(call: Callable[[], Any], ahead_us: float) -> float:
    """One call's microseconds on the device; the queue is held back for `ahead_us` before it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _scrubber().zero_()
    torch.cuda._sleep(int(ahead_us * CYCLES_PER_US))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def host_us(call: Callable[[], Any], repeats: int = 50) -> float:
    """Wall time of a call while the device keeps up or lags behind."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / repeats * 1e6


def measure(calls: Calls, *, seconds: float = 4.0, host: bool = False) -> dict[str, timer.Timing]:
    """Percentiles of each contestant, all taking turns in random order."""
    ahead, once = {}, {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        ahead[name] = 3 * host_us(call, 2) + 200
        once[name] = host_us(call) if host else device_us(call, ahead[name])
    spent = sum(
        (50 if host else 1) * us + (0 if host else ahead[n] + 300) for n, us in once.items()
    )
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(min(100, max(5, int(seconds * 1e6 / spent)))):
        shuffle(order)
        for name in order:
            call = calls[name]
            samples[name].append(host_us(call) if host else device_us(call, ahead[name]))
    return {name: timer.summarise(values) for name, values in samples.items()}


@cache
def copy_rate() -> float:
    """Bytes a microsecond, read and written, of a copy of 2 GiB or what fits."""
    count = min(1 << 29, torch.cuda.mem_get_info()[0] // 4 // 4)
    source, target = (torch.ones(count, device="cuda") for _ in range(2))
    return 8 * count / measure({"copy": lambda: target.copy_(source)}, seconds=1.0)["copy"].median


@cache
def flop_rate() -> float:
    """Float32 operations a microsecond of a large product, TF32 off."""
    n = 8192
    a, b, out = (torch.randn(n, n, device="cuda") for _ in range(3))
    call = {"product": lambda: torch.mm(a, b, out=out)}
    return 2 * n**3 / measure(call, seconds=1.0)["product"].median


def floor_us(work: floors.Work) -> float:
    return max(work.moved / copy_rate(), work.flops / flop_rate())


def _there(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.cuda() for t in tensors]


def _rows(
    op: str, mode: str, shape: Shape, times: Mapping[str, timer.Timing], work: floors.Work | None
) -> list[Row]:
    floor = None if work is None else floor_us(work)
    found = [
        rows.row(
            *(op, name, mode, shape),
            timing=timing,
            moved=None if work is None else work.moved,
            floor_us=floor,
        )
        for name, timing in times.items()
    ]
    if floor is not None:
        found.append(rows.row(op, "floor", mode, shape, timing=timer.Timing(*[floor] * 4)))
    return found


def _fits(needed: float) -> bool:
    return needed < 0.9 * torch.cuda.mem_get_info()[0]


def losses(shape: Shape, mode: str, seconds: float) -> Iterator[Row]:
    """d2sm_vr_loss against the closed form and, where it fits, the dense formulation."""
    batch, size, rank = shape
    held = 4 * batch * size * (3 * rank + 7)
    if not _fits(8 * held):
        print(
            f"d2sm_vr_loss {mode} {shape}: left out, needs about {8 * held >> 30} GiB", flush=True
        )
        return
    inputs = _there(peers.second_order_inputs(*shape, points=3))
    functions = peers.d2sm_vr_losses()
    if not _fits(cases.dense_bytes(shape) + held) or mode == FORWARD:
        del functions["dense"]
    call = peers.forward_backward if mode == BOTH else peers.forward
    calls = {name: call(function, inputs) for name, function in functions.items()}
    results = {}
    for name, step in calls.items():
        results[name] = [t.clone() for t in step()]
        timer.agree({"eager": results.get("eager", results[name]), name: results[name]},
                    against="eager", rtol=1e-4)  # fmt: skip
        if name not in ("eager", "hos_ext"):
            del results[name]
    timer.agree(results, against="eager", rtol=1e-4)
    del results
    work = floors.d2sm_loss(shape, points=3, backward=mode == BOTH)
    yield from _rows("d2sm_vr_loss", mode, shape, measure(calls, seconds=seconds), work)
    if mode == BOTH:
        yield from _memory(shape, inputs, calls["hos_ext"])


def _memory(shape: Shape, inputs: Sequence[Tensor], call: Callable[[], Any]) -> Iterator[Row]:
    """Peak of a forward and backward pass, the inputs counted; beside what it must hold."""
    given = sum(t.nbytes for t in inputs)
    gradients = sum(t.nbytes for t in inputs[:3])
    del call()[1:]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    # Gradients of the call before are freed in it: what was held then counts as the new ones.
    grown = torch.cuda.max_memory_allocated() - before
    sizes = {"hos_ext": given + gradients + grown, "inputs": given, "gradients": gradients}
    for name, size in sizes.items():
        mebibytes = size / 2**20
        yield rows.row(
            "d2sm_vr_loss", name, MEMORY, shape, timing=timer.Timing(*[mebibytes] * 4)
        ) | {"us_p20": "", "us_p80": "", "us_mean": "", "peak_mib": f"{mebibytes:.6g}"}


def steps(shape: Shape, seconds: float, *, host: bool = False) -> Iterator[Row]:
    batch, size, _ = shape
    inputs = _there(peers.step_inputs(batch, size))
    calls = peers.ozaki_steps(inputs, cases.STEP_SIZE)
    with torch.no_grad():
        peers.check_ozaki_steps(calls, inputs, cases.STEP_SIZE)
        times = measure(calls, seconds=seconds, host=host)
    work = None if host else floors.step(shape)
    yield from _rows("ozaki_step", LATENCY if host else FORWARD, shape, times, work)


def matrices(shape: Shape, seconds: float) -> Iterator[Row]:
    """assemble_hessian; "fill" writes as many bytes and reads none."""
    batch, size, _ = shape
    if not _fits(6 * 4 * batch * size * size):
        print(f"assemble_hessian {shape}: left out, it does not fit", flush=True)
        return
    calls = peers.assemblies(_there(peers.hessian_inputs(*shape)))
    with torch.no_grad():
        wanted = [calls["hos_ext"]()]
        for name, call in calls.items():
            timer.agree({"hos_ext": wanted, name: [call()]}, against="hos_ext", rtol=1e-5)
        del wanted
        filled = torch.empty(batch, size, size, device="cuda")
        times = measure({**calls, "fill": lambda: filled.fill_(1.0)}, seconds=seconds)
    yield from _rows("assemble_hessian", FORWARD, shape, times, floors.assembly(shape))


def rates() -> Iterator[Row]:
    """What the machine gives: bytes of a copy, and products (`gbps` is then GFLOP/s)."""
    for name, rate, amount in (
        ("copy", copy_rate(), 4 << 30),
        ("product", flop_rate(), 2 * 8192**3),
    ):
        timing = timer.Timing(*[amount / rate] * 4)
        yield rows.row("rates", name, FORWARD, (1, 1, 0), timing=timing, moved=amount)


def everything(seconds: float) -> Iterator[Row]:
    yield from rates()
    for shape in goals.GPU_LATENCIES:
        yield from steps(shape, seconds, host=True)
    yield from steps(goals.GPU_STEP, seconds)
    yield from matrices(goals.GPU_MATRIX, seconds)
    for shape in goals.GPU_SIZES:
        for mode in (FORWARD, BOTH):
            torch.compiler.reset()
            torch.cuda.empty_cache()
            yield from losses(shape, mode, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="append the rows to this CSV file")
    parser.add_argument("--seconds", type=float, default=4.0, help="about, for each case")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() and hos_ext.build_info()["cuda_built"]):
        parser.error("needs a GPU, and hos_ext built with CUDA")
    torch.backends.cuda.matmul.allow_tf32 = False
    where = place(" ".join(["python -m bench.gpu", *(arguments or sys.argv[1:])]))
    found = []
    for line in everything(options.seconds):
        found.append(line)
        print(*(f"{line[k]:>12}" for k in ("op", "variant", "mode", "B", "D", "r", "us_p50")),
              line["share_of_floor"], flush=True)  # fmt: skip
        if options.record:
            rows.append(options.record, [line], place=where)
    here = rows.environment() | where
    print(report.render([{**here, **line} for line in found]))
    missed = [
        v for v in report.verdicts([{**here, **line} for line in found]) if v.reached is False
    ]
    for verdict in missed:
        print(verdict.line())
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
