"""The Ozaki step with its noise, against eager and compiled torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import peers

# torch.compile itself calls what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZES = [(10, 2), (1000, 2), (1000, 784), (4096, 3072)]
STEP_SIZE = 0.1


@pytest.mark.parametrize(("batch", "size"), SIZES)
def test_ozaki_step(race: Callable[..., Any], batch: int, size: int) -> None:
    inputs = peers.step_inputs(batch, size)
    steps = peers.ozaki_steps(inputs, STEP_SIZE)
    with torch.no_grad():
        peers.check_ozaki_steps(steps, inputs, STEP_SIZE)
        race("ozaki_step", "forward", (batch, size, 0), steps)
