"""Which variable causes which: an order of causes from samples alone.

Draws a random graph and samples of it: each variable is a random smooth function of its causes plus
normal noise. A network with a diagonal head learns the law with noise. The variable whose second
derivative of log p varies least has no effects. `leaf_order` removes it, looks for the next, and so
on. Prints how many edges the order turns round.
Run: python examples/causal_order.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import math
import time

import torch
from torch import Tensor

from hos_ext import MLP, score_matching_loss
from hos_ext.uncertainty import leaf_order

SIGMAS = (0.2, 0.6)  # noise levels that are learned; variables have standard deviation 1
SIGMA = 0.3  # where the second derivative is taken


def law(size: int, edges: int, rows: int) -> tuple[Tensor, Tensor]:
    """Whether i causes j, (D, D), and standardised samples, (n, D)."""
    order = torch.randperm(size)
    joined = torch.rand(size, size) < 2 * edges / (size * (size - 1))
    graph = torch.zeros(size, size, dtype=torch.bool)
    graph[order[:, None], order] = joined.triu(1)
    x = torch.zeros(rows, size)
    for j in order:
        x[:, j] = 0.8 * torch.randn(rows)
        causes = x[:, graph[:, j]]
        if causes.shape[1]:  # a Gaussian process, by 200 random waves
            waves = torch.randn(causes.shape[1], 200)
            x[:, j] += (causes @ waves + 6.3 * torch.rand(200)).cos() @ torch.randn(200) / 10
    return graph, (x - x.mean(0)) / x.std(0)


def learn(model: MLP, x0: Tensor, steps: int, rate: float) -> MLP:
    """Steps of Adam on a diagonal model of the noisy law."""
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    low, high = map(math.log, SIGMAS)
    for _ in range(steps):
        batch = x0[torch.randint(len(x0), (256,))]
        sigma = (low + (high - low) * torch.rand(256)).exp()
        loss = score_matching_loss(model, batch, sigma, diagonal=True)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    return model


def turned(graph: Tensor, order: Tensor) -> int:
    """Edges from a later variable of the order to an earlier one."""
    place = order.argsort()
    return int((graph & (place[:, None] > place)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    quick = parser.parse_args().quick
    steps = 600 if quick else 1500
    size, edges = 12, 30
    torch.manual_seed(0)
    graph, x0 = law(size, edges, 3000)
    began = time.perf_counter()
    model = learn(MLP((size,), 0, head_width=128, activation="silu"), x0, steps, 2e-3)

    print(f"{size} variables, {int(graph.sum())} edges")
    order = leaf_order(model, x0, SIGMA, seed=1)
    print(f"edges turned by chance: {turned(graph, torch.randperm(size))}")
    print(f"edges turned by the order: {turned(graph, order)}")
    print(f"in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
