"""What the commands write: arrays, pictures, reports and float TIFF images, and what they read.

Samples are in data units inside; what other programs read and write (images, `raw_*`) is in raw
units. A command builds all of its files in memory, then writes each whole.
"""

from .card import card_sections, without_paths
from .chains import Dynamics, chains_files, drawn, methods, ranks, run_chains_over_ranks
from .denoising import denoise_files, denoised
from .evaluating import EVALUATE_FILES, evaluated
from .files import npz, refuse_existing, tiff, write
from .generating import (
    GENERATE_FILES,
    generate_over_ranks,
    generated,
    generated_alarm,
    generated_law,
)
from .pictures import denoised_pictures, picture_files
from .reading import Noisy, Samples, read_files, read_pictures, sizes_fit
from .units import UNITS, to_data_units

__all__ = [
    "EVALUATE_FILES",
    "GENERATE_FILES",
    "UNITS",
    "Dynamics",
    "Noisy",
    "Samples",
    "card_sections",
    "chains_files",
    "denoise_files",
    "denoised",
    "denoised_pictures",
    "drawn",
    "evaluated",
    "generate_over_ranks",
    "generated",
    "generated_alarm",
    "generated_law",
    "methods",
    "npz",
    "picture_files",
    "ranks",
    "read_files",
    "read_pictures",
    "refuse_existing",
    "run_chains_over_ranks",
    "sizes_fit",
    "tiff",
    "to_data_units",
    "without_paths",
    "write",
]
