"""Table 1: the mean squared error of the second-order score, learned and differentiated.

Every model is trained at the one noise level where it is measured, as in the paper, except "ours,
covariance head": one model for all levels in [0.01, 0.1], the library's own. The error is the sum
over the entries of s2 (diagonal: of diag s2), averaged over noisy test points; the paper compares
with the s2 of the clean law, which no method can reach, so both truths are here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from bench import peers, timer
from hos_ext import MLP, UnscaledScores, assemble_hessian, d2sm_vr_loss, normal, score_matching_loss
from hos_ext.schedules import draw_sigma

from . import networks, sets
from .record import BLUE, GREEN, GREY, ORANGE, PURPLE, Record, legend, mean_std, panels, plus_minus

SEEDS = (0, 1, 2)
# Keys of the test points, away from those of training.
_TEST_SEED = 2**40
# `_length` shows what longer training changes.
_STEPS, _BEST_STEPS = 3_000, 1_500
_TIMES = (1, 2, 4)

# Printed in the paper: columns are sigma 0.01, 0.05, 0.1.
PAPER = {
    "normal": {
        "autodiff of s1, DSM": (43.80, 43.76, 43.75),
        "autodiff of s1, DSM-VR": (9.40, 9.39, 9.21),
        "ours, rank 15": (7.12, 6.91, 7.03),
        "ours, rank 20": (5.24, 5.07, 5.13),
        "ours, rank 30": (1.76, 2.05, 1.76),
    },
    "50": {
        "autodiff of s1, DSM-VR": (26.41, 26.13, 25.39),
        "ours, diagonal": (18.43, 18.50, 17.88),
    },
    "80": {
        "autodiff of s1, DSM-VR": (32.80, 32.44, 31.51),
        "ours, diagonal": (21.68, 22.23, 22.18),
    },
}

# What a training run gives: (row of the table, key of its figures). "joint": Eq. 32 and 33;
# "centred": e e^T, e = z + sigma s1, in place of z z^T in Eq. 33.
_BY_S1 = [
    ("autodiff of s1, DSM-VR", "autodiff"),
    ("autodiff of s1, DSM-VR, EMA", "autodiff ema"),
]
_ROWS: dict[str, list[tuple[str, str]]] = {
    "dsm": [("autodiff of s1, DSM", "autodiff"), ("autodiff of s1, DSM, EMA", "autodiff ema")],
    "joint 15": [*_BY_S1, ("ours, rank 15", "learned")],
    "joint 20": [("ours, rank 20", "learned")],
    "joint 30": [("ours, rank 30", "learned")],
    "joint 0": [*_BY_S1, ("ours, diagonal", "learned")],
    "centred 15": [("ours, centred, rank 15", "learned")],
    "centred 20": [("ours, centred, rank 20", "learned")],
    "centred 30": [("ours, centred, rank 30", "learned")],
    "centred 0": [("ours, centred, diagonal", "learned")],
    "head 30": [("ours, covariance head, rank 30", "learned ema")],
    "head 0": [("ours, covariance head", "learned ema")],
    "best 30": [
        ("best net: autodiff of s1", "autodiff ema"),
        ("best net: ours, centred, rank 30", "learned ema"),
    ],
    "best joint 30": [("best net: ours, rank 30", "learned ema")],
    "best 0": [
        ("best net: autodiff of s1", "autodiff ema"),
        ("best net: ours, centred, diagonal", "learned ema"),
    ],
}


# ------------------------------------------------------------------------------------ measurement


@lru_cache(maxsize=2)
def _truths(name: str, sigma: float, points: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Noisy test points (float32), and s2 of the clean and the noisy law there (float64)."""
    law = sets.law(name)
    clean = law.sample(points, seed=_TEST_SEED)
    noise = normal(tuple(clean.shape), seed=_TEST_SEED, dtype=clean.dtype)
    x = (clean + sigma * noise).float()
    at = x.double()
    truth = {}
    for key, density in (("clean", law), ("noisy", law.noisy(sigma))):
        truth[key] = density.hessian(at) if _whole(name) else density.hessian_diag(at)
    return x, truth


def _whole(name: str) -> bool:
    """Whether the whole s2 is estimated, or its diagonal."""
    return name.startswith("normal")


