"""Several processes on one machine (gloo): chains shared out over ranks are those of one process.

One spawn of three processes runs every case, on groups of one, two and three of them, and leaves
what each rank got in files; the tests compare these with `sample` in this process.
"""

import re

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from hos_ext import MLP, sample
from hos_ext.sampling import TwoCoin, sample_sharded, shard
from hos_ext.scores import DenseScores, UnscaledScores

CHAINS, WORLDS = 7, (1, 2, 3)
OPTIONS = {"step_size": 0.05, "n_steps": 9, "burn_in": 2, "thin": 2, "seed": 11}
METHODS = {
    "langevin": {},
    "ozaki": {"curvature": "abs", "chunk_size": 2},
    "ozaki_full": {},
    "ozaki_lanczos": {"tolerance": 1e-4},
    "mala": {},
    "mh_ozaki": {},
}


def _init(chains=CHAINS):
    return torch.linspace(-1.5, 1.5, chains * 6).reshape(chains, 2, 3)


def _well(x):
    """log p = sum of x^2 / 2 - x^4 / 4, entry by entry: no row sees the rows beside it."""
    return UnscaledScores(x - x**3, 1 - 3 * x**2)


def _dense(x):
    scores = _well(x)
    return DenseScores(scores.score, torch.diag_embed(scores.diag.flatten(1)))


def _log_prob(x):
    square = x * x  # torch's x**4 depends on the place of x in memory, by a last bit
    return (square / 2 - square * square / 4).flatten(1).sum(1)


def _shifted(x, label):
    return _well(x - label.reshape(-1, 1, 1))


def _shifted_log_prob(x, label):
    return _log_prob(x - label.reshape(-1, 1, 1))


def _conditional(run, label=None):
    """Adjusted chains, each with a condition of its own."""
    label = torch.linspace(-1, 1, CHAINS) if label is None else label
    options = OPTIONS | {"method": "mh_ozaki", "chunk_size": 2, "step_size": 0.4}
    given = {"model_kwargs": {"label": label}, "log_prob": _shifted_log_prob}
    return run(_shifted, _init(), **options, **given)


def _well_bound(x, there):
    """s3 of the well is -6 x: |f - chord| <= 3 sum max(|x|, |x'|) |dx|^3 t (1 - t)."""
    return 3 * (torch.maximum(x.abs(), there.abs()) * (there - x).abs() ** 3).flatten(1).sum(1)


def _coins(run):
    rule = TwoCoin(_well_bound)
    return run(_well, _init(), **OPTIONS | {"step_size": 0.2}, method="mala", rule=rule)


def _case(method, run, **more):
    score_fn = _dense if method == "ozaki_full" else _well
    options = OPTIONS | METHODS[method] | more
    if method == "mala":
        options["log_prob"] = _log_prob
    return run(score_fn, _init(), method=method, **options)


def _network():
    torch.manual_seed(3)
    model = MLP((2, 3), 2, width=16, depth=1)
    torch.nn.init.normal_(model.score.weight, std=0.1)
    return lambda x: model(x, 0.5).unscaled(0.5)


