"""The training objective against dense oracles, its minimiser, its variance, and every error."""

import functools
import inspect
import math
import re

import oracles
import pytest
import torch
from torch import nn

from hos_ext import ops
from hos_ext.losses.module import ScoreMatchingLoss
from hos_ext.losses.score_matching import Objective, score_matching_loss
from hos_ext.nn.mlp import MLP
from hos_ext.ops import reference
from hos_ext.schedules import VP
from hos_ext.scores import Scores, UnscaledScores

# The objective of the paper, Eq. 33, or another one by option.
paper_loss = functools.partial(score_matching_loss, variance_reduction=True, centred=False)

DIMS = (2, 3)
SIZE = 6
BATCH = 5


def exactly(message):
    """A pattern for `pytest.raises` that only the whole message matches."""
    return f"^{re.escape(message)}$"


class Field(nn.Module):
    """Smooth unscaled s1(x), d(x), U(x), the same at every sigma, returned in scaled quantities."""

    def __init__(self, rank=2, sign=None, size=SIZE):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.rank, self.sign, self.calls = rank, sign, []
        self.score = nn.Parameter(torch.randn(size, size, generator=g, dtype=torch.float64))
        self.diag = nn.Parameter(torch.randn(size, size, generator=g, dtype=torch.float64))
        self.factor = nn.Parameter(torch.randn(size, size * rank, generator=g, dtype=torch.float64))

    def unscaled(self, x):
        flat = x.flatten(1)
        factor = None
        if self.rank:
            factor = torch.cos(flat @ self.factor).unflatten(-1, (-1, self.rank))
        return UnscaledScores(
            torch.sin(flat @ self.score).reshape(x.shape),
            torch.tanh(flat @ self.diag).reshape(x.shape),
            factor,
            self.sign,
        )

    def forward(self, x, sigma):
        self.calls.append((x.shape[0], sigma))
        return self.unscaled(x).scaled(sigma)


def batch(seed=0, n=BATCH, dims=DIMS):
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, n, *dims, generator=g, dtype=torch.float64)
    return x, noise


def levels(kind, n=BATCH):
    """sigma and alpha as floats, or one for each sample."""
    if kind == "float":
        return 0.3, 0.8
    sigma = torch.linspace(0.05, 1.5, n, dtype=torch.float64)
    return sigma, (1 + sigma.square()).rsqrt()


def expected(model, x, noise, sigma, alpha, *, variance_reduction, first_order, diagonal, detach):
    """(first, second) per sample, Eq. 3, 13, 17, 32, 33 in unscaled scores, by the oracles."""

    def column(value):
        return torch.as_tensor(value, dtype=x.dtype).reshape(-1, 1, 1)

    centre, shift = column(alpha) * x, column(sigma) * noise
    at = [model.unscaled(p) for p in (centre + shift, centre - shift, centre)]
    score, diag = (torch.stack([getattr(s, k).flatten(1) for s in at]) for k in ("score", "diag"))
    factor = torch.stack([s.factor for s in at]) if model.rank else None
    z = noise.flatten(1)
    if first_order == "antithetic":
        first = (oracles.dsm_loss(score[0], z, sigma) + oracles.dsm_loss(score[1], -z, sigma)) / 2
    elif first_order == "vr":
        first = oracles.dsm_vr_loss(score[[0, 2]], z, sigma)
    else:
        first = oracles.dsm_loss(score[0], z, sigma)
    if detach:
        score = score.detach()
    if variance_reduction:
        if diagonal:
            return first, oracles.d2sm_diag_vr_loss(score, diag, z, sigma)
        return first, oracles.d2sm_vr_loss(score, diag, factor, z, sigma, model.sign)
    if diagonal:
        return first, oracles.d2sm_diag_loss(score[0], diag[0], z, sigma)
    plus = None if factor is None else factor[0]
    return first, oracles.d2sm_loss(score[0], diag[0], plus, z, sigma, model.sign)


