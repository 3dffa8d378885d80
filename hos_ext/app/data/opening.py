"""Opening a data set: its rows are split, measured, and served as batches.

Everything random here is a function of (seed, step or offset, row), so that a resumed run sees the
same batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import check, check_count, check_int
from . import sources as sources  # registers those of the package
from .registry import Kind, find_kind, streamed_names
from .rows import CHUNK_VALUES, LIMIT, Request, Rows, check_set
from .scaling import Scaling, root_mean_square, standardise, statistics_rows
from .splits import Parts, batch_rows, random_order, split_rows, too_few
from .streams import Examples, Stream, guarded


class Source(NamedTuple):
    """An open data set; `open_source` makes it.

    Attributes:
        spec: what was opened.
        shape: of one sample: (C, height, width) for images.
        scaling: raw values to data units and back.
        std: root mean square of training data in data units, for `sigma_data` of a network.
        parts: row numbers of the parts.
        validation: raw rows to tune on, shape (n, *shape), uint8, float32 or float64.
        test: raw rows to report on.
        truth: the density (float64 parameters) that `density:` was drawn from, else None.
        reader: what `batch` calls.
    """

    spec: str
    shape: tuple[int, ...]
    scaling: Scaling
    std: float
    parts: Parts
    validation: Tensor
    test: Tensor
    truth: Any
    reader: Callable[[int, int, int, int, int], tuple[Tensor, Tensor]]

    def batch(
        self, step: int, batch_size: int, *, seed: int, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows [start, stop) of the global batch of `step`: a share for a rank or a micro-batch.

        Every epoch goes through the training part in a fresh order. The batch is a function of
        (seed, step), and shares concatenate to it.

        Args:
            step: from 0.
            batch_size: rows of the global batch.
            seed: of the order.
            start: first row of the share.
            stop: one past its last row; the end of the batch by default.

        Returns:
            Row numbers in the data set, (stop - start,) int64, and raw rows (stop - start, *shape).

        Raises:
            ValueError: an argument out of range; an image that cannot be read, or a sample that
                is not as the others or not finite (sets in memory are checked when opened).
        """
        check_int("Source.batch", "step", step, 2**40)
        check_count("Source.batch", "batch_size", batch_size)
        stop = batch_size if stop is None else stop
        rule = f"start and stop must satisfy 0 <= start <= stop <= {batch_size}"
        share = 0 <= start <= stop <= batch_size
        check("Source.batch", share, rule, f"{start} and {stop}")
        return self.reader(step, batch_size, seed, start, stop)


def open_source(
    spec: str,
    *,
    seed: int = 0,
    validation: int | None = None,
    test: int | None = None,
    test_spec: str | None = None,
    column: str | None = None,
    split: str = "train",
    limit: int = LIMIT,
    streaming: bool = False,
    buffer: int = 4096,
) -> Source:
    """Opens a data set, splits it and measures its scale.

    Images are (C, height, width): 8-bit grey (C = 1) or RGB, or pillow's mode F (floating grey);
    other modes are refused rather than converted. Arrays keep their dims. uint8 means 256 whole
    levels. Floating data are standardised by one mean and one standard deviation, those of the
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
        split: of hf:.
        limit: bytes. A set is decoded at once where it fits, and row by row when needed where it
            does not: encoded images stay in memory (folder: on disk), .npy files are mapped.
        streaming: for hf:, parquet: and folder: too large for memory or disk. The first rows of
            the stream are for validation and test (1000 each by default), the scale is that of at
            most 8192 rows after them, and training goes through the rest with a shuffle buffer.
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
    check_int("open_source", "seed", seed, 2**63)
    check_count("open_source", "limit", limit, limit=2**63)
    check_count("open_source", "buffer", buffer)
    for name, value in (("validation", validation), ("test", test)):
        if value is not None:
            check_count("open_source", name, value)
    request = Request(spec, target, seed, column, split, limit)
    _check_request(kind, request)
    own: tuple[Kind, Request] | None = None  # a test set of its own
    if test_spec is not None:
        own_kind, own_target = find_kind("test_spec", test_spec)
        own = own_kind, request._replace(spec=test_spec, target=own_target, split="test")
        _refuse_overlap((kind, request), own)
    elif kind.splits is not None and "test" not in split and "test" in kind.splits(request):
        own = kind, request._replace(split="test")
    if streaming:
        examples = _stream(kind, request)
        own_examples = None if own is None else _stream(*own)
        return _from_stream(examples, own_examples, validation or 1000, test, buffer)
    rows = kind.open(request)
    own_rows = None if own is None else own[0].open(own[1])
    default = kind.held_out or (max(1, min(1000, rows.size // 20)),) * 2
    return _from_rows(rows, own_rows, validation or default[0], test, default[1], request)


def open_rows(
    spec: str,
    *,
    seed: int = 0,
    column: str | None = None,
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
    return kind.open(Request(spec, target, seed, column, split, limit))


def read_samples(
    spec: str, *, column: str | None = None, split: str = "train", limit: int = LIMIT
) -> Tensor:
    """All rows of a data set, in order and unscaled: new data for a trained model.

    Args:
        spec: as in `open_source`.
        column: as in `open_source`.
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
    rows = open_rows(spec, column=column, split=split, limit=limit)
    return _held(rows, torch.arange(rows.size), limit)


