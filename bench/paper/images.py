"""Figures 3, 4, 9 and 10: what is learned of posterior covariances on MNIST and CIFAR-10.

The models are those of docs/real_data (one trunk, rank 16, all noise levels in [0.1, 1.2]), trained
by the library's own engine in a folder of runs, where a run that was stopped goes on. Data units: a
pixel lies in [-1, 1).
"""

from __future__ import annotations

import base64
import fcntl
import json
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hos_ext.app import data, evaluation, runs
from hos_ext.app.options import complete, open_chosen_source, read_config
from hos_ext.linalg import ScoreHessian

from .networks import ROOT
from .record import Folders, Record, Unfinished, panels

SIGMAS = (0.15, 0.3, 0.6, 1.0)
_SEED = 0
_TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
_JPEG = (
    " The CIFAR-10 at hand had been recompressed as JPEG: its finest detail is not the original's."
)
# In the quick form the digits of scikit-learn stand for both.
_QUICK: dict[str, Any] = {
    "data": "digits", "rank": 4, "width": 16, "head_width": 16, "steps": 4, "batch_size": 16,
    "warm_up": 1, "save_every": 4,
}  # fmt: skip


# -------------------------------------------------------------------------------- data and models


def data_file(folders: Folders, name: str, part: str) -> str:
    """What `open_chosen_source` takes for a part, "train" or "test", of a set.

    Raises:
        Unfinished: the folder of the data is not given, or the file is not there.
    """
    rule = "HOS_DATA (or --data) must name the folder of"
    file = f"{name}/{part}.parquet"
    if folders.data is None:
        raise Unfinished(f"bench.paper: {rule} {file}, got nothing")
    path = folders.data / name / f"{part}.parquet"
    if not path.exists():
        raise Unfinished(f"bench.paper: {rule} {file}, got {folders.data} without it")
    return f"parquet:{path}"


class Trained(NamedTuple):
    """A finished run: its averaged model, the facts in its folder and the open data."""

    model: nn.Module
    facts: dict[str, Any]
    source: data.Source


@lru_cache(maxsize=2)  # opening a set decodes all of its images
def ready(folders: Folders, name: str, quick: bool) -> Trained:
    """The model of a set: read, or trained first, or its training gone on with."""
    given = dict(_QUICK)
    if not quick:
        given = read_config(ROOT / "docs" / "real_data" / f"{name}.toml")
        given |= {"data": data_file(folders, name, "train")}
        given |= {"test_data": data_file(folders, name, "test")}
    given |= {"tracker": "none", "device": "cpu", "seed": _SEED}
    folder = folders.runs / name
    with alone(folder):
        if not runs.finished(folder):
            runs.fit(runs.prepare(given, folder, resume=True))
    model, facts = runs.load_run(folder)
    return Trained(model.requires_grad_(False), facts, open_chosen_source(complete(given)[0]))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Of several processes one at a time works on a folder or a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def training(folders: Folders, name: str, quick: bool) -> dict[str, Any]:
    """The figures of a run, as its metrics.json has them."""
    ready(folders, name, quick)
    content = json.loads((folders.runs / name / "metrics.json").read_text())
    figures: dict[str, Any] = content["train"]
    return {key: value for key, value in figures.items() if key != "data"}


# ---------------------------------------------------------------------------------------- pictures


def pack(images: Tensor) -> dict[str, Any]:
    """Images in 8 bits, as JSON."""
    low, high = float(images.min()), float(images.max())
    levels = ((images - low) / max(high - low, 1e-12) * 255).round().to(torch.uint8)
    packed = base64.b85encode(zlib.compress(levels.numpy().tobytes(), 9)).decode()
    return {"shape": list(images.shape), "low": low, "high": high, "bytes": packed}


def unpack(packed: dict[str, Any]) -> Any:
    """An array of float64, as `pack` was given it but for rounding."""
    raw = np.frombuffer(zlib.decompress(base64.b85decode(packed["bytes"])), dtype=np.uint8)
    low, high = packed["low"], packed["high"]
    return low + raw.reshape(packed["shape"]).astype(float) / 255 * (high - low)


def plane(image: Any) -> Any:
    """(height, width) or (height, width, 3) of (1, height, width), (3, ...) or (height, width)."""
    if image.ndim == 2:
        return image
    return image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)


