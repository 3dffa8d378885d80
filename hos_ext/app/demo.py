"""`hos-ext demo`: train on real digits, denoise with uncertainty, check it, sample, and report.

The run itself is a run folder of `runs` beside the report, so that every command goes on from it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check, require
from ..scores import Model
from ..tweedie.posterior import posterior
from . import data, evaluation, plots, runs
from .report import report_page
from .results import write

# Noise levels of the report, in data units (a pixel lies in [-1, 1]).
LEVELS = (0.2, 0.4, 0.8)
CHAIN_SIGMA = 0.4
METHODS = ("langevin", "ozaki")
STEP_SIZES = (0.1, 1.0)  # over sigma^2
QUICK = {"width": 64, "head_width": 64, "depth": 2, "batch_size": 32, "steps": 40}


def prepare(
    out: Path,
    *,
    seed: int = 0,
    steps: int = 4000,
    quick: bool = False,
    device: str = "auto",
    force: bool = False,
) -> runs.Run:
    """The checked training run of the demonstration, in out/run.

    Args:
        out: folder of the report.
        seed: of every random choice. Same seed, same numbers, timings apart.
        steps: of training.
        quick: few steps of everything, to see that it runs; the figures then mean nothing.
        device: auto, cpu, cuda or cuda:N, for the training.
        force: what is in out may be replaced.

    Raises:
        ValueError, OSError, RuntimeError: as `runs.prepare`; out holds a report.
    """
    free = force or not (out / "report.html").exists()
    check("demo", free, "--out must hold no report (--force replaces it)", out)
    small = QUICK | {"steps": min(steps, QUICK["steps"])} if quick else {}
    given = {"data": "digits", "seed": seed, "steps": steps, "tracker": "none"}
    given = {**given, "device": device, **small}
    return runs.prepare(given, out / "run", force=force)


def run_demo(
    job: runs.Run,
    out: Path,
    *,
    program: str,
    quick: bool = False,
    console: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains, checks and samples; writes report.html, metrics.json and figures to out.

    Args:
        job: what `prepare` returned.
        out: folder of the report.
        program: what a reader types for `hos-ext`.
        quick: as in `prepare`.
        console: of rich, for what it says; None is stdout.
        progress: of the training, as in `training.train`.

    Returns:
        The content of metrics.json.

    Raises:
        RuntimeError: the loss stopped being finite, or an extra is missing.
    """
    if console is None:
        made = require("demo", "rich.console").Console
        console = made(highlight=False, soft_wrap=True, markup=False)
    started = time.perf_counter()
    seed, source = job.options["seed"], job.source
    chains, steps, burn_in = (8, 20, 2) if quick else (32, 1000, 200)
    console.print(f"Training a rank-{job.options['rank']} second-order model on 8x8 digits")
    trained = runs.fit(job, progress=progress)
    model, facts = runs.load_run(job.out)

    console.print("Denoising held-out digits")
    results = [evaluation.denoise_held_out(model, source, s, seed=seed) for s in LEVELS]
    scale = facts["recalibration"]
    calibration = [evaluation.calibration_figures(result, scale) for result in results]

    console.print("Sampling with Langevin and Ozaki steps")
    starts = evaluation.denoise_held_out(model, source, CHAIN_SIGMA, count=chains, seed=seed).x
    reference = evaluation.noisy_held_out(source, CHAIN_SIGMA, count=len(source.test), seed=seed)
    sampling, figures = _sample(model, starts, reference, n_steps=steps, burn_in=burn_in, seed=seed)

    figures["calibration"] = plots.calibration_figure(calibration, results, recalibration=scale)
    for result in results:
        scaled = result._replace(posterior=result.posterior.recalibrated(scale))
        figures[f"denoise-{result.sigma:g}"] = plots.denoising_figure(scaled)
    images = {name: plots.png(figure) for name, figure in figures.items()}
    images["training"] = (job.out / "training.png").read_bytes()
    trained["total_seconds"] = time.perf_counter() - started
    metrics = {
        "denoise": [evaluation.denoising_errors(result) for result in results],
        "calibration": calibration,
        "sampling": sampling,
        "train": trained,
    }
    report = report_page(
        metrics,
        images,
        chains=f"{chains} chains of {steps} steps at sigma {CHAIN_SIGMA:g}",
        commands=next_commands(out, program),
        example=example(out),
        quick=quick,
    )
    write(out, {f"{name}.png": image for name, image in images.items()})
    runs.write_json(out / "metrics.json", metrics)
    write(out, {"report.html": report.encode()})
    _summary(console, metrics, out / "report.html")
    return metrics


