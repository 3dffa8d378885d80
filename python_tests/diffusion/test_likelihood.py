"""Log densities by the probability-flow ODE against the exact noisy density, trace by trace."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from conftest import BEYOND, WITHIN
from test_reverse import COVARIANCE, GAUSSIAN, MEAN, MIXTURE, WHOLE, D, exact_model, level, named
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hos_ext.densities.gaussian import Gaussian
from hos_ext.diffusion.likelihood import log_likelihood
from hos_ext.diffusion.reverse import probability_flow_ode
from hos_ext.schedules import EDM, VE, VP, Schedule
from hos_ext.scores import Scores

F64 = torch.float64
VP_ = VP()


def ends(density, schedule: Schedule):
    """The exact noisy densities at t_min and t_max."""
    times = (schedule.t_min, schedule.t_max)
    return [density.noisy(schedule.sigma(t), schedule.alpha(t)) for t in times]


def smooth_model(density, schedule: Schedule):
    """The exact score alone, differentiable in x; c and factor are of no use."""

    def model(x: Tensor, sigma: Tensor) -> Scores:
        s, a = level(schedule, sigma)
        return Scores(s * density.noisy(s, a).score(x), torch.full_like(x, math.nan))

    return model


def gaussian_model(schedule: Schedule):
    """The exact scores of GAUSSIAN, of both orders, by its eigenvectors."""
    values, vectors = torch.linalg.eigh(COVARIANCE)

    def model(x: Tensor, sigma: Tensor) -> Scores:
        s, a = level(schedule, sigma)
        variance = a**2 * values + s**2
        kappa = a**2 * values / variance
        factor = vectors * (kappa - kappa.min()).sqrt()
        score = -s * ((x - a * MEAN) @ vectors / variance) @ vectors.mT
        return Scores(score, kappa.min().expand_as(x), factor.expand(len(x), D, D))

    return model


def worst(density, model, schedule: Schedule, n: int, solver: str) -> float:
    low, high = ends(density, schedule)
    x = low.sample(6, seed=0)
    value = log_likelihood(
        model,
        x,
        schedule,
        n_steps=n,
        solver=solver,
        log_prior=high.log_prob,
    )
    return (value - low.log_prob(x)).abs().max().item()


@pytest.mark.parametrize("schedule", WHOLE, ids=named)
@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("rk4", 4)])
def test_gaussian_log_density_converges_at_the_order(solver, order, schedule):
    model = gaussian_model(schedule)
    errors = [worst(GAUSSIAN, model, schedule, n, solver) for n in (40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.4)
    assert errors[-1] < (5e-3 if order == 2 else 1e-6)


@pytest.mark.parametrize("schedule", [VP(), EDM()], ids=named)
def test_mixture_log_density(schedule):
    assert worst(MIXTURE, exact_model(MIXTURE, schedule), schedule, 80, "rk4") < 0.01


@pytest.mark.parametrize("schedule", WHOLE, ids=named)
@pytest.mark.parametrize("std", [0.5, 3.0])
def test_isotropic_data_of_the_given_std_are_exact_in_one_step(std, schedule):
    data = Gaussian(torch.zeros(D, dtype=F64), std**2 * torch.eye(D, dtype=F64))
    low = ends(data, schedule)[0]
    x = low.sample(5, seed=0)
    for trace, model in (("learned", exact_model), ("exact", smooth_model)):
        value = log_likelihood(
            model(data, schedule), x, schedule, n_steps=1, data_std=std, trace=trace
        )
        assert (value - low.log_prob(x)).abs().max() < 1e-7


def test_a_grid_of_times_is_gone_up_as_it_stands():
    low, high = ends(GAUSSIAN, VP_)
    x = low.sample(4, seed=0)
    model, levels = gaussian_model(VP_), []

    def spy(x: Tensor, sigma: Tensor) -> Scores:
        levels.append(sigma[0].item())
        return model(x, sigma)

    grid = VP_.times(200)
    value = log_likelihood(spy, x, VP_, times=grid, log_prior=high.log_prob)
    wanted = [VP_.sigma(t) for t in grid.tolist()[::-1]]
    assert levels[::2] == pytest.approx(wanted[:-1], rel=1e-9)
    assert levels[1::2] == pytest.approx(wanted[1:], rel=1e-9)
    assert (value - low.log_prob(x)).abs().max() < 0.1
    # A part of the way: the density at its last time.
    part = VP_.times(200)[60:181]
    low, high = (
        GAUSSIAN.noisy(VP_.sigma(t), VP_.alpha(t)) for t in (part[-1].item(), part[0].item())
    )
    value = log_likelihood(model, x, VP_, times=part, log_prior=high.log_prob)
    assert (value - low.log_prob(x)).abs().max() < 1e-3


def test_the_path_is_that_of_the_probability_flow():
    """The point handed to log_prior comes back by the sampler."""
    x, seen = ends(GAUSSIAN, VP_)[0].sample(5, seed=0), []

    def log_prior(end: Tensor) -> Tensor:
        seen.append(end)
        return end[:, 0]

    model = gaussian_model(VP_)
    log_likelihood(model, x, VP_, n_steps=60, solver="rk4", log_prior=log_prior)
    grid = VP_.t_min * (VP_.t_max / VP_.t_min) ** torch.linspace(1, 0, 400, dtype=F64)
    back = probability_flow_ode(model, seen[0], VP_, times=grid)
    assert (back - x).abs().max() < 2e-3


def test_the_three_traces_agree_where_scores_are_exact():
    low = ends(MIXTURE, VP_)[0]
    x, smooth = low.sample(3, seed=0), smooth_model(MIXTURE, VP_)
    options = {"n_steps": 30, "data_std": 1.2}
    learned = log_likelihood(exact_model(MIXTURE, VP_), x, VP_, **options)
    exact = log_likelihood(smooth, x, VP_, trace="exact", **options)
    assert (learned - exact).abs().max() < 1e-9
    # 400 copies of each row draw 400 probes of their own.
    many = x.repeat(400, 1)
    draws = log_likelihood(smooth, many, VP_, trace="hutchinson", seed=1, **options)
    draws = draws.reshape(400, 3) - exact
    z = draws.mean(0) / (draws.std(0) / 20)
    assert z.abs().max() < WITHIN
    assert (draws.std(0) > 0.05).all()
    # The probes belong to (seed, first + row), and more of them vary less.
    alone = log_likelihood(smooth, many[9:12], VP_, trace="hutchinson", seed=1, first=9, **options)
    assert (alone - exact - draws[3]).abs().max() < 1e-12
    more = log_likelihood(smooth, many, VP_, trace="hutchinson", seed=1, n_probes=4, **options)
    ratio = (more.reshape(400, 3) - exact).std(0) / draws.std(0)
    assert ((ratio > 0.35) & (ratio < 0.7)).all()
    torch.manual_seed(0)
    one, two = (log_likelihood(smooth, x, VP_, trace="hutchinson", **options) for _ in range(2))
    assert not torch.equal(one, two)


def headed(density, schedule: Schedule, off: float, calls: list[int] | None = None):
    """The exact score, and a head whose factor is that much too long."""
    smooth, known = smooth_model(density, schedule), exact_model(density, schedule)

    def model(x: Tensor, sigma: Tensor) -> Scores:
        if calls is not None:
            calls.append(len(x))
        exact = known(x.detach(), sigma)
        factor = None if exact.factor is None else (1 + off) * exact.factor
        return Scores(smooth(x, sigma).scaled_score, exact.c, factor, exact.sign)

    return model


def test_probes_correct_a_learned_trace_and_see_only_what_it_lacks():
    x = ends(MIXTURE, VP_)[0].sample(3, seed=0)
    options = {"n_steps": 30, "data_std": 1.2}
    exact = log_likelihood(smooth_model(MIXTURE, VP_), x, VP_, trace="exact", **options)
    # A head that is right leaves the probes nothing.
    for seed in (0, 1):
        right = headed(MIXTURE, VP_, 0.0)
        value = log_likelihood(right, x, VP_, trace="corrected", seed=seed, **options)
        assert (value - exact).abs().max() < 1e-9
    # One that is wrong: the mean over 400 probes is right all the same, and they vary little.
    calls: dict[str, list[int]] = {"corrected": [], "hutchinson": []}
    draws = {}
    for trace, count in calls.items():
        wrong = headed(MIXTURE, VP_, 0.1, count)
        many = log_likelihood(wrong, x.repeat(400, 1), VP_, trace=trace, seed=1, **options)
        draws[trace] = many.reshape(400, 3) - exact
    assert len(calls["corrected"]) == len(calls["hutchinson"])
    wrong = headed(MIXTURE, VP_, 0.1)
    bias = log_likelihood(wrong, x, VP_, trace="learned", **options) - exact
    spread = draws["corrected"].std(0) / 20
    assert (bias.abs() > BEYOND * spread).all()
    assert (draws["corrected"].mean(0) / spread).abs().max() < WITHIN
    assert (draws["corrected"].std(0) < 0.4 * draws["hutchinson"].std(0)).all()
    more = log_likelihood(
        wrong, x.repeat(400, 1), VP_, trace="corrected", n_probes=4, seed=1, **options
    )
    ratio = (more.reshape(400, 3) - exact).std(0) / draws["corrected"].std(0)
    assert ((ratio > 0.35) & (ratio < 0.7)).all()


@pytest.mark.parametrize("trace", ["learned", "corrected", "hutchinson", "exact"])
def test_inference_mode_changes_nothing(trace):
    x = ends(MIXTURE, VP_)[0].sample(3, seed=0)
    kinds = {"learned": exact_model(MIXTURE, VP_), "corrected": headed(MIXTURE, VP_, 0.1)}
    model = kinds.get(trace, smooth_model(MIXTURE, VP_))
    options = {"n_steps": 4, "trace": trace, "seed": 1}
    wanted = log_likelihood(model, x, VP_, **options)
    with torch.inference_mode():
        value = log_likelihood(model, x.clone(), VP_, **options)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(value, wanted)
    assert not value.requires_grad


def test_the_exact_trace_forms_nothing_larger_than_x():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.size = max(self.size, out.numel())
            return out

    x = torch.zeros(2, 6, 6, dtype=F64)
    with Largest() as seen:
        value = log_likelihood(
            lambda x, s: Scores(-(s[:, None, None] * x), x), x, VP_, n_steps=1, trace="exact"
        )
    assert seen.size == x.numel()
    # kappa is (1 - sigma^2) I, which is exact for N(0, I) data at every level.
    assert value.allclose(torch.full((2,), -18 * math.log(2 * math.pi), dtype=F64), atol=1e-9)


def test_a_trace_without_its_factor_is_seen():
    low = ends(MIXTURE, VP_)[0]
    x, full = low.sample(5, seed=0), exact_model(MIXTURE, VP_)

    def no_factor(x: Tensor, sigma: Tensor) -> Scores:
        return full(x, sigma).replace(factor=None)

    def signed(x: Tensor, sigma: Tensor) -> Scores:
        scores = full(x, sigma)
        kappa = torch.diag_embed(scores.c) + scores.factor @ scores.factor.mT
        values, vectors = torch.linalg.eigh(kappa)
        factor = vectors[..., :1] * (values[:, -1:] - values[:, :1]).sqrt().unsqueeze(1)
        return Scores(scores.scaled_score, values[:, -1:].expand_as(x), factor, -torch.ones(1))

    right, wrong, other = (log_likelihood(m, x, VP_, n_steps=40) for m in (full, no_factor, signed))
    assert (right - wrong).abs().min() > 0.1
    assert (right - other).abs().max() < 1e-9


def test_each_image_gets_the_sum_of_its_pixels():
    schedule = EDM()
    data = Gaussian(torch.zeros(12, dtype=F64), torch.diag(torch.linspace(0.5, 2, 12, dtype=F64)))

    def model(x: Tensor, sigma: Tensor) -> Scores:
        variance = data.covariance.diagonal().reshape(3, 4) + sigma[0] ** 2
        return Scores(-sigma[0] * x / variance, (1 - sigma[0] ** 2 / variance).expand_as(x))

    low, high = ends(data, schedule)
    x = low.sample(3, seed=0)
    value = log_likelihood(
        model,
        x.reshape(3, 3, 4),
        schedule,
        n_steps=60,
        solver="rk4",
        log_prior=lambda end: high.log_prob(end.flatten(1)),
    )
    assert (value - low.log_prob(x)).abs().max() < 1e-4
    single = log_likelihood(
        lambda y, sigma: model(y, sigma).to(torch.float32),
        x.reshape(3, 3, 4).float(),
        schedule,
        n_steps=60,
    )
    assert single.dtype == torch.float32
    assert (single - low.log_prob(x)).abs().max() < 0.05
    empty = log_likelihood(
        lambda y, _: Scores(y, y), x.reshape(3, 3, 4)[:0], schedule, n_steps=2, trace="learned"
    )
    assert empty.shape == (0,)


def test_learned_trace_visits_the_model_as_often_as_the_path_needs():
    model, calls = gaussian_model(VP_), []

    def count(x: Tensor, sigma: Tensor) -> Scores:
        calls.append(x.requires_grad or torch.is_grad_enabled())
        return model(x, sigma)

    x = torch.zeros(2, D, dtype=F64)
    for solver, each in (("heun", 2), ("rk4", 4)):
        calls.clear()
        log_likelihood(count, x, VP_, n_steps=7, solver=solver)
        assert calls == [False] * (7 * each)


def test_mean_log_density_of_data_is_minus_the_entropy():
    schedule = VE(0.1, 30.0)
    low = ends(GAUSSIAN, schedule)[0]
    x = low.sample(4000, seed=0)
    value = log_likelihood(gaussian_model(schedule), x, schedule, n_steps=40, data_std=0.9)
    entropy = torch.logdet(2 * math.pi * math.e * (COVARIANCE + 0.01 * torch.eye(D, dtype=F64))) / 2
    z = (value.mean() + entropy) / (value.std() / 4000**0.5)
    assert z.abs() < WITHIN
    assert ((value + 0.3).mean() + entropy) / (value.std() / 4000**0.5) > BEYOND


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"x must have shape \(B, \*dims\), got \(3,\)"),
        ({"schedule": None}, TypeError, r"schedule must be a Schedule, got NoneType"),
        ({"solver": "euler"}, ValueError, r"solver must be one of 'heun', 'rk4', got 'euler'"),
        (
            {"trace": "none"},
            ValueError,
            r"trace must be one of 'learned', 'corrected', 'hutchinson', 'exact', got 'none'",
        ),
        (
            {"model": nn.Sequential(nn.Dropout(0.1))},
            ValueError,
            r"dropout must be off .*, got p = 0.1 in '0'",
        ),
        ({"n_steps": 0}, ValueError, r"n_steps must be at least 1, got 0"),
        ({"n_steps": None}, ValueError, r"exactly one of n_steps and times must be given, got nei"),
        ({"n_probes": 0}, ValueError, r"n_probes must be at least 1, got 0"),
        ({"data_std": -1.0}, ValueError, r"data_std must be finite and >= 0, got -1"),
        ({"first": -1}, ValueError, r"first must be in \[0, 2\*\*63\), got -1"),
        (
            {"model": lambda x, _: (x, x)},
            TypeError,
            r"model must return Scores, got tuple",
        ),
        (
            {"model": lambda x, _: Scores(x / 0, torch.ones_like(x))},
            ValueError,
            r"scaled_score from model must be finite, got nan at t = 0.001 for sample 0",
        ),
        (
            {"model": lambda x, _: Scores(x, torch.ones_like(x) / 0)},
            ValueError,
            r"c from model must be finite, got inf at t = 0.001 for sample 0",
        ),
        (
            {"model": lambda x, _: Scores(x, torch.ones(1, 1, dtype=F64))},
            ValueError,
            r"c from model must have shape \(2, 2\), got \(1, 1\)",
        ),
        (
            {"model": lambda x, _: Scores(x.detach(), x), "trace": "hutchinson"},
            ValueError,
            r"scaled_score from model must be differentiable in x for trace='hutchinson', got one without",  # noqa: E501
        ),
        (
            {
                "model": lambda x, _: Scores(x.detach() * torch.ones((), requires_grad=True), x),
                "trace": "exact",
            },
            ValueError,
            r"scaled_score from model must be differentiable in x for trace='exact', got one without",  # noqa: E501
        ),
        (
            {"model": lambda x, _: Scores(x.detach(), x), "trace": "corrected"},
            ValueError,
            r"scaled_score from model must be differentiable in x for trace='corrected', got one without",  # noqa: E501
        ),
        (
            {"model": lambda x, _: Scores(x, x[:1].detach()), "trace": "corrected"},
            ValueError,
            r"c from model must have shape \(2, 2\), got \(1, 2\)",
        ),
        (
            {"log_prior": lambda x: x},
            ValueError,
            r"log_prior\(x\) must have shape \(2,\), got \(2, 2\)",
        ),
    ],
)
def test_bad_input_is_refused(change, error, message):
    model = exact_model(MIXTURE, VP_)
    arguments = {"model": model, "x": torch.zeros(2, 2, dtype=F64), "schedule": VP_, "n_steps": 2}
    with pytest.raises(error, match=rf"^log_likelihood: {message}"):
        log_likelihood(**(arguments | change))
