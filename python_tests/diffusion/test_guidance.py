"""Guidance for y = A x0 + n against dense Gaussian formulas, exact conditional laws and peers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from test_reverse import (
    COVARIANCE,
    GAUSSIAN,
    MEAN,
    MIXTURE,
    D,
    distance,
    energy_distance,
    exact_model,
    gaussian_model,
    level,
    marginal,
    pushed,
)
from torch import Tensor, nn
from torch.nn import functional

from hos_ext.densities.gaussian import Gaussian, GaussianMixture
from hos_ext.diffusion.conditioning import conjugate_gradients
from hos_ext.diffusion.guidance import condition, condition_mean, guided
from hos_ext.diffusion.reverse import prior, probability_flow_ode, reverse_sde, second_order_reverse
from hos_ext.linalg.dplr import DPLR
from hos_ext.schedules import EDM, VE, VP
from hos_ext.scores import Scores
from hos_ext.tweedie.posterior import Posterior

F64 = torch.float64
DIMS = (3, 4)
SIZE = 12
MASK = torch.arange(SIZE).reshape(DIMS) % 3 != 1
# One measurement of the 2-d densities of test_diffusion, in three guises.
ROW = torch.tensor([[1.0, 0.3]], dtype=F64)
FIRST = torch.tensor([True, False])
Y, STD = torch.tensor([[-0.6]], dtype=F64), 0.5


def functions(matrix: Tensor, dims: tuple[int, ...]):
    """A and A^T as functions on batches of any shape."""
    return lambda x: x.flatten(1) @ matrix.mT, lambda u: (u @ matrix).reshape(-1, *dims)


def a_posterior(*, signed: bool = False, dtype: torch.dtype = F64) -> Posterior:
    """Four posteriors of rank 3; one has a diagonal part with zeros."""
    g = torch.Generator().manual_seed(0)
    diag = torch.rand(4, SIZE, generator=g, dtype=F64)
    factor = torch.randn(4, SIZE, 3, generator=g, dtype=F64)
    mean = torch.randn(4, *DIMS, generator=g, dtype=F64)
    if signed:
        factor[..., 1] *= 0.1
        sign = torch.tensor([1.0, -1.0, 1.0])
        return Posterior(mean.to(dtype), DPLR(diag + 0.5, factor, sign).to(dtype))
    diag[0, ::2] = 0
    return Posterior(mean.to(dtype), DPLR(diag, factor).to(dtype))


def dense_condition(posterior: Posterior, y: Tensor, matrix: Tensor, variance: Tensor):
    """The textbook formula."""
    mean, covariance = posterior.mean.flatten(1).double(), posterior.covariance.dense().double()
    gain = covariance @ matrix.mT
    gain = gain @ torch.linalg.inv(matrix @ covariance @ matrix.mT + variance.diag())
    shift = gain @ (y.double() - mean @ matrix.mT).unsqueeze(-1)
    return mean + shift.squeeze(-1), covariance - gain @ matrix @ covariance


def operators() -> dict[str, tuple[Tensor, Tensor]]:
    """Each operator beside its matrix."""
    g = torch.Generator().manual_seed(1)
    blur = torch.randn(5, SIZE, generator=g, dtype=F64)
    tall = torch.randn(15, SIZE, generator=g, dtype=F64)
    rows = torch.eye(SIZE, dtype=F64)[MASK.flatten()]
    return {
        "mask": (MASK, rows),
        "all": (torch.ones(DIMS, dtype=torch.bool), torch.eye(SIZE, dtype=F64)),
        "none": (torch.zeros(DIMS, dtype=torch.bool), torch.zeros(0, SIZE, dtype=F64)),
        "wide": (blur, blur),
        "tall": (tall, tall),
    }


# ------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("noise", ["number", "each"])
@pytest.mark.parametrize("kind", operators())
def test_all_operators_give_the_dense_formula(kind, noise, signed):
    operator, matrix = operators()[kind]
    m, g = len(matrix), torch.Generator().manual_seed(2)
    posterior = a_posterior(signed=signed)
    std = 0.1 if noise == "number" else 0.05 + torch.rand(m, generator=g, dtype=F64)
    variance = torch.as_tensor(std, dtype=F64).square().expand(m)
    for rows in (4, 1):  # one y for each sample, one for all
        y = torch.randn(rows, m, generator=g, dtype=F64)
        mean, covariance = dense_condition(posterior, y, matrix, variance)
        ours = condition(posterior, y, operator, std)
        assert ours.mean.shape == posterior.mean.shape
        assert ours.covariance.rank == 3 + (0 if operator.dtype == torch.bool else m)
        assert (ours.mean.flatten(1) - mean).abs().max() < 1e-10
        assert (ours.covariance.dense() - covariance).abs().max() < 1e-10
        if m:
            pair = functions(matrix, DIMS)
            for way, tolerance in ((operator, 1e-6), (pair, 1e-13)):
                value = condition_mean(posterior, y, way, std, tolerance=tolerance)
                assert (value.flatten(1) - mean).abs().max() < 1e-10


def test_measurements_one_by_one_are_measurements_together():
    matrix = operators()["wide"][0]
    y = torch.linspace(-1, 1, MASK.sum() + len(matrix), dtype=F64).unsqueeze(0)
    first, second = y.split([int(MASK.sum()), len(matrix)], 1)
    both = torch.cat([operators()["mask"][1], matrix])
    for steps in ([(first, MASK), (second, matrix)], [(second, matrix), (first, MASK)]):
        posterior = Posterior(a_posterior().mean, a_posterior().covariance + 0.1)
        wanted = condition(posterior, y, both, 0.3)
        for part, operator in steps:  # the second meets columns of sign -1
            posterior = condition(posterior, part, operator, 0.3)
        assert (posterior.mean - wanted.mean).abs().max() < 1e-10
        gap = posterior.covariance.dense() - wanted.covariance.dense()
        assert gap.abs().max() < 1e-10


def test_masks_keep_small_variances_in_single_precision():
    # noise^2 / C is 1e-8: C - C A^T S^-1 A C would lose every digit of float32.
    posterior, std = a_posterior(dtype=torch.float32), 1e-4
    matrix = operators()["mask"][1]
    y = torch.zeros(1, len(matrix))
    ours = condition(posterior, y, MASK, std).covariance
    variance = torch.full((len(matrix),), std**2, dtype=F64)
    exact = dense_condition(posterior, y, matrix, variance)[1].diagonal(dim1=1, dim2=2)
    # Without the sample of zeros in d, where C itself is nearly singular.
    assert (ours.diagonal()[1:].double() / exact[1:] - 1).abs().max() < 1e-5
    assert bool((ours.diag >= 0).all())


def test_y_of_images_goes_through_functions():
    """A moving average along each row, as functions that keep the image's shape."""

    def matvec(x: Tensor) -> Tensor:
        return (x + x.roll(1, -1)) / 2

    def rmatvec(u: Tensor) -> Tensor:
        return (u + u.roll(-1, -1)) / 2

    posterior = a_posterior()
    y = torch.linspace(-1, 1, SIZE, dtype=F64).reshape(1, *DIMS)
    matrix = matvec(torch.eye(SIZE, dtype=F64).reshape(SIZE, *DIMS)).flatten(1).mT
    std = torch.linspace(0.1, 0.5, SIZE, dtype=F64)
    wanted = dense_condition(posterior, y.flatten(1), matrix, std**2)[0]
    value = condition_mean(posterior, y, (matvec, rmatvec), std.reshape(DIMS), tolerance=1e-13)
    assert value.shape == posterior.mean.shape
    assert (value.flatten(1) - wanted).abs().max() < 1e-10


