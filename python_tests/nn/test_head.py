"""Second-order heads on frozen scores: exact on Gaussians, and nothing of the score ever moves."""

import inspect
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hos_ext.densities.gaussian import Gaussian
from hos_ext.integrations.diffusers import DiffusersScore, from_diffusers
from hos_ext.losses.score_matching import score_matching_loss
from hos_ext.nn.files import load_model, save_model
from hos_ext.nn.head import SecondOrderHead, register_score_reader
from hos_ext.nn.mlp import MLP
from hos_ext.nn.unet import UNet
from hos_ext.schedules import from_alphas_cumprod
from hos_ext.scores import Scores
from hos_ext.tweedie.posterior import posterior

DIMS = (1, 2, 4)  # of a tiny image: D = 8
SIZE = math.prod(DIMS)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers' models need hos_ext[images]")


def exactly(message):
    return f"^{re.escape(message)}$"


def starts(message):
    return f"^{re.escape(message)}"


def law(dtype=torch.float64):
    """N(m, a I + W W^T), W of two columns."""
    generator = torch.Generator().manual_seed(5)
    w = 0.5 * torch.randn(SIZE, 2, generator=generator, dtype=torch.float64)
    mean = 0.3 * torch.randn(SIZE, generator=generator, dtype=torch.float64)
    covariance = 0.05 * torch.eye(SIZE, dtype=torch.float64) + w @ w.mT
    return Gaussian(mean.to(dtype), covariance.to(dtype))


def exact_score(x, sigma):
    """sigma s1 of the law under plain noise; sigma a float."""
    return sigma * law(x.dtype).noisy(sigma).score(x.flatten(1)).reshape(x.shape)


def kappa(sigma):
    """Cov[x0 | x] / sigma^2, the same at every x."""
    return torch.linalg.solve(law().noisy(sigma).covariance, law().covariance)


def plan(prediction="epsilon", n=1000, **options):
    """What the score uses of a diffusers scheduler: here DDPM's linear table."""
    table = (1 - torch.linspace(1e-4, 0.02, n, dtype=torch.float64)).cumprod(0)
    return SimpleNamespace(
        alphas_cumprod=table, config=SimpleNamespace(prediction_type=prediction), **options
    )


class ExactNet(nn.Module):
    """The best variance-preserving network there is for `law`, as diffusers would call it."""

    def __init__(self, prediction, variance=False):
        super().__init__()
        self.prediction, self.variance = prediction, variance
        self.schedule = from_alphas_cumprod(plan().alphas_cumprod)
        self.times = []

    def forward(self, sample, t):
        self.times.append(t)
        rows = []
        for row, time in zip(sample.double(), t.double(), strict=True):
            alpha, sigma = self.schedule.alpha(time.item()), self.schedule.sigma(time.item())
            flat = row.reshape(1, -1)
            noise = -sigma * law().noisy(sigma, alpha).score(flat)
            clean = (flat - sigma * noise) / alpha
            value = {
                "epsilon": noise,
                "sample": clean,
                "v_prediction": alpha * noise - sigma * clean,
            }
            rows.append(value[self.prediction].reshape(row.shape))
        out = torch.stack(rows).to(sample.dtype)
        return SimpleNamespace(sample=torch.cat([out, out + 7], 1) if self.variance else out)


def noisy(sigma, n=6, dtype=torch.float64):
    torch.manual_seed(3)
    x = law().sample(n, seed=2).reshape(n, *DIMS)
    return (x + sigma * torch.randn_like(x)).to(dtype)


def head(rank=2, **options):
    return MLP(DIMS, rank, given_score=True, **({"head_width": 16, "head_depth": 1} | options))