@pytest.mark.parametrize("kind", ["float", "per_sample"])
@pytest.mark.parametrize("variance_reduction", [True, False])
@pytest.mark.parametrize("first_order", ["antithetic", "vr", "plain"])
@pytest.mark.parametrize("head", ["low_rank", "signed", "rank_0", "diagonal"])
@pytest.mark.parametrize("detach", [True, False])
def test_loss_and_gradients_equal_the_oracles(kind, variance_reduction, first_order, head, detach):
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64) if head == "signed" else None
    model = Field(rank=2 if head in ("low_rank", "signed") else 0, sign=sign)
    x, noise = batch()
    sigma, alpha = levels(kind)
    options = {
        "variance_reduction": variance_reduction,
        "first_order": first_order,
        "diagonal": head == "diagonal",
    }
    first, second = expected(model, x, noise, sigma, alpha, detach=detach, **options)
    options |= {"alpha": alpha, "gamma": 0.7, "noise": noise, "detach_score": detach}
    weight = torch.linspace(0.5, 2.0, BATCH, dtype=torch.float64)  # a cotangent that is not ones

    def check(loss, reference):
        torch.testing.assert_close(loss, reference, rtol=1e-9, atol=1e-9)
        wrt = list(model.parameters())
        grads = torch.autograd.grad(weight @ loss, wrt, allow_unused=True)
        truth = torch.autograd.grad(weight @ reference, wrt, allow_unused=True, retain_graph=True)
        for grad, true in zip(grads, truth, strict=True):
            assert (grad is None) == (true is None)
            if true is not None:
                torch.testing.assert_close(grad, true, rtol=1e-8, atol=1e-8)

    paper = paper_loss(model, x, sigma, scale_free=False, reduction="none", **options)
    check(paper, second + 0.7 * first)
    scaled = paper_loss(model, x, sigma, reduction="none", **options)
    check(scaled, sigma**4 * second + 0.7 * sigma**2 * first)


@pytest.mark.parametrize("variance_reduction", [True, False])
@pytest.mark.parametrize("scale_free", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_terms_add_up_and_carry_no_gradient(variance_reduction, scale_free, reduction):
    model, (x, noise), (sigma, alpha) = Field(), batch(), levels("per_sample")
    options = {"alpha": alpha, "noise": noise, "scale_free": scale_free}
    options |= {"variance_reduction": variance_reduction, "gamma": 3.0}
    loss, terms = paper_loss(model, x, sigma, return_terms=True, reduction=reduction, **options)
    assert set(terms) == {"first", "second"}
    assert not any(term.requires_grad for term in terms.values())
    torch.testing.assert_close(loss, terms["second"] + 3.0 * terms["first"])
    rows = paper_loss(model, x, sigma, reduction="none", **options)
    reduced = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    torch.testing.assert_close(loss, reduced)
    torch.testing.assert_close(loss, paper_loss(model, x, sigma, reduction=reduction, **options))


@pytest.mark.parametrize(
    ("variance_reduction", "first_order", "points"),
    [
        (True, "antithetic", (1, -1, 0)),
        (True, "vr", (1, -1, 0)),
        (True, "plain", (1, -1, 0)),
        (False, "antithetic", (1, -1)),
        (False, "vr", (1, 0)),
        (False, "plain", (1,)),
    ],
)
def test_model_is_visited_once_at_the_points_that_the_terms_need(
    variance_reduction, first_order, points
):
    model, (x, noise), (sigma, alpha) = Field(), batch(), levels("per_sample")
    seen = []
    options = {"variance_reduction": variance_reduction, "first_order": first_order}
    paper_loss(
        lambda p, s: (seen.append((p, s)), model(p, s))[1],
        x,
        sigma,
        alpha=alpha,
        noise=noise,
        **options,
    )
    assert len(seen) == 1
    wanted = [
        alpha.reshape(-1, 1, 1) * x + side * sigma.reshape(-1, 1, 1) * noise for side in points
    ]
    torch.testing.assert_close(seen[0][0], torch.cat(wanted))
    torch.testing.assert_close(seen[0][1], sigma.repeat(len(points)))


def test_detached_score_takes_gradients_from_the_first_term_alone():
    model, (x, noise) = Field(), batch()
    kept = paper_loss(model, x, 0.3, noise=noise, gamma=0.0, detach_score=False)
    assert torch.autograd.grad(kept, model.score)[0].abs().max() > 1e-3
    given = paper_loss(model, x, 0.3, noise=noise, gamma=0.0)
    assert torch.autograd.grad(given, model.score)[0].abs().max() == 0


def centred_term(model, x, noise, sigma, alpha, points, variance_reduction, diagonal):
    """Dense, per sample: the mean of |kappa - e e^T|^2 - |I - e e^T|^2, e = z + sigma s1, over the
    points, less 2 <I - z z^T, kappa - I> at the clean one to reduce variance; or by diagonals."""
    eye = torch.eye(SIZE, dtype=torch.float64)

    def at(z):
        scores = model.unscaled(alpha.view(-1, 1, 1) * x + sigma.view(-1, 1, 1) * z).scaled(sigma)
        kappa = torch.diag_embed(scores.c.flatten(1))
        if scores.factor is not None:
            weight = 1.0 if model.sign is None else model.sign
            kappa = kappa + (scores.factor * weight) @ scores.factor.mT
        e = (z + scores.scaled_score.detach()).flatten(1)
        return kappa, e.unsqueeze(2) * e.unsqueeze(1)

    mask, made = eye if diagonal else torch.ones_like(eye), []
    for z in (noise, -noise)[:points]:
        kappa, outer = at(z)
        gap = (kappa - outer).square() - (eye - outer).square()
        made.append((gap * mask).sum((1, 2)))
    value = torch.stack(made).mean(0)
    if variance_reduction:
        z = noise.flatten(1)
        control = (eye - z.unsqueeze(2) * z.unsqueeze(1)) * (at(0 * noise)[0] - eye)
        value = value - 2 * (control * mask).sum((1, 2))
    return value


@pytest.mark.parametrize("variance_reduction", [True, False])
@pytest.mark.parametrize("first_order", ["antithetic", "vr", "plain"])
@pytest.mark.parametrize("head", ["plus", "signed", "rank_0", "diagonal"])
def test_centred_term_is_the_distance_from_the_errors_made(head, first_order, variance_reduction):
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64) if head == "signed" else None
    model = Field(0 if head in ("rank_0", "diagonal") else 2, sign)
    (x, noise), (sigma, alpha) = batch(), levels("rows")
    _, terms = paper_loss(
        model, x, sigma, alpha=alpha, variance_reduction=variance_reduction, centred=True,
        noise=noise, first_order=first_order, diagonal=head == "diagonal", reduction="none",
        return_terms=True,
    )  # fmt: skip
    points = 2 if variance_reduction or first_order == "antithetic" else 1
    wanted = centred_term(
        model, x, noise, sigma, alpha, points, variance_reduction, head == "diagonal"
    )
    assert torch.allclose(terms["second"], wanted, rtol=1e-9)


