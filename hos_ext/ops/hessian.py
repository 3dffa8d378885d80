"""diag(d) + U diag(sign) U^T as dense matrices, and its products with vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_shape, check_tensor
from . import _native, reference
from ._checks import check_out, check_sign
from ._operator import Argument, Operator, dense_like, forward_mode_active, is_readable


def assemble_hessian(
    diag: Tensor,
    factor: Tensor | None,
    *,
    sign: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """diag(d) + U diag(sign) U^T as dense matrices: the one place that forms D x D.

    Args:
        diag: d. Shape (B, D); float32 or float64. Units 1/data^2.
        factor: U. Shape (B, D, r), r or D fastest in memory; None is r = 0. Units 1/data.
        sign: +1 or -1 for each column, shape (r,), dtype of diag; None is all +1.
        out: where to write, shape (B, D, D), apart from the inputs. It saves the page faults of a
            fresh result. No gradient then.

    Returns:
        Shape (B, D, D), symmetric, units 1/data^2; `out` where given. It is differentiable in diag
        and factor.

    Raises:
        ValueError: an argument breaks a rule above; the message names it.
        TypeError: an argument is of the wrong kind.
        RuntimeError: on a second derivative.

    References:
        Meng et al. 2021, section 3.3. The plain version is
        `hos_ext.ops.reference.assemble_hessian`.

    Example:
        >>> diag, factor = torch.ones(1, 2), torch.tensor([[[1.0], [2.0]]])
        >>> hos_ext.assemble_hessian(diag, factor)
        tensor([[[2., 2.],
                 [2., 5.]]])
    """
    where = "assemble_hessian"
    factor, sign = _check_low_rank(where, diag, factor, sign)
    if out is not None:
        inputs = {"diag": diag, "factor": factor, "sign": sign}
        check_out(where, out, diag, inputs, shape=(*diag.shape, diag.shape[1]), apart=True)
    if not _native.has_kernels(diag.device):
        result = reference.assemble_hessian(diag, factor, sign)
        return result if out is None else out.copy_(result)
    args = (_native.flat_rows(diag, 1), _native.flat_factor(factor), sign)
    if out is None:
        return assemble_operator(*args)[0]
    if _writes_into(out, diag, factor, sign):
        torch.autograd.graph.increment_version(out)  # autograd must see the change in place
        return _assemble_into(out, *args)
    return out.copy_(assemble_operator(*args)[0])


def hessian_matvec(
    diag: Tensor, factor: Tensor | None, v: Tensor, *, sign: Tensor | None = None
) -> Tensor:
    """(diag(d) + U diag(sign) U^T) v in O(D r), without the matrix.

    Args:
        diag, factor, sign: as for `assemble_hessian`.
        v: one vector a sample, shape (B, D), or several, shape (B, D, k); dtype of diag.

    Returns:
        As v, in its units times 1/data^2. It is differentiable in diag, factor and v.

    Raises:
        ValueError: an argument breaks a rule above; the message names it.
        TypeError: an argument is of the wrong kind.
        RuntimeError: on a second derivative.

    References:
        Meng et al. 2021, section 3.3. The plain version is `hos_ext.ops.reference.hessian_matvec`.

    Example:
        >>> diag, factor = torch.ones(1, 2), torch.tensor([[[1.0], [2.0]]])
        >>> hos_ext.hessian_matvec(diag, factor, torch.tensor([[1.0, 0.0]]))
        tensor([[2., 2.]])
    """
    where = "hessian_matvec"
    factor, sign = _check_low_rank(where, diag, factor, sign)
    check_tensor(where, "v", v, like=diag, because=" like diag")
    if v.dim() not in (2, 3) or v.shape[:2] != diag.shape:
        rule = f"v must have shape ({diag.shape[0]}, {diag.shape[1]}[, k])"
        raise ValueError(f"{where}: {rule}, got {tuple(v.shape)}")
    if not _native.has_kernels(diag.device):
        return reference.hessian_matvec(diag, factor, v, sign)
    v = v.resolve_neg()  # a lazy minus sign is not in memory
    columns = v.unsqueeze(-1) if v.dim() == 2 else v
    out = matvec_operator(_native.flat_rows(diag, 1), _native.flat_factor(factor), columns, sign)[0]
    return out.squeeze(-1) if v.dim() == 2 else out


def _check_low_rank(
    where: str, diag: Tensor, factor: Tensor | None, sign: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The factor (rank 0 for None) and the sign, checked."""
    check_tensor(where, "diag", diag, shape=("B", "D"))
    if factor is None:
        factor = diag.new_empty((*diag.shape, 0))
    check_tensor(where, "factor", factor, like=diag, because=" like diag")
    check_shape(where, "factor", factor, (*diag.shape, "r"))
    return factor, check_sign(where, sign, factor.shape[-1], diag)