# ------------------------------------------------------------------------------------- from rows


def _from_rows(
    rows: Rows,
    own: Rows | None,
    validation: int,
    test: int | None,
    default_test: int,
    request: Request,
) -> Source:
    """Parts of the rows; `own` is a test set of its own."""
    spec, seed, limit = request.spec, request.seed, request.limit
    n_test = (test or default_test) if own is None else 0
    parts = split_rows("open_source", rows.size, seed, validation, n_test)
    if own is not None:
        parts = parts._replace(test=_own_test(rows, own, seed, test))
    train = parts.train
    assert train is not None

    def read(step: int, batch_size: int, seed: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        place = batch_rows(len(train), batch_size, seed=seed, step=step, start=start, stop=stop)
        return train[place], rows.read(train[place])

    some = train[: statistics_rows(rows.shape)]
    scaling = Scaling(levels=rows.levels)
    if not rows.levels and rows.truth is None:
        scaling = standardise(spec, rows.chunks(train if rows.resident else some))
    return Source(
        spec=spec,
        shape=rows.shape,
        scaling=scaling,
        std=root_mean_square(scaling, rows.chunks(some)),
        parts=parts,
        validation=_held(rows, parts.validation, limit),
        test=_held(rows if own is None else own, parts.test, limit),
        truth=rows.truth,
        reader=read,
    )


def _own_test(rows: Rows, own: Rows, seed: int, test: int | None) -> Tensor:
    """Rows of a test set of its own: all of them in order, or some at random."""
    same = (own.shape, own.levels) == (rows.shape, rows.levels)
    rule = f"test_spec must hold samples {rows.shape} of {rows.levels} levels like {rows.spec}"
    check("open_source", same, rule, f"{own.shape} of {own.levels} levels")
    rule = f"test must be at most the {own.size} rows of {own.spec}"
    check("open_source", (test or 0) <= own.size, rule, test)
    return torch.arange(own.size) if test is None else random_order(own.size, seed)[:test]


def _held(rows: Rows, numbers: Tensor, limit: int) -> Tensor:
    """Rows that stay in memory."""
    needed = len(numbers) * math.prod(rows.shape) * (1 if rows.levels else 8)
    rule = f"fit in the limit of {limit} bytes where it is held in memory"
    got = f"{len(numbers)} rows of {needed} bytes"
    check_set(rows.spec, rows.resident or needed <= limit, rule, got)
    return rows.read(numbers)


# ----------------------------------------------------------------------------------- from a stream


def _from_stream(
    examples: Examples, other: Examples | None, validation: int, test: int | None, buffer: int
) -> Source:
    """The first rows are held out and never trained on; `skip` also keeps the files in order."""
    spec = examples.spec
    held = validation + (test or 1000 if other is None else 0)
    head = guarded(spec, examples.dataset)
    found = list(itertools.islice(head, held + 1))
    if len(found) <= held:
        raise too_few("open_source", len(found), validation, held - validation)
    example = examples.decode(found[0])
    filled = example.ndim > 0 and example.size > 0
    check_set(spec, filled, "not be empty", f"shape {example.shape} in {examples.name(0)}")
    found += itertools.islice(head, statistics_rows(example.shape) - 1)
    head.close()
    numbers, raw = examples.read(found, example)
    test_numbers, tests = numbers[validation:held], raw[validation:held]
    if other is not None:
        own = list(itertools.islice(guarded(other.spec, other.dataset), test or 1000))
        rule = f"test must be at most the {len(own)} rows of {other.spec}"
        check("open_source", len(own) >= (test or 1), rule, test or 1)
        test_numbers, tests = other.read(own, example)
    some = raw[held:].split(max(1, CHUNK_VALUES // example.size))
    scaling = Scaling(levels=256) if example.dtype == np.uint8 else standardise(spec, some)
    stream = Stream(spec, examples.dataset.skip(held), buffer)

    def read(step: int, batch_size: int, seed: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        batch = stream.take(step * batch_size, (step + 1) * batch_size, seed)
        return examples.read(batch[start:stop], example)

    return Source(
        spec=spec,
        shape=example.shape,
        scaling=scaling,
        std=root_mean_square(scaling, some),
        parts=Parts(None, numbers[:validation], test_numbers),
        validation=raw[:validation].clone(),
        test=tests.clone(),
        truth=None,
        reader=read,
    )


# ----------------------------------------------------------------------------------- what fits


def _check_request(kind: Kind, request: Request) -> None:
    spec, split, column = request.spec, request.split, request.column
    fits = split == "train" or kind.splits is not None
    check("open_source", fits, f"split must be 'train' for {spec}", repr(split))
    fits = column is None or kind.column
    check("open_source", fits, f"column must be None for {spec}", repr(column))


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
