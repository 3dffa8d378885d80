"""hf:NAME, a data set of the Hugging Face hub, which `datasets` copies to its cache (HF_HOME)."""

from __future__ import annotations

from ....checks import require
from ..columns import chosen_columns, column_rows
from ..registry import register_source
from ..rows import Request, Rows
from ..streams import Examples
from ..tables import (
    choose_column,
    label_classes,
    load_data_set,
    plain_table,
    stream_table,
    table_rows,
)


def _splits(request: Request) -> list[str]:
    datasets = require("open_source", "datasets")
    names: list[str] = load_data_set(request.spec, datasets.get_dataset_split_names, request.target)
    return names


def _stream(request: Request) -> Examples:
    return stream_table(request, request.target, split=request.split)


@register_source(
    "hf", "NAME", splits=_splits, stream=_stream, column=True, columns=True, labels=True
)
def open_hf(request: Request) -> Rows:
    """A column of images or of lists of numbers, of one split."""
    datasets = require("open_source", "datasets")
    spec = request.spec
    dataset = load_data_set(spec, datasets.load_dataset, request.target, split=request.split)
    features = dataset.features.to_dict()
    if plain_table(request, features):
        names = chosen_columns(request, dataset.features.arrow_schema, spec)
        table = dataset.select_columns(list(names)).with_format("arrow")[:]
        classes = label_classes(request, features, lambda name: dataset[name][:])
        return column_rows(request, [table], [spec], names)._replace(classes=classes)
    column, image = choose_column(spec, features, request.column)
    classes = label_classes(request, features, lambda name: dataset[name][:])
    piece = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    return table_rows(request, [piece], [spec], image=image, classes=classes)
