"""The schedule of a table of alphas, as diffusers has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check, check_tensor, said_by
from .preserving import Preserving


@dataclass(frozen=True, eq=False)
class DiscreteVP(Preserving):
    """Variance preserving, from a table: alpha(i)^2 = alphas_cumprod[i], t in [0, N - 1].

    Between integers B = -log alpha^2 is a cubic. Its slope at an integer is the harmonic mean of
    the differences of B on both sides, which keeps B rising (Fritsch and Butland 1984,
    doi:10.1137/0905021), and at the ends that of a parabola. So beta = B' is positive and
    continuous, as steps of second order need. Make it by `from_alphas_cumprod`.
    """

    alphas_cumprod: Tensor
    # (4, N - 1): the coefficients of B in p, a part p of the way from i to i + 1.
    _cubics: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table, where = self.alphas_cumprod, "DiscreteVP"
        check_tensor(where, "alphas_cumprod", table, dtypes=(torch.float64,))
        check(where, not table.is_meta, "alphas_cumprod must hold values", "a meta tensor")
        fits, shape = table.dim() == 1 and len(table) >= 2, tuple(table.shape)
        check(where, fits, "alphas_cumprod must have shape (N,), N >= 2", shape)
        inside = (table > 0) & (table < 1)
        rule = "alphas_cumprod must lie in (0, 1), where alpha > 0 and sigma > 0"
        check(where, bool(inside.all()), rule, lambda: _first(table, ~inside))
        falls = torch.cat([inside[:1], table.log().diff() < 0])
        rule = "alphas_cumprod must decrease"
        check(where, bool(falls.all()), rule, lambda: _first(table, ~falls, after=True))
        nodes = -table.log()
        rise = nodes.diff()
        slopes = torch.cat([rise[:1], 2 / (1 / rise[:-1] + 1 / rise[1:]), rise[-1:]])
        if len(rise) > 1:
            slopes[0] = 2 * rise[0] ** 2 / (rise[0] + rise[1])
            slopes[-1] = 2 * rise[-1] ** 2 / (rise[-1] + rise[-2])
        bend = slopes[:-1] + slopes[1:] - 2 * rise
        cubics = torch.stack([nodes[:-1], slopes[:-1], rise - slopes[:-1] - bend, bend])
        object.__setattr__(self, "_cubics", cubics)

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(len(self.alphas_cumprod) - 1)

    def _at_part(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients at t, and its part."""
        low = t.detach().floor().long().clamp_max(len(self.alphas_cumprod) - 2)
        return self._cubics.to(t)[:, low], t - low

    def _integral(self, t: Tensor) -> Tensor:
        return _cubic(*self._at_part(t))

    def _beta(self, t: Tensor) -> Tensor:
        return _cubic_slope(*self._at_part(t))

    def _t_of_integral(self, b: Tensor) -> Tensor:
        cubics = self._cubics.to(b)
        low = (torch.searchsorted(cubics[0], b.detach(), right=True) - 1).clamp_min(0)
        cubic, part = cubics[:, low], torch.zeros_like(b)
        with torch.no_grad():
            for digit in range(1, 54):  # bisection, to the last bit of the part
                half = part + 0.5**digit
                part = torch.where(_cubic(cubic, half) <= b, half, part)
        # One Newton step, for the derivative in b.
        return low + part + (b - _cubic(cubic, part)) / _cubic_slope(cubic, part)

    def _quantile(self, u: Tensor) -> Tensor:
        return (u * len(self.alphas_cumprod)).floor()


def from_alphas_cumprod(
    alphas_cumprod: Tensor | np.ndarray[Any, Any] | Sequence[float],
) -> DiscreteVP:
    """The schedule of a diffusers scheduler: `from_alphas_cumprod(scheduler.alphas_cumprod)`.

    Args:
        alphas_cumprod: alpha^2 at t = 0 ... N - 1, decreasing, in (0, 1). Shape (N,). A table whose
            last entry is 0 (diffusers' rescale_betas_zero_snr=True) has no score there: leave that
            entry out.

    Returns:
        `DiscreteVP`.

    Raises:
        TypeError, ValueError: it is no such table.

    Example:
        >>> from hos_ext.schedules import from_alphas_cumprod
        >>> schedule = from_alphas_cumprod([0.9, 0.5, 0.1])
        >>> round(schedule.alpha(1.0) ** 2, 6)
        0.5
    """
    try:
        if isinstance(alphas_cumprod, np.ndarray):
            alphas_cumprod = alphas_cumprod.copy()  # torch takes no negative strides
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        kind = type(alphas_cumprod).__name__
        raise TypeError(
            f"from_alphas_cumprod: alphas_cumprod must be an array of numbers, got {kind}"
        ) from None
    with said_by("from_alphas_cumprod", "DiscreteVP"):
        return DiscreteVP(table.detach().clone())


def _cubic(coefficients: Tensor, p: Tensor) -> Tensor:
    a, b, c, d = coefficients.unbind()
    return a + p * (b + p * (c + p * d))


def _cubic_slope(coefficients: Tensor, p: Tensor) -> Tensor:
    _, b, c, d = coefficients.unbind()
    return b + p * (2 * c + p * 3 * d)


def _first(table: Tensor, bad: Tensor, *, after: bool = False) -> str:
    """The first bad entry, the entry it comes after, and its index."""
    i = int(bad.nonzero()[0])
    before = f" after {table[i - 1].item()}" if after else ""
    return f"{table[i].item()}{before} at {i}"
