"""Figures as JSON takes them."""

from __future__ import annotations

import math
from typing import Any


def plain_json(value: Any) -> Any:
    """The same with None for every number that JSON lacks, NaN and infinity."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
