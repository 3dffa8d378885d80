"""Posteriors of many observations from a network of one, against references and closed forms.

Three simulators from their published definitions: two moons, Gaussian linear and SLCP (whose
observation is four independent points). A small network learns p(theta | a set of observations) at
every noise level. Its draws are told from reference draws by a classifier: `c2st` is the share of
held-out draws that it tells right, 0.5 where it sees no difference. The references of one
observation (for SLCP, of four points) are sbibm's, read as files: install it without what it needs,
or put its wheel on PYTHONPATH. Those of ten observations are exact draws.

Ways: `ordinary`, the network with all observations at once; `composed`; `composed, Jacobian`, with
I + sigma ds1/dx of the network in place of the learned covariance; `summed`, the reverse SDE with
the sum of the scores less n - 1 of the prior's; `summed, annealed`, Langevin steps with that sum.
"""

from __future__ import annotations

import bz2
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from hos_ext import VE, Scores
from hos_ext.diffusion import (
    annealed_langevin,
    box_model,
    composed,
    gaussian_model,
    prior,
    reverse_sde,
    second_order_reverse,
    tweedie_denoise,
)
from hos_ext.losses import score_matching_loss
from hos_ext.scores import Model

Rows = list[dict[str, Any]]


def run(quick: bool = False) -> dict[str, Any]:
    """All tables. A full run takes about ten CPU minutes."""
    settings: dict[str, Any] = {
        "steps": {"two_moons": 10000, "gaussian_linear": 2000, "slcp": 10000},
        "batch": 256,
        "draws": 60 if quick else 1000,
        "n_steps": 4 if quick else 50,
        "observations": 1 if quick else 5,
        "sets": 1 if quick else 2,
        "seed": 0,
        "references": "importance draws" if quick else "sbibm 1.1.0",
    }
    if quick:
        settings["steps"] = dict.fromkeys(settings["steps"], 20)
    rows: Rows = []
    for task in (TwoMoons(), GaussianLinear(), Slcp()):
        rows += of_task(task, settings, quick)
    return {"settings": settings, "exact": exact_error(), "c2st": rows}


def of_task(task: Task, settings: Any, quick: bool) -> Rows:
    """The rows of one simulator, whose network is trained first."""
    network = train(task, settings["steps"][task.name], settings["batch"], settings["seed"])
    rows = of_references(task, network, settings, quick)
    return rows + of_ten(task, network, settings) if task.points == 1 else rows


# -------------------------------------------------------------------------------------- simulators


