"""What denoise, sample and evaluate of the command line make: arrays, pictures, text.

npz files hold data units, and as raw_* the units of the data set; TIFF files are float32 in raw
units. A command builds all of its files in memory, then writes each whole.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..checks import require
from ..sampling import diagnostics, distributed
from ..sampling.chains import Chains
from ..scores import UnscaledScores
from ..tweedie.posterior import posterior
from . import data, evaluation, plots

# What learned scores can drive, and step_size / sigma^2. The precision of noisy data is at most
# 1 / sigma^2: Langevin is stable below 2, and its variance too large by the factor
# 1 / (1 - h / (2 sigma^2)) where data do not vary.
METHODS = {
    "langevin": 0.1,
    "ozaki": 1.0,
    "ozaki_full": 1.0,
    "ozaki_lanczos": 1.0,
    "ozaki_cayley": 1.0,
    "mala": 0.1,
    "mh_ozaki": 0.1,
    "mh_ozaki_full": 0.1,
    "mh_ozaki_cayley": 0.1,
}
COMPONENTS = 4
EVALUATE_FILES = ("evaluate.json", "calibration.png", "uncertainty.png")
_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


class Samples(NamedTuple):
    """Noisy samples in data units, shape (n, *dims), and where each came from."""

    x: Tensor
    names: list[str]


# ------------------------------------------------------------------------------------------ reading


def read_files(files: Sequence[Path], shape: tuple[int, ...], scaling: data.Scaling) -> Samples:
    """Images and arrays in the raw units of the data set, as samples in data units.

    Args:
        files: .png, .jpg or .tiff (8-bit grey or RGB, or floating grey; every page is a sample), or
            .npy or .npz with one array: a sample (*dims), or several (n, *dims).
        shape: dims of one sample. (1, height, width) and (height, width) are taken for each other.
        scaling: of the data that the model was trained on.

    Raises:
        ValueError: a file is missing or damaged, or holds another shape or kind, or values that are
            not finite or not in raw units; names the file.
        RuntimeError: pillow is missing.
    """
    pieces, names = [], []
    for path in files:
        if not path.is_file():
            raise ValueError(f"denoise: file must exist, got {path}")
        try:
            raw = _read_images(path) if path.suffix.lower() in _IMAGES else _read_array(path)
        except (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"denoise: {path} must be a whole image, .npy or .npz, got: {error}"
            ) from None
        rows = _as_rows(raw, shape)
        if rows is None:
            raise ValueError(f"denoise: {path} must hold samples {shape}, got shape {raw.shape}")
        _check_values(path, rows, scaling.levels)
        x = (torch.from_numpy(rows.astype(np.float64)) - scaling.shift) / scaling.scale
        pieces.append(x.float())
        names += [path.name if len(rows) == 1 else f"{path.name}[{i}]" for i in range(len(rows))]
    return Samples(torch.cat(pieces), names)


def _read_images(path: Path) -> np.ndarray:
    """All pages, (n, channels, height, width)."""
    pillow = require("denoise", "PIL.Image")
    sequence = require("denoise", "PIL.ImageSequence")
    pages = []
    with pillow.open(path) as image:
        for page in sequence.Iterator(image):
            if page.mode not in ("L", "RGB", "F"):
                raise ValueError(f"mode {page.mode}, neither 8-bit grey, RGB nor floating grey")
            values = np.array(page)
            pages.append(values.transpose(2, 0, 1) if values.ndim == 3 else values[None])
    return np.stack(pages)


def _read_array(path: Path) -> np.ndarray:
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return content
    with content:
        if len(content.files) != 1:
            raise ValueError(f"the arrays {', '.join(content.files)}, not one")
        array: np.ndarray = content[content.files[0]]
    return array


def _as_rows(raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The samples (n, *shape) in an array of one or of several; None if they do not fit."""
    plain = shape[1:] if shape[0] == 1 and len(shape) > 1 else shape
    for dims in (shape, plain, (1, *plain)):
        if raw.shape == dims:
            return raw.reshape(1, *shape)
        if raw.ndim == len(dims) + 1 and raw.shape[1:] == dims and len(raw):
            return raw.reshape(-1, *shape)
    return None


