"""Bounds for `TwoCoin`: how far the score along a segment can be from the chord of its ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import check, check_number, is_number


@dataclass(frozen=True)
class SmoothBound:
    """The bound of a `TwoCoin` from derivatives of log p. Where both are given, the better one.

    With v = dx: C = width |v|^2, and C = third |v|^3 / 2.

    Args:
        third: a bound on |D^3 log p [u, u, u]| for unit vectors u. Units 1/data^3.
        width: of an interval that holds the eigenvalues of s2. Units 1/data^2.

    Raises:
        TypeError, ValueError: neither is given, or one is not a number >= 0.

    Example:
        >>> import torch
        >>> from hos_ext.sampling import SmoothBound
        >>> SmoothBound(third=2.0)(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([2.8284])
    """

    third: float | None = None
    width: float | None = None

    def __post_init__(self) -> None:
        where = "SmoothBound"
        given = self.third is not None or self.width is not None
        check(where, given, "third or width must be given", "neither")
        for name in ("third", "width"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check_number(where, name, value, positive=False))

    def __call__(self, x: Tensor, there: Tensor) -> Tensor:
        """C, shape (B,), for the ends (B, *dims)."""
        size = (there - x).flatten(1).norm(dim=1)
        bounds = []
        if self.width is not None:
            bounds.append(self.width * size.square())
        if self.third is not None:
            bounds.append(self.third * size**3 / 2)
        return torch.stack(bounds).amin(0)


@dataclass(frozen=True)
class SupportBound:
    """The bound of a `TwoCoin` for noisy data alpha x0 + sigma z, from where clean data can be.

    Along dx, s2 is -|dx|^2 / sigma^2 + a^2 Var(x0 . dx | x) and s3 is a^3 times the third
    cumulant of x0 . dx, a = alpha / sigma^2. A number within a range of width w has a variance of
    at most w^2 / 4 and a third cumulant of at most w^3 / (6 sqrt 3). So C is the smaller one of
    (a w)^2 / 4 and (a w)^3 / (12 sqrt 3). The width of x0 . dx is (high - low) sum_i |dx_i| for
    entries between low and high, and 2 radius |dx| within a ball. It holds for the exact score. A
    learned one need not keep it, and "bound_exceeded" counts where it does not.

    Args:
        sigma: standard deviation of the noise. Units of the data.
        alpha: scale of the signal.
        low, high: between which all entries of x0 are. Units of the data.
        radius: of a ball with any centre that holds x0. Units of the data.

    Raises:
        TypeError, ValueError: a number out of its range, low without high, or no range at all.

    Example:
        >>> import torch
        >>> from hos_ext.sampling import SupportBound
        >>> SupportBound(1.0, low=-1.0, high=1.0)(torch.zeros(1, 2), torch.full((1, 2), 0.1))
        tensor([0.0031])
    """

    sigma: float
    alpha: float = 1.0
    low: float | None = None
    high: float | None = None
    radius: float | None = None

    def __post_init__(self) -> None:
        where = "SupportBound"
        for name in ("sigma", "alpha"):
            object.__setattr__(self, name, check_number(where, name, getattr(self, name)))
        both = (self.low is None) == (self.high is None)
        rule = "low and high must be given together"
        check(where, both, rule, f"low={self.low}, high={self.high}")
        given = self.low is not None or self.radius is not None
        check(where, given, "low and high, or radius, must be given", "neither")
        if self.low is not None and self.high is not None:
            got = f"{self.low!r} and {self.high!r}"
            numbers = is_number(self.low) and is_number(self.high)
            check(where, numbers, "low and high must be numbers", got, TypeError)
            fine = -math.inf < self.low < self.high < math.inf
            check(where, fine, "low and high must be finite, low < high", got)
        if self.radius is not None:
            object.__setattr__(self, "radius", check_number(where, "radius", self.radius))

    def __call__(self, x: Tensor, there: Tensor) -> Tensor:
        """C, shape (B,), for the ends (B, *dims)."""
        dx = (there - x).flatten(1)
        widths = []
        if self.low is not None and self.high is not None:
            widths.append((self.high - self.low) * dx.abs().sum(1))
        if self.radius is not None:
            widths.append(2 * self.radius * dx.norm(dim=1))
        w = self.alpha / self.sigma**2 * torch.stack(widths).amin(0)
        return torch.minimum(w.square() / 4, w**3 / (12 * math.sqrt(3)))
