"""langevin_step and ozaki_step against oracles, closed forms, and the plain version."""

from __future__ import annotations

import functools
import math
import re

import oracles
import pytest
import torch
from conftest import ROUNDING, assert_near
from hypothesis import given, settings
from hypothesis import strategies as st

import hos_ext
from hos_ext.ops import _native as native
from hos_ext.ops import reference

CURVATURES = ["clamp", "abs", "raw"]
KINDS = ["langevin", *CURVATURES]
SHAPES = [(0, 5), (1, 1), (3, 2), (257, 2), (3, 31), (3, 784), (2, 2050)]
WIDE = [torch.float32, torch.float64]
HALVES = [torch.float16, torch.bfloat16]


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(shape, dtype, device, seed=0):
    """x, score, diag, noise and a cotangent; the diagonal of both signs, up to +-9 or so."""
    tensors = [randn(*shape, seed=seed + k) * (3 if k == 2 else 1) for k in range(5)]
    return [t.to(device, dtype) for t in tensors]


def step(module, kind, x, score, diag, noise, h, **options):
    if kind == "langevin":
        arguments, extra = (x, score, h), ()
    else:
        arguments, extra = (x, score, diag, h), (kind,)
    name = "langevin_step" if kind == "langevin" else "ozaki_step"
    if module is not hos_ext:
        return getattr(module, name)(*arguments, noise, *extra)
    if extra:
        options["curvature"] = kind
    return getattr(module, name)(*arguments, noise=noise, **options)


