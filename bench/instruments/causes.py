"""Orders of causes by the variance of diag s2: a head's diagonal beside its published rivals.

Graphs are random with normal noise of variance 0.4 to 0.8; a variable is the sum of its noise and a
random smooth function of its parents (a Gaussian process of length 1, by 200 Fourier features).
Each variable is put in units of its standard deviation. A leaf is the variable whose d^2 log p /
dx_j^2 varies least (Rolland et al. 2022, arXiv:2203.04413); it is removed, and so on. "errors" is
the number of edges that point from a later variable to an earlier one.

* "SCORE": Stein's estimator of diag s2 with a Gaussian kernel of the median width, ridge 0.001, on
  the first 1000 rows, computed again for each marginal, as in that paper.
* "DiffAN": the Jacobian's diagonal of a denoiser by autodiff. A removed variable is set to zero in
  the input of the same network (Sanchez et al. 2022, arXiv:2210.06201, masks).
* "head, masks": c of a diagonal head in place of the Jacobian, the rest alike.
* "head, trained on": and after each removal some steps on samples whose removed columns are zero.
  With noise on all columns those say nothing of the others, so that the marginal's diag s2 is what
  is learned.

All networks have the same width, noise levels and number of training steps in all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hos_ext import MLP
from hos_ext.losses import score_matching_loss

LEVELS, SIGMA, BATCH = (0.2, 0.6), 0.3, 256  # trained noise levels, and where diag s2 is taken
LENGTHS = {"features": 200, "score_rows": 1000}


def run(quick: bool = False) -> dict[str, Any]:
    """The table. A full run takes about two CPU minutes."""
    settings: dict[str, Any] = {"size": 4 if quick else 15, "edges": 4 if quick else 45}
    settings |= {"rows": 200 if quick else 2000, "seeds": [0] if quick else [0, 1, 2, 3, 4]}
    settings |= {"first": 5 if quick else 800, "more": 2 if quick else 30, "width": 128}
    rows = [row for seed in settings["seeds"] for row in compared(seed, settings)]
    total: dict[str, int] = {}
    for row in rows:
        total[row["by"]] = total.get(row["by"], 0) + row["errors"]
    return {"settings": settings | LENGTHS, "total_errors": total, "rows": rows}


def compared(seed: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What each estimator makes of one graph."""
    draw = torch.Generator().manual_seed(seed)
    edges = graph(settings["size"], settings["edges"], draw)
    x0 = samples(edges, settings["rows"], draw)
    steps = settings["first"] + settings["more"] * (settings["size"] - 2)
    ways: dict[str, Callable[[], Tensor]] = {
        "chance": lambda: torch.randperm(len(edges), generator=draw),
        "SCORE": lambda: score_order(x0[: LENGTHS["score_rows"]].double()),
        "DiffAN": lambda: network_order(x0, False, steps, 0, settings["width"], seed),
        "head, masks": lambda: network_order(x0, True, steps, 0, settings["width"], seed),
        "head, trained on": lambda: network_order(
            x0, True, settings["first"], settings["more"], settings["width"], seed
        ),
    }
    rows = []
    for name, way in ways.items():
        began = time.process_time()
        wrong = errors(edges, way())
        spent = round(time.process_time() - began, 2)
        rows.append({"seed": seed, "edges": int(edges.sum()), "by": name, "errors": wrong})
        rows[-1]["cpu_seconds"] = spent
    return rows


# ------------------------------------------------------------------------------- graphs and orders


def graph(size: int, edges: int, draw: torch.Generator) -> Tensor:
    """edges[i, j]: i causes j, each pair with the same probability. Shape (D, D), bool."""
    order = torch.randperm(size, generator=draw)
    likely = min(1.0, 2 * edges / (size * (size - 1)))
    joined = torch.triu(torch.rand(size, size, generator=draw) < likely, 1)
    found = torch.zeros(size, size, dtype=torch.bool)
    found[order[:, None], order[None]] = joined
    return found


def samples(edges: Tensor, rows: int, draw: torch.Generator) -> Tensor:
    """Standardised samples of the model on a graph. Shape (n, D), float32."""
    size, features = len(edges), LENGTHS["features"]
    x, known = torch.zeros(rows, size), torch.zeros(size, dtype=torch.bool)
    while not known.all():
        ready = ~known & ~(edges & ~known[:, None]).any(0)
        for j in ready.nonzero()[:, 0].tolist():
            deviation = (0.4 + 0.4 * torch.rand((), generator=draw)).sqrt()
            x[:, j] = deviation * torch.randn(rows, generator=draw)
            parents = x[:, edges[:, j]]
            if parents.shape[1]:
                waves = torch.randn(parents.shape[1], features, generator=draw)
                phases = 2 * math.pi * torch.rand(features, generator=draw)
                heights = torch.randn(features, generator=draw) * (2 / features) ** 0.5
                x[:, j] += (parents @ waves + phases).cos() @ heights
        known |= ready
    return (x - x.mean(0)) / x.std(0)


