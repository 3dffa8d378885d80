"""The command `hos-ext`: train, resume, denoise, sample, evaluate, info and demo.

A command checks its arguments, calls `runs`, `results`, `evaluation` or `demo`, and writes files
whole; it replaces what is there only with --force. An error is one line. Exit codes: 0 done; 1 the
work failed (disk, missing extra, chains diverged); 2 wrong arguments, found before the work starts;
3 the loss or a gradient stopped being finite; 4 out of memory; 130 or 143 stopped by SIGINT or
SIGTERM (training leaves a checkpoint: `hos-ext resume`).
"""

import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from .. import storage
from ..checks import check_number, one_of, require
from . import demo as demonstration
from . import evaluation, results, runs, training
from .options import FOLDER, OPTIONS, read_config

if TYPE_CHECKING:
    from rich.console import Console

CODES = (
    "Exit codes: 0 done; 1 the work failed; 2 wrong arguments; 3 the loss stopped being finite; "
    "4 out of memory; 130 or 143 stopped by SIGINT or SIGTERM."
)


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
    except (ValueError, TypeError, OSError) as error:
        raise _WrongOption(str(error)) from error


def run(arguments: list[str]) -> int:
    """Runs a command line and returns its exit code."""
    try:
        typer = require("cli", "typer")
        command = typer.main.get_command(_app())
        # Not standalone: typer would print usage errors as several lines in a box.
        code = command.main(arguments or ["--help"], prog_name="hos-ext", standalone_mode=False)
        return _fail("stopped", code) if code == 130 else code or 0
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except training.Stopped as error:
        return _fail(str(error), 128 + error.signal)
    except _WrongOption as error:
        return _fail(str(error), 2)
    except training.NotFinite as error:
        return _fail(str(error), 3)
    except (training.OutOfMemory, torch.OutOfMemoryError, MemoryError) as error:
        return _fail(str(error) or "out of memory", 4)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        # Abort, what typer makes of an interrupt, is a RuntimeError.
        stopped = type(error).__name__ == "Abort"
        return _fail("stopped", 130) if stopped else _fail(str(error), 1)
    except Exception as error:
        # Usage errors: of click, or of the copy of click that newer versions of typer hold.
        if hasattr(error, "format_message"):
            return _fail(error.format_message(), 2)
        return _fail(f"{type(error).__name__}: {error}", 1)


def _fail(message: str, code: int) -> int:
    print("hos-ext: " + " ".join(message.split()), file=sys.stderr)
    return code


NOISE, CHAINS = "Noise", "Chains"  # panels of --help


