"""`hos-ext push`, and runs that are read from the hub, by a server on this machine."""

import json
import os
import subprocess
import sys

import hub_server
import numpy as np
import pytest

import hos_ext
from hos_ext.app import cli, results, runs

constants = pytest.importorskip("huggingface_hub.constants", reason="needs hos_ext[hub]")
SMALL = ["--steps=5", "--width=16", "--head-width=8", "--depth=2", "--rank=2", "--batch-size=16"]
SMALL += ["--tracker=none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on data of a path of this machine."""
    place = tmp_path_factory.mktemp("secret") / "people"
    place.mkdir()
    rng = np.random.default_rng(0)
    np.save(place / "x.npy", rng.integers(0, 256, (80, 1, 4, 4), dtype=np.uint8))
    words = ["train", "--data", f"npy:{place / 'x.npy'}", "--model=mlp", *SMALL]
    assert cli.run([*words, "--validation=10", "--test=20", "--out", str(place / "run")]) == 0
    return place


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server.serving() as server:
        hub_server.point_to(monkeypatch, server, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield server


def test_a_run_is_pushed_with_a_card_and_read_again(folder, hub, tmp_path, capsys):
    assert cli.run(["push", str(folder / "run"), "me/small", "--limit", "12"]) == 0
    sha, files = hub.commits["me/small"][0]
    address = f"{hub.url}/me/small/commit/{sha}"
    assert capsys.readouterr().out == f"wrote me/small: {address}\n"
    assert sorted(files) == [
        "README.md",
        "calibration.png",
        "config.json",
        "model.safetensors",
        "uncertainty.png",
    ]
    assert files["calibration.png"].startswith(b"\x89PNG")
    card = files["README.md"].decode()
    model, facts = runs.load_run(folder / "run")
    for words in (
        "| set | `npy:x.npy` |",
        "| samples | 50 to train on, 10 to tune on, 20 to report on |",
        "| data units | raw levels 0 to 255 lie in [-1, 1]; standard deviation ",
        "| objective | centred, weight of the first-order term 16 |",
        "| noise levels | sigma 0.1 to 1.2, log-uniform, data units |",
        "| steps | 5 of 16 samples |",
        "On 12 held-out samples",
        f"The covariance times {facts['recalibration']:.4g} is the recalibrated one.",
        "| sigma | error noisy | denoised | Mahalanobis | predictive | predictive, recalibrated |",
        "![calibration](calibration.png)",
    ):
        assert words in card
    assert card.count("\n| 0.") == 3  # levels
    for content in files.values():
        assert b"secret" not in content
        assert b"people" not in content
    loaded, config = hos_ext.load_model("me/small")
    assert config["run"]["recalibration"] == facts["recalibration"]
    for value, wanted in zip(loaded.parameters(), model.parameters(), strict=True):
        assert value.equal(wanted)


def test_commands_take_a_run_of_the_hub(folder, hub, tmp_path, capsys):
    assert cli.run(["push", str(folder / "run"), "me/small", "--limit", "4", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    moved = ["--data", f"npy:{folder / 'x.npy'}"]
    for name, words in (("evaluate", ["--limit=4"]), ("denoise", ["--count=1"])):
        out = tmp_path / name
        assert cli.run([name, "me/small", *words, *moved, "--out", str(out)]) == 0
        local = tmp_path / f"{name}-local"
        assert cli.run([name, str(folder / "run"), *words, "--out", str(local)]) == 0
        assert {p.name for p in out.iterdir()} == {p.name for p in local.iterdir()}
    reports = [
        json.loads((tmp_path / place / "evaluate.json").read_text())["levels"]
        for place in ("evaluate", "evaluate-local")
    ]
    assert reports[0] == reports[1]
    capsys.readouterr()
    assert cli.run(["info", "me/small", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["data"]["spec"]) == ("a model", "npy:x.npy")
    assert cli.run(["evaluate", "me/small", *moved]) == 2
    assert "--out must be given where RUN is no folder (me/small is a" in capsys.readouterr().err
    assert cli.run(["evaluate", "me/small", "--out", str(tmp_path / "new")]) == 2
    assert "x.npy" in capsys.readouterr().err
    assert not (tmp_path / "me").exists()


def test_what_goes_wrong_is_one_line_and_a_code(folder, hub, monkeypatch, tmp_path, capsys):
    def told(words, code):
        assert cli.run(words) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    run = str(folder / "run")
    assert "me/none: 404" in told(["info", "me/none"], 2)
    assert "USER/NAME must be a name on the hub, got 'small'" in told(["push", run, "small"], 2)
    assert "nowhere" in told(["push", "nowhere", "me/small"], 2)
    hub.token = "right"
    error = told(["push", run, "me/small", "--limit=2"], 1)
    assert "the hub must answer and let you write to me/small" in error
    hub_server.point_to(monkeypatch, None, tmp_path / "cache")
    assert "a hub that answers, or in its cache, got me/x: " in told(["info", "me/x"], 1)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for words in (["info", "me/x"], ["push", run, "me/small"]):
        assert "huggingface_hub must be installed (pip install hos_ext[hub])" in told(words, 1)
    assert hub.commits == {}


def test_a_dry_run_shows_the_card_and_pushes_nothing(folder, hub, capsys):
    assert cli.run(["push", str(folder / "run"), "me/small", "--limit=3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "dry run: would write config.json, model.safetensors, README.md, calibration.png, "
        "uncertainty.png to me/small on the hub. Of the card:\n\n## Data\n"
    )
    assert "On 3 held-out samples" in out
    assert not any(line.startswith("POST") for line in hub.asked)


def test_names_of_the_hub_stay_and_paths_go():
    options = {"data": "hf:me/set", "test_data": "folder:/home/me/photos/", "first_order": None}
    facts = {"options": options, "data": {"spec": "density:circles"}, "launch": "mine"}
    assert results.without_paths(facts) == {
        "options": {"data": "hf:me/set", "test_data": "folder:photos", "first_order": None},
        "data": {"spec": "density:circles"},
    }
    assert options["test_data"] == "folder:/home/me/photos/"


@pytest.mark.slow
def test_the_environment_says_where_the_hub_is(folder, hub, tmp_path):
    """HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE, which huggingface_hub reads itself."""
    cache = {"HF_HUB_CACHE": str(tmp_path / "own")}
    start = [sys.executable, "-m", "hos_ext.app.cli"]

    def run(words, code, **environment):
        told = subprocess.run(
            [*start, *words], env=os.environ | cache | environment, capture_output=True, text=True
        )
        assert told.returncode == code, told.stderr
        return told

    words = ["push", str(folder / "run"), "me/small", "--limit=3"]
    run(words, 0, HF_ENDPOINT=hub.url, HF_TOKEN="any")
    info = ["info", "me/small", "--json"]
    assert json.loads(run(info, 0, HF_ENDPOINT=hub.url).stdout)["state"] == "a model"
    assert json.loads(run(info, 0, HF_HUB_OFFLINE="1").stdout)["state"] == "a model"
    assert run(["info", "me/x"], 1, HF_HUB_OFFLINE="1").stderr.count("\n") == 1
