"""The data: digits, scaling, augmentation, and every kind of set that can be opened."""

import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hos_ext import ops
from hos_ext.app import cli, data
from hos_ext.app.data import registry, streams
from hos_ext.app.data import rows as data_rows
from hos_ext.app.data import scaling as data_scaling
from hos_ext.app.data.sources import density

# log p of the known densities at (0.25, ..., 0.25).
PROBES = {
    "gaussian2d": -0.9217849239372148,
    "normal100": -16.47753618566881,
    "modes2d": -4.435652496086873,
    "logistic50": -55.63116984053172,
}


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.load_digits(seed=0)


def _rows(grey: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, grey.flatten(1).tolist()))


def test_load_digits_splits_every_digit_into_exactly_one_part(digits):
    from sklearn.datasets import load_digits

    assert [len(part) for part in digits] == [1257, 180, 360]
    everything = torch.from_numpy(load_digits().images).float()
    assert _rows(torch.cat(digits)) == _rows(everything)


def test_load_digits_split_is_fixed_by_the_seed(digits):
    again, other = data.load_digits(seed=0), data.load_digits(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(digits, again, strict=True))
    assert not torch.equal(digits.test, other.test)
    # Known answer: a split that moves would test old checkpoints on digits they were trained on.
    assert digits.test[:5].sum((1, 2)).tolist() == [315, 185, 371, 300, 365]


def test_load_digits_refuses_parts_that_leave_nothing():
    with pytest.raises(
        ValueError,
        match=r"^load_digits: validation and test must be at least 1 and "
        r"sum to less than 1797, got 0 and 360$",
    ):
        data.load_digits(validation=0)
    with pytest.raises(ValueError, match=r"got 800 and 997$"):
        data.load_digits(validation=800, test=997)


def test_load_digits_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        RuntimeError,
        match=r"^load_digits: sklearn\.datasets must be installed "
        r"\(pip install hos_ext\[cli\]\), got: ",
    ):
        data.load_digits()


def test_to_grey_inverts_dequantise(digits):
    x = data.dequantise(digits.train, seed=3)
    assert x.min() >= -1
    assert x.max() <= 1
    assert torch.equal(data.to_grey(x), digits.train)
    assert torch.equal(
        data.to_grey(torch.tensor([-1.3, 1.0, 2.0])), torch.tensor([0.0, 16.0, 16.0])
    )


def test_dequantise_spreads_a_level_uniformly_over_its_width(digits):
    x = data.dequantise(digits.train.double(), seed=3)
    u = ((x + 1) * 17 / 2 - digits.train).flatten()
    assert u.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / len(u)) ** 0.5)
    assert u.var().item() == pytest.approx(1 / 12, rel=0.02)


def test_dequantise_is_a_function_of_seed_offset_and_row(digits):
    grey = digits.test
    whole = data.dequantise(grey, seed=3, offset=5)
    assert torch.equal(whole, data.dequantise(grey, seed=3, offset=5))
    assert torch.equal(whole[100:], data.dequantise(grey[100:], seed=3, offset=5, first=100))
    assert not torch.equal(whole, data.dequantise(grey, seed=3, offset=6))
    assert not torch.equal(whole, data.dequantise(grey, seed=4, offset=5))


def test_distort_moves_digits_a_little_and_keeps_grey_levels(digits):
    bent = data.distort(digits.train, seed=0)
    assert torch.equal(bent, bent.round())
    assert bent.min() == 0
    assert bent.max() == 16
    both = torch.stack([digits.train.flatten(1), bent.flatten(1)])
    centred = both - both.mean(-1, keepdim=True)
    alike = (centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))
    assert 0.85 < alike.mean() < 0.99
    assert alike.min() > 0.3
    # No drift: averaged over all digits, the centre of mass stays where it is, in pixels.
    for axis in (1, 2):
        place = torch.arange(8.0)
        centre = [(g.sum(3 - axis) * place).sum(-1) / g.sum((1, 2)) for g in (digits.train, bent)]
        assert (centre[1] - centre[0]).mean().abs() < 0.03
        assert 0.1 < (centre[1] - centre[0]).std() < 0.4


def test_distort_is_a_function_of_seed_offset_and_row(digits):
    grey = digits.test
    whole = data.distort(grey, seed=3, offset=5)
    assert torch.equal(whole[7:], data.distort(grey[7:], seed=3, offset=5, first=7))
    assert not torch.equal(whole, data.distort(grey, seed=3, offset=6))
    assert not torch.equal(whole, data.distort(grey, seed=2, offset=5))


def test_distort_turns_shears_scales_and_shifts_by_its_own_stream():
    """The value at a place is that of the smooth blob it came from, by six normals of stream 18."""
    n, size = 40, 64
    place = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1

    def blob(x, y):
        return 1e6 * (-((x - 0.25).square() / 0.06 + (y + 0.2).square() / 0.1)).exp()

    y, x = torch.meshgrid(place, place, indexing="ij")
    bent = data.distort(blob(x, y).expand(n, -1, -1), seed=7, offset=2, first=5, levels=1_000_001)
    drawn = ops.normal((n, 6), seed=7, offset=2, first=5, stream=18, dtype=torch.float64)
    spread = torch.tensor([0.105, 0.08, 0.06, 0.06, 0.075, 0.075], dtype=torch.float64)
    angle, shear, wide, high, right, down = (drawn * spread).T.reshape(6, n, 1, 1)
    from_x = wide.exp() * angle.cos() * x + (shear - angle.sin()) * y + right
    from_y = angle.sin() * x + high.exp() * angle.cos() * y + down
    assert (bent - blob(from_x, from_y))[:, 10:-10, 10:-10].abs().max() < 1e4  # bicubic: 7e3


def test_distort_refuses_other_shapes():
    with pytest.raises(
        ValueError,
        match=r"^distort: grey must have shape \(B, height, width\) or "
        r"\(B, C, height, width\), got \(4, 64\)$",
    ):
        data.distort(torch.zeros(4, 64), seed=0)


def test_dequantise_and_distort_take_an_empty_batch():
    for function in (data.dequantise, data.distort):
        grey = torch.zeros(0, 8, 8, dtype=torch.float64)
        result = function(grey, seed=0)
        assert (result.shape, result.dtype) == (grey.shape, grey.dtype)
        assert result is not grey


@pytest.mark.parametrize("function", [data.dequantise, data.distort])
def test_dequantise_and_distort_refuse_other_kinds_under_their_own_name(function):
    name = function.__name__
    with pytest.raises(
        ValueError, match=rf"^{name}: grey must have dtype float32, float64, got torch\.int64$"
    ):
        function(torch.zeros(4, 8, 8, dtype=torch.int64), seed=0)
    with pytest.raises(TypeError, match=rf"^{name}: grey must be a Tensor, got list$"):
        function([[1.0]], seed=0)