def _check_values(path: Path, rows: np.ndarray, levels: int) -> None:
    if rows.dtype.name not in ("uint8", "float16", "float32", "float64"):
        raise ValueError(f"denoise: {path} must hold uint8 or floating values, got {rows.dtype}")
    low, high = float(rows.min()), float(rows.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"denoise: {path} must hold finite values, got {low:g} to {high:g}")
    if not levels:
        if rows.dtype.kind == "u":
            raise ValueError(
                f"denoise: {path} must hold floating values like the data set, got uint8"
            )
        return
    rule = f"denoise: {path} must hold raw units, 0 to {levels - 1} before noise was added"
    if rows.dtype.kind == "f" and low >= 0 and high <= 1:
        raise ValueError(f"{rule}, got floating values {low:g} to {high:g}")
    if rows.dtype.kind == "u" and high >= levels:
        raise ValueError(f"{rule}, got {high:g}")


# ---------------------------------------------------------------------------------------- denoising


def denoise_files(shape: tuple[int, ...]) -> list[str]:
    """The names that `denoised` gives its files."""
    images = ["denoise-mean.tiff", "denoise-std.tiff", "denoise-components.tiff"]
    return ["denoise.npz", "denoise.png", "denoise.md", *(images if len(shape) > 1 else [])]


def denoised(
    result: evaluation.Denoised, names: Sequence[str], scaling: data.Scaling, recalibration: float
) -> dict[str, bytes]:
    """The files of a denoised batch, by name.

    Args:
        result: posteriors, recalibrated.
        names: of the samples.
        scaling: of the data.
        recalibration: what their covariances were multiplied by, for the report.
    """
    found, scale, shift = result.posterior, scaling.scale, scaling.shift
    values, vectors = found.principal_components(min(COMPONENTS, found.mean[0].numel()))
    arrays = {
        "sigma": torch.tensor(result.sigma),
        "noisy": result.noisy,
        "mean": found.mean,
        "std": found.std,
        "eigenvalues": values,
        "eigenvectors": vectors,
        "raw_sigma": torch.tensor(result.sigma * scale),
        "raw_mean": found.mean * scale + shift,
        "raw_std": found.std * scale,
        "raw_eigenvalues": values * scale**2,
    }
    if result.clean is not None:
        arrays["clean"] = result.clean
    shape = tuple(found.mean.shape[1:])
    files = {
        "denoise.npz": npz(arrays),
        "denoise.png": plots.png(plots.denoising_figure(result, rows=min(len(names), 8))),
        "denoise.md": _report(result, names, scaling, values, recalibration).encode(),
    }
    if len(shape) > 1:
        # One standard deviation along each eigenvector.
        steps = (vectors * values.clamp(min=0).sqrt().unsqueeze(1) * scale).mT.unflatten(2, shape)
        files["denoise-mean.tiff"] = tiff(arrays["raw_mean"])
        files["denoise-std.tiff"] = tiff(arrays["raw_std"])
        files["denoise-components.tiff"] = tiff(steps.flatten(0, 1))
    return files


def _report(
    result: evaluation.Denoised,
    names: Sequence[str],
    scaling: data.Scaling,
    values: Tensor,
    recalibration: float,
) -> str:
    trace = result.posterior.covariance.trace()
    share = (values.sum(1) / trace).tolist()
    spread = (trace / result.noisy[0].numel()).sqrt().tolist()
    error = None
    if result.clean is not None:
        square = (result.posterior.mean - result.clean).square().flatten(1).mean(1)
        error = square.sqrt().tolist()
    rows = []
    for i, name in enumerate(names):
        known = "not known" if error is None else f"{error[i]:.4g}"
        rows.append(f"| {name} | {spread[i]:.4g} | {known} | {100 * share[i]:.0f} % |")
    table = "\n".join(rows)
    return f"""# Denoised samples

Noise level: sigma {result.sigma:g} in data units, {result.sigma * scaling.scale:g} in raw units.
One data unit is {scaling.scale:g} raw units. The covariance of the model was multiplied by
{recalibration:.3f}, its recalibration on validation rows.

![noisy, denoised, standard deviation, principal components](denoise.png)

The picture is in data units.

Root mean squares over the entries of a sample, in data units: the standard deviation that the
posterior gives, and the error where the truth is known. Last, the share of the variance along the
first {values.shape[1]} principal components.

| sample | std | error | first components |
|---|---|---|---|
{table}

- denoise.npz: noisy, mean, std, eigenvalues and eigenvectors in data units; raw_* in raw units.
- denoise-mean.tiff, denoise-std.tiff, denoise-components.tiff (for images): float32, raw units, one
  page for each channel of each sample. A component is sqrt(eigenvalue) times its eigenvector;
  there are {values.shape[1]} for each sample.
"""


