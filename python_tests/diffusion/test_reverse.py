"""Reverse samplers against exact laws; on Gaussians steps are affine maps, read off the code."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from conftest import BEYOND, WITHIN, assert_near
from torch import Tensor

from hos_ext import ops
from hos_ext.densities.gaussian import Gaussian, GaussianMixture
from hos_ext.diffusion import (
    annealed,
    annealed_langevin,
    predictor_corrector,
    prior,
    probability_flow_ode,
    reverse_sde,
    second_order_reverse,
    steps,
    tweedie_denoise,
)
from hos_ext.linalg import dplr
from hos_ext.sampling import BoundWarning, SmoothBound, TwoCoin, method_names
from hos_ext.sampling.chains import sample
from hos_ext.schedules import (
    EDM,
    VE,
    VP,
    CosineVP,
    Interpolant,
    Rectified,
    Schedule,
    SubVP,
    from_alphas_cumprod,
)
from hos_ext.scores import Scores, UnscaledScores

F64 = torch.float64
D = 2
MEAN = torch.tensor([0.7, -0.4], dtype=F64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=F64)
GAUSSIAN = Gaussian(MEAN, COVARIANCE)
DIAGONAL = Gaussian(MEAN, torch.diag(COVARIANCE.diagonal()))
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=F64),
    torch.tensor([[-1.5, 0.5], [1.0, -0.5]], dtype=F64),
    torch.stack([0.2 * COVARIANCE, 0.15 * torch.eye(D, dtype=F64)]),
)
TABLE = torch.cumprod(1 - torch.linspace(1e-3, 0.12, 100, dtype=F64), 0)
# As they are, and away from the ends, where Euler steps of moderate length are in their regime.
CIRCLE = Interpolant(
    lambda t: torch.cos(math.pi / 2 * t),
    lambda t: torch.sin(math.pi / 2 * t),
    t_min=0.01,
    t_max=0.99,
)
FLOWS = [Rectified(), Rectified(t_max=0.999, shift=3.0), CIRCLE]
WHOLE = [VE(), VP(), CosineVP(), SubVP(), EDM(), from_alphas_cumprod(TABLE), *FLOWS]
MILD = [
    VE(0.3, 5.0),
    VP(0.5, 4.0, t_min=0.05),
    CosineVP(t_min=0.1, t_max=0.8),
    SubVP(0.5, 4.0, t_min=0.1),
    Rectified(0.1, 0.8),
    EDM(0.1, 5.0),
    from_alphas_cumprod([0.99, 0.9, 0.7, 0.4, 0.15]),
    from_alphas_cumprod(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)),  # DDPM
]


def named(schedule: Schedule) -> str:
    return type(schedule).__name__


def level(schedule: Schedule, sigma: Tensor) -> tuple[float, float]:
    """(sigma, alpha) of a batch at one time; sigma comes as one value for each row."""
    assert sigma.dim() == 1
    assert bool((sigma == sigma[:1]).all())
    value = sigma[0].item()
    return value, alpha_at(schedule, value)


@cache
def alpha_at(schedule: Schedule, sigma: float) -> float:
    return schedule.alpha(schedule.t_of_sigma(sigma))


def gaussian_model(density: Gaussian, schedule: Schedule):
    """The exact score alone, in closed form (c is a placeholder)."""

    def model(x: Tensor, sigma: Tensor) -> Scores:
        s, a = level(schedule, sigma)
        noisy = a**2 * density.covariance + s**2 * torch.eye(D, dtype=F64)
        centred = x - a * density.mean
        return Scores(-s * torch.linalg.solve(noisy, centred.mT).mT, torch.ones_like(x))

    return model


def exact_model(density: Gaussian | GaussianMixture, schedule: Schedule):
    """The exact scores of both orders: c the least eigenvalue of I + sigma^2 s2, F F^T the rest."""

    def model(x: Tensor, sigma: Tensor) -> Scores:
        s, a = level(schedule, sigma)
        noisy = density.noisy(s, a)
        values, vectors = torch.linalg.eigh(torch.eye(D, dtype=F64) + s**2 * noisy.hessian(x))
        least = values[:, :1].clamp_min(0)
        factor = vectors * (values - least).clamp_min(0).sqrt().unsqueeze(1)
        return Scores(s * noisy.score(x), least.expand_as(x), factor)

    return model


def diagonal_model(density: GaussianMixture, schedule: Schedule):
    """The exact score and the diagonal of the exact s2."""

    def model(x: Tensor, sigma: Tensor) -> Scores:
        s, a = level(schedule, sigma)
        noisy = density.noisy(s, a)
        return Scores(s * noisy.score(x), 1 + s**2 * noisy.hessian_diag(x))

    return model


def marginal(density: Gaussian, schedule: Schedule, t: float) -> tuple[Tensor, Tensor]:
    a, s = schedule.alpha(t), schedule.sigma(t)
    return a * density.mean, a**2 * density.covariance + s**2 * torch.eye(D, dtype=F64)


def affine(step: Callable[[Tensor], Tensor], monkeypatch) -> tuple[Tensor, Tensor, Tensor]:
    """A, G and c of x' = A x + G z + c, from rows with x or z a unit vector."""
    width = 2 * D  # z: D for the diagonal part, D for the factor
    init = torch.zeros(1 + D + width, D, dtype=F64)
    init[1 : 1 + D] = torch.eye(D, dtype=F64)

    def normal(key, stream, shape, like):
        z = torch.zeros(shape, dtype=F64)
        z[1 + D : 1 + D + shape[1]] = torch.eye(shape[1], dtype=F64)
        return z

    with monkeypatch.context() as patch:
        for drawing in (steps, dplr):
            patch.setattr(drawing, "draw_normal", normal)
        out = step(init)
    rows = out - out[0]
    return rows[1 : 1 + D].mT, rows[1 + D :].mT, out[0]


