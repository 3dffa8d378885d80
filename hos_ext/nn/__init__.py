"""Networks, and their files."""

from .files import load_model, save_model
from .guidance import ClassifierFree
from .head import SavableScore, SecondOrderHead, register_score_reader
from .mlp import MLP
from .model_check import ModelCheck, check_model
from .model_score import ModelScore
from .unet import UNet
from .unet3d import UNet3d

__all__ = [
    "MLP",
    "ClassifierFree",
    "ModelCheck",
    "ModelScore",
    "SavableScore",
    "SecondOrderHead",
    "UNet",
    "UNet3d",
    "check_model",
    "load_model",
    "register_score_reader",
    "save_model",
]
