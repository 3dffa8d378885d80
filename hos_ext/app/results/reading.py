"""Files of noisy samples, in the raw units of the data set."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import check, require
from .. import data
from ..data.images import image_values
from .units import to_data_units

_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


class Samples(NamedTuple):
    """Noisy samples in data units, shape (n, *dims), and where each came from."""

    x: Tensor
    names: list[str]


def read_files(
    files: Sequence[Path],
    shape: tuple[int, ...],
    scaling: data.Scaling,
    *,
    sigma: float,
    std: float = 1.0,
    units: str = "auto",
) -> Samples:
    """Images and arrays, noisy, as samples in data units.

    Args:
        files: .png, .jpg or .tiff (8-bit grey or RGB, or floating grey; every page is a sample), or
            .npy or .npz with one array: a sample (*dims), or several (n, *dims).
        shape: dims of one sample. (1, height, width) and (height, width) are taken for each other.
        scaling, sigma, std, units: as in `to_data_units`, which says how units are judged.

    Raises:
        ValueError: a file is missing or damaged, or holds another shape or kind, or values that are
            not finite or may be in other units; names the file.
        RuntimeError: pillow is missing.
    """
    pieces, names = [], []
    for path in files:
        rows = _read(path, shape)
        _check_values(path, rows, scaling.levels)
        x = to_data_units(path, rows, scaling, sigma=sigma, std=std, units=units)
        pieces.append(torch.from_numpy(x).float())
        names += [path.name if len(rows) == 1 else f"{path.name}[{i}]" for i in range(len(rows))]
    return Samples(torch.cat(pieces), names)


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The samples (n, *shape) of a file."""
    check("denoise", path.is_file(), "file must exist", path)
    try:
        raw = _read_images(path) if path.suffix.lower() in _IMAGES else _read_array(path)
    except (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"denoise: {path} must be a whole image, .npy or .npz, got: {error}"
        ) from None
    return _as_rows(path, raw, shape)


def _read_images(path: Path) -> np.ndarray:
    """All pages, (n, channels, height, width)."""
    pillow = require("denoise", "PIL.Image")
    sequence = require("denoise", "PIL.ImageSequence")
    pages = []
    with pillow.open(path) as image:
        for page in sequence.Iterator(image):
            values = image_values(page)
            if values is None:
                raise ValueError(f"mode {page.mode}, neither 8-bit grey, RGB nor floating grey")
            pages.append(values)
    return np.stack(pages)


def _read_array(path: Path) -> np.ndarray:
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return content
    with content:
        if len(content.files) != 1:
            raise ValueError(f"the arrays {', '.join(content.files)}, not one")
        array: np.ndarray = content[content.files[0]]
    return array


def _as_rows(path: Path, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The samples (n, *shape) in an array of one or of several."""
    plain = shape[1:] if shape[0] == 1 and len(shape) > 1 else shape
    for dims in (shape, plain, (1, *plain)):
        if raw.shape == dims:
            return raw.reshape(1, *shape)
        if raw.ndim == len(dims) + 1 and raw.shape[1:] == dims and len(raw):
            return raw.reshape(-1, *shape)
    raise ValueError(f"denoise: {path} must hold samples {shape}, got shape {raw.shape}")


def _check_values(path: Path, rows: np.ndarray, levels: int) -> None:
    """Refuses values of a kind that the data set does not have."""
    kind = rows.dtype
    rule = f"{path} must hold uint8 or floating values"
    check("denoise", kind.name in ("uint8", "float16", "float32", "float64"), rule, kind)
    low, high = float(rows.min()), float(rows.max())
    span, finite = f"{low:g} to {high:g}", math.isfinite(low) and math.isfinite(high)
    check("denoise", finite, f"{path} must hold finite values", span)
    if kind.kind == "u":
        check("denoise", levels, f"{path} must hold floating values like the data set", kind)
        rule = f"{path} must hold raw units, 0 to {levels - 1} before noise was added"
        check("denoise", high < levels, rule, f"{high:g}")
