"""docs/security.md: each point of the page, word by word, with what shows it."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hos_ext
from hos_ext import storage
from hos_ext.app import data
from hos_ext.app.options.reading import read_config
from hos_ext.integrations import diffusers
from hos_ext.nn import hub

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "security.md"
SAID: list[str] = []


def says(sentence: str) -> Callable[[Callable], Callable]:
    """The point of the page that a test shows."""
    SAID.append(sentence)
    return lambda test: test


def nodes(kind):
    """The nodes of a kind in the source of the package, each with its file."""
    found = []
    for path in sorted((ROOT / "hos_ext").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [(path, node) for node in ast.walk(tree) if isinstance(node, kind)]
    assert found
    return found


def calls(name):
    """The calls of a function or method of that name, by their keywords."""
    found = []
    for path, node in nodes(ast.Call):
        if ast.unparse(node.func).endswith(name):
            found.append((path, {k.arg: ast.unparse(k.value) for k in node.keywords}))
    return found


def imported():
    """The first names of all modules imported, also those that `require` imports by name."""
    names = set()
    for _, node in nodes((ast.Import, ast.ImportFrom, ast.Call)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("require"):
            names |= {str(getattr(a, "value", "")).split(".")[0] for a in node.args[1:]}
    assert {"torch", "safetensors"} <= names
    return names


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def mark(tmp_path):
    """A file that a bomb makes, and that must not be there at the end."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


def test_every_point_of_the_page_has_its_test():
    text = PAGE.read_text(encoding="utf-8")
    points = [" ".join(p.split()) for p in re.findall(r"^- (.*(?:\n  .*)*)", text, re.MULTILINE)]
    assert points == SAID


@says("The package calls no pickle, no eval, no exec, no shell and no other program.")
def test_nothing_runs_code():
    assert not imported() & {"pickle", "marshal", "shelve", "dill", "subprocess", "pty", "joblib"}
    for path, node in nodes(ast.Call):
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "__import__", "os.system", "os.popen"), path
        assert not re.match(r"os\.(exec|spawn|posix_spawn)", called), path
        assert "shell" not in {k.arg for k in node.keywords}, path
        assert not called.endswith(("yaml.load", ".unsafe_load")), path
        assert called not in ("np.load", "numpy.load"), path


@says("A .npy or .npz file of pickled objects is refused, and nothing in it runs.")
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_arrays_of_objects(tmp_path, mark, kind):
    path, content = tmp_path / f"a.{kind}", np.array([Bomb(mark)], dtype=object)
    (np.save if kind == "npy" else np.savez)(path, content)
    with pytest.raises(ValueError, match=rf"a\.{kind}"):
        data.read_samples(f"npy:{path}")


@says(
    "A folder with weights as a pickle is refused by the name of that file, and nothing in it runs."
)
@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.ckpt", "model.pkl"])
def test_weights_as_a_pickle(tmp_path, mark, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
    (tmp_path / "config.json").write_text('{"_class_name": "MLP"}')
    with pytest.raises(ValueError, match=re.escape(name)):
        hos_ext.load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match="safetensors"):
        hos_ext.load_model(tmp_path)


@says(
    "The optimizer of a checkpoint, the only file that torch reads, is read with"
    " `weights_only=True`."
)
def test_torch_reads_weights_only(tmp_path, mark):
    found = calls("torch.load")
    assert [path.name for path, _ in found] == ["checkpoints.py"]
    assert all(keywords["weights_only"] == "True" for _, keywords in found)
    torch.save({"state": Bomb(mark)}, tmp_path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)


@says("A tag of YAML that names a Python object is refused, and nothing runs.")
def test_yaml_of_objects(tmp_path, mark):
    path = tmp_path / "o.yaml"
    path.write_text(f'steps: !!python/object/apply:builtins.open ["{mark}", "w"]\n')
    with pytest.raises(ValueError, match=r"o\.yaml"):
        read_config(path)


