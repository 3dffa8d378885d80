"""High-order scores by denoising: the public names."""

from .ops import (
    assemble_hessian,
    build_info,
    d2sm_diag_loss,
    d2sm_diag_vr_loss,
    d2sm_loss,
    d2sm_vr_loss,
    dsm_loss,
    dsm_vr_loss,
    hessian_matvec,
    langevin_step,
    normal,
    ozaki_step,
    uniform,
)
