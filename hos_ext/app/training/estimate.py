"""How much memory a training will take, before it is begun."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...scores import Scores
from ..data import Source
from .batches import draw_batch, losses
from .options import TrainingOptions


class Memory(NamedTuple):
    """Bytes that a process holds.

    Attributes:
        weights: the weights and their moving average; of those that are trained also the gradient
            and the two moments of the optimiser.
        activations: what the backward pass of a micro-batch needs.
        rows: samples of a micro-batch.
    """

    weights: int
    activations: int
    rows: int


def estimate_memory(
    model: nn.Module, source: Source, options: TrainingOptions, *, processes: int = 1
) -> Memory:
    """What a step of a training holds, from the losses of two rows; nothing is trained.

    The activations are counted as autograd keeps them, of one row and of two, on the device of the
    model. What a backward pass uses for a moment, and CUDA's own memory, come on top.

    Args:
        model, source, options: as `train` takes them.
        processes: that share a batch.
    """
    rows = max(1, options.batch_size // (processes * options.accumulate))
    weights = [*model.parameters(), *model.buffers()]
    trained = [p for p in model.parameters() if p.requires_grad]
    held = 2 * _bytes(weights) + 3 * _bytes(trained)
    one = kept_bytes(model, source, options, 1)
    each = kept_bytes(model, source, options, 2) - one if rows > 1 else 0
    return Memory(held, one + (rows - 1) * each, rows)


def kept_bytes(model: nn.Module, source: Source, options: TrainingOptions, rows: int) -> int:
    """What autograd keeps of the loss of the first rows of a batch, beside the weights."""
    place = next(model.parameters()).device
    batch = draw_batch(source, options, 1, 0, rows).to(place)
    known = {v.untyped_storage().data_ptr() for v in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        memory = value.untyped_storage()
        if memory.data_ptr() not in known:
            kept[memory.data_ptr()] = memory.nbytes()
        return value

    half = options.mixed_precision == "bf16"

    def network(*arguments: Any, **named: Any) -> Any:
        with torch.autocast(place.type, torch.bfloat16, enabled=half):
            scores = model(*arguments, **named)
        if not half:
            return scores
        factor = None if scores.factor is None else scores.factor.float()
        return Scores(scores.scaled_score.float(), scores.c.float(), factor, scores.sign)

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        values = losses(network, batch, options.objective)  # holds what was kept
        del values
    return sum(kept.values())


def _bytes(values: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)
