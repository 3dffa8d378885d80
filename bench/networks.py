"""Whole networks: the second-order score at a batch of points, a training step, a sampling step.

The first is the paper's Table 2 (Meng et al. 2021), extended: the learned head against automatic
differentiation of a score network. The score network is that of the model without its heads, with
the fewer parameters of the two, so that the comparison does not favour the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, jvp, vmap

import hos_ext
from hos_ext import Scores, UnscaledScores

from . import peers, timer

SIGMA = 0.5
BATCH = 10  # points of the second-order score
RANKS = (20, 50, 200, 1000)
PROBES = 32  # of Hutchinson's estimate
DIMS = {"MLP": (100,), "UNet": (1, 28, 28)}  # of the second-order score
IMAGE = {"MLP": (784,), "UNet": (1, 28, 28)}  # of the training and sampling steps
# Rows of each Jacobian that are computed; time is linear in them (`Scaled`).
ROWS = {"MLP": 100, "UNet": 28}
# Vectors multiplied at once, times BATCH evaluations of the network: the fastest of them counts.
CHUNKS = {"MLP": (10, 100), "UNet": (4, 28)}


def model(network: str, dims: Sequence[int], rank: int) -> nn.Module:
    """Our model; U-Nets without attention, whose fused form torch cannot differentiate forward."""
    torch.manual_seed(0)
    if network == "MLP":
        return hos_ext.MLP(dims, rank).eval()
    return hos_ext.UNet(dims, rank, add_attention=False).eval()


def score_network(network: str, dims: Sequence[int] | None = None) -> Callable[[Tensor], Tensor]:
    """x `(B, *dims)` -> its score `(B, D)`, by the score network of the model alone."""
    dims = dims or DIMS[network]
    torch.manual_seed(0)
    if network == "MLP":  # the paper's: 3 layers of 128, tanh
        size, layers = dims[0], []
        for width in (size, 128, 128):
            layers += [nn.Linear(width, 128), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(128, size)).requires_grad_(False).eval()
    unet = model(network, dims, 0).requires_grad_(False)  # its head for c is one small convolution
    with torch.no_grad():  # it starts at zero, which would leave nothing to differentiate
        unet.score.weight.normal_(std=0.05)  # type: ignore[union-attr, operator]
    return lambda x: unet(x, SIGMA).scaled_score.flatten(1)


def parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


# --------------------------------------------------------------------------- second-order score


class Scaled(NamedTuple):
    """A call that does a known share of the work.

    The whole takes once + (time - once) * times microseconds, where `once` is the time of a forward
    pass if the call shares one (`forward`), else 0.
    """

    call: Callable[[], Any]
    mode: str  # the question answered: "Hessian" or "diagonal"
    times: float = 1.0
    forward: bool = False
    rank: int = 0
    missing: int = 0  # bytes of the result that the call leaves out

    def whole(self, timing: timer.Timing, once: float) -> timer.Timing:
        """The time of all the work, from that of the call and of a forward pass."""
        shared = once if self.forward else 0.0
        return timer.Timing(*(shared + (value - shared) * self.times for value in timing))


def points(network: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, *DIMS[network], generator=generator)


def head(second_order: nn.Module, x: Tensor) -> UnscaledScores:
    """What our model gives at x: the score, the diagonal and the factor of its derivative."""
    with torch.no_grad():
        scores: Scores = second_order(x, SIGMA)
        return scores.unscaled(SIGMA)


def assembled(second_order: nn.Module, x: Tensor) -> Tensor:
    """The same as matrices `(B, D, D)`."""
    found = head(second_order, x)
    with torch.no_grad():
        return hos_ext.assemble_hessian(found.diag.flatten(1), found.factor)


def head_diagonal(second_order: nn.Module, x: Tensor) -> Tensor:
    """The diagonal of the matrices, `(B, D)`, without them."""
    found = head(second_order, x)
    if found.factor is None:
        return found.diag.flatten(1)
    return found.diag.flatten(1) + found.factor.square().sum(-1)


def row_loop(score: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """The paper's way: a backward pass for each row of the Jacobians; `(B, rows, D)`."""
    x = x.detach().requires_grad_()
    value = score(x)
    return torch.stack(
        [
            torch.autograd.grad(value[:, i].sum(), x, retain_graph=True)[0].flatten(1)
            for i in range(rows)
        ],
        1,
    )


