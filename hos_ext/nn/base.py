"""What the networks share: the noise level as they see it, the three heads, and their files."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import (
    FLOATING,
    check,
    check_flag,
    check_level,
    check_like,
    check_number,
    check_shape,
    check_tensor,
    device_of,
    dtype_of,
    is_int,
    kind_name,
    one_of,
    path_of,
    said_by,
    show,
)
from ..ops._operator import functorch_active, is_plain
from ..scores import Scores
from .hub import Download, OnHub, local_folder
from .weights import HOLD, WEIGHTS, arguments_of, check_folder, read_weights, write_weights

_Network = TypeVar("_Network", bound="Network")

KINK = "twice differentiable: at a kink variance reduction fails"


class NoiseLevel(NamedTuple):
    """Constants of the noise levels of a batch, each `(B,)`, with v = sigma^2 + sigma_data^2.

    Attributes:
        log_ratio: log(sigma / sigma_data).
        inverse_std: 1 / sqrt(v). It brings noisy samples to unit scale.
        skip: sigma / v. The scaled score of Gaussian data is -skip x.
        k: sigma_data / sqrt(v). What is learned fades with it as sigma grows.
    """

    log_ratio: Tensor
    inverse_std: Tensor
    skip: Tensor
    k: Tensor


class Network(OnHub, nn.Module):
    """A network with the three heads of `Scores`. The subclass brings the body.

    A subclass names itself in `class_name`, calls `__init__`, sets `_shape` (of one sample as its
    body sees it) and `config`, makes its body, and hands its last layers to `_set_heads`. It
    defines `_features`, `_raw_score` and `_factor`.

    Args:
        dims, rank, trunk, sigma_data, constrained, c_min, given_score, num_classes: as `MLP`
            describes them.
    """

    class_name: ClassVar[str]
    config: dict[str, Any]
    score: nn.Linear | nn.Conv2d | nn.Conv3d
    c: nn.Linear | nn.Conv2d | nn.Conv3d
    factor: nn.Linear | nn.Conv2d | nn.Conv3d

    def __init__(
        self,
        dims: Sequence[int],
        rank: int,
        *,
        trunk: str,
        sigma_data: float,
        constrained: bool,
        c_min: float,
        given_score: bool,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        name = self.class_name
        check_flag(name, constrained=constrained, given_score=given_score)
        dims = check_sizes(name, "dims", dims)
        rank = check_size(name, "rank", rank, least=0)
        sigma_data = check_number(name, "sigma_data", sigma_data)
        c_min = check_number(name, "c_min", c_min, positive=False)
        one_of(name, "trunk", trunk, ("separate", "shared"))
        if num_classes is not None:
            num_classes = check_size(name, "num_classes", num_classes)
        self.dims = tuple(dims)
        self.rank = rank
        self.sigma_data = sigma_data
        self.constrained = constrained
        self.c_min = c_min
        self.given_score = given_score
        self.num_classes = num_classes
        self._size = math.prod(dims)
        self._shape: tuple[int, ...] = self.dims

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of what the network takes besides x, sigma and a given score."""
        return () if self.num_classes is None else ("label",)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        scaled_score: Tensor | None = None,
        *,
        label: Tensor | None = None,
    ) -> Scores:
        """Scaled scores at noise level sigma.

        Args:
            x: noisy samples. Shape (B, *dims), dtype and device of the parameters. Data units.
            sigma: noise standard deviation, > 0 (a tensor is not checked for it, and gives NaN).
                Float or shape (B,). Data units.
            scaled_score: the known sigma * s1, as x, for a model with given_score. No units.
            label: classes, for a model with num_classes. Shape (B,), int64, from 0 to num_classes,
                the last of which means no class (on an accelerator it is not checked for it, as
                that would wait for the device). None is no class for any sample.

        Returns:
            Scores, without units: scaled_score sigma * s1 and c, shape (B, *dims); factor
            sigma * U, shape (B, D, r), or None. Of the factor's axes r is fastest in memory for an
            MLP and D for a UNet, where it is a view of a convolution's channels.

        Raises:
            TypeError: x, scaled_score or label is not a tensor.
            ValueError: x, sigma, scaled_score or label has another shape, dtype or device, a float
                sigma is not > 0, a label is out of range, or scaled_score or label is given where
                it must not be, or a scaled_score is missing.
        """
        self._check_input(x, scaled_score)
        label = self._checked_label(x, label)
        level = noise_level(self.class_name, x, sigma, self.sigma_data)
        column = (-1, *[1] * len(self._shape))
        inverse_std, skip, k = (each.view(column) for each in level[1:])
        rows = x.reshape(x.shape[0], *self._shape)
        inputs = rows * inverse_std
        if scaled_score is not None:
            inputs = torch.cat([inputs, scaled_score.reshape(rows.shape)], 1)
        for_score, for_c, for_factor = self._features(inputs, level, label)
        if scaled_score is None:
            scaled_score = (self._raw_score(for_score, k) - skip * rows).reshape(x.shape)
        c = c_head(self.c(for_c), k, self.constrained, self.c_min).reshape(x.shape)
        return Scores(scaled_score, c, self._factor(for_factor, k) if self.rank else None)

    @abstractmethod
    def _features(
        self, inputs: Tensor, level: NoiseLevel, label: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the last layers of score, c and factor see. label is None without num_classes."""

    @abstractmethod
    def _raw_score(self, features: Tensor, k: Tensor) -> Tensor:
        """k times what is learned of the score, in the shape of the body."""

    @abstractmethod
    def _factor(self, features: Tensor, k: Tensor) -> Tensor:
        """sigma U, `(B, D, r)`: k times what is learned of it."""

    def _place(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Moves the finished network; None is torch's default. Initial weights are those of the
        CPU in torch's default dtype, rounded, wherever they go."""
        name = self.class_name
        place = None if device is None else device_of(name, "device", device)
        self.to(place, None if dtype is None else dtype_of(name, "dtype", dtype))

    def _set_heads(
        self,
        score: nn.Linear | nn.Conv2d | nn.Conv3d | None,
        c: nn.Linear | nn.Conv2d | nn.Conv3d,
        factor: nn.Linear | nn.Conv2d | nn.Conv3d | None,
    ) -> None:
        """Takes the last layers. Score and c start at zero, the factor with small columns."""
        if score is not None:
            self.score = score
        self.c = c
        for layer in (score, c):
            for parameter in () if layer is None else layer.parameters():
                nn.init.zeros_(parameter)
        if factor is not None:
            self.factor = factor
            with torch.no_grad():  # columns of norm a few tenths, whatever D
                factor.weight.mul_(self._size**-0.5)

    def _make_config(self, **own: Any) -> dict[str, Any]:
        """The arguments as plain JSON: those of the class between those that all networks have."""
        return {
            "_class_name": self.class_name,
            "dims": list(self.dims),
            "rank": self.rank,
            **own,
            "sigma_data": float(self.sigma_data),
            "constrained": bool(self.constrained),
            "c_min": float(self.c_min),
            "given_score": bool(self.given_score),
            "num_classes": self.num_classes,
        }

    def _check_input(self, x: Tensor, scaled_score: Tensor | None) -> None:
        name, dtype = self.class_name, self.c.weight.dtype
        check(name, isinstance(x, Tensor), "x must be a tensor", lambda: kind_name(x), TypeError)
        if x.shape[1:] != self.dims:
            check_shape(name, "x", x, ("B", *self.dims))
        # Autocast brings x and the parameters to one dtype itself.
        if x.dtype != dtype:
            fine = torch.is_autocast_enabled(x.device.type)
            check(name, fine, f"x must be {dtype} like the parameters", x.dtype)
        rule = "given (the model has given_score=True)" if self.given_score else "None"
        fine = self.given_score == (scaled_score is not None)
        check(name, fine, f"scaled_score must be {rule}", scaled_score)
        if scaled_score is not None:
            check_like(name, "scaled_score", scaled_score, x)

    def _checked_label(self, x: Tensor, label: Tensor | None) -> Tensor | None:
        """The label of every sample; where there is none, the one that means no class."""
        name, last = self.class_name, self.num_classes
        if last is None:
            rule = "label must be None (the model has no num_classes)"
            check(name, label is None, rule, lambda: show(label))
            return None
        if label is None:
            return torch.full((x.shape[0],), last, device=x.device)
        got = type(label).__name__
        check(name, isinstance(label, Tensor), "label must be a Tensor", got, TypeError)
        fine = label.dtype == torch.int64 and label.dim() == 1 and label.shape[0] == x.shape[0]
        rule = "label must be int64 of shape (B,) like x"
        check(name, fine, rule, lambda: show(label))
        check(name, label.device == x.device, "label must be on the device of x", label.device)
        if label.device.type != "cpu" or torch.compiler.is_compiling():
            return label
        if functorch_active() or not is_plain(label):
            return label
        good = (label >= 0) & (label <= last)
        rule = f"label must be in [0, {last}] ({last} is no class)"
        check(name, good.all(), rule, lambda: int(label[~good][0]))
        return label

    # ------------------------------------------------------------------------------------- files

    def saved_config(self) -> dict[str, Any]:
        """The config from which the network can be made again."""
        return self.config

    def save_pretrained(self, folder: Path | str, **extra: Any) -> str:
        """Writes config.json and model.safetensors, as `save_model` does. Returns the folder."""
        path = path_of(f"{self.class_name}.save_pretrained", "folder", folder)
        write_weights(path, self.saved_config(), self.state_dict(), extra)
        return str(folder)

    @classmethod
    def from_pretrained(
        cls: type[_Network],
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: Path | str | None = None,
        local_files_only: bool = False,
    ) -> _Network:
        """Reads what `save_pretrained` or `push_to_hub` wrote. The model is in eval mode.

        Args:
            folder, device, revision, token, cache_dir, local_files_only: as in `load_model`.

        Raises:
            ValueError: the folder holds a model of another class, or what `load_model` refuses.
            RuntimeError: what `load_model` raises.
        """
        name = cls.class_name
        where = f"{name}.from_pretrained"
        device = device_of(where, "device", device)
        folder = local_folder(where, folder, Download(revision, token, cache_dir, local_files_only))
        with said_by(where, "load_model"):
            config, state = read_weights(folder)
        got, rule = config["_class_name"], f"folder must hold {name}"
        check(where, got == name, rule, f"{got} in {folder}")
        return cls.from_weights(folder, config, state, device=device)

    @classmethod
    def from_weights(
        cls: type[_Network],
        folder: Path | str,
        config: dict[str, Any],
        state: dict[str, Tensor],
        *,
        device: torch.device | str,
    ) -> _Network:
        """The network of a config, with these weights in their own dtype. In eval mode.

        `folder` is where both were read. It is for messages alone.
        """
        path = Path(folder) / WEIGHTS
        dtypes = sorted({str(value.dtype) for value in state.values()})
        fine = len(dtypes) == 1 and all(value.is_floating_point() for value in state.values())
        check_folder(fine, "weights of one floating dtype", f"{', '.join(dtypes)} in {path}")
        try:
            with torch.random.fork_rng(devices=[]):  # the first weights are overwritten
                network = cls(**arguments_of(config))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"{path}: {error}"
            raise ValueError(f"{HOLD} the arguments of {cls.class_name}, got {reason}") from None
        network.to(next(iter(state.values())).dtype)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{HOLD} the weights of its model, got {path}: {reason}") from None
        return network.to(device).eval()


def noise_level(name: str, x: Tensor, sigma: Tensor | float, sigma_data: float) -> NoiseLevel:
    """Constants of the noise level in the dtype of x, computed in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(sigma, Tensor):
        check_tensor(name, "sigma", sigma, dtypes=FLOATING)
        if sigma.shape not in ((), x.shape[:1]):
            raise ValueError(
                f"{name}: sigma must be a float or have shape ({x.shape[0]},), "
                f"got shape {tuple(sigma.shape)}"
            )
        here = sigma.device == x.device
        check(name, here, f"sigma must be on {x.device} like x", sigma.device)
        value = sigma.to(wide).expand(x.shape[0])
    else:
        number = check_level(name, "sigma", sigma, x.shape[0], x, positive=True)
        fits = torch.compiler.is_compiling() or number <= torch.finfo(wide).max
        check(name, fits, f"sigma must be finite in {wide}", number)
        value = torch.full((x.shape[0],), number, dtype=wide, device=x.device)
    variance = value.square() + sigma_data**2
    inverse_std = variance.rsqrt()
    return NoiseLevel(
        (value / sigma_data).log().to(x.dtype),
        inverse_std.to(x.dtype),
        (value / variance).to(x.dtype),
        (sigma_data * inverse_std).to(x.dtype),
    )


def c_head(raw: Tensor, k: Tensor, constrained: bool, c_min: float) -> Tensor:
    """c from its raw output; k broadcasts against it.

    raw = 0 is the Gaussian value k^2 if free, k^2 + c_min if constrained.
    """
    square = k.square()
    if not constrained:
        return square * (1 + raw)
    return c_min + functional.softplus(raw + square.expm1().log())


def check_sizes(name: str, what: str, values: Any) -> tuple[int, ...]:
    """A sequence of sizes."""
    many = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    check(name, many, f"{what} must be a sequence of sizes", lambda: show(values), TypeError)
    sizes = tuple(check_size(name, what, size, least=0) for size in values)
    check(name, sizes and min(sizes) > 0, f"{what} must be positive sizes", sizes)
    return sizes


def check_size(name: str, what: str, value: Any, *, least: int = 1) -> int:
    """An int of at least `least`; one of numpy's is given back as Python's."""
    check(name, is_int(value), f"{what} must be an int", lambda: show(value), TypeError)
    check(name, value >= least, f"{what} must be at least {least}", value)
    check(name, value < 2**31, f"{what} must be below 2**31", value)
    return int(value)
