"""Denoising, recalibration, calibration, accuracy and chains, against code that does it at once."""

import json
import math
import re

import pytest
import torch
from torch import nn

from hos_ext import MLP, ops, sample
from hos_ext.app import data, evaluation
from hos_ext.app.evaluation import Denoised, denoise, denoise_held_out, evaluate, recalibrate
from hos_ext.densities import Gaussian
from hos_ext.sampling import RunawayWarning
from hos_ext.schedules import draw_sigma
from hos_ext.scores import Scores
from hos_ext.tweedie.posterior import posterior
from hos_ext.uncertainty import calibration, recalibration_factor


@pytest.fixture(scope="module")
def digits():
    return data.open_source("digits")


@pytest.fixture(scope="module")
def network():
    return _network((8, 8))


def _network(dims, rank=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MLP(dims, rank, width=16, depth=1, head_width=8, sigma_data=0.7, c_min=0.01)
        nn.init.normal_(model.score.weight, std=0.05)
        nn.init.normal_(model.c.weight, std=0.3)
    return model.eval()


def _source(dims, rows=40, truth=None, validation=9):
    """Standardised rows, known to be from no density but the one that is given."""
    values = 3 + 2 * ops.normal((rows + validation, *dims), seed=5, dtype=torch.float64)
    return data.Source(
        spec="toy",
        shape=dims,
        scaling=data.Scaling(mean=3.0, std=2.0),
        std=1.0,
        parts=None,
        validation=values[rows:],
        test=values[:rows],
        truth=truth,
        reader=None,
    )


def _gaussian(x, sigma):
    """Scaled scores of N(0, v I) data with v = 0.3: sigma s1 and c = v / (v + sigma^2)."""
    level = sigma.reshape(-1, *[1] * (x.dim() - 1)) if torch.is_tensor(sigma) else sigma
    total = 0.3 + level**2
    return Scores(-level * x / total, torch.ones_like(x) * 0.3 / total)


# ----------------------------------------------- what the digits gave before there were sources


def _noise(clean, seed, offset):
    return ops.normal(clean.shape, seed=seed, offset=offset, stream=34)


@torch.no_grad()
def _old_denoise(model, grey, sigma, seed):
    clean = data.dequantise(grey, seed=seed, offset=2)
    noisy = clean + sigma * _noise(clean, seed, 2)
    return Denoised(sigma, clean, noisy, posterior(noisy, model(noisy, sigma), sigma))


@torch.no_grad()
def _old_recalibrate(model, grey, sigma_range, seed):
    clean = data.dequantise(grey, seed=seed, offset=1)
    sigma = draw_sigma(len(clean), sigma_range, seed=seed, offset=1)
    unit = clean / sigma.view(-1, 1, 1)
    noise = _noise(clean, seed, 1)
    scores = model(clean + sigma.view(-1, 1, 1) * noise, sigma)
    return recalibration_factor(unit, posterior(unit + noise, scores, 1.0), tau=0.5)


@pytest.mark.parametrize("seed", [0, 3])
def test_digits_give_the_same_numbers_as_ever(digits, network, seed):
    grey = data.load_digits()
    result = denoise_held_out(network, digits, 0.4, seed=seed)
    expected = _old_denoise(network, grey.test, 0.4, seed)
    assert result.sigma == expected.sigma
    assert torch.equal(result.x0, expected.x0)
    assert torch.equal(result.x, expected.x)
    assert torch.equal(result.posterior.mean, expected.posterior.mean)
    assert torch.equal(result.posterior.covariance.dense(), expected.posterior.covariance.dense())
    found = recalibrate(network, digits, sigma_range=(0.1, 1.2), seed=seed)
    assert found == _old_recalibrate(network, grey.validation, (0.1, 1.2), seed)
    assert found != recalibrate(network, digits, sigma_range=(0.5, 1.2), seed=seed)


# ---------------------------------------------------------------------------------------- denoising


def test_denoise_held_out_adds_noise_of_the_level_and_gives_the_posterior(digits):
    result = denoise_held_out(_gaussian, digits, 0.5, seed=0)
    assert torch.equal(data.to_grey(result.x0), digits.test.float())
    noise = (result.x - result.x0) / 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(result.posterior.mean, result.x * 0.3 / 0.55)
    errors = evaluation.denoising_errors(result)
    assert errors["sigma"] == 0.5
    assert errors["mse_noisy"] == pytest.approx(0.25, rel=0.03)
    expected = (result.x0 - result.x * 0.3 / 0.55).square().mean().item()
    assert errors["mse_denoised"] == pytest.approx(expected)


@pytest.mark.parametrize("dims", [(8,), (2, 8), (5, 4), (3, 4, 5)])
def test_denoise_takes_samples_of_any_dims_in_chunks(dims, monkeypatch):
    model, source = _network(dims), _source(dims)
    whole = denoise_held_out(model, source, 0.3, count=23, seed=1, recalibration=1.7)
    seen = []

    def watched(x, sigma):
        seen.append(len(x))
        return model(x, sigma)

    monkeypatch.setattr(evaluation.rows, "ROWS", 10)
    result = denoise_held_out(watched, source, 0.3, count=23, seed=1, recalibration=1.7)
    assert seen == [10, 10, 3]
    assert torch.equal(result.x, whole.x)
    torch.testing.assert_close(result.posterior.mean, whole.posterior.mean)
    dense = result.posterior.covariance.dense()
    torch.testing.assert_close(dense, whole.posterior.covariance.dense())
    torch.testing.assert_close(dense, 1.7 * posterior_of(model, result).covariance.dense())
    alone = denoise(model, result.x, 0.3)
    assert alone.x0 is None
    assert torch.equal(alone.posterior.mean, result.posterior.mean)


@torch.no_grad()
def posterior_of(model, result):
    return posterior(result.x, model(result.x, result.sigma), result.sigma)


def test_denoise_bounds_the_entries_of_a_chunk(monkeypatch):
    monkeypatch.setattr(evaluation.rows, "ENTRIES", 100)
    seen = []

    def watched(x, sigma):
        seen.append(len(x))
        return _gaussian(x, sigma)

    denoise(watched, torch.zeros(7, 3, 3, 4), 0.5)
    assert seen == [2, 2, 2, 1]
    seen.clear()
    x = torch.arange(600.0).reshape(2, 300)
    found = denoise(watched, x, 0.5).posterior
    assert seen == [1, 1]
    torch.testing.assert_close(found.mean, x * 0.3 / 0.55)
    assert found.std.shape == x.shape


def test_rows_keep_their_noise_whatever_the_count_and_each_part_has_its_own():
    source = _source((6,), validation=40)
    few = denoise_held_out(_gaussian, source, 0.5, count=3, seed=2)
    many = denoise_held_out(_gaussian, source, 0.5, seed=2)
    assert len(many.x0) == 40
    assert torch.equal(few.x, many.x[:3])
    assert torch.equal(few.x0, ((source.test[:3] - 3) / 2).float())
    other = denoise_held_out(_gaussian, source, 0.5, seed=2, part="validation")
    assert torch.equal(other.x0, ((source.validation - 3) / 2).float())
    gap = (other.x - other.x0) - (many.x - many.x0)
    assert gap.square().mean().item() == pytest.approx(0.5, rel=0.25)


def test_recalibrate_pools_the_noise_levels_in_units_of_sigma(digits, monkeypatch):
    c = torch.linspace(0.1, 2.0, 8).expand(8, 8)

    def sure_of_white(x, sigma):
        """Posterior mean 0 and covariance sigma^2 diag(c) whatever x is."""
        return Scores(-x / sigma.view(-1, 1, 1), c.expand_as(x))

    for rows, limit in ((180, 256), (30, 30)):
        factor = recalibrate(sure_of_white, digits, sigma_range=(0.5, 1.0), seed=2, limit=limit)
        clean = data.dequantise(digits.validation[:rows].float(), seed=2, offset=1)
        sigma = draw_sigma(rows, (0.5, 1.0), seed=2, offset=1)
        residual = clean / sigma.view(-1, 1, 1)
        predictive = ((residual.square() + 0.25) / (factor * c + 0.25)).mean()
        assert predictive.item() == pytest.approx(1, rel=1e-4)
    monkeypatch.setattr(evaluation.rows, "ROWS", 7)
    chunked = recalibrate(sure_of_white, digits, sigma_range=(0.5, 1.0), seed=2, limit=30)
    assert chunked == pytest.approx(factor, rel=1e-5)


# ------------------------------------------------------------------------------------------ figures


def test_calibration_figures_agree_with_dense_algebra(digits, network):
    result = denoise_held_out(network, digits, 0.4, count=20, seed=0)
    figures = evaluation.calibration_figures(result, 1.7)
    error = (result.x0 - result.posterior.mean).flatten(1).double()
    dense = result.posterior.covariance.dense().double()
    eye = torch.eye(64, dtype=torch.float64)

    def mahalanobis(scale, tau):
        inverse = torch.linalg.inv(scale * dense + tau**2 * eye)
        expected = error.unsqueeze(2) * error.unsqueeze(1) + tau**2 * eye
        return (inverse * expected).sum((1, 2)).mean().item() / 64

    assert figures["mahalanobis"] == pytest.approx(mahalanobis(1.0, 0.0), rel=1e-4)
    assert figures["predictive"] == pytest.approx(mahalanobis(1.0, 0.2), rel=1e-4)
    assert figures["predictive_recalibrated"] == pytest.approx(mahalanobis(1.7, 0.2), rel=1e-4)
    trace = dense.diagonal(0, 1, 2).sum(1).mean()
    expected = (error.square().sum(1).mean() / trace).item()
    assert figures["trace_ratio"] == pytest.approx(expected, rel=1e-4)
    assert figures["mahalanobis_recalibrated"] == pytest.approx(mahalanobis(1.7, 0.0), rel=1e-4)
    assert figures["trace_ratio_recalibrated"] == pytest.approx(expected / 1.7, rel=1e-4)
    assert (figures["sigma"], figures["n"]) == (0.4, 20)


@pytest.mark.parametrize("rows", [512, 16])
def test_evaluate_gives_the_figures_of_all_rows_at_once(rows, monkeypatch):
    dims = (3, 2, 2)
    model, source = _network(dims), _source(dims)
    monkeypatch.setattr(evaluation.rows, "ROWS", rows)
    monkeypatch.setattr(evaluation.figures, "_SPECTRA", 20)
    report = evaluate(model, source, [0.2, 0.6], recalibration=1.3, seed=4, limit=37)
    assert {name: report[name] for name in ("source", "part", "dims", "n", "seed")} == {
        "source": "toy",
        "part": "test",
        "dims": [3, 2, 2],
        "n": 37,
        "seed": 4,
    }
    assert report["recalibration"] == 1.3
    assert report["accuracy"] is None
    monkeypatch.undo()
    for sigma, level in zip((0.2, 0.6), report["levels"], strict=True):
        result = denoise_held_out(model, source, sigma, count=37, seed=4)
        expected = evaluation.denoising_errors(result)
        expected |= evaluation.calibration_figures(result, 1.3)
        trace = result.posterior.covariance.trace()
        expected["variance"] = trace.mean().item() / 12
        for name, value in expected.items():
            assert level[name] == pytest.approx(value, rel=1e-5), name
        scaled = result.posterior.recalibrated(1.3)
        for key, law in (("raw", result.posterior), ("recalibrated", scaled)):
            for nominal, share in zip(
                level["coverage"]["levels"], level["coverage"][key], strict=True
            ):
                low, high = law.credible_interval(nominal)
                inside = ((low <= result.x0) & (result.x0 <= high)).double().mean()
                assert share == pytest.approx(inside.item(), abs=2e-3)
        error = (result.x0 - result.posterior.mean)[:20].flatten(1)
        values, vectors = torch.linalg.eigh(result.posterior.covariance.dense()[:20])
        along = (vectors.mT @ error.unsqueeze(2)).squeeze(2).square().sum(0).flip(0)[:4]
        components = level["components"]
        assert components["n"] == 20
        assert components["share"] == pytest.approx(
            (along / error.square().sum()).tolist(), rel=1e-3
        )
        shares = values.sum(0).flip(0)[:4] / trace[:20].sum()
        assert components["expected"] == pytest.approx(shares.tolist(), rel=1e-4)


def test_evaluate_dequantises_every_row_alike_in_any_chunk(digits, monkeypatch):
    monkeypatch.setattr(evaluation.figures, "_SPECTRA", 2)
    whole = evaluate(_gaussian, digits, [0.2], seed=4, limit=40)["levels"][0]
    monkeypatch.setattr(evaluation.rows, "ROWS", 16)
    level = evaluate(_gaussian, digits, [0.2], seed=4, limit=40)["levels"][0]
    for name in ("mse_noisy", "mse_denoised", "mahalanobis", "predictive", "trace_ratio"):
        assert level[name] == pytest.approx(whole[name], rel=1e-6)
    for key in ("share", "expected"):
        assert level["components"][key] == pytest.approx(whole["components"][key], rel=1e-5)


def test_evaluate_reads_the_part_that_is_asked_for():
    source = _source((5,))
    report = evaluate(_gaussian, source, [0.5], seed=0, part="validation")
    assert (report["part"], report["n"]) == ("validation", 9)
    result = denoise_held_out(_gaussian, source, 0.5, part="validation", seed=0)
    level = report["levels"][0]
    assert level["mse_denoised"] == pytest.approx(
        evaluation.denoising_errors(result)["mse_denoised"]
    )
    assert level["mahalanobis"] == pytest.approx(
        calibration(result.x0, result.posterior)["mahalanobis"]
    )


def test_evaluate_is_json_even_of_a_model_without_numbers():
    def broken(x, sigma):
        return Scores(torch.full_like(x, math.nan), torch.full_like(x, math.inf))

    report = evaluate(broken, _source((5,)), [0.5], seed=0)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    level = report["levels"][0]
    assert level["mse_denoised"] is None
    assert level["variance"] is None
    assert level["components"]["share"] == [None] * 4
    assert level["mse_noisy"] == pytest.approx(0.25, rel=0.3)
    assert level["coverage"]["raw"] == [0.0] * len(level["coverage"]["levels"])


def test_a_negative_variance_covers_nothing():
    def overconfident(x, sigma):
        scores = _gaussian(x, sigma)
        return scores.replace(c=scores.c * torch.tensor([1.0, 1.0, 1.0, -1.0]))

    level = evaluate(overconfident, _source((4,), rows=200), [0.5], seed=0)["levels"][0]
    assert max(level["coverage"]["raw"]) <= 0.75
    assert level["coverage"]["raw"][-1] > 0.6


def test_plain_json_has_none_for_numbers_that_json_lacks():
    given = {"a": [math.nan, 1.0, (math.inf, "x")], "b": None, "c": 2, "d": {"e": -math.inf}}
    assert evaluation.plain_json(given) == {
        "a": [None, 1.0, [None, "x"]],
        "b": None,
        "c": 2,
        "d": {"e": None},
    }


# ----------------------------------------------------------------------------------------- accuracy


class _Exact(nn.Module):
    """The scores of N(mean, covariance) + noise, wrong by a factor of s1 and a multiple of I."""

    def __init__(self, truth, dims, times=1.0, plus=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=truth.mean.dtype))
        self.truth, self.dims, self.times, self.plus = truth, dims, times, plus

    def forward(self, x, sigma):
        assert x.shape[1:] == self.dims
        law = self.truth.noisy(sigma)
        values, vectors = torch.linalg.eigh(law.hessian(x.flatten(1)))
        floor = values[:, :1]
        factor = sigma * vectors * (values - floor).clamp_min(0).sqrt().unsqueeze(1)
        c = (1 + sigma**2 * (floor + self.plus)).expand(len(x), x[0].numel())
        score = self.times * sigma * law.score(x.flatten(1))
        return Scores(score.reshape(x.shape), c.reshape(x.shape), factor)


