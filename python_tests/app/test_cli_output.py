"""What every command takes: version, help, completion, output, devices, dry runs, JSON."""

import json
import logging
import math
import os
import subprocess
import sys

import numpy as np
import pytest

import hos_ext
from hos_ext import progress
from hos_ext.app import cli, options, runs, training

SMALL = ["--steps=5", "--width=16", "--head-width=8", "--depth=2", "--rank=2", "--batch-size=16"]
SMALL += ["--tracker=none"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert cli.run(["train", "--out", str(folder), *SMALL]) == 0
    return folder


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_version_is_that_of_the_package(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr() == (f"hos-ext {hos_ext.__version__}\n", "")


@pytest.mark.parametrize("command", [[], *[[name] for name in cli.COMMANDS]])
def test_h_is_help_and_every_command_takes_output(capsys, command):
    assert cli.run([*command, "--help"]) == 0
    whole = capsys.readouterr().out
    assert cli.run([*command, "-h"]) == 0
    assert capsys.readouterr().out == whole
    if command:
        for name in ("--quiet", "-q", "--verbose", "-v"):
            assert name in whole
    else:
        for name in ("--version", "--install-completion", "--show-completion"):
            assert name in whole


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_takes_a_device(capsys, command):
    assert cli.run([command, "--help"]) == 0
    assert "--device" in capsys.readouterr().out


def test_the_shell_gets_a_script_and_completions(monkeypatch, capsys):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert cli.run(["--show-completion", "bash"]) == 0
    assert "_HOS_EXT_COMPLETE=complete_bash" in capsys.readouterr().out
    monkeypatch.setenv("_HOS_EXT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "hos-ext e")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert cli.run([]) == 0
    assert capsys.readouterr().out.split() == ["evaluate"]


# ------------------------------------------------------------------------------ quiet and verbose


@pytest.mark.parametrize(
    ("command", "own"),
    [
        ("denoise", []),
        ("evaluate", ["--limit=8"]),
        ("chains", ["--steps=8", "--burn-in=0", "--allow-divergence"]),
        ("generate", ["--count=4", "--steps=2", "--settle=1", "--allow-divergence"]),
    ],
)
def test_quiet_writes_the_same_and_says_nothing(run_folder, tmp_path, capsys, command, own):
    words = [command, str(run_folder), *own, "--out"]
    assert cli.run([*words, str(tmp_path / "a"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.run([*words, str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out
    names = [sorted(path.name for path in (tmp_path / place).iterdir()) for place in "ab"]
    assert names[0] == names[1] != []


def test_train_and_info_are_quiet_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert cli.run(["train", "--out", str(tmp_path), *SMALL, "-q"]) == 0
    assert cli.run(["info", str(tmp_path), "-q"]) == 0
    assert cli.run(["resume", str(tmp_path), "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_quiet_still_says_what_went_wrong(capsys):
    assert cli.run(["denoise", "nowhere", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("hos-ext: load_model: ")


def test_progress_is_logged_and_verbose_tells_of_rows_and_checkpoints(
    tmp_path, capsys, monkeypatch
):
    log = logging.getLogger("hos_ext")
    before = (log.level, list(log.handlers))
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert cli.run(["train", "--out", str(tmp_path / "a"), *SMALL]) == 0
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert len(lines) == 5
    for i, line in enumerate(lines, 1):
        assert f" step {i} of 5: loss " in line
        assert " an entry, denoising error " in line
        assert line.endswith(" left")
    assert "validation error" in told.out
    assert cli.run(["train", "--out", str(tmp_path / "b"), *SMALL, "--verbose"]) == 0
    error = capsys.readouterr().err
    assert " step 3: loss " in error
    assert f" wrote {tmp_path / 'b' / 'checkpoints' / 'step-00000005'}\n" in error
    assert (log.level, log.handlers) == before


def test_verbose_shows_where_an_error_came_from(tmp_path, capsys):
    assert cli.run(["info", str(tmp_path), "-v"]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last):" in error
    assert error.splitlines()[-1].startswith("hos-ext: load_model: folder must hold ")
    assert cli.run(["info", str(tmp_path), "-v", "-q"]) == 2
    message = "hos-ext: info: --quiet must come without --verbose, got both\n"
    assert capsys.readouterr().err == message


# ------------------------------------------------------------------------------------------- JSON


def test_json_is_one_document_on_stdout_and_nothing_else(run_folder, tmp_path, capsys):
    words = ["evaluate", str(run_folder), "--limit=8", "--sigma=0.3", "--json"]
    assert cli.run([*words, "--out", str(tmp_path)]) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert told.err == ""
    assert report == json.loads((tmp_path / "evaluate.json").read_text())
    assert [row["sigma"] for row in report["levels"]] == [0.3]
    assert cli.run([*words, "--out", str(tmp_path / "c"), "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["n"], plan["sigma"], plan["out"]) == (8, [0.3], str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    assert cli.run(["info", str(run_folder), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


@pytest.mark.slow
def test_json_of_a_process_of_its_own(run_folder, tmp_path):
    words = ["evaluate", str(run_folder), "--limit=4", "--json", "--out", str(tmp_path)]
    told = subprocess.run(
        [sys.executable, "-m", "hos_ext.app.cli", *words], capture_output=True, check=True
    )
    assert json.loads(told.stdout)["n"] == 4


# ---------------------------------------------------------------------------------------- devices


def test_devices_that_are_not_there_are_refused_by_name(run_folder, tmp_path, capsys):
    for words in (
        ["train", *SMALL, "--device=cuda:77"],
        ["demo", "--quick", "--device=cuda:77"],
        *(
            [name, str(run_folder), "--device=cuda:77"]
            for name in ("denoise", "chains", "generate", "evaluate")
        ),
    ):
        assert cli.run([*words, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "device must be a device of this machine (cpu" in error
        assert error.endswith(", got 'cuda:77'\n")
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_elsewhere(tmp_path, capsys):
    """The device of a run is where it was trained, and decides nothing."""
    words = ["train", "--out", str(tmp_path), *SMALL, "--decay=constant"]
    assert cli.run(words) == 0
    content = json.loads((tmp_path / "run.json").read_text())
    content["options"]["device"] = "cuda:77"
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert cli.run(["resume", str(tmp_path), "--steps=6"]) == 2
    assert "device must be a device of this machine" in capsys.readouterr().err
    assert cli.run(["resume", str(tmp_path), "--steps=6", "--device=cpu"]) == 0
    assert runs.read_run(tmp_path)["options"]["device"] == "cpu"
    assert runs.load_run(tmp_path)[1]["step"] == 6


# --------------------------------------------------------------------------------------- dry runs


def test_a_dry_run_of_training_says_what_would_happen_and_writes_nothing(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(3.0, 2.0, (60, 2, 5)))
    before, out = everything(tmp_path), tmp_path / "run"
    words = ["train", "--data", f"npy:{tmp_path / 'x.npy'}", "--out", str(out), *SMALL]
    assert cli.run([*words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert everything(tmp_path) == before
    assert "54 samples of shape (2, 5) to train on" in lines[0]
    assert lines[-3].endswith(f"5 steps; to {out}")
    options_, source = options.complete({"data": f"npy:{tmp_path / 'x.npy'}"} | read(SMALL))
    model = options.build_model(options_, source.shape)
    memory = training.estimate_memory(model, source, options.training_options(options_))
    assert f"hold about {memory.weights / 2**20:.1f} MiB of weights" in lines[-2]
    assert f"{memory.activations / 2**20:.1f} MiB of activations for 16 samples" in lines[-2]
    assert lines[-1] == (
        "would write run.json, checkpoints, logs, model, training.png, metrics.json to "
        f"{out}, a checkpoint every 500 steps (1 in all, the last 3 kept)"
    )
    assert cli.run(words) == 0
    assert runs.read_run(out)["options"] == options_ | {"tracker": "none"}


def read(words):
    """Typed options by name."""
    pairs = (word[2:].split("=") for word in words)
    return {k.replace("-", "_"): int(v) if v.isdigit() else v for k, v in pairs}


def test_a_dry_run_refuses_what_a_run_would(tmp_path, run_folder, capsys):
    assert cli.run(["train", "--out", str(run_folder), *SMALL, "--dry-run"]) == 2
    assert "out must hold no run" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.run(["train", "--out", str(tmp_path / "file" / "run"), *SMALL, "--dry-run"]) == 2
    assert "Not a directory" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:  # root may write everywhere
        patch.setattr(os, "access", lambda *_: False)
        assert cli.run(["train", "--out", str(tmp_path / "run"), *SMALL, "--dry-run"]) == 2
    assert f"Permission denied: '{tmp_path}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("denoise", ["would denoise 3 samples of shape (8, 8) at sigma 0.5", "denoise.npz"]),
        ("chains", ["would draw 3 chains of 200 + 1000 steps of ozaki", "chains-ozaki.npz"]),
        ("generate", ["would draw 3 samples by 50 steps of heun", "generate.npz"]),
        ("evaluate", ["would evaluate 3 held-out samples at sigma 0.5", "calibration.png"]),
    ],
)
def test_dry_runs_of_other_commands_write_nothing(run_folder, tmp_path, capsys, command, words):
    counts = {"chains": "--chains", "evaluate": "--limit"}
    before = everything(run_folder)
    line = [command, str(run_folder), counts.get(command, "--count"), "3", "--dry-run"]
    line += [] if command == "generate" else ["--sigma", "0.5"]
    assert cli.run([*line, "--out", str(tmp_path / "new")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("dry run: ")
    assert told.endswith(f" to {tmp_path / 'new'}\n")
    for word in words:
        assert word in told
    assert not (tmp_path / "new").exists()
    assert cli.run(line) == 0
    assert everything(run_folder) == before


def test_resume_has_a_dry_run(tmp_path, capsys):
    words = ["train", "--out", str(tmp_path), *SMALL, "--decay=constant"]
    assert cli.run(words) == 0
    before = everything(tmp_path)
    assert cli.run(["resume", str(tmp_path), "--steps=9", "--dry-run"]) == 0
    assert "9 steps; to " in capsys.readouterr().out
    assert everything(tmp_path) == before


# -------------------------------------------------------------------------- objective and precision


def test_bf16_runs_with_the_recommended_objective_and_names_it_where_another_fails(
    tmp_path, capsys
):
    words = ["train", *SMALL, "--mixed-precision=bf16", "--sigma=0.01,1"]
    assert cli.run([*words, "--out", str(tmp_path / "vr"), "--objective=vr"]) == 2
    error = capsys.readouterr().err
    assert "mixed_precision must be 'no' for variance reduction below sigma " in error
    assert "'centred'" in error
    assert training.TrainingOptions(steps=1).objective == training.OBJECTIVE
    state = pytest.importorskip("accelerate.state").AcceleratorState
    state._reset_state(True)  # accelerate keeps the precision of a process
    try:
        assert cli.run([*words, "--out", str(tmp_path / "run")]) == 0
    finally:
        state._reset_state(True)
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]
    assert math.isfinite(figures["loss_per_entry"])
