"""The order of causes on laws whose diag s2 is known, and what `leaf_order` refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hos_ext import Scores
from hos_ext.uncertainty import leaf_order

SIZE, SIGMA = 6, 1e-3
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


class Additive:
    """x_j = sum of sin(1.5 x_i) over parents i, plus noise; the exact Hessian of what is kept."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.place = torch.randperm(SIZE, generator=draw)
        joined = torch.rand(SIZE, SIZE, generator=draw) < 0.5
        self.edges = joined & (self.place[:, None] < self.place)
        for cause, effect in zip(self.place.argsort(), self.place.argsort()[1:], strict=False):
            self.edges[cause, effect] = True  # one order alone is right
        self.x0 = torch.zeros(400, SIZE, dtype=torch.float64)
        for j in self.place.argsort():
            noise = torch.randn(400, generator=draw, dtype=torch.float64)
            self.x0[:, j] = self.mean(self.x0)[:, j] + noise
        self.kept = torch.ones(SIZE, dtype=torch.bool)

    def mean(self, x: Tensor) -> Tensor:
        return (1.5 * x).sin() @ self.edges.to(x)

    def log_prob(self, x: Tensor) -> Tensor:
        off = (x - self.mean(x[None])[0]).square()
        return -off.where(self.kept, 0.0).sum() / 2

    def __call__(self, x: Tensor, sigma: float) -> Scores:
        self.kept = x.abs().amax(0) > 10 * sigma  # the rest are zeros with noise
        diag = torch.vmap(lambda row: torch.func.hessian(self.log_prob)(row).diagonal())(x)
        return Scores(torch.zeros_like(x), 1 + sigma**2 * diag)


@pytest.mark.parametrize("seed", range(3))
def test_with_exact_marginals_the_order_is_exact(seed):
    law = Additive(seed)
    order = leaf_order(law, law.x0, SIGMA, rows=200, seed=1)
    assert torch.equal(order, law.place.argsort())


def test_the_noise_is_that_of_the_key_in_any_chunks():
    law, seen = Additive(0), []

    def model(x: Tensor, sigma: float) -> Scores:
        seen.append(x)
        return Scores(torch.zeros_like(x), x.sin())

    whole = leaf_order(model, law.x0, 0.5, rows=90, seed=3)
    first, seen[:] = torch.cat(seen), []
    parts = leaf_order(model, law.x0, 0.5, rows=90, seed=3, chunk_size=7)
    assert torch.equal(whole, parts)
    assert torch.equal(first, torch.cat(seen))
    noise = (first[:90] - law.x0[:90]) / 0.5
    assert abs(noise.std() - 1) < 0.1
    drawn = leaf_order(model, law.x0, 0.5, generator=torch.Generator().manual_seed(1))
    assert drawn.sort().values.tolist() == list(range(SIZE))


def test_what_has_been_removed_is_zero_with_noise():
    law, seen = Additive(0), []

    def model(x: Tensor, sigma: float) -> Scores:
        seen.append(x)
        rising = torch.arange(1, SIZE + 1, dtype=x.dtype)
        return Scores(torch.zeros_like(x), rising * law.x0[: len(x)].sign())

    order = leaf_order(model, law.x0, 0.1, seed=0)
    assert order.argsort().sort().values.tolist() == list(range(SIZE))
    for step, x in enumerate(seen):
        gone = order.flip(0)[:step]
        assert x[:, gone].abs().max() < 0.6 if step else True
        left = order.flip(0)[step:]
        assert ((x - law.x0)[:, left].std(0) - 0.1).abs().max() < 0.02
    assert len(seen) == SIZE - 1
    assert (law.x0 != 0).any(0).all()  # what came is as it was


def test_the_factor_counts():
    x0 = torch.randn(50, 2, dtype=torch.float64)

    def model(x: Tensor, sigma: float) -> Scores:
        factor = torch.stack([x[:, :1], torch.zeros_like(x[:, :1])], 1)
        return Scores(torch.zeros_like(x), torch.ones_like(x), factor)

    assert leaf_order(model, x0, 0.1, seed=0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": 3}, TypeError, "leaf_order: model must be callable, got int"),
        ({"x0": torch.zeros(4)}, ValueError, "leaf_order: x0 must have shape"),
        ({"x0": torch.randn(1, 3)}, ValueError, "leaf_order: x0 must have shape"),
        ({"x0": torch.full((3, 2), torch.nan)}, ValueError, "leaf_order: x0 must be finite"),
        ({"x0": torch.eye(3)[:, :1] * 0}, ValueError, "x0 must vary in every column, got"),
        ({"sigma": 0.0}, ValueError, "leaf_order: sigma must be finite and > 0, got 0"),
        ({"rows": 1}, ValueError, "leaf_order: rows must be at least 2, got 1"),
        ({"chunk_size": 0}, ValueError, "leaf_order: chunk_size must be at least 1, got 0"),
        ({"model": lambda x, s: x}, TypeError, "what model returns must be a Scores, got Tensor"),
        (
            {"model": lambda x, s: Scores(x, x * torch.nan)},
            ValueError,
            "leaf_order: what model returns must be finite, got NaN or inf",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, kind, message):
    given = {"model": lambda x, s: Scores(x, x), "x0": torch.randn(9, 3), "sigma": 0.1}
    options = given | change
    with pytest.raises(kind, match=message):
        leaf_order(options.pop("model"), options.pop("x0"), options.pop("sigma"), **options)
