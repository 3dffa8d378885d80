"""Flow models from end to end: as scores, along their own schedule, trained, with covariances."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from test_reverse import CIRCLE, GAUSSIAN, MIXTURE, D, energy_distance, exact_model
from torch import Tensor, nn

from hos_ext import MLP, ModelScore, Posterior, Rectified, ScoreMatchingLoss, posterior
from hos_ext.densities import Gaussian, GaussianMixture
from hos_ext.diffusion import (
    AlongSchedule,
    generate,
    log_likelihood,
    prior,
    probability_flow_ode,
    reverse_sde,
    second_order_reverse,
    tweedie_denoise,
)
from hos_ext.schedules import EDM, Interpolant, Schedule
from hos_ext.tweedie import score_from_velocity
from hos_ext.uncertainty import posterior_from_velocity

F64 = torch.float64
FLOW = Rectified(t_max=0.999)
LAWS = {"gaussian": GAUSSIAN, "mixture": MIXTURE}
TIMES = torch.tensor([0.002, 0.3, 0.7, 0.95], dtype=F64)

# Energy distances of two draws of 2000 points of MIXTURE stay below by chance alone.
SAME = 0.004


def velocity(law: Gaussian | GaussianMixture, schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
    """E[dx_t / dt | x_t], exact, row by row: the network of a perfect flow model."""
    rows = []
    for row, time in zip(x, t.tolist(), strict=True):
        sigma, alpha = schedule.sigma(time), schedule.alpha(time)
        clean = law.posterior_mean(row[None], sigma, alpha)
        noise = (row[None] - alpha * clean) / sigma
        rows.append(schedule.alpha_slope(time) * clean + schedule.sigma_slope(time) * noise)
    return torch.cat(rows)


def flow_net(law: Gaussian | GaussianMixture, schedule: Schedule):
    """The same for a batch at one time, as the samplers ask."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        time = t[0].item()
        sigma, alpha = schedule.sigma(time), schedule.alpha(time)
        clean = law.posterior_mean(x, sigma, alpha)
        noise = (x - alpha * clean) / sigma
        return schedule.alpha_slope(time) * clean + schedule.sigma_slope(time) * noise

    return net


def noisy(law: Gaussian | GaussianMixture, schedule: Schedule, times: Tensor) -> Tensor:
    """One noisy sample at each of the times."""
    clean = law.sample(len(times), seed=3)
    noise = torch.randn(len(times), D, generator=torch.Generator().manual_seed(4), dtype=F64)
    return schedule.alpha(times)[:, None] * clean + schedule.sigma(times)[:, None] * noise


def plain(law: Gaussian | GaussianMixture):
    """The exact scores of both orders in variance-exploding coordinates, as a head gives them."""
    return exact_model(law, EDM(1e-4, 1e4))


def check_posteriors(found: Posterior, law, x: Tensor, schedule: Schedule, times: Tensor) -> None:
    """Means and covariances to 1e-10 of their size."""
    for i, t in enumerate(times.tolist()):
        row, sigma, alpha = x[i : i + 1], schedule.sigma(t), schedule.alpha(t)
        mean = law.posterior_mean(row, sigma, alpha)
        covariance = law.posterior_covariance(row, sigma, alpha)
        assert (found.mean[i] - mean).norm() < 1e-10 * mean.norm()
        assert (found.covariance.dense()[i] - covariance).norm() < 1e-10 * covariance.norm()


# ------------------------------------------------------------------- mean and covariance of x0


SCHEDULES = pytest.mark.parametrize("schedule", [FLOW, CIRCLE], ids=["rectified", "circle"])
EVERY_LAW = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch itself
@SCHEDULES
@EVERY_LAW
def test_a_velocity_has_the_exact_posterior(law, schedule):
    times = TIMES.clamp(schedule.t_min, schedule.t_max)
    x = noisy(law, schedule, times)
    for rank in (D - 1, D):
        found = posterior_from_velocity(
            lambda x: velocity(law, schedule, x, times),
            x,
            schedule,
            times,
            rank=rank,
            tolerance=1e-12,
            floor=0.0,
            chunk_size=1,
        )
        check_posteriors(found, law, x, schedule, times)


@SCHEDULES
@EVERY_LAW
def test_a_model_of_plain_noise_has_the_exact_posterior_along_a_flow(law, schedule):
    times = TIMES.clamp(schedule.t_min, schedule.t_max)
    for i, t in enumerate(times.tolist()):
        sigma, alpha = schedule.sigma(t), schedule.alpha(t)
        x = noisy(law, schedule, times)[i : i + 1]
        model = AlongSchedule(plain(law), schedule)
        ways = (
            tweedie_denoise(model, x, schedule, t),
            posterior(
                x, plain(law)(x / alpha, torch.tensor([sigma / alpha], dtype=F64)), sigma, alpha
            ),
        )
        for found in ways:
            check_posteriors(found, law, x, schedule, times[i : i + 1])


