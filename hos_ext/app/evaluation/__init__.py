"""How good a model came out: denoising errors, calibration, accuracy against the truth, chains.

Everything is in data units, for samples of any dims, and goes over the rows in chunks of bounded
memory. The noise of a row is a function of (seed, part, row): every model and every noise level
sees the same.
"""

from .accuracy import accuracy
from .calibration import calibration_figures, recalibrate
from .chains import chains_alarm, clean_held_out, law_of, noisy_held_out, run_chains
from .denoising import Denoised, denoise, denoise_held_out, denoising_errors
from .figures import evaluate
from .one_step import check_one_step
from .plain import plain_json
from .regions import region_of
from .tiles import Picture, denoise_tiled

__all__ = [
    "Denoised",
    "Picture",
    "accuracy",
    "calibration_figures",
    "chains_alarm",
    "check_one_step",
    "clean_held_out",
    "denoise",
    "denoise_held_out",
    "denoise_tiled",
    "denoising_errors",
    "evaluate",
    "law_of",
    "noisy_held_out",
    "plain_json",
    "recalibrate",
    "region_of",
    "run_chains",
]
