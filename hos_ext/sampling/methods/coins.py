"""The exact test for a line integral of the score: two coins, tossed by a Poisson process.

Barker's test accepts x' with probability r / (1 + r), r = exp(b + R) the Metropolis ratio. Let
f(t) = s1(x + t dx) . dx on the segment from x to x', and l(t) the broken line through f at both
ends and at n nodes between them. Then b is known: the log ratio of the proposals plus the integral
of l. And R is what the broken line leaves,

    R = int_0^1 g(t) dt,   g = f - l.

Let |g(t)| <= G(t), G a parabola C_k u (1 - u) on each of the n + 1 pieces, u in (0, 1) along the
piece, and M = sum C_k / 6 the integral of G (f and C_k in units of their piece). Two coins of

    p1 = exp(-int (G - g) / 2) = exp(-(M - R) / 2),   p2 = exp(-int (G + g) / 2)

have the ratio exp(R). A coin is heads if a Poisson process of that intensity has no event: events
of intensity G, in piece k with probability C_k / sum C at a place of density 6 u (1 - u) (the
middle one of three uniforms), each kept with probability (1 -+ g / G) / 2. So a toss evaluates the
score at a few random points, and at none with probability exp(-M). A toss takes the first coin with
probability e^b / (1 + e^b), else the second; heads decide, for x' by the first and for x by the
second; tails toss again. Then x' wins with probability e^b p1 / (e^b p1 + p2) = r / (1 + r).

Where N tosses do not decide, x stays. That keeps detailed balance: the chance to be undecided,
(1 - (e^(b/2) p1 + e^(-b/2) p2) / (e^(b/2) + e^(-b/2)))^N, is the same from both ends.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...checks import check, check_callable, check_count, show
from ...ops.noise import draw_uniform
from ...random import STREAM_COIN, Key
from .points import Point

if TYPE_CHECKING:
    from .base import Target

_EVENTS = 2**16  # most of a step: offsets of its draws
_OFTEN = 0.1  # share of undecided steps that is worth a word

Bound = Callable[[Tensor, Tensor], Tensor]
"""C for segments from x to x', both (B, *dims): |f(t) - chord| <= C t (1 - t). Shape (B,)."""


class BoundWarning(UserWarning):
    """A `TwoCoin` met a score beyond its bound, or its bound is too wide to decide."""


