"""Figures 7 and 8: chains of MNIST digits, Langevin against Ozaki, and how their labels change.

Ten test digits, the first of each class, a hundred chains from each: the digit with fresh noise at
SIGMA. After every step the state is denoised, m = x + sigma^2 s1, which takes no evaluation that
the next step does not, and the classifier names it. Step sizes are found on validation digits, by
`search`, before any test digit is looked at.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hos_ext import UnscaledScores, normal, sample
from hos_ext.app.data import Scaling, open_rows, open_source
from hos_ext.checks import require
from hos_ext.storage import write_whole

from . import images
from .record import BLUE, GREEN, GREY, ORANGE, Folders, Record, panels

SIGMA = 1.0  # half of the range of a pixel
# In units of sigma^2. The precision of noisy pixels is at most 1 / sigma^2: beyond the last one an
# Ozaki step hardly changes (exp(-3.2) = 0.04), and from 2 on one of Langevin is unstable.
STEP_SIZES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
# The largest step counts whose chains, begun at noisy validation digits, keep two things that the
# law of the score keeps: E|s1|^2 = -E tr s2, to a tenth of what it is at the start, and how many
# are of each class, to this total variation of the start (200 labels drawn anew: 0.12).
TOLERANCE, SHIFT = 0.1, 0.15
# The first alone, which holds within each class, took this step for Ozaki. Its chains are shown.
_BLIND = 3.2
LEAST_ACCURACY = 0.99
_SEED = 0
_START, _SEARCH, _CHAIN = 2**45, 2**46, 2**47  # keys of starts, of the search and of the chains
_CLASSES = 10
_LIMIT = 2**32  # bytes of a data set
_VARIANTS = ("langevin", "ozaki", "ozaki at Langevin's step", "ozaki, step too large")
_COLOURS = (ORANGE, BLUE, GREEN, GREY)


# -------------------------------------------------------------------------------------- classifier


class Labelled(NamedTuple):
    """Raw images and their labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    scaling: Scaling


@lru_cache(maxsize=1)
def labelled(folders: Folders, quick: bool) -> Labelled:
    """MNIST whole; in the quick form the digits of scikit-learn."""
    if quick:
        rows = open_rows("digits", limit=_LIMIT)
        labels = torch.from_numpy(require("bench.paper", "sklearn.datasets").load_digits().target)
        parts = open_source("digits").parts
        assert parts.train is not None
        read = {"train": parts.train, "test": parts.test}
        pairs = [(rows.read(numbers), labels[numbers]) for numbers in read.values()]
    else:
        parquet = require("bench.paper", "pyarrow.parquet")
        pairs = []
        for part in ("train", "test"):
            spec = images.data_file(folders, "mnist", part)
            rows = open_rows(spec, split=part, limit=_LIMIT)
            column = parquet.read_table(spec.partition(":")[2], columns=["label"])["label"]
            pairs.append((rows.read(torch.arange(rows.size)), torch.tensor(column.to_pylist())))
    (train, train_labels), (test, test_labels) = pairs
    return Labelled(train, train_labels, test, test_labels, Scaling(levels=rows.levels))


class Classifier(nn.Module):
    """A small convolutional network on images in data units, of any shape."""

    def __init__(self, shape: Sequence[int], seed: int) -> None:
        super().__init__()
        self.shape = (1, *shape)[-3:]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(self.shape[0], 24, 5, padding=2, stride=2), nn.ReLU(),
                nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
            )  # fmt: skip
            width = math.prod(self.body(torch.zeros(1, *self.shape)).shape)
            self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x.reshape(-1, *self.shape)))
        return logits


