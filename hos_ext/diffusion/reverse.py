"""Reverse-time samplers: from noise to data along a schedule (`schedules`), and one-step Tweedie.

The model is `model(x, sigma) -> Scores` in scaled quantities as everywhere. It is conditioned on
sigma(t) of the marginal alpha(t) x0 + sigma(t) z, and called with a (rows,) tensor sigma, without
gradients. A sampler goes down a grid of times and returns x at the last one; `tweedie_denoise`
there removes the noise sigma(t_min) that is left. Noise depends on (seed, offset + step, first +
row) alone, so any chunks and processes draw the same. Scores that are not finite, or an x that is
not after a step, raise one error that names the time and the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..checks import (
    check,
    check_count,
    check_int,
    check_number,
    check_samples,
    is_number,
    kind_name,
    one_of,
    said_by,
)
from ..conditions import Conditions, check_conditions, condition_rows
from ..random import STREAM_PRIOR, seed_from
from ..sampling.methods import Method, StepOptions, make_step
from ..schedules import Schedule, check_schedule
from ..scores import Model, model_scores
from ..tweedie.posterior import Posterior, posterior
from .inputs import (
    CorrectorOptions,
    GridOptions,
    ReverseOptions,
    check_options,
    noise_key,
    option_names,
    time_grid,
)
from .steps import (
    Run,
    Step,
    corrected,
    euler_ode,
    euler_sde,
    heun_ode,
    heun_sde,
    second_order,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SDE_STEPS: dict[str, Step] = {"euler": euler_sde, "heun": heun_sde}
_ODE_STEPS: dict[str, Step] = {"euler": euler_ode, "heun": heun_ode}
_COVARIANCE_FORMS = ("low_rank", "diagonal", "none")


def prior(
    shape: Sequence[int],
    schedule: Schedule,
    *,
    data_std: float = 1.0,
    seed: int | None = None,
    first: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Where the samplers start: N(0, (alpha^2 data_std^2 + sigma^2) I) at t_max.

    That is the exact marginal of centred isotropic Gaussian data of standard deviation data_std,
    and close to that of other centred data of this scale where alpha data_std << sigma.

    Args:
        shape: (B, *dims).
        schedule: a `Schedule`.
        data_std: standard deviation of the data, >= 0. Units of the data.
        seed: key of the noise; None draws one from torch's default generator.
        first: global index of row 0.
        dtype: float32 or float64; torch's default.
        device: torch's default.
        generator: a `torch.Generator` in place of seed, which is drawn from it.

    Returns:
        Tensor of `shape`.

    Raises:
        TypeError, ValueError: an argument out of range or of the wrong kind.

    Example:
        >>> from hos_ext import VE
        >>> from hos_ext.diffusion import prior
        >>> prior((1000, 2), VE(sigma_max=20.0), seed=0).std().round().item()
        20.0
    """
    check_schedule("prior", schedule)
    data_std = check_number("prior", "data_std", data_std, positive=False)
    alpha, sigma = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    key = noise_key("prior", (), seed_from("prior", seed, generator))
    place: dict[str, Any] = {"dtype": dtype, "device": device}
    with said_by("prior", "normal"):
        noise = ops.normal(shape, seed=key.seed, first=first, stream=STREAM_PRIOR, **place)
    return noise * math.hypot(alpha * data_std, sigma)


