"""High-order scores by denoising: the public names."""

from .adapters import MeanDenoiser, azula_denoiser
from .calibrate import (
    CalibrationReport,
    calibration,
    calibration_report,
    recalibration_factor,
)
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
    ess,
    ess_rate,
    min_ess,
    mode_jumps,
    r_hat,
)
from .diffusion import (
    annealed_langevin,
    predictor_corrector,
    prior,
    probability_flow_ode,
    reverse_sde,
    second_order_reverse,
    tweedie_denoise,
)
from .distributed import sample_sharded
from .dplr import DPLR
from .frozen import DiffusersScore, SecondOrderHead, from_diffusers
from .guidance import condition, condition_mean, guided
from .hessians import MatrixFreeScores, ScoreHessian, posterior_from_score
from .high_order import (
    hermite,
    noise_moment_loss,
    order_k_loss,
    order_k_matching_loss,
    order_k_vr_loss,
    second_moment_loss,
)
from .likelihood import log_likelihood
from .losses import ScoreMatchingLoss, score_matching_loss
from .models import MLP, UNet
from .moments import (
    moment_recurrence,
    moments_from_cumulants,
    noise_cumulants,
    posterior_cumulants,
    posterior_moments,
    psi_from_scores,
)
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
from .outliers import auroc, outlier_score
from .pretrained import load_model, save_model
from .samplers import Chains, ChainState, sample
from .schedules import EDM, VE, VP, CosineVP, DiscreteVP, Schedule, SubVP, from_alphas_cumprod
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
    "EDM",
    "MLP",
    "VE",
    "VP",
    "CalibrationReport",
    "ChainState",
    "Chains",
    "CosineVP",
    "DenseScores",
    "DiffusersScore",
    "DiscreteVP",
    "Gaussian",
    "GaussianMixture",
    "JointLogisticMixture",
    "MatrixFreeScores",
    "MeanDenoiser",
    "Posterior",
    "ProductLogisticMixture",
    "Schedule",
    "ScoreHessian",
    "ScoreMatchingLoss",
    "Scores",
    "SecondOrderHead",
    "SubVP",
    "UNet",
    "UnscaledScores",
    "adapt_step_size",
    "annealed_langevin",
    "assemble_hessian",
    "auroc",
    "azula_denoiser",
    "build_info",
    "calibration",
    "calibration_report",
    "condition",
    "condition_mean",
    "d2sm_diag_loss",
    "d2sm_diag_vr_loss",
    "d2sm_loss",
    "d2sm_vr_loss",
    "dsm_loss",
    "dsm_vr_loss",
    "eps_from_score",
    "ess",
    "ess_rate",
    "from_alphas_cumprod",
    "from_diffusers",
    "guided",
    "hermite",
    "hessian_from_jacobian",
    "hessian_matvec",
    "jacobian_from_hessian",
    "langevin_step",
    "load_model",
    "log_likelihood",
    "min_ess",
    "mode_jumps",
    "moment_recurrence",
    "moments_from_cumulants",
    "noise_cumulants",
    "noise_moment_loss",
    "normal",
    "order_k_loss",
    "order_k_matching_loss",
    "order_k_vr_loss",
    "outlier_score",
    "ozaki_step",
    "posterior",
    "posterior_covariance",
    "posterior_cumulants",
    "posterior_from_score",
    "posterior_mean",
    "posterior_moments",
    "predictor_corrector",
    "prior",
    "probability_flow_ode",
    "psi_from_scores",
    "r_hat",
    "recalibration_factor",
    "reverse_sde",
    "sample",
    "sample_sharded",
    "save_model",
    "score_from_eps",
    "score_from_v",
    "score_from_x0",
    "score_matching_loss",
    "search_step_size",
    "second_moment",
    "second_moment_loss",
    "second_order_reverse",
    "tweedie_denoise",
    "uniform",
    "v_from_score",
    "x0_from_score",
]