def show(axis: Any, image: Any, kind: str) -> None:
    """An image in data units, a standard deviation from 0 on, or a vector of unit length."""
    axis.set_xticks([])
    axis.set_yticks([])
    flat = plane(image)
    if kind == "image":
        axis.imshow(np.clip((flat + 1) / 2, 0, 1), cmap="gray", vmin=0, vmax=1)
    elif kind == "std":
        axis.imshow(flat if flat.ndim == 2 else flat.mean(-1), cmap="magma", vmin=0)
    else:
        reach = max(float(np.abs(flat).max()), 1e-12)
        if flat.ndim == 2:
            axis.imshow(flat, cmap="RdBu_r", vmin=-reach, vmax=reach)
        else:
            axis.imshow(np.clip(0.5 + 0.5 * flat / reach, 0, 1))


# --------------------------------------------------------------------------------------- diagonals


@torch.no_grad()
def diagonals(
    folders: Folders, name: str, sigma: float, count: int, shown: int, quick: bool
) -> dict[str, Any]:
    """How good the covariance is on held-out images, and the pictures of the first ones."""
    trained = ready(folders, name, quick)
    began = time.perf_counter()
    found = evaluation.denoise_held_out(
        trained.model, trained.source, sigma, count=count, seed=_SEED,
        recalibration=trained.facts["recalibration"],
    )  # fmt: skip
    seconds = time.perf_counter() - began
    assert found.x0 is not None
    square = (found.x0 - found.posterior.mean).square()
    variance = found.posterior.std.square()
    pair = torch.stack([variance.flatten(), square.flatten()]).double()
    calibration = evaluation.calibration_figures(found, 1.0)
    parts = {"clean": found.x0, "noisy": found.x, "mean": found.posterior.mean,
             "std": found.posterior.std}  # fmt: skip
    return {
        "error": float(square.mean()) / sigma**2,
        "expected": float(variance.mean()) / sigma**2,
        "correlation": float(torch.corrcoef(pair)[0, 1]),
        "predictive": calibration["predictive"],
        "milliseconds": 1e3 * seconds / count,
        "pictures": {key: pack(value[:shown]) for key, value in parts.items()},
    }


def _diagonals(record: Record, name: str, number: int) -> None:
    trained = _trained(record, name)
    sigmas = SIGMAS[1:3] if record.quick else SIGMAS
    size = {"count": 20, "shown": 2} if record.quick else {"count": 500, "shown": 3}
    work = [{"name": name, "sigma": sigma, **size, "quick": record.quick} for sigma in sigmas]
    results = record.cells(work, diagonals, placed=True)
    figure, axes = panels(size["shown"], 1 + 3 * len(sigmas), 0.62)
    rows = []
    for index, (sigma, found) in enumerate(zip(sigmas, results, strict=True)):
        pictures = {key: unpack(value) for key, value in found["pictures"].items()}
        for line in range(size["shown"]):
            show(axes[line, 0], pictures["clean"][line], "image")
            for place, key in enumerate(("noisy", "mean", "std")):
                axis = axes[line, 1 + 3 * index + place]
                show(axis, pictures[key][line], "std" if key == "std" else "image")
                if line == 0:
                    axis.set_title(f"{key}\n{sigma:g}" if place == 0 else key, fontsize=6)
        rows.append(
            {"sigma": sigma}
            | {"error of the mean / sigma^2": found["error"],
               "variance that is expected / sigma^2": found["expected"],
               "correlation of variance and squared error": found["correlation"],
               "predictive, noise of sigma / 2 added (1 is calibrated)": found["predictive"],
               "ms an image": found["milliseconds"]}
        )  # fmt: skip
    axes[0, 0].set_title("clean", fontsize=6)
    record.text(_about(name, trained) + f" {size['count']} held-out images at each noise level.")
    record.table("Variances and what the errors are", rows)
    record.rows([{"set": name} | row for row in rows])
    record.compare(
        f"{_TITLES[name]}: variance expected over squared error found, by sigma",
        "pictures only",
        ", ".join(
            f"{row['variance that is expected / sigma^2'] / row['error of the mean / sigma^2']:.2f}"
            for row in rows
        ),
    )
    record.figure(
        figure,
        f"{_TITLES[name]}: clean image; at each noise level noisy image, posterior mean and "
        "standard deviation of each pixel, by one evaluation (each from zero to its maximum)."
        + _JPEG
        * (name == "cifar10"),
    )
    record.close(f"Figure {number}: diagonals of the covariance, {_TITLES[name]}")


