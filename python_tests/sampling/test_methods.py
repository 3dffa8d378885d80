"""Steps of chains against dense oracles: the law they keep, their density, their adjustment."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from hos_ext import UnscaledScores, ops
from hos_ext.densities import Gaussian, GaussianMixture
from hos_ext.linalg import ScoreHessian
from hos_ext.sampling import NormalStep, Point, make_step, method_names, sample
from hos_ext.sampling.methods import NormalLaw, log_ratio
from hos_ext.scores import DenseScores, MatrixFreeScores

F64 = torch.float64
ADJUSTED = method_names(adjusted=True)
EXACT = ("ozaki_full", "ozaki_isotropic", "ozaki_cayley", "ozaki_lanczos")
TINY = {"tolerance": 1e-12}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def low_rank_gaussian(
    d: int, r: int, *, isotropic: bool = False, sign: float = 1.0
) -> tuple[Tensor, Callable[[Tensor], UnscaledScores]]:
    """A precision diag(a) - sign U U^T > 0 and the scores of N(0.7, precision^-1)."""
    a = torch.full((d,), 2.0, dtype=F64) if isotropic else torch.linspace(0.5, 12, d, dtype=F64)
    u = randn(d, r) * a.sqrt().unsqueeze(1)
    u = u * (0.9 / torch.linalg.matrix_norm(u / a.sqrt().unsqueeze(1), 2))
    precision = a.diag() - sign * u @ u.mT
    signs = None if sign > 0 else -torch.ones(r, dtype=F64)

    def score_fn(x: Tensor) -> UnscaledScores:
        score = -((x - 0.7).unsqueeze(-1) * precision.to(x)).sum(-2)
        factor = u.to(x).expand(len(x), -1, -1)
        return UnscaledScores(score, -a.to(x).expand_as(x), factor, signs)

    return precision, score_fn


def dense_gaussian(precision: Tensor) -> Callable[[Tensor], DenseScores]:
    def score_fn(x: Tensor) -> DenseScores:
        score = -((x - 0.7).unsqueeze(-1) * precision.to(x)).sum(-2)
        return DenseScores(score, -precision.to(x).expand(len(x), -1, -1))

    return score_fn


def affine_map(score_fn, d: int, **options) -> tuple[Tensor, Tensor]:
    """A and the noise's square root G of the step x' = A x + b + G z, read off `sample` itself."""
    start = torch.cat([torch.zeros(1, d), torch.eye(d)]).double()
    options = {"n_steps": 1} | options
    ends = [sample(score_fn, row[None], seed=3, **options).draws[0, 0] for row in start]
    a = torch.stack([end - ends[0] for end in ends[1:]], 1)
    n = 2 * d + 1
    pushed = sample(score_fn, torch.zeros(n, d).double(), seed=5, **options).draws[:, 0]
    z = ops.normal((n, d), seed=5, offset=0, dtype=F64)
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones(n, 1).double()], 1), pushed).solution
    return a, solution[:d].T


def stationary(a: Tensor, g: Tensor) -> Tensor:
    """C of C = A C A^T + G G^T, solved as a linear system."""
    d = len(a)
    left = torch.eye(d * d, dtype=a.dtype) - torch.kron(a, a)
    return torch.linalg.solve(left, (g @ g.T).flatten()).reshape(d, d)


def transition(method: str, here: Point, h: float | Tensor, curvature: str) -> NormalLaw:
    """The law of the next state under a method."""
    step = make_step(method, curvature=curvature)
    assert isinstance(step, NormalStep)
    return step.law(here, torch.as_tensor(h, dtype=here.x.dtype).reshape(-1, 1))


# ------------------------------------------------------------------------------------ the law kept


@pytest.mark.parametrize("h", [1e-2, 0.3, 5.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("method", EXACT)
def test_the_whole_hessian_keeps_a_gaussian_exactly_at_any_step_size(method, sign, h):
    isotropic = method == "ozaki_isotropic"
    precision, score_fn = low_rank_gaussian(6, 2, isotropic=isotropic, sign=sign)
    a, g = affine_map(score_fn, 6, method=method, step_size=h, **TINY)
    covariance = torch.linalg.inv(precision)
    error = (stationary(a, g) - covariance).abs().max() / covariance.abs().max()
    assert error < 1e-10
    if method == "ozaki_cayley":
        eye = torch.eye(6, dtype=F64)
        expected = torch.linalg.solve(eye + h / 2 * precision, eye - h / 2 * precision)
    else:
        expected = torch.linalg.matrix_exp(-h * precision)
    torch.testing.assert_close(a, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("h", [0.3, 5.0])
@pytest.mark.parametrize("method", ["ozaki_full", "ozaki_cayley", "ozaki_lanczos"])
def test_a_dense_hessian_keeps_a_gaussian_exactly_too(method, h):
    root = randn(5, 5)
    precision = root @ root.T + 0.1 * torch.eye(5, dtype=F64)
    a, g = affine_map(dense_gaussian(precision), 5, method=method, step_size=h, **TINY)
    covariance = torch.linalg.inv(precision)
    assert (stationary(a, g) - covariance).abs().max() / covariance.abs().max() < 1e-10


def test_lanczos_at_its_default_tolerance_keeps_a_gaussian_to_that():
    precision, score_fn = low_rank_gaussian(40, 6)
    a, g = affine_map(score_fn, 40, method="ozaki_lanczos", step_size=0.4)
    covariance = torch.linalg.inv(precision)
    error = (stationary(a, g) - covariance).abs().max() / covariance.abs().max()
    assert 1e-9 < error < 2e-2


@pytest.mark.parametrize("method", ["langevin", "ozaki"])
def test_dense_scores_serve_the_elementwise_methods(method):
    precision, score_fn = low_rank_gaussian(4, 2)
    options = {"method": method, "step_size": 0.02, "n_steps": 5, "seed": 1}
    x = randn(3, 4)
    low, dense = (sample(f, x, **options).draws for f in (score_fn, dense_gaussian(precision)))
    torch.testing.assert_close(low, dense, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------ positive curvature


def mixed_scores(b: int, d: int, r: int, *, isotropic: bool = False) -> UnscaledScores:
    """Scores whose Hessian has positive and negative eigenvalues in most rows."""
    diag = -torch.ones(b, d, dtype=F64) if isotropic else randn(b, d, seed=1) - 0.5
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[:r].double()
    return UnscaledScores(randn(b, d, seed=2), diag, randn(b, d, r, seed=3), sign)


def dense_of(scores: UnscaledScores) -> Tensor:
    weight = scores.sign.diag()
    return torch.diag_embed(scores.diag) + scores.factor @ weight @ scores.factor.mT


def treated(matrix: Tensor, curvature: str) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    values = {"clamp": values.clamp(max=0), "abs": -values.abs(), "raw": values}[curvature]
    return vectors @ values.diag() @ vectors.T


def oracle_step(x, score, matrix, h, z, curvature, *, cayley=False):
    """One sample: the step with every matrix function by a dense eigendecomposition."""
    values, vectors = torch.linalg.eigh(treated(matrix, curvature))
    if cayley:
        drift, noise = h / (1 - h * values / 2), (2 * h) ** 0.5 / (1 - h * values / 2)
    else:
        drift = torch.where(values == 0, h, torch.expm1(h * values) / values)
        noise = torch.where(values == 0, 2 * h, torch.expm1(2 * h * values) / values).sqrt()
    return x + vectors @ (drift * (vectors.T @ score)) + vectors @ (noise * (vectors.T @ z))


@pytest.mark.parametrize("curvature", ["clamp", "abs", "raw"])
@pytest.mark.parametrize(
    ("method", "dense"),
    [
        ("ozaki_full", False),
        ("ozaki_full", True),
        ("ozaki_isotropic", False),
        ("ozaki_lanczos", False),
        ("ozaki_lanczos", True),
        ("ozaki_cayley", True),
    ],
)
def test_positive_curvature_is_treated_on_the_spectrum(method, dense, curvature):
    scores = mixed_scores(4, 5, 3, isotropic=method == "ozaki_isotropic")
    matrix = dense_of(scores)
    given = DenseScores(scores.score, matrix) if dense else scores
    x, h = randn(4, 5, seed=4), 0.1
    options = {"method": method, "step_size": h, "n_steps": 1, "seed": 0, "curvature": curvature}
    new = sample(lambda _: given, x, **options, **TINY).draws[:, 0]
    z = ops.normal((4, 5), seed=0, dtype=F64)
    cayley = method == "ozaki_cayley"
    rows = zip(x, scores.score, matrix, z, strict=True)
    expected = [oracle_step(a, s, m, h, n, curvature, cayley=cayley) for a, s, m, n in rows]
    torch.testing.assert_close(new, torch.stack(expected), rtol=1e-9, atol=1e-9)


def cayley_hessian(diag: Tensor, factor: Tensor, sign: Tensor, curvature: str) -> Tensor:
    """The A of a Cayley step at h = 0.3, dense, read off the step itself: K = I - h A / 2."""
    b, d, h = *diag.shape, 0.3
    columns = []
    for unit in torch.eye(d, dtype=F64):
        scores = UnscaledScores(unit.expand(b, d) / h, diag, factor, sign)
        law = transition("ozaki_cayley", Point(torch.zeros_like(diag), scores, None), h, curvature)
        columns.append(law.draw(torch.zeros_like(diag)))  # K^-1 e
    kernel = torch.linalg.inv(torch.stack(columns, -1))
    return (torch.eye(d, dtype=F64) - kernel) * 2 / h


@pytest.mark.parametrize("curvature", ["clamp", "abs"])
def test_cayley_treats_positive_curvature_by_congruence(curvature):
    """-E^1/2 f(N) E^1/2 with N = -E^-1/2 s2 E^-1/2, E = |d|, from dense eigendecompositions."""
    scores = mixed_scores(9, 5, 4)
    scores.diag[0] -= 30  # negative definite: left as it is
    scores.diag[1].abs_()
    scores.diag[2] = -scores.diag[2].abs()
    scores.factor[3, scores.diag[3] < 0] = 0  # no column on one of the sides
    scores.factor[4, :, 1:] = 0
    a = cayley_hessian(scores.diag, scores.factor, scores.sign, curvature)
    assert (scores.diag > 0).any(1).sum() > 5
    for b, s2 in enumerate(dense_of(scores)):
        root = scores.diag[b].abs().sqrt()
        values, vectors = torch.linalg.eigh(-s2 / root / root[:, None])
        values = values.abs() if curvature == "abs" else values.clamp(min=0)
        expected = -root[:, None] * (vectors @ values.diag() @ vectors.T) * root
        torch.testing.assert_close(a[b], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a[0], dense_of(scores)[0], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("curvature", ["clamp", "abs"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cayley_treatment_is_the_spectral_one_where_it_commutes(curvature, sign):
    """A column along a coordinate: the eigenvalues are d + sign u^2 and d itself, any signs."""
    d = torch.tensor([-2.0, -1.0, -0.3, 0.4, 1.0, 3.0], dtype=F64)
    u = torch.tensor([0.3, 0.9999, 1.0001, 2.0], dtype=F64)
    grid = torch.cartesian_prod(d, u)
    diag = torch.stack([grid[:, 0], grid[:, 0].flip(0)], 1)
    factor = torch.stack([grid[:, 1], torch.zeros(len(grid), dtype=F64)], 1).unsqueeze(-1)
    a = cayley_hessian(diag, factor, torch.tensor([sign], dtype=F64), curvature)
    s2 = diag + sign * factor[..., 0].square()
    expected = -s2.abs() if curvature == "abs" else s2.clamp(max=0)
    torch.testing.assert_close(a, torch.diag_embed(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("curvature", ["clamp", "abs"])
def test_cayley_treatment_is_continuous_where_definiteness_is_lost(curvature):
    diag = torch.tensor([[0.5, -1.0], [0.5, -1.0]], dtype=F64)
    factor = torch.tensor([[1.0], [0.7]], dtype=F64).expand(2, 2, 1).clone()
    sign = -torch.ones(1, dtype=F64)

    def largest(scale: float) -> float:
        scaled = UnscaledScores(diag, diag, scale * factor, sign)
        return float(torch.linalg.eigvalsh(dense_of(scaled)[0]).max())

    low, high = 0.5, 2.0  # indefinite at the one, negative definite at the other
    assert largest(low) > 0 > largest(high)
    while high - low > 1e-13:
        middle = (low + high) / 2
        low, high = (middle, high) if largest(middle) > 0 else (low, middle)
    factor[0] *= low - 1e-9
    factor[1] *= high + 1e-9
    before, after = cayley_hessian(diag, factor, sign, curvature)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-7)


def test_cayley_treatment_bears_zeros_on_the_diagonal():
    diag = torch.tensor([[0.0, -2.0]], dtype=F64)
    factor = torch.tensor([[[0.8], [0.3]]], dtype=F64)
    a = cayley_hessian(diag, factor, torch.ones(1, dtype=F64), "clamp")
    assert torch.linalg.eigvalsh(a).max() < 1e-7
    tiny = cayley_hessian(diag - 1e-12, factor, torch.ones(1, dtype=F64), "clamp")
    torch.testing.assert_close(a, tiny, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::hos_ext.sampling.RunawayWarning")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("curvature", ["clamp", "abs", "raw"])
@pytest.mark.parametrize("method", ["ozaki_cayley", "mh_ozaki_cayley"])
def test_a_factor_that_overflows_or_is_nan_loses_its_own_chain_only(method, curvature, dtype):
    x = randn(4, 6).to(dtype)
    factor = (0.1 * randn(4, 6, 3, seed=1)).to(dtype)
    factor[1] *= torch.finfo(dtype).max ** 0.6
    factor[2, 3, 1] = torch.nan
    diag = torch.full_like(x, -1.0)

    def score_fn(at: Tensor) -> UnscaledScores:
        return UnscaledScores(-at, diag[: len(at)], factor[: len(at)])

    options = {"method": method, "step_size": 0.2, "n_steps": 2, "seed": 0, "curvature": curvature}
    chains = sample(score_fn, x, **options)
    assert (chains.stats["divergences"] > 0).tolist() == [False, True, True, False]
    healthy = sample(score_fn, x[:1], **options)
    assert torch.equal(chains.draws[0], healthy.draws[0])


def test_cayley_treatment_keeps_a_negative_definite_hessian_with_positive_diag():
    diag = torch.tensor([[0.5, -1.0]], dtype=F64)
    factor = torch.tensor([[[2.0], [0.3]]], dtype=F64)
    scores = UnscaledScores(randn(1, 2), diag, factor, -torch.ones(1, dtype=F64))
    matrix = dense_of(scores)[0]
    assert torch.linalg.eigvalsh(matrix).max() < 0
    x, z = randn(1, 2, seed=1), ops.normal((1, 2), seed=0, dtype=F64)
    new = sample(lambda _: scores, x, method="ozaki_cayley", step_size=0.3, n_steps=1, seed=0)
    expected = oracle_step(x[0], scores.score[0], matrix, 0.3, z[0], "raw", cayley=True)
    torch.testing.assert_close(new.draws[0, 0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::hos_ext.sampling.RunawayWarning")
def test_a_step_too_large_for_raw_cayley_is_a_divergence():
    diag = torch.tensor([[1.0, -1.0], [3.0, -1.0], [-1.0, -1.0]], dtype=F64)
    for given in (
        UnscaledScores(torch.zeros(3, 2, dtype=F64), diag),
        DenseScores(torch.zeros(3, 2, dtype=F64), torch.diag_embed(diag)),
    ):
        options = {"method": "ozaki_cayley", "step_size": 1.0, "n_steps": 1, "seed": 0}
        raw = sample(lambda _, g=given: g, torch.zeros_like(diag), curvature="raw", **options)
        assert raw.stats["diverged"].tolist() == [False, True, False]  # h d < 2 in the first
        kept = sample(lambda _, g=given: g, torch.zeros_like(diag), curvature="clamp", **options)
        assert kept.stats["diverged"].tolist() == [False, False, False]


def test_methods_with_the_whole_hessian_agree_on_a_mixture():
    mixture = two_modes(3)

    def score_fn(x: Tensor) -> DenseScores:
        return DenseScores(mixture.score(x), mixture.hessian(x))

    x = randn(8, 3)
    options = {"step_size": 0.2, "n_steps": 4, "seed": 0}
    full = sample(score_fn, x, method="ozaki_full", **options).draws
    krylov = sample(score_fn, x, method="ozaki_lanczos", **options, **TINY).draws
    torch.testing.assert_close(full, krylov, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_lanczos_takes_the_derivative_of_any_score_function():
    """The same chains from a score alone as from its exact Hessian, each row with its own step."""
    mixture = two_modes(6)
    step_size = torch.linspace(0.02, 0.4, 8, dtype=F64)

    def dense(x: Tensor) -> DenseScores:
        return DenseScores(mixture.score(x), mixture.hessian(x))

    def derived(x: Tensor) -> MatrixFreeScores:
        hessian = ScoreHessian(mixture.score, x, symmetrize=True, check=False)
        return MatrixFreeScores(hessian.score.reshape(x.shape), hessian)

    x = randn(8, 6)
    options = {"method": "ozaki_lanczos", "step_size": step_size, "n_steps": 3, "seed": 0}
    for tolerance in (1e-3, 1e-12):
        exact = sample(dense, x, tolerance=tolerance, **options)
        got = sample(derived, x, tolerance=tolerance, **options)
        torch.testing.assert_close(got.draws, exact.draws, rtol=1e-9, atol=1e-9)
        iterations = got.stats["lanczos_iterations"]
        assert torch.equal(iterations, exact.stats["lanczos_iterations"])
    langevin = {"method": "langevin", "step_size": 0.1, "n_steps": 2, "seed": 0}
    plain, free = sample(mixture.score, x, **langevin), sample(derived, x, **langevin)
    torch.testing.assert_close(free.draws, plain.draws)
    with pytest.raises(TypeError, match="for method 'ozaki', got MatrixFreeScores"):
        sample(derived, x, method="ozaki", step_size=0.1, n_steps=1)
    with pytest.raises(TypeError, match="score from score_fn must be a tensor, got MatrixFree"):
        sample(derived, x, method="mala", step_size=0.1, n_steps=1)
    other = ScoreHessian(mixture.score, x[:3], check=False)
    with pytest.raises(ValueError, match=r"hessian from score_fn must have shape \(8, 6, 6\)"):
        sample(lambda x: MatrixFreeScores(x, other), x, **options)
    with pytest.raises(TypeError, match="must be a SymmetricOperator, got int"):
        sample(lambda x: MatrixFreeScores(x, 3), x, **options)


def two_modes(d: int) -> GaussianMixture:
    means = torch.stack([torch.full((d,), -1.0), torch.full((d,), 1.2)]).double()
    root = 0.5 * randn(2, d, d, seed=7)
    covariances = root @ root.mT + 0.3 * torch.eye(d, dtype=F64)
    return GaussianMixture(torch.tensor([0.4, 0.6], dtype=F64), means, covariances)


# ------------------------------------------------------------------------------- density of a step


@pytest.mark.parametrize("curvature", ["clamp", "abs", "raw"])
@pytest.mark.parametrize(
    "method", ["langevin", "ozaki", "ozaki_full", "ozaki_isotropic", "ozaki_cayley"]
)
def test_log_density_is_that_of_what_is_drawn(method, curvature):
    scores = mixed_scores(4, 5, 3, isotropic=method == "ozaki_isotropic")
    h = torch.tensor([0.05, 0.1, 0.2, 0.02], dtype=F64)
    law = transition(method, Point(randn(4, 5), scores, None), h, curvature)
    mean = law.draw(torch.zeros(4, 5, dtype=F64))
    columns = [law.draw(row.expand(4, -1)) - mean for row in torch.eye(5, dtype=F64)]
    root = torch.stack(columns, -1)
    y = mean + randn(4, 5, seed=9)
    expected = MultivariateNormal(mean, root @ root.mT).log_prob(y)
    constant = 2.5 * math.log(2 * math.pi)
    torch.testing.assert_close(law.log_density(y) - constant, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------- adjustment

CENTRES = torch.tensor([[-1.0], [1.0]], dtype=F64)
LINE = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=F64), CENTRES, torch.tensor([[[0.3]], [[0.2]]], dtype=F64)
)
GRID = torch.linspace(-4, 4, 241, dtype=F64).unsqueeze(1)
CELL = float(GRID[1] - GRID[0])


def on_grid(with_log_prob: bool, with_hessian: bool) -> Point:
    scores = UnscaledScores(LINE.score(GRID), LINE.hessian_diag(GRID))
    log_prob = LINE.log_prob(GRID) if with_log_prob else None
    return Point(GRID, scores if with_hessian else scores.score, log_prob)


def pairs(point: Point) -> tuple[Point, Point]:
    """Every (from, to) of the grid, row-major."""
    n = len(point.x)
    first, second = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)

    def take(index: Tensor) -> Point:
        scores = point.scores
        if isinstance(scores, UnscaledScores):
            scores = UnscaledScores(scores.score[index], scores.diag[index])
        else:
            scores = scores[index]
        log_prob = None if point.log_prob is None else point.log_prob[index]
        return Point(point.x[index], scores, log_prob)

    return take(first), take(second)


def flows(method: str, h: float, point: Point) -> tuple[Tensor, Tensor]:
    """q(x' | x) and the acceptance probability for all pairs of the grid, each (n, n)."""
    n = len(point.x)
    here, there = pairs(point)
    forward, backward = (transition(method, p, h, "clamp") for p in (here, there))
    accept = log_ratio(forward, backward, here, there).clamp(max=0).exp()
    density = (forward.log_density(there.x) - math.log(2 * math.pi) / 2).exp()
    return density.reshape(n, n), accept.reshape(n, n)


KINDS = [name for name in method_names(adjusted=False) if isinstance(make_step(name), NormalStep)]


@pytest.mark.parametrize("method", KINDS)
def test_adjusted_steps_are_in_detailed_balance(method):
    density, accept = flows(method, 0.3, on_grid(True, True))
    flow = LINE.log_prob(GRID).exp().unsqueeze(1) * density * accept
    torch.testing.assert_close(flow, flow.T, rtol=1e-9, atol=1e-12)
    unadjusted = LINE.log_prob(GRID).exp().unsqueeze(1) * density
    assert (unadjusted - unadjusted.T).abs().max() > 1e-2
    assert 0.2 < float(flow.sum() / unadjusted.sum()) < 0.999


def law_on_grid(density: Tensor, accept: Tensor) -> Tensor:
    """The stationary law of the chain on the grid: accepted moves, and staying for the rest."""
    move = density * accept * CELL
    kernel = move + (1 - move.sum(1)).diag()
    values, vectors = torch.linalg.eig(kernel.T)
    law = vectors[:, values.real.argmax()].real
    return law / law.sum()


def distance(method: str, h: float, point: Point, *, adjusted: bool = True) -> float:
    """Total variation between the stationary law on the grid and the target."""
    density, accept = flows(method, h, point)
    target = LINE.log_prob(GRID).exp() * CELL
    if not adjusted:  # renormalised: what leaves the grid comes back
        density, accept = density / (density.sum(1, keepdim=True) * CELL), torch.ones_like(accept)
    return float((law_on_grid(density, accept) - target).abs().sum() / 2)


@pytest.mark.parametrize("method", ["langevin", "ozaki"])
def test_adjustment_by_scores_has_a_small_bias_that_falls_with_the_step(method):
    steps = [0.02, 0.04, 0.08]
    exact = [distance(method, h, on_grid(True, True)) for h in steps]
    corrected = [distance(method, h, on_grid(False, True)) for h in steps]
    plain = [distance(method, h, on_grid(False, True), adjusted=False) for h in steps]
    assert max(exact) < 1e-6
    for good, bad in zip(corrected, plain, strict=True):
        assert good < bad / 8
    slope = math.log(corrected[2] / corrected[0]) / math.log(4)
    baseline = math.log(plain[2] / plain[0]) / math.log(4)
    assert slope > baseline + 0.5


def test_scores_without_a_hessian_take_the_plain_trapezoid_rule():
    rough, fine = (distance("langevin", 0.05, on_grid(False, s)) for s in (False, True))
    unadjusted = distance("langevin", 0.05, on_grid(False, True), adjusted=False)
    assert fine < rough / 2 < unadjusted / 2


def test_the_corrected_trapezoid_is_of_fifth_order():
    mixture = two_modes(2)
    x, direction = randn(50, 2), randn(50, 2, seed=1)

    def point(at: Tensor, with_hessian: bool) -> Point:
        scores = DenseScores(mixture.score(at), mixture.hessian(at))
        return Point(at, scores if with_hessian else scores.score, None)

    def error(t: float, with_hessian: bool) -> float:
        here, there = (point(at, with_hessian) for at in (x, x + t * direction))
        flat = transition("langevin", here, 1.0, "raw")  # cancels: the same law both ways
        same = flat._replace(log_density=lambda y: y.new_zeros(len(y)))
        estimate = log_ratio(same, same, here, there)
        return float((estimate - mixture.log_prob(there.x) + mixture.log_prob(x)).abs().mean())

    for with_hessian, order in ((False, 3), (True, 5)):
        slope = math.log2(error(0.02, with_hessian) / error(0.01, with_hessian))
        assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("h", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("exact_density", [True, False])
@pytest.mark.parametrize("method", ["mh_ozaki_full", "mh_ozaki_isotropic", "mh_ozaki_cayley"])
def test_exact_steps_accept_everything_on_a_gaussian(method, exact_density, h):
    precision, score_fn = low_rank_gaussian(6, 2, isotropic=method == "mh_ozaki_isotropic")
    gaussian = Gaussian(torch.full((6,), 0.7, dtype=F64), torch.linalg.inv(precision))
    log_prob = gaussian.log_prob if exact_density else None
    options = {"method": method, "step_size": h, "n_steps": 5, "seed": 0}
    chains = sample(score_fn, randn(20, 6), log_prob=log_prob, **options)
    assert float((1 - chains.stats["acceptance"]).max()) < 1e-9
    assert chains.stats["log_ratio"] == ("log_prob" if exact_density else "scores")
    plain = sample(score_fn, randn(20, 6), **(options | {"method": method[3:]}))
    torch.testing.assert_close(chains.draws, plain.draws, rtol=1e-9, atol=1e-9)


STEP_SIZES = {"mala": 0.6}  # at which an adjusted step accepts more than half; others take 2.5


@pytest.mark.filterwarnings("ignore::hos_ext.sampling.RunawayWarning")
@pytest.mark.parametrize("method", ADJUSTED)
def test_adjusted_chains_keep_a_mixture(method):
    """Exact draws of a mixture are still exact draws after 8 steps: independent chains, so that the
    error bars are those of independent terms. The unadjusted step is seen to be off."""
    mixture = two_modes(2)
    n = 20_000

    def score_fn(x: Tensor) -> UnscaledScores | DenseScores:
        score, hessian = mixture.score(x), mixture.hessian(x)
        if method != "mh_ozaki_isotropic":
            return DenseScores(score, hessian)
        values, vectors = torch.linalg.eigh(hessian)
        c = values[:, :1]
        factor = vectors[:, :, 1:] * (values[:, None, 1:] - c.unsqueeze(1)).sqrt()
        return UnscaledScores(score, c.expand_as(x).contiguous(), factor)

    init = mixture.sample(n, seed=0)
    h = STEP_SIZES.get(method, 2.5)
    options = {"step_size": h, "n_steps": 8, "thin": 8, "seed": 0}
    chains = sample(score_fn, init, method=method, log_prob=mixture.log_prob, **options)
    covariance = (mixture.weights[:, None, None] * mixture.covariances).sum(0)
    mean = mixture.weights @ mixture.means
    spread = mixture.means - mean
    covariance = covariance + (mixture.weights[:, None] * spread).T @ spread

    def worst(x: Tensor) -> float:
        centred = x - mean
        terms = torch.cat([centred, centred.square() - covariance.diagonal()], 1)
        return float((terms.mean(0) / (terms.std(0) / n**0.5)).abs().max())

    assert worst(chains.draws[:, 0]) < 5
    assert 0.5 < float(chains.stats["acceptance"].mean()) < 0.95
    unadjusted = "langevin" if method == "mala" else method[3:]
    plain = sample(score_fn, init, method=unadjusted, **options)
    assert worst(plain.draws[:, 0]) > 10
