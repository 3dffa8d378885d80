"""Readers: the rows of digits, folders, parquet files, `datasets`, arrays and known densities.

Rows are read by number, or as a stream, and are raw: uint8 or floating. What would have to be cast,
converted or guessed is refused in one line that names the sample. Only `hf:` writes to disk: to
Hugging Face's own cache.
"""

from __future__ import annotations

import bisect
import glob
import io
import itertools
import math
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..checks import one_of, require
from ..densities.gaussian import Gaussian, GaussianMixture
from ..densities.logistic import ProductLogisticMixture

GREY_LEVELS = 17
_KINDS = "digits, hf:NAME, parquet:PATH, folder:PATH, npy:PATH or density:NAME"
_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm")
# What numbers are kept as; all conversions are exact.
_KEPT = {"uint8": "uint8", "float16": "float32", "float32": "float32", "float64": "float64"}
_DENSITY_ROWS = 100_000
CHUNK_VALUES = 2**22
_ROW = "row of the stream"


def known_density(
    name: str,
) -> Gaussian | GaussianMixture | ProductLogisticMixture:
    """A density with known scores, always the same one, in float64.

    Args:
        name: "gaussian2d", a correlated normal; "normal100", a normal in 100 dimensions with five
            strong directions, variances 10, 7, 5, 3 and 2 over 0.1; "modes2d", two modes; or
            "logistic50", 50 independent coordinates, each a mixture of 20 logistics.

    Raises:
        ValueError: an unknown name.
    """
    one_of("known_density", "name", name, ("gaussian2d", "normal100", "modes2d", "logistic50"))
    wide = torch.float64
    if name == "gaussian2d":
        covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=wide)
        return Gaussian(torch.zeros(2, dtype=wide), covariance)
    if name == "modes2d":
        return GaussianMixture(
            torch.tensor([0.4, 0.6], dtype=wide),
            torch.tensor([[-1.2, -0.4], [0.8, 0.5]], dtype=wide),
            torch.tensor([[[0.15, 0.1], [0.1, 0.12]], [[0.2, -0.08], [-0.08, 0.06]]], dtype=wide),
        )
    if name == "normal100":
        strong = torch.linalg.qr(ops.normal((100, 5), seed=100, dtype=wide))[0]
        variances = torch.tensor([10.0, 7.0, 5.0, 3.0, 2.0], dtype=wide)
        covariance = 0.1 * torch.eye(100, dtype=wide) + (strong * variances) @ strong.mT
        covariance = (covariance + covariance.mT) / 2
        return Gaussian(torch.zeros(100, dtype=wide), covariance)
    size = (50, 20)
    return ProductLogisticMixture(
        ops.normal(size, seed=50, stream=0, dtype=wide).softmax(-1),
        2 * ops.uniform(size, seed=50, stream=1, dtype=wide) - 1,
        0.02 + 0.08 * ops.uniform(size, seed=50, stream=2, dtype=wide),
    )


# ------------------------------------------------------------------------------------ rows of a set
# From here on: readers. They know nothing of parts, batches and scaling.


