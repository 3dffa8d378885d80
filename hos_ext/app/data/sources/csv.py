"""csv:PATH, tables with a line of names: a file, a pattern, or all files below a folder."""

from __future__ import annotations

from pathlib import Path

from ..columns import CSV_ENDINGS, chosen_columns, column_rows, read_csv
from ..files import files_of
from ..labels import classes_of
from ..registry import register_source
from ..rows import Request, Rows, check_set


def _files(request: Request) -> list[Path]:
    return files_of(request, CSV_ENDINGS, folders=True, patterns=True)


@register_source("csv", "PATH", files=_files, columns=True, labels=True)
def open_csv(request: Request) -> Rows:
    """Columns of numbers; a row is a sample."""
    paths = _files(request)
    tables = [read_csv(request.spec, path) for path in paths]
    names = chosen_columns(request, tables[0].schema, str(paths[0]))
    for table, path in zip(tables, paths, strict=True):
        chosen_columns(request._replace(columns=names), table.schema, str(path))
    rows = column_rows(request, tables, [str(path) for path in paths], names)
    if request.label is None:
        return rows
    for table, path in zip(tables, paths, strict=True):
        rule = f"have labels in column {request.label!r}"
        check_set(request.spec, request.label in table.column_names, rule, f"none in {path}")
    values = [value for table in tables for value in table.column(request.label).to_pylist()]
    return rows._replace(classes=classes_of(request, values))
