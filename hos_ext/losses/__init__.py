"""Losses for training: first, second and higher order."""

from .high_order import (
    hermite,
    order_k_loss,
    order_k_matching_loss,
    order_k_vr_loss,
)
from .module import ScoreMatchingLoss
from .moment_losses import noise_moment_loss, second_moment_loss
from .score_matching import score_matching_loss

__all__ = [
    "ScoreMatchingLoss",
    "hermite",
    "noise_moment_loss",
    "order_k_loss",
    "order_k_matching_loss",
    "order_k_vr_loss",
    "score_matching_loss",
    "second_moment_loss",
]
