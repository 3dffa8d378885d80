"""Moments and cumulants of every order, from the scores s1, ..., sk of the noisy density.

Setting: x = alpha x0 + sigma z with z standard normal; s_j is the j-th derivative of log p(x), the
density of the noisy sample. Given x, the law of x0 is an exponential family (Lemma 1 of Meng et al.
2021, arXiv:2111.04726): its cumulants are the scores, but for a scale and two known terms.

Tensors of orders 1, 2, ... come in lists of one form:
    dense        (B, D), (B, D, D), ..., for small D;
    diagonal     the entries i, ii, iii, ..., each of the shape of x;
    directional  each (B, m): one of m directions put into every index.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from ..checks import (
    check,
    check_callable,
    check_count,
    check_flag,
    check_like,
    check_samples,
    check_tensor,
    positive,
    said_by,
)
from ..conditions import Conditions, check_conditions, condition_rows
from ..scores import tweedie_covariance, tweedie_mean


def posterior_cumulants(
    x: Tensor,
    scores: list[Tensor],
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    directions: Tensor | None = None,
) -> list[Tensor]:
    """Cumulants of the clean sample given the noisy one, of every order up to k.

    The cumulant of order j is (sigma^2 / alpha)^j times the j-th derivative of
    log p(x) + |x|^2 / (2 sigma^2). The first two are the mean and the covariance of
    `hos_ext.tweedie.posterior`; from the third order on it is (sigma^2 / alpha)^j s_j.

    Args:
        x: the noisy sample. Shape (B, *dims). float32 or float64.
        scores: [s1, ..., sk] at x, k >= 1, dtype and device of x, units 1/data^j, in one form.
            Dense: s_j of shape (B, D, ..., D) with j axes D, in row-major order of dims.
            Diagonal: the entries s_j[i, ..., i]. Shape (B, *dims).
            Directional: s_j[v, ..., v] for each direction v. Shape (B, m).
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.
        directions: the directions v, of any length, for the directional form. Shape (B, m, D).

    Returns:
        The cumulants of orders 1 to k in the form of the scores (directional: those of <v, x0>).
        Units data^j.

    Raises:
        TypeError: scores is not a list of tensors.
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.

    References:
        Meng et al. 2021, arXiv:2111.04726, Eq. 4, 18, Lemma 1 and Theorem 3, with alpha.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import posterior_cumulants
        >>> x = torch.tensor([[2.0]])
        >>> mean, variance = posterior_cumulants(x, [-x / 8, torch.full((1, 1), -0.125)], sigma=2.0)
        >>> mean, variance
        (tensor([[1.]]), tensor([[2.]]))
    """
    where = "posterior_cumulants"
    check_samples(where, "x", x)
    start = x if directions is None else project(where, x, directions)
    dense = is_dense(where, "scores", scores, start, directions is not None)
    s = positive(where, "sigma", sigma, x)
    a = positive(where, "alpha", alpha, x)
    squared = None if directions is None else directions.square().sum(-1)
    cumulants = _cumulants(scores, s, a, dense, squared)
    noisy = start.reshape(scores[0].shape)
    cumulants[0] = cumulants[0] + noisy / _column(a, noisy)
    return cumulants


def noise_cumulants(
    scores: list[Tensor], sigma: float | Tensor, *, directions: Tensor | None = None
) -> list[Tensor]:
    """Cumulants of the noise z given the noisy sample: (-sigma)^j s_j, and + I at order 2.

    They do not depend on alpha.

    Args:
        scores: [s1, ..., sk] as in `posterior_cumulants`. Units 1/data^j.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        directions: shape (B, m, D), for the directional form.

    Returns:
        Cumulants of orders 1 to k, in the form of the scores. No units.

    Raises:
        TypeError: scores is not a list of tensors.
        ValueError: shapes, dtypes or devices disagree; sigma is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import noise_cumulants
        >>> noise_cumulants([torch.tensor([[-0.25]]), torch.tensor([[-0.125]])], sigma=2.0)
        [tensor([[0.5000]]), tensor([[0.5000]])]
    """
    where = "noise_cumulants"
    start = _first_order(where, "scores", scores)
    check_samples(where, "scores[0]", start)
    dense = is_dense(where, "scores", scores, start, directions is not None)
    squared = None
    if directions is not None:
        check_tensor(where, "directions", directions, like=start, shape=(*start.shape, "D"))
        squared = directions.square().sum(-1)
    s = positive(where, "sigma", sigma, start)
    # -sigma in place of alpha makes those of x0 into those of z, but for x / alpha in the mean.
    return _cumulants(scores, s, -s, dense, squared)


def moments_from_cumulants(cumulants: list[Tensor], *, central: bool = False) -> list[Tensor]:
    """Moments m_1, ..., m_k from cumulants kappa_1, ..., kappa_k, for any k.

    m_n is the sum over all partitions of its n indices of the product of the cumulants of the
    blocks; elementwise m_n = sum_j C(n - 1, j - 1) kappa_j m_(n - j).

    Args:
        cumulants: dense, (B, D), (B, D, D), ..., or elementwise, all of one shape. float32 or
            float64.
        central: moments about the mean: the first is 0, the second kappa_2, the third kappa_3.

    Returns:
        [m_1, ..., m_k] in the shapes of the cumulants.

    Raises:
        TypeError: cumulants is not a list of tensors.
        ValueError: shapes, dtypes or devices disagree.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import moments_from_cumulants
        >>> moments_from_cumulants([torch.tensor([[1.0]]), torch.tensor([[2.0]])])
        [tensor([[1.]]), tensor([[3.]])]
    """
    where = "moments_from_cumulants"
    check_flag(where, central=central)
    mean = _first_order(where, "cumulants", cumulants)
    dense = is_dense(where, "cumulants", cumulants, mean, False)
    if central:
        cumulants = [torch.zeros_like(mean), *cumulants[1:]]
    return bell(cumulants, len(cumulants), dense)


def psi_from_scores(scores: list[Tensor]) -> list[Tensor]:
    """psi_j = (D^j p) / p for j = 1 to k, from s1, ..., sk: psi_1 = s1, psi_2 = s2 + s1 s1^T, ...

    Derivatives of p and of log p are related as moments and cumulants are. psi_k is what the
    order-k loss matches: E[He_k(z) | x] = (-sigma)^k psi_k.

    Args:
        scores: [s1, ..., sk], dense, (B, D), (B, D, D), ..., or elementwise (diagonal,
            directional), all of one shape. float32 or float64. Units 1/data^j.

    Returns:
        [psi_1, ..., psi_k] in the shapes of the scores.

    Raises:
        TypeError: scores is not a list of tensors.
        ValueError: shapes, dtypes or devices disagree.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import psi_from_scores
        >>> psi_from_scores([torch.tensor([[2.0]]), torch.tensor([[-1.0]])])
        [tensor([[2.]]), tensor([[3.]])]
    """
    where = "psi_from_scores"
    score = _first_order(where, "scores", scores)
    return bell(scores, len(scores), is_dense(where, "scores", scores, score, False))


def posterior_moments(
    x: Tensor,
    scores: list[Tensor],
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    central: bool = False,
    directions: Tensor | None = None,
) -> list[Tensor]:
    """Moments of the clean sample given the noisy one, E[x0 (x) ... (x) x0 | x], orders 1 to k.

    Args:
        x, scores, sigma, alpha, directions: as `posterior_cumulants`.
        central: moments about the posterior mean; the first is 0.

    Returns:
        [m_1, ..., m_k] in the form of the scores (diagonal: E[x0_i^j | x]; directional:
        E[<v, x0>^j | x]). Units data^j.

    Raises:
        TypeError: scores is not a list of tensors.
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import posterior_moments
        >>> x = torch.tensor([[2.0]])
        >>> posterior_moments(x, [-x / 8, torch.full((1, 1), -0.125)], sigma=2.0)
        [tensor([[1.]]), tensor([[3.]])]
    """
    where = "posterior_moments"
    check_flag(where, central=central)
    with said_by(where, "posterior_cumulants"):
        cumulants = posterior_cumulants(x, scores, sigma, alpha, directions=directions)
    return moments_from_cumulants(cumulants, central=central)


def moment_recurrence(
    score_fn: Callable[..., Tensor],
    x: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    order: int,
    model_kwargs: Conditions | None = None,
) -> list[Tensor]:
    """Posterior moments by differentiating the posterior mean (Lemma 1, Theorem 3).

    m_(n + 1) = (sigma^2 / alpha) D m_n + m_n (x) m_1 with m_n = E[x0 (x) ... (x) x0 | x], D by
    reverse-mode autodiff, one level for each order: for small D, and to check learned s_k.

    Args:
        score_fn: `score_fn(x) -> s1` for the noisy density at sigma, row by row, differentiable
            under `torch.func`. Shapes (B, *dims) to (B, *dims).
        x: the noisy sample. Shape (B, *dims). float32 or float64.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.
        order: the highest order, >= 1.
        model_kwargs: conditions, such as class labels: `score_fn(x, **model_kwargs)`, with one row
            for each sample in each tensor.

    Returns:
        [m_1, ..., m_order], dense: (B, D), (B, D, D), ... Units data^j.

    Raises:
        TypeError: order is not an int.
        ValueError: shapes, dtypes or devices disagree; order, sigma or alpha is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import moment_recurrence
        >>> moment_recurrence(lambda x: -x / 8, torch.tensor([[2.0]]), 2.0, order=2)
        [tensor([[1.]]), tensor([[[3.]]])]
    """
    where = "moment_recurrence"
    check_samples(where, "x", x)
    order = check_count(where, "order", order)
    check_callable(where, "score_fn", score_fn)
    conditions = check_conditions(where, model_kwargs, len(x))
    check_like(where, "score_fn(x)", score_fn(x, **conditions), x)
    flat = x.flatten(1)
    s, a = (
        positive(where, name, value, x).reshape(-1).expand(x.shape[0])
        for name, value in (("sigma", sigma), ("alpha", alpha))
    )
    if x.shape[0] == 0:  # jacrev cannot shape the rows of none
        return [flat.new_zeros((0, *[flat.shape[1]] * n)) for n in range(1, order + 1)]

    def mean(row: Tensor, s: Tensor, a: Tensor, number: Tensor) -> Tensor:
        own = condition_rows(conditions, number.reshape(1))
        score = score_fn(row.reshape(1, *x.shape[1:]), **own).reshape(-1)
        return tweedie_mean(row, score, s, a)

    def raised(moment: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def next_moment(row: Tensor, s: Tensor, a: Tensor, number: Tensor) -> Tensor:
            derivative = jacrev(moment)(row, s, a, number)
            product = moment(row, s, a, number).unsqueeze(-1) * mean(row, s, a, number)
            value: Tensor = s.square() / a * derivative + product
            return value

        return next_moment

    numbers = torch.arange(len(x), device=x.device)
    moment, moments = mean, [vmap(mean)(flat, s, a, numbers)]
    for _ in range(order - 1):
        moment = raised(moment)
        moments.append(vmap(moment)(flat, s, a, numbers))
    return moments


# ----------------------------------------------------------------------------------------- pieces


def bell(cumulants: list[Tensor], order: int, dense: bool) -> list[Tensor]:
    """Complete Bell polynomials of orders 1 to `order`; cumulants that are not given are zero.

    The block that holds the last index has j - 1 others: elementwise C(n - 1, j - 1) equal terms.
    Dense tensors may have any leading axes, as many as the first has beside its last.
    """
    moments: list[Tensor] = []
    for n in range(1, order + 1):
        terms = [cumulants[n - 1]] if n <= len(cumulants) else []
        for j, cumulant in enumerate(cumulants[: n - 1], 1):
            if dense:
                terms += _products(cumulant, moments[n - j - 1], n, j)
            else:
                terms.append(math.comb(n - 1, j - 1) * cumulant * moments[n - j - 1])
        moments.append(sum(terms[1:], terms[0]))
    return moments


def _products(cumulant: Tensor, moment: Tensor, n: int, j: int) -> list[Tensor]:
    """cumulant (x) moment, the j axes of cumulant at every choice of j out of n with the last."""
    lead = cumulant.dim() - j
    left = cumulant.reshape(*cumulant.shape, *[1] * (n - j))
    outer = left * moment.reshape(*moment.shape[:lead], *[1] * j, *moment.shape[lead:])
    source = list(range(lead, lead + n))
    terms = []
    for others in combinations(range(n - 1), j - 1):
        block = (*others, n - 1)
        rest = [i for i in range(n) if i not in block]
        terms.append(outer.movedim(source, [lead + i for i in (*block, *rest)]))
    return terms


def is_dense(
    where: str, name: str, values: Any, like: Tensor, directional: bool, points: int = 0
) -> bool:
    """Whether a list of tensors of orders 1, 2, ... is dense or elementwise; any other is refused.

    like `(B, *dims)` has the elementwise shape; dense is `(B, D)`, `(B, D, D)`, ..., and never
    directional. With points, every shape has that axis in front.
    """
    _first_order(where, name, values)
    for j, value in enumerate(values):
        check_tensor(where, f"{name}[{j}]", value, like=like)
    shapes = [tuple(value.shape) for value in values]
    front = (points,) if points else ()
    elementwise = (*front, *like.shape)
    if all(shape == elementwise for shape in shapes):
        return False
    lead, size = (*front, *like.shape[:1]), like.shape[1:].numel()
    dense = [(*lead, *[size] * j) for j in range(1, len(shapes) + 1)]
    if shapes == dense and not directional:
        return True
    rule = f"all {elementwise}"
    if not directional:
        rule += f" (diagonal) or {', '.join(map(str, dense))} (dense)"
    raise ValueError(f"{where}: {name} must have shapes {rule}, got {', '.join(map(str, shapes))}")


def project(where: str, x: Tensor, directions: Tensor) -> Tensor:
    """<v, x> for directions v (B, m, D), shape (B, m)."""
    rows, size = x.shape[0], x.shape[1:].numel()
    check_tensor(where, "directions", directions, like=x, shape=(rows, "m", size))
    return (directions * x.reshape(rows, 1, size)).sum(-1)  # autocast would halve a matmul


def _first_order(where: str, name: str, values: Any) -> Tensor:
    """The tensor of order 1 of a list of tensors."""
    rule = f"{name} must be a list of Tensors of orders 1, 2, ..."
    check(where, isinstance(values, (list, tuple)), rule, type(values).__name__, TypeError)
    check(where, len(values) > 0, f"{name} must hold at least the first order", "none")
    check_tensor(where, f"{name}[0]", values[0])
    one: Tensor = values[0]
    return one


def _cumulants(
    scores: list[Tensor],
    sigma: Tensor,
    alpha: Tensor,
    dense: bool,
    squared: Tensor | None,
) -> list[Tensor]:
    """(sigma^2 / alpha)^j s_j, but at order 2 Tweedie's covariance, in the form of the scores.

    The identity of order 2 is I, 1, or |v|^2 (`squared`) along directions v.
    """
    unit = sigma.square() / alpha
    cumulants = [_column(unit, s) ** j * s for j, s in enumerate(scores, 1)]
    if len(cumulants) > 1:
        two = scores[1]
        identity: float | Tensor = 1.0 if squared is None else squared
        if dense:
            identity = torch.eye(two.shape[-1], dtype=two.dtype, device=two.device)
        levels = _column(sigma, two), _column(alpha, two)
        cumulants[1] = tweedie_covariance(two, identity, *levels)
    return cumulants


def _column(value: Tensor, like: Tensor) -> Tensor:
    """A value of `positive`, shaped to broadcast against another tensor of the same batch."""
    return value.reshape(-1, *[1] * (like.dim() - 1)) if value.dim() else value
