"""Models of any class, to a folder and back; `weights` says what the files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .head import SecondOrderHead
from .mlp import MLP
from .unet import UNet
from .weights import CLASSES, read_weights

_CLASSES: dict[str, type[MLP | UNet | SecondOrderHead]] = {
    "MLP": MLP,
    "UNet": UNet,
    "SecondOrderHead": SecondOrderHead,
}


def save_model(model: nn.Module, folder: Path | str, **extra: Any) -> str:
    """Writes a model so that `load_model` gives it back, dtype and all.

    Each file is written whole or not at all, model.safetensors first.

    Args:
        model: an `MLP`, `UNet` or `SecondOrderHead`, on any device.
        folder: made if need be; what it holds under these names is replaced.
        extra: facts to keep in the config beside the model's arguments. Plain JSON: what it does
            not know (tuples) comes back as JSON has it (lists).

    Returns:
        The folder, as a string.

    Raises:
        TypeError: model is of another class, or a value in extra is not plain JSON.
        ValueError: a value in extra is NaN or infinite, or its name is one of the model's arguments
            or starts with "_"; the activation of the model has no name.
        RuntimeError: safetensors is missing.
        OSError: the disk is full, or the folder cannot be written to.
    """
    if not isinstance(model, (MLP, UNet, SecondOrderHead)):
        rule = f"model must be one of {', '.join(CLASSES)} (unwrapped)"
        raise TypeError(f"save_model: {rule}, got {type(model).__name__}")
    return model.save_pretrained(folder, **extra)


def load_model(
    folder: Path | str, *, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """Reads what `save_model` wrote.

    The config in the metadata of model.safetensors counts. If config.json says something else there
    is a warning, but not where a killed `save_model` explains it: config.json is the older file and
    the model's arguments in both agree. Without metadata config.json counts.

    Args:
        folder: with model.safetensors and config.json.
        device: for the weights.

    Returns:
        The model, in eval mode and in the dtype it was saved in, and its config, extra included.

    Raises:
        ValueError: the folder holds no such model: a file is missing, truncated or foreign, or the
            weights are not those of the model; pickle files are not read. Names the file.
        RuntimeError: safetensors is missing, or diffusers for a `UNet`.
    """
    config, state = read_weights(folder)
    model = _CLASSES[config["_class_name"]]
    return model.from_weights(folder, config, state, device=device), config
