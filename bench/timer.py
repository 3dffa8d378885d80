"""The one timer of the benches: checks that contestants agree, then times them interleaved.

A round calls every contestant once, in a random order, so that what the machine does besides falls
on all alike; ratios are taken within one process and one call of `measure`.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Contestants = Mapping[str, Callable[[], Any]]


class Timing(NamedTuple):
    """Percentiles and mean of the time of one call, microseconds."""

    p20: float
    median: float
    p80: float
    mean: float


def agree(results: Mapping[str, Sequence[Tensor]], *, against: str, rtol: float) -> None:
    """Refuses to time contestants that compute different things.

    Args:
        results: for each contestant the tensors it computed.
        against: the contestant that is taken as right.
        rtol: largest allowed error, relative to the largest entry of each expected tensor.

    Raises:
        ValueError: a result differs, in number, shape or value; the message names it.
    """
    expected = results[against]
    for name, tensors in results.items():
        if len(tensors) != len(expected):
            raise ValueError(
                f"agree: {name} must give {len(expected)} tensors like {against}, "
                f"got {len(tensors)}"
            )
        for index, (tensor, wanted) in enumerate(zip(tensors, expected, strict=True)):
            if tensor.shape != wanted.shape:
                raise ValueError(
                    f"agree: {name} must give tensor {index} of shape {tuple(wanted.shape)} like "
                    f"{against}, got {tuple(tensor.shape)}"
                )
            if not wanted.numel():
                continue
            error = float((tensor.double() - wanted.double()).abs().max())
            scale = float(wanted.double().abs().max())
            if not error <= rtol * scale:  # also true of NaN
                raise ValueError(
                    f"agree: {name} must give tensor {index} within {rtol:g} of {against}, "
                    f"got an error of {error:.3g} at a scale of {scale:.3g}"
                )


def interleave(
    contestants: Contestants,
    *,
    rounds: int,
    calls: Mapping[str, int],
    clock: Callable[[], int] = time.perf_counter_ns,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Microseconds a call, one sample a round; a sample is the mean of `calls` calls in a row.

    Args:
        contestants: what to time, by name.
        rounds: number of samples of each.
        calls: calls in a sample, by name.
        clock: nanoseconds.
        seed: of the random order in each round.
    """
    order, shuffle = list(contestants), random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            call, repeats = contestants[name], range(calls[name])
            start = clock()
            for _ in repeats:
                call()
            samples[name].append((clock() - start) / len(repeats) / 1e3)
    return samples


def measure(
    contestants: Contestants,
    *,
    seconds: float = 3.0,
    sample: float = 2e-3,
    least: int = 5,
    blocks: int = 3,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """The best of `blocks` medians of each contestant, with the percentiles of that block.

    Args:
        contestants: what to time, by name; at least one call of each should lie behind.
        seconds: about how long to measure; slow contestants may take longer.
        sample: about how long a sample lasts at least, seconds: fast calls are repeated.
        least: rounds in a block at least, however slow the contestants.
        blocks: how often the rounds are repeated.
        clock: nanoseconds.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        calls = {}
        total = 0.0
        for name, call in contestants.items():
            once = _duration(call, clock)
            if once < 0.1e9:
                once = min(once, _duration(call, clock))
            calls[name] = max(1, math.ceil(sample * 1e9 / max(once, 1)))
            total += once * calls[name]
        rounds = min(max(int(seconds * 1e9 / blocks / max(total, 1)), least), 500)
        best: dict[str, Timing] = {}
        for block in range(blocks):
            samples = interleave(contestants, rounds=rounds, calls=calls, clock=clock, seed=block)
            for name, values in samples.items():
                timing = summarise(values)
                if name not in best or timing.median < best[name].median:
                    best[name] = timing
        return best
    finally:
        if collecting:
            gc.enable()


def _duration(call: Callable[[], Any], clock: Callable[[], int]) -> int:
    start = clock()
    call()
    return clock() - start


def summarise(values: Sequence[float]) -> Timing:
    """Percentiles by linear interpolation; of one value, that value."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(tenths[1], tenths[4], tenths[7], statistics.fmean(values))


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """k of the least-squares fit values ~ sizes^k."""
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope
