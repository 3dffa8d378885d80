"""Conversions of both orders against exact mixtures, their denoisers and autodiff Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hos_ext.densities.gaussian import GaussianMixture
from hos_ext.linalg import DPLR, ScoreHessian
from hos_ext.tweedie import conversions
from hos_ext.tweedie.conversions import hessian_from_jacobian, jacobian_from_hessian

F64 = torch.float64
B, DIMS, D = 3, (2, 2), 4
PREDICTIONS = ("x0", "eps", "v", "edm")
# sigma and alpha: one for all samples, one for each, one of each kind.
LEVELS: list[tuple[float | Tensor, float | Tensor]] = [
    (0.7, 0.8),
    (torch.tensor([0.3, 0.9, 2.0], dtype=F64), torch.tensor([1.1, 0.4, 0.9], dtype=F64)),
    (torch.tensor(0.5, dtype=F64), torch.tensor([1.0, 0.6, 3.0], dtype=F64)),
]


class Exact(NamedTuple):
    """One noisy sample of a mixture with what is known about it; matrices are (D, D)."""

    x: Tensor  # (D,)
    score: Tensor
    hessian: Tensor
    covariance: Tensor  # of x0 given x
    values: dict[str, Tensor]
    jacobians: dict[str, Tensor]


def mixture() -> GaussianMixture:
    generator = torch.Generator().manual_seed(5)
    means = 2 * torch.randn(3, D, generator=generator, dtype=F64)
    root = torch.randn(3, D, D, generator=generator, dtype=F64) / 2
    covariances = root @ root.mT + 0.3 * torch.eye(D, dtype=F64)
    return GaussianMixture(torch.tensor([0.2, 0.5, 0.3], dtype=F64), means, covariances)


def exact(law: GaussianMixture, x: Tensor, sigma: float, alpha: float) -> Exact:
    """The predictions from their definitions by E[x0 | x]; the Jacobians from them by autodiff."""

    def x0(x: Tensor) -> Tensor:
        return law.posterior_mean(x[None], sigma, alpha)[0]

    def eps(x: Tensor) -> Tensor:
        return (x - alpha * x0(x)) / sigma

    def v(x: Tensor) -> Tensor:
        return alpha * eps(x) - sigma * x0(x)

    def edm(y: Tensor) -> Tensor:
        return law.posterior_mean(y[None], sigma / alpha)[0]

    points = {"x0": x, "eps": x, "v": x, "edm": x / alpha}
    functions = {"x0": x0, "eps": eps, "v": v, "edm": edm}
    noisy = law.noisy(sigma, alpha)
    return Exact(
        x,
        noisy.score(x[None])[0],
        noisy.hessian(x[None])[0],
        law.posterior_covariance(x[None], sigma, alpha)[0],
        {name: f(points[name]) for name, f in functions.items()},
        {name: torch.func.jacrev(f)(points[name]) for name, f in functions.items()},
    )


def batch(sigma: float | Tensor, alpha: float | Tensor) -> list[Exact]:
    law = mixture()
    sigmas, alphas = (torch.as_tensor(a, dtype=F64).expand(B).tolist() for a in (sigma, alpha))
    clean = law.sample(B, seed=1)
    noise = torch.randn(B, D, generator=torch.Generator().manual_seed(2), dtype=F64)
    rows = zip(clean, noise, sigmas, alphas, strict=True)
    return [exact(law, a * x + s * z, s, a) for x, z, s, a in rows]


def images(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows).reshape(B, *DIMS)


def random_dplr(seed: int = 0, *, size: int = D, rank: int = 3) -> DPLR:
    generator = torch.Generator().manual_seed(seed)
    diag = torch.randn(B, size, generator=generator, dtype=F64)
    factor = torch.randn(B, size, rank, generator=generator, dtype=F64)
    return DPLR(diag, factor, torch.tensor([1.0, -1.0, 1.0])[:rank])


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------- first order


@pytest.mark.parametrize(("sigma", "alpha"), LEVELS)
def test_predictions_of_a_mixture_convert_to_its_score(
    sigma: float | Tensor, alpha: float | Tensor
) -> None:
    rows = batch(sigma, alpha)
    x, score = images([row.x for row in rows]), images([row.score for row in rows])
    x0, eps, v, edm = (images([row.values[name] for row in rows]) for name in PREDICTIONS)
    close(conversions.score_from_x0(x, x0, sigma, alpha), score)
    close(conversions.score_from_x0(x, edm, sigma, alpha), score)
    close(conversions.score_from_eps(eps, sigma), score)
    close(conversions.score_from_v(x, v, sigma, alpha), score)
    close(conversions.x0_from_score(x, score, sigma, alpha), x0)
    close(conversions.eps_from_score(score, sigma), eps)
    close(conversions.v_from_score(x, score, sigma, alpha), v)


@pytest.mark.parametrize("level", [(0.01, 1.0), (0.6, 0.8), (80.0, 1.0), (0.999, 0.0447)])
def test_first_order_conversions_round_trip(level: tuple[float, float]) -> None:
    sigma, alpha = level
    x, score = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    trips = (
        conversions.score_from_eps(conversions.eps_from_score(score, sigma), sigma),
        conversions.score_from_x0(
            x, conversions.x0_from_score(x, score, sigma, alpha), sigma, alpha
        ),
        conversions.score_from_v(x, conversions.v_from_score(x, score, sigma, alpha), sigma, alpha),
    )
    for back in trips:
        close(back, score)


# ------------------------------------------------------------------------------- second order


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sigma", "alpha"), LEVELS)
def test_jacobians_by_autodiff_convert_to_the_hessian_of_a_mixture(
    sigma: float | Tensor, alpha: float | Tensor, prediction: str
) -> None:
    rows = batch(sigma, alpha)
    jacobian = torch.stack([row.jacobians[prediction] for row in rows])
    hessian = torch.stack([row.hessian for row in rows])
    close(hessian_from_jacobian(jacobian, sigma, alpha, prediction=prediction), hessian)
    close(jacobian_from_hessian(hessian, sigma, alpha, prediction=prediction), jacobian)
    shaped = (B, *DIMS, *DIMS)
    flat = hessian_from_jacobian(jacobian.reshape(shaped), sigma, alpha, prediction=prediction)
    close(flat, hessian)
    flat = jacobian_from_hessian(hessian.reshape(shaped), sigma, alpha, prediction=prediction)
    close(flat, jacobian)


def test_the_default_is_the_denoiser_whose_jacobian_is_the_posterior_covariance() -> None:
    sigma, alpha = 0.7, 0.8
    rows = batch(sigma, alpha)
    hessian = torch.stack([row.hessian for row in rows])
    covariance = torch.stack([row.covariance for row in rows])
    close(jacobian_from_hessian(hessian, sigma, alpha), alpha * covariance / sigma**2)
    close(hessian_from_jacobian(alpha * covariance / sigma**2, sigma, alpha), hessian)


def test_edm_in_its_own_variables_gives_the_hessian_in_y() -> None:
    """log p(y) = log p(x) + const with y = x / alpha, so that its Hessian is alpha^2 s2."""
    sigma, alpha = 0.7, 0.8
    rows = batch(sigma, alpha)
    jacobian = torch.stack([row.jacobians["edm"] for row in rows])
    hessian = torch.stack([row.hessian for row in rows])
    for prediction in ("edm", "x0"):
        own = hessian_from_jacobian(jacobian, sigma / alpha, prediction=prediction)
        close(own, alpha**2 * hessian)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sigma", "alpha"), LEVELS)
def test_dplr_matrices_convert_as_dense_ones_do(
    sigma: float | Tensor, alpha: float | Tensor, prediction: str
) -> None:
    matrix = random_dplr()
    for convert in (hessian_from_jacobian, jacobian_from_hessian):
        got = convert(matrix, sigma, alpha, prediction=prediction)
        assert isinstance(got, DPLR)
        assert got.rank == matrix.rank
        close(got.dense(), convert(matrix.dense(), sigma, alpha, prediction=prediction))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("sigma", "alpha"), [*LEVELS, (0.01, 1.0), (80.0, 1.0), (0.999, 0.0447), (0.0447, 0.999)]
)
def test_second_order_conversions_round_trip(
    sigma: float | Tensor, alpha: float | Tensor, prediction: str
) -> None:
    hessian = random_dplr()
    there = jacobian_from_hessian(hessian, sigma, alpha, prediction=prediction)
    back = hessian_from_jacobian(there, sigma, alpha, prediction=prediction)
    for got, want in ((back.diag, hessian.diag), (back.factor, hessian.factor)):
        close(got, want)
    assert back.sign is not None
    assert hessian.sign is not None
    assert back.sign.tolist() == hessian.sign.tolist()
    dense = hessian.dense()
    there_dense = jacobian_from_hessian(dense, sigma, alpha, prediction=prediction)
    close(hessian_from_jacobian(there_dense, sigma, alpha, prediction=prediction), dense)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_diagonal_is_a_dplr_of_rank_zero(prediction: str) -> None:
    diagonal = random_dplr().diag
    got = hessian_from_jacobian(DPLR(diagonal), 0.7, 0.8, prediction=prediction)
    want = hessian_from_jacobian(torch.diag_embed(diagonal), 0.7, 0.8, prediction=prediction)
    assert got.rank == 0
    close(torch.diag_embed(got.diag), want)


def test_dplr_conversions_form_no_dense_matrix() -> None:
    large = random_dplr(size=200_000)  # a dense one would need 10^12 bytes
    there = jacobian_from_hessian(large, 0.7, 0.8, prediction="v")
    close(hessian_from_jacobian(there, 0.7, 0.8, prediction="v").factor, large.factor)


def test_matrices_that_are_not_symmetric_stay_what_they_are() -> None:
    jacobian = torch.arange(4.0).reshape(1, 2, 2)
    got = hessian_from_jacobian(jacobian, 0.5, 2.0)
    assert got.tolist() == [[[-4.0, 8.0], [16.0, 20.0]]]
    assert got.dtype == torch.float32


def test_an_empty_batch_stays_empty() -> None:
    level = torch.ones(0)
    assert hessian_from_jacobian(torch.ones(0, 3, 3), level, level).shape == (0, 3, 3)
    assert jacobian_from_hessian(DPLR(torch.ones(0, 3)), level, prediction="v").shape == (0, 3, 3)


def test_conversions_carry_gradients() -> None:
    matrix = random_dplr()
    sigma = torch.tensor([0.3, 0.9, 2.0], dtype=F64, requires_grad=True)
    inputs = [t.clone().requires_grad_() for t in (matrix.diag, matrix.factor)]

    def convert(diag: Tensor, factor: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        got = hessian_from_jacobian(DPLR(diag, factor, matrix.sign), sigma, 0.8, prediction="v")
        return got.diag, got.factor

    torch.autograd.gradcheck(convert, (*inputs, sigma))
    dense = matrix.dense().requires_grad_()
    torch.autograd.gradcheck(lambda j, s: hessian_from_jacobian(j, s, 0.8), (dense, sigma))


# ------------------------------------------------------------------------------------- errors

X, INTS, SQUARE = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: conversions.score_from_x0(X, torch.ones(3), 1.0),
            ValueError,
            "score_from_x0: x0 must have shape (2, 3), got (3,)",
        ),
        (
            lambda: conversions.score_from_v(X, X, 1.0, 0.0),
            ValueError,
            "score_from_v: alpha must be positive, got 0.0",
        ),
        (
            lambda: conversions.score_from_eps(X, 0.0),
            ValueError,
            "score_from_eps: sigma must be positive, got 0.0",
        ),
        (
            lambda: conversions.eps_from_score(X, -1.0),
            ValueError,
            "eps_from_score: sigma must be positive, got -1.0",
        ),
        (
            lambda: conversions.v_from_score(X, X.double(), 1.0, 1.0),
            ValueError,
            "v_from_score: score must have dtype torch.float32, got torch.float64",
        ),
        (
            lambda: conversions.score_from_eps(INTS, 0.5),
            ValueError,
            "score_from_eps: eps must have dtype float32, float64, got torch.int64",
        ),
        (
            lambda: conversions.eps_from_score(INTS, 0.5),
            ValueError,
            "eps_from_score: score must have dtype float32, float64, got torch.int64",
        ),
        (
            lambda: conversions.score_from_x0(INTS, INTS, 0.5),
            ValueError,
            "score_from_x0: x must have dtype float32, float64, got torch.int64",
        ),
        (
            lambda: conversions.score_from_eps([1.0], 0.5),
            TypeError,
            "score_from_eps: eps must be a Tensor, got list",
        ),
        (
            lambda: conversions.eps_from_score([1.0], 0.5),
            TypeError,
            "eps_from_score: score must be a Tensor, got list",
        ),
    ],
)
def test_first_order_conversions_refuse(
    call: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("matrix", "level", "kind", "message"),
    [
        ([1.0], {}, TypeError, "{} must be a Tensor or a DPLR, got list"),
        (
            INTS[..., None],
            {},
            ValueError,
            "{} must have dtype float32, float64, got torch.int64",
        ),
        *[
            (
                torch.ones(shape),
                {},
                ValueError,
                f"{{}} must have shape (B, *dims, *dims), got {shape}",
            )
            for shape in [(2, 3, 4), (2, 3), (2,), (2, 3, 4, 4, 3), (2, 3, 3, 3)]
        ],
        (SQUARE, {"sigma": 0.0}, ValueError, "sigma must be positive, got 0.0"),
        (DPLR(X), {"sigma": -1.0}, ValueError, "sigma must be positive, got -1.0"),
        (DPLR(X), {"alpha": 0.0}, ValueError, "alpha must be positive, got 0.0"),
        (
            SQUARE,
            {"alpha": torch.tensor([1.0, -2.0]), "prediction": "eps"},
            ValueError,
            "alpha must be positive, got -2.0",
        ),
        (
            SQUARE,
            {"sigma": torch.ones(3)},
            ValueError,
            "sigma must be a float or have shape (2,), got (3,)",
        ),
        (
            DPLR(X),
            {"sigma": torch.ones(3)},
            ValueError,
            "sigma must be a float or have shape (2,), got (3,)",
        ),
        (SQUARE, {"sigma": "1"}, TypeError, "sigma must be a float or a Tensor, got str"),
        (
            SQUARE,
            {"prediction": "score"},
            ValueError,
            "prediction must be one of 'x0', 'eps', 'v', 'edm', got 'score'",
        ),
        (
            DPLR(X),
            {"prediction": None},
            ValueError,
            "prediction must be one of 'x0', 'eps', 'v', 'edm', got None",
        ),
    ],
)
def test_second_order_conversions_refuse(
    matrix: Any, level: dict[str, Any], kind: type[Exception], message: str
) -> None:
    for function, name in ((hessian_from_jacobian, "jacobian"), (jacobian_from_hessian, "hessian")):
        with pytest.raises(kind) as caught:
            function(matrix, **({"sigma": 1.0} | level))
        assert str(caught.value) == f"{function.__name__}: {message.format(name)}"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch itself
def test_differentiated_hessians_convert_like_dense_ones() -> None:
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    jacobian = ScoreHessian(lambda x: x - 0.1 * x**3, x)
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    for prediction in ("x0", "eps", "v", "edm"):
        got = hessian_from_jacobian(jacobian, sigma, 0.8, prediction=prediction)
        want = hessian_from_jacobian(jacobian.dense(), sigma, 0.8, prediction=prediction)
        torch.testing.assert_close(got.dense(), want)
        back = jacobian_from_hessian(got, sigma, 0.8, prediction=prediction)
        torch.testing.assert_close(back.dense(), jacobian.dense())
