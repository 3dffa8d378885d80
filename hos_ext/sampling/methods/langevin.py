"""The Langevin step."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ...checks import FLOATING
from ...random import Key
from ...scores import DenseScores, MatrixFreeScores, UnscaledScores
from .base import NormalStep, Report
from .laws import NormalLaw, diagonal_law
from .points import Point


class Langevin(NormalStep):
    """x' = x + h s1 + sqrt(2 h) z.

    On a Gaussian of precision P it is stable if h p_max < 2, and its covariance is
    P^-1 (I - h P / 2)^-1. It ignores `curvature`.

    References:
        Meng et al. 2021, Eq. 19 with h = eps / 2.
    """

    name = "langevin"
    adjusted_name = "mala"
    accepts = (Tensor, UnscaledScores, DenseScores, MatrixFreeScores)
    dtypes = FLOATING
    relative_step_size = 0.1  # stable below 2; the variance is too large by 1 / (1 - h / 2)

    def law(self, here: Point, h: Tensor) -> NormalLaw:
        """The law of the next state."""
        x, score = here.flat()
        return diagonal_law(x + h * score, (2 * h).sqrt())

    def move(self, here: Point, step_size: float | Tensor, key: Key, out: Tensor) -> Report:
        """The fused operator, noise included."""
        seed, offset, first = key
        ops.langevin_step(
            here.x, here.score, step_size, seed=seed, offset=offset, first=first, out=out
        )
        return {}
