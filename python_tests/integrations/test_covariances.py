"""Matrices and laws go to other libraries and come back, as their dense forms say."""

import pytest
import torch
from torch import distributions as td

from hos_ext import DPLR, Posterior
from hos_ext.densities import Gaussian, GaussianMixture
from hos_ext.integrations import (
    from_azula,
    from_distribution,
    from_linear_operator,
    to_azula,
    to_distribution,
    to_linear_operator,
)

F64 = torch.float64


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def matrix(batch=3, rank=2, sign=None):
    signs = None if sign is None else torch.tensor(sign, dtype=F64)
    return DPLR(values(batch, 6).square() + 1, values(batch, 6, rank, seed=1) / 4, signs)


def spd(*batch, size=4):
    root = values(*batch, size, size, seed=3)
    return root @ root.mT + torch.eye(size, dtype=F64)


# ------------------------------------------------------------------------------- linear_operator


@pytest.mark.parametrize("sign", [None, [1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
def test_a_linear_operator_is_the_dense_matrix(sign):
    linear = pytest.importorskip("linear_operator.operators")
    ours = matrix(sign=sign)
    theirs, dense, b = to_linear_operator(ours), ours.dense(), values(3, 6, 2, seed=2)
    torch.testing.assert_close(theirs.to_dense(), dense)
    torch.testing.assert_close(theirs @ b, dense @ b)
    torch.testing.assert_close(theirs.solve(b), torch.linalg.solve(dense, b))
    torch.testing.assert_close(theirs.logdet(), torch.logdet(dense))
    if sign is None or min(sign) > 0:
        assert isinstance(theirs, linear.LowRankRootAddedDiagLinearOperator)
        back = from_linear_operator(theirs)
        assert torch.equal(back.diag, ours.diag)
        assert torch.equal(back.factor, ours.factor)
    else:
        with pytest.raises(TypeError, match=r"^from_linear_operator: operator must be a diagonal "):
            from_linear_operator(theirs)


def test_other_diagonals_and_roots_come_too():
    linear = pytest.importorskip("linear_operator.operators")
    bare = DPLR(matrix().diag)
    assert torch.equal(from_linear_operator(to_linear_operator(bare)).dense(), bare.dense())
    root, one = linear.LowRankRootLinearOperator(values(6, 2)), torch.ones(1, dtype=F64)
    for theirs in (
        root,
        root.add_diagonal(values(6, seed=4).square()),
        root.add_diagonal(one.squeeze(0)),
        linear.ConstantDiagLinearOperator(one, diag_shape=6),
        linear.RootLinearOperator(values(5, 6, 1)),
        linear.LowRankRootLinearOperator(values(5, 6, 1)).add_diagonal(values(6).square()),
    ):
        got = from_linear_operator(theirs)
        wanted = theirs.to_dense().reshape(-1, 6, 6)
        torch.testing.assert_close(got.dense(), wanted, rtol=1e-12, atol=1e-12)


def test_what_is_no_diagonal_plus_low_rank_is_refused():
    linear = pytest.importorskip("linear_operator.operators")
    dense = linear.DenseLinearOperator(spd())
    for theirs, got in ((dense, "DenseLinearOperator"), (spd(), "Tensor"), (3, "int")):
        with pytest.raises(TypeError, match=rf"operator must be a diagonal plus a root.*got {got}"):
            from_linear_operator(theirs)
    with pytest.raises(TypeError, match="got AddedDiagLinearOperator of DenseLinearOperator, Diag"):
        from_linear_operator(dense.add_diagonal(torch.ones(4, dtype=F64)))
    deep = linear.DiagLinearOperator(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"must have shape \(D, D\) or \(B, D, D\), got \(2, 3, 4"):
        from_linear_operator(deep)
    with pytest.raises(TypeError, match="to_linear_operator: matrix must be a DPLR, got Tensor"):
        to_linear_operator(spd())


# ------------------------------------------------------------------------------------------ azula


@pytest.mark.parametrize(("sign", "rank"), [(None, 2), ([-1.0, -1.0], 2), (None, 0)])
def test_a_covariance_of_azula_is_the_dense_matrix(sign, rank):
    pytest.importorskip("azula.linalg.covariance")
    ours = matrix(rank=rank, sign=sign)[1]
    theirs, dense, v = to_azula(ours, dims=(2, 3)), ours.dense()[0], values(5, 2, 3)
    kind = "DMLR" if sign else "DPLR" if rank else "Diagonal"
    assert type(theirs).__name__ == f"{kind}Covariance"
    torch.testing.assert_close((theirs @ v).flatten(1), v.flatten(1) @ dense)
    torch.testing.assert_close(theirs.logdet(), torch.logdet(dense))
    torch.testing.assert_close((theirs.inv @ v).flatten(1), v.flatten(1) @ dense.inverse())
    torch.testing.assert_close(from_azula(theirs).dense()[0], dense)
    torch.testing.assert_close(from_azula(theirs.inv).dense()[0], dense.inverse())


def test_what_azula_cannot_hold_is_refused():
    covariance = pytest.importorskip("azula.linalg.covariance")
    with pytest.raises(ValueError, match=r"must hold one sample \(matrix\[0\] takes one\), got 3"):
        to_azula(matrix())
    with pytest.raises(ValueError, match=r"signs of matrix must be equal, got \[1.0, -1.0\]"):
        to_azula(matrix(1, sign=[1.0, -1.0]))
    with pytest.raises(ValueError, match=r"dims must have 6 entries, got \(2, 2\)"):
        to_azula(matrix(1), dims=(2, 2))
    for other in (covariance.IsotropicCovariance(2.0), torch.ones(2)):
        with pytest.raises(TypeError, match=r"^from_azula: covariance must be a DPLRCovariance or"):
            from_azula(other)


# ---------------------------------------------------------------------------- torch.distributions


def test_a_posterior_goes_and_comes_back():
    ours = Posterior(values(3, 2, 3, seed=5), matrix())
    law = to_distribution(ours)
    back = from_distribution(law, dims=(2, 3))
    assert torch.equal(back.mean, ours.mean)
    torch.testing.assert_close(back.covariance.dense(), law.covariance_matrix)
    x = values(3, 2, 3, seed=6)
    torch.testing.assert_close(back.log_prob(x), law.log_prob(x.flatten(1)))
    single = td.LowRankMultivariateNormal(law.loc[1], law.cov_factor[1], law.cov_diag[1])
    assert torch.equal(from_distribution(single).covariance.dense(), back[1].covariance.dense())


MEANS, WEIGHTS = values(3, 4, seed=7), torch.tensor([0.2, 0.5, 0.3], dtype=F64)


@pytest.mark.parametrize(
    "law",
    [
        Gaussian(MEANS[0], spd()),
        GaussianMixture(WEIGHTS, MEANS, spd(3)),
    ],
    ids=["gaussian", "mixture"],
)
def test_densities_go_and_come_back(law):
    theirs, x = to_distribution(law), values(5, 4, seed=8)
    torch.testing.assert_close(theirs.log_prob(x), law.log_prob(x), rtol=1e-10, atol=1e-10)
    back = from_distribution(theirs)
    assert type(back) is type(law)
    torch.testing.assert_close(back.score(x), law.score(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "parts",
    [
        td.LowRankMultivariateNormal(MEANS, values(3, 4, 1), values(3, 4, seed=2).square() + 1),
        td.Independent(td.Normal(MEANS, values(3, 4, seed=2).square() + 1), 1),
    ],
    ids=["low rank", "independent"],
)
def test_mixtures_of_other_normal_parts_come_too(parts):
    theirs = td.MixtureSameFamily(td.Categorical(logits=WEIGHTS.log()), parts)
    x = values(5, 4, seed=8)
    wanted = theirs.log_prob(x)
    torch.testing.assert_close(from_distribution(theirs).log_prob(x), wanted)


@pytest.mark.parametrize(
    ("law", "options", "kind", "message"),
    [
        (td.Normal(0.0, 1.0), {}, TypeError, "law must be a LowRank.*, got Normal"),
        (MEANS, {}, TypeError, "law must be a LowRank.*, got Tensor"),
        (
            td.MixtureSameFamily(td.Categorical(WEIGHTS), td.Normal(MEANS[:, 0], WEIGHTS)),
            {},
            TypeError,
            "parts of law must be normal laws over vectors, got Normal",
        ),
        (
            td.MixtureSameFamily(
                td.Categorical(WEIGHTS), td.Independent(td.Laplace(MEANS, MEANS.square()), 1)
            ),
            {},
            TypeError,
            "parts of law must be normal laws over vectors, got Independent of Laplace",
        ),
        (
            td.MultivariateNormal(MEANS, spd(3)),
            {},
            ValueError,
            r"law must have batch shape \(\), got \(3,\)",
        ),
        (
            td.MultivariateNormal(MEANS[0], spd()),
            {"dims": (2, 2)},
            ValueError,
            "dims must be None but for a LowRankMultivariateNormal",
        ),
        (
            td.LowRankMultivariateNormal(MEANS, values(3, 4, 1), MEANS.square()),
            {"dims": (3,)},
            ValueError,
            r"dims must have 4 entries, got \(3,\)",
        ),
    ],
)
def test_other_distributions_are_refused(law, options, kind, message):
    with pytest.raises(kind, match=f"^from_distribution: {message}"):
        from_distribution(law, **options)


def test_a_law_that_is_not_ours_is_refused():
    with pytest.raises(TypeError, match=r"^to_distribution: law must be a Posterior or a Gaussian"):
        to_distribution(MEANS)
