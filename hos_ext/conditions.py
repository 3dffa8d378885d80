"""Conditions of a model, `model_kwargs`: class labels, text embeddings, masks.

A model is called as `model(x, sigma, **model_kwargs)`. Each tensor among the conditions, also in
dicts, lists and tuples, has one row for each sample; 0-d tensors and what is no tensor belong to
all samples alike. So a loss that visits several points repeats them, and a sampler that runs in
chunks cuts them, without knowing what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .checks import check, check_kind

Conditions: TypeAlias = Mapping[str, Any]
"""What a model is told besides x and sigma: arguments by name."""


def check_conditions(
    where: str, model_kwargs: Conditions | None, rows: int, like: str = "x"
) -> dict[str, Any]:
    """The conditions as a dict of one's own, each tensor of one row a sample; None is no condition.

    Args:
        where: the function named in errors.
        model_kwargs: of the model, by name.
        rows: samples in the batch.
        like: the argument that holds the batch, for errors.

    Raises:
        TypeError: model_kwargs is no mapping of names, or holds an array of numpy.
        ValueError: a tensor has another number of rows.

    Example:
        >>> import torch
        >>> from hos_ext.conditions import check_conditions
        >>> check_conditions("f", {"label": torch.tensor([3, 1])}, rows=2)
        {'label': tensor([3, 1])}
    """
    if model_kwargs is None:
        return {}
    check_kind(where, "model_kwargs", model_kwargs, Mapping)
    for name, value in model_kwargs.items():
        fine = isinstance(name, str)
        check(where, fine, "model_kwargs must be named by strings", f"{name!r}", TypeError)
        _check_rows(where, f"model_kwargs[{name!r}]", value, rows, like)
    return dict(model_kwargs)


def condition_rows(model_kwargs: Conditions, index: Tensor | slice) -> dict[str, Any]:
    """The conditions of some samples of the batch.

    Example:
        >>> import torch
        >>> from hos_ext.conditions import condition_rows
        >>> condition_rows({"label": torch.tensor([3, 1, 4]), "scale": 2.0}, slice(1, 3))
        {'label': tensor([1, 4]), 'scale': 2.0}
    """

    def rows(value: Tensor) -> Tensor:
        if isinstance(index, Tensor):
            return value[index.to(value.device)]
        return value[index]

    return _mapped(model_kwargs, rows)


def repeat_conditions(model_kwargs: Conditions, times: int) -> dict[str, Any]:
    """The conditions of a batch that stands so many times one behind the other.

    Example:
        >>> import torch
        >>> from hos_ext.conditions import repeat_conditions
        >>> repeat_conditions({"label": torch.tensor([3, 1])}, 2)
        {'label': tensor([3, 1, 3, 1])}
    """
    return _mapped(model_kwargs, lambda value: torch.cat([value] * times))


def move_conditions(model_kwargs: Conditions, device: torch.device | str) -> dict[str, Any]:
    """The conditions with all their tensors on a device, those of no axis included.

    Example:
        >>> import torch
        >>> from hos_ext.conditions import move_conditions
        >>> move_conditions({"label": torch.tensor([3])}, "cpu")
        {'label': tensor([3])}
    """
    return {
        name: _map(value, lambda each: each.to(device), least=0)
        for name, value in model_kwargs.items()
    }


def _mapped(model_kwargs: Conditions, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: _map(value, function, least=1) for name, value in model_kwargs.items()}


def _map(value: Any, function: Callable[[Tensor], Tensor], least: int) -> Any:
    """The function on every tensor of at least so many axes."""
    if isinstance(value, Tensor):
        return function(value) if value.dim() >= least else value
    if isinstance(value, Mapping):
        return {key: _map(each, function, least) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        each = [_map(item, function, least) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*each)
        return each if isinstance(value, list) else tuple(each)
    return value


def _check_rows(where: str, name: str, value: Any, rows: int, like: str) -> None:
    if isinstance(value, Tensor):
        fine = value.dim() == 0 or value.shape[0] == rows
        if not fine:  # the rule holds a size, which under torch.compile must not be written
            rule = f"{name} must have {rows} rows like {like}"
            check(where, fine, rule, f"shape {tuple(value.shape)}")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _check_rows(where, f"{name}[{key!r}]", each, rows, like)
    elif isinstance(value, (list, tuple)):
        for key, each in enumerate(value):
            _check_rows(where, f"{name}[{key}]", each, rows, like)
    else:
        rule = f"{name} must be a Tensor (torch.from_numpy)"
        fine = not isinstance(value, np.ndarray)
        check(where, fine, rule, lambda: f"an array of shape {value.shape}", TypeError)
