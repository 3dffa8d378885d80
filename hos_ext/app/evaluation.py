"""How good a model came out: denoising errors, calibration, accuracy against the truth, chains.

Everything is in data units, for samples of any dims, and goes over the rows in chunks of bounded
memory. The noise of a row is a function of (seed, part, row): every model and every noise level
sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..checks import check_count, check_number, check_samples, one_of
from ..linalg.dplr import DPLR
from ..random import STREAM_EVALUATION
from ..sampling import diagnostics
from ..sampling.chains import sample
from ..schedules import draw_sigma
from ..scores import Model, UnscaledScores
from ..tweedie.posterior import Posterior, posterior
from ..uncertainty.calibration import calibration, recalibration_factor
from . import data

_OFFSETS = {"test": 2, "validation": 1}
_TRUTH_OFFSET = 3
# Entries of x at a time, and rows: the factor of a posterior is r times that.
_ENTRIES, _ROWS = 2**19, 512
# Largest D of which whole D x D matrices are compared.
_DENSE = 512
# Rows of which `evaluate` takes eigenvectors: 10 to 25 ms each from 784 to 3072 entries.
_SPECTRA = 128
_COMPONENTS = 4
_LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Denoised(NamedTuple):
    """Samples at one noise level, clean (None where it is not known) and noisy, and posteriors."""

    sigma: float
    clean: Tensor | None
    noisy: Tensor
    posterior: Posterior


# --------------------------------------------------------------------------------------- denoising


@torch.no_grad()
def denoise(
    model: Model,
    noisy: Tensor,
    sigma: float,
    *,
    recalibration: float = 1.0,
) -> Denoised:
    """The posterior of what was there before noise of level sigma, for a batch of noisy samples.

    Args:
        model: `model(x, sigma) -> Scores`, in eval mode.
        noisy: shape (B, *dims), float32 or float64. Data units. It is moved to the device of the
            model, and the result is there.
        sigma: noise standard deviation, > 0. Data units.
        recalibration: scalar that every covariance is multiplied by, > 0: see `recalibrate`.

    Returns:
        Denoised, without clean samples.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.
    """
    check_samples("denoise", "noisy", noisy)
    number = check_number("denoise", "sigma", sigma)
    factor = check_number("denoise", "recalibration", recalibration)
    noisy = _to_device(model, noisy)
    chunk = _chunk(noisy.shape[1:])
    found = _join([posterior(x, model(x, number), number) for x in noisy.split(chunk)])
    return Denoised(number, None, noisy, found if factor == 1 else found.recalibrated(factor))


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
    rows = _count(where, "count", source, part, count)
    return _denoised(
        where, model, _clean(source, part, 0, rows, seed), sigma, part, 0, seed, recalibration
    )


@torch.no_grad()
def recalibrate(
    model: Model,
    source: data.Source,
    sigma_range: tuple[float, float] = (0.1, 1.2),
    *,
    seed: int,
    limit: int = 256,
) -> float:
    """One scalar a for all noise levels: a C is calibrated at tau = sigma / 2 on validation rows.

    Levels are log-uniform over sigma_range. In units of sigma every level has the same tau = 1/2,
    and scaled scores stay what they are, so that one call of `recalibration_factor` pools them.

    Args:
        model: `model(x, sigma) -> Scores`, in eval mode.
        source: see `data.open_source`.
        sigma_range: smallest and largest sigma, data units.
        seed: of dequantisation, levels and noise.
        limit: at most so many rows, the first; their posteriors are held in memory in float64.

    Returns:
        a > 0.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind; no validation rows;
            as `recalibration_factor`.
    """
    where, part = "recalibrate", "validation"
    low, high = (check_number(where, "sigma_range", value) for value in sigma_range)
    if low > high:
        raise ValueError(f"{where}: sigma_range must be increasing, got {sigma_range}")
    check_count(where, "limit", limit)
    rows = min(limit, _count(where, "limit", source, part, None))
    clean = _clean(source, part, 0, rows, seed)
    sigma = draw_sigma(len(clean), (low, high), seed=seed, offset=_OFFSETS[part])
    level = sigma.view(-1, *[1] * (clean.dim() - 1))
    noise = _noise(clean, seed, part, 0)
    unit, noisy = clean / level, clean + level * noise
    clean, unit, noise, noisy, sigma = (
        _to_device(model, value) for value in (clean, unit, noise, noisy, sigma)
    )
    found = [
        posterior(shifted, model(x, s), 1.0)
        for shifted, x, s in zip(
            *(value.split(_chunk(clean.shape[1:])) for value in (unit + noise, noisy, sigma)),
            strict=True,
        )
    ]
    return recalibration_factor(unit, _join(found), tau=0.5)


# ------------------------------------------------------------------------------------------ figures


def denoising_errors(result: Denoised) -> dict[str, float]:
    """Mean squared error of an entry, noisy and denoised, in squared data units."""
    clean = _known("denoising_errors", result)
    noisy = (result.noisy - clean).square().mean()
    denoised = (result.posterior.mean - clean).square().mean()
    return {"sigma": result.sigma, "mse_noisy": float(noisy), "mse_denoised": float(denoised)}


def calibration_figures(result: Denoised, recalibration: float) -> dict[str, float]:
    """`calibration` as it is and, with tau = sigma / 2, as a predictive check.

    Each as it comes from the model, and with the covariance times `recalibration`.
    """
    clean = _known("calibration_figures", result)
    raw, tau = result.posterior, result.sigma / 2
    scaled = raw.recalibrated(recalibration)
    figures = calibration(clean, raw)
    recalibrated = calibration(clean, scaled)
    predictive = calibration(clean, raw, tau=tau)
    predictive_recalibrated = calibration(clean, scaled, tau=tau)
    return {
        "sigma": result.sigma,
        **figures,
        **{f"{name}_recalibrated": value for name, value in recalibrated.items()},
        "predictive": predictive["mahalanobis"],
        "predictive_recalibrated": predictive_recalibrated["mahalanobis"],
        "n": len(clean),
    }


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
    check_count(where, "n", n)
    levels = _levels(where, sigmas)
    clean = truth.sample(n, seed=seed)
    size = clean.shape[1]
    shape = (size,) if dims is None else tuple(dims)
    if math.prod(shape) != size:
        raise ValueError(f"{where}: dims must have {size} entries like truth, got {shape}")
    noise = ops.normal(
        clean.shape, seed=seed, offset=_TRUTH_OFFSET, stream=STREAM_EVALUATION, dtype=clean.dtype
    ).to(clean.device)
    whole = size <= _DENSE
    chunk = max(1, min(_ROWS, _ENTRIES // (size**2 if whole else size)))
    rows: list[dict[str, Any]] = []
    for sigma in levels:
        noisy_law = truth.noisy(sigma)
        sums: dict[str, float] = {}
        for start in range(0, n, chunk):
            noisy = (clean + sigma * noise)[start : start + chunk]
            x = _to_model(model, noisy)
            exact_at = x.to(clean)  # the very point that the model sees
            scores = model(x.reshape(-1, *shape), sigma)
            found = posterior(x.reshape(-1, *shape), scores, sigma)
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
            for name, (value, exact) in pairs.items():
                exact = exact.double().flatten(1)
                error = value.flatten(1).to(exact) - exact
                for key, squares in ((f"{name}_error", error), (f"{name}_truth", exact)):
                    # the mean over entries, then the sum over rows
                    sums[key] = sums.get(key, 0.0) + float(squares.square().mean(1).sum())
        row: dict[str, Any] = {"sigma": sigma, "n": n}
        for name in ("s1", "s2_diag", "s2", "mean", "covariance"):
            squares, scale = sums.get(f"{name}_error"), sums.get(f"{name}_truth")
            row[f"{name}_mse"] = None if squares is None else squares / n
            row[f"{name}_relative"] = squares / scale if squares is not None and scale else None
        rows.append(row)
    finite: list[dict[str, Any]] = plain_json(rows)
    return finite


@torch.no_grad()
def evaluate(
    model: Model,
    source: data.Source,
    sigmas: Iterable[float],
    *,
    recalibration: float = 1.0,
    seed: int,
    part: str = "test",
    limit: int | None = None,
) -> dict[str, Any]:
    """All figures of a model on held-out rows, as plain JSON: numbers that do not exist are None.

    Args:
        model: `model(x, sigma) -> Scores`, in eval mode.
        source: see `data.open_source`.
        sigmas: noise levels, > 0. Data units.
        recalibration: scalar of the covariance, fitted on other rows: see `recalibrate`.
        seed: of dequantisation and noise.
        part: "test" or "validation".
        limit: at most so many rows, the first; None is all of them.

    Returns:
        {"source", "part", "dims", "n" (rows), "seed", "recalibration", "levels", "accuracy"}.
        "levels" has for each sigma "sigma", "n", "mse_noisy", "mse_denoised", "variance" (what the
        posterior expects "mse_denoised" to be, raw), the figures of `calibration_figures`, and
            "coverage": {"levels", "raw", "recalibrated"}: the share of the entries inside their
                central interval of each nominal probability (never inside: a negative variance);
            "components": {"n", "share", "expected"}: of the first n rows, the share of the squared
                error that lies along the leading eigenvectors of each covariance, and the share
                that the eigenvalues give them.
        "accuracy" is that of `accuracy`, None where the source has no true density.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind; the part is empty.
    """
    where = "evaluate"
    levels = _levels(where, sigmas)
    factor = check_number(where, "recalibration", recalibration)
    n = _count(where, "limit", source, part, None)
    if limit is not None:
        check_count(where, "limit", limit)
        n = min(n, limit)
    truth = source.truth
    report: dict[str, Any] = plain_json(
        {
            "source": source.spec,
            "part": part,
            "dims": list(source.shape),
            "n": n,
            "seed": seed,
            "recalibration": factor,
            "levels": [_level(model, source, sigma, part, n, seed, factor) for sigma in levels],
            "accuracy": None
            if truth is None
            else accuracy(model, truth, levels, n=min(n, 1024), seed=seed, dims=source.shape),
        }
    )
    return report


def plain_json(value: Any) -> Any:
    """The same with None for every number that JSON lacks, NaN and infinity."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _level(
    model: Model, source: data.Source, sigma: float, part: str, n: int, seed: int, factor: float
) -> dict[str, Any]:
    """The figures of `evaluate` at one noise level: sums over the rows, chunk by chunk."""
    sums: dict[str, Tensor | float] = {}
    chunk = _chunk(source.shape)
    for start in range(0, n, chunk):
        clean = _clean(source, part, start, min(start + chunk, n), seed)
        result = _denoised("evaluate", model, clean, sigma, part, start, seed, 1.0)
        rows = len(clean)
        means: dict[str, Tensor | float] = {
            **denoising_errors(result),
            **calibration_figures(result, factor),
            "variance": float(result.posterior.covariance.trace().double().mean())
            / clean[0].numel(),
            "coverage": _coverage(result, 1.0),
            "coverage_recalibrated": _coverage(result, factor),
        }
        for name, mean in means.items():
            sums[name] = sums.get(name, 0.0) + rows * mean
        spectra = min(rows, _SPECTRA - start)
        if spectra > 0:
            for name, total in _spectra(result, spectra).items():
                sums[name] = sums.get(name, 0.0) + total
    figures: dict[str, Any] = {}
    for name in ("mse_noisy", "mse_denoised", "variance", "mahalanobis", "predictive"):
        figures[name] = float(sums[name]) / n
        if f"{name}_recalibrated" in sums:
            figures[f"{name}_recalibrated"] = float(sums[f"{name}_recalibrated"]) / n
    # A ratio of means, not the mean of the ratios of chunks.
    ratio = _ratio(figures["mse_denoised"], figures["variance"])
    return {
        "sigma": sigma,
        "n": n,
        **figures,
        "trace_ratio": ratio,
        "trace_ratio_recalibrated": ratio / factor,
        "coverage": {
            "levels": list(_LEVELS),
            "raw": torch.as_tensor(sums["coverage"] / n).tolist(),
            "recalibrated": torch.as_tensor(sums["coverage_recalibrated"] / n).tolist(),
        },
        "components": {
            "n": min(n, _SPECTRA),
            "share": torch.as_tensor(sums["along"] / sums["square"]).tolist(),
            "expected": torch.as_tensor(sums["values"] / sums["trace"]).tolist(),
        },
    }


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom else math.nan


