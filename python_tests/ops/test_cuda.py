"""What a GPU alone can show: parity with the CPU, graphs, streams, devices, huge and odd arrays.

The tests of the operators run on CUDA too (the fixture `device`); `test_emulation` runs the same
kernels on the host.
"""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from conftest import NORMAL_ATOL, assert_near

import hos_ext

HAS_GPU = torch.cuda.is_available() and hos_ext.build_info()["cuda_built"]
pytestmark = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU, and hos_ext built with CUDA")
DTYPES = [torch.float32, torch.float64]
LOSSES = {"d2sm_loss": 1, "d2sm_vr_loss": 3}
# (B, D, r): side by side in a warp, one block, several blocks a sample, several spans of columns
SHAPES = [(300, 2, 2), (5, 31, 7), (64, 784, 20), (9, 784, 50), (1, 50_000, 16), (2, 3072, 200)]


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def second_order(points, batch, size, rank, dtype=torch.float32, seed=0):
    """score, diag, factor and noise on the CPU."""
    stack = (points,) if points > 1 else ()
    shapes = [(*stack, batch, size)] * 2 + [(*stack, batch, size, rank), (batch, size)]
    tensors = [randn(*s, seed=seed + k, dtype=dtype) for k, s in enumerate(shapes)]
    tensors[2] /= size**0.5
    return tensors


def evaluate(name, tensors, device="cuda"):
    leaves = [t.to(device).detach().requires_grad_() for t in tensors[:-1]]
    loss = getattr(hos_ext, name)(*leaves, tensors[-1].to(device), 0.7, reduction="none")
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def gibibytes_free():
    return torch.cuda.mem_get_info()[0] / 2**30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_the_cpu(name, shape, dtype):
    tensors = second_order(LOSSES[name], *shape, dtype=dtype)
    for got, wanted in zip(evaluate(name, tensors), evaluate(name, tensors, "cpu"), strict=True):
        assert got.device.type == "cuda"
        assert_near(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 1000, 1_000_000])
@pytest.mark.parametrize("name", ["dsm_loss", "d2sm_diag_loss"])
def test_entry_wise_losses_are_those_of_the_cpu(name, size, dtype):
    tensors = [randn(2, size, seed=k, dtype=dtype) for k in range(3)]
    if name == "dsm_loss":
        del tensors[1]
    for got, wanted in zip(evaluate(name, tensors), evaluate(name, tensors, "cpu"), strict=True):
        assert_near(got, wanted)


@pytest.mark.parametrize("dtype", NORMAL_ATOL)
@pytest.mark.parametrize("shape", [(3, 5), (7, 784), (1000, 1001)])
def test_noise_is_that_of_the_cpu_to_rounding(shape, dtype):
    key = {"seed": 3, "offset": 2**40, "first": 5, "dtype": dtype}
    got, wanted = hos_ext.normal(shape, **key, device="cuda"), hos_ext.normal(shape, **key)
    assert (got.cpu().double() - wanted.double()).abs().max() <= NORMAL_ATOL[dtype]
    uniform = hos_ext.uniform(shape, **key, device="cuda")
    assert torch.equal(uniform.cpu(), hos_ext.uniform(shape, **key))


@pytest.mark.parametrize("dtype", NORMAL_ATOL)
@pytest.mark.parametrize("shape", [(1, 1), (257, 31), (64, 784)])
def test_steps_are_those_of_the_cpu(shape, dtype):
    x, score, diag = (randn(*shape, seed=k).to(dtype) for k in range(3))
    step = {"step_size": 0.3, "seed": 7, "offset": 11}
    wanted = hos_ext.ozaki_step(x, score, diag, **step)
    got = hos_ext.ozaki_step(x.cuda(), score.cuda(), diag.cuda(), **step)
    assert_near(got, wanted, times=2.0)
    assert_near(
        hos_ext.langevin_step(x.cuda(), score.cuda(), **step),
        hos_ext.langevin_step(x, score, **step),
        times=2.0,
    )


