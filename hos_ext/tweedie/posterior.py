"""Posterior moments of the clean sample, from scores of the noisy density (Tweedie's formula).

Setting: x = alpha x0 + sigma z with z standard normal; s1 and s2 are the gradient and the Hessian
of log p(x), the density of the noisy sample. This file has the formulas for any s2:

    E[x0 | x]   = (x + sigma^2 s1) / alpha
    Cov[z | x]  = kappa = I + sigma^2 s2             `noise_covariance`
    Cov[x0 | x] = (sigma / alpha)^2 kappa            `covariance_from_kappa`

They are equations 4, 7-10 and 18 of Meng et al. 2021 (arXiv:2111.04726) with alpha. A network gives
kappa itself, as diag(c) + F diag(sign) F^T (`Scores`): all of order one at every noise level, and
nothing cancels where the posterior is sharp. `tweedie_mean` and `tweedie_covariance` of
`hos_ext.scores` are the same for dense tensors, which densities and cumulants use: densities stand
on words alone. There is no third place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal

from ..checks import (
    check,
    check_kind,
    check_like,
    check_low_rank,
    check_number,
    check_samples,
    check_tensor,
    positive,
    said_by,
)
from ..display import SHOWN, axes_of, image_shaped, row_of, show_pair, thumbnail
from ..linalg.dplr import DPLR, check_whole
from ..records import RowRecord, sizes
from ..scores import AnyScores, Scores, score_of, tweedie_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class Posterior(RowRecord):
    """The first two moments of the clean sample given the noisy one, read as a Gaussian.

    Attributes:
        mean: E[x0 | x]. Shape (B, *dims). Units of the data.
        covariance: Cov[x0 | x] of the flattened sample, a DPLR (B, D, D). Units data^2.

    Drawing from it, its density and its principal components treat the posterior as N(mean,
    covariance); mean and covariance themselves are those of the true posterior if the scores are.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR, Posterior
        >>> found = Posterior(torch.zeros(1, 2), DPLR(torch.tensor([[4.0, 1.0]])))
        >>> found.std
        tensor([[2., 1.]])
        >>> found.log_prob(torch.zeros(1, 2))
        tensor([-2.5310])
    """

    mean: Tensor
    covariance: DPLR

    def _summary(self) -> str:
        return sizes(self.mean, f"rank {getattr(self.covariance, 'rank', '?')}")

    def _repr_html_(self) -> str:
        """For notebooks: the means of the first samples, and below them their deviations."""
        return thumbnail(repr(self), [self.mean[:SHOWN], self[:SHOWN].std])

    def plot(self, ax: Axes | None = None, *, row: int = 0, level: float = 0.95) -> Axes:
        """Mean and standard deviation of a picture side by side; of other samples the mean over
        the entries, with the central interval of each.

        Args:
            ax: matplotlib axes; None makes new ones.
            row: which sample of the batch.
            level: probability of the interval, as `credible_interval`.

        Returns:
            The axes.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or out of range.
            RuntimeError: matplotlib is missing (pip install hos_ext[cli]).
        """
        where = _checked("Posterior.plot", self)
        one, ax = self[row_of(where, row, len(self))], axes_of(where, ax)
        dims = tuple(self.mean.shape[1:])
        if image_shaped(dims):
            show_pair(ax, one.mean[0].detach(), one.std[0].detach(), ("mean", "std"))
            return ax
        with said_by(where, "Posterior.credible_interval"):
            ends = one.credible_interval(level)
        low, mean, high = (t.detach().flatten().cpu().numpy() for t in (ends[0], one.mean, ends[1]))
        entries = range(len(mean))
        ax.fill_between(entries, low, high, alpha=0.3, lw=0, label=f"{level:.0%} interval")
        ax.plot(entries, mean, label="mean")
        ax.set(xlabel="entry", ylabel="x0 given x")
        ax.legend(frameon=False)
        return ax

    @property
    def std(self) -> Tensor:
        """Standard deviation of each entry. Shape (B, *dims). NaN where the model's variance is
        negative, which an unconstrained head may produce."""
        return self.covariance.diagonal().sqrt().reshape(self.mean.shape)

    def credible_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The central interval of each entry by itself: mean -+ q std, q a normal quantile.

        Args:
            level: its probability under the Gaussian, in (0, 1).

        Returns:
            low and high, each of shape (B, *dims). Units of the data. NaN where `std` is.

        Raises:
            TypeError: level is not a number.
            ValueError: level is not in (0, 1).
        """
        where = _checked("Posterior.credible_interval", self)
        number = check_number(where, "level", level)
        check(where, number < 1, "level must be in (0, 1)", f"{number:g}")
        quantile = math.sqrt(2) * torch.erfinv(torch.tensor(number, dtype=torch.float64)).item()
        reach = quantile * self.std
        return self.mean - reach, self.mean + reach

    def correlation(self, index: int | tuple[int, ...]) -> Tensor:
        """The correlation of one entry with every entry: a row of the covariance, O(D r).

        Args:
            index: the entry: its place in the flattened sample, or a tuple with one index for each
                of dims. Not negative.

        Returns:
            Shape (B, *dims), in [-1, 1] to rounding, 1 at index. NaN for entries whose variance is
            not positive, and everywhere if that of index is not.

        Raises:
            TypeError: index is neither an int nor a tuple of ints.
            ValueError: index is outside the sample.
        """
        where = _checked("Posterior.correlation", self)
        flat = _flat_index(where, index, tuple(self.mean.shape[1:]))
        diag, factor, sign = self.covariance.diag, self.covariance.factor, self.covariance.sign
        row = factor[:, flat] if sign is None else factor[:, flat] * sign
        covariance = (factor @ row.unsqueeze(-1)).squeeze(-1)
        at = torch.arange(diag.shape[1], device=diag.device) == flat
        covariance = torch.where(at, covariance + diag, covariance).reshape(self.mean.shape)
        std = self.std
        own = std.flatten(1)[:, flat].reshape(-1, *[1] * (std.dim() - 1))
        return covariance / (std * own)

    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        offset: int = 0,
        first: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n draws of N(mean, covariance). Shape (n, B, *dims); arguments as `DPLR.sample`."""
        with said_by(_checked("Posterior.sample", self), "DPLR.sample"):
            draws = self.covariance.sample(
                n, seed=seed, offset=offset, first=first, generator=generator
            )
        return self.mean + draws.reshape(n, *self.mean.shape)

    def principal_components(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues (B, k) of the covariance and their eigenvectors (B, D, k)."""
        with said_by(_checked("Posterior.principal_components", self), "DPLR.eigh"):
            return self.covariance.eigh(k)

    def log_prob(self, x0: Tensor) -> Tensor:
        """log N(x0; mean, covariance), natural logarithm.

        Args:
            x0: a clean sample for each posterior. Shape (B, *dims), dtype and device of mean.

        Returns:
            Shape (B,). NaN where x0 or mean holds NaN, or the covariance NaN or inf. Computed in
            float64, whatever the dtype.

        Raises:
            ValueError: x0 does not fit, or a finite covariance is not positive definite.
        """
        where = _checked("Posterior.log_prob", self)
        check_tensor(where, "x0", x0, like=self.mean, shape=tuple(self.mean.shape))
        diag, factor, sign = self.covariance.diag, self.covariance.factor, self.covariance.sign
        finite = diag.isfinite().all(-1) & factor.isfinite().flatten(1).all(-1)
        diag, factor = diag.where(finite[:, None], 1.0), factor.where(finite[:, None, None], 0.0)
        covariance = DPLR.of(diag, factor, sign)
        bad = ~covariance.is_positive_definite()
        check(
            where,
            not bool(bad.any()),
            "covariance must be positive definite",
            lambda: f"one that is not at batch {int(bad.nonzero()[0])}",
        )
        # In float64, in which the check counted: where signs differ float32 may leave no digit.
        wide, error = covariance.to(torch.float64), (x0 - self.mean).flatten(1).double()
        distance = (error * wide.solve(error)).sum(-1)
        constant = error.shape[1] * math.log(2 * math.pi)
        value = -(distance + wide.logdet() + constant) / 2
        return value.where(finite, torch.nan).to(x0.dtype)

    def recalibrated(
        self, scale: float | Tensor, factor_scale: float | Tensor | None = None
    ) -> Posterior:
        """The posterior with its covariance times scale: a float or (B,), > 0.

        With factor_scale, likewise, the diagonal part is multiplied by scale and the low-rank part
        by factor_scale: see `uncertainty.recalibration_factors`.
        """
        where = _checked("Posterior.recalibrated", self)
        positive(where, "scale", scale, self.mean)
        if factor_scale is None:
            return Posterior(self.mean, self.covariance.scale(scale))
        positive(where, "factor_scale", factor_scale, self.mean)
        diag = self.covariance.scale(scale).diag
        factor = self.covariance.scale(factor_scale).factor
        return Posterior(self.mean, DPLR.of(diag, factor, self.covariance.sign))

    def to_distribution(self) -> LowRankMultivariateNormal:
        """The posterior as a torch distribution over the flattened sample (event shape (D,)).

        Raises:
            ValueError: the covariance has a sign -1 or a diagonal part that is not positive, which
                that class cannot hold.
        """
        where = _checked("Posterior.to_distribution", self)
        diag, sign = self.covariance.diag, self.covariance.sign
        plus = sign is None or not bool((sign < 0).any())
        check(where, plus, "signs must all be +1", lambda: None if sign is None else sign.tolist())
        bad = ~(diag > 0)
        rule = "the diagonal part of the covariance must be positive"
        check(where, not bool(bad.any()), rule, lambda: diag[bad][0].item())
        factor = self.covariance.factor
        if self.covariance.rank == 0:  # that class needs a column
            factor = torch.zeros_like(diag).unsqueeze(-1)
        return LowRankMultivariateNormal(self.mean.flatten(1), factor, diag)


