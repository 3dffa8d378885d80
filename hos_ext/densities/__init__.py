"""Densities whose scores are known, for tests, examples and evidence."""

from .base import Density
from .gaussian import Gaussian, GaussianMixture
from .logistic import JointLogisticMixture, ProductLogisticMixture

__all__ = [
    "Density",
    "Gaussian",
    "GaussianMixture",
    "JointLogisticMixture",
    "ProductLogisticMixture",
]
