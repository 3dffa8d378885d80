"""Diagonals and traces by few products: signs, lattice, exchangeable, with and without a head.

"off" is |estimate - exact| / |exact| in root mean square: of the variances (the diagonal of kappa =
I + sigma^2 s2) over all entries of all samples, of the totals (its trace) over samples. Exact is
the network's own Jacobian, by a product for each entry. "inside_90" is the share of exact values
within 1.645 standard errors, "error_ratio" the mean stated square error over the actual one.
With skerch installed its XDiag and XTrace stand beside ours.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from hos_ext import DPLR, MLP, Scores
from hos_ext.diffusion import log_likelihood
from hos_ext.linalg import DenseOperator, Estimate, ScoreHessian

from . import example

KINDS = ("signs", "lattice", "exchangeable")
Table = list[dict[str, Any]]


def run(quick: bool = False) -> dict[str, Any]:
    """All tables. A full run takes about five CPU minutes."""
    settings: dict[str, Any] = {
        "digits": {"steps": 30 if quick else 5000, "head_steps": 10 if quick else 2000}
        | {"rank": 24, "samples": 6 if quick else 360, "products": [16, 32], "seed": 0},
        "photographs": {"entries": 2 if quick else 128, "products": [16] if quick else [16, 32, 64]}
        | {"seed": 0},
        "spectrum": {"size": 40 if quick else 200, "rows": 5 if quick else 100, "seed": 0},
        "likelihood": {"steps": 20 if quick else 3000, "points": 50 if quick else 2000}
        | {"n_steps": 4 if quick else 16, "seeds": 2 if quick else 6},
    }
    return {
        "settings": settings,
        "digits": digits(**settings["digits"]),
        "photographs": photographs(**settings["photographs"]),
        "spectrum": spectrum(**settings["spectrum"]),
        "likelihood": likelihood(**settings["likelihood"]),
    }


# --------------------------------------------------------------------------------------- figures


def figures(found: Estimate, exact: Tensor) -> dict[str, float]:
    """How far off, and whether the standard errors say so."""
    error = (found.value - exact).double()
    stated = found.standard_error.double()
    return {
        "off": _round(_rms(error) / _rms(exact)),
        "inside_90": _round((error.abs() <= 1.6449 * stated).double().mean().item()),
        "error_ratio": _round((stated.square().mean() / error.square().mean()).item()),
    }


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def _round(value: float) -> float:
    return float(f"{value:.4g}")


# ---------------------------------------------------------------------------------------- digits


def digits(
    steps: int, head_steps: int, rank: int, samples: int, products: list[int], seed: int
) -> Table:
    """The denoiser of `examples/any_denoiser.py`, at three noise levels."""
    module = example("any_denoiser")
    data = module.load_digits()
    net = module.train(data.train, steps).requires_grad_(False)
    head = distilled(module, net, data.train, rank, head_steps)
    clean = module.dequantise(data.test[:samples], seed=3)
    rows: Table = []
    for sigma in (0.2, 0.4, 0.8):
        torch.manual_seed(1)
        x, level = clean + sigma * torch.randn_like(clean), torch.full((samples,), sigma)

        def score(x: Tensor, level: Tensor = level, sigma: float = sigma) -> Tensor:
            s: Tensor = module.score_from_x0(x, net(x, level), sigma)
            return s

        kappa = ScoreHessian(score, x).scale(sigma**2) + 1.0
        with torch.no_grad():
            found = head(x, level, sigma * score(x))
        known = DPLR(found.c.flatten(1), found.factor)
        exact = kappa.diagonal()
        about = {"sigma": sigma, "asymmetry": _round(kappa.asymmetry(64).mean().item())}
        rows.append({**about, "probes": "the head alone", "variances": _off(known, exact)})
        for n in products:
            rows += [about | row for row in compared(kappa, exact, n, seed, known)]
        rows += [about | row for row in peer(kappa.dense(), exact, products)]
    return rows


def _off(known: DPLR, exact: Tensor) -> dict[str, float]:
    return {"off": _round(_rms(known.diagonal() - exact) / _rms(exact))}


def compared(
    kappa: ScoreHessian, exact: Tensor, n: int, seed: int, known: DPLR | None = None
) -> Table:
    """All kinds of probes, with and without what a head knows."""
    rows: Table = []
    for deflation in (None,) if known is None else (None, known):
        for kind in KINDS:
            options: dict[str, Any] = {"probes": kind, "seed": seed, "deflation": deflation}
            rows.append(
                {
                    "products": n,
                    "probes": kind,
                    "head": deflation is not None,
                    "variances": figures(kappa.estimate_diagonal(n, **options), exact),
                    "total": figures(kappa.estimate_trace(n, **options), exact.sum(1)),
                }
            )
    return rows


def peer(matrices: Tensor, exact: Tensor, products: list[int]) -> Table:
    """skerch's exchangeable estimates of the same matrices; nothing where it is not installed."""
    if importlib.util.find_spec("skerch") is None:
        return []
    from skerch.algorithms import xhutchpp

    rows: Table = []
    for n in products:
        found = [
            xhutchpp(matrix, "cpu", matrix.dtype, x_dims=n // 2, seed=1 + 1000 * row)
            for row, matrix in enumerate(matrices)
        ]
        value = torch.stack([one["diag"] for one in found])
        total = torch.stack([one["tr"] for one in found])
        rows.append(
            {
                "products": n,
                "probes": "skerch xhutchpp",
                "head": False,
                "variances": {"off": _round(_rms(value - exact) / _rms(exact))},
                "total": {"off": _round(_rms(total - exact.sum(1)) / _rms(exact.sum(1)))},
            }
        )
    return rows


def distilled(module: Any, net: nn.Module, grey: Tensor, rank: int, steps: int) -> nn.Module:
    """A head that learns the symmetric part of the network's own Jacobian, by products with it."""
    torch.manual_seed(0)
    head = MLP(
        (8, 8), rank, width=256, depth=3, trunk="shared", given_score=True, sigma_data=module.STD
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    pool = torch.cat([grey, *(module.distort(grey, seed=1, offset=i) for i in range(20))])
    low, high = math.log(module.SIGMA / 2), math.log(module.SIGMA * 2)
    for step in range(steps):
        x0 = module.dequantise(pool[torch.randint(len(pool), (128,))], seed=2, offset=step)
        sigma = torch.empty(len(x0)).uniform_(low, high).exp()
        x = x0 + sigma[:, None, None] * torch.randn_like(x0)
        v = torch.randn_like(x).sign()

        def denoise(x: Tensor, sigma: Tensor = sigma) -> Tensor:
            return net(x, sigma)  # type: ignore[no-any-return]

        mean, pull = vjp(denoise, x)
        image = (jvp(denoise, (x,), (v,))[1] + pull(v)[0]) / 2
        found: Scores = head(x, sigma, (mean - x) / sigma[:, None, None])
        columns = v.flatten(1).unsqueeze(-1)
        assert found.factor is not None
        learned = found.c.flatten(1).unsqueeze(-1) * columns
        learned = learned + found.factor @ (found.factor.mT @ columns)
        loss = (learned.squeeze(-1) - image.flatten(1)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return head.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------- photographs


def photographs(entries: int, products: list[int], seed: int) -> Table:
    """FFDNet on squares of 64 x 64 of photographs, exact at so many random entries of each."""
    module = example("pretrained_denoiser")
    net, rows = module.load_ffdnet(), []
    squares = torch.cat([module.tiles(module.picture(name), 2) for name in module.UNSEEN])
    for level in module.LEVELS:
        sigma = level / 255
        noise = torch.randn(squares.shape, generator=torch.Generator().manual_seed(7))
        x = squares + sigma * noise

        def score(x: Tensor, sigma: float = sigma) -> Tensor:
            s: Tensor = (net(x, torch.full((len(x),), sigma)) - x) / sigma**2
            return s

        kappa = ScoreHessian(score, x, chunk_size=4, check=False).scale(sigma**2) + 1.0
        size = kappa.shape[1]
        generator = torch.Generator().manual_seed(seed)
        places = torch.stack([torch.randperm(size, generator=generator)[:entries] for _ in x])
        exact = torch.zeros(len(x), entries)
        for start in range(0, entries, 8):
            some = places[:, start : start + 8]
            units = torch.zeros(len(x), size, some.shape[1]).scatter_(1, some.unsqueeze(1), 1.0)
            columns = kappa.matvec(units)
            exact[:, start : start + 8] = columns.gather(1, some.unsqueeze(1)).squeeze(1)
        for n in products:
            for kind in KINDS[: 2 if n > products[0] else 3]:
                found = kappa.estimate_diagonal(n, probes=kind, seed=seed)
                there = Estimate(
                    found.value.gather(1, places), found.standard_error.gather(1, places)
                )
                row = {"sigma": f"{level}/255", "products": n, "probes": kind}
                total = kappa.estimate_trace(n, probes=kind, seed=seed)
                stated = (total.standard_error / total.value).mean().item()
                rows.append(
                    row | {"variances": figures(there, exact), "total_stated": _round(stated)}
                )
    return rows


# --------------------------------------------------------------------------------- other matrices


def spectrum(size: int, rows: int, seed: int) -> Table:
    """Matrices without order among their entries, whose eigenvalues fall as decay^i."""
    found: Table = []
    basis = torch.linalg.qr(
        torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    for decay in (0.99, 0.9, 0.7):
        matrix = basis * decay ** torch.arange(size) @ basis.mT
        x = torch.zeros(rows, size, dtype=torch.float64)
        kappa = ScoreHessian(lambda x, m=matrix: x @ m, x, check=False)
        exact = matrix.diagonal().expand(rows, -1)
        for n in (16, 32):
            found += [{"decay": decay} | row for row in compared(kappa, exact, n, seed)]
    # Against its own matrix: nothing is left.
    own = DenseOperator(matrix.expand(rows, -1, -1))
    left = kappa.estimate_diagonal(4, deflation=own, seed=seed)
    assert (left.value - exact).abs().max() < 1e-9
    return found


# ------------------------------------------------------------------------------------ likelihood


def likelihood(steps: int, points: int, n_steps: int, seeds: int) -> Table:
    """The network of `examples/likelihood.py`: errors of log p in nats, means over the seeds."""
    module = example("likelihood")
    data, rows = module.crescent(), []
    std = data.sample(2000, seed=9).std().item()
    x = data.noisy(module.SCHEDULE.sigma_min).sample(points, seed=4)
    truth = data.noisy(module.SCHEDULE.sigma_min).log_prob(x)
    model = module.train(data, steps)
    for name, options in module.TRACES.items():
        calls = 0

        def counted(x: Tensor, sigma: Tensor, model: Callable[..., Scores] = model) -> Scores:
            nonlocal calls
            calls += 1
            return model(x, sigma)

        count = seeds if "n_probes" in options else 1
        values = torch.stack(
            [
                log_likelihood(
                    counted,
                    x,
                    module.SCHEDULE,
                    n_steps=n_steps,
                    solver="rk4",
                    data_std=std,
                    seed=seed,
                    **options,
                )
                for seed in range(count)
            ]
        )
        error = (values - truth).double()
        rows.append(
            {
                "trace": name,
                "calls": calls // count,
                "rmse": _round(_rms(error)),
                "bias": _round(error.mean().item()),
                "bias_error": _round(error.std().item() / math.sqrt(points * count)),
                "spread": _round(error.std(0).mean().item() if count > 1 else 0.0),
            }
        )
    return rows
