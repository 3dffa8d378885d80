"""Probes of every kind against dense matrices: what they find, how far off, and what they say."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import WITHIN, assert_near
from torch import Tensor

from hos_ext import DPLR
from hos_ext.linalg import DenseOperator, ScoreHessian, exchangeable, lattice, probing, truncated
from hos_ext.linalg.hutchinson import random_signs
from hos_ext.linalg.probing import Products
from hos_ext.ops.noise import draw_uniform
from hos_ext.random import STREAM_PROBE, Key
from hos_ext.uncertainty.from_score import posterior_from_score

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
F64 = torch.float64
KINDS = ("signs", "lattice", "exchangeable")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def image(dims: tuple[int, ...], *, length: float = 1.5, uneven: float = 0.1) -> Tensor:
    """(D, D): of an image, entries related as far as length, a little unsymmetrical."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=F64) for n in dims))
    near = torch.exp(-torch.cdist(places, places) / length)
    size = 1 + noise(len(places)).abs()
    near = size[:, None] * near * size
    return near * (1 + uneven * noise(*near.shape, seed=1)) * near.new_tensor(0.1)


def falling(size: int, decay: float = 0.5) -> Tensor:
    """(D, D), unsymmetrical, with singular values decay^i."""
    left, right = (torch.linalg.qr(noise(size, size, seed=s))[0] for s in (2, 3))
    return left * decay ** torch.arange(size, dtype=F64) @ right


def products(matrix: Tensor, rows: int, dims: tuple[int, ...] | None = None) -> Products:
    like = matrix.new_zeros(rows, len(matrix))
    return Products(lambda v: matrix @ v, lambda v: matrix.mT @ v, like, dims or (len(matrix),), 32)


def estimated(name: str, matrix: Tensor, n: int, kind: Any, rows: int, dims: Any = None, **more):
    found = getattr(probing, name)(products(matrix, rows, dims), n, Key(5), kind, **more)
    exact = matrix.diagonal() if name == "diagonal" else matrix.diagonal().sum()
    return found, found.value - exact


# ------------------------------------------------------------------------------------ the lattice


@pytest.mark.parametrize(("dims", "m"), [((6, 6), 7), ((5, 8), 4), ((2, 4, 4), 5), ((9,), 4)])
def test_the_lattice_is_the_one_with_least_in_common_by_naive_count(dims, m):
    places = list(itertools.product(*map(range, dims)))

    def cost(classes: list[int]) -> float:
        pairs = itertools.combinations(range(len(places)), 2)
        return sum(
            math.exp(-math.dist(places[i], places[j]) / 2)
            for i, j in pairs
            if classes[i] == classes[j]
        )

    steps = itertools.product(range(m), repeat=len(dims) - 1)
    costs = [
        cost([sum(map(math.prod, zip((*s, 1), p, strict=True))) % m for p in places]) for s in steps
    ]
    found = lattice.lattice(dims, m)
    assert set(found.tolist()) == set(range(m))
    # Beyond its reach the search sees no pairs: these are far apart, and hardly count.
    assert cost(found.tolist()) <= min(costs) * 1.02
    assert max(costs) > 1.15 * min(costs) or len(costs) == 1


def test_the_lattice_of_many_classes_and_axes_is_chosen_among_some():
    for dims, m in (((16, 16, 16), 128), ((2, 3, 4, 5), 16)):
        found = lattice.lattice(dims, m)
        places = torch.cartesian_prod(*map(torch.arange, dims)).double()
        apart = torch.cdist(places, places)
        apart[(found[:, None] != found) | (apart == 0)] = math.inf
        assert apart.min() > 0.6 * m ** (1 / len(dims))
        assert torch.bincount(found, minlength=m).min() > 0


def test_a_lattice_is_exact_where_nothing_reaches_from_one_of_a_class_to_the_next():
    dims, rows = (8, 8), 3
    places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).double()
    matrix = noise(64, 64) * (torch.cdist(places, places) < 2)
    found, error = estimated("diagonal", matrix, 12, "lattice", rows, dims)  # 9 classes
    assert error.abs().max() < 1e-12
    assert found.standard_error.max() < 1e-7  # the root of what the two probes differ by
    dense, error = estimated("diagonal", matrix, 12, "signs", rows, dims)
    assert dense.standard_error.min() > 0.1


