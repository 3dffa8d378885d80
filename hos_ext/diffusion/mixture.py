"""The posterior of x0 as a mixture of Gaussians: where one Gaussian is the wrong shape.

At much noise the law of x0 given x has several modes, and N(m, C) has its mean between them. Given
a less noisy x_s it has fewer. Since x0 depends on x through x_s alone,

    p(x0 | x) = E[ p(x0 | x_s) | x ],

and K draws of x_s given x, each with the posterior of the model there, are a mixture of K low-rank
Gaussians: p(x0 | x) ~ mean_k N(x0; m(x_k), C(x_k)). The draws come from the second-order reverse
process, from sigma down to `middle`. With exact scores and steps enough the mixture's mean and
covariance have the right expectation for every K, by the laws of total expectation and variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    check,
    check_callable,
    check_count,
    check_kind,
    check_number,
    check_samples,
    check_tensor,
)
from ..conditions import Conditions, check_conditions, condition_rows
from ..linalg.dplr import DPLR
from ..random import seed_from
from ..records import Record
from ..schedules import VE
from ..scores import Model, model_scores
from ..tweedie.posterior import Posterior, check_posterior, posterior
from .inputs import noise_key
from .reverse import second_order_reverse


@dataclass(frozen=True, eq=False, repr=False)
class PosteriorMixture(Record):
    """The law of x0 given x as K Gaussians of equal weight, for each sample of a batch.

    Attributes:
        components: all of them, B K Gaussians; those of a sample follow one another.
        count: K.
    """

    components: Posterior
    count: int

    def _summary(self) -> str:
        mean = self.components.mean
        rank = self.components.covariance.rank
        return f"{len(self)} x {self.count} x {tuple(mean.shape[1:])}, rank {rank}"

    def __len__(self) -> int:
        return len(self._checked("PosteriorMixture.len").components.mean) // self.count

    def _checked(self, where: str) -> PosteriorMixture:
        """The two fields fit each other still: anyone may change them."""
        check_kind(where, "components", self.components, Posterior)
        check_posterior(where, self.components, "components.")
        count, rows = check_count(where, "count", self.count), len(self.components.mean)
        check(where, rows % count == 0, f"components must be {count} for each sample", rows)
        return self

    @property
    def mean(self) -> Tensor:
        """Of the mixture, shape (B, *dims). Units of the data."""
        self._checked("PosteriorMixture.mean")
        return self._apart(self.components.mean).mean(1)

    @property
    def std(self) -> Tensor:
        """Of each entry of the mixture, shape (B, *dims): within components and between them."""
        self._checked("PosteriorMixture.std")
        within = self.components.covariance.diagonal().reshape(self.components.mean.shape)
        means = self._apart(self.components.mean)
        return (self._apart(within).mean(1) + means.var(1, correction=0)).sqrt()

    def gaussian(self) -> Posterior:
        """The Gaussian with mean and covariance of the mixture; its rank is K (r + 1)."""
        self._checked("PosteriorMixture.gaussian")
        covariance, k = self.components.covariance, self.count
        mean, means = self.mean, self._apart(self.components.mean)
        between = (means - mean.unsqueeze(1)).flatten(2).mT / math.sqrt(k)
        batch, size = len(self), between.shape[1]
        within = covariance.factor.reshape(batch, k, size, -1).movedim(1, 2).flatten(2)
        sign = covariance.sign
        if sign is not None:
            sign = torch.cat([sign.repeat(k), sign.new_ones(k)])
        diag = covariance.diag.reshape(batch, k, size).mean(1)
        factor = torch.cat([within / math.sqrt(k), between], 2)
        return Posterior(mean, DPLR.of(diag, factor, sign))

    def log_prob(self, x0: Tensor) -> Tensor:
        """Log-density of the mixture at x0 (B, *dims), in nats. Shape (B,).

        Raises:
            ValueError: x0 does not fit; a component whose covariance is not positive definite.
            TypeError: x0 is no tensor.
        """
        where = "PosteriorMixture.log_prob"
        mean = self._checked(where).components.mean
        check_tensor(where, "x0", x0, like=mean, shape=(len(self), *mean.shape[1:]))
        each = self.components.log_prob(x0.repeat_interleave(self.count, 0))
        return each.reshape(-1, self.count).logsumexp(1) - math.log(self.count)

    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        offset: int = 0,
        first: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n draws of the mixture, stratified: draw j comes from component j mod K.

        Shape (n, B, *dims); arguments as `Posterior.sample`. Components are exchangeable, so each
        draw has the law of the mixture; K in a row are surer of its mean than independent ones.
        """
        where = "PosteriorMixture.sample"
        mean = self._checked(where).components.mean
        n = check_count(where, "n", n)
        draws = self.components.sample(
            math.ceil(n / self.count),
            seed=seed,
            offset=offset,
            first=first * self.count,
            generator=generator,
        )
        shape = (-1, len(self), self.count, *mean.shape[1:])
        return draws.reshape(shape).movedim(2, 1).flatten(0, 1)[:n]

    def _apart(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(self), self.count, *rows.shape[1:])


