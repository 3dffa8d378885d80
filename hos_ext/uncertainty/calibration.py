"""Whether the covariance of a posterior is right: whether the errors of its mean are that large.

With residuals e = x0 - m, the law N(m, C) is calibrated where E[e e^T] = C, as a whole and in every
direction. `calibration` gives two figures. `calibration_report` adds error bars, variances along
directions and coverage curves. `recalibration_factor` is the scalar that mends the size of C,
`recalibration_factors` are two that mend its shape as well.
Everything takes O(D r^2) in float64. The true x0 must be known: use samples not trained on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import (
    FLOATING,
    check,
    check_int,
    check_kind,
    check_number,
    check_shape,
    check_tensor,
    show,
)
from ..display import axes_of
from ..linalg.dplr import DPLR
from ..ops.noise import draw_normal
from ..random import STREAM_REPORT, Key, seed_from
from ..records import Record
from ..tweedie.posterior import Posterior
from .conformal import Conformal
from .residuals import residual_of

_BAND = 1.959964  # normal quantile of a two-sided 95%

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class CalibrationReport(Record):
    """What `calibration_report` found; 1 is calibrated and above 1 overconfident.

    Attributes:
        samples: B, how many posteriors.
        size: D, entries of a sample.
        tau: standard deviation of the added noise, units of the data.
        mahalanobis, trace_ratio: as `calibration` gives them.
        mahalanobis_error, trace_ratio_error: their standard errors.
        recalibration: as `recalibration_factor` gives it.
        z_squared: mean of (v^T e)^2 / (v^T C v) for each direction v. Shape (k,), float64.
        z_squared_error: standard errors of these. Shape (k,).
        levels: nominal probabilities. Shape (L,), float64.
        entries: share of the entries of x0 inside their central interval of that probability, and
            the ends of a 95% confidence band. Shape (L, 3): share, low, high.
        ellipsoid: likewise the share of samples inside the ellipsoid e^T C^-1 e = the quantile of
            chi^2_D. Shape (L, 3).
        regions: conformal regions that were asked for.
        held: likewise the share of samples (for kind "entry" of entries) that each of them holds.
            Shape (R, 3).

    `str(report)` is a table to print.
    """

    samples: int
    size: int
    tau: float
    mahalanobis: float
    mahalanobis_error: float
    trace_ratio: float
    trace_ratio_error: float
    recalibration: float
    z_squared: Tensor
    z_squared_error: Tensor
    levels: Tensor
    entries: Tensor
    ellipsoid: Tensor
    regions: tuple[Conformal, ...]
    held: Tensor

    def _summary(self) -> str:
        return (
            f"{self.samples} x ({self.size},), mahalanobis {self.mahalanobis:.3f}, "
            f"trace_ratio {self.trace_ratio:.3f}"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Reliability: how often the truth was inside, against how often it should have been.

        The diagonal is calibrated; below it the posterior is overconfident. Bars are the 95%
        confidence band.

        Args:
            ax: matplotlib axes; None makes new ones.

        Returns:
            The axes.

        Raises:
            TypeError: ax is no axes.
            ValueError: the fields of the report do not fit each other.
            RuntimeError: matplotlib is missing (pip install hos_ext[cli]).
        """
        where = "CalibrationReport.plot"
        check_tensor(where, "levels", self.levels, shape=("L",), dtypes=FLOATING)
        for name, value in (("entries", self.entries), ("ellipsoid", self.ellipsoid)):
            check_tensor(where, name, value, shape=(len(self.levels), 3), dtypes=FLOATING)
        ax = axes_of(where, ax)
        ax.plot([0, 1], [0, 1], color="grey", lw=0.8)
        levels = self.levels.detach().cpu().numpy()
        for name, marker, rows in (
            ("entries", "o", self.entries),
            ("ellipsoid", "s", self.ellipsoid),
        ):
            share, low, high = rows.detach().cpu().numpy().T
            ends = [(share - low).clip(0), (high - share).clip(0)]
            ax.errorbar(levels, share, ends, marker=marker, lw=1.2, capsize=2, label=name)
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.set(xlabel="nominal probability", ylabel="share of true values inside")
        ax.legend(frameon=False)
        return ax

    def __str__(self) -> str:
        lines = [
            f"{self.samples} samples of {self.size} entries, tau {self.tau:g}",
            f"Mahalanobis / D  {self.mahalanobis:.3f} +- {self.mahalanobis_error:.3f}",
            f"trace ratio      {self.trace_ratio:.3f} +- {self.trace_ratio_error:.3f}",
            f"recalibration    {self.recalibration:.3f}",
        ]
        directions = zip(self.z_squared.tolist(), self.z_squared_error.tolist(), strict=True)
        for k, (value, error) in enumerate(directions):
            lines.append(f"direction {k:<6} {value:.3f} +- {error:.3f}")
        lines.append("coverage         entries                 ellipsoid")
        rows = zip(
            self.levels.tolist(), self.entries.tolist(), self.ellipsoid.tolist(), strict=True
        )
        for level, *shares in rows:
            cells = [f"{share:.3f} ({low:.3f} ... {high:.3f})" for share, low, high in shares]
            lines.append(f"{level:<16g} " + "  ".join(cells))
        for region, (share, low, high) in zip(self.regions, self.held.tolist(), strict=True):
            what = f"conformal {region.kind}, {region.level:g}"
            lines.append(f"{what:<32} {share:.3f} ({low:.3f} ... {high:.3f})")
        return "\n".join(lines)