def test_conjugate_gradients_stop_each_sample_by_itself():
    g = torch.Generator().manual_seed(3)
    root = torch.randn(4, 9, 9, generator=g, dtype=F64)
    root[0] = 0  # the identity: one iteration; a right side of zero: none
    matrix = torch.eye(9, dtype=F64) + root @ root.mT
    b = torch.randn(4, 9, generator=g, dtype=F64)
    b[1] = 0
    calls = 0

    def product(u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (matrix @ u.unsqueeze(-1)).squeeze(-1)

    x, iterations = conjugate_gradients("here", product, b, 1e-8, 100)
    assert iterations[:2].tolist() == [1, 0]
    assert iterations[2:].min() >= 5
    assert iterations.max() == calls <= 15
    residual = b - (matrix @ x.unsqueeze(-1)).squeeze(-1)
    assert (residual.norm(dim=1) <= 1.01e-8 * b.norm(dim=1)).all()
    for row in range(4):
        alone, count = conjugate_gradients(
            "here", lambda u, row=row: u @ matrix[row], b[row : row + 1], 1e-8, 100
        )
        assert count == iterations[row]
        assert (alone[0] - x[row]).abs().max() < 1e-12
    with pytest.raises(RuntimeError, match=r"^here: conjugate gradients must converge to 1e-08, "):
        conjugate_gradients("here", product, b, 1e-8, int(iterations.max()) - 1)
    again = conjugate_gradients("here", product, b, 1e-8, int(iterations.max()))[0]
    assert torch.equal(again, x)


def test_conjugate_gradients_leave_what_is_not_finite_to_its_own_sample():
    b = torch.ones(3, 4, dtype=F64)
    b[0, 1], b[2, 0] = torch.nan, torch.inf
    for rows in ([0], [0, 2], [0, 1, 2]):
        x, iterations = conjugate_gradients("here", lambda u: 2 * u, b[rows], 1e-8, 5)
        assert iterations.tolist() == [int(row == 1) for row in rows]
        for row, value in zip(rows, x, strict=True):
            assert (
                torch.equal(value, torch.full_like(value, 0.5)) if row == 1 else value.isnan().all()
            )


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", ["mask", "wide", "functions"])
def test_a_sample_that_is_not_finite_stays_alone_and_unblamed(kind, signed):
    law = a_posterior(signed=signed)
    mean = law.mean.clone()
    mean[1] = torch.nan
    operator, matrix = operators()["wide" if kind == "functions" else kind]
    y = torch.zeros(1, len(matrix), dtype=F64)
    operator = functions(matrix, DIMS) if kind == "functions" else operator
    value = condition_mean(Posterior(mean, law.covariance), y, operator, 0.1)
    right = condition_mean(law, y, operator, 0.1)
    assert value[1].isnan().all()
    assert torch.equal(value[[0, 2, 3]], right[[0, 2, 3]])


def test_an_empty_batch_is_conditioned():
    law = a_posterior()
    for sign in (None, -torch.ones(3)):
        empty = Posterior(
            law.mean[:0], DPLR(law.covariance.diag[:0], law.covariance.factor[:0], sign)
        )
        for kind, (operator, matrix) in operators().items():
            for rows in (0, 1):
                y = torch.zeros(rows, len(matrix), dtype=F64)
                ours = condition(empty, y, operator, 0.1)
                rank = 3 + (0 if operator.dtype == torch.bool else len(matrix))
                assert ours.mean.shape == (0, *DIMS)
                assert ours.covariance.factor.shape == (0, SIZE, rank), kind
                if rows and len(matrix):
                    pair = functions(matrix, DIMS)
                    assert condition_mean(empty, y, pair, 0.1).shape == (0, *DIMS)
    for operator in (FIRST, ROW):
        model = guided(lambda x, _: Scores(x, x), Y, operator, STD, VP())
        scores = model(torch.zeros(0, D, dtype=F64), torch.ones(0))
        assert scores.scaled_score.shape == scores.c.shape == (0, D)


# ----------------------------------------------------------------------------- single precision


def blur() -> Tensor:
    """A Gaussian blur of 16 x 16 images: small singular values."""
    weights = torch.exp(-torch.arange(-2.0, 3).square() / 2)
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    units = torch.eye(256).reshape(256, 1, 16, 16)
    return functional.conv2d(units, kernel[None, None], padding=2).flatten(1).mT.contiguous()


def many_columns() -> tuple[Posterior, Tensor, Tensor]:
    """A posterior of rank 6 with nearly nothing on the diagonal; 2 of its 12 entries are seen."""
    g = torch.Generator().manual_seed(4)
    seen = torch.zeros(SIZE, dtype=torch.bool)
    seen[[2, 7]] = True
    factor = torch.randn(2, SIZE, 6, generator=g)
    law = Posterior(torch.randn(2, SIZE, generator=g), DPLR(torch.full((2, SIZE), 1e-6), factor))
    return law, seen, torch.randn(1, 2, generator=g)


def doubled(posterior: Posterior) -> Posterior:
    return Posterior(posterior.mean.double(), posterior.covariance.to(F64))


def check_single(posterior: Posterior, y: Tensor, operator: Tensor, matrix: Tensor, std: float):
    """float32 against the textbook formula in float64."""
    variance = torch.full((len(matrix),), std**2, dtype=F64)
    mean, covariance = dense_condition(doubled(posterior), y, matrix.double(), variance)
    ours = condition(posterior, y, operator, std)
    assert ours.mean.dtype == ours.covariance.dtype == torch.float32
    assert (ours.mean - mean).abs().max() < 1e-5
    wanted = covariance.diagonal(dim1=1, dim2=2).sqrt()
    assert (ours.std / wanted - 1).abs().max() < 0.02
    assert (condition_mean(posterior, y, operator, std) - mean).abs().max() < 1e-5
    # The same by a model, at sigma = alpha = sqrt(1/2), where the ratio alpha / sigma is 1.
    schedule, sigma = VP(), 0.5**0.5
    x, c = posterior.mean * sigma, posterior.covariance

    def model(x: Tensor, _: Tensor) -> Scores:
        return Scores(torch.zeros_like(x), c.diag, c.factor)

    scores = guided(model, y, operator, std, schedule)(x, torch.full((len(x),), sigma))
    assert (scores.scaled_score - (mean - posterior.mean)).abs().max() < 2e-5
    kappa = DPLR(scores.c.double(), scores.factor.double(), scores.sign).dense()
    assert (kappa - covariance).abs().max() < 2e-6


def test_a_matrix_of_dependent_rows_is_solved_in_single_precision():
    g = torch.Generator().manual_seed(5)
    matrix = torch.cat([blur(), blur()])
    factor = 0.3 * torch.randn(2, 256, 8, generator=g)
    law = Posterior(torch.randn(2, 256, generator=g), DPLR(torch.full((2, 256), 0.5), factor))
    noise = torch.randn(1, 512, generator=g)
    y = torch.randn(1, 256, generator=g) @ matrix.mT + 1e-4 * noise
    check_single(law, y, matrix, matrix, 1e-2)
    # float32 would leave the variances along the rows 28 % off; the mean is right.
    with pytest.raises(
        ValueError, match=r"^condition: noise_std must be large enough for torch.fl"
    ):
        condition(law, y, matrix, 1e-4)
    variance = torch.full((512,), 1e-8, dtype=F64)
    wanted = dense_condition(doubled(law), y, matrix.double(), variance)[0]
    assert (condition_mean(law, y, matrix, 1e-4) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("std", [1e-3, 1e-5])
def test_more_columns_than_measurements_are_solved_in_single_precision(std):
    law, seen, y = many_columns()
    check_single(law, y, seen, torch.eye(SIZE)[seen], std)


def test_noise_too_small_for_the_arithmetic_is_refused():
    refusal = (
        r"noise_std must be large enough to be told from rounding in float64, got 1e-09 for sample "
    )
    twice = torch.ones(2, SIZE, dtype=F64)  # the rows of A are equal: N is singular but for noise
    diag = torch.ones(2, SIZE, dtype=F64)
    diag[0] = 0
    y = torch.zeros(1, 2, dtype=F64)
    law = Posterior(torch.zeros(2, SIZE, dtype=F64), DPLR(diag))
    for call in (condition, condition_mean):
        with pytest.raises(ValueError, match=rf"^{call.__name__}: {refusal}1$"):
            call(law, y, twice, 1e-9)
    few, seen, _ = many_columns()  # without a diagonal K is singular but for its identity
    factor = few.covariance.factor.double()
    factor[0] = 0
    law = Posterior(few.mean.double(), DPLR(torch.zeros(2, SIZE, dtype=F64), factor))
    with pytest.raises(ValueError, match=rf"^condition: {refusal}1$"):
        condition(law, y, seen, 1e-9)
    tiny = torch.full((2, SIZE), 1e-24, dtype=F64)
    sign = torch.tensor([1, 1, 1, 1, 1, -1])
    factor = factor * torch.tensor([1, 1, 1, 1, 1, 1e-13])
    law = Posterior(few.mean.double(), DPLR(tiny, factor, sign))
    with pytest.raises(ValueError, match=rf"^condition: {refusal}1$"):
        condition(law, y, seen, 1e-9)


def test_single_precision_refuses_variances_that_it_cannot_hold():
    g = torch.Generator().manual_seed(6)
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g, dtype=F64))[0]
    law = Posterior(torch.zeros(2, SIZE), DPLR(torch.full((2, SIZE), 0.5)))
    y = torch.zeros(1, SIZE)
    with pytest.raises(
        ValueError,
        match=r"^condition: noise_std must be large enough for torch.float32 to hold the posterior "
        r"variances, got 0.0001 for sample 0$",
    ):
        condition(law, y, turn.float(), 1e-4)
    assert (condition(law, y, turn.float(), 1e-2).std / 1e-2 - 1).abs().max() < 0.01
    wide = condition(doubled(law), y.double(), turn, 1e-4)
    assert (wide.std / 1e-4 - 1).abs().max() < 1e-6


