"""Proposes mutants of a file or a folder, for a table, by a seed.

    python python_tests/mutants/propose.py hos_ext/linalg --count 20 --seed 0

Each proposal changes one operator, comparison, number, method or argument in a function body.
Checks, messages and annotations are left alone: their tests are of another kind. The output is
TOML. Read it before it goes into a table: a mutant that changes nothing teaches nothing.
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "@": "*", "//": "/", "|": "&", "&": "|"}
SYMBOLS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.BitOr: "|",
    ast.BitAnd: "&",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.And: "and",
    ast.Or: "or",
}
COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
METHODS = {
    "sum": "mean",
    "mean": "sum",
    "square": "abs",
    "sqrt": "square",
    "rsqrt": "reciprocal",
    "log": "log1p",
    "log1p": "log",
    "exp": "expm1",
    "expm1": "exp",
    "amax": "amin",
    "amin": "amax",
    "clamp_min": "clamp_max",
    "clamp_max": "clamp_min",
    "cumsum": "cumprod",
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "min": "max",
    "sin": "cos",
    "cos": "sin",
    "zeros": "ones",
    "ones": "zeros",
    "zeros_like": "ones_like",
    "ones_like": "zeros_like",
    "all": "any",
    "any": "all",
    "logsumexp": "sum",
}
# Their first number is an axis or a size: a change mostly raises, which any test sees.
AXES = ("flatten", "squeeze", "unsqueeze", "cat", "stack", "sum", "mean", "all", "any", "amax")
AXES += (
    "amin",
    "norm",
    "reshape",
    "view",
    "permute",
    "movedim",
    "size",
    "diff",
    "cumsum",
    "expand",
)
SKIPPED_CALLS = ("check", "one_of", "refuse", "positive", "per_sample", "show", "isinstance")


def dull(node: ast.AST) -> bool:
    """Whether a change of the node itself would raise at once, or hardly matter."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return any(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in sides)
    if isinstance(node, ast.BinOp):
        odd = (ast.Tuple, ast.List, ast.Constant)
        sides = [n for n in (node.left, node.right) if isinstance(n, odd)]
        return any(not isinstance(n, ast.Constant) or isinstance(n.value, str) for n in sides)
    return False


def skipped(node: ast.AST) -> bool:
    """Whether a mutant inside would change a check or a message alone."""
    if isinstance(node, ast.keyword) and node.arg in ("strict", "keepdim", "dim"):
        return True
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)):
        return True
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).split(".")[-1].lstrip("_")
        return name.startswith(SKIPPED_CALLS)
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        return any(isinstance(n, ast.Name) and n.id in ("rule", "got", "where")
                   for n in ast.walk(target))  # fmt: skip
    return False


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function body whose change would change what it does."""
    for name, child in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "op"):
            continue
        if isinstance(child, ast.arguments):
            continue
        for each in child if isinstance(child, list) else [child]:
            if not isinstance(each, ast.AST) or skipped(each):
                continue
            if name == "args" and isinstance(each, ast.Constant) and of_axes(node):
                continue
            yield each
            yield from walk(each)


def of_axes(node: ast.AST) -> bool:
    """Whether a call's first number is an axis."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in AXES
    )


def changes(node: ast.AST, lines: list[str]) -> Iterator[tuple[int, int, int, str]]:
    """Line, column, end and new text of each change of a node that stands on one line."""
    if dull(node):
        return
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.Compare)):
        operands = (
            [node.left, node.right]
            if isinstance(node, ast.BinOp)
            else node.values
            if isinstance(node, ast.BoolOp)
            else [node.left, *node.comparators]
        )
        ops = node.ops if isinstance(node, ast.Compare) else [node.op] * (len(operands) - 1)
        for left, right, op in zip(operands[:-1], operands[1:], ops, strict=True):
            symbol = SYMBOLS.get(type(op))
            if symbol is None or left.end_lineno != right.lineno:
                continue
            between = lines[right.lineno - 1].encode()[left.end_col_offset : right.col_offset]
            at = between.decode().find(symbol)
            if at < 0:
                continue
            new = {**OPERATORS, **COMPARISONS, "and": "or", "or": "and"}[symbol]
            start = left.end_col_offset + at
            yield right.lineno - 1, start, start + len(symbol), new
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
        new = repr(value + 1) if isinstance(value, int) else repr(value * 2 or 1.0)
        yield node.lineno - 1, node.col_offset, node.end_col_offset or 0, new
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield node.lineno - 1, node.col_offset, node.end_col_offset or 0, repr(not node.value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if isinstance(node.operand, ast.Constant):  # mostly an axis
            return
        yield node.lineno - 1, node.col_offset, node.col_offset + 1, ""
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name, place = node.func.attr, node.func
        library = isinstance(place.value, ast.Name) and place.value.id in ("math", "np")
        if name in METHODS and not library:
            end, line = place.end_col_offset or 0, (place.end_lineno or 1) - 1
            yield line, end - len(name), end, METHODS[name]


def proposals(path: Path) -> Iterator[tuple[str, str]]:
    """Old and new text for each change of a file; the old text stands there once."""
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    seen = set()
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = function.body[0]
        docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        for node in (n for part in function.body[docstring:] for n in [part, *walk(part)]):
            if skipped(node):
                continue
            for number, start, end, new in changes(node, lines):
                raw = lines[number].encode()
                changed = (raw[:start] + new.encode() + raw[end:]).decode()
                if (number, changed) in seen or not lines[number].isascii():
                    continue
                seen.add((number, changed))
                found = unique(text, lines, number, changed)
                if found:
                    yield found


def unique(text: str, lines: list[str], number: int, changed: str) -> tuple[str, str] | None:
    """The line, with as many lines before it as make it unique."""
    for low in range(number, max(number - 4, -1), -1):
        old = "\n".join(lines[low : number + 1]).lstrip()
        if text.count(old) == 1:
            return old, "\n".join([*lines[low:number], changed]).lstrip()
    return None


def quoted(text: str) -> str:
    """As a string of TOML."""
    if "\n" in text or '"' in text or "\\" in text:
        return f"'''{text}'''"
    return f'"{text}"'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    files = sorted(f for p in asked.path for f in ([p] if p.is_file() else p.rglob("*.py")))
    found = [(f, *texts) for f in files for texts in proposals(f)]
    random.Random(asked.seed).shuffle(found)
    for file, old, new in sorted(found[: asked.count]):
        name = file.resolve().relative_to(ROOT)
        print(f'[[mutant]]\nfile = "{name}"\nold = {quoted(old)}\nnew = {quoted(new)}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
