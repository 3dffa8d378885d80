"""The operators: checks, dispatch to the native kernels, autograd, torch.compile.

Every public function checks its input once and then takes one of two doors to the same kernel: a
direct call (or one autograd.Function where a gradient or a torch.func transform is at work), and an
operator registered with torch.library for torch.compile and fake tensors. Devices without a native
kernel take the plain-torch path of `reference`, with one warning. Only this file imports `_C`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, reference
from .doors import LIBRARY, Operator, dense_like, functorch_active, is_plain, needs_library

STREAM_STEP, STREAM_ACCEPT, STREAM_POSTERIOR, STREAM_TRAINING = range(4)

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_WIDE = (torch.float32, torch.float64)
_CURVATURES = {"clamp": 0, "abs": 1, "raw": 2}
_REDUCTIONS = ("mean", "sum", "none")
_DSM, _DSM_VR, _D2SM, _D2SM_VR, _D2SM_DIAG, _D2SM_DIAG_VR = range(6)
_POINTS = {_DSM: 1, _DSM_VR: 2, _D2SM: 1, _D2SM_VR: 3, _D2SM_DIAG: 1, _D2SM_DIAG_VR: 3}


def build_info() -> dict[str, Any]:
    """What the native module was built with and runs on.

    Returns:
        version, compiler, cpu_level (instruction set in use), openmp, threads, cuda_built (bool),
        cuda_archs and the version of torch.
    """
    info = dict(_C.build_info())
    info["threads"] = torch.get_num_threads()
    info["torch"] = torch.__version__
    return info


# ----------------------------------------------------------------------------- devices and layouts


_warned: set[str] = set()


def _native(device: torch.device) -> bool:
    """Whether the kernels serve a device; where not, one warning names the cure."""
    if device.type == "cpu" or device.type == "meta":
        return True
    if device.type == "cuda" and torch.version.hip is None:
        if not _C.build_info()["cuda_built"]:
            cure = "reinstall where nvcc is on PATH (HOS_CUDA=ON makes a missing nvcc an error)"
        elif _C.cuda_driver_too_old() == 0:
            return True
        else:
            cure = f"the CUDA driver ({_C.cuda_driver_too_old()}) is older than the runtime built in: update it"
    else:
        cure = "no native kernel exists for it: CPU and CUDA have one"
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(
            f"hos_ext: device {device.type} takes the plain-torch path; {cure}", stacklevel=4
        )
    return False


def _queue(device: torch.device) -> tuple[int, int]:
    """Device index (-1: CPU) and thread count or stream, as the native functions take them."""
    if device.type == "cpu":
        return -1, torch.get_num_threads()
    stream = torch.cuda.current_stream(device)
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


def _flat(t: Tensor, start: int) -> Tensor:
    """`(..., *dims)` as `(..., D)`, each row contiguous; a copy only where no view has that."""
    if t.dim() != start + 1:
        t = t.reshape(*t.shape[:start], math.prod(t.shape[start:]))
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _flat_factor(factor: Tensor) -> Tensor:
    """A factor in either memory order (r or D fastest) as it is; any other order copied."""
    if factor.stride(-1) == 1 or factor.stride(-2) == 1 or factor.shape[-1] == 0:
        return factor
    return factor.contiguous()


def _values(
    where: str, name: str, value: Tensor | float, rows: int, device: torch.device
) -> tuple[float, Tensor | None]:
    """sigma or step_size for the kernel: a number, or one float64 a row on the device."""
    if isinstance(value, Tensor) and (value.dim() > 0 or value.device.type != "cpu"):
        return 0.0, value.detach().to(torch.float64).expand(rows).contiguous()
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{where}: {name} must be positive and finite, got {number}")
    return number, None


# ------------------------------------------------------------------------------------------ checks


def _show(value: Any) -> str:
    """What came, for an error message."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} {value.dtype} on {value.device}"
    return repr(value)