def test_a_lattice_is_unbiased_with_the_variance_of_its_classes():
    dims, n, rows = (5, 6), 8, 4000
    matrix = noise(30, 30)  # no image at all, not symmetric
    error = estimated("diagonal", matrix, n, "lattice", rows, dims)[1]
    assert (error.mean(0) / (error.std(0) / rows**0.5)).abs().max() < WITHIN + 1
    m = n - lattice.repeats(n, 30)
    assert m == 6
    classes = lattice.lattice(dims, m)
    shared = (classes[:, None] == classes) & ~torch.eye(30, dtype=torch.bool)
    alone = (matrix.square() * shared).sum(1)
    # The moves put each entry into each class: in n - m of m cases it is seen twice.
    wanted = alone * (1 - (n - m) / m / 2)
    assert (error.square().mean(0) / wanted - 1).abs().max() < 0.2
    total = error.sum(1).square().mean()
    both = ((matrix + matrix.mT).square() * shared).sum() / 2
    assert abs(total / (both * (1 - (n - m) / m / 2)) - 1) < 0.15


def test_a_lattice_is_nearer_than_signs_on_an_image():
    for name in ("diagonal", "trace"):
        near, far = (
            estimated(name, image((12, 12)), 16, kind, 100, (12, 12))[1].square().mean().sqrt()
            for kind in ("lattice", "signs")
        )
        assert near < 0.6 * far


# ------------------------------------------------------------------------------------ error bars


def coverage(found, error: Tensor, width: float = 1.6449) -> float:
    return float((error.abs() <= width * found.standard_error).double().mean())


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize(("name", "n"), [("diagonal", 16), ("trace", 16), ("diagonal", 48)])
def test_the_intervals_of_a_lattice_hold_what_they_say(name, n, deflated):
    dims = (16, 16)
    matrix = image(dims)
    known = matrix.diag().diag()  # probes see it exactly: it changes nothing
    more = {"deflation": DenseOperator(known.expand(200, -1, -1))} if deflated else {}
    found, error = estimated(name, matrix, n, "lattice", 200, dims, **more)
    assert 0.85 < coverage(found, error) < 0.95
    assert 0.6 < coverage(found, error, 1.0) < 0.77
    ratio = found.standard_error.square().mean() / error.square().mean()
    assert 0.8 < ratio < 1.25


def test_entries_that_a_lattice_saw_twice_are_surer():
    dims, rows, n = (16, 16), 300, 32
    matrix = image(dims)
    found, error = estimated("diagonal", matrix, n, "lattice", rows, dims)
    m = n - lattice.repeats(n, 256)
    move = draw_uniform(Key(5, n), STREAM_PROBE, (rows, 1), found.value)
    twice = (lattice.lattice(dims, m) + (move * m).long()) % m < n - m
    for some in (twice, ~twice):
        ratio = found.standard_error[some].square().mean() / error[some].square().mean()
        assert 0.8 < ratio < 1.25


@pytest.mark.parametrize("name", ["diagonal", "trace"])
def test_the_intervals_of_signs_hold_by_student(name):
    found, error = estimated(name, image((10, 10)), 12, "signs", 400)
    assert abs(coverage(found, error, 1.7959) - 0.9) < 0.04  # t of 11 degrees of freedom


def test_the_errors_of_exchangeable_probes_are_of_the_right_size():
    for name in ("diagonal", "trace"):
        found, error = estimated(name, falling(60, 0.8), 24, "exchangeable", 200)
        assert 0.5 < found.standard_error.square().mean().sqrt() / error.square().mean().sqrt() < 2


# ---------------------------------------------------------------------------------- exchangeable


def test_exchangeable_estimates_are_those_of_the_naive_loop():
    matrix, rows = noise(20, 20), 3
    signs = torch.cat(list(random_signs(5, Key(1), matrix.new_zeros(rows, 20), 2)), -1)
    wanted: dict[str, list[Tensor]] = {"diagonal": [], "trace": []}
    for i in range(5):
        others = [j for j in range(5) if j != i]
        q = torch.linalg.qr(matrix @ signs[..., others])[0]
        w, into = signs[..., i : i + 1], q @ q.mT
        wanted["diagonal"].append(
            (into @ matrix).diagonal(dim1=1, dim2=2)
            + (w * (matrix @ w - into @ (matrix @ w))).squeeze(-1)
        )
        left = w - into @ w
        trace = (q.mT @ matrix @ q).diagonal(dim1=1, dim2=2).sum(-1)
        wanted["trace"].append(trace + (left * (matrix @ left)).sum((1, 2)))
    diagonal = exchangeable.diagonal(lambda v: matrix @ v, lambda v: matrix.mT @ v, signs)
    trace = exchangeable.trace(lambda v: matrix @ v, signs)
    for name, found in (("diagonal", diagonal), ("trace", trace)):
        terms = torch.stack(wanted[name], -1)
        assert_near(found.value, terms.mean(-1))
        assert_near(found.standard_error, terms.std(-1) / 5**0.5)


