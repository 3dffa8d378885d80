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
from torch import Tensor

from ...checks import require
from ...ops.noise import draw_uniform
from ...random import STREAM_CROP, Key
from .pictures import Pictures, converted, fitted, has_alpha, levels_of
from .rows import LIMIT, Classes, Request, Rows, alike, check_set, error_line, finite, refusal
from .unfit import Unfit

ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"),
    *(".ppm", ".pgm", ".pnm", ".pbm"),
)
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM", "GIF")
# How pillow calls pixels that it hands on as they are stored. `L;I` is 8-bit grey whose file says
# that 0 is white; R, G and B are planes.
_EXACT = {
    "L": ("L", "L;I"),
    "RGB": ("RGB", "R", "G", "B", "BGR", "BGRX"),
    "F": ("F;32F", "F;32BF", "F;32NF"),
}
_KINDS = "hold 8-bit grey (L), RGB or floating grey (F) images"
_READABLE = "hold images that can be read"
# What makes one of these of another kind.
_WAYS = {
    "alpha": "--alpha drop, white or black",
    "convert": "--convert rgb or grey",
    "bits": "--bits 8 or 16",
}
_COLOURS = ("P", "PA", "CMYK", "LAB", "HSV", "YCbCr")
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N")


def decode_pages(
    content: bytes, where: str = "open_source", wanted: Pictures | None = None
) -> list[np.ndarray]:
    """The pages of an encoded image, each turned as its EXIF data say. All commands read by this.

    Taken are 8-bit grey, 8-bit RGB and 32-bit floating grey, whose numbers are those of the file.
    Whatever pillow would convert on its own is refused unless `wanted` asks for it: it makes 8 bits
    of 16 bits a channel, and spreads fewer than 8 bits, or levels that end below 255, over 0 to
    255. A camera's JPEG with further pictures behind it (MPO: previews, the other eye, a depth map)
    is its first picture.

    Args:
        content: of a PNG, JPEG, TIFF, BMP, WebP, GIF or PNM file.
        where: the function named if pillow is missing.
        wanted: what is converted; its size is for `fitted`.

    Returns:
        Arrays (C, height, width), uint8 or float32; C is 3 for RGB, else 1. Several for a TIFF of
        several pages, or where all pages are asked for.

    Raises:
        Unfit: the content is damaged, animated, or of another kind; names the option.
        RuntimeError: pillow is missing.
    """
    wanted = wanted or Pictures()
    pillow, turn = require(where, "PIL.Image"), require(where, "PIL.ImageOps").exif_transpose
    pages = []
    try:
        _check_png(content)
        with pillow.open(io.BytesIO(content), formats=_FORMATS) as image:
            frames, size = _frames(image, wanted), 0
            for page in range(frames):
                image.seek(page)
                size += math.prod(image.size) * (3 if image.mode == "RGB" else 4)
                if page and size > LIMIT:  # many pages may be one place of a file
                    raise Unfit(f"hold pages of at most {LIMIT} bytes", f"{frames} pages")
                depth = _check_kind(image, content, wanted)
                pages.append(converted(turn(image), depth, wanted))
    except Unfit:
        raise
    except Exception as error:  # pillow lets many kinds through: OSError, struct.error, zlib.error
        raise Unfit(_READABLE, error_line(error)) from None
    return pages


def count_pages(content: bytes, wanted: Pictures) -> int:
    """How many pages `decode_pages` will find; what is wrong with them it says itself."""
    try:
        with require("open_source", "PIL.Image").open(
            io.BytesIO(content), formats=_FORMATS
        ) as image:
            return _frames(image, wanted)
    except Exception:  # of pillow, as above
        return 1


def _frames(image: Any, wanted: Pictures) -> int:
    """How many pages are read."""
    frames = getattr(image, "n_frames", 1)
    if image.format in ("JPEG", "MPO") or wanted.pages == "first":
        return 1
    if frames > 1 and image.format != "TIFF" and wanted.pages is None:
        raise Unfit("hold single images", f"{frames} (--pages first or all)")
    return int(frames)


def planes(image: Any) -> np.ndarray:
    """The numbers of a pillow image of mode L, RGB or F, (C, height, width)."""
    if image.mode not in _EXACT or has_alpha(image):
        raise Unfit(f"{_KINDS} (PIL.Image.convert makes them)", f"mode {image.mode}")
    return converted(image, 8, Pictures())


