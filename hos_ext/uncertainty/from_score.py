"""The posterior of a first-order model: its covariance by products with the model's Jacobian."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_callable, check_samples, per_sample, positive, said_by
from ..conditions import Conditions, check_conditions
from ..linalg.autodiff import CHUNK
from ..linalg.dplr import DPLR
from ..linalg.jacobian import ScoreHessian
from ..linalg.probing import Probes
from ..schedules import Schedule, check_schedule
from ..scores import FirstOrderScore
from ..tweedie.path import Path
from ..tweedie.posterior import (
    Posterior,
    covariance_from_kappa,
    noise_covariance,
    posterior_mean,
)


def posterior_from_score(
    score_fn: FirstOrderScore,
    x: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    rank: int,
    remainder: Literal["isotropic", "diagonal"] = "isotropic",
    n_probes: int = 32,
    probes: Probes = "signs",
    seed: int | None = None,
    first: int = 0,
    floor: float = 1e-2,
    tolerance: float = 1e-3,
    max_products: int | None = None,
    symmetrize: bool = True,
    chunk_size: int | None = CHUNK,
    check: bool = True,
    model_kwargs: Conditions | None = None,
    generator: torch.Generator | None = None,
) -> Posterior:
    """Mean and covariance of the clean sample given the noisy one, from a first-order model.

    The covariance (sigma^2 / alpha^2) kappa with kappa = I + sigma^2 s2 is replaced by a DPLR of
    the given rank, as `ScoreHessian.low_rank` says: positive definite, with kappa's leading
    eigenpairs or variances, and its trace. For a model of diffusers that predicts eps, at step t:

        s = from_alphas_cumprod(scheduler.alphas_cumprod)
        alpha, sigma = s.alpha(float(t)), s.sigma(float(t))
        score_fn = lambda x: score_from_eps(net(x, t).sample, sigma)
        posterior = posterior_from_score(score_fn, x, sigma, alpha, rank=3)

    Args:
        score_fn: maps x (B, *dims) to s1, as in `ScoreHessian`, which shows one for a denoiser of
            each kind.
        x: the noisy sample, x = alpha x0 + sigma z. Shape (B, *dims). float32 or float64.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.
        rank: eigenpairs, 0 ... D.
        remainder, n_probes, probes, seed, first, floor, generator: as `ScoreHessian.low_rank`.
        tolerance, max_products: as `ScoreHessian.eigenpairs`.
        symmetrize, chunk_size, check: as `ScoreHessian`.
        model_kwargs: conditions, such as class labels: `score_fn(x, **model_kwargs)`, with one row
            for each sample in each tensor.

    Returns:
        A `Posterior`: samples, standard deviations, principal components, calibration.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive; what
            `ScoreHessian` and its `low_rank` refuse.

    Example:
        Data N(0, I) at sigma 1, so that s1 = -x / 2 and the posterior is N(x / 2, I / 2).

        >>> import torch
        >>> from hos_ext.uncertainty import posterior_from_score
        >>> found = posterior_from_score(lambda x: -x / 2, torch.ones(1, 4), 1.0, rank=1, seed=0)
        >>> torch.allclose(found.mean, torch.tensor(0.5))
        True
        >>> torch.allclose(found.covariance.diagonal(), torch.tensor(0.5))
        True
    """
    where = "posterior_from_score"
    check_samples(where, "x", x)
    s, a = positive(where, "sigma", sigma, x), positive(where, "alpha", alpha, x)
    score_fn = _bound(where, "score_fn", score_fn, model_kwargs, len(x))
    with said_by(where, "ScoreHessian"):
        hessian = ScoreHessian(
            score_fn, x, symmetrize=symmetrize, chunk_size=chunk_size, check=check
        )
    kappa = noise_covariance(hessian, s)
    truncated = _low_rank(
        where,
        "score_fn at sigma",
        kappa,
        k=rank,
        remainder=remainder,
        n_probes=n_probes,
        probes=probes,
        seed=seed,
        generator=generator,
        first=first,
        floor=floor,
        tolerance=tolerance,
        max_products=max_products,
    )
    mean = posterior_mean(x, hessian.score, sigma, alpha)
    return Posterior(mean, covariance_from_kappa(truncated, s, a))


def posterior_from_velocity(
    velocity_fn: FirstOrderScore,
    x: Tensor,
    schedule: Schedule,
    t: float | Tensor,
    *,
    rank: int,
    remainder: Literal["isotropic", "diagonal"] = "isotropic",
    n_probes: int = 32,
    probes: Probes = "signs",
    seed: int | None = None,
    first: int = 0,
    floor: float = 1e-2,
    tolerance: float = 1e-3,
    max_products: int | None = None,
    symmetrize: bool = True,
    chunk_size: int | None = CHUNK,
    check: bool = True,
    model_kwargs: Conditions | None = None,
    generator: torch.Generator | None = None,
) -> Posterior:
    """Mean and covariance of the clean sample given x_t, from the velocity of a flow model.

    With the velocity v at time t, its Jacobian J and w = alpha sigma' - alpha' sigma,

        E[x0 | x]   = (sigma' x - sigma v) / w                  x - t v             rectified
        Cov[x0 | x] = sigma^2 / (alpha w) (sigma' I - sigma J)  t^2/(1 - t) (I - t J)

    by products with J, replaced by a DPLR as in `posterior_from_score`. Both by way of the score
    are the same, and lose digits towards t = 1. With a `SecondOrderHead` on the `ModelScore` of the
    flow model no products are needed: `tweedie_denoise(AlongSchedule(head, schedule), ...)`.

    Args:
        velocity_fn: maps x (B, *dims) to v = E[alpha' x0 + sigma' z | x] at time t, as
            `ScoreHessian` asks it of a score: `lambda x: net(x, times)`. For a model whose time
            runs from noise to data, its negative.
        x: the noisy sample, x = alpha x0 + sigma z. Shape (B, *dims). float32 or float64.
        schedule: `Rectified()`, or another path.
        t: the time of x, a float or (B,) within [t_min, t_max].
        rank: eigenpairs, 0 ... D.
        remainder, n_probes, probes, seed, first, floor, tolerance, max_products, generator: as
            `posterior_from_score`.
        symmetrize, chunk_size, check: as `ScoreHessian`.
        model_kwargs: conditions: `velocity_fn(x, **model_kwargs)`.

    Returns:
        A `Posterior`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: shapes, dtypes or devices disagree; t is out of the schedule; what
            `ScoreHessian` and its `low_rank` refuse.

    Example:
        Data N(0, I), whose velocity is (2 t - 1) / (t^2 + (1 - t)^2) x: 0.8 x at t = 3/4.

        >>> import torch
        >>> from hos_ext import Rectified
        >>> from hos_ext.uncertainty import posterior_from_velocity
        >>> x, t = torch.ones(1, 2), 0.75
        >>> found = posterior_from_velocity(lambda x: 0.8 * x, x, Rectified(), t, rank=1)
        >>> found.mean, found.covariance.diagonal()
        (tensor([[0.4000, 0.4000]]), tensor([[0.9000, 0.9000]]))
    """
    where = "posterior_from_velocity"
    check_samples(where, "x", x)
    check_schedule(where, schedule)
    name = f"{type(schedule).__name__}.sigma"
    with said_by(where, name):
        sigma = schedule.sigma(t)
    path = Path(
        per_sample(where, "t", sigma, x),
        *(
            per_sample(where, "t", value(t), x)
            for value in (schedule.alpha, schedule.alpha_slope, schedule.sigma_slope)
        ),
    )
    velocity_fn = _bound(where, "velocity_fn", velocity_fn, model_kwargs, len(x))
    with said_by(where, "ScoreHessian", score_fn="velocity_fn"):
        jacobian = ScoreHessian(
            velocity_fn, x, symmetrize=symmetrize, chunk_size=chunk_size, check=check
        )
    slope, shift = (value if value.dim() == 0 else value.flatten() for value in path.kappa())
    kappa = jacobian.scale(slope) + shift
    truncated = _low_rank(
        where,
        "velocity_fn at t",
        kappa,
        k=rank,
        remainder=remainder,
        n_probes=n_probes,
        probes=probes,
        seed=seed,
        generator=generator,
        first=first,
        floor=floor,
        tolerance=tolerance,
        max_products=max_products,
    )
    mean = path.clean(x, jacobian.score)
    return Posterior(mean, covariance_from_kappa(truncated, path.sigma, path.alpha))


def _bound(
    where: str, name: str, function: FirstOrderScore, model_kwargs: Conditions | None, rows: int
) -> FirstOrderScore:
    """The function of x alone."""
    conditions = check_conditions(where, model_kwargs, rows)
    if not conditions:
        return function
    check_callable(where, name, function)
    return partial(function, **conditions)


def _low_rank(where: str, what: str, kappa: ScoreHessian, **options: Any) -> DPLR:
    """`ScoreHessian.low_rank`, whose errors name the public function and what it was given."""
    function = what.partition(" ")[0]
    with said_by(
        where,
        "ScoreHessian.low_rank",
        k="rank",
        the=f"{what}: the",
        products=f"products of {function}",
    ):
        return kappa.low_rank(**options)
