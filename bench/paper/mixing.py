"""Table 3 and Figures 5, 6 and 11: how fast chains mix, Langevin against the Ozaki family.

The target is the law of noisy samples at sigma 0.1, by its exact scores or by learned ones. Steps
are h, as in MALA: drift h s1, noise sqrt(2 h) z; the paper's eps is 2 h. Its Eq. 20 can be read
with exponents (eps / 2, eps), then the same printed eps is the same time for both methods, or with
(eps, 2 eps), then it is twice the time for Ozaki: Figure 6 shows both.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import libraries
from hos_ext import UnscaledScores, sample
from hos_ext.densities.gaussian import GaussianMixture
from hos_ext.sampling import Chains, ess_rate, method_names, min_ess, mode_jumps
from hos_ext.scores import DenseScores

from . import networks, sets
from .figures import energy_distance
from .record import BLUE, GREEN, GREY, ORANGE, Record, legend, mean_std, panels, plus_minus

SIGMA = 0.1
SEEDS = (0, 1, 2)
STEP_SIZES = tuple(round(0.004 * 1.6**k, 6) for k in range(16))
# Positive curvature is clamped to zero unless a second word says what becomes of it: "raw" leaves
# it, which is Eq. 20 as it stands, "abs" turns it round. `ozaki_lanczos` and `ozaki_isotropic` are
# not here: in the plane a Krylov space of two vectors is everything, and so is one direction beside
# a multiple of the identity, so that they give the chains of `ozaki_full`.
METHODS = (
    *("langevin", "ozaki", "ozaki_full", "ozaki_cayley"),
    *("ozaki raw", "ozaki_full raw", "ozaki_full abs"),
    *("mala", "mh_ozaki", "mh_ozaki_full", "mh_ozaki_cayley"),
)
# How far the law is off: 4,000 chains that begin at draws of the target, after 200 steps, against
# 20,000 draws of it, in both coordinates, their sum and difference, and the distance from the
# origin (a coordinate does not tell how wide the crescent is). With no bias at all the Kolmogorov
# distance of each exceeds TOLERANCE once in a thousand times. Ranks do not see rare states far out,
# which an Ozaki step of positive curvature may throw there: E|x|^2 must be right to SPREAD too.
_CHAINS, _STEPS, _DRAWS = 4_000, 200, 20_000
TOLERANCE = 1.95 * (1 / _CHAINS + 1 / _DRAWS) ** 0.5
SPREAD = 0.05
_LEARNING = 6_000
_SHOWN = 400  # states of a path in the figures
_EXACT, _SEARCH = 2**41, 2**42  # keys of the exact draws and of the search for a step size

# Printed in the paper: smallest ESS over the dimensions; chain lengths and steps are lost.
PAPER = {"two modes": (21.81, 28.89), "crescent": (26.33, 46.57)}


# ------------------------------------------------------------------------------------------ scores


def _noisy(name: str) -> GaussianMixture:
    return sets.plane(name).noisy(SIGMA)


@lru_cache(maxsize=8)
def learned(name: str, seed: int, steps: int) -> networks.Net:
    """s1 and the whole s2 (rank 2) of a set at SIGMA, the average of the weights."""
    shape: dict[str, Any] = {"head_width": 64, "linear": True, "seed": seed}
    options: dict[str, Any] = {"steps": steps, "seed": seed, "diagonal": False, **networks.BEST}

    def fit(untrained: networks.Net) -> networks.Net:
        return networks.train_net(untrained, sets.plane(name), SIGMA, **options)

    net = networks.Net(2, 2, **shape)
    return networks.remembered(f"{name} {SIGMA} {seed}", shape | options, net, fit)


def score_function(name: str, scores: str, method: str, seed: int, steps: int) -> Any:
    """What `sample` asks for: no more of s2 than the method uses."""
    proposal = method.split()[0].removeprefix("mh_").replace("mala", "langevin")
    if scores == "exact":
        law = _noisy(name)
        if proposal == "langevin":
            return law.score
        if proposal == "ozaki":
            return lambda x: UnscaledScores(law.score(x), law.hessian_diag(x))
        return lambda x: DenseScores(law.score(x), law.hessian(x))
    net = learned(name, seed, steps)
    return net.score if proposal == "langevin" else net


# ------------------------------------------------------------------------------------------ chains


def _options(name: str, scores: str, method: str) -> dict[str, Any]:
    """The arguments of `sample` that a method stands for."""
    kind, _, curvature = method.partition(" ")
    options: dict[str, Any] = {"method": kind, "curvature": curvature or "clamp"}
    if kind in method_names(adjusted=True) and scores == "exact":
        options["log_prob"] = _noisy(name).log_prob
    return options


def _start(name: str, scores: str, chains: int, seed: int) -> Tensor:
    start = _noisy(name).sample(chains, seed=_EXACT + seed)
    return start if scores == "exact" else start.float()


def _run(
    name: str,
    scores: str,
    method: str,
    step_size: float,
    seed: int,
    chains: int,
    n: int,
    steps: int,
    key: int = 0,
) -> tuple[Chains, float]:
    """Chains that begin at draws of their target, and the seconds of the processor they took.

    Args:
        seed: of the learned scores, and with `key` of the starts and the noise.
    """
    score_fn = score_function(name, scores, method, seed, steps)
    start, options = _start(name, scores, chains, key + seed), _options(name, scores, method)
    began = time.process_time()
    found = sample(
        score_fn, start, step_size=step_size, n_steps=n, burn_in=n // 5, seed=key + seed, **options
    )
    return found, time.process_time() - began


def _bias(
    name: str,
    scores: str,
    method: str,
    step_size: float,
    seed: int,
    chains: int,
    n: int,
    steps: int,
) -> dict[str, float]:
    """Largest Kolmogorov distance, error of E|x|^2, energy distance, after many short chains."""
    many, few = (_CHAINS, _STEPS) if chains * n >= _CHAINS else (chains, n)
    ends = sample(
        score_function(name, scores, method, seed, steps),
        _start(name, scores, many, 100 + seed),
        step_size=step_size,
        n_steps=few,
        thin=few,
        seed=seed,
        **_options(name, scores, method),
    ).draws[:, 0]
    ends = ends[ends.isfinite().all(1)].double()
    if len(ends) < many:
        return {}
    law = _noisy(name)
    exact = law.sample(_DRAWS, seed=_EXACT + 1000 + seed)
    squares = law.means.square().sum(1) + law.covariances.diagonal(dim1=1, dim2=2).sum(1)
    return {
        "kolmogorov": furthest(ends, exact),
        "spread": float(ends.square().sum(1).mean() / (law.weights * squares).sum()) - 1,
        "energy": energy_distance(ends[:2000], exact[:2000]),
    }


def _quality(name: str, draws: Tensor, stats: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Smallest ESS of a chain by two rules, ESS per second, and mode changes."""
    count = len(draws)
    found: dict[str, Any] = {"diverged": int(stats["diverged"].sum())}
    if found["diverged"]:
        return found
    accepted = stats.get("acceptance")
    found |= {
        "cutoff": min_ess(draws, kind="cutoff") / count,
        "bulk": min_ess(draws) / count,
        "cutoff per second": ess_rate(draws, seconds, kind="cutoff"),
        "bulk per second": ess_rate(draws, seconds),
        "seconds": seconds,
        "acceptance": None if accepted is None else float(accepted.mean()),
    }
    if name == "two modes":
        jumps = mode_jumps(draws, sets.plane(name).means.to(draws))
        found["jumps"] = float(jumps.double().mean())
    return found


