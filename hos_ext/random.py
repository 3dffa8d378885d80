"""Where noise comes from: fresh seeds, and the table of streams of the counter-based generator.

Noise is a function of (seed, stream, offset, element). Two draws that share all four share their
words, so whoever draws owns a stream, and this is the list of them.
"""

from __future__ import annotations

import torch

STREAM_STEP, STREAM_ACCEPT, STREAM_POSTERIOR, STREAM_TRAINING = range(4)
STREAM_TIME, STREAM_DIRECTION, STREAM_REVERSE, STREAM_PRIOR = range(4, 8)
STREAM_PROBE, STREAM_START, STREAM_ADJOINT, STREAM_REPORT = range(8, 12)
STREAM_SPLIT, STREAM_DEQUANTISE, STREAM_DISTORT, STREAM_FLIP = 16, 17, 18, 19
STREAM_ORDER, STREAM_SIGMA, STREAM_EVALUATION = 32, 33, 34

_CPU, _SEEDS = torch.device("cpu"), 2**63 - 1


def fresh_seed() -> int:
    """A seed from torch's default generator, outside graphs and transforms."""
    return torch.randint(_SEEDS, (), device=_CPU).item()  # type: ignore[return-value]
