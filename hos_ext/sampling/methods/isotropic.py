"""The Ozaki step with a Hessian that is a multiple of the identity plus low rank."""

from __future__ import annotations

from torch import Tensor

from ...linalg.dplr import DPLR
from ...linalg.spectrum import isotropic_spectrum
from ...scores import UnscaledScores
from .base import NormalStep
from .laws import NormalLaw, ozaki_functions, spectral_law
from .points import Point


class OzakiIsotropic(NormalStep):
    """x' = x + h phi1(h A) s1 + sqrt(2 h phi1(2 h A)) z, with A = s2 = c I + U diag(sign) U^T.

    It decomposes r x r matrices alone. It keeps a Gaussian of this form exactly for every h. A
    `diag` that is not constant within a sample raises.
    """

    name = "ozaki_isotropic"
    accepts = (UnscaledScores,)

    def law(self, here: Point, h: Tensor) -> NormalLaw:
        """The law of the next state."""
        hessian = here.hessian
        assert isinstance(hessian, DPLR)  # that is what UnscaledScores are
        spectrum = isotropic_spectrum(
            hessian.diag,
            hessian.factor,
            sign=hessian.sign,
            where="sample: scores from score_fn",
        )
        return spectral_law(*here.flat(), spectrum, *ozaki_functions(h, self.curvature))