class TwoCoin:
    """Barker's test with the exact line integral of the score: `sample(rule=TwoCoin(bound))`.

    With it an adjusted step leaves p invariant for every step size, from s1 alone. Barker's test
    accepts less than that of Metropolis and Hastings: half of the moves that the other one takes
    for sure.

    It needs a bound on how far f(t) = s1(x + t dx) . dx is from the chord of its ends on any
    segment: |f(t) - (1 - t) f(0) - t f(1)| <= C t (1 - t). `SmoothBound` gives C from bounds on
    derivatives of log p, and `SupportBound` from the range of clean data that were noised. The
    larger one of the bounds from both ends is used. With M the sum of C / 6 over the n + 1 pieces
    into which the nodes cut a step, a step takes about n + 2 (exp(M / 2) - 1) evaluations. A node
    halves M at least, and divides it by four on short pieces.

    A step with M > 2 log(max_tosses) is refused at once, and one that `max_tosses` tosses do not
    decide too. Both are symmetric, so the law stays exact; they are counted as "undecided".

    A score beyond the bound is an event that is counted, and the run says so by a `BoundWarning`:
    its law is then no longer exact. "bound_used" is the largest |f - chord| over the bound. Take it
    from a short run to set the bound of a learned model, with a margin of a few times: C times
    "bound_used" was enough there, and that is no proof.

    All chains that run together are evaluated together, until the last one has decided.

    Args:
        bound: maps both ends (B, *dims) of segments to C, shape (B,), >= 0, which may be infinite.
        nodes: n, >= 0, scores between the ends that every step evaluates.
        max_tosses: most tosses of a step.

    Attributes:
        name: "two_coin", for `stats`.

    Raises:
        TypeError: bound is not callable, or nodes or max_tosses is no integer.
        ValueError: nodes or max_tosses is out of range.

    References:
        Barker 1965; Goncalves, Latuszynski & Roberts 2017 (two coins); Vats, Goncalves, Latuszynski
        & Roberts 2022, arXiv:2004.07471 (tests that may stop); Lam et al. 2026, arXiv:2605.09654
        (for scores).

    Example:
        >>> import torch
        >>> from hos_ext.sampling import SmoothBound, TwoCoin, sample
        >>> chains = sample(
        ...     lambda x: -x.tanh(), torch.zeros(4, 1), method="mala", step_size=0.5, n_steps=20,
        ...     rule=TwoCoin(SmoothBound(third=0.77)), seed=0
        ... )
        >>> int(chains.stats["bound_exceeded"].sum())
        0
    """

    name = "two_coin"
    keeps: ClassVar[Mapping[str, str]] = {
        "undecided": "count",
        "coin_evaluations": "count",
        "bound_exceeded": "count",
        "bound_used": "max",
    }

    def __init__(self, bound: Bound, *, nodes: int = 1, max_tosses: int = 16):
        check_callable("TwoCoin", "bound", bound)
        self.bound = bound
        self.nodes = check_count("TwoCoin", "nodes", nodes, least=0, limit=2**8)
        self.max_tosses = check_count("TwoCoin", "max_tosses", max_tosses, limit=2**10)

    def __repr__(self) -> str:
        bound = self.bound
        name = repr(bound) if is_dataclass(bound) else "a function"
        return f"TwoCoin({name}, nodes={self.nodes}, max_tosses={self.max_tosses})"

    def toss(
        self, target: Target, proposals: Tensor, here: Point, there: Point, key: Key
    ) -> Tosses:
        """Decides between both ends.

        Args:
            target: the density, for scores between the ends.
            proposals: the log ratio of the proposals. Shape (B,).
            here, there: the ends, in memory of their own.
            key: of the step.
        """
        x, dx, pieces = here.x, (there.x - here.x) / (self.nodes + 1), self.nodes + 1
        f, c = self._pieces(target, here, there, dx)
        log_odds = proposals.double() + ((f[:, :-1] + f[:, 1:]) / 2).sum(1)
        lost, mass = log_odds.isnan(), c.sum(1) / 6
        wide = ~lost & (mass > 2 * math.log(self.max_tosses) + 1e-12)
        found = Tosses.none(lost, wide)
        open_ = ~(lost | wide)
        fresh, left = torch.ones_like(open_), torch.zeros_like(mass)
        coin, tosses = torch.zeros_like(open_), torch.zeros_like(mass)
        for number in range(_EVENTS):
            u = draw_uniform(_part(key, number), STREAM_COIN, (len(x), 7), mass)
            coin = torch.where(fresh, u[:, 0] < log_odds.sigmoid(), coin)
            left = torch.where(fresh, mass, left) + u[:, 1].log()
            heads = open_ & (left < 0)
            found.accepted.logical_or_(heads & coin)
            open_ = open_ & ~heads
            if not bool(open_.any()):
                return found
            piece = (c.cumsum(1) < u[:, 6:] * c.sum(1, keepdim=True)).sum(1).clamp_max(pieces - 1)
            t = u[:, 2:5].median(1).values
            at = torch.where(open_, piece + t, 0.0).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
            score = target.score(x + at * dx)
            begin, end, limit = (_entry(each, piece) for each in (f[:, :-1], f[:, 1:], c))
            g = _along(score, dx) - (1 - t) * begin - t * end
            limit = limit * t * (1 - t)
            found.note(open_, g, limit, _rounding(score, dx))
            found.lost.logical_or_(open_ & g.isnan())
            open_ = open_ & ~g.isnan()
            kept = (1 - torch.where(coin, g, -g) / limit) / 2
            fresh = open_ & (u[:, 5] < kept)
            tosses = tosses + fresh
            over = fresh & (tosses >= self.max_tosses)
            found.undecided.logical_or_(over)
            open_ = open_ & ~over
        found.undecided.logical_or_(open_)
        return found

    def _pieces(
        self, target: Target, here: Point, there: Point, dx: Tensor
    ) -> tuple[Tensor, Tensor]:
        """s1 . dx at the ends of the pieces dx long, (B, n + 2), and C of each, (B, n + 1)."""
        inner = [here.x + k * dx for k in range(1, self.nodes + 1)]
        # Each is used before the next is asked for: a captured graph reuses its outputs.
        along = [_along(target.score(x), dx) for x in inner]
        f = torch.stack([_along(here.score, dx), *along, _along(there.score, dx)], 1)
        at = [here.x, *inner, there.x]
        c = [torch.maximum(self._bound(a, b), self._bound(b, a)) for a, b in itertools.pairwise(at)]
        return f, torch.stack(c, 1)

    def _bound(self, x: Tensor, there: Tensor) -> Tensor:
        c = self.bound(x, there)
        good = isinstance(c, Tensor) and c.shape == x.shape[:1] and c.is_floating_point()
        rule = f"bound must return floating point of shape ({len(x)},)"
        check("sample", good, rule, lambda: show(c))
        rule = f"bound must return values on {x.device} like x"
        check("sample", c.device == x.device, rule, c.device)
        fine = c >= 0  # a NaN is not
        rule = "bound must return values >= 0"
        check("sample", bool(fine.all()), rule, lambda: float(c[~fine][0]))
        return c.double()


