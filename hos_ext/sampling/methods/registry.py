"""The steps by name. A step registers once; its adjusted form comes with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, TypeVar

from ...checks import check, check_flag, one_of
from .base import NormalStep, PlainOptions, PlainStep, Rule, Step
from .line import DEFAULT_RULE, make_rule
from .metropolis import Metropolis

if TYPE_CHECKING:
    from typing_extensions import Unpack

Method: TypeAlias = "str | Step | type[PlainStep]"
"""What `sample(method=...)` takes: a name, a step, or a class of steps."""

_Class = TypeVar("_Class", bound=type[PlainStep])
_UNADJUSTED: dict[str, type[PlainStep]] = {}
_ADJUSTED: dict[str, type[NormalStep]] = {}
_DEFAULTS = {
    "curvature": "clamp",
    "tolerance": 1e-3,
    "max_iterations": None,
    "rule": DEFAULT_RULE,
}


def register_step(step: _Class) -> _Class:
    """Makes a step a method of `sample` by its `name`. It decorates the class.

    The adjusted form of a `NormalStep` becomes a method too, by its `adjusted_name`.

    Args:
        step: a class derived from `PlainStep`, most often from `NormalStep`.

    Returns:
        The class.

    Raises:
        TypeError: step is not such a class, or does not state what it accepts.
        ValueError: a name is taken.

    Example:
        >>> import torch
        >>> from hos_ext.sampling import NormalStep, diagonal_law, register_step, sample
        >>> @register_step
        ... class Slow(NormalStep):
        ...     name, accepts = "slow", (torch.Tensor,)
        ...     def law(self, here, h):
        ...         x, score = here.flat()
        ...         return diagonal_law(x + h / 2 * score, h.sqrt())
        >>> chains = sample(
        ...     lambda x: -x, torch.zeros(4, 2), method="mh_slow", step_size=0.5, n_steps=3
        ... )
        >>> chains.draws.shape
        torch.Size([4, 3, 2])
        >>> unregister_step(Slow)
    """
    where = "register_step"
    good = isinstance(step, type) and issubclass(step, PlainStep)
    check(where, good, "step must be a class derived from PlainStep", repr(step), TypeError)
    check(where, hasattr(step, "accepts"), "step must state what it accepts", repr(step), TypeError)
    adjusted = step.adjusted_name if issubclass(step, NormalStep) else None
    for name in (step.name, adjusted):
        check(where, name not in method_names(), "name must be new", repr(name))
    _UNADJUSTED[step.name] = step
    if issubclass(step, NormalStep):
        _ADJUSTED[step.adjusted_name] = step
    return step


def unregister_step(step: type[PlainStep]) -> None:
    """Takes back `register_step`, as before a cell of a notebook defines the step anew.

    Args:
        step: a class that was registered.

    Raises:
        ValueError: it was not.
    """
    known = step in _UNADJUSTED.values()
    check("unregister_step", known, "step must be registered", lambda: repr(step))
    del _UNADJUSTED[step.name]
    if issubclass(step, NormalStep):
        del _ADJUSTED[step.adjusted_name]


def method_names(*, adjusted: bool | None = None) -> tuple[str, ...]:
    """The names that `sample(method=...)` knows.

    Args:
        adjusted: True for adjusted methods alone, False for the others, None for all.

    Returns:
        The names in the order of registration, adjusted methods last.

    Example:
        >>> method_names()[:2]
        ('langevin', 'ozaki')
        >>> method_names(adjusted=True)[:2]
        ('mala', 'mh_ozaki')
    """
    if adjusted is not None:
        check_flag("method_names", adjusted=adjusted)
    unadjusted = () if adjusted else tuple(_UNADJUSTED)
    return unadjusted if adjusted is False else (*unadjusted, *_ADJUSTED)


def make_step(
    method: Method,
    *,
    where: str = "sample",
    argument: str = "method",
    adjusted: bool | None = None,
    rule: Rule = DEFAULT_RULE,
    **options: Unpack[PlainOptions],
) -> Step:
    """The step that a method stands for.

    Args:
        method: one of `method_names()`, a class of steps, or a step, which is returned as it is.
        where, argument: the function and its argument that errors name.
        adjusted: see `method_names`; a method of the other kind is refused.
        rule: of an adjusted step, see `Metropolis`. Another one refuses all but "trapezoid".
        options: the settings of the step, see `StepOptions`. A step that is given has its own.

    Returns:
        A `Step`.

    Raises:
        ValueError: an unknown name, a step of the wrong kind, an option out of range, or an option
            beside a step.
        TypeError: an option of the wrong kind.

    Example:
        >>> make_step("mh_ozaki", curvature="abs").proposal
        Ozaki(curvature='abs', tolerance=0.001, max_iterations=None)
    """
    step: Step
    if adjusted is not None:
        check_flag(where, adjusted=adjusted)
    make_rule(where, rule)
    if isinstance(method, type) and issubclass(method, PlainStep):
        step = method(**options)
    elif isinstance(method, Step):
        step = method
        for name, value in {**options, "rule": rule}.items():
            own = f"{name} must be that of the step, which has its own settings"
            check(where, value == _DEFAULTS[name], own, value)
    else:
        name = one_of(where, argument, method, method_names(adjusted=adjusted))
        proposal = _ADJUSTED.get(name)
        step = (
            Metropolis(proposal(**options), rule=rule) if proposal else _UNADJUSTED[name](**options)
        )
    if adjusted is not None and step.adjusted != adjusted:
        one_of(where, argument, step.name, method_names(adjusted=adjusted))
    used = step.adjusted or rule == DEFAULT_RULE
    check(where, used, f"rule must be {DEFAULT_RULE!r} for the unadjusted {step.name!r}", rule)
    return step
