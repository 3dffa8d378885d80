"""The two doors of every operator: eager with torch.func, and torch.compile with fake tensors.

Expected values come from the plain-torch specification under the same transform, from the eager
door, or from finite differences. What is not supported must raise: a zero or missing term is a bug.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from conftest import assert_near
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import hos_ext
from hos_ext.ops import reference

# Forward mode inside vmap, torch.compile and gradcheck script their decompositions on first use.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

B, D, R = 4, 6, 3
SIGN = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)

# The differentiable arguments of each operator, and its shapes.
SHAPES = {
    "dsm_loss": [(B, D)],
    "dsm_vr_loss": [(2, B, D)],
    "d2sm_loss": [(B, D), (B, D), (B, D, R)],
    "d2sm_vr_loss": [(3, B, D), (3, B, D), (3, B, D, R)],
    "d2sm_vr_loss, two scores": [(2, B, D), (3, B, D), (3, B, D, R)],
    "d2sm_diag_loss": [(B, D), (B, D)],
    "d2sm_diag_vr_loss": [(3, B, D), (3, B, D)],
    "langevin_step": [(B, D), (B, D), (B, D)],
    "ozaki_step": [(B, D), (B, D), (B, D), (B, D)],
    "assemble_hessian": [(B, D), (B, D, R)],
    "hessian_matvec": [(B, D), (B, D, R), (B, D)],
    "hessian_matvec, columns": [(B, D), (B, D, R), (B, D, 2)],
}
NAMES = list(SHAPES)
# One loss, one step and one product stand for the others where a test compiles several times.
KINDS = ["d2sm_vr_loss", "ozaki_step", "hessian_matvec"]
SOMETIMES_COMPILED = [(name, False) for name in NAMES] + [(name, True) for name in KINDS]
STEPS = ["langevin_step", "ozaki_step"]
BACKENDS = [
    "aot_eager",
    pytest.param("eager", marks=pytest.mark.slow),
    pytest.param("inductor", marks=pytest.mark.slow),
]
SECOND = "double backward is not supported, got a request for the derivative of its gradient"
REFUSED = "use hos_ext.ops.reference for second derivatives"
FORWARD = "forward-mode differentiation does not reach compiled, fake or dispatched tensors"


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(name, *lead, seed=0):
    """The differentiable arguments, with axes before the shapes of `SHAPES`."""
    return tuple(randn(*lead, *shape, seed=seed + k) for k, shape in enumerate(SHAPES[name]))


NOISE = randn(B, D, seed=101)
SIGMA = randn(B, seed=102).abs() + 0.5


def call(module, name, *leaves, sigma=SIGMA, noise=NOISE):
    """An operator of `hos_ext` or `reference`; losses per sample; sign where it is taken."""
    name = name.split(",")[0]
    function = getattr(module, name)
    plain = module is reference
    if name.endswith("loss"):
        low_rank = len(leaves) == 3
        sign = {"sign": SIGN} if low_rank else {}
        return function(*leaves, noise, sigma, **sign, **({} if plain else {"reduction": "none"}))
    if name.endswith("step"):
        *leaves, noise = leaves
        return function(*leaves, sigma, noise=noise)
    return function(*leaves, sign=SIGN)


def native(name, **fixed):
    return functools.partial(call, hos_ext, name, **fixed)


def plain(name, **fixed):
    return functools.partial(call, reference, name, **fixed)


def scalar(function):
    """A scalar whose gradient has a cotangent that differs from entry to entry."""

    def total(*leaves):
        out = function(*leaves)
        return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()

    return total


def all_of(leaves):
    return tuple(range(len(leaves)))


def gradients(function, leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(scalar(function)(*leaves), leaves)


def assert_all_near(values, expected, **options):
    for value, wanted in zip(values, expected, strict=True):
        assert_near(value, wanted, **options)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_operator_equals_eager(name, backend):
    leaves = draw(name)
    compiled = torch.compile(native(name), fullgraph=True, backend=backend)
    assert_near(compiled(*leaves), native(name)(*leaves))
    assert_all_near(gradients(compiled, leaves), gradients(native(name), leaves))


def test_compiled_by_inductor_equals_eager():
    """One graph with all kinds of operator: a compilation costs seconds."""
    score, diag, factor = draw("d2sm_vr_loss")

    def chain(score, diag, factor):
        loss = hos_ext.d2sm_vr_loss(score, diag, factor, NOISE, 0.5, sign=SIGN)
        x = hos_ext.ozaki_step(NOISE, score[0], diag[0], 0.1, seed=3, offset=2, first=5)
        product = hos_ext.hessian_matvec(diag[1], factor[1], x)
        dense = hos_ext.assemble_hessian(diag[2], factor[2])
        return loss + (product + dense.sum(-1) + hos_ext.normal((B, D), seed=1)).square().mean()

    compiled = torch.compile(chain, fullgraph=True, backend="inductor")
    assert_near(compiled(score, diag, factor), chain(score, diag, factor))
    assert_all_near(
        gradients(compiled, (score, diag, factor)), gradients(chain, (score, diag, factor))
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_reductions_and_missing_factor(reduction):
    def f(score, diag):
        return hos_ext.d2sm_loss(score, diag, None, NOISE, 0.5, reduction=reduction)

    leaves = draw("d2sm_diag_loss")
    assert_near(torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves), f(*leaves))


def count_compilations(function, calls):
    """How often `function` was compiled for the calls; each must equal eager."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=1e-14, atol=0)
    return counter.frame_count


