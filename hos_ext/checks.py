"""Checks of user input, and the words for them.

A public function checks its arguments once; what it calls trusts them. Every message reads
`function: argument rule, got value`. `where` is the name of the public function, and comes first.

    check(where, 0 < floor < 1, "floor must be in (0, 1)", floor)         any rule, in one line
    check_kind(where, "posterior", posterior, Posterior)                  a TypeError
    check_tensor(where, "factor", factor, like=x, shape=(len(x), size, "r"))
    check_shape(where, "x", x, ("B", "C", "*dims"))                       a letter fits any length
    check_samples(where, "x", x), check_like(where, "score", score, x)    (B, *dims), and as x
    check_low_rank(where, factor, sign, x)                                (B, D, r) and (r,)
    check_int, check_count, check_number, is_int, is_number, one_of       numbers and names
    positive(where, "sigma", sigma, x), per_sample(...)                   shaped to broadcast
    check_flag(where, central=central, ...)                               True or False, no other
    check_callable(where, "model", model)
    device_of, dtype_of, place_of, path_of, row_index, rows_at            what torch and files take
    with said_by(where, "normal"): ...                                    its errors name `where`
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

WIDE = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
FLOATING = (*WIDE, *HALF)

DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
Kind = TypeVar("Kind")


def show(value: Any) -> str:
    """What came, for an error message."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} {value.dtype} on {value.device}"
    return repr(value)


# ------------------------------------------------------------------------------------- any rule


def check(
    where: str, condition: object, rule: str, got: object, kind: type[Exception] = ValueError
) -> None:
    """Raises `where: rule, got got` where the condition is false.

    Args:
        where: the public function.
        condition: what must hold.
        rule: the argument and its rule, as "floor must be in (0, 1)". Under torch.compile a size
            must not be written into it: a string of a symbolic size would fix that size.
        got: what came. A tensor is shown by its shape, dtype and device; a function is called for
            it, so that a search for the worst entry costs nothing while all is well.
        kind: the class of the error.
    """
    if condition:
        return
    if isinstance(got, Tensor):
        got = show(got)
    elif callable(got) and not isinstance(got, type):
        got = got()
    raise kind(f"{where}: {rule}, got {got}")


def check_kind(
    where: str, name: str, value: object, kind: type[Kind] | tuple[type[Kind], ...]
) -> Kind:
    """The value, which is an instance of a class (or of one of several)."""
    if isinstance(value, kind):
        return value
    names = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
    rule = " or ".join(f"{'an' if n[0] in 'aeiou' else 'a'} {n}" for n in names)
    raise TypeError(f"{where}: {name} must be {rule}, got {kind_name(value)}")


def kind_name(value: object) -> str:
    """The class of what came, for an error message, with the way out of what is often mixed up."""
    name = type(value).__name__
    return f"{name} ({_WAYS_OUT[name]})" if name in _WAYS_OUT else name


_WAYS_OUT = {
    "ndarray": "torch.from_numpy makes a Tensor of it",
    "Scores": ".unscaled(sigma) has s1 and s2 in true units",
    "UnscaledScores": ".score is s1, and .scaled(sigma) makes Scores",
}


def one_of(where: str, name: str, value: object, known: Iterable[str]) -> str:
    """One of the names that are known."""
    if not isinstance(value, str) or value not in known:
        names = ", ".join(repr(k) for k in known)
        raise ValueError(f"{where}: {name} must be one of {names}, got {value!r}")
    return value


def check_flag(where: str, **flags: object) -> None:
    """True or False: the truth of another value is not asked for."""
    for name, value in flags.items():
        if value is not True and value is not False:
            raise TypeError(f"{where}: {name} must be True or False, got {show(value)}")


def check_callable(where: str, name: str, value: object) -> None:
    """Something to call: a function, a module."""
    if not callable(value):
        raise TypeError(f"{where}: {name} must be callable, got {type(value).__name__}")


def path_of(where: str, name: str, value: object) -> Path:
    """A path, from a Path or a text that is not empty."""
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{where}: {name} must be a path, got {type(value).__name__}")
    check(where, value != "" and "\0" not in str(value), f"{name} must be a path", repr(value))
    return Path(value)


