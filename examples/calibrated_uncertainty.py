"""Is a denoiser's uncertainty true? Reports on held-out digits, before and after recalibration.

Trains a small second-order model on scikit-learn's 8x8 digits. At each noise level one scalar of
the posterior covariance is fitted on validation digits, and the directions along which errors are
compared with their predicted variance are chosen there; the reports are on test digits. One scalar
mends one figure: where the shape of the covariance is off, right Mahalanobis distances cost the
trace. Prints the reports and draws a figure. Run: python examples/calibrated_uncertainty.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
from typing import NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hos_ext import MLP, Posterior, Scores, posterior
from hos_ext.app import data, training
from hos_ext.uncertainty import CalibrationReport, calibration_report, recalibration_factor

SIGMAS = (0.2, 0.4, 0.8)
COLOURS = ("#3b75af", "#c8742c", "#a8283c")
PIXEL = (3, 3)  # whose correlations are drawn


class Noisy(NamedTuple):
    clean: Tensor
    noisy: Tensor
    posterior: Posterior


def train(steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"width": 192, "head_width": 128, "head_depth": 2, "c_min": 0.008}
    digits = data.open_source("digits")
    model = MLP(digits.shape, 16, activation="silu", sigma_data=digits.std, **sizes)
    options = training.TrainingOptions(steps=steps, batch_size=96, augment="distort")
    return training.train(model, digits, options).model


@torch.no_grad()
def noised(model: torch.nn.Module, grey: Tensor, sigma: float, seed: int) -> Noisy:
    """Digits with a density, their noisy versions, and the posteriors of what was there."""
    x = data.dequantise(grey, seed=seed)
    noisy = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    scores: Scores = model(noisy, sigma)
    return Noisy(x, noisy, posterior(noisy, scores, sigma))


def leading_directions(errors: Tensor, k: int = 3) -> Tensor:
    """The k principal directions (D, k) of denoising errors."""
    return torch.linalg.svd(errors.flatten(1), full_matrices=False).Vh[:k].mT.contiguous()


def summary(report: CalibrationReport) -> str:
    """One line: 1 is calibrated, above 1 overconfident; what 90% regions cover."""
    nine = int((report.levels - 0.9).abs().argmin())
    return (
        f"Mahalanobis {report.mahalanobis:.3f} +- {report.mahalanobis_error:.3f}  "
        f"trace {report.trace_ratio:.3f} +- {report.trace_ratio_error:.3f}  "
        f"z^2 {report.z_squared[0]:.2f} +- {report.z_squared_error[0]:.2f}  "
        f"90%: {report.entries[nine, 0]:.3f} of pixels, {report.ellipsoid[nine, 0]:.3f} of digits"
    )


def draw(
    path: str, shown: Noisy, before: list[CalibrationReport], after: list[CalibrationReport]
) -> None:
    """One digit and what its posterior knows; the figures; the coverage of intervals."""
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.2, 5.6), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.75])
        draw_digit(top.subplots(1, 6), shown)
        left, right = bottom.subplots(1, 2)
        left.axhline(1, color="#999999", lw=0.8)
        for place, (name, field, marker) in enumerate(
            [("Mahalanobis", "mahalanobis", "o"), ("trace", "trace_ratio", "s")]
        ):
            for when, reports, fill in (("before", before, "white"), ("after", after, None)):
                for i, (report, colour) in enumerate(zip(reports, COLOURS, strict=True)):
                    left.errorbar(
                        i + 0.16 * (2 * place + (when == "after")) - 0.24,
                        getattr(report, field),
                        2 * getattr(report, f"{field}_error"),
                        fmt=marker,
                        color=colour,
                        mfc=fill or colour,
                        label=f"{name}, {when}" if i == 0 else None,
                    )
        left.set_xticks(range(len(SIGMAS)), [f"sigma {s:g}" for s in SIGMAS])
        left.set_title("error over what the covariance expects", fontsize=9)
        left.legend(frameon=False, fontsize=8, loc="lower left")
        right.axhline(0, color="#999999", lw=0.8)
        for report, sigma, colour in zip(after, SIGMAS, COLOURS, strict=True):
            for curve, style in ((report.entries, "-"), (report.ellipsoid, "--")):
                share, low, high = (curve - report.levels[:, None]).T.tolist()
                label = f"sigma {sigma:g}" if style == "-" else None
                right.plot(report.levels.tolist(), share, style, color=colour, label=label)
                right.fill_between(report.levels.tolist(), low, high, color=colour, alpha=0.12)
        right.set(xlabel="nominal probability")
        right.set_title(
            "coverage - nominal, after: pixels (solid), ellipsoids (dashed)", fontsize=9
        )
        right.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=160)


def draw_digit(axes: list[Axes], shown: Noisy) -> None:
    fit = shown.posterior
    low, high = fit.credible_interval(0.9)
    inside = (shown.clean[0] >= low[0]) & (shown.clean[0] <= high[0])
    images = {
        "noisy": (shown.noisy[0], "gray_r", 1.0),
        "posterior mean": (fit.mean[0], "gray_r", 1.0),
        "truth (x: outside 90%)": (shown.clean[0], "gray_r", 1.0),
        "posterior std": (fit.std[0], "magma", None),
        "correlation with +": (fit.correlation(PIXEL)[0], "RdBu_r", 1.0),
        "first component": (fit.principal_components(1)[1][0].reshape(8, 8), "RdBu_r", 0.4),
    }
    for axis, (title, (image, colours, limit)) in zip(axes, images.items(), strict=True):
        low_end = 0.0 if limit is None else -limit
        axis.imshow(image.numpy(), cmap=colours, vmin=low_end, vmax=limit)
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    axes[2].scatter(*(~inside).nonzero().T.flip(0).tolist(), s=12, marker="x", c="#c8742c", lw=1)
    axes[4].plot(PIXEL[1], PIXEL[0], "k+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="calibrated_uncertainty.png", help="the figure")
    parser.add_argument("--quick", action="store_true", help="a few training steps")
    arguments = parser.parse_args()
    model = train(5 if arguments.quick else 1500)
    digits = data.load_digits()
    levels = [0.05 * k for k in range(1, 20)] + [0.99]
    before, after = [], []
    for sigma in SIGMAS:
        held = noised(model, digits.validation, sigma, seed=1)
        test = noised(model, digits.test, sigma, seed=2)
        scale = recalibration_factor(held.clean, held.posterior)
        scaled = test.posterior.recalibrated(scale)
        directions = leading_directions(held.clean - held.posterior.mean)
        for title, reports, fit in (
            ("as trained", before, test.posterior),
            (f"covariance times {scale:.3f}", after, scaled),
        ):
            report = calibration_report(test.clean, fit, directions=directions, levels=levels)
            reports.append(report)
            print(f"sigma {sigma:g}, {title:25}{summary(report)}")
        if sigma == 0.4:
            shown = test._replace(posterior=scaled)
    print(f"\nIn full, the last one: {after[-1]}")
    draw(arguments.out, shown, before, after)


if __name__ == "__main__":
    main()
