"""The benches' contestants compute the same things, and their timer interleaves them."""

from __future__ import annotations

import pytest
import torch

import hos_ext
from bench import (
    cases,
    floors,
    goals,
    gpu,
    growth,
    libraries,
    memory,
    networks,
    peers,
    plots,
    ptxas,
    quick,
    recorded,
    report,
    rows,
    speed_page,
    timer,
)

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
    fast, slow = (timer.summarise(samples[name]) for name in ("fast", "slow"))
    assert [s / f for s, f in zip(slow, fast, strict=True)] == pytest.approx([3.0] * 4)


def test_measure_repeats_fast_calls_and_keeps_the_best_of_three_medians():
    machine = Machine()
    # Two calls to calibrate, then three blocks of five rounds.
    slow = [3000] * 2 + [4000] * 5 + [3000] * 5 + [5000] * 5
    contestants = {
        "fast": machine.contestant("fast", lambda n: 10),
        "slow": machine.contestant("slow", lambda n: slow[n]),
    }
    times = timer.measure(contestants, seconds=0, sample=1e-3, clock=machine.clock)
    assert times == {"fast": (10.0,) * 4, "slow": (3000.0,) * 4}
    assert machine.log.count("slow") == 2 + 3 * 5
    assert machine.log.count("fast") == 2 + 3 * 5 * 100


def test_percentiles_and_exponent_match_closed_forms():
    values = [float(n) for n in range(11)]
    assert timer.summarise(values[::-1]) == (2.0, 5.0, 8.0, 5.0)
    assert timer.summarise([7.0]) == (7.0, 7.0, 7.0, 7.0)
    assert timer.fitted_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)


def test_forward_calls_build_no_graph():
    inputs = [t.requires_grad_() for t in peers.second_order_inputs(*SMALL, points=3)[:3]]
    inputs += peers.second_order_inputs(*SMALL, points=3)[3:]
    (value,) = peers.forward(peers.d2sm_vr_losses()["hos_ext"], inputs)()
    assert not value.requires_grad


# ----------------------------------------------------------------------------------- goals and gate


GOAL = goals.Goal("op", "forward", (1, 2, 3), ("eager", "lean"), at_least=2.5)


def test_a_goal_takes_the_fastest_rival():
    medians = {"hos_ext": 2.0, "eager": 8.0, "lean": 6.0, "dense": 1.0}
    assert GOAL.figure(medians) == 3.0
    assert GOAL.figure({"hos_ext": 2.0, "eager": 8.0}) is None
    assert GOAL.reached(2.5)
    assert not GOAL.reached(2.49)
    assert not GOAL.reached(float("nan"))
    assert GOAL.best([2.0, 3.0]) == 3.0
    assert goals.Verdict(GOAL, None).reached is None
    assert goals.Verdict(GOAL, 2.12).line().endswith("2.12   >= 2.5x NOT REACHED")
    assert goals.Verdict(GOAL, 2.52).line().endswith("2.52   >= 2.5x reached")
    assert goals.Verdict(GOAL, None).line().endswith("not measured   >= 2.5x")


def test_goals_of_time_and_of_sums():
    time = goals.Goal("op", "forward", (1, 2, 3), (), at_most=6)
    assert time.figure({"hos_ext": 6.5}) == 6.5
    assert time.reached(6.0)
    assert not time.reached(6.01)
    assert not time.reached(float("nan"))
    assert time.best([7.0, 6.5]) == 6.5
    both = goals.Goal("op", "forward", (1, 2, 3), ("a", "b"), at_most=1.1, own="both")
    assert both.figure({"a": 1.0, "b": 3.0, "both": 5.0}) == 1.25


def test_the_goals_are_those_of_each_case_once():
    keys = [(*goal[:4], goal.own) for goal in goals.GOALS]
    assert len(set(keys)) == len(keys)
    for goal in goals.GOALS:
        assert (goal.at_least is None) != (goal.at_most is None)
    ratios = {g.against: g.at_least for g in goals.GOALS if g[:3] == cases_of(32, 784, 20)}
    assert ratios == {("eager",): 9, ("compiled",): 3.5, ("dense",): 500}


def cases_of(*shape):
    return ("d2sm_vr_loss", goals.BOTH, shape)