def reverse(score: Callable[[Tensor], Tensor], x: Tensor, rows: int, chunk: int) -> Tensor:
    """vmap(jacrev), `chunk` rows at once; `(B, rows, D)`."""

    def single(point: Tensor) -> Tensor:
        return score(point.unsqueeze(0)).squeeze(0)[:rows]

    jacobian: Tensor = vmap(jacrev(single, chunk_size=chunk))(x)
    return jacobian.flatten(2)


def forward(score: Callable[[Tensor], Tensor], x: Tensor, columns: int, chunk: int) -> Tensor:
    """vmap(jacfwd) with respect to `chunk` entries at once; transposed, `(B, columns, D)`."""
    size = x[0].numel()

    def shifted(shift: Tensor, point: Tensor, start: int) -> Tensor:
        whole = nn.functional.pad(shift, (start, size - start - len(shift)))
        return score((point + whole.reshape(point.shape)).unsqueeze(0)).squeeze(0)

    parts = []
    for start in range(0, columns, chunk):
        zero = x.new_zeros(x.shape[0], min(chunk, columns - start))
        parts.append(vmap(jacfwd(partial(shifted, start=start)))(zero, x))
    return torch.cat(parts, -1).mT


def hutchinson(score: Callable[[Tensor], Tensor], x: Tensor, probes: int, chunk: int) -> Tensor:
    """mean of v * (J v) over Rademacher v, `(B, D)`: the diagonal, with an error of its own."""

    def product(v: Tensor) -> Tensor:
        return v.flatten(1) * jvp(score, (x,), (v,))[1]

    vectors = torch.randint(0, 2, (probes, *x.shape)).to(x).mul_(2).sub_(1)
    estimate: Tensor = vmap(product, chunk_size=chunk)(vectors)
    return estimate.mean(0)


def second_order(network: str, ranks: Sequence[int], *, tiny: bool = False) -> dict[str, Scaled]:
    """The contestants of a network at BATCH points, after checking those that must agree.

    Args:
        network: "MLP" (D = 100) or "UNet" (D = 784).
        ranks: of our heads.
        tiny: two rows of each Jacobian.
    """
    x = points(network)
    size = x[0].numel()
    score = score_network(network)
    rows = 2 if tiny else ROWS[network]
    chunks = (1, 2) if tiny else CHUNKS[network]
    missing = 4 * x.shape[0] * (size - rows) * size
    rest = {"mode": "Hessian", "times": size / rows, "missing": missing}

    def forward_pass() -> Tensor:
        return score(x.detach().requires_grad_())  # with the graph that a backward pass needs

    found = {
        "score": Scaled(forward_pass, "score"),
        "row loop": Scaled(lambda: row_loop(score, x, rows), forward=True, **rest),
    }
    for chunk in chunks:
        found[f"jacrev, {chunk} at once"] = Scaled(
            lambda chunk=chunk: reverse(score, x, rows, chunk), forward=True, **rest
        )
        found[f"jacfwd, {chunk} at once"] = Scaled(
            lambda chunk=chunk: forward(score, x, rows, chunk), **rest
        )
        found[f"Hutchinson, {chunk} at once"] = Scaled(
            lambda chunk=chunk: hutchinson(score, x, 2 if tiny else PROBES, chunk), "diagonal"
        )
    for rank in ranks:
        own = model(network, DIMS[network], rank)
        found |= {
            f"hos_ext structured, r {rank}": Scaled(
                lambda own=own: head(own, x), "Hessian", rank=rank
            ),
            f"hos_ext assembled, r {rank}": Scaled(
                lambda own=own: assembled(own, x), "Hessian", rank=rank
            ),
            f"hos_ext diagonal, r {rank}": Scaled(
                lambda own=own: head_diagonal(own, x), "diagonal", rank=rank
            ),
        }
    return found


