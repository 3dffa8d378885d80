"""Many observations from a model of one, against the closed form of Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hos_ext import VP, Scores
from hos_ext.diffusion import (
    box_model,
    composed,
    gaussian_model,
    log_likelihood,
    prior,
    probability_flow_ode,
    reverse_sde,
    second_order_reverse,
)
from hos_ext.tweedie import posterior, product_of_posteriors

F64 = torch.float64
D, N = 5, 10


class Linear:
    """theta ~ N(mean, S), y = A theta + noise: every law is Gaussian.

    Args:
        dense: S, A and the law without an observation have entries off the diagonal.
    """

    def __init__(self, dense: bool, dims: int = 3) -> None:
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=F64, generator=generator)

        root = draw(D, D)
        self.S = root @ root.mT / D + 0.2 * torch.eye(D, dtype=F64)
        if not dense:
            self.S = self.S.diagonal().diag()
        self.mean, self.A = draw(D), draw(dims, D)
        if not dense:
            self.A = torch.eye(D, dtype=F64)[:dims] * 1.5
        self.noise = 0.1 + draw(dims).square()
        self.y = draw(N, dims)
        self.rank = D if dense else 0

    def law_of(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of theta given observations (n, dims): the oracle."""
        prior_precision = torch.linalg.inv(self.S)
        precision = prior_precision + len(y) * self.A.mT / self.noise @ self.A
        pull = prior_precision @ self.mean + (self.A.mT / self.noise @ y.mT).sum(-1)
        covariance = torch.linalg.inv(precision)
        return covariance @ pull, covariance

    def scores(self, law: tuple[Tensor, Tensor], x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """sigma s1 and kappa, dense, of x = alpha theta + sigma z at one level."""
        mean, covariance = law
        alpha = (1 - sigma**2).sqrt()
        noisy = torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(D, dtype=F64))
        return -sigma * (x - alpha * mean) @ noisy, alpha**2 * covariance @ noisy

    def model(self, x: Tensor, sigma: Tensor | float, *, y: Tensor) -> Scores:
        """Of one observation for each row, by a factor of D columns."""
        value, axes = torch.linalg.eigh(self.law_of(y[:1])[1])  # the same for every y
        pull = torch.linalg.inv(self.S) @ self.mean + (y / self.noise) @ self.A
        s = torch.as_tensor(sigma, dtype=F64).expand(len(x)).unsqueeze(1)
        alpha = (1 - s**2).sqrt()
        error = x.flatten(1) - alpha * (pull @ (axes * value) @ axes.mT)
        noisy = alpha**2 * value + s**2
        score = (-s * ((error @ axes) / noisy) @ axes.mT).reshape(x.shape)
        kappa = alpha**2 * value / noisy
        if not self.rank:
            return Scores(score, ((kappa.unsqueeze(1) * axes.square()).sum(-1)).reshape(x.shape))
        c = kappa.amin(-1, keepdim=True) / 2
        factor = axes * (kappa - c).sqrt().unsqueeze(1)
        return Scores(score, c.expand(-1, D).reshape(x.shape), factor)

    def free(self):
        given = self.S if self.rank else self.S.diagonal()
        return gaussian_model(self.mean, given, VP())


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("widest", [1.0, None])
@pytest.mark.parametrize("dense", [False, True])
def test_ten_observations_of_a_gaussian_are_the_closed_form(dense, widest, sigma):
    law = Linear(dense)
    x = torch.randn(4, D, dtype=F64, generator=torch.Generator().manual_seed(0))
    many = composed(law.model, {"y": law.y}, law.free(), widest=widest)
    level = torch.full((4,), sigma, dtype=F64)
    found = many(x, level)
    score, kappa = law.scores(law.law_of(law.y), x, level[0])
    torch.testing.assert_close(found.scaled_score, score, rtol=1e-10, atol=1e-10)
    own = posterior(torch.zeros_like(x), found, 1.0).covariance  # kappa itself
    torch.testing.assert_close(own.dense(), kappa.expand(4, D, D), rtol=1e-10, atol=1e-10)


