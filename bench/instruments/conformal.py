"""Coverage of conformal regions over splits, and what two recalibration factors mend.

Takes run folders that were trained before, in the folder `runs` of the working directory:

    hos-ext train --data digits --steps 4000 --out runs/digits
    hos-ext train --config docs/real_data/mnist.toml --steps 250 --out runs/mnist

MNIST's has a tenth of the steps of docs/real_data.md: what is guaranteed must hold for any model.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from hos_ext import Posterior
from hos_ext.app import data, evaluation, runs, training
from hos_ext.app.evaluation import Denoised
from hos_ext.nn import MLP
from hos_ext.uncertainty import (
    calibration,
    conformal,
    recalibration_factor,
    recalibration_factors,
)

LEVEL, SPLITS, SEED = 0.9, 200, 0
KINDS = ("entry", "share", "simultaneous", "ellipsoid")
# Held-out rows, those of them that make the region, and noise levels.
SETS: dict[str, tuple[int, int, tuple[float, ...]]] = {
    "digits": (360, 180, (0.2, 0.4, 0.8)),
    "mnist": (1000, 500, (0.15, 0.3, 0.6, 1.0)),
}
SHAPED = "digits"  # whose covariance the two factors mend


def run(quick: bool) -> dict[str, Any]:
    """Coverage over splits for every set, level and kind; calibration by one factor and by two."""
    names = (SHAPED,) if quick else tuple(SETS)
    found = {name: _opened(name, quick) for name in names}
    coverage, recalibrated = [], []
    for name, (model, source) in found.items():
        rows, used, sigmas = SETS[name] if not quick else (60, 30, (0.4,))
        for sigma in sigmas:
            test = evaluation.denoise_held_out(model, source, sigma, count=rows, seed=SEED)
            coverage += [_split(name, kind, test, used, 4 if quick else SPLITS) for kind in KINDS]
            if name == SHAPED:
                fit = evaluation.denoise_held_out(
                    model, source, sigma, part="validation", seed=SEED
                )
                recalibrated.append(_shape(sigma, fit, test))
    settings = {"level": LEVEL, "share": 0.9, "splits": SPLITS, "seed": SEED}
    return {"settings": settings, "coverage": coverage, "recalibration": recalibrated}


def _opened(name: str, quick: bool) -> tuple[Any, Any]:
    """The model of a run and its data; in quick mode a model of a few steps."""
    if quick:
        source = data.open_source(name)
        model = MLP(source.shape, 2, width=16, head_width=8, sigma_data=source.std)
        options = training.TrainingOptions(steps=5, batch_size=16)
        return training.train(model, source, options).model.eval(), source
    folder = Path("runs") / name
    if not (folder / "run.json").exists():
        raise FileNotFoundError(f"{folder}: train it first, see {__name__}")
    model, facts = runs.load_run(folder, device="cpu")
    return model, runs.open_data(facts)


def _split(name: str, kind: str, result: Denoised, used: int, splits: int) -> dict[str, Any]:
    """Coverage on the rest of the rows, over random splits, beside Gaussian intervals."""
    x0, law = result.x0, result.posterior
    assert x0 is not None
    generator = torch.Generator().manual_seed(SEED)
    shares, radii = [], []
    for _ in range(splits):
        order = torch.randperm(len(x0), generator=generator)
        fit, new = order[:used], order[used:]
        region = conformal(x0[fit], law[fit], level=LEVEL, kind=kind)
        shares.append(region.covers(x0[new], law[new]).double().mean())
        radii.append(region.radius.mean())
    share, radius = torch.stack(shares), torch.stack(radii)
    line = {
        "set": name,
        "sigma": result.sigma,
        "kind": kind,
        "rows": used,
        "coverage": float(share.mean()),
        "coverage_error": float(share.std() / math.sqrt(splits)),
        "coverage_spread": float(share.std()),
        "radius": float(radius.mean()),
        "radius_spread": float(radius.std()),
    }
    if kind == "ellipsoid":
        return line
    return line | _gaussian(kind, x0, law) | {"half_width": line["radius"] * _width(law)}


def _width(law: Posterior) -> float:
    return float(law.std.double().mean())


def _gaussian(kind: str, x0: torch.Tensor, law: Posterior) -> dict[str, float]:
    """The same of intervals that take the posterior for Gaussian, with independent entries."""
    ratio = ((x0 - law.mean).abs() / law.std).flatten(1).double()
    size = ratio.shape[1] if kind == "simultaneous" else 1
    point = torch.tensor(LEVEL ** (1 / size), dtype=torch.float64)
    radius = math.sqrt(2) * float(torch.erfinv(point))
    inside = (ratio <= radius).double().mean(1)
    held = {"entry": inside, "share": inside >= 0.9, "simultaneous": inside == 1}[kind]
    return {
        "coverage_gaussian": float(held.double().mean()),
        "half_width_gaussian": radius * _width(law),
    }


def _shape(sigma: float, fit: Denoised, test: Denoised) -> dict[str, Any]:
    """Both figures on test rows: as it is, by one factor and by two, fitted on validation rows."""
    assert fit.x0 is not None
    assert test.x0 is not None
    one = recalibration_factor(fit.x0, fit.posterior)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        two = recalibration_factors(fit.x0, fit.posterior)
    return {
        "sigma": sigma,
        "one_factor": one,
        "two_factors": two,
        "said": [str(each.message) for each in said],
        "raw": calibration(test.x0, test.posterior),
        "by_one": calibration(test.x0, test.posterior.recalibrated(one)),
        "by_two": calibration(test.x0, test.posterior.recalibrated(*two)),
    }
