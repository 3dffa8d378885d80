"""The table of a run's options. Its rows on training are made from `TrainingOptions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NamedTuple, get_type_hints

from .. import data, training
from ..training import TrainingOptions

DATA, MODEL, OBJECTIVE, TRAINING, FOLDER = "Data", "Model", "Objective", "Training", "Run folder"
MODELS = ("mlp", "unet-small", "unet")
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
        by: its default by kind of data ("digits", "images", "volumes" or "vectors"), by model, or
            "else".
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
        " | ".join(data.source_forms()) + ".",
    ),
    "test_data": Option(
        str, None, DATA, "A test set of its own, as --data.", measured="held-out rows"
    ),
    "column": Option(
        str, None, DATA, "Of parquet: or hf:, or array of an .npz.", measured="the only one"
    ),
    "columns": Option(
        str,
        None,
        DATA,
        "Of a table in csv:, parquet: or hf:, numbers each: NAME,NAME,...",
        measured="all of them",
    ),
    "size": Option(
        str, None, DATA, "Of pictures, N or HEIGHTxWIDTH.", measured="as they are, all alike"
    ),
    "crop": Option(
        str,
        None,
        DATA,
        "How they come to --size: scale (until they cover it), centre (cut out) or random (cut "
        "anew in each step).",
        measured="scale",
    ),
    "alpha": Option(
        str, None, DATA, "Behind transparent pixels: white, black, or drop.", measured="refused"
    ),
    "convert": Option(
        str, None, DATA, "Make all pictures rgb or grey; also palettes, CMYK.", measured="refused"
    ),
    "bits": Option(
        int,
        None,
        DATA,
        "Of pictures of other depths: 8, or 16 (all levels are kept).",
        measured="refused",
    ),
    "pages": Option(
        str,
        None,
        DATA,
        "Of animations and files of several pages: first, or all as samples.",
        measured="refused",
    ),
    "condition": Option(
        str,
        None,
        DATA,
        "Learn the classes: label (of digits, of sub-folders), or NAME of a column or array.",
        measured="none",
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
        "mlp, unet-small (fits a CPU) or unet; these see images, and volumes (C, D, H, W) in 3-d.",
        {"images": "unet-small", "volumes": "unet-small", "else": "mlp"},
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
    "condition_dropout": _of_training(
        "condition_dropout", panel=OBJECTIVE, default=None, measured="0.1 with --condition"
    ),
    "steps": _of_training("steps", default=4000),
    "batch_size": _of_training("batch_size", by={"images": 32, "volumes": 8, "else": 128}),
    "accumulate": _of_training("accumulate"),
    "learning_rate": _of_training(
        "learning_rate", by={"images": 2e-3, "volumes": 2e-3, "digits": 4e-3, "else": 1e-3}
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
    "timeout": _of_training("timeout"),
    "seed": _of_training("seed"),
    "save_every": _of_training("save_every", panel=FOLDER),
    "keep": _of_training("keep", panel=FOLDER),
    "tracker": _of_training("tracker", panel=FOLDER, default="tensorboard"),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "centred": training.OBJECTIVE,
    "vr": {"variance_reduction": True, "centred": False},
    "plain": {"variance_reduction": False, "centred": False},
}