def _errors(estimate: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
    return {
        key: float((estimate.double() - exact).flatten(1).square().sum(1).mean())
        for key, exact in truth.items()
    }


@torch.no_grad()
def _figures(
    name: str,
    sigma: float,
    points: int,
    scores: Callable[[Tensor], UnscaledScores] | None,
    score: Callable[[Tensor], Tensor],
) -> dict[str, dict[str, float]]:
    """Errors of the learned s2 (if there is one) and of the Jacobian of s1."""
    x, truth = _truths(name, sigma, points)
    found: dict[str, dict[str, float]] = {}
    if scores is not None:
        diag, factor = [], []
        for part in x.split(100):
            given = scores(part)
            diag.append(given.diag)
            factor.append(given.diag.new_empty(*part.shape, 0) if given.factor is None
                          else given.factor)  # fmt: skip
        d, u = torch.cat(diag), torch.cat(factor)
        estimate = assemble_hessian(d, u) if _whole(name) else d + u.square().sum(-1)
        found["learned"] = _errors(estimate, truth)
    jacobian = torch.cat([vmap(jacrev(score))(part) for part in x.split(100)])
    if not _whole(name):
        jacobian = jacobian.diagonal(dim1=1, dim2=2)
    found["autodiff"] = _errors(jacobian, truth)
    return found


# --------------------------------------------------------------------------------------- training


def fit(
    name: str, training: str, seed: int, sigma: float, steps: int, points: int
) -> dict[str, dict[str, float]]:
    """One network at one level: {"learned", "learned ema", "autodiff", "autodiff ema"}."""
    law = sets.law(name)
    family, *rest = training.split()
    rank = int(rest[-1]) if rest else None
    shape: dict[str, Any] = {}
    if family == "best":
        shape = {"width": 256, "head_width": 64 if rank else 256, "linear": True}
        shape["alone"] = 0 if rank else 32
    net = networks.Net(law.dim, rank, seed=seed, **shape)
    options = dict(networks.BEST if family == "best" else networks.PAPER)
    if "joint" in rest:
        options["second_order"] = "vr"
    if family == "dsm":
        options |= {"first_order": "plain", "second_order": "none"}
    if family in ("centred", *networks.PEERS):
        options["second_order"] = family
    if family == "published":
        options["detach"] = False
    average = networks.train_net(
        net, law, sigma, steps=steps, seed=seed, diagonal=not _whole(name), **options
    )
    found = {}
    for suffix, model in (("", net), (" ema", average)):
        heads = None if rank is None else model
        figures = _figures(name, sigma, points, heads, model.score)
        found |= {key + suffix: value for key, value in figures.items()}
    return found


def fit_head(
    name: str, training: str, seed: int, sigmas: Sequence[float], steps: int, points: int
) -> list[dict[str, dict[str, float]]]:
    """The library's model, one for all levels, its covariance positive by construction."""
    law = sets.law(name)
    low, high = min(sigmas), max(sigmas)
    rank = int(training.split()[1])
    std = float(law.sample(2000, seed=_TEST_SEED).std())
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = MLP((law.dim,), rank, sigma_data=std)
    diagonal = not _whole(name)

    def loss(current: nn.Module, x: Tensor, step: int) -> Tensor:
        level = draw_sigma(len(x), (low, high), seed=seed, offset=step)
        return score_matching_loss(
            current,
            x,
            level,
            variance_reduction=True,
            centred=False,
            diagonal=diagonal,
            seed=seed,
            offset=step,
        )

    average = networks.train(
        model, law, loss, steps=steps, batch=128, rate=1e-3, decay="cosine", seed=seed
    )
    found = []
    for sigma in sigmas:
        levels: dict[str, dict[str, float]] = {}
        for suffix, each in (("", model), (" ema", average)):
            figures = _figures(
                name,
                sigma,
                points,
                lambda x, each=each, sigma=sigma: each(x, sigma).unscaled(sigma),
                lambda x, each=each, sigma=sigma: each(x[None], sigma).scaled_score[0] / sigma,
            )
            levels |= {key + suffix: value for key, value in figures.items()}
        found.append(levels)
    return found


def scale(name: str, sigma: float, points: int) -> dict[str, float]:
    """The mean square of s2 itself: the error of an estimate that is zero."""
    _, truth = _truths(name, sigma, points)
    return {key: float(exact.flatten(1).square().sum(1).mean()) for key, exact in truth.items()}


def least(name: str, rank: int, sigma: float) -> dict[str, float]:
    """The least error that a diagonal plus `rank` columns can have for a normal law's s2.

    By turns: the best factor for what the diagonal leaves, the best diagonal for what that leaves.
    """
    law = sets.law(name)
    found = {}
    for key, density in (("clean", law), ("noisy", law.noisy(sigma))):
        target = density.hessian(torch.zeros(1, law.dim, dtype=torch.float64))[0]
        found[key] = left_over(target, rank)
    return found


def left_over(target: Tensor, rank: int) -> float:
    """The squared error of the best diagonal plus rank `rank` for a symmetric matrix."""
    diag = target.diagonal()
    error, last = float(target.square().sum()), math.inf
    while error < last * (1 - 1e-7):
        values, vectors = torch.linalg.eigh(target - diag.diag())
        values, vectors = values[-rank:].clamp_min(0), vectors[:, -rank:]
        rest = target - (vectors * values) @ vectors.mT
        diag = rest.diagonal()
        error, last = float((rest - diag.diag()).square().sum()), error
    return error


def dense(name: str, rank: int, batch: int, sigma: float, seconds: float) -> dict[str, float]:
    """Loss and gradients of the heads as they are published, with D x D matrices, and ours.

    Returns:
        Microseconds of each, their ratio, and the largest difference of the gradients over the
        largest gradient.
    """
    law = sets.law(name)
    net = networks.Net(law.dim, rank, seed=0)
    x = law.sample(batch, seed=_TEST_SEED).float()
    noise = normal(tuple(x.shape), seed=_TEST_SEED, dtype=x.dtype)
    at = torch.cat([x + sigma * noise, x - sigma * noise, x])
    with torch.no_grad():
        scores = net(at)
        parts = (scores.score, scores.diag, scores.factor)
        given = [value.unflatten(0, (3, batch)) for value in parts if value is not None]
    inputs = [*given, noise, torch.full((batch,), sigma)]
    losses = {"ours": d2sm_vr_loss, "dense": peers.dense_d2sm_vr}
    steps = {key: peers.forward_backward(loss, inputs) for key, loss in losses.items()}
    gradients = {key: step()[1:] for key, step in steps.items()}
    times = timer.measure(steps, seconds=seconds)
    gap = max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(gradients["ours"], gradients["dense"], strict=True)
    )
    found = {f"{key}, microseconds": timing.median for key, timing in times.items()}
    ratio = found["dense, microseconds"] / found["ours, microseconds"]
    return found | {"dense / ours": ratio, "largest difference of gradients": gap}


