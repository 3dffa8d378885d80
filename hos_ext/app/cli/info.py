"""`hos-ext info`."""

from collections.abc import Iterator, Mapping
from typing import Any

from .. import runs
from .common import Json, RunFolder, console
from .errors import checking


def info(
    folder: RunFolder,
    as_json: Json = False,
) -> None:
    """Say what a run is: data, model, options, checkpoints (whole or damaged), figures.

    Example:

      hos-ext info runs/mnist

    A run that was killed is told from one that is finished, a damaged checkpoint from a whole.
    """
    with checking():
        content = runs.info(folder)
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
