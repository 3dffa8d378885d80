"""Derivatives of functions of matrices with equal eigenvalues, against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hos_ext.diffusion import condition, condition_mean
from hos_ext.linalg import (
    DPLR,
    dense_spectrum,
    isotropic_spectrum,
    low_rank_eigh,
    spectrum_apply,
    spectrum_logdet,
)
from hos_ext.ops.reference import phi1
from hos_ext.tweedie import Posterior

# torch's own use of torch.jit, at the first forward derivative of a process.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

F64 = torch.float64
D = 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def columns(*which: tuple[int, float]) -> Tensor:
    """(1, D, r): one entry in each column."""
    factor = torch.zeros(1, D, len(which), dtype=F64)
    for k, (i, value) in enumerate(which):
        factor[0, i, k] = value
    return factor


def check(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Reverse and forward mode against finite differences, and forward mode in batches."""
    inputs = tuple(t.clone().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True, rtol=1e-6, atol=1e-7
    )
    # torch.func knows nothing of autograd's own transforms.
    still = tuple(t.detach() for t in inputs)
    places = tuple(range(len(inputs)))
    forward = torch.func.jacfwd(function, places)(*still)
    for a, b in zip(forward, torch.func.jacrev(function, places)(*still), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


ROWS = torch.linalg.qr(normal(D, 3))[0].mT.contiguous()
TWO = 0.5 * torch.eye(D, dtype=F64)[None, :, :2]
FACTORS = {  # beside d = 2: factor, sign
    "two like columns, both negative": (columns((0, 0.5), (1, 0.5)), [-1, -1]),
    "two like columns of either sign": (columns((0, 0.5), (1, 0.5)), [1, -1]),
    "the same column twice, of either sign": (columns((0, 0.5), (0, 0.5)), [1, -1]),
    "a column of zeros": (columns((0, 0.5), (1, 0.0)), [-1, -1]),
    "nothing but zeros": (columns((0, 0.0), (1, 0.0)), [-1, 1]),
    "orthonormal columns": (0.9 * ROWS.mT[None], [-1, -1, -1]),
    "more columns than entries": (0.2 * normal(1, D, D + 2), [-1] * (D + 2)),
    "nearly equal": (columns((0, 0.5), (1, 0.5 + 1e-9)), [-1, -1]),
    "close": (columns((0, 0.5), (1, 0.5 + 1e-5)), [-1, -1]),
    "apart": (0.3 * normal(1, D, 2, seed=4), [-1, 1]),
}


@pytest.mark.parametrize("name", FACTORS)
def test_signed_draws_are_smooth_where_eigenvalues_are_equal(name: str) -> None:
    factor, sign = FACTORS[name]
    level = torch.full((1, D), 2.0, dtype=F64)
    check(lambda d, u: DPLR(d, u, torch.tensor(sign)).sample(2, seed=0), level, factor)


def test_draws_have_one_derivative_in_float32_as_in_float64() -> None:
    factor, sign = FACTORS["two like columns, both negative"]
    got = []
    for dtype in (torch.float32, F64):
        d = torch.full((1, D), 2.0, dtype=dtype, requires_grad=True)
        u = factor.to(dtype).requires_grad_()
        value = DPLR(d, u, torch.tensor(sign)).sample(3, seed=0).square().sum()
        got.append([g.double() for g in torch.autograd.grad(value, (d, u))])
        draw = DPLR(d, u, torch.tensor(sign)).sample(3, seed=0)
        same = DPLR(d.detach(), u.detach(), torch.tensor(sign)).sample(3, seed=0)
        assert torch.equal(draw, same)
    torch.testing.assert_close(*got, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_of_signed_draws_is_refused_and_of_others_right() -> None:
    factor, sign = FACTORS["apart"]
    d = torch.full((1, D), 2.0, dtype=F64, requires_grad=True)
    u = factor.clone().requires_grad_()
    message = r"^DPLR.sample: a second derivative in the matrix is not supported, got a request"
    draws = DPLR(d, u, torch.tensor(sign)).sample(2, seed=0).square().sum()
    (first,) = torch.autograd.grad(draws, u, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(first.sum(), u)

    def value(u: Tensor) -> Tensor:
        return DPLR(d.detach(), u, torch.tensor(sign)).sample(2, seed=0).square().sum()

    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            with pytest.raises(RuntimeError, match=message):
                outer(inner(value))(u.detach())
    plain = (d, u.abs())
    assert torch.autograd.gradgradcheck(lambda d, u: DPLR(d, u).sample(2, seed=0).sin(), plain)


def test_a_zero_eigenvalue_gives_no_gradient_of_rounding() -> None:
    d = torch.ones(1, D, dtype=F64, requires_grad=True)
    u = columns((0, 1.0), (1, 0.5))
    draw = DPLR(d, u, torch.tensor([-1, -1])).sample(1, seed=0)
    assert draw.isfinite().all()
    assert draw[0, 0, 0] == 0
    (gradient,) = torch.autograd.grad(draw.sum(), d)
    assert not gradient[0, 0].isfinite()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("sign", [[-1, -1], [1, -1], [1, 1]])
def test_a_condition_is_smooth_where_eigenvalues_are_equal(masked: bool, sign: list[int]) -> None:
    operator = torch.arange(D) < 3 if masked else ROWS
    factor = columns((3, 0.3), (4, 0.3))
    level = torch.full((1, D), 2.0, dtype=F64)
    zero, y = torch.zeros(1, D, dtype=F64), torch.ones(1, 3, dtype=F64)

    def draws(d: Tensor, u: Tensor) -> Tensor:
        law = Posterior(zero, DPLR(d, u, torch.tensor(sign)))
        found = condition(law, y, operator, 0.5)
        mean = condition_mean(law, y, operator, 0.5)
        if sign == [1, 1] and masked:  # its draws are of the factor itself
            return torch.cat([mean, found.covariance.diagonal()])
        return torch.cat([mean, found.sample(2, seed=0).flatten(0, 1)])

    check(draws, level, factor)


# --------------------------------------------------------------------------- functions of spectra

FUNCTIONS = {
    "phi1": lambda t: phi1(2 * t),
    "root": lambda t: (5 + t).sqrt(),
    "square": lambda t: t.square(),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("identity", "phi1"), ("two values", "phi1"), ("two values", "square"), ("apart", "root")],
)
def test_functions_of_dense_matrices_are_smooth(kind: str, name: str) -> None:
    basis = torch.linalg.qr(normal(D, D, seed=3))[0]
    values = {
        "identity": torch.full((D,), -1.5, dtype=F64),
        "two values": torch.tensor([-2.0, -2.0, -2.0, 0.5, 0.5], dtype=F64),
        "apart": torch.linspace(-2, 0.5, D, dtype=F64),
    }[kind]
    matrix = ((basis * values) @ basis.mT)[None]

    def apply(matrix: Tensor, v: Tensor) -> Tensor:
        spectrum = dense_spectrum(matrix / 2 + matrix.mT / 2)
        function = FUNCTIONS[name]
        total = spectrum_logdet(spectrum, lambda t: (function(t) + 1).square())
        return torch.cat([spectrum_apply(spectrum, function, v)[0], total])

    check(apply, matrix, normal(1, D))


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, "phi1") for kind in FACTORS), ("a column of zeros", "root")]
)
def test_functions_of_isotropic_matrices_are_smooth(kind: str, name: str) -> None:
    factor, sign = FACTORS[kind]
    weight = torch.tensor(sign, dtype=F64)

    def apply(level: Tensor, factor: Tensor, v: Tensor) -> Tensor:
        spectrum = isotropic_spectrum(level.expand(1, D), factor, sign=weight)
        function = FUNCTIONS[name]
        total = spectrum_logdet(spectrum, lambda t: (function(t) + 1).square())
        return torch.cat([spectrum_apply(spectrum, function, v)[0], total])

    check(apply, torch.full((1, 1), -0.3, dtype=F64), factor, normal(1, D))


