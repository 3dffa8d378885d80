"""What a step of a chain is.

A step is a value without state. A `Walk` holds the state of the chains under way and takes the
steps. `chains.sample` drives walks and knows no step by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol, TypeAlias, TypedDict

import torch
from torch import Tensor

from ...checks import WIDE, check, check_number, one_of
from ...ops.noise import draw_normal
from ...random import STREAM_STEP, Key
from ...scores import AnyScores, LogDensity, ScoreFn
from ..arguments import whole
from .coins import TwoCoin
from .laws import NormalLaw, step_size_column
from .points import Point, check_like_x, check_log_prob, check_parts, non_finite, refuse_kind

CURVATURES = ("clamp", "abs", "raw")

Report: TypeAlias = dict[str, Tensor]
"""What one step says of itself: statistics by name, each with one value a chain, shape (B,)."""


Rule: TypeAlias = "str | TwoCoin"
"""What `sample(rule=...)` takes: the name of a quadrature rule, or a `TwoCoin`."""


class PlainOptions(TypedDict, total=False):
    """The settings of a step that is not adjusted.

    Attributes:
        curvature, tolerance, max_iterations: see `StepOptions`.
    """

    curvature: str
    tolerance: float
    max_iterations: int | None


class StepOptions(PlainOptions, total=False):
    """The settings that `sample` hands on to its step.

    Attributes:
        curvature: what becomes of an eigenvalue l > 0 of s2. "clamp" makes it min(l, 0), which is a
            Langevin step along it. "abs" makes it -|l|. "raw" leaves it, and may overflow.
            Default "clamp".
        tolerance: relative error at which an iteration stops, in (0, 1). Default 1e-3.
        max_iterations: most products with s2 for one vector. None, the default, is min(D, 200).
        rule: how an adjusted step without a log_prob finds log p(x') - log p(x), see `Metropolis`.
            Default "trapezoid".
    """

    rule: Rule


class Step(ABC):
    """One step of a chain: which scores it needs, how chains take it, and what they keep.

    A step derives from one of three: from `NormalStep` if its next state is normal given the
    present one, from `PlainStep` if it is not, and from `Step` itself if chains carry more than
    their state from step to step, as `Metropolis` does.

    Attributes:
        name: what `sample(method=...)` calls it; the name of the class if none is stated.
        accepts: the kinds of scores it takes. Tensor among them means that s1 alone is enough.
        dtypes: of the state.
        keeps: the statistics of its reports, and how a run puts the steps together: "count" is the
            sum over all steps (an integer), "max" the largest of all steps, "mean" the mean over
            the steps after the burn-in.
        relative_step_size: a step size to begin with, over the smallest variance of the density
            (the inverse of the largest eigenvalue of -s2).
        adjusted: whether it accepts or rejects, so that it takes a log_prob.
    """

    name: str
    accepts: tuple[type, ...]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = WIDE
    keeps: Mapping[str, str] = {}
    relative_step_size: ClassVar[float] = 1.0
    adjusted: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @property
    def needs_hessian(self) -> bool:
        """Whether s1 alone is not enough."""
        return Tensor not in self.accepts

    def check(self, scores: AnyScores, x: Tensor) -> None:
        """Refuses a container of scores that the step cannot use, at every evaluation."""
        return

    @abstractmethod
    def walk(
        self,
        score_fn: ScoreFn,
        log_prob: LogDensity | None,
        x: Tensor,
        step_size: float | Tensor,
    ) -> Walk:
        """Chains that start at x.

        Args:
            score_fn, log_prob: as for `sample`.
            x: shape (B, *dims). The walk may write into its memory.
            step_size: h, a float, a 0-d tensor or one for each chain, shape (B,).
        """


class PlainStep(Step):
    """A step to a state that is always taken. A subclass states the attributes and writes `move`.

    Args:
        curvature, tolerance, max_iterations: see `StepOptions`. A step uses those that concern it.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.
    """

    def __init__(
        self,
        *,
        curvature: str = "clamp",
        tolerance: float = 1e-3,
        max_iterations: int | None = None,
    ):
        where = "sample"
        self.curvature = one_of(where, "curvature", curvature, CURVATURES)
        self.tolerance = check_number(where, "tolerance", tolerance)
        check(where, self.tolerance < 1, "tolerance must be below 1", f"{self.tolerance:g}")
        self.max_iterations = max_iterations
        if max_iterations is not None:
            self.max_iterations = whole("max_iterations", max_iterations, 1)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    @abstractmethod
    def move(self, here: Point, step_size: float | Tensor, key: Key, out: Tensor) -> Report:
        """Writes the next state into `out`.

        Args:
            here: the present states and their scores.
            step_size: h, a float, a 0-d tensor or one for each chain, shape (B,).
            key: where the noise of this step begins.
            out: shape and dtype of here.x, other memory.

        Returns:
            A new dictionary with a statistic for each name in `keeps`, shape (B,).
        """

    def walk(
        self,
        score_fn: ScoreFn,
        log_prob: LogDensity | None,
        x: Tensor,
        step_size: float | Tensor,
    ) -> Walk:
        """Chains that start at x, whose memory they use."""
        return PlainWalk(self, Target(self, score_fn), x, step_size)


class NormalStep(PlainStep):
    """A step whose next state is normal given the present one, with a density in closed form.

    `Metropolis` can adjust it. A subclass states the attributes and writes `law`.

    Attributes:
        adjusted_name: what `sample(method=...)` calls the adjusted form.
        checks_symmetry: whether `law` refuses dense matrices that are not symmetric.

    Example:
        >>> import torch
        >>> from hos_ext.sampling import NormalStep, diagonal_law, sample
        >>> class Slow(NormalStep):
        ...     name, accepts = "slow", (torch.Tensor,)
        ...     def law(self, here, h):
        ...         x, score = here.flat()
        ...         return diagonal_law(x + h / 2 * score, h.sqrt())
        >>> chains = sample(lambda x: -x, torch.zeros(4, 2), method=Slow, step_size=0.5, n_steps=3)
        >>> chains.draws.shape
        torch.Size([4, 3, 2])
    """

    adjusted_name: ClassVar[str]
    checks_symmetry: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "adjusted_name" not in vars(cls):
            cls.adjusted_name = f"mh_{cls.name}"

    @abstractmethod
    def law(self, here: Point, h: Tensor) -> NormalLaw:
        """The law of the next state.

        Args:
            here: the present states and their scores; `here.flat()` gives both as (B, D).
            h: the step size as a column, shape (B, 1) or (1, 1), in the dtype of the state.

        Returns:
            A law of flat states (B, D), such as `diagonal_law` or `spectral_law`.
        """

    def move(self, here: Point, step_size: float | Tensor, key: Key, out: Tensor) -> Report:
        """A draw from `law`. A subclass with a fused operator overrides it by the same draw."""
        new = self.law(here, step_size_column(step_size, here.x)).draw(step_noise(here.x, key))
        out.copy_(new.view(out.shape))
        return {}


def step_noise(x: Tensor, key: Key) -> Tensor:
    """The standard normals of a step from x, flat (B, D)."""
    return draw_normal(key, STREAM_STEP, x.shape, x).flatten(1)


class Target:
    """The density to sample, as the user's functions describe it.

    Args:
        step: says which scores will do.
        score_fn, log_prob: as for `sample`.
    """

    def __init__(self, step: Step, score_fn: ScoreFn, log_prob: LogDensity | None = None):
        self._step, self._score_fn, self._log_prob = step, score_fn, log_prob
        self._accepts, self._score_will_do = step.accepts, Tensor in step.accepts
        self._first_call = True  # later ones do not read the values of signs, which would wait

    def __call__(self, x: Tensor) -> Point:
        """The point at x (B, *dims)."""
        scores = self._scores(x)
        log_prob = None if self._log_prob is None else check_log_prob(self._log_prob(x), x)
        return Point(x, scores, log_prob)

    def score(self, x: Tensor) -> Tensor:
        """s1 alone at x (B, *dims)."""
        return Point(x, self._scores(x)).score

    def _scores(self, x: Tensor) -> AnyScores:
        scores = self._score_fn(x)
        if self._score_will_do and isinstance(scores, Tensor):
            check_like_x("score", scores, x)
        elif isinstance(scores, self._accepts):
            check_parts(scores, x, self._first_call)
            self._step.check(scores, x)
        else:
            refuse_kind(scores, x, self._accepts, self._step.name)
        self._first_call = False
        return scores


class Walk(Protocol):
    """Chains under way: they hold their state, and `advance` takes one step of all of them."""

    x: Tensor
    """The states. Shape (B, *dims)."""

    def advance(self, key: Key) -> Report:
        """Takes a step. The report says "divergences", and what the step keeps."""

    def diverged(self) -> Tensor:
        """Whether a chain can no longer move to a finite state. bool, shape (B,)."""


class PlainWalk:
    """Chains of a step that is not adjusted."""

    def __init__(self, step: PlainStep, target: Target, x: Tensor, step_size: float | Tensor):
        self.step, self.target, self.step_size = step, target, step_size
        # Two buffers in turn: a fresh output for each step can cost more, in page faults, than the
        # step.
        self.x, self._spare = x, torch.empty_like(x)

    def advance(self, key: Key) -> Report:
        """Takes a step."""
        report = self.step.move(self.target(self.x), self.step_size, key, self._spare)
        self.x, self._spare = self._spare, self.x
        report["divergences"] = non_finite(self.x)
        return report

    def diverged(self) -> Tensor:
        """Whether a state is not finite."""
        return non_finite(self.x)
