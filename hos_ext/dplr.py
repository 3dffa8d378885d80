"""DPLR: batches of symmetric matrices diag(d) + U diag(sign) U^T, as Hessian or as covariance.

Everything is O(D r^2) through r x r matrices (Woodbury, the determinant lemma, Sylvester's law of
inertia); a D x D matrix is formed by `dense()` alone, which is also the route of `eigh` where the
matrix is small or the answer is itself of that size. d may hold zeros and negative values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops

STREAM = 2  # the counter stream of posterior samples (design decision 6)
_DENSE = 64  # eigh forms the matrix up to this D
_TOLERANCE = 1e-12  # residual of an eigenpair over the norm of the matrix, in float64


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
    except in `eigh`, which refuses them.
    """

    def __init__(self, diag: Tensor, factor: Tensor | None = None, sign: Tensor | None = None):
        for name, value in (("diag", diag), ("factor", factor), ("sign", sign)):
            if not isinstance(value, Tensor) and (value is not None or name == "diag"):
                raise TypeError(f"DPLR: {name} must be a Tensor, got {type(value).__name__}")
        if diag.dim() != 2 or diag.shape[1] == 0:
            raise ValueError(f"DPLR: diag must have shape (B, D), D >= 1, got {tuple(diag.shape)}")
        if diag.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"DPLR: diag must be float32 or float64, got {diag.dtype}")
        if factor is None:
            factor = diag.new_empty((*diag.shape, 0))
        if factor.dim() != 3 or factor.shape[:2] != diag.shape:
            want = f"({diag.shape[0]}, {diag.shape[1]}, r)"
            raise ValueError(
                f"DPLR: factor must have shape {want} like diag, got {tuple(factor.shape)}"
            )
        same("DPLR", "factor", factor, diag)
        if sign is not None:
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
        same("DPLR.__add__", "other", other.diag, self.diag)
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

        Zeros in d are handled exactly where the low-rank part makes M regular. The error is that
        of an ordinary solve: machine precision times the condition number of M.

        Raises:
            ValueError: M is singular: more zeros in d than rank, or an exactly singular r x r
                matrix; or b does not fit.
        """
        if not isinstance(b, Tensor):
            raise TypeError(f"DPLR.solve: b must be a Tensor, got {type(b).__name__}")
        if b.dim() not in (2, 3) or b.shape[:2] != self.diag.shape:
            batch, size = self.diag.shape
            want = f"({batch}, {size}) or ({batch}, {size}, k)"
            raise ValueError(f"DPLR.solve: b must have shape {want}, got {tuple(b.shape)}")
        same("DPLR.solve", "b", b, self.diag)
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
        zero, NaN where it is negative."""
        diag, _, capacity, weight = self._capacity()
        sign, logabs = torch.linalg.slogdet(capacity)
        value: Tensor = diag.abs().log().sum(-1) + logabs
        sign = sign * diag.sign().prod(-1) * weight.prod()
        value = value.masked_fill(sign < 0, torch.nan)
        # More zeros than columns: singular, which rounding in the capacity matrix would hide.
        singular = (self.diag == 0).sum(-1) > self.rank
        return value.masked_fill(singular, -torch.inf)

    def is_positive_definite(self) -> Tensor:
        """Whether every eigenvalue is > 0, by counting (no eigenvalue is computed). Shape (B,)."""
        with torch.no_grad():
            finite = self._finite()
            diag = self.diag.where(finite.unsqueeze(-1), 1.0)
            factor = self.factor.where(finite[:, None, None], 0.0)
            count = DPLR(diag, factor, self.sign)._count_above(0.0)
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
            ValueError: d has a value that the formula above cannot take, or M has a negative
                eigenvalue.
        """
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"DPLR.sample: n must be an integer >= 0, got {n}")
        signed = self.sign is not None and bool((self.sign < 0).any())
        bad = ~(self.diag > 0) if signed else self.diag < 0
        if bool(bad.any()):
            rule = "> 0 where a sign is -1" if signed else ">= 0"
            raise ValueError(f"DPLR.sample: diag must be {rule}, got {self.diag[bad][0].item()}")
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        batch, size = self.diag.shape
        width = size if signed else size + self.rank
        noise = self.diag.new_empty((n, batch, width))
        for j in range(n):
            noise[j] = ops.normal(
                (batch, width),
                seed=seed,
                offset=offset + j,
                first=first,
                stream=STREAM,
                dtype=self.dtype,
                device=self.device,
            )
        root = self.diag.sqrt()
        if not signed:
            z1, z2 = noise[..., :size], noise[..., size:]
            return root * z1 + (self.factor @ z2.permute(1, 2, 0)).permute(2, 0, 1)
        # With V S V^T = Q diag(lam) Q^T the root of I + V S V^T is I + Q (sqrt(1 + lam) - 1) Q^T.
        basis, lam = _low_rank_eigh(self.factor / root.unsqueeze(-1), self._signs())
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
        """The k largest eigenvalues and their eigenvectors, without a D x D matrix for large D.

        Rational Krylov steps, then inverse iteration, by Woodbury solves in float64; the result
        is certified by counting eigenvalues (Sylvester's law), which finds any that the iteration
        missed. For D <= 64, or when k and r are not small beside D, `dense()` and LAPACK.
        Deterministic: each vector's entry of largest modulus is positive.

        Args:
            k: 1 <= k <= D.

        Returns:
            values: shape (B, k), descending, in float64 to 1e-11 of max |d| + |U|^2 also where
                eigenvalues cluster. Differentiable.
            vectors: shape (B, D, k), orthonormal columns. Not differentiable.

        Raises:
            ValueError: k out of range, or d or U not finite.
            RuntimeError: no convergence.
        """
        batch, size = self.diag.shape
        if not isinstance(k, int) or not 1 <= k <= size:
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
        columns, weight = _low_rank_eigh(self.factor, self._signs())
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
                    stream=STREAM,
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
        """d', V, C = diag(w) + V^T diag(1/d') V and w, with M = diag(d') + V diag(w) V^T.

        A zero in d is written as t - t: t stays in d' and sqrt(t) e_i is one more column of V
        with w = -1. Rows with more zeros than r, which are singular, are not represented.
        """
        zero = self.diag == 0
        diag, factor, weight = self.diag, self.factor, self._signs()
        count = min(int(zero.sum(-1).max()), self.rank) if zero.numel() else 0
        if count or bool(zero.any()):
            scale = self.diagonal().detach().abs().mean(-1, keepdim=True)
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            where = zero.int().argsort(dim=-1, descending=True, stable=True)[:, :count]
            height = (zero.gather(-1, where) * scale.sqrt()).unsqueeze(1)
            columns = diag.new_zeros((*diag.shape, count)).scatter(1, where.unsqueeze(1), height)
            diag = diag + scale * zero
            factor = torch.cat([factor, columns], -1)
            weight = torch.cat([weight, -weight.new_ones(count)])
        return diag, factor, torch.diag(weight) + factor.mT @ (factor / diag.unsqueeze(-1)), weight

    def _woodbury(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """M^-1 b for b (B, D, k), and LAPACK's info of the r x r solve."""
        diag, factor, capacity, _ = self._capacity()
        scaled = b / diag.unsqueeze(-1)
        inner, info = torch.linalg.solve_ex(capacity, factor.mT @ scaled)
        return scaled - (factor @ inner) / diag.unsqueeze(-1), info

    def _count_above(self, value: float | Tensor) -> Tensor:
        """How many eigenvalues exceed value, a float or (B,). Shape (B,).

        Sylvester's law on [[A, V], [V^T, -W]], A = diag(d - value): its inertia is that of A plus
        that of -(W + V^T A^-1 V), and also that of -W plus that of A + V W V^T.
        """
        shifted = DPLR(self.diag - self._scalar("_count_above", value), self.factor, self.sign)
        diag, _, capacity, weight = shifted._capacity()
        inner = (torch.linalg.eigvalsh(capacity) < 0).sum(-1)
        count: Tensor = (diag > 0).sum(-1) + inner - (weight < 0).sum()
        return count


def _low_rank_eigh(factor: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Q (B, D, m) and lam (B, m), m = min(D, r), with U diag(sign) U^T = Q diag(lam) Q^T."""
    q, r = torch.linalg.qr(factor)
    lam, rotation = torch.linalg.eigh((r * sign) @ r.mT)
    return q @ rotation, lam


def per_sample(where: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A float, 0-d or `(B,)` value in like's dtype, shaped to broadcast against `like (B, ...)`.

    Raises:
        TypeError: value is neither a real number nor a Tensor.
        ValueError: its shape or device does not fit, or it is not finite.
    """
    if isinstance(value, Tensor):
        if value.dim() > 0 and value.shape != like.shape[:1]:
            want, got = tuple(like.shape[:1]), tuple(value.shape)
            raise ValueError(f"{where}: {name} must be a float or have shape {want}, got {got}")
        if value.dim() == 1 and value.device != like.device:
            raise ValueError(f"{where}: {name} must be on {like.device}, got {value.device}")
    elif not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{where}: {name} must be a float or a Tensor, got {type(value).__name__}")
    column = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if not bool(column.isfinite().all()):
        worst = column[~column.isfinite()].flatten()[0].item()
        raise ValueError(f"{where}: {name} must be finite, got {worst}")
    return column if column.dim() == 0 else column.reshape(-1, *[1] * (like.dim() - 1))


def same(where: str, name: str, value: Tensor, like: Tensor) -> None:
    """Refuse a value of another dtype or device than like's."""
    for rule in ("dtype", "device"):
        if getattr(value, rule) != getattr(like, rule):
            got = getattr(value, rule)
            raise ValueError(f"{where}: {name} must have {rule} {getattr(like, rule)}, got {got}")