@pytest.mark.parametrize("name", ["diagonal", "trace"])
def test_exchangeable_probes_are_exact_at_low_rank_and_win_where_the_spectrum_falls(name):
    left, right = noise(30, 3, seed=4), noise(3, 30, seed=5)
    found, error = estimated(name, left @ right, 8, "exchangeable", 4)  # 4 probes for rank 3
    assert error.abs().max() < 1e-10 * 30
    assert found.standard_error.max() < 1e-9
    found, error = estimated(name, torch.zeros(9, 9, dtype=F64), 8, "exchangeable", 2)
    assert error.abs().max() == 0
    root = {
        kind: estimated(name, falling(60), 24, kind, 50)[1].square().mean().sqrt()
        for kind in ("exchangeable", "signs")
    }
    assert root["exchangeable"] < 0.02 * root["signs"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["diagonal", "trace"])
def test_every_kind_is_unbiased_whatever_is_taken_off(name, kind):
    matrix, rows = noise(14, 14), 4000
    guess = noise(14, 14, seed=9)
    guess = DenseOperator((guess + guess.mT).expand(rows, -1, -1))
    for deflation in (None, guess):
        error = estimated(name, matrix, 8, kind, rows, deflation=deflation)[1]
        assert (error.mean(0) / (error.std(0) / rows**0.5)).abs().max() < WITHIN + 1


# ----------------------------------------------------------------------- through ScoreHessian


def hessian(rows: int = 4, *, matrix: Tensor | None = None, **options: Any) -> ScoreHessian:
    """Of an unsymmetrical network on (3, 4) points, or of a linear one."""
    x = noise(rows, 3, 4, seed=7)
    weight = noise(12, 12) / 4

    def score(x: Tensor) -> Tensor:
        if matrix is not None:
            return (x.flatten(1) @ matrix.mT).reshape(x.shape)
        return ((x.flatten(1) @ weight).tanh() @ weight - x.flatten(1)).reshape(x.shape)

    return ScoreHessian(score, x, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["estimate_diagonal", "estimate_trace"])
