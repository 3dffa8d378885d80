"""Denoising score matching of first and second order, without a D x D matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import check_positive, check_tensor, refuse_row
from . import _native, reference
from ._checks import check_sign
from ._operator import Operator, dense_like

DSM, DSM_VR, D2SM, D2SM_VR, D2SM_DIAG, D2SM_DIAG_VR = range(len(_native.LOSSES))


# ------------------------------------------------------------------------------------------ losses


def direct_loss(
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
) -> Tensor | bool | None:
    """The losses (B,) of plain CPU tensors that agree: checked and taken in one native call.

    True where all is so but a gradient is wanted, of (B, D); None for everything else, wrong
    arguments included: that is for the caller to check and explain.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    return _native._C.direct_loss(
        kind=kind, score=score, diag=diag, factor=factor, noise=noise, sigma=sigma, sign=sign
    )


def _loss_forward(
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
) -> tuple[Tensor, Tensor]:
    what, (batch, size), queue = _native.LOSSES[kind], noise.shape, _native.queue_of(noise)
    rank = 0 if factor is None else factor.shape[-1]
    sigma = _native.row_values(what.name, "sigma", sigma, batch)
    loss, saved = noise.new_empty(batch), noise.new_empty(batch, what.saved_size(rank))
    needed = _native._C.loss_scratch(queue=queue, kind=kind, batch=batch, size=size, rank=rank)
    row = _native._C.loss(
        queue=queue, kind=kind, score=score, diag=diag, factor=factor, noise=noise, sigma=sigma,
        sign=sign, saved=saved, loss=loss, scratch=noise.new_empty(needed) if needed else None,
    )  # fmt: skip
    refuse_row(what.name, "sigma", row, sigma)
    return loss, saved


def _loss_fake(kind: int, *args: Any) -> tuple[Tensor, Tensor]:
    noise, factor = args[3], args[2]
    size = _native.LOSSES[kind].saved_size(0 if factor is None else factor.shape[-1])
    return noise.new_empty(noise.shape[0]), noise.new_empty((noise.shape[0], size))


def _loss_backward(
    needs: Sequence[bool], grad: Tensor, kind: int, *rest: Any
) -> tuple[Tensor | None, ...]:
    score, diag, factor, noise, sigma, sign, saved = rest
    sigma = _native.row_values(_native.LOSSES[kind].name, "sigma", sigma, noise.shape[0])
    grads = tuple(None if t is None else dense_like(t) for t in (score, diag, factor))
    _native._C.loss_backward(
        queue=_native.queue_of(noise), kind=kind, score=score, diag=diag, factor=factor,
        noise=noise, sigma=sigma, sign=sign, saved=saved, grad=grad, grad_score=grads[0],
        grad_diag=grads[1], grad_factor=grads[2],
    )  # fmt: skip
    return grads


def _loss_jvp(tangents: Sequence[Tensor | None], kind: int, *rest: Any) -> Tensor:
    """The gradients of the per-sample losses, dotted with the tangents."""
    ones = (
        torch.ones_like(rest[3][:, 0]) if rest[3].shape[1] else rest[3].new_zeros(rest[3].shape[0])
    )
    grads = loss_operator.call_backward([t is not None for t in tangents], ones, kind, *rest)
    axis = 1 if _native.LOSSES[kind].points > 1 else 0
    total = torch.zeros_like(ones)
    for grad, tangent in zip(grads, tangents, strict=True):
        if tangent is not None:
            others = [i for i in range(grad.dim()) if i != axis]
            total = total + (grad * tangent).sum(others)
    return total


def _loss_axis(position: int, args: Sequence[Any]) -> int | None:
    if position in (1, 2, 3):
        return 1 if _native.LOSSES[args[0]].points > 1 else 0
    return 0 if position in (4, 5, 7) else None


loss_operator = Operator(
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
    label=lambda args: _native.LOSSES[args[0]].name,
)
_REDUCTIONS = ("mean", "sum", "none")


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
    where = _native.LOSSES[kind].name
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{where}: reduction must be mean, sum or none, got {reduction!r}")
    loss = direct_loss(kind, score, diag, factor, noise, sigma, sign)
    if not isinstance(loss, Tensor):
        if loss:
            loss = loss_operator.apply(kind, score, diag, factor, noise, sigma, sign)[0]
        else:
            loss = _checked_loss(kind, score, diag, factor, noise, sigma, sign)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _checked_loss(
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
) -> Tensor:
    """The losses (B,), by the checked way."""
    what = _native.LOSSES[kind]
    where, points = what.name, what.points
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
    if what.has_diag:
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
        _native.flat_rows(score, lead),
        None if diag is None else _native.flat_rows(diag, lead),
        None if factor is None else _native.flat_factor(factor),
        _native.flat_rows(noise, 1),
    )
    if _native.has_kernels(noise.device):
        return loss_operator(kind, *flat, sigma, sign)[0]
    given = [t for t in flat if what.has_factor or t is not None]
    return _REFERENCE[kind](*given, sigma, *((sign,) if what.has_factor else ()))


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
    return _evaluate_loss(DSM, score, None, None, noise, sigma, None, reduction)


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
    return _evaluate_loss(DSM_VR, score, None, None, noise, sigma, None, reduction)


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
    return _evaluate_loss(D2SM, score, diag, factor, noise, sigma, sign, reduction)


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
    return _evaluate_loss(D2SM_VR, score, diag, factor, noise, sigma, sign, reduction)


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
    return _evaluate_loss(D2SM_DIAG, score, diag, None, noise, sigma, None, reduction)


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
    return _evaluate_loss(D2SM_DIAG_VR, score, diag, None, noise, sigma, None, reduction)
