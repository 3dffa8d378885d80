"""DPLR: batches of symmetric matrices diag(d) + U diag(sign) U^T, as Hessian or as covariance.

The class holds the parts, multiplies with them and checks what comes. `woodbury` solves and counts
through r x r matrices, and `rational_krylov` finds eigenpairs. A D x D matrix is formed by
`dense()` alone, which `eigh` calls where D <= 64 or r + 4 k > D.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import (
    WIDE,
    check,
    check_int,
    check_low_rank,
    check_seed,
    check_shape,
    check_tensor,
    is_int,
    per_sample,
    place_of,
    row_index,
    rows_at,
    said_by,
)
from ..ops.noise import draw_normal
from ..random import STREAM_POSTERIOR, Key, fresh_seed, seed_from
from ..records import register_tree
from . import woodbury
from .derivatives import attach, change_of_product, derivative_wanted, low_rank_change
from .rational_krylov import fix_signs, leading_vectors
from .woodbury import Parts, low_rank_eigh

_DENSE = 64  # eigh forms the matrix up to this D


class DPLR:
    """diag(d) + U diag(sign) U^T for each sample of a batch.

    Args:
        diag: d. Shape (B, D), D >= 1. float32 or float64. It may hold zeros and negative values.
        factor: U. Shape (B, D, r), same dtype and device; r may be 0. None is r = 0.
        sign: +1 or -1 for each column of U, shared by the batch. Shape (r,), any real dtype, same
            device; None is all +1.

    Raises:
        TypeError: an argument is not a Tensor.
        ValueError: shapes, dtypes or devices disagree, or a sign is not +-1.

    Methods are differentiable through torch except where they say otherwise. NaN and inf pass
    through, except in `eigh`, which refuses them. `dense()` is the one route to a D x D matrix;
    besides the user only `eigh` takes it, for D <= 64 or r + 4 k > D.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR
        >>> matrix = DPLR(torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0], [1.0]]]))
        >>> matrix.dense()
        tensor([[[2., 1.],
                 [1., 3.]]])
        >>> matrix @ torch.tensor([[1.0, 0.0]])
        tensor([[2., 1.]])
        >>> matrix
        DPLR(B=1, D=2, rank=1, torch.float32, cpu)
    """

    # numpy's + and @ leave the matrix to the methods here, instead of making arrays of objects.
    __array_ufunc__ = None

    def __init__(self, diag: Tensor, factor: Tensor | None = None, sign: Tensor | None = None):
        check_tensor("DPLR", "diag", diag)
        usable = diag.dim() == 2 and diag.shape[1] > 0
        check("DPLR", usable, "diag must have shape (B, D), D >= 1", tuple(diag.shape))
        if factor is None:
            factor = diag.new_empty((*diag.shape, 0))
        sign = check_low_rank("DPLR", factor, sign, diag, because=" like diag")
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

    def __len__(self) -> int:
        return len(self.diag)

    def __getitem__(self, index: int | slice | Tensor) -> DPLR:
        """`rows`; a single number keeps the batch axis."""
        where = "DPLR[index]"
        return self._rows(where, row_index(where, index, len(self)))

    def __iter__(self) -> Iterator[DPLR]:
        """The matrices of the batch one by one, each a batch of one."""
        return (self[row : row + 1] for row in range(len(self)))

    def rows(self, index: Tensor | slice) -> DPLR:
        """The matrices of these samples of the batch."""
        return self._rows("DPLR.rows", index)

    def _rows(self, where: str, index: Tensor | slice) -> DPLR:
        factor = rows_at(where, self.factor, index)
        return DPLR.of(rows_at(where, self.diag, index), factor, self.sign)

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
        """float32 or float64."""
        return self.diag.dtype

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.diag.device

    @property
    def parts(self) -> Parts:
        """diag, factor and sign, with ones for a sign that is None."""
        sign = self.diag.new_ones(self.rank) if self.sign is None else self.sign
        return Parts(self.diag, self.factor, sign)

    def __repr__(self) -> str:
        signed = "" if self.sign is None else f", sign={[int(s) for s in self.sign.tolist()]}"
        batch, size = self.diag.shape
        return f"DPLR(B={batch}, D={size}, rank={self.rank}{signed}, {self.dtype}, {self.device})"

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DPLR:
        """The same matrix on another device or in another dtype: `to("cuda")`,
        `to(torch.float64)`, `to("cuda", torch.float64)`.

        Raises:
            TypeError, ValueError: device is no device, dtype is not float32 or float64.
        """
        place, kind = place_of("DPLR.to", device, dtype, WIDE)
        check_whole("DPLR.to", "self", self)
        diag, factor = self.diag.to(place, kind), self.factor.to(place, kind)
        return DPLR.of(diag, factor, None if self.sign is None else self.sign.to(place))

    # -------------------------------------------------------------------------------- elementary

    def dense(self) -> Tensor:
        """The matrix itself. Shape (B, D, D)."""
        return ops.assemble_hessian(self.diag, self.factor, sign=self.sign)

    def matvec(self, v: Tensor) -> Tensor:
        """The product with v. v and the result: shape (B, D) or (B, D, k)."""
        with said_by("DPLR.matvec", "hessian_matvec"):
            return ops.hessian_matvec(self.diag, self.factor, v, sign=self.sign)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matvec(v)

    def diagonal(self) -> Tensor:
        """d_i + sum_k sign_k U_ik^2. Shape (B, D)."""
        if self.rank == 0:
            return self.diag
        return self.diag + self._weigh(self.factor.square()).sum(-1)

    def trace(self) -> Tensor:
        """The trace. Shape (B,)."""
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
            shift = per_sample("DPLR.__add__", "other", other, self.diag)
            return DPLR.of(self.diag + shift, self.factor, self.sign)
        check_whole("DPLR.__add__", "other", other)
        if other.shape != self.shape:
            shapes = f"{tuple(self.shape)}, got {tuple(other.shape)}"
            raise ValueError(f"DPLR.__add__: other must have shape {shapes}")
        check_tensor("DPLR.__add__", "other", other.diag, like=self.diag)
        sign = None
        if self.sign is not None or other.sign is not None:
            sign = torch.cat([self.parts.sign, other.parts.sign])
        return DPLR.of(self.diag + other.diag, torch.cat([self.factor, other.factor], -1), sign)

    __radd__ = __add__

    def scale(self, a: float | Tensor) -> DPLR:
        """a times the matrix, for a float or a (B,); a negative a flips the signs.

        Raises:
            ValueError: a (B,) with both positive and negative values (signs are shared).
        """
        value = per_sample("DPLR.scale", "a", a, self.diag)
        negative = bool((value < 0).any())
        mixed = negative and bool((value > 0).any())
        check("DPLR.scale", not mixed, "a must have one sign over the batch", lambda: a)
        root = (-value if negative else value).sqrt().reshape(-1, 1, 1)
        sign = -self.parts.sign if negative else self.sign
        return DPLR.of(self.diag * value, self.factor * root, sign)

    # -------------------------------------------------------------------------- r x r factorised

    def solve(self, b: Tensor) -> Tensor:
        """M^-1 b by Woodbury. b and the result: shape (B, D) or (B, D, k).

        The error is that of an ordinary solve: machine precision times the condition number of M,
        and not of d. Rows whose d is zero or small beside the low-rank part are kept as unknowns.
        More than r such rows make M itself as ill-conditioned as they.

        Raises:
            ValueError: M is singular: more zeros in d than rank, or an exactly singular r x r
                matrix; or b does not fit.
        """
        where = "DPLR.solve"
        check_tensor(where, "b", b, like=self.diag)
        batch, size = self.diag.shape
        check_shape(where, "b", b, (batch, size), (batch, size, "k"))
        length = self.diag.detach().abs()
        zeros, rule = (length == 0).sum(-1), "the matrix must be nonsingular"
        few = bool((zeros <= self.rank).all())
        check(where, few, rule, lambda: f"{zeros.max()} zeros on the diagonal at rank {self.rank}")
        parts, columns = self.parts, b.unsqueeze(-1) if b.dim() == 2 else b
        if bool(((length > 0) & (length < 4 * torch.finfo(self.dtype).tiny)).any()):
            parts, columns = self._wide_parts(), columns.double()  # whose inverse is finite
        out, info = woodbury.solve(parts, columns)
        regular, out = not bool(info.any()), out.to(self.dtype)
        check(where, regular, rule, lambda: f"a singular one at batch {int(info.nonzero()[0])}")
        return out.squeeze(-1) if b.dim() == 2 else out

    def logdet(self) -> Tensor:
        """log det M by the determinant lemma. Shape (B,); as `torch.logdet`: -inf where det M is
        zero, NaN where it is negative. Small d are handled as in `solve`. Computed in float64: the
        inverse of a subnormal float32 overflows."""
        return woodbury.logdet(self._wide_parts()).to(self.dtype)

    def _wide_parts(self) -> Parts:
        """`parts` in float64."""
        return Parts(*(t.double() for t in self.parts))

    def is_positive_definite(self) -> Tensor:
        """Whether every eigenvalue is > 0, by counting (no eigenvalue is computed). Shape (B,)."""
        return woodbury.is_positive_definite(self.parts)

    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        offset: int = 0,
        first: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n draws of N(0, M) for each sample of the batch.

        With all signs +1 a draw is sqrt(d) z1 + U z2 (d >= 0). With a -1 among them it is
        sqrt(d) (I + V S V^T)^(1/2) z1 with V = U / sqrt(d), by an r x r eigenproblem (d > 0).

        Args:
            n: number of draws.
            seed: key of the counter-based noise; None draws one from torch's default generator.
            offset: number of the first draw: draw j uses the noise of offset + j.
            first: global index of batch row 0. Draw j of row b has the same noise however draws
                and rows are split among calls.
            generator: a `torch.Generator` in place of seed, which is drawn from it.

        Returns:
            Shape (n, B, D). Pathwise differentiable in d and U, in reverse and in forward mode,
            also where eigenvalues of M are equal. Where d or M has a zero the root has no
            derivative there: inf or NaN.

        Raises:
            TypeError: n is not an int.
            ValueError: n < 0, d has a value that the formula above cannot take, or M has a
                negative eigenvalue.
            RuntimeError: on a second derivative, if there is a sign -1.
        """
        where = "DPLR.sample"
        n = check_int(where, "n", n, 2**31)
        seed = seed_from(where, seed, generator)
        seed, offset, first = check_seed(where, seed, offset=offset, first=first)
        signed = self.sign is not None and bool((self.sign < 0).any())
        bad = ~(self.diag > 0) if signed else self.diag < 0
        rule = f"diag must be {'> 0 where a sign is -1' if signed else '>= 0'}"
        check(where, not bool(bad.any()), rule, lambda: self.diag[bad][0].item())
        key = Key(fresh_seed() if seed is None else seed, offset, first)
        z = self._normals(n, self.diag.shape[1] + (0 if signed else self.rank), key)
        return self._signed_draws(z) if signed else self._draws(z)

    def _normals(self, n: int, width: int, key: Key) -> Tensor:
        """The noise of draws offset, ..., offset + n - 1. Shape (n, B, width)."""
        shape = (len(self.diag), width)
        if n == 0:
            return self.diag.new_empty((0, *shape))
        keys = (key._replace(offset=key.offset + j) for j in range(n))
        return torch.stack([draw_normal(at, STREAM_POSTERIOR, shape, self.diag) for at in keys])

    def _draws(self, noise: Tensor) -> Tensor:
        size = self.diag.shape[1]
        z1, z2 = noise[..., :size], noise[..., size:]
        return self.diag.sqrt() * z1 + (self.factor @ z2.permute(1, 2, 0)).permute(2, 0, 1)

    def _signed_draws(self, noise: Tensor) -> Tensor:
        # With V S V^T = Q diag(lam) Q^T the root of I + V S V^T is I + Q (sqrt(1 + lam) - 1) Q^T.
        # lam comes in float64: where it is near -1, float32 would leave no digit of the root.
        root, sign = self.diag.sqrt(), self.parts.sign
        basis, lam = _whitened_eigh(*(t.detach() for t in self._wide_parts()))
        slack = 64 * torch.finfo(self.dtype).eps * lam.abs().amax(-1, keepdim=True)
        fine, rule = not bool((lam < -1 - slack).any()), "the matrix must be positive semidefinite"
        check("DPLR.sample", fine, rule, "a negative eigenvalue")
        gain = ((1 + lam).clamp_min(0).sqrt() - 1).unsqueeze(-1).to(self.dtype)
        basis, z = basis.to(self.dtype), noise.permute(1, 2, 0)
        white = z + basis @ (gain * (basis.mT @ z))
        if derivative_wanted(self.diag, self.factor):
            # At an eigenvalue 0 the root has no derivative: inf or NaN, not that of rounding.
            least = 64 * torch.finfo(torch.float64).eps * lam.abs().amax(-1, keepdim=True)
            values = (1 + lam).where(1 + lam > least, 0.0).to(self.dtype)
            change = low_rank_change("DPLR.sample", self.factor / root.unsqueeze(-1), sign)
            ones = torch.ones_like(self.diag[:, 0])
            change_of_root = change_of_product(basis, values, ones, change, torch.sqrt, z)
            white = attach(white, change_of_root)
        draws: Tensor = root * white.permute(2, 0, 1)
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
                eigenvalues cluster. Differentiable once. Where some are equal each by itself has
                no derivative; symmetric functions of all equal ones have, and it is right.
            vectors: shape (B, D, k), orthonormal columns. Not differentiable: constants.

        Raises:
            TypeError: k is not an int.
            ValueError: k out of range, or d or U not finite.
            RuntimeError: no convergence; on a second derivative.
        """
        where, (batch, size) = "DPLR.eigh", self.diag.shape
        check(where, is_int(k), "k must be an int", type(k).__name__, TypeError)
        k = int(k)
        if not 1 <= k <= size:
            raise ValueError(f"{where}: k must be an integer in 1..{size}, got {k}")
        finite = bool(woodbury.is_finite(self.parts).all())
        check(where, finite, "diag and factor must be finite", "NaN or inf")
        wide = self.to(torch.float64)
        with torch.no_grad():
            if size <= _DENSE or self.rank + 4 * k > size or batch == 0:
                vectors = torch.linalg.eigh(wide.dense())[1][..., -k:].flip(-1)
            else:
                vectors = wide._leading_vectors(k)
            vectors = fix_signs(vectors)
        values = (vectors * wide.matvec(vectors)).sum(1)
        return values.to(self.dtype), vectors.to(self.dtype)

    def _leading_vectors(self, k: int) -> Tensor:
        diag, factor, sign = self.parts
        found = []
        for row in zip(diag.split(1), factor.split(1), strict=True):
            vectors = leading_vectors(Parts(*row, sign), k)
            if vectors is None:
                raise RuntimeError("DPLR.eigh: no convergence in 100 steps")
            found.append(vectors)
        return torch.cat(found)

    def _weigh(self, columns: Tensor) -> Tensor:
        """columns (..., r) times sign."""
        return columns if self.sign is None else columns * self.sign


def _whitened_eigh(diag: Tensor, factor: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """`low_rank_eigh` of U / sqrt(d)."""
    return low_rank_eigh(factor / diag.sqrt().unsqueeze(-1), sign)


def _from_parts(values: Iterable[Any], names: Iterable[str]) -> DPLR:
    """A matrix of whatever torch's trees hold; nothing is checked or read."""
    matrix = DPLR.__new__(DPLR)
    matrix.sign = None
    for name, value in zip(names, values, strict=True):
        setattr(matrix, name, value)
    return matrix


register_tree(DPLR, lambda matrix: ("diag", "factor", "sign"), _from_parts)


def check_whole(where: str, name: str, matrix: DPLR) -> None:
    """The parts of a DPLR are tensors that fit each other still: anyone may change them."""
    parts = (getattr(matrix, "diag", None), getattr(matrix, "factor", None))
    whole = all(isinstance(part, Tensor) for part in parts)
    check(where, whole, f"{name} must be whole", "a DPLR that was changed", TypeError)
    check_tensor(where, f"{name}.diag", matrix.diag, shape=("B", "D"))
    check_low_rank(where, matrix.factor, matrix.sign, matrix.diag)