# ------------------------------------------------------------------------------------------- item


def run(record: Record) -> None:
    """All trainings, seed by seed, then the tables."""
    names = ("normal pairs", "product 50 even") if record.quick else sets.TABLE_1
    seeds = (0,) if record.quick else SEEDS
    sigmas = (0.1,) if record.quick else sets.SIGMAS
    points = _points(record.quick)
    single, several, scales = [], [], []
    for seed in seeds:
        for name in names:
            for training in _trainings(name, record.quick):
                common = {"name": name, "training": training, "seed": seed}
                rest = {"steps": _steps(training, record.quick), "points": points}
                if training.startswith("head"):
                    levels = [0.01, 0.1] if record.quick else list(sigmas)
                    several.append(common | {"sigmas": levels} | rest)
                else:
                    single += [common | {"sigma": sigma} | rest for sigma in sigmas]
    for name in names:
        scales += [{"name": name, "sigma": s, "points": points} for s in sigmas]

    results: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for work, found in zip(single, record.cells(single, fit), strict=True):
        results.setdefault((work["name"], work["training"], work["sigma"]), []).append(found)
    for work, levels in zip(several, record.cells(several, fit_head), strict=True):
        for sigma, found in zip(work["sigmas"], levels, strict=True):
            results.setdefault((work["name"], work["training"], sigma), []).append(found)
    zero = {
        (work["name"], work["sigma"]): found
        for work, found in zip(scales, record.cells(scales, scale), strict=True)
    }
    bounds = [
        {"name": name, "rank": rank, "sigma": sigma}
        for name in names if _whole(name) for rank in sets.RANKS for sigma in sigmas
    ]  # fmt: skip
    bound = {
        (work["name"], work["rank"], work["sigma"]): found
        for work, found in zip(bounds, record.cells(bounds, least), strict=True)
    }
    _write(record, names, sigmas, results, zero, bound)
    _length(record)
    _peers(record, names, seeds, sigmas, results)
    record.close("Table 1: accuracy of the second-order score")


