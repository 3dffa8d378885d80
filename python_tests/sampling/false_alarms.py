"""How often right chains are warned of: seeds x densities x methods, counted.

    python python_tests/sampling/false_alarms.py --seeds 40

Chains start in draws of the density, in one point, or ten times too far. Step sizes are those that
the methods are meant for: a part of the smallest variance.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter

import torch
from torch import Tensor

from hos_ext.densities import Gaussian, GaussianMixture
from hos_ext.sampling import RunawayWarning, make_step, method_names, sample
from hos_ext.scores import DenseScores

F64 = torch.float64
METHODS = [name for name in method_names() if "isotropic" not in name]


def densities() -> dict[str, tuple[object, float]]:
    """Each density with its smallest variance."""
    scales = torch.logspace(-2, 2, 6, dtype=F64)
    far = torch.tensor([[-50.0, 0.0], [0.0, 0.0], [40.0, 40.0]], dtype=F64)
    widths = torch.stack([torch.eye(2), 4 * torch.eye(2), 0.05 * torch.eye(2)]).double()
    near = torch.tensor([[-1.5, 0.0], [1.5, 0.5]], dtype=F64)
    return {
        "gaussian": (Gaussian(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64)), 1.0),
        "ill-conditioned": (Gaussian(torch.zeros(6, dtype=F64), torch.diag(scales)), 0.01),
        "off-centre": (Gaussian(torch.full((3,), 100.0, dtype=F64), torch.eye(3, dtype=F64)), 1.0),
        "far modes": (GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=F64), far, widths), 0.05),
        "near modes": (
            GaussianMixture(
                torch.tensor([0.4, 0.6], dtype=F64),
                near,
                torch.stack([torch.eye(2) * 0.5] * 2).double(),
            ),
            0.5,
        ),
    }


def student(freedom: float) -> tuple[object, float]:
    """Independent entries with heavy tails."""

    def score_fn(x: Tensor) -> DenseScores:
        below = freedom + x.square()
        diag = -(freedom + 1) * (freedom - x.square()) / below.square()
        return DenseScores(-(freedom + 1) * x / below, torch.diag_embed(diag))

    return score_fn, freedom / (freedom + 1)


def starts(kind: str, x: Tensor) -> Tensor:
    if kind == "one point":
        return torch.zeros_like(x)
    return 3 * x if kind == "three times too far" else x


def count(seeds: int) -> tuple[Counter[str], Counter[str]]:
    """Runs and false alarms, by density, method and start."""
    runs: Counter[str] = Counter()
    alarms: Counter[str] = Counter()
    for seed in range(seeds):
        cases = {
            name: (lambda x, d=d: DenseScores(d.score(x), d.hessian(x)), v, d.sample(8, seed=seed))
            for name, (d, v) in densities().items()
        }
        for freedom in (1.0, 3.0):
            torch.manual_seed(seed)
            x = torch.distributions.StudentT(freedom).sample((8, 2)).double()
            cases[f"student {freedom:g}"] = (*student(freedom), x)
        for name, (score_fn, variance, x) in cases.items():
            for method in METHODS:
                for kind in ("draws", "one point", "three times too far"):
                    h = make_step(method).relative_step_size * variance
                    key = f"{name}, {method}, {kind}"
                    with warnings.catch_warnings(record=True) as found:
                        warnings.simplefilter("always", RunawayWarning)
                        sample(
                            score_fn,
                            starts(kind, x),
                            method=method,
                            step_size=h,
                            n_steps=150,
                            seed=seed,
                        )
                    runs[key] += 1
                    alarms[key] += len(found)
                    if found:
                        print(key, seed, str(found[0].message)[:260], flush=True)
    return runs, alarms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    runs, alarms = count(parser.parse_args().seeds)
    print({key: n for key, n in alarms.items() if n})
    print(f"{sum(alarms.values())} false alarms in {sum(runs.values())} runs")
    return sum(alarms.values()) > 0


if __name__ == "__main__":
    raise SystemExit(main())