def test_it_is_the_product_of_the_posteriors():
    law, sigma = Linear(True), 0.4
    x, alpha = torch.linspace(-1, 1, 3 * D, dtype=F64).reshape(3, D), math.sqrt(1 - 0.4**2)
    level = torch.full((3,), sigma, dtype=F64)
    laws = [posterior(x, law.model(x, level, y=y.expand(3, -1)), sigma, alpha) for y in law.y[:3]]
    none = posterior(x, law.free()(x, level), sigma, alpha)
    one = product_of_posteriors(laws, none)
    other = posterior(x, composed(law.model, {"y": law.y[:3]}, law.free())(x, level), sigma, alpha)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        one.covariance.dense(), other.covariance.dense(), rtol=1e-10, atol=1e-12
    )


def test_draws_have_the_law_of_all_observations():
    law = Linear(True)
    many = composed(law.model, {"y": law.y}, law.free())
    start = prior((300, D), VP(), seed=0, dtype=F64)
    x = second_order_reverse(many, start, VP(), n_steps=12, seed=1, chunk_size=128)
    mean, covariance = law.law_of(law.y)
    white = (x - mean) @ torch.linalg.inv(torch.linalg.cholesky(covariance)).mT
    assert white.mean(0).abs().max() < 4 / math.sqrt(300)
    assert (white.mT @ white / 300 - torch.eye(D)).abs().max() < 0.35


def test_each_sample_may_have_observations_of_its_own_in_any_chunks():
    """Conditions (B, n, ...) by name; others are for all the observations and for the prior."""
    law, seen = Linear(False), []

    def model(x: Tensor, sigma: Tensor, *, y: Tensor, label: Tensor) -> Scores:
        seen.append((len(x), label))
        return law.model(x, sigma, y=y + label.unsqueeze(1))

    def free(x: Tensor, sigma: Tensor, *, label: Tensor) -> Scores:
        return law.free()(x, sigma)

    sets = torch.stack([law.y[:4], law.y[4:8], law.y[2:6]])
    label = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    many = composed(model, ["y"], free)
    x = torch.ones(3, D, dtype=F64)
    level = torch.full((3,), 0.5, dtype=F64)
    found = many(x, level, y=sets, label=label)
    assert seen[0][0] == 12
    assert seen[0][1].tolist() == label.tolist() * 4
    for row in range(3):
        score, _ = law.scores(law.law_of(sets[row] + label[row]), x[row : row + 1], level[0])
        torch.testing.assert_close(found.scaled_score[row : row + 1], score, rtol=1e-9, atol=1e-9)
    options = {"n_steps": 2, "model_kwargs": {"y": sets, "label": label}}
    whole = probability_flow_ode(many, x, VP(), **options)
    cut = probability_flow_ode(many, x, VP(), chunk_size=2, **options)
    torch.testing.assert_close(whole, cut, rtol=1e-12, atol=1e-12)


def test_one_observation_is_the_model_and_the_prior_is_not_asked():
    law = Linear(False)

    def none(x: Tensor, sigma: Tensor) -> Scores:
        raise AssertionError

    x = torch.ones(2, D, dtype=F64)
    found = composed(law.model, {"y": law.y[:1]}, none)(x, 0.5)
    alone = law.model(x, 0.5, y=law.y[:1].expand(2, -1))
    assert torch.equal(found.scaled_score, alone.scaled_score)
    assert torch.equal(found.c, alone.c)


def test_no_samples_are_no_samples():
    law = Linear(True)
    x, level = torch.ones(0, D, dtype=F64), torch.ones(0, dtype=F64)
    shared = composed(law.model, {"y": law.y}, law.free())(x, level)
    named = composed(law.model, ["y"], law.free())(x, level, y=law.y.expand(0, N, -1))
    for found in (shared, named):
        assert found.scaled_score.shape == found.c.shape == (0, D)
        assert found.factor.shape == (0, D, D)


def test_shapes_of_samples_stay():
    law = Linear(True)
    x, level = torch.randn(2, 1, D, dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)
    free = gaussian_model(law.mean.unsqueeze(0), law.S, VP())
    shaped = composed(law.model, {"y": law.y[:3]}, free)(x, level)
    flat = composed(law.model, {"y": law.y[:3]}, law.free())(x.flatten(1), level)
    assert shaped.scaled_score.shape == shaped.c.shape == x.shape
    torch.testing.assert_close(shaped.scaled_score.flatten(1), flat.scaled_score)
    torch.testing.assert_close(shaped.factor, flat.factor)