def pushed(
    sampler, model, schedule: Schedule, grid: Tensor, moments: tuple[Tensor, Tensor], monkeypatch
) -> tuple[Tensor, Tensor]:
    """Mean and covariance at the end of the grid, exactly, step by step."""
    mean, covariance = moments
    for times in pairwise(grid):
        step = partial(sampler, model, schedule=schedule, times=list(times))
        a, g, c = affine(step, monkeypatch)
        mean, covariance = a @ mean + c, a @ covariance @ a.mT + g @ g.mT
    return mean, covariance


def distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Of means and covariances, over the size of b's."""
    return max(float((u - v).norm() / v.norm()) for u, v in zip(a, b, strict=True))


# ---------------------------------------------------------------------------- second-order steps


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("schedule", WHOLE, ids=named)
def test_second_order_steps_keep_a_gaussian_for_every_number_of_steps(schedule, n, monkeypatch):
    grid = schedule.times(n)
    for covariance, density in (("low_rank", GAUSSIAN), ("diagonal", DIAGONAL)):
        sampler = partial(second_order_reverse, covariance_form=covariance)
        start, end = (marginal(density, schedule, t) for t in (schedule.t_max, schedule.t_min))
        model = exact_model(density, schedule)
        reached = pushed(sampler, model, schedule, grid, start, monkeypatch)
        assert distance(reached, end) < 1e-9


@pytest.mark.parametrize("covariance", ["diagonal", "none"])
def test_steps_that_leave_covariance_out_miss_the_gaussian(covariance, monkeypatch):
    schedule = VP()
    start, end = (marginal(GAUSSIAN, schedule, t) for t in (schedule.t_max, schedule.t_min))
    sampler, model = (
        partial(second_order_reverse, covariance_form=covariance),
        exact_model(GAUSSIAN, schedule),
    )
    errors = [
        distance(pushed(sampler, model, schedule, schedule.times(n), start, monkeypatch), end)
        for n in (4, 8, 64)
    ]
    assert errors[0] > 0.1
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.15


def test_signed_low_rank_parts_are_drawn_from(monkeypatch):
    """s2 = d + U diag(sign) U^T with a -1: c the largest eigenvalue, less the rest."""
    schedule = VP()

    def model(x: Tensor, sigma: Tensor) -> Scores:
        scores = exact_model(GAUSSIAN, schedule)(x, sigma)
        kappa = torch.diag_embed(scores.c) + scores.factor @ scores.factor.mT
        values, vectors = torch.linalg.eigh(kappa)
        most = values[:, -1:]
        factor = vectors[..., :1] * (most - values[:, :1]).sqrt().unsqueeze(1)
        return Scores(scores.scaled_score, most.expand_as(x), factor, -torch.ones(1, dtype=F64))

    start, end = (marginal(GAUSSIAN, schedule, t) for t in (schedule.t_max, schedule.t_min))
    reached = pushed(second_order_reverse, model, schedule, schedule.times(3), start, monkeypatch)
    assert distance(reached, end) < 1e-9


