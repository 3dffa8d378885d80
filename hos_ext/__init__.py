"""High-order scores by denoising.

These are the names of the first day. Everything else is in the rooms, which are imported when they
are first asked for: `hos_ext.sampling.search_step_size`, `hos_ext.uncertainty.calibration_report`.
"""

import importlib
import logging
from types import ModuleType

from . import idle, nn  # noqa: F401  idle first: it comes before torch
from .linalg import DPLR
from .losses import ScoreMatchingLoss, score_matching_loss
from .nn import MLP, ModelScore, SecondOrderHead, UNet, load_model, save_model
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
from .sampling import Chains, sample
from .schedules import EDM, VE, VP, CosineVP, DiscreteVP, Rectified, SubVP
from .scores import Scores, UnscaledScores
from .tweedie import Posterior, posterior

__version__: str = build_info()["version"]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent until someone listens

# Here, because a room does not know the rooms beside it.
nn.register_score_reader("diffusers", "hos_ext.integrations.diffusers:read_saved")

__all__ = [
    "DPLR",
    "EDM",
    "MLP",
    "VE",
    "VP",
    "Chains",
    "CosineVP",
    "DiscreteVP",
    "ModelScore",
    "Posterior",
    "Rectified",
    "ScoreMatchingLoss",
    "Scores",
    "SecondOrderHead",
    "SubVP",
    "UNet",
    "UnscaledScores",
    "assemble_hessian",
    "build_info",
    "d2sm_diag_loss",
    "d2sm_diag_vr_loss",
    "d2sm_loss",
    "d2sm_vr_loss",
    "dsm_loss",
    "dsm_vr_loss",
    "hessian_matvec",
    "langevin_step",
    "load_model",
    "normal",
    "ozaki_step",
    "posterior",
    "sample",
    "save_model",
    "score_matching_loss",
    "uniform",
]

_ROOMS = (
    "app",
    "conditions",
    "densities",
    "diffusion",
    "integrations",
    "linalg",
    "losses",
    "nn",
    "ops",
    "random",
    "sampling",
    "schedules",
    "scores",
    "tweedie",
    "uncertainty",
)


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'hos_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
