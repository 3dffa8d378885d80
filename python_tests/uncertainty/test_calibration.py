"""Calibration of posteriors: dense float64 oracles, exact laws, and wrong covariances caught."""

import math

import pytest
import torch

from hos_ext import normal
from hos_ext.densities.gaussian import Gaussian, GaussianMixture
from hos_ext.linalg.dplr import DPLR
from hos_ext.scores import UnscaledScores
from hos_ext.tweedie.posterior import Posterior, posterior
from hos_ext.uncertainty.calibration import (
    calibration,
    calibration_report,
    recalibration_factor,
    recalibration_factors,
)

F64 = torch.float64


def random_posterior(n, d, r, *, sign=None, seed=0):
    """N(m, C) with random parts, and an x drawn from it (for sign None)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mean, diag, factor = normal(n, d), normal(n, d).square() + 0.05, normal(n, d, r) / 2
    if sign is not None:
        diag = diag + 20  # positive definite in spite of the columns that subtract
    covariance = DPLR(diag, factor, sign)
    x = mean + diag.sqrt() * normal(n, d) + (factor @ normal(n, r, 1)).squeeze(-1)
    return x, Posterior(mean, covariance)


@pytest.mark.parametrize("sign", [None, torch.tensor([1.0, -1.0, 1.0])])
@pytest.mark.parametrize("tau", [0.0, 0.3, 4.0])
def test_calibration_matches_dense_algebra(tau, sign):
    x, fit = random_posterior(9, 6, 3, sign=sign)
    dense = torch.stack([c.diag() for c in fit.covariance.diag])
    weight = torch.eye(3).double() if sign is None else sign.double().diag()
    dense = dense + fit.covariance.factor @ weight @ fit.covariance.factor.mT
    inverse = torch.linalg.inv(dense + tau**2 * torch.eye(6).double())
    e = x - fit.mean
    form = torch.einsum("bi,bij,bj->b", e, inverse, e)
    expected = (form + tau**2 * inverse.diagonal(dim1=1, dim2=2).sum(1)).mean() / 6
    ratio = (e.square().sum(1).mean() + 6 * tau**2) / (
        dense.diagonal(dim1=1, dim2=2).sum(1).mean() + 6 * tau**2
    )
    got = calibration(x, fit, tau=tau)
    assert got["mahalanobis"] == pytest.approx(float(expected), rel=1e-10)
    assert got["trace_ratio"] == pytest.approx(float(ratio), rel=1e-10)
    assert list(got) == ["mahalanobis", "trace_ratio"]


def test_predictive_calibration_is_the_mean_over_drawn_noise():
    tau, n, d = 0.7, 50_000, 4
    x, fit = random_posterior(1, d, 2)
    torch.manual_seed(1)
    inverse = torch.linalg.inv(fit.covariance.dense()[0] + tau**2 * torch.eye(d).double())
    e = x - fit.mean + tau * torch.randn(n, d, dtype=torch.float64)
    form = (e @ inverse * e).sum(1) / d
    error = float(form.std()) / n**0.5
    assert abs(calibration(x, fit, tau=tau)["mahalanobis"] - float(form.mean())) < 5 * error


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_exact_posteriors_are_calibrated_and_mis_scaled_ones_are_caught(tau):
    n, d = 4000, 8
    x, fit = random_posterior(n, d, 3)
    five_errors = 5 * (2 / (n * d)) ** 0.5
    exact = calibration(x, fit, tau=tau)
    assert abs(exact["mahalanobis"] - 1) < five_errors
    assert abs(exact["trace_ratio"] - 1) < 0.1
    for a in (0.5, 2.0):
        wrong = calibration(x, fit.recalibrated(a), tau=tau)
        assert (wrong["mahalanobis"] - 1) * (1 - a) > 0.1
        assert (wrong["trace_ratio"] - 1) * (1 - a) > 0.1
    assert calibration(x, fit.recalibrated(0.5))["mahalanobis"] == pytest.approx(
        2 * calibration(x, fit)["mahalanobis"]
    )


def test_a_wrong_direction_shows_in_mahalanobis_but_not_in_the_trace():
    x, fit = random_posterior(4000, 8, 3)
    turned = Posterior(fit.mean, DPLR(fit.covariance.diag.flip(1), fit.covariance.factor.flip(1)))
    wrong = calibration(x, turned)
    assert abs(wrong["trace_ratio"] - 1) < 0.1
    assert wrong["mahalanobis"] > 2


def test_the_posterior_of_a_gaussian_from_its_scores_is_calibrated():
    """The whole way: x0 of a Gaussian, noised; exact s1 and s2; Tweedie; calibration."""
    torch.manual_seed(3)
    n, d, alpha, sigma = 5000, 5, 0.8, 0.6
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    x0 = spread.sqrt() * torch.randn(n, d, dtype=torch.float64)
    noisy = alpha * x0 + sigma * torch.randn(n, d, dtype=torch.float64)
    precision = 1 / (alpha**2 * spread + sigma**2)
    scores = UnscaledScores(-precision * noisy, (-precision).expand(n, d), None)
    fit = posterior(noisy, scores.scaled(sigma), sigma, alpha)
    for tau in (0.0, sigma / 2):
        figures = calibration(x0, fit, tau=tau)
        assert abs(figures["mahalanobis"] - 1) < 5 * (2 / (n * d)) ** 0.5
        assert abs(figures["trace_ratio"] - 1) < 0.1


@pytest.mark.parametrize("tau", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("a", [1e-3, 0.4, 1.0, 30.0])
def test_recalibration_factor_makes_the_figure_one(tau, a):
    x, fit = random_posterior(200, 6, 2)
    wrong = fit.recalibrated(a)
    scale = recalibration_factor(x, wrong, tau=tau)
    assert calibration(x, wrong.recalibrated(scale), tau=tau)["mahalanobis"] == pytest.approx(
        1, abs=2e-6
    )
    assert scale * a == pytest.approx(recalibration_factor(x, fit, tau=tau), rel=5e-6)


def test_recalibration_factor_without_tau_maximises_the_likelihood():
    x, fit = random_posterior(50, 6, 2)
    best = recalibration_factor(x, fit.recalibrated(0.3))
    e = x - fit.mean

    def log_likelihood(a):
        law = torch.distributions.MultivariateNormal(
            torch.zeros(6).double(), fit.covariance.scale(0.3 * a).dense()
        )
        return float(law.log_prob(e).sum())

    assert log_likelihood(best) > max(log_likelihood(best * 1.01), log_likelihood(best / 1.01))


def test_calibration_takes_images_and_float32():
    x, fit = random_posterior(30, 6, 2)
    shaped = Posterior(fit.mean.reshape(30, 2, 3), fit.covariance)
    assert calibration(x.reshape(30, 2, 3), shaped, tau=0.2) == calibration(x, fit, tau=0.2)
    narrow = Posterior(fit.mean.float(), fit.covariance.to(torch.float32))
    assert calibration(x.float(), narrow)["mahalanobis"] == pytest.approx(
        calibration(x, fit)["mahalanobis"], rel=1e-4
    )


def test_nan_in_the_data_gives_nan():
    x, fit = random_posterior(5, 4, 1)
    x[2, 1] = torch.nan
    figures = calibration(x, fit, tau=0.1)
    assert torch.tensor(list(figures.values())).isnan().all()


def _refused(x=None, tau=0.0, **parts):
    good, fit = random_posterior(3, 4, 1)
    mean = parts.get("mean", fit.mean)
    covariance = DPLR(parts.get("diag", fit.covariance.diag), fit.covariance.factor)
    return (mean if x == "mean" else good if x is None else x), Posterior(mean, covariance), tau


BOTH = (calibration, recalibration_factor)
LIKE = " like posterior.mean, got "


@pytest.mark.parametrize(
    ("functions", "case", "kind", "message"),
    [
        (BOTH, {"x": 3}, TypeError, "x0 must be a Tensor, got int"),
        (
            BOTH,
            {"x": torch.ones(3, 5).double()},
            ValueError,
            "x0 must have shape (3, 4)" + LIKE + "(3, 5)",
        ),
        (
            BOTH,
            {"x": torch.ones(3, 4)},
            ValueError,
            "x0 must have dtype torch.float64" + LIKE + "torch.float32",
        ),
        (
            BOTH,
            {"x": torch.ones(3, 4, device="meta").double()},
            ValueError,
            "x0 must be on cpu" + LIKE + "meta",
        ),
        (BOTH, {"tau": -0.1}, ValueError, "tau must be finite and >= 0, got -0.1"),
        (BOTH, {"tau": float("nan")}, ValueError, "tau must be finite and >= 0, got nan"),
        (BOTH, {"tau": "a"}, TypeError, "tau must be a number, got 'a'"),
        (BOTH, {"tau": True}, TypeError, "tau must be a number, got True"),
        (
            BOTH[1:],
            {"x": "mean"},
            ValueError,
            "x0 - posterior.mean must be finite and not all zero, got mean square 0.0",
        ),
        (
            BOTH[1:],
            {"diag": torch.tensor([1.0, -1.0, 1.0]).double()[:, None].expand(3, 4)},
            ValueError,
            "posterior.covariance must be positive definite, got 1 of 3 that are not",
        ),
    ],
)
def test_calibration_refuses(functions, case, kind, message):
    x, fit, tau = _refused(**case)
    for function in functions:
        with pytest.raises(kind) as error:
            function(x, fit, tau=tau)
        assert str(error.value) == f"{function.__name__}: {message}"


def test_recalibration_factor_refuses_what_no_factor_calibrates():
    fit = Posterior(torch.zeros(3, 4).double(), random_posterior(3, 4, 1)[1].covariance)
    x = torch.full_like(fit.mean, 2.0**-100)
    with pytest.raises(ValueError, match=r"^recalibration_factor") as error:
        recalibration_factor(x, fit, tau=0.1)
    assert str(error.value) == (
        "recalibration_factor: x0 must be calibrated by a factor in 1e-27 ... 1e27, got mean "
        f"square {2.0**-200} of x0 - posterior.mean"
    )


def test_tau_may_be_a_scalar_tensor():
    x, fit = random_posterior(3, 4, 1)
    assert calibration(x, fit, tau=torch.tensor(0.25)) == calibration(x, fit, tau=0.25)


def test_calibration_refuses_another_posterior():
    x, fit = random_posterior(3, 4, 1)
    with pytest.raises(TypeError) as error:
        calibration(x, (fit.mean, fit.covariance))
    assert str(error.value) == "calibration: posterior must be a Posterior, got tuple"


def test_calibration_refuses_an_empty_batch():
    fit = Posterior(torch.ones(0, 4), DPLR(torch.ones(0, 4)))
    with pytest.raises(ValueError, match=r"^calibration: x0 must have shape \(B, \*dims\), B >= 1"):
        calibration(torch.ones(0, 4), fit)


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_calibration_takes_a_posterior_that_carries_a_graph(tau):
    x, fit = random_posterior(3, 4, 1)
    c = fit.covariance
    graph = Posterior(
        fit.mean.clone().requires_grad_(),
        DPLR(c.diag.clone().requires_grad_(), c.factor.clone().requires_grad_(), c.sign),
    )
    for function in BOTH:  # torch's warning about a scalar that requires grad would be an error
        assert function(x, graph, tau=tau) == function(x, fit, tau=tau)


# -------------------------------------------------------------------------------------- the report


def as_dplr(covariance):
    """The same matrices (B, D, D), positive definite, as their least eigenvalue plus a factor."""
    values, vectors = torch.linalg.eigh(covariance)
    least = values[:, :1]
    return DPLR(least.expand_as(values), vectors * (values - least).clamp_min(0).sqrt()[:, None])


def gaussian_posterior(n=20_000, seed=0):
    """x of a correlated 4-d Gaussian and its exact posterior at noise level 0.5."""
    generator = torch.Generator().manual_seed(seed + 100)
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    law = Gaussian(torch.ones(4).double(), root @ root.mT)
    x = law.sample(n, seed=seed)
    noisy = 0.9 * x + 0.5 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    covariance = as_dplr(law.posterior_covariance(noisy[:1], 0.5, 0.9))
    each = DPLR(covariance.diag.expand(n, 4), covariance.factor.expand(n, 4, 4))
    return x, Posterior(law.posterior_mean(noisy, 0.5, 0.9), each)


def mixture_posterior(n=6000):
    """x of a mixture, and N(m, C) with its exact posterior moments, which is not its posterior."""
    means = torch.tensor([[-2.0, 0.0, 0.0], [1.5, 1.0, 0.0], [0.0, -1.0, 2.0]], dtype=torch.float64)
    scale = torch.tensor([0.1, 0.4, 1.0], dtype=torch.float64)
    covariances = torch.stack([torch.diag(scale), torch.diag(scale.flip(0)), torch.diag(scale)])
    law = GaussianMixture(torch.tensor([0.5, 0.3, 0.2]).double(), means, covariances)
    x = law.sample(n, seed=3)
    generator = torch.Generator().manual_seed(4)
    noisy = x + 0.8 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    covariance = as_dplr(law.posterior_covariance(noisy, 0.8))
    return x, Posterior(law.posterior_mean(noisy, 0.8), covariance)


def away(value, error):
    """Standard errors from 1."""
    return abs(value - 1) / error


AXES = torch.eye(4, dtype=torch.float64)


@pytest.mark.parametrize("tau", [0.0, 0.4])
def test_report_agrees_with_the_two_figures_and_with_dense_algebra(tau):
    sign = torch.tensor([1.0, -1.0, 1.0])
    x, fit = random_posterior(50, 6, 3, sign=sign)
    shaped = Posterior(fit.mean.reshape(50, 2, 3), fit.covariance)
    v = torch.randn(50, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    report = calibration_report(x.reshape(50, 2, 3), shaped, directions=v, tau=tau)
    figures = calibration(x, fit, tau=tau)
    assert report.mahalanobis == pytest.approx(figures["mahalanobis"], rel=1e-12)
    assert report.trace_ratio == pytest.approx(figures["trace_ratio"], rel=1e-12)
    assert report.recalibration == recalibration_factor(x, fit, tau=tau)
    assert (report.samples, report.size, report.tau) == (50, 6, tau)

    e, dense = x - fit.mean, fit.covariance.dense() + tau**2 * torch.eye(6).double()
    unit = v / v.norm(dim=1, keepdim=True)
    squares = torch.einsum("bi,bik->bk", e, unit).square() + tau**2
    ratio = squares / torch.einsum("bik,bij,bjk->bk", unit, dense, unit)
    torch.testing.assert_close(report.z_squared, ratio.mean(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(report.z_squared_error, ratio.std(0) / 50**0.5, rtol=1e-8, atol=0)
    inverse = torch.linalg.inv(dense)
    terms = torch.einsum("bi,bij,bj->b", e, inverse, e)
    terms = (terms + tau**2 * inverse.diagonal(dim1=1, dim2=2).sum(1)) / 6
    assert report.mahalanobis_error == pytest.approx(float(terms.std()) / 50**0.5, rel=1e-8)

    shared = calibration_report(x, fit, directions=v[0], tau=tau)
    same = calibration_report(x, fit, directions=v[:1].expand(50, 6, 2), tau=tau)
    torch.testing.assert_close(shared.z_squared, same.z_squared, rtol=1e-12, atol=0)


def test_standard_error_of_the_trace_ratio_is_its_spread_over_repeats():
    x, fit = random_posterior(40_000, 4, 2)
    reports = []
    for rows in torch.arange(40_000).split(200):
        c = DPLR(fit.covariance.diag[rows], fit.covariance.factor[rows])
        reports.append(calibration_report(x[rows], Posterior(fit.mean[rows], c)))
    for name in ("trace_ratio", "mahalanobis"):
        spread = torch.tensor([getattr(r, name) for r in reports]).std()
        claimed = torch.tensor([getattr(r, f"{name}_error") for r in reports]).mean()
        assert float(claimed / spread) == pytest.approx(1, abs=0.25)  # 200 repeats: 5 sd of it


def test_errors_as_large_as_each_sample_expects_leave_no_standard_error():
    """The sizes of the covariances differ, and their ratio to the errors does not."""
    diag = torch.linspace(1, 5, 30).double().reshape(10, 3)
    report = calibration_report(diag.sqrt(), Posterior(torch.zeros_like(diag), DPLR(diag)))
    assert [report.trace_ratio, report.mahalanobis] == pytest.approx([1, 1])
    errors = [report.trace_ratio_error, report.mahalanobis_error]
    assert errors == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_exact_gaussian_posteriors_pass_every_line_of_the_report(tau):
    x, fit = gaussian_posterior()
    directions = torch.cat([AXES, fit.principal_components(4)[1][0]], 1)
    report = calibration_report(x, fit, directions=directions, tau=tau, levels=(0.1, 0.5, 0.9))
    assert away(report.mahalanobis, report.mahalanobis_error) < 5
    assert away(report.trace_ratio, report.trace_ratio_error) < 5
    assert away(report.recalibration, report.mahalanobis_error) < 10
    assert bool((away(report.z_squared, report.z_squared_error) < 5).all())
    for curve in (report.entries, report.ellipsoid):
        reach = (curve[:, 2] - curve[:, 1]) / 2 / 1.96
        assert bool(((curve[:, 0] - report.levels).abs() < 5 * reach).all())
        assert bool((reach < 0.004).all())


def test_exact_second_order_posteriors_of_a_mixture_pass_and_their_coverage_need_not():
    x, fit = mixture_posterior()
    report = calibration_report(x, fit, directions=torch.eye(3).double())
    assert away(report.mahalanobis, report.mahalanobis_error) < 5
    assert away(report.trace_ratio, report.trace_ratio_error) < 5
    assert bool((away(report.z_squared, report.z_squared_error) < 5).all())
    # Between modes the posterior has two humps and is no Gaussian: 0.99 is not reached.
    share, _, high = report.ellipsoid[-1].tolist()
    assert 0.97 < share < high < 0.985


@pytest.mark.parametrize("scale", [1.5, 0.67])
@pytest.mark.parametrize("case", [gaussian_posterior, mixture_posterior])
def test_a_mis_scaled_covariance_is_caught_everywhere(case, scale):
    x, fit = case(6000)
    size = x.shape[1]
    wrong = fit.recalibrated(scale)
    report = calibration_report(x, wrong, directions=torch.eye(size).double())
    assert away(report.mahalanobis, report.mahalanobis_error) > 5
    assert away(report.trace_ratio, report.trace_ratio_error) > 5
    assert bool((away(report.z_squared, report.z_squared_error) > 5).all())
    assert report.recalibration * scale == pytest.approx(1, abs=0.05)
    if case is gaussian_posterior:
        for curve in (report.entries, report.ellipsoid):
            outside = (report.levels < curve[:, 1]) | (report.levels > curve[:, 2])
            assert bool(outside.all())


def test_a_rotated_covariance_is_caught():
    x, fit = gaussian_posterior(6000)
    wrong = Posterior(fit.mean, DPLR(fit.covariance.diag, fit.covariance.factor.flip(1)))
    report = calibration_report(x, wrong, directions=AXES)
    assert away(report.trace_ratio, report.trace_ratio_error) < 5  # a rotation keeps the trace
    assert away(report.mahalanobis, report.mahalanobis_error) > 5
    assert float(away(report.z_squared, report.z_squared_error).max()) > 5


def test_one_wrong_eigendirection_is_caught_and_named():
    x, fit = gaussian_posterior(6000)
    values, vectors = fit.principal_components(4)
    values = values.clone()
    values[:, 1] *= 1.5
    wrong = Posterior(fit.mean, as_dplr(vectors * values.unsqueeze(1) @ vectors.mT))
    report = calibration_report(x, wrong, directions=vectors[0])
    distance = away(report.z_squared, report.z_squared_error)
    assert distance.argmax() == 1
    assert float(distance[1]) > 5
    assert bool((distance[[0, 2, 3]] < 5).all())


def test_a_models_own_top_directions_read_low_by_selection():
    """Unit truth; variances 2 or 2/3 at random, so that E[1 / v] = 1 along every fixed axis."""
    generator = torch.Generator().manual_seed(0)
    n, d = 3000, 12
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    coin = torch.rand(n, d, generator=generator, dtype=torch.float64) < 0.5
    covariance = DPLR(torch.where(coin, 2.0, 2 / 3).double())
    fit = Posterior(torch.zeros_like(x), covariance)
    own = fit.principal_components(1)[1]
    chosen = calibration_report(x, fit, directions=own)
    assert float(chosen.z_squared) < 0.6
    assert float(away(chosen.z_squared, chosen.z_squared_error)) > 5
    elsewhere = calibration_report(x, fit, directions=torch.eye(d).double())
    assert bool((away(elsewhere.z_squared, elsewhere.z_squared_error) < 5).all())


def test_ellipsoid_coverage_uses_the_chi_squared_law_up_to_large_sizes():
    from scipy.stats import chi2

    for size in (1, 3, 64, 20_000):
        levels = (0.01, 0.5, 0.95, 0.999)
        radius = torch.from_numpy(chi2.ppf(levels, size))
        x = torch.zeros(8, size).double()
        # A sample just inside and just outside each quantile.
        x[:, 0] = torch.cat([radius * (1 - 1e-6), radius * (1 + 1e-6)]).sqrt()
        fit = Posterior(torch.zeros_like(x), DPLR(torch.ones_like(x)))
        report = calibration_report(x, fit, levels=levels)
        expected = torch.arange(4).double().mul(2).add(1) / 8
        torch.testing.assert_close(report.ellipsoid[:, 0], expected)


def test_bands_are_wilsons_and_count_what_goes_together_once():
    n, d = 400, 16
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    many = torch.randn(n, d, generator=generator, dtype=torch.float64)
    unit = Posterior(torch.zeros(n, d).double(), DPLR(torch.ones(n, d).double()))
    widths = {}
    for name, x in {"one": one.expand(n, d), "many": many}.items():
        share, low, high = calibration_report(x, unit, levels=[0.8]).entries[0].tolist()
        widths[name] = high - low
        assert low < share < high
    # With all entries of a sample equal there are n trials.
    share = float((one.abs() < 1.2815515655446004).double().mean())
    z, m = 1.959963984540054, n
    wilson = 2 * z / (1 + z * z / m) * (share * (1 - share) / m + z * z / (4 * m * m)) ** 0.5
    assert widths["one"] == pytest.approx(wilson, rel=1e-5)
    assert widths["many"] == pytest.approx(wilson / d**0.5, rel=0.15)
    # All inside: the band still has a width, that of n samples.
    share, low, high = calibration_report(many / 1e3, unit, levels=[0.5]).entries[0].tolist()
    assert [share, high] == pytest.approx([1, 1])
    assert low == pytest.approx(1 / (1 + z * z / n), rel=1e-6)


def test_predictive_coverage_draws_its_noise_from_the_seed():
    x, fit = random_posterior(200, 5, 2)
    first, again, other = (calibration_report(x, fit, tau=0.5, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.entries, again.entries)
    assert not torch.equal(first.entries, other.entries)
    assert first.mahalanobis == other.mahalanobis


def test_report_prints_a_table():
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    fit = Posterior(torch.zeros_like(x), DPLR(torch.ones_like(x)))
    report = calibration_report(x, fit, directions=torch.eye(2).double(), levels=[0.5, 0.95])
    assert str(report).splitlines() == [
        "2 samples of 2 entries, tau 0",
        "Mahalanobis / D  2.500 +- 2.000",
        "trace ratio      2.500 +- 2.000",
        "recalibration    2.500",
        "direction 0      0.500 +- 0.500",
        "direction 1      4.500 +- 4.500",
        "coverage         entries                 ellipsoid",
        "0.5              0.500 (0.150 ... 0.850)  0.500 (0.095 ... 0.905)",
        "0.95             0.750 (0.301 ... 0.954)  0.500 (0.095 ... 0.905)",
    ]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"levels": []}, ValueError, "levels must be in (0, 1), at least one, got []"),
        ({"levels": (0.5, 1)}, ValueError, "levels must be in (0, 1), at least one, got (0.5, 1)"),
        ({"levels": [0.0]}, ValueError, "levels must be finite and > 0, got 0"),
        ({"levels": ["a"]}, TypeError, "levels must be a number, got 'a'"),
        (
            {"directions": torch.ones(5, 2).double()},
            ValueError,
            "directions must have shape (4, k) or (3, 4, k), got (5, 2)",
        ),
        (
            {"directions": torch.ones(4).double()},
            ValueError,
            "directions must have shape (4, k) or (3, 4, k), got (4,)",
        ),
        (
            {"directions": torch.zeros(4, 1).double()},
            ValueError,
            "directions must be finite and not zero, got one of length 0.0",
        ),
        (
            {"directions": torch.full((4, 1), torch.nan).double()},
            ValueError,
            "directions must be finite and not zero, got one of length nan",
        ),
        (
            {"directions": torch.ones(4, 2)},
            ValueError,
            "directions must have dtype torch.float64, got torch.float32",
        ),
        ({"directions": [1.0]}, TypeError, "directions must be a Tensor, got list"),
        ({"tau": -1.0}, ValueError, "tau must be finite and >= 0, got -1"),
    ],
)
def test_report_refuses(options, kind, message):
    x, fit = random_posterior(3, 4, 1)
    with pytest.raises(kind) as error:
        calibration_report(x, fit, **options)
    assert str(error.value) == f"calibration_report: {message}"


def test_report_refuses_one_sample_and_negative_variances():
    x, fit = random_posterior(3, 4, 1)
    one = Posterior(fit.mean[:1], DPLR(fit.covariance.diag[:1], fit.covariance.factor[:1]))
    with pytest.raises(ValueError, match=r"^calibration_report: x0 must have at least 2 samples"):
        calibration_report(x[:1], one)
    wrong = Posterior(fit.mean, DPLR(-fit.covariance.diag, fit.covariance.factor))
    with pytest.raises(ValueError, match=r"positive definite, got 3 of 3 that are not$"):
        calibration_report(x, wrong)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (4.0, 0.3), (0.2, 5.0)])
def test_two_factors_make_both_figures_one_and_are_those_of_the_shape(a, b):
    size, n = 5, 50
    diag = torch.linspace(0.5, 2, size, dtype=F64).expand(n, size)
    factor = normal((1, size, 2), seed=1, dtype=F64).expand(n, size, 2).contiguous()
    truth = DPLR(a * diag, math.sqrt(b) * factor)
    white = torch.linalg.qr(normal((n, size), seed=2, dtype=F64))[0] * math.sqrt(n)
    x0 = white @ torch.linalg.cholesky(truth.dense()[0]).mT  # second moments as claimed, exactly
    claimed = Posterior(torch.zeros_like(x0), DPLR(diag, factor))
    found = recalibration_factors(x0, claimed)
    assert found == pytest.approx((a, b), rel=1e-6)
    figures = calibration(x0, claimed.recalibrated(*found))
    assert figures == pytest.approx({"mahalanobis": 1.0, "trace_ratio": 1.0}, rel=1e-6)


def test_what_two_factors_cannot_mend_is_refused():
    x0 = normal((50, 4), seed=0, dtype=F64)
    diag, factor = torch.ones(50, 4, dtype=F64), normal((50, 4, 1), seed=1, dtype=F64)

    def refused(diag, factor, sign, message):
        law = Posterior(torch.zeros_like(x0), DPLR(diag, factor, sign))
        with pytest.raises(ValueError, match=f"^recalibration_factors: .*{message}"):
            recalibration_factors(x0, law)

    refused(diag, None, None, "must have a low-rank part, got rank 0")
    refused(40 * diag, 0.1 * factor, -torch.ones(1, dtype=F64), r"signs of \+1")
    few = 0.001 * normal((50, 4), seed=2, dtype=F64)
    x0 = few + factor[..., 0]  # along the column alone: the diagonal may be as small as it likes
    wide = torch.linalg.qr(normal((50, 4, 4), seed=3, dtype=F64))[0]
    refused(diag, 3 * wide, None, "must be calibrated by two positive factors")


def test_factors_that_come_near_alone_say_so():
    x0 = normal((50, 4), seed=0, dtype=F64)
    sizes = torch.tensor([9.0, 0.1, 0.1, 0.1], dtype=F64).expand(50, 4)
    law = Posterior(torch.zeros_like(x0), DPLR(sizes, 0.01 * torch.ones(50, 4, 1, dtype=F64)))
    with pytest.warns(UserWarning, match=r"^recalibration_factors: no two factors") as said:
        factors = recalibration_factors(x0, law)
    figures = calibration(x0, law.recalibrated(*factors))
    assert figures["trace_ratio"] == pytest.approx(1, rel=1e-6)
    assert f"{figures['mahalanobis']:.3f} at least" in str(said[0].message)
    for near in (0.98, 1.02):  # the other keeps the trace
        moved = law.recalibrated(near * factors[0], factors[1])
        a = near * factors[0]
        b = factors[1] + (factors[0] - a) * float(sizes.sum(1).mean()) / 4e-4
        if b > 0:
            moved = law.recalibrated(a, b)
            assert calibration(x0, moved)["mahalanobis"] >= figures["mahalanobis"]


def test_the_two_parts_of_a_posterior_are_scaled_apart():
    law = Posterior(torch.zeros(3, 4), DPLR(torch.ones(3, 4), torch.ones(3, 4, 1)))
    scaled = law.recalibrated(2.0, torch.tensor([1.0, 4.0, 9.0]))
    assert torch.equal(scaled.covariance.diag, torch.full((3, 4), 2.0))
    assert torch.equal(scaled.covariance.factor[:, 0, 0], torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match=r"^Posterior.recalibrated: factor_scale must be"):
        law.recalibrated(2.0, -1.0)
