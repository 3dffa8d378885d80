"""The options of a run, one plain dict: from a command line or a file to data and model.

Names, kinds and defaults are in `OPTIONS`; a default of None depends on the data (`BY_DATA`) or on
the model, and `complete` fills it in. Everything here is plain JSON.
"""

from __future__ import annotations

import difflib
import importlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checks import one_of, require
from ..integrations.diffusers import DiffusersScore, from_diffusers
from ..nn.head import SecondOrderHead
from ..nn.mlp import MLP
from ..nn.unet import UNet
from . import data, training

FORMAT = "hos_ext run 1"  # of run.json

DATA, MODEL, OBJECTIVE, TRAINING, FOLDER = "Data", "Model", "Objective", "Training", "Run folder"


class Option(NamedTuple):
    """Kind and default; None: it depends on data or model (`words` say how), or is not used."""

    kind: type
    default: Any
    panel: str  # of --help
    help: str
    words: str = ""


OPTIONS: dict[str, Option] = {
    "data": Option(
        str,
        "digits",
        DATA,
        "digits | parquet:PATH | folder:PATH | npy:PATH | hf:NAME | density:NAME.",
    ),
    "test_data": Option(str, None, DATA, "A test set of its own, as --data.", "held-out rows"),
    "column": Option(str, None, DATA, "Of parquet: or hf:, or array of an .npz.", "the only one"),
    "streaming": Option(bool, False, DATA, "Read files as a stream: more data than memory."),
    "validation": Option(int, None, DATA, "Rows held out to tune on.", "5 %, at most 1000"),
    "test": Option(
        int, None, DATA, "Rows held out to report on.", "as --validation; all of --test-data"
    ),
    "augment": Option(
        str,
        None,
        DATA,
        "none, flip (left and right), or distort (rotate, shear, scale, shift half of a batch).",
        "none; distort for digits",
    ),
    "model": Option(
        str,
        None,
        MODEL,
        "mlp, unet-small (fits a CPU) or unet.",
        "unet-small for images, else mlp",
    ),
    "rank": Option(
        int, None, MODEL, "Columns of the low-rank part of the covariance.", "8; 16 for digits"
    ),
    "diagonal": Option(bool, False, MODEL, "Variances alone: rank 0, Eq. 17 of the paper."),
    "free": Option(bool, False, MODEL, "The paper's free diagonal: variances may be negative."),
    "trunk": Option(
        str,
        None,
        MODEL,
        "separate networks for score and covariance, or one shared.",
        "separate for mlp, shared for unet",
    ),
    "width": Option(int, None, MODEL, "mlp: hidden width for the score.", "256; 384 for digits"),
    "depth": Option(int, None, MODEL, "mlp: its hidden layers.", "3"),
    "head_width": Option(
        int, None, MODEL, "mlp: hidden width for the covariance.", "128; 256 for digits"
    ),
    "head_depth": Option(int, None, MODEL, "mlp: its hidden layers.", "3; 2 for digits"),
    "channels": Option(
        list,
        None,
        MODEL,
        "unet: channels of each level, fine to coarse, multiples of 8.",
        "16,32,64; unet 64,128,128,256",
    ),
    "c_min": Option(
        float, None, MODEL, "Least variance of an entry, over sigma^2.", "0.001; 0.008 for digits"
    ),
    "sigma_data": Option(
        float,
        None,
        MODEL,
        "Standard deviation of the data, data units.",
        "measured; 0.7 for digits",
    ),
    "first_order": Option(
        str, None, MODEL, "diffusers:FOLDER: keep that model, learn its uncertainty alone.", "none"
    ),
    "objective": Option(
        str,
        "centred",
        OBJECTIVE,
        "centred (second moments of the errors), vr (Eq. 33, for small sigma) or plain (Eq. 13).",
    ),
    "sigma": Option(
        list,
        [0.1, 1.2],
        OBJECTIVE,
        "Noise levels LOW,HIGH or one level, data units (8-bit pixels lie in [-1, 1]).",
    ),
    "gamma": Option(
        float,
        None,
        OBJECTIVE,
        "Weight of the first-order term.",
        "entries of a sample; 1 for digits",
    ),
    "steps": Option(int, 4000, TRAINING, "Optimiser steps."),
    "batch_size": Option(
        int, None, TRAINING, "Samples in a step, all processes together.", "128; 32 for images"
    ),
    "accumulate": Option(int, 1, TRAINING, "Parts a batch is cut into, for less memory."),
    "learning_rate": Option(
        float,
        None,
        TRAINING,
        "After the warm-up.",
        "0.001; 0.002 for images, 0.004 for digits",
    ),
    "decay": Option(
        str,
        "cosine",
        TRAINING,
        "Of the learning rate: cosine (to zero at the last step) or constant (steps can be added).",
    ),
    "warm_up": Option(int, 300, TRAINING, "Steps; at most a tenth of all."),
    "weight_decay": Option(
        float, None, TRAINING, "Of the weight matrices.", "0.01; 0.1 for digits"
    ),
    "max_grad_norm": Option(float, 5.0, TRAINING, "Longer gradients are scaled down to it."),
    "ema_decay": Option(float, 0.998, TRAINING, "Of the moving average of the weights."),
    "mixed_precision": Option(str, "no", TRAINING, "no or bf16."),
    "tf32": Option(bool, False, TRAINING, "TF32 on NVIDIA GPUs: faster, three digits."),
    "recompute": Option(bool, False, TRAINING, "Gradient checkpointing: less memory, more time."),
    "device": Option(str, "auto", TRAINING, "auto (a GPU if there is one) or cpu."),
    "seed": Option(int, 0, TRAINING, "Of every random choice."),
    "save_every": Option(int, 500, FOLDER, "Steps between checkpoints."),
    "keep": Option(int, 3, FOLDER, "Checkpoints kept."),
    "tracker": Option(
        str, "tensorboard", FOLDER, "tensorboard (RUN/logs), none, or another of accelerate."
    ),
}
BY_DATA: dict[str, dict[str, Any]] = {
    # The model of the demonstration, chosen on the validation digits.
    "digits": {
        "model": "mlp",
        "rank": 16,
        "width": 384,
        "head_width": 256,
        "head_depth": 2,
        "c_min": 0.008,
        "sigma_data": 0.7,
        "augment": "distort",
        "gamma": 1.0,
        "learning_rate": 4e-3,
        "weight_decay": 0.1,
    },
    # Steps of half a second on two cores for 28x28 pixels.
    "images": {"model": "unet-small", "rank": 8, "batch_size": 32, "learning_rate": 2e-3},
    "vectors": {"model": "mlp", "rank": 8},
}
_OTHERWISE = {
    "batch_size": 128,
    "augment": "none",
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "c_min": 1e-3,
}
_BY_MODEL: dict[str, dict[str, Any]] = {
    "mlp": {"trunk": "separate", "width": 256, "depth": 3, "head_width": 128, "head_depth": 3},
    "unet-small": {"trunk": "shared", "channels": [16, 32, 64]},
    "unet": {"trunk": "shared", "channels": [64, 128, 128, 256]},
}
_SHAPES = ("width", "depth", "head_width", "head_depth", "channels")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "centred": training.OBJECTIVE,
    "vr": {"variance_reduction": True},
    "plain": {"variance_reduction": False},
}
_ENGINE = (
    *("steps", "batch_size", "accumulate", "learning_rate", "decay", "weight_decay"),
    *("warm_up", "max_grad_norm", "ema_decay", "augment", "seed", "mixed_precision", "device"),
    *("save_every", "keep", "tracker"),
)


