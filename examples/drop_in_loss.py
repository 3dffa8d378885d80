"""A training loop of one's own: the fused loss in place of the dense expression.

Trains a second-order score network on 2-d data twice from the same start, once with the D x D
expression that people write today and once with `hos_ext.d2sm_vr_loss`, and prints both losses and
the largest difference between the two networks. Run: python examples/drop_in_loss.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import copy

import torch
from torch import Tensor, nn

import hos_ext

SIGMA = 0.3


def dense_loss(score: Tensor, diag: Tensor, factor: Tensor, z: Tensor) -> Tensor:
    """Half of Eq. 33 of Meng et al. 2021, with every D x D matrix formed."""
    s2 = torch.diag_embed(diag) + factor @ factor.mT
    psi = s2 + score.unsqueeze(-1) * score.unsqueeze(-2)
    target = (torch.eye(z.shape[1]) - z.unsqueeze(-1) * z.unsqueeze(-2)) / SIGMA**2
    norms = psi[:2].square().sum((0, -1, -2)) / 2
    return (norms + (target * (psi[0] + psi[1] - 2 * psi[2])).sum((-1, -2))).mean()


def fused_loss(score: Tensor, diag: Tensor, factor: Tensor, z: Tensor) -> Tensor:
    return hos_ext.d2sm_vr_loss(score, diag, factor, z, SIGMA)


def train(net: nn.Module, loss_of, data: Tensor, steps: int) -> float:
    """A plain loop: noise the batch, visit the network once at three points, step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = data[torch.randint(len(data), (128,), generator=generator)]
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        points = torch.stack([x + SIGMA * z, x - SIGMA * z, x])
        score, diag, column = net(points).split(2, dim=-1)
        loss = loss_of(score, diag, column.unsqueeze(-1), z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    data = torch.randn(2000, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    dense = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 6))
    fused = copy.deepcopy(dense)
    losses = train(dense, dense_loss, data, steps), train(fused, fused_loss, data, steps)
    pairs = zip(dense.parameters(), fused.parameters(), strict=True)
    apart = max((a - b).detach().abs().max().item() for a, b in pairs)
    print(f"dense {losses[0]:.6f}  fused {losses[1]:.6f}  largest parameter difference {apart:.1e}")


if __name__ == "__main__":
    main()
