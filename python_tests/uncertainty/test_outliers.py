"""Outlier scores: their laws on Gaussians and mixtures, and how well they tell outliers apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hos_ext.densities.gaussian import Gaussian, GaussianMixture
from hos_ext.scores import Scores, UnscaledScores
from hos_ext.uncertainty.outliers import auroc, outlier_score

F64 = torch.float64
KINDS = ("laplacian", "mahalanobis", "uncertainty", "norm")


def exact_scores(law: Gaussian | GaussianMixture, x: Tensor, sigma: float) -> Scores:
    """What a network would learn: kappa as its least eigenvalue and a factor."""
    kappa = torch.eye(law.dim, dtype=x.dtype) + sigma**2 * law.hessian(x)
    values, vectors = torch.linalg.eigh(kappa)
    least = values[:, :1]
    factor = vectors * (values - least).clamp_min(0).sqrt().unsqueeze(1)
    return Scores(sigma * law.score(x), least.expand_as(x), factor)


def gaussian(d: int = 5) -> Gaussian:
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(d, d, generator=generator, dtype=F64)
    return Gaussian(torch.ones(d, dtype=F64), 0.2 * torch.eye(d, dtype=F64) + root @ root.mT / d)


def mixture(d: int = 10, parts: int = 4) -> GaussianMixture:
    """Modes about 8 apart, each stretched: standard deviations from 0.3 to 1.5."""
    generator = torch.Generator().manual_seed(3)
    means = 2 * torch.randn(parts, d, generator=generator, dtype=F64)
    root = torch.randn(parts, d, d, generator=generator, dtype=F64) / d**0.5
    covariances = 0.1 * torch.eye(d, dtype=F64) + root @ root.mT
    return GaussianMixture(torch.full((parts,), 1 / parts, dtype=F64), means, covariances)


def within(terms: Tensor, mean: float, errors: float = 5.0) -> bool:
    return bool(abs(terms.mean() - mean) < errors * terms.std() / len(terms) ** 0.5)


# ---------------------------------------------------------------------------------- known laws


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_mahalanobis_is_chi_squared_on_a_gaussian(sigma: float) -> None:
    law, n = gaussian().noisy(sigma), 40_000
    x = law.sample(n, seed=1)
    got = outlier_score(exact_scores(law, x, sigma), kind="mahalanobis", floor=1e-3)
    centred = x - law.mean
    want = (centred * torch.linalg.solve(law.covariance, centred.mT).mT).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    assert within(got, 5)
    assert within((got - 5).square(), 2 * 5)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_laplacian_has_mean_zero_and_the_stated_variance_on_a_gaussian(sigma: float) -> None:
    law = gaussian().noisy(sigma)
    got = outlier_score(exact_scores(law, law.sample(40_000, seed=1), sigma))
    precision = torch.linalg.inv(law.covariance)
    assert within(got, 0)
    assert within(got.square(), float(2 * sigma**4 * precision.square().sum()))


@pytest.mark.parametrize("sigma", [0.2, 0.6, 2.0])
def test_laplacian_has_mean_zero_on_a_mixture_and_the_norm_has_not(sigma: float) -> None:
    law = mixture(3).noisy(sigma)
    scores = exact_scores(law, law.sample(20_000, seed=1), sigma)
    laplacian, norm = outlier_score(scores), outlier_score(scores, kind="norm")
    assert within(laplacian, 0)
    assert not within(norm, 0, 20)
    spread = outlier_score(scores, kind="uncertainty")
    torch.testing.assert_close(laplacian, norm + spread - 3)


def test_laplacian_is_the_rate_of_the_log_density_in_log_sigma() -> None:
    clean, sigma, step = mixture(3), 0.7, 1e-4
    x = clean.noisy(sigma).sample(50, seed=1)
    up, down = (clean.noisy(sigma * (1 + s)).log_prob(x) for s in (step, -step))
    got = outlier_score(exact_scores(clean.noisy(sigma), x, sigma))
    torch.testing.assert_close(got, (up - down) / (2 * step), rtol=1e-5, atol=1e-6)


def test_uncertainty_is_the_trace_of_the_posterior_covariance() -> None:
    clean, sigma, alpha = mixture(3), 0.7, 0.8
    noisy = clean.noisy(sigma, alpha)
    x = noisy.sample(20, seed=1)
    trace = clean.posterior_covariance(x, sigma, alpha).diagonal(dim1=1, dim2=2).sum(1)
    got = outlier_score(exact_scores(noisy, x, sigma), kind="uncertainty")
    torch.testing.assert_close(got, alpha**2 * trace / sigma**2)


@pytest.mark.parametrize("floor", [0.01, 0.3, 1.0])
def test_mahalanobis_with_its_floor_is_the_dense_one(floor: float) -> None:
    """By the congruence of the docstring, with signs, and c on both sides of 1."""
    generator = torch.Generator().manual_seed(0)
    score, c, factor = (
        torch.randn(*shape, generator=generator, dtype=F64)
        for shape in ((6, 2, 4), (6, 2, 4), (6, 8, 3))
    )
    sign = torch.tensor([1.0, -1.0, 1.0], dtype=F64)
    got = outlier_score(Scores(score, c, factor, sign), kind="mahalanobis", floor=floor)
    root = (1 - c.flatten(1)).clamp_min(floor).sqrt()
    scaled = factor / root.unsqueeze(-1)
    inner = torch.eye(8, dtype=F64) - scaled * sign @ scaled.mT
    values, vectors = torch.linalg.eigh(inner)
    kernel = vectors * values.clamp_min(floor).unsqueeze(1) @ vectors.mT
    kernel = root.unsqueeze(-1) * kernel * root.unsqueeze(-2)
    s = score.flatten(1)
    want = torch.einsum("bi,bij,bj->b", s, torch.linalg.inv(kernel), s)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sign", [None, torch.tensor([1.0, -1.0, 1.0], dtype=F64)])
def test_traces_count_signed_columns(sign: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    score, c, factor = (
        torch.randn(*shape, generator=generator, dtype=F64) for shape in ((6, 8), (6, 8), (6, 8, 3))
    )
    weight = torch.ones(3, dtype=F64) if sign is None else sign
    kappa = torch.diag_embed(c) + factor * weight @ factor.mT
    trace = kappa.diagonal(dim1=1, dim2=2).sum(1)
    scores = Scores(score, c, factor, sign)
    torch.testing.assert_close(outlier_score(scores, kind="uncertainty"), trace)
    torch.testing.assert_close(outlier_score(scores), score.square().sum(1) + trace - 8)


def test_scores_need_no_factor_and_no_samples() -> None:
    score, c = torch.tensor([[0.3, -0.4]]), torch.tensor([[0.5, 0.75]])
    values = [float(outlier_score(Scores(score, c), kind=kind)) for kind in KINDS]
    assert values == pytest.approx([0.25 - 0.75, 0.09 / 0.5 + 0.16 / 0.25, 1.25, 0.25])
    for kind in KINDS:
        assert outlier_score(Scores(score[:0], c[:0]), kind=kind).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_is_nan_and_harms_no_other(kind: Any) -> None:
    law = gaussian()
    scores = exact_scores(law, law.sample(4, seed=1), 0.5)
    want = outlier_score(scores, kind=kind)
    for field, row in (("scaled_score", 0), ("c", 1), ("factor", 3)):
        broken = getattr(scores, field).clone(memory_format=torch.contiguous_format)
        broken[row].view(-1)[0] = torch.nan
        got = outlier_score(scores.replace(**{field: broken}), kind=kind)
        assert got.isnan().nonzero().flatten().tolist() == [row]
        kept = torch.arange(4) != row
        torch.testing.assert_close(got[kept], want[kept])


def test_float32_agrees_and_shapes_are_free() -> None:
    law = mixture(6)
    scores = exact_scores(law.noisy(0.5), law.sample(30, seed=1), 0.5)
    for kind in KINDS:
        want = outlier_score(scores, kind=kind)
        narrow = Scores(scores.scaled_score.float(), scores.c.float(), scores.factor.float())
        got = outlier_score(narrow, kind=kind)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=1e-4)
        shaped = Scores(
            scores.scaled_score.view(-1, 2, 3), scores.c.reshape(-1, 2, 3), scores.factor
        )
        assert torch.equal(outlier_score(shaped, kind=kind), want)


# --------------------------------------------------------------------------- telling them apart


def table(law: GaussianMixture, outside: Tensor, sigma: float) -> dict[str, float]:
    """AUROC of each score, and of the exact log density, against draws of law."""
    inside = law.sample(len(outside), seed=1)
    both = [exact_scores(law, x, sigma) for x in (inside, outside)]
    found = {k: auroc(*(outlier_score(s, kind=k) for s in both)) for k in KINDS}
    return found | {"density": auroc(-law.log_prob(inside), -law.log_prob(outside))}


def stretched(law: GaussianMixture, n: int, by: float) -> Tensor:
    """Draws of law with the distance from their own mode multiplied."""
    generator = torch.Generator().manual_seed(5)
    part = torch.randint(len(law.means), (n,), generator=generator)
    z = torch.randn(n, law.dim, 1, generator=generator, dtype=F64)
    root = torch.linalg.cholesky(law.covariances)
    return law.means[part] + by * (root[part] @ z).squeeze(-1)


def between(law: GaussianMixture, n: int) -> Tensor:
    """Draws about the middle of two modes."""
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randint(len(law.means), (n,), generator=generator) for _ in range(2))
    b = torch.where(a == b, (b + 1) % len(law.means), b)
    middle = (law.means[a] + law.means[b]) / 2
    return middle + 0.2 * torch.randn(n, law.dim, generator=generator, dtype=F64)


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_in_the_tails_of_modes_mahalanobis_beats_the_norm_and_matches_the_density(
    sigma: float,
) -> None:
    law = mixture().noisy(sigma)
    found = table(law, stretched(law, 3000, 1.5), sigma)
    assert found["mahalanobis"] > found["norm"] + 0.01
    assert found["mahalanobis"] == pytest.approx(found["density"], abs=0.02)
    assert found["laplacian"] == pytest.approx(found["norm"], abs=0.01)  # no gain there
    assert found["uncertainty"] < 0.6  # blind to tails


def test_between_modes_the_laplacian_beats_the_norm_where_the_noise_joins_them() -> None:
    clean = mixture(2, 5)
    found = {sigma: table(clean.noisy(sigma), between(clean, 3000), sigma) for sigma in (0.5, 1.0)}
    for row in found.values():
        assert row["laplacian"] > row["norm"] + 0.03


def test_no_score_sees_outliers_nearer_to_the_modes_than_the_data() -> None:
    """As the density itself: dense regions are not strange to any of them."""
    law = mixture().noisy(0.3)
    found = table(law, stretched(law, 3000, 0.5), 0.3)
    assert all(found[k] < 0.1 for k in ("laplacian", "mahalanobis", "norm", "density"))


# ------------------------------------------------------------------------------------------ auroc


def naive_auroc(inside: Tensor, outside: Tensor) -> float:
    pairs = [(b > a) + 0.5 * (b == a) for a in inside.tolist() for b in outside.tolist()]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_auroc_counts_pairs_and_half_of_ties(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inside = torch.randint(6, (40,), generator=generator).to(dtype)
    outside = torch.randint(3, 9, (23,), generator=generator).to(dtype)
    assert auroc(inside, outside) == pytest.approx(naive_auroc(inside, outside), rel=1e-12)
    assert auroc(outside, inside) == pytest.approx(1 - auroc(inside, outside))
    assert auroc(inside, inside) == pytest.approx(0.5)


def test_auroc_is_one_zero_or_a_half_at_the_extremes() -> None:
    low, high = torch.tensor([1.0, 2.0]), torch.tensor([3.0, torch.inf])
    assert (auroc(low, high), auroc(high, low)) == (1.0, 0.0)
    assert auroc(torch.ones(3), torch.ones(5)) == 0.5


ONE = torch.ones(2, 3)
SCORES = Scores(ONE, ONE, torch.ones(2, 3, 1))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: outlier_score(UnscaledScores(ONE, ONE)),
            TypeError,
            (
                "outlier_score: scores must be a Scores, got UnscaledScores (.score is s1, and "
                ".scaled(sigma) makes Scores)"
            ),
        ),
        (
            lambda: outlier_score(SCORES, kind="fisher"),
            ValueError,
            f"outlier_score: kind must be one of {str(KINDS)[1:-1]}, got 'fisher'",
        ),
        (
            lambda: outlier_score(SCORES, floor=0.0),
            ValueError,
            "outlier_score: floor must be finite and > 0, got 0",
        ),
        (
            lambda: outlier_score(SCORES, floor=1.5),
            ValueError,
            "outlier_score: floor must be in (0, 1], got 1.5",
        ),
        (
            lambda: outlier_score(SCORES, floor="a"),
            TypeError,
            "outlier_score: floor must be a number, got 'a'",
        ),
        (
            lambda: outlier_score(Scores(ONE[0], ONE[0])),
            ValueError,
            "outlier_score: scores.scaled_score must have shape (B, *dims), got (3,)",
        ),
        (
            lambda: outlier_score(Scores(ONE, ONE[:1])),
            ValueError,
            "outlier_score: scores.c must have shape (2, 3), got (1, 3)",
        ),
        (
            lambda: outlier_score(Scores(ONE, ONE, torch.ones(2, 4, 1))),
            ValueError,
            "outlier_score: factor must have shape (2, 3, r), got (2, 4, 1)",
        ),
        (
            lambda: auroc(ONE, ONE[0]),
            ValueError,
            "auroc: inside must have shape (n,), n >= 1, got (2, 3)",
        ),
        (
            lambda: auroc(ONE[0], ONE[0, :0]),
            ValueError,
            "auroc: outside must have shape (n,), n >= 1, got (0,)",
        ),
        (
            lambda: auroc(ONE[0], ONE[0].double()),
            ValueError,
            "auroc: outside must have dtype torch.float32, got torch.float64",
        ),
        (
            lambda: auroc(ONE[0], torch.tensor([1.0, torch.nan])),
            ValueError,
            "auroc: outside must not hold NaN, got 1 of 2",
        ),
        (lambda: auroc([1.0], ONE[0]), TypeError, "auroc: inside must be a Tensor, got list"),
    ],
)
def test_bad_input_is_refused_by_name(
    call: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message