@dataclass
class Task:
    """A simulator: `points` independent observations of `width` numbers make what sbibm calls one.

    Attributes:
        dim: parameters.
        std: of the prior, in each of them.
        sigma_min: the last noise level.
        linear: the network gets a part that is linear in theta and y, with gains of sigma alone.
        waves: of theta and y that the network sees besides, each damped as the noise damps it.
    """

    name: str
    dim: int
    width: int
    points: int
    std: float
    sigma_min: float
    linear: bool = False
    waves: int = 0

    def schedule(self) -> VE:
        return VE(self.sigma_min, 20 * self.std)

    def parameters(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws of the prior, here a box. (n, dim)."""
        reach = self.std * math.sqrt(3)
        return reach * (2 * torch.rand(n, self.dim, generator=generator) - 1)

    def free(self) -> Model:
        """The prior's noisy law."""
        reach = torch.full((self.dim,), self.std * math.sqrt(3))
        return box_model(-reach, reach, self.schedule())

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """One observation of each. (n, width)."""
        raise NotImplementedError

    def log_likelihood(self, theta: Tensor, y: Tensor) -> Tensor:
        """Of all observations y (k, width), at each theta (n, dim)."""
        raise NotImplementedError

    def reference(self, y: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draws given all of y, by weighting draws of the prior."""
        theta = self.parameters(100_000, generator)
        weights = self.log_likelihood(theta, y).softmax(0)
        return theta[torch.multinomial(weights, n, replacement=True, generator=generator)]


class TwoMoons(Task):
    """A crescent about (-|a + b|, b - a) / sqrt(2): theta = (a, b) and -(b, a) look alike."""

    cells = 1200  # of the grid, in each direction

    def __init__(self) -> None:
        super().__init__("two_moons", 2, 2, 1, 1 / math.sqrt(3), 0.002, waves=96)

    def _shift(self, theta: Tensor) -> Tensor:
        a, b = theta.unbind(-1)
        return torch.stack([-(a + b).abs(), b - a], -1) / math.sqrt(2)

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        angle = math.pi * (torch.rand(len(theta), generator=generator) - 0.5)
        radius = 0.1 + 0.01 * torch.randn(len(theta), generator=generator)
        crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
        return crescent + self._shift(theta)

    def log_likelihood(self, theta: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(len(theta))
        for row in y:
            at = row - self._shift(theta) - torch.tensor([0.25, 0.0])
            radius = at.norm(dim=-1)
            log = -(((radius - 0.1) / 0.01).square()) / 2 - radius.log()
            total += log.where(at[:, 0] > 0, -math.inf)
        return total

    def reference(self, y: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """From the cells of a grid, and uniform in each."""
        cells, low, size = self.cells, -1.0, 2.0
        edge = (torch.arange(cells) + 0.5) / cells
        unit = torch.cartesian_prod(edge, edge)
        log = self.log_likelihood(low + size * unit, y)
        picked = torch.multinomial(log.softmax(0), n, replacement=True, generator=generator)
        jitter = (torch.rand(n, 2, generator=generator) - 0.5) / cells
        return low + size * (unit[picked] + jitter)


class GaussianLinear(Task):
    """y = theta + noise, both of variance 0.1, ten entries."""

    def __init__(self) -> None:
        super().__init__("gaussian_linear", 10, 10, 1, math.sqrt(0.1), 0.01, linear=True)

    def parameters(self, n: int, generator: torch.Generator) -> Tensor:
        return self.std * torch.randn(n, self.dim, generator=generator)

    def free(self) -> Model:
        variance = torch.full((self.dim,), self.std**2)
        return gaussian_model(torch.zeros(self.dim), variance, self.schedule())

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        return theta + self.std * torch.randn(theta.shape, generator=generator)

    def reference(self, y: Tensor, n: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(n, self.dim, generator=generator)
        return y.sum(0) / (len(y) + 1) + noise * self.std / math.sqrt(len(y) + 1)


class Slcp(Task):
    """Four points of a normal law in the plane, whose five parameters enter by squares."""

    def __init__(self) -> None:
        super().__init__("slcp", 5, 2, 4, math.sqrt(3), 0.01)

    def _law(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return theta[:, :2], theta[:, 2:4].square(), theta[:, 4].tanh()

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        mean, std, rho = self._law(theta)
        z = torch.randn(len(theta), 2, generator=generator)
        second = rho * z[:, 0] + (1 - rho.square()).sqrt() * z[:, 1]
        return mean + std * torch.stack([z[:, 0], second], -1)

    def log_likelihood(self, theta: Tensor, y: Tensor) -> Tensor:
        mean, std, rho = self._law(theta)
        total = torch.zeros(len(theta))
        for row in y:
            a, b = ((row - mean) / std).unbind(-1)
            rest = 1 - rho.square()
            total -= (a.square() - 2 * rho * a * b + b.square()) / rest / 2
            total -= std.log().sum(-1) + rest.log() / 2
        return total.nan_to_num(nan=-math.inf)  # a standard deviation of 0


# --------------------------------------------------------------------------------------- network


def stack(inputs: int, width: int, outputs: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.SiLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class SetNetwork(nn.Module):
    """Scores of theta given a set of observations y (B, n, width); one network for every n <= 4."""

    def __init__(self, task: Task, scale: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.dim, self.std, self.rank = task.dim, task.std, min(task.dim, 4)
        self.register_buffer("centre", scale[0])
        self.register_buffer("spread", scale[1])
        generator = torch.Generator().manual_seed(0)
        size = 25 ** torch.rand(1, task.waves, generator=generator)
        waves = torch.randn(task.dim + task.width, task.waves, generator=generator) * size / 2
        self.register_buffer("waves", waves)
        seen = task.dim + 9 + 64 + 2 * task.waves
        self.embed = stack(2 * task.width, 64, 64, 2)
        self.score = stack(seen, 128, task.dim, 4)
        self.kappa = stack(seen, 64, task.dim * (1 + self.rank), 3)
        self.gains = stack(8, 32, 2 * task.dim, 2) if task.linear else None
        self.of_x = nn.Linear(task.dim, task.dim, bias=False)
        self.of_y = nn.Linear(task.width, task.dim, bias=False)

    def forward(self, x: Tensor, sigma: Tensor | float, /, y: Tensor) -> Scores:
        level = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x)).unsqueeze(1)
        white = (y - self.centre) / self.spread
        both = torch.cat([white.clamp(-4, 4), white.sign() * white.abs().log1p()], -1)
        told = self.embed(both).mean(1)
        std = (level.square() + self.std**2).sqrt()
        log = (level / self.std).log()
        waves = [f(log * k) for k in (0.5, 1.0, 2.0) for f in (torch.sin, torch.cos)]
        count = torch.full_like(log, math.log(y.shape[1]))
        seen = torch.cat([x / std, log / 3, log.exp().clamp_max(3), *waves, count, told], -1)
        if self.waves.numel():
            phase = torch.cat([x / std, white.mean(1)], -1) @ self.waves
            length = self.waves[: self.dim].square().sum(0)
            damping = (-length * (level / std).square() / 2).exp()
            seen = torch.cat([seen, damping * phase.sin(), damping * phase.cos()], -1)
        body = self.score(seen)
        if self.gains is not None:
            a, b = self.gains(seen[:, self.dim : self.dim + 8]).chunk(2, -1)
            body = body + a * self.of_x(x / std) + b * self.of_y(white.mean(1))
        score = -level * x / std.square() + self.std / std * body
        c, factor = self.kappa(seen).split([self.dim, self.dim * self.rank], -1)
        ratio = self.std / std
        c = ratio.square() * nn.functional.softplus(c + 0.5) + 1e-5
        factor = 0.3 * (ratio * factor).reshape(len(x), self.dim, self.rank)
        return Scores(score, c, factor)


def train(task: Task, steps: int, batch: int, seed: int) -> SetNetwork:
    """Fresh simulations at every step; sets of one point, or as many as the task has."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    y = task.simulate(task.parameters(4000, generator), generator)
    quarter = y.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)
    network = SetNetwork(task, (quarter[1], quarter[2] - quarter[0]))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps + 1)
    low, high = (math.log(s) for s in (task.sigma_min, 20 * task.std))
    for step in range(steps):
        theta = task.parameters(batch, generator)
        count = 1 if step % 2 else task.points
        y = torch.stack([task.simulate(theta, generator) for _ in range(count)], 1)
        sigma = (low + (high - low) * torch.rand(batch, generator=generator)).exp()
        loss = score_matching_loss(
            network,
            theta,
            sigma,
            first_order="plain",
            variance_reduction=False,
            centred=True,
            seed=seed,
            offset=step,
            model_kwargs={"y": y},
        )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimiser.step()
        decay.step()
    return network.eval().requires_grad_(False)


