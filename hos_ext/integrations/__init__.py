"""Networks and samplers of other libraries."""

from .azula import MeanDenoiser, azula_denoiser
from .diffusers import DiffusersScore, from_diffusers

__all__ = [
    "DiffusersScore",
    "MeanDenoiser",
    "azula_denoiser",
    "from_diffusers",
]
