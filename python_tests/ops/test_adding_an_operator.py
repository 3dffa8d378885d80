"""An operator from outside the package, made by the public helper alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.library import opcheck

from hos_ext.ops import Argument, Operator

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def forward(x: Tensor, weight: Tensor | None, sigma: Tensor | float) -> tuple[Tensor]:
    cube = x**3 if weight is None else weight * x**3
    return ((cube / sigma).sum(-1),)


def backward(
    needs: Sequence[bool],
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    sigma: Tensor | float,
) -> tuple[Tensor | None]:
    slope = 3 * x.square() / sigma
    return (grad_out.unsqueeze(-1) * (slope if weight is None else weight * slope),)


def tangent(
    tangents: Sequence[Tensor | None], x: Tensor, weight: Tensor | None, sigma: Tensor | float
) -> Tensor:
    (direction,) = tangents
    ones = x.new_ones(x.shape[:-1])
    (slope,) = backward([True], ones, x, weight, sigma)
    return torch.zeros_like(ones) if direction is None else (slope * direction).sum(-1)


cubes = Operator(
    "outside::cubes",
    [
        Argument("x", batch=0, differentiable=True),
        Argument("weight", "Tensor?"),
        Argument("sigma", scalar=torch.float64),
    ],
    forward=forward,
    backward=backward,
    jvp=tangent,
    fake=lambda x, weight, sigma: (x.new_empty(x.shape[:1]),),
)


def plain(x: Tensor, weight: Tensor | None = None, sigma: float = 0.5) -> Tensor:
    return forward(x, weight, sigma)[0]


def fused(x: Tensor, weight: Tensor | None = None, sigma: float = 0.5) -> Tensor:
    return cubes(x, weight, sigma)[0]


X = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4)
WEIGHT = torch.arange(4, dtype=torch.float64)


def test_eager_and_autograd() -> None:
    torch.testing.assert_close(fused(X, WEIGHT), plain(X, WEIGHT))
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    fused(x, WEIGHT).sum().backward()
    plain(y, WEIGHT).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert torch.autograd.gradcheck(fused, (x,), check_forward_ad=True)


def test_transforms() -> None:
    def total(function):
        return lambda x: function(x, WEIGHT).sum()

    torch.testing.assert_close(grad(total(fused))(X), grad(total(plain))(X))
    lanes = torch.stack([X, 2 * X])
    torch.testing.assert_close(vmap(fused)(lanes), vmap(plain)(lanes))
    got = vmap(grad(total(fused)))(lanes)
    torch.testing.assert_close(got, vmap(grad(total(plain)))(lanes))
    for a, b in zip(jvp(fused, (X,), (X,)), jvp(plain, (X,), (X,)), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match=r"^cubes: weight must be the same in all lanes of vmap"):
        vmap(fused, (None, 0))(X, torch.stack([WEIGHT, WEIGHT]))


def test_compile_and_the_registered_operator() -> None:
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
    for sigma in (0.5, 0.25, 2.0):
        x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
        compiled(x, WEIGHT, sigma).sum().backward()
        plain(y, WEIGHT, sigma).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    sigma = torch.tensor(0.5, dtype=torch.float64)
    opcheck(torch.ops.outside.cubes, (X.clone().requires_grad_(), WEIGHT, sigma))


def test_a_second_derivative_raises() -> None:
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^cubes: double backward is not supported"):
        first.sum().backward()


def test_a_forward_that_names_other_arguments_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^Operator: forward of wrong must take y$"):
        Operator(
            "wrong",
            [Argument("y")],
            forward=lambda x: (x,),
            backward=backward,
            jvp=tangent,
            fake=lambda y: (y,),
        )
