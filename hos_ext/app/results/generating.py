"""The samples of `hos-ext generate`, and their files."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ...conditions import Conditions, condition_rows
from ...diffusion import generate
from ...sampling import law_error, shard
from ...scores import Model
from .. import data, plots
from ..evaluation.rows import chunk_rows, to_device
from .files import npz

GENERATE_FILES = ("generate.npz", "generate.png")
# How much wider or narrower than the data samples may be, before they have run away.
SPREAD = 3.0
SHOWN, COLUMNS = 64, 8


def generate_over_ranks(
    model: Model,
    count: int,
    facts: dict[str, Any],
    *,
    conditions: Conditions,
    seed: int,
    **options: Any,
) -> Tensor:
    """Samples of a run's model, shared out over all ranks; every rank gets them all.

    Args:
        model: `model(x, sigma, **conditions) -> Scores`.
        count: samples.
        facts: of the run: the shape of a sample and how large the data are.
        conditions: of the samples, a row each.
        seed: of all noise.
        options: schedule, method, n_steps, settle and last, as in `diffusion.generate`.

    Returns:
        Shape (count, *dims), data units, on the CPU.
    """
    grouped = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    mine, dims = shard(count, rank, world), facts["data"]["shape"]
    found = generate(
        model,
        (mine.stop - mine.start, *dims),
        data_std=facts["data"]["std"],
        seed=seed,
        first=mine.start,
        chunk_size=chunk_rows(dims),
        model_kwargs=condition_rows(conditions, mine),
        dtype=torch.float32,
        device=to_device(model, torch.empty(0)).device,
        **options,
    ).cpu()
    if not grouped:
        return found
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, found)
    return torch.cat(parts)


def generated_law(samples: Tensor, truth: Tensor | None) -> dict[str, float]:
    """How far the law of samples is from held-out data; NaN where it is not known."""
    if truth is None or min(len(samples), len(truth)) < 2:
        return {"spread": math.nan, "energy_distance": math.nan}
    return law_error(samples, truth)._asdict()


def generated_alarm(samples: Tensor, std: float, truth: Tensor | None) -> str:
    """What is wrong with samples; empty if nothing is.

    Args:
        samples: shape (n, *dims), data units.
        std: root mean square of the training data, data units.
        truth: held-out samples, where they are at hand: those are what samples are judged by.
    """
    if truth is None:
        size, right, what = float(samples.square().mean().sqrt()), std, "training data"
    else:
        centre, what = truth.mean(0), "held-out samples"
        size, right = (float((each - centre).square().mean().sqrt()) for each in (samples, truth))
    ratio = size / max(right, 1e-30)
    if ratio <= SPREAD and (ratio >= 1 / SPREAD or len(samples) < 8):
        return ""
    return (
        f"the samples spread {ratio:.3g} times as far as the {what} (bounds {1 / SPREAD:.2g} and "
        f"{SPREAD:g}). A model that has learned too little is a known cause (train longer), and so "
        "are too few --steps"
    )


def generated(
    samples: Tensor,
    truth: Tensor | None,
    *,
    scaling: data.Scaling,
    levels: Tensor,
    conditions: Conditions,
) -> dict[str, bytes]:
    """The files of samples, by name: arrays in data and raw units, and a picture of them.

    Args:
        samples: shape (n, *dims), data units.
        truth: held-out samples, which are shown beside them where they are at hand.
        scaling: of the data.
        levels: noise levels of the descent.
        conditions: of the samples.

    Returns:
        The content of each of `GENERATE_FILES`.
    """
    arrays = {
        "samples": samples,
        "raw": scaling.inverse(samples),
        "raw_mean": scaling.raw_mean(samples),
        "sigmas": levels,
        **{name: value for name, value in conditions.items() if isinstance(value, Tensor)},
        **{name: torch.tensor(value) for name, value in generated_law(samples, truth).items()},
    }
    shown = samples[:SHOWN]
    rows = [
        (f"generated, {at + 1} to {at + len(part)}" if at else "generated", part)
        for at, part in zip(range(0, len(shown), COLUMNS), shown.split(COLUMNS), strict=True)
    ]
    if truth is not None:
        rows.append(("held-out samples, for comparison", truth[:COLUMNS]))
    figure = plots.chains_figure(rows, columns=COLUMNS)
    return {"generate.npz": npz(arrays), "generate.png": plots.png(figure)}
