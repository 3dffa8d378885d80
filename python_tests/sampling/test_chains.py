"""Chains: the law each step keeps, the same chains however they are cut, and every error."""

import re
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hos_ext import ops, progress
from hos_ext.sampling import Chains, method_names, sample
from hos_ext.scores import DenseScores, UnscaledScores

METHODS = method_names()

SPREAD = torch.tensor([0.05, 0.4, 1.0, 3.0], dtype=torch.float64)  # variances, a diagonal Gaussian
CORRELATED = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
MEAN = 0.7


def gaussian(covariance: Tensor, mean: float = 0.0):
    """score_fn of N(mean, covariance), row by row: the rows beside a row do not change its bits."""
    precision = torch.linalg.inv(covariance)

    def score_fn(x):
        p = precision.to(x)
        score = -((x - mean).unsqueeze(-1) * p).sum(-2)
        return UnscaledScores(score, -p.diagonal().expand_as(x), None)

    return score_fn


def affine_map(score_fn, d, method, step_size):
    """A and the noise's square root G of the step x' = A x + b + G z, read off `sample` itself."""
    start = torch.cat([torch.zeros(1, d), torch.eye(d)]).double()
    options = {"method": method, "step_size": step_size, "n_steps": 1}
    # One call for each row: rows of one call would differ in noise.
    ends = [sample(score_fn, row[None], seed=3, **options).draws[0, 0] for row in start]
    a = torch.stack([end - ends[0] for end in ends[1:]], 1)
    n = 2 * d + 1
    pushed = sample(score_fn, torch.zeros(n, d).double(), seed=5, **options).draws[:, 0]
    z = ops.normal((n, d), seed=5, offset=0, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones(n, 1).double()], 1), pushed).solution
    return a, solution[:d].T


def stationary(a, g):
    """C of C = A C A^T + G G^T, solved as a linear system."""
    d = len(a)
    left = torch.eye(d * d, dtype=a.dtype) - torch.kron(a, a)
    return torch.linalg.solve(left, (g @ g.T).flatten()).reshape(d, d)


# ------------------------------------------------------------------------------------ the law kept


@pytest.mark.parametrize("covariance", [SPREAD.diag(), CORRELATED], ids=["diagonal", "correlated"])
def test_langevin_keeps_the_closed_form_biased_covariance(covariance):
    h = 0.04
    p = torch.linalg.inv(covariance)
    eye = torch.eye(len(p), dtype=p.dtype)
    a, g = affine_map(gaussian(covariance, MEAN), len(p), "langevin", h)
    torch.testing.assert_close(a, eye - h * p)
    torch.testing.assert_close(g, (2 * h) ** 0.5 * eye)
    expected = covariance @ torch.linalg.inv(eye - h * p / 2)
    torch.testing.assert_close(stationary(a, g), expected)


@pytest.mark.parametrize("h", [1e-3, 0.3, 5.0])
def test_ozaki_keeps_a_diagonal_gaussian_exactly_at_any_step_size(h):
    a, g = affine_map(gaussian(SPREAD.diag(), MEAN), 4, "ozaki", h)
    torch.testing.assert_close(a, torch.exp(-h / SPREAD).diag())
    torch.testing.assert_close(stationary(a, g), SPREAD.diag())


@pytest.mark.parametrize(
    ("eps", "variance", "correlation"),
    [(0.05, 0.950, 0.888), (0.5, 0.729, 0.715), (2, 0.960, 0.047)],
)
def test_ozaki_on_a_correlated_gaussian_has_the_known_bias(eps, variance, correlation):
    p = torch.linalg.inv(CORRELATED)
    h = eps / 2
    a, g = affine_map(gaussian(CORRELATED), 2, "ozaki", h)
    m = -torch.expm1(-h * p.diagonal()) / p.diagonal()
    torch.testing.assert_close(a, torch.eye(2).double() - m.diag() @ p)
    s = -torch.expm1(-2 * h * p.diagonal()) / p.diagonal()
    torch.testing.assert_close(g @ g.T, s.diag())
    c = stationary(a, g)
    assert float(c[0, 0]) == pytest.approx(variance, abs=6e-4)
    assert float(c[0, 1] / c[0, 0]) == pytest.approx(correlation, abs=6e-4)


@pytest.mark.parametrize(("method", "h"), [("langevin", 0.08), ("ozaki", 0.5)])
def test_chains_reach_the_stationary_mean_and_variance(method, h):
    """Monte Carlo with error bars, 5 standard errors; Langevin's bias here is 4 - 400 of them."""
    n, variance = 20_000, torch.tensor([0.05, 0.4], dtype=torch.float64)
    init = torch.full((n, 2), MEAN).double()
    chains = sample(
        gaussian(variance.diag(), MEAN),
        init,
        method=method,
        step_size=h,
        n_steps=20,
        seed=1,
        thin=20,
    )
    a = 1 - h / variance if method == "langevin" else torch.exp(-h / variance)
    law = variance / (1 - h / variance / 2) if method == "langevin" else variance
    law = law * (1 - a**40)  # started at the mean, without spread
    x = chains.draws[:, 0]
    assert ((x.mean(0) - MEAN).abs() < 5 * (law / n).sqrt()).all()
    assert ((x.var(0) - law).abs() < 5 * law * (2 / n) ** 0.5).all()


