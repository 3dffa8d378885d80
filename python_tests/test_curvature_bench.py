"""The measurement of curvature runs in small."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_the_measurement_of_curvature_runs_in_small():
    from bench.instruments import curvature

    found = curvature.run(quick=True)
    assert [row["sigma"] for row in found["rows"]] == list(curvature.SIGMAS)
    for row in found["rows"]:
        assert set(row["auroc"]) >= {"score", "trace of the change"}
        assert all(0 <= value <= 1 for value in row["auroc"].values())
