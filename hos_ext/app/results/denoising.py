"""The files of a denoised batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ...uncertainty.conformal import Conformal
from .. import data, evaluation, plots
from .files import npz, tiff
from .pictures import png_files, png_names, png_note

_COMPONENTS = 4

_REPORT = """# Denoised samples

Noise level: sigma {sigma:g} in data units, {raw_sigma} in raw units.
One data unit is {scale} raw units. The covariance of the model was multiplied by
{recalibration:.3f}, its recalibration on validation rows.

![noisy, denoised, standard deviation, principal components](denoise.png)

The picture is in data units.

Root mean squares over the entries of a sample, in data units: the standard deviation that the
posterior gives, and the error where the truth is known. Last, the share of the variance along the
first {components} principal components.

| sample | std | error | first components |
|---|---|---|---|
{table}

{intervals}- denoise.npz: noisy, mean, std, eigenvalues and eigenvectors in data units; raw_* in raw
  units, float64.
- denoise-mean.tiff, denoise-std.tiff, denoise-components.tiff (for images): float32, raw units, one
  page for each channel of each sample. A component is sqrt(eigenvalue) times its eigenvector;
  there are {components} for each sample. One is left out where float32 cannot hold it.
{png}"""


def denoise_files(
    shape: tuple[int, ...], names: Sequence[str] = (), levels: int = 0, *, stretch: bool = False
) -> list[str]:
    """The names that `denoised` gives its files; the arguments are those of `png_names`."""
    images = ["denoise-mean.tiff", "denoise-std.tiff", "denoise-components.tiff"]
    fixed = ["denoise.npz", "denoise.png", "denoise.md", *(images if len(shape) > 1 else [])]
    return [*fixed, *png_names(names, shape, levels, stretch=stretch)]


def denoised(
    result: evaluation.Denoised,
    names: Sequence[str],
    scaling: data.Scaling,
    recalibration: float,
    *,
    stretch: bool | None = None,
    region: Conformal | None = None,
) -> dict[str, bytes]:
    """The files of a denoised batch, by name.

    Args:
        result: posteriors, recalibrated.
        names: of the samples.
        scaling: of the data.
        recalibration: what their covariances were multiplied by, for the report.
        stretch: as in `png_files`; None for no .png of single samples.
        region: whose intervals go into denoise.npz, for covariances recalibrated as these.

    Returns:
        The content of each of `denoise_files`; without the .tiff that float32 cannot hold to a
        thousandth of the standard deviation, such as means of 10^6 with a spread of one, which a
        warning names.

    Raises:
        RuntimeError: matplotlib or pillow is missing.
    """
    found, scale = result.posterior, torch.tensor(scaling.scale, dtype=torch.float64)
    values, vectors = found.principal_components(min(_COMPONENTS, found.mean[0].numel()))
    arrays = {
        "sigma": torch.tensor(result.sigma),
        "noisy": result.x,
        "mean": found.mean,
        "std": found.std,
        "eigenvalues": values,
        "eigenvectors": vectors,
        "raw_sigma": result.sigma * scale,
        "raw_mean": scaling.raw_mean(found.mean),
        "raw_std": scaling.raw_std(found.std),
    }
    if not scaling.by_column:  # else raw units differ from entry to entry
        arrays["raw_eigenvalues"] = values.cpu().double() * scale**2
    if result.x0 is not None:
        arrays["clean"] = result.x0
    if region is not None:
        low, high = region.interval(found)
        arrays |= {"low": low, "high": high}
        arrays |= {"raw_low": scaling.raw_mean(low), "raw_high": scaling.raw_mean(high)}
    pictures: dict[str, bytes] = {}
    if stretch is not None:
        pictures = png_files(names, list(found.mean), list(found.std), scaling, stretch=stretch)
    report = _REPORT.format(
        sigma=result.sigma,
        raw_sigma=_plain(result.sigma * scale),
        scale=_plain(scale),
        recalibration=recalibration,
        components=values.shape[1],
        table="\n".join(_table(result, names, values)),
        png=png_note(pictures, scaling.levels, stretch=bool(stretch)),
        intervals="" if region is None else _intervals(result, region),
    )
    files = {
        "denoise.npz": npz(arrays),
        "denoise.png": plots.png(plots.denoising_figure(result, rows=min(len(names), 8))),
        "denoise.md": report.encode(),
    }
    shape = tuple(found.mean.shape[1:])
    if len(shape) > 1:
        # One standard deviation along each eigenvector.
        steps = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
        steps = scaling.raw_std(steps).mT.unflatten(2, shape).flatten(0, 1)
        spread = arrays["raw_std"]
        files |= _tiff("denoise-mean.tiff", arrays["raw_mean"], spread)
        files |= _tiff("denoise-std.tiff", spread, spread)
        files |= _tiff("denoise-components.tiff", steps, steps.abs().amax())
    return files | pictures


def _intervals(result: evaluation.Denoised, region: Conformal) -> str:
    """What the intervals guarantee, and how wide they are."""
    what = {
        "entry": "each entry by itself",
        "share": f"at least {region.share:.0%} of the entries of a sample",
        "simultaneous": "all entries of a sample at once",
    }[region.kind]
    half = float((region.radius.to(result.posterior.std) * result.posterior.std).mean())
    text = (
        f"Intervals (low, high in denoise.npz): they hold {what} with probability {region.level:g} "
        f"at least. That comes from {region.samples} validation rows under noise of this level, "
        f"and is true of samples that are like these. Half an interval is {half:.4g} on average, "
        "in data units."
    )
    if result.x0 is not None:
        inside = region.covers(result.x0, result.posterior).double().mean()
        text += f" Of the samples above, whose truth is known, {float(inside):.0%} were held."
    return text + "\n\n"


def _plain(values: Tensor) -> str:
    """A number, or one for each column of a table."""
    return ", ".join(f"{value:g}" for value in values.flatten().tolist())


def _tiff(name: str, values: Tensor, spread: Tensor) -> dict[str, bytes]:
    """The file by its name, or nothing and a warning where float32 cannot hold the values."""
    lost = (values.float().double() - values).abs()
    if not bool((lost > 1e-3 * spread).any()):
        return {name: tiff(values)}
    warnings.warn(
        f"denoise: {name} is not written: float32, which its kind of file holds, is up to "
        f"{float(lost.nan_to_num().max()):.3g} raw units off; denoise.npz has the values",
        stacklevel=3,
    )
    return {}


def _table(result: evaluation.Denoised, names: Sequence[str], values: Tensor) -> list[str]:
    """A row of the report for each sample: std, error, and the share of its first components."""
    trace = result.posterior.covariance.trace()
    share = (values.sum(1) / trace).tolist()
    spread = (trace / result.x[0].numel()).sqrt().tolist()
    errors = ["not known"] * len(names)
    if result.x0 is not None:
        square = (result.posterior.mean - result.x0).square().flatten(1).mean(1)
        errors = [f"{error:.4g}" for error in square.sqrt().tolist()]
    return [
        f"| {name} | {std:.4g} | {error} | {100 * part:.0f} % |"
        for name, std, error, part in zip(names, spread, errors, share, strict=True)
    ]
