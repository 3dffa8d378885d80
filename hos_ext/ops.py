"""The public operators: each checks its input once, flattens it, and calls `native`.

Devices without a native kernel take the plain-torch path of `reference`, with one warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, reference
from .checks import (
    FLOATING,
    WIDE,
    check_counter,
    check_first,
    check_int,
    check_out,
    check_positive,
    check_sign,
    check_tensor,
    show,
)
from .doors import functorch_active, needs_library, vmap_active
from .native import fresh_seed as fresh_seed

# Who draws from which stream of the counter-based noise: no two draws with one key share words.
# `data` and `training` have 16 to 18 and 32 to 34 of their own.
STREAM_STEP, STREAM_ACCEPT, STREAM_POSTERIOR, STREAM_TRAINING = range(4)
STREAM_TIME, STREAM_DIRECTION, STREAM_REVERSE, STREAM_PRIOR = range(4, 8)
STREAM_PROBE, STREAM_START, STREAM_ADJOINT, STREAM_REPORT = range(8, 12)

_CURVATURES = {"clamp": 0, "abs": 1, "raw": 2}
_REDUCTIONS = ("mean", "sum", "none")


def build_info() -> dict[str, Any]:
    """What the native module was built with and runs on.

    Returns:
        version, compiler, cpu_level (instruction set in use), openmp, threads, cuda_built (bool),
        cuda_archs and the version of torch.
    """
    info = native.module_info()
    info["threads"] = torch.get_num_threads()
    info["torch"] = torch.__version__
    return info


# ------------------------------------------------------------------------------------------- noise


def _fresh_seed(where: str) -> Tensor | int:
    """A seed from torch's default generator; a tensor inside a graph."""
    if needs_library([]):
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
    if vmap_active():
        raise RuntimeError(
            f"{where}: noise must be given inside vmap, got noise=None (every lane would draw the"
            " same)"
        )
    if not functorch_active():
        return fresh_seed()
    with torch._C._DisableFuncTorch():
        return fresh_seed()


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
    device = torch.empty(0).device if device is None else torch.device(device)
    if not isinstance(shape, Sequence) or any(
        isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in shape
    ):
        raise TypeError(f"{where}: shape must be a sequence of ints, got {shape!r}")
    shape = tuple(shape)
    if dtype not in FLOATING:
        raise ValueError(f"{where}: dtype must be a floating type, got {dtype}")
    if any(n < 0 for n in shape):
        raise ValueError(f"{where}: shape must not be negative, got {shape}")
    check_counter(where, "seed", seed, 2**64, device)
    check_counter(where, "offset", offset, 2**56, device)
    check_first(where, first, shape)
    check_int(where, "stream", stream, 2**8)
    if needs_library([t for t in (seed, offset) if isinstance(t, Tensor)]) or device.type == "meta":
        seed, offset = (
            v
            if isinstance(v, Tensor)
            else torch.full((), native.signed(v), dtype=torch.int64, device="cpu")
            for v in (seed, offset)
        )
        return torch.ops.hos_ext.noise(uniform, shape, seed, offset, first, stream, dtype, device)  # type: ignore[no-any-return]
    if not native.has_kernels(device):
        make = reference.uniform if uniform else reference.normal
        key = int(seed) % 2**64
        counter = {"offset": int(offset), "first": first, "stream": stream}
        return make(shape, seed=key, **counter, dtype=dtype, device=device)
    return native.draw_noise(uniform, shape, seed, offset, first, stream, dtype, device)


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
        stream: 8-bit part of the counter: 0 to 15 are those of this package (the STREAM_ names of
            `ops`: 0 steps, 1 acceptance, 2 posterior samples, 3 training, ...).
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
    """Uniforms (k + 1/2) / 2^32 in (0, 1), rounded to dtype (maybe to an end); see `normal`."""
    return _draw("uniform", True, shape, seed, offset, first, stream, dtype, device)


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
    kind = _CURVATURES.get(curvature) if isinstance(curvature, str) else None
    result = native.direct_step(x, score, diag, noise, out, step_size, seed, offset, first, kind)
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
        seed = _fresh_seed(where)
    else:
        check_counter(where, "seed", seed, 2**64, x.device)
        seed = seed if isinstance(seed, Tensor) else native.signed(seed)
    rest = (step_size, seed, offset, first, kind)
    if result:
        return native.step.apply(x, score, diag, noise, *rest)[0]  # type: ignore[no-any-return]
    if out is not None:
        check_out(where, out, x, {"x": x, "score": score, "diag": diag, "noise": noise})
    if not native.has_kernels(x.device):
        result = _reference_step(x, score, diag, step_size, noise, seed, offset, first, curvature)
    else:
        flat = [None if t is None else native.flat_rows(t, 1) for t in (x, score, diag, noise)]
        result = native.step(*flat, *rest)[0]
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


