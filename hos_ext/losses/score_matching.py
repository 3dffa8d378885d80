"""Training objectives: noise a batch once, visit the model once, call the operators.

Networks speak in scaled quantities (see `Scores`), and sigma^4 loss(s1, d, U, sigma) =
loss(sigma s1, sigma^2 d, sigma U, 1). So the operators are called at sigma = 1 with
(scaled_score, c - 1, factor), without a rescaling pass over the factor. Equation numbers are those
of Meng et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from .. import ops
from ..checks import (
    HALF,
    Shape,
    as_float,
    autocast_to,
    check,
    check_callable,
    check_flag,
    check_level,
    fits,
    is_number,
    kind_name,
    refuse_dropout,
    show,
)
from ..conditions import Conditions, check_conditions, repeat_conditions
from ..ops._checks import check_key
from ..ops._operator import functorch_active, is_plain
from ..ops.noise import draw_normal
from ..random import STREAM_TRAINING, Key, seed_from
from ..scores import Model, Scores
from .reduction import Reduction, check_reduction, reduced

if TYPE_CHECKING:
    from typing_extensions import Unpack

_WHERE = "score_matching_loss"


class _Recommended(TypedDict):
    variance_reduction: bool
    centred: bool


FirstOrder = Literal["antithetic", "vr", "plain"]

# The objective by default, here and of a training: the joint loss with its second-order term
# centred at the learned mean. By Eq. 33 the digits reach the same predictive calibration, but a
# first eigenvector along s1 keeps 5 to 10 times the variance there is: at these noise levels the
# target z z^T is as large as |z|^2 along s1 where kappa is below 1. Without variance reduction a
# step costs two points, not three, and over sigma 0.1 to 1.2 the digits are learned better at each
# level (docs/training.md). Below, variance reduction pays.
RECOMMENDED: Final = _Recommended(variance_reduction=False, centred=True)


class Objective(TypedDict, total=False):
    """What `score_matching_loss` fits, as options by name; the function describes them."""

    gamma: float
    variance_reduction: bool
    first_order: FirstOrder
    diagonal: bool
    scale_free: bool
    detach_score: bool
    centred: bool
    reduction: Reduction


class _Options(Objective, total=False):
    model_kwargs: Conditions | None
    alpha: Tensor | float
    noise: Tensor | None
    seed: Tensor | int | None
    offset: Tensor | int
    first: int
    generator: torch.Generator | None


@overload
def score_matching_loss(
    model: Model,
    x0: Tensor,
    sigma: Tensor | float,
    *,
    return_terms: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def score_matching_loss(
    model: Model,
    x0: Tensor,
    sigma: Tensor | float,
    *,
    return_terms: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def score_matching_loss(
    model: Model,
    x0: Tensor,
    sigma: Tensor | float,
    *,
    alpha: Tensor | float = 1.0,
    gamma: float = 1.0,
    variance_reduction: bool = RECOMMENDED["variance_reduction"],
    first_order: FirstOrder = "antithetic",
    diagonal: bool = False,
    scale_free: bool = True,
    detach_score: bool = True,
    centred: bool = RECOMMENDED["centred"],
    noise: Tensor | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int = 0,
    first: int = 0,
    model_kwargs: Conditions | None = None,
    reduction: Reduction = "mean",
    return_terms: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Joint first- and second-order denoising score matching: second + gamma * first.

    The batch is noised once, x = alpha x0 + sigma z. The model is called once with all the points
    that the two terms need:

    * alpha x0 + sigma z always;
    * alpha x0 - sigma z for variance reduction or first_order="antithetic";
    * alpha x0 for variance reduction or first_order="vr".

    Args:
        model: `model(x, sigma) -> Scores` in scaled quantities, smooth in x where variance is
            reduced. Must give each row the same value in any batch.
        x0: clean samples. Shape (B, *dims). Data units.
        sigma: noise standard deviation, > 0 (on an accelerator a tensor is not checked for it, as
            that would wait for the device). Float or shape (B,). Data units.
        alpha: signal scale. Float or shape (B,). 1 in the paper; sqrt(1 - sigma^2) for VP.
        gamma: weight of the first-order term, >= 0.
        variance_reduction: three points; the gradient of the second-order term has bounded variance
            as sigma -> 0. False, the default: variance sigma^-4 (before the weight of scale_free),
            which is less work and no worse where sigma is above a tenth of the data's standard
            deviation. With centred=False: Eq. 33 (half of it), and Eq. 13 at one point.
        first_order: "antithetic": Eq. 3 averaged over +z and -z; "vr": Eq. 32; "plain": Eq. 3.
        diagonal: the second-order term fits diag s2 alone (Eq. 17); needs a model without factor.
        scale_free: terms times sigma^4 and sigma^2, so that every noise level has the same weight.
            False: as in the paper; the smallest sigma then outweighs all others.
        detach_score: in the second-order term s1 is given, as Theorem 2 assumes. False lets a
            restricted s2 pull s1 off: gradient 4 (psi_model - psi) s1 at the true s1.
        centred: the second-order term matches kappa = I + sigma^2 s2 to e e^T, e = z + sigma s1,
            averaged over the noisy points. (Eq. 13 and 17 match kappa + sigma^2 s1 s1^T to z z^T.)
            For the true s1 the minimiser is the same, E[e e^T | x] = kappa. For a learned s1 it is
            the second moment of the errors that the denoiser makes, which is what calibration asks
            for. The noise of the target along s1 is gone. With variance_reduction it has the
            pairing and the control variate of Eq. 33 and the same minimiser, at any noise level.
            Needs detach_score.
        noise: standard normal draw z, shape, dtype and device of x0. None draws it.
        seed: key of the draw, an int or a 0-d int64 tensor. None takes one from torch's default
            generator.
        offset: second key, such as the step number; likewise.
        first: global index of row 0: ranks and micro-batches then draw what one batch would.
        model_kwargs: conditions, such as class labels: `model(x, sigma, **model_kwargs)`. Each
            tensor has one row for each sample, and is repeated for the points.
        reduction: "mean" or "sum" over the batch, or "none".
        return_terms: also return {"first": ..., "second": ...}: the terms without gamma, reduced
            alike, detached.
        generator: a `torch.Generator` in place of seed, which is drawn from it.

    Returns:
        The loss: a scalar, or (B,) with reduction="none", summed over entries; or (loss, terms).
        No units when scale_free, else 1/data^4 (gamma 1/data^2). Half-precision outputs are raised
        to float32 for plain losses.

        Parts that do not depend on the model are left out: |C|^2 of the second term, and for "vr"
        |z|^2 of the first. So both can be negative. `centred` leaves out |I - e e^T|^2, which the
        score moves: compare its values only where the errors e are alike.

    Raises:
        TypeError: model does not return Scores.
        ValueError: shapes, dtypes or devices disagree, or a value breaks the rules above; with
            several points, active dropout (its masks differ between the points); with variance
            reduction, half precision, or autocast to it where sigma is below 0.3 alpha sigma_data
            (the model's, or else 1), 0.05 with centred: rounding is divided by sigma^2.

    References:
        Meng et al. 2021, arXiv:2111.04726, Eq. 3, 13-17, 32, 33.

    Example:
        >>> import hos_ext, torch
        >>> model, x0 = hos_ext.MLP((2,), rank=1), torch.randn(8, 2)
        >>> loss = hos_ext.score_matching_loss(model, x0, 0.5, seed=0, offset=3)
        >>> loss.backward()
        >>> hos_ext.score_matching_loss(model, x0, 0.5, seed=0, reduction="none").shape
        torch.Size([8])
    """
    where = _WHERE
    check_callable(where, "model", model)
    check_objective(
        where,
        gamma=gamma,
        variance_reduction=variance_reduction,
        first_order=first_order,
        diagonal=diagonal,
        scale_free=scale_free,
        detach_score=detach_score,
        centred=centred,
        reduction=reduction,
    )
    check_flag(where, return_terms=return_terms)
    seed = seed_from(where, seed, generator)
    sigma, alpha = _check_batch(x0, sigma, alpha, noise, seed)
    conditions = check_conditions(where, model_kwargs, x0.shape[0], "x0")
    seed, offset, first = check_key(where, seed, offset, first, x0)
    with_clean = variance_reduction or first_order == "vr"
    with_minus = variance_reduction or first_order == "antithetic"
    if with_clean:
        refuse_rounding(where, model, x0, sigma, alpha, centred)
    if with_clean or with_minus:
        refuse_dropout(where, model)

    if noise is None:
        if seed is None:  # kept a tensor: reading it would break a compiled graph
            seed = torch.randint(2**63 - 1, ())
        noise = draw_normal(Key(seed, offset, first), STREAM_TRAINING, x0.shape, x0)
    if isinstance(sigma, Tensor) and sigma.dim() == 0 and sigma.device != x0.device:
        sigma = sigma.item()  # a scalar on the CPU
    points, levels = _evaluation_points(x0, noise, sigma, alpha, with_minus, with_clean)
    conditions = repeat_conditions(conditions, 1 + with_minus + with_clean)
    conditional: Callable[..., Scores] = model
    scores = conditional(points, levels, **conditions)
    _check_scores(scores, points, diagonal, with_clean)
    _look_at_score(model, points, sigma, noise, scores.scaled_score)
    with torch.autocast(x0.device.type, enabled=False):
        z = _wide(noise).flatten(1)
        at = _by_point(scores, 1 + with_minus + with_clean, z)
        first_term = _first_order(at.score, z, first_order)
        if detach_score:
            at = at._replace(score=at.score.detach())
        if centred:
            second_term = _centred_order(at, z, 1 + with_minus, variance_reduction, diagonal)
        else:
            second_term = _second_order(at, z, variance_reduction, diagonal)
        if not scale_free:
            level = sigma.to(z.dtype) if isinstance(sigma, Tensor) else sigma
            first_term, second_term = first_term / level**2, second_term / level**4
        loss = reduced(second_term + gamma * first_term, reduction)
        if not return_terms:
            return loss
        terms = {"first": first_term, "second": second_term}
        return loss, {key: reduced(term.detach(), reduction) for key, term in terms.items()}


