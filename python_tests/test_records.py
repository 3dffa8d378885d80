"""Records: what functions return says what it is, moves, is cut by rows, and is a tree of torch."""

import copy
import dataclasses
import io
import pickle
import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from hos_ext import DPLR, MLP, Posterior, Scores, posterior, sample
from hos_ext.diffusion import PosteriorMixture
from hos_ext.linalg import Estimate, Spectrum, eigenpairs, lanczos, matrix_rows
from hos_ext.linalg.spectrum import dense_spectrum, spectrum_apply
from hos_ext.records import Record, RowRecord
from hos_ext.sampling import (
    adapt_step_size,
    search_step_size,
)
from hos_ext.scores import DenseScores, MatrixFreeScores
from hos_ext.uncertainty import DecodedPosterior, calibration_report, conformal

SIGN = torch.tensor([1.0, -1.0])


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix():
    return DPLR(values(8, 6).square() + 1, values(8, 6, 2, seed=1) / 9, SIGN)


def scores():
    return Scores(values(8, 2, 3), values(8, 2, 3, seed=1), values(8, 6, 2, seed=2), SIGN)


def a_posterior():
    return Posterior(values(8, 2, 3, seed=3), matrix())


def chains(n_steps=4):
    return sample(lambda x: -x, values(8, 3), step_size=0.1, n_steps=n_steps, seed=1)


def report():
    return calibration_report(values(8, 2, 3, seed=5), a_posterior(), tau=0.1)


RECORDS = {
    "Scores(8 x (2, 3), rank 2)": scores,
    "UnscaledScores(8 x (2, 3), rank 2)": lambda: scores().unscaled(0.5),
    "DenseScores(8 x (2, 3))": lambda: DenseScores(values(8, 2, 3), values(8, 6, 6)),
    "MatrixFreeScores(8 x (2, 3), DPLR)": lambda: MatrixFreeScores(values(8, 2, 3), matrix()),
    "Posterior(8 x (2, 3), rank 2)": a_posterior,
    "Chains(8 x 4 x (3,))": chains,
    "Estimate(8 x (6,))": lambda: Estimate(values(8, 6), values(8, 6).abs()),
    "Eigenpairs(B=8, D=6, k=2)": lambda: eigenpairs(matrix(), 2),
    "Spectrum(B=8, D=6, m=6)": lambda: dense_spectrum(matrix().dense()),
    "LanczosResult(2 functions, 8 rows)": lambda: lanczos(
        matrix_rows(matrix()), values(8, 6), [torch.exp, torch.sin]
    ),
    "StepSizeSearch(step_size ": lambda: search_step_size(
        lambda x: -x, values(8, 1), [0.01, 0.5], n_steps=9
    ),
    "StepSizeAdaptation": lambda: adapt_step_size(
        lambda x: -x, values(8, 1), method="mala", step_size=0.1, n_steps=9, seed=0
    ),
    "DecodedPosterior(8 x (2, 3))": lambda: DecodedPosterior(
        values(8, 2, 3), values(8, 2, 3, seed=1), values(8, 2, 3, seed=2), None
    ),
    "CalibrationReport(8 x (6,), mahalanobis ": report,
    "PosteriorMixture(2 x 4 x (2, 3), rank 2)": lambda: PosteriorMixture(a_posterior(), 4),
    "Conformal(simultaneous, level 0.5, 8 samples of (2, 3))": lambda: conformal(
        values(8, 2, 3), a_posterior(), level=0.5
    ),
}


@pytest.fixture(params=RECORDS)
def named(request):
    """A record and the beginning of its repr."""
    return request.param, RECORDS[request.param]()


def same(one, other):
    """Whether two records hold equal numbers."""
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    return type(one) is type(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs
    )


# --------------------------------------------------------------------------------- what it says


def test_a_record_says_what_it_is_in_a_line(named):
    text, record = named
    assert repr(record).startswith(text.removesuffix(")"))
    assert "\n" not in repr(record)
    assert len(repr(record)) < 90


def test_every_record_of_the_package_is_among_these():
    found, left = set(), [Record]
    while left:
        left += (kinds := left.pop().__subclasses__())
        found |= {k.__name__ for k in kinds if k.__module__.startswith("hos_ext")}
    assert {k for k in found if not k.startswith("_")} == {
        *(text.partition("(")[0] for text in RECORDS),
        "RowRecord",
    }


def test_dtype_and_device_are_said_where_they_are_unusual():
    assert repr(scores().to(torch.float64)) == "Scores(8 x (2, 3), rank 2, float64)"
    assert repr(a_posterior().to("meta")) == "Posterior(8 x (2, 3), rank 2, meta)"
    assert (
        repr(Scores(values(4, 1, 28, 28), values(4, 1, 28, 28)))[7:] == "4 x (1, 28, 28), rank 0)"
    )


