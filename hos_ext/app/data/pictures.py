"""What is done to pictures when they are read: nothing but what is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from ...checks import check, is_int, one_of, require
from .unfit import Unfit

CROPS, ALPHAS, COLOURS, PAGES = (
    ("scale", "centre", "random"),
    ("drop", "white", "black"),
    ("rgb", "grey"),
    ("first", "all"),
)
_WHERE = "Pictures"


@dataclass(frozen=True)
class Pictures:
    """How pictures of several kinds become samples of one kind. None: what differs is refused.

    Attributes:
        size: (height, width) of a sample; also a number, for squares, or a text, "64" or "48x64".
        crop: how a picture comes to that size. "scale" (the default) scales it until it covers the
            size and takes the middle; "centre" takes the middle of the pixels as they are;
            "random" takes them from a place that is drawn anew in each step of training, and from
            the middle for what is held out.
        alpha: what lies behind transparent pixels: "white", "black"; or "drop" for the colours that
            are stored there.
        convert: "rgb" or "grey": all pictures are made of one kind; also palettes and CMYK.
        bits: 8 or 16. 8 takes the upper 8 bits of 16 (of .ppm the nearest level), and spreads 1, 2
            and 4 bits. 16 keeps all as 65536 whole levels; 8-bit pictures are spread over them.
        pages: "first" of an animation or a file of several pages, or "all" as samples.

    Example:
        >>> from hos_ext.app.data import Pictures
        >>> Pictures(size="48x64", crop="random", alpha="white", convert="rgb").size
        (48, 64)
    """

    size: Any = None
    crop: str | None = None
    alpha: str | None = None
    convert: str | None = None
    bits: int | None = None
    pages: str | None = None

    def __post_init__(self) -> None:
        known = {"crop": CROPS, "alpha": ALPHAS, "convert": COLOURS, "pages": PAGES}
        for name, names in known.items():
            if getattr(self, name) is not None:
                one_of(_WHERE, name, getattr(self, name), names)
        good = self.bits is None or (is_int(self.bits) and self.bits in (8, 16))
        check(_WHERE, good, "bits must be 8 or 16", lambda: repr(self.bits))
        if self.size is not None:
            object.__setattr__(self, "size", _size(self.size))
        fits = self.crop is None or self.size is not None
        check(_WHERE, fits, f"size must be given with crop {self.crop!r}", "none")

    @property
    def drawn(self) -> bool:
        """Whether samples are cut from a place that is drawn."""
        return self.crop == "random"

    def given(self) -> list[str]:
        """The names of what is asked for."""
        return [each.name for each in fields(self) if getattr(self, each.name) is not None]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Pictures:
        """What options of a run, or of a command, say; those that are missing say nothing."""
        return cls(**{each.name: options.get(each.name) for each in fields(cls)})


def _size(value: Any) -> tuple[int, int]:
    rule = "size must be N or HxW, whole numbers of at least 1"
    if isinstance(value, str):
        found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", value)
        check(_WHERE, found, rule, repr(value))
        assert found is not None
        value = (int(found[1]), int(found[2] or found[1]))
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    good = len(pair) == 2 and all(is_int(each) and each > 0 for each in pair)
    check(_WHERE, good, rule, repr(value))
    return int(pair[0]), int(pair[1])


# ----------------------------------------------------------------------------------- one kind


def converted(image: Any, depth: int, wanted: Pictures) -> np.ndarray:
    """The numbers of a pillow image, with its transparency, colours and bits as asked for.

    Args:
        image: of any mode, as stored; what it needs is asked for.
        depth: bits of a channel in the file.
        wanted: what is asked for.

    Returns:
        Shape (C, height, width); uint8, or float32 for 16 bits and floating pictures.

    Raises:
        Unfit: levels or colours are asked for that the picture does not have.
    """
    full, deep = wanted.bits == 16, image.mode.startswith("I")
    if full and depth == 16 and not deep:  # pillow drops the lower 8
        raise Unfit("hold grey for 16 bits (--bits 8, or a float32 .npy)", f"mode {image.mode}")
    if image.mode == "F":
        given = [f"--{name}" for name in ("convert", "bits") if getattr(wanted, name) is not None]
        if given:
            raise Unfit(f"hold whole levels for {' and '.join(given)}", "floating grey (mode F)")
        return np.ascontiguousarray(np.asarray(image)[np.newaxis])
    if deep:
        values = np.asarray(image).astype(np.int64)[np.newaxis]
        values = (values if full else values >> 8).repeat(3 if wanted.convert == "rgb" else 1, 0)
        return values.astype(np.float32 if full else np.uint8)
    if wanted.alpha is not None and has_alpha(image):
        image = _without_alpha(image, wanted.alpha)
    kinds = {"rgb": "RGB", "grey": "L", None: image.mode if image.mode != "1" else "L"}
    image = image if image.mode in ("L", "RGB", "1") else image.convert("RGB")
    values = np.asarray(image.convert(kinds[wanted.convert]))
    planes = values.transpose(2, 0, 1) if values.ndim == 3 else values[np.newaxis]
    return planes.astype(np.float32) * 257 if full else np.ascontiguousarray(planes)


def has_alpha(image: Any) -> bool:
    """Whether a pillow image knows transparent pixels."""
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _without_alpha(image: Any, behind: str) -> Any:
    """Grey or RGB, the colours mixed with what lies behind."""
    grey = image.mode in ("L", "LA", "La", "1")
    full = image.convert("RGBA")
    if behind != "drop":
        ground = require("open_source", "PIL.Image").new("RGBA", full.size, behind)
        ground.alpha_composite(full)
        full = ground
    return full.convert("L" if grey else "RGB")


# ----------------------------------------------------------------------------------- one size


def fitted(values: np.ndarray, wanted: Pictures, place: Tensor | None = None) -> np.ndarray:
    """A picture (C, height, width) in the size that is asked for.

    Args:
        values: uint8 or float32.
        wanted: its size and crop; without a size the picture is given back.
        place: two numbers in [0, 1), for a random place; None is the middle.

    Raises:
        Unfit: the picture is smaller than what shall be cut from it.
    """
    if wanted.size is None:
        return values
    height, width = wanted.size
    if wanted.crop in (None, "scale"):
        values = _covering(values, height, width, whole=wanted.bits == 16)
    free = values.shape[1] - height, values.shape[2] - width
    if min(free) < 0:
        rule = f"hold pictures of at least {height}x{width} (a smaller --size; or --crop scale)"
        raise Unfit(rule, f"{values.shape[1]}x{values.shape[2]}")
    top, left = free[0] // 2, free[1] // 2
    if place is not None:
        top, left = (min(int(u * (n + 1)), n) for u, n in zip(place.tolist(), free, strict=True))
    return np.ascontiguousarray(values[:, top : top + height, left : left + width])


def _covering(values: np.ndarray, height: int, width: int, *, whole: bool) -> np.ndarray:
    """The picture scaled until it covers a size, by bicubic interpolation that averages."""
    pillow = require("open_source", "PIL.Image")
    scale = max(height / values.shape[1], width / values.shape[2])
    pairs = (width, values.shape[2]), (height, values.shape[1])
    size = [max(wanted, round(scale * there)) for wanted, there in pairs]
    if tuple(size[::-1]) == values.shape[1:]:
        return values
    planes = [
        np.asarray(pillow.fromarray(plane).resize(size, pillow.Resampling.BICUBIC))
        for plane in values
    ]
    scaled = np.stack(planes)
    return scaled.round().clip(0, 65535) if whole else scaled


def levels_of(example: np.ndarray, wanted: Pictures) -> int:
    """How many whole levels a picture has that was read as asked for; 0 for floating ones."""
    if example.dtype == np.uint8:
        return 256
    return 65536 if wanted.bits == 16 else 0
