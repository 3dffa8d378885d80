"""Errors of a model against the exact scores and posteriors of a known density."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import check, check_count
from ...linalg.dplr import DPLR
from ...ops.noise import draw_normal
from ...random import STREAM_EVALUATION, Key
from ...scores import Model
from ...tweedie.posterior import posterior
from .plain import plain_json
from .rows import TRUTH_OFFSET, chunk_rows, noise_levels, to_model

# Largest D of which whole D x D matrices are compared.
_DENSE = 512
_NAMES = ("s1", "s2_diag", "s2", "mean", "covariance")


@torch.no_grad()
def accuracy(
    model: Model,
    truth: Any,
    sigmas: Iterable[float],
    *,
    n: int = 1024,
    seed: int,
    dims: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """How far a model is from the exact scores and posteriors of a known density.

    At each sigma, over n draws of the noisy law: the mean squared error of an entry and, relative,
    the same over the mean square of the true entry, for

        s1, s2_diag, s2            score, Hessian diagonal and whole Hessian of log q
        mean, covariance           of the clean sample given the noisy one, as the model has them

    Args:
        model: `model(x, sigma) -> Scores`, in eval mode; called in the dtype of its parameters,
            in float32 if it has none.
        truth: the density of clean samples, one of `densities`.
        sigmas: noise levels, > 0. Data units.
        n: draws for each level.
        seed: of draws and noise.
        dims: shape that the model takes; None is (D,).

    Returns:
        For each sigma {"sigma", "n", "s1_mse", "s1_relative", ...}. None for s2 and covariance
        where D > 512, for a figure that is not finite, and relative to a truth that is zero.
        Units: s1 1/data^2, s2 1/data^4, mean data^2, covariance data^4.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.
    """
    where = "accuracy"
    n = check_count(where, "n", n)
    levels = noise_levels(where, sigmas)
    x0 = truth.sample(n, seed=seed)
    size = x0.shape[1]
    shape = (size,) if dims is None else tuple(dims)
    check(where, math.prod(shape) == size, f"dims must have {size} entries like truth", shape)
    noise = draw_normal(Key(seed, TRUTH_OFFSET), STREAM_EVALUATION, x0.shape, x0)
    whole = size <= _DENSE
    chunk = chunk_rows((size, size) if whole else (size,))
    rows = []
    for sigma in levels:
        sums: dict[str, float] = defaultdict(float)
        for x in (x0 + sigma * noise).split(chunk):
            pairs = _estimates(model, truth, x, sigma, shape, whole=whole)
            for name, (value, exact) in pairs.items():
                exact = exact.double().flatten(1)
                error = value.flatten(1).to(exact) - exact
                # The mean over entries, then the sum over rows.
                sums[f"{name}_error"] += float(error.square().mean(1).sum())
                sums[f"{name}_truth"] += float(exact.square().mean(1).sum())
        rows.append({"sigma": sigma, "n": n, **_figures(sums, n)})
    finite: list[dict[str, Any]] = plain_json(rows)
    return finite


def _estimates(
    model: Model, truth: Any, x: Tensor, sigma: float, dims: tuple[int, ...], *, whole: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """What the model says at noisy samples x (n, D), and what is true, by name."""
    noisy_law = truth.noisy(sigma)
    seen = to_model(model, x).reshape(-1, *dims)
    exact_at = seen.flatten(1).to(x)  # the very point that the model sees
    scores = model(seen, sigma)
    found = posterior(seen, scores, sigma)
    plain = scores.unscaled(sigma)
    hessian = DPLR.of(plain.diag.flatten(1), plain.factor, plain.sign)
    pairs = {
        "s1": (plain.score, noisy_law.score(exact_at)),
        "s2_diag": (hessian.diagonal(), noisy_law.hessian_diag(exact_at)),
        "mean": (found.mean, truth.posterior_mean(exact_at, sigma)),
    }
    if whole:
        covariance = truth.posterior_covariance(exact_at, sigma)
        pairs["s2"] = (hessian.dense(), noisy_law.hessian(exact_at))
        pairs["covariance"] = (found.covariance.dense(), covariance)
    return pairs


def _figures(sums: Mapping[str, float], n: int) -> dict[str, float | None]:
    """Mean squared errors, and the same over the mean square of the truth; None where not known."""
    figures: dict[str, float | None] = {}
    for name in _NAMES:
        squares, scale = sums.get(f"{name}_error"), sums.get(f"{name}_truth")
        figures[f"{name}_mse"] = None if squares is None else squares / n
        figures[f"{name}_relative"] = squares / scale if squares is not None and scale else None
    return figures
