"""The rows of a step: drawn by their keys, with their losses and the spread of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...losses.score_matching import score_matching_loss
from ...random import Key
from ...schedules import draw_sigma
from ...scores import Model
from .. import data
from .options import TrainingOptions

# Rows of the validation part that the curve is drawn from, and how many of them at a time.
_VALIDATION_ROWS, _AT_A_TIME = 192, 128


class Batch(NamedTuple):
    """Consecutive rows of the global batch of a step.

    Attributes:
        x0: clean samples, data units. Shape (B, *dims).
        sigma: their noise levels. Shape (B,).
        rows: their places in the data set. Shape (B,).
        key: of their noise; `key.first` is the place of row 0 in the global batch.
        label: their classes, or no class. Shape (B,), int64; None for data without labels.
    """

    x0: Tensor
    sigma: Tensor
    rows: Tensor
    key: Key
    label: Tensor | None = None

    def part(self, start: int, stop: int) -> Batch:
        """Rows [start, stop)."""
        x0, sigma, rows = (each[start:stop] for each in self[:3])
        label = None if self.label is None else self.label[start:stop]
        return Batch(x0, sigma, rows, self.key._replace(first=self.key.first + start), label)

    def to(self, place: torch.device) -> Batch:
        """The same with samples, levels and labels on a device."""
        label = None if self.label is None else self.label.to(place)
        return self._replace(x0=self.x0.to(place), sigma=self.sigma.to(place), label=label)

    @property
    def conditions(self) -> dict[str, Tensor]:
        """What the model is told besides."""
        return {} if self.label is None else {"label": self.label}


def draw_batch(
    source: data.Source, options: TrainingOptions, step: int, start: int, stop: int
) -> Batch:
    """Rows [start, stop) of the global batch of a step, counted from 1. On the CPU."""
    key = Key(options.seed, step, start)
    keys: dict[str, Any] = key._asdict()
    size = options.batch_size
    rows, raw = source.batch(step - 1, size, seed=options.seed, start=start, stop=stop)
    levels = source.scaling.levels
    raw = data.augment(raw, options.augment, levels=levels, batch_size=size, **keys)
    x0 = source.scaling.forward(raw, **keys)
    label = None
    if source.labels is not None:
        label = source.batch_labels(step - 1, size, seed=options.seed, start=start, stop=stop)
        label = data.drop_labels(label, len(source.labels.names), options.condition_dropout, key)
    return Batch(x0, draw_sigma(stop - start, options.sigma_range, **keys), rows, key, label)


def draw_validation(source: data.Source, options: TrainingOptions) -> Batch:
    """The held-out rows of the curve, under noise that stays the same. On the CPU."""
    key = Key(options.seed)
    rows = torch.arange(min(len(source.validation), _VALIDATION_ROWS))
    x0 = source.scaling.forward(source.validation[rows], seed=options.seed)
    label = None if source.labels is None else source.labels.validation[rows]
    sigma = draw_sigma(len(rows), options.sigma_range, seed=options.seed)
    return Batch(x0, sigma, rows, key, label)


def losses(network: Model, batch: Batch, objective: Mapping[str, Any]) -> Tensor:
    """Loss, first and second term of each sample. Shape (3, B)."""
    loss, terms = score_matching_loss(
        network,
        batch.x0,
        batch.sigma,
        **objective,
        **batch.key._asdict(),
        model_kwargs=batch.conditions,
        reduction="none",
        return_terms=True,
    )
    return torch.stack([loss, terms["first"], terms["second"]])


@torch.no_grad()
def validation_loss(
    model: Model, batch: Batch, objective: Mapping[str, Any]
) -> tuple[float, float]:
    """The mean loss and its first term."""
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(batch.x0), _AT_A_TIME):
        part = batch.part(start, start + _AT_A_TIME)
        total += losses(model, part, objective).cpu().double().sum(1)
    loss, first, _ = (total / len(batch.x0)).tolist()
    return loss, first


def gradient_variance(
    model: Model, trained: list[nn.Parameter], batch: Batch, objective: Mapping[str, Any]
) -> float | None:
    """Trace of the covariance of the gradient of the mean loss over such a batch.

    The halves' gradients g, g' are independent, each with twice the variance of their mean:
    E |g - g'|^2 = 4 Var. Of an odd batch the last row is left out.

    Returns:
        The trace; None for a batch of one row.
    """
    half = len(batch.x0) // 2
    if half == 0:
        return None
    gradients = []
    for start in (0, half):
        loss = losses(model, batch.part(start, start + half), objective)[0].mean()
        gradients.append(torch.autograd.grad(loss, trained, materialize_grads=True))
    apart = sum(float((a - b).square().sum()) for a, b in zip(*gradients, strict=True))
    return apart / 4 * (2 * half / len(batch.x0))
