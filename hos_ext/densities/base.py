"""What every density here answers, with its checks: scores, draws, noise and posteriors.

A density defines the methods with an underscore, which trust their arguments. The public ones are
written once, here: they check and call them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import Tensor

from ..checks import WIDE, check, check_number, is_int, kind_name, place_of, show
from ..random import seed_from
from ..records import unusual
from ..scores import tweedie_covariance, tweedie_mean

Law = TypeVar("Law", bound="Density")


class Density(ABC):
    """A density p on R^D whose scores are known at every noise level.

    Attributes:
        dim: D.

    Example:
        >>> import torch
        >>> from hos_ext.densities import Density, Gaussian
        >>> law: Density = Gaussian(torch.zeros(2), torch.eye(2))
        >>> law.noisy(sigma=1.0).score(torch.ones(1, 2))
        tensor([[-0.5000, -0.5000]])
    """

    dim: int

    def __repr__(self) -> str:
        told = ", ".join([self._summary(), *unusual(self._tensors()[0])])
        return f"{type(self).__name__}({told})"

    def _summary(self) -> str:
        """What the density is, in a few words."""
        return f"D={self.dim}"

    # ------------------------------------------------------------------------- what is asked of it

    def to(
        self: Law,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Law:
        """The same density on another device or in another dtype: `to("cuda")`,
        `to(torch.float64)`, `to("cuda", torch.float64)`."""
        where, own = f"{type(self).__name__}.to", self._tensors()[0]
        place, kind = place_of(where, device, dtype, WIDE)
        place, kind = place or own.device, kind or own.dtype
        check(where, place.type != "meta", "device must hold values", "'meta'")
        return self._like(*(p.to(device=place, dtype=kind) for p in self._tensors()))

    def sample(
        self, n: int, *, seed: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """n independent draws; the same seed gives the same draws on one device. `generator` is a
        `torch.Generator` in place of seed, which is drawn from it.

        Returns:
            Shape (n, D). Units of the data.

        Raises:
            TypeError: n or seed is not an int.
            ValueError: n < 0.
        """
        where = f"{type(self).__name__}.sample"
        seed = seed_from(where, seed, generator)
        for name, value in (("n", n), ("seed", seed)):
            check(where, is_int(value), f"{name} must be an int", show(value), TypeError)
        n, seed = int(n), int(seed)
        check(where, n >= 0, "n must be >= 0", n)
        check(where, n < 2**31, "n must be below 2**31", n)
        device = self._tensors()[0].device
        generator = torch.Generator(device=device)
        if device.type == "cpu":  # it keeps 32 bits of a seed: the others are mixed in
            seed = (seed ^ (seed >> 32) * 0x9E3779B1) & 0xFFFFFFFF if seed >> 32 else seed
        return self._sample(n, generator.manual_seed(seed))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p at x (B, D), shape (B,), normalised."""
        return self._log_prob(self._points("log_prob", x))

    def score(self, x: Tensor) -> Tensor:
        """s1, the gradient of log p, at x (B, D). Shape (B, D). Units 1/data."""
        return self._score(self._points("score", x))

    def hessian(self, x: Tensor) -> Tensor:
        """s2, the Hessian of log p, at x (B, D). Shape (B, D, D). Units 1/data^2."""
        return self._hessian(self._points("hessian", x))

    def hessian_diag(self, x: Tensor) -> Tensor:
        """The diagonal of s2 at x (B, D), without a D x D object. Shape (B, D). Units 1/data^2."""
        return self._hessian_diag(self._points("hessian_diag", x))

    def third(self, x: Tensor) -> Tensor:
        """s3, the third derivative of log p, at x (B, D). Shape (B, D, D, D). Units 1/data^3."""
        return self._third(self._points("third", x))

    def noisy(self: Law, sigma: float, alpha: float = 1.0) -> Law:
        """The law of alpha x0 + sigma z for x0 from this density; sigma, alpha > 0."""
        return self._noised("noisy", *self._levels("noisy", sigma, alpha))

    def posterior_mean(self, x: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """E[x0 | alpha x0 + sigma z = x] at the noisy x (B, D). Shape (B, D). Units of the data."""
        sigma, alpha = self._levels("posterior_mean", sigma, alpha)
        wide = self._points("posterior_mean", x).double()
        return self._in_float64()._posterior_mean(wide, sigma, alpha).to(x.dtype)

    def posterior_covariance(self, x: Tensor, sigma: float, alpha: float = 1.0) -> Tensor:
        """Cov[x0 | alpha x0 + sigma z = x] at the noisy x (B, D). Shape (B, D, D). Units data^2."""
        sigma, alpha = self._levels("posterior_covariance", sigma, alpha)
        wide = self._points("posterior_covariance", x).double()
        return self._in_float64()._posterior_covariance(wide, sigma, alpha).to(x.dtype)

    def _in_float64(self: Law) -> Law:
        """Posteriors are computed so: sums cancel, at a large sigma or a small one."""
        return self if self._tensors()[0].dtype == torch.float64 else self.to(dtype=torch.float64)

    # ----------------------------------------------------------------------------- what it defines

    @abstractmethod
    def _tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the constructor."""

    @abstractmethod
    def _like(self: Law, *tensors: Tensor) -> Law:
        """The density with other tensors."""

    @abstractmethod
    def _sample(self, n: int, generator: torch.Generator) -> Tensor: ...

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _score(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _hessian(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _hessian_diag(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _third(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _noisy(self: Law, sigma: float, alpha: float) -> Law: ...

    # In float64. By Tweedie's formula, whose sum cancels at a large sigma; every density here has
    # moments that do not, and puts them here instead.

    def _posterior_mean(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        return tweedie_mean(x, self._noisy(sigma, alpha)._score(x), sigma, alpha)

    def _posterior_covariance(self, x: Tensor, sigma: float, alpha: float) -> Tensor:
        hessian = self._noisy(sigma, alpha)._hessian(x)
        identity = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        return tweedie_covariance(hessian, identity, sigma, alpha)

    # -------------------------------------------------------------------------------------- checks

    def _points(self, method: str, x: Tensor) -> Tensor:
        where, like = f"{type(self).__name__}.{method}", self._tensors()[0]
        check(where, isinstance(x, Tensor), "x must be a tensor", kind_name(x), TypeError)
        flat = x.dim() == 2 and x.shape[1] == self.dim
        check(where, flat, f"x must have shape (B, {self.dim})", tuple(x.shape))
        check(where, x.layout is torch.strided, "x must be strided", x.layout)
        check(where, x.dtype == like.dtype, f"x must have dtype {like.dtype}", x.dtype)
        check(where, x.device == like.device, f"x must be on {like.device}", x.device)
        return x

    def _noised(self: Law, method: str, sigma: float, alpha: float) -> Law:
        """The noisy law; its parameters overflow or vanish at levels beyond the dtype."""
        try:
            return self._noisy(sigma, alpha)
        except ValueError:
            rule = f"sigma and alpha must suit {self._tensors()[0].dtype}"
            where = f"{type(self).__name__}.{method}"
            raise ValueError(f"{where}: {rule}, got {sigma:g} and {alpha:g}") from None

    def _levels(self, method: str, sigma: float, alpha: float) -> tuple[float, float]:
        where = f"{type(self).__name__}.{method}"
        levels = check_number(where, "sigma", sigma), check_number(where, "alpha", alpha)
        rule = "sigma and alpha must be below 1e150, whose square is finite"
        check(where, max(levels) < 1e150, rule, f"{max(levels):g}")
        return levels
