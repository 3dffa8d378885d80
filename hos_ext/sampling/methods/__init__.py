"""The steps of chains, one class in one file each. `registry` knows them by name."""

from .base import NormalStep, PlainStep, Report, Step, StepOptions, Walk, step_noise
from .cayley import OzakiCayley
from .full import OzakiFull
from .isotropic import OzakiIsotropic
from .lanczos import OzakiLanczos
from .langevin import Langevin
from .laws import NormalLaw, diagonal_law, spectral_law, step_size_column
from .metropolis import Metropolis, log_ratio
from .ozaki import Ozaki
from .points import Point
from .registry import Method, make_step, method_names, register_step, unregister_step

for _step in (Langevin, Ozaki, OzakiFull, OzakiIsotropic, OzakiLanczos, OzakiCayley):
    register_step(_step)

__all__ = [
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
    "Report",
    "Step",
    "StepOptions",
    "Walk",
    "diagonal_law",
    "log_ratio",
    "make_step",
    "method_names",
    "register_step",
    "spectral_law",
    "step_noise",
    "step_size_column",
    "unregister_step",
]