# ----------------------------------------------------------------------------------------- sampling


@contextmanager
def ranks() -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; alone, nothing changes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_chains(
    model: nn.Module, init: Tensor, sigma: float, *, method: str, step_size: float, **options: Any
) -> tuple[Chains, float]:
    """Chains of the density of noisy samples, over all ranks, and their smallest ESS.

    Raises:
        RuntimeError: chains diverged.
    """

    def score_fn(x: Tensor) -> UnscaledScores:
        scores = model(x, sigma)
        unscaled: UnscaledScores = scores.unscaled(sigma)
        return unscaled

    chains = distributed.sample_sharded(
        score_fn, init, method=method, step_size=step_size, **options
    )
    diverged = int(chains.stats["diverged"].sum())
    if diverged:
        raise RuntimeError(
            f"sample: --step-size must keep the chains finite, got {step_size:g} with which "
            f"{diverged} of {len(init)} {method} chains diverged"
        )
    return chains, diagnostics.min_ess(chains.draws)


def sample_files(method: str, *, netcdf: bool) -> list[str]:
    """The names that `sampled` gives its files."""
    endings = (".npz", ".png", ".nc") if netcdf else (".npz", ".png")
    return [f"sample-{method}{ending}" for ending in endings]


@torch.no_grad()
def sampled(
    model: nn.Module,
    chains: Chains,
    starts: Tensor,
    sigma: float,
    *,
    method: str,
    step_size: float,
    scaling: data.Scaling,
    netcdf: bool,
) -> dict[str, bytes]:
    """The files of chains, by name: draws, the last of them denoised, a picture, ArviZ data."""
    draws = chains.draws
    ends = posterior(draws[:, -1], model(draws[:, -1], sigma), sigma).mean
    arrays = {
        "sigma": torch.tensor(sigma),
        "step_size": torch.tensor(step_size),
        "starts": starts,
        "draws": draws,
        "denoised": ends,
        "raw_denoised": ends * scaling.scale + scaling.shift,
    }
    rows = [
        ("starts: noisy held-out samples", starts.cpu()),
        (f"{method}, the last draw of each chain", draws[:, -1].cpu()),
        ("the same, denoised", ends.cpu()),
    ]
    files = {
        f"sample-{method}.npz": npz(arrays),
        f"sample-{method}.png": plots.png(plots.chains_figure(rows)),
    }
    if netcdf:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chains.nc"
            chains.to_arviz().to_netcdf(path, engine="h5netcdf")
            files[f"sample-{method}.nc"] = path.read_bytes()
    return files


# --------------------------------------------------------------------------------------- evaluating


def evaluated(
    model: nn.Module,
    source: data.Source,
    sigmas: Sequence[float],
    report: Mapping[str, Any],
    *,
    seed: int,
) -> dict[str, bytes]:
    """The pictures of `evaluate`: calibration, and the covariance at up to four of the levels."""
    count = min(4, len(source.test))
    results = [
        evaluation.denoise_held_out(
            model, source, sigma, count=count, seed=seed, recalibration=report["recalibration"]
        )
        for sigma in sigmas[:4]
    ]
    figures = (plots.calibration_figure(report["levels"]), plots.uncertainty_figure(results))
    return dict(zip(EVALUATE_FILES[1:], map(plots.png, figures), strict=True))


# -------------------------------------------------------------------------------------------- files


def npz(arrays: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    plain: dict[str, Any] = {name: value.cpu().numpy() for name, value in arrays.items()}
    np.savez_compressed(buffer, **plain)
    return buffer.getvalue()


def tiff(images: Tensor) -> bytes:
    """Images (n, height, width) or (n, C, height, width) as n C pages of float32."""
    pillow = require("denoise", "PIL.Image")
    pages = images.float().cpu().reshape(-1, *images.shape[-2:]).contiguous().numpy()
    first, *rest = (pillow.fromarray(page) for page in pages)
    buffer = io.BytesIO()
    first.save(buffer, format="TIFF", save_all=True, append_images=rest)
    return buffer.getvalue()


def refuse_existing(where: str, folder: Path, names: Iterable[str], *, force: bool) -> None:
    """Refuses, before the work, to overwrite files of an earlier call without --force."""
    there = [name for name in names if (folder / name).exists()]
    if there and not force:
        raise ValueError(
            f"{where}: --out must hold none of its files (--force replaces them), got {folder} "
            f"with {', '.join(there)}"
        )
