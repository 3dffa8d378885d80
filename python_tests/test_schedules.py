"""Schedules against closed forms, their own differential equations and the law of their times."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import assert_near
from scipy import stats
from scipy.interpolate import PchipInterpolator
from scipy.special import expit, logit
from torch import Tensor

from hos_ext import ops
from hos_ext.losses.score_matching import score_matching_loss
from hos_ext.schedules import (
    EDM,
    VE,
    VP,
    CosineVP,
    DiscreteVP,
    Interpolant,
    Rectified,
    Schedule,
    SubVP,
    from_alphas_cumprod,
)
from hos_ext.scores import Scores

F64 = torch.float64
TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 50, dtype=F64), 0)
CIRCLE = Interpolant(
    lambda t: torch.cos(math.pi / 2 * t),
    lambda t: torch.sin(math.pi / 2 * t),
    t_min=1e-3,
    t_max=0.999,
)
GIVEN = Interpolant(  # not autodiff's slopes, alpha rises before it falls, times of both signs
    lambda t: 1 + (t - t * t) / 4,
    lambda t: (t + 1) ** 2,
    t_min=-0.5,
    t_max=2.0,
    alpha_slope=lambda t: (1 - 2 * t) / 4,
    sigma_slope=lambda t: 2 * (t + 1),
)
SHIFTED = Rectified(t_min=0.01, t_max=0.98, shift=3.0, logit_normal=(-0.2, 0.8))
FLOWS = [Rectified(t_max=0.999), SHIFTED, CIRCLE, GIVEN]
SCHEDULES = [VE(), VP(), CosineVP(), SubVP(), EDM(), from_alphas_cumprod(TABLE), *FLOWS]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def inside(schedule: Schedule, n: int = 7) -> Tensor:
    """Times in the open range, off the corners of a table."""
    return (
        schedule.t_min + (schedule.t_max - schedule.t_min) * (torch.arange(n, dtype=F64) + 0.3) / n
    )


def derivative(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    value = f(t)
    if not value.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(value.sum(), t)[0]


@every_schedule
def test_marginals_solve_the_equations_of_the_forward_sde(schedule: Schedule):
    t = inside(schedule)
    alpha, sigma, beta = schedule.alpha(t), schedule.sigma(t), schedule.beta(t)
    torch.testing.assert_close(derivative(schedule.alpha, t), -beta * alpha / 2, rtol=1e-11, atol=0)
    growth = schedule.diffusion(t) ** 2 - beta * sigma**2
    variance = derivative(lambda u: schedule.sigma(u) ** 2, t)
    torch.testing.assert_close(variance, growth, rtol=1e-11, atol=1e-14)
    for slope, value in (("alpha_slope", schedule.alpha), ("sigma_slope", schedule.sigma)):
        got = getattr(schedule, slope)(t)
        torch.testing.assert_close(got, derivative(value, t), rtol=1e-10, atol=1e-13)
    x = torch.randn(len(t), 2, 3, dtype=F64)
    assert torch.equal(schedule.drift(x, t), -beta[:, None, None] / 2 * x)


@every_schedule
def test_noise_grows_and_time_is_found_from_it(schedule: Schedule):
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=F64)
    t = torch.cat([inside(schedule, 40), ends]).sort()[0]
    sigma = schedule.sigma(t)
    assert bool((sigma.diff() > 0).all())
    assert bool(((sigma / schedule.alpha(t)).diff() > 0).all())
    torch.testing.assert_close(schedule.t_of_sigma(sigma), t, rtol=1e-10, atol=0)
    assert schedule.t_of_sigma(schedule.sigma(schedule.t_min)) == schedule.t_min
    assert schedule.t_of_sigma(schedule.sigma(schedule.t_max)) == schedule.t_max


def test_closed_forms_at_the_ends():
    assert VE().sigma(0.0) == 0.01
    assert VE().sigma(1.0) == pytest.approx(50)
    for sigma_max in torch.linspace(0.2, 3, 50).tolist():  # sigma(1) may round below it
        assert VE(0.1, sigma_max).t_of_sigma(sigma_max) == pytest.approx(1, abs=1e-14)
    for low in torch.linspace(0.01, 0.5, 50).tolist():  # to the bit at t_min
        for schedule in (VP(t_min=low), VE(low), from_alphas_cumprod([1 - low, 0.3 - low / 2])):
            assert schedule.t_of_sigma(schedule.sigma(schedule.t_min)) == schedule.t_min
    assert VE().sigma(0.5) == pytest.approx(math.sqrt(0.5))
    assert VP().alpha(1.0) == pytest.approx(math.exp(-10.05 / 2), rel=1e-14)
    assert VP().sigma(1.0) == pytest.approx(math.sqrt(1 - math.exp(-10.05)), rel=1e-14)
    assert VP().beta(0.5) == pytest.approx(10.05)
    assert VP(3.0, 3.0).t_of_sigma(math.sqrt(1 - math.exp(-1.5))) == pytest.approx(0.5)
    assert SubVP().sigma(1.0) == pytest.approx(1 - math.exp(-10.05), rel=1e-14)
    assert SubVP().diffusion(1.0) == pytest.approx(math.sqrt(20 * (1 - math.exp(-20.1))))
    assert EDM().sigma(3.0) == 3
    assert EDM().diffusion(2.0) == 2
    cosine = math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    assert CosineVP().alpha(0.5) == pytest.approx(cosine, rel=1e-14)
    for schedule in (VP(), CosineVP(), from_alphas_cumprod(TABLE)):
        t = inside(schedule)
        total = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
        torch.testing.assert_close(total, torch.ones_like(t), rtol=1e-14, atol=0)


def test_small_times_keep_their_digits_in_float32():
    # sigma^2 = B - B^2 / 2 + ...: 1 - alpha^2 in float32 would leave no digit.
    t = 1e-9
    narrow = torch.tensor([t], dtype=torch.float32)
    low = {"t_min": 1e-10}
    b = 0.1 * t + 19.9 * t * t / 2
    turn = math.pi / 2 / 1.008 * t
    expected = {
        VP(**low): math.sqrt(b),
        SubVP(**low): b,
        CosineVP(**low): math.sqrt(2 * turn * math.tan(0.008 / 1.008 * math.pi / 2)),
    }
    for schedule, sigma in expected.items():
        value = schedule.sigma(narrow)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(sigma, rel=2e-7)
        assert schedule.sigma(t) == pytest.approx(sigma, rel=2e-7)
        # and back: log1p, and no difference of nearly equal angles
        assert schedule.t_of_sigma(schedule.sigma(t)) == pytest.approx(t, rel=1e-12)
    # In float32 0.7 is below 0.7 and 0.8 above 0.8: the range is judged in the dtype of t.
    ends = VP(t_min=0.7, t_max=0.8)
    assert bool((ends.sigma(torch.tensor([0.7, 0.8], dtype=torch.float32)) > 0).all())


def test_time_is_found_where_sigma_rounds_to_one():
    for beta_max in (60.0, 90.0):  # 1 - sigma is 1e-13; 0
        schedule = VP(beta_max=beta_max)
        assert schedule.t_of_sigma(schedule.sigma(1.0)) == 1
        assert schedule.t_of_sigma(torch.tensor([1.0], dtype=torch.float32)).item() == 1


@every_schedule
def test_a_float_gives_a_float_and_a_tensor_its_dtype(schedule: Schedule):
    t = inside(schedule)
    for method in (schedule.alpha, schedule.sigma, schedule.beta, schedule.diffusion):
        assert isinstance(method(t[2].item()), float)
        assert method(t[2].item()) == method(t)[2].item() == method(t[2]).item()
        assert method(t.float()).dtype == torch.float32


@every_schedule
def test_grid_falls_from_t_max_to_t_min(schedule: Schedule):
    grid = schedule.times(9)
    assert grid.dtype == F64
    assert len(grid) == 10
    assert grid[0] == schedule.t_max
    assert grid[-1] == schedule.t_min
    warped = grid ** (1 / 7) if isinstance(schedule, EDM) else grid
    if schedule is SHIFTED:
        warped = grid / (3 - 2 * grid)
    torch.testing.assert_close(warped.diff(), warped.diff()[:1].expand(9), rtol=1e-9, atol=0)
    assert schedule.times(1).tolist() == [schedule.t_max, schedule.t_min]


@every_schedule
def test_schedules_answer_where_their_times_lie(schedule: Schedule, device: torch.device):
    t = inside(schedule)
    for method in (schedule.alpha, schedule.sigma, schedule.beta, schedule.diffusion):
        assert_near(method(t.to(device)), method(t))
        assert method(t.to(device)).device.type == device.type
    assert_near(schedule.t_of_sigma(schedule.sigma(t.to(device))), t)
    drawn = schedule.sample_t(9, seed=1, dtype=F64, device=device)
    assert drawn.device.type == device.type
    assert_near(drawn, schedule.sample_t(9, seed=1, dtype=F64))


# -------------------------------------------------------------------------------- flow matching


def test_rectified_flow_is_a_straight_line():
    schedule = Rectified(t_max=0.999)
    for t in (1e-3, 0.25, 0.999):
        assert schedule.alpha(t) == 1 - t
        assert schedule.sigma(t) == schedule.t_of_sigma(t) == t
        assert (schedule.alpha_slope(t), schedule.sigma_slope(t)) == (-1, 1)
        assert schedule.beta(t) == 2 / (1 - t)
        assert schedule.diffusion(t) == pytest.approx(math.sqrt(2 * t / (1 - t)), rel=1e-15)
        assert schedule.t_of_ratio(t / (1 - t)) == pytest.approx(t, rel=1e-15)


def test_shift_multiplies_noise_over_signal_and_keeps_the_ends():
    plain, shifted = Rectified(0.1, 0.75), Rectified(0.1, 0.75, shift=2.0)
    grid = shifted.times(50)
    assert (grid[0], grid[-1]) == (0.75, 0.1)
    unshifted = grid / (2 - grid)  # of half the ratio
    ratio, half = (t / (1 - t) for t in (grid, unshifted))
    torch.testing.assert_close(ratio, 2 * half)
    torch.testing.assert_close(unshifted.diff(), unshifted.diff()[:1].expand(50), rtol=1e-9, atol=0)
    assert shifted.times(50)[25] > plain.times(50)[25]
    assert hash(Rectified(logit_normal=[0, 1])) == hash(Rectified(logit_normal=(0.0, 1.0)))
    assert Rectified().times(50).tolist() == Rectified(shift=1).times(50).tolist()


def test_a_path_of_ones_own_is_the_schedule_with_its_formulas():
    line = Interpolant(lambda t: 1 - t, lambda t: t, t_min=1e-3, t_max=0.98)
    b = lambda t: t * (0.1 + t * 19.9 / 2)  # noqa: E731
    preserving = Interpolant(
        lambda t: (-b(t) / 2).exp(), lambda t: (-torch.expm1(-b(t))).sqrt(), t_min=1e-3, t_max=1.0
    )
    constant = Interpolant(torch.ones_like, lambda t: 0.01 * 5000**t, t_min=0, t_max=1)
    for mine, known in ((line, Rectified()), (preserving, VP()), (constant, VE())):
        t = inside(known)
        for name in ("alpha", "sigma", "beta", "diffusion", "alpha_slope", "sigma_slope"):
            got, want = getattr(mine, name)(t), getattr(known, name)(t)
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(mine.t_of_sigma(known.sigma(t)), t, rtol=1e-11, atol=0)
        torch.testing.assert_close(mine.times(5), known.times(5))
        assert mine.t_of_ratio(2.0) == pytest.approx(known.t_of_ratio(2.0), rel=1e-12)


# ------------------------------------------------------------------------------- times for training


def law(schedule: Schedule):
    if isinstance(schedule, EDM):
        low, high = (math.log(s) for s in (schedule.sigma_min, schedule.sigma_max))
        a, b = ((end - schedule.p_mean) / schedule.p_std for end in (low, high))
        normal = stats.truncnorm(a, b, schedule.p_mean, schedule.p_std)
        return lambda t: normal.cdf(np.log(t))
    if isinstance(schedule, Rectified):
        low, high = (logit(t) - math.log(schedule.shift) for t in (schedule.t_min, schedule.t_max))
        if schedule.logit_normal is not None:
            mean, std = schedule.logit_normal
            inner = stats.truncnorm((low - mean) / std, (high - mean) / std, mean, std)
        else:
            inner = stats.uniform(expit(low), expit(high) - expit(low))
        turn = (lambda v: v) if schedule.logit_normal else expit
        return lambda t: inner.cdf(turn(logit(t) - math.log(schedule.shift)))
    return stats.uniform(schedule.t_min, schedule.t_max - schedule.t_min).cdf


NARROW = Rectified(0.3, 0.7, shift=1.5, logit_normal=(0.0, 1.0))  # most of the law is cut off
OTHER_FLOWS = [Rectified(shift=0.4), Rectified(logit_normal=(0.0, 1.0)), NARROW, SHIFTED, GIVEN]


@pytest.mark.parametrize(
    "schedule",
    [VE(), VP(), CosineVP(), EDM(), EDM(0.1, 1.0), Rectified(), *OTHER_FLOWS],
    ids=repr,
)
def test_random_times_have_their_law(schedule: Schedule):
    t = schedule.sample_t(20000, seed=3, dtype=F64)
    assert stats.kstest(t, law(schedule)).pvalue > 0.01
    assert bool((t >= schedule.t_min).all())
    assert bool((t <= schedule.t_max).all())


def test_random_times_of_a_table_are_its_integers_evenly():
    t = from_alphas_cumprod(TABLE).sample_t(50000, seed=0)
    assert torch.equal(t, t.round())
    counts = torch.bincount(t.long(), minlength=50)
    assert len(counts) == 50
    assert stats.chisquare(counts).pvalue > 0.01


@every_schedule
def test_random_times_depend_on_seed_offset_and_row_alone(schedule: Schedule):
    whole = schedule.sample_t(20, seed=1, offset=5)
    assert whole.dtype == torch.get_default_dtype()
    assert torch.equal(schedule.sample_t(7, seed=1, offset=5, first=13), whole[13:])
    assert not torch.equal(schedule.sample_t(20, seed=1, offset=6), whole)
    assert not torch.equal(schedule.sample_t(20, seed=2, offset=5), whole)


def test_random_times_are_not_the_noise_of_the_same_seed():
    t = VP(t_min=1e-9).sample_t(1000, seed=1, dtype=F64)
    for stream in range(4):
        u = ops.uniform((1000,), seed=1, stream=stream, dtype=F64)
        assert (t - u).abs().min() > 1e-9


def network(x: Tensor, sigma: Tensor | float) -> Scores:
    """A smooth model that depends on sigma."""
    level = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1)
    score = torch.tanh(x * level + 0.3) - x / (1 + level)
    factor = torch.stack([torch.sin(x + level), x / (1 + level + x**2)], -1)
    return Scores(score, 1 + 0.1 * torch.cos(x * level), factor)


@every_schedule
@pytest.mark.parametrize("variance_reduction", [True, False])
def test_loss_at_random_times_is_that_of_each_sample_alone(
    schedule: Schedule, variance_reduction: bool
):
    x = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = schedule.sample_t(6, seed=2, dtype=F64)
    sigma, alpha = schedule.sigma(t), schedule.alpha(t)
    noise = ops.normal((6, 3), seed=4, dtype=F64)
    options = {"variance_reduction": variance_reduction, "gamma": 0.7, "reduction": "none"}
    together = score_matching_loss(network, x, sigma, alpha=alpha, noise=noise, **options)
    alone = [
        score_matching_loss(
            network, x[i : i + 1], s, alpha=a, noise=noise[i : i + 1], **options
        ).item()
        for i, (s, a) in enumerate(zip(sigma.tolist(), alpha.tolist(), strict=True))
    ]
    torch.testing.assert_close(together, torch.tensor(alone, dtype=F64), rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------------------------------ tables


def test_diffusers_schedules_are_met_at_the_integers():
    diffusers = pytest.importorskip("diffusers", reason="an optional extra (app)")
    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule=kind)
        schedule = from_alphas_cumprod(scheduler.alphas_cumprod)
        assert (schedule.t_min, schedule.t_max) == (0, 999)
        x, noise = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
        steps = torch.tensor([0, 1, 2, 10, 500, 900, 998, 999])
        expected = scheduler.add_noise(x, noise, steps)
        t = steps.float()
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        torch.testing.assert_close(alpha * x + sigma * noise, expected, rtol=1e-5, atol=1e-6)
        # -log(1 - betas[t]) below t and above, to the rounding of the float32 table.
        rate = -torch.log1p(-scheduler.betas.double())
        below, above = (rate[steps[1:-1] + i] for i in (0, 1))
        mean = 2 * below * above / (below + above)
        torch.testing.assert_close(schedule.beta(t.double()[1:-1]), mean, rtol=1e-3, atol=0)


WILD = torch.tensor([0.999, 0.9989999, 0.5, 0.4999999, 1e-3, 0.999e-3, 1e-30], dtype=F64)


@pytest.mark.parametrize("table", [TABLE, WILD, WILD[[0, 2, 6]], WILD[[0, 6]]], ids=len)
def test_table_is_exact_at_integers_and_a_smooth_monotone_cubic_between(table: Tensor):
    schedule, last = from_alphas_cumprod(table), len(table) - 1
    nodes = torch.arange(last + 1, dtype=F64)
    torch.testing.assert_close(schedule.alpha(nodes) ** 2, table, rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.sigma(nodes) ** 2, 1 - table, rtol=1e-11, atol=0)
    t = torch.linspace(0, last, 1001, dtype=F64)
    integral, beta = -2 * schedule.alpha(t).log(), schedule.beta(t)
    assert bool((beta > 0).all())
    assert bool((integral.diff() > 0).all())
    # An independent implementation; its slopes at the two ends are others.
    if last > 2:
        cubic, inner = PchipInterpolator(nodes, -table.log()), (t >= 1) & (t <= last - 1)
        for order, value in ((0, integral), (1, beta)):
            wanted = torch.from_numpy(cubic(t, order))[inner]
            torch.testing.assert_close(value[inner], wanted, rtol=1e-8, atol=1e-12)
    for i in (0, last - 1):  # a parabola: B' is linear
        ends = [schedule.beta(i + p) for p in (0.0, 0.5, 1.0)]
        assert ends[0] + ends[2] - 2 * ends[1] == pytest.approx(0, abs=1e-13 * max(ends))
    # continuous at the integers
    step = torch.tensor([-1e-12, 1e-12], dtype=F64)
    left, right = schedule.beta((nodes[1:-1, None] + step).flatten()).reshape(-1, 2).mT
    torch.testing.assert_close(left, right, rtol=1e-4, atol=0)
    back = schedule.sigma(schedule.t_of_sigma(schedule.sigma(t)))
    torch.testing.assert_close(back, schedule.sigma(t), rtol=1e-14, atol=0)


@every_schedule
def test_time_from_noise_carries_its_derivative(schedule: Schedule):
    t = inside(schedule)
    there, back = derivative(schedule.sigma, t), derivative(schedule.t_of_sigma, schedule.sigma(t))
    torch.testing.assert_close(back * there, torch.ones_like(t), rtol=1e-9, atol=0)


def test_tables_come_as_any_array():
    schedule = from_alphas_cumprod(TABLE)
    assert from_alphas_cumprod(TABLE.tolist()).sigma(7.5) == schedule.sigma(7.5)
    assert from_alphas_cumprod(TABLE.numpy()).sigma(7.5) == schedule.sigma(7.5)


# -------------------------------------------------------------------------------------- bad input


def path(**changes: object) -> Interpolant:
    line = {"alpha": lambda t: 2 - t, "sigma": lambda t: t, "t_min": 0.1, "t_max": 1.0}
    return Interpolant(**(line | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VP().sigma(0.0), "VP.sigma: t must be in [0.001, 1], got 0"),
        (lambda: VP().alpha(1.5), "VP.alpha: t must be in [0.001, 1], got 1.5"),
        (lambda: CosineVP().beta(1.0), "CosineVP.beta: t must be in [0.001, 0.9946], got 1"),
        (lambda: EDM().sigma(math.nan), "EDM.sigma: t must be in [0.002, 80], got nan"),
        (
            lambda: VE().diffusion(torch.tensor([0.5, -1.0])),
            "VE.diffusion: t must be in [0, 1], got -1",
        ),
        (
            lambda: VP().sigma(torch.ones(2, 2)),
            "VP.sigma: t must be a float or have shape () or (B,), got (2, 2)",
        ),
        (
            lambda: VP().sigma(torch.tensor([1])),
            "VP.sigma: t must have dtype float32, float64, got torch.int64",
        ),
        (
            lambda: VP().drift(torch.ones(3, 2), torch.full((2,), 0.5)),
            "VP.drift: t must be a float or have shape (3,), got (2,)",
        ),
        (
            lambda: VE().t_of_sigma(0.0),
            "VE.t_of_sigma: sigma must be in [0.01, 50], got 0",
        ),
        (lambda: VE(0.0), "VE: sigma_min must be positive, got 0.0"),
        (lambda: VE(1.0, 0.5), "VE: sigma_max must be greater than sigma_min, got 0.5"),
        (lambda: VE(1.0, math.inf), "VE: sigma_max must be finite, got inf"),
        (lambda: EDM(rho=0.0), "EDM: rho must be positive, got 0.0"),
        (lambda: EDM(p_mean=math.nan), "EDM: p_mean must be finite, got nan"),
        (lambda: EDM(p_std=0.0), "EDM: p_std must be positive, got 0.0"),
        (lambda: VP(beta_min=0.0), "VP: beta_min must be positive, got 0.0"),
        (lambda: SubVP(2.0, 1.0), "SubVP: beta_max must be at least beta_min, got 1.0"),
        (lambda: VP(t_min=0.0), "VP: t_min must be positive, got 0.0"),
        (lambda: VP(t_max=1e-4), "VP: t_max must be greater than t_min, got 0.0001"),
        (lambda: VP(beta_max=1e5), "VP: alpha(t_max) must be positive, got 0.0"),
        (lambda: SubVP(1e-300, 1e-300, 1e-50), "SubVP: sigma(t_min) must be positive, got 0.0"),
        (
            lambda: CosineVP(t_max=1.0),
            "CosineVP: t_max must be below 1 (alpha(1) = 0), got 1.0",
        ),
        (
            lambda: from_alphas_cumprod([0.9, 0.0]),
            (
                "from_alphas_cumprod: alphas_cumprod must lie in (0, 1), where alpha > 0 and "
                "sigma > 0, got 0.0 at 1"
            ),
        ),
        (
            lambda: from_alphas_cumprod([0.9, 0.5, 0.5]),
            "from_alphas_cumprod: alphas_cumprod must decrease, got 0.5 after 0.5 at 2",
        ),
        (
            lambda: from_alphas_cumprod([1e-3, math.nextafter(1e-3, 0)]),
            (
                "from_alphas_cumprod: alphas_cumprod must decrease, "
                "got 0.0009999999999999998 after 0.001 at 1"
            ),
        ),
        (
            lambda: from_alphas_cumprod([0.9]),
            "from_alphas_cumprod: alphas_cumprod must have shape (N,), N >= 2, got (1,)",
        ),
        (
            lambda: DiscreteVP(torch.tensor([0.9, 0.8])),
            "DiscreteVP: alphas_cumprod must have dtype float64, got torch.float32",
        ),
        (lambda: VP().times(0), "VP.times: n must be at least 1, got 0"),
        (
            lambda: Rectified(t_min=0.0),
            (
                "Rectified: t_min must be positive (sigma = 0 at t = 0, where the score is not "
                "defined), got 0.0"
            ),
        ),
        (
            lambda: Rectified(t_max=1.0),
            (
                "Rectified: t_max must be below 1 (alpha = 0 at t = 1: no signal, beta = "
                "2 / (1 - t) diverges), got 1.0"
            ),
        ),
        (lambda: Rectified(0.5, 0.4), "Rectified: t_max must be greater than t_min, got 0.4"),
        (lambda: Rectified(shift=0.0), "Rectified: shift must be positive, got 0.0"),
        (
            lambda: Rectified(logit_normal=(math.inf, 1)),
            "Rectified: logit_normal must be finite, got (inf, 1)",
        ),
        (
            lambda: Rectified(logit_normal=(0.0, 0.0)),
            ("Rectified: the standard deviation of logit_normal must be finite and > 0, got 0"),
        ),
        (
            lambda: Rectified().sigma(1.0),
            (
                "Rectified.sigma: t must be in [0.001, 0.98] (sigma = 0 at t = 0, alpha = 0 at "
                "t = 1), got 1"
            ),
        ),
        (
            lambda: path(alpha=lambda t: 1 - t),
            (
                "Interpolant: alpha(t) must be positive (alpha = 0 has no signal, and beta and g "
                "diverge), got 0 at t = 1"
            ),
        ),
        (
            lambda: path(sigma=lambda t: t - 0.1),
            (
                "Interpolant: sigma(t) must be positive (sigma = 0 has no noise, and no score), "
                "got 0 at t = 0.1"
            ),
        ),
        (
            lambda: path(alpha=lambda t: t, sigma=lambda t: 2 - t),
            "Interpolant: sigma(t) must rise, for it tells networks the time, got 1.9 at t = 0.1",
        ),
        (
            lambda: path(alpha=lambda t: t**2),
            (
                "Interpolant: sigma(t) / alpha(t) must rise, t_min being the data (else write the "
                "path in 1 - t), got 10 at t = 0.1"
            ),
        ),
        (
            lambda: path(alpha=lambda t: 1 / (t - 0.1)),
            "Interpolant: alpha(t) must be finite in [t_min, t_max], got inf at t = 0.1",
        ),
        (
            lambda: path(alpha_slope=lambda t: 2 * torch.ones_like(t)),
            (
                "Interpolant: the slope of alpha(t) must be its derivative (by torch, or "
                "alpha_slope), got 2 at t = 0.100879"
            ),
        ),
        (
            lambda: path(sigma=lambda t: torch.from_numpy(np.square(t.detach().numpy()))),
            (
                "Interpolant: the slope of sigma(t) must be its derivative (by torch, or "
                "sigma_slope), got Cannot access data pointer of Tensor that doesn't have storage"
            ),
        ),
        (
            lambda: path(alpha=lambda t: t.sum()),
            "Interpolant: alpha(t) must have the shape of t, got ()",
        ),
        (lambda: path(t_max=0.1), "Interpolant: t_max must be greater than t_min, got 0.1"),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VP().sigma("a"), "VP.sigma: t must be a float or a Tensor, got str"),
        (lambda: VP().sigma(True), "VP.sigma: t must be a float or a Tensor, got bool"),
        (lambda: VP().times(2.0), "VP.times: n must be an int, got float"),
        (lambda: VP().sample_t(2.0, seed=0), "VP.sample_t: n must be an int, got float"),
        (lambda: VE(sigma_max="a"), "VE: sigma_max must be a float, got str"),
        (lambda: VP(beta_max=True), "VP: beta_max must be a float, got bool"),
        (lambda: DiscreteVP([0.9]), "DiscreteVP: alphas_cumprod must be a Tensor, got list"),
        (
            lambda: from_alphas_cumprod("abc"),
            "from_alphas_cumprod: alphas_cumprod must be an array of numbers, got str",
        ),
        (
            lambda: Rectified(logit_normal=1.0),
            "Rectified: logit_normal must be (mean, standard deviation), got 1.0",
        ),
        (lambda: path(alpha=0.5), "Interpolant: alpha must be callable, got float"),
        (lambda: path(sigma=lambda t: 1.0), "Interpolant: sigma(t) must be a Tensor, got float"),
        (lambda: path(t_min=None), "Interpolant: t_min must be a float, got NoneType"),
    ],
)
def test_wrong_kinds_are_refused(call, message):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message


@every_schedule
def test_t_of_ratio_inverts_sigma_over_alpha(schedule: Schedule):
    t = inside(schedule)
    ratio = schedule.sigma(t) / schedule.alpha(t)
    torch.testing.assert_close(schedule.t_of_ratio(ratio), t, rtol=1e-9, atol=1e-12)
    one = float(ratio[3])
    assert schedule.t_of_ratio(one) == pytest.approx(float(t[3]), rel=1e-9)
    name = type(schedule).__name__
    with pytest.raises(ValueError, match=rf"^{name}.t_of_ratio: ratio must be in"):
        schedule.t_of_ratio(-1.0)
