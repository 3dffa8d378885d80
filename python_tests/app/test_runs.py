"""Options and run folders: defaults, config files, what is refused, exact resume, replacement."""

import dataclasses
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hos_ext.app import cli, options, runs, training
from hos_ext.app.options import completing
from hos_ext.app.runs import facts, work
from hos_ext.app.training import batches
from hos_ext.nn.mlp import MLP
from hos_ext.schedules import draw_sigma

SMALL = {
    "data": "digits",
    "steps": 6,
    "width": 8,
    "depth": 2,
    "head_width": 8,
    "rank": 1,
    "batch_size": 8,
    "save_every": 2,
    "tracker": "none",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    runs.fit(runs.prepare(SMALL, out))
    return out


def _images(tmp_path, n=12):
    rng = np.random.default_rng(0)
    path = tmp_path / "images.npy"
    np.save(path, rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8))
    return f"npy:{path}"


def _same_model(one, other):
    """Bit for bit; safetensors writes the entries of its header in an order of its own."""
    files = [load_file(folder / "model" / "model.safetensors") for folder in (one, other)]
    configs = [(folder / "model" / "config.json").read_bytes() for folder in (one, other)]
    assert configs[0] == configs[1]
    assert files[0].keys() == files[1].keys()
    return all(torch.equal(value, files[1][name]) for name, value in files[0].items())


# ----------------------------------------------------------------------------------------- options


def test_options_of_every_kind_are_read_as_their_kind():
    given = {"learning-rate": "1e-3", "sigma": "0.1,1", "channels": 16, "steps": 5, "free": True}
    assert options.read_options(given) == {
        "learning_rate": 0.001,
        "sigma": [0.1, 1],
        "channels": [16],
        "steps": 5,
        "free": True,
    }
    assert options.read_options({"width": None, "out": "x"}) == {"width": None, "out": "x"}


def test_the_options_of_a_training_are_described_once():
    """A run's table has the engine's kinds, words and defaults, where it does not say otherwise."""
    engine = {each.name: each for each in dataclasses.fields(training.TrainingOptions)}
    of_a_run_alone = {"sigma_range", "objective", "log_every"}
    assert engine.keys() - options.OPTIONS.keys() == of_a_run_alone - {"objective"}
    other_defaults = {"steps": 4000, "tracker": "tensorboard", "condition_dropout": None}
    for name in engine.keys() - of_a_run_alone:
        row = options.OPTIONS[name]
        assert row.kind.__name__ == engine[name].type
        assert row.help == engine[name].metadata["help"]
        assert f"        {name}: {row.help}" in training.TrainingOptions.__doc__
        if row.by:
            assert row.default is None
        else:
            assert row.default == other_defaults.get(name, engine[name].default)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rank", "8; 16 for digits"),
        ("learning_rate", "0.001; 0.002 for images, 0.002 for volumes, 0.004 for digits"),
        ("sigma_data", "measured; 0.7 for digits"),
        ("channels", "16,32,64 for unet-small, 64,128,128,256 for unet"),
        ("validation", "5 %, at most 1000"),
        ("steps", ""),
    ],
)
def test_defaults_that_depend_on_data_or_model_are_put_into_words(name, words):
    assert options.OPTIONS[name].words == words


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (
            {"lerning_rate": 1},
            ValueError,
            "options: name must be known (the nearest is learning_rate), got lerning_rate",
        ),
        ({"steps": 1e3}, TypeError, "options: steps must be of kind int, got 1000.0"),
        ({"steps": True}, TypeError, "options: steps must be of kind int, got True"),
        ({"steps": None}, TypeError, "options: steps must be of kind int, got None"),
        ({"free": 1}, TypeError, "options: free must be of kind bool, got 1"),
        ({"gamma": [1]}, TypeError, "options: gamma must be made of numbers, got [1]"),
        ({"gamma": "x"}, ValueError, "options: gamma must be made of numbers, got 'x'"),
        ({"sigma": "0.1;1"}, ValueError, "options: sigma must be made of numbers, got '0.1;1'"),
        (
            {"objective": "best"},
            ValueError,
            "train: objective must be one of 'centred', 'vr', 'plain', got 'best'",
        ),
        (
            {"model": "gan"},
            ValueError,
            "train: model must be one of 'mlp', 'unet-small', 'unet', got 'gan'",
        ),
        (
            {"sigma": "1,0.1"},
            ValueError,
            "train: sigma must be one level or LOW,HIGH with 0 < LOW <= HIGH, got [1, 0.1]",
        ),
        (
            {"diagonal": True, "rank": 3},
            ValueError,
            "train: rank must be 0 with diagonal, got 3",
        ),
        (
            {"channels": "8,8"},
            ValueError,
            "train: channels must be left out with model mlp, got [8, 8]",
        ),
        (
            {"model": "unet", "width": 8},
            ValueError,
            "train: width must be left out with model unet, got 8",
        ),
        (
            {"augment": "blur"},
            ValueError,
            "train: augment must be one of 'none', 'flip', 'distort', got 'blur'",
        ),
        (
            {"data": "density:gaussian2d", "augment": "flip"},
            ValueError,
            (
                "augment: raw must hold images, (B, height, width) or (B, C, height, width), "
                "for flip, got (1, 2)"
            ),
        ),
        ({"accumulate": 3}, ValueError, "train: accumulate must divide batch_size 128, got 3"),
    ],
)
def test_wrong_options_are_named(given, kind, message):
    with pytest.raises(kind) as caught:
        options.complete(given)
    assert str(caught.value) == message