@pytest.mark.parametrize("shape", [(2, 5, 0), (3, 129, 20), (1, 784, 50), (2, 300, 100)])
def test_the_hessian_and_its_products_are_those_of_the_cpu(shape):
    batch, size, rank = shape
    diag, factor, v = (randn(batch, size, *n, seed=k) for k, n in enumerate([(), (rank,), (5,)]))
    for layout in (factor, factor.mT.contiguous().mT):
        dense = hos_ext.assemble_hessian(diag.cuda(), layout.cuda())
        assert_near(dense, hos_ext.assemble_hessian(diag, factor))
        assert torch.equal(dense, dense.mT)
        for vectors in (v, v[..., 0]):
            got = hos_ext.hessian_matvec(diag.cuda(), layout.cuda(), vectors.cuda())
            assert_near(got, hos_ext.hessian_matvec(diag, factor, vectors))


# ------------------------------------------------------------------------- repeatable, everywhere


@pytest.mark.parametrize("shape", SHAPES)
def test_two_runs_give_equal_bits(shape):
    tensors = [t.cuda() for t in second_order(3, *shape)]
    first = evaluate("d2sm_vr_loss", tensors)
    for _ in range(3):
        for again, value in zip(evaluate("d2sm_vr_loss", tensors), first, strict=True):
            assert torch.equal(again, value)


