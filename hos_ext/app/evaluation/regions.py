"""Regions of guaranteed coverage, made from the validation rows, and how they do on others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...checks import check, check_count, check_number
from ...scores import Model
from ...uncertainty.conformal import Conformal, conformal, least_rows
from .. import data
from .denoising import Denoised, denoise_rows, known
from .rows import held_out

LEVEL, SHARE = 0.9, 0.9  # of the regions in `evaluate`
KINDS = ("share", "simultaneous")
ROWS = 1024  # validation rows at most: the spread of the coverage is then below 1 %


@torch.no_grad()
def region_of(
    model: Model,
    source: data.Source,
    sigma: float,
    *,
    level: float,
    kind: str,
    seed: int,
    recalibration: float = 1.0,
    limit: int = ROWS,
) -> Conformal:
    """A conformal region at one noise level, from validation rows under the noise that is theirs.

    Args:
        model: `model(x, sigma) -> Scores`, in eval mode.
        source: see `data.open_source`. Its validation rows must be like what the region is for.
        sigma: noise level, > 0. Data units.
        level, kind: as `conformal` takes them.
        seed: of dequantisation and noise.
        recalibration: scalar of the covariance; the region is for covariances with the same one.
        limit: at most so many rows, the first; their posteriors are held in memory.

    Returns:
        The region.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind; too few validation
            rows for the level; as `conformal`.
    """
    where = "region_of"
    sigma, level = check_number(where, "sigma", sigma), check_number(where, "level", level)
    check(where, level < 1, "level must be in (0, 1)", level)
    rows = held_out(where, source, "validation", seed).up_to(check_count(where, "limit", limit))
    least = least_rows(level)
    rule = f"source must have at least {least} validation rows for level {level:g}"
    check(where, len(rows) >= least, rule, len(rows))
    return _region(denoise_rows(model, rows, sigma, recalibration), level, kind)


def regions_of(
    model: Model, source: data.Source, sigma: float, scale: float, seed: int
) -> dict[str, Conformal]:
    """Those of `KINDS` that `evaluate` reports; none where the validation rows are too few, or
    have a variance that is not positive, or means that are not finite."""
    if len(source.validation) < least_rows(LEVEL):
        return {}
    rows = held_out("evaluate", source, "validation", seed).up_to(ROWS)
    result = denoise_rows(model, rows, sigma, scale)
    variance = result.posterior.covariance.diagonal()
    if not bool(
        (variance > 0).all() and (variance + result.posterior.mean.flatten(1)).isfinite().all()
    ):
        return {}
    return {kind: _region(result, LEVEL, kind) for kind in KINDS}


def _region(result: Denoised, level: float, kind: str) -> Conformal:
    x0 = known("region_of", result)
    return conformal(x0, result.posterior, level=level, kind=kind, share=SHARE)


def region_means(
    result: Denoised, regions: dict[str, Conformal], scale: float
) -> dict[str, Tensor]:
    """For each region how often it holds the truth and how wide it is, and the same for a Gaussian.

    Means over the rows, (covered, half width, covered by the Gaussian, its half width), shape (4,).
    Half widths are means over the entries, in data units. The Gaussian intervals are those of each
    entry at the level for "share", and for "simultaneous" those that independent entries would
    need to hold the truth all at once (Sidak's). Widths are NaN where a variance is negative.
    """
    if not regions:
        return {}
    x0, law = known("evaluate", result), result.posterior.recalibrated(scale)
    error, std = (x0 - law.mean).double().flatten(1).abs(), law.std.double().flatten(1)
    good = (law.covariance.diagonal() > 0).all(1)  # the others are held by nothing
    found = {}
    for kind, region in regions.items():
        size = error.shape[1] if kind == "simultaneous" else 1
        gaussian = math.sqrt(2) * float(
            torch.erfinv(torch.tensor(LEVEL ** (1 / size), dtype=torch.float64))
        )
        inside = (error <= gaussian * std).double().mean(1)
        enough = 1.0 if kind == "simultaneous" else SHARE
        width = std.mean()
        found[f"region_{kind}"] = torch.stack(
            [
                region.covers(x0[good], law[good]).double().sum() / len(x0),
                region.radius.to(width) * width,
                (inside >= enough).double().mean(),
                gaussian * width,
            ]
        ).cpu()
    return found


def region_figures(
    sums: Mapping[str, Any], regions: Mapping[str, Conformal], n: int
) -> dict[str, Any] | None:
    """What `evaluate` says of the regions at one noise level; None where there are none."""
    if not regions:
        return None
    names = ("covered", "half_width", "covered_gaussian", "half_width_gaussian")
    figures = {
        kind: dict(zip(names, (sums[f"region_{kind}"] / n).tolist(), strict=True))
        for kind in regions
    }
    rows = next(iter(regions.values())).samples
    return {"level": LEVEL, "least_share": SHARE, "rows": rows, **figures}