def test_precision_that_ruins_variance_reduction_is_refused_before_the_work(tmp_path):
    given = SMALL | {"objective": "vr", "mixed_precision": "bf16", "sigma": "0.01,1"}
    with pytest.raises(ValueError, match="mixed_precision must be 'no' for variance reduction"):
        runs.prepare(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_digits_have_the_model_of_the_demonstration():
    full, source = options.complete({})
    model = options.build_model(full, source.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = MLP(
            (8, 8),
            16,
            width=384,
            depth=3,
            head_width=256,
            head_depth=2,
            activation="silu",
            sigma_data=0.7,
            c_min=0.008,
        )
    assert model.config == expected.config
    for value, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    chosen = options.training_options(full)
    assert chosen.objective == {"variance_reduction": False, "centred": True, "gamma": 1.0}
    assert chosen.augment == "distort"
    assert chosen.learning_rate == 4e-3
    assert chosen.weight_decay == 0.1
    assert chosen.sigma_range == (0.1, 1.2)


def test_defaults_follow_the_data(tmp_path):
    images, source = options.complete({"data": _images(tmp_path)})
    assert (images["model"], images["rank"], images["trunk"]) == ("unet-small", 8, "shared")
    assert images["channels"] == [16, 32, 64]
    assert images["augment"] == "none"
    assert images["width"] is None
    assert images["sigma_data"] == pytest.approx(source.std, rel=1e-5)
    other, _ = options.complete({"data": "digits", "model": "unet-small", "diagonal": True})
    assert (other["width"], other["rank"], other["augment"]) == (None, 0, "distort")
    assert options.training_options(other).objective["diagonal"] is True
    vectors, _ = options.complete({"data": "density:gaussian2d", "objective": "vr"})
    assert (vectors["model"], vectors["width"]) == ("mlp", 256)
    assert options.training_options(vectors).objective == {
        "variance_reduction": True,
        "centred": False,
        "gamma": 2.0,
    }
    assert (images["batch_size"], vectors["batch_size"]) == (32, 128)
    assert images["gamma"] == source.validation[0].numel()


def test_tf32_is_off_unless_it_is_asked_for(tmp_path):
    for wanted in (True, False):
        runs.prepare({"data": "digits", "tf32": wanted}, tmp_path)
        assert torch.backends.cudnn.allow_tf32 is wanted
        assert torch.backends.cuda.matmul.allow_tf32 is wanted


def test_model_options_reach_the_network(tmp_path):
    given = {"data": _images(tmp_path), "channels": "16,32", "rank": 2, "free": True}
    given |= {"recompute": True, "trunk": "separate"}
    full, source = options.complete(given)
    model = options.build_model(full, source.shape)
    assert model.config["channels"] == [16, 32]
    assert model.config["constrained"] is False
    assert model.config["trunk"] == "separate"
    assert model.rank == 2
    assert model.gradient_checkpointing is True


def test_a_first_order_model_stays_and_its_head_is_trained(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    unet.save_pretrained(tmp_path / "first" / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "first" / "scheduler")
    given = {"data": _images(tmp_path), "channels": "16,16", "rank": 1, "steps": 2}
    given |= {"batch_size": 4, "tracker": "none"}
    given["first_order"] = f"diffusers:{tmp_path / 'first'}"
    job = runs.prepare(given, tmp_path / "run")
    assert job.facts["parameters"] == sum(p.numel() for p in job.model.head.parameters())
    runs.fit(job)
    model, _ = runs.load_run(tmp_path / "run")
    before = unet.state_dict()
    for name, value in model.score_model.net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="first_order must be diffusers:FOLDER, got azula:x"):
        runs.prepare(given | {"first_order": "azula:x"}, tmp_path / "other")
    with pytest.raises(ValueError, match="noise levels of the first-order model, got"):
        runs.prepare(given | {"sigma": "0.1,1e6"}, tmp_path / "other")


CONFIGS = {
    "a.yaml": "steps: 7\nlearning-rate: 1e-3\nsigma: [0.2, 1]\nout: there\n",
    "a.yml": "steps: 7\nlearning_rate: 0.001\nsigma: 0.2,1\nout: there\n",
    "a.toml": 'steps = 7\nlearning_rate = 1e-3\nsigma = [0.2, 1]\nout = "there"\n',
    "a.json": '{"steps": 7, "learning_rate": 0.001, "sigma": [0.2, 1], "out": "there"}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files_of_every_kind_say_the_same(tmp_path, name):
    (tmp_path / name).write_text(CONFIGS[name])
    wanted = {"steps": 7, "learning_rate": 0.001, "sigma": [0.2, 1], "out": "there"}
    assert options.read_config(tmp_path / name) == wanted


def test_a_run_is_a_config_of_itself(whole):
    given = options.read_config(whole / "run.json")
    assert options.complete(given)[0] == json.loads((whole / "run.json").read_text())["options"]
    assert set(given) == set(options.OPTIONS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.ini", "", "read_config: path must end in .json, .toml, .yaml, .yml, got PATH"),
        ("a.yaml", "steps: [", "read_config: PATH must be whole yaml, got: "),
        ("a.toml", "steps = ", "read_config: PATH must be whole toml, got: "),
        ("a.json", "{", "read_config: PATH must be whole json, got: "),
        ("a.yaml", "- 1", "read_config: PATH must hold options by name, got [1]"),
        ("a.yaml", "stepz: 1", "options: name must be known (the nearest is steps), got stepz"),
    ],
)
def test_config_files_that_will_not_do_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=": ") as caught:
        options.read_config(tmp_path / name)
    assert str(caught.value).startswith(message.replace("PATH", str(tmp_path / name)))


# ------------------------------------------------------------------------------------------ folders


def test_a_finished_run_has_all_its_parts_and_facts(whole):
    assert {path.name for path in whole.iterdir()} == set(runs.PARTS) - {"logs"}
    stored = runs.read_run(whole)
    assert stored["options"] | SMALL == stored["options"]
    assert stored["data"]["n_train"] == 1257
    assert stored["data"]["scaling"] == {"levels": 17, "mean": 0.0, "std": 1.0}
    assert set(stored["versions"]) == {"hos_ext", "torch", "python"}
    model, facts = runs.load_run(whole)
    assert (facts["step"], facts["options"]) == (6, stored["options"])
    assert facts["recalibration"] > 0
    assert stored["parameters"] == sum(p.numel() for p in model.parameters())
    assert not model.training


def test_a_stopped_run_resumes_to_the_same_model(whole, tmp_path, monkeypatch):
    draw = draw_sigma

    def stop(n, sigma_range, *, seed, offset=0, first=0):
        if offset == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(n, sigma_range, seed=seed, offset=offset, first=first)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "draw_sigma", stop)
        with pytest.raises(training.Stopped):
            runs.fit(runs.prepare(SMALL, tmp_path / "a"))
    assert runs.info(tmp_path / "a")["state"] == "not finished"
    assert not (tmp_path / "a" / "model").exists()
    runs.fit(runs.prepare(SMALL, tmp_path / "a", resume=True))
    assert _same_model(tmp_path / "a", whole)
    before, after = (json.loads((f / "metrics.json").read_text()) for f in (whole, tmp_path / "a"))
    assert after["history"] == before["history"]


