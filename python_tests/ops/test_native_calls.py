"""Direct steps and losses: what they take equals the checked way, what they refuse is checked.

Both ways of reading a tensor are tested: DLPack's C exchange interface, new in torch 2.10, and the
attributes that older versions have.
"""

from __future__ import annotations

import gc
import math
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import hos_ext
from hos_ext.ops import _native as native
from hos_ext.ops._native import connect
from hos_ext.ops._operator import native_may_judge
from hos_ext.ops.losses import DSM, loss_operator
from hos_ext.ops.steps import step_operator
from hos_ext.random import fresh_seed

# Forward mode and torch.compile script their decompositions on first use.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(10, 2), (1, 7), (5, 1), (3, 2, 4, 5), (40, 1000)]


@pytest.fixture(
    autouse=True,
    params=[
        pytest.param(True, marks=pytest.mark.skipif(EXCHANGE is None, reason="torch < 2.10")),
        False,
    ],
    ids=["exchange", "attributes"],
)
def reading(request) -> Iterator[None]:
    connect(EXCHANGE if request.param else None)
    yield
    connect(EXCHANGE)


def draw(shape=(3, 4), *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


PLAIN = {"x": draw(), "score": draw(seed=1), "diag": draw(seed=2), "noise": None, "out": None}
PLAIN |= {"step_size": 0.1, "seed": 1, "offset": 0, "first": 0, "curvature": 0}


def direct(**changes):
    """`direct_step` of arguments that it takes, with some of them changed."""
    return native._C.direct_step(**(PLAIN | changes)) if native_may_judge() else None


def checked(monkeypatch, function, *args, **options):
    """The same call by the general way alone."""
    with monkeypatch.context() as patch:
        patch.setattr(native._C, "direct_step", lambda **arguments: None)
        patch.setattr(native._C, "direct_loss", lambda **arguments: None)
        return function(*args, **options)


# ----------------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noisy", [False, True])
def test_direct_step_equals_the_checked_one(monkeypatch, shape, dtype, noisy):
    x, score, diag, noise = (draw(shape, dtype=dtype, seed=k) for k in range(4))
    key = {"seed": 2**64 - 1, "offset": 2**56 - 1, "first": 2**40}
    options = {"noise": noise} if noisy else key
    short = {"x": x, "score": score, "step_size": 0.3, "seed": None} | options
    for d, name in ((None, "raw"), (diag, "clamp"), (diag, "abs"), (diag, "raw")):
        got = direct(**short, diag=d, curvature=("clamp", "abs", "raw").index(name))
        step = hos_ext.langevin_step if d is None else hos_ext.ozaki_step
        args = (x, score, 0.3) if d is None else (x, score, d, 0.3)
        treated = options if d is None else options | {"curvature": name}
        assert isinstance(got, torch.Tensor)
        assert torch.equal(got, step(*args, **treated))
        assert torch.equal(got, checked(monkeypatch, step, *args, **treated))
        assert got.is_contiguous()
        assert got.untyped_storage().resizable()


@pytest.mark.parametrize("which", ["new", "x", "score", "diag"])
def test_direct_step_writes_out_and_tells_autograd(which):
    tensors = {"x": draw(), "score": draw(seed=1), "diag": draw(seed=2)}
    expected = direct()
    out = tensors.get(which, torch.empty(3, 4))
    before = out._version
    assert direct(**tensors, out=out) is out
    assert torch.equal(out, expected)
    assert out._version == before + 1


def test_out_may_lie_beside_its_inputs():
    buffer = draw((9, 4))
    x, score, out = buffer[:3], buffer[3:6], buffer[6:]
    expected = direct(x=x.clone(), score=score.clone())
    assert direct(x=x, score=score, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_sizes_may_be_tensors_of_any_stride(monkeypatch, dtype):
    x, score, diag = (draw((5, 4), seed=k) for k in range(3))
    sizes = draw((10,), dtype=dtype, seed=3).abs() + 0.01
    for step_size in (sizes[:5], sizes[::2], sizes[1:2].expand(5), sizes[0]):
        got = direct(x=x, score=score, diag=diag, step_size=step_size, seed=4)
        options = {"step_size": step_size, "seed": 4}
        assert torch.equal(got, checked(monkeypatch, hos_ext.ozaki_step, x, score, diag, **options))
    number = direct(x=x, score=score, diag=diag, step_size=float(sizes[0]), seed=4)
    assert torch.equal(number, got)


def test_fresh_seeds_are_those_of_the_checked_way(monkeypatch):
    x = draw()
    torch.manual_seed(3)
    direct_draws = [hos_ext.langevin_step(x, x, 0.1) for _ in range(3)]
    torch.manual_seed(3)
    checked_draws = [checked(monkeypatch, hos_ext.langevin_step, x, x, 0.1) for _ in direct_draws]
    assert all(map(torch.equal, direct_draws, checked_draws))
    assert not torch.equal(direct_draws[0], direct_draws[1])
    with torch.device("meta"):
        torch.manual_seed(3)
        assert torch.equal(hos_ext.langevin_step(x, x, 0.1), direct_draws[0])


def test_a_refused_call_draws_one_seed():
    x = draw((4, 6))
    torch.manual_seed(3)
    hos_ext.langevin_step(x.T, x.T, 0.1)
    after = torch.random.get_rng_state()
    torch.manual_seed(3)
    fresh_seed()
    assert torch.equal(torch.random.get_rng_state(), after)


def test_inference_mode_gives_inference_tensors():
    with torch.inference_mode():
        assert direct().is_inference()
        x = draw()
        assert direct(x=x, out=x) is x
    assert not direct().is_inference()


def test_gradients_may_be_wanted_where_grad_mode_is_off():
    x = draw().requires_grad_()
    with torch.no_grad():
        got = direct(x=x)
    assert torch.equal(got, direct())
    assert not got.requires_grad


@pytest.mark.parametrize("name", ["x", "score", "diag", "noise"])
def test_a_wanted_gradient_is_recorded(name):
    change = {name: draw(seed=5).requires_grad_()} | ({"seed": None} if name == "noise" else {})
    assert direct(**change) is True
    given = {"x": draw(), "score": draw(seed=1), "diag": draw(seed=2), "noise": draw(seed=6)}
    out = hos_ext.ozaki_step(**(given | {name: change[name]}), step_size=0.1)
    (got,) = torch.autograd.grad(out.sum(), change[name])
    plain = {key: t.double() for key, t in (given | {name: change[name]}).items()}
    wanted = hos_ext.ops.reference.ozaki_step(**plain, step_size=0.1).sum()
    assert torch.allclose(got, torch.autograd.grad(wanted, change[name])[0], atol=1e-5)


# --------------------------------------------------------------------------------- what it refuses


class Sub(torch.Tensor):
    pass


def overlapping(shift):
    buffer = draw((24,))
    return buffer[:12].view(3, 4), buffer[shift : shift + 12].view(3, 4)


def without_memory():
    t = draw()
    t.untyped_storage().resize_(0)
    return t


TENSORS = {
    "list": [[1.0]],
    "none": None,
    "subclass": draw().as_subclass(Sub),
    "parameter": nn.Parameter(draw(), requires_grad=False),
    "other shape": draw((3, 5)),
    "transposed shape": draw((4, 3)),
    "fewer axes": draw((12,)),
    "other dtype": draw(dtype=torch.float64),
    "int": torch.ones(3, 4, dtype=torch.int32),
    "complex": torch.ones(3, 4, dtype=torch.complex64),
    "bool": torch.ones(3, 4, dtype=torch.bool),
    "strided": draw((3, 8))[:, ::2],
    "padded rows": draw((3, 8))[:, :4],
    "column by column": draw((4, 3)).T,
    "expanded": draw((1, 4)).expand(3, 4),
    "negative bit": torch._neg_view(draw()),
    "zero tensor": torch._efficientzerotensor((3, 4)),
    "no memory": without_memory(),
    "functional": torch._to_functional_tensor(draw()),
    "meta": torch.empty(3, 4, device="meta"),
    "sparse": draw().to_sparse(),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", ["x", "score", "diag", "noise", "out"])
def test_tensors_that_are_not_plain_are_refused(name, kind):
    if kind == "none" and name in ("diag", "noise", "out"):
        return
    change = {name: TENSORS[kind]} | ({"seed": None} if name == "noise" else {})
    assert direct(**change) is None


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (3, 0), (1,) * 9])
def test_shapes_that_are_not_rows_are_refused(shape):
    t = torch.zeros(shape)
    assert direct(x=t, score=t, diag=t) is None


STEP_SIZES = [
    None,
    "1",
    True,
    1,
    0.0,
    -0.1,
    float("inf"),
    float("nan"),
    torch.tensor(1),
    torch.tensor(-1.0),
    torch.tensor([0.1]),
    torch.full((3, 1), 0.1),
    torch.tensor([0.1, 0.0, 0.1]),
    torch.tensor([0.1, float("nan"), 0.1]),
    torch.full((3,), 0.1, requires_grad=True),
    torch.full((3,), 0.1).half(),
    torch._neg_view(torch.full((3,), -0.1)),
    torch.full((3,), 0.1, device="meta"),
    torch.full((3,), 0.1).as_subclass(Sub),
]
LEVELS = [
    torch.tensor(0.7),
    torch.tensor([0.5, 0.7, 0.9]),
    torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64),
    torch.tensor([0.5, 0.0, 0.7, 0.0, 0.9, 0.0])[::2],
]
WRONG = {
    "step_size": STEP_SIZES,
    "seed": [-1, 2**64, True, 1.0, "1", torch.tensor(1)],
    "offset": [None, -1, 2**56, 2**64, True, 1.0, torch.tensor(1)],
    "first": [None, -1, 2**62, 2**63, 2**64, True, 1.0],
    "curvature": [None, -1, 3, True, "clamp"],
}


