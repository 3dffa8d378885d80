"""The operators on flat, checked tensors: the native kernels, their autograd and their fakes.

The only importer of `_C`, whose functions take addresses, sizes and strides. Tensors come as
`(B, D)`, points stacked in a leading axis, factors as `(B, D, r)` in either memory order.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C
from .checks import WIDE, refuse_row
from .doors import LIBRARY, Operator, dense_like, functorch_active, needs_library

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
DSM, DSM_VR, D2SM, D2SM_VR, D2SM_DIAG, D2SM_DIAG_VR = range(6)
POINTS = {DSM: 1, DSM_VR: 2, D2SM: 1, D2SM_VR: 3, D2SM_DIAG: 1, D2SM_DIAG_VR: 3}
LOSS_NAMES = (
    "dsm_loss",
    "dsm_vr_loss",
    "d2sm_loss",
    "d2sm_vr_loss",
    "d2sm_diag_loss",
    "d2sm_diag_vr_loss",
)


# ----------------------------------------------------------------------------- devices and layouts


_CPU, _SEEDS = torch.device("cpu"), 2**63 - 1

_warned: set[str] = set()


def module_info() -> dict[str, Any]:
    """What the native module says of itself."""
    return dict(_C.build_info())


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels serve a device; where not, one warning names the cure."""
    if device.type == "cpu" or device.type == "meta":
        return True
    if device.type == "cuda" and torch.version.hip is None:
        if not _C.build_info()["cuda_built"]:
            cure = "reinstall where nvcc is on PATH (HOS_CUDA=ON makes a missing nvcc an error)"
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


def fresh_seed() -> int:
    """A seed from torch's default generator, outside graphs and transforms."""
    return torch.randint(_SEEDS, (), device=_CPU).item()  # type: ignore[return-value]


def connect(exchange: Any) -> None:
    """Gives the native module what it asks of torch, which it is not linked to.

    `exchange` is DLPack's C interface to tensors, new in torch 2.10; None: by attributes.
    """
    _C.connect(
        exchange,
        Tensor,
        tuple(DTYPES),
        (
            torch._C._are_functorch_transforms_active,
            torch._C._len_torch_dispatch_stack,
            torch._C._get_tracing_state,
        ),
        torch.is_grad_enabled,
        torch.empty_like,
        torch.autograd.graph.increment_version,
        fresh_seed,
        _threads,
    )


connect(getattr(Tensor, "__dlpack_c_exchange_api__", None))


def _queue(t: Tensor) -> tuple[int, int]:
    """Device index (-1: CPU) and thread count or stream, as the native functions take them."""
    if t.is_cpu:
        return -1, _threads()
    stream = torch.cuda.current_stream(t.device)
    return stream.device.index, stream.cuda_stream


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _view(t: Tensor | None, stacked: bool) -> tuple[int, int, int, int, int]:
    """Address and strides (point, batch, row, column) of `([points], B, D[, r])`."""
    if t is None:
        return (0, 0, 0, 0, 0)
    strides = t.stride()
    point = strides[0] if stacked else 0
    batch, *inner = strides[1:] if stacked else strides
    if len(inner) == 2:
        return (t.data_ptr(), point, batch, inner[0], inner[1])
    return (t.data_ptr(), point, batch, 1, 1)


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


def _values(where: str, name: str, value: Tensor | float, rows: int) -> Tensor | float:
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


# ------------------------------------------------------------------------------------------- noise


def _tag(offset: int, stream: int) -> int:
    return offset | stream << 56


def _counter(value: Tensor | int) -> tuple[int, int]:
    """(value, 0), or (0, address) for a tensor that the device reads."""
    if not isinstance(value, Tensor):
        return value, 0
    if value.device.type == "cpu":
        return int(value), 0
    return 0, value.data_ptr()


