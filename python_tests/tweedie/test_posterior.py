"""Tweedie's formulas against closed-form Gaussian posteriors, with alpha, sign and image shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hos_ext.linalg.dplr import DPLR
from hos_ext.scores import Scores, UnscaledScores
from hos_ext.tweedie.posterior import (
    Posterior,
    posterior,
    posterior_covariance,
    posterior_mean,
    second_moment,
)

F64 = torch.float64
B, DIMS, D, R = 3, (2, 3), 6, 2


class Case(NamedTuple):
    """Noisy samples of a Gaussian, their exact scores in DPLR form and the exact posterior."""

    x: Tensor
    scores: UnscaledScores
    sigma: Tensor
    alpha: Tensor
    mean: Tensor  # (B, D)
    covariance: Tensor  # (B, D, D)


def gaussian(sign: int = 1, *, sigma: float = 0.7, alpha: float = 0.8) -> Case:
    """Data N(mu, S), S = diag(a) + sign W W^T; levels differ over the batch.

    s2 = -(alpha^2 S + sigma^2 I)^-1 = -diag(1/e) + sign U U^T with e = alpha^2 a + sigma^2 and
    U = alpha diag(1/e) W (I + sign alpha^2 W^T diag(1/e) W)^(-1/2).
    """
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(D, generator=generator, dtype=F64)
    a = 1 + torch.rand(D, generator=generator, dtype=F64)
    w = 0.3 * torch.randn(D, R, generator=generator, dtype=F64)
    s = sigma * torch.tensor([1.0, 0.5, 2.0], dtype=F64)
    al = alpha * torch.tensor([1.0, 1.1, 0.9], dtype=F64)
    data = torch.diag(a) + sign * w @ w.mT
    x = torch.randn(B, D, generator=generator, dtype=F64)
    eye = torch.eye(D, dtype=F64)
    noisy = al[:, None, None] ** 2 * data + s[:, None, None] ** 2 * eye
    centred = (x - al[:, None] * mu).unsqueeze(-1)
    score = -torch.linalg.solve(noisy, centred).squeeze(-1)
    gain = al[:, None, None] * torch.linalg.solve(noisy, data.expand(B, D, D)).mT
    mean = mu + (gain @ centred).squeeze(-1)
    covariance = data - al[:, None, None] * gain @ data
    e = al[:, None] ** 2 * a + s[:, None] ** 2
    small = torch.eye(R, dtype=F64) + sign * al[:, None, None] ** 2 * w.mT @ (w / e.unsqueeze(-1))
    root = torch.linalg.cholesky(torch.linalg.inv(small))
    factor = al[:, None, None] * (w / e.unsqueeze(-1)) @ root
    weight = None if sign == 1 else torch.full((R,), float(sign))
    shape = (B, *DIMS)
    scores = UnscaledScores(score.reshape(shape), (-1 / e).reshape(shape), factor, weight)
    return Case(x.reshape(shape), scores, s, al, mean, covariance)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("sign", [1, -1])
def test_moments_of_a_gaussian_are_exact(sign: int) -> None:
    case = gaussian(sign)
    s = case.scores
    close(posterior_mean(case.x, s.score, case.sigma, case.alpha).flatten(1), case.mean)
    covariance = posterior_covariance(s.diag, s.factor, case.sigma, case.alpha, sign=s.sign)
    close(covariance.dense(), case.covariance)
    moment = second_moment(case.x, s.score, s.diag, s.factor, case.sigma, case.alpha, sign=s.sign)
    outer = case.mean.unsqueeze(-1) * case.mean.unsqueeze(-2)
    close(moment.dense(), case.covariance + outer)
    assert moment.rank == R + 1


def test_second_moment_is_not_the_form_without_the_factor_on_the_mean() -> None:
    # A widely read note has sigma^4 / alpha^2 (s2 + I / sigma^2) + J J^T, right only for
    # sigma^4 = alpha^2.
    case = gaussian()
    s = case.scores
    moment = second_moment(case.x, s.score, s.diag, s.factor, case.sigma, case.alpha)
    j = s.score.flatten(1) + case.x.flatten(1) / case.sigma[:, None] ** 2
    wrong = case.covariance + j.unsqueeze(-1) * j.unsqueeze(-2)
    right = case.covariance + case.mean.unsqueeze(-1) * case.mean.unsqueeze(-2)
    close(moment.dense(), right)
    distance = torch.linalg.matrix_norm(wrong - right) / torch.linalg.matrix_norm(right)
    assert float(distance.min()) > 0.5
    level = 0.6
    sigma = torch.full((B,), level, dtype=F64)
    same = second_moment(case.x, s.score, s.diag, s.factor, level, level**2)
    j = s.score.flatten(1) + case.x.flatten(1) / level**2
    plain = posterior_covariance(s.diag, s.factor, sigma, level**2).dense()
    close(same.dense(), plain + j.unsqueeze(-1) * j.unsqueeze(-2))


@pytest.mark.parametrize("sign", [1, -1])
def test_posterior_of_scaled_scores_is_exact(sign: int) -> None:
    case = gaussian(sign)
    got = posterior(case.x, case.scores.scaled(case.sigma), case.sigma, case.alpha)
    assert got.mean.shape == got.std.shape == case.x.shape
    close(got.mean.flatten(1), case.mean)
    close(got.covariance.dense(), case.covariance)
    close(got.std.flatten(1), case.covariance.diagonal(dim1=1, dim2=2).sqrt())


def test_numbers_and_tensors_are_the_same_level() -> None:
    case = gaussian()
    s = case.scores
    full = torch.full((B,), 0.5, dtype=F64)
    for sigma, alpha in ((full, 0.5 * full), (torch.tensor(0.5), 0.25), (full.float(), 0.25)):
        got = posterior(case.x, s.scaled(sigma), sigma, alpha)
        want = posterior(case.x, s.scaled(0.5), 0.5, 0.25)
        assert torch.equal(got.mean, want.mean)
        assert torch.equal(got.covariance.diag, want.covariance.diag)
        assert torch.equal(got.covariance.factor, want.covariance.factor)
    default = posterior(case.x, s.scaled(0.5), 0.5)
    assert torch.equal(default.mean, posterior_mean(case.x, 2 * (0.5 * s.score), 0.5))


def test_scores_without_a_factor_have_rank_zero() -> None:
    case = gaussian()
    scores = UnscaledScores(case.scores.score, case.scores.diag)
    got = posterior(case.x, scores.scaled(0.5), 0.5)
    assert got.covariance.rank == 0
    close(got.covariance.diag, 0.25 * (1 + 0.25 * case.scores.diag.flatten(1)))
    assert scores.scaled(0.5).unscaled(0.5).factor is None
    moment = second_moment(case.x, scores.score, scores.diag, None, 0.5)
    assert moment.rank == 1
    values, vectors = got.principal_components(1)
    close(values[:, 0], got.covariance.diag.max(-1).values)
    assert vectors.shape == (B, D, 1)


def test_scaled_and_unscaled_are_inverse() -> None:
    case = gaussian(-1)
    back = case.scores.scaled(case.sigma).unscaled(case.sigma)
    for name in ("score", "diag", "factor"):
        close(getattr(back, name), getattr(case.scores, name), 1e-14)
    assert back.sign is case.scores.sign
    scaled = case.scores.scaled(case.sigma)
    level = case.sigma[:, None, None]
    close(scaled.scaled_score, level * case.scores.score)
    close(scaled.c, 1 + level**2 * case.scores.diag)
    close(scaled.factor, level * case.scores.factor)


def test_c_keeps_small_posterior_variances_in_float32() -> None:
    # Posterior variance 1e-7 of sigma^2: c says so, 1 + sigma^2 diag cannot.
    c = torch.full((1, 4), 1e-7)
    got = posterior(torch.zeros(1, 4), Scores(torch.zeros(1, 4), c), 0.01)
    torch.testing.assert_close(got.covariance.diag, torch.full((1, 4), 1e-11), rtol=1e-6, atol=0)
    diag = ((c.double() - 1) / 0.01**2).float()
    lost = posterior_covariance(diag, None, 0.01).diag
    assert float((lost / 1e-11 - 1).abs().min()) > 0.05


def test_an_empty_batch_passes_through() -> None:
    x = torch.empty(0, *DIMS)
    scores = Scores(x, x, torch.empty(0, D, R))
    got = posterior(x, scores, torch.empty(0), torch.empty(0))
    assert got.mean.shape == got.std.shape == (0, *DIMS)
    assert got.log_prob(x).shape == (0,)
    assert got.sample(2, seed=0).shape == (2, 0, *DIMS)
    assert second_moment(x, x, x, scores.factor, 1.0).dense().shape == (0, D, D)


def test_moments_pass_gradients_to_the_scores() -> None:
    case = gaussian()
    s = case.scores
    inputs = [t.clone().requires_grad_() for t in (case.x, s.score, s.diag, s.factor)]

    def moments(x: Tensor, score: Tensor, diag: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        fit = posterior(x, UnscaledScores(score, diag, factor).scaled(0.5), 0.5, 0.9)
        return fit.mean, fit.covariance.dense()

    assert torch.autograd.gradcheck(moments, inputs)


# ----------------------------------------------------------------------------------- Posterior


def test_log_prob_and_to_distribution_are_the_gaussian_density() -> None:
    case = gaussian()
    got = posterior(case.x, case.scores.scaled(case.sigma), case.sigma, case.alpha)
    clean = torch.randn(B, *DIMS, dtype=F64)
    dense = torch.distributions.MultivariateNormal(case.mean, case.covariance)
    close(got.log_prob(clean), dense.log_prob(clean.flatten(1)), 1e-11)
    law = got.to_distribution()
    assert law.event_shape == (D,)
    close(law.log_prob(clean.flatten(1)), dense.log_prob(clean.flatten(1)), 1e-10)
    close(law.covariance_matrix, case.covariance)


def test_log_prob_takes_signs_that_a_torch_distribution_cannot() -> None:
    case = gaussian(-1)
    got = posterior(case.x, case.scores.scaled(case.sigma), case.sigma, case.alpha)
    dense = torch.distributions.MultivariateNormal(case.mean, case.covariance)
    clean = torch.randn(B, *DIMS, dtype=F64)
    close(got.log_prob(clean), dense.log_prob(clean.flatten(1)), 1e-11)
    with pytest.raises(ValueError, match=r"signs must all be \+1, got \[-1.0, -1.0\]$"):
        got.to_distribution()


@pytest.mark.parametrize("sign", [1, -1])
def test_samples_have_the_posterior_moments(sign: int) -> None:
    case = gaussian(sign)
    got = posterior(case.x, case.scores.scaled(case.sigma), case.sigma, case.alpha)
    n = 5_000
    draws = got.sample(n, seed=7)
    assert draws.shape == (n, B, *DIMS)
    residual = draws.flatten(2) - case.mean
    variance = case.covariance.diagonal(dim1=1, dim2=2)
    assert float((residual.mean(0) / (variance / n).sqrt()).abs().max()) < 5
    spread = (variance.unsqueeze(-1) * variance.unsqueeze(-2) + case.covariance.square()) / n
    found = torch.einsum("nbi,nbj->bij", residual, residual) / n
    assert float(((found - case.covariance) / spread.sqrt()).abs().max()) < 5


def test_samples_repeat_and_split_by_draw_and_row() -> None:
    case = gaussian()
    got = posterior(case.x, case.scores.scaled(case.sigma), case.sigma, case.alpha)
    whole = got.sample(4, seed=1, offset=3, first=5)
    assert torch.equal(whole, got.sample(4, seed=1, offset=3, first=5))
    close(whole[2:], got.sample(2, seed=1, offset=5, first=5), 1e-14)
    tail = Posterior(got.mean[1:], DPLR(got.covariance.diag[1:], got.covariance.factor[1:]))
    close(whole[:, 1:], tail.sample(4, seed=1, offset=3, first=6), 1e-14)


def test_principal_components_are_the_leading_eigenpairs() -> None:
    case = gaussian()
    got = posterior(case.x, case.scores.scaled(case.sigma), case.sigma, case.alpha)
    values, vectors = got.principal_components(2)
    want = torch.linalg.eigvalsh(case.covariance).flip(-1)[:, :2]
    close(values, want)
    close(case.covariance @ vectors, vectors * values.unsqueeze(1))


@pytest.mark.parametrize("sign", [1, -1])
def test_credible_intervals_are_those_of_the_gaussian_marginals(sign: int) -> None:
    case = gaussian(sign)
    got = posterior(case.x, case.scores.scaled(case.sigma), case.sigma, case.alpha)
    variance = case.covariance.diagonal(dim1=1, dim2=2).reshape(B, *DIMS)
    law = torch.distributions.Normal(got.mean, variance.sqrt())
    for level in (0.01, 0.5, 0.95, 1 - 1e-9):
        low, high = got.credible_interval(level)
        close(law.cdf(high) - law.cdf(low), torch.full_like(low, level))
        close(got.mean - low, high - got.mean)
    low, high = got.credible_interval()
    close((high - low) / got.std, torch.full_like(low, 2 * 1.959963984540054))


@pytest.mark.parametrize("sign", [1, -1])
def test_correlation_is_a_row_of_the_dense_matrix(sign: int) -> None:
    case = gaussian(sign)
    got = posterior(case.x, case.scores.scaled(case.sigma), case.sigma, case.alpha)
    root = case.covariance.diagonal(dim1=1, dim2=2).rsqrt()
    want = root.unsqueeze(-1) * case.covariance * root.unsqueeze(-2)
    for flat, index in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        row = got.correlation(flat)
        close(row, want[:, flat].reshape(B, *DIMS))
        assert torch.equal(row, got.correlation(index))
        close(row[(slice(None), *index)], torch.ones(B, dtype=F64))
    close(got.correlation(numpy.int64(4)), got.correlation(4))


def test_correlation_with_an_entry_of_no_variance_is_nan() -> None:
    x = torch.zeros(1, 3)
    got = posterior(x, Scores(x, torch.tensor([[0.0, 1.0, 2.0]])), 0.5)
    assert got.correlation(1).isnan().tolist() == [[True, False, False]]
    assert got.correlation(0).isnan().all()


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_everything_works_on_whole_images_in_memory_of_the_factor() -> None:
    """3 x 256 x 256 pixels: one D x D matrix would be 155 GB."""
    generator = torch.Generator().manual_seed(0)
    dims, rank = (3, 256, 256), 16
    size = math.prod(dims)
    x = torch.randn(1, *dims, generator=generator)
    c = 0.1 + torch.rand(1, *dims, generator=generator)
    factor = torch.randn(1, size, rank, generator=generator) / 100
    with Largest() as largest:
        got = posterior(x, Scores(torch.zeros_like(x), c, factor), 1.0)
        low, high = got.credible_interval(0.9)
        row = got.correlation((1, 100, 200))
        draws = got.sample(2, seed=1)
        value = got.log_prob(draws[0])
        values, vectors = got.principal_components(3)
        law = got.to_distribution().log_prob(draws[0].flatten(1))
    assert size * rank <= largest.numel < 2 * size * rank
    assert row.shape == low.shape == x.shape
    inside = ((draws > low) & (draws < high)).double().mean()
    assert abs(float(inside) - 0.9) < 5 * (0.09 / draws.numel()) ** 0.5
    column = 65536 + 100 * 256 + 200
    flat = (factor[0] @ factor[0, column])[:5] / got.std.flatten()[:5] / got.std.flatten()[column]
    torch.testing.assert_close(row.flatten()[:5], flat, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value, law, rtol=1e-5, atol=0)
    # The covariance of a draw, by its own density: E log N = -(log det + D log 2 pi + D) / 2.
    expected = -(got.covariance.logdet() + size * (1 + math.log(2 * math.pi))) / 2
    assert float((value - expected).abs()) < 5 * (size / 2) ** 0.5
    residual = got.covariance @ vectors - vectors * values.unsqueeze(1)
    assert float(residual.norm()) < 1e-4 * float(values[0, 0])


def test_recalibrated_scales_the_covariance_only() -> None:
    case = gaussian()
    got = posterior(case.x, case.scores.scaled(case.sigma), case.sigma, case.alpha)
    twice = got.recalibrated(2.0)
    assert twice.mean is got.mean
    close(twice.covariance.dense(), 2 * case.covariance)
    each = got.recalibrated(torch.tensor([1.0, 4.0, 0.5]))
    close(each.std[1], 2 * got.std[1])


def test_negative_variances_are_shown_not_hidden() -> None:
    x = torch.zeros(1, 2)
    got = posterior(x, Scores(x, torch.tensor([[-1.0, 1.0]])), 0.5)
    assert got.std.isnan().tolist() == [[True, False]]
    message = r"^Posterior.log_prob: covariance must be positive definite, got one that is not at "
    with pytest.raises(ValueError, match=message + "batch 0$"):
        got.log_prob(x)
    with pytest.raises(ValueError, match=r"covariance must be positive, got -0.25$"):
        got.to_distribution()
    with pytest.raises(ValueError, match=r"^Posterior.sample: diag must be >= 0, got -0.25$"):
        got.sample(1)


def test_nan_in_the_data_passes_through() -> None:
    case = gaussian()
    x = case.x.clone()
    x[1, 0, 0] = torch.nan
    got = posterior(x, case.scores.scaled(case.sigma), case.sigma, case.alpha)
    assert got.mean[1, 0, 0].isnan()
    assert int(got.mean.isnan().sum()) == 1
    assert got.log_prob(case.x).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("field", ["c", "factor"])
def test_log_prob_of_a_covariance_that_is_not_finite_is_nan(field: str, bad: float) -> None:
    case = gaussian()
    scores = case.scores.scaled(case.sigma)
    broken = getattr(scores, field).clone()
    broken[1].view(-1)[0] = bad
    got = posterior(case.x, scores.replace(**{field: broken}), case.sigma, case.alpha)
    want = posterior(case.x, scores, case.sigma, case.alpha).log_prob(case.x)
    value = got.log_prob(case.x)
    assert value.isnan().tolist() == [False, True, False]
    close(value[::2], want[::2])


@pytest.mark.parametrize("small", [1e-3, 1e-7, 1e-12])
def test_log_prob_in_float32_keeps_its_digits_for_small_variances(small: float) -> None:
    generator = torch.Generator().manual_seed(0)
    c = torch.ones(2, 6)
    c[:, :3] = small
    x, clean = torch.randn(2, 2, 6, generator=generator)
    factor = torch.randn(2, 6, 4, generator=generator)
    got = posterior(x, Scores(torch.zeros(2, 6), c, factor), 1.0)
    full = torch.diag_embed(c.double()) + factor.double() @ factor.double().mT
    error = (clean.double() - x.double()).unsqueeze(-1)
    distance = (error.mT @ torch.linalg.solve(full, error)).flatten()
    want = -(distance + torch.logdet(full) + 6 * math.log(2 * math.pi)) / 2
    torch.testing.assert_close(got.log_prob(clean).double(), want, rtol=1e-3, atol=0)


def test_a_posterior_of_rank_zero_is_a_torch_distribution_too() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    got = posterior(x, Scores(torch.zeros(2, 3), 1 + x), 0.5)
    law = got.to_distribution()
    want = torch.distributions.Normal(x, got.std).log_prob(x + 1).sum(-1)
    torch.testing.assert_close(law.log_prob(x + 1), want)
    torch.testing.assert_close(got.log_prob(x + 1), want)


# ------------------------------------------------------------------------------------- errors

X, FACTOR, INTS = torch.ones(2, 3), torch.ones(2, 3, 1), torch.ones(2, 3, dtype=torch.int64)
WAY_OUT = ".score is s1, and .scaled(sigma) makes Scores"
SCORES = Scores(X, X, FACTOR)
FIT = posterior(X, SCORES, 1.0)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: posterior(X, SCORES.unscaled(1.0), 1.0),
            TypeError,
            f"posterior: scores must be a Scores, got UnscaledScores ({WAY_OUT})",
        ),
        (
            lambda: posterior([1.0], SCORES, 1.0),
            TypeError,
            "posterior: x must be a Tensor, got list",
        ),
        (
            lambda: posterior(torch.ones(2), SCORES, 1.0),
            ValueError,
            "posterior: x must have shape (B, *dims), got (2,)",
        ),
        (
            lambda: posterior(X, Scores(torch.ones(2, 4), X), 1.0),
            ValueError,
            "posterior: scores.scaled_score must have shape (2, 3), got (2, 4)",
        ),
        (
            lambda: posterior(X, Scores(X, X.double()), 1.0),
            ValueError,
            "posterior: scores.c must have dtype torch.float32, got torch.float64",
        ),
        (
            lambda: posterior(X, Scores(X, X.to("meta")), 1.0),
            ValueError,
            "posterior: scores.c must be on cpu, got meta",
        ),
        (
            lambda: posterior(X, Scores(X, X, torch.ones(2, 4, 1)), 1.0),
            ValueError,
            "posterior: factor must have shape (2, 3, r), got (2, 4, 1)",
        ),
        (
            lambda: posterior(X.half(), Scores(X.half(), X.half()), 1.0),
            ValueError,
            "posterior: x must have dtype float32, float64, got torch.float16",
        ),
        (
            lambda: posterior(X, SCORES, 0.0),
            ValueError,
            "posterior: sigma must be positive, got 0.0",
        ),
        (
            lambda: posterior(X, SCORES, math.nan),
            ValueError,
            "posterior: sigma must be finite, got nan",
        ),
        (
            lambda: posterior(X, SCORES, torch.tensor([1.0, -2.0])),
            ValueError,
            "posterior: sigma must be positive, got -2.0",
        ),
        (
            lambda: posterior(X, SCORES, torch.ones(3)),
            ValueError,
            "posterior: sigma must be a float or have shape (2,), got (3,)",
        ),
        (
            lambda: posterior(X, SCORES, torch.ones(2, device="meta")),
            ValueError,
            "posterior: sigma must be on cpu, got meta",
        ),
        (
            lambda: posterior(X, SCORES, "1"),
            TypeError,
            "posterior: sigma must be a float or a Tensor, got str",
        ),
        (
            lambda: posterior(X, SCORES, 1.0, -1.0),
            ValueError,
            "posterior: alpha must be positive, got -1.0",
        ),
        (
            lambda: SCORES.unscaled(0.0),
            ValueError,
            "Scores.unscaled: sigma must be positive, got 0.0",
        ),
        (
            lambda: SCORES.unscaled(1.0).scaled(-1.0),
            ValueError,
            "UnscaledScores.scaled: sigma must be positive, got -1.0",
        ),
        (
            lambda: FIT.recalibrated(0.0),
            ValueError,
            "Posterior.recalibrated: scale must be positive, got 0.0",
        ),
        (
            lambda: FIT.log_prob(torch.ones(3, 2)),
            ValueError,
            "Posterior.log_prob: x0 must have shape (2, 3), got (3, 2)",
        ),
        (
            lambda: FIT.log_prob(X.double()),
            ValueError,
            "Posterior.log_prob: x0 must have dtype torch.float32, got torch.float64",
        ),
        (
            lambda: posterior_mean(X, 1.0, 1.0),
            TypeError,
            "posterior_mean: score must be a Tensor, got float",
        ),
        (
            lambda: posterior_mean(X, X, 1.0, 0.0),
            ValueError,
            "posterior_mean: alpha must be positive, got 0.0",
        ),
        (
            lambda: posterior_covariance(torch.ones(2), None, 1.0),
            ValueError,
            "posterior_covariance: diag must have shape (B, *dims), got (2,)",
        ),
        (
            lambda: posterior_covariance(X, None, -1.0),
            ValueError,
            "posterior_covariance: sigma must be positive, got -1.0",
        ),
        (
            lambda: second_moment(X, X, torch.ones(2, 4), None, 1.0),
            ValueError,
            "second_moment: diag must have shape (2, 3), got (2, 4)",
        ),
        (
            lambda: posterior_mean(INTS, INTS, 0.5),
            ValueError,
            "posterior_mean: x must have dtype float32, float64, got torch.int64",
        ),
        (
            lambda: posterior_covariance(INTS, None, 0.5),
            ValueError,
            "posterior_covariance: diag must have dtype float32, float64, got torch.int64",
        ),
        (
            lambda: Scores(INTS, INTS).unscaled(0.5),
            ValueError,
            "Scores.unscaled: scaled_score must have dtype float32, float64, got torch.int64",
        ),
        (
            lambda: UnscaledScores(INTS, INTS).scaled(0.5),
            ValueError,
            "UnscaledScores.scaled: score must have dtype float32, float64, got torch.int64",
        ),
        (
            lambda: posterior_mean([1.0], X, 0.5),
            TypeError,
            "posterior_mean: x must be a Tensor, got list",
        ),
        (
            lambda: posterior_covariance(X, [1.0], 0.5),
            TypeError,
            "posterior_covariance: factor must be a Tensor, got list",
        ),
        (
            lambda: posterior(X, Scores(X, X, [1.0]), 0.5),
            TypeError,
            "posterior: factor must be a Tensor, got list",
        ),
        (
            lambda: Scores(X, [1.0]).unscaled(0.5),
            TypeError,
            "Scores.unscaled: c must be a Tensor, got list",
        ),
        (
            lambda: UnscaledScores(X, [1.0]).scaled(0.5),
            TypeError,
            "UnscaledScores.scaled: diag must be a Tensor, got list",
        ),
        (
            lambda: FIT.log_prob([1.0]),
            TypeError,
            "Posterior.log_prob: x0 must be a Tensor, got list",
        ),
        (
            lambda: FIT.credible_interval(0.0),
            ValueError,
            "Posterior.credible_interval: level must be finite and > 0, got 0",
        ),
        (
            lambda: FIT.credible_interval(1),
            ValueError,
            "Posterior.credible_interval: level must be in (0, 1), got 1",
        ),
        (
            lambda: FIT.credible_interval("a"),
            TypeError,
            "Posterior.credible_interval: level must be a number, got 'a'",
        ),
        (
            lambda: FIT.correlation(3),
            ValueError,
            "Posterior.correlation: index must be inside (3,), got 3",
        ),
        (
            lambda: FIT.correlation(-1),
            ValueError,
            "Posterior.correlation: index must be inside (3,), got -1",
        ),
        (
            lambda: FIT.correlation((0, 1)),
            ValueError,
            "Posterior.correlation: index must be inside (3,), got (0, 1)",
        ),
        (
            lambda: FIT.correlation(True),
            TypeError,
            "Posterior.correlation: index must be an int or a tuple of ints, got True",
        ),
        (
            lambda: FIT.correlation((1.0,)),
            TypeError,
            "Posterior.correlation: index must be an int or a tuple of ints, got (1.0,)",
        ),
        (
            lambda: posterior(X, SCORES, True),
            TypeError,
            "posterior: sigma must be a float or a Tensor, got bool",
        ),
        (
            lambda: posterior(X, SCORES, torch.tensor(1.0, device="meta")),
            ValueError,
            "posterior: sigma must be on cpu, got meta",
        ),
        (
            lambda: posterior(X, SCORES, torch.tensor(1)),
            ValueError,
            "posterior: sigma must have dtype float32, float64, float16, bfloat16, got torch.int64",
        ),
    ],
)
def test_bad_input_is_refused_by_name(
    call: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
