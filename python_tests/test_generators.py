"""A torch.Generator in place of a seed, wherever something is drawn."""

import inspect

import pytest
import torch
from torch.utils._pytree import tree_leaves

import hos_ext
from hos_ext import DPLR, VP, Posterior, ScoreMatchingLoss, Scores, langevin_step, ozaki_step
from hos_ext.densities import Gaussian, GaussianMixture
from hos_ext.diffusion import (
    annealed_langevin,
    generate,
    log_likelihood,
    predictor_corrector,
    prior,
    reverse_sde,
    second_order_reverse,
)
from hos_ext.linalg import ScoreHessian
from hos_ext.losses import order_k_matching_loss, score_matching_loss
from hos_ext.nn import check_model
from hos_ext.random import fresh_seed
from hos_ext.sampling import adapt_step_size, sample, sample_sharded, search_step_size
from hos_ext.schedules import Rectified, draw_sigma
from hos_ext.uncertainty import (
    calibration_report,
    decode_posterior,
    posterior_from_score,
    posterior_from_velocity,
)

D = 12
X = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
MATRIX = DPLR(X.square() + 1, X.unsqueeze(-1))
POSTERIOR = Posterior(X, MATRIX)


def score(x):
    return -x - x.sin() / 2 + x.roll(1, -1) / 9


def model(x, sigma):
    level = torch.as_tensor(sigma).reshape(-1, 1)
    c = 1 / (1 + level**2)
    return Scores(-level * c * x, c.expand_as(x))


def mixing(x, sigma):
    return Scores(-x.roll(1, -1).sin() * sigma.unsqueeze(1), torch.ones_like(x))


def losses(**given):
    criterion = ScoreMatchingLoss(0.5, **given)
    return criterion(model, X), criterion(model, X)


HESSIAN = ScoreHessian(score, X, symmetrize=True, check=False)
DRAW = {
    "normal": lambda **g: hos_ext.normal((3, 2), **g),
    "uniform": lambda **g: hos_ext.uniform((3, 2), **g),
    "langevin_step": lambda **g: langevin_step(X, -X, 0.1, **g),
    "ozaki_step": lambda **g: ozaki_step(X, -X, -X.square(), 0.1, **g),
    "DPLR.sample": lambda **g: MATRIX.sample(2, **g),
    "Posterior.sample": lambda **g: POSTERIOR.sample(2, **g),
    "ScoreHessian.asymmetry": lambda **g: HESSIAN.asymmetry(3, **g),
    "ScoreHessian.estimate_diagonal": lambda **g: HESSIAN.estimate_diagonal(3, **g),
    "ScoreHessian.estimate_trace": lambda **g: HESSIAN.estimate_trace(3, **g),
    "ScoreHessian.low_rank": lambda **g: (HESSIAN.scale(-1.0)).low_rank(1, n_probes=3, **g),
    "posterior_from_score": lambda **g: posterior_from_score(
        score, X, 0.3, rank=1, n_probes=3, **g
    ),
    "posterior_from_velocity": lambda **g: posterior_from_velocity(
        lambda x: x.roll(1, -1).sin() / 9, X, Rectified(), 0.3, rank=1, n_probes=3, **g
    ),
    "calibration_report": lambda **g: calibration_report(X + 1, POSTERIOR, tau=3.0, **g).entries,
    "Gaussian.sample": lambda **g: Gaussian(torch.zeros(2), torch.eye(2)).sample(3, **g),
    "GaussianMixture.sample": lambda **g: GaussianMixture(
        torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None]
    ).sample(3, **g),
    "VP.sample_t": lambda **g: VP().sample_t(3, **g),
    "draw_sigma": lambda **g: draw_sigma(3, (0.1, 1.0), **g),
    "score_matching_loss": lambda **g: score_matching_loss(model, X, 0.5, **g),
    "order_k_matching_loss": lambda **g: order_k_matching_loss(
        lambda x, sigma: -x, X, 0.5, k=1, **g
    ),
    "ScoreMatchingLoss": losses,
    "sample": lambda **g: sample(lambda x: -x, X, step_size=0.1, n_steps=2, **g).draws,
    "sample_sharded": lambda **g: (
        sample_sharded(lambda x: -x, X, step_size=0.1, n_steps=2, **g).draws
    ),
    "search_step_size": lambda **g: search_step_size(lambda x: -x, X, [0.1], n_steps=50, **g),
    "adapt_step_size": lambda **g: adapt_step_size(
        lambda x: -x, X, method="mala", step_size=0.1, n_steps=3, **g
    ),
    "prior": lambda **g: prior((3, 2), VP(), **g),
    "generate": lambda **g: generate(model, (3, 2), VP(), n_steps=3, **g),
    "decode_posterior": lambda **g: decode_posterior(
        lambda z: z.roll(1, -1).sin(), POSTERIOR, n_probes=3, n_pairs=2, **g
    ),
    "reverse_sde": lambda **g: reverse_sde(model, X, VP(), n_steps=3, **g),
    "predictor_corrector": lambda **g: predictor_corrector(model, X, VP(), n_steps=3, **g),
    "second_order_reverse": lambda **g: second_order_reverse(model, X, VP(), n_steps=3, **g),
    "annealed_langevin": lambda **g: annealed_langevin(model, X, [1.0, 0.5], n_steps=2, **g).draws,
    "log_likelihood": lambda **g: log_likelihood(
        mixing, X, VP(), n_steps=3, trace="hutchinson", **g
    ),
    "check_model": lambda **g: list(check_model(model, X, **g).errors),
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def numbers(value):
    return [torch.as_tensor(t) for t in tree_leaves(value)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(numbers(one), numbers(other), strict=True))


