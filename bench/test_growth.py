"""How time and memory grow: linear in B, D and r, where D x D matrices grow as D^2."""

from __future__ import annotations

from typing import Any

import pytest

from . import memory, peers, timer

BASE = (32, 784, 20)
HALVED = [(16, 784, 20), (32, 392, 20), (32, 784, 10)]
OP = "d2sm_vr_loss"
MODE = "forward+backward"


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [("hos_ext", (256, 512, 1024, 2048, 4096)), ("dense", (128, 256, 512))],
)
def test_time_over_size(
    benchmark: Any, rows: list[dict[str, str]], variant: str, sizes: tuple[int, ...]
) -> None:
    """B = 16, r = 20; the exponent of D is left in extra_info."""
    loss = peers.d2sm_vr_losses()[variant]
    steps = {
        str(size): peers.forward_backward(loss, peers.second_order_inputs(16, size, 20, points=3))
        for size in sizes
    }
    times = timer.measure(steps, sample=0.02)
    rows.extend(
        timer.row(OP, variant, MODE, (16, size, 20), timing=times[str(size)]) for size in sizes
    )
    medians = [times[str(size)].median for size in sizes]
    benchmark.group = "growth of time with D"
    benchmark.extra_info["exponent"] = timer.fitted_exponent(sizes, medians)
    benchmark.pedantic(steps[str(sizes[-1])], rounds=5, iterations=1)


@pytest.mark.parametrize("variant", ["hos_ext", "eager", "lean", "dense"])
def test_peak_memory(rows: list[dict[str, str]], variant: str) -> None:
    """Peak extra memory at the base size and with each of B, D and r halved."""
    peaks = {shape: memory.peak_mib(variant, OP, shape) for shape in (BASE, *HALVED)}
    rows.extend(timer.row(OP, variant, MODE, shape, peak_mib=peak) for shape, peak in peaks.items())
    if variant == "hos_ext":
        for shape in HALVED:
            assert peaks[BASE] / peaks[shape] < 2.5, "more than linear in B, D or r"
