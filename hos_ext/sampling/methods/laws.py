"""Normal laws of the next state, which steps share: by entries, and by the spectrum of s2."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...linalg.spectrum import Function, Spectrum, spectrum_apply, spectrum_logdet
from ...ops.reference import phi1, treat_curvature


class NormalLaw(NamedTuple):
    """The normal law of the next state, flat (B, D), given the present one.

    Attributes:
        draw: maps standard normals (B, D) to the next state (B, D).
        log_density: maps a next state (B, D) to its log density + D/2 log(2 pi), shape (B,).
    """

    draw: Callable[[Tensor], Tensor]
    log_density: Callable[[Tensor], Tensor]


def step_size_column(step_size: float | Tensor, x: Tensor) -> Tensor:
    """h as a column (B, 1) or (1, 1), in the dtype and on the device of x."""
    return torch.as_tensor(step_size, dtype=x.dtype, device=x.device).reshape(-1, 1)


def diagonal_law(mean: Tensor, std: Tensor) -> NormalLaw:
    """N(mean, diag(std^2)).

    Args:
        mean: shape (B, D).
        std: shape (B, D), or one that broadcasts to it.

    Returns:
        NormalLaw.

    Example:
        >>> import torch
        >>> law = diagonal_law(torch.zeros(1, 2), torch.tensor([[2.0]]))
        >>> law.draw(torch.ones(1, 2))
        tensor([[2., 2.]])
    """
    std = std.expand_as(mean)

    def log_density(y: Tensor) -> Tensor:
        return -(((y - mean) / std).square() / 2 + std.log()).sum(1)

    return NormalLaw(lambda z: mean + std * z, log_density)


def spectral_law(
    x: Tensor, score: Tensor, spectrum: Spectrum, drift: Function, spread: Function
) -> NormalLaw:
    """N(x + drift(s2) s1, spread(s2)^2), for functions of the eigenvalues of s2.

    Args:
        x, score: the present state and s1. Shape (B, D).
        spectrum: of s2.
        drift, spread: elementwise functions of the eigenvalues (B, m), or (B, 1).

    Returns:
        NormalLaw.
    """
    mean = x + spectrum_apply(spectrum, drift, score)

    def draw(z: Tensor) -> Tensor:
        return mean + spectrum_apply(spectrum, spread, z)

    def log_density(y: Tensor) -> Tensor:
        white = spectrum_apply(spectrum, lambda v: spread(v).reciprocal(), y - mean)
        return -white.square().sum(1) / 2 - spectrum_logdet(spectrum, spread)

    return NormalLaw(draw, log_density)


def ozaki_functions(h: Tensor, curvature: str) -> tuple[Function, Function]:
    """The functions of an eigenvalue l of s2 by which an Ozaki step multiplies s1 and z.

    They are h phi1(h l) and sqrt(2 h phi1(2 h l)), l after its curvature treatment. A step with
    them solves the Langevin equation of a linear score without error.
    """
    return (
        lambda v: h * phi1(h * treat_curvature(v, curvature)),
        lambda v: (2 * h * phi1(2 * h * treat_curvature(v, curvature))).sqrt(),
    )
