"""An open data set: what is held out of it, how it is scaled, and the batches that it serves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import check, check_count, check_int
from ...random import Key
from .labels import Labels, matched
from .pictures import levels_of
from .rows import CHUNK_VALUES, Classes, Request, Rows, check_layout, check_set, warn_whole
from .scaling import Scaling, chosen_scaling, root_mean_square, statistics_rows
from .splits import Parts, batch_rows, default_held, random_order, split_rows, too_few
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
        labels: of its rows, where they were asked for.
        columns: names of the entries of a sample, of a table.
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
    labels: Labels | None = None
    columns: tuple[str, ...] = ()

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
        place = _share("Source.batch", step, batch_size, start, stop)
        return self.reader(*place[:2], seed, *place[2:])

    def batch_labels(
        self, step: int, batch_size: int, *, seed: int, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """The labels of what `batch` gives for the same arguments. Shape (stop - start,), int64.

        Raises:
            ValueError: an argument out of range; the source was opened without labels.
        """
        where = "Source.batch_labels"
        place = _share(where, step, batch_size, start, stop)
        check(where, self.labels is not None, "the source must be opened with label", "none")
        assert self.labels is not None
        return self.labels.reader(*place[:2], seed, *place[2:])


def _share(
    where: str, step: int, batch_size: int, start: int, stop: int | None
) -> tuple[int, int, int, int]:
    """Step, batch size, and ends of a share of its batch, checked."""
    step = check_int(where, "step", step, 2**40)
    batch_size = check_count(where, "batch_size", batch_size)
    stop = batch_size if stop is None else stop
    rule = f"start and stop must satisfy 0 <= start <= stop <= {batch_size}"
    check(where, 0 <= start <= stop <= batch_size, rule, f"{start} and {stop}")
    return step, batch_size, start, stop


# ------------------------------------------------------------------------------------- from rows


def source_of_rows(
    rows: Rows,
    own: Rows | None,
    validation: int,
    test: int | None,
    default_test: int,
    request: Request,
    wanted: Scaling | str | None = "standardise",
) -> Source:
    """Parts of the rows; `own` is a test set of its own, `wanted` as in `chosen_scaling`."""
    spec, seed, limit = request.spec, request.seed, request.limit
    n_test = (test or default_test) if own is None else 0
    least = 1 + (validation > 0) + (n_test > 0)
    rule = f"hold at least {least} rows, one of each part"
    check_set(spec, rows.size >= least, rule, rows.size)
    parts = split_rows("open_source", rows.size, seed, validation, n_test)
    if own is not None:
        parts = parts._replace(test=_own_test(rows, own, seed, test))
    train = parts.train
    assert train is not None

    def read(step: int, batch_size: int, seed: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        place = batch_rows(len(train), batch_size, seed=seed, step=step, start=start, stop=stop)
        if rows.visit is None:
            return train[place], rows.read(train[place])
        return train[place], rows.visit(train[place], Key(seed, step + 1, start))

    some = train[: statistics_rows(rows.shape)]
    wanted = wanted if rows.truth is None else None
    chunks = rows.chunks(train if rows.resident else some)
    scaling = chosen_scaling(spec, rows.levels, chunks, wanted, rows.columns)
    if rows.whole:
        warn_whole(spec, rows.read(some[:256]))
    return Source(
        spec=spec,
        shape=rows.shape,
        scaling=scaling,
        std=root_mean_square(scaling, rows.chunks(some)),
        parts=parts,
        validation=held_rows(rows, parts.validation, limit),
        test=held_rows(rows if own is None else own, parts.test, limit),
        truth=rows.truth,
        reader=read,
        labels=_labels_of(rows, own, parts),
        columns=rows.columns,
    )


def _labels_of(rows: Rows, own: Rows | None, parts: Parts) -> Labels | None:
    """The labels of rows in their parts; of a test set of its own in the classes of the rows."""
    if rows.classes is None:
        return None
    (numbers, names), train = rows.classes, parts.train
    tested = numbers if own is None else matched(own.classes, names, own.spec)
    assert train is not None

    def read(step: int, batch_size: int, seed: int, start: int, stop: int) -> Tensor:
        place = batch_rows(len(train), batch_size, seed=seed, step=step, start=start, stop=stop)
        return numbers[train[place]]

    return Labels(names, numbers[parts.validation], tested[parts.test], read)


def _own_test(rows: Rows, own: Rows, seed: int, test: int | None) -> Tensor:
    """Rows of a test set of its own: all of them in order, or some at random."""
    same = (own.shape, own.levels) == (rows.shape, rows.levels)
    rule = f"test_spec must hold samples {rows.shape} of {rows.levels} levels like {rows.spec}"
    check("open_source", same, rule, f"{own.shape} of {own.levels} levels")
    rule = f"test_spec must have the columns {', '.join(rows.columns)} like {rows.spec}"
    check("open_source", own.columns == rows.columns, rule, ", ".join(own.columns))
    rule = f"test must be at most the {own.size} rows of {own.spec}"
    check("open_source", (test or 0) <= own.size, rule, test)
    return torch.arange(own.size) if test is None else random_order(own.size, seed)[:test]


def held_rows(rows: Rows, numbers: Tensor, limit: int) -> Tensor:
    """Rows that stay in memory."""
    each = 8 if not rows.levels else 1 if rows.levels <= 256 else 4
    needed = len(numbers) * math.prod(rows.shape) * each
    rule = f"fit in the limit of {limit} bytes where it is held in memory"
    got = f"{len(numbers)} rows of {needed} bytes"
    check_set(rows.spec, rows.resident or needed <= limit, rule, got)
    return rows.read(numbers)


# ----------------------------------------------------------------------------------- from a stream


def source_of_stream(
    examples: Examples,
    other: Examples | None,
    validation: int | None,
    test: int | None,
    buffer: int,
) -> Source:
    """The first rows are held out and never trained on; `skip` also keeps the files in order.

    Where the user does not say how many, 1000 for each part; of a short stream as of other sets.
    """
    spec, asked = examples.spec, validation
    validation = asked or 1000
    held = validation + (test or 1000 if other is None else 0)
    head = guarded(spec, examples.dataset)
    found = list(itertools.islice(head, held + 1))
    if len(found) <= held:
        usual = default_held(len(found))
        validation = asked or usual
        held = validation + (test or usual if other is None else 0)
    if len(found) <= held:
        raise too_few("open_source", len(found), validation, held - validation)
    example = examples.sample(found[0])
    filled = example.ndim > 0 and example.size > 0
    check_set(spec, filled, "not be empty", f"shape {example.shape} in {examples.name(0)}")
    check_layout(spec, example.shape, f"shape {example.shape} in {examples.name(0)}")
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
    levels = levels_of(example, examples.pictures)
    scaling = chosen_scaling(spec, levels, some, "standardise")
    stream = Stream(spec, examples.dataset.skip(held), buffer)

    def take(step: int, batch_size: int, seed: int) -> list[dict[str, Any]]:
        return stream.take(step * batch_size, (step + 1) * batch_size, seed)

    def read(step: int, batch_size: int, seed: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        key = Key(seed, step + 1, start)
        return examples.read(take(step, batch_size, seed)[start:stop], example, key)

    labels = None
    if examples.label is not None:
        held_labels = examples.labels(found[:held])
        tested = held_labels[validation:]
        if other is not None:
            numbers_of = Classes(other.labels(own), other.names)
            tested = matched(numbers_of, examples.names, other.spec)
        labels = Labels(
            examples.names,
            held_labels[:validation],
            tested,
            lambda step, size, seed, start, stop: examples.labels(
                take(step, size, seed)[start:stop]
            ),
        )

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
        labels=labels,
    )
