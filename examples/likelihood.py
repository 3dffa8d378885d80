"""Log densities of a 2-d mixture along the probability-flow ODE: four ways to the trace.

The divergence of the ODE is a trace of the Jacobian of the score. A second-order model has learned
it; from a first-order model it takes a vector-Jacobian product for each of D unit vectors, or for
random probes (Hutchinson), which leave a variance. Probes of the difference correct the learned
trace: no bias of the head is left, and little variance. Prints the errors against the exact
density, the spread over the probes, model calls and time: for exact scores, for a small trained
network, and the time alone in more dimensions; draws a figure. Run: python examples/likelihood.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import math
import time
from collections.abc import Callable

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from hos_ext import MLP, Scores, score_matching_loss, uniform
from hos_ext.densities import GaussianMixture
from hos_ext.diffusion.likelihood import log_likelihood
from hos_ext.schedules import EDM, Schedule

SCHEDULE = EDM(sigma_min=0.1, sigma_max=20.0, rho=3.0)
TRACES = {
    "learned": {"trace": "learned"},
    "corrected, 1 probe": {"trace": "corrected", "n_probes": 1},
    "Hutchinson, 1 probe": {"trace": "hutchinson", "n_probes": 1},
    "Hutchinson, 4 probes": {"trace": "hutchinson", "n_probes": 4},
    "exact, D products": {"trace": "exact"},
}
COLOURS = ("#a8283c", "#4a7c59", "#c8742c", "#e0b080", "#3b75af")


def crescent() -> GaussianMixture:
    """Six elongated modes along a half circle, mean zero."""
    angle = math.pi * torch.arange(6) / 5
    means = 1.5 * torch.stack([angle.cos(), angle.sin() - 0.5], -1)
    along = torch.stack([-angle.sin(), angle.cos()], -1)
    covariances = 0.03 * torch.eye(2) + 0.12 * along[:, :, None] * along[:, None]
    weights = torch.arange(2.0, 8) / 27
    return GaussianMixture(weights, means - weights @ means, covariances)


def exact_model(data: GaussianMixture) -> Callable[[Tensor, Tensor], Scores]:
    """What a network would learn; differentiable in x. I + sigma^2 s2 = c I + F F^T."""

    def model(x: Tensor, sigma: Tensor) -> Scores:
        noisy = data.noisy(sigma[0].item())
        with torch.no_grad():
            kappa = torch.eye(2) + sigma[0] ** 2 * noisy.hessian(x)
            values, vectors = torch.linalg.eigh(kappa)
            least = values[:, :1].clamp_min(0)
            factor = vectors * (values - least).clamp_min(0).sqrt().unsqueeze(1)
        return Scores(sigma[0] * noisy.score(x), least.expand_as(x), factor)

    return model


def train(data: GaussianMixture, steps: int) -> nn.Module:
    torch.manual_seed(0)
    clean = data.sample(20000, seed=0)
    model = MLP((2,), rank=2, width=96, head_width=96, sigma_data=clean.std().item())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    low, high = math.log(SCHEDULE.sigma_min), math.log(SCHEDULE.sigma_max)
    for step in range(steps):
        rows = (uniform((512,), seed=1, offset=step) * len(clean)).long()
        sigma = (low + (high - low) * uniform((512,), seed=2, offset=step)).exp()
        loss = score_matching_loss(model, clean[rows], sigma, seed=3, offset=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.requires_grad_(False)


def timed(model, x: Tensor, schedule: Schedule, n: int, **options) -> tuple[Tensor, float, int]:
    """The values, milliseconds, and calls of the model."""
    calls = 0

    def count(x: Tensor, sigma: Tensor) -> Scores:
        nonlocal calls
        calls += 1
        return model(x, sigma)

    began = time.perf_counter()
    value = log_likelihood(count, x, schedule, n_steps=n, **options)
    return value, 1e3 * (time.perf_counter() - began), calls


def compare(model, data: GaussianMixture, x: Tensor, n: int, std: float) -> dict[str, Tensor]:
    """Prints a row for each trace; returns the errors at x, with the first probes."""
    truth, errors = data.noisy(SCHEDULE.sigma_min).log_prob(x), {}
    for name, options in TRACES.items():
        options = {"data_std": std, "solver": "rk4", **options}
        value, spent, calls = timed(model, x, SCHEDULE, n, seed=0, **options)
        again = [
            log_likelihood(model, x, SCHEDULE, n_steps=n, seed=seed, **options)
            for seed in range(1, 6 if "n_probes" in options else 1)
        ]
        spread = torch.stack([value, *again]).std(0).mean().item() if again else 0.0
        error = errors[name] = value - truth
        print(
            f"  {name:24}{error.square().mean().sqrt():10.4f}{error.mean():+10.4f}{spread:10.4f}"
            f"{calls:8}{spent:9.0f}"
        )
    return errors


def draw(
    path: str,
    model,
    data: GaussianMixture,
    std: float,
    errors: dict[str, Tensor],
    slopes: dict[str, dict[int, float]],
    costs: dict[str, dict[int, float]],
    pixels: int,
) -> None:
    """The learned density, errors of each trace, error against steps, time against D."""
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 3.1), layout="constrained")
        axes = figure.subplots(1, 4, width_ratios=[1, 1.25, 1, 1])
        grid = torch.linspace(-3, 3, pixels)
        points = torch.cartesian_prod(grid, grid)
        value = log_likelihood(model, points, SCHEDULE, n_steps=12, solver="rk4", data_std=std)
        levels = torch.linspace(-7, -0.5, 14)
        image = value.clamp(-7, -0.5).reshape(pixels, pixels).mT
        axes[0].contourf(grid, grid, image, levels=levels, cmap="Reds")
        exact = data.noisy(SCHEDULE.sigma_min).log_prob(points).reshape(pixels, pixels).mT
        axes[0].contour(
            grid,
            grid,
            exact,
            levels=levels[::3],
            colors="#555555",
            linewidths=0.6,
            linestyles="solid",
        )
        axes[0].set(title="network, learned trace (lines: exact)", aspect="equal")
        axes[0].axis("off")
        bins = torch.linspace(-1.5, 1.5, 41)
        for (name, error), colour in zip(errors.items(), COLOURS, strict=True):
            counts = error.clamp(-1.5, 1.5).histogram(bins)[0]
            axes[1].stairs(counts, bins, color=colour, label=name, lw=1.4)
        axes[1].set(title="network: log p less the exact one", xlabel="nats", yticks=[])
        axes[1].spines["left"].set_visible(False)
        axes[1].legend(frameon=False, fontsize=7.5, loc="upper left")
        for (name, curve), colour in zip(slopes.items(), ("#7a7a7a", "#a8283c"), strict=True):
            axes[2].loglog(*zip(*curve.items(), strict=True), "o-", color=colour, ms=3.5, lw=1.4)
            last = max(curve)
            axes[2].annotate(
                name,
                (last, curve[last]),
                (4, 9),
                textcoords="offset points",
                color=colour,
                ha="right",
            )
        axes[2].set(title="exact scores: largest error", xlabel="model calls")
        for curve, colour in zip(costs.values(), COLOURS, strict=True):
            axes[3].loglog(*zip(*curve.items(), strict=True), "o-", color=colour, ms=3.5, lw=1.4)
        axes[3].set(title="ms per model call, trace included", xlabel="D")
        marks = sorted({n for curve in slopes.values() for n in curve})
        axes[2].set_xticks(marks, [str(n) for n in marks])
        axes[3].set_xticks(list(costs["learned"]), [str(n) for n in costs["learned"]])
        for axis in axes[2:]:
            axis.minorticks_off()
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="likelihood.png", help="the figure")
    parser.add_argument("--quick", action="store_true", help="little training, few points")
    quick = parser.parse_args().quick
    steps, count, n = (20, 50, 4) if quick else (3000, 2000, 16)
    counts, sizes = ((4, 8), (2, 8)) if quick else ((8, 16, 32, 64), (2, 16, 64, 256))
    data = crescent()
    clean = data.sample(2000, seed=9)
    std, x = clean.std().item(), data.noisy(SCHEDULE.sigma_min).sample(count, seed=4)
    head = f"{'':26}{'rmse':>10}{'bias':>10}{'probes':>10}{'calls':>8}{'ms':>9}"

    print(f"exact scores, {count} points, {n} steps of order 4\n{head}")
    wide = data.to(dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    compare(exact_model(wide), wide, x.double(), n, std)
    # With the exact density at the far end too, so that the steps alone are at fault.
    slopes: dict[str, dict[int, float]] = {"heun": {}, "rk4": {}}
    truth = wide.noisy(SCHEDULE.sigma_min).log_prob(x[:200].double())
    for solver, curve in slopes.items():
        for steps_ in counts:
            value, _, calls = timed(
                exact_model(wide),
                x[:200].double(),
                SCHEDULE,
                steps_,
                solver=solver,
                data_std=std,
                log_prior=wide.noisy(SCHEDULE.sigma_max).log_prob,
            )
            curve[calls] = (value - truth).abs().max().item()
        print(f"  {solver:5} largest error", {k: f"{v:.1e}" for k, v in curve.items()}, "by calls")
    torch.set_default_dtype(torch.float32)

    began = time.perf_counter()
    model = train(data, steps)
    print(f"a network trained {steps} steps in {time.perf_counter() - began:.0f} s\n{head}")
    errors = compare(model, data, x, n, std)

    print("ms per model call, trace included, 64 points, untrained MLPs of width 256, rank 8")
    costs: dict[str, dict[int, float]] = {name: {} for name in TRACES}
    for size in sizes:
        network = MLP((size,), rank=8, width=256, head_width=64).requires_grad_(False)
        points = torch.randn(64, size)
        for name, options in TRACES.items():
            timed(network, points, SCHEDULE, 1, **options)
            repeats = 1 if "exact" in name else 4
            _, spent, calls = timed(network, points, SCHEDULE, repeats, **options)
            costs[name][size] = spent / calls
    for name, curve in costs.items():
        print(f"  {name:24}" + "".join(f"   D = {k}: {v:8.2f}" for k, v in curve.items()))
    draw(parser.parse_args().out, model, data, std, errors, slopes, costs, 20 if quick else 70)


if __name__ == "__main__":
    main()
