"""What the paper claims in words: the joint s1, variance reduction, and what it all costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from bench import timer
from hos_ext import (
    UNet,
    UnscaledScores,
    dsm_loss,
    dsm_vr_loss,
    langevin_step,
    normal,
    ozaki_step,
    score_matching_loss,
)

from . import networks, sets
from .record import BLUE, GREEN, ORANGE, Record, mean_std, panels, plus_minus

_SEEDS = (0, 1, 2)
_TEST = 2**44

# ------------------------------------------------------------------- s1 of the joint training

_JOINT = ("alone", "joint", "joint, s1 not detached", "joint, centred")


def first_order(name: str, kind: str, seed: int, sigma: float, steps: int) -> dict[str, float]:
    """The squared error of s1 against the noisy truth, over the square of the truth."""
    law = sets.law(name)
    whole = name.startswith("normal")
    rank = None if kind == "alone" else 15 if whole else 0
    net = networks.Net(law.dim, rank, seed=seed)
    second = {"alone": "none", "joint, centred": "centred"}.get(kind, "vr")
    options = networks.PAPER | {"second_order": second, "detach": kind != _JOINT[2]}
    networks.train_net(net, law, sigma, steps=steps, seed=seed, diagonal=not whole, **options)
    x, exact = _noisy_scores(name, sigma)
    with torch.no_grad():
        error = net.score(x) - exact
    return {"s1": float(error.square().sum() / exact.square().sum())}


@lru_cache(maxsize=1)
def _noisy_scores(name: str, sigma: float) -> tuple[Tensor, Tensor]:
    """500 noisy test points (float32), and s1 there (float64)."""
    law = sets.law(name)
    clean = law.sample(500, seed=_TEST)
    x = (clean + sigma * normal(tuple(clean.shape), seed=_TEST, dtype=clean.dtype)).float()
    return x, law.noisy(sigma).score(x.double())


def _joint(record: Record) -> None:
    names = ("product 50 even",) if record.quick else ("normal pairs", "product 50 even")
    sigmas = (0.1,) if record.quick else (0.01,)
    work = [
        {"name": name, "kind": kind, "seed": seed, "sigma": sigma,
         "steps": 10 if record.quick else 3_000}
        for seed in ((0,) if record.quick else _SEEDS)
        for name in names
        for sigma in sigmas
        for kind in _JOINT
    ]  # fmt: skip
    found: dict[tuple[str, float, str], list[float]] = {}
    for settings, result in zip(work, record.cells(work, first_order), strict=True):
        key = (settings["name"], settings["sigma"], settings["kind"])
        found.setdefault(key, []).append(result["s1"])
    rows, over = [], []
    for (name, sigma, kind), values in found.items():
        mean, std = mean_std(values)
        alone = mean_std(found[name, sigma, "alone"])[0]
        if kind == "joint":
            over.append(mean / alone)
        row = {"set": name, "sigma": sigma, "s1 trained": kind}
        rows.append(row | {"relative error": plus_minus(values), "over alone": mean / alone})
        record.rows([{"claim": "joint", **row, "value": mean, "std": std}])
    record.text(
        "**The paper: the s1 of the joint training is as good as that of DSM alone.** Networks of "
        "appendix C.2, DSM-VR, with and without the second-order term (low rank 15; diagonal for "
        "the logistic set). With s1 given in that term, as Theorem 2 assumes, the two trainings of "
        "s1 are the same up to rounding."
    )
    record.table("Squared error of s1 over its square", rows)
    record.compare(
        "error of the joint s1 over that of DSM alone",
        "as good",
        f"{min(over):.4f}x to {max(over):.4f}x",
    )


# -------------------------------------------------------------------------- variance reduction

_TERMS = ("first", "low rank", "diagonal")
_EVALUATIONS = {"first": 2, "low rank": 3, "diagonal": 3}


def gradient_variance(name: str, sigma: float, steps: int, repeats: int) -> dict[str, Any]:
    """Trace of the covariance of the gradient, without and with variance reduction.

    At a net that was trained for some steps with variance reduction, over batches of 64.
    """
    law = _law(name)
    rank = min(10, law.dim)
    net = networks.Net(law.dim, rank, seed=0)
    networks.train_net(net, law, sigma, steps=steps, seed=0, diagonal=False, **networks.PAPER)
    draw = networks.batches(law, 64, seed=1)
    found: dict[str, Any] = {}
    for term in _TERMS:
        first = term == "first"
        parameters = list(net.first.parameters()) if first else [
            p for part in (net.diag, net.factor) for p in part.parameters()
            if term == "low rank" or part is net.diag
        ]  # fmt: skip
        for kind in ("plain", "vr"):
            gradients = []
            for step in range(repeats):
                x = draw(step)
                noise = normal(tuple(x.shape), seed=2, offset=step, dtype=x.dtype)
                loss = networks.objective(
                    net,
                    x,
                    noise,
                    sigma,
                    first_order=kind if first else "plain",
                    second_order="none" if first else kind,
                    diagonal=term == "diagonal",
                )
                parts = torch.autograd.grad(loss, parameters, allow_unused=True)
                gradients.append(torch.cat([p.flatten() for p in parts if p is not None]).double())
            found[f"{term}, {kind}"] = float(torch.stack(gradients).var(0).sum())
    return found


def _law(name: str) -> Any:
    if name == "ellipse":
        return sets.ellipse()
    return sets.plane(name) if name in sets.PLANE else sets.law(name)


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Where y, interpolated in logarithms, first falls to `level`; None if it does not."""
    logs = np.log(np.stack([x, y]))
    target = np.log(level)
    for (x0, y0), (x1, y1) in pairwise(logs.T.tolist()):
        if y0 >= target > y1:
            return float(np.exp(x0 + (x1 - x0) * (y0 - target) / (y0 - y1)))
    return None


