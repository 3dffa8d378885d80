"""The streams of the noise: who owns them, and draws that must never change."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NORMAL_ATOL
from torch import Tensor

import hos_ext
from hos_ext import random

PACKAGE = Path(hos_ext.__file__).parent
NAMES = {n: v for n, v in vars(random).items() if n.startswith("STREAM_")}
# Recorded before the package had rooms. Uniforms are the same on every machine; normals of other
# instruction sets differ by rounding.
KNOWN: dict[str, Any] = json.loads((Path(__file__).parent / "known_draws.json").read_text())
KEY: dict[str, int] = {"seed": 2**63 + 5, "offset": 2**40 + 7, "first": 3}


def assert_known(got: Tensor, known: list[float], *, rounds: bool) -> None:
    expected = torch.tensor(known, dtype=got.dtype)
    if rounds and hos_ext.build_info()["cpu_level"] != KNOWN["cpu_level"]:
        wide = got.dtype == torch.float64
        atol = NORMAL_ATOL[torch.float64] if wide else 1e-6
        torch.testing.assert_close(got.flatten(), expected, rtol=0, atol=10 * atol)
    else:
        assert torch.equal(got.flatten(), expected)


# ---------------------------------------------------------------------------------- the owners


def test_every_name_has_its_own_number_and_every_number_a_name() -> None:
    assert sorted(NAMES.values()) == sorted(random.STREAMS)
    assert len(set(NAMES.values())) == len(NAMES)
    assert all(number == stream.number < 64 for number, stream in random.STREAMS.items())
    assert len({stream.purpose for stream in random.STREAMS.values()}) == len(random.STREAMS)


def test_a_number_is_given_once() -> None:
    with pytest.raises(ValueError, match=r"^stream: number must be free and in \[0, 64\), got 3$"):
        random._stream(3, "app", "a second owner")
    with pytest.raises(ValueError, match=r"got 64$"):
        random._stream(64, "app", "a stream of the users")


def test_rooms_draw_from_the_streams_that_they_own() -> None:
    users: dict[str, set[str]] = {name: set() for name in NAMES}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "random":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name) and node.id in users:
                users[node.id].add(room)
            elif isinstance(node, ast.keyword) and node.arg == "stream":
                assert not isinstance(node.value, ast.Constant), f"{path}: stream without a name"
    owners = {name: set(random.STREAMS[number].owners) for name, number in NAMES.items()}
    assert users == owners


# ------------------------------------------------------------------------------- the known draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("stream", sorted(random.STREAMS))
def test_streams_draw_what_they_drew(stream: int, kind: str, dtype: torch.dtype) -> None:
    got = getattr(hos_ext, kind)((1, 3), **KEY, stream=stream, dtype=dtype)
    known = KNOWN["streams"][f"{stream} {kind} {str(dtype).removeprefix('torch.')}"]
    assert_known(got, known, rounds=kind == "normal")


def test_a_chain_draws_what_it_drew() -> None:
    init = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    got = hos_ext.sample(
        lambda x: -x,
        init,
        method="mala",
        step_size=0.5,
        n_steps=6,
        log_prob=lambda x: -x.square().sum(-1) / 2,
        seed=11,
    )
    assert_known(got.draws.flatten(0, 1)[::3], KNOWN["chain"], rounds=True)


def test_a_training_batch_draws_what_it_drew() -> None:
    """The loss of each sample is a function of its noise."""

    def model(x: Tensor, sigma: Tensor | float) -> hos_ext.Scores:
        level = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1)
        variance = level**2 + 1
        return hos_ext.Scores(-level * x / variance, (1 - level**2 / variance).expand_as(x), None)

    x0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    got = [
        hos_ext.score_matching_loss(
            model,
            x0,
            0.5,
            variance_reduction=vr,
            centred=False,
            seed=11,
            offset=2,
            first=5,
            reduction="none",
        )
        for vr in (True, False)
    ]
    expected = torch.tensor(KNOWN["batch"], dtype=torch.float64)
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-12, atol=1e-12)


def test_a_posterior_draws_what_it_drew() -> None:
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    factor = torch.full((2, 3, 1), 0.1, dtype=torch.float64)
    scores = hos_ext.Scores(-0.4 * x, torch.full_like(x, 0.8), factor)
    got = hos_ext.posterior(x, scores, 0.5).sample(2, seed=11, offset=2)
    expected = torch.tensor(KNOWN["posterior"], dtype=torch.float64)
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-12, atol=1e-12)
