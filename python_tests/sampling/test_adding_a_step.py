"""Steps from outside the package: by registration, as objects, adjusted, resumed and sharded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist

from hos_ext import UnscaledScores
from hos_ext.ops import langevin_step, normal
from hos_ext.sampling import (
    Metropolis,
    NormalStep,
    PlainStep,
    diagonal_law,
    make_step,
    method_names,
    register_step,
    sample,
    sample_sharded,
    unregister_step,
)
from hos_ext.sampling.methods import Langevin, Ozaki, OzakiLanczos
from hos_ext.scores import DenseScores

F64 = torch.float64
OPTIONS = {"step_size": 0.3, "seed": 7}


class Preconditioned(NormalStep):
    """Langevin with a step size of its own for each coordinate."""

    name = "preconditioned"
    accepts = (Tensor, UnscaledScores, DenseScores)

    def __init__(self, scale: float = 2.0, **options):
        super().__init__(**options)
        self.scale = scale

    def law(self, here, h):
        x, score = here.flat()
        width = h * torch.linspace(1, self.scale, x.shape[1]).to(x)
        return diagonal_law(x + width * score, (2 * width).sqrt())


class Stubborn(PlainStep):
    """A step without a density, which refuses some scores and counts where it stood still."""

    name = "stubborn"
    accepts = (UnscaledScores,)
    keeps = {"stands": "count", "length": "max", "height": "mean"}  # noqa: RUF012

    def check(self, scores, x):
        if scores.factor is not None:
            raise ValueError("sample: factor from score_fn must be None for 'stubborn', got one")

    def move(self, here, step_size, key, out):
        langevin_step(
            here.x,
            here.score,
            step_size,
            seed=key.seed,
            offset=key.offset,
            first=key.first,
            out=out,
        )
        stands = out[:, 0] > 1
        out[stands] = here.x[stands]
        length = (out - here.x).flatten(1).norm(dim=1)
        return {"stands": stands, "length": length, "height": out[:, 0]}


@pytest.fixture
def registered():
    register_step(Preconditioned)
    register_step(Stubborn)
    yield
    unregister_step(Preconditioned)
    unregister_step(Stubborn)


@pytest.fixture
def init() -> Tensor:
    return torch.linspace(-1, 1, 7 * 4, dtype=F64).reshape(7, 4)


def well(x: Tensor) -> Tensor:
    return x - x**3


def well_scores(x: Tensor) -> UnscaledScores:
    return UnscaledScores(well(x), 1 - 3 * x**2)


def log_prob(x: Tensor) -> Tensor:
    square = x * x  # torch's x**4 depends on the place of x in memory, by a last bit
    return (square / 2 - square * square / 4).sum(1)


def test_a_step_from_outside_runs_by_its_name(registered, init):
    assert "preconditioned" in method_names()
    assert method_names()[-1] == "mh_preconditioned"
    assert "mh_stubborn" not in method_names()
    chains = sample(well, init, method="preconditioned", n_steps=2, **OPTIONS)
    x, width = init, 0.3 * torch.linspace(1, 2, 4, dtype=torch.float32).double()
    for k in range(2):
        z = normal((7, 4), seed=7, offset=k, dtype=F64)
        x = x + width * well(x) + (2 * width).sqrt() * z
        torch.testing.assert_close(chains.draws[:, k], x, rtol=1e-12, atol=1e-12)
    assert chains.stats["method"] == "preconditioned"


def test_registered_and_given_as_class_or_object_it_is_the_same_step(registered, init):
    expected = sample(well, init, method="preconditioned", n_steps=5, **OPTIONS)
    for method in (Preconditioned, Preconditioned()):
        assert torch.equal(
            sample(well, init, method=method, n_steps=5, **OPTIONS).draws, expected.draws
        )
    other = sample(well, init, method=Preconditioned(scale=3.0), n_steps=5, **OPTIONS)
    assert not torch.equal(other.draws, expected.draws)


@pytest.mark.parametrize("exact", [True, False])
def test_a_step_from_outside_is_adjusted_by_metropolis(registered, init, exact):
    options = {"n_steps": 6, "log_prob": log_prob if exact else None, **OPTIONS}
    chains = sample(well, init, method="mh_preconditioned", **options)
    assert chains.stats["method"] == "mh_preconditioned"
    assert chains.stats["log_ratio"] == ("log_prob" if exact else "scores")
    assert ((chains.stats["acceptance"] > 0) & (chains.stats["acceptance"] < 1)).all()
    given = sample(well, init, method=Metropolis(Preconditioned()), **options)
    assert torch.equal(given.draws, chains.draws)
    if exact:  # one step is the formula
        step = sample(well, init, method="mh_preconditioned", **options | {"n_steps": 1})
        width = 0.3 * torch.linspace(1, 2, 4).double()
        z = normal((7, 4), seed=7, dtype=F64)
        new = init + width * well(init) + (2 * width).sqrt() * z
        back = ((init - new - width * well(new)) ** 2 - (new - init - width * well(init)) ** 2) / (
            4 * width
        )
        rate = (log_prob(new) - log_prob(init) - back.sum(1)).exp().clamp(max=1)
        torch.testing.assert_close(step.stats["acceptance"], rate)


def test_an_adjusted_step_from_outside_keeps_its_density(registered):
    start = torch.zeros(20_000, 1, dtype=F64)
    options = {"burn_in": 60, "n_steps": 1, "step_size": 0.5, "seed": 1}
    chains = sample(
        lambda x: -x, start, method="mh_preconditioned", log_prob=lambda x: -x[:, 0] ** 2 / 2,
        **options,
    )  # fmt: skip
    assert float(chains.draws.var()) == pytest.approx(1, abs=5 * (2 / 20_000) ** 0.5)


@pytest.mark.parametrize("method", ["preconditioned", "mh_preconditioned", "stubborn"])
def test_a_step_from_outside_is_cut_resumed_and_split(registered, init, method):
    options = {"method": method, **OPTIONS}
    whole = sample(well_scores, init, n_steps=6, **options)
    cut = sample(well_scores, init, n_steps=6, chunk_size=2, **options)
    assert torch.equal(cut.draws, whole.draws)
    first = sample(well_scores, init, n_steps=4, **options)
    rest = sample(well_scores, state=first.state, n_steps=2, **options)
    assert torch.equal(torch.cat([first.draws, rest.draws], 1), whole.draws)
    part = sample(well_scores, init[3:], n_steps=6, first_chain=3, **options)
    assert torch.equal(part.draws, whole.draws[3:])


def test_statistics_are_put_together_as_the_step_says(registered, init):
    options = {"method": "stubborn", **OPTIONS}
    chains = sample(well_scores, init, burn_in=2, n_steps=5, **options)
    path = sample(well_scores, init, n_steps=7, **options).draws
    before = torch.cat([init.unsqueeze(1), path[:, :-1]], 1)
    length = (path - before).norm(dim=2)
    assert torch.equal(chains.stats["stands"], (length == 0).sum(1))
    assert int(chains.stats["stands"].sum()) > 0
    torch.testing.assert_close(chains.stats["length"], length.amax(1))
    torch.testing.assert_close(chains.stats["height"], path[:, 2:, 0].mean(1))


def _worker(rank, folder):
    torch.set_num_threads(1)
    register_step(Preconditioned)
    register_step(Stubborn)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        torch.save(_runs(sample_sharded), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _runs(run):
    init = torch.linspace(-1, 1, 5 * 4, dtype=F64).reshape(5, 4)
    methods = "preconditioned", "mh_preconditioned", "stubborn", Preconditioned(scale=1.5)
    chains = [run(well_scores, init, method=m, n_steps=4, **OPTIONS) for m in methods]
    return [(each.draws, each.stats) for each in chains]


def test_a_step_from_outside_is_shared_out_over_processes(registered, tmp_path):
    multiprocessing.spawn(_worker, (tmp_path,), nprocs=2)
    expected = _runs(sample)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for (draws, stats), (wanted, figures) in zip(got, expected, strict=True):
            assert torch.equal(draws, wanted)
            for name, value in figures.items():
                if isinstance(value, Tensor):
                    assert torch.equal(stats[name], value), name


# ------------------------------------------------------------------------------------------ errors


def test_a_step_that_refuses_its_scores_says_so(registered, init):
    factor = torch.zeros(7, 4, 1, dtype=F64)
    with pytest.raises(ValueError, match=r"^sample: factor from score_fn must be None for 'stub"):
        sample(
            lambda x: UnscaledScores(-x, -x, factor),
            init,
            method="stubborn",
            n_steps=1,
            step_size=0.1,
        )
    with pytest.raises(TypeError, match=r"^sample: score_fn must return UnscaledScores\(score, d"):
        sample(well, init, method="stubborn", n_steps=1, step_size=0.1)


def test_names_are_registered_once_and_forgotten():
    with pytest.raises(ValueError, match=r"^register_step: name must be new, got 'ozaki'$"):
        register_step(type("Again", (Langevin,), {"name": "ozaki"}))
    with pytest.raises(ValueError, match=r"^register_step: name must be new, got 'mala'$"):
        register_step(type("Again", (Langevin,), {"name": "new", "adjusted_name": "mala"}))
    with pytest.raises(TypeError, match=r"^register_step: step must be a class derived from Plain"):
        register_step(Langevin())
    with pytest.raises(ValueError, match=r"^unregister_step: step must be registered, got <class"):
        unregister_step(Preconditioned)
    before = method_names()
    unregister_step(register_step(Preconditioned))
    assert method_names() == before


def test_make_step_refuses():
    with pytest.raises(ValueError, match=r"^sample: curvature must be that of the step, which has"):
        make_step(Ozaki(), curvature="abs")
    with pytest.raises(ValueError, match=r"^adapt: method must be one of 'mala', .* got 'ozaki'$"):
        make_step(Ozaki, where="adapt", adjusted=True)
    with pytest.raises(TypeError, match=r"^Metropolis: proposal must be a NormalStep, got OzakiLa"):
        Metropolis(OzakiLanczos())
    assert repr(make_step("mala")) == (
        "Metropolis(Langevin(curvature='clamp', tolerance=0.001, max_iterations=None))"
    )
    assert make_step(type("Nameless", (Langevin,), {})).name == "Nameless"