@torch.no_grad()
def posterior_mixture(
    model: Model,
    x: Tensor,
    sigma: float,
    *,
    middle: float | None = None,
    n_components: int = 16,
    n_steps: int = 4,
    seed: int | None = None,
    first: int = 0,
    chunk_size: int | None = None,
    model_kwargs: Conditions | None = None,
    generator: torch.Generator | None = None,
) -> PosteriorMixture:
    """The posterior of x0 given x = x0 + sigma z as a mixture of low-rank Gaussians.

    Each component is the model's posterior at a draw x_s of the noisy sample at level `middle`,
    by `n_steps` steps of `second_order_reverse` from x. The cost is n_components (n_steps + 1)
    model calls a sample, where one Gaussian takes one.

    It pays where the posterior has several modes or a bent shape, and not where N(m, C) is right.
    Take `middle` where the posterior has become one mode; too small a level makes the components
    narrow, so that K of them no longer cover the law.

    Args:
        model: `model(x, sigma, **model_kwargs) -> Scores` with c, for plain noise; for a schedule
            with alpha, give x / alpha and sigma / alpha.
        x: noisy samples. Shape (B, *dims), float32 or float64. Data units.
        sigma: noise level of all of them, > 0. Data units.
        middle: noise level of the components, in (0, sigma); None is sigma / 4. Data units.
        n_components: K.
        n_steps: steps from sigma to middle.
        seed: key of the noise. None draws one from torch's default generator.
        first: global index of row 0: any chunks draw the same noise.
        chunk_size: rows of the model's batch at a time, of the B K. None: all.
        model_kwargs: conditions; each tensor has one row for each sample.
        generator: a `torch.Generator` in place of seed, which is drawn from it.

    Returns:
        PosteriorMixture, with mean, std, `log_prob`, `sample` and `gaussian`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; as
            `second_order_reverse`.

    Example:
        Two points at -1 and 1, whose scores are known: the posterior has two modes.

        >>> import torch
        >>> from hos_ext import Scores
        >>> from hos_ext.diffusion import posterior_mixture
        >>> def model(x, sigma):
        ...     sigma = sigma.reshape(-1, 1)
        ...     mean = torch.tanh(x / sigma**2)
        ...     return Scores((mean - x) / sigma, (1 - mean**2) / sigma**2)
        >>> found = posterior_mixture(model, torch.zeros(1, 1), 1.0, middle=0.3, seed=0, n_steps=20)
        >>> found
        PosteriorMixture(1 x 16 x (1,), rank 0)
        >>> one = found.components.mean.abs()  # at an end each, where N(m, C) has its mean at 0
        >>> bool((one > 0.8).double().mean() > 0.8)
        True
    """
    where = "posterior_mixture"
    check_callable(where, "model", model)
    check_samples(where, "x", x)
    sigma = check_number(where, "sigma", sigma)
    middle = sigma / 4 if middle is None else check_number(where, "middle", middle)
    check(where, middle < sigma, f"middle must be below sigma, {sigma:g}", middle)
    count = check_count(where, "n_components", n_components)
    steps = check_count(where, "n_steps", n_steps)
    conditions = check_conditions(where, model_kwargs, len(x), "x")
    key = noise_key(where, (len(x),), seed_from(where, seed, generator), first=first)
    rows = torch.arange(len(x), device=x.device).repeat_interleave(count)
    told, path = condition_rows(conditions, rows), VE(middle, sigma)
    place: dict[str, Any] = {"seed": key.seed, "first": key.first * count}
    near = second_order_reverse(
        model,
        x.index_select(0, rows),
        path,
        n_steps=steps,
        chunk_size=chunk_size,
        model_kwargs=told,
        **place,
    )
    chunk = max(len(near), 1)
    if chunk_size is not None:
        chunk = check_count(where, "chunk_size", chunk_size, limit=2**63)
    found = []
    for low in range(0, max(len(near), 1), chunk):
        part = slice(low, low + chunk)
        level = near.new_full((len(near[part]),), middle)
        scores = model_scores(where, model, near[part], level, condition_rows(told, part))
        found.append(posterior(near[part], scores, middle))
    return PosteriorMixture(_joined(found), count)


def _joined(parts: list[Posterior]) -> Posterior:
    """The posteriors of all chunks as one."""
    if len(parts) == 1:
        return parts[0]
    all_of = [part.covariance for part in parts]
    factor = torch.cat([each.factor for each in all_of])
    covariance = DPLR.of(torch.cat([each.diag for each in all_of]), factor, all_of[0].sign)
    return Posterior(torch.cat([part.mean for part in parts]), covariance)
