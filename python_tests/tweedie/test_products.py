"""Products of posteriors against dense float64 algebra, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from hos_ext import DPLR, Posterior
from hos_ext.tweedie import product_of_posteriors

F64 = torch.float64
B, D = 4, 6


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def law(rank: int, seed: int, diag: float = 0.05) -> Posterior:
    """A covariance well inside the identity."""
    d = diag * (0.2 + normal(B, D, seed=seed).abs())
    covariance = DPLR(d, 0.2 * normal(B, D, rank, seed=seed + 1) / math.sqrt(rank + 1))
    return Posterior(normal(B, D, seed=seed + 2), covariance)


def free(rank: int, scale: float = 1.0) -> Posterior:
    """The law of none."""
    d = scale * (1 + normal(B, D, seed=90).abs())
    return Posterior(normal(B, D, seed=91), DPLR(d, normal(B, D, rank, seed=92) * scale))


def dense_product(laws: list[Posterior], none: Posterior) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in its plain form, not the one of the library."""
    weights = [(each, 1.0) for each in laws] + [(none, 1.0 - len(laws))]
    precisions = [w * torch.linalg.inv(each.covariance.dense()) for each, w in weights]
    covariance = torch.linalg.inv(sum(precisions))
    pulls = [p @ each.mean.unsqueeze(-1) for p, (each, _) in zip(precisions, weights, strict=True)]
    return (covariance @ sum(pulls)).squeeze(-1), covariance


@pytest.mark.parametrize("widest", [1.0, 2.0, None])
@pytest.mark.parametrize(("n", "rank"), [(2, 0), (2, 1), (5, 1), (3, 2), (10, 3)])
@pytest.mark.parametrize("prior_rank", [0, 1, D])
def test_the_product_is_that_of_dense_gaussians(n, rank, prior_rank, widest):
    laws, none = [law(rank, 10 * j) for j in range(n)], free(prior_rank)
    found = product_of_posteriors(laws, none, widest=widest)
    mean, covariance = dense_product(laws, none)
    torch.testing.assert_close(found.mean, mean, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found.covariance.dense(), covariance, rtol=1e-9, atol=1e-12)
    assert found.covariance.rank <= max(D, 2 * (n * rank + 2 * prior_rank))
    assert bool(found.covariance.is_positive_definite().all())
    found.covariance.sample(1, seed=0)  # which needs a positive diagonal part


@pytest.mark.parametrize(("prior_rank", "digits"), [(0, 1e-10), (1, 1e-8)])
def test_entries_that_nothing_was_learned_of_keep_their_law(prior_rank, digits):
    """There C_j is C_0, and what is left of the precisions is zero: columns that cancel, too."""
    none = free(prior_rank)
    d, factor = none.covariance.diag.clone(), none.covariance.factor.clone()
    d[:, 0] = 0.1
    factor[:, 0] = 0
    clean = Posterior(none.mean, DPLR(none.covariance.diag, factor))
    laws = [Posterior(none.mean + 1.0 * (torch.arange(D) == 0), DPLR(d, factor))] * 3
    found, dense = product_of_posteriors(laws, clean), dense_product(laws, clean)
    torch.testing.assert_close(found.mean, dense[0], rtol=digits, atol=digits)
    torch.testing.assert_close(found.covariance.dense(), dense[1], rtol=digits, atol=digits)


def test_signs_of_a_posterior_are_taken():
    sign = torch.tensor([1.0, -1.0], dtype=F64)
    laws = []
    for j in range(2):
        plain = law(2, 10 * j, diag=1.0)
        d, factor = plain.covariance.diag + 0.3, 0.3 * plain.covariance.factor
        laws.append(Posterior(plain.mean, DPLR(d / 10, factor, sign)))
    found, dense = product_of_posteriors(laws, free(0)), dense_product(laws, free(0))
    torch.testing.assert_close(found.mean, dense[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.covariance.dense(), dense[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])  # none, fewer than D and more than D in all
@pytest.mark.parametrize("widest", [0.5, 1.0, 3.0])
def test_an_indefinite_product_is_cut_to_the_width_of_the_law_of_none(rank, widest):
    none = free(0, scale=0.3)
    wide = [Posterior(x.mean, x.covariance + 2.0) for x in (law(rank, 10 * j) for j in range(4))]
    covariance = dense_product(wide, none)[1]
    assert bool((torch.linalg.eigvalsh(covariance).amin(-1) < 0).all())  # there is no such law
    found = product_of_posteriors(wide, none, widest=widest)
    excess = widest * none.covariance.dense() - found.covariance.dense()
    assert bool((torch.linalg.eigvalsh(excess) > -1e-10).all())
    assert bool(found.covariance.is_positive_definite().all())
    with pytest.raises(ValueError, match=r"product must be positive definite \(widest=1.0 cuts it"):
        product_of_posteriors(wide, none, widest=None)


def test_only_what_is_too_wide_is_cut():
    """One entry passes the law of none, the others are as without it."""
    none = free(0, scale=1.0)
    narrow = [law(0, 10 * j) for j in range(3)]
    wide = []
    for each in narrow:
        d = each.covariance.diag.clone()
        d[:, 2] = 9 * none.covariance.diag[:, 2]
        wide.append(Posterior(each.mean, DPLR(d)))
    found, dense = product_of_posteriors(wide, none), dense_product(narrow, none)
    others = torch.arange(D) != 2
    torch.testing.assert_close(found.mean[:, others], dense[0][:, others])
    torch.testing.assert_close(
        found.covariance.diagonal()[:, 2], none.covariance.diag[:, 2], rtol=1e-9, atol=0
    )


def test_one_posterior_is_itself_and_shapes_stay():
    one = law(2, 0)
    assert product_of_posteriors([one], free(0)) is one
    shaped = [Posterior(p.mean.reshape(B, 2, 3).float(), p.covariance.to(torch.float32)) for p in
              (law(1, 0), law(1, 10))]  # fmt: skip
    none = free(0)
    base = Posterior(none.mean.reshape(B, 2, 3).float(), none.covariance.to(torch.float32))
    found = product_of_posteriors(shaped, base)
    assert found.mean.shape == (B, 2, 3)
    assert found.mean.dtype == found.covariance.dtype == torch.float32
    wide = product_of_posteriors([law(1, 0), law(1, 10)], none)
    torch.testing.assert_close(found.mean.double().flatten(1), wide.mean, rtol=1e-5, atol=1e-5)


def test_what_is_refused():
    one, none = law(1, 0), free(0)
    bad = Posterior(one.mean, DPLR(-one.covariance.diag))
    nan = Posterior(one.mean * math.nan, one.covariance)
    tracked = Posterior(one.mean.clone().requires_grad_(), one.covariance)
    short = Posterior(one.mean[:2], one.covariance[:2])
    for laws, options, error, text in (
        ([], {}, ValueError, "posteriors must hold at least one"),
        ([one, None], {}, TypeError, r"posteriors\[1\] must be a Posterior, got NoneType"),
        ([one, short], {}, ValueError, r"posteriors\[1\].mean must have shape"),
        ([one, bad], {}, ValueError, r"covariance of posteriors\[1\] must be positive definite"),
        ([nan, one], {}, ValueError, r"posteriors\[0\] must be finite"),
        ([one, one], {"widest": 0.0}, ValueError, "widest must be finite and > 0"),
        ([one, tracked], {}, RuntimeError, r"without derivatives \(torch.no_grad\)"),
    ):
        with pytest.raises(error, match=f"^product_of_posteriors: .*{text}"):
            product_of_posteriors(laws, none, **options)