def _reduction(record: Record) -> None:
    names = ("ellipse",) if record.quick else ("ellipse", "two modes", "normal pairs")
    sigmas = (0.1, 2.0) if record.quick else (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 5.0)
    size = {"steps": 5, "repeats": 4} if record.quick else {"steps": 500, "repeats": 200}
    work = [{"name": name, "sigma": sigma, **size} for name in names for sigma in sigmas]
    results = record.cells(work, gradient_variance)
    rows = []
    ends: dict[str, str] = {}
    figure, axes = panels(1, len(names), 2.2)
    for index, (name, axis) in enumerate(zip(names, axes.flat, strict=True)):
        own = results[index * len(sigmas) : (index + 1) * len(sigmas)]
        for term, colour in zip(_TERMS, (BLUE, ORANGE, GREEN), strict=True):
            ratio = [r[f"{term}, plain"] / r[f"{term}, vr"] for r in own]
            axis.loglog(sigmas, ratio, ".-", color=colour, label=term)
            if term != _TERMS[-1]:  # the last two share a line
                axis.axhline(_EVALUATIONS[term], color=colour, linewidth=0.8, linestyle=":")
            row: dict[str, Any] = {"set": name, "term": term}
            row |= {f"sigma {s:g}": f"{r:.3g}" for s, r in zip(sigmas, ratio, strict=True)}
            at = crossing(sigmas, ratio, _EVALUATIONS[term])
            always = "all levels" if ratio[-1] >= _EVALUATIONS[term] else "no level"
            row["pays below sigma"] = always if at is None else at
            ends[f"{name}, {term}"] = f"{ratio[0]:.3g} and {ratio[-1]:.3g}"
            rows.append(row)
            record.rows(
                [{"claim": "variance", "set": name, "term": term, "sigma": s, "value": r}
                 for s, r in zip(sigmas, ratio, strict=True)]
            )  # fmt: skip
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("sigma", fontsize=7)
    axes.flat[0].legend(fontsize=6)
    axes.flat[0].set_ylabel("gradient variance, plain over reduced", fontsize=7)
    record.text(
        "**The paper: variance reduction is crucial at small noise and optional at large.** Trace "
        f"of the covariance of the gradient over {size['repeats']} batches of 64, plain over "
        f"reduced, at networks trained for {size['steps']} steps (`diagonal` at the d of d + "
        "U U^T). Reduced losses take 2 (first order) or 3 (second order) evaluations "
        "where plain ones take 1: at equal evaluations they pay where the ratio is above that "
        "(dotted), and stop paying where it first falls to that."
    )
    record.table("Gradient variance, plain over reduced", rows)
    record.compare(
        f"gradient variance, plain over reduced, at sigma {sigmas[0]:g} and {sigmas[-1]:g}",
        "crucial at small sigma, optional at large",
        "; ".join(f"{case} {values}" for case, values in ends.items()),
    )
    record.figure(figure, "Gradient variance of the plain loss over that of the reduced one.")


