"""Score matching of order k (Theorem 4 in Hermite form), and the objectives of Theorem 2.

Let x = alpha x0 + sigma z. Then E[He_k(z) | x] = (-sigma)^k psi_k. He_k is the Hermite tensor and
psi_k = (D^k p) / p is the k-th Bell polynomial of s1, ..., sk. So least squares on
(-1/sigma)^k He_k(z) fit psi_k. With s1, ..., s_(k-1) given they fit sk: k = 1 is denoising score
matching, k = 2 is Eq. 13 of Meng et al. 2021 (arXiv:2111.04726).

He_k is orthogonal to every polynomial of lower degree. So one may pair +z with -z and take Taylor
terms of psi_k below order k away: no mean changes, and the variance of the gradient is O(1) as
sigma -> 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp

from ..checks import (
    check,
    check_callable,
    check_count,
    check_flag,
    check_samples,
    check_tensor,
    per_sample,
    positive,
    refuse_dropout,
    refuse_half,
    show,
)
from ..ops._checks import check_key
from ..ops.noise import draw_normal
from ..random import STREAM_DIRECTION, STREAM_TRAINING, Key, seed_from
from ..tweedie.moments import bell, is_dense
from .reduction import Reduction, check_reduction, summed

Form = Literal["dense", "diagonal", "directional"]


def hermite(
    noise: Tensor, k: int, *, diagonal: bool = False, directions: Tensor | None = None
) -> Tensor:
    """The Hermite tensor He_k(z): z, z z^T - I, z (x) z (x) z - sym3(I (x) z), ...

    It is the k-th Bell polynomial of (z, -I, 0, ...). Elementwise this is a recursion from H_0 = 1:
    H_(j + 1) = a H_j - j b H_(j - 1), with (a, b) = (z_i, 1) on the diagonal and (<v, z>, |v|^2)
    along v.

    Args:
        noise: z. Shape (B, *dims). float32 or float64.
        k: order, >= 1.
        diagonal: the entries He_k[i, ..., i] only.
        directions: v, of any length: He_k[v, ..., v] only. Shape (B, m, D).

    Returns:
        Shape (B, D, ..., D) with k axes D in row-major order of dims; diagonal: (B, *dims);
        with directions: (B, m).

    Raises:
        TypeError: k is not an int.
        ValueError: shapes, dtypes or devices disagree, k is not positive, or diagonal comes with
            directions.

    Example:
        >>> import torch
        >>> from hos_ext.losses import hermite
        >>> hermite(torch.tensor([[2.0, 3.0]]), 3, diagonal=True)  # z^3 - 3 z
        tensor([[ 2., 18.]])
    """
    where = "hermite"
    check_flag(where, diagonal=diagonal)
    check_samples(where, "noise", noise)
    k = check_count(where, "k", k)
    if directions is not None:
        rule = "diagonal must be False where directions are given"
        check(where, not diagonal, rule, diagonal)
        _check_directions(where, directions, noise)
    return _hermite(noise, k, diagonal, directions)


def _hermite(noise: Tensor, k: int, diagonal: bool, directions: Tensor | None) -> Tensor:
    if directions is not None:
        along = (directions * noise.flatten(1).unsqueeze(1)).sum(
            -1
        )  # autocast would halve a matmul
        return bell([along, -directions.square().sum(-1)], k, False)[-1]
    if diagonal:
        return bell([noise, -torch.ones_like(noise)], k, False)[-1]
    z = noise.flatten(1)
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return bell([z, -eye.expand(*z.shape, z.shape[1])], k, True)[-1]


def order_k_loss(
    k: int,
    score_k: Tensor,
    lower_scores: list[Tensor],
    noise: Tensor,
    sigma: float | Tensor,
    *,
    directions: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Denoising score matching of order k, |psi_k - (-1/sigma)^k He_k(z)|^2 (Theorem 4).

    The scores do not move |He_k|^2 / sigma^(2k), which is left out, as in `d2sm_loss`. What is left
    is |psi_k|^2 - 2 (-1/sigma)^k <He_k, psi_k>, for any k. So k = 1 is `dsm_loss` without
    |z|^2 / sigma^2, and k = 2 is `d2sm_loss` or, diagonal, `d2sm_diag_loss`. The gradient has
    variance sigma^(-2k).

    Args:
        k: order, >= 1.
        score_k: the model of sk at alpha x0 + sigma z, units 1/data^k. float32 or float64.
            Dense: shape (B, D, ..., D) with k axes D, in row-major order of dims; the loss sums
            over all entries, so those that symmetry makes equal count each time.
            Diagonal: the entries sk[i, ..., i]. Shape (B, *dims).
            Directional: sk[v, ..., v] for each direction v. Shape (B, m).
        lower_scores: [s1, ..., s_(k - 1)] there, given, in the same form. Gradients flow to them:
            detach them where they are learned otherwise. psi_k is learned whatever they are.
        noise: standard normal draw z. Shape (B, *dims), dtype and device of score_k.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        directions: v, of any length, for the directional form. Shape (B, m, D).
        reduction: "mean" or "sum" over the batch, or "none".

    Returns:
        The loss, summed over entries (or directions): a scalar, or (B,) with reduction="none".
        It can be negative. Units 1/data^(2k).

    Raises:
        TypeError: k is not an int, or the scores are not tensors.
        ValueError: shapes, dtypes or devices disagree; k or sigma is not positive.

    References:
        Meng et al. 2021, arXiv:2111.04726, Theorem 4, for He_k(z) in place of x0 (x) ... (x) x0:
        unlike that moment it does not involve x, which would let errors in s1 bias sk.

    Example:
        >>> import torch
        >>> from hos_ext.losses import order_k_loss
        >>> score = torch.full((1, 2), -2.0)
        >>> order_k_loss(1, score, [], torch.ones(1, 2), 0.5)  # |s1|^2 + 2 <s1, z> / sigma
        tensor(-8.)
    """
    where = "order_k_loss"
    check_reduction(where, reduction)
    dense = _check_scores(where, k, score_k, lower_scores, noise, directions, 0)
    target = _target(where, k, noise, sigma, dense, directions)
    psi = bell([*lower_scores, score_k], k, dense)[-1]
    return summed(psi * (psi - 2 * target), reduction)


