"""Metropolis chains from a score alone: what each rule for the acceptance costs and leaves.

A diffusion model knows the score of its noisy data, and no density. The law here is one whose
density is known all the same: three points with noise. Chains start as exact draws of it, so that
any move of their moments is the bias of the step. Prints a table: the error of E|x|^2 in standard
errors (beyond 3 or so it is a bias), the acceptance, and the score evaluations of a step.
Run: python examples/exact_from_scores.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import warnings
from typing import Any

import torch

from hos_ext.densities import GaussianMixture
from hos_ext.sampling import BoundWarning, Chains, SupportBound, TwoCoin, sample

SIGMA = 0.45


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    points = torch.tensor([[0.9, 0.8], [-0.9, 0.3], [0.2, -0.8]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    clean = GaussianMixture(weights, points, 1e-12 * torch.eye(2).double().expand(3, -1, -1))
    law = clean.noisy(sigma=SIGMA)
    init = law.sample(arguments.chains, seed=0)
    truth = float(weights @ points.square().sum(1)) + 2 * SIGMA**2

    def report(name: str, chains: Chains, evaluations: float) -> None:
        size = chains.draws[:, -1].square().sum(1)
        off = (size.mean() - truth) / (size.std() / len(size) ** 0.5)
        stats = chains.stats
        accepted = float(stats["acceptance"].mean()) if "acceptance" in stats else 1.0
        print(f"{name:22s} {off:+8.1f} {accepted:12.3f} {evaluations:12.2f}")

    print(f"{'rule':22s} {'error':>8s} {'acceptance':>12s} {'evaluations':>12s}")
    steps = arguments.steps
    options: dict[str, Any] = {"step_size": 0.12, "n_steps": steps, "thin": steps, "seed": 1}
    report("none (langevin)", sample(law.score, init, method="langevin", **options), 1.0)
    for rule, nodes in (("trapezoid", 0), ("simpson", 1), ("lobatto-2", 2), ("lobatto-3", 3)):
        chains = sample(law.score, init, method="mala", rule=rule, **options)
        report(rule, chains, 1.0 + nodes)
    # The bound follows from the box in which the clean points lie.
    coins = TwoCoin(SupportBound(SIGMA, low=-0.9, high=0.9), nodes=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BoundWarning)  # of steps that are too long to decide
        chains = sample(law.score, init, method="mala", rule=coins, **options)
    tossed = float(chains.stats["coin_evaluations"].double().mean()) / steps
    report("two coins", chains, 1.0 + coins.nodes + tossed)
    exact = sample(law.score, init, method="mala", log_prob=law.log_prob, **options)
    report("the density itself", exact, 1.0)
    undecided = float(chains.stats["undecided"].double().mean()) / steps
    beyond = int(chains.stats["bound_exceeded"].sum())
    print(f"two coins: {undecided:.1%} of the steps undecided, {beyond} scores beyond the bound")


if __name__ == "__main__":
    main()
