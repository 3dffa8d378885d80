"""folder:PATH, all images below a folder, sorted by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ....checks import check, require
from ..files import files_of
from ..images import ENDINGS, decode_image, image_rows
from ..labels import classes_of
from ..registry import register_source
from ..rows import Classes, Request, Rows, check_set
from ..splits import random_order
from ..streams import Examples, examples_of, streamed


def _files(request: Request) -> list[Path]:
    return files_of(request, ENDINGS, folders=True)


def _stream(request: Request) -> Examples:
    datasets = require("open_source", "datasets")
    pictures = streamed(request)
    found = _files(request)
    if request.label is not None:  # in their order the rows held out would be of the first classes
        found = [found[i] for i in random_order(len(found), request.seed).tolist()]
    files = [str(path) for path in found]
    paths = [{"bytes": None, "path": path} for path in files]
    dataset = datasets.Dataset.from_dict({"image": paths}).to_iterable_dataset()

    def decode(example: dict[str, Any], place: str) -> np.ndarray:
        return decode_image(request.spec, example["image"], place, pictures)

    examples = examples_of(request.spec, dataset, decode, lambda row: files[row], pictures)
    if request.label is None:
        return examples
    numbers, names = _classes(request, found)
    return examples._replace(label=lambda _, row: int(numbers[row]), names=names)


@register_source("folder", "PATH", files=_files, stream=_stream, labels=True)
def open_folder(request: Request) -> Rows:
    """The images as rows; hidden files and other kinds of files are left out."""
    files = _files(request)
    return image_rows(
        request,
        len(files),
        lambda i: {"path": str(files[i])},
        lambda i: str(files[i]),
        None if request.label is None else _classes(request, files),
    )


def _classes(request: Request, files: list[Path]) -> Classes:
    """The folder right below the target that each file lies in."""
    check_folders = "label must be 'label' for folder:, whose sub-folders are the classes"
    check("open_source", request.label == "label", check_folders, repr(request.label))
    top = Path(request.target).expanduser()
    below = [file.relative_to(top).parts for file in files] if top.is_dir() else [()]
    bare = [i for i, parts in enumerate(below) if len(parts) < 2]
    rule = "hold images in sub-folders, which are the classes"
    check_set(request.spec, not bare, rule, lambda: files[bare[0]])
    return classes_of(request, [parts[0] for parts in below], name=lambda i: str(files[i]))
