"""Denoising score matching of first and second order, without a D x D matrix.

Each public function names its kind; `_native.LOSSES` says what the kind takes. All share one
operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import HALF, check_positive, check_shape, check_tensor, refuse_row
from . import _native, reference
from ._checks import check_sign, refuse_grad
from ._operator import Argument, Named, Operator, dense_like, native_may_judge

DSM, DSM_VR, D2SM, D2SM_VR, D2SM_DIAG, D2SM_DIAG_VR = range(len(_native.LOSSES))


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
        ValueError: an argument breaks a rule above; the message names it.
        TypeError: an argument is of the wrong kind.
        RuntimeError: on a second derivative.

    References:
        Meng et al. 2021, Eq. 3. The plain version is `hos_ext.ops.reference.dsm_loss`.

    Example:
        >>> x0, z, sigma = torch.zeros(8, 3), torch.ones(8, 3), 0.5
        >>> x = x0 + sigma * z
        >>> score = -(x - x0) / sigma**2  # of the noise alone: the loss is 0 there
        >>> hos_ext.dsm_loss(score, z, sigma)
        tensor(0.)
    """
    return _evaluate(DSM, score, None, None, noise, sigma, None, reduction)


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
        ValueError: an argument breaks a rule, or is of half precision.
        TypeError: an argument is of the wrong kind.
        RuntimeError: on a second derivative.

    References:
        Meng et al. 2021, Eq. 32. The plain version is `hos_ext.ops.reference.dsm_vr_loss`.

    Example:
        >>> z, sigma = torch.ones(8, 3), 0.5
        >>> score = torch.stack([-z / sigma, torch.zeros(8, 3)])  # at the noisy and clean points
        >>> hos_ext.dsm_vr_loss(score, z, sigma)  # -|z|^2 / sigma^2
        tensor(-12.)
    """
    return _evaluate(DSM_VR, score, None, None, noise, sigma, None, reduction)


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
        ValueError: an argument breaks a rule above; the message names it.
        TypeError: an argument is of the wrong kind.
        RuntimeError: on a second derivative.

    References:
        Meng et al. 2021, Eq. 13. The plain version is `hos_ext.ops.reference.d2sm_loss`.

    Example:
        >>> z, sigma = torch.zeros(8, 3), 1.0
        >>> score, diag, factor = torch.zeros(8, 3), -torch.ones(8, 3), torch.zeros(8, 3, 2)
        >>> hos_ext.d2sm_loss(score, diag, factor, z, sigma)  # |psi|^2 + 2 <C, psi>, C = I
        tensor(-3.)
    """
    return _evaluate(D2SM, score, diag, factor, noise, sigma, sign, reduction)


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
        ValueError: an argument breaks a rule above, or is of half precision.
        TypeError: an argument is of the wrong kind.
        RuntimeError: on a second derivative.

    References:
        Meng et al. 2021, Eq. 33. The plain version is `hos_ext.ops.reference.d2sm_vr_loss`.

    Example:
        >>> z, points = torch.ones(8, 3), torch.zeros(3, 8, 3)  # at +, at -, clean
        >>> factor = torch.ones(3, 8, 3, 2)
        >>> hos_ext.d2sm_vr_loss(points, points, factor, z, 1.0)  # |psi|^2: psi is the same at all
        tensor(36.)
    """
    return _evaluate(D2SM_VR, score, diag, factor, noise, sigma, sign, reduction)


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
        ValueError: an argument breaks a rule; the message names it.
        TypeError: an argument is of the wrong kind.
        RuntimeError: on a second derivative.

    References:
        Meng et al. 2021, Eq. 17. The plain version is `hos_ext.ops.reference.d2sm_diag_loss`.

    Example:
        >>> z, sigma = torch.zeros(8, 3), 1.0
        >>> hos_ext.d2sm_diag_loss(torch.zeros(8, 3), -torch.ones(8, 3), z, sigma)
        tensor(-3.)
    """
    return _evaluate(D2SM_DIAG, score, diag, None, noise, sigma, None, reduction)


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
        ValueError: an argument breaks a rule, or is of half precision.
        TypeError: an argument is of the wrong kind.
        RuntimeError: on a second derivative.

    References:
        Meng et al. 2021, Eq. 17 and 33. The plain version is
        `hos_ext.ops.reference.d2sm_diag_vr_loss`.

    Example:
        >>> z, score, diag = torch.ones(8, 3), torch.zeros(3, 8, 3), torch.ones(3, 8, 3)
        >>> hos_ext.d2sm_diag_vr_loss(score, diag, z, 1.0)
        tensor(3.)
    """
    return _evaluate(D2SM_DIAG_VR, score, diag, None, noise, sigma, None, reduction)


# -------------------------------------------------------------------- from the doors to the kernels


def _evaluate(
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
    reduction: str,
) -> Tensor:
    """One native call where all is plain, else the general way; then the reduction."""
    if reduction.__class__ is not str or reduction not in ("mean", "sum", "none"):
        where = _native.LOSSES[kind].name
        raise ValueError(f"{where}: reduction must be mean, sum or none, got {reduction!r}")
    # The losses, where all is right for it; True where a gradient is wanted as well, of (B, D);
    # None for everything else, wrong arguments included.
    loss = None
    if native_may_judge():
        loss = _native._C.direct_loss(
            kind=kind, score=score, diag=diag, factor=factor, noise=noise, sigma=sigma, sign=sign
        )
    if not isinstance(loss, Tensor):
        if loss:
            loss = loss_operator.apply(kind, score, diag, factor, noise, sigma, sign)[0]
        else:
            loss = _general(kind, score, diag, factor, noise, sigma, sign)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _general(
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
) -> Tensor:
    """The losses (B,): checks, and the operator or the plain version."""
    what = _native.LOSSES[kind]
    where = what.name
    score, diag, factor, noise, sign = _widened(what, score, diag, factor, noise, sign)
    _check_tensors(what, score, diag, factor, noise)
    sign = check_sign(where, sign, 0 if factor is None else factor.shape[-1], noise)
    sigma = check_positive(where, "sigma", sigma, noise.shape[0], noise)
    lead = 2 if what.points > 1 else 1
    score, noise = _native.flat_rows(score, lead), _native.flat_rows(noise, 1)
    diag = None if diag is None else _native.flat_rows(diag, lead)
    factor = None if factor is None else _native.flat_factor(factor)
    if _native.has_kernels(noise.device):
        return loss_operator(kind, score, diag, factor, noise, sigma, sign)[0]
    plain = getattr(reference, where)
    if what.has_factor:
        return plain(score, diag, factor, noise, sigma, sign)  # type: ignore[no-any-return]
    return plain(*(score, diag)[: 1 + what.has_diag], noise, sigma)  # type: ignore[no-any-return]


def _check_tensors(
    what: _native.Loss, score: Tensor, diag: Tensor | None, factor: Tensor | None, noise: Tensor
) -> None:
    where, points = what.name, what.points
    check_tensor(where, "noise", noise, shape=("B", "*dims"))
    refuse_grad(where, "noise", noise)
    shape, stack = tuple(noise.shape), (points,) if points > 1 else ()
    like: dict[str, Any] = {"like": noise, "because": " like noise"}
    check_tensor(where, "score", score, **like)
    fewer = ((2, *shape),) if points == 3 else ()  # without the clean point
    check_shape(where, "score", score, *fewer, (*stack, *shape))
    if what.has_diag:
        check_tensor(where, "diag", diag, shape=(*stack, *shape), **like)
    if factor is not None:
        check_tensor(where, "factor", factor, **like)
        check_shape(where, "factor", factor, (*stack, shape[0], math.prod(shape[1:]), "r"))


def _widened(what: _native.Loss, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Half precision: float32 for the plain losses under autocast, refused everywhere else."""
    halves = [t for t in tensors if isinstance(t, Tensor) and t.dtype in HALF]
    if not halves:
        return tensors
    if what.points > 1:
        raise ValueError(
            f"{what.name}: inputs must have dtype float32, float64 (a second difference divided by"
            f" sigma^2 does not survive half precision), got {halves[0].dtype}"
        )
    if not torch.is_autocast_enabled(halves[0].device.type):
        return tensors
    return tuple(t.float() if isinstance(t, Tensor) and t.dtype in HALF else t for t in tensors)


