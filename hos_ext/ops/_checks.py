"""What operators ask of their arguments: signs, counters, and memory to write into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import FLOATING, Shape, check, check_first, check_int, check_tensor, show
from . import _native
from ._operator import is_readable


def refuse_grad(where: str, name: str, value: Tensor) -> None:
    """No gradient reaches the argument: asking for one would read as zero."""
    check(where, not value.requires_grad, f"{name} must not require grad", "requires_grad=True")


def check_sign(where: str, sign: Any, rank: int, like: Tensor) -> Tensor | None:
    """`(r,)` of +-1, made contiguous; the values are read on the CPU only, where nothing waits."""
    if sign is None:
        return None
    check_tensor(where, "sign", sign, like=like, shape=(rank,), because=" (one for each column)")
    refuse_grad(where, "sign", sign)
    if sign.device.type == "cpu" and is_readable(sign):
        check(where, bool((sign.abs() == 1).all()), "sign must hold +1 or -1", sign.tolist)
    contiguous: Tensor = sign.resolve_neg().contiguous()
    return contiguous


def check_counter(where: str, name: str, value: Any, limit: int, device: torch.device) -> Any:
    """A seed or offset: an int, or a 0-d int64 tensor on the CPU or on the device."""
    if value.__class__ is int and 0 <= value < limit:
        return value
    if not isinstance(value, Tensor):
        return check_int(where, name, value, limit)
    if value.dtype != torch.int64 or value.dim() != 0 or value.layout is not torch.strided:
        raise ValueError(f"{where}: {name} must be an int or a 0-d int64 tensor, got {show(value)}")
    elif value.device.type != "cpu":
        check(where, value.device == device, f"{name} must be on {device}", value.device)
    elif limit < 2**63 and is_readable(value):
        check_int(where, name, int(value), limit)  # a seed may be any 64 bits
    return value


def check_key(where: str, seed: Any, offset: Any, first: Any, x: Tensor) -> tuple[Any, Any, int]:
    """Where the noise of x begins, looked at whether it is drawn or not; a seed may be None."""
    if seed is not None:
        seed = check_counter(where, "seed", seed, 2**64, x.device)
    offset = check_counter(where, "offset", offset, 2**56, x.device)
    return seed, offset, check_first(where, first, x.shape)


def check_out(
    where: str,
    out: Any,
    x: Tensor,
    inputs: dict[str, Tensor | None],
    *,
    shape: Shape,
    apart: bool = False,
) -> None:
    """`out` is as x, of a shape, needs no gradient, and overlaps an input wholly or not at all.

    `apart`: not at all.
    """
    check_tensor(where, "out", out, like=x, shape=shape, dtypes=FLOATING)
    tracked = any(t is not None and t.requires_grad for t in (out, *inputs.values()))
    allowed = not (tracked and torch.is_grad_enabled())
    check(where, allowed, "out must not be combined with inputs that require grad", "one")
    own = not _native.overlaps_itself(out)
    check(where, own, "out must not overlap itself", lambda: f"strides {out.stride()}")
    if not is_readable(out):
        return  # no addresses to compare: the result is copied into out
    for name, value in inputs.items():
        if value is None:
            continue
        rule = f"out must not overlap {name}"
        if apart:
            check(where, not _native.spans_meet(out, value), rule, "shared memory")
        else:
            got = "memory shared with an offset or other strides"
            check(where, not _native.overlaps_partly(out, value), f"{rule} partly", got)