def read_config(path: Path) -> dict[str, Any]:
    """Options of a YAML, TOML or JSON file, or those of a run.json, checked.

    Args:
        path: its ending, .yaml, .yml, .toml or .json, says what it is.

    Returns:
        The options it gives, and "out" if it gives that.

    Raises:
        ValueError, TypeError: not such a file, an unknown option, or a value of the wrong kind.
        OSError: it cannot be read.
        RuntimeError: the parser of its kind is missing.
    """
    parsers = {".json": "json", ".toml": "tomllib", ".yaml": "yaml", ".yml": "yaml"}
    if path.suffix not in parsers:
        raise ValueError(f"read_config: path must end in {', '.join(parsers)}, got {path}")
    name = parsers[path.suffix]
    if name == "tomllib" and sys.version_info < (3, 11):
        name = "tomli"
    module = require("read_config", name)
    broken = module.YAMLError if name == "yaml" else ValueError
    text = path.read_text(encoding="utf-8")
    try:
        content = module.safe_load(text) if name == "yaml" else module.loads(text)
    except broken as error:
        kind = path.suffix[1:]
        raise ValueError(f"read_config: {path} must be whole {kind}, got: {error}") from error
    if isinstance(content, dict) and content.get("format") == FORMAT:
        content = content["options"]
    if not isinstance(content, dict):
        raise ValueError(f"read_config: {path} must hold options by name, got {content!r}")
    return check_options(content)


