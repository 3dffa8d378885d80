"""How strange a noisy sample is to a second-order score model: out-of-distribution scores.

Meng et al. 2021 (arXiv:2111.04726) name outlier detection as a use of second-order scores and leave
it open. `outlier_score` derives the statistics that are used here. They need s1 and s2 at one noise
level and no density. `auroc` says how well a score tells samples of two kinds apart.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..checks import (
    check,
    check_kind,
    check_like,
    check_low_rank,
    check_number,
    check_samples,
    check_tensor,
    one_of,
)
from ..linalg.dplr import DPLR
from ..linalg.woodbury import low_rank_eigh
from ..scores import Scores

_KINDS = ("laplacian", "mahalanobis", "uncertainty", "norm")


@torch.no_grad()
def outlier_score(
    scores: Scores,
    *,
    kind: Literal["laplacian", "mahalanobis", "uncertainty", "norm"] = "laplacian",
    floor: float = 0.05,
) -> Tensor:
    """A number for each noisy sample, larger for stranger ones.

    With kappa = I + sigma^2 s2, and p the density of noisy samples at level sigma:

        "laplacian"    |sigma s1|^2 + sigma^2 tr s2 = sigma^2 (Laplacian of p) / p
        "mahalanobis"  s1^T (-s2)^-1 s1
        "uncertainty"  tr kappa = alpha^2 tr Cov[x0 | x] / sigma^2
        "norm"         |sigma s1|^2, of the first order only, to compare with

    "laplacian" compares p(x) with the mean of p close by. By the heat equation it is d log p / d
    log sigma: what the log density gains when the noise grows. Its mean over p is 0 for every p
    (the trace of E[s1 s1^T + s2] = 0). It is "norm" minus what "norm" is expected to be there,
    -sigma^2 tr s2. Between modes, where s1 vanishes and s2 is positive, it is large while "norm" is
    small. For N(m, P^-1) its variance is 2 sigma^4 tr P^2.

    "mahalanobis" takes log p near x for a quadratic: twice the height of its top above log p(x). On
    a Gaussian that is the squared Mahalanobis distance, chi^2_D. Where -s2 is not positive definite
    the quadratic has no top, and the inverse has a pole on the way there. Hence a floor, by
    congruence: with kappa = diag(c) + F S F^T, E = max(1 - c, floor) and V = E^-1/2 F, the value is
    (sigma s1)^T E^-1/2 A^-1 E^-1/2 (sigma s1), where A is I - V S V^T with its eigenvalues raised
    to the floor. Nothing changes where 1 - c and those eigenvalues exceed the floor. On images
    nearly every sample needs the floor at small sigma. Moduli of the eigenvalues in place of the
    floor did worse on most kinds of outliers tried.

    "uncertainty" asks how well x tells what it was made from. It is blind to the tails of a
    Gaussian, where kappa is the same everywhere.

    None is best at everything. Compare them with `auroc` on the kind of outliers that you expect.

    Args:
        scores: a network's output at one noise level, or exact scaled scores. Shapes (B, *dims),
            (B, D, r). float32 or float64.
        kind: the statistic.
        floor: for "mahalanobis", in (0, 1]: least curvature, in units of 1 / sigma^2 and then of
            the diagonal part.

    Returns:
        Shape (B,), dtype of scores, O(D r^2) for each. No gradient. NaN where the scores of a
        sample are not finite.

    Raises:
        TypeError: scores is not a `Scores`, floor not a number.
        ValueError: an unknown kind, floor outside (0, 1], shapes, dtypes or devices that disagree.

    Example:
        Data N(0, I) at sigma 1: s1 = -x / 2, s2 = -I / 2.

        >>> import torch
        >>> from hos_ext import Scores
        >>> from hos_ext.uncertainty import outlier_score
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> outlier_score(Scores(-x / 2, torch.full_like(x, 0.5)), kind="mahalanobis")
        tensor([ 0.0000, 12.5000])
    """
    where = "outlier_score"
    check_kind(where, "scores", scores, Scores)
    one_of(where, "kind", kind, _KINDS)
    floor = check_number(where, "floor", floor)
    check(where, floor <= 1, "floor must be in (0, 1]", f"{floor:g}")
    check_samples(where, "scores.scaled_score", scores.scaled_score)
    check_like(where, "scores.c", scores.c, scores.scaled_score)
    sign = check_low_rank(where, scores.factor, scores.sign, scores.scaled_score)
    scaled_score = scores.scaled_score.flatten(1)
    kappa = DPLR.of(scores.c.flatten(1), scores.factor, sign)
    finite = (scaled_score + kappa.diagonal()).isfinite().all(1)
    if kind == "laplacian":
        value = (scaled_score.square() + kappa.diagonal() - 1).sum(1)
    elif kind == "mahalanobis":
        kept = finite.unsqueeze(1)
        diag, factor = kappa.diag.where(kept, 0.0), kappa.factor.where(kept.unsqueeze(2), 0.0)
        value = _mahalanobis(scaled_score, DPLR(diag, factor, kappa.sign), floor)
    elif kind == "uncertainty":
        value = kappa.trace()
    else:
        value = scaled_score.square().sum(1)
    return value.where(finite, torch.nan)


def _mahalanobis(scaled_score: Tensor, kappa: DPLR, floor: float) -> Tensor:
    """(sigma s1)^T (I - kappa)^-1 (sigma s1), with the floor of `outlier_score`. Shape (B,)."""
    root = (1 - kappa.diag).clamp_min(floor).sqrt()
    white = scaled_score / root
    sign = kappa.diag.new_ones(kappa.rank) if kappa.sign is None else kappa.sign
    basis, lam = low_rank_eigh(kappa.factor / root.unsqueeze(-1), sign)
    # A^-1 = I + Q (1 / max(1 - lam, floor) - 1) Q^T; Q spans all that lam is not zero for.
    gain = (1 - lam).clamp_min(floor).reciprocal() - 1
    along = (basis.mT @ white.unsqueeze(-1)).squeeze(-1)
    return white.square().sum(1) + (gain * along.square()).sum(1)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The probability that a score from outside exceeds one from inside, ties counting half.

    The area under the ROC curve, as the rank statistic of Mann and Whitney: 1 tells all apart, 1/2
    is chance, below 1/2 the outliers have the smaller scores.

    Args:
        inside: scores of samples in distribution. Shape (n,), float32 or float64, n >= 1.
        outside: scores of outliers. Shape (m,), m >= 1, dtype and device of inside.

    Returns:
        In [0, 1]. O((n + m) log n).

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: another shape, dtype or device, no scores, or NaN among them.

    Example:
        >>> import torch
        >>> from hos_ext.uncertainty import auroc
        >>> auroc(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
        0.875
    """
    check_tensor("auroc", "inside", inside)
    check_tensor("auroc", "outside", outside, like=inside)
    for name, values in (("inside", inside), ("outside", outside)):
        some, shape = values.dim() == 1 and len(values) > 0, tuple(values.shape)
        check("auroc", some, f"{name} must have shape (n,), n >= 1", shape)
        missing = int(values.isnan().sum())
        got = f"{missing} of {len(values)}"
        check("auroc", missing == 0, f"{name} must not hold NaN", got)
    ranked, values = inside.detach().sort().values, outside.detach().contiguous()
    below = torch.searchsorted(ranked, values) + torch.searchsorted(ranked, values, right=True)
    return float(below.double().mean()) / (2 * len(ranked))
