"""A second-order head beside a conditional score: who is told what."""

from __future__ import annotations

import re

import pytest
import torch

from hos_ext import MLP, SecondOrderHead, save_model, score_matching_loss
from hos_ext.scores import Scores

LABEL = torch.tensor([0, 2, 1, 3])
TEXT = torch.linspace(-1, 1, 8).reshape(4, 2)


def head(**options):
    torch.manual_seed(0)
    made = MLP((2,), 1, width=8, given_score=True, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def score_model(x, sigma, *, label, text):
    return -0.3 * (x - text) + 0.1 * label.unsqueeze(1)


def test_the_score_is_told_all_and_the_head_what_it_names():
    x = torch.linspace(-1, 1, 8).reshape(4, 2)
    told = head(num_classes=3)
    model = SecondOrderHead(score_model, told)
    assert model.conditions == ("label",)
    scores = model(x, 0.5, label=LABEL, text=TEXT)
    known = score_model(x, 0.5, label=LABEL, text=TEXT)
    assert torch.equal(scores.scaled_score, known)
    assert torch.equal(scores.c, told(x, 0.5, known, label=LABEL).c)
    assert not torch.equal(scores.c, told(x, 0.5, known).c)

    plain = head()
    model = SecondOrderHead(score_model, plain)
    assert model.conditions == ()
    assert torch.equal(model(x, 0.5, label=LABEL, text=TEXT).c, plain(x, 0.5, known).c)


def test_a_head_of_ones_own_names_its_conditions():
    class Own(torch.nn.Module):
        conditions = ("text",)

        def forward(self, x, sigma, scaled_score, text):
            return Scores(scaled_score, 1 + text.square())

    scores = SecondOrderHead(score_model, Own())(torch.zeros(4, 2), 0.5, label=LABEL, text=TEXT)
    assert torch.equal(scores.c, 1 + TEXT.square())


def test_a_conditional_head_trains_and_comes_back_from_its_files(tmp_path):
    model = SecondOrderHead(score_model, head(num_classes=3))
    given = {"label": LABEL, "text": TEXT}
    x0, noise = torch.randn(4, 2), torch.randn(4, 2)
    loss = score_matching_loss(model, x0, 0.5, noise=noise, reduction="none", model_kwargs=given)
    for row in range(4):  # a row by itself has its own conditions at all three points
        at = slice(row, row + 1)
        own = {name: value[at] for name, value in given.items()}
        alone = score_matching_loss(
            model, x0[at], 0.5, noise=noise[at], reduction="none", model_kwargs=own
        )
        torch.testing.assert_close(loss[at], alone)
    loss.sum().backward()
    assert model.head.classes.weight.grad.abs().max() > 0
    save_model(model, tmp_path)
    again = SecondOrderHead.from_pretrained(tmp_path, score_model=score_model)
    assert torch.equal(again(x0, 0.5, **given).c, model(x0, 0.5, **given).c)


def test_conditions_that_do_not_fit_are_refused_by_name():
    model = SecondOrderHead(score_model, head(num_classes=3))
    message = "SecondOrderHead: model_kwargs['text'] must have 4 rows like x, got shape (3, 2)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(torch.zeros(4, 2), 0.5, label=LABEL, text=TEXT[:3])
