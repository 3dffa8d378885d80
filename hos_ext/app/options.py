"""The options of a run, one plain dict: from a command line or a file to data and model.

`OPTIONS` describes each option once; its rows on training are made from `TrainingOptions`.
`complete` fills in what depends on data and model. Everything in the dict is plain JSON.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import nn

from ..checks import check, one_of, require
from ..integrations.diffusers import DiffusersScore, from_diffusers
from ..nn.head import SecondOrderHead
from ..nn.mlp import MLP
from ..nn.unet import UNet
from . import data, training
from .training import TrainingOptions

FORMAT = "hos_ext run 1"  # of run.json

DATA, MODEL, OBJECTIVE, TRAINING, FOLDER = "Data", "Model", "Objective", "Training", "Run folder"
_MODELS = ("mlp", "unet-small", "unet")
_UNETS = ("unet-small", "unet")
_NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})


class Option(NamedTuple):
    """An option of a run.

    Attributes:
        kind: of its value. A list holds numbers.
        default: its value where none is given; None where it depends on data or model, is measured,
            or is not used.
        panel: its group in `--help`.
        help: what it is, in a line.
        by: its default by kind of data ("digits", "images" or "vectors"), by model, or "else".
        measured: how it is found where `by` says nothing.
        models: those that take it; empty for all.
    """

    kind: type
    default: Any
    panel: str
    help: str
    by: Mapping[str, Any] = _NO_DEFAULTS
    measured: str = ""
    models: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The default in words where it depends on data or model; else empty."""
        most = self.measured or _words(self.by.get("else", ""))
        others = ", ".join(f"{_words(v)} for {key}" for key, v in self.by.items() if key != "else")
        return "; ".join(part for part in (most, others) if part)

    def default_for(self, data_kind: str, model: str | None = None) -> Any:
        """The default for a kind of data, and for a model if it is known."""
        by, usual = self.by, self.by.get("else", self.default)
        return by[data_kind] if data_kind in by else by.get(model or "", usual)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


_FIELDS = {each.name: each for each in fields(TrainingOptions)}
_KINDS = get_type_hints(TrainingOptions)


def _of_training(name: str, *, panel: str = TRAINING, **changed: Any) -> Option:
    """The row of a field of `TrainingOptions`; `changed` says where a run is different."""
    field = _FIELDS[name]
    default = None if "by" in changed else field.default
    row = Option(_KINDS[name], default, panel, field.metadata["help"])
    return row._replace(**changed)