@pytest.mark.parametrize("name", STEPS)
def test_changing_step_size_seed_offset_and_first_compile_at_most_twice(name):
    x, score, diag = draw("ozaki_step")[:3]
    curved = (diag,) if name == "ozaki_step" else ()

    def step(h, seed, offset, first):
        function = getattr(hos_ext, name)
        return function(x, score, *curved, h, seed=seed, offset=offset, first=first)

    calls = [(0.01 + 0.003 * i, 7 * i, i, 3 * i) for i in range(50)]
    assert count_compilations(step, calls) <= 2


@pytest.mark.parametrize("name", ["dsm_loss", "d2sm_diag_vr_loss"])
def test_changing_sigma_compiles_at_most_twice(name):
    leaves = draw(name)
    calls = [(0.1 + 0.01 * i,) for i in range(50)]
    assert count_compilations(lambda sigma: call(hos_ext, name, *leaves, sigma=sigma), calls) <= 2


def test_changing_seed_of_public_noise_compiles_at_most_twice():
    def noise(seed, offset, first):
        arguments = {"seed": seed, "offset": offset, "first": first}
        return hos_ext.normal((3, 5), **arguments), hos_ext.uniform((3, 5), **arguments, stream=1)

    assert count_compilations(noise, [(5 * i, i, 2 * i) for i in range(50)]) <= 2


def test_changing_sizes_compile_once_under_dynamic_shapes():
    def f(diag, factor):
        dense = hos_ext.assemble_hessian(diag, factor)
        product = hos_ext.hessian_matvec(diag, factor, diag)
        loss = hos_ext.d2sm_loss(diag, diag, factor, diag, 0.5)
        return dense, product, loss, hos_ext.ozaki_step(diag, diag, diag, 0.1, seed=1)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for b, d, r in [(3, 7, 2), (4, 6, 3), (5, 9, 4)]:
        arguments = randn(b, d, seed=1), randn(b, d, r, seed=2)
        assert_all_near(compiled(*arguments), f(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1])
def test_compiled_step_takes_every_seed(seed):
    x, score, diag = draw("ozaki_step")[:3]

    def f(x):
        return hos_ext.ozaki_step(x, score, diag, 0.1, seed=seed, offset=9)

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fresh_seed_inside_a_graph_differs_each_call_and_follows_manual_seed(backend):
    x, score, diag = draw("ozaki_step")[:3]
    compiled = torch.compile(
        lambda x, d: hos_ext.ozaki_step(x, score, d, 0.1), fullgraph=True, backend=backend
    )
    torch.manual_seed(4)
    first, second = compiled(x, diag), compiled(x, diag)
    torch.manual_seed(4)
    again = compiled(x, diag)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    # Backward sees the noise that forward drew.
    wanted = gradients(lambda x, d: _with_noise_of(first, x, d, score), (x, diag))
    torch.manual_seed(4)
    assert_all_near(gradients(compiled, (x, diag)), wanted, times=100)


def _with_noise_of(result, x, diag, score):
    """The step that leads to `result`, its noise solved for."""
    clean = reference.ozaki_step(x, score, diag, 0.1, torch.zeros_like(x))
    spread = reference.ozaki_step(x, score, diag, 0.1, torch.ones_like(x)) - clean
    noise = ((result - clean) / spread).detach()
    return hos_ext.ozaki_step(x, score, diag, 0.1, noise=noise)


def test_compiled_step_takes_offset_and_seed_as_tensors():
    x, score, diag = draw("ozaki_step")[:3]

    def step(seed, offset):
        return hos_ext.ozaki_step(x, score, diag, 0.1, seed=seed, offset=offset)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(4):
        assert torch.equal(compiled(torch.tensor(i), torch.tensor(3 * i)), step(i, 3 * i))
    assert counter.frame_count == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_step_writes_out(in_place):
    x, score, diag = draw("ozaki_step")[:3]
    compiled = torch.compile(
        lambda x, out: hos_ext.ozaki_step(x, score, diag, 0.1, seed=1, out=out),
        fullgraph=True,
        backend="aot_eager",
    )
    wanted = hos_ext.ozaki_step(x, score, diag, 0.1, seed=1)
    state = x.clone()
    out = state if in_place else torch.empty_like(x)
    result = compiled(state, out)
    assert torch.equal(out, wanted)
    assert torch.equal(result, wanted)


def test_compiled_operator_checks_values_and_shapes():
    score = draw("dsm_loss")[0]
    compiled = torch.compile(
        lambda score, sigma: hos_ext.dsm_loss(score, NOISE, sigma), backend="aot_eager"
    )
    with pytest.raises(ValueError, match=r"dsm_loss: sigma must be positive and finite, got -1\.0"):
        compiled(score, -1.0)
    with pytest.raises(ValueError, match=r"dsm_loss: sigma must be positive and finite, got -1\.0"):
        compiled(score, torch.tensor(-1.0))
    with pytest.raises(ValueError, match=r"dsm_loss: score must have shape \(4, 6\), got \(4, 5\)"):
        compiled(score[:, 1:], 0.5)


