"""Conditional models along a schedule: conditions follow the rows, and the laws are conditional."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
from conftest import WITHIN
from torch import Tensor

from hos_ext import VE, VP
from hos_ext.densities import Gaussian
from hos_ext.diffusion import (
    annealed_langevin,
    guided,
    log_likelihood,
    predictor_corrector,
    prior,
    probability_flow_ode,
    reverse_sde,
    second_order_reverse,
    tweedie_denoise,
)
from hos_ext.scores import Scores
from hos_ext.tweedie import moment_recurrence
from hos_ext.uncertainty import posterior_from_score

F64 = torch.float64
ROWS, D = 7, 3
MEANS = torch.linspace(-2, 2, 4 * D).reshape(4, D)
VARIANCES = torch.linspace(0.2, 1.4, 4 * D).reshape(4, D).flip(1)
LABEL = torch.tensor([3, 0, 1, 1, 3, 0, 2])
CONDITIONS = {"label": LABEL, "texts": [torch.linspace(-1, 1, ROWS).unsqueeze(1)], "power": 0.5}


def rowwise(x: Tensor, sigma: Tensor, label: Tensor, texts: list[Tensor], power: float) -> Scores:
    """Of no density, but whose rows do not depend on each other, not even in the last bit."""
    s, shift = sigma.reshape(-1, 1), MEANS[label] + power * texts[0]
    factor = torch.stack([torch.sin(x), (x - shift) / (1 + x**2)], -1)
    return Scores(-s * (x - shift) / (1 + s**2), 0.1 + 1 / (1 + (x - shift) ** 2), factor)


def exact(schedule, x: Tensor, sigma: Tensor, *, label: Tensor) -> Scores:
    """Each class is normal, with a mean and variances of its own."""
    s = sigma.reshape(-1, 1)
    alpha = schedule.alpha(schedule.t_of_sigma(sigma)).to(x).reshape(-1, 1)
    mean, variance = (table.to(x)[label] for table in (MEANS, VARIANCES))
    total = alpha**2 * variance + s**2
    return Scores(-s * (x - alpha * mean) / total, alpha**2 * variance / total)


def annealed_draws(model, init, schedule, *, n_steps, seed, first=0, **options):
    chains = annealed_langevin(
        model, init, [2.0, 0.5], n_steps=n_steps, seed=seed, first_chain=first, **options
    )
    return chains.draws


def flow(model, init, schedule, *, seed, **options):
    return probability_flow_ode(model, init, schedule, **options)


SAMPLERS = {
    "reverse_sde euler": reverse_sde,
    "reverse_sde heun": partial(reverse_sde, solver="heun"),
    "probability_flow_ode": flow,
    "second_order_reverse": second_order_reverse,
    "predictor_corrector": partial(predictor_corrector, corrector="ozaki", corrector_steps=2),
    "predictor_corrector mala": partial(
        predictor_corrector, predictor="second_order", corrector="mala", corrector_step_size=0.5
    ),
    "annealed langevin": annealed_draws,
    "annealed mh_ozaki": partial(annealed_draws, method="mh_ozaki", step_size=0.5),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


@every_sampler
def test_rows_of_conditions_follow_their_samples(sampler):
    x = prior((ROWS, D), VP(), seed=0)
    options = {"n_steps": 4, "seed": 4}
    whole = sampler(rowwise, x, VP(), model_kwargs=CONDITIONS, **options)
    assert torch.equal(sampler(partial(rowwise, **CONDITIONS), x, VP(), **options), whole)
    for chunk in (1, 3, 100):
        cut = sampler(rowwise, x, VP(), model_kwargs=CONDITIONS, chunk_size=chunk, **options)
        assert torch.equal(cut, whole)
    for row in (0, 4):  # by itself, with its own row bound by hand
        at = slice(row, row + 1)
        own = {"label": LABEL[at], "texts": [CONDITIONS["texts"][0][at]], "power": 0.5}
        alone = sampler(partial(rowwise, **own), x[at], VP(), first=row, **options)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("schedule", [VE(), VP()], ids=lambda s: type(s).__name__)
def test_samples_have_the_law_of_their_class(schedule):
    label = torch.arange(4).repeat_interleave(400)
    start = prior((1600, D), schedule, seed=1, dtype=F64)
    model = partial(exact, schedule)
    options = {"n_steps": 12, "seed": 2, "chunk_size": 250, "model_kwargs": {"label": label}}
    x = second_order_reverse(model, start, schedule, **options)
    t = schedule.t_min
    for k in range(4):
        mean = schedule.alpha(t) * MEANS[k].double()
        std = (schedule.alpha(t) ** 2 * VARIANCES[k].double() + schedule.sigma(t) ** 2).sqrt()
        z = (x[label == k] - mean) / std
        # At t_max the marginal of VP keeps some of the mean, which `prior` has not.
        assert z.mean(0).abs().max() < (WITHIN + 1) / math.sqrt(400)
        assert (z.var(0) - 1).abs().max() < WITHIN * math.sqrt(2 / 400)


def test_likelihood_of_each_row_is_that_of_its_class():
    schedule = VE(0.1, 1e5)
    x = torch.randn(ROWS, D, dtype=F64, generator=torch.Generator().manual_seed(0))
    options = {"n_steps": 100, "solver": "rk4"}
    model = partial(exact, schedule)
    for trace in ("learned", "corrected", "exact", "hutchinson"):
        found = log_likelihood(
            model, x, schedule, trace=trace, seed=0, model_kwargs={"label": LABEL}, **options
        )
        for row, k in enumerate(LABEL):
            covariance = (VARIANCES[k].double() + schedule.sigma(schedule.t_min) ** 2).diag()
            wanted = Gaussian(MEANS[k].double(), covariance).log_prob(x[row : row + 1])
            # p_T is taken for N(0, scale^2 I): an error of about mean / sigma_max.
            assert abs(float(found[row]) - float(wanted)) < 1e-3


def test_one_step_denoising_is_that_of_the_class():
    x = torch.linspace(-2, 2, ROWS * D, dtype=F64).reshape(ROWS, D)
    found = tweedie_denoise(partial(exact, VP()), x, VP(), 0.3, model_kwargs={"label": LABEL})
    alpha, sigma = VP().alpha(0.3), VP().sigma(0.3)
    for row, k in enumerate(LABEL):
        mean, variance = MEANS[k].double(), VARIANCES[k].double()
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        torch.testing.assert_close(found.mean[row], mean + gain * (x[row] - alpha * mean))
        left = variance - alpha * gain * variance
        torch.testing.assert_close(found.covariance.diagonal()[row], left)


@pytest.mark.parametrize("y_rows", [1, ROWS])
def test_guided_models_hand_conditions_on(y_rows):
    x = prior((ROWS, D), VP(), seed=0)
    y = torch.linspace(-0.5, 0.5, y_rows).unsqueeze(1)
    problem = (y, torch.tensor([True, False, False]), 0.2, VP())
    options = {"n_steps": 4, "seed": 4}
    given = guided(rowwise, *problem)
    whole = second_order_reverse(given, x, VP(), model_kwargs=CONDITIONS, **options)
    bound = guided(partial(rowwise, **CONDITIONS), *problem)
    assert torch.equal(second_order_reverse(bound, x, VP(), **options), whole)
    if y_rows == 1:
        cut = second_order_reverse(given, x, VP(), model_kwargs=CONDITIONS, chunk_size=2, **options)
        torch.testing.assert_close(cut, whole)  # a product of matrices rounds by the batch


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch itself
def test_posteriors_and_moments_of_a_score_have_the_condition_of_their_row():
    x = torch.linspace(-2, 2, ROWS * D, dtype=F64).reshape(ROWS, D)

    def score_fn(x, label):
        return -(x - MEANS.to(x)[label]) / (VARIANCES.to(x)[label] + 1)

    known = {"label": LABEL}
    found = posterior_from_score(
        score_fn, x, 1.0, rank=0, remainder="diagonal", n_probes=D, model_kwargs=known
    )
    moments = moment_recurrence(score_fn, x, 1.0, order=2, model_kwargs=known)
    variance = VARIANCES.double()[LABEL]
    mean = x + score_fn(x, LABEL)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance.diagonal(), variance / (1 + variance))
    torch.testing.assert_close(moments[0], mean)
    second = torch.diag_embed(variance / (1 + variance)) + mean.unsqueeze(2) * mean.unsqueeze(1)
    torch.testing.assert_close(moments[1], second)


@pytest.mark.parametrize(
    ("call", "where", "like"),
    [
        (lambda x, m: reverse_sde(rowwise, x, VP(), n_steps=1, **m), "reverse_sde", "init"),
        (lambda x, m: flow(rowwise, x, VP(), seed=0, n_steps=1, **m), None, "init"),
        (
            lambda x, m: predictor_corrector(rowwise, x, VP(), n_steps=1, **m),
            "predictor_corrector",
            "init",
        ),
        (
            lambda x, m: annealed_draws(rowwise, x, None, n_steps=1, seed=0, **m),
            "annealed_langevin",
            "init",
        ),
        (lambda x, m: log_likelihood(rowwise, x, VP(), n_steps=1, **m), "log_likelihood", "x"),
        (lambda x, m: tweedie_denoise(rowwise, x, VP(), 0.5, **m), "tweedie_denoise", "x"),
        (
            lambda x, m: posterior_from_score(rowwise, x, 1.0, rank=0, **m),
            "posterior_from_score",
            "x",
        ),
        (lambda x, m: moment_recurrence(rowwise, x, 1.0, order=1, **m), "moment_recurrence", "x"),
        (
            lambda x, m: guided(rowwise, x[:1], torch.ones(D, dtype=torch.bool), 1.0, VP())(
                x, torch.full((ROWS,), 0.5), **m["model_kwargs"]
            ),
            "guided",
            "x",
        ),
    ],
)
def test_conditions_of_another_length_are_refused_by_name(call, where, like):
    x = torch.zeros(ROWS, D)
    rule = f"model_kwargs['texts'][0] must have 7 rows like {like}, got shape (1, 4)"
    message = re.escape(f"{where or 'probability_flow_ode'}: {rule}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        call(x, {"model_kwargs": CONDITIONS | {"texts": [torch.ones(1, 4)]}})
