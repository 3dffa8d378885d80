"""Which rows are held out, and the order in which the others are visited."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...random import STREAM_ORDER, STREAM_SPLIT


class Parts(NamedTuple):
    """Row numbers of the parts, int64; `train` is None where the data are a stream.

    Those of `test` count rows of the test set where that is a set of its own.
    """

    train: Tensor | None
    validation: Tensor
    test: Tensor


def split_rows(where: str, n: int, seed: int, validation: int, test: int) -> Parts:
    """Disjoint rows at random."""
    if validation + test >= n:
        raise too_few(where, n, validation, test)
    order = random_order(n, seed)
    test += validation
    return Parts(order[test:], order[:validation], order[validation:test])


def default_held(n: int) -> int:
    """Rows of a part where the user does not say: a twentieth of all, at most 1000."""
    return max(1, min(1000, n // 20))


def random_order(n: int, seed: int) -> Tensor:
    """All rows in the order of the split."""
    u = ops.uniform((n,), seed=seed, stream=STREAM_SPLIT, dtype=torch.float64)
    return u.argsort(stable=True)


def too_few(where: str, n: int, validation: int, test: int) -> ValueError:
    """The error of parts that leave nothing to train on."""
    return ValueError(
        f"{where}: validation and test must be at least 1 and sum to less than {n}, got "
        f"{validation} and {test}"
    )


def batch_rows(
    n: int, batch_size: int, *, seed: int, step: int, start: int = 0, stop: int | None = None
) -> Tensor:
    """Rows of the batch of `step` >= 0: a fresh permutation of 0 ... n - 1 for each epoch.

    Args:
        n: rows to choose from.
        batch_size: rows of the global batch; it may pass the end of an epoch.
        seed: of the permutations.
        step: counts batches.
        start: first row of the share of the batch that is wanted.
        stop: one past its last row; the end of the batch by default.

    Returns:
        Shape (stop - start,), int64.

    Example:
        >>> import torch
        >>> from hos_ext.app.data import batch_rows
        >>> epoch = torch.cat([batch_rows(6, 2, seed=0, step=step) for step in range(3)])
        >>> epoch.sort().values
        tensor([0, 1, 2, 3, 4, 5])
    """
    first = step * batch_size + start
    last = step * batch_size + (batch_size if stop is None else stop)
    pieces = [
        _epoch_order(n, seed, epoch)[max(first - epoch * n, 0) : last - epoch * n]
        for epoch in range(first // n, last // n + 1)
    ]
    return torch.cat(pieces)


@lru_cache(maxsize=2)  # two epochs meet in one batch; sorting 60,000 takes 5 ms
def _epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    u = ops.uniform((n,), seed=seed, offset=epoch, stream=STREAM_ORDER, dtype=torch.float64)
    return u.argsort(stable=True)  # 60,000 of 2^32 values may tie; else ranks might disagree
