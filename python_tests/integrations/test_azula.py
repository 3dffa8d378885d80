"""Denoisers for other libraries, against the exact posterior and the libraries where installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hos_ext import MLP, VP, Scores
from hos_ext.densities import Gaussian
from hos_ext.integrations.azula import MeanDenoiser, azula_denoiser
from hos_ext.losses.module import ScoreMatchingLoss
from hos_ext.losses.score_matching import score_matching_loss
from hos_ext.schedules import VE
from hos_ext.tweedie import posterior

F64 = torch.float64
D = 4


def data() -> Gaussian:
    root = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=F64)
    return Gaussian(torch.linspace(-1, 1, D, dtype=F64), root @ root.T + torch.eye(D, dtype=F64))


def exact_model(law: Gaussian, alpha_of=lambda sigma: 1.0):
    """Scores of the noisy law, as a network gives them; every row its own noise level."""

    def model(x: Tensor, sigma: Tensor) -> Scores:
        rows = []
        for row, level in zip(x, sigma.tolist(), strict=True):
            noisy = law.noisy(level, alpha_of(level))
            kappa = torch.eye(D, dtype=F64) + level**2 * noisy.hessian(row[None].flatten(1))[0]
            values, vectors = torch.linalg.eigh(kappa)
            c = values[:1].expand(D)
            factor = vectors * (values - values[0]).clamp(min=0).sqrt()
            rows.append(
                (level * noisy.score(row[None].flatten(1))[0].reshape(row.shape), c, factor)
            )
        score, c, factor = (torch.stack(column) for column in zip(*rows, strict=True))
        return Scores(score, c.reshape(x.shape), factor)

    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, D, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize(
    "sigma",
    [0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.full((3, 1, 1, 1), 0.5).double()],
    ids=["float", "0-d", "one", "column"],
)
def test_mean_denoiser_is_the_exact_posterior_mean(x, sigma):
    law = data()
    denoiser = MeanDenoiser(exact_model(law))
    torch.testing.assert_close(denoiser(x, sigma), law.posterior_mean(x, 0.5))
    covariance = denoiser.posterior(x, sigma).covariance.dense()
    torch.testing.assert_close(covariance, law.posterior_covariance(x, 0.5))


def test_mean_denoiser_in_other_units(x):
    law = data()
    denoiser = MeanDenoiser(exact_model(law), shift=0.3, scale=2.0)
    moved = Gaussian(2 * law.mean + 0.3, 4 * law.covariance)
    torch.testing.assert_close(denoiser(x, 0.8), moved.posterior_mean(x, 0.8))
    covariance = denoiser.posterior(x, 0.8).covariance.dense()
    torch.testing.assert_close(covariance, moved.posterior_covariance(x, 0.8))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_mean_denoiser_of_a_model_trained_with_alpha(x, scale):
    """A VP model serves plain noise: it is called where sigma(t) / alpha(t) is that asked for."""
    law, schedule = data(), VP()
    model = exact_model(law, lambda s: schedule.alpha(schedule.t_of_sigma(s)))
    denoiser = MeanDenoiser(model, schedule=schedule, scale=scale)
    moved = Gaussian(scale * law.mean, scale**2 * law.covariance)
    sigma = torch.tensor([0.3, 1.0, 4.0], dtype=F64)
    got, covariance = denoiser(x, sigma), denoiser.posterior(x, sigma).covariance.dense()
    for b, level in enumerate(sigma.tolist()):
        row = x[b : b + 1]
        torch.testing.assert_close(got[b : b + 1], moved.posterior_mean(row, level))
        torch.testing.assert_close(covariance[b], moved.posterior_covariance(row, level)[0])


def test_mean_denoiser_refuses_what_does_not_fit(x):
    with pytest.raises(ValueError, match=r"^MeanDenoiser: scale must be finite and > 0, got 0"):
        MeanDenoiser(exact_model(data()), scale=0)
    with pytest.raises(ValueError, match=r"^MeanDenoiser: scale must be finite and > 0, got inf"):
        MeanDenoiser(exact_model(data()), scale=float("inf"))
    with pytest.raises(ValueError, match=r"^MeanDenoiser: shift must be a finite number, got nan"):
        MeanDenoiser(exact_model(data()), shift=float("nan"))
    with pytest.raises(TypeError, match=r"^MeanDenoiser: schedule must be a Schedule, got int"):
        MeanDenoiser(exact_model(data()), schedule=3)
    with pytest.raises(ValueError, match=r"^MeanDenoiser: sigma must be positive, got 0"):
        MeanDenoiser(exact_model(data()))(x, 0.0)
    with pytest.raises(TypeError, match=r"^MeanDenoiser: model must return Scores, got Tensor"):
        MeanDenoiser(lambda x, sigma: x)(x, 0.5)
    with pytest.raises(ValueError, match=r"^MeanDenoiser: sigma must be a float or have shape"):
        MeanDenoiser(exact_model(data()))(x, torch.ones(2))


def test_deepinv_takes_the_denoiser_as_a_prior(x):
    deepinv = pytest.importorskip("deepinv")
    law = data()
    images = x.reshape(3, 1, 2, 2)
    prior = deepinv.optim.ScorePrior(MeanDenoiser(exact_model(law)))
    gradient = prior.grad(images, 0.4).reshape(3, D)
    torch.testing.assert_close(gradient, -law.noisy(0.4).score(x))


@pytest.mark.parametrize("ours", [True, False])
def test_azula_samples_with_the_denoiser(x, ours):
    noise = pytest.importorskip("azula.noise")
    samplers = pytest.importorskip("azula.sample")
    law = data()
    if ours:
        schedule = VP()
        model = exact_model(law, lambda s: float((1 - s**2) ** 0.5))
        denoiser = azula_denoiser(model, schedule)
        alpha, sigma = schedule.alpha(0.4006), schedule.sigma(0.4006)
        t = torch.tensor(0.4, dtype=F64)
    else:
        denoiser = azula_denoiser(exact_model(law), noise.VESchedule())
        t = torch.tensor(0.4, dtype=F64)
        alpha, sigma = (float(v) for v in denoiser.schedule(t))
    answer = denoiser(x, t)
    torch.testing.assert_close(answer.mean, law.posterior_mean(x, sigma, alpha))
    covariance = law.posterior_covariance(x, sigma, alpha)
    torch.testing.assert_close(answer.var, covariance.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(answer.posterior.covariance.dense(), covariance)
    draws = samplers.DDIMSampler(denoiser, steps=8, silent=True)(torch.randn(3, D, dtype=F64))
    assert draws.shape == (3, D)
    assert draws.isfinite().all()


def test_azula_denoiser_needs_a_schedule():
    pytest.importorskip("azula.noise")
    with pytest.raises(TypeError, match=r"^azula_denoiser: schedule must be a Schedule, or one of"):
        azula_denoiser(exact_model(data()), None)


def test_without_azula_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "azula.denoise", None)
    with pytest.raises(RuntimeError) as error:
        azula_denoiser(exact_model(data()), VE())
    assert str(error.value).startswith(
        "azula_denoiser: azula.denoise must be installed (pip install hos_ext[adapters]), got: "
    )


# ---------------------------------------------------------------------------------- loss module


def test_loss_module_draws_levels_and_noise_by_step_and_row():
    model, batch = MLP((3,), 1), torch.randn(8, 3)
    criterion = ScoreMatchingLoss((0.1, 1.0), seed=5, reduction="none")
    first, second = criterion(model, batch), criterion(model, batch)
    assert not torch.equal(first, second)
    assert int(criterion.step) == 2
    torch.testing.assert_close(criterion(model, batch, step=0), first)
    halves = [criterion(model, batch[i : i + 4], step=1, first=i) for i in (0, 4)]
    torch.testing.assert_close(torch.cat(halves), second)
    assert int(criterion.step) == 2
    criterion.eval()
    again = criterion(model, batch), criterion(model, batch)
    assert torch.equal(*again)


def test_ranks_draw_the_rows_of_one_batch(monkeypatch):
    model, batch = MLP((3,), 1), torch.randn(8, 3)
    criterion = ScoreMatchingLoss((0.1, 1.0), reduction="none")
    whole = criterion(model, batch, step=4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        halves.append(criterion(model, batch[4 * rank : 4 * rank + 4], step=4))
    torch.testing.assert_close(torch.cat(halves), whole)


def test_levels_and_noise_of_the_loss_module_are_independent():
    seen = []

    def model(x: Tensor, sigma: Tensor) -> Scores:
        seen.append((x[: len(x) // 3], sigma[: len(x) // 3]))
        return Scores(x * 0, x * 0 + 1)

    n = 20_000
    ScoreMatchingLoss((0.1, 10.0))(model, torch.zeros(n, 1))
    noisy, sigma = seen[0]
    z, level = noisy[:, 0] / sigma, sigma.log()
    for feature in (z, z.square(), z.abs()):
        correlation = torch.corrcoef(torch.stack([feature, level]))[0, 1]
        assert abs(float(correlation)) < 5 / n**0.5


def test_loss_module_takes_a_fixed_alpha():
    model, batch = MLP((3,), 1), torch.randn(8, 3)
    value = ScoreMatchingLoss(0.6, alpha=0.8, seed=3)(model, batch, step=1)
    assert torch.equal(value, score_matching_loss(model, batch, 0.6, alpha=0.8, seed=3, offset=1))


def test_loss_module_resumes_from_its_state():
    model, batch = MLP((3,), 1), torch.randn(8, 3)
    one, two = ScoreMatchingLoss(schedule=VP()), ScoreMatchingLoss(schedule=VP())
    for _ in range(3):
        one(model, batch)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(model, batch), two(model, batch))


def test_loss_module_has_the_value_of_the_function():
    model, batch = MLP((3,), 1), torch.randn(8, 3)
    options = {"gamma": 2.0, "variance_reduction": False}
    value = ScoreMatchingLoss(0.4, seed=3, **options)(model, batch, step=7)
    expected = score_matching_loss(model, batch, 0.4, seed=3, offset=7, **options)
    assert torch.equal(value, expected)
    schedule = VP()
    t = schedule.sample_t(8, seed=3, offset=7, dtype=F64)
    levels = {"sigma": schedule.sigma(t).float(), "alpha": schedule.alpha(t).float()}
    value = ScoreMatchingLoss(schedule=schedule, seed=3)(model, batch, step=7)
    expected = score_matching_loss(model, batch, seed=3, offset=7, **levels)
    assert torch.equal(value, expected)


def test_levels_of_the_loss_module_are_log_uniform():
    seen = []

    def model(x: Tensor, sigma: Tensor) -> Scores:
        seen.append(sigma[: len(x) // 3])
        return Scores(x * 0, x * 0 + 1)

    ScoreMatchingLoss((0.01, 10.0))(model, torch.zeros(20_000, 1))
    place = (seen[0].log10() + 2) / 3
    assert 0 < float(place.min()) < 1e-3
    assert 1 - 1e-3 < float(place.max()) < 1
    assert abs(float(place.mean()) - 0.5) < 5 / (12 * 20_000) ** 0.5
    assert float(place.var()) == pytest.approx(1 / 12, rel=0.03)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, ValueError, "exactly one of sigma and schedule must be given, got neither"),
        (
            {"sigma": 1.0, "schedule": VP()},
            ValueError,
            "exactly one of sigma and schedule must be given, got both",
        ),
        ({"sigma": 0.0}, ValueError, "sigma must be finite and > 0, got 0"),
        (
            {"sigma": (1.0, 0.5)},
            ValueError,
            "sigma must be (low, high), low <= high, got (1.0, 0.5)",
        ),
        ({"sigma": "a"}, TypeError, "sigma must be a number, got 'a'"),
        ({"sigma": 1.0, "seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"schedule": 3}, TypeError, "schedule must be a Schedule, got int"),
        (
            {"schedule": VP(), "alpha": 0.5},
            ValueError,
            "alpha must be 1 but with a fixed sigma, got 0.5",
        ),
        (
            {"sigma": 1.0, "variance_reducton": True},
            TypeError,
            (
                "options must be of centred, detach_score, diagonal, first_order, gamma, "
                "reduction, scale_free, variance_reduction, got variance_reducton"
            ),
        ),
    ],
)
def test_loss_module_refuses(options, kind, message):
    with pytest.raises(kind) as error:
        ScoreMatchingLoss(**options)
    assert str(error.value) == f"ScoreMatchingLoss: {message}"


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_and_resumes_with_the_loss_module(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = MLP((2,), 1, width=16, head_width=16)
            self.criterion = ScoreMatchingLoss((0.1, 1.0))
            self.losses: list[float] = []

        def training_step(self, batch, index):
            loss = self.criterion(self.model, batch[0])
            self.losses.append(float(loss))
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    torch.manual_seed(1)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(64, 2)), batch_size=16
    )
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "default_root_dir": tmp_path}
    whole = Task()
    lightning.Trainer(max_epochs=2, enable_checkpointing=False, **options).fit(whole, loader)
    first = Task()
    trainer = lightning.Trainer(max_epochs=1, **options)
    trainer.fit(first, loader)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = Task()
    lightning.Trainer(max_epochs=2, enable_checkpointing=False, **options).fit(
        second, loader, ckpt_path=tmp_path / "half.ckpt"
    )
    assert first.losses + second.losses == whole.losses
    assert isinstance(whole.criterion, nn.Module)


def test_a_conditional_model_is_told_its_conditions_and_no_other_option():
    torch.manual_seed(0)
    model = MLP((2,), 1, width=8, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, label = torch.randn(3, 2), torch.tensor([0, 1, 2])
    wanted = posterior(x, model(x, 0.5, label=label), 0.5).mean
    denoiser = MeanDenoiser(model)
    torch.testing.assert_close(denoiser(x, 0.5, label=label, physics=None), wanted)
    assert not torch.equal(denoiser(x, 0.5), wanted)
    schedule = VE(0.1, 5.0)
    pytest.importorskip("azula")
    t = (schedule.t_of_sigma(0.5) - schedule.t_min) / (schedule.t_max - schedule.t_min)
    found = azula_denoiser(model, schedule)(x, torch.tensor(t), label=label)
    torch.testing.assert_close(found.mean, wanted, atol=1e-4, rtol=1e-3)