def _coverage(result: Denoised, factor: float) -> Tensor:
    """Share of the entries in their central interval of probability _LEVELS. Shape (L,), CPU."""
    error = (_known("evaluate", result) - result.posterior.mean).double()
    variance = factor * result.posterior.covariance.diagonal().double().reshape(error.shape)
    # NaN where the variance is negative: inside nowhere. `searchsorted` would go astray at a NaN.
    probability = torch.erf(error.abs() / (2 * variance).sqrt()).flatten()
    probability = probability.nan_to_num(math.inf).sort().values
    levels = torch.tensor(_LEVELS, dtype=torch.float64, device=error.device)
    inside = torch.searchsorted(probability, levels, right=True)
    return inside.double().cpu() / probability.numel()


def _spectra(result: Denoised, rows: int) -> dict[str, Tensor]:
    """Sums over the first rows: (v^T e)^2 and eigenvalues (k,), |e|^2 and the trace of C."""
    error = (_known("evaluate", result) - result.posterior.mean)[:rows].flatten(1).double()
    covariance = result.posterior.covariance.rows(slice(rows))
    k = min(_COMPONENTS, error.shape[1])
    values = error.new_full((k,), math.nan)
    along = values
    if bool(covariance.diag.isfinite().all() & covariance.factor.isfinite().all()):
        pairs = covariance.eigh(k)
        values = pairs[0].double().sum(0)
        along = (error.unsqueeze(1) @ pairs[1].double()).squeeze(1).square().sum(0)
    return {
        "along": along.cpu(),
        "values": values.cpu(),
        "square": error.square().sum().cpu(),
        "trace": covariance.trace().double().sum().cpu(),
    }


