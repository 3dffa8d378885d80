"""The steps of chains, one class in one file each. `registry` knows them by name."""

from .base import NormalStep, PlainStep, Report, Rule, Step, StepOptions, Walk, step_noise
from .bounds import SmoothBound, SupportBound
from .cayley import OzakiCayley
from .coins import BoundWarning, TwoCoin
from .full import OzakiFull
from .isotropic import OzakiIsotropic
from .lanczos import OzakiLanczos
from .langevin import Langevin
from .laws import NormalLaw, diagonal_law, spectral_law, step_size_column
from .line import Quadrature, make_rule
from .metropolis import Metropolis, log_ratio
from .ozaki import Ozaki
from .points import Point
from .registry import Method, make_step, method_names, register_step, unregister_step

for _step in (Langevin, Ozaki, OzakiFull, OzakiIsotropic, OzakiLanczos, OzakiCayley):
    register_step(_step)

__all__ = [
    "BoundWarning",
    "Langevin",
    "Method",
    "Metropolis",
    "NormalLaw",
    "NormalStep",
    "Ozaki",
    "OzakiCayley",
    "OzakiFull",
    "OzakiIsotropic",
    "OzakiLanczos",
    "PlainStep",
    "Point",
    "Quadrature",
    "Report",
    "Rule",
    "SmoothBound",
    "Step",
    "StepOptions",
    "SupportBound",
    "TwoCoin",
    "Walk",
    "diagonal_law",
    "log_ratio",
    "make_rule",
    "make_step",
    "method_names",
    "register_step",
    "spectral_law",
    "step_noise",
    "step_size_column",
    "unregister_step",
]
