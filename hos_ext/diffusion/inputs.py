"""What the samplers take: options by name, the grid of times, and the key of their noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypedDict

import torch
from torch import Tensor

from ..checks import check, check_count, check_first, check_int
from ..conditions import Conditions
from ..random import Key, fresh_seed
from ..sampling.methods import StepOptions
from ..schedules import Schedule


class GridOptions(TypedDict, total=False):
    """How a sampler goes down in time. Exactly one of n_steps and times must be given.

    Attributes:
        n_steps: steps of the grid `schedule.times(n_steps)`.
        times: a descending grid of at least two times within [t_min, t_max].
        first: global index of row 0. Default 0.
        chunk_size: samples run this many at a time, which bounds the model's memory. None, the
            default: all.
        model_kwargs: conditions, such as class labels: `model(x, sigma, **model_kwargs)`. Each
            tensor has one row for each sample, and chunks get the rows of their samples. None, the
            default: none.
    """

    n_steps: int | None
    times: Sequence[float] | Tensor | None
    first: int
    chunk_size: int | None
    model_kwargs: Conditions | None


class ReverseOptions(GridOptions, total=False):
    """What the samplers that draw noise share.

    Attributes:
        n_steps, times, first, chunk_size, model_kwargs: see `GridOptions`.
        seed: key of the noise. None, the default, draws one from torch's default generator.
        generator: a `torch.Generator` in place of seed, which is drawn from it.
        offset: number of the first step. A run over times[:k + 1] and one over times[k:] with
            offset k more are one run. Default 0.
    """

    seed: int | None
    generator: torch.Generator | None
    offset: int


class CorrectorOptions(ReverseOptions, StepOptions, total=False):
    """What `predictor_corrector` takes besides: both for the run and for the corrector.

    Attributes:
        n_steps, times, first, chunk_size, model_kwargs: see `GridOptions`.
        seed, generator, offset: see `ReverseOptions`.
        curvature, tolerance, max_iterations, rule: see `StepOptions`.
    """


def time_grid(
    where: str, schedule: Schedule, n_steps: int | None, times: Sequence[float] | Tensor | None
) -> list[float]:
    """`schedule.times(n_steps)`, or the times given, which must lie within the schedule's."""
    both = "neither" if times is None else "both"
    rule = "exactly one of n_steps and times must be given"
    check(where, (n_steps is None) != (times is None), rule, both)
    if times is None:
        n_steps = check_count(where, "n_steps", n_steps)
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
    offset = check_int(where, "offset", offset, 2**56)
    first = check_first(where, first, shape)
    if seed is None:
        seed = fresh_seed()
    seed = check_int(where, "seed", seed, 2**64)
    return Key(seed, offset, first)


def option_names(kind: type) -> tuple[str, ...]:
    """The names of a TypedDict, those that it inherits first."""
    return tuple(kind.__annotations__)


def check_options(where: str, options: Iterable[str], kind: type) -> None:
    """Refuses a name that this TypedDict of options does not have."""
    known = option_names(kind)
    for name in options:
        rule = f"options must be among {', '.join(known)}"
        check(where, name in known, rule, repr(name), TypeError)
