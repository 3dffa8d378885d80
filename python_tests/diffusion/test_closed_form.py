"""Closed forms of boxes and Gaussians against numerical integration and `densities`."""

from __future__ import annotations

import math

import pytest
import torch

from hos_ext import VE, VP, posterior
from hos_ext.densities import Gaussian
from hos_ext.diffusion import box_model, gaussian_model

F64 = torch.float64


@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0, 50.0])
def test_a_box_is_that_of_fine_sums(sigma):
    low, high = torch.tensor([-1.0, 0.5], dtype=F64), torch.tensor([1.0, 0.7], dtype=F64)
    x = torch.tensor([[0.0, 0.6], [0.99, 0.5], [1.02, 0.75], [1.5, -0.5], [-40.0, 9.0]], dtype=F64)
    found = box_model(low, high, VE(0.005, 100.0))(x, sigma)
    for row in range(len(x)):
        for i in range(2):
            grid = torch.linspace(low[i].item(), high[i].item(), 400_001, dtype=F64)
            z = (x[row, i] - grid) / sigma
            log = -(z.square()) / 2
            mass = (log - log.max()).exp()
            mass[[0, -1]] /= 2
            mass = mass / mass.sum()
            mean = (mass * z).sum()
            variance = (mass * (z - mean).square()).sum()
            assert found.scaled_score[row, i].item() == pytest.approx(-mean.item(), 1e-6, 1e-9)
            if variance > 1e-3:  # a narrower one falls between the points of the grid
                assert found.c[row, i].item() == pytest.approx(variance.item(), 1e-4)


def test_far_outside_a_box_and_far_inside_are_to_rounding():
    low, high, schedule = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), VE(1e-4, 1e4)
    model = box_model(low, high, schedule)
    out = model(torch.tensor([[1 + 1e-4 * 1000]], dtype=F64), 1e-4)  # 1000 sigma from the edge
    # Mills' ratio far out: mean a + 1 / a - 2 / a^3, variance 1 / a^2 - 6 / a^4
    assert -out.scaled_score.item() == pytest.approx(1000 + 1e-3 - 2e-9, rel=1e-13)
    assert out.c.item() == pytest.approx(1e-6 - 6e-12, rel=1e-9)
    narrow = model(torch.tensor([[0.5]], dtype=F64), 1e4)  # a box of 1e-4 sigma
    assert narrow.c.item() == pytest.approx(1e-8 / 12, rel=1e-8)
    assert model(torch.tensor([[0.5]], dtype=F64), 1e-3).c.item() == pytest.approx(1.0, rel=1e-14)


def test_a_box_along_a_schedule_has_its_alpha():
    low, high = torch.tensor([-1.0], dtype=F64), torch.tensor([2.0], dtype=F64)
    sigma, x = torch.tensor([0.3, 0.8], dtype=F64), torch.tensor([[0.4], [1.3]], dtype=F64)
    alpha = (1 - sigma.square()).sqrt()
    along = box_model(low, high, VP())(x, sigma)
    plain = box_model(low, high, VE(1e-3, 10.0))(x / alpha.unsqueeze(1), sigma / alpha)
    torch.testing.assert_close(along.scaled_score, plain.scaled_score, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(along.c, plain.c, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_gaussian_is_that_of_the_density(diagonal):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, dtype=F64, generator=generator)
    covariance = root @ root.mT + 0.1 * torch.eye(4, dtype=F64)
    if diagonal:
        covariance = covariance.diagonal().diag()
    mean = torch.randn(4, dtype=F64, generator=generator)
    x, sigma = torch.randn(3, 4, dtype=F64, generator=generator), 0.6
    alpha = math.sqrt(1 - sigma**2)
    given = covariance.diagonal() if diagonal else covariance
    shaped = given.reshape(2, 2) if diagonal else given
    scores = gaussian_model(mean.reshape(2, 2), shaped, VP())(x.reshape(3, 2, 2), sigma)
    found, exact = posterior(x.reshape(3, 2, 2), scores, sigma, alpha), Gaussian(mean, covariance)
    torch.testing.assert_close(
        found.mean.flatten(1), exact.posterior_mean(x, sigma, alpha), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        found.covariance.dense(), exact.posterior_covariance(x, sigma, alpha), rtol=1e-9, atol=1e-9
    )
    assert (scores.factor is None) == diagonal


def test_what_is_refused():
    zero, one = torch.zeros(2), torch.ones(2)
    for call, text in (
        (lambda: box_model(one, zero, VE()), "box_model: low must be below high"),
        (lambda: box_model(zero, one.double(), VE()), "box_model: high must have dtype"),
        (lambda: box_model(zero, one, VE())(torch.ones(1, 3), 1.0), "box_model: x must have shape"),
        (lambda: gaussian_model(zero, zero, VE()), "gaussian_model: covariance must be positive"),
        (lambda: gaussian_model(zero, torch.ones(3), VE()), "covariance must have shape"),
        (
            lambda: gaussian_model(zero, torch.tensor([[1.0, 0.5], [0.0, 1.0]]), VE()),
            "covariance must be symmetric",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="schedule must be"):
        box_model(zero, one, 3)
