"""How threads wait is said before torch is loaded, by the command line alone; the user wins."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hos_ext import idle

ROOT = Path(__file__).parent.parent
# Says what the environment holds at the moment when somebody first asks for torch.
WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch sees", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Watch())
"""


def seen_by_torch(command: list[str], tmp_path: Path, **said: str) -> str:
    """What a process finds in its environment when torch is loaded."""
    (tmp_path / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in idle.SAID}
    paths = [str(tmp_path), str(ROOT), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | said
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    return next(line for line in done.stdout.splitlines() if line.startswith("torch sees"))


@pytest.fixture
def script(tmp_path: Path) -> str:
    """What pip makes of an entry point, under its name."""
    path = tmp_path / "hos-ext"
    text = "import sys\nfrom hos_ext.app.cli import main\nsys.exit(main())\n"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_command_line_waits_passively_before_torch_loads(tmp_path, script):
    for command in ([script, "--version"], ["-m", "hos_ext.app.cli", "--version"]):
        assert seen_by_torch([sys.executable, *command], tmp_path) == "torch sees passive"


def test_what_the_user_said_stays(tmp_path, script):
    command = [sys.executable, script, "--version"]
    assert seen_by_torch(command, tmp_path, OMP_WAIT_POLICY="active") == "torch sees active"
    assert seen_by_torch(command, tmp_path, GOMP_SPINCOUNT="1000") == "torch sees None"


def test_a_program_that_imports_the_library_is_left_alone(tmp_path):
    command = [sys.executable, "-c", "import hos_ext"]
    assert seen_by_torch(command, tmp_path) == "torch sees None"


@pytest.mark.parametrize(
    ("argv", "orig_argv", "command"),
    [
        (["/bin/hos-ext", "train"], ["python", "/bin/hos-ext", "train"], True),
        (["hos-ext.exe"], ["hos-ext.exe"], True),
        (["-m"], ["python", "-u", "-m", "hos_ext.app.cli", "train"], True),
        (["-m"], ["python", "-m", "hos_ext"], True),
        (["-m"], ["python", "-m", "pytest", "-m", "hos_ext"], False),
        (["-m", "x"], ["python", "-W", "error", "-m", "bench.quick"], False),
        (["train.py", "-m", "hos_ext"], ["python", "train.py", "-m", "hos_ext"], False),
        (["hos-ext-train.py"], ["python", "hos-ext-train.py"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_which_process_is_the_command_line(argv, orig_argv, command):
    assert idle.is_command(argv, orig_argv) is command


def is_policy(node: ast.AST) -> bool:
    expected = "os.environ.setdefault('OMP_WAIT_POLICY', 'passive')"
    return isinstance(node, ast.Expr) and ast.unparse(node) == expected


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_every_example_says_it_before_its_other_imports(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body[1:]  # after the docstring
    assert ast.unparse(body[0]) == "import os"
    assert is_policy(body[1])
