"""The training loop, its checkpoints, and the figures it reports."""

import json
import math
import re
import sys

import pytest
import torch
from torch import nn

from hos_ext import data, evaluation, ops, storage, training
from hos_ext.tweedie import Scores

SETTINGS = {"rank": 2, "width": 16, "depth": 2, "head_width": 8, "sigma_data": 0.7, "c_min": 0.01}


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.load_digits(seed=0)


def _train(digits, seed=0, **options):
    model = training.build_model(SETTINGS, seed=seed)
    options = {"steps": 12, "batch_size": 16} | options
    return model, *training.train(model, digits, seed=seed, **options)


# ----------------------------------------------------------------------------------------- the loop


def test_batch_rows_visits_every_row_once_an_epoch():
    rows = torch.cat([training.batch_rows(30, 8, seed=1, step=step) for step in range(15)])
    epochs = rows.reshape(4, 30)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(30))
    assert not torch.equal(epochs[0], epochs[1])
    assert len(training.batch_rows(5, 12, seed=1, step=3)) == 12


def test_draw_sigma_is_log_uniform():
    sigma = training.draw_sigma(20000, (0.1, 1.2), seed=0)
    place = (sigma.double() / 0.1).log() / math.log(12)
    assert place.min() >= -1e-6
    assert place.max() <= 1 + 1e-6
    assert place.mean().item() == pytest.approx(0.5, abs=0.01)
    assert place.var().item() == pytest.approx(1 / 12, rel=0.03)
    assert not torch.equal(sigma, training.draw_sigma(20000, (0.1, 1.2), seed=0, offset=1))


def test_train_lowers_the_loss_on_digits_it_does_not_see(digits):
    _, fitted, history = _train(digits, steps=60, batch_size=64)
    untrained = training.validation_loss(
        training.build_model(SETTINGS), digits, training.SIGMA_RANGE, seed=0
    )
    assert history[-1].step == 60
    assert history[-1].validation_first < 0.9 * untrained["first"]
    last = training.validation_loss(fitted, digits, training.SIGMA_RANGE, seed=0)
    assert (history[-1].validation, history[-1].validation_first) == (last["loss"], last["first"])


