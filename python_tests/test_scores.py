"""The words: one rule for the low-rank part in all that take one, and the checks of `checks`."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from hos_ext import (
    DPLR,
    VP,
    Scores,
    UnscaledScores,
    checks,
    diffusion,
    linalg,
    nn,
    posterior,
    sampling,
)
from hos_ext.linalg import DenseOperator, ScoreHessian
from hos_ext.losses import ScoreMatchingLoss, hermite, score_matching_loss
from hos_ext.nn import MLP, SecondOrderHead
from hos_ext.tweedie import moments_from_cumulants, posterior_covariance, second_moment

# torch itself uses what it deprecates, where forward mode begins.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

B, D, R = 3, 4, 2
X = torch.linspace(-1, 1, B * D).reshape(B, D)
C = X.abs() + 0.5
TAKERS = {
    "Scores.unscaled": lambda f, s, sigma: Scores(X, C, f, s).unscaled(sigma),
    "UnscaledScores.scaled": lambda f, s, sigma: UnscaledScores(X, C, f, s).scaled(sigma),
    "posterior": lambda f, s, sigma: posterior(X, Scores(X, C, f, s), sigma),
    "posterior_covariance": lambda f, s, sigma: posterior_covariance(C, f, sigma, sign=s),
    "second_moment": lambda f, s, sigma: second_moment(X, X, C, f, sigma, sign=s),
}


@pytest.mark.parametrize("sigma", [0.5, torch.full((B,), 0.5)], ids=["float", "row"])
@pytest.mark.parametrize("name", TAKERS)
def test_a_factor_has_the_batch_of_the_samples(name, sigma):
    """One factor for all rows is written out; the same whether sigma is one number or one a row."""
    factor = torch.ones(B, D, R)
    TAKERS[name](factor, torch.tensor([1.0, -1.0]), sigma)
    for wrong in (factor[:1], factor[0], factor[:, :, 0], factor[:, :1], factor[None]):
        rule = f"{name}: factor must have shape ({B}, {D}, r), got {tuple(wrong.shape)}"
        with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
            TAKERS[name](wrong, None, sigma)


@pytest.mark.parametrize("name", TAKERS)
def test_a_sign_is_one_for_each_column(name):
    factor = torch.ones(B, D, R)
    for wrong, rule in (
        ("abc", "sign must be a Tensor, got str"),
        (torch.ones(1), "sign must have shape (2,), got (1,)"),
        (torch.tensor([1.0, 0.5]), "sign must hold +1 and -1 only, got [1.0, 0.5]"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(f'{name}: {rule}')}$"):
            TAKERS[name](factor, wrong, 0.5)
    with pytest.raises(ValueError, match=r"sign must have shape \(0,\), got \(2,\)$"):
        TAKERS[name](None, torch.ones(2), 0.5)  # columns that are not there


def _model(x, sigma):
    return Scores(-x, torch.ones_like(x))


FLAGS = {
    "score_matching_loss": (
        lambda **k: score_matching_loss(_model, X, 0.5, noise=X, **k),
        "variance_reduction diagonal scale_free detach_score centred return_terms",
    ),
    "ScoreMatchingLoss": (
        lambda **k: ScoreMatchingLoss(0.5, **k),
        "variance_reduction diagonal scale_free detach_score centred",
    ),
    "hermite": (lambda **k: hermite(X, 2, **k), "diagonal"),
    "moments_from_cumulants": (lambda **k: moments_from_cumulants([X], **k), "central"),
    "MLP": (lambda **k: MLP((2,), 1, **k), "constrained given_score"),
    "SecondOrderHead": (
        lambda **k: SecondOrderHead(_model, MLP((2,), 1, given_score=True), **k),
        "scaled",
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_true_or_false(name):
    """The text "False" is true to Python, and an array has no truth."""
    call, flags = FLAGS[name]
    for flag in flags.split():
        for wrong in ("False", 1, None, torch.tensor([True, False])):
            with pytest.raises(TypeError, match=f"^{name}: {flag} must be True or False, got "):
                call(**{flag: wrong})


def test_a_device_is_here_and_named():
    assert checks.device_of("f", "device", "cpu") == torch.device("cpu")
    assert checks.device_of("f", "device", None) == torch.empty(0).device
    for wrong in ("cuda:77", "abc", torch.device("cuda", 77)):
        with pytest.raises(ValueError, match=r"^f: device must be a device of this machine, got '"):
            checks.device_of("f", "device", wrong)
    with pytest.raises(TypeError, match=r"^f: device must be a device or its name, got \[\]$"):
        checks.device_of("f", "device", [])


def test_errors_of_an_inner_function_are_said_by_the_outer_one():
    with pytest.raises(TypeError, match=r"^outer: n must be, got 1$") as caught:  # noqa: SIM117
        with checks.said_by("outer", "inner", shape="n"):
            raise TypeError("inner: shape must be, got 1")
    assert caught.traceback  # the place is not lost
    with pytest.raises(ValueError, match=r"^another: shape$"):  # noqa: SIM117
        with checks.said_by("outer", "inner", shape="n"):
            raise ValueError("another: shape")


def test_huge_ints_are_no_floats():
    assert checks.as_float(10**400) == float("inf")
    assert checks.as_float(-(10**400)) == -float("inf")
    for call in (checks.positive, checks.per_sample):
        with pytest.raises(ValueError, match=r"^f: sigma must be finite, got inf$"):
            call("f", "sigma", 10**400, X)


def test_meta_tensors_hold_no_values_to_check():
    with pytest.raises(ValueError, match=r"^f: sigma must .*got "):
        checks.positive("f", "sigma", torch.ones(B, device="meta"), X)
    with pytest.raises(ValueError, match=r"^DPLR: sign must "):
        DPLR(X, torch.ones(B, D, R), torch.ones(R, device="meta"))


def test_numpy_leaves_the_sum_to_the_matrix():
    """ones(3) + matrix was an array of objects, one sum for each entry."""
    matrix = DPLR(C)
    with pytest.raises(TypeError, match=r"^DPLR.__add__: other must be a float or a Tensor"):
        np.ones(3) + matrix
    assert torch.equal((np.float64(2.0) + matrix).diag, C + 2)


def test_times_are_drawn_in_floating_dtypes_alone():
    """Times between 0 and 1 cut to whole numbers were all zero."""
    with pytest.raises(ValueError, match=r"^VP.sample_t: dtype must be float32, float64, got "):
        VP().sample_t(5, seed=0, dtype=torch.int64)


def test_seeds_and_rows_are_looked_at_where_no_noise_is_drawn():
    hessian = ScoreHessian(lambda x: -x, X, symmetrize=True)
    for name, value in (("seed", "abc"), ("first", -1)):
        with pytest.raises((TypeError, ValueError), match=f"^ScoreHessian.estimate_trace: {name} "):
            hessian.estimate_trace(D, **{name: value})  # D probes are exact: none is drawn
    for name, value in (("offset", 0.5), ("first", 2.0)):
        with pytest.raises(TypeError, match=f"^score_matching_loss: {name} must be an int"):
            score_matching_loss(_model, X, 0.5, noise=X, **{name: value})


def test_views_with_the_negative_bit_are_times():
    """torch cannot make a tensor like such a view, which a conjugate's imaginary part is."""
    t = torch.complex(torch.zeros(2), torch.tensor([-0.25, -0.5])).conj().imag
    assert t.is_neg()
    assert torch.equal(VP().sigma(t), VP().sigma(t.clone()))


