"""Regions of guaranteed coverage in `evaluate` and `denoise`, against code that does it at once."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from hos_ext import ops
from hos_ext.app import cli, data
from hos_ext.app.evaluation import denoise_held_out, evaluate, region_of
from hos_ext.scores import Scores
from hos_ext.uncertainty import conformal

F64 = torch.float64
VALIDATION, TEST = 199, 3000


def source(validation=VALIDATION):
    """Rows of N(0, 1), four entries each."""
    values = ops.normal((TEST + validation, 4), seed=5, dtype=F64)
    return data.Source(
        spec="toy",
        shape=(4,),
        scaling=data.Scaling(mean=0.0, std=1.0),
        std=1.0,
        parts=None,
        validation=values[TEST:],
        test=values[:TEST],
        truth=None,
        reader=None,
    )


def model(x, sigma, scale=0.25):
    """Exact means of these, with a quarter of the variance."""
    level = sigma.reshape(-1, 1) if torch.is_tensor(sigma) else sigma
    c = 1 / (1 + level**2)
    return Scores(-level * c * x, scale * c * torch.ones_like(x))


def figures(sigma=0.5, **options):
    found = evaluate(model, options.pop("source", source()), [sigma], seed=3, **options)
    return found["levels"][0]["conformal"]


@pytest.mark.parametrize("recalibration", [1.0, 3.0])
def test_evaluate_says_how_its_regions_do(recalibration):
    found = figures(recalibration=recalibration)
    assert (found["level"], found["least_share"], found["rows"]) == (0.9, 0.9, VALIDATION)
    for kind, gaussian in (("share", 1.6449), ("simultaneous", 2.2263)):
        whole = [
            denoise_held_out(model, source(), 0.5, part=p, seed=3) for p in ("validation", "test")
        ]
        region = conformal(whole[0].x0, whole[0].posterior, kind=kind)
        covered = region.covers(whole[1].x0, whole[1].posterior).double().mean()
        std = whole[1].posterior.std.double().mean()
        ratio = (whole[1].x0 - whole[1].posterior.mean).abs() / whole[1].posterior.std
        at_once = (ratio <= gaussian * math.sqrt(recalibration)).all(1).double().mean()
        expected = {
            "covered": float(covered),
            "half_width": float(region.radius * std),
            "covered_gaussian": float(at_once),  # 90 % of four entries are all four
            "half_width_gaussian": float(gaussian * math.sqrt(recalibration) * std),
        }
        assert found[kind] == pytest.approx(expected, rel=1e-4)
        assert 0.86 < found[kind]["covered"] < 0.94
    assert found["simultaneous"]["covered_gaussian"] < (0.35 if recalibration == 1 else 0.85)


def test_without_rows_or_variances_there_are_no_regions():
    assert figures(source=source(validation=8)) is None
    assert figures(part="validation") is None

    def negative(x, sigma):
        scores = model(x, sigma)
        return scores.replace(c=torch.where(x > -99, -scores.c, scores.c))

    found = evaluate(negative, source(), [0.5], seed=3)
    assert found["levels"][0]["conformal"] is None


def test_rows_with_a_negative_variance_are_held_by_nothing():
    seen = denoise_held_out(model, source(), 0.5, part="validation", seed=3).x.abs().max()

    def sometimes(x, sigma):
        scores = model(x, sigma)
        beyond = x.abs().amax(1, keepdim=True) > seen
        return scores.replace(c=torch.where(beyond, -scores.c, scores.c))

    whole, part = (denoise_held_out(m, source(), 0.5, seed=3) for m in (model, sometimes))
    good = (part.posterior.covariance.diagonal() > 0).all(1)
    assert 0 < int((~good).sum()) < TEST / 2
    found = evaluate(sometimes, source(), [0.5], seed=3)["levels"][0]["conformal"]["simultaneous"]
    fit = denoise_held_out(model, source(), 0.5, part="validation", seed=3)
    held = conformal(fit.x0, fit.posterior).covers(whole.x0, whole.posterior) & good
    assert found["covered"] == pytest.approx(float(held.double().mean()), rel=1e-6)
    assert found["half_width"] is None


def test_a_region_of_a_level_takes_enough_rows():
    region = region_of(model, source(), 0.5, level=0.9, kind="entry", seed=3)
    assert region.radius.shape == (4,)
    assert region.samples == VALIDATION
    assert region_of(model, source(), 0.5, level=0.5, kind="entry", seed=3, limit=20).samples == 20
    with pytest.raises(ValueError, match=r"at least 19 validation rows for level 0\.95, got"):
        region_of(model, source(18), 0.5, level=0.95, kind="entry", seed=3)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    words = ["--steps=5", "--width=16", "--head-width=8", "--depth=2", "--rank=2"]
    words += ["--batch-size=16", "--tracker=none", "--quiet"]
    assert cli.run(["train", "--out", str(folder), *words]) == 0
    return folder


def test_denoise_writes_intervals_that_are_guaranteed(run_folder, tmp_path):
    ask = ["denoise", str(run_folder), "--sigma=0.5"]
    place = ["--out", str(tmp_path / "a")]
    assert cli.run([*ask, "--count=20", "--interval=0.8", *place]) == 0
    found = np.load(tmp_path / "a" / "denoise.npz")
    inside = (found["low"] <= found["clean"]) & (found["clean"] <= found["high"])
    held = inside.reshape(20, -1).all(1).mean()
    text = " ".join((tmp_path / "a" / "denoise.md").read_text().split())
    assert "all entries of a sample at once with probability 0.8 at least" in text
    assert f"{held:.0%} were held" in text
    middle = (found["low"] + found["high"]) / 2
    assert np.allclose(middle, found["mean"], atol=1e-5)
    assert np.all(found["raw_low"] < found["raw_mean"])
    np.save(tmp_path / "noisy.npy", found["noisy"][:2])
    files = [str(tmp_path / "noisy.npy"), "--units=data"]
    place = ["--out", str(tmp_path / "b")]
    kind = ["--interval=0.8", "--data=digits"]
    assert cli.run([ask[0], ask[1], *files, ask[2], *kind, *place]) == 0
    again = np.load(tmp_path / "b" / "denoise.npz")
    assert np.allclose(again["low"], found["low"][:2], atol=1e-5)
    place = ["--out", str(tmp_path / "c")]
    assert cli.run([*ask, "--count=2", *place]) == 0
    assert "low" not in np.load(tmp_path / "c" / "denoise.npz")
    assert "Intervals" not in (tmp_path / "c" / "denoise.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--interval=1.5"], "--interval must be in (0, 1), got 1.5"),
        (["--interval=0.999"], "--interval 0.999 must have at least 999 validation rows, got 180"),
        (["--interval=0.9", "--interval-of=ellipsoid"], "--interval-of must be one of"),
    ],
)
def test_intervals_that_cannot_be_had_are_refused(run_folder, tmp_path, capsys, words, message):
    out = ["--out", str(tmp_path / "x")]
    assert cli.run(["denoise", str(run_folder), "--sigma=0.5", *words, *out]) == 2
    assert f"hos-ext: denoise: {message}" in capsys.readouterr().err
    assert not (tmp_path / "x" / "denoise.npz").exists()


def test_evaluate_prints_what_its_regions_held(run_folder, tmp_path, capsys):
    out = ["--sigma=0.5", "--out", str(tmp_path / "e")]
    assert cli.run(["evaluate", str(run_folder), *out]) == 0
    said = " ".join(capsys.readouterr().out.split())
    level = json.loads((tmp_path / "e" / "evaluate.json").read_text())["levels"][0]["conformal"]
    shown = f"{level['simultaneous']['covered']:.1%} of the samples"
    assert "sigma 0.5: conformal regions at 90% held all entries at once in " + shown in said
