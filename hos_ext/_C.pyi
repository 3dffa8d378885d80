# The native module. Tensors come checked, on one device, with dense rows; every call takes its
# arguments by name, in any order. `queue` says where it runs: (-1, threads) on the CPU, else the
# index of a CUDA device and its stream.
#
#     B, D, r             samples, entries of a sample, columns of a factor
#     score, diag, noise  ([points], B, D)
#     factor              ([points], B, D, r), r or D contiguous in memory
#     sigma, step_size    a float, or float64 values, (B,) (float32 too on the CPU)
#     seed, offset        an int (modulo 2^64), or a 0-d int64 tensor, read on its device
#     kind, curvature     index in losses() and curvatures()
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Queue = tuple[int, int]

# What is known here and asked there. ------------------------------------------------------------

def losses() -> tuple[tuple[str, int, bool, bool, int, int], ...]:
    """In the order of their kinds: name, points, whether it takes diag and factor, and what
    backward needs of a sample, as numbers of (r + 1)^2 and of r + 1 entries. Every loss takes a
    score; one of 3 points also takes a score of the first 2 alone.
    """

def curvatures() -> tuple[str, ...]: ...
def dtypes() -> tuple[str, ...]:
    """Names in torch of the element types. Losses and Hessians take the first two."""

def build_info() -> dict[str, Any]: ...
def cuda_driver_too_old() -> int:
    """0 where CUDA can run; else the driver's version, or -1 without a driver or CUDA kernels."""

def connect(
    *,
    exchange: Any,  # torch.Tensor.__dlpack_c_exchange_api__, or None
    tensor: type[Tensor],
    dtypes: tuple[torch.dtype, ...],  # in the order of dtypes()
    watchers: tuple[Callable[[], Any], ...],  # true: a transform, a mode or tracing is at work
    grad_enabled: Callable[[], bool],
    empty_like: Callable[..., Tensor],
    increment_version: Callable[[Any], None],
    fresh_seed: Callable[[], int],
    threads: Callable[[], int],
) -> None: ...

# Noise. -----------------------------------------------------------------------------------------

def noise(
    *,
    queue: Queue,
    out: Tensor,
    seed: Tensor | int,
    offset: Tensor | int,
    stream: int,
    start: int,  # global index of the first element
    uniform: bool,
) -> None: ...

# Steps. -----------------------------------------------------------------------------------------

def step(
    *,
    queue: Queue,
    step_size: Tensor | float,
    seed: Tensor | int,
    offset: Tensor | int,
    first: int,
    curvature: int,
    score: Tensor,
    diag: Tensor | None,  # None: a Langevin step
    noise: Tensor | None,  # None: drawn
    x: Tensor,
    out: Tensor,
) -> int:
    """0, or 1 + the row whose step size is not positive and finite (never on CUDA)."""

def step_backward(
    *,
    queue: Queue,
    step_size: Tensor | float,
    seed: Tensor | int,
    offset: Tensor | int,
    first: int,
    curvature: int,
    score: Tensor,
    diag: Tensor | None,
    noise: Tensor | None,
    grad: Tensor,
    grad_score: Tensor | None,  # dense; None where it is not wanted
    grad_diag: Tensor | None,
    grad_noise: Tensor | None,
) -> None: ...
def direct_step(
    *,
    x: Tensor,  # (B, *dims), as the others
    score: Tensor,
    diag: Tensor | None,
    noise: Tensor | None,
    out: Tensor | None,
    step_size: Tensor | float,
    seed: Tensor | int | None,  # None: a fresh one
    offset: Tensor | int,
    first: int,
    curvature: int | None,
) -> Tensor | bool | None:
    """The step of unchecked arguments that turn out plain and right: the new state; True where a
    gradient is wanted of (B, D); None for what the checked way must look at.
    """

# Losses. ----------------------------------------------------------------------------------------

def loss(
    *,
    queue: Queue,
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
    saved: Tensor,  # (B, entries by losses())
    loss: Tensor,  # (B,)
    scratch: Tensor | None,  # loss_scratch elements
) -> int:
    """0, or 1 + the sample whose sigma is not positive and finite (never on CUDA)."""

def loss_backward(
    *,
    queue: Queue,
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
    saved: Tensor,
    grad: Tensor,  # (B,), any stride
    grad_score: Tensor,  # dense
    grad_diag: Tensor | None,
    grad_factor: Tensor | None,  # in either memory order
) -> None: ...
def loss_scratch(*, queue: Queue, kind: int, batch: int, size: int, rank: int) -> int: ...
def direct_loss(
    *,
    kind: int,
    score: Tensor,  # ([points], B, *dims), as diag and noise
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
) -> Tensor | bool | None:
    """The losses (B,) of unchecked arguments that turn out plain and right; True and None as for
    `direct_step`.
    """

# Hessians. --------------------------------------------------------------------------------------

def assemble(
    *, queue: Queue, diag: Tensor, factor: Tensor, sign: Tensor | None, out: Tensor
) -> None:
    """Into `out` (B, D, D), whose rows are contiguous."""

def matvec(
    *,
    queue: Queue,
    diag: Tensor,
    factor: Tensor,
    sign: Tensor | None,
    out: Tensor,  # (B, D, columns), dense
    v: Tensor,  # the same, any strides
    scratch: Tensor | None,  # matvec_scratch elements
) -> None: ...
def matvec_scratch(*, queue: Queue, batch: int, size: int, rank: int, columns: int) -> int: ...