def test_one_step_on_a_mixture_has_the_exact_mean_and_covariance():
    schedule = VP()
    t, s = 0.6, 0.2
    start = MIXTURE.noisy(schedule.sigma(t), schedule.alpha(t)).sample(20000, seed=0)
    model, alpha, sigma = exact_model(MIXTURE, schedule), schedule.alpha(s), schedule.sigma(s)
    mean = MIXTURE.weights @ MIXTURE.means
    between = MIXTURE.means - mean
    clean = torch.einsum("k,kij->ij", MIXTURE.weights, MIXTURE.covariances)
    clean = clean + torch.einsum("k,ki,kj->ij", MIXTURE.weights, between, between)
    wanted = alpha**2 * clean + sigma**2 * torch.eye(D, dtype=F64)
    worst = {}
    for covariance in ("low_rank", "none"):
        x = second_order_reverse(
            model, start, schedule, times=[t, s], covariance_form=covariance, seed=1
        )
        centred = x - alpha * mean
        terms = [centred, centred[:, :, None] * centred[:, None] - wanted]
        z = [(u.mean(0) / (u.std(0) / len(u) ** 0.5)).abs().max() for u in terms]
        worst[covariance] = z
    assert max(worst["low_rank"]) < WITHIN
    assert worst["none"][0] < WITHIN
    assert worst["none"][1] > BEYOND


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, >= 0, and 0 for equal laws."""
    n = len(x)
    within = sum(torch.cdist(u, u).sum() / (n * (n - 1)) for u in (x, y))
    return float(2 * torch.cdist(x, y).mean() - within)


def test_few_second_order_steps_beat_ancestral_steps_on_a_mixture():
    schedule = VP()
    start = prior((1500, D), schedule, seed=0, dtype=F64)
    model = exact_model(MIXTURE, schedule)
    truth = MIXTURE.noisy(schedule.sigma(schedule.t_min), schedule.alpha(schedule.t_min))
    draws = truth.sample(1500, seed=0)
    apart = {}
    for covariance in ("low_rank", "diagonal", "none"):
        x = second_order_reverse(
            model, start, schedule, n_steps=6, covariance_form=covariance, seed=2
        )
        apart[covariance] = energy_distance(x, draws)
    assert apart["low_rank"] < apart["none"] / 3
    assert apart["diagonal"] < apart["none"] / 2
    assert apart["low_rank"] < 0.02


def test_ancestral_step_is_that_of_diffusers(monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="an optional extra (app)")
    scheduler = diffusers.DDPMScheduler(1000, variance_type="fixed_small", clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = from_alphas_cumprod(scheduler.alphas_cumprod)
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(4, 3, dtype=F64, generator=generator) for _ in range(2))
    for t in (1, 30, 999):
        noise = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(t))
        for drawing in (steps, dplr):
            monkeypatch.setattr(drawing, "draw_normal", lambda *_, noise=noise: noise)
        expected = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(t))
        out = second_order_reverse(
            lambda y, _: Scores(-eps, torch.ones_like(y)),
            x,
            schedule,
            times=[t, t - 1],
            covariance_form="none",
        )
        torch.testing.assert_close(out, expected.prev_sample, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------- SDE and ODE


@pytest.mark.parametrize("schedule", MILD, ids=named)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("sampler", [reverse_sde, probability_flow_ode])
def test_moments_on_a_gaussian_converge_at_the_order(sampler, solver, order, schedule, monkeypatch):
    start, end = (marginal(GAUSSIAN, schedule, t) for t in (schedule.t_max, schedule.t_min))
    model = gaussian_model(GAUSSIAN, schedule)
    errors = [
        distance(
            pushed(
                partial(sampler, solver=solver),
                model,
                schedule,
                schedule.times(n),
                start,
                monkeypatch,
            ),
            end,
        )
        for n in (60, 120)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)
    assert errors[1] < (0.2 if order == 1 else 0.01)


@pytest.mark.parametrize("schedule", MILD, ids=named)
def test_flow_maps_a_gaussian_by_standardising(schedule):
    # Along an eigenvector of the covariance: m0 + (std0 / std1) (x - m1).
    values, vectors = torch.linalg.eigh(COVARIANCE)
    first, last = schedule.t_max, schedule.t_min
    mean1, mean0 = (schedule.alpha(t) * MEAN for t in (first, last))
    std1, std0 = (
        (schedule.alpha(t) ** 2 * values + schedule.sigma(t) ** 2).sqrt() for t in (first, last)
    )
    x = prior((5, D), schedule, seed=3, dtype=F64)
    wanted = mean0 + (x - mean1) @ vectors * (std0 / std1) @ vectors.mT
    model = gaussian_model(GAUSSIAN, schedule)
    errors = [
        (probability_flow_ode(model, x, schedule, n_steps=n) - wanted).abs().max().item()
        for n in (60, 120)
    ]
    assert errors[1] < 0.005
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("schedule", WHOLE, ids=named)
def test_whole_schedules_run_from_prior_to_data(schedule):
    model = gaussian_model(GAUSSIAN, schedule)
    x = prior((2000, D), schedule, data_std=0.9, seed=0, dtype=F64)
    n = 120
    ends = [
        reverse_sde(model, x, schedule, n_steps=n, solver="heun", seed=1),
        probability_flow_ode(model, x, schedule, n_steps=n),
        predictor_corrector(model, x, schedule, n_steps=n, seed=1),
    ]
    mean, covariance = marginal(GAUSSIAN, schedule, schedule.t_min)
    for end in ends:
        assert (end.mean(0) - mean).abs().max() < 0.1
        assert (end.mT.cov() - covariance).abs().max() < 0.12
    assert not torch.equal(ends[0], ends[2])


# ------------------------------------------------------------------------ corrector, annealing


CORRECTORS = method_names()


def langevin_map(h: float, variance: float) -> tuple[float, float]:
    return 1 - h / variance, 2 * h


def cayley_map(h: float, variance: float) -> tuple[float, float]:
    root = 1 + h / variance / 2
    return 1 - h / variance / root, 2 * h / root**2


def exact_map(h: float, variance: float) -> tuple[float, float]:
    a = math.exp(-h / variance)
    return a, variance * (1 - a**2)


# a and b by method, with and without "mh_"; a step not named is exact on a Gaussian. Of mala only
# that it goes there too is shown.
MAPS = {"langevin": langevin_map, "mala": langevin_map, "ozaki_cayley": cayley_map}


@pytest.mark.parametrize("corrector", CORRECTORS)
def test_corrector_moves_a_wrong_marginal_by_its_closed_form(corrector):
    # On N(0, 1/p) a step multiplies the variance by a^2 and adds b. sigma is small, so that the
    # unit of the step, sigma^2, shows.
    schedule = VP()
    t = schedule.t_of_sigma(0.1)
    variance = schedule.alpha(t) ** 2 * 0.01 + 0.1**2
    h, k = 0.3 * 0.1**2, 3

    def model(x: Tensor, level: Tensor) -> Scores:
        s = level[:, None]
        v = (1 - s**2) * 0.01 + s**2
        return Scores(-s * x / v, 1 - s**2 / v * torch.ones_like(x))

    start = 1.5 * variance**0.5 * ops.normal((8000, 2), seed=9, dtype=F64)
    # A predictor step too short to matter, then k corrections.
    x = predictor_corrector(
        model,
        start,
        schedule,
        times=[t + 1e-9, t],
        corrector=corrector,
        corrector_steps=k,
        corrector_step_size=0.3,
        seed=0,
    )
    a, b = MAPS.get(corrector.removeprefix("mh_"), exact_map)(h, variance)
    wanted = 2.25 * variance
    for _ in range(k):
        wanted = a**2 * wanted + b
    # The sample variance in units of its standard error.
    assert abs((x**2).mean().item() / wanted - 1) / math.sqrt(2 / x.numel()) < WITHIN
    assert abs((start**2).mean().item() / wanted - 1) / math.sqrt(2 / x.numel()) > BEYOND


@pytest.mark.parametrize("predictor", ["euler", "heun", "second_order"])
def test_no_corrections_leave_the_predictor(predictor):
    schedule = VP()
    model = exact_model(GAUSSIAN, schedule)
    x = prior((3, D), schedule, seed=0, dtype=F64)
    options = {"n_steps": 5, "seed": 3}
    alone = (
        second_order_reverse(model, x, schedule, **options)
        if predictor == "second_order"
        else reverse_sde(model, x, schedule, solver=predictor, **options)
    )
    both = predictor_corrector(
        model, x, schedule, predictor=predictor, corrector_steps=0, **options
    )
    assert torch.equal(both, alone)


def test_corrections_use_each_step_of_the_chain_noise_once(monkeypatch):
    used = []
    original = sample

    def spy(*args, **options):
        used.extend(range(options["state"]["step"], options["state"]["step"] + options["burn_in"]))
        return original(*args, **options)

    monkeypatch.setattr(steps, "sample", spy)
    schedule = VP()
    x = prior((2, D), schedule, seed=0, dtype=F64)
    model = gaussian_model(GAUSSIAN, schedule)
    predictor_corrector(model, x, schedule, n_steps=4, corrector_steps=3, offset=5, seed=0)
    assert used == list(range(15, 27))


@pytest.mark.parametrize("method", ["langevin", "ozaki"])
def test_annealed_chains_reach_the_mixture(method):
    schedule = VE()
    sigmas = torch.logspace(math.log10(4), -1, 16, dtype=F64)
    init = 4 * ops.normal((3000, D), seed=0, dtype=F64)
    chains = annealed_langevin(
        diagonal_model(MIXTURE, schedule),
        init,
        sigmas,
        method=method,
        step_size=0.15,
        n_steps=25,
        thin=25,
        seed=1,
    )
    assert chains.draws.shape == (3000, 1, D)
    assert chains.stats["n_score_evaluations"] == 16 * 25
    assert chains.state["step"] == 16 * 25
    assert not bool(chains.stats["diverged"].any())
    x = chains.draws[:, 0]
    side = (x[:, 0] > -0.25).double()
    truth = MIXTURE.noisy(0.1).sample(100_000, seed=5)
    expected = (truth[:, 0] > -0.25).double().mean()
    assert abs(side.mean() - expected) < WITHIN * (side.std() / len(x) ** 0.5)
    for power in (1, 2):
        terms = x**power - (truth**power).mean(0)
        assert bool((terms.mean(0).abs() < WITHIN * terms.std(0) / len(x) ** 0.5).all())


def test_annealed_chains_go_on_with_their_noise():
    """Equal levels in two calls of `sample` and a state between, as one chain."""
    model = exact_model(MIXTURE, VE())
    init = ops.normal((4, D), seed=0, dtype=F64)
    sigmas = [0.5, 0.4]
    chains = annealed_langevin(model, init, sigmas, n_steps=3, seed=2, first_chain=6)
    x = init
    for step in range(6):
        sigma = sigmas[step // 3]
        h = 0.1 * sigma**2
        noise = ops.normal((4, D), seed=2, offset=step, first=6, dtype=F64)
        score = MIXTURE.noisy(sigma).score(x)
        x = x + h * score + math.sqrt(2 * h) * noise
        if step >= 3:
            torch.testing.assert_close(chains.draws[:, step - 3], x, rtol=1e-12, atol=1e-12)
    split = annealed_langevin(model, init[2:], sigmas, n_steps=3, seed=2, first_chain=8)
    assert torch.equal(split.draws, chains.draws[2:])


def test_correctors_and_annealed_chains_take_a_rule():
    schedule, calls = VP(), []

    def model(x: Tensor, sigma: Tensor) -> Scores:
        calls.append(len(x))
        return exact_model(MIXTURE, schedule)(x, sigma)

    x = prior((6, D), schedule, seed=0, dtype=F64)
    options = {"n_steps": 2, "corrector": "mala", "corrector_steps": 2, "seed": 1}
    counts, ends = [], []
    for rule in ("trapezoid", "simpson", "lobatto-3"):
        ends.append(predictor_corrector(model, x, schedule, rule=rule, **options))
        counts.append(len(calls))
        calls.clear()
    assert counts[1] - counts[0] == 2 * 2
    assert counts[2] - counts[0] == 2 * 2 * 3
    assert bool(torch.stack(ends).isfinite().all())
    coins = TwoCoin(SmoothBound(third=1.0), nodes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BoundWarning)  # the bound is a guess
        chains = annealed_langevin(
            model, x, [0.9, 0.5], n_steps=3, method="mala", rule=coins, seed=0
        )
    assert chains.stats["rule"] == "two_coin"
    assert chains.stats["n_score_evaluations"] >= 2 + 6 * 4
    for wrong in ({"corrector": "langevin"}, {}):
        rule = "rule must be 'trapezoid' for the unadjusted 'langevin', got simpson"
        with pytest.raises(ValueError, match=f"^predictor_corrector: {rule}"):
            predictor_corrector(model, x, schedule, n_steps=2, rule="simpson", **wrong)


def test_score_alone_suffices_where_only_the_score_is_used():
    """The same draws with and without c, and an error where it is missing."""
    schedule = VP()
    full = exact_model(GAUSSIAN, schedule)

    def alone(x: Tensor, sigma: Tensor) -> Scores:
        return gaussian_model(GAUSSIAN, schedule)(x, sigma).replace(c=None)

    x = prior((50, D), schedule, seed=0, dtype=F64)
    near = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    runs = [
        partial(second_order_reverse, covariance_form="none"),
        predictor_corrector,
        partial(predictor_corrector, predictor="second_order", covariance_form="none"),
    ]
    for run in runs:
        options = {"schedule": schedule, "n_steps": 3, "seed": 1}
        near(run(alone, x, **options), run(full, x, **options))
    sigmas = [0.9, 0.5]
    near(
        annealed_langevin(alone, x, sigmas, n_steps=3, seed=1).draws,
        annealed_langevin(full, x, sigmas, n_steps=3, seed=1).draws,
    )
    mala = {"method": "mala", "n_steps": 5, "seed": 1, "step_size": 0.4}
    acceptance = [
        annealed_langevin(model, x, sigmas, **mala).stats["acceptance"] for model in (alone, full)
    ]
    # On a Gaussian the trapezoid rule is exact; s2 makes no difference to it.
    near(*acceptance)
    assert bool((acceptance[0] < 1).any())
    assert bool(
        predictor_corrector(alone, x, schedule, n_steps=2, corrector="mala").isfinite().all()
    )
    for run in (
        second_order_reverse,
        partial(second_order_reverse, covariance_form="diagonal"),
        partial(predictor_corrector, corrector="ozaki"),
        partial(predictor_corrector, predictor="second_order"),
    ):
        with pytest.raises(
            TypeError,
            match=r"(model must give c \(.*\), got None|c must be a Tensor, got NoneType)$",
        ):
            run(alone, x, schedule, n_steps=2)
    with pytest.raises(TypeError, match=r"c must be a Tensor, got NoneType$"):
        annealed_langevin(alone, x, sigmas, n_steps=2, method="ozaki")


def test_adjusted_langevin_corrects_its_ratio_where_there_is_c(monkeypatch):
    seen = []
    original = sample

    def spy(score_fn, *args, **options):
        seen.append(type(score_fn(options["state"]["x"])))
        return original(score_fn, *args, **options)

    for module in (annealed, steps):
        monkeypatch.setattr(module, "sample", spy)
    for method in ("langevin", "mala", "ozaki"):
        annealed_langevin(rowwise, X, [1.0], n_steps=1, method=method)
        predictor_corrector(rowwise, X, VP(), n_steps=1, corrector=method)
    assert seen == [Tensor] * 2 + [UnscaledScores] * 4


def test_further_arguments_reach_the_chain():
    """Where s2 is positive they change the step; few products end a Lanczos step early."""
    schedule = VP()

    def model(x: Tensor, sigma: Tensor) -> Scores:
        factor = torch.randn(len(x), 6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
        return Scores(-x, 1 + torch.arange(6.0).expand(len(x), -1).double(), factor)

    x = ops.normal((2, 6), seed=0, dtype=F64)
    annealed = partial(annealed_langevin, model, x, [0.5, 0.4], n_steps=2, seed=1, step_size=0.5)
    correct = partial(predictor_corrector, model, x, schedule, n_steps=2, seed=1)
    for options in ({"curvature": "abs"}, {"curvature": "raw"}):
        moved = annealed(method="ozaki", **options).draws
        assert not torch.allclose(moved, annealed(method="ozaki").draws)
        moved = correct(corrector="ozaki", **options)
        assert not torch.allclose(moved, correct(corrector="ozaki"))
    for options in ({"max_iterations": 1}, {"tolerance": 0.5}):
        lanczos = {"method": "ozaki_lanczos", "curvature": "abs"}
        stats = annealed(**lanczos, **options).stats
        assert bool(
            (stats["lanczos_iterations"] < annealed(**lanczos).stats["lanczos_iterations"]).all()
        )
        lanczos["corrector"] = lanczos.pop("method")
        assert not torch.equal(correct(**lanczos, **options), correct(**lanczos))


def test_annealed_chains_sum_over_levels_what_can_be_summed(monkeypatch):
    original = sample

    def timed(*args, **options):
        chains = original(*args, **options)
        chains.stats["seconds"] = 2.5
        return chains

    monkeypatch.setattr(annealed, "sample", timed)
    options = {"n_steps": 4, "seed": 0, "method": "mh_ozaki", "step_size": 0.5}
    whole = annealed_langevin(rowwise, X, [1.0, 0.7, 0.5], **options).stats
    assert whole["seconds"] == 7.5
    assert whole["n_score_evaluations"] == 15  # one more at the start of a level
    first = annealed_langevin(rowwise, X, [1.0, 0.7], **options).state
    assert first["step"] == 8
    assert whole["step_size"] == 0.5 * 0.25
    assert bool((whole["acceptance"] <= 1).all())


@pytest.mark.filterwarnings("ignore::hos_ext.sampling.RunawayWarning")
def test_annealed_chains_count_divergences_of_all_levels():
    def model(x: Tensor, sigma: Tensor) -> Scores:
        bad = (torch.arange(len(x)) == 1) & (sigma > 0.7)
        score = torch.where(bad[:, None], torch.nan, -x)
        return Scores(score, torch.ones_like(x))

    stats = annealed_langevin(model, torch.zeros(3, 2), [1.0, 0.5], n_steps=2, seed=0).stats
    assert stats["divergences"].tolist() == [0, 4, 0]
    assert stats["diverged"].tolist() == [False, True, False]


# ----------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("schedule", WHOLE, ids=named)
def test_one_step_gives_the_exact_posterior_of_a_mixture(schedule):
    t = schedule.t_min + 0.4 * (schedule.t_max - schedule.t_min)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = MIXTURE.noisy(sigma, alpha).sample(6, seed=0)
    got = tweedie_denoise(exact_model(MIXTURE, schedule), x, schedule, t)
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
    close(got.mean, MIXTURE.posterior_mean(x, sigma, alpha))
    close(got.covariance.dense(), MIXTURE.posterior_covariance(x, sigma, alpha))


def test_one_step_takes_a_time_for_each_sample():
    schedule = VP()

    def model(x: Tensor, sigma: Tensor) -> Scores:
        return Scores(-sigma[:, None] * x, torch.ones_like(x) * sigma[:, None])

    x = torch.randn(3, 2)
    t = torch.tensor([0.1, 0.5, 0.9])
    together = tweedie_denoise(model, x, schedule, t)
    for i in range(3):
        alone = tweedie_denoise(model, x[i : i + 1], schedule, t[i].item())
        torch.testing.assert_close(together.mean[i : i + 1], alone.mean)
        torch.testing.assert_close(together.covariance.diag[i : i + 1], alone.covariance.diag)


@pytest.mark.parametrize("schedule", WHOLE, ids=named)
def test_prior_has_the_variance_of_the_last_marginal(schedule):
    x = prior((4000, 2, 3), schedule, data_std=2.0, seed=0)
    variance = schedule.sigma(schedule.t_max) ** 2 + 4 * schedule.alpha(schedule.t_max) ** 2
    assert x.dtype == torch.get_default_dtype()
    error = (x.double() ** 2).mean().item() / variance - 1
    assert abs(error) < WITHIN * math.sqrt(2 / x.numel())
    assert torch.equal(prior((3, 2, 3), schedule, data_std=2.0, seed=0, first=7), x[7:10])


# ------------------------------------------------------------------------------------- the noise


def annealed_draws(model, init: Tensor, schedule: Schedule, **_) -> Tensor:
    options = {"n_steps": 3, "seed": 4, "method": "ozaki"}
    return annealed_langevin(model, init, [1.0, 0.5], **options).draws


def denoised(model, x: Tensor, schedule: Schedule, **_) -> Tensor:
    t = torch.linspace(0.2, 0.9, len(x), dtype=x.dtype, device=x.device)
    found = tweedie_denoise(model, x, schedule, t)
    return found.mean + found.sample(1, seed=4)[0]


def flow(model, init: Tensor, schedule: Schedule, *, seed: int, **options) -> Tensor:
    return probability_flow_ode(model, init, schedule, **options)


SAMPLERS = {
    "reverse_sde euler": partial(reverse_sde, solver="euler"),
    "reverse_sde heun": partial(reverse_sde, solver="heun"),
    "second_order_reverse low_rank": second_order_reverse,
    "second_order_reverse diagonal": partial(second_order_reverse, covariance_form="diagonal"),
    "second_order_reverse none": partial(second_order_reverse, covariance_form="none"),
    "predictor_corrector": partial(predictor_corrector, corrector="ozaki", corrector_steps=2),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def rowwise(x: Tensor, sigma: Tensor) -> Scores:
    """A model whose rows do not depend on each other, not even in the last bit."""
    s = sigma.reshape(-1, *[1] * (x.dim() - 1))
    factor = torch.stack([torch.sin(x), x / (1 + x**2)], -1).flatten(1, -2)
    return Scores(-s * x / (1 + s**2), 0.1 + 1 / (1 + x**2), factor)


@every_sampler
def test_chunks_and_processes_draw_the_same(sampler):
    schedule = VP()
    x = prior((7, 3), schedule, seed=0)
    options = {"n_steps": 5, "seed": 4}
    whole = sampler(rowwise, x, schedule, **options)
    for chunk in (1, 3, 100):
        assert torch.equal(sampler(rowwise, x, schedule, chunk_size=chunk, **options), whole)
    assert torch.equal(sampler(rowwise, x[2:], schedule, first=2, **options), whole[2:])
    assert not torch.equal(sampler(rowwise, x[2:], schedule, **options), whole[2:])
    assert torch.equal(x, prior((7, 3), schedule, seed=0))


@pytest.mark.parametrize(
    "sampler", [*SAMPLERS.values(), flow, annealed_draws, denoised], ids=lambda s: None
)
@pytest.mark.parametrize("schedule", [VP(), from_alphas_cumprod(TABLE)], ids=named)
def test_draws_are_the_same_on_every_device(sampler, schedule, device):
    x = prior((5, 3), schedule, seed=0, dtype=F64)
    there = prior((5, 3), schedule, seed=0, dtype=F64, device=device)
    assert_near(there, x)
    options = {"n_steps": 5, "seed": 4}
    moved = sampler(rowwise, there, schedule, **options)
    assert moved.device.type == device.type
    assert_near(moved, sampler(rowwise, x, schedule, **options), times=10)


@every_sampler
def test_a_run_in_two_parts_is_one_run(sampler):
    schedule = VP()
    x, times = prior((4, 3), schedule, seed=0, dtype=F64), schedule.times(6)
    whole = sampler(rowwise, x, schedule, times=times, seed=4)
    half = sampler(rowwise, x, schedule, times=times[:3], seed=4)
    ends = [
        sampler(rowwise, half, schedule, times=times[2:], seed=4, offset=offset)
        for offset in (2, 0)
    ]
    assert torch.equal(ends[0], whole)
    assert not torch.equal(ends[1], whole)


@every_sampler
def test_images_are_rows_of_their_entries(sampler):
    schedule = VP()
    x = prior((4, 6), schedule, seed=0)
    flat = sampler(rowwise, x, schedule, n_steps=4, seed=4)
    image = sampler(rowwise, x.reshape(4, 1, 2, 3), schedule, n_steps=4, seed=4)
    assert torch.equal(image.flatten(1), flat)
    assert not image.requires_grad


@every_sampler
def test_seed_comes_from_torch_where_none_is_given(sampler):
    schedule = VP()
    x = prior((2, 3), schedule, seed=0)
    draws = []
    for torch_seed in (0, 0, 1):
        torch.manual_seed(torch_seed)
        draws.append(sampler(rowwise, x, schedule, n_steps=2))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_streams_are_apart():
    """prior, reverse steps, second-order steps and corrector of one seed share no noise."""
    schedule = VE(0.1, 2.0)

    def model(x: Tensor, sigma: Tensor) -> Scores:
        return Scores(torch.zeros_like(x), torch.zeros_like(x))

    zero = torch.zeros(4, 3, dtype=F64)
    options = {"n_steps": 1, "seed": 0}
    corrected = predictor_corrector(model, zero, schedule, **options)
    draws = [
        prior((4, 3), schedule, seed=0, dtype=F64),
        reverse_sde(model, zero, schedule, **options),
        second_order_reverse(model, zero, schedule, **options),
    ]
    draws.append(corrected - draws[1])
    draws = [x / x.norm() for x in draws]
    for i in range(4):
        for j in range(i):
            assert (draws[i] - draws[j]).abs().max() > 0.1


def test_no_samples_come_back_as_none():
    out = second_order_reverse(rowwise, torch.zeros(0, 3), VP(), n_steps=2, seed=0)
    assert out.shape == (0, 3)


# -------------------------------------------------------------------------------------- bad input


def with_value(name: str, value: float, row: int, before: float):
    """`rowwise` with a bad value in one row where sigma is below a level."""

    def model(x: Tensor, sigma: Tensor) -> Scores:
        scores = rowwise(x, sigma).replace(sign=None)
        field = getattr(scores, name).clone()
        if sigma[0] < before and len(x) > row:
            field[row] = value
        return scores.replace(**{name: field})

    return model


@pytest.mark.parametrize("name", ["scaled_score", "c", "factor"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_name_time_and_sample(name, value):
    schedule = VP()
    model = with_value(name, value, row=1, before=schedule.sigma(0.4))
    message = f"{name} from model must be finite, got {value} at t = 0.25 for sample 14"
    options = {"times": [0.9, 0.5, 0.25, 0.1], "first": 10, "chunk_size": 3, "seed": 0}
    x = torch.ones(5, 3)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        second_order_reverse(model, x, schedule, **options)
    # rows 0 ... 2 are one chunk, whose row 1 is bad: sample 11
    assert str(caught.value) == f"second_order_reverse: {message}".replace("14", "11")
    if name == "scaled_score":
        for sampler in (reverse_sde, predictor_corrector):  # corrector "langevin"
            with pytest.raises(ValueError, match=r"must be finite, got (nan|inf) at t = 0\.25 for"):
                sampler(model, x, schedule, **options)
        del options["seed"]
        with pytest.raises(
            ValueError, match=r"^probability_flow_ode: scaled_score from model must be"
        ):
            probability_flow_ode(model, x, schedule, **options)
    else:
        for sampler in (reverse_sde, predictor_corrector):
            assert bool(sampler(model, x, schedule, **options).isfinite().all())
        with pytest.raises(ValueError, match=rf"^predictor_corrector: {name} from model must be f"):
            predictor_corrector(model, x, schedule, corrector="ozaki", **options)
        options["covariance_form"] = "none"
        assert bool(second_order_reverse(model, x, schedule, **options).isfinite().all())


def test_overflow_of_a_step_names_time_and_sample():
    def model(x: Tensor, sigma: Tensor) -> Scores:
        return Scores(torch.where(torch.arange(3)[:, None] == 2, 3e38, 0.0) * x, x)

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        probability_flow_ode(model, torch.ones(3, 2), EDM(), n_steps=1, solver="euler")
    assert str(caught.value) == (
        "probability_flow_ode: x after a step must be finite, got inf at t = 0.002 for sample 2"
    )


def test_negative_variances_name_time_and_sample():
    schedule = VP()
    x = torch.zeros(3, 2)

    def run(model, **options):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            second_order_reverse(model, x, schedule, times=[0.5, 0.1], first=4, **options)
        return str(caught.value).removeprefix("second_order_reverse: ")

    alpha, sigma = schedule.alpha(0.5), schedule.sigma(0.5)
    negative = with_value("c", -1000.0, row=1, before=1.0)
    # rowwise's factor at 0 is 0: the variance is c sigma^2 / alpha^2
    value = -1000 * sigma**2 / alpha**2
    for covariance in ("low_rank", "diagonal"):
        assert run(negative, covariance_form=covariance) == (
            f"posterior variance must be at least 0, got {value:g} at t = 0.5 for sample 5"
        )
    assert bool(
        second_order_reverse(negative, x, schedule, times=[0.5, 0.1], covariance_form="none")
        .isfinite()
        .all()
    )

    def covered(x: Tensor, sigma: Tensor) -> Scores:
        return Scores(x, torch.full_like(x, -50.0), torch.full((3, 2, 1), 8.0))

    assert run(covered).startswith(
        "diagonal part of the step's covariance must be at least 0, got -"
    )
    assert run(covered).endswith(" at t = 0.5 for sample 4")

    def signed(x: Tensor, sigma: Tensor) -> Scores:
        factor = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]).unsqueeze(-1)
        return Scores(x, torch.full_like(x, 1.0), 0.999 * factor, torch.tensor([-1.0]))

    assert run(signed) == (
        "the step's covariance must be positive definite, got one that is not at t = 0.5 for "
        "sample 5"
    )


X = torch.zeros(2, 3)
KNOWN = ", ".join(map(repr, CORRECTORS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: reverse_sde(rowwise, X, VP()),
            "reverse_sde: exactly one of n_steps and times must be given, got neither",
        ),
        (
            lambda: reverse_sde(rowwise, X, VP(), n_steps=2, times=[1.0, 0.5]),
            "reverse_sde: exactly one of n_steps and times must be given, got both",
        ),
        (
            lambda: reverse_sde(rowwise, X, VP(), n_steps=0),
            "reverse_sde: n_steps must be at least 1, got 0",
        ),
        (
            lambda: reverse_sde(rowwise, X, VP(), times=[1.0]),
            "reverse_sde: times must have shape (N,), N >= 2, got (1,)",
        ),
        (
            lambda: reverse_sde(rowwise, X, VP(), times=[0.5, 0.5]),
            "reverse_sde: times must be finite and descending, got [0.5, 0.5]",
        ),
        (
            lambda: probability_flow_ode(rowwise, X, VP(), times=[math.inf, 0.5]),
            "probability_flow_ode: times must be finite and descending, got [inf, 0.5]",
        ),
        (
            lambda: second_order_reverse(rowwise, X, VP(), times=[0.5, 0.0]),
            "second_order_reverse: times must be in [0.001, 1], got 0",
        ),
        (
            lambda: second_order_reverse(rowwise, X, VP(), times=[2.0, 0.5]),
            "second_order_reverse: times must be in [0.001, 1], got 2",
        ),
        (
            lambda: reverse_sde(rowwise, X, VP(), n_steps=1, solver="rk4"),
            "reverse_sde: solver must be one of 'euler', 'heun', got 'rk4'",
        ),
        (
            lambda: probability_flow_ode(rowwise, X, VP(), n_steps=1, solver="rk4"),
            "probability_flow_ode: solver must be one of 'euler', 'heun', got 'rk4'",
        ),
        (
            lambda: second_order_reverse(rowwise, X, VP(), n_steps=1, covariance_form="full"),
            (
                "second_order_reverse: covariance_form must be one of 'low_rank', 'diagonal', "
                "'none', got 'full'"
            ),
        ),
        (
            lambda: predictor_corrector(rowwise, X, VP(), n_steps=1, predictor="ode"),
            (
                "predictor_corrector: predictor must be one of 'euler', 'heun', 'second_order', "
                "got 'ode'"
            ),
        ),
        (
            lambda: predictor_corrector(rowwise, X, VP(), n_steps=1, corrector_step_size=0.0),
            "predictor_corrector: corrector_step_size must be finite and > 0, got 0",
        ),
        (
            lambda: predictor_corrector(
                rowwise, X, VP(), n_steps=1, corrector="hmc", corrector_steps=0
            ),
            f"predictor_corrector: corrector must be one of {KNOWN}, got 'hmc'",
        ),
        (
            lambda: annealed_langevin(rowwise, X, [1.0], n_steps=1, method="hmc"),
            f"annealed_langevin: method must be one of {KNOWN}, got 'hmc'",
        ),
        (
            lambda: annealed_langevin(rowwise, X, [1.0, 0.5], n_steps=-1),
            "annealed_langevin: n_steps must be in [0, 2**31), got -1",
        ),
        (
            lambda: annealed_langevin(rowwise, X, [1.0], n_steps=1, first_chain=-1),
            "annealed_langevin: first_chain must be in [0, 2**63), got -1",
        ),
        (
            lambda: annealed_langevin(rowwise, X, [1.0], n_steps=1, curvature="flip"),
            "annealed_langevin: curvature must be one of 'clamp', 'abs', 'raw', got 'flip'",
        ),
        (
            lambda: predictor_corrector(rowwise, X, VP(), n_steps=1, corrector_steps=-1),
            "predictor_corrector: corrector_steps must be in [0, 2**31), got -1",
        ),
        (
            lambda: reverse_sde(rowwise, X, VP(), n_steps=1, chunk_size=0),
            "reverse_sde: chunk_size must be at least 1, got 0",
        ),
        (
            lambda: reverse_sde(rowwise, X, VP(), n_steps=1, seed=-1),
            "reverse_sde: seed must be in [0, 2**64), got -1",
        ),
        (
            lambda: reverse_sde(rowwise, X[0], VP(), n_steps=1),
            "reverse_sde: init must have shape (B, *dims), got (3,)",
        ),
        (
            lambda: reverse_sde(rowwise, X.half(), VP(), n_steps=1),
            "reverse_sde: init must have dtype float32, float64, got torch.float16",
        ),
        (
            lambda: reverse_sde(lambda x, s: Scores(x[:1], x), X, VP(), n_steps=1),
            "reverse_sde: scaled_score from model must have shape (2, 3), got (1, 3)",
        ),
        (
            lambda: annealed_langevin(rowwise, X, [1.0, 0.0], n_steps=1),
            "annealed_langevin: sigmas must be positive, got 0.0",
        ),
        (
            lambda: annealed_langevin(rowwise, X, [0.5, 1.0], n_steps=1),
            "annealed_langevin: sigmas must be finite and descending, got [0.5, 1.0]",
        ),
        (
            lambda: annealed_langevin(rowwise, X, [], n_steps=1),
            "annealed_langevin: sigmas must have shape (N,), N >= 1, got (0,)",
        ),
        (
            lambda: annealed_langevin(rowwise, X, [1.0], n_steps=1, step_size=math.inf),
            "annealed_langevin: step_size must be finite and > 0, got inf",
        ),
        (
            lambda: prior((2, 3), VP(), data_std=-1.0),
            "prior: data_std must be finite and >= 0, got -1",
        ),
        (
            lambda: tweedie_denoise(rowwise, X, VP(), 0.0),
            "VP.sigma: t must be in [0.001, 1], got 0",
        ),
        (
            lambda: tweedie_denoise(rowwise, X, VP(), torch.tensor([0.1, 0.2, 0.3])),
            "tweedie_denoise: t must be a float or have shape (2,), got (3,)",
        ),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: reverse_sde(lambda x, s: x, X, VP(), n_steps=1),
            "reverse_sde: model must return Scores, got Tensor",
        ),
        (
            lambda: annealed_langevin(lambda x, s: x, X, [1.0], n_steps=1),
            "annealed_langevin: model must return Scores, got Tensor",
        ),
        (
            lambda: tweedie_denoise(lambda x, s: x, X, VP(), 0.5),
            "tweedie_denoise: model must return Scores, got Tensor",
        ),
        (
            lambda: reverse_sde(rowwise, X, 0.5, n_steps=1),
            "reverse_sde: schedule must be a Schedule, got float",
        ),
        (lambda: prior((2, 3), "VP"), "prior: schedule must be a Schedule, got str"),
        (lambda: prior((2, 3), VP(), data_std="1"), "prior: data_std must be a number, got '1'"),
        (
            lambda: reverse_sde(rowwise, X, VP(), times="ab"),
            "reverse_sde: times must be a sequence of numbers, got str",
        ),
        (
            lambda: annealed_langevin(rowwise, X, [1.0], n_steps=1, step_size="a"),
            "annealed_langevin: step_size must be a number, got 'a'",
        ),
        (
            lambda: annealed_langevin(rowwise, X, [1.0], n_steps=1, burn_in=3),
            (
                "annealed_langevin: options must be among curvature, tolerance, max_iterations, "
                "rule, got 'burn_in'"
            ),
        ),
        (
            lambda: reverse_sde(rowwise, X, VP(), n_steps=1, steps=2),
            (
                "reverse_sde: options must be among n_steps, times, first, chunk_size, "
                "model_kwargs, seed, generator, offset, got 'steps'"
            ),
        ),
        (
            lambda: probability_flow_ode(rowwise, X, VP(), n_steps=1, seed=0),
            (
                "probability_flow_ode: options must be among n_steps, times, first, chunk_size, "
                "model_kwargs, got 'seed'"
            ),
        ),
        (
            lambda: second_order_reverse(rowwise, X, VP(), n_steps=1, method="euler"),
            (
                "second_order_reverse: options must be among n_steps, times, first, chunk_size, "
                "model_kwargs, seed, generator, offset, got 'method'"
            ),
        ),
        (
            lambda: predictor_corrector(rowwise, X, VP(), n_steps=1, log_prob=len),
            (
                "predictor_corrector: options must be among curvature, tolerance, max_iterations, "
                "rule, got 'log_prob'"
            ),
        ),
        (
            lambda: reverse_sde(rowwise, [1.0], VP(), n_steps=1),
            "reverse_sde: init must be a Tensor, got list",
        ),
    ],
)
def test_wrong_kinds_are_refused(call, message):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message
