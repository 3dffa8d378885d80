"""The page on which a demo or a run shows its figures."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from .plots import BAND

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


def report_page(
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
