"""The score matching operators against dense oracles, the plain version, and exact scores."""

from __future__ import annotations

import functools
import math

import oracles
import pytest
import torch
from conftest import BEYOND, WITHIN, assert_near, z_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hos_ext
from hos_ext.densities.gaussian import Gaussian, GaussianMixture
from hos_ext.ops import reference

# name: evaluation points, has a diag, has a factor
LOSSES = {
    "dsm_loss": (1, False, False),
    "dsm_vr_loss": (2, False, False),
    "d2sm_loss": (1, True, True),
    "d2sm_vr_loss": (3, True, True),
    "d2sm_diag_loss": (1, True, False),
    "d2sm_diag_vr_loss": (3, True, False),
}
LOW_RANK = [name for name, (_, _, factor) in LOSSES.items() if factor]
SECOND_ORDER = [name for name, (_, diag, _) in LOSSES.items() if diag]
REDUCED = ["d2sm_vr_loss", "d2sm_diag_vr_loss"]
# (B, D, r): empty and single batches, odd sizes, r = D, more than one chunk of 1024 entries
SHAPES = [
    (0, 5, 2),
    (1, 1, 0),
    (3, 1, 1),
    (3, 2, 0),
    (1, 2, 2),
    (257, 2, 1),
    (3, 31, 5),
    (1, 31, 16),
    (3, 31, 31),
    (1, 784, 20),
    (1, 2050, 2),
]
DTYPES = [torch.float32, torch.float64]


def randn(*shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator)


def make(name, batch, size, rank, *, score_points=None, seed=0):
    """[score, diag, factor] as far as the loss has them, and the noise; float32 on the CPU."""
    points, has_diag, has_factor = LOSSES[name]
    stack = (points,) if points > 1 else ()
    scores = (score_points or points,) if points > 1 else ()
    args = [randn(*scores, batch, size, seed=seed)]
    if has_diag:
        args.append(randn(*stack, batch, size, seed=seed + 1))
    if has_factor:
        args.append(randn(*stack, batch, size, rank, seed=seed + 2, scale=0.5))
    return args, randn(batch, size, seed=seed + 3)


def signs(rank):
    return torch.tensor([1.0, -1.0, -1.0] * rank)[:rank]


def call(module, name, args, noise, sigma, sign=None):
    """Losses per sample of the native operators, the plain version or the oracles."""
    if module is hos_ext:
        extra = {"sign": sign} if name in LOW_RANK else {}
        return getattr(module, name)(*args, noise, sigma, reduction="none", **extra)
    extra = (sign,) if name in LOW_RANK else ()
    return getattr(module, name)(*args, noise, sigma, *extra)


def evaluate(module, name, args, noise, sigma, cotangent, sign=None):
    """Losses per sample, and the gradients of <cotangent, losses> in every argument."""
    leaves = [None if a is None else a.detach().requires_grad_() for a in args]
    losses = call(module, name, leaves, noise, sigma, sign)
    wanted = [leaf for leaf in leaves if leaf is not None]
    if module is oracles and not losses.requires_grad:  # no samples: it looped over nothing
        return losses, *map(torch.zeros_like, wanted)
    grads = torch.autograd.grad(losses, wanted, cotangent, materialize_grads=True)
    return losses.detach(), *grads


def cast(tensors, dtype, device="cpu"):
    return [None if t is None else t.to(device, dtype) for t in tensors]


@functools.cache
def case(name, batch, size, rank, score_points=None, signed=False):
    """One problem and its oracle in float64."""
    args, noise = make(name, batch, size, rank, score_points=score_points)
    sigma = 0.3 + torch.rand(batch, generator=torch.Generator().manual_seed(9))
    cotangent = randn(batch, seed=8)
    sign = signs(rank) if signed else None
    wide = [*cast([noise, sigma, cotangent], torch.float64), sign]
    expected = evaluate(oracles, name, cast(args, torch.float64), *wide)
    return args, (noise, sigma, cotangent, sign), expected


# ---------------------------------------------------------------------------- values and gradients


def shapes_of(name):
    """Without a factor the rank changes nothing."""
    return sorted({(b, d, r if name in LOW_RANK else 0) for b, d, r in SHAPES})


