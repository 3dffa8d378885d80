"""Traces and diagonals by deflation in which every probe takes each part in turn: XTrace, XDiag.

Of k probes W the images Y = A W span most of the range of A, if its spectrum falls fast. With
Q_i an orthonormal basis of all images but the i-th, A = Q_i Q_i^T A + (I - Q_i Q_i^T) A: the
first part takes products with Q alone, and of the second the i-th probe, which Q_i does not know,
gives an unbiased estimate. The result is the mean over i. The k bases come from one: the part of
Q's range that Q_i lacks is one direction Q s_i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .hutchinson import Estimate, mean

Product: TypeAlias = Callable[[Tensor], Tensor]


def diagonal(product: Product, transposed: Product, probes: Tensor) -> Estimate:
    """XDiag: the mean over i of diag(Q_i Q_i^T A) + w_i * (I - Q_i Q_i^T) A w_i.

    Args:
        product: (B, D, k) -> (B, D, k), products with A, which need not be symmetric.
        transposed: products with A^T.
        probes: W, random signs. Shape (B, D, k), 2 <= k <= D.

    Returns:
        Estimate, both of shape (B, D). The k terms share most of their probes, so that their
        spread is only about the error of the mean.

    References:
        Epperly, Tropp and Webber 2024, arXiv:2301.07825, XDiag.

    Example:
        >>> import torch
        >>> from hos_ext.linalg.exchangeable import diagonal
        >>> a = torch.ones(1, 3, 3, dtype=torch.float64)  # of rank 1
        >>> signs = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]], dtype=torch.float64)
        >>> found = diagonal(lambda v: a @ v, lambda v: a.mT @ v, signs)
        >>> torch.allclose(found.value, torch.ones(1, 3, dtype=torch.float64))
        True
    """
    images = product(probes)
    basis, lacking = _bases(images)
    rows = transposed(basis)  # (Q^T A)^T
    shared = (basis * rows).sum(-1, keepdim=True) - (basis @ lacking) * (rows @ lacking)
    inner = rows.mT @ probes  # Q^T A w
    rest = images - basis @ _without(lacking, inner)
    return mean(iter([shared + probes * rest]))


def trace(product: Product, probes: Tensor) -> Estimate:
    """XTrace: the mean over i of tr(Q_i^T A Q_i) + u_i^T A u_i with u_i = (I - Q_i Q_i^T) w_i.

    Args:
        product: (B, D, k) -> (B, D, k), products with A, which need not be symmetric.
        probes: W, random signs. Shape (B, D, k), 2 <= k <= D.

    Returns:
        Estimate, both of shape (B,).

    References:
        Epperly, Tropp and Webber 2024, arXiv:2301.07825, XTrace.

    Example:
        >>> import torch
        >>> from hos_ext.linalg.exchangeable import trace
        >>> a = torch.ones(1, 3, 3, dtype=torch.float64)
        >>> signs = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]], dtype=torch.float64)
        >>> torch.allclose(trace(lambda v: a @ v, signs).value, torch.tensor(3.0).double())
        True
    """
    images = product(probes)
    basis, lacking = _bases(images)
    moved = product(basis)  # A Q
    inner = basis.mT @ moved  # Q^T A Q
    whole = inner.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True)
    known = whole - (lacking * (inner @ lacking)).sum(1)
    seen = _without(lacking, basis.mT @ probes)
    left = probes - basis @ seen
    return mean(iter([known + (left * (images - moved @ seen)).sum(1)]))


def _bases(images: Tensor) -> tuple[Tensor, Tensor]:
    """Q (B, D, k), and as columns (B, k, k) the unit vectors s_i: Q_i Q_i^T = Q (I - s s^T) Q^T.

    s_i is orthogonal to all columns of R but the i-th. Of each such set of columns a full QR gives
    it, also where images depend on one another and R has no inverse.
    """
    basis, corner = torch.linalg.qr(images)
    count = corner.shape[-1]
    others = torch.stack(
        [torch.cat([corner[..., :i], corner[..., i + 1 :]], -1) for i in range(count)], 1
    )
    return basis, torch.linalg.qr(others, mode="complete")[0][..., -1].mT


def _without(lacking: Tensor, columns: Tensor) -> Tensor:
    """(I - s_i s_i^T) of the i-th column. Shape (B, k, k)."""
    return columns - lacking * (lacking * columns).sum(1, keepdim=True)