def by_jacobian(network: SetNetwork) -> Model:
    """kappa = I + sigma ds1/dx of the network, symmetric and of eigenvalues >= 1e-4."""

    def one(x: Tensor, sigma: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        score = network(x.unsqueeze(0), sigma, y.unsqueeze(0)).scaled_score[0]
        return score, score

    def model(x: Tensor, sigma: Tensor | float, /, y: Tensor) -> Scores:
        level = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x))
        jacobian, score = vmap(jacrev(one, has_aux=True))(x, level, y)
        kappa = torch.eye(network.dim) + level.reshape(-1, 1, 1) * (jacobian + jacobian.mT) / 2
        value, axes = torch.linalg.eigh(kappa)
        value = value.clamp_min(1e-4)
        c = value[:, :1] / 2
        return Scores(score, c.expand_as(x), axes * (value - c).sqrt().unsqueeze(1))

    return model


# ------------------------------------------------------------------------------------------- ways


def summed(network: SetNetwork, y: Tensor, free: Model) -> Model:
    """The sum of n scores less n - 1 of the prior's."""

    def model(x: Tensor, sigma: Tensor | float, /) -> Scores:
        each = [network(x, sigma, row.expand(len(x), 1, -1)).scaled_score for row in y]
        rest = (1 - len(y)) * free(x, sigma).scaled_score
        return Scores(cast(Tensor, sum(each)) + rest, torch.ones_like(x))

    return model


