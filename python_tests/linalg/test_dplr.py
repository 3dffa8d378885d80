"""DPLR against dense float64 linear algebra: signs, zeros in d, rank 0, empty batches, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hos_ext import ops
from hos_ext.linalg import rational_krylov
from hos_ext.linalg.dplr import DPLR
from hos_ext.linalg.woodbury import Parts

F64 = torch.float64
# Well-conditioned float64 problems of size 30: rounding times the condition number (at most 1e4).
TIGHT = 1e-10
# `eigh` promises 1e-11 of max |d| + |U|^2 for values; residuals may be as large.
EIGEN = 1.1e-11


def matrix(
    batch: int = 3,
    size: int = 30,
    rank: int = 4,
    *,
    sign: list[int] | None = None,
    zeros: int = 0,
    dtype: torch.dtype = F64,
    seed: int = 0,
) -> DPLR:
    """d in [0.5, 1.5] with `zeros` leading zeros, U of size one, optional signs."""
    generator = torch.Generator().manual_seed(seed)
    diag = 0.5 + torch.rand(batch, size, generator=generator, dtype=F64)
    diag[:, :zeros] = 0
    factor = torch.randn(batch, size, rank, generator=generator, dtype=F64)
    return DPLR(diag.to(dtype), factor.to(dtype), None if sign is None else torch.tensor(sign))


def dense(m: DPLR) -> Tensor:
    """diag(d) + U diag(sign) U^T in float64, entry by entry as it is defined."""
    diag, factor = m.diag.double(), m.factor.double()
    weight = torch.ones(m.rank, dtype=F64) if m.sign is None else m.sign.double()
    return torch.diag_embed(diag) + torch.einsum("bir,r,bjr->bij", factor, weight, factor)


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    assert got.shape == want.shape
    return float((got.double() - want).abs().max() / want.abs().max()) if want.numel() else 0.0


SIGNS = [None, [1, 1, 1, 1], [-1, 1, -1, 1], [-1, -1, -1, -1]]


# --------------------------------------------------------------------------------- elementary


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_elementary_methods_equal_dense_algebra(sign: list[int] | None, dtype: torch.dtype) -> None:
    m = matrix(sign=sign, dtype=dtype)
    full = dense(m)
    tolerance = 1e-13 if dtype == F64 else 2e-6
    v = torch.randn(3, 30, dtype=dtype)
    many = torch.randn(3, 30, 5, dtype=dtype)
    assert error(m.dense(), full) < tolerance
    assert error(m.matvec(v), (full @ v.double().unsqueeze(-1)).squeeze(-1)) < tolerance
    assert error(m @ many, full @ many.double()) < tolerance
    assert error(m.diagonal(), full.diagonal(dim1=1, dim2=2)) < tolerance
    assert error(m.trace(), full.diagonal(dim1=1, dim2=2).sum(-1)) < tolerance
    assert error(m.frobenius_norm(), torch.linalg.matrix_norm(full)) < tolerance
    assert m.dense().dtype == m.frobenius_norm().dtype == dtype


def test_rank_zero_and_no_factor_are_the_diagonal() -> None:
    diag = torch.tensor([[3.0, 1.0, 2.0]], dtype=F64)
    for m in (DPLR(diag), DPLR(diag, torch.empty(1, 3, 0, dtype=F64)), matrix(1, 3, 0) + 0.0):
        want = m.diag
        assert m.rank == 0
        assert torch.equal(m.dense(), torch.diag_embed(want))
        assert torch.equal(m @ torch.ones_like(want), want)
        torch.testing.assert_close(m.solve(want), torch.ones_like(want))
        torch.testing.assert_close(m.logdet(), want.log().sum(-1))
        torch.testing.assert_close(m.frobenius_norm(), want.norm(dim=-1))
        torch.testing.assert_close(m.eigh(2)[0], want.sort(descending=True)[0][:, :2])
        assert m.sample(4, seed=0).shape == (4, 1, 3)


def test_an_empty_batch_passes_through_every_method() -> None:
    m = matrix(0, 5, 2, sign=[1, -1])
    assert m.dense().shape == (0, 5, 5)
    assert (m @ torch.empty(0, 5, dtype=F64)).shape == (0, 5)
    assert m.solve(torch.empty(0, 5, 2, dtype=F64)).shape == (0, 5, 2)
    for value in (m.trace(), m.logdet(), m.frobenius_norm(), m.is_positive_definite()):
        assert value.shape == (0,)
    for size in (5, 200):
        values, vectors = matrix(0, size, 2).eigh(3)
        assert values.shape == (0, 3)
        assert vectors.shape == (0, size, 3)
    assert m.sample(2, seed=0).shape == (2, 0, 5)
    assert (m + m).scale(2.0).shape == (0, 5, 5)


@pytest.mark.parametrize("left", SIGNS)
@pytest.mark.parametrize("right", SIGNS)
def test_sums_equal_dense_sums(left: list[int] | None, right: list[int] | None) -> None:
    a, b = matrix(sign=left), matrix(sign=right, rank=4, seed=1)
    both = a + b
    assert both.rank == 8
    assert error(both.dense(), dense(a) + dense(b)) < 1e-14


def test_adding_a_number_adds_a_multiple_of_the_identity() -> None:
    m = matrix(sign=[1, -1, 1, 1])
    eye = torch.eye(30, dtype=F64)
    assert error((m + 0.5).dense(), dense(m) + 0.5 * eye) < 1e-14
    assert error((2 + m).dense(), dense(m) + 2 * eye) < 1e-14
    tau = torch.tensor([0.0, 1.0, -2.0], dtype=F64)
    assert error((m + tau).dense(), dense(m) + tau[:, None, None] * eye) < 1e-14


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("a", [2.0, 0.0, -3.0, torch.tensor([1.0, 0.0, 4.0]), -torch.ones(3)])
def test_scale_multiplies_and_a_negative_number_flips_signs(
    sign: list[int] | None, a: float | Tensor
) -> None:
    m = matrix(sign=sign)
    want = dense(m) * torch.as_tensor(a, dtype=F64).reshape(-1, 1, 1)
    torch.testing.assert_close(dense(m.scale(a)), want, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------ factorisations


@pytest.mark.parametrize("zeros", [0, 1, 3])
@pytest.mark.parametrize("sign", SIGNS)
def test_solve_and_logdet_equal_dense_ones_also_with_zeros_in_d(
    sign: list[int] | None, zeros: int
) -> None:
    m = matrix(sign=sign, zeros=zeros)
    m.diag[0, 5] = 0.25  # the zeros of the batch need not be alike
    m.diag[1, 0] = 1.0
    full = dense(m)
    b = torch.randn(3, 30, 2, dtype=F64)
    want = torch.linalg.solve(full, b)
    assert error(m.solve(b), want) < TIGHT
    assert error(m.solve(b[..., 0]), want[..., 0]) < TIGHT
    torch.testing.assert_close(
        m.logdet(), torch.logdet(full), rtol=1e-11, atol=1e-11, equal_nan=True
    )


@pytest.mark.parametrize(
    ("dtype", "small"),
    [(torch.float32, 10.0**-n) for n in range(10)] + [(F64, 10.0**-n) for n in (2, 5, 8, 20, 200)],
)
@pytest.mark.parametrize("sign", SIGNS[::2])
@pytest.mark.parametrize(("size", "count"), [(6, 3), (6, 5), (3, 3), (40, 2), (40, 40)])
def test_small_diagonals_cost_no_digits(
    dtype: torch.dtype, small: float, sign: list[int] | None, size: int, count: int
) -> None:
    m = matrix(20, size, dtype=dtype, sign=sign)
    m.diag[:, :count] *= small
    m.diag[0, 0] = -m.diag[0, 0]
    m.diag[1] = 1.0  # samples with and without small rows in one batch
    full = dense(m)
    b = torch.randn(20, size, 2, dtype=dtype)
    # LAPACK's float64 solve is an oracle as long as float64 has the digits.
    allowed = torch.linalg.cond(full) * torch.finfo(dtype).eps
    checked = allowed < (0.05 if dtype == torch.float32 else 1e-3)
    assert checked[1]
    assert checked.sum() > 15 or count > 4
    want = torch.linalg.solve(full, b.double())
    got = m.solve(b).double()
    lost = (got - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2)) / allowed
    assert float(lost[checked].max()) < 20
    sign_of, logabs = torch.linalg.slogdet(full)
    logdet = m.logdet().double()
    assert torch.equal(logdet.isnan()[checked], (sign_of < 0)[checked])
    off = ((logdet - logabs).abs() / (allowed + 4e-7 * logabs.abs()))[checked & (sign_of > 0)]
    assert off.numel() == 0 or float(off.max()) < 20
    definite = torch.linalg.eigvalsh(full)[:, 0] > 0
    assert torch.equal(m.is_positive_definite()[checked], definite[checked])


@pytest.mark.parametrize("small", [1e-3, 1e-9])
def test_solve_and_logdet_have_the_right_derivatives_at_small_diagonals(small: float) -> None:
    m = matrix(2, 6, 2, sign=[1, -1])
    diag = m.diag.clone()
    diag[0, :2] = small
    inputs = [t.clone().requires_grad_() for t in (diag, m.factor)]
    copies = [t.detach().clone().requires_grad_() for t in inputs]
    b = torch.arange(1.0, 7.0, dtype=F64).expand(2, 6)
    ours = DPLR(inputs[0], inputs[1], m.sign)
    full = dense(DPLR(copies[0], copies[1], m.sign))
    logdet = torch.linalg.slogdet(full)[1]
    solved = torch.linalg.solve(full, b.unsqueeze(-1)).squeeze(-1)
    # Where det M < 0 logdet is NaN: its gradient is looked at for det M > 0 only.
    positive = torch.linalg.det(full.detach()) > 0
    got = torch.autograd.grad(ours.solve(b).sin().sum() + ours.logdet()[positive].sum(), inputs)
    want = torch.autograd.grad(solved.sin().sum() + logdet[positive].sum(), copies)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_float32_solves_are_as_good_as_dense_float32_ones() -> None:
    m = matrix(4, 200, 8, dtype=torch.float32)
    b = torch.randn(4, 200, 3)
    want = torch.linalg.solve(dense(m), b.double())
    ours, plain = error(m.solve(b), want), error(torch.linalg.solve(m.dense(), b), want)
    assert ours < 2 * plain + 1e-6
    torch.testing.assert_close(m.logdet().double(), torch.logdet(dense(m)), rtol=1e-5, atol=0)


def test_logdet_of_a_singular_or_negative_matrix_is_that_of_torch() -> None:
    eye = torch.ones(1, 4, dtype=F64)
    zero = eye.clone()
    zero[0, :2] = 0
    assert DPLR(zero).logdet().item() == -torch.inf
    assert DPLR(zero, torch.ones(1, 4, 1, dtype=F64)).logdet().item() == -torch.inf
    assert DPLR(eye, 2 * torch.eye(4, 1, dtype=F64)[None], torch.tensor([-1])).logdet().isnan()
    flipped = DPLR(eye, 2 * torch.eye(4, 2, dtype=F64)[None], torch.tensor([-1, -1]))
    torch.testing.assert_close(flipped.logdet(), torch.tensor([9.0], dtype=F64).log())


@pytest.mark.parametrize("small", [2e-38, 1e-39, 1e-44])
@pytest.mark.parametrize("sign", [None, [1, -1]])
def test_subnormal_diagonals_have_a_determinant_and_a_solution(
    small: float, sign: list[int] | None
) -> None:
    factor = torch.tensor([[[1.0, 0.0], [0.5, 0.0], [0.0, 1e-3], [0.0, 0.0]]])
    diag = torch.tensor([[small, small, 1.0, 2.0]])
    m = DPLR(diag, factor, None if sign is None else torch.tensor(sign))
    # A block of two: small * (small + 1.25); one of one, 1 +- 1e-6; and 2.
    last = 1.0 + (1e-6 if sign is None else -1e-6)
    d = diag.double()[0, 0].item()
    want = np.log(d) + np.log(d + 1.25) + np.log(last) + np.log(2.0)
    assert m.logdet().item() == pytest.approx(want, rel=1e-6)
    assert DPLR(diag).logdet().item() == pytest.approx(2 * np.log(d) + np.log(2.0), rel=1e-6)
    # [[small + 1, 1/2], [1/2, 1 + 1/4]] to (1, 1/2): (1, 0). float32 solves it, whatever is small.
    one = DPLR(torch.tensor([[small, 1.0, 1.0, 2.0]]), factor, m.sign)
    x = one.solve(torch.tensor([[1.0, 0.5, 1.0, 2.0]]))[0].double()
    wanted = torch.tensor([1.0, 0.0, 1 / last, 1.0], dtype=F64)
    torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)
    every = torch.full((1, 4), small)
    assert DPLR(every, factor[..., :1]).logdet().item() == pytest.approx(
        3 * np.log(every[0, 0].item()) + np.log(1.25), rel=1e-6
    )


def test_positive_definiteness_is_counted_in_float64() -> None:
    # diag(1, 1) - (1 - 2^-24) e e^T on the first entry: 1e-7 is left, and float32 counts none.
    near = torch.tensor([[[1 - 2.0**-24], [0.0]]])
    m = DPLR(torch.ones(1, 2), near, torch.tensor([-1]))
    assert 0 < dense(m)[0, 0, 0] < 2e-7
    assert m.is_positive_definite().all()
    small = DPLR(torch.tensor([[1.0, 1e-12]]), torch.tensor([[[3e3], [1e-6]]]), torch.tensor([1]))
    assert small.is_positive_definite().all()
    factor = torch.randn(50, 20, 6, generator=torch.Generator().manual_seed(0))
    length = torch.linalg.matrix_norm(factor, 2)[:, None, None]
    for gap in (-3e-6, 3e-6):  # of the largest eigenvalue from 1, on either side
        edge = DPLR(torch.ones(50, 20), factor / length * (1 - gap) ** 0.5, -torch.ones(6))
        want = torch.linalg.eigvalsh(dense(edge))[:, 0] > 0
        assert torch.equal(edge.is_positive_definite(), want)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_draws_are_made_of_eigenvalues_down_to_minus_one(dtype: torch.dtype) -> None:
    # Rounding puts some below -1: they are zeros, and not refused.
    generator = torch.Generator().manual_seed(0)
    for size, rank in ((3, 1), (6, 3), (20, 5), (30, 30)):
        basis = torch.randn(40, size, rank, generator=generator, dtype=F64)
        unit = torch.linalg.qr(basis)[0].to(dtype)
        root = 0.5 + torch.rand(40, size, 1, generator=generator, dtype=dtype)
        m = DPLR(root.square().squeeze(-1), root * unit, -torch.ones(rank, dtype=dtype))
        draws = m.sample(8, seed=0)
        along = ((draws / root.squeeze(-1)).permute(1, 0, 2) @ unit).abs().max()
        assert along < 100 * torch.finfo(dtype).eps ** 0.5
        outside = DPLR(m.diag, m.factor * 1.001, m.sign)
        message = r"^DPLR.sample: the matrix must be positive semidefinite, got a negative eig"
        with pytest.raises(ValueError, match=message):
            outside.sample(1, seed=0)


def test_scale_by_zeros_beside_numbers_of_either_sign() -> None:
    m = matrix(sign=[1, -1, 1, -1])
    for a in ([0.0, 2.0, 0.0], [0.0, -2.0, -0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, -3.0]):
        value = torch.tensor(a, dtype=F64)
        got = dense(m.scale(value))
        assert got.isfinite().all()
        torch.testing.assert_close(got, dense(m) * value[:, None, None], rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match=r"^DPLR.scale: a must have one sign over the batch, got"):
        m.scale(torch.tensor([1.0, 0.0, -1.0], dtype=F64))


def test_the_norm_of_a_matrix_that_cancels_is_zero_and_not_nan() -> None:
    # d + U S U^T = 0: the three terms of its square are 1, -2 and 1, to rounding.
    generator = torch.Generator().manual_seed(0)
    column = torch.rand(200, 1, 1, generator=generator)
    zero = DPLR(column.square().squeeze(-1), column, torch.tensor([-1]))
    twice = torch.randn(200, 9, 1, generator=generator)
    like = DPLR(torch.zeros(200, 9), torch.cat([twice, twice], -1), torch.tensor([1, -1]))
    eye = torch.linalg.qr(torch.randn(200, 7, 7, generator=generator))[0]
    minus = DPLR(torch.ones(200, 7), eye, -torch.ones(7))
    for m in (zero, like, minus):
        norm = m.frobenius_norm()
        assert (norm >= 0).all()
        assert norm.max() < 7 * 3e-3


def test_singular_matrices_are_refused_by_solve() -> None:
    zero = torch.tensor([[0.0, 0.0, 1.0]], dtype=F64)
    with pytest.raises(
        ValueError, match=r"^DPLR.solve: the matrix must be nonsingular, got 2 zeros"
    ):
        DPLR(zero, torch.ones(1, 3, 1, dtype=F64)).solve(torch.ones(1, 3, dtype=F64))
    unit = torch.eye(3, 1, dtype=F64)[None]
    singular = DPLR(torch.ones(1, 3, dtype=F64), unit, torch.tensor([-1]))
    both = DPLR(torch.ones(2, 3, dtype=F64), torch.cat([0 * unit, unit]), singular.sign)
    with pytest.raises(ValueError, match=r"nonsingular, got a singular one at batch 1$"):
        both.solve(torch.ones(2, 3, dtype=F64))


def test_positive_definiteness_is_counted_right() -> None:
    for seed in range(20):
        m = matrix(4, 8, 3, sign=[1, -1, -1], seed=seed)
        m = m + 3.0 * (seed % 5)
        want = torch.linalg.eigvalsh(dense(m))[:, 0] > 0
        assert torch.equal(m.is_positive_definite(), want)
    assert matrix(zeros=4).is_positive_definite().all()
    assert not matrix(zeros=5).is_positive_definite().any()
    assert not DPLR(torch.zeros(2, 100)).is_positive_definite().any()


def test_nan_and_inf_pass_through() -> None:
    m = matrix(2, 6, 2)
    m.diag[1, 0] = torch.nan
    full = matrix(2, 6, 2)
    b = torch.ones(2, 6, dtype=F64)
    for method in ("trace", "logdet", "frobenius_norm"):
        got, want = getattr(m, method)(), getattr(full, method)()
        assert got[0] == want[0]
        assert got[1].isnan()
    torch.testing.assert_close(m.solve(b)[0], full.solve(b)[0])
    assert m.solve(b)[1].isnan().all()
    assert m.is_positive_definite().tolist() == [True, False]
    assert m.sample(2, seed=0)[:, 1].isnan().any()
    assert not m.sample(2, seed=0)[:, 0].isnan().any()


@pytest.mark.parametrize("sign", [None, [1, -1]])
@pytest.mark.parametrize(
    "method",
    [
        lambda m: m.dense(),
        lambda m: m @ torch.arange(1.0, 6.0, dtype=F64).expand(2, 5),
        lambda m: m.trace(),
        lambda m: m.frobenius_norm(),
        lambda m: m.solve(torch.arange(1.0, 6.0, dtype=F64).expand(2, 5)),
        lambda m: m.logdet(),
        lambda m: m.scale(2.0).diagonal(),
        lambda m: m.sample(2, seed=3),
        lambda m: m.eigh(2)[0],
    ],
)
def test_gradients_pass_gradcheck(method: Callable[[DPLR], Tensor], sign: list[int] | None) -> None:
    m = matrix(2, 5, 2, sign=sign)
    weight = None if sign is None else torch.tensor(sign)
    if sign is not None:
        m = m + 30.0
    inputs = (m.diag.clone().requires_grad_(), m.factor.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda d, u: method(DPLR(d, u, weight)), inputs)


def test_solve_is_differentiable_at_a_zero_of_d() -> None:
    m = matrix(2, 5, 2, zeros=1)
    b = torch.arange(1.0, 6.0, dtype=F64).expand(2, 5)
    diag = m.diag.clone().requires_grad_()
    (got,) = torch.autograd.grad(DPLR(diag, m.factor).solve(b).sum(), diag)
    same = m.diag.clone().requires_grad_()
    full = torch.diag_embed(same) + m.factor @ m.factor.mT
    (want,) = torch.autograd.grad(torch.linalg.solve(full, b.unsqueeze(-1)).sum(), same)
    torch.testing.assert_close(got, want)


# ----------------------------------------------------------------------------------- eigenpairs


def check_eigh(m: DPLR, k: int) -> None:
    """Values against LAPACK's, residuals, orthonormality and the sign convention."""
    full = dense(m)
    scale = m.diag.abs().amax(-1) + torch.linalg.matrix_norm(m.factor, 2).square()
    scale = scale.where(scale > 0, 1.0)
    values, vectors = m.eigh(k)
    assert values.shape == (m.shape[0], k)
    assert vectors.shape == (m.shape[0], m.shape[1], k)
    want = torch.linalg.eigvalsh(full).flip(-1)[:, :k]
    assert float(((values - want).abs().amax(-1) / scale).max()) < EIGEN
    residual = (full @ vectors - vectors * values.unsqueeze(1)).norm(dim=1).amax(-1)
    assert float((residual / scale).max()) < EIGEN
    assert float((vectors.mT @ vectors - torch.eye(k, dtype=F64)).abs().max()) < 1e-12
    peak = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    assert bool((peak > 0).all())


