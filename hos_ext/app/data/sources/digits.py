"""digits, 1797 scans (8, 8) of 17 grey levels that come with scikit-learn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ....checks import check, require
from ..labels import classes_of
from ..registry import register_source
from ..rows import Request, Rows, array_rows
from ..scaling import GREY_LEVELS
from ..splits import split_rows, too_few

SHAPE = (8, 8)


@register_source("digits", held_out=(180, 360), labels=True)
def open_digits(request: Request) -> Rows:
    """All scans, as whole levels 0 ... 16; their labels are the digits."""
    rows = array_rows(request, _scans("open_source"), levels=GREY_LEVELS)
    if request.label is None:
        return rows
    rule = "label must be 'label' for digits"
    check("open_source", request.label == "label", rule, repr(request.label))
    digits = require("open_source", "sklearn.datasets").load_digits().target
    return rows._replace(classes=classes_of(request, digits))


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

    References:
        Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI repository.
    """
    grey = torch.from_numpy(_scans("load_digits")).float()
    if validation < 1 or test < 1:
        raise too_few("load_digits", len(grey), validation, test)
    return Digits(
        *(grey[rows] for rows in split_rows("load_digits", len(grey), seed, validation, test))
    )


def _scans(where: str) -> np.ndarray:
    images = require(where, "sklearn.datasets").load_digits().images
    return np.asarray(images, dtype=np.uint8)  # whole numbers 0 ... 16, held as float64