def test_contestants_timed_apart_are_judged_together():
    """ "eager" from the first group, "dense" from the second, each with the hos_ext beside it."""
    together = {"hos_ext": 1.0, "eager": 9.5, "compiled": 4.0}
    apart = {"hos_ext": 2.0, "dense": 600.0}
    found = goals.judge(*cases_of(32, 784, 20), together, apart)
    assert {v.goal.against: v.figure for v in found} == {
        ("eager",): 9.5,
        ("compiled",): 4.0,
        ("dense",): 300.0,
    }
    assert [v.reached for v in found] == [True, True, False]


def fake_measurement(*ratios):
    """In place of `cases.measure`: rivals take `ratio` times as long, one ratio a measurement."""
    count = dict.fromkeys((goal[:3] for goal in goals.GOALS), 0)

    def measure(case, **_):
        ratio = ratios[min(count[case[:3]], len(ratios) - 1)]
        count[case[:3]] += 1
        medians = dict.fromkeys(case.fast, ratio) | {"hos_ext": 1.0, "hos_ext out=": 1.0}
        return cases.Measured(case, {}, {}, goals.judge(*case[:3], medians))

    return measure


def fake_build(op, mode, shape, only=None):
    return cases.Case(op, mode, shape, dict.fromkeys(only), {}, None)


@pytest.fixture
def gate(monkeypatch, capsys, tmp_path):
    """The gate with measurements that are made up: its exit code, and what it prints."""
    monkeypatch.setattr(cases, "build", fake_build)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(recorded, "PATH", tmp_path / "recorded.csv")
    monkeypatch.setattr(rows, "ROOT", tmp_path)

    def run(*arguments, ratios, memory_ratio=2.0):
        def peak_mib(kind, op, variant, *shape):
            return 10.0 if shape == quick.SHAPE else 10.0 / memory_ratio

        monkeypatch.setattr(memory, "peak_mib", peak_mib)
        monkeypatch.setattr(cases, "measure", fake_measurement(*ratios))
        return quick.main(list(arguments)), capsys.readouterr().out

    return run


QUICKLY = [goal for goal in goals.GOALS if goal.quick]
AGAINST = [goal for goal in QUICKLY if goal.against]


def test_the_gate_compares_with_what_was_recorded(gate):
    code, text = gate("--record", ratios=[4.0])
    assert code == 0
    assert f"{len(QUICKLY)} figures of {recorded.level()} recorded" in text
    for ratio, expected in ((4.0, 0), (3.41, 0), (3.39, 1), (100.0, 0)):
        code, text = gate(ratios=[ratio])
        assert code == expected
        assert text.count(" SLOWER") == expected * sum(g.at_least is not None for g in QUICKLY)
        assert ("nothing is worse than recorded (slack 15%)" in text) == (expected == 0)
        lines = [line for line in text.splitlines() if line.endswith((" ok", "SLOWER"))]
        assert len(lines) == len(QUICKLY) + 3
    assert "d2sm_vr_loss forward (8, 784, 200): eager over hos_ext" in text
    assert "d2sm_vr_loss forward (8, 784, 200): compiled" not in text


def test_what_is_slower_once_alone_passes(gate):
    gate("--record", ratios=[4.0])
    assert gate(ratios=[2.0, 2.0, 4.0])[0] == 0
    assert gate(ratios=[2.0, 2.0, 2.0, 4.0])[0] == 1


def test_a_goal_that_is_not_reached_fails_nothing(gate):
    gate("--record", ratios=[2.0])
    code, text = gate(ratios=[2.0])
    assert code == 0
    listed = text.split("goals not reached (they fail nothing):\n")[1].splitlines()
    missed = [line for line in listed if line.startswith("  ")]
    assert len(missed) == sum(g.at_least is not None and g.at_least > 2 for g in QUICKLY)


def test_memory_that_grows_faster_fails_the_gate(gate):
    gate("--record", ratios=[4.0])
    code, text = gate(ratios=[4.0], memory_ratio=2.3)
    assert code == 1
    assert text.count(" MORE") == 3