@pytest.mark.parametrize("name", DRAW)
def test_a_generator_gives_the_seed_and_moves_on_by_one(name):
    drawn, twin = generator(), generator()
    first = DRAW[name](generator=drawn)
    seed = int(torch.randint(2**63 - 1, (), generator=twin))
    assert torch.equal(drawn.get_state(), twin.get_state())
    assert same(first, DRAW[name](seed=seed))
    assert not same(first, DRAW[name](generator=drawn))
    assert same(first, DRAW[name](generator=generator()))


@pytest.mark.parametrize("name", DRAW)
def test_a_generator_excludes_a_seed_and_is_one(name):
    with pytest.raises(ValueError, match=rf"^{name}: seed must be left out where generator is giv"):
        DRAW[name](seed=7, generator=generator())
    with pytest.raises(TypeError, match=rf"^{name}: generator must be a Generator, got int"):
        DRAW[name](generator=7)


@pytest.mark.parametrize(
    "step", [langevin_step, lambda x, *rest, **k: ozaki_step(x, x, *rest, **k)]
)
def test_steps_draw_nothing_beside_noise(step):
    with pytest.raises(ValueError, match="generator must be None where noise is given, got shape"):
        step(X, -X, 0.1, noise=X, generator=generator())


def test_every_public_function_that_takes_a_seed_takes_a_generator():
    """No function of a room has the one without the other."""
    found = set()
    rooms = [hos_ext, *(getattr(hos_ext, room) for room in hos_ext._ROOMS if room != "app")]
    for room in rooms:
        for name in getattr(room, "__all__", ()):
            value = getattr(room, name)
            methods = vars(value).items() if inspect.isclass(value) else ()
            for key, function in [(name, value), *((f"{name}.{k}", f) for k, f in methods)]:
                if inspect.isfunction(function) or inspect.isclass(function):
                    try:
                        parameters = inspect.signature(function).parameters
                    except ValueError:
                        continue
                    if "seed" in parameters and "generator" not in parameters:
                        found.add(key)
    assert not {name for name in found if "._" not in name} - {"Key"}


def test_fresh_seeds_follow_the_default_generator():
    torch.manual_seed(1)
    one = fresh_seed()
    torch.manual_seed(1)
    assert fresh_seed() == one
