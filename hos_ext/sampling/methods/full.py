"""The Ozaki step with the whole Hessian, by its eigenvectors."""

from __future__ import annotations

from torch import Tensor

from ...linalg.spectrum import dense_spectrum
from ...scores import DenseScores, UnscaledScores
from .base import NormalStep
from .laws import NormalLaw, ozaki_functions, spectral_law
from .points import Point


class OzakiFull(NormalStep):
    """x' = x + h phi1(h A) s1 + sqrt(2 h phi1(2 h A)) z, with A the whole s2.

    It decomposes D x D matrices, which are formed where they do not come as such. It keeps a
    Gaussian exactly for every h.
    """

    name = "ozaki_full"
    accepts = (UnscaledScores, DenseScores)
    checks_symmetry = True

    def law(self, here: Point, h: Tensor) -> NormalLaw:
        """The law of the next state."""
        spectrum = dense_spectrum(here.hessian.dense(), where="sample: hessian from score_fn")
        return spectral_law(*here.flat(), spectrum, *ozaki_functions(h, self.curvature))
