"""Figures of digits, posteriors, calibration and chains, and the report that holds them.

A figure is 4.6 inches wide with text of 7 to 9 points: shown at the width of a phone it keeps about
its natural size. Functions return a `matplotlib.figure.Figure` (extra `app`), no pyplot state is
touched, and one colour means one thing on every figure.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .checks import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .evaluation import Denoised
    from .training import History

_WIDTH = 4.6
_BLUE, _ORANGE, _GREY = "#1f6fb4", "#d9622b", "#8a8a8a"
# What the recalibrated predictive figure is asked to lie in.
BAND = (0.8, 1.25)


def _figure(height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    module = require("plots", "matplotlib.figure")
    figure: Figure = module.Figure(figsize=(_WIDTH, height), dpi=200, layout=layout)
    return figure


def _show(ax: Axes, image: Tensor, **style: Any) -> Any:
    """An image without axes; ink is dark, as on paper."""
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(linewidth=0.4, color=_GREY)
    return ax.imshow(image.numpy(), interpolation="nearest", **style)


_INK = {"cmap": "gray_r", "vmin": -1.0, "vmax": 1.0}


def denoising_figure(result: Denoised, *, rows: int = 4) -> Figure:
    """Noisy, denoised and true digits, standard deviation, first four eigenvectors of Cov[x | x~].

    Args:
        result: digits at one noise level; the first `rows` are shown.
        rows: digits, one in a row.

    Returns:
        Figure. A line on the standard deviation marks the outline of the denoised digit. Under each
        eigenvector is its share of the posterior variance. Its sign means nothing: the largest
        entry is shown positive (red).
    """
    titles = ["noisy", "denoised", "true", "std", "vector 1", "2", "3", "4"]
    posterior = result.posterior
    mean, std = posterior.mean[:rows], posterior.std[:rows]
    values, vectors = posterior.principal_components(4)
    share = values[:rows] / posterior.covariance.trace()[:rows].unsqueeze(-1)
    rows = len(mean)
    height = 0.68 * rows + 0.72
    figure = _figure(height, layout=None)
    axes = figure.subplots(rows, 8, squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.2 / height, bottom=0.6 / height, wspace=0.1, hspace=0.32
    )
    top = float(std.max())
    scale: Any = None
    for i in range(rows):
        digits = (result.noisy[i], mean[i], result.clean[i])
        for ax, image in zip(axes[i], digits, strict=False):
            _show(ax, image, **_INK)
        scale = _show(axes[i, 3], std[i], cmap="magma", vmin=0.0, vmax=top)
        axes[i, 3].contour(mean[i].numpy(), levels=[0.0], colors="white", linewidths=0.7)
        for k in range(4):
            vector = vectors[i, :, k].reshape(mean[i].shape)
            extreme = vector.flatten()[vector.abs().argmax()]
            vector = vector * extreme.sign()
            limit = float(extreme.abs())
            _show(axes[i, 4 + k], vector, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes[i, 4 + k].set_xlabel(f"{100 * float(share[i, k]):.0f} %", fontsize=6.5, labelpad=1)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=7.5, pad=3)
    bar = figure.colorbar(
        scale,
        cax=figure.add_axes((0.28, 0.36 / height, 0.44, 0.06 / height)),
        orientation="horizontal",
    )
    bar.set_label("std of a pixel (white is -1, ink 1)", fontsize=7, labelpad=1)
    bar.ax.tick_params(labelsize=7)
    return figure


def calibration_figure(
    rows: Sequence[dict[str, float]],
    results: Sequence[Denoised],
    *,
    recalibration: float,
) -> Figure:
    """Calibration at each noise level, before and after recalibration, and coverage of intervals.

    Args:
        rows: {"sigma", "mahalanobis", "predictive", "predictive_recalibrated"} for each level.
        results: the same levels, for the coverage of the per-pixel intervals mean +- q std.
        recalibration: the scalar of the covariance.

    Returns:
        Figure: above, the figures on a log scale (1 is calibrated, right of it overconfident, BAND
        shaded); below, how often a true pixel lies in its central interval against how
        often it should.
    """
    figure = _figure(4.6)
    first, second = figure.subplots(2, 1, height_ratios=[1.0, 1.5])
    first.axvspan(*BAND, color=_GREY, alpha=0.18, lw=0)
    first.axvline(1.0, color=_GREY, lw=0.8)
    marks = (
        ("mahalanobis", "Mahalanobis, raw", "D", _GREY),
        ("predictive", "predictive, raw", "o", _ORANGE),
        ("predictive_recalibrated", "predictive, recalibrated", "o", _BLUE),
    )
    for key, label, marker, color in marks:
        first.scatter(
            [row[key] for row in rows],
            range(len(rows)),
            label=label,
            marker=marker,
            color=color,
            s=26,
        )
    figures = [row[key] for row in rows for key, *_ in marks] + list(BAND)
    first.set_xscale("log")
    first.set_xlim(0.9 * min(figures), 1.1 * max(figures))
    ticks = [
        t
        for t in (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)
        if 0.9 * min(figures) <= t <= 1.1 * max(figures)
    ]
    first.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    first.set_xticks([], minor=True)
    first.set_yticks(range(len(rows)), [f"sigma {row['sigma']:g}" for row in rows], fontsize=8)
    first.set_ylim(len(rows) - 0.5, -0.5)
    first.legend(
        fontsize=7,
        frameon=False,
        ncols=3,
        loc="lower center",
        bbox_to_anchor=(0.45, 1.0),
        columnspacing=0.8,
        handletextpad=0.1,
    )
    first.set_xlabel("mean squared error over what the covariance expects", fontsize=8)

    nominal = torch.linspace(0.02, 0.98, 49)
    half_width = torch.erfinv(nominal) * 2**0.5
    second.plot([0, 1], [0, 1], color=_GREY, lw=0.8)
    for result, style in zip(results, ("-", "--", ":", "-.") * len(results), strict=False):
        spread = recalibration**0.5 * result.posterior.std
        ratio = ((result.clean - result.posterior.mean) / spread).abs().flatten()
        covered = (ratio.unsqueeze(1) <= half_width).float().mean(0)
        second.plot(
            nominal.tolist(),
            covered.tolist(),
            style,
            color=_BLUE,
            lw=1.4,
            label=f"sigma {result.sigma:g}",
        )
    second.set(xlim=(0, 1), ylim=(0, 1))
    second.set_xlabel("probability of the interval mean ± q std", fontsize=8)
    second.set_ylabel("share of true pixels inside", fontsize=8)
    second.tick_params(labelsize=8)
    second.legend(fontsize=7.5, frameon=False)
    return figure


def chains_figure(rows: Sequence[tuple[str, Tensor]], *, columns: int = 8) -> Figure:
    """Rows of digits with a title each, such as the starts and the ends of chains.

    Args:
        rows: (title, images (n, 8, 8) in data units).
        columns: images shown in a row.
    """
    height = 0.76 * len(rows)
    figure = _figure(height, layout=None)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.22 / height, bottom=0.02 / height, wspace=0.1, hspace=0.4
    )
    for line, (title, images) in zip(axes, rows, strict=True):
        for ax in line:
            ax.axis("off")
        for ax, image in zip(line, images, strict=False):
            ax.axis("on")
            _show(ax, image, **_INK)
        line[0].set_title(title, fontsize=8, loc="left", pad=3)
    return figure


def training_figure(history: Sequence[History]) -> Figure:
    """Denoising error over the steps, in units of sigma^2: training, and EMA weights on validation.

    The first-order term over the number of pixels: the mean of (x - m)^2 / sigma^2 over the noise
    levels. 1 is the noisy digit itself. The first fifth of the rows may lie outside.
    """
    figure = _figure(2.5)
    ax = figure.subplots()
    steps = [row.step for row in history]
    training = [row.first / 64 for row in history]
    held_out = [row.validation_first / 64 for row in history]
    ax.plot(steps, training, color=_GREY, lw=1.2, label="training digits")
    ax.plot(steps, held_out, color=_BLUE, lw=1.6, label="validation digits, averaged weights")
    settled = training[len(history) // 5 :] + held_out[len(history) // 5 :]
    margin = 0.05 * (max(settled) - min(settled)) or 0.05
    ax.set_ylim(min(settled) - margin, max(settled) + margin)
    ax.set_xlabel("step", fontsize=8)
    ax.set_ylabel("squared error / sigma²", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=8, frameon=False)
    return figure


def spread_figure(rows: Sequence[tuple[str, float, Tensor]], exact: Tensor) -> Figure:
    """Standard deviation of each pixel over the draws of chains, against what it should be.

    Args:
        rows: (method, step size, standard deviation (8, 8)); one axes for each method.
        exact: the standard deviation of the density that the chains should sample. Shape (8, 8).
    """
    methods = list(dict.fromkeys(method for method, *_ in rows))
    figure = _figure(2.7)
    axes = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)[0]
    span = [0.9 * float(exact.min()), 1.05 * float(exact.max())]
    for ax, name in zip(axes, methods, strict=True):
        ax.plot(span, span, color=_GREY, lw=0.8)
        chosen = [(step, std) for method, step, std in rows if method == name]
        for (step, std), color in zip(chosen, (_BLUE, _ORANGE, _GREY), strict=False):
            ax.scatter(
                exact.flatten().numpy(),
                std.flatten().numpy(),
                s=7,
                color=color,
                label=f"h = {step:.3g}",
                lw=0,
            )
        ax.set_title(name, fontsize=8.5)
        ax.set_xlabel("std of a pixel, exact", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=7.5, frameon=False, handletextpad=0.1, markerscale=1.6)
    axes[0].set_ylabel("of the chains", fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, without a date in it: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


# ------------------------------------------------------------------------------------- the report

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #5d5d63; --page: #fbfbf9; --card: #fff;
  --line: #dedee0; --good: #1c7c3c; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececee; --soft: #a5a5ad; --page: #161618;
  --card: #1f1f22; --line: #3a3a3e; --good: #6fd08c; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 44rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .5rem 0; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; max-width: 36rem; height: auto; border-radius: 8px;
  border: 1px solid var(--line); background: #fff; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .4rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
th, td { overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.scroll { overflow-x: auto; }
.good { color: var(--good); } .bad { color: var(--bad); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem;
  white-space: pre-wrap; font-size: .8rem; line-height: 1.45; }
"""


