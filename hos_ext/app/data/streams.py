"""Sets too large for memory or disk: read as a stream, in an order that can be resumed."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...random import Key
from .images import fit_image, places_of
from .pictures import Pictures
from .rows import Request, alike, check_set, error_line, finite, refusal

_ROW = "row of the stream"


class Examples(NamedTuple):
    """An IterableDataset whose examples carry row numbers, and what makes samples of them.

    Attributes:
        spec: what was opened.
        dataset: the IterableDataset of `datasets`.
        decode: an example as an array.
        name: of a row number, for messages.
        pictures: what is done to pictures; decoded ones have their own size.
        label: the number of the class of an example, and `names` those of the classes, where they
            were asked for.
    """

    spec: str
    dataset: Any
    decode: Callable[[dict[str, Any]], np.ndarray]
    name: Callable[[int], str]
    pictures: Pictures = Pictures()
    label: Callable[[dict[str, Any], int], int] | None = None
    names: tuple[str, ...] = ()

    def labels(self, examples: list[dict[str, Any]]) -> Tensor:
        """The classes of examples. Shape (n,), int64."""
        assert self.label is not None
        found = [self.label(content, content[_ROW]) for content in examples]
        for content, number in zip(examples, found, strict=True):
            rule = f"have labels in 0 ... {len(self.names) - 1}"
            good = 0 <= number < len(self.names)
            check_set(self.spec, good, rule, f"{number} in {self.name(content[_ROW])}")
        return torch.tensor(found, dtype=torch.int64)

    def sample(self, content: dict[str, Any], place: Tensor | None = None) -> np.ndarray:
        """An example as an array; of a picture the cut at a place, or at the middle."""
        values = self.decode(content)
        if self.pictures.size is None:
            return values
        return fit_image(self.spec, values, self.name(content[_ROW]), self.pictures, place)

    def read(
        self, examples: list[dict[str, Any]], example: np.ndarray, key: Key | None = None
    ) -> tuple[Tensor, Tensor]:
        """Row numbers and samples, all of them like an example; cuts are drawn by a key."""
        numbers = [content[_ROW] for content in examples]
        samples = np.empty((len(examples), *example.shape), example.dtype)
        drawn = key is not None and self.pictures.drawn
        places = places_of(key, len(examples)) if drawn and key is not None else None
        for i, content in enumerate(examples):
            sample = self.sample(content, None if places is None else places[i])
            place = self.name(numbers[i])
            samples[i] = alike(self.spec, example, "the first", sample, place)
        raw = finite(self.spec, torch.from_numpy(samples), lambda i: self.name(numbers[i]))
        return torch.tensor(numbers, dtype=torch.int64), raw


def examples_of(
    spec: str,
    dataset: Any,
    decode: Callable[[dict[str, Any], str], np.ndarray],
    name: Callable[[int], str],
    pictures: Pictures | None = None,
) -> Examples:
    """Numbers the examples of an IterableDataset.

    Args:
        spec: what was opened.
        dataset: the IterableDataset.
        decode: an example, and its name for messages, as an array.
        name: of a row number.
        pictures: what is done to pictures.
    """
    numbered = dataset.map(lambda _, row: {_ROW: row}, with_indices=True)
    return Examples(
        spec,
        numbered,
        lambda example: decode(example, name(example[_ROW])),
        name,
        pictures or Pictures(),
    )


def streamed(request: Request) -> Pictures:
    """What is done to the pictures of a stream, whose pages cannot be counted beforehand."""
    rule = "be no stream for --pages all"
    check_set(request.spec, request.pictures.pages != "all", rule, "streaming")
    return request.pictures


class Stream:
    """The endless sequence of shuffled epochs of an IterableDataset; examples are not decoded."""

    def __init__(self, spec: str, dataset: Any, buffer: int) -> None:
        self._spec, self._dataset, self._buffer = spec, dataset, buffer
        self._latest: tuple[tuple[int, int, int] | None, list[dict[str, Any]]] = (None, [])
        self._length: list[int] = []  # of an epoch, once one has been read to its end
        self._epochs: list[Generator[dict[str, Any], None, None]] = []
        # What `datasets` leaves open when Python ends complains on its way out.
        weakref.finalize(self, _close, self._epochs)

    def take(self, start: int, stop: int, seed: int) -> list[dict[str, Any]]:
        """Examples [start, stop); the latest answer is kept, for other shares of it."""
        key, examples = self._latest
        if key != (start, stop, seed):
            if key is None or key[1:] != (start, seed):
                self._seek(start, seed)
            self._latest = (None, [])  # an error below leaves the position unknown
            examples = list(itertools.islice(self._epochs[0], stop - start))
            self._latest = ((start, stop, seed), examples)
        return examples

    def _seek(self, position: int, seed: int) -> None:
        known = bool(self._length)
        epoch, skip = divmod(position, self._length[0]) if known else (0, position)
        _close(self._epochs)
        epochs = _endless(self._spec, self._dataset, self._buffer, seed, epoch, self._length)
        self._epochs.append(epochs)
        for _ in range(skip):
            next(epochs)
            if self._length and not known:  # no need to read all the epochs before
                return self._seek(position, seed)


def _endless(
    spec: str, dataset: Any, buffer: int, seed: int, epoch: int, length: list[int]
) -> Generator[dict[str, Any], None, None]:
    while True:
        key, n = np.random.default_rng([seed, epoch]), 0
        for example in guarded(spec, dataset.shuffle(generator=key, buffer_size=buffer)):
            n += 1
            yield example
        length[:] = [n]
        epoch += 1


def guarded(spec: str, dataset: Any) -> Generator[dict[str, Any], None, None]:
    """The examples of a stream; its errors in one line."""
    try:
        yield from dataset
    except Exception as error:  # of `datasets`, the network, the files
        rule = "be a stream that `datasets` can read"
        raise refusal(spec, rule, error_line(error)) from None


def _close(generators: list[Generator[dict[str, Any], None, None]]) -> None:
    while generators:
        generators.pop().close()
