"""Files as bytes, and where they go."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ... import storage
from ...checks import check, require


def npz(arrays: Mapping[str, Tensor]) -> bytes:
    """Arrays by name, compressed."""
    buffer = io.BytesIO()
    plain: dict[str, Any] = {name: value.cpu().numpy() for name, value in arrays.items()}
    np.savez_compressed(buffer, **plain)
    return buffer.getvalue()


def tiff(images: Tensor) -> bytes:
    """Images (n, height, width) or (n, C, height, width) as n C pages of float32."""
    pillow = require("denoise", "PIL.Image")
    pages = images.float().cpu().reshape(-1, *images.shape[-2:]).contiguous().numpy()
    first, *rest = (pillow.fromarray(page) for page in pages)
    buffer = io.BytesIO()
    first.save(buffer, format="TIFF", save_all=True, append_images=rest)
    return buffer.getvalue()


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes each file whole or not at all; what killed writers of it left beside it goes."""
    for name, content in files.items():
        storage.write_whole(folder / name, content)
        storage.remove_leftovers(folder, name)


def refuse_existing(where: str, folder: Path, names: Iterable[str], *, force: bool) -> None:
    """Refuses, before the work, to overwrite files of an earlier call without --force.

    Args:
        where: the command.
        folder: where it writes.
        names: what it writes.
        force: whether --force was given.

    Raises:
        ValueError: one of them is there, and force is False.
    """
    there = [name for name in names if (folder / name).exists()]
    rule = "--out must hold none of its files (--force replaces them)"
    check(where, force or not there, rule, f"{folder} with {', '.join(there)}")