@torch.no_grad()
def calibration(x0: Tensor, posterior: Posterior, *, tau: float = 0.0) -> dict[str, float]:
    """How well posteriors N(m, C) cover the clean samples: 1 is calibrated, above overconfident.

    With the residual e = x0 - m and A = (C + tau^2 I)^-1, over the batch:

        mahalanobis = mean (e^T A e + tau^2 tr A) / D
        trace_ratio = (mean |e|^2 + D tau^2) / (mean tr C + D tau^2)

    tau > 0 is the predictive check: noise of standard deviation tau is added to both sides, and the
    figure is its exact expectation over that noise, E (e + tau n)^T A (e + tau n), so that nothing
    is drawn. E[e e^T] = C gives 1 for every tau. At tau = 0 `mahalanobis` hangs on the smallest
    eigenvalues of C, where a learned covariance is weakest. tau lifts them to tau^2. `trace_ratio`
    sees the total variance alone. A `mahalanobis` below 0 means that C is not positive definite.

    Args:
        x0: the clean samples. Shape (B, *dims), dtype and device of the posterior.
        posterior: posteriors of x0 given noisy samples: mean (B, *dims) and covariance (a DPLR).
        tau: standard deviation of the added noise, in units of the data, >= 0.

    Returns:
        {"mahalanobis", "trace_ratio"}, computed in float64. NaN in the data gives NaN.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an empty batch, tau negative or not finite,
            C singular at tau = 0.
        TypeError: x0 is not a tensor, posterior not a Posterior, or tau not a number.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR, Posterior, normal
        >>> from hos_ext.uncertainty import calibration
        >>> x0 = normal((1000, 2), seed=0)
        >>> claimed = Posterior(torch.zeros(1000, 2), DPLR(torch.full((1000, 2), 0.5)))
        >>> round(calibration(x0, claimed)["mahalanobis"], 1)  # the variance is 1, not 1/2
        2.0
    """
    residual = residual_of("calibration", x0, posterior, tau)
    tau = float(tau)
    covariance = posterior.covariance.to(torch.float64)
    squares, expected = _sizes(residual, covariance, tau)
    return {
        "mahalanobis": float(_distances(residual, covariance, tau).mean()) / residual.shape[1],
        "trace_ratio": float(squares.mean() / expected.mean()),
    }