@pytest.mark.parametrize("index", [1.0, "a", [0], None, torch.tensor(1), torch.tensor([7])])
def test_rows_are_a_slice_or_numbers_of_rows(index):
    for matrix in (DPLR(C), DenseOperator(DPLR(C).dense()), ScoreHessian(lambda x: -x, X)):
        name = type(matrix).__name__
        with pytest.raises((TypeError, ValueError), match=f"^{name}.rows: index must "):
            matrix.rows(index)
    assert DPLR(C).rows(torch.tensor([True, False, True])).shape == (2, D, D)


META = torch.zeros(3, 4, device="meta")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampling.ess(META.unsqueeze(-1)), "ess: draws must hold values"),
        (
            lambda: linalg.dense_spectrum(torch.zeros(1, 2, 2, device="meta")),
            "dense_spectrum: matrix must hold values",
        ),
        (
            lambda: diffusion.tweedie_denoise(lambda x, s: None, META, VP(), 0.1),
            "tweedie_denoise: x must hold values",
        ),
        (
            lambda: linalg.truncated(
                torch.tensor([[torch.nan]]), torch.ones(1, 2, 1), torch.ones(1, 2)
            ),
            "truncated: values must be finite",
        ),
        (
            lambda: nn.MLP((4,), rank=1)(torch.zeros(3, 4), 1e39),
            "MLP: sigma must be finite in torch.float32",
        ),
    ],
)
def test_values_that_are_not_there_or_not_held_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()
