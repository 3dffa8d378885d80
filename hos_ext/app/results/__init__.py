"""What the commands write: arrays, pictures, reports and float TIFF images, and what they read.

Samples are in data units inside; what other programs read and write (images, `raw_*`) is in raw
units. A command builds all of its files in memory, then writes each whole.
"""

from .chains import Dynamics, chains_files, drawn, methods, ranks, run_chains_over_ranks
from .denoising import denoise_files, denoised
from .evaluating import EVALUATE_FILES, evaluated
from .files import npz, refuse_existing, tiff, write
from .reading import Samples, read_files
from .units import UNITS, to_data_units

__all__ = [
    "EVALUATE_FILES",
    "UNITS",
    "Dynamics",
    "Samples",
    "chains_files",
    "denoise_files",
    "denoised",
    "drawn",
    "evaluated",
    "methods",
    "npz",
    "ranks",
    "read_files",
    "refuse_existing",
    "run_chains_over_ranks",
    "tiff",
    "to_data_units",
    "write",
]
