"""Keys of the counter-based noise, and the table of its streams.

Noise is a function of (seed, stream, offset, element). Two draws that share all four share their
numbers. So each purpose has a stream of its own, and `STREAMS` lists them with their owners.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check, check_kind

_CPU, _SEEDS = torch.device("cpu"), 2**63 - 1


class Key(NamedTuple):
    """Where noise begins: what every function that draws hands on to the next.

    Attributes:
        seed: the key of the generator. 64 bits; an int or a 0-d int64 tensor.
        offset: the number of the draw, in [0, 2**56); an int or a 0-d int64 tensor.
        first: the global index of row 0, so that a part of a batch draws what the whole would.
    """

    seed: int | Tensor
    offset: int | Tensor = 0
    first: int = 0


class Stream(NamedTuple):
    """A stream of the generator.

    Attributes:
        number: 0 to 63 for this package, 64 to 255 for users.
        owners: the rooms that draw from it.
        purpose: what for.
    """

    number: int
    owners: tuple[str, ...]
    purpose: str


STREAMS: dict[int, Stream] = {}
"""Every stream of the package by its number."""


def _stream(number: int, owners: str, purpose: str) -> int:
    """Writes a stream into the table."""
    if not 0 <= number < 64 or number in STREAMS:
        raise ValueError(f"stream: number must be free and in [0, 64), got {number}")
    STREAMS[number] = Stream(number, tuple(owners.split(", ")), purpose)
    return number


# Numbers must not change: they decide the draws of every seed, and exact resume.
STREAM_STEP = _stream(
    0, "ops, sampling, app", "the noise of Langevin and Ozaki steps; a known density"
)
STREAM_ACCEPT = _stream(1, "sampling, app", "uniforms that accept proposals; a known density")
STREAM_POSTERIOR = _stream(
    2, "linalg, app", "draws from a posterior; restarts of matrix functions; a known density"
)
STREAM_TRAINING = _stream(3, "losses", "the noise of training samples")
STREAM_TIME = _stream(4, "losses, schedules", "times of training samples")
STREAM_DIRECTION = _stream(5, "losses", "directions of high-order losses")
STREAM_REVERSE = _stream(6, "diffusion", "the noise of reverse steps")
STREAM_PRIOR = _stream(7, "diffusion", "draws from the prior")
STREAM_PROBE = _stream(8, "linalg, diffusion", "probes of traces and diagonals")
STREAM_START = _stream(9, "linalg", "starts of eigensolvers")
STREAM_ADJOINT = _stream(10, "diffusion", "the check that an adjoint is one")
STREAM_REPORT = _stream(11, "uncertainty", "the noise that calibration reports add")
STREAM_CHECK = _stream(12, "nn", "the noise that looks whether a network denoises")
STREAM_ORDERING = _stream(15, "uncertainty", "the noise at which leaves are looked for")
STREAM_COIN = _stream(14, "sampling", "coins that decide between proposals")
STREAM_SPLIT = _stream(16, "app", "which samples are held out")
STREAM_DEQUANTISE = _stream(17, "app", "the noise that dequantises")
STREAM_DISTORT = _stream(18, "app", "distortions")
STREAM_FLIP = _stream(19, "app", "flips")
STREAM_ITEM = _stream(20, "app", "seeds of what the items of a data set draw themselves")
STREAM_CROP = _stream(21, "app", "places that pictures are cut from")
STREAM_LABEL = _stream(22, "app", "which labels are dropped in training")
STREAM_ORDER = _stream(32, "app", "the order of samples in an epoch")
STREAM_SIGMA = _stream(33, "schedules", "noise levels of training samples")
STREAM_EVALUATION = _stream(34, "app", "the noise on held-out samples")


def seed_from(where: str, seed: Any, generator: torch.Generator | None, unset: Any = None) -> Any:
    """The seed that was given, or one drawn from a generator, which moves on by that.

    Args:
        where: the function named in errors.
        seed: as it came.
        generator: in place of a seed.
        unset: the seed of a call that gives none.

    Raises:
        TypeError: generator is no `torch.Generator`.
        ValueError: both are given.

    Example:
        >>> import torch
        >>> from hos_ext.random import seed_from
        >>> one, other = (torch.Generator().manual_seed(3) for _ in range(2))
        >>> seed_from("f", None, one) == seed_from("f", None, other), seed_from("f", 7, None)
        (True, 7)
    """
    if generator is None:
        return seed
    check_kind(where, "generator", generator, torch.Generator)
    fine = seed is unset or (type(seed) is int and seed == unset)
    check(where, fine, "seed must be left out where generator is given", seed)
    device = generator.device
    return int(torch.randint(_SEEDS, (), device=device, generator=generator).item())


def fresh_seed() -> int:
    """A seed from torch's default generator, outside graphs and transforms."""
    return torch.randint(_SEEDS, (), device=_CPU).item()  # type: ignore[return-value]