def check_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, each of its kind; "out" may be among them.

    A float may come as a string (YAML reads 1e-3 as one), a list of numbers as "0.1,1.2" or as one
    number, a name with hyphens.

    Raises:
        ValueError: an unknown name, or text where numbers must be.
        TypeError: a value of another kind.
    """
    values = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in OPTIONS and name != "out":
            near = difflib.get_close_matches(name, [*OPTIONS, "out"], n=1, cutoff=0.0)
            raise ValueError(f"options: name must be known (the nearest is {near[0]}), got {key}")
        kind, default = OPTIONS[name][:2] if name in OPTIONS else (str, None)
        values[name] = None if value is None and default is None else _of_kind(name, value, kind)
    return values


def _of_kind(name: str, value: Any, kind: type) -> Any:
    if kind is list:
        items = value.split(",") if isinstance(value, str) else value
        return [_number(name, v) for v in (items if isinstance(items, list | tuple) else [items])]
    if kind is float:
        return float(_number(name, value))
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"options: {name} must be of kind {kind.__name__}, got {value!r}")
    return value


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"options: {name} must be made of numbers, got {value!r}") from None
        return int(number) if number.is_integer() else number
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"options: {name} must be made of numbers, got {value!r}")
    return value


def complete(given: Mapping[str, Any]) -> tuple[dict[str, Any], data.Source]:
    """Opens the data and gives every option its value: as given, by data and model, or default.

    Raises:
        ValueError, TypeError: an option is unknown, of the wrong kind, out of range, or does not go
            with another.
        OSError, RuntimeError: the data cannot be read, or an extra is missing.
    """
    options = {name: option.default for name, option in OPTIONS.items()}
    options |= {key: value for key, value in check_options(given).items() if key != "out"}
    one_of("train", "objective", options["objective"], OBJECTIVES)
    if options["model"] is not None:
        one_of("train", "model", options["model"], _BY_MODEL)
    levels = options["sigma"]
    if len(levels) not in (1, 2) or not 0 < levels[0] <= levels[-1] < math.inf:
        raise ValueError(
            f"train: sigma must be one level or LOW,HIGH with 0 < LOW <= HIGH, got {levels}"
        )
    options["sigma"] = [float(levels[0]), float(levels[-1])]
    if options["diagonal"]:
        if options["rank"]:
            raise ValueError(f"train: rank must be 0 with diagonal, got {options['rank']}")
        options["rank"] = 0
    _check_tracker(options["tracker"])
    # Before the data, which may take minutes to open, what does not depend on them.
    training.check_options({k: v for k, v in engine(options).items() if v is not None})
    source = open_source(options)
    by_data = BY_DATA[_data_kind(source)]
    if options["model"] not in (None, by_data["model"]):
        by_data = {key: by_data[key] for key in by_data if key not in _SHAPES}
    _fill(options, by_data)
    by_model = _BY_MODEL[options["model"]]
    for name in _SHAPES:
        if options[name] is not None and name not in by_model:
            raise ValueError(
                f"train: {name} must be left out with model {options['model']}, got {options[name]}"
            )
    # Rounded: the last digits of the measured one depend on the number of threads.
    measured = {"sigma_data": float(f"{source.std:.6g}")}
    # The second term sums D^2 squared errors, the first D: with this weight both can be learned in
    # one trunk. With 1, MNIST's score did not get better than none in 450 steps; its error is 0.08
    # sigma^2 after 300 with 784.
    measured |= {"gamma": float(math.prod(source.shape))}
    _fill(options, by_model | _OTHERWISE | measured)
    arguments = engine(options)
    training.check_options(arguments)
    device = "cpu"
    if options["device"] != "cpu" and torch.accelerator.is_available():
        device = getattr(torch.accelerator.current_accelerator(), "type", device)
    training.check_precision(
        arguments["objective"],
        arguments["sigma_range"],
        source.std,
        mixed_precision=options["mixed_precision"],
        device=device,
    )
    levels, row = source.scaling.levels, source.validation[:1]
    data.augment(row, options["augment"], levels=levels, seed=0, batch_size=1)  # its checks
    return options, source


def _check_tracker(name: str) -> None:
    """accelerate goes on without a word where the package of a tracker is missing."""
    if name == "none":
        return
    known = require("train", "accelerate.tracking").LOGGER_TYPE_TO_CLASS
    one_of("train", "tracker", name, ("none", *known))
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(
            f"train: {name} must be installed for tracker {name!r}, got: {error}"
        ) from error


def open_source(options: Mapping[str, Any]) -> data.Source:
    """The data that options name."""
    return data.open_source(
        options["data"],
        seed=options["seed"],
        validation=options["validation"],
        test=options["test"],
        test_spec=options["test_data"],
        column=options["column"],
        streaming=options["streaming"],
    )


def _data_kind(source: data.Source) -> str:
    if source.spec == "digits":
        return "digits"
    return "images" if len(source.shape) == 3 else "vectors"


def _fill(options: dict[str, Any], values: Mapping[str, Any]) -> None:
    options |= {key: value for key, value in values.items() if options[key] is None}


def engine(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that `training.train` takes, by its names."""
    objective = OBJECTIVES[options["objective"]] | {"gamma": options["gamma"]}
    if options["diagonal"]:
        objective |= {"diagonal": True}
    low, high = options["sigma"]
    return {name: options[name] for name in _ENGINE} | {
        "sigma_range": (low, high),
        "objective": objective,
    }


