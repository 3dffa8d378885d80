"""The rules of the house: which room imports which, who touches private names, what is public."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hos_ext

PACKAGE = Path(hos_ext.__file__).parent

WORDS = {
    "checks",
    "conditions",
    "display",
    "idle",
    "progress",
    "random",
    "records",
    "scores",
    "storage",
}
BELOW = WORDS | {"ops", "schedules", "linalg", "tweedie"}
WING = {"losses", "nn", "sampling", "diffusion", "uncertainty", "integrations"}
LIBRARY = BELOW | WING | {"densities"}
FACE = "hos_ext"  # hos_ext/__init__.py

MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(WORDS, WORDS),
    "densities": WORDS,
    "ops": WORDS,
    "schedules": WORDS | {"ops"},
    "linalg": WORDS | {"ops"},
    "tweedie": WORDS | {"ops", "linalg"},
    **dict.fromkeys(WING, BELOW),
    # Siblings, without cycles.
    "diffusion": BELOW | {"sampling"},
    "integrations": BELOW | {"nn", "densities"},
    "app": LIBRARY | {FACE},
    FACE: LIBRARY,
    "__main__": {"app", FACE},
}
IMPORTS_C = {"hos_ext.ops._native"}
TOUCHES_PRIVATE = {"hos_ext.ops._native", "hos_ext.ops._operator", "hos_ext.records"}

# Private names of torch that these modules use. A new torch may drop one: then this test says so.
PRIVATE = {
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._DisableFuncTorch",
    "torch._C._after_autograd_keyset",
    "torch._C._are_functorch_transforms_active",
    "torch._C._dispatch_keys",
    "torch._C._functorch.TransformType.Jvp",
    "torch._C._functorch.TransformType.Vmap",
    "torch._C._functorch.get_interpreter_stack",
    "torch._C._get_tracing_state",
    "torch._C._is_any_autocast_enabled",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._parse_dispatch_key",
    "torch._functorch.utils.enable_single_level_autograd_function",
    "torch.autograd.forward_ad._current_level",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "torch.autograd.function._SingleLevelFunction",
    "torch.utils._pytree",
    "torch.utils._pytree.GetAttrKey",
    "torch.utils._pytree.register_pytree_node",
}

PUBLIC = {
    "__version__",
    "assemble_hessian",
    "build_info",
    "Chains",
    "CosineVP",
    "d2sm_diag_loss",
    "d2sm_diag_vr_loss",
    "d2sm_loss",
    "d2sm_vr_loss",
    "DiscreteVP",
    "DPLR",
    "dsm_loss",
    "dsm_vr_loss",
    "EDM",
    "hessian_matvec",
    "langevin_step",
    "load_model",
    "MLP",
    "ModelScore",
    "normal",
    "ozaki_step",
    "Posterior",
    "posterior",
    "Rectified",
    "sample",
    "save_model",
    "score_matching_loss",
    "ScoreMatchingLoss",
    "Scores",
    "SecondOrderHead",
    "SubVP",
    "UNet",
    "uniform",
    "UnscaledScores",
    "VE",
    "VP",
}
HEAVY = (
    "accelerate",
    "datasets",
    "diffusers",
    "h5py",
    "hos_ext.app",
    "huggingface_hub",
    "matplotlib",
    "PIL",
    "rich",
    "scipy",
    "sklearn",
    "typer",
)


# --------------------------------------------------------------------------- reading the sources


def sources() -> dict[str, str]:
    """Module name to source, for every file of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return found


parse = functools.cache(ast.parse)


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node, functions' included, but for blocks under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (inner for other in node.orelse for inner in ast.walk(other))
        else:
            yield node
            yield from statements(node)


def imported(module: str, modules: dict[str, str]) -> set[str]:
    """The names that a module imports, as full as they can be: `hos_ext.ops.noise`, `torch.nn`."""
    is_package = any(other.startswith(module + ".") for other in modules)
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = set()
    for node in statements(parse(modules[module])):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner in modules or not base.startswith("hos_ext") or alias.name == "_C"
                names.add(inner if is_module else base)
    return names


def named(source: str) -> set[str]:
    """The strings that name something in a room, as "hos_ext.ops.noise:draw"; no docstrings."""
    tree, found = parse(source), set()
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, holders) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in prose:
            match = re.match(r"hos_ext\.(\w+)", node.value) if isinstance(node.value, str) else None
            if match and match[1] in MAY_IMPORT:
                found.add(node.value)
    return found


def room_of(module: str) -> str:
    """The room of a module of the package: the first name below `hos_ext`."""
    parts = module.split(":")[0].split(".")
    return parts[1] if len(parts) > 1 else FACE