def _message(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _parts(chains):
    """Plain tensors and numbers, which go through files."""
    return chains.draws, chains.stats, chains.state


def _cases(rank, groups):
    """What this rank gets, by the name of the case and the number of ranks."""
    found = {}

    def fail_on_rank_one(x):
        if rank == 1:
            raise OSError("disk full")
        return x - x**3

    for world, group in groups.items():
        if rank >= world:
            continue

        def run(*args, group=group, **options):
            return _parts(sample_sharded(*args, group=group, **options))

        for method in METHODS:
            found[method, world] = _case(method, run)
        steps = torch.linspace(0.01, 0.07, CHAINS)
        found["steps", world] = run(_well, _init(), **OPTIONS | {"step_size": steps})
        found["empty", world] = run(_well, _init(2), **OPTIONS, first_chain=40)
        found["none", world] = run(_well, _init(0), **OPTIONS)
        found["no draws", world] = run(_well, _init(), **OPTIONS | {"n_steps": 1})
        found["conditional", world] = _conditional(run)
        found["coins", world] = _coins(run)
        found["half", world] = run(_well, _init().bfloat16(), **OPTIONS, method="ozaki")
        found["network", world] = run(_network(), _init(), **OPTIONS, method="ozaki")
        torch.manual_seed(100 + rank)
        found["fresh", world] = run(_well, _init(), **OPTIONS | {"seed": None})
        found["generator", world] = torch.rand(2)
        found["bad option", world] = _message(lambda: run(_well, _init(), **OPTIONS, method="hmc"))
        found["bad init", world] = _message(lambda: run(_well, _init()[0, 0], **OPTIONS))
    three = groups[3]
    first = sample_sharded(_well, _init(), **OPTIONS | {"n_steps": 6}, group=three)
    if rank < 2:
        rest = OPTIONS | {"n_steps": 3, "burn_in": 0}
        chains = sample_sharded(_well, state=first.state, **rest, group=groups[2])
        found["resumed"] = _parts(chains)
        found["first draws"] = first.draws
    found["outside"] = _message(lambda: sample_sharded(_well, _init(), **OPTIONS, group=groups[1]))
    # The others must not wait for a rank that failed.
    found["failed"] = _message(lambda: sample_sharded(fail_on_rank_one, _init(), **OPTIONS))
    found["refused"] = _message(
        lambda: sample_sharded(_well, _init() if rank != 2 else [1], **OPTIONS)
    )
    found["init"] = _message(lambda: sample_sharded(_well, _init() + (rank == 2), **OPTIONS))
    found["option"] = _message(
        lambda: sample_sharded(_well, _init(), **OPTIONS | ({"seed": 12} if rank else {}))
    )
    found["condition"] = _message(
        lambda: _conditional(sample_sharded, torch.zeros(CHAINS) + (rank == 1))
    )
    found["missing"] = _message(
        lambda: sample_sharded(_well, _init(), **OPTIONS, **({"chunk_size": 2} if rank else {}))
    )
    return found


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(WORLDS)
    )
    try:
        groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
        torch.save(_cases(rank, groups), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank got."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_worker, (folder,), nprocs=max(WORLDS))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(max(WORLDS))]


def _assert_same(got, expected, equal=torch.equal):
    """Draws, statistics and state, and of the statistics all but the time."""
    draws, stats, state = got
    assert equal(draws, expected.draws)
    assert list(stats) == list(expected.stats)
    for name, value in expected.stats.items():
        if name == "seconds":
            assert stats[name] >= 0
        elif isinstance(value, torch.Tensor):
            assert stats[name].dtype == value.dtype
            assert equal(stats[name], value), name
        else:
            assert stats[name] == value or (stats[name] != stats[name] and value != value), name
    assert equal(state["x"], expected.state["x"])
    for name in ("step", "since_draw", "seed", "first_chain"):
        assert state[name] == expected.state[name], name


def _each(found, name):
    """(rank, world, result) of a case."""
    for world in WORLDS:
        for rank in range(world):
            yield rank, world, found[rank][name, world]


# ------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("n", [0, 1, 2, 7, 12, 1000])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_shard_cuts_rows_into_contiguous_shares_of_equal_size(n, world):
    shares = [shard(n, rank, world) for rank in range(world)]
    assert [row for each in shares for row in range(n)[each]] == list(range(n))
    sizes = [each.stop - each.start for each in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0, 1), ValueError, r"^shard: n must be in \[0, 2\*\*63\), got -1$"),
        ((3, 0, 0), ValueError, r"^shard: world must be at least 1, got 0$"),
        ((3, -1, 2), ValueError, r"^shard: rank must be in \[0, 2\*\*31\), got -1$"),
        ((3, 2, 2), ValueError, r"^shard: rank must be below world 2, got 2$"),
        ((3, 0.5, 2), TypeError, r"^shard: rank must be an int, got float$"),
    ],
)
def test_shard_refuses_what_is_no_share(arguments, error, message):
    with pytest.raises(error, match=message):
        shard(*arguments)


# ----------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("method", METHODS)
def test_chains_are_bitwise_the_same_for_any_number_of_ranks(found, method):
    expected = _case(method, sample)
    for _, _, got in _each(found, method):
        _assert_same(got, expected)


def test_chains_of_a_network_are_the_same_to_rounding(found):
    expected = sample(_network(), _init(), **OPTIONS, method="ozaki")

    def near(value, wanted):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
        return True

    for _, _, got in _each(found, "network"):
        _assert_same(got, expected, near)
    for rank in range(3):  # whatever its rounding, a result is the same on all ranks
        assert torch.equal(found[rank]["network", 3][0], found[0]["network", 3][0])


def test_every_chain_keeps_its_own_step_size(found):
    steps = torch.linspace(0.01, 0.07, CHAINS)
    expected = sample(_well, _init(), **OPTIONS | {"step_size": steps})
    for _, _, got in _each(found, "steps"):
        _assert_same(got, expected)


def test_every_chain_keeps_its_own_condition(found):
    expected = _conditional(sample)
    assert 0 < expected.stats["acceptance"].min() < expected.stats["acceptance"].max() < 1
    for _, _, got in _each(found, "conditional"):
        _assert_same(got, expected)


def test_coins_fall_alike_on_any_number_of_ranks(found):
    expected = _coins(sample)
    assert int(expected.stats["coin_evaluations"].sum()) > 0
    for _, _, (draws, stats, state) in _each(found, "coins"):
        assert torch.equal(draws, expected.draws)
        assert torch.equal(state["x"], expected.state["x"])
        for name in ("coin_evaluations", "undecided", "bound_used", "acceptance"):
            assert torch.equal(stats[name], expected.stats[name]), name
        # Ranks wait for fewer chains each.
        assert stats["n_score_evaluations"] <= expected.stats["n_score_evaluations"]


