"""Velocities of flow models against exact mixtures, autodiff Jacobians, and both ends of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hos_ext import tweedie
from hos_ext.densities import Gaussian, GaussianMixture
from hos_ext.linalg import DPLR, ScoreHessian
from hos_ext.schedules import VP, Interpolant, Rectified, Schedule
from hos_ext.tweedie import (
    hessian_from_velocity_jacobian,
    score_from_velocity,
    velocity_from_score,
    velocity_jacobian_from_hessian,
    x0_from_velocity,
)

F64 = torch.float64
B, DIMS, D = 4, (2, 2), 4
CIRCLE = Interpolant(
    lambda t: torch.cos(math.pi / 2 * t),
    lambda t: torch.sin(math.pi / 2 * t),
    t_min=1e-3,
    t_max=0.999,
)
PATHS = [Rectified(), CIRCLE, VP()]
TIMES = torch.tensor([0.02, 0.3, 0.6, 0.97], dtype=F64)
every_path = pytest.mark.parametrize("schedule", PATHS, ids=lambda s: type(s).__name__)


def mixture() -> GaussianMixture:
    generator = torch.Generator().manual_seed(5)
    means = 2 * torch.randn(3, D, generator=generator, dtype=F64)
    root = torch.randn(3, D, D, generator=generator, dtype=F64) / 2
    covariances = root @ root.mT + 0.3 * torch.eye(D, dtype=F64)
    return GaussianMixture(torch.tensor([0.2, 0.5, 0.3], dtype=F64), means, covariances)


def gaussian() -> Gaussian:
    generator = torch.Generator().manual_seed(6)
    root = torch.randn(D, D, generator=generator, dtype=F64)
    return Gaussian(torch.arange(D, dtype=F64), root @ root.mT + 0.1 * torch.eye(D, dtype=F64))


class Exact(NamedTuple):
    """One noisy sample and what is known about it; matrices are (D, D)."""

    x: Tensor  # (D,)
    score: Tensor
    hessian: Tensor
    velocity: Tensor
    jacobian: Tensor
    mean: Tensor  # of x0 given x


def exact(law: GaussianMixture | Gaussian, schedule: Schedule, x: Tensor, t: float) -> Exact:
    """The velocity as the mean of dx_t / dt given x; its Jacobian by autodiff."""
    sigma, alpha = schedule.sigma(t), schedule.alpha(t)

    def velocity(x: Tensor) -> Tensor:
        clean = law.posterior_mean(x[None], sigma, alpha)[0]
        noise = (x - alpha * clean) / sigma
        return schedule.alpha_slope(t) * clean + schedule.sigma_slope(t) * noise

    noisy = law.noisy(sigma, alpha)
    return Exact(
        x,
        noisy.score(x[None])[0],
        noisy.hessian(x[None])[0],
        velocity(x),
        torch.func.jacrev(velocity)(x),
        law.posterior_mean(x[None], sigma, alpha)[0],
    )


def batch(law: GaussianMixture | Gaussian, schedule: Schedule) -> Exact:
    """One row for each of TIMES, stacked."""
    clean = law.sample(B, seed=1)
    noise = torch.randn(B, D, generator=torch.Generator().manual_seed(2), dtype=F64)
    rows = [
        exact(law, schedule, schedule.alpha(t) * x + schedule.sigma(t) * z, t)
        for x, z, t in zip(clean, noise, TIMES.tolist(), strict=True)
    ]
    return Exact(*(torch.stack(column) for column in zip(*rows, strict=True)))


def levels(schedule: Schedule) -> dict[str, Any]:
    """All four of a path, one for each row."""
    names = ("sigma", "alpha", "alpha_slope", "sigma_slope")
    return {name: getattr(schedule, name)(TIMES) for name in names}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------- against the laws


@every_path
@pytest.mark.parametrize("law", [mixture(), gaussian()], ids=["mixture", "gaussian"])
def test_velocities_convert_to_scores_and_back(
    law: GaussianMixture | Gaussian, schedule: Schedule
) -> None:
    row, at = batch(law, schedule), levels(schedule)
    shaped = (B, *DIMS)
    x, score, velocity, mean = (
        v.reshape(shaped) for v in (row.x, row.score, row.velocity, row.mean)
    )
    close(score_from_velocity(x, velocity, **at), score)
    close(velocity_from_score(x, score, **at), velocity)
    close(x0_from_velocity(x, velocity, **at), mean)


@every_path
@pytest.mark.parametrize("law", [mixture(), gaussian()], ids=["mixture", "gaussian"])
def test_autodiff_jacobians_convert_to_hessians_and_back(
    law: GaussianMixture | Gaussian, schedule: Schedule
) -> None:
    row, at = batch(law, schedule), levels(schedule)
    close(hessian_from_velocity_jacobian(row.jacobian, **at), row.hessian)
    close(velocity_jacobian_from_hessian(row.hessian, **at), row.jacobian)
    shaped = (B, *DIMS, *DIMS)
    close(hessian_from_velocity_jacobian(row.jacobian.reshape(shaped), **at), row.hessian)


def test_rectified_flow_needs_sigma_alone() -> None:
    schedule = Rectified()
    row, at = batch(mixture(), schedule), levels(schedule)
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (score_from_velocity, (row.x, row.velocity)),
        (velocity_from_score, (row.x, row.score)),
        (x0_from_velocity, (row.x, row.velocity)),
        (hessian_from_velocity_jacobian, (row.jacobian,)),
        (velocity_jacobian_from_hessian, (row.hessian,)),
    ]
    for function, data in calls:
        assert torch.equal(function(*data, TIMES), function(*data, **at))
        one = function(*(d[1:2] for d in data), 0.3)
        close(one, function(*data, TIMES)[1:2], 1e-14)


def test_v_prediction_is_the_velocity_of_its_path() -> None:
    """v = alpha z - sigma x0 has the slopes -sigma and alpha, whatever alpha and sigma are."""
    x, v = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0), dtype=F64)
    for sigma, alpha in ((0.7, 0.8), (0.6, 0.8)):
        path = {"sigma": sigma, "alpha": alpha, "alpha_slope": -sigma, "sigma_slope": alpha}
        assert torch.equal(
            score_from_velocity(x, v, **path), tweedie.score_from_v(x, v, sigma, alpha)
        )
        score = score_from_velocity(x, v, **path)
        close(tweedie.v_from_score(x, score, sigma, alpha), v)
        jacobian = torch.randn(B, D, D, generator=torch.Generator().manual_seed(1), dtype=F64)
        close(
            hessian_from_velocity_jacobian(jacobian, **path),
            tweedie.hessian_from_jacobian(jacobian, sigma, alpha, prediction="v"),
        )


def test_velocities_are_the_drift_of_the_probability_flow() -> None:
    """v = -(beta / 2) x - (g^2 / 2) s1: what the samplers take from score, beta and g."""
    for schedule in PATHS:
        row = batch(mixture(), schedule)
        g, drift = schedule.diffusion(TIMES)[:, None], schedule.drift(row.x, TIMES)
        close(drift - g**2 / 2 * row.score, row.velocity, 1e-9)


# ----------------------------------------------------------------------------------- structured


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch itself
@every_path
def test_dplr_and_products_convert_as_dense_matrices_do(schedule: Schedule) -> None:
    generator = torch.Generator().manual_seed(0)
    diag = torch.randn(B, D, generator=generator, dtype=F64)
    factor = torch.randn(B, D, 2, generator=generator, dtype=F64)
    matrix, at = DPLR(diag, factor, torch.tensor([1.0, -1.0])), levels(schedule)
    x = torch.randn(B, D, generator=generator, dtype=F64)
    products = ScoreHessian(lambda x: torch.sin(x) * x.sum(1, keepdim=True), x)
    for convert in (hessian_from_velocity_jacobian, velocity_jacobian_from_hessian):
        got = convert(matrix, **at)
        assert isinstance(got, DPLR)
        assert got.rank == 2
        close(got.dense(), convert(matrix.dense(), **at))
        close(convert(products, **at).dense(), convert(products.dense(), **at))


def test_large_factors_stay_factors() -> None:
    large = DPLR(torch.ones(1, 200_000), torch.ones(1, 200_000, 2))  # dense: 10^11 bytes
    back = velocity_jacobian_from_hessian(hessian_from_velocity_jacobian(large, 0.4), 0.4)
    torch.testing.assert_close(back.diag, large.diag)
    torch.testing.assert_close(back.factor, large.factor)


def test_conversions_carry_gradients() -> None:
    x, v = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    given = [torch.tensor(value, dtype=F64) for value in (0.4, 0.7, -0.9, 1.2)]
    inputs = [value.requires_grad_() for value in (x, v, *given)]
    for function in (score_from_velocity, velocity_from_score, x0_from_velocity):
        torch.autograd.gradcheck(
            lambda x, v, s, a, da, ds, f=function: f(x, v, s, a, alpha_slope=da, sigma_slope=ds),
            inputs,
        )


# ------------------------------------------------------------------------------------- the ends


def test_where_there_is_no_signal_velocity_gives_score_and_mean() -> None:
    """At t = 1 x is noise: s1 = -x, s2 = -I, and E[x0 | x] is the mean of the data."""
    law, x = mixture(), torch.randn(B, D, generator=torch.Generator().manual_seed(3), dtype=F64)
    mean = (law.weights[:, None] * law.means).sum(0)
    velocity = x - mean
    assert torch.equal(score_from_velocity(x, velocity, 1.0), -x)
    close(x0_from_velocity(x, velocity, 1.0), mean.expand(B, D), 1e-14)
    jacobian = torch.eye(D, dtype=F64).expand(B, D, D)
    assert torch.equal(hessian_from_velocity_jacobian(jacobian, 1.0), -jacobian)
    # and just before: E[x0 | x] keeps its digits, for nothing is divided by alpha = 1e-9
    t = 1 - 1e-9
    row = exact(law, Rectified(t_max=1 - 1e-10), x[0], t)
    close(x0_from_velocity(row.x[None], row.velocity[None], t)[0], row.mean, 1e-14)


def test_where_there_is_no_noise_scores_give_the_velocity() -> None:
    """At t = 0 x is clean, z is independent of it: v = -x, J = -I."""
    law = mixture()
    x = law.sample(B, seed=4)
    assert torch.equal(velocity_from_score(x, law.score(x), 0.0), -x)
    assert torch.equal(x0_from_velocity(x, -x, 0.0), x)
    jacobian = velocity_jacobian_from_hessian(law.hessian(x), 0.0)
    assert torch.equal(jacobian, -torch.eye(D, dtype=F64).expand(B, D, D))


X, SQUARE = torch.ones(2, 3), torch.ones(2, 3, 3)
WHOLE = {"alpha": 0.5, "alpha_slope": -1.0, "sigma_slope": 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: score_from_velocity(X, X, 0.0),
            (
                "score_from_velocity: sigma must be positive (without noise the velocity does not "
                "tell the score), got 0"
            ),
        ),
        (
            lambda: hessian_from_velocity_jacobian(SQUARE, torch.tensor([0.5, 0.0])),
            (
                "hessian_from_velocity_jacobian: sigma must be positive (without noise the "
                "velocity does not tell the score), got 0"
            ),
        ),
        (
            lambda: velocity_from_score(X, X, 1.0),
            (
                "velocity_from_score: sigma must be below 1 (without signal the score does not "
                "tell the velocity), got 1"
            ),
        ),
        (
            lambda: velocity_from_score(X, X, 1.0, **(WHOLE | {"alpha": 0.0})),
            (
                "velocity_from_score: alpha must be positive (without signal the score does not "
                "tell the velocity), got 0"
            ),
        ),
        (
            lambda: velocity_jacobian_from_hessian(SQUARE, 1.0),
            (
                "velocity_jacobian_from_hessian: sigma must be below 1 (without signal the score "
                "does not tell the velocity), got 1"
            ),
        ),
        (
            lambda: x0_from_velocity(X, X, -0.1),
            "x0_from_velocity: sigma must be at least 0, got -0.1",
        ),
        (
            lambda: x0_from_velocity(X, X, 20.0),
            (
                "x0_from_velocity: sigma must be at most 1 where alpha is not given "
                "(alpha = 1 - sigma), got 20"
            ),
        ),
        (
            lambda: score_from_velocity(X, X, 0.5, 0.5),
            (
                "score_from_velocity: alpha, alpha_slope and sigma_slope must be given together, "
                "or none of them for rectified flow (alpha = 1 - sigma), got no alpha_slope and no "
                "sigma_slope"
            ),
        ),
        (
            lambda: score_from_velocity(X, X, 0.5, 0.5, alpha_slope=1.0, sigma_slope=-1.0),
            (
                "score_from_velocity: alpha sigma_slope - alpha_slope sigma must be positive "
                "(noise must grow with t: else write the path in 1 - t), got -1"
            ),
        ),
        (
            lambda: score_from_velocity(X, X[:, :2], 0.5),
            "score_from_velocity: velocity must have shape (2, 3), got (2, 2)",
        ),
        (
            lambda: velocity_from_score(X, X.double(), 0.5),
            "velocity_from_score: score must have dtype torch.float32, got torch.float64",
        ),
        (
            lambda: hessian_from_velocity_jacobian(X, 0.5),
            (
                "hessian_from_velocity_jacobian: jacobian must have shape (B, *dims, *dims), "
                "got (2, 3)"
            ),
        ),
        (
            lambda: velocity_jacobian_from_hessian(SQUARE, math.nan),
            "velocity_jacobian_from_hessian: sigma must be finite, got nan",
        ),
    ],
)
def test_what_is_undefined_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert str(caught.value) == message


def test_wrong_kinds_are_refused() -> None:
    for call, message in (
        (lambda: score_from_velocity(X, [1.0], 0.5), "velocity must be a Tensor, got list"),
        (lambda: score_from_velocity(X, X, "1"), "sigma must be a float or a Tensor, got str"),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value) == f"score_from_velocity: {message}"
