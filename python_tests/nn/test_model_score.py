"""Networks of every kind as scores, exact where the network is the best one of a known law."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hos_ext.densities import GaussianMixture
from hos_ext.linalg import ScoreHessian
from hos_ext.losses import score_matching_loss
from hos_ext.nn import MLP, ModelScore, SecondOrderHead
from hos_ext.schedules import EDM, VE, VP, CosineVP, Rectified, SubVP, from_alphas_cumprod

# torch's own use of torch.jit, at the first forward derivative of a process.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

D, B = 3, 5
F64 = torch.float64
TABLE = from_alphas_cumprod((1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0))
SCHEDULES = [EDM(), VE(), VP(), SubVP(), CosineVP(), TABLE, Rectified()]
PREDICTIONS = ["score", "eps", "x0", "v", "flow", "edm"]


def law():
    """Two Gaussians."""
    generator = torch.Generator().manual_seed(1)
    roots = torch.randn(2, D, D, dtype=F64, generator=generator)
    covariances = 0.3 * roots @ roots.mT + 0.1 * torch.eye(D, dtype=F64)
    means = torch.tensor([[1.0, -1.0, 0.5], [-1.5, 0.5, 0.0]], dtype=F64)
    return GaussianMixture(torch.tensor([0.3, 0.7], dtype=F64), means, covariances)


def exact(x, sigma):
    """sigma s1 of the law under plain noise, row by row where sigma is a tensor."""
    if isinstance(sigma, float):
        return sigma * law().noisy(sigma).score(x)
    rows = [s * law().noisy(s).score(row[None]) for row, s in zip(x, sigma.tolist(), strict=True)]
    return torch.cat(rows)


def derivative(function, t, h=1e-5):
    """Of a schedule's alpha or sigma: central differences, one Richardson step."""
    wide, narrow = ((function(t + k) - function(t - k)) / (2 * k) for k in (h, h / 2))
    return (4 * narrow - wide) / 3


def best(schedule, prediction, t_of, *, sigma_data=0.5):
    """The best network of the law, written from what each prediction is defined as.

    t_of gives t from what the network takes for the time.
    """

    def net(x_t, time):
        rows = []
        for row, value in zip(x_t, time.tolist(), strict=True):
            t = t_of(value)
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            ratio, x = sigma / alpha, row[None]
            if prediction == "edm":
                x = x * math.sqrt(ratio**2 + sigma_data**2) * alpha  # what it was scaled from
            score = law().noisy(sigma, alpha).score(x)
            clean = law().posterior_mean(x, sigma, alpha)
            noise = (x - alpha * clean) / sigma
            if prediction == "flow":
                ends = [derivative(f, t) for f in (schedule.alpha, schedule.sigma)]
                rows.append(ends[0] * clean + ends[1] * noise)
                continue
            skip = sigma_data**2 / (ratio**2 + sigma_data**2)
            out = ratio * sigma_data / math.sqrt(ratio**2 + sigma_data**2)
            value = {
                "score": score,
                "eps": noise,
                "x0": clean,
                "v": alpha * noise - sigma * clean,
                "edm": (clean - skip * x / alpha) / out,
            }
            rows.append(value[prediction])
        return torch.cat(rows)

    return net


def samples(sigma):
    z = torch.randn(B, D, dtype=F64, generator=torch.Generator().manual_seed(2))
    scale = sigma if isinstance(sigma, float) else sigma[:, None]
    return law().sample(B, seed=3) + scale * z


def exactly(message):
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_every_prediction_along_every_schedule_gives_the_exact_scaled_score(schedule, prediction):
    inverse = (lambda c: schedule.t_of_ratio(math.exp(4 * c))) if prediction == "edm" else float
    score = ModelScore(best(schedule, prediction, inverse), schedule, prediction)
    tolerance = 1e-6 if prediction == "flow" else 1e-10  # of the differences in `derivative`
    for sigma in (0.02, 0.7, 20.0, torch.tensor([0.05, 0.3, 1.0, 4.0, 30.0], dtype=F64)):
        x = samples(sigma)
        torch.testing.assert_close(score(x, sigma), exact(x, sigma), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("schedule", "time", "t_of", "options"),
    [
        (VP(), "sigma", VP().t_of_sigma, {}),
        (EDM(), "sigma", float, {}),
        (VP(), "timestep", lambda v: v / 1000, {}),
        (VP(), "timestep", lambda v: v / 999, {"num_timesteps": 999}),
        (TABLE, "timestep", float, {}),
        (Rectified(), "timestep", lambda v: v / 1000, {}),
        (VP(), "c_noise", lambda v: VP().t_of_ratio(math.exp(4 * v)), {}),
    ],
)
def test_every_unit_of_time(schedule, time, t_of, options):
    score = ModelScore(best(schedule, "eps", t_of), schedule, "eps", time=time, **options)
    for sigma in (0.05, 1.0, 3.0):
        x = samples(sigma)
        # sigma(t) of VP is flat where it comes to 1: the time it tells is less exact there.
        torch.testing.assert_close(score(x, sigma), exact(x, sigma), rtol=1e-9, atol=1e-10)