@pytest.mark.parametrize("sign", [None, torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])])
def test_ozaki_uses_the_diagonal_of_the_whole_hessian(sign):
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2).double()
    factor = torch.randn(3, 4, 5).double()
    diag = -torch.rand(3, 2, 2).double() * 30
    weight = torch.eye(5).double() if sign is None else sign.double().diag()
    full = torch.diag_embed(diag.flatten(1)) + factor @ weight @ factor.mT
    whole = full.diagonal(dim1=1, dim2=2).reshape(3, 2, 2)
    options = {"method": "ozaki", "step_size": 0.2, "n_steps": 1, "seed": 0}
    split = sample(lambda x: UnscaledScores(-x, diag, factor, sign), x, **options)
    joined = sample(lambda x: UnscaledScores(-x, whole, None), x, **options)
    torch.testing.assert_close(split.draws, joined.draws, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [None, torch.tensor([1.0, -1.0])])
def test_ozaki_takes_a_factor_in_half_precision(dtype, sign):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    factor = torch.tensor([1.0, 0.5]).expand(3, 4, 2).to(dtype)
    diag = torch.full_like(x, -4.0)
    whole = diag + (1.25 if sign is None else 0.75)
    options = {"method": "ozaki", "step_size": 0.25, "n_steps": 2, "seed": 0}
    split = sample(lambda x: UnscaledScores(-x, diag, factor, sign), x, **options)
    joined = sample(lambda x: UnscaledScores(-x, whole, None), x, **options)
    assert split.draws.dtype == dtype
    assert torch.equal(split.draws, joined.draws)


def test_curvature_reaches_the_step():
    x = torch.ones(4, 3).double()
    up = torch.full_like(x, 2.0)
    ends = {}
    for curvature in ("clamp", "abs", "raw"):
        options = {"method": "ozaki", "step_size": 0.3, "n_steps": 1, "seed": 0}
        chains = sample(lambda x: UnscaledScores(x, up, None), x, curvature=curvature, **options)
        expected = ops.ozaki_step(x, x, up, 0.3, seed=0, curvature=curvature)
        assert torch.equal(chains.draws[:, 0], expected)
        ends[curvature] = chains.draws
    assert not torch.equal(ends["clamp"], ends["abs"])
    assert not torch.equal(ends["abs"], ends["raw"])


# --------------------------------------------------------------------------------- the same chains


def run(init=None, **options) -> Chains:
    options = {"step_size": 0.1, "n_steps": 12, "seed": 7, "method": "ozaki"} | options
    return sample(gaussian(SPREAD.diag()), init, **options)


@pytest.fixture
def init():
    return torch.linspace(-1, 1, 7 * 4).reshape(7, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 50])
def test_chunks_do_not_change_the_chains(init, method, chunk_size):
    step_size = torch.linspace(0.01, 0.05, 7)
    options = {"method": method, "step_size": step_size, "n_steps": 5, "burn_in": 2}
    score_fn = varying(isotropic="isotropic" in method)
    whole = sample(score_fn, init, seed=7, **options)
    cut = sample(score_fn, init, seed=7, chunk_size=chunk_size, **options)
    assert torch.equal(whole.draws, cut.draws)
    assert torch.equal(whole.state["x"], cut.state["x"])
    for key, value in whole.stats.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, cut.stats[key]), key


def varying(*, isotropic: bool = False):
    """Low-rank scores that change with x, each row by itself, with both signs of curvature."""

    def score_fn(x):
        diag = -torch.ones_like(x) if isotropic else -1 - torch.sin(x) ** 2
        factor = torch.stack([torch.cos(x), torch.sin(2 * x)], -1)
        return UnscaledScores(-x + torch.sin(x), diag, factor, torch.tensor([1.0, -1.0]))

    return score_fn


def test_score_fn_sees_at_most_chunk_size_rows(init):
    rows = []

    def score_fn(x):
        rows.append(len(x))
        assert not torch.is_grad_enabled()
        return -x

    chains = sample(score_fn, init, step_size=0.1, n_steps=2, burn_in=1, chunk_size=3)
    assert rows == [3] * 3 + [3] * 3 + [1] * 3
    assert chains.stats["n_score_evaluations"] == 3