def test_conjugate_gradients_reach_their_default_in_single_precision():
    g = torch.Generator().manual_seed(7)
    matrix, std = blur(), 0.003
    pair = functions(matrix, (16, 16))
    law = Posterior(torch.randn(2, 16, 16, generator=g), DPLR(torch.full((2, 256), 0.5)))
    noise = torch.randn(1, 256, generator=g)
    y = torch.randn(1, 256, generator=g) @ matrix.mT + std * noise
    wanted = condition_mean(doubled(law), y.double(), matrix.double(), std)
    error = condition_mean(law, y, pair, std) - wanted
    assert 1e-4 < error.abs().max() < 0.02  # to the tolerance: entries have std 0.05 and more
    with pytest.raises(RuntimeError, match=r" must converge to 0.0001, got "):
        condition_mean(law, y, pair, std, max_iterations=1)


# ------------------------------------------------------------------- guided models: Gaussian data


def posterior_of(density: Gaussian, matrix: Tensor) -> Gaussian:
    """p(x0 | y), exact."""
    law = Posterior(density.mean.unsqueeze(0), DPLR(torch.zeros(1, D, dtype=F64)))
    gain = density.covariance @ matrix.mT
    inner = matrix @ gain + STD**2 * torch.eye(len(matrix), dtype=F64)
    gain = gain @ torch.linalg.inv(inner)
    mean = density.mean + (gain @ (Y - law.mean @ matrix.mT).mT).squeeze(-1)
    return Gaussian(mean, density.covariance - gain @ matrix @ density.covariance)