def _checked(where: str, self: Posterior) -> str:
    """Gives back the name; the two fields fit each other."""
    check_posterior(where, self, "")
    return where


def check_posterior(where: str, posterior: Posterior, prefix: str = "posterior.") -> None:
    """A mean (B, *dims) and a covariance (B, D, D) of its dtype and on its device.

    A posterior is a record that anyone may fill, so whoever takes one looks at it.
    """
    mean, covariance = posterior.mean, posterior.covariance
    check_samples(where, f"{prefix}mean", mean)
    check_kind(where, f"{prefix}covariance", covariance, DPLR)
    check_whole(where, f"{prefix}covariance", covariance)
    size = (len(mean), mean.shape[1:].numel())
    check_tensor(where, f"{prefix}covariance", covariance.diag, like=mean, shape=size)


def posterior(
    x: Tensor, scores: Scores, sigma: float | Tensor, alpha: float | Tensor = 1.0
) -> Posterior:
    """Mean and covariance of the clean sample given the noisy one, from a network's output.

    E[x0 | x] = (x + sigma (sigma s1)) / alpha,
    Cov[x0 | x] = (sigma^2 / alpha^2) (diag(c) + F diag(sign) F^T) with F = sigma U.
    Since c is 1 + sigma^2 diag itself, small posterior variances carry no cancellation.

    Args:
        x: the noisy sample. Shape (B, *dims). float32 or float64.
        scores: a `Scores` at x and sigma, dtype and device of x.
        sigma: noise standard deviation, units of the data. float or (B,), > 0; a tensor is taken
            in x's dtype.
        alpha: signal scale. float or (B,), > 0.

    Returns:
        A `Posterior`.

    Raises:
        TypeError: scores is not a `Scores`. `UnscaledScores` become one by `.scaled(sigma)`, in
            which 1 + sigma^2 diag is summed and small variances lose digits.
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.

    References:
        Meng et al. 2021, arXiv:2111.04726, Eq. 4 and 7-10.

    Example:
        >>> import torch
        >>> from hos_ext import Scores, posterior
        >>> x = torch.tensor([[2.0, 4.0]])
        >>> scores = Scores(scaled_score=-x / 2, c=torch.tensor([[0.5, 0.25]]))
        >>> found = posterior(x, scores, 2.0)
        >>> found.mean, found.covariance.diagonal()
        (tensor([[0., 0.]]), tensor([[2., 1.]]))
    """
    where = "posterior"
    check_kind(where, "scores", scores, Scores)
    check_samples(where, "x", x)
    check(where, x.shape[1:].numel() > 0, "x must have entries", tuple(x.shape))
    check_like(where, "scores.scaled_score", scores.scaled_score, x)
    check_like(where, "scores.c", scores.c, x)
    s, a = positive(where, "sigma", sigma, x), positive(where, "alpha", alpha, x)
    sign = check_low_rank(where, scores.factor, scores.sign, x)
    kappa = DPLR.of(scores.c.flatten(1), scores.factor, sign)
    return Posterior((x + s * scores.scaled_score) / a, covariance_from_kappa(kappa, s, a))


