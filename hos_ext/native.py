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
from .checks import refuse_row
from .doors import LIBRARY, Operator, dense_like, functorch_active

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


def _queue(t: Tensor) -> tuple[int, int]:
    """Device index (-1: CPU) and thread count or stream, as the native functions take them."""
    if t.is_cpu:
        return -1, 1 if _forked else torch.get_num_threads()
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


def _values(
    where: str, name: str, value: Tensor | float, rows: int, like: Tensor
) -> tuple[float, Tensor | None]:
    """sigma or step_size for the kernel: a number, or one float64 a row on the device."""
    if value.__class__ is float:
        return value, None
    if isinstance(value, Tensor) and (value.dim() > 0 or value.device.type != "cpu"):
        return 0.0, value.detach().to(torch.float64).resolve_neg().expand(rows).contiguous()
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{where}: {name} must be positive and finite, got {number}")
    return number, None


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


def is_direct(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a step may call the kernel as things are: plain, contiguous CPU tensors that agree.

    None wants a gradient, no transform is at work, and out is one of the inputs or apart from them.
    This accepts the common case in a few microseconds; what it refuses is checked and explained.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or functorch_active()
        or forward_ad._current_level >= 0
        or x.__class__ is not Tensor
        or x.dtype not in DTYPES
        or x.dim() < 2
    ):
        return False
    wants_grad = torch.is_grad_enabled()
    shape, dtype = x.shape, x.dtype
    for t in (x, *others):
        if t is not None and not (
            t.__class__ is Tensor
            and t.is_cpu
            and t.dtype is dtype
            and t.shape == shape
            and t.is_contiguous()
            and not t.is_neg()
            and not (wants_grad and t.requires_grad)
        ):
            return False
    out = others[-1]
    if out is None:
        return True
    start, size = out.data_ptr(), out.nbytes
    return all(
        t is None or t is out or not 0 < abs(t.data_ptr() - start) < size for t in (x, *others)
    )


def step_into(
    out: Tensor,
    x: Tensor,
    score: Tensor,
    diag: Tensor | None,
    noise: Tensor | None,
    step_size: Tensor | float,
    seed: Tensor | int,
    offset: Tensor | int,
    first: int,
    curvature: int,
) -> Tensor:
    """A step written to `out`, whose rows are contiguous as those of the inputs are."""
    rows = x.shape[0]
    size = x.numel() // rows if rows else 0
    where = "langevin_step" if diag is None else "ozaki_step"
    h, steps = _values(where, "step_size", step_size, rows, x)
    seed_value, seed_address = _counter(seed)
    offset_value, offset_address = _offset(offset)
    bad = _C.step(
        *_queue(x), DTYPES[x.dtype], rows, size, h, _address(steps), curvature,
        seed_value % 2**64, offset_value, first * size, seed_address, offset_address,
        x.data_ptr(), x.stride()[0], score.data_ptr(), score.stride()[0],
        0 if diag is None else diag.data_ptr(), 0 if diag is None else diag.stride()[0],
        0 if noise is None else noise.data_ptr(), 0 if noise is None else noise.stride()[0],
        out.data_ptr(), out.stride()[0],
    )  # fmt: skip
    if bad:
        refuse_row(where, "step_size", bad, steps)
    return out


def _step_forward(x: Tensor, *args: Any) -> tuple[Tensor]:
    return (step_into(x.new_empty(x.shape), x, *args),)


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
    h, steps = _values("step", "step_size", step_size, rows, x)
    grad = grad if grad.stride(-1) == 1 or size <= 1 else grad.contiguous()
    grads = [x.new_empty((rows, size)) if n else None for n in needs[1:]]
    seed_value, seed_address = _counter(seed)
    offset_value, offset_address = _offset(offset)
    if any(needs[1:]):
        _C.step_backward(
            *_queue(x), DTYPES[x.dtype], rows, size, h, _address(steps), curvature,
            seed_value % 2**64, offset_value, first * size, seed_address, offset_address,
            grad.data_ptr(), grad.stride(0), score.data_ptr(), score.stride(0),
            _address(diag), 0 if diag is None else diag.stride(0),
            _address(noise), 0 if noise is None else noise.stride(0),
            *(_address(g) for g in grads),
        )  # fmt: skip
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


def _loss_call(
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
) -> tuple[tuple[Any, ...], Tensor | None]:
    """The native arguments that forward and backward share; and the tensor of sigmas in them."""
    stacked = POINTS[kind] > 1
    batch, size = noise.shape
    number, sigmas = _values(LOSS_NAMES[kind], "sigma", sigma, batch, noise)
    call = (
        *_queue(noise), DTYPES[noise.dtype], kind, batch, size,
        0 if factor is None else factor.shape[-1], score.shape[0] if stacked else 1,
        _view(score, stacked), _view(diag, stacked), _view(factor, stacked), _view(noise, False),
        number, _address(sigmas), _address(sign),
    )  # fmt: skip
    return call, sigmas


def _loss_forward(kind: int, *args: Any) -> tuple[Tensor, Tensor]:
    noise, factor = args[3], args[2]
    rank = 0 if factor is None else factor.shape[-1]
    call, sigmas = _loss_call(kind, *args)
    loss = noise.new_empty(noise.shape[0])
    saved = noise.new_empty((noise.shape[0], _C.saved_size(kind, rank)))
    row = _C.loss(*call, saved.data_ptr(), loss.data_ptr())
    refuse_row(LOSS_NAMES[kind], "sigma", row, sigmas)
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
    args, saved = rest[:-1], rest[-1]
    score, diag, factor = args[:3]
    call, _sigmas = _loss_call(kind, *args)
    grads = [None if t is None else dense_like(t) for t in (score, diag, factor)]
    _C.loss_backward(
        *call, saved.data_ptr(), grad.data_ptr(), grad.stride(0),
        _address(grads[0]), _address(grads[1]), _view(grads[2], POINTS[kind] > 1),
    )  # fmt: skip
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


def _assemble_forward(diag: Tensor, factor: Tensor, sign: Tensor | None) -> tuple[Tensor]:
    batch, size, rank = factor.shape
    out = diag.new_empty((batch, size, size))
    _C.assemble(
        *_queue(diag), DTYPES[diag.dtype], batch, size, rank, _view(diag, False),
        _view(factor, False), _address(sign), out.data_ptr(), out.stride(0), out.stride(1),
    )  # fmt: skip
    return (out,)


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
    _C.matvec(
        *_queue(v), DTYPES[v.dtype], batch, size, rank, v.shape[2], _view(diag, False),
        _view(factor, False), _view(v, False), _address(sign), out.data_ptr(),
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
