"""Memorised labels, told from ordinary ones by what a label changes at a noisy sample.

One network learns scikit-learn's digits under their ten labels, and ten more labels each of which
has one picture only. At noisy samples of any digit (noise alone where sigma is large) each label
is asked for. The change of the curvature is s2 with the label minus s2 without, from the head: the
recipe `curvature_map` of docs/instruments.md. Its rival is the change of the score. "auroc" is the
probability that a memorised label has the larger figure, over all pairs of samples and labels.
All figures take the same two evaluations of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from hos_ext import DPLR, MLP
from hos_ext.app import data, training
from hos_ext.scores import Model
from hos_ext.uncertainty import auroc

SIGMAS = (0.4, 0.8, 1.6, 3.2)
SAMPLES, COPIES = 40, 30  # noisy samples for each label; copies of a memorised picture


def run(quick: bool = False) -> dict[str, Any]:
    """The table, in the mean over networks. A full run takes about two CPU minutes."""
    settings: dict[str, Any] = {
        "steps": 20 if quick else 1500,
        "seeds": [0] if quick else [0, 1, 2],
    }
    tables = []
    for seed in settings["seeds"]:
        model, pictures = learned(settings["steps"], seed)
        tables.append([figures(model, pictures, sigma, seed) for sigma in SIGMAS])
    rows = []
    for sigma, each in zip(SIGMAS, zip(*tables, strict=True), strict=True):
        values = {name: [found[name] for found in each] for name in each[0]}
        mean = {name: round(sum(v) / len(v), 4) for name, v in values.items()}
        rows.append(
            {"sigma": sigma, "auroc": mean, "least": {k: min(v) for k, v in values.items()}}
        )
    return {"settings": settings | {"samples": SAMPLES, "copies": COPIES}, "rows": rows}


def learned(steps: int, seed: int) -> tuple[Model, Tensor]:
    """A network of twenty labels, the last ten of which are one picture each; held-out digits."""
    torch.manual_seed(seed)
    source = data.open_source("digits", label="label")
    _, raw = source.batch(0, 1200, seed=seed)
    digits = source.scaling.forward(raw, seed=seed)
    held_out = source.scaling.forward(source.test, seed=seed)
    x0 = torch.cat([digits, held_out[:10].repeat_interleave(COPIES, 0)])
    alone = (10 + torch.arange(10)).repeat_interleave(COPIES)
    labels = torch.cat([source.batch_labels(0, 1200, seed=seed), alone])
    options: dict[str, Any] = {
        "width": 384,
        "head_width": 192,
        "head_depth": 2,
        "sigma_data": source.std,
    }
    model = MLP(source.shape, 8, num_classes=20, **options)
    chosen = training.TrainingOptions(
        steps=steps, sigma_range=(0.08, 4.0), condition_dropout=0.1, device="cpu"
    )
    return training.train(model, TensorDataset(x0, labels), chosen).model, held_out[10:]


@torch.no_grad()
def figures(model: Model, pictures: Tensor, sigma: float, seed: int) -> dict[str, float]:
    """How well each figure tells memorised labels from ordinary ones at one noise level."""
    draw = torch.Generator().manual_seed(seed + 1)
    label = torch.arange(20).repeat_interleave(SAMPLES)
    x0 = pictures[torch.randint(len(pictures), label.shape, generator=draw)]
    x = x0 + sigma * torch.randn(x0.shape, generator=draw)
    scores = [model(x, sigma, **given).unscaled(sigma) for given in ({"label": label}, {})]
    told, bare = (DPLR.of(s.diag.flatten(1), s.factor, s.sign) for s in scores)
    change = told + bare.scale(-1.0)
    found = {
        "score": (scores[0].score - scores[1].score).flatten(1).square().sum(1),
        "trace of s2 with the label": -told.trace(),
        "trace of the change": -change.trace(),
        "norm of the change": change.frobenius_norm(),
        "sharpest of the change": change.scale(-1.0).eigh(1)[0][:, 0],
    }
    return {k: round(auroc(v[label < 10], v[label >= 10]), 4) for k, v in found.items()}
