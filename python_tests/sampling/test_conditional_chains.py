"""Chains of conditional densities: a condition follows its chain in chunks and after rejections."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from hos_ext import sample
from hos_ext.sampling import adapt_step_size, method_names, sample_sharded, search_step_size
from hos_ext.scores import UnscaledScores

CHAINS, D = 7, 4
LABEL = torch.tensor([2, 0, 1, 1, 2, 0, 2])
MEANS = torch.linspace(-2, 2, 3 * D).reshape(3, D)
CONDITIONS = {"label": LABEL, "more": {"width": torch.linspace(0.5, 2.0, CHAINS)}, "power": 1.5}
OPTIONS = {"n_steps": 6, "burn_in": 2, "thin": 2, "seed": 5}


@pytest.fixture
def init():
    return torch.linspace(-1, 1, CHAINS * D).reshape(CHAINS, D)


def scores_of(isotropic: bool = False):
    """Scores that hang on every condition, each row by itself, with a low rank."""

    def score_fn(x: Tensor, label: Tensor, more: dict[str, Tensor], power: float) -> UnscaledScores:
        gap, width = x - MEANS[label], more["width"].unsqueeze(1)
        diag = -width.expand_as(x) if isotropic else -width - torch.sin(gap) ** 2
        factor = 0.3 * torch.stack([torch.cos(gap), torch.sin(2 * gap)], -1)
        return UnscaledScores(-power * width * gap, diag, factor, torch.tensor([1.0, -1.0]))

    return score_fn


def log_prob(x: Tensor, label: Tensor, more: dict[str, Tensor], power: float) -> Tensor:
    gap = x - MEANS[label]
    return -power * more["width"] * (gap * gap).sum(1) / 2


def assert_same(found, expected):
    assert torch.equal(found.draws, expected.draws)
    assert torch.equal(found.state["x"], expected.state["x"])
    for name, value in expected.stats.items():
        if isinstance(value, Tensor):
            assert torch.equal(found.stats[name], value), name


def row_of(kwargs, row):
    """The conditions of one chain, cut by hand."""
    at = slice(row, row + 1)
    return kwargs | {"label": kwargs["label"][at], "more": {"width": kwargs["more"]["width"][at]}}


@pytest.mark.parametrize("method", method_names())
def test_rows_of_conditions_follow_their_chains(init, method):
    score_fn = scores_of("isotropic" in method)
    options = OPTIONS | {"method": method, "step_size": torch.linspace(0.02, 0.2, CHAINS)}
    whole = sample(score_fn, init, model_kwargs=CONDITIONS, **options)
    assert_same(whole, sample(partial(score_fn, **CONDITIONS), init, **options))
    for chunk_size in (1, 3, 7):
        cut = sample(score_fn, init, model_kwargs=CONDITIONS, chunk_size=chunk_size, **options)
        assert_same(cut, whole)
    # A chain by itself, with its own row bound by hand.
    for row in (0, 4):
        own = partial(score_fn, **row_of(CONDITIONS, row))
        h = options["step_size"][row : row + 1]
        alone = sample(own, init[row : row + 1], **options | {"step_size": h, "first_chain": row})
        assert torch.equal(alone.draws[0], whole.draws[row])


def test_log_prob_has_the_conditions_of_its_chains_and_some_are_rejected(init):
    score_fn = scores_of()
    options = OPTIONS | {"method": "mala", "step_size": 0.5, "n_steps": 40}
    whole = sample(score_fn, init, log_prob=log_prob, model_kwargs=CONDITIONS, **options)
    assert 0.05 < whole.stats["acceptance"].min() < whole.stats["acceptance"].max() < 1
    bound = [partial(each, **CONDITIONS) for each in (score_fn, log_prob)]
    assert_same(whole, sample(bound[0], init, log_prob=bound[1], **options))
    cut = sample(
        score_fn, init, log_prob=log_prob, model_kwargs=CONDITIONS, chunk_size=2, **options
    )
    assert_same(cut, whole)


def test_a_resumed_run_takes_its_conditions_again(init):
    score_fn, options = scores_of(), {"step_size": 0.1, "model_kwargs": CONDITIONS}
    whole = sample(score_fn, init, n_steps=9, seed=3, **options)
    first = sample(score_fn, init, n_steps=4, seed=3, **options)
    rest = sample(score_fn, state=first.state, n_steps=5, chunk_size=3, **options)
    assert torch.equal(torch.cat([first.draws, rest.draws], 1), whole.draws)


def test_step_sizes_are_searched_and_adapted_under_conditions(init):
    score_fn, bound = scores_of(), partial(scores_of(), **CONDITIONS)
    options = {"n_steps": 20, "seed": 1}
    for cut in ({}, {"chunk_size": 2}):
        found = search_step_size(
            score_fn, init, [0.05, 0.5], model_kwargs=CONDITIONS, **options, **cut
        )
        wanted = search_step_size(bound, init, [0.05, 0.5], **options)
        assert (found.step_size, found.rates) == (wanted.step_size, wanted.rates)
    options |= {"method": "mala", "step_size": 0.3}
    given = adapt_step_size(score_fn, init, log_prob=log_prob, model_kwargs=CONDITIONS, **options)
    wanted = adapt_step_size(bound, init, log_prob=partial(log_prob, **CONDITIONS), **options)
    assert given.step_sizes == wanted.step_sizes
    assert torch.equal(given.state["x"], wanted.state["x"])


def test_chains_keep_to_the_mean_of_their_class():
    label = torch.arange(3).repeat(200)

    def score_fn(x, label):
        return MEANS[label] - x

    options = {"step_size": 0.5, "n_steps": 30, "thin": 30, "seed": 2, "chunk_size": 7}
    chains = sample(score_fn, torch.zeros(600, D), model_kwargs={"label": label}, **options)
    for k in range(3):
        mean = chains.draws[label == k].mean((0, 1))
        assert (mean - MEANS[k]).abs().max() < 5 * (4 / 3 / 200) ** 0.5


@pytest.mark.parametrize("run", [sample, sample_sharded, search_step_size, adapt_step_size])
def test_conditions_of_another_length_are_refused_by_name(init, run):
    options = {"n_steps": 9} | ({} if run is search_step_size else {"step_size": 0.1})
    args = [init, [0.1]] if run is search_step_size else [init]
    if run is adapt_step_size:
        options["method"] = "mala"
    where = "adapt_step_size" if run is adapt_step_size else "sample"
    where = "search_step_size" if run is search_step_size else where
    short = {"label": LABEL, "more": {"width": torch.ones(3)}, "power": 1.0}
    rule = f"{where}: model_kwargs['more']['width'] must have 7 rows like init, got shape (3,)"
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        run(scores_of(), *args, model_kwargs=short, **options)
    with pytest.raises(TypeError, match=r"must be a Tensor \(torch\.from_numpy\)"):
        run(scores_of(), *args, model_kwargs={"label": np.zeros(7)}, **options)
