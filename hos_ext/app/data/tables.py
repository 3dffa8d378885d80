"""Columns of tables, which parquet files and the data sets of `datasets` share."""

from __future__ import annotations

import bisect
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...checks import check, require
from .images import decode_image, image_rows
from .labels import classes_of
from .rows import (
    Classes,
    Request,
    Rows,
    array_rows,
    cast,
    check_no_pictures,
    check_set,
    error_line,
    kept_dtype,
    refusal,
)
from .streams import Examples, examples_of, streamed


def choose_column(spec: str, features: dict[str, Any], column: str | None) -> tuple[str, bool]:
    """The column to read, and whether it holds images.

    Args:
        spec: of the table, for messages.
        features: its columns as `datasets` describes them.
        column: what the user chose. None: the only image column, or else the only list of numbers.

    Raises:
        ValueError: there is no such column, or no single choice.
    """
    images = [name for name, feature in features.items() if _is_image(feature)]
    lists = [name for name, feature in features.items() if _number_type(feature)]
    choice = images or lists
    if column is None and len(choice) == 1:
        column = choice[0]
    rule = f"column must be one of the images {images} or lists of numbers {lists} of {spec}"
    check("open_source", column in images + lists, rule, repr(column))
    assert column is not None
    return column, column in images


def plain_table(request: Request, features: dict[str, Any]) -> bool:
    """Whether several columns make a sample: they are asked for, or there are no others.

    Args:
        request: what was asked for.
        features: the columns as `datasets` describes them.
    """
    if request.columns or request.column is not None:
        return bool(request.columns)
    there = {name: each for name, each in features.items() if name != request.label}
    whole = any(_is_image(each) or _number_type(each) for each in there.values())
    dtypes = [str(each.get("dtype")) for each in there.values() if isinstance(each, dict)]
    return not whole and any(each.startswith(("int", "uint", "float")) for each in dtypes)


def table_rows(
    request: Request,
    pieces: list[Any],
    places: Sequence[str],
    *,
    image: bool,
    classes: Classes | None = None,
) -> Rows:
    """The rows of a column that comes in pieces of arrow, each from the place of that number."""
    arrow, spec = require("open_source", "pyarrow"), request.spec
    starts = list(itertools.accumulate([len(piece) for piece in pieces], initial=0))
    values = arrow.chunked_array([c for p in pieces for c in p.chunks], type=pieces[0].type)

    def name(i: int) -> str:
        k = bisect.bisect_right(starts, i) - 1
        return f"row {i - starts[k]} of {places[k]}"

    check_set(spec, len(values), "not be empty", "0 rows")
    if image:
        return image_rows(request, len(values), lambda i: values[i].as_py(), name, classes)
    rows = array_rows(request, _numbers(spec, values, name), name)
    return rows._replace(classes=classes)


def label_classes(
    request: Request, features: dict[str, Any], read: Callable[[str], Sequence[Any]]
) -> Classes | None:
    """The classes in the column that `request.label` names; None where it names none.

    Args:
        request: what was asked for.
        features: the columns as `datasets` describes them.
        read: the values of a column, in the order of the rows.
    """
    label = request.label
    if label is None:
        return None
    names = _class_names(request, features)
    return classes_of(request, read(label), names)


def _class_names(request: Request, features: dict[str, Any]) -> list[str] | None:
    """The names of a column of classes; None of a column of plain numbers or text."""
    label = request.label
    fit = [name for name, feature in features.items() if _is_label(feature)]
    rule = f"label must be one of the columns {fit} of {request.spec}"
    check("open_source", label in fit, rule, repr(label))
    names: list[str] | None = features[str(label)].get("names")
    return names


def _is_label(feature: Any) -> bool:
    """Classes, whole numbers or text."""
    if not isinstance(feature, dict):
        return False
    kind, dtype = feature.get("_type"), str(feature.get("dtype"))
    plain = kind == "Value" and dtype.startswith(("int", "uint", "bool", "string", "large_string"))
    return kind == "ClassLabel" or plain


