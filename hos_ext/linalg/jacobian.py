"""Matrix-free Hessians of first-order models: s2 = d s1 / d x by automatic differentiation.

Any denoiser or score network has a second-order score: the Jacobian of its score. `ScoreHessian`
multiplies with it and answers as `DPLR` does, so that learned and differentiated Hessians are
interchangeable; `posterior_from_score` makes a `Posterior` of it. Nothing is D x D except what
`dense()` returns. The derivatives are in `autodiff`, traces and diagonals by random signs in
`hutchinson`, eigenpairs in `block_lanczos`, the way to a DPLR in `truncation`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import (
    check,
    check_count,
    check_flag,
    check_number,
    check_samples,
    check_seed,
    check_shape,
    check_tensor,
    per_sample,
    said_by,
)
from ..random import Key, fresh_seed, seed_from
from ..scores import FirstOrderScore, SymmetricOperator
from . import hutchinson, probing
from .autodiff import CHUNK, Jacobian
from .block_lanczos import Eigenpairs, eigenpairs
from .dplr import DPLR
from .hutchinson import Estimate
from .operator import BatchRows
from .probing import Probes, Products, check_deflation, check_probes
from .truncation import Remainder, check_truncation, truncated


class ScoreHessian:
    """The second-order score of a first-order model: its Jacobian, known by products.

    The matrix of a sample is a J + b I with J = d score / d x. A new one has a = 1 and b = 0, and
    `scale` and `+` change them. With x = alpha x0 + sigma z, for each kind of network:

        eps(x, t)  ScoreHessian(lambda x: score_from_eps(eps(x, t), sigma), x)
        x0(x, t)   ScoreHessian(lambda x: score_from_x0(x, x0(x, t), sigma, alpha), x)
        v(x, t)    ScoreHessian(lambda x: score_from_v(x, v(x, t), sigma, alpha), x)
        flow(x, t) ScoreHessian(lambda x: score_from_velocity(x, flow(x, t), sigma=t), x)
        `Scores`   ScoreHessian(lambda x: model(x, sigma).unscaled(sigma).score, x)
        diffusers  ScoreHessian(lambda x: score_from_eps(net(x, t).sample, sigma), x)

    `hos_ext.uncertainty.posterior_from_score` makes a posterior of it.

    Args:
        score_fn: maps points (B, *dims) to scores of the same shape, each row to its own. B and the
            order of the rows never change, so it may hold one noise level for each row. A module
            must be in eval mode. It is called here, and again for each chunk of products.
        x: the points. Shape (B, *dims), D = prod(dims) in row-major order. float32 or float64.
        symmetrize: use (J + J^T) / 2, at one vjp more for each product. J is symmetric for a
            density, and only nearly so for a network (`asymmetry`).
        chunk_size: how many vectors are multiplied at once, > 0. Memory is that of about as many
            evaluations. 1 multiplies them one by one, without `torch.func.vmap`; None takes all.
        check: compare a jvp with a vjp. This finds scores that are random, that couple rows or
            that torch cannot differentiate, and forward derivatives more than 4 % off. It costs
            about as much as four evaluations, and the memory of a training step.

    Attributes:
        score: s1 at x. Shape (B, *dims).
        forward_mode: whether products are jvps. Where an operator has no forward derivative they
            are double vjps, at about twice the cost, and one warning says so.

    Raises:
        TypeError: score_fn is not callable, x or a score is not a Tensor.
        ValueError: x or a score has another shape, dtype or device; batch normalisation or dropout
            in training mode; or a check failed.

    Results carry no gradient, and parameters get none, whether or not the caller uses no_grad.
    Attention runs by its plain formula, because the fused ones have no forward derivative.

    Example:
        >>> import torch
        >>> from hos_ext.linalg import ScoreHessian
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> hessian = ScoreHessian(lambda x: -x * x.sum(1, keepdim=True), x)
        >>> hessian.dense()
        tensor([[[-4., -1.],
                 [-2., -5.]]])
        >>> hessian.scale(0.5) @ torch.tensor([[1.0, 0.0]])
        tensor([[-2., -1.]])
    """

    def __init__(
        self,
        score_fn: FirstOrderScore,
        x: Tensor,
        *,
        symmetrize: bool = False,
        chunk_size: int | None = CHUNK,
        check: bool = True,
    ):
        check_flag("ScoreHessian", symmetrize=symmetrize, check=check)
        _check_input(score_fn, x, chunk_size)
        self._jacobian = Jacobian(score_fn, x, chunk_size)
        self.x = self._jacobian.x
        self.score = self._jacobian.score
        self.symmetrize = symmetrize
        self._a, self._b = x.new_ones(()), x.new_zeros(())
        if check and x.shape[0] > 0:
            self._jacobian.check()

    # ------------------------------------------------------------------------------- description

    @property
    def shape(self) -> torch.Size:
        """(B, D, D), the shape of `dense()`."""
        batch, size = self.x.flatten(1).shape
        return torch.Size((batch, size, size))

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """Where the points are."""
        return self.x.device

    @property
    def forward_mode(self) -> bool:
        """Whether products are jvps, else double vjps."""
        return self._jacobian.forward_mode

    def __repr__(self) -> str:
        batch, size, _ = self.shape
        mode = "jvp" if self.forward_mode else "double vjp"
        symmetric = ", symmetrize=True" if self.symmetrize else ""
        return f"ScoreHessian(B={batch}, D={size}, {mode}{symmetric}, {self.dtype}, {self.device})"

    def rows(self, index: Tensor | slice) -> BatchRows:
        """The matrices of these samples of the batch; products still go through all of it."""
        with said_by("ScoreHessian.rows", "BatchRows"):
            return BatchRows(self, index)

    def scale(self, a: float | Tensor) -> ScoreHessian:
        """a times the matrix, for a float or a (B,)."""
        value = self._level("scale", "a", a)
        return self._like(value * self._a, value * self._b)

    def __add__(self, other: float | Tensor) -> ScoreHessian:
        """The sum with other times I, for a float or a (B,)."""
        return self._like(self._a, self._b + self._level("__add__", "other", other))

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
            out = self._affine(self._jacobian.transposed(columns), columns)
        return out.squeeze(-1) if v.dim() == 2 else out

    def asymmetry(
        self,
        n_probes: int = 16,
        *,
        seed: int | None = None,
        first: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """|J - J^T| / |J| in the Frobenius norm, from 0 to 2.

        J is that of score_fn, whatever symmetrize, `scale` and `+` did. Norms are estimated by
        |M|^2 = E |M z|^2 with random signs z. They are exact where n_probes >= D.

        Args:
            n_probes: >= 1.
            seed: key of the probes; None draws one from torch's default generator.
            first: global index of batch row 0: a row's probes do not depend on its batch.
            generator: a `torch.Generator` in place of seed, which is drawn from it.

        Returns:
            Shape (B,). About half of it is the relative error that symmetrizing removes, if the
            symmetric part is right.
        """
        n_probes = check_count("ScoreHessian.asymmetry", "n_probes", n_probes)
        where = "ScoreHessian.asymmetry"
        seed, _, first = check_seed(where, seed_from(where, seed, generator), first=first)
        apart = whole = self.x.new_zeros(self.x.shape[0])
        for z in self._probes(n_probes, seed, first):
            forward = self._jacobian.forward(z)
            apart = apart + (forward - self._jacobian.transposed(z)).square().sum((1, 2))
            whole = whole + forward.square().sum((1, 2))
        return (apart / whole).sqrt()

    # ------------------------------------------------------------------------- dense and diagonal

    def dense(self) -> Tensor:
        """The matrix itself, by D products. Shape (B, D, D)."""
        out = self.x.new_empty(self.shape)
        for start, columns in self._units():
            out[..., start : start + columns.shape[-1]] = self._forward(columns)
        return (out + out.mT) / 2 if self.symmetrize else out

    def diagonal(self) -> Tensor:
        """The diagonal, exact, by D products: `estimate_diagonal` takes fewer. Shape (B, D)."""
        out = torch.empty_like(self.x.flatten(1))
        for start, columns in self._units():
            rows = slice(start, start + columns.shape[-1])
            out[:, rows] = self._forward(columns)[:, rows].diagonal(dim1=1, dim2=2)
        return out

    def trace(self) -> Tensor:
        """The trace, exact, by D products: `estimate_trace` takes fewer. Shape (B,)."""
        return self.diagonal().sum(-1)

    def estimate_diagonal(
        self,
        n_probes: int,
        *,
        probes: Probes = "signs",
        deflation: SymmetricOperator | None = None,
        seed: int | None = None,
        first: int = 0,
        generator: torch.Generator | None = None,
    ) -> Estimate:
        """The diagonal from a few products with random vectors, and its standard error.

            probes          variance of entry i, with n = n_probes         assumes for its worth
            "signs"         sum over j != i of A_ij^2 / n                  nothing
            "lattice"       sum over the class of i, one entry in n        entries far apart share
                                                                           little
            "exchangeable"  that of "signs" for A - Q Q^T A at n / 2       a spectrum that falls
                                                                           fast; else it loses

        All are unbiased for any A. "signs" is Hutchinson's estimator (Bekas et al.). "lattice" is
        probing with random signs: for images, whose dims say which entries are near. On the 8 x 8
        digits of `examples/any_denoiser.py` its error is half that of "signs" at 16 products; for a
        vector whose entries have no order it gains nothing. "exchangeable" is XDiag. Its n / 2
        products with A^T are vjps. To it a multiple of I is no low rank: where that is known, take
        it off by `+` first. docs/instruments.md compares them.

        Args:
            n_probes: products to spend, >= 2; >= 3 for "lattice", >= 4 and even for "exchangeable".
                From D on the result is exact, by D products.
            probes: "signs", "lattice" or "exchangeable".
            deflation: what is known of this matrix, such as a learned one: it is taken off, and its
                diagonal added again. A mistake in it makes no bias. What it knows of the diagonal
                alone is no help, since probes see that exactly. Shape (B, D, D).
            seed: key of the probes; None draws one from torch's default generator.
            first: global index of batch row 0: a row's probes do not depend on its batch.
            generator: a `torch.Generator` in place of seed, which is drawn from it.

        Returns:
            Estimate, both of shape (B, D). The standard error comes from n - 1 degrees of freedom
            for "signs". "lattice" probes some entries of a sample twice, and scales the error of
            all by these. The error of "exchangeable" is only rough.

        Raises:
            TypeError: n_probes is not an int, deflation no operator.
            ValueError: n_probes, probes, seed or first out of range; a deflation that does not fit.

        References:
            Bekas, Kokiopoulou and Saad 2007, An estimator for the diagonal of a matrix; Tang and
            Saad 2012, A probing method for computing the diagonal of a matrix inverse; Epperly,
            Tropp and Webber 2024, arXiv:2301.07825.

        Example:
            >>> import torch
            >>> from hos_ext import DPLR
            >>> from hos_ext.linalg import ScoreHessian
            >>> x = torch.ones(1, 4, 4)
            >>> hessian = ScoreHessian(lambda x: -2 * x - x.roll(2, 2), x, check=False)
            >>> near = hessian.estimate_diagonal(9, probes="lattice", seed=0)
            >>> near.value.shape
            torch.Size([1, 16])
            >>> ones = torch.ones(1, 16, 1)
            >>> known = ScoreHessian(lambda x: -2 * x - x.sum((1, 2), keepdim=True), x)
            >>> known.estimate_diagonal(2, deflation=DPLR(-2 * ones[..., 0], ones, -ones[0, 0]))
            Estimate(1 x (16,))
        """
        where = "ScoreHessian.estimate_diagonal"
        n, kind = check_probes(where, n_probes, probes)
        key = self._key(where, seed, first, generator, n)
        if deflation is not None:
            check_deflation(where, deflation, self.x.flatten(1))
        if key is None:
            return hutchinson.exact(self.diagonal())
        return probing.diagonal(self._products(n), n, key, kind, deflation)

    def estimate_trace(
        self,
        n_probes: int,
        *,
        probes: Probes = "signs",
        deflation: SymmetricOperator | None = None,
        seed: int | None = None,
        first: int = 0,
        generator: torch.Generator | None = None,
    ) -> Estimate:
        """The trace from a few products with random vectors, and its standard error.

        As `estimate_diagonal`. The variance of "signs", Hutchinson's estimator, is 2 sum_{i != j}
        A_ij^2 / n_probes (A symmetric); that of "lattice" the same sum over pairs of one class;
        "exchangeable" is XTrace, with n_probes products forward and none with A^T.

        Args:
            n_probes, probes, deflation, seed, first, generator: as `estimate_diagonal`.

        Returns:
            Estimate, both of shape (B,). The standard error of "lattice" supposes a symmetric A,
            and is otherwise too large rather than too small.

        Raises:
            TypeError, ValueError: as `estimate_diagonal`.

        References:
            Hutchinson 1989, A stochastic estimator of the trace of the influence matrix; and those
            of `estimate_diagonal`.
        """
        where = "ScoreHessian.estimate_trace"
        n, kind = check_probes(where, n_probes, probes)
        key = self._key(where, seed, first, generator, n)
        if deflation is not None:
            check_deflation(where, deflation, self.x.flatten(1))
        if key is None:
            return hutchinson.exact(self.trace())
        return probing.trace(self._products(n), n, key, kind, deflation)

    # ------------------------------------------------------------------------------- eigenpairs

    def eigh(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues (B, k), descending, and eigenvectors (B, D, k): `eigenpairs`.

        Raises:
            RuntimeError: no convergence, as with a network whose J is not symmetric.
        """
        pairs = eigenpairs(self, k, where="ScoreHessian.eigh")
        if not bool(pairs.converged.all()):
            raise RuntimeError(
                f"ScoreHessian.eigh: no convergence in {pairs.products} products, got a residual of"
                f" {float(pairs.residuals.max()):.3g}; symmetrize=True makes the matrix symmetric,"
                " eigenpairs returns what there is"
            )
        return pairs.values, pairs.vectors

    def eigenpairs(
        self,
        k: int,
        *,
        largest: bool = True,
        tolerance: float | None = None,
        max_products: int | None = None,
    ) -> Eigenpairs:
        """The k largest or smallest eigenvalues and their eigenvectors, with their residuals.

        Args:
            k, largest, tolerance, max_products: as the function `eigenpairs`, which does it.

        Returns:
            Eigenpairs. A network without symmetrize is no symmetric matrix: the pairs are about
            those of its symmetric part, the residuals end near its asymmetry, converged is False.

        Raises:
            TypeError: k or max_products is not an int.
            ValueError: k, tolerance or max_products out of range, or a product is not finite.
        """
        return eigenpairs(
            self,
            k,
            largest=largest,
            tolerance=tolerance,
            max_products=max_products,
            where="ScoreHessian.eigenpairs",
        )

    @torch.no_grad()
    def low_rank(
        self,
        k: int,
        *,
        remainder: Remainder = "isotropic",
        n_probes: int = 32,
        probes: Probes = "signs",
        seed: int | None = None,
        first: int = 0,
        floor: float = 1e-2,
        tolerance: float = 1e-3,
        max_products: int | None = None,
        generator: torch.Generator | None = None,
    ) -> DPLR:
        """A positive definite DPLR of rank k in place of a covariance that is this matrix.

        With the k largest eigenpairs V diag(l) V^T and R = A - V diag(l) V^T:
            "isotropic"  V diag(l - rest) V^T + rest I, rest = tr R / (D - k): keeps the eigenpairs;
            "diagonal"   V diag(l) V^T + diag(R): keeps the variance of each entry instead.
        tr R and diag(R) are estimated from products R z, and exact for n_probes >= D. The trace of
        the result is therefore that of A as estimated. A network's A often has negative
        eigenvalues, and the estimates have noise, so rest and the entries of diag(R) are kept
        above a floor. What the floor adds to some entries the others lose, as far as they can.
        Pairs with l < rest count to the rest.

        On digits (`examples/any_denoiser.py`) "isotropic" at a rank well below D is calibrated.
        "diagonal" is overconfident along the entries that the floor holds.

        Args:
            k: 0 <= k <= D.
            remainder: "isotropic" or "diagonal".
            n_probes, probes: products for the remainder, as `estimate_diagonal`: "lattice" for
                images.
            seed, first, generator: of the probes, as `estimate_diagonal`.
            floor: of the remainder, over the mean variance tr A / D. In [0, 1); 0 may give a
                singular matrix.
            tolerance, max_products: as `eigenpairs`. Pairs that have not converged are used as they
                are: the trace is right all the same, unless the floor holds it up.

        Returns:
            DPLR (B, D, D). For s2 itself, which is not positive: of kappa = I + sigma^2 s2 first,
            ((hessian.scale(sigma**2) + 1).low_rank(k) + -1).scale(1 / sigma**2).

        Raises:
            TypeError: k or n_probes is not an int, tolerance not a number.
            ValueError: k, n_probes, probes, tolerance, floor or remainder out of range, or a trace
                that is not positive.
        """
        where = "ScoreHessian.low_rank"
        k = check_count(where, "k", k, least=0)
        n, kind = check_probes(where, n_probes, probes)
        tolerance = check_number(where, "tolerance", tolerance)
        check_truncation(where, remainder, floor)
        key = self._key(where, seed, first, generator, n)
        batch, size, _ = self.shape
        values, vectors = self.x.new_empty((batch, 0)), self.x.new_empty((batch, size, 0))
        if k:
            options: dict[str, Any] = {"tolerance": tolerance, "max_products": max_products}
            pairs = eigenpairs(self, k, where=where, **options)
            values, vectors = pairs.values, pairs.vectors
        if key is None:
            rest = self.diagonal() - (vectors.square() * values.unsqueeze(1)).sum(-1)
        else:
            part = _Pairs(values, vectors)
            rest = probing.diagonal(self._products(n).less(part), n, key, kind).value
        return truncated(values, vectors, rest, remainder=remainder, floor=floor, where=where)

    # ---------------------------------------------------------------------------------- helpers

    def _like(self, a: Tensor, b: Tensor) -> ScoreHessian:
        other = copy.copy(self)
        other._a, other._b = a, b
        return other

    def _level(self, method: str, name: str, a: float | Tensor) -> Tensor:
        """A float, 0-d or (B,) value, shaped to broadcast against (B, D, k)."""
        value = per_sample(f"ScoreHessian.{method}", name, a, self.x)
        return value if value.dim() == 0 else value.reshape(-1, 1, 1)

    def _columns(self, method: str, v: Tensor) -> Tensor:
        """v as (B, D, k)."""
        where, (batch, size, _) = f"ScoreHessian.{method}", self.shape
        check_tensor(where, "v", v, like=self.x)
        check_shape(where, "v", v, (batch, size), (batch, size, "k"))
        return v.detach().reshape(batch, size, -1 if v.numel() else v.shape[2:].numel())

    def _affine(self, product: Tensor, v: Tensor) -> Tensor:
        """a J v + b v from J v, all (B, D, k)."""
        return self._a * product + self._b * v

    def _forward(self, v: Tensor) -> Tensor:
        """a J v + b v, without the transpose: J and its symmetric part have one diagonal."""
        return self._affine(self._jacobian.forward(v), v)

    def _product(self, v: Tensor) -> Tensor:
        """The product with v (B, D, k)."""
        product = self._jacobian.forward(v)
        if self.symmetrize:
            product = (product + self._jacobian.transposed(v)) / 2
        return self._affine(product, v)

    def _products(self, n: int) -> Products:
        """Without symmetrize: J and its symmetric part have one diagonal."""
        return Products(
            self._forward,
            lambda v: self._affine(self._jacobian.transposed(v), v),
            self.x.flatten(1),
            tuple(self.x.shape[1:]),
            self._jacobian.chunk_size or n,
        )

    def _key(
        self,
        where: str,
        seed: int | None,
        first: int,
        generator: torch.Generator | None,
        n: int,
    ) -> Key | None:
        """The key of n probes; None where as many products give the matrix itself."""
        seed, _, first = check_seed(where, seed_from(where, seed, generator), first=first)
        if n >= self.shape[1]:
            return None
        return Key(fresh_seed() if seed is None else seed, first=first)

    def _units(self) -> Iterator[tuple[int, Tensor]]:
        points = self.x.flatten(1)
        return hutchinson.unit_vectors(points, self._jacobian.chunk_size or points.shape[1])

    def _probes(self, n: int, seed: int | None, first: int) -> Iterator[Tensor]:
        """n vectors of random signs in chunks (B, D, c); the unit vectors if n >= D."""
        if n >= self.shape[1]:
            return (columns for _, columns in self._units())
        key = Key(fresh_seed() if seed is None else seed, first=first)
        return hutchinson.random_signs(n, key, self.x.flatten(1), self._jacobian.chunk_size or n)


class _Pairs(NamedTuple):
    """V diag(l) V^T."""

    values: Tensor
    vectors: Tensor

    def matvec(self, v: Tensor) -> Tensor:
        return self.vectors @ (self.values.unsqueeze(-1) * (self.vectors.mT @ v))


def _check_input(score_fn: FirstOrderScore, x: Tensor, chunk_size: int | None) -> None:
    where = "ScoreHessian"
    kind = type(score_fn).__name__
    check(where, callable(score_fn), "score_fn must be callable", kind, TypeError)
    check_samples(where, "x", x)
    some = x[0:1].numel() > 0 or x.shape[0] == 0
    check(where, some, "x must have D >= 1", f"shape {tuple(x.shape)}")
    if chunk_size is not None:
        check_count(where, "chunk_size", chunk_size)
