"""Classifier-free guidance against Gaussians, whose guided density is a Gaussian again."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from hos_ext import MLP, VE, ModelScore, SecondOrderHead
from hos_ext.diffusion import log_likelihood, prior, probability_flow_ode, second_order_reverse
from hos_ext.nn import ClassifierFree
from hos_ext.scores import Scores
from hos_ext.tweedie import posterior

F64, D, RANK = torch.float64, 4, 2
# Class 0 is wide and class 1 narrow; class 2 is no class, wider than both.
SPREAD = torch.tensor([0.8, 0.05, 1.5], dtype=F64)
MEANS = torch.tensor([[1.0, -1, 0, 2], [-2, 0.5, 1, 0], [0, 0, 0.3, 1]], dtype=F64)
COLUMNS = torch.linspace(-1, 1, 3 * D * RANK, dtype=F64).reshape(3, D, RANK).sin()
X = torch.linspace(-2, 3, 6 * D, dtype=F64).reshape(6, D)
LABEL = torch.tensor([0, 1, 1, 0, 1, 0])
EYE = torch.eye(D, dtype=F64)


def exact(x: Tensor, sigma: Tensor | float, *, label: Tensor | None = None) -> Scores:
    """N(m, a I + W W^T) under noise: kappa = a / t I + sigma^2 / t W K^-1 W^T, t = a + sigma^2."""
    label = torch.full((len(x),), 2) if label is None else label
    level = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x))
    a, w = SPREAD[label], COLUMNS[label]
    t = a + level**2
    inner = torch.linalg.inv(t[:, None, None] * torch.eye(RANK, dtype=F64) + w.mT @ w)
    gap = x - MEANS[label]
    along = (w @ (inner @ (w.mT @ gap.unsqueeze(2)))).squeeze(2)
    factor = w @ torch.linalg.cholesky(inner) * (level / t.sqrt())[:, None, None]
    c = (a / t).unsqueeze(1).expand_as(x)
    return Scores(-level.unsqueeze(1) * (gap - along) / t.unsqueeze(1), c, factor)


def precision(label: int, sigma: float) -> Tensor:
    """Of the noisy class, dense."""
    w = COLUMNS[label]
    return torch.linalg.inv((SPREAD[label] + sigma**2) * EYE + w @ w.mT)


def dense(scores: Scores) -> Tensor:
    """kappa = diag(c) + F diag(sign) F^T."""
    sign = torch.ones(scores.factor.shape[2], dtype=F64) if scores.sign is None else scores.sign
    return torch.diag_embed(scores.c) + (scores.factor * sign) @ scores.factor.mT


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.3, 1.0, 1.7, 6.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_score_and_hessian_are_those_of_the_guided_gaussian(scale, per_row):
    sigmas = torch.linspace(0.2, 1.5, 6, dtype=F64) if per_row else torch.full((6,), 0.6, dtype=F64)
    scores = ClassifierFree(exact, scale)(X, sigmas if per_row else 0.6, label=LABEL)
    kappa = dense(scores)
    for row, (k, sigma) in enumerate(zip(LABEL.tolist(), sigmas.tolist(), strict=True)):
        own, common = precision(k, sigma), precision(2, sigma)
        hessian = -scale * own - (1 - scale) * common
        score = -scale * own @ (X[row] - MEANS[k]) - (1 - scale) * common @ (X[row] - MEANS[2])
        close = {"atol": 1e-10, "rtol": 1e-10}
        torch.testing.assert_close(scores.scaled_score[row], sigma * score, **close)
        torch.testing.assert_close(kappa[row], EYE + sigma**2 * hessian, **close)
        # It is the Jacobian of what the model gives, too.
        guided = ClassifierFree(exact, scale)

        def score_of(x, sigma=sigma, guided=guided, row=row):
            out = guided(x.unsqueeze(0), sigma, label=LABEL[row : row + 1])
            return out.scaled_score[0] / sigma

        jacobian = torch.func.jacrev(score_of)(X[row])
        torch.testing.assert_close(jacobian, hessian, **close)


def test_signs_of_the_model_are_kept_and_turned():
    def signed(x, sigma, *, label=None):
        factor = torch.ones(len(x), D, 3, dtype=F64) * (2 if label is None else 1)
        return Scores(x, torch.ones_like(x), factor, torch.tensor([1.0, -1.0, 1.0]).double())

    scores = ClassifierFree(signed, 3.0)(X, 1.0, label=LABEL)
    assert scores.sign.tolist() == [1, -1, 1, -1, 1, -1]
    torch.testing.assert_close(scores.factor[..., 0], torch.full((6, D), 3.0**0.5, dtype=F64))
    torch.testing.assert_close(scores.factor[..., 3], torch.full((6, D), 8.0**0.5, dtype=F64))


def test_what_is_negative_stays_so_and_is_refused_where_a_covariance_is_asked_for():
    """The narrow class in a wide one: -s2 of the guided density passes 1 / sigma^2."""
    guided = ClassifierFree(exact, 6.0)
    found = posterior(X, guided(X, 0.6, label=LABEL), 0.6)
    wide, narrow = LABEL == 0, LABEL == 1
    assert bool((torch.linalg.eigvalsh(found.covariance.dense()[narrow]) < 0).any(1).all())
    assert bool(found.std[narrow].isnan().any())
    assert bool(found.mean.isfinite().all())
    with pytest.raises(ValueError, match=r"^Posterior\.sample: diag must be > 0"):
        found.sample(1, seed=0)
    start = prior((6, D), VE(0.1, 5.0), seed=0, dtype=F64)
    options = {"n_steps": 20, "model_kwargs": {"label": LABEL}}
    with pytest.raises(ValueError, match=r"at least 0|positive definite"):
        second_order_reverse(guided, start, VE(0.1, 5.0), seed=0, **options)
    assert bool(probability_flow_ode(guided, start, VE(0.1, 5.0), **options).isfinite().all())
    mixed = posterior(X, ClassifierFree(exact, 0.5)(X, 0.6, label=LABEL), 0.6)
    assert bool(mixed.covariance.is_positive_definite().all())
    assert bool(wide.any())


def test_the_learned_trace_is_that_of_the_guided_score():
    options = {"n_steps": 10, "model_kwargs": {"label": LABEL}}
    guided = ClassifierFree(exact, 2.5)
    learned = log_likelihood(guided, X, VE(0.2, 20.0), trace="learned", **options)
    checked = log_likelihood(guided, X, VE(0.2, 20.0), trace="exact", **options)
    torch.testing.assert_close(learned, checked, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_ends_are_the_model_itself_called_once(scale):
    calls = []

    def counted(x, sigma, **given):
        calls.append(given)
        return exact(x, sigma, **given)

    found = ClassifierFree(counted, scale)(X, 0.6, label=LABEL)
    wanted = exact(X, 0.6, label=LABEL) if scale else exact(X, 0.6)
    assert torch.equal(found.scaled_score, wanted.scaled_score)
    assert torch.equal(found.c, wanted.c)
    assert len(calls) == 1


def test_unconditional_replaces_what_it_names_and_leaves_the_rest():
    seen = []

    def model(x, sigma, *, label, text, scale):
        seen.append((label, text, scale))
        return Scores(x, x)

    nothing = torch.tensor([[7.0, 7.0]])
    guided = ClassifierFree(model, 2.0, {"label": None, "text": nothing})
    text = torch.arange(12.0).reshape(6, 2)
    guided(X, 1.0, label=LABEL, text=text, scale=3)
    assert torch.equal(seen[0][0], LABEL)
    assert torch.equal(seen[0][1], text)
    assert seen[1][0] is None
    assert torch.equal(seen[1][1], nothing.expand(6, 2))
    assert seen[0][2] == seen[1][2] == 3


def test_networks_of_first_and_second_order_are_guided():
    torch.manual_seed(0)
    network = MLP((D,), 1, width=8, num_classes=3).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    guided = ClassifierFree(network, 2.0)
    assert guided.conditions == ("label",)
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    scores = guided(X, 0.5, label=label)
    own, bare = network(X, 0.5, label=label), network(X, 0.5)
    torch.testing.assert_close(scores.scaled_score, 2 * own.scaled_score - bare.scaled_score)
    torch.testing.assert_close(dense(scores), 2 * dense(own) - dense(bare))
    assert len(list(guided.parameters())) == len(list(network.parameters()))

    def net(x, t, label=None):
        return x if label is None else x * label.unsqueeze(1)

    first = ClassifierFree(ModelScore(net, VE(0.1, 5.0), "score"), 3.0)
    found = first(X, 0.5, label=label)
    torch.testing.assert_close(found, 0.5 * (3 * X * label.unsqueeze(1) - 2 * X))
    head = SecondOrderHead(first, MLP((D,), 1, width=8, given_score=True).double())
    assert torch.equal(head(X, 0.5, label=label).scaled_score, found)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ClassifierFree(3, 1.0), TypeError, "model must be callable, got int"),
        (lambda: ClassifierFree(exact, "2"), TypeError, "scale must be a number, got str"),
        (lambda: ClassifierFree(exact, float("nan")), ValueError, "scale must be finite, got nan"),
        (
            lambda: ClassifierFree(exact, 2.0, {"text": torch.zeros(3, 2)}),
            ValueError,
            "unconditional['text'] must have 1 rows like a sample, got shape (3, 2)",
        ),
        (
            lambda: ClassifierFree(exact, 2.0)(X, 0.5, label=LABEL[:4]),
            ValueError,
            "model_kwargs['label'] must have 6 rows like x, got shape (4,)",
        ),
        (
            lambda: ClassifierFree(lambda x, s, **_: [x], 2.0)(X, 0.5, label=LABEL),
            TypeError,
            "model must return Scores, or a tensor, at both calls, got list",
        ),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=f"^{re.escape('ClassifierFree: ' + message)}$"):
        make()
