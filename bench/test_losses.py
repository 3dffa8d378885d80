"""The second-order losses through autograd, and without gradients, against their peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import cases, goals


@pytest.mark.parametrize("mode", [goals.BOTH, goals.FORWARD])
@pytest.mark.parametrize("shape", goals.SIZES)
def test_d2sm_vr_loss(
    race: Callable[..., Any], note: Callable[[str], None], tiny: bool, shape: Any, mode: str
) -> None:
    shape = (3, 5, 2) if tiny else shape
    case = cases.build("d2sm_vr_loss", mode, shape)
    if mode == goals.BOTH and "dense" not in case.slow:
        batch, size, _ = shape
        note(
            f"d2sm_vr_loss {shape} dense: not run, {batch * size**2 * 4 / 1e6:.0f} MB for each of "
            f"about {cases.DENSE_MATRICES} batches of matrices, over the limit of "
            f"{cases.MEMORY_LIMIT / 2**30:g} GiB"
        )
    race(case)


def test_d2sm_loss(race: Callable[..., Any], tiny: bool) -> None:
    race(cases.build("d2sm_loss", goals.BOTH, (3, 5, 2) if tiny else (32, 784, 20)))
