"""The posterior behind a decoder: mean and standard deviation of pixels for a model of latents.

A latent model denoises z, and what one looks at is the picture g(z). The posterior of the latent is
N(m, C) with C = diag(d) + U diag(sign) U^T, which is known; that of the picture is that of g(z).
There are two ways to it.

"linear": g is replaced by its tangent at m. With J its Jacobian there,

    Var g_p = sum_k sign_k (J u_k)_p^2 + sum_i d_i J_pi^2

The first sum takes one product with J for each column of U and is exact. The second is the variance
of J diag(d)^(1/2) e for random signs e: an average over probes, or all D products. What the tangent
leaves out is measured by pairs m +- v, v from N(0, C), with o and q the odd and the even part of
g(m +- v) - g(m):

    Var g = E o^2 + Var q,    so that the variance lacks    E[o^2 - (J v)^2] + Var q.

Both terms vanish for a linear g, draw by draw, so that a few pairs tell it.

"samples": g of draws from N(m, C), with the standard error of their spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from ..checks import check, check_callable, check_count, check_seed, check_tensor, one_of, said_by
from ..conditions import Conditions, check_conditions, condition_rows, repeat_conditions
from ..linalg import hutchinson
from ..linalg.autodiff import differentiable
from ..linalg.dplr import DPLR
from ..random import Key, fresh_seed, seed_from
from ..records import RowRecord, sizes
from ..tweedie.posterior import Posterior, check_posterior

_WHERE = "decode_posterior"
Decoder = Callable[..., Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class DecodedPosterior(RowRecord):
    """Mean and standard deviation of the decoded sample, each with what is known of its error.

    Attributes:
        mean: of the picture. Shape (B, *pixels). The decoder's units. For "linear" it is the
            decoded mean of the latents, g(m); for "samples" the mean of the decoded draws.
        std: standard deviation of each entry. Like mean. NaN where its square came out negative,
            which a sign of -1 in the latent covariance may produce.
        std_error: standard error of std, from the finite number of probes or draws. Like mean. 0
            where std is exact.
        linear_error: what linearisation lacks: std of the decoded posterior less `std`, estimated
            by pairs of draws. Like mean. With few pairs it is rough in each entry: look at its size
            over the picture. None for "samples", which does not linearise, and for n_pairs=0.
    """

    mean: Tensor
    std: Tensor
    std_error: Tensor
    linear_error: Tensor | None

    def _summary(self) -> str:
        return sizes(self.mean)


class _Work(NamedTuple):
    """Some rows of the batch, and how to decode them."""

    decode: Decoder
    mean: Tensor
    covariance: DPLR
    key: Key
    group: int
    """How many decoded batches of these rows there may be at once."""


@torch.no_grad()
def decode_posterior(
    decoder: Decoder,
    posterior: Posterior,
    *,
    method: Literal["linear", "samples"] = "linear",
    n_probes: int | None = 32,
    n_pairs: int = 8,
    n_draws: int = 64,
    seed: int | None = None,
    first: int = 0,
    chunk_size: int = 8,
    model_kwargs: Conditions | None = None,
    generator: torch.Generator | None = None,
) -> DecodedPosterior:
    """Mean and standard deviation of g(z) for a latent z from the posterior, taken as a Gaussian.

    A decoder of diffusers with its scaling:

        decoder = lambda z: vae.decode(z / vae.config.scaling_factor).sample

    and z / scaling_factor + shift_factor where its config has a shift_factor. It must be in eval
    mode.

    Args:
        decoder: maps latents (n, *dims) to pictures (n, *pixels), each row by itself, as
            `decoder(z, **model_kwargs)`. For "linear" it must have a forward derivative in torch.
        posterior: of the latents: mean (B, *dims) and covariance, a `DPLR`. float32 or float64.
        method: "linear": the tangent of the decoder, r + n_probes forward derivatives and n_pairs
            times two pictures and a derivative; better where the posterior is narrow. "samples":
            n_draws pictures; right for any decoder, with an error of about std / sqrt(2 n_draws).
        n_probes: probes of the diagonal part, at least 2; None is the exact sum, one derivative for
            each entry of the latent. For "linear".
        n_pairs: pairs of draws that measure linear_error, 0 or at least 2. For "linear".
        n_draws: at least 2. For "samples".
        seed: key of all draws; None takes one from torch's default generator.
        generator: a `torch.Generator` in place of seed, which is drawn from it.
        first: global index of batch row 0: a part of a batch has the draws that the whole has.
        chunk_size: pictures decoded at once, which bounds the memory. A forward derivative takes
            that of two pictures.
        model_kwargs: conditions of the decoder, each tensor with B rows.

    Returns:
        A `DecodedPosterior`.

    Raises:
        TypeError: an argument has a wrong type, or the decoder returns no tensor.
        ValueError: an argument breaks the rules above, the diagonal part of the covariance has a
            negative value, or the decoder returns another number of rows.
        RuntimeError: "linear", and the decoder has no forward derivative.

    References:
        The tangent is the delta method. Probes: Bekas, Kokiopoulou and Saad 2007.

    Example:
        >>> import torch
        >>> from hos_ext import DPLR, Posterior
        >>> from hos_ext.uncertainty import decode_posterior
        >>> latent = Posterior(torch.ones(1, 2), DPLR(torch.tensor([[4.0, 1.0]])))
        >>> found = decode_posterior(lambda z: 3 * z, latent, n_probes=None, seed=0)
        >>> found.mean, found.std, found.std_error
        (tensor([[3., 3.]]), tensor([[6., 3.]]), tensor([[0., 0.]]))
    """
    where = _WHERE
    check_callable(where, "decoder", decoder)
    check_posterior(where, posterior)
    one_of(where, "method", method, ("linear", "samples"))
    if n_probes is not None:
        n_probes = check_count(where, "n_probes", n_probes, least=2)
    n_pairs = check_count(where, "n_pairs", n_pairs, least=0)
    check(where, n_pairs != 1, "n_pairs must be 0 or at least 2", n_pairs)
    n_draws = check_count(where, "n_draws", n_draws, least=2)
    chunk_size = check_count(where, "chunk_size", chunk_size)
    seed = seed_from(where, seed, generator)
    seed, _, first = check_seed(where, seed, offset=0, first=first)
    mean, covariance = posterior.mean, posterior.covariance
    conditions = check_conditions(where, model_kwargs, len(mean), "posterior.mean")
    check(where, len(mean) > 0, "posterior.mean must have rows", tuple(mean.shape))
    bad = covariance.diag < 0
    rule = "the diagonal part of posterior.covariance must be at least 0"
    check(where, not bool(bad.any()), rule, lambda: covariance.diag[bad][0].item())
    key = Key(fresh_seed() if seed is None else seed, 0, first)
    found = []
    for start in range(0, len(mean), chunk_size):
        rows = slice(start, start + chunk_size)
        z = mean[rows]
        work = _Work(
            partial(_decoded, decoder, condition_rows(conditions, rows), len(z)),
            z,
            covariance.rows(rows),
            key._replace(first=first + start),
            max(1, chunk_size // len(z)),
        )
        if method == "linear":
            found.append(_linear(work, n_probes, n_pairs))
        else:
            found.append(_samples(work, n_draws))
    mean, std, std_error = (
        torch.cat([getattr(part, name) for part in found]) for name in ("mean", "std", "std_error")
    )
    gaps = [part.linear_error for part in found if part.linear_error is not None]
    return DecodedPosterior(mean, std, std_error, torch.cat(gaps) if gaps else None)


def _decoded(decoder: Decoder, conditions: dict[str, Any], rows: int, z: Tensor) -> Tensor:
    """The pictures of latents (k rows, *dims): the same rows, k times one behind the other."""
    times = len(z) // rows
    pictures = decoder(z, **(repeat_conditions(conditions, times) if times > 1 else conditions))
    rule, got = "decoder must return a Tensor (as .sample of diffusers)", type(pictures).__name__
    check(_WHERE, isinstance(pictures, Tensor), rule, got, TypeError)
    fine = pictures.dim() > 0 and len(pictures) == len(z)
    rule = f"decoder must return {len(z)} rows for as many latents"
    check(_WHERE, fine, rule, lambda: tuple(pictures.shape))
    check_tensor(_WHERE, "decoder(z)", pictures, like=z)
    return pictures


# ------------------------------------------------------------------------------------ linearised


def _linear(work: _Work, n_probes: int | None, n_pairs: int) -> DecodedPosterior:
    d, factor, sign = work.covariance.diag, work.covariance.factor, work.covariance.sign
    centre = work.decode(work.mean)
    variance, start = torch.zeros_like(centre), 0
    for columns in factor.split(work.group, -1):
        if columns.shape[-1] == 0:
            continue
        squares = _pushed(work, columns).square()
        if sign is not None:
            part = sign[start : start + len(squares)]
            squares = squares * part.reshape(-1, *[1] * centre.dim())
        variance, start = variance + squares.sum(0), start + len(squares)
    root = d.sqrt().unsqueeze(-1)
    if n_probes is None:
        for _, columns in hutchinson.unit_vectors(d, work.group):
            variance = variance + _pushed(work, root * columns).square().sum(0)
        error = torch.zeros_like(variance)
    else:
        signs = hutchinson.random_signs(n_probes, work.key, d, work.group)
        terms = (_pushed(work, root * e).square().movedim(0, -1) for e in signs)
        estimate = hutchinson.mean(terms)
        variance, error = variance + estimate.value, estimate.standard_error
    std = variance.sqrt()
    gap = _lacking(work, centre, std, n_pairs) if n_pairs else None
    return DecodedPosterior(centre, std, _halved(error, std), gap)


def _lacking(work: _Work, centre: Tensor, std: Tensor, n_pairs: int) -> Tensor:
    """The estimate of linear_error."""
    odd, even, squares = (torch.zeros_like(centre) for _ in range(3))
    for v in _draws(work, n_pairs):
        shifts = v.movedim(0, -1).flatten(1, -2)
        straight = _pushed(work, shifts)
        plus, minus = (_all(work, work.mean + side) - centre for side in (v, -v))
        odd += ((plus - minus).square() / 4 - straight.square()).sum(0)
        both = (plus + minus) / 2
        even, squares = even + both.sum(0), squares + both.square().sum(0)
    spread = (squares - even.square() / n_pairs).clamp_min(0) / (n_pairs - 1)
    whole = (std.square() + odd / n_pairs + spread).clamp_min(0)
    return whole.sqrt() - std


def _pushed(work: _Work, columns: Tensor) -> Tensor:
    """J times columns (rows, D, k). Shape (k, rows, *pixels)."""
    k, shape = columns.shape[-1], work.mean.shape
    tangents = columns.movedim(-1, 0).reshape(k * shape[0], *shape[1:])
    points = work.mean.repeat(k, *[1] * (work.mean.dim() - 1))
    try:
        with differentiable():
            pushed: Tensor = jvp(work.decode, (points,), (tangents,))[1]
    except (RuntimeError, NotImplementedError) as error:
        rule = "decoder must have a forward derivative (method='samples' does without)"
        raise RuntimeError(f"{_WHERE}: {rule}, got: {str(error).splitlines()[0]}") from error
    return pushed.reshape(k, shape[0], *pushed.shape[1:])


# ----------------------------------------------------------------------------------- by samples


def _samples(work: _Work, n_draws: int) -> DecodedPosterior:
    # Powers of the distance from g(m), which is near the mean: little cancels in the moments.
    centre = work.decode(work.mean)
    sums = [torch.zeros_like(centre) for _ in range(4)]
    for v in _draws(work, n_draws):
        away = _all(work, work.mean + v) - centre
        power = torch.ones_like(away)
        for total in sums:
            power = power * away
            total += power.sum(0)
    a, b, c, e = (total / n_draws for total in sums)
    second = (b - a.square()).clamp_min(0)
    fourth = (e - 4 * a * c + 6 * a.square() * b - 3 * a.pow(4)).clamp_min(0)
    std = (second * (n_draws / (n_draws - 1))).sqrt()
    # Var s^2 = (mu4 - sigma^4 (n - 3) / (n - 1)) / n
    spread = (fourth - second.square() * ((n_draws - 3) / (n_draws - 1))).clamp_min(0) / n_draws
    return DecodedPosterior(centre + a, std, _halved(spread.sqrt(), std), None)


def _draws(work: _Work, n: int) -> Iterator[Tensor]:
    """n draws of N(0, C) in groups (k, rows, *dims)."""
    for start in range(0, n, work.group):
        count = min(work.group, n - start)
        with said_by(_WHERE, "DPLR.sample"):
            v = work.covariance.sample(
                count, seed=int(work.key.seed), offset=start, first=work.key.first
            )
        yield v.reshape(count, *work.mean.shape)


def _all(work: _Work, latents: Tensor) -> Tensor:
    """Pictures (k, rows, *pixels) of latents (k, rows, *dims)."""
    pictures: Tensor = work.decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
    return pictures


def _halved(error: Tensor, std: Tensor) -> Tensor:
    """The standard error of a root from that of its square; 0 where nothing varies."""
    return torch.where(error > 0, error / (2 * std), torch.zeros_like(std))