def _check_tensor(
    where: str,
    name: str,
    value: Any,
    *,
    like: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
    dtypes: Sequence[torch.dtype] = _WIDE,
    because: str = "",
) -> None:
    """A strided tensor of an allowed dtype; as `like` in dtype and device; of a given shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise ValueError(f"{where}: {name} must be strided, got {value.layout}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{where}: {name} must have dtype {allowed}, got {value.dtype}")
    if like is not None and value.dtype != like.dtype:
        raise ValueError(
            f"{where}: {name} must have dtype {like.dtype}{because}, got {value.dtype}"
        )
    if like is not None and value.device != like.device:
        raise ValueError(f"{where}: {name} must be on {like.device}{because}, got {value.device}")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(
            f"{where}: {name} must have shape {shape}{because}, got {tuple(value.shape)}"
        )


def _check_positive(where: str, name: str, value: Any, rows: int, like: Tensor) -> Tensor | float:
    """A positive finite number, or a floating `()` or `(B,)` tensor without gradient."""
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise ValueError(f"{where}: {name} must be floating, got {value.dtype}")
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != rows):
            raise ValueError(
                f"{where}: {name} must be a float or have shape () or ({rows},), got"
                f" {tuple(value.shape)}"
            )
        if value.requires_grad:
            raise ValueError(f"{where}: {name} must not require grad, got requires_grad=True")
        if value.device != like.device and not (value.dim() == 0 and value.device.type == "cpu"):
            raise ValueError(f"{where}: {name} must be on {like.device}, got {value.device}")
        return value
    if isinstance(value, bool) or not isinstance(
        value, float | int | torch.SymFloat | torch.SymInt
    ):
        raise TypeError(f"{where}: {name} must be a float or a Tensor, got {type(value).__name__}")
    if not (value > 0 and value < math.inf):
        raise ValueError(f"{where}: {name} must be positive and finite, got {value}")
    return value


def _refuse_row(where: str, name: str, row: int, values: Tensor | None) -> None:
    """Raises for what the kernel reported: row - 1 is the sample with a bad value."""
    if row and values is not None:
        raise ValueError(
            f"{where}: {name} must be positive and finite, got {values[row - 1].item()} for sample"
            f" {row - 1}"
        )


def _check_sign(where: str, sign: Any, rank: int, like: Tensor) -> None:
    """`(r,)` of +-1; the values are read on the CPU only, where that needs no synchronisation."""
    if sign is None:
        return
    _check_tensor(where, "sign", sign, like=like, shape=(rank,), because=" (one for each column)")
    if sign.requires_grad:
        raise ValueError(f"{where}: sign must not require grad, got requires_grad=True")
    plain = not needs_library([sign]) and not functorch_active()
    if plain and sign.device.type == "cpu" and not bool((sign.abs() == 1).all()):
        raise ValueError(f"{where}: sign must hold +1 or -1, got {sign.tolist()}")


def _check_int(where: str, name: str, value: Any, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{where}: {name} must be an int, got {type(value).__name__}")
    if value < 0 or value >= limit:
        raise ValueError(
            f"{where}: {name} must be in [0, 2**{limit.bit_length() - 1}), got {value}"
        )


def _check_counter(where: str, name: str, value: Any, limit: int, device: torch.device) -> None:
    """A seed or offset: an int, or a 0-d int64 tensor on the CPU or on the device."""
    if not isinstance(value, Tensor):
        _check_int(where, name, value, limit)
    elif value.dtype != torch.int64 or value.dim() != 0:
        raise ValueError(
            f"{where}: {name} must be an int or a 0-d int64 tensor, got {_show(value)}"
        )
    elif value.device.type != "cpu" and value.device != device:
        raise ValueError(f"{where}: {name} must be on {device}, got {value.device}")


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


def _fresh_seed() -> Tensor | int:
    """A seed from torch's default generator; a tensor inside a graph."""
    if torch.compiler.is_compiling():
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    with torch._C._DisableFuncTorch():
        return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))


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
    device = torch.device(device) if device is not None else torch.get_default_device()
    shape = tuple(int(n) for n in shape)
    if dtype not in _DTYPES:
        raise ValueError(f"{where}: dtype must be a floating type, got {dtype}")
    if any(n < 0 for n in shape):
        raise ValueError(f"{where}: shape must not be negative, got {shape}")
    _check_counter(where, "seed", seed, 2**64, device)
    _check_counter(where, "offset", offset, 2**56, device)
    _check_int(where, "first", first, 2**63)
    _check_int(where, "stream", stream, 2**8)
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or device.type == "meta"
    ):
        seed, offset = (
            v if isinstance(v, Tensor) else torch.full((), _signed(v), dtype=torch.int64)
            for v in (seed, offset)
        )
        return torch.ops.hos_ext.noise(uniform, shape, seed, offset, first, stream, dtype, device)  # type: ignore[no-any-return]
    return _noise(uniform, shape, seed, offset, first, stream, dtype, device)


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that holds it."""
    return value if isinstance(value, torch.SymInt) or value < 2**63 else value - 2**64


def _noise(
    uniform: bool,
    shape: Sequence[int],
    seed: Tensor | int,
    offset: Tensor | int,
    first: int,
    stream: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    if not _native(device):
        make = reference.uniform if uniform else reference.normal
        return make(
            tuple(shape),
            seed=int(seed) % 2**64,
            offset=int(offset),
            first=first,
            stream=stream,
            dtype=dtype,
            device=device,
        )
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    seed_value, seed_address = _counter(seed)
    offset_value, offset_address = _counter(offset)
    start = first * (out.numel() // out.shape[0]) if out.dim() else first
    _C.noise(
        *_queue(out.device), _DTYPES[dtype], uniform, out.numel(), seed_value % 2**64,
        _tag(offset_value, stream), start, seed_address, offset_address, out.data_ptr(),
    )  # fmt: skip
    return out


LIBRARY.define(
    "noise(bool uniform, SymInt[] shape, Tensor seed, Tensor offset, SymInt first, int stream,"
    " ScalarType dtype, Device device) -> Tensor"
)
LIBRARY.impl("noise", _noise, "CompositeExplicitAutograd")


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
        stream: 8-bit part of the counter: 0 steps, 1 acceptance, 2 posterior samples, 3 training.
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
    """Uniforms in (0, 1], (k + 1/2) / 2^32 rounded to dtype; arguments as for `normal`."""
    return _draw("uniform", True, shape, seed, offset, first, stream, dtype, device)


# ------------------------------------------------------------------------------------------- steps


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
    out: Tensor | None = None,
) -> tuple[Tensor]:
    rows, size = x.shape
    if out is None:
        out = x.new_empty((rows, size))
    where = "langevin_step" if diag is None else "ozaki_step"
    h, steps = _values(where, "step_size", step_size, rows, x.device)
    seed_value, seed_address = _counter(seed)
    offset_value, offset_address = _counter(offset)
    bad = _C.step(
        *_queue(x.device), _DTYPES[x.dtype], rows, size, h, _address(steps), curvature,
        seed_value % 2**64, offset_value, first * size, seed_address, offset_address,
        x.data_ptr(), x.stride(0), score.data_ptr(), score.stride(0),
        _address(diag), 0 if diag is None else diag.stride(0),
        _address(noise), 0 if noise is None else noise.stride(0), out.data_ptr(), out.stride(0),
    )  # fmt: skip
    _refuse_row(where, "step_size", bad, steps)
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
    h, steps = _values("step", "step_size", step_size, rows, x.device)
    grad = grad if grad.stride(-1) == 1 or size <= 1 else grad.contiguous()
    grads = [x.new_empty((rows, size)) if n else None for n in needs[1:]]
    seed_value, seed_address = _counter(seed)
    offset_value, offset_address = _counter(offset)
    if any(needs[1:]):
        _C.step_backward(
            *_queue(x.device), _DTYPES[x.dtype], rows, size, h, _address(steps), curvature,
            seed_value % 2**64, offset_value, first * size, seed_address, offset_address,
            grad.data_ptr(), grad.stride(0), score.data_ptr(), score.stride(0),
            _address(diag), 0 if diag is None else diag.stride(0),
            _address(noise), 0 if noise is None else noise.stride(0),
            *(_address(g) for g in grads),
        )  # fmt: skip
    return (grad.clone() if needs[0] else None, *grads)


def _step_jvp(tangents: Sequence[Tensor | None], *args: Any) -> Tensor:
    """The step acts entry by entry: its Jacobian is what backward gives for ones."""
    grads = _step.call_backward([t is not None for t in tangents], torch.ones_like(args[0]), *args)
    terms = [g * t for g, t in zip(grads, tangents, strict=True) if t is not None]
    return torch.stack(terms).sum(0) if terms else torch.zeros_like(args[0])


def _step_axis(position: int, args: Sequence[Any]) -> int | None:
    if position in (0, 1, 2, 3, 4):
        if position == 3 and args[3] is None:
            raise RuntimeError(
                "ozaki_step, langevin_step: noise must be given inside vmap, got noise=None (every"
                " lane would draw the same)"
            )
        return 0
    return None


_step = Operator(
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
)


def _check_out(where: str, out: Any, x: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """`out` is as x, needs no gradient, and overlaps an input wholly or not at all."""
    _check_tensor(where, "out", out, like=x, shape=tuple(x.shape), dtypes=tuple(_DTYPES))
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (out, *inputs.values())
    ):
        raise ValueError(
            f"{where}: out must not be combined with inputs that require grad, got one"
        )
    if out.numel() and any(n > 1 and s == 0 for n, s in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"{where}: out must not overlap itself, got strides {out.stride()}")
    for name, value in inputs.items():
        if value is not None and _overlaps_partly(out, value):
            raise ValueError(
                f"{where}: out must not overlap {name} partly, got memory shared with an offset or"
                " other strides"
            )


def _overlaps_partly(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    start_a, start_b = a.data_ptr(), b.data_ptr()
    if start_a == start_b and a.stride() == b.stride():
        return False
    spans = [
        (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()
        for t in (a, b)
    ]
    if start_a + spans[0] <= start_b or start_b + spans[1] <= start_a:
        return False
    # Columns of one buffer: equal row strides, rows dense, and apart within the stride.
    row, size = a.stride(0), a.numel() // a.shape[0]
    if a.stride()[0] == b.stride()[0] and a[0].is_contiguous() and b[0].is_contiguous():
        gap = (start_b - start_a) // a.element_size() % max(row, 1)
        return not (gap >= size and row - gap >= size)
    return True


def _take_step(
    where: str,
    x: Tensor,
    score: Tensor,
    diag: Tensor | None,
    step_size: Tensor | float,
    noise: Tensor | None,
    seed: Tensor | int | None,
    offset: Tensor | int,
    first: int,
    curvature: str,
    out: Tensor | None,
) -> Tensor:
    _check_tensor(where, "x", x, dtypes=tuple(_DTYPES))
    if x.dim() < 2:
        raise ValueError(f"{where}: x must have shape (B, *dims), got {tuple(x.shape)}")
    shape = tuple(x.shape)
    for name, value in (("score", score), ("diag", diag), ("noise", noise)):
        if value is not None:
            _check_tensor(
                where, name, value, like=x, shape=shape, dtypes=tuple(_DTYPES), because=" like x"
            )
    step_size = _check_positive(where, "step_size", step_size, shape[0], x)
    if curvature not in _CURVATURES:
        raise ValueError(f"{where}: curvature must be clamp, abs or raw, got {curvature!r}")
    _check_int(where, "first", first, 2**63)
    _check_counter(where, "offset", offset, 2**56, x.device)
    if noise is not None and seed is not None:
        raise ValueError(f"{where}: seed must be None where noise is given, got {_show(seed)}")
    if noise is not None:
        seed = 0
    elif seed is None:
        seed = _fresh_seed()
    else:
        _check_counter(where, "seed", seed, 2**64, x.device)
        seed = seed if isinstance(seed, Tensor) else _signed(seed)
    inputs = {"x": x, "score": score, "diag": diag, "noise": noise}
    direct = out is not None and not needs_library([x, out]) and not functorch_active()
    if out is not None:
        _check_out(where, out, x, inputs if direct else {})
    if not _native(x.device):
        result = _reference_step(x, score, diag, step_size, noise, seed, offset, first, curvature)
        return result if out is None else out.copy_(result)
    flat = [None if t is None else _flat(t, 1) for t in (x, score, diag, noise)]
    rest = (step_size, seed, offset, first, _CURVATURES[curvature])
    if out is None:
        result = _step(*flat, *rest)[0]
        return result if result.shape == shape else result.view(shape)
    if direct and out.view(shape).is_contiguous():
        _step_forward(*flat, *rest, out.view(flat[0].shape))  # type: ignore[arg-type, union-attr]
        return out
    return out.copy_(_step(*flat, *rest)[0].view(shape))


def _reference_step(
    x: Tensor,
    score: Tensor,
    diag: Tensor | None,
    step_size: Tensor | float,
    noise: Tensor | None,
    seed: Any,
    offset: Any,
    first: int,
    curvature: str,
) -> Tensor:
    if noise is None:
        noise = _noise(False, x.shape, seed, offset, first, STREAM_STEP, x.dtype, x.device)
    if diag is None:
        return reference.langevin_step(x, score, step_size, noise)
    return reference.ozaki_step(x, score, diag, step_size, noise, curvature)


def langevin_step(
    x: Tensor,
    score: Tensor,
    step_size: Tensor | float,
    *,
    noise: Tensor | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int = 0,
    first: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """One Langevin step x + h s + sqrt(2 h) z.

    Args:
        x: state. Shape (B, *dims); float32, float64, or float16/bfloat16 storage with float32
            arithmetic.
        score: gradient of log p at x, as x. Units 1/data.
        step_size: h > 0, a float or (B,), units data^2; h = eps / 2 of Eq. 19. Values of a CUDA
            tensor are not checked (that would synchronise): a bad one gives NaN.
        noise: standard normals as x; drawn when None.
        seed: key of the drawn noise (see `normal`, stream 0); None draws one from torch's default
            generator.
        offset: counter of the drawn noise, such as the number of the step; an int or a 0-d int64
            tensor (on the device: a captured CUDA graph then draws fresh noise at each replay).
        first: global index of row 0.
        out: where to write; may be x itself. No gradient then.

    Returns:
        The new state, as x. Differentiable in x, score and noise. NaN and inf pass through.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names it.
        RuntimeError: inside vmap without `noise`; on a second derivative.

    Reference:
        Meng et al. 2021, Eq. 19.  Plain version: reference.langevin_step.
    """
    return _take_step(
        "langevin_step", x, score, None, step_size, noise, seed, offset, first, "raw", out
    )


def ozaki_step(
    x: Tensor,
    score: Tensor,
    diag: Tensor,
    step_size: Tensor | float,
    *,
    noise: Tensor | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int = 0,
    first: int = 0,
    curvature: str = "clamp",
    out: Tensor | None = None,
) -> Tensor:
    """One diagonal Ozaki step x + h phi1(h d) s + sqrt(2 h phi1(2 h d)) z, phi1(y) = (e^y - 1) / y.

    Solves the Langevin equation exactly for the score linearised with the diagonal of the Hessian.

    Args:
        x, score, step_size, noise, seed, offset, first, out: as for `langevin_step`.
        diag: diagonal of the Hessian of log p at x, as x. Units 1/data^2.
        curvature: what becomes of d: "clamp" min(d, 0), a Langevin step where d > 0; "abs" -|d|;
            "raw" d as it is (may overflow to inf).

    Returns:
        The new state, as x. Differentiable in x, score, diag and noise. NaN and inf pass through.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names it.
        RuntimeError: inside vmap without `noise`; on a second derivative.

    Reference:
        Meng et al. 2021, Eq. 20 with h = eps / 2.  Plain version: reference.ozaki_step.
    """
    if diag is None:
        raise TypeError("ozaki_step: diag must be a Tensor, got NoneType")
    return _take_step(
        "ozaki_step", x, score, diag, step_size, noise, seed, offset, first, curvature, out
    )


# ------------------------------------------------------------------------------------------ losses

_NAMES = (
    "dsm_loss",
    "dsm_vr_loss",
    "d2sm_loss",
    "d2sm_vr_loss",
    "d2sm_diag_loss",
    "d2sm_diag_vr_loss",
)


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
    stacked = _POINTS[kind] > 1
    batch, size = noise.shape
    number, sigmas = _values(_NAMES[kind], "sigma", sigma, batch, noise.device)
    call = (
        *_queue(noise.device), _DTYPES[noise.dtype], kind, batch, size,
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
    _refuse_row(_NAMES[kind], "sigma", row, sigmas)
    return loss, saved


def _loss_fake(kind: int, *args: Any) -> tuple[Tensor, Tensor]:
    noise, factor = args[3], args[2]
    columns = 1 + (0 if factor is None else factor.shape[-1])
    grams = {_D2SM: 1, _D2SM_VR: 2}.get(kind, 0)
    size = grams * columns * columns + (_POINTS[kind] * columns if grams else 0)
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
        _address(grads[0]), _address(grads[1]), _view(grads[2], _POINTS[kind] > 1),
    )  # fmt: skip
    return tuple(grads)


def _loss_jvp(tangents: Sequence[Tensor | None], kind: int, *rest: Any) -> Tensor:
    """The gradients of the per-sample losses, dotted with the tangents."""
    ones = (
        torch.ones_like(rest[3][:, 0]) if rest[3].shape[1] else rest[3].new_zeros(rest[3].shape[0])
    )
    grads = _loss.call_backward([t is not None for t in tangents], ones, kind, *rest)
    axis = 1 if _POINTS[kind] > 1 else 0
    total = torch.zeros_like(ones)
    for grad, tangent in zip(grads, tangents, strict=True):
        if tangent is not None:
            total = total + (grad * tangent).movedim(axis, 0).flatten(1).sum(1)
    return total


def _loss_axis(position: int, args: Sequence[Any]) -> int | None:
    if position in (1, 2, 3):
        return 1 if _POINTS[args[0]] > 1 else 0
    return 0 if position in (4, 5, 7) else None


_loss = Operator(
    "loss",
    "int kind, Tensor score, Tensor? diag, Tensor? factor, Tensor noise, Tensor sigma, Tensor? sign",
    2,
    forward=_loss_forward,
    backward=_loss_backward,
    jvp=_loss_jvp,
    fake=_loss_fake,
    differentiable=(1, 2, 3),
    batch_axis=_loss_axis,
    scalars={5: torch.float64},
)

_REFERENCE_LOSSES = (
    reference.dsm_loss,
    reference.dsm_vr_loss,
    reference.d2sm_loss,
    reference.d2sm_vr_loss,
    reference.d2sm_diag_loss,
    reference.d2sm_diag_vr_loss,
)


def _evaluate_loss(
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
    reduction: str,
) -> Tensor:
    where, points = _NAMES[kind], _POINTS[kind]
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{where}: reduction must be mean, sum or none, got {reduction!r}")
    score, diag, factor, noise, sign = _under_autocast(
        where, points, score, diag, factor, noise, sign
    )
    _check_tensor(where, "noise", noise)
    if noise.dim() < 2:
        raise ValueError(f"{where}: noise must have shape (B, *dims), got {tuple(noise.shape)}")
    if noise.requires_grad:
        raise ValueError(f"{where}: noise must not require grad, got requires_grad=True")
    shape = tuple(noise.shape)
    batch, size = shape[0], math.prod(shape[1:])
    stack = (points,) if points > 1 else ()
    _check_tensor(where, "score", score, like=noise, because=" like noise")
    allowed = [(p, *shape) for p in ((2, 3) if points == 3 else (2,))] if stack else [shape]
    if tuple(score.shape) not in allowed:
        raise ValueError(
            f"{where}: score must have shape {' or '.join(map(str, allowed))}, got {tuple(score.shape)}"
        )
    if kind > _DSM_VR:
        _check_tensor(
            where, "diag", diag, like=noise, shape=(*stack, *shape), because=" like noise"
        )
    if factor is not None:
        _check_tensor(where, "factor", factor, like=noise, because=" like noise")
        expected = (*stack, batch, size)
        if factor.dim() != len(expected) + 1 or tuple(factor.shape[:-1]) != expected:
            raise ValueError(
                f"{where}: factor must have shape ({', '.join(map(str, expected))}, r), got"
                f" {tuple(factor.shape)}"
            )
    _check_sign(where, sign, 0 if factor is None else factor.shape[-1], noise)
    sigma = _check_positive(where, "sigma", sigma, batch, noise)
    lead = len(stack) + 1
    flat = (
        _flat(score, lead),
        None if diag is None else _flat(diag, lead),
        None if factor is None else _flat_factor(factor),
        _flat(noise, 1),
    )
    if _native(noise.device):
        loss = _loss(kind, *flat, sigma, sign)[0]
    else:
        given = [t for t in flat[:3] if t is not None] + [flat[3]]
        extra = () if kind not in (_D2SM, _D2SM_VR) else (sign,)
        if kind in (_D2SM, _D2SM_VR):
            given = list(flat)
        loss = _REFERENCE_LOSSES[kind](*given, sigma, *extra)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _under_autocast(where: str, points: int, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Half precision: float32 for the plain losses under autocast, refused everywhere else."""
    halves = [
        t for t in tensors if isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16)
    ]
    if not halves:
        return tensors
    if points > 1:
        raise ValueError(
            f"{where}: inputs must have dtype float32, float64 (a second difference divided by"
            f" sigma^2 does not survive half precision), got {halves[0].dtype}"
        )
    if not torch.is_autocast_enabled(halves[0].device.type):
        return tensors
    return tuple(
        t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors
    )


