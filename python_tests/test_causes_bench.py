"""What the measurement of orders is made of, and the measurement in small."""

from __future__ import annotations

import pytest
import torch

from bench.instruments import causes, causes_large

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def test_errors_are_the_edges_that_an_order_turns_round():
    edges = torch.zeros(3, 3, dtype=torch.bool)
    edges[2, 0] = edges[0, 1] = edges[2, 1] = True
    assert causes.errors(edges, torch.tensor([2, 0, 1])) == 0
    assert causes.errors(edges, torch.tensor([0, 2, 1])) == 1
    assert causes.errors(edges, torch.tensor([1, 0, 2])) == 3


def test_samples_follow_the_graph():
    draw = torch.Generator().manual_seed(0)
    edges = causes.graph(6, 8, draw)
    assert not torch.linalg.matrix_power(edges.double(), 6).any()  # no cycle
    x = causes.samples(edges, 500, draw)
    torch.testing.assert_close(x.std(0), torch.ones(6))
    torch.testing.assert_close(x.mean(0), torch.zeros(6), rtol=0, atol=1e-5)


def test_steins_diagonal_is_that_of_a_normal_law():
    x = torch.randn(600, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close = x.norm(dim=1) < 1
    found = causes.stein_diagonal(x * torch.tensor([1.0, 0.5]).double())[close].mean(0)
    torch.testing.assert_close(found, torch.tensor([-1.0, -4.0]).double(), rtol=0.25, atol=0)


def test_a_network_has_one_diagonal_by_autodiff_and_by_differences():
    torch.manual_seed(0)
    model = causes.MLP((3,), 0, width=8, head_width=8, activation="silu", dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    found = causes.network_diagonal(model, x, head=False)
    for j in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[j] = 1e-5
        ends = [model(x + side * shift, causes.SIGMA).scaled_score[:, j] for side in (1, -1)]
        slope = (ends[0] - ends[1]) / (2e-5 * causes.SIGMA)
        torch.testing.assert_close(found[:, j], slope, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_the_measurement_of_orders_runs_in_small():
    found = causes.run(quick=True)
    names = {"chance", "SCORE", "DiffAN", "head, masks", "head, trained on"}
    assert set(found["total_errors"]) == names
    for row in found["rows"]:
        assert 0 <= row["errors"] <= row["edges"]


@pytest.mark.slow
def test_the_measurement_of_many_causes_runs_in_small():
    found = causes_large.run(quick=True)
    assert [row["by"] for row in found["rows"]] == [
        "chance",
        "head, masks",
        "head, trained on",
        "DiffAN",
    ]
    assert all(0 <= row["errors"] <= found["edges"] for row in found["rows"])
