"""Uncertainty from a denoiser that was trained for none: its Jacobian is the posterior covariance.

Trains a plain first-order denoiser on 8x8 digits, then takes from it, by automatic differentiation,
the posterior of clean digits given noisy ones: standard deviations, principal components and how
well they are calibrated on new digits. Beside it the published way to the principal components,
subspace iteration with finite differences. Draws a figure. Run: python examples/any_denoiser.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import math
import time

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from hos_ext import DPLR, Posterior
from hos_ext.app.data import dequantise, distort, load_digits
from hos_ext.linalg.jacobian import ScoreHessian
from hos_ext.tweedie import score_from_x0
from hos_ext.uncertainty import calibration
from hos_ext.uncertainty.from_score import posterior_from_score

SIGMA, RANK = 0.4, 4
MEAN, STD = -0.4, 0.5  # of the data, roughly


class Denoiser(nn.Module):
    """E[x0 | x] at noise level sigma: a residual network beside the answer for Gaussian data."""

    def __init__(self, size: int = 64, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(size + 1, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.leave = nn.Linear(width, size)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        y, s = x.flatten(1) - MEAN, sigma.unsqueeze(-1)
        variance = STD**2 + s**2
        h = nn.functional.silu(self.enter(torch.cat([y / variance.sqrt(), s.log()], -1)))
        for block in self.blocks:
            h = h + nn.functional.silu(block(h))
        out = MEAN + STD**2 / variance * y + s * STD / variance.sqrt() * self.leave(h)
        return out.reshape(x.shape)


def train(grey: Tensor, steps: int) -> Denoiser:
    """Least squares on noisy digits, the usual loss of a first-order denoiser."""
    torch.manual_seed(0)
    net = Denoiser()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pool = torch.cat([grey, *(distort(grey, seed=1, offset=i) for i in range(20))])
    low, high = math.log(SIGMA / 2), math.log(SIGMA * 2)
    for step in range(steps):
        x = dequantise(pool[torch.randint(len(pool), (128,))], seed=2, offset=step)
        sigma = torch.empty(len(x)).uniform_(low, high).exp()
        s = sigma[:, None, None]
        loss = ((net(x + s * torch.randn_like(x), sigma) - x) / s).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def subspace_iteration(denoise, x: Tensor, k: int, iterations: int, step: float = 1e-3) -> Tensor:
    """Posterior principal components without derivatives: v <- orth((D(x + e v) - D(x)) / e)."""
    v = torch.randn(len(x), x[0].numel(), k)
    centre = denoise(x)
    for _ in range(iterations):
        moved = [denoise(x + step * c.reshape(x.shape)) - centre for c in v.unbind(-1)]
        v = torch.linalg.qr(torch.stack(moved, -1).flatten(1, 2) / step)[0]
    return v


def draw(path: str, clean: Tensor, noisy: Tensor, posterior: Posterior, std: Tensor) -> None:
    """A row for each digit: what was seen, the mean, its uncertainty, the first component."""
    values, vectors = posterior.principal_components(1)
    first = vectors[..., 0].reshape(clean.shape)
    swing = 2 * values[:, :1].sqrt().unsqueeze(-1) * first
    mean = posterior.mean
    columns = {
        "clean": (clean, "gray", (-1, 1)),
        "noisy": (noisy, "gray", (-1, 1)),
        "mean": (mean, "gray", (-1, 1)),
        "error of the mean": ((clean - mean).abs(), "magma", (0, 0.5)),
        "standard deviation": (std, "magma", (0, 0.5)),
        "first component": (first, "RdBu_r", (-0.4, 0.4)),
        "mean - 2 sd of it": (mean - swing, "gray", (-1, 1)),
        "mean + 2 sd of it": (mean + swing, "gray", (-1, 1)),
    }
    with rc_context({"font.size": 8}):
        figure = Figure(
            figsize=(1.25 * len(columns), 1.27 * len(clean) + 0.2), layout="constrained"
        )
        axes = figure.subplots(len(clean), len(columns), squeeze=False)
        for column, (title, (images, colours, limits)) in enumerate(columns.items()):
            axes[0, column].set_title(title)
            for row, image in enumerate(images):
                axis = axes[row, column]
                axis.imshow(image, cmap=colours, vmin=limits[0], vmax=limits[1])
                axis.axis("off")
        figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="any_denoiser.png", help="the figure")
    parser.add_argument("--quick", action="store_true", help="few training steps, few digits")
    arguments = parser.parse_args()
    steps, n = (150, 20) if arguments.quick else (5000, 360)
    digits = load_digits()
    begin = time.perf_counter()
    net = train(digits.train, steps)
    print(f"trained {steps} steps in {time.perf_counter() - begin:.0f} s")

    clean = dequantise(digits.test[:n], seed=3)
    torch.manual_seed(1)
    noisy = clean + SIGMA * torch.randn_like(clean)
    sigma = torch.full((n,), SIGMA)

    def denoise(x: Tensor) -> Tensor:
        return net(x, sigma)

    def score_fn(x: Tensor) -> Tensor:  # all that the library needs to know
        return score_from_x0(x, denoise(x), SIGMA)

    begin = time.perf_counter()
    posterior = posterior_from_score(score_fn, noisy, SIGMA, rank=RANK)
    seconds = time.perf_counter() - begin
    size = clean[0].numel()
    print(f"posterior of {n} digits, rank {RANK}: {seconds:.2f} s")
    figures = calibration(clean, posterior, tau=SIGMA / 2)
    print(
        f"on new digits, 1 is calibrated: trace ratio {figures['trace_ratio']:.3f}"
        f"  mahalanobis {figures['mahalanobis']:.3f}"
    )

    hessian = ScoreHessian(score_fn, noisy, symmetrize=True)
    covariance = hessian.scale(SIGMA**4) + SIGMA**2
    exact = covariance.diagonal()
    for probes in ("signs", "lattice"):
        estimate = covariance.estimate_diagonal(16, probes=probes, seed=0)
        gap = estimate.value - exact
        error = gap.square().mean().sqrt() / exact.square().mean().sqrt()
        inside = (gap.abs() < 1.645 * estimate.standard_error).float().mean()
        off = f"{error:.0%} off, intervals for 90 % hold {inside:.0%}"
        print(f"variances by 16 probes ({probes}): {off}")
    print(f"variances below 0: {(exact < 0).float().mean():.1%} of the pixels")
    least = covariance.eigenpairs(1, largest=False).values / SIGMA**2
    print(f"asymmetry |J - J^T| / |J| of the score's Jacobian {hessian.asymmetry(size).mean():.2f}")
    print(f"least eigenvalue of kappa, never below 0 for a true score: mean {least.mean():.2f}")

    vectors = torch.linalg.eigh(covariance.dense())[1][..., -RANK:]

    def overlap(v: Tensor) -> float:
        """Mean squared cosine of the angles between the subspaces."""
        return (vectors.mT @ v).square().sum((1, 2)).mean().item() / RANK

    begin = time.perf_counter()
    ours = covariance.eigenpairs(RANK)
    seconds = time.perf_counter() - begin
    print(f"{'principal components':24}{'products':>10}{'seconds':>9}{'overlap with dense':>20}")
    print(f"{'eigenpairs':24}{ours.products:10}{seconds:9.2f}{overlap(ours.vectors):20.4f}")
    for iterations in (5, 50):
        begin = time.perf_counter()
        v = subspace_iteration(denoise, noisy, RANK, iterations)
        seconds = time.perf_counter() - begin
        name = f"subspace iteration, {iterations}"
        print(f"{name:24}{RANK * iterations:10}{seconds:9.2f}{overlap(v):20.4f}")
    shown = slice(0, 4)
    some = DPLR(posterior.covariance.diag[shown], posterior.covariance.factor[shown])
    std = exact[shown].clamp_min(0).sqrt().reshape(clean[shown].shape)
    draw(arguments.out, clean[shown], noisy[shown], Posterior(posterior.mean[shown], some), std)


if __name__ == "__main__":
    main()
