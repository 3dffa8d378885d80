"""Chains that run away, noticed: what a run watches, and the bounds that right chains keep.

A run looks at its chains at up to 32 steps, evenly spread over those after the burn-in. Of each
chain it keeps there the size r = rms |x| over the entries of the state. In the last quarter, with a
the state at the look before, it also keeps the virial -(x - a) . s1(x) / D. Four figures follow:

    spread   r of the last quarter over sqrt(r_start^2 + 2 h n): what n steps of noise alone reach
    drift    r of the last quarter over sqrt(r_second^2 + h n), r_second that of the second quarter
    energy   the median virial of the last quarter. Draws of p have E[-(x - a) . s1 / D] = 1 for
             every fixed a (Stein's identity), in each mode of p alike. Of chains that move little
             between looks it is less. The median heeds no single look, as of a jump between modes
    r_hat    split R-hat of r over the last half, all chains together

A score that pushes outward makes the energy very negative; a step too large for it, which
overshoots further each time, makes it very large. Chains stuck in different modes are right and
have a large R-hat: only an infinite one, of chains that stand still, is beyond its bound.

The bounds know nothing of p, and so are wide. Where draws of p are at hand, `law_error` is far
sharper.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..scores import AnyScores, ScoreFn

POINTS = 32
LEAST_STEPS = 8  # of a run that is watched
SPREAD, DRIFT = 1e3, 1e2  # most, of any chain
ENERGY, ENERGY_OF_ALL = 1e3, (-10.0, 30.0)  # most |energy| of any chain; range of their median

CAUSES = (
    "A learned score outside the range of its data is a known cause (train longer, or over more "
    "noise); others are a step size that is too large, and a score in other units (scaled_score, "
    "sigma s1, in place of s1)"
)


class RunawayWarning(UserWarning):
    """Chains that hold NaN or infinities, or that are beyond the bounds of `watch`."""


class Watch:
    """The sizes and virials of chains along a run; `look` is called where `due` says so.

    Args:
        x: where the chains start. Shape (chain, *dims).
        step_size: h, for all chains or one for each.
        burn_in, n_steps: of the run.
    """

    def __init__(self, x: Tensor, step_size: float | Tensor, burn_in: int, n_steps: int):
        self.points = min(POINTS, n_steps) if n_steps >= LEAST_STEPS else 0
        self._steps = {
            burn_in + (j + 1) * n_steps // self.points - 1: j for j in range(self.points)
        }
        self.sizes = x.new_zeros((len(x), self.points), dtype=torch.float64)
        self._virials = x.new_zeros((len(x), self.points // 4), dtype=torch.float64)
        self._before = torch.empty_like(x) if self.points else x
        h = torch.as_tensor(step_size, device=x.device, dtype=torch.float64)
        self._half = h * n_steps  # variance that the noise of half the steps adds
        self._reach = (_size(x) ** 2 + 2 * h * (burn_in + n_steps)).sqrt()

    def due(self, step: int) -> int | None:
        """The number of the look that this step of the run asks for."""
        return self._steps.get(step)

    def look(self, number: int, rows: slice, x: Tensor, score: Tensor) -> None:
        """Notes states of some chains and their scores, both (rows, *dims)."""
        self.sizes[rows, number] = _size(x)
        last = number - (self.points - self.points // 4)
        if last >= 0:
            wide = torch.promote_types(x.dtype, torch.float32)
            moved = (x - self._before[rows]).to(wide) * score.to(wide)
            self._virials[rows, last] = -moved.flatten(1).mean(1, dtype=torch.float64)
        if last >= -1:
            self._before[rows] = x

    def figures(self) -> dict[str, Any]:
        """The statistics of the run by name; only "ran_away" of a run too short to be watched."""
        quarter = self.points // 4
        if quarter == 0:
            return {"ran_away": self._reach.new_zeros(len(self.sizes), dtype=torch.bool)}
        second, last = (
            self.sizes[:, each].square().mean(1).sqrt()
            for each in (slice(quarter, 2 * quarter), slice(-quarter, None))
        )
        found = {
            "spread": last / self._reach,
            "drift": last / (second.square() + self._half).sqrt(),
            "energy": self._virials.median(1).values,
        }
        beyond = (found["spread"] > SPREAD) | (found["drift"] > DRIFT)
        return {
            **found,
            "sizes": self.sizes,
            "ran_away": beyond | (found["energy"].abs() > ENERGY),
            **figure_of_all({"sizes": self.sizes}),
        }


class Watched:
    """A score function that shows a watch the states of the chains, at the steps that are due.

    An adjusted walk holds the score of its state as `here`, and is asked after the step. Another
    one asks for the score of its state as it begins the step.
    """

    def __init__(self, score_fn: ScoreFn, watch: Watch, *, adjusted: bool):
        self._score_fn, self._watch, self._adjusted = score_fn, watch, adjusted
        self._number: int | None = None
        self._rows = slice(0)
        self.calls = 0  # of the score function

    def before(self, step: int, rows: slice) -> None:
        """Chains of these rows are about to take this step of the run."""
        self._number, self._rows = self._watch.due(step), rows

    def after(self, walk: Any) -> None:
        """They have taken it."""
        if self._adjusted and self._number is not None:
            here = walk.here
            self._look(here.x, here.score)
        self._number = None

    def __call__(self, x: Tensor) -> AnyScores:
        scores = self._score_fn(x)
        self.calls += 1
        score = scores if isinstance(scores, Tensor) else getattr(scores, "score", None)
        # What does not fit x is refused by the step, a moment later.
        if (
            self._number is not None
            and not self._adjusted
            and isinstance(score, Tensor)
            and score.shape == x.shape
            and score.device == x.device
        ):
            self._look(x, score)
        return scores

    def _look(self, x: Tensor, score: Tensor) -> None:
        if self._number is not None and len(x) == len(self._watch.sizes[self._rows]):
            self._watch.look(self._number, self._rows, x, score)
        self._number = None  # a step may ask for more scores


def figure_of_all(stats: Mapping[str, Any]) -> dict[str, float]:
    """The figure that is of all chains together, from the sizes of each where they were kept."""
    sizes = stats.get("sizes")
    return {} if sizes is None else {"r_hat": split_r_hat(sizes[:, sizes.shape[1] // 2 :])}


def split_r_hat(values: Tensor) -> float:
    """Split R-hat of one number a draw. values (chain, draw); NaN for fewer than 4 draws.

    Infinite for chains that stand still at different values.
    """
    half = values.shape[1] // 2
    finite = values[values.isfinite().all(1)]
    if half < 2 or len(finite) == 0:
        return math.nan
    parts = torch.cat([finite[:, :half], finite[:, -half:]]).double()
    within, between = parts.var(1).mean(), parts.mean(1).var()
    return float(((half - 1) / half + between / within).sqrt())


def findings(stats: Mapping[str, Any]) -> list[str]:
    """What is wrong with chains of these statistics, with the numbers; empty if nothing is."""
    diverged = stats["diverged"]
    kept, away = ~diverged, stats["ran_away"] & ~diverged
    said = []
    if diverged.any():
        said.append(f"{int(diverged.sum())} of {len(diverged)} chains hold NaN or infinities")
    if away.any():
        said.append(f"{int(away.sum())} of {len(away)} chains ran away")
    if kept.any() and "energy" in stats:
        low, high = ENERGY_OF_ALL
        energy, r_hat = float(stats["energy"][kept].median()), stats["r_hat"]
        if not away.any() and not low <= energy <= high:
            said.append("the chains have not settled")
        elif math.isinf(r_hat):
            said.append("the chains stand still")
        numbers = (
            f"spread against start and noise up to {_most(stats['spread'][kept])} (bound "
            f"{SPREAD:g}), drift of |x| up to {_most(stats['drift'][kept])} (bound {DRIFT:g}), "
            f"energy {energy:.3g} (1 is right, bounds {low:g} and {high:g}; {ENERGY:g} for one "
            f"chain), R-hat of |x| {r_hat:.3g}"
        )
        said += [numbers] if said else []
    return said


def alarm(said: Sequence[str]) -> str:
    """The findings as one text, with the known causes; empty if there are none."""
    return f"{'; '.join(said)}. {CAUSES}" if said else ""


def warn(where: str, stats: Mapping[str, Any], stacklevel: int) -> None:
    """One warning where chains are beyond the bounds."""
    message = alarm(findings(stats))
    if message:
        warnings.warn(f"{where}: {message}", RunawayWarning, stacklevel=stacklevel + 1)


def _most(values: Tensor) -> str:
    return f"{float(values.nan_to_num(0.0).max()):.3g}"


def _size(x: Tensor) -> Tensor:
    """rms |x| over the entries, one a chain, in float64: 1e30 squared is finite there."""
    return x.flatten(1).double().square().mean(1).sqrt()
