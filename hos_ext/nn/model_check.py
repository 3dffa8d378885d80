"""Whether a network denoises at all and, where it does not, how it may have been misread.

The right network gives E[z | x], the best guess there is. So its error is below 1, that
of no guess, and below that of any linear one. A network that was read wrongly (another prediction,
sign or unit of time) does worse, and better once it is read as it should be: each way is tried.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check, check_callable, check_like, check_samples, positive, show
from ..conditions import Conditions, check_conditions, condition_rows, repeat_conditions
from ..ops.noise import draw_normal
from ..random import STREAM_CHECK, Key, seed_from
from ..schedules import EDM, DiscreteVP, Schedule, check_schedule
from ..scores import Scores
from .head import SecondOrderHead
from .predictions import PREDICTIONS, Place, Reading, place_of

_WHERE = "check_model"
_ENTRIES, _LEAST, _MOST = 4096, 4, 512  # numbers to average over, and samples for them
_BETTER = 0.8  # another reading is named if its error is below this part of the given one's
_EACH_CHANGE = 1.1  # of two readings that do alike the simpler one is named

Output = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


class ModelCheck(NamedTuple):
    """How well a network denoises in one step, at two noise levels.

    Attributes:
        sigmas: the noise levels. Data units.
        errors: mean |z - E[z | x]|^2 of the network over that of z: 0 is perfect, 1 is no guess.
        linear: that of the best linear guess on the same samples, the input shrunk; None without
            samples.
        remark: what looks wrong and what it may be; None where nothing does.

    Example:
        >>> import hos_ext, torch
        >>> from hos_ext.nn import check_model
        >>> score = hos_ext.ModelScore(lambda x, sigma: 0 * x, hos_ext.EDM(), "eps")
        >>> found = check_model(score, torch.randn(512, 2, generator=torch.manual_seed(0)))
        >>> found.errors, found.fine
        ((1.0, 1.0), False)
    """

    sigmas: tuple[float, ...]
    errors: tuple[float, ...]
    linear: tuple[float, ...] | None
    remark: str | None

    @property
    def fine(self) -> bool:
        """Whether nothing looks wrong."""
        return self.remark is None

    def __str__(self) -> str:
        """A line for each level, and the remark."""
        lines = []
        for i, (sigma, error) in enumerate(zip(self.sigmas, self.errors, strict=True)):
            beside = "" if self.linear is None else f", {self.linear[i]:.3g} by shrinking"
            lines.append(f"sigma {sigma:.3g}: error {error:.3g} of the noise's{beside}")
        return "\n".join([*lines, "fine" if self.remark is None else self.remark])


@torch.no_grad()
def check_model(
    model: Callable[..., Tensor | Scores],
    data: Tensor | tuple[int, ...],
    *,
    sigmas: tuple[float, float] | None = None,
    schedule: Schedule | None = None,
    model_kwargs: Conditions | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> ModelCheck:
    """Whether a network denoises, from one step at two noise levels, and else what is wrong.

    Samples tell the most. A shape alone is looked at on pure noise, at levels at which every
    sample is lost in it. The other readings of the network that are tried are its predictions,
    its sign, its unit of time, the scale of its input and, last, of the data. That takes about 10
    calls of a network that is fine, and 30 of one that is not.

    Args:
        model: `ModelScore`, `DiffusersScore`, `SecondOrderHead`, `MLP`, `UNet`; or any function
            that is held to be one, as `model(x, sigma, **model_kwargs)` -> sigma * s1, or `Scores`.
        data: clean samples, of which the first few hundred are used at most (fewer the larger they
            are); or the shape of a batch, (B, *dims). Data units.
        sigmas: two noise levels. None: half and twice the standard deviation of the data; for a
            shape 10 and 30; as near to it as the model goes. Data units.
        schedule: of a function that may be a network given by mistake: that of its training.
        model_kwargs: conditions of the model, each tensor with a row for each sample.
        seed: of the noise.
        generator: a `torch.Generator` in place of seed, which is drawn from it.

    Returns:
        `ModelCheck`, whose remark is None where nothing looks wrong.

    Raises:
        TypeError, ValueError: an argument that does not fit; what the model raises.

    Example:
        >>> import hos_ext, torch
        >>> from hos_ext.nn import check_model
        >>> def net(x, sigma):  # the noise in x, given as if it were a score
        ...     return sigma.unsqueeze(-1) * x / (1 + sigma.unsqueeze(-1) ** 2)
        >>> remark = check_model(net, torch.randn(512, 2, generator=torch.manual_seed(0))).remark
        >>> for part in remark.split(": "):
        ...     print(part)
        predicts worse than zero at sigma 2.05 (error 3.43 of the noise's)
        is this prediction='eps'?
    """
    check_callable(_WHERE, "model", model)
    seed = seed_from(_WHERE, seed, generator, 0)
    x0 = _samples(model, data)
    conditions = check_conditions(_WHERE, model_kwargs, len(x0), "data")
    if isinstance(data, Tensor):
        count = min(len(x0), max(_LEAST, min(_MOST, math.ceil(_ENTRIES / x0[0].numel()))))
        x0, conditions = x0[:count], condition_rows(conditions, slice(count))
    net, reading = _as_read(model, schedule)
    spread = float(x0.double().var(correction=0)) if isinstance(data, Tensor) else 0.0
    levels = _levels(model, reading, sigmas, math.sqrt(spread))
    modules = [m for m in _modules(model) if m.training]
    try:
        for module in modules:
            module.training = False
        trial = _Trial(net, x0, levels, conditions, seed)
        return _judged(trial, reading, spread)
    finally:
        for module in modules:
            module.training = True


# ------------------------------------------------------------------------------------ the question


class _Trial:
    """The errors of one network on the same noise, for every way of reading it."""

    def __init__(
        self, net: Output, x0: Tensor, levels: Tensor, conditions: dict[str, Any], seed: int
    ) -> None:
        self.net, self.x0, self.levels, self.conditions = net, x0, levels, conditions
        self.z = draw_normal(Key(seed), STREAM_CHECK, x0.shape, x0)
        self.ratios = levels.repeat_interleave(len(x0))
        self.twice = repeat_conditions(conditions, 2)
        column = self.ratios.to(x0.dtype).to(x0.device).reshape(-1, *[1] * (x0.dim() - 1))
        self.x = x0.repeat(2, *[1] * (x0.dim() - 1)) + column * self._both(self.z)
        self.known = bool((x0 != 0).any())  # or else pure noise
        self.places: dict[Schedule, Place] = {}
        self.outputs: dict[Any, Tensor | None] = {}

    def _both(self, value: Tensor) -> Tensor:
        return value.repeat(2, *[1] * (value.dim() - 1))

    def place(self, schedule: Schedule) -> Place:
        """Where the samples stand."""
        if schedule not in self.places:
            self.places[schedule] = place_of(schedule, self.ratios)
        return self.places[schedule]

    def rows(self, reading: Reading, *, given: bool = False) -> Tensor:
        """The error of each sample at each level, (2, n), over the mean of |z|^2."""
        at = self.place(reading.schedule)
        kind = "edm" if reading.prediction == "edm" else reading.plain
        times = reading.times(at)
        key = (kind, reading.sigma_data if kind == "edm" else 0, tuple(times.tolist()))
        if key not in self.outputs:
            try:
                self.outputs[key] = self.net(reading.inputs(self.x, at), times, self.twice)
            except Exception:
                if given:
                    raise
                self.outputs[key] = None  # a time that it does not take
        output = self.outputs[key]
        if output is None:
            return torch.full((2, len(self.x0)), math.inf, dtype=torch.float64)
        return self.errors(reading.noise(output, self.x, at))

    def zero(self, reading: Reading) -> Tensor:
        """Likewise of a network that gives zero."""
        at = self.place(reading.schedule)
        return self.errors(reading.noise(torch.zeros_like(self.x), self.x, at))

    def shrunk(self, spread: float) -> Tensor:
        """Likewise of the best linear guess that treats all entries alike."""
        sigma = self.ratios.reshape(-1, *[1] * (self.x.dim() - 1))
        centred = self.x.double().cpu() - self.x0.double().mean().cpu()
        return self.errors(sigma / (spread + sigma.square()) * centred)

    def mean(self, rows: Tensor) -> float:
        """The geometric mean of the errors at both levels.

        Pure noise does not tell what a sample of some size less would: that is the least.
        """
        least = torch.full((2,), 1e-12) if self.known else 4 / self.levels.square()
        return float(rows.mean(1).maximum(least).log().mean().exp())

    def errors(self, noise: Tensor) -> Tensor:
        z = self.z.double().cpu()
        wrong = (noise.double().cpu() - self._both(z)).square().flatten(1).mean(1)
        return wrong.reshape(2, -1) / z.square().mean()


def _judged(trial: _Trial, given: Reading, spread: float) -> ModelCheck:
    """What is to be said."""
    rows = trial.rows(given, given=True)
    shrunk = trial.shrunk(spread) if spread > 0 else None
    sigmas = tuple(float(level) for level in trial.levels)
    remark = _complaint(rows, shrunk, sigmas)
    if not bool(rows.isfinite().all()):
        pass
    elif remark is not None:
        remark = f"{remark}: {_question(trial, given)}?"
    elif shrunk is not None:
        # The network of few mistakes: read in any other way it does worse.
        other, sure = _better(trial, given, most=1)
        if other is not None and sure:
            pair = " and ".join(f"{float(e):.3g}" for e in rows.mean(1))
            remark = f"does far better than by errors {pair} of the noise's if read otherwise: "
            remark += f"is this {_described(given, other)}?"
    errors, linear = (
        None if each is None else tuple(float(e) for e in each.mean(1)) for each in (rows, shrunk)
    )
    assert errors is not None
    return ModelCheck(sigmas, errors, linear, remark)


def _question(trial: _Trial, given: Reading) -> str:
    """What may be wrong with a network that does badly."""
    other, sure = _better(trial, given, most=4 if trial.known else 1)
    if other is not None and sure:
        return f"is this {_described(given, other)}"
    moved = _other_range(trial, given)
    if moved is not None:
        return moved
    if not trial.known:
        return "is it trained, and is this its prediction (samples, not a shape, would tell)"
    if other is not None:
        return f"is it trained, or is this {_described(given, other)}"
    return "is it trained, and are the data in the units that it knows"


def _complaint(rows: Tensor, shrunk: Tensor | None, sigmas: tuple[float, ...]) -> str | None:
    """What is wrong with the errors as they are, at the level where it is worst."""
    errors = rows.mean(1)
    if not bool(errors.isfinite().all()):
        sigma = sigmas[int((~errors.isfinite()).nonzero()[0])]
        return f"gives values that are not finite at sigma {sigma:.3g}"
    worst = int(errors.argmax())
    if _above(rows[worst], torch.ones_like(rows[worst])):
        error = f"error {float(errors[worst]):.3g} of the noise's"
        return f"predicts worse than zero at sigma {sigmas[worst]:.3g} ({error})"
    if shrunk is None:
        # Pure noise, in which every sample is lost: all of it can be told.
        if sigmas[worst] >= 10 and float(errors[worst]) > 0.5:
            error = f"error {float(errors[worst]):.3g} of the noise's"
            return f"hardly denoises pure noise of sigma {sigmas[worst]:.3g} ({error})"
        return None
    ratio = errors / shrunk.mean(1)
    worst = int(ratio.argmax())
    if _above(rows[worst], shrunk[worst]):
        error = f"error {float(errors[worst]):.3g} of the noise's"
        beside = f"{float(shrunk[worst].mean()):.3g} by shrinking"
        return (
            f"denoises worse than its input shrunk at sigma {sigmas[worst]:.3g} ({error}, {beside})"
        )
    return None


def _above(rows: Tensor, other: Tensor) -> bool:
    """Whether errors are above others on the same samples: by 5 %, and by more than chance."""
    apart = rows - other
    chance = 4 * float(apart.std()) / math.sqrt(len(apart)) if len(apart) > 1 else 0.2
    return float(apart.mean()) > 0.05 * float(other.mean()) + chance


# ------------------------------------------------------------------------------ the other readings


def _readings(given: Reading, most: int) -> Iterator[Reading]:
    """The readings that differ from the given one in at most so many points, itself among them."""
    schedule, signs = given.schedule, (given.sign, -given.sign)
    table, plain = isinstance(schedule, DiscreteVP), (given.plain, not given.plain)
    times = ["sigma", "c_noise", "log_sigma"]
    if table:  # there the timestep is t
        times += ["t" if given.time == "t" else "timestep", "part", "reversed"]
    else:
        times += ["t", *(["timestep", "reversed"] if schedule.t_max <= 1 else [])]
    for time, sign, bare in itertools.product(times, signs, plain):
        for prediction in PREDICTIONS:
            other = replace(given, prediction=prediction, time=time, sign=sign, plain=bare)
            if _changes(given, other) <= most and not (prediction == "flow" and bare):
                yield other


def _better(trial: _Trial, given: Reading, most: int) -> tuple[Reading | None, bool]:
    """The reading that does far better than the given one, and whether that is sure."""
    before = trial.mean(trial.rows(given))
    found: dict[bool, tuple[float, Reading]] = {}
    for reading in _readings(given, most):
        # On pure noise these two bring almost any network's output to the noise itself.
        if not trial.known and (reading.plain != given.plain or reading.time == "reversed"):
            continue
        rows = trial.rows(reading)
        if not bool((rows.mean(1) < 1).all()):
            continue
        error = trial.mean(rows)
        # What an output of zero does as well says nothing of the network.
        sure = error < 0.9 * trial.mean(trial.zero(reading))
        weight = error * _EACH_CHANGE ** _changes(given, reading)
        if error < _BETTER * before and weight < found.get(sure, (math.inf,))[0]:
            found[sure] = (weight, reading)
    if found:
        return found[True in found][1], True in found
    return None, False


def _changes(given: Reading, other: Reading) -> int:
    names = ("prediction", "time", "sign", "plain")
    return sum(getattr(given, name) != getattr(other, name) for name in names)


def _described(given: Reading, other: Reading) -> str:
    """How to say a reading, in the arguments of `ModelScore`."""
    last = given.schedule.t_max if isinstance(given.schedule, DiscreteVP) else 1.0
    called = "call=lambda net, x, t, **kw: "
    times = {
        "part": f"a time in [0, 1] ({called}net(x, t / {last:g}, **kw))",
        "reversed": f"a time that runs the other way ({called}net(x, {last:g} - t, **kw))",
        "log_sigma": f"the time log sigma (time='c_noise', {called}net(x, 4 * t, **kw))",
    }
    parts = []
    if other.prediction != given.prediction or not given.known:
        parts.append(f"prediction={other.prediction!r}")
    if other.time != given.time:
        parts.append(times.get(other.time, f"time={other.time!r}"))
    if other.sign < 0 and (given.sign > 0 or not given.known):
        parts.append(f"the sign turned ({called}-net(x, t, **kw))")
    if other.plain != given.plain:
        what = "x itself, of plain noise (schedule=EDM())" if other.plain else "alpha x"
        parts.append(f"a network that is given {what}")
    return " and ".join(parts)


def _other_range(trial: _Trial, given: Reading) -> str | None:
    """Whether the network knows the data in another range, as a question."""
    low, high = float(trial.x0.min()), float(trial.x0.max())
    maps: list[tuple[str, float, float]] = []
    if not trial.known:
        pass
    elif low >= 0 and high <= 1:
        maps = [("2 x - 1, data in [-1, 1]", 2.0, -1.0)]
    elif low >= -1 and high <= 1:
        maps = [("(x + 1) / 2, data in [0, 1]", 0.5, 0.5)]
    elif low >= 0 and high <= 255:
        maps = [
            ("x / 127.5 - 1, data in [-1, 1]", 1 / 127.5, -1.0),
            ("x / 255, data in [0, 1]", 1 / 255, 0.0),
        ]
    before = trial.mean(trial.rows(given))
    for text, scale, shift in maps:
        moved = _Trial(
            trial.net, scale * trial.x0 + shift, trial.levels * scale, trial.conditions, 0
        )
        try:
            rows = moved.rows(given)
        except ValueError:  # a level out of the schedule's range
            continue
        if bool((rows.mean(1) < 1).all()) and moved.mean(rows) < _BETTER * before:
            return f"is it trained on {text}"
    return None


# ------------------------------------------------------------------------------------- the border


def warn_of(where: str, found: ModelCheck) -> None:
    """A warning, if something looks wrong."""
    if found.remark is not None:
        warnings.warn(f"{where}: the network {found.remark}", stacklevel=3)


def _samples(model: object, data: Any) -> Tensor:
    """Clean samples: those given, or zeros of a shape."""
    if isinstance(data, Tensor):
        check_samples(_WHERE, "data", data)
        check(_WHERE, len(data) > 0, "data must hold a sample", tuple(data.shape))
        check(_WHERE, bool(data.isfinite().all()), "data must be finite", "others")
        return data.detach()
    sizes = isinstance(data, (tuple, list)) and len(data) > 1
    fine = sizes and all(type(size) is int and size > 0 for size in data)
    rule = "data must be a Tensor of samples or the shape (B, *dims) of a batch"
    check(_WHERE, fine, rule, lambda: show(data), TypeError)
    weight = None
    if isinstance(model, nn.Module):
        weight = next((p for p in model.parameters() if p.dtype.is_floating_point), None)
    dtype = torch.get_default_dtype() if weight is None else weight.dtype
    return torch.zeros(data, dtype=dtype, device=None if weight is None else weight.device)


def _as_read(model: Any, schedule: Schedule | None) -> tuple[Output, Reading]:
    """The network in a model, and how the model reads it."""
    if isinstance(model, SecondOrderHead):
        model, scaled = model.score_model, model.scaled
    else:
        scaled = True
    reading = getattr(model, "reading", None)
    if isinstance(reading, Reading):
        rule = "schedule must be None for a model that has its own"
        check(_WHERE, schedule is None, rule, lambda: repr(schedule))
        return model.output, reading
    if schedule is None:
        schedule = EDM(1e-6, 1e6)
    check_schedule(_WHERE, schedule)

    def net(x: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> Tensor:
        answer = model(x, sigma.to(x.dtype).to(x.device), **kwargs)
        score = answer.scaled_score if isinstance(answer, Scores) else answer
        check_like(_WHERE, "score from model", score, x)
        found: Tensor = score
        return found

    # sigma s1 is -E[z | x]: eps with its sign turned.
    prediction, sign = ("eps", -1) if scaled else ("score", 1)
    plain = Reading(schedule, prediction, "sigma", plain=True, sign=sign, known=False)
    return net, plain


def _levels(model: Any, reading: Reading, sigmas: tuple[float, float] | None, std: float) -> Tensor:
    """Two noise levels, float64, the lower first."""
    owner = model.score_model if isinstance(model, SecondOrderHead) else model
    low, high = getattr(owner, "sigma_range", None) or (1e-6, 1e6)
    if sigmas is not None:
        pair = isinstance(sigmas, (tuple, list)) and len(sigmas) == 2
        rule = "sigmas must be two noise levels"
        check(_WHERE, pair, rule, lambda: show(sigmas), TypeError)
        like = torch.zeros(1, dtype=torch.float64)
        wanted = [float(positive(_WHERE, "sigmas", sigma, like)) for sigma in sigmas]
        for sigma in wanted:
            rule = f"sigmas must be in [{low:g}, {high:g}], the noise levels of the model"
            check(_WHERE, low <= sigma <= high, rule, f"{sigma:g}")
    elif std > 0:
        wanted = [min(max(factor * std, low), high) for factor in (0.5, 2.0)]
    else:
        wanted = [10.0, min(30.0, high)] if high >= 10 else [max(low, high / 2), high]
        wanted = [max(level, low) for level in wanted]
    return torch.tensor(sorted(wanted), dtype=torch.float64)


def _modules(model: object) -> Iterator[nn.Module]:
    if isinstance(model, nn.Module):
        yield from model.modules()