# ------------------------------------------------------------------------------ scaling, augmenting


def test_scaling_spreads_256_levels_over_minus_one_to_one():
    raw = torch.arange(256, dtype=torch.uint8).repeat(100, 1)
    scaling = data.Scaling(levels=256)
    x = scaling.forward(raw, seed=3, offset=5, first=7)
    assert x.dtype == torch.float32
    u = ops.uniform(raw.shape, seed=3, offset=5, first=7, stream=17, dtype=torch.float32)
    torch.testing.assert_close(x, ((raw + u) / 128 - 1).float(), rtol=0, atol=1e-6)
    back = scaling.inverse(x)
    assert (back - raw).abs().max() <= 1  # see `Scaling.inverse`
    assert (back != raw).double().mean() < 1e-3
    assert torch.equal(
        scaling.inverse(torch.tensor([-1.5, 2.0, 0.0])), torch.tensor([0.0, 255.0, 128.0])
    )
    # E[raw | x] and its units: the mean of u is taken off.
    assert (x * scaling.scale + scaling.shift - raw).mean().abs() < 0.01
    assert (scaling.scale, scaling.shift) == (128, 127.5)


def test_scaling_standardises_floats_and_returns():
    raw = 3 + 2 * ops.normal((50, 4), seed=1, dtype=torch.float64)
    scaling = data.Scaling(mean=3.0, std=2.0)
    x = scaling.forward(raw, seed=0)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, ((raw - 3) / 2).float(), rtol=0, atol=0)
    torch.testing.assert_close(scaling.inverse(x.double()), raw, rtol=1e-6, atol=1e-6)
    assert (scaling.scale, scaling.shift) == (2.0, 3.0)


def test_scaling_goes_through_json_exactly():
    for scaling in (data.Scaling(levels=17), data.Scaling(mean=1 / 3, std=1e-7 / 3)):
        content = json.loads(json.dumps(scaling.as_dict()))
        assert data.Scaling.from_dict(content) == scaling


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"levels": 17},
        {"levels": 17, "mean": 0.0, "std": 1.0, "more": 1},
        {"levels": 17.0, "mean": 0.0, "std": 1.0},
        {"levels": -1, "mean": 0.0, "std": 1.0},
        {"levels": 0, "mean": 0.0, "std": 0.0},
        {"levels": 0, "mean": float("nan"), "std": 1.0},
        {"levels": 0, "mean": "0", "std": 1.0},
        {"levels": True, "mean": 0.0, "std": 1.0},
    ],
)
def test_scaling_refuses_foreign_content(content):
    rule = "Scaling.from_dict: content must hold levels, mean and std > 0, got "
    with pytest.raises(ValueError, match=f"^{re.escape(rule + repr(content))}$"):
        data.Scaling.from_dict(content)


def test_scaling_refuses_other_kinds():
    match = r"^Scaling.forward: raw must have dtype uint8, float32, float64, got torch.int64$"
    with pytest.raises(ValueError, match=match):
        data.Scaling().forward(torch.zeros(2, 2, dtype=torch.int64), seed=0)
    with pytest.raises(TypeError, match=r"^Scaling.inverse: x must be a Tensor, got list$"):
        data.Scaling().inverse([1.0])


def test_distort_moves_the_channels_of_an_image_together(digits):
    grey = digits.test[:20]
    bent = data.distort(grey, seed=4, first=3)
    colour = torch.stack([grey, grey, 16 - grey], 1)
    together = data.distort(colour, seed=4, first=3)
    assert torch.equal(together[:, 0], bent)
    assert torch.equal(together[:, 1], bent)
    bright = data.distort(15 * grey, seed=4, first=3, levels=256)
    assert bright.max() > 200
    assert (bright / 15 - bent).abs().max() <= 1


def test_augment_distorts_the_first_half_of_the_global_batch_as_training_did(digits):
    grey = digits.train[:33]
    old = torch.cat([data.distort(grey[:16], seed=2, offset=9), grey[16:]])
    options = {"levels": 17, "seed": 2, "offset": 9, "batch_size": 33}
    whole = data.augment(grey.to(torch.uint8), "distort", **options)
    assert whole.dtype == torch.uint8
    assert torch.equal(whole.float(), old)
    assert torch.equal(data.augment(grey, "distort", **options), old)
    parts = [
        data.augment(grey[a:b], "distort", first=a, **options)
        for a, b in ((0, 5), (5, 14), (14, 20), (20, 33))
    ]
    assert torch.equal(torch.cat(parts), old)


def test_augment_flips_half_of_the_rows():
    raw = (ops.uniform((400, 3, 4, 5), seed=1) * 256).to(torch.uint8)
    options = {"levels": 256, "seed": 2, "offset": 9, "batch_size": 400}
    out = data.augment(raw, "flip", **options)
    mirrored = (out == raw.flip(-1)).flatten(1).all(1)
    assert ((out == raw).flatten(1).all(1) ^ mirrored).all()
    assert 160 < mirrored.sum() < 240
    u = ops.uniform((400,), seed=2, offset=9, stream=19, dtype=torch.float32)
    assert torch.equal(mirrored, u < 0.5)
    assert torch.equal(out[100:], data.augment(raw[100:], "flip", first=100, **options))
    assert data.augment(raw, "none", **options) is raw


def test_augment_refuses_what_it_cannot_do():
    options = {"seed": 0, "batch_size": 4}
    with pytest.raises(
        ValueError, match=r"^augment: name must be one of 'none', 'flip', 'distort', got 'blur'$"
    ):
        data.augment(torch.zeros(4, 8, 8), "blur", levels=17, **options)
    with pytest.raises(
        ValueError,
        match=r"^augment: raw must hold images, \(B, height, width\) or "
        r"\(B, C, height, width\), for flip, got \(4, 8\)$",
    ):
        data.augment(torch.zeros(4, 8), "flip", levels=0, **options)
    with pytest.raises(
        ValueError,
        match=r"^augment: distort needs whole levels, got levels 0 \(floating data\)$",
    ):
        data.augment(torch.zeros(4, 8, 8), "distort", levels=0, **options)


# -------------------------------------------------------------------------------- parts and batches