def test_what_a_posterior_of_a_velocity_refuses():
    x, velocity_fn = torch.ones(2, 3), lambda x: 0.5 * x

    def call(schedule=FLOW, t=0.5, function=velocity_fn, **options):
        return posterior_from_velocity(function, x, schedule, t, rank=1, **options)

    where = "posterior_from_velocity: "
    for arguments, message in (
        ({"t": 1.0}, "t must be in [0.001, 0.999] (sigma = 0 at t = 0, alpha = 0 at t = 1), got 1"),
        ({"t": torch.full((3,), 0.5)}, "t must be a float or have shape (2,), got (3,)"),
        ({"function": lambda x: x.detach()}, "velocity_fn must be differentiable in x"),
        ({"function": lambda x: 3 * x}, "velocity_fn at t: the matrix must be a covariance, got"),
        ({"n_probes": 1}, "n_probes must be at least 2, got 1"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call(**arguments)
        assert str(caught.value).startswith(where + message)
    with pytest.raises(TypeError, match=r"^posterior_from_velocity: schedule must be a Schedule"):
        call(schedule=0.5)


# --------------------------------------------------------------------- sampling from a velocity


@SCHEDULES
def test_a_velocity_is_the_score_of_its_law(schedule):
    score = ModelScore(flow_net(MIXTURE, schedule), schedule, "flow")
    for t in (schedule.t_min, 0.3, schedule.t_max):
        sigma, alpha = schedule.sigma(t), schedule.alpha(t)
        x = MIXTURE.noisy(sigma, alpha).sample(5, seed=0)
        noisy = MIXTURE.noisy(sigma, alpha)
        got = score(x / alpha, sigma / alpha)
        torch.testing.assert_close(got, sigma * noisy.score(x), rtol=1e-10, atol=1e-10)
        along = AlongSchedule(score, schedule)(x, sigma)
        assert along.c is None
        torch.testing.assert_close(along.scaled_score, got, rtol=1e-10, atol=1e-10)


@SCHEDULES
def test_the_ode_of_a_velocity_is_euler_on_the_velocity(schedule):
    """By way of the score and beta nothing is lost: a flow model needs no sampler of its own."""
    net = flow_net(MIXTURE, schedule)
    model = AlongSchedule(ModelScore(net, schedule, "flow"), schedule)
    x = start = prior((6, D), schedule, seed=0, dtype=F64)
    grid = schedule.times(7).tolist()
    for t, s in pairwise(grid):
        x = x + (s - t) * net(x, torch.full((6,), t, dtype=F64))
    got = probability_flow_ode(model, start, schedule, n_steps=7, solver="euler")
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


def test_ends_of_a_flow_are_reached_in_float32():
    flow = ModelScore(lambda x, t: x, FLOW, "flow")
    model = AlongSchedule(flow, FLOW)
    for t in (FLOW.t_min, FLOW.t_max):
        for sigma in (t, torch.full((2,), t)):
            got = model(torch.ones(2, 3), sigma).scaled_score
            want = t * score_from_velocity(torch.ones(2, 3), torch.ones(2, 3), t)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"^AlongSchedule: sigma must be in \[0.001, 0.999\], the"):
        model(torch.ones(2, 3), 0.9991)
    with pytest.raises(TypeError, match=r"^AlongSchedule: model must be callable"):
        AlongSchedule(None, FLOW)
    with pytest.raises(ValueError, match=r"^AlongSchedule: what model returns must have shape"):
        AlongSchedule(lambda x, sigma: x[:1], FLOW)(torch.ones(2, 3), 0.5)


def test_a_first_order_model_is_told_what_it_lacks():
    model, x = AlongSchedule(lambda x, sigma: -x, FLOW), torch.ones(2, 3)
    with pytest.raises(TypeError) as caught:
        second_order_reverse(model, x, FLOW, n_steps=2)
    assert str(caught.value) == (
        "second_order_reverse: model must give c (one of first order takes "
        "covariance_form='none'), got None"
    )
    assert second_order_reverse(model, x, FLOW, n_steps=2, covariance_form="none").isfinite().all()


def test_times_of_a_path_may_be_negative():
    path = Interpolant(torch.ones_like, lambda t: (t + 1) ** 2, t_min=-0.5, t_max=1.0)
    x = MIXTURE.noisy(0.49, 1.0).sample(3, seed=0)
    found = tweedie_denoise(AlongSchedule(plain(MIXTURE), path), x, path, -0.3)
    check_posteriors(found, MIXTURE, x, path, torch.full((3,), -0.3, dtype=F64))


def test_conditions_reach_the_model():
    seen = []

    def model(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        seen.append(label)
        return -x

    label = torch.tensor([1, 2])
    AlongSchedule(model, FLOW)(torch.ones(2, 3), 0.5, label=label)
    assert seen[0] is label


def test_the_start_of_a_flow_is_the_law_at_its_last_time():
    flow = Rectified(t_max=0.9)
    std = prior((40000, 1), flow, data_std=2.0, seed=0).std().item()
    assert std == pytest.approx(math.hypot(0.1 * 2, 0.9), rel=0.02)
    # From the law at t_max < 1 the second-order steps come to the law of the data exactly.
    start = MIXTURE.noisy(0.5, 0.5).sample(2000, seed=0)
    x = second_order_reverse(
        exact_model(MIXTURE, FLOW), start, FLOW, times=[0.5, 0.25, 0.1, 0.03, 0.001], seed=1
    )
    assert energy_distance(x, MIXTURE.sample(2000, seed=5)) < SAME


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_velocity_generates_its_law_by_every_process(shift):
    schedule = Rectified(shift=shift)
    net = flow_net(MIXTURE, schedule)
    first = AlongSchedule(ModelScore(net, schedule, "flow"), schedule)
    second = AlongSchedule(plain(MIXTURE), schedule)
    start = prior((2000, D), schedule, seed=0, dtype=F64)
    draws = MIXTURE.sample(2000, seed=5)
    ends = {
        "ode": probability_flow_ode(first, start, schedule, n_steps=30),
        "sde": reverse_sde(first, start, schedule, n_steps=80, seed=1),
        "heun": reverse_sde(first, start, schedule, n_steps=40, solver="heun", seed=1),
        "second": second_order_reverse(second, start, schedule, n_steps=7, seed=1),
    }
    for method in ("euler", "second-order"):
        model, n = (first, 50) if method == "euler" else (second, 10)
        given = {"n_steps": n, "method": method, "seed": 2, "dtype": F64}
        ends[method] = generate(model, (2000, D), schedule, **given)
    for name, x in ends.items():
        assert energy_distance(x, draws) < SAME, name
    ancestral = second_order_reverse(
        first, start, schedule, n_steps=7, covariance_form="none", seed=1
    )
    assert energy_distance(ancestral, draws) > 0.02  # without the covariance 7 are too few


@pytest.mark.parametrize("trace", ["learned", "exact"])
def test_log_density_along_a_flow(trace):
    x = MIXTURE.noisy(FLOW.t_min, 1 - FLOW.t_min).sample(5, seed=0)
    inner = plain(MIXTURE)
    if trace == "exact":
        inner = ModelScore(flow_net(MIXTURE, FLOW), FLOW, "flow")
    value = log_likelihood(
        AlongSchedule(inner, FLOW),
        x,
        FLOW,
        n_steps=80,
        solver="rk4",
        trace=trace,
        log_prior=MIXTURE.noisy(FLOW.t_max, 1 - FLOW.t_max).log_prob,
    )
    exact = MIXTURE.noisy(FLOW.t_min, 1 - FLOW.t_min).log_prob(x)
    assert (value - exact).abs().max() < 0.01


# --------------------------------------------------------------------------- networks that learn


def trained(criterion: ScoreMatchingLoss, steps: int, along: Schedule | None = None) -> nn.Module:
    """A network of plain noise, in the form in which it is trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP((D,), 2, width=64, depth=2, activation="silu")
    model: nn.Module = net if along is None else AlongSchedule(net, along)
    optimizer = torch.optim.Adam(net.parameters(), 6e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data = MIXTURE.sample(256 * steps, seed=1).float()
    for batch in data.split(256):
        optimizer.zero_grad()
        criterion(model, batch).backward()
        optimizer.step()
        rate.step()
    return model.eval()


@pytest.mark.parametrize("kind", ["along the flow", "plain noise"])
def test_trained_networks_generate_along_a_flow(kind):
    """By a flow's own times, or as `hos-ext train` learns: with sigma alone, log-uniform."""
    flow = Rectified()
    if kind == "along the flow":
        model = trained(ScoreMatchingLoss(schedule=flow), 400, flow)
    else:
        flow = Rectified(0.02, 0.98)
        model = AlongSchedule(trained(ScoreMatchingLoss((0.02, 50.0)), 400), flow)
    start, draws = prior((2000, D), flow, data_std=1.3, seed=0), MIXTURE.sample(2000, seed=5)
    ends = {
        "ode": probability_flow_ode(model, start, flow, n_steps=20),
        "sde": reverse_sde(model, start, flow, n_steps=60, seed=1),
        "second": second_order_reverse(model, start, flow, n_steps=10, seed=1),
    }
    for name, x in ends.items():
        assert energy_distance(x.double(), draws) < 5 * SAME, name
    t = 0.4
    x = MIXTURE.noisy(t, 1 - t).sample(500, seed=2)
    found = tweedie_denoise(model, x.float(), flow, t)
    exact = MIXTURE.posterior_covariance(x, t, 1 - t)
    away = found.covariance.dense() - exact
    assert away.square().mean().sqrt() < 0.2 * exact.square().mean().sqrt()
