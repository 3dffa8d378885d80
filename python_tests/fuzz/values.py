"""What a call is given instead of a valid argument: by its kind, and by what the valid one was.

A change says whether the new value means the same as the old one. Then the call may be refused or
must give the same result. `excluded` reads an annotation: a value that it excludes must be refused.
"""

from __future__ import annotations

import collections.abc
import copy
import math
import random
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hos_ext import DPLR, Posterior, Scores, UnscaledScores
from hos_ext.records import Record

Change = Callable[[Any], Any]


class Changed(NamedTuple):
    """A new argument, what was done, and whether it means the same as the valid one."""

    value: Any
    done: str
    same: bool = False


class Anything:
    """An object without a use."""

    def __repr__(self) -> str:
        return "Anything()"


class Bent(DPLR):
    """A matrix that was changed; what it is called does not depend on what it holds."""

    def __repr__(self) -> str:
        return "Bent()"


# ---------------------------------------------------------------------------- whatever it replaces


def _wild() -> dict[str, Any]:
    """Values that fit few arguments."""
    bent, bare = Bent(torch.ones(3, 4)), Bent(torch.ones(3, 4))
    bent.diag = "abc"  # type: ignore[assignment]
    del bare.factor
    return {
        "None": None,
        "'abc'": "abc",
        "'False'": "False",
        "'cuda:7'": "cuda:7",
        "''": "",
        "bytes": b"abc",
        "[]": [],
        "()": (),
        "{}": {},
        "[1.0]": [1.0],
        "['a']": ["a"],
        "[None]": [None],
        "object": Anything(),
        "class": Anything,
        "callable": lambda *args, **kwargs: None,
        "nan": math.nan,
        "inf": math.inf,
        "-inf": -math.inf,
        "-1": -1,
        "0": 0,
        "0.0": 0.0,
        "-0.5": -0.5,
        "0.5": 0.5,
        "1": 1,
        "2**31": 2**31,
        "2**63": 2**63,
        "-2**63": -(2**63),
        "10**30": 10**30,
        "10**400": 10**400,
        "1e308": 1e308,
        "1e-308": 1e-308,
        "1e39": 1e39,
        "True": True,
        "False": False,
        "1j": 1j,
        "slice": slice(None),
        "range": range(3),
        "np.float64": np.float64(0.5),
        "np.float32 nan": np.float32("nan"),
        "np.int64": np.int64(2),
        "np.bool_": np.bool_(True),
        "np.array": np.ones(3),
        "np.array of objects": np.array([None, "a"], dtype=object),
        "np.array reversed": np.arange(12.0).reshape(3, 4)[::-1],
        "0-d": torch.tensor(0.5),
        "0-d nan": torch.tensor(math.nan),
        "0-d bool": torch.tensor(True),
        "0-d int": torch.tensor(2),
        "0-d int huge": torch.tensor(2**62),
        "0-d meta": torch.empty((), device="meta"),
        "meta": torch.empty(3, 4, device="meta"),
        "empty": torch.empty(0),
        "ones": torch.ones(3, 4),
        "bools": torch.ones(3, 4, dtype=torch.bool),
        "sparse": torch.eye(3).to_sparse(),
        "csr": _quiet_csr(),
        "complex": torch.ones(3, 4, dtype=torch.complex64),
        "quarter": torch.ones(3, 4).to(torch.float8_e5m2),
        "float16": torch.float16,
        "int64": torch.int64,
        "complex64": torch.complex64,
        "bool dtype": torch.bool,
        "device meta": torch.device("meta"),
        "device cuda": torch.device("cuda", 7),
        "'meta'": "meta",
        "'cpu'": "cpu",
        "Scores of None": Scores(None, None),  # type: ignore[arg-type]
        "UnscaledScores of text": UnscaledScores("a", "b", "c", "d"),  # type: ignore[arg-type]
        "Posterior of None": Posterior(None, None),  # type: ignore[arg-type]
        "Posterior of text": Posterior(torch.ones(3, 4), "abc"),  # type: ignore[arg-type]
        "DPLR bent": bent,
        "DPLR bare": bare,
        "module": torch.nn.Linear(1, 1),
        "generator": torch.Generator(),
        "iterator": iter([1.0, 2.0]),
        "path": Path("nowhere"),
    }