def _sample(
    model: Model, starts: Tensor, reference: Tensor, *, n_steps: int, burn_in: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Chains of each method and step size: their rows of metrics.json, and their two figures.

    The reference are noisy held-out samples, draws of the density that the chains should sample.
    """
    rows, pictures, spreads = [], [("starts: noisy test digits", starts)], []
    for method in METHODS:
        for multiple in STEP_SIZES:
            draws, row = evaluation.run_chains(
                model,
                starts,
                CHAIN_SIGMA,
                method=method,
                step_size=round(multiple * CHAIN_SIGMA**2, 6),
                n_steps=n_steps,
                burn_in=burn_in,
                seed=seed,
                reference=reference,
            )
            rows.append(row)
            with torch.no_grad():
                ends = posterior(draws[:, -1], model(draws[:, -1], CHAIN_SIGMA), CHAIN_SIGMA).mean
            pictures.append((f"{method}, h = {row['step_size']:g}: ends, denoised", ends))
            spreads.append((method, row["step_size"], draws.flatten(0, 1).std(0)))
    clean = data.dequantise(torch.cat(data.load_digits(seed=seed)), seed=seed)
    exact = (clean.var(0) + CHAIN_SIGMA**2).sqrt()
    spread = plots.spread_figure(spreads, exact)
    return rows, {"chains": plots.chains_figure(pictures), "spread": spread}


def _summary(console: Any, metrics: dict[str, Any], report: Path) -> None:
    """The numbers on the terminal."""
    table = require("demo", "rich.table").Table(title="Test digits")
    for name in ("sigma", "error noisy", "denoised", "predictive", "recalibrated"):
        table.add_column(name, justify="right")
    for errors, row in zip(metrics["denoise"], metrics["calibration"], strict=True):
        table.add_row(
            f"{row['sigma']:g}",
            f"{errors['mse_noisy']:.4f}",
            f"{errors['mse_denoised']:.4f}",
            f"{row['predictive']:.3f}",
            f"{row['predictive_recalibrated']:.3f}",
        )
    console.print(table)
    for row in metrics["sampling"]:
        console.print(
            f"{row['method']:8} h = {row['step_size']:.3f}: smallest ESS {row['min_ess']:.0f} of a "
            f"law with spread {row['spread']:.2f} and energy distance {row['energy_distance']:.3f} "
            f"(1 and 0 are right), {row['us_per_step']:.0f} us a step"
        )
    console.print(f"Open {report} ({metrics['train']['total_seconds']:.0f} s in all)")


def next_commands(out: Path, program: str) -> str:
    """The commands that the report of `out` ends with."""
    folder = (out / "run").as_posix()
    return f"""{program} denoise {folder} --sigma 0.6
{program} chains {folder} --method ozaki --step-size 0.3
{program} evaluate {folder}
{program} train --out runs/rank4 --rank 4
{program} denoise runs/rank4"""


def example(out: Path) -> str:
    """The Python example that the report of `out` ends with."""
    return f"""import torch
from hos_ext import load_model, posterior
from hos_ext.app import data

model, config = load_model("{(out / "run" / "model").as_posix()}")
digits = data.open_source("digits", seed=config["run"]["options"]["seed"])
x0 = digits.scaling.forward(digits.test[:8], seed=1)
x = x0 + 0.4 * torch.randn_like(x0)
with torch.no_grad():
    result = posterior(x, model(x, 0.4), 0.4)
values, vectors = result.principal_components(4)
print(result.mean.shape, result.std.mean(), values[0])"""
