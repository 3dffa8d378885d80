"""Opening a data set by its spec: the checks of what is asked for, and who opens it.

Everything random here is a function of (seed, step or offset, row), so that a resumed run sees the
same batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import check, check_count, check_int, check_kind
from . import sources as sources  # registers those of the package
from .pictures import Pictures
from .registry import Kind, find_kind, streamed_names
from .rows import LIMIT, Request, Rows
from .source import Source, held_rows, source_of_rows, source_of_stream
from .splits import default_held
from .streams import Examples


def open_source(
    spec: str,
    *,
    seed: int = 0,
    validation: int | None = None,
    test: int | None = None,
    test_spec: str | None = None,
    column: str | None = None,
    columns: Sequence[str] | str | None = None,
    label: str | None = None,
    pictures: Pictures | None = None,
    split: str = "train",
    limit: int = LIMIT,
    streaming: bool = False,
    buffer: int = 4096,
) -> Source:
    """Opens a data set, splits it and measures its scale.

    Images are (C, height, width): 8-bit grey (C = 1) or RGB, or pillow's mode F (floating grey);
    others are refused unless `pictures` says what is done to them. Arrays keep their dims. uint8
    means 256 whole levels; whole numbers of other kinds are taken as floating ones. Floating data
    are standardised by one mean and one standard deviation, those of the
    training part (of at most 8192 random rows of it where the set does not fit in memory).

    Args:
        spec: what to open:
            "digits", 1797 scans (8, 8) of 17 levels that come with scikit-learn;
            "hf:NAME", a data set of the Hugging Face hub, or a folder in that form, which its
            `datasets` copies to its cache (HF_HOME);
            "parquet:PATH", a file, a pattern such as "data/train-*.parquet", or a folder with all
            the files below it; image columns as on the hub;
            "folder:PATH", all images below a folder, sorted by path; hidden files and other
            kinds of files are left out;
            "csv:PATH", tables with a line of names, as parquet:;
            "npy:PATH", an .npy array (n, *dims), or an .npz file;
            "density:NAME", 100,000 draws from `known_density(NAME)`, not scaled;
            or what `register_source` has added.
        seed: of the split, and of the draws of a density.
        validation: rows for validation. Default 180 for digits, else a twentieth, at most 1000.
        test: rows for the test, by default as validation (digits: 360). Where the test set is one
            of its own: how many of its rows, by default all.
        test_spec: a test set of its own. hf: takes the data set's own split "test" if it has one.
        column: of images or of lists of numbers in hf: or parquet:, or the name of an array in an
            .npz file. May be left out where one is the only image column, or the only choice.
        columns: of a table in csv:, parquet: or hf: whose columns are numbers; a list, or names
            with commas. By default all of them. Each is standardised by itself.
        label: of a conditional model: which column of a table, or array of an .npz file (or .npy
            file beside it, by its path), has the class of each row; "label" also for digits, and
            for folder:, whose sub-folders are the classes. None: no labels.
        pictures: what is done to pictures: their size, transparency, colours, bits and pages.
        split: of hf:.
        limit: bytes. A set is decoded at once where it fits, and row by row when needed where it
            does not: encoded images stay in memory (folder: on disk), .npy files are mapped.
        streaming: for hf:, parquet: and folder: too large for memory or disk. The first rows of
            the stream are for validation and test (1000 each by default, also of a test
            set of its own; of a short stream a twentieth), the scale is that of at most 8192 rows
            after them, and training goes through the rest with a shuffle buffer.
            Batches repeat for the same seed and files, but they are not those of streaming=False;
            to resume, or to go back, the stream is read from its beginning without decoding.
        buffer: rows in the shuffle buffer of a stream.

    Returns:
        The open source.

    Raises:
        ValueError: an argument that does not fit, a file that is missing or damaged, or data that
            are empty, not finite, of mixed sizes or of a kind that would have to be converted;
            the message names the first such sample.
        RuntimeError: an extra is missing.

    Example:
        >>> from hos_ext.app import data
        >>> source = data.open_source("density:modes2d")
        >>> source.shape, len(source.validation)
        ((2,), 1000)
        >>> rows, raw = source.batch(0, 4, seed=0)
        >>> raw.shape
        torch.Size([4, 2])
    """
    kind, target = find_kind("spec", spec)
    seed = check_int("open_source", "seed", seed, 2**63)
    limit = check_count("open_source", "limit", limit, limit=2**63)
    buffer = check_count("open_source", "buffer", buffer)
    if validation is not None:
        validation = check_count("open_source", "validation", validation)
    if test is not None:
        test = check_count("open_source", "test", test)
    request = Request(spec, target, seed, column, split, limit)
    if pictures is not None:
        check_kind("open_source", "pictures", pictures, Pictures)
    names = _names(columns)
    request = request._replace(pictures=pictures or Pictures(), columns=names, label=label)
    _check_request(kind, request)
    own: tuple[Kind, Request] | None = None  # a test set of its own
    if test_spec is not None:
        own_kind, own_target = find_kind("test_spec", test_spec)
        own = own_kind, request._replace(spec=test_spec, target=own_target, split="test")
        _check_label(*own)
        _refuse_overlap((kind, request), own)
    elif kind.splits is not None and "test" not in split and "test" in kind.splits(request):
        own = kind, request._replace(split="test")
    if streaming:
        examples = _stream(kind, request)
        own_examples = None if own is None else _stream(*own)
        return source_of_stream(examples, own_examples, validation, test, buffer)
    rows = kind.open(request)
    own_rows = None if own is None else own[0].open(own[1])
    default = kind.held_out or (default_held(rows.size),) * 2
    return source_of_rows(rows, own_rows, validation or default[0], test, default[1], request)


def open_rows(
    spec: str,
    *,
    seed: int = 0,
    column: str | None = None,
    columns: Sequence[str] | str | None = None,
    pictures: Pictures | None = None,
    split: str = "train",
    limit: int = LIMIT,
) -> Rows:
    """The rows of a data set by number, neither split nor scaled; arguments as `open_source`.

    Example:
        >>> import torch
        >>> from hos_ext.app import data
        >>> rows = data.open_rows("digits")
        >>> rows.size, rows.shape, rows.levels
        (1797, (8, 8), 17)
        >>> rows.read(torch.tensor([3, 5])).shape
        torch.Size([2, 8, 8])
    """
    kind, target = find_kind("spec", spec)
    request = Request(spec, target, seed, column, split, limit)
    request = request._replace(pictures=pictures or Pictures(), columns=_names(columns))
    _check_request(kind, request)
    return kind.open(request)


def read_samples(
    spec: str,
    *,
    column: str | None = None,
    columns: Sequence[str] | str | None = None,
    pictures: Pictures | None = None,
    split: str = "train",
    limit: int = LIMIT,
) -> Tensor:
    """All rows of a data set, in order and unscaled: new data for a trained model.

    Args:
        spec: as in `open_source`.
        column, columns, pictures: as in `open_source`.
        split: of hf:.
        limit: bytes that the rows may take.

    Returns:
        Raw rows, shape (n, *dims), uint8, float32 or float64.

    Raises:
        ValueError, RuntimeError: as `open_source`, and where the rows do not fit in the limit.

    Example:
        >>> from hos_ext.app import data
        >>> data.read_samples("digits").shape
        torch.Size([1797, 8, 8])
    """
    rows = open_rows(
        spec, column=column, columns=columns, pictures=pictures, split=split, limit=limit
    )
    return held_rows(rows, torch.arange(rows.size), limit)


# ----------------------------------------------------------------------------------- what fits


def _names(columns: Sequence[str] | str | None) -> tuple[str, ...]:
    """Names of columns, from a list or from a text with commas."""
    found = columns.split(",") if isinstance(columns, str) else list(columns or ())
    names = tuple(name.strip() for name in found if isinstance(name, str))
    good = len(names) == len(found) == len(set(names)) and all(names)
    check("open_source", good, "columns must be names, each of them once", lambda: repr(columns))
    return names


def _check_request(kind: Kind, request: Request) -> None:
    spec, split, column = request.spec, request.split, request.column
    fits = split == "train" or kind.splits is not None
    check("open_source", fits, f"split must be 'train' for {spec}", repr(split))
    fits = column is None or kind.column
    check("open_source", fits, f"column must be None for {spec}", repr(column))
    fits = not request.columns or kind.columns
    check("open_source", fits, f"columns must be None for {spec}", repr(request.columns))
    fits = column is None or not request.columns
    check("open_source", fits, "column must be None with columns", repr(column))
    _check_label(kind, request)


def _check_label(kind: Kind, request: Request) -> None:
    label = request.label
    named = label is None or (isinstance(label, str) and label)
    check("open_source", named, "label must be a name", repr(label))
    fits = label is None or kind.labels
    check("open_source", fits, f"label must be None for {request.spec}", repr(label))


def _refuse_overlap(one: tuple[Kind, Request], other: tuple[Kind, Request]) -> None:
    """A file of both would be tested on after training on it."""
    files = [
        {path.resolve() for path in kind.files(request)} if kind.files is not None else set()
        for kind, request in (one, other)
    ]
    both = files[0] & files[1]
    (kind, request), test_spec = one, other[1].spec
    apart = not both and (request.spec != test_spec or kind.splits is not None)
    rule = f"test_spec must share nothing with {request.spec}"
    check("open_source", apart, rule, lambda: f"{min(both) if both else test_spec} in both")


def _stream(kind: Kind, request: Request) -> Examples:
    *names, last = streamed_names()
    rule = f"streaming must be of {', '.join(names)} or {last}"
    check("open_source", kind.stream is not None, rule, repr(request.spec))
    assert kind.stream is not None
    return kind.stream(request)