@torch.no_grad()
def calibration_report(
    x0: Tensor,
    posterior: Posterior,
    *,
    directions: Tensor | None = None,
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99),
    regions: Sequence[Conformal] = (),
    tau: float = 0.0,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> CalibrationReport:
    """Figures, variances along directions and coverage of posteriors N(m, C), with error bars.

    One report is for one noise level: a mean over levels hides what is wrong with each.

        reports = {s: calibration_report(x0, denoise(x0 + s * noise, s)) for s in (0.2, 0.4, 0.8)}

    Figures and variances along directions need only the first two moments of the posterior to be
    right. Coverage also needs the posterior to be Gaussian: the true C of a skewed or bounded
    posterior covers other shares than the nominal ones.

    Args:
        x0: the clean samples. Shape (B, *dims), B >= 2, dtype and device of the posterior.
        posterior: posteriors of x0 given noisy samples: mean (B, *dims) and a positive definite
            covariance.
        directions: columns v, of any length but zero: (D, k), or (B, D, k) for each sample its
            own, dtype and device of x0. Choose them on OTHER DATA or by another model. Along the
            leading eigenvectors of C itself z^2 reads low, and along the last ones high, even if
            C is right on average in every fixed direction: they are where its errors are largest.
        levels: nominal probabilities of the coverage curves, each in (0, 1).
        regions: made by `conformal` on OTHER samples at the same noise level; the report says how
            often each holds the truth here. tau has no part in it.
        tau: standard deviation of added noise, in units of the data, >= 0: the predictive check
            of `calibration`. Coverage draws that noise; everything else is its exact mean.
        seed: key of the noise that coverage draws at tau > 0.
        generator: a `torch.Generator` in place of seed, which is drawn from it.

    Returns:
        A CalibrationReport; its tensors are on the device of x0. Samples are taken as independent.
        The entries of one sample are not: their band is Wilson's for as many trials as would have
        the variance seen between the samples, at most B D.

    Raises:
        ValueError: as `recalibration_factor`; B < 2; directions do not fit, or one is zero or not
            finite; a level is not in (0, 1), or there is none.
        TypeError: as `recalibration_factor`; directions is not a tensor; a level not a number.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR, Posterior, normal
        >>> from hos_ext.uncertainty import calibration_report
        >>> x0 = normal((1000, 2), seed=0)
        >>> claimed = Posterior(torch.zeros(1000, 2), DPLR(torch.full((1000, 2), 0.5)))
        >>> report = calibration_report(x0, claimed)
        >>> bool(report.entries[0, 0] < 0.5)  # too few are in the 50% interval
        True
    """
    where = "calibration_report"
    residual = residual_of(where, x0, posterior, tau)
    seed = check_int(where, "seed", seed_from(where, seed, generator, 0), 2**64)
    tau = float(tau)
    batch, size = residual.shape
    check(where, batch >= 2, "x0 must have at least 2 samples", batch)
    nominal = torch.tensor(_levels(where, levels), dtype=torch.float64, device=x0.device)
    covariance = posterior.covariance.to(torch.float64)
    recalibration = _scale(where, residual, covariance, tau)

    distances = _distances(residual, covariance, tau) / size
    regions = _conformal(where, regions)
    held = [region.covers(x0, posterior).double().reshape(batch, -1) for region in regions]
    squares, expected = _sizes(residual, covariance, tau)
    ratio = squares.mean() / expected.mean()
    if directions is None:
        directions = x0.new_empty(size, 0)
    z_squared = _along(where, directions, x0, residual, covariance, tau)

    shifted = covariance + tau**2
    if tau > 0:
        drawn = draw_normal(Key(seed), STREAM_REPORT, residual.shape, residual)
        residual = residual + tau * drawn
    # A point is inside where its own probability is at most the level: no quantile is needed.
    interval = torch.erf((residual.square() / (2 * shifted.diagonal())).sqrt())
    radius = (residual * shifted.solve(residual)).sum(1)
    inside = torch.special.gammainc(torch.full_like(radius, size / 2), radius / 2)
    return CalibrationReport(
        samples=batch,
        size=size,
        tau=float(tau),
        mahalanobis=float(distances.mean()),
        mahalanobis_error=float(_standard_error(distances)),
        trace_ratio=float(ratio),
        trace_ratio_error=float(_standard_error(squares - ratio * expected) / expected.mean()),
        recalibration=recalibration,
        z_squared=z_squared.mean(0),
        z_squared_error=_standard_error(z_squared),
        levels=nominal,
        entries=_coverage(interval, nominal),
        ellipsoid=_coverage(inside.unsqueeze(1), nominal),
        regions=regions,
        # Inside is 0 and outside 1: at or below one half.
        held=torch.cat([_coverage(1 - h, nominal.new_tensor([0.5])) for h in held])
        if held
        else nominal.new_empty(0, 3),
    )


