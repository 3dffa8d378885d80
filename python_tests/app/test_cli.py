"""The command line: what the commands write, exit codes, one-line errors, what is not replaced."""

import io
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from hos_ext import VE, diffusion
from hos_ext.app import cli, data, evaluation, options, results, runs, training
from hos_ext.app.cli.common import noise_level, program
from hos_ext.app.cli.train import default_out
from hos_ext.app.training import batches
from hos_ext.sampling import register_step, unregister_step
from hos_ext.sampling.methods import Langevin
from hos_ext.schedules import draw_sigma
from hos_ext.scores import Scores

SMALL = [
    "--steps=5",
    "--width=16",
    "--head-width=8",
    "--depth=2",
    "--rank=2",
    "--batch-size=16",
    "--tracker=none",
]
TINY_IMAGES = ["--channels=16,16", "--rank=1", "--steps=2", "--batch-size=4", "--tracker=none"]
IMAGE_FILES = ["denoise-components.tiff", "denoise-mean.tiff", "denoise-std.tiff"]
DENOISE_FILES = [*IMAGE_FILES, "denoise.md", "denoise.npz", "denoise.png"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert cli.run(["train", "--out", str(folder), *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run on 8-bit images of a parquet file, with the columns of the hub."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pillow = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        buffer = io.BytesIO()
        pillow.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    table = pyarrow.table({"image": rows, "label": [0] * 40})
    parquet.write_table(table, folder / "train.parquet")
    arguments = ["train", "--data", f"parquet:{folder / 'train.parquet'}", *TINY_IMAGES]
    assert cli.run([*arguments, "--out", str(folder / "run")]) == 0
    return folder


def _files(folder):
    return sorted(path.name for path in folder.iterdir())


def _one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.rstrip("\n")


# ------------------------------------------------------------------------------- train and resume


def test_train_writes_a_run_folder(run_folder):
    assert _files(run_folder) == [
        "checkpoints",
        "metrics.json",
        "model",
        "run.json",
        "training.png",
    ]
    metrics = json.loads((run_folder / "metrics.json").read_text())
    model, facts = runs.load_run(run_folder)
    assert facts["step"] == metrics["train"]["steps"] == 5
    assert facts["recalibration"] == metrics["train"]["recalibration"] > 0
    assert facts["options"]["batch_size"] == metrics["train"]["batch_size"] == 16
    assert metrics["train"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert [row["step"] for row in metrics["history"]] == [1, 2, 3, 4, 5]


def test_train_logs_to_tensorboard_by_default(tmp_path):
    pytest.importorskip("tensorboard")
    small = [word for word in SMALL if "tracker" not in word]
    assert cli.run(["train", "--out", str(tmp_path), *small, "--steps=1"]) == 0
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


def test_every_option_of_a_run_can_be_typed_and_is_explained(capsys):
    assert cli.run(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in options.OPTIONS:
        assert f"--{name.replace('_', '-')}" in shown
    assert "hos-ext train --data parquet:mnist/train.parquet" in shown
    for panel in ("Data", "Model", "Objective", "Training", "Run folder"):
        assert f"─ {panel} ─" in shown


@pytest.mark.parametrize(
    "command",
    ["train", "resume", "denoise", "chains", "generate", "evaluate", "info", "push", "demo"],
)
def test_every_help_has_an_example(capsys, command):
    assert cli.run([command, "--help"]) == 0
    assert f"  hos-ext {command}" in capsys.readouterr().out


def test_a_config_gives_options_and_the_command_line_wins(tmp_path):
    lines = [f"{k[2:]}: {v}" for k, v in (word.split("=") for word in SMALL)]
    (tmp_path / "a.yaml").write_text("\n".join([*lines, "free: true", f"out: {tmp_path / 'a'}"]))
    typed = ["--steps", "2", "--no-free", "--sigma", "0.2,0.8"]
    assert cli.run(["train", "--config", str(tmp_path / "a.yaml"), *typed]) == 0
    first = runs.read_run(tmp_path / "a")["options"]
    assert (first["steps"], first["free"], first["width"]) == (2, False, 16)
    assert first["sigma"] == [0.2, 0.8]
    config = str(tmp_path / "a" / "run.json")
    assert cli.run(["train", "--config", config, "--out", str(tmp_path / "b")]) == 0
    assert runs.read_run(tmp_path / "b")["options"] == first


def test_train_does_not_replace_a_run(run_folder, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path)]
    assert cli.run(["train", *out, *SMALL]) == 0
    before = (tmp_path / "metrics.json").read_bytes()
    assert cli.run(["train", *out, *SMALL]) == 2
    error = _one_line(capsys)
    assert f"hos-ext resume {tmp_path}" in error
    assert "--force" in error
    assert cli.run(["train", *out, *SMALL, "--continue", "--seed", "1", "--rank", "1"]) == 2
    assert "got rank (2 there, 1 now), seed (0 there, 1 now)" in _one_line(capsys)
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert cli.run(["train", *out, *SMALL, "--continue"]) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert cli.run(["train", *out, *SMALL, "--force"]) == 0
    assert runs.load_run(tmp_path)[1]["options"]["seed"] == 0
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert cli.run(["train", *out, *SMALL, "--force", "--seed", "1"]) == 0
    assert runs.load_run(tmp_path)[1]["options"]["seed"] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_is_resumed_to_the_same_model(
    run_folder, tmp_path, monkeypatch, capsys, number, code
):
    draw = draw_sigma

    def stop(n, sigma_range, *, seed, offset=0, first=0):
        if offset == 3:
            os.kill(os.getpid(), number)
        return draw(n, sigma_range, seed=seed, offset=offset, first=first)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "draw_sigma", stop)
        assert cli.run(["train", "--out", str(tmp_path), *SMALL]) == code
    error = _one_line(capsys)
    assert "stopped it after step 3; last checkpoint: " in error
    assert cli.run(["denoise", str(tmp_path)]) == 2
    assert f"hos-ext resume {tmp_path}" in _one_line(capsys)
    assert cli.run(["resume", str(tmp_path)]) == 0
    model, facts = runs.load_run(tmp_path)
    expected, expected_facts = runs.load_run(run_folder)
    assert facts == expected_facts
    for value, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


def test_force_replaces_a_run_once_in_a_launch(tmp_path, capsys, monkeypatch):
    """torchrun does not count the starts that a host causes which comes or goes."""
    forced = ["train", "--out", str(tmp_path), *SMALL, "--force"]
    assert cli.run(forced) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    capsys.readouterr()
    assert cli.run(forced) == 2
    assert "--force on several hosts must come with a --rdzv-id of this" in _one_line(capsys)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert cli.run(forced) == 0
    capsys.readouterr()
    before = (tmp_path / "metrics.json").read_bytes()
    assert cli.run(forced) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert (tmp_path / "metrics.json").read_bytes() == before


def test_continue_of_a_finished_run_does_nothing_and_says_so(run_folder, capsys):
    before = (run_folder / "metrics.json").read_bytes()
    assert cli.run(["train", "--out", str(run_folder), *SMALL, "--continue"]) == 0
    assert capsys.readouterr().out == f"{run_folder} is finished: 5 steps. Nothing to do.\n"
    assert (run_folder / "metrics.json").read_bytes() == before


def test_train_says_what_it_read_before_it_starts(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(3.0, 2.0, (60, 2, 5)))
    run = tmp_path / "run"
    arguments = ["train", "--data", f"npy:{tmp_path / 'x.npy'}", "--out", str(run), *SMALL]
    assert cli.run(arguments) == 0
    parameters = runs.read_run(run)["parameters"]
    scaling = runs.scaling_of(runs.read_run(run))
    assert capsys.readouterr().out.startswith(
        f"npy:{tmp_path / 'x.npy'}: 54 samples of shape (2, 5) to train on, 3 to tune on, 3 to "
        f"report on\nstandardised by mean {scaling.mean:g}, standard deviation {scaling.std:g}\n"
        f"mlp, rank 2, {parameters:,} parameters; 5 steps; to {run}\n"
    )


def test_resume_of_a_finished_run_does_nothing_and_says_so(run_folder, capsys):
    before = {p: p.stat().st_mtime_ns for p in run_folder.rglob("*")}
    assert cli.run(["resume", str(run_folder)]) == 0
    assert "is finished: 5 steps" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in run_folder.rglob("*")} == before


def test_resume_refuses_more_steps_of_a_cosine(run_folder, capsys):
    assert cli.run(["resume", str(run_folder), "--steps", "9"]) == 2
    assert _one_line(capsys) == (
        "hos-ext: resume: --steps must be 5, as before, unless the run has --decay constant and "
        f"gets more of them (for another run: hos-ext train --config {run_folder / 'run.json'} "
        "--steps 9 --out NEW), got 9"
    )


def test_resume_adds_steps_to_a_constant_rate(tmp_path):
    assert cli.run(["train", "--out", str(tmp_path), *SMALL, "--decay=constant"]) == 0
    assert cli.run(["resume", str(tmp_path), "--steps", "7"]) == 0
    assert runs.load_run(tmp_path)[1]["step"] == 7


def test_the_run_folder_is_named_after_the_data():
    named = {
        "digits": "runs/digits",
        "parquet:../a/mnist/train.parquet": "runs/mnist",
        "folder:photos": "runs/photos",
        "hf:ylecun/mnist": "runs/mnist",
        "npy:a/my signals.npy": "runs/my-signals",
    }
    assert {spec: default_out({"data": spec}) for spec in named} == named
    assert default_out({}) == "runs/digits"


# ---------------------------------------------------------------------------------------- denoise


def test_denoise_writes_arrays_pictures_and_report(run_folder, tmp_path, capsys):
    arguments = ["denoise", str(run_folder), "--sigma", "0.5", "--count", "3"]
    arguments += ["--out", str(tmp_path)]
    assert cli.run(arguments) == 0
    assert "mean squared error 0.2" in capsys.readouterr().out
    assert _files(tmp_path) == DENOISE_FILES
    arrays = dict(np.load(tmp_path / "denoise.npz"))
    image = (3, 8, 8)
    assert {name: value.shape for name, value in arrays.items()} == {
        **dict.fromkeys(("clean", "noisy", "mean", "std", "raw_mean", "raw_std"), image),
        **dict.fromkeys(("sigma", "raw_sigma"), ()),
        **dict.fromkeys(("eigenvalues", "raw_eigenvalues"), (3, 4)),
        "eigenvectors": (3, 64, 4),
    }
    # The covariance is the recalibrated one, and it is that of the checkpoint.
    model, facts = runs.load_run(run_folder)
    source = data.open_source("digits", seed=0)
    result = evaluation.denoise_held_out(model, source, 0.5, count=3, seed=0)
    expected = facts["recalibration"] ** 0.5 * result.posterior.std
    np.testing.assert_allclose(arrays["std"], expected, rtol=1e-5)
    # A grey level is 2/17 wide, and its middle is half a level above it.
    np.testing.assert_allclose(arrays["raw_std"], arrays["std"] * 8.5, rtol=1e-6)
    np.testing.assert_allclose(arrays["raw_mean"], arrays["mean"] * 8.5 + 8, rtol=1e-5, atol=1e-5)
    assert arrays["raw_sigma"] == pytest.approx(4.25)
    report = (tmp_path / "denoise.md").read_text()
    assert "sigma 0.5 in data units, 4.25 in raw units" in report
    assert report.count("| held-out ") == 3


def test_tiff_files_hold_raw_units_for_other_programs(run_folder, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    sequence = pytest.importorskip("PIL.ImageSequence")
    assert cli.run(["denoise", str(run_folder), "--count=2", "--out", str(tmp_path)]) == 0
    arrays = np.load(tmp_path / "denoise.npz")

    def pages(name):
        with pillow.open(tmp_path / f"denoise-{name}.tiff") as file:
            assert file.mode == "F"
            return np.stack([np.array(page) for page in sequence.Iterator(file)])

    for name in ("mean", "std"):
        value = pages(name)
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, arrays[f"raw_{name}"].astype(np.float32))
    parts = pages("components").reshape(2, 4, 64)
    scale = 8.5 * np.sqrt(arrays["eigenvalues"])[:, :, None]
    expected = np.swapaxes(arrays["eigenvectors"], 1, 2) * scale
    np.testing.assert_allclose(parts, expected, rtol=1e-5, atol=1e-6)


def test_denoise_takes_images_and_arrays_in_raw_units(images, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (2, 8, 8), dtype=np.uint8)
    pillow.fromarray(raw[0]).save(tmp_path / "a.png")
    (tmp_path / "b.tiff").write_bytes(results.tiff(torch.from_numpy(raw).float()))
    np.save(tmp_path / "c.npy", raw.astype(np.float64))
    np.savez(tmp_path / "d.npz", noisy=raw[:, None])
    files = [str(tmp_path / name) for name in ("a.png", "b.tiff", "c.npy", "d.npz")]
    arguments = ["denoise", str(images / "run"), *files, "--raw-sigma", "64"]
    assert cli.run([*arguments, "--out", str(tmp_path / "out")]) == 0
    arrays = np.load(tmp_path / "out" / "denoise.npz")
    assert "clean" not in arrays
    assert arrays["sigma"] == pytest.approx(0.5)
    expected = (raw[[0, 0, 1, 0, 1, 0, 1]][:, None] - 127.5) / 128
    np.testing.assert_allclose(arrays["noisy"], expected, rtol=1e-6)
    assert arrays["mean"].shape == (7, 1, 8, 8)
    labels = ["a", "b-0", "b-1", "c-0", "c-1", "d-0", "d-1"]
    pictures = [f"denoise-{label}-{what}.png" for label in labels for what in ("mean", "std")]
    assert _files(tmp_path / "out") == sorted([*DENOISE_FILES, *pictures])
    report = (tmp_path / "out" / "denoise.md").read_text()
    assert "| b.tiff[1] |" in report
    assert "not known" in report


def test_vectors_are_trained_denoised_and_evaluated(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(3.0, 2.0, (60, 5)))
    run = str(tmp_path / "run")
    small = [word for word in SMALL if "rank" not in word]
    assert cli.run(["train", "--data", f"npy:{tmp_path / 'x.npy'}", "--out", run, *small]) == 0
    np.save(tmp_path / "noisy.npy", np.zeros(5))
    assert cli.run(["denoise", run, str(tmp_path / "noisy.npy"), "--sigma", "0.4"]) == 0
    arrays = np.load(tmp_path / "run" / "denoise.npz")
    scaling = runs.scaling_of(runs.read_run(tmp_path / "run"))
    np.testing.assert_allclose(arrays["noisy"], np.full((1, 5), -scaling.mean / scaling.std), 1e-6)
    assert not list((tmp_path / "run").glob("*.tiff"))
    assert cli.run(["evaluate", run]) == 0
    assert "3 held-out samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.npy",
            np.zeros((2, 3, 3)),
            "must hold pictures (1, height, width), got shape (1, 2, 3, 3)",
        ),
        ("a.npy", np.zeros((8, 8), np.int64), "must hold uint8 or floating values, got int64"),
        ("a.npy", np.full((8, 8), np.nan), "must hold finite values, got nan to nan"),
        ("a.npy", np.diag([-np.inf, *[9.0] * 7]), "must hold finite values, got -inf to 9"),
        (
            "a.npy",
            np.full((8, 8), 0.5),
            "must hold raw units, 0 to 255 before noise was added, got floating values 0.5 to 0.5",
        ),
        ("a.npy", b"no array", "must be a whole image, .npy or .npz, got: "),
        ("a.png", b"no image", "must be a whole image, .npy or .npz, got: "),
        ("a.txt", None, "denoise: file must exist, got "),
    ],
)
def test_files_that_cannot_be_denoised_are_named(images, tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    out = ["--out", str(tmp_path / "out"), "--sigma=0.4"]
    assert cli.run(["denoise", str(images / "run"), str(path), *out]) == 2
    error = _one_line(capsys)
    assert str(path) in error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_volumes_are_seen_by_a_3d_network_and_by_an_mlp_where_that_is_said(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal(size=(12, 1, 4, 4, 4)).astype(np.float32))
    np.save(tmp_path / "y.npy", rng.normal(size=(12, 1, 1, 2, 2, 2)))
    common = ["--steps=1", "--batch-size=4", "--tracker=none", "--rank=1", "--device=cpu"]
    train = ["train", "--data", f"npy:{tmp_path / 'x.npy'}", *common]
    run = tmp_path / "run"
    assert cli.run([*train, "--channels", "8,8", "--out", str(run)]) == 0
    model, _ = runs.load_run(run)
    assert type(model).__name__ == "UNet3d"
    np.save(tmp_path / "noisy.npy", rng.normal(size=(2, 1, 4, 4, 4)))
    assert cli.run(["denoise", str(run), str(tmp_path / "noisy.npy"), "--sigma", "0.5"]) == 0
    assert np.load(run / "denoise.npz")["mean"].shape == (2, 1, 4, 4, 4)
    flat = ["--model", "mlp", "--width", "8", "--head-width", "8"]
    assert cli.run([*train, *flat, "--out", str(tmp_path / "flat")]) == 0
    capsys.readouterr()
    train[2] = f"npy:{tmp_path / 'y.npy'}"
    assert cli.run([*train, "--out", str(tmp_path / "no")]) == 2
    message = "train: model must be said for samples (1, 1, 2, 2, 2) (mlp takes them for vectors)"
    assert message in _one_line(capsys)


@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 4), (2, 5)])
def test_an_axis_of_one_channel_may_be_left_out(tmp_path, shape):
    values = np.random.default_rng(0).normal(size=(3, *shape))
    plain = values.reshape(3, *shape[shape[0] == 1 :])
    for array in (values, plain, values[0], plain[0]):
        np.save(tmp_path / "a.npy", array)
        x = results.read_files([tmp_path / "a.npy"], shape, data.Scaling(), sigma=0.4).x
        wanted = values if array.shape[0] == 3 else values[:1]
        np.testing.assert_array_equal(x, wanted.astype(np.float32))


