"""Guidance for inverse problems beside that of azula (TMPD, MMPS), on one model and one sampler.

The model, the problems and the figures of merit are those of `examples/inverse_problems.py`; the
rivals are azula's own classes around `azula_denoiser(model)`, taken back as models of the same
reverse SDE with the same noise. Run: python -m bench.rivals (with azula installed).
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hos_ext import Scores, normal
from hos_ext.app.data import load_digits
from hos_ext.checks import require
from hos_ext.diffusion import guided, prior, second_order_reverse
from hos_ext.integrations import azula_denoiser
from hos_ext.scores import Model

from .memory import extra_mib

ROOT = Path(__file__).resolve().parent.parent


def example() -> ModuleType:
    path = ROOT / "examples" / "inverse_problems.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_model(denoiser: Any, low: float, high: float) -> Model:
    """azula's denoiser as `model(x, sigma) -> Scores`, for alpha = 1 and sigma = t."""

    def model(x: Tensor, sigma: Tensor) -> Scores:
        t = (sigma[0].double() - low) / (high - low)
        mean = denoiser(x, t).mean
        score = (mean - x) / sigma.reshape(-1, *[1] * (x.dim() - 1))
        return Scores(score, torch.full_like(x, torch.nan))

    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24, help="steps of the reverse SDE")
    parser.add_argument("--training", type=int, default=2500, help="training steps")
    parser.add_argument("--digits", type=int, default=24, help="held-out digits")
    arguments = parser.parse_args()
    tmpd = require("bench.rivals", "azula.guidance.tmpd", "adapters").TMPDenoiser
    mmps = require("bench.rivals", "azula.guidance.mmps", "adapters").MMPSDenoiser
    isotropic = require("bench.rivals", "azula.linalg.covariance", "adapters").IsotropicCovariance
    work = example()
    digits = load_digits()
    model = work.train(digits.train, arguments.training)
    count, std, schedule = arguments.digits, work.NOISE_STD, work.SCHEDULE
    truth = work.dequantise(digits.test[:count], seed=6)
    start = prior((count * work.DRAWS, *work.SHAPE), schedule, data_std=work.DATA_STD, seed=7)
    low, high = schedule.t_min, schedule.t_max
    print(f"{'':32}{'rmse':>8}{'energy':>9}{'50 %':>8}{'90 %':>7}{'ms/step':>11}")
    for title, problem in (("inpainting", work.inpainting()), ("deblurring", work.deblurring())):
        measured = problem.forward(truth)
        measured = measured + std * normal(tuple(measured.shape), seed=8)
        y = measured.repeat(work.DRAWS, *[1] * (measured.dim() - 1))
        base = azula_denoiser(model, schedule)
        contestants = {
            "learned C, closed form": guided(
                model, y.flatten(1), problem.operator, std, schedule, with_covariance=False
            ),
            "learned C, functions": guided(
                model,
                y,
                (problem.forward, problem.adjoint),
                std,
                schedule,
                with_covariance=False,
                tolerance=1e-3,
            ),
            "azula TMPD": as_model(tmpd(base, y, problem.forward, std**2), low, high),
        }
        for solver, iterations in (("gmres", 1), ("gmres", 5), ("cg", 5)):
            rival = mmps(
                base, y, problem.forward, isotropic(std**2), solver=solver, iterations=iterations
            )
            contestants[f"azula MMPS, {solver} {iterations}"] = as_model(rival, low, high)
        print(title)
        for name, conditioned in contestants.items():
            level = start.new_full((len(start),), high)
            conditioned(start, level)  # warm
            peak = extra_mib(partial(conditioned, start, level))
            print(f"  {name + ', one call':30}{peak:38.0f} MiB at its peak")
            began = time.perf_counter()
            try:
                x = work.heun(conditioned, start, schedule, n_steps=arguments.steps, seed=10)
            except ValueError as error:
                print(f"  {name:30} {error}")
                continue
            milliseconds = 1e3 * (time.perf_counter() - began) / arguments.steps
            draws = work.clean(model, x, y.flatten(1), problem)
            work.report(
                f"{name}, {arguments.steps} steps",
                draws.reshape(work.DRAWS, count, *work.SHAPE),
                truth,
                problem.scored,
                milliseconds,
            )
        whole = guided(model, y.flatten(1), problem.operator, std, schedule)
        n = arguments.steps // 2
        began = time.perf_counter()
        x = second_order_reverse(whole, start, schedule, n_steps=n, seed=10)
        milliseconds = 1e3 * (time.perf_counter() - began) / n
        draws = work.clean(model, x, y.flatten(1), problem)
        draws = draws.reshape(work.DRAWS, count, *work.SHAPE)
        work.report(f"second order, {n} steps", draws, truth, problem.scored, milliseconds)


if __name__ == "__main__":
    main()
