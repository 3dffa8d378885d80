"""Is the covariance right, and what is it good for."""

from .calibration import (
    CalibrationReport,
    calibration,
    calibration_report,
    recalibration_factor,
    recalibration_factors,
)
from .conformal import Conformal, conformal
from .decoding import DecodedPosterior, decode_posterior
from .from_score import posterior_from_score, posterior_from_velocity
from .ordering import leaf_order
from .outliers import auroc, outlier_score

__all__ = [
    "CalibrationReport",
    "Conformal",
    "DecodedPosterior",
    "auroc",
    "calibration",
    "calibration_report",
    "conformal",
    "decode_posterior",
    "leaf_order",
    "outlier_score",
    "posterior_from_score",
    "posterior_from_velocity",
    "recalibration_factor",
    "recalibration_factors",
]
