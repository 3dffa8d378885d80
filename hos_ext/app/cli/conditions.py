"""The class that a command is asked for: `--condition`, of runs that were trained with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ...checks import check
from .. import data
from .common import NOISE

Condition = Annotated[
    str | None,
    typer.Option(
        "--condition",
        help="A class of a run trained with --condition (hos-ext info names them), or none. "
        "Held-out samples: those of this class. Default: all, each under its own.",
        rich_help_panel=NOISE,
    ),
]


def chosen_class(command: str, facts: Mapping[str, Any], text: str | None) -> int | None:
    """The number of the class that the user names, of no class for `none`; None if not named.

    Raises:
        ValueError: the run knows no classes, not this one, or was never trained without one.
    """
    names = facts["data"].get("classes")
    rule = "--condition must be left out (the run was trained without --condition)"
    check(command, names or text is None, rule, repr(text))
    if text is None:
        return None
    number = data.class_number(command, "--condition", names, text)
    rate = facts["options"]["condition_dropout"]
    rule = "--condition none must come with a run trained with --condition-dropout"
    check(command, number < len(names) or rate > 0, rule, f"{rate:g}")
    return number


def given_labels(
    command: str, facts: Mapping[str, Any], text: str | None, count: int, what: str
) -> dict[str, Tensor]:
    """The conditions of samples whose classes the data do not say; none for a run without classes.

    Args:
        command: for errors.
        facts: of the run.
        text: a class, or as many as there are samples, with commas.
        count: samples.
        what: "files", for errors.
    """
    names = facts["data"].get("classes")
    if not names and text is None:
        return {}
    rule = f"--condition must be given for {what} (a class, or none)"
    check(command, text is not None, rule, "none")
    assert text is not None
    words = [text] if text in (names or ()) else [word.strip() for word in text.split(",")]
    fits = len(words) in (1, count)
    rule = f"--condition must name one class, or one for each of {count} samples"
    check(command, fits, rule, repr(text))
    numbers = [chosen_class(command, facts, word) for word in words]
    return {"label": torch.tensor(numbers * (count if len(words) == 1 else 1))}


def of_class(
    command: str, source: data.Source, facts: Mapping[str, Any], text: str | None
) -> data.Source:
    """A source whose test rows are those of a class; under none all of them, told no class."""
    number = chosen_class(command, facts, text)
    labels = source.labels
    if number is None or labels is None:
        return source
    if number == len(labels.names):
        return source._replace(labels=labels._replace(test=torch.full_like(labels.test, number)))
    rows = labels.test == number
    rule = "--condition must be a class that held-out samples have"
    check(command, bool(rows.any()), rule, repr(text))
    return source._replace(
        test=source.test[rows],
        parts=source.parts._replace(test=source.parts.test[rows]),
        labels=labels._replace(test=labels.test[rows]),
    )


def class_name(source: data.Source, row: int) -> str:
    """What a held-out row is called beside its number, such as ", class cat"."""
    if source.labels is None:
        return ""
    number = int(source.labels.test[row])
    names = source.labels.names
    return f", class {names[number]}" if number < len(names) else ", no class"
