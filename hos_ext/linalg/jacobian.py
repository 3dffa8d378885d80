"""Matrix-free Hessians of first-order models: s2 = d s1 / d x by automatic differentiation.

Any denoiser or score network has a second-order score: the Jacobian of its score. `ScoreHessian`
multiplies with it, forward (jvp) or transposed (vjp), with the interface of `DPLR`, so that learned
and differentiated Hessians are interchangeable; `posterior_from_score` makes a `Posterior` of it.
Nothing is D x D except what `dense()` returns.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .. import ops
from ..checks import check_count, check_samples, check_tensor, per_sample
from ..random import STREAM_PROBE, STREAM_START, fresh_seed
from .dplr import DPLR
from .operator import BatchRows

Score = Callable[[Tensor], Tensor]


_DENSE = 64  # eigenpairs forms the matrix up to this D
_CAPACITY = 64  # columns of the Krylov basis before it is restarted, or 6 k if that is more
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
CHUNK = 32
_GAP = 0.04  # what rounding may be between jvp and vjp; bfloat16 networks have 2^-8 an operation


class Estimate(NamedTuple):
    """The mean of independent terms, and what to expect of its error."""

    value: Tensor
    standard_error: Tensor  # zero where the value is exact. Shape of value


class Eigenpairs(NamedTuple):
    """Extreme eigenpairs of each matrix of a batch, and how well they are one."""

    values: Tensor  # shape (B, k), the most extreme first
    vectors: Tensor  # shape (B, D, k), orthonormal columns
    residuals: Tensor  # |A v - value v|; an eigenvalue lies within it. Shape (B, k)
    products: int  # vectors multiplied with each matrix
    converged: Tensor  # whether all k residuals meet the tolerance. bool, shape (B,)


class _Ritz(NamedTuple):
    values: Tensor  # the k largest, descending. (B, k)
    vectors: Tensor  # (B, D, k)
    residual: Tensor  # A v - value v. (B, D, k)
    length: Tensor  # its norm. (B, k)
    largest: Tensor  # modulus among all Ritz values. (B, 1)
    rotation: Tensor  # from the basis to all Ritz vectors. (B, m, m)


class ScoreHessian:
    """a J + b I with J = d score / d x, the second-order score of a first-order model, per sample.

    New ones have a = 1 and b = 0; `scale` and `+` change them. With x = alpha x0 + sigma z:

        eps(x, t)  ScoreHessian(lambda x: score_from_eps(eps(x, t), sigma), x)
        x0(x, t)   ScoreHessian(lambda x: score_from_x0(x, x0(x, t), sigma, alpha), x)
        v(x, t)    ScoreHessian(lambda x: score_from_v(x, v(x, t), sigma, alpha), x)
        `Scores`   ScoreHessian(lambda x: model(x, sigma).unscaled(sigma).score, x)
        diffusers  ScoreHessian(lambda x: score_from_eps(net(x, t).sample, sigma), x)
        covariance of x0 given x: hessian.scale(sigma**4 / alpha**2) + sigma**2 / alpha**2

    Args:
        score_fn: maps points (B, *dims) to scores of the same shape, each row to its own; B and the
            order of rows never change, so that a (B,) noise level may be closed over. A module must
            be in eval mode. It is called here, and again for each chunk of products.
        x: the points. Shape (B, *dims), D = prod(dims) in row-major order. float32 or float64.
        symmetrize: use (J + J^T) / 2, at one vjp more for each product. A density's J is symmetric,
            a network's only about (`asymmetry`).
        chunk_size: vectors multiplied at once, > 0: memory is that of about as many evaluations;
            1 multiplies them one by one, without `torch.func.vmap`. None is all at once.
        check: compare a jvp with a vjp, which finds scores that are random, that couple rows, or
            that torch cannot differentiate, and forward derivatives more than 4 % off. It costs
            about as much as four evaluations, and the memory of a training step.

    Fields:
        score: s1 at x. Shape (B, *dims).
        forward_mode: whether products are jvps. Where an operator has no forward derivative they
            are double vjps, at about twice the cost, and one warning says so.

    Raises:
        TypeError: score_fn is not callable, x or a score is not a Tensor.
        ValueError: x or a score has another shape, dtype or device; batch normalisation or dropout
            in training mode; or a check failed.

    Results carry no gradient, and parameters get none; the caller's no_grad does not matter.
    Attention runs by its plain formula, since the fused ones have no forward derivative.
    """

    def __init__(
        self,
        score_fn: Score,
        x: Tensor,
        *,
        symmetrize: bool = False,
        chunk_size: int | None = CHUNK,
        check: bool = True,
    ):
        if not callable(score_fn):
            raise TypeError(
                f"ScoreHessian: score_fn must be callable, got {type(score_fn).__name__}"
            )
        check_samples("ScoreHessian", "x", x)
        if x[0:1].numel() == 0 and x.shape[0] > 0:
            raise ValueError(f"ScoreHessian: x must have D >= 1, got shape {tuple(x.shape)}")
        if chunk_size is not None:
            check_count("ScoreHessian", "chunk_size", chunk_size)
        _refuse_training(score_fn)
        self.score_fn = score_fn
        self.x = x.detach().contiguous()  # jvp refuses expanded memory
        self.symmetrize = symmetrize
        self.chunk_size = chunk_size
        self.forward_mode = True
        with torch.no_grad(), _differentiable():
            self.score = score_fn(self.x)
        check_tensor("ScoreHessian", "the score", self.score, like=x, shape=tuple(x.shape))
        self._a, self._b = x.new_ones(()), x.new_zeros(())
        if check and x.shape[0] > 0:
            self._check()

    # ------------------------------------------------------------------------------- description

    @property
    def shape(self) -> torch.Size:
        """(B, D, D), the shape of `dense()`."""
        batch, size = self.x.flatten(1).shape
        return torch.Size((batch, size, size))

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def __repr__(self) -> str:
        batch, size, _ = self.shape
        mode = "jvp" if self.forward_mode else "double vjp"
        symmetric = ", symmetrize=True" if self.symmetrize else ""
        return f"ScoreHessian(B={batch}, D={size}, {mode}{symmetric}, {self.dtype}, {self.device})"

    def rows(self, index: Tensor | slice) -> BatchRows:
        """The matrices of these samples of the batch; products still go through all of it."""
        return BatchRows(self, index)

    def scale(self, a: float | Tensor) -> ScoreHessian:
        """a times the matrix, for a float or a (B,)."""
        value = self._scalar("scale", a)
        return self._like(value * self._a, value * self._b)

    def __add__(self, other: float | Tensor) -> ScoreHessian:
        """The sum with other times I, for a float or a (B,)."""
        return self._like(self._a, self._b + self._scalar("__add__", other))

    __radd__ = __add__

    # ---------------------------------------------------------------------------------- products

    def matvec(self, v: Tensor) -> Tensor:
        """The product with v. v and the result: shape (B, D) or (B, D, k)."""
        columns = self._columns("matvec", v)
        out = self._product(columns)
        return out.squeeze(-1) if v.dim() == 2 else out

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:
        """The product of the transpose with v, by vjp. Shapes as `matvec`."""
        columns = self._columns("rmatvec", v)
        if self.symmetrize:
            out = self._product(columns)
        else:
            out = self._affine(self._transposed(columns), columns)
        return out.squeeze(-1) if v.dim() == 2 else out

    def asymmetry(self, n_probes: int = 16, *, seed: int | None = None, first: int = 0) -> Tensor:
        """|J - J^T| / |J| in the Frobenius norm, whatever symmetrize, scale and + did; 0 ... 2.

        By |M|^2 = E |M z|^2 with random signs z; exact, by unit vectors, where n_probes >= D.

        Args:
            n_probes: >= 1.
            seed: key of the probes; None draws one from torch's default generator.
            first: global index of batch row 0: a row's probes do not depend on its batch.

        Returns:
            Shape (B,). About half of it is the relative error that symmetrizing removes, if the
            symmetric part is right.
        """
        check_count("ScoreHessian.asymmetry", "n_probes", n_probes)
        apart = whole = self.x.new_zeros(self.x.shape[0])
        for z in self._probes(n_probes, seed, first):
            forward = self._jacobian(z)
            apart = apart + (forward - self._transposed(z)).square().sum((1, 2))
            whole = whole + forward.square().sum((1, 2))
        return (apart / whole).sqrt()

    # ------------------------------------------------------------------------- dense and diagonal

    def dense(self) -> Tensor:
        """The matrix itself, by D products. Shape (B, D, D)."""
        out = self.x.new_empty(self.shape)
        for start, columns in self._units():
            out[..., start : start + columns.shape[-1]] = self._affine(
                self._jacobian(columns), columns
            )
        return (out + out.mT) / 2 if self.symmetrize else out

    def diagonal(self) -> Tensor:
        """The diagonal, exact, by D products: `estimate_diagonal` takes fewer. Shape (B, D)."""
        out = torch.empty_like(self.x.flatten(1))
        for start, columns in self._units():
            # J and its symmetric part have the same diagonal.
            product = self._affine(self._jacobian(columns), columns)
            rows = slice(start, start + columns.shape[-1])
            out[:, rows] = product[:, rows].diagonal(dim1=1, dim2=2)
        return out

    def trace(self) -> Tensor:
        """The trace, exact, by D products: `estimate_trace` takes fewer. Shape (B,)."""
        return self.diagonal().sum(-1)

    def estimate_diagonal(
        self, n_probes: int, *, seed: int | None = None, first: int = 0
    ) -> Estimate:
        """The diagonal by Hutchinson's estimator: the mean of z * (A z) with random signs z.

        The variance of entry i is sum_{j != i} A_ij^2 / n_probes (A symmetric).

        Args:
            n_probes: products to spend, >= 2; from D on the result is exact, by D products.
            seed: key of the probes; None draws one from torch's default generator.
            first: global index of batch row 0: a row's probes do not depend on its batch.

        Returns:
            Estimate, both of shape (B, D).

        Reference:
            Bekas, Kokiopoulou and Saad 2007, An estimator for the diagonal of a matrix.
        """
        check_count("ScoreHessian.estimate_diagonal", "n_probes", n_probes, least=2)
        if n_probes >= self.shape[1]:
            exact = self.diagonal()
            return Estimate(exact, torch.zeros_like(exact))
        return _mean(
            z * self._affine(self._jacobian(z), z) for z in self._probes(n_probes, seed, first)
        )

    def estimate_trace(self, n_probes: int, *, seed: int | None = None, first: int = 0) -> Estimate:
        """The trace by Hutchinson's estimator: the mean of z^T A z with random signs z.

        The variance is 2 sum_{i != j} A_ij^2 / n_probes (A symmetric).

        Args:
            n_probes, seed, first: as `estimate_diagonal`.

        Returns:
            Estimate, both of shape (B,).

        Reference:
            Hutchinson 1989, A stochastic estimator of the trace of the influence matrix.
        """
        check_count("ScoreHessian.estimate_trace", "n_probes", n_probes, least=2)
        if n_probes >= self.shape[1]:
            exact = self.trace()
            return Estimate(exact, torch.zeros_like(exact))
        return _mean(
            (z * self._affine(self._jacobian(z), z)).sum(1)
            for z in self._probes(n_probes, seed, first)
        )

    # ------------------------------------------------------------------------------- eigenpairs

    def eigh(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues (B, k), descending, and eigenvectors (B, D, k): `eigenpairs`.

        Raises:
            RuntimeError: no convergence, as with a network whose J is not symmetric.
        """
        pairs = self.eigenpairs(k)
        if not bool(pairs.converged.all()):
            raise RuntimeError(
                f"ScoreHessian.eigh: no convergence in {pairs.products} products, got a residual of"
                f" {float(pairs.residuals.max()):.3g}; symmetrize=True makes the matrix symmetric,"
                " eigenpairs returns what there is"
            )
        return pairs.values, pairs.vectors

    @torch.no_grad()
    def eigenpairs(
        self,
        k: int,
        *,
        largest: bool = True,
        tolerance: float | None = None,
        max_products: int | None = None,
    ) -> Eigenpairs:
        """The k largest or smallest eigenvalues and their eigenvectors, with their residuals.

        For D <= 64: `dense()` and LAPACK. Otherwise block Lanczos: a block of k vectors grows into
        a Krylov basis, kept orthonormal; each step adds the residuals of the leading Ritz pairs,
        and a full basis restarts from the best half of its own. All samples take part until the
        last has converged. Deterministic: the start is fixed, and each vector's entry of largest
        modulus is positive.

        Args:
            k: 1 <= k <= D.
            largest: the largest eigenvalues, else the smallest (algebraically).
            tolerance: of the residual |A v - value v| over the largest modulus among the Ritz
                values, > 0; None is 1e-9 (float64) or 1e-4 (float32). The error of an eigenvalue is
                about the square of that, the angle of a vector that over its relative gap.
            max_products: >= k; stop before more (not for D <= 64). None is 100 + 20 k.

        Returns:
            Eigenpairs. A network without symmetrize is no symmetric matrix: the pairs are about
            those of its symmetric part, the residuals end near its asymmetry, converged is False.

        Raises:
            TypeError: k or max_products is not an int.
            ValueError: k, tolerance or max_products out of range, or a product is not finite.
        """
        where = "ScoreHessian.eigenpairs"
        size = self.shape[1]
        check_count(where, "k", k)
        if k > size:
            raise ValueError(f"{where}: k must be in 1..{size}, got {k}")
        if tolerance is None:
            tolerance = _TOLERANCE[self.dtype]
        elif not tolerance > 0:
            raise ValueError(f"{where}: tolerance must be positive, got {tolerance}")
        if max_products is None:
            max_products = 100 + 20 * k
        check_count(where, "max_products", max_products, least=k)
        direction = 1 if largest else -1
        if size <= _DENSE:
            basis = torch.eye(size, dtype=self.dtype, device=self.device).expand(self.shape)
            pairs = _rayleigh_ritz(basis, direction * self.dense(), k)
            products = size
        else:
            pairs, products = self._krylov(k, direction, tolerance, max_products)
        peak = pairs.vectors.gather(1, pairs.vectors.abs().argmax(1, keepdim=True))
        vectors = pairs.vectors * torch.where(peak < 0, -1.0, 1.0).to(self.dtype)
        converged = (pairs.length <= tolerance * pairs.largest).all(-1)
        return Eigenpairs(direction * pairs.values, vectors, pairs.length, products, converged)

    @torch.no_grad()
    def low_rank(
        self,
        k: int,
        *,
        remainder: Literal["isotropic", "diagonal"] = "isotropic",
        n_probes: int = 32,
        seed: int | None = None,
        first: int = 0,
        floor: float = 1e-2,
        tolerance: float = 1e-3,
        max_products: int | None = None,
    ) -> DPLR:
        """A positive definite DPLR of rank k in place of a covariance that is this matrix.

        With the k largest eigenpairs V diag(l) V^T and R = A - V diag(l) V^T:
            "isotropic"  V diag(l - rest) V^T + rest I, rest = tr R / (D - k): keeps the eigenpairs;
            "diagonal"   V diag(l) V^T + diag(R): keeps the variance of each entry instead.
        tr R and diag(R) are Hutchinson's means over the products R z (exact for n_probes >= D), so
        that the trace is that of A as estimated. A network's A often has negative eigenvalues, and
        Hutchinson has noise: rest and the entries of diag(R) are kept above a floor (what it adds
        to entries the others lose, as far as they can). Pairs with l < rest count to the rest.

        On digits (`examples/any_denoiser.py`) "isotropic" at a rank well below D is calibrated, and
        "diagonal" is overconfident along the entries that the floor holds.

        Args:
            k: 0 <= k <= D.
            remainder: "isotropic" or "diagonal".
            n_probes: products for the remainder, >= 2.
            seed, first: of the probes, as `estimate_diagonal`.
            floor: of the remainder, over the mean variance tr A / D. In [0, 1); 0 may give a
                singular matrix.
            tolerance, max_products: as `eigenpairs`. Pairs that have not converged are used as they
                are: the trace is right all the same, unless the floor holds it up.

        Returns:
            DPLR (B, D, D). For s2 itself, which is not positive: of kappa = I + sigma^2 s2 first,
            ((hessian.scale(sigma**2) + 1).low_rank(k) + -1).scale(1 / sigma**2).

        Raises:
            TypeError: k or n_probes is not an int.
            ValueError: k, n_probes, floor or remainder out of range, or a trace that is not
                positive.
        """
        where = "ScoreHessian.low_rank"
        batch, size, _ = self.shape
        check_count(where, "k", k, least=0)
        check_count(where, "n_probes", n_probes, least=2)
        if remainder not in ("isotropic", "diagonal"):
            raise ValueError(
                f"{where}: remainder must be 'isotropic' or 'diagonal', got {remainder!r}"
            )
        if not 0 <= floor < 1:
            raise ValueError(f"{where}: floor must be in [0, 1), got {floor}")
        values, vectors = self.x.new_empty((batch, 0)), self.x.new_empty((batch, size, 0))
        if k:
            pairs = self.eigenpairs(k, tolerance=tolerance, max_products=max_products)
            values, vectors = pairs.values, pairs.vectors
        if n_probes >= size:
            rest = self.diagonal() - (vectors.square() * values.unsqueeze(1)).sum(-1)
        else:
            rest = _mean(
                z
                * (
                    self._affine(self._jacobian(z), z)
                    - vectors @ (values.unsqueeze(-1) * (vectors.mT @ z))
                )
                for z in self._probes(n_probes, seed, first)
            ).value
        total = rest.sum(-1, keepdim=True)
        trace = total + values.sum(-1, keepdim=True)
        if not bool((trace > 0).all()):
            raise ValueError(
                f"{where}: the matrix must be a covariance, got a trace of {float(trace.min()):g}"
            )
        least = floor * trace / size
        if remainder == "diagonal":
            raised = torch.maximum(rest, least)
            # What the floor added is taken from the other entries, as far as they have it.
            spare = (raised - least).sum(-1, keepdim=True)
            share = (total - size * least).clamp_min(0) / spare.where(spare > 0, 1.0)
            return DPLR(least + (raised - least) * share, vectors * _root(values.clamp_min(0)))
        # The level at which sum_i max(l_i, level) + (D - k) level is the trace: the least of those
        # that keep the j leading pairs alone.
        kept = torch.cat([torch.zeros_like(total), values.cumsum(-1)], -1)[:, :size]
        others = torch.arange(size, size - kept.shape[-1], -1, device=self.device)
        level = torch.maximum(((trace - kept) / others).amin(-1, keepdim=True), least)
        return DPLR(level.expand(-1, size), vectors * _root((values - level).clamp_min(0)))

    # ---------------------------------------------------------------------------------- helpers

    def _like(self, a: Tensor, b: Tensor) -> ScoreHessian:
        other = copy.copy(self)
        other._a, other._b = a, b
        return other

    def _scalar(self, where: str, a: float | Tensor) -> Tensor:
        """A float, 0-d or (B,) value, shaped to broadcast against (B, D, k)."""
        value = per_sample(f"ScoreHessian.{where}", "a", a, self.x)
        return value if value.dim() == 0 else value.reshape(-1, 1, 1)

    def _columns(self, where: str, v: Tensor) -> Tensor:
        """v as (B, D, k)."""
        check_tensor(f"ScoreHessian.{where}", "v", v, like=self.x)
        batch, size, _ = self.shape
        if v.dim() not in (2, 3) or v.shape[:2] != (batch, size):
            want = f"({batch}, {size}) or ({batch}, {size}, k)"
            raise ValueError(
                f"ScoreHessian.{where}: v must have shape {want}, got {tuple(v.shape)}"
            )
        return v.detach().reshape(batch, size, -1 if v.numel() else v.shape[2:].numel())

    def _affine(self, product: Tensor, v: Tensor) -> Tensor:
        """a J v + b v from J v, all (B, D, k)."""
        return self._a * product + self._b * v

    def _product(self, v: Tensor) -> Tensor:
        """The product with v (B, D, k)."""
        product = self._jacobian(v)
        if self.symmetrize:
            product = (product + self._transposed(v)) / 2
        return self._affine(product, v)

    def _jacobian(self, v: Tensor) -> Tensor:
        """J v for v (B, D, k), forward."""
        if self.forward_mode:
            return self._map(lambda t: jvp(self.score_fn, (self.x,), (t,))[1], v)
        with torch.no_grad(), _differentiable():
            # u -> J^T u is linear, so that its own transpose is J.
            pull = vjp(self.score_fn, self.x)[1]
            push = vjp(lambda u: pull(u)[0], torch.zeros_like(self.x))[1]
        return self._map(lambda t: push(t)[0], v)

    def _transposed(self, v: Tensor) -> Tensor:
        """J^T v for v (B, D, k)."""
        with torch.no_grad(), _differentiable():
            pull = vjp(self.score_fn, self.x)[1]
        return self._map(lambda t: pull(t)[0], v)

    @torch.no_grad()
    def _map(self, product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """A product with points (B, *dims), applied to the columns of v (B, D, k)."""
        if v.numel() == 0:
            return torch.zeros_like(v)
        points = v.movedim(-1, 0).reshape(-1, *self.x.shape)
        with _differentiable():
            if self.chunk_size == 1 or len(points) == 1:
                out = torch.stack([product(t) for t in points])
            else:
                out = vmap(product, chunk_size=self.chunk_size)(points)
        return out.flatten(2).movedim(0, -1)

    def _units(self) -> Iterator[tuple[int, Tensor]]:
        """The unit vectors in chunks (B, D, c), with the index of the first."""
        batch, size, _ = self.shape
        step = self.chunk_size or size
        for start in range(0, size, step):
            columns = self.x.new_zeros((size, min(step, size - start)))
            columns[start : start + step].fill_diagonal_(1.0)
            yield start, columns.expand(batch, -1, -1)

    def _probes(self, n: int, seed: int | None, first: int) -> Iterator[Tensor]:
        """n vectors of random signs in chunks (B, D, c); the unit vectors if n >= D."""
        if n >= self.shape[1]:
            yield from (columns for _, columns in self._units())
            return
        if seed is None:
            seed = fresh_seed()
        step = self.chunk_size or n
        for start in range(0, n, step):
            draws = [
                ops.uniform(
                    self.shape[:2],
                    seed=seed,
                    offset=offset,
                    first=first,
                    stream=STREAM_PROBE,
                    dtype=self.dtype,
                    device=self.device,
                )
                for offset in range(start, min(start + step, n))
            ]
            yield torch.where(torch.stack(draws, -1) < 0.5, -1.0, 1.0).to(self.dtype)

    def _normal(self, k: int, offset: int) -> Tensor:
        """k standard normal columns, the same in every call. Shape (B, D, k)."""
        draws = ops.normal(
            (*self.shape[:2], k),
            seed=0,
            offset=offset,
            stream=STREAM_START,
            dtype=self.dtype,
            device=self.device,
        )
        return draws

    def _krylov(
        self, k: int, direction: int, tolerance: float, max_products: int
    ) -> tuple[_Ritz, int]:
        """The k largest eigenpairs of direction times the matrix, and the products spent."""
        batch, size, _ = self.shape
        capacity = min(size, max(_CAPACITY, 6 * k))
        basis = image = self.x.new_empty((batch, size, 0))
        block, products = self._normal(k, 0), 0
        while True:
            block = _orthonormal(block, basis)
            basis = torch.cat([basis, block], -1)
            image = torch.cat([image, direction * self._product(block)], -1)
            products += block.shape[-1]
            pairs = _rayleigh_ritz(basis, image, k)
            room = min(k, size - basis.shape[-1])
            done = bool((pairs.length <= tolerance * pairs.largest).all())
            if done or room == 0 or products + room > max_products:
                return pairs, products
            # What has converged to rounding would add noise alone: a fresh direction instead.
            spent = (pairs.length <= torch.finfo(self.dtype).eps * pairs.largest).unsqueeze(1)
            block = torch.where(spent, self._normal(k, products), pairs.residual)[..., :room]
            if basis.shape[-1] + room > capacity:
                kept = pairs.rotation[..., : capacity // 2]
                basis, image = basis @ kept, image @ kept

    def _check(self) -> None:
        """<u, J v> = <J^T u, v> with u in row 0 alone, where J^T u must then be too.

        u is along J v: for any other both sides would be small, about 1 / sqrt(D) of |u| |J v|.
        """
        v = self._normal(1, 0)
        forward, again = self._try_forward(v)
        length = forward[0].norm()
        u = torch.zeros_like(v)
        u[0] = self._normal(1, 1)[0] if length == 0 else forward[:1].mT / length
        gap = (again - self.score).abs().max()
        if bool(gap > 0.01 * self.score.abs().max()):
            raise ValueError(
                "ScoreHessian: score_fn must give the same score twice, got two that differ by"
                f" {float(gap):.3g}"
            )
        try:
            backward = self._transposed(u).squeeze(-1)
        except RuntimeError as error:
            raise RuntimeError(
                "ScoreHessian: score_fn must be differentiable by torch.func.vjp (check=False with"
                f" symmetrize=False does without), got: {error}"
            ) from error
        if not bool(backward.any()):
            raise ValueError(
                "ScoreHessian: score_fn must be differentiable in x (no detach, no_grad or .data in"
                " it), got a zero gradient"
            )
        if bool(backward[1:].abs().sum() > 1e-6 * backward[0].abs().sum()):
            raise ValueError(
                "ScoreHessian: score_fn must treat each row by itself, got a score of row 0 that"
                " depends on other rows"
            )
        one, other = u[0, :, 0].dot(forward[0]), backward[0].dot(v[0, :, 0])
        if bool((one - other).abs() > _GAP * torch.maximum(one.abs(), other.abs())):
            raise ValueError(
                "ScoreHessian: score_fn must have a forward derivative that fits its gradient, got"
                f" <u, J v> = {float(one):.6g} and <J^T u, v> = {float(other):.6g}"
            )

    def _try_forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """J v (B, D) for v (B, D, 1) and the score, by jvp or else, from now on, by double vjp."""
        points = v.reshape(self.x.shape)
        try:
            with torch.no_grad(), _differentiable():
                both = jvp(self.score_fn, (self.x,), (points,))
            return both[1].flatten(1), both[0]
        except RuntimeError as refusal:  # NotImplementedError is one
            reason = refusal
        self.forward_mode = False
        try:
            forward = self._jacobian(v).squeeze(-1)
        except RuntimeError as error:
            raise RuntimeError(
                "ScoreHessian: score_fn must be differentiable by torch.func.jvp, or twice by"
                f" torch.func.vjp, got: {reason}"
            ) from error
        warnings.warn(
            "ScoreHessian: products by double vjp, for want of a forward derivative:"
            f" {str(reason).splitlines()[0]}",
            stacklevel=4,
        )
        return forward, self.score


class _DenseGroupNorm(TorchFunctionMode):
    """group_norm with its input made contiguous: its forward derivative fails for transposed
    memory, which is what the attention blocks of U-Nets return."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.group_norm and args:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def _differentiable() -> Iterator[None]:
    """Keeps a network to what torch can differentiate forward: not so fused attention."""
    with sdpa_kernel(SDPBackend.MATH), _DenseGroupNorm():
        yield


def _held_modules(score_fn: Score) -> Iterator[nn.Module]:
    """The modules that a callable shows: itself, its object, closure, defaults, partial parts."""
    left: list[Any] = [score_fn]
    seen: dict[int, Any] = {}  # keeps what it names alive, so that no id comes twice
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, partial):
            left += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            left += [value.__func__, value.__self__]
        elif isinstance(value, FunctionType):
            left += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            for cell in value.__closure__ or ():
                try:
                    left.append(cell.cell_contents)
                except ValueError:  # a variable without a value yet
                    continue


def _refuse_training(score_fn: Score) -> None:
    """Raises for batch normalisation or dropout in training mode, where modules can be seen."""
    for module in (m for root in _held_modules(score_fn) for m in root.modules()):
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if module.training and (random or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            raise ValueError(
                "ScoreHessian: score_fn must be in eval mode, got"
                f" {type(module).__name__} in training mode"
            )


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """The block made orthonormal, and orthogonal to an orthonormal basis."""
    block = block / block.norm(dim=1, keepdim=True)
    for _ in range(2):  # twice: one pass leaves the rounding of near parallels
        block = torch.linalg.qr(block - basis @ (basis.mT @ block))[0]
    return block


def _rayleigh_ritz(basis: Tensor, image: Tensor, k: int) -> _Ritz:
    """The k largest Ritz pairs of A from an orthonormal basis (B, D, m) and its image under A."""
    finite = image.isfinite().all(-1).all(-1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"ScoreHessian.eigenpairs: products must be finite, got NaN or inf for row {row}"
        )
    projected = basis.mT @ image
    ritz, rotation = torch.linalg.eigh((projected + projected.mT).double() / 2)
    values, rotation = ritz.flip(-1).to(basis.dtype), rotation.flip(-1).to(basis.dtype)
    vectors = basis @ rotation[..., :k]
    residual = image @ rotation[..., :k] - vectors * values[:, None, :k]
    largest = values.abs().amax(-1, keepdim=True)
    return _Ritz(values[:, :k], vectors, residual, residual.norm(dim=1), largest, rotation)


def _root(values: Tensor) -> Tensor:
    """Square roots of (B, k), as weights of columns."""
    return values.sqrt().unsqueeze(1)


def _mean(chunks: Iterator[Tensor]) -> Estimate:
    """The mean over the last axis of all chunks, and its standard error."""
    n, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for terms in chunks:
        m = terms.shape[-1]
        new = terms.mean(-1)
        spread = (terms - new.unsqueeze(-1)).square().sum(-1)
        if n == 0:
            mean, squares = new, spread
        else:  # Chan, Golub and LeVeque: no difference of large sums
            gap = new - mean
            mean = mean + gap * (m / (n + m))
            squares = squares + spread + gap.square() * (n * m / (n + m))
        n += m
    return Estimate(mean, (squares / (n * (n - 1))).sqrt())
