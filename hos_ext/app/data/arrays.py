"""Files of arrays: the one place where an .npy or .npz file becomes numbers, for all commands.

Nothing here reads a pickle. What a header claims is compared with what the file holds before memory
is asked for, and the sum of an array in an .npz file is looked at: numpy stops reading before it.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from .rows import LIMIT, error_line
from .unfit import Unfit

ENDINGS = (".npy", ".npz")
WHOLE = "hold a whole .npy or .npz file of numbers (no objects: no pickle is read)"
# Deflate makes 1032 bytes of one at most. What claims more than LIMIT bytes and is packed this
# tightly holds no measurements.
_MOST, _TIGHT = 1032, 100


def load_arrays(path: Path, column: str | None = None) -> tuple[np.ndarray | None, list[str]]:
    """An array of a file, and the names of all that an .npz file holds. The content says which.

    Args:
        path: of the file.
        column: the name of an array of an .npz file; None if it holds one alone.

    Returns:
        The array, mapped from an .npy file; None where no array has that name or there are several
        to choose from. And the names, none for an .npy file.

    Raises:
        Unfit: the file is missing, damaged, holds objects, or claims more than it can hold.
    """
    try:
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                return (None if column else _mapped(path)), []
        with zipfile.ZipFile(path) as content:
            inside = {name.removesuffix(".npy"): name for name in content.namelist()}
            if not inside or len(inside) < len(content.namelist()):
                raise Unfit(WHOLE, f"the arrays {content.namelist()}")
            names = list(inside)
            column = names[0] if column is None and len(names) == 1 else column
            if column is None or column not in names:
                return None, names
            return _unpacked(content, content.getinfo(inside[column])), names
    except Unfit:
        raise
    except Exception as error:  # numpy, zipfile, zlib and tokenize have kinds of their own
        raise Unfit(WHOLE, error_line(error)) from None


def _mapped(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        shape, fortran, dtype = _header(file)
        start, size = file.tell(), math.prod(shape) * dtype.itemsize
    left = path.stat().st_size - start
    _check_size(shape, dtype, size, left)
    if not size:
        return np.empty(shape, dtype)
    order: Any = "F" if fortran else "C"
    return np.memmap(path, dtype=dtype, shape=shape, order=order, mode="r", offset=start)


def _unpacked(content: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    claimed, packed = info.file_size, info.compress_size
    if (claimed > LIMIT and claimed > _TIGHT * packed) or claimed > _MOST * packed + _MOST:
        raise Unfit(WHOLE, f"{info.filename} that claims {claimed} bytes in {packed}")
    with content.open(info) as file:
        head = io.BytesIO(file.read(2**16))  # of a header, and perhaps of numbers
        shape, fortran, dtype = _header(head)
        start, size = head.tell(), math.prod(shape) * dtype.itemsize
        _check_size(shape, dtype, size, claimed - start)
        data = bytearray(size)
        first = head.read(size)
        data[: len(first)] = first
        rest = memoryview(data)[len(first) :]
        while rest:
            n = file.readinto(rest)  # type: ignore[attr-defined]
            if not n:
                raise Unfit(WHOLE, f"{info.filename} truncated")
            rest = rest[n:]
        file.read(1)  # at the end zipfile compares the sum
    order: Any = "F" if fortran else "C"
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """What an .npy file says of its array; the file is left at the first number."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    # Version 3 is version 2 with names of fields in other letters: no array of numbers needs it.
    if version not in read:
        raise Unfit(WHOLE, f"version {version}")
    shape, fortran, dtype = read[version](file)
    if dtype.hasobject or dtype.subdtype is not None or any(n < 0 for n in shape):
        raise Unfit(WHOLE, f"shape {shape} of {dtype}")
    return shape, fortran, dtype


def _check_size(shape: tuple[int, ...], dtype: np.dtype, size: int, left: int) -> None:
    if size != left:
        got = f"shape {shape} of {dtype}, {size} bytes, where {left} bytes are"
        raise Unfit(WHOLE, got)
