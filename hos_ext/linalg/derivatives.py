"""Derivatives of functions of symmetric matrices, without derivatives of eigenvectors.

f(A) v is smooth in A where f is, also where eigenvalues are equal. Eigenvectors are not: autograd
through them divides by the differences of eigenvalues. With A = Q diag(l) Q^T (Daleckii and Krein)

    d f(A) = Q [Gamma * (Q^T dA Q)] Q^T,   Gamma_ij = (f(l_i) - f(l_j)) / (l_i - l_j),

and f'(l_i) where l_i = l_j. Here Q and l are constants. dA comes as a `Change`: products with
A - A.detach(), which is zero and has the derivative of A. What is built of it is added to values
that have none. First derivatives are exact in every mode; second ones raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from ..ops._operator import derivative_wanted as derivative_wanted

Change = Callable[[Tensor], Tensor]  # W (B, D, k) -> (A - A.detach()) W

# Differences of f lose digits below this distance of two eigenvalues, relative to the larger; three
# nodes of Gauss give the mean of f' between them to 1e-12 there.
_NEAR = 1e-4
_NODES = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))


# -------------------------------------------------------------------------------------- changes


def dense_change(where: str, matrix: Tensor) -> Change:
    """The change of a dense symmetric matrix (B, D, D)."""
    live = _FirstOrder.apply(matrix, where)
    difference = live - matrix.detach()
    return lambda w: difference @ w


def low_rank_change(where: str, factor: Tensor, sign: Tensor) -> Change:
    """The change of U diag(sign) U^T for U (B, D, r)."""
    still = factor.detach()
    difference: Tensor = _FirstOrder.apply(factor, where) - still

    def change(w: Tensor) -> Tensor:
        across = sign.unsqueeze(-1) * (still.mT @ w)
        return difference @ across + still @ (sign.unsqueeze(-1) * (difference.mT @ w))

    return change


def shifted_change(where: str, change: Change, level: Tensor) -> Change:
    """That of A + level I, level (B,)."""
    difference = _FirstOrder.apply(level, where) - level.detach()
    return lambda w: change(w) + difference[:, None, None] * w


# ------------------------------------------------------------------------------------ functions


def attach_values(values: Tensor, basis: Tensor, change: Change) -> Tensor:
    """Eigenvalues (B, m) with a derivative, that of q_i^T A q_i for q_i the columns of basis."""
    return attach(values, (basis * change(basis)).sum(1))


def change_of_product(
    basis: Tensor,
    values: Tensor,
    rest: Tensor | None,
    change: Change,
    function: Callable[[Tensor], Tensor],
    v: Tensor,
) -> Tensor:
    """A zero with the derivative in A of f(A) v.

    Args:
        basis, values, rest: of A, as in `Spectrum`, constants.
        change: of A. Between two vectors orthogonal to basis it is that of rest alone.
        function: f, elementwise. It sees (B, n), n of any size.
        v: shape (B, D, k).

    Returns:
        Shape (B, D, k).
    """
    moved = change(basis)
    inside = basis.mT @ moved
    along = basis.mT @ v
    pairs = _differences(function, values.unsqueeze(2), values.unsqueeze(1))
    out = basis @ ((pairs * inside) @ along)
    if rest is None:
        return out
    level = rest.unsqueeze(-1)
    edge = _differences(function, values, level).unsqueeze(-1)
    outside, left = moved - basis @ inside, v - basis @ along
    out = out + basis @ (edge * (outside.mT @ v)) + outside @ (edge * along)
    image = change(left)
    slope = _differences(function, level, level).unsqueeze(-1)
    return out + slope * (image - basis @ (basis.mT @ image))


def _differences(function: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Gamma for a and b that broadcast, in their dtype; computed in float64."""
    wide = torch.broadcast_tensors(a.double(), b.double())
    x, y = wide[0].flatten(1), wide[1].flatten(1)
    gap = x - y
    near = gap.abs() <= _NEAR * torch.maximum(x.abs(), y.abs())
    far = (function(x) - function(y)) / gap.where(~near, 1.0)
    slope = torch.zeros_like(x)
    for node, weight in _NODES:
        value, pull = vjp(function, y + node * gap)[:2]
        slope = slope + weight * pull(torch.ones_like(value))[0]
    return torch.where(near, slope, far).reshape(wide[0].shape).to(a.dtype)


# ---------------------------------------------------------------------------------- autograd nodes


def attach(value: Tensor, change: Tensor) -> Tensor:
    """value, with the derivatives of value + change."""
    return _Attach.apply(value, change)  # type: ignore[no-any-return]


def without_derivative(where: str, basis: Tensor, source: Tensor) -> Tensor:
    """Eigenvectors of source as they are: backward raises, forward mode gives NaN."""
    return _Constant.apply(basis, source, where)  # type: ignore[no-any-return]


class _Attach(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, change: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad

    @staticmethod
    def jvp(ctx: Any, value: Tensor | None, change: Tensor | None) -> Tensor | None:
        if value is None or change is None:
            return change if value is None else value
        return value + change


class _FirstOrder(torch.autograd.Function):
    """The identity, which can be differentiated once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, where: str) -> Tensor:
        return t.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.where = inputs[1]
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Once.apply(grad, ctx.saved_tensors[0], ctx.where), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
        return _Once.apply(tangent, ctx.saved_tensors[0], ctx.where)


class _Once(torch.autograd.Function):
    """A first derivative, with what it was taken in, so that a second one is seen."""

    generate_vmap_rule = True

    @staticmethod
    def forward(derivative: Tensor, source: Tensor, where: str) -> Tensor:
        return derivative.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.where = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(_SECOND.format(ctx.where))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_SECOND.format(ctx.where))


class _Constant(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(basis: Tensor, source: Tensor, where: str) -> Tensor:
        return basis.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.where = inputs[2]
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.where}: eigenvectors must not be differentiated, got a gradient for them"
            " (they have no derivative where eigenvalues are equal; spectrum_apply has)"
        )

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        return torch.full_like(ctx.saved_tensors[0], torch.nan)


_SECOND = (
    "{}: a second derivative in the matrix is not supported, got a request for the derivative of"
    " its gradient or tangent"
)
