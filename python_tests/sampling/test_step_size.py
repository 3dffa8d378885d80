"""Step sizes: the known optimum of an autoregression, the acceptance asked for, and every error."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from hos_ext import UnscaledScores
from hos_ext.densities import GaussianMixture
from hos_ext.sampling import adapt_step_size, method_names, sample, search_step_size

ADJUSTED = method_names(adjusted=True)

F64 = torch.float64


def normal_score(x: Tensor) -> Tensor:
    return -x


def normal_scores(x: Tensor) -> UnscaledScores:
    return UnscaledScores(-x, -torch.ones_like(x))


@pytest.fixture
def init() -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


def test_search_finds_the_step_that_forgets_at_once(init):
    """On N(0, I) a Langevin step is x' = (1 - h) x + noise: independent draws at h = 1."""
    found = search_step_size(normal_score, init, [0.05, 0.3, 1.0], n_steps=400)
    assert found.step_size == 1.0
    assert found.step_sizes == [0.05, 0.3, 1.0]
    expected = [0.05 / 1.95, 0.3 / 1.7, 1.0]  # (1 - a) / (1 + a) of an AR(1) chain with a = 1 - h
    for rate, value in zip(found.rates, expected, strict=True):
        assert 0.7 * value < rate < 1.3 * value  # the smallest of three dimensions
    again = search_step_size(normal_score, init, found.step_sizes, n_steps=400)
    assert dataclasses.asdict(found) == dataclasses.asdict(again)


def test_search_gives_no_credit_to_chains_that_diverge_or_stand_still(init):
    found = search_step_size(normal_score, init, [50.0, 0.5], n_steps=400)
    assert found.rates[0] == 0
    assert found.step_size == 0.5

    def stuck(x: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan)

    with pytest.raises(ValueError, match=r"^search_step_size: step_sizes must hold one that gives"):
        search_step_size(stuck, init, [0.1], n_steps=10, method="mala")


def test_search_takes_the_options_of_sample_and_the_cut_off_rule(init):
    options = {"method": "ozaki", "burn_in": 3, "thin": 2, "ess_kind": "cutoff"}
    found = search_step_size(normal_scores, init, [0.1, 3.0, 0.5], n_steps=200, **options)
    assert found.step_size == 3.0  # an exact step: the longer, the better


@pytest.mark.parametrize("target", [0.574, 0.8])
@pytest.mark.parametrize("method", ["mala", "mh_ozaki"])
def test_adaptation_reaches_the_acceptance_asked_for(method, target):
    d = 6
    precision = torch.linspace(1.0, 3.0, d, dtype=F64).diag() + 1.0

    def score_fn(x: Tensor) -> UnscaledScores:
        return UnscaledScores(-x @ precision, -precision.diagonal().expand_as(x).contiguous())

    start = torch.zeros(64, d, dtype=F64)
    warm = adapt_step_size(
        score_fn, start, method=method, step_size=0.01, n_steps=150, target=target, seed=0
    )
    chains = sample(score_fn, state=warm.state, method=method, step_size=warm.step_size, n_steps=50)
    assert float(chains.stats["acceptance"].mean()) == pytest.approx(target, abs=0.03)
    assert warm.state["step"] == 150
    assert len(warm.acceptance) == len(warm.step_sizes) == 150
    assert warm.step_sizes[0] == 0.01


def test_adaptation_is_a_function_of_the_seed_and_moves_the_chains(init):
    options = {"method": "mala", "step_size": 0.1, "n_steps": 20}
    one, two, other = (
        adapt_step_size(normal_score, init, seed=seed, **options) for seed in (1, 1, 2)
    )
    assert one.step_size == two.step_size != other.step_size
    assert torch.equal(one.state["x"], two.state["x"])
    assert not torch.equal(one.state["x"], init)


def test_adaptation_is_the_published_recursion(init):
    """Nesterov's averages written out as sums (Hoffman & Gelman 2014, Eq. 6), constants theirs."""
    warm = adapt_step_size(normal_score, init, method="mala", step_size=0.2, n_steps=12, seed=3)
    gamma, t0, kappa, mu = 0.05, 10, 0.75, math.log(10 * 0.2)
    missing, log_mean = 0.0, 0.0
    for t, rate in enumerate(warm.acceptance, 1):
        missing = (1 - 1 / (t + t0)) * missing + (0.574 - rate) / (t + t0)
        log_h = mu - t**0.5 / gamma * missing
        log_mean = t**-kappa * log_h + (1 - t**-kappa) * log_mean
        if t < 12:
            assert warm.step_sizes[t] == pytest.approx(math.exp(log_h), rel=1e-12)
    assert warm.step_size == pytest.approx(math.exp(log_mean), rel=1e-12)


