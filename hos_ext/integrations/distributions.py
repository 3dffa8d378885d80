"""The laws of `torch.distributions` and ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributions

from ..checks import check, check_kind, kind_name
from ..densities import Gaussian, GaussianMixture
from ..linalg.dplr import DPLR
from ..tweedie.posterior import Posterior


def to_distribution(law: Posterior | Gaussian | GaussianMixture) -> distributions.Distribution:
    """A law of ours as one of `torch.distributions`, over flat samples (event shape (D,)).

    Args:
        law: a `Posterior` becomes a batch of `LowRankMultivariateNormal` (the method of that name),
            a `Gaussian` a `MultivariateNormal`, a `GaussianMixture` a `MixtureSameFamily` of them.

    Raises:
        TypeError: law is of another kind.
        ValueError: a posterior that `LowRankMultivariateNormal` cannot hold: a sign -1, or a
            diagonal part that is not positive.

    Example:
        >>> import torch
        >>> from hos_ext.densities import Gaussian
        >>> from hos_ext.integrations import to_distribution
        >>> to_distribution(Gaussian(torch.zeros(2), torch.eye(2))).log_prob(torch.zeros(2))
        tensor(-1.8379)
    """
    check_kind("to_distribution", "law", law, (Posterior, Gaussian, GaussianMixture))
    if isinstance(law, Posterior):
        return law.to_distribution()
    if isinstance(law, Gaussian):
        return distributions.MultivariateNormal(law.mean, law.covariance)
    return distributions.MixtureSameFamily(
        distributions.Categorical(probs=law.weights),
        distributions.MultivariateNormal(law.means, law.covariances),
    )


def from_distribution(
    law: distributions.Distribution, dims: Sequence[int] | None = None
) -> Posterior | Gaussian | GaussianMixture:
    """A law of `torch.distributions` as one of ours.

    Args:
        law: `LowRankMultivariateNormal` becomes a `Posterior`, its batch shape () or (B,);
            `MultivariateNormal` without a batch a `Gaussian`; `MixtureSameFamily` without a batch,
            of normal parts (the two above, or `Independent` of `Normal`), a `GaussianMixture`.
        dims: shape of a sample of the posterior, of D entries; None is (D,).

    Raises:
        TypeError: law is of another kind, or a mixture of other parts.
        ValueError: it has another batch shape; dims has another number of entries, or is given for
            a law that is no posterior.

    Example:
        >>> import torch
        >>> from hos_ext.integrations import from_distribution
        >>> law = torch.distributions.LowRankMultivariateNormal(
        ...     torch.zeros(3, 4), torch.ones(3, 4, 1), torch.ones(3, 4)
        ... )
        >>> from_distribution(law, dims=(2, 2))
        Posterior(3 x (2, 2), rank 1)
    """
    where = "from_distribution"
    if isinstance(law, distributions.LowRankMultivariateNormal):
        _check_batch(where, law, "() or (B,)", 1)
        size = law.event_shape[0]
        shape = (size,) if dims is None else tuple(dims)
        check(where, math.prod(shape) == size, f"dims must have {size} entries", shape)
        mean = law.loc.reshape(-1, size)
        diag, factor = law.cov_diag.reshape(-1, size), law.cov_factor
        covariance = DPLR(diag, factor.reshape(-1, size, factor.shape[-1]))
        return Posterior(mean.reshape(-1, *shape), covariance)
    check(where, dims is None, "dims must be None but for a LowRankMultivariateNormal", dims)
    if isinstance(law, distributions.MultivariateNormal):
        _check_batch(where, law, "()", 0)
        return Gaussian(law.loc, law.covariance_matrix)
    if not isinstance(law, distributions.MixtureSameFamily):
        kinds = "a LowRankMultivariateNormal, MultivariateNormal or MixtureSameFamily"
        raise TypeError(f"{where}: law must be {kinds}, got {kind_name(law)}")
    _check_batch(where, law, "()", 0)
    means, covariances = _normal_parts(where, law.component_distribution)
    weights = law.mixture_distribution.probs.to(means.dtype)
    return GaussianMixture(weights, means, covariances)


def _check_batch(where: str, law: distributions.Distribution, rule: str, most: int) -> None:
    shape = tuple(law.batch_shape)
    check(where, len(shape) <= most, f"law must have batch shape {rule}", shape)


def _normal_parts(where: str, parts: Any) -> tuple[Tensor, Tensor]:
    """Means (K, D) and covariances (K, D, D) of the parts of a mixture."""
    full = (distributions.MultivariateNormal, distributions.LowRankMultivariateNormal)
    if isinstance(parts, full):
        return parts.loc, parts.covariance_matrix
    base = getattr(parts, "base_dist", None)
    single = isinstance(parts, distributions.Independent) and isinstance(base, distributions.Normal)
    if single and len(parts.event_shape) == 1:
        return parts.mean, torch.diag_embed(parts.variance)
    got = f"{type(parts).__name__} of {type(base).__name__}" if base else type(parts).__name__
    raise TypeError(f"{where}: parts of law must be normal laws over vectors, got {got}")
