"""The .png files of denoised pictures, and all files of pictures of any size."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import data, plots
from ..evaluation.tiles import Picture
from .files import npz, png, tiff

# More samples than this are no pictures to look at one by one.
_MOST = 64

_REPORT = """# Denoised pictures

Noise level: sigma {sigma:g} in data units, {raw_sigma:g} in raw units.
One data unit is {scale:g} raw units. Variances were multiplied by {recalibration:.3f}, the
recalibration of the model on validation rows.

![noisy, denoised, standard deviation](denoise.png)

The model sees tiles of {tile}, the size that it was trained on. Tiles overlap, and means and
variances are blended by weights that sum to 1.

| picture | height x width | tiles | std, data units |
|---|---|---|---|
{table}

- denoise.npz: noisy_I, mean_I and std_I of picture I in data units; a raw value is `scale` times
  that plus `shift`, a raw standard deviation `scale` times it.
- denoise-mean.tiff, denoise-std.tiff: float32, raw units, a page for each channel of a picture.
{png}"""


def png_names(
    names: Sequence[str], shape: tuple[int, ...], levels: int, *, stretch: bool
) -> list[str]:
    """The names of the .png files of samples: mean and standard deviation of each.

    Args:
        names: of the samples.
        shape: of one. Signals, vectors and pictures of other channels than 1 and 3 have none.
        levels: whole levels of the data; floating data have a .png only with stretch.
        stretch: whether contrast is stretched.
    """
    pictures = len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))
    if not pictures or not (levels or stretch) or len(names) > _MOST:
        return []
    found: list[str] = []
    for name in names:
        stem = re.sub(r"\.[A-Za-z]+(?=$|\[)", "", name)
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "sample"
        label, more = plain, 2
        while f"denoise-{label}-mean.png" in found:
            label, more = f"{plain}-{more}", more + 1
        found += [f"denoise-{label}-mean.png", f"denoise-{label}-std.png"]
    return found


def png_files(
    names: Sequence[str],
    means: Sequence[Tensor],
    stds: Sequence[Tensor],
    scaling: data.Scaling,
    *,
    stretch: bool,
) -> dict[str, bytes]:
    """Means and standard deviations as .png, in the levels of the data.

    A level is that of the data, rounded, in 8 or 16 bits as the data have them. With `stretch`, the
    least and the greatest value of each mean come to black and white, and 0 and the greatest of
    each standard deviation.
    """
    levels = scaling.levels or 65536
    shape = tuple(means[0].shape) if len(means) else ()
    files = png_names(names, shape, scaling.levels, stretch=stretch)
    made = {}
    for i in range(len(files) // 2):
        mean, std = scaling.raw_mean(means[i]).cpu(), scaling.raw_std(stds[i]).cpu()
        low, high = (float(mean.min()), float(mean.max())) if stretch else (0.0, levels - 1.0)
        made[files[2 * i]] = png(mean, levels, low=low, high=high)
        top = float(std.max()) if stretch else levels - 1.0
        made[files[2 * i + 1]] = png(std, levels, low=0.0, high=top)
    return made


def picture_files(names: Sequence[str], channels: int, levels: int, *, stretch: bool) -> list[str]:
    """The names that `denoised_pictures` gives its files."""
    fixed = ["denoise.npz", "denoise.png", "denoise.md", "denoise-mean.tiff", "denoise-std.tiff"]
    return [*fixed, *png_names(names, (channels, 1, 1), levels, stretch=stretch)]


def denoised_pictures(
    found: Sequence[Picture],
    names: Sequence[str],
    scaling: data.Scaling,
    recalibration: float,
    tile: Sequence[int],
    *,
    stretch: bool,
) -> dict[str, bytes]:
    """The files of denoised pictures, by name.

    Args:
        found: the pictures.
        names: of them.
        scaling: of the data.
        recalibration: what their variances were multiplied by, for the report.
        tile: its height and width, for the report.
        stretch: as in `png_files`.

    Returns:
        The content of each of `picture_files`.

    Raises:
        RuntimeError: matplotlib or pillow is missing.
    """
    means, stds = [each.mean for each in found], [each.std for each in found]
    arrays = {
        "sigma": torch.tensor(found[0].sigma),
        "scale": torch.tensor(scaling.scale, dtype=torch.float64),
        "shift": torch.tensor(scaling.shift, dtype=torch.float64),
    }
    for i, each in enumerate(found):
        arrays |= {f"noisy_{i}": each.x, f"mean_{i}": each.mean, f"std_{i}": each.std}
    pictures = png_files(names, means, stds, scaling, stretch=stretch)
    table = [
        f"| {name} | {each.x.shape[1]} x {each.x.shape[2]} | {each.tiles} | "
        f"{float(each.std.square().mean().sqrt()):.4g} |"
        for name, each in zip(names, found, strict=True)
    ]
    report = _REPORT.format(
        sigma=found[0].sigma,
        raw_sigma=float(found[0].sigma * torch.tensor(scaling.scale)),
        scale=float(torch.tensor(scaling.scale)),
        recalibration=recalibration,
        tile=f"{tile[0]}x{tile[1]}",
        table="\n".join(table),
        png=png_note(pictures, scaling.levels, stretch=stretch),
    )
    return {
        "denoise.npz": npz(arrays),
        "denoise.png": plots.png(plots.pictures_figure(found[:4])),
        "denoise.md": report.encode(),
        "denoise-mean.tiff": tiff([scaling.raw_mean(mean) for mean in means]),
        "denoise-std.tiff": tiff([scaling.raw_std(std) for std in stds]),
        **pictures,
    }


def png_note(pictures: Sequence[str] | dict[str, bytes], levels: int, *, stretch: bool) -> str:
    """The line of a report on the .png files."""
    if not pictures:
        return ""
    how = f"rounded to the {levels} levels of the data"
    if stretch:
        how = "each stretched to black and white (--stretch), so levels cannot be compared"
    return f"- denoise-NAME-mean.png, denoise-NAME-std.png: to look at, {how}.\n"
