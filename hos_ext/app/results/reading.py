"""Files of noisy samples, in the raw units of the data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import check
from .. import data
from ..data import arrays, images
from ..data.rows import channels_last
from ..data.unfit import Unfit
from .units import to_data_units


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
        files: images as the data sources read them (`data.images.decode_pages`), every page of a
            .tiff a sample; or .npy or .npz with one array: a sample (*dims), or several (n, *dims).
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
        raw = _numbers(path)
    except OSError as error:
        raise ValueError(f"denoise: {path} must be a file that can be read, got: {error}") from None
    except Unfit as error:
        raise ValueError(
            f"denoise: {path} must be a whole image, .npy or .npz, got: {error}"
        ) from None
    return _as_rows(path, raw, shape)


def _numbers(path: Path) -> np.ndarray:
    """All that a file holds, by the readers of the data sources: one array, or (pages, C, H, W)."""
    if path.suffix.lower() in images.ENDINGS:
        pages = images.decode_pages(path.read_bytes(), "denoise")
        kinds = sorted({f"{page.shape} {page.dtype}" for page in pages})
        if len(kinds) > 1:
            raise Unfit("hold pages of one shape and kind", " and ".join(kinds))
        return np.stack(pages)
    known = ", ".join((*images.ENDINGS, *arrays.ENDINGS))
    check(
        "denoise", path.suffix.lower() in arrays.ENDINGS, f"{path} must end in {known}", path.name
    )
    array, names = arrays.load_arrays(path)
    if array is None:
        raise Unfit("hold one array", f"the arrays {', '.join(names)}")
    return array


def _as_rows(path: Path, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The samples (n, *shape) in an array of one or of several."""
    plain = shape[1:] if shape[0] == 1 and len(shape) > 1 else shape
    for dims in (shape, plain, (1, *plain)):
        if raw.shape == dims:
            return raw.reshape(1, *shape)
        if raw.ndim == len(dims) + 1 and raw.shape[1:] == dims and len(raw):
            return raw.reshape(-1, *shape)
    got = f"shape {raw.shape}"
    if any(channels_last(tuple(dims)) for dims in (raw.shape, raw.shape[1:])):
        got += " with channels last (numpy.moveaxis(array, -1, -3) brings them to the front)"
    raise ValueError(f"denoise: {path} must hold samples {shape}, got {got}")


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