# ------------------------------------------------------------------------------------------- chains


def run_chains(
    model: Model,
    init: Tensor,
    sigma: float,
    *,
    method: str,
    step_size: float,
    n_steps: int,
    burn_in: int,
    thin: int = 1,
    seed: int,
    **options: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Chains of the density of noisy samples at one sigma, with their figures.

    Args:
        model: `model(x, sigma) -> Scores`; its unscaled scores drive the chains.
        init: one start for each chain. Shape (chain, *dims), on the device of the model.
        sigma: noise level, > 0. Data units.
        method, step_size, n_steps, burn_in, thin, seed: as in `samplers.sample`: any method but
            "ozaki_isotropic", which asks for scores that few models give.
        options: its further arguments, such as curvature, chunk_size and progress.

    Returns:
        draws (chain, draw, *dims), and {"method", "step_size", "min_ess", "us_per_step"}: the
        smallest effective sample size of any entry, all chains together (NaN for fewer than 4
        draws), and the time of one step of all chains, network included. Adjusted methods add
        "acceptance", the mean over steps and chains.

    Raises:
        ValueError, TypeError: as `samplers.sample`.
        RuntimeError: chains diverged.
    """
    level = check_number("run_chains", "sigma", sigma)

    def score_fn(x: Tensor) -> UnscaledScores:
        return model(x, level).unscaled(level)

    settings: dict[str, Any] = {"method": method, "step_size": step_size, "seed": seed}
    sample(score_fn, init, n_steps=3, **settings, **(options | {"progress": False}))  # warm-up
    chains = sample(
        score_fn, init, n_steps=n_steps, burn_in=burn_in, thin=thin, **settings, **options
    )
    diverged = int(chains.stats["diverged"].sum())
    if diverged:
        raise RuntimeError(
            f"run_chains: step_size must keep the chains finite, got {step_size} with which "
            f"{diverged} of {len(init)} {method} chains diverged"
        )
    enough = chains.draws.shape[1] >= 4
    figures = {
        "method": method,
        "step_size": step_size,
        "min_ess": diagnostics.min_ess(chains.draws) if enough else math.nan,
        "us_per_step": 1e6 * chains.stats["seconds"] / max(burn_in + n_steps, 1),
    }
    if "acceptance" in chains.stats:
        figures["acceptance"] = float(chains.stats["acceptance"].mean())
    return chains.draws, figures


# -------------------------------------------------------------------------------------------- rows


def _count(where: str, name: str, source: data.Source, part: str, count: int | None) -> int:
    """How many rows of the part to take; None is all of them."""
    one_of(where, "part", part, tuple(_OFFSETS))
    rows = len(_part(source, part))
    if rows == 0:
        raise ValueError(f"{where}: source must have {part} rows, got none in {source.spec}")
    if count is None:
        return rows
    check_count(where, name, count)
    if count > rows:
        raise ValueError(f"{where}: {name} must be at most {rows}, the {part} rows, got {count}")
    return count


def _clean(source: data.Source, part: str, low: int, high: int, seed: int) -> Tensor:
    """Rows low ... high - 1 of the part in data units, dequantised."""
    raw = _part(source, part)[low:high]
    return source.scaling.forward(raw, seed=seed, offset=_OFFSETS[part], first=low)


def _part(source: data.Source, part: str) -> Tensor:
    return source.test if part == "test" else source.validation


def _noise(clean: Tensor, seed: int, part: str, first: int) -> Tensor:
    return ops.normal(
        clean.shape,
        seed=seed,
        offset=_OFFSETS[part],
        first=first,
        stream=STREAM_EVALUATION,
        dtype=clean.dtype,
    )


def _denoised(
    where: str,
    model: Model,
    clean: Tensor,
    sigma: float,
    part: str,
    first: int,
    seed: int,
    recalibration: float,
) -> Denoised:
    """`denoise` of clean rows of a part, the first of them its row `first`, under their noise."""
    number = check_number(where, "sigma", sigma)
    noisy = clean + number * _noise(clean, seed, part, first)
    result = denoise(model, noisy, number, recalibration=recalibration)
    return result._replace(clean=_to_device(model, clean))


def _known(where: str, result: Denoised) -> Tensor:
    if result.clean is None:
        raise ValueError(f"{where}: result must hold the clean samples, got None")
    return result.clean


def _levels(where: str, sigmas: Iterable[float]) -> list[float]:
    levels = [check_number(where, "sigmas", sigma) for sigma in sigmas]
    if not levels:
        raise ValueError(f"{where}: sigmas must hold at least one level, got none")
    return levels


def _chunk(dims: Sequence[int]) -> int:
    return max(1, min(_ROWS, _ENTRIES // math.prod(dims)))


def _join(parts: list[Posterior]) -> Posterior:
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


def _to_device(model: Model, x: Tensor) -> Tensor:
    """x on the device of the model's parameters, where it has some."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return x if first is None else x.to(first.device)


def _to_model(model: Model, x: Tensor) -> Tensor:
    """x in the dtype and on the device of the model's parameters; without any, as data: float32."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return x.float() if first is None else x.to(first)