def report(
    metrics: dict[str, Any],
    images: dict[str, bytes],
    *,
    chains: str,
    commands: str,
    example: str,
    quick: bool,
) -> str:
    """The page of `hos-ext demo`: what was trained, what came out, what it means, how to go on.

    Args:
        metrics: "denoise", "calibration", "sampling" and "train", as in metrics.json.
        images: PNG files: "training", "calibration", "chains", "spread", "denoise-<sigma>".
        chains: what the chains were, in words.
        commands, example: what to type next, in a shell and in Python.
        quick: says that the figures mean nothing.

    Returns:
        HTML that loads nothing from elsewhere.
    """
    trained = metrics["train"]
    factor = trained["recalibration"]
    low, high = trained["sigma_range"]
    warning = (
        "<p><strong>A quick run: too few steps for the figures to mean anything.</strong></p>"
        if quick
        else ""
    )
    training = _table(
        ["trained", ""],
        [
            ["data", trained["data"]],
            [
                "training, validation, test",
                f"{trained['n_train']}, {trained['n_validation']}, {trained['n_test']} digits",
            ],
            ["pixels", "white is -1, full ink 1"],
            ["noise levels", f"sigma {low:g} to {high:g}"],
            ["parameters", f"{trained['parameters']:,}"],
            ["steps", f"{trained['steps']:,} of {trained['batch_size']} digits"],
            ["time", f"{trained['seconds']:.0f} s, threads: {trained['threads']}"],
            ["seed", trained["seed"]],
        ],
    )
    errors = _table(
        ["sigma", "noisy", "denoised", "ratio"],
        [
            [
                f"{row['sigma']:g}",
                row["mse_noisy"],
                row["mse_denoised"],
                row["mse_noisy"] / row["mse_denoised"],
            ]
            for row in metrics["denoise"]
        ],
    )
    panels = "\n".join(
        _embedded(
            images[f"denoise-{row['sigma']:g}"],
            f"sigma {row['sigma']:g}: test digits and the uncertainty of denoising them",
            f"<strong>sigma {row['sigma']:g}.</strong> {_SEE[min(i, len(_SEE) - 1)]}",
        )
        for i, row in enumerate(metrics["denoise"])
    )
    calibration = _table(
        ["sigma", "Mahalanobis", "trace ratio", "predictive"],
        [
            [
                f"{row['sigma']:g}",
                f"{row['mahalanobis']:.4g} → {row['mahalanobis_recalibrated']:.4g}",
                f"{row['trace_ratio']:.4g} → {row['trace_ratio_recalibrated']:.4g}",
                f"{row['predictive']:.4g} → {row['predictive_recalibrated']:.4g}",
            ]
            for row in metrics["calibration"]
        ],
    )
    sampling = _table(
        ["method", "step size h", "smallest ESS", "µs per step"],
        [
            [row["method"], row["step_size"], row["min_ess"], row["us_per_step"]]
            for row in metrics["sampling"]
        ],
    )
    body = f"""
<h1>Second-order scores of handwritten digits</h1>
{warning}
<p>A network learned the score of noisy digits together with its derivative, the Hessian of the log
density as diagonal plus rank {trained["rank"]}, by denoising score matching of first and second
order (Meng et al. 2021; the second-order target is centred at the learned mean). One evaluation
then gives the denoised digit and the covariance of what is not known about it.</p>
{training}
{_embedded(images["training"], "loss over training steps", _CURVE)}

<h2>Denoising, and how sure it is</h2>
<p>Mean squared error of a pixel on test digits. None was trained on, but their 13 writers are also
those of the training digits.</p>
{errors}
{panels}

<h2>Is the uncertainty right?</h2>
{_verdict(metrics["calibration"])}
{calibration}
<p>Each figure is a squared error over what the covariance C expects, on
{metrics["calibration"][0]["n"]} test digits: 1 is right, more is overconfident, less is too
cautious. <em>Mahalanobis</em> counts all directions alike, also those in which C is tiny and which
the loss hardly sees. <em>Trace ratio</em> sees the total variance only. <em>Predictive</em> is the
Mahalanobis figure with noise of sigma/2 added to both sides: it asks about the directions that
matter. {_meaning(metrics["calibration"])} Behind each arrow: after one scalar, {factor:.3f}, fitted
on the validation digits over all noise levels, has multiplied every C.</p>
{_embedded(images["calibration"], "calibration at three noise levels", _COVERAGE)}

<h2>Sampling</h2>
<p>{chains}, after a burn-in, all from the same starts with the same noise. They sample the density
of <em>noisy</em> digits. Ozaki steps also use the diagonal of the learned Hessian. The step size h
is that of MALA: drift h times the score, noise sqrt(2h).</p>
{sampling}
<p>ESS is the effective number of independent draws for the worst of the 64 pixels, all chains
together. Time is for one step of all chains; nearly all of it is the network, which computes its
second-order part for both methods.</p>
{_embedded(images["spread"], "spread of the chains against the exact spread", _SPREAD)}
{_embedded(images["chains"], "starts and ends of the chains", _CHAINS)}

<h2>How to go on</h2>
<pre>{html.escape(commands)}</pre>
<p>The same from Python:</p>
<pre>{html.escape(example)}</pre>
<p>The numbers of this page are in metrics.json beside it, the figures are there as PNG files.</p>
"""
    return _PAGE.replace("BODY", body).replace("STYLE", _STYLE)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Second-order scores of handwritten digits</title>
