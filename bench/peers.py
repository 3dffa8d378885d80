"""What the operators are measured against, and the inputs on which.

Variants, one name each everywhere: "hos_ext"; "eager", the closed form in plain torch, which is
`hos_ext.ops.reference`; "compiled", the same under torch.compile; "lean" and "lean compiled", the
closed form written for speed alone (no sign; no differences first, so its float32 value loses
digits as sigma goes to 0); "dense", D x D matrices as one writes the formulas down. "hos_ext out="
writes into a given tensor; "kernels" are ours without checks and autograd, into given gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import hos_ext
from hos_ext.ops import _native as native
from hos_ext.ops import reference
from hos_ext.ops._native import queue_of
from hos_ext.ops.losses import D2SM_VR
from hos_ext.ops.losses import _forward as loss_and_saved

Function = Callable[..., Any]


def compiled(function: Function) -> Function:
    """torch.compile without graph breaks; for the shapes of the first call."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def forward(function: Function, inputs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """A call without gradients."""

    def step() -> list[Tensor]:
        with torch.no_grad():
            return [function(*inputs)]

    return step


def forward_backward(loss: Function, inputs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """A training step's share of the loss: fresh gradients of score, diag and factor."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]

    def step() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        value = loss(*leaves, *inputs[3:])
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    return step


# ------------------------------------------------------------------------------------------ losses


def second_order_inputs(
    batch: int, size: int, rank: int, *, points: int, seed: int = 0
) -> list[Tensor]:
    """score, diag, factor at `points` points (stacked where more than one), noise, sigma `(B,)`."""
    generator = torch.Generator().manual_seed(seed)
    stack = (points,) if points > 1 else ()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        draw(*stack, batch, size),
        draw(*stack, batch, size),
        draw(*stack, batch, size, rank) / size**0.5,
        draw(batch, size),
        0.5 + torch.rand(batch, generator=generator),
    ]


def d2sm_losses() -> dict[str, Function]:
    """Eq. 13 without |C|^2, mean over the batch."""
    return {
        "hos_ext": hos_ext.d2sm_loss,
        "eager": _eager_d2sm,
        "compiled": compiled(_eager_d2sm),
        "lean": _lean_d2sm,
        "lean compiled": compiled(_lean_d2sm),
        "dense": _dense_d2sm,
    }


def d2sm_vr_losses() -> dict[str, Function]:
    """Half of Eq. 33, mean over the batch."""
    return {
        "hos_ext": hos_ext.d2sm_vr_loss,
        "eager": _eager_d2sm_vr,
        "compiled": compiled(_eager_d2sm_vr),
        "lean": _lean_d2sm_vr,
        "lean compiled": compiled(_lean_d2sm_vr),
        "dense": dense_d2sm_vr,
    }


