"""Peers from PyPI, imported where they are installed: same mathematics, same sizes.

What cannot be measured is named with its reason, never left out in silence.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hos_ext

from . import peers, timer

STEP_SIZE = 0.1
MALA_STEPS = 20
MALA_STEP_SIZE = 0.05


class NotMeasured(Exception):
    """Why a peer has no figures."""


def load(name: str) -> ModuleType:
    """A module, or NotMeasured."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotMeasured(f"{name}: not measured, not importable ({error})") from error


def langevin_steps(batch: int, size: int) -> dict[str, Callable[[], Tensor]]:
    """x + h s + sqrt(2 h) z with the noise drawn within, for a given score.

    torchebm's step is that of its sampler `LangevinDynamics`, the Euler-Maruyama integrator; its
    fused one is a Triton kernel for CUDA (`fused_langevin`).
    """
    integrator = load("torchebm.integrators").EulerMaruyamaIntegrator(
        device=torch.device("cpu"), dtype=torch.float32
    )
    x, score, _ = peers.step_inputs(batch, size)
    out = torch.empty_like(x)
    width = (2 * STEP_SIZE) ** 0.5

    def plain() -> Tensor:
        return x + STEP_SIZE * score + width * torch.randn_like(x)

    fused = peers.compiled(plain)
    steps: dict[str, Callable[[], Tensor]] = {
        "hos_ext": lambda: hos_ext.langevin_step(x, score, STEP_SIZE, seed=1),
        "hos_ext out=": lambda: hos_ext.langevin_step(x, score, STEP_SIZE, seed=1, out=out),
        "eager": plain,
        "compiled": fused,
        "torchebm": lambda: integrator.step(
            {"x": x}, STEP_SIZE, drift=lambda x, t: score, noise_scale=1.0
        )["x"],
    }
    noises = {
        name: ((step() - x - STEP_SIZE * score) / width).double() for name, step in steps.items()
    }
    for name, noise in noises.items():
        error = abs(float(noise.square().mean()) - 1)
        if not error <= 6 * (2 / noise.numel()) ** 0.5:
            raise ValueError(
                f"langevin_steps: noise of {name} must have variance 1, got an error of {error:.3g}"
            )
    return steps


def mixture_chains(
    peer: str,
    method: str,
    weights: Tensor,
    means: Tensor,
    covariances: Tensor,
    init: Tensor,
    *,
    step_size: float,
    n_steps: int,
    seed: int,
) -> tuple[Tensor, dict[str, float]]:
    """Chains of a Gaussian mixture by a package, its density written with that package.

    Args:
        peer: "blackjax" or "torchebm".
        method: "langevin", or "mala" (blackjax alone has it).
        weights, means, covariances: of the mixture.
        init: one start for each chain (chain, D).
        step_size: h, of x + h s1 + sqrt(2 h) z, which is the convention of both packages.
        n_steps: states kept, all of them.
        seed: of the package's own generator.

    Returns:
        draws (chain, draw, D) in float32, and {"seconds" of the processor, compilation left out,
        "acceptance" for mala}.

    Raises:
        NotMeasured: the package cannot be imported, or has no such method.
    """
    chains = {"blackjax": _blackjax_chains, "torchebm": _torchebm_chains}[peer]
    parts = [weights.float(), means.float(), covariances.double()]
    precision = torch.linalg.inv(parts[2]).float()
    log_weight = weights.double().log() - 0.5 * torch.logdet(parts[2])
    return chains(method, log_weight.float(), parts[1], precision, init.float(), step_size,
                  n_steps, seed)  # fmt: skip


