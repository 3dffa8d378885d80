"""Stateless noise: known answers, oracles, statistics, and independence of how it is drawn."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import oracles
import pytest
import torch
from conftest import NORMAL_ATOL, ROUNDING, WITHIN, z_scores
from hypothesis import given
from hypothesis import strategies as st

import hos_ext
from hos_ext.ops import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Philox4x32-10, published with the generator (Salmon et al. 2011): counter, key, words.
ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# (seed, offset, first, stream): every word of key and counter, and carries between words
PLACES = [
    (0, 0, 0, 0),
    (1, 2, 3, 1),
    (2**32 + 5, 2**32 + 7, 2**34 - 2, 3),
    (2**64 - 1, 2**56 - 1, 2**62 + 1, 255),
]


# ----------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    assert oracles.philox4x32_10(counter, key) == words
    as_tensors = tuple(torch.tensor([word]) for word in counter)
    assert [int(word) for word in reference.philox(as_tensors, key)] == list(words)


def test_native_uniforms_are_the_published_words(device):
    """The other two counters lie beyond element 2^64; places of all words are checked below."""
    words = KNOWN[0][2]
    drawn = hos_ext.uniform((4,), seed=0, dtype=torch.float64, device=device)
    assert drawn.tolist() == [(word + 0.5) / 2**32 for word in words]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seed", "offset", "first", "stream"), PLACES)
def test_noise_matches_the_oracle_and_the_plain_version(device, seed, offset, first, stream, dtype):
    place = {"seed": seed, "offset": offset, "first": first, "stream": stream}
    for draw, atol in ((hos_ext.normal, NORMAL_ATOL[dtype]), (hos_ext.uniform, ROUNDING[dtype])):
        name = draw.__name__
        got = draw((301,), dtype=dtype, device=device, **place)
        assert got.dtype == dtype
        assert got.device == device
        values = getattr(oracles, name)(301, seed, offset, first, stream)
        expected = torch.tensor(values, dtype=torch.float64)
        plain = getattr(reference, name)((301,), dtype=dtype, device=device, **place)
        assert (got.cpu().double() - expected).abs().max() <= atol
        assert (plain.cpu().double() - expected).abs().max() <= atol


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded(device, dtype):
    for draw in (hos_ext.normal, hos_ext.uniform):
        wide = draw((3, 4001), seed=3, dtype=torch.float32, device=device)
        assert torch.equal(draw((3, 4001), seed=3, dtype=dtype, device=device), wide.to(dtype))


def test_float32_normals_keep_relative_accuracy_everywhere(device):
    """Near 0 and in the tails alike: 300,000 draws against float64."""
    narrow = hos_ext.normal((300_000,), seed=4, device=device).double()
    wide = hos_ext.normal((300_000,), seed=4, dtype=torch.float64, device=device)
    assert (narrow - wide).abs().max() < NORMAL_ATOL[torch.float32]
    assert ((narrow - wide).abs() / wide.abs())[wide.abs() > 1e-2].max() < 2e-5


# -------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("stream", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_moments_and_tails_are_those_of_a_normal(device, seed, stream):
    z = hos_ext.normal((400_000,), seed=seed, stream=stream, dtype=torch.float64, device=device)
    z = z.cpu()
    # centred in their expectations: E z^2 = 1, E z^4 = 3, E z^6 = 15
    terms = [z, z**2 - 1, z**3, z**4 - 3, z**5, z**6 - 15]
    for bound in (-3.0, -1.0, 0.0, 0.5, 2.0, 3.5):
        below = 0.5 * math.erfc(-bound / math.sqrt(2))
        terms.append((z < bound).double() - below)
    assert z_scores(torch.stack(terms, -1)).abs().max() < WITHIN
    assert z.abs().max() < 6.77  # sqrt(-2 log(2^-33)), the largest there is
    assert z.abs().max() > 4.3


def test_uniforms_fill_the_interval_evenly(device):
    u = hos_ext.uniform((400_000,), seed=5, dtype=torch.float64, device=device).cpu()
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 63) < WITHIN * math.sqrt(2 * 63)


def test_no_lag_is_correlated(device):
    z = hos_ext.normal((400_000,), seed=6, dtype=torch.float64, device=device).cpu()
    for lag in (1, 2, 3, 4, 5, 8, 16, 63, 64, 65, 784, 1024):
        pairs = torch.stack([z[lag:] * z[:-lag], (z[lag:] ** 2 - 1) * (z[:-lag] ** 2 - 1)], -1)
        assert z_scores(pairs).abs().max() < WITHIN


def test_rows_columns_and_lanes_are_independent(device):
    """Each 4 x 4 block of correlations between the lanes of a counter and of the next one."""
    z = hos_ext.normal((100_000, 8), seed=7, dtype=torch.float64, device=device).cpu()
    row, column = torch.triu_indices(8, 8, 1)
    products = z[:, row] * z[:, column]
    assert z_scores(products).abs().max() < WITHIN


@pytest.mark.parametrize(
    "change", [{"seed": 9}, {"seed": 8 + 2**32}, {"offset": 1}, {"offset": 2**40}, {"stream": 1}]
)
def test_other_seeds_offsets_and_streams_are_independent(device, change):
    place = {"seed": 8, "offset": 0, "stream": 0}
    a = hos_ext.normal((200_000,), dtype=torch.float64, device=device, **place)
    b = hos_ext.normal((200_000,), dtype=torch.float64, device=device, **(place | change))
    pairs = torch.stack([a * b, (a**2 - 1) * (b**2 - 1)], -1).cpu()
    assert z_scores(pairs).abs().max() < WITHIN
    assert not (a == b).any()
    # nor is one a shifted copy of the other
    assert not torch.isin(a[:1000], b).any()


# ------------------------------------------------------------------------------------- any division


@given(
    rows=st.integers(1, 40),
    size=st.integers(1, 90),
    start=st.integers(0, 200),
    uniform=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_range_of_rows_has_the_bits_of_the_whole(
    device, rows, size, start, uniform, dtype, data
):
    draw = hos_ext.uniform if uniform else hos_ext.normal
    whole = draw((start + rows, size), seed=10, offset=3, dtype=dtype, device=device)
    part = draw((rows, size), seed=10, offset=3, first=start, dtype=dtype, device=device)
    assert torch.equal(part, whole[start:])
    row = data.draw(st.integers(0, rows - 1))
    one = draw((1, size), seed=10, offset=3, first=start + row, dtype=dtype, device=device)
    assert torch.equal(one[0], part[row])


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 20), (120,), (1, 120)])
def test_the_shape_only_groups_the_elements(device, shape):
    flat = hos_ext.normal((120,), seed=11, device=device)
    assert torch.equal(hos_ext.normal(shape, seed=11, device=device).flatten(), flat)
    assert torch.equal(hos_ext.normal(torch.Size(shape), seed=11, device=device).flatten(), flat)


def test_first_counts_rows_of_any_shape(device):
    whole = hos_ext.normal((6, 5, 4), seed=11, device=device)
    assert torch.equal(hos_ext.normal((2, 5, 4), seed=11, first=4, device=device), whole[4:])
    assert torch.equal(hos_ext.normal((), seed=11, first=7, device=device), whole.flatten()[7])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_empty_shapes_give_empty_tensors(device, shape):
    assert hos_ext.normal(shape, seed=1, first=3, device=device).shape == shape
    assert hos_ext.uniform(shape, seed=1, first=3, device=device).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_threads_do_not_change_a_bit(name, dtype):
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            draw = getattr(hos_ext, name)
            results.append(draw((257, 785), seed=12, first=1, dtype=dtype))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_seed_and_offset_may_be_tensors(device):
    expected = hos_ext.normal((7,), seed=2**64 - 3, offset=5, device=device)
    for place in ("cpu", device):
        seed = torch.tensor(-3, device=place)  # the same 64 bits
        offset = torch.tensor(5, device=place)
        assert torch.equal(hos_ext.normal((7,), seed=seed, offset=offset, device=device), expected)


def test_defaults_are_those_of_torch():
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            z = hos_ext.normal((3,), seed=1)
            assert z.dtype == dtype
            assert z.device == torch.get_default_device()
            assert hos_ext.uniform((3,), seed=1).dtype == dtype
    finally:
        torch.set_default_dtype(before)


# --------------------------------------------------------------------------- instruction set levels

SCRIPT = """
import json, sys, torch, hos_ext

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
score, diag = torch.randn(2, 3, 4, 91, generator=g)
factor = torch.randn(3, 4, 91, 5, generator=g)
z = torch.randn(4, 91, generator=g)
leaves = [t.requires_grad_() for t in (score, diag, factor)]
out = {"normal": hos_ext.normal((1001,), seed=1, first=3)}
out["wide"] = hos_ext.normal((1001,), seed=1, first=3, dtype=torch.float64)
out["uniform"] = hos_ext.uniform((1001,), seed=1, first=3)
out["ozaki"] = hos_ext.ozaki_step(z, score[0], diag[0], 0.3, seed=1)
out["vr"] = hos_ext.d2sm_vr_loss(*leaves, z, 0.5, reduction="none")
out["grad_factor"] = torch.autograd.grad(out["vr"].sum(), leaves[2])[0]
out["plain"] = hos_ext.d2sm_loss(score[0], diag[0], factor[0], z, 0.5, reduction="none")
out["diagonal"] = hos_ext.d2sm_diag_vr_loss(score, diag, z, 0.5, reduction="none")
out["dsm"] = hos_ext.dsm_loss(score[0], z, 0.5, reduction="none")
out["dense"] = hos_ext.assemble_hessian(diag[0], factor[0])
out["product"] = hos_ext.hessian_matvec(diag[0], factor[0], z)
values = {name: t.flatten().double().tolist() for name, t in out.items()}
json.dump({"level": hos_ext.build_info()["cpu_level"], "values": values}, sys.stdout)
"""


def run_at(level):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"HOS_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    if "HOS_CPU_LEVEL" in run.stderr:
        return None
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_instruction_set_gives_the_same_numbers():
    """Normals to 1e-6, losses and Hessians to rounding; the widest set runs all other tests."""
    baseline, other = run_at("baseline"), run_at("x86_v3")
    assert baseline["level"] == "baseline"
    if other is None:
        pytest.skip("this processor has no x86-64-v3")
    for name, values in other["values"].items():
        expected = torch.tensor(baseline["values"][name], dtype=torch.float64)
        error = (torch.tensor(values, dtype=torch.float64) - expected).abs().max()
        if name in ("normal", "uniform", "ozaki"):
            assert error <= 1e-6 * max(1.0, expected.abs().max().item()), name
        elif name == "wide":
            assert error <= NORMAL_ATOL[torch.float64]
        else:
            assert error <= ROUNDING[torch.float32] * expected.abs().max(), name
