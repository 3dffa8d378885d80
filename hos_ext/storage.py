"""Files and folders written whole or not at all, and a manifest by which a folder is known whole.

What is written goes to a temporary name beside its place, is synced to the disk, and takes its
place by one rename: a process killed at any moment leaves the old, the new, or a temporary name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: a temporary file beside it, then one rename.

    Raises:
        OSError: the disk is full, read-only or broken; names the file, which is as it was.
    """
    temporary = _temporary(path)
    try:
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes a folder of files whole or not at all, with the sizes and hashes of all.

    Args:
        path: the folder; must not exist yet.
        writers: for each file name the function that writes it, called with the path to write.

    Raises:
        FileExistsError: path exists.
        OSError: the disk is full, or what else a writer raises; nothing is left at path.
    """
    if path.exists():
        raise FileExistsError(f"write_folder: path must not exist, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        manifest = {}
        for name, write in writers.items():
            with _naming(path / name):
                write(temporary / name)
                _sync(temporary / name)
                manifest[name] = _mark(temporary / name)
        write_whole(temporary / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        with _naming(path):
            temporary.rename(path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def damage(path: Path) -> str | None:
    """What is wrong with a folder that `write_folder` wrote, in words; None if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        there = {p.name for p in path.iterdir() if not p.name.startswith(".")} - {MANIFEST}
        for name in sorted(there - manifest.keys()):
            return f"{name} is not in {MANIFEST}"
        for name, mark in manifest.items():
            if name != Path(name).name:
                return f"{MANIFEST} names {name!r}, which is not in the folder"
            if not (path / name).is_file():
                return f"{name} is missing"
            if _mark(path / name) != mark:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes what killed writers of a name, or of any, left in a folder under temporary names."""
    for left in folder.glob(f".{name}.*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def check_writable(folder: Path | str, *, make: bool = True) -> None:
    """Makes the folder if need be and tries a file in it: OSError before the work, not after.

    Without `make` nothing is written: the folder, or the first one above that is there, is asked
    whether it may be written to.
    """
    if not make:
        place = Path(folder).absolute()
        there = next(each for each in (place, *place.parents) if each.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))
        return
    with _naming(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _mark(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the disk name the file; of a full disk Python says no name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


# What a file system answers that cannot sync.
_UNSYNCED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
# The file systems of which it was said: a checkpoint of four files syncs ten times.
_SAID: set[int] = set()


def _sync(path: Path) -> None:
    """To the disk: the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _SAID:
            _SAID.add(device)
            warnings.warn(
                f"write: the file system of {path.parent} cannot sync ({error.strerror}): what "
                "is written there may be lost in a power cut",
                stacklevel=4,
            )
    finally:
        os.close(descriptor)
