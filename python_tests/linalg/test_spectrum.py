"""Functions of symmetric matrices: spectra against dense eigh, Lanczos against its own claims."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import assert_near
from torch import Tensor

from hos_ext.linalg import DPLR, ScoreHessian, hessian_of
from hos_ext.linalg.lanczos import lanczos
from hos_ext.linalg.spectrum import (
    MatvecOfRows,
    Spectrum,
    dense_spectrum,
    isotropic_spectrum,
    matrix_rows,
    spectrum_apply,
    spectrum_logdet,
)
from hos_ext.ops.reference import phi1, treat_curvature
from hos_ext.scores import DenseScores, MatrixFreeScores, SymmetricOperator, UnscaledScores

Function = Callable[[Tensor], Tensor]


def ozaki(curvature: str) -> list[Function]:
    """phi1(t) and sqrt(2 phi1(2 t)) for eigenvalues t of h A, after the treatment."""
    return [
        lambda t: phi1(treat_curvature(t, curvature)),
        lambda t: (2 * phi1(2 * treat_curvature(t, curvature))).sqrt(),
    ]


def exact(matrix: Tensor, function: Function, v: Tensor) -> Tensor:
    """f(A) v one sample at a time, by dense eigh in float64."""
    rows = []
    for a, b in zip(matrix.double(), v.double(), strict=True):
        values, vectors = torch.linalg.eigh(a)
        rows.append(vectors @ (function(values) * (vectors.T @ b)))
    return torch.stack(rows)


def relative(value: Tensor, expected: Tensor) -> Tensor:
    """|value - expected| / |expected| for each row."""
    return (value.double() - expected).norm(dim=-1) / expected.norm(dim=-1)


def random_dplr(
    batch: int, size: int, rank: int, *, signed: bool = False, seed: int = 0, scale: float = 1.0
) -> DPLR:
    g = torch.Generator().manual_seed(seed)
    diag = -scale * torch.rand(batch, size, generator=g, dtype=torch.float64)
    factor = torch.randn(batch, size, rank, generator=g, dtype=torch.float64)
    sign = torch.where(torch.arange(rank) % 2 == 0, 1.0, -1.0) if signed else None
    return DPLR(diag, factor * math.sqrt(scale / size), sign)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagonal_rows(values: Tensor, seen: list[int] | None = None) -> MatvecOfRows:
    """Products with diag(values); `seen` collects how many rows each had."""

    def rows_of(rows: slice | Tensor) -> Function:
        part = values[rows]

        def product(v: Tensor) -> Tensor:
            if seen is not None:
                seen.append(v.shape[0])
            return part * v

        return product

    return rows_of


# --------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("curvature", ["clamp", "abs"])
def test_dense_spectrum_gives_ozaki_functions(curvature: str, device: torch.device) -> None:
    matrix = random_dplr(3, 7, 4, signed=True, scale=3.0).dense()
    v = normal(3, 7)
    for dtype in (torch.float64, torch.float32):
        spectrum = dense_spectrum(matrix.to(device, dtype))
        assert spectrum.rest is None
        for f in ozaki(curvature):
            out = spectrum_apply(spectrum, f, v.to(device, dtype))
            assert_near(out, exact(matrix, f, v))


@pytest.mark.parametrize("curvature", ["clamp", "abs"])
@pytest.mark.parametrize(("rank", "signed"), [(0, False), (1, False), (4, True), (9, True)])
def test_isotropic_spectrum_gives_ozaki_functions_and_logdet(
    rank: int, signed: bool, curvature: str, device: torch.device
) -> None:
    size = 7
    matrix = random_dplr(3, size, rank, signed=signed, scale=3.0)
    level = torch.tensor([-2.0, -0.5, 0.3], dtype=torch.float64).unsqueeze(1).expand(3, size)
    dense = DPLR(level, matrix.factor, matrix.sign).dense()
    v = normal(3, size)
    for dtype in (torch.float64, torch.float32):
        sign = None if matrix.sign is None else matrix.sign.to(device, dtype)
        spectrum = isotropic_spectrum(
            level.to(device, dtype), matrix.factor.to(device, dtype), sign=sign
        )
        assert spectrum.basis.shape == (3, size, min(rank, size))
        assert (spectrum.rest is None) == (rank >= size)
        for f in ozaki(curvature):
            out = spectrum_apply(spectrum, f, v.to(device, dtype))
            assert_near(out, exact(dense, f, v))
            expected = f(torch.linalg.eigvalsh(dense)).log().sum(-1)
            assert_near(spectrum_logdet(spectrum, f), expected, terms=torch.ones(1))


def test_spectra_agree_on_a_rank_deficient_factor_with_repeated_columns() -> None:
    column = normal(2, 6, 1)
    factor = torch.cat([column, column, torch.zeros_like(column), 2 * column], -1)
    level = torch.full((2, 6), -0.7, dtype=torch.float64)
    dense = DPLR(level, factor).dense()
    f = ozaki("abs")[1]
    expected = exact(dense, f, normal(2, 6))
    for spectrum in (isotropic_spectrum(level, factor), dense_spectrum(dense)):
        assert_near(spectrum_apply(spectrum, f, normal(2, 6)), expected)
        gram = spectrum.basis.mT @ spectrum.basis
        assert_near(gram, torch.eye(gram.shape[-1], dtype=torch.float64).expand(gram.shape))


def test_spectrum_functions_take_a_parameter_per_sample() -> None:
    h = torch.tensor([[0.1], [2.0], [5.0]], dtype=torch.float64)
    matrix = random_dplr(3, 5, 2)
    level = torch.full((3, 5), -1.5, dtype=torch.float64)
    dense = DPLR(level, matrix.factor).dense()
    v = normal(3, 5)
    rows = [exact(dense[i : i + 1], lambda t, i=i: phi1(h[i] * t), v[i : i + 1]) for i in range(3)]
    for spectrum in (isotropic_spectrum(level, matrix.factor), dense_spectrum(dense)):
        assert_near(spectrum_apply(spectrum, lambda t: phi1(h * t), v), torch.cat(rows))


def test_spectra_of_one_dimension_and_of_an_empty_batch() -> None:
    one = torch.full((2, 1), -3.0, dtype=torch.float64)
    for spectrum in (dense_spectrum(one.unsqueeze(-1)), isotropic_spectrum(one, None)):
        assert_near(spectrum_apply(spectrum, torch.exp, one), one * math.exp(-3))
        assert_near(spectrum_logdet(spectrum, torch.exp), torch.full((2,), -3.0))
    empty = torch.empty(0, 4)
    for spectrum in (
        dense_spectrum(empty.unsqueeze(-1) @ empty.unsqueeze(1)),
        isotropic_spectrum(empty, empty.unsqueeze(-1)),
    ):
        assert spectrum_apply(spectrum, torch.exp, empty).shape == (0, 4)
        assert spectrum_logdet(spectrum, torch.exp).shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_spectra_of_rows_that_are_not_finite_are_nan_and_spoil_no_other(bad: float) -> None:
    matrix, v = random_dplr(4, 5, 2), normal(4, 5)
    level = torch.full((4, 5), -0.5, dtype=torch.float64)
    dense = DPLR(level, matrix.factor).dense()
    clean = exact(dense, torch.exp, v)
    logdet = torch.linalg.eigvalsh(dense).sum(-1)
    dense[1, 2, 3] = bad
    level[1, 0] = bad
    matrix.factor[3, 0, 1] = bad
    pairs: list[tuple[Spectrum, list[int]]] = [
        (dense_spectrum(dense), [1]),
        (isotropic_spectrum(level, matrix.factor), [1, 3]),
        (isotropic_spectrum(level, None), [1]),
    ]
    for spectrum, rows in pairs:
        out = spectrum_apply(spectrum, torch.exp, v)
        total = spectrum_logdet(spectrum, torch.exp)
        assert out.isnan().all(-1).nonzero().flatten().tolist() == rows
        assert out.isnan().any(-1).nonzero().flatten().tolist() == rows
        assert total.isnan().nonzero().flatten().tolist() == rows
        if spectrum.basis.shape[-1]:
            kept = [i for i in range(4) if i not in rows]
            assert_near(out[kept], clean[kept])
            assert_near(total[kept], logdet[kept])


def test_spectra_refuse_what_they_are_not_for() -> None:
    matrix = torch.zeros(2, 3, 3)
    matrix[1, 0, 1], matrix[1, 1, 1] = 0.5, 2.0
    message = r"step: matrix must be symmetric, got a difference of 0\.5 for sample 1"
    with pytest.raises(ValueError, match=message):
        dense_spectrum(matrix, where="step")
    message = r"dense_spectrum: matrix must have shape \(B, D, D\), D >= 1, got \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        dense_spectrum(torch.zeros(2, 3))
    diag = torch.tensor([[1.0, 1.0], [1.0, 1.25]])
    message = r"step: diag must be constant within each sample, got a spread of 0\.25 for sample 1"
    with pytest.raises(ValueError, match=message):
        isotropic_spectrum(diag, None, where="step")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectra_allow_rounding(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    isotropic_spectrum(torch.tensor([[3.0, 3.0 * (1 + 3 * eps)]], dtype=dtype), None)
    with pytest.raises(ValueError, match="diag must be constant"):
        isotropic_spectrum(torch.tensor([[3.0, 3.0 * (1 + 20 * eps)]], dtype=dtype), None)
    limit = 1e-5 if dtype == torch.float32 else 1e-10
    for share, allowed in ((0.5, True), (2.0, False)):
        matrix = torch.tensor([[[8.0, 8 * share * limit], [0.0, 1.0]]], dtype=dtype)
        if allowed:  # the symmetric part
            spectrum = dense_spectrum(matrix)
            back = spectrum.basis @ torch.diag_embed(spectrum.values) @ spectrum.basis.mT
            assert_near(back, (matrix + matrix.mT) / 2)
        else:
            with pytest.raises(ValueError, match="must be symmetric"):
                dense_spectrum(matrix)


# --------------------------------------------------------------------------------------- Lanczos


@pytest.mark.parametrize("curvature", ["clamp", "abs"])
@pytest.mark.parametrize(
    ("size", "rank", "signed"), [(30, 5, False), (30, 0, False), (30, 6, True), (6, 9, True)]
)
def test_lanczos_at_a_tight_tolerance_is_exact(
    size: int, rank: int, signed: bool, curvature: str, device: torch.device
) -> None:
    matrix = random_dplr(3, size, rank, signed=signed, scale=4.0)
    v, functions = normal(3, size), ozaki(curvature)
    for rows in (matrix_rows(matrix.to(device)), matrix_rows(matrix.dense().to(device))):
        result = lanczos(rows, v.to(device), functions, tolerance=1e-12)
        assert bool(result.converged.all())
        for value, f in zip(result.values, functions, strict=True):
            assert relative(value.cpu(), exact(matrix.dense(), f, v)).max() <= 1e-10


def test_lanczos_scales_the_matrix_per_sample() -> None:
    matrix, v = random_dplr(3, 12, 2), normal(3, 12)
    scale = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    expected = exact(matrix.dense() * scale[:, None, None], torch.exp, v)
    for form in (matrix, matrix.dense()):
        value = lanczos(matrix_rows(form, scale), v, [torch.exp], tolerance=1e-12).values[0]
        assert_near(value, expected)
    value = lanczos(matrix_rows(matrix, 2.0), v, [torch.exp], tolerance=1e-12).values[0]
    assert_near(value, exact(2 * matrix.dense(), torch.exp, v))


@pytest.mark.parametrize(
    ("norm", "counts"),
    [(2.0, [5, 9, 6, 9]), (8.0, [8, 13, 9, 15]), (32.0, [14, 21, 14, 29])],
)
def test_lanczos_takes_the_iterations_of_the_table(norm: float, counts: list[int]) -> None:
    """D = 784, d log-uniform over 3 decades, 20 positive outliers; drift and noise, two tolerances.

    The counts are the first whose true error is below the tolerance, found independently.
    """
    g = torch.Generator().manual_seed(3)
    values = -norm * 10 ** (-3 * torch.rand(2, 784, generator=g, dtype=torch.float64))
    values[:, :20] = 2.4 * torch.rand(2, 20, generator=g, dtype=torch.float64)
    v = normal(2, 784)
    found = []
    for f in ozaki("raw"):
        for tolerance in (1e-3, 1e-6):
            result = lanczos(diagonal_rows(values), v, [f], tolerance=tolerance)
            assert relative(result.values[0], f(values) * v).max() <= tolerance
            found.append(int(result.iterations.max()))
    assert all(abs(a - b) <= 3 for a, b in zip(found, counts, strict=True)), found


def test_lanczos_takes_few_iterations_more_than_needed() -> None:
    """Two to see that it is there; more at 1e-6, as the kink of min(l, 0) is near the spectrum."""
    g = torch.Generator().manual_seed(4)
    values = -0.7 - 0.3 * torch.rand(1, 300, generator=g, dtype=torch.float64)
    values[:, :20] = -0.7 * torch.rand(1, 20, generator=g, dtype=torch.float64)
    v = normal(1, 300)
    for norm in (2.0, 8.0, 32.0):
        rows = diagonal_rows(norm * values)
        for f in ozaki("clamp"):
            expected = f(norm * values) * v
            for tolerance, more in ((1e-3, 3), (1e-6, 5)):
                needed = 1
                while True:
                    part = lanczos(rows, v, [f], tolerance=1e-15, max_iterations=needed)
                    if relative(part.values[0], expected) <= tolerance:
                        break
                    needed += 1
                result = lanczos(rows, v, [f], tolerance=tolerance)
                assert relative(result.values[0], expected) <= tolerance
                assert needed <= result.iterations <= needed + more


SPECTRA = ["noisy", "decades", "symmetric", "mostly positive", "positive outliers", "two clusters"]


@pytest.mark.parametrize("kind", SPECTRA)
def test_lanczos_error_estimate_is_honest(kind: str) -> None:
    """True error <= 10 x estimate; where f has its kink inside the spectrum, but for 1 row in 100.

    Without the look-ahead min(l, 0) breaks it 1e12-fold.
    """
    batch, size = 24, 60
    u = torch.rand(batch, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    values = {
        "noisy": torch.cat([-u[:, :10], -0.7 - 0.3 * u[:, 10:]], 1),
        "decades": -(10 ** (-3 * u)),
        "symmetric": 2 * u - 1,
        "mostly positive": torch.cat([u[:, 6:], -0.2 * u[:, :6]], 1),
        "positive outliers": torch.cat([u[:, :3], -0.3 * u[:, 3:]], 1),
        "two clusters": torch.cat([1 - 0.01 * u[:, :30], -1 + 0.01 * u[:, 30:]], 1),
    }[kind]
    v = normal(batch, size)
    late = total = 0
    for norm in (0.5, 4.0, 30.0):
        for f in (*ozaki("clamp"), *ozaki("abs")):
            for tolerance in (1e-2, 1e-3, 1e-6):
                result = lanczos(diagonal_rows(norm * values), v, [f], tolerance=tolerance)
                error = relative(result.values[0], f(norm * values) * v)
                kink = kind not in ("noisy", "decades", "two clusters")
                late += int((error > 10 * result.error + 1e-13).sum()) if kink else 0
                total += batch
                assert bool((error <= (1000 if kink else 10) * result.error + 1e-13).all())
                assert bool((result.error <= tolerance).all())
                assert bool(result.converged.all())
    assert late <= 0.01 * total


def test_lanczos_is_not_fooled_by_a_function_flat_on_the_first_ritz_values() -> None:
    """min(l, 0) is 0 on them: f_1 = f_2 = f_3 = v, while a tenth of the spectrum is negative."""
    u = torch.linspace(0, 1, 100, dtype=torch.float64)
    values = torch.cat([u[:90], -0.2 * u[:10]]).unsqueeze(0) * 8
    v = torch.ones(1, 100, dtype=torch.float64)
    f = ozaki("clamp")[0]
    first = [
        lanczos(diagonal_rows(values), v, [f], max_iterations=m).values[0] - v for m in (1, 2, 3)
    ]
    assert max(float(d.abs().max()) for d in first) <= 1e-14
    result = lanczos(diagonal_rows(values), v, [f])
    assert relative(result.values[0], f(values) * v) <= 10 * result.error
    assert result.converged.all()
    assert result.iterations > 10


def test_lanczos_in_float32_reaches_its_floor() -> None:
    matrix = random_dplr(4, 200, 10, scale=8.0)
    v, functions = normal(4, 200), ozaki("clamp")
    single = matrix.to(torch.float32)
    result = lanczos(matrix_rows(single), v.float(), functions, tolerance=1e-7)
    assert all(value.dtype == torch.float32 for value in result.values)
    assert bool(result.converged.all())
    assert result.iterations.max() < 50
    for value, f in zip(result.values, functions, strict=True):
        assert relative(value, exact(single.to(torch.float64).dense(), f, v)).max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lanczos_rows_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(6)
    scale = torch.tensor([0.01, 30.0, 1.0, 0.0, 5.0, 100.0, 0.1], dtype=dtype)
    matrix = random_dplr(7, 50, 4, signed=True).to(dtype)
    v = torch.randn(7, 50, generator=g, dtype=dtype)
    whole = lanczos(matrix_rows(matrix, scale), v, ozaki("clamp"))
    assert whole.iterations.unique().numel() >= 5
    for i in range(7):
        part = DPLR(matrix.diag[i : i + 1], matrix.factor[i : i + 1], matrix.sign)
        alone = lanczos(matrix_rows(part, scale[i : i + 1]), v[i : i + 1], ozaki("clamp"))
        assert alone.iterations[0] == whole.iterations[i]
        assert alone.converged[0] == whole.converged[i]
        assert torch.allclose(alone.error[0], whole.error[i], rtol=1e-2, atol=0)
        for a, b in zip(alone.values, whole.values, strict=True):
            assert_near(b[i], a[0])


def test_lanczos_stopped_rows_cost_no_products() -> None:
    hard = -100 * torch.rand(2, 60, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    values = torch.cat([torch.full((6, 60), -1.0, dtype=torch.float64), hard])
    values[6:8, 0] = torch.tensor([-1e-3, -1e-2])
    seen: list[int] = []
    result = lanczos(diagonal_rows(values, seen), normal(8, 60), ozaki("clamp"), tolerance=1e-8)
    assert result.iterations[:6].tolist() == [1] * 6
    assert seen[0] == 8
    first, last = sorted(result.iterations[6:].tolist())
    assert first < last
    assert seen[1:] == [2] * (first - 1) + [1] * (last - first)
    for value, f in zip(result.values, ozaki("clamp"), strict=True):
        assert relative(value, f(values) * normal(8, 60)).max() <= 1e-7


def test_lanczos_one_basis_serves_several_functions() -> None:
    matrix, v, functions = random_dplr(3, 40, 4, scale=9.0), normal(3, 40), ozaki("clamp")
    both = lanczos(matrix_rows(matrix), v, functions, max_iterations=9, tolerance=1e-14)
    single = [
        lanczos(matrix_rows(matrix), v, [f], max_iterations=9, tolerance=1e-14) for f in functions
    ]
    for value, part in zip(both.values, single, strict=True):
        assert_near(value, part.values[0])
    assert_near(both.error, torch.maximum(single[0].error, single[1].error))
    both = lanczos(matrix_rows(matrix), v, functions, tolerance=1e-6)
    single = [lanczos(matrix_rows(matrix), v, [f], tolerance=1e-6) for f in functions]
    counts = torch.maximum(single[0].iterations, single[1].iterations)
    assert both.iterations.tolist() == counts.tolist()


def test_lanczos_breakdowns_are_exact() -> None:
    values = torch.tensor([0.0, -1.0, -1.0, -4.0, -4.0, -4.0, -9.0, -9.0], dtype=torch.float64)
    kinds = torch.stack([torch.zeros(8, dtype=torch.float64), torch.full((8,), -2.0), values])
    v = normal(4, 8)
    v[3] = 0
    kinds = torch.cat([kinds, values.unsqueeze(0)])
    result = lanczos(diagonal_rows(kinds), v, ozaki("clamp"), tolerance=1e-12)
    assert result.iterations[[0, 1, 3]].tolist() == [1, 1, 1]
    assert 4 <= result.iterations[2] <= 6  # distinct eigenvalues, and two checks where beta is
    assert result.error[[0, 1, 3]].tolist() == [0.0] * 3  # rounding but not tiny
    assert result.converged.tolist() == [True] * 4
    for value, f in zip(result.values, ozaki("clamp"), strict=True):
        assert_near(value, f(kinds) * v)
        assert value[3].tolist() == [0.0] * 8
    one = lanczos(diagonal_rows(torch.tensor([[-2.0]])), torch.tensor([[3.0]]), [torch.exp])
    assert_near(one.values[0], torch.tensor([[3 * math.exp(-2)]]))
    assert one.iterations.tolist() == [1]
    assert one.error.tolist() == [0.0]


def test_lanczos_basis_stays_orthogonal_in_float32() -> None:
    """Five eigenvalues, 20 times each. Orthogonalised once, the basis fills with copies: NaN."""
    values = (-30 * torch.arange(5.0)).repeat(1, 20)
    v = normal(1, 100)
    for f in (phi1, torch.exp):
        result = lanczos(diagonal_rows(values), v.float(), [f], tolerance=1e-7)
        assert result.iterations <= 7
        assert relative(result.values[0], f(values.double()) * v) <= 2e-6


def test_lanczos_breakdown_between_two_checks_is_exact() -> None:
    """33 orthonormal steps exhaust the space exactly; the checks there are at 32 and 34."""
    values = torch.zeros(1, 60, dtype=torch.float64)
    chain = torch.zeros(1, 60, 60, dtype=torch.float64)
    i = torch.arange(32)
    chain[0, i, i + 1] = chain[0, i + 1, i] = 50.0
    start = values.clone()
    start[0, 0] = 2.0
    result = lanczos(matrix_rows(chain), start, [torch.sin], tolerance=1e-15)
    assert result.iterations.item() == 34
    assert result.error.item() == 0
    assert result.converged.all()
    assert_near(result.values[0], exact(chain, torch.sin, start))


def test_lanczos_stops_at_its_limit_and_says_so() -> None:
    values = -100 * torch.rand(3, 60, generator=torch.Generator().manual_seed(8))
    seen: list[int] = []
    result = lanczos(diagonal_rows(values, seen), torch.ones(3, 60), [torch.exp], max_iterations=3)
    assert result.iterations.tolist() == [3, 3, 3]
    assert not bool(result.converged.any())
    assert bool((result.error > 1e-3).all())
    assert seen == [3, 3, 3]
    wide = -torch.logspace(-6, 6, 300, dtype=torch.float64).unsqueeze(0)
    seen = []
    result = lanczos(diagonal_rows(wide, seen), torch.ones_like(wide), [phi1], tolerance=1e-14)
    assert len(seen) == 200
    seen = []
    result = lanczos(diagonal_rows(wide[:, :9], seen), wide[:, :9], [phi1], max_iterations=50)
    assert len(seen) <= 9
    assert result.converged.all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_lanczos_rows_that_are_not_finite_are_nan_and_spoil_no_other(bad: float) -> None:
    matrix, v, functions = random_dplr(6, 20, 3), normal(6, 20), ozaki("clamp")
    clean = lanczos(matrix_rows(matrix), v, functions)
    matrix.diag[1, 3] = bad
    matrix.factor[2, 4, 1] = bad
    v[4, 7] = bad
    v[2] = 0
    seen: list[int] = []
    rows = matrix_rows(matrix)

    def counted(index: slice | Tensor) -> Function:
        product = rows(index)

        def apply(q: Tensor) -> Tensor:
            seen.append(q.shape[0])
            return product(q)

        return apply

    result = lanczos(counted, v, functions)
    assert seen[:2] == [6, 3]
    for value, expected in zip(result.values, clean.values, strict=True):
        assert value[[1, 2, 4]].isnan().all()
        assert_near(value[[0, 3, 5]], expected[[0, 3, 5]])
    assert result.converged.tolist() == [True, False, False, True, False, True]
    assert result.error.isnan().tolist() == [False, True, True, False, True, False]
    assert result.iterations[[0, 3, 5]].tolist() == clean.iterations[[0, 3, 5]].tolist()


def test_lanczos_survives_products_that_turn_nan_later() -> None:
    values = -30 * torch.rand(3, 40, generator=torch.Generator().manual_seed(10)).double()
    v = normal(3, 40)
    calls = []

    def rows_of(rows: slice | Tensor) -> Function:
        ill = torch.arange(3)[rows] == 1

        def product(q: Tensor) -> Tensor:
            calls.append(q.shape[0])
            return (values[rows] * q).masked_fill(ill.unsqueeze(-1) & (len(calls) > 3), math.nan)

        return product

    result = lanczos(rows_of, v, [torch.exp])
    clean = lanczos(diagonal_rows(values), v, [torch.exp])
    assert calls[:5] == [3, 3, 3, 3, 2]
    assert result.values[0][1].isnan().all()
    assert result.iterations[1] == 4
    assert result.converged.tolist() == [True, False, True]
    assert_near(result.values[0][[0, 2]], clean.values[0][[0, 2]])


def test_lanczos_gives_nan_where_the_function_is_not_finite() -> None:
    values = torch.tensor([[-1.0, -2.0, -3.0], [1e3, 2e3, -1.0]], dtype=torch.float64)
    result = lanczos(diagonal_rows(values), torch.ones_like(values), [torch.exp], tolerance=1e-12)
    assert_near(result.values[0][0], values[0].exp())
    assert result.values[0][1].isnan().all()
    assert result.converged.tolist() == [True, False]


def test_lanczos_takes_start_vectors_of_any_size() -> None:
    values = -torch.rand(4, 12, generator=torch.Generator().manual_seed(9)) * 3
    size = torch.tensor([[1.0], [1e-30], [1e25], [3e37]])
    v = normal(4, 12).float()
    result = lanczos(diagonal_rows(values), v * size, [torch.exp], tolerance=1e-6)
    assert_near(result.values[0] / size, values.double().exp() * v)


def test_lanczos_of_an_empty_batch() -> None:
    result = lanczos(diagonal_rows(torch.empty(0, 5)), torch.empty(0, 5), ozaki("clamp"))
    assert [value.shape for value in result.values] == [(0, 5), (0, 5)]
    assert result.error.shape == result.iterations.shape == result.converged.shape == (0,)
    assert result.converged.dtype == torch.bool
    assert result.iterations.dtype == torch.int64


def test_lanczos_refuses_bad_arguments() -> None:
    v = torch.ones(2, 3)
    rows = diagonal_rows(torch.ones(2, 3))
    functions = [torch.exp]
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (
            ValueError,
            r"lanczos: v must have shape \(B, D\), D >= 1, got \(2, 3, 1\)",
            lambda: lanczos(rows, v.unsqueeze(-1), functions),
        ),
        (
            ValueError,
            "lanczos: functions must hold at least one, got none",
            lambda: lanczos(rows, v, []),
        ),
        (
            TypeError,
            "lanczos: tolerance must be a float, got str",
            lambda: lanczos(rows, v, functions, tolerance="tight"),  # type: ignore[arg-type]
        ),
        (
            ValueError,
            r"lanczos: tolerance must be in \(0, 1\), got 0\.0",
            lambda: lanczos(rows, v, functions, tolerance=0.0),
        ),
        (
            ValueError,
            "lanczos: max_iterations must be at least 1, got 0",
            lambda: lanczos(rows, v, functions, max_iterations=0),
        ),
        (
            ValueError,
            r"lanczos: the product of rows must have shape \(2, 3\), got \(2, 1\)",
            lambda: lanczos(lambda _: lambda q: q[:, :1], v, functions),
        ),
        (
            ValueError,
            r"lanczos: functions must be elementwise, got \(2,\) from \(2, 1\)",
            lambda: lanczos(rows, v, [lambda t: t.sum(-1)]),
        ),
        (
            ValueError,
            r"matrix_rows: matrix must have shape \(B, D, D\), got \(2, 3\)",
            lambda: matrix_rows(v),
        ),
        (
            ValueError,
            "matrix_rows: scale must be finite, got nan",
            lambda: matrix_rows(DPLR(v), math.nan),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch itself
def test_every_symmetric_operator_answers_alike() -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    low_rank = DPLR(draw(3, 4), draw(3, 4, 2), torch.tensor([1, -1]))
    dense = low_rank.dense()
    products = ScoreHessian(lambda x: (dense @ x.unsqueeze(-1)).squeeze(-1), draw(3, 4))
    containers = [
        UnscaledScores(draw(3, 2, 2), low_rank.diag.view(3, 2, 2), low_rank.factor, low_rank.sign),
        DenseScores(draw(3, 2, 2), dense),
        MatrixFreeScores(draw(3, 2, 2), products),
    ]
    assert hessian_of(draw(3, 4)) is None
    index, v = torch.tensor([2, 0]), draw(3, 4)
    for scores in containers:
        operator = hessian_of(scores)
        assert isinstance(operator, SymmetricOperator)
        assert operator.shape == (3, 4, 4)
        for part, rows in ((operator, slice(None)), (operator.rows(index), index)):
            assert part.shape == (len(v[rows]), 4, 4)
            assert part.dtype == v.dtype
            assert part.device == v.device
            assert_near(part.dense(), dense[rows])
            assert_near(part.diagonal(), dense[rows].diagonal(dim1=1, dim2=2))
            assert_near(part.matvec(v[rows]), (dense @ v.unsqueeze(-1)).squeeze(-1)[rows])
            assert_near(part.matvec(dense[rows]), (dense @ dense)[rows])
        assert_near(operator.rows(index).rows(slice(1, 2)).dense(), dense[:1])
    with pytest.raises(TypeError, match="hessian_of: scores must hold scores, got str"):
        hessian_of("scores")