def _offset(value: Tensor | int) -> tuple[int, int]:
    """The same for an offset, which must leave the byte of the stream alone."""
    number, address = _counter(value)
    if not 0 <= number < 2**56:  # a tensor that could not be read before, in a graph
        raise ValueError(f"offset must be in [0, 2**56), got {number}")
    return number, address


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
    seed_value, seed_address = _counter(seed)
    offset_value, offset_address = _offset(offset)
    start = first * (out.numel() // out.shape[0]) if out.dim() else first
    _C.noise(
        *_queue(out), DTYPES[dtype], uniform, out.numel(), seed_value % 2**64,
        _tag(offset_value, stream), start, seed_address, offset_address, out.data_ptr(),
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


# ------------------------------------------------------------------------------------------- steps


def direct_step(
    x: Tensor,
    score: Tensor,
    diag: Tensor | None,
    noise: Tensor | None,
    out: Tensor | None,
    step_size: Tensor | float,
    seed: Tensor | int | None,
    offset: Tensor | int,
    first: int,
    curvature: int | None,
) -> Tensor | bool | None:
    """A step of plain, contiguous CPU tensors that agree: checked and taken in one native call.

    True where all is so but a gradient is wanted, of (B, D); None for everything else, wrong
    arguments included: that is for the caller to check and explain.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    return _C.direct_step(x, score, diag, noise, out, step_size, seed, offset, first, curvature)


def _step_call(
    where: str,
    x: Tensor,
    step_size: Tensor | float,
    seed: Tensor | int,
    offset: Tensor | int,
    first: int,
    curvature: int,
) -> tuple[Any, ...]:
    """The native arguments that forward and backward share; the third is the step size."""
    seed_value, seed_address = _counter(seed)
    offset_value, offset_address = _offset(offset)
    return (
        *_queue(x), _values(where, "step_size", step_size, x.shape[0]), seed_value, offset_value,
        seed_address, offset_address, first, curvature,
    )  # fmt: skip


def _step_forward(
    x: Tensor,
    score: Tensor,
    diag: Tensor | None,
    noise: Tensor | None,
    step_size: Tensor | float,
    seed: Tensor | int,
    offset: Tensor | int,
    first: int,
    curvature: int,
) -> tuple[Tensor]:
    rest = (offset, first, curvature)
    key = None if noise is not None else seed if isinstance(seed, Tensor) else seed % 2**64
    out = _C.direct_step(x, score, diag, noise, None, step_size, key, *rest)
    if not isinstance(out, Tensor):
        where = "langevin_step" if diag is None else "ozaki_step"
        out = x.new_empty(*x.shape)
        call = _step_call(where, x, step_size, seed, *rest)
        row = _C.step(*call, x, score, diag, noise, out)
        refuse_row(where, "step_size", row, call[2])
    return (out,)


def _step_backward(
    needs: Sequence[bool],
    grad: Tensor,
    x: Tensor,
    score: Tensor,
    diag: Tensor | None,
    noise: Tensor | None,
    step_size: Tensor | float,
    seed: Tensor | int,
    offset: Tensor | int,
    first: int,
    curvature: int,
) -> tuple[Tensor | None, ...]:
    rows, size = x.shape
    grad = grad if grad.stride(-1) == 1 or size <= 1 else grad.contiguous()
    grads = [x.new_empty(rows, size) if n else None for n in needs[1:]]
    if any(needs[1:]):
        call = _step_call("step", x, step_size, seed, offset, first, curvature)
        _C.step_backward(*call, grad, score, diag, noise, *grads)
    return (grad.clone() if needs[0] else None, *grads)


def _step_jvp(tangents: Sequence[Tensor | None], *args: Any) -> Tensor:
    """The step acts entry by entry: its Jacobian is what backward gives for ones."""
    grads = step.call_backward([t is not None for t in tangents], torch.ones_like(args[0]), *args)
    terms = [g * t for g, t in zip(grads, tangents, strict=True) if t is not None]
    return torch.stack(terms).sum(0) if terms else torch.zeros_like(args[0])


def _step_label(args: Sequence[Any]) -> str:
    return "langevin_step" if args[2] is None else "ozaki_step"


def _step_axis(position: int, args: Sequence[Any]) -> int | None:
    if position in (0, 1, 2, 3, 4):
        if position == 3 and args[3] is None:
            raise RuntimeError(
                f"{_step_label(args)}: noise must be given inside vmap, got noise=None (every lane"
                " would draw the same)"
            )
        return 0
    return None


step = Operator(
    "step",
    "Tensor x, Tensor score, Tensor? diag, Tensor? noise, Tensor step_size, Tensor seed,"
    " Tensor offset, SymInt first, int curvature",
    1,
    forward=_step_forward,
    backward=_step_backward,
    jvp=_step_jvp,
    fake=lambda x, *_: (x.new_empty(x.shape),),
    differentiable=(0, 1, 2, 3),
    batch_axis=_step_axis,
    scalars={4: torch.float64, 5: torch.int64, 6: torch.int64},
    label=_step_label,
)


# ------------------------------------------------------------------------------------------ losses


def _loss_forward(
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
) -> tuple[Tensor, Tensor]:
    where, batch = LOSS_NAMES[kind], noise.shape[0]
    rank = 0 if factor is None else factor.shape[-1]
    sigma = _values(where, "sigma", sigma, batch)
    loss, saved = noise.new_empty(batch), noise.new_empty(batch, _C.saved_size(kind, rank))
    queue, scratch = _queue(noise), None
    if queue[0] >= 0:  # on CUDA several blocks may share a sample
        size = noise.shape[1]
        scratch = noise.new_empty(_C.loss_scratch(kind, batch, size, rank))
    args = (*queue, kind, score, diag, factor, noise, sigma, sign, saved, loss, scratch)
    refuse_row(where, "sigma", _C.loss(*args), sigma)
    return loss, saved


def _loss_fake(kind: int, *args: Any) -> tuple[Tensor, Tensor]:
    noise, factor = args[3], args[2]
    columns = 1 + (0 if factor is None else factor.shape[-1])
    grams = {D2SM: 1, D2SM_VR: 2}.get(kind, 0)
    size = grams * columns * columns + (POINTS[kind] * columns if grams else 0)
    return noise.new_empty(noise.shape[0]), noise.new_empty((noise.shape[0], size))


def _loss_backward(
    needs: Sequence[bool], grad: Tensor, kind: int, *rest: Any
) -> tuple[Tensor | None, ...]:
    *tensors, noise, sigma, sign, saved = rest
    sigma = _values(LOSS_NAMES[kind], "sigma", sigma, noise.shape[0])
    grads = [None if t is None else dense_like(t) for t in tensors]
    _C.loss_backward(*_queue(noise), kind, *tensors, noise, sigma, sign, saved, grad, *grads)
    return tuple(grads)


def _loss_jvp(tangents: Sequence[Tensor | None], kind: int, *rest: Any) -> Tensor:
    """The gradients of the per-sample losses, dotted with the tangents."""
    ones = (
        torch.ones_like(rest[3][:, 0]) if rest[3].shape[1] else rest[3].new_zeros(rest[3].shape[0])
    )
    grads = loss.call_backward([t is not None for t in tangents], ones, kind, *rest)
    axis = 1 if POINTS[kind] > 1 else 0
    total = torch.zeros_like(ones)
    for grad, tangent in zip(grads, tangents, strict=True):
        if tangent is not None:
            others = [i for i in range(grad.dim()) if i != axis]
            total = total + (grad * tangent).sum(others)
    return total


def _loss_axis(position: int, args: Sequence[Any]) -> int | None:
    if position in (1, 2, 3):
        return 1 if POINTS[args[0]] > 1 else 0
    return 0 if position in (4, 5, 7) else None


loss = Operator(
    "loss",
    "int kind, Tensor score, Tensor? diag, Tensor? factor, Tensor noise, Tensor sigma,"
    " Tensor? sign",
    2,
    forward=_loss_forward,
    backward=_loss_backward,
    jvp=_loss_jvp,
    fake=_loss_fake,
    differentiable=(1, 2, 3),
    batch_axis=_loss_axis,
    scalars={5: torch.float64},
    label=lambda args: LOSS_NAMES[args[0]],
)

# ----------------------------------------------------------------------------------------- Hessian


def assemble_into(out: Tensor, diag: Tensor, factor: Tensor, sign: Tensor | None) -> Tensor:
    """The matrices written to `out`, whose rows are contiguous."""
    batch, size, rank = factor.shape
    _C.assemble(
        *_queue(diag), DTYPES[diag.dtype], batch, size, rank, _view(diag, False),
        _view(factor, False), _address(sign), out.data_ptr(), out.stride(0), out.stride(1),
    )  # fmt: skip
    return out


def _assemble_forward(diag: Tensor, factor: Tensor, sign: Tensor | None) -> tuple[Tensor]:
    return (assemble_into(diag.new_empty((*diag.shape, diag.shape[1])), diag, factor, sign),)


def writes_into(out: Tensor, *inputs: Tensor | None) -> bool:
    """Whether a kernel may write rows of `out` as things are: no transform at work, no copy."""
    return not (
        needs_library([out, *(t for t in inputs if t is not None)])
        or functorch_active()
        or forward_ad._current_level >= 0
        or out.is_neg()
        or (out.stride(-1) != 1 and out.shape[-1] > 1)
    )


def _weighted(factor: Tensor, sign: Tensor | None) -> Tensor:
    return factor if sign is None else factor * sign


def _assemble_backward(
    needs: Sequence[bool], grad: Tensor, diag: Tensor, factor: Tensor, sign: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_factor = None
    if needs[1]:
        grad_factor = dense_like(factor)
        grad_factor.copy_(torch.matmul(grad + grad.mT, _weighted(factor, sign)))
    return (grad.diagonal(0, -2, -1).clone() if needs[0] else None, grad_factor)


def _assemble_jvp(
    tangents: Sequence[Tensor | None], diag: Tensor, factor: Tensor, sign: Tensor | None
) -> Tensor:
    out = torch.zeros_like(diag).unsqueeze(-1).expand(*diag.shape, diag.shape[-1])
    if tangents[1] is not None:
        half = tangents[1] @ _weighted(factor, sign).mT
        out = out + half + half.mT
    return out if tangents[0] is None else out + torch.diag_embed(tangents[0])


assemble = Operator(
    "assemble_hessian",
    "Tensor diag, Tensor factor, Tensor? sign",
    1,
    forward=_assemble_forward,
    backward=_assemble_backward,
    jvp=_assemble_jvp,
    fake=lambda diag, factor, sign: (diag.new_empty((*diag.shape, diag.shape[-1])),),
    differentiable=(0, 1),
    batch_axis=lambda position, args: None if position == 2 else 0,
    scalars={},
)


def _matvec_forward(diag: Tensor, factor: Tensor, v: Tensor, sign: Tensor | None) -> tuple[Tensor]:
    batch, size, rank = factor.shape
    out = v.new_empty(v.shape)
    queue, scratch = _queue(v), None
    if queue[0] >= 0:
        scratch = v.new_empty(_C.matvec_scratch(batch, size, rank, v.shape[2]))
    _C.matvec(
        *queue, DTYPES[v.dtype], batch, size, rank, v.shape[2], _view(diag, False),
        _view(factor, False), _view(v, False), _address(sign), out.data_ptr(), _address(scratch),
    )  # fmt: skip
    return (out,)


def _matvec_backward(
    needs: Sequence[bool],
    grad: Tensor,
    diag: Tensor,
    factor: Tensor,
    v: Tensor,
    sign: Tensor | None,
) -> tuple[Tensor | None, ...]:
    grad_factor = None
    if needs[1]:
        weighted = _weighted(factor, sign)
        inner = torch.baddbmm(grad @ (v.mT @ weighted), v, grad.mT @ weighted)
        grad_factor = dense_like(factor).copy_(inner)
    return (
        (grad * v).sum(-1) if needs[0] else None,
        grad_factor,
        _matvec_forward(diag, factor, grad, sign)[0] if needs[2] else None,
    )


def _matvec_jvp(
    tangents: Sequence[Tensor | None], diag: Tensor, factor: Tensor, v: Tensor, sign: Tensor | None
) -> Tensor:
    out = torch.zeros_like(v)
    weighted = _weighted(factor, sign)
    if tangents[0] is not None:
        out = out + tangents[0].unsqueeze(-1) * v
    if tangents[1] is not None:
        out = out + tangents[1] @ (weighted.mT @ v) + weighted @ (tangents[1].mT @ v)
    if tangents[2] is not None:
        out = out + diag.unsqueeze(-1) * tangents[2] + factor @ (weighted.mT @ tangents[2])
    return out


matvec = Operator(
    "hessian_matvec",
    "Tensor diag, Tensor factor, Tensor v, Tensor? sign",
    1,
    forward=_matvec_forward,
    backward=_matvec_backward,
    jvp=_matvec_jvp,
    fake=lambda diag, factor, v, sign: (v.new_empty(v.shape),),
    differentiable=(0, 1, 2),
    batch_axis=lambda position, args: None if position == 3 else 0,
    scalars={},
)
