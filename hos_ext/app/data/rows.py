"""Rows: the samples of a data set by number, raw, and what is refused of them.

Rows are uint8 or floating. What would have to be cast, converted or guessed is refused in one line
that names the sample. Rows know nothing of parts, batches and scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import check

LIMIT = 2**30
CHUNK_VALUES = 2**22
# What numbers are kept as; all conversions are exact.
_KEPT = {"uint8": "uint8", "float16": "float32", "float32": "float32", "float64": "float64"}


class Request(NamedTuple):
    """What a source is asked to open.

    Attributes:
        spec: as the user wrote it, such as "npy:a.npy"; error messages begin with it.
        target: the part after the colon.
        seed: of what is random in the data themselves, such as draws of a density.
        column: which of several columns or arrays; None where the user did not say.
        split: which of the parts that the set itself has.
        limit: bytes. A set that is larger is read row by row.
    """

    spec: str
    target: str
    seed: int = 0
    column: str | None = None
    split: str = "train"
    limit: int = LIMIT


class Rows(NamedTuple):
    """The samples of an open set, by number.

    Attributes:
        spec: what was opened.
        size: how many rows.
        shape: of one row.
        levels: 256 for uint8, or fewer whole levels; 0 for floating data.
        resident: all rows are in memory.
        read: rows (n, *shape), raw, of their numbers (n,), int64.
        truth: the density that the rows were drawn from, if it is known.
    """

    spec: str
    size: int
    shape: tuple[int, ...]
    levels: int
    resident: bool
    read: Callable[[Tensor], Tensor]
    truth: Any = None

    def chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """The rows of these numbers, a few at a time."""
        for some in rows.split(max(1, CHUNK_VALUES // math.prod(self.shape))):
            yield self.read(some)


def array_rows(
    request: Request, array: np.ndarray, name: Callable[[int], str] = str, *, levels: int = 256
) -> Rows:
    """The rows of an array in memory or mapped from a file.

    Args:
        request: what was asked for. The array is copied to memory where it fits in the limit.
        array: shape (n, *dims), uint8 or floating.
        name: what error messages call row i.
        levels: of uint8 values, which then are whole levels 0 ... levels - 1.

    Returns:
        The rows, float16 as float32.

    Raises:
        ValueError: the array is empty, not finite, of another kind or without dims.
    """
    spec = request.spec
    kept = kept_dtype(spec, array.dtype)
    check_set(spec, array.ndim >= 2, "have shape (n, *dims)", array.shape)
    check_set(spec, array.size, "not be empty", f"shape {array.shape}")
    check_layout(spec, array.shape[1:], f"shape {array.shape}")

    def tensor(values: np.ndarray, name: Callable[[int], str]) -> Tensor:
        return finite(spec, torch.from_numpy(np.array(values, dtype=kept)), name)

    shape, levels = tuple(array.shape[1:]), levels if kept == "uint8" else 0
    if array.size * np.dtype(kept).itemsize <= request.limit:
        everything = tensor(array, name)
        return Rows(spec, len(array), shape, levels, True, lambda rows: everything[rows])

    def read(rows: Tensor) -> Tensor:
        return tensor(array[rows.numpy()], lambda i: name(int(rows[i])))

    return Rows(spec, len(array), shape, levels, False, read)


# ------------------------------------------------------------------------------- what is refused


def refusal(spec: str, rule: str, got: object) -> ValueError:
    """The error of a set that cannot be used: `spec` must `rule`."""
    return ValueError(f"open_source: {spec} must {rule}, got {got}")


def check_set(spec: str, condition: object, rule: str, got: object) -> None:
    """Raises `refusal` where the condition is false; see `checks.check`."""
    check("open_source", condition, f"{spec} must {rule}", got)


def channels_last(dims: tuple[int, ...]) -> bool:
    """Whether samples of these dims look like pictures (height, width, C) in place of (C, ...).

    Pictures have 1, 3 or 4 channels: the last axis is of one of these lengths, the first is not,
    and height and width are 4 or more.
    """
    channels = (1, 3, 4)
    if len(dims) != 3 or dims[2] not in channels or dims[0] in channels:
        return False
    return min(dims[:2]) >= 4


def check_layout(spec: str, dims: tuple[int, ...], got: str) -> None:
    """Refuses pictures with channels last, which would train as `height` channels."""
    rule = "hold pictures as (n, C, height, width)"
    way = "with channels last (numpy.moveaxis(array, -1, 1) brings them to the front)"
    check_set(spec, not channels_last(tuple(dims)), rule, f"{got} {way}")


def error_line(error: Exception) -> str:
    """Another library's error in one line."""
    return " ".join(f"{type(error).__name__} {error}".split())[:300]


def kept_dtype(spec: str, dtype: np.dtype) -> str:
    """The dtype that numbers are kept in, without loss."""
    rule = (
        "hold uint8 (256 levels) or floating numbers (convert whole levels 0 to 255 to uint8, "
        "anything else to float32)"
    )
    check_set(spec, dtype.name in _KEPT, rule, dtype.name)
    return _KEPT[dtype.name]


def finite(spec: str, values: Tensor, name: Callable[[int], str]) -> Tensor:
    """The values themselves, without NaN and infinities; `name` says which sample row i is."""
    done = 0
    for chunk in values.split(max(1, CHUNK_VALUES // math.prod(values.shape[1:]))):
        bad = ~chunk.isfinite() if chunk.is_floating_point() else torch.zeros(())
        if bool(bad.any()):
            row = int(bad.flatten(1).any(1).nonzero()[0])
            got = f"{chunk[row][bad[row]][0].item()} in {name(done + row)}"
            raise refusal(spec, "hold finite numbers", got)
        done += len(chunk)
    return values


def alike(
    spec: str, example: np.ndarray, example_name: str, sample: np.ndarray, name: str
) -> np.ndarray:
    """The sample, if it has the shape and dtype of an example."""
    same = (sample.shape, sample.dtype) == (example.shape, example.dtype)
    got = f"{example.shape} {example.dtype} in {example_name}"
    got = f"{got} and {sample.shape} {sample.dtype} in {name}"
    check_set(spec, same, "hold samples of one shape and kind", got)
    return sample
