"""Figure 1, what variance reduction does, and Figure 2, posteriors against point estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from hos_ext import normal, posterior
from hos_ext.densities.gaussian import GaussianMixture

from . import networks, sets
from .record import BLUE, GREY, ORANGE, Record, mean_std, panels, plus_minus

_TEST = 2**43  # key of the test points
_SEEDS = (0, 1, 2)

# ---------------------------------------------------------------------------------------- Figure 1

_LEVELS = (0.01, 0.1, 0.5, 2.0)


def learn(sigma: float, kind: str, seed: int, steps: int) -> dict[str, Any]:
    """A net of appendix C.2 on the normal law in the plane, with or without variance reduction.

    Args:
        kind: "plain" (Eq. 3 and 13) or "vr" (Eq. 32 and 33).

    Returns:
        Steps, the relative squared errors of s1 and s2 there, and the last estimates of s2.
    """
    law = sets.ellipse()
    noisy = law.noisy(sigma)
    clean = law.sample(200, seed=_TEST)
    x = clean + sigma * normal((200, 2), seed=_TEST, dtype=clean.dtype)
    truth = noisy.score(x), noisy.hessian(x)
    net = networks.Net(2, 2, seed=seed)
    every = max(1, steps // 20)
    curve: dict[str, list[float]] = {"steps": [], "s1": [], "s2": []}
    last: Tensor | None = None

    @torch.no_grad()
    def watch(step: int, current: nn.Module) -> None:
        nonlocal last
        if step % every:
            return
        scores = current(x.float())
        last = scores.diag.diag_embed() + scores.factor @ scores.factor.mT
        curve["steps"].append(step)
        for key, value, exact in (("s1", scores.score, truth[0]), ("s2", last, truth[1])):
            curve[key].append(float((value - exact).square().sum() / exact.square().sum()))

    options = networks.PAPER | {"first_order": kind, "second_order": kind}
    networks.train_net(net, law, sigma, steps=steps, seed=seed, diagonal=False, watch=watch,
                       **options)  # fmt: skip
    assert last is not None
    entries = torch.stack([last[:, 0, 0], last[:, 0, 1], last[:, 1, 1]], -1)
    return {
        **curve,
        "estimates": [[round(v, 4) for v in row] for row in entries[:100].tolist()],
        "truth": [float(truth[1][0, i, j]) for i, j in ((0, 0), (0, 1), (1, 1))],
    }


def fig1(record: Record) -> None:
    seeds = (0,) if record.quick else _SEEDS
    levels = (0.1, 2.0) if record.quick else _LEVELS
    steps = 60 if record.quick else 10_000
    work = [
        {"sigma": sigma, "kind": kind, "seed": seed, "steps": steps}
        for seed in seeds
        for sigma in levels
        for kind in ("plain", "vr")
    ]
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for settings, result in zip(work, record.cells(work, learn), strict=True):
        found.setdefault((settings["sigma"], settings["kind"]), []).append(result)
    figure, axes = panels(2, len(levels), 1.9)
    table = []
    for column, sigma in enumerate(levels):
        for kind, colour in (("plain", ORANGE), ("vr", BLUE)):
            runs = found[sigma, kind]
            last = {key: [float(np.median(run[key][-5:])) for run in runs] for key in ("s1", "s2")}
            row = {"sigma": sigma, "loss": {"plain": "Eq. 3 and 13", "vr": "Eq. 32 and 33"}[kind]}
            table.append(row | {f"{key}, relative error": plus_minus(v) for key, v in last.items()})
            record.rows(
                [row | {"quantity": key, "relative error": mean_std(v)[0], "std": mean_std(v)[1]}
                 for key, v in last.items()]
            )  # fmt: skip
            curves = axes[0, column]
            for key, style in (("s1", "--"), ("s2", "-")):
                middle = np.median([run[key] for run in runs], axis=0)
                curves.semilogy(runs[0]["steps"], middle, style, color=colour, linewidth=1,
                                label=f"{key}, {kind}")  # fmt: skip
            points = np.array(runs[0]["estimates"], dtype=float)
            cloud = axes[1, column]
            cloud.plot(points[:, 0], points[:, 1], ".", color=colour, markersize=2, label=kind)
        truth = found[sigma, "vr"][0]["truth"]
        axes[1, column].plot(*truth[:2], "k*", markersize=6, label="truth")
        axes[0, column].set_title(f"sigma = {sigma:g}", fontsize=8)
        axes[0, column].set_xlabel("steps", fontsize=7)
        axes[1, column].set_xlabel("s2, entry 1, 1", fontsize=7)
    axes[0, 0].set_ylabel("relative squared error", fontsize=7)
    axes[1, 0].set_ylabel("s2, entry 1, 2", fontsize=7)
    axes[0, 0].legend(fontsize=5)
    axes[1, 0].legend(fontsize=5)
    record.text(
        "A normal law in the plane (standard deviations 1 and 0.5, correlation 0.8), networks of "
        f"appendix C.2 at each noise level, {steps:,} steps of Adam with 128 samples, with and "
        "without variance reduction. Squared errors against the noisy truth over the squared "
        "truth: medians of the last five of 21 checkpoints, mean ± standard deviation of "
        f"{len(seeds)} seeds. The steps are equal, not the evaluations: plain losses take one, "
        "reduced ones three."
    )
    record.table("Errors with and without variance reduction", table)
    record.figure(
        figure,
        "Above: errors during training (medians over the seeds). Below: two entries of the learned "
        "s2 at 100 noisy points, first seed, and the truth, which is the same at all points.",
    )
    record.compare(
        f"sigma {levels[0]:g}, relative squared error of s1; of s2",
        "pictures only",
        "; ".join(f"{row['loss']}: {row['s1, relative error']}; {row['s2, relative error']}"
                  for row in table if row["sigma"] == levels[0]),
    )  # fmt: skip
    record.close("Figure 1: variance reduction")


# ---------------------------------------------------------------------------------------- Figure 2

_NOISE = 0.5
_WAYS = ("point estimate", "N(m, C), learned", "N(m, C), exact moments", "exact posterior")


def posterior_draws(
    law: GaussianMixture, x: Tensor, sigma: float, n: int, generator: torch.Generator
) -> Tensor:
    """n draws of the clean sample for each noisy x (B, D), from the exact posterior: (n, B, D)."""
    eye = torch.eye(law.dim, dtype=x.dtype)
    noisy = law.covariances + sigma**2 * eye
    density = MultivariateNormal(law.means, noisy).log_prob(x.unsqueeze(1))
    weights = (law.weights.log() + density).softmax(-1)
    gain = law.covariances @ torch.linalg.inv(noisy)
    means = law.means + torch.einsum("kij,bkj->bki", gain, x.unsqueeze(1) - law.means)
    root = torch.linalg.cholesky(law.covariances - gain @ law.covariances)
    part = torch.multinomial(weights, n, replacement=True, generator=generator).mT
    noise = torch.randn(n, *x.shape, generator=generator, dtype=x.dtype)
    rows = torch.arange(len(x)).expand(n, -1)
    return means[rows, part] + torch.einsum("nbij,nbj->nbi", root[part], noise)


def denoise(name: str, seed: int, points: int, draws: int, steps: int) -> dict[str, Any]:
    """How far each way of denoising is from the exact posterior, and some draws of each."""
    law = sets.plane(name)
    generator = torch.Generator().manual_seed(_TEST + seed)
    clean = law.sample(points, seed=_TEST + seed)
    x = clean + _NOISE * torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
    net = networks.Net(2, 2, head_width=64, linear=True, seed=seed)
    options = {"steps": steps, "seed": seed, "diagonal": False, **networks.BEST}
    net = networks.train_net(net, law, _NOISE, **options)
    with torch.no_grad():
        wide = net(x.float()).to(torch.float64)
        learned = posterior(x, wide.scaled(_NOISE), _NOISE)
    covariance = learned.covariance.dense()
    values = torch.linalg.eigvalsh(covariance)
    mean, exact_covariance = (f(x, _NOISE) for f in (law.posterior_mean, law.posterior_covariance))
    exact = posterior_draws(law, x, _NOISE, draws, generator)
    clouds = dict(
        zip(
            _WAYS,
            (
                learned.mean.expand(draws, -1, -1),
                learned.mean + _spread(covariance, draws, generator),
                mean + _spread(exact_covariance, draws, generator),
                posterior_draws(law, x, _NOISE, draws, generator),
            ),
            strict=True,
        )
    )
    again = law.sample(2000, seed=_TEST + 100 + seed)
    return {
        "posterior": {way: _posterior_distance(cloud, exact) for way, cloud in clouds.items()},
        "data": {way: energy_distance(cloud[0], again[:points]) for way, cloud in clouds.items()},
        "mean": float((learned.mean - mean).square().sum() / mean.square().sum()),
        "covariance": float(
            (covariance - exact_covariance).square().sum() / exact_covariance.square().sum()
        ),
        "not positive": float((values[:, 0] <= 0).double().mean()),
        "shown": {
            way: [[round(v, 3) for v in row] for row in cloud[0, :300].tolist()]
            for way, cloud in {"clean": clean[None], "noisy": x[None], **clouds}.items()
        },
    }


def _spread(covariance: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Draws of N(0, covariance), what is negative of a learned one left out: (draws, B, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = torch.randn(draws, *values.shape, generator=generator, dtype=values.dtype)
    scaled = noise * values.clamp_min(0).sqrt()
    return torch.einsum("bij,nbj->nbi", vectors, scaled)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| without the terms of a point with itself."""
    within = sum(torch.cdist(v, v).sum() / (len(v) * (len(v) - 1)) for v in (a, b))
    return float(2 * torch.cdist(a, b).mean() - within)


