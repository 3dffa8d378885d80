"""Posteriors as mixtures: exact on a Gaussian, two modes found, moments and densities densely."""

from __future__ import annotations

import math

import pytest
import torch

from hos_ext import DPLR, MLP, Posterior, Scores, normal, posterior
from hos_ext.densities import GaussianMixture
from hos_ext.diffusion import PosteriorMixture, posterior_mixture

F64 = torch.float64
POINTS = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, 2.5]], dtype=F64)
TRUTH = GaussianMixture(
    torch.tensor([0.3, 0.4, 0.3], dtype=F64), POINTS, 0.05 * torch.eye(2, dtype=F64).expand(3, 2, 2)
)


def exact(x, sigma):
    """The scores of TRUTH in noise; a symmetric 2 x 2 matrix is a diagonal and a signed column."""
    level = float(sigma.flatten()[0]) if torch.is_tensor(sigma) else float(sigma)
    noisy = TRUTH.noisy(level)
    kappa = torch.eye(2, dtype=F64) + level**2 * noisy.hessian(x)
    off = kappa[:, 0, 1]
    column = torch.stack([off.abs().sqrt(), off.abs().sqrt() * off.sign()], 1)
    c = torch.stack([kappa[:, 0, 0], kappa[:, 1, 1]], 1) - off.abs().unsqueeze(1)
    return Scores(level * noisy.score(x), c, column.unsqueeze(2))


def made(batch=3, count=4, rank=2, sign=None):
    rows = batch * count
    diag = 3 + normal((rows, 6), seed=1, dtype=F64).square()
    factor = 0.5 * normal((rows, 6, rank), seed=2, dtype=F64)
    mean = normal((rows, 2, 3), seed=3, dtype=F64)
    return PosteriorMixture(Posterior(mean, DPLR(diag, factor, sign)), count)


@pytest.mark.parametrize("sign", [None, torch.tensor([1.0, -1.0], dtype=F64)])
def test_moments_are_those_of_the_dense_mixture(sign):
    mixture = made(sign=sign)
    means = mixture.components.mean.reshape(3, 4, 6)
    dense = mixture.components.covariance.dense().reshape(3, 4, 6, 6)
    mean = means.mean(1)
    apart = means - mean.unsqueeze(1)
    covariance = dense.mean(1) + (apart.unsqueeze(3) * apart.unsqueeze(2)).mean(1)
    assert torch.allclose(mixture.mean.flatten(1), mean)
    std = covariance.diagonal(dim1=1, dim2=2).sqrt()
    assert torch.allclose(mixture.std.flatten(1), std)
    found = mixture.gaussian()
    assert torch.allclose(found.covariance.dense(), covariance)
    assert torch.equal(found.mean, mixture.mean)
    assert repr(mixture) == "PosteriorMixture(3 x 4 x (2, 3), rank 2)"


def test_the_density_is_that_of_torch():
    mixture, x0 = made(), normal((3, 2, 3), seed=9, dtype=F64)
    dense = mixture.components.covariance.dense().reshape(3, 4, 6, 6)
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3, 4, dtype=F64)),
        torch.distributions.MultivariateNormal(mixture.components.mean.reshape(3, 4, 6), dense),
    )
    assert torch.allclose(mixture.log_prob(x0), law.log_prob(x0.flatten(1)))


def test_draws_have_the_moments_of_the_mixture_and_its_components_in_turn():
    mixture = made()
    draws = mixture.sample(40_000, seed=0).flatten(2)
    assert torch.allclose(draws.mean(0), mixture.mean.flatten(1), atol=0.05)
    assert torch.allclose(draws.std(0), mixture.std.flatten(1), rtol=0.03)
    assert torch.equal(mixture.sample(3, seed=0), mixture.sample(6, seed=0)[:3])
    second = mixture.sample(4, seed=0)[1]
    own = mixture.components.sample(1, seed=0)[0].reshape(3, 4, 2, 3)[:, 1]
    assert torch.equal(second, own)


