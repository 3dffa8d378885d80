"""The command line: what the commands write, exit codes, one-line errors."""

import json
import math
import os
import sys

import numpy as np
import pytest

from hos_ext import cli, evaluation, training

SMALL = ["--steps=5", "--width=16", "--head-width=8", "--depth=2", "--rank=2", "--batch-size=16"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert cli.run(["train", "--out", str(folder), *SMALL]) == 0
    return folder


def _files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_train_writes_checkpoint_metrics_and_curve(run_folder):
    assert _files(run_folder) == [
        "config.json",
        "metrics.json",
        "model.safetensors",
        "training.png",
    ]
    metrics = json.loads((run_folder / "metrics.json").read_text())
    model, settings = training.load_checkpoint(run_folder)
    assert settings["step"] == metrics["train"]["steps"] == 5
    assert settings["recalibration"] == metrics["train"]["recalibration"] > 0
    assert settings["train"]["batch_size"] == metrics["train"]["batch_size"] == 16
    assert metrics["train"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert [row["step"] for row in metrics["history"]] == [1, 2, 3, 4, 5]


def test_denoise_writes_figure_and_arrays(run_folder, tmp_path, capsys):
    code = cli.run(
        ["denoise", str(run_folder), "--sigma", "0.5", "--count", "3", "--out", str(tmp_path)]
    )
    assert code == 0
    assert _files(tmp_path) == ["denoise.npz", "denoise.png"]
    arrays = dict(np.load(tmp_path / "denoise.npz"))
    assert {name: value.shape for name, value in arrays.items()} == {
        "sigma": (),
        "clean": (3, 8, 8),
        "noisy": (3, 8, 8),
        "mean": (3, 8, 8),
        "std": (3, 8, 8),
        "eigenvalues": (3, 4),
        "eigenvectors": (3, 64, 4),
    }
    # The covariance is the recalibrated one, and it is that of the checkpoint.
    model, settings = training.load_checkpoint(run_folder)
    digits = training.data.load_digits(seed=0)
    result = evaluation.denoise(model, digits.test[:3], 0.5, seed=0)
    expected = settings["recalibration"] ** 0.5 * result.posterior.std
    np.testing.assert_allclose(arrays["std"], expected, rtol=1e-5)
    assert "mean squared error 0.2" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["langevin", "ozaki"])
def test_sample_writes_figure_and_chains(run_folder, tmp_path, capsys, method):
    code = cli.run(
        [
            "sample",
            str(run_folder),
            "--method",
            method,
            "--chains",
            "3",
            "--steps",
            "6",
            "--burn-in",
            "2",
            "--out",
            str(tmp_path),
        ]
    )
    assert code == 0
    assert _files(tmp_path) == [f"sample-{method}.npz", f"sample-{method}.png"]
    arrays = dict(np.load(tmp_path / f"sample-{method}.npz"))
    assert arrays["draws"].shape == (3, 6, 8, 8)
    assert arrays["starts"].shape == arrays["denoised"].shape == (3, 8, 8)
    assert arrays["step_size"] == pytest.approx(cli.DEFAULT_STEP_SIZE[method] * 0.16)
    assert "of 3 x 6 draws" in capsys.readouterr().out


def test_train_takes_rank_zero(tmp_path):
    assert cli.run(["train", "--out", str(tmp_path), *SMALL, "--rank", "0"]) == 0
    assert cli.run(["denoise", str(tmp_path)]) == 0


def test_no_command_shows_help(capsys):
    assert cli.run([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("demo", "train", "denoise", "sample"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["denoise", "FOLDER", "--sigma", "5"],
            2,
            "hos-ext: denoise: --sigma must be in the range trained, 0.1 to 1.2, got 5",
        ),
        (
            ["sample", "FOLDER", "--method", "gibbs"],
            2,
            "hos-ext: sample: --method must be one of langevin, ozaki, got gibbs",
        ),
        (
            ["sample", "FOLDER", "--step-size", "-1"],
            2,
            "hos-ext: sample: --step-size must be positive and finite, got -1",
        ),
        (
            ["sample", "FOLDER", "--method", "langevin", "--step-size", "1000"],
            1,
            (
                "hos-ext: run_chains: step_size must keep the chains finite, got 1000.0 with which "
                "16 of 16 langevin chains diverged"
            ),
        ),
        (
            ["train", "--learning-rate", "nan"],
            2,
            "hos-ext: train: learning_rate must be positive and finite, got nan",
        ),
        (
            ["train", "--weight-decay", "-1"],
            2,
            "hos-ext: train: weight_decay must be >= 0 and finite, got -1.0",
        ),
        (
            ["denoise", "nowhere"],
            2,
            "hos-ext: load_checkpoint: folder must hold model.safetensors, got nowhere without it",
        ),
    ],
)
def test_wrong_use_is_one_line_and_an_exit_code(run_folder, capsys, arguments, code, message):
    arguments = [str(run_folder) if word == "FOLDER" else word for word in arguments]
    assert cli.run(arguments) == code
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["paint"], "hos-ext: No such command 'paint'."),
        (["demo", "--bogus"], "hos-ext: No such option: --bogus"),
        (["train", "--steps", "0"], "hos-ext: Invalid value for '--steps': "),
        (["train", "--seed", "x"], "hos-ext: Invalid value for '--seed': "),
        (["denoise"], "hos-ext: Missing argument"),
    ],
)
def test_what_typer_refuses_is_one_line_and_exit_code_2(capsys, arguments, start):
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(start)
    assert error.count("\n") == 1


