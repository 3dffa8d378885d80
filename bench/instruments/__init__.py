"""Measured comparisons of docs/instruments.md: one module an instrument, with `run(quick)`.

Run: python -m bench.instruments NAME
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from ..rows import ROOT


def example(name: str) -> ModuleType:
    """A script of `examples/`, for its networks and data."""
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
