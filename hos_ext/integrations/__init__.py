"""Networks, samplers and laws of other libraries."""

from .azula import MeanDenoiser, azula_denoiser
from .covariances import from_azula, from_linear_operator, to_azula, to_linear_operator
from .diffusers import DiffusersScore, from_diffusers
from .distributions import from_distribution, to_distribution

__all__ = [
    "DiffusersScore",
    "MeanDenoiser",
    "azula_denoiser",
    "from_azula",
    "from_diffusers",
    "from_distribution",
    "from_linear_operator",
    "to_azula",
    "to_distribution",
    "to_linear_operator",
]
