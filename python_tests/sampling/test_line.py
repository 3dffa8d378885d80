"""Line integrals of the score: quadrature rules, and the exact test by two coins."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from hos_ext.densities import GaussianMixture
from hos_ext.linalg import hessian_of
from hos_ext.random import Key
from hos_ext.sampling import (
    BoundWarning,
    Metropolis,
    SmoothBound,
    SupportBound,
    TwoCoin,
    adapt_step_size,
    make_step,
    sample,
)
from hos_ext.sampling.methods import Langevin, make_rule
from hos_ext.sampling.methods.base import Target
from hos_ext.sampling.methods.coins import Tosses
from hos_ext.scores import DenseScores

F64 = torch.float64
NAMES = ["trapezoid", "simpson", "lobatto-2", "lobatto-3", "lobatto-7", "lobatto-16"]
NODES = dict(zip(NAMES, [0, 1, 2, 3, 7, 16], strict=True))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mixture(dim: int, spread: float, sigma: float) -> GaussianMixture:
    """Points of a box of half width `spread` with noise sigma: clean data of bounded support."""
    means = spread * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -0.2]], dtype=F64)
    means = torch.cat([means, means[:, :1].expand(-1, dim - 2)], 1) if dim > 2 else means[:, :dim]
    covariances = (sigma**2 * torch.eye(dim, dtype=F64)).expand(3, -1, -1)
    return GaussianMixture(torch.tensor([0.3, 0.5, 0.2], dtype=F64), means, covariances)


# --------------------------------------------------------------------------------------- quadrature


def estimate(name: str, score_fn: Any, x: Tensor, there: Tensor) -> Tensor:
    """The rule's log p(there) - log p(x)."""
    rule = make_rule("test", name)
    target = Target(make_step("mala"), score_fn)
    here = target(x)
    return rule.difference(rule.inside(target, here, there), here, target(there))


def polynomial(degree: int, with_hessian: bool) -> Any:
    """The score of log p = sum_k c_k x^k, and its value."""
    c = randn(degree + 1, seed=degree)

    def score_fn(x: Tensor) -> Any:
        s1 = sum(k * c[k] * x ** (k - 1) for k in range(1, degree + 1))
        s2 = sum(k * (k - 1) * c[k] * x ** (k - 2) for k in range(2, degree + 1))
        return DenseScores(s1, torch.as_tensor(s2).unsqueeze(-1)) if with_hessian else s1

    return score_fn, lambda x: sum(c[k] * x[:, 0] ** k for k in range(degree + 1))


