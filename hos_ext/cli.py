"""The command `hos-ext`: demo, train, denoise and sample, for the digits model.

A command checks its arguments, calls `training` and `plots`, and writes its files whole. An error
is one line. Exit codes: 0 done; 1 the work failed (loss not finite, disk, missing extra); 2 wrong
arguments, found before the work starts; 130 stopped by the user.
"""

import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from . import data, evaluation, plots, storage, training
from .checks import require
from .tweedie import posterior

if TYPE_CHECKING:
    from rich.console import Console

# Noise levels of the report, in data units (a pixel lies in [-1, 1]).
LEVELS = (0.2, 0.4, 0.8)
CHAIN_SIGMA = 0.4
# step_size / sigma^2. The precision of noisy data is at most 1 / sigma^2: Langevin is stable below
# 2, and its variance too large by the factor 1 / (1 - h / (2 sigma^2)) where data do not vary.
STEP_SIZES = (0.1, 1.0)
DEFAULT_STEP_SIZE = {"langevin": 0.1, "ozaki": 1.0}
DEMO_STEPS = 4000


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs `hos-ext` and exits."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


class _WrongOption(Exception):
    """An option of the user that was refused before the work started."""


@contextmanager
def _options() -> Iterator[None]:
    """Inside, what is refused is an option of the user, and not the work gone wrong."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise _WrongOption(str(error)) from error


def run(arguments: list[str]) -> int:
    """Runs a command line and returns its exit code."""
    try:
        typer = require("cli", "typer")
    except RuntimeError as error:
        return _fail(str(error), 1)
    command = typer.main.get_command(_app())
    try:
        # Not standalone: typer would print usage errors as several lines in a box.
        code = command.main(arguments or ["--help"], prog_name="hos-ext", standalone_mode=False)
        return _fail("stopped", code) if code == 130 else code or 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", 130)
    except _WrongOption as error:
        return _fail(str(error), 2)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        return _fail(str(error), 1)
    except Exception as error:
        # Usage errors: of click, or of the copy of click that newer versions of typer hold.
        if hasattr(error, "format_message"):
            return _fail(error.format_message(), 2)
        return _fail(f"{type(error).__name__}: {error}", 1)


def _fail(message: str, code: int) -> int:
    print("hos-ext: " + " ".join(message.split()), file=sys.stderr)
    return code


def _app() -> Any:
    import typer

    app = typer.Typer(
        help="Second-order score models of handwritten digits: train, denoise, sample.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of every random choice.")]
    run_folder = Annotated[Path, typer.Argument(help="Folder that holds a checkpoint.")]
    out_folder = Annotated[Path | None, typer.Option(help="Where to write; default: beside it.")]
    level = Annotated[float, typer.Option(help="Noise level; pixels lie in [-1, 1].")]

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("demo"),
        seed: seed = 0,
        steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = DEMO_STEPS,
        quick: Annotated[
            bool, typer.Option("--quick", help="A few steps only, to see that it runs.")
        ] = False,
    ) -> None:
        """Train on real digits, denoise with uncertainty, check it, sample; write a report."""
        run_demo(out, seed=seed, steps=steps, quick=quick)

    @app.command()
    def train(
        out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/digits"),
        seed: seed = 0,
        steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = DEMO_STEPS,
        rank: Annotated[int, typer.Option(min=0, help="Columns of the low-rank part.")] = 16,
        width: Annotated[int, typer.Option(min=1, help="Hidden width of the score network.")] = 384,
        depth: Annotated[int, typer.Option(min=1, help="Its hidden layers.")] = 3,
        head_width: Annotated[int, typer.Option(min=1, help="Hidden width for s2.")] = 256,
        batch_size: Annotated[int, typer.Option(min=1, help="Digits in a step.")] = 128,
        learning_rate: Annotated[float, typer.Option(help="After warm-up.")] = 4e-3,
        weight_decay: Annotated[float, typer.Option(help="Of the weights.")] = 0.1,
        save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    ) -> None:
        """Train a model; write a run folder with checkpoint, metrics and training curve."""
        model = training.DIGITS_MODEL | {
            "rank": rank,
            "width": width,
            "depth": depth,
            "head_width": head_width,
        }
        options = {
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "save_every": save_every,
        }
        with _options():
            training.check_options(options)
        console = _console()
        _, history, figures = _fit(out, model, seed=seed, steps=steps, options=options)
        curve = plots.png(plots.training_figure(history))
        storage.write_whole(out / "training.png", curve)
        _write_json(
            out / "metrics.json",
            {"train": figures, "history": [row._asdict() for row in history]},
        )
        factor = figures["recalibration"]
        console.print(
            f"{figures['steps']} steps in {figures['seconds']:.0f} s, validation error "
            f"{figures['validation_error']:.3f} sigma^2, recalibration factor {factor:.3f}"
        )
        console.print(f"next: {_program()} denoise {out}")

    @app.command()
    def denoise(
        folder: run_folder,
        sigma: level = CHAIN_SIGMA,
        count: Annotated[int, typer.Option(min=1, max=360, help="Held-out digits.")] = 4,
        seed: seed = 0,
        out: out_folder = None,
    ) -> None:
        """Denoise held-out digits: figure, and npz with mean, std and eigenvectors."""
        with _options():
            model, settings = training.load_checkpoint(folder)
            _check_sigma("denoise", sigma, settings)
        digits = data.load_digits(seed=settings["seed"])
        result = evaluation.denoise(model, digits.test[:count], sigma, seed=seed)
        result = result._replace(posterior=result.posterior.recalibrated(settings["recalibration"]))
        out = folder if out is None else out
        storage.write_whole(
            out / "denoise.png", plots.png(plots.denoising_figure(result, rows=min(count, 8)))
        )
        values, vectors = result.posterior.principal_components(4)
        _write_npz(
            out / "denoise.npz",
            sigma=torch.tensor(sigma),
            clean=result.clean,
            noisy=result.noisy,
            mean=result.posterior.mean,
            std=result.posterior.std,
            eigenvalues=values,
            eigenvectors=vectors,
        )
        errors = evaluation.denoising_errors(result)
        _console().print(
            f"sigma {sigma:g}: mean squared error {errors['mse_noisy']:.4f} -> "
            f"{errors['mse_denoised']:.4f}; wrote {out / 'denoise.png'} and {out / 'denoise.npz'}"
        )

    @app.command()
    def sample(
        folder: run_folder,
        method: Annotated[str, typer.Option(help="langevin or ozaki.")] = "ozaki",
        sigma: level = CHAIN_SIGMA,
        step_size: Annotated[
            float | None, typer.Option(help="h; default: a multiple of sigma^2.")
        ] = None,
        chains: Annotated[int, typer.Option(min=1, max=360, help="Chains.")] = 16,
        steps: Annotated[int, typer.Option(min=4, help="Steps after burn-in.")] = 1000,
        burn_in: Annotated[int, typer.Option(min=0, help="Steps thrown away.")] = 200,
        seed: seed = 0,
        out: out_folder = None,
    ) -> None:
        """Draw chains from noisy held-out digits: figure, npz and effective sample size."""
        with _options():
            if method not in DEFAULT_STEP_SIZE:
                known = ", ".join(DEFAULT_STEP_SIZE)
                raise ValueError(f"sample: --method must be one of {known}, got {method}")
            if step_size is not None and not 0 < step_size < math.inf:
                raise ValueError(
                    f"sample: --step-size must be positive and finite, got {step_size:g}"
                )
            model, settings = training.load_checkpoint(folder)
            _check_sigma("sample", sigma, settings)
        digits = data.load_digits(seed=settings["seed"])
        starts = evaluation.denoise(model, digits.test[:chains], sigma, seed=seed)
        draws, row = evaluation.run_chains(
            model,
            starts.noisy,
            sigma,
            method=method,
            step_size=DEFAULT_STEP_SIZE[method] * sigma**2 if step_size is None else step_size,
            n_steps=steps,
            burn_in=burn_in,
            seed=seed,
        )
        ends = _denoised(model, draws[:, -1], sigma)
        rows = [
            ("starts: noisy held-out digits", starts.noisy),
            (f"{method}, the state after {steps} steps", draws[:, -1]),
            ("the same, denoised", ends),
        ]
        out = folder if out is None else out
        storage.write_whole(out / f"sample-{method}.png", plots.png(plots.chains_figure(rows)))
        _write_npz(
            out / f"sample-{method}.npz",
            sigma=torch.tensor(sigma),
            step_size=torch.tensor(row["step_size"]),
            starts=starts.noisy,
            draws=draws,
            denoised=ends,
        )
        _console().print(
            f"{method}, step size {row['step_size']:g}: smallest effective sample size "
            f"{row['min_ess']:.1f} of {draws.shape[0]} x {draws.shape[1]} draws, "
            f"{row['us_per_step']:.0f} us a step; wrote {out / f'sample-{method}.png'} and .npz"
        )

    return app


# ------------------------------------------------------------------------------------ shared parts


def _console() -> "Console":
    module = require("cli", "rich.console")
    console: Console = module.Console(highlight=False, soft_wrap=True)
    return console


def _program() -> str:
    """How the reader calls this command again: a path if the shell would not find the name."""
    called = Path(sys.argv[0])
    here = os.path.relpath(called)
    local = called.name == "hos-ext" and os.sep in here and not here.startswith(os.pardir)
    return here if local else "hos-ext"


def _check_sigma(command: str, sigma: float, settings: dict[str, Any]) -> None:
    low, high = settings["sigma_range"]
    if not low <= sigma <= high:
        raise ValueError(
            f"{command}: --sigma must be in the range trained, {low:g} to {high:g}, got {sigma:g}"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"
    storage.write_whole(path, text.encode())


def _plain(value: Any) -> Any:
    """None for every number that JSON lacks: NaN, such as the ESS of a pixel that never moved."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_npz(path: Path, **arrays: Tensor) -> None:
    import numpy as np

    buffer = io.BytesIO()
    plain: dict[str, Any] = {name: value.numpy() for name, value in arrays.items()}
    np.savez_compressed(buffer, **plain)
    storage.write_whole(path, buffer.getvalue())