def test_on_a_gaussian_its_moments_are_the_posteriors():
    """Data N(0, I): total mean and covariance are those of x0 given x, up to 4,000 draws."""

    def model(x, sigma):
        level = sigma.reshape(-1, 1) if torch.is_tensor(sigma) else sigma
        return Scores(-level / (1 + level**2) * x, (1 / (1 + level**2)) * torch.ones_like(x))

    x = normal((2, 3), seed=0, dtype=F64)
    found = posterior_mixture(model, x, 1.5, middle=0.5, n_components=4000, n_steps=3, seed=1)
    law = posterior(x, model(x, torch.tensor([1.5, 1.5], dtype=F64)), 1.5)
    assert torch.allclose(found.mean, law.mean, atol=0.05)
    assert torch.allclose(found.std, law.std, rtol=0.03)
    dense = found.gaussian().covariance.dense()
    assert torch.allclose(dense, law.covariance.dense(), atol=0.05)


def test_the_modes_of_a_posterior_are_found_with_their_weights():
    """Density of x0 given x against the exact one, where N(m, C) is far off."""
    sigma, x = 1.8, torch.tensor([[0.3, 1.0], [0.0, 0.0], [1.0, 1.5]], dtype=F64)
    found = posterior_mixture(exact, x, sigma, middle=0.35, n_components=300, n_steps=30, seed=0)
    weight = TRUTH.weights.log() - (x.unsqueeze(1) - POINTS).square().sum(2) / (
        2 * (sigma**2 + 0.05)
    )
    truth = weight.softmax(1)
    nearest = torch.cdist(found.components.mean, POINTS).argmin(1).reshape(3, -1)
    share = torch.stack([(nearest == k).double().mean(1) for k in range(3)], 1)
    assert torch.allclose(share, truth, atol=0.1)
    # kappa of x0 given x at the data: log q(x0 | x) of a draw, mean over exact draws.
    one = posterior(x, exact(x, sigma), sigma)
    gain = []
    for k in range(3):
        x0 = POINTS[k].expand(3, 2).contiguous()
        gain.append(found.log_prob(x0) - one.log_prob(x0))
    assert float((truth * torch.stack(gain, 1)).sum(1).min()) > 0.5


def test_rows_and_conditions_do_not_depend_on_chunks():
    model = MLP((4,), 2, width=8, num_classes=3).double().eval()
    torch.nn.init.normal_(model.c.bias, std=0.1)
    x, label = normal((5, 4), seed=0, dtype=F64), torch.tensor([0, 1, 2, 1, 0])
    options = {"middle": 0.4, "n_components": 3, "n_steps": 2, "seed": 7}
    whole = posterior_mixture(model, x, 0.8, model_kwargs={"label": label}, **options)
    assert whole.components.mean.shape == (15, 4)
    pieces = posterior_mixture(
        model, x, 0.8, model_kwargs={"label": label}, chunk_size=4, **options
    )
    assert torch.allclose(whole.components.mean, pieces.components.mean, atol=1e-12)
    rest = posterior_mixture(
        model, x[2:], 0.8, model_kwargs={"label": label[2:]}, first=2, **options
    )
    assert torch.allclose(whole.components.mean[6:], rest.components.mean, atol=1e-12)
    other = posterior_mixture(model, x, 0.8, model_kwargs={"label": 2 - label}, **options)
    assert not torch.allclose(whole.components.mean, other.components.mean)
    empty = posterior_mixture(model, x[:0], 0.8, model_kwargs={"label": label[:0]}, **options)
    assert len(empty) == 0


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"middle": 0.8}, ValueError, r"middle must be below sigma, 0\.8, got 0\.8"),
        ({"middle": -1.0}, ValueError, "middle must be finite and > 0"),
        ({"n_components": 0}, ValueError, "n_components must be"),
        ({"n_steps": 1.5}, TypeError, "n_steps must be"),
        ({"x": torch.zeros(4, dtype=F64)}, ValueError, "x must have shape"),
        ({"model": 3}, TypeError, "model must be"),
        ({"model_kwargs": {"label": torch.zeros(2)}}, ValueError, "must have 3 rows like x"),
    ],
)
def test_what_does_not_fit_is_refused(change, kind, message):
    given = {"model": exact, "x": torch.zeros(3, 2, dtype=F64), "sigma": 0.8} | change
    with pytest.raises(kind, match=f"^posterior_mixture: .*{message}"):
        posterior_mixture(given.pop("model"), given.pop("x"), given.pop("sigma"), **given)


def test_a_point_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"^PosteriorMixture.log_prob: x0 must have shape"):
        made().log_prob(torch.zeros(2, 2, 3, dtype=F64))
    assert math.isfinite(float(made().log_prob(torch.zeros(3, 2, 3, dtype=F64)).sum()))
