"""Mean and covariance of x0 given x_t for a flow model, learned beside its velocity.

Trains a velocity network by plain flow matching on a mixture in two dimensions: x_t = (1 - t) x0 +
t z, the target is z - x0. Then takes it as a score, `ModelScore(net, Rectified(), "flow")`, and
learns a `SecondOrderHead` beside it. Prints the errors of the mean and the covariance of x0 given
x_t against the exact ones, those of the velocity's own Jacobian beside them, and how near samples
come to the data. Draws a figure. Run: python examples/flow_model.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import math
import time
from collections.abc import Callable

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor, nn

from hos_ext import MLP, ModelScore, Rectified, ScoreMatchingLoss, SecondOrderHead
from hos_ext.densities import GaussianMixture
from hos_ext.diffusion import (
    AlongSchedule,
    prior,
    probability_flow_ode,
    second_order_reverse,
    tweedie_denoise,
)
from hos_ext.uncertainty import posterior_from_velocity

FLOW = Rectified(t_min=0.01, t_max=0.98)
TIMES = (0.2, 0.4, 0.6, 0.8)


class Velocity(nn.Module):
    """A plain network of x_t and t, as flow matching has it."""

    def __init__(self, size: int = 2, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size + 5, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.unsqueeze(-1)
        waves = [f(k * math.pi * t) for k in (1, 2) for f in (torch.sin, torch.cos)]
        return self.layers(torch.cat([x, t, *waves], -1))


def mixture() -> GaussianMixture:
    """Three modes of different shapes."""
    means = torch.tensor([[-1.6, -0.6], [0.4, 1.3], [1.4, -0.9]])
    roots = torch.tensor(
        [[[0.5, 0.0], [0.3, 0.2]], [[0.3, 0.0], [0.0, 0.3]], [[0.2, 0], [-0.4, 0.3]]]
    )
    return GaussianMixture(torch.tensor([0.3, 0.3, 0.4]), means, roots @ roots.mT)


def descend(
    parameters: list[nn.Parameter], steps: int, rate: float, loss_at: Callable[[int], Tensor]
) -> None:
    """Adam with a cosine."""
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss_at(step).backward()
        optimizer.step()
        schedule.step()


def train_velocity(data: GaussianMixture, steps: int, batch: int) -> Velocity:
    """Plain flow matching: nothing of this package but the data."""
    torch.manual_seed(0)
    net, draws = Velocity(), data.sample(steps * batch, seed=1).split(batch)

    def loss_at(step: int) -> Tensor:
        x0, z, t = draws[step], torch.randn(batch, 2), torch.rand(batch)
        x_t = torch.lerp(x0, z, t[:, None])
        return (net(x_t, t) - (z - x0)).square().mean()

    descend(list(net.parameters()), steps, 3e-3, loss_at)
    return net.eval()


def train_head(score: ModelScore, data: GaussianMixture, steps: int, batch: int) -> SecondOrderHead:
    """The second order beside the frozen velocity, at the noise levels of the flow."""
    torch.manual_seed(0)
    head = MLP((2,), 2, width=96, depth=3, activation="silu", sigma_data=1.3, given_score=True)
    model = SecondOrderHead(score, head)
    criterion = ScoreMatchingLoss(score.sigma_range)
    draws = data.sample(steps * batch, seed=2).split(batch)
    descend(list(head.parameters()), steps, 3e-3, lambda step: criterion(model, draws[step]))
    return model.eval()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Zero for equal laws."""

    def spread(a: Tensor, b: Tensor) -> float:
        return torch.cdist(a, b).sum().item() / (len(a) * (len(b) - (a is b)))

    return 2 * spread(x, y) - spread(x, x) - spread(y, y)


def ellipse(axes: Axes, mean: Tensor, covariance: Tensor, **style: object) -> None:
    """Two standard deviations."""
    values, vectors = torch.linalg.eigh(covariance)
    width, height = (4 * values.clamp_min(0).sqrt()).tolist()
    angle = math.degrees(math.atan2(vectors[1, 0].item(), vectors[0, 0].item()))
    axes.add_patch(Ellipse(mean.tolist(), width, height, angle=angle, fill=False, **style))


