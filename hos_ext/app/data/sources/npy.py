"""npy:PATH, an .npy array or one array of an .npz file, mapped where it does not fit in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ....checks import check
from ..arrays import ENDINGS, load_arrays
from ..files import files_of
from ..labels import classes_of
from ..registry import register_source
from ..rows import Request, Rows, array_rows, check_set, refusal
from ..unfit import Unfit


def _files(request: Request) -> list[Path]:
    return files_of(request, ENDINGS)


@register_source("npy", "PATH", files=_files, column=True, labels=True)
def open_npy(request: Request) -> Rows:
    """The rows of an array (n, *dims); `column` names one of several arrays of an .npz file.

    So does `label`, the classes of the rows. Beside an .npy file it is the path of another one.
    """
    path, column, label = _files(request)[0], request.column, request.label
    if label is None:
        array = _load(request.spec, path, column)
        return array_rows(request, array, lambda i: f"row {i} of {path}")
    if Path(label).suffix == ".npy":
        rule = "label must be an array of an .npz file for a test set of its own"
        check("open_source", request.split == "train", rule, repr(label))
        file = Path(label).expanduser()
        check("open_source", file.is_file(), "label must be a file that exists", repr(label))
        labels = _load(request.spec, file, None)
    else:
        names = _names(request.spec, path)
        rule = f"label must be one of the arrays {names} of {path}, or an .npy file of labels"
        check("open_source", label in names, rule, repr(label))
        others = [name for name in names if name != label]
        column = others[0] if column is None and len(others) == 1 else column
        labels = _load(request.spec, path, label)
    array = _load(request.spec, path, column)
    rows = array_rows(request, array, lambda i: f"row {i} of {path}")
    rule, got = f"have {rows.size} labels {label!r}, one for each row", f"shape {labels.shape}"
    check_set(request.spec, labels.shape[:1] == (rows.size,), rule, got)
    return rows._replace(classes=classes_of(request, labels))


def _names(spec: str, path: Path) -> list[str]:
    """The names of the arrays in an .npz file; none of an .npy file."""
    try:
        return load_arrays(path, "")[1]
    except Unfit as error:
        raise refusal(spec, error.rule, error.got) from None


def _load(spec: str, path: Path, column: str | None) -> np.ndarray:
    try:
        array, names = load_arrays(path, column)
    except Unfit as error:
        raise refusal(spec, error.rule, error.got) from None
    known = f"one of the arrays {names}" if names else "None for an .npy file"
    check("open_source", array is not None, f"column must be {known} of {path}", repr(column))
    assert array is not None
    return array