# --------------------------------------------------------------------------------- whole steps


def dense_matching_loss(scores_of: Callable[..., Scores], x: Tensor, noise: Tensor) -> Tensor:
    """`hos_ext.score_matching_loss` of variance reduction with D x D matrices for its second part.

    The same points in one call of the model, the same antithetic first order, scale-free, with the
    score detached in the second order.
    """
    shift = SIGMA * noise
    scores = scores_of(torch.cat([x + shift, x - shift, x]), SIGMA)
    z = noise.flatten(1)
    score = scores.scaled_score.reshape(3, *z.shape)
    diag = scores.c.reshape(3, *z.shape) - 1
    assert scores.factor is not None
    factor = scores.factor.reshape(3, *z.shape, -1)
    first = ((score[0] + z).square().sum(-1) + (score[1] - z).square().sum(-1)) / 2
    second = peers.dense_d2sm_vr(score.detach(), diag, factor, z, torch.ones(len(z)))
    return second + first.mean()


def training_steps(
    network: str, rank: int, *, dims: Sequence[int], batch: int = 40
) -> dict[str, Callable[[], Tensor]]:
    """One step of Adam with our loss and with the dense one; and each loss by itself.

    "hos_ext" and "dense" draw nothing: the noise is given, and both start from the same weights.
    "hos_ext loss" and "dense loss" go from what the network gave to the gradients of that.
    """
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(batch, *dims, generator=generator) for _ in range(2))

    def own_loss(scores_of: Callable[..., Scores]) -> Tensor:
        return hos_ext.score_matching_loss(
            scores_of, x, SIGMA, variance_reduction=True, centred=False, noise=noise
        )

    def dense_loss(scores_of: Callable[..., Scores]) -> Tensor:
        return dense_matching_loss(scores_of, x, noise)

    steps: dict[str, Callable[[], Tensor]] = {}
    for name, loss in (("hos_ext", own_loss), ("dense", dense_loss)):
        trained = model(network, dims, rank).train()
        optimiser = torch.optim.Adam(trained.parameters(), lr=1e-4)

        def step(
            loss: Callable[..., Tensor] = loss,
            trained: nn.Module = trained,
            optimiser: torch.optim.Optimizer = optimiser,
        ) -> Tensor:
            optimiser.zero_grad(set_to_none=True)
            value = loss(trained)
            value.backward()
            optimiser.step()
            return value.detach()

        steps[name] = step
        with torch.no_grad():
            shift = SIGMA * noise
            given = trained(torch.cat([x + shift, x - shift, x]), SIGMA)
        parts = (given.scaled_score, given.c, given.factor)
        leaves = [t.detach().requires_grad_() for t in parts if t is not None]

        def alone(loss: Callable[..., Tensor] = loss, leaves: list[Tensor] = leaves) -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            value = loss(lambda points, sigma: Scores(*leaves))
            value.backward()
            return value.detach()

        steps[f"{name} loss"] = alone
    return steps


def sampling_steps(
    network: str, rank: int, *, dims: Sequence[int], batch: int = 40
) -> dict[str, Callable[[], Any]]:
    """One step of a chain from a network: the network alone, and with each method's update.

    "langevin", "ozaki" and "cayley" use the score, the diagonal and the whole of s2 = diag + U U^T;
    "dense" is the whole by an eigendecomposition of D x D matrices.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *dims, generator=generator)
    own = model(network, dims, rank)

    def scores(x: Tensor) -> UnscaledScores:
        return own(x, SIGMA).unscaled(SIGMA)  # type: ignore[no-any-return]

    def network_alone() -> UnscaledScores:
        with torch.no_grad():
            return scores(x)

    def chain(method: str) -> Callable[[], Any]:
        return lambda: hos_ext.sample(scores, x, method=method, step_size=0.01, n_steps=1, seed=0)

    return {
        "network": network_alone,
        "langevin": chain("langevin"),
        "ozaki": chain("ozaki"),
        "cayley": chain("ozaki_cayley"),
        "dense": chain("ozaki_full"),
    }