def furthest(a: Tensor, b: Tensor) -> float:
    """The largest Kolmogorov distance of what is looked at in two samples of the plane."""

    def views(points: Tensor) -> Tensor:
        x, y = points.mT
        return torch.stack([x, y, x + y, x - y, points.norm(dim=1)])

    return max(kolmogorov(p, q) for p, q in zip(views(a), views(b), strict=True))


def kolmogorov(a: Tensor, b: Tensor) -> float:
    """Largest distance of two empirical distribution functions."""
    a, b = a.sort().values.contiguous(), b.sort().values.contiguous()
    at = torch.cat([a, b])
    gap = torch.searchsorted(a, at, right=True) / len(a)
    return float((gap - torch.searchsorted(b, at, right=True) / len(b)).abs().max())


def _near(bias: Mapping[str, float]) -> bool:
    return bool(bias) and bias["kolmogorov"] <= TOLERANCE and abs(bias["spread"]) <= SPREAD


def mix(
    name: str, scores: str, method: str, seed: int, chains: int, n: int, steps: int,
    step_sizes: Sequence[float],
) -> dict[str, Any]:  # fmt: skip
    """The step sizes of largest ESS per score evaluation, found with one seed, run with another.

    Returns:
        "cutoff", "bulk": the rates by step size, 0 where a chain diverged. "paper": at the largest
        one by the paper's rule, whatever its law. "close": at the largest one by bulk ESS whose law
        is within TOLERANCE and SPREAD; None if none is.
    """
    rates: dict[str, list[float]] = {"cutoff": [], "bulk": []}
    for h in step_sizes:
        run, _ = _run(name, scores, method, h, seed, chains, n, steps, key=_SEARCH)
        cost = run.stats["n_score_evaluations"] * chains
        for rule, known in rates.items():
            size = 0.0 if run.stats["diverged"].any() else min_ess(run.draws, kind=rule)
            known.append(0.0 if math.isnan(size) else size / cost)

    @cache
    def bias(h: float) -> dict[str, float]:
        return _bias(name, scores, method, h, seed, chains, n, steps)

    @cache
    def quality(h: float) -> dict[str, Any]:
        run, seconds = _run(name, scores, method, h, seed, chains, n, steps)
        return {**_quality(name, run.draws, run.stats, seconds), "step_size": h, **bias(h)}

    found: dict[str, Any] = {**rates, "paper": None, "close": None}
    for rule, choice in (("cutoff", "paper"), ("bulk", "close")):
        order = sorted(range(len(step_sizes)), key=rates[rule].__getitem__, reverse=True)
        for h in (step_sizes[k] for k in order if rates[rule][k] > 0):
            if choice == "paper" or (_near(bias(h)) and not quality(h)["diverged"]):
                found[choice] = quality(h)
                break
    return found