@torch.no_grad()
def _denoised(model: training.Model, noisy: Tensor, sigma: float) -> Tensor:
    return posterior(noisy, model(noisy, sigma), sigma).mean


def _fit(
    folder: Path, model: dict[str, Any], *, seed: int, steps: int, options: dict[str, Any]
) -> tuple[torch.nn.Module, list[training.History], dict[str, Any]]:
    """Trains, recalibrates and leaves the checkpoint in folder; figures for metrics.json."""
    storage.check_writable(folder)
    digits = data.load_digits(seed=seed)
    settings = {
        "model": model,
        "seed": seed,
        "sigma_range": list(training.SIGMA_RANGE),
        "train": {"steps": steps} | options,
        "pixels": "x = 2 (grey + u) / 17 - 1, u uniform on [0, 1); grey = floor(17 (x + 1) / 2)",
    }
    network = training.build_model(model, seed=seed)

    def save(current: torch.nn.Module, step: int) -> str:
        return training.save_checkpoint(folder, current, settings, step=step)

    start = time.perf_counter()
    fitted, history = training.train(
        network, digits, steps=steps, seed=seed, save=save, progress=True, **options
    )
    seconds = time.perf_counter() - start
    factor = evaluation.recalibrate(fitted.eval(), digits.validation, seed=seed)
    training.save_checkpoint(folder, fitted, settings, step=steps, recalibration=factor)
    figures = {
        "data": "scikit-learn digits, 8x8, dequantised",
        "n_train": len(digits.train),
        "n_validation": len(digits.validation),
        "n_test": len(digits.test),
        "seed": seed,
        "steps": steps,
        "batch_size": options.get("batch_size", 128),
        "rank": model["rank"],
        "parameters": sum(p.numel() for p in fitted.parameters()),
        "sigma_range": list(training.SIGMA_RANGE),
        "loss": history[-1].loss,
        "validation_loss": history[-1].validation,
        "validation_error": history[-1].validation_first / 64,
        "recalibration": factor,
        "seconds": seconds,
        "steps_per_second": steps / seconds,
        "threads": torch.get_num_threads(),
    }
    return fitted, history, figures