def _old_batch_rows(n: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """The order that the first checkpoints were trained in."""
    start = step * batch_size
    epochs = range(start // n, (start + batch_size - 1) // n + 1)
    orders = [
        ops.uniform((n,), seed=seed, offset=e, stream=32, dtype=torch.float64).argsort()
        for e in epochs
    ]
    skip = start - epochs[0] * n
    return torch.cat(orders)[skip : skip + batch_size]


@pytest.mark.parametrize(("n", "batch_size"), [(1257, 128), (10, 4), (3, 8), (5, 5), (1, 3)])
def test_batch_rows_are_those_of_the_old_formula(n, batch_size):
    for step in (0, 1, 2, 5, 31):
        rows = data.batch_rows(n, batch_size, seed=3, step=step)
        assert torch.equal(rows, _old_batch_rows(n, batch_size, 3, step))


def test_batch_rows_of_shares_concatenate():
    for cuts in ((0, 8), (0, 1, 8), (0, 0, 3, 3, 8), (0, 2, 5, 8)):
        for step in range(7):
            shares = [
                data.batch_rows(5, 8, seed=1, step=step, start=a, stop=b)
                for a, b in itertools.pairwise(cuts)
            ]
            assert torch.equal(torch.cat(shares), data.batch_rows(5, 8, seed=1, step=step))


def test_batch_rows_break_ties_alike_on_every_machine():
    u = ops.uniform((200_000,), seed=1, stream=32, dtype=torch.float64).numpy()
    assert len(np.unique(u)) < len(u)
    rows = data.batch_rows(200_000, 200_000, seed=1, step=0)
    assert np.array_equal(rows, np.argsort(u, kind="stable"))


def test_batch_rows_visit_every_row_once_in_an_epoch():
    rows = torch.cat([data.batch_rows(12, 4, seed=1, step=step) for step in range(6)])
    assert sorted(rows[:12].tolist()) == list(range(12))
    assert sorted(rows[12:].tolist()) == list(range(12))
    assert not torch.equal(rows[:12], rows[12:])


def test_open_source_serves_the_digits_that_training_had(digits):
    source = data.open_source("digits")
    assert (source.shape, source.scaling) == ((8, 8), data.Scaling(levels=17))
    assert torch.equal(source.validation.float(), digits.validation)
    assert torch.equal(source.test.float(), digits.test)
    assert source.truth is None
    assert source.std == pytest.approx(
        float(data.dequantise(digits.train, seed=0).square().mean()) ** 0.5, rel=1e-5
    )
    for step in (0, 9, 10):
        rows, raw = source.batch(step, 128, seed=6)
        old = digits.train[_old_batch_rows(1257, 128, 6, step)]
        assert torch.equal(raw.float(), old)
        assert torch.equal(rows, source.parts.train[_old_batch_rows(1257, 128, 6, step)])
        x = source.scaling.forward(raw, seed=6, offset=step)
        u = ops.uniform(old.shape, seed=6, offset=step, stream=17, dtype=torch.float32)
        assert torch.equal(x, (old + u) * (2 / 17) - 1)


# ------------------------------------------------------------------------------ files for the tests


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _images(n: int, *, seed: int = 1, channels: int = 1) -> np.ndarray:
    """(n, C, 6, 5) uint8, all different."""
    return (ops.uniform((n, channels, 6, 5), seed=seed) * 256).to(torch.uint8).numpy()


def _write_parquet(
    path: Path, columns: dict[str, list[bytes | None]], *, metadata: bool = True, rows: int = 7
) -> Path:
    """The schema of hub files: struct{bytes, path} columns and a label."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    arrays = {
        name: pa.array([None if b is None else {"bytes": b, "path": None} for b in images], struct)
        for name, images in columns.items()
    }
    n = len(next(iter(columns.values())))
    table = pa.table(arrays | {"label": pa.array([0] * n, pa.int64())})
    if metadata:
        features = {name: {"_type": "Image"} for name in columns}
        features["label"] = {"names": ["0"], "_type": "ClassLabel"}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def _encoded(images: np.ndarray) -> list[bytes]:
    return [_png(i[0] if len(i) == 1 else i.transpose(1, 2, 0)) for i in images]


def _parquet(path: Path, images: np.ndarray, *, column: str = "image", **options: object) -> str:
    return f"parquet:{_write_parquet(path, {column: _encoded(images)}, **options)}"


def _folder(path: Path, images: np.ndarray) -> str:
    for i, png in enumerate(_encoded(images)):
        file = path / f"{i // 10}" / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png)
    return f"folder:{path}"


@pytest.fixture
def no_cache(tmp_path, monkeypatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path / "cache"


def _refused(message: str, *arguments: object, **options: object) -> None:
    """`message` is the whole line; three dots stand for anything."""
    pattern = re.escape(message).replace(re.escape("..."), ".*")
    with pytest.raises(ValueError, match=f"^{pattern}$") as error:
        data.open_source(*arguments, **options)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- every kind of set


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["parquet", "bare", "folder", "hf", "hf-folder", "npy"])
def test_open_source_reads_the_same_images_from_every_kind(tmp_path, no_cache, kind, channels):
    images = _images(40, channels=channels)
    place = tmp_path / "set"
    if kind == "parquet":
        spec = _parquet(place / "train.parquet", images, column="img")
    elif kind == "bare":
        spec = _parquet(place / "train.parquet", images, metadata=False)
    elif kind == "folder":
        spec = _folder(place, images)
        (place / "notes.txt").write_text("no image")
        (place / ".hidden.png").write_text("no image")
    elif kind == "hf":
        spec = _parquet(place / "train.parquet", images).replace("parquet:", "hf:")
        spec = spec.removesuffix("/train.parquet")
    elif kind == "hf-folder":
        spec = _folder(place, images).replace("folder:", "hf:")
    else:
        place.mkdir()
        np.save(place / "images.npy", images)
        spec = f"npy:{place / 'images.npy'}"
    source = data.open_source(spec, seed=5, validation=6, test=7)
    assert (source.spec, source.shape) == (spec, (channels, 6, 5))
    assert (source.scaling, source.truth) == (data.Scaling(levels=256), None)
    train, validation, test = source.parts
    assert sorted(torch.cat([train, validation, test]).tolist()) == list(range(40))
    assert (len(validation), len(test)) == (6, 7)
    assert torch.equal(source.validation, torch.from_numpy(images)[validation])
    assert torch.equal(source.test, torch.from_numpy(images)[test])
    for step in (0, 4, 2):
        rows, raw = source.batch(step, 8, seed=2)
        assert raw.dtype == torch.uint8
        assert torch.equal(rows, train[_old_batch_rows(27, 8, 2, step)])
        assert torch.equal(raw, torch.from_numpy(images)[rows])
        lazy = data.open_source(spec, seed=5, validation=6, test=7, limit=1000 * channels)
        again = lazy.batch(step, 8, seed=2)
        assert torch.equal(again[0], rows)
        assert torch.equal(again[1], raw)
        assert torch.equal(lazy.test, source.test)
        assert lazy.std == source.std
    assert torch.equal(data.read_samples(spec), torch.from_numpy(images))
    x = source.scaling.forward(torch.from_numpy(images)[train], seed=1)
    assert source.std == pytest.approx(float(x.square().mean()) ** 0.5, rel=0.01)
    assert no_cache.exists() == kind.startswith("hf")


def test_large_images_are_decoded_by_threads_to_the_same_batches(tmp_path):
    images = (ops.uniform((12, 3, 160, 150), seed=1) * 256).to(torch.uint8)
    spec = _folder(tmp_path, images.numpy())
    rows, raw = data.open_source(spec, limit=10**5).batch(1, 4, seed=0)
    assert torch.equal(raw, images[rows])


@pytest.mark.parametrize(
    "cuts", [(0, 12), (0, 6, 12), (0, 4, 8, 12), (0, 0, 1, 12), (0, 5, 5, 7, 12)]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_shares_of_a_batch_concatenate_to_it(tmp_path, cuts, streaming):
    options = {"validation": 3, "test": 2, "streaming": streaming, "buffer": 9}
    spec = _parquet(tmp_path / "a.parquet", _images(40))
    whole, ranks = data.open_source(spec, **options), data.open_source(spec, **options)
    for step in (0, 1, 5):
        rows, raw = whole.batch(step, 12, seed=4)
        shares = [
            ranks.batch(step, 12, seed=4, start=a, stop=b) for a, b in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat([s[0] for s in shares]), rows)
        assert torch.equal(torch.cat([s[1] for s in shares]), raw)


def test_a_pattern_or_a_folder_of_parquet_files_is_one_set(tmp_path):
    images = _images(20)
    _parquet(tmp_path / "data" / "train-1.parquet", images[12:])
    _parquet(tmp_path / "data" / "train-0.parquet", images[:12])
    for target in ("data", "data/train-*.parquet", "**/*.parquet"):
        assert np.array_equal(data.read_samples(f"parquet:{tmp_path / target}"), images)
    more = _images(5, seed=2)
    _parquet(tmp_path / "data" / "below" / "again" / "train-2.parquet", more)
    for target in ("data", "**/*.parquet"):
        found = data.read_samples(f"parquet:{tmp_path / target}")
        assert sorted(map(bytes, found.numpy())) == sorted(map(bytes, [*images, *more]))


def test_open_source_takes_a_test_set_of_its_own(tmp_path, no_cache):
    images = _images(50)
    place = tmp_path / "set"  # `datasets` takes the name of a folder such as "test_x" for a split
    train = _parquet(place / "train.parquet", images[:30])
    test = _parquet(place / "test.parquet", images[30:])
    for spec, given in ((train, test), (f"hf:{place}", None)):
        source = data.open_source(spec, test_spec=given, validation=4)
        assert torch.equal(source.test, torch.from_numpy(images[30:]))
        assert sorted(torch.cat(source.parts[:2]).tolist()) == list(range(30))
        some = data.open_source(spec, test_spec=given, test=5)
        assert torch.equal(some.test, torch.from_numpy(images[30:])[some.parts.test])
        assert len(set(some.parts.test.tolist())) == 5
        stream = data.open_source(spec, test_spec=given, validation=4, streaming=True)
        assert torch.equal(stream.test, source.test)
        few = data.open_source(spec, test_spec=given, validation=4, test=5, streaming=True)
        assert torch.equal(few.test, source.test[:5])
    part = data.open_source(f"hf:{place}", split="train[:20]", validation=1)
    assert sorted(torch.cat(part.parts[:2]).tolist()) == list(range(20))
    inside = data.open_source(f"hf:{place}", split="test", validation=1, test=2)
    assert sorted(torch.cat(inside.parts).tolist()) == list(range(20))


def test_open_source_refuses_a_test_set_that_is_trained_on(tmp_path):
    spec = _parquet(tmp_path / "a.parquet", _images(10))
    same = f"{tmp_path / 'a.parquet'} in both"
    _refused(
        f"open_source: test_spec must share nothing with parquet:{tmp_path}, got {same}",
        f"parquet:{tmp_path}",
        test_spec=spec,
    )
    _refused(
        "open_source: test_spec must share nothing with digits, got digits in both",
        "digits",
        test_spec="digits",
    )


def test_open_source_reads_arrays_and_standardises_by_the_training_part(tmp_path):
    array = (5 + 3 * ops.normal((60, 4, 3), seed=1, dtype=torch.float64)).numpy()
    for kind in ("<f4", ">f4", "<f8", "<f2"):
        values = array.astype(kind)
        np.save(tmp_path / "a.npy", values)
        source = data.open_source(f"npy:{tmp_path / 'a.npy'}", validation=20, test=10)
        kept = torch.from_numpy(values.astype("f8" if kind == "<f8" else "f4"))
        part = kept[source.parts.train].double()
        mean, std = float(part.mean()), float(part.std(correction=0))
        assert source.shape == (4, 3)
        assert source.scaling.mean == pytest.approx(mean, rel=1e-12)
        assert source.scaling.std == pytest.approx(std, rel=1e-12)
        assert source.std == pytest.approx(1, rel=1e-6)
        assert torch.equal(source.test, kept[source.parts.test])
        lazy = data.open_source(f"npy:{tmp_path / 'a.npy'}", validation=2, test=1, limit=600)
        assert torch.equal(lazy.batch(3, 7, seed=1)[1], kept[lazy.batch(3, 7, seed=1)[0]])


def test_statistics_of_large_sets_merge_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(data_rows, "CHUNK_VALUES", 12)
    array = (1e4 + ops.normal((500, 4), seed=1, dtype=torch.float64)).numpy()
    np.save(tmp_path / "a.npy", array)
    source = data.open_source(f"npy:{tmp_path / 'a.npy'}")
    part = torch.from_numpy(array)[source.parts.train]
    assert source.scaling.mean == pytest.approx(float(part.mean()), rel=1e-13)
    assert source.scaling.std == pytest.approx(float(part.std(correction=0)), rel=1e-10)
    monkeypatch.setattr(data_scaling, "_STATISTICS_ROWS", 100)
    few = data.open_source(f"npy:{tmp_path / 'a.npy'}", limit=3000)
    part = torch.from_numpy(array)[few.parts.train[:100]]
    assert few.scaling.std == pytest.approx(float(part.std(correction=0)), rel=1e-10)


def test_open_source_reads_named_arrays(tmp_path):
    np.savez(tmp_path / "one.npz", a=_images(9))
    np.savez_compressed(tmp_path / "two.npz", a=_images(9), b=_images(9, seed=2))
    one, two = f"npy:{tmp_path / 'one.npz'}", f"npy:{tmp_path / 'two.npz'}"
    assert np.array_equal(data.read_samples(one), _images(9))
    assert np.array_equal(data.read_samples(two, column="b"), _images(9, seed=2))
    rule = f"open_source: column must be one of the arrays ['a', 'b'] of {two[4:]}, got "
    _refused(f"{rule}None", two)
    _refused(f"{rule}'c'", two, column="c")


@pytest.mark.parametrize("kind", ["list", "fixed", "nested", "array2d"])
def test_open_source_reads_lists_of_numbers(tmp_path, no_cache, kind):
    import datasets

    place = tmp_path / "set"
    place.mkdir()

    values = ops.normal((30, 4, 3), seed=1).numpy()
    if kind == "array2d":
        features = datasets.Features({"x": datasets.Array2D((4, 3), "float32")})
        table = datasets.Dataset.from_dict({"x": list(values)}, features=features)
        table.to_parquet(place / "a.parquet")
    else:
        if kind != "nested":
            values = values.reshape(30, 12)
        column = pa.array(
            values.tolist(),
            pa.list_(pa.list_(pa.float32()))
            if kind == "nested"
            else pa.list_(pa.float32(), 12 if kind == "fixed" else -1),
        )
        pq.write_table(pa.table({"x": column, "y": pa.array(range(30))}), place / "a.parquet")
    spec = f"parquet:{place / 'a.parquet'}"
    for opened in (spec, f"hf:{place}"):
        assert np.array_equal(data.read_samples(opened), values)
        source = data.open_source(opened, streaming=True, validation=2, test=3)
        rows, raw = source.batch(0, 10, seed=1)
        assert raw.dtype == torch.float32
        assert np.array_equal(raw, values[rows])
        rest = torch.from_numpy(values[5:]).double()
        assert source.scaling.std == pytest.approx(float(rest.std(correction=0)), rel=1e-10)


def test_open_source_reads_floating_images(tmp_path):
    values = ops.normal((12, 1, 6, 5), seed=1).numpy()
    for i, value in enumerate(values):
        Image.fromarray(value[0]).save(tmp_path / f"{i:02}.tif")
    for limit in (2**20, 400):
        source = data.open_source(f"folder:{tmp_path}", limit=limit)
        rows, raw = source.batch(1, 6, seed=0)
        assert np.array_equal(raw, values[rows])
        assert source.scaling.levels == 0


# ---------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("name", ["gaussian2d", "normal100", "modes2d", "logistic50"])
def test_densities_come_with_their_truth(name, monkeypatch):
    monkeypatch.setattr(density, "_ROWS", 4000)
    source = data.open_source(f"density:{name}", seed=3)
    assert source.scaling == data.Scaling()
    again = data.known_density(name)
    x = source.test.double()
    assert torch.equal(source.truth.score(x), again.score(x))
    # E[grad log p] = 0 and E[x s^T] = -I (integration by parts) where the draws are of the truth.
    raw = source.batch(0, 3600, seed=0)[1]
    assert torch.equal(source.scaling.forward(raw, seed=0), raw)
    score = source.truth.score(raw.double())
    product = (raw.double() * score).mean(0)
    scale = (raw.double() * score).std(0) / 60
    assert ((product + 1).abs() < 6 * scale).all()
    assert source.std == pytest.approx(float(raw.square().mean()) ** 0.5, rel=0.05)
    other = data.open_source(f"density:{name}", seed=4)
    assert not torch.equal(other.test, source.test)


def test_known_densities_do_not_move():
    """Known answers: an evaluation of today is compared with one of last year."""
    normal = data.known_density("normal100")
    assert torch.linalg.eigvalsh(normal.covariance)[-6:].tolist() == pytest.approx(
        [0.1, 2.1, 3.1, 5.1, 7.1, 10.1], rel=1e-9
    )
    probes = {
        name: float(density.log_prob(torch.full((1, density.dim), 0.25, dtype=torch.float64)))
        for name in ("gaussian2d", "normal100", "modes2d", "logistic50")
        for density in [data.known_density(name)]
    }
    assert probes == pytest.approx(PROBES, rel=1e-9)
    with pytest.raises(
        ValueError,
        match=r"^known_density: name must be one of 'gaussian2d', 'normal100', 'modes2d', "
        r"'logistic50', got 'gauss'$",
    ):
        data.open_source("density:gauss")


# ------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("kind", ["parquet", "folder", "hf"])
def test_a_stream_never_trains_on_its_first_rows_and_visits_all_others(tmp_path, no_cache, kind):
    images = _images(40)
    if kind == "folder":
        spec = _folder(tmp_path / "set", images)
    else:  # several files: their order must not be shuffled before the first rows are cut off
        for i in range(4):
            _parquet(tmp_path / "set" / f"train-{i}.parquet", images[10 * i : 10 * i + 10], rows=3)
        spec = f"{kind}:{tmp_path / 'set'}"
    source = data.open_source(spec, streaming=True, validation=4, test=3, buffer=8)
    assert source.parts.train is None
    assert np.array_equal(source.validation, images[:4])
    assert np.array_equal(source.test, images[4:7])
    assert torch.cat(source.parts[1:]).tolist() == list(range(7))
    batches = [source.batch(step, 11, seed=1) for step in range(6)]
    for rows, raw in batches:
        assert np.array_equal(raw, images[rows])
    order = torch.cat([rows for rows, _ in batches])
    assert sorted(order[:33].tolist()) == list(range(7, 40))
    assert sorted(order[33:].tolist()) == list(range(7, 40))
    assert order[:33].tolist() != order[33:].tolist()
    assert order[:33].tolist() != list(range(7, 40))
    assert not list(no_cache.rglob("*.arrow"))
    assert kind == "hf" or not no_cache.exists()


def test_a_stream_holds_out_a_thousand_rows_unless_told_otherwise(tmp_path):
    rows = np.arange(2020, dtype=np.float64).reshape(-1, 1)
    places = []
    for name in ("train", "test"):
        column = pa.array(rows.tolist())
        pq.write_table(pa.table({"values": column}), tmp_path / f"{name}.parquet")
        places.append(f"parquet:{tmp_path / name}.parquet")
    inside = data.open_source(places[0], column="values", streaming=True)
    assert np.array_equal(inside.validation, rows[:1000])
    assert np.array_equal(inside.test, rows[1000:2000])
    options = {"validation": 3, "column": "values", "streaming": True}
    beside = data.open_source(places[0], test_spec=places[1], **options)
    assert np.array_equal(beside.test, rows[:1000])
    pq.write_table(pa.table({"values": pa.array(rows[:60].tolist())}), tmp_path / "short.parquet")
    short = f"parquet:{tmp_path}/short.parquet"
    few = data.open_source(short, column="values", streaming=True)  # a twentieth
    assert (len(few.validation), len(few.test)) == (3, 3)
    with pytest.raises(ValueError, match=r"sum to less than 60, got 60 and 3$"):
        data.open_source(short, validation=60, column="values", streaming=True)


def test_a_resumed_stream_goes_on_as_before(tmp_path):
    spec = _parquet(tmp_path / "a.parquet", _images(40))
    options = {"streaming": True, "validation": 2, "test": 1, "buffer": 8}
    source = data.open_source(spec, **options)
    straight = [source.batch(step, 10, seed=1)[0].tolist() for step in range(12)]
    for step in (0, 3, 4, 11, 2):
        fresh = data.open_source(spec, **options)
        assert fresh.batch(step, 10, seed=1)[0].tolist() == straight[step]
        assert source.batch(step, 10, seed=1)[0].tolist() == straight[step]
        if step < 11:
            assert fresh.batch(step + 1, 10, seed=1)[0].tolist() == straight[step + 1]
    assert source.batch(2, 10, seed=2)[0].tolist() != straight[2]
    assert source.batch(2, 10, seed=1)[0].tolist() == straight[2]


def test_a_stream_is_read_through_once_to_find_a_late_epoch():
    class Counted:
        read = 0

        def shuffle(self, *, generator, buffer_size):
            for row in generator.permutation(10).tolist():
                self.read += 1
                yield {"row": row}

    counted, straight = Counted(), streams.Stream("x", Counted(), 4)
    late = streams.Stream("x", counted, 4).take(1000, 1012, 1)
    assert counted.read <= 10 + 1 + 12
    for position in range(0, 1000, 50):
        straight.take(position, position + 50, 1)
    assert straight.take(1000, 1012, 1) == late


def test_a_stream_says_what_is_wrong_with_it(tmp_path):
    spec = _parquet(tmp_path / "a.parquet", _images(10))
    options = {"streaming": True, "validation": 4}
    _refused(
        "open_source: validation and test must be at least 1 and sum to less than 8, got 4 and 4",
        _parquet(tmp_path / "b.parquet", _images(8)),
        test=4,
        **options,
    )
    _refused(
        f"open_source: test must be at most the 8 rows of parquet:{tmp_path}/b.parquet, got 9",
        spec,
        test_spec=f"parquet:{tmp_path}/b.parquet",
        test=9,
        **options,
    )
    _refused(
        "open_source: streaming must be of hf:, parquet: or folder:, got 'digits'",
        "digits",
        streaming=True,
    )
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    _refused(
        f"open_source: parquet:{tmp_path}/c.parquet must be a ... that `datasets` can ..., got ...",
        f"parquet:{tmp_path}/c.parquet",
        **options,
    )
    mixed = [*_encoded(_images(10)), _png(np.zeros((5, 6), np.uint8))]
    _write_parquet(tmp_path / "d.parquet", {"image": mixed})
    _refused(
        f"open_source: parquet:{tmp_path}/d.parquet must hold samples of one shape and kind, got "
        f"(1, 6, 5) uint8 in the first and (1, 5, 6) uint8 in row 10 of "
        f"parquet:{tmp_path}/d.parquet",
        f"parquet:{tmp_path}/d.parquet",
        test=2,
        **options,
    )


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("spec", ["", "mnist", "hf:", "zip:a", "parquet", None, 3])
def test_open_source_refuses_unknown_specs(spec):
    *forms, last = data.source_forms()
    kinds = f"{', '.join(forms)} or {last}"
    assert kinds.startswith("digits, hf:NAME, parquet:PATH, folder:PATH, npy:PATH")
    _refused(f"open_source: spec must be {kinds}, got {spec!r}", spec)
    _refused(f"open_source: test_spec must be {kinds}, got {'x'!r}", "digits", test_spec="x")


def test_open_source_names_what_is_not_there(tmp_path, no_cache):
    (tmp_path / "empty").mkdir()
    images = ".png .jpg .jpeg .tif .tiff .bmp .webp .gif .ppm .pgm .pnm .pbm"
    for kind, endings in (("parquet", ".parquet"), ("folder", images), ("npy", ".npy .npz")):
        for target in (tmp_path / "none", tmp_path / "empty"):
            spec = f"{kind}:{target}"
            _refused(f"open_source: {spec} must name files that exist ({endings}), got none", spec)
    spec = f"hf:{tmp_path / 'none'}"
    _refused(f"open_source: {spec} must be a data set that `datasets` can load, got ...", spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0}, "validation must be at least 1, got 0"),
        ({"test": 0}, "test must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"buffer": 0}, "buffer must be at least 1, got 0"),
        ({"seed": -1}, "seed must be in [0, 2**63), got -1"),
        ({"column": "x"}, "column must be None for digits, got 'x'"),
        ({"split": "x"}, "split must be 'train' for digits, got 'x'"),
        (
            {"validation": 1000, "test": 797},
            "validation and test must be at least 1 and sum to less than 1797, got 1000 and 797",
        ),
        (
            {"test_spec": "density:gaussian2d"},
            "test_spec must hold samples (8, 8) of 17 levels like digits, got (2,) of 0 levels",
        ),
    ],
)
def test_open_source_refuses_options_out_of_range(options, message):
    _refused(f"open_source: {message}", "digits", **options)


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (-1, {}, r"step must be in \[0, 2\*\*40\), got -1"),
        (
            0,
            {"start": 3, "stop": 2},
            r"start and stop must satisfy 0 <= start <= stop <= 8, got 3 and 2",
        ),
        (0, {"stop": 9}, r"start and stop must satisfy 0 <= start <= stop <= 8, got 0 and 9"),
        (0, {"start": -1}, r"start and stop must satisfy 0 <= start <= stop <= 8, got -1 and 8"),
    ],
)
def test_batch_refuses_steps_and_shares_out_of_range(step, options, message):
    source = data.open_source("digits")
    with pytest.raises(ValueError, match=f"^Source.batch: {message}$"):
        source.batch(step, 8, seed=0, **options)
    with pytest.raises(ValueError, match=r"^Source.batch: batch_size must be at least 1, got 0$"):
        source.batch(0, 0, seed=0)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.uint8), "have shape (n, *dims), got (5,)"),
        (np.zeros((0, 3), np.float32), "not be empty, got shape (0, 3)"),
        (np.zeros((4, 0), np.float32), "not be empty, got shape (4, 0)"),
        (np.ones((1, 3), np.float32), None),
        (np.ones((9, 3), np.float32), "vary, got standard deviation 0.0"),
        (
            np.full((4, 3), 2**53 + 1),
            f"hold whole numbers of at most 2^53 (convert to float64), got {2**53 + 1}",
        ),
        (np.zeros((4, 3), bool), "{kinds}, got bool"),
        (np.zeros((4, 3), np.complex64), "{kinds}, got complex64"),
        (np.array([[None]] * 4), "{whole}, got shape (4, 1) of object"),
    ],
)
def test_open_source_refuses_arrays_that_are_no_data(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    spec = f"npy:{tmp_path / 'a.npy'}"
    kinds = "hold uint8 (256 levels), other whole numbers or floating ones (convert to float32)"
    whole = "hold a whole .npy or .npz file of numbers (no objects: no pickle is read)"
    if message is None:
        _refused(f"open_source: {spec} must hold at least 3 rows, one of each part, got 1", spec)
    else:
        _refused(f"open_source: {spec} must {message.format(kinds=kinds, whole=whole)}", spec)
    _refused(
        f"open_source: column must be None for an .npy file of {spec[4:]}, got 'x'",
        spec,
        column="x",
    ) if array.dtype != object else None


@pytest.mark.parametrize("limit", [2**20, 100])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_open_source_names_the_first_row_that_is_not_finite(tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(data_rows, "CHUNK_VALUES", 12)
    array = ops.normal((40, 3), seed=1).numpy()
    array[17, 1] = array[31, 0] = value
    np.save(tmp_path / "a.npy", array)
    spec = f"npy:{tmp_path / 'a.npy'}"
    row = 17 if limit > 100 else "..."
    _refused(
        f"open_source: {spec} must hold finite numbers, got {value} in row {row} of {spec[4:]}",
        spec,
        limit=limit,
        validation=1,
        test=1,
    )


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "compressed.npz", "text.npy"])
def test_open_source_refuses_damaged_arrays(tmp_path, name):
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, _images(9))
    else:
        (np.savez if name == "a.npz" else np.savez_compressed)(path.with_suffix(".npz"), _images(9))
    if name == "text.npy":
        path.write_text("no array")
    else:
        path.write_bytes(path.read_bytes()[:-40])
    _refused(
        f"open_source: npy:{path} must hold a whole .npy or .npz file of numbers (no objects: no "
        "pickle is read), got ...",
        f"npy:{path}",
    )


def test_open_source_refuses_damaged_parquet_files(tmp_path):
    spec = _parquet(tmp_path / "a.parquet", _images(9))
    whole = (tmp_path / "a.parquet").read_bytes()
    for damage in (whole[:-30], whole[:20], b"", whole[:30] + bytes(200) + whole[230:]):
        (tmp_path / "a.parquet").write_bytes(damage)
        _refused(f"open_source: {spec} must hold ..., got ...{tmp_path}/a.parquet: ...", spec)
    _write_parquet(tmp_path / "b.parquet", {"image": []})
    spec = f"parquet:{tmp_path / 'b.parquet'}"
    _refused(f"open_source: {spec} must not be empty, got 0 rows", spec)


def test_open_source_names_the_columns_to_choose_from(tmp_path):
    png = _encoded(_images(6))
    path = _write_parquet(tmp_path / "a.parquet", {"left": png, "right": png[::-1]})
    spec = f"parquet:{path}"
    rule = (
        f"open_source: column must be one of the images ['left', 'right'] or lists of numbers [] "
        f"of {path}, got "
    )
    _refused(f"{rule}None", spec)
    _refused(f"{rule}'label'", spec, column="label")
    _refused(
        f"{rule.replace(str(path), spec)}'label'",
        spec,
        column="label",
        streaming=True,
    )
    assert np.array_equal(data.read_samples(spec, column="right"), _images(6)[::-1])


def test_open_source_names_lists_that_are_no_arrays(tmp_path):
    path = tmp_path / "a.parquet"
    spec = f"parquet:{path}"
    floats = pa.list_(pa.float32())
    for values in ([[1.0, 2.0], [3.0, 4.0], [5.0]], [[1.0], [2.0], None]):
        pq.write_table(pa.table({"x": pa.array(values, floats)}), path)
        _refused(
            f"open_source: {spec} must hold lists of one length, not empty, got others in "
            f"row 0 of {path} and row 2 of {path}",
            spec,
        )
    nested = [[[1.0], [2.0]], [[3.0], [4.0, 5.0]]]
    pq.write_table(pa.table({"x": pa.array(nested, pa.list_(floats))}), path)
    _refused(
        f"open_source: {spec} must hold lists of one length, not empty, got others in row 0 of "
        f"{path} and row 1 of {path}",
        spec,
    )
    pq.write_table(pa.table({"x": pa.array([[1.0], [None], [2.0]], floats)}), path)
    _refused(f"open_source: {spec} must hold finite numbers, got nan in row 1 of {path}", spec)
    pq.write_table(pa.table({"x": pa.array([[1], [2**60]], pa.list_(pa.int64()))}), path)
    _refused(f"open_source: {spec} must hold whole numbers of at most 2^53 ..., got {2**60}", spec)
    _write_parquet(tmp_path / "b.parquet", {"x": _encoded(_images(2))})
    _refused(
        f"open_source: parquet:{tmp_path} must hold one type in column 'x', got ... in {path} and "
        f"... in {tmp_path}/b.parquet",
        f"parquet:{tmp_path}",
    )


@pytest.mark.parametrize("limit", [2**20, 100])
def test_open_source_names_the_image_that_does_not_fit(tmp_path, limit):
    """In memory when it is opened, else when it is read."""
    good = _encoded(_images(8))
    png = np.arange(30, dtype=np.uint8).reshape(5, 6)
    rgba, frames, wide, turned = (io.BytesIO() for _ in range(4))
    Image.new("RGBA", (5, 6)).save(rgba, "PNG")
    pages = [Image.new("L", (5, 6)), Image.new("L", (5, 6), 3)]
    pages[0].save(frames, "TIFF", save_all=True, append_images=pages[1:])
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(wide, "PNG")
    Image.new("P", (5, 6)).save(turned, "PNG")
    modes = "8-bit grey (L), RGB or floating grey (F) images"
    ways = " (--size makes one size of them, --convert rgb or grey one kind)"
    mixed = "hold samples of one shape and kind, got (1, 6, 5) uint8 in row 0 of {path} and"
    place = "in row 5 of {path}"
    cases = [
        (_png(png), f"{mixed} (1, 5, 6) uint8 in row 5 of {{path}}{ways}"),
        (
            _encoded(_images(1, channels=3))[0],
            f"{mixed} (3, 6, 5) uint8 {place}{ways}",
        ),
        (good[5][:60], "hold images that can be read, got row 5 of {path}: ..."),
        (
            b"no image",
            "hold images that can be read, got row 5 of {path}: ...cannot identify image file",
        ),
        (
            rgba.getvalue(),
            f"hold {modes} (--alpha drop, white or black), got mode RGBA {place}",
        ),
        (wide.getvalue(), f"hold {modes} (--bits 8 or 16), got mode I;16 in row 5 of {{path}}"),
        (
            turned.getvalue(),
            f"hold {modes} (--convert rgb or grey), got mode P {place}",
        ),
        (frames.getvalue(), "hold single images, got 2 in row 5 of {path} (--pages first or all)"),
        (None, "hold an image in every row, got none in row 5 of {path}"),
    ]
    for bad, message in cases:
        path = _write_parquet(tmp_path / "a.parquet", {"image": [*good[:5], bad, *good[6:]]})
        expected = f"open_source: parquet:{path} must {message.format(path=path)}"
        pattern = re.escape(expected).replace(re.escape("..."), ".*")
        with pytest.raises(ValueError, match=f"^{pattern}$"):
            data.open_source(f"parquet:{path}", limit=limit).batch(0, 8, seed=0)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(good[0] if name == "a.png" else b"no image")
    _refused(
        f"open_source: folder:{tmp_path} must hold images that can be read, got "
        f"{tmp_path}/b.png: UnidentifiedImageError ...",
        f"folder:{tmp_path}",
    )


def test_photographs_are_turned_as_they_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    image = _images(1)[0, 0]
    for i in range(4):
        Image.fromarray(image).save(tmp_path / f"{i}.png", exif=exif)
    source = data.open_source(f"folder:{tmp_path}")
    assert source.shape == (1, 5, 6)
    assert np.array_equal(source.test[0, 0], np.rot90(image, -1))


def test_parts_that_do_not_fit_in_memory_are_refused(tmp_path):
    spec = _parquet(tmp_path / "a.parquet", _images(40))
    _refused(
        f"open_source: {spec} must fit in the limit of 100 bytes where it is held in memory, got "
        "10 rows of 300 bytes",
        spec,
        limit=100,
        validation=10,
    )
    with pytest.raises(ValueError, match=r"got 40 rows of 1200 bytes$"):
        data.read_samples(spec, limit=100)


@pytest.mark.parametrize(
    ("spec", "module", "extra"),
    [
        ("parquet:{}", "datasets", "cli"),
        ("folder:{}", "PIL.Image", "images"),
        ("digits", "sklearn.datasets", "cli"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, spec, module, extra):
    _parquet(tmp_path / "a.parquet", _images(9))
    _folder(tmp_path, _images(9))
    monkeypatch.setitem(sys.modules, module, None)
    match = f"^open_source: {re.escape(module)} must be installed "
    match += rf"\(pip install hos_ext\[{extra}\]\)"
    with pytest.raises(RuntimeError, match=match):
        data.open_source(spec.format(tmp_path))


# -------------------------------------------------------------------------- sources from elsewhere


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


def test_a_source_from_outside_opens_as_those_of_the_package_do(tmp_path, own_registry):
    values = ops.normal((30, 4), seed=1).numpy()
    np.savetxt(tmp_path / "a.txt", values)
    np.savetxt(tmp_path / "b.txt", values[:5])

    def files(request: data.Request) -> list[Path]:
        return [Path(request.target)]

    @data.register_source("text", "PATH", files=files, held_out=(3, 4))
    def open_text(request: data.Request) -> data.Rows:
        array = np.loadtxt(request.target, dtype=np.float32)
        return data.array_rows(request, array, lambda i: f"line {i} of {request.target}")

    spec = f"text:{tmp_path / 'a.txt'}"
    np.save(tmp_path / "a.npy", values)
    source = data.open_source(spec, seed=5)
    known = data.open_source(f"npy:{tmp_path / 'a.npy'}", seed=5, validation=3, test=4)
    assert (source.scaling, source.std) == (known.scaling, known.std)
    for found, expected in zip(source.parts, known.parts, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(source.test, known.test)
    assert torch.equal(source.batch(3, 8, seed=2)[1], known.batch(3, 8, seed=2)[1])
    small = data.open_source(spec, seed=5, validation=3, test=4, limit=200)
    assert torch.equal(small.batch(3, 8, seed=2)[1], known.batch(3, 8, seed=2)[1])
    own = data.open_source(spec, test_spec=f"text:{tmp_path / 'b.txt'}")
    assert np.array_equal(own.test, values[:5])
    assert np.array_equal(data.read_samples(spec), values)

    _refused(
        f"open_source: test_spec must share nothing with {spec}, got ...", spec, test_spec=spec
    )
    _refused(f"open_source: column must be None for {spec}, got 'x'", spec, column="x")
    _refused(f"open_source: split must be 'train' for {spec}, got 'x'", spec, split="x")
    _refused(
        f"open_source: streaming must be of hf:, parquet: or folder:, got {spec!r}",
        spec,
        streaming=True,
    )
    *forms, last = data.source_forms()
    assert last == "text:PATH"
    kinds = f"{', '.join(forms)} or {last}"
    _refused(f"open_source: spec must be {kinds}, got 'text:'", "text:")
    values[17, 1] = np.nan
    np.savetxt(tmp_path / "a.txt", values)
    _refused(
        f"open_source: {spec} must hold finite numbers, got nan in line 17 of {spec[5:]}", spec
    )


def test_a_source_from_outside_may_have_columns_and_parts_of_its_own(own_registry):
    @data.register_source("parts", splits=lambda request: ["train", "test"], column=True)
    def open_parts(request: data.Request) -> data.Rows:
        n = {"train": 20, "test": 6}[request.split]
        images = _images(n, seed=2 if request.column == "second" else 1)
        return data.array_rows(request, images)

    source = data.open_source("parts", column="second")
    assert np.array_equal(source.test, _images(6, seed=2))
    assert source.scaling == data.Scaling(levels=256)
    assert len(data.open_source("parts", split="test").test) == 1


@pytest.mark.parametrize("name", ["npy", "digits", "", "a:b"])
def test_a_source_is_registered_by_a_new_name(name):
    with pytest.raises(
        ValueError, match=f"^register_source: name must be new and without a colon, got '{name}'$"
    ):
        data.register_source(name)


def test_the_command_line_finds_the_sources_of_installed_packages(
    tmp_path, monkeypatch, own_registry
):
    """As pip leaves a package whose pyproject.toml has an entry point of `hos_ext.sources`."""
    (tmp_path / "waves_source.py").write_text(
        "import numpy as np\n"
        "from hos_ext.app import data\n"
        "@data.register_source('waves', 'N')\n"
        "def open_waves(request):\n"
        "    phase = np.arange(int(request.target), dtype=np.float32)\n"
        "    return data.array_rows(request, np.stack([np.sin(phase), np.cos(phase)], 1))\n"
    )
    info = tmp_path / "waves-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: waves\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hos_ext.sources]\nwaves = waves_source\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "waves_source", None)
    monkeypatch.delitem(sys.modules, "waves_source")
    assert data.open_source("waves:50").shape == (2,)
    small = ["--steps=2", "--width=8", "--head-width=4", "--depth=2", "--rank=1", "--tracker=none"]
    out = tmp_path / "run"
    assert cli.run(["train", "--data", "waves:50", "--out", str(out), *small]) == 0
    assert json.loads((out / "run.json").read_text())["options"]["data"] == "waves:50"