@functools.cache
def private_names(source: str) -> set[str]:
    """The private names of torch that a source touches, in full."""
    tree = parse(source)
    known, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    known[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.add(f"{node.module}.{alias.name}")
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            root, *rest = dotted(node)
            if root in known:
                found.add(".".join([known[root], *rest]))
    return {name for name in found if any(map(is_private, name.split(".")))}


def dotted(node: ast.expr) -> list[str]:
    """The parts of `a.b.c`; the first is empty where it is no name, as in `f().b`."""
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    return [node.id if isinstance(node, ast.Name) else ""]


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def violations(modules: dict[str, str]) -> list[str]:
    """What breaks a rule, as "module: what it does"."""
    found = []
    edges: dict[str, set[str]] = {}
    for module, source in modules.items():
        names = imported(module, modules)
        edges[module] = names & modules.keys()
        if "hos_ext._C" in names and module not in IMPORTS_C:
            found.append(f"{module}: imports hos_ext._C")
        if room_of(module) not in MAY_IMPORT:
            found.append(f"{module}: is in no room")
            continue
        for name in edges[module]:
            room = room_of(name)
            if room not in MAY_IMPORT[room_of(module)] | {room_of(module)}:
                found.append(f"{module}: imports {name}")
        for name in named(source):
            if room_of(name) not in MAY_IMPORT[room_of(module)] | {room_of(module)}:
                found.append(f"{module}: names {name}")
        if module not in TOUCHES_PRIVATE:
            found += [f"{module}: touches {name}" for name in private_names(source)]
    return sorted({*found, *(f"cycle: {' -> '.join(c)}" for c in cycles(edges))})


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One cycle of imports for each module that closes one."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(edges.get(module, ())):
                visit(other, [*path, module])
            done.add(module)

    for module in edges:
        visit(module, [])
    return found


# ------------------------------------------------------------------------------------- the rules


def test_rooms_import_only_what_lies_below() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("scores", "from .ops import normal", "imports hos_ext.ops"),
        ("ops.noise", "from ..linalg.dplr import DPLR", "imports hos_ext.linalg.dplr"),
        ("densities.cauchy", "from .. import ops", "imports hos_ext.ops"),
        ("tweedie.posterior", "import hos_ext.losses.module", "imports hos_ext.losses.module"),
        ("sampling.chains", "from ..diffusion import reverse", "imports hos_ext.diffusion.reverse"),
        ("nn.head", "def f():\n    from ..app.runs import Run", "imports hos_ext.app.runs"),
        ("losses.module", "from .. import build_info", "imports hos_ext"),
        ("linalg.dplr", "from .. import _C", "imports hos_ext._C"),
        ("linalg.dplr", "from .._C import step", "imports hos_ext._C"),
        ("linalg.dplr", "import torch\nx = torch._C._x()", "touches torch._C._x"),
        ("nn.mlp", "from torch import nn\nnn.modules._x.Y", "touches torch.nn.modules._x.Y"),
        ("nn.mlp", "from torch._dynamo import z", "touches torch._dynamo.z"),
        ("nn.head", "X = {'a': 'hos_ext.app.runs:Run'}", "names hos_ext.app.runs:Run"),
        ("densities.cauchy", "import_module('hos_ext.ops')", "names hos_ext.ops"),
        ("toolbox", "", "is in no room"),
    ],
)
def test_a_bad_import_is_found(module: str, source: str, message: str) -> None:
    modules = sources() | {f"hos_ext.{module}": source}
    assert f"hos_ext.{module}: {message}" in violations(modules)


def test_prose_may_name_any_room() -> None:
    source = "def f():\n    'hos_ext.app.runs calls this.'\n    return 'hos_ext.nowhere'"
    assert violations(sources() | {"hos_ext.nn.head": source}) == []


def test_a_cycle_is_found() -> None:
    modules = {
        "hos_ext.ops.a": "from . import b",
        "hos_ext.ops.b": "def f():\n    from .a import g",
    }
    found = violations({"hos_ext.ops": "", **modules})
    assert found == ["cycle: hos_ext.ops.a -> hos_ext.ops.b -> hos_ext.ops.a"]
    modules["hos_ext.ops.b"] = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a"
    )
    assert violations({"hos_ext.ops": "", **modules}) == []


def test_the_private_names_of_torch_are_these_and_exist() -> None:
    modules = sources()
    assert set().union(*(private_names(modules[m]) for m in TOUCHES_PRIVATE)) == PRIVATE
    for name in PRIVATE:
        resolve(name)


def resolve(name: str) -> Any:
    """What a dotted name stands for."""
    parts = name.split(".")
    value: Any = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:depth]))
        value = getattr(value, part)
    return value


def test_the_public_face_is_a_short_list() -> None:
    assert set(hos_ext.__all__) | {"__version__"} == PUBLIC
    assert len(hos_ext.__all__) == len(set(hos_ext.__all__)) <= 40
    for name in PUBLIC:
        assert hasattr(hos_ext, name)


def test_each_room_lists_names_that_exist() -> None:
    for room in sorted(LIBRARY):
        module = importlib.import_module(f"hos_ext.{room}")
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{room}.{name}"
        if (PACKAGE / room).is_dir():
            assert module.__all__, room


def test_import_is_light_and_makes_every_room_reachable() -> None:
    script = f"""
import sys, hos_ext
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
for room in {sorted(LIBRARY | {"app"})!r}:
    assert getattr(hos_ext, room).__name__ == "hos_ext." + room
    assert room in dir(hos_ext)
assert callable(hos_ext.sampling.search_step_size)
assert callable(hos_ext.uncertainty.calibration_report)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
