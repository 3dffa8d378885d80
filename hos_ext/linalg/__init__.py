"""Symmetric matrices: diagonal plus low rank, by products alone, and functions of them."""

from .dplr import DPLR, low_rank_eigh
from .jacobian import Eigenpairs, Estimate, ScoreHessian
from .lanczos import LanczosResult, lanczos
from .spectrum import Spectrum

__all__ = [
    "DPLR",
    "Eigenpairs",
    "Estimate",
    "LanczosResult",
    "ScoreHessian",
    "Spectrum",
    "lanczos",
    "low_rank_eigh",
]
