"""Digits of a class: one network learns ten laws, and guidance pushes it further into one of them.

Trains a second-order model on scikit-learn's digits with their labels, a tenth of which are left
out, so that the model knows the law of all digits too. Then, with and without the label: errors and
calibration of denoised held-out digits; and new digits of every class, drawn by second-order steps
and, guided, by the ODE. A classifier that was trained on real digits says how many are what they
were asked to be, and the spread within a class how different they are. Draws a figure.
Run: python examples/class_conditional.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import time

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.svm import SVC
from torch import Tensor

from hos_ext import MLP, VE
from hos_ext.app import data, training
from hos_ext.diffusion import prior, probability_flow_ode, second_order_reverse, tweedie_denoise
from hos_ext.nn import ClassifierFree
from hos_ext.scores import Model
from hos_ext.tweedie import posterior
from hos_ext.uncertainty import calibration

SIGMAS = (0.08, 4.0)  # noise levels that are learned, data units
SCALES = (1.0, 1.5, 2.5)


def train(source: data.Source, steps: int) -> MLP:
    """The model of `hos-ext train --condition label` on digits, over more noise."""
    torch.manual_seed(0)
    options = {"width": 384, "head_width": 192, "head_depth": 2, "sigma_data": source.std}
    model = MLP(source.shape, 8, num_classes=len(source.labels.names), **options)
    chosen = training.TrainingOptions(
        steps=steps,
        sigma_range=SIGMAS,
        augment="distort",
        condition_dropout=0.1,
        device="cpu",
    )
    return training.train(model, source, chosen).model


@torch.no_grad()
def denoised(model: Model, source: data.Source, sigma: float) -> None:
    """Errors and trace ratios with the right label, without one, and with a wrong one."""
    x0 = source.scaling.forward(source.test, seed=1)
    x = x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    right = source.labels.test
    labels = {"right": right, "no": torch.full_like(right, 10), "wrong": (right + 1) % 10}
    print(f"held-out digits at sigma {sigma:g}")
    for name, label in labels.items():
        found = posterior(x, model(x, sigma, label=label), sigma)
        error = (found.mean - x0).square().mean().item()
        ratio = calibration(x0, found)["trace_ratio"]
        print(f"  {name} label: squared error {error:.4f}, over its variance {ratio:.3f}")


@torch.no_grad()
def drawn(model: Model, scale: float | None, per_class: int, steps: int) -> tuple[Tensor, Tensor]:
    """New digits of every class, clean, with their labels; without a scale by second-order steps.

    Those need a covariance, which the guided score has not.
    """
    schedule = VE(*SIGMAS)
    label = torch.arange(10).repeat_interleave(per_class)
    start = prior((len(label), 8, 8), schedule, data_std=0.7, seed=3)
    options = {"n_steps": steps, "model_kwargs": {"label": label}, "chunk_size": 200}
    if scale is None:
        guided = model
        x = second_order_reverse(model, start, schedule, seed=4, **options)
    else:
        guided = ClassifierFree(model, scale)
        x = probability_flow_ode(guided, start, schedule, **options)
    end = tweedie_denoise(guided, x, schedule, schedule.t_min, model_kwargs={"label": label})
    return end.mean, label


def spread(x: Tensor, label: Tensor) -> float:
    """Standard deviation within a class, root mean square over pixels and classes."""
    variances = torch.stack([x[label == k].var(0).mean() for k in range(10)])
    return variances.mean().sqrt().item()


@torch.no_grad()
def indefinite(model: Model, source: data.Source, scale: float, sigma: float) -> float:
    """Share of noisy digits at which kappa of the guided score has a negative eigenvalue."""
    x0 = source.scaling.forward(source.test, seed=1)
    x = x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    scores = ClassifierFree(model, scale)(x, sigma, label=source.labels.test)
    covariance = posterior(x, scores, sigma).covariance.to(torch.float64)
    return (~covariance.is_positive_definite()).double().mean().item()


def draw(path: str, rows: dict[str, Tensor], columns: int) -> None:
    """A few digits of each class, a row for each way of drawing them."""
    with rc_context({"font.size": 9}):
        figure = Figure(figsize=(10, 0.6 * len(rows)), layout="constrained")
        for axis, (name, x) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
            picked = x.reshape(10, -1, 8, 8)[:, :columns]
            tiles = torch.nn.functional.pad(picked, (1, 1, 1, 1), value=1.0)
            axis.imshow(tiles.permute(2, 0, 1, 3).flatten(1), cmap="gray", vmin=-1, vmax=1)
            axis.set_title(name, loc="left")
            axis.axis("off")
        figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="class_conditional.png", help="the figure")
    parser.add_argument("--quick", action="store_true", help="few steps and digits")
    arguments = parser.parse_args()
    steps, per_class, path = (100, 6, 8) if arguments.quick else (1200, 40, 40)

    source, began = data.open_source("digits", label="label"), time.perf_counter()
    model = train(source, steps)
    print(f"trained in {time.perf_counter() - began:.0f} s")
    denoised(model, source, 0.8)

    _, raw = source.batch(0, 1200, seed=0)
    real = source.scaling.forward(raw, seed=0)
    known = source.batch_labels(0, 1200, seed=0)
    judge = SVC().fit(real.flatten(1).numpy(), known.numpy())
    print("new digits: recognised as asked, spread within a class")
    print(f"  real: spread {spread(real, known):.3f}")
    rows = {}
    for scale in (None, *SCALES):
        x, label = drawn(model, scale, per_class, path)
        right = (torch.from_numpy(judge.predict(x.flatten(1).numpy())) == label).double().mean()
        name = "second order" if scale is None else f"scale {scale:g}"
        print(f"  {name}: recognised {right.item():.3f}, spread {spread(x, label):.3f}")
        rows[name] = x
    for scale in SCALES:
        share = indefinite(model, source, scale, 0.8)
        print(f"  scale {scale:g}: no covariance at {share:.3f} of noisy digits")
    draw(arguments.out, rows, min(3, per_class))


if __name__ == "__main__":
    main()
