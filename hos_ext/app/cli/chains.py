"""`hos-ext chains`."""

import math
from typing import Annotated

import typer

from ... import storage
from ...checks import check, check_number, one_of, require
from .. import evaluation, results, runs, training
from ..options import FOLDER
from .common import (
    AllowDivergence,
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
from .conditions import Condition, chosen_class, of_class
from .errors import checking, judge
from .output import talks

CHAINS = "Chains"  # a panel of --help
REFERENCE = 2000  # held-out samples that chains are compared with, at most


def chains(
    folder: RunFolder,
    method: Annotated[
        str, typer.Option(help=", ".join(results.methods()) + ".", rich_help_panel=CHAINS)
    ] = "ozaki",
    sigma: Sigma = None,
    step_size: Annotated[
        float | None,
        typer.Option(
            help="h, in squared data units. Default: sigma^2, or 0.1 sigma^2 for langevin and "
            "adjusted methods.",
            rich_help_panel=CHAINS,
        ),
    ] = None,
    chains: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Chains. Default: 16, or as many as there are held-out samples.",
            rich_help_panel=CHAINS,
        ),
    ] = None,
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
        bool, typer.Option("--netcdf", help="Also ArviZ data, .nc.", rich_help_panel=FOLDER)
    ] = False,
    condition: Condition = None,
    allow_divergence: AllowDivergence = False,
    seed: Seed = 0,
    device: Device = "auto",
    data: Data = None,
    test_data: TestData = None,
    out: Out = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Draw chains of noisy data, from held-out samples; also on several processes.

    Examples:

      hos-ext chains runs/mnist --sigma 0.4 --method ozaki

      torchrun --nproc-per-node 2 -m hos_ext.app.cli chains runs/mnist --chains 64 --netcdf

    Writes chains-METHOD.npz (starts, draws, the last draws denoised), .png and .nc. The noise
    of a chain does not depend on the number of processes.

    Chains start in the law that they should keep. Chains that leave it write nothing, and the
    exit code is 5. For new samples from noise, see hos-ext generate.
    """
    main = training.is_main()
    with checking():
        _check_chains(method, step_size, steps, thin)
        model, facts = runs.load_run(folder, device=device)
        place = place_of("chains", folder, out)
        level = noise_level("chains", facts, sigma)
        for module in ("h5netcdf", "h5py") if netcdf else ():
            require("chains --netcdf", module)
        if main:
            names = results.chains_files(method, netcdf=netcdf)
            results.refuse_existing("chains", place, names, force=force)
            storage.check_writable(place, make=not dry_run)
        chosen_class("chains", facts, condition)
        source = of_class("chains", runs.open_data(facts, data, test_data), facts, condition)
        chains = available("chains", "--chains", chains, 16, len(source.test))
    size = results.methods()[method] * level**2 if step_size is None else step_size
    if dry_run:
        if main:
            console().print(
                f"dry run: would draw {chains} chains of {burn_in} + {steps} steps of {method}, "
                f"step size {size:g}, at sigma {level:g} and write {', '.join(names)} to {place}"
            )
        return
    starts = evaluation.denoise_held_out(model, source, level, count=chains, seed=seed).x
    told = {}
    if source.labels is not None:
        told = {"label": source.labels.test[:chains].to(starts.device)}
    dynamics = results.Dynamics(level, method, size, told)
    with results.ranks():
        found, ess = results.run_chains_over_ranks(
            model,
            starts,
            dynamics,
            n_steps=steps,
            burn_in=burn_in,
            thin=thin,
            seed=seed,
            progress=talks(),
        )
    if not main:
        return
    reference = evaluation.noisy_held_out(source, level, count=REFERENCE, seed=seed)
    alarm = evaluation.chains_alarm(found, starts, reference)
    judge("chains", alarm, allowed=allow_divergence)
    made = results.drawn(
        model,
        found,
        starts,
        dynamics,
        reference,
        n_steps=steps,
        scaling=source.scaling,
        netcdf=netcdf,
    )
    results.write(place, made)
    law = evaluation.law_of(found.draws, reference)
    each = 1e6 * found.stats["seconds"] / (burn_in + steps)
    console().print(
        f"{method}, step size {size:g}: smallest effective sample size {ess:.1f} of "
        f"{found.draws.shape[0]} x {found.draws.shape[1]} draws, {each:.0f} us a step. "
        f"Against {len(reference)} noisy held-out samples: spread {law['spread']:.3g}, energy "
        f"distance {law['energy_distance']:.2g} (1 and 0 are right); R-hat of |x| "
        f"{found.stats.get('r_hat', math.nan):.3g}; wrote {', '.join(made)} to {place}"
    )


def _check_chains(method: str, step_size: float | None, steps: int, thin: int) -> None:
    """Refuses what needs no run to be wrong."""
    one_of("chains", "--method", method, results.methods())
    if step_size is not None:
        check_number("chains", "--step-size", step_size)
    rule, got = "--steps must be at least 4 --thin, for 4 draws", f"{steps} steps and --thin {thin}"
    check("chains", steps >= 4 * thin, rule, got)
