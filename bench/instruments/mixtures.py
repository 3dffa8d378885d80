"""Energy scores of posteriors as mixtures, beside one Gaussian and beside sampling to the end.

Five modes on a circle, with exact scores and with a network that learned them; and the digits of
the run folder runs/digits (see `conformal`) at sigma 0.8. The energy score of a law with draws X
and X' against the truth x0 is E|X - x0| - E|X - X'| / 2: lower is better, and the true law is best.
Cost is in model evaluations for a noisy sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hos_ext import VE, ScoreMatchingLoss, Scores, normal, posterior
from hos_ext.app import data, evaluation, runs, training
from hos_ext.densities import GaussianMixture
from hos_ext.diffusion import posterior_mixture, second_order_reverse, tweedie_denoise
from hos_ext.nn import MLP

SEED, DRAWS, RADIUS = 0, 64, 3.0
MIDDLES, COUNTS, STEPS = (0.25, 0.5, 0.75), (4, 16, 64), (2, 4, 8)
LAST, DOWN = 0.05, 20  # of the sampling to the end: level over sigma, and steps


def run(quick: bool) -> dict[str, Any]:
    """Energy scores of all contestants on all sets."""
    rows, lines = (20, []) if quick else (400, [])
    for name, sigmas, model, x0 in _sets(rows, quick):
        for sigma in sigmas:
            x = x0 + sigma * normal(x0.shape, seed=SEED + 1, dtype=x0.dtype)
            for line in _contestants(model, x, sigma, quick):
                draws = line.pop("draws")
                score, error = energy_score(draws, x0)
                lines.append({"set": name, "sigma": sigma, **line, "energy": score, "error": error})
    settings = {"seed": SEED, "draws": DRAWS, "rows": rows, "last": LAST, "radius": RADIUS}
    return {"settings": settings, "scores": lines}


def five_modes() -> GaussianMixture:
    """Five narrow modes on a circle."""
    angle = 2 * math.pi * torch.arange(5, dtype=torch.float64) / 5
    means = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    return GaussianMixture(weights, means, 0.05 * torch.eye(2, dtype=torch.float64).expand(5, 2, 2))


def exact(x: Tensor, sigma: Tensor | float) -> Scores:
    """The scores of `five_modes` in noise; kappa by its smaller eigenvalue and one column."""
    level = float(torch.as_tensor(sigma).flatten()[0])
    noisy = five_modes().noisy(level)
    kappa = torch.eye(2, dtype=x.dtype) + level**2 * noisy.hessian(x)
    values, vectors = torch.linalg.eigh(kappa)
    column = (values[:, 1] - values[:, 0]).clamp_min(0).sqrt().unsqueeze(1) * vectors[:, :, 1]
    c = values[:, :1].expand(-1, 2)
    return Scores(level * noisy.score(x), c, column.unsqueeze(2))


def learned(quick: bool) -> MLP:
    """A network of the scores of `five_modes`, of rank 2."""
    torch.manual_seed(SEED)
    model = MLP((2,), 2, width=96, depth=3, head_width=64, sigma_data=2.0)
    loss = ScoreMatchingLoss((0.15, 4.0), seed=SEED)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = 20 if quick else 4000
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        value = loss(model, five_modes().sample(256, seed=step).float(), step=step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _sets(rows: int, quick: bool) -> Iterator[tuple[str, tuple[float, ...], Any, Tensor]]:
    x0 = five_modes().sample(rows, seed=10**6)
    yield "five modes, exact", (1.0, 2.0, 3.0), exact, x0
    yield "five modes, learned", (1.0, 2.0, 3.0), learned(quick), x0.float()
    if quick:
        source = data.open_source("digits")
        model = MLP(source.shape, 2, width=16, head_width=8, sigma_data=source.std)
        options = training.TrainingOptions(steps=5, batch_size=16)
        model = training.train(model, source, options).model.eval()
    else:
        found, facts = runs.load_run(Path("runs") / "digits", device="cpu")
        model, source = found, runs.open_data(facts)
    count = min(rows // 4, len(source.test))
    held = evaluation.denoise_held_out(model, source, 0.8, count=count, seed=SEED)
    assert held.x0 is not None
    yield "digits", (0.8,), model, held.x0


def _contestants(model: Any, x: Tensor, sigma: float, quick: bool) -> Iterator[dict[str, Any]]:
    with torch.no_grad():
        law = posterior(x, model(x, x.new_full((len(x),), sigma)), sigma)
    yield {"law": "N(m, C)", "calls": 1, "draws": law.sample(DRAWS, seed=2)}
    settings = [(m, c, s) for m in MIDDLES for c in COUNTS for s in STEPS]
    for middle, count, steps in settings[:: 9 if quick else 1]:
        mixture = posterior_mixture(
            model,
            x,
            sigma,
            middle=middle * sigma,
            n_components=count,
            n_steps=steps,
            seed=3,
            chunk_size=4096,
        )
        yield {
            "law": "mixture",
            "middle": middle,
            "components": count,
            "steps": steps,
            "calls": count * (steps + 1),
            "draws": mixture.sample(DRAWS, seed=4),
        }
    start = x.repeat_interleave(DRAWS, 0)
    path = VE(LAST * sigma, sigma)
    end = second_order_reverse(model, start, path, n_steps=DOWN, seed=5, chunk_size=4096)
    clean = tweedie_denoise(model, end, path, path.t_min).sample(1, seed=6)[0]
    draws = clean.reshape(len(x), DRAWS, *x.shape[1:]).movedim(1, 0)
    yield {"law": "sampling to the end", "calls": DRAWS * (DOWN + 1), "draws": draws}


def energy_score(draws: Tensor, x0: Tensor) -> tuple[float, float]:
    """Mean over the samples, and its standard error; draws (M, B, *dims), x0 (B, *dims)."""
    draws, x0 = draws.detach().flatten(2).double(), x0.flatten(1).double()
    count = len(draws)
    near = (draws - x0).norm(dim=2).mean(0)
    apart = torch.cdist(draws.movedim(1, 0), draws.movedim(1, 0)).sum((1, 2)) / count / (count - 1)
    score = near - apart / 2
    return float(score.mean()), float(score.std() / math.sqrt(len(score)))