CASES = [(name, *shape) for name in LOSSES for shape in shapes_of(name)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "batch", "size", "rank"), CASES)
def test_loss_and_gradients_match_the_oracle(device, name, batch, size, rank, dtype):
    args, rest, expected = case(name, batch, size, rank)
    args, rest = cast(args, dtype, device), cast(rest, dtype, device)
    for module in (hos_ext, reference):
        got = evaluate(module, name, args, *rest)
        for value, wanted in zip(got, expected, strict=True):
            assert value.dtype == dtype
            assert_near(value, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 5, 16, 31])
@pytest.mark.parametrize("name", LOW_RANK)
def test_loss_with_signed_columns_matches_the_oracle(device, name, rank, dtype):
    args, rest, expected = case(name, 3, 31, rank, signed=True)
    got = evaluate(hos_ext, name, cast(args, dtype, device), *cast(rest, dtype, device))
    plain = evaluate(reference, name, cast(args, dtype, device), *cast(rest, dtype, device))
    for value, other, wanted in zip(got, plain, expected, strict=True):
        assert_near(value, wanted)
        assert_near(other, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "size", "rank"), [(0, 5, 2), (3, 1, 1), (3, 31, 5), (2, 784, 2)])
@pytest.mark.parametrize("name", REDUCED)
def test_two_scores_leave_the_clean_score_out(device, name, batch, size, rank, dtype):
    args, rest, expected = case(name, batch, size, rank if name in LOW_RANK else 0, 2)
    got = evaluate(hos_ext, name, cast(args, dtype, device), *cast(rest, dtype, device))
    plain = evaluate(reference, name, cast(args, dtype, device), *cast(rest, dtype, device))
    assert got[1].shape == (2, batch, size)
    for value, other, wanted in zip(got, plain, expected, strict=True):
        assert_near(value, wanted)
        assert_near(other, wanted)


@pytest.mark.parametrize("name", REDUCED)
def test_clean_score_shifts_the_value_by_its_own_inner_product(name):
    args, (noise, sigma, _, _), _ = case(name, 3, 31, 5 if name in LOW_RANK else 0)
    args, (noise, sigma) = cast(args, torch.float64), cast([noise, sigma], torch.float64)
    clean = args[0][2]
    shift = call(hos_ext, name, args, noise, sigma) - call(
        hos_ext, name, [args[0][:2], *args[1:]], noise, sigma
    )
    inner = clean.square().sum(-1) - (clean * noise).sum(-1).square()
    if name == "d2sm_diag_vr_loss":
        inner = (clean.square() * (1 - noise.square())).sum(-1)
    assert_near(shift, -2 * inner / sigma.square(), times=100)


@pytest.mark.parametrize("name", LOW_RANK)
def test_factor_none_is_rank_zero(device, name):
    args, rest, expected = case(name, 3, 31, 0)
    args, rest = cast(args, torch.float32, device), cast(rest, torch.float32, device)
    got = evaluate(hos_ext, name, [*args[:2], None], *rest)
    for value, wanted in zip(got, expected[:3], strict=True):
        assert_near(value, wanted)
    assert evaluate(hos_ext, name, args, *rest)[3].shape == args[2].shape


