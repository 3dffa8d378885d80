"""What `sample` and its kin ask of their arguments, and the state that a run starts from."""

from __future__ import annotations

import operator
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..checks import check, is_number, kind_name
from ..random import fresh_seed

_WHERE = "sample"


class ChainState(TypedDict):
    """What a run needs to go on. Plain values, which `torch.load(weights_only=True)` reads.

    Attributes:
        x: the last state of every chain. Shape (chain, *dims).
        step: steps taken since the first init, burn-in included: the next offset of the noise.
        since_draw: steps since the last kept draw, < thin.
        seed: key of the noise.
        first_chain: global index of the first chain.
    """

    x: Tensor
    step: int
    since_draw: int
    seed: int
    first_chain: int


def begin_chains(
    init: Tensor | None, seed: int | None, first_chain: int, state: ChainState | None
) -> ChainState:
    """The state a run starts from, with its own copy of x."""
    first_chain = whole("first_chain", first_chain, 0)
    if seed is not None:
        seed = whole("seed", seed, 0, 2**64)
    given = (init is not None) + (state is not None)
    rule = "exactly one of init and state must be given"
    check(_WHERE, given == 1, rule, "both" if given else "neither")
    if state is None:
        start = ChainState(
            x=_check_init("init", init),
            step=0,
            since_draw=0,
            seed=fresh_seed() if seed is None else seed,
            first_chain=first_chain,
        )
    else:
        start = _resume(state, seed, first_chain)
    start["x"] = start["x"].detach().clone(memory_format=torch.contiguous_format)
    return start


def _resume(state: ChainState, seed: int | None, first_chain: int) -> ChainState:
    """A copy of the state, with which a seed and a first_chain must agree if they are given."""
    keys = f"keys {sorted(state)}" if isinstance(state, dict) else type(state).__name__
    unnumbered = isinstance(state, dict) and state.keys() == {"x", "step", "since_draw", "seed"}
    rule = "state must be of chains that follow one another (init=state['x'] starts others)"
    check(_WHERE, not unnumbered, rule, "rows that do not")
    whole_state = isinstance(state, dict) and ChainState.__required_keys__ <= state.keys()
    check(_WHERE, whole_state, "state must be the state of Chains", keys, TypeError)
    for name, value, unset in (("seed", seed, None), ("first_chain", first_chain, 0)):
        saved = state["seed"] if name == "seed" else state["first_chain"]
        rule = f"{name} must be {unset} or {saved} as in state"
        check(_WHERE, value in (unset, saved), rule, value)
    _check_init("state['x']", state["x"])
    return state.copy()


def _check_init(name: str, x: Tensor | None) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{_WHERE}: {name} must be a tensor, got {kind_name(x)}")
    rule = f"{name} must have shape (chain, *dims) with at least one entry in a chain"
    check(_WHERE, x.dim() >= 2 and 0 not in x.shape[1:], rule, tuple(x.shape))
    check(_WHERE, not x.is_meta, f"{name} must hold values", "a meta tensor")
    check(_WHERE, x.is_floating_point(), f"{name} must be floating point", x.dtype, TypeError)
    return x


def check_dtype(where: str, method: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """A state in a precision that the step bears: half precision is for the fused steps."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    check(where, x.dtype in dtypes, f"init must have dtype {names} for method {method!r}", x.dtype)


def check_step_size(step_size: float | Tensor, x: Tensor) -> None:
    """A positive finite number, 0-d tensor or one for each chain of x."""
    good = isinstance(step_size, Tensor) or is_number(step_size)
    kind = type(step_size).__name__
    check(_WHERE, good, "step_size must be a float or a tensor", kind, TypeError)
    h = step_size if isinstance(step_size, Tensor) else torch.tensor(float(step_size))
    check(_WHERE, h.is_floating_point(), "step_size must be floating", h.dtype)
    check(_WHERE, not h.requires_grad, "step_size must not require grad", "requires_grad=True")
    one, shape = h.dim() == 0, f"shape {tuple(h.shape)}"
    rule = f"step_size must be a float or have shape ({len(x)},)"
    check(_WHERE, one or h.shape == x.shape[:1], rule, shape)
    check(_WHERE, one or h.device == x.device, f"step_size must be on {x.device} like x", h.device)
    fine = h.isfinite() & (h > 0)
    rule = "step_size must be positive and finite"
    check(_WHERE, bool(fine.all()), rule, lambda: float(h[~fine][0]))


def whole(name: str, value: Any, least: int, limit: int = 2**63) -> int:
    """An argument that counts, from `least` up. Any type that Python takes for an index will do."""
    several = isinstance(value, Tensor) and value.dim() > 0
    try:
        number = None if several or isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{_WHERE}: {name} must be an integer, got {type(value).__name__}")
    check(_WHERE, number >= least, f"{name} must be at least {least}", number)
    power = limit.bit_length() - 1
    check(_WHERE, number < limit, f"{name} must be below 2**{power}", number)
    return number
