"""Tweedie's formula: moments of the clean sample given the noisy one."""

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
from .moments import (
    moment_recurrence,
    moments_from_cumulants,
    noise_cumulants,
    posterior_cumulants,
    posterior_moments,
    psi_from_scores,
)
from .posterior import (
    Posterior,
    covariance_from_kappa,
    noise_covariance,
    posterior,
    posterior_covariance,
    posterior_mean,
    second_moment,
)
from .products import product_of_posteriors
from .velocity import (
    hessian_from_velocity_jacobian,
    score_from_velocity,
    velocity_from_score,
    velocity_jacobian_from_hessian,
    x0_from_velocity,
)

__all__ = [
    "Posterior",
    "covariance_from_kappa",
    "eps_from_score",
    "hessian_from_jacobian",
    "hessian_from_velocity_jacobian",
    "jacobian_from_hessian",
    "moment_recurrence",
    "moments_from_cumulants",
    "noise_covariance",
    "noise_cumulants",
    "posterior",
    "posterior_covariance",
    "posterior_cumulants",
    "posterior_mean",
    "posterior_moments",
    "product_of_posteriors",
    "psi_from_scores",
    "score_from_eps",
    "score_from_v",
    "score_from_velocity",
    "score_from_x0",
    "second_moment",
    "v_from_score",
    "velocity_from_score",
    "velocity_jacobian_from_hessian",
    "x0_from_score",
    "x0_from_velocity",
]
