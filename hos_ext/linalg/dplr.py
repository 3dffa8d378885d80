"""DPLR: batches of symmetric matrices diag(d) + U diag(sign) U^T, as Hessian or as covariance.

Everything is O(D r^2) through r x r matrices (Woodbury, the determinant lemma, Sylvester's law of
inertia); a D x D matrix is formed by `dense()` alone, which `eigh` calls where D <= 64 or
r + 4 k > D. d may hold zeros, small and negative values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import check_int, check_tensor, per_sample
from ..random import STREAM_POSTERIOR, fresh_seed

_DENSE = 64  # eigh forms the matrix up to this D
_TOLERANCE = 1e-12  # residual of an eigenpair over the norm of the matrix, in float64
_SMALL = 1e-2  # how much smaller than its bound in `_capacity` a row must be to be kept


@contextmanager
def _one_thread(matrices: Tensor) -> Iterator[None]:
    """For LU of a batch on the CPU: MKL's threads inside torch's can wait for ever (torch 2.13)."""
    threads = torch.get_num_threads()
    if threads == 1 or not matrices.is_cpu or torch.compiler.is_compiling():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class DPLR:
    """diag(d) + U diag(sign) U^T for each sample of a batch.

    Args:
        diag: d. Shape (B, D), D >= 1. float32 or float64.
        factor: U. Shape (B, D, r), same dtype and device; r may be 0. None is r = 0.
        sign: +1 or -1 for each column of U, shared by the batch. Shape (r,), any real dtype, same
            device; None is all +1.

    Raises:
        TypeError: an argument is not a Tensor.
        ValueError: shapes, dtypes or devices disagree, or a sign is not +-1.

    Differentiable through torch except where a method says otherwise. NaN and inf pass through,
    except in `eigh`, which refuses them. `dense()` is the one route to a D x D matrix; besides the
    user only `eigh` takes it, for D <= 64 or r + 4 k > D.
    """

    def __init__(self, diag: Tensor, factor: Tensor | None = None, sign: Tensor | None = None):
        check_tensor("DPLR", "diag", diag)
        if diag.dim() != 2 or diag.shape[1] == 0:
            raise ValueError(f"DPLR: diag must have shape (B, D), D >= 1, got {tuple(diag.shape)}")
        if factor is None:
            factor = diag.new_empty((*diag.shape, 0))
        check_tensor("DPLR", "factor", factor, like=diag)
        if factor.dim() != 3 or factor.shape[:2] != diag.shape:
            want = f"({diag.shape[0]}, {diag.shape[1]}, r)"
            raise ValueError(
                f"DPLR: factor must have shape {want} like diag, got {tuple(factor.shape)}"
            )
        if sign is not None:
            if not isinstance(sign, Tensor):
                raise TypeError(f"DPLR: sign must be a Tensor, got {type(sign).__name__}")
            if sign.shape != factor.shape[2:]:
                got = tuple(sign.shape)
                raise ValueError(f"DPLR: sign must have shape ({factor.shape[2]},), got {got}")
            if sign.device != diag.device:
                raise ValueError(f"DPLR: sign must be on {diag.device}, got {sign.device}")
            sign = sign.detach().to(diag.dtype)
            if not bool((sign.abs() == 1).all()):
                raise ValueError(f"DPLR: sign must hold +1 and -1 only, got {sign.tolist()}")
        self.diag = diag
        self.factor = factor
        self.sign = sign

    @classmethod
    def of(cls, diag: Tensor, factor: Tensor | None = None, sign: Tensor | None = None) -> DPLR:
        """The same from parts that have been checked: nothing is read, nothing waits for a device.

        sign may have another real dtype than diag.
        """
        matrix = cls.__new__(cls)
        matrix.diag = diag
        matrix.factor = diag.new_empty((*diag.shape, 0)) if factor is None else factor
        matrix.sign = None if sign is None else sign.detach().to(diag.dtype)
        return matrix

    def rows(self, index: Tensor | slice) -> DPLR:
        """The matrices of these samples of the batch."""
        return DPLR.of(self.diag[index], self.factor[index], self.sign)

    # ------------------------------------------------------------------------------- description

    @property
    def shape(self) -> torch.Size:
        """(B, D, D), the shape of `dense()`."""
        return torch.Size((*self.diag.shape, self.diag.shape[1]))

    @property
    def rank(self) -> int:
        """r, the number of columns of factor."""
        return self.factor.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.diag.dtype

    @property
    def device(self) -> torch.device:
        return self.diag.device

    def __repr__(self) -> str:
        signed = "" if self.sign is None else f", sign={[int(s) for s in self.sign.tolist()]}"
        batch, size = self.diag.shape
        return f"DPLR(B={batch}, D={size}, rank={self.rank}{signed}, {self.dtype}, {self.device})"

    def to(self, *args: Any, **kwargs: Any) -> DPLR:
        """The same matrix on another device or in another dtype; arguments as `Tensor.to`."""
        diag = self.diag.to(*args, **kwargs)
        sign = None if self.sign is None else self.sign.to(diag.device)
        return DPLR(diag, self.factor.to(*args, **kwargs), sign)

    # -------------------------------------------------------------------------------- elementary

    def dense(self) -> Tensor:
        """The matrix itself. Shape (B, D, D)."""
        return ops.assemble_hessian(self.diag, self.factor, sign=self.sign)

    def matvec(self, v: Tensor) -> Tensor:
        """The product with v. v and the result: shape (B, D) or (B, D, k)."""
        return ops.hessian_matvec(self.diag, self.factor, v, sign=self.sign)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matvec(v)

    def diagonal(self) -> Tensor:
        """d_i + sum_k sign_k U_ik^2. Shape (B, D)."""
        if self.rank == 0:
            return self.diag
        return self.diag + self._weigh(self.factor.square()).sum(-1)

    def trace(self) -> Tensor:
        """Shape (B,)."""
        return self.diagonal().sum(-1)

    def frobenius_norm(self) -> Tensor:
        """sqrt(sum d^2 + 2 sum_ik sign_k d_i U_ik^2 + sum_kl sign_k sign_l G_kl^2), G = U^T U.

        Returns:
            Shape (B,). Where signs make the terms cancel, the absolute error is sqrt(eps) times
            the largest of them.
        """
        low_rank = self._weigh(self.factor.square()).sum(-1)
        squares = (self.factor.mT @ self.factor).square()
        both = self._weigh(self._weigh(squares).mT).sum((-1, -2))
        # Rounding may leave a negative sum where the exact one is zero.
        return ((self.diag * (self.diag + 2 * low_rank)).sum(-1) + both).clamp_min(0).sqrt()

    def __add__(self, other: DPLR | float | Tensor) -> DPLR:
        """The sum with another DPLR (ranks add), or with a I for a float or a (B,)."""
        if not isinstance(other, DPLR):
            return DPLR(self.diag + self._scalar("__add__", other), self.factor, self.sign)
        if other.shape != self.shape:
            raise ValueError(
                f"DPLR.__add__: other must have shape {tuple(self.shape)}, got {tuple(other.shape)}"
            )
        check_tensor("DPLR.__add__", "other", other.diag, like=self.diag)
        sign = None
        if self.sign is not None or other.sign is not None:
            sign = torch.cat([self._signs(), other._signs()])
        return DPLR(self.diag + other.diag, torch.cat([self.factor, other.factor], -1), sign)

    __radd__ = __add__

    def scale(self, a: float | Tensor) -> DPLR:
        """a times the matrix, for a float or a (B,); a negative a flips the signs.

        Raises:
            ValueError: a (B,) with both positive and negative values (signs are shared).
        """
        value = self._scalar("scale", a)
        negative = bool((value < 0).any())
        if negative and bool((value > 0).any()):
            raise ValueError(f"DPLR.scale: a must have one sign over the batch, got {a}")
        root = (-value if negative else value).sqrt().reshape(-1, 1, 1)
        sign = -self._signs() if negative else self.sign
        return DPLR(self.diag * value, self.factor * root, sign)

    # -------------------------------------------------------------------------- r x r factorised

    def solve(self, b: Tensor) -> Tensor:
        """M^-1 b by Woodbury. b and the result: shape (B, D) or (B, D, k).

        Rows whose d is zero or small beside the low-rank part are kept as unknowns (`_capacity`),
        so that the error is that of an ordinary solve: machine precision times the condition
        number of M, and not of d. More than r such rows make M itself as ill-conditioned as they.

        Raises:
            ValueError: M is singular: more zeros in d than rank, or an exactly singular r x r
                matrix; or b does not fit.
        """
        check_tensor("DPLR.solve", "b", b, like=self.diag)
        if b.dim() not in (2, 3) or b.shape[:2] != self.diag.shape:
            batch, size = self.diag.shape
            want = f"({batch}, {size}) or ({batch}, {size}, k)"
            raise ValueError(f"DPLR.solve: b must have shape {want}, got {tuple(b.shape)}")
        zeros = (self.diag == 0).sum(-1)
        if bool((zeros > self.rank).any()):
            raise ValueError(
                f"DPLR.solve: the matrix must be nonsingular, got {int(zeros.max())} zeros on the "
                f"diagonal at rank {self.rank}"
            )
        out, info = self._woodbury(b.unsqueeze(-1) if b.dim() == 2 else b)
        if bool((info != 0).any()):
            item = int(info.nonzero()[0])
            raise ValueError(
                f"DPLR.solve: the matrix must be nonsingular, got a singular one at batch {item}"
            )
        return out.squeeze(-1) if b.dim() == 2 else out

    def logdet(self) -> Tensor:
        """log det M by the determinant lemma. Shape (B,); as `torch.logdet`: -inf where det M is
        zero, NaN where it is negative. Small d are handled as in `solve`."""
        diag, lift, inner = self._capacity()[:3]
        with _one_thread(inner):
            sign, logabs = torch.linalg.slogdet(inner)
        # A column of lift is e_i / sqrt(t) (or zero): it divided the determinant by t.
        length = lift.square().sum(1)
        extra = length.where(length > 0, 1.0).log().sum(-1)
        value: Tensor = diag.abs().log().sum(-1) + logabs - extra
        sign = sign * diag.sign().prod(-1) * (-self._signs()).prod()
        value = value.masked_fill(sign < 0, torch.nan)
        # More zeros than columns: singular, which `_capacity` does not represent.
        singular = (self.diag == 0).sum(-1) > self.rank
        return value.masked_fill(singular, -torch.inf)

    def is_positive_definite(self) -> Tensor:
        """Whether every eigenvalue is > 0, by counting (no eigenvalue is computed). Shape (B,)."""
        with torch.no_grad():
            finite = self._finite()
            diag = self.diag.where(finite.unsqueeze(-1), 1.0)
            factor = self.factor.where(finite[:, None, None], 0.0)
            # In float64, so that the count holds up to a condition number of 1e15.
            count = DPLR(diag, factor, self.sign).to(torch.float64)._count_above(0.0)
            zeros = (diag == 0).sum(-1)
            definite: Tensor = finite & (zeros <= self.rank) & (count == diag.shape[1])
            return definite

    def sample(self, n: int, *, seed: int | None = None, offset: int = 0, first: int = 0) -> Tensor:
        """n draws of N(0, M) for each sample of the batch.

        With all signs +1 a draw is sqrt(d) z1 + U z2 (d >= 0). With a -1 among them it is
        sqrt(d) (I + V S V^T)^(1/2) z1 with V = U / sqrt(d), by an r x r eigenproblem (d > 0).

        Args:
            n: number of draws.
            seed: key of the counter-based noise; None draws one from torch's default generator.
            offset: number of the first draw: draw j uses the noise of offset + j.
            first: global index of batch row 0. Draw j of row b has the same noise however draws
                and rows are split among calls.

        Returns:
            Shape (n, B, D). Pathwise differentiable in d and U.

        Raises:
            TypeError: n is not an int.
            ValueError: n < 0, d has a value that the formula above cannot take, or M has a
                negative eigenvalue.
        """
        check_int("DPLR.sample", "n", n, 2**56)
        signed = self.sign is not None and bool((self.sign < 0).any())
        bad = ~(self.diag > 0) if signed else self.diag < 0
        if bool(bad.any()):
            rule = "> 0 where a sign is -1" if signed else ">= 0"
            raise ValueError(f"DPLR.sample: diag must be {rule}, got {self.diag[bad][0].item()}")
        if seed is None:
            seed = fresh_seed()
        batch, size = self.diag.shape
        width = size if signed else size + self.rank
        noise = self.diag.new_empty((n, batch, width))
        for j in range(n):
            noise[j] = ops.normal(
                (batch, width),
                seed=seed,
                offset=offset + j,
                first=first,
                stream=STREAM_POSTERIOR,
                dtype=self.dtype,
                device=self.device,
            )
        root = self.diag.sqrt()
        if not signed:
            z1, z2 = noise[..., :size], noise[..., size:]
            return root * z1 + (self.factor @ z2.permute(1, 2, 0)).permute(2, 0, 1)
        # With V S V^T = Q diag(lam) Q^T the root of I + V S V^T is I + Q (sqrt(1 + lam) - 1) Q^T.
        basis, lam = low_rank_eigh(self.factor / root.unsqueeze(-1), self._signs())
        slack = 64 * torch.finfo(self.dtype).eps * lam.abs().amax(-1, keepdim=True)
        if bool((lam < -1 - slack).any()):
            raise ValueError(
                "DPLR.sample: the matrix must be positive semidefinite, got a negative eigenvalue"
            )
        gain = ((1 + lam).clamp_min(0).sqrt() - 1).unsqueeze(-1)
        z = noise.permute(1, 2, 0)
        draws: Tensor = root * (z + basis @ (gain * (basis.mT @ z))).permute(2, 0, 1)
        return draws

    # ------------------------------------------------------------------------------- eigenpairs

    def eigh(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues and their eigenvectors.

        For D <= 64 or r + 4 k > D: `dense()`, a D x D matrix, and LAPACK. Otherwise no such matrix:
        rational Krylov steps, then inverse iteration, by Woodbury solves in float64; the result
        is certified by counting eigenvalues (Sylvester's law), which finds any that the iteration
        missed. Deterministic: each vector's entry of largest modulus is positive.

        Args:
            k: 1 <= k <= D.

        Returns:
            values: shape (B, k), descending, in float64 to 1e-11 of max |d| + |U|^2 also where
                eigenvalues cluster. Differentiable.
            vectors: shape (B, D, k), orthonormal columns. Not differentiable.

        Raises:
            TypeError: k is not an int.
            ValueError: k out of range, or d or U not finite.
            RuntimeError: no convergence.
        """
        batch, size = self.diag.shape
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"DPLR.eigh: k must be an int, got {type(k).__name__}")
        if not 1 <= k <= size:
            raise ValueError(f"DPLR.eigh: k must be an integer in 1..{size}, got {k}")
        if not bool(self._finite().all()):
            raise ValueError("DPLR.eigh: diag and factor must be finite, got NaN or inf")
        wide = self.to(torch.float64)
        with torch.no_grad():
            if size <= _DENSE or self.rank + 4 * k > size or batch == 0:
                vectors = torch.linalg.eigh(wide.dense())[1][..., -k:].flip(-1)
            else:
                rows = zip(wide.diag.split(1), wide.factor.split(1), strict=True)
                vectors = torch.cat([DPLR(d, u, wide.sign)._leading_vectors(k) for d, u in rows])
            peak = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
            vectors = vectors * torch.where(peak < 0, -1.0, 1.0)
        values = (vectors * wide.matvec(vectors)).sum(1)
        return values.to(self.dtype), vectors.to(self.dtype)

    def _leading_vectors(self, k: int) -> Tensor:
        """The k leading eigenvectors (1, D, k) of a batch of one in float64, for `eigh`."""
        size = self.diag.shape[1]
        # Orthogonal columns: cancelling or dependent ones would cost the solves their digits.
        columns, weight = low_rank_eigh(self.factor, self._signs())
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        kept = weight[0].abs() > 1e-15 * largest
        columns, weight = columns[..., kept], weight[0, kept]
        matrix = DPLR(self.diag, columns * weight.abs().sqrt(), weight.sign())
        norm = float(self.diag.abs().max()) + largest or 1.0
        tolerance = _TOLERANCE * norm
        rough = 1e-5 * norm
        units = torch.zeros(1, size, k, dtype=self.dtype, device=self.device)
        units.scatter_(1, self.diagonal().topk(k).indices.unsqueeze(1), 1.0)
        basis = torch.cat([columns, units], -1)
        for attempt in range(100):
            ritz, vectors, residual = matrix._rayleigh_ritz(basis, 2 * k)
            worst = max(residual[:k])
            if worst > rough:
                # Rational Krylov: M solved just above the first Ritz value that is not near.
                j = next(j for j in range(k) if residual[j] > rough)
                step = matrix._solve_near(ritz[j], max(residual[j], 1e-2 * rough), vectors)
                for _ in range(2):  # twice: one pass leaves the rounding of near parallels
                    step = step - vectors @ (vectors.mT @ step)
                    step = step / step.norm(dim=1, keepdim=True).clamp_min(1e-300)
                basis = torch.cat([vectors, step], -1)
            elif worst > tolerance:
                # Inverse iteration, each vector by itself. The basis must not keep the old ones:
                # Rayleigh-Ritz mixes vectors of close eigenvalues, pure with polluted alike.
                near = [max(residual[j], tolerance) / 4 for j in range(k)]
                steps = [
                    matrix._solve_near(ritz[j], near[j], vectors[..., j : j + 1]) for j in range(k)
                ]
                basis = torch.cat(steps, -1)
            else:
                missed = matrix._first_missed([x + 10 * tolerance for x in ritz[:k]], 2 * norm)
                if missed is None:
                    return vectors[..., :k]
                fresh = ops.normal(
                    (1, size, k),
                    seed=0,
                    offset=attempt,
                    stream=STREAM_POSTERIOR,
                    dtype=self.dtype,
                    device=self.device,
                )
                basis = torch.cat([vectors, matrix._solve_near(missed, tolerance, fresh)], -1)
        raise RuntimeError("DPLR.eigh: no convergence in 100 steps")

    def _rayleigh_ritz(self, basis: Tensor, keep: int) -> tuple[list[float], Tensor, list[float]]:
        """Leading Ritz values, vectors (1, D, m) and residual norms, for a batch of one."""
        basis = torch.linalg.qr(basis)[0]
        product = self.matvec(basis)
        projected = basis.mT @ product
        values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
        values, rotation = values[..., -keep:].flip(-1), rotation[..., -keep:].flip(-1)
        vectors = basis @ rotation
        residual = (product @ rotation - vectors * values.unsqueeze(1)).norm(dim=1)
        return values[0].tolist(), vectors, residual[0].tolist()

    def _solve_near(self, value: float, distance: float, x: Tensor) -> Tensor:
        """(value + distance - M)^-1 x, columns normalised; poles are kept distance / 10 away."""
        gap = value + distance - self.diag
        least = torch.full_like(gap, distance / 10)
        gap = torch.where(gap.abs() < least, torch.copysign(least, gap), gap)
        out = DPLR(gap, self.factor, -self._signs())._woodbury(x)[0]
        length: Tensor = out.norm(dim=1, keepdim=True)
        return out / length.clamp_min(1e-300)

    def _first_missed(self, limits: list[float], high: float) -> float | None:
        """The first eigenvalue above its limit, for a batch of one, by counts and bisection.

        Eigenvalue number j (from 0) is at most limits[j] if at most j eigenvalues exceed that.
        None if this holds for all.
        """
        for j, low in enumerate(limits):
            if int(self._count_above(low)) > j:
                for _ in range(50):
                    middle = (low + high) / 2
                    if int(self._count_above(middle)) > j:
                        low = middle
                    else:
                        high = middle
                return high
        return None

    # ---------------------------------------------------------------------------------- helpers

    def _signs(self) -> Tensor:
        """sign, with None as ones."""
        return self.diag.new_ones(self.rank) if self.sign is None else self.sign

    def _weigh(self, columns: Tensor) -> Tensor:
        """columns (..., r) times sign."""
        return columns if self.sign is None else columns * self.sign

    def _scalar(self, where: str, a: float | Tensor) -> Tensor:
        """A float, 0-d or (B,) value, shaped to broadcast against diag."""
        return per_sample(f"DPLR.{where}", "a", a, self.diag)

    def _finite(self) -> Tensor:
        """Whether every entry is finite. Shape (B,)."""
        return self.diag.isfinite().all(-1) & self.factor.isfinite().all(-1).all(-1)

    def _capacity(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d', E, K and the inverse of d over the eliminated rows.

        M x = b is [[A, U], [U^T, -S]] [x; y] = [b; 0] with A = diag(d), S = diag(sign). With q_i =
        |d_i| / |U_i|^2 and g the (r+1)-th smallest of them, at most 1, rows with q_i <= _SMALL g
        would cost digits as divisors: they, at most r, stay as unknowns z, x_i = z_i / sqrt(t_i)
        with t_i = g |U_i|^2. The others are eliminated, which leaves
            K = [[diag(d_i / t_i), E^T U], [U^T E, -(S + U^T A^-1 U)]]
        with columns e_i / sqrt(t_i) in E; samples with fewer such rows have zero columns and 1 in
        K. No divisor is much too small: U^T annuls some vector on the r + 1 rows of smallest q,
        which M only multiplies by d, so that M (rows scaled) has condition number 1 / g or more.
        d' is d with 1 in the rows kept, and for zeros beyond rank, where M is singular.
        """
        norm = self.factor.detach().square().sum(-1)
        ratio = self.diag.detach().abs() / norm.clamp_min(torch.finfo(self.dtype).tiny)
        lowest, rows = ratio.topk(min(self.rank + 1, ratio.shape[-1]), largest=False)
        bound = torch.ones_like(norm[:, :1])
        if self.rank < ratio.shape[-1]:
            bound = lowest[:, self.rank :].clamp_max(1.0)
        used = lowest[:, : self.rank] <= _SMALL * bound
        count = int(used.sum(-1).max()) if used.numel() else 0
        rows, used = rows[:, :count], used[:, :count]
        scale = bound.where(bound > 0, 1.0) * norm.gather(-1, rows)
        height = used / scale.where(scale > 0, 1.0).sqrt()
        lift = norm.new_zeros((*norm.shape, count))
        lift = lift.scatter(1, rows.unsqueeze(1), height.unsqueeze(1))
        kept = torch.zeros_like(norm, dtype=torch.bool).scatter(-1, rows, used)
        diag = self.diag.where(~kept & (self.diag != 0), 1.0)
        inverse = ~kept / diag
        corner = (self.diag.gather(-1, rows) * height.square()).where(used, 1.0)
        edge = lift.mT @ self.factor
        low_rank = self.factor.mT @ (self.factor * inverse.unsqueeze(-1))
        upper = torch.cat([torch.diag_embed(corner), edge], -1)
        lower = torch.cat([edge.mT, -torch.diag(self._signs()) - low_rank], -1)
        return diag, lift, torch.cat([upper, lower], 1), inverse

    def _woodbury(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """M^-1 b for b (B, D, k), and LAPACK's info of the small solve."""
        _, lift, inner, inverse = self._capacity()
        inverse = inverse.unsqueeze(-1)
        right = torch.cat([lift.mT @ b, -(self.factor.mT @ (inverse * b))], 1)
        with _one_thread(inner):
            solution, info = torch.linalg.solve_ex(inner, right)
        z, y = solution.split([lift.shape[-1], self.rank], 1)
        return inverse * (b - self.factor @ y) + lift @ z, info

    def _count_above(self, value: float | Tensor) -> Tensor:
        """How many eigenvalues exceed value, a float or (B,). Shape (B,).

        Sylvester's law on [[A, U], [U^T, -S]], A = diag(d - value): its inertia is that of -S plus
        that of A + U S U^T, and also that of the eliminated rows of A plus that of K.
        """
        shifted = DPLR(self.diag - self._scalar("_count_above", value), self.factor, self.sign)
        diag, lift, inner, _ = shifted._capacity()
        # Each column of lift is one positive too many: 1 in d', or 1 in K where it is not used.
        above = (torch.linalg.eigvalsh(inner) > 0).sum(-1) - lift.shape[-1]
        count: Tensor = (diag > 0).sum(-1) + above - (self._signs() < 0).sum()
        return count


def low_rank_eigh(factor: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Q (B, D, m) and lam (B, m), m = min(D, r), with U diag(sign) U^T = Q diag(lam) Q^T."""
    q, r = torch.linalg.qr(factor)
    lam, rotation = torch.linalg.eigh((r * sign) @ r.mT)
    return q @ rotation, lam
