"""`hos-ext denoise`."""

from pathlib import Path
from typing import Annotated

import typer

from ... import storage
from ...checks import check, one_of
from .. import evaluation, results, runs
from .common import (
    NOISE,
    Data,
    Device,
    DryRun,
    Force,
    Out,
    RunFolder,
    Seed,
    Sigma,
    TestData,
    check_available,
    console,
    noise_level,
    place_of,
)
from .errors import checking


def denoise(
    folder: RunFolder,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Noisy images (.png, .jpg, .tiff) or arrays (.npy, .npz), in the units of the "
            "data set. Without: held-out samples, with noise added."
        ),
    ] = None,
    sigma: Sigma = None,
    raw_sigma: Annotated[
        float | None,
        typer.Option(
            help="Noise level in the units of the data set (8-bit pixels: 0 to 255) instead.",
            rich_help_panel=NOISE,
        ),
    ] = None,
    units: Annotated[
        str,
        typer.Option(
            help="Of the numbers in FILES: raw, as in the data set; unit, [0, 1]; signed, "
            "[-1, 1]; data, as in denoise.npz. auto takes them for raw, and refuses them if that "
            "is not sure.",
            rich_help_panel=NOISE,
        ),
    ] = "auto",
    count: Annotated[
        int, typer.Option(min=1, help="Held-out samples, without FILES.", rich_help_panel=NOISE)
    ] = 4,
    seed: Seed = 0,
    device: Device = "auto",
    data: Data = None,
    test_data: TestData = None,
    out: Out = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Denoise images or arrays: mean, standard deviation, principal components, report.

    Examples:

      hos-ext denoise runs/mnist --sigma 0.5

      hos-ext denoise runs/mnist scan1.png scan2.png --raw-sigma 40 --out denoised

    Writes denoise.npz, denoise.png, denoise.md and, for images, denoise-mean.tiff,
    denoise-std.tiff and denoise-components.tiff.
    """
    with checking():
        model, facts = runs.load_run(folder, device=device)
        scaling, shape = runs.scaling_of(facts), tuple(facts["data"]["shape"])
        known = not files or sigma is not None or raw_sigma is not None
        check("denoise", known, "--sigma or --raw-sigma must be given for files", "none")
        level = noise_level("denoise", facts, sigma, raw_sigma=raw_sigma, scale=scaling.scale)
        place = place_of("denoise", folder, out)
        results.refuse_existing("denoise", place, results.denoise_files(shape), force=force)
        if files:
            one_of("denoise", "--units", units, results.UNITS)
            samples, names = results.read_files(
                files, shape, scaling, sigma=level, std=facts["data"]["std"], units=units
            )
        else:
            names = [f"held-out {i}" for i in range(count)]
            source = runs.open_data(facts, data, test_data)
            check_available("denoise", "--count", count, len(source.test))
        storage.check_writable(place, make=not dry_run)
    if dry_run:
        console().print(
            f"dry run: would denoise {len(names)} samples of shape {shape} at sigma {level:g} and "
            f"write {', '.join(results.denoise_files(shape))} to {place}"
        )
        return
    recalibration = facts["recalibration"]
    if files:
        result = evaluation.denoise(model, samples, level, recalibration=recalibration)
    else:
        result = evaluation.denoise_held_out(
            model, source, level, count=count, seed=seed, recalibration=recalibration
        )
    made = results.denoised(result, names, scaling, recalibration)
    results.write(place, made)
    for name in set(results.denoise_files(shape)) - made.keys():  # of an earlier call, --force
        (place / name).unlink(missing_ok=True)
    what = f"sigma {level:g}: {len(names)} samples"
    if result.x0 is not None:
        errors = evaluation.denoising_errors(result)
        what = (
            f"sigma {level:g}: mean squared error {errors['mse_noisy']:.4g} -> "
            f"{errors['mse_denoised']:.4g}"
        )
    console().print(f"{what}; wrote {', '.join(made)} to {place}")