def reverse_sde(
    model: Model,
    init: Tensor,
    schedule: Schedule,
    *,
    solver: str = "euler",
    **options: Unpack[ReverseOptions],
) -> Tensor:
    """Anderson's reverse SDE dx = [-(beta / 2) x - g^2 s1(x, t)] dt + g dw, dt < 0.

    "euler": Euler-Maruyama, weak order 1, one model call a step. "heun": the stochastic Heun step,
    drift and g averaged over both ends with the same noise, weak order 2, two calls a step.

    Args:
        model: `model(x, sigma) -> Scores`; only the score is used.
        init: x at the first time, such as a `prior`. Shape (B, *dims), float32 or float64. It is
            not changed.
        schedule: a `Schedule`.
        solver: "euler" or "heun".
        options: the grid of times, the noise and the chunks, see `ReverseOptions`. One of n_steps
            and times must be given.

    Returns:
        x at the last time, as init.

    Raises:
        TypeError: an argument or a result of the model of the wrong kind.
        ValueError: an argument out of range; scores that do not fit x or are not finite.

    References:
        Song et al. 2021, arXiv:2011.13456, Eq. 6 and 10.

    Example:
        Data N(0, I), whose scores under `VP` are known.

        >>> import torch
        >>> from hos_ext import VP, Scores
        >>> from hos_ext.diffusion import prior, reverse_sde
        >>> def model(x, sigma):
        ...     level = sigma.unsqueeze(1)
        ...     return Scores(-level * x, (1 - level**2).expand_as(x))
        >>> start = prior((1000, 2), VP(), seed=0)
        >>> x = reverse_sde(model, start, VP(), n_steps=50, seed=0)
        >>> bool((x.std(0) - 1).abs().max() < 0.1)
        True
    """
    where = "reverse_sde"
    step = _SDE_STEPS[one_of(where, "solver", solver, _SDE_STEPS)]
    check_options(where, options, ReverseOptions)
    return _descend(where, step, model, init, schedule, **options)


def probability_flow_ode(
    model: Model,
    init: Tensor,
    schedule: Schedule,
    *,
    solver: str = "heun",
    **options: Unpack[GridOptions],
) -> Tensor:
    """The ODE dx = [-(beta / 2) x - (g^2 / 2) s1(x, t)] dt with the marginals of the SDE.

    Deterministic. "euler": order 1, one model call a step; "heun": order 2, two calls a step.

    Args:
        model, init, schedule: as `reverse_sde`.
        solver: "euler" or "heun".
        options: the grid of times and the chunks, see `GridOptions`. `first` is for the error
            messages alone.

    Returns:
        x at the last time, as init. A Gaussian N(m, S) is mapped, each eigendirection of S by
        itself, by standardising with the first marginal and undoing it with the last.

    Raises:
        TypeError, ValueError: as `reverse_sde`.

    References:
        Song et al. 2021, arXiv:2011.13456, Eq. 13.

    Example:
        Data N(0, I), whose scores under `VP` are known.

        >>> import torch
        >>> from hos_ext import VP, Scores
        >>> from hos_ext.diffusion import prior, probability_flow_ode
        >>> def model(x, sigma):
        ...     level = sigma.unsqueeze(1)
        ...     return Scores(-level * x, (1 - level**2).expand_as(x))
        >>> start = prior((1000, 2), VP(), seed=0)
        >>> x = probability_flow_ode(model, start, VP(), n_steps=10)
        >>> torch.allclose(x, start)  # the marginals are all N(0, I)
        True
    """
    where = "probability_flow_ode"
    step = _ODE_STEPS[one_of(where, "solver", solver, _ODE_STEPS)]
    check_options(where, options, GridOptions)
    return _descend(where, step, model, init, schedule, seed=0, **options)


