"""Posterior cumulants and moments of every order against exact mixture posteriors."""

from __future__ import annotations

import math
import re
from itertools import permutations

import pytest
import torch
from torch.func import jacfwd, jvp, vmap

from hos_ext.densities.gaussian import Gaussian, GaussianMixture
from hos_ext.tweedie.moments import (
    moment_recurrence,
    moments_from_cumulants,
    noise_cumulants,
    posterior_cumulants,
    posterior_moments,
    psi_from_scores,
)

F64 = torch.float64

# Forward mode loads rules of torch's own that are scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

B, D, M = 3, 2, 4
SIGMA, ALPHA = 0.7, 0.8


def exactly(message):
    """A pattern for `pytest.raises` that only the whole message matches."""
    return f"^{re.escape(message)}$"


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mixture(dim=D):
    root = 0.5 * randn(3, dim, dim, seed=1)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    covariances = root @ root.mT + 0.2 * torch.eye(dim, dtype=F64)
    return GaussianMixture(weights, 1.5 * randn(3, dim, seed=2), covariances)


def scores_at(density, x, k=4):
    """s1 ... s4 of a density at x (B, D)."""

    def third(row):
        return density.third(row[None])[0]

    fourth = vmap(jacfwd(third))(x)
    return [density.score(x), density.hessian(x), density.third(x), fourth][:k]