<style>STYLE</style>
</head>
<body>BODY</body>
</html>
"""

_CURVE = """Denoising error while training. Grey: training digits, half of them distorted a little.
Blue: the averaged weights on the validation digits, always under the same noise. A blue curve that
turned up again would be overfitting."""

_SEE = (
    """The white line on the standard deviation is the outline of the denoised digit. Look whether
the doubt is along it and in small loops, with empty paper dark: then it is where a stroke ends, not
whether there is one.""",
    """The vectors are what is uncertain <em>together</em>: where red gains ink, blue loses it, as
when a stroke moves sideways. Below each is its share of the variance.""",
    """Look whether the doubt is now about shape: first vectors that open and close loops, or add
and remove whole strokes, and hold more of the variance than at less noise.""",
)

_COVERAGE = """Above: closer to the line at 1 is better, and the band is what is asked of the blue
points. Below: intervals of the recalibrated posterior, pixel by pixel, hold the truth as often as
they should where the curve is on the diagonal. Above it they are too wide, which in the middle is
what a Gaussian does to pixels that are mostly certain and sometimes very wrong."""

_SPREAD = """Each point is a pixel. On the line, the chains have the spread of the noisy digits;
above it they are too hot, and their ESS counts draws of the wrong density. Look at the larger step
size: Langevin's own error inflates every pixel there; compare whether Ozaki keeps to the line."""