# ------------------------------------------------------------- torch.compile around torch.func


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KINDS)
def test_compiled_grad_and_vmap_equal_eager(name, backend):
    leaves, lanes = draw(name), draw(name, 2)
    inner = grad(scalar(native(name)), argnums=all_of(leaves))
    for function, arguments in [(inner, leaves), (vmap(inner), lanes)]:
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        assert_all_near(compiled(*arguments), function(*arguments))
    compiled = torch.compile(vmap(native(name)), fullgraph=True, backend=backend)
    assert_near(compiled(*lanes), vmap(native(name))(*lanes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KINDS)
def test_compiled_jvp_is_refused(name, backend):
    leaves = draw(name)

    def tangent(*leaves):
        return jvp(native(name), leaves, leaves)[1]

    # `fullgraph` wraps the error.
    with pytest.raises(Exception, match=FORWARD):
        torch.compile(tangent, fullgraph=True, backend=backend)(*leaves)
    compiled = torch.compile(native(name), backend=backend)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=f"{name}: {FORWARD}, got a tangent"),
    ):
        compiled(*(forward_ad.make_dual(leaf, leaf) for leaf in leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KINDS)
def test_compiled_second_derivative_is_refused(name, backend):
    leaves = draw(name)
    first = grad(lambda *leaves: native(name)(*leaves).square().sum())
    with pytest.raises(Exception, match=f"{name}: {SECOND}"):
        torch.compile(grad(lambda *leaves: first(*leaves).sum()), fullgraph=True, backend=backend)(
            *leaves
        )
    tracked = [leaf.clone().requires_grad_() for leaf in leaves]
    compiled = torch.compile(native(name), fullgraph=True, backend=backend)

    def twice() -> None:
        total = compiled(*tracked).square().sum()
        once = torch.autograd.grad(total, tracked, create_graph=True)
        torch.autograd.grad(once[0].square().sum(), tracked)

    # AOTAutograd and inductor refuse by themselves, in their own words.
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        twice()


# ---------------------------------------------------------------------------------------- opcheck


def library_inputs():
    """Inputs of every registered operator, with Nones, signs, rank 0 and strides."""
    ops = torch.ops.hos_ext
    x, score, diag, noise = draw("ozaki_step")
    h, number = SIGMA, torch.tensor(0.3, dtype=torch.float64)
    zero, seed = torch.tensor(0), torch.tensor(11)
    factor, by_column = randn(B, D, R, seed=7), randn(B, R, D, seed=8).mT
    wide = randn(B, 2 * D, seed=9)
    halves = [t.bfloat16() for t in (x, score, diag)]
    cotangent = randn(B, D, seed=10)
    steps = {
        "all": (x, score, diag, noise, h, zero, zero, 0, 0),
        "drawn": (x, score, None, None, number, seed, zero, 5, 2),
        "rows apart": (wide[:, :D], wide[:, D:], None, None, number, seed, seed, 0, 2),
        "bfloat16": (*halves, None, number, seed, zero, 0, 1),
    }
    for label, inputs in steps.items():
        yield f"step, {label}", ops.step, tracked(inputs)
    for label, needs in [("all", [True] * 4), ("drawn", [True, True, False, False])]:
        yield f"step_backward, {label}", ops.step_backward, (needs, cotangent, *steps[label])
    points = {0: (), 1: (2,), 2: (), 3: (3,), 4: (), 5: (3,)}
    for kind, lead in points.items():
        second = randn(*lead, B, D, seed=12) if kind > 1 else None
        columns = randn(*lead, B, D, R, seed=13) if kind in (2, 3) else None
        sign = SIGN if kind == 2 else None
        inputs = (kind, randn(*lead, B, D, seed=14), second, columns, noise, h, sign)
        yield f"loss, {kind}", ops.loss, tracked(inputs)
        needs = [True, second is not None, columns is not None]
        saved = ops.loss(*inputs)[1]
        yield f"loss_backward, {kind}", ops.loss_backward, (needs, x[:, 0], *inputs, saved)
        some = [True, False, False]
        yield f"loss_backward, {kind}, score", ops.loss_backward, (some, x[:, 0], *inputs, saved)
    for label, columns in [("by column", by_column), ("rank 0", factor[..., :0])]:
        yield f"loss, {label}", ops.loss, tracked((2, x, diag, columns, noise, number, None))
        yield f"assemble, {label}", ops.assemble_hessian, tracked((diag, columns, None))
        inputs = (diag, columns, randn(B, 2, D, seed=15).mT, None)
        yield f"matvec, {label}", ops.hessian_matvec, tracked(inputs)
        inputs = ([True, True, True], randn(B, D, 2, seed=16), *inputs)
        yield f"matvec_backward, {label}", ops.hessian_matvec_backward, inputs
    yield "assemble, sign", ops.assemble_hessian, tracked((diag, factor, SIGN))
    inputs = ([True, True], randn(B, D, D, seed=17), diag, by_column, SIGN)
    yield "assemble_backward", ops.assemble_hessian_backward, inputs
    yield "matvec, sign", ops.hessian_matvec, tracked((diag, factor, noise.unsqueeze(-1), SIGN))
    inputs = (False, [3, 5], seed, zero, 2, 1, torch.float32, torch.device("cpu"))
    yield "noise", ops.noise, inputs


def tracked(inputs):
    """The floating inputs as leaves, but for what takes no gradient: 1-d and 0-d tensors."""
    return tuple(
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(t, torch.Tensor) and t.dim() > 1
        else t
        for t in inputs
    )


OPCHECKS = {label: (operator, inputs) for label, operator, inputs in library_inputs()}


@pytest.mark.parametrize("label", OPCHECKS)
def test_registered_operator_passes_opcheck(label):
    operator, inputs = OPCHECKS[label]
    opcheck(operator, inputs)


# --------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("name", NAMES)
def test_grad_equals_specification(name):
    leaves = draw(name)
    value = grad(scalar(native(name)), argnums=all_of(leaves))(*leaves)
    expected = grad(scalar(plain(name)), argnums=all_of(leaves))(*leaves)
    assert_all_near(value, expected, times=10)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_equals_a_loop(name):
    lanes = draw(name, 3)
    expected = torch.stack([native(name)(*lane) for lane in zip(*lanes, strict=True)])
    assert_near(vmap(native(name))(*lanes), expected)
    last = [leaf.movedim(0, -1) for leaf in lanes]
    assert_near(vmap(native(name), in_dims=-1, out_dims=1)(*last).movedim(1, 0), expected)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_one_argument_shares_the_others(name):
    leaves, lanes = draw(name), draw(name, 3)
    for position in range(len(leaves)):
        arguments = list(leaves)
        arguments[position] = lanes[position].movedim(0, 1)
        in_dims = tuple(1 if p == position else None for p in range(len(leaves)))
        value = vmap(native(name), in_dims=in_dims)(*arguments)
        for lane in range(3):
            arguments[position] = lanes[position][lane]
            assert_near(value[lane], native(name)(*arguments))


@pytest.mark.parametrize("name", NAMES)
def test_nested_vmap_equals_two_loops(name):
    lanes = draw(name, 2, 3)
    value = vmap(vmap(native(name)), in_dims=0)(*lanes)
    for i in range(2):
        for j in range(3):
            assert_near(value[i, j], native(name)(*(leaf[i, j] for leaf in lanes)))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_grad_equals_specification(name):
    lanes = draw(name, 3)
    value = vmap(grad(scalar(native(name)), argnums=all_of(lanes)))(*lanes)
    expected = vmap(grad(scalar(plain(name)), argnums=all_of(lanes)))(*lanes)
    assert_all_near(value, expected, times=10)


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(("loss", "step"))])
@pytest.mark.parametrize("shape", [(3,), (3, B)])
def test_vmap_over_sigma_and_step_size(name, shape):
    leaves = draw(name)
    sigmas = randn(*shape, seed=50).abs() + 0.5
    value = vmap(lambda sigma: call(hos_ext, name, *leaves, sigma=sigma))(sigmas)
    for lane, sigma in zip(value, sigmas, strict=True):
        assert_near(lane, call(hos_ext, name, *leaves, sigma=sigma))


