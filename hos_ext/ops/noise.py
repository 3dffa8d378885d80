"""Counter-based noise: the same for any number of threads, chunks and ranks.

`normal` and `uniform` are public. The rest of the package draws by `draw_normal` and
`draw_uniform`, which take a `Key` and a stream of `random.STREAMS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check, check_first, check_int, device_of, dtype_of
from ..random import Key, fresh_seed, seed_from
from . import _native, reference
from ._checks import check_counter
from ._operator import LIBRARY, functorch_active, needs_library, outside_transforms, vmap_active

_MOST = 2**48  # bytes that a process can address


def normal(
    shape: Sequence[int],
    *,
    seed: Tensor | int | None = None,
    offset: Tensor | int = 0,
    first: int = 0,
    stream: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Standard normals that depend on (seed, offset, stream, element) alone.

    The generator is Philox4x32-10 with the key `seed` and the counter (element // 4, offset,
    stream), followed by Box-Muller. Any range of rows can be drawn by itself, on any number of
    threads. The bits are the same on one kind of device, and agree to rounding between devices.

    Args:
        shape: shape of the result. The first axis counts rows.
        seed: the 64-bit key, an int or a 0-d int64 tensor.
        offset: the number of the draw, such as a step, in [0, 2**56). An int or a 0-d int64 tensor.
        first: global index of row 0, so that `normal((n, d), first=k)` is rows k ... k + n.
        stream: draws on different streams are independent. Streams 0 to 63 belong to this package
            (`hos_ext.random.STREAMS` lists them), those from 64 to 255 to you.
        dtype: float32, float64, float16 or bfloat16; torch's default if None.
        device: torch's default if None.
        generator: a `torch.Generator` in place of seed, which is drawn from it.

    Returns:
        A tensor of `shape`, without units.

    Raises:
        ValueError: an argument is out of its range; the message names it.
        TypeError: an argument is of the wrong kind.

    References:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The plain version is
        `hos_ext.ops.reference.normal`.

    Example:
        >>> z = hos_ext.normal((4, 3), seed=1, stream=64)
        >>> torch.equal(z[2:], hos_ext.normal((2, 3), seed=1, stream=64, first=2))
        True
    """
    dtype, device = _kind("normal", dtype, device)
    seed = seed_from("normal", seed, generator)
    return _draw("normal", False, shape, seed, offset, first, stream, dtype, device)