def small_unet(diffusers, **options):
    torch.manual_seed(4)
    sizes = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8)}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(
        **(sizes | blocks | {"layers_per_block": 1, "norm_num_groups": 4} | options)
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def frozen_unet(diffusers, **options):
    score = DiffusersScore(small_unet(diffusers, **options), diffusers.DDPMScheduler())
    return SecondOrderHead(score, head())


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def fit(model, steps, sigma_range, *, batch=64, rate=1e-2, **options):
    """Adam on what asks for a gradient; noise levels log-uniform."""
    optimizer = torch.optim.Adam(trainable(model), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data = law().sample(4096, seed=9).reshape(-1, *DIMS).to(next(model.head.parameters()).dtype)
    low, high = map(math.log, sigma_range)
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        x = data[torch.randint(len(data), (batch,))]
        sigma = (low + (high - low) * torch.rand(batch)).exp().to(x.dtype)
        loss = score_matching_loss(model, x, sigma, seed=0, offset=step, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def covariance_error(model, sigma, n=200):
    """Mean Frobenius error of kappa, relative to the exact one."""
    x = noisy(sigma, n, next(model.head.parameters()).dtype)
    with torch.no_grad():
        scores = model(x, sigma)
    learned = torch.diag_embed(scores.c.flatten(1)) + scores.factor @ scores.factor.mT
    exact = kappa(sigma).to(learned.dtype)
    return float((learned - exact).norm(dim=(1, 2)).mean() / exact.norm())


# ------------------------------------------------------------------------------ the change of scale


@pytest.mark.parametrize("sigma", [0.05, 0.7, 9.0])
def test_scaled_scores_are_the_same_for_a_scaled_sample(sigma):
    x = noisy(sigma).flatten(1)
    alpha = 1 / math.hypot(1, sigma)
    plain, scaled = law().noisy(sigma), law().noisy(alpha * sigma, alpha)
    torch.testing.assert_close(
        alpha * sigma * scaled.score(alpha * x), sigma * plain.score(x), rtol=1e-11, atol=1e-12
    )
    torch.testing.assert_close(
        (alpha * sigma) ** 2 * scaled.hessian(alpha * x), sigma**2 * plain.hessian(x)
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("sigma", [0.011, 0.3, 2.0, 150.0])
def test_every_prediction_type_gives_the_exact_scaled_score(prediction, variance, sigma):
    net = ExactNet(prediction, variance)
    score = DiffusersScore(net, plan(prediction))
    x = noisy(sigma)
    value = score(x, sigma)
    assert value.dtype == x.dtype
    torch.testing.assert_close(value, exact_score(x, sigma), rtol=1e-8, atol=1e-8)
    assert net.times[0].shape == (6,)
    rows = score(x, torch.tensor([sigma] * 5 + [1.0], dtype=x.dtype))
    torch.testing.assert_close(rows[:5], value[:5], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows[5:], exact_score(x[5:], 1.0), rtol=1e-8, atol=1e-8)


def test_time_is_where_the_ratio_of_the_schedule_is_sigma():
    net = ExactNet("epsilon")
    score = DiffusersScore(net, plan())
    low, high = score.sigma_range
    levels = torch.tensor([low, 0.1, 1.0, 30.0, high], dtype=torch.float64)
    score(noisy(1.0, 5), levels)
    schedule = score.schedule
    t = net.times[0]
    torch.testing.assert_close(schedule.sigma(t) / schedule.alpha(t), levels, rtol=1e-9, atol=0)
    torch.testing.assert_close(t[[0, -1]], t.new_tensor([0, 999]), rtol=1e-12, atol=1e-12)
    assert all(0.01 < float(v) % 1 < 0.99 for v in t[1:-1])  # not rounded


def test_a_last_time_without_signal_is_left_out():
    table = plan("sample")
    table.alphas_cumprod[-1] = 0
    score = DiffusersScore(ExactNet("sample"), table)
    assert len(score.schedule.alphas_cumprod) == 999
    x = noisy(1.0)
    torch.testing.assert_close(score(x, 1.0), exact_score(x, 1.0), rtol=1e-5, atol=1e-5)


def test_diffusers_own_network_and_scheduler_are_called_at_alpha_x(diffusers):
    for prediction in PREDICTIONS:
        unet = small_unet(diffusers).eval()
        scheduler = diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False)
        score = DiffusersScore(unet, scheduler)
        abar = scheduler.alphas_cumprod[500].double()
        alpha, sigma_t = abar.sqrt(), (1 - abar).sqrt()
        x0 = noisy(0.1, 3, torch.float32)
        noise = torch.randn_like(x0)
        x_t = scheduler.add_noise(x0, noise, torch.tensor([500] * 3))
        x = x0 + float(sigma_t / alpha) * noise
        value = score(x, float(sigma_t / alpha))
        with torch.no_grad():
            out = unet(x_t, 500).sample
        clean = scheduler.step(out, 500, x_t).pred_original_sample
        # E[x0 | x] = x + sigma (sigma s1)
        mean = x + float(sigma_t / alpha) * value
        torch.testing.assert_close(mean, clean, rtol=2e-4, atol=2e-4)


class Net(nn.Module):
    """A network with a given config and output."""

    def __init__(self, config=None, output=lambda x: x, dtype=None):
        super().__init__()
        self.config, self.output = config, output
        if dtype is not None:
            self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x, t):
        return SimpleNamespace(sample=self.output(x))


@pytest.mark.parametrize(
    ("unet", "scheduler", "kind", "message"),
    [
        (lambda x, t: x, plan(), TypeError, "net must be a Module, got function"),
        (
            Net(),
            SimpleNamespace(),
            ValueError,
            (
                "scheduler must have alphas_cumprod, or be of flow matching or EDM, "
                "got SimpleNamespace"
            ),
        ),
        (
            Net(),
            plan("flow"),
            ValueError,
            (
                "scheduler.config.prediction_type must be one of 'epsilon', 'sample', "
                "'v_prediction', got 'flow'"
            ),
        ),
        (
            Net({"time_embedding_type": "learned"}),
            plan(),
            ValueError,
            (
                "net must have time_embedding_type 'positional', which takes times between the "
                "whole numbers, got 'learned'"
            ),
        ),
        (
            Net(dtype=torch.float16),
            plan(),
            ValueError,
            "net must be float32 or float64, got torch.float16",
        ),
    ],
)
def test_networks_and_schedulers_of_other_kinds_are_refused(unet, scheduler, kind, message):
    with pytest.raises(kind, match=exactly(f"DiffusersScore: {message}")):
        DiffusersScore(unet, scheduler)


def test_score_refuses_what_it_cannot_answer():
    score = DiffusersScore(Net(), plan())
    x = noisy(1.0)
    rule = (
        "DiffusersScore: sigma must be in [0.0100005, 157.407], the noise levels of the schedule,"
    )
    for sigma, got in ((0.01, "0.01"), (158, "158"), (torch.full((6,), 0.001), "0.001")):
        with pytest.raises(ValueError, match=exactly(f"{rule} got {got}")):
            score(x, sigma)
    with pytest.raises(
        ValueError, match=exactly("DiffusersScore: sigma must be positive, got -1.0")
    ):
        score(x, -1)
    with pytest.raises(
        ValueError, match=exactly("DiffusersScore: x must have shape (B, *dims), got (3,)")
    ):
        score(torch.zeros(3), 1.0)
    bad = DiffusersScore(Net(output=lambda x: x[:, :, :1]), plan())
    message = "DiffusersScore: net must return shape (6, 1, 2, 4), got (6, 1, 1, 4)"
    with pytest.raises(ValueError, match=exactly(message)):
        bad(x, 1.0)
    bad = DiffusersScore(Net(output=lambda x: None), plan())
    message = (
        "DiffusersScore: net must return a floating Tensor, an object with one as 'sample', or a "
        "tuple of it, got SimpleNamespace"
    )
    with pytest.raises(TypeError, match=exactly(message)):
        bad(x, 1.0)


# ----------------------------------------------------------------------------------------- the head


def test_only_the_head_is_trained_and_the_score_stays_bitwise(diffusers):
    model = frozen_unet(diffusers, dropout=0.5)
    score = model.score_model
    before = {name: value.clone() for name, value in score.state_dict().items()}
    assert {id(p) for p in trainable(model)} == {id(p) for p in model.head.parameters()}
    learned = [p.clone() for p in model.head.parameters()]
    fit(model, 3, (0.1, 1.0))
    model.train()
    assert model.head.training
    assert not any(module.training for module in score.modules())
    assert all(torch.equal(value, before[name]) for name, value in score.state_dict().items())
    assert all(p.grad is None for p in score.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(learned, model.head.parameters(), strict=True)]
    assert all(moved)
    x = noisy(0.3, 4, torch.float32)
    assert torch.equal(model(x, 0.3).scaled_score, model(x, 0.3).scaled_score)  # its dropout is off


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variance_reduction": True},
        {"variance_reduction": False, "centred": False},
        {"variance_reduction": True, "centred": False},
        {"first_order": "vr", "centred": False, "detach_score": False},
        {"gamma": 0.0, "first_order": "plain"},
    ],
)
def test_every_loss_moves_the_head_alone(options):
    model = SecondOrderHead(exact_score, head().double())
    x = law().sample(8, seed=1).reshape(-1, *DIMS)
    loss, terms = score_matching_loss(model, x, 0.4, seed=0, return_terms=True, **options)
    loss.backward()
    assert terms["first"].isfinite()
    gradients = [p.grad.clone() for p in model.head.parameters()]
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[-1].abs().max() > 0
    model.zero_grad()
    score_matching_loss(model, x, 0.4, seed=0, **(options | {"gamma": 5.0})).backward()
    again = [p.grad for p in model.head.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_scores_may_be_true_or_come_from_a_model_of_ours():
    torch.manual_seed(0)
    second = head().double()
    x = noisy(0.4)
    sigma = torch.linspace(0.4, 0.4, 6, dtype=torch.float64)
    want = SecondOrderHead(exact_score, second)(x, 0.4)
    true = SecondOrderHead(lambda x, sigma: exact_score(x, 0.4) / 0.4, second, scaled=False)
    for level in (0.4, sigma):
        got = true(x, level)
        for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    first = MLP(DIMS, 0, width=8, head_width=8).double()
    model = SecondOrderHead(first, second, scaled=False)
    assert torch.equal(model(x, sigma).scaled_score, first(x, sigma).scaled_score)
    assert not first.c.weight.requires_grad


def test_gradient_for_x_goes_through_the_score():
    model = SecondOrderHead(exact_score, head().double())
    x = noisy(0.4)
    assert not model(x, 0.4).scaled_score.requires_grad
    x.requires_grad_()
    (given,) = torch.autograd.grad(model(x, 0.4).scaled_score.sum(), x)
    want = 0.4 * law().noisy(0.4).hessian(x.flatten(1)).sum(1)
    torch.testing.assert_close(given.flatten(1), want)
    with torch.no_grad():
        assert not model(x, 0.4).scaled_score.requires_grad
    jacobian = torch.func.jacrev(lambda row: model(row[None], 0.4).scaled_score[0])(x[0].detach())
    torch.testing.assert_close(
        jacobian.reshape(SIZE, SIZE), 0.4 * law().noisy(0.4).hessian(x[:1].flatten(1))[0]
    )


def test_gradient_checkpointing_is_that_of_the_head():
    model = SecondOrderHead(exact_score, head())
    assert model.gradient_checkpointing is False
    model.gradient_checkpointing = True
    assert model.head.gradient_checkpointing is True
    assert model.gradient_checkpointing is True


def test_head_refuses_other_kinds():
    rule = "SecondOrderHead: "
    with pytest.raises(TypeError, match=exactly(f"{rule}score_model must be callable, got float")):
        SecondOrderHead(1.0, head())
    with pytest.raises(TypeError, match=exactly(f"{rule}head must be a module, got function")):
        SecondOrderHead(exact_score, exact_score)
    message = f"{rule}head must be made with given_score=True, got MLP without it"
    with pytest.raises(ValueError, match=exactly(message)):
        SecondOrderHead(exact_score, MLP(DIMS, 2))
    x = noisy(0.4)
    bad = SecondOrderHead(lambda x, sigma: x[:1], head().double())
    message = f"{rule}score from score_model must have shape (6, 1, 2, 4), got (1, 1, 2, 4)"
    with pytest.raises(ValueError, match=exactly(message)):
        bad(x, 0.4)
    bad = SecondOrderHead(exact_score, Third())
    with pytest.raises(TypeError, match=exactly(f"{rule}head must return Scores, got Tensor")):
        bad(x, 0.4)


class Third(nn.Module):
    def forward(self, x, sigma, score):
        return score


class ExactHead(nn.Module):
    """The exact c and factor of `law`."""

    def forward(self, x, sigma, score):
        values, vectors = torch.linalg.eigh(kappa(sigma))
        c = values[0]
        factor = (vectors * (values - c).clamp(min=0).sqrt()).expand(len(x), -1, -1)
        return Scores(torch.zeros_like(score), c.expand(x.shape), factor)


def test_posterior_in_variance_preserving_coordinates_is_the_exact_one():
    score = DiffusersScore(ExactNet("v_prediction"), plan("v_prediction"))
    model = SecondOrderHead(score, ExactHead())
    for sigma in (0.3, 0.95):
        alpha = math.sqrt(1 - sigma**2)
        x_t = alpha * noisy(sigma / alpha)
        got = posterior(x_t, model(x_t / alpha, sigma / alpha), sigma, alpha)
        flat = x_t.flatten(1)
        torch.testing.assert_close(
            got.mean.flatten(1), law().posterior_mean(flat, sigma, alpha), rtol=1e-7, atol=1e-7
        )
        torch.testing.assert_close(
            got.covariance.dense(),
            law().posterior_covariance(flat, sigma, alpha).expand(6, -1, -1),
            rtol=1e-8,
            atol=1e-10,
        )


@pytest.mark.parametrize("options", [{}, {"variance_reduction": False, "centred": True}])
def test_head_on_an_exact_score_learns_the_exact_covariance(options):
    torch.manual_seed(0)
    model = SecondOrderHead(rows_of_score, head(c_min=1e-4))
    before = {sigma: covariance_error(model, sigma) for sigma in (0.35, 0.55)}
    fit(model, 300, (0.25, 0.7), batch=256, **options)
    for sigma, error in before.items():
        assert error > 0.9
        assert covariance_error(model, sigma) < 0.06


def rows_of_score(x, sigma):
    """The exact scaled score, sigma (B,) or a float."""
    values, vectors = torch.linalg.eigh(law(x.dtype).covariance)
    level = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x)).unsqueeze(-1)
    centred = (x.flatten(1) - law(x.dtype).mean) @ vectors
    return (-level * centred / (values + level.square()) @ vectors.mT).reshape(x.shape)