def evaluate(module, kind, tensors, h, cotangent, **options):
    """The step and its gradients in x, score, diag (0 for Langevin) and noise."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = step(module, kind, *leaves, h, **options)
    wanted = [leaf for leaf in leaves if leaf is not None]
    if module is oracles and out.numel() == 0:
        return out, *map(torch.zeros_like, wanted)
    return out.detach(), *torch.autograd.grad(out, wanted, cotangent, materialize_grads=True)


# ----------------------------------------------------------------------------------- exact results


@functools.cache
def case(shape, kind, per_sample):
    """One problem in float32 and its oracle in float64."""
    *tensors, cotangent = make(shape, torch.float32, "cpu")
    h = 0.1 + torch.arange(shape[0]) / 300 if per_sample else 0.3
    wide = [t.double() for t in tensors]
    return tensors, h, cotangent, evaluate(oracles, kind, wide, h, cotangent.double())


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_step_and_gradients_match_the_oracle(device, shape, kind, per_sample, dtype):
    tensors, h, cotangent, expected = case(shape, kind, per_sample)
    *tensors, cotangent = (t.to(device, dtype) for t in (*tensors, cotangent))
    h = h.to(device, dtype) if per_sample else h
    for module in (hos_ext, reference):
        got = evaluate(module, kind, tensors, h, cotangent)
        for value, wanted in zip(got, expected, strict=True):
            assert value.dtype == dtype
            assert_near(value, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_step_size_may_be_a_number_or_a_tensor(device, kind):
    *tensors, cotangent = make((3, 31), torch.float32, device)
    expected = evaluate(oracles, kind, [t.cpu().double() for t in tensors], 2.0, cotangent.cpu())
    kinds = [2, 2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64, device=device)]
    kinds += [torch.full((3,), 2.0, device=device), torch.full((6,), 2.0, device=device)[::2]]
    for h in [*kinds, torch.tensor(2.0, device=device).expand(3)]:
        got = evaluate(hos_ext, kind, tensors, h, cotangent)
        for value, wanted in zip(got, expected, strict=True):
            assert value.dtype == torch.float32
            assert_near(value, wanted)


@pytest.mark.parametrize("h", [1e-3, 0.3, 20.0])
def test_ozaki_is_exact_for_a_gaussian_with_diagonal_covariance(device, h):
    """Mean mu + e^{-h p} (x - mu), standard deviation sqrt((1 - e^{-2 h p}) / p), for any h."""
    x, mu, p, noise, _ = make((3, 31), torch.float64, device)
    p = 0.1 + p.abs()
    got = hos_ext.ozaki_step(x, -p * (x - mu), -p, h, noise=noise)
    expected = mu + (-h * p).exp() * (x - mu) + (-(-2 * h * p).expm1() / p).sqrt() * noise
    assert_near(got, expected)
    # a step of h / 2 twice has the law of one step
    mean, spread = (-h * p / 2).exp(), -(-h * p).expm1() / p
    assert_near(mean.square() * spread + spread, -(-2 * h * p).expm1() / p)


@pytest.mark.parametrize("kind", CURVATURES)
def test_zero_curvature_is_a_langevin_step(device, kind):
    x, score, _, noise, _ = make((3, 31), torch.float32, device)
    expected = hos_ext.langevin_step(x, score, 0.3, noise=noise)
    assert_near(step(hos_ext, kind, x, score, torch.zeros_like(x), noise, 0.3), expected)


def test_curvature_treatments_differ_where_the_diagonal_is_positive(device):
    x, score, diag, noise, _ = make((3, 31), torch.float64, device)
    up = diag.abs()
    flat = hos_ext.langevin_step(x, score, 0.3, noise=noise)
    assert_near(hos_ext.ozaki_step(x, score, up, 0.3, noise=noise), flat)
    assert torch.equal(
        hos_ext.ozaki_step(x, score, up, 0.3, noise=noise, curvature="abs"),
        hos_ext.ozaki_step(x, score, -up, 0.3, noise=noise, curvature="raw"),
    )
    raw = hos_ext.ozaki_step(x, score, up, 0.3, noise=noise, curvature="raw")
    assert ((raw - x - (flat - x)).abs() > 1e-6).all()


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_steps_keep_their_digits_near_zero_and_far_below(device, curvature, dtype):
    values = [0.0, -0.0, 1e-7, -1e-7, 1e-30, -1e-30, 0.5, -0.5, 1.0, -1.0, 1.0001, -1.0001]
    values += [-3.0, -20.0, -90.0, -1e4, -1e9, -1e15]
    diag = torch.tensor([values], dtype=dtype, device=device)
    _, score, _, noise, cotangent = make(diag.shape, dtype, device)
    x = torch.zeros_like(diag)
    for h in (1.0, 0.01):
        got = evaluate(hos_ext, curvature, [x, score, diag, noise], h, cotangent)
        wide = [t.cpu().double() for t in (x, score, diag, noise)]
        expected = evaluate(oracles, curvature, wide, h, cotangent.cpu())
        for position, (value, wanted) in enumerate(zip(got, expected, strict=True)):
            value, wanted = value.cpu().double(), wanted.double()
            if position == 3 and curvature == "abs":  # sign(0) = 0 there
                value, wanted = value[:, 2:], wanted[:, 2:]
            # entry by entry: drift and noise may cancel down to a hundredth of themselves
            error = (value - wanted).abs() / wanted.abs().clamp_min(1e-37)
            assert error[wanted != 0].max() < 100 * ROUNDING[dtype]
            assert (value[wanted == 0] == 0).all()


def test_float32_slope_is_as_sharp_as_its_series_up_to_one(device):
    """The quotient (e^y - phi1) / y cancels: from |y| = 1/4 on it is several times as far off."""
    half = torch.linspace(0.25, 1.0, 1001, device=device)
    diag = torch.cat([half, -half]).unsqueeze(0)
    one, zero = torch.ones_like(diag), torch.zeros_like(diag)
    slope = evaluate(hos_ext, "raw", [zero, one, diag, zero], 1.0, one)[3]  # phi1'(diag)
    y = diag.cpu().double()
    expected = (y.exp() - torch.expm1(y) / y) / y
    assert (slope.cpu().double() / expected - 1).abs().max() < 2.5e-7


@pytest.mark.parametrize("dtype", HALVES)
def test_half_way_cases_round_to_even(device, dtype):
    half = torch.finfo(dtype).eps / 2
    x = (1 + torch.arange(64, device=device) * 2 * half).to(dtype).unsqueeze(0)
    x = torch.cat([x, -x])
    got = hos_ext.langevin_step(x, x.sign(), half, noise=torch.zeros_like(x))
    tied = x.float() + half * x.sign().float()  # exact in float32, between two neighbours
    even = (tied.abs() / (4 * half)).round() * (4 * half) * tied.sign()
    assert torch.equal(got.float(), even)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("value", [-1e30, -math.inf])
def test_infinitely_stiff_coordinates_stay_where_they_are(device, value, curvature, dtype):
    x, score, _, noise, cotangent = make((3, 31), dtype, device)
    diag = torch.full_like(x, value)
    out, grad_x, *grads = evaluate(hos_ext, curvature, [x, score, diag, noise], 0.3, cotangent)
    assert_near(out, x)
    assert torch.equal(grad_x, cotangent)
    for grad in grads:
        assert grad.abs().max() < 1e-14


@pytest.mark.parametrize("dtype", WIDE)
def test_raw_overflows_to_inf_and_clamp_does_not(device, dtype):
    x, score, _, noise, _ = make((3, 31), dtype, device)
    diag = torch.full_like(x, 1e4)
    assert (
        not hos_ext.ozaki_step(x, score, diag, 1.0, noise=noise, curvature="raw").isfinite().any()
    )
    assert hos_ext.ozaki_step(x, score, diag, 1.0, noise=noise).isfinite().all()
    assert hos_ext.ozaki_step(x, score, diag, 1.0, noise=noise, curvature="abs").isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_nan_and_inf_stay_in_their_entry(device, which, kind, bad):
    *tensors, _ = make((3, 31), torch.float32, device)
    if kind == "langevin" and which == 2:
        pytest.skip("a Langevin step has no diagonal")
    clean = step(hos_ext, kind, *tensors, 0.3)
    tensors[which][1, 7] = bad
    got = step(hos_ext, kind, *tensors, 0.3)
    kept = bad == math.inf and which == 2 and kind in ("clamp", "abs")
    assert bool(got[1, 7].isfinite()) == kept
    got[1, 7] = clean[1, 7]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_gradcheck(device, curvature):
    x, score, diag, noise, _ = (t.requires_grad_() for t in make((2, 5), torch.float64, device))
    h = torch.tensor([0.2, 0.7], dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda x, s, d, z: hos_ext.ozaki_step(x, s, d, h, noise=z, curvature=curvature),
        (x, score, diag, noise),
    )
    assert torch.autograd.gradcheck(
        lambda x, s, d: hos_ext.ozaki_step(x, s, d, 0.4, seed=3, curvature=curvature),
        (x, score, diag),
    )


def test_gradcheck_of_the_langevin_step(device):
    x, score, _, noise, _ = (t.requires_grad_() for t in make((2, 5), torch.float64, device))
    h = torch.tensor([0.2, 0.7], dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda x, s, z: hos_ext.langevin_step(x, s, h, noise=z), (x, score, noise)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_gradient_alone_equals_the_joint_one(device, kind):
    *tensors, cotangent = make((3, 31), torch.float64, device)
    _, *joint = evaluate(hos_ext, kind, tensors, 0.3, cotangent)
    for position, wanted in enumerate(joint):
        if kind == "langevin" and position == 2:
            continue
        leaf = tensors[position].clone().requires_grad_()
        mixed = [leaf if p == position else t for p, t in enumerate(tensors)]
        out = step(hos_ext, kind, *mixed, 0.3)
        assert torch.equal(torch.autograd.grad(out, leaf, cotangent)[0], wanted)


# ----------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 31), (257, 31)])
def test_half_precision_is_as_good_as_plain_torch_in_it(device, shape, kind, dtype):
    *tensors, cotangent = make(shape, dtype, device)
    wide = [t.double() for t in tensors]
    exact = evaluate(reference, kind, wide, 0.3, cotangent.double())
    native = evaluate(hos_ext, kind, tensors, 0.3, cotangent)
    plain = evaluate(reference, kind, tensors, 0.3, cotangent)
    for value, other, wanted in zip(native, plain, exact, strict=True):
        assert value.dtype == dtype
        assert value.shape == wanted.shape
        error, allowed = ((t.double() - wanted).abs().max() for t in (value, other))
        assert error <= 2 * allowed + ROUNDING[dtype]
        # float32 arithmetic, one rounding at the end
        assert_near(value, wanted, times=1.01)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_draws_the_noise_of_float32(device, kind, dtype):
    x, score, diag, _, _ = make((3, 31), dtype, device)
    noise = hos_ext.normal((3, 31), seed=5, dtype=torch.float32, device=device)
    got = step(hos_ext, kind, x, score, diag, None, 0.3, seed=5)
    expected = step(hos_ext, kind, x.float(), score.float(), diag.float(), noise, 0.3)
    assert_near(got, expected, times=1.01)


# ----------------------------------------------------------------------------------------- layouts


def every_second_sample(t):
    return torch.stack([t, t * math.nan], 1).flatten(0, 1)[::2]


def columns_of_a_wider_tensor(t):
    return torch.cat([t * math.nan, t, t * math.nan], 1)[:, t.shape[1] : 2 * t.shape[1]]


def every_second_column(t):
    return torch.stack([t, t * math.nan], -1).flatten(-2)[..., ::2]


def transposed(t):
    return t.mT.contiguous().mT


LAYOUTS = [every_second_sample, columns_of_a_wider_tensor, every_second_column, transposed]


@pytest.mark.parametrize("dtype", [*WIDE, *HALVES])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs_give_the_same_bits(device, kind, layout, dtype):
    *tensors, cotangent = make((3, 31), dtype, device)
    expected = evaluate(hos_ext, kind, tensors, 0.3, cotangent)
    got = evaluate(hos_ext, kind, [layout(t) for t in tensors], 0.3, layout(cotangent))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    expanded = [t[:1].expand(3, -1) for t in tensors]
    got = evaluate(hos_ext, kind, expanded, 0.3, cotangent[:1].expand(3, -1))
    expected = evaluate(
        hos_ext, kind, [t.clone() for t in expanded], 0.3, cotangent[:1].repeat(3, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", KINDS)
def test_images_step_as_their_flat_rows(device, kind, memory):
    dims = (2, 3, 4)
    *tensors, cotangent = make((3, 24), torch.float64, device)
    expected = evaluate(hos_ext, kind, tensors, 0.3, cotangent)
    images = [t.unflatten(1, dims).to(memory_format=memory) for t in tensors]
    got = evaluate(hos_ext, kind, images, 0.3, cotangent.unflatten(1, dims))
    for value, wanted in zip(got, expected, strict=True):
        assert value.shape == (3, *dims)
        assert torch.equal(value.flatten(1), wanted)
    drawn = step(hos_ext, kind, *images[:3], None, 0.3, seed=4)
    flat = step(hos_ext, kind, *tensors[:3], None, 0.3, seed=4)
    assert torch.equal(drawn.flatten(1), flat)


@settings(max_examples=60)
@given(
    batch=st.integers(0, 9),
    size=st.integers(0, 150),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from([torch.Tensor.contiguous, *LAYOUTS]),
    h=st.floats(1e-6, 1e3),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_layout_matches_the_oracle(device, batch, size, kind, layout, h, seed):
    x, score, diag, noise, _ = make((batch, size), torch.float64, device, seed)
    diag = diag.clamp(max=100 / h)  # "raw" stays finite
    got = step(hos_ext, kind, *(layout(t) for t in (x, score, diag, noise)), h)
    expected = step(oracles, kind, *(t.cpu() for t in (x, score, diag, noise)), h)
    terms = step(oracles, kind, x.abs().cpu(), score.abs().cpu(), diag.cpu(), noise.abs().cpu(), h)
    assert_near(got, expected.reshape(x.shape), terms=terms)


# ----------------------------------------------------------------------------------- out= in place


@pytest.mark.parametrize("dtype", [*WIDE, *HALVES])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [None, 0, 1, 2, 3])
def test_out_may_be_a_new_tensor_or_any_input(device, which, kind, dtype):
    *tensors, _ = make((3, 784), dtype, device)
    expected = step(hos_ext, kind, *tensors, 0.3)
    out = torch.empty_like(tensors[0]) if which is None else tensors[which]
    assert step(hos_ext, kind, *tensors, 0.3, out=out) is out
    assert torch.equal(out, expected)


def test_out_with_drawn_noise_equals_the_plain_call(device):
    x, score, diag, _, _ = make((257, 31), torch.float32, device)
    expected = hos_ext.ozaki_step(x, score, diag, 0.3, seed=1, offset=7, first=3)
    hos_ext.ozaki_step(x, score, diag, 0.3, seed=1, offset=7, first=3, out=x)
    assert torch.equal(x, expected)


def test_out_may_be_other_columns_of_the_same_buffer(device):
    buffer = randn(5, 93, seed=1).to(device)
    before = buffer.clone()
    x, score, out = buffer.split(31, 1)
    expected = hos_ext.langevin_step(x, score, 0.3, seed=2)
    assert hos_ext.langevin_step(x, score, 0.3, seed=2, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(buffer[:, :62], before[:, :62])
    hos_ext.langevin_step(x, score, 0.3, seed=2, out=x)
    assert torch.equal(x, expected)
    assert torch.equal(buffer[:, 31:62], before[:, 31:62])


def test_out_may_be_other_rows_of_the_same_buffer(device):
    buffer = randn(6, 31, seed=1).to(device)
    expected = hos_ext.langevin_step(buffer[:3], buffer[3:], 0.3, seed=2)
    hos_ext.langevin_step(buffer[:3], buffer[3:], 0.3, seed=2, out=buffer[3:])
    assert torch.equal(buffer[3:], expected)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_out_of_images_keeps_its_memory_format(device, memory):
    x, score, _, noise, _ = (
        t.unflatten(1, (2, 3, 4)) for t in make((3, 24), torch.float32, device)
    )
    expected = hos_ext.langevin_step(x, score, 0.3, noise=noise)
    out = x.to(memory_format=memory, copy=True)
    assert hos_ext.langevin_step(out, score, 0.3, noise=noise, out=out) is out
    assert torch.equal(out, expected)
    assert out.is_contiguous(memory_format=memory)


def test_out_is_seen_by_autograd_as_a_change_in_place(device):
    x, score, _, noise, _ = make((3, 31), torch.float32, device)
    weight = torch.ones_like(x).requires_grad_()
    loss = (weight * x).sum()
    with torch.no_grad():
        hos_ext.langevin_step(x, score, 0.3, noise=noise, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_out_works_in_inference_mode(device, memory):
    x, score, _, noise, _ = (
        t.unflatten(1, (2, 3, 4)) for t in make((3, 24), torch.float32, device)
    )
    expected = hos_ext.langevin_step(x, score, 0.3, noise=noise)
    with torch.inference_mode():
        out = x.to(memory_format=memory, copy=True)
        assert torch.equal(hos_ext.langevin_step(out, score, 0.3, noise=noise, out=out), expected)


def test_out_without_grad_mode_takes_inputs_that_require_grad(device):
    x, score, _, noise, _ = make((3, 31), torch.float32, device)
    expected = hos_ext.langevin_step(x, score, 0.3, noise=noise)
    with torch.no_grad():
        got = hos_ext.langevin_step(
            x, score.requires_grad_(), 0.3, noise=noise, out=torch.empty_like(x)
        )
    assert torch.equal(got, expected)


# ------------------------------------------------------------------------------------- drawn noise


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("seed", "offset", "first"), [(0, 0, 0), (2**64 - 1, 2**56 - 1, 2**40 + 3)]
)
def test_drawn_noise_is_that_of_normal_to_the_bit(device, kind, seed, offset, first, dtype):
    for shape in ((3, 31), (5, 7), (2, 2050)):
        x, score, diag, _, cotangent = make(shape, dtype, device)
        noise = hos_ext.normal(
            shape, seed=seed, offset=offset, first=first, dtype=dtype, device=device
        )
        where = {"seed": seed, "offset": offset, "first": first}
        expected = evaluate(hos_ext, kind, [x, score, diag, noise], 0.3, cotangent)
        got = evaluate(hos_ext, kind, [x, score, diag, None], 0.3, cotangent, **where)
        assert all(torch.equal(a, b) for a, b in zip(got, expected[:4], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_stepped_in_any_split(device, kind):
    x, score, diag, _, _ = make((257, 31), torch.float32, device)
    whole = step(hos_ext, kind, x, score, diag, None, 0.3, seed=6, offset=2, first=10)
    for parts in ([1, 256], [100, 100, 57], [257]):
        start, pieces = 0, []
        for n in parts:
            rows = slice(start, start + n)
            pieces.append(
                step(
                    hos_ext, kind, x[rows], score[rows], diag[rows], None, 0.3,
                    seed=6, offset=2, first=10 + start,
                )
            )  # fmt: skip
            start += n
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_offset_may_be_tensors(device, kind):
    x, score, diag, _, cotangent = make((3, 31), torch.float64, device)
    expected = evaluate(hos_ext, kind, [x, score, diag, None], 0.3, cotangent, seed=6, offset=2)
    for place in ("cpu", device):
        where = {"seed": torch.tensor(6, device=place), "offset": torch.tensor(2, device=place)}
        got = evaluate(hos_ext, kind, [x, score, diag, None], 0.3, cotangent, **where)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_no_seed_draws_one_from_torch(device, kind):
    x, score, diag, _, _ = make((3, 31), torch.float32, device)

    def draw():
        return step(hos_ext, kind, x, score, diag, None, 0.3)

    torch.manual_seed(11)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(11)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    torch.manual_seed(12)
    assert not torch.equal(draw(), first)


def test_offsets_and_seeds_give_different_noise(device):
    x = torch.zeros(3, 31, device=device)
    noises = [
        hos_ext.langevin_step(x, x, 0.5, seed=seed, offset=offset)
        for seed in (0, 1)
        for offset in (0, 1)
    ]
    for i in range(4):
        for j in range(i):
            assert not torch.isclose(noises[i], noises[j]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(kind):
    *tensors, cotangent = make((257, 784), torch.float32, "cpu")
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(hos_ext, kind, tensors, 0.3, cotangent))
            results.append(
                evaluate(hos_ext, kind, [*tensors[:3], None], 0.3, cotangent, seed=3, first=5)
            )
    finally:
        torch.set_num_threads(before)
    for other in (2, 4):
        for kept in (0, 1):
            pairs = zip(results[kept], results[other + kept], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_step_without_a_kernel_is_the_same_step(dtype, monkeypatch):
    """The plain-torch path draws the noise of the kernels, in the same arithmetic."""
    x, score, diag = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    native_step = hos_ext.ozaki_step(x, score, diag, 0.3, seed=5, offset=2, first=3)

    def refuse(**_):
        raise AssertionError("a device without kernels reached one")

    monkeypatch.setattr(native, "has_kernels", lambda device: False)
    monkeypatch.setattr(native._C, "direct_step", lambda **arguments: None)
    for name in ("noise", "step"):
        monkeypatch.setattr(native._C, name, refuse)
    step = hos_ext.ozaki_step(x, score, diag, 0.3, seed=5, offset=2, first=3)
    assert step.dtype == dtype
    assert_near(step, native_step, times=4)


@pytest.mark.parametrize("offset", [-1, 2**56])
def test_offset_read_late_is_still_refused(offset):
    x = torch.zeros(2, 3)
    late = torch.tensor(offset)
    with pytest.raises(ValueError, match=re.escape(f"offset must be in [0, 2**56), got {offset}")):
        torch.func.grad(lambda s: hos_ext.langevin_step(x, s, 0.1, seed=1, offset=late).sum())(x)


def test_the_drift_is_as_sharp_as_its_exponential_in_float32():
    """h phi1(h d) s: the exponential is a polynomial whose last term is 4e-7 of it at most."""
    d = torch.linspace(-20.0, 20.0, 20001).reshape(1, -1)
    zero, one = torch.zeros_like(d), torch.ones_like(d)
    got = hos_ext.ozaki_step(zero, one, d, 1.0, noise=zero, curvature="raw").double()
    wide = d.double()
    exact = torch.expm1(wide) / wide.where(wide != 0, 1.0)
    exact = exact.where(wide != 0, 1.0)
    assert ((got - exact) / exact).abs().max() < 3e-7
