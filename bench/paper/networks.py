"""The networks of the paper's appendix C.2 and their training, at one noise level.

They speak in data units, `net(x) -> UnscaledScores`, as the paper's do: s1 from a network of width
128 with three hidden layers, the diagonal and the factor of s2 from two more of width 32 with three
hidden layers, tanh everywhere, Adam. Batch, steps and rates of the paper are not known: here the
rate falls to zero by a cosine. The losses are the library's operators.
"""

from __future__ import annotations

import copy
import itertools
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hos_ext import (
    UnscaledScores,
    d2sm_diag_loss,
    d2sm_diag_vr_loss,
    d2sm_loss,
    d2sm_vr_loss,
    dsm_loss,
    dsm_vr_loss,
    normal,
    score_matching_loss,
)
from hos_ext.checks import require
from hos_ext.storage import write_whole

ROOT = Path(__file__).resolve().parent.parent.parent
# Batches are drawn so many at a time.
_CHUNK = 50
# What a training run takes beside its net, its law and its noise level.
PAPER: dict[str, Any] = {
    "batch": 128,
    "rate": 1e-3,
    "decay": "cosine",
    "first_order": "vr",
    "second_order": "vr",
}
# Second-order terms to compare with. "published": the loss of the authors' code by our closed form,
# its weights, s1 not given, and a diagonal s2 matched as a whole matrix. "uncorrected": Eq. 33 with
# C = (I - z z^T) / sigma for C = (I - z z^T) / sigma^2: it fits sigma (s2 + s1 s1^T) - s1 s1^T.
PEERS = ("published", "uncorrected")
BEST = PAPER | {"rate": 2e-3, "first_order": "antithetic", "second_order": "centred"}


