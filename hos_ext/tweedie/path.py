"""The one derivation behind every velocity: of flow matching, of v-prediction, of any path.

A path x = alpha x0 + sigma z moves with the velocity alpha' x0 + sigma' z. Given x, its mean and x
itself are two equations for the means of x0 and z, of determinant w = alpha sigma' - alpha' sigma:

    v = alpha' E[x0 | x] + sigma' E[z | x]        E[x0 | x] = (sigma' x - sigma v) / w
    x = alpha  E[x0 | x] + sigma  E[z | x]        E[z | x]  = (alpha v - alpha' x) / w = -sigma s1

The Jacobians in x obey the same equations, with I for x, J = dv / dx for v and s2 for s1. The
v-prediction of diffusion models, v = alpha z - sigma x0, is the case alpha' = -sigma, sigma' =
alpha. w > 0 says that sigma / alpha grows with t, for its slope is w / alpha^2.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..checks import check, per_sample


class Path(NamedTuple):
    """A path at one time: 0-d, or shaped to broadcast against samples or matrices."""

    sigma: Tensor
    alpha: Tensor
    alpha_slope: Tensor
    sigma_slope: Tensor

    @property
    def w(self) -> Tensor:
        """The determinant."""
        return self.alpha * self.sigma_slope - self.alpha_slope * self.sigma

    def noise(self, x: Tensor, velocity: Tensor) -> Tensor:
        """E[z | x]; alpha or sigma may be 0."""
        return (self.alpha * velocity - self.alpha_slope * x) / self.w

    def score(self, x: Tensor, velocity: Tensor) -> Tensor:
        """s1; alpha may be 0."""
        return -self.noise(x, velocity) / self.sigma

    def velocity(self, x: Tensor, score: Tensor) -> Tensor:
        """v; sigma may be 0."""
        return (self.alpha_slope * x - self.sigma * self.w * score) / self.alpha

    def clean(self, x: Tensor, velocity: Tensor) -> Tensor:
        """E[x0 | x]; alpha or sigma may be 0."""
        return (self.sigma_slope * x - self.sigma * velocity) / self.w

    def kappa(self) -> tuple[Tensor, Tensor]:
        """p and q of I + sigma^2 s2 = p J + q I, without the cancellation of the way by s2."""
        scale = self.alpha / self.w
        return -scale * self.sigma, scale * self.sigma_slope


def v_path(sigma: Tensor, alpha: Tensor) -> Path:
    """The path whose velocity is v = alpha z - sigma x0, the v-prediction of diffusion models."""
    return Path(sigma, alpha, -sigma, alpha)


def path_at(
    where: str,
    like: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor | None,
    alpha_slope: float | Tensor | None,
    sigma_slope: float | Tensor | None,
    *,
    noise: str = "",
    signal: str = "",
) -> Path:
    """What the user gave, checked, each value shaped to broadcast against `like`.

    Args:
        where: the public function, for messages.
        like: (B, ...) in whose dtype the values come.
        sigma, alpha, alpha_slope, sigma_slope: floats or (B,). None for the last three: rectified
            flow, alpha = 1 - sigma with the slopes -1 and 1.
        noise: what is undefined where sigma = 0; empty: nothing, sigma may be 0.
        signal: what is undefined where alpha = 0; empty: nothing, alpha may be 0.
    """
    rest = {"alpha": alpha, "alpha_slope": alpha_slope, "sigma_slope": sigma_slope}
    missing = [name for name, value in rest.items() if value is None]
    rule = (
        "alpha, alpha_slope and sigma_slope must be given together, or none of them for "
        "rectified flow (alpha = 1 - sigma)"
    )
    check(where, len(missing) in (0, 3), rule, lambda: f"no {' and no '.join(missing)}")
    s = per_sample(where, "sigma", sigma, like)
    _check_end(where, "sigma", s, noise)
    if alpha is None or alpha_slope is None or sigma_slope is None:
        a = 1 - s
        rule = "sigma must be at most 1 where alpha is not given (alpha = 1 - sigma)"
        check(where, bool((a >= 0).all()), rule, lambda: f"{s[a < 0].flatten()[0].item():g}")
        path = Path(s, a, -s.new_ones(()), s.new_ones(()))
        if signal:
            rule = f"sigma must be below 1 {signal}"
            check(where, bool((a > 0).all()), rule, lambda: f"{s[a <= 0].flatten()[0].item():g}")
        return path
    a = per_sample(where, "alpha", alpha, like)
    _check_end(where, "alpha", a, signal)
    slopes = (
        per_sample(where, name, value, like)
        for name, value in (("alpha_slope", alpha_slope), ("sigma_slope", sigma_slope))
    )
    path = Path(s, a, *slopes)
    rule = (
        "alpha sigma_slope - alpha_slope sigma must be positive (noise must grow with t: else "
        "write the path in 1 - t)"
    )
    w = path.w
    check(where, bool((w > 0).all()), rule, lambda: f"{w[~(w > 0)].flatten()[0].item():g}")
    return path


def _check_end(where: str, name: str, value: Tensor, undefined: str) -> None:
    """Positive where something is undefined at 0; else at least 0."""
    good = value > 0 if undefined else value >= 0
    rule = f"{name} must be {f'positive {undefined}' if undefined else 'at least 0'}"
    check(where, bool(good.all()), rule, lambda: f"{value[~good].flatten()[0].item():g}")