def test_sigma_data_is_that_of_the_preconditioning():
    net = best(EDM(), "edm", lambda c: math.exp(4 * c), sigma_data=1.3)
    score = ModelScore(net, EDM(), "edm", sigma_data=1.3)
    x = samples(0.7)
    torch.testing.assert_close(score(x, 0.7), exact(x, 0.7), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_its_jacobian_is_that_of_the_exact_score(prediction):
    inverse = (lambda c: VP().t_of_ratio(math.exp(4 * c))) if prediction == "edm" else float
    score = ModelScore(best(VP(), prediction, inverse), VP(), prediction)
    sigma = 0.6
    x = samples(sigma)
    jacobian = torch.func.jacrev(lambda x: score(x, sigma).sum(0))(x).movedim(1, 0)
    expected = sigma * law().noisy(sigma).hessian(x)
    torch.testing.assert_close(jacobian, expected, rtol=1e-6, atol=1e-6)


def net_of_noise(x_t, t):
    """The best one of N(0, I)."""
    return VP().sigma(t).reshape(-1, *[1] * (x_t.dim() - 1)) * x_t


def test_answers_of_every_kind_are_read():
    x = torch.randn(4, 2, 3)
    answers = {
        "tensor": lambda y: y,
        "sample": lambda y: SimpleNamespace(sample=y),
        "tuple": lambda y: (y, "more"),
        "variance": lambda y: torch.cat([y, y + 7], 1),
        "sample with variance": lambda y: SimpleNamespace(sample=torch.cat([y, y + 7], 1)),
    }
    expected = -0.5 * x / 1.25
    for answer in answers.values():
        score = ModelScore(lambda x, t, answer=answer: answer(net_of_noise(x, t)), VP(), "eps")
        torch.testing.assert_close(score(x, 0.5), expected)


class Transformer(nn.Module):
    """With the signature that diffusers' transformers have."""

    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None):
        assert timestep.shape == hidden_states.shape[:1]
        return SimpleNamespace(sample=net_of_noise(hidden_states, timestep) + encoder_hidden_states)


def test_a_timestep_is_given_by_name_and_conditions_go_along():
    score = ModelScore(Transformer(), VP(), "eps")
    x, text = torch.randn(4, 3), torch.randn(4, 3)
    value = score(x, 0.5, encoder_hidden_states=text)
    torch.testing.assert_close(value, -0.5 * x / 1.25 - text)
    message = "ModelScore: model_kwargs['encoder_hidden_states'] must have 4 rows like x"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        score(x, 0.5, encoder_hidden_states=text[:3])


def test_call_says_how_a_network_is_called():
    def net(time, label, picture):
        return -label[:, None] * net_of_noise(picture, 1 - time)

    def call(net, x_t, time, *, label):
        return -net(1 - time, label, x_t)

    score = ModelScore(net, VP(), "eps", call=call)
    x = torch.randn(4, 3)
    expected = -0.5 * x / 1.25
    torch.testing.assert_close(score(x, 0.5, label=torch.ones(4)), expected)
    torch.testing.assert_close(score(x, 0.5, label=torch.full((4,), 2.0)), 2 * expected)