def stream_table(request: Request, target: str, **options: Any) -> Examples:
    """A column of what `datasets.load_dataset(target, streaming=True, **options)` gives."""
    datasets, spec = require("open_source", "datasets"), request.spec
    with tempfile.TemporaryDirectory() as cache:  # for a lock: a stream is not stored
        options |= {"streaming": True, "cache_dir": cache}
        dataset = load_data_set(spec, datasets.load_dataset, target, **options)
    features = dataset.features.to_dict() if dataset.features else {}
    check_set(spec, not request.columns, "be no stream for --columns", "streaming")
    column, image = choose_column(spec, features, request.column)
    label = request.label
    names = None if label is None else _class_names(request, features)
    rule = f"have classes with names in column {label!r} (kind ClassLabel) to be a stream"
    check_set(spec, label is None or names, rule, "others")
    columns = [column] if label is None else [column, label]
    dataset, number = dataset.select_columns(columns), ""
    pictures = streamed(request)
    if not image:
        check_no_pictures(request)
        number = kept_dtype(spec, np.dtype(_number_type(features[column])))
    elif features[column].get("_type") == "Image":
        dataset = dataset.cast_column(column, datasets.Image(decode=False))

    def decode(example: dict[str, Any], place: str) -> np.ndarray:
        value = example[column]
        if image:
            return decode_image(spec, value, place, pictures)
        try:
            return cast(spec, np.asarray(value), number)
        except (TypeError, ValueError) as error:
            got = f"{place}: {error_line(error)}"
            raise refusal(spec, "hold arrays of numbers", got) from None

    found = examples_of(spec, dataset, decode, lambda row: f"row {row} of {spec}", pictures)
    if names is None:
        return found
    return found._replace(label=lambda example, _: _number(example[str(label)]), names=tuple(names))


def _number(label: Any) -> int:
    """A class by its number; -1 where there is none, which is refused."""
    return -1 if label is None else int(label)


def load_data_set(spec: str, load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a function of `datasets` gives; its errors in one line."""
    try:
        return load(*arguments, **options)
    except Exception as error:  # of `datasets`, the hub, the network, the files
        rule = "be a data set that `datasets` can load"
        raise refusal(spec, rule, error_line(error)) from None


def _is_image(feature: Any) -> bool:
    """The feature Image, or its struct in a file without the metadata of `datasets`."""
    return isinstance(feature, dict) and (
        feature.get("_type") == "Image" or set(feature) == {"bytes", "path"}
    )


def _number_type(feature: Any) -> str:
    """The dtype of the numbers in nested lists or an array feature, "" for other features."""
    depth = 0
    while isinstance(feature, list) or "feature" in feature:
        feature, depth = feature[0] if isinstance(feature, list) else feature["feature"], depth + 1
    kind, dtype = str(feature.get("_type")), str(feature.get("dtype"))
    nested = kind.startswith("Array") or (depth > 0 and kind == "Value")
    return dtype if nested and dtype.startswith(("int", "uint", "float")) else ""


def _numbers(spec: str, values: Any, name: Callable[[int], str]) -> np.ndarray:
    """A column of nested lists as an array (n, *dims)."""
    arrow = require("open_source", "pyarrow")
    chunks = [getattr(chunk, "storage", chunk) for chunk in values.chunks]  # arrays of `datasets`
    flat, dims = arrow.concat_arrays(chunks), [len(values)]
    while arrow.types.is_nested(flat.type):
        row_of = math.prod(dims[1:])
        lengths = require("open_source", "pyarrow.compute").list_value_length(flat)
        lengths = lengths.fill_null(-1).to_numpy(zero_copy_only=False)
        odd = np.flatnonzero((lengths != lengths[0]) | (lengths < 1))
        if len(odd):
            got = f"{name(0)} and {name(odd[0] // row_of)}"
            raise refusal(spec, "hold lists of one length, not empty", f"others in {got}")
        dims.append(int(lengths[0]))
        flat = flat.flatten()
    kept_dtype(spec, np.dtype(flat.type.to_pandas_dtype()))
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(dims)
