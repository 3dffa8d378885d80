"""npy:PATH, an .npy array or one array of an .npz file, mapped where it does not fit in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ....checks import check
from ..arrays import ENDINGS, load_arrays
from ..files import files_of
from ..registry import register_source
from ..rows import Request, Rows, array_rows, refusal
from ..unfit import Unfit


def _files(request: Request) -> list[Path]:
    return files_of(request, ENDINGS)


@register_source("npy", "PATH", files=_files, column=True)
def open_npy(request: Request) -> Rows:
    """The rows of an array (n, *dims); `column` names one of several arrays of an .npz file."""
    path = _files(request)[0]
    array = _load(request.spec, path, request.column)
    return array_rows(request, array, lambda i: f"row {i} of {path}")


def _load(spec: str, path: Path, column: str | None) -> np.ndarray:
    try:
        array, names = load_arrays(path, column)
    except Unfit as error:
        raise refusal(spec, error.rule, error.got) from None
    known = f"one of the arrays {names}" if names else "None for an .npy file"
    check("open_source", array is not None, f"column must be {known} of {path}", repr(column))
    assert array is not None
    return array
