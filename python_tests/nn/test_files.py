"""Models as files: what is saved comes back bitwise, what is no model is refused by name."""

import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch as safetensors
import torch

from hos_ext import storage
from hos_ext.nn import weights
from hos_ext.nn.files import load_model, save_model
from hos_ext.nn.mlp import MLP
from hos_ext.nn.unet import UNet


def mlp(**options):
    options = {"width": 8, "head_width": 8, "depth": 1, "head_depth": 1} | options
    return randomised(MLP((2, 3), 2, **options))


def unet(dims=(2, 5, 6), **options):
    pytest.importorskip("diffusers", reason="UNet needs hos_ext[images]")
    sizes = {"channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    return randomised(UNet(dims, 2, **(sizes | options)))


def randomised(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def exactly(message):
    return f"^{re.escape(message)}$"


def starts(message):
    return f"^{re.escape(message)}"


def same_model(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def rewrite(folder, change, metadata=True):
    """model.safetensors with changed tensors, or without its metadata."""
    path = Path(folder) / "model.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        kept = file.metadata() if metadata is True else metadata
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(safetensors.save(change(state), kept))


# ------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "build",
    [
        mlp,
        lambda: mlp(trunk="shared", activation="silu", constrained=False, sigma_data=0.3),
        lambda: mlp(given_score=True),
        lambda: mlp().double(),
        lambda: mlp().bfloat16(),
        unet,
        lambda: unet(trunk="separate", head_channels=(8, 8)),
        lambda: unet((2, 7), spatial=1, act_fn="gelu", mid_block_scale_factor=2.0),
    ],
)
def test_saved_model_comes_back_bitwise(tmp_path, build):
    model = build().train()
    assert save_model(model, tmp_path / "a" / "b", step=7, data={"name": "x"}) == str(
        tmp_path / "a" / "b"
    )
    state = torch.get_rng_state()
    again, config = load_model(tmp_path / "a" / "b")
    assert torch.equal(torch.get_rng_state(), state)
    same_model(model, again)
    assert type(again) is type(model)
    assert again.config == model.config
    assert not any(module.training for module in again.modules())
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert config["step"] == 7
    assert config["data"] == {"name": "x"}
    assert config["_class_name"] == type(model).__name__
    assert config.items() >= model.config.items()
    if not again.given_score and next(model.parameters()).dtype != torch.bfloat16:
        x = torch.randn(2, *model.dims, dtype=next(model.parameters()).dtype)
        assert torch.equal(again(x, 0.3).scaled_score, model(x, 0.3).scaled_score)


def test_files_are_those_of_the_ecosystem_and_nothing_else(tmp_path):
    save_model(mlp(), tmp_path, step=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["_class_name"], config["dims"], config["step"]) == ("MLP", [2, 3], 3)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["config"]) == config
    assert set(safetensors.load_file(tmp_path / "model.safetensors")) == set(mlp().state_dict())


def test_methods_of_the_models_are_the_same_functions(tmp_path):
    model = mlp()
    assert model.save_pretrained(tmp_path, step=3) == str(tmp_path)
    again = MLP.from_pretrained(tmp_path)
    same_model(model, again)
    assert load_model(tmp_path)[1]["step"] == 3
    assert MLP.from_pretrained(tmp_path, device="meta").c.weight.device.type == "meta"
    message = f"UNet.from_pretrained: folder must hold UNet, got MLP in {tmp_path}"
    with pytest.raises(ValueError, match=exactly(message)):
        UNet.from_pretrained(tmp_path)


def test_weights_that_share_memory_or_are_not_contiguous_are_saved(tmp_path):
    model = mlp(trunk="shared")
    with torch.no_grad():
        wide = torch.randn(8, 50)
        model.score.weight = torch.nn.Parameter(torch.randn(8, 6).mT)  # not contiguous
        model.c.weight = torch.nn.Parameter(wide[:6, 3:11])  # a view of something larger
        model.c.bias = model.score.bias  # one tensor, two names
    save_model(model, tmp_path)
    same_model(model, load_model(tmp_path)[0])
    assert (tmp_path / "model.safetensors").stat().st_size < 4000


def test_loaded_weights_do_not_lie_in_the_file(tmp_path):
    save_model(mlp(), tmp_path)
    model, _ = load_model(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:  # another tool that writes in place
        file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --------------------------------------------------------------------------------- what is refused


def test_models_of_other_kinds_are_not_saved(tmp_path):
    rule = "save_model: model must be one of MLP, UNet, UNet3d, SecondOrderHead (unwrapped), got"
    with pytest.raises(TypeError, match=exactly(f"{rule} Linear")):
        save_model(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(TypeError, match=exactly(f"{rule} AveragedModel")):
        save_model(torch.optim.swa_utils.AveragedModel(mlp()), tmp_path)
    with pytest.raises(TypeError, match=exactly(f"{rule} str")):
        save_model(str(tmp_path), mlp())  # the wrong way round
    rule = "save_model: activation of the model must be given by name to be saved, got"
    with pytest.raises(ValueError, match=starts(f"{rule} <built-in method sin")):
        mlp(activation=torch.sin).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "kind", "message"),
    [
        ({"loss": math.nan}, ValueError, "save_model: loss must be finite, got nan"),
        ({"a": 1, "b": [1, -math.inf]}, ValueError, "save_model: b must be finite, got [1, -inf]"),
        (
            {"rank": 3},
            ValueError,
            "save_model: extra must have names that the model's config has not, got 'rank'",
        ),
        (
            {"_step": 3},
            ValueError,
            "save_model: extra must have names that the model's config has not, got '_step'",
        ),
        (
            {"data": {1, 2}},
            TypeError,
            "save_model: extra must be plain JSON, got: Object of type set is not JSON",
        ),
    ],
)
def test_extra_that_json_cannot_hold_is_refused_before_anything_is_written(
    tmp_path, extra, kind, message
):
    with pytest.raises(kind, match=starts(message)):
        save_model(mlp(), tmp_path, **extra)
    assert list(tmp_path.iterdir()) == []


def test_empty_folders_and_pickles_are_refused_by_name(tmp_path):
    message = f"load_model: folder must hold model.safetensors, got {tmp_path} without it"
    with pytest.raises(ValueError, match=exactly(message)):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=exactly(message.replace(str(tmp_path), "nowhere"))):
        load_model("nowhere")
    torch.save(mlp().state_dict(), tmp_path / "pytorch_model.bin")
    message = (
        "load_model: folder must hold model.safetensors (a pickle can run code and is not read), "
        f"got {tmp_path} with pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        load_model(tmp_path)


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_truncated_files_are_refused(tmp_path, left):
    save_model(mlp(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    message = f"load_model: folder must hold a whole model.safetensors, got {path}: "
    with pytest.raises(ValueError, match=starts(message)):
        load_model(tmp_path)


def test_foreign_bytes_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 4)
    message = f"load_model: folder must hold a whole model.safetensors, got {path}: "
    with pytest.raises(ValueError, match=starts(message)):
        load_model(tmp_path)


def test_weights_that_are_not_the_models_are_refused(tmp_path):
    model = mlp()
    path = tmp_path / "model.safetensors"
    for change, reason in (
        (
            lambda s: {k: v for k, v in s.items() if k != "c.bias"},
            'Missing key(s) in state_dict: "c',
        ),
        (lambda s: s | {"other": s["c.bias"].clone()}, 'Unexpected key(s) in state_dict: "other"'),
        (lambda s: s | {"c.bias": torch.zeros(5)}, "size mismatch for c.bias: copying a param"),
    ):
        save_model(model, tmp_path)
        rewrite(tmp_path, change)
        message = (
            f"load_model: folder must hold the weights of its model, got {path}: Error(s) in "
            f"loading state_dict for MLP: {reason}"
        )
        with pytest.raises(ValueError, match=starts(message)):
            load_model(tmp_path)
    for change, got in (
        (lambda s: s | {"c.bias": s["c.bias"].double()}, "torch.float32, torch.float64"),
        (lambda s: {k: v.int() for k, v in s.items()}, "torch.int32"),
        (lambda s: {}, ""),
    ):
        save_model(model, tmp_path)
        rewrite(tmp_path, change)
        message = f"load_model: folder must hold weights of one floating dtype, got {got} in {path}"
        with pytest.raises(ValueError, match=exactly(message)):
            load_model(tmp_path)


def edited(folder, **changes):
    """The metadata with changes to its config."""
    config = json.loads((Path(folder) / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    rewrite(folder, lambda state: state, {"config": json.dumps(config)})
    (Path(folder) / "config.json").write_text(json.dumps(config))


def test_configs_of_other_models_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(mlp(), tmp_path)
    edited(tmp_path, _class_name="UNet2DModel")
    message = (
        "load_model: folder must hold a model of class MLP, UNet, UNet3d, SecondOrderHead, got "
        f"'UNet2DModel' in {path}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        load_model(tmp_path)
    for changes, reason in (
        ({"depth": 0}, "MLP: depth must be at least 1, got 0"),
        ({"dims": ...}, "MLP.__init__() missing 1 required positional argument: 'dims'"),
        ({"heads": 3}, "MLP.__init__() got an unexpected keyword argument 'heads'"),
    ):
        save_model(mlp(), tmp_path)
        edited(tmp_path, **changes)
        message = f"load_model: folder must hold the arguments of MLP, got {path}: {reason}"
        with pytest.raises(ValueError, match=exactly(message)):
            load_model(tmp_path)
    rewrite(tmp_path, lambda state: state, {"config": "{ no json"})
    message = (
        "load_model: folder must hold a config of JSON in its model.safetensors, got '{ no json' "
        f"in {path}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        load_model(tmp_path)


def test_extras_named_like_arguments_of_other_classes_do_not_reach_the_model(tmp_path):
    save_model(mlp(), tmp_path, channels=[1], spatial=7)
    model, config = load_model(tmp_path)
    assert config["spatial"] == 7
    assert "spatial" not in model.config


# ------------------------------------------------------------------------- config.json beside them


def test_weights_without_metadata_take_config_json(tmp_path):
    model = mlp()
    save_model(model, tmp_path, step=3)
    for kept in (None, {"format": "pt"}):
        rewrite(tmp_path, lambda state: state, kept)
        again, config = load_model(tmp_path)
        same_model(model, again)
        assert config["step"] == 3
    config_path, path = tmp_path / "config.json", tmp_path / "model.safetensors"
    config_path.write_text("[1, 2]")
    message = f"load_model: folder must hold a config.json of JSON, got {config_path}"
    with pytest.raises(ValueError, match=exactly(message)):
        load_model(tmp_path)
    config_path.unlink()
    message = (
        f"load_model: folder must hold config.json (no config in {path}), got {tmp_path} without it"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        load_model(tmp_path)


def test_weights_alone_are_a_whole_model(tmp_path):
    model = mlp()
    save_model(model, tmp_path, step=3)
    (tmp_path / "config.json").unlink()
    again, config = load_model(tmp_path)
    same_model(model, again)
    assert config["step"] == 3


class Killed(BaseException):
    """What no handler catches: the process is gone."""


def test_a_run_killed_between_the_renames_loads_its_new_model_in_silence(tmp_path, monkeypatch):
    old, new = mlp(), mlp()
    with torch.no_grad():
        new.c.bias.add_(1.0)
    save_model(old, tmp_path, step=1)
    past = (tmp_path / "config.json").stat().st_mtime_ns - 10**9
    os.utime(tmp_path / "config.json", ns=(past, past))

    def kill(path, content):
        if path.name == "config.json":
            raise Killed
        storage.write_whole(path, content)

    monkeypatch.setattr(weights, "write_whole", kill)
    with pytest.raises(Killed):
        save_model(new, tmp_path, step=2)
    again, config = load_model(tmp_path)  # warnings are errors here
    same_model(new, again)
    assert config["step"] == 2
    assert json.loads((tmp_path / "config.json").read_text())["step"] == 1


def test_a_run_killed_before_the_first_rename_loads_its_old_model(tmp_path, monkeypatch):
    old = mlp()
    save_model(old, tmp_path, step=1)

    def kill(self, target):
        raise Killed

    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(Killed):
        save_model(mlp(sigma_data=0.3), tmp_path, step=2)
    again, config = load_model(tmp_path)
    same_model(old, again)
    assert config["step"] == 1


@pytest.mark.parametrize(
    ("content", "age"),
    [
        ({"step": 9}, 1),  # edited after the weights were written
        ({"c_min": 0.5}, -1),  # another model's, whatever its age
        (None, 1),  # no JSON
        (None, -1),
    ],
)
def test_config_json_that_disagrees_is_not_used_and_says_so(tmp_path, content, age):
    save_model(mlp(), tmp_path, step=1)
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text = "{" if content is None else json.dumps(json.loads(path.read_text()) | content)
    path.write_text(text)
    moment = weights.stat().st_mtime_ns + age * 10**9
    os.utime(path, ns=(moment, moment))
    message = f"load_model: {path} is not used: it disagrees with the config in {weights}"
    with pytest.warns(UserWarning, match=exactly(message)) as caught:
        model, config = load_model(tmp_path)
    assert caught[0].filename == __file__
    assert (config["step"], model.c_min) == (1, 1e-3)


def test_missing_safetensors_is_named(tmp_path, monkeypatch):
    save_model(mlp(), tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for where, call in (
        ("save_model", lambda: save_model(mlp(), tmp_path)),
        ("load_model", lambda: load_model(tmp_path)),
    ):
        message = rf"^{where}: safetensors\S* must be installed \(pip install safetensors\), got: "
        with pytest.raises(RuntimeError, match=message):
            call()