class Affine(Protocol):
    """A matrix that can be scaled and shifted: `DPLR`, `ScoreHessian`."""

    def scale(self: Matrix, a: float | Tensor, /) -> Matrix: ...

    def __add__(self: Matrix, other: float | Tensor, /) -> Matrix: ...


Matrix = TypeVar("Matrix", bound=Affine)


def noise_covariance(hessian: Matrix, sigma: Tensor) -> Matrix:
    """kappa = Cov[z | x] = I + sigma^2 s2, the covariance of the noise given the noisy sample.

    Args:
        hessian: s2 (B, D, D), a `DPLR` or a `ScoreHessian`. Units 1/data^2.
        sigma: noise standard deviation, 0-d or one value a row, checked.

    Returns:
        kappa, of the kind of hessian. No units.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR
        >>> from hos_ext.tweedie import noise_covariance
        >>> noise_covariance(DPLR(torch.tensor([[-0.5, -0.25]])), torch.tensor(1.0)).diagonal()
        tensor([[0.5000, 0.7500]])
    """
    return hessian.scale((sigma if sigma.dim() == 0 else sigma.flatten()).square()) + 1.0


def covariance_from_kappa(kappa: DPLR, sigma: Tensor, alpha: Tensor) -> DPLR:
    """Cov[x0 | x] = (sigma / alpha)^2 kappa, since x0 = (x - sigma z) / alpha.

    Args:
        kappa: Cov[z | x], a DPLR (B, D, D). No units.
        sigma, alpha: 0-d or one value a row, checked.

    Returns:
        DPLR (B, D, D). Units data^2.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR
        >>> from hos_ext.tweedie import covariance_from_kappa
        >>> kappa = DPLR(torch.tensor([[0.5, 0.75]]))
        >>> covariance_from_kappa(kappa, torch.tensor(2.0), torch.tensor(1.0)).diagonal()
        tensor([[2., 3.]])
    """
    ratio = (sigma / alpha).reshape(-1, 1)
    return DPLR.of(ratio.square() * kappa.diag, ratio.unsqueeze(-1) * kappa.factor, kappa.sign)