def test_a_killed_run_resumes_behind_a_damaged_checkpoint(whole, tmp_path, monkeypatch):
    draw = draw_sigma

    def kill(n, sigma_range, *, seed, offset=0, first=0):
        if offset == 5:
            raise SystemExit
        return draw(n, sigma_range, seed=seed, offset=offset, first=first)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "draw_sigma", kill)
        with pytest.raises(SystemExit):
            runs.fit(runs.prepare(SMALL, tmp_path))
    newest = tmp_path / "checkpoints" / "step-00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    checkpoints = runs.info(tmp_path)["checkpoints"]
    assert checkpoints == {
        "step-00000002": "whole",
        "step-00000004": "model.safetensors is not what was written",
    }
    with pytest.warns(UserWarning, match="step-00000004 is damaged"):
        runs.fit(runs.prepare(SMALL, tmp_path, resume=True))
    assert _same_model(tmp_path, whole)


def test_a_run_is_not_overwritten_and_names_what_differs(whole, monkeypatch):
    with pytest.raises(ValueError, match=": ") as caught:
        runs.prepare(SMALL, whole)
    assert str(caught.value) == (
        f"train: out must hold no run (resume it by `hos-ext resume {whole}` or --continue, "
        f"replace it by --force), got {whole} with run.json"
    )
    with pytest.raises(ValueError, match=": ") as caught:
        runs.prepare(SMALL | {"steps": 8, "rank": 2}, whole, resume=True)
    assert str(caught.value) == (
        "run: options must be those that the run was started with, got rank (1 there, 2 now), "
        "steps (6 there, 8 now)"
    )
    for room in (work, facts):
        monkeypatch.setattr(room, "describe", lambda source: {"n_train": 3})
    with pytest.raises(ValueError, match=r"run: data must be those .* n_train \(1257 there, 3 now"):
        runs.prepare(SMALL, whole, resume=True)
    with pytest.raises(ValueError, match="run: data must be those"):
        runs.open_data(runs.read_run(whole))