def test_levels_above_those_of_the_data_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.full((8, 8), 17, np.uint8))
    with pytest.raises(ValueError, match="raw units, 0 to 16 before noise was added, got 17"):
        results.read_files([tmp_path / "a.npy"], (8, 8), data.Scaling(levels=17), sigma=0.4)


def test_levels_are_refused_where_the_data_float(tmp_path):
    np.save(tmp_path / "a.npy", np.full((8, 8), 17, np.uint8))
    with pytest.raises(
        ValueError, match=r"a\.npy must hold floating values like the data set, got"
    ):
        results.read_files([tmp_path / "a.npy"], (8, 8), data.Scaling(), sigma=0.4)


def test_files_need_a_noise_level(run_folder, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.full((8, 8), 7, np.uint8))
    assert cli.run(["denoise", str(run_folder), str(tmp_path / "a.npy")]) == 2
    assert _one_line(capsys) == (
        "hos-ext: denoise: --sigma or --raw-sigma must be given for files, got none"
    )


# --------------------------------------------------------------------- chains, evaluate and info


@pytest.mark.parametrize("method", ["langevin", "ozaki", "mh_ozaki_cayley"])
def test_chains_writes_figure_and_chains(run_folder, tmp_path, capsys, method):
    short = ["--chains", "3", "--steps", "6", "--burn-in", "2", "--out", str(tmp_path)]
    assert cli.run(["chains", str(run_folder), "--method", method, *short]) == 0
    assert _files(tmp_path) == [f"chains-{method}.npz", f"chains-{method}.png"]
    arrays = dict(np.load(tmp_path / f"chains-{method}.npz"))
    assert arrays["draws"].shape == (3, 6, 8, 8)
    assert arrays["starts"].shape == arrays["denoised"].shape == (3, 8, 8)
    assert arrays["step_size"] == pytest.approx(results.methods()[method] * 0.16)
    np.testing.assert_allclose(
        arrays["raw_denoised"], arrays["denoised"] * 8.5 + 8, rtol=1e-5, atol=1e-5
    )
    shown = capsys.readouterr().out
    assert "of 3 x 6 draws" in shown
    assert f"spread {float(arrays['spread']):.3g}, energy distance " in shown
    assert "Against 360 noisy held-out samples" in shown