@pytest.mark.parametrize("schedule", [VE(), VP(), EDM()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("operator", "matrix"),
    [(FIRST, torch.eye(2, dtype=F64)[:1]), (ROW, ROW)],
    ids=["mask", "matrix"],
)
def test_second_order_steps_reach_the_conditional_law_in_any_number(
    operator, matrix, schedule, monkeypatch
):
    law = posterior_of(GAUSSIAN, matrix)
    start, end = (marginal(law, schedule, t) for t in (schedule.t_max, schedule.t_min))
    model = guided(exact_model(GAUSSIAN, schedule), Y, operator, STD, schedule)
    for n in (1, 2, 6):
        reached = pushed(
            second_order_reverse, model, schedule, schedule.times(n), start, monkeypatch
        )
        assert distance(reached, end) < 1e-9
    free = pushed(
        second_order_reverse,
        exact_model(GAUSSIAN, schedule),
        schedule,
        schedule.times(6),
        start,
        monkeypatch,
    )
    assert distance(free, end) > 0.1


@pytest.mark.parametrize("kind", ["matrix", "functions"])
def test_first_order_samplers_converge_to_the_conditional_law(kind, monkeypatch):
    schedule = VP(0.5, 4.0, t_min=0.05)
    law = posterior_of(GAUSSIAN, ROW)
    start, end = (marginal(law, schedule, t) for t in (schedule.t_max, schedule.t_min))
    operator = ROW if kind == "matrix" else functions(ROW, (D,))
    model = guided(
        exact_model(GAUSSIAN, schedule), Y, operator, STD, schedule, with_covariance=False
    )
    for sampler, order in (
        (partial(reverse_sde, solver="euler"), 1),
        (partial(probability_flow_ode, solver="heun"), 2),
    ):
        errors = [
            distance(pushed(sampler, model, schedule, schedule.times(n), start, monkeypatch), end)
            for n in (40, 80)
        ]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)
        assert errors[1] < (0.2 if order == 1 else 0.02)