def posterior_mean(
    x: Tensor, score: AnyScores, sigma: float | Tensor, alpha: float | Tensor = 1.0
) -> Tensor:
    """E[x0 | x] = (x + sigma^2 s1) / alpha.

    Args:
        x: the noisy sample. Shape (B, *dims). float32 or float64.
        score: s1 at x, same shape, dtype and device, or `UnscaledScores` or another container that
            holds it. Units 1/data.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.

    Returns:
        Shape (B, *dims). Units of the data.

    Raises:
        TypeError: score is no Tensor and holds no s1. `Scores` hold sigma s1: `.unscaled(sigma)`.
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.

    References:
        Meng et al. 2021, arXiv:2111.04726, Eq. 4.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import posterior_mean
        >>> posterior_mean(torch.tensor([[2.0]]), torch.tensor([[-0.25]]), sigma=2.0)
        tensor([[1.]])
    """
    where, s1 = "posterior_mean", score_of(score)
    check_like(where, "score", s1, x)
    s = positive(where, "sigma", sigma, x)
    return tweedie_mean(x, s1, s, positive(where, "alpha", alpha, x))


def posterior_covariance(
    diag: Tensor,
    factor: Tensor | None,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    sign: Tensor | None = None,
) -> DPLR:
    """Cov[x0 | x] = (sigma / alpha)^2 (I + sigma^2 s2), s2 = diag + U diag(sign) U^T.

    Where diag is near -1/sigma^2 (a sharp posterior at small sigma) the sum cancels; `posterior`
    takes c = 1 + sigma^2 diag from a network and does not.

    Args:
        diag: diagonal part of s2. Shape (B, *dims). float32 or float64. Units 1/data^2.
        factor: U. Shape (B, D, r), or None. Units 1/data.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.
        sign: +1 or -1 for each column of U. Shape (r,); None is all +1.

    Returns:
        DPLR (B, D, D). Units data^2.

    Raises:
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import posterior_covariance
        >>> posterior_covariance(torch.tensor([[-0.125, -0.25]]), None, sigma=2.0).diagonal()
        tensor([[2., 0.]])
    """
    where = "posterior_covariance"
    check_samples(where, "diag", diag)
    check(where, diag.shape[1:].numel() > 0, "diag must have entries", tuple(diag.shape))
    s, a = positive(where, "sigma", sigma, diag), positive(where, "alpha", alpha, diag)
    sign = check_low_rank(where, factor, sign, diag)
    kappa = noise_covariance(DPLR.of(diag.flatten(1), factor, sign), s)
    return covariance_from_kappa(kappa, s, a)