def test_a_processor_without_figures_is_told_how_to_record_them(gate):
    code, text = gate(ratios=[4.0])
    assert code == 0
    assert f"{len(QUICKLY)} cases have no figure for {recorded.level()}" in text
    assert "--record" in text


def test_recorded_figures_are_kept_by_level(tmp_path):
    path = tmp_path / "recorded.csv"
    recorded.write({"a": 2.0, "b": 3.0}, "x86-64-v3", path)
    recorded.write({"a": 5.0}, "x86-64-v4", path)
    recorded.write({"a": 2.5}, "x86-64-v3", path)
    assert recorded.figures("x86-64-v3", path) == {"a": 2.5, "b": 3.0}
    assert recorded.figures("x86-64-v4", path) == {"a": 5.0}
    assert recorded.figures("neon", path) == {}
    assert [each.name for each in tmp_path.iterdir()] == ["recorded.csv"]


def test_the_median_of_three_measurements_is_recorded(gate, tmp_path):
    gate("--record", ratios=[4.0, 9.0, 5.0])
    found = recorded.figures(recorded.level(), tmp_path / "recorded.csv")
    assert {found[goal.describe()] for goal in AGAINST if goal.at_least is not None} == {5.0}


def test_recorded_cases_are_cases_of_today():
    known = {goal.describe() for goal in goals.GOALS}
    assert {case for _, case in recorded.read()} <= known


# ------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize(
    ("op", "mode"),
    [("d2sm_vr_loss", goals.BOTH), ("d2sm_vr_loss", goals.FORWARD), ("d2sm_loss", goals.BOTH)],
)
def test_losses_are_checked_before_they_are_timed(monkeypatch, op, mode):
    only = {"hos_ext", "lean", "dense"}
    case = cases.build(op, mode, SMALL, only=only)
    assert set(case.fast) == {"hos_ext", "lean"}
    assert set(case.slow) == ({"dense"} if mode == goals.BOTH else set())
    wrong = {name: lambda *inputs: inputs[0].sum() for name in ("hos_ext", "eager", "dense")}
    wrong["eager"] = lambda *inputs: 1.01 * inputs[0].sum()
    monkeypatch.setattr(peers, f"{op}es", lambda: dict(wrong))
    monkeypatch.setattr(peers, "forward_backward", peers.forward)
    with pytest.raises(ValueError, match=r"^agree: hos_ext must give tensor 0 within 0\.0001"):
        cases.build(op, mode, SMALL, only={"hos_ext"})


def test_the_dense_formulation_is_left_out_by_its_size():
    assert cases.dense_bytes((16, 3072, 20)) > cases.MEMORY_LIMIT > cases.dense_bytes((64, 784, 50))
    for axis in growth.LINES:
        kept = growth.shapes(axis, dense=True)
        assert kept == growth.shapes(axis)[: len(kept)]
    largest = growth.shapes("D", dense=True)[-1][1]
    assert largest < growth.dense_end("D") < growth.shapes("D")[-1][1] == 3 * 256 * 256


@pytest.mark.parametrize(
    ("op", "mode", "names"),
    [
        ("ozaki_step", goals.FORWARD, ["hos_ext", "hos_ext out=", "hos_ext unseeded", "eager"]),
        ("ozaki_step", goals.BOTH, ["hos_ext", "eager"]),
        ("assemble_hessian", goals.FORWARD, ["hos_ext", "bmm", "baddbmm", "bmm out="]),
        ("alternating, fine", goals.FORWARD, ["torch", "hos_ext", "both"]),
    ],
)
def test_cases_are_measured_and_become_rows(monkeypatch, op, mode, names):
    monkeypatch.setattr(cases.floors, "floor_us", lambda work: 2.0)
    timing = timer.Timing(3.0, 4.0, 5.0, 4.0)
    monkeypatch.setattr(timer, "measure", lambda steps, **_: dict.fromkeys(steps, timing))
    case = cases.build(op, mode, goals.TINY if "step" in op else SMALL, only=set(names))
    measured = cases.measure(case)
    assert list(measured.times) == names
    assert set(measured.ratios.values()) == {1.0}
    lines = measured.rows()
    assert [line["variant"] for line in lines] == names
    assert {line["us_p50"] for line in lines} == {"4"}
    assert {line["share_of_floor"] for line in lines} == ({"0.5"} if case.work else {""})


