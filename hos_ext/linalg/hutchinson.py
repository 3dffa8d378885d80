"""Traces and diagonals from products with random signs, with the error to expect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..ops.noise import draw_uniform
from ..random import STREAM_PROBE, Key
from ..records import RowRecord, sizes

Signs: TypeAlias = Iterator[Tensor]  # probes in chunks (B, D, c)


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(RowRecord):
    """What random probes found, and what to expect of its error.

    Attributes:
        value: the estimate, a mean over probes.
        standard_error: of value, itself an estimate; zero where the value is exact. Shape of value.

    Example:
        >>> import torch
        >>> from hos_ext.linalg import ScoreHessian
        >>> hessian = ScoreHessian(lambda x: -2 * x, torch.ones(1, 3))
        >>> hessian.estimate_trace(2, seed=0)
        Estimate(1 x ())
        >>> hessian.estimate_trace(2, seed=0).value
        tensor([-6.])
    """

    value: Tensor
    standard_error: Tensor

    def _summary(self) -> str:
        return sizes(self.value)


def mean(chunks: Iterator[Tensor]) -> Estimate:
    """The mean over the last axis of all chunks, and its standard error.

    Example:
        >>> import torch
        >>> from hos_ext.linalg.hutchinson import mean
        >>> mean(iter([torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0]])])).value
        tensor([2.])
    """
    n, value, squares = 0, torch.zeros(()), torch.zeros(())
    for terms in chunks:
        m = terms.shape[-1]
        new = terms.mean(-1)
        spread = (terms - new.unsqueeze(-1)).square().sum(-1)
        if n == 0:
            value, squares = new, spread
        else:  # Chan, Golub and LeVeque: no difference of large sums
            gap = new - value
            value = value + gap * (m / (n + m))
            squares = squares + spread + gap.square() * (n * m / (n + m))
        n += m
    return Estimate(value, (squares / (n * (n - 1))).sqrt())


def exact(value: Tensor) -> Estimate:
    """A value without error."""
    return Estimate(value, torch.zeros_like(value))


def random_signs(n: int, key: Key, like: Tensor, step: int) -> Signs:
    """n vectors of random signs for points like (B, D), in chunks (B, D, c) with c <= step.

    Probe j draws with offset j, so that a row's probes depend neither on its batch nor on step.
    """
    for start in range(0, n, step):
        draws = [
            draw_uniform(key._replace(offset=j), STREAM_PROBE, like.shape, like)
            for j in range(start, min(start + step, n))
        ]
        yield torch.where(torch.stack(draws, -1) < 0.5, -1.0, 1.0).to(like.dtype)


def unit_vectors(like: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    """The unit vectors of points like (B, D) in chunks (B, D, c), with the index of the first."""
    batch, size = like.shape
    for start in range(0, size, step):
        columns = like.new_zeros((size, min(step, size - start)))
        columns[start : start + step].fill_diagonal_(1.0)
        yield start, columns.expand(batch, -1, -1)