def test_adaptation_works_with_a_log_density(init):
    law = GaussianMixture(
        torch.ones(1, dtype=F64), torch.zeros(1, 3, dtype=F64), torch.eye(3, dtype=F64)[None]
    )
    options = {"method": "mala", "step_size": 0.1, "n_steps": 30, "seed": 1}
    exact = adapt_step_size(normal_score, init, log_prob=law.log_prob, **options)
    trapezoid = adapt_step_size(normal_score, init, **options)  # exact on a Gaussian
    assert exact.step_size == pytest.approx(trapezoid.step_size, rel=1e-9)


def test_a_chain_that_is_dead_from_the_start_does_not_count(init):
    options = {"method": "mala", "step_size": 0.1, "n_steps": 40, "target": 0.9, "seed": 3}
    whole = adapt_step_size(lambda x: -(x**3), init, **options)
    assert not whole.diverged.any()
    dead = torch.cat([init, torch.full((1, 3), torch.nan, dtype=F64)])
    joined = adapt_step_size(lambda x: -(x**3), dead, **options)
    assert joined.step_size == whole.step_size
    assert joined.diverged.tolist() == [False] * 8 + [True]
    assert joined.divergences.tolist() == [0] * 8 + [40]
    with pytest.raises(ValueError, match=r"^adapt_step_size: init must hold a chain with a finite"):
        adapt_step_size(lambda x: x * torch.nan, init, **options)


def test_adaptation_of_a_part_of_the_chains_has_their_noise(init):
    options = {"method": "mala", "step_size": 0.1, "n_steps": 6}
    whole = adapt_step_size(normal_score, init, seed=1, **options)
    part = adapt_step_size(normal_score, init[5:], seed=1, first_chain=5, **options)
    other = adapt_step_size(normal_score, init[5:], seed=1, **options)
    assert not torch.equal(part.state["x"], other.state["x"])
    first = {"method": "mala", "step_size": 0.1, "n_steps": 1}
    alone = adapt_step_size(normal_score, init[5:], seed=1, first_chain=5, **first)
    together = adapt_step_size(normal_score, init, seed=1, **first)
    assert torch.equal(alone.state["x"], together.state["x"][5:])
    assert part.state["first_chain"] == 5
    assert whole.state["first_chain"] == 0


def test_adaptation_says_when_every_step_is_accepted(init):
    with pytest.raises(ValueError, match="target must be met between step sizes 1e-20 and 1e20"):
        adapt_step_size(normal_scores, init, method="mh_ozaki", step_size=0.1, n_steps=2000)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"method": "ozaki"},
            ValueError,
            "method must be one of " + ", ".join(map(repr, ADJUSTED)) + ", got 'ozaki'",
        ),
        ({"step_size": 0}, ValueError, "step_size must be finite and > 0, got 0"),
        (
            {"curvature": "foo"},
            ValueError,
            "curvature must be one of 'clamp', 'abs', 'raw', got 'foo'",
        ),
        (
            {"init": torch.zeros(2, 3, dtype=torch.bfloat16)},
            ValueError,
            "init must have dtype float32, float64 for method 'mala', got torch.bfloat16",
        ),
        ({"target": 1.0}, ValueError, "target must be below 1, got 1.0"),
        ({"target": 0.0}, ValueError, "target must be finite and > 0, got 0"),
        ({"n_steps": 0}, ValueError, "n_steps must be at least 1, got 0"),
        ({"n_steps": 1.5}, TypeError, "n_steps must be an int, got float"),
        ({"init": torch.zeros(0, 3)}, ValueError, "init must hold at least one chain, got none"),
    ],
)
def test_adaptation_refuses(options, kind, message):
    options = {"method": "mala", "step_size": 0.1, "n_steps": 3} | options
    start = options.pop("init", torch.zeros(2, 3))
    with pytest.raises(kind) as error:
        adapt_step_size(normal_score, start, **options)
    assert str(error.value) == f"adapt_step_size: {message}"


def test_search_without_a_seed_uses_one_for_all_candidates(init):
    torch.manual_seed(4)
    found = search_step_size(normal_score, init, [0.3, 0.3], n_steps=50, seed=None)
    assert found.rates[0] == found.rates[1]
    again = search_step_size(normal_score, init, [0.3], n_steps=50, seed=None)
    assert again.rates[0] != found.rates[0]


def test_search_refuses_no_and_bad_candidates(init):
    with pytest.raises(ValueError, match=r"^search_step_size: step_size must not be given beside"):
        search_step_size(normal_score, init, [0.1], n_steps=10, step_size=0.1)
    with pytest.raises(ValueError, match=r"^search_step_size: step_sizes must hold at least one"):
        search_step_size(normal_score, init, [], n_steps=10)
    with pytest.raises(ValueError, match="step_sizes must be finite and > 0, got -1"):
        search_step_size(normal_score, init, [0.1, -1.0], n_steps=10)
