"""Noise schedules: alpha and sigma of the marginal x_t = alpha(t) x0 + sigma(t) z, and its SDE.

The forward SDE is dx = -(beta(t) / 2) x dt + g(t) dw, so that alpha' = -beta alpha / 2 and
(sigma^2)' = g^2 - beta sigma^2. Every schedule has the same methods (`Schedule`); a time is a float
(a float comes back) or a 0-d or (B,) tensor (a tensor of its dtype comes back, computed in float64)
in [t_min, t_max], where alpha > 0 and sigma > 0. Sources: Song et al. 2021 (arXiv:2011.13456) for
VE, VP and sub-VP, Nichol and Dhariwal 2021 (arXiv:2102.09672) for the cosine, Karras et al. 2022
(arXiv:2206.00364) for EDM, Liu et al. 2023 (arXiv:2209.03003) for rectified flow.
"""

from .base import Schedule, check_schedule
from .discrete import DiscreteVP, from_alphas_cumprod
from .exploding import EDM, VE
from .flow import Interpolant, Rectified
from .levels import draw_sigma
from .preserving import VP, CosineVP, SubVP

__all__ = [
    "EDM",
    "VE",
    "VP",
    "CosineVP",
    "DiscreteVP",
    "Interpolant",
    "Rectified",
    "Schedule",
    "SubVP",
    "check_schedule",
    "draw_sigma",
    "from_alphas_cumprod",
]
