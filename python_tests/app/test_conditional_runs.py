"""Runs with labels: trained, stopped, resumed, evaluated and asked for a class."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from hos_ext import MLP
from hos_ext.app import cli, data, evaluation, runs, training
from hos_ext.app.training import TrainingOptions
from hos_ext.app.training.batches import draw_batch, draw_validation

OPTIONS = {"steps": 8, "batch_size": 32, "save_every": 3, "device": "cpu", "log_every": 4}


def build(**options):
    torch.manual_seed(0)
    return MLP((8, 8), 2, width=16, head_width=8, depth=1, num_classes=10, **options)


@pytest.fixture(scope="module")
def source():
    return data.open_source("digits", label="label")


@pytest.fixture(scope="module")
def uninterrupted(source):
    return training.train(build(), source, TrainingOptions(**OPTIONS))


def same(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


# ---------------------------------------------------------------------------------- the batches


def test_batches_have_the_labels_of_their_rows_but_for_those_dropped(source):
    options = TrainingOptions(**OPTIONS | {"batch_size": 400}, condition_dropout=0.25)
    batch = draw_batch(source, options, 3, 0, 400)
    digits = torch.from_numpy(load_digits().target)
    kept = batch.label < 10
    assert torch.equal(batch.label[kept], digits[batch.rows][kept])
    assert 60 < int((~kept).sum()) < 140
    share = draw_batch(source, options, 3, 150, 280)
    assert torch.equal(share.label, batch.label[150:280])
    assert torch.equal(batch.part(30, 60).label, batch.label[30:60])
    whole = draw_batch(source, TrainingOptions(**OPTIONS, condition_dropout=0.0), 3, 0, 32)
    assert bool((whole.label < 10).all())
    held = draw_validation(source, options)
    assert torch.equal(held.label, source.labels.validation[: len(held.x0)])
    # Nothing else is drawn otherwise than without labels.
    plain = draw_batch(data.open_source("digits"), options, 3, 0, 400)
    assert plain.label is None
    assert torch.equal(plain.x0, batch.x0)
    assert torch.equal(plain.sigma, batch.sigma)


def test_micro_batches_of_labels_are_the_same_step(source, uninterrupted):
    parts = training.train(build(), source, TrainingOptions(**OPTIONS, accumulate=4))
    for a, b in zip(parts.model.parameters(), uninterrupted.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_a_conditional_training_resumes_bit_for_bit(source, uninterrupted, tmp_path):
    class Stop(Exception):
        pass

    def stop(model, step):
        raise Stop

    options = TrainingOptions(**OPTIONS | {"tracker": "tensorboard"})
    with pytest.raises(Stop):  # at the last step
        training.train(build(), source, options, out=tmp_path, report=stop)
    torch.manual_seed(99)
    plain = TrainingOptions(**OPTIONS)
    resumed = training.train(build(), source, plain, out=tmp_path, resume=True)
    assert resumed.resumed_from == 6
    assert same(resumed.model, uninterrupted.model)
    other = TrainingOptions(**OPTIONS, condition_dropout=0.5)
    with pytest.raises(ValueError, match=r"condition_dropout must be 0\.1 to go on from"):
        training.train(build(), source, other, out=tmp_path, resume=True)


def test_a_checkpoint_from_before_labels_is_gone_on_from(tmp_path):
    plain = data.open_source("digits")

    def model():
        torch.manual_seed(0)
        return MLP((8, 8), 2, width=16, head_width=8, depth=1)

    options = TrainingOptions(**OPTIONS, keep=9)
    whole = training.train(model(), plain, options, out=tmp_path)
    first, *later = sorted((tmp_path / "checkpoints").iterdir())
    for path in later:
        shutil.rmtree(path)
    state = json.loads((first / "state.json").read_text())
    del state["options"]["condition_dropout"]
    text = json.dumps(state)
    (first / "state.json").write_text(text)
    manifest = json.loads((first / "manifest.json").read_text())
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest["state.json"] = {"bytes": len(text), "sha256": digest}
    (first / "manifest.json").write_text(json.dumps(manifest))
    again = training.train(model(), plain, options, out=tmp_path, resume=True)
    assert again.resumed_from == 3
    assert same(again.model, whole.model)


def test_a_model_and_data_that_do_not_fit_are_refused(source):
    options = TrainingOptions(**OPTIONS)
    with pytest.raises(ValueError, match=r"train: model must take label= \(num_classes=10\)"):
        training.train(MLP((8, 8), 1, width=8), source, options)
    with pytest.raises(ValueError, match="model must have num_classes=10, the classes of the data"):
        training.train(MLP((8, 8), 1, width=8, num_classes=4), source, options)
    with pytest.raises(ValueError, match=r"data must have labels .* got none in digits"):
        training.train(build(), data.open_source("digits"), options)
    with pytest.raises(ValueError, match=r"condition_dropout must be in \[0, 1\), got 1"):
        TrainingOptions(steps=1, condition_dropout=1.0)


# ------------------------------------------------------------------------------ the evaluation


def test_held_out_rows_are_denoised_under_their_own_labels(source, uninterrupted):
    model = uninterrupted.model
    torch.manual_seed(1)
    with torch.no_grad():
        model.classes.weight.normal_()
    found = evaluation.denoise_held_out(model, source, 0.5, count=30, seed=0)
    labels = source.labels.test[:30]
    for row in (0, 7, 29):
        own = evaluation.denoise(
            model, found.x[row : row + 1], 0.5, model_kwargs={"label": labels[row : row + 1]}
        )
        torch.testing.assert_close(own.posterior.mean[0], found.posterior.mean[row])
    unlabelled = evaluation.denoise(model, found.x, 0.5)
    assert (unlabelled.posterior.mean - found.posterior.mean).abs().max() > 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale = evaluation.recalibrate(model, source, seed=0)
    assert scale != evaluation.recalibrate(lambda x, s, label: model(x, s), source, seed=0)


# ------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    words = f"train --condition label --steps 12 --width 16 --head-width 8 --rank 2 --out {out}"
    assert cli.run([*words.split(), "--device", "cpu", "--tracker", "none"]) == 0
    return out


def called(capsys, code, *words):
    assert cli.run([str(word) for word in words]) == code
    text = capsys.readouterr()
    return text.out if code == 0 else text.err


def test_the_run_says_what_it_was_conditioned_on(run, capsys):
    facts = json.loads((run / "run.json").read_text())
    assert facts["data"]["classes"] == list("0123456789")
    assert (facts["options"]["condition"], facts["options"]["condition_dropout"]) == ("label", 0.1)
    assert "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in called(capsys, 0, "info", run)
    model, _ = runs.load_run(run)
    assert model.num_classes == 10
    assert "is finished" in called(capsys, 0, "resume", run)


def test_denoise_takes_the_class_of_files(run, tmp_path, capsys):
    scans = data.load_digits(seed=0).test[:2] + 2 * torch.randn(2, 8, 8)
    np.save(tmp_path / "a.npy", scans.numpy())
    files = ("denoise", run, tmp_path / "a.npy", "--raw-sigma", "4", "--units", "raw", "--force")
    said = called(capsys, 2, *files, "--out", tmp_path)
    assert "--condition must be given for files (a class, or none), got none" in said
    said = called(capsys, 2, *files, "--out", tmp_path, "--condition", "eleven")
    assert "--condition must be one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, or none, got 'eleven'" in said
    said = called(capsys, 2, *files, "--out", tmp_path, "--condition", "1,2,3")
    assert "--condition must name one class, or one for each of 2 samples, got '1,2,3'" in said
    model, _ = runs.load_run(run)
    for text, labels in (("3", [3, 3]), ("3,7", [3, 7]), ("none", [10, 10])):
        called(capsys, 0, *files, "--out", tmp_path, "--condition", text)
        made = np.load(tmp_path / "denoise.npz")
        x = torch.from_numpy(made["noisy"])
        told = {"label": torch.tensor(labels)}
        wanted = evaluation.denoise(model, x, float(made["sigma"]), model_kwargs=told)
        np.testing.assert_allclose(made["mean"], wanted.posterior.mean, atol=1e-6)


def test_held_out_samples_are_those_of_the_class(run, tmp_path, capsys):
    out = ("--out", tmp_path, "--force")
    called(capsys, 0, "denoise", run, "--count", "3", "--condition", "7", *out)
    source = data.open_source("digits", label="label")
    rows = source.test[source.labels.test == 7][:3]
    model, _ = runs.load_run(run)
    made = np.load(tmp_path / "denoise.npz")
    chosen = source._replace(test=rows, labels=source.labels._replace(test=torch.full((3,), 7)))
    wanted = evaluation.denoise_held_out(model, chosen, float(made["sigma"]), seed=0)
    np.testing.assert_allclose(made["mean"], wanted.posterior.mean, atol=1e-6)
    assert "held-out 0, class 7" in (tmp_path / "denoise.md").read_text()
    said = called(capsys, 2, "denoise", run, "--count", "300", "--condition", "7", *out)
    assert "--count must be at most" in said


def test_evaluate_and_chains_take_a_class(run, tmp_path, capsys):
    out = ("--out", tmp_path, "--force")
    source = data.open_source("digits", label="label")
    fours = int((source.labels.test == 4).sum())
    for text, count in (("none", 50), ("4", min(50, fours))):
        more = ("--limit", "50", "--sigma", "0.5", "--condition", text)
        called(capsys, 0, "evaluate", run, *more, *out)
        report = json.loads((tmp_path / "evaluate.json").read_text())
        assert report["n"] == count
    words = ("chains", run, "--method", "langevin", "--steps", "8", "--burn-in", "0")
    called(capsys, 0, *words, "--chains", "3", "--condition", "4", *out)
    first = np.load(tmp_path / "chains-langevin.npz")
    called(capsys, 0, *words, "--chains", "3", "--condition", "none", *out)
    other = np.load(tmp_path / "chains-langevin.npz")
    assert not np.array_equal(first["starts"], other["starts"])
    model, _ = runs.load_run(run)
    sigma, draws = float(first["sigma"]), torch.from_numpy(first["draws"])
    ends = evaluation.denoise(
        model, draws[:, -1], sigma, model_kwargs={"label": torch.full((3,), 4)}
    )
    np.testing.assert_allclose(first["denoised"], ends.posterior.mean, atol=1e-6)


def test_runs_without_classes_refuse_one_by_name(tmp_path, capsys):
    out = tmp_path / "plain"
    words = f"train --steps 2 --width 8 --head-width 8 --rank 1 --out {out} --tracker none"
    assert cli.run([*words.split(), "--device", "cpu"]) == 0
    assert "classes" not in json.loads((out / "run.json").read_text())["data"]
    for command in ("denoise", "evaluate", "chains"):
        said = called(capsys, 2, command, out, "--condition", "3")
        rule = "--condition must be left out (the run was trained without --condition), got '3'"
        assert f"{command}: {rule}" in said
    said = called(capsys, 2, "train", "--condition-dropout", "0.2", "--out", tmp_path / "b")
    assert "condition_dropout must be left out without condition, got 0.2" in said
    said = called(capsys, 2, "train", "--condition", "kind", "--out", tmp_path / "b")
    assert re.search("label must be 'label' for digits, got 'kind'", said)


def test_no_class_needs_a_run_that_learned_it(tmp_path, capsys):
    out = tmp_path / "full"
    words = f"train --condition label --condition-dropout 0 --steps 2 --width 8 --out {out}"
    assert cli.run([*words.split(), "--device", "cpu", "--tracker", "none"]) == 0
    said = called(capsys, 2, "denoise", out, "--condition", "none")
    assert "--condition none must come with a run trained with --condition-dropout, got 0" in said