def partitions(items):
    """All set partitions of a list."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, block in enumerate(rest):
            yield [*rest[:i], [items[0], *block], *rest[i + 1 :]]


def by_partitions(cumulants, n):
    """The n-th moment entry by entry, as the sum over all partitions of its indices."""
    rows, size = cumulants[0].shape
    out = torch.zeros(rows, *[size] * n, dtype=F64)
    for index in torch.cartesian_prod(*[torch.arange(size)] * n).reshape(-1, n).tolist():
        for blocks in partitions(list(range(n))):
            terms = [cumulants[len(b) - 1][(slice(None), *(index[i] for i in b))] for b in blocks]
            out[(slice(None), *index)] += math.prod(terms)
    return out


def exact_moments(density, x, sigma, alpha, k, *, central=False):
    """Moments of the posterior, itself a mixture of Gaussians, part by part (Isserlis)."""
    noisy = density.noisy(sigma, alpha)
    law = torch.distributions.MultivariateNormal(noisy.means, noisy.covariances)
    r = (law.log_prob(x.unsqueeze(1)) + noisy.weights.log()).softmax(-1)
    eye = torch.eye(x.shape[1], dtype=F64)
    parts = []
    for j, covariance in enumerate(density.covariances):
        precision = torch.linalg.inv(alpha**2 * covariance + sigma**2 * eye)
        mean = density.means[j] + alpha * (x - alpha * density.means[j]) @ (precision @ covariance)
        spread = covariance - alpha**2 * covariance @ precision @ covariance
        parts.append((mean, spread))
    centre = sum(r[:, j, None] * mean for j, (mean, _) in enumerate(parts)) if central else 0.0
    moments = []
    for n in range(1, k + 1):
        total = torch.zeros(x.shape[0], *[x.shape[1]] * n, dtype=F64)
        for j, (mean, spread) in enumerate(parts):
            zeros = [torch.zeros(x.shape[0], *[x.shape[1]] * i, dtype=F64) for i in (3, 4)]
            gaussian = [mean - centre, spread.expand(x.shape[0], -1, -1), *zeros]
            total += r[:, j].reshape(-1, *[1] * n) * by_partitions(gaussian, n)
        moments.append(total)
    return moments


def on_diagonal(tensors):
    """Entries [i, ..., i] of dense tensors."""
    i = torch.arange(tensors[0].shape[1])
    return [t[(slice(None), *[i] * (t.dim() - 1))] for t in tensors]


def on_directions(tensors, v):
    """Dense tensors with each direction put into every index."""
    letters = "ijkl"
    out = []
    for n, t in enumerate(tensors, 1):
        spec = ",".join(f"bm{letters[i]}" for i in range(n))
        out.append(torch.einsum(f"b{letters[:n]},{spec}->bm", t, *[v] * n))
    return out


# ------------------------------------------------------------------------------------- posterior


@pytest.mark.parametrize("central", [False, True])
def test_moments_of_a_mixture_are_exact_to_order_four(central):
    density, x = mixture(), 1.5 * randn(B, D)
    scores = scores_at(density.noisy(SIGMA, ALPHA), x)
    got = posterior_moments(x, scores, SIGMA, ALPHA, central=central)
    for moment, want in zip(
        got, exact_moments(density, x, SIGMA, ALPHA, 4, central=central), strict=True
    ):
        close(moment, want)


def test_cumulants_of_a_gaussian_are_mean_covariance_and_zero():
    density = Gaussian(randn(D), mixture().covariances[0])
    x = randn(B, D, seed=3)
    scores = scores_at(density.noisy(SIGMA, ALPHA), x)
    got = posterior_cumulants(x, scores, SIGMA, ALPHA)
    close(got[0], density.posterior_mean(x, SIGMA, ALPHA))
    close(got[1], density.posterior_covariance(x, SIGMA, ALPHA))
    close(got[2], torch.zeros(B, D, D, D, dtype=F64))
    close(got[3], torch.zeros(B, D, D, D, D, dtype=F64))


def test_central_moments_of_orders_four_and_five_follow_their_formulas():
    """mu_4 = kappa_4 + three pairings of kappa_2; in one dimension mu_5 = kappa_5 + 10 k2 k3."""
    k = [randn(B, *[D] * n, seed=n) for n in range(1, 5)]
    k[1] = k[1] + k[1].mT
    specs = ("bij,bkl->bijkl", "bik,bjl->bijkl", "bil,bjk->bijkl")
    pairings = [torch.einsum(spec, k[1], k[1]) for spec in specs]
    got = moments_from_cumulants(k, central=True)
    close(got[0], torch.zeros(B, D, dtype=F64))
    close(got[1], k[1])
    close(got[2], k[2])
    close(got[3], k[3] + sum(pairings))
    one = [randn(B, *[1] * n, seed=n) for n in range(1, 6)]
    flat = [t.reshape(B) for t in one]
    fifth = flat[4] + 10 * flat[1] * flat[2]
    close(moments_from_cumulants(one, central=True)[4].reshape(B), fifth)
    close(moments_from_cumulants(flat, central=True)[4], fifth)


def test_raw_moments_equal_the_sum_over_partitions_and_are_symmetric():
    cumulants = []
    for n in range(1, 6):
        t, orders = randn(B, *[D] * n, seed=n), list(permutations(range(1, n + 1)))
        cumulants.append(sum(t.permute(0, *order) for order in orders) / len(orders))
    for n, moment in enumerate(moments_from_cumulants(cumulants), 1):
        close(moment, by_partitions(cumulants, n))
        for order in permutations(range(1, n + 1)):
            close(moment, moment.permute(0, *order))


@pytest.mark.parametrize("central", [False, True])
def test_diagonal_and_directional_forms_are_contractions_of_the_dense(central):
    density, x = mixture(), randn(B, D)
    scores = scores_at(density.noisy(SIGMA, ALPHA), x)
    v = randn(B, M, D, seed=5)
    sigma = torch.tensor([0.3, 0.7, 1.2], dtype=F64)  # one for each sample; the scores are data
    alpha = torch.tensor([0.9, 0.8, 0.7], dtype=F64)
    dense = posterior_cumulants(x, scores, sigma, alpha)
    assert [t.shape for t in dense] == [s.shape for s in scores]
    diagonal, along = on_diagonal(scores), on_directions(scores, v)
    for got, want in zip(
        posterior_cumulants(x, diagonal, sigma, alpha), on_diagonal(dense), strict=True
    ):
        close(got, want)
    got = posterior_cumulants(x, along, sigma, alpha, directions=v)
    for value, want in zip(got, on_directions(dense, v), strict=True):
        close(value, want)

    dense = posterior_moments(x, scores, sigma, alpha, central=central)
    got = posterior_moments(x, diagonal, sigma, alpha, central=central)
    for value, want in zip(got, on_diagonal(dense), strict=True):
        close(value, want)
    got = posterior_moments(x, along, sigma, alpha, central=central, directions=v)
    for value, want in zip(got, on_directions(dense, v), strict=True):
        close(value, want)


def test_images_flatten_in_row_major_order():
    x, dims = randn(B, 2, 3), (2, 3)
    scores = [randn(B, *[6] * n, seed=n) for n in (1, 2)]
    dense = posterior_cumulants(x, scores, SIGMA, ALPHA)
    flat = posterior_cumulants(x.flatten(1), scores, SIGMA, ALPHA)
    diagonal = [s.reshape(B, *dims) for s in on_diagonal(scores)]
    for value, same, got in zip(
        dense, flat, posterior_cumulants(x, diagonal, SIGMA, ALPHA), strict=True
    ):
        close(value, same)
        assert got.shape == x.shape
        close(got.flatten(1), on_diagonal([value])[0])
    v = randn(B, M, 6, seed=7)
    got = posterior_cumulants(x, on_directions(scores, v), SIGMA, ALPHA, directions=v)
    close(got[1], on_directions(dense, v)[1])


def test_noise_cumulants_are_those_of_the_posterior_rescaled():
    """z = (x - alpha x0) / sigma: kappa_j(z) = (-alpha/sigma)^j kappa_j(x0), but for the mean."""
    density, x, v = mixture(), randn(B, D), randn(B, M, D, seed=5)
    sigma = torch.tensor([0.3, 0.7, 1.2], dtype=F64)
    scores = scores_at(density.noisy(SIGMA, ALPHA), x)
    forms = [
        (scores, None, x),
        (on_diagonal(scores), None, x),
        (on_directions(scores, v), v, on_directions([x], v)[0]),
    ]
    for form, directions, start in forms:
        clean = posterior_cumulants(x, form, sigma, ALPHA, directions=directions)
        clean[0] = clean[0] - start / ALPHA
        got = noise_cumulants(form, sigma, directions=directions)
        for j, (value, kappa) in enumerate(zip(got, clean, strict=True), 1):
            close(value, (-ALPHA / sigma.reshape(-1, *[1] * (kappa.dim() - 1))) ** j * kappa)


# ------------------------------------------------------------------------------------ recurrence


@pytest.mark.parametrize("per_sample", [False, True])
def test_recurrence_by_autodiff_equals_the_cumulant_route(per_sample):
    density, x = mixture().noisy(SIGMA, ALPHA), randn(B, D)
    sigma = torch.tensor([0.3, 0.7, 1.2], dtype=F64) if per_sample else SIGMA
    alpha = torch.tensor([0.9, 0.8, 0.7], dtype=F64) if per_sample else ALPHA
    want = posterior_moments(x, scores_at(density, x), sigma, alpha)
    got = moment_recurrence(density.score, x, sigma, alpha, order=4)
    assert len(got) == 4
    for value, moment in zip(got, want, strict=True):
        close(value, moment)


def test_recurrence_flattens_images():
    density, x = mixture(4).noisy(SIGMA, ALPHA), randn(B, 2, 2)

    def score(x):
        assert x.shape[1:] == (2, 2)
        return density.score(x.flatten(1)).reshape(x.shape)

    flat = moment_recurrence(density.score, x.flatten(1), SIGMA, ALPHA, order=2)
    for value, want in zip(moment_recurrence(score, x, SIGMA, ALPHA, order=2), flat, strict=True):
        close(value, want)


# -------------------------------------------------------------------------------------------- psi


def test_psi_is_the_derivative_of_the_density_over_the_density():
    density, x = mixture(), randn(B, D)

    def p(x):
        return density.log_prob(x[None])[0].exp()

    derivative = p
    for psi in psi_from_scores(scores_at(density, x)):
        derivative = jacfwd(derivative)
        close(psi, vmap(derivative)(x) / vmap(p)(x).reshape(-1, *[1] * (psi.dim() - 1)))


def test_moments_carry_gradients_and_tangents():
    cumulants = [randn(2, *[D] * n, seed=n).requires_grad_() for n in range(1, 5)]
    v = [torch.ones_like(c) for c in cumulants]

    def last(*c):
        return moments_from_cumulants(list(c))[-1]

    assert torch.autograd.gradcheck(last, cumulants)
    tangent = jvp(last, tuple(cumulants), tuple(v))[1]
    step = 1e-5
    ahead, behind = (
        last(*(c + h * w for c, w in zip(cumulants, v, strict=True))) for h in (step, -step)
    )
    close(tangent, (ahead - behind) / (2 * step), 1e-7)


def test_empty_batches_and_first_orders_alone_pass():
    x = torch.zeros(0, D, dtype=F64)
    scores = [torch.zeros(0, *[D] * n, dtype=F64) for n in (1, 2, 3)]
    assert [m.shape for m in posterior_moments(x, scores, SIGMA)] == [s.shape for s in scores]
    for empty in (x, x.reshape(0, 1, D)):
        moments = moment_recurrence(lambda x: -x, empty, SIGMA, ALPHA, order=3)
        assert [m.shape for m in moments] == [s.shape for s in scores]
        assert {m.dtype for m in moments} == {F64}
    x = randn(B, 2, 3)
    score = randn(B, 2, 3, seed=1)
    want = (x + SIGMA**2 * score) / ALPHA
    close(posterior_moments(x, [score], SIGMA, ALPHA)[0], want)
    close(posterior_moments(x, [score.flatten(1)], SIGMA, ALPHA)[0], want.flatten(1))


# ----------------------------------------------------------------------------------------- errors

X, S1, S2 = randn(B, D), randn(B, D), randn(B, D, D)
V = randn(B, M, D)
AND_DENSE = "(3, 2) (diagonal) or (3, 2), (3, 2, 2) (dense)"
ERRORS = {
    "not_a_list": (
        lambda: posterior_cumulants(X, S1, 1.0),
        TypeError,
        "posterior_cumulants: scores must be a list of Tensors of orders 1, 2, ..., got Tensor",
    ),
    "empty": (
        lambda: posterior_cumulants(X, [], 1.0),
        ValueError,
        "posterior_cumulants: scores must hold at least the first order, got none",
    ),
    "not_a_tensor": (
        lambda: posterior_cumulants(X, [S1, 2.0], 1.0),
        TypeError,
        "posterior_cumulants: scores[1] must be a Tensor, got float",
    ),
    "mixed_dtypes": (
        lambda: posterior_cumulants(X, [S1.float(), S2.float()], 1.0),
        ValueError,
        "posterior_cumulants: scores[0] must have dtype torch.float64, got torch.float32",
    ),
    "mixed_forms": (
        lambda: posterior_cumulants(X, [S1, S2, S1], 1.0),
        ValueError,
        (
            "posterior_cumulants: scores must have shapes all (3, 2) (diagonal) or (3, 2), "
            "(3, 2, 2), (3, 2, 2, 2) (dense), got (3, 2), (3, 2, 2), (3, 2)"
        ),
    ),
    "dense_with_directions": (
        lambda: posterior_cumulants(X, [S1, S2], 1.0, directions=V),
        ValueError,
        "posterior_cumulants: scores must have shapes all (3, 4), got (3, 2), (3, 2, 2)",
    ),
    "no_batch": (
        lambda: posterior_cumulants(X[0], [S1[0]], 1.0),
        ValueError,
        "posterior_cumulants: x must have shape (B, *dims), got (2,)",
    ),
    "directions_of_another_size": (
        lambda: posterior_cumulants(X, [randn(B, M)], 1.0, directions=randn(B, M, 5)),
        ValueError,
        "posterior_cumulants: directions must have shape (3, m, 2), got (3, 4, 5)",
    ),
    "directions_dtype": (
        lambda: posterior_cumulants(X, [randn(B, M)], 1.0, directions=V.float()),
        ValueError,
        "posterior_cumulants: directions must have dtype torch.float64, got torch.float32",
    ),
    "sigma": (
        lambda: posterior_moments(X, [S1], 0.0),
        ValueError,
        "posterior_moments: sigma must be positive, got 0.0",
    ),
    "alpha": (
        lambda: posterior_moments(X, [S1], 1.0, -1.0),
        ValueError,
        "posterior_moments: alpha must be positive, got -1.0",
    ),
    "noise_sigma": (
        lambda: noise_cumulants([S1], torch.ones(2, dtype=F64)),
        ValueError,
        "noise_cumulants: sigma must be a float or have shape (3,), got (2,)",
    ),
    "noise_directions": (
        lambda: noise_cumulants([randn(B, 5)], 1.0, directions=V),
        ValueError,
        "noise_cumulants: directions must have shape (3, 5, D), got (3, 4, 2)",
    ),
    "noise_directions_dtype": (
        lambda: noise_cumulants([randn(B, M)], 1.0, directions=V.float()),
        ValueError,
        "noise_cumulants: directions must have dtype torch.float64, got torch.float32",
    ),
    "noise_batch": (
        lambda: noise_cumulants([S1[0]], 1.0),
        ValueError,
        "noise_cumulants: scores[0] must have shape (B, *dims), got (2,)",
    ),
    "noise_forms": (
        lambda: noise_cumulants([S1, S2[0]], 1.0),
        ValueError,
        f"noise_cumulants: scores must have shapes all {AND_DENSE}, got (3, 2), (2, 2)",
    ),
    "cumulants": (
        lambda: moments_from_cumulants([S2, S1]),
        ValueError,
        (
            "moments_from_cumulants: cumulants must have shapes all (3, 2, 2) (diagonal) or "
            "(3, 4), (3, 4, 4) (dense), got (3, 2, 2), (3, 2)"
        ),
    ),
    "no_cumulants": (
        lambda: moments_from_cumulants(()),
        ValueError,
        "moments_from_cumulants: cumulants must hold at least the first order, got none",
    ),
    "half": (
        lambda: psi_from_scores([S1.half()]),
        ValueError,
        "psi_from_scores: scores[0] must have dtype float32, float64, got torch.float16",
    ),
    "psi": (
        lambda: psi_from_scores([S1, S2, S2]),
        ValueError,
        (
            "psi_from_scores: scores must have shapes all (3, 2) (diagonal) or (3, 2), (3, 2, 2), "
            "(3, 2, 2, 2) (dense), got (3, 2), (3, 2, 2), (3, 2, 2)"
        ),
    ),
    "order": (
        lambda: moment_recurrence(lambda x: x, X, 1.0, order=0),
        ValueError,
        "moment_recurrence: order must be at least 1, got 0",
    ),
    "order_kind": (
        lambda: moment_recurrence(lambda x: x, X, 1.0, order=2.0),
        TypeError,
        "moment_recurrence: order must be an int, got float",
    ),
    "score_fn": (
        lambda: moment_recurrence(lambda x: x[:, :1], X, 1.0, order=2),
        ValueError,
        "moment_recurrence: score_fn(x) must have shape (3, 2), got (3, 1)",
    ),
    "recurrence_sigma": (
        lambda: moment_recurrence(lambda x: x, X, 0.0, order=2),
        ValueError,
        "moment_recurrence: sigma must be positive, got 0.0",
    ),
    "recurrence_alpha": (
        lambda: moment_recurrence(lambda x: x, X, 1.0, 0.0, order=2),
        ValueError,
        "moment_recurrence: alpha must be positive, got 0.0",
    ),
    "recurrence_batch": (
        lambda: moment_recurrence(lambda x: x, X[0], 1.0, order=2),
        ValueError,
        "moment_recurrence: x must have shape (B, *dims), got (2,)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_names_the_argument_and_the_rule(case):
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=exactly(message)):
        call()
