"""The posterior of a first-order model: its covariance by products with the score's Jacobian."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor

from ..checks import check_callable, check_samples, positive, said_by
from ..conditions import Conditions, check_conditions
from ..linalg.autodiff import CHUNK
from ..linalg.jacobian import ScoreHessian
from ..scores import FirstOrderScore
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
    seed: int | None = None,
    first: int = 0,
    floor: float = 1e-2,
    tolerance: float = 1e-3,
    max_products: int | None = None,
    symmetrize: bool = True,
    chunk_size: int | None = CHUNK,
    check: bool = True,
    model_kwargs: Conditions | None = None,
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
        remainder, n_probes, seed, first, floor: as `ScoreHessian.low_rank`.
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
    conditions = check_conditions(where, model_kwargs, len(x))
    if conditions:
        check_callable(where, "score_fn", score_fn)
        score_fn = partial(score_fn, **conditions)
    with said_by(where, "ScoreHessian"):
        hessian = ScoreHessian(
            score_fn, x, symmetrize=symmetrize, chunk_size=chunk_size, check=check
        )
    kappa = noise_covariance(hessian, s)
    with said_by(
        where,
        "ScoreHessian.low_rank",
        k="rank",
        the="score_fn at sigma: the",
        products="products of score_fn",
    ):
        truncated = kappa.low_rank(
            rank,
            remainder=remainder,
            n_probes=n_probes,
            seed=seed,
            first=first,
            floor=floor,
            tolerance=tolerance,
            max_products=max_products,
        )
    mean = posterior_mean(x, hessian.score, sigma, alpha)
    return Posterior(mean, covariance_from_kappa(truncated, s, a))