def errors(edges: Tensor, order: Tensor) -> int:
    """Edges that an order (causes first) turns round."""
    place = order.argsort()
    causes, effects = edges.nonzero().T
    return int((place[causes] > place[effects]).sum())


# -------------------------------------------------------------------------------------- estimators


def stein_diagonal(x: Tensor, ridge: float = 1e-3) -> Tensor:
    """diag s2 at the samples by Stein's identities of first and second order. Shape (n, D)."""
    off = x[:, None] - x[None]
    squares = off.square().sum(-1)
    width = squares.sqrt().median().square()
    kernel = (-squares / (2 * width)).exp()
    # k(a, b) by b: sums over samples b of the first and of the second derivative.
    first = torch.einsum("abj,ab->aj", off, kernel) / width
    second = torch.einsum("abj,ab->aj", off.square() / width**2 - 1 / width, kernel)
    factor = torch.linalg.cholesky(kernel + ridge * torch.eye(len(x), dtype=x.dtype))
    score = -torch.cholesky_solve(first, factor)
    return torch.cholesky_solve(second, factor) - score.square()


def score_order(x: Tensor) -> Tensor:
    """SCORE: the estimator anew for each marginal. Causes first."""
    left, leaves = list(range(x.shape[1])), []
    while left:
        leaves.append(left.pop(int(stein_diagonal(x[:, left]).var(0).argmin())))
    return torch.tensor(leaves[::-1])


def network_order(
    x0: Tensor,
    head: bool,
    first: int,
    more: int,
    width: int,
    seed: int,
    *,
    every: int = 1,
    rows: int = 1000,
) -> Tensor:
    """By a network, its head or its Jacobian, trained on or masked. Causes first.

    `more` steps of training follow each removal of `every` leaves. Variances are over `rows`.
    """
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    size = x0.shape[1]
    model = MLP((size,), 0, width=width, head_width=width, activation="silu")
    learn(model, x0, head, first, 2e-3, draw)
    masked, left, leaves = x0.clone(), torch.ones(size, dtype=torch.bool), []
    for step in range(size - 1):
        if step and more and step % every == 0:
            learn(model, masked, head, more, 1e-3, draw)
        seen = masked[:rows]
        x = seen + SIGMA * torch.randn(seen.shape, generator=draw)
        variance = network_diagonal(model, x, head).var(0)
        leaves.append(int(variance.where(left, torch.inf).argmin()))
        left[leaves[-1]] = False
        masked[:, leaves[-1]] = 0
    leaves.append(int(left.long().argmax()))
    return torch.tensor(leaves[::-1])


def network_diagonal(model: MLP, x: Tensor, head: bool) -> Tensor:
    """diag s2 at noisy samples: one evaluation by the head, one and D products by autodiff."""
    if head:
        with torch.no_grad():
            return (model(x, SIGMA).c - 1) / SIGMA**2

    def score(row: Tensor) -> Tensor:
        found: Tensor = model(row[None], SIGMA).scaled_score[0] / SIGMA
        return found

    found: Tensor = torch.vmap(lambda row: torch.func.jacrev(score)(row).diagonal())(x)
    return found


def learn(
    model: MLP, x0: Tensor, head: bool, steps: int, rate: float, draw: torch.Generator
) -> None:
    """Some steps of Adam with a cosine schedule; both kinds see pairs of noise of both signs."""
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    low, high = (math.log(level) for level in LEVELS)
    for step in range(steps):
        warm = min(1.0, (step + 1) / 20)
        optimiser.param_groups[0]["lr"] = (
            rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        batch = x0[torch.randint(len(x0), (BATCH,), generator=draw)]
        sigma = (low + (high - low) * torch.rand(BATCH, generator=draw)).exp()
        if head:
            loss = score_matching_loss(model, batch, sigma, diagonal=True, generator=draw)
        else:
            noise = torch.randn(batch.shape, generator=draw)
            shift = sigma[:, None] * noise
            plus, minus = (model(x, sigma).scaled_score for x in (batch + shift, batch - shift))
            loss = ((plus + noise).square() + (minus - noise).square()).sum(1).mean() / 2
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimiser.step()