def test_vmap_over_the_noise_of_a_loss():
    leaves, noises = draw("d2sm_loss"), randn(3, B, D, seed=51)
    value = vmap(lambda noise: call(hos_ext, "d2sm_loss", *leaves, noise=noise))(noises)
    for lane, noise in zip(value, noises, strict=True):
        assert_near(lane, call(hos_ext, "d2sm_loss", *leaves, noise=noise))


@pytest.mark.parametrize("name", NAMES)
def test_jacrev_equals_specification(name):
    leaves = draw(name)
    value = jacrev(native(name), argnums=all_of(leaves))(*leaves)
    expected = jacrev(plain(name), argnums=all_of(leaves))(*leaves)
    assert_all_near(value, expected, times=10)


@pytest.mark.parametrize("name", NAMES)
def test_jacfwd_equals_jacrev(name):
    leaves = draw(name)
    value = jacfwd(native(name), argnums=all_of(leaves))(*leaves)
    expected = jacrev(native(name), argnums=all_of(leaves))(*leaves)
    assert_all_near(value, expected, times=10)


def test_jacobians_of_a_seeded_step_see_its_noise():
    """Nothing but the cotangent differs between lanes: the noise must be that of the one step."""
    x, score, diag = draw("ozaki_step")[:3]
    noise = hos_ext.normal((B, D), seed=3, offset=2, dtype=torch.float64)

    def seeded(diag):
        return hos_ext.ozaki_step(x, score, diag, 0.1, seed=3, offset=2)

    expected = jacrev(lambda diag: hos_ext.ozaki_step(x, score, diag, 0.1, noise=noise))(diag)
    assert_near(jacrev(seeded)(diag), expected)
    assert_near(jacfwd(seeded)(diag), expected)


# ------------------------------------------------------------------------------------- forward mode


@pytest.mark.parametrize("name", NAMES)
def test_jvp_equals_finite_differences_and_specification(name):
    leaves, tangents = draw(name), draw(name, seed=30)
    value, tangent = jvp(native(name), leaves, tangents)
    assert_near(value, native(name)(*leaves))
    assert_near(tangent, jvp(plain(name), leaves, tangents)[1], times=10)
    ahead, behind = (
        native(name)(*(x + e * t for x, t in zip(leaves, tangents, strict=True)))
        for e in (1e-5, -1e-5)
    )
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dual_numbers_in_each_argument_alone(name):
    leaves, tangents = draw(name), draw(name, seed=30)
    for position in range(len(leaves)):

        def of_one(leaf, position=position):
            arguments = list(leaves)
            arguments[position] = leaf
            return plain(name)(*arguments)

        with forward_ad.dual_level():
            arguments = list(leaves)
            arguments[position] = forward_ad.make_dual(leaves[position], tangents[position])
            value = forward_ad.unpack_dual(native(name)(*arguments))
        assert_near(value.primal, native(name)(*leaves))
        expected = jvp(of_one, (leaves[position],), (tangents[position],))[1]
        assert_near(value.tangent, expected, times=10)


