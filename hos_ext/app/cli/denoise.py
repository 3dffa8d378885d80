"""`hos-ext denoise`."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ... import storage
from ...checks import check, one_of
from ...conditions import condition_rows
from ...scores import Model
from ...uncertainty.conformal import KINDS, Conformal, least_rows
from .. import evaluation, results, runs
from ..data import Pictures, Source
from ..options import OPTIONS
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
    available,
    console,
    noise_level,
    place_of,
)
from .conditions import Condition, chosen_class, class_name, given_labels, of_class
from .errors import checking

PICTURES, INTERVALS = "Pictures", "Intervals"  # panels of --help
_COUNT = 4  # held-out samples by default


def _option(name: str) -> Any:
    """An option of pictures that a run has too."""
    about = f"{OPTIONS[name].help} Default: as the run."
    return typer.Option(help=about, rich_help_panel=PICTURES)


def denoise(
    folder: RunFolder,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Noisy images (.png, .jpg, .tiff, ...) or arrays (.npy, .npz), in the units of "
            "the data set. U-Nets take any height and width. Without: held-out samples, with "
            "noise added."
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
        int | None,
        typer.Option(
            min=1,
            help="Held-out samples, without FILES. Default: 4, or all that there are.",
            rich_help_panel=NOISE,
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Pixels that neighbouring tiles of a larger picture share. Default: a quarter of "
            "a tile.",
            rich_help_panel=PICTURES,
        ),
    ] = None,
    alpha: Annotated[str | None, _option("alpha")] = None,
    convert: Annotated[str | None, _option("convert")] = None,
    bits: Annotated[int | None, _option("bits")] = None,
    pages: Annotated[str | None, _option("pages")] = None,
    stretch: Annotated[
        bool,
        typer.Option(
            "--stretch",
            help="Stretch the contrast of .png files from black to white.",
            rich_help_panel=PICTURES,
        ),
    ] = False,
    interval: Annotated[
        float | None,
        typer.Option(
            help="Probability of intervals (low, high in denoise.npz) that are guaranteed for "
            "samples like the validation rows, such as 0.9. Default: none.",
            rich_help_panel=INTERVALS,
        ),
    ] = None,
    interval_of: Annotated[
        str,
        typer.Option(
            help="What they hold so often: entry, each entry by itself; share, at least 90 % of "
            "the entries of a sample; simultaneous, all of them at once.",
            rich_help_panel=INTERVALS,
        ),
    ] = "simultaneous",
    condition: Condition = None,
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

      hos-ext denoise runs/photos holiday.jpg --raw-sigma 25 --out denoised

    Writes denoise.npz, denoise.png, denoise.md and, for images, denoise-mean.tiff,
    denoise-std.tiff, denoise-components.tiff and denoise-NAME-mean.png, denoise-NAME-std.png.
    Pictures larger than those of the data set are denoised in tiles, without components.
    """
    given = {"--data": data, "--test-data": test_data, "--count": count}
    if interval is not None:
        given.pop("--data")  # whose validation rows make the intervals
    asked = {"alpha": alpha, "convert": convert, "bits": bits, "pages": pages}
    with checking():
        model, facts = runs.load_run(folder, device=device)
        scaling = runs.scaling_of(facts)
        own = raw_sigma is not None and scaling.by_column
        rule = "--raw-sigma must be left out for columns of different scales (--sigma)"
        check("denoise", not own, rule, raw_sigma)
        scale = 1.0 if isinstance(scaling.scale, tuple) else scaling.scale
        level = noise_level("denoise", facts, sigma, raw_sigma=raw_sigma, scale=scale)
        if files:
            known = sigma is not None or raw_sigma is not None
            check("denoise", known, "--sigma or --raw-sigma must be given for files", "none")
            _refuse_beside("FILES", given)
            noisy = _read(files, facts, level, units, asked)
            names = noisy.names if isinstance(noisy, results.Samples) else [n for _, n in noisy]
            told = given_labels("denoise", facts, condition, len(names), "files")
        else:
            _refuse_beside(
                "held-out samples",
                {f"--{k}": v for k, v in asked.items()} | {"--stretch": stretch or None},
            )
            chosen_class("denoise", facts, condition)
            source = runs.open_data(facts, data, test_data)
            source = of_class("denoise", source, facts, condition)
            amount = available("denoise", "--count", count, _COUNT, len(source.test))
            names = [f"held-out {i}{class_name(source, i)}" for i in range(amount)]
        tiled = bool(files) and isinstance(noisy, list)
        _check_interval(interval, interval_of, tiled=tiled)
        if not tiled:
            _refuse_beside("samples of the size of the data set", {"--overlap": overlap})
        elif overlap is not None:
            least = min(facts["data"]["shape"][1:])
            rule = f"--overlap must be less than the size of a tile, {least}"
            check("denoise", overlap < least, rule, overlap)
        place = place_of("denoise", folder, out)
        written = _written(facts, names if files else [], tiled=tiled, stretch=stretch)
        results.refuse_existing("denoise", place, written, force=force)
        storage.check_writable(place, make=not dry_run)
    if dry_run:
        console().print(
            f"dry run: would denoise {len(names)} samples of shape {tuple(facts['data']['shape'])}"
            f"{' in tiles' if tiled else ''} at sigma {level:g} and write {', '.join(written)} to "
            f"{place}"
        )
        return
    factor, region = facts["recalibration"], None
    if interval is not None:
        with checking():
            if files:
                source = of_class("denoise", runs.open_data(facts, data), facts, condition)
            region = _region(model, source, level, interval, interval_of, seed, factor)
    if files and isinstance(noisy, list):
        tile = facts["data"]["shape"][1:]
        found = [
            evaluation.denoise_tiled(
                model,
                x,
                level,
                tile,
                overlap=overlap,
                recalibration=factor,
                model_kwargs=condition_rows(told, slice(i, i + 1)),
            )
            for i, (x, _) in enumerate(noisy)
        ]
        made = results.denoised_pictures(found, names, scaling, factor, tile, stretch=stretch)
        what = f"{len(names)} pictures in {sum(each.tiles for each in found)} tiles"
    else:
        if files and isinstance(noisy, results.Samples):
            result = evaluation.denoise(
                model, noisy.x, level, recalibration=factor, model_kwargs=told
            )
        else:
            result = evaluation.denoise_held_out(
                model, source, level, count=amount, seed=seed, recalibration=factor
            )
        shown = stretch if files else None
        made = results.denoised(result, names, scaling, factor, stretch=shown, region=region)
        what = _said(result, len(names))
    results.write(place, made)
    for name in set(written) - made.keys():  # of an earlier call, --force
        (place / name).unlink(missing_ok=True)
    console().print(f"sigma {level:g}: {what}; wrote {_listed(made)} to {place}")