def dtype_of(
    where: str, name: str, value: object, dtypes: Sequence[torch.dtype] = FLOATING
) -> torch.dtype:
    """A dtype, one of some; torch's default for None."""
    if value is None:
        value = torch.get_default_dtype()
    if isinstance(value, torch.dtype) and value in dtypes:
        return value
    allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{where}: {name} must be a dtype ({allowed}), got {show(value)}")
    raise ValueError(f"{where}: {name} must be {allowed}, got {value}")


def device_of(where: str, name: str, value: object) -> torch.device:
    """A device that is here; torch's default for None."""
    if value is None:
        return torch.empty(0).device
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{where}: {name} must be a device or its name, got {show(value)}")
    try:
        device = torch.device(value)
        if device.type not in ("cpu", "meta") and not torch.compiler.is_compiling():
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(
            f"{where}: {name} must be a device of this machine, got {str(value)!r}"
        ) from None
    return device


class said_by:
    """A context in which the errors of another public function name this one, and its arguments.

    Args:
        where: the function that the user called.
        inner: the one that it calls, and which checks.
        names: what the arguments of inner are called here.
    """

    def __init__(self, where: str, inner: str, **names: str) -> None:
        self.where, self.inner, self.names = where, f"{inner}: ", names

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, TypeError, RuntimeError)) and error.args:
            text = str(error.args[0])
            if text.startswith(self.inner):
                name, space, rule = text[len(self.inner) :].partition(" ")
                error.args = (f"{self.where}: {self.names.get(name, name)}{space}{rule}",)


def place_of(
    where: str, device: object, dtype: object, dtypes: Sequence[torch.dtype] = FLOATING
) -> tuple[torch.device | None, torch.dtype | None]:
    """A device, a floating dtype or both, as `Tensor.to` takes them; None is what is there."""
    if isinstance(device, torch.dtype):
        check(where, dtype is None, "one dtype must be given", f"{device} and {dtype}")
        device, dtype = None, device
    place = None if device is None else device_of(where, "device", device)
    return place, None if dtype is None else dtype_of(where, "dtype", dtype, dtypes)


# -------------------------------------------------------------------------------------- tensors

Shape = tuple[int | str, ...]  # a letter fits any length, and a last "*dims" one axis or more


