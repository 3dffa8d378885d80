"""The Metropolis adjustment: any normal step, accepted or rejected so that the density is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...checks import check, check_kind
from ...linalg.spectrum import check_symmetric
from ...ops.noise import draw_uniform
from ...random import STREAM_ACCEPT, Key
from ...scores import AnyScores, DenseScores, LogDensity, MatrixFreeScores, ScoreFn
from .base import NormalStep, Report, Rule, Step, Target, step_noise
from .coins import TwoCoin
from .laws import NormalLaw, step_size_column
from .line import DEFAULT_RULE, TRAPEZOID, Quadrature, make_rule
from .points import Point, non_finite


class Metropolis(Step):
    """A normal step as a proposal, which is accepted or rejected.

    With a `log_prob` it leaves p invariant for every step size. Without one,
    log p(x') - log p(x) is the integral of the score along the segment dx = x' - x, by a `rule`:

        rule          further evaluations a step   error from s1     where there is s2
        "trapezoid"   0                            O(|dx|^3)         O(|dx|^5)
        "simpson"     1                            O(|dx|^5)         O(|dx|^7)
        "lobatto-n"   n = 2 ... 16                 O(|dx|^(2 n + 3)) O(|dx|^(2 n + 5))
        `TwoCoin`     few, at random               none, within its bound

    All are exact on Gaussians. A step needs one score evaluation and those of the rule, and the
    start needs one more. A learned score that is not the gradient of a function has no log p; the
    rules then say how nearly the step keeps the balance of its own line integrals.

    It keeps "acceptance", the mean acceptance probability of the steps after the burn-in; with a
    `TwoCoin`, the share of them that were accepted. A proposal that is not finite, or whose ratio
    is NaN, is rejected and counts as a divergence.

    Args:
        proposal: the step that proposes.
        rule: a name of the table, or a `TwoCoin`.

    Raises:
        TypeError: proposal is not a `NormalStep`: its density has no closed form; or rule is
            neither a name nor a `TwoCoin`.
        ValueError: an unknown rule.

    References:
        Roberts & Tweedie 1996; Sjoberg et al. 2023, arXiv:2307.14012 (line integrals of scores).

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

    relative_step_size = 0.1
    adjusted = True

    def __init__(self, proposal: NormalStep, *, rule: Rule = DEFAULT_RULE):
        self.proposal = check_kind("Metropolis", "proposal", proposal, NormalStep)
        self.rule = make_rule("Metropolis", rule)
        self.keeps = {"acceptance": "mean", **self.rule.keeps}
        self.name = proposal.adjusted_name
        # A rejected chain keeps its scores, and products alone cannot be kept.
        self.accepts = tuple(kind for kind in proposal.accepts if kind is not MatrixFreeScores)

    def __repr__(self) -> str:
        rule = "" if self.rule.name == DEFAULT_RULE else f", rule={self.rule!r}"
        return f"Metropolis({self.proposal!r}{rule})"

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
        rule = f"rule must be {DEFAULT_RULE!r} where log_prob is given, which is exact"
        check("sample", log_prob is None or self.rule.name == DEFAULT_RULE, rule, self.rule)
        target = Target(self, score_fn, log_prob)
        return MetropolisWalk(self.proposal, target, x, step_size, self.rule)


class MetropolisWalk:
    """Chains of an adjusted step. `step_size` may be changed between steps."""

    def __init__(
        self,
        proposal: NormalStep,
        target: Target,
        x: Tensor,
        step_size: float | Tensor,
        rule: Quadrature | TwoCoin,
    ):
        self.proposal, self.target, self.step_size = proposal, target, step_size
        self.rule = rule
        # In memory of its own: a captured graph reuses its outputs at the next call.
        self.here = kept(target(x))
        self.x = self.here.x

    def advance(self, key: Key) -> Report:
        """Proposes, then accepts or rejects."""
        x = self.x
        h = step_size_column(self.step_size, x)
        forward = self.proposal.law(self.here, h)
        new = forward.draw(step_noise(x, key))
        finite = new.isfinite().all(1)
        # The user's functions see no proposal that is not finite.
        new = torch.where(finite.unsqueeze(1), new, x.flatten(1)).view(x.shape)
        judge = self._by_coins if isinstance(self.rule, TwoCoin) else self._by_ratio
        accepted, there, report = judge(forward, h, new, finite, key)
        self.here = choose(accepted, there, self.here)
        self.x = self.here.x
        return report

    def _by_ratio(
        self, forward: NormalLaw, h: Tensor, new: Tensor, finite: Tensor, key: Key
    ) -> tuple[Tensor, Point, Report]:
        """By the rule of Metropolis and Hastings."""
        assert isinstance(self.rule, Quadrature)
        here = self.here
        inside = 0.0 if here.log_prob is not None else self.rule.inside(self.target, here, new)
        there = self.target(new)
        backward = self.proposal.law(there, h)
        ratio = log_ratio(forward, backward, here, there, rule=self.rule, inside=inside)
        lost = ratio.isnan() | ~finite
        probability = torch.where(lost, 0.0, ratio.double().clamp_max(0).exp())
        u = draw_uniform(key, STREAM_ACCEPT, new.shape[:1], probability)
        return u < probability, there, {"divergences": lost, "acceptance": probability}

    def _by_coins(
        self, forward: NormalLaw, h: Tensor, new: Tensor, finite: Tensor, key: Key
    ) -> tuple[Tensor, Point, Report]:
        """By the rule of Barker."""
        assert isinstance(self.rule, TwoCoin)
        here, there = self.here, kept(self.target(new))
        backward = self.proposal.law(there, h)
        ratio = _proposal_ratio(forward, backward, here, there)
        found = self.rule.toss(self.target, ratio, here, there, key)
        lost = found.lost | ~finite
        accepted = found.accepted & ~lost
        report = {"divergences": lost, "acceptance": accepted.double(), **found.report()}
        return accepted, there, report

    def diverged(self) -> Tensor:
        """Whether a state or its score is not finite."""
        return non_finite(self.x) | non_finite(self.here.score)


def log_ratio(
    forward: NormalLaw,
    backward: NormalLaw,
    here: Point,
    there: Point,
    *,
    rule: Quadrature = TRAPEZOID,
    inside: Tensor | float = 0.0,
) -> Tensor:
    """log of p(there) q(here | there) / (p(here) q(there | here)).

    Without log densities, log p(there) - log p(here) is the integral of the score along the
    segment dx. By default that is the trapezoid rule, corrected by its end slopes, with a prime
    for its end:

        (s1 + s1') . dx / 2 - dx^T (s2' - s2) dx / 12.

    Its error is O(|dx|^5). Where there is no s2 it is the plain rule, with error O(|dx|^3).

    Args:
        forward: q(. | here).
        backward: q(. | there).
        here, there: the ends of the segment.
        rule: for the integral.
        inside: what its nodes between the ends give, `rule.inside(...)`.

    Returns:
        Shape (B,).
    """
    proposals = _proposal_ratio(forward, backward, here, there)
    if here.log_prob is not None and there.log_prob is not None:
        return proposals + (there.log_prob - here.log_prob)
    return proposals + rule.difference(inside, here, there)


def _proposal_ratio(forward: NormalLaw, backward: NormalLaw, here: Point, there: Point) -> Tensor:
    x, y = here.x.flatten(1), there.x.flatten(1)
    return backward.log_density(x) - forward.log_density(y)


def kept(point: Point) -> Point:
    """A copy in memory of its own."""
    return choose(torch.ones(len(point.x), dtype=torch.bool, device=point.x.device), point, point)


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