@pytest.mark.parametrize("name", KINDS)
def test_gradcheck_forward_and_batched(name):
    leaves = tuple(leaf.requires_grad_() for leaf in draw(name))
    with warnings.catch_warnings():
        # The batched gradients of torch.autograd.grad loop over what torch.func does at once.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        torch.autograd.gradcheck(
            native(name),
            leaves,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )


def test_forward_mode_in_what_takes_no_gradient_is_refused():
    score = draw("dsm_loss")[0]
    factor = draw("d2sm_loss")[2]
    functions = {
        "dsm_loss: sigma": (lambda t: hos_ext.dsm_loss(score, NOISE, t), SIGMA),
        "d2sm_loss: noise": (lambda t: hos_ext.d2sm_loss(score, score, factor, t, 0.5), NOISE),
        "langevin_step: step_size": (
            lambda t: hos_ext.langevin_step(score, score, t, noise=NOISE),
            SIGMA[0],
        ),
        "ozaki_step: step_size": (
            lambda t: hos_ext.ozaki_step(score, score, score, t, seed=1),
            SIGMA,
        ),
        "assemble_hessian: sign": (lambda t: hos_ext.assemble_hessian(score, factor, sign=t), SIGN),
    }
    for where, (function, value) in functions.items():
        with pytest.raises(ValueError, match=f"{where} must not carry a tangent, got one"):
            jvp(function, (value,), (value,))
        with pytest.raises(ValueError, match=f"{where} must not require grad"):
            grad(lambda t, function=function: function(t).sum())(value)


# ------------------------------------------------------------------------------- second derivatives


def _square(name):
    return lambda *leaves: native(name)(*leaves).square().sum()


def _hessian(name, leaves, tangents):
    return grad(lambda *xs: grad(_square(name))(*xs).square().sum())(*leaves)


def _forward_over_reverse(name, leaves, tangents):
    return jvp(grad(_square(name)), leaves, tangents)


def _double_backward(name, leaves, tangents):
    leaves = [leaf.requires_grad_() for leaf in leaves]
    once = torch.autograd.grad(_square(name)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in once), leaves)


