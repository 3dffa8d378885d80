"""Whether a trained model denoises held-out samples at all: a look, before any figure."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...nn.model_check import check_model
from .. import data
from .rows import held_out, to_model


def check_one_step(
    model: nn.Module, source: data.Source, sigma: tuple[float, float], *, seed: int = 0
) -> dict[str, Any]:
    """The one-step denoising error at half and twice the data's deviation, as near as was trained.

    Args:
        model: of a run.
        source: its data.
        sigma: the range of noise levels trained. Data units.
        seed: of dequantisation and noise.

    Returns:
        Plain JSON: "sigma", "error" and "shrinking" (that of the best linear guess) of both levels,
        as parts of the noise's, and "verdict".
    """
    rows = held_out("info", source, "test", seed).up_to(512)
    low, high = sigma
    levels = [min(max(factor * source.std, low), high) for factor in (0.5, 2.0)]
    found = check_model(
        model,
        to_model(model, rows.clean()),
        sigmas=(levels[0], levels[1]),
        model_kwargs=rows.conditions,
        seed=seed,
    )
    return {
        "sigma": list(found.sigmas),
        "error": list(found.errors),
        "shrinking": None if found.linear is None else list(found.linear),
        "verdict": found.remark or "fine",
    }
