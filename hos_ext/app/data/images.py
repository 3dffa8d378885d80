"""Encoded images: the one place where a file becomes numbers."""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checks import require
from .rows import LIMIT, Request, Rows, alike, check_set, error_line, finite, refusal

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM")
# How pillow calls pixels that it hands on as they are stored. `L;I` is 8-bit grey whose file says
# that 0 is white; R, G and B are planes.
_EXACT = {
    "L": ("L", "L;I"),
    "RGB": ("RGB", "R", "G", "B", "BGR", "BGRX"),
    "F": ("F;32F", "F;32BF", "F;32NF"),
}
_KINDS = "hold 8-bit grey (L), RGB or floating grey (F) images (convert others first)"
_READABLE = "hold images that can be read"


class Unfit(ValueError):
    """Why a file is not taken: it must `rule`, got `got`."""

    def __init__(self, rule: str, got: str) -> None:
        super().__init__(f"must {rule}, got {got}")
        self.rule, self.got = rule, got


def decode_pages(content: bytes, where: str = "open_source") -> list[np.ndarray]:
    """The pages of an encoded image, each turned as its EXIF data say. All commands read by this.

    Taken are 8-bit grey, 8-bit RGB and 32-bit floating grey, whose numbers are those of the file.
    Whatever pillow would convert on its own is refused: it makes 8 bits of 16 bits a channel, and
    spreads fewer than 8 bits, or levels that end below 255, over 0 to 255. A camera's JPEG with
    further pictures behind it (MPO: previews, the other eye, a depth map) is its first picture.

    Args:
        content: of a PNG, JPEG, TIFF, BMP, WebP or PNM file.
        where: the function named if pillow is missing.

    Returns:
        Arrays (C, height, width), uint8 or float32; C is 3 for RGB, else 1. Several for a TIFF of
        several pages.

    Raises:
        Unfit: the content is damaged, animated, or of another kind.
        RuntimeError: pillow is missing.
    """
    pillow, turn = require(where, "PIL.Image"), require(where, "PIL.ImageOps").exif_transpose
    pages = []
    try:
        _check_png(content)
        with pillow.open(io.BytesIO(content), formats=_FORMATS) as image:
            frames, size = getattr(image, "n_frames", 1), 0
            if image.format in ("JPEG", "MPO"):
                frames = 1
            if frames > 1 and image.format != "TIFF":
                raise Unfit("hold single images", str(frames))
            for page in range(frames):
                image.seek(page)
                size += math.prod(image.size) * (3 if image.mode == "RGB" else 4)
                if page and size > LIMIT:  # many pages may be one place of a file
                    raise Unfit(f"hold pages of at most {LIMIT} bytes", f"{frames} pages")
                _check_kind(image, content)
                pages.append(planes(turn(image)))
    except Unfit:
        raise
    except Exception as error:  # pillow lets many kinds through: OSError, struct.error, zlib.error
        raise Unfit(_READABLE, error_line(error)) from None
    return pages


def planes(image: Any) -> np.ndarray:
    """The numbers of a pillow image of mode L, RGB or F, (C, height, width)."""
    if image.mode not in _EXACT or "transparency" in image.info:
        raise Unfit(_KINDS, f"mode {image.mode}")
    values = np.asarray(image)
    first = values.transpose(2, 0, 1) if values.ndim == 3 else values[np.newaxis]
    return np.ascontiguousarray(first)


def _check_kind(image: Any, content: bytes) -> None:
    """Refuses what is not read number by number; the file says so, the mode of pillow does not."""
    got = ""
    if image.mode not in ("L", "RGB", "F"):
        got = f"mode {image.mode}"
    elif "transparency" in image.info:
        got = f"mode {image.mode} with a transparent colour"
    elif image.format == "PNG" and content[24] != 8:
        got = f"{content[24]} bits a channel"
    elif image.format == "BMP" and content[28] not in (8, 24, 32):
        got = f"{content[28]} bits a pixel"
    elif image.format == "TIFF":
        bits, kinds = set(image.tag_v2.get(258, (1,))), set(image.tag_v2.get(339, (1,)))
        if (bits, kinds) != (({32}, {3}) if image.mode == "F" else ({8}, {1})):
            got = f"{' and '.join(map(str, sorted(bits)))} bits a channel of sample format "
            got += " and ".join(map(str, sorted(kinds)))
    elif image.format == "PPM" and image.mode != "F" and _top_level(content) != 255:
        got = f"levels 0 to {_top_level(content)}"
    if not got and image.info.get("scale", 1) != 1:  # of a floating PNM file
        got = f"mode {image.mode} in units of {image.info['scale']:g}"
    if not got and image.format == "TIFF" and image.tag_v2.get(338):  # ExtraSamples
        got = f"mode {image.mode} with further channels"
    for tile in image.tile:  # none of WebP, which has 8 bits
        kind = tile.args[0] if isinstance(tile.args, tuple) else tile.args
        if not got and kind not in _EXACT[image.mode]:
            got = f"mode {image.mode} stored as {kind}"
    if got:
        raise Unfit(_KINDS, got)


def _check_png(data: bytes) -> None:
    """Raises where the sum of a part is wrong: pillow does not look at those of the pixels."""
    view, place = memoryview(data), 8
    if bytes(view[:8]) != b"\x89PNG\r\n\x1a\n":
        return
    while place < len(view):
        size, kind = int.from_bytes(view[place : place + 4], "big"), bytes(view[place + 4 :][:4])
        end = place + 8 + size
        stored = bytes(view[end : end + 4])
        if len(stored) < 4 or zlib.crc32(view[place + 4 : end]) != int.from_bytes(stored, "big"):
            raise OSError(f"part {kind!r} of the .png is truncated or damaged")
        if kind == b"IEND":
            return
        place = end + 4
    raise OSError("the .png is truncated")


def _top_level(content: bytes) -> int:
    """The highest level that a PGM or PPM file declares."""
    head = re.match(rb"P\d(?:\s+|#[^\n]*\n)+" + 2 * rb"\d+(?:\s+|#[^\n]*\n)+" + rb"(\d+)", content)
    return int(head[1]) if head else -1


def decode_image(spec: str, value: Any, name: str) -> np.ndarray:
    """One encoded image as numbers, as `decode_pages` reads it.

    Args:
        spec: of the data set, for messages.
        value: the struct of `datasets`: {"bytes": ..., "path": ...}, either may be None.
        name: of the image, for messages.

    Returns:
        Shape (C, height, width), uint8 or float32.

    Raises:
        ValueError: there is no image, or it is damaged, of several pages or of another kind.
        RuntimeError: pillow is missing.
    """
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
    except Exception as error:  # of the file system, the hub, the network
        raise refusal(spec, _READABLE, f"{name}: {error_line(error)}") from None
    try:
        pages = decode_pages(data)
    except Unfit as error:
        got = f"{name}: {error.got}" if error.rule == _READABLE else f"{error.got} in {name}"
        raise refusal(spec, error.rule, got) from None
    check_set(spec, len(pages) == 1, "hold single images", f"{len(pages)} in {name}")
    return pages[0]


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
