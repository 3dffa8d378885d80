"""Densities whose scores are known, for tests, examples and evidence."""

from .gaussian import Gaussian, GaussianMixture
from .logistic import JointLogisticMixture, ProductLogisticMixture

__all__ = [
    "Gaussian",
    "GaussianMixture",
    "JointLogisticMixture",
    "ProductLogisticMixture",
]