# The defaults for digits are the model of the demonstration, chosen on the validation digits; those
# for images make steps of half a second on two cores for 28x28 pixels.
OPTIONS: dict[str, Option] = {
    "data": Option(
        str,
        "digits",
        DATA,
        "digits | parquet:PATH | folder:PATH | npy:PATH | hf:NAME | density:NAME.",
    ),
    "test_data": Option(
        str, None, DATA, "A test set of its own, as --data.", measured="held-out rows"
    ),
    "column": Option(
        str, None, DATA, "Of parquet: or hf:, or array of an .npz.", measured="the only one"
    ),
    "streaming": Option(bool, False, DATA, "Read files as a stream: more data than memory."),
    "validation": Option(
        int, None, DATA, "Rows held out to tune on.", measured="5 %, at most 1000"
    ),
    "test": Option(
        int,
        None,
        DATA,
        "Rows held out to report on.",
        measured="as --validation; all of --test-data",
    ),
    "augment": _of_training("augment", panel=DATA, by={"digits": "distort", "else": "none"}),
    "model": Option(
        str,
        None,
        MODEL,
        "mlp, unet-small (fits a CPU) or unet.",
        {"images": "unet-small", "else": "mlp"},
    ),
    "rank": Option(
        int,
        None,
        MODEL,
        "Columns of the low-rank part of the covariance.",
        {"digits": 16, "else": 8},
    ),
    "diagonal": Option(bool, False, MODEL, "Variances alone: rank 0, Eq. 17 of the paper."),
    "free": Option(bool, False, MODEL, "The paper's free diagonal: variances may be negative."),
    "trunk": Option(
        str,
        None,
        MODEL,
        "separate networks for score and covariance, or one shared.",
        {"mlp": "separate", "else": "shared"},
    ),
    "width": Option(
        int,
        None,
        MODEL,
        "mlp: hidden width for the score.",
        {"digits": 384, "else": 256},
        models=("mlp",),
    ),
    "depth": Option(int, None, MODEL, "mlp: its hidden layers.", {"else": 3}, models=("mlp",)),
    "head_width": Option(
        int,
        None,
        MODEL,
        "mlp: hidden width for the covariance.",
        {"digits": 256, "else": 128},
        models=("mlp",),
    ),
    "head_depth": Option(
        int, None, MODEL, "mlp: its hidden layers.", {"digits": 2, "else": 3}, models=("mlp",)
    ),
    "channels": Option(
        list,
        None,
        MODEL,
        "unet: channels of each level, fine to coarse, multiples of 8.",
        {"unet-small": [16, 32, 64], "unet": [64, 128, 128, 256]},
        models=_UNETS,
    ),
    "c_min": Option(
        float,
        None,
        MODEL,
        "Least variance of an entry, over sigma^2.",
        {"digits": 0.008, "else": 1e-3},
    ),
    "sigma_data": Option(
        float,
        None,
        MODEL,
        "Standard deviation of the data, data units.",
        {"digits": 0.7},
        measured="measured",
    ),
    # The key of a pretrained model in the files of a run; `score_matching_loss` has an argument of
    # this name with another meaning, which is no option of a run.
    "first_order": Option(
        str,
        None,
        MODEL,
        "diffusers:FOLDER: keep that model, learn its uncertainty alone.",
        measured="none",
    ),
    "objective": Option(
        str,
        "centred",
        OBJECTIVE,
        "centred (second moments of the errors), vr (Eq. 33, for small sigma) or plain (Eq. 13).",
    ),
    "sigma": Option(
        list,
        list(TrainingOptions.sigma_range),
        OBJECTIVE,
        "Noise levels LOW,HIGH or one level, data units (8-bit pixels lie in [-1, 1]).",
    ),
    "gamma": Option(
        float,
        None,
        OBJECTIVE,
        "Weight of the first-order term.",
        {"digits": 1.0},
        measured="entries of a sample",
    ),
    "steps": _of_training("steps", default=4000),
    "batch_size": _of_training("batch_size", by={"images": 32, "else": 128}),
    "accumulate": _of_training("accumulate"),
    "learning_rate": _of_training(
        "learning_rate", by={"images": 2e-3, "digits": 4e-3, "else": 1e-3}
    ),
    "decay": _of_training("decay"),
    "warm_up": _of_training("warm_up"),
    "weight_decay": _of_training("weight_decay", by={"digits": 0.1, "else": 0.01}),
    "max_grad_norm": _of_training("max_grad_norm"),
    "ema_decay": _of_training("ema_decay"),
    "mixed_precision": _of_training("mixed_precision"),
    "tf32": Option(bool, False, TRAINING, "TF32 on NVIDIA GPUs: faster, three digits."),
    "recompute": Option(bool, False, TRAINING, "Gradient checkpointing: less memory, more time."),
    "device": _of_training("device"),
    "seed": _of_training("seed"),
    "save_every": _of_training("save_every", panel=FOLDER),
    "keep": _of_training("keep", panel=FOLDER),
    "tracker": _of_training("tracker", panel=FOLDER, default="tensorboard"),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "centred": training.OBJECTIVE,
    "vr": {"variance_reduction": True},
    "plain": {"variance_reduction": False},
}


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
    check("read_config", path.suffix in parsers, f"path must end in {', '.join(parsers)}", path)
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
    rule = f"{path} must hold options by name"
    check("read_config", isinstance(content, dict), rule, repr(content))
    return read_options(content)


def read_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, each made of its kind; "out" may be among them.

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
    """The value made of a kind."""
    if kind is list:
        items = value.split(",") if isinstance(value, str) else value
        return [_number(name, v) for v in (items if isinstance(items, list | tuple) else [items])]
    if kind is float:
        return float(_number(name, value))
    good = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    check("options", good, f"{name} must be of kind {kind.__name__}", repr(value), TypeError)
    return value


