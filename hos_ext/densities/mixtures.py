"""Moments over the parts of a mixture, weighted by their responsibilities r (B, K), and draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def weighted_mean(r: Tensor, value: Tensor) -> Tensor:
    """E_r[value] for value (B, K, D)."""
    return (r.unsqueeze(-2) @ value).squeeze(-2)


def weighted_covariance(r: Tensor, value: Tensor) -> Tensor:
    """Cov_r[value], (B, D, D); centred first, since E[v v^T] - E[v] E[v]^T cancels."""
    c = centred(r, value)
    return (c * r.unsqueeze(-1)).mT @ c


def weighted_third_moment(r: Tensor, centred: Tensor) -> Tensor:
    """E_r[c c c], (B, D, D, D), for centred values c (B, K, D)."""
    return torch.einsum("bki,bkj,bkl->bijl", centred * r.unsqueeze(-1), centred, centred)


def centred(r: Tensor, value: Tensor) -> Tensor:
    """value - E_r[value], (B, K, D)."""
    return value - weighted_mean(r, value).unsqueeze(-2)


def symmetrise_third(value: Tensor) -> Tensor:
    """A_ij b_l -> A_ij b_l + A_il b_j + A_jl b_i, for value (B, D, D, D) symmetric in i, j."""
    return value + value.permute(0, 1, 3, 2) + value.permute(0, 3, 1, 2)


def draw_normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normals in the dtype and on the device of a tensor."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def choose_parts(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n parts drawn with the given weights, weights.shape[:-1] + (n,), int64."""
    if n == 0:
        return torch.zeros(*weights.shape[:-1], 0, dtype=torch.int64, device=weights.device)
    return weights.multinomial(n, replacement=True, generator=generator)
