"""Conversions between the velocity of a flow model and scores, of first and second order.

The formulas are those of `path`, for any path x = alpha x0 + sigma z with slopes alpha' and sigma'.
A schedule tells all four: `schedule.alpha(t)`, `.sigma(t)`, `.alpha_slope(t)`, `.sigma_slope(t)`.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from ..checks import check_like
from ..linalg.dplr import DPLR
from ..linalg.jacobian import ScoreHessian
from ..scores import AnyScores, score_of
from .conversions import affine, check_matrix
from .path import path_at

_Matrix = TypeVar("_Matrix", Tensor, DPLR, ScoreHessian)

_NO_NOISE = "(without noise the velocity does not tell the score)"
_NO_SIGNAL = "(without signal the score does not tell the velocity)"


def score_from_velocity(
    x: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor | None = None,
    *,
    alpha_slope: float | Tensor | None = None,
    sigma_slope: float | Tensor | None = None,
) -> Tensor:
    """s1 = (alpha' x - alpha v) / (sigma w) from the velocity v of a flow model.

    With w = alpha sigma' - alpha' sigma. Rectified flow: s1 = -(x + (1 - t) v) / t. It is defined
    at alpha = 0 too (t = 1: s1 = -x / sigma^2), and undefined at sigma = 0.

    Args:
        x: the noisy sample alpha x0 + sigma z. Shape (B, *dims). float32 or float64. Data units.
        velocity: v = E[alpha' x0 + sigma' z | x], what flow matching fits. Shape, dtype and device
            of x. For a model whose time runs from noise to data, its negative.
        sigma: noise standard deviation, > 0. float or (B,). Data units.
        alpha: signal scale, >= 0. float or (B,). None, and no slopes: rectified flow, where
            sigma = t, alpha = 1 - t, alpha' = -1 and sigma' = 1.
        alpha_slope: alpha', with alpha. float or (B,).
        sigma_slope: sigma', with alpha. float or (B,).

    Returns:
        Shape (B, *dims). Units 1/data.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: shapes, dtypes or devices disagree; sigma is not positive; some but not all of
            alpha and the slopes are given; w is not positive: time runs the other way.

    References:
        Ma et al. 2024, arXiv:2401.08740, Eq. 9.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import score_from_velocity
        >>> score_from_velocity(torch.tensor([[2.0]]), torch.tensor([[1.0]]), sigma=0.5)
        tensor([[-5.]])
    """
    where = "score_from_velocity"
    check_like(where, "velocity", velocity, x)
    path = path_at(where, x, sigma, alpha, alpha_slope, sigma_slope, noise=_NO_NOISE)
    return path.score(x, velocity)


def velocity_from_score(
    x: Tensor,
    score: AnyScores,
    sigma: float | Tensor,
    alpha: float | Tensor | None = None,
    *,
    alpha_slope: float | Tensor | None = None,
    sigma_slope: float | Tensor | None = None,
) -> Tensor:
    """v = (alpha' x - sigma w s1) / alpha, the inverse of `score_from_velocity`.

    Rectified flow: v = -(x + t s1) / (1 - t). Undefined at alpha = 0, where x holds no signal: the
    score is -x / sigma^2 whatever the data, and the velocity depends on their mean.

    Args:
        x: the noisy sample alpha x0 + sigma z. Shape (B, *dims). float32 or float64. Data units.
        score: s1 at x, or a container that holds it, as `posterior_mean` takes it. Shape, dtype
            and device of x. Units 1/data.
        sigma: noise standard deviation, >= 0. float or (B,). Data units.
        alpha: signal scale, > 0. None, and no slopes: rectified flow.
        alpha_slope, sigma_slope: as `score_from_velocity`.

    Returns:
        Shape (B, *dims). Units of the data/time.

    Raises:
        TypeError, ValueError: as `score_from_velocity`, with alpha > 0 in place of sigma > 0.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import velocity_from_score
        >>> velocity_from_score(torch.tensor([[2.0]]), torch.tensor([[-5.0]]), sigma=0.5)
        tensor([[1.]])
    """
    where, s1 = "velocity_from_score", score_of(score)
    check_like(where, "score", s1, x)
    path = path_at(where, x, sigma, alpha, alpha_slope, sigma_slope, signal=_NO_SIGNAL)
    return path.velocity(x, s1)


def x0_from_velocity(
    x: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor | None = None,
    *,
    alpha_slope: float | Tensor | None = None,
    sigma_slope: float | Tensor | None = None,
) -> Tensor:
    """E[x0 | x] = (sigma' x - sigma v) / w, at both ends as well.

    Rectified flow: x - t v. There is no division by alpha or sigma, so nothing is lost near the
    ends, as it would be by way of the score.

    Args:
        x, velocity, alpha, alpha_slope, sigma_slope: as `score_from_velocity`.
        sigma: noise standard deviation, >= 0. float or (B,). Data units.

    Returns:
        Shape (B, *dims). Units of the data.

    Raises:
        TypeError, ValueError: as `score_from_velocity`; sigma may be 0.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import x0_from_velocity
        >>> x0_from_velocity(torch.tensor([[2.0]]), torch.tensor([[1.0]]), sigma=1.0)
        tensor([[1.]])
    """
    where = "x0_from_velocity"
    check_like(where, "velocity", velocity, x)
    return path_at(where, x, sigma, alpha, alpha_slope, sigma_slope).clean(x, velocity)


def hessian_from_velocity_jacobian(
    jacobian: _Matrix,
    sigma: float | Tensor,
    alpha: float | Tensor | None = None,
    *,
    alpha_slope: float | Tensor | None = None,
    sigma_slope: float | Tensor | None = None,
) -> _Matrix:
    """s2 = (alpha' I - alpha J) / (sigma w) from the Jacobian J = dv/dx of a velocity.

    Rectified flow: s2 = -(I + (1 - t) J) / t. Defined at alpha = 0 (s2 = -I / sigma^2), undefined
    at sigma = 0. The posterior covariance by way of s2 loses digits near alpha = 0:
    `hos_ext.uncertainty.posterior_from_velocity` takes it from J itself.

    Args:
        jacobian: J_ij = d v_i / d x_j, as vmap(jacrev(v))(x) gives it. Shape (B, *dims, *dims),
            float32 or float64. Or a DPLR (B, D, D), or a `ScoreHessian` of v, for products alone.
        sigma, alpha, alpha_slope, sigma_slope: as `score_from_velocity`.

    Returns:
        s2. Shape (B, D, D), D in row-major order of dims, or of the kind of jacobian. Units
        1/data^2. Symmetric if J is; a network's Jacobian is so only approximately.

    Raises:
        TypeError: jacobian is no Tensor, DPLR or ScoreHessian, a level is of the wrong kind.
        ValueError: jacobian is not (B, *dims, *dims); otherwise as `score_from_velocity`.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import hessian_from_velocity_jacobian
        >>> hessian_from_velocity_jacobian(torch.tensor([[[1.0]]]), sigma=0.5)
        tensor([[[-3.]]])
    """
    where = "hessian_from_velocity_jacobian"
    matrix, rows = check_matrix(where, "jacobian", jacobian)
    path = path_at(where, rows, sigma, alpha, alpha_slope, sigma_slope, noise=_NO_NOISE)
    return affine(matrix, -path.alpha, path.alpha_slope, 1 / (path.sigma * path.w))


def velocity_jacobian_from_hessian(
    hessian: _Matrix,
    sigma: float | Tensor,
    alpha: float | Tensor | None = None,
    *,
    alpha_slope: float | Tensor | None = None,
    sigma_slope: float | Tensor | None = None,
) -> _Matrix:
    """J = dv/dx = (alpha' I - sigma w s2) / alpha, the inverse of `hessian_from_velocity_jacobian`.

    Rectified flow: J = -(I + t s2) / (1 - t). Undefined at alpha = 0.

    Args:
        hessian: s2. Shape (B, *dims, *dims), float32 or float64, or a DPLR (B, D, D), or a
            `ScoreHessian`. Units 1/data^2.
        sigma, alpha, alpha_slope, sigma_slope: as `velocity_from_score`.

    Returns:
        J. Shape (B, D, D), or of the kind of hessian. Units 1/time.

    Raises:
        TypeError: hessian is no Tensor, DPLR or ScoreHessian, a level is of the wrong kind.
        ValueError: hessian is not (B, *dims, *dims); otherwise as `velocity_from_score`.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import velocity_jacobian_from_hessian
        >>> velocity_jacobian_from_hessian(torch.tensor([[[-3.0]]]), sigma=0.5)
        tensor([[[1.]]])
    """
    where = "velocity_jacobian_from_hessian"
    matrix, rows = check_matrix(where, "hessian", hessian)
    path = path_at(where, rows, sigma, alpha, alpha_slope, sigma_slope, signal=_NO_SIGNAL)
    return affine(matrix, -path.sigma * path.w, path.alpha_slope, 1 / path.alpha)