@pytest.mark.parametrize("with_hessian", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_rule_is_exact_up_to_its_degree_and_no_further(name, with_hessian):
    degree = 2 * NODES[name] + (4 if with_hessian else 2)  # of log p
    x, there = randn(20, 1, seed=1) / 4, randn(20, 1, seed=2) / 4
    score_fn, log_prob = polynomial(degree, with_hessian)
    expected = log_prob(there) - log_prob(x)
    got = estimate(name, score_fn, x, there)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    if NODES[name] > 3:
        return  # the next error is below the rounding
    beyond, log_prob = polynomial(degree + 2, with_hessian)
    error = estimate(name, beyond, 8 * x, 8 * there) - log_prob(8 * there) + log_prob(8 * x)
    assert float(error.abs().max()) > 1e-6


@pytest.mark.parametrize(
    ("name", "with_hessian"),
    [
        ("trapezoid", False),
        ("trapezoid", True),
        ("simpson", False),
        ("simpson", True),
        ("lobatto-2", False),
    ],
)
def test_the_error_falls_with_the_order_that_is_stated(name, with_hessian):
    law = mixture(3, 1.0, 1.0)
    x, direction = randn(50, 3), randn(50, 3, seed=1)

    def score_fn(x: Tensor) -> Any:
        return DenseScores(law.score(x), law.hessian(x)) if with_hessian else law.score(x)

    def error(t: float) -> float:
        there = x + t * direction
        exact = law.log_prob(there) - law.log_prob(x)
        return float((estimate(name, score_fn, x, there) - exact).abs().mean())

    order = 2 * NODES[name] + (5 if with_hessian else 3)
    assert math.log2(error(0.05) / error(0.025)) == pytest.approx(order, abs=0.25)


def test_simpson_is_the_rule_of_the_textbook():
    law = mixture(2, 1.0, 0.7)
    x, there = randn(30, 2), randn(30, 2, seed=1)
    at = [(1 - t) * x + t * there for t in (0.0, 0.5, 1.0)]
    f = [(law.score(each) * (there - x)).sum(1) for each in at]
    got = estimate("simpson", law.score, x, there)
    torch.testing.assert_close(got, (f[0] + 4 * f[1] + f[2]) / 6, rtol=1e-13, atol=1e-13)


def test_the_trapezoid_draws_what_it_drew_before_there_were_rules():
    """The same bits, from the formula as it stood."""
    law = mixture(2, 1.0, 0.6)
    for with_hessian in (False, True):

        def score_fn(x: Tensor, with_hessian: bool = with_hessian) -> Any:
            return DenseScores(law.score(x), law.hessian(x)) if with_hessian else law.score(x)

        x, there = randn(200, 2), randn(200, 2, seed=1)
        dx = there - x
        expected = ((law.score(x) + law.score(there)) * dx).sum(1) / 2
        if with_hessian:
            slope = [hessian_of(score_fn(each)).matvec(dx) for each in (there, x)]
            expected = expected - (dx * (slope[0] - slope[1])).sum(1) / 12
        assert torch.equal(estimate("trapezoid", score_fn, x, there), expected)


@pytest.mark.parametrize(("name", "nodes"), [("simpson", 1), ("lobatto-3", 3)])
def test_the_nodes_are_counted_and_make_the_law_better(name, nodes):
    law = mixture(2, 1.0, 0.45)
    init = law.sample(8000, seed=0)
    options: dict[str, Any] = {"method": "mala", "step_size": 0.3, "n_steps": 6, "seed": 0}
    plain = sample(law.score, init, **options)
    better = sample(law.score, init, rule=name, **options)
    exact = sample(law.score, init, log_prob=law.log_prob, **options)
    assert plain.stats["n_score_evaluations"] == 7
    assert better.stats["n_score_evaluations"] == 7 + 6 * nodes
    assert (plain.stats["rule"], better.stats["rule"]) == ("trapezoid", name)
    assert "rule" not in exact.stats

    def apart(chains: Any) -> float:  # the same proposals and uniforms: what the ratio changes
        return float((chains.draws != exact.draws).any(-1).any(-1).double().mean())

    assert apart(better) < apart(plain) / 3


@pytest.mark.parametrize("rule", ["simpson", "lobatto-2", "coins"])
def test_rules_take_scores_whose_buffer_is_used_again(rule):
    """As a captured graph gives them."""
    law = mixture(2, 1.0, 0.6)
    buffer = torch.empty(20, 2, dtype=F64)
    chosen = TwoCoin(SupportBound(0.6, low=-1.0, high=1.0)) if rule == "coins" else rule
    options: dict[str, Any] = {"step_size": 0.1, "n_steps": 20, "seed": 0, "rule": chosen}
    fresh = sample(law.score, randn(20, 2), method="mala", **options)
    again = sample(lambda x: buffer.copy_(law.score(x)), randn(20, 2), method="mala", **options)
    assert torch.equal(fresh.draws, again.draws)


# -------------------------------------------------------------------------------------------- coins


def tosses(
    law: Any, x: Tensor, there: Tensor, proposals: float, rule: TwoCoin, n: int, seed: int = 0
) -> Tosses:
    """n independent decisions between x and there, (dim,) each."""
    target = Target(make_step("mala"), law.score)
    here, end = (target(row.expand(n, -1).contiguous()) for row in (x, there))
    return rule.toss(target, x.new_full((n,), proposals), here, end, Key(seed, 3, 0))


PAIRS = torch.tensor(
    [[[0.6, 0.4], [0.1, -0.1]], [[0.2, 0.1], [0.9, -0.3]], [[-0.8, 0.3], [0.0, 0.6]]], dtype=F64
)


@pytest.mark.parametrize("proposals", [0.0, -1.1])
@pytest.mark.parametrize(("loose", "nodes"), [(1.0, 0), (2.5, 0), (1.0, 1), (2.5, 1), (3.5, 3)])
@pytest.mark.parametrize("pair", range(3))
def test_coins_accept_with_the_probability_of_barker(pair, loose, nodes, proposals):
    law, n = mixture(2, 1.0, 0.65), 15_000
    x, there = PAIRS[pair]
    base = SupportBound(0.65, low=-1.0, high=1.0)
    rule = TwoCoin(lambda x, there: loose * base(x, there), nodes=nodes, max_tosses=1023)
    found = tosses(law, x, there, proposals, rule, n)
    difference = law.log_prob(there[None]) - law.log_prob(x[None])
    p = float((difference + proposals).sigmoid())
    trapezoid = ((law.score(x[None]) + law.score(there[None])) * (there - x)).sum() / 2
    rough = float((trapezoid + proposals).sigmoid())
    error = (p * (1 - p) / n) ** 0.5
    assert abs(float(found.accepted.double().mean()) - p) < 4 * error
    if pair == 2:
        assert abs(rough - p) > 6 * error, "the trapezoid rule is told apart"
    assert not bool((found.undecided | found.lost | (found.exceeded > 0)).any())
    assert 0 < float(found.used.max()) <= 1


@pytest.mark.parametrize("mass", [0.1, 1.0, 3.0])
def test_coins_take_as_many_evaluations_as_stated(mass):
    """On a Gaussian f is its chord, g = 0: 2 (exp(M / 2) - 1) evaluations."""

    class Normal:
        score = staticmethod(lambda x: -x)

    rule = TwoCoin(lambda x, there: x.new_full((len(x),), 6 * mass), nodes=0, max_tosses=1000)
    found = tosses(Normal, torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), 0.0, rule, 20_000)
    counts = found.evaluations.double()
    expected = 2 * math.expm1(mass / 2)
    assert float(counts.mean()) == pytest.approx(expected, abs=5 * float(counts.std()) / 141)