def test_guided_scores_are_those_of_the_conditional_law_of_noisy_samples():
    schedule = VP()
    x = prior((5, D), schedule, seed=0, dtype=F64)
    law = posterior_of(GAUSSIAN, ROW)
    model = guided(exact_model(GAUSSIAN, schedule), Y, ROW, STD, schedule)
    for t in (0.01, 0.3, 1.0):
        sigma = schedule.sigma(t)
        scores = model(x, torch.full((5,), sigma, dtype=F64)).unscaled(sigma)
        noisy = law.noisy(sigma, schedule.alpha(t))
        assert scores.score.allclose(noisy.score(x), rtol=1e-9, atol=1e-9)
        hessian = DPLR(scores.diag, scores.factor, scores.sign).dense()
        assert hessian.allclose(noisy.hessian(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", operators())
def test_guided_images_match_the_dense_moments(kind, signed):
    """Score and kappa against those of the dense C_y, each sample at a level of its own."""
    schedule, g = VP(), torch.Generator().manual_seed(8)
    operator, matrix = operators()[kind]
    x = torch.randn(4, *DIMS, generator=g, dtype=F64)
    y = torch.randn(4, len(matrix), generator=g, dtype=F64)
    scaled = a_posterior(signed=signed)
    score, kappa = scaled.mean, scaled.covariance
    head = Scores(score, kappa.diag.reshape(x.shape), kappa.factor, kappa.sign)
    sigma = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=F64)
    s = sigma.reshape(-1, 1, 1)
    a = schedule.alpha(schedule.t_of_sigma(sigma)).reshape(-1, 1, 1)
    spread = kappa.scale((s / a).square().flatten())
    law = Posterior((x + s * score) / a, spread)
    variance = torch.full((len(matrix),), 0.2**2, dtype=F64)
    mean, covariance = dense_condition(law, y, matrix, variance)
    shift = mean.reshape(x.shape) - law.mean
    for moments in (True, False):
        ours = guided(lambda *_: head, y, operator, 0.2, schedule, with_covariance=moments)(
            x, sigma
        )
        assert (ours.scaled_score - score - a / s * shift).abs().max() < 1e-9
        assert ours.c.shape == x.shape
        if moments:
            dense = DPLR(ours.c.flatten(1), ours.factor, ours.sign).dense()
            assert (dense - (a / s).square() * covariance).abs().max() < 1e-9
        else:
            assert ours.c.isnan().all()
            assert ours.factor is None


# -------------------------------------------------------------------- guided models: mixtures


def conditional(mixture: GaussianMixture, y: Tensor) -> GaussianMixture:
    """p(x0 | y) of a mixture, exact: again a mixture."""
    s, residual = mixture.covariances, y - mixture.means @ ROW.mT
    inner = ROW @ s @ ROW.mT + STD**2
    gain = s @ ROW.mT / inner
    fit = -(residual.square() / inner[..., 0] + inner[..., 0].log())[:, 0] / 2
    weights = (mixture.weights.log() + fit).softmax(-1)
    return GaussianMixture(weights, mixture.means + gain[..., 0] * residual, s - gain @ ROW @ s)


def by_backprop(schedule, y: Tensor, *, isotropic: float | None = None):
    """The published rivals: d m / d x by vector-Jacobian products through the model.

    Moment matching with C = (sigma^2 / alpha) d m / d x (Boys et al. 2023), or with C the posterior
    variance of isotropic Gaussian data of this standard deviation (Song et al. 2023).
    """

    def model(x: Tensor, sigma: Tensor) -> Scores:
        s, a = level(schedule, sigma)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            score = MIXTURE.noisy(s, a).score(x)
            mean = (x + s**2 * score) / a
            units = torch.eye(D, dtype=F64).unsqueeze(1).expand(D, *x.shape)
            rows = [torch.autograd.grad(mean, x, e, retain_graph=True)[0] for e in units]
        jacobian = torch.stack(rows, 1)
        covariance = s**2 / a * jacobian
        if isotropic is not None:
            variance = 1 / (isotropic**-2 + (a / s) ** 2)
            covariance = variance * torch.eye(D, dtype=F64).expand(len(x), D, D)
        inner = ROW @ covariance @ ROW.mT + STD**2
        residual = (y - mean @ ROW.mT).unsqueeze(-1)
        pull = (jacobian.mT @ ROW.mT @ (residual / inner)).squeeze(-1)
        return Scores(s * (score + pull).detach(), torch.ones_like(x))

    return model


@pytest.mark.parametrize("schedule", [VP(), EDM()], ids=lambda s: type(s).__name__)
def test_guidance_is_moment_matching_by_backprop_where_scores_are_exact(schedule):
    ours = guided(exact_model(MIXTURE, schedule), Y, ROW, STD, schedule)
    peer = by_backprop(schedule, Y)
    for part in (0.0, 0.3, 0.7, 1.0):
        t = schedule.t_min + part * (schedule.t_max - schedule.t_min)
        sigma = schedule.sigma(t)
        x = MIXTURE.noisy(sigma, schedule.alpha(t)).sample(50, seed=1)
        levels = torch.full((50,), sigma, dtype=F64)
        assert ours(x, levels).scaled_score.allclose(
            peer(x, levels).scaled_score, rtol=1e-6, atol=1e-7
        )


def test_on_a_mixture_moment_matching_beats_an_isotropic_covariance_over_many_y():
    schedule, rows, count = VP(), 100, 40
    clean = MIXTURE.sample(count, seed=0)
    generator = torch.Generator().manual_seed(1)
    y = clean @ ROW.mT + STD * torch.randn(count, 1, generator=generator, dtype=F64)
    laws = [conditional(MIXTURE, value) for value in y]
    wanted = torch.stack([law.weights @ law.means for law in laws])
    draws = torch.stack([law.sample(rows, seed=2) for law in laws])
    every = y.repeat_interleave(rows, 0)
    start = prior((len(every), D), schedule, seed=3, dtype=F64)
    models = {
        "ours": guided(exact_model(MIXTURE, schedule), every, ROW, STD, schedule),
        "isotropic": by_backprop(schedule, every, isotropic=1.2),
        "none": exact_model(MIXTURE, schedule),
    }
    error, apart = {}, {}
    for name, model in models.items():
        x = reverse_sde(model, start, schedule, n_steps=60, solver="heun", seed=4)
        x = x.reshape(count, rows, D)
        error[name] = (x.mean(1) - wanted).square().sum(-1).mean().sqrt().item()
        apart[name] = sum(map(energy_distance, x, draws)) / count
    assert error["ours"] < error["isotropic"] < error["none"] / 3
    assert apart["ours"] < apart["isotropic"] < apart["none"] / 3
    assert error["ours"] < 0.3


# ------------------------------------------------------------------------------------ bad input

GOOD = {"y": torch.zeros(4, 5, dtype=F64), "operator": operators()["wide"][0], "noise_std": 0.1}
PAIR = functions(operators()["wide"][0], DIMS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noise_std": 0.0}, ValueError, r"noise_std must be finite and > 0, got 0"),
        ({"noise_std": -1}, ValueError, r"noise_std must be finite and > 0, got -1"),
        (
            {"noise_std": torch.tensor([1.0, 0, 1, 1, 1], dtype=F64)},
            ValueError,
            r"noise_std must be finite and > 0, got 0",
        ),
        (
            {"noise_std": torch.ones(4, dtype=F64)},
            ValueError,
            r"noise_std must have shape \(5,\) as one measurement, got \(4,\)",
        ),
        ({"y": GOOD["y"][0]}, ValueError, r"y must have shape \(B, \*dims\), got \(5,\)"),
        (
            {"y": GOOD["y"][:, :4]},
            ValueError,
            r"y must have shape \(B, 5\) for 5 rows of the matrix, got \(4, 4\)",
        ),
        (
            {"y": GOOD["y"][:3]},
            ValueError,
            r"y must have 1 row or 4 like x, got 3 \(a sampler's chunk_size must not split",
        ),
        ({"y": GOOD["y"] / 0}, ValueError, r"y must be finite, got nan"),
        ({"operator": GOOD["operator"] / 0}, ValueError, r"operator must be finite, got -?inf"),
        (
            {"y": GOOD["y"].float()},
            ValueError,
            r"operator must have dtype torch.float32 like y, got torch.float64",
        ),
        (
            {"y": GOOD["y"].float(), "operator": GOOD["operator"].float()},
            ValueError,
            r"y must have dtype torch.float64 like x, got torch.float32",
        ),
        (
            {"operator": GOOD["operator"][:, :-1]},
            ValueError,
            r"operator must have 12 columns for x of dims \(3, 4\), got 11",
        ),
        (
            {"operator": GOOD["operator"][0]},
            ValueError,
            r"operator must be a matrix \(m, D\) or a boolean mask, got shape \(12,\)",
        ),
        (
            {"operator": MASK},
            ValueError,
            r"y must have shape \(B, 8\) for 8 true entries in the mask, got \(4, 5\)",
        ),
        (
            {"operator": MASK.flatten()[:9], "y": torch.zeros(1, 6, dtype=F64)},
            ValueError,
            r"operator must be a mask of shape \(3, 4\) like one x, got \(9,\)",
        ),
        (
            {"operator": (1, 2)},
            TypeError,
            r"operator must be a matrix, a boolean mask or two functions \(matvec, rmatvec\), got",
        ),
        (
            {"operator": (PAIR[0], lambda u: -PAIR[1](u))},
            ValueError,
            r"rmatvec must be the adjoint of matvec, got <A v, u> = \S+ and <v, A\^T u> = \S+ for",
        ),
        (
            {"operator": (lambda x: PAIR[0](x)[:, :4], PAIR[1])},
            ValueError,
            r"matvec\(x\) must have shape \(1, 5\) like y, got \(1, 4\)",
        ),
        (
            {"operator": functions(operators()["wide"][0], (4, 3))},
            ValueError,
            r"rmatvec\(y\) must have shape \(4, 3, 4\), got \(4, 4, 3\)",
        ),
        ({"tolerance": 0.0}, ValueError, r"tolerance must be finite and > 0, got 0"),
        ({"max_iterations": 0}, ValueError, r"max_iterations must be at least 1, got 0"),
        (
            {"operator": PAIR, "y": GOOD["y"] + 1, "max_iterations": 1},
            RuntimeError,
            (
                r"conjugate gradients must converge to 1e-06, got a residual of \S+ after 1 "
                r"iterations for sample 0 \(raise tolerance or max_iterations, or give the "
                r"operator as a matrix or a mask\)$"
            ),
        ),
        (
            {"posterior": Posterior(a_posterior().mean, DPLR(-torch.ones(4, SIZE, dtype=F64)))},
            ValueError,
            r"diagonal part of the posterior covariance must be at least 0, got -1 for sample 0",
        ),
        (
            {
                "posterior": Posterior(
                    a_posterior().mean,
                    DPLR(
                        torch.ones(4, SIZE, dtype=F64),
                        torch.ones(4, SIZE, 1, dtype=F64),
                        -torch.ones(1),
                    ),
                )
            },
            ValueError,
            r"the posterior covariance must be positive definite, got one that is not for sample 0",
        ),
        (
            {
                "posterior": Posterior(
                    a_posterior().mean, DPLR(torch.full((4, SIZE), math.nan, dtype=F64))
                )
            },
            ValueError,
            r"diagonal part of the posterior covariance must be finite, got nan",
        ),
        ({"posterior": None}, TypeError, r"posterior must be a Posterior, got NoneType"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"posterior": a_posterior(), **GOOD, **change}
    with pytest.raises(error, match=rf"^condition_mean: {message}"):
        condition_mean(**arguments)


def test_condition_refuses_functions():
    with pytest.raises(
        TypeError, match=r"^condition: operator must be a boolean mask or a matrix, got tuple \(for"
    ):
        condition(a_posterior(), GOOD["y"], PAIR, 0.1)


def test_guided_refuses_what_it_cannot_do():
    schedule = VP()
    model = exact_model(GAUSSIAN, schedule)
    pair = functions(ROW, (D,))
    with pytest.raises(
        ValueError,
        match=r"^guided: with_covariance must be False for an operator of functions \(C_y",
    ):
        guided(model, Y, pair, STD, schedule)
    with pytest.raises(TypeError, match=r"^guided: with_covariance must be a bool, got int"):
        guided(model, Y, ROW, STD, schedule, with_covariance=1)
    with pytest.raises(TypeError, match=r"^guided: schedule must be a Schedule, got NoneType"):
        guided(model, Y, ROW, STD, None)
    with pytest.raises(ValueError, match=r"^guided: rmatvec must be the adjoint of matvec"):
        guided(model, Y, (pair[0], lambda u: 2 * pair[1](u)), STD, schedule, with_covariance=False)
    with pytest.raises(ValueError, match=r"^guided: dropout must be off .*, got p = 0.5 in '1'"):
        guided(nn.Sequential(nn.Identity(), nn.Dropout()), Y, ROW, STD, schedule)
    guided(nn.Sequential(nn.Identity(), nn.Dropout()).eval(), Y, ROW, STD, schedule)
    start = torch.zeros(2, D, dtype=F64)
    alone = guided(model, Y, pair, STD, schedule, with_covariance=False)
    with pytest.raises(
        ValueError, match=r"^second_order_reverse: c from model must be finite, got nan"
    ):
        second_order_reverse(alone, start, schedule, n_steps=2)
    split = guided(model, Y.repeat(2, 1), ROW, STD, schedule)
    with pytest.raises(ValueError, match=r"^guided: y must have 1 row or 1 like x, got 2 \(a samp"):
        reverse_sde(split, start, schedule, n_steps=2, chunk_size=1)
    negative = guided(lambda x, _: Scores(x, -torch.ones_like(x)), Y, ROW, STD, schedule)
    with pytest.raises(
        ValueError, match=r"^guided: diagonal part of the posterior covariance must be at least 0"
    ):
        reverse_sde(negative, start, schedule, n_steps=2)
    first_order = guided(gaussian_model(GAUSSIAN, schedule), Y, ROW, STD, schedule)
    assert first_order(start, torch.full((2,), 0.5, dtype=F64)).factor.shape == (2, D, 1)


def test_one_dimensional_checks_use_the_right_gaussian():
    """The dense oracle of this file against the information form."""
    law = posterior_of(GAUSSIAN, ROW)
    precision = torch.linalg.inv(COVARIANCE) + ROW.mT @ ROW / STD**2
    mean = torch.linalg.solve(
        precision, torch.linalg.solve(COVARIANCE, MEAN) + (Y @ ROW / STD**2)[0]
    )
    assert law.mean.allclose(mean, rtol=1e-12)
    assert law.covariance.allclose(torch.linalg.inv(precision), rtol=1e-12)


# --------------------------------------------------------------------- what is left at small noise


def test_a_seen_entry_keeps_the_variance_of_the_noise():
    """v d / (d + v): 1 - d / (d + v) would be 0, or rounding."""
    diag = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    prior = Posterior(torch.zeros_like(diag), DPLR(diag))
    seen = torch.tensor([True, False, True])
    for noise in (1e-4, 1e-8, 1e-12):
        y = torch.ones(1, 2, dtype=torch.float64)
        found = condition(prior, y, seen, noise).covariance.diagonal()
        v = noise**2
        expected = torch.tensor([[v / (1 + v), 2.0, 3 * v / (3 + v)]], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("noise", [1e-9, 1e-12])
def test_rows_that_are_nearly_parallel_are_refused_where_the_noise_does_not_tell_them_apart(noise):
    """The difference of the rows is 1e-8: its variance, 1e-16, is rounding of the matrix's own."""
    row = torch.linspace(1.0, 2.0, 8, dtype=torch.float64)
    other = row.clone()
    other[0] += 1e-8
    prior = Posterior(torch.zeros(1, 8, dtype=torch.float64), DPLR(torch.ones(1, 8).double()))
    y = torch.tensor([[1.0, 1.1]], dtype=torch.float64)
    for function in (condition, condition_mean):
        with pytest.raises(ValueError, match="noise_std"):
            function(prior, y, torch.stack([row, other]), noise)