def second_moment(
    x: Tensor,
    score: Tensor,
    diag: Tensor,
    factor: Tensor | None,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    sign: Tensor | None = None,
) -> DPLR:
    """E[x0 x0^T | x] = Cov[x0 | x] + E[x0 | x] E[x0 | x]^T.

    The mean is one more column beside the scaled factor, with sign +1.

    Args:
        x: the noisy sample. Shape (B, *dims). float32 or float64.
        score: s1 at x. Shape (B, *dims). Units 1/data.
        diag, factor, sigma, alpha, sign: as `posterior_covariance`.

    Returns:
        DPLR (B, D, D) of rank r + 1. Units data^2.

    Raises:
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.tweedie import second_moment
        >>> x = torch.tensor([[2.0, 4.0]])
        >>> second_moment(x, -x / 8, torch.full((1, 2), -0.125), None, sigma=2.0).dense()
        tensor([[[3., 2.],
                 [2., 6.]]])
    """
    check_samples("second_moment", "x", x)
    check_like("second_moment", "diag", diag, x)
    with said_by("second_moment", "posterior_mean"):
        mean = posterior_mean(x, score, sigma, alpha).flatten(1)
    with said_by("second_moment", "posterior_covariance"):
        covariance = posterior_covariance(diag, factor, sigma, alpha, sign=sign)
    return covariance + DPLR.of(torch.zeros_like(mean), mean.unsqueeze(-1))


def _flat_index(where: str, index: int | tuple[int, ...], dims: tuple[int, ...]) -> int:
    """The place of an entry in the flattened sample."""
    if isinstance(index, tuple):
        parts, sizes = index, dims
    else:
        parts, sizes = (index,), (math.prod(dims),)
    whole = not any(isinstance(i, bool) or not isinstance(i, Integral) for i in parts)
    check(where, whole, "index must be an int or a tuple of ints", repr(index), TypeError)
    inside = len(parts) == len(sizes) and all(0 <= i < n for i, n in zip(parts, sizes, strict=True))
    if not inside:
        raise ValueError(f"{where}: index must be inside {sizes}, got {index!r}")
    flat = 0
    for i, n in zip(parts, sizes, strict=True):
        flat = flat * n + int(i)
    return flat
