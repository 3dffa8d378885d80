"""Naive float64 oracles of every operator, written from the formulas and from nothing else.

Each one loops over samples, forms whole D x D matrices, and is differentiable by autograd. Inputs
of any dtype are converted to float64 first. Losses come back per sample, `(B,)`, in the convention
of the library: sums over entries, no 1/2, without the theta-free |C|^2 of the second order.
Philox is pure Python integers, one counter at a time. Equation numbers: arXiv:2111.04726.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


# ------------------------------------------------------------------------------------------ noise


def philox4x32_10(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011) on one counter of four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = 0xD2511F53 * c0
        product1 = 0xCD9E8D57 * c2
        c0 = (product1 >> 32) ^ c1 ^ k0
        c1 = product1 & MASK32
        c2 = (product0 >> 32) ^ c3 ^ k1
        c3 = product0 & MASK32
        k0 = (k0 + 0x9E3779B9) & MASK32
        k1 = (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def _element_words(element: int, seed: int, offset: int, stream: int) -> tuple[int, int, int, int]:
    """The four words of the counter that holds one element."""
    index = element // 4
    tag = (stream << 56) | offset
    counter = (index & MASK32, index >> 32, tag & MASK32, tag >> 32)
    return philox4x32_10(counter, (seed & MASK32, (seed >> 32) & MASK32))


def uniform(n: int, seed: int, offset: int = 0, start: int = 0, stream: int = 0) -> list[float]:
    """Elements start ... start + n - 1: (word + 1/2) / 2^32, one word for each element."""
    values = []
    for element in range(start, start + n):
        word = _element_words(element, seed, offset, stream)[element % 4]
        values.append((word + 0.5) * 2.0**-32)
    return values


def normal(n: int, seed: int, offset: int = 0, start: int = 0, stream: int = 0) -> list[float]:
    """Elements start ... start + n - 1: Box-Muller on words (0, 1) and (2, 3), cosine then sine."""
    values = []
    for element in range(start, start + n):
        words = _element_words(element, seed, offset, stream)
        lane = element % 4
        u0 = (words[lane // 2 * 2] + 0.5) * 2.0**-32
        u1 = (words[lane // 2 * 2 + 1] + 0.5) * 2.0**-32
        radius = math.sqrt(-2.0 * math.log(u0))
        angle = 2.0 * math.pi * u1
        values.append(radius * (math.cos(angle) if lane % 2 == 0 else math.sin(angle)))
    return values


# ------------------------------------------------------------------------------------------ steps


def phi1(y: Tensor) -> Tensor:
    """(exp(y) - 1) / y; for |y| < 1 the sum of y^k / (k + 1)!, so that autograd is exact there."""
    y = y.double()
    near = y.abs() < 1
    small = torch.where(near, y, torch.zeros_like(y))
    series = torch.zeros_like(y)
    for k in range(24, -1, -1):
        series = series * small + 1.0 / math.factorial(k + 1)
    large = torch.where(near, torch.ones_like(y), y)
    return torch.where(near, series, (large.exp() - 1) / large)


def langevin_step(x: Tensor, score: Tensor, step_size: Tensor | float, noise: Tensor) -> Tensor:
    """x + h s + sqrt(2 h) z."""
    rows = []
    for b in range(x.shape[0]):
        h = _of_sample(step_size, b)
        rows.append(x[b].double() + h * score[b].double() + torch.sqrt(2 * h) * noise[b].double())
    return torch.stack(rows) if rows else x.double()


def ozaki_step(
    x: Tensor,
    score: Tensor,
    diag: Tensor,
    step_size: Tensor | float,
    noise: Tensor,
    curvature: str = "clamp",
) -> Tensor:
    """x + h phi1(h d) s + sqrt(2 h phi1(2 h d)) z with d treated by `curvature`."""
    rows = []
    for b in range(x.shape[0]):
        h = _of_sample(step_size, b)
        d = diag[b].double()
        d = {"clamp": d.clamp(max=0), "abs": -d.abs(), "raw": d}[curvature]
        drift = h * phi1(h * d) * score[b].double()
        variance = 2 * h * phi1(2 * h * d)
        rows.append(x[b].double() + drift + variance.sqrt() * noise[b].double())
    return torch.stack(rows) if rows else x.double()


# ----------------------------------------------------------------------------------------- losses


def dsm_loss(score: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """|s + z / sigma|^2 (Eq. 3)."""
    losses = []
    for b in range(noise.shape[0]):
        residual = _vector(score, b) + _vector(noise, b) / _of_sample(sigma, b)
        losses.append((residual**2).sum())
    return _stack(losses)


def dsm_vr_loss(score: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Eq. 3 - (2 / sigma) <s(clean), z> - |z|^2 / sigma^2 (Eq. 32); score: noisy, clean."""
    losses = []
    for b in range(noise.shape[0]):
        s, clean, z, sd = *(_vector(p, b) for p in score), _vector(noise, b), _of_sample(sigma, b)
        # |s + z/sigma|^2 - |z|^2/sigma^2, expanded: the difference would cancel for small sigma.
        losses.append((s**2).sum() + 2 / sd * (s * z).sum() - 2 / sd * (clean * z).sum())
    return _stack(losses)