# -------------------------------------------------------------------------------------------- files


def test_pipeline_trained_and_saved_by_diffusers_gets_a_calibrated_head(diffusers, tmp_path):
    """The whole way: a DDPM trained by itself, saved, read, a head trained, saved, read."""
    unet = small_unet(diffusers)
    scheduler = diffusers.DDPMScheduler()
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    data = law(torch.float32).sample(4096, seed=1).reshape(-1, *DIMS)
    for step in range(60):
        torch.manual_seed(step)
        x0 = data[torch.randint(len(data), (64,))]
        noise, t = torch.randn_like(x0), torch.randint(100, 400, (64,))
        guess = unet(scheduler.add_noise(x0, noise, t), t).sample
        loss = (guess - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "ddpm")

    score = from_diffusers(tmp_path / "ddpm")
    assert not score.net.training
    assert all(
        torch.equal(a, b) for a, b in zip(score.net.parameters(), unet.parameters(), strict=True)
    )
    x = noisy(0.5, 200, torch.float32)
    close = (score(x, 0.5) - exact_score(x, 0.5)).norm() / exact_score(x, 0.5).norm()
    assert close < 0.6

    torch.manual_seed(0)
    model = SecondOrderHead(score, head(c_min=1e-4))
    before = covariance_error(model, 0.5)
    fit(model, 80, (0.3, 0.8), variance_reduction=False, centred=True, rate=3e-2)
    assert covariance_error(model, 0.5) < 0.5 * before
    assert all(
        torch.equal(a, b) for a, b in zip(score.net.parameters(), unet.parameters(), strict=True)
    )
    model.save_pretrained(tmp_path / "model", step=80)
    again = SecondOrderHead.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for got, want in zip(tree_leaves(again(x, 0.5)), tree_leaves(model(x, 0.5)), strict=True):
            assert torch.equal(got, want)


