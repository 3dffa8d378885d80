"""The bench of the Metropolis rules runs, and finds the order of the rules that it is about."""

from __future__ import annotations

import pytest

from bench.instruments import metropolis


@pytest.mark.slow
def test_a_quick_run_finds_exactness_where_it_is_claimed():
    found = metropolis.run(quick=True)
    for rows in found["line"].values():
        bias = {(row["rule"], row["s2"]): row["bias"] for row in rows}
        exact = [bias[name, False] for name in ("log_prob", "two_coin, nodes 0")]
        assert max(exact) < 1e-9
        assert bias["trapezoid", False] > 5 * bias["trapezoid", True] > 1e-3
        assert bias["trapezoid", False] > 10 * bias["simpson", False]
        assert bias["simpson", False] > 3 * bias["lobatto-2", False]
        # At as many evaluations the ends are worth having.
        assert bias["legendre-2", False] > 3 * bias["lobatto-2", False]
    rows = {(row["rule"], row["step_size"]): row["rms_error"] for row in found["digits"]["rows"]}
    assert min(h for _, h in rows) > 0
    assert all(error < 0.1 for error in rows.values())
