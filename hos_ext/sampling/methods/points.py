"""Where chains stand: states with what the user's functions gave there, checked as it arrives."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ...checks import kind_name, show
from ...linalg.operator import hessian_of
from ...scores import (
    AnyScores,
    DenseScores,
    MatrixFreeScores,
    SymmetricOperator,
    UnscaledScores,
)


class Point(NamedTuple):
    """A batch of states with their scores.

    Attributes:
        x: the states. Shape (B, *dims).
        scores: s1 at x, or s1 and s2 in one of the containers of `hos_ext.scores`.
        log_prob: log p at x, but for a constant. Shape (B,); None where it is not known.
    """

    x: Tensor
    scores: AnyScores
    log_prob: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """s1. Shape (B, *dims)."""
        scores = self.scores
        return scores if isinstance(scores, Tensor) else scores.score

    @property
    def hessian(self) -> SymmetricOperator:
        """s2 as an operator on flat vectors, for a step that asked for one."""
        hessian = hessian_of(self.scores)
        assert hessian is not None  # the step's `accepts` saw to it
        return hessian

    def flat(self) -> tuple[Tensor, Tensor]:
        """x and s1, each flattened to (B, D)."""
        return self.x.flatten(1), self.score.flatten(1)


# ----------------------------------------------------------------------------------------- checks
# A score function is foreign code, so what it returns is checked at every call. Each check reads
# sizes and types alone: nothing here waits for a device, but for the signs of the first call.


def check_parts(scores: Any, x: Tensor, read_signs: bool) -> None:
    """Refuses a container of scores that does not fit x.

    Args:
        scores: what the score function returned. Of a container from outside the package s1 alone
            is looked at here; the step's own `check` sees the rest.
        x: where. Shape (B, *dims).
        read_signs: whether the values of signs are read, which waits for the device.
    """
    check_like_x("score", scores.score, x)
    if isinstance(scores, UnscaledScores):
        _check_low_rank(scores, x, read_signs)
    elif isinstance(scores, DenseScores):
        _check_columns("hessian", scores.hessian, x, x.shape[1:].numel())
    elif isinstance(scores, MatrixFreeScores):
        _check_operator(scores.hessian, x)


def refuse_kind(scores: object, x: Tensor, accepts: tuple[type, ...], method: str) -> NoReturn:
    """Raises for scores of a kind that the step of this name does not take."""
    if Tensor in accepts:
        check_like_x("score", scores, x)
    kinds = " or ".join(_SIGNATURES[kind] for kind in accepts if kind in _SIGNATURES)
    raise TypeError(
        f"sample: score_fn must return {kinds} for method {method!r}, got {kind_name(scores)}"
    )


_SIGNATURES = {
    UnscaledScores: "UnscaledScores(score, diag, factor)",
    DenseScores: "DenseScores(score, hessian)",
}


def check_log_prob(value: Tensor, x: Tensor) -> Tensor:
    """The log density that the user's function returned, if it is one number a row."""
    if not isinstance(value, Tensor) or value.shape != x.shape[:1] or not value.is_floating_point():
        raise ValueError(
            f"sample: log_prob must return floating point of shape ({len(x)},), got {show(value)}"
        )
    return value


def _check_low_rank(scores: UnscaledScores, x: Tensor, read_signs: bool) -> None:
    check_like_x("diag", scores.diag, x)
    factor, sign = scores.factor, scores.sign
    if factor is None:
        return
    _check_columns("factor", factor, x, "r")
    if sign is None:
        return
    if not isinstance(sign, Tensor):
        _refuse("sign", "be a tensor", type(sign).__name__, TypeError)
    columns = tuple(factor.shape[-1:])
    if sign.shape != columns:
        _refuse("sign", f"have shape {columns} (one for each column)", tuple(sign.shape))
    if sign.device != x.device:
        _refuse("sign", f"be on {x.device}", sign.device)
    if read_signs and not bool((sign.abs() == 1).all()):
        _refuse("sign", "hold +1 or -1", sign.tolist())


def _check_columns(name: str, value: Tensor, x: Tensor, columns: int | str) -> None:
    """(B, D, columns), where a letter is any number."""
    rows = (len(x), x.shape[1:].numel())
    good = isinstance(value, Tensor) and value.shape[:-1] == rows
    if not good or columns not in (value.shape[-1], "r"):
        _refuse(name, f"have shape ({rows[0]}, {rows[1]}, {columns})", show(value))
    _check_kind(name, value, x)


def _check_operator(hessian: SymmetricOperator, x: Tensor) -> None:
    if not isinstance(hessian, SymmetricOperator):
        _refuse("hessian", "be a SymmetricOperator", type(hessian).__name__, TypeError)
    size = x.shape[1:].numel()
    if tuple(hessian.shape) != (len(x), size, size):
        _refuse("hessian", f"have shape ({len(x)}, {size}, {size})", tuple(hessian.shape))
    _check_kind("hessian", hessian, x)


def check_like_x(name: str, value: object, x: Tensor) -> None:
    """A score or diagonal of the shape, dtype and device of x."""
    if not isinstance(value, Tensor):
        _refuse(name, "be a tensor", kind_name(value), TypeError)
    if value.shape != x.shape:
        _refuse(name, f"have shape {tuple(x.shape)} like x", tuple(value.shape))
    _check_kind(name, value, x)


def _check_kind(name: str, value: Tensor | SymmetricOperator, x: Tensor) -> None:
    if value.dtype != x.dtype or value.device != x.device:
        _refuse(name, f"be {x.dtype} on {x.device} like x", f"{value.dtype} on {value.device}")


def _refuse(name: str, rule: str, got: object, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"sample: {name} from score_fn must {rule}, got {got}")


# --------------------------------------------------------------------------------------- divergence


def non_finite(x: Tensor) -> Tensor:
    """Whether a row holds a NaN or an infinity, or is about to (its sum overflows). Shape (B,).

    By the sum, in one pass: isfinite().all() costs 40 times that, as much as an Ozaki step.
    """
    total = x.flatten(1).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return ~total.isfinite()
