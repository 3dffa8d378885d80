"""One model of many observations, from a model of one.

In simulation-based inference x0 are the parameters, and a network that was trained on pairs of
parameters and one observation gives sigma s1 and kappa = Cov[z | x, y] at every noise level. Those
of n independent observations follow from the product of `hos_ext.tweedie.products`, which in the
noise z = (x - alpha x0) / sigma has no alpha and no units:

    kappa^-1 = sum_j kappa_j^-1 + (1 - n) kappa_0^-1,
    sigma s1 = sigma s1_0 + kappa sum_j kappa_j^-1 (sigma s1_j - sigma s1_0).

Index 0 is the prior: its noisy law without an observation, whose score thus enters with the weight
I - kappa sum_j kappa_j^-1 = (1 - n) kappa kappa_0^-1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check, check_callable, check_kind, check_samples, check_tensor, refuse_dropout
from ..conditions import Conditions, check_conditions, repeat_conditions
from ..linalg.dplr import DPLR
from ..linalg.precision import precision_of
from ..scores import Model, Scores, model_scores
from ..tweedie.products import check_law, check_widest, product_covariance, refuse_indefinite

_WHERE = "composed"


def composed(
    model: Model,
    observations: Conditions | Sequence[str],
    unconditional: Model,
    *,
    widest: float | None = 1.0,
) -> Model:
    """A model of p(x_t | y_1, ..., y_n), for the samplers of `diffusion`, from one of p(x_t | y).

        kappa^-1 = sum_j kappa_j^-1 + (1 - n) kappa_0^-1
        sigma s1 = sigma s1_0 + kappa sum_j kappa_j^-1 (sigma s1_j - sigma s1_0)

    with the model's scores and kappa_j = diag(c) + F F^T for each observation, and those without
    (index 0). The observations are independent given x0. One call asks the model once, with n B
    rows, and unconditional once. It is exact where x0 and all x0 | y_j are Gaussian. Elsewhere the
    laws of x0 given x_t are taken for Gaussian, an error that vanishes with sigma. Second-order
    steps (`second_order_reverse`) use the kappa too. With n = 1 it is the model.

    Args:
        model: `model(x, sigma, **model_kwargs) -> Scores` with c; x0 is what is inferred.
        observations: the same for all samples: conditions of the model by name, each tensor of n
            rows, one an observation. Or, for a set of its own for each sample, the names of those
            among the sampler's `model_kwargs` that hold a tensor (B, n, ...).
        unconditional: the same without an observation: the noisy law of the prior, as
            `box_model` and `gaussian_model` have it in closed form, or a network for the prior, or
            the model itself with the condition of no observation.
        widest: kappa <= widest * kappa_0, see `product_of_posteriors`; None refuses an indefinite
            product instead.

    Returns:
        A function (x, sigma, **model_kwargs) -> Scores. Other conditions than the observations are
        handed on to the model, for each of the n, and to unconditional. It raises what the models
        raise; ValueError where scores are not finite, kappa_j is not positive definite, or, with
        widest=None, kappa; RuntimeError where derivatives are asked for (log_likelihood: take
        trace="learned").

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, observations of
            unequal numbers, a model with active dropout.

    References:
        Linhart et al. 2024, arXiv:2404.07593; Geffner et al. 2023, arXiv:2209.14249.

    Example:
        Parameters N(0, 1) with observations of noise 1, whose single posteriors are known.

        >>> import torch
        >>> from hos_ext import VP, Scores
        >>> from hos_ext.diffusion import composed, gaussian_model, prior, second_order_reverse
        >>> def model(x, sigma, y):  # x0 | y is N(y / 2, 1 / 2)
        ...     square = sigma.unsqueeze(1) ** 2
        ...     mean, variance = (1 - square).sqrt() * y / 2, (1 - square) / 2 + square
        ...     scaled_score = -square.sqrt() * (x - mean) / variance
        ...     return Scores(scaled_score, (1 - square) / 2 / variance)
        >>> no_data = gaussian_model(torch.zeros(1), torch.ones(1), VP())
        >>> many = composed(model, {"y": torch.ones(9, 1)}, no_data)
        >>> start = prior((2000, 1), VP(), seed=0)
        >>> x = second_order_reverse(many, start, VP(), n_steps=30, seed=0)
        >>> bool((x.mean() - 0.9).abs() < 0.03), bool((x.var() - 0.1).abs() < 0.01)
        (True, True)
    """
    for name, each in (("model", model), ("unconditional", unconditional)):
        check_callable(_WHERE, name, each)
        refuse_dropout(_WHERE, each)
    shared, names, n = _observations(observations)
    widest = check_widest(_WHERE, widest)

    def product(x: Tensor, sigma: Tensor | float, /, **model_kwargs: Any) -> Scores:
        check_samples(_WHERE, "x", x)
        others = check_conditions(_WHERE, model_kwargs, len(x))
        twice = sorted(shared.keys() & others.keys())
        check(_WHERE, not twice, "model_kwargs must have other names than observations", twice)
        sets = {name: _set_of(name, others.pop(name, None), x) for name in names}
        numbers = {name: value.shape[1] for name, value in sets.items()}
        count = n or next(iter(numbers.values()))
        fits = len(set(numbers.values())) < 2
        check(_WHERE, fits, "observations must be as many for each name", numbers)
        own = {k: v.transpose(0, 1).flatten(0, 1) for k, v in sets.items()}
        own |= {k: v.repeat_interleave(len(x), 0) for k, v in shared.items()}
        rows = torch.cat([x] * count)
        level = sigma.repeat(count) if isinstance(sigma, Tensor) and sigma.dim() else sigma
        conditions = repeat_conditions(others, count) | own
        scores = model_scores(_WHERE, model, rows, level, conditions)
        if count == 1:
            return scores
        base = model_scores(_WHERE, unconditional, x, sigma, others)
        return _product(scores, base, count, widest)

    return product


def _product(scores: Scores, base: Scores, n: int, widest: float | None) -> Scores:
    """Of n B rows, one observation behind the other, and of the B rows without."""
    like = base.scaled_score
    kappa, kappa_0 = _kappa("scores from model", scores), _kappa("unconditional scores", base)
    by_set = (n, *kappa_0.diag.shape)
    diag, factor = kappa.diag.reshape(by_set), kappa.factor.reshape(*by_set, kappa.rank)
    precision, fine = precision_of(diag, factor, kappa.sign)
    refuse_indefinite(_WHERE, "the noise by model", fine)
    prior, fine = precision_of(kappa_0.diag, kappa_0.factor, kappa_0.sign)
    refuse_indefinite(_WHERE, "the noise by unconditional", fine)
    centre = like.flatten(1).double()
    pull = precision.times(scores.scaled_score.reshape(by_set).double() - centre).sum(0)
    plain = kappa.sign is None and kappa_0.rank == 0
    law = product_covariance(_WHERE, precision.summed(), n, prior, widest, plain)
    scaled_score = (centre + law.matvec(pull)).to(like.dtype).reshape(like.shape)
    law = law.to(like.dtype)
    return Scores(scaled_score, law.diag.reshape(like.shape), law.factor, law.sign)


def _kappa(name: str, scores: Scores) -> DPLR:
    """Cov[z | x], checked."""
    like = scores.scaled_score
    check(_WHERE, scores.c is not None, f"{name} must have c", None, TypeError)
    check_tensor(_WHERE, f"c of {name}", scores.c, like=like, shape=tuple(like.shape))
    kappa = DPLR(scores.c.flatten(1), scores.factor, scores.sign)
    check_law(_WHERE, name, like, kappa)
    return kappa


def _observations(
    observations: Conditions | Sequence[str],
) -> tuple[dict[str, Any], tuple[str, ...], int]:
    """Shared conditions, or the names of those of each sample, and the number if it is known."""
    check_kind(_WHERE, "observations", observations, (Mapping, tuple, list))
    check(_WHERE, len(observations) > 0, "observations must hold at least one name", "none")
    if not isinstance(observations, Mapping):
        for name in observations:
            check_kind(_WHERE, "a name of observations", name, str)
        return {}, tuple(observations), 0
    for name, value in observations.items():
        check_kind(_WHERE, f"observations[{name!r}]", value, Tensor)
        rule = f"observations[{name!r}] must have shape (n, ...), n >= 1"
        check(_WHERE, value.dim() > 0 and len(value) > 0, rule, tuple(value.shape))
    n = len(next(iter(observations.values())))
    return check_conditions(_WHERE, observations, n, "the first of observations"), (), n


def _set_of(name: str, value: Any, x: Tensor) -> Tensor:
    """A tensor (B, n, ...), n >= 1."""
    rule = f"model_kwargs[{name!r}] must have shape ({len(x)}, n, ...), n >= 1"
    sets = check_kind(_WHERE, f"model_kwargs[{name!r}]", value, Tensor)
    check(_WHERE, sets.dim() > 1 and sets.shape[1] > 0, rule, lambda: tuple(sets.shape))
    return sets
