"""Records: what functions return. Frozen dataclasses of tensors, read by their names.

A record says what it is in a line, moves as a tensor does (`to`), is changed by a copy (`replace`)
and is cut along its batch (`record[3:5]`). It does not unpack: `a, b = record` would bind rows to
the names of fields without a word.

Every record is a node of torch's trees. So `torch.func`, `torch.compile`, `torch.export` and DDP
see the tensors inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

from .checks import check, place_of, row_index, rows_at

Own = TypeVar("Own", bound="Record")
OwnRows = TypeVar("OwnRows", bound="RowRecord")


# ------------------------------------------------------------------------------------ torch's trees


def register_tree(
    cls: type,
    names: Callable[[Any], Iterable[str]],
    make: Callable[[Iterable[Any], Iterable[str]], Any],
) -> None:
    """Makes the instances of a class nodes of torch's trees, with their attributes as children.

    An attribute that is None is no child.

    Args:
        cls: the class itself; a subclass is another.
        names: the attributes of an instance.
        make: an instance from the values of some attributes and their names; no checks, since the
            values may be anything.

    Example:
        >>> import torch
        >>> from torch.utils import _pytree
        >>> from hos_ext import Scores
        >>> len(_pytree.tree_leaves(Scores(torch.zeros(1, 2), torch.ones(1, 2))))
        2
    """

    def flatten(value: Any) -> tuple[list[Any], list[str]]:
        kept = [name for name in names(value) if getattr(value, name) is not None]
        return [getattr(value, name) for name in kept], kept

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], list[str]]:
        children, kept = flatten(value)
        keys = [_pytree.GetAttrKey(name) for name in kept]
        return list(zip(keys, children, strict=True)), kept

    _pytree.register_pytree_node(
        cls,
        flatten,
        make,
        flatten_with_keys_fn=flatten_with_keys,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


# ------------------------------------------------------------------------------------ the records


class Record:
    """Base of the frozen dataclasses that functions return.

    Example:
        >>> import torch
        >>> from hos_ext import Scores
        >>> scores = Scores(torch.zeros(8, 3), torch.ones(8, 3))
        >>> scores
        Scores(8 x (3,), rank 0)
        >>> scores.to(torch.float64).replace(c=torch.zeros(8, 3)).c.shape
        torch.Size([8, 3])
    """

    if TYPE_CHECKING:  # what `dataclass` gives to each
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    else:

        def __iter__(self) -> Any:
            names = ", ".join(self.__dataclass_fields__)
            rule = f"the fields must be read by name ({names})"
            raise TypeError(f"{type(self).__name__}: {rule}, got an iteration or an unpacking")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)

        def make(values: Iterable[Any], names: Iterable[str]) -> Any:
            given = dict.fromkeys(cls.__dataclass_fields__)
            return cls(**{**given, **dict(zip(names, values, strict=True))})

        register_tree(cls, lambda record: record.__dataclass_fields__, make)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._summary()})"

    def _summary(self) -> str:
        """What the record is, in a few words."""
        return ", ".join(
            f"{name} {_shape(value)}"
            for name in self.__dataclass_fields__
            if (value := getattr(self, name)) is not None
        )

    def replace(self: Own, **changes: Any) -> Own:
        """A copy with other values in some fields.

        Raises:
            TypeError: there is no field of that name.
        """
        where, names = f"{type(self).__name__}.replace", ", ".join(self.__dataclass_fields__)
        for name in changes:
            known = name in self.__dataclass_fields__
            check(where, known, f"fields must be among {names}", name, TypeError)
        return dataclasses.replace(self, **changes)

    def to(
        self: Own,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Own:
        """The same on another device or in another floating dtype: `to("cuda")`,
        `to(torch.float64)`, `to("cuda", torch.float64)`. Flags and counts keep their dtype.

        Raises:
            TypeError: device is no device and dtype no dtype.
            ValueError: dtype is not floating.
        """
        place, kind = place_of(f"{type(self).__name__}.to", device, dtype)
        fields = {name: moved(getattr(self, name), place, kind) for name in self._names()}
        return self.replace(**fields)

    def _names(self) -> Iterable[str]:
        return self.__dataclass_fields__


class RowRecord(Record):
    """A record with a batch: every field but some has its rows along the first axis.

    Attributes:
        shared: the fields that all rows share.

    Example:
        >>> import torch
        >>> from hos_ext import Scores
        >>> scores = Scores(torch.zeros(8, 3), torch.ones(8, 3))
        >>> len(scores), scores[3:5], scores[scores.c.sum(1) > 5]
        (8, Scores(2 x (3,), rank 0), Scores(0 x (3,), rank 0))
    """

    shared: ClassVar[tuple[str, ...]] = ("sign",)

    def __len__(self) -> int:
        return len(getattr(self, next(iter(self._names()))))

    def __getitem__(self: OwnRows, index: int | slice | Tensor) -> OwnRows:
        """Some rows: a slice, a tensor of row numbers or of one flag a row. A single number keeps
        the batch axis: `record[3]` is `record[3:4]`.

        Raises:
            TypeError: index is of another kind.
            ValueError: index does not fit the batch.
        """
        where = f"{type(self).__name__}[index]"
        rows = row_index(where, index, len(self))
        fields = {
            name: taken(where, getattr(self, name), rows)
            for name in self._names()
            if name not in self.shared
        }
        return self.replace(**fields)


# ------------------------------------------------------------------------------- inside a record


def moved(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """A field on another device or in another dtype.

    Example:
        >>> import torch
        >>> from hos_ext.records import moved
        >>> moved({"x": torch.ones(1), "n": torch.tensor(3)}, None, torch.float64)
        {'x': tensor([1.], dtype=torch.float64), 'n': tensor(3)}
    """
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: moved(each, device, dtype) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(moved(each, device, dtype) for each in value)
    return value.to(device, dtype) if hasattr(value, "to") else value


def taken(where: str, value: Any, index: slice | Tensor) -> Any:
    """Some rows of a field.

    Example:
        >>> import torch
        >>> from hos_ext.records import taken
        >>> taken("f", (torch.arange(4), None), slice(1, 3))
        (tensor([1, 2]), None)
    """
    if isinstance(value, Tensor):
        return rows_at(where, value, index)
    if isinstance(value, tuple):
        return tuple(taken(where, each, index) for each in value)
    if isinstance(value, RowRecord):
        return value[index]
    return value.rows(index) if hasattr(value, "rows") else value


def sizes(value: Any, *others: str) -> str:
    """The sizes of a batch and what is unusual about it, for a repr.

    Example:
        >>> import torch
        >>> from hos_ext.records import sizes
        >>> sizes(torch.zeros(8, 1, 28, 28)), sizes(torch.zeros(2, 3).double(), "rank 0")
        ('8 x (1, 28, 28)', '2 x (3,), rank 0, float64')
    """
    if not isinstance(value, Tensor):
        return ", ".join([type(value).__name__, *others])
    batch = f"{value.shape[0]} x {tuple(value.shape[1:])}" if value.dim() else "()"
    return ", ".join([batch, *others, *unusual(value)])


def unusual(value: Any) -> list[str]:
    """Dtype and device, where they are not float32 and the CPU.

    Example:
        >>> import torch
        >>> from hos_ext.records import unusual
        >>> unusual(torch.zeros(1)), unusual(torch.zeros(1, dtype=torch.float64))
        ([], ['float64'])
    """
    dtype = [] if value.dtype == torch.float32 else [str(value.dtype).removeprefix("torch.")]
    return dtype if value.device.type == "cpu" else [*dtype, str(value.device)]


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    return repr(value) if isinstance(value, (int, float, str, Record)) else type(value).__name__
