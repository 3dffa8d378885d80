"""Networks, and their files."""

from .files import load_model, save_model
from .head import SecondOrderHead
from .mlp import MLP
from .unet import UNet

__all__ = [
    "MLP",
    "SecondOrderHead",
    "UNet",
    "load_model",
    "save_model",
]