@pytest.mark.parametrize("head", ["low_rank", "diagonal"])
def test_centred_reduced_gradients_equal_the_oracles(head):
    model = Field(0 if head == "diagonal" else 2)
    (x, noise), (sigma, alpha) = batch(), levels("rows")
    options = {"centred": True, "noise": noise, "alpha": alpha, "diagonal": head == "diagonal"}
    value = paper_loss(model, x, sigma, gamma=0.0, **options)
    wanted = centred_term(model, x, noise, sigma, alpha, 2, True, head == "diagonal").mean()
    parameters = [model.diag, model.factor][: 2 if model.rank else 1]
    for got, want in zip(
        torch.autograd.grad(value, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 2])
def test_centred_reduced_loss_passes_gradcheck(rank):
    (x, noise), (sigma, alpha) = batch(), levels("rows")
    points, g = 3 * len(x), torch.Generator().manual_seed(8)
    shapes = [(points, *DIMS), (points, *DIMS)] + ([(points, SIZE, rank)] if rank else [])
    score, *heads = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    options = {"alpha": alpha, "centred": True, "noise": noise, "reduction": "none"}

    def loss(*heads):
        return paper_loss(lambda *_: Scores(score, *heads), x, sigma, gamma=0.0, **options)

    assert torch.autograd.gradcheck(loss, [head.requires_grad_() for head in heads])


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("wrong", [1.0, 1.2])
def test_centred_control_variate_has_no_mean(diagonal, wrong):
    """The reduced gradient less the plain one, of the same draws, at a true and at a wrong s1."""
    n, sigma = 20_000, 0.3
    model = GaussianRows(n, sigma, 1.0, diagonal)
    with torch.no_grad():
        model.params["A"].mul_(wrong)
        model.params["d"].mul_(0.8)
    g = torch.Generator().manual_seed(4)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    x = x @ torch.linalg.cholesky(model.covariance).mT
    options = {"seed": 12, "diagonal": diagonal, "centred": True, "gamma": 0.0}
    reduced = model.gradients(x, sigma, **options)
    plain = model.gradients(x, sigma, variance_reduction=False, **options)
    apart = {k: reduced[k] - plain[k] for k in reduced}
    assert max(z_scores({k: v for k, v in apart.items() if k != "A"}).values()) < 4.5
    assert apart["d"].abs().max() > 0.1
    assert apart["A"].abs().max() == 0
    assert all(v.var(0).sum() < plain[k].var(0).sum() for k, v in reduced.items() if k != "A")


