"""Networks and losses with a condition: class labels, and any `model_kwargs`."""

from __future__ import annotations

import pytest
import torch

import hos_ext
from hos_ext import MLP, ScoreMatchingLoss, Scores, UNet, score_matching_loss

OBJECTIVES = [
    {"variance_reduction": True, "centred": False},
    {"variance_reduction": False, "centred": False, "first_order": "plain"},
    {"variance_reduction": False, "centred": True},
    {"variance_reduction": True, "centred": True},
]


def networks(**options):
    torch.manual_seed(0)
    yield MLP((2, 2), 2, width=16, head_width=8, depth=2, num_classes=3, **options)
    yield MLP((2, 2), 1, width=16, depth=2, trunk="shared", num_classes=3, **options)
    yield UNet((1, 4, 4), 1, channels=(8, 8), norm_num_groups=4, num_classes=3, **options)


def stirred(model):
    """Heads that start at zero would hide what the body was told."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("index", range(3))
def test_the_label_reaches_every_head(index):
    model = stirred(list(networks())[index])
    assert model.conditions == ("label",)
    x = torch.randn(1, *model.dims).expand(4, *model.dims).clone()
    scores = model(x, 0.5, label=torch.arange(4))
    for value in (scores.scaled_score, scores.c, scores.factor):
        rows = value.flatten(1)
        gaps = (rows.unsqueeze(0) - rows.unsqueeze(1)).abs().amax(-1)
        assert gaps[~torch.eye(4, dtype=torch.bool)].min() > 1e-4
    # None is the last class, "no class".
    unlabelled = model(x, 0.5)
    torch.testing.assert_close(unlabelled.scaled_score[0], scores.scaled_score[3])


@pytest.mark.parametrize("index", range(3))
def test_a_conditional_model_comes_back_from_its_files(index, tmp_path):
    model = stirred(list(networks())[index]).eval()
    hos_ext.save_model(model, tmp_path)
    again, config = hos_ext.load_model(tmp_path)
    assert config["num_classes"] == again.num_classes == 3
    x, label = torch.randn(3, *model.dims), torch.tensor([0, 2, 3])
    assert torch.equal(model(x, 0.5, label=label).c, again(x, 0.5, label=label).c)


def test_an_unconditional_model_has_the_parameters_it_had():
    torch.manual_seed(0)
    plain = MLP((2,), 1, width=8)
    torch.manual_seed(0)
    told = MLP((2,), 1, width=8, num_classes=None)
    assert plain.conditions == ()
    assert [name for name, _ in plain.named_parameters() if "classes" in name] == []
    assert all(map(torch.equal, plain.parameters(), told.parameters()))


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        (torch.tensor([0, 4]), ValueError, r"label must be in \[0, 3\] \(3 is no class\), got 4"),
        (torch.tensor([0, -1]), ValueError, r"label must be in \[0, 3\]"),
        (torch.tensor([0.0, 1.0]), ValueError, "label must be int64 of shape"),
        (torch.tensor([0]), ValueError, "label must be int64 of shape"),
        (torch.tensor(0), ValueError, "label must be int64 of shape"),
        ([0, 1], TypeError, "label must be a Tensor, got list"),
        (
            torch.zeros(2, dtype=torch.int64, device="meta"),
            ValueError,
            "label must be on the device",
        ),
    ],
)
def test_labels_that_do_not_fit_are_named(label, error, message):
    model = MLP((2,), 0, width=4, num_classes=3)
    with pytest.raises(error, match=f"MLP: {message}"):
        model(torch.zeros(2, 2), 0.5, label=label)


def test_a_label_for_a_model_without_classes_is_refused():
    with pytest.raises(ValueError, match=r"label must be None \(the model has no num_classes\)"):
        MLP((2,), 0)(torch.zeros(2, 2), 0.5, label=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        MLP((2,), 0, num_classes=0)


@pytest.mark.parametrize("options", OBJECTIVES)
@pytest.mark.parametrize("per_row", [True, False])
def test_the_loss_of_a_conditional_model_is_that_of_each_condition(options, per_row):
    """Row by row, with its label bound, the model is one without a condition."""
    model = stirred(MLP((3,), 2, width=16, head_width=8, num_classes=3)).double()
    x0, noise = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    label = torch.tensor([2, 0, 3, 1])
    sigma = torch.tensor([0.3, 0.5, 0.7, 0.4], dtype=torch.float64) if per_row else 0.4
    together = score_matching_loss(
        model, x0, sigma, noise=noise, reduction="none", model_kwargs={"label": label}, **options
    )
    for i in range(4):

        def bound(x, level, i=i):
            return model(x, level, label=label[i].expand(len(x)))

        alone = score_matching_loss(
            bound,
            x0[i : i + 1],
            sigma[i : i + 1] if per_row else sigma,
            noise=noise[i : i + 1],
            reduction="none",
            **options,
        )
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("options", OBJECTIVES)
def test_the_minimiser_of_a_conditional_loss_is_the_posterior_of_its_class(options):
    """Two classes of data, N(-1, 1/4) and N(2, 1): each learns its own score and kappa."""
    mean, variance = torch.tensor([-1.0, 2.0]).double(), torch.tensor([0.25, 1.0]).double()
    weights = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)  # class -> slope, shift, c
    sigma = 0.5

    def model(x, level, *, label):
        slope, shift, c = weights[label].T.unsqueeze(-1)
        return Scores(slope * x + shift, c.expand_as(x))

    label = torch.arange(20_000) % 2
    torch.manual_seed(0)
    x0 = (mean[label] + variance[label].sqrt() * torch.randn(20_000).double()).unsqueeze(1)
    for _ in range(12):  # the loss is a quadratic of c given the score: Newton by L-BFGS
        optimiser = torch.optim.LBFGS([weights], max_iter=20, line_search_fn="strong_wolfe")

        def closure(optimiser=optimiser):
            optimiser.zero_grad()
            loss = score_matching_loss(
                model, x0, sigma, seed=0, model_kwargs={"label": label}, diagonal=True, **options
            )
            loss.backward()
            return loss

        optimiser.step(closure)
    total = variance + sigma**2
    found = weights.detach()
    torch.testing.assert_close(found[:, 0], -sigma / total, atol=0.02, rtol=0)
    torch.testing.assert_close(found[:, 1], sigma * mean / total, atol=0.03, rtol=0)
    torch.testing.assert_close(found[:, 2], variance / total, atol=0.05, rtol=0)


def test_the_module_hands_conditions_on():
    model = stirred(MLP((2,), 1, width=8, num_classes=2))
    x0, label = torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    criterion = ScoreMatchingLoss(0.5, seed=3)
    found = criterion(model, x0, step=4, model_kwargs={"label": label})
    wanted = score_matching_loss(model, x0, 0.5, seed=3, offset=4, model_kwargs={"label": label})
    assert torch.equal(found, wanted)
    assert not torch.equal(found, criterion(model, x0, step=4))


def test_conditions_of_another_length_are_refused():
    model = MLP((2,), 0, num_classes=2)
    with pytest.raises(
        ValueError, match=r"score_matching_loss: model_kwargs\['label'\] must have 3"
    ):
        score_matching_loss(
            model, torch.zeros(3, 2), 0.5, model_kwargs={"label": torch.tensor([0, 1])}
        )


def test_a_conditional_loss_compiles_and_checkpoints():
    model = stirred(MLP((2,), 1, width=8, num_classes=2))
    x0, label = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])

    def loss(x0, label):
        return score_matching_loss(model, x0, 0.5, seed=0, model_kwargs={"label": label})

    plain = loss(x0, label)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x0, label), plain)
    grads = torch.autograd.grad(plain, list(model.parameters()))
    model.gradient_checkpointing = True
    again = torch.autograd.grad(loss(x0, label), list(model.parameters()))
    assert all(map(torch.equal, grads, again))


def test_groups_of_one_channel_hide_the_class_and_are_said():
    with pytest.warns(UserWarning, match="two channels or more, got 8 groups for channels") as said:
        blind = UNet((1, 4, 4), 0, channels=(8, 8), num_classes=3)
    assert said[0].filename == __file__
    x = torch.randn(1, 1, 4, 4).expand(2, 1, 4, 4)
    scores = stirred(blind)(x, 0.5, label=torch.tensor([0, 1]))
    torch.testing.assert_close(scores.c[0], scores.c[1])
