"""The only importer of `_C`: what it knows, devices, layouts.

Tensors come as `(B, D)`, points stacked in a leading axis, factors as `(B, D, r)` in either memory
order.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C as _C
from ..checks import WIDE
from ..random import fresh_seed


class Loss(NamedTuple):
    """What the native module knows of a loss, whose kind is its place in `LOSSES`."""

    name: str
    points: int  # the leading axis of score, diag and factor; without it where this is 1
    has_diag: bool
    has_factor: bool
    saved_matrices: int  # what backward needs of a sample: so many times (r + 1)^2 entries
    saved_columns: int  # and so many times r + 1

    def saved_size(self, rank: int) -> int:
        columns = 1 + rank
        return self.saved_matrices * columns * columns + self.saved_columns * columns


LOSSES = tuple(Loss(*record) for record in _C.losses())
CURVATURES = {name: index for index, name in enumerate(_C.curvatures())}
DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in _C.dtypes())

_warned: set[str] = set()


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels serve a device; where not, one warning names the cure."""
    if device.type == "cpu" or device.type == "meta":
        return True
    if device.type == "cuda" and torch.version.hip is None:
        if not _C.build_info()["cuda_built"]:
            reason = _C.build_info()["cuda_reason"]
            cure = f"it was built without CUDA kernels ({reason}): reinstall where nvcc works "
            cure += "(HOS_CUDA=ON makes it an error if it does not)"
        elif _C.cuda_driver_too_old() == 0:
            return True
        else:
            cure = (
                f"update the CUDA driver ({_C.cuda_driver_too_old()}), older than the runtime here"
            )
    else:
        cure = "no native kernel exists for it: CPU and CUDA have one"
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(
            f"hos_ext: device {device.type} takes the plain-torch path; {cure}", stacklevel=4
        )
    return False


# GNU OpenMP waits for ever in a forked child for the threads of its parent: run serially there.
_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


def _threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def connect(exchange: Any) -> None:
    """Gives the native module what it asks of torch, which it is not linked to.

    `exchange` is DLPack's C interface to tensors, new in torch 2.10; None: by attributes.
    """
    _C.connect(
        exchange=exchange,
        tensor=Tensor,
        dtypes=DTYPES,
        watchers=(
            torch._C._are_functorch_transforms_active,
            torch._C._len_torch_dispatch_stack,
            torch._C._get_tracing_state,
        ),
        grad_enabled=torch.is_grad_enabled,
        empty_like=torch.empty_like,
        increment_version=torch.autograd.graph.increment_version,
        fresh_seed=fresh_seed,
        threads=_threads,
    )


connect(getattr(Tensor, "__dlpack_c_exchange_api__", None))


def queue_of(t: Tensor) -> tuple[int, int]:
    """Device index (-1: CPU) and thread count or stream, as the native functions take them."""
    if t.is_cpu:
        return -1, _threads()
    stream = torch.cuda.current_stream(t.device)
    return stream.device.index, stream.cuda_stream


def flat_rows(t: Tensor, start: int) -> Tensor:
    """`(..., *dims)` as `(..., D)`, each row contiguous; a copy only where no view has that."""
    t = t.resolve_neg()  # a lazy minus sign is not in memory
    if t.dim() != start + 1:
        t = t.reshape(*t.shape[:start], math.prod(t.shape[start:]))
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def flat_factor(factor: Tensor) -> Tensor:
    """A factor in either memory order (r or D fastest) as it is; any other order copied."""
    factor = factor.resolve_neg()
    if factor.stride(-1) == 1 or factor.stride(-2) == 1 or factor.shape[-1] == 0:
        return factor
    return factor.contiguous()


def row_values(where: str, name: str, value: Tensor | float, rows: int) -> Tensor | float:
    """sigma or step_size for the kernel: a number, or one a row, in float64 off the CPU."""
    if value.__class__ is float:
        return value
    if isinstance(value, Tensor) and (value.dim() > 0 or not value.is_cpu):
        if value.is_cpu and value.dtype in WIDE and not value.is_neg():
            return value
        return value.detach().to(torch.float64).resolve_neg().expand(rows).contiguous()
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{where}: {name} must be positive and finite, got {number}")
    return number


def overlaps_itself(t: Tensor) -> bool:
    """Whether two entries share an address."""
    reach = 0
    for stride, n in sorted(zip(t.stride(), t.shape, strict=True)):
        if n > 1 and stride <= reach:
            return t.numel() > 0
        reach += stride * (n - 1)
    return False


def spans_meet(a: Tensor, b: Tensor) -> bool:
    """Whether some byte lies between the first and the last one of both."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    start_a, start_b = a.data_ptr(), b.data_ptr()
    spans = [
        (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()
        for t in (a, b)
    ]
    return start_a + spans[0] > start_b and start_b + spans[1] > start_a


def overlaps_partly(a: Tensor, b: Tensor) -> bool:
    """Whether tensors share memory other than entry by entry."""
    start_a, start_b = a.data_ptr(), b.data_ptr()
    if not spans_meet(a, b) or (start_a == start_b and a.stride() == b.stride()):
        return False
    # Columns of one buffer: equal row strides, rows dense, and apart within the stride.
    row, size = a.stride(0), a.numel() // a.shape[0]
    if a.stride()[0] == b.stride()[0] and a[0].is_contiguous() and b[0].is_contiguous():
        gap = (start_b - start_a) // a.element_size() % max(row, 1)
        return not (gap >= size and row - gap >= size)
    return True


def build_info() -> dict[str, Any]:
    """What the native module was built with and runs on.

    Returns:
        A dict: version, compiler, cpu_level (the instruction set in use), openmp, threads,
        cuda_built (bool), cuda_archs, cuda_reason (why there are no CUDA kernels, as the build
        said; empty where there are), and torch (its version).

    Example:
        >>> hos_ext.build_info()["version"] == hos_ext.__version__
        True
    """
    info = dict(_C.build_info())
    info["threads"] = torch.get_num_threads()
    info["torch"] = torch.__version__
    return info