def shifted(x: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Every image moved by up to `reach` pixels each way, what enters black."""
    batch, channels, height, width = x.shape
    padded = functional.pad(x, (reach,) * 4, value=-1.0)
    down, right = torch.randint(0, 2 * reach + 1, (2, batch), generator=generator)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    return padded[
        torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None], rows,
        columns,
    ]  # fmt: skip


def train_classifier(found: Labelled, epochs: int, seed: int) -> Classifier:
    """Adam with a warm-up and a cosine, shifts of a pixel or two, averaged weights."""
    net = Classifier(found.train.shape[1:], seed)
    average = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    batch = 128
    total = epochs * (len(found.train) // batch)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=max(total, 2), pct_start=0.1
    )
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(found.train), generator=generator)
        for rows in order.split(batch):
            if len(rows) < batch:
                continue
            x = found.scaling.forward(found.train[rows], seed=seed, offset=step)
            x = shifted(x.reshape(batch, *net.shape), 2, generator)
            loss = functional.cross_entropy(net(x), found.train_labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            weight = 1 - min(0.999, (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, value in zip(average.parameters(), net.parameters(), strict=True):
                    mean.lerp_(value, weight)
    return average.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(net: Classifier, found: Labelled) -> float:
    """Of the whole test set."""
    x = found.scaling.forward(found.test, seed=_SEED)
    right = [
        net(part).argmax(1).eq(labels)
        for part, labels in zip(x.split(500), found.test_labels.split(500), strict=True)
    ]
    return float(torch.cat(right).double().mean())


def classifier(folders: Folders, epochs: int, quick: bool) -> Classifier:
    """The trained classifier: read, or trained first.

    Raises:
        RuntimeError: it is not good enough to judge the chains (not in the quick form).
    """
    safetensors = require("bench.paper", "safetensors.torch")
    path = folders.runs / f"classifier-{epochs}.safetensors"
    found = labelled(folders, quick)
    with images.alone(path):
        if path.exists():
            net = Classifier(found.train.shape[1:], _SEED).eval().requires_grad_(False)
            net.load_state_dict(safetensors.load_file(path))
        else:
            net = train_classifier(found, epochs, _SEED)
            write_whole(path, safetensors.save(net.state_dict()))
    right = accuracy(net, found)
    if right < LEAST_ACCURACY and not quick:
        raise RuntimeError(
            f"classifier: accuracy on the test set must be at least {LEAST_ACCURACY}, got {right}"
        )
    return net


def judge(folders: Folders, epochs: int, quick: bool) -> dict[str, float]:
    """The accuracy of the classifier on the test set, and its size."""
    net = classifier(folders, epochs, quick)
    found = labelled(folders, quick)
    return {
        "accuracy": accuracy(net, found),
        "test images": len(found.test),
        "parameters": sum(p.numel() for p in net.parameters()),
    }


# ------------------------------------------------------------------------------------------ chains


def stein_ratio(scores: UnscaledScores) -> float:
    """|s1|^2 over -tr s2, both averaged over the points: 1 for the law of exact scores."""
    trace = scores.diag.sum()
    if scores.factor is not None:
        trace = trace + scores.factor.square().sum()
    return float(scores.score.square().sum() / -trace)


@torch.no_grad()
def search(
    folders: Folders, method: str, step_sizes: Sequence[float], chains: int, iterations: int,
    epochs: int, quick: bool,
) -> dict[str, Any]:  # fmt: skip
    """What chains begun at noisy validation digits keep in their second half, by step.

    Returns:
        "start", `stein_ratio` at the starts; "ratios" by step; "shifts", the total variation of the
        classes there from those at the starts; "chosen", in units of sigma^2: the largest step
        within TOLERANCE and SHIFT, the smallest of all where none is ("within" is then false).
    """
    trained, net = images.ready(folders, "mnist", quick), classifier(folders, epochs, quick)
    raw = trained.source.validation[:chains]
    init = trained.source.scaling.forward(raw, seed=_SEARCH)
    init = init + SIGMA * normal(tuple(init.shape), seed=_SEARCH, dtype=init.dtype)

    def looked_at(x: Tensor, scores: UnscaledScores) -> tuple[float, Tensor]:
        labels = net(x + SIGMA**2 * scores.score).argmax(1)
        return stein_ratio(scores), labels.bincount(minlength=_CLASSES).double() / len(x)

    start, classes = looked_at(init, trained.model(init, SIGMA).unscaled(SIGMA))
    ratios: list[float] = []
    shifts: list[float] = []
    for step in step_sizes:
        seen: list[tuple[float, Tensor]] = []

        def score_fn(x: Tensor, seen: list[tuple[float, Tensor]] = seen) -> UnscaledScores:
            scores: UnscaledScores = trained.model(x, SIGMA).unscaled(SIGMA)
            seen.append(looked_at(x, scores))
            return scores

        sample(score_fn, init, method=method, step_size=step * SIGMA**2, n_steps=iterations,
               thin=iterations, seed=_SEARCH)  # fmt: skip
        last = seen[iterations // 2 :]
        ratios.append(float(np.mean([ratio for ratio, _ in last])))
        mean = torch.stack([share for _, share in last]).mean(0)
        shifts.append(float((mean - classes).abs().sum() / 2))
    good = [
        step
        for step, ratio, shift in zip(step_sizes, ratios, shifts, strict=True)
        if abs(ratio / start - 1) <= TOLERANCE and shift <= SHIFT
    ]
    return {
        "start": start,
        "ratios": ratios,
        "shifts": shifts,
        "chosen": max(good) if good else min(step_sizes),
        "within": bool(good),
    }


@torch.no_grad()
def wander(
    folders: Folders,
    digit: int,
    method: str,
    step_size: float,
    chains: int,
    iterations: int,
    shown: int,
    epochs: int,
    quick: bool,
) -> dict[str, Any]:
    """Chains from one test digit: the label of every denoised state, and some of the states.

    Args:
        digit: the class; the first test image of it is the start.
        step_size: in units of sigma^2.
        shown: pictures of the first chain, evenly over the iterations.

    Returns:
        By iteration, from 0: "changed", the share of chains whose label is not the digit's, and
        "moved", the share whose label is not the one before; the classes at the end, the mean
        certainty of the classifier and `stein_ratio` over the second half, and seconds.
    """
    trained, net = images.ready(folders, "mnist", quick), classifier(folders, epochs, quick)
    found = labelled(folders, quick)
    first = int(found.test_labels.eq(digit).nonzero()[0])
    clean = found.scaling.forward(found.test[first : first + 1], seed=_START, first=first)
    shape = (chains, *clean.shape[1:])
    init = clean + SIGMA * normal(shape, seed=_START, offset=digit, dtype=clean.dtype)
    every = max(1, iterations // (shown - 1))
    labels: list[Tensor] = []
    sure: list[float] = []
    ratios: list[float] = []
    pictures: list[Tensor] = []

    def score_fn(x: Tensor) -> UnscaledScores:
        scores: UnscaledScores = trained.model(x, SIGMA).unscaled(SIGMA)
        denoised = x + SIGMA**2 * scores.score
        chance = net(denoised).softmax(1)
        if len(labels) % every == 0 and len(pictures) < shown:
            pictures.append(denoised[0].clone())
        labels.append(chance.argmax(1))
        sure.append(float(chance.amax(1).mean()))
        ratios.append(stein_ratio(scores))
        return scores

    run = sample(
        score_fn, init, method=method, step_size=step_size * SIGMA**2, n_steps=iterations,
        thin=iterations, seed=_CHAIN + digit,
    )  # fmt: skip
    score_fn(run.draws[:, -1])  # the last state has not been named yet
    names = torch.stack(labels)
    half = len(sure) // 2
    return {
        "changed": [round(v, 4) for v in names.ne(digit).double().mean(1).tolist()],
        "moved": [0.0, *(round(v, 4) for v in names[1:].ne(names[:-1]).double().mean(1).tolist())],
        "classes": names[-1].bincount(minlength=_CLASSES).tolist(),
        "certainty": float(np.mean(sure[half:])),
        "stein": float(np.mean(ratios[half:])),
        "diverged": int(run.stats["diverged"].sum()),
        "seconds": run.stats["seconds"],
        "pictures": images.pack(torch.stack(pictures)),
    }


# ------------------------------------------------------------------------------------------- items


def _sizes(quick: bool) -> dict[str, Any]:
    if quick:
        return {"chains": 4, "iterations": 6, "shown": 3, "epochs": 1}
    return {"chains": 100, "iterations": 300, "shown": 11, "epochs": 6}


class _Found(NamedTuple):
    accuracy: float
    grid: list[float]
    steps: dict[str, tuple[str, float]]  # variant to method and step
    searches: dict[str, dict[str, Any]]
    runs: dict[str, list[dict[str, Any]]]  # variant to digits


def _everything(record: Record) -> _Found:
    """The cells of both figures; they are those of Figure 7."""
    quick, size = record.quick, _sizes(record.quick)
    only = [{"epochs": size["epochs"], "quick": quick}]
    (judged,) = record.cells(only, judge, of="fig7", placed=True)
    grid = list(STEP_SIZES[:2] if quick else STEP_SIZES)
    few = {"chains": 4, "iterations": 4} if quick else {"chains": 200, "iterations": 100}
    work = [
        {"method": method, "step_sizes": grid, **few, "epochs": size["epochs"], "quick": quick}
        for method in ("langevin", "ozaki")
    ]
    results = record.cells(work, search, of="fig7", placed=True)
    searches = dict(zip(_VARIANTS, results, strict=False))
    langevin, ozaki = (searches[method]["chosen"] for method in ("langevin", "ozaki"))
    chosen = ("langevin", langevin), ("ozaki", ozaki), ("ozaki", langevin), ("ozaki", _BLIND)
    steps = dict(zip(_VARIANTS, chosen, strict=True))
    digits = range(2 if quick else _CLASSES)
    work = [
        {"digit": digit, "method": method, "step_size": step, **size, "quick": quick}
        for digit in digits
        for method, step in steps.values()
    ]
    results = record.cells(work, wander, of="fig7", placed=True)
    apart = {v: results[place :: len(steps)] for place, v in enumerate(_VARIANTS)}
    return _Found(judged["accuracy"], grid, steps, searches, apart)


def _settings(found: _Found, quick: bool) -> str:
    size = _sizes(quick)
    within = all(result["within"] for result in found.searches.values())
    return (
        f"Chains of the law of noisy digits at sigma {SIGMA:g} (a pixel lies in [-1, 1)) by the "
        f"scores of the model of Figure 3; {size['chains']} chains of {size['iterations']} steps "
        "from the first test image of each class with fresh noise. Step sizes h in units of "
        "sigma^2, chosen on validation digits: the largest of "
        f"{', '.join(f'{h:g}' for h in STEP_SIZES)} at which E|s1|^2 / -E tr s2 stays within "
        f"{TOLERANCE:.0%} of its value at the start, and the shares of the classes within a total "
        f"variation of {SHIFT:g}"
        + (": " if within else " (none does for one of them, which takes the smallest): ")
        + ", ".join(f"{v} {step:g}" for v, (_, step) in found.steps.items())
        + ". The step that is too large is the one that the first rule alone allows: it sees the "
        "law within a class, not how many chains each class holds (it was our only rule at first; "
        "its chains are kept for what they show). The classifier is right on "
        f"{found.accuracy:.2%} of the test set. Denoised states are what is judged and shown."
    )


def fig7(record: Record) -> None:
    found = _everything(record)
    size = _sizes(record.quick)
    digits = range(len(found.runs["langevin"]))
    figure, axes = panels(len(digits), 2 * size["shown"] + 1, 0.36)  # a column between the two
    for digit in digits:
        for side, variant in enumerate(_VARIANTS[:2]):
            pictures = images.unpack(found.runs[variant][digit]["pictures"])
            for column, picture in enumerate(pictures):
                axis = axes[digit, side * (size["shown"] + 1) + column]
                images.show(axis, picture, "image")
    for axis in axes[:, size["shown"]]:
        axis.axis("off")
    for side, variant in enumerate(_VARIANTS[:2]):
        axes[0, side * (size["shown"] + 1)].set_title(variant, fontsize=6, loc="left")
    record.text(_settings(found, record.quick))
    rows = [
        {"method": v, "h / sigma^2": step}
        | {f"class {d}": " ".join(str(n) for n in result["classes"])
           for d, result in enumerate(found.runs[v])}
        for v, (_, step) in found.steps.items()
    ]  # fmt: skip
    record.table("Classes of the last states, 0 to 9, by the class of the start", rows)
    record.rows(rows)
    every = max(1, size["iterations"] // (size["shown"] - 1))
    record.figure(
        figure,
        f"The first chain from each test digit, denoised, every {every} iterations: left Langevin, "
        "right Ozaki (diagonal), each at its own step.",
    )
    record.compare(
        "accuracy of the classifier on the test set", "pictures only", f"{found.accuracy:.2%}"
    )
    record.close("Figure 7: chains of MNIST digits")


def fig8(record: Record) -> None:
    found = _everything(record)
    size = _sizes(record.quick)
    iterations = np.arange(size["iterations"] + 1)
    figure, axes = panels(1, 2, 2.4)
    rows = []
    marks = [size["iterations"] * k // 6 for k in (0, 1, 2, 4, 6)]
    for variant, colour in zip(_VARIANTS, _COLOURS, strict=True):
        runs = found.runs[variant]
        changed = 100 * np.array([run["changed"] for run in runs])
        over = changed[:, -1] - 100 * np.array([r["changed"][-1] for r in found.runs["langevin"]])
        moved = np.cumsum([run["moved"] for run in runs], axis=1)
        label = f"{variant}, h = {found.steps[variant][1]:g} sigma^2"
        axes[0, 0].plot(iterations, changed.mean(0), color=colour, linewidth=1, label=label)
        axes[0, 0].fill_between(
            iterations, *np.percentile(changed, [25, 75], axis=0), color=colour, alpha=0.15,
            linewidth=0,
        )  # fmt: skip
        axes[0, 1].plot(iterations, moved.mean(0), color=colour, linewidth=1)
        rows.append(
            {"method": variant, "h / sigma^2": found.steps[variant][1]}
            | {f"% changed at {k}": f"{changed[:, k].mean():.1f}" for k in marks}
            | {"over langevin": f"{over.mean():+.1f} ± {over.std(ddof=1) / len(over) ** 0.5:.1f}",
               "label changes of a chain": f"{moved[:, -1].mean():.2f}",
               "certainty of the classifier": f"{np.mean([run['certainty'] for run in runs]):.3f}",
               "mean s1^2 over -tr s2": f"{np.mean([run['stein'] for run in runs]):.2f}",
               "most frequent at the end": _commonest(runs),
               "total variation at the end": f"{_shift(runs):.2f}",
               "diverged": sum(run["diverged"] for run in runs),
               "ms a step and chain": f"{_cost(runs, size):.2f}"}
        )  # fmt: skip
        record.rows(
            [{"method": variant, "h": found.steps[variant][1], "digit": digit, "iteration": k,
              "% changed": round(float(changed[digit, k]), 2),
              "changes a chain": round(float(moved[digit, k]), 4)}
             for digit in range(len(runs)) for k in range(0, size["iterations"] + 1, 2)]
        )  # fmt: skip
    axes[0, 0].set_title("label is not the start's, %", fontsize=8)
    axes[0, 1].set_title("changes of label, for each chain", fontsize=8)
    for axis in axes.flat:
        axis.set_xlabel("iterations", fontsize=7)
    axes[0, 0].legend(fontsize=5)
    record.text(
        _settings(found, record.quick)
        + " Those validation chains have 100 iterations, and their classes count from the 50th on; "
        "the chains here are longer. `over langevin`: percentage points at the end, mean and "
        "standard error of the differences digit by digit. Of MNIST's digits 9 to 11 % are of each "
        "class: a class more frequent than that at the end shows a wrong law, or chains that are "
        "caught; `total variation at the end` is that of the last states' classes from a tenth "
        "each. Milliseconds are wall time, while the other core was at work, and hold the whole "
        "model and the classifier for every method: Langevin's need of s1 alone does not show."
    )
    record.table("Labels of the denoised states", rows)
    record.table(
        "Validation chains by step: E|s1|^2 / -E tr s2, total variation of the classes",
        [
            {"method": method, "start": f"{result['start']:.2f}"}
            | {f"h {step:g}": f"{ratio:.2f}, {shift:.2f}"
               for step, ratio, shift in zip(found.grid, result["ratios"], result["shifts"],
                                             strict=True)}
            for method, result in found.searches.items()
        ],
    )  # fmt: skip
    key = f"% changed at {marks[-1]}"
    record.compare(
        f"MNIST, labels changed after {marks[-1]} iterations",
        "curves: Ozaki above Langevin",
        "; ".join(f"{row['method']} {row[key]} %" for row in rows),
    )
    record.figure(
        figure,
        "Left: share of chains whose denoised state is not of the class of the start, mean over "
        "the digits (band: their quartiles). Right: how often the label of a chain has changed.",
    )
    record.close("Figure 8: label changes of MNIST chains")


def _commonest(runs: Sequence[dict[str, Any]]) -> str:
    """The most frequent class of the last states from all starts."""
    counts = np.sum([run["classes"] for run in runs], axis=0)
    return f"{counts.argmax()}: {100 * counts.max() / counts.sum():.0f} %"


def _shift(runs: Sequence[dict[str, Any]]) -> float:
    """Total variation of the last states' classes from equal shares."""
    counts = np.sum([run["classes"] for run in runs], axis=0)
    return float(abs(counts / counts.sum() - 1 / len(counts)).sum() / 2)


def _cost(runs: Sequence[dict[str, Any]], size: dict[str, Any]) -> float:
    """Milliseconds of a step of one chain, network and classifier included."""
    seconds = np.mean([run["seconds"] for run in runs])
    return float(1e3 * seconds / size["chains"] / size["iterations"])


ITEMS = {"fig7": fig7, "fig8": fig8}
