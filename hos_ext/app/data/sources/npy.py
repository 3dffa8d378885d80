"""npy:PATH, an .npy array or one array of an .npz file, mapped where it does not fit in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ....checks import check
from ..files import files_of
from ..registry import register_source
from ..rows import Request, Rows, array_rows, error_line, refusal


def _files(request: Request) -> list[Path]:
    return files_of(request, (".npy", ".npz"))


@register_source("npy", "PATH", files=_files, column=True)
def open_npy(request: Request) -> Rows:
    """The rows of an array (n, *dims); `column` names one of several arrays of an .npz file."""
    path = _files(request)[0]
    array = _load(request.spec, path, request.column)
    return array_rows(request, array, lambda i: f"row {i} of {path}")


def _load(spec: str, path: Path, column: str | None) -> np.ndarray:
    names: list[str] = []
    try:
        with path.open("rb") as file:
            if path.suffix == ".npz":
                content = np.load(file, allow_pickle=False)
                names = content.files
                column = names[0] if column is None and len(names) == 1 else column
                array = content[column] if column in names else np.empty(0)
            else:
                array = np.lib.format.open_memmap(path, mode="r")  # no pickle is read
    except Exception as error:  # numpy, zipfile and zlib have kinds of their own
        rule = "hold a whole .npy or .npz file of numbers (no objects: no pickle is read)"
        raise refusal(spec, rule, error_line(error)) from None
    known = f"one of the arrays {names}" if names else "None for an .npy file"
    fits = column in names or not (column or names)
    check("open_source", fits, f"column must be {known} of {path}", repr(column))
    return array
