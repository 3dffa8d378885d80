"""Schedules that add noise to the clean sample as it is: VE and EDM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Schedule, check_parameters


class Exploding(Schedule):
    """alpha = 1, beta = 0: the noise is added to the clean sample as it is."""

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _beta(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


@dataclass(frozen=True)
class VE(Exploding):
    """Variance exploding: sigma(t) = sigma_min (sigma_max / sigma_min)^t, t in [0, 1]."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        check_parameters(self, 0.0, "sigma_min", "sigma_max")

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return 1.0

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (t * math.log(self.sigma_max / self.sigma_min)).exp()

    def _diffusion2(self, t: Tensor) -> Tensor:
        return 2 * math.log(self.sigma_max / self.sigma_min) * self._sigma(t).square()

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return (sigma / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(Exploding):
    """sigma(t) = t in [sigma_min, sigma_max]; grid and training law of Karras et al. 2022.

    Grid: t^(1 / rho) falls in equal steps (Eq. 5). Training: log sigma ~ N(p_mean, p_std^2), here
    conditioned on [sigma_min, sigma_max], which leaves out a part of 2e-5 at the default values.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        check_parameters(self, 0.0, "sigma_min", "sigma_max")
        check_parameters(self, 0.0, "rho")
        check_parameters(self, -math.inf, "p_mean")
        check_parameters(self, 0.0, "p_std")

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _diffusion2(self, t: Tensor) -> Tensor:
        return 2 * t

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clone()

    def _grid(self, part: Tensor) -> Tensor:
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        grid: Tensor = (high + part * (low - high)) ** self.rho
        return grid

    def _quantile(self, u: Tensor) -> Tensor:
        ends = u.new_tensor([self.sigma_min, self.sigma_max]).log()
        low, high = torch.special.ndtr((ends - self.p_mean) / self.p_std)
        z = torch.special.ndtri(low + u * (high - low))
        sigma: Tensor = (self.p_mean + self.p_std * z).exp()
        return sigma.clamp(self.sigma_min, self.sigma_max)
