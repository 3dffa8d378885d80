"""Regions around a posterior mean that hold the truth as often as they say, whatever the model.

A covariance is right on average at best, and its intervals are right only where the posterior is
Gaussian too. Split-conformal regions need neither. Each of n samples whose truth is known gets a
score: how far the truth lies from the mean, in the posterior's own units. The region of a new
sample is that of all x0 whose score is at most the k-th smallest of those,

    k = ceil((n + 1) level),    P(x0 in region) >= level,

and < level + 1 / (n + 1) besides where scores do not tie. The probability is over the n samples and
the new one together, which must be exchangeable: drawn alike, at one noise level, and none of them
trained on. Any factor on all covariances cancels, so a recalibration may use the same n samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check, check_kind, check_number, one_of
from ..records import Record
from ..tweedie.posterior import Posterior, check_posterior
from .residuals import residual_of

KINDS = ("entry", "share", "simultaneous", "ellipsoid")


@dataclass(frozen=True, eq=False, repr=False)
class Conformal(Record):
    """Regions with guaranteed coverage, made by `conformal`.

    Attributes:
        kind: what is guaranteed, see `conformal`.
        level: the probability.
        share: of the entries of a sample; for kind "share" alone.
        samples: n, those it was made from.
        dims: of a sample.
        radius: the k-th smallest score. In standard deviations of the posterior, shape dims for
            "entry" and () for "share" and "simultaneous"; for "ellipsoid" e^T C^-1 e, shape ().
            float64.
    """

    kind: str
    level: float
    share: float
    samples: int
    dims: tuple[int, ...]
    radius: Tensor

    def _summary(self) -> str:
        return f"{self.kind}, level {self.level:g}, {self.samples} samples of {self.dims}"

    @torch.no_grad()
    def interval(self, posterior: Posterior) -> tuple[Tensor, Tensor]:
        """Ends of the interval of every entry, mean -+ radius std.

        Args:
            posterior: of new samples of the same dims.

        Returns:
            (low, high), as the mean: shape (B, *dims).

        Raises:
            ValueError: the posterior has other dims, or a variance that is not positive; this is an
                ellipsoid, which has no intervals.
            TypeError: posterior is of another kind.
        """
        where = "Conformal.interval"
        rule = "kind must have intervals, one of " + ", ".join(KINDS[:-1])
        check(where, self.kind != "ellipsoid", rule, self.kind)
        self._fits(where, posterior)
        width = (_std(where, posterior) * self.radius.to(posterior.mean.device)).to(posterior.mean)
        return posterior.mean - width, posterior.mean + width

    @torch.no_grad()
    def covers(self, x0: Tensor, posterior: Posterior) -> Tensor:
        """Whether the region holds the truth.

        Args:
            x0: clean samples. Shape (B, *dims), dtype and device of the posterior.
            posterior: of them.

        Returns:
            For each sample True or False, shape (B,); for "entry" shape (B, *dims). NaN is outside.

        Raises:
            ValueError, TypeError: as `interval`, or x0 does not fit.
        """
        where = "Conformal.covers"
        self._fits(where, posterior)
        scores = _scores(where, x0, posterior, self.kind, self.share)
        return scores <= self.radius.to(scores.device)

    def _fits(self, where: str, posterior: Posterior) -> None:
        check_kind(where, "posterior", posterior, Posterior)
        check_posterior(where, posterior)
        shape = tuple(posterior.mean.shape[1:])
        check(where, shape == self.dims, f"posterior must have dims {self.dims}", shape)


@torch.no_grad()
def conformal(
    x0: Tensor,
    posterior: Posterior,
    *,
    level: float = 0.9,
    kind: str = "simultaneous",
    share: float = 0.9,
) -> Conformal:
    """Regions that hold the truth of a new sample with probability at least `level`.

    What is guaranteed, and the score of a sample with residual e = x0 - m:

        "entry"          each entry by itself; |e_i| / std_i, entry by entry
        "share"          at least `share` of the entries of a sample; the smallest radius, in
                         standard deviations, that holds so many of them
        "simultaneous"   all entries of a sample at once; max_i |e_i| / std_i
        "ellipsoid"      the sample as a whole; e^T C^-1 e

    Args:
        x0: clean samples not trained on. Shape (n, *dims), dtype and device of the posterior. Keep
            to one noise level: a mixture of levels is covered on average over them alone.
        posterior: posteriors of x0 given noisy samples.
        level: probability, in (0, 1). It takes n >= level / (1 - level) samples: 9 for 0.9.
        kind: one of those above.
        share: for kind "share", in (0, 1].

    Returns:
        Conformal, with `interval(posterior)` and `covers(x0, posterior)`.

    Raises:
        ValueError: too few samples for the level; x0 and posterior do not fit each other; scores
            that are not finite; a variance that is not positive; for "ellipsoid" a covariance that
            is not positive definite; level or share out of range.
        TypeError: an argument is of the wrong kind.

    References:
        Vovk, Gammerman and Shafer 2005; Lei et al. 2018, arXiv:1604.04173, Theorem 2.2.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR, Posterior, normal
        >>> from hos_ext.uncertainty import conformal
        >>> x0 = normal((999, 2), seed=0)
        >>> claimed = Posterior(torch.zeros(999, 2), DPLR(torch.full((999, 2), 0.25)))
        >>> region = conformal(x0, claimed, level=0.9, kind="entry")
        >>> region
        Conformal(entry, level 0.9, 999 samples of (2,))
        >>> low, high = region.interval(claimed[:1])  # 1.645 is right, 0.82 was claimed
        >>> bool((high - 1.645).abs().max() < 0.2)
        True
    """
    where = "conformal"
    one_of(where, "kind", kind, KINDS)
    level = check_number(where, "level", level)
    check(where, level < 1, "level must be in (0, 1)", level)
    share = check_number(where, "share", share)
    check(where, share <= 1, "share must be in (0, 1]", share)
    scores = _scores(where, x0, posterior, kind, share)
    n = len(scores)
    # What floating point adds to a product that is whole, such as 10 x 0.9, must not count.
    place = math.ceil((n + 1) * level * (1 - 1e-12))
    rule = f"x0 must have at least {least_rows(level)} samples for level {level:g}"
    check(where, place <= n, rule, n)
    rule = "x0 - posterior.mean must be finite, and its size in standard deviations too"
    bad = int((~scores.reshape(n, -1).isfinite()).any(1).sum())
    check(where, bad == 0, rule, f"{bad} of {n} samples without")
    radius = scores.kthvalue(place, dim=0).values
    dims = tuple(posterior.mean.shape[1:])
    return Conformal(kind, level, share if kind == "share" else 1.0, n, dims, radius)


def least_rows(level: float) -> int:
    """The least number of samples that a region of a level can be made from."""
    return math.ceil(level / (1 - level) * (1 - 1e-12))


def _std(where: str, posterior: Posterior) -> Tensor:
    """Standard deviations of the entries in float64, which must exist. Shape (B, *dims)."""
    variance = posterior.covariance.to(torch.float64).diagonal()
    bad = int((~(variance > 0)).any(1).sum())
    rule = "posterior.covariance must have positive variances"
    check(where, bad == 0, rule, lambda: f"{bad} of {len(variance)} samples without")
    return variance.sqrt().reshape(posterior.mean.shape)


def _scores(where: str, x0: Tensor, posterior: Posterior, kind: str, share: float) -> Tensor:
    """Shape (B, *dims) for "entry" and (B,) else, float64. NaN in x0 gives infinity: outside."""
    residual = residual_of(where, x0, posterior, 0.0)
    if kind == "ellipsoid":
        covariance = posterior.covariance.to(torch.float64)
        bad = int((~covariance.is_positive_definite()).sum())
        rule = "posterior.covariance must be positive definite"
        check(where, bad == 0, rule, lambda: f"{bad} of {len(residual)} that are not")
        return (residual * covariance.solve(residual)).sum(1).nan_to_num(math.inf)
    ratio = residual.abs() / _std(where, posterior).flatten(1)
    ratio = ratio.nan_to_num(math.inf, posinf=math.inf)
    if kind == "entry":
        return ratio.reshape(x0.shape)
    size = ratio.shape[1]
    place = min(max(math.ceil(share * size * (1 - 1e-12)), 1), size)
    return ratio.max(1).values if kind == "simultaneous" else ratio.kthvalue(place, 1).values
