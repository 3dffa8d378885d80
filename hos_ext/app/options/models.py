"""The network that the options of a run describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...checks import check
from ...integrations.diffusers import DiffusersScore, from_diffusers
from ...nn.head import SecondOrderHead
from ...nn.mlp import MLP
from ...nn.unet import UNet
from ...nn.unet3d import UNet3d
from .table import OPTIONS


def build_model(
    options: Mapping[str, Any], shape: tuple[int, ...], num_classes: int | None = None
) -> nn.Module:
    """The network that completed options describe, untrained but for a first-order model given.

    The options' seed is that of the first weights; torch's own generator is left as it was.

    Args:
        options: of the run.
        shape: of one sample.
        num_classes: of data with labels.

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
        "num_classes": num_classes,
    }
    common |= {
        name: options[name] for name, option in OPTIONS.items() if options["model"] in option.models
    }
    model: nn.Module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        if options["model"] == "mlp":
            model = MLP(shape, options["rank"], activation="silu", **common)
        elif len(shape) == 4:
            model = UNet3d(shape, options["rank"], **common)
        else:
            model = UNet(shape, options["rank"], **common)
    if options["first_order"] is not None:
        model = SecondOrderHead(_score_model(options), model)
    if options["recompute"]:
        model.gradient_checkpointing = True
    return model


def _score_model(options: Mapping[str, Any]) -> DiffusersScore:
    """The pretrained first-order model that the options name."""
    kind, _, folder = options["first_order"].partition(":")
    good = kind == "diffusers" and folder
    check("train", good, "first_order must be diffusers:FOLDER", options["first_order"])
    score_model = from_diffusers(folder)
    low, high = score_model.sigma_range
    rule = f"sigma must lie in {low:g} to {high:g}, the noise levels of the first-order model"
    good = low <= options["sigma"][0] <= options["sigma"][1] <= high
    check("train", good, rule, options["sigma"])
    return score_model
