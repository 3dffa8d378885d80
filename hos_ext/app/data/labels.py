"""Class labels of a data set: which class each row has, and what the classes are called.

A source that knows labels gives `Rows` its `Classes` where `Request.label` asks for them. A source
makes `Labels` of these, which follow the rows into the parts and batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import check
from ...ops.noise import draw_uniform
from ...random import STREAM_LABEL, Key
from .rows import Classes, Request, check_set, refusal


class Labels(NamedTuple):
    """The labels of an open data set.

    Attributes:
        names: of the classes: label k is the class names[k].
        validation, test: of the held-out rows. Shape (n,), int64.
        reader: of a batch, as `Source.batch_labels` takes it.
    """

    names: tuple[str, ...]
    validation: Tensor
    test: Tensor
    reader: Callable[[int, int, int, int, int], Tensor]


def classes_of(
    request: Request,
    values: Sequence[Any] | np.ndarray,
    names: Sequence[str] | None = None,
    name: Callable[[int], str] = "row {}".format,
) -> Classes:
    """The classes of rows, from their labels.

    Args:
        request: what was asked for.
        values: a label for each row: whole numbers, True and False, or text.
        names: of the classes, where values are their numbers. None: each value that occurs is a
            class, in order, and is called as it is written.
        name: what error messages call row i.

    Raises:
        ValueError: a label is missing or of another kind, or they tell no classes apart.
    """
    what = f"labels {request.label!r}"
    array = np.asarray(values)
    if array.dtype.kind == "O":  # of text with rows without any, or of several kinds
        missing = [i for i, value in enumerate(values) if value is None]
        lost = f"none in {name(missing[0])}" if missing else ""
        check_set(request.spec, not missing, f"have {what} in every row", lost)
    good = array.ndim == 1 and array.dtype.kind in "biuU"
    rule = f"have {what} that are whole numbers or text, one for each row"
    got = f"{array.dtype.name} of shape {array.shape}"
    check_set(request.spec, good, rule, got)
    if names is None:
        found, numbers = np.unique(array, return_inverse=True)
        names = [str(value) for value in found.tolist()]
    else:
        bad = np.flatnonzero((array < 0) | (array >= len(names)))
        rule = f"have {what} in 0 ... {len(names) - 1}"
        check_set(request.spec, not len(bad), rule, lambda: f"{array[bad[0]]} in {name(bad[0])}")
        numbers = array
    several = 2 <= len(names) <= max(2, len(array) // 2)
    rule = f"have {what} of 2 classes or more, of several rows each"
    check_set(request.spec, several, rule, f"{_shown(names)} in {len(array)} rows")
    return Classes(torch.from_numpy(np.array(numbers, dtype=np.int64)), tuple(names))


def matched(own: Classes | None, names: tuple[str, ...], spec: str) -> Tensor:
    """The labels of a test set of its own, as numbers of the classes of the training set."""
    if own is None:
        raise refusal(spec, "have labels like the data set", "none")
    unknown = [each for each in own.names if each not in names]
    rule = f"have no classes but {_shown(names)}"
    check_set(spec, not unknown, rule, lambda: _shown(unknown))
    places = torch.tensor([names.index(each) for each in own.names])
    return places[own.numbers]


def drop_labels(labels: Tensor, classes: int, rate: float, key: Key) -> Tensor:
    """The labels, each replaced by `classes` (no class) with a probability; by (seed, step, row).

    Args:
        labels: shape (B,), int64.
        classes: how many there are.
        rate: the probability, in [0, 1).
        key: of the draw.

    Example:
        >>> import torch
        >>> from hos_ext.app.data import drop_labels
        >>> from hos_ext.random import Key
        >>> dropped = drop_labels(torch.zeros(1000, dtype=torch.int64), 10, 0.1, Key(0))
        >>> 70 < int((dropped == 10).sum()) < 130
        True
    """
    u = draw_uniform(key, STREAM_LABEL, labels.shape, torch.empty(0, dtype=torch.float64))
    return torch.where(u < rate, classes, labels)


def class_number(where: str, option: str, names: Sequence[str], text: str) -> int:
    """The number of a class that the user names; `none` is the number of no class."""
    if text in names:
        return list(names).index(text)
    rule = f"{option} must be one of {_shown(names)}, or none"
    check(where, text == "none", rule, repr(text))
    return len(names)


def _shown(names: Sequence[str]) -> str:
    most = 12
    more = f" ... ({len(names)} classes)" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
