"""parquet:PATH, a file, a pattern such as "data/train-*.parquet", or all files below a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ....checks import require
from ..columns import chosen_columns, column_rows
from ..files import files_of
from ..registry import register_source
from ..rows import Request, Rows, check_set, error_line, refusal
from ..streams import Examples
from ..tables import choose_column, label_classes, plain_table, stream_table, table_rows


def _files(request: Request) -> list[Path]:
    return files_of(request, (".parquet",), folders=True, patterns=True)


def _stream(request: Request) -> Examples:
    files = {"train": [str(path) for path in _files(request)]}
    return stream_table(request, "parquet", split="train", data_files=files)


@register_source(
    "parquet", "PATH", files=_files, stream=_stream, column=True, columns=True, labels=True
)
def open_parquet(request: Request) -> Rows:
    """A column of images, as on the hub, or of lists of numbers, from files of one kind."""
    datasets, arrow = require("open_source", "datasets"), require("open_source", "pyarrow")
    spec, column = request.spec, request.column
    places, pieces, image = [str(path) for path in _files(request)], [], False
    names: tuple[str, ...] = ()
    tables: list[Any] = []
    files: list[Any] = []
    for place in places:
        try:
            file = require("open_source", "pyarrow.parquet").ParquetFile(place)
            files.append(file)
            features = datasets.Features.from_arrow_schema(file.schema_arrow).to_dict()
            if len(files) == 1 and plain_table(request, features):
                names = chosen_columns(request, file.schema_arrow, place)
            if names:
                chosen_columns(request._replace(columns=names), file.schema_arrow, place)
                tables.append(file.read(columns=list(names)))
                continue
            column, image = choose_column(place, features, column)
            pieces.append(file.read(columns=[column]).column(0))
        except (OSError, arrow.ArrowException) as error:
            got = f"{place}: {error_line(error)}"
            raise refusal(spec, "hold whole parquet files", got) from None
        types = pieces[0].type, pieces[-1].type
        got = f"{types[0]} in {places[0]} and {types[1]} in {place}"
        check_set(spec, types[0] == types[1], f"hold one type in column {column!r}", got)

    def read(label: str) -> list[Any]:
        try:
            return [v for f in files for v in f.read(columns=[label]).column(0).to_pylist()]
        except (OSError, KeyError, arrow.ArrowException) as error:
            raise refusal(spec, f"have labels {label!r}", error_line(error)) from None

    classes = label_classes(request, features, read)
    if names:
        return column_rows(request, tables, places, names)._replace(classes=classes)
    return table_rows(request, pieces, places, image=image, classes=classes)