def _in_the_cotangent(name, leaves, tangents):
    """The gradient is linear in the cotangent: a second derivative all the same."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = native(name)(*leaves)
    cotangent = torch.ones_like(out, requires_grad=True)
    once = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
    return torch.autograd.grad(sum(g.sum() for g in once), cotangent)


def _dual_over_reverse(name, leaves, tangents):
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves, tangents, strict=True)]
        return torch.autograd.grad(_square(name)(*duals), leaves)


SECONDS = [_hessian, _forward_over_reverse, _double_backward, _in_the_cotangent, _dual_over_reverse]


@pytest.mark.parametrize("derivative", SECONDS)
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_refused(name, derivative):
    public = name.split(",")[0]
    with pytest.raises(
        RuntimeError, match=f"{public}: {SECOND}; use hos_ext.ops.reference for second"
    ):
        derivative(name, draw(name), draw(name, seed=30))


@pytest.mark.parametrize("outer", ["grad", "jvp"])
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_a_jvp_are_right_or_refused(name, outer):
    """The tangents of the bilinear operators are plain torch: their derivatives are right."""
    leaves, tangents = draw(name), draw(name, seed=30)

    def tangent(function):
        return lambda *xs: jvp(function, xs, tangents)[1].square().sum()

    def derivative(function):
        if outer == "jvp":
            return (jvp(tangent(function), leaves, tangents)[1],)
        return grad(tangent(function), argnums=all_of(leaves))(*leaves)

    try:
        value = derivative(native(name))
    except RuntimeError as error:
        message = str(error)
        if not message.startswith(f"{name.split(',')[0]}: ") or REFUSED not in message:
            raise
    else:
        assert_all_near(value, derivative(plain(name)), times=10)


# --------------------------------------------------------------------------- what vmap cannot share


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("options", [{}, {"seed": 1}])
def test_noise_drawn_inside_vmap_is_refused(name, options):
    function = getattr(hos_ext, name)
    leaves = draw("ozaki_step", 3)[: 2 if name == "langevin_step" else 3]
    message = f"{name}: noise must be given inside vmap, got noise=None"
    with pytest.raises(RuntimeError, match=message):
        vmap(lambda *leaves: function(*leaves, 0.1, **options))(*leaves)
    with pytest.raises(RuntimeError, match=message):
        vmap(grad(lambda *leaves: function(*leaves, 0.1, **options).sum()))(*leaves)


def test_fresh_noise_inside_vmap_is_refused_where_nothing_else_is_batched():
    x = draw("ozaki_step")[0]
    with pytest.raises(RuntimeError, match="langevin_step: noise must be given inside vmap"):
        vmap(lambda shift: hos_ext.langevin_step(x, x, 0.1) + shift)(torch.zeros(3))
    seeded = vmap(lambda shift: hos_ext.langevin_step(x, x, 0.1, seed=1) + shift)(torch.zeros(3))
    assert torch.equal(seeded, hos_ext.langevin_step(x, x, 0.1, seed=1).expand(3, B, D))


def test_sign_that_differs_between_lanes_is_refused():
    diag, factor = draw("assemble_hessian")
    with pytest.raises(
        RuntimeError, match="assemble_hessian: sign must be the same in all lanes of vmap"
    ):
        vmap(lambda sign: hos_ext.assemble_hessian(diag, factor, sign=sign))(SIGN.expand(2, R))


# ------------------------------------------------------------------------- fake, meta and traced


def all_operators(score, diag, factor, x):
    """One output of every operator."""
    stacked = [torch.stack([t, 2 * t, -t]) for t in (score, diag, factor)]
    return (
        hos_ext.dsm_loss(score, x, 0.5, reduction="none"),
        hos_ext.dsm_vr_loss(stacked[0][:2], x, 0.5),
        hos_ext.d2sm_loss(score, diag, factor, x, 0.5, reduction="none"),
        hos_ext.d2sm_vr_loss(*stacked, x, 0.5, reduction="none"),
        hos_ext.d2sm_diag_loss(score, diag, x, 0.5),
        hos_ext.d2sm_diag_vr_loss(*stacked[:2], x, 0.5),
        hos_ext.langevin_step(x, score, 0.1, seed=1),
        hos_ext.ozaki_step(x, score, diag, 0.1, seed=1, offset=3),
        hos_ext.assemble_hessian(diag, factor),
        hos_ext.hessian_matvec(diag, factor, x),
        hos_ext.normal((3, 5), seed=1, device=x.device),
        hos_ext.uniform((3, 5), seed=1, device=x.device),
    )


def operator_inputs():
    return [t.float() for t in (*draw("d2sm_loss"), NOISE)]


def _layout(t):
    return tuple(t.shape), t.dtype, t.stride()


def test_meta_tensors_agree_with_real_ones():
    inputs = operator_inputs()
    outputs = all_operators(*(t.to("meta") for t in inputs))
    assert all(t.is_meta for t in outputs)
    assert [_layout(t) for t in outputs] == [_layout(t) for t in all_operators(*inputs)]


@pytest.mark.parametrize("by_column", [False, True])
def test_fake_tensors_and_their_gradients_agree_with_real_ones(by_column):
    inputs = [t.requires_grad_() for t in operator_inputs()[:3]]
    if by_column:
        inputs[2] = inputs[2].detach().mT.contiguous().mT.requires_grad_()

    def run(score, diag, factor):
        x = hos_ext.ozaki_step(score, diag, diag, 0.1)
        loss = hos_ext.d2sm_loss(score, diag, factor, NOISE.float(), 0.5) + x.sum()
        product = hos_ext.hessian_matvec(diag, factor, x) + hos_ext.normal((B, D), seed=1)
        dense = hos_ext.assemble_hessian(diag, factor)
        total = loss + product.sum() + dense.sum()
        return x, loss, product, dense, *torch.autograd.grad(total, (score, diag, factor))

    real = run(*inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run(*(mode.from_tensor(t) for t in inputs))
    assert all(isinstance(t, FakeTensor) for t in fake)
    assert [_layout(t) for t in fake] == [_layout(t) for t in real]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operators(mode):
    inputs = operator_inputs()
    graph = make_fx(all_operators, tracing_mode=mode)(*inputs)
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum(name.startswith("hos_ext.loss") for name in names) == 6
    assert sum(name.startswith("hos_ext.noise") for name in names) == 2
    changed = [2 * t for t in inputs]
    assert_all_near(graph(*changed), all_operators(*changed))


def test_functionalized_trace_records_out():
    x, score = operator_inputs()[:2]

    def step(x, score):
        state = x.clone()
        return hos_ext.langevin_step(state, score, 0.1, seed=1, out=state)

    graph = make_fx(functionalize(step))(x, score)
    assert torch.equal(graph(2 * x, score), step(2 * x, score))


def test_exported_program_equals_eager():
    class Operators(torch.nn.Module):
        def forward(self, score, diag, factor, x):
            return all_operators(score, diag, factor, x)

    inputs = operator_inputs()
    program = torch.export.export(Operators(), tuple(inputs))
    changed = [2 * t for t in inputs]
    assert_all_near(program.module()(*changed), all_operators(*changed))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_operators():
    """A native result would be a constant of the trace."""
    inputs = operator_inputs()[:2]

    def f(score, x):
        return hos_ext.langevin_step(x, score, 0.1, seed=1) + hos_ext.dsm_loss(score, x, 0.5)

    traced = torch.jit.trace(f, inputs)
    changed = [2 * t for t in inputs]
    assert_near(traced(*changed), f(*changed))


# ---------------------------------------------------------------------- modes, subclasses, autocast


class Recorder(TorchDispatchMode):
    """Keeps the names of the operators that pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_dispatch_mode_sees_the_operator_and_its_backward(name):
    leaves = draw(name)
    expected = native(name)(*leaves), gradients(native(name), leaves)
    with Recorder() as recorder:
        value = native(name)(*leaves), gradients(native(name), leaves)
    assert torch.equal(value[0], expected[0])
    assert all(map(torch.equal, value[1], expected[1]))
    operator = "loss" if "loss" in name else "step" if "step" in name else name.split(",")[0]
    assert f"hos_ext::{operator}" in recorder.names
    assert f"hos_ext::{operator}_backward" in recorder.names


