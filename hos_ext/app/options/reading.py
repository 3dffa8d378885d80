"""Options as they are typed or written in a file: read by name, and made of their kinds."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checks import check, require
from .table import OPTIONS

FORMAT = "hos_ext run 1"  # of run.json
_MOST_VALUES = 10_000  # in a file of options


def read_config(path: Path) -> dict[str, Any]:
    """Options of a YAML, TOML or JSON file, or those of a run.json, checked.

    Args:
        path: its ending, .yaml, .yml, .toml or .json, says what it is.

    Returns:
        The options it gives, and "out" if it gives that.

    Raises:
        ValueError, TypeError: not such a file, an unknown option, or a value of the wrong kind.
        OSError: it cannot be read.
        RuntimeError: the parser of its kind is missing.
    """
    parsers = {".json": "json", ".toml": "tomllib", ".yaml": "yaml", ".yml": "yaml"}
    check("read_config", path.suffix in parsers, f"path must end in {', '.join(parsers)}", path)
    name = parsers[path.suffix]
    if name == "tomllib" and sys.version_info < (3, 11):
        name = "tomli"
    module = require("read_config", name)
    broken = module.YAMLError if name == "yaml" else ValueError
    raw = path.read_bytes()
    try:
        text = raw.decode()
        content = module.safe_load(text) if name == "yaml" else module.loads(text)
    except (broken, ValueError, RecursionError) as error:
        kind = path.suffix[1:]
        raise ValueError(f"read_config: {path} must be whole {kind}, got: {error}") from error
    rule = f"{path} must hold at most {_MOST_VALUES} values"
    check("read_config", _few(content), rule, "more")
    if isinstance(content, dict) and content.get("format") == FORMAT:
        content = content.get("options")
    rule = f"{path} must hold options by name"
    check("read_config", isinstance(content, dict), rule, repr(content))
    try:
        return read_options(content)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{error} in {path}") from None


def _few(content: Any) -> bool:
    """Whether content can be shown: a few aliases of YAML stand for billions of values."""
    left, count = [content], 0
    while left and count <= _MOST_VALUES:
        node = left.pop()
        count += 1
        if isinstance(node, dict | list):
            inside = [*node, *node.values()] if isinstance(node, dict) else node
            left += inside[: _MOST_VALUES + 1]
    return count <= _MOST_VALUES


def read_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, each made of its kind; "out" may be among them.

    A float may come as a string (YAML reads 1e-3 as one), a list of numbers as "0.1,1.2" or as one
    number, a name with hyphens.

    Raises:
        ValueError: an unknown name, or text where numbers must be.
        TypeError: a value of another kind.
    """
    values = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in OPTIONS and name != "out":
            near = difflib.get_close_matches(name, [*OPTIONS, "out"], n=1, cutoff=0.0)
            raise ValueError(f"options: name must be known (the nearest is {near[0]}), got {key}")
        kind, default = OPTIONS[name][:2] if name in OPTIONS else (str, None)
        values[name] = None if value is None and default is None else _of_kind(name, value, kind)
    return values


def _of_kind(name: str, value: Any, kind: type) -> Any:
    """The value made of a kind."""
    if kind is list:
        items = value.split(",") if isinstance(value, str) else value
        return [_number(name, v) for v in (items if isinstance(items, list | tuple) else [items])]
    if kind is float:
        return float(_number(name, value))
    good = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    check("options", good, f"{name} must be of kind {kind.__name__}", repr(value), TypeError)
    return value


def _number(name: str, value: Any) -> int | float:
    """A number, or the text of one."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"options: {name} must be made of numbers, got {value!r}") from None
        return int(number) if number.is_integer() else number
    good = isinstance(value, int | float) and not isinstance(value, bool)
    check("options", good, f"{name} must be made of numbers", repr(value), TypeError)
    plain: int | float = value
    return plain