def test_floors_count_what_cannot_be_left_out():
    both = floors.d2sm_loss((32, 784, 20), points=3, backward=True)
    # One reading and one writing of three factors, and little else.
    assert both.moved == pytest.approx(24 * 32 * 784 * 20, rel=0.15)
    # Two Gram matrices by half and two products V G: the rest is a tenth of it.
    gram = 32 * 784 * (2 * 21 * 22 + 4 * 21 * 21)
    assert both.flops == pytest.approx(gram, rel=0.3)
    half = floors.d2sm_loss((32, 784, 20), points=3, backward=False)
    assert half.moved < 0.6 * both.moved
    assert half.flops < both.flops
    assert floors.step((10, 2, 0)).moved == 16 * 20
    assert floors.assembly((2, 10, 3)).moved == 4 * 2 * (100 + 30 + 10)


# ---------------------------------------------------------------------------------------- networks


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch itself
@pytest.mark.parametrize(("network", "dims", "rows_"), [("MLP", (6,), 6), ("UNet", (1, 4, 4), 2)])
def test_derivatives_of_a_score_network_agree(monkeypatch, network, dims, rows_):
    monkeypatch.setitem(networks.DIMS, network, dims)
    monkeypatch.setattr(networks, "BATCH", 2)
    x, score = networks.points(network), networks.score_network(network)
    wanted = networks.row_loop(score, x, rows_)
    assert wanted.shape == (2, rows_, x[0].numel())
    assert wanted.abs().max() > 1e-3
    results = {"loop": [wanted], "reverse": [networks.reverse(score, x, rows_, 4)]}
    timer.agree(results, against="loop", rtol=1e-4)
    columns = networks.forward(score, x, rows_, 4)
    block = {"loop": [wanted[:, :, :rows_]], "forward": [columns[:, :, :rows_].mT]}
    timer.agree(block, against="loop", rtol=1e-4)


def test_hutchinson_estimates_the_diagonal():
    x, score = networks.points("MLP"), networks.score_network("MLP")
    whole = networks.row_loop(score, x, 100)
    exact = whole.diagonal(0, 1, 2)
    torch.manual_seed(0)
    estimate = networks.hutchinson(score, x, 500, 100)
    error = ((whole.square().sum(2) - exact.square()) / 500).sqrt()
    assert ((estimate - exact).abs() < 6 * error).all()


def test_the_head_as_factor_matrices_and_diagonal():
    x = torch.randn(3, 5)
    own = networks.model("MLP", (5,), 2)
    found = networks.head(own, x)
    dense = torch.diag_embed(found.diag) + found.factor @ found.factor.mT
    results = {"dense": [dense], "assembled": [networks.assembled(own, x)]}
    timer.agree(results, against="dense", rtol=1e-5)
    diagonals = {"dense": [dense.diagonal(0, 1, 2)], "head": [networks.head_diagonal(own, x)]}
    timer.agree(diagonals, against="dense", rtol=1e-5)


def test_the_time_of_a_share_of_the_work_becomes_that_of_the_whole():
    timing = timer.Timing(3.0, 4.0, 5.0, 4.0)
    shared = networks.Scaled(None, "Hessian", times=10, forward=True)
    assert shared.whole(timing, 1.0) == (21.0, 31.0, 41.0, 31.0)
    apart = networks.Scaled(None, "Hessian", times=10)
    assert apart.whole(timing, 1.0) == (30.0, 40.0, 50.0, 40.0)


def test_training_steps_descend_alike():
    steps = networks.training_steps("MLP", 2, dims=(6,), batch=4)
    for _ in range(3):
        results = {name: [steps[name]()] for name in ("hos_ext", "dense")}
        timer.agree(results, against="dense", rtol=1e-4)
    first = networks.training_steps("MLP", 2, dims=(6,), batch=4)
    alone = {"step": [first["hos_ext"]()], "loss": [first["hos_ext loss"]()]}
    timer.agree(alone | {"dense": [first["dense loss"]()]}, against="step", rtol=1e-4)


