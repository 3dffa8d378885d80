"""Scores in true units and scaled ones cannot be taken for one another, nor for anything else."""

import re

import pytest
import torch

from hos_ext import (
    MLP,
    SecondOrderHead,
    UnscaledScores,
    langevin_step,
    ops,
    ozaki_step,
    posterior,
    sample,
    score_matching_loss,
)
from hos_ext.densities import Gaussian
from hos_ext.diffusion import annealed_langevin, guided, log_likelihood, reverse_sde
from hos_ext.linalg import ScoreHessian, hessian_of
from hos_ext.losses import order_k_loss, second_moment_loss
from hos_ext.schedules import VE, VP
from hos_ext.scores import DenseScores, MatrixFreeScores
from hos_ext.tweedie import (
    eps_from_score,
    posterior_covariance,
    posterior_mean,
    posterior_moments,
    second_moment,
    v_from_score,
    velocity_from_score,
    x0_from_score,
)
from hos_ext.uncertainty import outlier_score, posterior_from_score

LAW = Gaussian(torch.tensor([0.3, -0.2]).double(), torch.tensor([[2.0, 0.4], [0.4, 1.0]]).double())
SIGMA, ALPHA = 0.6, 0.8
NOISY = LAW.noisy(SIGMA, ALPHA)
X = torch.tensor([[1.0, 2.0], [-0.5, 0.1], [0.0, -1.0]]).double()
S1, S2 = NOISY.score(X), NOISY.hessian(X)
TRUE = UnscaledScores(S1, S2.diagonal(dim1=1, dim2=2))
SCALED = TRUE.scaled(SIGMA)

TAKE_S1 = {
    "posterior_mean": lambda s: posterior_mean(X, s, SIGMA, ALPHA),
    "x0_from_score": lambda s: x0_from_score(X, s, SIGMA, ALPHA),
    "eps_from_score": lambda s: eps_from_score(s, SIGMA),
    "v_from_score": lambda s: v_from_score(X, s, SIGMA, ALPHA),
    "velocity_from_score": lambda s: velocity_from_score(
        X, s, SIGMA, ALPHA, alpha_slope=-1.0, sigma_slope=1.0
    ),
}


@pytest.mark.parametrize("name", TAKE_S1)
def test_s1_may_come_in_what_holds_it(name):
    want = TAKE_S1[name](S1)
    for holder in (TRUE, DenseScores(S1, S2), MatrixFreeScores(S1, hessian_of(TRUE))):
        assert torch.equal(TAKE_S1[name](holder), want)
    if name in ("posterior_mean", "x0_from_score"):
        torch.testing.assert_close(want, LAW.posterior_mean(X, SIGMA, ALPHA))


def call_sample(method):
    return lambda s: sample(lambda x: s, X, method=method, step_size=0.1, n_steps=1)


def head(scaled):
    def made(s):
        net = MLP((2,), 1, given_score=True).double()
        return SecondOrderHead(lambda x, sigma: s, net, scaled=scaled)(X, SIGMA)

    return made


# What is given scaled scores (or true ones) in place of the other, and what it says.
TO_TRUE = r"got Scores \(\.unscaled\(sigma\) has s1 and s2 in true units\)"
TO_SCALED = r"got UnscaledScores \(\.score is s1, and \.scaled\(sigma\) makes Scores\)"
REFUSE_SCALED = {
    **{name: (call, "score must be a Tensor") for name, call in TAKE_S1.items()},
    "second_moment": (
        lambda s: second_moment(X, s, TRUE.diag, None, SIGMA),
        "score must be a Tensor",
    ),
    "posterior_covariance": (
        lambda s: posterior_covariance(s, None, SIGMA),
        "diag must be a Tensor",
    ),
    "langevin_step": (lambda s: langevin_step(X, s, 0.1, seed=0), "score must be a Tensor"),
    "ozaki_step": (lambda s: ozaki_step(X, s, TRUE.diag, 0.1, seed=0), "score must be a Tensor"),
    "dsm_loss": (lambda s: ops.dsm_loss(s, X, SIGMA), "score must be a Tensor"),
    "d2sm_loss": (
        lambda s: ops.d2sm_loss(s, TRUE.diag, None, X, SIGMA),
        "score must be a Tensor",
    ),
    "sample": (call_sample("langevin"), "score from score_fn must be a tensor"),
    "sample ": (call_sample("ozaki"), "score_fn must return UnscaledScores"),
    "hessian_of": (hessian_of, "scores must hold scores"),
    "second_moment_loss": (
        lambda s: second_moment_loss(X, X, s, S2, SIGMA),
        "score must be a Tensor",
    ),
}
REFUSE_TRUE = {
    "posterior": (lambda s: posterior(X, s, SIGMA), "scores must be a Scores"),
    "outlier_score": (outlier_score, "scores must be a Scores"),
    "score_matching_loss": (
        lambda s: score_matching_loss(lambda x, sigma: s, X, SIGMA, seed=0),
        "model must return Scores",
    ),
    "reverse_sde": (
        lambda s: reverse_sde(lambda x, sigma: s, X, VP(), n_steps=2, seed=0),
        "model must return Scores",
    ),
    "log_likelihood": (
        lambda s: log_likelihood(lambda x, sigma: s, X, VP(), n_steps=2),
        "model must return Scores",
    ),
    "annealed_langevin": (
        lambda s: annealed_langevin(lambda x, sigma: s, X, [0.5], n_steps=1, seed=0),
        "model must return Scores",
    ),
    "SecondOrderHead": (head(scaled=True), "score from score_model must be a Tensor"),
}


@pytest.mark.parametrize("name", REFUSE_SCALED)
def test_scaled_scores_are_refused_for_true_ones_with_the_way_out(name):
    call, rule = REFUSE_SCALED[name]
    with pytest.raises(TypeError, match=rf"^{name.strip()}: {rule}.*, {TO_TRUE}"):
        call(SCALED)


@pytest.mark.parametrize("name", REFUSE_TRUE)
def test_true_scores_are_refused_for_scaled_ones_with_the_way_out(name):
    call, rule = REFUSE_TRUE[name]
    with pytest.raises(TypeError, match=rf"^{name}: {rule}.*, {TO_SCALED}"):
        call(TRUE)


def test_score_functions_that_return_scaled_scores_are_refused():
    for call, name in (
        (lambda: ScoreHessian(lambda x: SCALED, X), "ScoreHessian"),
        (lambda: posterior_from_score(lambda x: SCALED, X, SIGMA, rank=1), "posterior_from"),
    ):
        with pytest.raises(TypeError, match=rf"^{name}.*{TO_TRUE}"):
            call()


@pytest.mark.parametrize("given", [TRUE, SCALED], ids=["true", "scaled"])
def test_a_record_passes_for_no_pair(given):
    """A tuple of tensors may mean several points, several orders, or two functions."""
    for call in (
        lambda: ops.assemble_hessian(given, None),
        lambda: posterior_moments(X, given, SIGMA),
        lambda: order_k_loss(3, X, given, X, SIGMA),
        lambda: guided(lambda x, sigma: SCALED, X, given, 0.1, VP()),
        lambda: VE(given),
    ):
        with pytest.raises(TypeError, match=re.compile("must")):
            call()


def test_a_head_takes_true_scores_where_it_is_told_so():
    want = head(scaled=False)(S1).scaled_score
    assert torch.equal(head(scaled=False)(TRUE).scaled_score, want)
    assert torch.equal(head(scaled=False)(SCALED).scaled_score, SCALED.scaled_score)
