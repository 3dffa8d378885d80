"""Disks that are full, read-only, out of names, or that cannot sync or rename; clocks that jump."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

import hos_ext
from hos_ext import storage
from hos_ext.app import cli

SMALL = ["--model=mlp", "--rank=2", "--width=16", "--head-width=16", "--tracker=none"]
SMALL += ["--steps=12", "--save-every=4", "--batch-size=8"]


def mount(folder, *options):
    """A small disk at a folder, which only root may make."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"mounts are refused here: {done.stderr.strip()}")
    return folder


@pytest.fixture
def disk(tmp_path):
    """A disk of 2 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts")
    place = mount(tmp_path / "disk", "-o", "size=2m")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def fill(place, leave=0):
    """Takes all but `leave` bytes of a disk."""
    with (place / "ballast").open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass
        file.truncate(max(file.tell() - leave, 0))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    images = np.random.default_rng(0).integers(0, 256, (80, 1, 8, 8)).astype(np.uint8)
    np.save(folder / "x.npy", images)
    return f"npy:{folder / 'x.npy'}"


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert cli.run(["train", "--data", pictures, "--out", str(folder), *SMALL]) == 0
    return folder


def weights(run):
    found = load((Path(run) / "model" / "model.safetensors").read_bytes())
    return {name: value.tobytes() for name, value in found.items()}


def one_line(capsys):
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0, said
    assert said.startswith("hos-ext: ")
    return said


def temporary(folder):
    return [str(p) for p in Path(folder).rglob(".*.tmp")]


def test_training_on_a_full_disk_names_it_and_goes_on_when_there_is_room(disk, pictures, capsys):
    run = disk / "run"
    begin = ["train", "--data", pictures, "--out", str(run), *SMALL]
    first = ["--steps=4", "--save-every=4", "--batch-size=8", "--decay=constant"]
    assert cli.run([*begin[:-3], *first]) == 0
    capsys.readouterr()
    fill(disk, leave=8192)
    code = cli.run(["resume", str(run), "--steps", "12"])
    said = one_line(capsys)
    assert code in (1, 2)
    assert "No space left on device" in said
    assert str(disk) in said
    assert temporary(run) == []
    assert (run / "checkpoints" / "step-00000004" / "manifest.json").exists()
    (disk / "ballast").unlink()
    assert cli.run(["resume", str(run), "--steps", "12"]) == 0
    other = disk / "other"
    assert cli.run([*begin[:4], str(other), *SMALL, "--decay=constant"]) == 0
    assert weights(run) == weights(other)


@pytest.mark.parametrize("command", ["denoise", "evaluate", "chains"])
@pytest.mark.parametrize("how", ["full", "read-only", "out of names"])
def test_results_on_a_disk_that_takes_none_are_named_and_the_old_ones_stay(
    tmp_path, undisturbed, capsys, command, how
):
    if os.geteuid() != 0:
        pytest.skip("only root mounts")
    limit = "size=1m,nr_inodes=6" if how == "out of names" else "size=1m"
    disk = mount(tmp_path / "disk", "-o", limit)
    try:
        more = {
            "denoise": ["--sigma=0.4", "--count=2"],
            "evaluate": ["--sigma=0.4"],
            "chains": ["--sigma=0.4", "--chains=2", "--steps=8", "--burn-in=0"],
        }[command]
        name = {"denoise": "denoise.npz", "evaluate": "evaluate.json", "chains": "chains-ozaki.npz"}
        out = disk / "out"
        out.mkdir()
        (out / name[command]).write_bytes(b"of before")
        if how == "full":
            fill(disk)
        elif how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        else:
            with suppress(OSError):
                for i in range(9):
                    (disk / f"name{i}").touch()
        code = cli.run([command, str(undisturbed), *more, "--out", str(out), "--force"])
        said = one_line(capsys)
        assert code in (1, 2)
        assert ("Read-only file system" if how == "read-only" else "No space left") in said
        assert str(out) in said
        assert (out / name[command]).read_bytes() == b"of before"
        assert temporary(out) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_is_said_and_used(tmp_path, monkeypatch, number):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.os, "fsync", refuse)
    monkeypatch.setattr(storage, "_SAID", set())
    with pytest.warns(UserWarning, match="cannot sync .* may be lost in a power cut") as said:
        hos_ext.save_model(hos_ext.MLP((3,), rank=1), tmp_path / "model")
    assert len(said) == 1  # of each file system once, not of each file
    assert hos_ext.load_model(tmp_path / "model")[0].rank == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fails_while_it_syncs_is_an_error_that_names_the_file(
    tmp_path, monkeypatch, number
):
    path = tmp_path / "a.json"
    storage.write_whole(path, b"old")

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.os, "fsync", fail)
    with pytest.raises(OSError, match=f"{os.strerror(number)}.*a.json"):
        storage.write_whole(path, b"new")
    with pytest.raises(OSError, match=f"{os.strerror(number)}.*x"):
        storage.write_folder(tmp_path / "folder", {"x": lambda file: file.write_bytes(b"1")})
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EEXIST])
def test_a_file_system_that_does_not_rename_over_keeps_the_old_file(tmp_path, monkeypatch, number):
    path = tmp_path / "a.json"
    storage.write_whole(path, b"old")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match=r"a\.json"):
        storage.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert temporary(tmp_path) == []


def test_a_folder_that_vanishes_is_named(tmp_path, monkeypatch):
    whole = storage._temporary

    def vanish(path):
        found = whole(path)
        path.parent.mkdir(exist_ok=True)
        return found.with_name("gone") / found.name

    monkeypatch.setattr(storage, "_temporary", vanish)
    with pytest.raises(OSError, match="No such file or directory"):
        storage.write_whole(tmp_path / "out" / "a.json", b"1")


def test_a_clock_that_jumps_changes_no_number(tmp_path, pictures, undisturbed, monkeypatch):
    """Steps, not times, decide what is newest and what comes next."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 1e9 + 1e6 * (3 * next(ticks) % 7))
    run = tmp_path / "run"
    half = [*SMALL[:-3], "--steps=12", "--save-every=4", "--batch-size=8"]
    assert cli.run(["train", "--data", pictures, "--out", str(run), *half]) == 0
    assert weights(run) == weights(undisturbed)
    old, new = sorted((run / "checkpoints").glob("step-*"))[-2:]
    os.utime(new, (0, 0))  # the newest checkpoint has the oldest time
    os.utime(old, (2e9, 2e9))
    (run / "metrics.json").unlink()
    assert cli.run(["resume", str(run)]) == 0
    assert weights(run) == weights(undisturbed)
    assert json.loads((run / "metrics.json").read_text())["train"]["steps"] == 12
