"""Chains beside those of an established library: blackjax's MALA on the same mixture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hos_ext import sample
from hos_ext.densities import GaussianMixture

F64 = torch.float64
CHAINS, STEPS, H = 8000, 20, 0.3


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=F64)
    covariances = torch.tensor([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]], dtype=F64)
    return GaussianMixture(torch.tensor([0.4, 0.6], dtype=F64), means, covariances)


def peer_chains(mixture: GaussianMixture, init: Tensor) -> tuple[Tensor, Tensor]:
    """Draws (chain, *dims) after STEPS steps of blackjax's MALA, and the mean acceptance."""
    blackjax = pytest.importorskip("blackjax")
    import jax

    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy
    weights, means, covariances = (
        jnp.asarray(t.numpy()) for t in (mixture.weights, mixture.means, mixture.covariances)
    )
    normal = jax.scipy.stats.multivariate_normal.logpdf

    def log_density(x):
        parts = jax.vmap(lambda m, c: normal(x, m, c))(means, covariances)
        return jax.scipy.special.logsumexp(parts + jnp.log(weights))

    kernel = blackjax.mala(log_density, step_size=H)

    def step(state, key):
        state, info = jax.vmap(kernel.step)(jax.random.split(key, CHAINS), state)
        return state, info.acceptance_rate.mean()

    state = jax.vmap(kernel.init)(jnp.asarray(init.numpy()))
    state, rates = jax.jit(lambda s, k: jax.lax.scan(step, s, k))(
        state, jax.random.split(jax.random.key(0), STEPS)
    )
    return torch.tensor(jax.device_get(state.position)), torch.tensor(jax.device_get(rates))


def test_mala_agrees_with_blackjax(mixture):
    """From one start point: the same law on the way (not stationary yet), the same acceptance."""
    init = torch.full((CHAINS, 2), 1.5, dtype=F64)
    theirs, rates = peer_chains(mixture, init)
    options = {"step_size": H, "n_steps": STEPS, "thin": STEPS, "seed": 0}
    ours = sample(mixture.score, init, method="mala", log_prob=mixture.log_prob, **options)

    def features(x: Tensor) -> Tensor:
        return torch.cat([x, x.square(), x[:, :1] * x[:, 1:], (x[:, :1] > 0).double()], 1)

    a, b = features(ours.draws[:, 0]), features(theirs)
    error = (a.var(0) / CHAINS + b.var(0) / CHAINS).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()
    assert float(ours.stats["acceptance"].mean()) == pytest.approx(float(rates.mean()), abs=0.01)
    plain = sample(mixture.score, init, **options)  # unadjusted: seen to be off
    c = features(plain.draws[:, 0])
    assert ((c.mean(0) - b.mean(0)).abs() > 5 * error).any()
