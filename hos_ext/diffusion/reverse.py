"""Reverse-time samplers: from noise to data along a schedule (`schedules`), and one-step Tweedie.

The model is `model(x, sigma) -> Scores` in scaled quantities as everywhere, conditioned on sigma(t)
of the marginal alpha(t) x0 + sigma(t) z and called with a (rows,) tensor sigma, without gradients.
A sampler goes down a grid of times and returns x at the last one; `tweedie_denoise` there removes
the noise sigma(t_min) that is left. Noise depends on (seed, offset + step, first + row) alone, so
any chunks and processes draw the same. Scores that are not finite, or an x that is not after a
step, raise one error that names the time and the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..checks import check_count, check_first, check_int, check_number, check_samples, one_of
from ..linalg.dplr import DPLR
from ..random import STREAM_PRIOR, STREAM_REVERSE, fresh_seed
from ..sampling.chains import ADJUSTED, UNADJUSTED, Chains, ChainState, sample
from ..schedules import Schedule, check_schedule
from ..scores import Model, Scores, UnscaledScores, model_scores
from ..tweedie.posterior import Posterior, posterior

_COVARIANCES = ("low_rank", "diagonal", "none")


def prior(
    schedule: Schedule,
    shape: Sequence[int],
    *,
    data_std: float = 1.0,
    seed: int | None = None,
    first: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Where the samplers start: N(0, (alpha^2 data_std^2 + sigma^2) I) at t_max.

    That is the exact marginal of centred isotropic Gaussian data of standard deviation data_std,
    and close to that of other centred data of this scale where alpha data_std << sigma.

    Args:
        schedule: a `Schedule`.
        shape: (B, *dims).
        data_std: standard deviation of the data, >= 0. Units of the data.
        seed: key of the noise; None draws one from torch's default generator.
        first: global index of row 0.
        dtype: float32 or float64; torch's default.
        device: torch's default.

    Returns:
        Tensor of `shape`.

    Raises:
        TypeError, ValueError: an argument out of range or of the wrong kind.
    """
    check_schedule("prior", schedule)
    data_std = check_number("prior", "data_std", data_std, positive=False)
    alpha, sigma = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    noise = ops.normal(
        shape,
        seed=given_seed("prior", seed),
        first=first,
        stream=STREAM_PRIOR,
        dtype=dtype,
        device=device,
    )
    return noise * math.hypot(alpha * data_std, sigma)


def reverse_sde(
    model: Model,
    init: Tensor,
    schedule: Schedule,
    *,
    n_steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    method: str = "euler",
    seed: int | None = None,
    offset: int = 0,
    first: int = 0,
    chunk_size: int | None = None,
) -> Tensor:
    """Anderson's reverse SDE dx = [-(beta / 2) x - g^2 s1(x, t)] dt + g dw, dt < 0.

    "euler": Euler-Maruyama, weak order 1, one model call a step. "heun": the stochastic Heun step,
    drift and g averaged over both ends with the same noise, weak order 2, two calls a step.

    Args:
        model: `model(x, sigma) -> Scores`; only the score is used.
        init: x at the first time, such as a `prior`. Shape (B, *dims), float32 or float64. It is
            not changed.
        schedule: a `Schedule`.
        n_steps: steps of the grid `schedule.times(n_steps)`; or else `times`.
        times: a descending grid of at least two times within [t_min, t_max].
        method: "euler" or "heun".
        seed: key of the noise; None draws one from torch's default generator.
        offset: number of the first step. A run over times[:k + 1] and one over times[k:] with
            offset k more are one run.
        first: global index of row 0.
        chunk_size: samples run this many at a time, which bounds the model's memory. None: all.

    Returns:
        x at the last time, as init.

    Raises:
        TypeError: an argument or a result of the model of the wrong kind.
        ValueError: an argument out of range; scores that do not fit x or are not finite.

    Reference:
        Song et al. 2021, arXiv:2011.13456, Eq. 6 and 10.
    """
    where, steps = "reverse_sde", {"euler": _euler_sde, "heun": _heun_sde}
    step = steps[one_of(where, "method", method, steps)]
    return _run(where, model, init, schedule, step, n_steps, times, seed, offset, first, chunk_size)