@torch.no_grad()
def recalibration_factor(x0: Tensor, posterior: Posterior, *, tau: float = 0.0) -> float:
    """The scalar a > 0 for which a * C is calibrated on (x0, posterior), a validation split.

    Defined by calibration(x0, N(m, a C), tau=tau)["mahalanobis"] = 1. At tau = 0 that is
    a = mean e^T C^-1 e / D, which also maximises the Gaussian likelihood of the residuals over a.
    For tau > 0 the equation is solved as it stands and not by likelihood, since its left side is
    the figure that is reported. That figure falls strictly from above 1 (a -> 0) to 0 (a ->
    infinity). So there is one root wherever C is positive definite and some residual is not zero.

    Args:
        x0, posterior, tau: as in `calibration`. Use `posterior.recalibrated(a)` afterwards, with
            the tau it was fitted for: one scalar cannot calibrate every tau of a misshapen C.

    Returns:
        a, to a relative 1e-6.

    Raises:
        ValueError: as in `calibration`; residuals all zero or not finite; C not positive definite;
            a outside 1e-27 ... 1e27 for tau > 0.
        TypeError: as in `calibration`.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR, Posterior, normal
        >>> from hos_ext.uncertainty import recalibration_factor
        >>> x0 = normal((1000, 2), seed=0)
        >>> claimed = Posterior(torch.zeros(1000, 2), DPLR(torch.full((1000, 2), 0.5)))
        >>> round(recalibration_factor(x0, claimed), 1)
        2.0
    """
    where = "recalibration_factor"
    residual = residual_of(where, x0, posterior, tau)
    return _scale(where, residual, posterior.covariance.to(torch.float64), float(tau))


