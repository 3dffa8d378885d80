"""The Ozaki step with the diagonal of the Hessian."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ...checks import FLOATING
from ...random import Key
from ...scores import DenseScores, UnscaledScores
from .base import NormalStep, Report
from .laws import NormalLaw, diagonal_law, ozaki_functions
from .points import Point


class Ozaki(NormalStep):
    """x' = x + h phi1(h A) s1 + sqrt(2 h phi1(2 h A)) z, with A the diagonal of s2.

    phi1(y) = (e^y - 1) / y. On a Gaussian of precision P it is exact for every h if P is diagonal.
    If P is not, its covariance C solves C = B C B^T + S with B = I - M P, M = h phi1(-h diag P) and
    S = 2 h phi1(-2 h diag P): it loses its correlations as h grows. It is stable for every h if
    P < 2 diag(P).

    References:
        Meng et al. 2021, Eq. 20 with h = eps / 2.
    """

    name = "ozaki"
    accepts = (UnscaledScores, DenseScores)
    dtypes = FLOATING

    def law(self, here: Point, h: Tensor) -> NormalLaw:
        """The law of the next state."""
        x, score = here.flat()
        drift, noise = ozaki_functions(h, self.curvature)
        diag = _diagonal(here).flatten(1)
        return diagonal_law(x + drift(diag) * score, noise(diag))

    def move(self, here: Point, step_size: float | Tensor, key: Key, out: Tensor) -> Report:
        """The fused operator, noise included."""
        seed, offset, first = key
        ops.ozaki_step(
            here.x,
            here.score,
            _diagonal(here),
            step_size,
            seed=seed,
            offset=offset,
            first=first,
            curvature=self.curvature,
            out=out,
        )
        return {}


def _diagonal(here: Point) -> Tensor:
    """The curvature along each coordinate: the diagonal of s2, not the d of d + U U^T."""
    scores = here.scores
    if not isinstance(scores, UnscaledScores):
        return here.hessian.diagonal().reshape(here.x.shape)
    # Entry by entry, and not by a DPLR: that costs a tenth of a small step.
    if scores.factor is None:
        return scores.diag
    squares = scores.factor.square()
    if scores.sign is not None:
        squares = squares * scores.sign.to(squares.dtype)
    return scores.diag + squares.sum(-1).view(here.x.shape)