def test_sampling_steps_run():
    steps = networks.sampling_steps("MLP", 2, dims=(6,), batch=4)
    assert list(steps) == ["network", "langevin", "ozaki", "cayley", "dense"]
    for name in list(steps)[1:]:
        assert steps[name]().draws.shape == (4, 1, 6)


def test_a_peer_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(libraries.NotMeasured, match=r"^no_such_peer: not measured, not "):
        libraries.load("no_such_peer")
    for peer in (libraries.fused_langevin, libraries.second_order_loss):
        with pytest.raises(libraries.NotMeasured, match=": not measured, "):
            peer()


# ------------------------------------------------------------------------------------------ report


def made(op, variant, mode, shape, median=None, **more):
    timing = None if median is None else timer.Timing(median - 1, median, median + 1, median)
    return rows.row(op, variant, mode, shape, timing=timing, threads=2, **more)


def everything():
    """Rows of every kind, with made-up times."""
    op, both, found = "d2sm_vr_loss", goals.BOTH, []
    for variant, median in (("hos_ext", 100.0), ("eager", 950.0), ("compiled", 300.0)):
        found.append(made(op, variant, both, (32, 784, 20), median, moved=4000, floor_us=50.0))
    for size in (64, 1024, 4096, 32768, 196608):
        found.append(made(op, "hos_ext", both, (1, size, 16), 50.0 + size, moved=8, floor_us=9.0))
        found.append(made(op, "hos_ext", both, (1, size, 16), peak_mib=size / 1024))
    for size in (64, 1024, 4096):
        found.append(made(op, "dense", both, (1, size, 16), size**2 / 100))
    where = "second_order_score"
    found.append(made(where, "row loop", "MLP Hessian", (10, 100, 0), 84000.0))
    found.append(made(where, "jacrev, 10 at once", "MLP Hessian", (10, 100, 0), 5000.0))
    for rank, median in ((20, 1000.0), (50, 2000.0)):
        name = f"hos_ext structured, r {rank}"
        found.append(made(where, name, "MLP Hessian", (10, 100, rank), median, peak_mib=3.0))
    for variant, median in (("hos_ext", 1000.0), ("dense", 9000.0), ("hos_ext loss", 40.0)):
        found.append(made("training_step", variant, "UNet", (40, 784, 20), median))
    for variant, median in (("network", 1000.0), ("ozaki", 1100.0)):
        found.append(made("sampling_step", variant, "UNet", (40, 784, 20), median))
    return found


def test_rows_are_appended_under_one_header_and_rendered(tmp_path):
    path = tmp_path / "cpu.csv"
    for median in (4.0, 2.0):  # the last row of a case counts
        rows.append(path, [made("op", "hos_ext", "forward", (10, 2, 0), median)])
    other = made("op", "eager", "forward", (10, 2, 0), 7.0, peak_mib=1.5, moved=14000, floor_us=3.5)
    rows.append(path, [other])
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(rows.COLUMNS)
    assert len(lines) == 4
    assert lines[3].endswith("2,op,eager,forward,float32,10,2,0,6,7,8,7,1.5,2,0.5")
    text = report.render(rows.read(path))
    assert "| forward | float32 | 10 | 2 | 0 | 2.0 | 7.0 (3.5x) |" in text
    assert "| forward | float32 | 10 | 2 | 0 | 1.5 |" in text


def test_rows_do_not_join_a_file_with_other_columns(tmp_path):
    path = tmp_path / "cpu.csv"
    path.write_text("date,op\n")
    with pytest.raises(ValueError, match=r"append: .*cpu.csv must have the columns date,comm"):
        rows.append(path, [])


def test_exponents_are_fitted_along_lines_and_beyond_the_overhead():
    fits = {(f.variant, f.key, f.low, f.high): f.value for f in growth.exponents(everything())}
    assert fits["hos_ext", "us_p50", 4096, 196608] == pytest.approx(1, abs=0.01)
    assert fits["hos_ext", "us_p50", 64, 196608] < 0.95
    assert fits["hos_ext", "peak_mib", 64, 196608] == pytest.approx(1, abs=0.01)
    assert fits["dense", "us_p50", 64, 4096] == pytest.approx(2)
    by_rank = [made("d2sm_vr_loss", "hos_ext", goals.BOTH, (8, 784, r), r * max(r, 32))
               for r in growth.LINES["r"].sizes]  # fmt: skip
    fits = {(f.low, f.high): f.value for f in growth.exponents(by_rank)}
    assert fits[2, 32] == pytest.approx(1)
    assert fits[32, 256] == pytest.approx(2)