def test_what_data_do_not_decide_is_refused_before_they_are_opened(whole, tmp_path, monkeypatch):
    def opened(*_, **__):
        raise AssertionError("the data were opened")

    monkeypatch.setattr(completing, "open_chosen_source", opened)
    with pytest.raises(ValueError, match="train: out must hold no run"):
        runs.prepare(SMALL, whole)
    with pytest.raises(ValueError, match="train: steps must be at least 1, got 0"):
        runs.prepare(SMALL | {"steps": 0}, tmp_path / "out")
    with pytest.raises(ValueError, match=r"train: tracker must be one of 'none', .* got 'tape'"):
        runs.prepare(SMALL | {"tracker": "tape"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tracker_without_its_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="train: wandb must be installed for tracker 'wandb', "):
        runs.prepare(SMALL | {"tracker": "wandb"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_may_differ_by_rounding():
    assert facts.alike({"a": [1], "b": {"std": 0.7}}, {"a": [1], "b": {"std": 0.7 * (1 + 1e-9)}})
    assert not facts.alike({"std": 0.7}, {"std": 0.70001})
    assert not facts.alike({"std": 0.7}, {"std": 0.7, "mean": 0.0})
    assert not facts.alike({"rank": 1}, {"rank": 2})


def test_only_a_constant_learning_rate_takes_more_steps(tmp_path):
    given = SMALL | {"decay": "constant", "steps": 2}
    runs.fit(runs.prepare(given, tmp_path))
    assert runs.finished(tmp_path)
    job = runs.prepare(given | {"steps": 4}, tmp_path, resume=True)
    assert runs.finished(tmp_path)
    runs.fit(job)
    assert runs.read_run(tmp_path)["options"]["steps"] == 4
    assert runs.load_run(tmp_path)[1]["step"] == 4
    metrics = json.loads((tmp_path / "metrics.json").read_text())["train"]
    # Of this process: two of the four steps were made before.
    assert metrics["steps_per_second"] * metrics["seconds"] == pytest.approx(2)
    assert runs.finished(tmp_path)


def test_a_replaced_run_comes_back_if_the_new_one_fails_before_its_first_checkpoint(
    whole, tmp_path, monkeypatch
):
    runs.fit(runs.prepare(SMALL | {"steps": 2}, tmp_path))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    diverging = SMALL | {"learning_rate": 1e38, "save_every": 500}
    with pytest.raises(training.NotFinite):
        runs.fit(runs.prepare(diverging, tmp_path, force=True))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    runs.fit(runs.prepare(SMALL, tmp_path, force=True))
    assert _same_model(tmp_path, whole)
    assert not (tmp_path / ".replaced").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run: folder must hold run.json, got {} without it"),
        ("{", "run: folder must hold a whole run.json, got {}/run.json: "),
        ('{"a": 1}', "run: run.json must be of format 'hos_ext run 1', got None in {}/run.json"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=": ") as caught:
        runs.read_run(tmp_path)
    assert str(caught.value).startswith(message.format(tmp_path, tmp_path))


def test_a_run_goes_on_with_another_timeout_and_from_before_there_was_one(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert runs.prepare(SMALL | {"timeout": 9}, out, resume=True).options["timeout"] == 9
    content = runs.read_run(out)
    del content["options"]["timeout"]
    runs.write_json(out / "run.json", content)
    assert runs.prepare(SMALL, out, resume=True).options["timeout"] == 600


def test_a_launch_knows_the_run_that_it_has_begun(tmp_path, monkeypatch):
    assert not runs.begun_by_launch(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default
    runs.write_json(tmp_path / "run.json", runs.prepare(SMALL, tmp_path).facts)
    assert not runs.begun_by_launch(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    runs.write_json(tmp_path / "run.json", runs.prepare(SMALL, tmp_path, resume=True).facts)
    assert runs.begun_by_launch(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert not runs.begun_by_launch(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert runs.begun_by_launch(tmp_path)


def test_load_run_names_what_is_missing(whole, tmp_path):
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    with pytest.raises(ValueError, match=": ") as caught:
        runs.load_run(tmp_path)
    assert str(caught.value) == (
        f"load_run: folder must hold a finished run, got {tmp_path} without model (go on with it "
        f"by hos-ext resume {tmp_path})"
    )
    MLP((2,), 0).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="folder must hold the model of a run, got"):
        runs.load_run(tmp_path / "bare")


def test_info_of_a_run_and_of_its_model_alone(whole):
    content = runs.info(whole)
    assert content["state"] == "finished"
    assert content["checkpoints"] == dict.fromkeys(
        ("step-00000002", "step-00000004", "step-00000006"), "whole"
    )
    assert content["figures"]["steps"] == 6
    bare = runs.info(whole / "model")
    assert (bare["state"], bare["step"]) == ("a model", 6)
    assert bare["options"] == content["options"]


def test_the_tracker_gets_calibration_and_a_picture(whole):
    full, source = options.complete(SMALL)
    model, _ = runs.load_run(whole)
    scalars, images = work.tracked(source, full)(model, 1)
    assert set(scalars) == {"mahalanobis", "trace_ratio", "predictive"}
    assert images["uncertainty"].dtype == np.uint8
    assert images["uncertainty"].shape[0] == 1
    assert images["uncertainty"].shape[-1] == 3


def test_data_that_moved_are_named_and_must_be_the_same(tmp_path, capsys):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (80, 1, 6, 6)).astype(np.uint8)
    np.save(tmp_path / "a.npy", array)
    run = tmp_path / "run"
    options = ["--steps=1", "--model=mlp", "--rank=1", "--width=8", "--head-width=8"]
    options += ["--tracker=none", "--out", str(run)]
    assert cli.run(["train", "--data", f"npy:{tmp_path / 'a.npy'}", *options]) == 0
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    np.save(tmp_path / "other.npy", array[:70])
    commands = {
        "denoise": ["--sigma=0.4", "--count=2"],
        "evaluate": ["--sigma=0.4"],
        "chains": ["--sigma=0.4", "--chains=2", "--steps=8", "--burn-in=0"],
    }
    for command, more in commands.items():
        words = [command, str(run), *more, "--out", str(tmp_path / command)]
        capsys.readouterr()
        assert cli.run(words) == 2
        assert str(tmp_path / "a.npy") in capsys.readouterr().err
        assert cli.run([*words, "--data", f"npy:{tmp_path / 'other.npy'}"]) == 2
        assert "data must be those that the run was started with" in capsys.readouterr().err
        assert cli.run([*words, "--data", f"npy:{tmp_path / 'b.npy'}"]) == 0
