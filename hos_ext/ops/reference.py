"""The specification: every operator in plain torch, by its closed form, on any device and dtype.

`ops` falls back to this file where there is no native kernel, and the benches use it as a peer. No
D x D matrix is formed except by `assemble_hessian`. Arguments are those of the public operators
after checking: flat samples `(B, D)`, evaluation points stacked in a leading axis, losses per
sample. Equation numbers are those of Meng et al. 2021 (arXiv:2111.04726).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Philox4x32-10 (Salmon et al. 2011): multipliers and Weyl increments of the key.
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


# ------------------------------------------------------------------------------------------ noise


def _mulhilo(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 product, in int64 without overflow."""
    low = value & 0xFFFF
    high = value >> 16
    p0 = low * constant
    p1 = high * constant + (p0 >> 16)
    return p1 >> 16, ((p1 & 0xFFFF) << 16) | (p0 & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four 32-bit words (held in int64) for each counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mulhilo(_PHILOX_M[0], c0)
        hi1, lo1 = _mulhilo(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = (k0 + _PHILOX_W[0]) & _MASK32
        k1 = (k1 + _PHILOX_W[1]) & _MASK32
    return [c0, c1, c2, c3]


def _units(
    shape: tuple[int, ...],
    *,
    seed: int,
    offset: int,
    first: int,
    stream: int,
    device: torch.device | str | None,
) -> tuple[list[Tensor], slice]:
    """(k + 1/2) / 2^32 for the words of the counters that cover `shape`, and the lanes to keep."""
    n = int(torch.Size(shape).numel())
    start = first * (n // shape[0] if n and shape else 1)
    lead = start % 4
    counters = torch.arange((lead + n + 3) // 4, dtype=torch.int64, device=device) + start // 4
    tag = (stream << 56) | offset
    words = philox(
        (
            counters & _MASK32,
            (counters >> 32) & _MASK32,
            torch.full_like(counters, tag & _MASK32),
            torch.full_like(counters, tag >> 32),
        ),
        (seed & _MASK32, seed >> 32),
    )
    wide = torch.float64 if torch.device(device or "cpu").type != "mps" else torch.float32
    return [(w.to(wide) + 0.5) * 2.0**-32 for w in words], slice(lead, lead + n)


def normal(
    shape: tuple[int, ...],
    *,
    seed: int,
    offset: int = 0,
    first: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals by Philox and Box-Muller; four for each counter. Computed in float64."""
    unit, kept = _units(shape, seed=seed, offset=offset, first=first, stream=stream, device=device)
    lanes = []
    for j in (0, 2):
        radius = (-2 * unit[j].log()).sqrt()
        angle = unit[j + 1] * (2 * torch.pi)
        lanes += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(lanes, -1).flatten()[kept].to(dtype).reshape(shape)


def uniform(
    shape: tuple[int, ...],
    *,
    seed: int,
    offset: int = 0,
    first: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms (k + 1/2) / 2^32, one for each 32-bit word, rounded to dtype."""
    unit, kept = _units(shape, seed=seed, offset=offset, first=first, stream=stream, device=device)
    return torch.stack(unit, -1).flatten()[kept].to(dtype).reshape(shape)


# ------------------------------------------------------------------------------------------ steps


def phi1(y: Tensor) -> Tensor:
    """phi1(y) = (exp(y) - 1) / y, 1 at 0, with an accurate derivative."""
    return _Phi1.apply(y)  # type: ignore[no-any-return]


def phi1_prime(y: Tensor) -> Tensor:
    """phi1'(y) = (exp(y) - phi1(y)) / y; a Taylor series for |y| < 1, where that cancels."""
    series = torch.zeros_like(y)
    small = y.clamp(-1, 1)
    coefficient = [1 / 2]  # 1 / (k! (k + 2))
    for k in range(1, 18):
        coefficient.append(coefficient[-1] * (k + 1) / (k * (k + 2)))
    for c in reversed(coefficient):
        series = series * small + c
    safe = torch.where(y.abs() < 1, torch.ones_like(y), y)
    return torch.where(y.abs() < 1, series, (safe.exp() - safe.expm1() / safe) / safe)


class _Phi1(torch.autograd.Function):
    """phi1 with its own derivative: autodiff of expm1(y) / y loses all digits near 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        zero = y == 0
        safe = torch.where(zero, torch.ones_like(y), y)
        return torch.where(zero, torch.ones_like(y), safe.expm1() / safe)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * phi1_prime(ctx.saved_tensors[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * phi1_prime(ctx.saved_tensors[0])


def treat_curvature(diag: Tensor, curvature: str) -> Tensor:
    """The diagonal that a step uses: "clamp" min(d, 0), "abs" -|d|, "raw" d."""
    if curvature == "clamp":
        return torch.where(diag > 0, torch.zeros_like(diag), diag)
    return -diag.abs() if curvature == "abs" else diag


def _per_sample(value: Tensor | float, x: Tensor) -> Tensor:
    """A scalar or `(B,)` value, shaped to broadcast against `x (B, *dims)`."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return value if value.dim() == 0 else value.reshape(-1, *[1] * (x.dim() - 1))


def langevin_step(x: Tensor, score: Tensor, step_size: Tensor | float, noise: Tensor) -> Tensor:
    """x + h s + sqrt(2 h) z (Eq. 19 with h = eps / 2)."""
    h = _per_sample(step_size, x)
    return x + h * score + (2 * h).sqrt() * noise


def ozaki_step(
    x: Tensor,
    score: Tensor,
    diag: Tensor,
    step_size: Tensor | float,
    noise: Tensor,
    curvature: str = "clamp",
) -> Tensor:
    """x + h phi1(h d) s + sqrt(2 h phi1(2 h d)) z (Eq. 20, diagonal, h = eps / 2)."""
    h = _per_sample(step_size, x)
    y = h * treat_curvature(diag, curvature)
    return x + h * phi1(y) * score + (2 * h * phi1(2 * y)).sqrt() * noise


# ----------------------------------------------------------------------------------------- losses


def dsm_loss(score: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """|s + z / sigma|^2 (Eq. 3), per sample."""
    return (score + noise / _per_sample(sigma, noise)).square().sum(-1)


def dsm_vr_loss(score: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Eq. 32: Eq. 3 - (2/sigma) <s(clean), z> - |z|^2/sigma^2, from the difference of scores."""
    noisy, clean = score.unbind()
    scaled = noise / _per_sample(sigma, noise)
    return (noisy.square() + 2 * (noisy - clean) * scaled).sum(-1)


def _columns(score: Tensor, factor: Tensor | None, sign: Tensor | None) -> tuple[Tensor, Tensor]:
    """V = [U, s] and its signature w, so that psi = diag(d) + V diag(w) V^T."""
    s = score.unsqueeze(-1)
    columns = s if factor is None else torch.cat([factor, s], -1)
    weight = torch.ones(columns.shape[-1], dtype=score.dtype, device=score.device)
    if sign is not None:
        weight = torch.cat([sign.to(weight), weight[-1:]])
    return columns, weight


def _norm_psi(diag: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """|diag(d) + V diag(w) V^T|_F^2 through the Gram matrix of V."""
    gram = v.mT @ v
    row = (v.square() * w).sum(-1)
    return (diag * (diag + 2 * row)).sum(-1) + (gram.square() * w * w.unsqueeze(-1)).sum((-1, -2))


def _inner_target(a: Tensor, b: Tensor, w: Tensor, noise: Tensor) -> Tensor:
    """<I - z z^T, A diag(w) B^T>."""
    z = noise.unsqueeze(-1)
    return (w * ((a * b).sum(-2) - (a * z).sum(-2) * (b * z).sum(-2))).sum(-1)


def d2sm_loss(
    score: Tensor,
    diag: Tensor,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None = None,
) -> Tensor:
    """|psi|^2 + 2 <C, psi>, psi = s2 + s s^T, C = (I - z z^T) / sigma^2 (Eq. 13 - |C|^2)."""
    v, w = _columns(score, factor, sign)
    inner = (diag * (1 - noise.square())).sum(-1) + _inner_target(v, v, w, noise)
    return _norm_psi(diag, v, w) + 2 * inner / _variance(sigma, noise)


def d2sm_vr_loss(
    score: Tensor,
    diag: Tensor,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None = None,
) -> Tensor:
    """(|psi+|^2 + |psi-|^2) / 2 + <C, psi+ + psi- - 2 psi0> (half of Eq. 33).

    The second difference is divided by sigma^2: it is taken before the products, column by column,
    or float32 loses it. A score with two points leaves s(clean) out: a theta-free, zero-mean shift.
    """
    if score.shape[0] == 2:
        clean = score.new_zeros(()).expand(score.shape[1:])
        score = torch.cat([score, clean.unsqueeze(0)])
    v, w = _columns(score, factor, sign)
    half = (_norm_psi(diag[0], v[0], w) + _norm_psi(diag[1], v[1], w)) / 2
    dp, dm = v[0] - v[2], v[1] - v[2]
    inner = (((diag[0] - diag[2]) + (diag[1] - diag[2])) * (1 - noise.square())).sum(-1)
    inner = inner + _inner_target(dp, dp, w, noise) + _inner_target(dm, dm, w, noise)
    inner = inner + 2 * _inner_target(v[2], dp + dm, w, noise)
    return half + inner / _variance(sigma, noise)


def d2sm_diag_loss(score: Tensor, diag: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """|q|^2 + 2 <c, q>, q = d + s^2, c = (1 - z^2) / sigma^2 (Eq. 17 - |c|^2)."""
    q = diag + score.square()
    inner = (q * (1 - noise.square())).sum(-1)
    return q.square().sum(-1) + 2 * inner / _variance(sigma, noise)


def d2sm_diag_vr_loss(score: Tensor, diag: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """(|q+|^2 + |q-|^2) / 2 + <c, q+ + q- - 2 q0>, from differences; score may have two points."""
    q = diag[:2] + score[:2].square()
    second = (diag[0] - diag[2]) + (diag[1] - diag[2])
    if score.shape[0] == 3:
        clean = score[2]
        plus, minus = score[0] - clean, score[1] - clean
        second = second + plus * (score[0] + clean) + minus * (score[1] + clean)
    else:
        second = second + score.square().sum(0)
    inner = (second * (1 - noise.square())).sum(-1)
    return q.square().sum((0, -1)) / 2 + inner / _variance(sigma, noise)


def _variance(sigma: Tensor | float, noise: Tensor) -> Tensor:
    """sigma^2, a scalar or `(B,)`."""
    return torch.as_tensor(sigma, dtype=noise.dtype, device=noise.device).square()


# ---------------------------------------------------------------------------------------- Hessian


def assemble_hessian(diag: Tensor, factor: Tensor | None, sign: Tensor | None = None) -> Tensor:
    """diag(d) + U diag(w) U^T as a dense `(B, D, D)`."""
    dense = torch.diag_embed(diag)
    if factor is None:
        return dense
    weighted = factor if sign is None else factor * sign.to(factor)
    return dense + weighted @ factor.mT


def hessian_matvec(
    diag: Tensor, factor: Tensor | None, v: Tensor, sign: Tensor | None = None
) -> Tensor:
    """(diag(d) + U diag(w) U^T) v for v `(B, D)` or `(B, D, k)`."""
    columns = v.unsqueeze(-1) if v.dim() == 2 else v
    out = diag.unsqueeze(-1) * columns
    if factor is not None:
        inner = factor.mT @ columns
        out = out + factor @ (inner if sign is None else inner * sign.to(inner).unsqueeze(-1))
    return out.squeeze(-1) if v.dim() == 2 else out
