"""The examples in docstrings run, and every public operator has one and the sections of a page."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hos_ext
from hos_ext import ops

# torch itself uses what it deprecates, where forward mode begins.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
OPERATORS = [
    getattr(ops, name)
    for name in ops.__all__
    if inspect.isfunction(getattr(ops, name)) and name != "build_info"
]
LIBRARY = [
    info.name
    for info in pkgutil.walk_packages(hos_ext.__path__, "hos_ext.")
    if not info.name.startswith(("hos_ext.app", "hos_ext.__main__", "hos_ext._C"))
]
PACKAGE = Path(hos_ext.__file__).parent
SECTIONS = {
    "Args",
    "Attributes",
    "Example",
    "Examples",
    "Note",
    "Notes",
    "Raises",
    "References",
    "Returns",
    "Warns",
    "Yields",
}


def examples(module: str) -> Iterator[doctest.DocTest]:
    """Those of a module's own docstrings; torch and hos_ext are at hand in each."""
    found = importlib.import_module(module)
    names = {"torch": torch, "hos_ext": hos_ext}
    for test in doctest.DocTestFinder().find(found, module, extraglobs=names):
        if test.examples:
            yield test


@pytest.mark.parametrize("module", LIBRARY)
def test_examples_run(module: str) -> None:
    for test in examples(module):
        report: list[str] = []
        torch.manual_seed(0)
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        runner.run(test, out=report.append)
        assert not runner.summarize(verbose=False).failed, "".join(report)


def test_a_wrong_example_fails() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    runner = doctest.DocTestRunner()
    runner.run(test, out=lambda text: None)
    assert runner.summarize(verbose=False).failed == 1


@pytest.mark.parametrize("function", OPERATORS, ids=lambda f: f.__name__)
def test_operators_say_all_that_a_caller_asks(function: object) -> None:
    text = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:", "References:", "Example:"):
        assert f"\n{section}\n" in text, section
    documented = text[text.index("Args:") : text.index("Returns:")]
    for name in inspect.signature(function).parameters:  # type: ignore[arg-type]
        assert name in documented, name


def sections(source: str) -> list[str]:
    """The lines of docstrings that head a section, in order."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [
        ast.get_docstring(n) or "" for n in ast.walk(ast.parse(source)) if isinstance(n, holders)
    ]
    return [name for text in texts for name in re.findall(r"^\s*([A-Z][a-z]+):$", text, re.M)]


def test_sections_have_the_names_that_are_known() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert set(sections(path.read_text())) <= SECTIONS, path


def test_an_unknown_section_is_found() -> None:
    source = 'class A:\n    """A.\n\n    Fields:\n        x: y.\n    """\n'
    assert sections(source) == ["Fields"]
