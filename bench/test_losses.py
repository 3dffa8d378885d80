"""The second-order losses, forward and backward through autograd, against their peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import peers, timer

# torch.compile itself calls what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZES = [
    (32, 784, 20),
    (64, 784, 50),
    (256, 100, 20),
    (16, 3072, 20),
    (1024, 2, 2),
    (8, 784, 200),
]
# Entries of a batch of D x D matrices that the dense formulation is asked for; it holds about 25.
DENSE_LIMIT = 40 << 20


def _race(
    race: Callable[..., Any],
    op: str,
    losses: dict[str, peers.Function],
    shape: tuple[int, int, int],
    points: int,
) -> None:
    inputs = peers.second_order_inputs(*shape, points=points)
    batch, size, _ = shape
    steps = {
        name: peers.forward_backward(loss, inputs)
        for name, loss in losses.items()
        if name != "dense" or batch * size**2 <= DENSE_LIMIT
    }
    timer.agree({name: step() for name, step in steps.items()}, against="eager", rtol=1e-4)
    slow = {"dense": steps.pop("dense")} if "dense" in steps else None
    race(op, "forward+backward", shape, steps, slow)


@pytest.mark.parametrize("shape", SIZES)
def test_d2sm_vr_loss(race: Callable[..., Any], shape: tuple[int, int, int]) -> None:
    _race(race, "d2sm_vr_loss", peers.d2sm_vr_losses(), shape, 3)


@pytest.mark.parametrize("shape", SIZES[:1])
def test_d2sm_loss(race: Callable[..., Any], shape: tuple[int, int, int]) -> None:
    _race(race, "d2sm_loss", peers.d2sm_losses(), shape, 1)
