"""Scalars of numpy are numbers everywhere: the same result as Python's, of the same kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hos_ext
from hos_ext import diffusion, nn, ops, sampling, schedules
from hos_ext.app import data
from hos_ext.densities import Gaussian

X = torch.randn((3, 4), generator=torch.Generator().manual_seed(0))
Z = torch.randn((3, 4), generator=torch.Generator().manual_seed(1))
LAW = Gaussian(torch.zeros(4), torch.eye(4))
WIDE = hos_ext.DPLR(X.abs() + 1)


def model(x, sigma):
    return hos_ext.Scores(-x, torch.ones_like(x) / 2)


def drawn(**options):
    return sampling.sample(lambda x: -x, X.clone(), **options).draws


CALLS = {
    "langevin_step": lambda i, f: hos_ext.langevin_step(
        X, -X, f(0.25), seed=i(200), offset=i(2), first=i(3)
    ),
    "ozaki_step": lambda i, f: hos_ext.ozaki_step(X, -X, -X.abs(), f(0.25), seed=i(200)),
    "normal": lambda i, f: ops.normal((i(2), 3), seed=i(9), offset=i(1), first=i(1), stream=i(3)),
    "dsm_loss": lambda i, f: ops.dsm_loss(X, Z, f(0.5)),
    "d2sm_diag_loss": lambda i, f: ops.d2sm_diag_loss(X, Z, Z, f(0.5)),
    "score_matching_loss": lambda i, f: hos_ext.score_matching_loss(
        model, X, f(0.5), gamma=f(2.0), alpha=f(1.5), seed=i(200), offset=i(1), first=i(2)
    ),
    "sample": lambda i, f: drawn(
        step_size=f(0.25), n_steps=i(4), burn_in=i(1), thin=i(2), seed=i(3), first_chain=i(1)
    ),
    "posterior": lambda i, f: hos_ext.posterior(X, model(X, 1), f(0.5), f(1.5)).mean,
    "unscaled": lambda i, f: model(X, 1).unscaled(f(0.5)).score,
    "VP": lambda i, f: schedules.VP(beta_min=f(0.25)).sigma(f(0.5)),
    "sample_t": lambda i, f: schedules.VP().sample_t(i(3), seed=i(200)),
    "MLP": lambda i, f: nn.MLP((i(4),), rank=i(200), width=i(8), sigma_data=f(0.5)).config,
    "UNet": lambda i, f: (
        nn.UNet(
            (i(1), i(8), i(8)),
            i(200),
            channels=(i(8), i(8)),
            norm_num_groups=i(2),
            layers_per_block=i(1),
        ).config
    ),
    "DPLR.sample": lambda i, f: WIDE.sample(i(2), seed=i(200), first=i(1)),
    "DPLR.eigh": lambda i, f: WIDE.eigh(i(2))[0],
    "DPLR.scale": lambda i, f: (WIDE.scale(f(2.0)) + f(0.5)).diag,
    "Gaussian.sample": lambda i, f: LAW.sample(i(3), seed=i(200)),
    "Gaussian.noisy": lambda i, f: LAW.noisy(f(0.5), f(2.0)).covariance,
    "reverse_sde": lambda i, f: diffusion.reverse_sde(
        model, X, schedules.VP(), n_steps=i(3), seed=i(200)
    ),
    "shard": lambda i, f: sampling.shard(i(5), i(0), i(2)),
    "open_source": lambda i, f: (
        data.open_source("digits", seed=i(1), validation=i(20), test=i(10)).test
    ),
    "held out": lambda i, f: data.open_source("digits", validation=i(200), test=i(200)).parts,
    "credible_interval": lambda i, f: hos_ext.Posterior(X, WIDE).credible_interval(f(0.875))[0],
    "correlation": lambda i, f: hos_ext.Posterior(X, WIDE).correlation(i(1)),
}


@pytest.mark.parametrize("whole", [np.int64, np.uint8, np.int32])
@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("name", CALLS)
def test_numpy_scalars_are_numbers(name, whole, real):
    expected = CALLS[name](int, float)
    got = CALLS[name](whole, real)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
        assert got.dtype == expected.dtype
    elif name == "held out":
        assert all(map(torch.equal, got, expected))
    else:
        assert got == expected
        assert repr(got) == repr(expected)


@pytest.mark.parametrize("name", ["langevin_step", "normal", "sample", "DPLR.sample", "MLP"])
def test_bools_of_numpy_and_numbers_with_a_point_are_no_ints(name):
    for wrong in (np.bool_, np.float32):
        with pytest.raises(TypeError, match=r"must be an? (int|sequence of int)"):
            CALLS[name](wrong, float)


@pytest.mark.parametrize("device", ["cuda:7", "nonsense", 3])
def test_a_device_that_is_not_there_is_named(tmp_path, device):
    hos_ext.save_model(nn.MLP((4,), rank=1), tmp_path / "model")
    with pytest.raises((TypeError, ValueError), match=r"^load_model: device must be a device"):
        hos_ext.load_model(tmp_path / "model", device=device)


@pytest.mark.parametrize("name", ["n_steps", "burn_in", "thin", "chunk_size", "first_chain"])
def test_a_row_of_one_number_is_no_number(name):
    options = {"step_size": 0.25, "n_steps": 4, "seed": 3} | {name: torch.tensor([2])}
    with pytest.raises(TypeError, match=f"^sample: {name} must be an integer, got Tensor"):
        drawn(**options)
