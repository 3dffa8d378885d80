"""Along a noise schedule: reverse processes, guidance, likelihood."""

from .along import AlongSchedule
from .annealed import annealed_langevin
from .closed_form import box_model, gaussian_model
from .composed import composed
from .generate import GENERATE_METHODS, generate
from .guidance import condition, condition_mean, guided
from .inputs import GridOptions, ReverseOptions
from .likelihood import log_likelihood
from .mixture import PosteriorMixture, posterior_mixture
from .reverse import (
    predictor_corrector,
    prior,
    probability_flow_ode,
    reverse_sde,
    second_order_reverse,
    tweedie_denoise,
)

__all__ = [
    "GENERATE_METHODS",
    "AlongSchedule",
    "GridOptions",
    "PosteriorMixture",
    "ReverseOptions",
    "annealed_langevin",
    "box_model",
    "composed",
    "condition",
    "condition_mean",
    "gaussian_model",
    "generate",
    "guided",
    "log_likelihood",
    "posterior_mixture",
    "predictor_corrector",
    "prior",
    "probability_flow_ode",
    "reverse_sde",
    "second_order_reverse",
    "tweedie_denoise",
]