def _truth(size=6):
    root = ops.normal((size, size), seed=8, dtype=torch.float64) / size**0.5
    return Gaussian(torch.ones(size, dtype=torch.float64), root @ root.mT + 0.2 * torch.eye(size))


@pytest.mark.parametrize("dims", [None, (6,), (1, 2, 3)])
def test_accuracy_of_the_exact_model_is_zero_to_rounding(dims):
    truth = _truth()
    model = _Exact(truth, dims or (6,))
    rows = evaluation.accuracy(model, truth, [0.3, 1.0], n=50, seed=0, dims=dims)
    assert [(row["sigma"], row["n"]) for row in rows] == [(0.3, 50), (1.0, 50)]
    for row in rows:
        for name in ("s1", "s2_diag", "s2", "mean", "covariance"):
            assert 0 <= row[f"{name}_mse"] < 1e-24
            assert 0 <= row[f"{name}_relative"] < 1e-24


@pytest.mark.parametrize("rows", [512, 7])
def test_accuracy_of_a_wrong_model_is_the_known_error(rows, monkeypatch):
    monkeypatch.setattr(evaluation.rows, "ROWS", rows)
    truth, sigma = _truth(), 0.5
    model = _Exact(truth, (6,), times=1.1, plus=0.3)
    (row,) = evaluation.accuracy(model, truth, [sigma], n=50, seed=1)
    assert row["s1_relative"] == pytest.approx(0.01)
    assert row["s2_diag_mse"] == pytest.approx(0.09)
    assert row["s2_mse"] == pytest.approx(0.09 / 6)
    assert row["mean_mse"] == pytest.approx(sigma**4 * row["s1_mse"])
    assert row["covariance_mse"] == pytest.approx(sigma**8 * 0.09 / 6)
    law = truth.noisy(sigma)
    hessian = law.hessian(torch.zeros(1, 6, dtype=torch.float64))[0]
    assert row["s2_relative"] == pytest.approx(0.09 / 6 / hessian.square().mean().item())
    diagonal = hessian.diagonal().square().mean().item()
    assert row["s2_diag_relative"] == pytest.approx(0.09 / diagonal)
    covariance = truth.posterior_covariance(torch.zeros(1, 6, dtype=torch.float64), sigma)
    expected = sigma**8 * 0.09 / 6 / covariance.square().mean().item()
    assert row["covariance_relative"] == pytest.approx(expected)
    # E |s1|^2 = tr of the precision
    precision = -hessian.diagonal().mean().item()
    many = evaluation.accuracy(model, truth, [sigma], n=4000, seed=1)[0]
    assert many["s1_mse"] == pytest.approx(0.01 * precision, rel=0.05)


