"""Score matching of order k (Theorem 4 in Hermite form), and the objectives of Theorem 2.

With x = alpha x0 + sigma z, E[He_k(z) | x] = (-sigma)^k psi_k, psi_k = (D^k p) / p the k-th Bell
polynomial of s1, ..., sk and He_k the Hermite tensor. So least squares on (-1/sigma)^k He_k(z) fit
psi_k, and with s1, ..., s_(k-1) given they fit sk: k = 1 is denoising score matching, k = 2 is Eq.
13 of Meng et al. 2021 (arXiv:2111.04726). He_k is orthogonal to every polynomial of lower degree:
pairing +z with -z and taking Taylor terms of psi_k below order k away changes no mean and leaves a
gradient variance of O(1) as sigma -> 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp

from .. import ops
from ..checks import (
    check_count,
    check_like,
    check_samples,
    check_tensor,
    per_sample,
    positive,
    refuse_dropout,
    refuse_half,
)
from ..random import STREAM_DIRECTION, STREAM_TRAINING
from ..tweedie.moments import bell, is_dense, posterior_moments, project

Reduction = Literal["mean", "sum", "none"]


# ----------------------------------------------------------------------------- operators


def hermite(
    noise: Tensor, k: int, *, diagonal: bool = False, directions: Tensor | None = None
) -> Tensor:
    """The Hermite tensor He_k(z): z, z z^T - I, z (x) z (x) z - sym3(I (x) z), ...

    It is the k-th Bell polynomial of (z, -I, 0, ...). Elementwise that is the recursion
    H_(j + 1) = a H_j - j b H_(j - 1), H_0 = 1, with (a, b) = (z_i, 1) on the diagonal and
    (<v, z>, |v|^2) along v.

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
    """
    where = "hermite"
    check_samples(where, "noise", noise)
    check_count(where, "k", k)
    if diagonal and directions is not None:
        raise ValueError(f"{where}: diagonal must be False where directions are given, got True")
    if directions is not None:
        along = project(where, noise, directions)
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

    The part |He_k|^2 / sigma^(2k), which the scores do not move, is left out, as in `d2sm_loss`:
    |psi_k|^2 - 2 (-1/sigma)^k <He_k, psi_k>. So k = 1 is `dsm_loss` without |z|^2 / sigma^2, k = 2
    `d2sm_loss` or, diagonal, `d2sm_diag_loss`. Any k. Its gradient has variance sigma^(-2k).

    Args:
        k: order, >= 1.
        score_k: the model of sk at alpha x + sigma z, units 1/data^k. float32 or float64.
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

    Reference:
        Meng et al. 2021, arXiv:2111.04726, Theorem 4, for He_k(z) in place of x (x) ... (x) x:
        unlike that moment it does not involve x~, which would let errors in s1 bias sk.
    """
    where = "order_k_loss"
    dense = _check_scores(where, k, score_k, lower_scores, noise, directions, 0)
    target = _target(where, k, noise, sigma, dense, directions)
    psi = bell([*lower_scores, score_k], k, dense)[-1]
    return _reduce(where, psi * (psi - 2 * target), reduction)


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

    (|psi+|^2 + |psi-|^2) / 2 - (-1/sigma)^k <He_k(z), difference>, psi+- at alpha x +- sigma z,
    psi0 at the clean point alpha x, ' along sigma z there:

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
            t -> psi_k(alpha x + t sigma z) at t = 0, shape of psi_k at one point. Without it the
            gradient variance is sigma^-4.
        directions: as `order_k_loss`; the same at all points.
        reduction: "mean" or "sum" over the batch, or "none".

    Returns:
        As `order_k_loss`. k = 2 equals `d2sm_vr_loss` or, diagonal, `d2sm_diag_vr_loss`.

    Raises:
        TypeError: k is not an int, or the scores are not tensors.
        ValueError: shapes, dtypes or devices disagree; k is out of range, sigma is not positive,
            or derivative is given for k below 3.
    """
    where = "order_k_vr_loss"
    _check_vr_order(where, k)
    dense = _check_scores(where, k, score_k, lower_scores, noise, directions, 3 - k % 2)
    target = _target(where, k, noise, sigma, dense, directions)
    if derivative is not None:
        if k < 3:
            raise ValueError(f"{where}: derivative must be None for k = {k}, got a tensor")
        check_tensor(where, "derivative", derivative, like=noise, shape=tuple(target.shape))
    psi = bell([*lower_scores, score_k], k, dense)[-1]
    return _reduce(where, _paired(k, psi, target, derivative), reduction)


def order_k_matching_loss(
    model: Callable[..., Tensor],
    x: Tensor,
    sigma: float | Tensor,
    *,
    k: int,
    lower: Callable[..., list[Tensor]] | None = None,
    alpha: float | Tensor = 1.0,
    form: Literal["dense", "diagonal", "directional"] = "diagonal",
    n_directions: int = 1,
    variance_reduction: bool = True,
    scale_free: bool = True,
    noise: Tensor | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int = 0,
    first: int = 0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Train a model of the order-k score by `order_k_vr_loss` (or `order_k_loss`).

    The batch is noised once, x~ = alpha x + sigma z. Models speak in scaled quantities,
    sigma^j s_j, of order one at every noise level. With variance reduction model and lower visit
    two (k odd) or three points in one batch and, for k = 3 and 4, the clean point once more under
    one `torch.func.jvp`, or two nested, which they must support.

    Args:
        model: `model(x, sigma)` -> sigma^k sk in the asked form, shapes as `order_k_loss`;
            `model(x, sigma, directions)` for the directional one. Must give each row the same
            value in any batch. x (N, *dims), sigma a float or (N,), directions (N, m, D).
        x: clean samples. Shape (B, *dims). float32 or float64. Data units.
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
        noise: standard normal draw z, shape, dtype and device of x. None draws it.
        seed: key of the draws, an int or a 0-d int64 tensor. None takes one from torch's default
            generator.
        offset: second key, such as the step number; likewise.
        first: global index of row 0: ranks and micro-batches then draw what one batch would.
        reduction: "mean" or "sum" over the batch, or "none".

    Returns:
        The loss: a scalar, or (B,) with reduction="none", summed over entries (or directions),
        without the theta-free |He_k|^2. No units when scale_free, else 1/data^(2k).

    Raises:
        TypeError: k or n_directions is not an int, or a model returns something of another kind.
        ValueError: shapes, dtypes or devices disagree, or a value breaks the rules above; with
            variance reduction, active dropout (its masks differ between the points) or autocast
            (rounding is divided by sigma^k).
    """
    where = "order_k_matching_loss"
    check_samples(where, "x", x)
    s = positive(where, "sigma", sigma, x)
    a = per_sample(where, "alpha", alpha, x)
    if form not in ("dense", "diagonal", "directional"):
        raise ValueError(
            f"{where}: form must be 'dense', 'diagonal' or 'directional', got {form!r}"
        )
    check_count(where, "k", k)
    check_count(where, "n_directions", n_directions)
    if (lower is None) != (k == 1):
        rule = "be None for k = 1" if k == 1 else f"give s1 to s{k - 1}"
        raise ValueError(f"{where}: lower must {rule}, got {lower}")
    if variance_reduction:
        _check_vr_order(where, k)
        refuse_half(where, x)
        networks: Any = (model, lower)
        for network in networks:
            refuse_dropout(where, network)
    if form != "directional" and n_directions != 1:
        raise ValueError(f"{where}: n_directions must be 1 for form {form!r}, got {n_directions}")
    if noise is not None and form != "directional":
        if seed is not None:
            raise ValueError(f"{where}: seed must be None where nothing is drawn, got {seed}")
    elif seed is None:
        seed = torch.randint(2**63 - 1, ())

    def draw(shape: tuple[int, ...], stream: int) -> Tensor:
        keys: dict[str, Any] = {"seed": seed, "offset": offset, "first": first, "stream": stream}
        return ops.normal(shape, dtype=x.dtype, device=x.device, **keys)

    if noise is None:
        noise = draw(tuple(x.shape), STREAM_TRAINING)
    check_tensor(where, "noise", noise, like=x, shape=tuple(x.shape))
    rows, size = x.shape[0], x.shape[1:].numel()
    directions = None
    if form == "directional":
        directions = draw((rows, n_directions, size), STREAM_DIRECTION)
        directions = directions / directions.norm(dim=-1, keepdim=True)

    def psi(*points: Tensor) -> Tensor:
        """sigma^k psi_k at each of the points, stacked."""
        count = len(points)
        arguments: list[Any] = [torch.cat(points), sigma]
        if isinstance(sigma, Tensor):
            arguments[1] = s.reshape(-1).expand(rows).repeat(count)
        if directions is not None:
            arguments.append(directions.repeat(count, 1, 1))
        given: list[Tensor] = []
        if lower is not None:
            with torch.no_grad():  # keeps forward-mode derivatives, which detach() would cut
                given = lower(*arguments)
            if not isinstance(given, (list, tuple)) or len(given) != k - 1:
                got = f"{len(given)}" if isinstance(given, (list, tuple)) else type(given).__name__
                raise TypeError(f"{where}: lower must return a list of {k - 1} Tensors, got {got}")
        scores = [*given, model(*arguments)]
        for j, score in enumerate(scores, 1):
            name = "what model returns" if j == k else f"what lower returns for s{j}"
            shape = {
                "dense": (count * rows, *[size] * j),
                "diagonal": (count * rows, *x.shape[1:]),
                "directional": (count * rows, n_directions),
            }[form]
            check_tensor(where, name, score, like=x, shape=shape)
        value = bell(scores, k, form == "dense")[-1]
        return value.reshape(count, rows, *value.shape[1:])

    # Scaled scores turn the loss into sigma^(2k) times itself, as if sigma were 1.
    diagonal = form == "diagonal"
    target = (-1) ** k * hermite(noise, k, diagonal=diagonal, directions=directions)
    centre, shift = a * x, s * noise
    if variance_reduction:
        points = [centre + shift, centre - shift, centre][: 3 - k % 2]
        derivative = _derivative(lambda t: psi(centre + t * shift)[0], k - 2, x)
        entries = _paired(k, psi(*points), target, derivative)
    else:
        value = psi(centre + shift)[0]
        entries = value * (value - 2 * target)
    if not scale_free:
        entries = entries / s.reshape(-1, *[1] * (entries.dim() - 1)) ** (2 * k)
    return _reduce(where, entries, reduction)


