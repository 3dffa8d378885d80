"""Data sets for training: opened, split, scaled, augmented, and served as batches.

`open_source` reads digits, folders of images, parquet files, Hugging Face data sets, arrays and
known densities. 8-bit data are whole levels, spread over [-1, 1) by uniform noise (`Scaling`):
whole levels have no density, and a score exists for densities only: without that noise the
posterior variance of a constant pixel would be zero. Everything random here is a function of (seed,
step or offset, row), so that a resumed run sees the same batches. scikit-learn, pillow, pyarrow
and `datasets` come with the extra `app`. Only `hf:` writes to disk: to Hugging Face's own cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from ..checks import check_count, check_int, check_tensor, one_of, require
from ..random import STREAM_DEQUANTISE, STREAM_DISTORT, STREAM_FLIP, STREAM_ORDER, STREAM_SPLIT
from .readers import (
    CHUNK_VALUES,
    GREY_LEVELS,
    Examples,
    Rows,
    Stream,
    data_files,
    guarded,
    loaded,
    open_examples,
    open_rows,
    parse_spec,
    read_digits,
    refusal,
)

SHAPE = (8, 8)
LIMIT = 2**30
# Standard deviations of `distort`: rotation and shear in radians, log scale in x and y, shift in
# x and y as a fraction of half the image (0.3 pixel of a digit). About what separates two hands.
_DISTORTION = (0.105, 0.08, 0.06, 0.06, 0.075, 0.075)
_STATISTICS_ROWS, _STATISTICS_VALUES = 8192, 2**27


# ------------------------------------------------------------------------------------------ scaling


class Scaling(NamedTuple):
    """From raw values to data units and back. Plain numbers: exact in JSON.

    Whole levels 0 ... levels - 1: x = 2 (raw + u) / levels - 1, u uniform on [0, 1). Other data
    (levels 0): x = (raw - mean) / std.
    """

    levels: int = 0
    mean: float = 0.0
    std: float = 1.0

    @property
    def scale(self) -> float:
        """Raw units in one data unit: multiplies a std, its square a covariance."""
        return self.levels / 2 if self.levels else self.std

    @property
    def shift(self) -> float:
        """E[raw | x] = scale x + shift; for whole levels the mean 1/2 of u is taken off."""
        return (self.levels - 1) / 2 if self.levels else self.mean

    def forward(self, raw: Tensor, *, seed: int, offset: int = 0, first: int = 0) -> Tensor:
        """Raw values in data units.

        Args:
            raw: shape (B, *dims), uint8, float32 or float64.
            seed: key of u.
            offset: second key, such as the step of a training run.
            first: global index of row 0.

        Returns:
            float32, shape and device of raw.

        Raises:
            TypeError: raw is not a tensor.
            ValueError: raw has another dtype.
        """
        dtypes = (torch.uint8, torch.float32, torch.float64)
        check_tensor("Scaling.forward", "raw", raw, dtypes=dtypes)
        if self.levels:
            return dequantise(
                raw.float(), seed=seed, offset=offset, first=first, levels=self.levels
            )
        return ((raw.double() - self.mean) / self.std).float()

    def inverse(self, x: Tensor) -> Tensor:
        """Raw values of x, in its shape and dtype: the nearest whole level, or std x + mean.

        In float32 about one of 10^5 values lies so close to the edge of its level that it rounds
        into the next one.
        """
        check_tensor("Scaling.inverse", "x", x)
        if self.levels:
            return to_grey(x, levels=self.levels)
        return (x.double() * self.std + self.mean).to(x.dtype)

    def as_dict(self) -> dict[str, float]:
        """For a checkpoint: `Scaling.from_dict(json.loads(json.dumps(s.as_dict()))) == s`."""
        return dict(self._asdict())

    @classmethod
    def from_dict(cls, content: Any) -> Scaling:
        """Back from `as_dict`.

        Raises:
            ValueError: content is not what `as_dict` gives.
        """
        rule = "Scaling.from_dict: content must hold levels, mean and std > 0"
        if not isinstance(content, dict) or set(content) != set(cls._fields):
            raise ValueError(f"{rule}, got {content!r}")
        levels, mean, std = (content[name] for name in cls._fields)
        numbers = all(type(value) in (int, float) for value in (levels, mean, std))
        if not numbers or type(levels) is not int or levels < 0:
            raise ValueError(f"{rule}, got {content!r}")
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise ValueError(f"{rule}, got {content!r}")
        return cls(levels, float(mean), float(std))


def dequantise(
    grey: Tensor, *, seed: int, offset: int = 0, first: int = 0, levels: int = GREY_LEVELS
) -> Tensor:
    """2 (grey + u) / levels - 1 with u uniform on [0, 1): a sample with a density, in data units.

    Args:
        grey: whole grey levels 0 ... levels - 1. Shape (B, *dims), float32 or float64.
        seed: key of u.
        offset: second key, such as the step of a training run.
        first: global index of row 0.
        levels: 17 for digits, 256 for 8-bit data.

    Returns:
        Shape, dtype and device of grey, in [-1, 1]. NaN gives NaN.

    Raises:
        TypeError: grey is not a tensor.
        ValueError: grey has another dtype.
    """
    check_tensor("dequantise", "grey", grey)
    u = ops.uniform(
        grey.shape,
        seed=seed,
        offset=offset,
        first=first,
        stream=STREAM_DEQUANTISE,
        dtype=grey.dtype,
        device=grey.device,
    )
    return (grey + u) * (2 / levels) - 1


def to_grey(x: Tensor, *, levels: int = GREY_LEVELS) -> Tensor:
    """The grey level that a pixel in data units belongs to: the inverse of `dequantise`.

    Values outside [-1, 1) go to the nearest level. Shape and dtype of x.
    """
    return ((x + 1) * (levels / 2)).floor().clamp(0, levels - 1)


# ------------------------------------------------------------------------------------- augmentation


def augment(
    raw: Tensor,
    name: str,
    *,
    levels: int,
    seed: int,
    offset: int = 0,
    first: int = 0,
    batch_size: int,
) -> Tensor:
    """New variants of the rows [first, first + B) of a global batch.

    Args:
        raw: images, shape (B, height, width) or (B, C, height, width).
        name: "none"; "flip" mirrors left and right, each row with probability 1/2; "distort"
            passes the first half of the global batch through `distort`.
        levels: of whole levels, 0 for other data; see `Scaling`.
        seed: key of what is drawn.
        offset: second key, such as the step of a training run.
        first: index of row 0 in the global batch.
        batch_size: rows of the global batch.

    Returns:
        Shape, dtype and device of raw; whole levels stay whole.

    Raises:
        ValueError: an unknown name, rows that are no images, or `distort` without whole levels.
    """
    one_of("augment", "name", name, ("none", "flip", "distort"))
    if name == "none":
        return raw
    if raw.dim() not in (3, 4):
        raise ValueError(
            f"augment: raw must hold images, (B, height, width) or (B, C, height, width), for "
            f"{name}, got {tuple(raw.shape)}"
        )
    if name == "flip":
        u = ops.uniform(
            (len(raw),),
            seed=seed,
            offset=offset,
            first=first,
            stream=STREAM_FLIP,
            dtype=torch.float32,
            device=raw.device,
        )
        return torch.where((u < 0.5).reshape(-1, *[1] * (raw.dim() - 1)), raw.flip(-1), raw)
    if not levels:
        raise ValueError("augment: distort needs whole levels, got levels 0 (floating data)")
    half = min(max(batch_size // 2 - first, 0), len(raw))
    head = raw[:half].to(torch.promote_types(raw.dtype, torch.float32))
    bent = distort(head, seed=seed, offset=offset, first=first, levels=levels)
    return torch.cat([bent.to(raw.dtype), raw[half:]])


def distort(
    grey: Tensor, *, seed: int, offset: int = 0, first: int = 0, levels: int = GREY_LEVELS
) -> Tensor:
    """Rotates, shears, scales and shifts each image a little, then rounds to grey levels again.

    1257 digits are few: a network learns them by heart, its errors on new digits are then larger
    than those it was trained on, and the covariance it learned is too small. New variants of each
    digit narrow that gap. What comes in from outside the image is level 0.

    Args:
        grey: whole grey levels. Shape (B, height, width) or (B, C, height, width), float32 or
            float64. The channels of an image move together.
        seed: key of the distortions.
        offset: second key, such as the step of a training run.
        first: global index of row 0.
        levels: 17 for digits, 256 for 8-bit data.

    Returns:
        Whole grey levels, shape, dtype and device of grey.

    Raises:
        TypeError: grey is not a tensor.
        ValueError: grey has another dtype or shape.
    """
    check_tensor("distort", "grey", grey)
    if grey.dim() not in (3, 4):
        raise ValueError(
            f"distort: grey must have shape (B, height, width) or (B, C, height, width), "
            f"got {tuple(grey.shape)}"
        )
    if grey.numel() == 0:
        return grey.clone()  # torch's grid refuses to be empty
    drawn = ops.normal(
        (grey.shape[0], len(_DISTORTION)),
        seed=seed,
        offset=offset,
        first=first,
        stream=STREAM_DISTORT,
        dtype=grey.dtype,
        device=grey.device,
    )
    angle, shear, scale_x, scale_y, shift_x, shift_y = (drawn * drawn.new_tensor(_DISTORTION)).T
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack(
        [
            torch.stack([scale_x.exp() * cos, shear - sin, shift_x], -1),
            torch.stack([sin, scale_y.exp() * cos, shift_y], -1),
        ],
        1,
    )
    images = grey if grey.dim() == 4 else grey.unsqueeze(1)
    grid = functional.affine_grid(rows, list(images.shape), align_corners=False)
    moved = functional.grid_sample(
        images, grid, mode="bicubic", padding_mode="zeros", align_corners=False
    )
    return moved.reshape(grey.shape).round().clamp(0, levels - 1)


# ------------------------------------------------------------------------------- parts and batches


class Digits(NamedTuple):
    """Whole grey levels 0 ... 16, float32, shape (n, 8, 8), in three disjoint parts."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load_digits(*, seed: int = 0, validation: int = 180, test: int = 360) -> Digits:
    """The 1797 digits that come with scikit-learn, split at random; nothing is downloaded.

    The scans are of 13 writers, and a random split puts every writer into every part: held-out
    digits are new digits, not new hands.

    Args:
        seed: of the split.
        validation: digits to tune on, here the recalibration.
        test: digits to report on. The rest, 1257 by default, is for training.

    Returns:
        Digits, in grey levels: see `dequantise`.

    Raises:
        ValueError: a part is empty, or nothing would be left to train on.
        RuntimeError: scikit-learn is missing.

    Reference:
        Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI repository.
    """
    grey = torch.from_numpy(read_digits("load_digits")).float()
    if validation < 1 or test < 1:
        raise _too_few("load_digits", len(grey), validation, test)
    return Digits(
        *(grey[rows] for rows in _split("load_digits", len(grey), seed, validation, test))
    )