def test_two_streams_do_not_disturb_each_other():
    problems = [
        [t.cuda() for t in second_order(3, 1, 20_000, 16, seed=10 * seed)] for seed in range(2)
    ]
    expected = [evaluate("d2sm_vr_loss", tensors) for tensors in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, tensors in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(evaluate("d2sm_vr_loss", tensors))
    torch.cuda.synchronize()
    for index, result in enumerate(results):
        assert all(map(torch.equal, result, expected[index % 2]))


def test_a_launch_is_on_the_current_stream():
    stream = torch.cuda.Stream()
    x = torch.zeros(1 << 20, 4, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(1.0)
        out = hos_ext.langevin_step(x, x, 1e-12, seed=1)
    stream.synchronize()
    assert (out - 1).abs().max() < 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device_computes_and_the_first_stays_current():
    torch.cuda.set_device(0)
    tensors = second_order(3, 5, 784, 20)
    for got, wanted in zip(
        evaluate("d2sm_vr_loss", tensors, "cuda:1"), evaluate("d2sm_vr_loss", tensors), strict=True
    ):
        assert got.device.index == 1
        assert_near(got, wanted.cpu())
    assert torch.cuda.current_device() == 0


def test_misaligned_views_give_the_same_bits():
    """Inputs off by one element take narrower copies, in the same order of sums."""

    def shifted(t):
        return torch.empty(t.numel() + 1, device="cuda")[1:].view(t.shape).copy_(t)

    tensors = [t.cuda() for t in second_order(3, 7, 1000, 20)]
    moved = [shifted(t) for t in tensors]
    assert moved[2].data_ptr() % 16 != 0
    for got, wanted in zip(
        evaluate("d2sm_vr_loss", moved), evaluate("d2sm_vr_loss", tensors), strict=True
    ):
        assert torch.equal(got, wanted)
    x, score, diag = tensors[0]
    step = {"step_size": 0.1, "seed": 1}
    assert torch.equal(
        hos_ext.ozaki_step(shifted(x), shifted(score), shifted(diag), **step),
        hos_ext.ozaki_step(x, score, diag, **step),
    )


@pytest.mark.parametrize("shape", [(0, 784, 20), (3, 0, 2), (0, 2, 2)])
def test_empty_batches_and_samples(shape):
    tensors = second_order(3, *shape)
    loss, *grads = evaluate("d2sm_vr_loss", tensors)
    assert torch.equal(loss.cpu(), torch.zeros(shape[0]))
    assert [tuple(g.shape) for g in grads] == [tuple(t.shape) for t in tensors[:-1]]
    x = torch.empty(shape[:2], device="cuda")
    assert hos_ext.ozaki_step(x, x, x, 0.1, seed=1).shape == x.shape


# ------------------------------------------------------------------------------------------ graphs


def test_replays_of_a_graph_draw_the_noise_of_the_eager_sequence():
    x0, score, diag = (randn(100, 77, seed=k).cuda() for k in range(3))
    offset = torch.zeros((), dtype=torch.int64, device="cuda")
    x = x0.clone()

    def advance():
        hos_ext.ozaki_step(x, score, diag, 0.1, seed=5, offset=offset, out=x)
        offset.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        advance()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()
    x.copy_(x0)
    offset.zero_()
    expected, states = x0, []
    for step in range(4):
        graph.replay()
        states.append(x.clone())
        expected = hos_ext.ozaki_step(expected, score, diag, 0.1, seed=5, offset=step)
        assert torch.equal(states[-1], expected)
    assert not torch.equal(states[1] - states[0], states[2] - states[1])


@pytest.mark.parametrize("shape", [(64, 784, 20), (1, 50_000, 16), (300, 2, 2)])
def test_a_loss_and_its_gradients_can_be_captured(shape):
    tensors = [t.cuda() for t in second_order(3, *shape)]
    other = [t.cuda() for t in second_order(3, *shape, seed=50)]
    static = [t.clone() for t in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        evaluate("d2sm_vr_loss", static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate("d2sm_vr_loss", static)
    for problem in (other, tensors):
        for target, source in zip(static, problem, strict=True):
            target.copy_(source)
        graph.replay()
        for got, wanted in zip(captured, evaluate("d2sm_vr_loss", problem), strict=True):
            assert torch.equal(got, wanted)


def test_compiled_and_autocast_calls_give_the_eager_result():
    tensors = [t.cuda() for t in second_order(3, 6, 784, 20)]
    wanted = hos_ext.d2sm_vr_loss(*tensors, 0.7)
    compiled = torch.compile(hos_ext.d2sm_vr_loss, fullgraph=True)
    assert torch.equal(compiled(*tensors, 0.7), wanted)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(hos_ext.d2sm_vr_loss(*tensors, 0.7), wanted)


# ------------------------------------------------------------------------------------ far and wide


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    """Every part of a huge array is what a small one there gives."""
    rows, size = (1 << 21) + 1, 1024  # 2^31 + 1024 elements
    if gibibytes_free() < 18:
        pytest.skip("needs 18 GiB of GPU memory")
    x = torch.zeros(rows, size, dtype=torch.float16, device="cuda")
    out = hos_ext.langevin_step(x, x, 0.5, seed=1, out=x)
    for first in (0, rows // 2, rows - 3):
        part = torch.zeros(3, size, dtype=torch.float16, device="cuda")
        wanted = hos_ext.langevin_step(part, part, 0.5, seed=1, first=first)
        assert torch.equal(out[first : first + 3], wanted)
    del x, out
    batch, size, rank = 3, 12_000_000, 60  # 2.16 * 10^9 entries of the factor
    factor = torch.full((batch, size, rank), 1e-4, device="cuda")
    diag = torch.zeros(batch, size, device="cuda")
    loss = hos_ext.d2sm_loss(diag, diag, factor, diag, 1.0, reduction="none")
    norm = size * 1e-8
    expected = (rank * norm) ** 2 + 2 * rank * norm
    torch.testing.assert_close(loss.cpu(), torch.full((batch,), expected), rtol=1e-4, atol=0)


def _work_in_child(queue):
    x = torch.ones(3, 5)
    queue.put(hos_ext.langevin_step(x, x, 0.1, seed=1).tolist())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_of_a_process_that_used_the_gpu_computes_on_the_cpu():
    x = torch.ones(3, 5)
    hos_ext.langevin_step(x.cuda(), x.cuda(), 0.1, seed=1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_work_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == hos_ext.langevin_step(x, x, 0.1, seed=1).tolist()
    child.join(60)


def test_shared_memory_of_every_plan_fits_this_gpu():
    """The largest tiles: many columns in either memory order, both kinds of arithmetic."""
    for rank in (32, 43, 44, 87, 88, 95, 96, 97, 255):
        for dtype in DTYPES:
            score, diag, factor, noise = second_order(3, 1, 300, rank, dtype=dtype)
            for layout in (factor, factor.mT.contiguous().mT):
                evaluate("d2sm_vr_loss", [score, diag, layout, noise])
                hos_ext.assemble_hessian(diag[0].cuda(), layout[0].cuda())
    torch.cuda.synchronize()