@pytest.mark.parametrize("name", LOSSES)
def test_each_gradient_alone_equals_the_joint_one(device, name):
    args, rest, expected = case(name, 3, 31, 5 if name in LOW_RANK else 0)
    args, rest = cast(args, torch.float64, device), cast(rest, torch.float64, device)
    for position, wanted in enumerate(expected[1:]):
        leaf = args[position].clone().requires_grad_()
        mixed = [leaf if p == position else a for p, a in enumerate(args)]
        losses = call(hos_ext, name, mixed, *rest[:2])
        assert_near(torch.autograd.grad(losses, leaf, rest[2])[0], wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_wanted_gives_the_same_value(device, name):
    args, rest, _ = case(name, 3, 31, 5 if name in LOW_RANK else 0)
    args, rest = cast(args, torch.float32, device), cast(rest, torch.float32, device)
    value = evaluate(hos_ext, name, args, *rest)[0]
    direct = call(hos_ext, name, args, *rest[:2])
    assert not direct.requires_grad
    assert torch.equal(direct, value)


@pytest.mark.parametrize("name", LOSSES)
def test_reductions_are_those_of_the_per_sample_losses(device, name):
    args, (noise, _, _, _), _ = case(name, 3, 31, 5 if name in LOW_RANK else 0)
    args, (noise,) = cast(args, torch.float64, device), cast([noise], torch.float64, device)
    loss = getattr(hos_ext, name)
    per_sample = loss(*args, noise, 0.5, reduction="none")
    assert per_sample.shape == (3,)
    assert_near(loss(*args, noise, 0.5), per_sample.mean())
    assert_near(loss(*args, noise, 0.5, reduction="mean"), per_sample.mean())
    assert_near(loss(*args, noise, 0.5, reduction="sum"), per_sample.sum())
    leaf = args[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, *args[1:], noise, 0.5), leaf)
    expected = evaluate(
        oracles, name, args, noise, 0.5, torch.full((3,), 1 / 3, dtype=torch.float64)
    )
    assert_near(grad, expected[1])


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batch_reduces_as_torch_does(device, name):
    args, noise = make(name, 0, 5, 2)
    args, (noise,) = cast(args, torch.float32, device), cast([noise], torch.float32, device)
    loss = getattr(hos_ext, name)
    assert loss(*args, noise, 0.5, reduction="none").shape == (0,)
    assert loss(*args, noise, 0.5, reduction="sum") == 0
    assert loss(*args, noise, 0.5).isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_empty_samples_have_zero_loss(device, name):
    args, noise = make(name, 3, 0, 2)
    args, (noise,) = cast(args, torch.float32, device), cast([noise], torch.float32, device)
    got = evaluate(hos_ext, name, args, noise, 0.5, torch.ones(3, device=device))
    assert torch.equal(got[0], torch.zeros(3, device=device))
    assert all(grad.shape == arg.shape for grad, arg in zip(got[1:], args, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_sigma_may_be_a_number_a_scalar_tensor_or_one_for_each_sample(device, name):
    args, (noise, _, cotangent, _), _ = case(name, 3, 31, 5 if name in LOW_RANK else 0)
    args = cast(args, torch.float32, device)
    noise, cotangent = cast([noise, cotangent], torch.float32, device)
    want = evaluate(oracles, name, cast(args, torch.float64), noise, 2.0, cotangent.double())
    kinds = [2, 2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)]
    kinds += [torch.full((3,), 2.0, device=device), torch.tensor(2.0, device=device).expand(3)]
    kinds += [torch.full((6,), 2.0, device=device, dtype=torch.float64)[::2]]
    for sigma in kinds:
        got = evaluate(hos_ext, name, args, noise, sigma, cotangent)
        for value, wanted in zip(got, want, strict=True):
            assert value.dtype == torch.float32
            assert_near(value, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_images_are_flattened_in_row_major_order(device, name):
    points = LOSSES[name][0]
    dims = (2, 3, 4)
    args, noise = make(name, 3, 24, 5)
    args, (noise,) = cast(args, torch.float64, device), cast([noise], torch.float64, device)
    expected = evaluate(hos_ext, name, args, noise, 0.7, torch.ones(3, device=device).double())
    lead = 2 if points > 1 else 1
    images = [a.unflatten(lead, dims) for a in args[:2]] + args[2:]
    got = evaluate(
        hos_ext, name, images, noise.unflatten(1, dims), 0.7, torch.ones(3, device=device).double()
    )
    assert torch.equal(got[0], expected[0])
    for value, wanted, image in zip(got[1:], expected[1:], images, strict=True):
        assert value.shape == image.shape
        assert torch.equal(value.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_nan_and_inf_stay_in_their_sample(device, name, bad):
    args, (noise, sigma, cotangent, _), _ = case(name, 3, 31, 5 if name in LOW_RANK else 0)
    args = cast(args, torch.float32, device)
    rest = cast([noise, sigma, cotangent], torch.float32, device)
    clean = evaluate(hos_ext, name, args, *rest)
    spoilt = args[0].clone()
    spoilt[..., 1, 7] = bad
    got = evaluate(hos_ext, name, [spoilt, *args[1:]], *rest)
    assert not got[0][1].isfinite()
    assert torch.equal(got[0][[0, 2]], clean[0][[0, 2]])
    for value, wanted in zip(got[1:], clean[1:], strict=True):
        axis = 1 if LOSSES[name][0] > 1 else 0
        assert torch.equal(value.movedim(axis, 0)[[0, 2]], wanted.movedim(axis, 0)[[0, 2]])


@pytest.mark.parametrize("name", LOSSES)
def test_two_runs_give_equal_bits(device, name):
    args, rest, _ = case(name, 257, 2, 1 if name in LOW_RANK else 0)
    args, rest = cast(args, torch.float32, device), cast(rest, torch.float32, device)
    once = evaluate(hos_ext, name, args, *rest)
    again = evaluate(hos_ext, name, args, *rest)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# ----------------------------------------------------------------------------------------- layouts


def as_slices(t):
    """Columns of a wider tensor."""
    if t.shape[-1] == 0:
        return t
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), math.nan, dtype=t.dtype, device=t.device)
    wide[..., 2:-1] = t
    return wide[..., 2:-1]


def as_every_second_sample(t):
    axis = -2 if t.dim() < 4 else -3
    return (
        torch.stack([t, t * math.nan], axis)
        .flatten(axis - 1, axis)
        .unflatten(axis, (-1, 2))
        .select(axis, 0)
    )


def as_every_second_column(t):
    return torch.stack([t, t * math.nan], -1).flatten(-2)[..., ::2]


def as_points_last(t):
    """Batch before points, and samples apart: (B, P, ...) seen as (P, B, ...)."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def as_first_axis_fastest(t):
    return t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])


LAYOUTS = [
    as_slices,
    as_every_second_sample,
    as_every_second_column,
    as_points_last,
    as_first_axis_fastest,
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_strided_inputs_give_the_same_result(device, name, layout):
    args, rest, expected = case(name, 3, 31, 5 if name in LOW_RANK else 0)
    args, rest = cast(args, torch.float64, device), cast(rest, torch.float64, device)
    strided = [layout(a) for a in args]
    assert all(torch.equal(s, a) for s, a in zip(strided, args, strict=True))
    noise = layout(rest[0])
    cotangent = torch.stack([rest[2], rest[2]], -1)[:, 0]
    got = evaluate(hos_ext, name, strided, noise, rest[1], cotangent)
    for value, wanted in zip(got, expected, strict=True):
        assert_near(value, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_expanded_inputs_give_the_same_result(device, name):
    args, noise = make(name, 1, 31, 5)
    args, (noise,) = cast(args, torch.float64, device), cast([noise], torch.float64, device)
    axis = 1 if LOSSES[name][0] > 1 else 0
    wide = [a.expand(*a.shape[:axis], 4, *a.shape[axis + 1 :]) for a in args]
    if axis == 1:  # and all points alike
        wide = [a[:1].expand(a.shape) for a in wide]
    noise, cotangent = noise.expand(4, -1), randn(1, seed=3).double().to(device).expand(4)
    got = evaluate(hos_ext, name, wide, noise, 0.7, cotangent)
    dense = [a.contiguous() for a in wide]
    expected = evaluate(oracles, name, dense, noise, 0.7, cotangent)
    for value, wanted in zip(got, expected, strict=True):
        assert_near(value, wanted)


@pytest.mark.parametrize("rank_fastest", [True, False])
@pytest.mark.parametrize("name", LOW_RANK)
def test_slices_of_one_network_output_in_both_factor_orders(device, name, rank_fastest):
    points, size, rank, batch = LOSSES[name][0], 31, 5, 3
    out = randn(points * batch, (2 + rank) * size, seed=4).double().to(device)
    out = out.unflatten(0, (points, batch)) if points > 1 else out
    score, diag, rest = out.split([size, size, rank * size], -1)
    if rank_fastest:
        factor = rest.unflatten(-1, (size, rank))
    else:
        factor = rest.unflatten(-1, (rank, size)).mT
    noise = randn(batch, size, seed=5).double().to(device)
    cotangent = randn(batch, seed=6).double().to(device)
    got = evaluate(hos_ext, name, [score, diag, factor], noise, 0.7, cotangent)
    expected = evaluate(oracles, name, [score, diag, factor], noise, 0.7, cotangent)
    for value, wanted in zip(got, expected, strict=True):
        assert_near(value, wanted)
    # The gradient lies in memory as the factor does: the network's backward needs no copy.
    assert got[3].stride(-1 if rank_fastest else -2) == 1


def test_convolution_channels_reach_the_loss(device):
    """(B, (2 + r) C, H, W), contiguous and channels_last, as a U-Net gives it."""
    dims, rank = (2, 3, 4), 5
    out = randn(3, (2 + rank) * 2, 3, 4, seed=7).double().to(device)
    noise = randn(3, *dims, seed=8).double().to(device)
    for memory in (torch.contiguous_format, torch.channels_last):
        score, diag, rest = out.to(memory_format=memory).split([2, 2, 2 * rank], 1)
        factor = rest.unflatten(1, (rank, 2)).flatten(2).mT
        args = [score, diag, factor]
        got = evaluate(
            hos_ext, "d2sm_loss", args, noise, 0.7, torch.ones(3, device=device).double()
        )
        expected = evaluate(
            oracles, "d2sm_loss", args, noise, 0.7, torch.ones(3, device=device).double()
        )
        for value, wanted in zip(got, expected, strict=True):
            assert_near(value, wanted)


@pytest.mark.parametrize("name", LOW_RANK)
def test_strided_sign_gives_the_same_result(device, name):
    args, rest, expected = case(name, 3, 31, 5, signed=True)
    args, rest = cast(args, torch.float64, device), cast(rest, torch.float64, device)
    apart = torch.stack([rest[3], 7 * rest[3]], -1)[:, 0]
    got = evaluate(hos_ext, name, args, *rest[:3], apart)
    for value, wanted in zip(got, expected, strict=True):
        assert_near(value, wanted)
    alike = torch.full((1,), -1.0, dtype=torch.float64, device=device).expand(5)
    got = evaluate(hos_ext, name, args, *rest[:3], alike)
    wanted = evaluate(hos_ext, name, args, *rest[:3], alike.clone())
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(LOSSES)),
    batch=st.integers(0, 5),
    size=st.integers(1, 40),
    rank=st.integers(0, 24),
    layout=st.sampled_from([torch.Tensor.contiguous, *LAYOUTS]),
    signed=st.booleans(),
    per_sample=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_layout_matches_the_oracle(
    device, name, batch, size, rank, layout, signed, per_sample, seed
):
    args, noise = make(name, batch, size, rank, seed=seed)
    args, (noise,) = cast(args, torch.float64, device), cast([noise], torch.float64, device)
    sigma = 0.5 + torch.arange(batch, device=device) / 7 if per_sample else 0.8
    sign = signs(rank).double().to(device) if signed and name in LOW_RANK else None
    cotangent = randn(batch, seed=seed + 5).double().to(device)
    rest = (sigma, cotangent, sign)
    got = evaluate(hos_ext, name, [layout(a) for a in args], layout(noise), *rest)
    expected = evaluate(oracles, name, args, noise, *rest)
    assert torch.isfinite(got[0]).all()
    for value, wanted in zip(got, expected, strict=True):
        # A loss may come out near 0 from terms of the size of its gradients.
        scale = 1 + max((g.abs().max().item() for g in expected if g.numel()), default=0.0)
        assert value.shape == wanted.shape
        assert torch.allclose(value, wanted, rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize("score_points", [3, 2])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(device, name, signed, score_points):
    args, noise = make(name, 2, 3, 2, score_points=score_points if name in REDUCED else None)
    args, (noise,) = cast(args, torch.float64, device), cast([noise], torch.float64, device)
    sign = signs(2).double().to(device) if signed else None
    leaves = [a.requires_grad_() for a in args]
    assert torch.autograd.gradcheck(
        lambda *leaves: call(hos_ext, name, leaves, noise, 0.7, sign), leaves
    )


# ----------------------------------------------------- exact scores are stationary, wrong ones not

SIGMA, ALPHA, SAMPLES = 0.5, 0.8, 20_000


def gaussian():
    root = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.7, 0.0], [-0.5, 0.4, 0.8]]).double()
    return Gaussian(torch.tensor([0.5, -1.0, 0.2]).double(), root @ root.mT)


def mixture():
    means = torch.tensor([[1.0, 0.5, -0.3], [-0.8, 0.2, 0.9]]).double()
    root = torch.tensor([[0.7, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.6]]).double()
    covariances = torch.stack([root @ root.mT, 0.3 * torch.eye(3).double()])
    return GaussianMixture(torch.tensor([0.6, 0.4]).double(), means, covariances)


def exact(name, density, scale=1.0):
    """The arguments at the truth (s2 times `scale`), the noise, and the evaluation points."""
    x = density.sample(SAMPLES, seed=1)
    noise = randn(SAMPLES, 3, seed=2).double()
    points = [ALPHA * x + SIGMA * noise, ALPHA * x - SIGMA * noise, ALPHA * x]
    points = {1: points[:1], 2: [points[0], points[2]], 3: points}[LOSSES[name][0]]
    noisy = density.noisy(SIGMA, ALPHA)
    args = [torch.stack([noisy.score(p) for p in points])]
    if name in LOW_RANK:
        # s2 + I / sigma^2 is positive definite (Tweedie): its Cholesky factor is U.
        hessian = torch.stack([noisy.hessian(p) for p in points])
        shift = torch.eye(3).double() / SIGMA**2
        args.append(torch.full_like(args[0], -scale / SIGMA**2))
        args.append(math.sqrt(scale) * torch.linalg.cholesky(hessian + shift))
    elif name in SECOND_ORDER:
        args.append(scale * torch.stack([noisy.hessian_diag(p) for p in points]))
    if len(points) == 1:
        args, points = [a[0] for a in args], points[0]
    return args, noise, points if isinstance(points, Tensor) else torch.stack(points)


def slopes(name, args, noise, points, sigma):
    """z-scores of dL/dt at t = 0 for arguments a + t g(x), over smooth fields g.

    A field moves all evaluation points at once, as a parameter of a network does.
    """
    # The score enters the second-order losses through the detached form: only diag and factor.
    first = 1 if name in SECOND_ORDER else 0
    grads = evaluate(hos_ext, name, args, noise, sigma, torch.ones(SAMPLES).double())[1:]
    found = []
    for grad in grads[first:]:
        for field in (torch.ones_like(points), points, torch.cos(2 * points)):
            weight = field if grad.dim() == points.dim() else field.flip(-1).unsqueeze(-1)
            terms = grad * weight
            found.append(z_scores(terms.sum(0) if LOSSES[name][0] > 1 else terms))
    return torch.cat(found).abs().max().item()


@pytest.mark.parametrize("density", [gaussian, mixture])
@pytest.mark.parametrize("name", LOSSES)
def test_exact_scores_are_stationary_and_wrong_scales_are_not(name, density):
    args, noise, points = exact(name, density())
    assert slopes(name, args, noise, points, SIGMA) < WITHIN
    # 1 / sigma for 1 / sigma^2 (second order), 1 / sqrt(sigma) for 1 / sigma (first)
    assert slopes(name, args, noise, points, math.sqrt(SIGMA)) > BEYOND
    # a flipped sign
    flipped = [-args[0]] if name not in SECOND_ORDER else [args[0], -args[1], *args[2:]]
    assert slopes(name, flipped, noise, points, SIGMA) > BEYOND
    # a dropped 2
    if name in SECOND_ORDER:
        half, noise, points = exact(name, density(), scale=0.5)
    else:
        half = [args[0] / 2]
    assert slopes(name, half, noise, points, SIGMA) > BEYOND


@pytest.mark.parametrize("density", [gaussian, mixture])
@pytest.mark.parametrize("name", LOSSES)
def test_expected_value_at_the_truth_is_minus_the_squared_norm(name, density):
    """E[-C | x] = psi and E[-z / sigma | x] = s: the losses come to -|psi|^2, -|q|^2 and -|s|^2."""
    args, noise, _ = exact(name, density())
    s = args[0]
    if name in LOW_RANK:
        psi = torch.diag_embed(args[1]) + args[2] @ args[2].mT + s.unsqueeze(-1) * s.unsqueeze(-2)
        norm = psi.square().sum((-1, -2))
    else:
        norm = (s if name not in SECOND_ORDER else args[1] + s.square()).square().sum(-1)
    if name == "dsm_vr_loss":
        norm = norm[0]
    elif LOSSES[name][0] == 3:
        norm = norm[:2].mean(0)
    constant = 3 / SIGMA**2 if name == "dsm_loss" else 0.0
    for sigma, close in ((SIGMA, True), (math.sqrt(SIGMA), False)):
        losses = call(hos_ext, name, args, noise, sigma)
        worst = z_scores(losses + norm - constant).abs().max()
        assert worst < WITHIN if close else worst > BEYOND


@pytest.mark.parametrize("name", LOW_RANK)
def test_exact_gaussian_with_negative_columns_is_stationary(name):
    """-P = 0 - L L^T, with every column negative."""
    args, noise, points = exact(name, gaussian())
    precision = -gaussian().noisy(SIGMA, ALPHA).hessian(points.reshape(-1, 3)[:1])[0]
    factor = torch.linalg.cholesky(precision).expand(args[2].shape)
    sign = -torch.ones(3).double()
    ones = torch.ones(SAMPLES).double()
    for columns, stationary in ((sign, True), (-sign, False)):
        _, _, grad_diag, grad_factor = evaluate(
            hos_ext, name, [args[0], 0 * args[1], factor], noise, SIGMA, ones, columns
        )
        if LOSSES[name][0] > 1:
            grad_diag, grad_factor = grad_diag.sum(0), grad_factor.sum(0)
        worst = torch.cat([z_scores(grad_diag), z_scores(grad_factor)]).abs().max()
        assert worst < WITHIN if stationary else worst > BEYOND


@pytest.mark.parametrize("name", ["d2sm_loss", "d2sm_diag_loss"])
def test_score_is_stationary_in_the_plain_second_order_losses(name):
    """psi = s2 + s s^T at the truth has no slope in s either (the family is not restricted)."""
    args, noise, points = exact(name, gaussian())
    for sigma, stationary in ((SIGMA, True), (math.sqrt(SIGMA), False)):
        grad = evaluate(hos_ext, name, args, noise, sigma, torch.ones(SAMPLES).double())[1]
        worst = torch.cat([z_scores(grad), z_scores(grad * points)]).abs().max()
        assert worst < WITHIN if stationary else worst > BEYOND


@pytest.mark.parametrize("name", LOSSES)
def test_minimiser_is_the_hessian_of_the_noisy_log_density(name):
    """Constant s2 (linear s1 for the first order) fitted to Gaussian data ends at -P."""
    args, noise, points = exact(name, gaussian())
    precision = -gaussian().noisy(SIGMA, ALPHA).hessian(torch.zeros(1, 3).double())[0]
    matrix = torch.zeros(3, 3).double().requires_grad_()
    bias = torch.zeros(3).double().requires_grad_()
    root = torch.eye(3).double().requires_grad_()

    def model():
        if name not in SECOND_ORDER:
            return [points @ matrix.mT + bias], matrix
        if name not in LOW_RANK:
            return [args[0], bias.expand(args[1].shape)], torch.diag(bias)
        diag = torch.full_like(args[1], -1 / SIGMA**2)
        s2 = root @ root.mT - torch.eye(3) / SIGMA**2
        return [args[0], diag, root.expand(args[2].shape)], s2

    optimiser = torch.optim.LBFGS([matrix, bias, root], max_iter=40, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = getattr(hos_ext, name)(*model()[0], noise, SIGMA)
        loss.backward()
        return loss

    optimiser.step(closure)
    fitted = model()[1].detach()
    wanted = torch.diag(precision.diagonal()) if fitted.count_nonzero() == 3 else precision
    # standard errors at 20,000 samples are near 0.02 / sigma^2
    assert (fitted + wanted).abs().max() < 0.1 * precision.max()


# ------------------------------------------------------------------------------ variance, precision


def smooth_model(x):
    """A small tanh network of known weights: s1, d, U at x (..., 4), smooth in x."""
    w = [
        randn(4, 8, seed=11).double(),
        randn(8, 4, seed=12).double(),
        randn(4, 8, seed=13).double(),
    ]
    hidden = torch.tanh(x @ w[0] / 2)
    return [hidden @ w[1] / 3, hidden[..., :4] * 2, torch.tanh(x @ w[2] / 3).unflatten(-1, (4, 2))]


def gradient_variance(name, sigma):
    """Total variance over noise of the loss gradient in two parameters of the model.

    They scale the two fields cos(x) and sin(2x) added to the last argument.
    """
    x = mixture_points()
    noise = randn(x.shape[0], 4, seed=15).double()
    at = {1: [x + sigma * noise], 2: [x + sigma * noise, x], 3: None}[LOSSES[name][0]]
    points = torch.stack(at or [x + sigma * noise, x - sigma * noise, x])
    score, diag, factor = smooth_model(points)
    args = [score, diag, factor][: 1 + LOSSES[name][1] + LOSSES[name][2]]
    if len(points) == 1:
        args, points = [a[0] for a in args], points[0]
    ones = torch.ones(x.shape[0]).double()
    grad = evaluate(hos_ext, name, args, noise, sigma, ones)[-1]
    total = 0.0
    for field in (points.cos(), (2 * points).sin()):
        weight = field if grad.dim() == points.dim() else field.unsqueeze(-1)
        terms = (grad * weight).movedim(-2 if grad.dim() == points.dim() else -3, 0)
        total += terms.flatten(1).sum(1).var().item()
    return total


@functools.cache
def mixture_points():
    part = torch.randint(0, 3, (4000,), generator=torch.Generator().manual_seed(14))
    return randn(3, 4, seed=16).double()[part] + randn(4000, 4, seed=17).double()


@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("dsm_loss", -2),
        ("dsm_vr_loss", 0),
        ("d2sm_loss", -4),
        ("d2sm_vr_loss", 0),
        ("d2sm_diag_loss", -4),
        ("d2sm_diag_vr_loss", 0),
    ],
)
def test_gradient_variance_grows_with_falling_sigma_at_the_stated_rate(name, slope):
    sigmas = torch.logspace(-3, math.log10(0.03), 6).double()
    variances = torch.tensor([gradient_variance(name, s) for s in sigmas.tolist()]).double()
    x, y = sigmas.log(), variances.log()
    fitted = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert abs(fitted - slope) < 0.15


@pytest.mark.parametrize("size", [31, 784])
@pytest.mark.parametrize("name", ["d2sm_vr_loss", "d2sm_diag_vr_loss"])
def test_difference_of_near_scores_keeps_its_digits(device, name, size):
    """Scores that differ by 1/1000 have exact differences; those of their squares lose 3 digits."""
    steps = 1 + torch.rand(size, generator=torch.Generator().manual_seed(5))
    clean = 1 + torch.rand(1, size, generator=torch.Generator().manual_seed(6))
    score = torch.stack([clean + steps / 1000, clean + steps / 900, clean])
    args = [score, torch.zeros_like(score)]
    args += [torch.zeros(*score.shape, 3)] if name in LOW_RANK else []
    noise = torch.zeros(1, size)
    expected = call(oracles, name, cast(args, torch.float64), noise.double(), 0.003).item()
    got = call(hos_ext, name, cast(args, torch.float32, device), noise.to(device), 0.003)
    assert abs(got.item() / expected - 1) < 2e-7


@pytest.mark.parametrize(("name", "bound"), [("d2sm_vr_loss", 3e-5), ("d2sm_diag_vr_loss", 1e-5)])
def test_reduced_value_survives_float32_at_small_sigma(device, name, bound):
    """A second difference over sigma^2: products before differences miss the bound (math: 5.9)."""
    size, rank, sigma = 784, 20, 0.01
    x, noise = randn(1, size, seed=20), randn(1, size, seed=21)
    points = torch.stack([x + sigma * noise, x - sigma * noise, x]).double()
    frequency = randn(size, rank, seed=22).double()
    phase = 3 * frequency.roll(1, 0)
    score, diag = torch.sin(points) / 5, torch.cos(points) - 1
    factor = torch.cos(points.unsqueeze(-1) * frequency + phase) / 5
    args = cast([score, diag, factor][: 2 + (name in LOW_RANK)], torch.float32)
    expected = call(oracles, name, args, noise, sigma).item()
    native = call(hos_ext, name, cast(args, torch.float32, device), noise.to(device), sigma)
    plain = call(reference, name, args, noise, sigma)
    score, diag = args[:2]
    if name in LOW_RANK:
        columns = torch.cat([args[2], score.unsqueeze(-1)], -1)
        psi = torch.diag_embed(diag) + columns @ columns.mT
        traces = psi.diagonal(0, -2, -1).sum(-1) - ((noise @ psi) * noise).sum((-1, -2))
    else:
        psi = diag + score.square()
        traces = (psi * (1 - noise.square())).sum(-1)
    norms = psi.square().flatten(1).sum(1)
    naive = (norms[0] + norms[1]) / 2 + (traces[0] + traces[1] - 2 * traces[2]) / sigma**2
    assert abs(native.item() / expected - 1) < bound
    assert abs(plain.item() / expected - 1) < bound
    assert abs(naive.item() / expected - 1) > bound


def test_lazily_negated_gradient_is_read_with_its_sign(device):
    score = torch.randn(3, 4, device=device, requires_grad=True)
    noise, weight = torch.randn(3, 4, device=device), torch.randn(3, device=device)
    loss = hos_ext.dsm_loss(score, noise, 0.5, reduction="none")
    value = (
        torch.complex(torch.zeros_like(loss), loss).conj() * torch.complex(weight, weight)
    ).real
    (gradient,) = torch.autograd.grad(value.sum(), score)
    (expected,) = torch.autograd.grad(
        (hos_ext.dsm_loss(score, noise, 0.5, reduction="none") * weight).sum(), score
    )
    assert_near(gradient, expected)
