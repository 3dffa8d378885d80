"""The steps of the reverse samplers: each is a function that reads as its formula.

A step takes x from time t down to time s. The drift of the SDE and of the ODE is a velocity in t,
so that it enters with s - t < 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..checks import check, check_tensor
from ..conditions import Conditions
from ..linalg.dplr import DPLR
from ..ops.noise import draw_normal
from ..random import STREAM_REVERSE, Key
from ..sampling import ChainState, sample
from ..sampling import Step as ChainStep
from ..schedules import Schedule
from ..scores import Model, Scores, UnscaledScores, model_scores
from ..tweedie.posterior import posterior


class Run(NamedTuple):
    """What stays the same over the steps of one chunk of samples.

    Attributes:
        where: the public function, for messages.
        model, schedule: as the samplers take them.
        key: of the noise of the run. Step number n draws with the offset n.
        conditions: of the model, for these samples; None is none.
    """

    where: str
    model: Model
    schedule: Schedule
    key: Key
    conditions: Conditions | None = None

    def scores(self, x: Tensor, t: float, *used: str) -> Scores:
        """The model's scores at time t. Those that are named must be finite."""
        sigma = x.new_full((len(x),), self.schedule.sigma(t))
        scores = model_scores(self.where, self.model, x, sigma, self.conditions)
        for name in used:
            value = getattr(scores, name)
            if value is not None or name == "scaled_score":  # steps ask for what they need
                check_tensor(self.where, f"{name} from model", value, like=x)
            self.check_finite(f"{name} from model", value, t)
        return scores

    def noise(self, x: Tensor, number: int) -> Tensor:
        """Standard normals like x, those of one step."""
        return draw_normal(self.key._replace(offset=number), STREAM_REVERSE, x.shape, x)

    def check_finite(self, name: str, value: Tensor | None, t: float) -> None:
        """Refuses NaN and infinities; names the time and the sample."""
        if value is not None:
            bad = ~value.isfinite()
            got = self._worst(value, bad, t)
            check(self.where, not bool(bad.any()), f"{name} must be finite", got)

    def check_not_negative(self, name: str, value: Tensor, t: float) -> None:
        """Refuses numbers below 0; names the time and the sample."""
        got = self._worst(value, value < 0, t, "g")
        check(self.where, not bool((value < 0).any()), f"{name} must be at least 0", got)

    def place(self, bad: Tensor, t: float) -> str:
        """The time and the first of the bad samples (B,)."""
        return f"t = {t:g} for sample {self.key.first + int(bad.nonzero()[0])}"

    def _worst(self, value: Tensor, bad: Tensor, t: float, form: str = "") -> Callable[[], str]:
        """The first bad number, with its place; found only if it is asked for."""
        return lambda: f"{value[bad][0].item():{form}} at {self.place(bad.flatten(1).any(1), t)}"


Step: TypeAlias = Callable[[Run, Tensor, float, float, int], Tensor]
"""(run, x, t, s, number of the step) -> x at time s."""


def _velocity(run: Run, x: Tensor, t: float, part: float) -> Tensor:
    """-(beta / 2) x - part g^2 s1: part 1 for the SDE, 1/2 for the ODE."""
    sigma, g = run.schedule.sigma(t), run.schedule.diffusion(t)
    scaled_score = run.scores(x, t, "scaled_score").scaled_score
    return -run.schedule.beta(t) / 2 * x - part * g**2 / sigma * scaled_score


# --------------------------------------------------------------------------- of the ODE, of the SDE