@pytest.mark.parametrize("sigma", [0.05, 0.7])
def test_centred_reduced_loss_finds_the_second_moment_of_the_errors(sigma):
    """s1 = -wrong P x: kappa = I - sigma^2 P + (wrong - 1)^2 sigma^2 P (I / P) P, in the mean."""
    n, wrong = 200_000, 1.3
    model = GaussianRows(n, sigma, 1.0, diagonal=True)
    precision = model.params["A"][0].detach().clone()
    with torch.no_grad():
        model.params["A"].mul_(wrong)
        model.params["d"].zero_()
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    x = x @ torch.linalg.cholesky(model.covariance).mT
    options = {"diagonal": True, "centred": True, "gamma": 0.0, "scale_free": False, "seed": 3}
    slope = model.gradients(x, sigma, **options)["d"]
    # Quadratic in d with second derivative 2: one Newton step from 0 is the minimiser.
    found = -slope.mean(0) / 2
    # E[delta delta^T] = (wrong - 1)^2 P E[x~ x~^T] P = (wrong - 1)^2 P.
    wanted = -precision.diagonal() + (wrong - 1) ** 2 * precision.diagonal()
    spread = slope.std(0) / 2 / n**0.5
    assert ((found - wanted) / spread).abs().max() < 4.5
    assert (spread < 0.02 * wanted.abs()).all()


def test_centred_term_leaves_the_score_alone():
    model, (x, noise) = Field(), batch()
    options = {"gamma": 0.0, "variance_reduction": False, "centred": True, "noise": noise}
    paper_loss(model, x, 0.3, **options).backward()
    assert model.score.grad.abs().max() == 0
    assert model.diag.grad.abs().max() > 0
    assert model.factor.grad.abs().max() > 0