# ------------------------------------------------------------------------------------------ cost


def chain_steps(dim: int, chains: int, seconds: float) -> dict[str, float]:
    """Microseconds of one step of all chains, network included, networks of appendix C.2."""
    net = networks.Net(dim, 0, seed=0).requires_grad_(False)
    x = normal((chains, dim), seed=0, dtype=torch.float32)
    out = torch.empty_like(x)

    def langevin() -> Tensor:
        return langevin_step(x, net.score(x), 0.01, seed=0, out=out)

    def ozaki() -> Tensor:
        scores = net(x)
        return ozaki_step(x, scores.score, scores.diag, 0.01, seed=0, out=out)

    def differentiated() -> Tensor:
        jacobian = vmap(jacrev(net.score))(x)
        scores = UnscaledScores(net.score(x), jacobian.diagonal(dim1=1, dim2=2).contiguous())
        return ozaki_step(x, scores.score, scores.diag, 0.01, seed=0, out=out)

    given = net(x)
    contestants = {
        "langevin": langevin,
        "ozaki": ozaki,
        "ozaki, s2 by jacrev": differentiated,
        "langevin, the step alone": lambda: langevin_step(x, given.score, 0.01, seed=0, out=out),
        "ozaki, the step alone": lambda: ozaki_step(
            x, given.score, given.diag, 0.01, seed=0, out=out
        ),
    }
    times = timer.measure(contestants, seconds=seconds)
    return {name: timing.median for name, timing in times.items()}


# Label, rank, first-order and second-order term.
_TRAININGS: tuple[tuple[str, int | None, Any, str], ...] = (
    ("DSM", None, "plain", "none"),
    ("DSM-VR", None, "vr", "none"),
    ("joint, diagonal, plain", 0, "plain", "plain"),
    ("joint, diagonal, VR", 0, "vr", "vr"),
    ("joint, rank 20, plain", 20, "plain", "plain"),
    ("joint, rank 20, VR", 20, "vr", "vr"),
    ("joint, rank 20, centred VR", 20, "vr", "centred"),
)


def training_steps(dim: int, batch: int, seconds: float) -> dict[str, float]:
    """Microseconds of loss and gradients of one batch, networks of appendix C.2."""
    x, noise = (normal((batch, dim), seed=k, dtype=torch.float32) for k in (0, 1))
    contestants = {}
    for label, rank, first, second in _TRAININGS:
        net = networks.Net(dim, rank, seed=0)

        def step(net=net, rank=rank, first=first, second=second):
            loss = networks.objective(
                net, x, noise, 0.1, first_order=first, second_order=second, diagonal=rank == 0
            )
            return torch.autograd.grad(loss, list(net.parameters()))

        contestants[label] = step
    times = timer.measure(contestants, seconds=seconds)
    return {name: timing.median for name, timing in times.items()}


