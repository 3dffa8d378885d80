"""Langevin and Ozaki steps, noise included, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import FLOATING, WIDE, check_first, check_positive, check_tensor, refuse_row, show
from ..random import STREAM_STEP
from . import _native, reference
from ._checks import check_counter, check_out
from ._operator import Operator
from .noise import seed_or_refuse, signed

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
    return _native._C.direct_step(
        x=x, score=score, diag=diag, noise=noise, out=out, step_size=step_size, seed=seed,
        offset=offset, first=first, curvature=curvature,
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
    key = None if noise is not None else seed if isinstance(seed, Tensor) else seed % 2**64
    out = _native._C.direct_step(
        x=x, score=score, diag=diag, noise=noise, out=None, step_size=step_size, seed=key,
        offset=offset, first=first, curvature=curvature,
    )  # fmt: skip
    if not isinstance(out, Tensor):
        where = "langevin_step" if diag is None else "ozaki_step"
        out = x.new_empty(*x.shape)
        step_size = _native.row_values(where, "step_size", step_size, x.shape[0])
        row = _native._C.step(
            queue=_native.queue_of(x), step_size=step_size, seed=seed, offset=offset, first=first,
            curvature=curvature, score=score, diag=diag, noise=noise, x=x, out=out,
        )  # fmt: skip
        refuse_row(where, "step_size", row, step_size)
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
        step_size = _native.row_values("step", "step_size", step_size, rows)
        _native._C.step_backward(
            queue=_native.queue_of(x), step_size=step_size, seed=seed, offset=offset, first=first,
            curvature=curvature, score=score, diag=diag, noise=noise, grad=grad,
            grad_score=grads[0], grad_diag=grads[1], grad_noise=grads[2],
        )  # fmt: skip
    return (grad.clone() if needs[0] else None, *grads)


def _step_jvp(tangents: Sequence[Tensor | None], *args: Any) -> Tensor:
    """The step acts entry by entry: its Jacobian is what backward gives for ones."""
    grads = step_operator.call_backward(
        [t is not None for t in tangents], torch.ones_like(args[0]), *args
    )
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


step_operator = Operator(
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


# ------------------------------------------------------------------------------------------- steps


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
    kind = _native.CURVATURES.get(curvature) if isinstance(curvature, str) else None
    result = direct_step(x, score, diag, noise, out, step_size, seed, offset, first, kind)
    if isinstance(result, Tensor):
        return result
    if not result:
        _check_step_tensors(where, x, score, diag, noise)
    shape = x.shape
    step_size = check_positive(where, "step_size", step_size, shape[0], x)
    if kind is None:
        raise ValueError(f"{where}: curvature must be clamp, abs or raw, got {curvature!r}")
    check_first(where, first, shape)
    check_counter(where, "offset", offset, 2**56, x.device)
    if noise is not None and seed is not None:
        raise ValueError(f"{where}: seed must be None where noise is given, got {show(seed)}")
    if noise is not None:
        seed = 0
    elif seed is None:
        seed = seed_or_refuse(where)
    else:
        check_counter(where, "seed", seed, 2**64, x.device)
        seed = seed if isinstance(seed, Tensor) else signed(seed)
    rest = (step_size, seed, offset, first, kind)
    if result:
        return step_operator.apply(x, score, diag, noise, *rest)[0]  # type: ignore[no-any-return]
    if out is not None:
        check_out(where, out, x, {"x": x, "score": score, "diag": diag, "noise": noise})
    if not _native.has_kernels(x.device):
        result = _reference_step(x, score, diag, step_size, noise, seed, offset, first, curvature)
    else:
        flat = [None if t is None else _native.flat_rows(t, 1) for t in (x, score, diag, noise)]
        result = step_operator(*flat, *rest)[0]
        result = result if result.shape == shape else result.view(shape)
    return result if out is None else out.copy_(result)


def _check_step_tensors(
    where: str, x: Tensor, score: Tensor, diag: Tensor | None, noise: Tensor | None
) -> None:
    check_tensor(where, "x", x, dtypes=FLOATING)
    if x.dim() < 2:
        raise ValueError(f"{where}: x must have shape (B, *dims), got {tuple(x.shape)}")
    for name, value in (("score", score), ("diag", diag), ("noise", noise)):
        if value is not None or name == "score":
            check_tensor(
                where, name, value, like=x, shape=tuple(x.shape), dtypes=FLOATING, because=" like x"
            )


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
    """The plain-torch step, half precision in float32 arithmetic as in the kernels."""
    wide = x.dtype if x.dtype in WIDE else torch.float32
    if noise is None:
        noise = reference.normal(
            tuple(x.shape),
            seed=int(seed) % 2**64,
            offset=int(offset),
            first=first,
            stream=STREAM_STEP,
            dtype=wide,
            device=x.device,
        )
    x_wide, score, noise = x.to(wide), score.to(wide), noise.to(wide)
    if diag is None:
        return reference.langevin_step(x_wide, score, step_size, noise).to(x.dtype)
    out = reference.ozaki_step(x_wide, score, diag.to(wide), step_size, noise, curvature)
    return out.to(x.dtype)


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