class Parts(NamedTuple):
    """Row numbers of the parts, int64; `train` is None where the data are a stream.

    Those of `test` count rows of the test set where that is a set of its own.
    """

    train: Tensor | None
    validation: Tensor
    test: Tensor


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
        if not 0 <= start <= stop <= batch_size:
            raise ValueError(
                f"Source.batch: start and stop must satisfy 0 <= start <= stop <= {batch_size}, "
                f"got {start} and {stop}"
            )
        return self.reader(step, batch_size, seed, start, stop)


def batch_rows(
    n: int, batch_size: int, *, seed: int, step: int, start: int = 0, stop: int | None = None
) -> Tensor:
    """Rows of the batch of `step` >= 0: a fresh permutation of 0 ... n - 1 for each epoch.

    Args:
        n: rows to choose from.
        batch_size: rows of the global batch; it may pass the end of an epoch.
        seed: of the permutations.
        step: counts batches.
        start: first row of the share of the batch that is wanted.
        stop: one past its last row; the end of the batch by default.

    Returns:
        Shape (stop - start,), int64.
    """
    first = step * batch_size + start
    last = step * batch_size + (batch_size if stop is None else stop)
    pieces = [
        _epoch_order(n, seed, epoch)[max(first - epoch * n, 0) : last - epoch * n]
        for epoch in range(first // n, last // n + 1)
    ]
    return torch.cat(pieces)


@lru_cache(maxsize=2)  # two epochs meet in one batch; sorting 60,000 takes 5 ms
def _epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    u = ops.uniform((n,), seed=seed, offset=epoch, stream=STREAM_ORDER, dtype=torch.float64)
    return u.argsort(stable=True)  # 60,000 of 2^32 values may tie; else ranks might disagree


def _split(where: str, n: int, seed: int, validation: int, test: int) -> Parts:
    """Disjoint rows at random."""
    if validation + test >= n:
        raise _too_few(where, n, validation, test)
    order = _order(n, seed)
    test += validation
    return Parts(order[test:], order[:validation], order[validation:test])


def _order(n: int, seed: int) -> Tensor:
    u = ops.uniform((n,), seed=seed, stream=STREAM_SPLIT, dtype=torch.float64)
    return u.argsort(stable=True)


def _too_few(where: str, n: int, validation: int, test: int) -> ValueError:
    return ValueError(
        f"{where}: validation and test must be at least 1 and sum to less than {n}, got "
        f"{validation} and {test}"
    )


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
            "density:NAME", 100,000 draws from `known_density(NAME)`, not scaled.
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
    """
    kind, target = parse_spec("spec", spec)
    check_int("open_source", "seed", seed, 2**63)
    check_count("open_source", "limit", limit, limit=2**63)
    check_count("open_source", "buffer", buffer)
    for name, value in (("validation", validation), ("test", test)):
        if value is not None:
            check_count("open_source", name, value)
    if split != "train" and kind != "hf":
        raise ValueError(f"open_source: split must be 'train' for {spec}, got {split!r}")
    if column is not None and kind not in ("hf", "parquet", "npy"):
        raise ValueError(f"open_source: column must be None for {spec}, got {column!r}")
    if test_spec is not None:
        _refuse_overlap(spec, test_spec)
    elif kind == "hf" and "test" not in split and _has_test(spec, target):
        test_spec = spec
    if streaming:
        examples = open_examples(spec, column, split)
        other = None if test_spec is None else open_examples(test_spec, column, "test")
        return _stream_source(examples, other, validation or 1000, test, buffer)
    rows = open_rows(spec, seed, column, split, limit)
    own = None if test_spec is None else open_rows(test_spec, seed, column, "test", limit)
    n_validation, n_test = (
        (180, 360) if kind == "digits" else [max(1, min(1000, rows.size // 20))] * 2
    )
    n_validation, n_test = validation or n_validation, test or n_test
    parts = _split("open_source", rows.size, seed, n_validation, n_test if own is None else 0)
    if own is not None:
        parts = parts._replace(test=_own_test(rows, own, seed, test))
    train = parts.train
    assert train is not None

    def read(step: int, batch_size: int, seed: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        place = batch_rows(len(train), batch_size, seed=seed, step=step, start=start, stop=stop)
        return train[place], rows.read(train[place])

    some = train[: _statistics_rows(rows.shape)]
    scaling = Scaling(levels=rows.levels)
    if not rows.levels and rows.truth is None:
        scaling = _standardise(spec, rows.chunks(train if rows.resident else some))
    return Source(
        spec=spec,
        shape=rows.shape,
        scaling=scaling,
        std=_root_mean_square(scaling, rows.chunks(some)),
        parts=parts,
        validation=_held(rows, parts.validation, limit),
        test=_held(rows if own is None else own, parts.test, limit),
        truth=rows.truth,
        reader=read,
    )


def _refuse_overlap(spec: str, test_spec: str) -> None:
    """A file of both would be tested on after training on it."""
    parse_spec("test_spec", test_spec)
    both = {p.resolve() for p in data_files(spec)} & {p.resolve() for p in data_files(test_spec)}
    if both or (spec == test_spec and not spec.startswith("hf:")):
        raise ValueError(
            f"open_source: test_spec must share nothing with {spec}, got "
            f"{min(both) if both else test_spec} in both"
        )


def _has_test(spec: str, name: str) -> bool:
    datasets = require("open_source", "datasets")
    return "test" in loaded(spec, datasets.get_dataset_split_names, name)


def _own_test(rows: Rows, own: Rows, seed: int, test: int | None) -> Tensor:
    """Rows of a test set of its own: all of them in order, or some at random."""
    if (own.shape, own.levels) != (rows.shape, rows.levels):
        raise ValueError(
            f"open_source: test_spec must hold samples {rows.shape} of {rows.levels} levels like "
            f"{rows.spec}, got {own.shape} of {own.levels} levels"
        )
    if test is not None and test > own.size:
        raise ValueError(
            f"open_source: test must be at most the {own.size} rows of {own.spec}, got {test}"
        )
    return torch.arange(own.size) if test is None else _order(own.size, seed)[:test]


def _held(rows: Rows, numbers: Tensor, limit: int) -> Tensor:
    """Rows that stay in memory."""
    needed = len(numbers) * math.prod(rows.shape) * (1 if rows.levels else 8)
    if not rows.resident and needed > limit:
        rule = f"fit in the limit of {limit} bytes where it is held in memory"
        raise refusal(rows.spec, rule, f"{len(numbers)} rows of {needed} bytes")
    return rows.read(numbers)


def _stream_source(
    examples: Examples, other: Examples | None, validation: int, test: int | None, buffer: int
) -> Source:
    """The first rows are held out and never trained on; `skip` also keeps the files in order."""
    spec = examples.spec
    held = validation + (test or 1000 if other is None else 0)
    head = guarded(spec, examples.dataset)
    found = list(itertools.islice(head, held + 1))
    if len(found) <= held:
        raise _too_few("open_source", len(found), validation, held - validation)
    first = examples.decode(found[0])
    if first.ndim == 0 or first.size == 0:
        raise refusal(spec, "not be empty", f"shape {first.shape} in {examples.name(0)}")
    found += itertools.islice(head, _statistics_rows(first.shape) - 1)
    head.close()
    numbers, raw = examples.read(found, first)
    test_numbers, tests = numbers[validation:held], raw[validation:held]
    if other is not None:
        own = list(itertools.islice(guarded(other.spec, other.dataset), test or 1000))
        if len(own) < (test or 1):
            raise ValueError(
                f"open_source: test must be at most the {len(own)} rows of {other.spec}, got "
                f"{test or 1}"
            )
        test_numbers, tests = other.read(own, first)
    some = raw[held:].split(max(1, CHUNK_VALUES // first.size))
    scaling = Scaling(levels=256) if first.dtype == np.uint8 else _standardise(spec, some)
    stream = Stream(spec, examples.dataset.skip(held), buffer)

    def read(step: int, batch_size: int, seed: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        batch = stream.take(step * batch_size, (step + 1) * batch_size, seed)
        return examples.read(batch[start:stop], first)

    return Source(
        spec=spec,
        shape=first.shape,
        scaling=scaling,
        std=_root_mean_square(scaling, some),
        parts=Parts(None, numbers[:validation], test_numbers),
        validation=raw[:validation].clone(),
        test=tests.clone(),
        truth=None,
        reader=read,
    )


def _statistics_rows(shape: tuple[int, ...]) -> int:
    return max(1, min(_STATISTICS_ROWS, _STATISTICS_VALUES // math.prod(shape)))


def _standardise(spec: str, chunks: Iterable[Tensor]) -> Scaling:
    """One mean and one standard deviation, in float64, of chunks merged one by one."""
    n, mean, squares = 0, 0.0, 0.0
    for chunk in chunks:
        values = chunk.double()
        more, step = values.numel(), float(values.mean()) - mean
        squares += float((values - values.mean()).square().sum())
        squares += step**2 * n * more / (n + more)
        n += more
        mean += step * more / n
    std = math.sqrt(squares / n)
    if not 0 < std < math.inf:
        raise refusal(spec, "vary", f"standard deviation {std}")
    return Scaling(mean=mean, std=std)


def _root_mean_square(scaling: Scaling, chunks: Iterable[Tensor]) -> float:
    n, total = 0, 0.0
    for chunk in chunks:
        x = scaling.forward(chunk, seed=0, first=n)
        total += float(x.double().square().mean()) * len(x)
        n += len(x)
    return math.sqrt(total / n)


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
    """
    rows = open_rows(spec, 0, column, split, limit)
    return _held(rows, torch.arange(rows.size), limit)
