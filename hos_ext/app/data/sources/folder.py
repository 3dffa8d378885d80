"""folder:PATH, all images below a folder, sorted by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ....checks import require
from ..files import files_of
from ..images import ENDINGS, decode_image, image_rows
from ..registry import register_source
from ..rows import Request, Rows
from ..streams import Examples, examples_of, streamed


def _files(request: Request) -> list[Path]:
    return files_of(request, ENDINGS, folders=True)


def _stream(request: Request) -> Examples:
    datasets = require("open_source", "datasets")
    pictures = streamed(request)
    files = [str(path) for path in _files(request)]
    paths = [{"bytes": None, "path": path} for path in files]
    dataset = datasets.Dataset.from_dict({"image": paths}).to_iterable_dataset()

    def decode(example: dict[str, Any], place: str) -> np.ndarray:
        return decode_image(request.spec, example["image"], place, pictures)

    return examples_of(request.spec, dataset, decode, lambda row: files[row], pictures)


@register_source("folder", "PATH", files=_files, stream=_stream)
def open_folder(request: Request) -> Rows:
    """The images as rows; hidden files and other kinds of files are left out."""
    files = _files(request)
    return image_rows(
        request, len(files), lambda i: {"path": str(files[i])}, lambda i: str(files[i])
    )