# ---------------------------------------------------------------------------------------- the demo


def run_demo(out: Path, *, seed: int = 0, steps: int = DEMO_STEPS, quick: bool = False) -> None:
    """Trains, checks and samples on digits; writes report.html, metrics.json, figures, checkpoint.

    Args:
        out: folder, made if need be.
        seed: of every random choice. Same seed, same numbers, timings apart.
        steps: of training.
        quick: few steps of everything, to see that it runs; the figures then mean nothing.

    Raises:
        RuntimeError: the loss stopped being finite, or an extra is missing.
    """
    console = _console()
    started = time.perf_counter()
    settings = dict(training.DIGITS_MODEL)
    options: dict[str, Any] = {}
    chains, chain_steps, burn_in = 32, 1000, 200
    if quick:
        settings |= {"width": 64, "head_width": 64, "depth": 2}
        options = {"batch_size": 32}
        steps, chains, chain_steps, burn_in = min(steps, 40), 8, 20, 2
    console.print(f"Training a rank-{settings['rank']} second-order model on 8x8 digits")
    model, history, trained = _fit(
        out / "checkpoint", settings, seed=seed, steps=steps, options=options
    )
    factor = trained["recalibration"]

    console.print("Denoising held-out digits")
    digits = data.load_digits(seed=seed)
    results = [evaluation.denoise(model, digits.test, sigma, seed=seed) for sigma in LEVELS]
    calibration = [evaluation.calibration_figures(result, factor) for result in results]

    console.print("Sampling with Langevin and Ozaki steps")
    starts = evaluation.denoise(model, digits.test[:chains], CHAIN_SIGMA, seed=seed).noisy
    sampling, pictures, spreads = [], [("starts: noisy test digits", starts)], []
    for method in DEFAULT_STEP_SIZE:
        for multiple in STEP_SIZES:
            draws, row = evaluation.run_chains(
                model,
                starts,
                CHAIN_SIGMA,
                method=method,
                step_size=round(multiple * CHAIN_SIGMA**2, 6),
                n_steps=chain_steps,
                burn_in=burn_in,
                seed=seed,
            )
            sampling.append(row)
            label = f"{method}, h = {row['step_size']:g}"
            ends = _denoised(model, draws[:, -1], CHAIN_SIGMA)
            pictures.append((f"{label}: ends, denoised", ends))
            spreads.append((method, row["step_size"], draws.flatten(0, 1).std(0)))
    clean = data.dequantise(torch.cat(digits), seed=seed)
    exact = (clean.var(0) + CHAIN_SIGMA**2).sqrt()

    figures = {
        "training": plots.training_figure(history),
        "calibration": plots.calibration_figure(calibration, results, recalibration=factor),
        "chains": plots.chains_figure(pictures),
        "spread": plots.spread_figure(spreads, exact),
    }
    for result in results:
        scaled = result._replace(posterior=result.posterior.recalibrated(factor))
        figures[f"denoise-{result.sigma:g}"] = plots.denoising_figure(scaled)
    images = {name: plots.png(figure) for name, figure in figures.items()}
    for name, image in images.items():
        storage.write_whole(out / f"{name}.png", image)
    trained["total_seconds"] = time.perf_counter() - started
    metrics = {
        "denoise": [evaluation.denoising_errors(result) for result in results],
        "calibration": calibration,
        "sampling": sampling,
        "train": trained,
    }
    _write_json(out / "metrics.json", metrics)
    report = plots.report(
        metrics,
        images,
        chains=f"{chains} chains of {chain_steps} steps at sigma {CHAIN_SIGMA:g}",
        commands=next_commands(out),
        example=example(out),
        quick=quick,
    )
    storage.write_whole(out / "report.html", report.encode())
    _summary(console, metrics, out / "report.html")