def draws_of(way: str, task: Task, network: SetNetwork, y: Tensor, settings: Any) -> Tensor:
    """Draws given observations y (n, width), by one of the ways."""
    schedule, seed, n = task.schedule(), settings["seed"], settings["draws"]
    options = {"n_steps": settings["n_steps"], "seed": seed + 1}
    start = prior((n, task.dim), schedule, data_std=task.std, seed=seed)
    if way.startswith("summed"):
        model = summed(network, y, task.free())
        if way == "summed":
            return reverse_sde(model, start, schedule, **options)
        levels = [schedule.sigma(t) for t in schedule.times(settings["n_steps"]).tolist()]
        chains = annealed_langevin(model, start, levels, n_steps=5, step_size=0.1, seed=seed + 1)
        return chains.draws[:, -1]
    if way == "ordinary":
        model, options["model_kwargs"] = network, {"y": y.expand(n, -1, -1)}
    else:
        one = by_jacobian(network) if way == JACOBIAN else network
        model = composed(one, {"y": y.unsqueeze(1)}, task.free())
    x = second_order_reverse(model, start, schedule, **options)
    told = {"y": y.expand(n, -1, -1)} if way == "ordinary" else None
    return tweedie_denoise(model, x, schedule, schedule.t_min, model_kwargs=told).sample(1, seed=9)[
        0
    ]


def told_apart(
    way: str, task: Task, network: SetNetwork, y: Tensor, reference: Tensor, settings: Any
) -> float:
    """`c2st` of the draws by one of the ways; 1.0 where they run off to infinity."""
    try:
        draws = draws_of(way, task, network, y, settings)
    except ValueError as error:
        if not (way.startswith("summed") and "finite" in str(error)):
            raise
        return 1.0
    return c2st(draws.nan_to_num(1e3, 1e3, -1e3), reference)  # single ones are told, too


def calls_of(way: str, n: int, task: Task, n_steps: int) -> int:
    """Rows that the network is asked for one draw."""
    if way == "ordinary":
        return n_steps + 1
    if way == "summed, annealed":
        return 5 * n * (n_steps + 1)
    each = 1 + task.dim if way == JACOBIAN else 1
    return n * each * (n_steps + (way != "summed"))


def row_of(task: Task, way: str, n: int, scores: list[float], n_steps: int) -> dict[str, Any]:
    values = torch.tensor(scores, dtype=torch.float64)
    spread = values.std().item() / math.sqrt(len(scores)) if len(scores) > 1 else None
    return {
        "task": task.name,
        "n": n,
        "way": way,
        "c2st": round(values.mean().item(), 4),
        "standard_error": None if spread is None else round(spread, 4),
        "each": [round(s, 3) for s in scores],
        "network_rows_a_draw": calls_of(way, n, task, n_steps),
    }


def of_references(task: Task, network: SetNetwork, settings: Any, quick: bool) -> Rows:
    """Of the observations that sbibm has references for."""
    ways = ["ordinary"] if task.points == 1 else ["ordinary", *COMPOSED, JACOBIAN]
    found: dict[str, list[float]] = {way: [] for way in ways}
    generator = torch.Generator().manual_seed(settings["seed"] + 5)
    for number in range(1, settings["observations"] + 1):
        if quick:
            theta = task.parameters(1, generator).expand(task.points, -1)
            y = task.simulate(theta, generator)
            reference = task.reference(y, settings["draws"], generator)
        else:
            y, reference = stored(task, number, settings["draws"])
        for way in ways:
            if way == JACOBIAN and number > settings["sets"]:
                continue  # it costs D + 1 times as much
            found[way].append(told_apart(way, task, network, y, reference, settings))
    return [row_of(task, way, task.points, s, settings["n_steps"]) for way, s in found.items()]


def of_ten(task: Task, network: SetNetwork, settings: Any) -> Rows:
    """Of ten observations of one theta, against exact draws."""
    found: dict[str, list[float]] = {way: [] for way in COMPOSED}
    generator = torch.Generator().manual_seed(settings["seed"] + 6)
    for _ in range(settings["sets"]):
        theta = task.parameters(1, generator)
        y = task.simulate(theta.expand(10, -1), generator)
        reference = task.reference(y, settings["draws"], generator)
        for way, scores in found.items():
            scores.append(told_apart(way, task, network, y, reference, settings))
    return [row_of(task, way, 10, s, settings["n_steps"]) for way, s in found.items()]


COMPOSED = ("composed", "summed", "summed, annealed")
JACOBIAN = "composed, Jacobian"