@pytest.mark.parametrize(
    "change",
    [{name: value} for name, values in WRONG.items() for value in values]
    + [{"noise": draw(seed=3), "seed": 1}],
    ids=str,
)
def test_numbers_out_of_their_rules_are_refused(change):
    assert direct(**change) is None


@pytest.mark.parametrize("shift", [1, 11])
def test_memory_that_overlaps_partly_is_refused(shift):
    a, b = overlapping(shift)
    for name in ("x", "score", "diag"):
        assert direct(**{name: a, "out": b}) is None
        assert direct(**{name: b, "out": a}) is None
    assert direct(noise=a, out=b, seed=None) is None


@pytest.mark.parametrize("name", ["x", "score", "diag", "noise", "out"])
def test_gradients_and_out_are_refused_together(name):
    change = {"out": torch.empty(3, 4)} | {name: draw().requires_grad_()}
    assert direct(**change, **({"seed": None} if name == "noise" else {})) is None


def test_a_wanted_gradient_of_more_axes_is_refused():
    t = draw((3, 2, 4)).requires_grad_()
    assert direct(x=t, score=t, diag=t) is None


def test_transforms_tracing_modes_and_tangents_are_refused():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    answers = []
    x, arguments = draw(), {"score": draw(seed=1), "diag": draw(seed=2)}

    def ask(t):
        answers.append(direct(x=x, **arguments))
        answers.append(direct(x=t, **arguments))
        return (t * t).sum()

    torch.func.grad(ask)(x)
    torch.func.vmap(ask)(x.unsqueeze(0))
    torch.func.jvp(ask, (x,), (x,))
    torch.func.functionalize(ask)(x)
    torch.jit.trace(ask, (x,), check_trace=False)
    with Mode():
        ask(x)
    with FakeTensorMode() as mode:
        ask(mode.from_tensor(x))
    with forward_ad.dual_level():
        ask(forward_ad.make_dual(x, x))
    assert len(answers) >= 16
    assert all(answer is None for answer in answers)
    assert isinstance(direct(), torch.Tensor)


