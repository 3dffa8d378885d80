"""Which precision a training may use: what bfloat16 and TF32 cannot show is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...checks import check
from ...losses.score_matching import RECOMMENDED, least_sigma

# Below these noise levels, in units of the data's standard deviation, the rounding of the second
# difference outweighs what variance reduction gains, where products alone are rounded: gradient
# variance over float32 x2.5 at 0.03 and x115 at 0.01 for bf16, x2.8 at 0.01 for TF32
# (docs/mathematics.md, precision). A whole network in bf16 rounds more, see `least_sigma`.
_LEAST_SIGMA = {"bf16": 0.05, "TF32": 0.02}


def check_precision(
    objective: Mapping[str, Any],
    sigma_range: tuple[float, float],
    std: float,
    *,
    mixed_precision: str = "no",
    device: str = "cpu",
) -> None:
    """Refuses arithmetic that would silently ruin variance reduction.

    The second difference of psi is divided by sigma^2, and its rounding with it.

    Args:
        objective: options of `score_matching_loss`.
        sigma_range: smallest and largest noise level. Data units.
        std: standard deviation of the data.
        mixed_precision: "no" or "bf16".
        device: type of the device. TF32 exists on "cuda"; on "cpu" the same setting means bf16.

    Raises:
        ValueError: variance reduction with bf16 or TF32 below the level where it fails.
    """
    reduced = objective.get("variance_reduction", RECOMMENDED["variance_reduction"])
    if not reduced and objective.get("first_order") != "vr":
        return
    kinds, lowest = {}, dict(_LEAST_SIGMA)
    if mixed_precision == "bf16":
        kinds["bf16"] = "mixed_precision must be 'no'"
        lowest["bf16"] = least_sigma(objective.get("centred", RECOMMENDED["centred"]))
    if device == "cuda" and _tf32():
        kinds["TF32"] = f"TF32 must be off ({' and '.join(_tf32())} set to False)"
    if device == "cpu" and (setting := _cpu_bf16()):
        kinds.setdefault("bf16", setting)
    for kind, rule in kinds.items():
        least = lowest[kind] * std
        rule += (
            f" for variance reduction below sigma {least:.3g} (its second difference is divided by "
            f"sigma^2, and the rounding of {kind} with it; 'centred' and 'plain' have none)"
        )
        check("train", sigma_range[0] >= least, rule, f"sigma_range {tuple(sigma_range)}")


def _tf32() -> list[str]:
    """The switches of TF32 that are on."""
    on = []
    for name, backend, part in (
        ("torch.backends.cuda.matmul.allow_tf32", torch.backends.cuda.matmul, None),
        ("torch.backends.cudnn.allow_tf32", torch.backends.cudnn, "conv"),
    ):
        # torch from 2.9 on has settings for each kind, and raises for the old ones beside them.
        place = getattr(backend, part, None) if part else backend
        new = getattr(place, "fp32_precision", None)
        if new == "tf32" if new is not None else backend.allow_tf32:
            on.append(name)
    return on


def _cpu_bf16() -> str | None:
    """The rule that a setting for products in bf16 on the CPU breaks."""
    try:
        if torch.get_float32_matmul_precision() == "medium":
            return "torch.set_float32_matmul_precision must not be 'medium'"
    except RuntimeError:  # torch from 2.9 on, where the settings below were used beside it
        pass
    for part in ("matmul", "conv"):
        place = getattr(torch.backends.mkldnn, part, None)
        if getattr(place, "fp32_precision", None) == "bf16":
            return f"torch.backends.mkldnn.{part}.fp32_precision must not be 'bf16'"
    return None
