"""The registry of data sources: the word before the colon, and who opens what follows it.

A source is one function from a `Request` to `Rows`, registered once:

    def files(request: Request) -> list[Path]:
        return files_of(request, (".txt",))

    @register_source("text", "PATH", files=files)
    def open_text(request: Request) -> Rows:
        path = files(request)[0]
        try:
            array = np.loadtxt(path, dtype=np.float32, ndmin=2)
        except ValueError as error:
            raise refusal(request.spec, "hold numbers", error) from None
        return array_rows(request, array, lambda i: f"row {i} of {path}")

From then on `open_source("text:a.txt")` and `hos-ext train --data text:a.txt` know it. A package
that is installed makes its sources known to the command line by an entry point of the group
"hos_ext.sources", whose name is the word and whose value is the module that registers it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ...checks import check
from .rows import Request, Rows
from .streams import Examples

Opener: TypeAlias = Callable[[Request], Rows]


class Kind(NamedTuple):
    """A registered source; the fields are the arguments of `register_source`."""

    name: str
    target: str
    open: Opener
    stream: Callable[[Request], Examples] | None
    files: Callable[[Request], list[Path]] | None
    splits: Callable[[Request], list[str]] | None
    column: bool
    held_out: tuple[int, int] | None
    columns: bool = False
    labels: bool = False

    @property
    def form(self) -> str:
        """How a spec of this kind is written."""
        return f"{self.name}:{self.target}" if self.target else self.name


_KINDS: dict[str, Kind] = {}


def register_source(
    name: str,
    target: str = "",
    *,
    stream: Callable[[Request], Examples] | None = None,
    files: Callable[[Request], list[Path]] | None = None,
    splits: Callable[[Request], list[str]] | None = None,
    column: bool = False,
    columns: bool = False,
    labels: bool = False,
    held_out: tuple[int, int] | None = None,
) -> Callable[[Opener], Opener]:
    """Makes a source known by its name; decorates the function that opens it.

    Args:
        name: the word before the colon, such as "npy".
        target: what follows the colon, for messages, such as "PATH". Empty: the spec is the name
            alone, as "digits" is.
        stream: opens the set as a stream, for sets larger than memory and disk.
        files: the files behind a request. A test set of its own may share none with them.
        splits: the names of the parts that the set itself has. The opener is then asked for one of
            them by `request.split`, and a part called "test" is the test set by default.
        column: whether `request.column` means something to the opener.
        columns: whether `request.columns` does.
        labels: whether `request.label` does: the rows then have `classes`.
        held_out: how many rows are for validation and for the test where the user does not say; by
            default a twentieth of the rows each, at most 1000.

    Returns:
        A decorator, which gives the function back as it was.

    Raises:
        ValueError: the name is taken, empty or has a colon in it.
    """
    new = name and ":" not in name and name not in _KINDS
    check("register_source", new, "name must be new and without a colon", repr(name))

    def register(opener: Opener) -> Opener:
        _KINDS[name] = Kind(
            name, target, opener, stream, files, splits, column, held_out, columns, labels
        )
        return opener

    return register


def source_forms() -> list[str]:
    """How a spec of each kind is written, such as "npy:PATH"."""
    return [kind.form for kind in _KINDS.values()]


def find_kind(argument: str, spec: object) -> tuple[Kind, str]:
    """The kind of a spec, and what follows the colon in it."""
    name, colon, target = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    kind = _KINDS.get(name) or _installed(name)
    fits = kind is not None and bool(target) == bool(kind.target) == bool(colon)
    *forms, last = source_forms()
    rule = f"{argument} must be {', '.join(forms)} or {last}"
    check("open_source", fits, rule, repr(spec))
    assert kind is not None
    return kind, target


def _installed(name: str) -> Kind | None:
    """The kind that another package registers, imported."""
    if name:
        for entry in entry_points(group="hos_ext.sources", name=name):
            entry.load()
    return _KINDS.get(name)


def streamed_names() -> list[str]:
    """The kinds that can be read as a stream."""
    return [f"{kind.name}:" for kind in _KINDS.values() if kind.stream is not None]