def draw(path: str, data: GaussianMixture, model: nn.Module) -> None:
    """A few noisy points at each time, with the exact and the learned posterior of x0."""
    cloud = data.sample(1500, seed=3)
    with rc_context({"font.size": 9}):
        figure = Figure(figsize=(3 * len(TIMES), 3.4), layout="constrained")
        for axis, t in zip(figure.subplots(1, len(TIMES)), TIMES, strict=True):
            x = data.noisy(t, 1 - t).sample(4, seed=7)
            found = tweedie_denoise(model, x, FLOW, t)
            covariance = data.posterior_covariance(x, t, 1 - t)
            mean = data.posterior_mean(x, t, 1 - t)
            axis.scatter(*cloud.mT, s=2, color="#d0d0d0", linewidths=0)
            for i in range(len(x)):
                axis.plot(*torch.stack([x[i], found.mean[i]]).mT, color="#7a7a7a", lw=0.7)
                ellipse(axis, mean[i], covariance[i], color="#3b75af", lw=2.2, alpha=0.5)
                ellipse(axis, found.mean[i], found.covariance.dense()[i], color="#a8283c", lw=1)
            axis.plot(*x.mT, "o", color="#202020", ms=3)
            axis.set(title=f"t = {t}", xlim=(-3.2, 3.2), ylim=(-3, 3), aspect="equal")
            axis.axis("off")
        figure.suptitle("x0 given x_t (dots), two standard deviations: blue exact, red learned")
        figure.savefig(path, dpi=100)


def compare(data: GaussianMixture, net: Velocity, model: nn.Module, n: int) -> None:
    """Errors over the points of each time, relative for the covariance."""
    print(f"{'':6}{'mean':>8}{'covariance of the head':>26}{'of the Jacobian':>18}")
    for t in TIMES:
        x = data.noisy(t, 1 - t).sample(n, seed=4)
        mean = data.posterior_mean(x, t, 1 - t)
        exact = data.posterior_covariance(x, t, 1 - t)
        learned = tweedie_denoise(model, x, FLOW, t)
        jacobian = posterior_from_velocity(
            lambda x, t=t: net(x, torch.full((len(x),), t)), x, FLOW, t, rank=2
        )
        off = (learned.mean - mean).square().mean().sqrt().item()
        head, direct = (
            ((p.covariance.dense() - exact).square().mean() / exact.square().mean()).sqrt().item()
            for p in (learned, jacobian)
        )
        print(f"t {t:.1f} {off:8.3f}{head:26.3f}{direct:18.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="flow_model.png", help="the figure")
    parser.add_argument("--quick", action="store_true", help="few steps and samples")
    arguments = parser.parse_args()
    steps, batch, n = (300, 256, 300) if arguments.quick else (2500, 512, 3000)
    data, began = mixture(), time.perf_counter()

    net = train_velocity(data, steps, batch)
    score = ModelScore(net, FLOW, "flow")
    head = train_head(score, data, steps, batch)
    model = AlongSchedule(head, FLOW)
    print(f"trained in {time.perf_counter() - began:.0f} s")
    compare(data, net, model, n)

    truth = data.sample(n, seed=5)
    start = prior((n, 2), FLOW, data_std=truth.std().item(), seed=6)
    print("energy distance to the data")
    print(f"  drawn again: {energy_distance(data.sample(n, seed=8), truth):.4f}")
    for count in (4, 8, 16):
        flow = probability_flow_ode(model, start, FLOW, n_steps=count)
        second = second_order_reverse(model, start, FLOW, n_steps=count, seed=9)
        ancestral = second_order_reverse(
            model, start, FLOW, n_steps=count, seed=9, covariance_form="none"
        )
        distances = [energy_distance(x, truth) for x in (flow, second, ancestral)]
        names = ("ODE (Heun)", "second order", "without covariance")
        row = ", ".join(f"{a} {b:.4f}" for a, b in zip(names, distances, strict=True))
        print(f"  {count} steps: {row}")
    draw(arguments.out, data, model)


if __name__ == "__main__":
    main()
