"""One Tweedie step or many reverse steps, from the same noise, on a mixture with exact scores.

One step from the highest noise level gives the posterior mean of each point, which lies between the
modes; a draw with the posterior covariance about it is a Gaussian blur of the data. N reverse
steps give the data. Prints the energy distance to the data, the share of points on no mode and the
error of the mode weights, and draws a figure. Run: python examples/one_step_or_many.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import math
from collections.abc import Callable

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from hos_ext import Scores
from hos_ext.densities import GaussianMixture
from hos_ext.diffusion.reverse import (
    prior,
    probability_flow_ode,
    reverse_sde,
    second_order_reverse,
    tweedie_denoise,
)
from hos_ext.schedules import EDM, Schedule

SD = 0.3  # of each mode
SAMPLERS = {
    "Euler, SDE": lambda *a, n, seed: reverse_sde(*a, n_steps=n, seed=seed),
    "Heun, ODE": lambda *a, n, seed: probability_flow_ode(*a, n_steps=n),
    "ancestral": lambda *a, n, seed: second_order_reverse(
        *a, n_steps=n, seed=seed, covariance_form="none"
    ),
    "second order": lambda *a, n, seed: second_order_reverse(*a, n_steps=n, seed=seed),
}
# Colour of each curve, and where its label stands beside its first point.
STYLES = {
    "Euler, SDE": ("#7a7a7a", (7, -2), "left"),
    "Heun, ODE": ("#c8742c", (2, 7), "right"),
    "ancestral": ("#3b75af", (-4, -29), "left"),
    "second order": ("#a8283c", (-4, -27), "left"),
}


def ring() -> GaussianMixture:
    """Five modes on a circle of radius 2, with weights in proportion 1 ... 5 and mean zero."""
    angle = 2 * math.pi * torch.arange(5) / 5 + math.pi / 2
    means, weights = 2 * torch.stack([angle.cos(), angle.sin()], -1), torch.arange(1.0, 6) / 15
    covariances = SD**2 * torch.eye(2).repeat(5, 1, 1)
    return GaussianMixture(weights, means - weights @ means, covariances)


def exact_model(data: GaussianMixture, schedule: Schedule) -> Callable[[Tensor, Tensor], Scores]:
    """What a network would learn: I + sigma^2 s2 = c I + F F^T, c its least eigenvalue."""

    def model(x: Tensor, sigma: Tensor) -> Scores:
        level = sigma[0].item()
        noisy = data.noisy(level, schedule.alpha(schedule.t_of_sigma(level)))
        values, vectors = torch.linalg.eigh(torch.eye(2) + level**2 * noisy.hessian(x))
        least = values[:, :1].clamp_min(0)
        factor = vectors * (values - least).clamp_min(0).sqrt().unsqueeze(1)
        return Scores(level * noisy.score(x), least.expand_as(x), factor)

    return model


def spread(x: Tensor, y: Tensor) -> float:
    return torch.cdist(x, y).sum().item() / (len(x) * (len(y) - (x is y)))


def summary(x: Tensor, data: GaussianMixture, truth: Tensor) -> tuple[float, float, float]:
    """Energy distance to the data, share beyond 3 sd of every mode, error of the mode weights."""
    energy = 2 * spread(x, truth) - spread(x, x) - spread(truth, truth)
    nearest, mode = torch.cdist(x, data.means).min(-1)
    weights = torch.bincount(mode, minlength=len(data.weights)) / len(x)
    off = (nearest > 3 * SD).float().mean().item()
    return energy, off, (weights - data.weights).abs().sum().item() / 2


def draw(
    path: str,
    truth: Tensor,
    clouds: dict[str, Tensor],
    curves: dict[str, dict[int, float]],
    floor: float,
) -> None:
    """The clouds over the data, and the distance against the number of steps."""
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 2.9), layout="constrained")
        widths = [*[1] * len(clouds), 1.5]
        axes = figure.subplots(1, len(widths), width_ratios=widths)
        for axis, (title, x) in zip(axes, clouds.items(), strict=False):
            axis.scatter(*truth[:2000].mT, s=2, color="#cfcfcf", linewidths=0)
            axis.scatter(*x[:2000].mT, s=3, color="#a8283c", alpha=0.5, linewidths=0)
            axis.set(title=title, xlim=(-3.3, 3.3), ylim=(-3.1, 3.4), aspect="equal")
            axis.axis("off")
        axis = axes[-1]
        axis.axhspan(floor / 2, floor, color="#eeeeee", lw=0)
        for name, curve in curves.items():
            x, y = zip(*curve.items(), strict=True)
            # What is below the floor is drawn on it.
            colour, place, side = STYLES[name]
            axis.plot(x, [max(v, floor) for v in y], "o-", color=colour, ms=3.5, lw=1.4)
            axis.annotate(
                name, (x[0], y[0]), place, textcoords="offset points", ha=side, color=colour
            )
        steps = sorted({n for curve in curves.values() for n in curve})
        axis.set(xscale="log", yscale="log", xlabel="steps", xlim=(0.8, 60), ylim=(floor / 2, None))
        axis.set_title("energy distance to the data")
        axis.set_xticks(steps, [str(n) for n in steps])
        axis.minorticks_off()
        axis.text(steps[0], floor / 1.4, "two draws of the data", va="center", color="#707070")
        figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="one_step_or_many.png", help="the figure")
    parser.add_argument("--quick", action="store_true", help="few samples and steps")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    n, counts = (500, (2, 5)) if arguments.quick else (3000, (2, 5, 10, 20, 50))
    data, schedule = ring(), EDM(sigma_min=0.02, sigma_max=20.0)
    model = exact_model(data, schedule)
    truth = data.sample(n, seed=0)
    start = prior((n, 2), schedule, data_std=truth.std().item(), seed=1)

    print(f"{'':28}{'energy distance':>16}{'off the modes':>15}{'weights off by':>16}")

    def report(name: str, x: Tensor) -> float:
        energy, off, weights = summary(x, data, truth)
        print(f"{name:28}{energy:16.4f}{off:15.1%}{weights:16.1%}")
        return energy

    once = tweedie_denoise(model, start, schedule, schedule.t_max)
    means, blurred = once.mean, once.sample(1, seed=2)[0]
    curves: dict[str, dict[int, float]] = {name: {} for name in SAMPLERS}
    # An ancestral step to zero noise is the posterior mean, a second-order one a posterior draw.
    curves["ancestral"][1] = report("1 step: mean", means)
    curves["second order"][1] = report("1 step: mean + covariance", blurred)
    clouds = {"1 step: mean": means, "1 step: mean + covariance": blurred}
    for steps in counts:
        for name, sampler in SAMPLERS.items():
            x = sampler(model, start, schedule, n=steps, seed=3)
            curves[name][steps] = report(f"{steps} steps: {name}", x)
            if steps in (5, 50) and name == "second order":
                clouds[f"{steps} steps: {name}"] = x
    again = [report("the data, drawn again", data.sample(n, seed=seed)) for seed in (8, 9)]
    draw(arguments.out, truth, clouds, curves, max(map(abs, again)))


if __name__ == "__main__":
    main()
