"""The fused operators: one file for each family.

`reference` holds their plain versions. `Operator` makes one from a forward, its derivatives and a
table of its arguments; docs/adding-an-operator.md walks through one.
"""

from . import reference
from ._native import build_info
from ._operator import Argument, Operator
from .hessian import assemble_hessian, hessian_matvec
from .losses import (
    d2sm_diag_loss,
    d2sm_diag_vr_loss,
    d2sm_loss,
    d2sm_vr_loss,
    dsm_loss,
    dsm_vr_loss,
)
from .noise import normal, uniform
from .steps import langevin_step, ozaki_step

__all__ = [
    "Argument",
    "Operator",
    "assemble_hessian",
    "build_info",
    "d2sm_diag_loss",
    "d2sm_diag_vr_loss",
    "d2sm_loss",
    "d2sm_vr_loss",
    "dsm_loss",
    "dsm_vr_loss",
    "hessian_matvec",
    "langevin_step",
    "normal",
    "ozaki_step",
    "reference",
    "uniform",
]
