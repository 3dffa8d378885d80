"""density:NAME, draws from a density whose scores are known; they are not scaled."""

from __future__ import annotations

import torch

from .... import ops
from ....checks import one_of
from ....densities.gaussian import Gaussian, GaussianMixture
from ....densities.logistic import ProductLogisticMixture
from ....random import STREAM_ACCEPT, STREAM_POSTERIOR, STREAM_STEP
from ..registry import register_source
from ..rows import Request, Rows, array_rows

_ROWS = 100_000


@register_source("density", "NAME")
def open_density(request: Request) -> Rows:
    """100,000 draws from `known_density(NAME)`, which comes along as their truth."""
    truth = known_density(request.target)
    draws = truth.sample(_ROWS, seed=request.seed).float().numpy()
    return array_rows(request, draws)._replace(truth=truth)


def known_density(name: str) -> Gaussian | GaussianMixture | ProductLogisticMixture:
    """A density with known scores, always the same one, in float64.

    Args:
        name: "gaussian2d", a correlated normal; "normal100", a normal in 100 dimensions with five
            strong directions, variances 10, 7, 5, 3 and 2 over 0.1; "modes2d", two modes; or
            "logistic50", 50 independent coordinates, each a mixture of 20 logistics.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> from hos_ext.app.data import known_density
        >>> known_density("gaussian2d").mean
        tensor([0., 0.], dtype=torch.float64)
    """
    one_of("known_density", "name", name, ("gaussian2d", "normal100", "modes2d", "logistic50"))
    wide = torch.float64
    if name == "gaussian2d":
        covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=wide)
        return Gaussian(torch.zeros(2, dtype=wide), covariance)
    if name == "modes2d":
        return GaussianMixture(
            torch.tensor([0.4, 0.6], dtype=wide),
            torch.tensor([[-1.2, -0.4], [0.8, 0.5]], dtype=wide),
            torch.tensor([[[0.15, 0.1], [0.1, 0.12]], [[0.2, -0.08], [-0.08, 0.06]]], dtype=wide),
        )
    if name == "normal100":
        strong = torch.linalg.qr(ops.normal((100, 5), seed=100, stream=STREAM_STEP, dtype=wide))[0]
        variances = torch.tensor([10.0, 7.0, 5.0, 3.0, 2.0], dtype=wide)
        covariance = 0.1 * torch.eye(100, dtype=wide) + (strong * variances) @ strong.mT
        covariance = (covariance + covariance.mT) / 2
        return Gaussian(torch.zeros(100, dtype=wide), covariance)
    # Parameters that were drawn once and for all, from streams that other purposes own.
    size = (50, 20)
    return ProductLogisticMixture(
        ops.normal(size, seed=50, stream=STREAM_STEP, dtype=wide).softmax(-1),
        2 * ops.uniform(size, seed=50, stream=STREAM_ACCEPT, dtype=wide) - 1,
        0.02 + 0.08 * ops.uniform(size, seed=50, stream=STREAM_POSTERIOR, dtype=wide),
    )