def uniform(
    shape: Sequence[int],
    *,
    seed: Tensor | int | None = None,
    offset: Tensor | int = 0,
    first: int = 0,
    stream: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Uniforms (k + 1/2) / 2^32, k a 32-bit word, that depend on their counter alone.

    Args:
        shape, seed, offset, first, dtype, device, generator: as for `normal`.
        stream: as for `normal`: 0 to 63 belong to this package, 64 to 255 to you. On one stream
            normals and uniforms come from the same words, so they are not independent.

    Returns:
        A tensor of `shape` with entries in (0, 1). Rounding to dtype may reach an end.

    Raises:
        ValueError: an argument is out of its range; the message names it.
        TypeError: an argument is of the wrong kind.

    References:
        Salmon et al. 2011. The plain version is `hos_ext.ops.reference.uniform`.

    Example:
        >>> u = hos_ext.uniform((1000,), seed=1, stream=64)
        >>> bool((u > 0).all() and (u < 1).all())
        True
    """
    dtype, device = _kind("uniform", dtype, device)
    seed = seed_from("uniform", seed, generator)
    return _draw("uniform", True, shape, seed, offset, first, stream, dtype, device)


def draw_normal(key: Key, stream: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """`normal` for a key, in the dtype and on the device of a tensor."""
    return _draw("normal", False, shape, *key, stream, like.dtype, like.device)


def draw_uniform(key: Key, stream: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """`uniform` for a key, in the dtype and on the device of a tensor."""
    return _draw("uniform", True, shape, *key, stream, like.dtype, like.device)


def draw_seed(where: str) -> Tensor | int:
    """A seed from torch's default generator; a tensor inside a graph.

    Raises:
        RuntimeError: a vmap is at work, all of whose lanes would draw the same.
    """
    if needs_library([]):
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
    if vmap_active():
        refuse_shared_noise(where)
    if not functorch_active():
        return fresh_seed()
    with outside_transforms():
        return fresh_seed()


def refuse_shared_noise(where: str) -> None:
    """Raises for noise that all lanes of a vmap would share."""
    rule = "noise must be given inside vmap, got noise=None (every lane would draw the same)"
    raise RuntimeError(f"{where}: {rule}")


def signed(value: Any) -> Any:
    """A 64-bit pattern as the int64 that holds it."""
    return value if isinstance(value, torch.SymInt) or value < 2**63 else value - 2**64


# --------------------------------------------------------------------- from the doors to the kernel


def _draw(
    where: str,
    uniform: bool,
    shape: Sequence[int],
    seed: Tensor | int,
    offset: Tensor | int,
    first: int,
    stream: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Checks, and goes to the plain version, to torch.library or straight to the kernel."""
    shape = _checked_shape(where, shape)
    seed = check_counter(where, "seed", seed, 2**64, device)
    offset = check_counter(where, "offset", offset, 2**56, device)
    first = check_first(where, first, shape)
    stream = check_int(where, "stream", stream, 2**8)
    if needs_library([t for t in (seed, offset) if isinstance(t, Tensor)]) or device.type == "meta":
        return torch.ops.hos_ext.noise(  # type: ignore[no-any-return]
            uniform, shape, _as_tensor(seed), _as_tensor(offset), first, stream, dtype, device
        )
    if not _native.has_kernels(device):
        draw = reference.uniform if uniform else reference.normal
        key, draw_number = int(seed) % 2**64, int(offset)
        return draw(
            shape, seed=key, offset=draw_number, first=first, stream=stream, dtype=dtype,
            device=device,
        )  # fmt: skip
    return _kernel(uniform, shape, seed, offset, first, stream, dtype, device)


def _kind(where: str, dtype: Any, device: Any) -> tuple[torch.dtype, torch.device]:
    """Of the result, as the user asks for it."""
    return dtype_of(where, "dtype", dtype), device_of(where, "device", device)


def _checked_shape(where: str, shape: Sequence[int]) -> tuple[int, ...]:
    if shape.__class__ is tuple and all(n.__class__ is int and 0 <= n < _MOST for n in shape):
        return shape
    if not isinstance(shape, Sequence) or any(
        isinstance(n, bool) or not isinstance(n, (int, np.integer, torch.SymInt)) for n in shape
    ):
        raise TypeError(f"{where}: shape must be a sequence of ints, got {shape!r}")
    sizes: Any = shape
    shape = tuple(n if isinstance(n, torch.SymInt) else int(n) for n in sizes)  # type: ignore[misc]
    check(where, not any(n < 0 for n in shape), "shape must not be negative", shape)
    if any(n >= _MOST for n in shape):  # no test of the product: it may be symbolic
        raise ValueError(f"{where}: shape must have sizes below 2**48, got {shape}")
    return shape


def _as_tensor(counter: Tensor | int) -> Tensor:
    if isinstance(counter, Tensor):
        return counter
    return torch.full((), signed(counter), dtype=torch.int64, device="cpu")


def _kernel(
    uniform: bool,
    shape: Sequence[int],
    seed: Tensor | int,
    offset: Tensor | int,
    first: int,
    stream: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The native call."""
    counters = isinstance(seed, Tensor) or isinstance(offset, Tensor)
    if functorch_active() and not counters:
        with outside_transforms():  # noise has no derivative; inside it would have no memory
            return _fill(uniform, shape, seed, offset, first, stream, dtype, device)
    return _fill(uniform, shape, seed, offset, first, stream, dtype, device)


def _fill(
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


# Noise has no derivative and no batch, so it is no Operator: torch.library and a shape suffice.
LIBRARY.define(
    "noise(bool uniform, SymInt[] shape, Tensor seed, Tensor offset, SymInt first, int stream,"
    " ScalarType dtype, Device device) -> Tensor"
)
LIBRARY.impl("noise", _kernel, "CompositeExplicitAutograd")


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