def test_estimates_of_every_kind_repeat_and_do_not_depend_on_chunks_or_batch(name, kind):
    whole = hessian(chunk_size=None).scale(2.0) + 0.5
    parts = hessian(chunk_size=3).scale(2.0) + 0.5
    options: dict[str, Any] = {"probes": kind, "seed": 4}
    found = getattr(whole, name)(10, **options)
    for other in (getattr(parts, name)(10, **options), getattr(whole, name)(10, **options)):
        assert_near(other.value, found.value)
        assert_near(other.standard_error, found.standard_error)
    x = whole.x[2:]
    last = ScoreHessian(whole._jacobian.score_fn, x, chunk_size=3).scale(2.0) + 0.5
    alone = getattr(last, name)(10, first=2, **options)
    assert_near(alone.value, found.value[2:])
    assert_near(alone.standard_error, found.standard_error[2:])
    assert not torch.equal(getattr(whole, name)(10, probes=kind).value, found.value)
    dense = whole.dense().diagonal(dim1=1, dim2=2)
    exact = getattr(whole, name)(12, probes=kind)
    assert_near(exact.value, dense if name == "estimate_diagonal" else dense.sum(-1))
    assert float(exact.standard_error.abs().max()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_none_and_float32_are_answered_in_kind(kind):
    for rows, dtype in ((0, F64), (2, torch.float32)):
        x = noise(rows, 3, 4).to(dtype)
        # What each kind finds without an error: a diagonal, or rank 1.
        flat = (
            torch.ones(12, 12, dtype=dtype) if kind == "exchangeable" else torch.eye(12).to(dtype)
        )
        found = ScoreHessian(
            lambda x, flat=flat: -2 * (x.flatten(1) @ flat).reshape(x.shape), x, check=False
        )
        for estimate, shape in (
            (found.estimate_diagonal(6, probes=kind, seed=0), (rows, 12)),
            (found.estimate_trace(6, probes=kind, seed=0), (rows,)),
        ):
            assert estimate.value.shape == estimate.standard_error.shape == shape
            assert estimate.value.dtype == estimate.standard_error.dtype == dtype
            each = -2.0 if len(shape) == 2 else -24.0
            assert torch.allclose(estimate.value, torch.full(shape, each, dtype=dtype), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_off_leaves_the_estimate_of_the_rest(kind):
    taken = DPLR(noise(4, 12, seed=1), noise(4, 12, 2, seed=2))
    one = hessian()
    matrix = one.dense()[0]
    alone = hessian(matrix=matrix)  # linear: the same matrix in every row
    for name in ("estimate_diagonal", "estimate_trace"):
        options: dict[str, Any] = {"probes": kind, "seed": 2}
        # All of it: nothing is left, and nothing random.
        whole = DenseOperator(((matrix + matrix.mT) / 2).expand(4, -1, -1))
        symmetric = hessian(matrix=(matrix + matrix.mT) / 2)
        found = getattr(symmetric, name)(8, deflation=whole, **options)
        assert_near(found.value, getattr(symmetric, name.removeprefix("estimate_"))())
        assert found.standard_error.max() < 1e-12
        # A part: the estimate of A - B, and B's own.
        found = getattr(alone, name)(8, deflation=taken, **options)
        rest = [hessian(matrix=matrix - part) for part in taken.dense()]
        for row, left in enumerate(rest):
            wanted = getattr(left, name)(8, **options)
            own = taken.diagonal()[row] if name == "estimate_diagonal" else taken.trace()[row]
            assert_near(found.value[row], wanted.value[row] + own)
            assert_near(found.standard_error[row], wanted.standard_error[row])


def test_exchangeable_probes_of_an_unsymmetrical_network_multiply_with_its_transpose():
    one = hessian().scale(3.0) + 1.0
    matrix = one.dense()
    signs = torch.cat(list(random_signs(4, Key(2), one.x.flatten(1), 4)), -1)
    wanted = exchangeable.diagonal(lambda v: matrix @ v, lambda v: matrix.mT @ v, signs)
    found = one.estimate_diagonal(8, probes="exchangeable", seed=2)
    assert_near(found.value, wanted.value)
    assert_near(found.standard_error, wanted.standard_error)
    found = one.estimate_trace(8, probes="exchangeable", seed=2)
    assert_near(found.value, exchangeable.trace(lambda v: matrix @ v, signs).value)


def test_low_rank_and_the_posterior_take_their_remainder_by_any_probes():
    matrix = image((3, 4), length=1.0, uneven=0.0) + torch.eye(12, dtype=F64)
    one = hessian(matrix=matrix)
    for kind in KINDS:
        found = one.low_rank(2, n_probes=8, probes=kind, remainder="diagonal", floor=0.0, seed=1)
        pairs = one.eigenpairs(2)
        known = DPLR(torch.zeros(4, 12, dtype=F64), pairs.vectors * pairs.values.sqrt()[:, None])
        wanted = one.estimate_diagonal(8, probes=kind, deflation=known, seed=1)
        rest = wanted.value - known.diagonal()
        expected = truncated(
            pairs.values, pairs.vectors, rest, remainder="diagonal", floor=0.0
        ).diagonal()
        assert_near(found.diagonal(), expected)
    x = one.x
    made = [
        posterior_from_score(
            lambda x: -x + (x.flatten(1) @ matrix.mT).reshape(x.shape) / 10,
            x,
            0.5,
            rank=2,
            n_probes=8,
            probes=kind,
            remainder="diagonal",
            seed=0,
        ).covariance.diagonal()
        for kind in ("signs", "lattice")
    ]
    assert not torch.equal(*made)
    assert (made[0].sum(-1) / made[1].sum(-1) - 1).abs().max() < 0.05


@pytest.mark.parametrize("name", ["estimate_diagonal", "estimate_trace"])
def test_probes_that_cannot_be_are_refused(name):
    estimate = getattr(hessian(), name)
    where = f"ScoreHessian.{name}: "

    def refused(message: str, *arguments: Any, kind: type[Exception] = ValueError, **options: Any):
        with pytest.raises(kind, match=where + message):
            estimate(*arguments, **options)

    refused(
        "probes must be one of 'signs', 'lattice', 'exchangeable', got 'hutch'", 4, probes="hutch"
    )
    refused("n_probes must be at least 3 for probes='lattice', got 2", 2, probes="lattice")
    refused(
        "n_probes must be at least 4 for probes='exchangeable', got 2", 2, probes="exchangeable"
    )
    refused("n_probes must be even for probes='exchangeable', got 7", 7, probes="exchangeable")
    refused("n_probes must be at least 2, got 1", 1, probes="lattice")
    one = torch.ones(4, 12, dtype=F64)
    refused("deflation must be a SymmetricOperator, got Tensor", 4, deflation=one, kind=TypeError)
    refused(
        r"deflation must have shape \(4, 12, 12\), got \(3, 12, 12\)", 4, deflation=DPLR(one[1:])
    )
    message = "deflation must have dtype torch.float64 on cpu, got torch.float32 on cpu"
    refused(message, 4, deflation=DPLR(one.float()))
    refused("deflation must have shape", 20, deflation=DPLR(one[1:]))  # also where it is not used
    with pytest.raises(ValueError, match="low_rank: n_probes must be at least 3 for probes='latt"):
        hessian().low_rank(1, n_probes=2, probes="lattice")
    with pytest.raises(ValueError, match="posterior_from_score: probes must be one of 'signs'"):
        posterior_from_score(lambda x: -x / 2, one, 1.0, rank=1, probes="none")  # type: ignore[arg-type]