def _check_interval(interval: float | None, kind: str, *, tiled: bool) -> None:
    """Refuses intervals that cannot be had."""
    one_of("denoise", "--interval-of", kind, KINDS[:-1])
    if interval is None:
        return
    check("denoise", 0 < interval < 1, "--interval must be in (0, 1)", interval)
    rule = "--interval must be left out for pictures of other sizes than the data set's"
    check("denoise", not tiled, rule, interval)


def _region(
    model: Model,
    source: Source,
    sigma: float,
    level: float,
    kind: str,
    seed: int,
    factor: float,
) -> Conformal:
    """The region whose intervals are guaranteed."""
    many, least = len(source.validation), least_rows(level)
    rule = f"--interval {level:g} must have at least {least} validation rows"
    check("denoise", many >= least, rule, many)
    return evaluation.region_of(
        model, source, sigma, level=level, kind=kind, seed=seed, recalibration=factor
    )


def _refuse_beside(what: str, options: Mapping[str, Any]) -> None:
    """Refuses options that mean nothing here."""
    typed = ", ".join(name for name, value in options.items() if value is not None)
    rule = f"{what} must come without {typed}"
    check("denoise", not typed, rule, lambda: f"both {what} and {typed}")


def _read(
    files: list[Path],
    facts: Mapping[str, Any],
    level: float,
    units: str,
    asked: Mapping[str, Any],
) -> results.Samples | list[results.Noisy]:
    """Samples of the size of the data set; or, for a U-Net, pictures of any size."""
    one_of("denoise", "--units", units, results.UNITS)
    scaling, shape = runs.scaling_of(facts), tuple(facts["data"]["shape"])
    names = ("alpha", "convert", "bits", "pages")
    chosen = {name: facts["options"].get(name) for name in names}
    pictures = Pictures.of(chosen | {k: v for k, v in asked.items() if v is not None})
    options: dict[str, Any] = {"sigma": level, "std": facts["data"]["std"], "units": units}
    options |= {"pictures": pictures}
    convolves = facts["options"].get("model") in ("unet", "unet-small") and len(shape) == 3
    if not convolves or results.sizes_fit(files, shape, pictures):
        columns = facts["data"].get("columns", ())
        return results.read_files(files, shape, scaling, columns=columns, **options)
    found = results.read_pictures(files, shape[0], scaling, **options)
    if facts["options"].get("crop") is None:
        warnings.warn(
            f"denoise: pictures are denoised in tiles of {shape[1]}x{shape[2]}, but the model was "
            "trained on whole pictures of that size: a tile may look like none of them (train "
            "with --size and --crop random or centre)",
            stacklevel=2,
        )
    return found


def _written(
    facts: Mapping[str, Any], names: list[str], *, tiled: bool, stretch: bool
) -> list[str]:
    """The names of all files."""
    shape, levels = tuple(facts["data"]["shape"]), runs.scaling_of(facts).levels
    if tiled:
        return results.picture_files(names, shape[0], levels, stretch=stretch)
    return results.denoise_files(shape, names, levels, stretch=stretch)


def _said(result: evaluation.Denoised, count: int) -> str:
    """What came out, in words."""
    if result.x0 is None:
        return f"{count} samples"
    errors = evaluation.denoising_errors(result)
    return f"mean squared error {errors['mse_noisy']:.4g} -> {errors['mse_denoised']:.4g}"


def _listed(made: Mapping[str, bytes]) -> str:
    """The files, many pictures as one word."""
    plain = [name for name in made if not name.endswith(("-mean.png", "-std.png"))]
    more = len(made) - len(plain)
    return ", ".join(plain) + (f" and {more} pictures denoise-NAME-*.png" if more else "")