def test_chains_that_run_away_write_nothing_and_have_an_exit_code(run_folder, tmp_path, capsys):
    short = ["--chains", "3", "--steps", "20", "--burn-in", "2", "--out", str(tmp_path / "out")]
    wild = ["chains", str(run_folder), "--method", "langevin", "--step-size", "1.5", *short]
    assert cli.run(wild) == 5
    error = _one_line(capsys)
    assert error.startswith("hos-ext: chains: 3 of 3 chains ran away; spread against start and ")
    for part in (
        "drift of |x| up to",
        "energy ",
        "R-hat of |x| ",
        "the chains have become wider than the noisy held-out samples that they started from: ",
        "times by the standard deviation",
        "|x| of 3 chains is above 3 times that of any held-out sample: up to ",
        "A learned score outside the range of its data is a known cause",
        "Nothing was written; --allow-divergence keeps the files",
    ):
        assert part in error
    assert not (tmp_path / "out").exists() or _files(tmp_path / "out") == []
    with pytest.warns(UserWarning, match=r"^chains: 3 of 3 chains ran away; spread .* known cause"):
        assert cli.run([*wild, "--allow-divergence"]) == 0
    assert _files(tmp_path / "out") == ["chains-langevin.npz", "chains-langevin.png"]
    arrays = dict(np.load(tmp_path / "out" / "chains-langevin.npz"))
    assert np.abs(arrays["draws"]).max() > 1e3
    assert arrays["spread"] > 100


