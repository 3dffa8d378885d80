"""Posteriors of noisy samples, and how far their means are from the truth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check, check_count, check_number, check_samples
from ...conditions import Conditions, check_conditions, condition_rows, move_conditions
from ...linalg.dplr import DPLR
from ...scores import Model, model_scores
from ...tweedie.posterior import Posterior, posterior
from .. import data
from .rows import HeldOut, chunk_rows, held_out, to_device


class Denoised(NamedTuple):
    """Samples at one noise level, and their posteriors.

    Attributes:
        sigma: noise level. Data units.
        x0: clean samples, shape (B, *dims). Data units; None where they are not known.
        x: noisy samples, shape (B, *dims). Data units.
        posterior: of x0 given x.
    """

    sigma: float
    x0: Tensor | None
    x: Tensor
    posterior: Posterior


@torch.no_grad()
def denoise(
    model: Model,
    x: Tensor,
    sigma: float,
    *,
    recalibration: float = 1.0,
    model_kwargs: Conditions | None = None,
) -> Denoised:
    """The posterior of what was there before noise of level sigma, for a batch of noisy samples.

    Args:
        model: `model(x, sigma) -> Scores`, in eval mode.
        x: noisy samples. Shape (B, *dims), float32 or float64. Data units. They are moved to the
            device of the model, and the result is there.
        sigma: noise standard deviation, > 0. Data units.
        recalibration: scalar that every covariance is multiplied by, > 0: see `recalibrate`.
        model_kwargs: conditions of the model, each tensor of one row a sample.

    Returns:
        Denoised, without clean samples.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.
    """
    check_samples("denoise", "x", x)
    sigma = check_number("denoise", "sigma", sigma)
    scale = check_number("denoise", "recalibration", recalibration)
    conditions = check_conditions("denoise", model_kwargs, len(x))
    return _denoise(model, x, sigma, scale, conditions)


@torch.no_grad()
def denoise_held_out(
    model: Model,
    source: data.Source,
    sigma: float,
    *,
    part: str = "test",
    count: int | None = None,
    seed: int,
    recalibration: float = 1.0,
) -> Denoised:
    """`denoise` for the first rows of a part of the data, dequantised, with noise of level sigma.

    Where the source has labels, the model is told those of the rows.

    Args:
        model, sigma, recalibration: as in `denoise`.
        source: see `data.open_source`.
        part: "test" or "validation".
        count: rows; None is all of them.
        seed: of dequantisation and noise.

    Returns:
        Denoised, all rows in memory: D (r + 4) numbers for each.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind; the part is empty.
    """
    where = "denoise_held_out"
    rows = held_out(where, source, part, seed)
    if count is not None:
        count = check_count(where, "count", count)
        rule = f"count must be at most {len(rows)}, the {part} rows"
        check(where, count <= len(rows), rule, count)
        rows = rows.up_to(count)
    sigma = check_number(where, "sigma", sigma)
    scale = check_number(where, "recalibration", recalibration)
    return denoise_rows(model, rows, sigma, scale)


def denoise_rows(model: Model, rows: HeldOut, sigma: float, scale: float = 1.0) -> Denoised:
    """Held-out rows denoised under their noise; the covariances are multiplied by `scale`."""
    x0 = rows.clean()
    result = _denoise(model, x0 + sigma * rows.noise(x0), sigma, scale, rows.conditions)
    return result._replace(x0=to_device(model, x0))


def _denoise(
    model: Model, x: Tensor, sigma: float, scale: float, conditions: Conditions
) -> Denoised:
    x = to_device(model, x)
    conditions, size = move_conditions(conditions, x.device), chunk_rows(x.shape[1:])
    found = []
    for start in range(0, max(len(x), 1), size):
        rows = slice(start, start + size)
        told = condition_rows(conditions, rows)
        scores = model_scores("denoise", model, x[rows], sigma, told)
        found.append(posterior(x[rows], scores, sigma))
    whole = join(found)
    return Denoised(sigma, None, x, whole if scale == 1 else whole.recalibrated(scale))


def join(parts: list[Posterior]) -> Posterior:
    """The posteriors of all chunks as one."""
    if len(parts) == 1:
        return parts[0]
    covariances = [part.covariance for part in parts]
    return Posterior(
        torch.cat([part.mean for part in parts]),
        DPLR.of(
            torch.cat([each.diag for each in covariances]),
            torch.cat([each.factor for each in covariances]),
            covariances[0].sign,
        ),
    )


def denoising_errors(result: Denoised) -> dict[str, float]:
    """How much nearer to the truth denoising came.

    Args:
        result: of samples whose truth is known.

    Returns:
        {"sigma", "mse_noisy", "mse_denoised"}: mean squared errors of an entry, squared data units.

    Raises:
        ValueError: the clean samples are not known.
    """
    x0 = known("denoising_errors", result)
    noisy = (result.x - x0).square().mean()
    denoised = (result.posterior.mean - x0).square().mean()
    return {"sigma": result.sigma, "mse_noisy": float(noisy), "mse_denoised": float(denoised)}


def known(where: str, result: Denoised) -> Tensor:
    """The clean samples of a result, which must hold them."""
    if result.x0 is None:
        raise ValueError(f"{where}: result must hold the clean samples, got None")
    return result.x0
