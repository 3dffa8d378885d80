"""Pictures larger than those a network was trained on: in tiles that overlap, blended.

A network sees each tile as it saw pictures in training. Pixels near the inner edge of a tile lack
their surroundings and do not count; over the next ones the weight of the tile rises to 1. Where
tiles overlap, their weights are divided by their sum, so they sum to 1 everywhere.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check, check_count, check_number, check_tensor
from ...conditions import Conditions, check_conditions, move_conditions, repeat_conditions
from ...scores import Model, model_scores
from ...tweedie.posterior import posterior
from .rows import chunk_rows, to_device

_WHERE = "denoise_tiled"


class Picture(NamedTuple):
    """A picture of any size, denoised.

    Attributes:
        sigma: noise level. Data units.
        x: noisy, shape (C, height, width). Data units, on the CPU, as are the others.
        mean: of the posterior, blended.
        std: square root of the blended variances of the posterior.
        tiles: how many tiles there were.
    """

    sigma: float
    x: Tensor
    mean: Tensor
    std: Tensor
    tiles: int


@torch.no_grad()
def denoise_tiled(
    model: Model,
    x: Tensor,
    sigma: float,
    tile: Sequence[int],
    *,
    overlap: int | None = None,
    recalibration: float = 1.0,
    model_kwargs: Conditions | None = None,
) -> Picture:
    """The posterior mean and standard deviation of a noisy picture of any size.

    Both are weighted means over the tiles that hold a pixel, of their means and of their variances.
    Correlations between pixels are those within a tile, so there is no covariance of the picture.

    Args:
        model: `model(x, sigma) -> Scores`, in eval mode, of convolutions: it must treat all places
            alike.
        x: noisy picture. Shape (C, height, width), float32 or float64. Data units.
        sigma: noise standard deviation, > 0. Data units.
        tile: (height, width) of the pictures that the model was trained on.
        overlap: pixels that neighbouring tiles share at least; by default a quarter of a tile.
            Its outer quarter does not count, and weights rise over the next half of it.
        recalibration: scalar that every covariance is multiplied by, > 0: see `recalibrate`.
        model_kwargs: conditions of the model for this picture: each tensor has one row.

    Returns:
        The picture. Beside x, mean and std, memory does not depend on its size.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.
    """
    check_tensor(_WHERE, "x", x, shape=("C", "height", "width"))
    check(_WHERE, x.numel(), "x must not be empty", x)
    sigma = check_number(_WHERE, "sigma", sigma)
    scale = check_number(_WHERE, "recalibration", recalibration)
    conditions = check_conditions(_WHERE, model_kwargs, 1)
    high, wide = (check_count(_WHERE, "tile", each) for each in tile)
    share = min(high, wide) // 4
    if overlap is not None:
        share = check_count(_WHERE, "overlap", overlap, least=0)
    rule = f"overlap must be less than the tile, {min(high, wide)}"
    check(_WHERE, share < min(high, wide), rule, share)
    full = _at_least(x, high, wide)
    mean, variance, total = (torch.zeros_like(full) for _ in range(3))
    places = list(
        itertools.product(
            tile_starts(full.shape[1], high, share), tile_starts(full.shape[2], wide, share)
        )
    )
    step = chunk_rows((full.shape[0], high, wide))
    for some in (places[i : i + step] for i in range(0, len(places), step)):
        part = torch.stack([full[:, t : t + high, s : s + wide] for t, s in some])
        part = to_device(model, part)
        told = repeat_conditions(move_conditions(conditions, part.device), len(part))
        found = posterior(part, model_scores(_WHERE, model, part, sigma, told), sigma)
        found = found if scale == 1 else found.recalibrated(scale)
        blended = zip(some, found.mean.to(full), found.std.to(full), strict=True)
        for (top, left), tile_mean, tile_std in blended:
            rows, columns = slice(top, top + high), slice(left, left + wide)
            weight = _ramp(top, high, full.shape[1], share).unsqueeze(1)
            weight = (weight * _ramp(left, wide, full.shape[2], share)).to(full)
            mean[:, rows, columns] += weight * tile_mean
            variance[:, rows, columns] += weight * tile_std.square()
            total[:, rows, columns] += weight
    height, width = x.shape[1:]
    mean, std = (each[:, :height, :width] for each in (mean / total, (variance / total).sqrt()))
    return Picture(sigma, x.cpu(), mean, std, len(places))


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an axis: evenly, the first at 0, the last to the end.

    Example:
        >>> from hos_ext.app.evaluation.tiles import tile_starts
        >>> tile_starts(20, 8, 2)
        [0, 6, 12]
    """
    count = 1 + -(-(length - tile) // (tile - overlap))
    return [i * (length - tile) // max(count - 1, 1) for i in range(count)]


def _ramp(start: int, tile: int, length: int, overlap: int) -> Tensor:
    """Weights of a tile along an axis: 0, then rising to 1, at those ends that others overlap."""
    place = torch.arange(tile, dtype=torch.float64)
    margin, rise = overlap // 4, max(overlap // 2, 1)
    weight = torch.ones_like(place)
    for inner, distance in ((start > 0, place), (start + tile < length, place.flip(0))):
        if inner and overlap:
            rising = ((distance + 1 - margin) / (rise + 1)).clamp(0, 1)
            weight = torch.minimum(weight, rising)
    return weight


def _at_least(x: Tensor, height: int, width: int) -> Tensor:
    """The picture on the CPU, mirrored at its lower and right edge up to a least size."""
    full = x.cpu()
    missing = [max(0, height - x.shape[1]), max(0, width - x.shape[2])]
    if not any(missing):
        return full
    warnings.warn(
        f"{_WHERE}: a picture of {x.shape[1]}x{x.shape[2]} is mirrored up to "
        f"{height}x{width}, the size that the model was trained on: its noise there repeats",
        stacklevel=3,
    )
    for axis, more in ((1, missing[0]), (2, missing[1])):
        index = torch.arange(full.shape[axis] + more) % (2 * full.shape[axis])
        index = torch.minimum(index, 2 * full.shape[axis] - 1 - index)
        full = full.index_select(axis, index)
    return full
