"""How a loss is reduced over the batch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..checks import check, show

Reduction = Literal["mean", "sum", "none"]


def check_reduction(where: str, reduction: object) -> None:
    """One of the three names."""
    known = isinstance(reduction, str) and reduction in ("mean", "sum", "none")
    check(where, known, "reduction must be 'mean', 'sum' or 'none'", lambda: show(reduction))


def reduced(loss: Tensor, reduction: Reduction) -> Tensor:
    """The mean or the sum of a loss per sample `(B,)`, or the loss itself."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def summed(entries: Tensor, reduction: Reduction) -> Tensor:
    """Sums over the entries of a sample `(B, ...)`, then over the batch as asked."""
    return reduced(entries.flatten(1).sum(1), reduction)
