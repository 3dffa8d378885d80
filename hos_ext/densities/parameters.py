"""Checks of the parameters of densities, and what is made of them once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import WIDE, check, device_of, dtype_of, kind_name


class Whitening(NamedTuple):
    """Factors of covariances S (..., D, D).

    Attributes:
        cholesky: L, lower, with S = L L^T.
        inverse: W = L^-1, so that |W v|^2 = v^T P v.
        precision: P = S^-1 = W^T W.
    """

    cholesky: Tensor
    inverse: Tensor
    precision: Tensor


def placed(
    name: str, device: torch.device | str | None, dtype: torch.dtype | None, *values: Tensor
) -> tuple[Tensor, ...]:
    """Parameters on a device and in a dtype, as the constructors of torch.nn take them; None is
    where and as they are. What is no tensor is left to the checks."""
    place = None if device is None else device_of(name, "device", device)
    kind = None if dtype is None else dtype_of(name, "dtype", dtype, WIDE)
    if place is None and kind is None:
        return values
    return tuple(v.to(place, kind) if isinstance(v, Tensor) else v for v in values)


def check_leading(name: str, argument: str, value: Tensor, ndim: int) -> None:
    """The parameter that sets sizes, dtype and device of the others."""
    _check_tensor(name, argument, value)
    wide, usable = (torch.float32, torch.float64), value.dim() == ndim and value.numel() > 0
    check(
        name, value.dtype in wide, f"{argument} must be float32 or float64", value.dtype, TypeError
    )
    rule = f"{argument} must have {ndim} non-empty dimension{'s' if ndim > 1 else ''}"
    check(name, usable, rule, f"shape {tuple(value.shape)}")
    _check_finite(name, argument, value)


def check_other(
    name: str, argument: str, value: Tensor, like: Tensor, shape: tuple[int, ...]
) -> None:
    """A parameter of a given shape, in the dtype and on the device of the leading one."""
    _check_tensor(name, argument, value)
    check(name, value.dtype == like.dtype, f"{argument} must have dtype {like.dtype}", value.dtype)
    check(name, value.device == like.device, f"{argument} must be on {like.device}", value.device)
    fits = tuple(value.shape) == tuple(shape)
    check(name, fits, f"{argument} must have shape {tuple(shape)}", tuple(value.shape))
    _check_finite(name, argument, value)


def check_all_positive(name: str, argument: str, value: Tensor) -> None:
    """A parameter whose entries are all > 0."""
    least = float(value.min())
    check(name, least > 0, f"{argument} must be positive", f"{least:g}")


def log_weights(name: str, weights: Tensor) -> Tensor:
    """log of the weights, normalised over the last axis within the rounding that is allowed."""
    check_all_positive(name, "weights", weights)
    total = weights.sum(-1, keepdim=True)
    worst = float(total.flatten()[(total - 1).abs().argmax()])
    check(name, abs(worst - 1) <= 1e-5, "weights must sum to one", f"{worst:g}")
    return (weights / total).log()


def whitening(name: str, argument: str, covariance: Tensor) -> Whitening:
    """The factors of symmetric positive definite matrices; any other is refused."""
    gap = float((covariance - covariance.mT).abs().max())
    symmetric = gap <= 1e-5 * float(covariance.abs().max())
    check(name, symmetric, f"{argument} must be symmetric", f"a difference of {gap:g}")
    factor, info = torch.linalg.cholesky_ex(covariance)
    check(
        name,
        not bool(info.any()),
        f"{argument} must be positive definite",
        lambda: f"smallest eigenvalue {float(torch.linalg.eigvalsh(covariance).min()):g}",
    )
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return Whitening(factor, inverse, inverse.mT @ inverse)


def _check_tensor(name: str, argument: str, value: object) -> None:
    kind = kind_name(value)
    check(name, isinstance(value, Tensor), f"{argument} must be a tensor", kind, TypeError)
    if isinstance(value, Tensor):
        check(name, value.layout is torch.strided, f"{argument} must be strided", value.layout)


def _check_finite(name: str, argument: str, value: Tensor) -> None:
    check(name, not value.is_meta, f"{argument} must hold values", "a meta tensor")
    good = value.isfinite()
    fine, rule = bool(good.all()), f"{argument} must be finite"
    check(name, fine, rule, lambda: float(value[~good].flatten()[0]))
