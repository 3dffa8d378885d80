"""Every option of a run: as given, by data and model, or by default; then data and engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from ...checks import check, one_of
from .. import data, training
from ..training import TrainingOptions
from .reading import read_options
from .table import MODELS, OBJECTIVES, OPTIONS

_NAMES = {each.name for each in fields(TrainingOptions)}


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
    source = open_chosen_source(options)
    _fill_in(options, source)
    chosen = training_options(options)
    device = "cpu"
    if not chosen.device.startswith("cpu") and torch.accelerator.is_available():
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
        one_of("train", "model", options["model"], MODELS)
    levels = options["sigma"]
    good = len(levels) in (1, 2) and 0 < levels[0] <= levels[-1] < math.inf
    check("train", good, "sigma must be one level or LOW,HIGH with 0 < LOW <= HIGH", levels)
    options["sigma"] = [float(levels[0]), float(levels[-1])]
    conditional = options["condition"] is not None
    fits = conditional or options["condition_dropout"] is None
    rule = "condition_dropout must be left out without condition"
    check("train", fits, rule, options["condition_dropout"])
    fits = not conditional or options["first_order"] is None
    check("train", fits, "condition must be left out with first_order", options["condition"])
    if options["diagonal"]:
        check("train", not options["rank"], "rank must be 0 with diagonal", options["rank"])
        options["rank"] = 0


def _fill_in(options: dict[str, Any], source: data.Source) -> None:
    """Gives the options that depend on data or model their values."""
    kind = {3: "images", 4: "volumes"}.get(len(source.shape), "vectors")
    fits = len(source.shape) <= 4 or options["model"] is not None
    rule = f"model must be said for samples {source.shape} (mlp takes them for vectors)"
    check("train", fits, rule, "none")
    if source.spec == "digits":
        kind = "digits"
    model = options["model"] = options["model"] or OPTIONS["model"].default_for(kind)
    # The second term sums D^2 squared errors, the first D: with this weight both can be learned in
    # one trunk. With 1, MNIST's score did not get better than none in 450 steps; its error is 0.08
    # sigma^2 after 300 with 784.
    measured = {"gamma": float(math.prod(source.shape))}
    # Rounded: the last digits of the measured one depend on the number of threads.
    measured |= {"sigma_data": float(f"{source.std:.6g}")}
    if options["condition"] is not None:
        measured["condition_dropout"] = TrainingOptions.condition_dropout
    for name, option in OPTIONS.items():
        if option.models and model not in option.models:
            rule = f"{name} must be left out with model {model}"
            check("train", options[name] is None, rule, options[name])
        elif options[name] is None:
            default = option.default_for(kind, model)
            options[name] = measured.get(name) if default is None else default


def open_chosen_source(options: Mapping[str, Any]) -> data.Source:
    """The data that options name."""
    return data.open_source(
        options["data"],
        seed=options["seed"],
        validation=options["validation"],
        test=options["test"],
        test_spec=options["test_data"],
        column=options["column"],
        columns=options.get("columns"),
        label=options.get("condition"),
        pictures=data.Pictures.of(options),
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
    named = {name: options[name] for name in OPTIONS if name in _NAMES}
    if named["condition_dropout"] is None:  # without labels
        del named["condition_dropout"]
    return TrainingOptions(**named | {"sigma_range": (low, high), "objective": objective})