def test_accuracy_leaves_out_whole_matrices_of_large_samples():
    truth = Gaussian(torch.zeros(513), torch.eye(513))
    (row,) = evaluation.accuracy(_gaussian, truth, [0.5], n=2, seed=0)
    assert row["s2_mse"] is None
    assert row["s2_relative"] is None
    assert row["covariance_mse"] is None
    assert row["s1_relative"] == pytest.approx((1.25 / 0.55 - 1) ** 2, rel=1e-3)
    assert row["s2_diag_relative"] == pytest.approx((1.25 / 0.55 - 1) ** 2, rel=1e-3)


def test_evaluate_has_the_accuracy_where_the_truth_is_known():
    truth = _truth()
    model = _network((2, 3))
    report = evaluate(model, _source((2, 3), truth=truth), [0.5], seed=3)
    assert report["accuracy"] == evaluation.accuracy(model, truth, [0.5], n=40, seed=3, dims=(2, 3))
    assert report["accuracy"][0]["s1_relative"] > 0.01


# ------------------------------------------------------------------------------------------- chains


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("langevin", {}),
        ("ozaki", {"curvature": "raw"}),
        ("ozaki_lanczos", {"chunk_size": 40}),
        ("mala", {}),
        ("mh_ozaki", {}),
    ],
)
def test_run_chains_samples_the_noisy_density(method, options):
    init = 0.5 * ops.normal((64, 2, 5), seed=1)
    draws, row = evaluation.run_chains(
        _gaussian,
        init,
        0.5,
        method=method,
        step_size=0.1,
        n_steps=60,
        burn_in=20,
        seed=0,
        **options,
    )
    assert draws.shape == (64, 60, 2, 5)
    # Langevin's own bias, math of `sample`: variance times 1 / (1 - h / (2 v)), v = 0.55.
    expected = 0.55 / (1 - 0.1 / 1.1) if method == "langevin" else 0.55
    assert draws.var().item() == pytest.approx(expected, rel=0.06)
    names = ["method", "step_size", "min_ess", "us_per_step"]
    assert list(row) == names + (["acceptance"] if method in ("mala", "mh_ozaki") else [])
    assert (row["method"], row["step_size"]) == (method, 0.1)
    assert 0 < row["min_ess"] < 64 * 60
    assert row["us_per_step"] > 0
    assert 0.8 < row.get("acceptance", 1.0) <= 1


