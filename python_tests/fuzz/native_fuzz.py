"""Calls of the native module with anything at all, made from bytes.

    python python_tests/fuzz/native_fuzz.py --calls 20000 --seed 0     random bytes, no other need
    make fuzz-native                                                   libFuzzer, under sanitizers

`direct_step` and `direct_loss` take unchecked arguments: they must give the right answer, say that
they cannot (None), or raise ValueError, TypeError or RuntimeError. Whatever they do, they may not
read or write outside of what they were given: AddressSanitizer and UBSan watch that, in a module
that Clang has instrumented, whose coverage guides libFuzzer (by atheris) to new paths. The public
operators are called too, with values and gradients, on tensors of odd strides and sizes.

Where a call succeeds its result is compared with the plain-torch reference in float64.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

RECORD = Path(__file__).with_name("native_fuzz.json")
ALLOWED = (ValueError, TypeError, RuntimeError)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ODD_DTYPES = [torch.int64, torch.bool, torch.complex64, torch.uint8]
KINDS = 6


class Bytes:
    """What atheris.FuzzedDataProvider gives, from bytes; nothing left gives zeros."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def pick(self, low: int, high: int) -> int:
        """A whole number of [low, high]."""
        span = high - low + 1
        taken = max(1, (span.bit_length() + 7) // 8)
        raw = self.content[self.at : self.at + taken]
        self.at += taken
        return low + int.from_bytes(raw, "little") % span

    def one_of(self, values: list[Any]) -> Any:
        return values[self.pick(0, len(values) - 1)]

    def chance(self, part: int) -> bool:
        """True once in `part` times."""
        return self.pick(0, part - 1) == part - 1


class Odd(torch.Tensor):
    """A subclass, which the native module must leave to torch."""


class Liar:
    """Says that it is an array, and is none."""

    shape, dtype, ndim = (3, 4), torch.float32, 2

    def __dlpack__(self, **_: object) -> object:
        return object()

    def data_ptr(self) -> int:
        return 0


WILD: list[Any] = [None, True, "x", b"", (), [1.0], 3, -1, 2**63, 2**64, 1e308, math.nan, object()]
WILD += [Liar(), torch.float32, {}, torch.Size([3]), lambda: 0, -0.0, math.inf, 2**200]


def tensor(take: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a shape, by now and then an odd one, with strides of many kinds."""
    if take.chance(12):
        shape = tuple(take.pick(0, 5) for _ in range(take.pick(0, 4)))
    if take.chance(12):
        dtype = take.one_of([*DTYPES, *ODD_DTYPES])
    generator = torch.Generator().manual_seed(take.pick(0, 255))
    if take.chance(30):
        return torch.empty(shape, dtype=dtype, device="meta")
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    form = take.pick(0, 9)
    if form == 1 and len(shape):  # every other row of a larger one
        values = torch.randn((2 * shape[0], *shape[1:]), generator=generator, dtype=torch.float64)
        value = values.to(dtype)[::2]
    elif form == 2 and len(shape) > 1:  # another memory order
        value = values.to(dtype).transpose(-1, -2).contiguous().transpose(-1, -2)
    elif form == 3 and len(shape):  # one row for all
        value = values.to(dtype)[:1].expand(shape) if shape[0] else values.to(dtype)
    elif form == 4:  # a view that does not begin at an aligned address
        flat = torch.randn(values.numel() + 1, generator=generator, dtype=torch.float64).to(dtype)
        value = flat[1:].view(shape)
    elif form == 5 and len(shape) > 1 and shape[-1]:  # columns of a wider one
        wide = torch.randn((*shape[:-1], shape[-1] + 3), generator=generator, dtype=torch.float64)
        value = wide.to(dtype)[..., 1:-2]
    elif form == 6 and dtype.is_floating_point:
        value = torch._neg_view(values.to(dtype))
    else:
        value = values.to(dtype)
    if take.chance(20) and dtype.is_floating_point:
        value = value.detach().requires_grad_()
    if take.chance(40):
        value = value.as_subclass(Odd)
    if take.chance(60) and dtype in (torch.float32, torch.float64) and value.dim():
        value = value.detach().to_sparse()
    return value


def maybe(take: Bytes, value: Any) -> Any:
    """The value, or by now and then something wild."""
    return take.one_of(WILD) if take.chance(24) else value


def size_of(take: Bytes) -> tuple[int, ...]:
    """(B, *dims): mostly small, sometimes longer than a vector register, sometimes empty."""
    batch = take.one_of([1, 2, 3, 5, 0, 8, 17])
    dims = take.one_of([(4,), (1,), (7,), (2, 3), (33,), (0,), (1, 2, 2), (130,), ()])
    return (batch, *dims)


def step_sizes(take: Bytes, batch: int) -> Any:
    """A step size or a sigma: a number, or one a row."""
    values = torch.rand(2 * batch, dtype=torch.float64) + 0.1
    kinds: list[Any] = [0.5, 1, values[:batch], values[::2], values[:batch].float(), values[0:1]]
    kinds += [values[:1].reshape(()) if batch else 0.5, 0.0, -1.0, values[:batch].half(), 1e-30]
    return take.one_of(kinds)


def call_step(take: Bytes) -> None:
    """direct_step with unchecked arguments."""
    from hos_ext.ops import _native

    shape, dtype = size_of(take), take.one_of(DTYPES)
    given = {name: maybe(take, tensor(take, shape, dtype)) for name in ("x", "score")}
    for name in ("diag", "noise", "out"):
        there = take.pick(0, 1)
        given[name] = maybe(take, tensor(take, shape, dtype) if there else None)
    if take.chance(8):
        given["out"] = given[take.one_of(["x", "score", "diag", "noise"])]
    given |= {"step_size": maybe(take, step_sizes(take, shape[0]))}
    given["seed"] = maybe(take, take.one_of([None, 0, 7, 2**64 - 1, torch.tensor(3)]))
    given["offset"] = maybe(take, take.one_of([0, 1, 2**56 - 1, torch.tensor(5)]))
    given["first"] = maybe(take, take.one_of([0, 3, 2**40, 2**63 - 1]))
    given["curvature"] = take.one_of([None, 0, 1, 2])
    _native._C.direct_step(**given)


def call_loss(take: Bytes) -> None:
    """direct_loss with unchecked arguments."""
    from hos_ext.ops import _native

    kind, shape, dtype = take.pick(0, KINDS - 1), size_of(take), take.one_of(DTYPES[:2])
    what = _native.LOSSES[kind]
    rank, size = take.one_of([1, 0, 2, 3, 9, 17]), math.prod(shape[1:])
    lead = (what.points,) if what.points > 1 else ()
    rows = take.one_of([lead, lead, lead, (2,), ()])
    factor = tensor(take, (*lead, shape[0], size, rank), dtype) if take.pick(0, 3) else None
    signs = torch.ones(rank, dtype=dtype)
    given = {
        "kind": kind,
        "score": maybe(take, tensor(take, (*rows, *shape), dtype)),
        "diag": maybe(take, tensor(take, (*lead, *shape), dtype) if take.pick(0, 5) else None),
        "factor": maybe(take, factor),
        "noise": maybe(take, tensor(take, shape, dtype)),
        "sigma": maybe(take, step_sizes(take, shape[0])),
        "sign": maybe(take, take.one_of([None, signs, -signs, signs[:-1]])),
    }
    _native._C.direct_loss(**given)


def call_public(take: Bytes) -> None:
    """A public operator; what it returns is compared with the plain-torch reference."""
    import hos_ext
    from hos_ext import ops
    from hos_ext.ops import reference

    shape, dtype = size_of(take), take.one_of(DTYPES[:2])
    x, score, diag = (tensor(take, shape, dtype) for _ in range(3))
    rank, size = take.one_of([1, 0, 2, 5, 20]), math.prod(shape[1:])
    factor = tensor(take, (shape[0], size, rank), dtype)
    which = take.pick(0, 3)
    if which == 0:
        noise = tensor(take, shape, dtype)
        out = hos_ext.ozaki_step(x, score, diag, 0.3, noise=noise)
        wide = [t.detach().double() for t in (x, score, diag, noise)]
        compare(out, reference.ozaki_step(*wide[:3], 0.3, wide[3], "clamp"))
    elif which == 1:
        out = ops.d2sm_loss(score, diag, factor, x, 0.7, reduction="none")
        wide = [t.detach().double() for t in (score, diag, factor, x)]
        compare(out, ops.d2sm_loss(*wide, 0.7, reduction="none"))
    elif which == 2:
        v = tensor(take, (shape[0], size, take.one_of([1, 2, 7])), dtype)
        out = ops.hessian_matvec(diag, factor, v)
        d, u, w = (t.detach().double() for t in (diag.flatten(1), factor, v))
        compare(out, d.unsqueeze(-1) * w + u @ (u.mT @ w))
    else:
        out = ops.assemble_hessian(diag, factor)
        d, u = diag.detach().double().flatten(1), factor.detach().double()
        compare(out, torch.diag_embed(d) + u @ u.mT)


def compare(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to rounding of float32 sums of a few hundred terms, or of half precision."""
    found = got.detach().double()
    if found.is_meta or expected.is_meta:
        return
    error = (found - expected).abs().max() if found.numel() else 0
    scale = 1 + (expected.abs().max() if expected.numel() else 0)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    most = max(2e-3, 2 * torch.finfo(got.dtype).eps)
    assert error <= most * scale, (float(error), float(scale))


CALLS = (call_step, call_step, call_loss, call_loss, call_public)


def one(content: bytes) -> str:
    """What became of one input: "served", or the name of an error that is allowed."""
    take = Bytes(content)
    call = CALLS[take.pick(0, len(CALLS) - 1)]
    try:
        call(take)
    except ALLOWED as error:
        return type(error).__name__
    return "served"


def run_random(calls: int, seed: int) -> Counter[str]:
    """So many inputs of random bytes."""
    source = random.Random(seed)
    return Counter(one(source.randbytes(96)) for _ in range(calls))


def use_module(path: Path) -> None:
    """Has `hos_ext._C` be this file."""
    spec = importlib.util.spec_from_file_location("hos_ext._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hos_ext._C"] = module
    spec.loader.exec_module(module)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", type=Path, help="an instrumented _C")
    parser.add_argument("--seconds", type=int, help="by libFuzzer, for so long")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz/corpus"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.module:
        use_module(asked.module)
    if not asked.seconds:
        print(json.dumps(run_random(asked.calls, asked.seed)))
        return 0
    import atheris

    asked.corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={asked.seconds}", "-max_len=160", "-len_control=0", "-timeout=60"]
    options += ["-rss_limit_mb=6000", "-print_final_stats=1", f"-seed={asked.seed or 1}"]
    atheris.Setup([sys.argv[0], *options, str(asked.corpus)], lambda content: one(content) and None)
    print(f"libFuzzer, {asked.seconds} s, from {time.strftime('%F %T')}", flush=True)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
