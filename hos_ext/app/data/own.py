"""Data of one's own as a source: tensors, arrays, data sets and loaders of torch and Hugging Face.

Three files: `items` says what a sample is, `passes` reads what can only be read through, and here
everything becomes a `Source`.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ...checks import check, check_count, check_int, is_int, kind_name, said_by
from .items import drawing_apart, sample_of, seed_all, seeds_of
from .labels import Labels, classes_of, matched
from .passes import Passes, check_loader, first_sample, one_pass, reader_of, stacked
from .rows import CHUNK_VALUES, LIMIT, Request, Rows, alike, array_rows, check_set
from .scaling import Scaling, chosen_scaling, root_mean_square, statistics_rows
from .source import Source, held_rows, source_of_rows
from .splits import Parts, default_held
from .tables import choose_column, label_classes, table_rows

_WHERE = "as_source"
KINDS = (
    "a Source, a Tensor, an array, a Dataset or DataLoader of torch, a data set of Hugging Face or "
    "a list of samples"
)
# Rows of a part that is given as something to read through.
_READ_THROUGH = 1000


def as_source(
    data: Any,
    *,
    seed: int = 0,
    validation: Any = None,
    test: Any = None,
    column: str | None = None,
    label: str | None = None,
    num_classes: int | None = None,
    scaling: Scaling | str | None = None,
    batch_size: int | None = None,
    limit: int = LIMIT,
) -> Source:
    """Data of one's own as training and evaluation take them.

    Floating numbers stay as they are unless `scaling` says otherwise: data units are the units of
    the data, and `sigma_range` is meant in them. uint8 means 256 whole levels, which come to
    [-1, 1] as `Scaling` says.

    What is kept of exactness, at one number of threads on the CPU:

    * Tensors, arrays, `TensorDataset`, `datasets.Dataset`, lists: rows go by the permutations of
      `batch_rows`. A resumed run repeats an uninterrupted one bit for bit, and the rows of a step
      do not depend on the number of processes.
    * Other map-style data sets: the same. What an item draws from torch, `numpy.random` or `random`
      (random crops, flips) is seeded by (seed, step, row), so it repeats too.
    * `DataLoader` and `IterableDataset`, of torch or of Hugging Face: their own order, and a loader
      keeps its sampler, workers and collate function. Each pass is seeded by (seed, number of the
      pass), also the generators that the loader was given. To resume, the pass is read again from
      its beginning.
      Every process reads everything and takes its share, so all must see one order. Batches are cut
      to the batch size of the training across the ends of passes. Where there is a `set_epoch`,
      it is told the number of the pass. Workers that persist go on with the random numbers of the
      pass before.

    Args:
        data: a Source, which is given back; a tensor or array (n, *dims); a `Dataset`,
            `IterableDataset` or `DataLoader` of torch; a `Dataset` or `IterableDataset` of Hugging
            Face; a list of samples. An item is a tensor, an array or a pillow image, alone, as
            first of a tuple such as (sample, label), or in a mapping. Pictures in tensors and
            arrays are (C, height, width).
        seed: of the split.
        validation: how many rows are held out to tune on, or data apart for that, of any kind. By
            default a twentieth of the rows, at most 1000. What is only read through (loaders,
            iterables) leaves out its first rows in every pass; a loader, whose order is its own,
            cannot: then the first rows of a pass are also trained on, and a warning says so.
        test: likewise to report on; 0 for none.
        column: of the samples in mappings; may be left out where one entry has axes.
        label: of a conditional model: the entry of mappings that has the class of a sample; for
            tuples such as (sample, label), and a TensorDataset, any name, for the second. None: no
            labels. They are whole numbers, from 0 up, or classes of Hugging Face. Every item is
            read once for them unless the data set has `targets`. Not for what is only read through.
        num_classes: of the model; None is one more than the largest label.
        scaling: None; "standardise" for one mean and one standard deviation of floating data; or a
            `Scaling`, such as that of an earlier source.
        batch_size: of the training, if it is known: a loader must have the same.
        limit: bytes that a part or all rows may take in memory.

    Returns:
        The source.

    Raises:
        TypeError: data of another kind.
        ValueError: items that are no samples, not finite or not alike; too few rows; a loader with
            another batch size or a DistributedSampler.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from hos_ext.app import data
        >>> samples, labels = torch.randn(200, 1, 8, 8), torch.arange(200)
        >>> source = data.as_source(TensorDataset(samples, labels), test=20)
        >>> source.shape, len(source.validation), len(source.test)
        ((1, 8, 8), 10, 20)
    """
    seed, limit = check_int(_WHERE, "seed", seed, 2**63), check_count(_WHERE, "limit", limit)
    if isinstance(data, Source) or (hasattr(data, "batch") and hasattr(data, "scaling")):
        own: Source = data
        fits = validation is None and test in (None, 0) and column is None and scaling is None
        check(_WHERE, fits, "validation, test, column and scaling must be None for a Source", own)
        check(_WHERE, label is None, "label must be None for a Source, which has its own", own)
        return own
    known = scaling is None or scaling == "standardise" or isinstance(scaling, Scaling)
    check(_WHERE, known, "scaling must be None, 'standardise' or a Scaling", lambda: repr(scaling))
    with said_by(_WHERE, "open_source"):
        rows = _labelled(data, column, label, num_classes, limit)
        if rows is None:
            source = _passed(data, column, batch_size, validation, test, scaling)
        else:
            held = [
                _count(each, name) for name, each in (("validation", validation), ("test", test))
            ]
            usual = default_held(rows.size)
            n_validation, n_test = (usual if count is None else count for count in held)
            request = Request(rows.spec, "", seed, column, limit=limit)
            source = source_of_rows(rows, None, n_validation, n_test, 0, request, scaling)
        for name, given in (("validation", validation), ("test", test)):
            if _apart(given):
                source = _with_part(source, name, given, column, label, limit)
    if scaling is None and not source.scaling.levels and not 0.1 <= source.std <= 10:
        warnings.warn(
            f"{_WHERE}: {source.spec} has a root mean square of {source.std:.3g} and is taken "
            "as it is: noise levels are meant in its units (scaling='standardise' brings it to 1; "
            "Scaling() says that it is meant so)",
            stacklevel=2,
        )

    def read(step: int, batch_size: int, seed: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        with said_by(_WHERE, "open_source"):
            return source.reader(step, batch_size, seed, start, stop)

    return source._replace(reader=read)


def _apart(given: Any) -> bool:
    """Whether a part is given as data of its own."""
    return given is not None and not is_int(given)


def _count(given: Any, name: str) -> int | None:
    """How many rows are held out for a part; None where the user did not say."""
    if _apart(given):
        return 0
    return None if given is None else check_count(_WHERE, name, given, least=0)


def _relabelled(labels: Labels, name: str, told: Tensor) -> Labels:
    """The labels with those of a part that is given apart."""
    return labels._replace(validation=told) if name == "validation" else labels._replace(test=told)


def _with_part(
    source: Source, name: str, given: Any, column: str | None, label: str | None, limit: int
) -> Source:
    """The source with a part that is given apart."""
    classes = None if source.labels is None else len(source.labels.names)
    rows = _labelled(given, column, label, classes, limit)
    if rows is not None:
        raw = held_rows(rows, torch.arange(rows.size), limit)
    else:
        spec = type(given).__name__
        samples = list(itertools.islice(one_pass(spec, given, column), _READ_THROUGH))
        raw = stacked(spec, samples, first_sample(spec, samples))
    same = tuple(raw.shape[1:]) == source.shape
    kinds = (torch.uint8,) if source.scaling.levels else (torch.float32, torch.float64)
    rule = f"{name} must hold samples {source.shape} of {' or '.join(map(str, kinds))} like data"
    check(_WHERE, same and raw.dtype in kinds, rule, f"{tuple(raw.shape[1:])} of {raw.dtype}")
    if source.labels is not None and rows is not None:
        told = matched(rows.classes, source.labels.names, rows.spec)
        source = source._replace(labels=_relabelled(source.labels, name, told))
    numbers = torch.arange(len(raw))
    if name == "validation":
        return source._replace(parts=source.parts._replace(validation=numbers), validation=raw)
    return source._replace(parts=source.parts._replace(test=numbers), test=raw)


# --------------------------------------------------------------------------- what can be numbered


def _rows_of(data: Any, column: str | None, limit: int) -> Rows | None:
    """The rows of data whose samples have numbers; None of what can only be read through."""
    spec = type(data).__name__
    request = Request(spec, "", column=column, limit=limit)
    if isinstance(data, TensorDataset) and type(data) is TensorDataset and column is None:
        data = data.tensors[0]
    if isinstance(data, (Tensor, np.ndarray)):
        if isinstance(data, Tensor):
            check_set(spec, data.device.type == "cpu", "be on the CPU", data.device)
            check_set(spec, data.dtype != torch.bfloat16, "be of float16 or more", data.dtype)
            data = data.detach().numpy()
        return array_rows(request, data, lambda i: f"row {i}")
    if _is_hugging(data, "DatasetDict") or _is_hugging(data, "IterableDatasetDict"):
        rule = f"data must be one of its parts, such as data[{next(iter(data), 'train')!r}]"
        raise TypeError(f"{_WHERE}: {rule}, got {spec}")
    if _is_hugging(data, "Dataset") and data.format["type"] is None:
        column, image = choose_column(spec, data.features.to_dict(), column)
        piece = data.select_columns([column]).with_format("arrow")[:].column(column)
        return table_rows(request, [piece], [spec], image=image)
    if isinstance(data, (DataLoader, IterableDataset)):
        return None
    if isinstance(data, tuple):
        rule = "data must be one of its tensors, or torch.utils.data.TensorDataset of them"
        raise TypeError(f"{_WHERE}: {rule}, got a tuple of {len(data)}")
    if hasattr(data, "to_numpy"):  # a table of pandas or polars: data[i] is a column of it
        raise TypeError(f"{_WHERE}: data must be its array, data.to_numpy(), got {spec}")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping):
        fits = not isinstance(data, (str, bytes))
        check(_WHERE, fits, f"data must be {KINDS}", lambda: repr(data)[:60], TypeError)
        return _numbered(data, spec, column, limit)
    again = hasattr(data, "__iter__") and not isinstance(data, Mapping) and iter(data) is not data
    rule = f"data must be {KINDS} (what can be read once only: in an IterableDataset)"
    check(_WHERE, again, rule, lambda: kind_name(data).partition(" ")[0], TypeError)
    return None


def _labelled(
    data: Any, column: str | None, label: str | None, num_classes: int | None, limit: int
) -> Rows | None:
    """The rows of data, with classes where they are wanted."""
    rows = _rows_of(data, column, limit)
    if label is None:
        return rows
    spec = type(data).__name__
    rule = "have numbered samples for labels (label must be None of what is only read through)"
    check_set(spec, rows is not None, rule, "a loader or an iterable")
    assert rows is not None
    request = Request(spec, "", label=label)
    if _is_hugging(data, "Dataset"):
        features = data.features.to_dict()
        return rows._replace(
            classes=label_classes(request, features, lambda name: data.with_format(None)[name][:])
        )
    values = np.asarray(_label_values(data, spec, label))
    whole = values.ndim == 1 and values.dtype.kind in "iu" and values.size == rows.size
    rule = "have labels that are whole numbers from 0 up, one for each sample"
    check_set(spec, whole and values.min() >= 0, rule, lambda: _told(values))
    count = max(int(values.max()) + 1, 2) if num_classes is None else num_classes
    names = [str(k) for k in range(count)]
    return rows._replace(classes=classes_of(request, values, names, "item {}".format))


def _told(values: np.ndarray) -> str:
    whole = values.dtype.kind in "iu" and values.size
    return f"{values.dtype} of shape {values.shape}" + (f" from {values.min()} up" if whole else "")


def _label_values(data: Any, spec: str, label: str) -> Any:
    """The labels of all samples."""
    if isinstance(data, TensorDataset) and type(data) is TensorDataset:
        rule = "have labels as its second tensor"
        check_set(spec, len(data.tensors) > 1, rule, f"{len(data.tensors)} tensor")
        return data.tensors[1].numpy()
    rule = "come with labels: torch.utils.data.TensorDataset(samples, labels)"
    check_set(spec, not isinstance(data, (Tensor, np.ndarray)), rule, "samples alone")
    if hasattr(data, "targets"):
        return data.targets
    with drawing_apart():
        seed_all(0)
        return [_label_of(spec, data[i], label, i) for i in range(len(data))]


def _label_of(spec: str, item: Any, label: str, place: int) -> int:
    """The label in an item: the entry of a mapping, or the second of a tuple."""
    value: Any = None
    if isinstance(item, Mapping):
        value = item.get(label)
    elif isinstance(item, (tuple, list)) and len(item) > 1:
        value = item[1]
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    rule = f"have a whole number as label {label!r} of each item"
    check_set(spec, is_int(value), rule, f"{value!r} in item {place}")
    return int(value)


def _numbered(data: Any, spec: str, column: str | None, limit: int) -> Rows:
    """The rows of a map-style data set; items are read when they are wanted."""
    size = len(data)
    check_set(spec, size, "not be empty", "0 items")
    read_one = _item_reader(data, spec, column)
    with drawing_apart():
        seed_all(0)
        example = read_one(0)
    first_sample(spec, [example])

    def read(rows: Tensor, seeds: list[int]) -> Tensor:
        samples = []
        with drawing_apart():
            for row, number in zip(rows.tolist(), seeds, strict=True):
                seed_all(number)
                samples.append(alike(spec, example, "item 0", read_one(row), f"item {row}"))
        return stacked(spec, samples, example, lambda i: f"item {int(rows[i])}")

    levels = 256 if example.dtype == np.uint8 else 0
    return Rows(
        spec,
        size,
        example.shape,
        levels,
        False,
        lambda rows: read(rows, rows.tolist()),
        visit=lambda rows, key: read(rows, seeds_of(key, len(rows))),
        whole=example.dtype.kind in "iu" and not levels,
    )


def _item_reader(data: Any, spec: str, column: str | None) -> Callable[[int], np.ndarray]:
    return lambda row: sample_of(spec, data[row], column, f"item {row}")


def _is_hugging(data: Any, name: str) -> bool:
    """Whether data are of a class of `datasets`, which is not imported for the question."""
    return isinstance(data, getattr(sys.modules.get("datasets"), name, ()))


# ------------------------------------------------------------------ what can only be read through


def _passed(
    data: Any,
    column: str | None,
    batch_size: int | None,
    validation: Any,
    test: Any,
    scaling: Scaling | str | None,
) -> Source:
    """A source of a loader or an iterable, in its own order."""
    spec, loader = type(data).__name__, isinstance(data, DataLoader)
    if loader:
        check_loader(spec, data, batch_size)
    first = one_pass(spec, data, column)
    found = list(itertools.islice(first, 2 * _READ_THROUGH + 1))
    example = first_sample(spec, found)
    usual = _READ_THROUGH
    if len(found) <= 2 * _READ_THROUGH:  # all that there are
        usual = default_held(len(found))
    counts = [_count(each, name) for name, each in (("validation", validation), ("test", test))]
    n_validation, n_test = (usual if count is None else count for count in counts)
    held = n_validation + n_test
    found += itertools.islice(first, statistics_rows(example.shape))
    rule = f"hold at least {held + 1} samples, {held} of them held out (validation=, test=)"
    check_set(spec, len(found) > held, rule, len(found))
    if loader and held:
        warnings.warn(
            f"{_WHERE}: the first {held} samples of {spec} are also trained on, for its order is "
            "its own (validation= and test= take data apart)",
            stacklevel=3,
        )
    raw = stacked(spec, found, example)
    levels = 256 if example.dtype == np.uint8 else 0
    some = (raw if loader else raw[held:])[: statistics_rows(example.shape)]
    chunks = some.split(max(1, CHUNK_VALUES // example.size))
    chosen = chosen_scaling(spec, levels, chunks, scaling)
    numbers = torch.arange(held)
    return Source(
        spec=spec,
        shape=example.shape,
        scaling=chosen,
        std=root_mean_square(chosen, chunks),
        parts=Parts(None, numbers[:n_validation], numbers[n_validation:]),
        validation=raw[:n_validation].clone(),
        test=raw[n_validation:held].clone(),
        truth=None,
        reader=reader_of(Passes(spec, data, column, 0 if loader else held), example),
    )
