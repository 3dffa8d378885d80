"""Effective sample size, R-hat and mode jumps against known laws and naive float64 oracles."""

import sys

import pytest
import torch

from hos_ext.sampling.diagnostics import ess, ess_rate, min_ess, mode_jumps, r_hat


def ar1(rho, chains, n, *dims, seed=0):
    """Stationary AR(1) chains of unit variance; rho broadcasts against dims."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, chains, *dims, generator=generator, dtype=torch.float64)
    rho = torch.as_tensor(rho, dtype=torch.float64)
    x = [noise[0]]
    for z in noise[1:]:
        x.append(rho * x[-1] + (1 - rho**2).sqrt() * z)
    return torch.stack(x, 1)


# ------------------------------------------------------------------------------------------ chains


@pytest.mark.parametrize("kind", ["bulk", "mean"])
def test_ess_of_ar1_chains_is_the_known_one(kind):
    rho = torch.tensor([[0.0, 0.6], [0.9, -0.4]])
    draws = ar1(rho, 12, 2000, 2, 2)
    expected = 24_000 * (1 - rho) / (1 + rho)
    got = ess(draws, kind=kind)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected.double(), rtol=0.12, atol=0)
    assert min_ess(draws, kind=kind) == float(got.min())


def test_ess_kinds_differ_as_their_targets_do():
    draws = ar1(-0.6, 4, 3000)
    assert float(ess(draws, kind="bulk")) > 3 * 12_000
    # x^2 of an AR(1) has correlation rho^2: the sign that helps the mean does not help the spread.
    assert float(ess(draws, kind="sd")) == pytest.approx(12_000 * 0.64 / 1.36, rel=0.15)
    assert float(ess(draws, kind="tail")) < float(ess(draws, kind="bulk"))


def test_ess_and_r_hat_keep_the_shape_and_the_order_of_dims():
    draws = ar1(0.3, 3, 60, 2, 5)
    whole, ratio = ess(draws), r_hat(draws)
    assert whole.shape == ratio.shape == (2, 5)
    assert torch.equal(whole[1, 3], ess(draws[:, :, 1, 3]))
    assert torch.equal(ratio[1, 3], r_hat(draws[:, :, 1, 3]))
    assert ess(draws.float().requires_grad_()).dtype == torch.float64


def test_chains_come_first():
    """Chains around different places: few effective draws and a large R-hat."""
    draws = ar1(0.0, 4, 500) + 10 * torch.arange(4.0)[:, None]
    assert float(ess(draws)) < 10
    assert float(r_hat(draws)) > 2
    together = ar1(0.0, 4, 500)
    assert float(ess(together)) > 1500
    assert float(r_hat(together)) < 1.01


def test_r_hat_splits_chains_and_sees_a_common_drift():
    draws = ar1(0.0, 4, 400) + torch.linspace(-2, 2, 400)
    assert float(r_hat(draws)) > 1.3


@pytest.mark.parametrize("n", [40, 41])
def test_r_hat_matches_a_naive_one(n):
    """Rank-normalised split R-hat, the larger one of bulk and folded, from its definition."""
    draws = ar1(0.8, 3, n, 2)

    def split_r_hat(values):
        m = values.numel()
        ranks = values.flatten().argsort().argsort().double() + 1
        z = torch.special.ndtri((ranks - 3 / 8) / (m + 1 / 4)).reshape(values.shape)
        within = z.var(1).mean()
        length = z.shape[1]
        total = (length - 1) / length * within + z.mean(1).var()
        return (total / within).sqrt()

    expected = []
    for d in range(2):
        half = n // 2
        pieces = torch.cat([draws[:, :half, d], draws[:, -half:, d]])
        middle = pieces.flatten().sort().values[[pieces.numel() // 2 - 1, pieces.numel() // 2]]
        folded = (pieces - middle.mean()).abs()
        expected.append(max(split_r_hat(pieces), split_r_hat(folded)))
    torch.testing.assert_close(r_hat(draws), torch.stack(expected), rtol=1e-9, atol=0)


def test_dimensions_without_meaning_give_nan_and_harm_no_other():
    draws = ar1(0.5, 3, 100, 4)
    figures = (ess, lambda draws: ess(draws, kind="cutoff"), r_hat)
    good = [figure(draws) for figure in figures]
    draws[0, 7, 1] = torch.nan
    draws[1, 9, 2] = torch.inf
    draws[..., 3] = 5.0
    for figure, before in zip(figures, good, strict=True):
        got = figure(draws)
        assert float(got[0]) == pytest.approx(float(before[0]), rel=1e-9)
        assert got[1:].isnan().all()
    for kind in ("bulk", "cutoff"):
        assert torch.tensor(min_ess(draws, kind=kind)).isnan()
        assert torch.tensor(ess_rate(draws, 2.0, kind=kind)).isnan()
    assert ess(draws[..., 3]).isnan()


def test_chains_that_stand_still_have_an_infinite_r_hat():
    draws = torch.arange(3.0)[:, None].expand(3, 50)
    assert float(r_hat(draws)) == torch.inf


def naive_cutoff_ess(draws):
    """The rule from its definition, one lag and one pair of draws at a time; draws (chain, n)."""
    chains, n = draws.shape
    rows = draws.tolist()
    mean = sum(sum(row) for row in rows) / (chains * n)
    variance = sum((x - mean) ** 2 for row in rows for x in row) / (chains * n)
    total = 0.0
    for s in range(1, n):
        pairs = [(row[t] - mean) * (row[t + s] - mean) for row in rows for t in range(n - s)]
        rho = sum(pairs) / len(pairs) / variance
        if rho < 0.05:
            break
        total += (1 - s / n) * rho
    return chains * n / (1 + 2 * total)


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("n", [4, 59, 64])
def test_cutoff_ess_matches_a_naive_one(chains, n):
    draws = ar1(torch.tensor([0.0, 0.7, 0.97, -0.8]), chains, n, 4, seed=n)
    draws[..., 2] += 3 * torch.arange(float(chains))[:, None]
    expected = [naive_cutoff_ess(draws[..., d]) for d in range(4)]
    torch.testing.assert_close(
        ess(draws, kind="cutoff"), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_cutoff_ess_of_ar1_chains_is_the_truncated_sum():
    """rho_s = a^s, summed while a^s >= 0.05, and what that leaves out of (1 + a) / (1 - a)."""
    chains, n = 200, 1000
    a = torch.tensor([0.0, 0.5, 0.8, 0.9], dtype=torch.float64)
    lag = torch.arange(1.0, n).double()[:, None]
    rho = a**lag
    kept = rho >= 0.05
    expected = chains * n / (1 + 2 * (kept * rho * (1 - lag / n)).sum(0))
    got = ess(ar1(a, chains, n, 4), kind="cutoff")
    # A sum of S estimated correlations has a relative standard error of sqrt(2 (2 S + 1) / draws).
    error = (2 * (2 * kept.sum(0) + 1) / (chains * n)).sqrt()
    assert ((got / expected - 1).abs() < 3 * error).all()
    # The terms left out sum to less than 0.05 / (1 - a); the last 1% is for n, which is finite.
    ratio = expected * (1 + a) / (1 - a) / (chains * n)
    assert (ratio >= 1).all()
    assert (ratio < 1.01 / (1 - 0.1 / (1 + a))).all()


def test_cutoff_ess_is_at_most_the_number_of_draws():
    assert float(ess(ar1(0.0, 5, 2000), kind="cutoff")) == 10_000
    assert float(ess(ar1(-0.6, 5, 2000), kind="cutoff")) == 10_000


def test_cutoff_ess_counts_a_chain_in_its_own_mode_as_one_draw():
    draws = ar1(0.0, 4, 500) + 1000 * torch.arange(4.0)[:, None]
    assert float(ess(draws, kind="cutoff")) == pytest.approx(4, abs=0.01)
    assert float(ess(draws[:1], kind="cutoff")) > 300


def test_cutoff_ess_knows_neither_units_nor_the_order_of_chains():
    draws = ar1(torch.tensor([0.0, 0.6, 0.9]), 4, 300, 3)
    want = ess(draws, kind="cutoff")
    for moved in (draws.flip(0), 3.7 * draws - 20, -draws, 2.0**-600 * draws, 2.0**600 * draws):
        torch.testing.assert_close(ess(moved, kind="cutoff"), want, rtol=1e-9, atol=0)


def test_cutoff_ess_keeps_dims_and_does_without_arviz(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz_stats.base", None)
    draws = ar1(0.3, 3, 60, 2, 5)
    whole = ess(draws, kind="cutoff")
    assert whole.shape == (2, 5)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(
        whole[1, 3], ess(draws[:, :, 1, 3], kind="cutoff"), rtol=1e-12, atol=0
    )
    assert min_ess(draws, kind="cutoff") == float(whole.min())
    assert ess_rate(draws, 4, kind="cutoff") == float(whole.min()) / 4


@pytest.mark.parametrize("cost", [2.5, torch.tensor(2.5), torch.tensor(2.5).double()])
def test_ess_rate_is_the_smallest_ess_by_cost(cost):
    draws = ar1(torch.tensor([0.0, 0.8]), 4, 200, 2)
    assert ess_rate(draws, cost) == float(ess(draws)[1]) / 2.5
    assert ess_rate(draws, cost, kind="tail") == float(ess(draws, kind="tail").min()) / 2.5


@pytest.mark.parametrize("function", [ess, r_hat])
def test_chain_diagnostics_without_arviz_name_the_extra(function, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz_stats.base", None)
    with pytest.raises(RuntimeError) as error:
        function(torch.zeros(2, 8))
    assert str(error.value).startswith(
        f"{function.__name__}: arviz_stats.base must be installed (pip install hos_ext[cli]), got: "
    )


SHAPE = "draws must have shape (chain, draw, *dims)"


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: ess(torch.zeros(2, 8), kind="median"),
            ValueError,
            "ess: kind must be one of 'bulk', 'tail', 'mean', 'sd', 'cutoff', got 'median'",
        ),
        (
            lambda: ess(torch.zeros(2, 3, 5)),
            ValueError,
            "ess: draws must have shape (chain, draw, *dims), chain >= 1, draw >= 4, got (2, 3, 5)",
        ),
        (
            lambda: ess(torch.zeros(8)),
            ValueError,
            "ess: draws must have shape (chain, draw, *dims), chain >= 1, draw >= 4, got (8,)",
        ),
        (
            lambda: r_hat(torch.zeros(1, 8)),
            ValueError,
            "r_hat: draws must have shape (chain, draw, *dims), chain >= 2, draw >= 4, got (1, 8)",
        ),
        (
            lambda: r_hat(torch.zeros(2, 8, dtype=torch.int64)),
            TypeError,
            "r_hat: draws must be a floating-point tensor, got torch.int64",
        ),
        (
            lambda: ess([[1.0]]),
            TypeError,
            "ess: draws must be a floating-point tensor, got list",
        ),
        (
            lambda: ess(torch.zeros(2, 3), kind="cutoff"),
            ValueError,
            "ess: draws must have shape (chain, draw, *dims), chain >= 1, draw >= 4, got (2, 3)",
        ),
        (
            lambda: ess_rate(torch.zeros(2, 8), 0.0),
            ValueError,
            "ess_rate: cost must be positive, got 0.0",
        ),
        (
            lambda: ess_rate(torch.zeros(2, 8), torch.inf),
            ValueError,
            "ess_rate: cost must be finite, got inf",
        ),
        (
            lambda: ess_rate(torch.zeros(2, 8), torch.ones(2)),
            ValueError,
            "ess_rate: cost must be a float or have shape (), got (2,)",
        ),
        (
            lambda: ess_rate(torch.zeros(2, 8), "1 s"),
            TypeError,
            "ess_rate: cost must be a float or a Tensor, got str",
        ),
        (
            lambda: mode_jumps([[1.0]], torch.zeros(2)),
            TypeError,
            "mode_jumps: draws must be a floating-point tensor, got list",
        ),
        (
            lambda: mode_jumps(torch.zeros(2, 0), torch.zeros(2)),
            ValueError,
            f"mode_jumps: {SHAPE}, chain >= 1, draw >= 1, got (2, 0)",
        ),
        (
            lambda: mode_jumps(torch.zeros(2, 8, 3), [0.0, 1.0]),
            TypeError,
            "mode_jumps: modes must be a Tensor or a function, got list",
        ),
        (
            lambda: mode_jumps(torch.zeros(2, 8, 3), torch.zeros(3)),
            ValueError,
            "mode_jumps: modes must have shape (K, 3), K >= 1, got (3,)",
        ),
        (
            lambda: mode_jumps(torch.zeros(2, 8), torch.tensor(0.0)),
            ValueError,
            "mode_jumps: modes must have shape (K), K >= 1, got ()",
        ),
        (
            lambda: mode_jumps(torch.zeros(2, 8, 3), torch.zeros(0, 3)),
            ValueError,
            "mode_jumps: modes must have shape (K, 3), K >= 1, got (0, 3)",
        ),
        (
            lambda: mode_jumps(torch.zeros(2, 8, 3), torch.zeros(2, 3).double()),
            ValueError,
            "mode_jumps: modes must have dtype torch.float32, got torch.float64",
        ),
        (
            lambda: mode_jumps(torch.zeros(2, 8, 3), torch.zeros(2, 3, device="meta")),
            ValueError,
            "mode_jumps: modes must be on cpu, got meta",
        ),
        (
            lambda: mode_jumps(torch.zeros(2, 8, 1), torch.tensor([[0.0], [torch.inf]])),
            ValueError,
            "mode_jumps: modes must be finite, got inf",
        ),
        (
            lambda: mode_jumps(torch.zeros(2, 8, 3), lambda x: x.argmax(1).tolist()),
            TypeError,
            "mode_jumps: modes(draws) must be a Tensor, got list",
        ),
        (
            lambda: mode_jumps(torch.zeros(2, 8, 3), lambda x: x.argmax(1).float()),
            ValueError,
            "mode_jumps: modes(draws) must have dtype int64, int32, got torch.float32",
        ),
        (
            lambda: mode_jumps(torch.zeros(2, 8, 3), lambda x: x.argmax()),
            ValueError,
            "mode_jumps: modes(draws) must have shape (8,), got ()",
        ),
    ],
)
def test_chain_diagnostics_refuse(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


# ------------------------------------------------------------------------------------- mode jumps


def along(*labels):
    """One-dimensional draws (chain, draw, 1) at 10 times their labels, off the centres by 3."""
    return 10 * torch.tensor(labels)[..., None] + 3.0


CENTRES = torch.tensor([[0.0], [10.0], [20.0]])


def test_mode_jumps_counts_changes_of_the_nearest_mode():
    draws = along([0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1], [2, 2, 0, 0, 0, 1], [0, 2, 2, 2, 2, 0])
    got = mode_jumps(draws, CENTRES)
    assert got.tolist() == [0, 5, 2, 2]
    assert got.dtype == torch.int64
    assert mode_jumps(draws, CENTRES[:1]).tolist() == [0, 0, 0, 0]
    assert mode_jumps(draws[..., 0], CENTRES[:, 0]).tolist() == [0, 5, 2, 2]
    assert mode_jumps(draws[:, :1], CENTRES).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mode_jumps_takes_images_in_every_dtype(dtype):
    """The distance is Euclidean over all dims: no single pixel decides."""
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(3, 2, 5, generator=generator).to(dtype)
    labels = torch.tensor([[0, 1, 1, 2, 0], [2, 2, 2, 2, 1]])
    draws = modes[labels] + 0.2 * torch.randn(2, 5, 2, 5, generator=generator).to(dtype)
    assert mode_jumps(draws, modes).tolist() == [3, 1]
    assert mode_jumps(draws.requires_grad_(), modes.requires_grad_()).tolist() == [3, 1]


def test_mode_jumps_tells_close_modes_far_from_zero_apart():
    """|x|^2 - 2 x m + |m|^2 would have no digit left in float32."""
    modes = torch.full((2, 40), 4096.0) + torch.tensor([[0.0], [0.125]])
    draws = modes[torch.tensor([[0, 1, 0, 0, 1, 1]])]
    assert mode_jumps(draws, modes).tolist() == [3]


def test_mode_jumps_takes_the_labels_of_a_classifier():
    draws = along([0, 1, 1, 2], [2, 2, 2, 2])
    calls = []

    def classify(x):
        calls.append(x)
        assert not torch.is_grad_enabled()
        return (x[:, 0] / 10).long()

    assert mode_jumps(draws, classify).tolist() == [2, 0]
    assert [call.shape for call in calls] == [(4, 1), (4, 1)]
    assert torch.equal(torch.stack(calls), draws)
    assert mode_jumps(draws, lambda x: classify(x).int()).tolist() == [2, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("classifier", [False, True])
def test_mode_jumps_leaves_non_finite_draws_out(bad, classifier):
    draws = along([0, 1, 1, 1, 1], [1, 1, 2, 2, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0])
    draws = torch.cat([draws, torch.zeros_like(draws)], 2)  # one entry is enough to spoil a draw
    draws[0, 2:, 1] = bad  # diverged after a jump
    draws[1, 2:4, 1] = bad  # came back to the mode that it left
    draws[2, :, 1] = bad
    draws[3, 1:, 1] = bad
    modes = torch.cat([CENTRES, torch.zeros_like(CENTRES)], 1)

    def classify(x):
        assert x.isfinite().all()
        return (x[:, 0] / 10).long()

    assert mode_jumps(draws, classify if classifier else modes).tolist() == [1, 0, 0, 0]