def check_tensor(
    where: str,
    name: str,
    value: Any,
    *,
    like: Tensor | None = None,
    shape: Shape | None = None,
    dtypes: Sequence[torch.dtype] = WIDE,
    because: str = "",
) -> None:
    """A strided tensor of an allowed dtype; as `like` in dtype and device; of a given shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor, got {kind_name(value)}")
    rule: str
    got: object
    if value.layout is not torch.strided:
        rule, got = "be strided", value.layout
    elif value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        rule, got = f"have dtype {allowed}", value.dtype
    elif like is not None and value.dtype != like.dtype:
        rule, got = f"have dtype {like.dtype}{because}", value.dtype
    elif like is not None and value.device != like.device:
        rule, got = f"be on {like.device}{because}", value.device
    elif shape is not None and not fits(value, shape):
        rule, got = f"have shape {_shape_text(shape)}{because}", tuple(value.shape)
    else:
        return
    raise ValueError(f"{where}: {name} must {rule}, got {got}")


def check_shape(where: str, name: str, value: Tensor, *shapes: Shape) -> None:
    """One of some shapes."""
    for shape in shapes:
        if fits(value, shape):
            return
    rule = " or ".join(map(_shape_text, shapes))
    raise ValueError(f"{where}: {name} must have shape {rule}, got {tuple(value.shape)}")


def fits(value: Tensor, shape: Shape) -> bool:
    """Whether a tensor has a shape."""
    sizes = value.shape
    if sizes == shape:
        return True
    if len(sizes) != len(shape):
        many = bool(shape) and str(shape[-1]).startswith("*")
        if len(sizes) < len(shape) or not many:
            return False
    for size, wanted in zip(sizes, shape, strict=False):
        if wanted.__class__ is not str and wanted != size:
            return False
    return True


def _shape_text(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def row_index(where: str, index: Any, rows: int) -> Any:
    """A slice, or a tensor of row numbers or flags, for a batch of so many rows; a single number,
    also as a tensor without axes, becomes that row alone."""
    if isinstance(index, Tensor) and index.dim() == 0 and index.dtype == torch.int64:
        return index.reshape(1)
    if not is_int(index):
        if not isinstance(index, (slice, Tensor)):
            got = kind_name(index)
            raise TypeError(f"{where}: index must be an int, a slice or a Tensor, got {got}")
        return index
    inside = -rows <= index < rows
    check(where, inside, f"index must be a row of a batch of {rows}", index)
    row = int(index) % rows
    return slice(row, row + 1)


def rows_at(where: str, value: Tensor, index: Any) -> Tensor:
    """value[index], for a slice, or for a tensor of row numbers or of one flag a row."""
    if not isinstance(index, slice):
        check_tensor(where, "index", index, shape=("n",), dtypes=(torch.int64, torch.bool))
    try:
        return value[index]
    except (IndexError, TypeError, ValueError, RuntimeError):
        rule = f"index must be rows of a batch of {len(value)}"
        raise ValueError(f"{where}: {rule}, got {show(index)}") from None


def check_samples(where: str, name: str, x: Tensor) -> None:
    """What can be flattened to (B, D)."""
    check_tensor(where, name, x, shape=("B", "*dims"))


def check_like(where: str, name: str, value: Tensor, x: Tensor) -> None:
    """A value of the shape, dtype and device of x, which is data itself."""
    check_tensor(where, "x", x)
    check_tensor(where, name, value, like=x, shape=tuple(x.shape))


def check_low_rank(
    where: str, factor: Any, sign: Any, x: Tensor, *, because: str = ""
) -> Tensor | None:
    """U (B, D, r) with the batch of x (B, *dims), or None; gives sign (r,) of +-1 in x's dtype.

    The factor of one sample does not stand for all. sign may have any real dtype; None is all +1.
    """
    rank = 0
    if factor is not None:
        check_tensor(where, "factor", factor, like=x)
        shape = (*x.shape[:1], x.shape[1:].numel(), "r")
        check_tensor(where, "factor", factor, shape=shape, because=because)
        rank = factor.shape[2]
    if sign is None:
        return None
    check_kind(where, "sign", sign, Tensor)
    check_shape(where, "sign", sign, (rank,))
    check(where, sign.layout is torch.strided, "sign must be strided", sign.layout)
    check(where, sign.device == x.device, f"sign must be on {x.device}", sign.device)
    check(where, not sign.is_complex(), "sign must be real", sign.dtype)
    signs: Tensor = sign.detach().to(x.dtype)
    units = (signs.abs() == 1).all()
    check(where, not sign.is_meta, "sign must hold values", "a meta tensor")
    check(where, bool(units), "sign must hold +1 and -1 only", lambda: sign.tolist())
    return signs


# -------------------------------------------------------------------- numbers, one or one a sample


def check_positive(where: str, name: str, value: Any, rows: int, like: Tensor) -> Any:
    """A positive finite number, or a floating `()` or `(B,)` tensor without gradient."""
    if value.__class__ is float and 0.0 < value < math.inf:
        return value
    return check_level(where, name, value, rows, like, positive=True)


def check_level(
    where: str, name: str, value: Any, rows: int, like: Tensor, *, positive: bool
) -> Any:
    """The same, or any finite number; the values of a tensor are for the kernels to judge."""
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point or value.layout is not torch.strided:
            rule, got = "floating", str(value.dtype)
            if value.layout is not torch.strided:
                rule, got = "strided", str(value.layout)
            raise ValueError(f"{where}: {name} must be {rule}, got {got}")
        _check_rows(where, name, value, (rows,), like, f"() or ({rows},)")
        if value.requires_grad:
            raise ValueError(f"{where}: {name} must not require grad, got requires_grad=True")
        return value
    if value.__class__ is not float and (
        isinstance(value, bool)
        or not isinstance(
            value, (float, int, np.floating, np.integer, torch.SymFloat, torch.SymInt)
        )
    ):
        raise TypeError(f"{where}: {name} must be a float or a Tensor, got {kind_name(value)}")
    number = as_float(value) if isinstance(value, (int, np.floating, np.integer)) else value
    if not ((number > 0 if positive else number > -math.inf) and number < math.inf):
        rule = "positive and finite" if positive else "finite"
        raise ValueError(f"{where}: {name} must be {rule}, got {value}")
    return number


def _check_rows(
    where: str, name: str, value: Tensor, rows: tuple[int, ...], like: Tensor, shapes: str
) -> None:
    """A 0-d tensor, which may lie on the CPU as everywhere in torch, or one value a row."""
    if value.dim() > 0 and tuple(value.shape) != rows:
        rule, got = f"be a float or have shape {shapes}", str(tuple(value.shape))
    elif value.device != like.device and not (value.dim() == 0 and value.device.type == "cpu"):
        rule, got = f"be on {like.device}", str(value.device)
    else:
        return
    raise ValueError(f"{where}: {name} must {rule}, got {got}")


def refuse_row(where: str, name: str, row: int, values: Tensor | float) -> None:
    """Raises for what the kernel reported: row - 1 is the sample with a bad value."""
    if row and isinstance(values, Tensor):
        got = f"{values[row - 1].item()} for sample {row - 1}"
        raise ValueError(f"{where}: {name} must be positive and finite, got {got}")


def per_sample(where: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A float, 0-d or `(B,)` value in like's dtype, shaped to broadcast against `like (B, ...)`.

    Raises:
        TypeError: value is neither a real number nor a Tensor.
        ValueError: its shape, dtype or device does not fit, or it is not finite.
    """
    if isinstance(value, Tensor):
        check_tensor(where, name, value, dtypes=FLOATING)
        rows = tuple(like.shape[:1])
        _check_rows(where, name, value, rows, like, str(rows))
    elif not is_number(value):
        raise TypeError(f"{where}: {name} must be a float or a Tensor, got {kind_name(value)}")
    elif isinstance(value, int):
        value = as_float(value)
    column = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    _check_all(where, column.isfinite(), f"{name} must be finite", column)
    return column if column.dim() == 0 else column.reshape(-1, *[1] * (like.dim() - 1))


