"""Checks of user input: one clear error that names the argument, the rule and what came.

Every public operator checks once, here; the native functions only trust what has been checked.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDE = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
FLOATING = (*WIDE, *HALF)

_DROPOUT = nn.modules.dropout._DropoutNd


def show(value: Any) -> str:
    """What came, for an error message."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} {value.dtype} on {value.device}"
    return repr(value)


def check_tensor(
    where: str,
    name: str,
    value: Any,
    *,
    like: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
    dtypes: Sequence[torch.dtype] = WIDE,
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


def check_positive(where: str, name: str, value: Any, rows: int, like: Tensor) -> Any:
    """A positive finite number, or a floating `()` or `(B,)` tensor without gradient."""
    if value.__class__ is float and 0.0 < value < math.inf:
        return value
    return check_level(where, name, value, rows, like, positive=True)


def check_level(
    where: str, name: str, value: Any, rows: int, like: Tensor, *, positive: bool
) -> Any:
    """The same, or any finite number; the values of a tensor are for the kernels to judge."""
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
    if value.__class__ is not float and (
        isinstance(value, bool) or not isinstance(value, (float, int, torch.SymFloat, torch.SymInt))
    ):
        raise TypeError(f"{where}: {name} must be a float or a Tensor, got {type(value).__name__}")
    if not ((value > 0 if positive else value > -math.inf) and value < math.inf):
        rule = "positive and finite" if positive else "finite"
        raise ValueError(f"{where}: {name} must be {rule}, got {value}")
    return value


def refuse_row(where: str, name: str, row: int, values: Tensor | float) -> None:
    """Raises for what the kernel reported: row - 1 is the sample with a bad value."""
    if row and isinstance(values, Tensor):
        raise ValueError(
            f"{where}: {name} must be positive and finite, got {values[row - 1].item()} for sample"
            f" {row - 1}"
        )


def check_number(where: str, name: str, value: object, *, positive: bool = True) -> float:
    """A finite number, positive or at least not negative; a 0-d tensor counts as a number."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{where}: {name} must be a number, got {kind}")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        rule = "> 0" if positive else ">= 0"
        raise ValueError(f"{where}: {name} must be finite and {rule}, got {number:g}")
    return number


def check_int(where: str, name: str, value: Any, limit: int) -> None:
    if value.__class__ is not int and (
        isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))
    ):
        raise TypeError(f"{where}: {name} must be an int, got {type(value).__name__}")
    if value < 0 or value >= limit:
        raise ValueError(
            f"{where}: {name} must be in [0, 2**{limit.bit_length() - 1}), got {value}"
        )


def check_count(where: str, name: str, value: Any, *, least: int = 1, limit: int = 2**31) -> None:
    """An int of at least `least`, below `limit`."""
    check_int(where, name, value, limit)
    if value < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {value}")


def one_of(where: str, name: str, value: object, known: Iterable[str]) -> str:
    """One of the names that are known."""
    if not isinstance(value, str) or value not in known:
        names = ", ".join(repr(k) for k in known)
        raise ValueError(f"{where}: {name} must be one of {names}, got {value!r}")
    return value


def check_first(where: str, first: Any, shape: Sequence[int]) -> None:
    """The global index of row 0; the index of every element must fit 64 bits."""
    if first.__class__ is int and first == 0:
        return
    rows, size = shape[0] if shape else 1, math.prod(shape[1:])
    check_int(where, "first", first, 2**63)
    if first.__class__ is int and first and (first + rows) * size > 2**64:
        raise ValueError(
            f"{where}: first must leave room for {rows} rows of {size} below 2**64, got {first}"
        )


def per_sample(where: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A float, 0-d or `(B,)` value in like's dtype, shaped to broadcast against `like (B, ...)`.

    A 0-d tensor may lie on the CPU, as everywhere in torch. `like` is float32 or float64.

    Raises:
        TypeError: value is neither a real number nor a Tensor.
        ValueError: its shape, dtype or device does not fit, or it is not finite.
    """
    if isinstance(value, Tensor):
        check_tensor(where, name, value, dtypes=FLOATING)
        if value.dim() > 0 and value.shape != like.shape[:1]:
            want, got = tuple(like.shape[:1]), tuple(value.shape)
            raise ValueError(f"{where}: {name} must be a float or have shape {want}, got {got}")
        if value.device != like.device and not (value.dim() == 0 and value.device.type == "cpu"):
            raise ValueError(f"{where}: {name} must be on {like.device}, got {value.device}")
    elif isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{where}: {name} must be a float or a Tensor, got {type(value).__name__}")
    column = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if not bool(column.isfinite().all()):
        worst = column[~column.isfinite()].flatten()[0].item()
        raise ValueError(f"{where}: {name} must be finite, got {worst}")
    return column if column.dim() == 0 else column.reshape(-1, *[1] * (like.dim() - 1))


def positive(where: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A positive float, 0-d or (B,) value in like's dtype, shaped to broadcast against it."""
    column = per_sample(where, name, value, like)
    if not bool((column > 0).all()):
        worst = column[~(column > 0)].flatten()[0].item()
        raise ValueError(f"{where}: {name} must be positive, got {worst}")
    return column


def check_samples(where: str, name: str, x: Tensor) -> None:
    """Refuse what cannot be flattened to (B, D)."""
    check_tensor(where, name, x)
    if x.dim() < 2:
        raise ValueError(f"{where}: {name} must have shape (B, *dims), got {tuple(x.shape)}")


def check_like(where: str, name: str, value: Tensor, x: Tensor) -> None:
    """Refuse a value that has not the shape, dtype and device of x, and an x that is no data."""
    check_tensor(where, "x", x)
    check_tensor(where, name, value, like=x, shape=tuple(x.shape))


def refuse_half(where: str, x: Tensor) -> None:
    """The second difference of psi is divided by sigma^2, and its rounding errors with it."""
    if x.dtype in HALF:
        raise ValueError(f"{where}: variance reduction needs float32 or float64, got x {x.dtype}")
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) in HALF:
        raise ValueError(
            f"{where}: variance reduction needs float32 or float64, got autocast to "
            f"{torch.get_autocast_dtype(kind)}"
        )


def refuse_dropout(where: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        return
    for path, module in model.named_modules():
        if module.training and isinstance(module, _DROPOUT) and module.p > 0:
            raise ValueError(
                f"{where}: dropout must be off when several points are visited (its masks differ "
                f"between them), got p = {module.p} in {path or type(module).__name__!r}"
            )


def require(where: str, module: str, extra: str = "app") -> Any:
    """An optional dependency, imported; a missing one is named with the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"{where}: {module} must be installed (pip install hos_ext[{extra}]), got: {error}"
        ) from error