def test_undecided_steps_keep_detailed_balance():
    law, n = mixture(2, 1.0, 0.8), 30_000
    x, there = torch.tensor([[0.6, 0.5], [-0.1, -0.1]], dtype=F64)
    rule = TwoCoin(SupportBound(0.8, low=-1.0, high=1.0), nodes=0, max_tosses=2)
    to, fro = tosses(law, x, there, 0.4, rule, n), tosses(law, there, x, -0.4, rule, n, seed=1)
    undecided = [float(found.undecided.double().mean()) for found in (to, fro)]
    assert 0.02 < undecided[0] < 0.9
    assert undecided[0] == pytest.approx(undecided[1], abs=4 * (0.5 / n) ** 0.5)
    rates = [float(found.accepted.double().mean()) for found in (to, fro)]
    ratio = float((law.log_prob(there[None]) - law.log_prob(x[None])).exp()) * math.exp(0.4)
    error = sum((1 - rate) / (rate * n) for rate in rates) ** 0.5
    assert math.log(rates[0] / rates[1]) == pytest.approx(math.log(ratio), abs=4 * error)
    assert sum(rates) < 0.95 + sum(undecided)


def test_a_bound_too_wide_to_decide_is_refused_without_evaluations():
    law = mixture(2, 1.0, 0.8)
    rule = TwoCoin(lambda x, there: x.new_full((len(x),), math.inf))
    with pytest.warns(BoundWarning, match="100% of the steps were refused because the bound"):
        chains = sample(
            law.score, randn(6, 2), method="mala", step_size=0.1, n_steps=4, rule=rule, seed=0
        )
    assert torch.equal(chains.stats["undecided"], torch.full((6,), 4))
    assert chains.stats["n_score_evaluations"] == 9
    assert torch.equal(chains.draws, randn(6, 2).unsqueeze(1).expand(-1, 4, -1))