def unet_training_steps(
    side: int, batch: int, seconds: float, channels: Sequence[int] = (32, 64, 64)
) -> dict[str, float]:
    """The same of the library's U-Net, its three heads on one trunk; DSM has no factor."""
    x, noise = (normal((batch, 1, side, side), seed=k, dtype=torch.float32) for k in (0, 1))
    sigma = 0.1
    contestants = {}
    for label, rank, first, second in _TRAININGS:
        net = UNet(x.shape[1:], rank or 0, channels=channels).train()

        def loss(net=net, first=first):
            points = [x + sigma * noise] + [x] * (first == "vr")
            at = torch.cat(points)
            score = net(at, torch.full((len(at),), sigma)).scaled_score / sigma
            if first == "vr":
                return dsm_vr_loss(score.unflatten(0, (2, batch)), noise, sigma)
            return dsm_loss(score, noise, sigma)

        def joint(net=net, rank=rank, first=first, second=second):
            return score_matching_loss(
                net, x, sigma, first_order=first, noise=noise, diagonal=rank == 0,
                variance_reduction=second != "plain", centred=second == "centred",
            )  # fmt: skip

        def step(net=net, loss=loss if second == "none" else joint):
            return torch.autograd.grad(loss(), list(net.parameters()), allow_unused=True)

        contestants[label] = step
    times = timer.measure(contestants, seconds=seconds, least=2)
    return {name: timing.median for name, timing in times.items()}


def _cost(record: Record) -> None:
    dims = (10,) if record.quick else (100, 784)
    seconds = 0.02 if record.quick else 3.0
    chains, batch = (20, 16) if record.quick else (100, 128)
    unet: dict[str, Any] = (
        {"side": 8, "batch": 2, "channels": [16]} if record.quick else {"side": 28, "batch": 16}
    )
    networks_of = {f"D = {dim}": {"dim": dim, "seconds": seconds} for dim in dims}
    image = f"U-Net, D = {unet['side'] ** 2}"
    training = (
        f"**The paper: training costs as much as DSM.** Loss and gradients, {batch} samples; "
        f"U-Net: the library's, one trunk with three heads, {unet['batch']} samples."
    )
    for title, base, words, cases in (
        (
            "Microseconds of a chain's step, network included",
            "langevin",
            f"**The paper: a step of Ozaki costs about as much as Langevin's.** {chains} chains.",
            {column: (chain_steps, {**size, "chains": chains})
             for column, size in networks_of.items()},
        ),
        (
            "Microseconds of a training step",
            "DSM",
            training,
            {column: (training_steps, {**size, "batch": batch})
             for column, size in networks_of.items()}
            | {image: (unet_training_steps, {**unet, "seconds": seconds})},
        ),
    ):  # fmt: skip
        record.text(words)
        results = {
            column: record.cells([settings], compute)[0]
            for column, (compute, settings) in cases.items()
        }
        rows = []
        for label in results[f"D = {dims[0]}"]:
            row: dict[str, Any] = {"what": label}
            for column, result in results.items():
                row[column] = f"{result[label]:,.0f} ({result[label] / result[base]:.2f}x)"
                record.rows([{"claim": cases[column][0].__name__, "what": label,
                              "network": column, "value": result[label]}])  # fmt: skip
            rows.append(row)
        record.table(f"{title} (over {base})", rows)
        shown = ("ozaki", "joint, diagonal, plain", "joint, diagonal, VR", "joint, rank 20, VR")
        for column in list(results)[len(dims) - 1 :]:
            found = results[column]
            record.compare(
                f"{title}, over {base}, {column}",
                "about as much",
                "; ".join(f"{label} {found[label] / found[base]:.2f}x"
                          for label in shown if label in found),
            )  # fmt: skip


def claims(record: Record) -> None:
    _joint(record)
    _reduction(record)
    _cost(record)
    record.close("The paper's claims, measured")


ITEMS = {"claims": claims}