@pytest.mark.parametrize("name", KINDS)
def test_torch_func_inside_a_dispatch_mode(name):
    leaves, lanes = draw(name), draw(name, 2)
    inner = grad(scalar(native(name)), argnums=all_of(leaves))
    expected = inner(*leaves), vmap(inner)(*lanes), jacrev(native(name))(*leaves)
    with FlopCounterMode(display=False):
        value = inner(*leaves), vmap(inner)(*lanes), jacrev(native(name))(*leaves)
        with pytest.raises(RuntimeError, match=f"{name}: {FORWARD}"):
            jvp(native(name), leaves, leaves)
        with pytest.raises(RuntimeError, match=f"{name}: {SECOND}"):
            _hessian(name, leaves, leaves)
        with pytest.raises(RuntimeError, match=f"{name}: {SECOND}"):
            _double_backward(name, draw(name), leaves)
    assert_all_near(value[0], expected[0])
    assert_all_near(value[1], expected[1])
    assert_near(value[2], expected[2])


class Trivial(torch.Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("name", NAMES)
def test_trivial_subclass_works(name):
    leaves = draw(name)
    wrapped = [leaf.clone().as_subclass(Trivial).requires_grad_() for leaf in leaves]
    out = native(name)(*wrapped)
    assert type(out) is Trivial
    assert_near(out.as_subclass(torch.Tensor), native(name)(*leaves))
    scalar(native(name))(*wrapped).backward()
    for leaf, expected in zip(wrapped, gradients(native(name), leaves), strict=True):
        assert_near(leaf.grad.as_subclass(torch.Tensor), expected)


def test_step_writes_into_a_subclass():
    x, score, diag = draw("ozaki_step")[:3]
    out = torch.empty_like(x).as_subclass(Trivial)
    hos_ext.ozaki_step(x, score, diag, 0.1, seed=1, out=out)
    assert torch.equal(out, hos_ext.ozaki_step(x, score, diag, 0.1, seed=1))


@pytest.mark.parametrize("name", ["dsm_loss", "d2sm_loss", "d2sm_diag_loss"])
def test_plain_losses_compute_in_float32_under_autocast(name):
    leaves = [leaf.bfloat16().requires_grad_() for leaf in draw(name)]
    wide = [leaf.detach().float() for leaf in leaves]
    noise = NOISE.float()
    sign = {"sign": SIGN.float()} if name == "d2sm_loss" else {}
    function = getattr(hos_ext, name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(*leaves, noise, 0.5, **sign)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, function(*wide, noise, 0.5, **sign))
    loss.backward()
    expected = [leaf.requires_grad_() for leaf in wide]
    function(*expected, noise, 0.5, **sign).backward()
    for leaf, wanted in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, wanted.grad.bfloat16())


@pytest.mark.parametrize("name", ["dsm_vr_loss", "d2sm_vr_loss", "d2sm_diag_vr_loss"])
@pytest.mark.parametrize("autocast", [False, True])
def test_variance_reduced_losses_refuse_half_precision(name, autocast):
    leaves = [leaf.bfloat16() for leaf in draw(name)]
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        pytest.raises(ValueError, match=f"{name}: inputs must have dtype float32, float64 .*half"),
    ):
        getattr(hos_ext, name)(*leaves, NOISE.bfloat16(), 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_keep_their_precision_under_autocast(name, monkeypatch):
    """Matrix products in a backward would be rounded to bfloat16: an error of 1 %."""
    monkeypatch.setitem(globals(), "SIGN", SIGN.float())
    leaves = [leaf.float() for leaf in draw(name)]
    function = native(name, noise=NOISE.float())
    expected = gradients(function, leaves), jvp(function, tuple(leaves), tuple(leaves))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = gradients(function, leaves), jvp(function, tuple(leaves), tuple(leaves))[1]
    assert all(map(torch.equal, value[0], expected[0]))
    assert torch.equal(value[1], expected[1])


# ----------------------------------------------------------------------------------- plain autograd


@pytest.mark.parametrize(("name", "compiled"), SOMETIMES_COMPILED)
def test_gradients_of_each_argument_alone(name, compiled):
    leaves = draw(name)
    function = native(name)
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = gradients(native(name), leaves)
    for position, wanted in enumerate(expected):
        arguments = [leaf.detach().clone() for leaf in leaves]
        arguments[position].requires_grad_()
        scalar(function)(*arguments).backward()
        assert_near(arguments[position].grad, wanted)
        assert all(a.grad is None for p, a in enumerate(arguments) if p != position)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_plain_tensors_mix(name):
    leaves = draw(name)
    parameters = [torch.nn.Parameter(leaf.clone()) for leaf in leaves]
    out = native(name)(*parameters)
    assert type(out) is torch.Tensor
    assert_all_near(
        torch.autograd.grad(scalar(native(name))(*parameters), parameters),
        gradients(native(name), leaves),
    )


@pytest.mark.parametrize(("name", "compiled"), SOMETIMES_COMPILED)
def test_cotangents_of_any_stride(name, compiled):
    leaves = [leaf.requires_grad_() for leaf in draw(name)]
    function = native(name)
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    out = function(*leaves)
    shape = out.shape
    cotangents = {
        "expanded": torch.tensor(1.5, dtype=torch.float64).expand(shape),
        "transposed": randn(*reversed(shape), seed=70).permute(*reversed(range(len(shape)))),
        "every other": randn(*(2 * n for n in shape), seed=71)[
            tuple(slice(None, None, 2) for _ in shape)
        ],
    }
    for cotangent in cotangents.values():
        value = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
        expected = torch.autograd.grad(out, leaves, cotangent.contiguous(), retain_graph=True)
        assert_all_near(value, expected)


@pytest.mark.parametrize("name", NAMES)
def test_graph_is_kept_or_freed(name):
    leaves = [leaf.requires_grad_() for leaf in draw(name)]
    out = scalar(native(name))(*leaves)
    once = torch.autograd.grad(out, leaves, retain_graph=True)
    again = torch.autograd.grad(out, leaves)
    assert all(map(torch.equal, once, again))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NAMES)