@torch.no_grad()
def recalibration_factors(x0: Tensor, posterior: Posterior) -> tuple[float, float]:
    """Two factors (a, b) > 0 that calibrate a diag(d) + b U S U^T in size and in shape.

    Both figures of `calibration` are then 1 on (x0, posterior), a validation split:

        mean tr(a diag(d) + b U S U^T) = mean |e|^2        mean e^T (a diag(d) + b U S U^T)^-1 e = D

    One scalar can mend one of them only. The first equation gives b for each a. The left side of
    the second is then convex in a, as e^T M^-1 e is in M: it has a least value, and where that is
    below D a root on either side. The one with the larger Gaussian likelihood is taken. Where the
    least value is above D, the factors there are given, with a warning that says how far above.

    Args:
        x0, posterior: as in `calibration`. C must have a low-rank part and be positive definite.
            Use `posterior.recalibrated(a, b)` afterwards.

    Returns:
        (a, b): of the diagonal and of the low-rank part.

    Raises:
        ValueError: as in `recalibration_factor`; rank 0; signs of -1; residuals so small along the
            columns that no two positive factors fit them.
        TypeError: as in `calibration`.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR, Posterior, normal
        >>> from hos_ext.uncertainty import recalibration_factors
        >>> column = torch.ones(4000, 3, 1)
        >>> x0 = DPLR(torch.ones(4000, 3), column).sample(1, seed=0)[0]
        >>> claimed = Posterior(0 * x0, DPLR(torch.full((4000, 3), 0.5), 2 * column))
        >>> a, b = recalibration_factors(x0, claimed)
        >>> abs(a / 2 - 1) < 0.05, abs(b / 0.25 - 1) < 0.05
        (True, True)
    """
    where = "recalibration_factors"
    residual = residual_of(where, x0, posterior, 0.0)
    _scale(where, residual, posterior.covariance.to(torch.float64), 0.0)  # its checks
    covariance = posterior.covariance.to(torch.float64)
    rank, sign = covariance.rank, covariance.sign
    check(where, rank > 0, "posterior.covariance must have a low-rank part", f"rank {rank}")
    plus = sign is None or bool((sign > 0).all())
    rule = "posterior.covariance must have signs of +1"
    check(where, plus, rule, lambda: None if sign is None else sign.tolist())
    wanted = float(residual.square().sum(1).mean())
    diagonal = float(covariance.diag.sum(1).mean())
    low_rank = float(covariance.trace().mean()) - diagonal

    def second(a: float) -> float:
        return (wanted - a * diagonal) / low_rank

    def shaped(a: float) -> DPLR:
        return DPLR.of(a * covariance.diag, math.sqrt(second(a)) * covariance.factor)

    def excess(a: float) -> float:
        return float(_distances(residual, shaped(a), 0.0).mean()) / residual.shape[1] - 1

    end = wanted / diagonal  # there the diagonal holds all
    low, high = 1e-9 * end, end * (1 - 1e-9)
    for _ in range(80):
        third = (high - low) / 3
        left, right = low + third, high - third
        low, high = (low, right) if excess(left) < excess(right) else (left, high)
    least = (low + high) / 2
    if excess(least) > 0:
        warnings.warn(
            f"{where}: no two factors make both figures 1; with the trace ratio 1 the Mahalanobis "
            f"figure is {1 + excess(least):.3f} at least, and these give that",
            stacklevel=3,  # no_grad is a frame
        )
        return least, second(least)
    rule = "x0 must be calibrated by two positive factors (recalibration_factor takes one)"
    roots = []
    for out in (1e-9 * end, end * (1 - 1e-9)):
        if excess(out) <= 0:
            continue  # it stays below D up to this end
        within = least
        while abs(out - within) > 1e-10 * end:
            middle = (out + within) / 2
            out, within = (middle, within) if excess(middle) > 0 else (out, middle)
        roots.append(within)
    check(where, roots, rule, "a Mahalanobis figure below 1 for all, with the trace right")
    a = min(roots, key=lambda root: float(shaped(root).logdet().mean()))
    return a, second(a)


def _scale(where: str, residual: Tensor, covariance: DPLR, tau: float) -> float:
    """`recalibration_factor` of float64 residuals (B, D) and covariances."""
    size = float(residual.square().mean())
    rule = "x0 - posterior.mean must be finite and not all zero"
    check(where, 0 < size < math.inf, rule, f"mean square {size}")
    bad = int((~covariance.is_positive_definite()).sum())
    rule, got = "posterior.covariance must be positive definite", f"{bad} of {len(residual)}"
    check(where, bad == 0, rule, f"{got} that are not")
    if tau == 0:
        return float(_distances(residual, covariance, 0.0).mean()) / residual.shape[1]

    def excess(log_a: float) -> float:
        distances = _distances(residual, covariance.scale(math.exp(log_a)), tau)
        return float(distances.mean()) / residual.shape[1] - 1

    low, high = -64.0, 64.0
    rule = "x0 must be calibrated by a factor in 1e-27 ... 1e27"
    got = f"mean square {size} of x0 - posterior.mean"
    check(where, excess(low) > 0 > excess(high), rule, got)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def _distances(residual: Tensor, covariance: DPLR, tau: float) -> Tensor:
    """e^T A e + tau^2 tr A with A = (C + tau^2 I)^-1. Shape (B,)."""
    shifted = covariance + tau**2
    quadratic = (residual * shifted.solve(residual)).sum(1)
    if tau > 0:
        # A = d^-1 - d^-1 U S U^T A, so tr A needs only the r columns of A U.
        solved = shifted.solve(shifted.factor) * shifted.factor
        low_rank = (solved if shifted.sign is None else solved * shifted.sign).sum(2)
        quadratic = quadratic + tau**2 * ((1 - low_rank) / shifted.diag).sum(1)
    return quadratic


