"""The measurement of products runs in small, and its parts are what they are called."""

from __future__ import annotations

import pytest
import torch

from bench.instruments import products


def test_the_classifier_tells_laws_apart_as_far_as_they_differ():
    """Two normal laws of unit variance, d apart: the best share is Phi(d / 2)."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(500, 2, generator=generator) for _ in range(2))
    assert products.c2st(a, b, epochs=20) == pytest.approx(0.5, abs=0.05)
    shifted = a + torch.tensor([2.0, 0.0])
    assert products.c2st(shifted, b, epochs=20) == pytest.approx(0.8413, abs=0.05)


@pytest.mark.parametrize("task", [products.TwoMoons(), products.GaussianLinear(), products.Slcp()])
def test_simulators_have_the_likelihood_and_the_prior_that_references_take(task):
    """By simulating: of pairs theta, y the rank of a number among reference draws is uniform."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(task, products.TwoMoons):
        task.cells = 300
    ranks = []
    for _ in range(40):
        theta = task.parameters(1, generator)
        y = task.simulate(theta.expand(task.points, -1), generator)

        draws = task.reference(y, 200, generator)
        ranks.append((draws < theta).double().mean(0))
    mean = torch.stack(ranks).mean(0)
    assert (mean - 0.5).abs().max() < 4 * (1 / 12 / 40) ** 0.5


def test_ten_exact_observations_of_the_gaussian_are_exact():
    assert max(products.exact_error().values()) < 1e-10


@pytest.mark.slow
def test_the_measurement_of_products_runs_in_small():
    found = products.run(quick=True)
    rows = {(row["task"], row["n"], row["way"]): row for row in found["c2st"]}
    assert ("slcp", 4, "ordinary") in rows
    assert all(0 <= row["c2st"] <= 1 for row in rows.values())
    assert rows["two_moons", 10, "composed"]["network_rows_a_draw"] == 50