def _summary(console: "Console", metrics: dict[str, Any], report: Path) -> None:
    """The numbers on the terminal."""
    from rich.table import Table

    table = Table(title="Test digits")
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
            f"{row['method']:8} h = {row['step_size']:.3f}: smallest ESS {row['min_ess']:.0f}, "
            f"{row['us_per_step']:.0f} us a step"
        )
    console.print(f"[bold]Open {report}[/bold] ({metrics['train']['total_seconds']:.0f} s in all)")


def next_commands(out: Path) -> str:
    """The commands that the report of `out` ends with."""
    program, checkpoint = _program(), (out / "checkpoint").as_posix()
    return f"""{program} denoise {checkpoint} --sigma 0.6
{program} sample {checkpoint} --method ozaki --step-size 0.3
{program} train --out runs/rank4 --rank 4
{program} denoise runs/rank4"""


def example(out: Path) -> str:
    """The Python example that the report of `out` ends with."""
    return f"""import torch
from hos_ext import data, posterior, training

model, settings = training.load_checkpoint("{(out / "checkpoint").as_posix()}")
digits = data.load_digits(seed=settings["seed"])
x = data.dequantise(digits.test[:8], seed=1)
noisy = x + 0.4 * torch.randn_like(x)
with torch.no_grad():
    result = posterior(noisy, model(noisy, 0.4), 0.4)
values, vectors = result.principal_components(4)
print(result.mean.shape, result.std.mean(), values[0])"""
