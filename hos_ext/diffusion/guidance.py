"""Guidance for linear inverse problems y = A x0 + n, n ~ N(0, V), V = diag(noise_std^2).

With x0 | x ~ N(m, C) at noise level sigma (`posterior`; C is a DPLR) the law of x0 | x, y is
    N(m + shift, C_y),  shift = C A^T S^-1 (y - A m),  C_y = C - C A^T S^-1 A C,  S = A C A^T + V.
Since dm/dx = (alpha / sigma^2) C, the score of p(x | y) is s1 + (alpha / sigma^2) shift. The
learned covariance takes the place of backpropagation through the network. This is exact if x0 is
Gaussian.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check, check_kind, check_samples, positive, refuse_dropout
from ..conditions import check_conditions
from ..schedules import Schedule, check_schedule
from ..scores import Model, Scores, model_scores
from ..tweedie.posterior import Posterior, posterior
from .conditioning import check_stop, closed_form, iterated, refuse_small_noise, round_law
from .measurement import Measurement, moments_of, problem_of, residual_of


def condition(
    posterior: Posterior, y: Tensor, operator: Tensor, noise_std: float | Tensor
) -> Posterior:
    """x0 | x, y: the whole Gaussian, mean and covariance, for a mask or a matrix.

    With C = diag(d) + U diag(sign) U^T, x0 = m + sqrt(d) z1 + U z2. Given z2, y tells about z1
    through N = A diag(d) A^T + V = L L^T; then about z2 through the columns L^-1 A U that are left:

        C_y = diag(d) - E E^T + W K^-1 W^T,   E = diag(d) A^T L^-T,  W = U - E L^-1 A U,
        K = diag(sign) + (L^-1 A U)^T (L^-1 A U),   rank r.

    For a mask diag(d) - E E^T is diagonal, d v / (d + v) at observed entries, without cancellation.
    All of it is computed in float64, whatever the dtype of the result.

    Args:
        posterior: of x0 given the noisy sample. mean (B, *dims), float32 or float64; covariance
            with diagonal part >= 0 (> 0 as a whole where a sign is -1).
        y: measurements. Shape (B, m), or (1, m) for one shared by all samples; dtype and device of
            the mean.
        operator: a boolean mask of shape dims, true where observed (inpainting): A x is x[:, mask],
            so m = mask.sum(), row-major; O(D r^2). Or a matrix A, shape (m, D), D in row-major
            order of dims; O(m D r + m^2 D + m^3) for each sample.
        noise_std: standard deviation of n, > 0 (at 0 S may be singular). Float, or (m,), one for
            each measurement. Units of y.

    Returns:
        Posterior. Its covariance has rank r for a mask (signs as before), r + m for a matrix (m
        columns of sign -1).

    Raises:
        TypeError: an argument of the wrong kind; an operator of functions.
        ValueError: shapes, dtypes or devices disagree; noise_std is not positive; y or the matrix
            is not finite; the covariance is not finite or negative; noise_std is too small for
            float64, or, with a matrix, for the dtype of the mean to hold the variances.

    Example:
        Two entries that vary together, of which the first is measured.

        >>> import torch
        >>> from hos_ext import DPLR, Posterior
        >>> from hos_ext.diffusion import condition
        >>> covariance = DPLR(torch.full((1, 2), 0.1), torch.ones(1, 2, 1))
        >>> prior = Posterior(torch.zeros(1, 2), covariance)
        >>> seen = torch.tensor([True, False])
        >>> found = condition(prior, torch.ones(1, 1), seen, noise_std=0.1)
        >>> found.mean
        tensor([[0.9910, 0.9009]])
        >>> found.std
        tensor([[0.0995, 0.4462]])
    """
    where = "condition"
    if not isinstance(operator, Tensor):
        raise TypeError(
            f"{where}: operator must be a boolean mask or a matrix, got {type(operator).__name__} "
            "(for functions, whose C_y is no DPLR, condition_mean gives the mean)"
        )
    problem = problem_of(where, y, operator, noise_std)
    mean, covariance = moments_of(where, posterior)
    shift, law = closed_form(where, problem, covariance, residual_of(where, problem, mean))
    held = round_law(where, problem, covariance, law())
    if operator.dtype != torch.bool:
        bad = covariance.is_positive_definite() & ~held.is_positive_definite()
        refuse_small_noise(where, problem, bad, f"for {mean.dtype} to hold the posterior variances")
    return Posterior(mean + shift.reshape(mean.shape), held)


def condition_mean(
    posterior: Posterior,
    y: Tensor,
    operator: Measurement,
    noise_std: float | Tensor,
    *,
    tolerance: float | None = None,
    max_iterations: int = 1000,
) -> Tensor:
    """E[x0 | x, y] = m + C A^T S^-1 (y - A m), for every kind of operator.

    Masks and matrices: as `condition`. Functions: conjugate gradients on the whitened system
    V^-1/2 S V^-1/2 = I + V^-1/2 A C A^T V^-1/2, whose condition number is 1 + |A C A^T| / noise^2;
    each iteration calls both functions once. Every sample stops by itself.

    Args:
        posterior, noise_std: as `condition`; with functions noise_std is a float or has the shape
            ydims of one measurement.
        y: measurements. Shape (B, *ydims), or (1, *ydims) for one shared by all samples.
        operator: as `condition`, or a pair (matvec, rmatvec): A from (B, *dims) to (B, *ydims), and
            its adjoint, each linear and sample by sample. <A v, u> = <v, A^T u> is checked once.
        tolerance: of the residual over the right side, both whitened, > 0. None is 1e-4 in float32,
            1e-6 in float64.
        max_iterations: of conjugate gradients, >= 1.

    Returns:
        As posterior.mean.

    Raises:
        TypeError, ValueError: as `condition`; functions that are not adjoint to each other.
        RuntimeError: no convergence.

    Example:
        The same for an operator that is given by two functions.

        >>> import torch
        >>> from hos_ext import DPLR, Posterior
        >>> from hos_ext.diffusion import condition_mean
        >>> covariance = DPLR(torch.full((1, 2), 0.1), torch.ones(1, 2, 1))
        >>> prior = Posterior(torch.zeros(1, 2), covariance)
        >>> def measure(x):
        ...     return x[:, :1]
        >>> def adjoint(y):
        ...     return torch.nn.functional.pad(y, (0, 1))
        >>> condition_mean(prior, torch.ones(1, 1), (measure, adjoint), noise_std=0.1)
        tensor([[0.9910, 0.9009]])
    """
    where = "condition_mean"
    problem = problem_of(where, y, operator, noise_std)
    tolerance = check_stop(where, tolerance, max_iterations, problem.y)
    mean, covariance = moments_of(where, posterior)
    residual = residual_of(where, problem, mean)
    if isinstance(operator, Tensor):
        shift = closed_form(where, problem, covariance, residual)[0]
    else:
        dims = tuple(mean.shape[1:])
        shift = iterated(where, problem, covariance, residual, dims, tolerance, max_iterations)
    return mean + shift.reshape(mean.shape)


def guided(
    model: Model,
    y: Tensor,
    operator: Measurement,
    noise_std: float | Tensor,
    schedule: Schedule,
    *,
    with_covariance: bool = True,
    tolerance: float | None = None,
    max_iterations: int = 1000,
) -> Model:
    """A model of p(x_t | y), for the samplers of `diffusion`, from a model of p(x_t).

        sigma s1' = sigma s1 + (alpha / sigma) shift,   diag(c') + F' diag(sign') F'^T = (alpha /
        sigma)^2 C_y,

    with `shift` and C_y of `condition` at every call. The first two moments of the model are
    matched and nothing is differentiated. This is exact for a Gaussian x0 with its exact scores.
    Elsewhere the law of x0 | x_t is taken for Gaussian, an error that vanishes with sigma.

    Args:
        model: `model(x, sigma) -> Scores`.
        y, operator, noise_std, tolerance, max_iterations: as `condition_mean`. With y of B rows
            every call must have B rows: no chunk_size in the samplers.
        schedule: a `Schedule`: the alpha that goes with sigma.
        with_covariance: False: the score alone and c = NaN, which `reverse_sde`,
            `probability_flow_ode` and first-order correctors do not look at and second-order steps
            refuse. The only choice for an operator of functions, whose C_y is no DPLR.

    Returns:
        A function (x, sigma, **model_kwargs) -> Scores, which hands the conditions that a sampler
        brings on to the model. It raises what `condition_mean` and the model raise.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range; a model with active
            dropout.

    References:
        Boys et al. 2023, arXiv:2310.06721 (moment matching, there by backprop); Song et al. 2023,
        Pseudoinverse-guided diffusion (C = r^2 I, the score by backprop).

    Example:
        Data N(0, I), whose scores under `VP` are known; the first entry is measured to be 1.

        >>> import torch
        >>> from hos_ext import VP, Scores
        >>> from hos_ext.diffusion import guided, prior, second_order_reverse
        >>> def model(x, sigma):
        ...     level = sigma.unsqueeze(1)
        ...     return Scores(-level * x, (1 - level**2).expand_as(x))
        >>> seen = torch.tensor([True, False])
        >>> given = guided(model, torch.ones(1, 1), seen, 0.1, VP())
        >>> start = prior((1000, 2), VP(), seed=0)
        >>> x = second_order_reverse(given, start, VP(), n_steps=10, seed=0)
        >>> bool((x.mean(0) - torch.tensor([1.0, 0.0])).abs().max() < 0.1)
        True
    """
    where = "guided"
    refuse_dropout(where, model)
    check_schedule(where, schedule)
    check_kind(where, "with_covariance", with_covariance, bool)
    rule = "with_covariance must be False for an operator of functions (C_y is no DPLR)"
    check(where, not (with_covariance and isinstance(operator, tuple)), rule, True)
    problem = problem_of(where, y, operator, noise_std)
    tolerance = check_stop(where, tolerance, max_iterations, problem.y)

    def conditioned(x: Tensor, sigma: Tensor | float, /, **model_kwargs: Any) -> Scores:
        check_samples(where, "x", x)
        conditions = check_conditions(where, model_kwargs, len(x))
        scores = model_scores(where, model, x, sigma, conditions)
        level = positive(where, "sigma", sigma, x)
        alpha = schedule.alpha(schedule.t_of_sigma(sigma))
        ratio = positive(where, "alpha", alpha, x) / level
        mean, spread = moments_of(where, posterior(x, scores, sigma, alpha))
        residual = residual_of(where, problem, mean)
        c, factor, sign = torch.full_like(x, torch.nan), None, None
        if isinstance(operator, Tensor):
            shift, law = closed_form(where, problem, spread, residual)
            if with_covariance:
                hint = " (with_covariance=False needs none)"
                scaled = round_law(where, problem, spread, law(), hint)
                scaled = scaled.scale(ratio.square().flatten())
                c, factor, sign = scaled.diag.reshape(x.shape), scaled.factor, scaled.sign
        else:
            dims = tuple(x.shape[1:])
            shift = iterated(where, problem, spread, residual, dims, tolerance, max_iterations)
        return Scores(scores.scaled_score + ratio * shift.reshape(x.shape), c, factor, sign)

    return conditioned