class Tosses(NamedTuple):
    """What the tosses of a step came to, each of shape (B,).

    Attributes:
        accepted: whether x' won.
        lost: whether the odds or a score between the ends are NaN.
        undecided: whether x stays because no toss decided.
        evaluations: scores evaluated at random points between the ends.
        exceeded: those beyond the bound.
        used: the largest |g| over its bound.
    """

    accepted: Tensor
    lost: Tensor
    undecided: Tensor
    evaluations: Tensor
    exceeded: Tensor
    used: Tensor

    @classmethod
    def none(cls, lost: Tensor, undecided: Tensor) -> Tosses:
        """Before the first one."""
        zeros = torch.zeros_like(lost, dtype=torch.int64)
        return cls(
            torch.zeros_like(lost),
            lost,
            undecided,
            zeros,
            zeros.clone(),
            torch.zeros_like(lost, dtype=torch.float64),
        )

    def note(self, open_: Tensor, g: Tensor, limit: Tensor, rounding: Tensor) -> None:
        """Puts a point of the open rows to the others."""
        used = torch.where(open_, (g.abs() - rounding).clamp_min(0) / limit, 0.0).nan_to_num(0.0)
        self.evaluations.add_(open_)
        self.exceeded.add_(used > 1)
        torch.maximum(self.used, used, out=self.used)

    def report(self) -> dict[str, Tensor]:
        """The statistics of `TwoCoin.keeps`."""
        return {
            "undecided": self.undecided,
            "coin_evaluations": self.evaluations,
            "bound_exceeded": self.exceeded,
            "bound_used": self.used,
        }


def _part(key: Key, number: int) -> Key:
    """The key of an event of a step: each has an offset of its own."""
    return key._replace(offset=key.offset * _EVENTS + number)


def _entry(values: Tensor, column: Tensor) -> Tensor:
    """One column of each row. values (B, m), column (B,)."""
    return values.gather(1, column.unsqueeze(1)).squeeze(1)


def _along(score: Tensor, dx: Tensor) -> Tensor:
    """s1 . dx in float64. Shape (B,)."""
    return (score.flatten(1).double() * dx.flatten(1).double()).sum(1)


def _rounding(score: Tensor, dx: Tensor) -> Tensor:
    """How far s1 . dx may be off by the rounding of the scores. Shape (B,)."""
    sizes = (score.flatten(1).double() * dx.flatten(1).double()).abs().sum(1)
    return 8 * torch.finfo(score.dtype).eps * sizes


def warn_bound(where: str, stats: Mapping[str, Any], n_steps: int | None, stacklevel: int) -> None:
    """One warning where the bound did not hold, or seldom let one of so many steps decide."""
    if "bound_exceeded" not in stats:
        return
    said = []
    exceeded, used = int(stats["bound_exceeded"].sum()), stats["bound_used"]
    if exceeded:
        said.append(
            f"the score exceeded the bound at {exceeded} of "
            f"{int(stats['coin_evaluations'].sum())} points, by up to {float(used.max()):.3g} "
            "times, and the law is not exact: multiply the bound by more than that"
        )
    steps = (n_steps or 0) * len(used)
    share = float(stats["undecided"].sum()) / steps if steps else 0.0
    if share > _OFTEN:
        said.append(
            f"{share:.0%} of the steps were refused because the bound is too wide to decide: take "
            "a smaller step_size or a tighter bound"
        )
    if said:
        message = f"{where}: {'; '.join(said)}"
        warnings.warn(message, BoundWarning, stacklevel=stacklevel + 1)
