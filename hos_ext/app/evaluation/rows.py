"""Held-out rows in data units, under the noise that is theirs, in chunks of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ...checks import check, check_number, one_of
from ...ops.noise import draw_normal
from ...random import STREAM_EVALUATION, Key
from ...scores import Model
from .. import data

# Each part has noise of its own, and so has `accuracy`.
_OFFSETS = {"test": 2, "validation": 1}
TRUTH_OFFSET = 3
# Entries of x at a time, and rows: the factor of a posterior is r times that.
ENTRIES, ROWS = 2**19, 512


@dataclass(frozen=True)
class HeldOut:
    """The first rows of a part of a data set.

    Attributes:
        raw: shape (n, *dims), in raw units.
        scaling: of the data.
        seed, offset: key of dequantisation and noise.
        first: the number of row 0 in the part.
        label: the classes of the rows. Shape (n,); None for data without labels.
    """

    raw: Tensor
    scaling: data.Scaling
    seed: int
    offset: int
    first: int = 0
    label: Tensor | None = None

    def __len__(self) -> int:
        return len(self.raw)

    def up_to(self, count: int) -> HeldOut:
        """The first rows, at most `count`."""
        return replace(self, raw=self.raw[:count], label=self._labels(0, count))

    def _labels(self, start: int, count: int) -> Tensor | None:
        return None if self.label is None else self.label[start : start + count]

    @property
    def conditions(self) -> dict[str, Tensor]:
        """What a model is told of the rows."""
        return {} if self.label is None else {"label": self.label}

    def clean(self) -> Tensor:
        """The rows in data units, dequantised. Shape (n, *dims), float32."""
        return self.scaling.forward(self.raw, seed=self.seed, offset=self.offset, first=self.first)

    def noise(self, x0: Tensor) -> Tensor:
        """Standard normals for the clean rows, in their shape."""
        key = Key(self.seed, self.offset, self.first)
        return draw_normal(key, STREAM_EVALUATION, x0.shape, x0)

    def chunks(self) -> Iterator[HeldOut]:
        """The rows in parts that `chunk_rows` allows, each under the noise that is its own."""
        first = self.first
        for raw in self.raw.split(chunk_rows(self.raw.shape[1:])):
            label = self._labels(first - self.first, len(raw))
            yield replace(self, raw=raw, first=first, label=label)
            first += len(raw)


def held_out(where: str, source: data.Source, part: str, seed: int) -> HeldOut:
    """All rows of the part "test" or "validation"; there must be some."""
    one_of(where, "part", part, tuple(_OFFSETS))
    raw = source.test if part == "test" else source.validation
    check(where, len(raw), f"source must have {part} rows", f"none in {source.spec}")
    label = None
    if source.labels is not None:
        label = source.labels.test if part == "test" else source.labels.validation
    return HeldOut(raw, source.scaling, seed, _OFFSETS[part], label=label)


def noise_levels(where: str, sigmas: Iterable[float]) -> list[float]:
    """The noise levels; there must be some."""
    levels = [check_number(where, "sigmas", sigma) for sigma in sigmas]
    check(where, levels, "sigmas must hold at least one level", "none")
    return levels


def chunk_rows(dims: Sequence[int]) -> int:
    """How many rows of these dims are treated at a time."""
    return max(1, min(ROWS, ENTRIES // math.prod(dims)))


def to_device(model: Model, x: Tensor) -> Tensor:
    """x on the device of the model's parameters, where it has some."""
    weight = _parameter(model)
    return x if weight is None else x.to(weight.device)


def to_model(model: Model, x: Tensor) -> Tensor:
    """x in the dtype and on the device of the model's parameters; without any, as data: float32."""
    weight = _parameter(model)
    return x.float() if weight is None else x.to(weight)


def _parameter(model: Model) -> Tensor | None:
    return next(model.parameters(), None) if isinstance(model, nn.Module) else None
