"""Symmetric matrices: diagonal plus low rank, by products alone, and functions of them."""

from .block_lanczos import Eigenpairs, eigenpairs
from .dplr import DPLR
from .hutchinson import Estimate
from .jacobian import ScoreHessian
from .lanczos import LanczosResult, lanczos
from .operator import BatchRows, DenseOperator, hessian_of
from .spectrum import (
    Spectrum,
    dense_spectrum,
    isotropic_spectrum,
    matrix_rows,
    spectrum_apply,
    spectrum_logdet,
)
from .truncation import truncated
from .woodbury import low_rank_eigh

__all__ = [
    "DPLR",
    "BatchRows",
    "DenseOperator",
    "Eigenpairs",
    "Estimate",
    "LanczosResult",
    "ScoreHessian",
    "Spectrum",
    "dense_spectrum",
    "eigenpairs",
    "hessian_of",
    "isotropic_spectrum",
    "lanczos",
    "low_rank_eigh",
    "matrix_rows",
    "spectrum_apply",
    "spectrum_logdet",
    "truncated",
]
