"""The handwritten digits of the demonstration: real 8x8 scans, split, dequantised, distorted.

Data units: a pixel is 2 (grey + u) / 17 - 1 with grey in 0 ... 16 and u uniform on [0, 1), so that
it lies in [-1, 1) and one grey level is 2/17 wide. Whole grey levels have no density, and a score
exists for densities only: without u the posterior variance of a constant pixel would be zero.
Everything random here is a function of (seed, offset, row); scikit-learn is in the extra `app`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import ops
from .checks import check_tensor, require

GREY_LEVELS = 17
SHAPE = (8, 8)

# Streams of `ops.normal` and `ops.uniform`, apart from those of steps, posteriors and losses.
_STREAM_SPLIT, _STREAM_DEQUANTISE, _STREAM_DISTORT = 16, 17, 18

# Standard deviations of `distort`: rotation and shear in radians, log scale in x and y, shift in
# x and y as a fraction of half the image (0.3 pixel). About what separates two hands.
_DISTORTION = (0.105, 0.08, 0.06, 0.06, 0.075, 0.075)


class Digits(NamedTuple):
    """Whole grey levels 0 ... 16, float32, shape (n, 8, 8), in three disjoint parts."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load_digits(*, seed: int = 0, validation: int = 180, test: int = 360) -> Digits:
    """The 1797 digits that come with scikit-learn, split at random; nothing is downloaded.

    The scans are of 13 writers, and a random split puts every writer into every part: held-out
    digits are new digits, not new hands.

    Args:
        seed: of the split.
        validation: digits to tune on, here the recalibration.
        test: digits to report on. The rest, 1257 by default, is for training.

    Returns:
        Digits, in grey levels: see `dequantise`.

    Raises:
        ValueError: a part is empty, or nothing would be left to train on.
        RuntimeError: scikit-learn is missing.

    Reference:
        Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI repository.
    """
    datasets = require("load_digits", "sklearn.datasets")
    grey = torch.from_numpy(datasets.load_digits().images).float()
    if validation < 1 or test < 1 or validation + test >= len(grey):
        raise ValueError(
            f"load_digits: validation and test must be at least 1 and sum to less than "
            f"{len(grey)}, got {validation} and {test}"
        )
    order = ops.uniform(
        (len(grey),), seed=seed, stream=_STREAM_SPLIT, dtype=torch.float64
    ).argsort()
    return Digits(
        train=grey[order[validation + test :]],
        validation=grey[order[:validation]],
        test=grey[order[validation : validation + test]],
    )


def dequantise(grey: Tensor, *, seed: int, offset: int = 0, first: int = 0) -> Tensor:
    """2 (grey + u) / 17 - 1 with u uniform on [0, 1): a sample with a density, in data units.

    Args:
        grey: whole grey levels 0 ... 16. Shape (B, *dims), float32 or float64.
        seed: key of u.
        offset: second key, such as the step of a training run.
        first: global index of row 0.

    Returns:
        Shape, dtype and device of grey, in [-1, 1]. NaN gives NaN.

    Raises:
        TypeError: grey is not a tensor.
        ValueError: grey has another dtype.
    """
    check_tensor("dequantise", "grey", grey)
    u = ops.uniform(
        grey.shape,
        seed=seed,
        offset=offset,
        first=first,
        stream=_STREAM_DEQUANTISE,
        dtype=grey.dtype,
        device=grey.device,
    )
    return (grey + u) * (2 / GREY_LEVELS) - 1


def to_grey(x: Tensor) -> Tensor:
    """The grey level that a pixel in data units belongs to: the inverse of `dequantise`.

    Values outside [-1, 1) go to the nearest level. Shape and dtype of x.
    """
    return ((x + 1) * (GREY_LEVELS / 2)).floor().clamp(0, GREY_LEVELS - 1)


def distort(grey: Tensor, *, seed: int, offset: int = 0, first: int = 0) -> Tensor:
    """Rotates, shears, scales and shifts each digit a little, then rounds to grey levels again.

    1257 digits are few: a network learns them by heart, its errors on new digits are then larger
    than those it was trained on, and the covariance it learned is too small. New variants of each
    digit narrow that gap.

    Args:
        grey: whole grey levels. Shape (B, height, width), float32 or float64.
        seed: key of the distortions.
        offset: second key, such as the step of a training run.
        first: global index of row 0.

    Returns:
        Whole grey levels, shape, dtype and device of grey.

    Raises:
        TypeError: grey is not a tensor.
        ValueError: grey has another dtype, or not the shape (B, height, width).
    """
    check_tensor("distort", "grey", grey)
    if grey.dim() != 3:
        raise ValueError(
            f"distort: grey must have shape (B, height, width), got {tuple(grey.shape)}"
        )
    if grey.shape[0] == 0:
        return grey.clone()  # torch's grid refuses to be empty
    drawn = ops.normal(
        (grey.shape[0], len(_DISTORTION)),
        seed=seed,
        offset=offset,
        first=first,
        stream=_STREAM_DISTORT,
        dtype=grey.dtype,
        device=grey.device,
    )
    angle, shear, scale_x, scale_y, shift_x, shift_y = (drawn * drawn.new_tensor(_DISTORTION)).T
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack(
        [
            torch.stack([scale_x.exp() * cos, shear - sin, shift_x], -1),
            torch.stack([sin, scale_y.exp() * cos, shift_y], -1),
        ],
        1,
    )
    grid = functional.affine_grid(rows, [grey.shape[0], 1, *grey.shape[1:]], align_corners=False)
    moved = functional.grid_sample(
        grey.unsqueeze(1), grid, mode="bicubic", padding_mode="zeros", align_corners=False
    )
    return moved.squeeze(1).round().clamp(0, GREY_LEVELS - 1)
