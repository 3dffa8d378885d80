"""`hos-ext push`."""

from typing import Annotated, Any

import typer

from ...checks import check, require
from .. import evaluation, results, runs
from .common import (
    Data,
    Device,
    DryRun,
    RunFolder,
    Seed,
    TestData,
    console,
    default_levels,
)
from .errors import checking

HUB = "Hub"  # a panel of --help


def push(
    folder: RunFolder,
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where on the hub.")],
    private: Annotated[
        bool,
        typer.Option("--private", help="If it is new, for you alone.", rich_help_panel=HUB),
    ] = False,
    branch: Annotated[str | None, typer.Option(help="Default: main.", rich_help_panel=HUB)] = None,
    create_pr: Annotated[
        bool,
        typer.Option("--create-pr", help="As a pull request.", rich_help_panel=HUB),
    ] = False,
    message: Annotated[
        str, typer.Option(help="Of the commit.", rich_help_panel=HUB)
    ] = "Push a model of hos_ext",
    limit: Annotated[
        int, typer.Option(min=1, help="Held-out samples of the calibration, at most.")
    ] = 500,
    seed: Seed = 0,
    device: Device = "auto",
    data: Data = None,
    test_data: TestData = None,
    dry_run: DryRun = False,
) -> None:
    """Put the model of a run on the Hugging Face hub, with a card that says how good it is.

    Examples:

      hf auth login

      hos-ext push runs/mnist me/mnist-second-order --private

    Writes config.json, model.safetensors, README.md (data, objective, calibration on held-out
    samples), calibration.png and uncertainty.png. Paths of this machine are left out. hos-ext
    denoise me/mnist-second-order and hos_ext.load_model read it again.
    """
    with checking():
        check("push", name.count("/") == 1, "USER/NAME must be a name on the hub", repr(name))
        model, facts = runs.load_run(folder, device=device)
        require("push", "huggingface_hub")
        source = runs.open_data(facts, data, test_data)
    levels = default_levels(facts)
    report = evaluation.evaluate(
        model, source, levels, recalibration=facts["recalibration"], seed=seed, limit=limit
    )
    pictures = results.evaluated(model, source, levels, report, seed=seed)
    told = results.without_paths(facts)
    card = results.card_sections(told, report, list(pictures))
    if dry_run:
        files = ", ".join(["config.json", "model.safetensors", "README.md", *pictures])
        console().print(
            f"dry run: would write {files} to {name} on the hub. Of the card:\n\n{card}"
        )
        return
    pushed: Any = model  # each of ours can be
    address = pushed.push_to_hub(
        name,
        private=True if private else None,
        branch=branch,
        create_pr=create_pr,
        commit_message=message,
        card=card,
        files=pictures,
        run=told,
    )
    console().print(f"wrote {name}: {address}")