def test_run_chains_thins_and_has_no_ess_of_too_few_draws():
    init = torch.zeros(3, 4)
    draws, row = evaluation.run_chains(
        _gaussian, init, 0.5, method="ozaki", step_size=0.1, n_steps=6, burn_in=0, thin=2, seed=0
    )
    assert draws.shape == (3, 3, 4)
    assert math.isnan(row["min_ess"])


def test_run_chains_warns_of_chains_that_diverge_and_has_no_figures_of_them():
    with pytest.warns(RunawayWarning, match=r"^sample: 4 of 4 chains hold NaN or infinities"):
        draws, row = evaluation.run_chains(
            _gaussian,
            torch.ones(4, 8, 8),
            0.5,
            method="langevin",
            step_size=50,
            n_steps=40,
            burn_in=0,
            seed=0,
            reference=torch.eye(64).reshape(64, 8, 8),
        )
    assert not draws.isfinite().all()
    assert all(math.isnan(row[name]) for name in ("min_ess", "spread", "energy_distance"))


def test_run_chains_compares_with_draws_of_the_density():
    init = 0.55**0.5 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    options = {"method": "ozaki", "step_size": 0.1, "n_steps": 60, "burn_in": 20, "seed": 0}
    _, row = evaluation.run_chains(_gaussian, init, 0.5, reference=init, **options)
    assert row["spread"] == pytest.approx(1, abs=0.06)
    assert abs(row["energy_distance"]) < 0.01
    _, row = evaluation.run_chains(_gaussian, init, 0.5, reference=3 * init, **options)
    assert row["spread"] == pytest.approx(1 / 3, abs=0.03)
    assert row["energy_distance"] > 0.05


