"""Tables: columns of CSV and parquet files, each of its own scale; what is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hos_ext.app import cli, data, runs
from hos_ext.app.data import Scaling

RNG = np.random.default_rng(0)
AGE = RNG.integers(18, 90, 200)
INCOME = 30000 + 9000 * RNG.standard_normal(200)
HEIGHT = (1.7 + 0.1 * RNG.standard_normal(200)).astype(np.float32)
TABLE = {
    "age": AGE,
    "name": ["x"] * 200,
    "income": INCOME,
    "height": HEIGHT,
    "kind": ["a", "b"] * 100,
}


def write(folder: Path, kind: str, table: dict[str, Any]) -> str:
    path = folder / f"t.{kind}"
    found = pa.table(table)
    if kind == "parquet":
        pq.write_table(found, path)
    else:
        from pyarrow import csv

        csv.write_csv(found, path)
    return f"{kind}:{path}"


@pytest.mark.parametrize("kind", ["csv", "parquet", "hf"])
def test_columns_are_chosen_and_each_is_standardised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "hf":
        found = datasets.Dataset.from_dict(TABLE)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
        spec = "hf:mine"
    else:
        spec = write(tmp_path, kind, TABLE)
    source = data.open_source(spec, columns="income, age,height", label="kind")
    assert source.shape == (3,)
    assert source.columns == ("income", "age", "height")
    expected = np.stack([INCOME, AGE, HEIGHT], 1)
    rows, raw = source.batch(0, 32, seed=0)
    np.testing.assert_allclose(raw.numpy(), expected[rows], rtol=1e-6)
    train = expected[source.parts.train]
    np.testing.assert_allclose(source.scaling.mean, train.mean(0), rtol=1e-7)
    np.testing.assert_allclose(source.scaling.std, train.std(0), rtol=1e-7)
    x = source.scaling.forward(raw, seed=0)
    np.testing.assert_allclose(
        x.numpy(), (expected[rows] - train.mean(0)) / train.std(0), atol=1e-4
    )
    np.testing.assert_allclose(source.scaling.raw_mean(x).numpy(), expected[rows], rtol=1e-6)
    np.testing.assert_allclose(source.scaling.raw_std(torch.ones(1, 3))[0], train.std(0), rtol=1e-7)
    assert source.std == pytest.approx(1, abs=1e-6)
    assert source.labels is not None
    assert source.labels.names == ("a", "b")
    # Without a choice all columns are meant; text among them is named.
    with pytest.raises(ValueError, match=r"hold numbers in column 'name' \(--columns NAME,NAME"):
        data.open_source(spec, label="kind")
    numbers = {k: v for k, v in TABLE.items() if k in ("age", "income")}
    if kind != "hf":
        assert data.open_source(write(tmp_path, kind, numbers)).columns == ("age", "income")


def test_a_scaling_of_columns_goes_through_json() -> None:
    scaling = Scaling(mean=(1.5, -2.0), std=(0.1, 3.0))
    assert Scaling.from_dict(json.loads(json.dumps(scaling.as_dict()))) == scaling
    assert scaling.by_column
    assert not Scaling(levels=256).by_column
    for bad in (
        {"mean": [1.0], "std": [1.0, 2.0]},
        {"mean": [], "std": []},
        {"mean": [1.0], "std": [0.0]},
    ):
        with pytest.raises(ValueError, match="content must hold levels, mean and std > 0"):
            Scaling.from_dict({"levels": 0, **bad})


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n3,\n", {}, "of column 'b' (--columns leaves it out), got nan in row 1 of"),
        ("a,b\n1,2\n3,inf\n", {}, "of column 'b' (--columns leaves it out), got inf in row 1 of"),
        ("a,b\n1,2\n3,x\n", {}, "'b' (--columns NAME,NAME,... chooses others), got string"),
        ("a,b\n1,true\n3,false\n", {}, "'b' (--columns NAME,NAME,... chooses others), got bool"),
        ("a,b\n1,2\n", {"columns": "a,c"}, "have the columns 'a', 'c', got ['a', 'b'] in"),
        ("a,a\n1,2\n", {}, "have columns of different names, got ['a'] in"),
        ("1,2\n3,4\n", {}, "have a line of names first, got numbers in the first line of"),
        ("a,b\n1,2,3\n", {}, "hold whole tables, values between commas, got"),
        ("", {}, "hold whole tables, values between commas, got"),
        ("a,b\n1,2\n1,3\n1,4\n1,6\n", {}, "column 'a', must vary, got standard deviation 0.0"),
        ("a,b\n1,2\n3,4\n", {}, "must hold at least 3 rows, one of each part, got 2"),
        ("a,b\n1,2\n3,4\n", {"streaming": True}, "streaming must be of"),
        ("a,b\n1,2\n3,4\n", {"column": "a"}, "column must be None for csv:"),
        ("a,b\n1,2\n3,4\n", {"columns": "a,,b"}, "columns must be names, each of them once"),
    ],
)  # fmt: skip
def test_what_is_no_table_of_numbers_is_named(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"^open_source: .*{re.escape(message)}"):
        data.open_source(f"csv:{tmp_path / 't.csv'}", **options)


def test_other_signs_between_values_and_several_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a;b\n1;2.5\n3;4\n")
    (tmp_path / "b.tsv").write_text("b\ta\n5\t6\n")
    rows = data.open_rows(f"csv:{tmp_path}")
    assert rows.read(torch.arange(3)).tolist() == [[1, 2.5], [3, 4], [6, 5]]
    (tmp_path / "c.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match=r"have the columns 'a', 'b', got \['a'\] in .*c.csv"):
        data.open_rows(f"csv:{tmp_path}")
    with pytest.raises(ValueError, match=r"^open_source: columns must be None for digits"):
        data.open_source("digits", columns="a")


def test_a_table_is_trained_on_denoised_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, run = write(tmp_path, "csv", TABLE), str(tmp_path / "run")
    small = ["--columns", "age,income", "--width", "8", "--head-width", "8", "--rank", "1"]
    small += ["--steps", "2", "--batch-size", "8", "--tracker", "none", "--device", "cpu"]
    assert cli.run(["train", "--data", spec, *small, "--out", run]) == 0
    assert "standardised by mean and standard deviation of each column: age 5" in (
        capsys.readouterr().out
    )
    assert runs.read_run(tmp_path / "run")["data"]["columns"] == ["age", "income"]
    assert cli.run(["evaluate", run]) == 0
    (tmp_path / "noisy.csv").write_text("income,age\n30000,40\n10000,20\n")
    assert cli.run(["denoise", run, str(tmp_path / "noisy.csv"), "--sigma", "0.5"]) == 0
    found = np.load(tmp_path / "run" / "denoise.npz")
    scaling = runs.scaling_of(runs.read_run(tmp_path / "run"))
    raw = np.array([[40, 30000], [20, 10000.0]])
    expected = (raw - scaling.mean) / scaling.std
    np.testing.assert_allclose(found["noisy"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["raw_std"], found["std"] * scaling.std, rtol=1e-6)
    np.testing.assert_allclose(found["raw_sigma"], 0.5 * np.array(scaling.std))
    arguments = ["denoise", run, str(tmp_path / "noisy.csv"), "--force", "--raw-sigma", "1"]
    assert cli.run(arguments) == 2
    assert "--raw-sigma must be left out for columns of different scales" in capsys.readouterr().err


def test_a_table_of_names_alone_is_empty(tmp_path):
    (tmp_path / "a.csv").write_text("height,weight\n")
    with pytest.raises(ValueError, match=r"a.csv must not be empty, got 0 rows in .*a.csv$"):
        data.open_source(f"csv:{tmp_path / 'a.csv'}")
