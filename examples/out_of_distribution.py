"""Which digits are strange? Outlier scores from second-order scores, beside the plain score norm.

Trains a small second-order model on scikit-learn's 8x8 digits and asks it, at three noise levels,
about test digits and about corrupted ones that it has never seen; with --other, about grey 8x8
crops of another data set as well. Prints the AUROC of each score (1/2 is chance, below it the
outliers look more ordinary than the digits) and draws a figure.
Run: python examples/out_of_distribution.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import io

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from hos_ext import MLP
from hos_ext.app import data, training
from hos_ext.checks import require
from hos_ext.uncertainty import auroc, outlier_score

SIGMAS = (0.2, 0.4, 0.8)
KINDS = ("norm", "laplacian", "mahalanobis", "uncertainty")  # the first one is first-order
COLOURS = ("#999999", "#3b75af", "#a8283c", "#c8742c")


def train(steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"width": 192, "head_width": 128, "head_depth": 2, "c_min": 0.008}
    digits = data.open_source("digits")
    model = MLP(digits.shape, 16, activation="silu", sigma_data=digits.std, **sizes)
    options = training.TrainingOptions(steps=steps, batch_size=96, augment="distort")
    return training.train(model, digits, options).model


def corrupted(grey: Tensor) -> dict[str, Tensor]:
    """The same digits in grey levels 0 ... 16, spoilt in ways that training never showed."""
    generator = torch.Generator().manual_seed(0)
    blurred = functional.avg_pool2d(grey.unsqueeze(1), 3, 1, 1).squeeze(1).round()
    occluded = grey.clone()
    occluded[:, 2:5, 2:5] = 0
    salted = grey.where(torch.rand(grey.shape, generator=generator) > 0.1, 16.0)
    order = torch.randperm(64, generator=generator)
    return {
        "blur": blurred,
        "inversion": 16 - grey,
        "occlusion": occluded,
        "salt noise": salted,
        "rotation by 90": grey.rot90(1, (1, 2)),
        "shuffled pixels": grey.flatten(1)[:, order].reshape(grey.shape),
    }


def crops(parquet: str, n: int) -> Tensor:
    """The 8x8 middles of n pictures of a Hugging Face parquet file, in grey levels 0 ... 16."""
    import numpy
    from PIL import Image

    table = require("out_of_distribution", "pyarrow.parquet").read_table(parquet).slice(0, n)
    column = next(c for c in table.column_names if c in ("img", "image"))
    pictures = []
    for row in table[column].to_pylist():
        picture = numpy.asarray(Image.open(io.BytesIO(row["bytes"])).convert("L"))
        top, left = ((side - 8) // 2 for side in picture.shape)
        pictures.append(torch.tensor(picture[top : top + 8, left : left + 8]))
    return (torch.stack(pictures).float() * (17 / 256)).floor()


@torch.no_grad()
def score(model: torch.nn.Module, grey: Tensor, sigma: float) -> dict[str, Tensor]:
    """Every outlier score of noised digits: the model knows the density of noisy ones."""
    x = data.dequantise(grey, seed=1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    scores = model(x + sigma * noise, sigma)
    return {kind: outlier_score(scores, kind=kind) for kind in KINDS}


def draw(path: str, samples: dict[str, Tensor], table: dict[str, dict[float, list[float]]]) -> None:
    """One sample of each kind beside its AUROC at each noise level."""
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 0.5 * len(table) + 1.0), layout="constrained")
        widths = [0.75, *[1] * len(SIGMAS)]
        first, *axes = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
        for i, (name, grey) in enumerate(samples.items()):
            extent = (2.1, 3.0, i + 0.45, i - 0.45)
            first.imshow(grey[3].numpy(), cmap="gray_r", vmin=0, vmax=16, extent=extent)
            first.text(2, i, name, ha="right", va="center")
        first.set(xlim=(0, 3), aspect="equal")
        first.axis("off")
        for axis, sigma in zip(axes, SIGMAS, strict=True):
            axis.axvline(0.5, color="#cccccc", lw=0.8)
            for k, (kind, colour) in enumerate(zip(KINDS, COLOURS, strict=True)):
                values = [row[sigma][k] for row in table.values()]
                rows = [i + 0.16 * (k - 1.5) for i in range(len(values))]
                axis.plot(values, rows, "o", color=colour, ms=4.5, label=kind)
            axis.set(xlim=(-0.03, 1.03), ylim=(len(table) - 0.5, -0.5), yticks=[])
            axis.set_title(f"AUROC at sigma {sigma:g}", fontsize=9)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower right", ncols=4, frameon=False)
        figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out_of_distribution.png", help="the figure")
    parser.add_argument("--quick", action="store_true", help="a few training steps")
    parser.add_argument("--other", help="a parquet file of pictures, such as CIFAR-10's")
    arguments = parser.parse_args()
    model = train(100 if arguments.quick else 1500)
    test = data.load_digits().test
    samples = corrupted(test)
    if arguments.other:
        samples["other pictures"] = crops(arguments.other, len(test))

    inside = {sigma: score(model, test, sigma) for sigma in SIGMAS}
    print(f"{'AUROC':18}{'sigma':>6}" + "".join(f"{kind:>13}" for kind in KINDS))
    table: dict[str, dict[float, list[float]]] = {}
    for name, grey in samples.items():
        table[name] = {}
        for sigma in SIGMAS:
            outside = score(model, grey, sigma)
            row = [auroc(inside[sigma][kind], outside[kind]) for kind in KINDS]
            table[name][sigma] = row
            print(f"{name:18}{sigma:6g}" + "".join(f"{value:13.3f}" for value in row))
    draw(arguments.out, samples, table)


if __name__ == "__main__":
    main()
