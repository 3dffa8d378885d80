"""Models as files: config.json + model.safetensors, as elsewhere in the ecosystem; no pickle.

model.safetensors holds all: the weights, and in its metadata a copy of config.json. It is replaced
by one rename, so that a process killed while it saves leaves a whole model, the old or the new.
config.json is written after it, for readers, and read where another tool dropped the metadata.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import require
from .models import MLP, UNet
from .storage import write_whole

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_CLASSES: dict[str, type[MLP] | type[UNet]] = {"MLP": MLP, "UNet": UNet}
_HEAD = "SecondOrderHead"
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_HOLD = "load_model: folder must hold"


def save_model(folder: Path | str, model: nn.Module, **extra: Any) -> str:
    """Writes a model so that `load_model` gives it back, dtype and all.

    Each file is written whole or not at all, model.safetensors first.

    Args:
        folder: made if need be; what it holds under these names is replaced.
        model: an `MLP`, `UNet` or `SecondOrderHead`, on any device.
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
    from .frozen import SecondOrderHead

    if isinstance(model, SecondOrderHead):
        return model.save_pretrained(folder, **extra)
    config = model_config(model)
    write_weights(folder, config, model.state_dict(), extra)
    return str(folder)


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
    if config["_class_name"] == _HEAD:
        from .frozen import load_head

        return load_head(folder, config, state, device=device), config
    return build(folder, config, state, device=device), config


def model_config(model: nn.Module) -> dict[str, Any]:
    """The config of an MLP or a UNet that can be made again from it."""
    if not isinstance(model, (MLP, UNet)):
        names = ", ".join((*_CLASSES, _HEAD))
        raise TypeError(
            f"save_model: model must be one of {names} (unwrapped), got {type(model).__name__}"
        )
    if model.config.get("activation", "") is None:
        raise ValueError(
            "save_model: activation of the model must be given by name to be saved, got "
            f"{model.bodies[0].activation!r}"
        )
    return model.config


def write_weights(
    folder: Path | str, config: dict[str, Any], state: Mapping[str, Tensor], extra: dict[str, Any]
) -> None:
    """Writes model.safetensors with the config in its metadata, then config.json."""
    safetensors = require("save_model", "safetensors.torch")
    for name in extra:
        if name in config or name.startswith("_"):
            raise ValueError(
                f"save_model: extra must have names that the model's config has not, got {name!r}"
            )
    content = config | extra | {"_extra": sorted(extra)}
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except ValueError:
        bad = [name for name, value in content.items() if not _finite(value)]
        raise ValueError(f"save_model: {bad[0]} must be finite, got {content[bad[0]]!r}") from None
    except TypeError as error:
        raise TypeError(f"save_model: extra must be plain JSON, got: {error}") from None
    # Copies: safetensors refuses tensors that share memory or are not contiguous.
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()
    }
    metadata = {"format": "pt", "config": text}
    write_whole(Path(folder) / WEIGHTS, safetensors.save(tensors, metadata))
    write_whole(Path(folder) / CONFIG, text.encode())


def read_weights(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of a folder, with a known "_class_name", and its weights as they are."""
    safetensors = require("load_model", "safetensors")
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in Path(folder).glob("*") if p.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"{_HOLD} {WEIGHTS} (a pickle can run code and is not read), got {folder} with "
                f"{pickles[0]}"
            )
        raise ValueError(f"{_HOLD} {WEIGHTS}, got {folder} without it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{_HOLD} a whole {WEIGHTS}, got {path}: {error}") from None
    config = _config(path, metadata.get("config"))
    known = (*_CLASSES, _HEAD)
    if config.get("_class_name") not in known:
        raise ValueError(
            f"{_HOLD} a model of class {', '.join(known)}, got {config.get('_class_name')!r} in "
            f"{path}"
        )
    return config, state


def build(
    folder: Path | str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    *,
    device: torch.device | str,
) -> MLP | UNet:
    """The model of a config, with these weights in their own dtype. In eval mode."""
    path = Path(folder) / WEIGHTS
    name = config["_class_name"]
    dtypes = sorted({str(value.dtype) for value in state.values()})
    if len(dtypes) != 1 or not all(value.is_floating_point() for value in state.values()):
        raise ValueError(
            f"{_HOLD} weights of one floating dtype, got {', '.join(dtypes)} in {path}"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # the first weights are overwritten
            model = _CLASSES[name](**_arguments(config))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{_HOLD} the arguments of {name}, got {path}: {error}") from None
    model.to(next(iter(state.values())).dtype)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{_HOLD} the weights of its model, got {path}: {reason}") from None
    return model.to(device).eval()


def _config(path: Path, text: str | None) -> dict[str, Any]:
    """The config in the metadata of the weights, or else in the file beside them."""
    beside = path.with_name(CONFIG)
    if text is None:
        if not beside.is_file():
            raise ValueError(
                f"{_HOLD} {CONFIG} (no config in {path}), got {path.parent} without it"
            )
        found = _parsed(beside.read_bytes())
        if found is None:
            raise ValueError(f"{_HOLD} a {CONFIG} of JSON, got {beside}")
        return found
    config = _parsed(text)
    if config is None:
        raise ValueError(f"{_HOLD} a config of JSON in its {WEIGHTS}, got {text[:40]!r} in {path}")
    other = _parsed(beside.read_bytes()) if beside.is_file() else config
    if other != config:
        older = beside.stat().st_mtime_ns < path.stat().st_mtime_ns
        killed = older and other is not None and _arguments(other) == _arguments(config)
        if not killed:
            warnings.warn(
                f"load_model: {beside} is not used: it disagrees with the config in {path}",
                stacklevel=4,
            )
    return config


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What the class of a config is called with."""
    extra = config.get("_extra", [])
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in extra}


def _parsed(text: bytes | str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _finite(value: Any) -> bool:
    """Whether JSON can hold the numbers of a value."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