def _quiet_csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


WILD = _wild()

# ------------------------------------------------------------------------------- instead of tensors


def _set(value: float) -> Change:
    """One entry becomes a value."""

    def change(t: torch.Tensor) -> torch.Tensor:
        flat = t.detach().flatten().clone()
        flat[-1:] = value
        return flat.reshape(t.shape)

    return change


def _strided(t: torch.Tensor) -> torch.Tensor:
    """Every other entry of a larger tensor."""
    if t.dim() == 0:
        return t.new_zeros(2)[::2].copy_(t)[0]
    return torch.stack([t, t], -1).flatten(-2)[..., ::2]


def _transposed_memory(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else _strided(t)


def _negative_view(t: torch.Tensor) -> torch.Tensor:
    """The same values, stored with the other sign and torch's negative bit."""
    return torch.complex(t, -t).conj().imag


class Subclass(torch.Tensor):
    """A tensor of a class of its own."""


SAME: dict[str, Change] = {
    "strided": _strided,
    "transposed memory": _transposed_memory,
    "negative view": _negative_view,
    "requires grad": lambda t: t.detach().clone().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t.detach().clone()),
    "subclass": lambda t: t.detach().as_subclass(Subclass),
    "offset in memory": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}
BROADCAST: dict[str, Change] = {
    "first row": lambda t: t[:1],
    "without the first axis": lambda t: t[0],
    "one axis more": lambda t: t[None],
    "last axis of 1": lambda t: t[..., :1],
}
OTHER: dict[str, Change] = {
    "nan": _set(math.nan),
    "inf": _set(math.inf),
    "-inf": _set(-math.inf),
    "huge": _set(3e38),
    "tiny": _set(1e-45),
    "zeros": torch.zeros_like,
    "negative": lambda t: -t,
    "large": lambda t: t * 1e30,
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "two rows": lambda t: t[:2],
    "twice": lambda t: torch.cat([t, t]),
    "last axis twice": lambda t: torch.cat([t, t], -1),
    "transposed": lambda t: t.mT,
    "flat": torch.flatten,
    "0-d": lambda t: t.flatten()[0],
    "expanded": lambda t: t[:1].expand_as(t),
    "int": lambda t: t.to(torch.int64),
    "bool": lambda t: t.to(torch.bool),
    "half": lambda t: t.to(torch.float16),
    "bfloat16": lambda t: t.to(torch.bfloat16),
    "complex": lambda t: t.to(torch.complex64),
    "other float": lambda t: t.to(torch.float32 if t.dtype == torch.float64 else torch.float64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "numpy": lambda t: t.numpy(),
    "numpy reversed": lambda t: t.numpy()[::-1],
    "numpy expanded": lambda t: np.broadcast_to(t.numpy()[:1], t.shape),
    "list": lambda t: t.tolist(),
}


# ------------------------------------------------------------------------- instead of other things

ANSWERS: dict[str, Callable[..., Any]] = {
    "a function of nothing useful": lambda *a, **k: None,
    "a function that gives text": lambda *a, **k: "abc",
    "a function that gives a number": lambda *a, **k: 1.0,
    "a function that gives a pair": lambda *a, **k: (a[0], a[0]) if a else (1, 2),
    "a function that gives a part": lambda *a, **k: a[0][:1] if a else 1,
    "a function that gives numpy": lambda *a, **k: np.ones(3),
    "a function that gives NaN": lambda *a, **k: a[0] * math.nan if a else math.nan,
    "a function that gives halves": lambda *a, **k: a[0].half() if a else 0,
    "a function that gives meta": lambda *a, **k: torch.empty(3, 4, device="meta"),
    "a function that gives no rows": lambda *a, **k: a[0][:0] if a else 0,
    "a function that gives ints": lambda *a, **k: a[0].long() if a else 0,
    "a function that gives Scores of None": lambda *a, **k: Scores(None, None),
    "a function that gives Scores of text": lambda *a, **k: Scores(a[0], "a", "b", "c"),
    "a function that gives a wrong factor": lambda *a, **k: Scores(a[0], a[0], a[0]),
    "a function that gives a wrong sign": lambda *a, **k: UnscaledScores(
        a[0], a[0], a[0].flatten(1)[..., None], "+"
    ),
    "a function that gives unscaled None": lambda *a, **k: UnscaledScores(a[0], None),
    "a function that gives a list": lambda *a, **k: [a[0]] if a else [],
    "a class": Anything,
    "a module": torch.nn.Identity(),
}


def _answering(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which answers None where it is given something else than a tensor."""

    def function(*args: Any, **options: Any) -> Any:
        return answer(*args, **options) if isinstance(args and args[0], torch.Tensor) else None

    return function


def _numbers(value: float) -> Iterator[Changed]:
    yield Changed(np.float64(value), "np.float64", isinstance(value, float))
    yield Changed(np.array(value), "0-d numpy", True)
    yield Changed(str(value), "text")
    yield Changed([value], "list")
    yield Changed(-value, "negative")
    yield Changed(torch.tensor(value), "0-d tensor", True)
    yield Changed(value + 1e9, "plus 1e9")
    if isinstance(value, int):
        yield Changed(np.int64(value), "np.int64", True)
        yield Changed(np.int16(value), "np.int16", True)
        yield Changed(float(value), "float")
        yield Changed(value + 1, "one more")
        yield Changed(value - 1, "one less")
        yield Changed(torch.tensor(value), "0-d int tensor", True)
        yield Changed(torch.tensor([value]), "1-d int tensor")
    else:
        yield Changed(np.float32(value), "np.float32")
        yield Changed(torch.full((3,), value), "a row each")
        yield Changed(torch.full((1,), value), "shape (1,)")


def _changes(value: Any, rng: random.Random) -> list[Changed]:
    """What a valid value may become, apart from the wild ones."""
    if isinstance(value, torch.Tensor):
        kind = rng.choice([SAME, BROADCAST, OTHER, OTHER])
        done = rng.choice(list(kind))
        name = f"broadcast: {done}" if kind is BROADCAST else done
        return [Changed(kind[done](value), name, kind is SAME)]
    if isinstance(value, bool):
        wrong = ["False", "", 1, 0, None, [], np.ones(2), torch.tensor([True, False]), 0.0]
        return [Changed(v, f"for a flag {v!r}") for v in wrong]
    if isinstance(value, (int, float)):
        return list(_numbers(value))
    if isinstance(value, str):
        same = [Changed(str(np.str_(value)), "np.str_", True)]
        return [*same, *(Changed(v, f"{v!r}") for v in (value.upper(), value + " ", [value]))]
    if isinstance(value, Record) or hasattr(value, "_fields"):
        return [_field_changed(value, rng)]
    if isinstance(value, (list, tuple)):
        return _sequences(value, rng)
    if callable(value) or isinstance(value, torch.nn.Module):
        return [
            Changed(
                v
                if done.startswith("a class") or isinstance(v, torch.nn.Module)
                else _answering(v),
                done,
            )
            for done, v in ANSWERS.items()
        ]
    if isinstance(value, Path):
        return [Changed(str(value), "as text", True), Changed(bytes(value), "as bytes")]
    if isinstance(value, (torch.dtype, torch.device)) or value is None:
        return []
    return [_bent(value, rng)]


def _field_changed(value: Any, rng: random.Random) -> Changed:
    """A field of a record or of a named tuple is another."""
    record = isinstance(value, Record)
    field = rng.choice([*value.__dataclass_fields__] if record else value._fields)
    inner = getattr(value, field)
    new = change(inner, rng)
    replace = value.replace if record else value._replace
    return Changed(replace(**{field: new.value}), f"{field}: {new.done}", new.same)


def _sequences(value: Any, rng: random.Random) -> list[Changed]:
    kind = type(value)
    found = [
        Changed(kind(), "empty"),
        Changed(kind([*value, *value]), "twice"),
        Changed(kind(value[:-1]), "one less"),
        Changed(kind(reversed(value)), "reversed"),
        Changed(iter(value), "iterator"),
        Changed(dict(enumerate(value)), "dict"),
    ]
    for _ in range(4):
        i = rng.randrange(len(value)) if value else 0
        if value:
            new = change(value[i], rng)
            items = [*value[:i], new.value, *value[i + 1 :]]
            found.append(Changed(kind(items), f"[{i}]: {new.done}", new.same))
    if value and all(isinstance(v, (int, float)) for v in value):
        found += [
            Changed(np.array(value), "numpy"),
            Changed(torch.tensor(value), "tensor"),
            Changed(torch.Size(value) if isinstance(value[0], int) else [value], "nested"),
            Changed(np.array(value)[::-1], "numpy reversed"),
        ]
    return found


def _bent(value: Any, rng: random.Random) -> Changed:
    """A copy of an object with one attribute changed; the attribute exists."""
    names = sorted(n for n in getattr(value, "__dict__", ()) if not n.startswith("_"))
    if not names:
        return Changed(Anything(), "object")
    if getattr(type(value), "__dataclass_params__", None) and value.__dataclass_params__.frozen:
        return Changed(Anything(), "object")  # it refuses a change itself
    bent = copy.copy(value)
    name = rng.choice(names)
    wrong = rng.choice([None, "abc", -1.0, torch.ones(2)])
    try:
        object.__setattr__(bent, name, wrong)
    except (AttributeError, TypeError):
        return Changed(Anything(), "object")
    return Changed(bent, f"{type(value).__name__} with {name} = {wrong!r}")


def change(value: Any, rng: random.Random) -> Changed:
    """Another value in the place of a valid one."""
    near: list[Changed] = []
    if rng.random() < 0.65:
        try:
            near = _changes(value, rng)
        except (RuntimeError, IndexError, TypeError, ValueError):
            near = []  # the change does not exist for this value, as t[0] of a 0-d one
    if near:
        return rng.choice(near)
    done = rng.choice(list(WILD))
    return Changed(WILD[done], f"wild {done}")


# --------------------------------------------------------------------------- what kinds say already

_NUMBERS = (int, float, np.integer, np.floating)


def excluded(kind: Any, value: Any) -> bool:
    """Whether an annotation rules a value out. What it does not speak of is not ruled out."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return all(excluded(k, value) for k in args)
    if origin is typing.Literal:
        return not isinstance(value, str) or str(value) not in args
    if kind is type(None) or kind is None:
        return value is not None
    if kind is bool:
        return not isinstance(value, (bool, np.bool_))
    if kind in (int, float):
        return _not_a_number(kind, value)
    if kind is str:
        return not isinstance(value, str)
    if kind is torch.Tensor:
        return not isinstance(value, torch.Tensor)
    if kind is torch.dtype:
        return not isinstance(value, torch.dtype)
    if kind is torch.device:  # None is torch's default device everywhere
        return value is not None and not isinstance(value, (str, torch.device, int))
    if kind is Path:
        return not isinstance(value, (str, Path))
    if origin is collections.abc.Callable or kind is collections.abc.Callable:
        return not callable(value)
    if origin in (collections.abc.Sequence, list, tuple):
        return isinstance(value, (str, bytes, dict, *_NUMBERS)) or not hasattr(value, "__len__")
    if typing.is_typeddict(kind):
        return not isinstance(value, dict)
    if isinstance(kind, type) and kind is not Any and not getattr(kind, "_is_protocol", False):
        return not isinstance(value, kind)
    return False


def _not_a_number(kind: Any, value: Any) -> bool:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim > 0
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, _NUMBERS):
        return True
    return kind is int and not isinstance(value, (int, np.integer))
