"""The measurement y = A x0 + n of an inverse problem, and the checks of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..checks import check, check_kind, check_number, check_samples, check_tensor
from ..linalg.dplr import DPLR
from ..ops.noise import draw_normal
from ..random import STREAM_ADJOINT, Key
from ..tweedie.posterior import Posterior, check_posterior

# A matrix (m, D), a boolean mask of shape dims, or (A x, A^T y) on batches.
Measurement: TypeAlias = Tensor | tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class Problem(NamedTuple):
    """A measurement that has been checked by itself."""

    y: Tensor  # (B or 1, *ydims)
    operator: Measurement  # a matrix in float64
    variance: Tensor  # of each measurement, (m,), float64

    def forward(self, where: str, v: Tensor) -> Tensor:
        """A v, flattened, for v (B, *dims); float64 where A is a matrix."""
        if not isinstance(self.operator, Tensor):
            out = self.operator[0](v)
            shape = (len(v), *self.y.shape[1:])
            check_tensor(where, "matvec(x)", out, like=self.y, shape=shape, because=" like y")
            return out.flatten(1)
        if self.operator.dtype == torch.bool:
            return v[:, self.operator]
        return v.double().flatten(1) @ self.operator.mT

    def adjoint(self, where: str, u: Tensor, dims: tuple[int, ...] | None) -> Tensor:
        """A^T u as functions give it, (B, *dims), for u (B, m); dims of None: not known yet."""
        assert isinstance(self.operator, tuple)
        out = self.operator[1](u.reshape(len(u), *self.y.shape[1:]))
        shape = None if dims is None else (len(u), *dims)
        check_tensor(where, "rmatvec(y)", out, like=self.y, shape=shape)
        return out


def problem_of(where: str, y: Tensor, operator: Measurement, noise_std: float | Tensor) -> Problem:
    """All checks that need no x."""
    check_samples(where, "y", y)
    if isinstance(operator, Tensor):
        _check_dense_operator(where, y, operator)
    else:
        pair = isinstance(operator, tuple) and len(operator) == 2 and all(map(callable, operator))
        rule = "operator must be a matrix, a boolean mask or two functions (matvec, rmatvec)"
        check(where, pair, rule, type(operator).__name__, TypeError)
    finite = y.isfinite()
    check(where, bool(finite.all()), "y must be finite", lambda: y[~finite][0].item())
    variance = _variances(where, y, noise_std)
    if isinstance(operator, Tensor):
        return Problem(y, operator if operator.dtype == torch.bool else operator.double(), variance)
    problem = Problem(y, operator, variance)
    _check_adjoint(where, problem)
    return problem


def _check_dense_operator(where: str, y: Tensor, operator: Tensor) -> None:
    """A mask or a matrix, with as many measurements as y has."""
    if operator.dtype == torch.bool:
        count, rows = int(operator.sum()), "true entries in the mask"
    else:
        check_tensor(where, "operator", operator, like=y, because=" like y")
        rule = "operator must be a matrix (m, D) or a boolean mask"
        check(where, operator.dim() == 2, rule, f"shape {tuple(operator.shape)}")
        finite = operator.isfinite()
        rule = "operator must be finite"
        check(where, bool(finite.all()), rule, lambda: operator[~finite][0].item())
        count, rows = operator.shape[0], "rows of the matrix"
    check(where, operator.device == y.device, f"operator must be on {y.device}", operator.device)
    rule, shape = f"y must have shape (B, {count}) for {count} {rows}", tuple(y.shape)
    check(where, shape[1:] == (count,), rule, shape)


def _variances(where: str, y: Tensor, noise_std: float | Tensor) -> Tensor:
    """The variance of each measurement (m,), float64."""
    if not isinstance(noise_std, Tensor) or noise_std.dim() == 0:
        std = check_number(where, "noise_std", noise_std)
        return y.new_full((y.shape[1:].numel(),), std**2, dtype=torch.float64)
    shape, because = tuple(y.shape[1:]), " as one measurement"
    check_tensor(where, "noise_std", noise_std, like=y, shape=shape, because=because)
    good = (noise_std > 0) & noise_std.isfinite()
    rule = "noise_std must be finite and > 0"
    check(where, bool(good.all()), rule, lambda: f"{noise_std[~good][0].item():g}")
    return noise_std.flatten().double().square()


def _check_adjoint(where: str, problem: Problem) -> None:
    """<A v, u> = <v, A^T u> for one random u and v."""
    y = problem.y

    u = draw_normal(Key(0, 0), STREAM_ADJOINT, (1, len(problem.variance)), y)
    back = problem.adjoint(where, u, None)
    v = draw_normal(Key(0, 1), STREAM_ADJOINT, back.shape, y)
    there = problem.forward(where, v)
    left, right = float((there * u).sum()), float((v * back).sum())
    # Far above the rounding of either side, below what two unrelated operators give by chance.
    size = float(there.norm() * u.norm() + v.norm() * back.norm())
    adjoint = abs(left - right) <= torch.finfo(y.dtype).eps ** 0.5 * size
    got = f"<A v, u> = {left:g} and <v, A^T u> = {right:g} for random u, v"
    check(where, adjoint, "rmatvec must be the adjoint of matvec", got)


def moments_of(where: str, posterior: Posterior) -> tuple[Tensor, DPLR]:
    """Mean and covariance, the latter finite and not negative."""
    check_kind(where, "posterior", posterior, Posterior)
    mean, covariance = posterior.mean, posterior.covariance
    check_posterior(where, posterior)
    diag, factor, of = covariance.diag, covariance.factor, "of the posterior covariance"
    for part, value in (("diagonal part", diag), ("factor", factor)):
        # A finite sum shows it too, several times faster.
        finite = bool(value.sum().isfinite()) or bool(value.isfinite().all())
        check(where, finite, f"{part} {of} must be finite", partial(_not_finite, value))
    low = diag < 0
    check(
        where,
        not bool(low.any()),
        f"diagonal part {of} must be at least 0",
        lambda: f"{diag[low][0].item():g} for sample {first_of(low.any(1))}",
    )
    if covariance.sign is not None and bool((covariance.sign < 0).any()):
        bad = ~covariance.is_positive_definite()
        check(
            where,
            not bool(bad.any()),
            "the posterior covariance must be positive definite",
            lambda: f"one that is not for sample {first_of(bad)}",
        )
    return mean, covariance


def _not_finite(value: Tensor) -> float:
    return value[~value.isfinite()][0].item()


def first_of(bad: Tensor) -> int:
    return int(bad.nonzero()[0])


def residual_of(where: str, problem: Problem, mean: Tensor) -> Tensor:
    """y - A m, shape (B, m), after the checks that need an x; float64 unless A is functions."""
    y, operator = problem.y, problem.operator
    check_tensor(where, "y", y, like=mean, because=" like x")
    check(
        where,
        len(y) in (1, len(mean)),
        f"y must have 1 row or {len(mean)} like x",
        f"{len(y)} (a sampler's chunk_size must not split the rows)",
    )
    if not isinstance(operator, Tensor):
        return y.flatten(1) - problem.forward(where, mean)
    dims, shape = tuple(mean.shape[1:]), tuple(operator.shape)
    if operator.dtype == torch.bool:
        check(where, shape == dims, f"operator must be a mask of shape {dims} like one x", shape)
    else:
        size = mean.shape[1:].numel()
        rule = f"operator must have {size} columns for x of dims {dims}"
        check(where, shape[1] == size, rule, shape[1])
    return y.double().flatten(1) - problem.forward(where, mean)
