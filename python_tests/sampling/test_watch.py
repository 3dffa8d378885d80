"""Chains that run away are noticed, right ones are left alone, and the error of a law is found."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from hos_ext import UnscaledScores
from hos_ext.densities import Gaussian, GaussianMixture
from hos_ext.ops import normal
from hos_ext.sampling import RunawayWarning, law_error, method_names, sample
from hos_ext.sampling.watch import DRIFT, SPREAD, split_r_hat
from hos_ext.scores import DenseScores

F64 = torch.float64


def of_hessian(density):
    """s1 and s2 of a density, as any method but ozaki_isotropic takes them."""
    return lambda x: DenseScores(density.score(x), density.hessian(x))


def outward(scale: float):
    """A score that pushes outward, as a learned one may far from its data."""
    return lambda x: UnscaledScores(scale * x, torch.full_like(x, scale), None)


# ----------------------------------------------------------------------------------- what runs away


@pytest.mark.parametrize("method", ["langevin", "ozaki"])
@pytest.mark.parametrize("first", [torch.float32, F64])
def test_chains_that_are_pushed_outward_are_named_with_their_numbers(method, first):
    init = normal((6, 4), seed=1, dtype=first)
    with pytest.warns(RunawayWarning) as found:
        chains = sample(outward(1.0), init, method=method, step_size=0.1, n_steps=300, seed=0)
    message = str(found[0].message)
    assert len(found) == 1
    assert found[0].filename == __file__
    assert message.startswith("sample: 6 of 6 chains ran away; spread against start and noise up ")
    for part in (
        "(bound 1000)",
        "drift of |x|",
        "energy -",
        "R-hat of |x|",
        "outside the range of",
    ):
        assert part in message
    stats = chains.stats
    assert stats["ran_away"].tolist() == [True] * 6
    assert not stats["diverged"].any()
    assert bool((stats["spread"] > SPREAD).all())
    assert bool((stats["energy"] < -1e3).all())


def test_the_energy_finds_what_has_not_come_far_yet():
    init = normal((6, 4), seed=1, dtype=F64)
    with pytest.warns(RunawayWarning, match=r"ran away; .* energy -"):
        stats = sample(outward(1.0), init, step_size=0.1, n_steps=60, seed=0).stats
    assert bool((stats["spread"] < SPREAD).all())
    assert bool((stats["drift"] < DRIFT).all())
    assert bool(stats["ran_away"].any())


def test_one_chain_of_many_is_found():
    def score_fn(x: Tensor) -> Tensor:  # outside the range of its data the score has a wrong sign
        far = x.norm(dim=1, keepdim=True) > 8
        return torch.where(far, x, -x)

    init = normal((50, 4), seed=1, dtype=F64)
    init[7] = 6.0
    with pytest.warns(RunawayWarning, match="1 of 50 chains ran away"):
        chains = sample(score_fn, init, step_size=0.1, n_steps=400, seed=0, chunk_size=16)
    assert chains.stats["ran_away"].nonzero().tolist() == [[7]]


def test_a_step_that_overshoots_further_each_time_is_found():
    init = normal((5, 3), seed=1, dtype=F64)
    with pytest.warns(RunawayWarning, match="5 of 5 chains ran away") as found:
        chains = sample(lambda x: -x, init, step_size=2.2, n_steps=100, seed=0)
    assert "energy" in str(found[0].message)
    assert bool((chains.stats["energy"] > 1e3).all())


def test_chains_that_stand_still_are_named():
    init = normal((5, 3), seed=1, dtype=F64)
    with pytest.warns(RunawayWarning, match="the chains stand still"):
        sample(lambda x: -x, init, method="mala", step_size=1e6, n_steps=40, seed=0)


def test_chains_that_have_not_come_down_are_named():
    init = 1e3 * normal((5, 3), seed=1, dtype=F64)
    with pytest.warns(RunawayWarning, match="the chains have not settled; spread"):
        sample(lambda x: -x, init, step_size=0.05, n_steps=80, seed=0)


def test_chains_that_are_not_finite_are_named_in_runs_of_any_length():
    init = torch.tensor([[0.0], [math.nan]])
    with pytest.warns(RunawayWarning, match="^sample: 1 of 2 chains hold NaN or infinities"):
        chains = sample(lambda x: -x, init, step_size=0.1, n_steps=2, seed=0)
    assert "spread" not in chains.stats
    assert chains.stats["ran_away"].tolist() == [False, False]
    with pytest.warns(RunawayWarning, match=r"chains hold NaN or infinities; spread .* energy"):
        sample(lambda x: -x, init, step_size=0.1, n_steps=20, seed=0)


# ------------------------------------------------------------------------------------ what is right


def test_the_figures_are_those_of_the_definitions():
    """A score of 0 and no burn-in: Brownian motion, whose looks are the draws themselves."""
    init = normal((3, 2), seed=1, dtype=F64)
    score = torch.tensor([[0.5, -0.25]], dtype=F64)
    h, n = 0.3, 32
    chains = sample(lambda x: score.expand_as(x), init, step_size=h, n_steps=n, seed=0)
    states = torch.cat([init.unsqueeze(1), chains.draws], 1)[:, :n]  # as each step begins
    sizes = states.square().mean(2).sqrt()
    torch.testing.assert_close(chains.stats["sizes"], sizes)

    def size(part: slice) -> Tensor:
        return sizes[:, part].square().mean(1).sqrt()

    reach = (sizes[:, 0].square() + 2 * h * n).sqrt()
    torch.testing.assert_close(chains.stats["spread"], size(slice(24, 32)) / reach)
    drift = size(slice(24, 32)) / (size(slice(8, 16)).square() + h * n).sqrt()
    torch.testing.assert_close(chains.stats["drift"], drift)
    virials = -((states[:, 24:] - states[:, 23:-1]) * score).mean(2)
    torch.testing.assert_close(chains.stats["energy"], virials.median(1).values)
    assert chains.stats["r_hat"] == split_r_hat(sizes[:, 16:])


def test_adjusted_chains_are_looked_at_where_they_stand():
    """Not at their proposals: of chains that reject everything the virial is 0."""
    init = normal((4, 3), seed=1, dtype=F64)
    with pytest.warns(RunawayWarning):
        chains = sample(lambda x: -x, init, method="mala", step_size=1e6, n_steps=32, seed=0)
    assert chains.stats["energy"].tolist() == [0.0] * 4
    expected = init.square().mean(1).sqrt().unsqueeze(1).expand(4, 32)
    torch.testing.assert_close(chains.stats["sizes"], expected)


def test_the_energy_of_draws_of_a_gaussian_is_one():
    gaussian = Gaussian(torch.tensor([3.0, -1.0]).repeat(50).double(), torch.eye(100).double())
    init = gaussian.sample(40, seed=0)
    scores = of_hessian(gaussian)
    options = {"step_size": 1.0, "n_steps": 64, "seed": 0}
    chains = sample(scores, init, method="ozaki_full", **options)
    assert float(chains.stats["energy"].mean()) == pytest.approx(1 - math.exp(-2.0), abs=0.05)


def test_split_r_hat_is_that_of_gelman_and_rubin():
    draws = normal((4, 20), seed=0, dtype=F64)
    parts = draws.reshape(8, 10)
    within, between = parts.var(1).mean(), 10 * parts.mean(1).var()
    expected = math.sqrt((9 / 10 * within + between / 10) / within)
    assert split_r_hat(draws) == pytest.approx(expected, rel=1e-12)
    assert split_r_hat(torch.arange(3.0).unsqueeze(1).expand(3, 8)) == math.inf
    assert math.isnan(split_r_hat(draws[:, :3]))


MIXTURE = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=F64),
    torch.tensor([[-30.0, 0.0], [0.0, 0.0], [30.0, 30.0]], dtype=F64),
    torch.stack([torch.eye(2), 4 * torch.eye(2), 0.01 * torch.eye(2)]).double(),
)


@pytest.mark.parametrize("method", [name for name in method_names() if "isotropic" not in name])
@pytest.mark.parametrize("start", ["draws", "one point"])
def test_right_chains_are_left_alone(method, start):
    """Modes that chains do not leave, of different widths; steps as small as the narrowest asks."""
    init = MIXTURE.sample(12, seed=0)
    if start == "one point":
        init = torch.zeros_like(init)
    options = {"step_size": 0.005, "n_steps": 60, "burn_in": 10, "seed": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chains = sample(of_hessian(MIXTURE), init, method=method, **options)
    assert not chains.stats["ran_away"].any()


@pytest.mark.parametrize("freedom", [1.0, 2.0, 5.0])
def test_heavy_tails_are_left_alone(freedom):
    def score_fn(x: Tensor) -> Tensor:
        return -(freedom + 1) * x / (freedom + x.square())

    law = torch.distributions.StudentT(freedom)
    torch.manual_seed(0)
    for seed in range(20):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sample(score_fn, law.sample((8, 1)).double(), step_size=0.1, n_steps=200, seed=seed)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_the_figures_are_the_same_in_chunks(chunk_size):
    init = normal((7, 3), seed=1, dtype=F64)
    step_size = torch.linspace(0.1, 0.3, 7, dtype=F64)
    options = {"step_size": step_size, "n_steps": 50, "seed": 0}
    whole = sample(lambda x: -x, init, **options).stats
    parts = sample(lambda x: -x, init, chunk_size=chunk_size, **options).stats
    for name in ("spread", "drift", "energy", "sizes"):
        assert torch.equal(whole[name], parts[name])
    assert whole["r_hat"] == parts["r_hat"]


# ----------------------------------------------------------------------------------- error of a law


def test_law_error_is_that_of_two_gaussians():
    """In one dimension E|X - Y| of N(0, a^2), N(0, b^2) is sqrt(2 (a^2 + b^2) / pi)."""
    n, ratio = 6000, 2.0
    x, y = (normal((n, 1), seed=seed, dtype=F64) for seed in (0, 1))
    found = law_error(ratio * x, y, limit=3000)
    across, wide, narrow = math.sqrt(1 + ratio**2), math.sqrt(2) * ratio, math.sqrt(2)
    exact = (2 * across - wide - narrow) / (2 * across)
    assert found.spread == pytest.approx(ratio, rel=0.05)
    assert found.energy_distance == pytest.approx(exact, abs=0.01)
    same = law_error(x, y, limit=3000)
    assert abs(same.energy_distance) < 2e-3
    moved = law_error(y + 1, y)  # the spread is right and the law is not
    assert moved.spread == pytest.approx(1)
    assert moved.energy_distance > 0.1


def test_law_error_counts_pairs_once():
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [4.0]])
    found = law_error(x, y)
    across = (1 + 4 + 1 + 2) / 4
    assert found.energy_distance == pytest.approx((2 * across - 2 - 3) / (2 * across))


@pytest.mark.parametrize(
    ("draws", "reference", "error", "message"),
    [
        ([1.0], torch.zeros(2, 1), TypeError, "draws must be a Tensor, got list"),
        (
            torch.zeros(1, 1),
            torch.eye(2)[:, :1],
            ValueError,
            r"draws must have shape \(n, \*dims\)",
        ),
        (
            torch.zeros(3),
            torch.zeros(3),
            ValueError,
            r"draws must have shape \(n, \*dims\), n >= 2",
        ),
        (torch.zeros(3, 2), torch.zeros(3, 1), ValueError, r"reference must have shape \(m, 2\)"),
        (torch.zeros(3, 2), torch.ones(3, 2), ValueError, "reference must vary, got equal rows"),
        (torch.full((3, 2), math.nan), torch.eye(2), ValueError, "draws must be finite, got NaN"),
        (torch.zeros(3, 2), torch.eye(2).double(), ValueError, "reference must have dtype"),
    ],
)
def test_law_error_refuses(draws, reference, error, message):
    with pytest.raises(error, match=f"^law_error: {message}"):
        law_error(draws, reference)
