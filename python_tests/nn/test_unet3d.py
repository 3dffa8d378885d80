"""The network for volumes: shapes, the law it starts at, what it sees, its files, its training."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hos_ext
from hos_ext.nn import UNet3d

DIMS = (2, 3, 6, 5)


def build(rank: int = 2, **options: Any) -> UNet3d:
    torch.manual_seed(0)
    return UNet3d(DIMS, rank, **({"channels": (8, 16)} | options))


def stirred(model: UNet3d) -> UNet3d:
    """With weights of no special values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.mark.parametrize("trunk", ["shared", "separate"])
@pytest.mark.parametrize("rank", [0, 3])
def test_it_starts_at_the_gaussian_of_the_data(rank: int, trunk: str) -> None:
    model = build(rank, trunk=trunk, sigma_data=1.5, c_min=0.0).double()
    x, sigma = torch.randn(4, *DIMS).double(), torch.tensor([0.1, 0.5, 1.0, 3.0]).double()
    scores = model(x, sigma)
    variance = (sigma**2 + 1.5**2).reshape(-1, 1, 1, 1, 1)
    scaled = sigma.reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(scores.scaled_score, -scaled * x / variance)
    torch.testing.assert_close(scores.c, (1.5**2 / variance).expand_as(x))
    if rank:
        assert scores.factor.shape == (4, math.prod(DIMS), rank)
        assert scores.factor.norm(dim=1).max() < 3
    else:
        assert scores.factor is None


def test_rows_of_the_factor_are_the_entries_of_a_sample() -> None:
    """Entry (c, d, h, w) moves with the factor's row of that place: heads share their layout."""
    model = stirred(build(1)).double()
    with torch.no_grad():
        model.factor.weight.copy_(model.c.weight)  # one column: the same channels as c
        model.c.bias.zero_()
    model.constrained = False
    x = torch.randn(2, *DIMS).double()
    scores = model(x, 0.7)
    k = 1 / (1 + 0.7**2) ** 0.5  # c = k^2 (1 + conv(f)), factor = conv(k f)
    expected = (scores.c / k**2 - 1) * k
    torch.testing.assert_close(scores.factor[..., 0].reshape(x.shape), expected)


def test_noise_level_class_and_place_are_seen() -> None:
    model = stirred(build(num_classes=3))
    x = torch.randn(1, *DIMS).expand(4, -1, -1, -1, -1)
    by_level = model(x, torch.tensor([0.1, 0.3, 1.0, 2.0])).c
    assert by_level.flatten(1).std(0).min() > 1e-4
    by_class = model(x, 0.5, label=torch.tensor([0, 1, 2, 3])).c
    assert by_class.flatten(1).std(0).min() > 1e-5
    torch.testing.assert_close(by_class[3:], model(x[:1], 0.5).c)
    moved = model(x[:1].roll(1, 2), 0.5).c
    assert not torch.allclose(moved, by_class[3:])


def test_samples_do_not_see_one_another_and_every_voxel_reaches_the_middle() -> None:
    model = stirred(build()).double()
    x = torch.randn(3, *DIMS).double()
    torch.testing.assert_close(model(x, 0.5).c[1:2], model(x[1:2], 0.5).c)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x, 0.5).scaled_score[0, 0, 1, 3, 2], x)
    assert (grad[0] != 0).all()
    assert (grad[1:] == 0).all()


def test_checkpointing_gives_the_same_gradients() -> None:
    x = torch.randn(2, *DIMS)
    found = []
    for wanted in (False, True):
        model = stirred(build())
        model.gradient_checkpointing = wanted
        assert model.gradient_checkpointing is wanted
        loss = hos_ext.score_matching_loss(model, x, 0.5, seed=0)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_it_is_saved_and_serves_as_a_head(tmp_path: Path) -> None:
    model = stirred(build(num_classes=2, trunk="separate"))
    hos_ext.save_model(model, tmp_path / "a", step=3)
    again, config = hos_ext.load_model(tmp_path / "a")
    x = torch.randn(2, *DIMS)
    assert config["step"] == 3
    assert torch.equal(again(x, 0.5).c, model.eval()(x, 0.5).c)
    head = build(given_score=True)
    whole = hos_ext.SecondOrderHead(lambda x, sigma: -sigma * x / (1 + sigma**2), head)
    assert whole(x, 0.5).factor.shape == (2, math.prod(DIMS), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (1, 4, 4)}, "UNet3d: dims must be (C, depth, height, width), got (1, 4, 4)"),
        ({"channels": (8, 12)}, "UNet3d: channels must be multiples of norm_num_groups = 8, got"),
        ({"layers_per_block": 0}, "UNet3d: layers_per_block must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    given = {"dims": DIMS, "rank": 1} | options
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        UNet3d(given.pop("dims"), given.pop("rank"), **given)


@pytest.mark.slow
def test_it_learns_what_neighbours_say() -> None:
    """Volumes that are constant in depth: the error falls well below that of a single voxel."""
    torch.manual_seed(0)
    model = UNet3d((1, 4, 4, 4), 1, channels=(8, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def draw(n: int, seed: int) -> Tensor:
        flat = torch.randn(n, 1, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        return flat.expand(-1, -1, 4, -1, -1).contiguous()

    for step in range(60):
        loss = hos_ext.score_matching_loss(
            model, draw(32, step), 1.0, gamma=64.0, variance_reduction=False, seed=1, offset=step
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clean = draw(64, 10**6)
    noisy = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    mean = hos_ext.posterior(noisy, model.eval()(noisy, 1.0), 1.0).mean
    error = (mean - clean).square().mean().item()
    assert error < 0.35  # alone 0.5; the exact posterior has 0.2