class Narrow(nn.Module):
    """A network of float32 that says in which dtypes it was called."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x, t):
        self.seen += [x.dtype, t.dtype]
        return self.scale * net_of_noise(x, t)


def test_a_network_works_in_its_own_dtype():
    net = Narrow()
    score = ModelScore(net, VP(), "eps")
    x = torch.randn(4, 3, dtype=F64)
    value = score(x, 0.5)
    assert value.dtype == F64
    assert set(net.seen) == {torch.float32}
    torch.testing.assert_close(value, -0.5 * x / 1.25, rtol=1e-6, atol=1e-6)


def test_a_head_learns_on_it_and_its_hessian_is_taken():
    score = ModelScore(net_of_noise, VP(), "eps")
    model = SecondOrderHead(score, MLP((3,), 1, given_score=True))
    loss = score_matching_loss(model, torch.randn(8, 3), torch.rand(8) + 0.1, seed=0)
    loss.backward()
    assert all(p.grad is not None for p in model.head.parameters())
    x = torch.randn(4, 3, dtype=F64)
    hessian = ScoreHessian(lambda x: score(x, 0.5) / 0.5, x, symmetrize=True)
    expected = -torch.eye(3, dtype=F64).expand(4, 3, 3) / 1.25
    torch.testing.assert_close(hessian.dense(), expected)


def test_the_network_is_its_submodule_and_shows():
    net = Narrow()
    score = ModelScore(net, VP(), "eps")
    assert dict(score.named_parameters()) == {"net.scale": net.scale}
    assert score.sigma_range == pytest.approx((VP().sigma(1e-3) / VP().alpha(1e-3), 152.2), rel=0.1)
    assert "'eps', time='t', VP(beta_min=0.1" in repr(score)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((3, VP(), "eps"), {}, TypeError, "net must be callable, got int"),
        ((Narrow(), 3, "eps"), {}, TypeError, "schedule must be a Schedule, got int"),
        (
            (Narrow(), VP(), "epsilon"),
            {},
            ValueError,
            ("prediction must be one of 'score', 'eps', 'x0', 'v', 'flow', 'edm', got 'epsilon'"),
        ),
        (
            (Narrow(), VP(), "eps"),
            {"time": "step"},
            ValueError,
            "time must be one of 't', 'sigma', 'timestep', 'c_noise', got 'step'",
        ),
        ((Narrow(), VP(), "eps"), {"call": 3}, TypeError, "call must be callable, got int"),
        (
            (Narrow(), VP(), "eps"),
            {"num_timesteps": 10},
            ValueError,
            "num_timesteps must be None but for time='timestep' without a table, got 10.0",
        ),
        (
            (Narrow(), TABLE, "eps"),
            {"time": "timestep", "num_timesteps": 10},
            ValueError,
            "num_timesteps must be None but for time='timestep' without a table, got 10.0",
        ),
        (
            (Narrow(), VP(), "eps"),
            {"sigma_data": 0.5},
            ValueError,
            "sigma_data must be None but for prediction='edm', got 0.5",
        ),
        (
            (Narrow(), EDM(), "eps"),
            {"time": "timestep"},
            ValueError,
            (
                "time must not be 'timestep' with a schedule whose times pass 1 and are no table, "
                "got EDM(sigma_min=0.002, sigma_max=80.0, rho=7.0, p_mean=-1.2, p_std=1.2)"
            ),
        ),
        (
            (nn.Linear(3, 3).half(), VP(), "eps"),
            {},
            ValueError,
            "net must be float32 or float64, got torch.float16",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, options, kind, message):
    with pytest.raises(kind, match=exactly(f"ModelScore: {message}")):
        ModelScore(*arguments, **options)


def test_samples_levels_and_answers_that_do_not_fit_are_named():
    x = torch.randn(4, 3)
    score = ModelScore(lambda x, t: x, VE(0.01, 50.0), "eps")
    rule = "ModelScore: sigma must be in [0.01, 50], the noise levels of the schedule, got"
    for sigma, got in ((0.009, "0.009"), (51, "51"), (torch.tensor([1.0, 2, 60, 3]), "60")):
        with pytest.raises(ValueError, match=exactly(f"{rule} {got}")):
            score(x, sigma)
    for sigma in (0.01, 50.0, torch.full((4,), 50.0)):  # the ends themselves
        assert score(x, sigma).isfinite().all()
    with pytest.raises(ValueError, match=exactly("ModelScore: sigma must be positive, got 0.0")):
        score(x, 0)
    with pytest.raises(TypeError, match=exactly("ModelScore: x must be a Tensor, got list")):
        score([1.0], 0.5)
    rule = "ModelScore: net must return"
    for answer, kind, message in (
        (lambda x, t: x[:, :2], ValueError, "shape (4, 3), got (4, 2)"),
        (
            lambda x, t: None,
            TypeError,
            ("a floating Tensor, an object with one as 'sample', or a tuple of it, got NoneType"),
        ),
        (
            lambda x, t: x.long(),
            TypeError,
            (
                "a floating Tensor, an object with one as 'sample', or a tuple of it, "
                "got torch.int64"
            ),
        ),
    ):
        with pytest.raises(kind, match=exactly(f"{rule} {message}")):
            ModelScore(answer, VP(), "eps")(x, 0.5)
    message = "a floating Tensor, an object with one as 'sample', or a tuple of it, got Scores"
    with pytest.raises(TypeError, match=exactly(f"{rule} {message}")):
        ModelScore(MLP((3,), 1), VP(), "eps")(x, 0.5)


def test_a_signature_of_its_own_asks_for_call_and_its_own_errors_pass():
    def net(x, t, label):
        return x

    def broken(x, t):
        raise TypeError("of its own")

    x = torch.randn(4, 3)
    message = (
        "ModelScore: net must take (x, time, text): more goes by name, or call tells how, got: "
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        ModelScore(net, VP(), "eps")(x, 0.5, text=torch.zeros(4))
    with pytest.raises(TypeError, match=exactly("of its own")):
        ModelScore(broken, VP(), "eps")(x, 0.5)


def test_another_device_than_the_networks_is_named():
    score = ModelScore(Narrow(), VP(), "eps")
    message = "ModelScore: x must be on cpu like the network, got meta"
    with pytest.raises(ValueError, match=exactly(message)):
        score.output(torch.zeros(2, 3, device="meta"), torch.tensor(0.5), {})
