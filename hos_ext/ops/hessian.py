"""diag(d) + U diag(sign) U^T as dense matrices, and its products with vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import check_tensor
from . import _native, reference
from ._checks import check_out, check_sign
from ._operator import Operator, dense_like, functorch_active, needs_library

# ----------------------------------------------------------------------------------------- Hessian


def assemble_into(out: Tensor, diag: Tensor, factor: Tensor, sign: Tensor | None) -> Tensor:
    """The matrices written to `out`, whose rows are contiguous."""
    queue = _native.queue_of(diag)
    _native._C.assemble(queue=queue, diag=diag, factor=factor, sign=sign, out=out)
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


assemble_operator = Operator(
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
    (batch, size, rank), columns, queue = factor.shape, v.shape[2], _native.queue_of(v)
    out = v.new_empty(v.shape)
    needed = _native._C.matvec_scratch(
        queue=queue, batch=batch, size=size, rank=rank, columns=columns
    )
    _native._C.matvec(
        queue=queue, diag=diag, factor=factor, sign=sign, out=out, v=v,
        scratch=v.new_empty(needed) if needed else None,
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


matvec_operator = Operator(
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
    if not _native.has_kernels(diag.device):
        result = reference.assemble_hessian(diag, factor, sign)
        return result if out is None else out.copy_(result)
    args = (_native.flat_rows(diag, 1), _native.flat_factor(factor), sign)
    if out is None:
        return assemble_operator(*args)[0]
    if writes_into(out, diag, factor, sign):
        torch.autograd.graph.increment_version(out)  # autograd must see the change in place
        return assemble_into(out, *args)
    return out.copy_(assemble_operator(*args)[0])


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
    if not _native.has_kernels(diag.device):
        return reference.hessian_matvec(diag, factor, v, sign)
    v = v.resolve_neg()  # a lazy minus sign is not in memory
    columns = v.unsqueeze(-1) if v.dim() == 2 else v
    out = matvec_operator(_native.flat_rows(diag, 1), _native.flat_factor(factor), columns, sign)[0]
    return out.squeeze(-1) if v.dim() == 2 else out