# ------------------------------------------------------------------------------------------ losses

_REFERENCE: tuple[Callable[..., Tensor], ...] = (
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
    where, points = native.LOSS_NAMES[kind], native.POINTS[kind]
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{where}: reduction must be mean, sum or none, got {reduction!r}")
    score, diag, factor, noise, sign = _under_autocast(
        where, points, score, diag, factor, noise, sign
    )
    check_tensor(where, "noise", noise)
    if noise.dim() < 2:
        raise ValueError(f"{where}: noise must have shape (B, *dims), got {tuple(noise.shape)}")
    if noise.requires_grad:
        raise ValueError(f"{where}: noise must not require grad, got requires_grad=True")
    shape = tuple(noise.shape)
    batch, size = shape[0], math.prod(shape[1:])
    stack = (points,) if points > 1 else ()
    check_tensor(where, "score", score, like=noise, because=" like noise")
    allowed = [(p, *shape) for p in ((2, 3) if points == 3 else (2,))] if stack else [shape]
    if tuple(score.shape) not in allowed:
        raise ValueError(
            f"{where}: score must have shape {' or '.join(map(str, allowed))}, got"
            f" {tuple(score.shape)}"
        )
    if kind > native.DSM_VR:
        check_tensor(where, "diag", diag, like=noise, shape=(*stack, *shape), because=" like noise")
    if factor is not None:
        check_tensor(where, "factor", factor, like=noise, because=" like noise")
        expected = (*stack, batch, size)
        if factor.dim() != len(expected) + 1 or tuple(factor.shape[:-1]) != expected:
            raise ValueError(
                f"{where}: factor must have shape ({', '.join(map(str, expected))}, r), got"
                f" {tuple(factor.shape)}"
            )
    sign = check_sign(where, sign, 0 if factor is None else factor.shape[-1], noise)
    sigma = check_positive(where, "sigma", sigma, batch, noise)
    lead = len(stack) + 1
    flat = (
        native.flat_rows(score, lead),
        None if diag is None else native.flat_rows(diag, lead),
        None if factor is None else native.flat_factor(factor),
        native.flat_rows(noise, 1),
    )
    if native.has_kernels(noise.device):
        loss = native.loss(kind, *flat, sigma, sign)[0]
    else:
        low_rank = kind in (native.D2SM, native.D2SM_VR)
        given = [t for t in flat if low_rank or t is not None]
        loss = _REFERENCE[kind](*given, sigma, *((sign,) if low_rank else ()))
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
    half = (torch.float16, torch.bfloat16)
    return tuple(t.float() if isinstance(t, Tensor) and t.dtype in half else t for t in tensors)


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
    return _evaluate_loss(native.DSM, score, None, None, noise, sigma, None, reduction)


def dsm_vr_loss(
    score: Tensor, noise: Tensor, sigma: Tensor | float, *, reduction: str = "mean"
) -> Tensor:
    """Variance-reduced denoising score matching, Eq. 3 - (2/sigma) <s(clean), z> - |z|^2/sigma^2.

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
    return _evaluate_loss(native.DSM_VR, score, None, None, noise, sigma, None, reduction)


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
    """Second-order denoising score matching |psi + C|^2 - |C|^2.

    psi = s2 + s s^T, C = (I - z z^T) / sigma^2. Fits s2 = diag(d) + U diag(sign) U^T to the Hessian
    of log p without forming a D x D matrix: O(D r^2) work, O(D r) memory.

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
    return _evaluate_loss(native.D2SM, score, diag, factor, noise, sigma, sign, reduction)


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
    return _evaluate_loss(native.D2SM_VR, score, diag, factor, noise, sigma, sign, reduction)


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
    return _evaluate_loss(native.D2SM_DIAG, score, diag, None, noise, sigma, None, reduction)


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
    return _evaluate_loss(native.D2SM_DIAG_VR, score, diag, None, noise, sigma, None, reduction)


# ----------------------------------------------------------------------------------------- Hessian


def _check_low_rank(
    where: str, diag: Tensor, factor: Tensor | None, sign: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The factor (rank 0 for None) and the sign, checked."""
    check_tensor(where, "diag", diag)
    if diag.dim() != 2:
        raise ValueError(f"{where}: diag must have shape (B, D), got {tuple(diag.shape)}")
    if factor is None:
        factor = diag.new_empty((*diag.shape, 0))
    check_tensor(where, "factor", factor, like=diag, because=" like diag")
    if factor.dim() != 3 or factor.shape[:2] != diag.shape:
        raise ValueError(
            f"{where}: factor must have shape ({diag.shape[0]}, {diag.shape[1]}, r), got"
            f" {tuple(factor.shape)}"
        )
    return factor, check_sign(where, sign, factor.shape[-1], diag)


def assemble_hessian(
    diag: Tensor,
    factor: Tensor | None,
    *,
    sign: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """diag(d) + U diag(sign) U^T as dense matrices: the one place that forms D x D.

    Args:
        diag: d. Shape (B, D); float32 or float64.
        factor: U. Shape (B, D, r), r or D fastest in memory; None for r = 0.
        sign: +-1 for each column, shape (r,), dtype of diag; None means +1.
        out: where to write, shape (B, D, D), apart from the inputs; saves the page faults of a
            fresh result. No gradient then.

    Returns:
        Shape (B, D, D), symmetric; `out` where given. Differentiable in diag and factor.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names it.
        RuntimeError: on a second derivative.

    Reference:
        Meng et al. 2021, section 3.3.  Plain version: reference.assemble_hessian.
    """
    where = "assemble_hessian"
    factor, sign = _check_low_rank(where, diag, factor, sign)
    inputs = {"diag": diag, "factor": factor, "sign": sign}
    if out is not None:
        check_out(where, out, diag, inputs, shape=(*diag.shape, diag.shape[1]), apart=True)
    if not native.has_kernels(diag.device):
        result = reference.assemble_hessian(diag, factor, sign)
        return result if out is None else out.copy_(result)
    args = (native.flat_rows(diag, 1), native.flat_factor(factor), sign)
    if out is None:
        return native.assemble(*args)[0]
    if native.writes_into(out, diag, factor, sign):
        torch.autograd.graph.increment_version(out)  # autograd must see the change in place
        return native.assemble_into(out, *args)
    return out.copy_(native.assemble(*args)[0])


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
    factor, sign = _check_low_rank(where, diag, factor, sign)
    check_tensor(where, "v", v, like=diag, because=" like diag")
    if v.dim() not in (2, 3) or v.shape[:2] != diag.shape:
        raise ValueError(
            f"{where}: v must have shape ({diag.shape[0]}, {diag.shape[1]}[, k]), got"
            f" {tuple(v.shape)}"
        )
    if not native.has_kernels(diag.device):
        return reference.hessian_matvec(diag, factor, v, sign)
    v = v.resolve_neg()  # a lazy minus sign is not in memory
    columns = v.unsqueeze(-1) if v.dim() == 2 else v
    out = native.matvec(native.flat_rows(diag, 1), native.flat_factor(factor), columns, sign)[0]
    return out.squeeze(-1) if v.dim() == 2 else out