def _length(record: Record) -> None:
    """Whether longer training changes who wins: three sets, one level, the first seed."""
    sigma, points = max(sets.SIGMAS), _points(record.quick)
    names = (sets.TABLE_1[0], "product 50 even", "joint 50 even")
    times = _TIMES[:2] if record.quick else _TIMES
    rows = []
    for name in names[: 1 if record.quick else None]:
        rank = sets.RANKS[-1] if _whole(name) else 0
        for family, label in (
            ("joint", "ours"),
            ("centred", "ours, centred"),
            *([("best joint", "best net: ours")] if rank else []),
            ("best", "best net: ours, centred"),
        ):
            training = f"{family} {rank}"
            steps = _steps(training, record.quick)
            work = [
                {"name": name, "training": training, "seed": SEEDS[0], "sigma": sigma,
                 "steps": steps * k, "points": points}
                for k in times
            ]  # fmt: skip
            results = record.cells(work, fit)
            learned = f"{label}, rank {rank}" if rank else f"{label}, diagonal"
            for way, key in ((learned, "learned"), ("autodiff of its s1", "autodiff")):
                row: dict[str, Any] = {"set": name, "networks": label, "s2": way}
                for k, settings, result in zip(times, work, results, strict=True):
                    error = result[key + " ema" * family.startswith("best")]["noisy"]
                    row[f"steps x {k}"] = f"{error:.4g}"
                    record.rows([row | {"truth": "noisy", "sigma": sigma, "mean": error,
                                        "steps": settings["steps"], "seeds": 1}])  # fmt: skip
                rows.append(row)
    record.table(
        f"Sigma {sigma:g}, noisy truth, first seed: the steps of the tables above, twice and four "
        "times as many",
        rows,
    )


def _peers(
    record: Record,
    names: Sequence[str],
    seeds: Sequence[int],
    sigmas: Sequence[float],
    results: dict[tuple[str, str, float], list[dict[str, Any]]],
) -> None:
    """The second-order term as the authors' code has it, and with its scale of C left wrong."""
    rank = sets.RANKS[0]
    own = [name for name in (sets.TABLE_1[0], "product 50 even") if name in names]
    work: list[dict[str, Any]] = [
        {"name": name, "training": f"{family} {rank if _whole(name) else 0}", "seed": seed,
         "sigma": sigma, "steps": _steps(family, record.quick), "points": _points(record.quick)}
        for seed in seeds for name in own for family in networks.PEERS for sigma in sigmas
    ]  # fmt: skip
    found: dict[tuple[str, str, float], list[float]] = {}
    for settings, result in zip(work, record.cells(work, fit), strict=True):
        key = (settings["name"], settings["training"].split()[0], settings["sigma"])
        found.setdefault(key, []).append(result["learned"]["noisy"])
    rows = []
    for name in own:
        joint = f"joint {rank if _whole(name) else 0}"
        labels = {
            "Eq. 33, s1 given (ours)": [
                [r["learned"]["noisy"] for r in results[name, joint, sigma]] for sigma in sigmas
            ],
            "as published": [found[name, "published", sigma] for sigma in sigmas],
            "C / sigma in place of C / sigma^2": [
                found[name, "uncorrected", sigma] for sigma in sigmas
            ],
        }
        for label, values in labels.items():
            row = {"set": name, "second-order term": label}
            rows.append(
                row | {f"sigma {s}": plus_minus(v) for s, v in zip(sigmas, values, strict=True)}
            )
            record.rows(
                [row | {"truth": "noisy", "sigma": s, "mean": mean_std(v)[0],
                        "std": mean_std(v)[1], "seeds": len(v)}
                 for s, v in zip(sigmas, values, strict=True)]
            )  # fmt: skip
    record.text(
        "**Peers.** The same networks, data and steps. `as published`: the second-order term of "
        "the authors' code, re-derived: Eq. 33, s1 not given in it, a diagonal s2 matched as a "
        f"whole matrix, 10 (diagonal: 1) / sigma^2 times DSM-VR; rank {rank}. With C = (I - z "
        "z^T) / sigma, one power of sigma short, the minimiser is sigma (s2 + s1 s1^T) - s1 s1^T. "
        "The authors form D x D matrices; the closed form has the same gradients:"
    )
    size = {"batch": 4, "seconds": 0.01} if record.quick else {"batch": 128, "seconds": 3.0}
    settings = {"name": sets.TABLE_1[0], "rank": rank, "sigma": 0.1, **size}
    (cost,) = record.cells([settings], dense)
    record.table("Loss and gradients of one batch, D x D and closed form", [cost])
    record.table("Error of s2 against the noisy truth, by second-order term", rows)


