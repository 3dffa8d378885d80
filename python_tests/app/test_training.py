"""The training engine: what a step is, exact resume, what it refuses, what it reports."""

import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from hos_ext import MLP, ScoreMatchingLoss, ops, progress, schedules, score_matching_loss
from hos_ext.app import data, training
from hos_ext.app.training import TrainingOptions, devices, engine, estimate, precision
from hos_ext.app.training.batches import draw_batch, gradient_variance, losses
from hos_ext.app.training.precision import _tf32
from hos_ext.random import STREAM_TIME
from hos_ext.scores import Scores

SETTINGS = {"width": 16, "depth": 2, "head_width": 8, "sigma_data": 0.7, "c_min": 0.01}


def build(seed=0, rank=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP((8, 8), rank, trunk="separate", activation=functional.silu, **SETTINGS)


@pytest.fixture(scope="module")
def source():
    return data.open_source("digits")


def run(source, seed=0, model=None, **options):
    options = {"steps": 12, "batch_size": 16, "augment": "distort", "seed": seed} | options
    names = ("out", "resume", "report", "facts", "progress")
    how = {name: options.pop(name) for name in names if name in options}
    return training.train(model or build(seed), source, TrainingOptions(**options), **how)


class _Instead:
    """A source with another `batch`."""

    def __init__(self, source, batch):
        self._source, self.batch = source, batch

    def __getattr__(self, name):
        return getattr(self._source, name)


def same(a, b):
    state = b.state_dict()
    return all(torch.equal(value, state[name]) for name, value in a.state_dict().items())


def near(a, b, atol):
    state = b.state_dict()
    return all((value - state[name]).abs().max() <= atol for name, value in a.state_dict().items())


# ---------------------------------------------------------------------------------------- the steps


def test_draw_sigma_is_log_uniform_and_known_by_its_row():
    sigma = schedules.draw_sigma(20000, (0.1, 1.2), seed=0)
    place = (sigma.double() / 0.1).log() / np.log(12)
    assert place.min() >= -1e-6
    assert place.max() <= 1 + 1e-6
    assert place.mean().item() == pytest.approx(0.5, abs=0.01)
    assert place.var().item() == pytest.approx(1 / 12, rel=0.03)
    assert not torch.equal(sigma, schedules.draw_sigma(20000, (0.1, 1.2), seed=0, offset=1))
    part = schedules.draw_sigma(7, (0.1, 1.2), seed=0, first=50)
    assert torch.equal(part, sigma[50:57])


def test_a_plain_loop_of_torch_gives_the_same_weights(source):
    """The engine against a loop written out: AdamW, warm-up, cosine, clipping, average."""
    model = build()
    trained = run(source, model=build(), steps=6, max_grad_norm=20.0)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=4e-3,
        betas=(0.9, 0.99),
        fused=True,
    )
    average = None
    for step in range(1, 7):
        raw = source.batch(step - 1, 16, seed=0)[1].float()
        half = data.distort(raw[:8], seed=0, offset=step)
        x = data.dequantise(torch.cat([half, raw[8:]]), seed=0, offset=step)
        sigma = schedules.draw_sigma(16, (0.1, 1.2), seed=0, offset=step)
        loss = score_matching_loss(model, x, sigma, **training.OBJECTIVE, seed=0, offset=step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 20.0)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 + np.cos(np.pi * (step - 1) / 6)) / 2
        optimizer.step()
        now = [p.detach().clone() for p in model.parameters()]
        weight = min(0.998, step / (9 + step))
        average = (
            now
            if step == 1
            else [weight * a + (1 - weight) * b for a, b in zip(average, now, strict=True)]
        )
    for a, b in zip(average, trained.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_train_lowers_the_loss_on_rows_it_does_not_see(source):
    trained = run(source, steps=60, batch_size=64)
    assert (trained.step, trained.resumed_from, trained.history[-1].step) == (60, 0, 60)
    assert trained.history[-1].validation_first < 0.9 * trained.history[0].validation_first
    assert not trained.model.training


def test_train_repeats_with_its_seed_and_leaves_the_generator_alone(source):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = run(source), run(source), run(source, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first.model, second.model)
    assert first.history == second.history
    assert first.history != other.history


def test_train_returns_the_average_of_the_weights(source):
    model = build()
    assert same(model, run(source, model=model, ema_decay=0.0).model)
    model = build()
    average = run(source, model=model, ema_decay=0.9).model
    gap = sum((v - average.state_dict()[k]).norm() for k, v in model.state_dict().items())
    assert gap > 1e-3


@pytest.mark.parametrize("accumulate", [2, 16])
def test_micro_batches_are_the_same_step(source, accumulate):
    whole, parts = run(source), run(source, accumulate=accumulate)
    assert near(whole.model, parts.model, 2e-5)
    for a, b in zip(whole.history, parts.history, strict=True):
        assert a[:8] == pytest.approx(b[:8], rel=1e-4)


def test_the_curve_holds_means_since_the_last_row(source):
    fine, coarse = run(source, log_every=1).history, run(source, log_every=5).history
    assert [row.step for row in coarse] == [5, 10, 12]
    for name in ("loss", "first", "second", "gradient_norm"):
        values = [getattr(row, name) for row in fine]
        assert getattr(coarse[1], name) == pytest.approx(np.mean(values[5:10]), rel=1e-12)
        assert getattr(coarse[2], name) == pytest.approx(np.mean(values[10:]), rel=1e-12)
    assert coarse[2].validation == fine[-1].validation
    assert coarse[0].loss == pytest.approx(coarse[0].first + coarse[0].second, rel=1e-6)


@pytest.mark.parametrize("rows", [3, 16])
def test_the_gradient_variance_is_that_of_the_batch(source, rows):
    """Its mean over many batches against the spread of the gradients of those batches."""
    model = build(rank=0)
    trained = list(model.parameters())
    options = TrainingOptions(steps=150, batch_size=rows, sigma_range=(0.3, 0.6))
    estimates, gradients = [], []
    for step in range(150):
        batch = draw_batch(source, options, step + 1, 0, rows)
        estimates.append(gradient_variance(model, trained, batch, training.OBJECTIVE))
        loss = losses(model, batch, training.OBJECTIVE)[0].mean()
        flat = [g.flatten() for g in torch.autograd.grad(loss, trained)]
        gradients.append(torch.cat(flat).double())
    spread = torch.stack(gradients).var(0).sum().item()
    assert np.mean(estimates) == pytest.approx(spread, rel=0.1)


def test_the_curve_gives_the_gradient_variance_of_a_whole_batch_of_many_parts(source):
    """A part of four rows has four times the spread of the step's sixteen."""
    steps, model = 30, build(rank=0)
    options = {"steps": steps, "sigma_range": (0.3, 0.6), "augment": "none"}
    gradients = []
    for step in range(steps):
        batch = draw_batch(source, TrainingOptions(**options, batch_size=16), step + 1, 0, 16)
        loss = losses(model, batch, training.OBJECTIVE)[0].mean()
        flat = [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
        gradients.append(torch.cat(flat).double())
    spread = torch.stack(gradients).var(0).sum().item()
    still = options | {"learning_rate": 1e-12, "log_every": 1, "accumulate": 4}
    history = run(source, model=model, **still).history
    assert np.mean([row.gradient_variance for row in history]) == pytest.approx(spread, rel=0.3)


def test_a_part_of_a_part_draws_as_the_whole_batch(source):
    model, options = build(), TrainingOptions(steps=1, batch_size=8)
    whole = draw_batch(source, options, 1, 0, 8)
    again = draw_batch(source, options, 1, 4, 8).part(2, 4)
    assert torch.equal(again.x0, whole.x0[6:])
    alone, among = (losses(model, batch, training.OBJECTIVE) for batch in (again, whole))
    torch.testing.assert_close(alone, among[:, 6:])


def test_the_validation_loss_is_that_of_all_its_rows_at_once(source):
    """It is taken in parts of 128 rows; each row has its own noise, and counts once."""
    trained = run(source, steps=1, ema_decay=0.0)
    x0 = source.scaling.forward(source.validation[:192], seed=0)
    sigma = schedules.draw_sigma(len(x0), (0.1, 1.2), seed=0)
    assert len(x0) > 128
    whole, terms = score_matching_loss(
        trained.model, x0, sigma, **training.OBJECTIVE, seed=0, return_terms=True
    )
    row = trained.history[-1]
    assert row.validation == pytest.approx(whole.item(), rel=1e-5)
    assert row.validation_first == pytest.approx(terms["first"].item(), rel=1e-5)


def test_train_takes_batches_of_one_row(source):
    history = run(source, steps=2, batch_size=1).history
    assert len(history) == 2
    assert history[0].gradient_variance is None


class _Tied(nn.Module):
    """A weight under two names, and one that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.body = build()
        self.alias = self.body.c
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x, sigma):
        return self.body(x, sigma)


def test_tied_and_idle_weights_are_trained_and_resumed_like_others(source, tmp_path):
    plain = run(source).model
    assert same(plain, run(source, model=_Tied(), out=tmp_path, save_every=5).model.body)
    (tmp_path / "checkpoints" / "step-00000012" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="going back"):
        again = run(source, model=_Tied(), out=tmp_path, resume=True)
    assert again.resumed_from == 10
    assert same(plain, again.model.body)
    assert torch.equal(again.model.idle, torch.ones(3))


class _Half(nn.Module):
    """A frozen score beside trained second-order parameters."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)
        self.c = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x, sigma):
        variance = sigma.view(-1, 1, 1) ** 2 + 0.5
        score = -self.frozen * sigma.view(-1, 1, 1) * x / variance
        return Scores(score, functional.softplus(self.c).expand_as(x), None)


def test_frozen_parameters_are_neither_trained_nor_saved(source, tmp_path):
    model = _Half()
    run(source, model=model, out=tmp_path, objective={"diagonal": True})
    assert model.frozen.item() == 1
    assert model.c.abs().min() > 0
    from safetensors.torch import load_file

    path = tmp_path / "checkpoints" / "step-00000012"
    assert set(load_file(path / "model.safetensors")) == {"c"}
    assert set(load_file(path / "ema.safetensors")) == {"n_averaged", "module.c"}
    again = run(source, model=_Half(), out=tmp_path, objective={"diagonal": True}, resume=True)
    assert again.resumed_from == 12


def test_bf16_runs_the_network_under_autocast_and_leaves_the_model_as_it_was(source):
    code = """
import torch
torch.set_num_threads(1)
from test_training import _Cut, _cut, build, run, data
source = data.open_source("digits")
model = build()
kinds = set()
def hook(module, inputs, output):
    kinds.add(output.dtype)
model.bodies[0].layers[0].register_forward_hook(hook)
try:
    run(_cut(source, 1), model=model, mixed_precision="bf16")
except _Cut:
    kinds.clear()
    model(torch.zeros(1, 8, 8), 1.0)
    print(*kinds)
model = build()
model.bodies[0].layers[0].register_forward_hook(hook)
bf16 = run(source, model=model, mixed_precision="bf16")
print(torch.bfloat16 in kinds)
kinds.clear()
model(torch.zeros(1, 8, 8), 1.0)
bf16.model(torch.zeros(1, 8, 8), 1.0)
print(*kinds)
print(all(p.dtype == torch.float32 for p in bf16.model.parameters()), bf16.history[-1].first)
"""
    told = _python(code)
    wide = run(source).history[-1].first
    assert told[:3] == ["torch.float32", "True", "torch.float32"]
    dtypes, narrow = told[3].split()
    assert dtypes == "True"
    assert float(narrow) == pytest.approx(wide, rel=0.02)
    assert float(narrow) != wide


def _python(code, code_expected=0, **environment):
    """Runs a program in a process of its own, with the tests importable; the lines it printed."""
    here = pathlib.Path(__file__).parent
    places = map(str, (here, *here.parents[:2]))  # this room's tests, what all share, the package
    paths = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == code_expected, told.stderr
    return told.stdout.splitlines()


@pytest.fixture
def terminal(monkeypatch):
    """A wide one, as rich sees it."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_train_shows_loss_error_rate_and_time_left_on_a_terminal(source, capsys, terminal):
    run(source, steps=3, progress=True)
    told = capsys.readouterr()
    assert told.out == ""
    shown = plain(told.err)
    assert "3/3" in shown
    for word in ("loss ", "an entry", "error ", "sigma^2", "steps/s", "left"):
        assert word in shown


def test_no_rate_is_shown_before_a_step_is_made(capsys, terminal):
    with progress.show_progress("train", True, "training", 10, done=3, figures=engine._FIGURES):
        pass
    shown = plain(capsys.readouterr().err)
    assert "3/10" in shown
    assert "loss nan an entry denoising error nan sigma^2 0.0 steps/s" in shown


def test_without_a_terminal_the_log_has_a_line_every_few_seconds(source, capsys, caplog):
    """Of the loss of an entry and the denoising error, as the history has them."""
    caplog.set_level("INFO", "hos_ext")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "EVERY", 0.0)
        trained = run(source, steps=3, log_every=1, progress=True)
    assert capsys.readouterr() == ("", "")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [f"step {i} of 3" for i in (1, 2, 3)]
    row = trained.history[0]
    assert row.loss_per_entry == row.loss / 64
    assert row.error == row.first / 64
    assert row.validation_error == row.validation_first / 64
    words = f"loss {row.loss_per_entry:.4g} an entry, denoising error {row.error:.3f} sigma^2, "
    assert words in lines[0]
    assert lines[-1].endswith(" steps/s, 0:00:00 left")
    caplog.clear()
    run(source, steps=3, progress=True)  # quicker than a line
    run(source, steps=3)
    assert not caplog.records


def test_a_training_that_shows_no_progress_logs_nothing(source, caplog, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    caplog.set_level("INFO", "hos_ext")
    run(source, steps=3, progress=False)
    assert not caplog.records


def test_rows_of_the_curve_and_checkpoints_are_logged_for_those_who_ask(source, tmp_path, caplog):
    caplog.set_level("DEBUG", "hos_ext")
    run(source, steps=2, log_every=1, out=tmp_path, save_every=2)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "on validation " in lines[0]
    assert lines[-1] == f"wrote {tmp_path / 'checkpoints' / 'step-00000002'}"


def test_rows_of_older_versions_are_read(source, saved, tmp_path, uninterrupted):
    """They end with the variance of the gradient."""
    folder = shutil.copytree(saved, tmp_path / "old")
    path = sorted((folder / "checkpoints").iterdir())[-1]
    state = json.loads((path / "state.json").read_text())
    old = training.History._fields.index("gradient_variance") + 1
    assert [len(row) for row in state["history"]] == [old + 3] * len(state["history"])
    state["history"] = [row[:old] for row in state["history"]]
    text = json.dumps(state)
    (path / "state.json").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest["state.json"] = {"bytes": len(text), "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))
    again = run(source, resume=True, steps=12, log_every=5, out=folder, save_every=4)
    assert [row.error is None for row in again.history] == [True] * len(state["history"]) + [
        False
    ] * (len(again.history) - len(state["history"]))
    expected = [row[:old] for row in uninterrupted.history]
    assert [row[:old] for row in again.history] == expected


# -------------------------------------------------------------------------------- devices, memory


def test_a_device_by_name_is_one_that_is_there(source):
    assert run(source, steps=1, device="cpu").step == 1
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for name in ("cuda:77", "mps" if there else "cuda"):
        with pytest.raises(ValueError, match=r"^train: device must be a device of this machine "):
            run(source, steps=1, device=name)
    for name in ("gpu", "meta", ""):
        with pytest.raises(ValueError, match=r"^train: device must be auto, cpu, cuda or cuda:N, "):
            run(source, steps=1, device=name)
    with pytest.raises(TypeError, match=r"^train: device must be auto, cpu, cuda or cuda:N, got 0"):
        run(source, steps=1, device=0)


def test_a_device_is_told_to_accelerate_for_one_process_alone(monkeypatch):
    name = "ACCELERATE_TORCH_DEVICE"
    monkeypatch.delenv(name, raising=False)
    with devices.asking_for("cuda:1", 1):
        assert os.environ[name] == "cuda:1"
    with devices.asking_for("cpu", 1):
        assert name not in os.environ
    with devices.asking_for("cuda", 2):  # each takes its own
        assert name not in os.environ
    assert name not in os.environ
    rule = r"device must be auto, cpu or cuda where there are several .* got cuda:1$"
    with pytest.raises(ValueError, match=rule), devices.asking_for("cuda:1", 2):
        pass
    devices.check_same_device(torch.device("cuda", 0), "cuda:0")
    devices.check_same_device(torch.device("cuda"), "cuda")
    rule = r"^train: device must stay the same within a process, cuda:0, got cuda:1$"
    with pytest.raises(ValueError, match=rule):
        devices.check_same_device(torch.device("cuda", 0), "cuda:1")


def test_memory_is_estimated_from_what_autograd_keeps(source):
    model = build()
    options = training.TrainingOptions(steps=1, batch_size=64)
    found = training.estimate_memory(model, source, options)
    size = sum(p.numel() for p in model.parameters())
    assert found.weights == 5 * 4 * size  # weights, average, gradient, two moments
    half = training.estimate_memory(model, source, replace(options, accumulate=2))
    assert (found.rows, half.rows) == (64, 32)
    assert half.activations == pytest.approx(found.activations / 2, rel=0.1)
    for precision_, accumulate in (("no", 1), ("no", 64), ("bf16", 1)):
        chosen = replace(options, mixed_precision=precision_, accumulate=accumulate)
        found = training.estimate_memory(model, source, chosen)
        whole = estimate.kept_bytes(model, source, chosen, 64 // accumulate)
        assert found.activations == pytest.approx(whole, rel=0.01)
        # The last layers alone keep their inputs, 16 + 2 x 8 numbers of a row, and score and c.
        assert whole > 64 // accumulate * (32 + 128) * 2
    for p in model.parameters():
        assert p.grad is None


# ------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def uninterrupted(source):
    return run(source, steps=12, log_every=5)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def goes_on_as_if_nothing_had_happened(source, folder, uninterrupted, step):
    options = {"steps": 12, "log_every": 5, "out": folder, "save_every": 4}
    again = run(source, resume=True, **options)
    assert again.resumed_from == step
    assert same(again.model, uninterrupted.model)
    assert again.history == uninterrupted.history
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves_and_the_rest_is_the_same_bit_for_bit(
    source, tmp_path, uninterrupted, number
):
    calls = []
    batch = source.batch

    def interrupt(step, *arguments, **options):
        calls.append(step)
        if len(calls) == 7:
            os.kill(os.getpid(), number)
        return batch(step, *arguments, **options)

    stopping = _Instead(source, interrupt)
    before = signal.getsignal(number)
    with pytest.raises(training.Stopped) as stopped:
        run(stopping, log_every=5, out=tmp_path, save_every=4)
    assert signal.getsignal(number) is before
    assert stopped.value.signal == number
    assert str(stopped.value) == (
        f"train: {number.name} stopped it after step 7; last checkpoint: "
        f"{tmp_path / 'checkpoints' / 'step-00000007'} (step 7)"
    )
    assert goes_on_as_if_nothing_had_happened(source, tmp_path, uninterrupted, 7)


KILL = """
import os, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from test_training import data, run
from hos_ext import storage
where, folder = sys.argv[1:] if len(sys.argv) > 2 else (os.environ["WHERE"], os.environ["FOLDER"])
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
count = 0
mark, rename, rmtree = storage._mark, Path.rename, storage.shutil.rmtree
def second(path):
    return "step-00000008" in str(path)
if where == "weights":  # model.safetensors of step 8 is written, the rest is not
    storage._mark = lambda path: kill() if second(path) else mark(path)
elif where == "rename":  # all files of step 8 are there, under the temporary name
    Path.rename = lambda path, to: kill() if second(to) else rename(path, to)
elif where == "prune":  # step 8 is there, step 4 not yet removed
    import shutil
    def prune(path, **options):
        kill() if Path(path).name == "step-00000004" else rmtree(path, **options)
    shutil.rmtree = prune
run(data.open_source("digits"), log_every=5, out=folder, save_every=4, keep=1)
"""


@pytest.mark.parametrize(("where", "step"), [("weights", 4), ("rename", 4), ("prune", 8)])
def test_a_run_killed_while_it_writes_a_checkpoint_loses_nothing(
    source, tmp_path, uninterrupted, where, step
):
    _python(KILL, -signal.SIGKILL, WHERE=where, FOLDER=str(tmp_path))
    left = names(tmp_path)
    assert "step-00000004" in left
    assert any(name.endswith(".tmp") for name in left) == (where != "prune")
    assert ("step-00000008" in left) == (where == "prune")
    assert goes_on_as_if_nothing_had_happened(source, tmp_path, uninterrupted, step)
    assert not any(name.endswith(".tmp") for name in names(tmp_path))


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run(source, log_every=5, out=folder, save_every=4)
    return folder


def copied(saved, folder):
    for path in (saved / "checkpoints").rglob("*.*"):
        target = folder / path.relative_to(saved)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder / "checkpoints"


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("model.safetensors", _truncate, "model.safetensors is not what was written"),
        ("ema.safetensors", _flip, "ema.safetensors is not what was written"),
        ("optimizer.pt", lambda path: path.unlink(), "optimizer.pt is missing"),
        ("state.json", _truncate, "state.json is not what was written"),
        ("manifest.json", lambda path: path.unlink(), "manifest.json is missing"),
        ("manifest.json", lambda path: path.write_text("{"), "manifest.json cannot be read: "),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json cannot be read: "),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    source, saved, tmp_path, uninterrupted, name, harm, words
):
    folder = copied(saved, tmp_path)
    harm(folder / "step-00000012" / name)
    with pytest.warns(UserWarning, match="^train: ") as warned:
        assert goes_on_as_if_nothing_had_happened(source, tmp_path, uninterrupted, 8)
    assert len(warned) == 1
    message = str(warned[0].message)
    assert message.startswith(f"train: {folder / 'step-00000012'} is damaged ({words}")
    assert message.endswith("): going back to the one before")
    assert training.list_checkpoints(tmp_path)[-1] == (folder / "step-00000012", None)


def test_without_a_whole_checkpoint_the_run_starts_again(source, saved, tmp_path, uninterrupted):
    for path in copied(saved, tmp_path).iterdir():
        (path / "state.json").unlink()
    with pytest.warns(UserWarning, match="going back to the one before") as warned:
        assert goes_on_as_if_nothing_had_happened(source, tmp_path, uninterrupted, 0)
    assert len(warned) == 3


def test_a_checkpoint_holds_tensors_and_plain_json_only(source, saved):
    path = saved / "checkpoints" / "step-00000012"
    assert sorted(file.name for file in path.iterdir()) == [
        "ema.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.pt",
        "state.json",
    ]
    torch.load(path / "optimizer.pt", weights_only=True)
    state = json.loads((path / "state.json").read_text())
    assert set(state) == {"step", "options", "facts", "history", "sums"}


def test_a_fixed_number_of_checkpoints_is_kept(source, saved, tmp_path):
    assert names(saved) == ["step-00000004", "step-00000008", "step-00000012"]
    run(source, out=tmp_path, save_every=2, keep=2, facts={"data": "digits"})
    assert names(tmp_path) == ["step-00000010", "step-00000012"]
    state = json.loads((tmp_path / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["facts"] == {"data": "digits"}


class _Cut(Exception):
    """The end of a run at a step, as hard as a power cut but for this process."""


def _cut(source, at):
    def batch(step, *arguments, **options):
        if step == at:
            raise _Cut
        return source.batch(step, *arguments, **options)

    return _Instead(source, batch)


def test_damaged_checkpoints_ahead_and_passed_by_are_not_among_those_kept(
    source, saved, tmp_path, uninterrupted
):
    folder = copied(saved, tmp_path)
    (folder / "step-00000012" / "state.json").unlink()
    with pytest.warns(UserWarning, match="going back"), pytest.raises(_Cut):
        run(_cut(source, 9), log_every=5, out=tmp_path, save_every=3, keep=1, resume=True)
    assert names(tmp_path) == ["step-00000009", "step-00000012"]
    _flip(folder / "step-00000009" / "optimizer.pt")
    copied(saved, tmp_path)
    (folder / "step-00000012" / "state.json").unlink()
    with pytest.warns(UserWarning, match="going back"), pytest.raises(_Cut):
        run(_cut(source, 10), log_every=5, out=tmp_path, save_every=10, keep=2, resume=True)
    assert names(tmp_path) == ["step-00000008", "step-00000010", "step-00000012"]
    with pytest.warns(UserWarning, match="going back"):
        assert goes_on_as_if_nothing_had_happened(source, tmp_path, uninterrupted, 10)


def test_a_signal_at_the_end_of_a_step_waits_for_the_next(source, tmp_path, monkeypatch):
    @contextmanager
    def bar(*_, **__):
        yield lambda step, **_: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None

    monkeypatch.setattr(engine, "show_progress", bar)
    with pytest.raises(training.Stopped, match=r"after step 7; last checkpoint: .*step-00000007 "):
        run(source, out=tmp_path, save_every=4)


def test_a_signal_that_was_ignored_before_still_is(source, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        batch = source.batch

        def interrupt(*arguments, **options):
            os.kill(os.getpid(), signal.SIGINT)
            return batch(*arguments, **options)

        assert run(_Instead(source, interrupt), steps=2).step == 2
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_does_not_start_among_the_checkpoints_of_another(source, saved):
    with pytest.raises(
        ValueError,
        match=r"^train: out must hold no checkpoints without resume, got .*step-00000012$",
    ):
        run(source, out=saved)
    assert names(saved) == ["step-00000004", "step-00000008", "step-00000012"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_an_os_error_and_the_checkpoint_before_stays(
    source, saved, tmp_path, uninterrupted, name
):
    """A limit on the size of files stands for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (saved / "checkpoints" / "step-00000004" / name).stat().st_size

    def batch(step, *arguments, **options):
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
        return source.batch(step, *arguments, **options)

    try:
        with pytest.raises(OSError, match=r"^\[Errno 27\] File too large"):
            run(_Instead(source, batch), log_every=5, out=tmp_path, save_every=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000004"]
    assert goes_on_as_if_nothing_had_happened(source, tmp_path, uninterrupted, 4)


def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_step(source, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(FileExistsError):
        run(_cut(source, 0), out=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"facts": {"a": torch.ones(1)}}, TypeError, "facts must be plain JSON, got: Object of "),
        ({"facts": {"a": np.nan}}, ValueError, "facts must be plain JSON, got: Out of range "),
        (
            {"objective": {"gamma": torch.ones(())}},
            TypeError,
            "objective must be plain JSON, got: ",
        ),
        (
            {"objective": {"gamma": (1.0,)}},
            TypeError,
            r"objective must be plain JSON, got {'gamma'",
        ),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused_before_the_first_step(
    source, tmp_path, options, error, message
):
    with pytest.raises(error, match="^train: " + message):
        run(_cut(source, 0), out=tmp_path, **options)


def test_moments_are_read_to_the_cpu_wherever_they_were_saved(
    source, saved, tmp_path, uninterrupted, monkeypatch
):
    """As on a machine without the GPU of the run: torch would look for it."""
    copied(saved, tmp_path)
    (tmp_path / "checkpoints" / "step-00000012" / "state.json").unlink()
    load, places = torch.load, []

    def note(*arguments, **options):
        places.append(options.get("map_location"))
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", note)
    with pytest.warns(UserWarning, match="going back"):
        assert goes_on_as_if_nothing_had_happened(source, tmp_path, uninterrupted, 8)
    assert places == ["cpu"]


def test_a_run_of_micro_batches_goes_on_bit_for_bit(source, tmp_path):
    options = {"accumulate": 2, "log_every": 5, "tracker": "tensorboard"}
    whole = run(source, out=tmp_path / "whole", **options)
    with pytest.raises(_Cut):
        run(_cut(source, 6), out=tmp_path / "cut", save_every=4, **options)
    again = run(source, out=tmp_path / "cut", save_every=4, resume=True, **options)
    assert again.resumed_from == 4
    assert same(again.model, whole.model)
    assert again.history == whole.history


def test_a_finished_run_is_left_as_it_is(source, saved, tmp_path, uninterrupted):
    copied(saved, tmp_path)
    assert goes_on_as_if_nothing_had_happened(source, tmp_path, uninterrupted, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 32}, r"^train: batch_size must be 16 to go on from .*12, got 32$"),
        ({"seed": 1}, r"^train: seed must be 0 to go on from .*12, got 1$"),
        ({"steps": 20}, r"^train: steps must be 12 to go on from .*12, got 20$"),
        ({"objective": {"gamma": 2.0}}, r"^train: objective must be {.*} to go on from .*, got "),
        ({"model": _Half()}, r"^train: model must be the one of the checkpoint, got .*12$"),
        ({"model": build(rank=3)}, r"^train: model must be the one of the checkpoint, got .*12$"),
        (
            {"model": build().double()},
            r"^train: model must be the one of the checkpoint, got .*12$",
        ),
    ],
)
def test_a_run_goes_on_with_its_own_options_only(source, saved, options, message):
    with pytest.raises(ValueError, match=message):
        run(source, out=saved, resume=True, **options)


