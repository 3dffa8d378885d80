"""Densities against autograd of their own log_prob, quadrature, Tweedie's formula and sampling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hos_ext.densities.gaussian import Gaussian, GaussianMixture
from hos_ext.densities.logistic import JointLogisticMixture, ProductLogisticMixture

F64 = torch.float64
KINDS = ["gaussian", "gaussian_mixture", "product_logistic", "joint_logistic"]


def density(kind: str, dim: int = 3, parts: int = 3) -> Any:
    """A density with correlated, unequal parts; the same one at every call."""
    g = torch.Generator().manual_seed(17 + dim)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    root = randn(parts, dim, dim) * 0.4
    covariances = root @ root.mT + 0.2 * torch.eye(dim, dtype=F64)
    weights = (randn(parts) * 0.5).softmax(-1)
    means = randn(parts, dim) * 1.5
    scales = (randn(parts, dim) * 0.3).exp() * 0.5
    if kind == "gaussian":
        return Gaussian(means[0], covariances[0])
    if kind == "gaussian_mixture":
        return GaussianMixture(weights, means, covariances)
    if kind == "product_logistic":
        rows = (randn(dim, parts) * 0.5).softmax(-1)
        return ProductLogisticMixture(rows, means.T.contiguous(), scales.T.contiguous())
    return JointLogisticMixture(weights, means, scales)


def points(n: int, dim: int = 3, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(5), dtype=F64)


def grid2d(half_width: float, n: int) -> tuple[Tensor, float]:
    """A square grid of n^2 points and the area that each stands for."""
    axis = torch.linspace(-half_width, half_width, n, dtype=F64)
    cell = float(axis[1] - axis[0]) ** 2
    return torch.cartesian_prod(axis, axis), cell


# ------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_match_autograd_of_log_prob(kind: str, noise: float) -> None:
    d = density(kind)
    if noise > 0:
        d = d.noisy(noise, alpha=0.8)
    x = points(4)
    score, hessian, third = d.score(x), d.hessian(x), d.third(x)
    for b in range(x.shape[0]):
        row = x[b]
        torch.testing.assert_close(
            torch.autograd.functional.jacobian(lambda v: d.log_prob(v[None])[0], row),
            score[b],
            rtol=1e-9,
            atol=1e-9,
        )
        torch.testing.assert_close(
            torch.autograd.functional.jacobian(lambda v: d.score(v[None])[0], row),
            hessian[b],
            rtol=1e-9,
            atol=1e-9,
        )
        torch.testing.assert_close(
            torch.autograd.functional.jacobian(lambda v: d.hessian(v[None])[0], row),
            third[b],
            rtol=1e-9,
            atol=1e-9,
        )
    torch.testing.assert_close(d.hessian_diag(x), hessian.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_works_under_torch_func(kind: str) -> None:
    d = density(kind)
    x = points(5)

    def log_prob(row: Tensor) -> Tensor:
        return d.log_prob(row.unsqueeze(0)).squeeze(0)

    torch.testing.assert_close(torch.func.vmap(torch.func.grad(log_prob))(x), d.score(x))
    curvature = torch.func.jacrev(torch.func.grad(log_prob))
    torch.testing.assert_close(torch.func.vmap(curvature)(x), d.hessian(x))


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_integrates_to_one(kind: str) -> None:
    clean = density(kind, dim=2)
    for d, n in ((clean, 251), (clean.noisy(0.5, alpha=0.7), 101)):
        x, cell = grid2d(25.0, n)
        assert d.log_prob(x).exp().sum() * cell == pytest.approx(1, abs=1e-7)


def test_logistic_derivatives_at_the_centre_and_in_the_tail() -> None:
    one = torch.ones(1, 1, dtype=F64)
    d = ProductLogisticMixture(one, one, 0.5 * one)
    x = torch.tensor([[1.0], [401.0], [-399.0]], dtype=F64)
    torch.testing.assert_close(d.score(x)[:, 0], torch.tensor([0.0, -2.0, 2.0], dtype=F64))
    # l'' = -2 e^-u / s^2 far out, where 1 - tanh^2 would give 0
    x = torch.tensor([[1.0], [51.0]], dtype=F64)
    want = torch.tensor([-2.0, -8 * math.exp(-100.0)], dtype=F64)
    torch.testing.assert_close(d.hessian_diag(x)[:, 0], want, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------- noisy logistic


def convolved(x: float, d: ProductLogisticMixture, sigma: float) -> tuple[float, ...]:
    """log f and three derivatives of f = p * N(0, sigma^2) at x, by brute force on the kernel."""
    m, s, w = d.locations[0], d.scales[0], d.weights[0]
    low, high = x - 12 * sigma, x + 12 * sigma
    n = int((high - low) / min(sigma / 40, float(s.min()) / 40)) + 1
    t = torch.linspace(low, high, n, dtype=F64).unsqueeze(-1)
    u = (t - m).abs() / s
    p = (w * (-u).exp() / (s * (1 + (-u).exp()) ** 2)).sum(-1)
    v = (x - t.squeeze(-1)) / sigma
    step = (high - low) / (n - 1)
    base = p * (-(v**2) / 2).exp() / (sigma * math.sqrt(2 * math.pi)) * step
    f0 = float(base.sum())
    f1 = float((-v * base).sum()) / sigma / f0
    f2 = float(((v**2 - 1) * base).sum()) / sigma**2 / f0
    f3 = float((-(v**3 - 3 * v) * base).sum()) / sigma**3 / f0
    return math.log(f0), f1, f2 - f1**2, f3 - 3 * f1 * f2 + 2 * f1**3


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.3, 1.0, 3.0, 30.0])
def test_noisy_logistic_matches_brute_force_convolution(sigma: float) -> None:
    d = density("product_logistic", dim=1, parts=2)
    noisy = d.noisy(sigma)
    for x in (-3.0, -0.2, 0.0, 1.7, 2.0 + 5 * sigma):
        want = convolved(x, d, sigma)
        at = torch.tensor([[x]], dtype=F64)
        got = (noisy.log_prob(at), noisy.score(at), noisy.hessian_diag(at), noisy.third(at))
        # the oracle divides by sigma^k, so it is the less exact of the two for a small sigma
        for order, (a, b) in enumerate(zip(got, want, strict=True)):
            slack = 1e-11 + 1e-13 / sigma**order
            assert float(a) == pytest.approx(b, rel=1e-8, abs=slack), (x, order)


@pytest.mark.parametrize("ratio", [1e-3, 0.05, 0.4, 2.0, 50.0, 1000.0])
def test_noisy_logistic_keeps_its_accuracy_far_from_the_centre(ratio: float) -> None:
    # (f * N) and its derivative by another route: s2 of the quadrature against differences of s1
    one = torch.ones(1, 1, dtype=F64)
    d = ProductLogisticMixture(one, 0 * one, one).noisy(ratio)
    width = max(1.0, ratio)
    x = width * torch.tensor([[-20.0], [-6.0], [-1.0], [0.0], [0.3], [4.0], [9.0]], dtype=F64)
    if ratio == 1000.0:
        x = x[1:6]
    h = 1e-4 * width
    slope = (d.score(x + h) - d.score(x - h)) / (2 * h)
    torch.testing.assert_close(slope, d.hessian_diag(x), rtol=1e-6, atol=1e-10)
    rise = (d.log_prob(x + h) - d.log_prob(x - h)) / (2 * h)
    torch.testing.assert_close(rise, d.score(x)[:, 0], rtol=1e-6, atol=1e-9)
    # far out, a clean tail e^-u convolved with the noise is e^(-u + ratio^2 / 2)
    if ratio <= 2.0:
        far = torch.tensor([[60.0]], dtype=F64)
        assert float(d.log_prob(far)) == pytest.approx(-60 + ratio**2 / 2, abs=1e-9)


def test_noisy_logistic_tends_to_the_clean_one_and_to_the_gaussian() -> None:
    d = density("joint_logistic")
    x = points(6)
    torch.testing.assert_close(d.noisy(1e-4).hessian(x), d.hessian(x), rtol=1e-6, atol=1e-6)
    sigma = 3e3
    gauss = Gaussian(torch.zeros(3, dtype=F64), sigma**2 * torch.eye(3, dtype=F64))
    torch.testing.assert_close(
        d.noisy(sigma).score(sigma * x), gauss.score(sigma * x), rtol=3e-3, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_noisy_twice_is_noisy_once(kind: str) -> None:
    d = density(kind)
    x = points(4)
    twice = d.noisy(0.3, alpha=0.9).noisy(0.4, alpha=0.5)
    once = d.noisy(math.hypot(0.5 * 0.3, 0.4), alpha=0.45)
    torch.testing.assert_close(twice.log_prob(x), once.log_prob(x))
    torch.testing.assert_close(twice.hessian(x), once.hessian(x))


def test_noisy_logistic_passes_nan_and_empty_through() -> None:
    for kind in ("product_logistic", "joint_logistic"):
        d = density(kind).noisy(0.5)
        x = points(3)
        clean = d.score(x)
        x[1, 2] = math.nan
        assert d.log_prob(x).isnan().tolist() == [False, True, False]
        torch.testing.assert_close(d.score(x)[[0, 2]], clean[[0, 2]], rtol=1e-12, atol=1e-12)
        x[1, 2] = math.inf
        assert not bool(d.score(x)[1].isfinite().all())
        torch.testing.assert_close(d.score(x)[[0, 2]], clean[[0, 2]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_is_legal(kind: str) -> None:
    for d in (density(kind), density(kind).noisy(0.5)):
        x = torch.zeros(0, 3, dtype=F64)
        assert d.log_prob(x).shape == (0,)
        assert d.score(x).shape == d.hessian_diag(x).shape == (0, 3)
        assert d.hessian(x).shape == d.posterior_covariance(x, 0.5).shape == (0, 3, 3)
        assert d.third(x).shape == (0, 3, 3, 3)
        assert d.posterior_mean(x, 0.5).shape == d.sample(0, seed=1).shape == (0, 3)


# -------------------------------------------------------------------------------------- posteriors


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("sigma", [0.05, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_posterior_satisfies_tweedie(kind: str, sigma: float, alpha: float) -> None:
    d = density(kind)
    x = points(4)
    noisy = d.noisy(sigma, alpha)
    mean = (x + sigma**2 * noisy.score(x)) / alpha
    torch.testing.assert_close(d.posterior_mean(x, sigma, alpha), mean, rtol=1e-9, atol=1e-10)
    h = noisy.hessian(x) + torch.eye(3, dtype=F64) / sigma**2
    covariance = sigma**4 / alpha**2 * h
    got = d.posterior_covariance(x, sigma, alpha)
    torch.testing.assert_close(got, covariance, rtol=1e-9, atol=1e-10)
    assert bool((torch.linalg.eigvalsh(got) > 0).all())


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_posterior_matches_quadrature(kind: str, alpha: float) -> None:
    d = density(kind, dim=2)
    sigma = 0.8
    x = points(3, dim=2, scale=1.0)
    grid, cell = grid2d(12.0, 361)
    prior = d.log_prob(grid)
    for b in range(x.shape[0]):
        gap = (x[b] - alpha * grid).square().sum(-1)
        log_joint = prior - gap / (2 * sigma**2) - math.log(2 * math.pi * sigma**2)
        weight = log_joint.exp() * cell
        evidence = weight.sum()
        mean = weight @ grid / evidence
        covariance = (grid - mean).T @ ((grid - mean) * weight.unsqueeze(-1)) / evidence
        row = x[b : b + 1]
        got = float(d.noisy(sigma, alpha).log_prob(row))
        assert got == pytest.approx(math.log(float(evidence)), abs=1e-6)
        torch.testing.assert_close(
            d.posterior_mean(row, sigma, alpha)[0], mean, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            d.posterior_covariance(row, sigma, alpha)[0], covariance, rtol=1e-6, atol=1e-6
        )


def test_posterior_covariance_of_logistics_survives_a_large_sigma() -> None:
    # I + sigma^2 s2 cancels to 8e-5; in float32 alone nothing would be left of it
    one = torch.ones(1, 1)
    d = ProductLogisticMixture(one, 0 * one, 0.1 * one)
    covariance = d.posterior_covariance(torch.zeros(1, 1), 20.0)
    assert covariance.dtype == torch.float32
    assert float(covariance) == pytest.approx((0.1 * math.pi) ** 2 / 3, rel=3e-4)


LEVELS = [(300.0, 1.0), (3e3, 1.0), (1e5, 1.0), (1e5, 0.01), (30.0, 1e-4), (1.0, 3.0), (0.01, 0.5)]


def summed(sigma: float, alpha: float, own: float, x: float) -> tuple[float, float]:
    """Mean and variance of x0 given x, for two logistics with noise of their own, by one sum."""
    w, m, s = (torch.tensor(v, dtype=F64) for v in ([0.3, 0.7], [-1.0, 1.7], [0.4, 0.8]))
    total = math.hypot(alpha * own, sigma)
    low, high = max(-45.0, (x - 12 * total) / alpha), min(45.0, (x + 12 * total) / alpha)
    c = torch.linspace(low, high, 200_001, dtype=F64).unsqueeze(-1)
    u = (c - m) / s
    prior = (w / s * torch.sigmoid(u) * torch.sigmoid(-u)).sum(-1)
    c = c.squeeze(-1)
    p = prior * (-(((x - alpha * c) / total) ** 2) / 2).exp()
    p = p / p.sum()
    mean = float(p @ c)
    variance = float(p @ (c - mean) ** 2)
    rest = (sigma / total) ** 2
    return (
        rest * mean + alpha * (own / total) ** 2 * x,
        rest**2 * variance + (own * sigma / total) ** 2,
    )


@pytest.mark.parametrize("own", [0.0, 0.5])
@pytest.mark.parametrize(("sigma", "alpha"), LEVELS)
def test_posterior_moments_of_logistics_keep_their_digits(
    sigma: float, alpha: float, own: float
) -> None:
    w, m, s = (torch.tensor([v], dtype=F64) for v in ([0.3, 0.7], [-1.0, 1.7], [0.4, 0.8]))
    product = ProductLogisticMixture(w, m, s, noise_std=own)
    joint = JointLogisticMixture(w[0], m.mT.contiguous(), s.mT.contiguous(), noise_std=own)
    for x in (0.4 * alpha, 0.4 * alpha + 1.5 * sigma):
        mean, variance = summed(sigma, alpha, own, x)
        at = torch.tensor([[x]], dtype=F64)
        for law in (product, joint):
            assert float(law.posterior_mean(at, sigma, alpha)) == pytest.approx(mean, rel=1e-10)
            got = law.posterior_covariance(at, sigma, alpha)
            assert float(got) == pytest.approx(variance, rel=1e-10)
            single = law.to(dtype=torch.float32)
            found = single.posterior_covariance(at.float(), sigma, alpha)
            assert found.dtype == torch.float32
            assert float(found) == pytest.approx(variance, rel=1e-4 if sigma > 0.1 else 1e-2)
            # Tweedie's formula the other way round: scores of the noisy law.
            noisy = law.noisy(sigma, alpha)
            score = (alpha * mean - x) / sigma**2
            assert float(noisy.score(at)) == pytest.approx(score, rel=1e-9, abs=1e-9 / sigma)
            if sigma > alpha:
                curvature = (alpha**2 * variance / sigma**2 - 1) / sigma**2
                assert float(noisy.hessian_diag(at)) == pytest.approx(curvature, rel=1e-12)


def test_posterior_covariance_of_joint_logistics_has_both_parts_at_a_large_sigma() -> None:
    d = density("joint_logistic", dim=2)
    at = torch.tensor([[2e5, -1e5]], dtype=F64)
    got = d.posterior_covariance(at, 1e6)[0]
    # The noise says next to nothing: the law of the data.
    between = d.locations - d.weights @ d.locations
    within = (d.weights.unsqueeze(-1) * d.scales.square()).sum(0) * math.pi**2 / 3
    want = within.diag() + (between * d.weights.unsqueeze(-1)).T @ between
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "gaussian_mixture"])
@pytest.mark.parametrize(("sigma", "alpha"), [(1e-6, 1.0), (1e-3, 1e-3), (1e5, 1.0), (300.0, 0.01)])
def test_posteriors_of_float32_parameters_are_those_of_float64(
    kind: str, sigma: float, alpha: float
) -> None:
    single = density(kind).to(dtype=torch.float32)
    wide = single.to(dtype=F64)
    x = (alpha * points(4, scale=1.0) + sigma).float()
    for method in ("posterior_mean", "posterior_covariance"):
        got = getattr(single, method)(x, sigma, alpha)
        want = getattr(wide, method)(x.double(), sigma, alpha)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-30)


# ---------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("noise", [0.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_densitys_moments_and_scores(kind: str, noise: float) -> None:
    d = density(kind, dim=2)
    if noise > 0:
        d = d.noisy(noise)
    n = 4000
    x = d.sample(n, seed=3)
    grid, cell = grid2d(30.0, 301 if noise == 0 else 121)
    mass = d.log_prob(grid).exp() * cell
    powers = [grid, grid.square(), grid.prod(-1, keepdim=True), grid.tanh(), (2 * grid).cos()]
    draws = [x, x.square(), x.prod(-1, keepdim=True), x.tanh(), (2 * x).cos()]
    for exact, drawn in zip(powers, draws, strict=True):
        error = drawn.mean(0) - mass @ exact
        bar = drawn.std(0) / math.sqrt(n)
        assert bool((error.abs() < 4.5 * bar).all()), (error / bar).tolist()
    # E[s1] = 0 and E[s2 + s1 s1^T] = 0 under the density's own draws
    score = d.score(x)
    psi = (d.hessian(x) + score.unsqueeze(-1) * score.unsqueeze(-2)).flatten(1)
    for zero in (score, psi):
        ratio = zero.mean(0) / (zero.std(0) / math.sqrt(n)).clamp(min=1e-12)
        assert bool((ratio.abs() < 4.5).all()), ratio.tolist()


@pytest.mark.parametrize("kind", ["product_logistic", "joint_logistic"])
def test_draws_of_logistics_in_float32_reach_the_tails(kind: str) -> None:
    # u in float32 would end at 2^-24: no draw beyond 16.7 scales, and 16.7 once in 1.7e7.
    one, n = torch.ones(1, 1), 3_000_000
    make = ProductLogisticMixture if kind == "product_logistic" else JointLogisticMixture
    d = make(one if kind == "product_logistic" else one[0], 0 * one, one)
    draws = d.sample(n, seed=4)[:, 0]
    assert draws.dtype == torch.float32
    assert len(draws.unique()) > 0.85 * n  # float32 has fewer values of u
    wide = d.to(dtype=F64).sample(n, seed=4)[:, 0]
    torch.testing.assert_close(draws.double(), wide, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides_the_draws(kind: str) -> None:
    d = density(kind)
    first = d.sample(20, seed=11)
    torch.manual_seed(0)
    assert torch.equal(d.sample(20, seed=11), first)
    assert not torch.equal(d.sample(20, seed=12), first)
    # A generator of torch on the CPU forgets all bits of a seed but the lowest 32.
    high = [d.sample(20, seed=11 + (k << 32)) for k in range(3)]
    assert torch.equal(high[0], first)
    assert not torch.equal(high[1], first)
    assert not torch.equal(high[1], high[2])
    d.sample(1, seed=-(2**63)), d.sample(1, seed=2**64 - 1)  # any 64 bits
    assert first.dtype == F64
    assert first.shape == (20, 3)


# ------------------------------------------------------------------------------ dtype and stability


@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_with_float64_and_to_returns_to_it(kind: str) -> None:
    for d in (density(kind), density(kind).noisy(0.4, alpha=0.9)):
        single = d.to(dtype=torch.float32)
        x = points(5)
        for method in ("log_prob", "score", "hessian", "hessian_diag", "third"):
            got = getattr(single, method)(x.float())
            assert got.dtype == torch.float32
            want = getattr(d, method)(x)
            torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-4)
        for method in ("posterior_mean", "posterior_covariance"):
            got = getattr(single, method)(x.float(), 0.5)
            assert got.dtype == torch.float32
            torch.testing.assert_close(
                got.double(), getattr(d, method)(x, 0.5), rtol=2e-4, atol=2e-4
            )
        assert single.sample(3, seed=1).dtype == torch.float32
        assert single.to("cpu", F64).score(x).dtype == F64


@pytest.mark.parametrize("kind", KINDS)
def test_far_points_stay_finite_in_float32(kind: str) -> None:
    d = density(kind).to(dtype=torch.float32)
    x = torch.tensor([[1e4, -1e4, 1e4], [-1e4, 0, 0]])
    for value in (d.log_prob(x), d.score(x), d.hessian(x), d.hessian_diag(x), d.third(x)):
        assert bool(value.isfinite().all())


def test_weights_off_by_rounding_are_normalised() -> None:
    weights = torch.tensor([0.3, 0.7], dtype=F64)
    means = torch.tensor([[0.0], [1.0]], dtype=F64)
    eye = torch.ones(2, 1, 1, dtype=F64)
    x = points(3, dim=1)
    exact = GaussianMixture(weights, means, eye).log_prob(x)
    off = GaussianMixture(weights * (1 + 5e-6), means, eye).log_prob(x)
    torch.testing.assert_close(off, exact, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------ errors


def refused(error: type[Exception], message: str, call: Any, *arguments: Any) -> None:
    """call(*arguments) raises exactly this."""
    with pytest.raises(error) as caught:
        call(*arguments)
    assert str(caught.value) == message


MEAN = torch.zeros(2)
EYE = torch.eye(2)
HALF = torch.tensor([0.5, 0.5])
TABLE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Gaussian([0.0], EYE),  # type: ignore[arg-type]
            TypeError,
            "Gaussian: mean must be a tensor, got list",
        ),
        (
            lambda: Gaussian(MEAN.long(), EYE),
            TypeError,
            "Gaussian: mean must be float32 or float64, got torch.int64",
        ),
        (
            lambda: Gaussian(EYE, EYE),
            ValueError,
            "Gaussian: mean must have 1 non-empty dimension, got shape (2, 2)",
        ),
        (
            lambda: Gaussian(MEAN + math.nan, EYE),
            ValueError,
            "Gaussian: mean must be finite, got nan",
        ),
        (
            lambda: Gaussian(MEAN, "identity"),  # type: ignore[arg-type]
            TypeError,
            "Gaussian: covariance must be a tensor, got str",
        ),
        (
            lambda: Gaussian(MEAN, torch.eye(3)),
            ValueError,
            "Gaussian: covariance must have shape (2, 2), got (3, 3)",
        ),
        (
            lambda: Gaussian(MEAN, EYE.double()),
            ValueError,
            "Gaussian: covariance must have dtype torch.float32, got torch.float64",
        ),
        (
            lambda: Gaussian(MEAN, EYE.to("meta")),
            ValueError,
            "Gaussian: covariance must be on cpu, got meta",
        ),
        (
            lambda: Gaussian(MEAN, EYE * math.inf),
            ValueError,
            "Gaussian: covariance must be finite, got inf",
        ),
        (
            lambda: Gaussian(MEAN, torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
            ValueError,
            "Gaussian: covariance must be symmetric, got a difference of 0.5",
        ),
        (
            lambda: Gaussian(MEAN, torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
            ValueError,
            "Gaussian: covariance must be positive definite, got smallest eigenvalue -1",
        ),
        (
            lambda: GaussianMixture(torch.tensor([0.5, 0.6]), EYE, torch.stack([EYE, EYE])),
            ValueError,
            "GaussianMixture: weights must sum to one, got 1.1",
        ),
        (
            lambda: GaussianMixture(torch.tensor([1.5, -0.5]), EYE, torch.stack([EYE, EYE])),
            ValueError,
            "GaussianMixture: weights must be positive, got -0.5",
        ),
        (
            lambda: GaussianMixture(HALF, torch.zeros(2, 0), torch.stack([EYE, EYE])),
            ValueError,
            "GaussianMixture: means must have 2 non-empty dimensions, got shape (2, 0)",
        ),
        (
            lambda: GaussianMixture(HALF, EYE, torch.stack([EYE, -EYE])),
            ValueError,
            "GaussianMixture: covariances must be positive definite, got smallest eigenvalue -1",
        ),
        (
            lambda: ProductLogisticMixture(HALF, TABLE, TABLE),
            ValueError,
            "ProductLogisticMixture: weights must have shape (2, 3), got (2,)",
        ),
        (
            lambda: ProductLogisticMixture(TABLE, TABLE, TABLE),
            ValueError,
            "ProductLogisticMixture: weights must sum to one, got 3",
        ),
        (
            lambda: ProductLogisticMixture(TABLE / 3, TABLE, 0 * TABLE),
            ValueError,
            "ProductLogisticMixture: scales must be positive, got 0",
        ),
        (
            lambda: ProductLogisticMixture(TABLE / 3, TABLE, TABLE, noise_std=-1),
            ValueError,
            "ProductLogisticMixture: noise_std must be finite and >= 0, got -1",
        ),
        (
            lambda: JointLogisticMixture(TABLE, TABLE, TABLE),
            ValueError,
            "JointLogisticMixture: weights must have shape (2,), got (2, 3)",
        ),
        (
            lambda: JointLogisticMixture(HALF, TABLE, TABLE[:, :2]),
            ValueError,
            "JointLogisticMixture: scales must have shape (2, 3), got (2, 2)",
        ),
        (
            lambda: JointLogisticMixture(HALF, TABLE, TABLE, noise_std="loud"),  # type: ignore[arg-type]
            TypeError,
            "JointLogisticMixture: noise_std must be a number, got 'loud'",
        ),
    ],
)
def test_bad_parameters_are_refused(make: Any, error: type[Exception], message: str) -> None:
    refused(error, message, make)


@pytest.mark.parametrize("method", ["log_prob", "score", "hessian", "hessian_diag", "third"])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_points_are_refused(kind: str, method: str) -> None:
    d = density(kind)
    call, name = getattr(d, method), f"{type(d).__name__}.{method}"
    double = "torch.float64, got torch.float32"
    refused(TypeError, f"{name}: x must be a tensor, got list", call, [[0.0, 0.0, 0.0]])
    refused(ValueError, f"{name}: x must have shape (B, 3), got (4, 2)", call, torch.zeros(4, 2))
    refused(ValueError, f"{name}: x must have dtype {double}", call, torch.zeros(4, 3))
    meta = torch.zeros(4, 3, dtype=F64, device="meta")
    refused(ValueError, f"{name}: x must be on cpu, got meta", call, meta)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_noise_and_sampling_arguments_are_refused(kind: str) -> None:
    d = density(kind)
    x = points(2)
    for method, lead in (("noisy", ()), ("posterior_mean", (x,)), ("posterior_covariance", (x,))):
        call, name = getattr(d, method), f"{type(d).__name__}.{method}"
        for sigma, text in ((0.0, "0"), (-1.0, "-1"), (math.nan, "nan"), (math.inf, "inf")):
            message = f"{name}: sigma must be finite and > 0, got {text}"
            refused(ValueError, message, call, *lead, sigma)
        refused(ValueError, f"{name}: alpha must be finite and > 0, got 0", call, *lead, 1.0, 0.0)
        message = f"{name}: sigma must be a number, got shape (2,)"
        refused(TypeError, message, call, *lead, torch.ones(2))
        assert call(*lead, torch.tensor(0.5)) is not None
        if lead:
            message = f"{name}: x must have shape (B, 3), got (2, 2)"
            refused(ValueError, message, call, x[:, :2], 1.0)
    name = f"{type(d).__name__}.sample"
    refused(ValueError, f"{name}: n must be >= 0, got -1", lambda: d.sample(-1, seed=0))
    refused(TypeError, f"{name}: n must be an int, got 2.0", lambda: d.sample(2.0, seed=0))
    refused(TypeError, f"{name}: seed must be an int, got None", lambda: d.sample(2, seed=None))