def euler_ode(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
    """Order 1; one model call."""
    return x + (s - t) * _velocity(run, x, t, 0.5)


def heun_ode(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
    """Order 2; two model calls. The velocity is averaged over both ends."""
    slope = _velocity(run, x, t, 0.5)
    end = x + (s - t) * slope
    return x + (s - t) / 2 * (slope + _velocity(run, end, s, 0.5))


def euler_sde(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
    """Euler and Maruyama: weak order 1; one model call."""
    g = run.schedule.diffusion(t)
    return x + (s - t) * _velocity(run, x, t, 1.0) + g * math.sqrt(t - s) * run.noise(x, number)


def heun_sde(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
    """Weak order 2; two model calls. Velocity and g are averaged over both ends, one noise."""
    g, g_end = run.schedule.diffusion(t), run.schedule.diffusion(s)
    shock = math.sqrt(t - s) * run.noise(x, number)
    slope = _velocity(run, x, t, 1.0)
    end = x + (s - t) * slope + g * shock
    return x + (s - t) / 2 * (slope + _velocity(run, end, s, 1.0)) + (g + g_end) / 2 * shock


# ------------------------------------------------------------------------------------ second order


def second_order(covariance_form: str) -> Step:
    """The step of `second_order_reverse`, whose docstring has the formula.

    Args:
        covariance_form: "low_rank", "diagonal" or "none": what is kept of C.
    """

    def step(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
        alpha_t, sigma_t = run.schedule.alpha(t), run.schedule.sigma(t)
        alpha_s, sigma_s = run.schedule.alpha(s), run.schedule.sigma(s)
        kept = (sigma_s / alpha_s * (alpha_t / sigma_t)) ** 2  # w
        clean, spread = _clean_sample(run, x, t, covariance_form)
        mean = kept * alpha_s / alpha_t * x + alpha_s * (1 - kept) * clean
        variance = sigma_s**2 * (1 - kept)
        law = spread.scale((alpha_s * (1 - kept)) ** 2) + variance
        # c may be negative where the factor makes up for it, but a draw needs its root.
        run.check_not_negative("diagonal part of the step's covariance", law.diag, t)
        if law.sign is not None:
            bad = ~law.is_positive_definite()
            check(
                run.where,
                not bool(bad.any()),
                "the step's covariance must be positive definite",
                lambda: f"one that is not at {run.place(bad, t)}",
            )
        draw = law.sample(1, seed=_seed(run.key), offset=number, first=run.key.first)[0]
        return mean + draw.reshape(x.shape)

    return step


def _clean_sample(run: Run, x: Tensor, t: float, covariance_form: str) -> tuple[Tensor, DPLR]:
    """The mean m of x0 given x at time t, and what is kept of its covariance C."""
    alpha, sigma = run.schedule.alpha(t), run.schedule.sigma(t)
    if covariance_form == "none":
        mean = (x + sigma * run.scores(x, t, "scaled_score").scaled_score) / alpha
        return mean, DPLR(torch.zeros_like(x).flatten(1))
    scores = run.scores(x, t, "scaled_score", "c", "factor")
    rule = "model must give c (one of first order takes covariance_form='none')"
    check(run.where, scores.c is not None, rule, None, TypeError)
    found = posterior(x, scores, sigma, alpha)
    mean, covariance = found.mean, found.covariance
    variance = covariance.diagonal()
    run.check_not_negative("posterior variance", variance, t)
    return mean, DPLR(variance) if covariance_form == "diagonal" else covariance


# ------------------------------------------------------------------------------------- correctors


def corrected(predict: Step, corrector: ChainStep, n: int, step_size: float) -> Step:
    """A step, then n steps of a Markov chain that keeps the marginal at the time it came to.

    Args:
        predict: the step.
        corrector: the step of the chain.
        n: steps of the chain.
        step_size: of the chain, in units of sigma(s)^2.
    """
    alone = not (corrector.needs_hessian or corrector.adjusted)
    used = ("scaled_score",) if alone else ("scaled_score", "c", "factor")

    def step(run: Run, x: Tensor, t: float, s: float, number: int) -> Tensor:
        x = predict(run, x, t, s, number)
        if n == 0:
            return x
        sigma = run.schedule.sigma(s)
        chains = sample(
            lambda y: chain_scores(run.scores(y, s, *used), sigma, corrector),
            method=corrector,
            step_size=step_size * sigma**2,
            n_steps=0,
            burn_in=n,
            state=chain_state(x, run.key, step=number * n),
        )
        return chains.state["x"]

    return step


def chain_state(x: Tensor, key: Key, *, step: int) -> ChainState:
    """Chains at x, whose next step has this number."""
    return ChainState(x=x, step=step, since_draw=0, seed=_seed(key), first_chain=key.first)


def _seed(key: Key) -> int:
    assert isinstance(key.seed, int)
    return key.seed


def chain_scores(scores: Scores, sigma: float, step: ChainStep) -> Tensor | UnscaledScores:
    """What `sample` needs at a noise level: s1 alone for a step that does not need s2.

    An adjusted step has s2 where there is a c: its acceptance is then nearer to the truth.
    """
    if not step.needs_hessian and (scores.c is None or not step.adjusted):
        return scores.scaled_score / sigma
    return scores.unscaled(sigma)
