"""The order of causes and effects in nonlinear models with additive noise, from diag s2.

Where x_j = f_j(parents of j) + noise_j with normal noise, d^2 log p / dx_j^2 is -1 / Var[noise_j]
minus a sum over the children of j, which depends on x where their f is nonlinear. So it is constant
exactly for what has no children: a leaf. Find it, remove it, and the rest is a model of that kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    check,
    check_callable,
    check_count,
    check_kind,
    check_like,
    check_number,
    check_tensor,
)
from ..ops._checks import check_key
from ..ops.noise import draw_normal, draw_seed
from ..random import STREAM_ORDERING, Key, seed_from
from ..scores import Model, Scores

_WHERE = "leaf_order"


@torch.no_grad()
def leaf_order(
    model: Model,
    x0: Tensor,
    sigma: float,
    *,
    rows: int = 1000,
    chunk_size: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """An order of variables in which causes come before their effects.

    Of the variables that are left, the one whose diag s2 varies least over noisy samples is the
    next leaf. Its column of x0 is then set to zero, with the noise that all columns have, and the
    same model is asked again. This mask stands for the marginal without the leaf. It is not that
    law: the model takes the zero for a value. Training on after each removal gives the marginal's
    diagonal, and made more errors for as many steps in all (docs/instruments.md).

    Each step costs one evaluation of the model at `rows` samples, and no Jacobian. For D variables
    that is D evaluations of each row, where the Jacobian of a score takes D^2.

    Args:
        model: `model(x, sigma) -> Scores` of the laws of x0 with noise. Only c is used, and a
            factor if there is one.
        x0: samples, one variable a column, in units in which all have about the same spread: a
            variance is compared with those of the others. Shape (n, D), n >= 2.
        sigma: standard deviation of the noise at which diag s2 is taken, > 0. Small against the
            noise of the variables, or leaves vary too.
        rows: how many samples, the first ones, the variance is taken over, >= 2.
        chunk_size: samples in one evaluation of the model; None: all.
        seed: key of the noise. None draws one from torch's default generator.
        generator: in place of a seed.

    Returns:
        Columns of x0, causes first. Shape (D,), int64, on the CPU.

    Raises:
        TypeError: model is not callable or does not return `Scores`.
        ValueError: x0 is not (n, D), is not finite, or has a constant column; a number out of
            range; what the model returns has another shape or is not finite.

    References:
        Rolland et al. 2022, arXiv:2203.04413, Lemma 1 and Algorithm 1 (SCORE). Sanchez et al. 2022,
        arXiv:2210.06201 (DiffAN), removes leaves from a trained network by masks.

    Example:
        x_1 = x_0^2 / 2 + noise: the exact Hessian at a little noise as the model.

        >>> import torch
        >>> from hos_ext import Scores
        >>> from hos_ext.uncertainty import leaf_order
        >>> def model(x, sigma):
        ...     cause, rest = x[:, 0], x[:, 1] - x[:, 0] ** 2 / 2
        ...     diag = torch.stack([-1 + rest - cause**2, -torch.ones_like(rest)], 1)
        ...     return Scores(torch.zeros_like(x), 1 + sigma**2 * diag)
        >>> leaf_order(model, torch.randn(100, 2), 0.1, seed=0)
        tensor([0, 1])
    """
    check_callable(_WHERE, "model", model)
    _check_samples(x0)
    sigma = check_number(_WHERE, "sigma", sigma)
    rows = check_count(_WHERE, "rows", rows, least=2)
    chunk = rows if chunk_size is None else check_count(_WHERE, "chunk_size", chunk_size)
    start, _, _ = check_key(_WHERE, seed_from(_WHERE, seed, generator), 0, 0, x0)
    start = draw_seed(_WHERE) if start is None else start
    left = torch.ones(x0.shape[1], dtype=torch.bool, device=x0.device)
    leaves: list[int] = []
    masked = x0.clone()
    while len(leaves) < x0.shape[1] - 1:
        here = Key(start, len(leaves), 0)
        variance = _variance(model, masked[:rows], sigma, chunk, here)
        leaf = int(variance.where(left, torch.inf).argmin())
        leaves.append(leaf)
        left[leaf] = False
        masked[:, leaf] = 0
    leaves.append(int(left.long().argmax()))
    return torch.tensor(leaves[::-1])


def _variance(model: Model, x0: Tensor, sigma: float, chunk: int, key: Key) -> Tensor:
    """The variance of diag s2 over noisy samples, times sigma^4. Shape (D,), float64."""
    x = x0 + sigma * draw_normal(key, STREAM_ORDERING, x0.shape, x0)
    parts = []
    for rows in x.split(chunk):
        scores = model(rows, sigma)
        check_kind(_WHERE, "what model returns", scores, Scores)
        check_like(_WHERE, "c of model", scores.c, rows)
        kappa = scores.c
        if scores.factor is not None:
            sign = 1.0 if scores.sign is None else scores.sign
            kappa = kappa + (scores.factor.square() * sign).sum(-1)
        parts.append(kappa)
    kappa = torch.cat(parts).double()
    fine = bool(kappa.isfinite().all())
    check(_WHERE, fine, "what model returns must be finite", "NaN or inf")
    return kappa.var(0)


def _check_samples(x0: Tensor) -> None:
    check_tensor(_WHERE, "x0", x0, shape=("n", "D"))
    check(_WHERE, len(x0) >= 2 and x0.shape[1], "x0 must have shape (n, D), n >= 2", x0)
    check(_WHERE, bool(x0.isfinite().all()), "x0 must be finite", "NaN or inf")
    constant = (x0 == x0[:1]).all(0)
    rule = "x0 must vary in every column"
    check(
        _WHERE, not bool(constant.any()), rule, f"column {int(constant.long().argmax())} constant"
    )