def second_order_reverse(
    model: Model,
    init: Tensor,
    schedule: Schedule,
    *,
    covariance_form: str = "low_rank",
    **options: Unpack[ReverseOptions],
) -> Tensor:
    """Ancestral steps with the posterior covariance of the model in the noise of the step.

    Given x0, x_s is Gaussian for s < t: with w = (sigma_s^2 / alpha_s^2) / (sigma_t^2 / alpha_t^2),

        x_s | x_t, x0 ~ N( w (alpha_s / alpha_t) x_t + alpha_s (1 - w) x0,  sigma_s^2 (1 - w) I ).

    With x0 | x_t ~ N(m, C), the model's `posterior` at t, x0 is integrated out:

        x_s | x_t ~ N( w (alpha_s / alpha_t) x_t + alpha_s (1 - w) m,
                       sigma_s^2 (1 - w) I + alpha_s^2 (1 - w)^2 C ).

    covariance_form="none" (C = 0) is the ancestral step of DDPM, which lacks the variance of x0.
    With the exact posterior a step has the exact mean and covariance given x_t. On Gaussian data
    the law is exact for every number of steps ("diagonal": if the data's covariance is diagonal).

    Args:
        model, init, schedule: as `reverse_sde`.
        covariance_form: "low_rank", the whole C; "diagonal", its diagonal; "none", for which the
            model's score is all that is used (its c may be None).
        options: see `ReverseOptions`. The noise is that of `Posterior.sample` with the same seed
            and offset: a draw from the posterior at the end takes another seed, or the number of
            steps as its offset.

    Returns:
        x at the last time, as init.

    Raises:
        TypeError, ValueError: as `reverse_sde`; a posterior or step covariance with a negative
            variance, or c and factor that are not finite.

    Example:
        Data N(0, I), whose scores under `VP` are known.

        >>> import torch
        >>> from hos_ext import VP, Scores
        >>> from hos_ext.diffusion import prior, second_order_reverse
        >>> def model(x, sigma):
        ...     level = sigma.unsqueeze(1)
        ...     return Scores(-level * x, (1 - level**2).expand_as(x))
        >>> start = prior((1000, 2), VP(), seed=0)
        >>> x = second_order_reverse(model, start, VP(), n_steps=2, seed=0)
        >>> bool((x.std(0) - 1).abs().max() < 0.1)  # two steps are enough here
        True
    """
    where = "second_order_reverse"
    step = second_order(one_of(where, "covariance_form", covariance_form, _COVARIANCE_FORMS))
    check_options(where, options, ReverseOptions)
    return _descend(where, step, model, init, schedule, **options)


def predictor_corrector(
    model: Model,
    init: Tensor,
    schedule: Schedule,
    *,
    predictor: str = "euler",
    corrector: Method = "langevin",
    corrector_steps: int = 1,
    corrector_step_size: float = 0.1,
    covariance_form: str = "low_rank",
    **options: Unpack[CorrectorOptions],
) -> Tensor:
    """A reverse step to each time, then steps of a Markov chain that keep its marginal.

    Args:
        model, init, schedule: as `reverse_sde`.
        predictor: "euler" or "heun" of `reverse_sde`, or "second_order".
        corrector: a method of `sample`: "langevin", "ozaki", ... ("langevin" uses the model's score
            alone; "mala" does where its c is None).
        corrector_steps: steps at each time, >= 0. Step k of the run has the chain noise of
            (offset + k) corrector_steps onwards, none of it used twice.
        corrector_step_size: h of `sample` in units of sigma(t)^2, > 0.
        covariance_form: of the predictor "second_order".
        options: see `ReverseOptions`, and for the corrector `StepOptions`: curvature, tolerance,
            max_iterations, rule.

    Returns:
        x at the last time, as init.

    Raises:
        TypeError, ValueError: as `reverse_sde`, `second_order_reverse` and `sample`.

    References:
        Song et al. 2021, arXiv:2011.13456, section 4.2; its step follows the norms of score and
        noise, here the step is a fixed part of sigma^2.

    Example:
        Data N(0, I), whose scores under `VP` are known.

        >>> import torch
        >>> from hos_ext import VP, Scores
        >>> from hos_ext.diffusion import prior, predictor_corrector
        >>> def model(x, sigma):
        ...     level = sigma.unsqueeze(1)
        ...     return Scores(-level * x, (1 - level**2).expand_as(x))
        >>> start = prior((1000, 2), VP(), seed=0)
        >>> x = predictor_corrector(model, start, VP(), n_steps=20, seed=0)
        >>> bool((x.std(0) - 1).abs().max() < 0.1)
        True
    """
    where = "predictor_corrector"
    second = second_order(one_of(where, "covariance_form", covariance_form, _COVARIANCE_FORMS))
    steps = {**_SDE_STEPS, "second_order": second}
    predict = steps[one_of(where, "predictor", predictor, steps)]
    settings: dict[str, Any] = dict(options)
    shared = {name: settings.pop(name) for name in options if name in option_names(ReverseOptions)}
    check_options(where, settings, StepOptions)
    with said_by(where, "sample"):
        chain_step = make_step(corrector, where=where, argument="corrector", **settings)
    corrector_steps = check_int(where, "corrector_steps", corrector_steps, 2**31)
    step_size = check_number(where, "corrector_step_size", corrector_step_size)
    step = corrected(predict, chain_step, corrector_steps, step_size)
    return _descend(where, step, model, init, schedule, **shared)