class GaussianRows:
    """Scores of N(0, diag(t) + v v^T) noised to (alpha, sigma), with parameters for every row.

    s1 = -A x, s2 = diag(d) + u u^T: exact at the values set here, so each row of `.grad` is the
    gradient of one sample's loss, and their mean estimates the expected gradient.
    """

    def __init__(self, n, sigma, alpha, diagonal=False):
        t, v = torch.tensor([[0.5, 1.0, 2.0], [0.9, -0.6, 1.2]], dtype=torch.float64)
        self.covariance = torch.diag(t) + torch.outer(v, v)
        e = alpha**2 * t + sigma**2
        w = alpha * v  # (diag(e) + w w^T)^-1 by Sherman and Morrison
        u = w / e / (1 + (w * w / e).sum()).sqrt()
        precision = torch.diag(1 / e) - torch.outer(u, u)
        self.params = {"A": precision, "d": -1 / e, "u": u}
        if diagonal:
            self.params = {"A": precision, "d": -precision.diagonal()}
        self.params = {k: p.expand(n, *p.shape).clone() for k, p in self.params.items()}
        for parameter in self.params.values():
            parameter.requires_grad_()

    def __call__(self, x, sigma):
        p = {
            k: v.repeat(x.shape[0] // v.shape[0], *[1] * (v.dim() - 1))
            for k, v in self.params.items()
        }
        score = -(p["A"] @ x.unsqueeze(-1)).squeeze(-1)
        factor = p["u"].unsqueeze(-1) if "u" in p else None
        return UnscaledScores(score, p["d"], factor).scaled(sigma)

    def gradients(self, x, sigma, **options):
        loss = paper_loss(self, x, sigma, reduction="sum", **options)
        grads = torch.autograd.grad(loss, list(self.params.values()))
        return {k: g.flatten(1) for k, g in zip(self.params, grads, strict=True)}


def z_scores(grads):
    """Mean over rows in standard errors, for each group of parameters: the largest."""
    return {
        k: (g.mean(0) / (g.std(0) / g.shape[0] ** 0.5 + 1e-300)).abs().max().item()
        for k, g in grads.items()
    }


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize(
    ("variance_reduction", "first_order", "centred"),
    [
        (True, "antithetic", False),
        (True, "vr", False),
        (False, "plain", False),
        (False, "antithetic", True),
        (True, "antithetic", True),
        (True, "plain", True),
    ],
)
@pytest.mark.parametrize("diagonal", [True, False])
def test_exact_gaussian_scores_are_stationary(
    alpha, variance_reduction, first_order, centred, diagonal
):
    n, sigma = 20_000, 0.7
    model = GaussianRows(n, sigma, alpha, diagonal)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    x = x @ torch.linalg.cholesky(model.covariance).mT
    options = {"alpha": alpha, "seed": 11, "diagonal": diagonal, "first_order": first_order}
    options |= {"variance_reduction": variance_reduction, "centred": centred}
    at_truth = z_scores(model.gradients(x, sigma, **options))
    assert max(at_truth.values()) < 4.5, at_truth
    # 30 % off, scaled as if by sigma^-1 instead of sigma^-2, of the wrong sign (U: halved)
    for name, parameter in model.params.items():
        for factor in (1.3, sigma, 0.5 if name == "u" else -1.0):
            with torch.no_grad():
                parameter.mul_(factor)
            off = z_scores(model.gradients(x, sigma, **options))
            with torch.no_grad():
                parameter.div_(factor)
            assert off[name] > 8, (name, factor, off)


class FeatureRows:
    """Unscaled scores linear in fixed smooth features, with output weights for every row."""

    def __init__(self, n, rank, d=4, hidden=8):
        g = torch.Generator().manual_seed(5)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.inner, self.shift, self.d, self.rank = draw(d, hidden), draw(hidden), d, rank
        outputs = {"score": d, "diag": d} | ({"factor": d * rank} if rank else {})
        self.params = {
            k: (draw(hidden, m) / hidden**0.5).expand(n, -1, -1).clone().requires_grad_()
            for k, m in outputs.items()
        }

    def __call__(self, x, sigma):
        hidden = torch.tanh(x @ self.inner + self.shift).unsqueeze(-2)
        out = {
            k: (hidden @ p.repeat(x.shape[0] // p.shape[0], 1, 1)).squeeze(-2)
            for k, p in self.params.items()
        }
        factor = out["factor"].unflatten(-1, (self.d, self.rank)) if self.rank else None
        return UnscaledScores(out["score"], out["diag"], factor).scaled(sigma)


def slope(model, names, **options):
    """d log(trace of the gradient's covariance over draws) / d log sigma, as sigma -> 0."""
    x = batch(1, 4000, (4,))[0]
    sigmas = torch.tensor([1e-3, 3e-3, 1e-2, 3e-2], dtype=torch.float64)
    traces = []
    for sigma in sigmas.tolist():
        loss = paper_loss(model, x, sigma, scale_free=False, seed=2, reduction="sum", **options)
        grads = torch.autograd.grad(loss, [model.params[k] for k in names])
        traces.append(sum(g.flatten(1).var(0).sum() for g in grads))
    u, v = sigmas.log(), torch.stack(traces).log()
    return ((u - u.mean()) @ (v - v.mean()) / (u - u.mean()).square().sum()).item()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("variance_reduction", "order"), [(True, 0), (False, -4)])
def test_second_order_gradient_variance_has_the_papers_slope(
    rank, variance_reduction, order, centred
):
    model = FeatureRows(4000, rank)
    options = {"variance_reduction": variance_reduction, "diagonal": rank == 0, "centred": centred}
    names = ["diag", "factor"] if rank else ["diag"]
    assert slope(model, names, **options) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("first_order", "order"), [("antithetic", 0), ("vr", 0), ("plain", -2)])
def test_first_order_gradient_variance_has_the_papers_slope(first_order, order):
    model = FeatureRows(4000, 2)
    assert slope(model, ["score"], first_order=first_order) == pytest.approx(order, abs=0.1)


def test_split_batches_draw_what_one_batch_draws():
    model, (x, _), (sigma, alpha) = Field(), batch(), levels("per_sample")
    options = {"seed": 5, "offset": 9, "reduction": "none"}
    whole = paper_loss(model, x, sigma, alpha=alpha, first=100, **options)
    parts = [
        paper_loss(model, x[s], sigma[s], alpha=alpha[s], first=100 + s.start, **options)
        for s in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-10, atol=1e-10)
    noise = ops.normal(x.shape, seed=5, offset=9, first=100, stream=3, dtype=x.dtype)
    given = paper_loss(model, x, sigma, alpha=alpha, noise=noise, reduction="none")
    assert torch.equal(given, whole)
    for change in ({"seed": 6}, {"offset": 10}, {"first": 101}):
        other = paper_loss(model, x, sigma, alpha=alpha, **(options | {"first": 100} | change))
        assert not torch.allclose(other, whole)


def test_default_seed_comes_from_torch():
    model, (x, _) = Field(), batch()
    torch.manual_seed(0)
    one = paper_loss(model, x, 0.3)
    two = paper_loss(model, x, 0.3)
    torch.manual_seed(0)
    assert torch.equal(paper_loss(model, x, 0.3), one)
    assert not torch.equal(one, two)


def test_scalar_tensor_levels_equal_floats():
    model, (x, noise) = Field(), batch()
    one = paper_loss(model, x, 0.3, alpha=0.8, noise=noise)
    tensors = [torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.8)]
    two = paper_loss(model, x, tensors[0], alpha=tensors[1], noise=noise)
    torch.testing.assert_close(one, two)