def _check_kind(image: Any, content: bytes, wanted: Pictures) -> int:
    """Refuses what is not read number by number; the file says so, the mode of pillow does not.

    Returns:
        The bits of a channel.
    """
    got, needs, depth = _kind(image, content)
    if not got and image.info.get("scale", 1) != 1:  # of a floating PNM file
        got = f"mode {image.mode} in units of {image.info['scale']:g}"
    if image.format == "TIFF" and image.mode != "RGBA" and image.tag_v2.get(338):  # ExtraSamples
        got, needs = got or f"mode {image.mode} with further channels", needs - {"alpha"}
    for tile in image.tile:  # none of WebP, which has 8 bits
        kind = tile.args[0] if isinstance(tile.args, tuple) else tile.args
        if not got and image.format != "GIF" and kind not in _EXACT[image.mode]:
            got = f"mode {image.mode} stored as {kind}"
    if not got or (needs and all(getattr(wanted, name) is not None for name in needs)):
        return depth
    ways = ", ".join(way for name, way in _WAYS.items() if name in needs)
    raise Unfit(f"{_KINDS} ({ways or 'convert others first'})", got)


def _kind(image: Any, content: bytes) -> tuple[str, set[str], int]:
    """What a picture is where it is not read as it is, what it needs, and bits of a channel."""
    mode, got, needs = image.mode, "", set()
    depth = 16 if mode in _DEEP else 1 if mode == "1" else 32 if mode == "F" else 8
    if mode not in ("L", "RGB", "F"):
        got = f"mode {mode}"
    if has_alpha(image):
        got = f"mode {mode}" + (" with a transparent colour" if mode in ("L", "RGB") else "")
        needs.add("alpha")
    if mode in _COLOURS:
        needs.add("convert")
    if mode in ("1", *_DEEP):
        needs.add("bits")
    if image.format == "PNG" and mode not in ("P", "PA") and content[24] != 8:
        depth = content[24]
        got = got or f"{depth} bits a channel"
        needs.add("bits")
    elif image.format == "BMP" and content[28] not in (8, 24, 32) and mode != "P":
        got = got or f"{content[28]} bits a pixel"
        needs.add("bits")
    elif image.format == "TIFF" and mode in ("L", "RGB", "F"):
        bits, kinds = set(image.tag_v2.get(258, (1,))), set(image.tag_v2.get(339, (1,)))
        if (bits, kinds) != (({32}, {3}) if mode == "F" else ({8}, {1})):
            got = f"{' and '.join(map(str, sorted(bits)))} bits a channel of sample format "
            got += " and ".join(map(str, sorted(kinds)))
            depth = max(bits)
            if kinds == {1} and mode != "F":
                needs.add("bits")
    elif image.format == "PPM" and mode != "F" and _top_level(content) != 255:
        top = _top_level(content)
        depth = 1 if mode == "1" else 16 if top > 255 else 4
        got = got or f"levels 0 to {top}"
        needs.add("bits")
    return got, needs, depth


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


def decode_image(
    spec: str, value: Any, name: str, wanted: Pictures | None = None, page: int = 0
) -> np.ndarray:
    """One encoded image as numbers, as `decode_pages` reads it.

    Args:
        spec: of the data set, for messages.
        value: the struct of `datasets`: {"bytes": ..., "path": ...}, either may be None.
        name: of the image, for messages.
        wanted: what is converted.
        page: which one, where all are samples.

    Returns:
        Shape (C, height, width), uint8 or float32.

    Raises:
        ValueError: there is no image, or it is damaged, of several pages or of another kind.
        RuntimeError: pillow is missing.
    """
    data = _content(spec, value, name)
    try:
        pages = decode_pages(data, wanted=wanted)
    except Unfit as error:
        raise _named(spec, error, name) from None
    single = len(pages) == 1 or (wanted is not None and wanted.pages == "all")
    check_set(spec, single, "hold single images", f"{len(pages)} in {name} (--pages first or all)")
    return pages[page]


def _named(spec: str, error: Unfit, name: str) -> ValueError:
    """The error of an image that is not taken."""
    got = f"{name}: {error.got}" if error.rule == _READABLE else f"{error.got} in {name}"
    return refusal(spec, error.rule, got)


def _content(spec: str, value: Any, name: str) -> bytes:
    """The bytes of an image in the struct of `datasets`."""
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
    return bytes(data)


def fit_image(
    spec: str, values: np.ndarray, name: str, wanted: Pictures, place: Tensor | None = None
) -> np.ndarray:
    """An image in the size that is asked for; `place` as in `fitted`."""
    try:
        return fitted(values, wanted, place)
    except Unfit as error:
        raise _named(spec, error, name) from None


