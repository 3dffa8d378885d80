"""A positive definite DPLR in place of a covariance, from its leading eigenpairs and the rest."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..checks import check, check_number, check_tensor, one_of
from .dplr import DPLR

Remainder = Literal["isotropic", "diagonal"]


def truncated(
    values: Tensor,
    vectors: Tensor,
    rest: Tensor,
    *,
    remainder: Remainder = "isotropic",
    floor: float = 1e-2,
    where: str = "truncated",
) -> DPLR:
    """A covariance A of rank k plus a remainder. The trace stays that of A, but for a floor.

    With the eigenpairs V diag(l) V^T and R = A - V diag(l) V^T:
        "isotropic"  V diag(l - rest) V^T + rest I, rest = tr R / (D - k): keeps the eigenpairs;
        "diagonal"   V diag(l) V^T + diag(R): keeps the variance of each entry instead.
    rest and the entries of diag(R) are kept above a floor. What it adds to entries the others lose;
    where they have not enough, the remainder is "isotropic" at the floor, which adds to the trace.
    Pairs with l < rest count to the rest. At k = D there is no remainder: the result is A if all l
    are positive.

    Args:
        values: l, descending. Shape (B, k).
        vectors: V, orthonormal columns. Shape (B, D, k).
        rest: the diagonal of R. Shape (B, D).
        remainder: "isotropic" or "diagonal".
        floor: of the remainder, over the mean variance tr A / D. In [0, 1).
        where: the function named in errors.

    Returns:
        DPLR (B, D, D).

    Raises:
        ValueError: a trace that is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.linalg.truncation import truncated
        >>> vectors, rest = torch.tensor([[[1.0], [0.0], [0.0]]]), torch.tensor([[0.0, 1.0, 3.0]])
        >>> truncated(torch.tensor([[5.0]]), vectors, rest).diagonal()
        tensor([[5., 2., 2.]])
        >>> truncated(torch.tensor([[5.0]]), vectors, rest, remainder="diagonal", floor=0.0).diag
        tensor([[0., 1., 3.]])
    """
    check_tensor(where, "rest", rest, shape=("B", "D"))
    batch, size = rest.shape
    check_tensor(where, "values", values, like=rest, shape=(batch, "k"))
    check_tensor(where, "vectors", vectors, like=rest, shape=(batch, size, values.shape[1]))
    check_truncation(where, remainder, floor)
    for name, given in (("values", values), ("rest", rest)):
        check(where, bool(given.isfinite().all()), f"{name} must be finite", "NaN or inf")
    total = rest.sum(-1, keepdim=True)
    trace = total + values.sum(-1, keepdim=True)
    check(
        where,
        bool((trace > 0).all()),
        "the matrix must be a covariance",
        lambda: f"a trace of {float(trace.min()):g}",
    )
    least = floor * trace / size
    # The level at which sum_i max(l_i, level) + (D - k) level is the trace: the least of those
    # that keep the j leading pairs alone.
    kept = torch.cat([torch.zeros_like(total), values.cumsum(-1)], -1)[:, :size]
    others = torch.arange(size, size - kept.shape[-1], -1, device=rest.device)
    level = ((trace - kept) / others).amin(-1, keepdim=True)
    if values.shape[-1] == size:
        least = least.minimum(level.where(level > 0, least))
    level = torch.maximum(level, least)
    diag, weight = level.expand(-1, size), (values - level).clamp_min(0)
    if remainder == "diagonal":
        raised = torch.maximum(rest, least)
        # What the floor added is taken from the other entries, if they have it.
        spare = (raised - least).sum(-1, keepdim=True)
        share = (total - size * least) / spare.where(spare > 0, 1.0)
        enough = (total > size * least) & (values.shape[-1] < size)
        diag = torch.where(enough, least + (raised - least) * share, diag)
        weight = torch.where(enough, values.clamp_min(0), weight)
    return DPLR.of(diag, vectors * _root(weight))


def check_truncation(where: str, remainder: object, floor: object) -> None:
    """The form of the remainder, and how low it may get."""
    one_of(where, "remainder", remainder, ("isotropic", "diagonal"))
    number = check_number(where, "floor", floor, positive=False)
    check(where, number < 1, "floor must be in [0, 1)", f"{number:g}")


def _root(values: Tensor) -> Tensor:
    """Square roots of (B, k), as weights of columns."""
    return values.sqrt().unsqueeze(1)