def test_no_graph_without_grad(name, context):
    leaves = [leaf.requires_grad_() for leaf in draw(name)]
    with context():
        out = native(name)(*leaves)
    assert not out.requires_grad
    assert torch.equal(out, native(name)(*leaves))


def test_inference_tensors_pass_and_are_written():
    with torch.inference_mode():
        x, score, diag = (t.clone() for t in draw("ozaki_step")[:3])
        wanted = hos_ext.ozaki_step(x, score, diag, 0.1, seed=1)
        hos_ext.ozaki_step(x, score, diag, 0.1, seed=1, out=x)
    assert torch.equal(x, wanted)


def test_step_in_place_is_seen_by_autograd():
    x, score = draw("langevin_step")[:2]
    weight = torch.ones_like(x, requires_grad=True)
    used = (weight * x).sum()
    hos_ext.langevin_step(x, score, 0.1, seed=1, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.backward()


@pytest.mark.parametrize("name", NAMES)
def test_change_of_a_saved_tensor_is_seen_by_autograd(name):
    leaves = [leaf.requires_grad_() for leaf in draw(name)]
    inputs = [leaf * 1 for leaf in leaves]
    out = scalar(native(name))(*inputs)
    with torch.no_grad():
        inputs[-1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_checkpointed_step_draws_its_noise_again():
    """Recomputation restores the generator from which seed=None draws."""
    x, score, diag = draw("ozaki_step")[:3]
    diag.requires_grad_()
    torch.manual_seed(5)
    out = torch.utils.checkpoint.checkpoint(
        lambda d: hos_ext.ozaki_step(x, score, d, 0.1), diag, use_reentrant=False
    )
    torch.manual_seed(5)
    expected = hos_ext.ozaki_step(x, score, diag, 0.1)
    assert torch.equal(out, expected)
    assert_near(
        torch.autograd.grad(out.sum(), diag)[0], torch.autograd.grad(expected.sum(), diag)[0]
    )


def test_batched_gradients_of_plain_autograd():
    """is_grads_batched has a vmap of its own, which torch.func does not know of."""
    x = draw("ozaki_step")[0].requires_grad_()
    out = hos_ext.ozaki_step(x, x, x, 0.1, seed=1)
    cotangents = randn(3, B, D, seed=80)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        value = torch.autograd.grad(out, x, cotangents, is_grads_batched=True, retain_graph=True)
    for lane, cotangent in zip(value[0], cotangents, strict=True):
        assert_near(lane, torch.autograd.grad(out, x, cotangent, retain_graph=True)[0])


# ------------------------------------------------------------------------------ threads, processes


def large_inputs(seed):
    """Large enough for several threads."""
    b, d, r = 64, 784, 20
    shapes = [(b, d), (b, d), (b, d, r), (b, d)]
    return [randn(*shape, seed=seed + k).float() for k, shape in enumerate(shapes)]


def bits_of_results(score, diag, factor, x):
    """Bits of operators and gradients, computed by the kernels alone (torch hangs after a fork)."""
    leaf = factor.detach().requires_grad_()
    loss = hos_ext.d2sm_loss(score, diag, leaf, x, 0.5, reduction="none")
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones(len(x)))
    results = [loss.detach(), gradient, hos_ext.ozaki_step(x, score, diag, 0.1, seed=1)]
    results.append(hos_ext.hessian_matvec(diag, factor, x))
    results.append(hos_ext.normal((200, 1000), seed=1))
    return [t.numpy().tobytes() for t in results]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_python_threads_get_the_right_results():
    inputs = [large_inputs(seed) for seed in range(3)]
    expected = [bits_of_results(*tensors) for tensors in inputs]
    results = {}

    def work(index):
        torch.set_num_threads(2)  # torch keeps this for each thread
        results[index] = [bits_of_results(*inputs[index]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        assert all(result == expected[index] for result in results[index])


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_forked_child_computes_after_its_parent_used_threads():
    """GNU OpenMP would wait for ever for the parent's threads."""
    inputs = large_inputs(0)
    expected = bits_of_results(*inputs)

    def child() -> None:
        sys.exit(0 if bits_of_results(*inputs) == expected else 3)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    hung = process.is_alive()
    if hung:
        process.kill()
        process.join()
    assert not hung
    assert process.exitcode == 0


class Steps(torch.utils.data.Dataset):
    """Item i is a step with seed i."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        x = randn(64, 784, seed=0)
        return hos_ext.langevin_step(x, x, 0.1, seed=i)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_data_loader_workers_call_operators():
    expected = [Steps()[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(
        Steps(), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork"
    )
    for item, wanted in zip(loader, expected, strict=True):
        assert torch.equal(item, wanted)
