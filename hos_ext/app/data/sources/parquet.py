"""parquet:PATH, a file, a pattern such as "data/train-*.parquet", or all files below a folder."""

from __future__ import annotations

from pathlib import Path

from ....checks import require
from ..files import files_of
from ..registry import register_source
from ..rows import Request, Rows, check_set, error_line, refusal
from ..streams import Examples
from ..tables import choose_column, stream_table, table_rows


def _files(request: Request) -> list[Path]:
    return files_of(request, (".parquet",), folders=True, patterns=True)


def _stream(request: Request) -> Examples:
    files = {"train": [str(path) for path in _files(request)]}
    return stream_table(request, "parquet", split="train", data_files=files)


@register_source("parquet", "PATH", files=_files, stream=_stream, column=True)
def open_parquet(request: Request) -> Rows:
    """A column of images, as on the hub, or of lists of numbers, from files of one kind."""
    datasets, arrow = require("open_source", "datasets"), require("open_source", "pyarrow")
    spec, column = request.spec, request.column
    places, pieces, image = [str(path) for path in _files(request)], [], False
    for place in places:
        try:
            file = require("open_source", "pyarrow.parquet").ParquetFile(place)
            features = datasets.Features.from_arrow_schema(file.schema_arrow).to_dict()
            column, image = choose_column(place, features, column)
            pieces.append(file.read(columns=[column]).column(0))
        except (OSError, arrow.ArrowException) as error:
            got = f"{place}: {error_line(error)}"
            raise refusal(spec, "hold whole parquet files", got) from None
        types = pieces[0].type, pieces[-1].type
        got = f"{types[0]} in {places[0]} and {types[1]} in {place}"
        check_set(spec, types[0] == types[1], f"hold one type in column {column!r}", got)
    return table_rows(request, pieces, places, image=image)
