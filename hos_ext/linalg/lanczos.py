"""Functions of a symmetric matrix times a vector, by Lanczos iterations on products alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_count, check_tensor
from .spectrum import Function, Rows

_BREAKDOWN = 10  # a Lanczos beta this many epsilons of the norm of A is rounding
_GUESSED = 0.1  # what a change by a guessed step counts: 1 costs iterations, .01 misses some
_MAX_ITERATIONS = 200


# --------------------------------------------------------------------------------------- Lanczos


class LanczosResult(NamedTuple):
    """f(A) v for each function, and per sample how it was reached."""

    values: tuple[Tensor, ...]  # f(A) v, one for each function. Shape (B, D)
    error: Tensor  # estimated relative error, the largest over the functions; NaN rows NaN. (B,)
    iterations: Tensor  # products with A that went into the result. int64, (B,)
    converged: Tensor  # error <= tolerance; False for NaN rows. bool, (B,)


@torch.no_grad()
def lanczos(
    rows: Rows,
    v: Tensor,
    functions: Sequence[Function],
    *,
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
) -> LanczosResult:
    """f(A) v ~ |v| Q_m f(T_m) e_1 for a batch of symmetric A that is known by its products.

    Q_m is an orthonormal basis of the Krylov space of A and v (orthogonalised twice against all of
    it), T_m = Q_m^T A Q_m tridiagonal; one basis serves all functions. At a check (every iteration
    to 32, then every 2, 3, ...) the estimate of the relative error is the largest, over the
    functions, of (1) the change of f_m since the check before and (2) a tenth of its change when
    T_{m+1} is formed with its unknown last entry beyond either end of the Ritz values, by beta_m. A
    row stops when two estimates in a row are at most tolerance. One small (1) may be chance, and a
    function that is flat on the first Ritz values, as min(l, 0) is on positive ones, makes it zero:
    (2) sees that f is not flat nearby. The number of iterations for a row depends on that row
    alone; rows that have stopped leave the products when they are a quarter of the rows in them.

    Args:
        rows: maps an index of the batch axis, slice(None) at first and an int64 tensor after each
            removal, to the product with these rows, (n, D) -> (n, D). `matrix_rows` makes one. It
            is called without gradient: one that differentiates has to enable it.
        v: start vectors. Shape (B, D), D >= 1. float32 or float64.
        functions: at least one; elementwise, for tensors (n, m) of Ritz values in float64 on v's
            device, n not B: let A hold what differs by sample (the step size).
        tolerance: relative error at which a row stops, in (0, 1). Rounding, some 4 machine
            epsilons times the condition of f at A, is on top.
        max_iterations: at least 1; None is 200. D iterations are exact, so it never exceeds D.

    Returns:
        LanczosResult. error is the larger of the last two estimates, or 0 where the Krylov space is
        exhausted (v = 0, a multiple of the identity, D iterations). The true error is below 10
        times that for f smooth on the spectrum (mostly below it); with a kink inside, min(l, 0) on
        both signs, 3 of 1000 rows of the tests exceed that, by 10 times at most. NaN for a row
        where A, v or f is not finite. Not differentiable.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a shape, dtype, tolerance or max_iterations is wrong, or a product or a function
            returns another shape.
    """
    check_tensor("lanczos", "v", v)
    if v.dim() != 2 or v.shape[1] == 0:
        raise ValueError(f"lanczos: v must have shape (B, D), D >= 1, got {tuple(v.shape)}")
    if not functions:
        raise ValueError("lanczos: functions must hold at least one, got none")
    if isinstance(tolerance, bool) or not isinstance(tolerance, float):
        raise TypeError(f"lanczos: tolerance must be a float, got {type(tolerance).__name__}")
    if not 0 < tolerance < 1:
        raise ValueError(f"lanczos: tolerance must be in (0, 1), got {tolerance}")
    if max_iterations is not None:
        check_count("lanczos", "max_iterations", max_iterations)
    batch, size = v.shape
    limit = min(size, _MAX_ITERATIONS if max_iterations is None else max_iterations)
    values = [torch.full_like(v, torch.nan) for _ in functions]
    error = torch.full((batch,), torch.nan, dtype=torch.float64, device=v.device)
    iterations = torch.zeros(batch, dtype=torch.int64, device=v.device)
    if batch == 0:
        return LanczosResult(tuple(values), error.to(v.dtype), iterations, iterations > 0)

    # Divided by the largest entry first: the square of a float32 overflows at 2e19.
    largest = v.abs().amax(-1, keepdim=True)
    q = v / largest.where(largest > 0, 1.0)
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    q = q / norm.where(norm > 0, 1.0)
    length = largest * norm

    product = rows(slice(None))
    index = torch.arange(batch, device=v.device)  # the batch rows still in the products
    going = torch.ones(batch, dtype=torch.bool, device=v.device)  # of them, those not stopped
    basis = v.new_empty((batch, min(16, limit), size))
    entries = torch.zeros((2, batch, limit), dtype=torch.float64, device=v.device)  # of T
    bound = v.new_zeros(batch)  # of the norm of T, from below
    before = entries.new_zeros((len(functions), batch, 0))  # f(T) e_1 of the check before
    recent = entries.new_zeros(batch)  # the estimate of the check before
    check = 1
    for m in range(1, limit + 1):
        if m > basis.shape[1]:
            basis = torch.cat([basis, torch.empty_like(basis)], 1)
        basis[:, m - 1] = q
        image = product(q)
        check_tensor("lanczos", "the product", image, like=v, shape=tuple(q.shape))
        alpha, beta, image = _orthogonalise(basis[:, :m], image)
        bound = torch.maximum(bound, torch.maximum(alpha.abs(), beta))
        # Rounding, and after D iterations nothing else: the Krylov space is exhausted.
        spent = (beta <= _BREAKDOWN * torch.finfo(v.dtype).eps * bound) | (m == size)
        beta = beta.masked_fill(spent, 0.0)
        entries[0, :, m - 1], entries[1, :, m - 1] = alpha, beta
        # Zero from then on: T falls into blocks, and later iterations change nothing.
        q = (image / beta.where(beta != 0, 1.0).unsqueeze(-1)).masked_fill(spent.unsqueeze(-1), 0.0)
        if m < check and m < limit:
            continue
        check = m + 1 + m // 32
        before, latest = _assess(entries[..., :m], before, functions, tolerance, m == limit)
        exhausted = (entries[1, :, :m] == 0).any(-1)
        estimate, recent = torch.maximum(latest, recent).masked_fill(exhausted, 0.0), latest
        estimate = estimate.masked_fill(latest.isnan(), torch.nan)
        stopped = going & ((estimate <= tolerance) | estimate.isnan() | (m == limit))
        if bool(stopped.any()):
            done = index[stopped]
            error[done], iterations[done] = estimate[stopped], m
            for value, coefficients in zip(values, before, strict=True):
                weight = coefficients[stopped].to(v.dtype).unsqueeze(1)
                row = length[done] * (weight @ basis[stopped, :m]).squeeze(1)
                value[done] = row.masked_fill(estimate[stopped].isnan().unsqueeze(-1), torch.nan)
            going = going & ~stopped
            left = int(going.sum())
            if left == 0:
                break
            if 4 * left <= 3 * going.numel():
                index, q, basis, bound = index[going], q[going], basis[going], bound[going]
                entries, before, recent = entries[:, going], before[:, going], recent[going]
                going = going[going]
                product = rows(index)
    return LanczosResult(tuple(values), error.to(v.dtype), iterations, error <= tolerance)


def _orthogonalise(basis: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha = <A q, q> for q the last of basis (n, m, D), A q freed of the basis, its norm beta."""
    alpha = image.new_zeros(image.shape[0])
    for _ in range(2):  # twice is enough (Parlett)
        overlap = basis @ image.unsqueeze(-1)
        image = image - (basis.mT @ overlap).squeeze(-1)
        alpha = alpha + overlap[:, -1, 0]
    return alpha, torch.linalg.vector_norm(image, dim=-1), image