def test_a_record_is_read_by_its_names_alone(named):
    _, record = named
    name = next(iter(record.__dataclass_fields__))
    with pytest.raises(TypeError, match=r"fields must be read by name \(") as error:
        _first, *_rest = record
    assert name in str(error.value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, name, None)


def test_replace_makes_a_copy_and_knows_the_fields():
    one = scores()
    other = one.replace(c=torch.zeros(8, 2, 3))
    assert other.c.sum() == 0
    assert one.c.sum() != 0
    assert other.factor is one.factor
    with pytest.raises(TypeError) as error:
        one.replace(diag=one.c)
    assert str(error.value) == (
        "Scores.replace: fields must be among scaled_score, c, factor, sign, got diag"
    )


def test_records_are_copied_and_pickled(named):
    _, record = named
    assert same(copy.deepcopy(record), record)
    if not isinstance(record, MatrixFreeScores):
        assert same(pickle.loads(pickle.dumps(record)), record)


# -------------------------------------------------------------------------------------- to, rows


def test_to_moves_numbers_and_keeps_flags_and_counts(named):
    _, record = named
    there = record.to(torch.float64)
    assert type(there) is type(record)
    for one, other in zip(tree_leaves(record), tree_leaves(there), strict=True):
        if isinstance(one, torch.Tensor):
            wanted = torch.float64 if one.is_floating_point() else one.dtype
            assert other.dtype == wanted
            assert torch.equal(other, one.to(wanted))
        else:
            assert one == other
    moved = [t for t in tree_leaves(record.to("meta")) if isinstance(t, torch.Tensor)]
    assert all(t.device.type == "meta" for t in moved)
    both = record.to("cpu", torch.float64)
    assert same(both, there)
    assert same(record.to(), record)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (
            (torch.int64,),
            ValueError,
            "dtype must be float32, float64, float16, bfloat16",
        ),
        ((3,), TypeError, "device must be a device or its name, got 3"),
        (("here",), ValueError, "device must be a device of this machine, got 'here'"),
        ((torch.float32, torch.float64), ValueError, "one dtype must be given, got torch.float32 "),
    ],
)
def test_to_refuses_what_is_no_place(given, kind, message):
    with pytest.raises(kind) as error:
        scores().to(*given)
    assert str(error.value).startswith(f"Scores.to: {message}")


@pytest.mark.parametrize(
    ("index", "numbers"),
    [
        (slice(3, 5), [3, 4]),
        (slice(None, None, 3), [0, 3, 6]),
        (5, [5]),
        (-1, [7]),
        (torch.tensor([6, 0, 6]), [6, 0, 6]),
        (torch.arange(8) % 4 == 1, [1, 5]),
        (slice(4, 4), []),
    ],
)
def test_rows_are_those_of_every_part(named, index, numbers):
    _, record = named
    if not isinstance(record, RowRecord):
        with pytest.raises(TypeError, match="not subscriptable"):
            record[index]
        return
    assert len(record) == 8
    part = record[index]
    assert type(part) is type(record)
    assert len(part) == len(numbers)
    for one, other in zip(tree_leaves(record), tree_leaves(part), strict=False):
        if isinstance(one, torch.Tensor) and one is not SIGN and len(one) == 8:
            assert torch.equal(other, one[numbers])


def test_the_rows_of_a_posterior_are_the_posterior_of_the_rows():
    x, one = values(8, 2, 3), scores().replace(c=values(8, 2, 3).square() + 9)
    whole, index = posterior(x, one, 0.5), torch.tensor([2, 7])
    assert same(whole[index], posterior(x[index], one[index], 0.5))
    assert torch.equal(whole[index].covariance.dense(), whole.covariance.dense()[index])
    assert torch.equal(matrix()[3].dense(), matrix().dense()[3:4])
    assert [m.shape for m in matrix()] == [(1, 6, 6)] * 8
    for number in (3, -1):
        assert same(whole[torch.tensor(number)], whole[number])


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        (8, ValueError, "index must be a row of a batch of 8, got 8"),
        (-9, ValueError, "index must be a row of a batch of 8, got -9"),
        ([1, 2], TypeError, "index must be an int, a slice or a Tensor, got list"),
        ((0, 1), TypeError, "index must be an int, a slice or a Tensor, got tuple"),
        (True, TypeError, "index must be an int, a slice or a Tensor, got bool"),
        (torch.tensor(8), ValueError, "index must be rows of a batch of 8, got "),
        ("c", TypeError, "index must be an int, a slice or a Tensor, got str"),
        (torch.ones(7, dtype=torch.bool), ValueError, "index must be rows of a batch of 8, got "),
        (torch.ones(2), ValueError, "index must have dtype int64, bool, got torch.float32"),
    ],
)
def test_rows_that_are_not_there_are_refused(index, kind, message):
    for record in (scores(), a_posterior(), chains(), matrix()):
        with pytest.raises(kind) as error:
            record[index]
        where, _, said = str(error.value).partition(": ")
        assert where == f"{type(record).__name__}[index]"
        assert said.startswith(message)


