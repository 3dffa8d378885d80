"""How good chains are: effective sample size, R-hat, mode jumps, and the error of their law.

Chains come with the chain axis first, as `sample` returns them; `ess` (but for its "cutoff") and
`r_hat` hand each dimension to arviz-stats (extra `app`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import (
    FLOATING,
    check,
    check_count,
    check_tensor,
    kind_name,
    one_of,
    positive,
    require,
    said_by,
)

ESS_KINDS = ("bulk", "tail", "mean", "sd", "cutoff")
_CUTOFF = 0.05


def ess(draws: Tensor, *, kind: str = "bulk") -> Tensor:
    """Effective sample size of every dimension, all chains together.

    "bulk", "tail", "mean" and "sd" are those of Vehtari et al. 2021: chains are split in two, so
    that a chain that drifts counts for little. "cutoff" is the lag cut-off rule used with the
    figures of score-matching papers: for C chains of N draws with pooled mean m and variance v,

        ESS = C N / (1 + 2 sum_{s=1}^{S} (1 - s/N) rho_s),
        rho_s = mean over chains and t = 1 ... N-s of (x_t - m) (x_{t+s} - m) / v,

    where S is the last lag before rho first falls below 0.05. Since m and v are pooled, chains in
    different modes count as correlated. Negative rho do not count: ESS is at most C N.

    Args:
        draws: shape (chain, draw, *dims), floating point, at least 4 draws.
        kind: "bulk" (rank-normalised, for means and medians), "tail" (the smaller one of the 5%
            and 95% quantiles), "mean" or "sd" (of the values as they are), "cutoff" (for the mean).

    Returns:
        Shape dims, float64, on the CPU. NaN where it is undefined: a dimension with non-finite
        draws (select the chains first: `draws[~stats["diverged"]]`) or with all draws equal.

    Raises:
        ValueError: too few chains or draws, an unknown kind.
        TypeError: draws is not a floating-point tensor.
        RuntimeError: arviz-stats is missing ("cutoff" does without).

    References:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner 2021, arXiv:1903.08008.

    Example:
        >>> import torch
        >>> draws = torch.tensor([[[0.0], [1.0]] * 20])  # one chain that goes to and fro
        >>> ess(draws, kind="cutoff")
        tensor([40.], dtype=torch.float64)
    """
    one_of("ess", "kind", kind, ESS_KINDS)
    _check_draws("ess", draws)
    if kind == "cutoff":
        return _per_dimension(draws, _cutoff_ess)
    prob = (0.05, 0.95) if kind == "tail" else None
    engine = require("ess", "arviz_stats.base").array_stats
    return _per_dimension(draws, lambda values: engine.ess(values, 0, 1, method=kind, prob=prob))


def min_ess(draws: Tensor, *, kind: str = "bulk") -> float:
    """The smallest `ess` over the dimensions; NaN if it is undefined in any of them.

    Args:
        draws, kind: as for `ess`.

    Returns:
        In draws.

    Raises:
        ValueError, TypeError, RuntimeError: as `ess`.

    Example:
        >>> import torch
        >>> min_ess(torch.tensor([[[0.0], [1.0]] * 20]), kind="cutoff")
        40.0
    """
    with said_by("min_ess", "ess"):
        return float(ess(draws, kind=kind).min())


def ess_rate(draws: Tensor, cost: float | Tensor, *, kind: str = "bulk") -> float:
    """min_ess(draws) / cost: effective draws, of the worst dimension, per unit of cost.

    Args:
        draws: shape (chain, draw, *dims), as for `ess`.
        cost: what all of these chains cost together, burn-in included: seconds, or score
            evaluations (`sample` counts those of one chain). A float or a 0-d tensor on the CPU,
            > 0.
        kind: as for `ess`.

    Returns:
        In units of 1 / cost; NaN where `min_ess` is.

    Raises:
        ValueError, TypeError, RuntimeError: as `ess`; cost is not positive or not a number.

    Example:
        >>> import torch
        >>> ess_rate(torch.tensor([[[0.0], [1.0]] * 20]), 80, kind="cutoff")
        0.5
    """
    value = positive("ess_rate", "cost", cost, torch.empty((), dtype=torch.float64))
    with said_by("ess_rate", "min_ess"):
        return min_ess(draws, kind=kind) / float(value)


def r_hat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat of every dimension, bulk and tail (Vehtari et al. 2021).

    Close to 1 (below 1.01) when the chains, and the two halves of each, agree.

    Args:
        draws: shape (chain, draw, *dims), floating point, at least 2 chains of at least 4 draws.

    Returns:
        Shape dims, float64, on the CPU. NaN where it is undefined (see `ess`); infinite for chains
        that each stand still at different places.

    Raises:
        ValueError: too few chains or draws.
        TypeError: draws is not a floating-point tensor.
        RuntimeError: arviz-stats is missing.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner 2021, arXiv:1903.08008.

    Example:
        >>> import torch
        >>> agree = torch.randn(4, 1000, 1, generator=torch.Generator().manual_seed(0))
        >>> apart = agree + torch.arange(4.0).reshape(4, 1, 1)
        >>> bool(r_hat(agree) < 1.01), bool(r_hat(apart) > 1.2)
        (True, True)
    """
    _check_draws("r_hat", draws, min_chains=2)
    engine = require("r_hat", "arviz_stats.base").array_stats
    return _per_dimension(draws, lambda values: engine.rhat(values, 0, 1, method="rank"))