def _number(name: str, value: Any) -> int | float:
    """A number, or the text of one."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"options: {name} must be made of numbers, got {value!r}") from None
        return int(number) if number.is_integer() else number
    good = isinstance(value, int | float) and not isinstance(value, bool)
    check("options", good, f"{name} must be made of numbers", repr(value), TypeError)
    plain: int | float = value
    return plain


def complete(given: Mapping[str, Any]) -> tuple[dict[str, Any], data.Source]:
    """Opens the data and gives every option its value: as given, by data and model, or default.

    Args:
        given: options by name, as `read_options` takes them.

    Returns:
        Every option by name, and the data.

    Raises:
        ValueError, TypeError: an option is unknown, of the wrong kind, out of range, or does not go
            with another.
        OSError, RuntimeError: the data cannot be read, or an extra is missing.
    """
    options = {name: option.default for name, option in OPTIONS.items()}
    options |= {key: value for key, value in read_options(given).items() if key != "out"}
    # Before the data, which may take minutes to open, what does not depend on them.
    _reconcile(options)
    training.check_options({k: v for k, v in options.items() if v is not None})
    source = open_source(options)
    _fill_in(options, source)
    chosen = training_options(options)
    device = "cpu"
    if chosen.device != "cpu" and torch.accelerator.is_available():
        device = getattr(torch.accelerator.current_accelerator(), "type", device)
    training.check_precision(
        chosen.objective,
        chosen.sigma_range,
        source.std,
        mixed_precision=chosen.mixed_precision,
        device=device,
    )
    levels, row = source.scaling.levels, source.validation[:1]
    data.augment(row, chosen.augment, levels=levels, seed=0, batch_size=1)  # its checks
    return options, source


def _reconcile(options: dict[str, Any]) -> None:
    """Refuses what does not go together; sigma becomes two levels, and diagonal rank 0."""
    one_of("train", "objective", options["objective"], OBJECTIVES)
    if options["model"] is not None:
        one_of("train", "model", options["model"], _MODELS)
    levels = options["sigma"]
    good = len(levels) in (1, 2) and 0 < levels[0] <= levels[-1] < math.inf
    check("train", good, "sigma must be one level or LOW,HIGH with 0 < LOW <= HIGH", levels)
    options["sigma"] = [float(levels[0]), float(levels[-1])]
    if options["diagonal"]:
        check("train", not options["rank"], "rank must be 0 with diagonal", options["rank"])
        options["rank"] = 0


def _fill_in(options: dict[str, Any], source: data.Source) -> None:
    """Gives the options that depend on data or model their values."""
    kind = "images" if len(source.shape) == 3 else "vectors"
    if source.spec == "digits":
        kind = "digits"
    model = options["model"] = options["model"] or OPTIONS["model"].default_for(kind)
    # The second term sums D^2 squared errors, the first D: with this weight both can be learned in
    # one trunk. With 1, MNIST's score did not get better than none in 450 steps; its error is 0.08
    # sigma^2 after 300 with 784.
    measured = {"gamma": float(math.prod(source.shape))}
    # Rounded: the last digits of the measured one depend on the number of threads.
    measured |= {"sigma_data": float(f"{source.std:.6g}")}
    for name, option in OPTIONS.items():
        if option.models and model not in option.models:
            rule = f"{name} must be left out with model {model}"
            check("train", options[name] is None, rule, options[name])
        elif options[name] is None:
            default = option.default_for(kind, model)
            options[name] = measured.get(name) if default is None else default


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


def training_options(options: Mapping[str, Any]) -> TrainingOptions:
    """What completed options say to `training.train`.

    Raises:
        ValueError, TypeError: one of them is out of range or of the wrong kind.
    """
    objective = OBJECTIVES[options["objective"]] | {"gamma": options["gamma"]}
    if options["diagonal"]:
        objective |= {"diagonal": True}
    low, high = options["sigma"]
    named = {name: options[name] for name in _FIELDS if name in OPTIONS}
    return TrainingOptions(**named | {"sigma_range": (low, high), "objective": objective})


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
    common |= {
        name: options[name] for name, option in OPTIONS.items() if options["model"] in option.models
    }
    model: nn.Module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        if options["model"] == "mlp":
            model = MLP(shape, options["rank"], activation="silu", **common)
        else:
            model = UNet(shape, options["rank"], **common)
    if options["first_order"] is not None:
        model = SecondOrderHead(_given_score(options), model)
    if options["recompute"]:
        model.gradient_checkpointing = True
    return model


def _given_score(options: Mapping[str, Any]) -> DiffusersScore:
    """The pretrained first-order model that the options name."""
    kind, _, folder = options["first_order"].partition(":")
    good = kind == "diffusers" and folder
    check("train", good, "first_order must be diffusers:FOLDER", options["first_order"])
    score = from_diffusers(folder)
    low, high = score.sigma_range
    rule = f"sigma must lie in {low:g} to {high:g}, the noise levels of the first-order model"
    good = low <= options["sigma"][0] <= options["sigma"][1] <= high
    check("train", good, rule, options["sigma"])
    return score