def _look_at_score(
    model: Any, points: Tensor, sigma: Tensor | float, noise: Tensor, scaled_score: Tensor
) -> None:
    """Shows the first samples to the watch of a model that stands on a given score.

    Once it is done, this is two attributes a step. Nothing is seen within torch.compile and
    torch.func, where it could not be read.
    """
    watch = getattr(getattr(model, "module", model), "watch", None)  # `module`: of DDP
    if watch is None or getattr(watch, "done", True) or not callable(watch):
        return
    if torch.compiler.is_compiling() or functorch_active() or not is_plain(scaled_score):
        return
    rows = len(noise)
    watch(points[:rows], sigma, noise, scaled_score[:rows])


def _evaluation_points(
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor | float,
    alpha: Tensor | float,
    with_minus: bool,
    with_clean: bool,
) -> tuple[Tensor, Tensor | float]:
    """alpha x0 + sigma z, [alpha x0 - sigma z], [alpha x0], one batch; and sigma for each row."""
    centre, shift = _column(alpha, x0) * x0, _column(sigma, x0) * noise
    points = [centre + shift]
    if with_minus:
        points.append(centre - shift)
    if with_clean:
        points.append(centre)
    if isinstance(sigma, Tensor):
        sigma = sigma.expand(x0.shape[:1]).repeat(len(points))
    return torch.cat(points), sigma


