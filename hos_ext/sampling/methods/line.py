"""Rules for log p(x') - log p(x), the integral of the score along the segment from x to x'."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from torch import Tensor

from ...checks import check, kind_name
from ...linalg.operator import hessian_of
from ...scores import AnyScores
from .base import Rule, Target
from .coins import TwoCoin
from .points import Point

DEFAULT_RULE = "trapezoid"
MOST_NODES = 16
_LOBATTO = "lobatto-"

RULES = ("trapezoid", "simpson", f"{_LOBATTO}2 ... {_LOBATTO}{MOST_NODES}")
"""The names that `sample(rule=...)` knows."""


class Quadrature:
    """Both ends of the segment, and n nodes between them, with one score evaluation each.

    With f(t) = s1(x + t dx) . dx, dx = x' - x, so that f' = dx^T s2 dx:

        log p(x') - log p(x) = w0 (f(0) + f(1)) + sum_i w_i f(t_i).

    The nodes are those of Gauss for the weight t (1 - t), which makes this the rule of Lobatto: it
    is exact for f of degree 2 n + 1, and its error is O(|dx|^(2 n + 3)). Where the scores come
    with s2, the term -(f'(1) - f'(0)) / m joins it, the nodes are those for the weight
    t^2 (1 - t)^2, the degree is 2 n + 3 and the error O(|dx|^(2 n + 5)).

    n = 0 is the trapezoid rule, w0 = 1/2 and m = 12. n = 1 is Simpson's, w0 = 1/6 and w1 = 2/3;
    with s2 w0 = 7/30, w1 = 16/30 and m = 60.

    Args:
        name: what `sample(rule=...)` calls it.
        nodes: n.
    """

    keeps: ClassVar[Mapping[str, str]] = {}

    def __init__(self, name: str, nodes: int):
        self.name, self.nodes = name, nodes

    def __repr__(self) -> str:
        return repr(self.name)

    def inside(self, target: Target, here: Point, there: Tensor) -> Tensor | float:
        """The part of the nodes. It is asked for before the score at the end is: a captured graph
        reuses its outputs at the next call.

        Args:
            target: the density.
            here: where the segment begins.
            there: where it ends. Shape (B, *dims).

        Returns:
            Shape (B,), or 0 if there are no nodes.
        """
        nodes, weights, _, _ = _weights(self.nodes, hessian_of(here.scores) is not None)
        dx = there - here.x
        total: Tensor | float = 0.0
        for t, weight in zip(nodes, weights, strict=True):
            score = target.score(here.x + t * dx)
            total = total + weight * (score * dx).flatten(1).sum(1)
        return total

    def difference(self, inside: Tensor | float, here: Point, there: Point) -> Tensor:
        """The whole: log p(there) - log p(here). Shape (B,)."""
        dx = (there.x - here.x).flatten(1)
        slope = _slope(dx, here.scores, there.scores)
        _, _, end, divisor = _weights(self.nodes, slope is not None)
        total = ((here.score + there.score).flatten(1) * dx).sum(1) * end
        if self.nodes:
            total = total + inside
        return total if slope is None else total - slope / divisor


TRAPEZOID = Quadrature(DEFAULT_RULE, 0)


def _slope(dx: Tensor, here: AnyScores, there: AnyScores) -> Tensor | None:
    """f'(1) - f'(0), (B,), where there is s2 at both ends."""
    before, after = hessian_of(here), hessian_of(there)
    if before is None or after is None:
        return None
    return (dx * (after.matvec(dx) - before.matvec(dx))).sum(1)


@functools.cache
def _weights(n: int, slopes: bool) -> tuple[list[float], list[float], float, float]:
    """The nodes in (0, 1), their weights, the weight of an end, and m.

    By the eigenvectors of the Jacobi matrix of the weight (t (1 - t))^k, k = 1 or 2 with slopes.
    The rule for that weight, divided by it at the nodes, integrates what vanishes at the ends (to
    the second order with slopes); the rest follows from exactness on 1 and t^2.
    """
    k = 2 if slopes else 1
    if n == 0:
        return [], [], 0.5, 12.0
    i = np.arange(1, n)
    off = np.sqrt(i * (i + 2 * k) / ((2 * i + 2 * k + 1) * (2 * i + 2 * k - 1)))
    values, vectors = np.linalg.eigh(np.diag(off, 1) + np.diag(off, -1))
    values = (values - values[::-1]) / 2  # symmetric to the last bit
    mass = 1 / 6 if k == 1 else 1 / 30
    weights = mass * vectors[0] ** 2 / ((1 - values**2) / 4) ** k
    weights = (weights + weights[::-1]) / 2
    nodes = (1 + values) / 2
    end = (1 - weights.sum()) / 2
    slope = (weights @ nodes**2 + end - 1 / 3) / 2
    return (
        nodes.tolist(),
        weights.tolist(),
        float(end),
        float(1 / slope) if slopes else float("inf"),
    )


def make_rule(where: str, rule: Rule) -> Quadrature | TwoCoin:
    """The rule of a name, or the `TwoCoin` that was given."""
    if isinstance(rule, TwoCoin):
        return rule
    kind = kind_name(rule)
    named = isinstance(rule, str)
    check(where, named, "rule must be a name or a TwoCoin", kind, TypeError)
    simple = {"trapezoid": 0, "simpson": 1}
    count = rule.removeprefix(_LOBATTO)
    if rule in simple:
        return Quadrature(rule, simple[rule])
    known = rule.startswith(_LOBATTO) and count.isdecimal() and count == str(int(count))
    known = known and 2 <= int(count) <= MOST_NODES
    check(where, known, f"rule must be one of {', '.join(RULES)}, or a TwoCoin", repr(rule))
    return Quadrature(rule, int(count))
