"""The Cayley step: implicit, with the whole Hessian, by one linear solve."""

from __future__ import annotations

import torch
from torch import Tensor

from ...linalg.dplr import DPLR
from ...linalg.spectrum import Function, dense_spectrum
from ...ops.reference import treat_curvature
from ...scores import DenseScores, UnscaledScores
from .base import NormalStep
from .laws import NormalLaw, spectral_law
from .points import Point


class OzakiCayley(NormalStep):
    """x' = x + (I - h A / 2)^-1 (h s1 + sqrt(2 h) z), with A the whole s2.

    It keeps a Gaussian exactly for every h. For `UnscaledScores` a step is one Woodbury solve with
    r x r matrices; where s2 is not negative definite, its curvature is treated by congruence
    (`_treated_kernel`). For `DenseScores` it goes by the eigenvectors of s2. "raw" curvature has no
    step where h l >= 2 for an eigenvalue l of s2: the chain counts as diverged.
    """

    name = "ozaki_cayley"
    accepts = (UnscaledScores, DenseScores)
    checks_symmetry = True

    def law(self, here: Point, h: Tensor) -> NormalLaw:
        """The law of the next state."""
        x, score = here.flat()
        hessian = here.hessian
        if isinstance(hessian, DPLR):
            return _woodbury_law(x, score, hessian, h, self.curvature)
        spectrum = dense_spectrum(hessian.dense(), where="sample: hessian from score_fn")
        return spectral_law(x, score, spectrum, *_functions(h, self.curvature))


def _functions(h: Tensor, curvature: str) -> tuple[Function, Function]:
    """The functions of an eigenvalue of s2 that multiply s1 and z."""

    def inverse(values: Tensor) -> Tensor:
        kernel = 1 - h * treat_curvature(values, curvature) / 2
        # NaN where a step does not exist: the chain then counts as diverged.
        return torch.where(kernel > 0, kernel, torch.nan).reciprocal()

    return lambda v: h * inverse(v), lambda v: (2 * h).sqrt() * inverse(v)


def _woodbury_law(x: Tensor, score: Tensor, hessian: DPLR, h: Tensor, curvature: str) -> NormalLaw:
    """Cayley: K = I - h A / 2 is diagonal plus low rank, and one Woodbury solve is a step."""
    parts = _cayley_kernels(hessian, h.expand(len(x), 1), curvature)
    root = (2 * h).sqrt()

    def draw(z: Tensor) -> Tensor:
        push, new = h * score + root * z, torch.full_like(x, torch.nan)
        for rows, kernel in parts:
            new[rows] = x[rows] + kernel.solve(push[rows])
        return new

    def log_density(y: Tensor) -> Tensor:
        moved, value = y - x, torch.full_like(x[:, 0], torch.nan)
        push, scale = h * score, root.expand(len(x), 1)
        for rows, kernel in parts:
            white = (kernel.matvec(moved[rows]) - push[rows]) / scale[rows]
            volume = kernel.logdet() - x.shape[1] * scale[rows, 0].log()
            value[rows] = volume - white.square().sum(1) / 2
        return value

    return NormalLaw(draw, log_density)


def _cayley_kernels(hessian: DPLR, h: Tensor, curvature: str) -> list[tuple[Tensor, DPLR]]:
    """K = I - h A / 2 > 0 for the rows of the batch that have one; (row numbers, K) in groups.

    "raw" has one where h s2 < 2. Where s2 is negative definite A = s2; elsewhere `_treated_kernel`.
    """
    half = h / 2
    sign = hessian.diag.new_ones(hessian.rank) if hessian.sign is None else hessian.sign
    shape = half.sqrt().unsqueeze(-1) * hessian.factor
    size = _bounded(hessian.diag, half)
    v = hessian.factor / size.sqrt().unsqueeze(-1)
    total = (half * hessian.diag).square() + v.square().sum(-1) + shape.square().sum(-1)
    rows = total.sum(1).isfinite().nonzero().squeeze(1)
    diag, shape, half = hessian.diag[rows], shape[rows], half[rows]
    plain = DPLR.of(1 - half * diag, shape, -sign)
    if curvature == "raw":
        good = plain.is_positive_definite().nonzero().squeeze(1)
        return [(rows[good], plain.rows(good))]
    negative = DPLR.of(-half * diag, shape, -sign).is_positive_definite()
    kept, rest = negative.nonzero().squeeze(1), (~negative).nonzero().squeeze(1)
    groups = [(rows[kept], plain.rows(kept))]
    if len(rest):
        at = rows[rest]
        kernel = _treated_kernel(diag[rest] <= 0, size[at], v[at], sign, half[rest], curvature)
        groups.append((at, kernel))
    return groups


def _treated_kernel(
    down: Tensor, size: Tensor, v: Tensor, sign: Tensor, half: Tensor, curvature: str
) -> DPLR:
    """K = I - half A, A <= 0 the Hessian s2 = diag(d) + U S U^T treated by congruence.

    down is d <= 0, size the diagonal of E and v is V, of what follows.

    The eigenvalues of s2 are not at hand. With E = |d| (bounded away from 0), V = E^-1/2 U and
    J = diag(-sign d),
        s2 = -E^1/2 N E^1/2,  N = J - V S V^T,    A = -E^1/2 f(N) E^1/2,
    f the positive part ("clamp") or the modulus ("abs"). A is s2 itself if s2 <= 0, continuous in
    s2, and what the spectral treatment gives where that commutes with E. N is J but on the span Q
    of the columns of V, those of each sign of d by themselves:
        f(N) = f(J) + Q (f(Q^T N Q) - Q^T f(J) Q) Q^T.
    """
    sides = [_span(v.where(side.unsqueeze(-1), 0.0)) for side in (down, ~down)]
    q = torch.cat(sides, -1)
    j = torch.where(down, 1.0, -1.0).to(size)
    fj = torch.where(down, 1.0, 1.0 if curvature == "abs" else 0.0).to(size)
    inside = q.mT @ v
    values, vectors = torch.linalg.eigh(q.mT @ (j.unsqueeze(-1) * q) - (inside * sign) @ inside.mT)
    values = values.abs() if curvature == "abs" else values.clamp_min(0)
    change = (vectors * values.unsqueeze(1)) @ vectors.mT - q.mT @ (fj.unsqueeze(-1) * q)
    weight, rotation = torch.linalg.eigh(change)
    columns = (half * size).sqrt().unsqueeze(-1) * (q @ rotation)
    # Signs are shared by the batch, those of the weights are not: one set of columns for each.
    both = [columns * w.clamp_min(0).sqrt().unsqueeze(1) for w in (weight, -weight)]
    ones = torch.ones_like(weight[0])
    return DPLR.of(1 + half * size * fj, torch.cat(both, -1), torch.cat([ones, -ones]))


def _bounded(diag: Tensor, half: Tensor) -> Tensor:
    """|d|, at least sqrt(eps) / h: what that changes in h d is lost in rounding."""
    floor = torch.finfo(diag.dtype).eps ** 0.5 / (2 * half)
    return torch.maximum(diag.abs(), floor.expand_as(diag))


def _span(v: Tensor) -> Tensor:
    """Orthonormal columns (B, D, m) with the span of those of v, zero beyond its rank."""
    basis, values = torch.linalg.svd(v, full_matrices=False)[:2]
    least = torch.finfo(v.dtype).eps * max(v.shape[1:]) * values[:, :1]
    kept: Tensor = basis * ((values > least) & (values > 0)).unsqueeze(1)
    return kept
