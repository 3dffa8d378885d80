"""The files of a model: model.safetensors, with the config in its metadata, and config.json.

The config is plain JSON: "_class_name", the arguments of the class, and further facts, whose names
"_extra" lists. The weights keep their dtype. A pickle can run code, so that none is read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import check, require
from ..storage import write_whole

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CLASSES = ("MLP", "UNet", "UNet3d", "SecondOrderHead")
HOLD = "load_model: folder must hold"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def check_folder(fine: bool, what: str, got: object) -> None:
    """A folder holds what `load_model` reads."""
    check("load_model", fine, f"folder must hold {what}", got)


def write_weights(
    folder: Path | str, config: dict[str, Any], state: Mapping[str, Tensor], extra: dict[str, Any]
) -> None:
    """Writes model.safetensors with the config in its metadata, then config.json."""
    safetensors = require("save_model", "safetensors.torch")
    for name in extra:
        fine = name not in config and not name.startswith("_")
        rule = "extra must have names that the model's config has not"
        check("save_model", fine, rule, f"{name!r}")
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
        pickles = sorted(p.name for p in Path(folder).glob("*") if p.suffix in PICKLES)
        rule = f"{WEIGHTS} (a pickle can run code and is not read)"
        check_folder(not pickles, rule, f"{folder} with {'' if not pickles else pickles[0]}")
        check_folder(False, WEIGHTS, f"{folder} without it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{HOLD} a whole {WEIGHTS}, got {path}: {error}") from None
    config = _config(path, metadata.get("config"))
    name, rule = config.get("_class_name"), f"a model of class {', '.join(CLASSES)}"
    check_folder(name in CLASSES, rule, f"{name!r} in {path}")
    names = config.get("_extra", [])
    known = isinstance(names, list) and all(isinstance(each, str) for each in names)
    check_folder(known, "the names of further facts in _extra", f"{names!r} in {path}")
    return config, state


def _config(path: Path, text: str | None) -> dict[str, Any]:
    """The config in the metadata of the weights, or else in the file beside them."""
    beside = path.with_name(CONFIG)
    if text is None:
        rule = f"{CONFIG} (no config in {path})"
        check_folder(beside.is_file(), rule, f"{path.parent} without it")
        found = _parsed(beside.read_bytes())
        check_folder(found is not None, f"a {CONFIG} of JSON", beside)
        return found or {}
    config = _parsed(text)
    rule = f"a config of JSON in its {WEIGHTS}"
    check_folder(config is not None, rule, f"{text[:40]!r} in {path}")
    config = config or {}
    other = _parsed(beside.read_bytes()) if beside.is_file() else config
    if other != config:
        older = beside.stat().st_mtime_ns < path.stat().st_mtime_ns
        killed = older and other is not None and arguments_of(other) == arguments_of(config)
        if not killed:
            warnings.warn(
                f"load_model: {beside} is not used: it disagrees with the config in {path}",
                stacklevel=4,
            )
    return config


def arguments_of(config: dict[str, Any]) -> dict[str, Any]:
    """What the class of a config is called with."""
    extra = config.get("_extra", [])
    if not isinstance(extra, list):
        return {}
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in extra}


def _parsed(text: bytes | str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _finite(value: Any) -> bool:
    """Whether JSON can hold the numbers of a value."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
