"""What the samplers take: the grid of times that they go down, and the key of their noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..checks import check, check_count, check_first, check_int
from ..random import Key, fresh_seed
from ..schedules import Schedule


def time_grid(
    where: str, schedule: Schedule, n_steps: int | None, times: Sequence[float] | Tensor | None
) -> list[float]:
    """`schedule.times(n_steps)`, or the times given, which must lie within the schedule's."""
    both = "neither" if times is None else "both"
    rule = "exactly one of n_steps and times must be given"
    check(where, (n_steps is None) != (times is None), rule, both)
    if times is None:
        check_count(where, "n_steps", n_steps)
        numbers: list[float] = schedule.times(n_steps or 0).tolist()
        return numbers
    grid = descending(where, "times", times, 2)
    low, high = schedule.t_min, schedule.t_max
    for t in (grid[0], grid[-1]):
        check(where, low <= t <= high, f"times must be in [{low:g}, {high:g}]", f"{t:g}")
    return grid


def descending(where: str, name: str, values: Sequence[float] | Tensor, least: int) -> list[float]:
    """At least so many finite numbers, each below the one before."""
    try:
        column = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        kind = type(values).__name__
        raise TypeError(f"{where}: {name} must be a sequence of numbers, got {kind}") from None
    fits, shape = column.dim() == 1 and len(column) >= least, tuple(column.shape)
    check(where, fits, f"{name} must have shape (N,), N >= {least}", shape)
    numbers: list[float] = column.tolist()
    falls = math.isfinite(numbers[0]) and all(a > b for a, b in pairwise(numbers))
    check(where, falls, f"{name} must be finite and descending", numbers)
    return numbers


def noise_key(
    where: str, shape: Sequence[int], seed: int | None, offset: int = 0, first: int = 0
) -> Key:
    """The key of noise of this shape; a seed of None is drawn from torch's default generator."""
    check_int(where, "offset", offset, 2**56)
    check_first(where, first, shape)
    if seed is None:
        seed = fresh_seed()
    check_int(where, "seed", seed, 2**64)
    return Key(seed, offset, first)


def check_chain_options(where: str, options: Iterable[str]) -> None:
    """Those arguments of `sample` that a sampler does not set itself."""
    known = ("curvature", "tolerance", "max_iterations")
    for name in options:
        rule = f"options must be among {', '.join(known)}"
        check(where, name in known, rule, repr(name), TypeError)
