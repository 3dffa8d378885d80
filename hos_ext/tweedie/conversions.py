"""Conversions between what denoisers predict and scores, of first and second order.

Setting: x = alpha * x0 + sigma * z. A network may predict the noise (eps), the clean sample (x0) or
the velocity (v = alpha z - sigma x0): each an affine function of x and of s1, its Jacobian one of
s2. An EDM denoiser D(y; sigma_edm) predicts x0 from y = x / alpha at sigma_edm = sigma / alpha. The
table of all of them stands in `hessian_from_jacobian`. Velocities of flow matching: `velocity`.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ..checks import check, check_like, check_tensor, kind_name, one_of, positive, said_by
from ..linalg.dplr import DPLR, check_whole
from ..linalg.jacobian import ScoreHessian
from ..scores import AnyScores, score_of
from .path import Path, v_path
from .posterior import posterior_mean

_Matrix = TypeVar("_Matrix", Tensor, DPLR, ScoreHessian)
_PREDICTIONS = ("x0", "eps", "v", "edm")


def score_from_eps(eps: Tensor, sigma: float | Tensor) -> Tensor:
    """s1 = -E[z | x] / sigma, from a noise prediction (any alpha).

    Args:
        eps: E[z | x]. Shape (B, *dims). float32 or float64. No units.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.

    Returns:
        Shape (B, *dims). Units 1/data.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or sigma is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import score_from_eps
        >>> score_from_eps(torch.tensor([[1.0, -2.0]]), sigma=2.0)
        tensor([[-0.5000,  1.0000]])
    """
    check_tensor("score_from_eps", "eps", eps)
    return -eps / positive("score_from_eps", "sigma", sigma, eps)


def eps_from_score(score: AnyScores, sigma: float | Tensor) -> Tensor:
    """E[z | x] = -sigma s1, the noise prediction (any alpha).

    Args:
        score: s1, or a container that holds it, as `posterior_mean` takes it. Shape (B, *dims).
            float32 or float64. Units 1/data.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.

    Returns:
        Shape (B, *dims). No units.

    Raises:
        TypeError: score is no Tensor and holds no s1.
        ValueError: shapes, dtypes or devices disagree, or sigma is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import eps_from_score
        >>> eps_from_score(torch.tensor([[-0.5, 1.0]]), sigma=2.0)
        tensor([[ 1., -2.]])
    """
    s1 = score_of(score)
    check_tensor("eps_from_score", "score", s1)
    return -s1 * positive("eps_from_score", "sigma", sigma, s1)


def score_from_x0(
    x: Tensor, x0: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0
) -> Tensor:
    """s1 = (alpha E[x0 | x] - x) / sigma^2, from a denoised sample.

    With an EDM denoiser: score_from_x0(x, D(x / alpha, sigma / alpha), sigma, alpha); in its own
    variables, where alpha is 1, score_from_x0(y, D(y, sigma_edm), sigma_edm).

    Args:
        x: the noisy sample. Shape (B, *dims). float32 or float64. Units of the data.
        x0: E[x0 | x]. Shape, dtype and device of x.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.

    Returns:
        Shape (B, *dims). Units 1/data.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or sigma or alpha is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import score_from_x0
        >>> score_from_x0(torch.tensor([[2.0]]), torch.tensor([[1.0]]), sigma=2.0)
        tensor([[-0.2500]])
    """
    where = "score_from_x0"
    check_like(where, "x0", x0, x)
    s, a = positive(where, "sigma", sigma, x), positive(where, "alpha", alpha, x)
    return -noise_from_x0(x, x0, s, a) / s


def x0_from_score(
    x: Tensor, score: AnyScores, sigma: float | Tensor, alpha: float | Tensor = 1.0
) -> Tensor:
    """E[x0 | x] = (x + sigma^2 s1) / alpha: `posterior_mean` under its name in diffusion.

    Args:
        x, score, sigma, alpha: as `posterior_mean`.

    Returns:
        Shape (B, *dims). Units of the data.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import x0_from_score
        >>> x0_from_score(torch.tensor([[2.0]]), torch.tensor([[-0.25]]), sigma=2.0)
        tensor([[1.]])
    """
    with said_by("x0_from_score", "posterior_mean"):
        return posterior_mean(x, score, sigma, alpha)


def score_from_v(x: Tensor, v: Tensor, sigma: float | Tensor, alpha: float | Tensor) -> Tensor:
    """s1 from a v-prediction E[v | x], v = alpha z - sigma x0.

    With x = alpha x0 + sigma z: z = (sigma x + alpha v) / (alpha^2 + sigma^2) and s1 = -z / sigma.
    Any alpha and sigma; in the variance-preserving case the denominator is 1. The velocity of flow
    matching is another one: `score_from_velocity`.

    Args:
        x: the noisy sample. Shape (B, *dims). float32 or float64. Units of the data.
        v: E[v | x]. Shape, dtype and device of x.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.

    Returns:
        Shape (B, *dims). Units 1/data.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or sigma or alpha is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import score_from_v
        >>> score_from_v(torch.tensor([[2.0]]), torch.tensor([[1.0]]), sigma=1.0, alpha=1.0)
        tensor([[-1.5000]])
    """
    where = "score_from_v"
    check_like(where, "v", v, x)
    return _v_path(where, sigma, alpha, x).score(x, v)


def v_from_score(
    x: Tensor, score: AnyScores, sigma: float | Tensor, alpha: float | Tensor
) -> Tensor:
    """E[v | x] = -(sigma / alpha) (x + (alpha^2 + sigma^2) s1), v as in `score_from_v`.

    Args:
        x: the noisy sample. Shape (B, *dims). float32 or float64. Units of the data.
        score: s1 at x, or a container that holds it, as `posterior_mean` takes it. Shape, dtype
            and device of x. Units 1/data.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.

    Returns:
        Shape (B, *dims).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or sigma or alpha is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import v_from_score
        >>> v_from_score(torch.tensor([[2.0]]), torch.tensor([[-1.5]]), sigma=1.0, alpha=1.0)
        tensor([[1.]])
    """
    where, s1 = "v_from_score", score_of(score)
    check_like(where, "score", s1, x)
    return _v_path(where, sigma, alpha, x).velocity(x, s1)


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
            float32 or float64. Or a DPLR (B, D, D), for O(D r) instead of O(D^2), of rank 0 if
            only the diagonal is known; or a `ScoreHessian` of f, for products alone.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.
        prediction: what f predicts: "x0", "eps", "v" or "edm".

    Returns:
        s2. Shape (B, D, D), D in row-major order of dims, or of the kind of jacobian. Units
        1/data^2. Symmetric if J is; a network's Jacobian is so only approximately.

    Raises:
        TypeError: jacobian is neither a Tensor nor a DPLR.
        ValueError: jacobian is not (B, *dims, *dims); sigma or alpha is not positive; an unknown
            prediction.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import hessian_from_jacobian
        >>> hessian_from_jacobian(torch.tensor([[[0.5]]]), sigma=2.0)
        tensor([[[-0.1250]]])
    """
    where = "hessian_from_jacobian"
    matrix, rows = check_matrix(where, "jacobian", jacobian)
    shift, slope = _levels(where, prediction, sigma, alpha, rows)
    return affine(matrix, None, -shift, 1 / slope)


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
        hessian: s2. Shape (B, *dims, *dims), float32 or float64, or a DPLR (B, D, D), or a
            `ScoreHessian`. Units 1/data^2.
        sigma, alpha, prediction: as in `hessian_from_jacobian`.

    Returns:
        J. Shape (B, D, D), or of the kind of hessian.

    Raises:
        TypeError: hessian is neither a Tensor nor a DPLR.
        ValueError: hessian is not (B, *dims, *dims); sigma or alpha is not positive; an unknown
            prediction.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import jacobian_from_hessian
        >>> jacobian_from_hessian(torch.tensor([[[-0.125]]]), sigma=2.0)
        tensor([[[0.5000]]])
    """
    where = "jacobian_from_hessian"
    matrix, rows = check_matrix(where, "hessian", hessian)
    shift, slope = _levels(where, prediction, sigma, alpha, rows)
    return affine(matrix, slope, shift, None)


def noise_from_x0(x: Tensor, x0: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
    """E[z | x] from E[x0 | x]; the levels broadcast against x."""
    return (x - alpha * x0) / sigma


def affine(matrix: _Matrix, before: Tensor | None, shift: Tensor, after: Tensor | None) -> _Matrix:
    """after (before M + shift I), the numbers 0-d or (B,); None is 1. M as `check_matrix` gives it.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie.conversions import affine
        >>> affine(torch.ones(1, 1, 1), torch.tensor(2.0), torch.tensor(3.0), torch.tensor(10.0))
        tensor([[[50.]]])
    """
    if isinstance(matrix, Tensor):
        out = matrix if before is None else before[..., None, None] * matrix
        out = out + shift[..., None, None] * torch.eye(
            matrix.shape[1], dtype=matrix.dtype, device=matrix.device
        )
        return out if after is None else after[..., None, None] * out
    whole = (matrix if before is None else matrix.scale(before)) + shift
    return whole if after is None else whole.scale(after)


def check_matrix(where: str, name: str, matrix: _Matrix) -> tuple[_Matrix, Tensor]:
    """The matrix, (B, D, D) if dense, and (B,) of its dtype, to which its levels are to fit."""
    if isinstance(matrix, DPLR):
        check_whole(where, name, matrix)
    if not isinstance(matrix, (DPLR, ScoreHessian)):
        matrix = _flat(where, name, matrix)
    return matrix, torch.empty(matrix.shape[:1], dtype=matrix.dtype, device=matrix.device)


def _v_path(where: str, sigma: float | Tensor, alpha: float | Tensor, like: Tensor) -> Path:
    s, a = positive(where, "sigma", sigma, like), positive(where, "alpha", alpha, like)
    return v_path(s, a)


def _levels(
    where: str, prediction: str, sigma: float | Tensor, alpha: float | Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """p and q of J = p I + q s2, each 0-d or (B,) with the B, dtype and device of rows (B,)."""
    path = _v_path(where, sigma, alpha, rows)
    s, a = path.sigma, path.alpha
    one_of(where, "prediction", prediction, _PREDICTIONS)
    if prediction == "x0":
        return 1 / a, s.square() / a
    if prediction == "eps":
        return torch.zeros_like(s), -s
    if prediction == "v":
        return path.alpha_slope / a, -s * path.w / a
    return torch.ones_like(s), s.square()


def _flat(where: str, name: str, matrix: object) -> Tensor:
    """(B, *dims, *dims) as (B, D, D)."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor or a DPLR, got {kind_name(matrix)}")
    check_tensor(where, name, matrix)
    half = matrix.dim() // 2
    dims = matrix.shape[1 : 1 + half]
    square = half > 0 and matrix.dim() % 2 == 1 and dims == matrix.shape[1 + half :]
    check(where, square, f"{name} must have shape (B, *dims, *dims)", tuple(matrix.shape))
    return matrix.reshape(matrix.shape[0], dims.numel(), dims.numel())
