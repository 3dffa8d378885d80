"""High-order scores by denoising: the public names."""

from .conversions import (
    eps_from_score,
    hessian_from_jacobian,
    jacobian_from_hessian,
    score_from_eps,
    score_from_v,
    score_from_x0,
    v_from_score,
    x0_from_score,
)
from .densities import Gaussian, GaussianMixture, JointLogisticMixture, ProductLogisticMixture
from .diagnostics import (
    calibration,
    ess,
    ess_rate,
    min_ess,
    mode_jumps,
    r_hat,
    recalibration_factor,
)
from .dplr import DPLR
from .losses import score_matching_loss
from .models import MLP, UNet
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
from .samplers import Chains, ChainState, sample
from .step_size import adapt_step_size, search_step_size
from .tweedie import (
    DenseScores,
    Posterior,
    Scores,
    UnscaledScores,
    posterior,
    posterior_covariance,
    posterior_mean,
    second_moment,
)

__version__: str = build_info()["version"]

__all__ = [
    "DPLR",
    "MLP",
    "ChainState",
    "Chains",
    "DenseScores",
    "Gaussian",
    "GaussianMixture",
    "JointLogisticMixture",
    "Posterior",
    "ProductLogisticMixture",
    "Scores",
    "UNet",
    "UnscaledScores",
    "adapt_step_size",
    "assemble_hessian",
    "build_info",
    "calibration",
    "d2sm_diag_loss",
    "d2sm_diag_vr_loss",
    "d2sm_loss",
    "d2sm_vr_loss",
    "dsm_loss",
    "dsm_vr_loss",
    "eps_from_score",
    "ess",
    "ess_rate",
    "hessian_from_jacobian",
    "hessian_matvec",
    "jacobian_from_hessian",
    "langevin_step",
    "min_ess",
    "mode_jumps",
    "normal",
    "ozaki_step",
    "posterior",
    "posterior_covariance",
    "posterior_mean",
    "r_hat",
    "recalibration_factor",
    "sample",
    "score_from_eps",
    "score_from_v",
    "score_from_x0",
    "score_matching_loss",
    "search_step_size",
    "second_moment",
    "uniform",
    "v_from_score",
    "x0_from_score",
]