def test_a_loss_that_is_not_finite_is_exit_code_1(tmp_path, capsys):
    code = cli.run(["train", "--out", str(tmp_path), *SMALL, "--learning-rate", "1e38"])
    assert code == 1
    error = capsys.readouterr().err
    assert error.startswith("hos-ext: train: the ")
    assert "last good checkpoint: none was written" in error
    assert error.count("\n") == 1
    assert _files(tmp_path) == []


def test_a_run_that_fails_leaves_the_checkpoint_that_was_there(run_folder, tmp_path):
    for path in run_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    arguments = ["train", "--out", str(tmp_path), *SMALL, "--learning-rate", "1e38"]
    assert cli.run(arguments) == 1
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (run_folder / name).read_bytes()


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError])
def test_work_that_goes_wrong_is_one_line_and_exit_code_1(monkeypatch, tmp_path, capsys, kind):
    def fail(*_, **__):
        raise kind("no\nfactor")

    monkeypatch.setattr(evaluation, "recalibrate", fail)
    assert cli.run(["train", "--out", str(tmp_path), *SMALL]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("hos-ext: ")
    assert captured.err.count("\n") == 1


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path):
    rows = {"sampling": [{"min_ess": math.nan, "step_size": 0.1, "n": 3}], "loss": math.inf}
    cli._write_json(tmp_path / "metrics.json", rows)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "sampling": [{"min_ess": None, "step_size": 0.1, "n": 3}],
        "loss": None,
    }


def test_a_folder_that_cannot_be_made_is_exit_code_1_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.run(["train", "--out", str(tmp_path / "file"), *SMALL]) == 1
    assert "File exists" in capsys.readouterr().err


def test_an_interrupt_is_exit_code_130(monkeypatch, tmp_path, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupt)
    assert cli.run(["train", "--out", str(tmp_path), *SMALL]) == 130
    assert capsys.readouterr().err.strip() == "hos-ext: stopped"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("typer", ["demo"], "cli: typer"),
        ("rich.console", ["train", *SMALL], "cli: rich.console"),
        ("matplotlib.figure", ["denoise", "FOLDER"], "plots: matplotlib.figure"),
    ],
)
def test_a_missing_extra_is_exit_code_1_and_named(
    run_folder, monkeypatch, capsys, module, arguments, message
):
    monkeypatch.setitem(sys.modules, module, None)
    arguments = [str(run_folder) if word == "FOLDER" else word for word in arguments]
    assert cli.run(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"hos-ext: {message} must be installed (pip install hos_ext[app]), got: "
    )
    assert error.count("\n") == 1


def test_main_exits_with_the_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hos-ext", "paint"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2


def test_next_commands_name_the_program_as_it_was_called(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv" / "bin" / "hos-ext")])
    local = os.path.join(".venv", "bin", "hos-ext")
    assert cli.next_commands(cli.Path("demo")).startswith(f"{local} denoise demo/checkpoint ")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hos-ext"])
    assert cli.next_commands(cli.Path("demo")).startswith("hos-ext denoise demo/checkpoint ")


def test_module_prints_build_info(capsys):
    import runpy

    from hos_ext import build_info

    runpy.run_module("hos_ext", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(build_info())
