"""Orders of many causes: 200 variables and 20,000 samples, as in `causes`, with time and memory.

SCORE is left out: one of its kernels of 20,000 x 20,000 x 200 entries takes 640 GB in float64. The
Jacobian of DiffAN takes a product for each variable, so it sees fewer rows.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from . import causes


def run(quick: bool = False) -> dict[str, Any]:
    """The table. A full run takes about four CPU minutes."""
    settings: dict[str, Any] = {"size": 6 if quick else 200, "edges": 6 if quick else 400}
    settings |= {"rows": 100 if quick else 20_000, "seed": 0, "width": 128}
    settings |= {"first": 4 if quick else 1500, "more": 2 if quick else 25, "every": 4}
    settings |= {"rows_of_head": 1000, "rows_of_jacobian": 10 if quick else 100}
    draw = torch.Generator().manual_seed(settings["seed"])
    edges = causes.graph(settings["size"], settings["edges"], draw)
    x0 = causes.samples(edges, settings["rows"], draw)
    steps = settings["first"] + settings["more"] * ((settings["size"] - 2) // settings["every"])
    ways: dict[str, tuple[bool, int, int, int]] = {
        "head, masks": (True, steps, 0, settings["rows_of_head"]),
        "head, trained on": (True, settings["first"], settings["more"], settings["rows_of_head"]),
        "DiffAN": (False, steps, 0, settings["rows_of_jacobian"]),
    }
    chance = causes.errors(edges, torch.randperm(len(edges), generator=draw))
    rows: list[dict[str, Any]] = [{"by": "chance", "errors": chance}]
    for name, (head, first, more, seen) in ways.items():
        began = time.process_time()
        options: dict[str, int] = {"every": settings["every"], "rows": seen}
        width, seed = settings["width"], settings["seed"]
        order = causes.network_order(x0, head, first, more, width, seed, **options)
        spent = round(time.process_time() - began, 1)
        # The most that the process has taken so far, in all: the ways come in rising order.
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        wrong = causes.errors(edges, order)
        rows.append({"by": name, "errors": wrong, "cpu_seconds": spent, "peak_gib": peak})
    return {"settings": settings, "edges": int(edges.sum()), "rows": rows}