def probability_flow_ode(
    model: Model,
    init: Tensor,
    schedule: Schedule,
    *,
    n_steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    method: str = "heun",
    first: int = 0,
    chunk_size: int | None = None,
) -> Tensor:
    """The ODE dx = [-(beta / 2) x - (g^2 / 2) s1(x, t)] dt with the marginals of the SDE.

    Deterministic. "euler": order 1, one model call a step; "heun": order 2, two calls a step.

    Args:
        model, init, schedule, n_steps, times, chunk_size: as `reverse_sde`.
        method: "euler" or "heun".
        first: global index of row 0, for the error messages alone.

    Returns:
        x at the last time, as init. A Gaussian N(m, S) is mapped, each eigendirection of S by
        itself, by standardising with the first marginal and undoing it with the last.

    Raises:
        TypeError, ValueError: as `reverse_sde`.

    Reference:
        Song et al. 2021, arXiv:2011.13456, Eq. 13.
    """
    where, steps = "probability_flow_ode", {"euler": _euler_ode, "heun": _heun_ode}
    step = steps[one_of(where, "method", method, steps)]
    return _run(where, model, init, schedule, step, n_steps, times, 0, 0, first, chunk_size)


def second_order_reverse(
    model: Model,
    init: Tensor,
    schedule: Schedule,
    *,
    n_steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    covariance: str = "low_rank",
    seed: int | None = None,
    offset: int = 0,
    first: int = 0,
    chunk_size: int | None = None,
) -> Tensor:
    """Ancestral steps with the posterior covariance of the model in the noise of the step.

    Given x0, x_s is Gaussian for s < t: with w = (sigma_s^2 / alpha_s^2) / (sigma_t^2 / alpha_t^2),

        x_s | x_t, x0 ~ N( w (alpha_s / alpha_t) x_t + alpha_s (1 - w) x0,  sigma_s^2 (1 - w) I ).

    With x0 | x_t ~ N(m, C), the model's `posterior` at t, x0 is integrated out:

        x_s | x_t ~ N( w (alpha_s / alpha_t) x_t + alpha_s (1 - w) m,
                       sigma_s^2 (1 - w) I + alpha_s^2 (1 - w)^2 C ).

    covariance="none" (C = 0) is the ancestral step of DDPM, which lacks the variance of x0. With
    the exact posterior a step has the exact mean and covariance given x_t; on Gaussian data the law
    is exact for every number of steps ("diagonal": if the covariance of the data is diagonal).

    Args:
        model, init, schedule, n_steps, times, seed, offset, first, chunk_size: as `reverse_sde`.
            The noise is that of `Posterior.sample` with the same seed and offset: a draw from the
            posterior at the end takes another seed, or the number of steps as its offset.
        covariance: "low_rank", the whole C; "diagonal", its diagonal; "none", for which the model's
            score is all that is used (its c may be None).

    Returns:
        x at the last time, as init.

    Raises:
        TypeError, ValueError: as `reverse_sde`; a posterior or step covariance with a negative
            variance, or c and factor that are not finite.
    """
    where = "second_order_reverse"
    step = _second_order(one_of(where, "covariance", covariance, _COVARIANCES))
    return _run(where, model, init, schedule, step, n_steps, times, seed, offset, first, chunk_size)


