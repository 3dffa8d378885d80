"""The objectives of Theorem 2 on moments, Eq. 11 and 12: what Eq. 13 is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_like, check_samples, check_tensor, positive
from ..tweedie.moments import bell, posterior_moments
from .reduction import Reduction, check_reduction, summed


def second_moment_loss(
    x0: Tensor,
    x: Tensor,
    score: Tensor,
    hessian: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Eq. 11, |x0 x0^T - E_model[x0 x0^T | x]|^2: a reference, not to be trained on.

    alpha^2 times its residual is -sigma^4 (psi + C) - sigma sym(x (z + sigma s1)^T), against
    psi + C of Eq. 13, with C = (I - z z^T) / sigma^2 and sym(A) = A + A^T. The second term has mean
    zero only where s1 is exact. With s1 off by delta the minimiser is
    psi - sym(x delta^T) / sigma^2, where Eq. 12 and 13 (`d2sm_loss`) still learn psi. And its
    gradient has variance sigma^-6 against sigma^-4 (after division by sigma^8).

    Args:
        x0: clean samples. Shape (B, *dims). float32 or float64. Data units.
        x: noisy samples alpha x0 + sigma z, same shape, dtype and device.
        score: the model of s1 at x. Shape (B, *dims). Units 1/data.
        hessian: the model of s2 at x. Shape (B, D, D), D in row-major order of dims; small D.
            Units 1/data^2.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.
        reduction: "mean" or "sum" over the batch, or "none".

    Returns:
        The loss, summed over entries, constants included: a scalar, or (B,) with
        reduction="none". Units data^4.

    Raises:
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.

    References:
        Meng et al. 2021, arXiv:2111.04726, Theorem 2, Eq. 11, with alpha.

    Example:
        >>> import torch
        >>> from hos_ext.losses import second_moment_loss
        >>> x, eye = torch.tensor([[0.5, -0.5]]), torch.eye(2).unsqueeze(0)
        >>> # The scores of samples that are all 0, at sigma = 1/2.
        >>> second_moment_loss(torch.zeros(1, 2), x, -4 * x, -4 * eye, 0.5)
        tensor(0.)
    """
    where = "second_moment_loss"
    _check_arguments(where, x0, x, score, hessian, sigma, alpha, reduction)
    model = posterior_moments(x, [score.flatten(1), hessian], sigma, alpha)[1]
    return summed((_outer(x0) - model).square(), reduction)


def noise_moment_loss(
    x0: Tensor,
    x: Tensor,
    score: Tensor,
    hessian: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Eq. 12, |(alpha x0 - x)(alpha x0 - x)^T - sigma^2 I - sigma^4 psi|^2: a reference.

    It is sigma^8 times Eq. 13, |psi + (I - z z^T) / sigma^2|^2: `d2sm_loss` plus its constant.

    Args:
        x0, x, score, hessian, sigma, alpha, reduction: as `second_moment_loss`.

    Returns:
        The loss, summed over entries, constants included: a scalar, or (B,) with
        reduction="none". Units data^4.

    Raises:
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.

    References:
        Meng et al. 2021, arXiv:2111.04726, Theorem 2, Eq. 12, with alpha.

    Example:
        >>> import torch
        >>> from hos_ext.losses import noise_moment_loss
        >>> x, eye = torch.tensor([[0.5, -0.5]]), torch.eye(2).unsqueeze(0)
        >>> # The scores of samples that are all 0, at sigma = 1/2.
        >>> noise_moment_loss(torch.zeros(1, 2), x, -4 * x, -4 * eye, 0.5)
        tensor(0.)
    """
    where = "noise_moment_loss"
    s, a = _check_arguments(where, x0, x, score, hessian, sigma, alpha, reduction)
    variance = s.square().reshape(-1, 1, 1)
    eye = torch.eye(hessian.shape[-1], dtype=x.dtype, device=x.device)
    psi = bell([score.flatten(1), hessian], 2, True)[1]
    residual = _outer(a * x0 - x) - variance * eye - variance.square() * psi
    return summed(residual.square(), reduction)


def _outer(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return flat.unsqueeze(-1) * flat.unsqueeze(-2)


def _check_arguments(
    where: str,
    x0: Tensor,
    x: Tensor,
    score: Tensor,
    hessian: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor,
    reduction: Reduction,
) -> tuple[Tensor, Tensor]:
    """sigma and alpha, shaped to broadcast against x."""
    check_samples(where, "x0", x0)
    check_like(where, "x", x, x0)
    check_like(where, "score", score, x0)
    size = x0.shape[1:].numel()
    check_tensor(where, "hessian", hessian, like=x0, shape=(x0.shape[0], size, size))
    check_reduction(where, reduction)
    return positive(where, "sigma", sigma, x0), positive(where, "alpha", alpha, x0)
