"""`hos-ext info`."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from ...checks import check as refuse
from .. import evaluation, runs
from .common import Data, Device, Json, RunFolder, TestData, console
from .errors import checking


def info(
    folder: RunFolder,
    check: Annotated[
        bool,
        typer.Option("--check", help="Also whether the model denoises held-out samples at all."),
    ] = False,
    data: Data = None,
    test_data: TestData = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say what a run is: data, model, options, checkpoints (whole or damaged), figures.

    Example:

      hos-ext info runs/mnist --check

    A run that was killed is told from one that is finished, a damaged checkpoint from a whole.
    --check takes one denoising step at two noise levels. An error of 1 is that of no guess; where
    it is no better than that of the input shrunk, or would be with the model read otherwise, the
    verdict says so.
    """
    with checking():
        moved = data is None and test_data is None
        refuse("info", check or moved, "--data and --test-data must come with --check", "none")
        content = runs.info(folder)
        if check:
            model, facts = runs.load_run(folder, device=device)
            source = runs.open_data(facts, data, test_data)
            low, high = facts["options"]["sigma"]
    if check:
        content["check"] = evaluation.check_one_step(model, source, (low, high))
    if as_json:
        print(runs.json_text(content), end="")
    else:
        console().print("\n".join(_lines(content)))


def _lines(value: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Nested facts as indented lines."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield f"{indent}{key}:"
            yield from _lines(item, indent + "  ")
        elif item is not None:
            text = ", ".join(map(str, item)) if isinstance(item, list) else item
            yield f"{indent}{key}: {text}"
