"""`hos-ext generate`."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from torch import Tensor

from ... import storage
from ...checks import check, one_of
from ...diffusion import GENERATE_METHODS
from ...schedules import VE
from .. import evaluation, results, runs, training
from .common import (
    AllowDivergence,
    Data,
    Device,
    DryRun,
    Force,
    Out,
    RunFolder,
    Seed,
    TestData,
    console,
    place_of,
)
from .conditions import Condition, given_labels, of_class
from .errors import checking, judge

GENERATION = "Generation"  # a panel of --help
REFERENCE = 2000  # held-out samples that the new ones are compared with, at most


def generate(
    folder: RunFolder,
    count: Annotated[int, typer.Option(min=1, help="Samples.", rich_help_panel=GENERATION)] = 64,
    method: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(GENERATE_METHODS)}: the probability-flow ODE by order 2 or 1, the "
            "reverse SDE, or ancestral steps with the learned covariance.",
            rich_help_panel=GENERATION,
        ),
    ] = "heun",
    steps: Annotated[
        int,
        typer.Option(
            min=1, help="Steps down the noise levels trained.", rich_help_panel=GENERATION
        ),
    ] = 50,
    settle: Annotated[
        int,
        typer.Option(
            min=0,
            help="Steps of a chain at the highest level before that: noise alone is not its law.",
            rich_help_panel=GENERATION,
        ),
    ] = 100,
    last: Annotated[
        str,
        typer.Option(
            help="What takes off the last noise: mean, the denoised mean; sample, a draw from the "
            "posterior; none.",
            rich_help_panel=GENERATION,
        ),
    ] = "mean",
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
    """Draw new samples from noise, by a reverse process; also on several processes.

    Examples:

      hos-ext generate runs/mnist --count 64

      hos-ext generate runs/mnist --method second-order --steps 20 --last sample

    Starts at the highest noise level that was trained, and ends at the lowest. Writes generate.npz
    (samples in data and in raw units) and generate.png. Says how far their law is from held-out
    samples, where the data are at hand. Samples that ran away write nothing; the exit code is 5.
    """
    main = training.is_main()
    with checking():
        one_of("generate", "--method", method, GENERATE_METHODS)
        one_of("generate", "--last", last, ("mean", "sample", "none"))
        model, facts = runs.load_run(folder, device=device)
        place = place_of("generate", folder, out)
        low, high = facts["options"]["sigma"]
        rule = "RUN must be trained over a range of noise levels, --sigma LOW,HIGH"
        check("generate", low < high, rule, f"one level, {low:g}")
        labels = given_labels("generate", facts, condition, count, "new samples")
        if main:
            results.refuse_existing("generate", place, results.GENERATE_FILES, force=force)
            storage.check_writable(place, make=not dry_run)
        truth, known = _held_out(facts, labels, condition, seed, data, test_data)
    if dry_run:
        if main:
            console().print(
                f"dry run: would draw {count} samples by {steps} steps of {method} from sigma "
                f"{high:g} to {low:g} and write {', '.join(results.GENERATE_FILES)} to {place}"
            )
        return
    schedule = VE(low, high)
    with results.ranks("generate", "samples"):
        samples = results.generate_over_ranks(
            model,
            count,
            facts,
            schedule=schedule,
            method=method,
            n_steps=steps,
            settle=settle,
            last=last,
            conditions=labels,
            seed=seed,
        )
    if not main:
        return
    alarm = results.generated_alarm(samples, facts["data"]["std"], truth)
    judge("generate", alarm, allowed=allow_divergence)
    made = results.generated(
        samples,
        truth,
        scaling=runs.scaling_of(facts),
        levels=schedule.sigma(schedule.times(steps)),
        conditions=labels,
    )
    results.write(place, made)
    law = results.generated_law(samples, truth)
    if truth is not None:
        known = (
            f"against {len(truth)} held-out samples: spread {law['spread']:.3g}, energy distance "
            f"{law['energy_distance']:.2g} (1 and 0 are right)"
        )
    console().print(
        f"{count} samples by {steps} steps of {method} from sigma {high:g} to {low:g}; {known}; "
        f"wrote {', '.join(made)} to {place}"
    )


def _held_out(
    facts: Mapping[str, Any],
    labels: Mapping[str, Tensor],
    condition: str | None,
    seed: int,
    data: str | None,
    test_data: str | None,
) -> tuple[Tensor | None, str]:
    """Held-out samples to judge the new ones by; or None, and why there are none.

    Raises:
        ValueError, OSError, RuntimeError: data that the user names cannot be used.
    """
    if labels and len(labels["label"].unique()) > 1:
        return None, "of several classes, so that the error of the law is not measured"
    try:
        source = runs.open_data(facts, data, test_data)
        if labels:
            source = of_class("generate", source, facts, condition)
    except (ValueError, OSError, RuntimeError) as error:
        if data is not None or test_data is not None:
            raise
        return None, f"the error of the law is not known, as the data are not at hand ({error})"
    return evaluation.clean_held_out(source, count=REFERENCE, seed=seed), ""