# ---------------------------------------------------------------- reference objectives, Theorem 2


def second_moment_loss(
    x: Tensor,
    x_noisy: Tensor,
    score: Tensor,
    hessian: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Eq. 11, |x x^T - E_model[x x^T | x~]|^2: a reference, not to be trained on.

    alpha^2 times its residual is -sigma^4 (psi + C) - sigma sym(x~ (z + sigma s1)^T), against
    psi + C of Eq. 13, C = (I - z z^T) / sigma^2. The second term has mean zero only where s1 is
    exact: with s1 off by delta the minimiser is psi - sym(x~ delta^T) / sigma^2, sym(A) = A + A^T,
    where Eq. 12 and 13 (`d2sm_loss`) still learn psi. And its gradient has variance sigma^-6
    against sigma^-4 (after division by sigma^8).

    Args:
        x: clean samples. Shape (B, *dims). float32 or float64. Data units.
        x_noisy: alpha x + sigma z, same shape, dtype and device.
        score: the model of s1 at x_noisy. Shape (B, *dims). Units 1/data.
        hessian: the model of s2 at x_noisy. Shape (B, D, D), D in row-major order of dims; small D.
            Units 1/data^2.
        sigma: noise standard deviation, units of the data. float or (B,), > 0.
        alpha: signal scale. float or (B,), > 0.
        reduction: "mean" or "sum" over the batch, or "none".

    Returns:
        The loss, summed over entries, constants included: a scalar, or (B,) with
        reduction="none". Units data^4.

    Raises:
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.

    Reference:
        Meng et al. 2021, arXiv:2111.04726, Theorem 2, Eq. 11, with alpha.
    """
    where = "second_moment_loss"
    scores = _check_second(where, x, x_noisy, score, hessian)
    positive(where, "sigma", sigma, x)
    positive(where, "alpha", alpha, x)
    model = posterior_moments(x_noisy, scores, sigma, alpha)[1]
    return _reduce(where, (_outer(x) - model).square(), reduction)


def noise_moment_loss(
    x: Tensor,
    x_noisy: Tensor,
    score: Tensor,
    hessian: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Eq. 12, |(alpha x - x~)(alpha x - x~)^T - sigma^2 I - sigma^4 psi|^2: a reference.

    It is sigma^8 times Eq. 13, |psi + (I - z z^T) / sigma^2|^2: `d2sm_loss` plus its constant.

    Args:
        x, x_noisy, score, hessian, sigma, alpha, reduction: as `second_moment_loss`.

    Returns:
        The loss, summed over entries, constants included: a scalar, or (B,) with
        reduction="none". Units data^4.

    Raises:
        ValueError: shapes, dtypes or devices disagree; sigma or alpha is not positive.

    Reference:
        Meng et al. 2021, arXiv:2111.04726, Theorem 2, Eq. 12, with alpha.
    """
    where = "noise_moment_loss"
    scores = _check_second(where, x, x_noisy, score, hessian)
    error = positive(where, "alpha", alpha, x) * x - x_noisy
    variance = positive(where, "sigma", sigma, hessian).square()
    eye = torch.eye(hessian.shape[-1], dtype=x.dtype, device=x.device)
    residual = _outer(error) - variance * eye - variance.square() * bell(scores, 2, True)[1]
    return _reduce(where, residual.square(), reduction)


# ------------------------------------------------------------------------------------------ pieces


def _check_vr_order(where: str, k: Any) -> None:
    check_count(where, "k", k)
    if k > 4:
        raise ValueError(f"{where}: k must be at most 4 with variance reduction, got {k}")


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
    check_count(where, "k", k)
    check_samples(where, "noise", noise)
    if not isinstance(lower_scores, (list, tuple)):
        raise TypeError(
            f"{where}: lower_scores must be a list of Tensors, got {type(lower_scores).__name__}"
        )
    if len(lower_scores) != k - 1:
        raise ValueError(
            f"{where}: lower_scores must hold {k - 1} for k = {k}, got {len(lower_scores)}"
        )
    like = noise if directions is None else project(where, noise, directions)
    scores = [*lower_scores, score_k]
    return is_dense(where, "scores", scores, like, directions is not None, points)


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
    polynomial = hermite(noise, k, diagonal=diagonal, directions=directions)
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


def _check_second(
    where: str, x: Tensor, x_noisy: Tensor, score: Tensor, hessian: Tensor
) -> list[Tensor]:
    check_samples(where, "x", x)
    check_like(where, "x_noisy", x_noisy, x)
    check_like(where, "score", score, x)
    size = x.shape[1:].numel()
    check_tensor(where, "hessian", hessian, like=x, shape=(x.shape[0], size, size))
    return [score.flatten(1), hessian]


def _outer(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return flat.unsqueeze(-1) * flat.unsqueeze(-2)


def _reduce(where: str, entries: Tensor, reduction: str) -> Tensor:
    """Sums over the entries of a sample, then over the batch as asked."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{where}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    loss = entries.flatten(1).sum(1)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