def _blackjax_chains(
    method: str, log_weight: Tensor, means: Tensor, precision: Tensor, init: Tensor,
    step_size: float, n_steps: int, seed: int,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    blackjax, jax = load("blackjax"), load("jax")
    jnp = jax.numpy
    a, m, p, start = (jnp.asarray(t.numpy()) for t in (log_weight, means, precision, init))

    def log_prob(x: Any) -> Any:
        return jax.nn.logsumexp(a - 0.5 * jnp.einsum("ki,kij,kj->k", x - m, p, x - m))

    if method == "mala":
        kernel = blackjax.mala(log_prob, step_size=step_size)

        def step(state: Any, key: Any) -> Any:
            state, info = jax.vmap(kernel.step)(jax.random.split(key, len(init)), state)
            return state, (state.position, info.acceptance_rate.mean())

        state = jax.vmap(kernel.init)(start)
    else:
        gradient = jax.grad(log_prob)
        kernel = blackjax.sgld(lambda x, minibatch: gradient(x))
        move = jax.vmap(lambda key, x: kernel.step(key, x, None, step_size))

        def step(state: Any, key: Any) -> Any:
            state = move(jax.random.split(key, len(init)), state)
            return state, (state, jnp.ones(()))

        state = start

    @jax.jit
    def run(state: Any, key: Any) -> Any:
        return jax.lax.scan(step, state, jax.random.split(key, n_steps))[1]

    key = jax.random.key(seed)
    compiled = run.lower(state, key).compile()
    began = time.process_time()
    draws, rates = jax.block_until_ready(compiled(state, key))
    found = {"seconds": time.process_time() - began}
    if method == "mala":
        found["acceptance"] = float(rates.mean())
    return torch.from_numpy(np.array(draws)).transpose(0, 1), found


def _torchebm_chains(
    method: str, log_weight: Tensor, means: Tensor, precision: Tensor, init: Tensor,
    step_size: float, n_steps: int, seed: int,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    if method != "langevin":
        raise NotMeasured(f"torchebm: not measured, it has no {method}")
    integrator = load("torchebm.integrators").EulerMaruyamaIntegrator(
        device=torch.device("cpu"), dtype=torch.float32
    )

    def score(x: Tensor, t: Any = None) -> Tensor:
        gap = x.unsqueeze(1) - means
        pull = (precision @ gap.unsqueeze(-1)).squeeze(-1)
        part = (log_weight - 0.5 * (gap * pull).sum(-1)).softmax(-1)
        return -(part.unsqueeze(-1) * pull).sum(1)

    kept = []
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)
        began, x = time.process_time(), init
        for _ in range(n_steps):
            x = integrator.step({"x": x}, step_size, drift=score, noise_scale=1.0)["x"]
            kept.append(x)
    return torch.stack(kept, 1), {"seconds": time.process_time() - began}


def fused_langevin() -> None:
    """torchebm's fused step. Always NotMeasured on a CPU: its kernel wants CUDA tensors."""
    load("torchebm.cuda.fused_langevin")
    raise NotMeasured("torchebm.cuda.fused_langevin: not measured, its kernel runs on CUDA only")


def second_order_loss() -> None:
    """The second-order loss of score_models (Eq. 17, continuous in time)."""
    module = load("score_models")
    losses = getattr(module, "losses", None)
    if not hasattr(losses, "second_order_dsm_meng_variation"):
        raise NotMeasured(
            "score_models: not measured, the installed release has no second-order loss"
        )
    raise NotMeasured("score_models: not measured, its loss draws its noise and levels itself")


def mala(batch: int, size: int) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """MALA_STEPS adjusted steps of `batch` chains on a Gaussian with precisions 1 to 4.

    blackjax: one jitted scan over its vmapped kernel. Ours: one call of `sample` with the density
    and its gradient. Both in this process, float32; their acceptance rates are compared.

    Returns:
        The contestants, and the mean acceptance of each.
    """
    blackjax, jax = load("blackjax"), load("jax")
    jnp = jax.numpy
    precision = torch.linspace(1, 4, size)
    init = torch.randn(batch, size, generator=torch.Generator().manual_seed(0)) / precision.sqrt()
    precision_jax, init_jax = jnp.asarray(precision.numpy()), jnp.asarray(init.numpy())
    kernel = blackjax.mala(lambda x: -0.5 * (precision_jax * x * x).sum(), step_size=MALA_STEP_SIZE)

    def step(state: Any, key: Any) -> Any:
        state, info = jax.vmap(kernel.step)(jax.random.split(key, batch), state)
        return state, info.acceptance_rate.mean()

    @jax.jit
    def run(x: Any, key: Any) -> Any:
        state = jax.vmap(kernel.init)(x)
        state, rates = jax.lax.scan(step, state, jax.random.split(key, MALA_STEPS))
        return state.position, rates.mean()

    def theirs() -> Any:
        return jax.block_until_ready(run(init_jax, jax.random.key(0)))

    def ours() -> hos_ext.Chains:
        return hos_ext.sample(
            lambda x: -precision * x,
            init,
            method="mala",
            step_size=MALA_STEP_SIZE,
            n_steps=MALA_STEPS,
            thin=MALA_STEPS,
            log_prob=lambda x: -0.5 * (precision * x * x).sum(-1),
            seed=0,
        )

    rates = {
        "hos_ext": float(ours().stats["acceptance"].mean()),
        "blackjax": float(theirs()[1]),
    }
    # Chains are independent; within one, twenty acceptances are taken as one draw.
    spread = 6 * 0.5 * (2 / batch) ** 0.5
    if not abs(rates["hos_ext"] - rates["blackjax"]) <= spread:
        raise ValueError(f"mala: acceptance must agree within {spread:.3g}, got {rates}")
    return {"hos_ext": ours, "blackjax": theirs}, rates


def measure(
    contestants: dict[str, Callable[[], Any]], *, tiny: bool = False
) -> dict[str, timer.Timing]:
    """Interleaved medians without gradients."""
    with torch.no_grad():
        return timer.measure(contestants, seconds=0.01 if tiny else 3.0, least=1 if tiny else 5)
