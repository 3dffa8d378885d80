"""The public API called wrongly a thousand times; the same calls every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def machine(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "api_fuzz.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_public_name_has_a_valid_call_that_passes() -> None:
    done = machine("--valid")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        int(done.stdout.splitlines()[-1].split()[0]) > 200
    )  # a walk that finds nothing proves nothing


@pytest.mark.parametrize("part", [0, 500])
def test_wrong_calls_are_right_or_refused_by_name(part: int) -> None:
    done = machine("--from", str(part), "--calls", "500")
    assert done.returncode == 0, done.stdout + done.stderr
