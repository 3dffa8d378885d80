"""The benches' contestants compute the same things, and their timer interleaves them."""

from __future__ import annotations

import pytest
import torch

from bench import memory, peers, quick, report, timer

SMALL = (3, 7, 2)


@pytest.mark.parametrize(("op", "points"), [("d2sm_loss", 1), ("d2sm_vr_loss", 3)])
def test_losses_agree_in_value_and_gradients(op, points):
    inputs = peers.second_order_inputs(*SMALL, points=points)
    losses = memory.LOSSES[op][1]()
    results = {
        name: peers.forward_backward(loss, inputs)()
        for name, loss in losses.items()
        if "compiled" not in name
    }
    assert list(results) == ["hos_ext", "eager", "lean", "dense"]
    timer.agree(results, against="dense", rtol=2e-5)


def test_every_repetition_of_a_step_gives_the_same_gradients():
    step = peers.forward_backward(
        peers.d2sm_losses()["hos_ext"], peers.second_order_inputs(*SMALL, points=1)
    )
    first = [t.clone() for t in step()]
    timer.agree({"first": first, "second": step()}, against="first", rtol=0.0)


def test_ozaki_steps_draw_their_noise_and_a_wrong_deviation_is_refused():
    torch.manual_seed(0)
    inputs = peers.step_inputs(200, 50)
    steps = peers.ozaki_steps(inputs, 0.1)
    del steps["compiled"]
    with torch.no_grad():
        peers.check_ozaki_steps(steps, inputs, 0.1)
        with pytest.raises(
            ValueError,
            match=r"^check_ozaki_steps: noise of hos_ext must have mean 0 and variance 1, got ",
        ):
            peers.check_ozaki_steps({"hos_ext": steps["hos_ext"]}, inputs, 0.15)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.ones(2)], "agree: b must give 2 tensors like a, got 1"),
        (
            [torch.ones(2), torch.ones(2)],
            r"agree: b must give tensor 1 of shape \(3,\) like a, got \(2,\)",
        ),
        (
            [torch.ones(2), torch.full((3,), 1.01)],
            "agree: b must give tensor 1 within 0.001 of a, got an error of 0.01 at a scale of 1",
        ),
        (
            [torch.full((2,), torch.nan), torch.ones(3)],
            "agree: b must give tensor 0 within 0.001 of a, got an error of nan at a scale of 1",
        ),
    ],
)
def test_disagreement_is_refused_by_name(tensors, message):
    results = {"a": [torch.ones(2), torch.ones(3)], "b": tensors}
    with pytest.raises(ValueError, match=f"^{message}$"):
        timer.agree(results, against="a", rtol=1e-3)


class Machine:
    """A clock that only contestants move, and the order in which they ran."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[str] = []

    def contestant(self, name, cost):
        """Costs `cost(n)` microseconds the n-th time."""

        def call():
            self.now += 1000 * cost(self.log.count(name))
            self.log.append(name)

        return call

    def clock(self):
        return self.now


def test_each_round_runs_every_contestant_once_in_changing_order():
    machine = Machine()
    contestants = {name: machine.contestant(name, lambda n: 5) for name in "abc"}
    calls = {"a": 1, "b": 2, "c": 3}
    samples = timer.interleave(contestants, rounds=40, calls=calls, clock=machine.clock)
    assert samples == {name: [5.0] * 40 for name in "abc"}
    rounds = ["".join(machine.log[i : i + 6]) for i in range(0, len(machine.log), 6)]
    assert len(rounds) == 40
    assert set(rounds) == {"abbccc", "acccbb", "bbaccc", "bbccca", "cccabb", "cccbba"}


def test_a_disturbance_over_whole_rounds_leaves_the_ratio():
    machine = Machine()
    slow_spell = {n: 10 if n < 20 else 1 for n in range(1000)}
    contestants = {
        "fast": machine.contestant("fast", lambda n: 2 * slow_spell[n]),
        "slow": machine.contestant("slow", lambda n: 6 * slow_spell[n]),
    }
    samples = timer.interleave(
        contestants, rounds=50, calls={"fast": 1, "slow": 1}, clock=machine.clock
    )
    fast, slow = (timer.quartiles(samples[name]) for name in ("fast", "slow"))
    assert [s / f for s, f in zip(slow, fast, strict=True)] == [3.0, 3.0, 3.0]


def test_measure_repeats_fast_calls_and_keeps_the_best_of_three_medians():
    machine = Machine()
    # Two calls to calibrate, then three blocks of five rounds.
    slow = [3000] * 2 + [4000] * 5 + [3000] * 5 + [5000] * 5
    contestants = {
        "fast": machine.contestant("fast", lambda n: 10),
        "slow": machine.contestant("slow", lambda n: slow[n]),
    }
    times = timer.measure(contestants, seconds=0, sample=1e-3, clock=machine.clock)
    assert times == {"fast": (10.0, 10.0, 10.0), "slow": (3000.0, 3000.0, 3000.0)}
    assert machine.log.count("slow") == 2 + 3 * 5
    assert machine.log.count("fast") == 2 + 3 * 5 * 100


def test_quartiles_and_exponent_match_closed_forms():
    assert timer.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timer.quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert timer.fitted_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)


def test_rows_are_appended_under_one_header_and_rendered(tmp_path):
    path = tmp_path / "cpu.csv"
    for median in (4.0, 2.0):  # the last row of a case counts
        timing = timer.Timing(1.0, median, 5.0)
        timer.append_rows(path, [timer.row("op", "hos_ext", "forward", (10, 2, 0), timing=timing)])
    other = timer.row(
        "op", "eager", "forward", (10, 2, 0), timing=timer.Timing(6.0, 7.0, 8.0), peak_mib=1.5
    )
    timer.append_rows(path, [other])
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(timer.COLUMNS)
    assert len(lines) == 4
    assert lines[3].endswith("op,eager,forward,float32,10,2,0,6.00,7.00,8.00,1.50")
    table = report.render(report.read(path))
    assert "| op | forward | float32 | 10 | 2 | 0 | 2.0 | 7.0 (3.5x) |" in table
    assert "| op | forward | float32 | 10 | 2 | 0 | 1.5 |" in table


def test_rows_do_not_join_a_file_with_other_columns(tmp_path):
    path = tmp_path / "cpu.csv"
    path.write_text("date,op\n")
    with pytest.raises(ValueError, match=r"append_rows: .*cpu.csv must have the columns date,comm"):
        timer.append_rows(path, [])


def test_bars_are_missed_beyond_the_slack():
    assert quick.Bar("ratio", 2.13, "x", at_least=2.5).holds()
    assert not quick.Bar("ratio", 2.12, "x", at_least=2.5).holds()
    assert quick.Bar("time", 11.4, "us", at_most=10).holds()
    assert not quick.Bar("time", 11.6, "us", at_most=10).holds()
    assert not quick.Bar("time", float("nan"), "us", at_most=10).holds()
    assert quick.Bar("time", 1e9, "us").holds()
