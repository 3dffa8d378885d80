"""Tables of numbers: columns of CSV and parquet files and of data sets, each with its own scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import require
from .rows import Request, Rows, array_rows, cast, check_set, error_line, kept_dtype, refusal

CSV_ENDINGS = (".csv", ".tsv")


def chosen_columns(request: Request, schema: Any, place: str) -> tuple[str, ...]:
    """The columns that make a sample, numbers each: those asked for, or all but that of labels.

    Args:
        request: what was asked for.
        schema: of arrow.
        place: of the table, for messages.

    Raises:
        ValueError: a column is not there, is there twice, or holds no numbers; names it.
    """
    names: list[str] = list(schema.names)
    twice = sorted({name for name in names if names.count(name) > 1})
    check_set(request.spec, not twice, "have columns of different names", f"{twice} in {place}")
    chosen = request.columns or tuple(name for name in names if name != request.label)
    for name in chosen:
        rule = f"have the columns {', '.join(map(repr, chosen))}"
        check_set(request.spec, name in names, rule, f"{names} in {place}")
        rule = f"hold numbers in column {name!r} (--columns NAME,NAME,... chooses others)"
        kind = schema.field(name).type
        check_set(request.spec, is_number(kind), rule, f"{kind} in {place}")
    check_set(request.spec, chosen, "have columns of numbers", f"{names} in {place}")
    return chosen


def is_number(kind: Any) -> bool:
    """Whether a type of arrow is that of plain numbers; True and False are none."""
    types = require("open_source", "pyarrow").types
    return bool(types.is_integer(kind) or types.is_floating(kind))


def table_array(
    spec: str, table: Any, names: Sequence[str], name: Callable[[int], str]
) -> np.ndarray:
    """Columns of a table of arrow as an array (n, columns), float64.

    Args:
        spec: of the data, for messages.
        table: with all of the columns.
        names: of the columns.
        name: of row i.

    Raises:
        ValueError: a number is missing, not finite or beyond 2^53; names column and row.
    """
    found = np.empty((len(table), len(names)))
    for k, column in enumerate(names):
        values = table.column(column).to_numpy()
        found[:, k] = cast(spec, values, kept_dtype(spec, values.dtype))
        bad = np.flatnonzero(~np.isfinite(found[:, k]))
        rule = f"hold a number in every row of column {column!r} (--columns leaves it out)"
        got = f"{found[bad[0], k]} in {name(int(bad[0]))}" if len(bad) else ""
        check_set(spec, not len(bad), rule, got)
    return found


def column_rows(
    request: Request, tables: Sequence[Any], places: Sequence[str], names: tuple[str, ...]
) -> Rows:
    """The rows of tables of arrow, one below the other."""
    parts = [
        table_array(request.spec, table, names, _row_of(place))
        for table, place in zip(tables, places, strict=True)
    ]
    found = np.concatenate(parts)
    check_set(request.spec, len(found), "not be empty", "0 rows")
    return array_rows(request, found)._replace(columns=names)


def _row_of(place: str) -> Callable[[int], str]:
    return lambda i: f"row {i} of {place}"


def read_csv(spec: str, path: Path) -> Any:
    """A CSV file as a table of arrow: a line of names, then values between commas, semicolons or
    tabs."""
    csv, arrow = require("open_source", "pyarrow.csv"), require("open_source", "pyarrow")
    try:
        with path.open("rb") as file:
            first = file.readline(2**20)
        delimiter = max(",;\t", key=lambda sign: first.count(sign.encode()))
        options = csv.ParseOptions(delimiter=delimiter)
        table = csv.read_csv(path, parse_options=options)
    except (OSError, arrow.ArrowException) as error:
        rule = "hold whole tables, values between commas"
        raise refusal(spec, rule, f"{path}: {error_line(error)}") from None
    plain = all(_is_written_number(name) for name in table.column_names)
    check_set(spec, not plain, "have a line of names first", f"numbers in the first line of {path}")
    check_set(spec, len(table), "not be empty", f"0 rows in {path}")
    return table


def _is_written_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
