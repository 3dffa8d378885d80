"""Labels of data sets: read with their rows, and of the same rows in every part and batch."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hos_ext.app import data
from hos_ext.random import Key

# The label of a row can be told from its values: 40 rows, each constant, of 3 classes.
ROWS = 40
NUMBERS = np.arange(ROWS) * 7 % 3
VALUES = (100 * NUMBERS + np.arange(ROWS)).astype(np.float32)


def told(raw):
    """The class that a row says it has."""
    return raw.flatten(1)[:, 0].double().div(100).floor().long()


def images_of(numbers):
    """Pictures whose grey level is 80 times their class and a little more."""
    levels = (80 * numbers + np.arange(len(numbers)) % 40).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None], (len(numbers), 4, 4)).copy()


def write_folder(place, numbers, names=("cat", "dog", "eel")):
    for i, (image, k) in enumerate(zip(images_of(numbers), numbers, strict=True)):
        below = place / names[k] / f"part{i % 2}"
        below.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(below / f"{i:03}.png")
    return f"folder:{place}"


def write_parquet(place, labels, kind=None, values=VALUES):
    table = {"x": [[float(v), 1.0] for v in values], "label": pa.array(labels, type=kind)}
    pq.write_table(pa.table(table), place)
    return f"parquet:{place}"


def check_everywhere(source, told=told, names=("0", "1", "2")):
    """All parts and batches have the labels of their rows."""
    assert source.labels.names == names
    assert torch.equal(told(source.validation), source.labels.validation)
    assert torch.equal(told(source.test), source.labels.test)
    seen = set()
    for step in range(9):  # over the ends of epochs
        _, raw = source.batch(step, 8, seed=3)
        labels = source.batch_labels(step, 8, seed=3)
        assert labels.dtype == torch.int64
        assert torch.equal(told(raw), labels)
        seen |= set(labels.tolist())
        shares = [
            source.batch_labels(step, 8, seed=3, start=a, stop=b) for a, b in ((0, 3), (3, 8))
        ]
        assert torch.equal(torch.cat(shares), labels)
    assert seen == {0, 1, 2}


def test_digits_know_what_they_are():
    from sklearn.datasets import load_digits

    source = data.open_source("digits", label="label")
    assert source.labels.names == tuple("0123456789")
    numbers, _ = source.batch(2, 50, seed=1)
    wanted = torch.from_numpy(load_digits().target)
    assert torch.equal(source.batch_labels(2, 50, seed=1), wanted[numbers])
    assert torch.equal(source.labels.test, wanted[source.parts.test])
    plain = data.open_source("digits")
    assert plain.labels is None
    assert torch.equal(plain.test, source.test)
    with pytest.raises(ValueError, match="must be opened with label, got none"):
        plain.batch_labels(0, 1, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_sub_folders_are_classes(tmp_path, streaming):
    spec = write_folder(tmp_path / "all", NUMBERS)
    source = data.open_source(
        spec, label="label", validation=6, test=8, streaming=streaming, buffer=10
    )
    check_everywhere(source, lambda raw: raw.flatten(1)[:, 0].long() // 80, ("cat", "dog", "eel"))


def test_every_page_has_the_class_of_its_file(tmp_path):
    for k, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for i in range(4):
            pages = [Image.fromarray(page) for page in images_of(np.full(3, k))]
            pages[0].save(tmp_path / name / f"{i}.tiff", save_all=True, append_images=pages[1:])
    pictures = data.Pictures(pages="all")
    source = data.open_source(f"folder:{tmp_path}", label="label", pictures=pictures)
    raw, labels = source.batch(0, 22, seed=0)[1], source.batch_labels(0, 22, seed=0)
    assert torch.equal(raw.flatten(1)[:, 0].long() // 80, labels)


def test_arrays_have_labels_in_an_npz_file_or_in_one_beside(tmp_path):
    x = np.stack([VALUES, VALUES], 1)
    np.savez(tmp_path / "both.npz", x=x, kind=NUMBERS)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", NUMBERS)
    parts = {"validation": 6, "test": 8}
    by_std = {}
    for spec, label in (("both.npz", "kind"), ("x.npy", str(tmp_path / "y.npy"))):
        source = data.open_source(f"npy:{tmp_path / spec}", label=label, **parts)
        check_everywhere(source)
        by_std[spec] = source.std
    assert by_std["both.npz"] == by_std["x.npy"]


@pytest.mark.parametrize("kind", ["int64", "string", "ClassLabel"])
def test_columns_of_tables_are_labels(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    names = ("ape", "bee", "cow")
    if kind == "ClassLabel":
        features = datasets.Features(
            {
                "x": datasets.Sequence(datasets.Value("float32")),
                "label": datasets.ClassLabel(3, names),
            }
        )
        rows = {"x": [[float(v), 1.0] for v in VALUES], "label": NUMBERS.tolist()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
        spec = f"parquet:{tmp_path / 'a.parquet'}"
    else:
        labels = NUMBERS.tolist() if kind == "int64" else [names[k] for k in NUMBERS]
        spec = write_parquet(tmp_path / "a.parquet", labels)
    expected = ("0", "1", "2") if kind == "int64" else names
    parts = {"validation": 6, "test": 8, "label": "label"}
    check_everywhere(data.open_source(spec, **parts), names=expected)
    if kind == "ClassLabel":
        check_everywhere(data.open_source(spec, streaming=True, buffer=10, **parts), names=names)
    else:
        with pytest.raises(ValueError, match="kind ClassLabel"):
            data.open_source(spec, streaming=True, **parts)


def test_classes_of_several_parquet_files_follow_their_rows(tmp_path):
    for part in (0, 1):
        rows = slice(20 * part, 20 * part + 20)
        write_parquet(tmp_path / f"{part}.parquet", NUMBERS[rows].tolist(), values=VALUES[rows])
    check_everywhere(data.open_source(f"parquet:{tmp_path}", label="label", validation=6, test=8))


def test_a_test_set_of_its_own_has_the_classes_of_the_training_set(tmp_path):
    spec = write_folder(tmp_path / "a", NUMBERS)
    fewer = NUMBERS[NUMBERS > 0]  # its own numbers would be others
    own = write_folder(tmp_path / "b", fewer)
    source = data.open_source(spec, test_spec=own, label="label", validation=6)
    assert torch.equal(source.test.flatten(1)[:, 0].long() // 80, source.labels.test)
    write_folder(tmp_path / "b", NUMBERS[:4], ("cat", "dog", "fox"))
    with pytest.raises(ValueError, match="must have no classes but cat, dog, eel, got fox"):
        data.open_source(spec, test_spec=own, label="label")


def test_labels_are_dropped_by_seed_step_and_row():
    labels = torch.arange(1000) % 10
    whole = data.drop_labels(labels, 10, 0.25, Key(3, 7))
    cut = [data.drop_labels(labels[a:b], 10, 0.25, Key(3, 7, a)) for a, b in ((0, 1), (1, 1000))]
    assert torch.equal(torch.cat(cut), whole)
    assert 200 < int((whole == 10).sum()) < 300
    assert torch.equal(whole[whole < 10], labels[whole < 10])
    assert not torch.equal(whole, data.drop_labels(labels, 10, 0.25, Key(3, 8)))
    assert torch.equal(data.drop_labels(labels, 10, 0.0, Key(3, 7)), labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 1, 1], "have labels 'label' in every row, got none in row 1"),
        ([0.5, 1.0, 1.0, 0.5], "label must be one of the columns []"),
        ([1, 1, 1, 1], "have labels 'label' of 2 classes or more, of several rows each, got 1 in"),
        ([1, 2, 3, 4], "have labels 'label' of 2 classes or more, of several rows each, got 1, 2"),
    ],
)
def test_labels_that_tell_no_classes_are_refused(tmp_path, labels, message):
    spec = write_parquet(tmp_path / "a.parquet", labels, values=VALUES[:4])
    with pytest.raises(ValueError, match=re.escape(message)):
        data.open_source(spec, label="label")


def test_sets_without_such_labels_say_so(tmp_path):
    with pytest.raises(ValueError, match="label must be None for density:modes2d, got 'label'"):
        data.open_source("density:modes2d", label="label")
    with pytest.raises(ValueError, match="label must be 'label' for digits, got 'digit'"):
        data.open_source("digits", label="digit")
    np.save(tmp_path / "x.npy", VALUES[:, None])
    with pytest.raises(
        ValueError, match=r"one of the arrays \[\] of .*, or an \.npy file of labels"
    ):
        data.open_source(f"npy:{tmp_path / 'x.npy'}", label="label")
    np.save(tmp_path / "y.npy", NUMBERS[:5])
    with pytest.raises(ValueError, match=r"have 40 labels .*, one for each row, got shape \(5,\)"):
        data.open_source(f"npy:{tmp_path / 'x.npy'}", label=str(tmp_path / "y.npy"))
    bare = tmp_path / "bare"
    write_folder(bare, NUMBERS)
    Image.fromarray(images_of(NUMBERS)[0]).save(bare / "first.png")
    with pytest.raises(ValueError, match=r"sub-folders, which are the classes, got .*first\.png"):
        data.open_source(f"folder:{bare}", label="label")
    one = write_folder(tmp_path / "one" / "train", NUMBERS).replace("/train", "")
    with pytest.raises(ValueError, match="2 classes or more, of several rows each, got train"):
        data.open_source(one, label="label")


# ------------------------------------------------------------------------------ data of one's own


class Items(torch.utils.data.Dataset):
    """A map-style data set that makes its items."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        x, k = torch.tensor([VALUES[i], 1.0]), int(NUMBERS[i])
        return (x, k) if self.kind == "tuple" else {"x": x, "kind": torch.tensor(k)}


