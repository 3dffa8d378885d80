"""New samples from noise: the prior, a reverse process, and what takes the last noise off."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import (
    WIDE,
    as_float,
    check,
    check_callable,
    check_count,
    check_int,
    check_number,
    check_tensor,
    dtype_of,
    is_number,
    one_of,
    said_by,
)
from ..conditions import Conditions, check_conditions, condition_rows
from ..random import seed_from
from ..schedules import Schedule, check_schedule
from ..scores import Model, model_scores
from .annealed import annealed_langevin
from .inputs import noise_key
from .reverse import (
    prior,
    probability_flow_ode,
    reverse_sde,
    second_order_reverse,
    tweedie_denoise,
)

# The sampler of each method, and its solver.
_METHODS: dict[str, tuple[Callable[..., Tensor], dict[str, str]]] = {
    "heun": (probability_flow_ode, {"solver": "heun"}),
    "euler": (probability_flow_ode, {"solver": "euler"}),
    "sde": (reverse_sde, {"solver": "heun"}),
    "second-order": (second_order_reverse, {}),
}
GENERATE_METHODS = tuple(_METHODS)
_LAST = ("mean", "sample", "none")


def generate(
    model: Model,
    shape: Sequence[int],
    schedule: Schedule,
    *,
    n_steps: int,
    method: str = "heun",
    last: str = "mean",
    settle: int = 0,
    data_mean: float | Tensor = 0.0,
    data_std: float = 1.0,
    seed: int | None = None,
    first: int = 0,
    chunk_size: int | None = None,
    model_kwargs: Conditions | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw new samples: from noise at t_max down the schedule to t_min, and then to the clean ones.

    The methods go from a time to the next by

        "heun"           the probability-flow ODE, order 2, two model calls a step
        "euler"          the same, order 1, one call
        "sde"            the reverse SDE by stochastic Heun steps, weak order 2, two calls
        "second-order"   ancestral steps with the model's covariance of x0, one call; they need
                         second-order scores (`second_order_reverse`)

    A schedule that ends at little noise, beside the data, starts in a law that is not Gaussian.
    `settle` steps of a chain with the model's own scores at t_max then bring the prior to it: Ozaki
    steps of h = sigma^2 where the model gives c, and Langevin steps of a tenth of that where not.

    Args:
        model: `model(x, sigma, **model_kwargs) -> Scores`, trained at every sigma(t) of the
            schedule; for one of plain noise and a schedule with alpha, `AlongSchedule`.
        shape: (B, *dims).
        schedule: a `Schedule`; stay within the noise levels that the model was trained on.
        n_steps: steps of the grid `schedule.times(n_steps)`.
        method: one of those above.
        last: what becomes of x at t_min: "mean", the mean of x0 given x (Tweedie); "sample", a draw
            of x0 given x from the model's posterior; "none", x itself, noise sigma(t_min) included.
        settle: steps of a chain at t_max, before the descent.
        data_mean: of the data, for the prior: a number, or shape dims. Units of the data.
        data_std: standard deviation of the data about it, for the prior. Units of the data.
        seed: key of all noise. None draws one from torch's default generator.
        generator: a `torch.Generator` in place of seed, which is drawn from it.
        first: global index of row 0. Rows have the noise of their index: any chunks, and any
            processes with the first of their rows, draw the same samples (to rounding, for networks
            whose rows depend on the batch).
        chunk_size: samples run this many at a time, which bounds the memory. None: all.
        model_kwargs: conditions, such as class labels. Each tensor has one row for each sample.
        dtype: float32 or float64. None: that of the model's parameters, or torch's default where
            the model has none of these.
        device: None: that of the model's parameters, or torch's default.

    Returns:
        Samples in units of the data, of `shape`.

    Raises:
        TypeError, ValueError: an argument out of range or of the wrong kind; scores that do not fit
            or are not finite, with the time and the sample.

    References:
        Song et al. 2021, arXiv:2011.13456, Eqs. 6 and 13.

    Example:
        Data N(0, I), whose scores are known.

        >>> from hos_ext import VE, Scores
        >>> from hos_ext.diffusion import generate
        >>> def model(x, sigma):
        ...     c = 1 / (1 + sigma.unsqueeze(1) ** 2)
        ...     return Scores(-sigma.unsqueeze(1) * c * x, c.expand_as(x))
        >>> x0 = generate(model, (1000, 2), VE(0.05, 5.0), n_steps=20, seed=0)
        >>> bool((x0.std(0) - 1).abs().max() < 0.1)
        True
    """
    where = "generate"
    check_callable(where, "model", model)
    check_schedule(where, schedule)
    descend, solver = _METHODS[one_of(where, "method", method, _METHODS)]
    one_of(where, "last", last, _LAST)
    n_steps = check_count(where, "n_steps", n_steps)
    settle = check_int(where, "settle", settle, 2**31)
    data_std = check_number(where, "data_std", data_std, positive=False)
    known = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if known is not None:
        device = known.device if device is None else device
        dtype = known.dtype if dtype is None and known.dtype in WIDE else dtype
    dtype = dtype_of(where, "dtype", dtype, WIDE)
    several = isinstance(shape, Sequence) and not isinstance(shape, str)
    check(where, several, "shape must be a sequence of sizes", lambda: repr(shape), TypeError)
    check(where, len(shape) >= 2, "shape must be (B, *dims)", lambda: tuple(shape))
    with said_by(where, "prior"):
        noise = prior((0, *shape[1:]), schedule, dtype=dtype, device=device)
    rows, dims = check_count(where, "shape[0]", shape[0], least=0, limit=2**63), noise.shape[1:]
    mean = _mean_like(where, data_mean, noise)
    key = noise_key(where, (rows,), seed_from(where, seed, generator), first=first)
    conditions = check_conditions(where, model_kwargs, rows, "shape")
    chunk = max(rows, 1)
    if chunk_size is not None:
        chunk = check_count(where, "chunk_size", chunk_size, limit=2**63)
    out = noise.new_empty((rows, *dims))
    for low in range(0, rows, chunk):
        part = slice(low, min(low + chunk, rows))
        place: dict[str, Any] = {"seed": key.seed, "first": first + low}
        given = {"model_kwargs": condition_rows(conditions, part)}
        x = prior(
            (part.stop - low, *dims),
            schedule,
            data_std=data_std,
            dtype=dtype,
            device=noise.device,
            **place,
        )
        x = x + schedule.alpha(schedule.t_max) * mean
        options = place if descend is not probability_flow_ode else {"first": place["first"]}
        with said_by(where, descend.__name__), torch.no_grad():
            x = _settled(model, x, schedule, settle, place, given)
            x = descend(model, x, schedule, n_steps=n_steps, **solver, **options, **given)
            out[part] = _cleaned(model, x, schedule, last, n_steps, place, given)
    return out