def test_levels_of_another_dtype_leave_the_loss_in_that_of_x():
    model = MLP(DIMS, 2)
    x = batch()[0].float()
    sigma, alpha = levels("per_sample")  # float64
    loss = paper_loss(model, x, sigma, alpha=alpha, scale_free=False, seed=0)
    assert loss.dtype == torch.float32
    same = paper_loss(model, x, sigma.float(), alpha=alpha.float(), scale_free=False, seed=0)
    torch.testing.assert_close(loss, same)


def test_not_a_number_passes_through():
    model, (x, noise) = Field(), batch()
    x[1, 0, 0] = math.nan
    loss = paper_loss(model, x, 0.3, noise=noise, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("variance_reduction", [True, False])
def test_empty_batch_sums_to_zero(variance_reduction):
    loss = paper_loss(
        MLP(DIMS, 2),
        torch.zeros(0, *DIMS),
        torch.ones(0),
        variance_reduction=variance_reduction,
        reduction="sum",
    )
    assert loss.item() == 0


def half_outputs(x, sigma, dtype=torch.bfloat16):
    model = Field()
    scores = model(x.double(), sigma)
    return Scores(scores.scaled_score.to(dtype), scores.c.to(dtype), scores.factor.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first_order", ["antithetic", "plain"])
def test_plain_losses_raise_half_precision_to_float32(dtype, first_order):
    x, noise = batch()
    options = {"variance_reduction": False, "first_order": first_order, "reduction": "none"}

    def rounded(p, sigma):
        return half_outputs(p, sigma, dtype)

    def widened(p, sigma):
        return rounded(p, sigma).to(torch.float32)

    x, noise = x.to(dtype), noise.to(dtype)
    loss = paper_loss(rounded, x, 0.3, noise=noise, **options)
    assert loss.dtype == torch.float32
    truth = paper_loss(
        lambda p, sigma: widened(p.to(dtype), sigma),
        x.float(),
        0.3,
        noise=noise.float(),
        **options,
    )
    torch.testing.assert_close(loss, truth, rtol=0.05, atol=0.5)


def test_plain_loss_under_autocast_is_computed_in_float32(monkeypatch):
    x, noise = (t.float() for t in batch())
    scores = half_outputs(x, 0.3).to(torch.float32)
    options = {"variance_reduction": False, "first_order": "plain", "noise": noise}
    outside = paper_loss(lambda p, s: scores, x, 0.3, **options)
    # the plain-torch operators would lose digits to it where there is no native kernel
    monkeypatch.setattr(ops, "d2sm_loss", d2sm_loss_by_reference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = paper_loss(lambda p, s: scores, x, 0.3, **options)
    torch.testing.assert_close(inside, outside)


def d2sm_loss_by_reference(score, diag, factor, noise, sigma, *, sign, reduction):
    return reference.d2sm_loss(score, diag, factor, noise, sigma, sign)


@pytest.mark.parametrize(
    "options", [{}, {"variance_reduction": False, "first_order": "vr"}, {"diagonal": True}]
)
def test_variance_reduction_refuses_half_precision(options):
    x, noise = batch()
    rule = "score_matching_loss: variance reduction needs float32 or float64, got "
    half = x.bfloat16()
    with pytest.raises(ValueError, match=exactly(f"{rule}x0 torch.bfloat16")):
        paper_loss(half_outputs, half, 0.3, **options)
    if not options.get("diagonal"):
        with pytest.raises(ValueError, match=exactly(f"{rule}scaled_score torch.bfloat16")):
            paper_loss(half_outputs, x, 0.3, noise=noise, **options)


class Told(MLP):
    """A network whose data have a standard deviation of 2."""

    def __init__(self):
        super().__init__(DIMS, 0, sigma_data=2.0)


@pytest.mark.parametrize("form", ["float", "rows", "alpha"])
@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 0.6),
        ({"first_order": "vr"}, 0.6),
        ({"variance_reduction": False, "first_order": "vr"}, 0.6),
        ({"centred": True}, 0.1),
    ],
)
def test_variance_reduction_under_autocast_is_refused_below_a_level(options, least, form):
    """0.3 standard deviations of the data for Eq. 33, 0.05 for the centred objective."""
    x, model, alpha = batch()[0].float(), Told(), 1.0
    low, high = 0.95 * least, 1.05 * least
    if form == "alpha":
        low, high, alpha = 1.5 * low, 1.5 * high, 1.5
    elif form == "rows":
        low, high = torch.tensor([high, high, low, high, high]), torch.full((5,), high)
    options = options | {"alpha": alpha, "seed": 0, "diagonal": True}
    rule = f"score_matching_loss: sigma / alpha must be at least {least:g} for variance reduction"
    rule += " under autocast to torch.bfloat16 (the objective with variance_reduction=False"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match=re.escape(rule)):
            paper_loss(model, x, low, **options)
        for loss in (
            paper_loss(model, x, high, **options),
            score_matching_loss(model, x, low, alpha=alpha, seed=0),  # the default, at any level
        ):
            assert loss.dtype == torch.float32
            assert loss.isfinite()


