"""A network that is read wrongly is noticed, and how it should be read is named."""

import itertools
import re
import warnings

import pytest
import torch
from torch import nn

from hos_ext.losses import score_matching_loss
from hos_ext.nn import MLP, ModelScore, SecondOrderHead, check_model
from hos_ext.schedules import EDM, VP, Rectified, from_alphas_cumprod
from hos_ext.scores import Scores

D = 8
F64 = torch.float64
MEAN = torch.linspace(-1, 1, D, dtype=F64)
VARIANCE = torch.linspace(0.05, 1.5, D, dtype=F64).square()
TABLE = from_alphas_cumprod((1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0))
PREDICTIONS = ["score", "eps", "x0", "v", "flow", "edm"]


def best(schedule, prediction, t_of=None, sigma_data=0.5):
    """The best network of N(MEAN, VARIANCE); t_of gives t from what it takes for the time."""
    ends = [schedule.sigma(t) / schedule.alpha(t) for t in (schedule.t_min, schedule.t_max)]
    if t_of is None:
        t_of = lambda v: v  # noqa: E731
        if prediction == "edm":
            t_of = lambda c: schedule.t_of_ratio((4 * c).exp().clamp(*ends))  # noqa: E731

    def net(x_t, time):
        t = t_of(time.double()).clamp(schedule.t_min, schedule.t_max)
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        ratio = sigma / alpha
        x = x_t * (ratio.square() + sigma_data**2).sqrt() * alpha if prediction == "edm" else x_t
        score = -(x - alpha * MEAN) / (alpha.square() * VARIANCE + sigma.square())
        noise = -sigma * score
        clean = (x - sigma * noise) / alpha
        if prediction == "flow":
            beta, spread = schedule.beta(t)[:, None], schedule.diffusion(t)[:, None] ** 2
            return -beta / 2 * x - spread / 2 * score
        skip = sigma_data**2 / (ratio.square() + sigma_data**2)
        out = ratio * sigma_data * (ratio.square() + sigma_data**2).rsqrt()
        return {
            "score": score,
            "eps": noise,
            "x0": clean,
            "v": alpha * noise - sigma * clean,
            "edm": (clean - skip * x / alpha) / out,
        }[prediction]

    return net


def samples(n=256):
    generator = torch.Generator().manual_seed(0)
    return MEAN + VARIANCE.sqrt() * torch.randn(n, D, dtype=F64, generator=generator)


def checked(net, schedule, prediction, data=None, **options):
    data = samples() if data is None else data
    return check_model(ModelScore(net, schedule, prediction, **options), data)


SCHEDULES = [VP(), EDM(), TABLE, Rectified()]
NAMES = [type(s).__name__ for s in SCHEDULES]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_a_network_that_is_read_rightly_is_fine(schedule, prediction):
    """Its error is that of the exact posterior: mean of the variances of z given x."""
    found = checked(best(schedule, prediction), schedule, prediction)
    assert found.fine, found
    for sigma, error, linear in zip(found.sigmas, found.errors, found.linear, strict=True):
        exact = float((VARIANCE / (VARIANCE + sigma**2)).mean())
        assert error == pytest.approx(exact, rel=0.15)  # 5 standard errors of 2048 numbers
        spread = float(samples().var(correction=0))
        assert linear == pytest.approx(spread / (spread + sigma**2), rel=0.05)
        assert error < linear


# One of these read as the other denoises too well to be told: 15 % worse, or not worse at all.
ALIKE = {
    ("VP", "x0", "edm"),  # differs in two points, and in neither alone
    ("VP", "v", "flow"),
    ("Rectified", "v", "flow"),
}


