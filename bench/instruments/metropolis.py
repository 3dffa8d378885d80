"""Metropolis from scores alone: bias, acceptance and efficiency of the rules for the line integral.

On a line everything is computed, nothing is drawn: the kernel of the chain on a grid gives its
stationary law (total variation from the target) and the variance of ergodic means (effective draws
of the worst of x and x^2). Targets: two mixtures, and the law of a score network that learned the
second one. A network's score in one dimension has a log density, by quadrature. On digits a network
has none that is known: there the rules are compared with 32 nodes, along its own MALA steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hos_ext import MLP
from hos_ext.densities import GaussianMixture
from hos_ext.losses import score_matching_loss
from hos_ext.sampling import (
    BoundWarning,
    SmoothBound,
    SupportBound,
    TwoCoin,
    make_step,
    sample,
    step_size_column,
)
from hos_ext.sampling.methods import Point, Quadrature, log_ratio, make_rule
from hos_ext.sampling.methods.base import Target
from hos_ext.scores import DenseScores

F64 = torch.float64
SETTINGS = {"seeds": [0], "grid": 160, "max_tosses": 16}
Score = Callable[[Tensor], Tensor]


class Legendre:
    """The rule of Gauss and Legendre: n nodes between the ends, which it does not use."""

    def __init__(self, n: int):
        nodes, weights = np.polynomial.legendre.leggauss(n)
        self.nodes, self.name = n, f"legendre-{n}"
        self._rule = list(zip((1 + nodes) / 2, weights / 2, strict=True))

    def inside(self, target: Target, here: Point, there: Tensor) -> Tensor:
        dx = there - here.x
        parts = [w * (target.score(here.x + t * dx) * dx).flatten(1).sum(1) for t, w in self._rule]
        return torch.stack(parts).sum(0)

    def difference(self, inside: Tensor, here: Point, there: Point) -> Tensor:
        return inside


def rules(quick: bool) -> list[tuple[str, bool, Any]]:
    """Name, whether s2 is there, and the rule."""
    found = [("trapezoid", s2, make_rule("bench", "trapezoid")) for s2 in (False, True)]
    found += [("simpson", s2, make_rule("bench", "simpson")) for s2 in (False, True)]
    for n in (2,) if quick else (2, 3, 4):
        found.append((f"lobatto-{n}", False, make_rule("bench", f"lobatto-{n}")))
    found.append(("lobatto-2", True, make_rule("bench", "lobatto-2")))
    for n in (1, 2) if quick else (1, 2, 3, 4):
        found.append((f"legendre-{n}", False, Legendre(n)))
    return found


# ---------------------------------------------------------------------------------------- on a line


class Line:
    """A density on a grid, with s1 and s2 anywhere on the line.

    Args:
        score: s1 of x (n, 1).
        slope: s2 of x (n, 1), as (n, 1).
        reach: the grid is -reach ... reach.
        bound: for `TwoCoin`.
    """

    def __init__(self, score: Score, slope: Score, reach: float, bound: Any, size: int):
        self.score, self.slope, self.bound = score, slope, bound
        self.x = torch.linspace(-reach, reach, size, dtype=F64).unsqueeze(1)
        self.cell = float(self.x[1, 0] - self.x[0, 0])
        start = self.x[:-1]
        log_p = Legendre(16).inside(Target(make_step("mala"), score), Point(start, 0), self.x[1:])
        self.log_p = torch.cat([torch.zeros(1, dtype=F64), log_p.cumsum(0)])
        self.p = self.log_p.softmax(0)

    def pairs(self, h: float, with_hessian: bool) -> tuple[Point, Point, Tensor, Tensor]:
        """Both ends of all segments, the log ratio of the proposals, and the proposals (n, n)."""
        n = len(self.x)
        x, y = self.x.repeat_interleave(n, 0), self.x.repeat(n, 1)
        here, there = (self._point(each, with_hessian) for each in (x, y))
        step = make_step("langevin")
        column = step_size_column(h, x)
        forward, backward = (step.law(point, column) for point in (here, there))
        proposals = backward.log_density(x) - forward.log_density(y)
        density = (forward.log_density(y) - math.log(2 * math.pi) / 2).exp()
        return here, there, proposals, density.view(n, n) * self.cell

    def _point(self, x: Tensor, with_hessian: bool) -> Point:
        s1 = self.score(x)
        return Point(x, DenseScores(s1, self.slope(x).unsqueeze(-1)) if with_hessian else s1)

    def exact(self) -> Tensor:
        """log p(y) - log p(x) for all pairs."""
        return (self.log_p.unsqueeze(0) - self.log_p.unsqueeze(1)).flatten()


def law_of(line: Line, move: Tensor) -> dict[str, float]:
    """The stationary law of a kernel of moves (n, n), and what it does to x and x^2."""
    n = len(line.x)
    kernel = move + (1 - move.sum(1)).diag()
    ones = torch.ones(n, n, dtype=F64)
    law = torch.linalg.solve((torch.eye(n, dtype=F64) - kernel + ones).T, ones[0])
    inverse = torch.eye(n, dtype=F64) - kernel + law.unsqueeze(0)
    rates = []
    for f in (line.x[:, 0], line.x[:, 0].square()):
        f = f - law @ f
        variance = law @ f.square()
        asymptotic = 2 * (law @ (f * torch.linalg.solve(inverse, f))) - variance
        rates.append(float(variance / asymptotic))
    return {
        "bias": float((law - line.p).abs().sum() / 2),
        "ess_a_step": min(rates),
        "acceptance": float(law @ move.sum(1)),
    }


def coins(line: Line, h: float, rule: TwoCoin) -> dict[str, Any]:
    """The kernel of `TwoCoin`, by its closed form, with its mean evaluations a step."""
    here, there, proposals, density = line.pairs(h, False)
    n = rule.max_tosses
    target = Target(make_step("mala"), line.score)
    dx = (there.x - here.x) / (rule.nodes + 1)
    f, c = rule._pieces(target, here, there, dx)
    broken = ((f[:, :-1] + f[:, 1:]) / 2).sum(1)
    log_odds, remainder, mass = proposals + broken, line.exact() - broken, c.sum(1) / 6
    first, second = (-(mass - s * remainder) / 2 for s in (1, -1))  # log p1, log p2
    weight = log_odds.sigmoid()
    heads = weight * first.exp() + (1 - weight) * second.exp()
    decided = 1 - (1 - heads) ** n
    wide = mass > 2 * math.log(n)
    accept = torch.where(wide, 0.0, weight * first.exp() / heads * decided)
    # An event is kept with probability -log p / M, so a toss ends after that many on average.
    points = [(1 - each.exp()) * mass / (-each).clamp_min(1e-300) for each in (first, second)]
    a_toss = weight * points[0] + (1 - weight) * points[1]
    spent = torch.where(wide, 0.0, a_toss * decided / heads)
    size = density.shape
    found: dict[str, Any] = law_of(line, density * accept.view(size))
    found["evaluations"] = 1 + rule.nodes + float(line.p @ (density * spent.view(size)).sum(1))
    found["undecided"] = float(
        line.p @ (density * torch.where(wide, 1.0, 1 - decided).view(size)).sum(1)
    )
    return found


def on_a_line(line: Line, steps: list[float], quick: bool) -> list[dict[str, Any]]:
    """All rules at all step sizes."""
    rows = []

    def add(name: str, with_hessian: bool, h: float, found: dict[str, Any]) -> None:
        found["ess_an_evaluation"] = found["ess_a_step"] / found["evaluations"]
        row = {"rule": name, "s2": with_hessian, "step_size": h, **found}
        rows.append({k: float(f"{v:.4g}") if type(v) is float else v for k, v in row.items()})

    for h in steps:
        for name, with_hessian, rule in rules(quick):
            here, there, proposals, density = line.pairs(h, with_hessian)
            target = Target(make_step("mala"), line.score)
            inside = rule.inside(target, here, there.x)
            ratio = proposals + rule.difference(inside, here, there)
            accept = ratio.clamp_max(0).exp().view(density.shape)
            found = law_of(line, density * accept) | {"evaluations": 1.0 + rule.nodes}
            add(name, with_hessian, h, found)
        plain = density / density.sum(1, keepdim=True)
        add("unadjusted", False, h, law_of(line, plain) | {"evaluations": 1.0})
        accept = (proposals + line.exact()).clamp_max(0).exp().view(density.shape)
        add("log_prob", False, h, law_of(line, density * accept) | {"evaluations": 1.0})
        for nodes in (0, 1) if quick else (0, 1, 2, 4):
            rule = TwoCoin(line.bound, nodes=nodes, max_tosses=int(SETTINGS["max_tosses"]))
            add(f"two_coin, nodes {nodes}", False, h, coins(line, h, rule))
    return rows


def noisy_points(points: list[float], sigma: float) -> GaussianMixture:
    """Clean data at these points, with noise."""
    means = torch.tensor(points, dtype=F64).unsqueeze(1)
    weights = torch.linspace(1, 2, len(points), dtype=F64)
    covariances = torch.full((len(points), 1, 1), sigma**2, dtype=F64)
    return GaussianMixture(weights / weights.sum(), means, covariances)


def line_of(law: GaussianMixture, points: list[float], sigma: float, size: int) -> Line:
    """A mixture, whose bound follows from the range of its clean points."""
    bound = SupportBound(sigma, low=min(points), high=max(points))
    reach = max(map(abs, points)) + 5 * sigma
    return Line(law.score, lambda x: law.hessian(x)[:, :, 0], reach, bound, size)


def learned_line(law: GaussianMixture, reach: float, quick: bool, size: int) -> Line:
    """The law of a network that learned the score of a mixture, with bounds read off it."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
        torch.nn.Linear(64, 1),
    ).double()  # fmt: skip
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    steps = 150 if quick else 600
    for number in range(steps):
        x = law.sample(256, seed=number)
        # Explicit score matching: the mixture's own score is the target.
        loss = (net(x) - x - law.score(x)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - number / steps)

    def score(x: Tensor) -> Tensor:
        with torch.no_grad():
            return net(x) - x

    def slope(x: Tensor) -> Tensor:
        return (score(x + 1e-4) - score(x - 1e-4)) / 2e-4

    fine = torch.linspace(-reach, reach, 20_001, dtype=F64).unsqueeze(1)
    values = slope(fine)
    bends = (values[2:] - values[:-2]) / (fine[2:] - fine[:-2])
    bound = SmoothBound(
        third=1.05 * float(bends.abs().max()), width=1.05 * float(values.max() - values.min())
    )
    return Line(score, slope, reach, bound, size)