def test_the_module_refuses_a_range_that_begins_too_low():
    model, x = Told(), batch()[0].float()
    reduced = {"variance_reduction": True, "centred": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = ScoreMatchingLoss((0.01, 1.0), **reduced)
        with pytest.raises(ValueError, match=r"^ScoreMatchingLoss: sigma / alpha must be at least"):
            wide(model, x)
        with pytest.raises(ValueError, match=r"^ScoreMatchingLoss: sigma / alpha must be at least"):
            ScoreMatchingLoss(schedule=VP(), **reduced)(model, x)
        ScoreMatchingLoss((0.61, 1.0), **reduced)(model, x).backward()
        ScoreMatchingLoss((0.01, 1.0))(model, x).backward()


@pytest.mark.parametrize(("centred", "sigma"), [(False, 0.3), (True, 0.05)])
def test_gradients_under_autocast_have_the_variance_of_float32(centred, sigma):
    """From the least level on; Eq. 33 at the level of the centred one is rounding alone."""
    torch.manual_seed(0)
    model = MLP((4,), 1, width=32, head_width=16, depth=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, weights = torch.randn(256, 4), [model.c.weight, model.factor.weight]

    def variance(autocast):
        found = []
        for offset in range(60):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = paper_loss(
                    model, x, sigma, gamma=0.0, centred=centred, seed=0, offset=offset
                )
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
        return torch.stack(found).var(0).sum()

    assert 0.8 < variance(True) / variance(False) < 1.5


class Dropping(Field):
    def __init__(self, layer):
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), layer)


def test_active_dropout_is_refused_where_points_share_a_draw():
    x, noise = batch()
    message = (
        "score_matching_loss: dropout must be off when several points are visited (its masks "
        "differ between them), got p = 0.25 in 'inner.1'"
    )
    plain = {"variance_reduction": False, "first_order": "plain"}
    for layer in (nn.Dropout(0.25), nn.Dropout2d(0.25), nn.AlphaDropout(0.25)):
        model = Dropping(layer)
        for change in ({}, {"variance_reduction": True}, {"first_order": "antithetic"}):
            with pytest.raises(ValueError, match=exactly(message)):
                paper_loss(model, x, 0.3, noise=noise, **((plain | change) if change else {}))
        paper_loss(model, x, 0.3, noise=noise, **plain)  # one point: nothing to share
        paper_loss(model.eval(), x, 0.3, noise=noise)
        paper_loss(Dropping(type(layer)(0.0)), x, 0.3, noise=noise)


