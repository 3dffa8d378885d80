"""Losses of order k: against autodiff oracles, their minimisers, their variance, every error."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import jacfwd, jvp, vmap

import hos_ext
from hos_ext.losses.high_order import (
    hermite,
    order_k_loss,
    order_k_matching_loss,
    order_k_vr_loss,
)
from hos_ext.losses.moment_losses import noise_moment_loss, second_moment_loss
from hos_ext.tweedie.moments import psi_from_scores

F64 = torch.float64
B, D, M = 3, 2, 4
FORMS = ("dense", "diagonal", "directional")
ORDERS = (1, 2, 3, 4)

# Forward mode loads rules of torch's own that are scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def exactly(message):
    """A pattern for `pytest.raises` that only the whole message matches."""
    return f"^{re.escape(message)}$"


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def contract(t, form, v=None):
    """A dense tensor (N, D, ..., D) in another form."""
    n = t.dim() - 1
    if form == "dense":
        return t
    if form == "diagonal":
        i = torch.arange(t.shape[1])
        return t[(slice(None), *[i] * n)]
    letters = "ijkl"[:n]
    spec = ",".join(f"bm{letter}" for letter in letters)
    return torch.einsum(f"b{letters},{spec}->bm", t, *[v] * n)


def contracted(tensors, form, v=None):
    return [contract(t, form, v) for t in tensors]


# ---------------------------------------------------------------------------------------- oracles


def naive_psi(*scores):
    """psi_k of one sample: D^k exp(sum_j s_j[y, ..., y] / j!) at y = 0, for symmetric s_j."""

    def p(y):
        total, factorial = y.new_zeros(()), 1
        for j, s in enumerate(scores, 1):
            factorial *= j
            for _ in range(j):
                s = s @ y
            total = total + s / factorial
        return total.exp()

    for _ in scores:
        p = jacfwd(p)
    return p(torch.zeros_like(scores[0]))


def naive_hermite(z, k):
    """(-1)^k exp(|z|^2 / 2) D^k exp(-|z|^2 / 2) of one sample."""

    def density(y):
        return (-(y @ y) / 2).exp()

    derivative = density
    for _ in range(k):
        derivative = jacfwd(derivative)
    return (-1) ** k * derivative(z) / density(z)


def entries(t, form, v):
    """The entries of one dense tensor that a form keeps, one by one."""
    if form == "directional":
        for direction in v:
            value = t
            while value.dim():
                value = value @ direction
            yield value
        return
    for index in product(range(t.shape[0]), repeat=t.dim()):
        if form == "dense" or len(set(index)) == 1:
            yield t[index]


def squares(psi, he, z, k, sigma, form, v):
    """|psi - target|^2 - |target|^2 per sample."""
    losses = []
    for b in range(z.shape[0]):
        total = torch.zeros((), dtype=F64)
        for p, h in zip(entries(psi[b], form, v[b]), entries(he[b], form, v[b]), strict=True):
            target = (-1 / sigma[b]) ** k * h
            total = total + (p - target) ** 2 - target**2
        losses.append(total)
    return torch.stack(losses)


def naive_loss(k, scores, z, sigma, form, v):
    """The plain loss per sample; scores dense, lists of orders."""
    psi, he = vmap(naive_psi)(*scores), vmap(lambda z: naive_hermite(z, k))(z)
    return squares(psi, he, z, k, sigma, form, v)


def naive_vr_loss(k, scores, z, sigma, form, v, derivative):
    """The pair averaged, plus 2 <target, Taylor terms of psi below order k>; scores (P, B, ...)."""
    psi = vmap(vmap(naive_psi))(*scores)
    he, opposite = vmap(vmap(lambda z: naive_hermite(z, k)))(torch.stack([z, -z]))
    loss = squares(psi[0], he, z, k, sigma, form, v)
    loss = (loss + squares(psi[1], opposite, -z, k, sigma, form, v)) / 2
    extra = torch.zeros(z.shape[0], dtype=F64)
    for b in range(z.shape[0]):
        pairs = zip(entries(psi[-1, b], form, v[b]), entries(he[b], form, v[b]), strict=True)
        for d, (psi0, h) in zip(derivative[b].flatten(), pairs, strict=True):
            taylor = {1: 0.0, 2: psi0, 3: d, 4: psi0 + d / 2}[k]
            extra[b] += 2 * (-1 / sigma[b]) ** k * h * taylor
    return loss + extra


def symmetric(n, *lead, seed):
    """A symmetric tensor with n axes D."""
    base = randn(*lead, *[D] * n, seed=seed)
    out = torch.zeros_like(base)
    for index in product(range(D), repeat=n):
        out[(..., *index)] = base[(..., *sorted(index))]
    return out


def case(k, form, points=0):
    """Random scores in a form, their dense originals, z, sigma, v and the derivative."""
    lead = (points, B) if points else (B,)
    dense = [symmetric(n, *lead, seed=n) for n in range(1, k + 1)]
    v = randn(B, M, D, seed=11)
    if points:
        flat = contracted([s.flatten(0, 1) for s in dense], form, v.repeat(points, 1, 1))
        scores = [s.unflatten(0, (points, B)) for s in flat]
    else:
        scores = contracted(dense, form, v)
    z, sigma = randn(B, D, seed=12), torch.tensor([0.5, 0.9, 1.7], dtype=F64)
    derivative = randn(*scores[-1].shape[1 if points else 0 :], seed=13)
    options = {"directions": v} if form == "directional" else {}
    return scores, dense, z, sigma, v, derivative, options


@pytest.mark.parametrize("k", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_plain_loss_equals_the_oracle(k, form):
    scores, dense, z, sigma, v, _, options = case(k, form)
    want = naive_loss(k, dense, z, sigma, form, v)
    got = order_k_loss(k, scores[-1], scores[:-1], z, sigma, reduction="none", **options)
    close(got, want)
    got = order_k_loss(k, scores[-1], scores[:-1], z, sigma, **options)
    close(got, want.mean())
    got = order_k_loss(k, scores[-1], scores[:-1], z, 0.9, reduction="sum", **options)
    close(got, naive_loss(k, dense, z, torch.full((B,), 0.9, dtype=F64), form, v).sum())


@pytest.mark.parametrize("k", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_vr_loss_equals_the_oracle(k, form):
    scores, dense, z, sigma, v, derivative, options = case(k, form, 3 - k % 2)
    if k > 2:
        options["derivative"] = derivative
    got = order_k_vr_loss(k, scores[-1], scores[:-1], z, sigma, reduction="none", **options)
    close(got, naive_vr_loss(k, dense, z, sigma, form, v, derivative))
    if k > 2:
        del options["derivative"]
        got = order_k_vr_loss(k, scores[-1], scores[:-1], z, sigma, reduction="none", **options)
        close(got, naive_vr_loss(k, dense, z, sigma, form, v, 0 * derivative))


@pytest.mark.parametrize("k", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_gradcheck(k, form):
    scores, _, z, sigma, _, _, options = case(k, form)
    inputs = [s.requires_grad_() for s in scores]

    def plain(*s):
        return order_k_loss(k, s[-1], list(s[:-1]), z, sigma, reduction="none", **options)

    assert torch.autograd.gradcheck(plain, inputs)
    scores, _, z, sigma, _, derivative, options = case(k, form, 3 - k % 2)
    inputs = [s.requires_grad_() for s in scores]
    if k > 2:
        inputs.append(derivative.requires_grad_())

    def paired(*s):
        last = {"derivative": s[k]} if k > 2 else {}
        lower = list(s[: k - 1])
        return order_k_vr_loss(k, s[k - 1], lower, z, sigma, reduction="none", **last, **options)

    assert torch.autograd.gradcheck(paired, inputs)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_hermite_is_the_derivative_of_the_normal_density(k):
    z, v = randn(B, D), randn(B, M, D, seed=1)
    if k <= 4:
        want = vmap(lambda z: naive_hermite(z, k))(z)
        close(hermite(z, k), want)
        for options, form in ({"diagonal": True}, "diagonal"), ({"directions": v}, "directional"):
            got = hermite(z, k, **options)
            for b in range(B):
                close(got[b], torch.stack(list(entries(want[b], form, v[b]))))
    else:
        x = z[:, :1]
        sixth = x**6 - 15 * x**4 + 45 * x**2 - 15
        close(hermite(x, k).reshape(B, 1), sixth)
        close(hermite(x, k, diagonal=True), sixth)


def test_any_order_passes_without_variance_reduction():
    z, score = randn(B, 1), randn(B, 1, seed=1)
    lower = [torch.zeros(B, 1, dtype=F64) for _ in range(5)]
    got = order_k_loss(6, score, lower, z, 0.9, reduction="none")
    close(got, (score * (score - 2 * hermite(z, 6, diagonal=True) / 0.9**6)).sum(1))


def test_images_flatten_in_row_major_order():
    z, v = randn(B, 2, 3), randn(B, M, 6, seed=1)
    s1, s2 = randn(B, 6, seed=2), randn(B, 6, 6, seed=3)
    got = order_k_loss(2, s2, [s1], z, 0.9)
    close(got, order_k_loss(2, s2, [s1], z.flatten(1), 0.9))
    d1, d2 = contracted([s1, s2], "diagonal", v)
    got = order_k_loss(2, d2.reshape(z.shape), [d1.reshape(z.shape)], z, 0.9)
    close(got, order_k_loss(2, d2, [d1], z.flatten(1), 0.9))
    a1, a2 = contracted([s1, s2], "directional", v)
    got = order_k_loss(2, a2, [a1], z, 0.9, directions=v)
    close(got, order_k_loss(2, a2, [a1], z.flatten(1), 0.9, directions=v))


# -------------------------------------------------------------------- equality with the operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orders_one_and_two_equal_the_operators(dtype):
    n, d, r = 5, 4, 2
    z, s, diag, factor = (
        t.to(dtype)
        for t in (randn(n, d), randn(3, n, d), randn(3, n, d, seed=1), randn(3, n, d, r, seed=2))
    )
    sigma = torch.linspace(0.3, 2.0, n, dtype=dtype)
    rest = {"reduction": "none"}
    near = {"rtol": 1e-11, "atol": 1e-11} if dtype == F64 else {"rtol": 3e-5, "atol": 1e-3}
    hessian = hos_ext.assemble_hessian(diag.flatten(0, 1), factor.flatten(0, 1))
    hessian = hessian.unflatten(0, (3, n))
    constant = z.square().sum(1) / sigma**2
    pairs = [
        (order_k_loss(1, s[0], [], z, sigma, **rest),
         hos_ext.dsm_loss(s[0], z, sigma, **rest) - constant),
        (order_k_vr_loss(1, s[:2], [], z, sigma, **rest),
         (hos_ext.dsm_loss(s[0], z, sigma, **rest) + hos_ext.dsm_loss(s[1], -z, sigma, **rest)) / 2
         - constant),
        (order_k_loss(2, hessian[0], [s[0]], z, sigma, **rest),
         hos_ext.d2sm_loss(s[0], diag[0], factor[0], z, sigma, **rest)),
        (order_k_vr_loss(2, hessian, [s], z, sigma, **rest),
         hos_ext.d2sm_vr_loss(s, diag, factor, z, sigma, **rest)),
        (order_k_loss(2, diag[0], [s[0]], z, sigma, **rest),
         hos_ext.d2sm_diag_loss(s[0], diag[0], z, sigma, **rest)),
        (order_k_vr_loss(2, diag, [s], z, sigma, **rest),
         hos_ext.d2sm_diag_vr_loss(s, diag, z, sigma, **rest)),
    ]  # fmt: skip
    for got, want in pairs:
        torch.testing.assert_close(got, want, **near)


def test_differences_are_taken_before_products():
    """In float32, against float64 on the same inputs; products first are off by 1e-6 and more."""
    sigma, z, centre = 1e-3, randn(8, 784).float(), randn(8, 784, seed=1)
    score = torch.stack([torch.tanh(centre + sigma * z), torch.tanh(centre - sigma * z)]).float()
    got = order_k_vr_loss(1, score, [], z, sigma, reduction="none")
    want = order_k_vr_loss(1, score.double(), [], z.double(), sigma, reduction="none")
    assert ((got - want).abs() / want.abs()).max() < 5e-7


@pytest.mark.parametrize(("k", "sigma"), [(2, 1e-3), (4, 1e-2)])
def test_neighbours_are_subtracted_before_they_are_added(k, sigma):
    """As above; psi+ + psi- rounds first, and sigma^-k makes that 1.5e-2 and 4e-4 of the loss."""
    z, centre = randn(8, 784).float(), randn(8, 784, seed=1)
    points = [centre + sigma * z, centre - sigma * z, centre]
    score = torch.stack([torch.tanh(x) for x in points]).float()
    lower = [torch.zeros_like(score)] * (k - 1)  # psi is the score: no rounding of its own
    got = order_k_vr_loss(k, score, lower, z, sigma, reduction="none")
    wide = [s.double() for s in lower]
    want = order_k_vr_loss(k, score.double(), wide, z.double(), sigma, reduction="none")
    assert ((got - want).abs() / want.abs()).max() < 5e-6


# ------------------------------------------------------------------------------ minimisers, exactly

# Data at three points: the noisy law is a mixture of three equal Gaussians, the posterior discrete.
SIGMA, ALPHA = 1.0, 0.6
ATOMS = torch.tensor([[1.0, 0.2], [-0.7, 0.9], [0.3, -1.1]], dtype=F64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=F64)


def responsibilities(x):
    """The posterior weights of the atoms at x (N, 2), shape (N, 3)."""
    distance = (x.unsqueeze(1) - ALPHA * ATOMS).square().sum(-1)
    return (WEIGHTS.log() - distance / (2 * SIGMA**2)).softmax(-1)


def exact_scores(x):
    """s1 ... s4 of the noisy law at x (N, 2): cumulants of the posterior, rescaled."""
    r = responsibilities(x)
    mean = r @ ATOMS
    c = ATOMS - mean.unsqueeze(1)
    two = torch.einsum("nk,nki,nkj->nij", r, c, c)
    three = torch.einsum("nk,nki,nkj,nkl->nijl", r, c, c, c)
    four = torch.einsum("nk,nki,nkj,nkl,nkm->nijlm", r, c, c, c, c)
    for spec in ("nij,nlm->nijlm", "nil,njm->nijlm", "nim,njl->nijlm"):
        four = four - torch.einsum(spec, two, two)
    u = ALPHA / SIGMA**2
    return [
        u * mean - x / SIGMA**2,
        u**2 * two - torch.eye(2, dtype=F64) / SIGMA**2,
        u**3 * three,
        u**4 * four,
    ]


def test_exact_scores_are_derivatives_of_the_log_density():
    def log_p(x):
        distance = (x - ALPHA * ATOMS).square().sum(-1)
        return (WEIGHTS.log() - distance / (2 * SIGMA**2)).logsumexp(-1)

    x = randn(B, D)
    for score in exact_scores(x):
        log_p = jacfwd(log_p)
        close(score, vmap(log_p)(x))


@pytest.mark.parametrize("k", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_plain_loss_teaches_psi_whatever_the_lower_scores_are(k, form):
    """Its mean over the posterior is |psi_model - psi|^2 + constant, at every x~."""
    x, v = randn(B, D), randn(B, M, D, seed=1)
    scores, r = contracted(exact_scores(x)[:k], form, v), responsibilities(x)
    truth = psi_from_scores(scores)[-1]
    options = {"directions": v} if form == "directional" else {}

    def gradient(score, lower):
        score = score.clone().requires_grad_()
        for i, atom in enumerate(ATOMS):
            z = (x - ALPHA * atom) / SIGMA
            loss = order_k_loss(k, score, lower, z, SIGMA, reduction="none", **options)
            (r[:, i] @ loss).backward()
        return score.grad

    exact, lower = scores[-1], scores[:-1]
    close(gradient(exact, lower), torch.zeros_like(exact))
    close(gradient(-exact, lower), -4 * exact)
    close(gradient(1.1 * exact, lower), 0.2 * exact)
    wrong = [1.3 * s + 0.2 for s in lower]
    close(gradient(exact, wrong), 2 * (psi_from_scores([*wrong, exact])[-1] - truth))


@pytest.mark.parametrize("k", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_variance_reduction_keeps_the_mean_and_its_minimiser(k, form):
    """Gauss-Hermite quadrature over z for a model linear in theta: exact at theta = (1, 0, 0)."""
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(44))
    z = torch.cartesian_prod(nodes, nodes).repeat(3, 1)
    weight = torch.outer(weights, weights).flatten() / weights.sum() ** 2
    weight = torch.outer(WEIGHTS, weight).flatten()
    clean = ALPHA * ATOMS.repeat_interleave(z.shape[0] // 3, 0)
    v = torch.tensor([[1.0, 0.0], [0.6, -0.8], [-0.5, 1.5]], dtype=F64).expand(z.shape[0], -1, -1)
    options = {"directions": v} if form == "directional" else {}
    options["reduction"] = "none"

    def scores(x, theta):
        *lower, exact = contracted(exact_scores(x)[:k], form, v)
        wave = torch.sin(x[:, 0]).reshape(-1, *[1] * (exact.dim() - 1))
        return [*lower, theta[0] * exact + theta[1] * wave * exact + theta[2]]

    def plain(theta):
        *lower, score = scores(clean + SIGMA * z, theta)
        return weight @ order_k_loss(k, score, lower, z, SIGMA, **options)

    def paired(theta):
        points = [clean + SIGMA * z, clean - SIGMA * z, clean][: 3 - k % 2]
        *lower, score = map(torch.stack, zip(*[scores(p, theta) for p in points], strict=True))
        last = {}
        if k > 2:

            def psi(t):
                return psi_from_scores(scores(clean + t * SIGMA * z, theta))[-1]

            last["derivative"] = derivative(psi, k - 2)
        return weight @ order_k_vr_loss(k, score, lower, z, SIGMA, **last, **options)

    zero = torch.zeros(3, dtype=F64, requires_grad=True)
    found = []
    for mean in plain, paired:
        value = mean(zero)
        (gradient,) = torch.autograd.grad(value, zero, create_graph=True)
        rows = [torch.autograd.grad(g, zero, retain_graph=True)[0] for g in gradient]
        best = -torch.linalg.solve(torch.stack(rows), gradient)
        close(best, torch.tensor([1.0, 0.0, 0.0], dtype=F64), 1e-7)
        found.append((value, gradient))
    for one, other in zip(*found, strict=True):
        close(other, one, 1e-6)


def derivative(f, order):
    """The first or second derivative at t = 0, in forward mode."""
    zero, one = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)

    def first(t):
        return jvp(f, (t,), (one,))[1]

    return first(zero) if order == 1 else jvp(first, (zero,), (one,))[1]


def test_eq_11_passes_errors_of_s1_on_and_eq_12_and_13_do_not():
    """Minimisers over a free s2 at each x~, given s1 + delta: the mean over atoms is quadratic."""
    x, delta = randn(B, D), 0.3 * randn(B, D, seed=1)
    s1, s2 = exact_scores(x)[:2]
    score, truth = s1 + delta, psi_from_scores([s1, s2])[1]
    r = responsibilities(x)

    def minimiser(loss):
        hessian = torch.zeros(B, D, D, dtype=F64, requires_grad=True)
        total = sum(r[:, i] @ loss(a.expand(B, D), hessian) for i, a in enumerate(ATOMS))
        (gradient,) = torch.autograd.grad(total, hessian, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient.sum(), hessian)
        return -gradient.detach() / curvature + torch.einsum("bi,bj->bij", score, score)

    def eq_11(a, h):
        return second_moment_loss(a, x, score, h, SIGMA, ALPHA, reduction="none")

    def eq_12(a, h):
        return noise_moment_loss(a, x, score, h, SIGMA, ALPHA, reduction="none")

    def eq_13(a, h):
        return order_k_loss(2, h, [score], (x - ALPHA * a) / SIGMA, SIGMA, reduction="none")

    cross = torch.einsum("bi,bj->bij", x, delta)
    bias = (cross + cross.mT) / SIGMA**2
    assert bias.abs().max() > 0.5
    close(minimiser(eq_11), truth - bias)
    close(minimiser(eq_12), truth)
    close(minimiser(eq_13), truth)
    assert eq_11(x, s2).shape == (B,)


def test_eq_12_is_eq_13_times_sigma_to_the_eighth():
    n, d = 5, 4
    x, z, score, diag = randn(4, n, 2, 2)
    factor, sigma, alpha = randn(n, d, 2, seed=1), torch.linspace(0.3, 2.0, n, dtype=F64), 0.8
    x_noisy = alpha * x + sigma.reshape(-1, 1, 1) * z
    flat, diag = z.flatten(1), diag.flatten(1)
    hessian = hos_ext.assemble_hessian(diag, factor)
    target = (torch.eye(d, dtype=F64) - flat.unsqueeze(2) * flat.unsqueeze(1)) / (
        sigma.reshape(-1, 1, 1) ** 2
    )
    eq_13 = hos_ext.d2sm_loss(score.flatten(1), diag, factor, flat, sigma, reduction="none")
    eq_13 = eq_13 + target.square().sum((1, 2))
    got = noise_moment_loss(x, x_noisy, score, hessian, sigma, alpha, reduction="none")
    close(got, sigma**8 * eq_13)
    whole = noise_moment_loss(x, x_noisy, score, hessian, 0.9, alpha, reduction="sum")
    each = noise_moment_loss(x, x_noisy, score, hessian, 0.9, alpha, reduction="none")
    close(whole, each.sum())


# --------------------------------------------------------------------------- the training function


class Network(nn.Module):
    """s_j for some orders j, the same at every sigma; called, sigma^j s_j in a form, and noted."""

    def __init__(self, orders, form, size, seed=20):
        super().__init__()
        self.orders, self.form, self.calls = orders, form, []
        self.first = nn.Parameter(randn(size, 8, seed=seed))
        self.last = nn.ParameterList(0.5 * randn(8, *[size] * j, seed=seed + j) for j in orders)

    def unscaled(self, x, *directions):
        hidden = torch.tanh(x.flatten(1) @ self.first)
        dense = [torch.tensordot(hidden, last, 1) for last in self.last]
        scores = contracted(dense, self.form, *directions)
        return [s.reshape(x.shape) for s in scores] if self.form == "diagonal" else scores

    def forward(self, x, sigma, *directions):
        self.calls.append((x, sigma, *directions))
        scores = []
        for j, s in zip(self.orders, self.unscaled(x, *directions), strict=True):
            level = torch.as_tensor(sigma, dtype=F64)
            scores.append(level.reshape(-1, *[1] * (s.dim() - 1)) ** j * s)
        return scores


def networks(k, form, size=4):
    """(model, lower, keywords of order_k_matching_loss); the model returns one tensor."""
    model, lower = Network([k], form, size), Network(list(range(1, k)), form, size, seed=30)
    return model, lower, {"k": k, "form": form, "lower": lower if k > 1 else None}


def loss_of(model, *args, **options):
    return order_k_matching_loss(lambda *a: model(*a)[0], *args, **options)


@pytest.mark.parametrize("k", ORDERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variance_reduction", [True, False])
@pytest.mark.parametrize("levels", ["float", "per_sample"])
def test_training_loss_is_the_operator_at_the_noised_points(k, form, variance_reduction, levels):
    x, z = randn(B, 2, 2), randn(B, 2, 2, seed=1)
    sigma, alpha = 0.4, 0.8
    if levels == "per_sample":
        sigma, alpha = torch.tensor([[0.2, 0.7, 1.3], [0.9, 0.8, 0.6]], dtype=F64)
    model, lower, options = networks(k, form)
    options |= {"alpha": alpha, "noise": z, "variance_reduction": variance_reduction}
    if form == "directional":
        options |= {"n_directions": M, "seed": 5}
    got = loss_of(model, x, sigma, scale_free=False, reduction="none", **options)

    directions = model.calls[0][2][:B] if form == "directional" else None
    rest = () if directions is None else (directions,)
    keys = {} if directions is None else {"directions": directions}
    column = torch.as_tensor(sigma, dtype=F64).reshape(-1, 1, 1)
    centre, shift = torch.as_tensor(alpha, dtype=F64).reshape(-1, 1, 1) * x, column * z

    def scores(points):
        with torch.no_grad():
            given = lower.unscaled(points, *rest)
        return [*given, *model.unscaled(points, *rest)]

    if variance_reduction:
        points = [centre + shift, centre - shift, centre][: 3 - k % 2]
        *given, score = map(torch.stack, zip(*map(scores, points), strict=True))
        if k > 2:
            along = derivative(lambda t: psi_from_scores(scores(centre + t * shift))[-1], k - 2)
            keys["derivative"] = along
        want = order_k_vr_loss(k, score, given, z, sigma, reduction="none", **keys)
    else:
        *given, score = scores(centre + shift)
        want = order_k_loss(k, score, given, z, sigma, reduction="none", **keys)
    close(got, want)

    weight = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    grads = torch.autograd.grad(weight @ got, list(model.parameters()))
    for grad, wanted in zip(
        grads, torch.autograd.grad(weight @ want, list(model.parameters())), strict=True
    ):
        close(grad, wanted)
    power = torch.as_tensor(sigma, dtype=F64) ** (2 * k)
    close(loss_of(model, x, sigma, reduction="sum", **options), (power * want).sum())
    close(loss_of(model, x, sigma, **options), (power * want).mean())


@pytest.mark.parametrize("k", ORDERS)
def test_lower_scores_are_given_even_where_they_share_the_network(k):
    """No gradient reaches them; torch.no_grad inside keeps their derivative along z."""
    model, lower, options = networks(k, "diagonal")
    x, z = randn(B, 4), randn(B, 4, seed=1)
    loss = loss_of(model, x, 0.5, noise=z, **options)
    loss.backward()
    assert all(p.grad is None for p in lower.parameters())
    assert all(p.grad.abs().max() > 1e-3 for p in model.parameters())
    if k > 1:
        options["lower"] = torch.no_grad()(lower)
        close(loss_of(model, x, 0.5, noise=z, **options), loss)


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_batch_draw_what_the_whole_draws(form):
    model, _, options = networks(3, form)
    x = randn(6, 4)
    options |= {"seed": 7, "offset": 2, "reduction": "none"}
    if form == "directional":
        options["n_directions"] = 2
    whole = loss_of(model, x, 0.5, **options)
    parts = [loss_of(model, x[:2], 0.5, **options), loss_of(model, x[2:], 0.5, first=2, **options)]
    close(torch.cat(parts), whole)
    options["offset"] = 3
    assert (loss_of(model, x, 0.5, **options) - whole).abs().min() > 1e-6


def test_directions_are_unit_uniform_and_of_their_own_stream():
    model = Network([1], "directional", 3)
    x = torch.zeros(4000, 3, dtype=F64)
    options = {"k": 1, "form": "directional", "n_directions": 2, "variance_reduction": False}
    loss_of(model, x, 1.0, seed=1, **options)
    z, _, v = model.calls[0]
    close(v.norm(dim=-1), torch.ones(4000, 2, dtype=F64))
    moments = torch.einsum("bmi,bmj->ij", v, v) / 8000
    assert (moments - torch.eye(3, dtype=F64) / 3).abs().max() < 5 * 0.3 / 8000**0.5
    assert (v.sum((0, 1)) / 8000).abs().max() < 5 * 0.58 / 8000**0.5
    loss_of(model, x, 1.0, seed=1, **options | {"n_directions": 1})  # elements of z and v coincide
    z, _, v = model.calls[1]
    assert (z * v[:, 0]).sum(1).mean().abs() < 5 / 4000**0.5
    torch.manual_seed(0)
    one = loss_of(model, x[:5], 1.0, **options)
    two = loss_of(model, x[:5], 1.0, **options)
    torch.manual_seed(0)
    assert one == loss_of(model, x[:5], 1.0, **options)
    assert one != two


def test_nothing_is_drawn_from_torch_where_nothing_is_needed():
    model, _, options = networks(2, "diagonal")
    x = randn(B, 4)
    state = torch.get_rng_state()
    loss_of(model, x, 0.5, noise=x, **options)
    loss_of(model, x, 0.5, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_batches_pass():
    x = torch.zeros(0, 4, dtype=F64)
    for k, form in product(ORDERS, FORMS):
        model, _, options = networks(k, form)
        for variance_reduction in True, False:
            options["variance_reduction"] = variance_reduction
            assert loss_of(model, x, 0.5, reduction="none", **options).shape == (0,)


# ---------------------------------------------------------------------------------------- variance


def variance(gradients):
    """Trace of the covariance of per-sample gradients (B, P)."""
    return gradients.var(0).sum().item()


def slope(levels, variances):
    return np.polyfit(np.log(levels), np.log(variances), 1)[0]


@pytest.mark.parametrize("k", ORDERS)
@pytest.mark.parametrize("form", ["dense", "diagonal"])
def test_gradient_variance_is_bounded_as_sigma_falls(k, form):
    """sigma^(-2k) for the plain loss, sigma^-4 paired without the derivative, O(1) with it."""
    levels, n, size = [3e-3, 1e-2, 3e-2], 400, 2
    x, z = randn(n, size), randn(n, size, seed=1)
    model, lower, options = networks(k, form, size)
    bias = torch.zeros(2, dtype=F64)

    def psi(points, shift):
        moved = points + shift * torch.tensor([1.0, -0.5], dtype=F64)
        return [*lower.unscaled(points), *model.unscaled(moved)]

    def training(variance_reduction, sigma):
        def losses(shift):
            def shifted(points, level):
                moved = points + shift * torch.tensor([1.0, -0.5], dtype=F64)
                return model(moved, level)[0]

            return order_k_matching_loss(
                shifted,
                x,
                sigma,
                noise=z,
                scale_free=False,
                variance_reduction=variance_reduction,
                reduction="none",
                **options,
            )

        return variance(jacfwd(losses)(bias))

    def pairing(sigma):
        def losses(shift):
            points = [x + sigma * z, x - sigma * z, x][: 3 - k % 2]
            each = [psi(p, shift) for p in points]
            *given, score = map(torch.stack, zip(*each, strict=True))
            return order_k_vr_loss(k, score, given, z, sigma, reduction="none")

        return variance(jacfwd(losses)(bias))

    plain = slope(levels, [training(False, s) for s in levels])
    assert abs(plain + 2 * k) < 0.15
    assert abs(slope(levels, [training(True, s) for s in levels])) < 0.15
    if k > 2:
        assert abs(slope(levels, [pairing(s) for s in levels]) + 4) < 0.15


# ----------------------------------------------------------------------------------------- errors

Z, S1, S2 = randn(B, D), randn(B, D), randn(B, D, D)
V = randn(B, M, D)
THREE = randn(3, B, D)


def train(**options):
    options = {"k": 2, "lower": lambda x, s: [x], "variance_reduction": False} | options
    model = options.pop("model", lambda x, s, *v: x)
    return order_k_matching_loss(model, options.pop("x", Z), options.pop("sigma", 1.0), **options)


def autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(x=Z.float(), variance_reduction=True)


ERRORS = {
    "k": (
        lambda: order_k_loss(0, S1, [], Z, 1.0),
        ValueError,
        "order_k_loss: k must be at least 1, got 0",
    ),
    "k_kind": (
        lambda: order_k_loss(2.0, S2, [S1], Z, 1.0),
        TypeError,
        "order_k_loss: k must be an int, got float",
    ),
    "noise": (
        lambda: order_k_loss(1, S1[0], [], Z[0], 1.0),
        ValueError,
        "order_k_loss: noise must have shape (B, *dims), got (2,)",
    ),
    "half": (
        lambda: order_k_loss(1, S1.half(), [], Z.half(), 1.0),
        ValueError,
        "order_k_loss: noise must have dtype float32, float64, got torch.float16",
    ),
    "lower_kind": (
        lambda: order_k_loss(2, S2, S1, Z, 1.0),
        TypeError,
        "order_k_loss: lower_scores must be a list of Tensors, got Tensor",
    ),
    "lower_count": (
        lambda: order_k_loss(3, S2, [S1], Z, 1.0),
        ValueError,
        "order_k_loss: lower_scores must hold 2 for k = 3, got 1",
    ),
    "score_kind": (
        lambda: order_k_loss(1, 0.0, [], Z, 1.0),
        TypeError,
        "order_k_loss: score_k must be a Tensor, got float",
    ),
    "forms": (
        lambda: order_k_loss(2, S1[:, :1], [S1], Z, 1.0),
        ValueError,
        (
            "order_k_loss: lower_scores and score_k must have shapes "
            "all (3, 2) (diagonal) or (3, 2), (3, 2, 2) "
            "(dense), got (3, 2), (3, 1)"
        ),
    ),
    "directional_form": (
        lambda: order_k_loss(2, S2, [S1], Z, 1.0, directions=V),
        ValueError,
        "order_k_loss: lower_scores and score_k must have shapes all (3, 4), got (3, 2), (3, 2, 2)",
    ),
    "directions": (
        lambda: order_k_loss(1, S1, [], Z, 1.0, directions=V[:2]),
        ValueError,
        "order_k_loss: directions must have shape (3, m, 2), got (2, 4, 2)",
    ),
    "sigma": (
        lambda: order_k_loss(1, S1, [], Z, 0.0),
        ValueError,
        "order_k_loss: sigma must be positive, got 0.0",
    ),
    "reduction": (
        lambda: order_k_loss(1, S1, [], Z, 1.0, reduction="all"),
        ValueError,
        "order_k_loss: reduction must be 'mean', 'sum' or 'none', got 'all'",
    ),
    "vr_k": (
        lambda: order_k_vr_loss(5, THREE, [THREE] * 4, Z, 1.0),
        ValueError,
        "order_k_vr_loss: k must be at most 4 with variance reduction, got 5",
    ),
    "vr_points": (
        lambda: order_k_vr_loss(2, THREE[:2], [THREE[:2]], Z, 1.0),
        ValueError,
        (
            "order_k_vr_loss: lower_scores and score_k must have shapes "
            "all (3, 3, 2) (diagonal) or (3, 3, 2), "
            "(3, 3, 2, 2) (dense), got (2, 3, 2), (2, 3, 2)"
        ),
    ),
    "vr_points_odd": (
        lambda: order_k_vr_loss(1, THREE, [], Z, 1.0),
        ValueError,
        (
            "order_k_vr_loss: lower_scores and score_k must have shapes "
            "all (2, 3, 2) (diagonal) or (2, 3, 2) "
            "(dense), got (3, 3, 2)"
        ),
    ),
    "derivative": (
        lambda: order_k_vr_loss(2, THREE, [THREE], Z, 1.0, derivative=Z),
        ValueError,
        "order_k_vr_loss: derivative must be None for k = 2, got a tensor",
    ),
    "derivative_shape": (
        lambda: order_k_vr_loss(4, THREE, [THREE] * 3, Z, 1.0, derivative=S2),
        ValueError,
        "order_k_vr_loss: derivative must have shape (3, 2), got (3, 2, 2)",
    ),
    "vr_sigma": (
        lambda: order_k_vr_loss(2, THREE, [THREE], Z, torch.ones(2, dtype=F64)),
        ValueError,
        "order_k_vr_loss: sigma must be a float or have shape (3,), got (2,)",
    ),
    "vr_reduction": (
        lambda: order_k_vr_loss(2, THREE, [THREE], Z, 1.0, reduction=None),
        ValueError,
        "order_k_vr_loss: reduction must be 'mean', 'sum' or 'none', got None",
    ),
    "hermite_noise": (
        lambda: hermite(Z[0], 2),
        ValueError,
        "hermite: noise must have shape (B, *dims), got (2,)",
    ),
    "hermite_k": (
        lambda: hermite(Z, 0),
        ValueError,
        "hermite: k must be at least 1, got 0",
    ),
    "hermite_form": (
        lambda: hermite(Z, 2, diagonal=True, directions=V),
        ValueError,
        "hermite: diagonal must be False where directions are given, got True",
    ),
    "hermite_directions": (
        lambda: hermite(Z, 2, directions=V[0]),
        ValueError,
        "hermite: directions must have shape (3, m, 2), got (4, 2)",
    ),
    "training_x": (
        lambda: train(x=Z[0]),
        ValueError,
        "order_k_matching_loss: x0 must have shape (B, *dims), got (2,)",
    ),
    "training_sigma": (
        lambda: train(sigma=-1.0),
        ValueError,
        "order_k_matching_loss: sigma must be positive, got -1.0",
    ),
    "training_alpha": (
        lambda: train(alpha=float("inf")),
        ValueError,
        "order_k_matching_loss: alpha must be finite, got inf",
    ),
    "form": (
        lambda: train(form="full"),
        ValueError,
        "order_k_matching_loss: form must be 'dense', 'diagonal' or 'directional', got 'full'",
    ),
    "training_k": (
        lambda: train(k=0),
        ValueError,
        "order_k_matching_loss: k must be at least 1, got 0",
    ),
    "training_vr_k": (
        lambda: train(k=5, variance_reduction=True),
        ValueError,
        "order_k_matching_loss: k must be at most 4 with variance reduction, got 5",
    ),
    "n_directions": (
        lambda: train(form="directional", n_directions=0),
        ValueError,
        "order_k_matching_loss: n_directions must be at least 1, got 0",
    ),
    "n_directions_unused": (
        lambda: train(n_directions=2),
        ValueError,
        "order_k_matching_loss: n_directions must be 1 for form 'diagonal', got 2",
    ),
    "lower_missing": (
        lambda: train(lower=None, k=3),
        ValueError,
        "order_k_matching_loss: lower must give s1 to s2, got None",
    ),
    "lower_unused": (
        lambda: train(lower=len, k=1),
        ValueError,
        "order_k_matching_loss: lower must be None for k = 1, got <built-in function len>",
    ),
    "lower_returns_tensor": (
        lambda: train(lower=lambda x, s: x),
        TypeError,
        "order_k_matching_loss: lower must return a list of 1 Tensors, got Tensor",
    ),
    "lower_returns_too_many": (
        lambda: train(lower=lambda x, s: [x, x]),
        TypeError,
        "order_k_matching_loss: lower must return a list of 1 Tensors, got 2",
    ),
    "lower_returns_shape": (
        lambda: train(lower=lambda x, s: [x[:1]]),
        ValueError,
        "order_k_matching_loss: what lower returns for s1 must have shape (3, 2), got (1, 2)",
    ),
    "model_returns_shape": (
        lambda: train(form="dense"),
        ValueError,
        "order_k_matching_loss: what model returns must have shape (3, 2, 2), got (3, 2)",
    ),
    "model_returns_points": (
        lambda: train(model=lambda x, s: x[:3], variance_reduction=True),
        ValueError,
        "order_k_matching_loss: what model returns must have shape (9, 2), got (3, 2)",
    ),
    "model_returns_directions": (
        lambda: train(form="directional", k=1, lower=None, n_directions=4),
        ValueError,
        "order_k_matching_loss: what model returns must have shape (3, 4), got (3, 2)",
    ),
    "model_returns_kind": (
        lambda: train(model=lambda x, s: None),
        TypeError,
        "order_k_matching_loss: what model returns must be a Tensor, got NoneType",
    ),
    "model_returns_dtype": (
        lambda: train(model=lambda x, s: x.float()),
        ValueError,
        (
            "order_k_matching_loss: what model returns must have dtype torch.float64, got "
            "torch.float32"
        ),
    ),
    "training_noise": (
        lambda: train(noise=Z[:2]),
        ValueError,
        "order_k_matching_loss: noise must have shape (3, 2), got (2, 2)",
    ),
    "seed_unused": (
        lambda: train(noise=Z, seed=3),
        ValueError,
        "order_k_matching_loss: seed must be None where nothing is drawn, got 3",
    ),
    "training_reduction": (
        lambda: train(reduction="all"),
        ValueError,
        "order_k_matching_loss: reduction must be 'mean', 'sum' or 'none', got 'all'",
    ),
    "dropout": (
        lambda: train(lower=nn.Dropout(0.1), variance_reduction=True),
        ValueError,
        (
            "order_k_matching_loss: dropout must be off when several points are visited (its masks "
            "differ between them), got p = 0.1 in 'Dropout'"
        ),
    ),
    "autocast": (
        autocast,
        ValueError,
        (
            "order_k_matching_loss: variance reduction needs float32 or float64, got autocast to "
            "torch.bfloat16"
        ),
    ),
    "second_x": (
        lambda: second_moment_loss(Z[0], Z[0], S1[0], S2[0], 1.0),
        ValueError,
        "second_moment_loss: x0 must have shape (B, *dims), got (2,)",
    ),
    "second_noisy": (
        lambda: second_moment_loss(Z, Z[:2], S1, S2, 1.0),
        ValueError,
        "second_moment_loss: x must have shape (3, 2), got (2, 2)",
    ),
    "second_score": (
        lambda: noise_moment_loss(Z, Z, S2, S2, 1.0),
        ValueError,
        "noise_moment_loss: score must have shape (3, 2), got (3, 2, 2)",
    ),
    "second_hessian": (
        lambda: noise_moment_loss(Z, Z, S1, S1, 1.0),
        ValueError,
        "noise_moment_loss: hessian must have shape (3, 2, 2), got (3, 2)",
    ),
    "second_sigma": (
        lambda: second_moment_loss(Z, Z, S1, S2, 0.0),
        ValueError,
        "second_moment_loss: sigma must be positive, got 0.0",
    ),
    "second_alpha": (
        lambda: second_moment_loss(Z, Z, S1, S2, 1.0, 0.0),
        ValueError,
        "second_moment_loss: alpha must be positive, got 0.0",
    ),
    "third_sigma": (
        lambda: noise_moment_loss(Z, Z, S1, S2, 0.0),
        ValueError,
        "noise_moment_loss: sigma must be positive, got 0.0",
    ),
    "third_alpha": (
        lambda: noise_moment_loss(Z, Z, S1, S2, 1.0, 0.0),
        ValueError,
        "noise_moment_loss: alpha must be positive, got 0.0",
    ),
    "second_reduction": (
        lambda: second_moment_loss(Z, Z, S1, S2, 1.0, reduction="all"),
        ValueError,
        "second_moment_loss: reduction must be 'mean', 'sum' or 'none', got 'all'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_names_the_argument_and_the_rule(case):
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=exactly(message)):
        call()