def test_ranks_without_chains_take_part(found):
    expected = sample(_well, _init(2), **OPTIONS, first_chain=40)
    assert expected.state["first_chain"] == 40
    for _, _, got in _each(found, "empty"):
        _assert_same(got, expected)
    for _, _, got in _each(found, "none"):
        _assert_same(got, sample(_well, _init(0), **OPTIONS))


def test_chains_without_draws_and_in_half_precision_come_back_whole(found):
    for _, _, got in _each(found, "no draws"):
        _assert_same(got, sample(_well, _init(), **OPTIONS | {"n_steps": 1}))
    expected = sample(_well, _init().bfloat16(), **OPTIONS, method="ozaki")
    for _, _, got in _each(found, "half"):
        assert got[0].dtype == torch.bfloat16
        _assert_same(got, expected)


def test_a_seed_that_is_not_given_is_drawn_once_for_all_ranks(found):
    for _, world, got in _each(found, "fresh"):
        seed = found[0]["fresh", world][2]["seed"]
        _assert_same(got, sample(_well, _init(), **OPTIONS | {"seed": seed}))
        torch.manual_seed(100)
        assert seed == sample(_well, _init(), **OPTIONS | {"seed": None}).state["seed"]
    for rank, _, drawn in _each(found, "generator"):  # each rank's generator moved by one seed
        torch.manual_seed(100 + rank)
        sample(_well, _init(), **OPTIONS | {"seed": None})
        assert torch.equal(drawn, torch.rand(2))


def test_chains_resume_on_another_number_of_ranks(found):
    whole = sample(_well, _init(), **OPTIONS)
    for rank in range(2):
        draws, _, state = found[rank]["resumed"]
        assert torch.equal(torch.cat([found[rank]["first draws"], draws], 1), whole.draws)
        assert torch.equal(state["x"], whole.state["x"])
        assert state["step"] == whole.state["step"]
        assert state["first_chain"] == 0


# ------------------------------------------------------------------------------------------- errors


def test_an_error_on_one_rank_is_raised_on_all(found):
    others = (
        "RuntimeError: sample_sharded: every rank must finish its part, got {} on rank {}".format
    )
    assert [each["failed"] for each in found] == [
        others("OSError: disk full", 1),
        "OSError: disk full",
        others("OSError: disk full", 1),
    ]
    wrong = "TypeError: sample: init must be a tensor, got list"
    assert [each["refused"] for each in found] == [others(wrong, 2), others(wrong, 2), wrong]


def test_an_error_on_all_ranks_is_that_of_sample(found):
    for _, _, message in _each(found, "bad option"):
        assert message.startswith("ValueError: sample: method must be one of 'langevin', 'ozaki', ")
    for _, _, message in _each(found, "bad init"):
        assert message == (
            "ValueError: sample: init must have shape (chain, *dims) with at least one entry in a "
            "chain, got (3,)"
        )


def test_arguments_that_differ_between_ranks_are_refused_on_all(found):
    tensor = r"shape \(7, 2, 3\) torch\.float32 of hash [0-9a-f]{16}"
    start = r"ValueError: sample_sharded: "
    for each in found:
        assert re.fullmatch(
            rf"{start}init must be the same on every rank, got {tensor} on rank 0 and {tensor} on "
            "rank 2",
            each["init"],
        )
        assert re.fullmatch(
            rf"{start}seed must be the same on every rank, got 11 on rank 0 and 12 on rank 1",
            each["option"],
        )
        label = r"\{'label': shape \(7,\) torch\.float32 of hash [0-9a-f]{16}\}"
        assert re.fullmatch(
            rf"{start}model_kwargs must be the same on every rank, got {label} on rank 0 and "
            rf"{label} on rank 1",
            each["condition"],
        )
        assert re.fullmatch(
            rf"{start}chunk_size must be the same on every rank, got nothing on rank 0 and 2 on "
            "rank 1",
            each["missing"],
        )


def test_a_process_outside_the_group_is_refused(found):
    assert found[0]["outside"] != found[1]["outside"]
    for rank in (1, 2):
        assert found[rank]["outside"] == (
            f"ValueError: sample_sharded: group must hold this process, got one without rank {rank}"
        )


def test_without_torch_distributed_it_is_sample():
    _assert_same(_parts(_case("mh_ozaki", sample_sharded)), _case("mh_ozaki", sample))
    with pytest.raises(
        ValueError,
        match=r"^sample_sharded: group must be None where torch\.distributed is not initialised, "
        r"got 5$",
    ):
        _case("ozaki", sample_sharded, group=5)
