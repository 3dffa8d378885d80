"""Inpainting and deblurring of handwritten digits, with uncertainty, by a second-order model.

Trains a small score model on scikit-learn's digits, hides the lower half of held-out digits or
blurs them, and draws from p(digit | measurement) by guided reverse steps that use the learned
posterior covariance in place of backprop through the network. Prints how often the intervals of the
draws cover the truth, and the same for guidance by vector-Jacobian products; draws a figure.
Run: python examples/inverse_problems.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from hos_ext import MLP, Posterior, Scores, normal, score_matching_loss, uniform
from hos_ext.app.data import SHAPE, dequantise, distort, load_digits
from hos_ext.diffusion.guidance import condition, guided
from hos_ext.diffusion.reverse import prior, reverse_sde, second_order_reverse, tweedie_denoise
from hos_ext.schedules import EDM, Schedule
from hos_ext.scores import Model

DATA_STD, NOISE_STD = 0.7, 0.1
DRAWS = 39  # per measurement: the truth has one of 40 ranks among them
KINDS = ("whole", "row sums", "isotropic")
SCHEDULE = EDM(sigma_min=0.1, sigma_max=10.0, rho=3.0)


class Problem(NamedTuple):
    """A measurement y of each digit, as the functions A and A^T and as a mask or a matrix."""

    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    operator: Tensor
    scored: Tensor  # pixels whose draws are compared with the truth


def inpainting() -> Problem:
    seen = torch.zeros(SHAPE, dtype=torch.bool)
    seen[: SHAPE[0] // 2] = True

    def adjoint(u: Tensor) -> Tensor:
        x = u.new_zeros(len(u), *SHAPE)
        x[:, seen] = u
        return x

    return Problem(lambda x: x[:, seen], adjoint, seen, ~seen)


def deblurring() -> Problem:
    """A Gaussian blur of standard deviation one pixel; with zeros outside it is its own adjoint."""
    weights = torch.exp(-torch.arange(-2.0, 3).square() / 2)
    kernel = torch.outer(weights, weights) / weights.sum() ** 2

    def blur(x: Tensor) -> Tensor:
        return functional.conv2d(x.unsqueeze(1), kernel[None, None], padding=2).squeeze(1)

    size = math.prod(SHAPE)
    matrix = blur(torch.eye(size).reshape(size, *SHAPE)).flatten(1).mT
    return Problem(blur, blur, matrix, torch.ones(SHAPE, dtype=torch.bool))


def train(grey: Tensor, steps: int) -> nn.Module:
    """A smaller model than that of `hos-ext train`, over all noise levels of the schedule."""
    torch.manual_seed(0)
    model = MLP(
        SHAPE,
        rank=8,
        width=256,
        head_width=160,
        head_depth=2,
        trunk="separate",
        activation=functional.silu,
        sigma_data=DATA_STD,
        c_min=0.004,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    low, high = math.log(SCHEDULE.sigma_min), math.log(SCHEDULE.sigma_max)
    for step in range(steps):
        rows = (uniform((128,), seed=1, offset=step) * len(grey)).long().clamp(max=len(grey) - 1)
        x = dequantise(distort(grey[rows], seed=2, offset=step), seed=3, offset=step)
        sigma = (low + (high - low) * uniform((128,), seed=4, offset=step)).exp()
        loss = score_matching_loss(model, x, sigma, seed=5, offset=step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        rate.step()
    return model.requires_grad_(False)


def by_backprop(model: Model, y: Tensor, problem: Problem, *, kind: str) -> Model:
    """The rivals: the Jacobian d m / d x of the mean by vector-Jacobian products (alpha = 1).

    "whole": moment matching with C = sigma^2 d m / d x, a product for each iteration of conjugate
    gradients. "row sums": A C A^T as the diagonal of its row sums, two products (Boys et al. 2023).
    "isotropic": C = r^2 I, the posterior variance of Gaussian data, one product (Song et al. 2023).
    """

    def conditioned(x: Tensor, sigma: Tensor) -> Scores:
        s = sigma.reshape(-1, 1, 1)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            score = model(x, sigma).scaled_score
            mean = x + s * score

        def pull(u: Tensor) -> Tensor:
            return torch.autograd.grad(mean, x, problem.adjoint(u), retain_graph=True)[0]

        def matvec(u: Tensor) -> Tensor:
            if kind == "isotropic":
                back = problem.adjoint(u) / (DATA_STD**-2 + s**-2)
            else:
                back = s.square() * pull(u)
            return problem.forward(back) + NOISE_STD**2 * u

        residual = y - problem.forward(mean.detach())
        if kind == "row sums":
            u = residual / matvec(torch.ones_like(residual))
        else:
            u = solve(matvec, residual)
        return Scores(score.detach() + s * pull(u), torch.full_like(x, torch.nan))

    return conditioned


def solve(matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Conjugate gradients, at most 20 steps. A network's Jacobian is not quite symmetric: a sample
    whose curvature comes out negative stops."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.dim() - 1))

    x, r, p = torch.zeros_like(b), b, b
    square = inner(b, b)
    target, going = 1e-6 * square, torch.ones_like(square, dtype=torch.bool)
    for _ in range(20):
        product = matvec(p)
        curvature = inner(p, product)
        going = going & (square > target) & (curvature > 0)
        if not bool(going.any()):
            break
        step = (square / curvature).where(going, 0.0)
        x, r = x + step * p, r - step * product
        after = inner(r, r).where(going, square)
        p, square = r + after / square.clamp_min(1e-30) * p, after
    return x


def ranks(draws: Tensor, truth: Tensor, scored: Tensor) -> Tensor:
    """Of the truth among the draws, 0 ... DRAWS, pixel by pixel: uniform if calibrated."""
    return (draws < truth).sum(0)[:, scored].flatten()


def cover(rank: Tensor, part: float) -> float:
    """How often the central interval that should hold this part of the truths does."""
    bins = round(part * (DRAWS + 1))
    low = (DRAWS + 1 - bins) // 2
    return ((rank >= low) & (rank < low + bins)).float().mean().item()


def energy_score(draws: Tensor, truth: Tensor, scored: Tensor) -> float:
    """E|X - x| - E|X - X'| / 2 over images, lower is better; proper: least for the true law."""
    x, t = draws[..., scored].transpose(0, 1), truth[:, None, scored]
    n = x.shape[1]
    within = torch.cdist(x, x).sum((1, 2)) / (n * (n - 1))
    return (torch.cdist(x, t).mean((1, 2)) - within / 2).mean().item()