_CHAINS = """First row: where the chains start. Below: their last states, denoised by the network.
Look for clean digits, and for starts that became another digit."""


def _verdict(rows: Sequence[dict[str, float]]) -> str:
    low, high = BAND
    if all(low <= row["predictive_recalibrated"] <= high for row in rows):
        return f"""<p class="good">Yes: the recalibrated predictive figure lies within {low:g} to
{high:g} at every noise level.</p>"""
    return f"""<p class="bad">Not yet: the recalibrated predictive figure leaves {low:g} to {high:g}
at some noise level. Train for more steps.</p>"""


def _meaning(rows: Sequence[dict[str, float]]) -> str:
    """A sentence on the raw Mahalanobis figures."""
    least = min(row["mahalanobis"] for row in rows)
    most = max(row["mahalanobis"] for row in rows)
    text = f"Raw, the Mahalanobis figure is {least:.2f} to {most:.2f}: "
    if most > BAND[1]:
        return text + "in directions that C calls nearly certain, errors are larger than it says."
    if least < BAND[0]:
        return text + "C is too wide in the directions that it calls nearly certain."
    return text + "C is about right even in its smallest directions."


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table of HTML cells; numbers get four significant digits."""
    lines = ["".join(f"<th>{cell}</th>" for cell in header)]
    for row in rows:
        cells = [_number(cell) if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>\n{body}\n</table></div>'


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _embedded(image: bytes, alternative: str, caption: str) -> str:
    """An HTML figure that holds its PNG itself."""
    code = base64.b64encode(image).decode("ascii")
    return (
        f'<figure><img alt="{html.escape(alternative)}" src="data:image/png;base64,{code}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