@pytest.mark.parametrize("true", PREDICTIONS)
@pytest.mark.parametrize("schedule", [VP(), EDM(), Rectified()], ids=lambda s: type(s).__name__)
def test_a_wrong_prediction_is_named(schedule, true):
    name = type(schedule).__name__
    if name == "EDM" and true == "flow":  # there dx/dt is z: the two are one
        true = "eps"
    for claimed in PREDICTIONS:
        same = {claimed, true} in ({true}, {"eps", "flow"} if name == "EDM" else {true})
        if same or (name, true, claimed) in ALIKE:
            continue
        found = checked(best(schedule, true), schedule, claimed)
        assert f"is this prediction={true!r}" in str(found.remark), (claimed, found)


@pytest.mark.parametrize(
    ("schedule", "prediction", "t_of", "options", "named"),
    [
        (
            TABLE,
            "eps",
            lambda v: 999 * v,
            {},
            "a time in [0, 1] (call=lambda net, x, t, **kw: net(x, t / 999, **kw))",
        ),
        (VP(), "eps", lambda v: v / 1000, {}, "time='timestep'"),
        (VP(), "eps", lambda v: VP().t_of_sigma(v.clamp(0.01, 0.999978)), {}, "time='sigma'"),
        (VP(), "eps", lambda v: v, {"time": "sigma"}, "time='t'"),
        (EDM(), "x0", lambda v: (4 * v).exp(), {}, "time='c_noise'"),
        (
            EDM(),
            "x0",
            lambda v: v.exp(),
            {},
            "the time log sigma (time='c_noise', call=lambda net, x, t, **kw: net(x, 4 * t, **kw))",
        ),
        (Rectified(), "flow", lambda v: v / 1000, {}, "time='timestep'"),
    ],
)
def test_a_wrong_unit_of_time_is_named(schedule, prediction, t_of, options, named):
    found = checked(best(schedule, prediction, t_of), schedule, prediction, **options)
    assert str(found.remark).endswith(f"is this {named}?")
    for calling in re.findall(r"call=(lambda .*?\*\*kw\))", named):  # what is named, tried
        score = ModelScore(
            best(schedule, prediction, t_of),
            schedule,
            prediction,
            call=eval(calling),
            time="c_noise" if "c_noise" in named else None,
        )
        assert check_model(score, samples()).fine


def test_a_wrong_sign_and_a_time_that_runs_backwards_are_named():
    net = best(VP(), "eps")
    found = checked(lambda x, t: -net(x, t), VP(), "eps")
    turned = "the sign turned (call=lambda net, x, t, **kw: -net(x, t, **kw))"
    assert str(found.remark).endswith(f"is this {turned}?")
    flow = best(Rectified(), "flow")  # the other convention: t = 1 is the data, dx/dt = x0 - z
    found = checked(lambda x, t: -flow(x, 1 - t), Rectified(), "flow")
    assert str(found.remark).endswith(
        "is this a time that runs the other way (call=lambda net, x, t, **kw: net(x, 1 - t, **kw)) "
        f"and {turned}?"
    )


def test_a_network_of_plain_noise_is_named():
    found = checked(best(EDM(), "eps"), VP(), "eps", time="sigma")
    assert str(found.remark).endswith(
        "is this a network that is given x itself, of plain noise (schedule=EDM())?"
    )


@pytest.mark.parametrize(
    ("scale", "shift", "text"),
    [
        (0.5, 0.5, "2 x - 1, data in [-1, 1]"),
        (127.5, 127.5, "x / 127.5 - 1, data in [-1, 1]"),
    ],
)
def test_data_in_another_range_are_named(scale, shift, text):
    data = (samples() / 6).clamp(-1, 1)

    def net(x, sigma):  # of the same data: samples of N(MEAN, VARIANCE) over 6
        sigma = sigma[:, None] * 6
        return sigma * (6 * x - MEAN) / (VARIANCE + sigma.square())

    assert checked(net, EDM(), "eps", data).fine
    found = checked(net, EDM(), "eps", scale * data + shift)
    assert str(found.remark).endswith(f"is it trained on {text}?")


def test_what_is_not_trained_is_asked_after_its_training():
    found = checked(lambda x, t: 0 * x, VP(), "eps")
    assert found.errors == (1.0, 1.0)
    assert "is it trained" in found.remark
    found = checked(lambda x, t: x * float("nan"), VP(), "eps")
    assert found.remark == "gives values that are not finite at sigma 0.55"