# --------------------------------------------------------------------------------------- dimensions


def in_dimensions(dim: int, quick: bool) -> dict[str, Any]:
    """Chains of a mixture in a box: the error of its second moments, and the cost."""
    sigma, low, high = 0.7, -1.0, 1.0
    corners = torch.ones(3, dim, dtype=F64)
    corners[1, ::2] = -1.0
    corners[2, 1::3] = -1.0
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    eye = torch.eye(dim, dtype=F64)
    law = GaussianMixture(weights, corners, (sigma**2 * eye).expand(3, -1, -1))
    n, steps = (400, 6) if quick else (1500, 20)
    init = law.sample(n, seed=0)
    second = (weights.unsqueeze(1) * corners.square()).sum(0) + sigma**2
    cases: dict[str, dict[str, Any]] = {
        "trapezoid": {},
        "simpson": {"rule": "simpson"},
        "lobatto-2": {"rule": "lobatto-2"},
        **{
            f"two_coin, nodes {nodes}": {
                "rule": TwoCoin(SupportBound(sigma, low=low, high=high), nodes=nodes)
            }
            for nodes in (0, 1, 4)
        },
        "log_prob": {"log_prob": law.log_prob},
    }
    rows = []
    for h in (0.05,) if quick else (0.05, 0.1):
        for name, case in cases.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", BoundWarning)  # "undecided" says it
                chains = sample(
                    law.score, init, method="mala", step_size=h, n_steps=steps, seed=1, **case
                )
            ends = chains.draws[:, -1]
            terms = (ends.square() - second).mean(1)
            cost = chains.stats["n_score_evaluations"]
            own = chains.stats.get("coin_evaluations", torch.zeros(n)).double().mean() / steps
            jump = (chains.draws[:, 1:] - chains.draws[:, :-1]).square().sum(-1).mean()
            row = {
                "rule": name,
                "step_size": h,
                "second_moment_error": float(terms.mean()),
                "standard_error": float(terms.std() / n**0.5),
                "acceptance": float(chains.stats["acceptance"].mean()),
                "calls_a_step": (cost - 1) / steps,
                "evaluations_a_step": 1 + case["rule"].nodes + float(own)
                if name.startswith("two")
                else (cost - 1) / steps,
                "squared_jump": float(jump),
                "undecided": float(
                    chains.stats.get("undecided", torch.zeros(n)).double().mean() / steps
                ),
            }
            rows.append({k: float(f"{v:.4g}") if type(v) is float else v for k, v in row.items()})
    return {"dim": dim, "chains": n, "steps": steps, "rows": rows}


