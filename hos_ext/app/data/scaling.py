"""From raw values to data units and back, and how large data are.

8-bit data are whole levels, spread over [-1, 1) by uniform noise. Whole levels have no density, and
a score exists for densities only: without that noise the posterior variance of a constant pixel
would be zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import check, check_tensor
from ...ops.noise import draw_uniform
from ...random import STREAM_DEQUANTISE, Key
from .rows import check_set

GREY_LEVELS = 17
_STATISTICS_ROWS, _STATISTICS_VALUES = 8192, 2**27


class Scaling(NamedTuple):
    """From raw values to data units and back. Plain numbers: exact in JSON.

    Whole levels 0 ... levels - 1: x = 2 (raw + u) / levels - 1, u uniform on [0, 1). Other data
    (levels 0): x = (raw - mean) / std. Of a table mean and std are tuples, a number for each
    column.

    Example:
        >>> import torch
        >>> from hos_ext.app.data import Scaling
        >>> grey = torch.arange(4, dtype=torch.uint8).reshape(1, 4)
        >>> scaling = Scaling(levels=256)
        >>> scaling.inverse(scaling.forward(grey, seed=0))
        tensor([[0., 1., 2., 3.]])
        >>> Scaling(mean=1e6, std=2.0).inverse(torch.tensor([0.1])).dtype
        torch.float64
    """

    levels: int = 0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0

    @property
    def scale(self) -> float | tuple[float, ...]:
        """Raw units in one data unit: multiplies a std, its square a covariance."""
        return self.levels / 2 if self.levels else self.std

    @property
    def shift(self) -> float | tuple[float, ...]:
        """E[raw | x] = scale x + shift; for whole levels the mean 1/2 of u is taken off."""
        return (self.levels - 1) / 2 if self.levels else self.mean

    @property
    def by_column(self) -> bool:
        """Whether each column of a table has a scale of its own."""
        return isinstance(self.scale, tuple)

    def forward(self, raw: Tensor, *, seed: int, offset: int = 0, first: int = 0) -> Tensor:
        """Raw values in data units.

        Args:
            raw: shape (B, *dims), uint8, float32 or float64.
            seed: key of u.
            offset: second key, such as the step of a training run.
            first: global index of row 0.

        Returns:
            float32, shape and device of raw.

        Raises:
            TypeError: raw is not a tensor.
            ValueError: raw has another dtype.
        """
        dtypes = (torch.uint8, torch.float32, torch.float64)
        check_tensor("Scaling.forward", "raw", raw, dtypes=dtypes)
        if self.levels:
            return dequantise(
                raw.float(), seed=seed, offset=offset, first=first, levels=self.levels
            )
        wide = raw.double()
        return ((wide - _like(self.mean, wide)) / _like(self.std, wide)).float()

    def inverse(self, x: Tensor) -> Tensor:
        """Raw values of x: the nearest whole level, in the dtype of x, or std x + mean in float64.

        A mean far above the spread, or a tiny spread, would be lost in float32. Of whole levels,
        in float32 about one of 10^5 values lies so close to the edge of its level that it rounds
        into the next one.
        """
        check_tensor("Scaling.inverse", "x", x)
        return to_grey(x, levels=self.levels) if self.levels else self.raw_mean(x)

    def raw_mean(self, mean: Tensor) -> Tensor:
        """E[raw] of a mean in data units, scale mean + shift. Shape of mean, float64."""
        wide = mean.double()
        return wide * _like(self.scale, wide) + _like(self.shift, wide)

    def raw_std(self, std: Tensor) -> Tensor:
        """A standard deviation, or a difference, in raw units. Shape of std, float64."""
        wide = std.double()
        return wide * _like(self.scale, wide)

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint: `Scaling.from_dict(json.loads(json.dumps(s.as_dict()))) == s`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self._asdict().items()}

    @classmethod
    def from_dict(cls, content: Any) -> Scaling:
        """Back from `as_dict`.

        Raises:
            ValueError: content is not what `as_dict` gives.
        """
        fields = isinstance(content, dict) and set(content) == set(cls._fields)
        values: list[Any] = [content[n] if fields else None for n in cls._fields]
        levels, mean, std = values
        fits = type(levels) is int and levels >= 0 and type(mean) is type(std) is list
        means, stds = (mean, std) if fits else ([mean], [std])
        fits = (
            type(levels) is int
            and all(type(number) in (int, float) for number in (*means, *stds))
            and levels >= 0
            and len(means) == len(stds) > 0
            and all(map(math.isfinite, means))
            and all(0 < each < math.inf for each in stds)
        )
        rule = "content must hold levels, mean and std > 0"
        check("Scaling.from_dict", fits, rule, repr(content))
        if type(mean) is list:
            return cls(levels, tuple(map(float, means)), tuple(map(float, stds)))
        return cls(levels, float(mean), float(std))


def _like(numbers: float | tuple[float, ...], wide: Tensor) -> float | Tensor:
    """One number, or one for each entry of the last axis."""
    return wide.new_tensor(numbers) if isinstance(numbers, tuple) else numbers


def dequantise(
    grey: Tensor, *, seed: int, offset: int = 0, first: int = 0, levels: int = GREY_LEVELS
) -> Tensor:
    """2 (grey + u) / levels - 1 with u uniform on [0, 1): a sample with a density, in data units.

    Args:
        grey: whole grey levels 0 ... levels - 1. Shape (B, *dims), float32 or float64.
        seed: key of u.
        offset: second key, such as the step of a training run.
        first: global index of row 0.
        levels: 17 for digits, 256 for 8-bit data.

    Returns:
        Shape, dtype and device of grey, in [-1, 1]. NaN gives NaN.

    Raises:
        TypeError: grey is not a tensor.
        ValueError: grey has another dtype.

    Example:
        >>> import torch
        >>> from hos_ext.app.data import dequantise, to_grey
        >>> grey = torch.tensor([[0.0, 16.0]])
        >>> to_grey(dequantise(grey, seed=0))
        tensor([[ 0., 16.]])
    """
    check_tensor("dequantise", "grey", grey)
    u = draw_uniform(Key(seed, offset, first), STREAM_DEQUANTISE, grey.shape, grey)
    return (grey + u) * (2 / levels) - 1


def to_grey(x: Tensor, *, levels: int = GREY_LEVELS) -> Tensor:
    """The grey level that a pixel in data units belongs to: the inverse of `dequantise`.

    Values outside [-1, 1) go to the nearest level. Shape and dtype of x.
    """
    return ((x + 1) * (levels / 2)).floor().clamp(0, levels - 1)


def statistics_rows(shape: tuple[int, ...]) -> int:
    """How many rows of this shape the statistics of a large set are of."""
    return max(1, min(_STATISTICS_ROWS, _STATISTICS_VALUES // math.prod(shape)))


def standardise(spec: str, chunks: Iterable[Tensor]) -> Scaling:
    """One mean and one standard deviation, in float64, of chunks merged one by one."""
    n, mean, squares = 0, 0.0, 0.0
    for chunk in chunks:
        values = chunk.double()
        more, step = values.numel(), float(values.mean()) - mean
        squares += float((values - values.mean()).square().sum())
        squares += step**2 * n * more / (n + more)
        n += more
        mean += step * more / n
    std = math.sqrt(squares / n)
    check_set(spec, 0 < std < math.inf, "vary", f"standard deviation {std}")
    return Scaling(mean=mean, std=std)


def chosen_scaling(
    spec: str,
    levels: int,
    chunks: Iterable[Tensor],
    wanted: Scaling | str | None,
    columns: Sequence[str] = (),
) -> Scaling:
    """The scaling of data: as given, of whole levels, standardised, or none.

    Args:
        spec: for messages.
        levels: of whole levels, 0 for floating data.
        chunks: rows that are standardised by.
        wanted: a scaling, "standardise", or None for floating data as they are.
        columns: of a table, each of which is standardised by itself.
    """
    if isinstance(wanted, Scaling):
        rule = f"scaling must have {levels} levels as {spec}"
        check("open_source", wanted.levels == levels, rule, wanted.levels)
        return wanted
    if levels or wanted is None:
        return Scaling(levels=levels)
    if not columns:
        return standardise(spec, chunks)
    kept = list(chunks)
    each = [
        standardise(f"{spec}, column {name!r},", (chunk[:, k] for chunk in kept))
        for k, name in enumerate(columns)
    ]
    means, stds = (tuple(float(getattr(one, part)) for one in each) for part in ("mean", "std"))
    return Scaling(mean=means, std=stds)


def root_mean_square(scaling: Scaling, chunks: Iterable[Tensor]) -> float:
    """Of all values of the chunks, in data units."""
    n, total = 0, 0.0
    for chunk in chunks:
        x = scaling.forward(chunk, seed=0, first=n)
        total += float(x.double().square().mean()) * len(x)
        n += len(x)
    return math.sqrt(total / n)
