"""Conditions of a model: one row a sample, repeated for points and cut into chunks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from hos_ext.conditions import (
    check_conditions,
    condition_rows,
    move_conditions,
    repeat_conditions,
)


class Pair(NamedTuple):
    left: torch.Tensor
    right: float


def nested():
    return {
        "label": torch.tensor([3, 1, 4]),
        "text": {"states": torch.arange(6.0).reshape(3, 2), "masks": [torch.eye(3), None]},
        "pair": Pair(torch.arange(3), 0.5),
        "scale": torch.tensor(2.0),
        "name": "cats",
    }


def test_rows_of_nested_conditions():
    for index in (slice(1, 3), torch.tensor([1, 2])):
        found = condition_rows(nested(), index)
        assert found["label"].tolist() == [1, 4]
        assert found["text"]["states"].tolist() == [[2, 3], [4, 5]]
        assert found["text"]["masks"][0].tolist() == [[0, 1, 0], [0, 0, 1]]
        assert found["text"]["masks"][1] is None
        assert isinstance(found["pair"], Pair)
        assert found["pair"].left.tolist() == [1, 2]
        assert found["scale"] == 2
        assert (found["pair"].right, found["name"]) == (0.5, "cats")


def test_repeated_conditions_stand_as_the_points_do():
    found = repeat_conditions(nested(), 2)
    assert found["label"].tolist() == [3, 1, 4, 3, 1, 4]
    assert found["text"]["masks"][0].shape == (6, 3)
    assert found["scale"].shape == ()


def test_moved_conditions():
    found = move_conditions(nested(), "meta")
    assert found["label"].device.type == found["scale"].device.type == "meta"
    assert found["text"]["masks"][0].device.type == "meta"


def test_no_condition_is_an_empty_dict():
    given = nested()
    assert check_conditions("f", None, 3) == {}
    checked = check_conditions("f", given, 3)
    assert checked == given
    assert checked is not given


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"label": torch.zeros(4)},
            ValueError,
            r"model_kwargs\['label'\] must have 3 rows",
        ),
        (
            {"text": {"mask": [torch.zeros(3), torch.zeros(1, 3)]}},
            ValueError,
            r"model_kwargs\['text'\]\['mask'\]\[1\] must have 3 rows .*got shape \(1, 3\)",
        ),
        ({"label": np.zeros(3)}, TypeError, r"model_kwargs\['label'\] .*torch.from_numpy"),
        ({3: torch.zeros(3)}, TypeError, "model_kwargs must be named by strings, got 3"),
        (torch.zeros(3), TypeError, "model_kwargs must be a Mapping, got Tensor"),
    ],
)
def test_conditions_that_do_not_fit_are_named(given, error, message):
    with pytest.raises(error, match=f"^f: {message}"):
        check_conditions("f", given, 3, "x0")
