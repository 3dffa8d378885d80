"""Log densities along the probability-flow ODE, its divergence taken from the learned trace.

The ODE is dx = [-(beta / 2) x - (g^2 / 2) s1] dt. With w = x / scale, scale^2 = alpha^2 data_std^2
+ sigma^2, and q = sigma^2 / scale^2 it reads, for every schedule,
    dw / d log(sigma / alpha) = -sqrt(q) (sigma s1) - q w,   divergence D (1 - q) - tr kappa,
kappa = I + sigma^2 s2. Both are zero for N(0, data_std^2 I) data. tr kappa is the sum of c and of
the squared factor of a second-order model, without a division by sigma or products with vectors.
Products with the score's Jacobian correct it: z^T (I + sigma d(sigma s1)/dx) z less z^T kappa z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ..checks import (
    check,
    check_callable,
    check_count,
    check_first,
    check_like,
    check_number,
    check_samples,
    check_seed,
    check_tensor,
    one_of,
    refuse_dropout,
    said_by,
)
from ..conditions import Conditions, check_conditions
from ..linalg.dplr import DPLR
from ..ops.noise import draw_uniform
from ..random import STREAM_PROBE, Key, seed_from
from ..schedules import Schedule, check_schedule
from ..scores import Model, Scores
from .inputs import noise_key, time_grid
from .steps import Run

_TRACES = ("learned", "corrected", "hutchinson", "exact")


def log_likelihood(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    *,
    n_steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    solver: str = "heun",
    trace: str = "learned",
    data_std: float = 1.0,
    log_prior: Callable[[Tensor], Tensor] | None = None,
    n_probes: int = 1,
    seed: int | None = None,
    first: int = 0,
    model_kwargs: Conditions | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """log p(x) of the noisy density at t_min, by the probability-flow ODE from x up to t_max.

    With v = -(beta / 2) x - (g^2 / 2) s1 the velocity of the ODE,

        log p_0(x_0) = log p_T(x_T) + integral of div v dt
                     = log p_T(x_T) + D log(scale_T / scale_0)
                       + integral of [D (1 - q) - tr kappa] d log(sigma / alpha).

    The second form (top of the file) is smooth for all schedules, and is integrated together with
    x. The learned trace costs no more than the score. It gives the log density of the ODE's own law
    if kappa is I + sigma times the Jacobian of the model's score, as it is for exact scores.
    "exact" always gives that law. "hutchinson" is unbiased for it, with a variance. So is
    "corrected", whose probes see only what the learned kappa lacks. It costs what "hutchinson"
    costs: no more calls of the model, and a product with the learned matrix for each of the probes.

    Args:
        model: `model(x, sigma) -> Scores`. It must be of second order for "learned" and
            "corrected", and its scaled_score differentiable in x for all but "learned".
        x: points, with the noise sigma(t_min). Shape (B, *dims), float32 or float64.
        schedule: a `Schedule`.
        n_steps: steps of equal length in log(sigma / alpha) from t_min to t_max; or else `times`.
        times: a descending grid as the samplers take it; here the path goes up.
        solver: "heun", order 2, two model calls a step; "rk4", order 4, four calls.
        trace: "learned": sum of c and sign * factor^2; "hutchinson": z^T (d score / d x) z by
            n_probes vector-Jacobian products a call, z of +-1 and the same all along the path;
            "corrected": the learned trace, and "hutchinson" for the difference of the two
            matrices, with the same probes; "exact": D such products, one after the other. None
            asks that the Jacobian be symmetric.
        data_std: standard deviation of the data, >= 0: p_T is N(0, scale_T^2 I), the law of
            `prior`. Steps are exact for N(0, data_std^2 I) data. Units of the data.
        log_prior: log p_T itself instead: (B, *dims) -> (B,).
        n_probes: for "corrected" and "hutchinson", >= 1.
        seed: key of the probes; None draws one from torch's default generator.
        generator: a `torch.Generator` in place of seed, which is drawn from it.
        first: global index of row 0: the probes of a row are the same in any batch.
        model_kwargs: conditions of the model, as `GridOptions` has them: the result is then
            log p(x | conditions).

    Returns:
        Shape (B,), natural logarithm, density in units data^-D; without a graph. Bits per
        dimension are -value / (D log 2), less log2 of the width of a grey level in data units.

    Raises:
        TypeError: an argument or a result of the model of the wrong kind.
        ValueError: an argument out of range; a model with active dropout; scores that do not fit x
            or are not finite; a score that is not differentiable in x where it has to be.

    References:
        Song et al. 2021, arXiv:2011.13456, Eq. 39 (with Hutchinson's trace).

    Example:
        >>> import torch
        >>> from hos_ext import VE, Scores
        >>> from hos_ext.diffusion import log_likelihood
        >>> def model(x, sigma):  # exact for data N(0, I)
        ...     c = 1 / (1 + sigma.unsqueeze(1) ** 2)
        ...     return Scores(-sigma.unsqueeze(1) * c * x, c.expand_as(x))
        >>> log_likelihood(model, torch.zeros(1, 2), VE(), n_steps=10)  # -log(2 pi) for N(0, I)
        tensor([-1.8380])
    """
    where = "log_likelihood"
    refuse_dropout(where, model)
    check_samples(where, "x", x)
    check_schedule(where, schedule)
    average = _SOLVERS[one_of(where, "solver", solver, _SOLVERS)]
    one_of(where, "trace", trace, _TRACES)
    std = check_number(where, "data_std", data_std, positive=False)
    n_probes = check_count(where, "n_probes", n_probes)
    first = check_first(where, first, x.shape)
    seed = check_seed(where, seed_from(where, seed, generator))[0]
    if log_prior is not None:
        check_callable(where, "log_prior", log_prior)
    grid = time_grid(where, schedule, n_steps, times)[::-1]
    low, high, size = grid[0], grid[-1], x.shape[1:].numel()
    levels = _log_ratio(schedule, torch.tensor(grid, dtype=torch.float64))
    if times is None:
        part = torch.linspace(0, 1, len(grid), dtype=torch.float64)
        levels = levels[0] + part * (levels[-1] - levels[0])
    middle = _times(schedule, (levels[:-1] + levels[1:]) / 2, grid)
    ends = [low, *_times(schedule, levels[1:-1], grid), high]
    steps = zip(levels.diff().tolist(), ends[:-1], middle, ends[1:], strict=True)
    scale_0, scale_t = (math.hypot(schedule.alpha(t) * std, schedule.sigma(t)) for t in (low, high))

    conditions = check_conditions(where, model_kwargs, len(x))
    run = Run(where, model, schedule, Key(0, 0, first), conditions)
    # A caller's inference mode would keep the traces from differentiating the score. Leaving it
    # turns gradients on, so no_grad comes second; the copy of x is no inference tensor.
    with torch.inference_mode(False), torch.no_grad():
        probes = _probes(x, n_probes, seed, first) if trace in ("corrected", "hutchinson") else None
        slope_at = partial(_slope, run, std, trace, probes)
        w = x.detach().clone() / scale_0
        value = w.new_full((len(w),), size * math.log(scale_t / scale_0))
        for h, start, half, end in steps:
            slope, rate = average(slope_at, w, h, start, half, end)
            w, value = w + h * slope, value + h * rate
            run.check_finite("x after a step", w, end)
        if log_prior is None:
            return value + _log_normal(w) - size * math.log(scale_t)
        log_end = log_prior(scale_t * w)
        check_tensor(where, "log_prior(x)", log_end, like=x, shape=(len(x),))
        return value + log_end


# Of a step of length h: the average slope of w and rate of log p, by their values at some points.
_SlopeAt: TypeAlias = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def _heun(
    slope_at: _SlopeAt, w: Tensor, h: float, start: float, half: float, end: float
) -> tuple[Tensor, Tensor]:
    slope, rate = slope_at(w, start)
    slope_2, rate_2 = slope_at(w + h * slope, end)
    return (slope + slope_2) / 2, (rate + rate_2) / 2


def _rk4(
    slope_at: _SlopeAt, w: Tensor, h: float, start: float, half: float, end: float
) -> tuple[Tensor, Tensor]:
    slope, rate = slope_at(w, start)
    slope_2, rate_2 = slope_at(w + h / 2 * slope, half)
    slope_3, rate_3 = slope_at(w + h / 2 * slope_2, half)
    slope_4, rate_4 = slope_at(w + h * slope_3, end)
    slope = (slope + 2 * slope_2 + 2 * slope_3 + slope_4) / 6
    return slope, (rate + 2 * rate_2 + 2 * rate_3 + rate_4) / 6


_SOLVERS = {"heun": _heun, "rk4": _rk4}


def _slope(
    run: Run, std: float, trace: str, probes: Tensor | None, w: Tensor, t: float
) -> tuple[Tensor, Tensor]:
    """dw / d log(sigma / alpha), and its divergence, (B,)."""
    alpha, sigma = run.schedule.alpha(t), run.schedule.sigma(t)
    scale, size = math.hypot(alpha * std, sigma), w.shape[1:].numel()
    x, noise, data = scale * w, sigma / scale, (alpha * std / scale) ** 2  # data = 1 - q
    if trace == "learned":
        scores = run.scores(x, t, "scaled_score", "c", "factor")
        kappa = _learned(run.where, scores, x)
        return -noise * (scores.scaled_score + noise * w), size * data - kappa.trace()
    fields = ("scaled_score", "c", "factor") if trace == "corrected" else ("scaled_score",)
    with torch.enable_grad():
        x.requires_grad_()
        scores = run.scores(x, t, *fields)
        scaled_score = scores.scaled_score
        total = torch.zeros_like(x.detach().flatten(1)[:, 0])
        count = size if probes is None else len(probes)
        for k in range(count):
            probe = _unit(x, k) if probes is None else probes[k]
            product = _pull_back(run.where, trace, scaled_score, x, probe, k + 1 < count)
            total = total + (product * probe).flatten(1).sum(1)
    mean = total if probes is None else total / count
    rate = -size * noise**2 - sigma * mean.detach()
    if trace == "corrected":
        assert probes is not None
        kappa = _learned(run.where, scores, x)
        columns = probes.flatten(2).movedim(0, -1)
        rate = rate - kappa.trace() + (columns * kappa.matvec(columns)).sum(1).mean(-1)
    return -noise * (scaled_score.detach() + noise * w), rate


def _learned(where: str, scores: Scores, x: Tensor) -> DPLR:
    """kappa as the model has learned it."""
    check_like(where, "c from model", scores.c, x)
    with said_by(where, "DPLR", factor="factor from model", sign="sign from model"):
        factor = None if scores.factor is None else scores.factor.detach()
        return DPLR(scores.c.detach().flatten(1), factor, scores.sign)


def _pull_back(
    where: str, trace: str, scaled_score: Tensor, x: Tensor, probe: Tensor, again: bool
) -> Tensor:
    """probe^T d scaled_score / d x."""
    product = None
    if scaled_score.requires_grad:
        products = torch.autograd.grad(
            scaled_score, x, probe, retain_graph=again, allow_unused=True
        )
        product = products[0]
    rule = f"scaled_score from model must be differentiable in x for trace={trace!r}"
    check(where, product is not None, rule, "one without a graph")
    assert product is not None
    return product


def _unit(x: Tensor, k: int) -> Tensor:
    """The k-th unit vector for every row, as x."""
    unit = torch.zeros_like(x, requires_grad=False).flatten(1)
    unit[:, k] = 1
    return unit.reshape(x.shape)


def _probes(x: Tensor, n_probes: int, seed: int | None, first: int) -> Tensor:
    """Vectors of +-1 at random, (n_probes, B, *dims)."""
    key = noise_key("log_likelihood", x.shape, seed, first=first)
    draws = [
        draw_uniform(key._replace(offset=k), STREAM_PROBE, x.shape, x) for k in range(n_probes)
    ]
    return torch.where(torch.stack(draws) < 0.5, -1.0, 1.0).to(x.dtype)


def _log_normal(w: Tensor) -> Tensor:
    """log N(w; 0, I), (B,)."""
    return -(w.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2


# ------------------------------------------------------------------------------------------- grid


def _log_ratio(schedule: Schedule, t: Tensor) -> Tensor:
    """log(sigma / alpha), which rises with t."""
    return (schedule.sigma(t) / schedule.alpha(t)).log()


def _times(schedule: Schedule, levels: Tensor, grid: list[float]) -> list[float]:
    """The times at which log(sigma / alpha) has these values, within the grid."""
    times: list[float] = schedule.t_of_ratio(levels.exp()).clamp(grid[0], grid[-1]).tolist()
    return times
