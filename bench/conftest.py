"""What the benches share: two threads, the race between contestants, the table, the rows.

python -m pytest bench                                     a table of ratios at the end
python -m pytest bench --record bench/results/cpu.csv      and the rows appended there
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import report, timer

ROWS: list[dict[str, str]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="append the rows to this CSV file")
    parser.addoption("--threads", type=int, default=timer.THREADS, help="threads of torch")


@pytest.fixture(autouse=True)
def _prepare(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same threads and seed for all; graphs compiled by other benches are forgotten."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("threads"))
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """Where a bench puts its rows."""
    return ROWS


@pytest.fixture
def race(benchmark: Any, rows: list[dict[str, str]]) -> Callable[..., dict[str, timer.Timing]]:
    """Times contestants interleaved, puts down rows and ratios; and "hos_ext" alone."""

    def run(
        op: str,
        mode: str,
        shape: tuple[int, int, int],
        contestants: dict[str, Callable[[], Any]],
        slow: dict[str, Callable[[], Any]] | None = None,
    ) -> dict[str, timer.Timing]:
        times = timer.measure(contestants)
        ratios = {name: t.median / times["hos_ext"].median for name, t in times.items()}
        if slow:  # apart: a contestant of seconds would leave the others few rounds and cold caches
            pair = {"hos_ext": contestants["hos_ext"], **slow}
            apart = timer.measure(pair, sample=0.05, least=3)
            ratios |= {name: apart[name].median / apart["hos_ext"].median for name in slow}
            times |= {name: apart[name] for name in slow}
        rows.extend(timer.row(op, name, mode, shape, timing=t) for name, t in times.items())
        benchmark.group = f"{op} {mode}"
        benchmark.extra_info["ratios"] = ratios
        benchmark.extra_info["medians_us"] = {name: t.median for name, t in times.items()}
        repeats = max(1, round(2000 / times["hos_ext"].median))
        benchmark.pedantic(contestants["hos_ext"], rounds=20, iterations=repeats)
        return times

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not ROWS:
        return
    path = config.getoption("record")
    if path is not None:
        timer.append_rows(path, ROWS)
        terminalreporter.write_line(f"{len(ROWS)} rows appended to {path}")
    here = timer.environment()
    terminalreporter.write_line(report.render([{**here, **line} for line in ROWS]))