def test_chains_that_are_not_finite_can_be_kept_too(run_folder, tmp_path, capsys):
    short = ["--chains", "2", "--steps", "60", "--burn-in", "40", "--out", str(tmp_path)]
    wild = ["chains", str(run_folder), "--method", "langevin", "--step-size", "1000", *short]
    assert cli.run(wild) == 5
    assert _one_line(capsys).startswith("hos-ext: chains: 2 of 2 chains hold NaN or infinities. ")
    with pytest.warns(UserWarning, match=r"^chains: 2 of 2 chains hold NaN or infinities\. A "):
        assert cli.run([*wild, "--allow-divergence", "--netcdf"]) == 0
    assert "spread nan, energy distance nan" in capsys.readouterr().out
    arrays = dict(np.load(tmp_path / "chains-langevin.npz"))
    assert not np.isfinite(arrays["draws"]).all()


def test_chains_takes_a_step_that_is_registered_from_outside(run_folder, tmp_path):
    class Halved(Langevin):
        name, adjusted_name, relative_step_size = "halved", "mh_halved", 0.05

    class FirstOrder(Langevin):  # asks for s1 alone, and a model gives more
        name, adjusted_name, accepts = "first_order", "mh_first_order", (torch.Tensor,)

    short = ["--chains", "3", "--steps", "6", "--burn-in", "2", "--out", str(tmp_path)]
    try:
        register_step(Halved)
        register_step(FirstOrder)
        assert results.methods()["halved"] == 0.05
        assert not {"first_order", "mh_first_order"} & set(results.methods())
        assert cli.run(["chains", str(run_folder), "--method", "halved", *short]) == 0
    finally:
        unregister_step(Halved)
        unregister_step(FirstOrder)
    assert np.load(tmp_path / "chains-halved.npz")["step_size"] == pytest.approx(0.05 * 0.16)