def _takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Puts `options.OPTIONS` before the parameters of a command, each None unless it is typed."""
    import typer

    parameters = list(inspect.signature(command).parameters.values())
    places = []
    for name, known in OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        default = known.words
        if not default and known.kind is not bool:
            value = known.default if isinstance(known.default, list) else [known.default]
            default = ",".join(map(str, value))
        kind = str if known.kind is list else known.kind
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            help=known.help + (f" Default: {default}." if default else ""),
            rich_help_panel=known.panel,
            show_default=False,
        )
        places.append(
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    places += [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    changed: Any = command
    changed.__signature__ = inspect.Signature(places)
    changed.__annotations__ = {place.name: place.annotation for place in places}
    return command


def _app() -> Any:
    import typer

    app = typer.Typer(
        help="Train second-order score models, denoise with uncertainty, sample.\n\n"
        "Start with: hos-ext demo (minutes), or with your own data:\n\n"
        "  hos-ext train --data parquet:mnist/train.parquet --out runs/mnist\n\n"
        "  hos-ext denoise runs/mnist noisy.png --raw-sigma 50\n\n"
        "hos-ext COMMAND --help explains each.\n\n" + CODES,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    Seed = Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of every random choice of this command.")
    ]
    RunFolder = Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or the model folder of a run.")
    ]
    Out = Annotated[
        Path | None,
        typer.Option(help="Folder to write to. Default: the run folder.", rich_help_panel=FOLDER),
    ]
    Force = Annotated[
        bool, typer.Option("--force", help="Replace what is there.", rich_help_panel=FOLDER)
    ]
    Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
    Level = Annotated[
        float | None,
        typer.Option(
            help="Noise level, data units (8-bit pixels: [-1, 1]). Default: 0.4, or the nearest "
            "one trained; files need one.",
            rich_help_panel=NOISE,
        ),
    ]

    @app.command()
    @_takes_options
    def train(
        out: Annotated[
            Path | None,
            typer.Option(help="Default: runs/NAME, after the data.", rich_help_panel=FOLDER),
        ] = None,
        config: Annotated[
            Path | None,
            typer.Option(
                help="Options from .yaml, .toml, .json or a run.json; what is typed here wins.",
                rich_help_panel=FOLDER,
            ),
        ] = None,
        go_on: Annotated[
            bool,
            typer.Option(
                "--continue",
                help="Go on where the run in --out stopped, if there is one with these options.",
                rich_help_panel=FOLDER,
            ),
        ] = False,
        force: Force = False,
        **typed: Any,
    ) -> None:
        """Train a second-order score model: score, and covariance of what noise hid.

        Examples:

          hos-ext train --data parquet:mnist/train.parquet --out runs/mnist

          hos-ext train --data folder:photos --model unet --diagonal --sigma 0.1,1

          torchrun --nproc-per-node 2 -m hos_ext.cli train --data npy:signals.npy

        Writes run.json (every option), checkpoints, TensorBoard logs, training.png, metrics.json
        and model/. Stopped or killed, it goes on by hos-ext resume RUN.
        """
        with _options():
            given = {} if config is None else read_config(config)
            given |= {name: value for name, value in typed.items() if value is not None}
            folder = out or Path(given.get("out") or _default_out(given))
            # torchrun starts a killed rank again with the same command line.
            again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
            job = runs.prepare(given, folder, force=force and not again, resume=go_on or again)
        if job.resume and runs.finished(folder, job.options["steps"]):
            _nothing_to_do(folder)
        else:
            _train(job)

    @app.command()
    def resume(
        folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
        steps: Annotated[
            int | None,
            typer.Option(
                help="More than before: only where the run has --decay constant. A cosine brings "
                "the learning rate to zero at the last step."
            ),
        ] = None,
    ) -> None:
        """Go on with a run that was stopped or killed, from its last whole checkpoint.

        Example:

          hos-ext resume runs/mnist

        On one CPU process it ends with the weights that an uninterrupted run would have. A
        checkpoint that is damaged is passed over, and said so.
        """
        with _options():
            facts = runs.read_run(folder)
            planned = facts["options"]["steps"]
            more = steps is not None and steps > planned and facts["options"]["decay"] == "constant"
            if steps is not None and steps != planned and not more:
                raise ValueError(
                    f"resume: --steps must be {planned}, as before, unless the run has --decay "
                    f"constant and gets more of them (for another run: hos-ext train --config "
                    f"{folder / 'run.json'} --steps {steps} --out NEW), got {steps}"
                )
            if runs.finished(folder) and not more:
                return _nothing_to_do(folder)
            given = facts["options"] | ({"steps": steps} if more else {})
            job = runs.prepare(given, folder, resume=True)
        _train(job)

    @app.command()
    def denoise(
        folder: RunFolder,
        files: Annotated[
            list[Path] | None,
            typer.Argument(
                help="Noisy images (.png, .jpg, .tiff) or arrays (.npy, .npz), in the units of the "
                "data set. Without: held-out samples, with noise added."
            ),
        ] = None,
        sigma: Level = None,
        raw_sigma: Annotated[
            float | None,
            typer.Option(
                help="Noise level in the units of the data set (8-bit pixels: 0 to 255) instead.",
                rich_help_panel=NOISE,
            ),
        ] = None,
        count: Annotated[
            int, typer.Option(min=1, help="Held-out samples, without FILES.", rich_help_panel=NOISE)
        ] = 4,
        seed: Seed = 0,
        device: Device = "auto",
        out: Out = None,
        force: Force = False,
    ) -> None:
        """Denoise images or arrays: mean, standard deviation, principal components, report.

        Examples:

          hos-ext denoise runs/mnist --sigma 0.5

          hos-ext denoise runs/mnist scan1.png scan2.png --raw-sigma 40 --out denoised

        Writes denoise.npz, denoise.png, denoise.md and, for images, denoise-mean.tiff,
        denoise-std.tiff and denoise-components.tiff.
        """
        with _options():
            model, facts = runs.load_run(folder, device=device)
            scaling, shape = runs.scaling_of(facts), tuple(facts["data"]["shape"])
            if files and sigma is None and raw_sigma is None:
                raise ValueError(
                    "denoise: --sigma or --raw-sigma must be given for files, got none"
                )
            level = _level("denoise", facts, sigma, raw_sigma, scaling.scale)
            place = out or folder
            results.refuse_existing("denoise", place, results.denoise_files(shape), force=force)
            samples = results.read_files(files, shape, scaling) if files else None
            source = None if files else runs.open_data(facts)
            if source is not None and count > len(source.test):
                raise ValueError(
                    f"denoise: --count must be at most {len(source.test)}, the held-out samples, "
                    f"got {count}"
                )
            storage.check_writable(place)
        factor = facts["recalibration"]
        if source is None:
            assert samples is not None
            names = samples.names
            result = evaluation.denoise(model, samples.x, level, recalibration=factor)
        else:
            names = [f"held-out {i}" for i in range(count)]
            result = evaluation.denoise_held_out(
                model, source, level, count=count, seed=seed, recalibration=factor
            )
        made = results.denoised(result, names, scaling, factor)
        _write(place, made)
        what = f"sigma {level:g}: {len(names)} samples"
        if result.clean is not None:
            errors = evaluation.denoising_errors(result)
            what = (
                f"sigma {level:g}: mean squared error {errors['mse_noisy']:.4g} -> "
                f"{errors['mse_denoised']:.4g}"
            )
        _console().print(f"{what}; wrote {', '.join(made)} to {place}")

    @app.command()
    def sample(
        folder: RunFolder,
        method: Annotated[
            str, typer.Option(help=", ".join(results.METHODS) + ".", rich_help_panel=CHAINS)
        ] = "ozaki",
        sigma: Level = None,
        step_size: Annotated[
            float | None,
            typer.Option(
                help="h, in squared data units. Default: sigma^2, or 0.1 sigma^2 for langevin and "
                "adjusted methods.",
                rich_help_panel=CHAINS,
            ),
        ] = None,
        chains: Annotated[int, typer.Option(min=1, help="Chains.", rich_help_panel=CHAINS)] = 16,
        steps: Annotated[
            int, typer.Option(min=4, help="Steps after burn-in.", rich_help_panel=CHAINS)
        ] = 1000,
        burn_in: Annotated[
            int, typer.Option(min=0, help="Steps thrown away.", rich_help_panel=CHAINS)
        ] = 200,
        thin: Annotated[
            int, typer.Option(min=1, help="Keep every so many steps.", rich_help_panel=CHAINS)
        ] = 1,
        netcdf: Annotated[
            bool,
            typer.Option("--netcdf", help="Also ArviZ data, .nc.", rich_help_panel=FOLDER),
        ] = False,
        seed: Seed = 0,
        device: Device = "auto",
        out: Out = None,
        force: Force = False,
    ) -> None:
        """Draw chains of noisy data, from held-out samples; also on several processes.

        Examples:

          hos-ext sample runs/mnist --sigma 0.4 --method ozaki

          torchrun --nproc-per-node 2 -m hos_ext.cli sample runs/mnist --chains 64 --netcdf

        Writes sample-METHOD.npz (starts, draws, the last draws denoised), .png and .nc. The noise
        of a chain does not depend on the number of processes.
        """
        with _options():
            one_of("sample", "--method", method, results.METHODS)
            if step_size is not None:
                check_number("sample", "--step-size", step_size)
            if steps < 4 * thin:
                raise ValueError(
                    f"sample: --steps must be at least 4 --thin, for 4 draws, got {steps} steps "
                    f"and --thin {thin}"
                )
            model, facts = runs.load_run(folder, device=device)
            level = _level("sample", facts, sigma, None, 1.0)
            place, main = out or folder, training.is_main()
            for module in ("h5netcdf", "h5py") if netcdf else ():
                require("sample --netcdf", module)
            if main:
                names = results.sample_files(method, netcdf=netcdf)
                results.refuse_existing("sample", place, names, force=force)
                storage.check_writable(place)
            source = runs.open_data(facts)
            if chains > len(source.test):
                raise ValueError(
                    f"sample: --chains must be at most {len(source.test)}, the held-out samples, "
                    f"got {chains}"
                )
        starts = evaluation.denoise_held_out(model, source, level, count=chains, seed=seed).noisy
        size = results.METHODS[method] * level**2 if step_size is None else step_size
        with results.ranks():
            found, ess = results.run_chains(
                model,
                starts,
                level,
                method=method,
                step_size=size,
                n_steps=steps,
                burn_in=burn_in,
                thin=thin,
                seed=seed,
            )
        if not main:
            return
        made = results.sampled(
            model,
            found,
            starts,
            level,
            method=method,
            step_size=size,
            scaling=source.scaling,
            netcdf=netcdf,
        )
        _write(place, made)
        each = 1e6 * found.stats["seconds"] / (burn_in + steps)
        _console().print(
            f"{method}, step size {size:g}: smallest effective sample size {ess:.1f} of "
            f"{found.draws.shape[0]} x {found.draws.shape[1]} draws, {each:.0f} us a step; "
            f"wrote {', '.join(made)} to {place}"
        )

    @app.command()
    def evaluate(
        folder: RunFolder,
        sigma: Annotated[
            str | None,
            typer.Option(
                help="Levels such as 0.2,0.4,0.8, data units. Default: three of those trained.",
                rich_help_panel=NOISE,
            ),
        ] = None,
        limit: Annotated[
            int | None, typer.Option(min=1, help="Held-out samples. Default: all.")
        ] = None,
        seed: Seed = 0,
        device: Device = "auto",
        out: Out = None,
        force: Force = False,
    ) -> None:
        """Check on held-out samples whether the uncertainty is calibrated; print and write it.

        Examples:

          hos-ext evaluate runs/mnist

          hos-ext evaluate runs/mnist --sigma 0.3 --limit 200

        A figure of 1 is calibrated; above, errors are larger than the covariance says. Writes
        evaluate.json, calibration.png and uncertainty.png (the covariance at each level, its
        eigenvectors); for density: data also the errors of both scores against the exact ones.
        """
        with _options():
            model, facts = runs.load_run(folder, device=device)
            low, high = facts["options"]["sigma"]
            wanted = [float(f"{low * (high / low) ** t:.3g}") for t in (0.25, 0.5, 0.75)]
            wanted = [min(max(level, low), high) for level in wanted]  # rounding may leave them
            if sigma is not None:
                try:
                    wanted = [float(word) for word in sigma.split(",")]
                except ValueError:
                    raise ValueError(
                        f"evaluate: --sigma must be numbers with commas, got {sigma}"
                    ) from None
            wanted = [
                _level("evaluate", facts, level, None, 1.0) for level in dict.fromkeys(wanted)
            ]
            place = out or folder
            results.refuse_existing("evaluate", place, results.EVALUATE_FILES, force=force)
            storage.check_writable(place)
            source = runs.open_data(facts)
        factor = facts["recalibration"]
        report = evaluation.evaluate(
            model, source, wanted, recalibration=factor, seed=seed, limit=limit
        )
        pictures = results.evaluated(model, source, wanted, report, seed=seed)
        _write(place, {"evaluate.json": runs.json_text(report).encode(), **pictures})
        console = _console()
        console.print(_evaluation_table(report))
        for row in report["accuracy"] or []:
            console.print(
                f"sigma {row['sigma']:g}: relative squared error of s1 {row['s1_relative']:.3g}, "
                f"of the diagonal of s2 {row['s2_diag_relative']:.3g}"
            )
        console.print(f"wrote {', '.join(results.EVALUATE_FILES)} to {place}")

    @app.command()
    def info(
        folder: RunFolder,
        as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    ) -> None:
        """Say what a run is: data, model, options, checkpoints (whole or damaged), figures.

        Example:

          hos-ext info runs/mnist

        A run that was killed is told from one that is finished, a damaged checkpoint from a whole.
        """
        with _options():
            content = runs.info(folder)
        if as_json:
            print(runs.json_text(content), end="")
        else:
            print("\n".join(_lines(content)))

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("demo"),
        seed: Seed = 0,
        steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = OPTIONS[
            "steps"
        ].default,
        quick: Annotated[
            bool, typer.Option("--quick", help="A few steps only, to see that it runs.")
        ] = False,
        force: Force = False,
    ) -> None:
        """Train on real digits, denoise with uncertainty, check it, sample; write a report.

        Examples:

          hos-ext demo

          hos-ext demo --quick --out demo-quick

        Writes report.html, its figures and metrics.json, and the run itself to OUT/run.
        """
        with _options():
            job = demonstration.prepare(out, seed=seed, steps=steps, quick=quick, force=force)
        demonstration.run_demo(job, out, program=_program(), quick=quick)

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


def _default_out(given: Mapping[str, Any]) -> str:
    """runs/ and a name after the data: runs/mnist for parquet:.../mnist/train.parquet."""
    path = Path(str(given.get("data", OPTIONS["data"].default)).partition(":")[2] or "digits")
    stem = path.stem if path.stem not in ("train", "data") else path.absolute().parent.name
    return "runs/" + "".join(c if c.isalnum() or c in "-_" else "-" for c in stem)


def _nothing_to_do(folder: Path) -> None:
    steps = runs.read_run(folder)["options"]["steps"]
    _console().print(f"{folder} is finished: {steps} steps. Nothing to do.")


def _train(job: runs.Run) -> None:
    console, known = _console(), job.facts["data"]
    if training.is_main():
        console.print(
            f"{known['spec']}: {known['n_train'] or 'a stream of'} samples of shape "
            f"{tuple(known['shape'])} to train on, {known['n_validation']} to tune on, "
            f"{known['n_test']} to report on\n{job.options['model']}, rank {job.options['rank']}, "
            f"{job.facts['parameters']:,} parameters; {job.options['steps']} steps; to {job.out}"
        )
    figures = runs.fit(job, progress=True)
    if not figures:
        return
    console.print(
        f"{figures['steps']} steps in {figures['seconds']:.0f} s, validation error "
        f"{figures['validation_error']:.3f} sigma^2, recalibration factor "
        f"{figures['recalibration']:.3f}"
    )
    console.print(f"next: {_program()} denoise {job.out}")


def _level(
    command: str, facts: Mapping[str, Any], sigma: float | None, raw: float | None, scale: float
) -> float:
    """The noise level in data units, within the range trained."""
    if raw is not None:
        if sigma is not None:
            raise ValueError(f"{command}: --raw-sigma must come without --sigma, got both")
        sigma = raw / scale
    low, high = facts["options"]["sigma"]
    level = min(max(0.4, low), high) if sigma is None else sigma
    for end in (low, high):
        if math.isclose(level, end):
            return float(end)
    if not low <= level <= high:
        name, unit = ("--sigma", 1.0) if raw is None else ("--raw-sigma", scale)
        raise ValueError(
            f"{command}: {name} must be in the range trained, {unit * low:g} to {unit * high:g}, "
            f"got {unit * level:g}"
        )
    return level


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        storage.write_whole(folder / name, content)


def _evaluation_table(report: Mapping[str, Any]) -> Any:
    table = require("cli", "rich.table").Table(title=f"{report['n']} held-out samples")
    columns = {
        "sigma": "sigma",
        "error noisy": "mse_noisy",
        "denoised": "mse_denoised",
        "Mahalanobis": "mahalanobis",
        "predictive": "predictive",
        "recalibrated": "predictive_recalibrated",
    }
    for name in columns:
        table.add_column(name, justify="right")
    for row in report["levels"]:
        shown = (row[key] for key in columns.values())
        table.add_row(*("-" if value is None else f"{value:.4g}" for value in shown))
    return table


def _lines(value: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Nested facts as indented lines."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield f"{indent}{key}:"
            yield from _lines(item, indent + "  ")
        elif item is not None:
            text = ", ".join(map(str, item)) if isinstance(item, list) else item
            yield f"{indent}{key}: {text}"


if __name__ == "__main__":
    main()