def positive(where: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """As `per_sample`, and positive."""
    column = per_sample(where, name, value, like)
    _check_all(where, column > 0, f"{name} must be positive", column)
    return column


def _check_all(where: str, good: Tensor, rule: str, values: Tensor) -> None:
    if good.is_meta:
        rule = rule.replace("must", "must have values and", 1)
        raise ValueError(f"{where}: {rule}, got a meta tensor")
    check(where, bool(good.all()), rule, lambda: values[~good].flatten()[0].item())


def as_float(value: Any) -> float:
    """A real number as a float; an int beyond all floats is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_number(where: str, name: str, value: object, *, positive: bool = True) -> float:
    """A finite number, positive or at least not negative; a 0-d tensor counts as a number."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{where}: {name} must be a number, got {kind}")
    number = as_float(value)
    fine = 0 < number < math.inf or (number == 0 and not positive)
    check(where, fine, f"{name} must be finite and {'> 0' if positive else '>= 0'}", f"{number:g}")
    return number


def range_of(where: str, name: str, value: object) -> tuple[float, float]:
    """(low, high) with 0 < low <= high; a tuple, a list, an array of numpy."""
    pair = isinstance(value, (tuple, list, np.ndarray)) and len(value) == 2
    check(where, pair, f"{name} must be (low, high)", lambda: show(value), TypeError)
    low, high = (check_number(where, name, v) for v in value)  # type: ignore[attr-defined]
    check(where, low <= high, f"{name} must be (low, high), low <= high", lambda: show(value))
    return low, high


def is_int(value: object) -> bool:
    """Whether a value is an int, of Python or of numpy; a bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is an int or a float, of Python or of numpy; a bool is none."""
    return is_int(value) or isinstance(value, (float, np.floating))