def test_a_shape_is_looked_at_on_pure_noise():
    shape = (8, D)
    for prediction in PREDICTIONS:
        found = checked(best(VP(), prediction), VP(), prediction, shape)
        assert found.fine
        assert found.sigmas == (10.0, 30.0)
        assert found.linear is None
    found = checked(best(VP(), "eps"), VP(), "score", shape)
    assert str(found.remark).startswith("predicts worse than zero at sigma 30")
    assert str(found.remark).endswith("is this prediction='eps'?")
    for true, claimed in itertools.product(("x0", "v", "flow", "edm"), ("eps", "score")):
        found = checked(best(VP(), true), VP(), claimed, shape)
        assert "hardly denoises pure noise" in found.remark
        assert found.remark.endswith("(samples, not a shape, would tell)?")


def test_functions_that_are_held_to_be_a_score():
    eps = best(EDM(), "eps")
    assert check_model(lambda x, sigma: -eps(x, sigma), samples()).fine
    assert check_model(lambda x, sigma: Scores(-eps(x, sigma), x), samples()).fine
    for prediction in ("eps", "x0", "score"):
        found = check_model(best(EDM(), prediction), samples())
        assert str(found.remark).endswith(f"is this prediction={prediction!r}?"), found
    found = check_model(best(VP(), "eps"), samples(), schedule=VP())
    assert str(found.remark).endswith(
        "is this prediction='eps' and time='t' and a network that is given alpha x?"
    )


def test_heads_and_networks_of_ours_are_checked_as_they_stand():
    head = MLP((D,), 1, given_score=True).double()
    score = ModelScore(best(VP(), "eps"), VP(), "eps")
    assert check_model(SecondOrderHead(score, head), samples()).fine
    true = best(EDM(), "score")
    assert check_model(SecondOrderHead(true, head, scaled=False), samples()).fine
    found = check_model(SecondOrderHead(true, head), samples())
    assert str(found.remark).endswith("is this prediction='score'?")
    assert check_model(MLP((D,), 1).double(), samples()).fine  # it begins with a linear guess


def test_conditions_go_with_their_samples():
    net = best(VP(), "eps")

    def labelled(x, t, label):
        assert len(label) == len(x)
        return net(x, t) * label[:, None]

    score = ModelScore(labelled, VP(), "eps")
    ones = torch.ones(2000, dtype=F64)
    assert check_model(score, samples(2000), model_kwargs={"label": ones}).fine
    found = check_model(score, samples(2000), model_kwargs={"label": -ones})
    assert "the sign turned" in found.remark
    with pytest.raises(ValueError, match=r"^check_model: model_kwargs\['label'\] must have 256"):
        check_model(score, samples(), model_kwargs={"label": ones})


def test_a_network_keeps_its_mode_and_its_statistics():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(D).double(), nn.Dropout(0.5)

        def forward(self, x, t):
            assert not self.training
            return self.drop(self.norm(x))

    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    check_model(ModelScore(net, VP(), "eps"), samples())
    assert net.training
    assert net.drop.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_it_is_warned_of_at_construction():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelScore(best(VP(), "eps"), VP(), "eps", check=samples())
        ModelScore(best(VP(), "eps"), VP(), "eps", check=(4, D))
    message = "ModelScore: the network predicts worse than zero at sigma 2.2 (error 3.26 of the "
    with pytest.warns(
        UserWarning, match=f"^{re.escape(message)}.*is this prediction='eps'"
    ) as seen:
        ModelScore(best(VP(), "eps"), VP(), "score", check=samples())
    assert seen[0].filename == __file__
    with pytest.raises(TypeError, match=r"^ModelScore: check must be a Tensor of samples or the"):
        ModelScore(best(VP(), "eps"), VP(), "eps", check=3)


