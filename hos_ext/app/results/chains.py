"""The chains of `hos-ext chains`, and their files."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from ...conditions import Conditions
from ...sampling import RunawayWarning, diagnostics, distributed
from ...sampling.chains import Chains
from ...sampling.methods import OzakiIsotropic, make_step, method_names
from ...scores import Model, UnscaledScores, model_scores
from ...tweedie.posterior import posterior
from .. import data, plots, training
from ..evaluation.chains import law_of, scores_at
from .files import npz

# Seconds that a process waits for the slowest, its chains included. One that was killed is noticed
# at once.
_WAIT = 1800
# Learned variances differ from entry to entry, which this step refuses.
_UNFIT = (OzakiIsotropic.name, OzakiIsotropic.adjusted_name)


def methods() -> dict[str, float]:
    """The methods of `sampling.sample` that learned scores can drive, and step_size / sigma^2.

    Noise of level sigma makes the smallest variance of noisy data at least sigma^2, the unit in
    which a step states the step size to begin with.
    """
    steps = [make_step(name) for name in method_names() if name not in _UNFIT]
    return {step.name: step.relative_step_size for step in steps if UnscaledScores in step.accepts}


class Dynamics(NamedTuple):
    """What moves the chains.

    Attributes:
        sigma: noise level of the density that they sample. Data units.
        method: one of `methods()`.
        step_size: h, in squared data units.
        model_kwargs: conditions of the model, one row for each chain in each tensor.
    """

    sigma: float
    method: str
    step_size: float
    model_kwargs: Conditions = MappingProxyType({})


@contextmanager
def ranks(command: str = "chains", what: str = "chains") -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; alone, nothing changes.

    Args:
        command: for the error of a process that was lost.
        what: what they share out.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    with training.name_lost(command, _WAIT, lambda: f"while {what} were shared out"):
        dist.init_process_group("gloo", timeout=timedelta(seconds=_WAIT))
        try:
            yield
        finally:
            dist.destroy_process_group()


def run_chains_over_ranks(
    model: Model, init: Tensor, dynamics: Dynamics, **options: Any
) -> tuple[Chains, float]:
    """Chains of the density of noisy samples, over all ranks, and their smallest ESS.

    Args:
        model: `model(x, sigma) -> Scores`; its unscaled scores drive the chains.
        init: one start for each chain. Shape (chain, *dims).
        dynamics: what moves them.
        options: n_steps, burn_in, thin, seed and progress, as in `sampling.sample`.

    Returns:
        The chains of all ranks, and the smallest effective sample size of any entry.

    Whether they ran away is for `evaluation.chains_alarm` to say.
    """
    sigma, method, step_size, conditions = dynamics
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunawayWarning)
        chains = distributed.sample_sharded(
            scores_at(model, sigma),
            init,
            method=method,
            step_size=step_size,
            model_kwargs=conditions,
            **options,
        )
    return chains, diagnostics.min_ess(chains.draws)


def chains_files(method: str, *, netcdf: bool) -> list[str]:
    """The names that `drawn` gives its files."""
    endings = (".npz", ".png", ".nc") if netcdf else (".npz", ".png")
    return [f"chains-{method}{ending}" for ending in endings]


@torch.no_grad()
def drawn(
    model: Model,
    chains: Chains,
    starts: Tensor,
    dynamics: Dynamics,
    reference: Tensor,
    *,
    n_steps: int,
    scaling: data.Scaling,
    netcdf: bool,
) -> dict[str, bytes]:
    """The files of chains, by name: draws, the last of them denoised, a picture, ArviZ data.

    Args:
        model: `model(x, sigma) -> Scores`, which drove the chains.
        chains: what `run_chains_over_ranks` returned.
        starts: where they started. Shape (chain, *dims).
        dynamics: what moved them.
        reference: noisy held-out samples, draws of what the chains should sample.
        n_steps: of the run, after its burn-in.
        scaling: of the data.
        netcdf: whether ArviZ data are wanted.

    Returns:
        The content of each of `chains_files`.

    Raises:
        RuntimeError: matplotlib or an extra of ArviZ is missing.
    """
    sigma, method, step_size, conditions = dynamics
    draws = chains.draws
    last = model_scores("chains", model, draws[:, -1], sigma, conditions)
    ends = posterior(draws[:, -1], last, sigma).mean
    arrays = {
        "sigma": torch.tensor(sigma),
        "step_size": torch.tensor(step_size),
        "starts": starts,
        "draws": draws,
        "denoised": ends,
        "raw_denoised": scaling.raw_mean(ends),
        "sizes": chains.stats.get("sizes", draws.new_empty(len(draws), 0)),
        **{name: torch.tensor(value) for name, value in law_of(draws, reference).items()},
    }
    rows = [
        ("starts: noisy held-out samples", starts.cpu()),
        (f"{method}, the last draw of each chain", draws[:, -1].cpu()),
        ("the same, denoised", ends.cpu()),
    ]
    trace = plots.Trace(arrays["sizes"].cpu(), n_steps, reference.cpu())
    files = {
        f"chains-{method}.npz": npz(arrays),
        f"chains-{method}.png": plots.png(plots.chains_figure(rows, trace)),
    }
    if netcdf:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chains.nc"
            chains.to_arviz().to_netcdf(path, engine="h5netcdf")
            files[f"chains-{method}.nc"] = path.read_bytes()
    return files