def settle(
    name: str, scores: str, method: str, step_size: float, seed: int, chains: int, n: int,
    steps: int,
) -> dict[str, Any]:  # fmt: skip
    """The quality of long chains at a step that `mix` found."""
    found, seconds = _run(name, scores, method, step_size, seed, chains, n, steps)
    return _quality(name, found.draws, found.stats, seconds)


def trace(
    name: str, scores: str, method: str, step_size: float, seed: int, chains: int, n: int,
    steps: int,
) -> dict[str, Any]:  # fmt: skip
    """The first chain, the smallest ESS of a chain by iterations, and the quality of all."""
    case = (name, scores, method, step_size, seed, chains, n, steps)
    found, seconds = _run(*case)
    parts = [max(4, n * k // 8) for k in range(1, 9)]
    return {
        "path": [[round(v, 3) for v in point] for point in found.draws[0, :_SHOWN].tolist()],
        "iterations": parts,
        "ess": [min_ess(found.draws[:, :k]) / len(found.draws) for k in parts],
        **_quality(name, found.draws, found.stats, seconds),
        **_bias(*case),
    }


def peer(
    name: str, package: str, method: str, seed: int, step_size: float, chains: int, n: int
) -> dict[str, Any]:
    """Chains of another package on the exact density, at a step found for our method.

    Returns:
        The quality; or only "missing", why there is none.
    """
    law = _noisy(name)
    try:
        draws, facts = libraries.mixture_chains(
            package, method, law.weights, law.means, law.covariances,
            _start(name, "exact", chains, seed), step_size=step_size, n_steps=n // 5 + n, seed=seed,
        )  # fmt: skip
    except libraries.NotMeasured as reason:
        return {"missing": str(reason)}
    kept = draws[:, n // 5 :]
    lost = int((~draws[:, -1].isfinite().all(1)).sum())
    stats: dict[str, Any] = {"diverged": torch.tensor([lost])}
    if "acceptance" in facts:
        stats["acceptance"] = torch.tensor([facts["acceptance"]])
    quality = _quality(name, kept, stats, facts["seconds"])
    if lost:
        return quality
    exact = law.sample(_DRAWS, seed=_EXACT + 1000 + seed)
    ends = kept[:, -1].double()
    return quality | {"kolmogorov": furthest(ends, exact)}


# ------------------------------------------------------------------------------------------- items


def _sizes(quick: bool) -> dict[str, Any]:
    if quick:
        return {"chains": 4, "n": 8, "steps": 5}
    return {"chains": 100, "n": 1000, "steps": _LEARNING}


def _long(quick: bool) -> int:
    """Steps of the chains that are shown.

    A chain that stands still at a draw of the target has an ESS of 1, and Langevin on the crescent
    forgets in hundreds of steps: after 1,000 every ratio is drawn towards 1.
    """
    return 16 if quick else 10_000


def _cases(quick: bool) -> list[tuple[str, str]]:
    """Sets and scores."""
    if quick:
        return [(sets.PLANE[0], "learned"), (sets.PLANE[1], "exact")]
    return [(name, scores) for name in sets.PLANE for scores in ("exact", "learned")]


def _work(
    quick: bool, seeds: Sequence[int], cases: Sequence[tuple[str, str]], methods: Sequence[str]
) -> list[dict[str, Any]]:
    """The searches for a step size."""
    step_sizes = (0.05,) if quick else STEP_SIZES
    return [
        {"name": name, "scores": scores, "method": method, "seed": seed, **_sizes(quick)}
        | {"step_sizes": list(step_sizes)}
        for seed in seeds
        for name, scores in cases
        for method in methods
    ]


def _settled(
    record: Record, work: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The two choices of each search, None or a bias with the quality of long chains."""
    places = [
        (k, choice)
        for k, result in enumerate(results)
        for choice in _CHOICES
        if result[choice] is not None
    ]
    runs = [
        {key: work[k][key] for key in ("name", "scores", "method", "seed", "chains", "steps")}
        | {"step_size": results[k][choice]["step_size"], "n": _long(record.quick)}
        for k, choice in places
    ]
    own = {json.dumps(run): run for run in runs}  # where both choices are one step
    qualities = dict(zip(own, record.cells(list(own.values()), settle), strict=True))
    found: list[dict[str, Any]] = [dict.fromkeys(_CHOICES) for _ in work]
    for (k, choice), run in zip(places, runs, strict=True):
        seen = results[k][choice]
        bias = {key: seen.get(key) for key in ("step_size", "kolmogorov", "spread", "energy")}
        found[k][choice] = bias | qualities[json.dumps(run)]
    return found


def table3(record: Record) -> None:
    seeds = (0,) if record.quick else SEEDS
    cases = _cases(record.quick)
    work = _work(record.quick, seeds, cases, METHODS)
    results = _settled(record, work, record.cells(work, mix))
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for settings, result in zip(work, results, strict=True):
        key = (settings["name"], settings["scores"], settings["method"])
        found.setdefault(key, []).append(result)
    size, long = _sizes(record.quick), _long(record.quick)
    record.text(
        "`langevin`; `ozaki` with the diagonal of s2, `ozaki_full` with the whole of it, "
        "`ozaki_cayley` (implicit in s2, no matrix exponential); `mala` and `mh_`: with a "
        "Metropolis test. `ozaki_lanczos` and `ozaki_isotropic` give the chains of `ozaki_full` in "
        "the plane and are left out. raw: positive curvature as it is, abs: its modulus, else "
        "clamped to 0. Adjusted methods have log p with exact scores, and its estimate from the "
        "scores with learned ones, which keeps a law near the target only. Target: noisy samples "
        f"at sigma {SIGMA}.\n\n"
        f"ESS: smallest over the two dimensions, of one chain of {long:,} steps "
        f"({size['chains']} chains side by side, begun at draws of the target), mean ± standard "
        f"deviation over {len(seeds)} seeds, by the lag cut-off and by ranks (bulk, ArviZ). "
        f"Chains of {size['n']:,} steps, as they were at first, are too short: one that stands "
        "still has an ESS of 1, and Langevin's on the crescent had 1.6. The step size h (the "
        "paper's eps is 2 h) is searched with another seed "
        f"and {size['n']:,} steps among {len(STEP_SIZES)} from {STEP_SIZES[0]:g} on, each 1.6 "
        "times the one before: a ratio is known to about a factor 1.6. `The paper's rule`: largest "
        "ESS by the cut-off, whatever the law. `Close to the law`: largest bulk ESS among the "
        "steps at which the coordinates, their sum and difference and the distance from the "
        f"origin of {_CHAINS:,} chains are within a Kolmogorov distance of {TOLERANCE:.3f} of "
        f"exact draws, and E|x|^2 within {SPREAD:.0%} of the truth, {_STEPS} steps after exact "
        "draws (without bias a distance is further off once in a thousand times; with learned "
        "scores a small step has little time to show their error). This second rule was made "
        "after the first results by the paper's had been seen; the sets were fixed before. E of "
        "squared norm: its error, or how many times the truth it is; inf where a chain was lost. "
        "Energy: distance to exact draws. Learned scores: DSM with antithetic noise and the "
        "centred second-order loss, rank 2, a linear map beside the network for s1, "
        f"{_LEARNING:,} steps, averaged weights. Over L: over Langevin in the same table. ESS/s: "
        "of all chains, by seconds of the processor, median over the seeds; the other core was at "
        "work on cells of this table. The paper printed "
        + "; ".join(f"{a} -> {b} ({b / a:.2f}x) for set {i}" for i, (a, b)
                    in enumerate(PAPER.values(), 1))
        + ", Langevin to Ozaki, by the cut-off; its chain length and sets are unknown."
    )  # fmt: skip
    figure, axes = panels(1, 2, 2.6)
    for name, axis in zip(sets.PLANE, axes.flat, strict=True):
        for scores in (scores for case, scores in cases if case == name):
            for choice, words in _CHOICES.items():
                rows = []
                base = [r[choice] for r in found[name, scores, "langevin"]]
                for method in METHODS:
                    chosen = [r[choice] for r in found[name, scores, method]]
                    rows.append(_line(method, chosen, base))
                    record.rows([_full(name, scores, choice, method, chosen)])
                record.table(f"{name}, {scores} scores, {words}", rows)
            colour, shift = (BLUE, -0.15) if scores == "exact" else (ORANGE, 0.15)
            at = np.arange(len(METHODS)) + shift
            for choice, rule, face, label in (
                ("close", "bulk", colour, f"{scores} scores, close to the law"),
                ("paper", "cutoff", "none", f"{scores} scores, the paper's rule"),
            ):
                both = [
                    mean_std(_values(found[name, scores, method], choice, rule))
                    for method in METHODS
                ]
                means, stds = (np.array(part) for part in zip(*both, strict=True))
                axis.errorbar(
                    means, at, xerr=[np.minimum(stds, 0.9 * means), stds], fmt="o", color=colour,
                    markerfacecolor=face, markersize=3.5, linewidth=0.7, label=label,
                )  # fmt: skip
        axis.set_yticks(range(len(METHODS)), METHODS if axis is axes.flat[0] else [])
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.grid(axis="x", linewidth=0.3)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel(f"smallest ESS of {long:,} steps", fontsize=8)
    legend(figure, axes)
    record.figure(
        figure,
        "Smallest ESS, mean and standard deviation. Full: bulk, at the fastest step close to the "
        "law; rings: by the cut-off, at the fastest step by that rule, whatever its law.",
    )
    for name, (theirs, ozaki) in zip(sets.PLANE, PAPER.values(), strict=True):
        for scores in (scores for case, scores in cases if case == name):
            for (choice, words), rule in zip(_CHOICES.items(), ("cutoff", "bulk"), strict=True):
                ratios = {
                    m: _over(found[name, scores, m], found[name, scores, "langevin"], choice, rule)
                    for m in METHODS
                }
                family = [m for m in METHODS if "ozaki" in m and not math.isnan(ratios[m][0])]
                fastest = max(family, key=lambda m: ratios[m][0], default="ozaki")
                free = max((m for m in family if not m.startswith("mh_")),
                           key=lambda m: ratios[m][0], default="ozaki")  # fmt: skip
                shown = dict.fromkeys(("ozaki", free, fastest, "mala"))
                record.compare(
                    f"ESS over Langevin's, {name}, {scores} scores, {words}: diagonal Ozaki; the "
                    "best of the family without and with adjustment; MALA",
                    f"{ozaki / theirs:.2f}x" if choice == "paper" else "",
                    "; ".join(f"{m} {ratios[m][0]:.2f} ± {ratios[m][1]:.2f}x" for m in shown),
                )
    _peers(record, seeds, found)
    record.close("Table 3: mixing")


# Which step: in words.
_CHOICES = {"paper": "the paper's rule", "close": "bulk ESS, close to the law"}
_PACKAGES = (("blackjax", "langevin"), ("blackjax", "mala"), ("torchebm", "langevin"))


def _peers(
    record: Record,
    seeds: Sequence[int],
    found: Mapping[tuple[str, str, str], Sequence[dict[str, Any]]],
) -> None:
    """Other packages at the steps of our methods, exact scores."""
    size = {"chains": _sizes(record.quick)["chains"], "n": _long(record.quick)}
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for package, method in _PACKAGES[:: 2 if record.quick else 1]:  # compilation takes seconds
        work, ours = [], []
        for name, scores, own in found:
            if scores == "exact" and own == method:
                for seed, result in zip(seeds, found[name, scores, own], strict=True):
                    chosen = result["close"] or result["paper"]
                    if chosen is not None and not chosen["diverged"]:
                        step = chosen["step_size"]
                        work.append({"name": name, "package": package, "method": method,
                                     "seed": seed, "step_size": step, **size})  # fmt: skip
                        ours.append(chosen)
        theirs = record.cells(work, peer)
        reasons = [result["missing"] for result in theirs if "missing" in result]
        if reasons:
            missing += dict.fromkeys(reasons)
            continue
        for name in dict.fromkeys(settings["name"] for settings in work):
            places = [i for i, settings in enumerate(work) if settings["name"] == name]
            for label, results in ((package, theirs), ("hos_ext", ours)):
                own_results = [results[i] for i in places]
                if any(r["diverged"] for r in own_results):
                    continue
                line: dict[str, Any] = {"set": name, "method": method, "by": label}
                line["h"] = ", ".join(f"{h:g}" for h in sorted({work[i]["step_size"]
                                                               for i in places}))  # fmt: skip
                for title, key in (("ESS, cut-off", "cutoff"), ("ESS, bulk", "bulk")):
                    line[title] = plus_minus([r[key] for r in own_results])
                rate = statistics.median(r["bulk per second"] for r in own_results)
                line["ESS/s, bulk"] = f"{rate:,.0f}"
                accepted = [r["acceptance"] for r in own_results]
                line["accepted"] = "" if None in accepted else f"{mean_std(accepted)[0]:.2f}"
                rows.append(line)
    record.text(
        "**Peers**: the Langevin chains of other packages on the same exact densities, at our "
        "steps and with as many chains; theirs in float32, compilation left out, ours in float64. "
        "Seconds are of the processor, all threads together."
        + "".join(f" {reason}." for reason in missing)
    )
    if rows:
        record.table("Langevin by other packages", rows)
        record.rows([{"peers": True, **row} for row in rows])


def _values(results: Sequence[dict[str, Any]], choice: str, key: str) -> list[float | None]:
    """By seeds; None where no step was found, or a chain was lost."""
    return [None if r[choice] is None else r[choice].get(key) for r in results]


def _over(
    results: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], choice: str, key: str
) -> tuple[float, float]:
    """The ratio of the means over the seeds, and the standard deviation of those of each seed."""
    mine, theirs = _values(results, choice, key), _values(base, choice, key)
    each = [a / b if a and b else None for a, b in zip(mine, theirs, strict=True)]
    return mean_std(mine)[0] / mean_std(theirs)[0], mean_std(each)[1]


def _line(
    method: str, chosen: Sequence[dict[str, Any] | None], base: Sequence[dict[str, Any] | None]
) -> dict[str, Any]:
    line: dict[str, Any] = {"method": method}
    whole = [c for c in chosen if c is not None and not c["diverged"]]
    if len(whole) < len(chosen):
        missing = sum(c is None for c in chosen)
        lost = len(chosen) - len(whole) - missing
        words = [f"none in {missing} of {len(chosen)} seeds"] * (missing > 0)
        return line | {"h": ", ".join(words + [f"chains lost in {lost}"] * (lost > 0))}

    def over(key: str, average: Callable[[Sequence[float]], float] = statistics.fmean) -> str:
        if any(b is None or b["diverged"] for b in base):
            return ""
        theirs = average([b[key] for b in base if b is not None])
        return f" ({average([c[key] for c in whole]) / theirs:.2f}x)"

    line["h"] = ", ".join(f"{h:g}" for h in sorted({c["step_size"] for c in whole}))
    line["ESS, cut-off (over L)"] = plus_minus([c["cutoff"] for c in whole]) + over("cutoff")
    line["ESS, bulk (over L)"] = plus_minus([c["bulk"] for c in whole]) + over("bulk")
    rate = statistics.median(c["bulk per second"] for c in whole)
    line["ESS/s, bulk (over L)"] = f"{rate:,.0f}{over('bulk per second', statistics.median)}"
    spread, *distances = (
        mean_std([c.get(key) for c in whole])[0] for key in ("spread", "kolmogorov", "energy")
    )
    lost = math.isnan(spread)  # a chain of those that tell the bias diverged
    line["E of squared norm"] = "inf" if lost else _percent(spread)
    for title, distance in zip(("Kolmogorov", "energy"), distances, strict=True):
        line[title] = "" if lost else f"{distance:.3f}" if distance < 10 else f"{distance:.1e}"
    accepted = [c["acceptance"] for c in whole]
    line["accepted"] = "" if None in accepted else f"{mean_std(accepted)[0]:.2f}"
    if "jumps" in whole[0]:
        line["mode changes"] = f"{mean_std([c['jumps'] for c in whole])[0]:.1f}"
    return line


def _percent(share: float) -> str:
    return f"{share:+.1%}" if share < 100 else f"x {share + 1:.1e}"


def _full(
    name: str, scores: str, choice: str, method: str, chosen: Sequence[dict[str, Any] | None]
) -> dict[str, Any]:
    row: dict[str, Any] = {"set": name, "scores": scores, "choice": choice, "method": method}
    whole = [c for c in chosen if c is not None and not c["diverged"]]
    row["seeds"] = len(whole)
    for key in ("step_size", "cutoff", "bulk", "cutoff per second", "bulk per second",
                "kolmogorov", "spread", "energy"):  # fmt: skip
        if whole:
            row[key], row[f"{key} std"] = mean_std([c.get(key) for c in whole])
    return row


def _steps_found(record: Record) -> dict[tuple[str, str], float]:
    """The steps of Table 3 with learned scores, first seed, for (set, method).

    The fastest one within the tolerance; where none is, the fastest.
    """
    cases = [(name, "learned") for name in sets.PLANE]
    work = _work(record.quick, (0,), cases, ("langevin", "ozaki", "ozaki_full"))
    found = record.cells(work, mix, of="table3")
    return {
        (s["name"], s["method"]): (r["close"] or r["paper"])["step_size"]
        for s, r in zip(work, found, strict=True)
    }


def _trajectories(
    record: Record, title: str, caption: str, chosen: Sequence[tuple[str, str, str, float]]
) -> None:
    """Paths over the target's contours, and ESS by iterations.

    Args:
        chosen: (set, title of the column, method, step size); the same columns for both sets.
    """
    long = _long(record.quick)
    work = [
        {"name": name, "scores": "learned", "method": method, "step_size": h, "seed": 0}
        | _sizes(record.quick)
        | {"n": long}
        for name, _, method, h in chosen
    ]
    found = record.cells(work, trace)
    record.text(
        "Learned scores, the first seed of [Table 3](table3.md) alone, where its words are "
        f"explained: smallest ESS of one chain of {long:,} steps. `chains lost`: of "
        f"{work[0]['chains']}."
    )
    per_set = len(chosen) // 2
    figure, axes = panels(2, per_set + 1, 2.1)
    rows = []
    for index, ((name, label, method, h), result) in enumerate(zip(chosen, found, strict=True)):
        line, column = divmod(index, per_set)
        _contours(axes[line, column], _noisy(name))
        earlier = [m for _, _, m, _ in chosen[line * per_set : index]]
        colour = GREY if method in earlier else _COLOURS[method]
        path = np.array(result["path"], dtype=float)
        axes[line, column].plot(*path.T, ".-", color=colour, linewidth=0.3, markersize=1.5)
        axes[line, column].set_title(f"{label}\nh = {h:.3g}", fontsize=7)
        ess = [math.nan if v is None else v for v in result["ess"]]
        axes[line, -1].plot(result["iterations"], ess, color=colour, label=label)
        rows.append(
            {"set": name, "chain": label, "h": f"{h:g}"}
            | {words: result.get(key) for key, words in _QUALITIES.items()}
            | {"chains lost": result["diverged"]}
        )
    for axis in axes[:, -1]:
        axis.set_title("smallest ESS, bulk", fontsize=7)
        axis.set_xlabel("iterations", fontsize=7)
    legend(figure, axes)
    record.table("Chains", rows)
    record.rows(rows)
    record.figure(figure, caption)
    for name in sets.PLANE:
        record.compare(
            f"{name}: bulk ESS (Kolmogorov distance)",
            "pictures only",
            "; ".join(f"{row['chain']} {row['ESS, bulk']:.3g} ({row['Kolmogorov']:.3f})"
                      for row in rows if row["set"] == name and not row["chains lost"]),
        )  # fmt: skip
    record.close(title)


_COLOURS = {"langevin": BLUE, "ozaki": ORANGE, "ozaki_full": GREEN}
_QUALITIES = {
    "cutoff": "ESS, cut-off",
    "bulk": "ESS, bulk",
    "kolmogorov": "Kolmogorov",
    "spread": "error of E of squared norm",
    "energy": "energy",
    "jumps": "mode changes",
}


def _contours(axis: Any, law: GaussianMixture) -> None:
    x, y = torch.meshgrid(
        torch.linspace(-4, 4, 100, dtype=torch.float64),
        torch.linspace(-4, 4, 100, dtype=torch.float64),
        indexing="xy",
    )
    density = law.log_prob(torch.stack([x.flatten(), y.flatten()], -1)).exp().reshape(x.shape)
    axis.contour(x, y, density, levels=5, colors=GREY, linewidths=0.5)
    axis.set_xlim(-4, 4)
    axis.set_ylim(-4, 4)
    axis.set_aspect("equal")


_FASTEST = (
    "Each at the step of its largest bulk ESS close to the law, as in Table 3 (the largest by the "
    "paper's rule, where none is)."
)
_CAPTION = f"The first {_SHOWN} states of a chain over the density; right: smallest ESS."


def fig5(record: Record) -> None:
    best = _steps_found(record)
    chosen = [
        (name, method, method, best[name, method])
        for name in sets.PLANE
        for method in ("langevin", "ozaki", "ozaki_full")
    ]
    title = "Figure 5: chains at their best steps"
    _trajectories(record, title, f"{_CAPTION} {_FASTEST}", chosen)


def fig6(record: Record) -> None:
    best = _steps_found(record)
    chosen = []
    for name in sets.PLANE:
        h = best[name, "langevin"]
        chosen += [
            (name, "langevin", "langevin", h),
            (name, "ozaki, same time", "ozaki", h),
            (name, "ozaki, twice the time", "ozaki", 2 * h),
        ]
    title = "Figure 6: chains at equal steps"
    caption = (
        f"{_CAPTION} Langevin's h for both: the same step in time, and twice it, which is the "
        "same printed eps if Eq. 20 has the exponents eps and 2 eps."
    )
    _trajectories(record, title, caption, chosen)


def fig11(record: Record) -> None:
    best = _steps_found(record)
    chosen = []
    for name in sets.PLANE:
        h = best[name, "ozaki"]
        chosen += [
            (name, "ozaki", "ozaki", h),
            (name, "langevin at Ozaki's h", "langevin", h),
            (name, "langevin at half of it", "langevin", h / 2),
        ]
    title = "Figure 11: Langevin at Ozaki's step"
    _trajectories(record, title, f"{_CAPTION} Ozaki's h, for both.", chosen)


ITEMS = {"table3": table3, "fig5": fig5, "fig6": fig6, "fig11": fig11}