def _steps(training: str, quick: bool) -> int:
    if training.startswith("best"):
        return 6 if quick else _BEST_STEPS
    return 12 if quick else _STEPS


def _points(quick: bool) -> int:
    return 20 if quick else 500


def _trainings(name: str, quick: bool) -> list[str]:
    if not _whole(name):
        return ["dsm", "joint 0", "centred 0", "head 0", "best 0"]
    if quick:
        return ["dsm", "joint 15", "joint 30", "centred 30", "head 30", "best 30"]
    learned = [f"{family} {rank}" for family in ("joint", "centred") for rank in sets.RANKS]
    return ["dsm", *learned, "head 30", "best 30", "best joint 30"]


def _write(
    record: Record,
    names: Sequence[str],
    sigmas: Sequence[float],
    results: dict[tuple[str, str, float], list[dict[str, Any]]],
    zero: dict[tuple[str, float], dict[str, float]],
    bound: dict[tuple[str, int, float], dict[str, float]],
) -> None:
    record.text(
        "Mean squared error of s2, summed over its entries, mean ± standard deviation over the "
        "seeds; in brackets over the error of an estimate that is zero. Where not said otherwise "
        "the networks are those of the paper's appendix C.2 (s1: 3 hidden layers of 128, s2: 3 of "
        f"32, tanh), each trained at one noise level, {_STEPS:,} steps of Adam with 128 fresh "
        "samples, the rate falling from 1e-3 to zero; s1 by DSM-VR is the s1 of the joint training "
        "(Eq. 32 and 33, s1 given in Eq. 33). `centred`: e e^T, e = z + sigma s1, in place of z "
        "z^T in Eq. 33, which makes it robust against errors of s1. `best net`: antithetic DSM, a "
        "linear map beside the network for s1, widths 256 and 64 (diagonal: 256, and beside both a "
        "network of width 32 for each coordinate by itself, without which none of these learns "
        f"more than a constant where coordinates stand alone), {_BEST_STEPS:,} steps from 2e-3, "
        "averaged weights. `covariance head`: the library's "
        "model and default loss, one model for all levels in [0.01, 0.1], averaged weights. EMA: "
        "averaged weights. Jacobians are taken as they are, not made symmetric, as in the paper. "
        "`least possible`: of any diagonal plus so many columns, found by turns. "
        "Rows of the paper stand beside ours for their ratios; its data are not known."
    )
    figure, axes = panels(-(-len(names) // 3), min(3, len(names)), 2.2, sharex=True, sharey=True)
    for name, axis in zip(names, axes.flat, strict=False):
        rows = [row for training in _trainings(name, record.quick) for row in _ROWS[training]]
        owner = {
            row[0]: training
            for training in _trainings(name, record.quick)
            for row in _ROWS[training]
        }
        for truth in ("clean", "noisy"):
            means: dict[str, list[float]] = {}
            table = []
            for label, key in rows:
                line: dict[str, Any] = {"method": label}
                for sigma in sigmas:
                    seeds = results[name, owner[label], sigma]
                    values = [found[key][truth] for found in seeds]
                    mean, std = mean_std(values)
                    means.setdefault(label, []).append(mean)
                    share = mean / zero[name, sigma][truth]
                    line[f"sigma {sigma}"] = f"{plus_minus(values)} ({share:.2%})"
                    record.rows(
                        [
                            {
                                "set": name,
                                "truth": truth,
                                "method": label,
                                "sigma": sigma,
                                "mean": mean,
                                "std": std,
                                "relative": share,
                                "seeds": len(values),
                            }
                        ]
                    )
                table.append(line)
            for rank in sets.RANKS if _whole(name) else ():
                line = {"method": f"least possible, rank {rank}"}
                for sigma in sigmas:
                    error = bound[name, rank, sigma][truth]
                    share = error / zero[name, sigma][truth]
                    record.rows(
                        [{"set": name, "truth": truth, "method": line["method"], "sigma": sigma,
                          "mean": error, "relative": share}]
                    )  # fmt: skip
                    line[f"sigma {sigma}"] = f"{error:.4g} ({share:.2%})"
                table.append(line)
            last = f"rank {sets.RANKS[-1]}" if _whole(name) else "diagonal"
            ratios = _ratios(means, last)
            for label, values in ratios.items():
                found = {f"sigma {s}": f"{v:.2f}" for s, v in zip(sigmas, values, strict=True)}
                table.append({"method": f"ratio: {label}", **found})
            if truth == "noisy":
                _lines(axis, name, sigmas, means, zero)
            else:
                table += _printed(record, name, sigmas, ratios, last)
            record.table(f"{name}, against the {truth} truth", table)
        axis.set_title(name, fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    legend(figure, axes)
    for axis in axes[:, 0]:
        axis.set_ylabel("error / zero estimate", fontsize=8)
    record.figure(
        figure,
        "Error of s2 against the noisy truth over that of a zero estimate, by noise level. Dashed: "
        "differentiated s1; full: learned s2, rank 30 for the normal laws.",
    )


# What the figure shows: the row's name but for its rank, and how it is drawn.
_SHOWN = (
    ("autodiff of s1, DSM", GREY, "--"),
    ("autodiff of s1, DSM-VR", PURPLE, "--"),
    ("best net: autodiff of s1", GREEN, "--"),
    ("ours", ORANGE, "-"),
    ("ours, centred", BLUE, "-"),
    ("ours, covariance head", "#b8860b", "-"),
    ("best net: ours, centred", GREEN, "-"),
)


def _lines(
    axis: Any,
    name: str,
    sigmas: Sequence[float],
    means: dict[str, list[float]],
    zero: dict[tuple[str, float], dict[str, float]],
) -> None:
    """Errors over the zero estimate; of several ranks the last one of the paper's."""
    for start, colour, style in _SHOWN:
        tails = ("", ", diagonal", f", rank {sets.RANKS[-1]}")
        for label in (start + tail for tail in tails if start + tail in means):
            relative = [
                mean / zero[name, sigma]["noisy"]
                for mean, sigma in zip(means[label], sigmas, strict=True)
            ]
            axis.loglog(sigmas, relative, style, marker=".", color=colour, linewidth=1, label=start)
    axis.set_xticks(sigmas, [f"{sigma:g}" for sigma in sigmas])
    axis.set_xticks([], minor=True)


# What is divided by what, autodiff by ours, but for the rank.
_PAIRS = (
    ("autodiff of s1, DSM-VR", "ours"),
    ("autodiff of s1, DSM-VR", "ours, centred"),
    ("autodiff of s1, DSM-VR", "best net: ours, centred"),
    ("best net: autodiff of s1", "best net: ours"),
    ("best net: autodiff of s1", "best net: ours, centred"),
)


def _ratios(means: dict[str, list[float]], last: str) -> dict[str, list[float]]:
    """The errors of autodiff over ours by noise level; of several ranks the last one."""
    found = {}
    for above, below in _PAIRS:
        if f"{below}, {last}" in means:
            pairs = zip(means[above], means[f"{below}, {last}"], strict=True)
            found[f"{above} / {below}, {last}"] = [a / b for a, b in pairs]
    return found


def _printed(
    record: Record,
    name: str,
    sigmas: Sequence[float],
    ratios: dict[str, list[float]],
    last: str,
) -> list[dict[str, Any]]:
    """The paper's rows for a set, and its ratio beside ours at the head of the page."""
    printed = PAPER["normal" if _whole(name) else name.split()[1]]
    columns = {f"sigma {sigma}": sets.SIGMAS.index(sigma) for sigma in sigmas}
    above, below = printed[_PAIRS[0][0]], printed[f"ours, {last}"]
    theirs = {key: f"{above[i] / below[i]:.2f}" for key, i in columns.items()}
    lines: list[dict[str, Any]] = [
        {"method": f"the paper's ratio: {_PAIRS[0][0]} / ours, {last}", **theirs}
    ]
    for label, values in printed.items():
        line = {key: f"{values[i]}" for key, i in columns.items()}
        lines.append({"method": f"the paper's: {label}", **line})
    record.compare(
        f"{name}, clean truth: error of autodiff over ours, {last}, sigma "
        + "/".join(f"{s:g}" for s in sigmas),
        "/".join(theirs.values()),
        "; ".join(
            f"{label.replace(f', {last}', '')} " + "/".join(f"{v:.2f}" for v in values)
            for label, values in ratios.items()
        ),
    )
    return lines