def dsm_loss(
    score: Tensor, noise: Tensor, sigma: Tensor | float, *, reduction: str = "mean"
) -> Tensor:
    """Denoising score matching, |s + z / sigma|^2 per sample.

    Args:
        score: s at alpha x + sigma z. Shape (B, *dims); float32 or float64. Units 1/data.
        noise: the standard normal draw z, as score. No gradient.
        sigma: noise standard deviation > 0, a float or (B,), units of the data. Values of a CUDA
            tensor are not checked (that would synchronise): a bad one gives NaN or inf.
        reduction: over the batch: "mean", "sum" or "none" (B,).

    Returns:
        The loss, units 1/data^2: sums over entries, no factor 1/2. Differentiable in score. Under
        autocast, half-precision inputs are computed in float32. NaN and inf pass through.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names it.
        RuntimeError: on a second derivative.

    Reference:
        Meng et al. 2021, Eq. 3.  Plain version: reference.dsm_loss.
    """
    return _evaluate_loss(_DSM, score, None, None, noise, sigma, None, reduction)


def dsm_vr_loss(
    score: Tensor, noise: Tensor, sigma: Tensor | float, *, reduction: str = "mean"
) -> Tensor:
    """Variance-reduced denoising score matching: `dsm_loss` - (2/sigma) <s(clean), z> - |z|^2/sigma^2.

    Args:
        score: s at alpha x + sigma z and at alpha x, stacked. Shape (2, B, *dims).
        noise, sigma, reduction: as for `dsm_loss`.

    Returns:
        The loss, units 1/data^2, without the constant D / sigma^2. Differentiable in score.

    Raises:
        ValueError, TypeError: an argument breaks a rule; half precision is always refused.
        RuntimeError: on a second derivative.

    Reference:
        Meng et al. 2021, Eq. 32.  Plain version: reference.dsm_vr_loss.
    """
    return _evaluate_loss(_DSM_VR, score, None, None, noise, sigma, None, reduction)