def two_modes(x: Tensor, sigma: Tensor, *, y: Tensor) -> Scores:
    """Of theta after one observation: N(y, 0.05) or N(-y, 0.05), each of half the weight."""
    s = sigma.reshape(-1, 1)
    alpha = (1 - s**2).sqrt()
    variance = alpha**2 * 0.05 + s**2
    tilt = (alpha * y * x / variance).tanh()
    between = (s * alpha * y / variance).square() * (1 - tilt**2)
    return Scores(-s * (x - alpha * y * tilt) / variance, 1 - s**2 / variance + between)


def test_second_order_steps_find_both_modes_of_ten_observations():
    """What |theta| alone is seen of, in a box: ten observations make the two modes narrower.

    Summed scores, without the precisions, are further off with the same steps.
    """
    schedule, y = VP(), torch.full((10, 1), 0.5)
    free = box_model(-2 * torch.ones(1), 2 * torch.ones(1), schedule)

    def summed(x: Tensor, sigma: Tensor) -> Scores:
        total = sum(two_modes(x, sigma, y=row).scaled_score for row in y)
        return Scores(total - 9 * free(x, sigma).scaled_score, torch.ones_like(x))

    many = composed(two_modes, {"y": y}, free)
    start = prior((1000, 1), schedule, seed=0)
    x = second_order_reverse(many, start, schedule, n_steps=50, seed=1)
    assert x.abs().mean().item() == pytest.approx(0.5, abs=0.01)
    assert x.abs().std().item() == pytest.approx(math.sqrt(0.005), rel=0.12)
    assert 0.45 < (x > 0).double().mean().item() < 0.55
    x = reverse_sde(summed, start, schedule, n_steps=200, seed=1)
    assert abs(x.abs().std().item() / math.sqrt(0.005) - 1) > 0.12


def test_what_is_refused():
    law = Linear(False)
    x, level = torch.ones(2, D, dtype=F64), torch.full((2,), 0.5, dtype=F64)
    free, y = law.free(), law.y

    def bad(field: str, value: object):
        def model(x: Tensor, sigma: Tensor, *, y: Tensor) -> Scores:
            return law.model(x, sigma, y=y).replace(**{field: value})

        return model

    nan = torch.full((2 * N, D), math.nan, dtype=F64)
    for call, error, text in (
        (lambda: composed(3, {"y": y}, free), TypeError, "model must be callable"),
        (lambda: composed(law.model, {"y": y}, None), TypeError, "unconditional must be callable"),
        (lambda: composed(law.model, y, free), TypeError, "observations must be a Mapping or a t"),
        (lambda: composed(law.model, {}, free), ValueError, "must hold at least one name"),
        (lambda: composed(law.model, {"y": y[:0]}, free), ValueError, "n >= 1"),
        (
            lambda: composed(law.model, {"y": 3}, free),
            TypeError,
            r"observations\['y'\] must be a T",
        ),
        (
            lambda: composed(law.model, {"y": y, "z": y[:3]}, free),
            ValueError,
            r"model_kwargs\['z'\] must have 10 rows",
        ),
        (
            lambda: composed(law.model, ["y"], free)(x, level),
            TypeError,
            r"\['y'\] must be a Tensor",
        ),
        (
            lambda: composed(law.model, ["y"], free)(x, level, y=y[:2, 0]),
            ValueError,
            r"model_kwargs\['y'\] must have shape \(2, n, ...\)",
        ),
        (
            lambda: composed(law.model, ["y", "z"], free)(
                x, level, y=torch.ones(2, 3, 1), z=torch.ones(2, 4, 1)
            ),
            ValueError,
            "observations must be as many for each name",
        ),
        (lambda: composed(bad("c", None), {"y": y}, free)(x, level), TypeError, "must have c"),
        (lambda: composed(bad("c", nan), {"y": y}, free)(x, level), ValueError, "must be finite"),
        (
            lambda: composed(bad("c", nan.nan_to_num(-1.0)), {"y": y}, free)(x, level),
            ValueError,
            "covariance of the noise by model must be positive definite",
        ),
        (
            lambda: log_likelihood(
                composed(law.model, {"y": y}, free), x, VP(), n_steps=1, trace="exact"
            ),
            RuntimeError,
            "without derivatives",
        ),
        (
            lambda: composed(law.model, {"y": y}, free)(x, level, y=y[:2]),
            ValueError,
            r"model_kwargs must have other names than observations, got \['y'\]",
        ),
        (lambda: composed(law.model, {"y": y}, free, widest=-1), ValueError, "widest must be"),
    ):
        with pytest.raises(error, match=f"composed: .*{text}"):
            call()