@pytest.mark.parametrize("kind", ["tensors", "tuple", "mapping", "hugging face"])
def test_data_of_ones_own_bring_their_labels(kind):
    x = torch.from_numpy(np.stack([VALUES, np.ones_like(VALUES)], 1))
    if kind == "tensors":
        own = torch.utils.data.TensorDataset(x, torch.from_numpy(NUMBERS))
    elif kind == "hugging face":
        datasets = pytest.importorskip("datasets")
        own = datasets.Dataset.from_dict({"x": x.tolist(), "kind": NUMBERS.tolist()})
    else:
        own = Items(kind)
    options = {"validation": 6, "test": 8, "label": "kind", "scaling": data.Scaling()}
    check_everywhere(data.as_source(own, **options))
    assert data.as_source(own, **options | {"label": None}).labels is None


def test_a_part_given_apart_has_labels_too():
    x, y = torch.from_numpy(VALUES)[:, None], torch.from_numpy(NUMBERS)
    whole, part = (torch.utils.data.TensorDataset(x[a:], y[a:]) for a in (0, 30))
    options = {"label": "label", "num_classes": 5, "scaling": data.Scaling()}
    source = data.as_source(whole, test=0, validation=part, **options)
    assert source.labels.names == ("0", "1", "2", "3", "4")
    assert torch.equal(told(source.validation), source.labels.validation)


def test_train_takes_labels_where_the_model_does():
    from hos_ext import MLP
    from hos_ext.app import training

    x, y = torch.randn(60, 2), torch.arange(60) % 3
    options = training.TrainingOptions(steps=2, batch_size=8, device="cpu")
    own = torch.utils.data.TensorDataset(x, y)
    trained = training.train(MLP((2,), 1, width=8, num_classes=3), own, options)
    assert torch.equal(trained.source.labels.validation, y[trained.source.parts.validation])
    with pytest.raises(ValueError, match=r"TensorDataset must have labels 'label' in 0 \.\.\. 1"):
        training.train(MLP((2,), 1, width=8, num_classes=2), own, options)
    with pytest.raises(ValueError, match=r"Tensor must come with labels: .*TensorDataset"):
        training.train(MLP((2,), 1, width=8, num_classes=3), x, options)
    loader = torch.utils.data.DataLoader(own, batch_size=8)
    with pytest.raises(ValueError, match="must have numbered samples for labels"):
        training.train(MLP((2,), 1, width=8, num_classes=3), loader, options)
    plain = training.train(MLP((2,), 1, width=8), own, options)
    assert plain.source.labels is None
