"""assemble_hessian and hessian_matvec against dense oracles and the plain version."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from conftest import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st

import hos_ext
from hos_ext.ops import reference

# (B, D, r): empty batches and samples, one tile of 64 rows and its neighbours, r = D, a long vector
SHAPES = [
    (0, 5, 2),
    (2, 0, 3),
    (1, 1, 0),
    (3, 2, 5),
    (257, 2, 1),
    (3, 31, 31),
    (2, 64, 16),
    (2, 65, 20),
    (1, 784, 5),
    (1, 1100, 2),
]
DTYPES = [torch.float32, torch.float64]


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(batch, size, rank, columns, dtype, device, seed=0):
    """diag, factor, v and sign."""
    v = randn(batch, size, *([] if columns is None else [columns]), seed=seed + 2)
    sign = torch.tensor([1.0, -1.0, -1.0] * rank)[:rank]
    tensors = (randn(batch, size, seed=seed), randn(batch, size, rank, seed=seed + 1), v, sign)
    return [t.to(device, dtype) for t in tensors]


def evaluate(function, tensors, cotangent):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    if not out.requires_grad:  # an oracle that looped over no samples
        return out, *map(torch.zeros_like, leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent, materialize_grads=True)


def assemble(module, sign):
    if module is hos_ext:
        return lambda d, u: module.assemble_hessian(d, u, sign=sign)
    return lambda d, u: module.assemble_hessian(d, u, sign)


def matvec(module, sign):
    if module is hos_ext:
        return lambda d, u, v: module.hessian_matvec(d, u, v, sign=sign)
    return lambda d, u, v: module.hessian_matvec(d, u, v, sign)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("batch", "size", "rank"), SHAPES)
def test_assemble_matches_the_oracle(device, batch, size, rank, signed, dtype):
    d, u, _, sign = make(batch, size, rank, None, dtype, device)
    sign = sign if signed else None
    cotangent = randn(batch, size, size, seed=5).to(device, dtype)
    wide = [t.double() for t in (d, u)]
    expected = evaluate(assemble(oracles, sign), wide, cotangent.double())
    for module in (hos_ext, reference):
        got = evaluate(assemble(module, sign), [d, u], cotangent)
        for value, wanted in zip(got, expected, strict=True):
            assert value.dtype == dtype
            assert_near(value, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [None, 0, 1, 3])
@pytest.mark.parametrize(("batch", "size", "rank"), SHAPES)
def test_matvec_matches_the_oracle(device, batch, size, rank, columns, dtype):
    *tensors, sign = make(batch, size, rank, columns, dtype, device)
    cotangent = randn(*tensors[2].shape, seed=5).to(device, dtype)
    for weight in (None, sign):
        wide = [t.double() for t in tensors]
        expected = evaluate(matvec(oracles, weight), wide, cotangent.double())
        for module in (hos_ext, reference):
            got = evaluate(matvec(module, weight), tensors, cotangent)
            for value, wanted in zip(got, expected, strict=True):
                assert value.dtype == dtype
                assert_near(value, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 31, 65, 100, 96, 1030])
def test_assembled_matrix_is_symmetric_to_the_bit(device, size, dtype):
    d, u, _, sign = make(3, size, 20, None, dtype, device)
    matrix = hos_ext.assemble_hessian(d, u, sign=sign)
    assert torch.equal(matrix, matrix.mT)


def with_threads(count, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "size"), [(1, 700), (5, 100), (1, 20011), (2, 9001)])
def test_threads_do_not_change_a_bit(batch, size, dtype):
    """Samples, or the rows of a few large ones, are shared out."""
    d, u, v, sign = make(batch, size, 5, 3, dtype, "cpu")
    calls = [lambda: hos_ext.hessian_matvec(d, u, v, sign=sign)]
    if size < 1000:
        calls.append(lambda: hos_ext.assemble_hessian(d, u, sign=sign))
    for call in calls:
        alone = with_threads(1, call)
        assert all(torch.equal(with_threads(count, call), alone) for count in (2, 3))


@pytest.mark.parametrize("order", [torch.Tensor.contiguous, lambda t: t.mT.contiguous().mT])
@pytest.mark.parametrize(("batch", "size", "rank"), [(1, 20011, 5), (2, 9001, 16), (1, 129, 40)])
def test_matvec_of_a_long_sample_matches_the_oracle(device, batch, size, rank, order):
    """Rows are summed in chunks, each packed in tiles."""
    d, u, v, sign = make(batch, size, rank, 3, torch.float64, device)
    u = order(u)
    product = hos_ext.hessian_matvec(d, u, v, sign=sign)
    assert_near(product, d.unsqueeze(-1) * v + (u * sign) @ (u.mT @ v))


def a_slice(t):
    wide = t.new_full((t.shape[0] + 1, t.shape[1] + 2, t.shape[2] + 3), 7.0)
    return wide[1:, 1:-1, 2:-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.empty_like, a_slice, lambda t: a_slice(t).mT])
@pytest.mark.parametrize(("batch", "size", "rank"), [*SHAPES, (3, 100, 20), (2, 96, 3)])
def test_out_receives_the_bits_of_a_fresh_result(device, batch, size, rank, layout, dtype):
    d, u, _, sign = make(batch, size, rank, None, dtype, device)
    fresh = hos_ext.assemble_hessian(d, u, sign=sign)
    out = layout(fresh)
    whole = fresh if out._base is None else out._base.clone()
    assert hos_ext.assemble_hessian(d, u, sign=sign, out=out) is out
    assert torch.equal(out, fresh)
    if out._base is not None:
        out.fill_(7.0)
        assert torch.equal(out._base, whole)


@pytest.mark.parametrize("size", [1776, 1777])
def test_large_output_written_past_the_caches_has_the_same_bits(size):
    """Touched memory of over 32 MiB with rows of whole lines, and one with others."""
    d, u, _, sign = make(3, size, 3, None, torch.float32, "cpu")
    parts = [hos_ext.assemble_hessian(d[b : b + 1], u[b : b + 1], sign=sign) for b in range(3)]
    out = torch.full((3, size, size), 7.0)
    for count in (1, 3):
        out.fill_(7.0)
        with_threads(count, lambda: hos_ext.assemble_hessian(d, u, sign=sign, out=out))
        assert torch.equal(out, torch.cat(parts))


def test_autograd_sees_that_out_has_changed(device):
    d, u, _, _ = make(2, 5, 2, None, torch.float32, device)
    out = torch.zeros(2, 5, 5, device=device)
    square = (out * torch.ones((), device=device, requires_grad=True)).square().sum()
    hos_ext.assemble_hessian(d, u, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_factor_none_is_the_diagonal(device, dtype):
    d, _, v, _ = make(3, 31, 0, None, dtype, device)
    assert torch.equal(hos_ext.assemble_hessian(d, None), torch.diag_embed(d))
    assert torch.equal(hos_ext.hessian_matvec(d, None, v), d * v)


def test_matvec_is_the_assembled_matrix_times_the_vector(device):
    d, u, v, sign = make(3, 31, 5, 2, torch.float64, device)
    dense = hos_ext.assemble_hessian(d, u, sign=sign)
    assert_near(hos_ext.hessian_matvec(d, u, v, sign=sign), dense @ v)
    assert_near(hos_ext.hessian_matvec(d, u, v[..., 0], sign=sign), (dense @ v)[..., 0])


def test_each_gradient_alone_equals_the_joint_one(device):
    *tensors, sign = make(3, 31, 5, 2, torch.float64, device)
    for function, count in ((assemble(hos_ext, sign), 2), (matvec(hos_ext, sign), 3)):
        cotangent = torch.randn_like(function(*tensors[:count]))
        _, *joint = evaluate(function, tensors[:count], cotangent)
        for position, wanted in enumerate(joint):
            leaf = tensors[position].clone().requires_grad_()
            mixed = [leaf if p == position else t for p, t in enumerate(tensors[:count])]
            assert torch.equal(torch.autograd.grad(function(*mixed), leaf, cotangent)[0], wanted)


def rank_slowest(t):
    return t.mT.contiguous().mT


def columns_of_a_wider_tensor(t):
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), math.nan, dtype=t.dtype, device=t.device)
    wide[..., 2:-1] = t
    return wide[..., 2:-1]


def every_second_sample(t):
    return torch.stack([t, t * math.nan], 1).flatten(0, 1)[::2]


def batch_fastest(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def every_second_column(t):
    return torch.stack([t, t * math.nan], -1).flatten(-2)[..., ::2]


LAYOUTS = [
    rank_slowest,
    columns_of_a_wider_tensor,
    every_second_sample,
    batch_fastest,
    every_second_column,
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_give_the_same_result(device, layout):
    *tensors, sign = make(3, 31, 5, 2, torch.float64, device)
    strided = [layout(t) for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(strided, tensors, strict=True))
    for make_function, count in ((assemble, 2), (matvec, 3)):
        cotangent = torch.randn_like(make_function(oracles, sign)(*tensors[:count]))
        expected = evaluate(make_function(oracles, sign), tensors[:count], cotangent)
        got = evaluate(make_function(hos_ext, sign), strided[:count], layout(cotangent))
        for value, wanted in zip(got, expected, strict=True):
            assert_near(value, wanted)


def test_strided_sign_gives_the_same_result(device):
    *tensors, sign = make(3, 31, 5, 2, torch.float64, device)
    apart = torch.stack([sign, 7 * sign], -1)[:, 0]
    alike = torch.full((1,), -1.0, dtype=torch.float64, device=device).expand(5)
    for weight in (apart, alike):
        for make_function, count in ((assemble, 2), (matvec, 3)):
            got = make_function(hos_ext, weight)(*tensors[:count])
            assert_near(got, make_function(oracles, weight)(*tensors[:count]))


def test_factor_gradient_lies_in_memory_as_the_factor_does(device):
    d, u, v, _ = make(3, 31, 5, 2, torch.float64, device)
    for factor, axis in ((u, -1), (rank_slowest(u), -2)):
        for function, tensors in ((assemble, [d, factor]), (matvec, [d, factor, v])):
            out = function(hos_ext, None)(*tensors)
            grads = evaluate(function(hos_ext, None), tensors, torch.ones_like(out))
            assert grads[2].stride(axis) == 1


@settings(max_examples=40)
@given(
    batch=st.integers(0, 4),
    size=st.integers(1, 70),
    rank=st.integers(0, 24),
    columns=st.none() | st.integers(1, 4),
    layout=st.sampled_from([torch.Tensor.contiguous, *LAYOUTS]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_layout_matches_the_oracle(device, batch, size, rank, columns, layout, seed):
    d, u, v, sign = make(batch, size, rank, columns, torch.float64, device, seed)
    matrix = hos_ext.assemble_hessian(layout(d), layout(u), sign=sign)
    product = hos_ext.hessian_matvec(layout(d), layout(u), layout(v), sign=sign)
    dense, terms = oracles.assemble_hessian(d, u, sign), [t.abs() for t in (d, u, v)]
    assert_near(matrix, dense, terms=oracles.assemble_hessian(*terms[:2]))
    expected = oracles.hessian_matvec(d, u, v, sign)
    assert_near(product, expected, terms=oracles.hessian_matvec(*terms))


@pytest.mark.parametrize("signed", [False, True])
def test_gradcheck(device, signed):
    *tensors, sign = make(2, 3, 2, 2, torch.float64, device)
    sign = sign if signed else None
    d, u, v = (t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(assemble(hos_ext, sign), (d, u))
    assert torch.autograd.gradcheck(matvec(hos_ext, sign), (d, u, v))
    assert torch.autograd.gradcheck(matvec(hos_ext, sign), (d, u, v[..., 0]))


def test_nan_stays_in_its_sample(device):
    d, u, v, _ = make(3, 31, 5, None, torch.float32, device)
    clean = hos_ext.hessian_matvec(d, u, v)
    u[1, 3, 2] = math.nan
    assert hos_ext.hessian_matvec(d, u, v)[1].isnan().all()
    assert torch.equal(hos_ext.hessian_matvec(d, u, v)[[0, 2]], clean[[0, 2]])
    assert hos_ext.assemble_hessian(d, u)[1].isnan().sum() == 31 + 31 - 1


def test_lazily_negated_input_is_read_with_its_sign(device):
    negated = torch.complex(torch.ones(4, 1), torch.full((4, 1), 2.0)).to(device).conj().imag
    assert negated.is_neg()
    ones = torch.ones(4, 1, device=device)
    assert torch.equal(hos_ext.hessian_matvec(negated, None, ones), -2 * ones)
    assert torch.equal(hos_ext.langevin_step(ones, negated, 0.5, noise=0 * ones), 0 * ones)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_infinite_vector_gives_infinity_at_any_rank(rank, device):
    """No padding of the factor may meet it: 0 * inf is NaN."""
    v = torch.ones(1, 4, device=device)
    v[0, 0] = torch.inf
    product = hos_ext.hessian_matvec(
        torch.ones(1, 4, device=device), torch.ones(1, 4, rank, device=device), v
    )
    assert torch.equal(product, torch.full((1, 4), torch.inf, device=device))


def test_lazily_negated_vector_is_read_with_its_sign(device):
    v = torch.randn(3, 5, dtype=torch.complex128, device=device).conj().imag
    diag, factor = torch.ones(3, 5, device=device).double(), torch.ones(3, 5, 2, device=device)
    product = hos_ext.hessian_matvec(diag, factor.double(), v)
    assert_near(product, hos_ext.hessian_matvec(diag, factor.double(), v.clone()))
    sign = torch.complex(torch.ones(2), torch.ones(2)).conj().imag.to(device)
    assert_near(
        hos_ext.assemble_hessian(diag.float(), factor, sign=sign),
        hos_ext.assemble_hessian(diag.float(), factor, sign=-torch.ones(2, device=device)),
    )
