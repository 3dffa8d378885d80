"""Conformal regions: their coverage over splits, an oracle by sorting, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hos_ext import DPLR, Posterior, normal
from hos_ext.uncertainty import Conformal, calibration_report, conformal
from hos_ext.uncertainty.conformal import KINDS

F64 = torch.float64


def wrong(n, dims=(3, 2), seed=0):
    """Skewed samples with errors of their own sizes, and posteriors that are wrong about them."""
    size = math.prod(dims)
    draw = normal((n, size), seed=seed, dtype=F64)
    x0 = draw + draw.square() * torch.linspace(0, 1, size, dtype=F64)
    diag = 0.2 + normal((n, size), seed=seed + 1, dtype=F64).square()
    factor = 0.5 * normal((n, size, 2), seed=seed + 2, dtype=F64)
    mean = 0.3 * normal((n, size), seed=seed + 3, dtype=F64)
    law = Posterior(mean.reshape(n, *dims), DPLR(diag, factor))
    return x0.reshape(n, *dims), law


def oracle(x0, law, level, kind, share):
    """Dense, and by sorting."""
    error = (x0 - law.mean).flatten(1).numpy()
    dense = law.covariance.dense().numpy()
    ratio = np.abs(error) / np.sqrt(np.stack([np.diag(each) for each in dense]))
    if kind == "ellipsoid":
        scores = np.array([e @ np.linalg.inv(c) @ e for e, c in zip(error, dense, strict=True)])
    elif kind == "share":
        scores = np.sort(ratio, 1)[:, math.ceil(share * ratio.shape[1]) - 1]
    else:
        scores = ratio.max(1) if kind == "simultaneous" else ratio
    ordered = np.sort(np.concatenate([scores, np.full((1, *scores.shape[1:]), np.inf)]), 0)
    return ordered[math.ceil(level * len(ordered)) - 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "level"), [(9, 0.9), (40, 0.75), (61, 0.5)])
def test_the_radius_is_the_order_statistic_of_the_scores(kind, n, level):
    x0, law = wrong(n)
    region = conformal(x0, law, level=level, kind=kind, share=0.5)
    expected = torch.from_numpy(np.asarray(oracle(x0, law, level, kind, 0.5)))
    expected = expected.reshape(region.radius.shape)
    assert torch.allclose(region.radius, expected, rtol=1e-12, atol=0)
    assert region.radius.shape == ((3, 2) if kind == "entry" else ())
    assert (region.samples, region.dims) == (n, (3, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_lies_between_its_bounds_over_splits(kind):
    """At n = 19 and level 0.8 the 16th of 20 places: 0.8 exactly, were each split infinite."""
    n, level, covered = 19, 0.8, []
    x0, law = wrong(2000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        order = torch.randperm(len(x0), generator=generator)
        fit, new = order[:n], order[n : n + 400]
        region = conformal(x0[fit], law[fit], level=level, kind=kind, share=0.7)
        covered.append(region.covers(x0[new], law[new]).double().mean())
    found = torch.stack(covered)
    error = float(found.std() / math.sqrt(len(found)))
    assert level - 3 * error < float(found.mean()) < level + 1 / (n + 1) + 3 * error
    # Conditional on the split it is Beta(k, n + 1 - k), of which that is the standard deviation.
    if kind != "entry":
        assert float(found.std()) == pytest.approx(math.sqrt(0.8 * 0.2 / (n + 2)), rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_on_all_covariances_cancels(kind):
    x0, law = wrong(30)
    one = conformal(x0, law, kind=kind)
    other = conformal(x0, law.recalibrated(7.0), kind=kind)
    new, its = wrong(50, seed=9)
    assert torch.equal(one.covers(new, its), other.covers(new, its.recalibrated(7.0)))
    if kind != "ellipsoid":
        for a, b in zip(one.interval(its), other.interval(its.recalibrated(7.0)), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_intervals_hold_what_is_covered():
    x0, law = wrong(80)
    for kind in ("entry", "share", "simultaneous"):
        region = conformal(x0[:30], law[:30], kind=kind, share=0.5)
        low, high = region.interval(law[30:])
        inside = (low <= x0[30:]) & (x0[30:] <= high)
        if kind == "share":
            inside = inside.flatten(1).double().mean(1) >= 0.5
        if kind == "simultaneous":
            inside = inside.flatten(1).all(1)
        assert torch.equal(inside, region.covers(x0[30:], law[30:]))


def test_the_gaussian_radius_is_found_where_the_posterior_is_right():
    """For N(0, 1) the 90 % point of |e| is 1.645, of max over 4 entries 2.23, of |e|^2 7.78."""
    x0 = normal((20_000, 4), seed=0, dtype=F64)
    law = Posterior(torch.zeros_like(x0), DPLR(torch.ones_like(x0)))
    for kind, expected in (("entry", 1.645), ("simultaneous", 2.226), ("ellipsoid", 7.779)):
        radius = conformal(x0, law, kind=kind).radius
        assert float((radius / expected - 1).abs().max()) < 0.03


def test_nan_is_outside():
    x0, law = wrong(30)
    region = conformal(x0, law)
    x0[3, 0, 0] = math.nan
    assert not region.covers(x0, law)[3]
    assert region.covers(x0, law).sum() > 20


def test_float32_and_a_region_that_moved():
    x0, law = wrong(30)
    region = conformal(x0.float(), law.to(torch.float32))
    assert region.radius.dtype == F64
    low, high = region.interval(law.to(torch.float32))
    assert low.dtype == high.dtype == torch.float32
    assert repr(region) == "Conformal(simultaneous, level 0.9, 30 samples of (3, 2))"
    assert isinstance(region.to(torch.float32), Conformal)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"level": 0.91}, ValueError, r"x0 must have at least 11 samples for level 0\.91, got 9"),
        ({"level": 1.0}, ValueError, r"level must be in \(0, 1\), got 1"),
        ({"level": 0}, ValueError, "level must be finite and > 0"),
        ({"level": "90%"}, TypeError, "level must be a number"),
        ({"kind": "pixel"}, ValueError, "kind must be one of"),
        ({"share": 1.1}, ValueError, r"share must be in \(0, 1\], got 1\.1"),
        ({"x0": torch.zeros(8, 3, 2, dtype=F64)}, ValueError, "x0 must have shape"),
        ({"x0": torch.full((9, 3, 2), math.nan, dtype=F64)}, ValueError, "must be finite, and"),
        ({"posterior": "C"}, TypeError, "posterior must be a Posterior"),
    ],
)
def test_what_gives_no_guarantee_is_refused(change, kind, message):
    x0, law = wrong(9)
    options = {"x0": x0, "posterior": law} | change
    with pytest.raises(kind, match=f"^conformal: .*{message}"):
        conformal(**options)


def test_covariances_without_a_size_are_refused():
    x0, law = wrong(9)
    flat = Posterior(law.mean, law.covariance + -5.0)
    with pytest.raises(ValueError, match=r"^conformal: .*positive variances, got . of 9 samples"):
        conformal(x0, flat)
    with pytest.raises(ValueError, match=r"^conformal: .*positive definite, got . of 9 that are"):
        conformal(x0, flat, kind="ellipsoid")
    region = conformal(x0, law, kind="ellipsoid")
    with pytest.raises(ValueError, match=r"^Conformal.interval: kind must have intervals"):
        region.interval(law)
    with pytest.raises(ValueError, match=r"^Conformal.covers: posterior must have dims \(3, 2\)"):
        region.covers(x0.flatten(1), Posterior(law.mean.flatten(1), law.covariance))


def test_the_report_says_what_regions_hold():
    x0, law = wrong(400)
    kinds = ("entry", "share", "simultaneous")
    regions = [conformal(x0[:99], law[:99], kind=kind, share=0.5) for kind in kinds]
    new, its = x0[99:], law[99:]
    report = calibration_report(new, its, regions=regions)
    assert report.held.shape == (3, 3)
    for region, (share, low, high) in zip(regions, report.held.tolist(), strict=True):
        assert share == pytest.approx(float(region.covers(new, its).double().mean()))
        assert low < share < high
        assert f"conformal {region.kind}, 0.9" in str(report)
    trials = len(new)  # of a whole sample: Wilson's band
    share, low, high = report.held[2].tolist()
    z = 1.959964
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    assert (low + high) / 2 == pytest.approx(centre, rel=1e-3)
    assert calibration_report(new, its).held.shape == (0, 3)
    with pytest.raises(TypeError, match=r"^calibration_report: regions must be a Conformal"):
        calibration_report(new, its, regions=["entry"])
    with pytest.raises(TypeError, match=r"regions must be a list of Conformal, got"):
        calibration_report(new, its, regions=regions[0])
