"""New samples from noise: their law in closed form, chunks, conditions, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from hos_ext import MLP, VE, VP, Scores
from hos_ext.densities import GaussianMixture
from hos_ext.diffusion import GENERATE_METHODS, generate
from hos_ext.linalg import DPLR
from hos_ext.sampling import law_error

F64 = torch.float64
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=F64),
    torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=F64),
    torch.stack([0.3 * torch.eye(2), 0.1 * torch.eye(2)]).double(),
)


def of_mixture(x, sigma, shift=0.0):
    """The exact scores of a mixture; its Hessian is a diagonal and one signed column in 2 d."""
    level = float(sigma[0])
    noisy = MIXTURE.noisy(level)
    moved = x.double() - shift
    hessian = torch.eye(2, dtype=F64) + level**2 * noisy.hessian(moved)
    # A symmetric [[a, b], [b, d]] is diag(a - |b|, d - |b|) + u u^T with u^2 = |b|.
    off = hessian[:, 0, 1]
    column = torch.stack([off.abs().sqrt(), off.abs().sqrt() * off.sign()], 1)
    c = torch.stack([hessian[:, 0, 0], hessian[:, 1, 1]], 1) - off.abs().unsqueeze(1)
    scaled = level * noisy.score(moved)
    return Scores(scaled.to(x), c.to(x), column.unsqueeze(2).to(x))


def first_order(x, sigma):
    scores = of_mixture(x, sigma)
    return Scores(scores.scaled_score, None, None)


@pytest.mark.parametrize("method", ["heun", "euler", "sde"])
def test_the_law_is_that_of_the_data(method):
    steps = 200 if method == "euler" else 60
    x0 = generate(
        first_order, (3000, 2), VE(0.02, 20.0), method=method, n_steps=steps, seed=0, dtype=F64
    )
    truth = MIXTURE.sample(3000, seed=1)
    error = law_error(x0, truth)
    assert error.spread == pytest.approx(1, abs=0.05)
    assert abs(error.energy_distance) < 3e-3
    assert float((x0[:, 0] < 0).double().mean()) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(("last", "width"), [("none", 1.04), ("sample", 1.0), ("mean", 1 / 1.04)])
def test_second_order_steps_are_exact_on_a_gaussian_and_so_is_each_end(last, width):
    """Data N(m, 4): x at t_min has variance 4 + s^2, its mean x0 has 16 / (4 + s^2)."""
    schedule, mean = VE(0.4, 2.0), 3.0

    def model(x, sigma):
        level = sigma.unsqueeze(1)
        c = 4 / (4 + level**2)
        return Scores(-level * (x - mean) / (4 + level**2), c.expand_as(x))

    x0 = generate(
        model,
        (40_000, 2),
        schedule,
        method="second-order",
        n_steps=3,
        last=last,
        data_mean=mean,
        data_std=2.0,
        seed=0,
        dtype=F64,
    )
    assert x0.mean().item() == pytest.approx(mean, abs=0.02)
    assert x0.var().item() == pytest.approx(4 * width, rel=0.015)


def test_settling_brings_a_wrong_prior_to_the_law():
    """The schedule ends at a sigma of the size of the data: the marginal there is no Gaussian."""
    options = {"n_steps": 40, "method": "sde", "seed": 0, "dtype": F64, "data_std": 0.0}
    truth = MIXTURE.sample(3000, seed=1)
    errors = {
        steps: law_error(
            generate(first_order, (3000, 2), VE(0.02, 1.0), settle=steps, **options), truth
        )
        for steps in (0, 200)
    }
    assert errors[0].energy_distance > 0.02
    assert abs(errors[200].energy_distance) < 0.005


@pytest.mark.parametrize("method", GENERATE_METHODS)
@pytest.mark.parametrize("last", ["mean", "sample"])
def test_draws_are_the_same_in_any_chunks_and_from_any_first(method, last):
    options = {"n_steps": 4, "method": method, "last": last, "settle": 3, "seed": 5, "dtype": F64}
    schedule = VE(0.1, 5.0)

    def model(x, sigma):
        level = sigma.unsqueeze(1)
        c = 1 / (1 + level**2)
        return Scores(-level * c * x, c.expand_as(x))

    whole = generate(model, (7, 3), schedule, **options)
    for size in (1, 3):
        assert torch.equal(generate(model, (7, 3), schedule, chunk_size=size, **options), whole)
    assert torch.equal(generate(model, (4, 3), schedule, first=3, **options), whole[3:])
    assert not torch.equal(generate(model, (7, 3), schedule, **options | {"seed": 6}), whole)


@pytest.mark.parametrize("method", GENERATE_METHODS)
def test_each_row_has_its_own_condition(method):
    """Data N(3 label, I)."""

    def model(x, sigma, label):
        assert len(label) == len(x)
        level = sigma.unsqueeze(1)
        c = 1 / (1 + level**2)
        return Scores(-level * c * (x - 3.0 * label.unsqueeze(1)), c.expand_as(x))

    label = torch.arange(600) % 3
    x0 = generate(
        model,
        (600, 2),
        VE(0.05, 30.0),
        method=method,
        n_steps=60,
        settle=2,
        seed=0,
        dtype=F64,
        chunk_size=130,
        model_kwargs={"label": label},
    )
    for k in range(3):
        assert x0[label == k].mean().item() == pytest.approx(3.0 * k, abs=0.25)


def test_a_preserving_schedule_starts_at_the_scaled_mean():
    schedule = VP()

    def model(x, sigma):
        level = sigma.unsqueeze(1)
        alpha = (1 - level**2).sqrt()
        variance = alpha**2 * 0.25 + level**2
        scaled = -level * (x - 2 * alpha) / variance
        return Scores(scaled, 1 - level**2 / variance.expand_as(x))

    options = {"n_steps": 60, "data_mean": 2.0, "data_std": 0.5, "seed": 0, "dtype": F64}
    x0 = generate(model, (4000, 2), schedule, **options)
    assert x0.mean().item() == pytest.approx(2, abs=0.03)
    assert x0.std().item() == pytest.approx(0.5, rel=0.05)


def test_no_rows_and_a_seed_that_is_drawn():
    assert generate(of_mixture, (0, 2), VE(0.1, 5.0), n_steps=2).shape == (0, 2)
    torch.manual_seed(0)
    one, other = (generate(first_order, (3, 2), VE(0.1, 5.0), n_steps=2) for _ in range(2))
    assert not torch.equal(one, other)
    torch.manual_seed(0)
    assert torch.equal(generate(first_order, (3, 2), VE(0.1, 5.0), n_steps=2), one)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"method": "gibbs"}, ValueError, "method must be one of 'heun', 'euler', 'sde', 'second-"),
        ({"last": "all"}, ValueError, "last must be one of 'mean', 'sample', 'none', got 'all'"),
        ({"n_steps": 0}, ValueError, "n_steps must be at least 1, got 0"),
        ({"settle": -1}, ValueError, "settle must be"),
        ({"data_mean": math.nan}, ValueError, "data_mean must be a finite number or a tensor"),
        ({"data_mean": torch.zeros(3, dtype=F64)}, ValueError, "data_mean must have shape"),
        ({"data_std": -1.0}, ValueError, "data_std must be finite and >= 0, got -1"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"dtype": torch.float16}, ValueError, "dtype must be float32, float64, got"),
        ({"model_kwargs": {"label": torch.zeros(2)}}, ValueError, r"model_kwargs\['label'\] must"),
        ({"model": 3}, TypeError, "model must be callable"),
        ({"shape": 5}, TypeError, "shape must be"),
        ({"shape": (5,)}, ValueError, r"shape must be \(B, \*dims\), got \(5,\)"),
        ({"shape": (-5, 2)}, ValueError, "shape"),
        ({"schedule": 5}, TypeError, "schedule must be"),
    ],
)
def test_what_is_refused(changed, error, message):
    given = {"model": of_mixture, "shape": (4, 2), "schedule": VE(0.1, 5.0), "n_steps": 2}
    given |= {"dtype": F64} | changed
    words = [given.pop(name) for name in ("model", "shape", "schedule")]
    with pytest.raises(error, match=f"^generate: {message}"):
        generate(*words, **given)


def test_second_order_names_what_the_model_lacks():
    with pytest.raises((TypeError, ValueError), match=r"^generate: model must give c"):
        generate(first_order, (4, 2), VE(0.1, 5.0), n_steps=2, method="second-order")


def test_the_posterior_of_the_mixture_is_its_covariance():
    """What the tests above give as second-order scores is right."""
    x, level = MIXTURE.sample(5, seed=3), 0.7
    scores = of_mixture(x, torch.full((5,), level))
    found = DPLR.of(scores.c, scores.factor, None).dense() * level**2
    torch.testing.assert_close(found, MIXTURE.posterior_covariance(x, level))


def test_the_dtype_is_that_of_the_model_unless_said():
    model = MLP((3,), 1, width=8)
    for dtype in (torch.float32, F64):
        found = generate(model.to(dtype), (2, 3), VE(0.1, 1.0), n_steps=2, settle=1, seed=0)
        assert found.dtype == dtype
    with pytest.raises(ValueError, match=r"x must be torch\.float64 like the parameters"):
        generate(model, (2, 3), VE(0.1, 1.0), n_steps=2, seed=0, dtype=torch.float32)
