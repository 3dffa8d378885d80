"""Models on the hub, by a server on this machine: what is pushed comes back, and nothing else."""

import re
import sys

import hub_server
import pytest
import torch

import hos_ext
from hos_ext import MLP, SecondOrderHead, UNet, load_model, save_model
from hos_ext.integrations.diffusers import DiffusersScore
from hos_ext.nn import card

constants = pytest.importorskip("huggingface_hub.constants", reason="needs hos_ext[hub]")


@pytest.fixture(scope="module")
def server():
    with hub_server.serving() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    server.commits.clear()
    server.asked.clear()
    server.token = None
    hub_server.point_to(monkeypatch, server, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return server


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def mlp(**options):
    return randomised(MLP((2, 3), 2, width=8, head_width=8, **options))


def unet():
    pytest.importorskip("diffusers")
    sizes = {"channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return randomised(UNet((1, 8, 8), 1, num_classes=3, **sizes))


def head():
    diffusers = pytest.importorskip("diffusers")
    score = randomised(
        diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
    )
    own = MLP((1, 8, 8), 1, width=8, head_width=8, given_score=True)
    return SecondOrderHead(DiffusersScore(score, diffusers.DDPMScheduler()), randomised(own))


@pytest.mark.parametrize("build", [mlp, unet, head])
def test_what_is_pushed_comes_back_bitwise(hub, build):
    torch.manual_seed(0)
    model = build().eval()
    address = model.push_to_hub("me/small", step=7, files={"a.png": b"png"}, card="## Data\nours")
    assert address == f"{hub.url}/me/small/commit/{hub.commits['me/small'][0][0]}"
    loaded, config = load_model("me/small")
    again = type(model).from_pretrained("me/small")
    assert config["step"] == 7
    for other in (loaded, again):
        assert type(other) is type(model)
        assert not other.training
        state = other.state_dict()
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    files = hub.commits["me/small"][0][1]
    assert {"README.md", "a.png", "config.json", "model.safetensors"} <= files.keys()
    assert all(not path.endswith((".bin", ".pt", ".pkl")) for path in files)
    text = files["README.md"].decode()
    assert 'hos_ext.load_model("me/small")' in text
    assert text.startswith("---\nlibrary_name: hos_ext\n")
    assert text.endswith("## Data\nours\n")
    assert ("label, 0 to 2" in text) == (build is unet)


def test_the_example_of_a_card_runs(hub):
    mlp().push_to_hub("me/small")
    text = hub.commits["me/small"][0][1]["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    names = {}
    exec(code, names)
    assert names["result"].mean.shape == (8, 2, 3)


def test_a_folder_that_is_here_comes_before_the_hub(hub, tmp_path):
    model = mlp()
    save_model(model, tmp_path / "me" / "small", where="here")
    mlp().push_to_hub("me/small", where="there")
    hub.asked.clear()
    assert load_model("me/small")[1]["where"] == "here"
    assert hub.asked == []
    with pytest.raises(ValueError, match=r"^load_model: revision must be left out with a folder "):
        load_model("me/small", revision="main")


def test_revisions_are_commits(hub):
    model = mlp()
    model.push_to_hub("me/small", step=1)
    mlp().push_to_hub("me/small", step=2)
    first = hub.commits["me/small"][0][0]
    assert load_model("me/small")[1]["step"] == 2
    assert load_model("me/small", revision=first)[1]["step"] == 1
    assert load_model(f"me/small@{first}")[1]["step"] == 1
    with pytest.raises(ValueError, match=r"^load_model: revision must be one of me/small, got 'x'"):
        load_model("me/small", revision="x")
    with pytest.raises(ValueError, match=r"revision must be left out where an @ is in the name"):
        load_model("me/small@x", revision="y")


def test_safetensors_and_json_alone_are_downloaded(hub):
    mlp().push_to_hub("me/small")
    hub.add("me/small", {"evil.pkl": b"1", "model.bin": b"1", "code.py": b"raise SystemExit"})
    hub.asked.clear()
    load_model("me/small")
    got = {line.rpartition("/")[2] for line in hub.asked if "/resolve/" in line}
    assert got == {"config.json", "model.safetensors"}


@pytest.mark.filterwarnings("ignore:No files matched")
def test_pickles_of_the_hub_are_refused(hub):
    hub.add("me/old", {"pytorch_model.bin": b"1", "config.json": b"{}"})
    message = (
        r"^load_model: folder must hold model\.safetensors \(a pickle can run code and is not "
        r"read\), got me/old of the hub with pytorch_model\.bin$"
    )
    with pytest.raises(ValueError, match=message):
        load_model("me/old")
    assert not any("pytorch_model" in line for line in hub.asked)
    hub.add("me/text", {"README.md": b"1"})
    with pytest.raises(ValueError, match=r"hold model\.safetensors, got me/text of the hub with R"):
        load_model("me/text")


@pytest.mark.parametrize(
    ("call", "where"),
    [(load_model, "load_model"), (MLP.from_pretrained, "MLP.from_pretrained")],
)
def test_a_model_that_is_not_there_is_named(hub, call, where):
    message = rf"^{where}: folder must be here, or a model of the hub that you may read, got me/no"
    with pytest.raises(ValueError, match=message):
        call("me/none")


def test_models_of_other_classes_are_refused(hub):
    mlp().push_to_hub("me/small")
    with pytest.raises(ValueError, match=r"^UNet\.from_pretrained: folder must hold UNet, got MLP"):
        UNet.from_pretrained("me/small")


def test_without_a_network_the_cache_serves_and_else_one_error_says_so(
    hub, monkeypatch, tmp_path, server
):
    model = mlp()
    model.push_to_hub("me/small")
    load_model("me/small")
    hub_server.point_to(monkeypatch, None, tmp_path / "cache")
    for switch in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switch)
        loaded, _ = load_model("me/small")
        assert torch.equal(loaded.c.weight, model.c.weight)
        message = (
            r"^load_model: folder must be here, or on a hub that answers, or in its cache, "
            r"got me/other: "
        )
        with pytest.raises(RuntimeError, match=message) as error:
            load_model("me/other")
        assert "\n" not in str(error.value)
    message = r"^MLP\.push_to_hub: the hub must answer"
    with pytest.raises(RuntimeError, match=message):
        model.push_to_hub("me/other")
    assert load_model("me/small", local_files_only=True)


def test_who_may_not_write_is_told(hub):
    hub.token = "right"
    model = mlp()
    message = r"^MLP\.push_to_hub: the hub must answer and let you write to me/small, got: "
    with pytest.raises(RuntimeError, match=message):
        model.push_to_hub("me/small", token="wrong")
    assert hub.commits == {}
    model.push_to_hub("me/small", token="right")
    assert len(hub.commits["me/small"]) == 1


def test_without_the_extra_it_is_named_and_folders_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = mlp()
    save_model(model, tmp_path)
    assert load_model(tmp_path)
    message = (
        r"^load_model: folder must be here, and me/small is not; for a model of the hub "
        r"huggingface_hub must be installed \(pip install hos_ext\[hub\]\), got: "
    )
    with pytest.raises(RuntimeError, match=message):
        load_model("me/small")
    message = (
        r"^MLP\.push_to_hub: huggingface_hub\S* must be installed \(pip install hos_ext\[hub\]"
    )
    with pytest.raises(RuntimeError, match=message):
        model.push_to_hub("me/small")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"repo_id": "small"}, ValueError, "repo_id must be user/name, got 'small'"),
        ({"repo_id": "a/b/c"}, ValueError, "repo_id must be user/name, got 'a/b/c'"),
        ({"repo_id": "a/b@c"}, ValueError, "repo_id must be user/name, got 'a/b@c'"),
        ({"repo_id": "a/--b"}, ValueError, "repo_id must be user/name, got "),
        ({"repo_id": 3}, TypeError, "repo_id must be a str, got int"),
        ({"card": None}, TypeError, "card must be a str, got NoneType"),
        ({"create_pr": 1}, TypeError, "create_pr must be True or False, got 1"),
        ({"files": {"config.json": b""}}, ValueError, "files must have names of their own, got "),
        ({"files": {"../a": b""}}, ValueError, "files must have names of their own, got '../a'"),
    ],
)
def test_what_cannot_be_pushed_is_refused(hub, options, kind, message):
    with pytest.raises(kind, match=rf"^MLP\.push_to_hub: {re.escape(message)}"):
        mlp().push_to_hub(**({"repo_id": "me/small"} | options))
    assert hub.commits == {}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"revision": 3}, TypeError, "revision must be a str, got int"),
        ({"token": 3}, TypeError, "token must be a str or a bool, got int"),
        ({"cache_dir": 3}, TypeError, "cache_dir must be a path, got int"),
        ({"local_files_only": 1}, TypeError, "local_files_only must be True or False, got 1"),
    ],
)
def test_how_a_model_is_read_is_checked(hub, options, kind, message):
    with pytest.raises(kind, match=rf"^load_model: {re.escape(message)}"):
        load_model("me/small", **options)
    assert hub.asked == []


def test_names_that_are_no_models_of_the_hub_stay_paths(hub):
    for name in ("nowhere", "./me/small", "/me/small", "a/b/c", "me/"):
        with pytest.raises(ValueError, match=r"^load_model: folder must hold model\.safetensors"):
            load_model(name)
    assert hub.asked == []


def test_a_card_of_a_head_says_what_the_head_is():
    model = SecondOrderHead(lambda x, sigma: -sigma * x, mlp(given_score=True))
    text = card.model_card(model.config, "me/small")
    assert "| class | SecondOrderHead with a head of class MLP |" in text
    assert "| shape of a sample | (2, 3) (6 entries) |" in text
    assert hos_ext.SecondOrderHead.push_to_hub.__doc__