def test_saved_head_brings_its_diffusers_network_along(diffusers, tmp_path):
    model = frozen_unet(diffusers)
    assert save_model(model, tmp_path, step=5) == str(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "first_order"}
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "first_order" / "unet")
    assert unet.config.block_out_channels == [8, 8]
    diffusers.DDPMScheduler.from_pretrained(tmp_path / "first_order" / "scheduler")
    x = noisy(0.4, 3, torch.float32)
    again, config = load_model(tmp_path)
    assert isinstance(again, SecondOrderHead)
    assert config["step"] == 5
    assert config["head"] == model.head.config
    assert again.config == model.config
    assert not again.training
    assert len(trainable(again)) == len(trainable(model))
    for got, want in zip(tree_leaves(again(x, 0.4)), tree_leaves(model(x, 0.4)), strict=True):
        assert torch.equal(got, want)
    times = [p.stat().st_mtime_ns for p in sorted((tmp_path / "first_order").rglob("*"))]
    again.save_pretrained(tmp_path, step=6)
    assert times == [p.stat().st_mtime_ns for p in sorted((tmp_path / "first_order").rglob("*"))]
    assert load_model(tmp_path)[1]["step"] == 6


def test_network_in_float64_and_unet_head_come_back_as_they_were(diffusers, tmp_path):
    score = DiffusersScore(small_unet(diffusers).double(), diffusers.DDIMScheduler())
    sizes = {"channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    model = SecondOrderHead(score, UNet(DIMS, 1, given_score=True, **sizes).double())
    model.save_pretrained(tmp_path)
    again = SecondOrderHead.from_pretrained(tmp_path)
    assert type(again.score_model.scheduler).__name__ == "DDIMScheduler"
    x = noisy(0.4, 3)
    with torch.no_grad():
        for got, want in zip(tree_leaves(again(x, 0.4)), tree_leaves(model(x, 0.4)), strict=True):
            assert got.dtype == torch.float64
            assert torch.equal(got, want)


def test_another_network_than_the_heads_is_refused(diffusers, tmp_path):
    model = frozen_unet(diffusers)
    model.save_pretrained(tmp_path)
    other = frozen_unet(diffusers)
    with torch.no_grad():
        next(other.score_model.parameters()).add_(1e-3)
    place = tmp_path / "first_order"
    message = f"save_pretrained: folder must not hold another first-order model, got one in {place}"
    with pytest.raises(ValueError, match=exactly(message)):
        other.save_pretrained(tmp_path)
    same_net = SecondOrderHead(
        DiffusersScore(
            model.score_model.net, diffusers.DDPMScheduler(prediction_type="v_prediction")
        ),
        head(),
    )
    with pytest.raises(ValueError, match=exactly(message)):
        same_net.save_pretrained(tmp_path)
    other.score_model.net.save_pretrained(place / "unet")
    message = (
        "SecondOrderHead.from_pretrained: folder must hold the first-order model that the head was "
        f"trained with, got another one in {place}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        SecondOrderHead.from_pretrained(tmp_path)


def test_a_version_of_diffusers_with_more_options_knows_the_network(
    diffusers, monkeypatch, tmp_path
):
    torch.manual_seed(0)
    score = DiffusersScore(small_unet(diffusers), diffusers.DDPMScheduler())
    model = SecondOrderHead(score, head())
    model.save_pretrained(tmp_path)
    before = inspect.signature(diffusers.UNet2DModel)
    more = inspect.Parameter("later", inspect.Parameter.KEYWORD_ONLY, default=None)
    later = before.replace(parameters=[*before.parameters.values(), more])
    read = diffusers.UNet2DModel.from_pretrained

    def from_later(*arguments, **options):
        unet = read(*arguments, **options)
        unet.register_to_config(later=None)
        return unet

    monkeypatch.setattr(diffusers.UNet2DModel, "__signature__", later, raising=False)
    monkeypatch.setattr(diffusers.UNet2DModel, "from_pretrained", from_later)
    again = SecondOrderHead.from_pretrained(tmp_path)
    assert again.score_model.net.config["later"] is None


class _Linear(nn.Module):
    """A score whose dtype autocast would change."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, sigma):
        return self.layer(x)


def test_autocast_does_not_reach_the_score():
    torch.manual_seed(0)
    model = SecondOrderHead(_Linear(), MLP((4,), 1, given_score=True))
    x = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(x, 0.5)
    assert torch.equal(scores.scaled_score, model(x, 0.5).scaled_score)
    assert scores.factor.dtype == torch.bfloat16


def test_the_last_time_of_eulers_scheduler_without_signal_is_left_out(diffusers):
    unet = small_unet(diffusers)
    euler = diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True)
    plain = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    ends = [DiffusersScore(unet, each).sigma_range for each in (euler, plain)]
    assert ends[0] == ends[1]


def test_head_on_any_function_is_saved_without_it(tmp_path):
    model = SecondOrderHead(rows_of_score, head())
    model.save_pretrained(tmp_path, step=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = SecondOrderHead.from_pretrained(tmp_path, score_model=rows_of_score)
    x = noisy(0.4, 3, torch.float32)
    assert torch.equal(again(x, 0.4).c, model(x, 0.4).c)
    message = (
        "SecondOrderHead.from_pretrained: score_model must be given (the head was trained with one "
        f"that is not saved), got None for {tmp_path}"
    )
    for call in (SecondOrderHead.from_pretrained, load_model):
        with pytest.raises(ValueError, match=exactly(message)):
            call(tmp_path)


class OwnScore(nn.Module):
    """A score that another package can save: sigma s1 = -scale x."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x, sigma):
        return -self.scale * x

    def fingerprint(self):
        return {"kind": "own", "scale": repr(self.scale.item())}

    def save_pretrained(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scale").write_text(repr(self.scale.item()))


def read_own_score(folder, fingerprint, *, device):
    return OwnScore(float((folder / "scale").read_text())).to(device)


def test_a_score_of_another_package_is_saved_and_read_by_its_registered_reader(
    tmp_path, monkeypatch
):
    readers = {"diffusers": "hos_ext.integrations.diffusers:read_saved"}
    monkeypatch.setattr("hos_ext.nn.head._READERS", readers)
    model = SecondOrderHead(OwnScore(0.5), head())
    rule = "load_model: folder must hold a first-order model of a known kind (diffusers; "
    with pytest.raises(ValueError, match=starts(rule)):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    register_score_reader("own", f"{__name__}:read_own_score")
    save_model(model, tmp_path)
    again, config = load_model(tmp_path)
    assert config["first_order"] == {"kind": "own", "scale": "0.5"}
    assert isinstance(again.score_model, OwnScore)
    x = noisy(0.4, 3, torch.float32)
    for got, want in zip(tree_leaves(again(x, 0.4)), tree_leaves(model(x, 0.4)), strict=True):
        assert torch.equal(got, want)
    message = "register_score_reader: reader must be 'module:function', got 'read'"
    with pytest.raises(ValueError, match=exactly(message)):
        register_score_reader("own", "read")


def test_networks_do_not_wait_for_other_libraries():
    """Importing the networks imports none of what only a folder may ask for."""
    code = (
        "import sys, hos_ext.nn\n"
        "assert not {'hos_ext.integrations', 'diffusers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_refuses_a_second_score_and_other_classes(diffusers, tmp_path):
    frozen_unet(diffusers).save_pretrained(tmp_path / "head")
    rule = "SecondOrderHead.from_pretrained:"
    message = (
        f"{rule} score_model must be None where the folder has its own, got one for {tmp_path}/head"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        SecondOrderHead.from_pretrained(tmp_path / "head", score_model=rows_of_score)
    MLP(DIMS, 1).save_pretrained(tmp_path / "mlp")
    message = f"{rule} folder must hold SecondOrderHead, got MLP in {tmp_path}/mlp"
    with pytest.raises(ValueError, match=exactly(message)):
        SecondOrderHead.from_pretrained(tmp_path / "mlp")
    message = "save_model: model must be MLP, UNet or UNet3d (unwrapped), got Third"
    with pytest.raises(TypeError, match=exactly(message)):
        SecondOrderHead(rows_of_score, Third()).save_pretrained(tmp_path / "third")


def test_pipelines_are_read_from_sub_folders_and_from_one_folder(diffusers, tmp_path):
    unet, scheduler = small_unet(diffusers), diffusers.DDPMScheduler()
    unet.save_pretrained(tmp_path / "flat")
    scheduler.save_pretrained(tmp_path / "flat")
    score = from_diffusers(tmp_path / "flat", dtype=torch.float64)
    assert next(score.parameters()).dtype == torch.float64
    unet.half().save_pretrained(tmp_path / "half" / "unet")
    scheduler.save_pretrained(tmp_path / "half" / "scheduler")
    assert next(from_diffusers(tmp_path / "half").parameters()).dtype == torch.float32


def test_folders_without_a_whole_pipeline_are_refused(diffusers, tmp_path):
    rule = "from_diffusers: folder must hold"
    with pytest.raises(
        ValueError, match=exactly(f"{rule} unet/config.json, got {tmp_path} without it")
    ):
        from_diffusers(tmp_path)
    unet = small_unet(diffusers)
    unet.save_pretrained(tmp_path / "unet")
    message = f"{rule} scheduler/scheduler_config.json, got {tmp_path} without it"
    with pytest.raises(ValueError, match=exactly(message)):
        from_diffusers(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    whole_rule = f"{rule} a whole pipeline, got {tmp_path}: "
    with pytest.raises(ValueError, match=starts(whole_rule)):
        from_diffusers(tmp_path)
    weights.unlink()
    torch.save(unet.state_dict(), tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=starts(whole_rule)):
        from_diffusers(tmp_path)
    weights.write_bytes(whole)
    for part, name, change, got in (
        ("scheduler", "scheduler_config.json", {"_class_name": "os"}, "a scheduler, got 'os' in"),
        (
            "unet",
            "config.json",
            {"_class_name": "DDPMScheduler"},
            "a network of diffusers, got 'DDPMScheduler' in",
        ),
    ):
        path = tmp_path / part / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=starts(f"{rule} {got}")):
            from_diffusers(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=exactly(f"{rule} JSON in config.json, got {path}")):
        from_diffusers(tmp_path)


def test_the_given_model_is_in_eval_mode_from_the_start():
    given = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    head = SecondOrderHead(given, MLP((3,), rank=1, given_score=True))
    assert not given.training
    assert not any(parameter.requires_grad for parameter in given.parameters())
    assert head.train().head.training
    assert not given.training


def test_a_head_of_ones_own_without_checkpointing_says_so():
    class Own(nn.Module):
        def forward(self, x, sigma, scaled_score):
            return Scores(scaled_score, torch.ones_like(x))

    assert SecondOrderHead(lambda x, sigma: -x, Own()).gradient_checkpointing is False