def exact_error() -> dict[str, float]:
    """Ten observations of the Gaussian by the exact model of one, in float64, over noise levels."""
    generator, variance = torch.Generator().manual_seed(0), 0.1
    y = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    x = torch.randn(20, 10, generator=generator, dtype=torch.float64)
    free = gaussian_model(
        torch.zeros(10).double(), torch.full((10,), variance, dtype=torch.float64), VE()
    )

    def law(x: Tensor, sigma: Tensor, mean: Tensor, spread: float) -> Scores:
        s = sigma.unsqueeze(1)
        noisy = spread + s**2
        return Scores(-s * (x - mean) / noisy, (spread / noisy).expand_as(x))

    def model(x: Tensor, sigma: Tensor | float, /, y: Tensor) -> Scores:
        return law(x, cast(Tensor, sigma), y / 2, variance / 2)

    worst = {"score": 0.0, "kappa": 0.0}
    for level in (0.01, 0.1, 1.0, 10.0):
        sigma = torch.full((20,), level, dtype=torch.float64)
        found = composed(model, {"y": y}, free)(x, sigma)
        wanted = law(x, sigma, y.sum(0) / 11, variance / 11)
        off = (found.scaled_score - wanted.scaled_score).abs().max()
        worst["score"] = max(worst["score"], (off / wanted.scaled_score.abs().max()).item())
        worst["kappa"] = max(worst["kappa"], (found.c / wanted.c - 1).abs().max().item())
    return worst


# ---------------------------------------------------------------------------- references, C2ST


def stored(task: Task, number: int, n: int) -> tuple[Tensor, Tensor]:
    """sbibm's observation (points, width) and the first n of its reference draws."""
    spec = importlib.util.find_spec("sbibm")
    if spec is None or spec.origin is None:
        raise SystemExit("products needs the files of sbibm (pip install --no-deps sbibm)")
    folder = Path(spec.origin).parent / "tasks" / task.name / "files" / f"num_observation_{number}"

    def table(name: str) -> Tensor:
        data = cast(Any, spec.loader).get_data(str(folder / name))
        text = (bz2.decompress(data) if name.endswith("bz2") else data).decode()
        lines = text.strip().splitlines()[1:]
        return torch.from_numpy(np.loadtxt(lines, delimiter=",", ndmin=2)).float()

    y = table("observation.csv").reshape(task.points, task.width)
    return y, table("reference_posterior_samples.csv.bz2")[:n]


def c2st(a: Tensor, b: Tensor, folds: int = 5, epochs: int = 40, seed: int = 1) -> float:
    """The share of held-out draws that a network tells right: two hidden layers, all folds."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([(a - b.mean(0)) / b.std(0), (b - b.mean(0)) / b.std(0)]).clamp(-50, 50)
    label = torch.cat([torch.zeros(len(a)), torch.ones(len(b))])
    order = torch.randperm(len(rows), generator=generator)
    rows, label = rows[order], label[order]
    parts = torch.arange(len(rows)).chunk(folds)
    size = min(len(p) for p in parts)
    train_on = [
        torch.cat([p for q, p in enumerate(parts) if q != k])[: (folds - 1) * size]
        for k in range(folds)
    ]
    learnt = torch.stack(train_on)
    width = max(10 * a.shape[1], 30)
    shapes = [(a.shape[1], width), (width, width), (width, 1)]
    layers = [
        (torch.randn(folds, i, o, generator=generator) * (2 / i) ** 0.5, torch.zeros(folds, 1, o))
        for i, o in shapes
    ]
    weights = [t.requires_grad_() for layer in layers for t in layer]

    def logits(x: Tensor) -> Tensor:
        for k in range(0, 4, 2):
            x = torch.baddbmm(weights[k + 1], x, weights[k]).relu()
        return torch.baddbmm(weights[5], x, weights[4]).squeeze(-1)

    optimiser = torch.optim.Adam(weights, lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    loss_of: Callable[..., Tensor] = nn.functional.binary_cross_entropy_with_logits
    for _ in range(epochs):
        shuffled = learnt[:, torch.randperm(learnt.shape[1], generator=generator)]
        for index in shuffled.split(200, 1):
            optimiser.zero_grad()
            loss_of(logits(rows[index]), label[index]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        decay.step()
    with torch.no_grad():
        told = [
            ((logits(rows[p].expand(folds, -1, -1))[k] > 0) == (label[p] > 0.5)).double()
            for k, p in enumerate(parts)
        ]
    return torch.cat(told).mean().item()
