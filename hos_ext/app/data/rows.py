"""Rows: the samples of a data set by number, raw, and what is refused of them.

Rows are uint8 or floating; whole numbers of other kinds are kept as floating ones, exactly. What
would lose by a conversion, or must be guessed, is refused in one line that names the sample.
Rows know nothing of parts, batches and scaling.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import check
from ...random import Key
from .pictures import Pictures

LIMIT = 2**30
CHUNK_VALUES = 2**22
# What numbers are kept as; all conversions are exact (of 64 bits what is below 2^53 is taken).
_KEPT = {"uint8": "uint8", "float16": "float32", "float32": "float32", "float64": "float64"}
_WHOLE = dict.fromkeys(("int8", "int16", "uint16"), "float32")
_WHOLE |= dict.fromkeys(("int32", "uint32", "int64", "uint64"), "float64")


class Request(NamedTuple):
    """What a source is asked to open.

    Attributes:
        spec: as the user wrote it, such as "npy:a.npy"; error messages begin with it.
        target: the part after the colon.
        seed: of what is random in the data themselves, such as draws of a density.
        column: which of several columns or arrays; None where the user did not say.
        split: which of the parts that the set itself has.
        limit: bytes. A set that is larger is read row by row.
        pictures: what is done to pictures.
        columns: which columns make a sample of a table; empty where the user did not say.
        label: which labels are wanted: the name of a column or array, or "label" for those that a
            set has of itself; None for none.
    """

    spec: str
    target: str
    seed: int = 0
    column: str | None = None
    split: str = "train"
    limit: int = LIMIT
    pictures: Pictures = Pictures()
    columns: tuple[str, ...] = ()
    label: str | None = None


class Classes(NamedTuple):
    """The class of each row.

    Attributes:
        numbers: of the classes. Shape (n,), int64.
        names: what they are called: class k is names[k].
    """

    numbers: Tensor
    names: tuple[str, ...]


class Rows(NamedTuple):
    """The samples of an open set, by number.

    Attributes:
        spec: what was opened.
        size: how many rows.
        shape: of one row.
        levels: 256 for uint8, or fewer whole levels; 0 for floating data.
        resident: all rows are in memory.
        read: rows (n, *shape), raw, of their numbers (n,), int64. Always the same.
        truth: the density that the rows were drawn from, if it is known.
        visit: the same rows as a step of training sees them, drawn by a key: such as cuts of
            pictures at random places. None where they are those of `read`.
        whole: floating values that are whole numbers of another kind, such as int64.
        classes: of the rows, where they were asked for.
        columns: names of the entries of a row of a table; each is standardised by itself.
    """

    spec: str
    size: int
    shape: tuple[int, ...]
    levels: int
    resident: bool
    read: Callable[[Tensor], Tensor]
    truth: Any = None
    visit: Callable[[Tensor, Key], Tensor] | None = None
    whole: bool = False
    classes: Classes | None = None
    columns: tuple[str, ...] = ()

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
        array: shape (n, *dims), uint8, floating, or whole numbers of another kind.
        name: what error messages call row i.
        levels: of uint8 values, which then are whole levels 0 ... levels - 1.

    Returns:
        The rows, float16 as float32, whole numbers but uint8 as floating ones.

    Raises:
        ValueError: the array is empty, not finite, of another kind or without dims; whole numbers
            beyond 2^53.
    """
    spec = request.spec
    kept = kept_dtype(spec, array.dtype)
    check_no_pictures(request)
    check_set(spec, array.ndim >= 2, "have shape (n, *dims)", array.shape)
    check_set(spec, array.size, "not be empty", f"shape {array.shape}")
    check_layout(spec, array.shape[1:], f"shape {array.shape}")

    def tensor(values: np.ndarray, name: Callable[[int], str]) -> Tensor:
        return finite(spec, torch.from_numpy(cast(spec, values, kept)), name)

    shape, levels = tuple(array.shape[1:]), levels if kept == "uint8" else 0
    whole = array.dtype.name in _WHOLE
    if array.size * np.dtype(kept).itemsize <= request.limit:
        everything = tensor(array, name)
        found = Rows(spec, len(array), shape, levels, True, lambda rows: everything[rows])
        return found._replace(whole=whole)

    def read(rows: Tensor) -> Tensor:
        return tensor(array[rows.numpy()], lambda i: name(int(rows[i])))

    return Rows(spec, len(array), shape, levels, False, read, whole=whole)


# ------------------------------------------------------------------------------- what is refused


def refusal(spec: str, rule: str, got: object) -> ValueError:
    """The error of a set that cannot be used: `spec` must `rule`."""
    return ValueError(f"open_source: {spec} must {rule}, got {got}")


def check_set(spec: str, condition: object, rule: str, got: object) -> None:
    """Raises `refusal` where the condition is false; see `checks.check`."""
    check("open_source", condition, f"{spec} must {rule}", got)


def check_no_pictures(request: Request) -> None:
    """Refuses what can only be done to pictures."""
    given = ", ".join(f"--{name}" for name in request.pictures.given())
    rule = "hold pictures in files, parquet: or hf: for"
    check_set(request.spec, not given, f"{rule} {given}", "arrays of numbers")


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
    """Another library's error in one line, without addresses of objects in memory."""
    text = re.sub(r" <[^<>]* at 0x[0-9a-fA-F]+>", "", f"{type(error).__name__} {error}")
    return " ".join(text.split())[:300]


def kept_dtype(spec: str, dtype: np.dtype) -> str:
    """The dtype that numbers are kept in, without loss."""
    known = _KEPT | _WHOLE
    rule = "hold uint8 (256 levels), other whole numbers or floating ones (convert to float32)"
    check_set(spec, dtype.name in known, rule, dtype.name)
    return known[dtype.name]


def cast(spec: str, values: np.ndarray, kept: str) -> np.ndarray:
    """A copy of the values in the dtype that they are kept in; whole numbers stay exact."""
    if values.dtype.itemsize == 8 and values.dtype.kind in "iu" and values.size:
        most = max(abs(int(values.min())), abs(int(values.max())))
        rule = "hold whole numbers of at most 2^53 (convert to float64)"
        check_set(spec, most <= 2**53, rule, most)
    return np.array(values, dtype=kept)


def warn_whole(spec: str, values: Tensor) -> None:
    """Says that whole numbers are taken for floating ones, where that may be wrong."""
    std = float(values.double().std(correction=0))
    grey = bool((values >= 0).all() and (values < 256).all())
    if std < 16 or grey:
        way = "grey levels 0 to 255 as uint8 are dequantised" if grey else "they have no density"
        warnings.warn(
            f"open_source: {spec} holds whole numbers of standard deviation {std:.3g}, which are "
            f"taken as floating ones ({way})",
            stacklevel=4,
        )


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
    spec: str,
    example: np.ndarray,
    example_name: str,
    sample: np.ndarray,
    name: str,
    way: str = "",
) -> np.ndarray:
    """The sample, if it has the shape and dtype of an example."""
    same = (sample.shape, sample.dtype) == (example.shape, example.dtype)
    got = f"{example.shape} {example.dtype} in {example_name}"
    got = f"{got} and {sample.shape} {sample.dtype} in {name}{way}"
    check_set(spec, same, "hold samples of one shape and kind", got)
    return sample