def order_k_vr_loss(
    k: int,
    score_k: Tensor,
    lower_scores: list[Tensor],
    noise: Tensor,
    sigma: float | Tensor,
    *,
    derivative: Tensor | None = None,
    directions: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """`order_k_loss` with reduced variance, for k = 1 to 4: the same mean, gradient variance O(1).

    (|psi+|^2 + |psi-|^2) / 2 - (-1/sigma)^k <He_k(z), difference>, psi+- at alpha x0 +- sigma z,
    psi0 at the clean point alpha x0, ' along sigma z there:

        k = 1: psi+ - psi-               k = 3: psi+ - psi- - 2 psi0'
        k = 2: psi+ + psi- - 2 psi0      k = 4: psi+ + psi- - 2 psi0 - psi0''

    What is taken away has mean zero, as He_k is orthogonal to lower powers of z. Rounding is
    divided by sigma^k: in float32 it adds less than 15 % to the variance of the gradient down to
    sigma = 0.001 for k = 2, 0.003 for k = 3 and 0.01 for k = 4 (tanh network, data of unit scale).

    Args:
        k: order, 1 to 4.
        score_k: as `order_k_loss`, at the points +, - and, for even k, clean, stacked: one more
            axis in front, of length 2 (k = 1, 3) or 3 (k = 2, 4).
        lower_scores: likewise.
        noise: standard normal draw z at the first point (-z at the second). Shape (B, *dims).
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        derivative: for k = 3 the first, for k = 4 the second derivative of
            t -> psi_k(alpha x0 + t sigma z) at t = 0, shape of psi_k at one point. Without it the
            gradient variance is sigma^-4.
        directions: as `order_k_loss`; the same at all points.
        reduction: "mean" or "sum" over the batch, or "none".

    Returns:
        As `order_k_loss`. k = 2 equals `d2sm_vr_loss` or, diagonal, `d2sm_diag_vr_loss`.

    Raises:
        TypeError: k is not an int, or the scores are not tensors.
        ValueError: shapes, dtypes or devices disagree; k is out of range, sigma is not positive,
            or derivative is given for k below 3.

    Example:
        >>> import torch
        >>> from hos_ext.losses import order_k_vr_loss
        >>> score = torch.tensor([[[-2.0]], [[2.0]]])  # at the points + and -
        >>> order_k_vr_loss(1, score, [], torch.ones(1, 1), 0.5)
        tensor(-4.)
    """
    where = "order_k_vr_loss"
    check_reduction(where, reduction)
    _check_vr_order(where, k)
    dense = _check_scores(where, k, score_k, lower_scores, noise, directions, 3 - k % 2)
    target = _target(where, k, noise, sigma, dense, directions)
    if derivative is not None:
        check(where, k >= 3, f"derivative must be None for k = {k}", "a tensor")
        check_tensor(where, "derivative", derivative, like=noise, shape=tuple(target.shape))
    psi = bell([*lower_scores, score_k], k, dense)[-1]
    return summed(_paired(k, psi, target, derivative), reduction)


def order_k_matching_loss(
    model: Callable[..., Tensor],
    x0: Tensor,
    sigma: float | Tensor,
    *,
    k: int,
    lower: Callable[..., list[Tensor]] | None = None,
    alpha: float | Tensor = 1.0,
    form: Form = "diagonal",
    n_directions: int = 1,
    variance_reduction: bool = True,
    scale_free: bool = True,
    noise: Tensor | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int = 0,
    first: int = 0,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Train a model of the order-k score by `order_k_vr_loss` (or `order_k_loss`).

    The batch is noised once, x = alpha x0 + sigma z. Models speak in scaled quantities,
    sigma^j s_j, of order one at every noise level. With variance reduction model and lower visit
    two points (k odd) or three (k even) in one batch. For k = 3 and 4 they visit the clean point
    once more under one `torch.func.jvp`, or two nested, which they must support.

    Args:
        model: `model(x, sigma)` -> sigma^k sk in the asked form, shapes as `order_k_loss`;
            `model(x, sigma, directions)` for the directional one. Must give each row the same
            value in any batch. x (N, *dims), sigma a float or (N,), directions (N, m, D).
        x0: clean samples. Shape (B, *dims). float32 or float64. Data units.
        sigma: noise standard deviation. float or (B,), > 0. Data units.
        k: order: 1 to 4 with variance reduction, else >= 1.
        lower: likewise -> [sigma s1, ..., sigma^(k - 1) s_(k - 1)] in the same form. Called under
            no_grad: Theorem 4 takes them as given. For k = 3 and 4 it must not detach its results
            itself, which would cut their derivative along z (no bias, more variance). None for
            k = 1.
        alpha: signal scale. float or (B,).
        form: "dense" for small D; "diagonal"; "directional": along unit directions drawn anew for
            each sample, E[(psi_k[v, ..., v] - target)^2], for any D.
        n_directions: directions for each sample, m.
        variance_reduction: False: one point, gradient variance sigma^(-2k) (before the weight of
            scale_free).
        scale_free: the loss times sigma^(2k), so that every noise level has the same weight.
        noise: standard normal draw z, shape, dtype and device of x0. None draws it.
        seed: key of the draws, an int or a 0-d int64 tensor. None takes one from torch's default
            generator.
        offset: second key, such as the step number; likewise.
        first: global index of row 0: ranks and micro-batches then draw what one batch would.
        reduction: "mean" or "sum" over the batch, or "none".
        generator: a `torch.Generator` in place of seed, which is drawn from it.

    Returns:
        The loss: a scalar, or (B,) with reduction="none", summed over entries (or directions),
        without the theta-free |He_k|^2. No units when scale_free, else 1/data^(2k).

    Raises:
        TypeError: k or n_directions is not an int, or a model returns something of another kind.
        ValueError: shapes, dtypes or devices disagree, or a value breaks the rules above; with
            variance reduction, active dropout (its masks differ between the points) or autocast
            (rounding is divided by sigma^k).

    Example:
        >>> import torch
        >>> from hos_ext.losses import order_k_matching_loss
        >>> model = lambda x, sigma: -x / sigma  # the scaled score of samples that are all 0
        >>> order_k_matching_loss(model, torch.zeros(4, 2), 0.5, k=1, noise=torch.ones(4, 2))
        tensor(-2.)
    """
    where = "order_k_matching_loss"
    check_callable(where, "model", model)
    check_flag(where, variance_reduction=variance_reduction, scale_free=scale_free)
    check_samples(where, "x0", x0)
    s, a = positive(where, "sigma", sigma, x0), per_sample(where, "alpha", alpha, x0)
    check_reduction(where, reduction)
    directional = isinstance(form, str) and form == "directional"
    rule = "form must be 'dense', 'diagonal' or 'directional'"
    known = isinstance(form, str) and form in ("dense", "diagonal", "directional")
    check(where, known, rule, lambda: show(form))
    n_directions = check_count(where, "n_directions", n_directions)
    rule = f"n_directions must be 1 for form {form!r}"
    check(where, directional or n_directions == 1, rule, n_directions)
    k = check_count(where, "k", k)
    rule = "be None for k = 1" if k == 1 else f"give s1 to s{k - 1}"
    check(where, (lower is None) == (k == 1), f"lower must {rule}", lambda: repr(lower))
    if lower is not None:
        check_callable(where, "lower", lower)
    seed = seed_from(where, seed, generator)
    seed, offset, first = check_key(where, seed, offset, first, x0)
    if noise is not None:
        rule = "seed must be None where nothing is drawn"
        check(where, directional or seed is None, rule, lambda: show(seed))
        check_tensor(where, "noise", noise, like=x0, shape=tuple(x0.shape))
    if variance_reduction:
        _check_vr_order(where, k)
        refuse_half(where, x0)
        refuse_dropout(where, model)
        refuse_dropout(where, lower)

    if seed is None and (noise is None or directional):
        seed = torch.randint(2**63 - 1, ())
    key = Key(0 if seed is None else seed, offset, first)
    if noise is None:
        noise = draw_normal(key, STREAM_TRAINING, x0.shape, x0)
    directions = None
    if directional:
        shape = (x0.shape[0], n_directions, x0.shape[1:].numel())
        directions = draw_normal(key, STREAM_DIRECTION, shape, x0)
        directions = directions / directions.norm(dim=-1, keepdim=True)

    def psi(*points: Tensor) -> Tensor:
        """sigma^k psi_k at each of the points, stacked."""
        count, arguments = len(points), [torch.cat(points), sigma]
        if isinstance(sigma, Tensor):
            arguments[1] = s.reshape(-1).expand(x0.shape[0]).repeat(count)
        if directions is not None:
            arguments.append(directions.repeat(count, 1, 1))
        scores = _model_scores(where, k, model, lower, arguments, form)
        value = bell(scores, k, form == "dense")[-1]
        return value.reshape(count, x0.shape[0], *value.shape[1:])

    # Scaled scores turn the loss into sigma^(2k) times itself, as if sigma were 1.
    target = (-1) ** k * _hermite(noise, k, form == "diagonal", directions)
    centre, shift = a * x0, s * noise
    if variance_reduction:
        points = [centre + shift, centre - shift, centre][: 3 - k % 2]
        derivative = _derivative(lambda t: psi(centre + t * shift)[0], k - 2, x0)
        entries = _paired(k, psi(*points), target, derivative)
    else:
        value = psi(centre + shift)[0]
        entries = value * (value - 2 * target)
    if not scale_free:
        entries = entries / s.reshape(-1, *[1] * (entries.dim() - 1)) ** (2 * k)
    return summed(entries, reduction)


# ------------------------------------------------------------------------------------------ pieces


def _target(
    where: str,
    k: int,
    noise: Tensor,
    sigma: float | Tensor,
    dense: bool,
    directions: Tensor | None,
) -> Tensor:
    """(-1/sigma)^k He_k(z), whose mean given x~ is psi_k."""
    diagonal = not dense and directions is None
    polynomial = _hermite(noise, k, diagonal, directions)
    return (-1 / positive(where, "sigma", sigma, polynomial)) ** k * polynomial


def _paired(k: int, psi: Tensor, target: Tensor, derivative: Tensor | None) -> Tensor:
    """The entries of the variance-reduced loss. psi: points +, -, [clean]."""
    # The difference meets sigma^-k in target: neighbours are subtracted first, which is exact.
    if k % 2:
        difference = psi[0] - psi[1]
    else:
        difference = (psi[0] - psi[2]) + (psi[1] - psi[2])
    if derivative is not None:
        difference = difference - (2 if k == 3 else 1) * derivative
    return psi[:2].square().mean(0) - target * difference


def _derivative(function: Callable[[Tensor], Tensor], order: int, like: Tensor) -> Tensor | None:
    """The first or second derivative of a function of one number at 0; None for other orders."""
    if order not in (1, 2):
        return None
    zero, one = like.new_zeros(()), like.new_ones(())

    def slope(t: Tensor) -> Tensor:
        tangent: Tensor = jvp(function, (t,), (one,))[1]
        return tangent

    if order == 1:
        return slope(zero)
    curvature: Tensor = jvp(slope, (zero,), (one,))[1]
    return curvature


def _model_scores(
    where: str,
    k: int,
    model: Callable[..., Tensor],
    lower: Callable[..., list[Tensor]] | None,
    arguments: list[Any],
    form: Form,
) -> list[Tensor]:
    """[sigma s1, ..., sigma^k sk] at the points: what the models return, which is checked."""
    given: list[Tensor] = []
    if lower is not None:
        with torch.no_grad():  # keeps forward-mode derivatives, which detach() would cut
            given = lower(*arguments)
        if not isinstance(given, (list, tuple)) or len(given) != k - 1:
            got = len(given) if isinstance(given, (list, tuple)) else type(given).__name__
            raise TypeError(f"{where}: lower must return a list of {k - 1} Tensors, got {got}")
    points = arguments[0]
    rows, size = points.shape[0], points.shape[1:].numel()
    scores = [*given, model(*arguments)]
    for j, score in enumerate(scores, 1):
        name = "what model returns" if j == k else f"what lower returns for s{j}"
        shape = tuple(points.shape)
        if form == "dense":
            shape = (rows, *[size] * j)
        elif form == "directional":
            shape = tuple(arguments[2].shape[:2])
        check_tensor(where, name, score, like=points, shape=shape)
    return scores


# -------------------------------------------------------------------------------------- the border


def _check_vr_order(where: str, k: Any) -> None:
    k = check_count(where, "k", k)
    check(where, k <= 4, "k must be at most 4 with variance reduction", k)


def _check_directions(where: str, directions: Any, noise: Tensor) -> None:
    rows, size = noise.shape[0], noise.shape[1:].numel()
    check_tensor(where, "directions", directions, like=noise, shape=(rows, "m", size))


def _check_scores(
    where: str,
    k: Any,
    score_k: Any,
    lower_scores: Any,
    noise: Any,
    directions: Tensor | None,
    points: int,
) -> bool:
    """Whether the scores are dense; refuses what does not fit together."""
    k = check_count(where, "k", k)
    check_samples(where, "noise", noise)
    kind, many = type(lower_scores), isinstance(lower_scores, (list, tuple))
    check(where, many, "lower_scores must be a list of Tensors", kind.__name__, TypeError)
    n = len(lower_scores)
    check(where, n == k - 1, f"lower_scores must hold {k - 1} for k = {k}", n)
    like = noise
    if directions is not None:
        _check_directions(where, directions, noise)
        like = noise.new_empty(directions.shape[:2])
    for j, score in enumerate(lower_scores):
        check_tensor(where, f"lower_scores[{j}]", score, like=noise)
    check_tensor(where, "score_k", score_k, like=noise)
    scores = [*lower_scores, score_k]
    return is_dense(where, "lower_scores and score_k", scores, like, directions is not None, points)
