"""What the benches share: two threads, the race between contestants, the tables, the rows.

python -m pytest bench                                     tables of ratios and goals at the end
python -m pytest bench --record bench/results/cpu.csv      and the rows appended there
python -m pytest bench --tiny                              small sizes: whether all of it runs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import cases, goals, report, rows

MEASURED: list[rows.Row] = []
VERDICTS: list[goals.Verdict] = []
NOTES: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="append the rows to this CSV file")
    parser.addoption("--threads", type=int, default=rows.THREADS, help="threads of torch")
    parser.addoption("--tiny", action="store_true", help="small sizes; the times mean nothing")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("tiny") and config.getoption("record"):
        raise pytest.UsageError("--tiny: rows of small sizes are not recorded, got --record too")
    for what in (
        "ignore::DeprecationWarning",  # torch.compile itself calls what it deprecates
        "ignore::FutureWarning",
        "ignore:.*performance drop.*:UserWarning",  # vmap falls back to a loop
    ):
        config.addinivalue_line("filterwarnings", what)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --tiny all sizes are one."""
    if not config.getoption("tiny"):
        return
    kept = {}
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        others = tuple(str(v) for k, v in sorted(params.items()) if k not in ("shape", "rank"))
        kept.setdefault((item.nodeid.split("[")[0], others), item)
    items[:] = kept.values()


@pytest.fixture(autouse=True)
def _prepare(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same threads and seed for all, no compiled graphs of other benches; then the rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("threads"))
    torch.manual_seed(0)
    torch.compiler.reset()
    begin = len(MEASURED)
    yield
    torch.set_num_threads(before)
    path = request.config.getoption("record")
    if path is not None and MEASURED[begin:]:
        rows.append(path, MEASURED[begin:])


@pytest.fixture
def tiny(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("tiny"))


@pytest.fixture
def record() -> Callable[[list[rows.Row]], None]:
    """Puts down rows."""
    return MEASURED.extend


@pytest.fixture
def note() -> Callable[[str], None]:
    """Says a line under the tables."""
    return NOTES.append


@pytest.fixture
def race(benchmark: Any, tiny: bool) -> Callable[[cases.Case], cases.Measured]:
    """Times a case, puts down rows, ratios and verdicts; and its first contestant alone."""

    def run(case: cases.Case) -> cases.Measured:
        done = cases.measure(case, seconds=0.01 if tiny else 3.0, least=1 if tiny else 3)
        MEASURED.extend(done.rows())
        VERDICTS.extend(done.verdicts)
        benchmark.group = f"{case.op} {case.mode}"
        benchmark.extra_info["ratios"] = done.ratios
        benchmark.extra_info["medians_us"] = {name: t.median for name, t in done.times.items()}
        alone(benchmark, next(iter(case.fast.items())), done.times, tiny)
        return done

    return run


def alone(benchmark: Any, contestant: tuple[str, Any], times: Any, tiny: bool = False) -> None:
    """The absolute time of one contestant, by pytest-benchmark."""
    name, call = contestant
    repeats = max(1, round(2000 / times[name].median))
    benchmark.pedantic(call, rounds=2 if tiny else 20, iterations=repeats)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not MEASURED:
        return
    path = config.getoption("record")
    if path is not None:
        terminalreporter.write_line(f"{len(MEASURED)} rows appended to {path}")
    here = rows.environment()
    terminalreporter.write_line(report.render([{**here, **line} for line in MEASURED]))
    for line in [verdict.line() for verdict in VERDICTS] + NOTES:
        terminalreporter.write_line(line)
