"""Your own eps network, as it is: its score, a check of how it is read, and a covariance beside it.

Trains a small DDPM on 8x8 digits the usual way: a network that is given x_t and a timestep of 1000
and predicts the noise. Then `ModelScore` makes a score of it, `check_model` says whether it is read
rightly, and a `SecondOrderHead` learns the posterior covariance while the network stays as it is.
The result is compared with the network's own Jacobian. Run: python examples/own_eps_network.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import time

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

import hos_ext
from hos_ext import MLP, ModelScore, SecondOrderHead, posterior, score_matching_loss
from hos_ext.app.data import dequantise, distort, load_digits
from hos_ext.nn import check_model
from hos_ext.schedules import from_alphas_cumprod
from hos_ext.uncertainty import calibration
from hos_ext.uncertainty.from_score import posterior_from_score

STEPS, SIGMA = 1000, 0.4
BETAS = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
TABLE = (1 - BETAS).cumprod(0)  # alpha^2 at each timestep, as every DDPM has it


class Eps(nn.Module):
    """The noise in x_t at a timestep: nothing of hos_ext in it."""

    def __init__(self, size: int = 64, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.frequencies = torch.arange(1, 17) * torch.pi / STEPS / 2
        self.enter = nn.Linear(size + 32, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.leave = nn.Linear(width, size)

    def forward(self, x_t: Tensor, step: Tensor) -> Tensor:
        angles = step.unsqueeze(-1) * self.frequencies
        h = nn.functional.silu(
            self.enter(torch.cat([x_t.flatten(1), angles.sin(), angles.cos()], -1))
        )
        for block in self.blocks:
            h = h + nn.functional.silu(block(h))
        return self.leave(h).reshape(x_t.shape)


def batches(grey: Tensor, steps: int, size: int = 128):
    """Clean digits: shifted and turned copies, with the rounding of their 16 levels taken away."""
    pool = torch.cat([grey, *(distort(grey, seed=1, offset=i) for i in range(20))])
    for step in range(steps):
        yield step, dequantise(pool[torch.randint(len(pool), (size,))], seed=2, offset=step)


def train_eps(grey: Tensor, steps: int) -> Eps:
    """The usual loss of a DDPM."""
    net = Eps()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    abar = TABLE.float()
    for _, x0 in batches(grey, steps):
        t = torch.randint(STEPS, (len(x0),))
        a = abar[t].reshape(-1, 1, 1)
        noise = torch.randn_like(x0)
        loss = (net(a.sqrt() * x0 + (1 - a).sqrt() * noise, t) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return net.eval()


def train_head(model: SecondOrderHead, grey: Tensor, steps: int) -> None:
    """The covariance; the score stays as it is."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step, x0 in batches(grey, steps):
        sigma = SIGMA * (4 ** (torch.rand(len(x0)) - 0.5))
        loss = score_matching_loss(model, x0, sigma, centred=True, seed=3, offset=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    model.eval()


def draw(path: str, clean: Tensor, noisy: Tensor, found: hos_ext.Posterior) -> None:
    """A row for each digit: what it was, what was seen, the mean, its error and its deviation."""
    mean, std = found.mean, found.std.reshape(clean.shape)
    columns = {
        "clean": (clean, "gray", (-1, 1)),
        "noisy": (noisy, "gray", (-1, 1)),
        "mean": (mean, "gray", (-1, 1)),
        "error of the mean": ((clean - mean).abs(), "magma", (0, 0.6)),
        "standard deviation": (std, "magma", (0, 0.6)),
    }
    with rc_context({"font.size": 8}):
        figure = Figure(figsize=(1.3 * len(columns), 1.3 * len(clean) + 0.2), layout="constrained")
        axes = figure.subplots(len(clean), len(columns), squeeze=False)
        for column, (title, (images, colours, limits)) in enumerate(columns.items()):
            axes[0, column].set_title(title)
            for row, image in enumerate(images):
                axes[row, column].imshow(image, cmap=colours, vmin=limits[0], vmax=limits[1])
                axes[row, column].axis("off")
        figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="own_eps_network.png", help="the figure")
    parser.add_argument("--quick", action="store_true", help="few training steps, few digits")
    arguments = parser.parse_args()
    steps, head_steps, n = (300, 300, 40) if arguments.quick else (3000, 1200, 360)
    torch.manual_seed(0)
    digits = load_digits()
    begin = time.perf_counter()
    net = train_eps(digits.train, steps)
    print(f"trained the eps network, {steps} steps in {time.perf_counter() - begin:.0f} s")

    # All that has to be said of it: its table, what it predicts, how it is told the time.
    schedule = from_alphas_cumprod(TABLE)
    clean = dequantise(digits.test[:n], seed=3)
    score = ModelScore(net, schedule, "eps", time="timestep", check=clean)
    print("read rightly:")
    print(check_model(score, clean))
    wrong = {
        "as x0": ModelScore(net, schedule, "x0", time="timestep"),
        "as v": ModelScore(net, schedule, "v", time="timestep"),
        "told c_noise": ModelScore(net, schedule, "eps", time="c_noise"),
        "as a score itself": lambda x, sigma: net(x, sigma),
    }
    print("read wrongly:")
    for name, misread in wrong.items():
        print(f"  {name}: {check_model(misread, clean, schedule=_of(misread, schedule)).remark}")

    begin = time.perf_counter()
    model = SecondOrderHead(score, MLP((8, 8), 8, given_score=True))
    train_head(model, digits.train, head_steps)
    print(f"trained a head on it, {head_steps} steps in {time.perf_counter() - begin:.0f} s")

    torch.manual_seed(1)
    noisy = clean + SIGMA * torch.randn_like(clean)
    with torch.no_grad():
        begin = time.perf_counter()
        found = posterior(noisy, model(noisy, SIGMA), SIGMA)
        seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    by_jacobian = posterior_from_score(lambda x: score(x, SIGMA) / SIGMA, noisy, SIGMA, rank=8)
    slow = time.perf_counter() - begin
    print(f"posterior of {n} digits: head {seconds:.3f} s, Jacobian of the network {slow:.3f} s")
    for name, each in (("head", found), ("Jacobian", by_jacobian)):
        figures = calibration(clean, each, tau=SIGMA / 2)
        print(
            f"{name:9} trace ratio {figures['trace_ratio']:.3f}  "
            f"mahalanobis {figures['mahalanobis']:.3f}   (1 is calibrated)"
        )
    shown = posterior(noisy[:4], model(noisy[:4], SIGMA), SIGMA)
    with torch.no_grad():
        draw(arguments.out, clean[:4], noisy[:4], shown)


def _of(model, schedule):
    """The schedule that a plain function needs; a ModelScore has its own."""
    return None if isinstance(model, ModelScore) else schedule


if __name__ == "__main__":
    main()