# ------------------------------------------------------------------------------------------- errors


def _held(**more):
    return denoise_held_out(_gaussian, _source((5,)), **{"sigma": 0.5, "seed": 0} | more)


def _figures(**more):
    return evaluate(_gaussian, _source((5,)), **{"sigmas": [0.5], "seed": 0} | more)


def _recalibrate(sigma_range=(0.1, 1.0), validation=9, **more):
    source = _source((5,), validation=validation)
    return recalibrate(_gaussian, source, sigma_range=sigma_range, seed=0, **more)


def _accuracy(**more):
    return evaluation.accuracy(_gaussian, _truth(), **{"sigmas": [0.5], "seed": 0, "n": 4} | more)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: denoise(_gaussian, torch.zeros(5), 0.5),
            "denoise: x must have shape (B, *dims), got (5,)",
        ),
        (
            lambda: denoise(_gaussian, torch.zeros(2, 5), 0.0),
            "denoise: sigma must be finite and > 0, got 0",
        ),
        (
            lambda: denoise(_gaussian, torch.zeros(2, 5), 0.5, recalibration=-1.0),
            "denoise: recalibration must be finite and > 0, got -1",
        ),
        (
            lambda: _held(sigma=math.nan),
            "denoise_held_out: sigma must be finite and > 0, got nan",
        ),
        (
            lambda: _held(part="train"),
            "denoise_held_out: part must be one of 'test', 'validation', got 'train'",
        ),
        (lambda: _held(count=0), "denoise_held_out: count must be at least 1, got 0"),
        (
            lambda: _held(count=41),
            "denoise_held_out: count must be at most 40, the test rows, got 41",
        ),
        (
            lambda: _recalibrate((1.0, 0.5)),
            "recalibrate: sigma_range must be increasing, got (1.0, 0.5)",
        ),
        (
            lambda: _recalibrate((0.0, 0.5)),
            "recalibrate: sigma_range must be finite and > 0, got 0",
        ),
        (lambda: _recalibrate(limit=0), "recalibrate: limit must be at least 1, got 0"),
        (
            lambda: _recalibrate(validation=0),
            "recalibrate: source must have validation rows, got none in toy",
        ),
        (lambda: _figures(sigmas=[]), "evaluate: sigmas must hold at least one level, got none"),
        (lambda: _figures(sigmas=[-1.0]), "evaluate: sigmas must be finite and > 0, got -1"),
        (lambda: _figures(limit=0), "evaluate: limit must be at least 1, got 0"),
        (
            lambda: _figures(recalibration=0.0),
            "evaluate: recalibration must be finite and > 0, got 0",
        ),
        (
            lambda: _figures(part="all"),
            "evaluate: part must be one of 'test', 'validation', got 'all'",
        ),
        (lambda: _accuracy(n=0), "accuracy: n must be at least 1, got 0"),
        (lambda: _accuracy(sigmas=[]), "accuracy: sigmas must hold at least one level, got none"),
        (
            lambda: _accuracy(dims=(2, 2)),
            "accuracy: dims must have 6 entries like truth, got (2, 2)",
        ),
        (
            lambda: evaluation.denoising_errors(denoise(_gaussian, torch.zeros(2, 5), 0.5)),
            "denoising_errors: result must hold the clean samples, got None",
        ),
        (
            lambda: evaluation.calibration_figures(denoise(_gaussian, torch.zeros(2, 5), 0.5), 1.0),
            "calibration_figures: result must hold the clean samples, got None",
        ),
        (
            lambda: evaluation.run_chains(
                _gaussian,
                torch.zeros(2, 5),
                0.0,
                method="ozaki",
                step_size=0.1,
                n_steps=4,
                burn_in=0,
                seed=0,
            ),
            "run_chains: sigma must be finite and > 0, got 0",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_chains_beside_a_single_held_out_sample_raise_no_alarm():
    start = ops.normal((1, 3), seed=0)
    chains = sample(lambda x: -x, start.expand(4, 3), step_size=0.1, n_steps=50, seed=0)
    assert evaluation.chains_alarm(chains, start.expand(4, 3), start) == ""
