"""New variants of training images, a function of (seed, step, row)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional

from ...checks import check, check_shape, check_tensor, one_of
from ...ops.noise import draw_normal, draw_uniform
from ...random import STREAM_DISTORT, STREAM_FLIP, Key
from .rows import channels_last
from .scaling import GREY_LEVELS

# Standard deviations of `distort`: rotation and shear in radians, log scale in x and y, shift in
# x and y as a fraction of half the image (0.3 pixel of a digit). About what separates two hands.
_DISTORTION = (0.105, 0.08, 0.06, 0.06, 0.075, 0.075)


def augment(
    raw: Tensor,
    name: str,
    *,
    levels: int,
    seed: int,
    offset: int = 0,
    first: int = 0,
    batch_size: int,
) -> Tensor:
    """New variants of the rows [first, first + B) of a global batch.

    Args:
        raw: images, shape (B, height, width) or (B, C, height, width).
        name: "none"; "flip" mirrors left and right, each row with probability 1/2; "distort"
            passes the first half of the global batch through `distort`.
        levels: of whole levels, 0 for other data; see `Scaling`.
        seed: key of what is drawn.
        offset: second key, such as the step of a training run.
        first: index of row 0 in the global batch.
        batch_size: rows of the global batch.

    Returns:
        Shape, dtype and device of raw; whole levels stay whole.

    Raises:
        ValueError: an unknown name, rows that are no images, or `distort` without whole levels.

    Example:
        >>> import torch
        >>> from hos_ext.app.data import augment
        >>> raw = torch.tensor([[[0.0, 1.0]]]).expand(4, 1, 2)
        >>> flipped = augment(raw, "flip", levels=0, seed=0, batch_size=4)
        >>> flipped.sum(-1).unique()
        tensor([1.])
    """
    one_of("augment", "name", name, ("none", "flip", "distort"))
    if name == "none":
        return raw
    rule = f"raw must hold images, (B, height, width) or (B, C, height, width), for {name}"
    check("augment", raw.dim() in (3, 4), rule, tuple(raw.shape))
    if channels_last(tuple(raw.shape[1:])):
        warnings.warn(
            "augment: raw must hold images, (B, height, width) or (B, C, height, width), got shape "
            f"{tuple(raw.shape)}, which looks like channels last: its last axis is taken for the "
            "width",
            stacklevel=2,
        )
    if name == "flip":
        like = raw.new_empty(0, dtype=torch.float32)
        u = draw_uniform(Key(seed, offset, first), STREAM_FLIP, (len(raw),), like)
        return torch.where((u < 0.5).reshape(-1, *[1] * (raw.dim() - 1)), raw.flip(-1), raw)
    check("augment", levels, "distort needs whole levels", "levels 0 (floating data)")
    half = min(max(batch_size // 2 - first, 0), len(raw))
    head = raw[:half].to(torch.promote_types(raw.dtype, torch.float32))
    bent = distort(head, seed=seed, offset=offset, first=first, levels=levels)
    return torch.cat([bent.to(raw.dtype), raw[half:]])


def distort(
    grey: Tensor, *, seed: int, offset: int = 0, first: int = 0, levels: int = GREY_LEVELS
) -> Tensor:
    """Rotates, shears, scales and shifts each image a little, then rounds to grey levels again.

    1257 digits are few: a network learns them by heart, its errors on new digits are then larger
    than those it was trained on, and the covariance it learned is too small. New variants of each
    digit narrow that gap. What comes in from outside the image is level 0.

    Args:
        grey: whole grey levels. Shape (B, height, width) or (B, C, height, width), float32 or
            float64. The channels of an image move together.
        seed: key of the distortions.
        offset: second key, such as the step of a training run.
        first: global index of row 0.
        levels: 17 for digits, 256 for 8-bit data.

    Returns:
        Whole grey levels, shape, dtype and device of grey.

    Raises:
        TypeError: grey is not a tensor.
        ValueError: grey has another dtype or shape.

    Example:
        >>> import torch
        >>> from hos_ext.app.data import distort
        >>> bar = torch.zeros(1, 8, 8)
        >>> bar[:, :, 3:5] = 16.0
        >>> bent = distort(bar, seed=0)
        >>> torch.equal(bent, bent.round()), torch.equal(bent, bar)
        (True, False)
    """
    check_tensor("distort", "grey", grey)
    shapes = ("B", "height", "width"), ("B", "C", "height", "width")
    check_shape("distort", "grey", grey, *shapes)
    if grey.numel() == 0:
        return grey.clone()  # torch's grid refuses to be empty
    key = Key(seed, offset, first)
    drawn = draw_normal(key, STREAM_DISTORT, (grey.shape[0], len(_DISTORTION)), grey)
    angle, shear, scale_x, scale_y, shift_x, shift_y = (drawn * drawn.new_tensor(_DISTORTION)).T
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack(
        [
            torch.stack([scale_x.exp() * cos, shear - sin, shift_x], -1),
            torch.stack([sin, scale_y.exp() * cos, shift_y], -1),
        ],
        1,
    )
    images = grey if grey.dim() == 4 else grey.unsqueeze(1)
    grid = functional.affine_grid(rows, list(images.shape), align_corners=False)
    moved = functional.grid_sample(
        images, grid, mode="bicubic", padding_mode="zeros", align_corners=False
    )
    return moved.reshape(grey.shape).round().clamp(0, levels - 1)
