"""The Metropolis adjustment: any normal step, accepted or rejected so that the density is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_kind
from ...linalg.operator import hessian_of
from ...linalg.spectrum import check_symmetric
from ...ops.noise import draw_uniform
from ...random import STREAM_ACCEPT, Key
from ...scores import AnyScores, DenseScores, LogDensity, MatrixFreeScores, ScoreFn
from .base import NormalStep, Report, Step, Target, step_noise
from .laws import NormalLaw, step_size_column
from .points import Point, non_finite


class Metropolis(Step):
    """A normal step as a proposal, which is accepted or rejected.

    With a `log_prob` it leaves p invariant for every step size. Without one, the ratio
    log p(x') - log p(x) is estimated from the scores at both ends (`log_ratio`), which is exact on
    Gaussians. It needs one score evaluation a step, and one more at the start.

    It keeps "acceptance", the mean acceptance probability of the steps after the burn-in. A
    proposal that is not finite, or whose ratio is NaN, is rejected and counts as a divergence.

    Args:
        proposal: the step that proposes.

    Raises:
        TypeError: proposal is not a `NormalStep`: its density has no closed form.

    References:
        Roberts & Tweedie 1996.

    Example:
        >>> import torch
        >>> from hos_ext.sampling import Metropolis, sample
        >>> from hos_ext.sampling.methods import Langevin
        >>> chains = sample(
        ...     lambda x: -x, torch.zeros(4, 2), method=Metropolis(Langevin()), step_size=0.5,
        ...     n_steps=3, seed=0
        ... )
        >>> chains.stats["method"]
        'mala'
    """

    keeps: ClassVar[Mapping[str, str]] = {"acceptance": "mean"}
    relative_step_size = 0.1
    adjusted = True

    def __init__(self, proposal: NormalStep):
        self.proposal = check_kind("Metropolis", "proposal", proposal, NormalStep)
        self.name = proposal.adjusted_name
        # A rejected chain keeps its scores, and products alone cannot be kept.
        self.accepts = tuple(kind for kind in proposal.accepts if kind is not MatrixFreeScores)

    def __repr__(self) -> str:
        return f"Metropolis({self.proposal!r})"

    def check(self, scores: AnyScores, x: Tensor) -> None:
        """What the proposal asks for, and a symmetric matrix, which the ratio multiplies with."""
        self.proposal.check(scores, x)
        if isinstance(scores, DenseScores) and not self.proposal.checks_symmetry:
            check_symmetric("sample: hessian from score_fn", scores.hessian)

    def walk(
        self,
        score_fn: ScoreFn,
        log_prob: LogDensity | None,
        x: Tensor,
        step_size: float | Tensor,
    ) -> MetropolisWalk:
        """Chains that start at x."""
        return MetropolisWalk(self.proposal, Target(self, score_fn, log_prob), x, step_size)


class MetropolisWalk:
    """Chains of an adjusted step. `step_size` may be changed between steps."""

    def __init__(self, proposal: NormalStep, target: Target, x: Tensor, step_size: float | Tensor):
        self.proposal, self.target, self.step_size = proposal, target, step_size
        here = target(x)
        # In memory of its own: a captured graph reuses its outputs at the next call.
        self.here = choose(torch.ones(len(x), dtype=torch.bool, device=x.device), here, here)
        self.x = self.here.x

    def advance(self, key: Key) -> Report:
        """Proposes, then accepts or rejects."""
        x = self.x
        h = step_size_column(self.step_size, x)
        forward = self.proposal.law(self.here, h)
        new = forward.draw(step_noise(x, key))
        finite = new.isfinite().all(1)
        # The user's functions see no proposal that is not finite.
        new = torch.where(finite.unsqueeze(1), new, x.flatten(1))
        there = self.target(new.view(x.shape))
        ratio = log_ratio(forward, self.proposal.law(there, h), self.here, there)
        lost = ratio.isnan() | ~finite
        probability = torch.where(lost, 0.0, ratio.double().clamp_max(0).exp())
        u = draw_uniform(key, STREAM_ACCEPT, x.shape[:1], probability)
        self.here = choose(u < probability, there, self.here)
        self.x = self.here.x
        return {"divergences": lost, "acceptance": probability}

    def diverged(self) -> Tensor:
        """Whether a state or its score is not finite."""
        return non_finite(self.x) | non_finite(self.here.score)


def log_ratio(forward: NormalLaw, backward: NormalLaw, here: Point, there: Point) -> Tensor:
    """log of p(there) q(here | there) / (p(here) q(there | here)).

    Without log densities, log p(there) - log p(here) is the trapezoid rule along the segment,
    corrected by its end slopes, with dx the segment and a prime for its end:

        (s1 + s1') . dx / 2 - dx^T (s2' - s2) dx / 12.

    Its error is O(|dx|^5). Where there is no s2 it is the plain rule, with error O(|dx|^3).

    Args:
        forward: q(. | here).
        backward: q(. | there).
        here, there: the ends of the segment.

    Returns:
        Shape (B,).
    """
    x, y = here.x.flatten(1), there.x.flatten(1)
    proposals = backward.log_density(x) - forward.log_density(y)
    return proposals + _log_prob_difference(here, there)


def _log_prob_difference(here: Point, there: Point) -> Tensor:
    if here.log_prob is not None and there.log_prob is not None:
        return there.log_prob - here.log_prob
    dx = (there.x - here.x).flatten(1)
    difference = ((here.score + there.score).flatten(1) * dx).sum(1) / 2
    before, after = hessian_of(here.scores), hessian_of(there.scores)
    if before is None or after is None:
        return difference
    return difference - (dx * (after.matvec(dx) - before.matvec(dx))).sum(1) / 12


def choose(accept: Tensor, there: Point, here: Point) -> Point:
    """`there` in the accepted rows (B,), `here` in the others, in memory of its own."""

    def pick(new: Any, old: Any) -> Any:
        if new is None or old is None:
            return None
        return torch.where(accept.reshape(-1, *[1] * (new.dim() - 1)), new, old)

    scores = _pick_scores(pick, there.scores, here.scores)
    return Point(pick(there.x, here.x), scores, pick(there.log_prob, here.log_prob))


def _pick_scores(pick: Callable[[Any, Any], Any], new: AnyScores, old: AnyScores) -> Any:
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return pick(new, old)
    if isinstance(new, Tensor) or isinstance(old, Tensor) or type(new) is not type(old):
        raise TypeError(
            "sample: score_fn must return the same kind of scores at every call, got "
            f"{type(new).__name__} after {type(old).__name__}"
        )
    kind: Any = type(new)  # of the package, or a dataclass or NamedTuple of the user
    names = kind._fields if issubclass(kind, tuple) else kind.__dataclass_fields__
    pairs = {name: (getattr(new, name), getattr(old, name)) for name in names}
    # The batch shares its signs.
    return kind(**{k: new if k == "sign" else pick(new, old) for k, (new, old) in pairs.items()})
