"""Sums of precisions of matrices diagonal plus low rank, and what they are the precision of.

A `Precision` has a weight of its own for each column of each sample, which a `DPLR` has not: an
inverse is one whatever the signs. All rests on one eigenproblem of at most min(D, R) columns. With
V = columns / sqrt(diag) and V diag(weights) V^T = Q diag(lam) Q^T,

    M = sqrt(diag) (I + Q diag(lam) Q^T) sqrt(diag),
    M^-1 = 1 / diag - Q' diag(lam / (1 + lam)) Q'^T,   Q' = Q / sqrt(diag).

With at least D columns the matrix itself is no larger than they, and is decomposed in its place.
Everything is in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dplr import DPLR

_LEAST = 1e-12  # of the diagonal that is left of a difference, over what it was left from


class Precision(NamedTuple):
    """diag + columns diag(weights) columns^T for each sample, of any leading axes.

    Attributes:
        diag: shape (..., D). float64.
        columns: shape (..., D, R).
        weights: shape (..., R), of either sign.
    """

    diag: Tensor
    columns: Tensor
    weights: Tensor

    def times(self, v: Tensor) -> Tensor:
        """The product with v (..., D)."""
        inner = self.weights * (self.columns.mT @ v.unsqueeze(-1)).squeeze(-1)
        return self.diag * v + (self.columns @ inner.unsqueeze(-1)).squeeze(-1)

    def scaled(self, a: float) -> Precision:
        """a times the matrix."""
        return Precision(a * self.diag, self.columns, a * self.weights)

    def plus(self, other: Precision) -> Precision:
        """The sum: columns stand side by side."""
        columns = torch.cat([self.columns, other.columns], -1)
        weights = torch.cat([self.weights, other.weights], -1)
        return Precision(self.diag + other.diag, columns, weights)

    def summed(self) -> Precision:
        """The sum over the first axis, whose columns come side by side."""
        columns = self.columns.movedim(0, -2).flatten(-2)
        return Precision(self.diag.sum(0), columns, self.weights.movedim(0, -2).flatten(-2))

    def full(self) -> bool:
        """Whether there are at least D columns."""
        return self.columns.shape[-1] >= self.columns.shape[-2]

    def under(self, scale: Tensor) -> Tensor:
        """The matrix itself, rows and columns over the scale (..., D). Shape (..., D, D)."""
        columns = self.columns / scale.unsqueeze(-1)
        low_rank = (columns * self.weights.unsqueeze(-2)) @ columns.mT
        return low_rank + torch.diag_embed(self.diag / scale.square())


def precision_of(diag: Tensor, factor: Tensor, sign: Tensor | None) -> tuple[Precision, Tensor]:
    """The inverse of diag + factor diag(sign) factor^T, and where that is positive definite.

    Args:
        diag: shape (..., D); where one is not positive, the second result is false.
        factor: shape (..., D, r).
        sign: shape (r,), or None.

    Returns:
        The inverse, and a boolean tensor of the leading axes. Where it is false the inverse is of
        no use.
    """
    wide, columns = diag.double(), factor.double()
    weights = columns.new_ones(columns.shape[-1]) if sign is None else sign.double()
    weights = weights.expand(*columns.shape[:-2], -1)
    positive = wide > 0
    whole = Precision(wide.where(positive, 1.0), columns, weights)
    basis, lam = _whitened(whole)
    columns = basis / whole.diag.sqrt().unsqueeze(-1)
    fine = positive.all(-1) & (lam > -1).all(-1)
    return Precision(1 / whole.diag, columns, -lam / (1 + lam)), fine


def at_least(total: Precision, prior: Precision, n: int, share: float) -> Precision:
    """total + (1 - n) prior, or what is not below share * prior where that is.

    The difference of the two is rest = total + (1 - n - share) prior. With at least D columns its
    eigenvalues, its rows and columns over the diagonal part of total, are kept from below 0. With
    fewer, rest = sqrt(d) (I + Q diag(lam) Q^T) sqrt(d), in which d is kept above 0 first and then
    lam above -1.

    Args:
        total: the sum of n precisions, whose diagonal part is > 0.
        prior: a precision, positive definite.
        n: how many were summed.
        share: of the prior that is left at least, > 0.
    """
    rest, bound = total.plus(prior.scaled(1 - n - share)), prior.scaled(share)
    if rest.full():
        root = total.diag.sqrt()
        lam, basis = torch.linalg.eigh(rest.under(root))
        kept = Precision(torch.zeros_like(root), basis * root.unsqueeze(-1), lam.clamp_min(0.0))
        return bound.plus(kept)
    rest = rest._replace(diag=rest.diag.maximum(_LEAST * total.diag))
    basis, lam = _whitened(rest)
    columns = basis * rest.diag.sqrt().unsqueeze(-1)
    return bound.plus(Precision(rest.diag, columns, lam.clamp_min(-1.0)))


def covariance_of(precision: Precision, plain: bool) -> tuple[DPLR, Tensor]:
    """The inverse as a DPLR, and where it is positive definite; leading axes (B,).

    Args:
        precision: with fewer than D columns, where its diag is not positive the second result is
            false.
        plain: no weight is positive. Else, with fewer than D columns, the DPLR has columns of both
            signs, of which half are zero.
    """
    if precision.full():
        return _inverse_of_full(precision)
    positive = precision.diag > 0
    whole = precision._replace(diag=precision.diag.where(positive, 1.0))
    basis, lam = _whitened(whole)
    fine = positive.all(-1) & (lam > -1).all(-1)
    gain = (-lam / (1 + lam)).where(fine.unsqueeze(-1), 0.0)
    columns = basis / whole.diag.sqrt().unsqueeze(-1)
    plus = columns * gain.clamp_min(0).sqrt().unsqueeze(-2)
    if plain:
        return DPLR.of(1 / whole.diag, plus), fine
    minus = columns * (-gain).clamp_min(0).sqrt().unsqueeze(-2)
    sign = columns.new_ones(columns.shape[-1])
    factor = torch.cat([plus, minus], -1)
    return DPLR.of(1 / whole.diag, factor, torch.cat([sign, -sign])), fine


def _inverse_of_full(precision: Precision) -> tuple[DPLR, Tensor]:
    """The least eigenvalue of the inverse goes to its diagonal, so that nothing is subtracted."""
    ones = torch.ones_like(precision.diag)
    diagonal = precision.under(ones).diagonal(dim1=-2, dim2=-1)
    scale = diagonal.where(diagonal > 0, 1.0).sqrt()
    lam, basis = torch.linalg.eigh(precision.under(scale))
    fine = (diagonal > 0).all(-1) & (lam[..., 0] > 0)
    inverse = 1 / lam.where(fine.unsqueeze(-1), 1.0)
    least = inverse[..., -1:]
    gain = (inverse - least).clamp_min(0).sqrt()
    factor = basis / scale.unsqueeze(-1) * gain.unsqueeze(-2)
    return DPLR.of(least / scale.square(), factor), fine


def _whitened(matrix: Precision) -> tuple[Tensor, Tensor]:
    """Q (..., D, k) and lam (..., k), k = min(D, R), of a matrix with positive diag."""
    columns = matrix.columns / matrix.diag.sqrt().unsqueeze(-1)
    if columns.shape[-1] == 0:
        return columns, matrix.weights
    if matrix.full():
        lam, basis = torch.linalg.eigh((columns * matrix.weights.unsqueeze(-2)) @ columns.mT)
        return basis, lam
    frame, upper = torch.linalg.qr(columns)
    lam, turn = torch.linalg.eigh((upper * matrix.weights.unsqueeze(-2)) @ upper.mT)
    return frame @ turn, lam
