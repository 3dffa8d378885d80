"""What the densities share: moments of mixtures, draws, Tweedie's formula in dense form, checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_number

LOG_2PI = math.log(2 * math.pi)


# ---------------------------------------------------------------------------------------- moments


def weighted_mean(r: Tensor, value: Tensor) -> Tensor:
    """E_r[value] for r (B, K), value (B, K, D)."""
    return (r.unsqueeze(-2) @ value).squeeze(-2)


def weighted_covariance(r: Tensor, value: Tensor) -> Tensor:
    """Cov_r[value], (B, D, D); centred first, since E[v v^T] - E[v] E[v]^T cancels."""
    centred = value - weighted_mean(r, value).unsqueeze(-2)
    return (centred * r.unsqueeze(-1)).mT @ centred


def weighted_third_moment(r: Tensor, centred: Tensor) -> Tensor:
    """E_r[c c c], (B, D, D, D)."""
    return torch.einsum("bki,bkj,bkl->bijl", centred * r.unsqueeze(-1), centred, centred)


def symmetrise_third(value: Tensor) -> Tensor:
    """A_ij b_l -> A_ij b_l + A_il b_j + A_jl b_i, for value (B, D, D, D) symmetric in i, j."""
    return value + value.permute(0, 1, 3, 2) + value.permute(0, 3, 1, 2)


def noisy_covariance(covariance: Tensor, sigma: float, alpha: float) -> Tensor:
    """alpha^2 S + sigma^2 I."""
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return alpha**2 * covariance + sigma**2 * identity


def tweedie_mean(x_noisy: Tensor, score: Tensor, sigma: float, alpha: float) -> Tensor:
    """(x_noisy + sigma^2 s1) / alpha, from a float64 score."""
    return ((x_noisy.double() + sigma**2 * score) / alpha).to(x_noisy.dtype)


def tweedie_covariance(x_noisy: Tensor, hessian: Tensor, sigma: float, alpha: float) -> Tensor:
    """(sigma / alpha)^2 (I + sigma^2 s2), from a float64 s2: for a large sigma the sum cancels."""
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return ((sigma / alpha) ** 2 * (identity + sigma**2 * hessian)).to(x_noisy.dtype)


# ---------------------------------------------------------------------------------- random numbers


def seeded_generator(name: str, n: int, seed: int, like: Tensor) -> torch.Generator:
    for argument, value in (("n", n), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}.sample: {argument} must be an int, got {value!r}")
    if n < 0:
        raise ValueError(f"{name}.sample: n must be >= 0, got {n}")
    generator = torch.Generator(device=like.device)
    if like.device.type == "cpu":  # it keeps 32 bits of a seed: the others are mixed in
        seed = (seed ^ (seed >> 32) * 0x9E3779B1) & 0xFFFFFFFF if seed >> 32 else seed
    return generator.manual_seed(seed)


def draw_normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def choose_components(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n parts drawn with the given weights, weights.shape[:-1] + (n,), int64."""
    if n == 0:
        return torch.zeros(*weights.shape[:-1], 0, dtype=torch.int64, device=weights.device)
    return weights.multinomial(n, replacement=True, generator=generator)


# ----------------------------------------------------------------------------------------- checks


def check_leading(name: str, argument: str, value: Tensor, ndim: int) -> None:
    """The parameter that sets sizes, dtype and device of the others."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: {argument} must be float32 or float64, got {value.dtype}")
    if value.dim() != ndim or value.numel() == 0:
        rule = f"{ndim} non-empty dimension{'s' if ndim > 1 else ''}"
        raise ValueError(f"{name}: {argument} must have {rule}, got shape {tuple(value.shape)}")
    _check_finite(name, argument, value)


def check_like(
    name: str, argument: str, value: Tensor, like: Tensor, shape: tuple[int, ...]
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dtype != like.dtype:
        raise ValueError(f"{name}: {argument} must have dtype {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: {argument} must be on {like.device}, got {value.device}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name}: {argument} must have shape {tuple(shape)}, got {tuple(value.shape)}"
        )
    _check_finite(name, argument, value)


def _check_finite(name: str, argument: str, value: Tensor) -> None:
    bad = value[~value.isfinite()]
    if bad.numel() > 0:
        raise ValueError(f"{name}: {argument} must be finite, got {float(bad[0])}")


def check_positive(name: str, argument: str, value: Tensor) -> None:
    if not bool((value > 0).all()):
        raise ValueError(f"{name}: {argument} must be positive, got {float(value.min()):g}")


def log_weights(name: str, weights: Tensor) -> Tensor:
    """log of the weights, normalised over the last axis within the rounding that is allowed."""
    check_positive(name, "weights", weights)
    total = weights.sum(-1, keepdim=True)
    worst = total.flatten()[(total - 1).abs().argmax()]
    if abs(float(worst) - 1) > 1e-5:
        raise ValueError(f"{name}: weights must sum to one, got {float(worst):g}")
    return (weights / total).log()


def cholesky_factor(name: str, argument: str, covariance: Tensor) -> Tensor:
    """The lower Cholesky factor of symmetric positive definite matrices."""
    gap = float((covariance - covariance.mT).abs().max())
    if gap > 1e-5 * float(covariance.abs().max()):
        raise ValueError(f"{name}: {argument} must be symmetric, got a difference of {gap:g}")
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(covariance)
    if bool(info.any()):
        smallest = float(torch.linalg.eigvalsh(covariance).min())
        raise ValueError(
            f"{name}: {argument} must be positive definite, got smallest eigenvalue {smallest:g}"
        )
    return factor


def inverse_triangular(factor: Tensor) -> Tensor:
    """W = L^-1, so that |W v|^2 = v^T P v and W^T W = P = (L L^T)^-1."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse


def check_points(name: str, x: Tensor, like: Tensor, dim: int, argument: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(x).__name__}")
    if x.dim() != 2 or x.shape[1] != dim:
        raise ValueError(f"{name}: {argument} must have shape (B, {dim}), got {tuple(x.shape)}")
    if x.dtype != like.dtype:
        raise ValueError(f"{name}: {argument} must have dtype {like.dtype}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: {argument} must be on {like.device}, got {x.device}")


def check_noise(name: str, sigma: float, alpha: float) -> tuple[float, float]:
    return check_number(name, "sigma", sigma), check_number(name, "alpha", alpha)


def moved_to(
    device: torch.device | str | None, dtype: torch.dtype | None, *parameters: Tensor
) -> list[Tensor]:
    return [p.to(device=device or p.device, dtype=dtype or p.dtype) for p in parameters]
