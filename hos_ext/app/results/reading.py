"""Files of noisy samples, in the raw units of the data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import check, said_by
from .. import data
from ..data import arrays, images
from ..data.columns import CSV_ENDINGS, chosen_columns, read_csv, table_array
from ..data.rows import Request, channels_last
from ..data.unfit import Unfit
from .units import to_data_units


class Samples(NamedTuple):
    """Noisy samples in data units, shape (n, *dims), and where each came from."""

    x: Tensor
    names: list[str]


class Noisy(NamedTuple):
    """A noisy picture in data units, shape (C, height, width), and where it came from."""

    x: Tensor
    name: str


def read_files(
    files: Sequence[Path],
    shape: tuple[int, ...],
    scaling: data.Scaling,
    *,
    sigma: float,
    std: float = 1.0,
    units: str = "auto",
    pictures: data.Pictures | None = None,
    columns: Sequence[str] = (),
) -> Samples:
    """Images and arrays, noisy, as samples in data units.

    Args:
        files: images as the data sources read them (`data.images.decode_pages`), every page of a
            .tiff a sample; or .npy or .npz with one array: a sample (*dims), or several (n, *dims).
        shape: dims of one sample. (1, height, width) and (height, width) are taken for each other.
        scaling, sigma, std, units: as in `to_data_units`, which says how units are judged.
        pictures: what is converted in images.
        columns: of the table that the model was trained on, for .csv files.

    Raises:
        ValueError: a file is missing or damaged, or holds another shape or kind, or values that are
            not finite or may be in other units; names the file.
        RuntimeError: pillow is missing.
    """
    pieces, names = [], []
    for path in files:
        rows = _as_rows(path, _pages(path, pictures, columns), shape)
        pieces.append(_in_data_units(path, rows, scaling, sigma=sigma, std=std, units=units))
        names += [path.name if len(rows) == 1 else f"{path.name}[{i}]" for i in range(len(rows))]
    return Samples(torch.cat(pieces), names)


def read_pictures(
    files: Sequence[Path],
    channels: int,
    scaling: data.Scaling,
    *,
    sigma: float,
    std: float = 1.0,
    units: str = "auto",
    pictures: data.Pictures | None = None,
) -> list[Noisy]:
    """Images and arrays of any height and width, noisy, as pictures in data units.

    Args:
        files: as in `read_files`; arrays (C, height, width), (n, C, height, width), or (height,
            width) for one channel. Pages of a .tiff may be of several sizes.
        channels: C of the data set.
        scaling, sigma, std, units, pictures: as in `read_files`.

    Raises:
        ValueError, RuntimeError: as `read_files`.
    """
    found = []
    for path in files:
        pages = _pages(path, pictures)
        rows = [pages] if isinstance(pages, np.ndarray) else [page[np.newaxis] for page in pages]
        rows = [_as_pictures(path, each, channels) for each in rows]
        singles = [each[i : i + 1] for each in rows for i in range(len(each))]
        for i, single in enumerate(singles):
            x = _in_data_units(path, single, scaling, sigma=sigma, std=std, units=units)[0]
            found.append(Noisy(x, path.name if len(singles) == 1 else f"{path.name}[{i}]"))
    return found


def sizes_fit(files: Sequence[Path], shape: tuple[int, ...], pictures: data.Pictures) -> bool:
    """Whether all images and arrays are of the height and width of the data set."""
    for path in files:
        found = _pages(path, pictures)
        pages = [found] if isinstance(found, np.ndarray) else found
        if any(page.shape[-2:] != shape[-2:] for page in pages):
            return False
    return True


def _in_data_units(
    path: Path, rows: np.ndarray, scaling: data.Scaling, *, sigma: float, std: float, units: str
) -> Tensor:
    _check_values(path, rows, scaling.levels)
    x = to_data_units(path, rows, scaling, sigma=sigma, std=std, units=units)
    return torch.from_numpy(x).float()


def _pages(
    path: Path, pictures: data.Pictures | None, columns: Sequence[str] = ()
) -> np.ndarray | list[np.ndarray]:
    """All that a file holds, by the readers of the data sources: an array, or pages (C, H, W)."""
    check("denoise", path.is_file(), "file must exist", path)
    known = ", ".join((*images.ENDINGS, *arrays.ENDINGS, *(CSV_ENDINGS if columns else ())))
    ending = path.suffix.lower()
    if columns and ending in CSV_ENDINGS:
        with said_by("denoise", "open_source"):
            table = read_csv(str(path), path)
            request = Request(str(path), "", columns=tuple(columns))
            names = chosen_columns(request, table.schema, str(path))
            return table_array(str(path), table, names, lambda i: f"row {i}")
    fits = ending in (*images.ENDINGS, *arrays.ENDINGS)
    try:
        if ending in images.ENDINGS:
            return images.decode_pages(path.read_bytes(), "denoise", pictures)
        check("denoise", fits, f"{path} must end in {known}", path.name)
        array, inside = arrays.load_arrays(path)
        if array is None:
            raise Unfit("hold one array", f"the arrays {', '.join(inside)}")
        return array
    except OSError as error:
        raise ValueError(f"denoise: {path} must be a file that can be read, got: {error}") from None
    except Unfit as error:
        raise ValueError(
            f"denoise: {path} must be a whole image, .npy or .npz, got: {error}"
        ) from None


def _as_rows(
    path: Path, found: np.ndarray | list[np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """The samples (n, *shape) in an array of one or of several."""
    if isinstance(found, list):
        kinds = sorted({f"{page.shape} {page.dtype}" for page in found})
        rule = f"{path} must be a whole image, .npy or .npz"
        got = f"must hold pages of one shape and kind, got {' and '.join(kinds)}"
        if len(kinds) > 1:
            raise ValueError(f"denoise: {rule}, got: {got}")
        found = np.stack(found)
    plain = shape[1:] if shape[0] == 1 and len(shape) > 1 else shape
    for dims in (shape, plain, (1, *plain)):
        if found.shape == dims:
            return found.reshape(1, *shape)
        if found.ndim == len(dims) + 1 and found.shape[1:] == dims and len(found):
            return found.reshape(-1, *shape)
    raise _misshapen(path, found, f"samples {shape}", shape[0])


def _as_pictures(path: Path, found: np.ndarray, channels: int) -> np.ndarray:
    """The pictures (n, C, height, width) in an array of one or of several."""
    if found.ndim == 2 and channels == 1:
        found = found[np.newaxis]
    if found.ndim == 3:
        found = found[np.newaxis]
    if found.ndim == 4 and found.shape[1] == channels and found.size:
        return found
    raise _misshapen(path, found, f"pictures ({channels}, height, width)", channels)


def _misshapen(path: Path, found: np.ndarray, wanted: str, channels: int) -> ValueError:
    got = f"shape {found.shape}"
    if any(channels_last(tuple(dims)) for dims in (found.shape, found.shape[1:])):
        got += " with channels last (numpy.moveaxis(array, -1, -3) brings them to the front)"
    elif path.suffix.lower() in images.ENDINGS and found.shape[1] == channels:
        got += " (only a U-Net of pictures takes other sizes than the trained one)"
    elif path.suffix.lower() in images.ENDINGS:
        got += " (--convert rgb or grey makes one kind of pictures)"
    return ValueError(f"denoise: {path} must hold {wanted}, got {got}")


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