def build_model(options: Mapping[str, Any], shape: tuple[int, ...]) -> nn.Module:
    """The network that completed options describe, untrained but for a first-order model given.

    The options' seed is that of the first weights; torch's own generator is left as it was.

    Raises:
        ValueError, TypeError: a size out of range, or a first-order model that cannot be read or
            does not know the noise levels.
        RuntimeError: diffusers is missing.
    """
    common: dict[str, Any] = {
        "trunk": options["trunk"],
        "sigma_data": options["sigma_data"],
        "constrained": not options["free"],
        "c_min": options["c_min"],
        "given_score": options["first_order"] is not None,
    }
    common |= {name: options[name] for name in _SHAPES if options[name] is not None}
    model: nn.Module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        if options["model"] == "mlp":
            model = MLP(shape, options["rank"], activation="silu", **common)
        else:
            model = UNet(shape, options["rank"], **common)
    if options["first_order"] is not None:
        model = SecondOrderHead(_first_order(options), model)
    if options["recompute"]:
        model.gradient_checkpointing = True
    return model


def _first_order(options: Mapping[str, Any]) -> DiffusersScore:
    kind, _, folder = options["first_order"].partition(":")
    if kind != "diffusers" or not folder:
        raise ValueError(
            f"train: first_order must be diffusers:FOLDER, got {options['first_order']}"
        )
    score = from_diffusers(folder)
    low, high = score.sigma_range
    if not low <= options["sigma"][0] <= options["sigma"][1] <= high:
        raise ValueError(
            f"train: sigma must lie in {low:g} to {high:g}, the noise levels of the first-order "
            f"model, got {options['sigma']}"
        )
    return score