@pytest.mark.parametrize("thin", [1, 7])
def test_a_resumed_run_continues_exactly(init, thin):
    whole = run(init, n_steps=100, burn_in=3, thin=thin)
    first = run(init, n_steps=60, burn_in=3, thin=thin)
    second = run(state=first.state, n_steps=40, thin=thin, seed=None)
    assert torch.equal(torch.cat([first.draws, second.draws], 1), whole.draws)
    torch.testing.assert_close(second.state, whole.state, rtol=0, atol=0)
    again = run(state=first.state, n_steps=40, thin=thin)
    assert torch.equal(again.draws, second.draws)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_and_splits_over_processes(init, method):
    score_fn = varying(isotropic="isotropic" in method)
    options = {"method": method, "step_size": 0.3}
    whole = sample(score_fn, init, n_steps=6, seed=7, **options)
    first = sample(score_fn, init, n_steps=4, seed=7, **options)
    second = sample(score_fn, state=first.state, n_steps=2, **options)
    assert torch.equal(torch.cat([first.draws, second.draws], 1), whole.draws)
    part = sample(score_fn, init[3:], n_steps=6, seed=7, first_chain=3, **options)
    assert torch.equal(part.draws, whole.draws[3:])
    assert not torch.equal(whole.draws[:, 0], whole.draws[:, 1])


@pytest.mark.parametrize("method", METHODS)
def test_score_functions_may_reuse_their_output(init, method):
    """As a captured CUDA graph does: what the last call returned is overwritten by the next."""
    plain = varying(isotropic="isotropic" in method)
    static = plain(init)

    def reusing(x):
        fresh = plain(x)
        for name in ("score", "diag", "factor"):
            getattr(static, name).copy_(getattr(fresh, name))
        return static

    options = {"method": method, "step_size": 0.3, "n_steps": 6, "seed": 7}
    expected, got = sample(plain, init, **options), sample(reusing, init, **options)
    assert torch.equal(got.draws, expected.draws)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_chains_on_every_device(init, method, device):
    score_fn = varying(isotropic="isotropic" in method)

    def there(x):
        scores = score_fn(x)
        return scores.to(x.device)

    step_size = torch.linspace(0.1, 0.3, 7).double()
    options = {"method": method, "n_steps": 3, "seed": 7}
    expected = sample(score_fn, init.double(), step_size=step_size, **options)
    got = sample(there, init.double().to(device), step_size=step_size.to(device), **options)
    assert got.draws.device.type == device.type
    torch.testing.assert_close(got.draws.cpu(), expected.draws, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["langevin", "ozaki", "mh_ozaki", "mh_ozaki_cayley"])