def _posterior_distance(a: Tensor, b: Tensor) -> float:
    """The mean over points of the energy distance of their draws. Shapes (n, B, D)."""
    pairs = zip(a.transpose(0, 1).contiguous(), b.transpose(0, 1).contiguous(), strict=True)
    return float(np.mean([energy_distance(p, q) for p, q in pairs]))


def fig2(record: Record) -> None:
    seeds = (0,) if record.quick else _SEEDS
    size = (50, 20, 30) if record.quick else (1000, 200, 6000)
    work = [
        {"name": name, "seed": seed, "points": size[0], "draws": size[1], "steps": size[2]}
        for seed in seeds
        for name in sets.PLANE
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    for settings, result in zip(work, record.cells(work, denoise), strict=True):
        found.setdefault(settings["name"], []).append(result)
    record.text(
        f"Noisy points at sigma {_NOISE}, denoised by m alone and by draws of N(m, C), m and C "
        "from learned s1 and s2 (DSM with antithetic noise and the centred second-order loss, a "
        f"linear map beside the networks, widths 128 and 64, {size[2]:,} steps). Energy "
        "distances (0 for equal laws; estimates without bias, so that they may be negative) of "
        f"{size[1]} draws to the exact posterior of each point, "
        f"averaged over {size[0]:,} points, and of one draw for each point to clean data; mean ± "
        f"standard deviation over {len(seeds)} seeds."
    )
    rows = []
    for name in sets.PLANE:
        for way in _WAYS:
            row: dict[str, Any] = {"set": name, "denoised by": way}
            for key in ("posterior", "data"):
                values = [result[key][way] for result in found[name]]
                row[f"distance to the {key}"] = plus_minus(values)
                mean, std = mean_std(values)
                record.rows([{"set": name, "way": way, "to": key, "mean": mean, "std": std}])
            rows.append(row)
    record.table("Energy distances", rows)
    record.table("Errors of the learned moments", [_moments(name, found[name])
                                                   for name in sets.PLANE])  # fmt: skip
    shown = ("clean", "noisy", *_WAYS[:2], _WAYS[3])
    figure, axes = panels(len(sets.PLANE), len(shown), 1.5)
    for line, name in zip(axes, sets.PLANE, strict=True):
        for axis, way in zip(line, shown, strict=True):
            points = np.array(found[name][0]["shown"][way], dtype=float)
            axis.plot(*points.T, ".", color=GREY if way in ("clean", "noisy") else BLUE,
                      markersize=1.5)  # fmt: skip
            axis.set_xlim(-3.5, 3.5)
            axis.set_ylim(-3.5, 3.5)
            axis.set_aspect("equal")
            axis.set_title(way, fontsize=7)
    record.figure(figure, "Clean, noisy and denoised points, one draw for each noisy point.")
    record.compare(
        "energy distance to the posterior",
        "pictures only",
        "; ".join(f"{row['set']}, {row['denoised by']} {row['distance to the posterior']}"
                  for row in rows if row["denoised by"] in _WAYS[:2]),
    )  # fmt: skip
    record.close("Figure 2: denoising posteriors")


def _moments(name: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"set": name}
    for key in ("mean", "covariance"):
        row[f"{key}, relative squared error"] = plus_minus([result[key] for result in results])
    share = mean_std([result["not positive"] for result in results])[0]
    return row | {"C not positive definite": f"{share:.2%}" if not math.isnan(share) else ""}


ITEMS = {"fig1": fig1, "fig2": fig2}
