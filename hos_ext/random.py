"""Keys of the counter-based noise, and the table of its streams.

Noise is a function of (seed, stream, offset, element). Two draws that share all four share their
numbers. So whoever draws owns a stream, and `STREAMS` lists every owner.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CPU, _SEEDS = torch.device("cpu"), 2**63 - 1


class Key(NamedTuple):
    """Where noise begins: what every function that draws hands on to the next.

    Fields:
        seed: the key of the generator. 64 bits; an int or a 0-d int64 tensor.
        offset: the number of the draw, in [0, 2**56); an int or a 0-d int64 tensor.
        first: the global index of row 0, so that a part of a batch draws what the whole would.
    """

    seed: int | Tensor
    offset: int | Tensor = 0
    first: int = 0


class Stream(NamedTuple):
    """A stream of the generator."""

    number: int
    owner: str
    """The module that draws from it."""
    purpose: str


# Streams up to 63 are the package's; those from 64 to 255 are for users.
STREAMS = (
    Stream(0, "hos_ext.ops.steps", "the noise of Langevin and Ozaki steps"),
    Stream(1, "hos_ext.sampling", "the uniforms by which a proposal is accepted"),
    Stream(2, "hos_ext.linalg.dplr", "draws from a posterior, and restarts of its eigensolver"),
    Stream(3, "hos_ext.losses", "the noise of training samples"),
    Stream(4, "hos_ext.schedules", "times of training samples"),
    Stream(5, "hos_ext.losses.high_order", "directions of high-order losses"),
    Stream(6, "hos_ext.diffusion.reverse", "the noise of reverse steps"),
    Stream(7, "hos_ext.diffusion.reverse", "draws from the prior"),
    Stream(8, "hos_ext.linalg.hutchinson", "probes of traces and diagonals"),
    Stream(9, "hos_ext.linalg", "starts of eigensolvers"),
    Stream(10, "hos_ext.diffusion.guidance", "the check that an adjoint is one"),
    Stream(11, "hos_ext.uncertainty.calibration", "directions of a calibration report"),
    Stream(16, "hos_ext.app.data", "which samples are held out"),
    Stream(17, "hos_ext.app.data", "the noise that dequantises"),
    Stream(18, "hos_ext.app.data", "distortions"),
    Stream(19, "hos_ext.app.data", "flips"),
    Stream(32, "hos_ext.app.data", "the order of samples in an epoch"),
    Stream(33, "hos_ext.schedules", "noise levels of training samples"),
    Stream(34, "hos_ext.app.evaluation", "the noise on held-out samples"),
)

STREAM_STEP, STREAM_ACCEPT, STREAM_POSTERIOR, STREAM_TRAINING = range(4)
STREAM_TIME, STREAM_DIRECTION, STREAM_REVERSE, STREAM_PRIOR = range(4, 8)
STREAM_PROBE, STREAM_START, STREAM_ADJOINT, STREAM_REPORT = range(8, 12)
STREAM_SPLIT, STREAM_DEQUANTISE, STREAM_DISTORT, STREAM_FLIP = range(16, 20)
STREAM_ORDER, STREAM_SIGMA, STREAM_EVALUATION = range(32, 35)


def fresh_seed() -> int:
    """A seed from torch's default generator, outside graphs and transforms."""
    return torch.randint(_SEEDS, (), device=_CPU).item()  # type: ignore[return-value]
