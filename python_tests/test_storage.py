"""Files and folders written whole or not at all."""

from functools import partial

import pytest

from hos_ext import storage


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    storage.write_whole(path, b"old")
    assert path.read_bytes() == b"old"

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(storage.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def _writers(**contents):
    return {name: partial(_write, content) for name, content in contents.items()}


def _write(content, path):
    path.write_bytes(content)


def test_write_folder_writes_files_and_a_manifest(tmp_path):
    path = tmp_path / "a" / "b"
    storage.write_folder(path, _writers(x=b"1", y=b""))
    assert sorted(entry.name for entry in path.iterdir()) == ["manifest.json", "x", "y"]
    assert (path / "x").read_bytes() == b"1"
    assert storage.damage(path) is None
    assert [entry.name for entry in path.parent.iterdir()] == ["b"]
    with pytest.raises(FileExistsError, match=r"^write_folder: path must not exist, got "):
        storage.write_folder(path, _writers(x=b"2"))
    assert (path / "x").read_bytes() == b"1"


def test_write_folder_leaves_nothing_when_a_writer_fails(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        storage.write_folder(tmp_path / "b", _writers(x=b"1") | {"y": fail})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: (path / "x").write_bytes(b"2"), "x is not what was written"),
        (lambda path: (path / "x").write_bytes(b"12"), "x is not what was written"),
        (lambda path: (path / "x").unlink(), "x is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("no"), "manifest.json cannot be read: "),
    ],
)
def test_damage_is_found_and_named(tmp_path, harm, words):
    path = tmp_path / "b"
    storage.write_folder(path, _writers(x=b"1"))
    harm(path)
    assert storage.damage(path).startswith(words)


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".step-1.12.tmp").mkdir()
    (tmp_path / ".step-1.12.tmp" / "x").write_bytes(b"1")
    (tmp_path / ".file.13.tmp").write_bytes(b"1")
    (tmp_path / "step-2").mkdir()
    (tmp_path / "notes.tmp").write_bytes(b"1")
    storage.remove_leftovers(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes.tmp", "step-2"]
    storage.remove_leftovers(tmp_path / "not there")


def test_check_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    storage.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):  # noqa: PT011 (its text is the system's)
        storage.check_writable(tmp_path / "file")