def _sizes(residual: Tensor, covariance: DPLR, tau: float) -> tuple[Tensor, Tensor]:
    """|e|^2 + D tau^2 and its expectation tr C + D tau^2. Shapes (B,)."""
    noise = residual.shape[1] * tau**2
    return residual.square().sum(1) + noise, covariance.trace() + noise


def _along(
    where: str, directions: Tensor, x0: Tensor, residual: Tensor, covariance: DPLR, tau: float
) -> Tensor:
    """((v^T e)^2 + tau^2 |v|^2) / (v^T C v + tau^2 |v|^2) for each column v. Shape (B, k)."""
    check_tensor(where, "directions", directions, like=x0)
    batch, size = residual.shape
    check_shape(where, "directions", directions, (size, "k"), (batch, size, "k"))
    length = directions.double().norm(dim=-2, keepdim=True)
    good = (length > 0) & length.isfinite()
    rule = "directions must be finite and not zero"
    check(where, bool(good.all()), rule, lambda: f"one of length {length[~good][0].item()}")
    v = directions.double() / length
    low_rank = (covariance.factor.mT @ v).square()  # (B, r, k)
    if covariance.sign is not None:
        low_rank = low_rank * covariance.sign.unsqueeze(-1)
    variance = (covariance.diag.unsqueeze(1) @ v.square()).squeeze(1) + low_rank.sum(1)
    found = (residual.unsqueeze(1) @ v).squeeze(1).square()
    ratio: Tensor = (found + tau**2) / (variance + tau**2)
    return ratio


def _conformal(where: str, regions: Sequence[Conformal]) -> tuple[Conformal, ...]:
    many = isinstance(regions, (list, tuple))
    check(where, many, "regions must be a list of Conformal", lambda: show(regions), TypeError)
    return tuple(check_kind(where, "regions", region, Conformal) for region in regions)


def _levels(where: str, levels: Sequence[float]) -> list[float]:
    many = isinstance(levels, (list, tuple)) or getattr(levels, "ndim", 0) == 1
    check(where, many, "levels must be a sequence of numbers", lambda: show(levels), TypeError)
    numbers = [check_number(where, "levels", level) for level in levels]
    inside = bool(numbers) and max(numbers) < 1
    check(where, inside, "levels must be in (0, 1), at least one", lambda: show(levels))
    return numbers


def _standard_error(values: Tensor) -> Tensor:
    """Of the mean over the batch."""
    batch = len(values)
    squares = (values - values.mean(0)).square().sum(0)  # `std` warns where there is no column
    return (squares / (batch * (batch - 1))).sqrt()


def _coverage(probability: Tensor, levels: Tensor) -> Tensor:
    """Share of probability (B, n) at or below each level, with Wilson's 95% band. Shape (L, 3)."""
    batch = probability.shape[0]
    # Level by level: all at once would hold B x n x L numbers.
    shares = torch.stack([(probability <= level).double().mean(1) for level in levels])
    share = shares.mean(1)
    spread = share * (1 - share)
    variance = shares.var(1, correction=0) / batch
    # Trials worth: B D if entries are independent, B if those of a sample go together, and B where
    # all or none are inside, which says nothing of it.
    worth = (spread / variance).clamp_max(probability.numel()).where(spread > 0, batch)
    centre = (share + _BAND**2 / (2 * worth)) / (1 + _BAND**2 / worth)
    reach = _BAND * (spread / worth + (_BAND / (2 * worth)) ** 2).sqrt() / (1 + _BAND**2 / worth)
    return torch.stack([share, centre - reach, centre + reach], 1)