def test_levels_are_those_asked_for_or_near_the_data():
    score = ModelScore(best(EDM(), "eps"), EDM(0.3, 0.9), "eps")
    assert check_model(score, samples()).sigmas == pytest.approx((0.55, 0.9), rel=0.01)
    assert check_model(score, samples(), sigmas=(0.7, 0.4)).sigmas == (0.4, 0.7)
    assert check_model(score, (4, D)).sigmas == (0.45, 0.9)
    rule = r"^check_model: sigmas must be in \[0.3, 0.9\], the noise levels of the model, got 2"
    with pytest.raises(ValueError, match=rule):
        check_model(score, samples(), sigmas=(0.4, 2.0))
    with pytest.raises(TypeError, match=r"^check_model: sigmas must be two noise levels, got 0.4"):
        check_model(score, samples(), sigmas=0.4)
    with pytest.raises(ValueError, match=r"^check_model: schedule must be None for a model that h"):
        check_model(score, samples(), schedule=VP())


# ------------------------------------------------------------------------ heads, while they learn


def trained(score_model, steps, *, batch=64, alpha=1.0, **options):
    """What a training of a head warns of."""
    head = MLP((D,), 1, given_score=True, width=8, head_width=8).double()
    model = SecondOrderHead(score_model, head, **options)
    data = samples(batch)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(steps):
            sigma = 0.3 + torch.rand(batch, generator=torch.manual_seed(step), dtype=F64)
            score_matching_loss(model, data, sigma, alpha=alpha, seed=0, offset=step)
    assert {warning.filename for warning in seen} <= {__file__}
    return model, [str(warning.message) for warning in seen]


RAW = {
    "eps": (lambda x, sigma: best(EDM(), "eps")(x, sigma), "prediction='eps'"),
    "x0": (lambda x, sigma: best(EDM(), "x0")(x, sigma), "prediction='x0'"),
    "score": (lambda x, sigma: best(EDM(), "score")(x, sigma), "prediction='score'"),
    "random": (lambda x, sigma: torch.cos(9 * x), "1 is no guess; 512 training samples"),
}


@pytest.mark.parametrize("kind", RAW)
def test_a_head_on_what_is_no_score_is_warned_of_once(kind):
    net, named = RAW[kind]
    model, seen = trained(net, 12)
    assert len(seen) == 1
    start = "SecondOrderHead: score_model must give sigma * s1, and what it gives guesses the noise"
    assert seen[0].startswith(start)
    assert named in seen[0]
    assert model.watch.done


def test_a_head_on_a_score_is_not_warned_of():
    score = ModelScore(best(EDM(), "eps"), EDM(), "eps")
    assert trained(score, 12)[1] == []
    assert trained(best(EDM(), "score"), 12, scaled=False)[1] == []
    assert trained(score, 70, batch=8)[1] == []


def test_the_watch_looks_at_the_first_samples_alone():
    """After them a step asks for two attributes: it is not called again."""
    model, _ = trained(ModelScore(best(EDM(), "eps"), EDM(), "eps"), 7)
    assert not model.watch.done  # 448 samples of 8 numbers are not yet 4096
    calls = []
    watch = type(model.watch).__call__

    class Counted(type(model.watch)):
        def __call__(self, *arguments):
            calls.append(len(arguments[0]))
            watch(self, *arguments)

    model.watch.__class__ = Counted
    for step in range(7, 12):
        score_matching_loss(model, samples(64), 0.5, seed=0, offset=step)
    assert calls == [64]
    assert model.watch.done
    assert model.watch._seen == []


def test_the_watch_sees_through_a_wrapper():
    class Wrapped(nn.Module):  # as DistributedDataParallel
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *arguments, **options):
            return self.module(*arguments, **options)

    model, _ = trained(RAW["eps"][0], 0)
    sigma = torch.full((512,), 0.5, dtype=F64)
    with pytest.warns(UserWarning, match=r"SecondOrderHead: .*prediction='eps'"):
        score_matching_loss(Wrapped(model), samples(512), sigma, seed=0)
