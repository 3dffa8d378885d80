"""Models of any class, to a folder and back; `weights` says what the files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks import device_of, said_by
from .head import SecondOrderHead
from .hub import Download, local_folder
from .mlp import MLP
from .unet import UNet
from .unet3d import UNet3d
from .weights import CLASSES, read_weights

_CLASSES: dict[str, type[MLP | UNet | UNet3d | SecondOrderHead]] = {
    "MLP": MLP,
    "UNet": UNet,
    "UNet3d": UNet3d,
    "SecondOrderHead": SecondOrderHead,
}


def save_model(model: nn.Module, folder: Path | str, **extra: Any) -> str:
    """Writes a model so that `load_model` gives it back, dtype and all.

    Each file is written whole or not at all, model.safetensors first.

    Args:
        model: an `MLP`, `UNet`, `UNet3d` or `SecondOrderHead`, on any device.
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

    Example:
        >>> import hos_ext, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = hos_ext.save_model(hos_ext.MLP((2,), 1), folder, step=7)
        ...     model, config = hos_ext.load_model(folder)
        >>> model.rank, config["step"]
        (1, 7)
    """
    if not isinstance(model, (MLP, UNet, UNet3d, SecondOrderHead)):
        rule = f"model must be one of {', '.join(CLASSES)} (unwrapped)"
        raise TypeError(f"save_model: {rule}, got {type(model).__name__}")
    with said_by("save_model", f"{type(model).__name__}.save_pretrained"):
        return model.save_pretrained(folder, **extra)


def load_model(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Reads what `save_model` or `push_to_hub` wrote.

    The config in the metadata of model.safetensors counts. Without metadata config.json counts. If
    both are there and disagree, there is a warning. A killed `save_model` is no reason to warn:
    then config.json is the older file, and the model's arguments in both agree.

    Args:
        folder: with model.safetensors and config.json. Or user/name or user/name@revision of the
            Hugging Face hub, where no such folder is here: its safetensors and JSON are downloaded
            once and kept in its cache, which serves without a network too. Needs the extra `hub`.
        device: for the weights.
        revision: of a model of the hub: branch, tag or commit. None is main.
        token: of a private model; None is that of `hf auth login` or HF_TOKEN.
        cache_dir: where the hub's files are kept; None is its own cache.
        local_files_only: nothing is downloaded.

    Returns:
        The model, in eval mode and in the dtype it was saved in, and its config, extra included.

    Raises:
        ValueError: the folder holds no such model: a file is missing, truncated or foreign, or the
            weights are not those of the model; pickle files are not read. Names the file. The hub
            has no such model or revision.
        RuntimeError: safetensors is missing, or diffusers for a `UNet`, or huggingface_hub; the hub
            does not answer.

    Example:
        See `save_model`.
    """
    device = device_of("load_model", "device", device)
    download = Download(revision, token, cache_dir, local_files_only)
    folder = local_folder("load_model", folder, download)
    config, state = read_weights(folder)
    model = _CLASSES[config["_class_name"]]
    return model.from_weights(folder, config, state, device=device), config