def d2sm_loss(
    score: Tensor,
    diag: Tensor,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    *,
    sign: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Second-order denoising score matching |psi + C|^2 - |C|^2, psi = s2 + s s^T, C = (I - z z^T)/sigma^2.

    Fits s2 = diag(d) + U diag(sign) U^T to the Hessian of log p without forming a D x D matrix:
    O(D r^2) work, O(D r) memory.

    Args:
        score: s at alpha x + sigma z. Shape (B, *dims); float32 or float64. Units 1/data.
        diag: d at the same points, as score. Units 1/data^2.
        factor: U. Shape (B, D, r) with D in row-major order of dims, r or D fastest in memory; r
            may be 0, and None means that. Units 1/data.
        noise: the standard normal draw z, as score. No gradient.
        sigma, reduction: as for `dsm_loss`.
        sign: +-1 for each column of U, shape (r,), dtype of score; None means +1.

    Returns:
        The loss, units 1/data^4, per sample a sum over all D x D entries, no factor 1/2, without
        the theta-free |C|^2. Differentiable in score, diag and factor.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names it.
        RuntimeError: on a second derivative.

    Reference:
        Meng et al. 2021, Eq. 13.  Plain version: reference.d2sm_loss.
    """
    return _evaluate_loss(_D2SM, score, diag, factor, noise, sigma, sign, reduction)


def d2sm_vr_loss(
    score: Tensor,
    diag: Tensor,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    *,
    sign: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Antithetic second-order denoising score matching with its control variate.

    (|psi+|^2 + |psi-|^2) / 2 + <C, psi+ + psi- - 2 psi0>, psi+- at alpha x +- sigma z, psi0 at
    alpha x: the expectation of `d2sm_loss`, with gradients whose variance stays bounded as sigma
    goes to 0.

    Args:
        score: s at the three points, stacked in the order +, -, clean. Shape (3, B, *dims), or
            (2, B, *dims) without the clean one: that shifts the value by a theta-free amount of
            zero mean when the score is given.
        diag: d at the three points. Shape (3, B, *dims).
        factor: U at the three points. Shape (3, B, D, r), or None.
        noise: the standard normal draw z. Shape (B, *dims). No gradient.
        sigma, sign, reduction: as for `d2sm_loss`.

    Returns:
        The loss, units 1/data^4: half of Eq. 33. Differentiable in score, diag and factor.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; half precision is always refused.
        RuntimeError: on a second derivative.

    Reference:
        Meng et al. 2021, Eq. 33.  Plain version: reference.d2sm_vr_loss.
    """
    return _evaluate_loss(_D2SM_VR, score, diag, factor, noise, sigma, sign, reduction)


def d2sm_diag_loss(
    score: Tensor,
    diag: Tensor,
    noise: Tensor,
    sigma: Tensor | float,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Second-order denoising score matching of the diagonal alone, |q + c|^2 - |c|^2.

    q = d + s^2, c = (1 - z^2) / sigma^2, entry by entry.

    Args:
        score, diag, noise, sigma, reduction: as for `d2sm_loss`.

    Returns:
        The loss, units 1/data^4, without the theta-free |c|^2. Differentiable in score and diag.

    Raises:
        ValueError, TypeError: an argument breaks a rule; the message names it.
        RuntimeError: on a second derivative.

    Reference:
        Meng et al. 2021, Eq. 17.  Plain version: reference.d2sm_diag_loss.
    """
    return _evaluate_loss(_D2SM_DIAG, score, diag, None, noise, sigma, None, reduction)


def d2sm_diag_vr_loss(
    score: Tensor,
    diag: Tensor,
    noise: Tensor,
    sigma: Tensor | float,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Variance-reduced form of `d2sm_diag_loss`: (|q+|^2 + |q-|^2) / 2 + <c, q+ + q- - 2 q0>.

    Args:
        score: s at +, -, clean, shape (3, B, *dims), or (2, B, *dims) without the clean point.
        diag: d at the three points. Shape (3, B, *dims).
        noise, sigma, reduction: as for `d2sm_vr_loss`.

    Returns:
        The loss, units 1/data^4. Differentiable in score and diag.

    Raises:
        ValueError, TypeError: an argument breaks a rule; half precision is always refused.
        RuntimeError: on a second derivative.

    Reference:
        Meng et al. 2021, Eq. 17 and 33.  Plain version: reference.d2sm_diag_vr_loss.
    """
    return _evaluate_loss(_D2SM_DIAG_VR, score, diag, None, noise, sigma, None, reduction)


# ----------------------------------------------------------------------------------------- Hessian


def _assemble_forward(diag: Tensor, factor: Tensor, sign: Tensor | None) -> tuple[Tensor]:
    batch, size, rank = factor.shape
    out = diag.new_empty((batch, size, size))
    _C.assemble(
        *_queue(diag.device), _DTYPES[diag.dtype], batch, size, rank, _view(diag, False),
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


_assemble = Operator(
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
        *_queue(v.device), _DTYPES[v.dtype], batch, size, rank, v.shape[2], _view(diag, False),
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
    if tangents[0] is not None:
        out = out + tangents[0].unsqueeze(-1) * v
    if tangents[1] is not None:
        weighted = _weighted(factor, sign)
        out = out + tangents[1] @ (weighted.mT @ v) + weighted @ (tangents[1].mT @ v)
    return out if tangents[2] is None else out + _matvec(diag, factor, tangents[2], sign)[0]


_matvec = Operator(
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


def _check_low_rank(where: str, diag: Tensor, factor: Tensor | None, sign: Tensor | None) -> Tensor:
    """The factor after checking; rank 0 for None."""
    _check_tensor(where, "diag", diag)
    if diag.dim() != 2:
        raise ValueError(f"{where}: diag must have shape (B, D), got {tuple(diag.shape)}")
    if factor is None:
        factor = diag.new_empty((*diag.shape, 0))
    _check_tensor(where, "factor", factor, like=diag, because=" like diag")
    if factor.dim() != 3 or factor.shape[:2] != diag.shape:
        raise ValueError(
            f"{where}: factor must have shape ({diag.shape[0]}, {diag.shape[1]}, r), got"
            f" {tuple(factor.shape)}"
        )
    _check_sign(where, sign, factor.shape[-1], diag)
    return factor


def assemble_hessian(diag: Tensor, factor: Tensor | None, *, sign: Tensor | None = None) -> Tensor:
    """diag(d) + U diag(sign) U^T as dense matrices: the one place that forms D x D.

    Args:
        diag: d. Shape (B, D); float32 or float64.
        factor: U. Shape (B, D, r), r or D fastest in memory; None for r = 0.
        sign: +-1 for each column, shape (r,), dtype of diag; None means +1.

    Returns:
        Shape (B, D, D), symmetric. Differentiable in diag and factor.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names it.
        RuntimeError: on a second derivative.

    Reference:
        Meng et al. 2021, section 3.3.  Plain version: reference.assemble_hessian.
    """
    factor = _check_low_rank("assemble_hessian", diag, factor, sign)
    if not _native(diag.device):
        return reference.assemble_hessian(diag, factor, sign)
    return _assemble(_flat(diag, 1), _flat_factor(factor), sign)[0]


def hessian_matvec(
    diag: Tensor, factor: Tensor | None, v: Tensor, *, sign: Tensor | None = None
) -> Tensor:
    """(diag(d) + U diag(sign) U^T) v in O(D r), without the matrix.

    Args:
        diag, factor, sign: as for `assemble_hessian`.
        v: one vector a sample (B, D), or several (B, D, k).

    Returns:
        As v. Differentiable in diag, factor and v.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names it.
        RuntimeError: on a second derivative.

    Reference:
        Meng et al. 2021, section 3.3.  Plain version: reference.hessian_matvec.
    """
    where = "hessian_matvec"
    factor = _check_low_rank(where, diag, factor, sign)
    _check_tensor(where, "v", v, like=diag, because=" like diag")
    if v.dim() not in (2, 3) or v.shape[:2] != diag.shape:
        raise ValueError(
            f"{where}: v must have shape ({diag.shape[0]}, {diag.shape[1]}[, k]), got {tuple(v.shape)}"
        )
    if not _native(diag.device):
        return reference.hessian_matvec(diag, factor, v, sign)
    columns = v.unsqueeze(-1) if v.dim() == 2 else v
    out = _matvec(_flat(diag, 1), _flat_factor(factor), columns, sign)[0]
    return out.squeeze(-1) if v.dim() == 2 else out
