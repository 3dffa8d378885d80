"""Noise levels for training without a schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..checks import check_int, range_of, said_by
from ..random import STREAM_SIGMA, seed_from


def draw_sigma(
    n: int,
    sigma_range: tuple[float, float],
    *,
    seed: int | None = None,
    offset: int = 0,
    first: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise levels, log-uniform over sigma_range = (low, high). Shape (n,), float32, on the CPU.

    A function of (seed, offset, first + row), as the noise of `ops.normal` is.

    Args:
        n: how many.
        sigma_range: the lowest and the highest level, > 0. Units of the data.
        seed: 64-bit key.
        offset: second key, such as the training step.
        first: global index of row 0.
        generator: a `torch.Generator` in place of seed, which is drawn from it.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its range.

    Example:
        >>> from hos_ext.schedules import draw_sigma
        >>> sigma = draw_sigma(1000, (0.01, 1.0), seed=0)
        >>> bool(sigma.min() >= 0.01), bool(sigma.max() <= 1.0)
        (True, True)
    """
    where = "draw_sigma"
    n = check_int(where, "n", n, 2**63)
    low, high = (math.log(level) for level in range_of(where, "sigma_range", sigma_range))
    seed = seed_from(where, seed, generator)
    with said_by(where, "uniform", shape="n"):
        u = ops.uniform(
            (n,), seed=seed, offset=offset, first=first, stream=STREAM_SIGMA, dtype=torch.float64
        )
    return (low + (high - low) * u).exp().float()
