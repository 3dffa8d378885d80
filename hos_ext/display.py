"""How records show themselves: thumbnails for notebooks, axes for `plot`.

Thumbnails are PNG files written with zlib alone, so that a notebook needs nothing besides. Figures
need matplotlib.
"""

from __future__ import annotations

import base64
import html
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .checks import check, kind_name, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 8  # pictures of a thumbnail, lines of a trace
_LEAST, _HEIGHT = 4, 64  # pixels of what counts as a picture, and of its thumbnail
Pixels = np.ndarray[Any, Any]


def image_shaped(dims: tuple[int, ...]) -> bool:
    """Whether samples of this shape are pictures: (H, W), or (C, H, W) with one or three channels.

    Example:
        >>> from hos_ext.display import image_shaped
        >>> image_shaped((1, 28, 28)), image_shaped((28, 28)), image_shaped((2, 28))
        (True, True, False)
    """
    channels = len(dims) == 2 or (len(dims) == 3 and dims[0] in (1, 3))
    return channels and min(dims[-2:]) >= _LEAST


def pixels(images: Tensor) -> Pixels:
    """Pictures (n, H, W) or (n, C, H, W) as (n, H, W, channels) in [0, 1], black their least value.

    What is not finite is black.

    Example:
        >>> import torch
        >>> from hos_ext.display import pixels
        >>> pixels(torch.arange(4.0).reshape(1, 2, 2)).squeeze().tolist()
        [[0.0, 0.3333333432674408], [0.6666666865348816, 1.0]]
    """
    found = images.detach().to("cpu", torch.float32)
    good = found.isfinite()
    low = float(found[good].min()) if good.any() else 0.0
    high = float(found[good].max()) if good.any() else 1.0
    scaled = torch.where(good, (found - low) / ((high - low) or 1.0), 0.0)
    scaled = scaled.unsqueeze(1) if scaled.dim() == 3 else scaled
    values: Pixels = scaled.permute(0, 2, 3, 1).numpy()
    return values


def thumbnail(text: str, lines: list[Tensor]) -> str:
    """A record in a notebook: its repr, and below it lines of pictures if they are such.

    Args:
        text: the repr.
        lines: batches of samples (n, *dims), of which the first few are shown, a line for each.

    Returns:
        HTML.

    Example:
        >>> import torch
        >>> from hos_ext.display import thumbnail
        >>> thumbnail("Chains(1 x 2 x (3,))", [torch.zeros(1, 3)])
        '<code>Chains(1 x 2 x (3,))</code>'
    """
    told = f"<code>{html.escape(text)}</code>"
    if not all(len(line) and image_shaped(tuple(line.shape[1:])) for line in lines):
        return told
    if not lines or any(line.is_meta for line in lines):
        return told
    sheet = np.concatenate([np.concatenate([*pixels(line[:SHOWN])], 1) for line in lines], 0)
    times = max(1, _HEIGHT // lines[0].shape[-2])
    sheet = (255 * sheet + 0.5).astype(np.uint8).repeat(times, 0).repeat(times, 1)
    code = base64.b64encode(png(sheet)).decode()
    return f'{told}<br><img alt="{html.escape(text)}" src="data:image/png;base64,{code}">'


def png(picture: Pixels) -> bytes:
    """A picture (H, W, 1 or 3) of bytes as a PNG file.

    Example:
        >>> import numpy as np
        >>> from hos_ext.display import png
        >>> png(np.zeros((2, 2, 1), np.uint8))[:4]
        b'\\x89PNG'
    """
    height, width, channels = picture.shape
    rows = picture.reshape(height, width * channels)
    # Each row is headed by the number of its filter: 0, none.
    raw = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def axes_of(where: str, ax: Axes | None) -> Axes:
    """The axes that were given, or new ones of pyplot.

    Raises:
        TypeError: ax is no matplotlib `Axes`.
        RuntimeError: matplotlib is missing.

    Example:
        >>> from hos_ext.display import axes_of  # doctest: +SKIP
        >>> axes_of("plot", None).lines  # doctest: +SKIP
        <Axes.ArtistList of 0 lines>
    """
    kind = require(where, "matplotlib.axes").Axes
    if ax is None:
        made: Axes = require(where, "matplotlib.pyplot").subplots(layout="constrained")[1]
        return made
    check(where, isinstance(ax, kind), "ax must be matplotlib Axes", kind_name(ax), TypeError)
    return ax


def show_pair(ax: Axes, first: Tensor, second: Tensor, names: tuple[str, str]) -> None:
    """Two pictures side by side in one axes, each in its own range, which its label tells."""
    labels, places, edge = [], [], 0.0
    height, width = first.shape[-2:]
    for name, picture in zip(names, (first, second), strict=True):
        value = pixels(picture.unsqueeze(0))[0]
        extent = (edge, edge + width, height, 0)
        ax.imshow(value.squeeze(-1) if value.shape[-1] == 1 else value, "gray", extent=extent)
        low, high = float(picture.min()), float(picture.max())
        labels.append(f"{name}\n{low:.3g} ... {high:.3g}")
        places.append(edge + width / 2)
        edge += 1.1 * width
    ax.set(xlim=(0, edge - 0.1 * width), ylim=(height, 0), yticks=[])
    ax.set_xticks(places, labels)
    ax.tick_params(length=0)


def row_of(where: str, row: object, rows: int) -> int:
    """The number of a row of a batch."""
    inside = isinstance(row, int) and not isinstance(row, bool) and 0 <= row < rows
    check(where, inside, f"row must be a row of a batch of {rows}", row)
    return int(row)  # type: ignore[call-overload, no-any-return]