def d2sm_loss(
    score: Tensor,
    diag: Tensor,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None = None,
) -> Tensor:
    """|psi + C|_F^2 - |C|_F^2 (Eq. 13 without its constant)."""
    losses = []
    for b in range(noise.shape[0]):
        psi = _psi(score, diag, factor, sign, b)
        losses.append((psi * psi).sum() + 2 * (_target(noise, sigma, b) * psi).sum())
    return _stack(losses)


def d2sm_vr_loss(
    score: Tensor,
    diag: Tensor,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None = None,
) -> Tensor:
    """(|psi+|^2 + |psi-|^2) / 2 + <C, psi+ + psi- - 2 psi0> (half of Eq. 33)."""
    losses = []
    for b in range(noise.shape[0]):
        plus, minus, clean = (
            _psi(
                score[p] if p < score.shape[0] else torch.zeros_like(score[0]),
                diag[p],
                None if factor is None else factor[p],
                sign,
                b,
            )
            for p in range(3)
        )
        second = plus + minus - 2 * clean
        half = ((plus * plus).sum() + (minus * minus).sum()) / 2
        losses.append(half + (_target(noise, sigma, b) * second).sum())
    return _stack(losses)


def d2sm_diag_loss(score: Tensor, diag: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """|q + c|^2 - |c|^2, q = d + s^2, c = (1 - z^2) / sigma^2 (Eq. 17 without its constant)."""
    losses = []
    for b in range(noise.shape[0]):
        q = _vector(diag, b) + _vector(score, b) ** 2
        c = torch.diagonal(_target(noise, sigma, b))
        losses.append((q * q).sum() + 2 * (c * q).sum())
    return _stack(losses)


def d2sm_diag_vr_loss(score: Tensor, diag: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """(|q+|^2 + |q-|^2) / 2 + <c, q+ + q- - 2 q0>; score (3, B, D), or (2, B, D) with s0 = 0."""
    losses = []
    for b in range(noise.shape[0]):
        q = [_vector(diag[p], b) for p in range(3)]
        for p in range(score.shape[0]):
            q[p] = q[p] + _vector(score[p], b) ** 2
        c = torch.diagonal(_target(noise, sigma, b))
        half = ((q[0] * q[0]).sum() + (q[1] * q[1]).sum()) / 2
        losses.append(half + (c * (q[0] + q[1] - 2 * q[2])).sum())
    return _stack(losses)


# ---------------------------------------------------------------------------------------- Hessian


def assemble_hessian(diag: Tensor, factor: Tensor | None, sign: Tensor | None = None) -> Tensor:
    """diag(d) + sum_k w_k u_k u_k^T for each sample, (B, D, D)."""
    matrices = [_matrix(diag, factor, sign, b) for b in range(diag.shape[0])]
    return torch.stack(matrices) if matrices else torch.diag_embed(diag.double())


def hessian_matvec(
    diag: Tensor, factor: Tensor | None, v: Tensor, sign: Tensor | None = None
) -> Tensor:
    """The dense matrix times v, (B, D) or (B, D, k)."""
    products = [_matrix(diag, factor, sign, b) @ v[b].double() for b in range(diag.shape[0])]
    return torch.stack(products) if products else v.double()


# ----------------------------------------------------------------------------------------- pieces


def _of_sample(value: Tensor | float, b: int) -> Tensor:
    """A number or the b-th of `(B,)` numbers, as a float64 scalar."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return value if value.dim() == 0 else value[b]


def _vector(value: Tensor, b: int) -> Tensor:
    """Sample b of `(B, *dims)` as a float64 vector."""
    return value[b].double().reshape(-1)


def _stack(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses) if losses else torch.zeros(0, dtype=torch.float64)


def _matrix(diag: Tensor, factor: Tensor | None, sign: Tensor | None, b: int) -> Tensor:
    """s2 = diag(d) + sum_k w_k u_k u_k^T of sample b."""
    matrix = torch.diag(_vector(diag, b))
    columns = [] if factor is None else factor[b].double().unbind(-1)
    for k, u in enumerate(columns):
        weight = 1.0 if sign is None else sign[k].double()
        matrix = matrix + weight * torch.outer(u, u)
    return matrix


def _psi(score: Tensor, diag: Tensor, factor: Tensor | None, sign: Tensor | None, b: int) -> Tensor:
    """psi = s2 + s s^T of sample b."""
    s = _vector(score, b)
    return _matrix(diag, factor, sign, b) + torch.outer(s, s)


def _target(noise: Tensor, sigma: Tensor | float, b: int) -> Tensor:
    """C = (I - z z^T) / sigma^2 of sample b; the model should reach -C on average."""
    z = _vector(noise, b)
    identity = torch.eye(z.numel(), dtype=torch.float64, device=z.device)
    return (identity - torch.outer(z, z)) / _of_sample(sigma, b).to(z.device) ** 2