def spectra(size: int) -> dict[str, DPLR]:
    """Diagonals and factors that are hard in different ways, for size > 64."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=F64)

    u = normal(2, size, 5) / size**0.5
    line = torch.linspace(0, 1, size, dtype=F64).expand(2, size)
    ones = torch.ones(2, size, dtype=F64)
    mixed = torch.tensor([1, -1, 1, -1, 1])
    levels = torch.randint(0, 3, (2, size), generator=generator).double()
    sparse = u * (rand(2, size, 1) < 0.1)
    # U pushes the rows of largest d far down; what remains on top lies in rows that U never meets.
    hidden, low = 5 + rand(2, size), torch.zeros(2, size, 5, dtype=F64)
    hidden[:, :7], low[:, :7] = 10, 1e3 * normal(2, 7, 5)
    return {
        "constant": DPLR(ones, u),
        "constant signed": DPLR(-3 * ones, u, mixed),
        "zero": DPLR(0 * ones, 0 * u),
        "zero diagonal": DPLR(0 * ones, u),
        "even spacing": DPLR(line, 0.1 * u),
        "outlier": DPLR(line, torch.cat([30 * u[..., :1], 0.01 * u], -1)),
        "cluster 1e-10": DPLR(1 + 1e-10 * rand(2, size), 1e-4 * u),
        "cluster 1e-6": DPLR(1 + 1e-6 * rand(2, size), 1e-3 * u),
        "cluster 1e-3": DPLR(1 + 1e-3 * rand(2, size), 0.1 * u),
        "multiple": DPLR(levels, u),
        "multiple, tiny factor": DPLR(levels, 1e-4 * u),
        "multiple, sparse signed": DPLR(levels, sparse, mixed),
        "twelve decades": DPLR(10 ** (-12 * rand(2, size)), u),
        "negative": DPLR(line, u, -torch.ones(5)),
        "mixed": DPLR(normal(2, size), 2 * u, mixed),
        "dependent columns": DPLR(line, torch.cat([u, u], -1)),
        "cancelling columns": DPLR(line, torch.cat([u, u], -1), torch.tensor([1] * 5 + [-1] * 5)),
        "large factor": DPLR(line, 1e6 * u),
        "hidden rows": DPLR(hidden, low, -torch.ones(5)),
        "rank 0": DPLR(line),
    }


@pytest.mark.parametrize("name", list(spectra(70)))
@pytest.mark.parametrize("k", [1, 4, 7])
def test_eigh_finds_the_leading_pairs_of_hard_spectra(name: str, k: int) -> None:
    check_eigh(spectra(150)[name], k)


def test_eigh_finds_leading_pairs_of_random_structures() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        size = int(torch.randint(65, 120, (), generator=generator))
        rank = int(torch.randint(0, 9, (), generator=generator))
        decades = -5 + 7 * torch.rand(2, generator=generator, dtype=F64)
        diag = torch.randint(-2, 9, (2, size), generator=generator).double()
        diag = diag + 10 ** float(decades[0] - 4) * torch.rand(2, size, dtype=F64)
        factor = torch.randn(2, size, rank, generator=generator, dtype=F64) * 10 ** decades[1]
        sign = torch.randint(0, 2, (rank,), generator=generator) * 2 - 1
        check_eigh(DPLR(diag, factor, sign), 3)


def test_eigh_forms_the_dense_matrix_exactly_where_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    form = DPLR.dense
    monkeypatch.setattr(DPLR, "dense", lambda self: calls.append(self.shape[1]) or form(self))
    for size, rank, k in ((64, 2, 2), (65, 57, 2), (65, 58, 2), (66, 58, 2)):
        matrix(1, size, rank).eigh(k)
    assert calls == [64, 65]


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (1, 1), (2, 3), (64, 4), (65, 4), (90, 80)])
def test_eigh_works_for_any_size_and_k(size: int, rank: int) -> None:
    m = matrix(2, size, rank)
    for k in {1, (size + 1) // 2, size}:
        check_eigh(m, k)


def test_eigh_forms_no_dense_matrix_for_a_large_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPLR, "dense", lambda self: pytest.fail("dense() was called"))
    monkeypatch.setattr(ops, "assemble_hessian", lambda *a, **k: pytest.fail("assembled"))
    matrix(2, 200, 5).eigh(4)


def test_eigh_recovers_eigenvalues_that_its_start_cannot_see() -> None:
    found: list[float | None] = []
    count = rational_krylov.first_missed

    def spy(parts: Parts, limits: list[float], high: float) -> float | None:
        found.append(count(parts, limits, high))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rational_krylov, "first_missed", spy)
        spectra(150)["hidden rows"].eigh(4)
    assert any(x is not None for x in found)
    assert found[-1] is None


def test_eigh_in_float32_rounds_the_float64_answer() -> None:
    m = matrix(2, 200, 5, dtype=torch.float32)
    values, vectors = m.eigh(4)
    wide_values, wide_vectors = m.to(F64).eigh(4)
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.equal(values, wide_values.float())
    assert torch.equal(vectors, wide_vectors.float())


def test_eigh_gives_up_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rational_krylov, "first_missed", lambda parts, limits, high: high)
    with pytest.raises(RuntimeError, match=r"^DPLR.eigh: no convergence in 100 steps$"):
        matrix(1, 70, 2).eigh(2)


# -------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("sign", [None, [1, 1], [1, -1], [-1, -1]])
def test_samples_have_mean_zero_and_the_covariance(sign: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(2)
    diag = 1 + torch.rand(2, 4, generator=generator, dtype=F64)
    diag[0, 0] = 0 if sign is None else diag[0, 0]
    factor = 0.25 * torch.randn(2, 4, 2, generator=generator, dtype=F64)
    m = DPLR(diag, factor, None if sign is None else torch.tensor(sign))
    n = 20_000
    full = dense(m)
    draws = torch.cat([m.sample(2_500, seed=11, offset=2_500 * i) for i in range(8)])
    variance = full.diagonal(dim1=1, dim2=2)
    mean_error = draws.mean(0) / (variance / n).sqrt()
    assert float(mean_error.abs().max()) < 5
    # Var of x_i x_j of a Gaussian is C_ii C_jj + C_ij^2.
    spread = (variance.unsqueeze(-1) * variance.unsqueeze(-2) + full.square()) / n
    covariance = torch.einsum("nbi,nbj->bij", draws, draws) / n
    assert float(((covariance - full) / spread.sqrt()).abs().max()) < 5


def test_the_noise_of_a_draw_does_not_depend_on_how_calls_are_split() -> None:
    m = matrix(6, 5, 3)
    whole = m.sample(7, seed=5, offset=2, first=10)
    assert torch.equal(whole, m.sample(7, seed=5, offset=2, first=10))
    parts = torch.cat(
        [m.sample(3, seed=5, offset=2, first=10), m.sample(4, seed=5, offset=5, first=10)]
    )
    torch.testing.assert_close(whole, parts, rtol=1e-14, atol=1e-14)
    low, high = DPLR(m.diag[:4], m.factor[:4]), DPLR(m.diag[4:], m.factor[4:])
    rows = [low.sample(7, seed=5, offset=2, first=10), high.sample(7, seed=5, offset=2, first=14)]
    torch.testing.assert_close(whole, torch.cat(rows, 1), rtol=1e-14, atol=1e-14)
    assert not torch.equal(whole, m.sample(7, seed=6, offset=2, first=10))


def test_without_a_seed_torch_manual_seed_decides() -> None:
    m = matrix(2, 5, 1)
    torch.manual_seed(3)
    one, other = m.sample(2), m.sample(2)
    torch.manual_seed(3)
    assert torch.equal(one, m.sample(2))
    assert not torch.equal(one, other)


def test_samples_come_from_the_posterior_stream() -> None:
    m = DPLR(torch.full((2, 3), 4.0, dtype=F64), torch.ones(2, 3, 1, dtype=F64))
    noise = ops.normal((2, 4), seed=9, offset=1, first=5, stream=2, dtype=F64)
    want = 2 * noise[:, :3] + noise[:, 3:]
    torch.testing.assert_close(m.sample(1, seed=9, offset=1, first=5)[0], want)


# ------------------------------------------------------------------------------ errors and views


def test_description_and_conversion() -> None:
    m = matrix(2, 5, 2, sign=[1, -1])
    assert m.shape == (2, 5, 5)
    assert (m.rank, m.dtype, m.device) == (2, F64, torch.device("cpu"))
    assert repr(m) == "DPLR(B=2, D=5, rank=2, sign=[1, -1], torch.float64, cpu)"
    assert repr(matrix(2, 5, 0)) == "DPLR(B=2, D=5, rank=0, torch.float64, cpu)"
    narrow = m.to(torch.float32)
    assert narrow.dtype == narrow.factor.dtype == torch.float32
    assert narrow.sign is not None
    assert narrow.sign.dtype == torch.float32
    assert m.to("cpu").dtype == F64


D, U = torch.ones(2, 3), torch.ones(2, 3, 1)
GOOD = DPLR(D, U)
NEGATIVE = DPLR(D, U, torch.tensor([-1]))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: DPLR([1.0]), TypeError, "DPLR: diag must be a Tensor, got list"),
        (lambda: DPLR(None), TypeError, "DPLR: diag must be a Tensor, got NoneType"),
        (lambda: DPLR(D, 1.0), TypeError, "DPLR: factor must be a Tensor, got float"),
        (lambda: DPLR(D, U, [1]), TypeError, "DPLR: sign must be a Tensor, got list"),
        (
            lambda: DPLR(torch.ones(3)),
            ValueError,
            "DPLR: diag must have shape (B, D), D >= 1, got (3,)",
        ),
        (
            lambda: DPLR(torch.ones(2, 0)),
            ValueError,
            "DPLR: diag must have shape (B, D), D >= 1, got (2, 0)",
        ),
        (
            lambda: DPLR(D.half()),
            ValueError,
            "DPLR: diag must have dtype float32, float64, got torch.float16",
        ),
        (
            lambda: DPLR(D, torch.ones(2, 4, 1)),
            ValueError,
            "DPLR: factor must have shape (2, 3, r) like diag, got (2, 4, 1)",
        ),
        (
            lambda: DPLR(D, torch.ones(2, 3)),
            ValueError,
            "DPLR: factor must have shape (2, 3, r) like diag, got (2, 3)",
        ),
        (
            lambda: DPLR(D, U.double()),
            ValueError,
            "DPLR: factor must have dtype torch.float32, got torch.float64",
        ),
        (
            lambda: DPLR(D, U.to("meta")),
            ValueError,
            "DPLR: factor must be on cpu, got meta",
        ),
        (
            lambda: DPLR(D, U, torch.ones(2)),
            ValueError,
            "DPLR: sign must have shape (1,), got (2,)",
        ),
        (
            lambda: DPLR(D, U, torch.ones(1, device="meta")),
            ValueError,
            "DPLR: sign must be on cpu, got meta",
        ),
        (
            lambda: DPLR(D, U, torch.zeros(1)),
            ValueError,
            "DPLR: sign must hold +1 and -1 only, got [0.0]",
        ),
        (
            lambda: GOOD + DPLR(torch.ones(2, 4)),
            ValueError,
            "DPLR.__add__: other must have shape (2, 3, 3), got (2, 4, 4)",
        ),
        (
            lambda: GOOD + GOOD.to(F64),
            ValueError,
            "DPLR.__add__: other must have dtype torch.float32, got torch.float64",
        ),
        (
            lambda: GOOD + "1",
            TypeError,
            "DPLR.__add__: other must be a float or a Tensor, got str",
        ),
        (
            lambda: GOOD + torch.ones(3),
            ValueError,
            "DPLR.__add__: other must be a float or have shape (2,), got (3,)",
        ),
        (
            lambda: GOOD + torch.ones(2, device="meta"),
            ValueError,
            "DPLR.__add__: other must be on cpu, got meta",
        ),
        (
            lambda: GOOD.scale(float("nan")),
            ValueError,
            "DPLR.scale: a must be finite, got nan",
        ),
        (
            lambda: GOOD.scale(torch.tensor([1.0, -1.0])),
            ValueError,
            "DPLR.scale: a must have one sign over the batch, got tensor([ 1., -1.])",
        ),
        (lambda: GOOD.solve(1.0), TypeError, "DPLR.solve: b must be a Tensor, got float"),
        (
            lambda: GOOD.solve(torch.ones(3, 2)),
            ValueError,
            "DPLR.solve: b must have shape (2, 3) or (2, 3, k), got (3, 2)",
        ),
        (
            lambda: GOOD.solve(D.double()),
            ValueError,
            "DPLR.solve: b must have dtype torch.float32, got torch.float64",
        ),
        (lambda: GOOD.eigh(0), ValueError, "DPLR.eigh: k must be an integer in 1..3, got 0"),
        (lambda: GOOD.eigh(4), ValueError, "DPLR.eigh: k must be an integer in 1..3, got 4"),
        (lambda: GOOD.eigh(1.5), TypeError, "DPLR.eigh: k must be an int, got float"),
        (lambda: GOOD.eigh(True), TypeError, "DPLR.eigh: k must be an int, got bool"),
        (
            lambda: DPLR(D, U * torch.nan).eigh(1),
            ValueError,
            "DPLR.eigh: diag and factor must be finite, got NaN or inf",
        ),
        (
            lambda: GOOD.sample(-1),
            ValueError,
            "DPLR.sample: n must be in [0, 2**31), got -1",
        ),
        (lambda: GOOD.sample(True), TypeError, "DPLR.sample: n must be an int, got bool"),
        (lambda: GOOD.sample(1.0), TypeError, "DPLR.sample: n must be an int, got float"),
        (
            lambda: GOOD.scale(True),
            TypeError,
            "DPLR.scale: a must be a float or a Tensor, got bool",
        ),
        (
            lambda: GOOD.scale(np.complex64(1)),
            TypeError,
            "DPLR.scale: a must be a float or a Tensor, got complex64",
        ),
        (
            lambda: GOOD.scale(torch.tensor(2)),
            ValueError,
            "DPLR.scale: a must have dtype float32, float64, float16, bfloat16, got torch.int64",
        ),
        (
            lambda: GOOD.scale(torch.tensor(2.0, device="meta")),
            ValueError,
            "DPLR.scale: a must be on cpu, got meta",
        ),
        (lambda: DPLR(-D, U).sample(1), ValueError, "DPLR.sample: diag must be >= 0, got -1.0"),
        (
            lambda: DPLR(0 * D, U, torch.tensor([-1])).sample(1),
            ValueError,
            "DPLR.sample: diag must be > 0 where a sign is -1, got 0.0",
        ),
        (
            lambda: NEGATIVE.sample(1),
            ValueError,
            "DPLR.sample: the matrix must be positive semidefinite, got a negative eigenvalue",
        ),
    ],
)
def test_bad_input_is_refused_by_name(
    call: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def test_lu_of_a_batch_runs_on_one_thread(monkeypatch):
    """MKL's parallel LU inside torch's parallel loop over a batch can wait for ever."""
    threads, seen = torch.get_num_threads(), []
    solve, slogdet = torch.linalg.solve_ex, torch.linalg.slogdet

    def watched(function):
        def call(*args):
            seen.append(torch.get_num_threads())
            return function(*args)

        return call

    monkeypatch.setattr(torch.linalg, "solve_ex", watched(solve))
    monkeypatch.setattr(torch.linalg, "slogdet", watched(slogdet))
    matrix = DPLR(torch.ones(3, 5), torch.randn(3, 5, 2), sign=torch.tensor([1.0, -1.0]))
    torch.set_num_threads(2)
    try:
        matrix.solve(torch.ones(3, 5))
        matrix.logdet()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert len(seen) >= 2
    assert set(seen) == {1}


def test_one_entry_that_is_not_finite_is_refused():
    diag = torch.tensor([[1.0, torch.nan, 2.0]])
    with pytest.raises(ValueError, match="diag and factor must be finite"):
        DPLR(diag).eigh(1)
    with pytest.raises(ValueError, match="diag and factor must be finite"):
        DPLR(torch.ones(1, 3), torch.tensor([[[1.0], [torch.inf], [0.0]]])).eigh(1)


def test_definiteness_is_that_of_the_numbers_given_and_not_of_their_rounding():
    """I - u u^T with |u| = 1 to float32: the eigenvalue 1 - |u|^2 is +-1e-7 or less."""
    u = torch.randn(400, 7, generator=torch.Generator().manual_seed(0))
    u = u / u.norm(dim=1, keepdim=True)
    left = 1 - u.double().square().sum(1)
    assert 100 < int((left > 0).sum()) < 300
    found = DPLR(torch.ones_like(u), u.unsqueeze(-1), torch.tensor([-1.0])).is_positive_definite()
    assert torch.equal(found, left > 0)


def test_rounding_below_zero_is_measured_by_the_largest_eigenvalue():
    """1 - |u|^2 = -1e-8 is zero to float32, whatever other columns there are."""
    u = torch.randn(400, 7, generator=torch.Generator().manual_seed(0))
    u = u / u.norm(dim=1, keepdim=True)
    u = u[u.double().square().sum(1) > 1][:20].unsqueeze(-1)
    factor = torch.cat([u, torch.zeros_like(u)], -1)
    matrix = DPLR(torch.ones(20, 7), factor, torch.tensor([-1.0, 1.0]))
    assert matrix.sample(3, seed=0).isfinite().all()
