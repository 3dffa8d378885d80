"""The recipe of docs/instruments.md is what the page says, on laws whose Hessians are known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hos_ext import MLP, Scores

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
PAGE = Path(__file__).parents[2] / "docs" / "instruments.md"
SIGMA, SIZE, CLASSES = 0.8, 5, 3


def recipe() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    return next(block for block in blocks if "def curvature_map" in block)


def run(model: Any, x: Tensor, label: Tensor) -> dict[str, Any]:
    names = {"model": model, "x": x, "label": label}
    exec(compile(recipe(), "instruments.md", "exec"), names)
    return names


class Mixture:
    """Noisy densities of normal classes of one weight: dense, and as a model calls itself."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        options = {"generator": draw, "dtype": torch.float64}
        self.means = torch.randn(CLASSES, SIZE, **options)
        roots = 0.7 * torch.randn(CLASSES, SIZE, SIZE, **options)
        noisy = roots @ roots.mT + SIGMA**2 * torch.eye(SIZE, dtype=torch.float64)
        self.precision = torch.linalg.inv(noisy)

    def log_prob(self, x: Tensor, label: int | None) -> Tensor:
        off = x - self.means
        squares = (off.unsqueeze(-2) @ self.precision @ off.unsqueeze(-1)).squeeze(-1).squeeze(-1)
        each = (self.precision.logdet() - squares) / 2
        return each.logsumexp(0) if label is None else each[label]

    def score(self, x: Tensor, label: int | None) -> Tensor:
        return torch.func.grad(self.log_prob)(x, label)

    def hessian(self, x: Tensor, label: int | None) -> Tensor:
        return torch.func.hessian(self.log_prob)(x, label)

    def weights(self, x: Tensor) -> Tensor:
        return torch.stack([self.log_prob(x, k) for k in range(CLASSES)]).softmax(0)

    def __call__(self, x: Tensor, sigma: float, label: Tensor | None = None) -> Scores:
        labels = [None] * len(x) if label is None else label.tolist()
        flat = x.flatten(1)
        pairs = list(zip(flat, labels, strict=True))
        score = torch.stack([self.score(*pair) for pair in pairs])
        kappa = torch.eye(SIZE) + sigma**2 * torch.stack([self.hessian(*pair) for pair in pairs])
        least = torch.linalg.eigvalsh(kappa)[:, :1]
        values, vectors = torch.linalg.eigh(kappa - least.unsqueeze(-1) * torch.eye(SIZE))
        factor = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
        return Scores(
            (sigma * score).reshape(x.shape), least.expand_as(flat).reshape(x.shape), factor
        )


@pytest.fixture
def noisy() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return 1.5 * torch.randn(4, SIZE, 1, generator=draw, dtype=torch.float64)


def test_the_recipe_is_the_difference_of_the_dense_hessians(noisy):
    law, label = Mixture(), torch.tensor([0, 1, 2, 1])
    found = run(law, noisy, label)
    rows = zip(noisy.flatten(1), label.tolist(), strict=True)
    dense = torch.stack([law.hessian(x, k) - law.hessian(x, None) for x, k in rows])
    torch.testing.assert_close(found["change"].dense(), dense, rtol=0, atol=1e-10)
    diagonal = dense.diagonal(dim1=1, dim2=2).reshape(noisy.shape)
    torch.testing.assert_close(found["picture"], diagonal, rtol=0, atol=1e-10)
    lowest = torch.linalg.eigvalsh(dense)[:, :1]
    torch.testing.assert_close(found["sharpest"], -lowest, rtol=0, atol=1e-10)


def test_in_the_mean_over_labels_it_is_minus_the_covariance_of_the_scores(noisy):
    law = Mixture()
    maps = [run(law, noisy, torch.full((4,), k))["change"].dense() for k in range(CLASSES)]
    for i, x in enumerate(noisy.flatten(1)):
        weights = law.weights(x)
        mean = sum(w * each[i] for w, each in zip(weights, maps, strict=True))
        scores = torch.stack([law.score(x, k) for k in range(CLASSES)])
        covariance = torch.cov(scores.T, correction=0, aweights=weights)
        torch.testing.assert_close(mean, -covariance, rtol=0, atol=1e-10)


def test_the_recipe_takes_a_network_with_classes():
    model, x = MLP((8, 8), 3, num_classes=10), torch.randn(6, 8, 8)
    label = torch.tensor([0, 1, 2, 3, 10, 10])
    found = run(model, x, label)
    assert found["picture"].shape == x.shape
    assert found["change"].rank == 6
    assert found["directions"].shape == (6, 64, 1)
    change = found["change"].dense()
    torch.testing.assert_close(change[4:], torch.zeros(2, 64, 64), rtol=0, atol=1e-5)  # no class
    assert (change[:4].abs().amax((1, 2)) > 1e-4).all()
