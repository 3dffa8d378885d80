"""Files as bytes, and where they go."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
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


def tiff(images: Tensor | Sequence[Tensor]) -> bytes:
    """Images (n, height, width) or (n, C, height, width), or several such, as pages of float32."""
    pillow = require("denoise", "PIL.Image")
    several = [images] if isinstance(images, Tensor) else images
    first, *rest = (
        pillow.fromarray(page.contiguous().numpy())
        for each in several
        for page in each.float().cpu().reshape(-1, *each.shape[-2:])
    )
    buffer = io.BytesIO()
    first.save(buffer, format="TIFF", save_all=True, append_images=rest)
    return buffer.getvalue()


def png(values: Tensor, levels: int, *, low: float, high: float) -> bytes:
    """A picture as .png, of 8 bits, or of 16 where there are more than 256 levels.

    Args:
        values: shape (height, width), (1, height, width) or (3, height, width). Raw units.
        levels: of the data set: whole numbers 0 ... levels - 1 stand as they are.
        low, high: what comes to 0 and to the highest level; what lies beyond is cut off.

    Returns:
        The file.
    """
    top = levels - 1
    depth = 8 if levels <= 256 else 16
    planes = values if values.dim() == 3 else values.unsqueeze(0)
    scaled = (planes.double() - low) * (top / (high - low)) if high > low else planes.double() * 0
    whole = scaled.round().clamp(0, top).permute(1, 2, 0).numpy()
    rows = whole.astype(np.uint8 if depth == 8 else ">u2").reshape(len(whole), -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)  # 0: no filter
    kind = 0 if planes.shape[0] == 1 else 2
    head = struct.pack(">IIBBBBB", planes.shape[2], planes.shape[1], depth, kind, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


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
