"""Items of data sets of one's own, as arrays; and the random numbers that items may draw."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.noise import draw_uniform
from ...random import STREAM_ITEM, Key
from .images import planes
from .rows import refusal
from .unfit import Unfit


def sample_of(spec: str, item: Any, column: str | None, name: str, *, axes: int = 1) -> np.ndarray:
    """The sample in an item of a data set.

    Args:
        spec: of the data set, for messages.
        item: a tensor, an array, a pillow image; a tuple or list that begins with one, such as
            (sample, label); or a mapping, in which `column` names it.
        column: may be None where one entry alone of a mapping has axes.
        name: of the item, for messages.
        axes: how many a sample has at least; batches have one more.

    Returns:
        At least one axis, on the CPU; of a pillow image (C, height, width).

    Raises:
        ValueError: there is no sample, or no single one.
    """
    value = item
    if isinstance(item, Mapping):
        value = item[_chosen(spec, item, column, name, axes)]
    elif column is not None:
        raise refusal(spec, f"give mappings with column {column!r}", f"{_kind(item)} in {name}")
    elif isinstance(item, (tuple, list)) and item and _has_axes(item[0], axes):
        value = item[0]
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise refusal(spec, "give samples on the CPU", f"{value.device} in {name}")
        if value.dtype == torch.bfloat16:
            raise refusal(spec, "give float16, float32 or float64", f"bfloat16 in {name}")
        return value.detach().numpy()
    if _is_picture(value):
        try:
            return planes(value)
        except Unfit as error:
            raise refusal(spec, error.rule, f"{error.got} in {name}") from None
    try:
        array = np.asarray(value)
    except ValueError:  # lists of several lengths
        array = np.asarray(None)
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        rule = "give tensors, arrays or pictures, alone, first in a tuple or in a mapping"
        raise refusal(spec, rule, f"{_kind(item)} in {name}")
    return array


def _chosen(spec: str, item: Mapping[Any, Any], column: str | None, name: str, axes: int) -> Any:
    """The key of the sample in a mapping."""
    fit = [key for key, value in item.items() if _has_axes(value, axes)]
    if column is not None and column in item:
        return column
    if column is None and len(fit) == 1:
        return fit[0]
    rule = f"have the sample as column, one of {fit}, in {name}"
    raise refusal(spec, rule, f"column {column!r}")


def _has_axes(value: Any, axes: int) -> bool:
    """Whether a value may be a sample; lists are those of data sets that know no arrays."""
    if isinstance(value, list):
        depth = 0
        while isinstance(value, list) and value:
            value, depth = value[0], depth + 1
        return depth >= axes and isinstance(value, (int, float))
    if _is_picture(value):
        return True
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim >= axes


def _is_picture(value: Any) -> bool:
    """Whether a value is an image of pillow, which need not be there."""
    return any(kind.__module__ == "PIL.Image" for kind in type(value).__mro__)


def _kind(item: Any) -> str:
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {', '.join(type(each).__name__ for each in item[:4])}"
    return type(item).__name__


# ------------------------------------------------------------------------------- what items draw


@contextmanager
def drawing_apart() -> Iterator[None]:
    """Inside, torch, numpy.random and random of the CPU may be seeded; then they are as before."""
    before = _states()
    try:
        yield
    finally:
        _put_back(before)


def _put_back(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])


def seed_all(number: int) -> None:
    """Seeds torch on the CPU, numpy.random and random."""
    torch.default_generator.manual_seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002
    random.seed(number)


def seeds_of(key: Key, count: int) -> list[int]:
    """A seed for each row of a batch, below 2**63: a function of (seed, offset, row)."""
    u = draw_uniform(key, STREAM_ITEM, (count, 2), torch.empty(0, dtype=torch.float64))
    return [int(a * 2**31) << 32 | int(b * 2**32) for a, b in u.tolist()]


class Drawing:
    """Random generators of one's own, put in place of the common ones where `with` says so."""

    def __init__(self, number: int) -> None:
        with drawing_apart():
            seed_all(number)
            self._states = _states()

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside, the common generators go on from where the last such block left these."""
        with drawing_apart():
            _put_back(self._states)
            try:
                yield
            finally:
                self._states = _states()


def _states() -> tuple[Any, Any, Any]:
    # The common generator of numpy is what items draw from.
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