def image_rows(
    request: Request,
    size: int,
    fetch: Callable[[int], Any],
    name: Callable[[int], str],
    classes: Classes | None = None,
) -> Rows:
    """Rows of encoded images, decoded at once where they fit in memory.

    Args:
        request: what was asked for.
        size: how many images.
        fetch: image i as `decode_image` takes it.
        name: of image i, for messages.
        classes: of the images. Each page of one has its class.

    Returns:
        The rows, all of the shape and dtype of image 0.
    """
    spec, wanted = request.spec, request.pictures
    if wanted.pages == "all":
        size, fetch, name, page_of, of = _all_pages(spec, size, fetch, name, wanted)
        classes = classes and Classes(classes.numbers[of], classes.names)
    else:
        page_of = int  # is not asked for

    def whole(i: int) -> np.ndarray:
        page = page_of(i) if wanted.pages == "all" else 0
        return decode_image(spec, fetch(i), name(i), wanted, page)

    example = fit_image(spec, whole(0), name(0), wanted)

    def cut(values: np.ndarray, i: int, place: Tensor | None = None) -> np.ndarray:
        sample = fit_image(spec, values, name(i), wanted, place)
        return alike(spec, example, name(0), sample, name(i), way=_way(wanted))

    shape, levels = example.shape, levels_of(example, wanted)
    kept = _kept_whole(whole, size, request.limit) if wanted.drawn else None
    if size * example.nbytes <= request.limit and (kept or not wanted.drawn):
        images = np.empty((size, *shape), example.dtype)
        for i in range(size):
            images[i] = cut(kept[i] if kept else whole(i), i)
        everything = finite(spec, torch.from_numpy(images), name)
        rows = Rows(spec, size, shape, levels, True, lambda rows: everything[rows])
    else:
        rows = Rows(spec, size, shape, levels, False, lambda rows: read(rows, None))

    def read(rows: Tensor, places: Tensor | None) -> Tensor:
        def one(k: int) -> np.ndarray:
            i = int(rows[k])
            values = kept[i] if kept else whole(i)
            return cut(values, i, None if places is None else places[k])

        if kept or example.nbytes < 2**16:  # threads cost more than a small image
            images = [one(k) for k in range(len(rows))]
        else:
            with ThreadPoolExecutor() as pool:  # pillow decodes without the lock of Python
                images = list(pool.map(one, range(len(rows))))
        none = np.empty((0, *shape), example.dtype)
        batch = torch.from_numpy(np.stack(images) if images else none)
        return finite(spec, batch, lambda i: name(int(rows[i])))

    rows = rows._replace(classes=classes)
    if not wanted.drawn:
        return rows
    return rows._replace(visit=lambda numbers, key: read(numbers, places_of(key, len(numbers))))


def places_of(key: Key, count: int) -> Tensor:
    """Places for cuts, (count, 2) in [0, 1): a function of (seed, offset, row)."""
    return draw_uniform(key, STREAM_CROP, (count, 2), torch.empty(0, dtype=torch.float64))


def _way(wanted: Pictures) -> str:
    """How pictures are made alike, by what was not asked for."""
    ways = [] if wanted.size else ["--size makes one size of them"]
    ways += [] if wanted.convert else ["--convert rgb or grey one kind"]
    return f" ({', '.join(ways)})" if ways else ""


def _kept_whole(
    whole: Callable[[int], np.ndarray], size: int, limit: int
) -> list[np.ndarray] | None:
    """All pictures in their own sizes, if they fit in memory."""
    found, left = [], limit
    for i in range(size):
        found.append(whole(i))
        left -= found[-1].nbytes
        if left < 0:
            return None
    return found


def _all_pages(
    spec: str,
    size: int,
    fetch: Callable[[int], Any],
    name: Callable[[int], str],
    wanted: Pictures,
) -> tuple[int, Callable[[int], Any], Callable[[int], str], Callable[[int], int], list[int]]:
    """Rows of all pages: how many, the file of each, its name, the page, and numbers of files."""
    places = []
    for i in range(size):
        count = count_pages(_content(spec, fetch(i), name(i)), wanted)
        places += [(i, page, count) for page in range(count)]

    def named(k: int) -> str:
        i, page, count = places[k]
        return name(i) if count == 1 else f"{name(i)}[{page}]"

    files = [i for i, _, _ in places]
    return len(places), lambda k: fetch(files[k]), named, lambda k: places[k][1], files