def on_digits(quick: bool) -> dict[str, Any]:
    """A network on 8 x 8 digits: errors of log p(x') - log p(x) along its own MALA steps."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    clean = torch.as_tensor(load_digits().images, dtype=torch.float32).flatten(1) / 8 - 1
    sigma = 0.4
    sizes: dict[str, Any] = {"width": 192, "head_width": 16, "activation": "silu"}
    model = MLP((64,), 0, sigma_data=float(clean.std()), **sizes)
    steps = 60 if quick else 800
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for number in range(steps):
        rows = torch.randint(len(clean), (96,))
        loss = score_matching_loss(model, clean[rows], sigma, diagonal=True, seed=number)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 - number / steps)

    def scores(x: Tensor) -> Any:
        with torch.no_grad():
            return model(x, sigma).unscaled(sigma)

    noisy = clean + sigma * torch.randn(len(clean), 64)
    x = noisy[: 100 if quick else 1000]
    rows_: list[dict[str, Any]] = []
    for relative in (0.1, 0.3):
        h = relative * sigma**2
        target = Target(make_step("mala"), lambda x: scores(x).score)
        here = target(x)
        step = make_step("langevin")
        column = step_size_column(h, x)
        forward = step.law(here, column)
        there = target(forward.draw(torch.randn(x.shape)))
        backward = step.law(there, column)
        exact = Legendre(32).inside(target, here, there.x).double()
        proposals = log_ratio(
            forward, backward, here._replace(log_prob=exact * 0),
            there._replace(log_prob=exact * 0),
        )  # fmt: skip
        accept = (proposals + exact).clamp_max(0).exp()
        for name in (
            "trapezoid",
            "simpson",
            "lobatto-2",
            "lobatto-3",
            *("legendre-1", "legendre-2"),
        ):
            n = int(name[-1]) if name[-1].isdigit() else 0
            rule: Any = Legendre(n) if name.startswith("leg") else make_rule("bench", name)
            assert isinstance(rule, (Legendre, Quadrature))
            got = rule.difference(rule.inside(target, here, there.x), here, there).double()
            off = (proposals + got).clamp_max(0).exp() - accept
            rows_.append(
                {
                    "rule": name,
                    "step_size": h,
                    "evaluations": 1 + rule.nodes,
                    "rms_error": float(f"{float((got - exact).square().mean().sqrt()):.4g}"),
                    "mean_change_of_acceptance": float(f"{float(off.abs().mean()):.4g}"),
                    "acceptance": float(f"{float(accept.mean()):.4g}"),
                }
            )
    return {"sigma": sigma, "rows": rows_, "two_coin": pilot(scores, x, sigma, quick)}


def pilot(scores: Any, x: Tensor, sigma: float, quick: bool) -> list[dict[str, Any]]:
    """A bound for the network from a short run, and what a longer one makes of it."""
    found, third = [], 0.3
    h, n = 0.1 * sigma**2, 20 if quick else 100
    ways = (("pilot", x[:50], 5, 0), ("run", x[50 : 50 + n], n, 0), ("run", x[50 : 50 + n], n, 1))
    for name, start, steps, nodes in ways:
        rule = TwoCoin(SmoothBound(third=third), nodes=nodes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BoundWarning)
            chains = sample(
                lambda x: scores(x).score, start, method="mala", step_size=h, n_steps=steps, seed=0,
                rule=rule,
            )  # fmt: skip
        s = chains.stats
        points = int(s["coin_evaluations"].sum())
        used = float(s["bound_used"].max())
        found.append(
            {
                "run": name,
                "nodes": nodes,
                "third": float(f"{third:.4g}"),
                "bound_used": float(f"{used:.4g}"),
                "points": points,
                "exceeded": int(s["bound_exceeded"].sum()),
                "points_a_step": float(f"{points / (steps * len(start)):.4g}"),
                "calls_a_step": float(f"{(s['n_score_evaluations'] - 1) / steps:.4g}"),
                "undecided": float(f"{float(s['undecided'].double().mean()) / steps:.4g}"),
                "acceptance": float(f"{float(s['acceptance'].mean()):.4g}"),
            }
        )
        if name == "pilot":
            third *= 2 * used
    return found


def run(quick: bool) -> dict[str, Any]:
    """All rows, as plain numbers.

    Args:
        quick: smaller grids, fewer rules, steps and training.
    """
    size = 150 if quick else int(SETTINGS["grid"])
    two, three = [-1.0, 1.0], [-1.5, 0.0, 1.0]
    wide, narrow = noisy_points(two, 0.6), noisy_points(three, 0.4)
    lines = {
        "two points, sigma 0.6": line_of(wide, two, 0.6, size),
        "three points, sigma 0.4": line_of(narrow, three, 0.4, size),
        "network that learned the latter": learned_line(narrow, 3.5, quick, size),
    }
    steps = [0.1] if quick else [0.1, 0.2, 0.4]
    return {
        "settings": SETTINGS | {"quick": quick},
        "line": {name: on_a_line(line, steps, quick) for name, line in lines.items()},
        "dimensions": [in_dimensions(dim, quick) for dim in ((2,) if quick else (8,))],
        "digits": on_digits(quick),
    }