@torch.no_grad()
def mode_jumps(draws: Tensor, modes: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
    """How often each chain goes from one mode to another, between successive draws.

    Non-finite draws belong to no mode and are left out: a chain that diverged has the jumps that
    it made before.

    Args:
        draws: shape (chain, draw, *dims), floating point.
        modes: centres of the modes, shape (K, *dims), finite, dtype and device of draws: a draw
            belongs to the nearest one (Euclidean distance; the first of equals). Or a function,
            such as a classifier, called once for each chain with its finite draws (n, *dims), in
            order and without gradients, that returns their labels: shape (n,), int64 or int32.

    Returns:
        Shape (chain,), int64, on the device of draws.

    Raises:
        ValueError: no chains or draws; centres or labels of another shape or dtype, centres on
            another device or not finite.
        TypeError: draws is not a floating-point tensor; modes is neither a Tensor nor a function,
            or returns no Tensor.

    Example:
        >>> import torch
        >>> draws = torch.tensor([[[-1.1], [-0.9], [1.2], [-1.0]]])
        >>> mode_jumps(draws, torch.tensor([[-1.0], [1.0]]))
        tensor([2])
    """
    caller = "mode_jumps"
    _check_draws(caller, draws, min_draws=1)
    if isinstance(modes, Tensor):
        _check_modes(caller, modes, draws)
    else:
        rule, kind = "modes must be a Tensor or a function", kind_name(modes)
        check(caller, callable(modes), rule, kind, TypeError)
    finite = draws.isfinite().reshape(*draws.shape[:2], -1).all(2)
    jumps = []
    for chain, usable in zip(draws, finite, strict=True):
        kept = chain[usable]
        if len(kept) < 2:
            jumps.append(0)
            continue
        if isinstance(modes, Tensor):
            labels = _nearest(kept, modes)
        else:
            labels = modes(kept)
            kinds = (torch.int64, torch.int32)
            check_tensor(caller, "modes(draws)", labels, shape=(len(kept),), dtypes=kinds)
        jumps.append(int((labels[1:] != labels[:-1]).sum()))
    return torch.tensor(jumps, dtype=torch.int64, device=draws.device)


class LawError(NamedTuple):
    """How far the law of draws is from that of other samples; `law_error` makes it.

    Attributes:
        spread: root of the ratio of total variances; 1 is right, 2 is twice as wide.
        energy_distance: (2 E|X-Y| - E|X-X'| - E|Y-Y'|) / (2 E|X-Y|), at most 1; 0 is right, and
            differs from 0 wherever the laws do. Without bias, so that equal laws give numbers of
            either sign.

    Example:
        >>> from hos_ext.sampling import LawError
        >>> LawError(1.1, 0.002).spread
        1.1
    """

    spread: float
    energy_distance: float


def law_error(draws: Tensor, reference: Tensor, *, limit: int = 2000) -> LawError:
    """Compares draws with samples of the law that they should have, such as held-out data.

    A chain can mix fast in the wrong law, and its effective sample size then looks best. So look
    at this beside it. Draws of one chain depend on each other, as the formula does not know:
    their energy distance comes out a little too large.

    Args:
        draws: shape (n, *dims), n >= 2, finite; `chains.draws.flatten(0, 1)`.
        reference: shape (m, *dims), m >= 2, finite, dtype and device of draws.
        limit: the energy distance is of at most so many rows of each, evenly spread.

    Returns:
        LawError.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or size; reference is constant.

    References:
        Szekely & Rizzo 2013, doi:10.1016/j.jspi.2013.03.018.

    Example:
        >>> import torch
        >>> from hos_ext.sampling import law_error
        >>> x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
        >>> right, wide = law_error(x[::2], x[1::2]), law_error(3 * x[::2], x[1::2])
        >>> round(right.spread, 1), abs(right.energy_distance) < 0.01
        (1.0, True)
        >>> round(wide.spread, 1), round(wide.energy_distance, 1)
        (3.0, 0.1)
    """
    where = "law_error"
    limit = check_count(where, "limit", limit, least=2)
    check_tensor(where, "draws", draws, dtypes=FLOATING)
    shape = ("m", *draws.shape[1:])
    check_tensor(where, "reference", reference, like=draws, shape=shape, dtypes=FLOATING)
    for name, value in (("draws", draws), ("reference", reference)):
        rows = len(value) if value.dim() >= 2 else 0
        rule = f"{name} must have shape (n, *dims), n >= 2"
        check(where, rows >= 2 and value.numel() > 0, rule, tuple(value.shape))
        check(where, bool(value.isfinite().all()), f"{name} must be finite", "NaN or infinities")
    x, y = (value.detach().flatten(1).double() for value in (draws, reference))
    variance = y.var(0).sum()
    check(where, variance > 0, "reference must vary", "equal rows")
    spread = float((x.var(0).sum() / variance).sqrt())
    x, y = (value[_evenly(len(value), limit)] for value in (x, y))
    exact = "donot_use_mm_for_euclid_dist"
    across = torch.cdist(x, y, compute_mode=exact).mean()
    within = sum(
        torch.cdist(each, each, compute_mode=exact).sum() / (len(each) * (len(each) - 1))
        for each in (x, y)
    )
    return LawError(spread, float((2 * across - within) / (2 * across)))


def _evenly(rows: int, most: int) -> Tensor:
    """Numbers of at most so many rows, evenly spread."""
    return torch.linspace(0, rows - 1, min(rows, most)).round().long()


def _check_modes(caller: str, modes: Tensor, draws: Tensor) -> None:
    check_tensor(caller, "modes", modes, like=draws, dtypes=FLOATING)
    dims = draws.shape[2:]
    fits = modes.dim() > 0 and modes.shape[0] > 0 and modes.shape[1:] == dims
    rule = f"modes must have shape ({', '.join(map(str, ('K', *dims)))}), K >= 1"
    check(caller, fits, rule, tuple(modes.shape))
    bad = ~modes.isfinite()
    check(caller, not bad.any(), "modes must be finite", lambda: modes[bad][0].item())


def _nearest(x: Tensor, modes: Tensor) -> Tensor:
    """Index of the nearest of modes (K, *dims) for each of x (n, *dims)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    points, centres = (t.to(wide).reshape(len(t), -1) for t in (x, modes))
    # By differences: |x|^2 - 2 x.m + |m|^2 cancels for modes that are close but far from zero.
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(points, centres, compute_mode=exact).argmin(1)


def _check_draws(caller: str, draws: Tensor, *, min_chains: int = 1, min_draws: int = 4) -> None:
    kind = draws.dtype if isinstance(draws, Tensor) else type(draws).__name__
    good = isinstance(draws, Tensor) and draws.is_floating_point()
    check(caller, good, "draws must be a floating-point tensor", str(kind), TypeError)
    check(caller, draws.layout is torch.strided, "draws must be strided", draws.layout)
    check(caller, not draws.is_meta, "draws must hold values", "a meta tensor")
    enough = draws.dim() >= 2 and draws.shape[0] >= min_chains and draws.shape[1] >= min_draws
    rule = f"shape (chain, draw, *dims), chain >= {min_chains}, draw >= {min_draws}"
    check(caller, enough, f"draws must have {rule}", tuple(draws.shape))


def _per_dimension(draws: Tensor, figure: Callable[[Any], Any]) -> Tensor:
    """`figure` of the draws (chain, draw, n) of the n dimensions where it means something."""
    dims = draws.shape[2:]
    values = draws.detach().to("cpu", torch.float64).reshape(*draws.shape[:2], -1)
    # arviz-stats calls every draw of a constant effective; a chain that never moves deserves NaN.
    usable = values.isfinite().all(0).all(0) & (values.amax((0, 1)) > values.amin((0, 1)))
    result = torch.full((values.shape[2],), torch.nan, dtype=torch.float64)
    if usable.any():
        # Chains that stand still have no variance within: R-hat is then 1 / 0 = inf, on purpose.
        with np.errstate(divide="ignore"):
            result[usable] = torch.from_numpy(np.asarray(figure(values[:, :, usable].numpy())))
    return result.reshape(dims)


def _cutoff_ess(values: Any) -> Any:
    """The rule "cutoff" of `ess` for draws (chain, draw, n), none of the n constant."""
    chains, length = values.shape[:2]
    z = values - values.mean((0, 1))
    z /= np.abs(z).max((0, 1))  # a variance of 1e-200 squared would be zero
    # Wiener-Khinchin; padded to twice the length, so that the ends do not meet.
    power = sum(np.abs(np.fft.rfft(chain, 2 * length, axis=0)) ** 2 for chain in z)
    lag = np.arange(length)[:, None]
    covariance = np.fft.irfft(power, 2 * length, axis=0)[:length] / (chains * (length - lag))
    rho = covariance[1:] / covariance[0]
    kept = np.logical_and.accumulate(rho >= _CUTOFF, axis=0)
    return chains * length / (1 + 2 * (kept * rho * (1 - lag[1:] / length)).sum(0))