def _mean_like(where: str, mean: float | Tensor, x: Tensor) -> Tensor | float:
    """The mean of the data, a number or of the dims of x."""
    if not isinstance(mean, Tensor):
        good = is_number(mean) and math.isfinite(as_float(mean))
        check(where, good, "data_mean must be a finite number or a tensor", lambda: repr(mean))
        return as_float(mean)
    check_tensor(where, "data_mean", mean, like=x, shape=tuple(x.shape[1:]))
    check(where, bool(mean.isfinite().all()), "data_mean must be finite", "NaN or infinities")
    return mean


def _settled(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    place: dict[str, Any],
    given: dict[str, Any],
) -> Tensor:
    """x after steps of a chain that keeps the model's density at t_max."""
    if steps == 0 or len(x) == 0:
        return x
    sigma = schedule.sigma(schedule.t_max)
    one = condition_rows(given["model_kwargs"], slice(1))
    second = model_scores("generate", model, x[:1], x.new_full((1,), sigma), one).c is not None
    method, h = ("ozaki", 1.0) if second else ("langevin", 0.1)
    chains = annealed_langevin(
        model,
        x,
        [sigma],
        method=method,
        step_size=h,
        n_steps=steps,
        thin=steps,
        seed=place["seed"],
        first_chain=place["first"],
        **given,
    )
    return chains.draws[:, -1]


def _cleaned(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    last: str,
    n_steps: int,
    place: dict[str, Any],
    given: dict[str, Any],
) -> Tensor:
    """What becomes of x at t_min. A draw takes the noise of the step after the last one."""
    if last == "none" or len(x) == 0:
        return x
    if last == "sample":
        found = tweedie_denoise(model, x, schedule, schedule.t_min, **given)
        return found.sample(1, offset=n_steps, **place)[0]
    # The mean needs s1 alone, which is all that some models give.
    alpha, sigma = schedule.alpha(schedule.t_min), schedule.sigma(schedule.t_min)
    scores = model_scores("generate", model, x, x.new_full((len(x),), sigma), **given)
    check_tensor("generate", "scaled_score from model", scores.scaled_score, like=x)
    return (x + sigma * scores.scaled_score) / alpha