def test_a_score_function_captured_in_a_cuda_graph_gives_the_same_chains(init, method):
    start = init.cuda()
    score_fn = varying()

    def plain(x):
        scores = score_fn(x)
        return scores.to(x.device)

    static = start.clone()
    for _ in range(3):
        plain(static)
    graph = torch.cuda.CUDAGraph()
    sign = torch.tensor([1.0, -1.0], device="cuda")
    with torch.cuda.graph(graph):
        output = score_fn(static)

    def replayed(x):
        static.copy_(x)
        graph.replay()
        return output.replace(sign=sign)

    options = {"method": method, "step_size": 0.2, "n_steps": 5, "seed": 7}
    expected, got = sample(plain, start, **options), sample(replayed, start, **options)
    torch.testing.assert_close(got.draws, expected.draws, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("method", ["ozaki", "mh_ozaki_cayley"])
def test_a_compiled_score_function_gives_the_same_chains(init, method):
    plain = varying()
    compiled = torch.compile(plain, fullgraph=True)
    options = {"method": method, "step_size": 0.1, "n_steps": 4, "seed": 7}
    expected, got = sample(plain, init, **options), sample(compiled, init, **options)
    torch.testing.assert_close(got.draws, expected.draws, rtol=1e-5, atol=1e-5)


def test_resuming_with_another_thinning_or_a_burn_in_starts_the_count_anew(init):
    first = run(init, n_steps=5, thin=4)  # one draw, and one step towards the next
    every = run(init, n_steps=15)
    other = run(state=first.state, n_steps=9, thin=3)  # 1 step already: draws after 2, 5, 8
    assert torch.equal(other.draws, every.draws[:, [6, 9, 12]])
    longer = run(init, n_steps=7, thin=4)  # 3 steps towards the next
    shorter = run(state=longer.state, n_steps=4, thin=2)  # 3 % 2 = 1: draws after 1 and 3
    assert torch.equal(shorter.draws, every.draws[:, [7, 9]])
    burnt = run(state=first.state, n_steps=8, thin=4, burn_in=1)
    assert torch.equal(burnt.draws, every.draws[:, [9, 13]])


def test_state_survives_torch_save(init, tmp_path):
    first = run(init)
    torch.save(first.state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(run(state=loaded).draws, run(state=first.state).draws)


def test_first_chain_gives_the_chains_of_a_larger_run(init):
    whole = run(init)
    assert torch.equal(run(init[:3]).draws, whole.draws[:3])
    part = run(init[3:], first_chain=3)
    assert torch.equal(part.draws, whole.draws[3:])
    resumed = run(state=part.state, first_chain=3)
    assert torch.equal(resumed.draws, run(state=whole.state).draws[3:])


def test_thinning_keeps_every_thin_th_state_after_the_burn_in(init):
    every = run(init, n_steps=17)
    assert every.draws.shape == (7, 17, 4)
    thinned = run(init, burn_in=3, n_steps=14, thin=4)
    assert torch.equal(thinned.draws, every.draws[:, 3:].unflatten(0, (7,))[:, 3::4])
    assert thinned.draws.shape == (7, 3, 4)
    assert torch.equal(thinned.state["x"], every.draws[:, -1])
    assert thinned.state["since_draw"] == 2


@pytest.mark.parametrize("n_steps", [1, 2])
def test_init_is_not_changed_and_draws_share_no_memory(init, n_steps):
    before = init.clone()
    chains = run(init, n_steps=n_steps)
    assert torch.equal(init, before)
    end = chains.draws[:, -1].clone()
    chains.state["x"].zero_()
    assert torch.equal(chains.draws[:, -1], end)


def test_init_may_be_expanded_and_permuted():
    wide = torch.ones(1, 3, 2, 4).expand(5, 3, 2, 4).permute(0, 3, 1, 2)
    chains = sample(lambda x: -x, wide, step_size=0.1, n_steps=3, seed=0)
    plain = sample(lambda x: -x, wide.contiguous(), step_size=0.1, n_steps=3, seed=0)
    assert chains.draws.shape == (5, 3, 4, 3, 2)
    assert torch.equal(chains.draws, plain.draws)


def test_langevin_takes_a_tensor_or_scores(init):
    plain = sample(lambda x: -x, init, step_size=0.1, n_steps=3, seed=0)
    scores = sample(
        lambda x: UnscaledScores(-x, -torch.ones_like(x), None),
        init,
        step_size=0.1,
        n_steps=3,
        seed=0,
    )
    assert torch.equal(plain.draws, scores.draws)
    assert plain.stats["method"] == "langevin"


def test_step_size_may_be_a_number_or_a_tensor(init):
    runs = [
        sample(lambda x: -x, init, step_size=h, n_steps=3, seed=0)
        for h in (0.5, torch.tensor(0.5), torch.full((7,), 0.5))
    ]
    assert torch.equal(runs[0].draws, runs[1].draws)
    assert torch.equal(runs[0].draws, runs[2].draws)
    assert runs[0].stats["step_size"] == 0.5


def test_seed_none_follows_torch_manual_seed(init):
    torch.manual_seed(11)
    one, two = run(init, seed=None), run(init, seed=None)
    torch.manual_seed(11)
    assert torch.equal(run(init, seed=None).draws, one.draws)
    assert not torch.equal(one.draws, two.draws)
    assert torch.equal(run(init, seed=one.state["seed"]).draws, one.draws)


def test_no_chains_and_no_steps_are_legal(init):
    assert run(init[:0]).draws.shape == (0, 12, 4)
    nothing = run(init, n_steps=0)
    assert nothing.draws.shape == (7, 0, 4)
    assert torch.equal(nothing.state["x"], init)
    warm = run(init, n_steps=0, burn_in=5)
    assert torch.equal(warm.state["x"], run(init, n_steps=5).draws[:, -1])


# ------------------------------------------------------------------------------------- divergences


@pytest.mark.filterwarnings("ignore::hos_ext.sampling.RunawayWarning")
def test_a_diverged_chain_stays_non_finite_is_counted_and_harms_no_other(init):
    bad = init.clone()
    bad[2, 1] = float("nan")
    options = {"step_size": 0.1, "n_steps": 12, "seed": 7}
    healthy, chains = (sample(lambda x: -x, start, **options) for start in (init, bad))
    assert chains.stats["diverged"].tolist() == [False, False, True] + [False] * 4
    assert chains.stats["divergences"].tolist() == [0, 0, 12] + [0] * 4
    assert chains.draws[2].isfinite().all(0).tolist() == [True, False, True, True]
    assert not chains.draws[2, :, 1].isfinite().any()
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(chains.draws[others], healthy.draws[others])


@pytest.mark.filterwarnings("ignore::hos_ext.sampling.RunawayWarning")
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_every_non_finite_value_is_a_divergence(value):
    init = torch.zeros(3, 5)
    init[1, 4] = value
    chains = sample(torch.zeros_like, init, step_size=0.1, n_steps=3, seed=0)
    assert chains.stats["divergences"].tolist() == [0, 3, 0]
    assert chains.stats["diverged"].tolist() == [False, True, False]


def test_large_half_precision_states_are_no_divergence():
    init = torch.full((2, 800), 200.0, dtype=torch.float16)  # the sum exceeds float16
    chains = sample(torch.zeros_like, init, step_size=0.1, n_steps=2, seed=0)
    assert chains.draws.dtype == torch.float16
    assert chains.stats["divergences"].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore::hos_ext.sampling.RunawayWarning")
def test_an_unstable_step_size_is_reported_as_divergence():
    init = torch.ones(3, 2)
    step_size = torch.tensor([0.1, 100.0, 0.1])
    chains = sample(lambda x: -x, init, step_size=step_size, n_steps=60, seed=0, chunk_size=2)
    finite = chains.draws.isfinite().all(2)
    assert torch.equal(chains.stats["divergences"], (~finite).sum(1))
    assert 0 < int(chains.stats["divergences"][1]) < 60
    assert chains.stats["diverged"].tolist() == [False, True, False]


@pytest.mark.filterwarnings("ignore::hos_ext.sampling.RunawayWarning")
def test_raw_curvature_that_overflows_counts_as_divergence():
    chains = sample(
        lambda x: UnscaledScores(x, torch.full_like(x, 1e4), None),
        torch.ones(2, 3),
        method="ozaki",
        step_size=1.0,
        n_steps=1,
        curvature="raw",
        seed=0,
    )
    assert chains.stats["diverged"].tolist() == [True, True]


def test_an_adjusted_chain_rejects_and_counts_what_is_not_finite():
    """The score is NaN right of 1: such proposals are rejected and the chain lives."""

    def score_fn(x):
        assert x.isfinite().all()
        return torch.where(x > 1, torch.nan, -x)

    init = torch.zeros(50, 1)
    chains = sample(score_fn, init, method="mala", step_size=0.5, n_steps=40, seed=0)
    assert chains.draws.isfinite().all()
    assert float(chains.draws.max()) <= 1
    assert int(chains.stats["divergences"].sum()) > 50
    assert not chains.stats["diverged"].any()
    assert float(chains.draws.std(1).min()) > 0


def test_a_proposal_that_overflows_is_rejected_counted_and_not_shown_to_the_score_function():
    def score_fn(x):
        assert x.isfinite().all()
        return torch.where(x > 0, 3e38, -x)

    init = torch.tensor([[-1.0, -2.0], [1.0, -1.0]])
    chains = sample(score_fn, init, method="mala", step_size=2.0, n_steps=3, seed=0)
    assert chains.stats["divergences"].tolist()[1] == 3
    assert torch.equal(chains.draws[1], init[1].expand(3, 2))
    assert not chains.stats["diverged"].any()


def test_an_adjusted_step_is_the_hand_written_one():
    """MALA with a constant score, from its formula: proposal, ratio, and the uniform's stream."""
    init = torch.linspace(-2, 2, 60).double().reshape(30, 2)
    push, h = torch.tensor([0.3, -0.2]).double(), 0.4

    def log_prob(x):
        return -x.square().sum(1)

    options = {"seed": 9, "first_chain": 5}
    chains = sample(
        lambda x: push.expand_as(x),
        init,
        method="mala",
        log_prob=log_prob,
        step_size=h,
        n_steps=2,
        **options,
    )
    x = init
    rates = []
    for k in range(2):
        new = (
            x
            + h * push
            + (2 * h) ** 0.5 * ops.normal((30, 2), seed=9, offset=k, first=5, dtype=torch.float64)
        )
        back = (x - new - h * push).square().sum(1) - (new - x - h * push).square().sum(1)
        ratio = (log_prob(new) - log_prob(x) - back / (4 * h)).exp()
        u = ops.uniform((30,), seed=9, offset=k, first=5, stream=1, dtype=torch.float64)
        rates.append(ratio.clamp(max=1))
        x = torch.where((u < ratio).unsqueeze(1), new, x)
        torch.testing.assert_close(chains.draws[:, k], x)
    torch.testing.assert_close(chains.stats["acceptance"], (rates[0] + rates[1]) / 2)


def test_acceptance_is_that_of_the_steps_after_the_burn_in(init):
    options = {"method": "mala", "step_size": 1.0}
    whole = sample(lambda x: -(x**3), init, burn_in=3, n_steps=4, seed=7, **options)
    warm = sample(lambda x: -(x**3), init, n_steps=3, seed=7, **options)
    rest = sample(lambda x: -(x**3), state=warm.state, n_steps=4, **options)
    torch.testing.assert_close(whole.stats["acceptance"], rest.stats["acceptance"])
    assert not torch.equal(whole.stats["acceptance"], warm.stats["acceptance"])
    nothing = sample(lambda x: -x, init, n_steps=0, **options)
    assert nothing.stats["acceptance"].isnan().all()


@pytest.mark.filterwarnings("ignore::hos_ext.sampling.RunawayWarning")
def test_an_adjusted_chain_whose_score_is_nan_at_the_start_is_reported():
    init = torch.tensor([[0.5], [2.0]])
    chains = sample(
        lambda x: torch.where(x > 1, torch.nan, -x),
        init,
        method="mala",
        step_size=0.1,
        n_steps=5,
        seed=0,
    )
    assert chains.stats["diverged"].tolist() == [False, True]
    assert chains.stats["divergences"].tolist()[1] == 5
    assert torch.equal(chains.draws[1], torch.full((5, 1), 2.0))


def test_a_log_density_of_minus_infinity_is_a_wall_and_no_divergence():
    def log_prob(x):
        return torch.where(x[:, 0] > 0, -x[:, 0], -torch.inf)

    init = torch.linspace(0.1, 3, 40).unsqueeze(1)
    init[0] = -0.1  # outside: it may come in
    options = {"method": "mala", "step_size": 0.5, "n_steps": 400, "seed": 0}
    chains = sample(lambda x: -torch.ones_like(x), init, log_prob=log_prob, **options)
    assert float(chains.draws[1:].min()) > 0
    assert int(chains.stats["divergences"].sum()) == 0
    assert float(chains.draws[1:, 50:].mean()) == pytest.approx(1.0, abs=0.1)  # exponential


def test_lanczos_reports_its_errors_and_what_did_not_converge(init):
    wide = {"method": "ozaki_lanczos", "step_size": 50.0, "n_steps": 4, "seed": 0}
    score_fn = gaussian_low_rank(60)
    start = torch.randn(5, 60, generator=torch.Generator().manual_seed(0)).double()
    good = sample(score_fn, start, **wide)
    assert (good.stats["lanczos_error"] < 1e-3).all()
    assert (good.stats["lanczos_error"] > 0).all()
    assert good.stats["lanczos_unconverged"].tolist() == [0] * 5
    assert (good.stats["lanczos_iterations"] > 4 * 2 * 3).all()
    short = sample(score_fn, start, max_iterations=2, **wide)
    assert short.stats["lanczos_unconverged"].tolist() == [4] * 5
    assert (short.stats["lanczos_error"] > 1e-3).all()
    assert short.stats["lanczos_iterations"].tolist() == [16] * 5
    fine = sample(score_fn, start, tolerance=1e-8, **wide)
    assert (fine.stats["lanczos_iterations"] > good.stats["lanczos_iterations"]).all()


def test_lanczos_reports_the_worse_of_drift_and_noise_and_the_worst_step(init):
    """The score is an eigenvector at the first step, so that only the noise needs iterations."""
    d = 40
    diag = torch.linspace(1, 30, d).double()
    seen = []

    def score_fn(x):
        push = torch.zeros_like(x)
        push[:, 0] = -x[:, 0]
        if seen:  # a curvature that is easy from the second step on
            return UnscaledScores(push, -torch.ones_like(x))
        seen.append(1)
        return UnscaledScores(push, -diag.expand_as(x).contiguous())

    start = torch.ones(3, d).double()
    options = {"method": "ozaki_lanczos", "step_size": 5.0, "seed": 0, "max_iterations": 3}
    chains = sample(score_fn, start, n_steps=2, **options)
    assert chains.stats["lanczos_unconverged"].tolist() == [1] * 3
    assert (chains.stats["lanczos_error"] > 1e-3).all()


def gaussian_low_rank(d):
    """Scores of a Gaussian of precision diag(1 ... 30) - U U^T, rank 2."""
    diag = torch.linspace(1, 30, d).double()
    factor = 0.5 * torch.randn(d, 2, generator=torch.Generator().manual_seed(1)).double()
    factor = factor * (diag / d).sqrt().unsqueeze(1)

    def score_fn(x):
        push = -diag * x + (x @ factor) @ factor.T
        return UnscaledScores(push, -diag.expand_as(x), factor.expand(len(x), -1, -1))

    return score_fn


@pytest.mark.filterwarnings("ignore::hos_ext.sampling.RunawayWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_non_finite_state_harms_no_other_chain_in_any_method(init, method):
    bad = init.clone()
    bad[2, 1] = float("nan")
    score_fn = varying(isotropic="isotropic" in method)
    options = {"method": method, "step_size": 0.1, "n_steps": 4, "seed": 7}
    healthy, chains = (sample(score_fn, start, **options) for start in (init, bad))
    assert chains.stats["diverged"].tolist() == [False, False, True] + [False] * 4
    assert chains.stats["divergences"].tolist() == [0, 0, 4] + [0] * 4
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(chains.draws[others], healthy.draws[others])


# ------------------------------------------------------------------------------------------- arviz


def test_chains_become_arviz_data(init):
    base = pytest.importorskip("arviz_base")
    start = init.reshape(7, 2, 2)
    options = {"method": "mh_ozaki", "step_size": 0.1, "n_steps": 6, "seed": 1}
    chains = sample(lambda x: UnscaledScores(-(x**3), -3 * x**2), start, **options)
    tree = chains.to_arviz("image")
    assert set(tree.children) == {"posterior", "sample_stats"}
    image = tree["posterior"]["image"]
    assert image.dims[:2] == ("chain", "draw")
    assert torch.equal(torch.from_numpy(image.values), chains.draws)
    stats = tree["sample_stats"]
    assert stats["acceptance"].dims == ("chain",)
    assert torch.equal(torch.from_numpy(stats["acceptance"].values), chains.stats["acceptance"])
    assert stats.attrs["method"] == "mh_ozaki"
    assert stats.attrs["n_score_evaluations"] == 7
    assert base.extract(tree).sizes["sample"] == 42


def test_to_arviz_without_arviz_names_the_extra(init, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    with pytest.raises(RuntimeError) as error:
        run(init).to_arviz()
    assert str(error.value).startswith(
        "to_arviz: arviz_base must be installed (pip install hos_ext[cli]), got: "
    )


def test_the_run_is_timed(init):
    assert 0 < run(init).stats["seconds"] < 60


# ---------------------------------------------------------------------------------------- progress


def test_progress_shows_the_method_and_all_steps(init, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    shown = run(init, progress=True, chunk_size=3)
    assert torch.equal(shown.draws, run(init).draws)
    told = capsys.readouterr()
    assert told.out == ""
    assert "ozaki" in told.err
    steps = re.findall(r"(\d+)/(\d+)", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", told.err))
    assert steps[-1][0] == steps[-1][1] != "0"


def test_progress_without_a_terminal_is_a_line_every_few_seconds(init, monkeypatch, caplog):
    pytest.importorskip("rich")
    caplog.set_level("INFO", "hos_ext")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    run(init, progress=True, chunk_size=3)
    lines = [record.getMessage() for record in caplog.records]
    total = len(lines)
    assert [line.split(":")[0] for line in lines] == [
        f"step {i} of {total}" for i in range(1, total + 1)
    ]
    assert lines[-1].endswith(" steps/s, 0:00:00 left")


def test_progress_without_rich_names_the_extra(init, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(RuntimeError) as error:
        run(init, progress=True)
    assert str(error.value).startswith(
        "sample: rich.progress must be installed (pip install hos_ext[cli]), got: "
    )


# ------------------------------------------------------------------------------------------ errors


class Triple(NamedTuple):
    score: Tensor
    diag: Tensor
    factor: None


def _with_factor(factor, sign=None):
    return lambda x: UnscaledScores(-x, -torch.ones_like(x), factor, sign)


STATE = {"x": torch.ones(2, 3), "step": 5, "since_draw": 0, "seed": 7, "first_chain": 4}
X = torch.ones(2, 3)
NEEDS_SCORES = (
    "score_fn must return UnscaledScores(score, diag, factor) or DenseScores(score, hessian) for "
    "method 'ozaki', got "
)
KNOWN = ", ".join(repr(method) for method in METHODS)


def _dense(hessian):
    return lambda x: DenseScores(-x, hessian)


def _alternating():
    kinds = iter([lambda x: -x, lambda x: UnscaledScores(-x, -torch.ones_like(x))] * 9)
    return lambda x: next(kinds)(x)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"method": "leapfrog"},
            ValueError,
            f"method must be one of {KNOWN}, got 'leapfrog'",
        ),
        (
            {"method": ["a"]},
            ValueError,
            f"method must be one of {KNOWN}, got ['a']",
        ),
        (
            {"curvature": "square"},
            ValueError,
            "curvature must be one of 'clamp', 'abs', 'raw', got 'square'",
        ),
        ({"n_steps": -1}, ValueError, "n_steps must be at least 0, got -1"),
        ({"n_steps": 2.0}, TypeError, "n_steps must be an integer, got float"),
        ({"n_steps": True}, TypeError, "n_steps must be an integer, got bool"),
        ({"burn_in": -3}, ValueError, "burn_in must be at least 0, got -3"),
        ({"thin": 0}, ValueError, "thin must be at least 1, got 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"first_chain": -1}, ValueError, "first_chain must be at least 0, got -1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be below 2**64, got 18446744073709551616"),
        ({"seed": "a"}, TypeError, "seed must be an integer, got str"),
        ({"step_size": 0.0}, ValueError, "step_size must be positive and finite, got 0.0"),
        ({"step_size": float("nan")}, ValueError, "step_size must be positive and finite, got nan"),
        (
            {"step_size": torch.tensor([1.0, float("inf")])},
            ValueError,
            "step_size must be positive and finite, got inf",
        ),
        (
            {"step_size": torch.ones(3)},
            ValueError,
            "step_size must be a float or have shape (2,), got shape (3,)",
        ),
        (
            {"step_size": torch.ones(2, device="meta")},
            ValueError,
            "step_size must be on cpu like x, got meta",
        ),
        ({"step_size": "0.1"}, TypeError, "step_size must be a float or a tensor, got str"),
        ({"init": None}, ValueError, "exactly one of init and state must be given, got neither"),
        ({"state": STATE}, ValueError, "exactly one of init and state must be given, got both"),
        ({"init": [[1.0]]}, TypeError, "init must be a tensor, got list"),
        (
            {"init": torch.ones(3)},
            ValueError,
            "init must have shape (chain, *dims) with at least one entry in a chain, got (3,)",
        ),
        (
            {"init": torch.ones(3, 0)},
            ValueError,
            "init must have shape (chain, *dims) with at least one entry in a chain, got (3, 0)",
        ),
        (
            {"init": torch.ones(2, 3, dtype=torch.int64)},
            TypeError,
            "init must be floating point, got torch.int64",
        ),
        (
            {"init": None, "state": {"x": 1}},
            TypeError,
            "state must be the state of Chains, got keys ['x']",
        ),
        ({"init": None, "state": 3}, TypeError, "state must be the state of Chains, got int"),
        (
            {"init": None, "state": STATE, "seed": 8},
            ValueError,
            "seed must be None or 7 as in state, got 8",
        ),
        (
            {"init": None, "state": STATE, "first_chain": 2},
            ValueError,
            "first_chain must be 0 or 4 as in state, got 2",
        ),
        (
            {"score_fn": lambda x: x[:, 1:]},
            ValueError,
            "score from score_fn must have shape (2, 3) like x, got (2, 2)",
        ),
        (
            {"score_fn": lambda x: x.double()},
            ValueError,
            "score from score_fn must be torch.float32 on cpu like x, got torch.float64 on cpu",
        ),
        (
            {"score_fn": lambda x: x.to("meta")},
            ValueError,
            "score from score_fn must be torch.float32 on cpu like x, got torch.float32 on meta",
        ),
        (
            {"score_fn": lambda x: None},
            TypeError,
            "score from score_fn must be a tensor, got NoneType",
        ),
        (
            {"score_fn": lambda x: -x, "method": "ozaki"},
            TypeError,
            NEEDS_SCORES + "Tensor",
        ),
        (
            {"score_fn": lambda x: Triple(-x, -x, None), "method": "ozaki"},
            TypeError,
            NEEDS_SCORES + "Triple",
        ),
        (
            {"score_fn": lambda x: UnscaledScores(-x, -x[:, :1], None), "method": "ozaki"},
            ValueError,
            "diag from score_fn must have shape (2, 3) like x, got (2, 1)",
        ),
        (
            {"score_fn": _with_factor(torch.ones(2, 4, 1)), "method": "ozaki"},
            ValueError,
            (
                "factor from score_fn must have shape (2, 3, r), got "
                "shape (2, 4, 1) torch.float32 on cpu"
            ),
        ),
        (
            {"score_fn": _with_factor(torch.ones(2, 3, 1).double()), "method": "ozaki"},
            ValueError,
            "factor from score_fn must be torch.float32 on cpu like x, got torch.float64 on cpu",
        ),
        (
            {"score_fn": _with_factor(torch.ones(2, 3, 2), torch.ones(1)), "method": "ozaki"},
            ValueError,
            "sign from score_fn must have shape (2,) (one for each column), got (1,)",
        ),
        (
            {"score_fn": _dense(torch.ones(2, 3, 2)), "method": "ozaki_full"},
            ValueError,
            (
                "hessian from score_fn must have shape (2, 3, 3), got shape (2, 3, 2) "
                "torch.float32 on cpu"
            ),
        ),
        (
            {"score_fn": _dense(torch.ones(2, 3, 3).double()), "method": "ozaki_full"},
            ValueError,
            "hessian from score_fn must be torch.float32 on cpu like x, got torch.float64 on cpu",
        ),
        (
            {"score_fn": _dense(torch.eye(3).expand(2, 3, 3)), "method": "ozaki_isotropic"},
            TypeError,
            (
                "score_fn must return UnscaledScores(score, diag, factor) for method "
                "'ozaki_isotropic', got DenseScores"
            ),
        ),
        (
            {"init": X.half(), "method": "ozaki_full"},
            ValueError,
            "init must have dtype float32, float64 for method 'ozaki_full', got torch.float16",
        ),
        (
            {"log_prob": lambda x: x.sum(1), "method": "ozaki"},
            ValueError,
            "log_prob must be None for the unadjusted method 'ozaki', got one",
        ),
        (
            {"log_prob": lambda x: x, "method": "mala"},
            ValueError,
            (
                "log_prob must return floating point of shape (2,), got shape (2, 3) "
                "torch.float32 on cpu"
            ),
        ),
        (
            {"score_fn": _alternating(), "method": "mala"},
            TypeError,
            (
                "score_fn must return the same kind of scores at every call, got UnscaledScores "
                "after Tensor"
            ),
        ),
        (
            {"score_fn": _with_factor(torch.ones(2, 3, 1), torch.tensor([0.5])), "method": "ozaki"},
            ValueError,
            "sign from score_fn must hold +1 or -1, got [0.5]",
        ),
        (
            {"score_fn": _with_factor(torch.ones(2, 3, 1), [1.0]), "method": "ozaki"},
            TypeError,
            "sign from score_fn must be a tensor, got list",
        ),
        (
            {
                "score_fn": _dense(torch.tensor([[1.0, 0.9], [0.0, 1.0]]).expand(2, 2, 2)),
                "init": torch.ones(2, 2),
                "method": "ozaki_lanczos",
            },
            ValueError,
            (
                "hessian from score_fn: matrix must be symmetric, got a difference of 0.9 for "
                "sample 0"
            ),
        ),
        ({"tolerance": 2.0}, ValueError, "tolerance must be below 1, got 2"),
        (
            {"step_size": torch.tensor(1)},
            ValueError,
            "step_size must be floating, got torch.int64",
        ),
        (
            {"step_size": torch.tensor(1.0, requires_grad=True)},
            ValueError,
            "step_size must not require grad, got requires_grad=True",
        ),
        ({"tolerance": 0.0}, ValueError, "tolerance must be finite and > 0, got 0"),
        ({"tolerance": "small"}, TypeError, "tolerance must be a number, got 'small'"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be at least 1, got 0"),
    ],
)
def test_sample_refuses(options, kind, message):
    options = {"score_fn": lambda x: -x, "init": X, "step_size": 0.1, "n_steps": 2} | options
    score_fn, init = options.pop("score_fn"), options.pop("init")
    with pytest.raises(kind) as error:
        sample(score_fn, init, **options)
    assert str(error.value) == f"sample: {message}"