# ------------------------------------------------------------------ the operator and its derivative


def _forward(
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


def _fake(
    kind: int, score: Tensor, diag: Any, factor: Tensor | None, noise: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    batch, rank = noise.shape[0], 0 if factor is None else factor.shape[-1]
    return noise.new_empty(batch), noise.new_empty((batch, _native.LOSSES[kind].saved_size(rank)))


def _backward(
    needs: Sequence[bool],
    grad: Tensor,
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    sigma: Tensor | float,
    sign: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor | None, ...]:
    sigma = _native.row_values(_native.LOSSES[kind].name, "sigma", sigma, noise.shape[0])
    grad_score = dense_like(score)
    grad_diag = None if diag is None else dense_like(diag)
    grad_factor = None if factor is None else dense_like(factor)
    _native._C.loss_backward(
        queue=_native.queue_of(noise), kind=kind, score=score, diag=diag, factor=factor,
        noise=noise, sigma=sigma, sign=sign, saved=saved, grad=grad, grad_score=grad_score,
        grad_diag=grad_diag, grad_factor=grad_factor,
    )  # fmt: skip
    return grad_score, grad_diag, grad_factor


def _jvp(
    tangents: Sequence[Tensor | None],
    kind: int,
    score: Tensor,
    diag: Tensor | None,
    factor: Tensor | None,
    noise: Tensor,
    *rest: Any,
) -> Tensor:
    """The gradients of the per-sample losses, dotted with the tangents."""
    ones = torch.ones_like(noise[:, 0]) if noise.shape[1] else noise.new_zeros(noise.shape[0])
    needs = [t is not None for t in tangents]
    grads = loss_operator.call_backward(needs, ones, kind, score, diag, factor, noise, *rest)
    axis = _sample_axis({"kind": kind})
    total = torch.zeros_like(ones)
    for grad, tangent in zip(grads, tangents, strict=True):
        if tangent is not None:
            others = [i for i in range(grad.dim()) if i != axis]
            total = total + (grad * tangent).sum(others)
    return total


def _sample_axis(args: Named) -> int:
    """Where points are stacked, samples are the second axis."""
    return 1 if _native.LOSSES[args["kind"]].points > 1 else 0


loss_operator = Operator(
    "loss",
    [
        Argument("kind", "int"),
        Argument("score", batch=_sample_axis, differentiable=True),
        Argument("diag", "Tensor?", batch=_sample_axis, differentiable=True),
        Argument("factor", "Tensor?", _sample_axis, differentiable=True, either_order=True),
        Argument("noise", batch=0),
        Argument("sigma", batch=0, scalar=torch.float64),
        Argument("sign", "Tensor?"),
    ],
    forward=_forward,
    backward=_backward,
    jvp=_jvp,
    fake=_fake,
    saved=1,
    label=lambda args: _native.LOSSES[args["kind"]].name,
)
