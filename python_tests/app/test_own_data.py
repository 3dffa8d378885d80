"""Data of one's own: what `train` and `as_source` take, and what exactness each kind keeps."""

from __future__ import annotations

import random
import re
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from hos_ext import MLP
from hos_ext.app import data, training
from hos_ext.app.data import Scaling, as_source

X = torch.randn(80, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LEVELS = (X * 40 + 128).clamp(0, 255).to(torch.uint8)


class Mine(Dataset[Any]):
    """A map-style data set; what an item is comes from a function of a row."""

    def __init__(self, item: Any = lambda i: (X[i], i), size: int = 80) -> None:
        self.item, self.size = item, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


class Endless(IterableDataset[Any]):
    """An iterable that ends and can be read again."""

    def __iter__(self) -> Any:
        return iter([{"x": x, "label": 3} for x in X])


class Noisy(Dataset[Any]):
    """Items that draw from all three generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> torch.Tensor:
        noise = torch.rand(1, 4, 4) + np.random.rand() + random.random()  # noqa: NPY002
        return torch.full((1, 4, 4), 100.0 * i) + noise


KINDS: dict[str, Any] = {
    "a tensor": lambda: X,
    "an array": lambda: X.numpy(),
    "a TensorDataset": lambda: TensorDataset(X, torch.arange(80)),
    "a list": lambda: list(X),
    "tensors": lambda: Mine(lambda i: X[i]),
    "pairs": lambda: Mine(),
    "mappings": lambda: Mine(lambda i: {"label": i, "x": X[i]}),
    "arrays": lambda: Mine(lambda i: X[i].numpy()),
    "Hugging Face": lambda: datasets.Dataset.from_dict({"x": X.tolist(), "label": list(range(80))}),
    "Hugging Face, torch": lambda: datasets.Dataset.from_dict(
        {"x": X.tolist(), "label": list(range(80))}
    ).with_format("torch"),
}
PASSES: dict[str, Any] = {
    "iterable": lambda: Endless(),
    "loader": lambda: DataLoader(Mine(), batch_size=8, shuffle=True),
    "loader with a generator": lambda: DataLoader(
        Mine(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "loader of an iterable": lambda: DataLoader(Endless(), batch_size=8),
    "loader of items": lambda: DataLoader(Mine(), batch_size=None, shuffle=True),
    "Hugging Face, iterable": lambda: datasets.Dataset.from_dict(
        {"x": X.tolist()}
    ).to_iterable_dataset(),
}


def options(**changes: Any) -> training.TrainingOptions:
    given: dict[str, Any] = {"steps": 6, "batch_size": 8, "device": "cpu", "save_every": 2}
    return training.TrainingOptions(**given | changes)


def build() -> MLP:
    torch.manual_seed(0)
    return MLP((1, 4, 4), rank=1, width=8, depth=1)


def weights(trained: training.Trained) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()])


# ----------------------------------------------------------------------------- what can be numbered


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_rows_of_the_tensor(kind: str) -> None:
    source, plain = as_source(KINDS[kind](), seed=3), as_source(X.double(), seed=3)
    assert source.shape == (1, 4, 4)
    assert source.scaling == Scaling()
    assert source.std == pytest.approx(float(X.square().mean().sqrt()), rel=0.05)
    for part in ("validation", "test"):
        assert torch.equal(getattr(source, part).double(), getattr(plain, part))
    assert len(source.validation) == 4
    rows, raw = source.batch(7, 16, seed=1)
    assert torch.equal(raw.double(), X[rows].double())
    assert torch.equal(rows, plain.batch(7, 16, seed=1)[0])
    held = {tuple(x.flatten().tolist()) for x in (*source.validation, *source.test)}
    every = torch.cat([source.batch(i, 8, seed=0)[1] for i in range(9)])
    assert len({tuple(x.flatten().tolist()) for x in every} & held) == 0
    assert len({tuple(x.flatten().tolist()) for x in every}) == 72


@pytest.mark.parametrize("kind", ["pairs", "Hugging Face", *PASSES])
def test_train_takes_every_kind_and_resumes_exactly(kind: str, tmp_path: Any) -> None:
    """Killed after step 4 and resumed, with data made anew, it ends with the same weights."""
    make = (KINDS | PASSES)[kind]
    apart = {"validation": X[:4]} if "loader" in kind else {}
    whole = training.train(build(), make(), options(), **apart)
    torch.manual_seed(99)  # what others draw does not matter
    training.train(build(), make(), options(decay="constant", steps=4), out=tmp_path, **apart)
    resumed = training.train(
        build(), make(), options(decay="constant"), out=tmp_path, resume=True, **apart
    )
    again = training.train(build(), make(), options(decay="constant"), **apart)
    assert resumed.resumed_from == 4
    assert torch.equal(weights(resumed), weights(again))
    assert not torch.equal(weights(whole), weights(again))
    assert whole.source.shape == (1, 4, 4)


def test_what_items_draw_is_a_function_of_seed_step_and_row() -> None:
    source, other = as_source(Noisy(), scaling="standardise"), as_source(Noisy(), scaling=Scaling())
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate()
    rows, raw = source.batch(3, 8, seed=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    random.seed(7)
    again = [other.batch(3, 8, seed=1, start=i, stop=i + 2)[1] for i in (0, 2, 4, 6)]
    assert torch.equal(raw, torch.cat(again))  # shares of processes are those of one
    assert not torch.equal(raw % 100, source.batch(3, 8, seed=2)[1] % 100)
    drawn = raw - 100.0 * rows.reshape(-1, 1, 1, 1)
    assert drawn.flatten(1).std(1).min() > 0.1
    assert len(set(drawn.flatten().tolist())) > 8 * 15
    assert torch.equal(source.validation, other.validation)


def test_whole_levels_and_pictures_are_levels() -> None:
    grey = [Image.fromarray(x[0].numpy()) for x in LEVELS]
    for kind in (LEVELS, Mine(lambda i: {"image": grey[i], "label": i}), grey):
        source = as_source(kind)
        assert source.scaling == Scaling(levels=256)
        rows, raw = source.batch(0, 8, seed=0)
        assert torch.equal(raw, LEVELS[rows])
    assert as_source(Mine(lambda i: grey[i].convert("RGB"))).shape == (3, 4, 4)
    hugging = datasets.Dataset.from_dict(
        {"image": grey}, features=datasets.Features({"image": datasets.Image()})
    )
    rows, raw = as_source(hugging).batch(0, 8, seed=0)
    assert torch.equal(raw, LEVELS[rows])


def test_parts_may_be_given_apart() -> None:
    loader = DataLoader(TensorDataset(X[60:]), batch_size=5)
    source = as_source(TensorDataset(X[:50]), validation=X[50:60], test=loader)
    assert torch.equal(source.validation, X[50:60])
    assert torch.equal(source.test, X[60:])
    every = torch.cat([source.batch(i, 10, seed=0)[1] for i in range(5)])
    assert len({tuple(x.flatten().tolist()) for x in every}) == 50
    assert as_source(X, test=0).test.shape == (0, 1, 4, 4)
    with pytest.raises(ValueError, match=r"^as_source: test must hold samples \(1, 4, 4\) of"):
        as_source(X, test=X[:, :, :2])
    with pytest.raises(ValueError, match=r"of torch.uint8 like data, got \(1, 4, 4\) of torch.fl"):
        as_source(LEVELS, validation=X)


def test_a_scaling_is_none_or_as_given() -> None:
    wide = 50 + 20 * X
    with pytest.warns(UserWarning, match=r"root mean square of 5\d.*scaling='standardise'"):
        plain = as_source(wide)
    assert plain.scaling == Scaling()
    assert as_source(wide, scaling=Scaling()).scaling == Scaling()
    scaled = as_source(wide, scaling="standardise")
    assert scaled.scaling.mean == pytest.approx(50, abs=2)
    assert scaled.std == pytest.approx(1, abs=0.02)
    assert as_source(wide, scaling=Scaling(mean=50.0, std=20.0)).std == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match=r"^as_source: scaling must have 256 levels as Tensor"):
        as_source(LEVELS, scaling=Scaling())


def test_whole_numbers_are_floating_and_said() -> None:
    source = as_source((1000 * X).long(), scaling="standardise")
    rows, raw = source.batch(0, 8, seed=0)
    assert raw.dtype == torch.float64
    assert torch.equal(raw, (1000 * X).long()[rows].double())
    with pytest.warns(UserWarning, match=r"grey levels 0 to 255 as uint8 are dequantised"):
        as_source(LEVELS.long(), scaling="standardise")
    with pytest.raises(ValueError, match=r"whole numbers of at most 2\^53"):
        as_source((X * 2**60).long(), scaling="standardise")


# ------------------------------------------------------------------------ what is only read through


def test_a_loader_keeps_its_order_and_is_told_of_every_pass() -> None:
    loader = DataLoader(Mine(), batch_size=8, shuffle=True)
    source = as_source(loader, validation=X[:4], test=0, batch_size=8)
    first = torch.cat([source.batch(i, 8, seed=0)[1] for i in range(10)])
    second = torch.cat([source.batch(i, 8, seed=0)[1] for i in range(10, 20)])
    assert sorted(first.flatten(1).sum(1).tolist()) == sorted(X.flatten(1).sum(1).tolist())
    assert not torch.equal(first, second)  # shuffled anew
    assert sorted(first.flatten(1).sum(1).tolist()) == sorted(second.flatten(1).sum(1).tolist())
    anew = as_source(DataLoader(Mine(), batch_size=8, shuffle=True), validation=X[:4], test=0)
    torch.manual_seed(1)
    assert torch.equal(anew.batch(13, 8, seed=0)[1], second[24:32])  # a resumed run
    plain = as_source(DataLoader(Mine(), batch_size=8), validation=X[:4], test=0)
    assert torch.equal(plain.batch(0, 8, seed=0)[1], X[:8])
    # A share is that of the whole; batches are cut across the ends of passes.
    assert torch.equal(
        plain.batch(4, 32, seed=0, start=3, stop=9)[1], X[[51 + i for i in range(6)]]
    )
    assert torch.equal(plain.batch(2, 32, seed=0)[1], torch.cat([X[64:], X[:16]]))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_of_a_loader_repeat_too() -> None:
    def opened() -> data.Source:
        loader = DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=1)
        return as_source(loader, validation=torch.zeros(2, 1, 4, 4), test=0, scaling=Scaling())

    one, two = opened(), opened()
    torch.manual_seed(4)
    batch = one.batch(2, 8, seed=3)[1]
    assert torch.equal(batch, two.batch(2, 8, seed=3)[1])
    assert not torch.equal(batch, two.batch(2, 8, seed=4)[1])


def test_a_loader_without_rows_apart_is_said() -> None:
    with pytest.warns(UserWarning, match="^as_source: the first 4 samples of DataLoader"):
        training.train(build(), DataLoader(Mine(), batch_size=8), options(steps=1))


def test_an_iterable_holds_out_its_first_samples() -> None:
    source = as_source(Endless(), validation=10, test=6)
    assert torch.equal(source.validation, X[:10])
    assert torch.equal(source.test, X[10:16])
    assert torch.equal(source.batch(0, 64, seed=0)[1], X[16:])
    assert torch.equal(source.batch(1, 64, seed=0)[1], X[16:])


# ---------------------------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (3, TypeError, "data must be a Source, a Tensor"),
    "a text": ("npy:a.npy", TypeError, "data must be a Source, a Tensor"),
    "a tuple": ((X, X), TypeError, "data must be one of its tensors, or torch.utils.data.Tensor"),
    "a table": (
        pandas.DataFrame({"a": [0.0, 1.0, 2.0]}),
        TypeError,
        "data must be its array, data.to_numpy(), got DataFrame",
    ),
    "a generator": ((x for x in X), TypeError, "what can be read once only"),
    "parts": (
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"x": X.tolist()})}),
        TypeError,
        "data must be one of its parts, such as data['train'], got DatasetDict",
    ),
    "labels alone": (Mine(lambda i: i), ValueError, "Mine must give tensors, arrays or pictures"),
    "two columns": (
        Mine(lambda i: {"a": X[i], "b": X[i]}),
        ValueError,
        "have the sample as column, one of ['a', 'b'], in item 0, got column None",
    ),
    "mixed sizes": (
        Mine(lambda i: X[i] if i < 40 else X[i, :, :3]),
        ValueError,
        "hold samples of one shape and kind",
    ),
    "not finite": (Mine(lambda i: X[i].log()), ValueError, "finite numbers, got nan in item"),
    "channels last": (Mine(lambda i: np.zeros((5, 6, 1))), ValueError, "channels last"),
    "bfloat16": (X.bfloat16(), ValueError, "float16 or more, got torch.bfloat16"),
    "a palette": (Mine(lambda i: Image.new("P", (4, 4))), ValueError, "got mode P in item 0"),
    "too few": (X[:1], ValueError, "Tensor must hold at least 2 rows, one of each part, got 1"),
    "none": (X[:0], ValueError, "not be empty"),
    "a loader of another size": (
        DataLoader(Mine(), batch_size=5),
        ValueError,
        "DataLoader must have the batch_size of the training, 8 (or give its data set itself)",
    ),
    "a loader that shares out": (
        DataLoader(Mine(), batch_size=8, sampler=DistributedSampler(Mine(), 2, 0)),
        ValueError,
        "DataLoader must have no DistributedSampler",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named_by_train(name: str) -> None:
    given, kind, message = REFUSED[name]
    with pytest.raises(kind, match=rf"^(train|as_source): .*{re.escape(message)}"):
        training.train(build(), given, options())


def test_a_source_is_given_back() -> None:
    source = as_source(X)
    assert as_source(source) is source
    with pytest.raises(
        ValueError, match=r"^train: validation, test, column and scaling must be None"
    ):
        training.train(build(), source, options(), validation=3)
    assert data.as_source is as_source