@pytest.mark.parametrize("method", ["mala", "mh_ozaki_full"])
def test_exact_draws_stay_exact_draws(method):
    """And the trapezoid rule from s1 alone is seen to be off, at the same step."""
    law, n = mixture(2, 1.2, 0.8), 6_000
    init = law.sample(n, seed=0)
    h = 0.5 if method == "mala" else 0.9

    def score_fn(x: Tensor) -> Any:
        return law.score(x) if method == "mala" else DenseScores(law.score(x), law.hessian(x))

    mean = law.weights @ law.means
    spread = law.means - mean
    covariance = (law.weights[:, None] * spread).T @ spread + law.covariances[0]

    def worst(x: Tensor) -> float:
        centred = x - mean
        terms = torch.cat([centred, centred.square() - covariance.diagonal()], 1)
        return float((terms.mean(0) / (terms.std(0) / n**0.5)).abs().max())

    options: dict[str, Any] = {"step_size": h, "n_steps": 10, "thin": 10, "seed": 0}
    rule = TwoCoin(SupportBound(0.8, low=-1.2, high=1.2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BoundWarning)  # a few far proposals are refused
        chains = sample(score_fn, init, method=method, rule=rule, **options)
    assert int(chains.stats["bound_exceeded"].sum()) == 0
    assert worst(chains.draws[:, 0]) < 4
    moved = (chains.draws[:, 0] != init).any(1).double().mean()
    assert float(moved) > 0.8
    if method == "mala":
        plain = sample(score_fn, init, method=method, **options)
        assert worst(plain.draws[:, 0]) > 8


def test_coins_are_the_same_in_chunks_and_resumed():
    law = mixture(2, 1.0, 0.7)
    options: dict[str, Any] = {
        "method": "mala",
        "step_size": 0.2,
        "rule": TwoCoin(SupportBound(0.7, low=-1.0, high=1.0), max_tosses=64),
    }
    whole = sample(law.score, randn(11, 2), n_steps=30, seed=3, **options)
    parts = sample(law.score, randn(11, 2), n_steps=30, seed=3, chunk_size=4, **options)
    first = sample(law.score, randn(11, 2), n_steps=12, seed=3, **options)
    rest = sample(law.score, state=first.state, n_steps=18, **options)
    assert torch.equal(whole.draws, parts.draws)
    assert torch.equal(whole.draws, torch.cat([first.draws, rest.draws], 1))
    for name in ("coin_evaluations", "undecided", "bound_used", "acceptance"):
        assert torch.equal(whole.stats[name], parts.stats[name]), name
    assert int(whole.stats["coin_evaluations"].sum()) > 20
    most = 61 + int(whole.stats["coin_evaluations"].sum())
    assert 61 < parts.stats["n_score_evaluations"] <= whole.stats["n_score_evaluations"] <= most


def test_rules_go_with_conditions_and_images():
    """Chunks ask with the conditions of their chains, between the ends too."""
    shift = torch.linspace(-1, 1, 5, dtype=F64)

    def score_fn(x: Tensor, *, shift: Tensor) -> Tensor:
        assert len(shift) == len(x)
        return -(x - shift.view(-1, 1, 1, 1)).tanh()

    third = SmoothBound(third=4 * 0.77)
    for rule in ("simpson", TwoCoin(third)):
        options: dict[str, Any] = {"method": "mala", "step_size": 0.1, "n_steps": 6, "seed": 0}
        options |= {"rule": rule, "model_kwargs": {"shift": shift}}
        whole = sample(score_fn, randn(5, 1, 2, 2), **options)
        parts = sample(score_fn, randn(5, 1, 2, 2), chunk_size=2, **options)
        assert torch.equal(whole.draws, parts.draws)
        assert whole.draws.shape == (5, 6, 1, 2, 2)


def test_a_score_beyond_the_bound_is_counted_and_said():
    law = mixture(2, 1.0, 0.5)
    honest = SupportBound(0.5, low=-1.0, high=1.0)
    rule = TwoCoin(lambda x, there: 0.05 * honest(x, there), nodes=0)
    options: dict[str, Any] = {"method": "mala", "step_size": 0.1, "n_steps": 40, "seed": 0}
    with pytest.warns(BoundWarning, match=r"exceeded the bound at \d+ of \d+ points, by up to"):
        chains = sample(law.score, law.sample(50, seed=1), rule=rule, **options)
    assert int(chains.stats["bound_exceeded"].sum()) > 0
    used = float(chains.stats["bound_used"].max())
    assert 1 < used <= 20
    mended = TwoCoin(lambda x, there: 0.05 * 4 * used * honest(x, there), nodes=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BoundWarning)
        again = sample(law.score, law.sample(50, seed=1), rule=mended, **options)
    assert int(again.stats["bound_exceeded"].sum()) == 0
    with pytest.warns(BoundWarning, match="adapt_step_size: the score exceeded"):
        adapt_step_size(
            law.score, law.sample(50, seed=1), method="mala", step_size=0.1, n_steps=20, target=0.4,
            rule=rule, seed=0,
        )  # fmt: skip


def test_a_point_beyond_its_bound_is_counted_beyond_rounding_alone():
    no = torch.zeros(4, dtype=torch.bool)
    found = Tosses.none(no.clone(), no.clone())
    g = torch.tensor([0.9, -1.1, 3.0, 1.1], dtype=F64)
    rounding = torch.tensor([0.0, 0.0, 0.0, 0.2], dtype=F64)
    for _ in range(2):
        found.note(torch.tensor([True, True, False, True]), g, torch.ones(4, dtype=F64), rounding)
    assert found.exceeded.tolist() == [0, 2, 0, 0]
    assert found.evaluations.tolist() == [2, 2, 0, 2]
    torch.testing.assert_close(found.used, torch.tensor([0.9, 1.1, 0.0, 0.9], dtype=F64))


def test_a_nan_between_the_ends_is_a_divergence():
    def score_fn(x: Tensor) -> Tensor:
        return torch.where((x > 0.4) & (x < 0.6), math.nan, -x)

    x = torch.full((30, 1), 0.3, dtype=F64)
    rule = TwoCoin(lambda x, there: x.new_full((len(x),), 6.0))
    chains = sample(score_fn, x, method="mala", step_size=0.2, n_steps=5, rule=rule, seed=0)
    assert int(chains.stats["divergences"].sum()) > 10
    assert bool(chains.draws.isfinite().all())
    assert not bool(chains.stats["diverged"].any())


def test_float32_rounding_is_not_taken_for_a_score_beyond_the_bound():
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 100

    def tiny(x: Tensor, there: Tensor) -> Tensor:
        return x.new_full((len(x),), 3e-3)

    rule = TwoCoin(tiny)
    chains = sample(
        lambda x: -x / 1e4, x, method="mala", step_size=1e3, n_steps=400, seed=0, rule=rule
    )
    assert int(chains.stats["coin_evaluations"].sum()) > 0
    assert int(chains.stats["bound_exceeded"].sum()) == 0


# ------------------------------------------------------------------------------------------- bounds


def gap(law: Any, x: Tensor, there: Tensor) -> Tensor:
    """max over t of |f - chord| / (t (1 - t)), by brute force. Shape (B,)."""
    t = torch.linspace(0.01, 0.99, 99, dtype=F64)
    dx = there - x
    f0, f1 = ((law.score(each) * dx).sum(1) for each in (x, there))
    rows = [
        ((law.score(x + s * dx) * dx).sum(1) - (1 - s) * f0 - s * f1).abs() / (s * (1 - s))
        for s in t
    ]
    return torch.stack(rows).amax(0)


@pytest.mark.parametrize("length", [0.2, 3.0])
@pytest.mark.parametrize(("dim", "ball"), [(1, False), (2, False), (2, True), (5, False)])
def test_the_support_bounds_hold(dim, ball, length):
    law = mixture(dim, 0.9, 0.7)
    x = law.sample(400, seed=2)
    there = x + length * randn(400, dim, seed=3) / dim**0.5
    kind: dict[str, Any] = {"radius": 0.9 * dim**0.5} if ball else {"low": -0.9, "high": 0.9}
    c = SupportBound(0.7, **kind)(x, there)
    assert bool((gap(law, x, there) <= c).all())
    assert float((gap(law, x, there) / c).max()) > 0.1
    # Scaled data: x0 in a box of half width 1.8, alpha 0.5.
    wider = SupportBound(0.7, 0.5, **{name: 2 * value for name, value in kind.items()})
    torch.testing.assert_close(wider(x, there), c)


def test_the_third_cumulant_in_the_support_bound_is_the_largest():
    """Two points with the weight (1 - 1 / sqrt 3) / 2 have it, where the score bends most."""
    p, w, sigma = (1 - 3**-0.5) / 2, 0.02, 1.0
    means = torch.tensor([[0.0], [w]], dtype=F64)
    law = GaussianMixture(
        torch.tensor([1 - p, p], dtype=F64), means, torch.ones(2, 1, 1, dtype=F64)
    )
    x, there = torch.tensor([[0.0]], dtype=F64), torch.tensor([[0.02]], dtype=F64)
    c = SupportBound(sigma, radius=w / 2)(x, there)
    smooth = SmoothBound(third=w**3 / (6 * 3**0.5))(x, there)
    torch.testing.assert_close(c, smooth)
    torch.testing.assert_close(gap(law, x, there), c, rtol=2e-2, atol=0)


@pytest.mark.parametrize("length", [0.3, 4.0])
def test_the_smooth_bounds_hold(length):
    """log p = -sum log cosh x: s2 in [-1, 0] and |s3| <= 4 / (3 sqrt 3)."""

    class Sech:
        score = staticmethod(lambda x: -x.tanh())

    x = randn(500, 1)
    there = x + length * randn(500, 1, seed=1)
    third = SmoothBound(third=4 / (3 * 3**0.5))(x, there)
    width = SmoothBound(width=1.0)(x, there)
    worst = gap(Sech, x, there)
    for c in (third, width):
        assert bool((worst <= c * (1 + 1e-9) + 1e-12).all())
    assert float((worst / third).max()) > (0.8 if length < 1 else 0.2)
    both = SmoothBound(third=4 / (3 * 3**0.5), width=1.0)(x, there)
    assert torch.equal(both, torch.minimum(third, width))


# ----------------------------------------------------------------------------------------- refusals


def test_a_rule_is_shown_and_is_an_option_of_the_step():
    step = make_step("mala", rule="simpson")
    assert repr(step).endswith("max_iterations=None), rule='simpson')")
    assert "rule" not in repr(make_step("mala"))
    bound = SmoothBound(third=2.0)
    shown = "TwoCoin(SmoothBound(third=2.0, width=None), nodes=1, max_tosses=16)"
    assert repr(TwoCoin(bound)) == shown
    assert repr(TwoCoin(lambda x, there: x[:, 0])) == "TwoCoin(a function, nodes=1, max_tosses=16)"
    assert Metropolis(Langevin(), rule="lobatto-4").rule.nodes == 4
    warm = adapt_step_size(
        lambda x: x - x**3, torch.ones(4, 2), method="mala", step_size=0.1, n_steps=5,
        rule="simpson", seed=0,
    )  # fmt: skip
    assert warm.state["step"] == 5


RUN: dict[str, Any] = {"step_size": 0.1, "n_steps": 2, "seed": 0}
LIST = "trapezoid, simpson, lobatto-2 ... lobatto-16, or a TwoCoin"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "gauss"}, ValueError, f"sample: rule must be one of {LIST}, got 'gauss'"),
        ({"rule": "lobatto-1"}, ValueError, f"sample: rule must be one of {LIST}, got 'lobatto-1'"),
        ({"rule": "lobatto-17"}, ValueError, "got 'lobatto-17'"),
        ({"rule": "lobatto-03"}, ValueError, "got 'lobatto-03'"),
        ({"rule": 3}, TypeError, "sample: rule must be a name or a TwoCoin, got int"),
        (
            {"rule": "simpson", "log_prob": lambda x: -x.square().sum(1) / 2},
            ValueError,
            "sample: rule must be 'trapezoid' where log_prob is given, which is exact, got 'simp",
        ),
        (
            {"rule": "simpson", "method": "langevin"},
            ValueError,
            "sample: rule must be 'trapezoid' for the unadjusted 'langevin', got simpson",
        ),
        (
            {"rule": "simpson", "method": Metropolis(Langevin())},
            ValueError,
            "sample: rule must be that of the step, which has its own settings, got simpson",
        ),
        (
            {"rule": TwoCoin(lambda x, there: x)},
            ValueError,
            r"sample: bound must return floating point of shape \(3,\), got shape \(3, 2\)",
        ),
        (
            {"rule": TwoCoin(lambda x, there: x[:, 0] * 0 - 1)},
            ValueError,
            "sample: bound must return values >= 0, got -1.0",
        ),
        (
            {"rule": TwoCoin(lambda x, there: x[:, 0] * math.nan)},
            ValueError,
            "sample: bound must return values >= 0, got nan",
        ),
    ],
)
def test_what_is_no_rule_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        sample(lambda x: -x, torch.ones(3, 2), **{"method": "mala"} | RUN | options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TwoCoin(3.0), TypeError, "TwoCoin: bound must be callable, got"),
        (
            lambda: TwoCoin(SmoothBound(third=1), max_tosses=0),
            ValueError,
            "TwoCoin: max_tosses must be at least 1, got 0",
        ),
        (
            lambda: TwoCoin(SmoothBound(third=1), nodes=-1),
            ValueError,
            r"TwoCoin: nodes must be in \[0, 2\*\*8\), got -1",
        ),
        (SmoothBound, ValueError, "SmoothBound: third or width must be given, got neither"),
        (lambda: SmoothBound(third=-1.0), ValueError, "SmoothBound: third must be finite and >= 0"),
        (lambda: SmoothBound(width="1"), TypeError, "SmoothBound: width must be a number, got '1'"),
        (lambda: SupportBound(0.0, radius=1), ValueError, "SupportBound: sigma must be finite and"),
        (lambda: SupportBound(1.0), ValueError, "low and high, or radius, must be given, got"),
        (lambda: SupportBound(1.0, low=0.0), ValueError, "low and high must be given together"),
        (
            lambda: SupportBound(1.0, low=1, high=1),
            ValueError,
            "low and high must be finite, low < high, got 1 and",
        ),
        (
            lambda: SupportBound(1.0, low="a", high=1),
            TypeError,
            "low and high must be numbers, got 'a' and 1",
        ),
        (
            lambda: SupportBound(1.0, low=-math.inf, high=1),
            ValueError,
            "low and high must be finite, low < high, got -inf and 1",
        ),
        (
            lambda: SupportBound(1.0, radius=-1.0),
            ValueError,
            "SupportBound: radius must be finite and > 0, got -1",
        ),
    ],
)
def test_what_is_no_bound_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