@pytest.mark.parametrize("warm_up", [1, 7])
def test_a_constant_rate_may_go_on_for_longer(source, tmp_path, warm_up):
    options = {"decay": "constant", "out": tmp_path, "warm_up": warm_up, "log_every": 1}
    run(source, steps=5, **options)
    longer = run(source, steps=9, resume=True, **options)
    assert longer.resumed_from == 5
    once = run(source, steps=9, decay="constant", warm_up=warm_up, log_every=1)
    assert same(longer.model, once.model)
    assert longer.history == once.history
    assert once.history[-1].learning_rate == 4e-3
    with pytest.raises(ValueError, match=r"^train: steps must be 9 to go on from .*, got 7$"):
        run(source, steps=7, resume=True, **options)


# ------------------------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_is_traced_to_its_samples(source, tmp_path):
    row, step = 77, 0
    while row not in source.batch(step, 16, seed=0)[0].tolist():
        step += 1
    assert step > 0
    place = source.batch(step, 16, seed=0)[0].tolist().index(row)
    sigma = schedules.draw_sigma(16, (0.1, 1.2), seed=0, offset=step + 1)[place]
    batch = source.batch

    def poisoned(step, *arguments, **options):
        rows, raw = batch(step, *arguments, **options)
        raw = raw.float()
        raw[rows == row] = torch.nan
        return rows, raw

    bad = _Instead(source, poisoned)
    with pytest.raises(training.NotFinite) as error:
        run(bad, steps=200, out=tmp_path, save_every=1, keep=1, augment="none")
    assert str(error.value) == (
        f"train: the first-order term must stay finite, got nan at step {step + 1} in sample "
        f"{row} (sigma {sigma:.4g}); last good checkpoint: "
        f"{tmp_path / 'checkpoints' / f'step-{step:08d}'} (step {step})"
    )
    assert [path.name for path, wrong in training.list_checkpoints(tmp_path) if wrong is None] == [
        f"step-{step:08d}"
    ]


