"""The data of the paper's synthetic experiments, fixed before any result was looked at.

The paper gives sizes but no covariances and no mixture parameters: its absolute errors cannot be
repeated, its ratios and orderings can. Each set here is what the text allows, in three settings;
the seed of a set is the CRC-32 of its name, so that none was picked.

Normal law, 100 dimensions, "correlated". What may have been meant:
    pairs    35 pairs of coordinates with correlation 2/3, the other 30 independent, variances 1.
             The printed errors of ranks 15, 20 and 30 (7.12, 5.24, 1.76) fall on a line in the rank
             that reaches zero at 35: as if each rank caught one of 35 equal correlations. Over
             43.8, the error of an estimate that is zero, they are 0.163, 0.120 and 0.040; what the
             best diagonal plus rank 15, 20 and 30 leave of this set is 0.161, 0.121 and 0.040.
    factors  I + B B^T / 35 with 35 columns of standard normals: a factor model. Its s2 is diagonal
             plus rank 35, the form that the method assumes.
    random   I + A A^T / 100 with a square matrix A of standard normals: a random covariance. Its
             squared s2 is 44.6 in the mean, near 43.8; no low rank suffices.

Mixtures of logistic laws, 50 and 80 dimensions, 20 components, "diagonal estimation". Two readings:
    product  every coordinate by itself is a mixture with 20 components; s2 is diagonal.
    joint    a mixture of 20 vectors with independent logistic coordinates; s2 is dense, and its
             diagonal is what is estimated.
and three settings of each, with standard normal locations if not said otherwise:
    even     equal weights, scales 0.3 (standard deviation 0.54).
    uneven   weights softmax of standard normals, scales log-uniform in [0.1, 0.5].
    apart    equal weights, locations uniform in [-3, 3], scales 0.2.

Two sets in the plane for the chains of Table 3, which must forget where they began:
    two modes  two round normal laws, standard deviation 0.6, at (1.1, 1.1) and (-1.1, -1.1): as far
               apart as 5.2 standard deviations, so that chains do change modes, but seldom.
    crescent   a half circle of radius 2, 0.15 across: 9 normal laws along it. It is ill-conditioned
               (0.15 to about 2), curved, has positive curvature inside, and its long direction is
               along an axis at three points only: the diagonal of s2 does not tell it.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from hos_ext.densities.gaussian import Gaussian, GaussianMixture
from hos_ext.densities.logistic import JointLogisticMixture, ProductLogisticMixture

NORMALS = ("pairs", "factors", "random")
RANKS = (15, 20, 30)
READINGS = ("product", "joint")
SIZES = (50, 80)
SETTINGS = ("even", "uneven", "apart")
COMPONENTS = 20
# The sets of Table 1 by name, as `law` takes them.
TABLE_1 = (
    *(f"normal {setting}" for setting in NORMALS),
    *(f"{r} {dim} {s}" for dim in SIZES for r in READINGS for s in SETTINGS),
)
SIGMAS = (0.01, 0.05, 0.1)
PLANE = ("two modes", "crescent")

_DIM, _PAIRS, _FACTORS = 100, 35, 35


def seed_of(name: str) -> int:
    """The seed that belongs to a name."""
    return zlib.crc32(name.encode())


def law(name: str) -> Gaussian | ProductLogisticMixture | JointLogisticMixture:
    """A set of Table 1: "normal SETTING" or "READING DIM SETTING"."""
    first, *rest = name.split()
    if first == "normal":
        return normal(*rest)
    return logistic(first, int(rest[0]), rest[1])


def normal(setting: str) -> Gaussian:
    """A correlated normal law of Table 1, in float64."""
    mean, covariance = (f(_DIM, dtype=torch.float64) for f in (torch.zeros, torch.eye))
    if setting == "pairs":
        even = torch.arange(0, 2 * _PAIRS, 2)
        covariance[even, even + 1] = covariance[even + 1, even] = 2 / 3
    elif setting in ("factors", "random"):
        columns = _FACTORS if setting == "factors" else _DIM
        factor = torch.randn(_DIM, columns, generator=_generator(setting), dtype=torch.float64)
        covariance += factor @ factor.mT / columns
    else:
        raise ValueError(f"normal: setting must be one of {', '.join(NORMALS)}, got {setting!r}")
    return Gaussian(mean, covariance)


def logistic(reading: str, dim: int, setting: str) -> ProductLogisticMixture | JointLogisticMixture:
    """A mixture of logistic laws of Table 1, in float64."""
    if reading not in READINGS:
        raise ValueError(f"logistic: reading must be one of {', '.join(READINGS)}, got {reading!r}")
    generator = _generator(f"{reading} {dim} {setting}")

    def normals(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniforms(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    shape = (dim, COMPONENTS) if reading == "product" else (COMPONENTS, dim)
    weights_shape = shape if reading == "product" else (COMPONENTS,)
    weights = torch.full(weights_shape, 1 / COMPONENTS, dtype=torch.float64)
    if setting == "even":
        locations, scales = normals(*shape), torch.full(shape, 0.3, dtype=torch.float64)
    elif setting == "uneven":
        weights = normals(*weights_shape).softmax(-1)
        locations, scales = normals(*shape), 0.1 * 5 ** uniforms(*shape)
    elif setting == "apart":
        locations = 6 * uniforms(*shape) - 3
        scales = torch.full(shape, 0.2, dtype=torch.float64)
    else:
        raise ValueError(f"logistic: setting must be one of {', '.join(SETTINGS)}, got {setting!r}")
    kind = ProductLogisticMixture if reading == "product" else JointLogisticMixture
    return kind(weights, locations, scales)


def plane(name: str) -> GaussianMixture:
    """A set of Table 3, in float64."""
    if name == "two modes":
        means = torch.tensor([[1.1, 1.1], [-1.1, -1.1]], dtype=torch.float64)
        covariances = 0.36 * torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    elif name == "crescent":
        angle = torch.linspace(0, math.pi, 9, dtype=torch.float64)
        across = torch.stack([angle.cos(), angle.sin()], -1)
        along = torch.stack([-angle.sin(), angle.cos()], -1)
        means = 2 * across
        covariances = 0.15**2 * _outer(across) + 0.4**2 * _outer(along)
    else:
        raise ValueError(f"plane: name must be one of {', '.join(PLANE)}, got {name!r}")
    weights = torch.full((len(means),), 1 / len(means), dtype=torch.float64)
    return GaussianMixture(weights, means, covariances)


def ellipse() -> Gaussian:
    """The normal law in the plane of Figure 1: standard deviations 1 and 0.5, correlation 0.8."""
    covariance = torch.tensor([[1.0, 0.4], [0.4, 0.25]], dtype=torch.float64)
    return Gaussian(torch.zeros(2, dtype=torch.float64), covariance)


def _outer(v: Tensor) -> Tensor:
    return v.unsqueeze(-1) * v.unsqueeze(-2)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(name))
