"""What posterior means got wrong, for all that judges posteriors by samples with known truth."""

from __future__ import annotations

from torch import Tensor

from ..checks import check, check_kind, check_number, check_tensor
from ..tweedie.posterior import Posterior, check_posterior


def residual_of(where: str, x0: Tensor, posterior: Posterior, tau: float) -> Tensor:
    """x0 - m in float64, flat (B, D), after checking the arguments."""
    mean = check_kind(where, "posterior", posterior, Posterior).mean
    check_posterior(where, posterior)
    shape, because = tuple(mean.shape), " like posterior.mean"
    check_tensor(where, "x0", x0, like=mean, shape=shape, because=because)
    check(where, len(shape) > 1 and shape[0] > 0, "x0 must have shape (B, *dims), B >= 1", shape)
    number = check_number(where, "tau", tau, positive=False)
    check(where, number < 1e150, "tau must be below 1e150, whose square is finite", f"{number:g}")
    return (x0 - mean).flatten(1).double()
