"""Functions of a symmetric matrix times a vector, by Lanczos iterations on products alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import check, check_callable, check_count, check_tensor
from ..records import RowRecord
from .spectrum import Function, Matvec, MatvecOfRows

_BREAKDOWN = 10  # a Lanczos beta this many epsilons of the norm of A is rounding
_GUESSED = 0.1  # what a change by a guessed step counts: 1 costs iterations, .01 misses some
_MAX_ITERATIONS = 200


@dataclass(frozen=True, eq=False, repr=False)
class LanczosResult(RowRecord):
    """f(A) v for each function, and per sample how it was reached.

    Attributes:
        values: f(A) v, one for each function. Shape (B, D).
        error: estimated relative error, the largest over the functions. Shape (B,). NaN for a row
            that is not finite.
        iterations: products with A that went into the result. int64, shape (B,).
        converged: error <= tolerance. bool, shape (B,). False for a row that is not finite.

    Example:
        >>> import torch
        >>> from hos_ext.linalg import DPLR, lanczos, matrix_rows
        >>> diag = torch.linspace(-1, 1, 100).unsqueeze(0)
        >>> result = lanczos(matrix_rows(DPLR(diag)), torch.ones(1, 100), [torch.exp])
        >>> result.converged, bool((result.values[0] - diag.exp()).abs().max() < 0.01)
        (tensor([True]), True)
    """

    values: tuple[Tensor, ...]
    error: Tensor
    iterations: Tensor
    converged: Tensor

    def __len__(self) -> int:
        return len(self.error)

    def _summary(self) -> str:
        functions = f"{len(self.values)} function{'s' * (len(self.values) != 1)}"
        return f"{functions}, {len(self)} rows"


@torch.no_grad()
def lanczos(
    rows: MatvecOfRows,
    v: Tensor,
    functions: Sequence[Function],
    *,
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
) -> LanczosResult:
    """f(A) v for a batch of symmetric A that is known by its products.

    After m iterations f(A) v ~ |v| Q_m f(T_m) e_1. Q_m is an orthonormal basis of the Krylov space
    of A and v, orthogonalised twice against all of itself, and T_m = Q_m^T A Q_m is tridiagonal.
    One basis serves all functions.

    The error is estimated at every iteration to 32, then at every second, third, and so on. The
    estimate is the largest, over the functions, of two changes relative to f_m:
        (1) that of f_m since the check before;
        (2) a tenth of that which a further iteration would bring, if the unknown last entry of
            T_{m+1} lay beyond either end of the Ritz values by beta_m.
    A row stops when two estimates in a row are at most tolerance. A single small (1) may be chance.
    It is even zero for a function that is flat on the first Ritz values, as min(l, 0) is on
    positive ones; (2) sees that f is not flat nearby.

    The number of iterations of a row depends on that row alone. Rows that have stopped leave the
    products when they are a quarter of the rows in them.

    Args:
        rows: maps an index of the batch axis, slice(None) at first and an int64 tensor after each
            removal, to the product with these rows, (n, D) -> (n, D). `matrix_rows` makes one. It
            is called without gradient: one that differentiates has to enable it.
        v: start vectors. Shape (B, D), D >= 1. float32 or float64.
        functions: at least one. Each is elementwise and sees Ritz values (n, m), float64, on v's
            device, where n is not B. What differs by sample, as a step size, belongs into A.
        tolerance: relative error at which a row stops, in (0, 1). Rounding, some 4 machine
            epsilons times the condition of f at A, is on top.
        max_iterations: at least 1; None is 200. D iterations are exact, so it never exceeds D.

    Returns:
        LanczosResult. error is the larger of the last two estimates, or 0 where the Krylov space is
        exhausted (v = 0, a multiple of the identity, D iterations). For f smooth on the spectrum
        the true error is mostly below the estimate, and below 10 times it. For f with a kink
        inside the spectrum, as min(l, 0) on both signs, 3 of 1000 rows of the tests exceed that, by
        10 times at most. NaN for a row where A, v or f is not finite. Not differentiable.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a shape, dtype, tolerance or max_iterations is wrong, or a product or a function
            returns another shape.

    Example:
        >>> import torch
        >>> from hos_ext.linalg import DPLR, lanczos
        >>> from hos_ext.linalg.spectrum import matrix_rows
        >>> result = lanczos(matrix_rows(DPLR(torch.ones(1, 2))), torch.ones(1, 2), [torch.exp])
        >>> result.values[0]
        tensor([[2.7183, 2.7183]])
        >>> result.iterations
        tensor([1])
    """
    check_callable("lanczos", "rows", rows)
    _check_arguments(v, functions, tolerance, max_iterations)
    batch, size = v.shape
    limit = min(size, _MAX_ITERATIONS if max_iterations is None else max_iterations)
    values = [torch.full_like(v, torch.nan) for _ in functions]
    error = torch.full((batch,), torch.nan, dtype=torch.float64, device=v.device)
    iterations = torch.zeros(batch, dtype=torch.int64, device=v.device)
    if batch == 0:
        return LanczosResult(tuple(values), error.to(v.dtype), iterations, iterations > 0)
    q, length = _normalised(v)
    product = rows(slice(None))
    check_callable("lanczos", "what rows returns", product)
    run = _Run.start(q, limit, len(functions))
    next_check = 1
    for m in range(1, limit + 1):
        q = run.step(product, q, m)
        if m < next_check and m < limit:
            continue
        next_check = m + 1 + m // 32
        estimate = run.assess(m, functions, tolerance, m == limit)
        stopped = run.going & ((estimate <= tolerance) | estimate.isnan() | (m == limit))
        if not bool(stopped.any()):
            continue
        done = run.index[stopped]
        error[done], iterations[done] = estimate[stopped], m
        for value, coefficients in zip(values, run.before, strict=True):
            weight = coefficients[stopped].to(v.dtype).unsqueeze(1)
            row = length[done] * (weight @ run.basis[stopped, :m]).squeeze(1)
            value[done] = row.masked_fill(estimate[stopped].isnan().unsqueeze(-1), torch.nan)
        run.going = run.going & ~stopped
        left = int(run.going.sum())
        if left == 0:
            break
        if 4 * left <= 3 * run.going.numel():
            q = q[run.going]
            run.keep(run.going)
            product = rows(run.index)
    return LanczosResult(tuple(values), error.to(v.dtype), iterations, error <= tolerance)


@dataclass
class _Run:
    """What the iterations hold of the n rows that are still in the products."""

    index: Tensor  # their numbers in the batch. (n,)
    going: Tensor  # those not stopped. (n,)
    basis: Tensor  # Q. (n, capacity, D)
    entries: Tensor  # of T: its alphas and betas, float64. (2, n, limit)
    bound: Tensor  # of the norm of T, from below. (n,)
    before: Tensor  # f(T) e_1 of the check before. (F, n, m)
    recent: Tensor  # the estimate of the check before. (n,)

    @classmethod
    def start(cls, q: Tensor, limit: int, functions: int) -> _Run:
        batch, size = q.shape
        entries = torch.zeros((2, batch, limit), dtype=torch.float64, device=q.device)
        return cls(
            index=torch.arange(batch, device=q.device),
            going=torch.ones(batch, dtype=torch.bool, device=q.device),
            basis=q.new_empty((batch, min(16, limit), size)),
            entries=entries,
            bound=q.new_zeros(batch),
            before=entries.new_zeros((functions, batch, 0)),
            recent=entries.new_zeros(batch),
        )

    def step(self, product: Matvec, q: Tensor, m: int) -> Tensor:
        """Iteration m: q joins the basis, T gains a row; the next q."""
        if m > self.basis.shape[1]:
            self.basis = torch.cat([self.basis, torch.empty_like(self.basis)], 1)
        self.basis[:, m - 1] = q
        image = product(q)
        check_tensor("lanczos", "the product of rows", image, like=q, shape=tuple(q.shape))
        alpha, beta, image = _orthogonalise(self.basis[:, :m], image)
        self.bound = torch.maximum(self.bound, torch.maximum(alpha.abs(), beta))
        # Rounding, and after D iterations nothing else: the Krylov space is exhausted.
        rounding = _BREAKDOWN * torch.finfo(q.dtype).eps * self.bound
        spent = (beta <= rounding) | (m == q.shape[1])
        beta = beta.masked_fill(spent, 0.0)
        self.entries[0, :, m - 1], self.entries[1, :, m - 1] = alpha, beta
        # Zero from then on: T falls into blocks, and later iterations change nothing.
        q = image / beta.where(beta != 0, 1.0).unsqueeze(-1)
        return q.masked_fill(spent.unsqueeze(-1), 0.0)

    def assess(self, m: int, functions: Sequence[Function], tolerance: float, last: bool) -> Tensor:
        """The error estimate of each row after m iterations: the larger of the last two."""
        self.before, latest = _assess(
            self.entries[..., :m], self.before, functions, tolerance, last
        )
        exhausted = (self.entries[1, :, :m] == 0).any(-1)
        estimate = torch.maximum(latest, self.recent).masked_fill(exhausted, 0.0)
        self.recent = latest
        return estimate.masked_fill(latest.isnan(), torch.nan)

    def keep(self, rows: Tensor) -> None:
        """Drop the other rows."""
        self.index, self.basis, self.bound = self.index[rows], self.basis[rows], self.bound[rows]
        self.entries, self.before = self.entries[:, rows], self.before[:, rows]
        self.recent, self.going = self.recent[rows], self.going[rows]


def _check_arguments(
    v: Tensor, functions: Sequence[Function], tolerance: float, max_iterations: int | None
) -> None:
    where, kind = "lanczos", type(tolerance).__name__
    check_tensor(where, "v", v)
    flat = v.dim() == 2 and v.shape[1] > 0
    check(where, flat, "v must have shape (B, D), D >= 1", tuple(v.shape))
    many = isinstance(functions, (list, tuple)) and all(map(callable, functions))
    rule = "functions must be a sequence of functions"
    check(where, many, rule, type(functions).__name__, TypeError)
    check(where, functions, "functions must hold at least one", "none")
    check(
        where,
        isinstance(tolerance, (float, np.floating)),
        "tolerance must be a float",
        kind,
        TypeError,
    )
    check(where, 0 < tolerance < 1, "tolerance must be in (0, 1)", tolerance)
    if max_iterations is not None:
        check_count(where, "max_iterations", max_iterations)


def _normalised(v: Tensor) -> tuple[Tensor, Tensor]:
    """v / |v| and |v| (B, 1); 0 for 0."""
    # Divided by the largest entry first: the square of a float32 overflows at 2e19.
    largest = v.abs().amax(-1, keepdim=True)
    q = v / largest.where(largest > 0, 1.0)
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    return q / norm.where(norm > 0, 1.0), largest * norm


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
        check_tensor("lanczos", "what functions return", weight, like=ritz)
        got = f"{tuple(weight.shape)} from {tuple(ritz.shape)}"
        check("lanczos", weight.shape == ritz.shape, "functions must be elementwise", got)
        results.append((vectors @ (weight * vectors[:, 0]).unsqueeze(-1)).squeeze(-1))
    return ritz, torch.stack(results)


def _change(now: Tensor, other: Tensor) -> Tensor:
    """|now - other| / |now|, the largest over the functions. Shape (n,)."""
    difference = (now - other).norm(dim=-1)
    relative: Tensor = difference / now.norm(dim=-1)
    return relative.where(difference != 0, 0.0).amax(0)  # 0 / 0 where f vanishes