def test_chains_draws_what_run_chains_draws(run_folder, tmp_path):
    short = ["--chains", "3", "--steps", "6", "--burn-in", "2", "--out", str(tmp_path)]
    assert cli.run(["chains", str(run_folder), *short]) == 0
    model, _ = runs.load_run(run_folder)
    source = data.open_source("digits", seed=0)
    starts = evaluation.denoise_held_out(model, source, 0.4, count=3, seed=0).x
    draws, _ = evaluation.run_chains(
        model, starts, 0.4, method="ozaki", step_size=0.16, n_steps=6, burn_in=2, seed=0
    )
    np.testing.assert_array_equal(np.load(tmp_path / "chains-ozaki.npz")["draws"], draws)


def test_chains_writes_netcdf_for_arviz(run_folder, tmp_path):
    for module in ("h5netcdf", "h5py"):
        pytest.importorskip(module)
    xarray = pytest.importorskip("xarray")
    short = ["--chains", "3", "--steps", "6", "--burn-in", "2", "--out", str(tmp_path)]
    assert cli.run(["chains", str(run_folder), *short, "--netcdf"]) == 0
    tree = xarray.open_datatree(tmp_path / "chains-ozaki.nc", engine="h5netcdf")
    draws = np.load(tmp_path / "chains-ozaki.npz")["draws"]
    np.testing.assert_array_equal(tree["posterior"]["x"].values, draws)
    tree.close()


GENERATE = ["--count", "9", "--steps", "4", "--settle", "3"]


@pytest.mark.parametrize("method", ["heun", "sde", "second-order"])
def test_generate_writes_samples_in_both_units_and_their_picture(
    run_folder, tmp_path, capsys, method
):
    words = ["generate", str(run_folder), *GENERATE, "--method", method, "--out", str(tmp_path)]
    assert cli.run(words) == 0
    assert _files(tmp_path) == ["generate.npz", "generate.png"]
    arrays = dict(np.load(tmp_path / "generate.npz"))
    assert arrays["samples"].shape == arrays["raw"].shape == (9, 8, 8)
    assert arrays["sigmas"][0] == pytest.approx(1.2)
    assert arrays["sigmas"][-1] == pytest.approx(0.1)
    assert len(arrays["sigmas"]) == 5
    np.testing.assert_allclose(arrays["raw_mean"], arrays["samples"] * 8.5 + 8, atol=1e-5)
    np.testing.assert_array_equal(
        arrays["raw"], np.clip(np.floor((arrays["samples"] + 1) * 8.5), 0, 16)
    )
    shown = capsys.readouterr().out
    assert f"9 samples by 4 steps of {method} from sigma 1.2 to 0.1; against 360 held-out" in shown
    assert f"spread {float(arrays['spread']):.3g}, energy distance " in shown