def test_rows_of_a_spectrum_that_is_differentiated_do_not_lose_its_gradient_unseen():
    dense = matrix().dense().requires_grad_()
    spectrum = dense_spectrum(dense)
    v = values(8, 6)
    value = spectrum_apply(spectrum, torch.exp, v).sum()
    assert torch.autograd.grad(value, dense)[0].abs().sum() > 0
    part = spectrum[2:4]
    assert type(part) is Spectrum
    with pytest.raises(RuntimeError):  # and no gradient that lacks a part
        spectrum_apply(part, torch.exp, v[2:4]).sum().backward()


def test_rows_of_chains_go_on_as_in_the_whole():
    options = {"step_size": 0.1, "n_steps": 3}
    whole = sample(lambda x: -x, values(8, 3), seed=1, step_size=0.1, n_steps=7)
    first = chains()
    more = sample(lambda x: -x, state=first[3:6].state, **options)
    assert torch.equal(more.draws, whole.draws[3:6, 4:])
    last = sample(lambda x: -x, state=first[-1].state, **options)
    assert torch.equal(last.draws, whole.draws[7:, 4:])
    apart = first[torch.tensor([0, 2])]
    assert torch.equal(apart.stats["divergences"], first.stats["divergences"][[0, 2]])
    with pytest.raises(ValueError, match="state must be of chains that follow one another"):
        sample(lambda x: -x, state=apart.state, **options)
    again = sample(lambda x: -x, apart.state["x"], **options)
    assert again.draws.shape == (2, 3, 3)


# ---------------------------------------------------------------------------------- torch's trees


def test_trees_see_the_tensors_and_leave_out_what_is_none():
    bare = Scores(values(8, 3), values(8, 3))
    assert len(tree_leaves(bare)) == 2
    doubled = tree_map(lambda t: 2 * t, bare)
    assert type(doubled) is Scores
    assert torch.equal(doubled.c, 2 * bare.c)
    assert doubled.factor is doubled.sign is None
    assert len(tree_leaves(a_posterior())) == 4  # a DPLR is a tree too


class Own(Scores):
    """Of a user."""


def test_a_subclass_is_a_tree_of_its_own_kind():
    doubled = tree_map(lambda t: 2 * t, Own(values(8, 3), values(8, 3)))
    assert type(doubled) is Own
    assert type(doubled[1:3]) is Own


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch itself
def test_functions_that_return_records_are_transformed():
    model = MLP((3,), 2).double()
    x = values(5, 3).double()
    whole = model(x, 0.5)

    def one(row):
        return posterior(row.unsqueeze(0), model(row.unsqueeze(0), 0.5), 0.5)

    mapped = torch.func.vmap(one)(x)
    torch.testing.assert_close(mapped.mean.squeeze(1), posterior(x, whole, 0.5).mean)
    torch.testing.assert_close(
        mapped.covariance.factor.squeeze(1), posterior(x, whole, 0.5).covariance.factor
    )
    v = values(5, 3, seed=4).double()
    out, slope = torch.func.jvp(lambda t: model(t, 0.5), (x,), (v,))
    assert type(out) is type(slope) is Scores
    step = 1e-6
    finite = (model(x + step * v, 0.5).c - model(x - step * v, 0.5).c) / (2 * step)
    torch.testing.assert_close(slope.c, finite, rtol=1e-6, atol=1e-8)


def test_an_exported_model_returns_scores_after_a_round_trip():
    model, x, sigma = MLP((3,), 2, width=8).eval(), values(5, 3), torch.full((5,), 0.5)
    program = torch.export.export(model, (x, sigma))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    with warnings.catch_warnings():  # torch's own, about its pickles
        warnings.simplefilter("ignore", FutureWarning)
        again = torch.export.load(buffer).module()
    got, wanted = again(x, sigma), model(x, sigma)
    assert type(got) is Scores
    assert got.sign is None
    torch.testing.assert_close(got.factor, wanted.factor)
    torch.testing.assert_close(got.c, wanted.c)


@pytest.mark.slow
def test_a_model_compiled_ahead_of_time_returns_scores(tmp_path):
    model, x, sigma = MLP((3,), 2, width=8).eval(), values(5, 3), torch.full((5,), 0.5)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (x, sigma), dynamic_shapes=({0: rows}, {0: rows}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        compiled = torch._inductor.aoti_load_package(path)
    got = compiled(x[:3], sigma[:3])
    assert type(got) is Scores
    torch.testing.assert_close(got.c, model(x, sigma)[:3].c)
