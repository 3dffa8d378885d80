"""The Ozaki step with its noise, its gradient, and the Hessian as a matrix, against their peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import cases, goals


@pytest.mark.parametrize("shape", goals.STEPS)
def test_ozaki_step(race: Callable[..., Any], tiny: bool, shape: Any) -> None:
    race(cases.build("ozaki_step", goals.FORWARD, (50, 3, 0) if tiny else shape))


def test_gradient_of_a_tiny_step(race: Callable[..., Any]) -> None:
    race(cases.build("ozaki_step", goals.BOTH, goals.TINY))


@pytest.mark.parametrize("shape", goals.MATRICES)
def test_assemble_hessian(race: Callable[..., Any], tiny: bool, shape: Any) -> None:
    race(cases.build("assemble_hessian", goals.FORWARD, (3, 5, 2) if tiny else shape))
