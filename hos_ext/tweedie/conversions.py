"""Conversions between what denoisers predict and scores, of first and second order.

Setting: x = alpha * x0 + sigma * z. A network may predict the noise (eps), the clean sample (x0) or
the velocity (v = alpha z - sigma x0): each an affine function of x and of s1, its Jacobian one of
s2. An EDM denoiser D(y; sigma_edm) predicts x0 from y = x / alpha at sigma_edm = sigma / alpha. The
table of all of them stands in `hessian_from_jacobian`.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ..checks import check_like, check_tensor, positive
from ..linalg.dplr import DPLR
from .posterior import posterior_mean

_Matrix = TypeVar("_Matrix", Tensor, DPLR)


def score_from_eps(eps: Tensor, sigma: float | Tensor) -> Tensor:
    """s1 = -E[z | x] / sigma, from a noise prediction (any alpha). eps (B, *dims)."""
    check_tensor("score_from_eps", "eps", eps)
    return -eps / positive("score_from_eps", "sigma", sigma, eps)


def eps_from_score(score: Tensor, sigma: float | Tensor) -> Tensor:
    """E[z | x] = -sigma s1, the noise prediction (any alpha). score (B, *dims)."""
    check_tensor("eps_from_score", "score", score)
    return -score * positive("eps_from_score", "sigma", sigma, score)


def score_from_x0(
    x: Tensor, x0: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0
) -> Tensor:
    """s1 = (alpha E[x0 | x] - x) / sigma^2, from a denoised sample. x, x0 (B, *dims).

    With an EDM denoiser: score_from_x0(x, D(x / alpha, sigma / alpha), sigma, alpha); in its own
    variables, where alpha is 1, score_from_x0(y, D(y, sigma_edm), sigma_edm).
    """
    check_like("score_from_x0", "x0", x0, x)
    s = positive("score_from_x0", "sigma", sigma, x)
    return (positive("score_from_x0", "alpha", alpha, x) * x0 - x) / s.square()


def x0_from_score(
    x: Tensor, score: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0
) -> Tensor:
    """E[x0 | x] = (x + sigma^2 s1) / alpha: `posterior_mean` under its name in diffusion."""
    return posterior_mean(x, score, sigma, alpha)


def score_from_v(x: Tensor, v: Tensor, sigma: float | Tensor, alpha: float | Tensor) -> Tensor:
    """s1 from a velocity prediction E[v | x], v = alpha z - sigma x0. x, v (B, *dims).

    With x = alpha x0 + sigma z: z = (sigma x + alpha v) / (alpha^2 + sigma^2) and s1 = -z / sigma.
    Any alpha and sigma; in the variance-preserving case the denominator is 1.
    """
    check_like("score_from_v", "v", v, x)
    s = positive("score_from_v", "sigma", sigma, x)
    a = positive("score_from_v", "alpha", alpha, x)
    return -(s * x + a * v) / (s * (a.square() + s.square()))


def v_from_score(x: Tensor, score: Tensor, sigma: float | Tensor, alpha: float | Tensor) -> Tensor:
    """E[v | x] = -(sigma / alpha) (x + (alpha^2 + sigma^2) s1), v as in `score_from_v`."""
    check_like("v_from_score", "score", score, x)
    s = positive("v_from_score", "sigma", sigma, x)
    a = positive("v_from_score", "alpha", alpha, x)
    return -(s / a) * (x + (a.square() + s.square()) * score)


def hessian_from_jacobian(
    jacobian: _Matrix,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    prediction: str = "x0",
) -> _Matrix:
    """s2 from the Jacobian J of a denoiser f. With w = alpha^2 + sigma^2:

        prediction  value of f                                       Jacobian J
        "x0"        E[x0 | x] = (x + sigma^2 s1) / alpha             (I + sigma^2 s2) / alpha
        "eps"       E[z | x] = -sigma s1                             -sigma s2
        "v"         E[v | x] = -(sigma / alpha) (x + w s1)           -(sigma / alpha) (I + w s2)
        "edm"       D(y; sigma / alpha) = E[x0 | x], y = x / alpha   I + sigma^2 s2

    J = df/dx, but for "edm" dD/dy: alpha times that of "x0", so that alpha does not enter. In EDM's
    own variables (alpha = 1, sigma = sigma_edm) "edm" and "x0" are the same.

    Args:
        jacobian: J_ij = d f_i / d x_j, as vmap(jacrev(f))(x) gives it. Shape (B, *dims, *dims),
            float32 or float64. Or a DPLR (B, D, D), for O(D r) instead of O(D^2); of rank 0 if
            only the diagonal is known.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.
        prediction: what f predicts: "x0", "eps", "v" or "edm".

    Returns:
        s2. Shape (B, D, D), D in row-major order of dims, or a DPLR if jacobian is one. Units
        1/data^2. Symmetric if J is; a network's Jacobian is so only approximately.

    Raises:
        TypeError: jacobian is neither a Tensor nor a DPLR.
        ValueError: jacobian is not (B, *dims, *dims); sigma or alpha is not positive; an unknown
            prediction.
    """
    where = "hessian_from_jacobian"
    if isinstance(jacobian, DPLR):
        shift, slope = _affine(where, prediction, sigma, alpha, jacobian.diag)
        return (jacobian + -shift).scale(1 / slope)
    flat = _flat(where, "jacobian", jacobian)
    shift, slope = _affine(where, prediction, sigma, alpha, flat)
    return (flat - _times_identity(shift, flat)) / slope[..., None, None]


def jacobian_from_hessian(
    hessian: _Matrix,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    prediction: str = "x0",
) -> _Matrix:
    """The Jacobian J of a denoiser from s2: the inverse of `hessian_from_jacobian`, whose table
    has the equations. J of "x0" is alpha Cov[x0 | x] / sigma^2.

    Args:
        hessian: s2. Shape (B, *dims, *dims), float32 or float64, or a DPLR (B, D, D). Units
            1/data^2.
        sigma, alpha, prediction: as in `hessian_from_jacobian`.

    Returns:
        J. Shape (B, D, D), or a DPLR if hessian is one.

    Raises:
        TypeError: hessian is neither a Tensor nor a DPLR.
        ValueError: hessian is not (B, *dims, *dims); sigma or alpha is not positive; an unknown
            prediction.
    """
    where = "jacobian_from_hessian"
    if isinstance(hessian, DPLR):
        shift, slope = _affine(where, prediction, sigma, alpha, hessian.diag)
        return hessian.scale(slope) + shift
    flat = _flat(where, "hessian", hessian)
    shift, slope = _affine(where, prediction, sigma, alpha, flat)
    return slope[..., None, None] * flat + _times_identity(shift, flat)


def _affine(
    where: str, prediction: str, sigma: float | Tensor, alpha: float | Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """p and q of J = p I + q s2, each 0-d or (B,) with the B, dtype and device of like."""
    rows = like.new_empty(like.shape[0])
    s = positive(where, "sigma", sigma, rows)
    a = positive(where, "alpha", alpha, rows)
    if prediction == "x0":
        return 1 / a, s.square() / a
    if prediction == "eps":
        return torch.zeros_like(s), -s
    if prediction == "v":
        return -s / a, -(s / a) * (a.square() + s.square())
    if prediction == "edm":
        return torch.ones_like(s), s.square()
    raise ValueError(
        f"{where}: prediction must be one of 'x0', 'eps', 'v', 'edm', got {prediction!r}"
    )


def _flat(where: str, name: str, matrix: object) -> Tensor:
    """(B, *dims, *dims) as (B, D, D)."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor or a DPLR, got {type(matrix).__name__}")
    check_tensor(where, name, matrix)
    half = matrix.dim() // 2
    dims = matrix.shape[1 : 1 + half]
    if half == 0 or matrix.dim() % 2 == 0 or dims != matrix.shape[1 + half :]:
        raise ValueError(
            f"{where}: {name} must have shape (B, *dims, *dims), got {tuple(matrix.shape)}"
        )
    return matrix.reshape(matrix.shape[0], dims.numel(), dims.numel())


def _times_identity(a: Tensor, like: Tensor) -> Tensor:
    """a I for a 0-d or (B,), to broadcast against like (B, D, D)."""
    return a[..., None, None] * torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