@says("The config of a model names a class out of a short list, and any other name is refused.")
@pytest.mark.parametrize("name", ["os.system", "Sequential", "../MLP", ""])
def test_class_of_a_model(tmp_path, name):
    hos_ext.save_model(hos_ext.MLP((2,), 1), tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    head = json.loads(content[8 : 8 + size])
    config = json.loads(head["__metadata__"]["config"]) | {"_class_name": name}
    head["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        hos_ext.load_model(tmp_path)


@says("Code that comes with a data set is never asked for: `trust_remote_code` does not occur.")
def test_no_code_of_data_sets():
    for path in (ROOT / "hos_ext").rglob("*.py"):
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path


@says("A manifest that names a file outside its folder makes the folder count as damaged.")
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_manifest_that_leaves_its_folder(tmp_path, name):
    (tmp_path / "secret").write_bytes(b"1")
    folder = tmp_path / "run"
    storage.write_folder(folder, {"a": lambda path: path.write_bytes(b"1")})
    assert storage.damage(folder) is None
    manifest = folder / storage.MANIFEST
    known = json.loads(manifest.read_bytes())
    manifest.write_text(json.dumps(known | {name: known["a"]}))
    assert name in str(storage.damage(folder))


@says("A member of an .npz file is read by its name and never unpacked to the disk.")
def test_member_that_leaves_its_folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    values, file = np.arange(6.0).reshape(3, 2), io.BytesIO()
    np.save(file, values)
    with zipfile.ZipFile(inner / "a.npz", "w") as packed:
        packed.writestr("../out.npy", file.getvalue())
    assert np.array_equal(data.read_samples(f"npy:{inner / 'a.npz'}").numpy(), values)
    assert [p.name for p in tmp_path.rglob("*")] == ["inner", "a.npz"]


@says(
    "A link in a folder of pictures is the file that it leads to, so that link only what you"
    " want read."
)
def test_link_in_a_folder(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "far.png")
    (tmp_path / "in" / "near.png").symlink_to(tmp_path / "far.png")
    assert (data.read_samples(f"folder:{tmp_path / 'in'}")[0].numpy() == 7).all()


@says("Writing over a link replaces the link and leaves the file behind it as it was.")
def test_writing_over_a_link(tmp_path):
    far, near = tmp_path / "far", tmp_path / "near"
    far.write_bytes(b"old")
    near.symlink_to(far)
    storage.write_whole(near, b"new")
    assert (far.read_bytes(), near.read_bytes(), near.is_symlink()) == (b"old", b"new", False)


def header(shape):
    file = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


@says(
    "A header of an array that claims more numbers than the file holds is refused before memory"
    " is taken."
)
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_header_that_lies(tmp_path, kind):
    path, content = tmp_path / f"a.{kind}", header((2**40, 16)) + bytes(64)  # 64 TiB
    if kind == "npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("a.npy", content)
    with pytest.raises(ValueError, match=r"bytes, where 64 bytes are"):
        data.read_samples(f"npy:{path}")


@says("A member of an .npz file that claims more than its packed bytes can hold is refused.")
def test_member_that_claims_too_much(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.npy", header((64, 16)) + bytes(4096))
        packed.filelist[0].file_size = 2**31
    with pytest.raises(ValueError, match=f"claims {2**31} bytes"):
        data.read_samples(f"npy:{path}")


@says("A picture of more pixels than pillow takes for safe is refused.")
def test_picture_that_claims_too_much(tmp_path):
    def chunk(kind, content):
        total = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + total

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    lines = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "big.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + lines)
    with pytest.raises(ValueError, match=r"big\.png"):
        data.read_samples(f"folder:{tmp_path}")


@says("A YAML file whose aliases stand for more than 10,000 values is refused.")
def test_yaml_of_aliases(tmp_path):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 30)]
    (tmp_path / "o.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"o\.yaml must hold at most 10000 values"):
        read_config(tmp_path / "o.yaml")


@says("The package opens no connection itself: it imports no module of sockets, HTTP or URLs.")
def test_no_connections():
    out = {"socket", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "ssl"}
    assert not imported() & (out | {"webbrowser", "smtplib"})
    assert not calls("hub.load")
    assert not calls("load_state_dict_from_url")


@says(
    "Of data, only a set named `hf:`, by `datasets`, and a table whose pictures are addresses, by"
    " `fsspec`, reach out."
)
def test_only_hf_reaches_out():
    asked = {path.name for path, node in nodes(ast.Constant) if node.value == "datasets"}
    assert asked <= {"checks.py", "hf.py", "own.py", "tables.py", "parquet.py", "folder.py"}
    named = [p.name for p, node in nodes(ast.Attribute) if node.attr == "load_dataset"]
    assert sorted(named) == ["hf.py", "tables.py"]
    opened = {path.name for path, node in nodes(ast.Constant) if node.value == "fsspec"}
    assert opened == {"checks.py", "images.py"}  # the first says which extra brings it


@says(
    "A model or a pipeline of diffusers named `user/name`, where no such folder is here, is read"
    " from the Hugging Face hub, and of it safetensors and JSON alone."
)
def test_models_of_the_hub():
    """`python_tests/nn/test_hub.py` looks at the requests."""
    named = {path.name for path, node in nodes(ast.Constant) if node.value == "huggingface_hub"}
    assert named == {"checks.py", "diffusers.py", "hub.py", "push.py"}
    fetching = dict(calls("snapshot_download"))
    assert sorted(path.name for path in fetching) == ["diffusers.py", "hub.py"]
    assert all("allow_patterns" in keywords for keywords in fetching.values())
    for files in (hub._FETCHED, diffusers._FILES):
        assert {Path(name).suffix for name in files} == {".json", ".safetensors"}


@says("Nothing is written to the hub but by `push_to_hub` and `hos-ext push`.")
def test_what_writes_to_the_hub():
    assert {path.name for path, _ in calls("push_to_hub")} == {"hub.py", "push.py"}
    assert not calls("upload_folder")
    assert not calls("upload_file")
    assert not calls("create_commit")


@says("A pipeline of diffusers is read from its folder alone, with `local_files_only=True`.")
def test_diffusers_stays_local():
    found = [k for path, k in calls(".from_pretrained") if path.name == "diffusers.py"]
    assert len(found) == 2
    assert all(keywords["local_files_only"] == "True" for keywords in found)


@says("A file that could not be written whole leaves nothing behind, and the old one stays.")
def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_whole(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


@says(
    "Temporary files lie beside their place or in a folder of `tempfile`, never under a name"
    " made by `mktemp`."
)
def test_temporary_files(tmp_path):
    assert not calls("mktemp")
    seen = []
    storage.write_folder(tmp_path / "run", {"a": lambda p: seen.append(p) or p.write_bytes(b"1")})
    assert seen[0].parent.parent == tmp_path
    for path, node in nodes(ast.Constant):
        assert not str(node.value).startswith("/tmp"), path