def predictor_corrector(
    model: Model,
    init: Tensor,
    schedule: Schedule,
    *,
    n_steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    predictor: str = "euler",
    corrector: str = "langevin",
    corrector_steps: int = 1,
    corrector_step_size: float = 0.1,
    covariance: str = "low_rank",
    seed: int | None = None,
    offset: int = 0,
    first: int = 0,
    chunk_size: int | None = None,
    **options: Any,
) -> Tensor:
    """A reverse step to each time, then steps of a Markov chain that keep its marginal.

    Args:
        model, init, schedule, n_steps, times, seed, offset, first, chunk_size: as `reverse_sde`.
        predictor: "euler" or "heun" of `reverse_sde`, or "second_order".
        corrector: a method of `sample`: "langevin", "ozaki", ... ("langevin" uses the model's score
            alone; "mala" does where its c is None).
        corrector_steps: steps at each time, >= 0. Step k of the run has the chain noise of
            (offset + k) corrector_steps onwards, none of it used twice.
        corrector_step_size: h of `sample` in units of sigma(t)^2, > 0.
        covariance: of the predictor "second_order".
        options: further arguments of `sample` for the corrector: curvature, tolerance,
            max_iterations.

    Returns:
        x at the last time, as init.

    Raises:
        TypeError, ValueError: as `reverse_sde`, `second_order_reverse` and `sample`.

    Reference:
        Song et al. 2021, arXiv:2011.13456, section 4.2; its step follows the norms of score and
        noise, here the step is a fixed part of sigma^2.
    """
    where = "predictor_corrector"
    second = _second_order(one_of(where, "covariance", covariance, _COVARIANCES))
    steps: dict[str, _Step] = {"euler": _euler_sde, "heun": _heun_sde, "second_order": second}
    predict = steps[one_of(where, "predictor", predictor, steps)]
    one_of(where, "corrector", corrector, (*UNADJUSTED, *ADJUSTED))
    check_int(where, "corrector_steps", corrector_steps, 2**31)
    relative = check_number(where, "corrector_step_size", corrector_step_size)
    _check_options(where, options)
    used = ("scaled_score",) if corrector == "langevin" else ("scaled_score", "c", "factor")

    def step(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
        x = predict(run, x, t, s, number)
        if corrector_steps == 0:
            return x
        sigma = run.schedule.sigma(s)
        state = ChainState(
            x=x,
            step=number * corrector_steps,
            since_draw=0,
            seed=run.seed,
            first_chain=run.first,
        )
        return sample(
            lambda y: _chain_scores(run.scores(y, s, *used), sigma, corrector),
            method=corrector,
            step_size=relative * sigma**2,
            n_steps=0,
            burn_in=corrector_steps,
            state=state,
            **options,
        ).state["x"]

    return _run(where, model, init, schedule, step, n_steps, times, seed, offset, first, chunk_size)


def annealed_langevin(
    model: Model,
    init: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    method: str = "langevin",
    step_size: float = 0.1,
    n_steps: int,
    thin: int = 1,
    seed: int | None = None,
    first_chain: int = 0,
    chunk_size: int | None = None,
    **options: Any,
) -> Chains:
    """Markov chains at falling noise levels, each level started where the last one ended.

    Args:
        model: `model(x, sigma) -> Scores`, at these sigmas. "langevin" uses the score alone, and
            so does "mala" where c is None.
        init: start of every chain. Shape (chain, *dims), float32 or float64. It is not changed.
        sigmas: descending noise levels, > 0. Units of the data.
        method: a method of `sample`.
        step_size: h of `sample` in units of sigma^2, > 0.
        n_steps: steps at each level.
        thin, seed, first_chain, chunk_size: as `sample`. The number of the step goes on from level
            to level: no noise is used twice.
        options: further arguments of `sample`: curvature, tolerance, max_iterations.

    Returns:
        Chains of the last level, whose target is the data with noise sigmas[-1]. In `stats`
        "seconds", "n_score_evaluations" and "divergences" are sums over all levels; the rest, such
        as "acceptance", is that of the last one. A chain that the scores make non-finite is counted
        there, as in `sample`.

    Raises:
        TypeError, ValueError: an argument out of range or of the wrong kind; what `sample` raises.

    Reference:
        Song and Ermon 2019, arXiv:1907.05600, Algorithm 1.
    """
    where = "annealed_langevin"
    check_samples(where, "init", init)
    levels = _descending(where, "sigmas", sigmas, 1)
    if not levels[-1] > 0:
        raise ValueError(f"{where}: sigmas must be positive, got {levels[-1]}")
    relative = check_number(where, "step_size", step_size)
    one_of(where, "method", method, (*UNADJUSTED, *ADJUSTED))
    check_int(where, "n_steps", n_steps, 2**31)
    _check_options(where, options)
    check_int(where, "first_chain", first_chain, 2**63)
    check_first(where, first_chain, init.shape)
    state = ChainState(
        x=init, step=0, since_draw=0, seed=given_seed(where, seed), first_chain=first_chain
    )
    sums: dict[str, Any] = {"seconds": 0.0, "n_score_evaluations": 0, "divergences": 0}
    for sigma in levels:

        def scores(x: Tensor, sigma: float = sigma) -> Tensor | UnscaledScores:
            level = x.new_full((len(x),), sigma)
            return _chain_scores(model_scores(where, model, x, level), sigma, method)

        last = sigma == levels[-1]
        chains = sample(
            scores,
            method=method,
            step_size=relative * sigma**2,
            n_steps=n_steps if last else 0,
            burn_in=0 if last else n_steps,
            thin=thin,
            chunk_size=chunk_size,
            state=state,
            **options,
        )
        state = chains.state
        sums = {name: total + chains.stats[name] for name, total in sums.items()}
    return Chains(chains.draws, {**chains.stats, **sums}, state)


def tweedie_denoise(model: Model, x: Tensor, schedule: Schedule, t: float | Tensor) -> Posterior:
    """The clean sample from x at time t in one step: posterior mean and covariance.

    The mean is an average over all x0 that may have led to x, not a draw: at a high noise level it
    lies between the modes of the data. Draws come from the reverse samplers.

    Args:
        model: `model(x, sigma) -> Scores`.
        x: noisy samples. Shape (B, *dims), float32 or float64.
        schedule: a `Schedule`.
        t: their time, a float or (B,) within [t_min, t_max].

    Returns:
        `Posterior`. Differentiable in x and the model's parameters.

    Raises:
        TypeError, ValueError: an argument or a result of the model of the wrong kind, or t out of
            range.
    """
    where = "tweedie_denoise"
    check_samples(where, "x", x)
    check_schedule(where, schedule)
    level = torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t
    if level.shape not in ((), x.shape[:1]):
        raise ValueError(
            f"{where}: t must be a float or have shape ({len(x)},), got {tuple(level.shape)}"
        )
    sigma = schedule.sigma(level).to(x).expand(len(x))
    alpha = schedule.alpha(level).to(x).expand(len(x))
    return posterior(x, model_scores(where, model, x, sigma), sigma, alpha)


# ------------------------------------------------------------------------------------------ steps


class Run(NamedTuple):
    """What stays the same over the steps of one chunk."""

    where: str
    model: Model
    schedule: Schedule
    seed: int
    first: int

    def scores(self, x: Tensor, t: float, *used: str) -> Scores:
        """The model's scores at time t, those named finite."""
        sigma = x.new_full((len(x),), self.schedule.sigma(t))
        scores = model_scores(self.where, self.model, x, sigma)
        for name in used:
            self.refuse_non_finite(f"{name} from model", getattr(scores, name), t)
        return scores

    def refuse_non_finite(self, name: str, value: Tensor | None, t: float) -> None:
        if value is not None and not bool(value.isfinite().all()):
            bad = ~value.isfinite()
            place = self.place(bad.flatten(1).any(1), t)
            raise ValueError(
                f"{self.where}: {name} must be finite, got {value[bad][0].item()} at {place}"
            )

    def refuse_negative(self, name: str, value: Tensor, t: float) -> None:
        bad = value < 0
        if bool(bad.any()):
            raise ValueError(
                f"{self.where}: {name} must be at least 0, got {value[bad][0].item():g} at "
                f"{self.place(bad.any(1), t)}"
            )

    def place(self, bad: Tensor, t: float) -> str:
        """The time and the first of the bad samples."""
        return f"t = {t:g} for sample {self.first + int(bad.nonzero()[0])}"

    def noise(self, x: Tensor, number: int) -> Tensor:
        return ops.normal(
            x.shape,
            seed=self.seed,
            offset=number,
            first=self.first,
            stream=STREAM_REVERSE,
            dtype=x.dtype,
            device=x.device,
        )


_Step: TypeAlias = Callable[[Run, Tensor, float, float, int], Tensor]


def _velocity(run: Run, x: Tensor, t: float, part: float) -> Tensor:
    """-(beta / 2) x - part g^2 s1: part 1 for the SDE, 1/2 for the ODE."""
    sigma, g = run.schedule.sigma(t), run.schedule.diffusion(t)
    score = run.scores(x, t, "scaled_score").scaled_score  # sigma s1
    return -run.schedule.beta(t) / 2 * x - part * g**2 / sigma * score


def _euler_ode(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
    return x + (s - t) * _velocity(run, x, t, 0.5)


def _heun_ode(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
    slope = _velocity(run, x, t, 0.5)
    end = x + (s - t) * slope
    return x + (s - t) / 2 * (slope + _velocity(run, end, s, 0.5))


def _euler_sde(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
    g = run.schedule.diffusion(t)
    return x + (s - t) * _velocity(run, x, t, 1.0) + g * math.sqrt(t - s) * run.noise(x, number)


def _heun_sde(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
    g, g_end = run.schedule.diffusion(t), run.schedule.diffusion(s)
    shock = math.sqrt(t - s) * run.noise(x, number)
    slope = _velocity(run, x, t, 1.0)
    end = x + (s - t) * slope + g * shock
    return x + (s - t) / 2 * (slope + _velocity(run, end, s, 1.0)) + (g + g_end) / 2 * shock


def _second_order(covariance: str) -> _Step:
    """The step of `second_order_reverse`."""

    def step(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
        alpha_t, sigma_t = run.schedule.alpha(t), run.schedule.sigma(t)
        alpha_s, sigma_s = run.schedule.alpha(s), run.schedule.sigma(s)
        kept = (sigma_s / alpha_s * (alpha_t / sigma_t)) ** 2  # w
        if covariance == "none":
            clean = (x + sigma_t * run.scores(x, t, "scaled_score").scaled_score) / alpha_t
            spread = DPLR(torch.zeros_like(x).flatten(1))
        else:
            scores = run.scores(x, t, "scaled_score", "c", "factor")
            clean, spread = posterior(x, scores, sigma_t, alpha_t)
            run.refuse_negative("posterior variance", spread.diagonal(), t)
            if covariance == "diagonal":
                spread = DPLR(spread.diagonal())
        mean = kept * alpha_s / alpha_t * x + alpha_s * (1 - kept) * clean
        variance = sigma_s**2 * (1 - kept)
        law = spread.scale((alpha_s * (1 - kept)) ** 2) + variance
        # c may be negative where the factor makes up for it, but a draw needs its root.
        run.refuse_negative("diagonal part of the step's covariance", law.diag, t)
        if law.sign is not None:
            indefinite = ~law.is_positive_definite()
            if bool(indefinite.any()):
                raise ValueError(
                    f"{run.where}: the step's covariance must be positive definite, got one that "
                    f"is not at {run.place(indefinite, t)}"
                )
        draw = law.sample(1, seed=run.seed, offset=number, first=run.first)[0]
        return mean + draw.reshape(x.shape)

    return step


def _run(
    where: str,
    model: Model,
    init: Tensor,
    schedule: Schedule,
    step: _Step,
    n_steps: int | None,
    times: Sequence[float] | Tensor | None,
    seed: int | None,
    offset: int,
    first: int,
    chunk_size: int | None,
) -> Tensor:
    """Take init down the grid, chunk by chunk."""
    check_samples(where, "init", init)
    check_schedule(where, schedule)
    grid = time_grid(where, schedule, n_steps, times)
    check_int(where, "offset", offset, 2**56)
    check_first(where, first, init.shape)
    seed = given_seed(where, seed)
    chunk = max(len(init), 1)
    if chunk_size is not None:
        check_count(where, "chunk_size", chunk_size, limit=2**63)
        chunk = chunk_size
    out = torch.empty_like(init, memory_format=torch.contiguous_format, requires_grad=False)
    with torch.no_grad():
        for low in range(0, len(init), chunk):
            run = Run(where, model, schedule, seed, first + low)
            x = init[low : low + chunk].detach()
            for number, (t, s) in enumerate(pairwise(grid), offset):
                x = step(run, x, t, s, number)
                run.refuse_non_finite("x after a step", x, s)
            out[low : low + chunk] = x
    return out


def _chain_scores(scores: Scores, sigma: float, method: str) -> Tensor | UnscaledScores:
    """What `sample` needs at a noise level: s1 alone for Langevin steps, and where there is no c
    for MALA, whose acceptance is nearer to the truth with s2."""
    if method == "langevin" or (method == "mala" and scores.c is None):
        return scores.scaled_score / sigma
    return scores.unscaled(sigma)


# ----------------------------------------------------------------------------------------- checks


def time_grid(
    where: str, schedule: Schedule, n_steps: int | None, times: Sequence[float] | Tensor | None
) -> list[float]:
    if n_steps is not None and times is None:
        check_count(where, "n_steps", n_steps)
        numbers: list[float] = schedule.times(n_steps).tolist()
        return numbers
    if n_steps is not None or times is None:
        both = "neither" if times is None else "both"
        raise ValueError(f"{where}: exactly one of n_steps and times must be given, got {both}")
    grid = _descending(where, "times", times, 2)
    low, high = schedule.t_min, schedule.t_max
    for t in (grid[0], grid[-1]):
        if not low <= t <= high:
            raise ValueError(f"{where}: times must be in [{low:g}, {high:g}], got {t:g}")
    return grid


def _descending(where: str, name: str, values: Sequence[float] | Tensor, least: int) -> list[float]:
    """At least so many numbers, each below the one before."""
    try:
        column = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        kind = type(values).__name__
        raise TypeError(f"{where}: {name} must be a sequence of numbers, got {kind}") from None
    if column.dim() != 1 or len(column) < least:
        raise ValueError(
            f"{where}: {name} must have shape (N,), N >= {least}, got {tuple(column.shape)}"
        )
    numbers: list[float] = column.tolist()
    if not math.isfinite(numbers[0]) or not all(a > b for a, b in pairwise(numbers)):
        raise ValueError(f"{where}: {name} must be finite and descending, got {numbers}")
    return numbers


def _check_options(where: str, options: Mapping[str, Any]) -> None:
    """Those arguments of `sample` that a sampler does not set itself."""
    known = ("curvature", "tolerance", "max_iterations")
    for name in options:
        if name not in known:
            raise TypeError(f"{where}: options must be among {', '.join(known)}, got {name!r}")


def given_seed(where: str, seed: int | None) -> int:
    if seed is None:
        return fresh_seed()
    check_int(where, "seed", seed, 2**64)
    return seed
