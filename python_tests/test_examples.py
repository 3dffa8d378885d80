"""The examples run as they stand, and say what their text promises."""

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fused_loss_trains_the_same_network_as_the_dense_expression():
    printed = run("drop_in_loss.py", "--steps", "50")
    dense, fused, apart = (float(n) for n in re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?", printed))
    assert dense == fused
    assert apart < 1e-12


def test_readme_example_prints_the_number_beside_it():
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    code, expected = re.search(r"```python\n(.*?)```.*?prints `(.*?)`", readme, re.S).groups()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_many_second_order_steps_beat_one(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    printed = run("one_step_or_many.py", "--quick", "--out", str(out))
    lines = re.findall(r"^(\d+ steps?: .*?)\s{2,}(-?\d+\.\d+)", printed, re.M)
    energy = {name.strip(): float(value) for name, value in lines}
    mean, one = energy["1 step: mean"], energy["1 step: mean + covariance"]
    assert energy["5 steps: second order"] < one < mean
    assert energy["5 steps: second order"] < energy["5 steps: ancestral"]
    assert out.stat().st_size > 10_000