RULE = "score_matching_loss: "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"first_order": "both"},
            "first_order must be 'antithetic', 'vr' or 'plain', got 'both'",
        ),
        ({"reduction": "max"}, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ({"gamma": -1.0}, "gamma must be at least 0, got -1.0"),
        ({"gamma": math.nan}, "gamma must be at least 0, got nan"),
        (
            {"centred": True, "detach_score": False},
            "detach_score must be True with centred, got False",
        ),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"sigma": math.inf}, "sigma must be positive and finite, got inf"),
        (
            {"sigma": torch.tensor([0.1, 0.2, -0.5, 1.0, 1.0])},
            "sigma must be positive and finite, got -0.5",
        ),
        ({"sigma": torch.tensor(math.nan)}, "sigma must be positive and finite, got nan"),
        (
            {"sigma": torch.ones(4)},
            "sigma must be a float or have shape () or (5,), got (4,)",
        ),
        ({"sigma": torch.ones(5, device="meta")}, "sigma must be on cpu, got meta"),
        (
            {"sigma": torch.ones(5, requires_grad=True)},
            "sigma must not require grad, got requires_grad=True",
        ),
        ({"alpha": math.nan}, "alpha must be finite, got nan"),
        (
            {"alpha": torch.ones(5, 1)},
            "alpha must be a float or have shape () or (5,), got (5, 1)",
        ),
        (
            {"x0": torch.zeros(5, dtype=torch.float64)},
            "x0 must be floating point of shape (B, *dims), got torch.float64 of shape (5,)",
        ),
        (
            {"x0": torch.zeros(5, *DIMS, dtype=torch.int64)},
            "x0 must be floating point of shape (B, *dims), got torch.int64 of shape (5, 2, 3)",
        ),
        (
            {"noise": torch.zeros(5, *DIMS)},
            (
                "noise must have shape (5, 2, 3), dtype torch.float64 and device cpu like x0, "
                "got (5, 2, 3), torch.float32, cpu"
            ),
        ),
        (
            {"noise": torch.zeros(5, 6, dtype=torch.float64)},
            (
                "noise must have shape (5, 2, 3), dtype torch.float64 and device cpu like x0, "
                "got (5, 6), torch.float64, cpu"
            ),
        ),
        (
            {"model": lambda x, sigma: Scores(x[:5], x)},
            "model must return scaled_score of shape (15, 2, 3), got (5, 2, 3)",
        ),
        (
            {"model": lambda x, sigma: Scores(x, x.flatten(1))},
            "model must return c of shape (15, 2, 3), got (15, 6)",
        ),
        (
            {"model": lambda x, sigma: Scores(x, x, x)},
            "model must return factor of shape (15, 6, r), got (15, 2, 3)",
        ),
        (
            {"diagonal": True},
            "diagonal=True needs a model without factor (rank 0), got rank 2",
        ),
    ],
)
def test_loss_refuses_bad_arguments(options, message):
    arguments = {"model": Field(), "x0": batch()[0], "sigma": 0.3} | options
    with pytest.raises(ValueError, match=exactly(RULE + message)):
        paper_loss(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x0": [[1.0]]}, "x0 must be a Tensor, got list"),
        ({"noise": [[1.0]]}, "noise must be a Tensor, got list"),
        ({"sigma": "0.3"}, "sigma must be a float or a Tensor, got str"),
        ({"sigma": True}, "sigma must be a float or a Tensor, got bool"),
        ({"alpha": None}, "alpha must be a float or a Tensor, got NoneType"),
        ({"gamma": "1"}, "gamma must be a float, got str"),
        (
            {"model": lambda x, sigma: Scores([0.0], x)},
            "model must return scaled_score as a Tensor, got list",
        ),
    ],
)
def test_loss_refuses_arguments_of_the_wrong_kind(options, message):
    arguments = {"model": Field(), "x0": batch()[0], "sigma": 0.3} | options
    with pytest.raises(TypeError, match=exactly(RULE + message)):
        paper_loss(**arguments)


def test_loss_refuses_a_seed_beside_noise():
    x, noise = batch()
    with pytest.raises(ValueError, match="seed must be None where noise is given, got 3"):
        paper_loss(Field(), x, 0.3, noise=noise, seed=3)


def test_loss_refuses_a_model_that_does_not_return_scores():
    message = RULE + "model must return Scores, got tuple"
    with pytest.raises(TypeError, match=exactly(message)):
        paper_loss(lambda x, sigma: (x, x), batch()[0], 0.3)


def test_options_by_name_are_those_of_the_function():
    """`Objective` is what the loss module takes and editors complete."""
    parameters = inspect.signature(score_matching_loss).parameters
    for name, kind in Objective.__annotations__.items():
        text = kind if isinstance(kind, str) else kind.__forward_arg__
        assert parameters[name].annotation == text
    others = {
        "model",
        "x0",
        "sigma",
        "alpha",
        "noise",
        "seed",
        "offset",
        "first",
        "return_terms",
        "model_kwargs",
        "generator",
    }
    assert parameters.keys() - Objective.__annotations__.keys() == others


def test_loss_compiles_whole_and_draws_afresh():
    torch.manual_seed(0)
    model, x = MLP(DIMS, 2), batch()[0].float()
    sigma = levels("per_sample")[0].float()
    # aot_eager: graph capture and autograd are what this library answers for, not code generation
    compiled = torch.compile(paper_loss, fullgraph=True, backend="aot_eager")
    for offset in range(3):
        options = {"seed": torch.tensor(4), "offset": torch.tensor(offset)}
        loss = compiled(model, x, sigma, **options)
        torch.testing.assert_close(loss, paper_loss(model, x, sigma, **options))
    assert compiled(model, x, sigma) != compiled(model, x, sigma)


def test_each_call_of_the_module_is_the_next_step():
    model, x0 = MLP((3,), rank=1), torch.randn(4, 3)
    criterion = ScoreMatchingLoss(sigma=(0.2, 0.8), seed=3)
    called = [criterion(model, x0) for _ in range(3)]
    named = [criterion(model, x0, step=step) for step in range(3)]
    assert [loss.item() for loss in called] == [loss.item() for loss in named]
    assert int(criterion.step) == 3