def report(name: str, draws: Tensor, truth: Tensor, scored: Tensor, milliseconds: float) -> None:
    lost = int((~(draws.abs() < 5)).flatten(2).any(-1).sum())
    if lost:
        print(f"  {name:30}{lost:15} of {draws[..., 0, 0].numel()} diverged{milliseconds:11.1f}")
        return
    error = (draws.mean(0) - truth)[:, scored].square().mean().sqrt().item()
    rank = ranks(draws, truth, scored)
    print(
        f"  {name:30}{error:8.3f}{energy_score(draws, truth, scored):9.3f}"
        f"{cover(rank, 0.5):8.0%}{cover(rank, 0.9):7.0%}{milliseconds:11.1f}"
    )


def clean(model: Model, x: Tensor, y: Tensor | None, problem: Problem) -> Tensor:
    """A draw of the digit from x at the last noise level and y; y of None: from x alone."""
    last: Posterior = tweedie_denoise(model, x, SCHEDULE, SCHEDULE.t_min)
    if y is not None:
        last = condition(last, y, problem.operator, NOISE_STD)
    return last.sample(1, seed=9)[0]


def draw(
    path: str, blocks: dict[str, tuple[Tensor, Tensor, Tensor]], curves: dict[str, Tensor]
) -> None:
    """Truth, measurement, mean, std and draws of three digits, and the coverage of all."""
    titles = ("truth", "measured", "mean", "std", "draws")
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 3.3), layout="constrained")
        parts = figure.subfigures(1, len(blocks) + 1, width_ratios=[*[1.45] * len(blocks), 1])
        for part, (title, (truth, y, draws)) in zip(parts, blocks.items(), strict=False):
            part.suptitle(title)
            axes = part.subplots(3, 7)
            for row in range(3):
                std = draws[:, row].std(0)
                images = [truth[row], y[row], draws[:, row].mean(0), std, *draws[:3, row]]
                for column, (axis, image) in enumerate(zip(axes[row], images, strict=True)):
                    spread = column == 3
                    high = 0.7 if spread else 1
                    axis.imshow(
                        image,
                        cmap="magma" if spread else "gray_r",
                        vmin=0 if spread else -1,
                        vmax=high,
                    )
                    axis.set_xticks([])
                    axis.set_yticks([])
                    axis.spines[:].set(visible=True, color="#bbbbbb", linewidth=0.6)
                    if row == 0 and column < len(titles):
                        axis.set_title(titles[column], fontsize=8.5, loc="left")
        axis = parts[-1].subplots()
        nominal = torch.arange(2, DRAWS + 1, 2) / (DRAWS + 1)
        axis.plot([0, 1], [0, 1], color="#bbbbbb", lw=1)
        for (name, rank), colour in zip(curves.items(), ("#a8283c", "#3b75af"), strict=False):
            axis.plot(nominal, [cover(rank, float(p)) for p in nominal], color=colour, label=name)
        axis.set(xlabel="central interval", ylabel="holds the truth", xlim=(0, 1), ylim=(0, 1))
        axis.set_title("coverage of held-out pixels", fontsize=9)
        axis.legend(frameon=False, loc="upper left")
        axis.set_aspect("equal")
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="inverse_problems.png", help="the figure")
    parser.add_argument("--quick", action="store_true", help="little training, few digits")
    arguments = parser.parse_args()
    steps, count, n = (30, 3, 5) if arguments.quick else (2500, 24, 24)
    digits = load_digits()
    began = time.perf_counter()
    model = train(digits.train, steps)
    print(f"trained {steps} steps in {time.perf_counter() - began:.0f} s")
    truth = dequantise(digits.test[:count], seed=6)
    many = count * DRAWS
    start = prior((many, *SHAPE), SCHEDULE, data_std=DATA_STD, seed=7)
    print(
        f"{count} held-out digits, {DRAWS} draws each, noise {NOISE_STD}\n{'':32}{'rmse':>8}"
        f"{'energy':>9}{'50 %':>8}{'90 %':>7}{'ms/step':>11}"
    )
    blocks, curves = {}, {}
    for title, problem in (("inpainting", inpainting()), ("deblurring", deblurring())):
        noise = normal(tuple(problem.forward(truth).shape), seed=8)
        measured = problem.forward(truth) + NOISE_STD * noise
        y = measured.repeat(DRAWS, *[1] * (measured.dim() - 1))
        flat = y.flatten(1)
        pair = (problem.forward, problem.adjoint)
        print(f"{title}, {measured[0].numel()} of {truth[0].numel()} values measured")

        def run(
            name: str, sampler, conditioned: Model, steps: int, flat=flat, problem=problem
        ) -> Tensor:
            began = time.perf_counter()
            x = sampler(conditioned, start, SCHEDULE, n_steps=steps, seed=10)
            milliseconds = 1e3 * (time.perf_counter() - began) / steps
            draws = clean(model, x, flat, problem).reshape(DRAWS, count, *SHAPE)
            report(f"{name}, {steps} steps", draws, truth, problem.scored, milliseconds)
            return draws

        run("unguided", heun, model, n, None)
        if title == "inpainting":
            whole = guided(model, flat, problem.operator, NOISE_STD, SCHEDULE)
            draws = run("second order", second_order_reverse, whole, n // 2)
            ours = guided(model, flat, problem.operator, NOISE_STD, SCHEDULE, with_covariance=False)
            run("learned C", heun, ours, n)
        ours = guided(model, y, pair, NOISE_STD, SCHEDULE, with_covariance=False, tolerance=1e-3)
        learned = run("learned C, functions", heun, ours, n)
        if title == "deblurring":
            draws = learned
        for kind in ("row sums", "isotropic") if arguments.quick else KINDS:
            run(f"VJP, {kind}", heun, by_backprop(model, y, problem, kind=kind), n)
        shown = measured if title == "deblurring" else problem.adjoint(measured)
        if title == "inpainting":
            shown[:, problem.scored] = torch.nan
        blocks[f"{title}: 3 of {count} digits"] = (truth, shown, draws)
        curves[title] = ranks(draws, truth, problem.scored)
    draw(arguments.out, blocks, curves)


def heun(model: Model, init: Tensor, schedule: Schedule, *, n_steps: int, seed: int) -> Tensor:
    return reverse_sde(model, init, schedule, n_steps=n_steps, solver="heun", seed=seed)


if __name__ == "__main__":
    main()
