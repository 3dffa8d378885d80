"""Matrix-free Hessians: mixtures with exact ones, networks against jacrev, and the rival method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import assert_near
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from hos_ext import DPLR, MLP
from hos_ext.densities import GaussianMixture
from hos_ext.linalg import ScoreHessian, block_lanczos
from hos_ext.schedules import from_alphas_cumprod
from hos_ext.tweedie import eps_from_score, posterior_mean, v_from_score
from hos_ext.tweedie.conversions import score_from_eps, score_from_v, score_from_x0, x0_from_score
from hos_ext.uncertainty.from_score import posterior_from_score

# torch's own use of torch.jit, at the first forward derivative of a process.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def mixture(size: int, *, seed: int = 0, decay: float = 0.8) -> GaussianMixture:
    """Three parts with covariances of spectrum decay^i along random axes, float64."""
    g = torch.Generator().manual_seed(seed)
    draw = torch.randn(3, size, size, generator=g, dtype=torch.float64)
    axes = torch.linalg.qr(draw)[0]
    spectrum = decay ** torch.arange(size, dtype=torch.float64) + 1e-3
    means = 0.3 * torch.randn(3, size, generator=g, dtype=torch.float64)
    covariances = (axes * spectrum) @ axes.mT
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return GaussianMixture(weights, means, (covariances + covariances.mT) / 2)


def points(density: GaussianMixture, n: int = 3) -> Tensor:
    return density.sample(n, seed=5)


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(size: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(size, 16), nn.SiLU(), nn.Linear(16, size)]
    return nn.Sequential(*layers).to(dtype)


def unet() -> Any:
    """A small U-Net of diffusers with attention, float64."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra app")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return net.double().eval()