class _ByPoint(NamedTuple):
    """Scores at sigma = 1 with the points as an axis in front and samples flat."""

    score: Tensor
    """Shape (points, B, D), as diag."""
    diag: Tensor
    factor: Tensor | None
    """Shape (points, B, D, r)."""
    sign: Tensor | None


def _by_point(scores: Scores, count: int, z: Tensor) -> _ByPoint:
    shape, factor = (count, *z.shape), None
    if scores.factor is not None:
        factor = _wide(scores.factor).reshape(*shape, scores.factor.shape[-1])
    return _ByPoint(
        _wide(scores.scaled_score).reshape(shape),
        _wide(scores.c).reshape(shape) - 1,
        factor,
        scores.sign,
    )


def _first_order(score: Tensor, z: Tensor, kind: FirstOrder) -> Tensor:
    """sigma^2 times Eq. 3 or 32, per sample. score: points +, [-], [clean], each `(B, D)`."""
    if kind == "antithetic":
        both = ops.dsm_loss(score[:2].flatten(0, 1), torch.cat([z, -z]), 1.0, reduction="none")
        return both.reshape(2, z.shape[0]).mean(0)
    if kind == "vr":
        return ops.dsm_vr_loss(torch.stack([score[0], score[-1]]), z, 1.0, reduction="none")
    return ops.dsm_loss(score[0], z, 1.0, reduction="none")


