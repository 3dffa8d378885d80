"""Encoded images: the one place where a file becomes numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checks import require
from .rows import Request, Rows, alike, check_set, error_line, finite, refusal


def image_values(image: Any) -> np.ndarray | None:
    """The numbers of an open pillow image, or None for a mode that would have to be converted.

    Args:
        image: of mode L (8-bit grey), RGB (8 bits a channel) or F (floating grey).

    Returns:
        Shape (C, height, width), uint8 or float32; C is 3 for RGB, else 1.
    """
    if image.mode not in ("L", "RGB", "F"):
        return None
    values = np.asarray(image)
    planes = values.transpose(2, 0, 1) if values.ndim == 3 else values[np.newaxis]
    return np.ascontiguousarray(planes)


def decode_image(spec: str, value: Any, name: str) -> np.ndarray:
    """One encoded image as numbers, turned as its EXIF data say.

    Args:
        spec: of the data set, for messages.
        value: the struct of `datasets`: {"bytes": ..., "path": ...}, either may be None.
        name: of the image, for messages.

    Returns:
        Shape (C, height, width), uint8 or float32.

    Raises:
        ValueError: there is no image, or it is damaged, of several frames or of another mode.
        RuntimeError: pillow is missing.
    """
    pillow, exif = require("open_source", "PIL.Image"), require("open_source", "PIL.ImageOps")
    data = value.get("bytes") if value else None
    path = str(value.get("path") or "") if value else ""
    there = data is not None or path
    check_set(spec, there, "hold an image in every row", f"none in {name}")
    try:
        if data is None and "://" in path:  # streams of the hub have addresses
            with require("open_source", "fsspec").open(path, "rb") as file:
                data = file.read()
        elif data is None:
            data = Path(path).read_bytes()
        with pillow.open(io.BytesIO(data)) as image:
            frames, mode = getattr(image, "n_frames", 1), image.mode
            image.load()
            exif.exif_transpose(image, in_place=True)
            values = image_values(image)
    except Exception as error:  # pillow lets many kinds through: OSError, struct.error, zlib.error
        got = f"{name}: {error_line(error)}"
        raise refusal(spec, "hold images that can be read", got) from None
    check_set(spec, frames == 1, "hold single images", f"{frames} in {name}")
    rule = "hold 8-bit grey (L), RGB or floating grey (F) images (convert others first)"
    check_set(spec, values is not None, rule, f"mode {mode} in {name}")
    assert values is not None
    return values


def image_rows(
    request: Request, size: int, fetch: Callable[[int], Any], name: Callable[[int], str]
) -> Rows:
    """Rows of encoded images, decoded at once where they fit in memory.

    Args:
        request: what was asked for.
        size: how many images.
        fetch: image i as `decode_image` takes it.
        name: of image i, for messages.

    Returns:
        The rows, all of the shape and dtype of image 0.
    """
    spec = request.spec
    example = decode_image(spec, fetch(0), name(0))

    def decode(i: int) -> np.ndarray:
        return alike(spec, example, name(0), decode_image(spec, fetch(i), name(i)), name(i))

    shape, levels = example.shape, 256 if example.dtype == np.uint8 else 0
    if size * example.nbytes <= request.limit:
        images = np.empty((size, *shape), example.dtype)
        for i in range(size):
            images[i] = decode(i)
        everything = finite(spec, torch.from_numpy(images), name)
        return Rows(spec, size, shape, levels, True, lambda rows: everything[rows])

    def read(rows: torch.Tensor) -> torch.Tensor:
        if example.nbytes < 2**16:  # threads cost more than a small image
            images = [decode(i) for i in rows.tolist()]
        else:
            with ThreadPoolExecutor() as pool:  # pillow decodes without the lock of Python
                images = list(pool.map(decode, rows.tolist()))
        none = np.empty((0, *shape), example.dtype)
        batch = torch.from_numpy(np.stack(images) if images else none)
        return finite(spec, batch, lambda i: name(int(rows[i])))

    return Rows(spec, size, shape, levels, False, read)