def test_compiled_steps_do_not_take_it(monkeypatch):
    def refuse(**arguments):
        raise AssertionError("a compiled step took the short way")

    x = draw()
    expected = hos_ext.langevin_step(x, x, 0.1, seed=1)
    graph = torch.compile(
        lambda t: hos_ext.langevin_step(t, t, 0.1, seed=1), fullgraph=True, backend="eager"
    )
    assert torch.equal(graph(x), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(native._C, "direct_step", refuse)
    assert direct() is None


def test_tensors_without_memory_reach_no_kernel():
    """Zeros that are nowhere, and a storage that was given up: the general way names them too."""
    x, message = draw(), "hos_ext: tensors must have memory, got one without"
    for bad in (torch._efficientzerotensor((3, 4)), without_memory()):
        with pytest.raises(RuntimeError, match=f"^{message}$"):
            hos_ext.langevin_step(x, bad, 0.1, seed=1)
        with pytest.raises(RuntimeError, match=f"^{message}$"):
            hos_ext.dsm_loss(bad, x, 0.1)


# -------------------------------------------------------------------------------- direct losses

LOSSES = [what.name for what in native.LOSSES]


def problem(name, *, batch=3, dims=(4,), rank=2, dtype=torch.float32, scores=None):
    """Arguments of a loss by name, as `direct_loss` and the checked way take them."""
    what = native.LOSSES[LOSSES.index(name)]
    stack = (what.points,) if what.points > 1 else ()
    size = math.prod(dims)
    shapes = {"score": (*((scores,) if scores else stack), batch, *dims), "noise": (batch, *dims)}
    shapes |= {"diag": (*stack, batch, *dims)} if what.has_diag else {}
    shapes |= {"factor": (*stack, batch, size, rank)} if what.has_factor and rank else {}
    given = {key: draw(s, dtype=dtype, seed=k) for k, (key, s) in enumerate(shapes.items())}
    return {"diag": None, "factor": None, "sigma": 0.7, "sign": None} | given


def direct_losses(name, arguments):
    call = arguments | {"kind": LOSSES.index(name)}
    return native._C.direct_loss(**call) if native_may_judge() else None


def public_losses(name, arguments):
    what = native.LOSSES[LOSSES.index(name)]
    left_out = set() if what.has_factor else {"factor", "sign"}
    left_out |= set() if what.has_diag else {"diag"}
    kept = {key: value for key, value in arguments.items() if key not in left_out}
    return getattr(hos_ext, name)(**kept, reduction="none")


def rows_apart(t):
    """The same values, each row of the batch and each point away from the next."""
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_direct_losses_equal_the_checked_ones(monkeypatch, name, dtype):
    cases = [problem(name, dtype=dtype, rank=r, dims=d) for r, d in ((0, (4,)), (2, (2, 3, 1)))]
    cases += [problem(name, dtype=dtype, batch=2, dims=(40, 100), rank=5)]
    cases += [problem(name, dtype=dtype) | {"sigma": s} for s in LEVELS]
    whole = problem(name, dtype=dtype)
    rows = [k for k in ("score", "diag", "noise") if whole[k] is not None]
    apart = whole | {k: rows_apart(whole[k]) for k in rows}
    cases += [apart, whole | {"noise": torch.cat([whole["noise"]] * 2)[::2]}]
    if whole["factor"] is not None:
        cases += [whole | {"factor": whole["factor"].mT.contiguous().mT}]
    if native.LOSSES[LOSSES.index(name)].points == 3:
        cases += [problem(name, dtype=dtype, scores=2)]
    for arguments in cases:
        got = direct_losses(name, arguments)
        assert isinstance(got, torch.Tensor)
        assert torch.equal(got, public_losses(name, arguments))
        assert torch.equal(got, checked(monkeypatch, public_losses, name, arguments))


@pytest.mark.parametrize("name", LOSSES)
def test_a_wanted_gradient_of_a_loss_is_recorded(monkeypatch, name):
    plain = problem(name)
    for wanted in ("score", "diag", "factor"):
        if plain[wanted] is None:
            continue
        leaf = plain[wanted].clone().requires_grad_()
        arguments = plain | {wanted: leaf}
        assert direct_losses(name, arguments) is True
        with torch.no_grad():
            assert isinstance(direct_losses(name, arguments), torch.Tensor)
        grads = [
            torch.autograd.grad(values.sum(), leaf)[0]
            for values in (
                public_losses(name, arguments),
                checked(monkeypatch, public_losses, name, arguments),
            )
        ]
        assert torch.equal(*grads)
    images = problem(name, dims=(2, 2))
    images["score"].requires_grad_()
    assert direct_losses(name, images) is None


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("argument", ["score", "diag", "factor", "noise"])
def test_tensors_that_are_not_plain_are_refused_by_losses(argument, kind):
    bad = TENSORS[kind]
    if kind == "none" and argument == "factor":
        return
    arguments = problem("d2sm_loss") | {argument: bad}
    if kind in ("padded rows", "expanded") and argument != "factor":
        assert isinstance(direct_losses("d2sm_loss", arguments), torch.Tensor)
    else:
        assert direct_losses("d2sm_loss", arguments) is None


def wrong_losses():
    yield "diag for a loss without", "dsm_loss", {"diag": draw()}
    yield "factor for a loss without", "d2sm_diag_loss", {"factor": draw((3, 4, 2))}
    yield "sign", "d2sm_loss", {"sign": torch.ones(2)}
    yield "rank 0", "d2sm_loss", {"factor": torch.empty(3, 4, 0)}
    yield "rows of the factor", "d2sm_loss", {"factor": draw((3, 5, 2))}
    yield "batch of the factor", "d2sm_loss", {"factor": draw((2, 4, 2))}
    yield "dtype of the factor", "d2sm_loss", {"factor": draw((3, 4, 2)).double()}
    yield "factor with gaps", "d2sm_loss", {"factor": draw((3, 8, 4))[:, ::2, ::2]}
    yield "points of the factor", "d2sm_vr_loss", {"factor": draw((2, 3, 4, 2))}
    yield "one score of two", "dsm_vr_loss", {"score": draw((1, 3, 4))}
    yield "one score of three", "d2sm_vr_loss", {"score": draw((1, 3, 4))}
    yield "four scores", "d2sm_vr_loss", {"score": draw((4, 3, 4))}
    yield "two diagonals of three", "d2sm_vr_loss", {"diag": draw((2, 3, 4))}
    yield "no diagonal", "d2sm_loss", {"diag": None}
    yield "half", "dsm_loss", {"score": draw().half(), "noise": draw().half()}
    yield "empty", "dsm_loss", {"score": torch.empty(0, 4), "noise": torch.empty(0, 4)}
    yield "one axis", "dsm_loss", {"score": draw((4,)), "noise": draw((4,))}
    yield "noise with a gradient", "dsm_loss", {"noise": draw().requires_grad_()}
    for value in STEP_SIZES:
        yield f"sigma {value}", "dsm_loss", {"sigma": value}


@pytest.mark.parametrize(("name", "change"), [c[1:] for c in wrong_losses()], ids=str)
def test_losses_of_other_arguments_are_refused(name, change):
    assert direct_losses(name, problem(name) | change) is None


def test_losses_under_transforms_modes_and_tangents_are_refused():
    arguments = problem("dsm_loss")
    answers = []

    def ask(x):
        answers.append(direct_losses("dsm_loss", arguments | {"score": x}))
        return (x * x).sum()

    x = draw()
    torch.func.grad(ask)(x)
    torch.func.vmap(ask)(x.unsqueeze(0))
    torch.func.jvp(ask, (x,), (x,))
    with FakeTensorMode() as mode:
        ask(mode.from_tensor(x))
    with forward_ad.dual_level():
        ask(forward_ad.make_dual(x, x))
    assert len(answers) >= 5
    assert all(answer is None for answer in answers)


# ------------------------------------------------------------------------------ counts and threads


def test_no_reference_is_kept_or_lost():
    x, score, out, sizes = draw(), draw(seed=1), torch.empty(3, 4), torch.full((3,), 0.1)
    bad, tracked = draw((3, 8))[:, ::2], draw().requires_grad_()
    objects = [x, score, out, sizes, bad, tracked, None, True]
    seed, ones, rest = 2**40 + 1, torch.ones(3), (sizes, None, torch.empty(3, 0))
    result = direct(x=x, score=score)
    assert sys.getrefcount(result) == 2
    sized = {"diag": None, "factor": None, "noise": score, "sigma": sizes, "sign": None}
    calls = (
        lambda: direct(x=x, score=score, step_size=sizes, seed=seed),
        lambda: direct(x=x, score=score, out=out, seed=None),
        lambda: direct(x=x, score=bad),
        lambda: direct(x=tracked),
        lambda: direct(x=x, score=score, noise=x),
        lambda: direct(x=x, step_size=torch.tensor(-1.0)),
        lambda: direct_losses("dsm_loss", {**sized, "score": x}),
        lambda: direct_losses("dsm_loss", {**sized, "score": tracked}),
        lambda: direct_losses("dsm_loss", {**sized, "score": bad}),
        lambda: loss_operator.forward(DSM, x, None, None, score, sizes, None),
        lambda: loss_operator.backward([True], ones, DSM, x, None, None, score, *rest),
        lambda: step_operator.backward([True] * 4, x, x, score, score, x, sizes, 0, 0, 0, 0),
    )
    for call in calls:
        call()
    gc.collect()
    before = [sys.getrefcount(o) for o in (*objects, seed)]
    for call in calls:
        for _ in range(300):
            call()
    gc.collect()
    after = [sys.getrefcount(o) for o in (*objects, seed)]
    assert all(abs(a - b) < 50 for a, b in zip(after, before, strict=True))


def test_an_error_on_the_way_is_raised():
    class Stop(Exception):
        pass

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.empty_like:
                raise Stop
            return function(*args, **(kwargs or {}))

    with Mode(), pytest.raises(Stop):
        direct()


def test_native_calls_take_their_arguments_by_name():
    with pytest.raises(TypeError, match=r"^arguments must be given by name$"):
        native._C.direct_step(1)
    with pytest.raises(TypeError, match=r"^missing argument queue$"):
        native._C.loss()
    with pytest.raises(TypeError, match=r"^missing argument score$"):
        native._C.direct_step(**{k: v for k, v in PLAIN.items() if k != "score"})
    with pytest.raises(TypeError, match=r"^expected 10 arguments, got 11$"):
        native._C.direct_step(**PLAIN, colour=1)
    backwards = dict(reversed(PLAIN.items()))
    assert torch.equal(native._C.direct_step(**backwards), direct())


def test_python_threads_step_side_by_side():
    x, score, diag = (draw((50, 1000), seed=k) for k in range(3))
    small = [t[:2] for t in (x, score, diag)]
    expected = [
        [hos_ext.ozaki_step(*group, 0.1, seed=k) for k in range(4)]
        for group in ((x, score, diag), small)
    ]
    wrong = []

    def work(k):
        for _ in range(20):
            for group, wanted in zip(((x, score, diag), small), expected, strict=True):
                if not torch.equal(hos_ext.ozaki_step(*group, 0.1, seed=k), wanted[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