class Rows(NamedTuple):
    """Samples by number: `read` takes int64 rows. `resident`: all of them are in memory."""

    spec: str
    size: int
    shape: tuple[int, ...]
    levels: int
    resident: bool
    read: Callable[[Tensor], Tensor]
    truth: Any = None

    def chunks(self, rows: Tensor) -> Iterator[Tensor]:
        for some in rows.split(max(1, CHUNK_VALUES // math.prod(self.shape))):
            yield self.read(some)


def refusal(spec: str, rule: str, got: object) -> ValueError:
    return ValueError(f"open_source: {spec} must {rule}, got {got}")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:300]


def parse_spec(argument: str, spec: object) -> tuple[str, str]:
    if spec == "digits":
        return "digits", ""
    kind, _, target = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if kind not in ("hf", "parquet", "folder", "npy", "density") or not target:
        raise ValueError(f"open_source: {argument} must be {_KINDS}, got {spec!r}")
    return kind, target


def open_rows(spec: str, seed: int, column: str | None, split: str, limit: int) -> Rows:
    kind, target = parse_spec("spec", spec)
    if kind == "digits":
        return _array_rows(spec, read_digits("open_source"), str, limit, levels=GREY_LEVELS)
    if kind == "density":
        truth = known_density(target)
        draws = truth.sample(_DENSITY_ROWS, seed=seed).float().numpy()
        return _array_rows(spec, draws, str, limit)._replace(truth=truth)
    if kind == "npy":
        path = data_files(spec)[0]
        array = _load_array(spec, path, column)
        return _array_rows(spec, array, lambda i: f"row {i} of {path}", limit)
    if kind == "folder":
        files = data_files(spec)
        return _image_rows(
            spec, len(files), lambda i: {"path": str(files[i])}, lambda i: str(files[i]), limit
        )
    return _table_rows(spec, column, split, limit)


def data_files(spec: str) -> list[Path]:
    """The files behind a spec, sorted; none for those that are not files."""
    kind, target = parse_spec("spec", spec)
    if kind not in ("parquet", "folder", "npy"):
        return []
    path = Path(target).expanduser()
    endings = {"parquet": (".parquet",), "folder": _IMAGE_FILES, "npy": (".npy", ".npz")}[kind]
    if path.is_dir() and kind != "npy":
        below = (p.relative_to(path) for p in path.rglob("*") if p.suffix.lower() in endings)
        shown = sorted(p for p in below if not any(part.startswith(".") for part in p.parts))
        files = [path / p for p in shown if (path / p).is_file()]
    elif kind == "parquet" and not path.exists():
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise refusal(spec, f"name files that exist ({' '.join(endings)})", "none")
    return files


def read_digits(where: str) -> np.ndarray:
    images = require(where, "sklearn.datasets").load_digits().images
    return np.asarray(images, dtype=np.uint8)  # whole numbers 0 ... 16, held as float64


def _array_rows(
    spec: str, array: np.ndarray, name: Callable[[int], str], limit: int, *, levels: int = 256
) -> Rows:
    """Rows of an array (n, *dims), copied to memory where they fit."""
    kept = _kept(spec, array.dtype)
    if array.ndim < 2:
        raise refusal(spec, "have shape (n, *dims)", array.shape)
    if array.size == 0:
        raise refusal(spec, "not be empty", f"shape {array.shape}")

    def tensor(values: np.ndarray, name: Callable[[int], str]) -> Tensor:
        return _finite(spec, torch.from_numpy(np.array(values, dtype=kept)), name)

    shape, levels = tuple(array.shape[1:]), levels if kept == "uint8" else 0
    if array.size * np.dtype(kept).itemsize <= limit:
        everything = tensor(array, name)
        return Rows(spec, len(array), shape, levels, True, lambda rows: everything[rows])

    def read(rows: Tensor) -> Tensor:
        return tensor(array[rows.numpy()], lambda i: name(int(rows[i])))

    return Rows(spec, len(array), shape, levels, False, read)


def _kept(spec: str, dtype: np.dtype) -> str:
    """The dtype that numbers are kept in, without loss."""
    if dtype.name not in _KEPT:
        rule = (
            "hold uint8 (256 levels) or floating numbers (convert whole levels 0 to 255 to uint8, "
            "anything else to float32)"
        )
        raise refusal(spec, rule, dtype.name)
    return _KEPT[dtype.name]


def _finite(spec: str, values: Tensor, name: Callable[[int], str]) -> Tensor:
    """values, without NaN and infinities; `name` says which sample row i is."""
    done = 0
    for chunk in values.split(max(1, CHUNK_VALUES // math.prod(values.shape[1:]))):
        bad = ~chunk.isfinite() if chunk.is_floating_point() else torch.zeros(())
        if bool(bad.any()):
            row = int(bad.flatten(1).any(1).nonzero()[0])
            worst = chunk[row][bad[row]][0].item()
            raise refusal(spec, "hold finite numbers", f"{worst} in {name(done + row)}")
        done += len(chunk)
    return values


def _load_array(spec: str, path: Path, column: str | None) -> np.ndarray:
    names: list[str] = []
    try:
        with path.open("rb") as file:
            if path.suffix == ".npz":
                content = np.load(file, allow_pickle=False)
                names = content.files
                column = names[0] if column is None and len(names) == 1 else column
                array = content[column] if column in names else np.empty(0)
            else:
                array = np.lib.format.open_memmap(path, mode="r")  # no pickle is read
    except Exception as error:  # numpy, zipfile and zlib have kinds of their own
        rule = "hold a whole .npy or .npz file of numbers (no objects: no pickle is read)"
        raise refusal(spec, rule, _line(error)) from None
    if (column or names) and column not in names:
        known = f"one of the arrays {names}" if names else "None for an .npy file"
        raise ValueError(f"open_source: column must be {known} of {path}, got {column!r}")
    return array


# ------------------------------------------------------------------------------------------- images


def _image_rows(
    spec: str, size: int, fetch: Callable[[int], Any], name: Callable[[int], str], limit: int
) -> Rows:
    """Rows of encoded images, decoded at once where they fit in memory."""
    first = _decode(spec, fetch(0), name(0))

    def decode(i: int) -> np.ndarray:
        return _alike(spec, first, name(0), _decode(spec, fetch(i), name(i)), name(i))

    shape, levels = first.shape, 256 if first.dtype == np.uint8 else 0
    if size * first.nbytes <= limit:
        images = np.empty((size, *shape), first.dtype)
        for i in range(size):
            images[i] = decode(i)
        everything = _finite(spec, torch.from_numpy(images), name)
        return Rows(spec, size, shape, levels, True, lambda rows: everything[rows])

    def read(rows: Tensor) -> Tensor:
        if first.nbytes < 2**16:  # threads cost more than a small image
            images = [decode(i) for i in rows.tolist()]
        else:
            with ThreadPoolExecutor() as pool:  # pillow decodes without the lock of Python
                images = list(pool.map(decode, rows.tolist()))
        batch = torch.from_numpy(np.stack(images) if images else np.empty((0, *shape), first.dtype))
        return _finite(spec, batch, lambda i: name(int(rows[i])))

    return Rows(spec, size, shape, levels, False, read)


def _decode(spec: str, value: Any, name: str) -> np.ndarray:
    """The struct of `datasets`, with bytes or a path, as an image (C, height, width)."""
    pillow, exif = require("open_source", "PIL.Image"), require("open_source", "PIL.ImageOps")
    data = value.get("bytes") if value else None
    path = str(value.get("path") or "") if value else ""
    if data is None and not path:
        raise refusal(spec, "hold an image in every row", f"none in {name}")
    try:
        if data is None and "://" in path:  # streams of the hub have addresses
            with require("open_source", "fsspec").open(path, "rb") as file:
                data = file.read()
        elif data is None:
            data = Path(path).read_bytes()
        with pillow.open(io.BytesIO(data)) as image:
            frames, mode = getattr(image, "n_frames", 1), image.mode
            image.load()
            exif.exif_transpose(image, in_place=True)
            values: np.ndarray = np.asarray(image)
    except Exception as error:  # pillow lets many kinds through: OSError, struct.error, zlib.error
        raise refusal(spec, "hold images that can be read", f"{name}: {_line(error)}") from None
    if frames > 1:
        raise refusal(spec, "hold single images", f"{frames} in {name}")
    if mode not in ("L", "RGB", "F"):
        rule = "hold 8-bit grey (L), RGB or floating grey (F) images (convert others first)"
        raise refusal(spec, rule, f"mode {mode} in {name}")
    planes = values.transpose(2, 0, 1) if mode == "RGB" else values[np.newaxis]
    return np.ascontiguousarray(planes)


def _alike(
    spec: str, first: np.ndarray, first_name: str, other: np.ndarray, name: str
) -> np.ndarray:
    if (other.shape, other.dtype) != (first.shape, first.dtype):
        got = f"{first.shape} {first.dtype} in {first_name}"
        got = f"{got} and {other.shape} {other.dtype} in {name}"
        raise refusal(spec, "hold samples of one shape and kind", got)
    return other


# --------------------------------------------------------------------------- parquet and `datasets`


def _table_rows(spec: str, column: str | None, split: str, limit: int) -> Rows:
    """A column of parquet files, or of a data set that `datasets` has in its cache."""
    datasets, arrow = require("open_source", "datasets"), require("open_source", "pyarrow")
    kind, target = parse_spec("spec", spec)
    if kind == "hf":
        places, pieces = [spec], []
        dataset = loaded(spec, datasets.load_dataset, target, split=split)
        column, image = _choose_column(spec, dataset.features.to_dict(), column)
        pieces.append(dataset.select_columns([column]).with_format("arrow")[:].column(column))
    else:
        places, pieces, image = [str(path) for path in data_files(spec)], [], False
        for place in places:
            try:
                file = require("open_source", "pyarrow.parquet").ParquetFile(place)
                features = datasets.Features.from_arrow_schema(file.schema_arrow).to_dict()
                column, image = _choose_column(place, features, column)
                pieces.append(file.read(columns=[column]).column(0))
            except (OSError, arrow.ArrowException) as error:
                raise refusal(
                    spec, "hold whole parquet files", f"{place}: {_line(error)}"
                ) from None
            if pieces[-1].type != pieces[0].type:
                got = f"{pieces[0].type} in {places[0]} and {pieces[-1].type} in {place}"
                raise refusal(spec, f"hold one type in column {column!r}", got)
    starts = list(itertools.accumulate([len(piece) for piece in pieces], initial=0))
    values = arrow.chunked_array([c for p in pieces for c in p.chunks], type=pieces[0].type)

    def name(i: int) -> str:
        k = bisect.bisect_right(starts, i) - 1
        return f"row {i - starts[k]} of {places[k]}"

    if len(values) == 0:
        raise refusal(spec, "not be empty", "0 rows")
    if image:
        return _image_rows(spec, len(values), lambda i: values[i].as_py(), name, limit)
    return _array_rows(spec, _numbers(spec, values, name), name, limit)


def loaded(spec: str, load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return load(*arguments, **options)
    except Exception as error:  # of `datasets`, the hub, the network, the files
        raise refusal(spec, "be a data set that `datasets` can load", _line(error)) from None


def _choose_column(spec: str, features: dict[str, Any], column: str | None) -> tuple[str, bool]:
    """The column to read, and whether it holds images."""
    images = [name for name, feature in features.items() if _is_image(feature)]
    lists = [name for name, feature in features.items() if _number_type(feature)]
    choice = images or lists
    if column is None and len(choice) == 1:
        column = choice[0]
    if column is None or column not in images + lists:
        raise ValueError(
            f"open_source: column must be one of the images {images} or lists of numbers {lists} "
            f"of {spec}, got {column!r}"
        )
    return column, column in images


def _is_image(feature: Any) -> bool:
    """The feature Image, or its struct in a file without the metadata of `datasets`."""
    return isinstance(feature, dict) and (
        feature.get("_type") == "Image" or set(feature) == {"bytes", "path"}
    )


def _number_type(feature: Any) -> str:
    """The dtype of the numbers in nested lists or an array feature, "" for other features."""
    depth = 0
    while isinstance(feature, list) or "feature" in feature:
        feature, depth = feature[0] if isinstance(feature, list) else feature["feature"], depth + 1
    kind, dtype = str(feature.get("_type")), str(feature.get("dtype"))
    nested = kind.startswith("Array") or (depth > 0 and kind == "Value")
    return dtype if nested and dtype.startswith(("int", "uint", "float")) else ""


def _numbers(spec: str, values: Any, name: Callable[[int], str]) -> np.ndarray:
    """A column of nested lists as an array (n, *dims)."""
    arrow = require("open_source", "pyarrow")
    chunks = [getattr(chunk, "storage", chunk) for chunk in values.chunks]  # arrays of `datasets`
    flat, dims = arrow.concat_arrays(chunks), [len(values)]
    while arrow.types.is_nested(flat.type):
        row_of = math.prod(dims[1:])
        lengths = require("open_source", "pyarrow.compute").list_value_length(flat)
        lengths = lengths.fill_null(-1).to_numpy(zero_copy_only=False)
        odd = np.flatnonzero((lengths != lengths[0]) | (lengths < 1))
        if len(odd):
            got = f"{name(0)} and {name(odd[0] // row_of)}"
            raise refusal(spec, "hold lists of one length, not empty", f"others in {got}")
        dims.append(int(lengths[0]))
        flat = flat.flatten()
    _kept(spec, np.dtype(flat.type.to_pandas_dtype()))
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(dims)


# ------------------------------------------------------------------------------------------ streams


class Stream:
    """The endless sequence of shuffled epochs of an IterableDataset; examples are not decoded."""

    def __init__(self, spec: str, dataset: Any, buffer: int) -> None:
        self._spec, self._dataset, self._buffer = spec, dataset, buffer
        self._latest: tuple[tuple[int, int, int] | None, list[dict[str, Any]]] = (None, [])
        self._length: list[int] = []  # of an epoch, once one has been read to its end
        self._epochs: list[Generator[dict[str, Any], None, None]] = []
        # What `datasets` leaves open when Python ends complains on its way out.
        weakref.finalize(self, _close, self._epochs)

    def take(self, first: int, last: int, seed: int) -> list[dict[str, Any]]:
        """Examples [first, last); the latest answer is kept, for other shares of it."""
        key, examples = self._latest
        if key != (first, last, seed):
            if key is None or key[1:] != (first, seed):
                self._seek(first, seed)
            self._latest = (None, [])  # an error below leaves the position unknown
            examples = list(itertools.islice(self._epochs[0], last - first))
            self._latest = ((first, last, seed), examples)
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
    try:
        yield from dataset
    except Exception as error:  # of `datasets`, the network, the files
        raise refusal(spec, "be a stream that `datasets` can read", _line(error)) from None


def _close(generators: list[Generator[dict[str, Any], None, None]]) -> None:
    while generators:
        generators.pop().close()


class Examples(NamedTuple):
    """An IterableDataset whose examples carry row numbers, and what makes samples of them."""

    spec: str
    dataset: Any
    decode: Callable[[dict[str, Any]], np.ndarray]
    name: Callable[[int], str]

    def read(self, examples: list[dict[str, Any]], first: np.ndarray) -> tuple[Tensor, Tensor]:
        """Row numbers and samples, all of them like `first`."""
        numbers = [example[_ROW] for example in examples]
        samples = np.empty((len(examples), *first.shape), first.dtype)
        for i, example in enumerate(examples):
            sample, place = self.decode(example), self.name(numbers[i])
            samples[i] = _alike(self.spec, first, "the first", sample, place)
        raw = _finite(self.spec, torch.from_numpy(samples), lambda i: self.name(numbers[i]))
        return torch.tensor(numbers, dtype=torch.int64), raw


def open_examples(spec: str, column: str | None, split: str) -> Examples:
    datasets = require("open_source", "datasets")
    kind, target = parse_spec("spec", spec)
    if kind not in ("hf", "parquet", "folder"):
        raise ValueError(
            f"open_source: streaming must be of hf:, parquet: or folder:, got {spec!r}"
        )
    files, number = [str(path) for path in data_files(spec)], ""
    if kind == "folder":
        column, image = "image", True
        paths = [{"bytes": None, "path": path} for path in files]
        dataset = datasets.Dataset.from_dict({column: paths}).to_iterable_dataset()
    else:
        with tempfile.TemporaryDirectory() as cache:  # for a lock: a stream is not stored
            options: dict[str, Any] = {"streaming": True, "cache_dir": cache}
            if kind == "parquet":
                target, split = "parquet", "train"
                options["data_files"] = {"train": files}
            dataset = loaded(spec, datasets.load_dataset, target, split=split, **options)
        features = dataset.features.to_dict() if dataset.features else {}
        column, image = _choose_column(spec, features, column)
        dataset = dataset.select_columns([column])
        if not image:
            number = _kept(spec, np.dtype(_number_type(features[column])))
        elif features[column].get("_type") == "Image":
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    dataset = dataset.map(lambda _, row: {_ROW: row}, with_indices=True)

    def name(row: int) -> str:
        return files[row] if kind == "folder" else f"row {row} of {spec}"

    def decode(example: dict[str, Any]) -> np.ndarray:
        value, place = example[column], name(example[_ROW])
        if image:
            return _decode(spec, value, place)
        try:
            return np.asarray(value, dtype=number)
        except (TypeError, ValueError) as error:
            raise refusal(spec, "hold arrays of numbers", f"{place}: {_line(error)}") from None

    return Examples(spec, dataset, decode, name)
