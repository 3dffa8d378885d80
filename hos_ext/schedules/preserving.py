"""Schedules in which the clean sample fades while noise comes: VP, sub-VP and the cosine."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check
from .base import Schedule, check_ends, check_parameters, number


class Preserving(Schedule):
    """alpha = exp(-B / 2), sigma^2 = 1 - exp(-B), g^2 = beta = B'; a child gives B, B' and t(B)."""

    @abstractmethod
    def _integral(self, t: Tensor) -> Tensor:
        """B(t), the integral of beta; to full relative precision where it is small."""

    @abstractmethod
    def _t_of_integral(self, b: Tensor) -> Tensor:
        """The inverse of `_integral`."""

    def _alpha(self, t: Tensor) -> Tensor:
        return (-self._integral(t) / 2).exp()

    def _sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def _diffusion2(self, t: Tensor) -> Tensor:
        return self._beta(t)

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._t_of_integral(-torch.log1p(-sigma.square()))


@dataclass(frozen=True)
class VP(Preserving):
    """Variance preserving: beta(t) = beta_min + t (beta_max - beta_min), t in [t_min, t_max].

    alpha^2 + sigma^2 = 1. sigma(t) ~ sqrt(beta_min t) vanishes at t = 0, hence t_min > 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_parameters(self, 0.0, "beta_min")
        rule = "beta_max must be at least beta_min"
        check(self._name(), number(self, "beta_max") >= self.beta_min, rule, self.beta_max)
        check_parameters(self, 0.0, "t_min", "t_max")
        check_ends(self)

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _t_of_integral(self, b: Tensor) -> Tensor:
        # The root of the quadratic without the difference of its two large terms.
        slope = self.beta_max - self.beta_min
        return 2 * b / (self.beta_min + (self.beta_min**2 + 2 * slope * b).sqrt())


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-variance preserving: alpha as `VP`, sigma = 1 - exp(-B), g^2 = beta (1 - exp(-2 B))."""

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def _diffusion2(self, t: Tensor) -> Tensor:
        return self._beta(t) * -torch.expm1(-2 * self._integral(t))

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._t_of_integral(-torch.log1p(-sigma))


@dataclass(frozen=True)
class CosineVP(Preserving):
    """alpha(t) = cos(a) / cos(a0), a = (pi / 2) (t + s) / (1 + s), a0 = a at t = 0; VP otherwise.

    alpha(1) = 0 and beta(1) is infinite, hence t_max < 1. The default leaves alpha = 0.008 and
    beta = 370: the first Euler steps of a reverse SDE overshoot if they are longer than 2 / beta.
    """

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        check_parameters(self, 0.0, "s")
        check_parameters(self, 0.0, "t_min", "t_max")
        rule = "t_max must be below 1 (alpha(1) = 0)"
        check(self._name(), self.t_max < 1, rule, self.t_max)
        check_ends(self)

    @property
    def _start(self) -> float:
        """a0."""
        return math.pi / 2 * self.s / (1 + self.s)

    def _turn(self, t: Tensor) -> Tensor:
        """a - a0."""
        return math.pi / 2 / (1 + self.s) * t

    def _integral(self, t: Tensor) -> Tensor:
        # cos(a) / cos(a0) = 1 - (2 sin^2((a - a0) / 2) + sin(a - a0) tan(a0)): no cancellation.
        turn = self._turn(t)
        lost = 2 * (turn / 2).sin().square() + turn.sin() * math.tan(self._start)
        return -2 * torch.log1p(-lost)

    def _beta(self, t: Tensor) -> Tensor:
        return math.pi / (1 + self.s) * (self._start + self._turn(t)).tan()

    def _t_of_integral(self, b: Tensor) -> Tensor:
        # sin^2 a = sin^2 a0 + sigma^2 cos^2 a0, and sin(a - a0) sin(a + a0) = sigma^2 cos^2 a0.
        sin0, cos0 = math.sin(self._start), math.cos(self._start)
        gained = -torch.expm1(-b) * cos0**2
        sin, cos = (sin0**2 + gained).sqrt(), (-b / 2).exp() * cos0
        turn = torch.atan2(gained / (sin * cos0 + cos * sin0), cos * cos0 + sin * sin0)
        return turn * (1 + self.s) * 2 / math.pi