class _Overflow(nn.Module):
    """Finite values, an infinite gradient in the factor: sqrt at 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, sigma):
        factor = (self.weight.sqrt() + 1).expand(len(x), 64, 1)
        return Scores(-x, torch.ones_like(x) + 0 * self.weight, factor)


def test_train_stops_before_a_gradient_that_is_not_finite_reaches_the_weights(source):
    model = _Overflow()
    with pytest.raises(
        training.NotFinite,
        match=r"^train: the norm of the gradient must stay finite, got "
        r"(inf|nan) at step 1; last good checkpoint: none was written$",
    ):
        run(source, model=model, steps=3, batch_size=4)
    assert model.weight.item() == 0


class _OverflowApart(nn.Module):
    """Finite where it is trained and not on the validation rows: their noise has offset 0."""

    def __init__(self):
        super().__init__()
        self.body = build()

    def forward(self, x, sigma):
        scores = self.body(x, sigma)
        return (
            scores
            if torch.is_grad_enabled()
            else scores.replace(scaled_score=scores.scaled_score / 0)
        )


def test_a_curve_that_is_not_finite_stops_the_run(source, tmp_path):
    with pytest.raises(
        training.NotFinite,
        match=r"^train: the validation of the curve must stay finite, got (nan|inf) at step 5; "
        r"last good checkpoint: .*step-00000004 \(step 4\)$",
    ):
        run(source, model=_OverflowApart(), out=tmp_path, save_every=4, log_every=5)


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 80 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_a_step_that_does_not_fit_says_what_to_lower(source, failure):
    model = build()

    def fail(*_):
        raise failure

    model.register_forward_pre_hook(fail)
    with pytest.raises(training.OutOfMemory) as error:
        run(source, model=model, accumulate=2)
    assert str(error.value) == (
        "train: a step must fit in the memory of cpu, got 8 samples at a time (batch_size 16): "
        "raise accumulate, or lower batch_size, rank or the size of the model, or turn gradient "
        "checkpointing on"
    )


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]"
                ":42: Connection reset by peer. This is typically caused by a remote worker"
            ),
            "Read error [10.0.0.2]:42: Connection reset by peer.",
        ),
        (
            torch.distributed.DistStoreError("wait timeout after 7000ms"),
            "wait timeout after 7000ms",
        ),
    ],
)
def test_a_process_that_is_lost_is_named_with_the_step_and_the_checkpoint(
    source, tmp_path, failure, told
):
    model, calls = build(), []

    def fail(*_):
        calls.append(0)
        if len(calls) == 4:
            raise failure

    model.register_forward_pre_hook(fail)
    with pytest.raises(training.Lost) as error:
        run(source, model=model, out=tmp_path, save_every=2, log_every=12, timeout=7)
    assert str(error.value) == (
        "train: every process must answer within timeout 7 s, got none from another at step 4; "
        f"last checkpoint: {tmp_path}/checkpoints/step-00000002 (step 2) ({told}); what stopped "
        "first is in the log of that process"
    )


def test_a_checkpoint_is_named_whose_writing_the_others_did_not_wait_for(
    source, tmp_path, monkeypatch
):
    import accelerate

    def fail(_):
        raise torch.distributed.DistBackendError("connection closed")

    monkeypatch.setattr(accelerate.Accelerator, "wait_for_everyone", fail)
    message = r"at step 2; last checkpoint: .*/step-00000002 \(step 2\) \(connection closed\)"
    with pytest.raises(training.Lost, match=message):
        run(source, out=tmp_path, save_every=2)


@pytest.mark.parametrize("timeout", [5, 600, 1800])  # the last two are defaults of accelerate
def test_the_time_that_processes_wait_is_told_to_accelerate(source, monkeypatch, timeout):
    import accelerate

    def told(**options):
        (handler,) = options["kwargs_handlers"]
        raise ConnectionError(handler.to_kwargs()["timeout"].total_seconds())

    monkeypatch.setattr(accelerate, "Accelerator", told)
    with pytest.raises(ConnectionError) as error:
        run(source, timeout=timeout)
    assert error.value.args[0] == pytest.approx(timeout, abs=0.001)


def test_other_failures_of_the_model_are_left_alone(source):
    model = build()

    def fail(*_):
        raise RuntimeError("a shape is wrong")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match=r"^a shape is wrong$"):
        run(source, model=model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"^train: steps must be at least 1, got 0$"),
        ({"batch_size": 0}, r"^train: batch_size must be at least 1, got 0$"),
        ({"save_every": 0}, r"^train: save_every must be at least 1, got 0$"),
        ({"keep": 0}, r"^train: keep must be at least 1, got 0$"),
        ({"log_every": 0}, r"^train: log_every must be at least 1, got 0$"),
        ({"accumulate": 3}, r"^train: accumulate must divide batch_size 16, got 3$"),
        ({"sigma_range": (0.0, 1.0)}, r"^train: sigma_range must be \(low, high\) with 0 < low"),
        ({"sigma_range": (0.5, 0.1)}, r"^train: sigma_range must be \(low, high\) with 0 < low"),
        ({"sigma_range": 0.5}, r"^train: sigma_range must be \(low, high\) .*, got 0\.5$"),
        ({"learning_rate": 0.0}, r"^train: learning_rate must be finite and > 0, got 0$"),
        ({"max_grad_norm": -1.0}, r"^train: max_grad_norm must be finite and > 0, got -1$"),
        ({"weight_decay": -0.1}, r"^train: weight_decay must be finite and >= 0, got -0\.1$"),
        ({"warm_up": -1}, r"^train: warm_up must be in \[0, 2\*\*31\), got -1$"),
        ({"ema_decay": 1.0}, r"^train: ema_decay must be below 1, got 1$"),
        ({"decay": "linear"}, r"^train: decay must be one of 'cosine', 'constant', got 'linear'$"),
        ({"mixed_precision": "fp16"}, r"^train: mixed_precision must be one of 'no', 'bf16', got "),
        ({"device": "gpu"}, r"^train: device must be auto, cpu, cuda or cuda:N, got 'gpu'$"),
        (
            {"tracker": "tensorboard"},
            r"^train: out must be a folder for the tracker 'tensorboard', got None$",
        ),
    ],
)
def test_train_refuses_arguments_out_of_range(source, options, message):
    with pytest.raises(ValueError, match=message):
        run(source, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, r"^train: steps must be an int, got float$"),
        ({"warm_up": True}, r"^train: warm_up must be an int, got bool$"),
        ({"learning_rate": "a"}, r"^train: learning_rate must be a number, got 'a'$"),
        ({"weight_decay": None}, r"^train: weight_decay must be a number, got None$"),
    ],
)
def test_train_refuses_arguments_of_another_kind(source, options, message):
    with pytest.raises(TypeError, match=message):
        run(source, **options)


def test_options_are_refused_where_they_are_made_and_stay_as_they_are():
    with pytest.raises(ValueError, match=r"^train: keep must be at least 1, got 0$"):
        TrainingOptions(steps=1, keep=0)
    with pytest.raises(AttributeError):
        TrainingOptions(steps=1).steps = 2


def test_a_checkpoint_names_what_a_step_depends_on(saved):
    """The names in the file: checkpoints of before are compared by them."""
    path = saved / "checkpoints" / "step-00000012" / "state.json"
    assert json.loads(path.read_text())["options"] == {
        "steps": 12,
        "batch_size": 16,
        "learning_rate": 4e-3,
        "decay": "cosine",
        "weight_decay": 0.1,
        "warm_up": 300,
        "max_grad_norm": 5.0,
        "ema_decay": 0.998,
        "sigma_range": [0.1, 1.2],
        "objective": {"variance_reduction": False, "centred": True},
        "augment": "distort",
        "seed": 0,
        "mixed_precision": "no",
        "condition_dropout": 0.1,
    }


def test_a_checkpoint_of_before_objectives_were_named_whole_goes_on(source, tmp_path):
    """Then Eq. 33 was what is fitted where nothing was said, and a checkpoint names what was."""
    given = {"variance_reduction": True, "centred": False}
    whole = run(source, out=tmp_path / "whole", objective=given, save_every=8)
    run(source, out=tmp_path / "old", objective=given, save_every=8)
    folder = tmp_path / "old" / "checkpoints" / "step-00000012"
    shutil.rmtree(folder)
    folder = folder.with_name("step-00000008")
    state = json.loads((folder / "state.json").read_text())
    assert state["options"]["objective"] == given
    state["options"]["objective"] = {"variance_reduction": True}
    text = json.dumps(state).encode()
    manifest = json.loads((folder / "manifest.json").read_text())
    mark = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    assert manifest["state.json"].keys() == mark.keys()
    (folder / "state.json").write_bytes(text)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"state.json": mark}))
    again = run(source, out=tmp_path / "old", resume=True, objective=given, save_every=8)
    assert again.history[-1] == whole.history[-1]
    with pytest.raises(ValueError, match=r"^train: objective must be .* to go on from "):
        run(source, out=tmp_path / "old", resume=True, objective={"variance_reduction": True})


def test_dropout_is_refused(source):
    model = nn.Sequential(build(), nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"^train: dropout must be off .*, got p = 0\.1 in '1'$"):
        run(source, model=model)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "ACCELERATE_USE_FSDP",
            "true",
            r"^train: the launcher must .*, got ACCELERATE_USE_FSDP: its parts of weights cannot",
        ),
        (
            "ACCELERATE_USE_DEEPSPEED",
            "true",
            r"^train: the launcher must use data parallelism \(DDP\), got ACCELERATE_USE_DEEPSPEED",
        ),
        (
            "ACCELERATE_MIXED_PRECISION",
            "fp16",
            r"^train: mixed_precision must be that of the launcher, 'fp16', got 'no'$",
        ),
    ],
)
def test_what_a_launcher_asks_for_beside_is_refused(source, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        run(source)


def test_a_model_spread_over_processes_is_refused(source, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        model = fully_shard(build(), mesh=mesh)
        message = (
            r"^train: model must hold its weights whole in every process \(no fully_shard\), got "
            r"parts of "
        )
        with pytest.raises(ValueError, match=message):
            run(source, model=model)
    finally:
        distributed.destroy_process_group()


def test_processes_that_do_not_form_a_group_are_refused(source, monkeypatch):
    run(source, steps=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError,
        match=r"^train: the processes of the launcher must form one group, got 2 processes and a "
        r"group of 1$",
    ):
        run(source, steps=1)


def test_accumulation_is_ours_also_under_accelerate_launch(source, monkeypatch):
    plain = run(source, steps=3, accumulate=4)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert same(run(source, steps=3, accumulate=4).model, plain.model)


@pytest.mark.parametrize(
    ("options", "gpu", "message"),
    [
        ({"mixed_precision": "bf16"}, False, "mixed_precision must stay .*, 'no', got 'bf16'$"),
        ({}, True, "whether device is the CPU must stay the same .*, True, got False$"),
    ],
)
def test_what_accelerate_keeps_for_a_process_is_not_taken_for_another(
    source, monkeypatch, options, gpu, message
):
    run(source, steps=1)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    with pytest.raises(ValueError, match="^train: " + message):
        run(source, steps=1, **options)


VR = {"variance_reduction": True}
PAPER = VR | {"centred": False}
BF16 = (
    r"^train: mixed_precision must be 'no' for variance reduction below sigma {} \(its second "
    r"difference is divided by sigma\^2, and the rounding of bf16 with it; 'centred' and 'plain' "
    r"have none\), got sigma_range \(0\.01, 1\.0\)$"
)


@pytest.mark.parametrize(
    ("objective", "least"),
    [
        (VR, 0.035),  # 0.05 of the data's standard deviation
        (PAPER, 0.21),  # 0.3
        ({"variance_reduction": False, "first_order": "vr"}, 0.035),
        ({"variance_reduction": False, "centred": False, "first_order": "vr"}, 0.21),
    ],
)
def test_bf16_is_refused_where_it_would_ruin_variance_reduction(objective, least):
    with pytest.raises(ValueError, match=BF16.format(rf"{least:g}".replace(".", r"\."))):
        training.check_precision(objective, (0.01, 1.0), 0.7, mixed_precision="bf16")
    training.check_precision(objective, (least, 1.0), 0.7, mixed_precision="bf16")
    training.check_precision(objective, (0.01, 1.0), 0.7)
    for plain in (
        {},
        {"variance_reduction": False},
        {"variance_reduction": False, "centred": False},
    ):
        training.check_precision(plain, (0.01, 1.0), 0.7, mixed_precision="bf16")


def test_bf16_matrix_products_of_the_cpu_are_refused(source):
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(
            ValueError,
            match=r"^train: torch\.set_float32_matmul_precision must not be 'medium' for variance ",
        ):
            run(source, objective=VR, sigma_range=(0.01, 1.0))
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("part", ["matmul", "conv"])
def test_bf16_products_of_the_cpu_are_refused_also_by_the_new_settings(part):
    place = getattr(torch.backends.mkldnn, part, None)
    if not hasattr(place, "fp32_precision"):
        pytest.skip("torch before 2.9")
    before = place.fp32_precision
    place.fp32_precision = "bf16"
    try:
        with pytest.raises(
            ValueError,
            match=rf"^train: torch\.backends\.mkldnn\.{part}\.fp32_precision must not be 'bf16' ",
        ):
            training.check_precision(VR, (0.01, 1.0), 1.0)
    finally:
        place.fp32_precision = before


def test_tf32_is_refused_where_it_would_ruin_variance_reduction(monkeypatch):
    monkeypatch.setattr(
        precision, "_tf32", lambda: ["torch.backends.cudnn.allow_tf32"], raising=True
    )
    with pytest.raises(
        ValueError,
        match=r"^train: TF32 must be off \(torch\.backends\.cudnn\.allow_tf32 set to False\) for "
        r"variance reduction below sigma 0\.02 .* the rounding of TF32 with it; .*\), got ",
    ):
        training.check_precision(VR, (0.01, 1.0), 1.0, device="cuda")
    training.check_precision(VR, (0.02, 1.0), 1.0, device="cuda")
    training.check_precision(VR, (0.01, 1.0), 1.0, device="cpu")


def test_the_switches_of_tf32_are_read():
    names = {"torch.backends.cudnn.allow_tf32", "torch.backends.cuda.matmul.allow_tf32"}
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        assert set(_tf32()) == names
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        assert _tf32() == []
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept


@pytest.mark.parametrize(
    ("missing", "extra"),
    [("accelerate", "cli"), ("rich.progress", "cli"), ("tensorboard", "track")],
)
def test_train_without_an_extra_names_it(source, monkeypatch, tmp_path, missing, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        RuntimeError,
        match=rf"^train: {missing} must be installed \(pip install hos_ext\[{extra}\]\), ",
    ):
        run(source, progress=True, tracker="tensorboard", out=tmp_path)


# ----------------------------------------------------------------------------------------- trackers


def _logged(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return events


def test_tensorboard_gets_every_row_once_also_after_a_stop(source, tmp_path, uninterrupted):
    def report(model, step):
        assert isinstance(model, MLP)
        return {"calibration": float(step)}, {"std": np.full((1, 4, 5, 3), 7, np.uint8)}

    options = {"out": tmp_path, "tracker": "tensorboard", "log_every": 5, "save_every": 4}
    run(source, **options)
    for name in ("step-00000012", "step-00000008"):
        (tmp_path / "checkpoints" / name / "state.json").unlink()
    with pytest.warns(UserWarning, match="going back"):
        again = run(source, report=report, resume=True, **options)
    assert again.resumed_from == 4
    events = _logged(tmp_path)
    for name in ("loss", "first", "second", "gradient_norm", "gradient_variance", "validation"):
        rows = events.Scalars(name)
        assert [row.step for row in rows] == [5, 10, 12]
        wanted = [getattr(row, name) for row in uninterrupted.history]
        assert [row.value for row in rows] == pytest.approx(wanted, rel=1e-6)
    assert [row.step for row in events.Scalars("calibration")] == [12]
    image = events.Images("std")[0]
    assert (image.step, image.height, image.width) == (12, 4, 5)


# --------------------------------------------------------------------------------- the loss module


def test_the_module_for_loops_of_ones_own_draws_as_documented(source):
    """`ScoreMatchingLoss` and the engine are two doors to the same objective."""
    loss = ScoreMatchingLoss((0.1, 1.2), **training.OBJECTIVE)
    x = source.scaling.forward(source.test[:8], seed=0)
    u = ops.uniform((8,), seed=0, offset=3, stream=STREAM_TIME, dtype=torch.float64)
    sigma = (0.1 * 12**u).float()
    model = build()
    expected = score_matching_loss(model, x, sigma, **training.OBJECTIVE, seed=0, offset=3)
    assert loss(model, x, step=3).item() == pytest.approx(expected.item(), rel=1e-6)


# ------------------------------------------------------------------ arguments of no such kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resume": "False"}, "train: resume must be True or False, got 'False'"),
        ({"progress": 1}, "train: progress must be True or False, got 1"),
        ({"report": 3}, "train: report must be callable, got int"),
        ({"model": 3}, "train: model must be a Module, got int"),
        (
            {"source": 3},
            (
                "train: data must be a Source, a Tensor, an array, a Dataset or DataLoader of "
                "torch, a data set of Hugging Face or a list of samples (what can be read once "
                "only: in an IterableDataset), got int"
            ),
        ),
        ({"options": {}}, "train: options must be a TrainingOptions, got dict"),
    ],
)
def test_arguments_of_another_kind_are_named(source, change, message):
    given = {"model": MLP((8, 8), rank=1), "source": source, "resume": False, "progress": False}
    given |= {"options": training.TrainingOptions(steps=1), "report": None} | change
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        training.train(given.pop("model"), given.pop("source"), given.pop("options"), **given)


@pytest.mark.parametrize("name", ["variance_reduction", "centred", "scale_free", "detach_score"])
@pytest.mark.parametrize("value", ["False", 0, np.bool_(False), None])
def test_flags_of_the_objective_are_true_or_false(name, value):
    with pytest.raises(TypeError, match=rf"^train: objective\['{name}'\] must be True or False"):
        training.TrainingOptions(steps=1, objective={name: value})


def test_an_objective_and_an_augmentation_that_are_unknown_are_refused():
    with pytest.raises(ValueError, match=r"^train: objective must hold options .*, got nope$"):
        training.TrainingOptions(steps=1, objective={"nope": 1})
    with pytest.raises(TypeError, match=r"^train: objective must be a mapping, got 'x'$"):
        training.TrainingOptions(steps=1, objective="x")
    with pytest.raises(ValueError, match=r"^train: augment must be one of 'none', 'flip'"):
        training.TrainingOptions(steps=1, augment=1)


def test_options_of_numpy_become_plain_numbers():
    options = training.TrainingOptions(steps=np.int64(3), seed=np.uint8(200))
    assert json.dumps(options.deciding())
    assert type(options.steps) is int
    assert type(options.seed) is int


def test_the_objective_by_default_is_one():
    """Of the function, the module and a training."""
    torch.manual_seed(0)
    model, x0 = MLP((2,), 1, width=8), torch.randn(8, 2)
    told = score_matching_loss(model, x0, 0.3, seed=0, **training.OBJECTIVE)
    assert torch.equal(score_matching_loss(model, x0, 0.3, seed=0), told)
    assert torch.equal(ScoreMatchingLoss(0.3, seed=0)(model, x0, step=0), told)
    assert TrainingOptions(steps=1).objective == training.OBJECTIVE
    assert TrainingOptions(steps=1, objective={"gamma": 2.0}).deciding()["objective"] == {
        **training.OBJECTIVE,
        "gamma": 2.0,
    }
