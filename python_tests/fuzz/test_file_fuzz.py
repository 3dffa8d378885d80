"""Two hundred damaged files; the same ones every time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_damaged_files_are_read_right_or_named() -> None:
    command = [sys.executable, str(HERE / "file_fuzz.py"), "--files", "200", "--from", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (\w+)", done.stdout.split(": ")[1])}
    assert counts["refused"] > 80  # damage that does nothing proves nothing
    assert counts["right"] > 10
