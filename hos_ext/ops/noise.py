"""Counter-based noise: the same for any number of threads, chunks and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import FLOATING, check_first, check_int
from ..random import Key, fresh_seed
from . import _native, reference
from ._checks import check_counter
from ._operator import LIBRARY, functorch_active, needs_library, vmap_active

# ------------------------------------------------------------------------------------------- noise


def signed(value: Any) -> Any:
    """A 64-bit pattern as the int64 that holds it."""
    return value if isinstance(value, torch.SymInt) or value < 2**63 else value - 2**64


def draw_noise(
    uniform: bool,
    shape: Sequence[int],
    seed: Tensor | int,
    offset: Tensor | int,
    first: int,
    stream: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.numel() == 0 or out.is_meta:
        return out
    start = first * (out.numel() // out.shape[0]) if out.dim() else first
    _native._C.noise(
        queue=_native.queue_of(out), out=out, seed=seed, offset=offset, stream=stream, start=start,
        uniform=uniform,
    )  # fmt: skip
    return out


LIBRARY.define(
    "noise(bool uniform, SymInt[] shape, Tensor seed, Tensor offset, SymInt first, int stream,"
    " ScalarType dtype, Device device) -> Tensor"
)
LIBRARY.impl("noise", draw_noise, "CompositeExplicitAutograd")


@torch.library.register_fake("hos_ext::noise", lib=LIBRARY)
def _noise_fake(
    uniform: bool,
    shape: Sequence[int],
    seed: Tensor,
    offset: Tensor,
    first: int,
    stream: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------- noise


def seed_or_refuse(where: str) -> Tensor | int:
    """A seed from torch's default generator; a tensor inside a graph."""
    if needs_library([]):
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
    if vmap_active():
        raise RuntimeError(
            f"{where}: noise must be given inside vmap, got noise=None (every lane would draw the"
            " same)"
        )
    if not functorch_active():
        return fresh_seed()
    with torch._C._DisableFuncTorch():
        return fresh_seed()


def _draw(
    where: str,
    uniform: bool,
    shape: Sequence[int],
    seed: Tensor | int,
    offset: Tensor | int,
    first: int,
    stream: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    dtype = dtype or torch.get_default_dtype()
    device = torch.empty(0).device if device is None else torch.device(device)
    if not isinstance(shape, Sequence) or any(
        isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in shape
    ):
        raise TypeError(f"{where}: shape must be a sequence of ints, got {shape!r}")
    shape = tuple(shape)
    if dtype not in FLOATING:
        raise ValueError(f"{where}: dtype must be a floating type, got {dtype}")
    if any(n < 0 for n in shape):
        raise ValueError(f"{where}: shape must not be negative, got {shape}")
    check_counter(where, "seed", seed, 2**64, device)
    check_counter(where, "offset", offset, 2**56, device)
    check_first(where, first, shape)
    check_int(where, "stream", stream, 2**8)
    if needs_library([t for t in (seed, offset) if isinstance(t, Tensor)]) or device.type == "meta":
        seed, offset = (
            v
            if isinstance(v, Tensor)
            else torch.full((), signed(v), dtype=torch.int64, device="cpu")
            for v in (seed, offset)
        )
        return torch.ops.hos_ext.noise(uniform, shape, seed, offset, first, stream, dtype, device)  # type: ignore[no-any-return]
    if not _native.has_kernels(device):
        make = reference.uniform if uniform else reference.normal
        key = int(seed) % 2**64
        counter = {"offset": int(offset), "first": first, "stream": stream}
        return make(shape, seed=key, **counter, dtype=dtype, device=device)
    return draw_noise(uniform, shape, seed, offset, first, stream, dtype, device)


def normal(
    shape: Sequence[int],
    *,
    seed: Tensor | int,
    offset: Tensor | int = 0,
    first: int = 0,
    stream: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals that depend on (seed, offset, stream, element) alone.

    Philox4x32-10 with key `seed` and counter (element // 4, offset, stream), then Box-Muller; any
    range of rows can be drawn by itself, on any number of threads, with the same bits on one kind
    of device and to rounding across devices.

    Args:
        shape: shape of the result; the first axis counts rows.
        seed: 64-bit key, an int or a 0-d int64 tensor.
        offset: 56-bit part of the counter, such as a step; an int or a 0-d int64 tensor.
        first: global index of row 0, so that `normal((n, d), first=k)` is rows k ... k + n.
        stream: 8-bit part of the counter: 0 to 15 are those of this package (the STREAM_ names of
            `ops`: 0 steps, 1 acceptance, 2 posterior samples, 3 training, ...).
        dtype: float32, float64, float16 or bfloat16; torch's default.
        device: torch's default.

    Returns:
        A tensor of `shape`.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.
    """
    return _draw("normal", False, shape, seed, offset, first, stream, dtype, device)


def uniform(
    shape: Sequence[int],
    *,
    seed: Tensor | int,
    offset: Tensor | int = 0,
    first: int = 0,
    stream: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms (k + 1/2) / 2^32 in (0, 1), rounded to dtype (maybe to an end); see `normal`."""
    return _draw("uniform", True, shape, seed, offset, first, stream, dtype, device)


def draw_normal(key: Key, stream: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """`normal` for a key, in the dtype and on the device of a tensor."""
    seed, offset, first = key
    return normal(
        shape,
        seed=seed,
        offset=offset,
        first=first,
        stream=stream,
        dtype=like.dtype,
        device=like.device,
    )


def draw_uniform(key: Key, stream: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """`uniform` for a key, in the dtype and on the device of a tensor."""
    seed, offset, first = key
    return uniform(
        shape,
        seed=seed,
        offset=offset,
        first=first,
        stream=stream,
        dtype=like.dtype,
        device=like.device,
    )