def _assess(
    entries: Tensor, before: Tensor, functions: Sequence[Function], tolerance: float, last: bool
) -> tuple[Tensor, Tensor]:
    """f(T) e_1 for each function, (F, n, m), and the error estimate of each row, (n,).

    entries (2, n, m) are the alphas and betas. In coefficients, as |Q c| = |c|. The estimate looks
    ahead only where the row would stop otherwise.
    """
    finite = entries.isfinite().all(-1).all(0)
    entries = entries.where(finite.unsqueeze(-1), 0.0)  # eigh raises on NaN
    ritz, after = _coefficients(entries, functions)
    finite = finite & after.isfinite().all(-1).all(0)
    estimate = _change(
        after, torch.nn.functional.pad(before, (0, after.shape[-1] - before.shape[-1]))
    )
    ahead = finite & ((estimate <= tolerance) | last)
    if bool(ahead.any()):
        now = torch.nn.functional.pad(after[:, ahead], (0, 1))
        beta = entries[1, ahead, -1]
        for guess in (ritz[ahead, 0] - beta, ritz[ahead, -1] + beta):
            row = torch.stack([guess, torch.zeros_like(guess)]).unsqueeze(-1)
            longer = _coefficients(torch.cat([entries[:, ahead], row], -1), functions)[1]
            # fmax passes over NaN: a guess where f is not defined says nothing.
            estimate[ahead] = torch.fmax(estimate[ahead], _GUESSED * _change(now, longer))
    return after, estimate.where(finite, torch.nan)


def _coefficients(entries: Tensor, functions: Sequence[Function]) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n, m) of the tridiagonal T, and f(T) e_1 for each function, (F, n, m)."""
    alpha, beta = entries[0], entries[1, :, :-1]
    t = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    ritz, vectors = torch.linalg.eigh(t)
    results = []
    for function in functions:
        weight = function(ritz)
        if weight.shape != ritz.shape:
            raise ValueError(
                f"lanczos: functions must be elementwise, got {tuple(weight.shape)} from"
                f" {tuple(ritz.shape)}"
            )
        results.append((vectors @ (weight * vectors[:, 0]).unsqueeze(-1)).squeeze(-1))
    return ritz, torch.stack(results)


def _change(now: Tensor, other: Tensor) -> Tensor:
    """|now - other| / |now|, the largest over the functions. Shape (n,)."""
    difference = (now - other).norm(dim=-1)
    relative: Tensor = difference / now.norm(dim=-1)
    return relative.where(difference != 0, 0.0).amax(0)  # 0 / 0 where f vanishes
