"""What n independent observations say together about the clean sample, from what each says alone.

With observations y_1, ..., y_n that are independent given x0, and the noisy sample x,

    p(x0 | x, y_1..n)  ~  p(x0 | x)^(1 - n)  prod_j p(x0 | x, y_j),

for x0 | y_j is p(x0) p(y_j | x0) up to a constant, and the noise p(x | x0) enters the right side
n + 1 - n = 1 times. With p(x0 | x, y_j) = N(m_j, C_j) and p(x0 | x) = N(m_0, C_0) that is N(m, C),

    C^-1 = sum_j C_j^-1 + (1 - n) C_0^-1,    m = m_0 + C sum_j C_j^-1 (m_j - m_0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check, check_kind, check_number, check_tensor
from ..linalg.derivatives import derivative_wanted
from ..linalg.dplr import DPLR
from ..linalg.precision import Precision, at_least, covariance_of, precision_of
from .posterior import Posterior, check_posterior


def product_of_posteriors(
    posteriors: Sequence[Posterior], unconditional: Posterior, *, widest: float | None = 1.0
) -> Posterior:
    """x0 | x, y_1, ..., y_n from x0 | x, y_j of each observation and x0 | x of none.

    The formula is at the top of `hos_ext.tweedie.products`. It is exact where x0 and all x0 | y_j
    are Gaussian. Elsewhere the laws given x are taken for Gaussian, an error that vanishes with
    sigma. No D x D matrix is formed while the columns of all factors are fewer than D; the cost is
    O(D R^2) for R columns, and O(D^2 R) beyond.

    A product of Gaussians need not be one: where C_j passes C_0, as with two modes, C^-1 may have a
    negative eigenvalue. `widest` is what observations can at most do to the covariance.

    Args:
        posteriors: n >= 1 of them at the same noisy samples, each (B, *dims), float32 or float64,
            with positive definite covariances whose diagonal part is > 0.
        unconditional: the posterior without an observation, at the same samples: how the prior
            enters. With n = 1 it drops out.
        widest: C <= widest * C_0 as matrices, > 0. C^-1 is kept from falling below C_0^-1 / widest:
            its eigenvalues below that are lifted to it, with fewer than D columns in all after the
            diagonal part has been by itself. 1: to observe something does not widen the law,
            which is so for Gaussians, where nothing is cut. None: an indefinite product is refused.

    Returns:
        Posterior in the dtype of the means, computed in float64. Its factor has at most D columns;
        but of both signs, and twice as many, where unconditional has a factor, or a posterior
        signs, and all columns together are fewer than D.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: no posterior; shapes, dtypes or devices disagree; a covariance is not finite or
            not positive definite; with widest=None, the product's is not.
        RuntimeError: a gradient or a `torch.func` transform is asked for: this is not
            differentiated (`torch.no_grad()`).

    References:
        Linhart et al. 2024, arXiv:2404.07593 (the composition of second order); Geffner et al.
        2023, arXiv:2209.14249 (scores of single observations).

    Example:
        Two measurements, each as exact as the prior: the variance of the three is a third.

        >>> import torch
        >>> from hos_ext import DPLR, Posterior
        >>> from hos_ext.tweedie import product_of_posteriors
        >>> def law(mean, variance):
        ...     return Posterior(torch.tensor([[mean]]), DPLR(torch.tensor([[variance]])))
        >>> found = product_of_posteriors([law(0.5, 0.5), law(1.0, 0.5)], law(0.0, 1.0))
        >>> found.mean, found.covariance.diagonal()
        (tensor([[1.]]), tensor([[0.3333]]))
    """
    where = "product_of_posteriors"
    check_kind(where, "unconditional", unconditional, Posterior)
    check_posterior(where, unconditional, "unconditional.")
    check_kind(where, "posteriors", posteriors, Sequence)
    check(where, len(posteriors) > 0, "posteriors must hold at least one", "none")
    like = unconditional.mean
    for number, each in enumerate(posteriors):
        name = f"posteriors[{number}]"
        check_kind(where, name, each, Posterior)
        check_posterior(where, each, f"{name}.")
        check_tensor(where, f"{name}.mean", each.mean, like=like, shape=tuple(like.shape))
    widest = check_widest(where, widest)
    laws = [(f"posteriors[{number}]", each) for number, each in enumerate(posteriors)]
    for name, law in [("unconditional", unconditional), *laws]:
        check_law(where, name, law.mean, law.covariance)
    if len(posteriors) == 1:
        return posteriors[0]
    base = unconditional.covariance
    prior = _inverse(where, "unconditional", base)
    centre = like.flatten(1).double()
    total, pull, plain = None, torch.zeros_like(centre), base.rank == 0
    for name, law in laws:
        precision = _inverse(where, name, law.covariance)
        pull = pull + precision.times(law.mean.flatten(1).double() - centre)
        total = precision if total is None else total.plus(precision)
        plain = plain and law.covariance.sign is None
    assert total is not None
    covariance = product_covariance(where, total, len(posteriors), prior, widest, plain)
    mean = centre + covariance.matvec(pull)
    return Posterior(mean.to(like.dtype).reshape(like.shape), covariance.to(like.dtype))


def product_covariance(
    where: str, total: Precision, n: int, prior: Precision, widest: float | None, plain: bool
) -> DPLR:
    """C, in float64, from the sum of the n precisions and that of the law without observation.

    Args:
        where: the public function.
        total: sum_j C_j^-1.
        n: number of observations.
        prior: C_0^-1.
        widest: as `product_of_posteriors`, checked.
        plain: C_0 has no factor, and the C_j have no signs.

    Raises:
        ValueError: C^-1 is not positive definite.
    """
    if widest is None:
        whole = total.plus(prior.scaled(1 - n))
    else:
        whole = at_least(total, prior, n, 1 / widest)
    covariance, fine = covariance_of(whole, plain)
    check(
        where,
        bool(fine.all()),
        "the precision of the product must be positive definite (widest=1.0 cuts it)",
        lambda: f"one that is not for sample {int((~fine).nonzero()[0])}",
    )
    return covariance


def check_widest(where: str, widest: float | None) -> float | None:
    """A positive number, or None."""
    return None if widest is None else check_number(where, "widest", widest)


def check_law(where: str, name: str, mean: Tensor, covariance: DPLR) -> None:
    """Finite numbers, and no derivative that is asked of them."""
    parts = (mean, covariance.diag, covariance.factor)
    if derivative_wanted(*parts):
        rule = f"{name} must be without derivatives (torch.no_grad)"
        raise RuntimeError(f"{where}: {rule}, got tensors that want one")
    finite = all(bool(part.isfinite().all()) for part in parts)
    check(where, finite, f"{name} must be finite", "NaN or inf")


def _inverse(where: str, name: str, covariance: DPLR) -> Precision:
    precision, fine = precision_of(covariance.diag, covariance.factor, covariance.sign)
    refuse_indefinite(where, name, fine)
    return precision


def refuse_indefinite(where: str, name: str, fine: Tensor) -> None:
    """Names the first sample whose covariance is not positive definite."""
    check(
        where,
        bool(fine.all()),
        f"the covariance of {name} must be positive definite, its diagonal part > 0",
        lambda: f"one that is not for sample {int((~fine).nonzero()[0, -1])}",
    )
