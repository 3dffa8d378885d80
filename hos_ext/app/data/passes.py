"""Data that are only read through: loaders and iterable data sets of torch, in their own order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from ...random import Key
from .items import Drawing, sample_of, seeds_of
from .rows import alike, cast, check_layout, check_set, finite, kept_dtype, refusal


class Passes:
    """The endless sequence of the samples of an iterable, pass after pass.

    Each pass begins from random generators of its own, seeded by (seed, number of the pass): what
    torch, numpy.random and random draw in this process, the order of a loader among it, is the same
    whenever the pass is read again.

    Args:
        spec: for messages.
        data: a loader, whose batches are taken apart, or an iterable of items.
        column: see `sample_of`.
        skip: samples that each pass leaves out at its beginning, for they are held out.
    """

    def __init__(self, spec: str, data: Iterable[Any], column: str | None, skip: int = 0) -> None:
        self.spec = spec
        self._data, self._column, self._skip = data, column, skip
        self._place: tuple[int, int] | None = None  # (position, seed) of the next sample
        self._latest: tuple[Any, list[np.ndarray]] = (None, [])
        self._length: list[int] = []  # of a pass, once one has been read to its end
        # No method: a cycle would keep the workers of a loader waiting when it is collected.
        self._samples: Iterator[np.ndarray] = iter(())

    def take(self, start: int, stop: int, seed: int) -> list[np.ndarray]:
        """Samples [start, stop) of the sequence; the latest answer is kept, for other shares."""
        key = (start, stop, seed)
        if self._latest[0] != key:
            if self._place != (start, seed):
                self._seek(start, seed)
            self._place = None  # an error below leaves the position unknown
            found = list(itertools.islice(self._samples, stop - start))
            self._latest, self._place = (key, found), (stop, seed)
        return self._latest[1]

    def _seek(self, position: int, seed: int) -> None:
        known = bool(self._length)
        number, left = divmod(position, self._length[0]) if known else (0, position)
        self._samples = _endless(
            self.spec, self._data, self._column, self._skip, seed, number, self._length
        )
        for _ in range(left):
            next(self._samples)
            if self._length and not known:  # no need to read all the passes before
                return self._seek(position, seed)


def _endless(
    spec: str,
    data: Iterable[Any],
    column: str | None,
    skip: int,
    seed: int,
    number: int,
    length: list[int],
) -> Iterator[np.ndarray]:
    """The samples of one pass after another, from that of a number on."""
    while True:
        count = 0
        for sample in itertools.islice(one_pass(spec, data, column, seed, number), skip, None):
            count += 1
            yield sample
        check_set(spec, count, "hold samples beside those held out", f"{skip} in all")
        length[:] = [count]
        number += 1


def one_pass(
    spec: str, data: Iterable[Any], column: str | None, seed: int = 0, number: int = 0
) -> Iterator[np.ndarray]:
    """The samples of a pass; arguments as `Passes` has them."""
    start = seeds_of(Key(seed, number), 1)[0]
    drawing = Drawing(start)
    for owner in _owners(data):
        if isinstance(getattr(owner, "generator", None), torch.Generator):
            owner.generator.manual_seed(start)
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(number)
    batches = isinstance(data, DataLoader) and data.batch_sampler is not None
    with drawing.here():
        items = iter(data)
    for place in itertools.count():
        with drawing.here():
            item = next(items, drawing)
        if item is drawing:
            return
        name = f"{'batch' if batches else 'item'} {place}"
        sample = sample_of(spec, item, column, name, axes=2 if batches else 1)
        if batches:
            check_set(spec, sample.ndim > 1, "give batches (B, *dims)", sample.shape)
            yield from sample
        else:
            yield sample


def check_loader(spec: str, loader: Any, batch_size: int | None) -> None:
    """Refuses a loader that shares data out itself, or whose batches are of another size.

    Args:
        spec: for messages.
        loader: of torch.
        batch_size: rows of a step of training, if they are known.
    """
    samplers = (loader.sampler, getattr(loader, "batch_sampler", None))
    shared = any(isinstance(each, DistributedSampler) for each in samplers)
    rule = "have no DistributedSampler (training shares each batch out over processes itself)"
    check_set(spec, not shared, rule, "one")
    rule = f"have the batch_size of the training, {batch_size} (or give its data set itself)"
    same = batch_size is None or loader.batch_size in (None, batch_size)
    check_set(spec, same, rule, loader.batch_size)


def _owners(data: Any) -> list[Any]:
    """Data, and the parts of a loader that may have random numbers of their own."""
    if not isinstance(data, DataLoader):
        return [data]
    return [data, data.dataset, data.sampler, data.batch_sampler]


def stacked(
    spec: str,
    samples: list[np.ndarray],
    example: np.ndarray,
    name: Callable[[int], str] = "sample {} of a batch".format,
) -> Tensor:
    """Samples as one tensor, all of them like an example."""
    kept = kept_dtype(spec, example.dtype)
    rows = np.empty((len(samples), *example.shape), kept)
    for i, sample in enumerate(samples):
        rows[i] = cast(spec, alike(spec, example, "the first", sample, name(i)), kept)
    return finite(spec, torch.from_numpy(rows), name)


def first_sample(spec: str, samples: list[np.ndarray]) -> np.ndarray:
    """The sample that all others must be like."""
    if not samples:
        raise refusal(spec, "not be empty", "none")
    example = samples[0]
    check_set(spec, example.size, "not be empty", f"shape {example.shape}")
    check_layout(spec, example.shape, f"shape {example.shape}")
    return example


Reader = Callable[[int, int, int, int, int], tuple[Tensor, Tensor]]


def reader_of(passes: Passes, example: np.ndarray) -> Reader:
    """What `Source.batch` calls; row numbers are places in the sequence."""

    def read(step: int, batch_size: int, seed: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        begin = step * batch_size
        samples = passes.take(begin, begin + batch_size, seed)[start:stop]
        numbers = torch.arange(begin + start, begin + stop)
        return numbers, stacked(passes.spec, samples, example)

    return read
