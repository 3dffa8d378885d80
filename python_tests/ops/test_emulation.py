"""The CUDA kernels on the host against the CPU kernels: what a machine without a GPU can check."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch
from conftest import ROUNDING

import hos_ext

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
DTYPES = [torch.float32, torch.float64]
# D below and above a tile, a chunk and what a warp sums; r below and above a span of columns.
SIZES = [0, 1, 2, 3, 31, 32, 33, 100, 784, 3072, 5000]
RANKS = [0, 1, 2, 3, 5, 7, 8, 9, 20, 31, 32, 43, 50, 65, 88, 96, 97, 200]
LAYOUTS = ["r fastest", "D fastest", "slices", "D fastest, slices", "batch inside", "misaligned"]


HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulation.build(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="module")
def module(library):
    return emulation.load(library)


@pytest.mark.parametrize("file", ["losses", "steps", "noise", "hessian"])
def test_the_tests_of_the_operators_pass_on_the_cuda_kernels(library, file):
    """All but those of statistics: they draw too much for a fiber a thread."""
    paths = [*map(str, (HERE, *HERE.parents[:2])), *sys.path]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "emulation", f"{HERE}/test_{file}.py"),
            *("-k", "not stationary and not minimiser and not expected_value and not variance"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "EMULATOR_ORDER": "random"}
        | {"HOS_EMULATED_MODULE": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def layouts(tensors, layout, rank):
    """score, diag, factor, noise in another memory layout, with the same values."""

    def narrow(t, extra):
        wide = torch.full((*t.shape[:-1], t.shape[-1] + extra), torch.nan, dtype=t.dtype)
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]

    def shifted(t):
        flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        return flat.view(t.shape).copy_(t)

    score, diag, factor, noise = tensors
    if layout == "D fastest":
        factor = factor.mT.contiguous().mT
    elif layout == "D fastest, slices":
        factor = narrow(factor.mT.contiguous(), 3).mT
    elif layout == "slices":
        score, diag, factor = (
            narrow(score, 1),
            narrow(diag, 4),
            narrow(factor, 2 if rank % 2 else 4),
        )
    elif layout == "batch inside" and score.dim() == 3:
        score, diag = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (score, diag))
        factor = factor.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "misaligned":
        score, diag, factor, noise = map(shifted, (score, diag, factor, noise))
    return score, diag, factor, noise


def evaluate(name, tensors, sigma, cotangent, **rest):
    leaves = [t.detach().requires_grad_() for t in tensors[:-1]]
    value = getattr(hos_ext, name)(*leaves, tensors[-1], sigma, reduction="none", **rest)
    return [value.detach(), *torch.autograd.grad(value, leaves, cotangent)]


def near(got, wanted, times=1.0):
    for value, expected in zip(got, wanted, strict=True):
        assert value.shape == expected.shape
        assert value.stride() == expected.stride()
        if value.numel():
            error = (value.double() - expected.double()).abs().max()
            assert error <= times * ROUNDING[value.dtype] * expected.double().abs().max()


def second_order(seed, size, rank):
    """One random problem of that size: the batch shrinks as the rest grows."""
    draw = random.Random(seed)
    name = draw.choice(["d2sm_loss", "d2sm_vr_loss", "d2sm_vr_loss"])
    dtype, layout = draw.choice(DTYPES), draw.choice(LAYOUTS)
    batch = 0 if seed % 29 == 28 else draw.choice([1, 2, 3, 70] if size * rank < 300 else [1, 2])
    points = 3 if name == "d2sm_vr_loss" else 1
    stack = (points,) if points > 1 else ()
    scores = (draw.choice([2, 3]),) if points > 1 else ()
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*scores, batch, size), (*stack, batch, size), (*stack, batch, size, rank)]
    tensors = [torch.randn(s, generator=generator, dtype=dtype) for s in (*shapes, (batch, size))]
    tensors[2] /= max(1, size) ** 0.5
    sign = None
    if draw.random() < 0.5:
        sign = (torch.randint(0, 2, (rank,), generator=generator) * 2 - 1).to(dtype)
    cotangent = torch.randn(batch, generator=generator, dtype=dtype)
    sigma = draw.choice([0.7, 0.5 + torch.rand(batch, generator=generator)])
    return name, layouts(tensors, layout, rank), sigma, cotangent, sign


@pytest.mark.parametrize("size", SIZES)
def test_low_rank_losses_are_those_of_the_cpu(module, size):
    for index, rank in enumerate(r for r in RANKS if r * size <= 100_000):
        name, tensors, sigma, cotangent, sign = second_order(size + index, size, rank)
        wanted = evaluate(name, tensors, sigma, cotangent, sign=sign)
        with emulation.emulated(module):
            got = evaluate(name, tensors, sigma, cotangent, sign=sign)
        near(got, wanted)


@pytest.mark.parametrize("size", [*SIZES, 20_000])
@pytest.mark.parametrize("name", ["dsm_loss", "dsm_vr_loss", "d2sm_diag_loss", "d2sm_diag_vr_loss"])
def test_entry_wise_losses_are_those_of_the_cpu(module, name, size):
    points = {"dsm_vr_loss": (2,), "d2sm_diag_vr_loss": (3,)}.get(name, ())
    for seed, layout in enumerate(["r fastest", "slices", "misaligned"]):
        generator = torch.Generator().manual_seed(seed)
        for batch, dtype in ((3, DTYPES[seed % 2]), (40 if size < 100 else 1, DTYPES[1])):
            shape = (*points, batch, size)
            score, diag = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
            noise = torch.randn(batch, size, generator=generator, dtype=dtype)
            score, diag, _, noise = layouts((score, diag, diag.unsqueeze(-1), noise), layout, 1)
            if name == "d2sm_diag_vr_loss" and seed == 1:
                score = score[:2]
            tensors = [score, diag, noise] if "d2sm" in name else [score, noise]
            cotangent = torch.randn(batch, generator=generator, dtype=dtype)
            wanted = evaluate(name, tensors, 0.7, cotangent)
            with emulation.emulated(module):
                got = evaluate(name, tensors, 0.7, cotangent)
            near(got, wanted)


@pytest.mark.parametrize(("batch", "size", "rank"), [(1, 20_000, 5), (2, 5000, 100), (1, 9000, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_that_share_a_sample_give_equal_bits_in_any_order(
    module, monkeypatch, batch, size, rank, dtype
):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, batch, size), (3, batch, size), (3, batch, size, rank), (batch, size)]
    tensors = [torch.randn(s, generator=generator, dtype=dtype) / 10 for s in shapes]
    cotangent = torch.ones(batch, dtype=dtype)
    results = []
    for order in ("", "reverse", "random"):
        monkeypatch.setenv("EMULATOR_ORDER", order)
        with emulation.emulated(module):
            results.append(evaluate("d2sm_vr_loss", tensors, 0.7, cotangent))
    near(results[0], evaluate("d2sm_vr_loss", tensors, 0.7, cotangent))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 5, 20, 50, 130])
def test_matrices_and_products_are_those_of_the_cpu(module, rank, dtype):
    for size, layout in ((1, "rows"), (127, "rows"), (129, "columns"), (300, "columns")):
        generator = torch.Generator().manual_seed(size)
        shapes = [(2, size), (2, size, rank), (2, size, 5)]
        diag, factor, v = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
        factor = factor if layout == "rows" else factor.mT.contiguous().mT
        sign = (torch.arange(rank) % 3 - 1).sign().where(torch.arange(rank) % 3 != 1, 1).to(dtype)

        def both(diag=diag, factor=factor, v=v, sign=sign):
            dense = hos_ext.assemble_hessian(diag, factor, sign=sign)
            products = [hos_ext.hessian_matvec(diag, factor, x, sign=sign) for x in (v, v[..., 0])]
            return [dense, *products]

        wanted = both()
        with emulation.emulated(module):
            got = both()
        near(got, wanted)
        assert torch.equal(got[0], got[0].mT)