def kernels(inputs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """The kernels of `d2sm_vr_loss` alone: no checks, no autograd, into gradients there are."""
    score, diag, factor, noise, sigma = inputs
    kind, batch = D2SM_VR, len(noise)
    sigma = sigma.double()
    weights = torch.full((batch,), 1 / batch)
    grads = [torch.empty_like(t) for t in inputs[:3]]
    loss, saved = loss_and_saved(kind, score, diag, factor, noise, sigma, None)
    call = {"queue": queue_of(noise), "kind": kind, "score": score, "diag": diag}
    call |= {"factor": factor, "noise": noise, "sigma": sigma, "sign": None, "saved": saved}
    names = ("grad_score", "grad_diag", "grad_factor")
    into = {"grad": weights} | dict(zip(names, grads, strict=True))

    def step() -> list[Tensor]:
        native._C.loss(**call, loss=loss, scratch=None)
        native._C.loss_backward(**call, **into)
        return [loss.mean(), *grads]

    return step


def _eager_d2sm(*inputs: Tensor) -> Tensor:
    return reference.d2sm_loss(*inputs).mean()


def _eager_d2sm_vr(*inputs: Tensor) -> Tensor:
    return reference.d2sm_vr_loss(*inputs).mean()


def _lean_norm(score: Tensor, diag: Tensor, factor: Tensor) -> Tensor:
    """|psi|_F^2 = |d|^2 + 2 sum_i d_i (|u_i|^2 + s_i^2) + |U^T U|^2 + 2 |U^T s|^2 + |s|^4."""
    gram = factor.mT @ factor
    column = (factor.mT @ score.unsqueeze(-1)).squeeze(-1)
    rows = factor.square().sum(-1) + score.square()
    return (
        (diag * (diag + 2 * rows)).sum(-1)
        + gram.square().sum((-1, -2))
        + 2 * column.square().sum(-1)
        + score.square().sum(-1).square()
    )


def _lean_inner(score: Tensor, diag: Tensor, factor: Tensor, noise: Tensor) -> Tensor:
    """sigma^2 <C, psi> = tr psi - z^T psi z."""
    along = (noise.unsqueeze(-2) @ factor).squeeze(-2)
    return (
        (diag * (1 - noise.square())).sum(-1)
        + factor.square().sum((-1, -2))
        - along.square().sum(-1)
        + score.square().sum(-1)
        - (score * noise).sum(-1).square()
    )


def _lean_d2sm(score: Tensor, diag: Tensor, factor: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    inner = _lean_inner(score, diag, factor, noise)
    return (_lean_norm(score, diag, factor) + 2 * inner / sigma.square()).mean()


def _lean_d2sm_vr(
    score: Tensor, diag: Tensor, factor: Tensor, noise: Tensor, sigma: Tensor
) -> Tensor:
    # unbind once: its backward writes each gradient once, that of indexing once for every use.
    plus, minus, clean = zip(score.unbind(), diag.unbind(), factor.unbind(), strict=True)
    half = (_lean_norm(*plus) + _lean_norm(*minus)) / 2
    inner = _lean_inner(*plus, noise) + _lean_inner(*minus, noise) - 2 * _lean_inner(*clean, noise)
    return (half + inner / sigma.square()).mean()


def _dense_psi(score: Tensor, diag: Tensor, factor: Tensor) -> Tensor:
    outer = score.unsqueeze(-1) * score.unsqueeze(-2)
    return torch.diag_embed(diag) + factor @ factor.mT + outer


def _dense_target(noise: Tensor, sigma: Tensor) -> Tensor:
    identity = torch.eye(noise.shape[-1], device=noise.device)
    outer = noise.unsqueeze(-1) * noise.unsqueeze(-2)
    return (identity - outer) / sigma.square()[:, None, None]


def _dense_d2sm(
    score: Tensor, diag: Tensor, factor: Tensor, noise: Tensor, sigma: Tensor
) -> Tensor:
    psi, target = _dense_psi(score, diag, factor), _dense_target(noise, sigma)
    return ((psi * psi).sum((-1, -2)) + 2 * (target * psi).sum((-1, -2))).mean()


def dense_d2sm_vr(
    score: Tensor, diag: Tensor, factor: Tensor, noise: Tensor, sigma: Tensor
) -> Tensor:
    points = zip(score.unbind(), diag.unbind(), factor.unbind(), strict=True)
    plus, minus, clean = (_dense_psi(*point) for point in points)
    target = _dense_target(noise, sigma)
    half = ((plus * plus).sum((-1, -2)) + (minus * minus).sum((-1, -2))) / 2
    return (half + (target * (plus + minus - 2 * clean)).sum((-1, -2))).mean()


# ------------------------------------------------------------------------------------------- steps


def step_inputs(batch: int, size: int, *, seed: int = 0) -> list[Tensor]:
    """x, score, diag: `(B, D)`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, size, generator=generator) for _ in range(3)]


def ozaki_steps(inputs: Sequence[Tensor], step_size: float) -> dict[str, Callable[[], Tensor]]:
    """One diagonal step without gradient, its noise drawn within.

    "hos_ext" as a chain calls it, with seed and offset; "hos_ext out=" into a buffer besides;
    "hos_ext unseeded" with a seed from torch's generator each time.
    """
    x, score, diag = inputs
    out = torch.empty_like(x)
    fused = compiled(_eager_ozaki)
    return {
        "hos_ext": lambda: hos_ext.ozaki_step(x, score, diag, step_size, seed=1, offset=2),
        "hos_ext out=": lambda: hos_ext.ozaki_step(
            x, score, diag, step_size, seed=1, offset=2, out=out
        ),
        "hos_ext unseeded": lambda: hos_ext.ozaki_step(x, score, diag, step_size),
        "eager": lambda: _eager_ozaki(x, score, diag, step_size),
        "compiled": lambda: fused(x, score, diag, step_size),
    }


def _eager_ozaki(x: Tensor, score: Tensor, diag: Tensor, step_size: float) -> Tensor:
    return reference.ozaki_step(x, score, diag, step_size, torch.randn_like(x))


def ozaki_gradients(inputs: Sequence[Tensor], step_size: float) -> dict[str, Function]:
    """A step with given noise, forward and backward through x, score and diag; the mean of x'."""
    noise = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    noise = noise.to(inputs[0].device)

    def own(x: Tensor, score: Tensor, diag: Tensor) -> Tensor:
        return hos_ext.ozaki_step(x, score, diag, step_size, noise=noise).mean()

    def eager(x: Tensor, score: Tensor, diag: Tensor) -> Tensor:
        return reference.ozaki_step(x, score, diag, step_size, noise).mean()

    return {"hos_ext": own, "eager": eager}


def check_ozaki_steps(
    steps: dict[str, Callable[[], Tensor]], inputs: Sequence[Tensor], step_size: float
) -> None:
    """The noise of each step, (x' - mean) / deviation by `reference`, has mean 0 and variance 1.

    Raises:
        ValueError: more than 6 standard errors off; the message names the contestant.
    """
    x, score, diag = inputs
    mean = reference.ozaki_step(x, score, diag, step_size, torch.zeros_like(x))
    deviation = reference.ozaki_step(x, score, diag, step_size, torch.ones_like(x)) - mean
    for name, step in steps.items():
        noise = ((step() - mean) / deviation).double()
        average, variance = float(noise.mean()), float(noise.square().mean())
        n = noise.numel()
        if not (abs(average) <= 6 / n**0.5 and abs(variance - 1) <= 6 * (2 / n) ** 0.5):
            raise ValueError(
                f"check_ozaki_steps: noise of {name} must have mean 0 and variance 1, got "
                f"{average:.3g} and {variance:.3g} over {n} entries"
            )


# ----------------------------------------------------------------------------------------- Hessian


def hessian_inputs(batch: int, size: int, rank: int, *, seed: int = 0) -> list[Tensor]:
    """diag `(B, D)` and factor `(B, D, r)`."""
    _, diag, factor, _, _ = second_order_inputs(batch, size, rank, points=1, seed=seed)
    return [diag, factor]


def assemblies(inputs: Sequence[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """diag(d) + U U^T into a fresh tensor, and into a given one where that is possible."""
    diag, factor = inputs
    fused_bmm, fused_baddbmm = compiled(_bmm), compiled(_baddbmm)
    size = diag.shape[-1]
    own, out = (diag.new_empty(*diag.shape, size) for _ in range(2))

    def into() -> Tensor:
        torch.bmm(factor, factor.mT, out=out)
        out.diagonal(0, -2, -1).add_(diag)
        return out

    return {
        "hos_ext": lambda: hos_ext.assemble_hessian(diag, factor),
        "eager": lambda: reference.assemble_hessian(diag, factor),
        "bmm": lambda: _bmm(diag, factor),
        "baddbmm": lambda: _baddbmm(diag, factor),
        "bmm compiled": lambda: fused_bmm(diag, factor),
        "baddbmm compiled": lambda: fused_baddbmm(diag, factor),
        "bmm out=": into,
        "hos_ext out=": lambda: hos_ext.assemble_hessian(diag, factor, out=own),
    }


def _bmm(diag: Tensor, factor: Tensor) -> Tensor:
    out = torch.bmm(factor, factor.mT)
    out.diagonal(0, -2, -1).add_(diag)
    return out


def _baddbmm(diag: Tensor, factor: Tensor) -> Tensor:
    return torch.baddbmm(torch.diag_embed(diag), factor, factor.mT)
