"""High-order scores by denoising: the public names."""

from .densities import Gaussian, GaussianMixture, JointLogisticMixture, ProductLogisticMixture
from .diagnostics import calibration, ess, min_ess, r_hat, recalibration_factor
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
from .tweedie import (
    Posterior,
    Scores,
    UnscaledScores,
    eps_from_score,
    hessian_from_jacobian,
    posterior,
    posterior_covariance,
    posterior_mean,
    score_from_eps,
    score_from_v,
    score_from_x0,
    second_moment,
    v_from_score,
    x0_from_score,
)

__version__: str = build_info()["version"]

__all__ = [
    "DPLR",
    "MLP",
    "ChainState",
    "Chains",
    "Gaussian",
    "GaussianMixture",
    "JointLogisticMixture",
    "Posterior",
    "ProductLogisticMixture",
    "Scores",
    "UNet",
    "UnscaledScores",
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
    "hessian_from_jacobian",
    "hessian_matvec",
    "langevin_step",
    "min_ess",
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
    "second_moment",
    "uniform",
    "v_from_score",
    "x0_from_score",
]