def test_generate_draws_what_the_library_draws(run_folder, tmp_path):
    words = ["generate", str(run_folder), *GENERATE, "--last", "sample", "--seed", "3"]
    assert cli.run([*words, "--method", "second-order", "--out", str(tmp_path)]) == 0
    model, facts = runs.load_run(run_folder)
    expected = diffusion.generate(
        model,
        (9, 8, 8),
        VE(0.1, 1.2),
        method="second-order",
        n_steps=4,
        settle=3,
        last="sample",
        data_std=facts["data"]["std"],
        seed=3,
        chunk_size=2,
    )
    found = np.load(tmp_path / "generate.npz")["samples"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_generate_says_that_the_data_are_not_at_hand(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((80, 3)))
    train = ["train", "--data", f"npy:{tmp_path / 'a.npy'}", *SMALL, "--out", str(tmp_path / "run")]
    assert cli.run(train) == 0
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    capsys.readouterr()
    words = ["generate", str(tmp_path / "run"), *GENERATE]
    assert cli.run(words) == 0
    assert "not known, as the data are not at hand" in capsys.readouterr().out
    moved = f"npy:{tmp_path / 'b.npy'}"
    assert cli.run([*words, "--force", "--data", moved]) == 0
    assert "held-out samples: spread" in capsys.readouterr().out
    assert cli.run([*words, "--force", "--data", "npy:nowhere.npy"]) == 2


def test_generate_needs_a_range_of_levels(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert (
        cli.run(
            [
                "train",
                "--data",
                "density:gaussian2d",
                "--sigma",
                "0.3",
                *SMALL[:-2],
                "--rank=1",
                "--tracker=none",
                "--out",
                run,
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert cli.run(["generate", run]) == 2
    assert _one_line(capsys) == (
        "hos-ext: generate: RUN must be trained over a range of noise levels, --sigma LOW,HIGH, "
        "got one level, 0.3"
    )


def test_generated_samples_that_ran_away_write_nothing(run_folder, tmp_path, monkeypatch, capsys):
    right = results.generate_over_ranks
    monkeypatch.setattr(
        results, "generate_over_ranks", lambda *given, **options: 20 * right(*given, **options)
    )
    words = ["generate", str(run_folder), *GENERATE, "--out", str(tmp_path / "out")]
    assert cli.run(words) == 5
    error = _one_line(capsys)
    assert error.startswith("hos-ext: generate: the samples spread ")
    assert "--allow-divergence keeps the files" in error
    assert not (tmp_path / "out").exists() or _files(tmp_path / "out") == []
    with pytest.warns(UserWarning, match="^generate: the samples spread .* times as far as the"):
        assert cli.run([*words, "--allow-divergence"]) == 0
    assert _files(tmp_path / "out") == ["generate.npz", "generate.png"]


def test_evaluate_writes_the_report_and_prints_it(run_folder, tmp_path, capsys):
    arguments = ["evaluate", str(run_folder), "--sigma", "0.2,0.8", "--limit", "20"]
    assert cli.run([*arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "evaluate.json").read_text())
    assert [row["sigma"] for row in report["levels"]] == [0.2, 0.8]
    assert report["n"] == 20
    assert _files(tmp_path) == sorted(results.EVALUATE_FILES)
    assert report["recalibration"] == runs.load_run(run_folder)[1]["recalibration"]
    shown = capsys.readouterr().out
    assert "20 held-out samples" in shown
    assert f"{report['levels'][1]['predictive']:.4g}" in shown


@pytest.mark.parametrize("levels", ["0.0001,0.0004", "0.1234567"])
def test_evaluate_chooses_levels_that_were_trained(tmp_path, levels):
    run = str(tmp_path / "run")
    arguments = ["train", "--data", "density:gaussian2d", "--sigma", levels, "--out", run]
    assert cli.run([*arguments, *[word for word in SMALL if "rank" not in word], "--rank=1"]) == 0
    assert cli.run(["evaluate", run, "--limit", "20"]) == 0
    chosen = [
        row["sigma"] for row in json.loads((tmp_path / "run/evaluate.json").read_text())["levels"]
    ]
    assert chosen == ([0.1234567] if "," not in levels else [0.000141, 0.0002, 0.000283])


def test_an_evaluation_that_fails_leaves_nothing(run_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no picture")

    monkeypatch.setattr(results, "evaluated", fail)
    out = str(tmp_path / "out")
    assert cli.run(["evaluate", str(run_folder), "--limit", "4", "--out", out]) == 1
    assert _files(tmp_path / "out") == []


def test_both_ends_of_the_range_are_levels_in_raw_units():
    facts = {"options": {"sigma": [0.1, 1.2]}}
    assert noise_level("denoise", facts, None, raw_sigma=0.85, scale=8.5) == 0.1
    assert noise_level("denoise", facts, None, raw_sigma=10.2, scale=8.5) == 1.2


def test_evaluate_knows_the_truth_of_a_density(tmp_path, capsys):
    run = str(tmp_path)
    assert cli.run(["train", "--data", "density:gaussian2d", "--out", run, *SMALL]) == 0
    assert cli.run(["evaluate", run, "--sigma", "0.5", "--limit", "50"]) == 0
    row = json.loads((tmp_path / "evaluate.json").read_text())["accuracy"][0]
    assert 0 < row["s1_relative"] < 1.5
    assert f"relative squared error of s1 {row['s1_relative']:.3g}" in capsys.readouterr().out


def test_info_says_what_a_run_is(run_folder, capsys):
    assert cli.run(["info", str(run_folder)]) == 0
    shown = capsys.readouterr().out
    assert "state: finished" in shown
    assert "  step-00000005: whole" in shown
    assert "  sigma: 0.1, 1.2" in shown
    assert cli.run(["info", str(run_folder / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == runs.info(run_folder / "model")


def test_info_checks_whether_the_model_denoises(run_folder, capsys):
    assert cli.run(["info", str(run_folder), "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["check"]
    assert len(found["sigma"]) == len(found["error"]) == len(found["shrinking"]) == 2
    assert all(0.1 <= sigma <= 1.2 for sigma in found["sigma"])
    assert all(0 < error < 1 for error in found["error"])
    assert cli.run(["info", str(run_folder / "model"), "--check"]) == 0
    assert f"verdict: {found['verdict']}" in capsys.readouterr().out
    assert cli.run(["info", str(run_folder), "--data", "digits"]) == 2
    assert "--data and --test-data must come with --check" in capsys.readouterr().err


def test_a_model_whose_sign_is_wrong_gets_a_verdict(run_folder):
    model, facts = runs.load_run(run_folder)
    source, levels = runs.open_data(facts), tuple(facts["options"]["sigma"])

    class Turned(torch.nn.Module):
        def forward(self, x, sigma):
            scores = model(x, sigma)
            return Scores(-scores.scaled_score, scores.c)

    found = evaluation.check_one_step(Turned(), source, levels)
    assert found["verdict"].startswith("predicts worse than zero at sigma")
    assert found["verdict"].endswith("is this prediction='eps'?")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["denoise"], "denoise.md"),
        (["chains"], "chains-ozaki.png"),
        (["generate"], "generate.png"),
        (["evaluate"], "evaluate.json"),
        (["demo"], "report.html"),
    ],
)
def test_nothing_is_replaced_without_force(run_folder, tmp_path, capsys, command, name):
    (tmp_path / name).write_text("mine")
    place = [] if command == ["demo"] else [str(run_folder)]
    assert cli.run([*command, *place, "--out", str(tmp_path)]) == 2
    assert "--force" in _one_line(capsys)
    assert _files(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_force_replaces(run_folder, tmp_path):
    (tmp_path / "evaluate.json").write_text("mine")
    arguments = ["evaluate", str(run_folder), "--limit", "3", "--out", str(tmp_path), "--force"]
    assert cli.run(arguments) == 0
    assert json.loads((tmp_path / "evaluate.json").read_text())["n"] == 3


# -------------------------------------------------------------------------- errors and exit codes


def test_help_breaks_lines_where_the_terminal_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.run(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    about = text.split("Starts at the highest")[1].split("exit code is 5")[0]
    lengths = [len(line.rstrip()) for line in about.splitlines()[1:-1]]
    assert min(lengths) > 40  # no line ends where the source has one


def test_no_command_shows_help(capsys):
    assert cli.run([]) == 0
    shown = capsys.readouterr().out
    commands = ("train", "resume", "denoise", "chains", "generate", "evaluate", "info", "demo")
    assert all(name in shown for name in commands)
    assert "Exit codes: 0 done; 1 the work failed; 2 wrong arguments" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["denoise", "FOLDER", "--sigma", "5"],
            2,
            "denoise: --sigma must be in the range trained, 0.1 to 1.2, got 5",
        ),
        (
            ["denoise", "FOLDER", "--sigma", "1", "--raw-sigma", "1"],
            2,
            "denoise: --raw-sigma must come without --sigma, got both",
        ),
        (
            ["denoise", "FOLDER", "--raw-sigma", "20"],
            2,
            "denoise: --raw-sigma must be in the range trained, 0.85 to 10.2, got 20",
        ),
        (
            ["denoise", "FOLDER", "--device", "tpu"],
            2,
            "load_run: device must be auto, cpu, cuda or cuda:N, got 'tpu'",
        ),
        (
            ["chains", "FOLDER", "--steps", "8", "--thin", "3"],
            2,
            "chains: --steps must be at least 4 --thin, for 4 draws, got 8 steps and --thin 3",
        ),
        (
            ["denoise", "FOLDER", "--count", "361"],
            2,
            "denoise: --count must be at most 360, the held-out samples, got 361",
        ),
        (
            ["chains", "FOLDER", "--method", "gibbs"],
            2,
            (
                "chains: --method must be one of 'langevin', 'ozaki', 'ozaki_full', "
                "'ozaki_lanczos', 'ozaki_cayley', 'mala', 'mh_ozaki', 'mh_ozaki_full', "
                "'mh_ozaki_cayley', got 'gibbs'"
            ),
        ),
        (
            ["generate", "FOLDER", "--method", "gibbs"],
            2,
            (
                "generate: --method must be one of 'heun', 'euler', 'sde', 'second-order', got "
                "'gibbs'"
            ),
        ),
        (
            ["generate", "FOLDER", "--condition", "3"],
            2,
            (
                "generate: --condition must be left out (the run was trained without --condition), "
                "got '3'"
            ),
        ),
        (
            ["chains", "FOLDER", "--step-size", "-1"],
            2,
            "chains: --step-size must be finite and > 0, got -1",
        ),
        (
            ["chains", "FOLDER", "--chains", "361"],
            2,
            "chains: --chains must be at most 360, the held-out samples, got 361",
        ),
        (
            ["evaluate", "FOLDER", "--sigma", "a"],
            2,
            "evaluate: --sigma must be numbers with commas, got a",
        ),
        (
            ["evaluate", "FOLDER", "--sigma", "0.2,3"],
            2,
            "evaluate: --sigma must be in the range trained, 0.1 to 1.2, got 3",
        ),
        (
            ["train", "--learning-rate", "nan"],
            2,
            "train: learning_rate must be finite and > 0, got nan",
        ),
        (
            ["train", "--weight-decay", "-1"],
            2,
            "train: weight_decay must be finite and >= 0, got -1",
        ),
        (["train", "--config", "none.yaml"], 2, "[Errno 2] No such file or directory: 'none.yaml'"),
        (
            ["denoise", "nowhere"],
            2,
            "load_model: folder must hold model.safetensors, got nowhere without it",
        ),
        (["resume", "nowhere"], 2, "run: folder must hold run.json, got nowhere without it"),
    ],
)
def test_wrong_use_is_one_line_and_an_exit_code(
    run_folder, tmp_path, capsys, arguments, code, message
):
    arguments = [str(run_folder) if word == "FOLDER" else word for word in arguments]
    if arguments[0] not in ("resume",):
        arguments += ["--out", str(tmp_path)]
    assert cli.run(arguments) == code
    assert capsys.readouterr().err == f"hos-ext: {message}\n"
    assert _files(tmp_path) == []


@pytest.mark.parametrize("spec", ["digitz", "npy:nowhere.npy", "parquet:nowhere.parquet"])
def test_data_that_are_not_there_are_exit_code_2(tmp_path, capsys, spec):
    assert cli.run(["train", "--data", spec, "--out", str(tmp_path / "run")]) == 2
    assert _one_line(capsys).startswith("hos-ext: open_source: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["paint"], "hos-ext: No such command 'paint'."),
        (["demo", "--bogus"], "hos-ext: No such option: --bogus"),
        (["demo", "--steps", "0"], "hos-ext: Invalid value for '--steps': "),
        (["train", "--seed", "x"], "hos-ext: Invalid value for '--seed': "),
        (["denoise"], "hos-ext: Missing argument"),
    ],
)
def test_what_typer_refuses_is_one_line_and_exit_code_2(capsys, arguments, start):
    assert cli.run(arguments) == 2
    assert _one_line(capsys).startswith(start)


def test_an_unknown_command_is_told_which_there_are(capsys):
    assert cli.run(["sample", "runs/digits"]) == 2
    error = _one_line(capsys)
    assert error.startswith("hos-ext: No such command 'sample'.")
    assert error.endswith(f" It must be one of {', '.join(cli.COMMANDS)}.")
    assert "chains" in cli.COMMANDS


def test_a_loss_that_is_not_finite_is_exit_code_3(tmp_path, capsys):
    code = cli.run(["train", "--out", str(tmp_path), *SMALL, "--learning-rate", "1e38"])
    assert code == 3
    error = _one_line(capsys)
    assert error.startswith("hos-ext: train: the ")
    assert "last good checkpoint: none was written" in error
    assert _files(tmp_path) == []


def test_a_run_that_fails_leaves_the_run_that_was_there(run_folder, tmp_path):
    out = ["--out", str(tmp_path), *SMALL]
    assert cli.run(["train", *out, "--steps", "1"]) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert cli.run(["train", *out, "--learning-rate", "1e38", "--force"]) == 3
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError, 1),
        (TypeError, 1),
        (KeyError, 1),
        (OSError, 1),
        (MemoryError, 4),
        (training.OutOfMemory, 4),
        (torch.OutOfMemoryError, 4),
        (training.NotFinite, 3),
        (KeyboardInterrupt, 130),
    ],
)
def test_work_that_goes_wrong_is_one_line_and_an_exit_code(
    monkeypatch, tmp_path, capsys, error, code
):
    def fail(*_, **__):
        raise error("no\nfactor")

    monkeypatch.setattr(runs, "fit", fail)
    assert cli.run(["train", "--out", str(tmp_path), *SMALL]) == code
    assert _one_line(capsys).startswith("hos-ext: ")


def test_work_that_goes_wrong_after_training_is_done_again_by_resume(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ValueError("no factor")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "recalibrate", fail)
        assert cli.run(["train", "--out", str(tmp_path), *SMALL]) == 1
    assert cli.run(["resume", str(tmp_path)]) == 0
    assert runs.load_run(tmp_path)[1]["step"] == 5


@pytest.mark.parametrize("command", ["train", "denoise", "demo"])
def test_a_folder_that_cannot_be_made_is_exit_code_2_before_the_work(
    run_folder, tmp_path, capsys, command
):
    (tmp_path / "file").write_text("")
    words = {"train": SMALL, "denoise": [str(run_folder)], "demo": []}[command]
    assert cli.run([command, *words, "--out", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in _one_line(capsys)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("typer", ["demo"], "cli: typer"),
        ("matplotlib.figure", ["denoise", "FOLDER", "--out", "OUT"], "plots: matplotlib.figure"),
        ("h5netcdf", ["chains", "FOLDER", "--netcdf", "--out", "OUT"], "chains --netcdf: h5netcdf"),
    ],
)
def test_a_missing_extra_is_exit_code_1_and_named(
    run_folder, tmp_path, monkeypatch, capsys, module, arguments, message
):
    monkeypatch.setitem(sys.modules, module, None)
    names = {"FOLDER": str(run_folder), "OUT": str(tmp_path)}
    assert cli.run([names.get(word, word) for word in arguments]) == 1
    assert _one_line(capsys).startswith(
        f"hos-ext: {message} must be installed (pip install hos_ext[cli]), got: "
    )
    assert _files(tmp_path) == []


# ----------------------------------------------------------------------------------- shared parts


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path):
    rows = {"sampling": [{"min_ess": math.nan, "step_size": 0.1, "n": 3}], "loss": math.inf}
    runs.write_json(tmp_path / "metrics.json", rows)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "sampling": [{"min_ess": None, "step_size": 0.1, "n": 3}],
        "loss": None,
    }


def test_the_command_line_is_imported_without_the_extras():
    program = "import sys, hos_ext; hos_ext.app.cli.COMMANDS; print(*sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    extras = {"typer", "rich", "matplotlib", "accelerate", "datasets", "diffusers", "PIL"}
    assert not extras & set(told.stdout.split())


def test_main_exits_with_the_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hos-ext", "paint"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2


def test_the_program_is_named_as_it_was_called(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv" / "bin" / "hos-ext")])
    assert program() == os.path.join(".venv", "bin", "hos-ext")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hos-ext"])
    assert program() == "hos-ext"


def test_module_prints_build_info(capsys):
    import runpy

    from hos_ext import build_info

    runpy.run_module("hos_ext", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(build_info())


def test_chains_say_that_another_process_did_not_come(monkeypatch):
    asked = {}

    def fail(backend, *, timeout):
        asked.update(backend=backend, seconds=timeout.total_seconds())
        raise torch.distributed.DistStoreError("wait timeout after 1800000ms")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    message = (
        r"^chains: every process must answer within timeout 1800 s, got none from another while "
        r"chains were shared out \(wait timeout after 1800000ms\); what stopped first is in the log"
    )
    with pytest.raises(training.Lost, match=message), results.ranks():
        pytest.fail("there is no group")
    assert asked == {"backend": "gloo", "seconds": 1800}