class Net(nn.Module):
    """s1, and with heads the diagonal and the factor of s2, each by a network of its own.

    Args:
        dim: D.
        rank: columns of the factor; None is a net for s1 alone.
        width, head_width: of the hidden layers for s1, and for the two parts of s2.
        depth: hidden layers of each.
        linear: adds a linear map of x to s1: what is left to learn is how far the law is from a
            normal one.
        alone: hidden units of a network for each coordinate by itself, added to s1 and to the
            diagonal; 0 for none.
        seed: of the initial weights; those of `first` and `linear` do not depend on the rank.
    """

    def __init__(
        self,
        dim: int,
        rank: int | None,
        *,
        width: int = 128,
        head_width: int = 32,
        depth: int = 3,
        linear: bool = False,
        alone: int = 0,
        seed: int,
    ) -> None:
        super().__init__()
        self.dim, self.rank = dim, rank
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.first = _layers(dim, width, depth, dim)
            self.linear = nn.Linear(dim, dim) if linear else None
            self.diag = None if rank is None else _layers(dim, head_width, depth, dim)
            self.factor = None if not rank else _layers(dim, head_width, depth, dim * rank)
            self.first_alone = _Coordinates(dim, alone) if alone else None
            self.diag_alone = _Coordinates(dim, alone) if alone and rank is not None else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def score(self, x: Tensor) -> Tensor:
        value: Tensor = self.first(x)
        if self.linear is not None:
            value = value + self.linear(x)
        return value if self.first_alone is None else value + self.first_alone(x)

    def second(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The diagonal d and the factor U (B, D, r) of s2 = diag(d) + U U^T."""
        assert self.diag is not None
        diag = self.diag(x)
        if self.diag_alone is not None:
            diag = diag + self.diag_alone(x)
        factor = None if self.factor is None else self.factor(x).reshape(*x.shape, self.rank)
        return diag, factor

    def forward(self, x: Tensor) -> UnscaledScores:
        return UnscaledScores(self.score(x), *self.second(x))


class _Coordinates(nn.Module):
    """Two hidden layers for each coordinate: what it sees of a law whose coordinates stand alone.

    The first layer's kinks lie about the origin, a few for each unit of length.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.slopes = nn.Parameter(1.5 * torch.randn(dim, 1, width))
        self.shifts = nn.Parameter(1.5 * torch.randn(dim, 1, width))
        self.hidden = nn.Parameter(torch.randn(dim, width, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(dim, 1, width))
        self.out = nn.Parameter(0.3 * torch.randn(dim, width, 1) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        columns = x.reshape(-1, x.shape[-1]).mT.unsqueeze(-1)
        first = torch.baddbmm(self.shifts, columns, self.slopes).tanh()
        second = torch.baddbmm(self.bias, first, self.hidden).tanh()
        return (second @ self.out).squeeze(-1).mT.reshape(x.shape)


def _layers(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    sizes = [inputs] + [width] * depth
    parts: list[nn.Module] = []
    for low, high in itertools.pairwise(sizes):
        parts += [nn.Linear(low, high), nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(width, outputs))


def objective(
    net: Net,
    x: Tensor,
    noise: Tensor,
    sigma: float,
    *,
    first_order: str,
    second_order: str,
    diagonal: bool,
    detach: bool = True,
) -> Tensor:
    """The joint loss of a batch: second-order term plus first-order term.

    Args:
        first_order: "plain" (Eq. 3), "vr" (Eq. 32) or "antithetic".
        second_order: "none", "plain" (Eq. 13, 17), "vr" (Eq. 33 and its diagonal form), "centred"
            (`score_matching_loss` with centred) or one of PEERS.
        diagonal: the diagonal form of the second-order term.
        detach: s1 is given in the second-order term.
    """
    if second_order == "centred":
        return score_matching_loss(
            lambda at, level: net(at).scaled(level),
            x,
            sigma,
            first_order=first_order,  # type: ignore[arg-type]
            diagonal=diagonal,
            scale_free=False,
            variance_reduction=True,
            centred=True,
            noise=noise,
        )
    points = [x + sigma * noise]
    three = second_order in ("vr", *PEERS)
    if first_order == "antithetic" or three:
        points.append(x - sigma * noise)
    if first_order == "vr" or three:
        points.append(x)
    at = torch.cat(points)
    score = net.score(at).reshape(len(points), *x.shape)
    if first_order == "plain":
        loss = dsm_loss(score[0], noise, sigma)
    elif first_order == "vr":
        loss = dsm_vr_loss(torch.stack([score[0], score[-1]]), noise, sigma)
    else:
        loss = (dsm_loss(score[0], noise, sigma) + dsm_loss(score[1], -noise, sigma)) / 2
    if second_order == "none":
        return loss
    given = score.detach() if detach else score
    count = 3 if three else 1
    diag, factor = net.second(at[: count * len(x)])
    diag = diag.reshape(count, *x.shape)
    if factor is not None:
        factor = factor.reshape(count, *x.shape, -1)
    if second_order == "published":
        weight = (1 if factor is None else 10) / sigma**2
        return weight * loss + d2sm_vr_loss(given, diag, factor, noise, sigma)
    if second_order == "uncorrected":
        sigma = sigma**0.5
    if second_order in ("vr", "uncorrected"):
        if diagonal:
            return loss + d2sm_diag_vr_loss(given, diag, noise, sigma)
        return loss + d2sm_vr_loss(given, diag, factor, noise, sigma)
    if diagonal:
        return loss + d2sm_diag_loss(given[0], diag[0], noise, sigma)
    return loss + d2sm_loss(given[0], diag[0], None if factor is None else factor[0], noise, sigma)


def batches(law: Any, batch: int, seed: int) -> Callable[[int], Tensor]:
    """Fresh float32 samples of a law for each step, the same for the same seed."""
    law = law.to(dtype=torch.float32)
    drawn = torch.empty(0)

    def at(step: int) -> Tensor:
        nonlocal drawn
        chunk, place = divmod(step, _CHUNK)
        if place == 0 or not len(drawn):
            drawn = law.sample(batch * _CHUNK, seed=(seed << 32) + chunk)
        return drawn[place * batch : (place + 1) * batch]

    return at


def train(
    net: nn.Module,
    law: Any,
    loss: Callable[[nn.Module, Tensor, int], Tensor],
    *,
    steps: int,
    batch: int,
    rate: float,
    decay: str,
    seed: int,
    ema_decay: float = 0.999,
    watch: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Adam on `loss(net, x, step)`; trains net in place and returns the average of its weights.

    Args:
        rate: learning rate.
        decay: "none", or "cosine" to zero after a warm-up of a twentieth of the steps.
        seed: of the samples.
        ema_decay: of the average, at most (1 + t) / (10 + t).
        watch: called with the steps done and the net, before the first step and after each.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, fused=True)
    average = copy.deepcopy(net)
    pairs = list(zip(average.parameters(), net.parameters(), strict=True))
    draw = batches(law, batch, seed)
    if watch is not None:
        watch(0, net)
    for step in range(steps):
        if decay == "cosine":
            warm = min(1.0, (step + 1) / max(1, steps // 20))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss(net, draw(step), step).backward()
        optimizer.step()
        weight = 1 - min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_([p for p, _ in pairs], [p for _, p in pairs], weight)
        if watch is not None:
            watch(step + 1, net)
    return average


def train_net(
    net: Net,
    law: Any,
    sigma: float,
    *,
    steps: int,
    seed: int,
    diagonal: bool,
    detach: bool = True,
    watch: Callable[[int, nn.Module], None] | None = None,
    batch: int,
    rate: float,
    decay: str,
    first_order: str,
    second_order: str,
) -> Net:
    """`train` with `objective` at one noise level; the noise of a step depends on (seed, step)."""

    def loss(current: nn.Module, x: Tensor, step: int) -> Tensor:
        assert isinstance(current, Net)
        noise = normal(tuple(x.shape), seed=seed, offset=step, dtype=x.dtype)
        return objective(
            current,
            x,
            noise,
            sigma,
            first_order=first_order,
            second_order=second_order,
            diagonal=diagonal,
            detach=detach,
        )

    average = train(
        net, law, loss, steps=steps, batch=batch, rate=rate, decay=decay, seed=seed, watch=watch
    )
    assert isinstance(average, Net)
    return average


def remembered(name: str, settings: dict[str, Any], net: Net, fit: Callable[[Net], Net]) -> Net:
    """`fit(net)`, or its weights from build/paper-models if they are there.

    Args:
        name: of the file, with the law and the noise level in it.
        settings: what else the result depends on.
    """
    name += f" {zlib.crc32(repr(sorted(settings.items())).encode()):08x}"
    safetensors = require("bench.paper", "safetensors.torch")
    path = ROOT / "build" / "paper-models" / f"{name.replace(' ', '-')}.safetensors"
    if path.exists():
        net.load_state_dict(safetensors.load_file(path))
        return net
    fitted = fit(net)
    write_whole(path, safetensors.save(fitted.state_dict()))
    return fitted