def tweedie_denoise(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    t: float | Tensor,
    *,
    model_kwargs: Conditions | None = None,
) -> Posterior:
    """The clean sample from x at time t in one step: posterior mean and covariance.

    The mean is an average over all x0 that may have led to x, not a draw: at a high noise level it
    lies between the modes of the data. Draws come from the reverse samplers.

    Args:
        model: `model(x, sigma) -> Scores`.
        x: noisy samples. Shape (B, *dims), float32 or float64.
        schedule: a `Schedule`.
        t: their time, a float or (B,) within [t_min, t_max].
        model_kwargs: conditions of the model, as `GridOptions` has them.

    Returns:
        `Posterior`. Differentiable in x and the model's parameters.

    Raises:
        TypeError, ValueError: an argument or a result of the model of the wrong kind, or t out of
            range.

    Example:
        >>> import torch
        >>> from hos_ext import VP, Scores
        >>> from hos_ext.diffusion import tweedie_denoise
        >>> def model(x, sigma):  # exact for data N(0, I)
        ...     level = sigma.unsqueeze(1)
        ...     return Scores(-level * x, (1 - level**2).expand_as(x))
        >>> clean = tweedie_denoise(model, torch.ones(1, 2), VP(), t=0.1)
        >>> alpha = VP().alpha(0.1)
        >>> torch.allclose(clean.mean, torch.tensor(alpha))
        True
    """
    where = "tweedie_denoise"
    check_samples(where, "x", x)
    check(where, not x.is_meta, "x must hold values", "a meta tensor")
    check_schedule(where, schedule)
    level = t if isinstance(t, Tensor) else torch.tensor(0.0, dtype=torch.float64)
    if not isinstance(t, Tensor):
        check(where, is_number(t), "t must be a float or a Tensor", kind_name(t), TypeError)
        level = level + t
    fits = level.shape in ((), x.shape[:1])
    check(where, fits, f"t must be a float or have shape ({len(x)},)", tuple(level.shape))
    sigma = schedule.sigma(level).to(x).expand(len(x))
    alpha = schedule.alpha(level).to(x).expand(len(x))
    conditions = check_conditions(where, model_kwargs, len(x))
    scores = model_scores(where, model, x, sigma, conditions)
    with said_by(where, "posterior", factor="factor from model", sign="sign from model"):
        return posterior(x, scores, sigma, alpha)


def _descend(
    where: str,
    step: Step,
    model: Model,
    init: Tensor,
    schedule: Schedule,
    *,
    n_steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    offset: int = 0,
    first: int = 0,
    chunk_size: int | None = None,
    model_kwargs: Conditions | None = None,
) -> Tensor:
    """What all samplers share: their checks, and the way down the grid, chunk by chunk.

    Args:
        where: the public function, for messages.
        step: from one time of the grid to the next.
        model, init, schedule: as `reverse_sde`.
        n_steps, times, seed, generator, offset, first, chunk_size, model_kwargs: see
            `ReverseOptions`.
    """
    check_samples(where, "init", init)
    check_schedule(where, schedule)
    grid = time_grid(where, schedule, n_steps, times)
    key = noise_key(where, init.shape, seed_from(where, seed, generator), offset, first)
    conditions = check_conditions(where, model_kwargs, len(init), "init")
    chunk = max(len(init), 1)
    if chunk_size is not None:
        chunk_size = check_count(where, "chunk_size", chunk_size, limit=2**63)
        chunk = chunk_size
    out = torch.empty_like(init, memory_format=torch.contiguous_format, requires_grad=False)
    with torch.no_grad():
        for low in range(0, len(init), chunk):
            rows = slice(low, low + chunk)
            own = key._replace(first=first + low)
            run = Run(where, model, schedule, own, condition_rows(conditions, rows))
            x = init[rows].detach()
            for number, (t, s) in enumerate(pairwise(grid), offset):
                x = step(run, x, t, s, number)
                run.check_finite("x after a step", x, s)
            out[rows] = x
    return out
