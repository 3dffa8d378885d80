"""Models in closed form: noisy laws of boxes and Gaussians, as priors over parameters are."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..checks import check, check_tensor, positive
from ..schedules import Schedule, check_schedule
from ..scores import Model, Scores
from .along import levels_along

_NODES = 64
_DROP = 80.0  # exp(-40) is left out


def gaussian_model(mean: Tensor, covariance: Tensor, schedule: Schedule) -> Model:
    """The model of x0 ~ N(mean, covariance) along a schedule.

        sigma s1 = -sigma P (x - alpha mean),  kappa = alpha^2 S P,  P = (alpha^2 S + sigma^2 I)^-1.

    Args:
        mean: shape dims, float32 or float64, any dims. Units of the data.
        covariance: S. Of the shape of the mean: the variances, > 0. Or (D, D), symmetric positive
            definite, D in row-major order of dims: kappa is then given by D columns.
        schedule: a `Schedule`: the alpha that goes with sigma.

    Returns:
        A function (x, sigma) -> Scores of x (B, *dims), in the dtype of x.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices disagree, or S is not positive definite.

    Example:
        >>> import torch
        >>> from hos_ext import VE
        >>> from hos_ext.diffusion import gaussian_model
        >>> model = gaussian_model(torch.zeros(2), torch.tensor([1.0, 3.0]), VE())
        >>> model(torch.ones(1, 2), 1.0).c
        tensor([[0.5000, 0.7500]])
    """
    where = "gaussian_model"
    check_tensor(where, "mean", mean, shape=("*dims",))
    check_tensor(where, "covariance", covariance, like=mean)
    check_schedule(where, schedule)
    size = mean.numel()
    shapes = [tuple(mean.shape), (size, size)]
    rule = f"covariance must have shape {shapes[0]} or {shapes[1]}"
    check(where, tuple(covariance.shape) in shapes, rule, tuple(covariance.shape))
    dense = tuple(covariance.shape) != shapes[0]
    finite = bool(mean.isfinite().all()) and bool(covariance.isfinite().all())
    check(where, finite, "mean and covariance must be finite", "NaN or inf")
    centre, basis = mean.double().flatten(), None
    variances = covariance.double().flatten()
    if dense:
        symmetric = torch.allclose(covariance, covariance.mT, rtol=1e-4, atol=0)
        check(where, symmetric, "covariance must be symmetric", covariance)
        variances, basis = torch.linalg.eigh(covariance.double())
    least = variances.min().item()
    check(where, least > 0, "covariance must be positive definite", f"{least:g} as an eigenvalue")

    def model(x: Tensor, sigma: Tensor | float, /) -> Scores:
        check_tensor(where, "x", x, shape=("B", *mean.shape))
        alpha, s = _levels(where, schedule, sigma, x)
        error = x.flatten(1).double() - alpha * centre.to(x.device)
        spread = alpha**2 * variances.to(x.device)
        kappa, factor = spread / (spread + s**2), None
        if basis is None:
            scaled_score = -s * error / (spread + s**2)
        else:
            axes = basis.to(x.device)
            scaled_score = (-s * (error @ axes) / (spread + s**2)) @ axes.mT
            c = kappa.amin(-1, keepdim=True)
            factor = (axes * (kappa - c).sqrt().unsqueeze(-2)).to(x.dtype)
            kappa = c.expand_as(kappa)
            factor = factor.expand(len(x), -1, -1)
        kappa = kappa.expand_as(scaled_score).to(x.dtype).reshape(x.shape)
        return Scores(scaled_score.to(x.dtype).reshape(x.shape), kappa, factor)

    return model


def box_model(low: Tensor, high: Tensor, schedule: Schedule) -> Model:
    """The model of x0 uniform between low and high, each entry by itself, along a schedule.

    z | x is a standard normal between (x - alpha high) / sigma and (x - alpha low) / sigma. So

        sigma s1 = -E[z | x],   kappa = diag(Var[z | x]).

    Both are by 64 Gauss-Legendre nodes in float64 where the density is not negligible: to rounding
    inside, at the edges, far outside, and where the box is narrow beside the noise.

    Args:
        low, high: shape dims, float32 or float64, low < high. Units of the data.
        schedule: a `Schedule`: the alpha that goes with sigma.

    Returns:
        A function (x, sigma) -> Scores of x (B, *dims), in the dtype of x.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices disagree, or low is not below high.

    Example:
        >>> import torch
        >>> from hos_ext import VE
        >>> from hos_ext.diffusion import box_model
        >>> model = box_model(torch.tensor([-1.0]), torch.tensor([1.0]), VE())
        >>> model(torch.tensor([[0.0], [1.0]]), 0.1).c
        tensor([[1.0000],
                [0.3634]])
    """
    where = "box_model"
    check_tensor(where, "low", low, shape=("*dims",))
    check_tensor(where, "high", high, like=low, shape=tuple(low.shape))
    check_schedule(where, schedule)
    fine = bool(low.isfinite().all()) and bool(high.isfinite().all()) and bool((low < high).all())
    check(where, fine, "low must be below high, both finite", "others")

    def model(x: Tensor, sigma: Tensor | float, /) -> Scores:
        check_tensor(where, "x", x, shape=("B", *low.shape))
        alpha, s = _levels(where, schedule, sigma, x)
        ends = (edge.double().flatten().to(x.device) for edge in (high, low))
        wide = x.flatten(1).double()
        mean, variance = _between(*((wide - alpha * edge) / s for edge in ends))
        dims, dtype = x.shape, x.dtype
        return Scores(-mean.to(dtype).reshape(dims), variance.to(dtype).reshape(dims))

    return model


def _between(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a standard normal between a and b."""
    nearest = torch.zeros_like(a).clamp(a, b)
    reach = (nearest.square() + _DROP).sqrt()
    a, b = a.maximum(-reach), b.minimum(reach)
    nodes, weights = (t.to(a.device) for t in _legendre())
    half = (b - a).unsqueeze(-1) / 2
    step = half * nodes  # from the middle
    middle = ((a + b) / 2).unsqueeze(-1)
    # -(z^2 - nearest^2) / 2, where z - nearest has no cancellation left
    away = step + (middle - nearest.unsqueeze(-1))
    mass = weights * (-away * (away + 2 * nearest.unsqueeze(-1)) / 2).exp()
    mass = mass / mass.sum(-1, keepdim=True)
    shift = (mass * step).sum(-1, keepdim=True)
    variance = (mass * (step - shift).square()).sum(-1)
    return (middle + shift).squeeze(-1), variance


@lru_cache(maxsize=1)
def _legendre() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def _levels(
    where: str, schedule: Schedule, sigma: Tensor | float, x: Tensor
) -> tuple[Tensor, Tensor]:
    """alpha and sigma in float64, shaped to broadcast against (B, D)."""
    alpha, level = levels_along(where, schedule, positive(where, "sigma", sigma, x))
    return alpha.to(x.device).reshape(-1, 1), level.to(x.device).reshape(-1, 1)