def _trained(record: Record, name: str) -> dict[str, Any]:
    work = [{"name": name, "quick": record.quick}]
    own = {"mnist": "fig3", "cifar10": "fig9"}[name]
    (found,) = record.cells(work, training, of=own, placed=True)
    return dict(found)


def _about(name: str, trained: dict[str, Any]) -> str:
    return (
        f"The model of docs/real_data/{name}.toml: {trained['parameters']:,} parameters, rank "
        f"{trained['rank']}, {trained['steps']:,} steps of {trained['batch_size']} samples in "
        f"{trained['seconds'] / 60:.0f} minutes on one core, learned covariances times "
        f"{trained['recalibration']:.3g}, the one factor fitted on validation images."
    )


# ------------------------------------------------------------------------------------ eigenvectors


class Components(NamedTuple):
    """The largest eigenvalues (B, k), their vectors (B, D, k), products and seconds they took."""

    values: Tensor
    vectors: Tensor
    products: int
    seconds: float


def subspace_iteration(covariance: ScoreHessian, k: int, iterations: int) -> Components:
    """Posterior principal components of a denoiser: orthogonal iteration with its Jacobian.

    V <- orth(A V), then Rayleigh quotients in the last span; k (iterations + 1) products. A is not
    symmetric for a network: the quotients are of its symmetric part.
    """
    began = time.perf_counter()
    batch, size, _ = covariance.shape
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(size, k, generator=generator, dtype=covariance.dtype)
    basis = torch.linalg.qr(start.expand(batch, size, k))[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(covariance.matvec(basis))[0]
    small = basis.mT @ covariance.matvec(basis)
    values, rotation = torch.linalg.eigh((small + small.mT) / 2)
    vectors = basis @ rotation.flip(-1)
    products = k * (iterations + 1)
    return Components(values.flip(-1), vectors, products, time.perf_counter() - began)


@torch.no_grad()
def eigenvectors(
    folders: Folders,
    name: str,
    sigma: float,
    count: int,
    shown: int,
    k: int,
    iterations: int,
    quick: bool,
) -> dict[str, Any]:
    """The first eigenvectors by the learned head and by the Jacobian of the denoiser.

    For each way the means over `count` held-out images, component by component, of its eigenvalue
    ("expected") and of the squared error along its vector ("found"), both over the whole squared
    error; of its span's overlap with that of the Jacobian, |V^T W|_F^2 / k; and what it took.
    """
    trained = ready(folders, name, quick)
    model, source = trained.model, trained.source
    found = evaluation.denoise_held_out(model, source, sigma, count=count, seed=_SEED)
    assert found.x0 is not None
    error = (found.x0 - found.posterior.mean).flatten(1)
    whole = error.square().sum(1).mean()

    began = time.perf_counter()
    again = evaluation.denoise(model, found.x, sigma)
    again = again._replace(posterior=again.posterior.recalibrated(trained.facts["recalibration"]))
    values, vectors = again.posterior.principal_components(k)
    ways = {"learned": Components(values, vectors, 0, time.perf_counter() - began)}

    def score(x: Tensor) -> Tensor:
        return model(x, sigma).unscaled(sigma).score  # type: ignore[no-any-return]

    def covariance(symmetrize: bool) -> ScoreHessian:
        hessian = ScoreHessian(score, found.x, symmetrize=symmetrize, check=False)
        return hessian.scale(sigma**4) + sigma**2

    ways["Jacobian, subspace iteration"] = subspace_iteration(covariance(False), k, iterations)
    began = time.perf_counter()
    pairs = covariance(True).eigenpairs(k, tolerance=1e-3)
    ways["Jacobian, block Lanczos"] = Components(
        pairs.values, pairs.vectors, pairs.products, time.perf_counter() - began
    )
    results: dict[str, Any] = {}
    for way, got in ways.items():
        along = (got.vectors.mT @ error.unsqueeze(-1)).squeeze(-1).square()
        overlap = (got.vectors.mT @ pairs.vectors).square().sum((1, 2)) / k
        results[way] = {
            "expected": (got.values.mean(0) / whole).tolist(),
            "found": (along.mean(0) / whole).tolist(),
            "overlap": float(overlap.mean()),
            "products": got.products,
            "milliseconds": 1e3 * got.seconds / count,
        }
    facing = (vectors * pairs.vectors).sum(1, keepdim=True) >= 0
    sides = {"learned": vectors, "Jacobian": torch.where(facing, pairs.vectors, -pairs.vectors)}
    pictures = {
        side: pack(each[:shown].mT.reshape(shown, k, *source.shape)) for side, each in sides.items()
    }
    pictures |= {"noisy": pack(found.x[:shown]), "mean": pack(found.posterior.mean[:shown])}
    return {"ways": results, "pictures": pictures}


def _eigenvectors(record: Record, name: str, number: int) -> None:
    trained = _trained(record, name)
    sigmas = SIGMAS[1:2] if record.quick else SIGMAS[1:]
    size = {"count": 32, "shown": 2, "k": 4, "iterations": 10}
    if record.quick:
        size = {"count": 4, "shown": 1, "k": 2, "iterations": 2}
    work = [{"name": name, "sigma": sigma, **size, "quick": record.quick} for sigma in sigmas]
    results = record.cells(work, eigenvectors, placed=True)
    k = size["k"]
    figure, axes = panels(size["shown"] * len(sigmas), 2 + 2 * k, 0.72)
    rows = []
    for index, (sigma, found) in enumerate(zip(sigmas, results, strict=True)):
        pictures = {key: unpack(value) for key, value in found["pictures"].items()}
        for image in range(size["shown"]):
            line = axes[index * size["shown"] + image]
            show(line[0], pictures["noisy"][image], "image")
            show(line[1], pictures["mean"][image], "image")
            line[0].set_ylabel(f"{sigma:g}", fontsize=6)
            for side, start in (("learned", 2), ("Jacobian", 2 + k)):
                for column in range(k):
                    show(line[start + column], pictures[side][image, column], "vector")
        for way, got in found["ways"].items():
            rows.append(
                {"sigma": sigma, "by": way}
                | {f"share {i + 1}: found (expected)": f"{100 * a:.2f} % ({100 * b:.2f} %)"
                   for i, (a, b) in enumerate(zip(got["found"], got["expected"], strict=True))}
                | {"overlap with the Jacobian's": f"{got['overlap']:.2f}",
                   "products": got["products"], "ms an image": f"{got['milliseconds']:,.1f}"}
            )  # fmt: skip
            record.rows(
                [{"set": name, "sigma": sigma, "by": way, "component": i + 1, "found": a,
                  "expected": b, "overlap": got["overlap"], "products": got["products"],
                  "ms": got["milliseconds"]}
                 for i, (a, b) in enumerate(zip(got["found"], got["expected"], strict=True))]
            )  # fmt: skip
    heads = ["noisy", "mean", *(f"learned {i + 1}" for i in range(k))]
    for axis, head in zip(axes[0], [*heads, *(f"Jacobian {i + 1}" for i in range(k))], strict=True):
        axis.set_title(head, fontsize=5)
    record.text(
        _about(name, trained)
        + f" {size['count']} held-out images at each noise level. Found: the share of the squared "
        "error of the posterior mean along the component; expected: its eigenvalue over that "
        "error. The Jacobian is that of the same denoiser, sigma^2 dm/dx: by subspace iteration "
        f"({size['iterations']} of them), and by the library's block Lanczos to a residual of "
        "1e-3. A product of the first is a forward derivative, one of the second a forward and a "
        "backward one. The learned ones take none, only the evaluation that gives the mean. Wall "
        "times, while the other core was at work."
    )
    record.table("The first eigenvectors, learned and differentiated", rows)
    last = results[-1]["ways"]
    record.compare(
        f"{_TITLES[name]}, sigma {sigmas[-1]:g}: share of the error along {k} eigenvectors",
        "pictures only",
        "; ".join(f"{way} {100 * sum(got['found']):.1f} % in {got['milliseconds']:,.0f} ms"
                  for way, got in last.items()),
    )  # fmt: skip
    record.figure(
        figure,
        f"{_TITLES[name]}: noisy image (its noise level on the left), posterior mean, the first "
        f"{k} eigenvectors of the learned covariance, and those of the denoiser's Jacobian; signs "
        "are matched." + _JPEG * (name == "cifar10"),
    )
    record.close(f"Figure {number}: eigenvectors of the covariance, {_TITLES[name]}")


def fig3(record: Record) -> None:
    _diagonals(record, "mnist", 3)


def fig4(record: Record) -> None:
    _eigenvectors(record, "mnist", 4)


def fig9(record: Record) -> None:
    _diagonals(record, "cifar10", 9)


def fig10(record: Record) -> None:
    _eigenvectors(record, "cifar10", 10)


ITEMS = {"fig3": fig3, "fig4": fig4, "fig9": fig9, "fig10": fig10}
