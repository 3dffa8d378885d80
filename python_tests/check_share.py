"""The share of checking code in the package, and its longest functions.

    python python_tests/check_share.py [PACKAGE]

Lines of code are those with a token that is no comment and no docstring. Checking code is
`checks.py` and `_checks.py`, functions named `check...` or `refuse...`, and `if` branches that end
in a raise. Lines that call a function of `checks.py` are counted apart: they check too, but read as
one word.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)
_HELPERS = ("check", "refuse", "one_of", "positive", "per_sample")
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, *Function)):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    lines.difference_update(_span(statement))
    return lines


def checking_lines(name: str, source: str) -> set[int]:
    """Those that check: a file of checks, functions that check, and `if ...: raise`."""
    if name in ("checks.py", "_checks.py"):
        return code_lines(source)
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function) and node.name.lstrip("_").startswith(("check", "refuse")):
            lines.update(_span(node))
        elif isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
            lines.update(range(node.lineno, node.body[-1].end_lineno + 1))
    return lines & code_lines(source)


def calling_lines(source: str) -> set[int]:
    """Those of statements that only call a helper of `checks.py`."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            name = called.id if isinstance(called, ast.Name) else ""
            if name.startswith(_HELPERS):
                lines.update(_span(node))
    return lines


def functions(source: str) -> Iterator[tuple[int, str]]:
    """The lines of code and the name of each function; those inside another count with it."""
    code = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            yield len(code.intersection(_span(node))), node.name


def _span(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def main(package: Path) -> None:
    code, checks, calls = Counter[str](), Counter[str](), Counter[str]()
    longest = []
    for path in sorted(package.rglob("*.py")):
        inner = path.relative_to(package)
        room = inner.parts[0]
        source = path.read_text()
        checking = checking_lines(path.name, source)
        code[room] += len(code_lines(source))
        checks[room] += len(checking)
        calls[room] += len(calling_lines(source) - checking)
        longest += [(lines, f"{inner}: {name}") for lines, name in functions(source)]
    print(f"{'room':20}{'code':>7}{'checks':>8}{'share':>8}{'calls':>7}{'both':>8}")
    for room in sorted(code):
        print(_row(room, code[room], checks[room], calls[room]))
    print(_row("all", code.total(), checks.total(), calls.total()))
    print(
        "longest functions:", *(f"  {n:4} {name}" for n, name in sorted(longest)[:-9:-1]), sep="\n"
    )


def _row(room: str, code: int, checks: int, calls: int) -> str:
    share, both = checks / max(code, 1), (checks + calls) / max(code, 1)
    return f"{room:20}{code:7}{checks:8}{share:8.1%}{calls:7}{both:8.1%}"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "hos_ext"))
