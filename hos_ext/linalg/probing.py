"""Traces and diagonals of a matrix from a few products with it: which vectors are multiplied.

"signs"         all entries +-1: Hutchinson's mean, which assumes nothing (`hutchinson`)
"lattice"       one entry in m: for images, whose near entries alone belong together (`lattice`)
"exchangeable"  deflation by the products themselves: for fast falling spectra (`exchangeable`)

What is known of the matrix can be taken off before (`deflation`): the probes see the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from ..checks import check, check_count, check_kind, one_of
from ..random import Key
from ..scores import SymmetricOperator
from . import exchangeable, hutchinson, lattice
from .dplr import DPLR, check_whole
from .hutchinson import Estimate

Probes: TypeAlias = Literal["signs", "lattice", "exchangeable"]
_LEAST = {"signs": 2, "lattice": 3, "exchangeable": 4}  # products of which an error can be had


class _Symmetric(Protocol):
    def matvec(self, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Products:
    """A batch of square matrices, known by products with vectors.

    Attributes:
        forward: (B, D, k) -> (B, D, k).
        transposed: the same with the transpose.
        like: shape (B, D), the dtype and the device.
        dims: shape of one sample, whose product is D.
        step: vectors multiplied at once.
    """

    forward: Callable[[Tensor], Tensor]
    transposed: Callable[[Tensor], Tensor]
    like: Tensor
    dims: tuple[int, ...]
    step: int

    def less(self, part: _Symmetric) -> Products:
        """The products of the difference."""
        return replace(
            self,
            forward=lambda v: self.forward(v) - part.matvec(v),
            transposed=lambda v: self.transposed(v) - part.matvec(v),
        )


def check_probes(where: str, n_probes: object, probes: object) -> tuple[int, Probes]:
    """The kind of probes, and how many: enough for an error, and of "exchangeable" two for each."""
    kind: Probes = one_of(where, "probes", probes, _LEAST)  # type: ignore[assignment]
    count = check_count(where, "n_probes", n_probes, least=2)
    rule = f"n_probes must be at least {_LEAST[kind]} for probes={kind!r}"
    check(where, count >= _LEAST[kind], rule, count)
    even = kind != "exchangeable" or count % 2 == 0
    check(where, even, f"n_probes must be even for probes={kind!r}", count)
    return count, kind


def check_deflation(where: str, deflation: object, like: Tensor) -> None:
    """An operator on the same vectors."""
    check_kind(where, "deflation", deflation, SymmetricOperator)
    assert isinstance(deflation, SymmetricOperator)
    if isinstance(deflation, DPLR):
        check_whole(where, "deflation", deflation)
    shape = (*like.shape, like.shape[1])
    check(
        where,
        tuple(deflation.shape) == shape,
        f"deflation must have shape {shape}",
        tuple(deflation.shape),
    )
    fits = deflation.dtype == like.dtype and deflation.device == like.device
    rule = f"deflation must have dtype {like.dtype} on {like.device}"
    check(where, fits, rule, lambda: f"{deflation.dtype} on {deflation.device}")


def diagonal(
    products: Products, n: int, key: Key, kind: Probes, deflation: SymmetricOperator | None = None
) -> Estimate:
    """The diagonal from n < D products. Estimate, both of shape (B, D).

    Example:
        >>> import torch
        >>> from hos_ext import DPLR
        >>> from hos_ext.linalg.probing import Products, diagonal
        >>> from hos_ext.random import Key
        >>> matrix = DPLR(torch.tensor([[1.0, 2.0, 3.0]]))
        >>> like = torch.zeros(1, 3)
        >>> products = Products(matrix.matvec, matrix.matvec, like, (3,), 8)
        >>> diagonal(products, 2, Key(0), "signs").value
        tensor([[1., 2., 3.]])
    """
    if deflation is not None:
        found = diagonal(products.less(deflation), n, key, kind)
        return found.replace(value=found.value + deflation.diagonal())
    like, forward = products.like, products.forward
    if kind == "lattice":
        return lattice.diagonal(forward, n, key, like, products.dims, products.step)
    if kind == "exchangeable":
        return exchangeable.diagonal(forward, products.transposed, _signs(products, n // 2, key))
    return hutchinson.mean(z * forward(z) for z in _chunks(products, n, key))


def trace(
    products: Products, n: int, key: Key, kind: Probes, deflation: SymmetricOperator | None = None
) -> Estimate:
    """The trace from n < D products. Estimate, both of shape (B,).

    Example:
        >>> import torch
        >>> from hos_ext import DPLR
        >>> from hos_ext.linalg.probing import Products, trace
        >>> from hos_ext.random import Key
        >>> matrix = DPLR(torch.tensor([[1.0, 2.0, 3.0]]))
        >>> like = torch.zeros(1, 3)
        >>> products = Products(matrix.matvec, matrix.matvec, like, (3,), 8)
        >>> trace(products, 2, Key(0), "signs").value
        tensor([6.])
    """
    if deflation is not None:
        found = trace(products.less(deflation), n, key, kind)
        return found.replace(value=found.value + deflation.diagonal().sum(-1))
    if kind == "lattice":
        return lattice.trace(diagonal(products, n, key, kind))
    if kind == "exchangeable":
        return exchangeable.trace(products.forward, _signs(products, n // 2, key))
    return hutchinson.mean((z * products.forward(z)).sum(1) for z in _chunks(products, n, key))


def _chunks(products: Products, n: int, key: Key) -> hutchinson.Signs:
    return hutchinson.random_signs(n, key, products.like, products.step)


def _signs(products: Products, n: int, key: Key) -> Tensor:
    """All at once: what deflates keeps its vectors. Shape (B, D, n)."""
    return torch.cat(list(_chunks(products, n, key)), -1)
