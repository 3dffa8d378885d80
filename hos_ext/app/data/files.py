"""The files behind a path, a pattern or a folder."""

from __future__ import annotations

import glob
from pathlib import Path

from .rows import Request, check_set


def files_of(
    request: Request, endings: tuple[str, ...], *, folders: bool = False, patterns: bool = False
) -> list[Path]:
    """The files that a request names, sorted.

    Args:
        request: its target is the path.
        endings: of the files to look for, lower case.
        folders: a folder means all files below it with these endings, hidden ones left out. A link
            is the file that it leads to.
        patterns: a path that does not exist is a pattern.

    Returns:
        At least one file.

    Raises:
        ValueError: there is none, or a link in the folder leads nowhere.
    """
    path = Path(request.target).expanduser()
    if folders and path.is_dir():
        below = (p.relative_to(path) for p in path.rglob("*") if p.suffix.lower() in endings)
        shown = sorted(p for p in below if not any(part.startswith(".") for part in p.parts))
        lost = [path / p for p in shown if (path / p).is_symlink() and not (path / p).exists()]
        check_set(request.spec, not lost, "hold links to files that exist", lambda: str(lost[0]))
        files = [path / p for p in shown if (path / p).is_file()]
    elif patterns and not path.exists():
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    else:
        files = [path] if path.is_file() else []
    check_set(request.spec, files, f"name files that exist ({' '.join(endings)})", "none")
    return files