def test_train_repeats_with_its_seed_and_leaves_the_generator_alone(digits):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = _train(digits), _train(digits), _train(digits, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first[1].state_dict().items():
        assert torch.equal(value, second[1].state_dict()[name])
    assert first[2] == second[2]
    assert first[2] != other[2]


def test_train_returns_the_average_of_the_weights(digits):
    model, last, _ = _train(digits, ema_decay=0.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, last.state_dict()[name])
    model, average, _ = _train(digits, ema_decay=0.9)
    gap = sum(
        (value - average.state_dict()[name]).norm() for name, value in model.state_dict().items()
    )
    assert gap > 1e-3


def test_train_shows_loss_rate_and_time_left(digits, capsys):
    _train(digits, steps=3, progress=True)
    shown = capsys.readouterr().out
    assert "3/3" in shown
    assert "loss " in shown
    assert "steps/s" in shown
    assert "left" in shown


def test_train_stops_when_a_term_is_not_finite_and_keeps_the_last_checkpoint(digits, tmp_path):
    row, step = 77, 0
    while row not in training.batch_rows(1257, 16, seed=0, step=step).tolist():
        step += 1
    assert step > 0
    poisoned = digits._replace(train=digits.train.clone())
    poisoned.train[row] = torch.nan

    def save(model, done):
        return training.save_checkpoint(tmp_path, model, {"model": SETTINGS}, step=done)

    with pytest.raises(RuntimeError) as error:
        _train(poisoned, steps=200, save=save, save_every=1)
    assert str(error.value) == (
        f"train: the first-order term must stay finite, got nan at step {step + 1}; "
        f"last good checkpoint: {tmp_path} (step {step})"
    )
    model, settings = training.load_checkpoint(tmp_path)
    assert settings["step"] == step
    assert all(value.isfinite().all() for value in model.state_dict().values())


class _Overflow(nn.Module):
    """Finite values, an infinite gradient in the factor: sqrt at 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, sigma):
        factor = (self.weight.sqrt() + 1).expand(len(x), 64, 1)
        return Scores(-x, torch.ones_like(x) + 0 * self.weight, factor)


def test_train_stops_before_a_gradient_that_is_not_finite_reaches_the_weights(digits):
    model = _Overflow()
    with pytest.raises(
        RuntimeError,
        match=r"^train: the norm of the gradient must stay finite, got "
        r"(inf|nan) at step 1; last good checkpoint: none was written$",
    ):
        training.train(model, digits, steps=3, batch_size=4)
    assert model.weight.item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"^train: steps must be at least 1, got 0$"),
        ({"batch_size": 0}, r"^train: batch_size must be at least 1, got 0$"),
        ({"save_every": -1}, r"^train: save_every must be at least 1, got -1$"),
        (
            {"sigma_range": (0.0, 1.0)},
            r"^train: sigma_range must be positive and increasing, got \(0\.0, 1\.0\)$",
        ),
        (
            {"sigma_range": (0.5, 0.1)},
            r"^train: sigma_range must be positive and increasing, got \(0\.5, 0\.1\)$",
        ),
        *(
            ({name: value}, rf"^train: {name} must be positive and finite, got {value}$")
            for name in ("learning_rate", "max_grad_norm")
            for value in (0, -1.0, math.nan, math.inf)
        ),
        ({"weight_decay": -0.1}, r"^train: weight_decay must be >= 0 and finite, got -0\.1$"),
        ({"weight_decay": math.nan}, r"^train: weight_decay must be >= 0 and finite, got nan$"),
        ({"warm_up": -1}, r"^train: warm_up must be at least 0, got -1$"),
        ({"ema_decay": 1.0}, r"^train: ema_decay must be in \[0, 1\), got 1\.0$"),
    ],
)
def test_train_refuses_arguments_out_of_range(digits, options, message):
    with pytest.raises(ValueError, match=message):
        _train(digits, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, r"^train: steps must be an int, got 2\.5$"),
        ({"warm_up": True}, r"^train: warm_up must be an int, got True$"),
        ({"learning_rate": "a"}, r"^train: learning_rate must be a float, got 'a'$"),
        ({"weight_decay": None}, r"^train: weight_decay must be a float, got None$"),
    ],
)
def test_train_refuses_arguments_of_another_kind(digits, options, message):
    with pytest.raises(TypeError, match=message):
        _train(digits, **options)


def test_train_takes_batches_of_one_digit(digits):
    assert len(_train(digits, steps=2, batch_size=1)[2]) == 2


def test_train_saves_every_so_many_steps_and_at_the_end_but_not_before_the_work(digits):
    steps = []

    def save(model, step):
        steps.append(step)
        return "here"

    _train(digits, steps=5, save=save, save_every=2)
    assert steps == [2, 4, 5]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "accelerate",
            r"^train: accelerate must be installed \(pip install hos_ext\[app\]\), got: ",
        ),
        (
            "rich.progress",
            r"^train: rich\.progress must be installed \(pip install hos_ext\[app\]\), got: ",
        ),
    ],
)
def test_train_without_an_extra_names_it(digits, monkeypatch, missing, message):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RuntimeError, match=message):
        _train(digits, progress=True)


# -------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(tmp_path):
    model = training.build_model(SETTINGS, seed=3)
    training.save_checkpoint(
        tmp_path, model, {"model": SETTINGS, "seed": 3}, step=7, recalibration=0.1
    )
    return tmp_path, model


def test_checkpoint_gives_back_the_model_and_its_settings(saved):
    folder, model = saved
    loaded, settings = training.load_checkpoint(folder)
    assert not loaded.training
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (settings["seed"], settings["step"], settings["recalibration"]) == (3, 7, 0.1)
    x = torch.randn(5, 8, 8)
    for ours, theirs in zip(model(x, 0.3)[:3], loaded(x, 0.3)[:3], strict=True):
        assert torch.equal(ours, theirs)


def test_config_is_a_copy_of_what_the_weights_carry(saved):
    folder, _ = saved
    settings = training.load_checkpoint(folder)[1]
    assert json.loads((folder / "config.json").read_text()) == settings
    for text in ('{"seed": 4}', "{"):  # a run that was killed between the two files, or an edit
        (folder / "config.json").write_text(text)
        assert training.load_checkpoint(folder)[1] == settings
    (folder / "config.json").unlink()
    assert training.load_checkpoint(folder)[1] == settings


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_run_killed_between_renames_leaves_a_checkpoint_that_loads(saved, monkeypatch, renames):
    folder, _ = saved
    replace, done = training.Path.replace, []

    def kill(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return replace(path, target)

    other = SETTINGS | {"width": 8}
    with monkeypatch.context() as patch:
        patch.setattr(training.Path, "replace", kill)
        try:
            training.save_checkpoint(
                folder, training.build_model(other), {"model": other, "seed": 4}, step=9
            )
        except KeyboardInterrupt:
            assert renames < 2
    model, settings = training.load_checkpoint(folder)
    expected = (7, 3, 16) if renames == 0 else (9, 4, 8)
    assert (settings["step"], settings["seed"], model.score.in_features) == expected


def test_check_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    storage.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists"):
        storage.check_writable(tmp_path / "file")


def test_load_checkpoint_refuses_a_missing_file(saved):
    folder, _ = saved
    (folder / "model.safetensors").unlink()
    message = f"load_checkpoint: folder must hold model.safetensors, got {folder} without it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        training.load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_load_checkpoint_refuses_truncated_weights(saved, keep):
    path = saved[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError,
        match=r"^load_checkpoint: folder must hold a whole "
        r"model\.safetensors, got .*model\.safetensors: ",
    ):
        training.load_checkpoint(saved[0])


def test_load_checkpoint_refuses_weights_of_another_model(saved):
    folder, _ = saved
    training.save_checkpoint(
        folder, training.build_model(SETTINGS | {"width": 8}), {"model": SETTINGS}, step=1
    )
    with pytest.raises(
        ValueError,
        match=r"^load_checkpoint: folder must hold the weights of its "
        r"model, got .*size mismatch",
    ):
        training.load_checkpoint(folder)


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        (None, "None"),
        ({"config": "{"}, "None"),
        ({"config": "[1]"}, "None"),
        ({"config": '{"format": "other"}'}, "'other'"),
    ],
)
def test_load_checkpoint_refuses_weights_of_another_program(saved, metadata, found):
    from safetensors.torch import save_file

    path = saved[0] / "model.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata)
    message = (
        "load_checkpoint: folder must hold a model.safetensors of format 'hos_ext digits model 1', "
        f"got {found} in {path}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        training.load_checkpoint(saved[0])


def test_checkpoints_without_safetensors_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    cure = r"must be installed \(pip install hos_ext\[app\]\), got: "
    with pytest.raises(RuntimeError, match=f"^load_checkpoint: safetensors {cure}"):
        training.load_checkpoint(tmp_path)
    with pytest.raises(RuntimeError, match=rf"^save_checkpoint: safetensors\.torch {cure}"):
        training.save_checkpoint(tmp_path, nn.Linear(1, 1), {}, step=0)


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    storage.write_whole(path, b"old")

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        storage.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


# --------------------------------------------------------------------------------------- evaluation


def _gaussian(x, sigma):
    """Scaled scores of N(0, v I) data with v = 0.3: sigma s1 and c = v / (v + sigma^2)."""
    level = (
        torch.as_tensor(sigma).reshape(-1, *[1] * (x.dim() - 1))
        if torch.is_tensor(sigma)
        else sigma
    )
    total = 0.3 + level**2
    return Scores(-level * x / total, torch.ones_like(x) * 0.3 / total)


def test_denoise_adds_noise_of_the_level_and_gives_the_posterior(digits):
    result = evaluation.denoise(_gaussian, digits.test, 0.5, seed=0)
    assert torch.equal(data.to_grey(result.clean), digits.test)
    noise = (result.noisy - result.clean) / 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(result.posterior.mean, result.noisy * 0.3 / 0.55)
    errors = evaluation.denoising_errors(result)
    assert errors["sigma"] == 0.5
    assert errors["mse_noisy"] == pytest.approx(0.25, rel=0.03)
    expected = (result.clean - result.noisy * 0.3 / 0.55).square().mean().item()
    assert errors["mse_denoised"] == pytest.approx(expected)


def test_calibration_figures_agree_with_dense_algebra(digits):
    model = training.build_model(SETTINGS, seed=1)
    result = evaluation.denoise(model, digits.test[:20], 0.4, seed=0)
    figures = evaluation.calibration_figures(result, 1.7)
    error = (result.clean - result.posterior.mean).flatten(1).double()
    dense = result.posterior.covariance.dense().double()
    eye = torch.eye(64, dtype=torch.float64)

    def mahalanobis(scale, tau):
        inverse = torch.linalg.inv(scale * dense + tau**2 * eye)
        expected = error.unsqueeze(2) * error.unsqueeze(1) + tau**2 * eye
        return (inverse * expected).sum((1, 2)).mean().item() / 64

    assert figures["mahalanobis"] == pytest.approx(mahalanobis(1.0, 0.0), rel=1e-4)
    assert figures["predictive"] == pytest.approx(mahalanobis(1.0, 0.2), rel=1e-4)
    assert figures["predictive_recalibrated"] == pytest.approx(mahalanobis(1.7, 0.2), rel=1e-4)
    trace = dense.diagonal(0, 1, 2).sum(1).mean()
    expected = (error.square().sum(1).mean() / trace).item()
    assert figures["trace_ratio"] == pytest.approx(expected, rel=1e-4)
    assert figures["mahalanobis_recalibrated"] == pytest.approx(mahalanobis(1.7, 0.0), rel=1e-4)
    assert figures["trace_ratio_recalibrated"] == pytest.approx(expected / 1.7, rel=1e-4)
    assert (figures["sigma"], figures["n"]) == (0.4, 20)


def test_recalibrate_pools_the_noise_levels_in_units_of_sigma(digits):
    c = torch.linspace(0.1, 2.0, 8).expand(8, 8)

    def sure_of_white(x, sigma):
        """Posterior mean 0 and covariance sigma^2 diag(c) whatever x is."""
        return Scores(-x / sigma.view(-1, 1, 1), c.expand_as(x))

    factor = evaluation.recalibrate(sure_of_white, digits.validation, (0.5, 1.0), seed=2)
    clean = data.dequantise(digits.validation, seed=2, offset=1)
    sigma = training.draw_sigma(len(clean), (0.5, 1.0), seed=2, offset=1)
    residual = clean / sigma.view(-1, 1, 1)
    predictive = ((residual.square() + 0.25) / (factor * c + 0.25)).mean()
    assert predictive.item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("method", ["langevin", "ozaki"])
def test_run_chains_samples_the_noisy_density(method):
    init = 0.5 * ops.normal((64, 8, 8), seed=1)
    draws, row = evaluation.run_chains(
        _gaussian, init, 0.5, method=method, step_size=0.1, n_steps=60, burn_in=20, seed=0
    )
    assert draws.shape == (64, 60, 8, 8)
    # Langevin's own bias, math of `sample`: variance times 1 / (1 - h / (2 v)), v = 0.55.
    expected = 0.55 / (1 - 0.1 / 1.1) if method == "langevin" else 0.55
    assert draws.var().item() == pytest.approx(expected, rel=0.03)
    assert list(row) == ["method", "step_size", "min_ess", "us_per_step"]
    assert (row["method"], row["step_size"]) == (method, 0.1)
    assert 0 < row["min_ess"] < 64 * 60
    assert row["us_per_step"] > 0


def test_run_chains_says_when_chains_diverge():
    init = torch.ones(4, 8, 8)
    with pytest.raises(
        RuntimeError,
        match=r"^run_chains: step_size must keep the chains finite, got "
        r"50 with which 4 of 4 langevin chains diverged$",
    ):
        evaluation.run_chains(
            _gaussian, init, 0.5, method="langevin", step_size=50, n_steps=40, burn_in=0, seed=0
        )