class Turned(torch.autograd.Function):
    """sin, without a forward derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


# -------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_products_dense_diagonal_and_trace_are_those_of_the_exact_hessian(chunk_size):
    density = mixture(9).noisy(0.5)
    x = points(density)
    exact = density.hessian(x)
    hessian = ScoreHessian(density.score, x, chunk_size=chunk_size)
    v, w = random(3, 9), random(3, 9, 5)
    assert_near(hessian @ v, (exact @ v.unsqueeze(-1)).squeeze(-1))
    assert_near(hessian.matvec(w), exact @ w)
    assert_near(hessian.rmatvec(w), exact @ w)
    assert_near(hessian.dense(), exact)
    assert_near(hessian.diagonal(), exact.diagonal(dim1=1, dim2=2))
    assert_near(hessian.trace(), exact.diagonal(dim1=1, dim2=2).sum(-1))
    assert_near(hessian.score, density.score(x))
    assert (hessian.shape, hessian.dtype, hessian.device) == (exact.shape, exact.dtype, x.device)
    assert hessian.asymmetry(4, seed=0).max() < 1e-12
    assert (hessian @ w[..., :0]).shape == (3, 9, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetrize", [False, True])
def test_a_network_is_differentiated_as_jacrev_does(dtype, symmetrize):
    net, x = network(dtype=dtype), random(4, 2, 3, dtype=dtype)

    def score_fn(x: Tensor) -> Tensor:
        return net(x.flatten(1)).reshape(x.shape)

    jacobian = vmap(jacrev(net))(x.flatten(1)).detach()
    hessian = ScoreHessian(score_fn, x, symmetrize=symmetrize, chunk_size=2)
    expected = (jacobian + jacobian.mT) / 2 if symmetrize else jacobian
    v = random(4, 6, 3, dtype=dtype)
    assert_near(hessian @ v, expected @ v)
    assert_near(hessian.rmatvec(v), expected.mT @ v)
    assert_near(hessian.dense(), expected)
    assert_near(hessian.diagonal(), jacobian.diagonal(dim1=1, dim2=2))
    apart = (jacobian - jacobian.mT).norm(dim=(1, 2)) / jacobian.norm(dim=(1, 2))
    assert apart.min() > 0.5
    assert_near(hessian.scale(3.0).asymmetry(6), apart, times=10)


def test_asymmetry_by_probes_agrees_with_the_dense_one():
    net = network(40)
    x = random(200, 40)
    jacobian = vmap(jacrev(net))(x).detach()
    apart = (jacobian - jacobian.mT).norm(dim=(1, 2)) / jacobian.norm(dim=(1, 2))
    estimate = ScoreHessian(net, x).asymmetry(8, seed=3)
    assert (estimate / apart - 1).abs().max() < 0.35
    assert abs(float((estimate / apart).mean()) - 1) < 0.02


def test_the_posterior_covariance_forms_lazily_for_levels_per_sample():
    density = mixture(7)
    sigma, alpha = torch.tensor([0.3, 0.6], dtype=torch.float64), 0.8
    x = points(density, 2)
    laws = [density.noisy(float(s), alpha) for s in sigma]

    def score_fn(x: Tensor) -> Tensor:
        return torch.cat([law.score(row) for law, row in zip(laws, x.split(1), strict=True)])

    hessian = ScoreHessian(score_fn, x)
    covariance = hessian.scale(sigma**4 / alpha**2) + sigma**2 / alpha**2
    exact = [
        density.posterior_covariance(row, float(s), alpha)
        for s, row in zip(sigma, x.split(1), strict=True)
    ]
    assert_near(covariance.dense(), torch.cat(exact))
    assert_near((2.0 + covariance).scale(-1.0).trace(), -covariance.trace() - 14)
    assert_near(
        hessian.dense(), torch.cat([law.hessian(x)[i : i + 1] for i, law in enumerate(laws)])
    )


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_every_kind_of_denoiser_gives_the_hessian_by_one_line(prediction):
    density, alpha = mixture(6), 0.8
    noisy = density.noisy(0.6, alpha)
    sigma = torch.full((3,), 0.6, dtype=torch.float64)
    x = points(noisy)
    lines: dict[str, Callable[[Tensor], Tensor]] = {
        "eps": lambda x: score_from_eps(eps_from_score(noisy.score(x), sigma), sigma),
        "x0": lambda x: score_from_x0(
            x, x0_from_score(x, noisy.score(x), sigma, alpha), sigma, alpha
        ),
        "v": lambda x: score_from_v(x, v_from_score(x, noisy.score(x), sigma, alpha), sigma, alpha),
    }
    assert_near(ScoreHessian(lines[prediction], x).dense(), noisy.hessian(x), times=10)


def test_the_learned_head_and_the_differentiated_score_share_one_interface():
    torch.manual_seed(0)
    model = MLP((5,), 2).double()
    with torch.no_grad():
        model.score.weight.normal_(std=0.1)
    x = random(4, 5)
    scores = model(x, 0.5).unscaled(0.5)
    learned = DPLR(scores.diag.detach(), scores.factor.detach())
    other = ScoreHessian(lambda x: model(x, 0.5).unscaled(0.5).score, x, symmetrize=True)
    for matrix in (learned, other):
        dense = matrix.dense()
        v = random(4, 5, 2)
        assert matrix.shape == dense.shape
        assert_near(matrix @ v, dense @ v)
        assert_near(matrix.diagonal(), dense.diagonal(dim1=1, dim2=2))
        assert_near(matrix.eigh(2)[0], torch.linalg.eigvalsh(dense).flip(-1)[:, :2], times=10)
        assert_near((matrix.scale(2.0) + 1.0).trace(), 2 * matrix.trace() + 5)


def test_no_gradient_stays_and_no_grad_of_the_caller_does_not_matter():
    net = network()
    x = random(2, 6).requires_grad_()
    plain = ScoreHessian(net, x).dense()
    with torch.no_grad():
        assert torch.equal(ScoreHessian(net, x).dense(), plain)
    with torch.inference_mode():
        inside = ScoreHessian(net, x.detach().clone(), symmetrize=True).dense()
    assert_near(inside.clone(), (plain + plain.mT) / 2)
    assert not plain.requires_grad
    assert not ScoreHessian(net, x).rmatvec(x).requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())


def test_a_unet_with_attention_has_forward_products():
    net = unet()
    x = random(2, 1, 4, 4)

    def eps(x: Tensor) -> Tensor:
        return net(x, 100).sample

    hessian = ScoreHessian(lambda x: score_from_eps(eps(x), 0.7), x)
    assert hessian.forward_mode
    v, step = random(2, 16), 1e-5
    with torch.no_grad():
        ends = [eps(x + t * v.reshape(x.shape)).flatten(1) for t in (step, -step)]
    numeric = (ends[0] - ends[1]) / (2 * step) / -0.7
    assert (hessian @ v - numeric).abs().max() < 1e-8 * numeric.abs().max()
    w = random(2, 16, 3)
    dense = hessian.dense()
    assert_near(hessian.rmatvec(w), dense.mT @ w)


def test_the_lines_for_a_model_of_diffusers_give_its_mean_and_covariance():
    net = unet()
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(clip_sample=False)
    x, t = random(2, 1, 4, 4), torch.tensor(300)
    s = from_alphas_cumprod(scheduler.alphas_cumprod)
    alpha, sigma = s.alpha(float(t)), s.sigma(float(t))

    def score_fn(x: Tensor) -> Tensor:
        return score_from_eps(net(x, t).sample, sigma)

    posterior = posterior_from_score(score_fn, x, sigma, alpha, rank=3)
    eps = net(x, t).sample.detach()
    assert_near(posterior.mean, (x - sigma * eps) / alpha)
    step = scheduler.step(eps, int(t), x)
    assert_near(posterior.mean.float(), step.pred_original_sample.float())
    # Cov = (sigma^2 / alpha) d mean / d x
    rows = [
        torch.autograd.functional.jacobian(
            lambda row: (row - sigma * net(row[None], t).sample[0]) / alpha, row
        )
        for row in x
    ]
    exact = sigma**2 / alpha * torch.stack(rows).reshape(2, 16, 16)
    values = torch.linalg.eigvalsh((exact + exact.mT) / 2).flip(-1)[:, :3]
    assert_near(posterior.principal_components(3)[0], values, times=10)


def test_a_network_in_half_precision_passes_the_check():
    for dtype in (torch.bfloat16, torch.float16):
        for seed in range(60):  # among them some with <u, J v> near zero, were u not along J v
            net, x = network(seed=seed, dtype=torch.float32), random(3, 6, dtype=torch.float32)
            exact = ScoreHessian(net, x).dense()
            half = network(seed=seed, dtype=dtype)

            def score_fn(x: Tensor, half: nn.Module = half) -> Tensor:
                return half(x.to(next(half.parameters()).dtype)).float()

            hessian = ScoreHessian(score_fn, x)
            assert hessian.forward_mode
            assert (hessian.dense() - exact).abs().max() < 0.02 * exact.abs().max()


def test_double_vjp_stands_in_for_a_missing_forward_derivative():
    x = random(3, 5)
    with pytest.warns(UserWarning, match="products by double vjp, for want of a forward deriv"):
        hessian = ScoreHessian(lambda x: Turned.apply(x) @ random(5, 5), x)
    assert not hessian.forward_mode
    assert "double vjp" in repr(hessian)
    assert_near(hessian.dense(), random(5, 5).mT * x.cos().unsqueeze(1))
    v = random(3, 5, 2)
    assert_near(hessian @ v, hessian.dense() @ v)


# ------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("kind", ["diagonal", "trace"])
def test_hutchinson_is_unbiased_its_error_bars_are_honest_and_shrink_with_the_root(kind):
    density = mixture(40).noisy(0.3)
    rows = 400  # the same point: each row has probes of its own
    x = points(density, 1).expand(rows, -1)
    hessian = ScoreHessian(density.score, x, chunk_size=None, check=False)
    exact = density.hessian(x[:1]).diagonal(dim1=1, dim2=2)
    exact = exact if kind == "diagonal" else exact.sum(-1)
    estimate = hessian.estimate_diagonal if kind == "diagonal" else hessian.estimate_trace
    errors = {}
    for n in (8, 32):
        found = estimate(n, seed=n)
        value, error = found.value, found.standard_error
        z = (value - exact) / error
        # Student's t with n - 1 degrees of freedom has variance (n - 1) / (n - 3).
        assert abs(float(z.square().mean()) * (n - 3) / (n - 1) - 1) < 0.25
        bias = (value - exact).mean(0) / (value.std(0) / rows**0.5)
        assert bias.abs().max() < 5
        errors[n] = float(error.square().mean().sqrt())
    assert abs(errors[8] / errors[32] - 2) < 0.1


def test_estimates_repeat_do_not_depend_on_chunks_and_are_exact_from_d_probes_on():
    density = mixture(20).noisy(0.5)
    x = points(density, 4)
    whole = ScoreHessian(density.score, x, chunk_size=None).scale(2.0) + 0.5
    parts = ScoreHessian(density.score, x, chunk_size=3).scale(2.0) + 0.5
    last = ScoreHessian(density.score, x[2:], chunk_size=3).scale(2.0) + 0.5
    for name in ("estimate_diagonal", "estimate_trace"):
        found, again = getattr(whole, name)(11, seed=4), getattr(parts, name)(11, seed=4)
        assert_near(again.value, found.value)
        assert_near(again.standard_error, found.standard_error)
        assert_near(getattr(last, name)(11, seed=4, first=2).value, found.value[2:])
        assert not torch.equal(getattr(whole, name)(11).value, found.value)
        found = getattr(whole, name)(20)
        assert_near(found.value, getattr(whole, name.removeprefix("estimate_"))())
        assert float(found.standard_error.abs().max()) == 0


# ------------------------------------------------------------------------------------ eigenpairs


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("largest", [True, False])
def test_extreme_eigenpairs_of_kappa_are_exact(monkeypatch, dense, largest):
    monkeypatch.setattr(block_lanczos, "_DENSE", 64 if dense else 0)
    sigma, k = 0.4, 6
    density = mixture(50).noisy(sigma)
    x = points(density)
    kappa = ScoreHessian(density.score, x).scale(sigma**2) + 1.0
    values, vectors = torch.linalg.eigh(torch.eye(50).double() + sigma**2 * density.hessian(x))
    values, vectors = (values.flip(-1), vectors.flip(-1)) if largest else (values, vectors)
    pairs = kappa.eigenpairs(k, largest=largest)
    assert pairs.converged.all()
    assert (pairs.values - values[:, :k]).abs().max() < 1e-12
    overlap = torch.linalg.svdvals(vectors[..., :k].mT @ pairs.vectors)
    assert (1 - overlap).abs().max() < (1e-12 if largest else 1e-8)
    residual = kappa @ pairs.vectors - pairs.vectors * pairs.values.unsqueeze(1)
    assert (residual.norm(dim=1) - pairs.residuals).abs().max() < 1e-12
    assert pairs.vectors.gather(1, pairs.vectors.abs().argmax(1, keepdim=True)).min() > 0
    if largest:
        assert torch.equal(kappa.eigh(k)[0], pairs.values)


def test_eigenpairs_restart_and_find_multiple_eigenvalues():
    spectrum = torch.cat([torch.full((3,), 2.0), torch.linspace(1.5, -3, 297)]).double()
    hessian = ScoreHessian(lambda x: x * spectrum, torch.ones(2, 300).double())
    pairs = hessian.eigenpairs(4, tolerance=1e-8, max_products=2000)
    assert pairs.products > 64  # more than the basis holds
    assert pairs.converged.all()
    assert (pairs.values - spectrum[:4]).abs().max() < 1e-12
    identity = torch.eye(4).double()
    assert (pairs.vectors.mT @ pairs.vectors - identity).abs().max() < 1e-13
    none = ScoreHessian(lambda x: 0 * x, torch.ones(1, 100), check=False).eigenpairs(3)
    assert float(none.values.abs().max()) == 0
    assert bool(none.converged.all())


def test_a_row_that_has_converged_waits_for_the_others():
    # The residuals of row 1 are zero at once.
    spectrum = torch.stack([torch.linspace(1, 2, 100), torch.zeros(100)]).double()
    pairs = ScoreHessian(lambda x: x * spectrum, torch.ones(2, 100).double()).eigenpairs(3)
    assert pairs.converged.all()
    assert pairs.products > 6
    assert_near(pairs.values, spectrum.flip(-1)[:, :3])


def test_a_block_almost_inside_the_basis_becomes_orthogonal_to_it():
    basis = torch.linalg.qr(random(1, 100, 8))[0]
    block = basis[..., :3] + 1e-8 * random(1, 100, 3, seed=2)
    both = torch.cat([basis, block_lanczos._orthonormal(block, basis)], -1)
    assert (both.mT @ both - torch.eye(11).double()).abs().max() < 1e-14


def test_subspace_iteration_with_finite_differences_finds_the_same_and_takes_more():
    """The published way to posterior principal components of a denoiser: power iterations."""
    sigma, k, size = 0.5, 4, 200
    density = mixture(size, decay=0.9)
    noisy = density.noisy(sigma)
    x = points(noisy, 1)

    def denoise(x: Tensor) -> Tensor:
        return x + sigma**2 * noisy.score(x)

    exact = torch.linalg.eigh(torch.eye(size).double() + sigma**2 * noisy.hessian(x))[1]
    exact = exact[0, :, -k:]
    step, evaluations = 1e-5, 1
    v = torch.linalg.qr(random(size, k))[0]

    def worst_angle(v: Tensor) -> float:
        return float(torch.linalg.svdvals(exact.mT @ v).min().clamp_max(1).acos())

    while worst_angle(v) > 1e-3 and evaluations < 4000:
        v = torch.linalg.qr(((denoise(x + step * v.mT) - denoise(x)) / step).mT)[0]
        evaluations += k
    kappa = ScoreHessian(noisy.score, x).scale(sigma**2) + 1.0
    pairs = kappa.eigenpairs(k, tolerance=1e-3)
    ours = pairs.vectors[0]
    assert worst_angle(v) < 1e-3
    assert worst_angle(ours) < 0.02
    assert float(torch.linalg.svdvals(v.mT @ ours).min()) > 0.999
    assert pairs.products < evaluations / 2


# ------------------------------------------------------------------------------------- low rank


@pytest.mark.parametrize("remainder", ["isotropic", "diagonal"])
@pytest.mark.parametrize("n_probes", [8, 60])
def test_low_rank_keeps_what_it_says_and_the_estimated_trace(remainder, n_probes):
    sigma, k = 0.4, 5
    density = mixture(60)
    noisy = density.noisy(sigma)
    x = points(noisy)
    kappa = ScoreHessian(noisy.score, x).scale(sigma**2) + 1.0
    dense = kappa.dense()
    matrix = kappa.low_rank(k, remainder=remainder, n_probes=n_probes, seed=0, tolerance=1e-9)
    assert matrix.rank == k
    assert matrix.is_positive_definite().all()
    pairs = kappa.eigenpairs(k)
    values, vectors = pairs.values, pairs.vectors
    if remainder == "isotropic":
        assert_near(matrix @ vectors, vectors * values.unsqueeze(1), times=10)
    if n_probes == 60:
        assert_near(matrix.trace(), kappa.trace())
        if remainder == "diagonal":
            assert_near(matrix.diagonal(), kappa.diagonal())
    else:
        # Of the remainder alone: much smaller than that of the whole.
        rest = dense - (vectors * values.unsqueeze(1)) @ vectors.mT
        variance = 2 * (rest.square().sum((1, 2)) - rest.diagonal(dim1=1, dim2=2).square().sum(-1))
        assert ((matrix.trace() - kappa.trace()).abs() < 5 * (variance / 8).sqrt()).all()
        assert not torch.allclose(matrix.trace(), kappa.trace(), rtol=1e-6)


def test_low_rank_stays_positive_where_the_network_is_not():
    spectrum = torch.tensor([2.0, 1.0, 0.5, -0.1, -0.2, -0.3]).double()
    hessian = ScoreHessian(lambda x: x * spectrum, torch.ones(2, 6).double())
    for remainder in ("isotropic", "diagonal"):
        for k in range(7):
            matrix = hessian.low_rank(k, remainder=remainder, floor=0.1)
            assert matrix.is_positive_definite().all()
            least = 0.1 * spectrum.sum() / 6
            assert torch.linalg.eigvalsh(matrix.dense()).min() > least * (1 - 1e-12)
    for remainder in ("isotropic", "diagonal"):
        for k in (0, 1):  # what the floor adds can be taken from the rest
            trace = hessian.low_rank(k, remainder=remainder, floor=0.1).trace()
            assert_near(trace, spectrum.sum().repeat(2))
    assert_near(hessian.low_rank(2, remainder="isotropic").eigh(2)[0][0], spectrum[:2])


@pytest.mark.parametrize("remainder", ["isotropic", "diagonal"])
def test_low_rank_has_the_trace_of_the_matrix_though_its_pairs_have_not_converged(remainder):
    spectrum = torch.linspace(1, 2, 100).double()
    hessian = ScoreHessian(lambda x: x * spectrum, torch.ones(1, 100).double())
    for k in (3, 10):
        pairs = hessian.eigenpairs(k, max_products=k)
        assert pairs.values.min() < 1.5  # the mean of what is left is larger
        matrix = hessian.low_rank(k, remainder=remainder, n_probes=100, max_products=k)
        assert_near(matrix.trace(), spectrum.sum(-1, keepdim=True))
        assert matrix.is_positive_definite().all()


@pytest.mark.parametrize("k", [0, 2])  # k = 0 finds no pair, and must look at it all the same
@pytest.mark.parametrize(
    ("tolerance", "error"), [(None, TypeError), ("1e-3", TypeError), (-1.0, ValueError)]
)
def test_low_rank_looks_at_its_tolerance(k, tolerance, error):
    hessian = ScoreHessian(lambda x: 2 * x, torch.ones(2, 4).double())
    with pytest.raises(error, match=r"^ScoreHessian\.low_rank: tolerance must be"):
        hessian.low_rank(k, tolerance=tolerance)


def test_low_rank_keeps_all_of_a_covariance_at_full_rank():
    spectrum = torch.linspace(1, 2, 6).double()
    hessian = ScoreHessian(lambda x: x * spectrum, torch.ones(2, 6).double())
    for k in (5, 6):
        assert_near(hessian.low_rank(k).dense(), spectrum.diag().repeat(2, 1, 1))
    # The floor of a remainder that is not there adds nothing, and small eigenvalues are kept.
    steep = torch.tensor([3.0, 1.0, 0.5, 0.1, 1e-3, 1e-5]).double()
    for given in (spectrum, steep):
        hessian = ScoreHessian(lambda x, given=given: x * given, torch.ones(2, 6).double())
        for remainder in ("isotropic", "diagonal"):
            matrix = hessian.low_rank(6, remainder=remainder)
            assert_near(matrix.dense(), given.diag().repeat(2, 1, 1))
            assert matrix.is_positive_definite().all()


def test_a_floor_adds_no_variance_to_the_pairs_that_are_kept():
    spectrum = torch.tensor([4.0, 2.0, 0.0, 0.0, 0.0]).double()
    hessian = ScoreHessian(lambda x: x * spectrum, torch.ones(1, 5).double())
    least = 0.01 * spectrum.sum() / 5
    for remainder in ("isotropic", "diagonal"):
        matrix = hessian.low_rank(2, remainder=remainder)
        assert_near(matrix.diagonal()[0], spectrum.maximum(least))


@pytest.mark.parametrize(
    "changed",
    [
        {"remainder": "diagonal"},
        {"n_probes": 5},
        {"seed": 4},
        {"first": 7},
        {"remainder": "diagonal", "floor": 0.99},
        {"tolerance": 0.3},
        {"max_products": 6},
        {"symmetrize": False},
    ],
)
def test_posterior_from_score_is_the_explicit_chain_for_every_argument(changed):
    net, x, sigma, alpha = network(70), random(2, 70), 0.7, 0.9
    usual: dict[str, Any] = {"n_probes": 8, "seed": 3}
    given = usual | changed
    usual |= dict(list(changed.items())[:-1])  # all but the last
    posterior = posterior_from_score(net, x, sigma, alpha, rank=3, **given)
    other = posterior_from_score(net, x, sigma, alpha, rank=3, **usual)
    hessian = ScoreHessian(net, x, symmetrize=given.pop("symmetrize", True))
    covariance = (hessian.scale(sigma**2) + 1.0).low_rank(3, **{"tolerance": 1e-3, **given})
    covariance = covariance.scale(sigma**2 / alpha**2)
    assert_near(posterior.mean, posterior_mean(x, net(x).detach(), sigma, alpha))
    assert_near(posterior.covariance.dense(), covariance.dense())
    gap = posterior.covariance.dense() - other.covariance.dense()
    assert gap.abs().max() > 1e-6


def test_posterior_from_score_checks_unless_told_not_to():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="must give the same score twice"):
        posterior_from_score(lambda x: _RANDOM(x), _X, 0.3, rank=1)
    posterior = posterior_from_score(  # vmap, for want of chunk_size, would refuse randomness
        lambda x: _RANDOM(x), _X, 0.3, rank=1, check=False, chunk_size=1
    )
    assert posterior.mean.shape == _X.shape


def test_posterior_from_score_has_the_mean_and_leading_covariance_of_the_exact_posterior():
    density, alpha = mixture(70, decay=0.6), 0.9
    sigma = torch.tensor([0.5, 0.5], dtype=torch.float64)
    noisy = density.noisy(0.5, alpha)
    x = points(noisy, 2).reshape(2, 7, 10)

    def score_fn(x: Tensor) -> Tensor:
        return noisy.score(x.flatten(1)).reshape(x.shape)

    posterior = posterior_from_score(score_fn, x, sigma, alpha, rank=8, seed=0, tolerance=1e-8)
    flat = x.flatten(1)
    exact = density.posterior_covariance(flat, 0.5, alpha)
    assert_near(posterior.mean.flatten(1), density.posterior_mean(flat, 0.5, alpha), times=10)
    values, vectors = posterior.principal_components(3)
    truth = torch.linalg.eigh(exact)
    assert_near(values, truth[0].flip(-1)[:, :3], times=100)
    assert (torch.linalg.svdvals(truth[1][..., -3:].mT @ vectors) > 1 - 1e-9).all()
    assert_near(posterior.covariance.trace(), exact.diagonal(dim1=1, dim2=2).sum(-1), times=1e10)
    assert posterior.sample(2, seed=0).shape == (2, 2, 7, 10)
    assert posterior.std.shape == x.shape


def test_fifty_thousand_dimensions_take_no_square_matrix():
    size = 50_000
    centres = random(3, size, dtype=torch.float32)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    def score_fn(x: Tensor) -> Tensor:
        weights = (x @ centres.mT / size**0.5).softmax(-1)
        return weights @ centres - 2 * x

    with Largest() as largest:
        hessian = ScoreHessian(score_fn, random(1, size, dtype=torch.float32), symmetrize=True)
        hessian.estimate_diagonal(4, seed=0)
        matrix = (hessian.scale(0.25) + 1.0).low_rank(2, n_probes=4, seed=0, max_products=20)
    assert matrix.shape == (1, size, size)
    assert size <= largest.numel <= 100 * size


# ---------------------------------------------------------------------------------------- errors


class Dropped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


_UNTRACKED = Dropped(nn.BatchNorm1d(6, track_running_stats=False))
_RANDOM = Dropped(nn.Dropout(0.5))
_NET = network(dtype=torch.float32)
_X = random(3, 6, dtype=torch.float32)


@pytest.mark.parametrize(
    ("score_fn", "message"),
    [
        (Dropped(nn.BatchNorm1d(6)), "must be in eval mode, got BatchNorm1d in training mode"),
        (_RANDOM, "must be in eval mode, got Dropout in training mode"),
        (_RANDOM.forward, "must be in eval mode, got Dropout in training mode"),
        (lambda x: _RANDOM(x), "must give the same score twice, got two that differ by"),
        (lambda x: _UNTRACKED(x), "must treat each row by itself, got a score of row 0 that"),
        (lambda x: _NET(x.detach()), "must be differentiable in x .* got a zero gradient"),
        (torch.no_grad()(lambda x: _NET(x)), "must be differentiable in x .* got a zero grad"),
        (lambda x: _NET(x)[:, :2], r"score_fn\(x\) must have shape \(3, 6\), got \(3, 2\)"),
        (
            lambda x: _NET(x).double(),
            r"score_fn\(x\) must have dtype torch.float32, got torch.float64",
        ),
    ],
)
def test_a_score_that_has_no_hessian_per_row_is_refused(score_fn, message):
    with pytest.raises(ValueError, match=f"ScoreHessian: .*{message}"):
        ScoreHessian(score_fn, _X)


def test_batch_normalisation_and_dropout_pass_in_eval_mode():
    for layer in (nn.BatchNorm1d(6), nn.Dropout(0.5)):
        net = Dropped(layer).eval()
        expected = vmap(jacrev(lambda row, net=net: net(row[None])[0]))(_X)
        assert_near(ScoreHessian(net, _X).dense(), expected.detach())


def test_a_module_in_training_mode_is_refused_wherever_a_callable_holds_it():
    net = Dropped(nn.BatchNorm1d(6))

    def inner(x: Tensor) -> Tensor:
        return net(x)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def keyword(x: Tensor, *, module: nn.Module) -> Tensor:
        return module(x)

    def default(x: Tensor, *, module: nn.Module = net) -> Tensor:
        return module(x)

    held = [
        default,
        lambda x: net(x),
        lambda x: inner(x),
        lambda x, net=net: net(x),
        partial(inner),
        partial(call, net),
        partial(net.forward),
        partial(keyword, module=net),
    ]
    for score_fn in held:
        with pytest.raises(ValueError, match="got BatchNorm1d in training mode"):
            ScoreHessian(score_fn, _X)
    assert int(net.layers[1].num_batches_tracked) == 0
    net.eval()
    expected = ScoreHessian(net, _X).dense()
    for score_fn in held:
        assert_near(ScoreHessian(score_fn, _X).dense(), expected)


def test_a_closure_over_itself_and_over_a_variable_without_a_value_is_legal():
    def score_fn(x: Tensor, depth: int = 1) -> Tensor:
        if depth > 1:
            return score_fn(later, depth - 1)
        return _NET(x)

    hessian = ScoreHessian(score_fn, _X)
    later = _X
    assert_near(hessian.dense(), ScoreHessian(_NET, later).dense())


@pytest.mark.parametrize("size", [6, 5000])
@pytest.mark.parametrize("factor", [0.0, 0.9, 2.0])
def test_a_wrong_forward_derivative_is_refused(size, factor):
    class Wrong(Turned):
        @staticmethod
        def jvp(ctx, tangent):
            return factor * tangent

    x = 1e-3 * random(3, size, dtype=torch.float32)  # where sin' = 1
    with pytest.raises(ValueError, match=r"derivative that fits its gradient, got <u, J v> = "):
        ScoreHessian(Wrong.apply, x)
    if factor == 0:
        with pytest.raises(ValueError, match=r"got <u, J v> = 0 and <J\^T u, v> = "):
            ScoreHessian(lambda x: Wrong.apply(x.bfloat16()).float(), x)


def test_a_score_that_torch_func_cannot_differentiate_is_refused():
    class Old(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

    class Forward(Turned):
        @staticmethod
        def jvp(ctx, tangent):
            return tangent

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("none")

    with pytest.raises(RuntimeError, match=r"differentiable by torch.func.jvp, or twice by .*set"):
        ScoreHessian(Old.apply, _X)
    with pytest.raises(RuntimeError, match=r"torch.func.vjp \(check=False with symmetrize=False"):
        ScoreHessian(Forward.apply, _X)


def test_arguments_out_of_range_are_named():
    hessian = ScoreHessian(_NET, _X)
    with pytest.raises(TypeError, match="ScoreHessian: score_fn must be callable, got int"):
        ScoreHessian(3, _X)
    with pytest.raises(TypeError, match=r"ScoreHessian: score_fn\(x\) must be a Tensor, got tuple"):
        ScoreHessian(lambda x: (x,), _X)
    with pytest.raises(ValueError, match=r"ScoreHessian: x must have shape \(B, \*dims\), got"):
        ScoreHessian(_NET, _X[0])
    with pytest.raises(ValueError, match="ScoreHessian: x must have D >= 1"):
        ScoreHessian(_NET, _X[:, :0])
    with pytest.raises(ValueError, match="ScoreHessian: chunk_size must be at least 1, got 0"):
        ScoreHessian(_NET, _X, chunk_size=0)
    with pytest.raises(ValueError, match=r"matvec: v must have shape \(3, 6\) or \(3, 6, k\), got"):
        hessian @ _X[:2]
    with pytest.raises(ValueError, match=r"rmatvec: v must have dtype torch.float32, got"):
        hessian.rmatvec(_X.double())
    with pytest.raises(ValueError, match=r"ScoreHessian.scale: a must be a float or have shape"):
        hessian.scale(torch.ones(2))
    with pytest.raises(TypeError, match=r"ScoreHessian.__add__: other must be a float or a Tensor"):
        hessian + "1"
    with pytest.raises(ValueError, match="estimate_trace: n_probes must be at least 2, got 1"):
        hessian.estimate_trace(1)
    with pytest.raises(ValueError, match="estimate_diagonal: n_probes must be at least 2, got 0"):
        hessian.estimate_diagonal(0)
    with pytest.raises(TypeError, match="asymmetry: n_probes must be an int, got float"):
        hessian.asymmetry(2.0)
    with pytest.raises(ValueError, match=r"eigenpairs: k must be in 1..6, got 7"):
        hessian.eigenpairs(7)
    with pytest.raises(ValueError, match="eigenpairs: k must be at least 1, got 0"):
        hessian.eigenpairs(0)
    with pytest.raises(ValueError, match="eigenpairs: tolerance must be finite and > 0, got 0"):
        hessian.eigenpairs(1, tolerance=0.0)
    with pytest.raises(ValueError, match="eigenpairs: max_products must be at least 2, got 1"):
        hessian.eigenpairs(2, max_products=1)
    with pytest.raises(RuntimeError, match=r"eigh: no convergence in 6 products, got a residual"):
        hessian.eigh(2)
    with pytest.raises(ValueError, match="low_rank: remainder must be one of 'isotropic'"):
        hessian.low_rank(1, remainder="none")
    with pytest.raises(ValueError, match=r"low_rank: floor must be in \[0, 1\), got 1"):
        hessian.low_rank(1, floor=1.0)
    with pytest.raises(ValueError, match="low_rank: the matrix must be a covariance, got a trace"):
        (hessian + -10.0).low_rank(1)
    with pytest.raises(ValueError, match="posterior_from_score: sigma must be positive, got -1"):
        posterior_from_score(_NET, _X, -1.0, rank=1)


def test_rows_with_nan_stay_apart_except_for_eigenpairs_and_no_rows_are_legal():
    x = _X.clone()
    x[1] = torch.nan
    hessian = ScoreHessian(_NET, x)
    trace = hessian.trace()
    assert trace.isnan().tolist() == [False, True, False]
    assert_near(trace[::2], ScoreHessian(_NET, _X[::2]).trace())
    with pytest.raises(ValueError, match="products must be finite, got NaN or inf for row 1"):
        hessian.eigenpairs(1)
    empty = ScoreHessian(_NET, _X[:0])
    assert empty.dense().shape == (0, 6, 6)
    assert (empty @ _X[:0]).shape == (0, 6)
    assert empty.estimate_trace(2, seed=0).value.shape == (0,)
    assert posterior_from_score(_NET, _X[:0], 1.0, rank=2).mean.shape == (0, 6)
