"""The Ozaki step with the whole Hessian, by products with it alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...linalg.lanczos import LanczosResult, lanczos
from ...linalg.spectrum import Function, check_symmetric, matrix_rows
from ...ops.reference import phi1, treat_curvature
from ...random import Key
from ...scores import AnyScores, DenseScores, MatrixFreeScores, UnscaledScores
from .base import PlainStep, Report, step_noise
from .laws import step_size_column
from .points import Point


class OzakiLanczos(PlainStep):
    """x' = x + h phi1(h A) s1 + sqrt(2 h phi1(2 h A)) z, with A the whole s2, to a tolerance.

    Two Krylov spaces serve a step, one for s1 and one for z. `tolerance` is the relative error at
    which an iteration stops; it takes `max_iterations` products at most. The density of the step
    has no closed form, so that there is no adjusted form of it. It keeps a Gaussian for every h, to
    the tolerance.

    It keeps "lanczos_error" (the largest relative error estimate), "lanczos_iterations" (products
    with s2, in all) and "lanczos_unconverged" (steps that ended above the tolerance).
    """

    name = "ozaki_lanczos"
    accepts = (UnscaledScores, DenseScores, MatrixFreeScores)
    keeps: Mapping[str, str] = {
        "lanczos_error": "max",
        "lanczos_iterations": "count",
        "lanczos_unconverged": "count",
    }

    def check(self, scores: AnyScores, x: Tensor) -> None:
        """A dense matrix must be symmetric."""
        if isinstance(scores, DenseScores):
            check_symmetric("sample: hessian from score_fn", scores.hessian)

    def move(self, here: Point, step_size: float | Tensor, key: Key, out: Tensor) -> Report:
        """Writes the next state into `out`."""
        rows = matrix_rows(here.hessian, step_size)

        def drift(y: Tensor) -> Tensor:
            return phi1(treat_curvature(y, self.curvature))

        def noise(y: Tensor) -> Tensor:
            return phi1(2 * treat_curvature(y, self.curvature)).sqrt()

        def apply(function: Function, v: Tensor) -> LanczosResult:
            return lanczos(
                rows, v, [function], tolerance=self.tolerance, max_iterations=self.max_iterations
            )

        x, score = here.flat()
        push, spread = apply(drift, score), apply(noise, step_noise(here.x, key))
        h = step_size_column(step_size, x)
        new = x + h * push.values[0] + (2 * h).sqrt() * spread.values[0]
        out.copy_(new.view(out.shape))
        return {
            "lanczos_error": torch.maximum(push.error, spread.error),
            "lanczos_iterations": push.iterations + spread.iterations,
            "lanczos_unconverged": ~(push.converged & spread.converged),
        }
