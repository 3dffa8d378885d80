"""Training objectives: noise a batch once, visit the model once, call the operators.

Networks speak in scaled quantities (`models`), and sigma^4 loss(s1, d, U, sigma) =
loss(sigma s1, sigma^2 d, sigma U, 1): the operators are called at sigma = 1 with (score, c - 1,
factor), without a rescaling pass over the factor. Equation numbers are those of Meng et al. 2021.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import ops
from ..checks import HALF, check_level, refuse_dropout, refuse_half
from ..ops._operator import functorch_active, is_plain
from ..random import STREAM_TRAINING
from ..scores import Model, Scores

_NAME = "score_matching_loss"


@overload
def score_matching_loss(
    model: Model,
    x: Tensor,
    sigma: Tensor | float,
    *,
    alpha: Tensor | float = ...,
    gamma: float = ...,
    variance_reduction: bool = ...,
    first_order: Literal["antithetic", "vr", "plain"] = ...,
    diagonal: bool = ...,
    scale_free: bool = ...,
    detach_score: bool = ...,
    centred: bool = ...,
    noise: Tensor | None = ...,
    seed: Tensor | int | None = ...,
    offset: Tensor | int = ...,
    first: int = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def score_matching_loss(
    model: Model,
    x: Tensor,
    sigma: Tensor | float,
    *,
    alpha: Tensor | float = ...,
    gamma: float = ...,
    variance_reduction: bool = ...,
    first_order: Literal["antithetic", "vr", "plain"] = ...,
    diagonal: bool = ...,
    scale_free: bool = ...,
    detach_score: bool = ...,
    centred: bool = ...,
    noise: Tensor | None = ...,
    seed: Tensor | int | None = ...,
    offset: Tensor | int = ...,
    first: int = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def score_matching_loss(
    model: Model,
    x: Tensor,
    sigma: Tensor | float,
    *,
    alpha: Tensor | float = 1.0,
    gamma: float = 1.0,
    variance_reduction: bool = True,
    first_order: Literal["antithetic", "vr", "plain"] = "antithetic",
    diagonal: bool = False,
    scale_free: bool = True,
    detach_score: bool = True,
    centred: bool = False,
    noise: Tensor | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int = 0,
    first: int = 0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Joint first- and second-order denoising score matching: second + gamma * first.

    The batch is noised once, x~ = alpha x + sigma z, and the model is called once with every point
    that the two terms need: alpha x + sigma z always, alpha x - sigma z for variance reduction or
    first_order="antithetic", alpha x for variance reduction or first_order="vr".

    Args:
        model: `model(x, sigma) -> Scores` in scaled quantities (see `models`), smooth in x when
            variance is reduced. Must give each row the same value in any batch.
        x: clean samples. Shape (B, *dims). Data units.
        sigma: noise standard deviation, > 0 (on an accelerator a tensor is not checked for it, as
            that would wait for the device). Float or shape (B,). Data units.
        alpha: signal scale. Float or shape (B,). 1 in the paper; sqrt(1 - sigma^2) for VP.
        gamma: weight of the first-order term, >= 0.
        variance_reduction: the second-order term by Eq. 33 (half of it), three points; its gradient
            has bounded variance as sigma -> 0. False: Eq. 13 at one point, variance sigma^-4
            (before the weight of scale_free).
        first_order: "antithetic": Eq. 3 averaged over +z and -z; "vr": Eq. 32; "plain": Eq. 3.
        diagonal: the second-order term fits diag s2 alone (Eq. 17); needs a model without factor.
        scale_free: terms times sigma^4 and sigma^2, so that every noise level has the same weight.
            False: as in the paper; the smallest sigma then outweighs all others.
        detach_score: in the second-order term s1 is given, as Theorem 2 assumes. False lets a
            restricted s2 pull s1 off: gradient 4 (psi_model - psi) s1 at the true s1.
        centred: the second-order term matches kappa = I + sigma^2 s2 to e e^T, e = z + sigma s1, in
            place of kappa + sigma^2 s1 s1^T to z z^T (Eq. 13, 17), averaged over the noisy points.
            For the true s1 the minimiser is the same, E[e e^T | x~] = kappa; for a learned one it
            is the second moment of the errors that the denoiser makes, which is what calibration
            asks for, and the noise of the target along s1 is gone. With variance_reduction it has
            the pairing and the control variate of Eq. 33 and the same minimiser, at any noise
            level. Needs detach_score.
        noise: standard normal draw z, shape, dtype and device of x. None draws it.
        seed: key of the draw, an int or a 0-d int64 tensor. None takes one from torch's default
            generator.
        offset: second key, such as the step number; likewise.
        first: global index of row 0: ranks and micro-batches then draw what one batch would.
        reduction: "mean" or "sum" over the batch, or "none".
        return_terms: also return {"first": ..., "second": ...}: the terms without gamma, reduced
            alike, detached.

    Returns:
        The loss: a scalar, or (B,) with reduction="none", summed over entries; or (loss, terms).
        Parts that do not depend on the model are left out: |C|^2 of the second term, and for "vr"
        |z|^2 of the first, so both can be negative. `centred` leaves out |I - e e^T|^2, which the
        score moves: compare its values only where the errors e are alike. No units when scale_free,
        else 1/data^4 (gamma 1/data^2). Half-precision outputs are raised to float32 for plain
        losses.

    Raises:
        TypeError: model does not return Scores.
        ValueError: shapes, dtypes or devices disagree, or a value breaks the rules above; with
            several points, active dropout (its masks differ between the points); with variance
            reduction, half precision or autocast (rounding is divided by sigma^2).

    Reference:
        Meng et al. 2021, arXiv:2111.04726, Eq. 3, 13-17, 32, 33.
    """
    name = _NAME
    if first_order not in ("antithetic", "vr", "plain"):
        raise ValueError(
            f"{name}: first_order must be 'antithetic', 'vr' or 'plain', got {first_order!r}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if isinstance(gamma, bool) or not isinstance(gamma, (float, int)):
        raise TypeError(f"{name}: gamma must be a float, got {type(gamma).__name__}")
    if not gamma >= 0:
        raise ValueError(f"{name}: gamma must be at least 0, got {gamma}")
    if centred and not detach_score:
        raise ValueError(f"{name}: detach_score must be True with centred, got {detach_score}")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a Tensor, got {type(x).__name__}")
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"{name}: x must be floating point of shape (B, *dims), "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    _check_level("sigma", sigma, x, positive=True)
    _check_level("alpha", alpha, x, positive=False)
    if isinstance(sigma, Tensor) and sigma.dim() == 0 and sigma.device != x.device:
        sigma = sigma.item()  # a scalar on the CPU
    reduced = variance_reduction or first_order == "vr"
    if reduced:
        refuse_half(name, x)
    if reduced or first_order == "antithetic":
        refuse_dropout(name, model)

    if noise is None:
        if seed is None:  # kept a tensor: reading it would break a compiled graph
            seed = torch.randint(2**63 - 1, ())
        noise = ops.normal(
            x.shape,
            seed=seed,
            offset=offset,
            first=first,
            stream=STREAM_TRAINING,
            dtype=x.dtype,
            device=x.device,
        )
    elif seed is not None:
        raise ValueError(f"{name}: seed must be None where noise is given, got {seed}")
    elif not isinstance(noise, Tensor):
        raise TypeError(f"{name}: noise must be a Tensor, got {type(noise).__name__}")
    elif noise.shape != x.shape or noise.dtype != x.dtype or noise.device != x.device:
        raise ValueError(
            f"{name}: noise must have shape {tuple(x.shape)}, dtype {x.dtype} and device "
            f"{x.device} like x, got {tuple(noise.shape)}, {noise.dtype}, {noise.device}"
        )

    centre, shift = _column(alpha, x) * x, _column(sigma, x) * noise
    stacked = [centre + shift]
    if variance_reduction or first_order == "antithetic":
        stacked.append(centre - shift)
    if reduced:
        stacked.append(centre)
    count = len(stacked)
    points = torch.cat(stacked)
    levels = sigma.expand(x.shape[:1]).repeat(count) if isinstance(sigma, Tensor) else sigma
    scores = model(points, levels)
    _check_scores(name, scores, points, diagonal)
    for key, value in (
        ("scaled_score", scores.scaled_score),
        ("c", scores.c),
        ("factor", scores.factor),
    ):
        if reduced and value is not None and value.dtype in HALF:
            raise ValueError(
                f"{name}: variance reduction needs float32 or float64, got {key} {value.dtype}"
            )

    with torch.autocast(x.device.type, enabled=False):
        z = _wide(noise).flatten(1)
        score = _wide(scores.scaled_score).reshape(count, *z.shape)
        diag = _wide(scores.c).reshape(count, *z.shape) - 1
        factor = None
        if scores.factor is not None:
            factor = _wide(scores.factor)
            factor = factor.reshape(count, *z.shape, factor.shape[-1])
        given = score.detach() if detach_score else score
        if centred:
            noisy = 2 if variance_reduction or first_order == "antithetic" else 1
            second = _centred_order(
                given, diag, factor, z, scores.sign, noisy, variance_reduction, diagonal
            )
        else:
            second = _second_order(
                given, diag, factor, z, scores.sign, variance_reduction, diagonal
            )
        terms = {"first": _first_order(score, z, first_order), "second": second}
        if not scale_free:
            level = sigma.to(z.dtype) if isinstance(sigma, Tensor) else sigma
            terms = {"first": terms["first"] / level**2, "second": terms["second"] / level**4}
        loss = _reduce(terms["second"] + gamma * terms["first"], reduction)
        if not return_terms:
            return loss
        return loss, {key: _reduce(term.detach(), reduction) for key, term in terms.items()}


def _first_order(score: Tensor, z: Tensor, kind: str) -> Tensor:
    """sigma^2 times Eq. 3 or 32, per sample. score: points +, [-], [clean], each `(B, D)`."""
    if kind == "antithetic":
        both = ops.dsm_loss(score[:2].flatten(0, 1), torch.cat([z, -z]), 1.0, reduction="none")
        return both.reshape(2, z.shape[0]).mean(0)
    if kind == "vr":
        return ops.dsm_vr_loss(torch.stack([score[0], score[-1]]), z, 1.0, reduction="none")
    return ops.dsm_loss(score[0], z, 1.0, reduction="none")


def _second_order(
    score: Tensor,
    diag: Tensor,
    factor: Tensor | None,
    z: Tensor,
    sign: Tensor | None,
    variance_reduction: bool,
    diagonal: bool,
) -> Tensor:
    """sigma^4 times Eq. 13 or 17, or its variance-reduced form, per sample."""
    if variance_reduction:
        if diagonal:
            return ops.d2sm_diag_vr_loss(score, diag, z, 1.0, reduction="none")
        return ops.d2sm_vr_loss(score, diag, factor, z, 1.0, sign=sign, reduction="none")
    if diagonal:
        return ops.d2sm_diag_loss(score[0], diag[0], z, 1.0, reduction="none")
    columns = None if factor is None else factor[0]
    return ops.d2sm_loss(score[0], diag[0], columns, z, 1.0, sign=sign, reduction="none")


def _centred_order(
    score: Tensor,
    diag: Tensor,
    factor: Tensor | None,
    z: Tensor,
    sign: Tensor | None,
    noisy: int,
    variance_reduction: bool,
    diagonal: bool,
) -> Tensor:
    """|kappa - e e^T|^2 - |I - e e^T|^2 per sample, averaged over the first `noisy` points.

    With A = kappa - I = sigma^2 s2 this is |A|^2 + 2 <I - e e^T, A>: Eq. 13 at sigma 1, with s = 0
    and e as the noise. Variance reduction subtracts 2 <I - z z^T, A0>, A0 at the clean point.
    E[I - z z^T | x] = 0 and A0 does not depend on z, so that the expectation, and with it the
    minimiser, is that of the plain loss. What is left is bounded as sigma -> 0: A and s = sigma s1
    are O(sigma^2) and O(sigma), and over +-z, C = I - z z^T,
        (<I - e+ e+^T, A+> + <I - e- e-^T, A->) - 2 <C, A0> = <C, A+ + A- - 2 A0>
            - 2 (z^T A+ s+ - z^T A- s-) - (s+^T A+ s+ + s-^T A- s-),
    a second difference of A, a first one of A s, and s^T A s: each O(sigma^4), the weight of a
    level. (One <C, A> is O(sigma^2): its variance over sigma^8 is O(sigma^-4).)
    """
    error = (torch.stack([z, -z])[:noisy] + score[:noisy]).flatten(0, 1)
    nothing = torch.zeros_like(error)
    # Split, not sliced: the backward of each slice would fill a tensor of the whole size.
    flat, *rest = _split(diag, noisy)
    control = (rest[-1] * (1 - z.square())).sum(1) if variance_reduction else None
    if diagonal:
        loss = ops.d2sm_diag_loss(nothing, flat, error, 1.0, reduction="none")
    else:
        columns = None
        if factor is not None:
            columns, *rest = _split(factor, noisy)
            if control is not None:
                along = (z.unsqueeze(1) @ rest[-1]).squeeze(1)
                each = rest[-1].square().sum(1) - along.square()
                control = control + (each if sign is None else each * sign).sum(1)
        loss = ops.d2sm_loss(nothing, flat, columns, error, 1.0, sign=sign, reduction="none")
    loss = loss.reshape(noisy, z.shape[0]).mean(0)
    return loss if control is None else loss - 2 * control


def _split(value: Tensor, noisy: int) -> list[Tensor]:
    """The first `noisy` points as rows of one batch, then each other point `(B, ...)`."""
    first, *others = value.split([noisy] + [1] * (len(value) - noisy))
    return [first.flatten(0, 1), *(other.squeeze(0) for other in others)]


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _wide(value: Tensor) -> Tensor:
    """float32 in place of half precision, else as it is."""
    return value.float() if value.dtype in HALF else value


def _column(value: Tensor | float, x: Tensor) -> Tensor | float:
    """A `(B,)` value, shaped to broadcast against `x (B, *dims)` and in its dtype."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def _check_level(name: str, value: Any, x: Tensor, *, positive: bool) -> None:
    """sigma and alpha: a float or `(B,)`, without gradient, positive or finite; read on the CPU."""
    check_level(_NAME, name, value, x.shape[0], x, positive=positive)
    if not isinstance(value, Tensor) or value.device.type != "cpu" or not is_plain(value):
        return
    if torch.compiler.is_compiling() or functorch_active():
        return
    good = value.isfinite() & (value > 0) if positive else value.isfinite()
    if not good.all():
        rule = "positive and finite" if positive else "finite"
        raise ValueError(f"{_NAME}: {name} must be {rule}, got {value[~good].flatten()[0]}")


def _check_scores(name: str, scores: Scores, points: Tensor, diagonal: bool) -> None:
    if not isinstance(scores, Scores):
        raise TypeError(f"{name}: model must return Scores, got {type(scores).__name__}")
    shape = tuple(points.shape)
    for key, value in (
        ("scaled_score", scores.scaled_score),
        ("c", scores.c),
        ("factor", scores.factor),
    ):
        if not isinstance(value, Tensor) and not (key == "factor" and value is None):
            raise TypeError(
                f"{name}: model must return {key} as a Tensor, got {type(value).__name__}"
            )
    for key, value in (("scaled_score", scores.scaled_score), ("c", scores.c)):
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name}: model must return {key} of shape {shape}, got {tuple(value.shape)}"
            )
    if scores.factor is None:
        return
    size = points.shape[1:].numel()
    if scores.factor.dim() != 3 or tuple(scores.factor.shape[:2]) != (shape[0], size):
        raise ValueError(
            f"{name}: model must return factor of shape ({shape[0]}, {size}, r), "
            f"got {tuple(scores.factor.shape)}"
        )
    if diagonal:
        raise ValueError(
            f"{name}: diagonal=True needs a model without factor (rank 0), "
            f"got rank {scores.factor.shape[2]}"
        )