def test_the_report_shows_every_kind_of_row(tmp_path):
    path = tmp_path / "cpu.csv"
    rows.append(path, everything())
    report.main([str(path), "--out", str(tmp_path / "shown")])
    text = (tmp_path / "shown" / "report.md").read_text()
    for line in (
        "| d2sm_vr_loss forward+backward (32, 784, 20): eager over hos_ext | 9.5 | >= 9x | yes |",
        "| d2sm_vr_loss forward+backward (32, 784, 20): compiled over hos_ext | 3 | >= 3.5x | no |",
        "| ozaki_step forward (10, 2, 0): hos_ext | not measured | <= 6 us |  |",
        "| dense | time | D | 64 | 4096 | 2.00 |",
        "| d2sm_vr_loss | forward+backward | float32 | 32 | 784 | 20 | 0.04 | 50% |",
        "| MLP Hessian | hos_ext structured | 20 | 1 | 1 | 3.0 | 5x (jacrev, 10 at once) | 84x |",
        "| UNet | 20 | dense | 9 | 9x |  |  |",
        "| UNet | 20 | hos_ext loss | 0.04 |  | 4.0% |  |",
        "| UNet | 20 | ozaki | 1.1 | 1.1x |  |  |",
    ):
        assert line in text
    for name in ("ratios.png", "growth.png", "second_order.png"):
        assert (tmp_path / "shown" / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text


def test_figures_that_the_rows_do_not_allow_are_left_out(tmp_path):
    assert plots.write([made("op", "hos_ext", "forward", (10, 2, 0), 1.0)], tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_rows_that_later_ones_replace_go_to_the_history(tmp_path):
    path, shape = tmp_path / "cpu.csv", (10, 2, 0)
    old, new = (made("op", "hos_ext", "forward", shape, us) for us in (7.0, 5.0))
    other = made("op", "eager", "forward", shape, 9.0)
    memory_alone = made("op", "hos_ext", "forward", shape, 1.0) | {"peak_mib": "3"}
    memory_alone |= dict.fromkeys(("us_p20", "us_p50", "us_p80", "us_mean"), "")
    rows.append(path, [memory_alone, old, other, new])
    assert rows.archive(path) == 1
    assert [row["us_p50"] for row in rows.read(path)] == ["", "9", "5"]
    assert [row["us_p50"] for row in rows.read(tmp_path / "history.csv")] == ["7"]
    assert rows.archive(path) == 0
    rows.append(path, [old])
    assert rows.archive(path) == 1
    assert [row["us_p50"] for row in rows.read(tmp_path / "history.csv")] == ["7", "5"]
    assert {each.name for each in tmp_path.iterdir()} == {"cpu.csv", "history.csv"}


def test_the_table_of_the_speed_page_is_that_of_the_rows(tmp_path):
    """The page as it stands says what the recorded rows say."""
    recorded_rows = rows.read(rows.RESULTS / "cpu.csv")
    place = [recorded_rows[-1][key] for key in report.PLACE]
    here = [row for row in recorded_rows if [row[key] for key in report.PLACE] == place]
    page = tmp_path / "speed.md"
    page.write_text(speed_page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    speed_page.write(report.medians(here), page)
    assert page.read_text(encoding="utf-8") == speed_page.PAGE.read_text(encoding="utf-8")
    found = {key: dict(value) for key, value in report.medians(here).items()}
    found["ozaki_step", "forward", "float32", "1000", "784", "0"]["eager"] *= 2
    speed_page.write(found, page)
    assert page.read_text(encoding="utf-8") != speed_page.PAGE.read_text(encoding="utf-8")


def test_a_report_without_rows_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "none.csv")])
    assert "run make bench first" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- GPU


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """What bench.gpu does, on the CPU; a call takes five microseconds."""

    def timed(call, *_):
        call()
        return 5.0

    for name in ("device_us", "host_us"):
        monkeypatch.setattr(gpu, name, timed)
    monkeypatch.setattr(gpu, "_there", list)
    monkeypatch.setattr(gpu, "_fits", lambda _: True)
    monkeypatch.setattr(gpu, "copy_rate", lambda: 1e3)
    monkeypatch.setattr(gpu, "flop_rate", lambda: 1e6)
    monkeypatch.setattr(gpu, "_memory", lambda *_: [])
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    return {"device": "a GPU", "driver": "1", "cuda": "13", "command": "python -m bench.gpu"}


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_losses_on_a_gpu_become_rows_with_a_floor(as_if_on_a_gpu, mode):
    found = {row["variant"]: row for row in gpu.losses((2, 9, 3), mode, 0.001)}
    dense = {"dense"} if mode == "forward+backward" else set()
    assert (
        found.keys() == {"hos_ext", "eager", "compiled", "lean", "lean compiled", "floor"} | dense
    )
    work = floors.d2sm_loss((2, 9, 3), points=3, backward=bool(dense))
    assert float(found["floor"]["us_p50"]) == pytest.approx(work.moved / 1e3, rel=1e-4)
    assert float(found["hos_ext"]["share_of_floor"]) == pytest.approx(work.moved / 5e3, rel=1e-4)


