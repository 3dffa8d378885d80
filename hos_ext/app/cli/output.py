"""How much a command says, and where: results on stdout; progress, log and warnings on stderr.

Every command takes --quiet and --verbose. The levels are those of Python's logging, and what
`hos_ext` logs is shown while a command runs.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Annotated, Any

import typer

from ... import __version__
from ...checks import check
from .errors import checking

_PANEL = "Output"  # of --help
_LEVEL = ContextVar("level", default=logging.INFO)
_LOG = logging.getLogger(__package__)

_Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Nothing but warnings and errors.", rich_help_panel=_PANEL),
]
_Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Also rows of the curve, checkpoints, and where an error came from.",
        rich_help_panel=_PANEL,
    ),
]


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"hos-ext {__version__}")
        raise typer.Exit


def start(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """What may stand before the name of a command."""


def talks() -> bool:
    """Whether results and progress are shown: no --quiet was given."""
    return _LEVEL.get() <= logging.INFO


def takes_output(command: Callable[..., None]) -> Callable[..., None]:
    """A command with --quiet and --verbose behind its own options."""

    @wraps(command)
    def told(*arguments: Any, quiet: bool = False, verbose: bool = False, **named: Any) -> None:
        with checking():
            rule = "--quiet must come without --verbose"
            check(command.__name__, not (quiet and verbose), rule, "both")
        level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
        with _speaking(level):
            try:
                command(*arguments, **named)
            except Exception:
                _LOG.debug("the error came from here", exc_info=True)
                raise

    signature = inspect.signature(command)
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter(name, kind, default=False, annotation=annotation)
        for name, annotation in (("quiet", _Quiet), ("verbose", _Verbose))
    ]
    changed: Any = told
    changed.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])
    changed.__annotations__ = command.__annotations__ | {"quiet": _Quiet, "verbose": _Verbose}
    return told


@contextmanager
def _speaking(level: int) -> Iterator[None]:
    """Inside, what `hos_ext` logs at this level or above goes to stderr."""
    log, handler = logging.getLogger("hos_ext"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    before, token = log.level, _LEVEL.set(level)
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)
        _LEVEL.reset(token)
