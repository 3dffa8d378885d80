"""The page on which the demonstration shows its figures: `report.html`, filled in."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from .plots import BAND

# How far the spread of chains may be from 1 before their law is called wrong.
WIDTH_ERROR = 0.1

# What to look for on the pictures of denoising, from little noise to much.
_SEE = (
    """The white line on the standard deviation is the outline of the denoised digit. Look whether
the doubt is along it and in small loops, with empty paper dark: then it is where a stroke ends, not
whether there is one.""",
    """The vectors are what is uncertain <em>together</em>: where red gains ink, blue loses it, as
when a stroke moves sideways. Below each is its share of the variance.""",
    """Look whether the doubt is now about shape: first vectors that open and close loops, or add
and remove whole strokes, and hold more of the variance than at less noise.""",
)


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
    trained, calibration = metrics["train"], metrics["calibration"]
    template = Template(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    return template.substitute(
        warning="<p><strong>A quick run: too few steps for the figures to mean anything.</strong>"
        "</p>"
        if quick
        else "",
        rank=trained["rank"],
        recalibration=f"{trained['recalibration']:.3f}",
        n=calibration[0]["n"],
        training=_training(trained),
        errors=_errors(metrics["denoise"]),
        panels=_panels(metrics["denoise"], images),
        verdict=_verdict(calibration),
        calibration=_calibration(calibration),
        meaning=_meaning(calibration),
        chains=chains,
        sampling=_sampling(metrics["sampling"]),
        chains_verdict=_chains_verdict(metrics["sampling"]),
        commands=html.escape(commands),
        example=html.escape(example),
        training_png=_embedded(images["training"]),
        calibration_png=_embedded(images["calibration"]),
        spread_png=_embedded(images["spread"]),
        chains_png=_embedded(images["chains"]),
    )


# --------------------------------------------------------------------------------------- tables


def _training(trained: Mapping[str, Any]) -> str:
    low, high = trained["sigma_range"]
    parts = f"{trained['n_train']}, {trained['n_validation']}, {trained['n_test']} digits"
    return _table(
        ["trained", ""],
        [
            ["data", trained["data"]],
            ["training, validation, test", parts],
            ["pixels", "white is -1, full ink 1"],
            ["noise levels", f"sigma {low:g} to {high:g}"],
            ["parameters", f"{trained['parameters']:,}"],
            ["steps", f"{trained['steps']:,} of {trained['batch_size']} digits"],
            ["time", f"{trained['seconds']:.0f} s, threads: {trained['threads']}"],
            ["seed", trained["seed"]],
        ],
    )


def _errors(rows: Sequence[Mapping[str, float]]) -> str:
    cells = []
    for row in rows:
        noisy, denoised = row["mse_noisy"], row["mse_denoised"]
        cells.append([f"{row['sigma']:g}", noisy, denoised, noisy / denoised])
    return _table(["sigma", "noisy", "denoised", "ratio"], cells)


def _calibration(rows: Sequence[Mapping[str, float]]) -> str:
    names = ("mahalanobis", "trace_ratio", "predictive")
    cells = [
        [
            f"{row['sigma']:g}",
            *(f"{row[name]:.4g} → {row[f'{name}_recalibrated']:.4g}" for name in names),
        ]
        for row in rows
    ]
    return _table(["sigma", "Mahalanobis", "trace ratio", "predictive"], cells)


def _sampling(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            row["method"],
            row["step_size"],
            _spread(row["spread"]),
            row["energy_distance"],
            row["min_ess"],
            row["us_per_step"],
        ]
        for row in rows
    ]
    header = ["method", "step size h", "spread (1)", "energy distance (0)", "smallest ESS"]
    return _table([*header, "µs per step"], cells)


def _spread(value: float) -> str:
    """The spread of chains, in red where their law is wrong."""
    right = abs(value - 1) <= WIDTH_ERROR
    return _number(value) if right else f'<span class="bad">{_number(value)}</span>'


def _chains_verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which chains sample the density, and what the largest ESS is an ESS of."""
    right = [row for row in rows if abs(row["spread"] - 1) <= WIDTH_ERROR]
    most = max(rows, key=lambda row: row["min_ess"] if row["min_ess"] == row["min_ess"] else -1.0)
    if not right:
        return f"""<p class="bad">No chain here keeps the spread within {WIDTH_ERROR:.0%}: their ESS
counts draws of other densities.</p>"""
    best = max(right, key=lambda row: row["min_ess"])
    text = (
        f"Of the chains whose spread is within {WIDTH_ERROR:.0%}, {_name(best)} has the largest "
        f"ESS, {best['min_ess']:.0f}."
    )
    if most not in right:
        text += (
            f" {_name(most)} has more, {most['min_ess']:.0f}, but of a wrong law: its spread is "
            f"{most['spread']:.2f}."
        )
    return f"<p>{text}</p>"


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['method']} with h = {row['step_size']:g}"


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


# ------------------------------------------------------------------------- words and pictures


def _panels(rows: Sequence[Mapping[str, float]], images: Mapping[str, bytes]) -> str:
    """The pictures of denoising, one for each noise level."""
    panels = []
    for i, row in enumerate(rows):
        level = f"sigma {row['sigma']:g}"
        source = _embedded(images[f"denoise-{row['sigma']:g}"])
        panels.append(
            f'<figure><img alt="{level}: test digits and the uncertainty of denoising them" '
            f'src="{source}">\n'
            f"<figcaption><strong>{level}.</strong> {_SEE[min(i, len(_SEE) - 1)]}</figcaption>"
            "</figure>"
        )
    return "\n".join(panels)


def _embedded(image: bytes) -> str:
    """A PNG as an address that holds it itself."""
    return f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"


def _verdict(rows: Sequence[Mapping[str, float]]) -> str:
    """Whether the recalibrated predictive figures lie in the band."""
    low, high = BAND
    if all(low <= row["predictive_recalibrated"] <= high for row in rows):
        return f"""<p class="good">Yes: the recalibrated predictive figure lies within {low:g} to
{high:g} at every noise level.</p>"""
    return f"""<p class="bad">Not yet: the recalibrated predictive figure leaves {low:g} to {high:g}
at some noise level. Train for more steps.</p>"""


def _meaning(rows: Sequence[Mapping[str, float]]) -> str:
    """A sentence on the raw Mahalanobis figures."""
    least = min(row["mahalanobis"] for row in rows)
    most = max(row["mahalanobis"] for row in rows)
    text = f"Raw, the Mahalanobis figure is {least:.2f} to {most:.2f}: "
    if most > BAND[1]:
        return text + "in directions that C calls nearly certain, errors are larger than it says."
    if least < BAND[0]:
        return text + "C is too wide in the directions that it calls nearly certain."
    return text + "C is about right even in its smallest directions."
