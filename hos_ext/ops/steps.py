"""Langevin and Ozaki steps, noise included, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    FLOATING,
    WIDE,
    check,
    check_first,
    check_positive,
    check_tensor,
    refuse_row,
    show,
)
from ..random import STREAM_STEP, Key, seed_from
from . import _native, reference
from ._checks import check_counter, check_out
from ._operator import Argument, Named, Operator, native_may_judge
from .noise import draw_seed, refuse_shared_noise, signed


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
    generator: torch.Generator | None = None,
) -> Tensor:
    """One Langevin step x + h s + sqrt(2 h) z.

    Args:
        x: the state. Shape (B, *dims). float32, float64, or float16 or bfloat16 in memory with
            float32 arithmetic. Units of the data.
        score: the gradient s of log p at x, as x. Units 1/data.
        step_size: h > 0, a float or (B,). Units data^2. It is half of Eq. 19's eps. Values of a
            CUDA tensor are not checked, because that would synchronise: a bad one gives NaN.
        noise: standard normals z, as x. None draws them.
        seed: key of the drawn noise (see `normal`; it is on stream 0). None draws one from torch's
            default generator.
        offset: number of the draw, such as that of the step. An int or a 0-d int64 tensor; of one
            on the device a captured CUDA graph draws fresh noise at each replay.
        first: global index of row 0.
        out: where to write, as x, and maybe x itself. No gradient then.
        generator: a `torch.Generator` in place of seed, which is drawn from it.

    Returns:
        The new state, as x. It is differentiable in x, score and noise. NaN and inf pass through.

    Raises:
        ValueError: an argument breaks a rule above; the message names it.
        TypeError: an argument is of the wrong kind.
        RuntimeError: inside vmap without `noise`; on a second derivative.

    References:
        Meng et al. 2021, Eq. 19. The plain version is `hos_ext.ops.reference.langevin_step`.

    Example:
        >>> x = torch.zeros(3, 2)
        >>> for k in range(100):  # samples a standard normal, whose score is -x
        ...     x = hos_ext.langevin_step(x, -x, 0.1, seed=1, offset=k)
        >>> x.shape
        torch.Size([3, 2])
    """
    if generator is not None:
        seed = _seed_of("langevin_step", noise, seed, generator)
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
    generator: torch.Generator | None = None,
) -> Tensor:
    """One diagonal Ozaki step x + h phi1(h d) s + sqrt(2 h phi1(2 h d)) z, phi1(y) = (e^y - 1) / y.

    It solves the Langevin equation exactly for the score linearised with the diagonal of the
    Hessian.

    Args:
        x, score, step_size, noise, seed, offset, first, out, generator: as `langevin_step`.
        diag: the diagonal d of the Hessian of log p at x, as x. Units 1/data^2.
        curvature: what becomes of d. "clamp" is min(d, 0), a Langevin step where d > 0; "abs" is
            -|d|; "raw" is d as it is, which may overflow to inf.

    Returns:
        The new state, as x. It is differentiable in x, score, diag and noise. NaN and inf pass
        through.

    Raises:
        ValueError: an argument breaks a rule above; the message names it.
        TypeError: an argument is of the wrong kind.
        RuntimeError: inside vmap without `noise`; on a second derivative.

    References:
        Meng et al. 2021, Eq. 20 with h = eps / 2. The plain version is
        `hos_ext.ops.reference.ozaki_step`.

    Example:
        >>> x, variance = torch.zeros(3, 2), torch.tensor([1.0, 1e-4])
        >>> for k in range(100):  # a step far above the smallest variance stays stable
        ...     score, diag = -x / variance, (-1 / variance).expand(3, 2)
        ...     x = hos_ext.ozaki_step(x, score, diag, 0.1, seed=1, offset=k)
        >>> bool((x.abs() < 10 * variance.sqrt()).all())
        True
    """
    if diag is None:
        raise TypeError("ozaki_step: diag must be a Tensor, got NoneType")
    if generator is not None:
        seed = _seed_of("ozaki_step", noise, seed, generator)
    return _take_step(
        "ozaki_step", x, score, diag, step_size, noise, seed, offset, first, curvature, out
    )


# -------------------------------------------------------------------- from the doors to the kernels


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
    """One native call where all is plain; else checks, and the operator or the plain version."""
    kind = _native.CURVATURES.get(curvature) if isinstance(curvature, str) else None
    # The step, where all is right for it; True where a gradient is wanted as well, of (B, D); None
    # for everything else, wrong arguments included.
    result = None
    if native_may_judge():
        result = _native._C.direct_step(
            x=x, score=score, diag=diag, noise=noise, out=out, step_size=step_size, seed=seed,
            offset=offset, first=first, curvature=kind,
        )  # fmt: skip
        if isinstance(result, Tensor):
            return result
    if not result:
        _check_step_tensors(where, x, score, diag, noise)
    shape = x.shape
    step_size = check_positive(where, "step_size", step_size, shape[0], x)
    if kind is None:
        raise ValueError(f"{where}: curvature must be clamp, abs or raw, got {curvature!r}")
    first = check_first(where, first, shape)
    offset = check_counter(where, "offset", offset, 2**56, x.device)
    seed = _step_seed(where, noise, seed, x.device)
    rest = (step_size, seed, offset, first, kind)
    if result:
        return step_operator.apply(x, score, diag, noise, *rest)[0]  # type: ignore[no-any-return]
    if out is not None:
        inputs = {"x": x, "score": score, "diag": diag, "noise": noise}
        check_out(where, out, x, inputs, shape=tuple(shape))
    if not _native.has_kernels(x.device):
        key = Key(seed, offset, first)
        result = _reference_step(x, score, diag, step_size, noise, key, curvature)
    else:
        flat = [None if t is None else _native.flat_rows(t, 1) for t in (x, score, diag, noise)]
        result = step_operator(*flat, *rest)[0]
        result = result if result.shape == shape else result.view(shape)
    return result if out is None else out.copy_(result)


def _check_step_tensors(
    where: str, x: Tensor, score: Tensor, diag: Tensor | None, noise: Tensor | None
) -> None:
    check_tensor(where, "x", x, dtypes=FLOATING, shape=("B", "*dims"))
    shape = tuple(x.shape)
    for name, value in (("score", score), ("diag", diag), ("noise", noise)):
        if value is not None or name == "score":
            check_tensor(
                where, name, value, like=x, shape=shape, dtypes=FLOATING, because=" like x"
            )


def _seed_of(
    where: str, noise: Tensor | None, seed: Tensor | int | None, generator: torch.Generator
) -> Any:
    """The seed that a generator gives."""
    check(where, noise is None, "generator must be None where noise is given", lambda: show(noise))
    return seed_from(where, seed, generator)


def _step_seed(
    where: str, noise: Tensor | None, seed: Tensor | int | None, device: torch.device
) -> Tensor | int:
    """The seed as an int64, drawn where noise is; 0 where it is given."""
    if noise is not None:
        check(where, seed is None, "seed must be None where noise is given", lambda: show(seed))
        return 0
    if seed is None:
        return draw_seed(where)
    seed = check_counter(where, "seed", seed, 2**64, device)
    return seed if isinstance(seed, Tensor) else signed(seed)


def _reference_step(
    x: Tensor,
    score: Tensor,
    diag: Tensor | None,
    step_size: Tensor | float,
    noise: Tensor | None,
    key: Key,
    curvature: str,
) -> Tensor:
    """The plain-torch step, half precision in float32 arithmetic as in the kernels."""
    wide = x.dtype if x.dtype in WIDE else torch.float32
    if noise is None:
        noise = reference.normal(
            tuple(x.shape),
            seed=int(key.seed) % 2**64,
            offset=int(key.offset),
            first=key.first,
            stream=STREAM_STEP,
            dtype=wide,
            device=x.device,
        )
    x_wide, score, noise = x.to(wide), score.to(wide), noise.to(wide)
    if diag is None:
        return reference.langevin_step(x_wide, score, step_size, noise).to(x.dtype)
    out = reference.ozaki_step(x_wide, score, diag.to(wide), step_size, noise, curvature)
    return out.to(x.dtype)


# ------------------------------------------------------------------ the operator and its derivative


def _forward(
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


def _backward(
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
    needs_x, *needs_kernel = needs
    grad_score, grad_diag, grad_noise = (
        x.new_empty(rows, size) if n else None for n in needs_kernel
    )
    if any(needs_kernel):
        step_size = _native.row_values("step", "step_size", step_size, rows)
        _native._C.step_backward(
            queue=_native.queue_of(x), step_size=step_size, seed=seed, offset=offset, first=first,
            curvature=curvature, score=score, diag=diag, noise=noise, grad=grad,
            grad_score=grad_score, grad_diag=grad_diag, grad_noise=grad_noise,
        )  # fmt: skip
    return (grad.clone() if needs_x else None, grad_score, grad_diag, grad_noise)


def _jvp(tangents: Sequence[Tensor | None], *args: Any) -> Tensor:
    """The step acts entry by entry: its Jacobian is what backward gives for ones."""
    x = args[0]
    needs = [t is not None for t in tangents]
    grads = step_operator.call_backward(needs, torch.ones_like(x), *args)
    terms = [g * t for g, t in zip(grads, tangents, strict=True) if t is not None]
    return torch.stack(terms).sum(0) if terms else torch.zeros_like(x)


def _label(args: Named) -> str:
    return "langevin_step" if args["diag"] is None else "ozaki_step"


def _noise_axis(args: Named) -> int:
    if args["noise"] is None:
        refuse_shared_noise(_label(args))
    return 0


step_operator = Operator(
    "step",
    [
        Argument("x", batch=0, differentiable=True),
        Argument("score", batch=0, differentiable=True),
        Argument("diag", "Tensor?", batch=0, differentiable=True),
        Argument("noise", "Tensor?", batch=_noise_axis, differentiable=True),
        Argument("step_size", batch=0, scalar=torch.float64),
        Argument("seed", scalar=torch.int64),
        Argument("offset", scalar=torch.int64),
        Argument("first", "SymInt"),
        Argument("curvature", "int"),
    ],
    forward=_forward,
    backward=_backward,
    jvp=_jvp,
    fake=lambda x, *_: (x.new_empty(x.shape),),
    label=_label,
)