def test_a_function_is_differentiable_in_its_own_parameter_and_mixed() -> None:
    spectrum_of = torch.diag_embed(torch.tensor([[-1.0, -1.0, 0.5]], dtype=F64))

    def apply(matrix: Tensor, h: Tensor) -> Tensor:
        v = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64)
        spectrum = dense_spectrum(matrix / 2 + matrix.mT / 2)
        return spectrum_apply(spectrum, lambda t: (h * t).exp(), v)

    h = torch.tensor([[0.7]], dtype=F64)
    check(apply, spectrum_of, h)

    def slope(matrix: Tensor) -> Tensor:  # d / dh, and then d / dA: one derivative in A
        return torch.func.jacrev(apply, 1)(matrix, h)

    check(slope, spectrum_of)


def test_eigenvalues_are_differentiable_and_eigenvectors_are_not() -> None:
    factor, sign = FACTORS["apart"]
    weight = torch.tensor(sign, dtype=F64)
    check(lambda u: low_rank_eigh(u, weight)[1], factor)
    twice = columns((0, 0.5), (1, 0.5))
    check(lambda u: low_rank_eigh(u, weight.abs())[1].square().sum(), twice)
    u = factor.clone().requires_grad_()
    matrix = torch.eye(D, dtype=F64)[None].requires_grad_()
    message = r": eigenvectors must not be differentiated, got a gradient for them \(they have no"
    for where, basis in (
        ("low_rank_eigh", low_rank_eigh(u, weight)[0]),
        ("isotropic_spectrum", isotropic_spectrum(matrix.diagonal(0, 1, 2), u).basis),
        ("dense_spectrum", dense_spectrum(matrix).basis),
    ):
        with pytest.raises(RuntimeError, match="^" + where + message):
            basis.sum().backward()
    tangent = torch.func.jvp(lambda u: low_rank_eigh(u, weight)[0], (factor,), (factor,))[1]
    assert tangent.isnan().all()


def test_leading_eigenvalues_of_a_dplr_sum_to_a_smooth_function_at_ties() -> None:
    level, factor = torch.ones(1, D, dtype=F64), columns((0, 2.0), (1, 2.0))
    d, u = level.requires_grad_(), factor.requires_grad_()
    assert torch.autograd.gradcheck(lambda d, u: DPLR(d, u).eigh(2)[0].square().sum(), (d, u))
    (first,) = torch.autograd.grad(DPLR(d, u).eigh(2)[0].sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(first.sum(), u)