def _second_order(at: _ByPoint, z: Tensor, variance_reduction: bool, diagonal: bool) -> Tensor:
    """sigma^4 times Eq. 13 or 17, or its variance-reduced form, per sample."""
    score, diag, factor, sign = at
    if variance_reduction:
        if diagonal:
            return ops.d2sm_diag_vr_loss(score, diag, z, 1.0, reduction="none")
        return ops.d2sm_vr_loss(score, diag, factor, z, 1.0, sign=sign, reduction="none")
    if diagonal:
        return ops.d2sm_diag_loss(score[0], diag[0], z, 1.0, reduction="none")
    columns = None if factor is None else factor[0]
    return ops.d2sm_loss(score[0], diag[0], columns, z, 1.0, sign=sign, reduction="none")


def _centred_order(
    at: _ByPoint, z: Tensor, noisy: int, variance_reduction: bool, diagonal: bool
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
    score, diag, factor, sign = at
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


def _wide(value: Tensor) -> Tensor:
    """float32 in place of half precision, else as it is."""
    return value.float() if value.dtype in HALF else value


def _column(value: Tensor | float, x: Tensor) -> Tensor | float:
    """A `(B,)` value, shaped to broadcast against `x (B, *dims)` and in its dtype."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


# ------------------------------------------------------------------------------------- the border


def check_objective(
    where: str,
    *,
    gamma: Any = 1.0,
    first_order: Any = "antithetic",
    detach_score: Any = True,
    centred: Any = RECOMMENDED["centred"],
    reduction: Any = "mean",
    **flags: Any,
) -> None:
    """What is fitted; the flags among it are True or False."""
    check_flag(where, detach_score=detach_score, centred=centred, **flags)
    named = isinstance(first_order, str) and first_order in ("antithetic", "vr", "plain")
    rule = "first_order must be 'antithetic', 'vr' or 'plain'"
    check(where, named, rule, lambda: show(first_order))
    check(where, is_number(gamma), "gamma must be a float", type(gamma).__name__, TypeError)
    check(where, gamma >= 0, "gamma must be at least 0", gamma)
    check(where, as_float(gamma) < math.inf, "gamma must be finite", gamma)
    fine = detach_score or not centred
    check(where, fine, "detach_score must be True with centred", detach_score)
    check_reduction(where, reduction)


def _check_batch(
    x0: Tensor, sigma: Any, alpha: Any, noise: Tensor | None, seed: Tensor | int | None
) -> tuple[Tensor | float, Tensor | float]:
    """sigma and alpha, as numbers of Python where they are numbers."""
    where = _WHERE
    check(where, isinstance(x0, Tensor), "x0 must be a Tensor", kind_name(x0), TypeError)
    fine, rule = x0.dim() > 1 and x0.is_floating_point(), "x0 must be floating point of shape"
    check(where, fine, f"{rule} (B, *dims)", lambda: f"{x0.dtype} of shape {tuple(x0.shape)}")
    levels = (
        _check_level("sigma", sigma, x0, positive=True),
        _check_level("alpha", alpha, x0, positive=False),
    )
    if noise is None:
        return levels
    check(where, seed is None, "seed must be None where noise is given", lambda: show(seed))
    kind = kind_name(noise)
    check(where, isinstance(noise, Tensor), "noise must be a Tensor", kind, TypeError)
    if noise.shape != x0.shape or noise.dtype != x0.dtype or noise.device != x0.device:
        want, got = ((tuple(t.shape), t.dtype, t.device) for t in (x0, noise))
        rule = "noise must have shape {}, dtype {} and device {} like x0".format(*want)
        raise ValueError(f"{where}: {rule}, got {', '.join(map(str, got))}")
    return levels


def _check_level(name: str, value: Any, x0: Tensor, *, positive: bool) -> Any:
    """sigma and alpha: a float or `(B,)`, without gradient, positive or finite; read on the CPU."""
    value = check_level(_WHERE, name, value, x0.shape[0], x0, positive=positive)
    if not isinstance(value, Tensor) or value.device.type != "cpu" or not is_plain(value):
        return value
    if torch.compiler.is_compiling() or functorch_active():
        return value
    good = value.isfinite() & (value > 0) if positive else value.isfinite()
    rule = f"{name} must be {'positive and finite' if positive else 'finite'}"
    check(_WHERE, good.all(), rule, lambda: value[~good].flatten()[0].item())
    return value


def least_sigma(centred: bool) -> float:
    """The lowest noise level of variance reduction under autocast, over the data's deviation.

    The gradient's variance with a network in bf16, over that in float32, for two networks: Eq. 33
    1.0 and 1.2 at 0.3, 1.4 and 2.3 at 0.2, 6 and 26 at 0.1, 87 and 435 at 0.05. Centred 1.1 and 1.3
    at 0.05: there rounding has more to hide behind.
    """
    return 0.05 if centred else 0.3


def refuse_rounding(
    where: str, model: object, x0: Tensor, sigma: Any, alpha: Any, centred: bool
) -> None:
    """What half precision cannot show: a second difference, divided by sigma^2."""
    rule = "variance reduction needs float32 or float64"
    check(where, x0.dtype not in HALF, rule, f"x0 {x0.dtype}")
    dtype = autocast_to(x0)
    if dtype is None:
        return
    ratio = sigma / alpha
    if isinstance(ratio, Tensor):
        if ratio.device.type != "cpu" or torch.compiler.is_compiling() or not is_plain(ratio):
            return
        ratio = ratio.min().item() if ratio.numel() else math.inf
    least = least_sigma(centred) * as_float(getattr(model, "sigma_data", 1.0))
    rule = f"sigma / alpha must be at least {least:.3g} for variance reduction under autocast to"
    rule = f"{rule} {dtype} (the objective with variance_reduction=False runs at any)"
    check(where, ratio >= least, rule, lambda: f"{ratio:.3g}")


def _check_scores(scores: Scores, points: Tensor, diagonal: bool, with_clean: bool) -> None:
    """What the model returned fits the points, and the precision that variance reduction needs."""
    where, good = _WHERE, isinstance(scores, Scores)
    check(where, good, "model must return Scores", lambda: kind_name(scores), TypeError)
    shape: Shape = tuple(points.shape)
    value: Any
    for name in ("scaled_score", "c", "factor"):
        value = getattr(scores, name)
        if name == "factor":
            if value is None:
                return
            shape = (points.shape[0], points.shape[1:].numel(), "r")
        rule, got = f"model must return {name} as a Tensor", type(value).__name__
        check(where, isinstance(value, Tensor), rule, got, TypeError)
        if not fits(value, shape):
            rule = f"model must return {name} of shape ({', '.join(map(str, shape))})"
            raise ValueError(f"{where}: {rule}, got {tuple(value.shape)}")
        rule = "variance reduction needs float32 or float64"
        fine = not with_clean or value.dtype not in HALF or autocast_to(points) is not None
        check(where, fine, rule, f"{name} {value.dtype}")
    rule = "diagonal=True needs a model without factor (rank 0)"
    check(where, not diagonal, rule, lambda: f"rank {value.shape[2]}")