def _weighted(factor: Tensor, sign: Tensor | None) -> Tensor:
    return factor if sign is None else factor * sign


# -------------------------------------------------------------------------------- assemble_hessian


def _assemble_forward(diag: Tensor, factor: Tensor, sign: Tensor | None) -> tuple[Tensor]:
    return (_assemble_into(diag.new_empty((*diag.shape, diag.shape[1])), diag, factor, sign),)


def _assemble_into(out: Tensor, diag: Tensor, factor: Tensor, sign: Tensor | None) -> Tensor:
    """The matrices written to `out`, whose rows are contiguous."""
    queue = _native.queue_of(diag)
    _native._C.assemble(queue=queue, diag=diag, factor=factor, sign=sign, out=out)
    return out


def _writes_into(out: Tensor, *inputs: Tensor | None) -> bool:
    """Whether a kernel may write rows of `out` as things are: no transform at work, no copy."""
    dense_rows = out.stride(-1) == 1 or out.shape[-1] <= 1
    plain = is_readable(out, *inputs) and not forward_mode_active()
    return plain and dense_rows and not out.is_neg()


def _assemble_backward(
    needs: Sequence[bool], grad: Tensor, diag: Tensor, factor: Tensor, sign: Tensor | None
) -> tuple[Tensor | None, ...]:
    (needs_diag, needs_factor), grad_factor = needs, None
    if needs_factor:
        grad_factor = dense_like(factor)
        grad_factor.copy_(torch.matmul(grad + grad.mT, _weighted(factor, sign)))
    return (grad.diagonal(0, -2, -1).clone() if needs_diag else None, grad_factor)


def _assemble_jvp(
    tangents: Sequence[Tensor | None], diag: Tensor, factor: Tensor, sign: Tensor | None
) -> Tensor:
    diag_tangent, factor_tangent = tangents
    out = torch.zeros_like(diag).unsqueeze(-1).expand(*diag.shape, diag.shape[-1])
    if factor_tangent is not None:
        half = factor_tangent @ _weighted(factor, sign).mT
        out = out + half + half.mT
    return out if diag_tangent is None else out + torch.diag_embed(diag_tangent)


assemble_operator = Operator(
    "assemble_hessian",
    [
        Argument("diag", batch=0, differentiable=True),
        Argument("factor", batch=0, differentiable=True, either_order=True),
        Argument("sign", "Tensor?"),
    ],
    forward=_assemble_forward,
    backward=_assemble_backward,
    jvp=_assemble_jvp,
    fake=lambda diag, factor, sign: (diag.new_empty((*diag.shape, diag.shape[-1])),),
)


# ---------------------------------------------------------------------------------- hessian_matvec


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
    (needs_diag, needs_factor, needs_v), grad_factor = needs, None
    if needs_factor:
        weighted = _weighted(factor, sign)
        inner = torch.baddbmm(grad @ (v.mT @ weighted), v, grad.mT @ weighted)
        grad_factor = dense_like(factor).copy_(inner)
    return (
        (grad * v).sum(-1) if needs_diag else None,
        grad_factor,
        _matvec_forward(diag, factor, grad, sign)[0] if needs_v else None,
    )


def _matvec_jvp(
    tangents: Sequence[Tensor | None], diag: Tensor, factor: Tensor, v: Tensor, sign: Tensor | None
) -> Tensor:
    diag_tangent, factor_tangent, v_tangent = tangents
    out, weighted = torch.zeros_like(v), _weighted(factor, sign)
    if diag_tangent is not None:
        out = out + diag_tangent.unsqueeze(-1) * v
    if factor_tangent is not None:
        out = out + factor_tangent @ (weighted.mT @ v) + weighted @ (factor_tangent.mT @ v)
    if v_tangent is not None:
        out = out + diag.unsqueeze(-1) * v_tangent + factor @ (weighted.mT @ v_tangent)
    return out


matvec_operator = Operator(
    "hessian_matvec",
    [
        Argument("diag", batch=0, differentiable=True),
        Argument("factor", batch=0, differentiable=True, either_order=True),
        Argument("v", batch=0, differentiable=True),
        Argument("sign", "Tensor?"),
    ],
    forward=_matvec_forward,
    backward=_matvec_backward,
    jvp=_matvec_jvp,
    fake=lambda diag, factor, v, sign: (v.new_empty(v.shape),),
)