def check_int(where: str, name: str, value: Any, limit: int) -> int:
    """An int from 0 up, below a power of two; one of numpy's is given back as Python's."""
    whole: Any = value
    if value.__class__ is not int and isinstance(value, np.integer):
        whole = value = int(value)
    if value.__class__ is not int and (
        isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))
    ):
        raise TypeError(f"{where}: {name} must be an int, got {type(value).__name__}")
    if value < 0 or value >= limit:
        power = limit.bit_length() - 1
        raise ValueError(f"{where}: {name} must be in [0, 2**{power}), got {value}")
    return whole  # type: ignore[no-any-return]


def check_count(where: str, name: str, value: Any, *, least: int = 1, limit: int = 2**31) -> int:
    """An int of at least `least`, below `limit`."""
    number = check_int(where, name, value, limit)
    if number < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {number}")
    return number


def check_seed(
    where: str, seed: Any, *, offset: Any = 0, first: Any = 0
) -> tuple[int | None, int, int]:
    """Where noise begins, as ints; looked at whether it is drawn or not. A seed may be None."""
    return (
        None if seed is None else check_int(where, "seed", seed, 2**64),
        check_int(where, "offset", offset, 2**56),
        check_int(where, "first", first, 2**63),
    )


def check_first(where: str, first: Any, shape: Sequence[int]) -> int:
    """The global index of row 0; the index of every element must fit 64 bits."""
    if first.__class__ is int and first == 0:
        return 0
    rows, size = shape[0] if shape else 1, math.prod(shape[1:])
    row: int = check_int(where, "first", first, 2**63)
    first = row
    if first.__class__ is int and first and (first + rows) * size > 2**64:
        rule = f"first must leave room for {rows} rows of {size} below 2**64"
        raise ValueError(f"{where}: {rule}, got {first}")
    return row


# --------------------------------------------------------------------------- precision and models


def refuse_half(where: str, x0: Tensor) -> None:
    """The second difference of psi is divided by sigma^2, and its rounding errors with it."""
    rule, dtype = "variance reduction needs float32 or float64", autocast_to(x0)
    check(where, x0.dtype not in HALF, rule, f"x0 {x0.dtype}")
    check(where, dtype is None, rule, f"autocast to {dtype}")


def autocast_to(x: Tensor) -> torch.dtype | None:
    """The half precision that autocast brings products to, where it is on."""
    if not torch.is_autocast_enabled(x.device.type):
        return None
    dtype = torch.get_autocast_dtype(x.device.type)
    return dtype if dtype in HALF else None


def refuse_dropout(where: str, model: object) -> None:
    """No dropout at work, where several points are visited."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if module.training and isinstance(module, DROPOUT) and module.p > 0:
            raise ValueError(
                f"{where}: dropout must be off when several points are visited (its masks differ "
                f"between them), got p = {module.p} in {path or type(module).__name__!r}"
            )


# Which extra brings a package that is imported only where it is needed.
EXTRAS = {
    "accelerate": "cli",
    "arviz_base": "cli",
    "arviz_stats": "cli",
    "datasets": "cli",
    "fsspec": "cli",
    "h5netcdf": "cli",
    "h5py": "cli",
    "matplotlib": "cli",
    "pyarrow": "cli",
    "rich": "cli",
    "sklearn": "cli",
    "tomli": "cli",
    "typer": "cli",
    "xarray": "cli",
    "yaml": "cli",
    "PIL": "images",
    "diffusers": "images",
    "huggingface_hub": "hub",
    "tensorboard": "track",
    "azula": "adapters",
    "deepinv": "adapters",
    "linear_operator": "adapters",
}


def require(where: str, module: str, extra: str | None = None) -> Any:
    """An optional dependency, imported; a missing one is named with what brings it.

    Args:
        where: the public function that needs it.
        module: its name for `import`.
        extra: of hos_ext; None is the one in `EXTRAS`, or the package itself where none has it.

    Raises:
        RuntimeError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        extra = extra or EXTRAS.get(package)
        wanted = package if extra is None else f"hos_ext[{extra}]"
        raise RuntimeError(
            f"{where}: {module} must be installed (pip install {wanted}), got: {error}"
        ) from error