def test_losses_that_disagree_on_a_gpu_are_refused(as_if_on_a_gpu, monkeypatch):
    monkeypatch.setattr(hos_ext, "d2sm_vr_loss", lambda *a: 1.1 * peers._eager_d2sm_vr(*a))
    with pytest.raises(ValueError, match=r"^agree: hos_ext must give tensor 0 within 0\.0001 of"):
        list(gpu.losses((2, 9, 3), "forward", 0.001))


def test_steps_and_matrices_on_a_gpu_become_rows(as_if_on_a_gpu, tmp_path):
    found = [*gpu.steps((300, 8, 0), 0.001), *gpu.steps((300, 8, 0), 0.001, host=True)]
    assert [row["mode"] for row in found].count("host latency") == 5
    assert [row["variant"] for row in found].count("floor") == 1
    path = tmp_path / "gpu.csv"
    rows.append(path, found, place=as_if_on_a_gpu)
    assert path.read_text().splitlines()[0] == ",".join(
        (*rows.COLUMNS, "driver", "cuda", "command")
    )
    assert {row["device"] for row in rows.read(path)} == {"a GPU"}
    assert "a GPU" in report.render(rows.read(path))


def test_goals_on_a_gpu_are_judged_by_its_rows(as_if_on_a_gpu):
    shape = goals.GPU_SIZES[0]
    values = {"hos_ext": 100.0, "floor": 70.0, "compiled": 250.0, "dense": 2e4}
    found = [made("d2sm_vr_loss", k, "forward+backward", shape, v) for k, v in values.items()]
    sizes = {"hos_ext": 120.0, "inputs": 50.0, "gradients": 50.0}
    found += [made("d2sm_vr_loss", k, "memory", shape, v) for k, v in sizes.items()]
    judged = report.verdicts([row | as_if_on_a_gpu for row in found])
    measured = {v.goal.against: v for v in judged if v.figure is not None}
    assert [v.goal for v in judged] == list(goals.GPU_GOALS)
    assert measured["floor",].figure == pytest.approx(0.7)
    assert measured["floor",].reached
    assert measured["compiled",].reached is False
    assert measured["dense",].reached
    assert measured["inputs", "gradients"].figure == pytest.approx(1.2)


def test_the_bench_of_a_gpu_says_what_it_needs(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "needs a GPU, and hos_ext built with CUDA" in capsys.readouterr().err


def test_what_ptxas_prints_becomes_rows():
    text = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 256 bytes smem
ptxas info    : Compile time = 1.0 ms
"""
    assert list(ptxas.parse(text)) == [
        {"kernel": "_Z1fv", "stack": "8", "spill_stores": "4", "spill_loads": "12"}
        | {"registers": "72", "shared": "256"}
    ]


def test_no_recorded_kernel_spills():
    found = rows.read(rows.RESULTS / "ptxas.csv")
    assert {row["arch"] for row in found} == set(ptxas.ARCHS)
    assert all(row["spill_stores"] == row["spill_loads"] == "0" for row in found)
