"""Files of arrays: the one place where an .npy or .npz file becomes numbers.

Nothing here reads a pickle. An .npy file is mapped, so that a header that lies about its size costs
no memory; an array of an .npz file is unpacked whole, and 8 GiB is the most that one may claim.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from .images import Unfit
from .rows import error_line

ENDINGS = (".npy", ".npz")
WHOLE = "hold a whole .npy or .npz file of numbers (no objects: no pickle is read)"
_UNPACKED = 2**33


def load_arrays(path: Path, column: str | None = None) -> tuple[np.ndarray | None, list[str]]:
    """An array of a file, and the names of all that an .npz file holds.

    Args:
        path: ends in .npy or .npz, in small letters or capitals.
        column: the name of an array of an .npz file; None if it holds one alone.

    Returns:
        The array, None where no array has that name or there are several to choose from; and the
        names, none for an .npy file.

    Raises:
        Unfit: the file is missing, damaged, holds objects, or claims more than 8 GiB.
    """
    try:
        if path.suffix.lower() != ".npz":
            array = np.lib.format.open_memmap(path, mode="r") if path.stat().st_size else None
            if array is None:
                raise EOFError("the file is empty")
            return (None if column else array), []
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            names = list(content.files)
            column = names[0] if column is None and len(names) == 1 else column
            if column is None or column not in names:
                return None, names
            _check_size(content.zip, column)
            return content[column], names
    except Unfit:
        raise
    except Exception as error:  # numpy, zipfile, zlib and tokenize have kinds of their own
        raise Unfit(WHOLE, error_line(error)) from None


def _check_size(content: zipfile.ZipFile, name: str) -> None:
    """Refuses an array that would not be unpacked in reasonable memory."""
    known = content.namelist()
    size = content.getinfo(name if name in known else f"{name}.npy").file_size
    if size > _UNPACKED:
        got = f"{size} bytes in {name!r} (write it as an .npy file, which is mapped)"
        raise Unfit(f"hold at most {_UNPACKED} bytes in an array of an .npz file", got)
