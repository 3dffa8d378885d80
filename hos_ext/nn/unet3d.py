"""A U-Net for volumes with the three heads of `Scores`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..checks import check
from .base import Network, NoiseLevel, check_size, check_sizes


class UNet3d(Network):
    """A convolutional network on volumes, fine to coarse and back, with three heads.

    Residual blocks of 3 x 3 x 3 convolutions. The noise level, and the class if there are any,
    scale and shift the features of each block after its second normalisation.

    Args:
        dims: shape of one sample, (C, depth, height, width). Any sizes: padded with zeros to
            multiples of 2^(levels - 1) inside, and cropped before the heads.
        rank: columns r of the factor, >= 0. With 0 the factor is None (a diagonal model).
        trunk: "shared": one network with three heads; or "separate": one for the score and one for
            c and the factor, as in the paper.
        channels: channels of each level, fine to coarse.
        layers_per_block: residual blocks per level, on the way down and on the way up.
        norm_num_groups: groups of the group normalisations; divides every entry of channels.
        sigma_data: standard deviation of the data (mean 0 is assumed), > 0. Units of the data.
        constrained: as in `MLP`: c >= c_min by construction, or the paper's free c.
        c_min: least value of c when constrained, >= 0.
        given_score: as in `MLP`: a second-order head for a known score, always of one network.
        num_classes: classes of a conditional model, called with `label=`. None: no condition.
        device, dtype: as in `MLP`.

    Initial values are those of `MLP`.

    Attributes:
        config: these arguments as plain JSON, with "_class_name".
        gradient_checkpointing: set it to True to keep only the inputs of each residual block for
            backward and compute the rest again: less memory, the same gradients.

    Raises:
        ValueError: a size breaks the rules above.
        TypeError: dims is not a sequence, or a size or rank not an int.

    References:
        Ronneberger et al. 2015, arXiv:1505.04597; Cicek et al. 2016, arXiv:1606.06650; features
        scaled and shifted: Dhariwal and Nichol 2021, arXiv:2105.05233, section 3.1.

    Example:
        >>> import torch
        >>> from hos_ext.nn import UNet3d
        >>> model = UNet3d((1, 4, 6, 5), rank=2, channels=(8, 8))
        >>> scores = model(torch.zeros(3, 1, 4, 6, 5), 0.5)
        >>> scores.c.shape, scores.factor.shape
        (torch.Size([3, 1, 4, 6, 5]), torch.Size([3, 120, 2]))
    """

    class_name = "UNet3d"

    def __init__(
        self,
        dims: Sequence[int],
        rank: int,
        *,
        trunk: Literal["separate", "shared"] = "shared",
        channels: Sequence[int] = (16, 32, 64),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        sigma_data: float = 1.0,
        constrained: bool = True,
        c_min: float = 1e-3,
        given_score: bool = False,
        num_classes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dims,
            rank,
            trunk=trunk,
            sigma_data=sigma_data,
            constrained=constrained,
            c_min=c_min,
            given_score=given_score,
            num_classes=num_classes,
        )
        name, rank = self.class_name, self.rank
        rule = "dims must be (C, depth, height, width)"
        check(name, len(self.dims) == 4, rule, self.dims)
        widths = check_sizes(name, "channels", channels)
        groups = check_size(name, "norm_num_groups", norm_num_groups)
        layers = check_size(name, "layers_per_block", layers_per_block)
        rule = f"channels must be multiples of norm_num_groups = {groups}"
        check(name, all(n % groups == 0 for n in widths), rule, widths)
        self.config = self._make_config(
            trunk=trunk,
            channels=list(widths),
            layers_per_block=layers,
            norm_num_groups=groups,
        )
        depth, fine = self.dims[0], widths[0]
        bodies = 1 if trunk == "shared" or given_score else 2
        inputs = 2 * depth if given_score else depth
        self.bodies = nn.ModuleList(
            _Body(inputs, widths, layers, groups, self.num_classes) for _ in range(bodies)
        )
        self._set_heads(
            None if given_score else _conv(fine, depth, bias=False),
            _conv(fine, depth),
            _conv(fine, depth * rank, bias=False) if rank else None,
        )
        self._place(device, dtype)

    @property
    def gradient_checkpointing(self) -> bool:
        return all(body.checkpointing for body in cast("list[_Body]", list(self.bodies)))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for body in cast("list[_Body]", list(self.bodies)):
            body.checkpointing = bool(value)

    def _features(
        self, inputs: Tensor, level: NoiseLevel, label: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = [body(inputs, level.log_ratio, label) for body in self.bodies]
        return found[0], found[-1], found[-1]

    def _raw_score(self, features: Tensor, k: Tensor) -> Tensor:
        score: Tensor = self.score(k * features)
        return score

    def _factor(self, features: Tensor, k: Tensor) -> Tensor:
        # channel = column * C + c, so that D = C D H W is row-major for each column
        raw: Tensor = self.factor(k * features)
        return raw.reshape(raw.shape[0], self.rank, self._size).transpose(1, 2)


class _Body(nn.Module):
    """The network up to the features before its last layers."""

    def __init__(
        self, inputs: int, widths: Sequence[int], layers: int, groups: int, classes: int | None
    ) -> None:
        super().__init__()
        told = 4 * widths[0]
        self.checkpointing = False
        self.multiple = 2 ** (len(widths) - 1)
        self.level = nn.Sequential(nn.Linear(2 * _WAVES, told), nn.SiLU(), nn.Linear(told, told))
        if classes:
            self.classes = nn.Embedding(classes + 1, told)
        self.first = _conv(inputs, widths[0])
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        here = widths[0]
        for k, width in enumerate(widths):
            blocks = [_Block(here if i == 0 else width, width, told, groups) for i in range(layers)]
            last = k == len(widths) - 1
            smaller = nn.Identity() if last else _conv(width, width, stride=2)
            self.down.append(nn.ModuleDict({"blocks": nn.ModuleList(blocks), "next": smaller}))
            here = width
        self.middle = _Block(here, here, told, groups)
        for k, width in reversed(list(enumerate(widths))):
            blocks = [
                _Block(here + width if i == 0 else width, width, told, groups)
                for i in range(layers)
            ]
            larger = nn.Identity() if k == 0 else _conv(width, width)
            self.up.append(nn.ModuleDict({"blocks": nn.ModuleList(blocks), "next": larger}))
            here = width
        self.norm = nn.GroupNorm(groups, here)

    def forward(self, x: Tensor, log_ratio: Tensor, label: Tensor | None) -> Tensor:
        told = self.level(_waves(log_ratio))
        if label is not None:
            told = told + self.classes(label).to(told.dtype)
        size = x.shape[2:]
        # (front, back) of the last axis first, as `pad` wants them
        more = [-n % self.multiple for n in size]
        pads = [part for extra in reversed(more) for part in (extra // 2, extra - extra // 2)]
        x, kept = self.first(functional.pad(x, pads)), []
        for level in _levels(self.down):
            for block in cast(nn.ModuleList, level["blocks"]):
                x = self._run(block, x, told)
            kept.append(x)
            x = level["next"](x)
        x = self._run(self.middle, x, told)
        for level in _levels(self.up):
            x = torch.cat([x, kept.pop()], 1)
            for block in cast(nn.ModuleList, level["blocks"]):
                x = self._run(block, x, told)
            if kept:
                x = level["next"](functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = functional.silu(self.norm(x))
        for axis, (extra, length) in enumerate(zip(more, size, strict=True), start=2):
            x = x.narrow(axis, extra // 2, length)
        return x

    def _run(self, block: nn.Module, x: Tensor, told: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, x, told, use_reentrant=False)
            return again
        found: Tensor = block(x, told)
        return found


def _levels(modules: nn.ModuleList) -> list[nn.ModuleDict]:
    return cast("list[nn.ModuleDict]", list(modules))


class _Block(nn.Module):
    """x + what two convolutions make of it; the noise level scales and shifts in between."""

    def __init__(self, inputs: int, outputs: int, told: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(groups, inputs), inputs)
        self.conv = _conv(inputs, outputs)
        self.told = nn.Linear(told, 2 * outputs)
        self.norm_told = nn.GroupNorm(groups, outputs)
        self.conv_told = _conv(outputs, outputs)
        self.skip = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        found = self.conv(functional.silu(self.norm(x)))
        scale, shift = self.told(functional.silu(told))[..., None, None, None].chunk(2, 1)
        found = self.conv_told(functional.silu(self.norm_told(found) * (1 + scale) + shift))
        summed: Tensor = self.skip(x) + found
        return summed


_WAVES = 16


def _waves(log_ratio: Tensor) -> Tensor:
    """log(sigma / sigma_data) by its sines and cosines, with periods from 0.3 to 120. (B, 32)."""
    powers = torch.arange(_WAVES, dtype=log_ratio.dtype, device=log_ratio.device) / (_WAVES - 1)
    angles = log_ratio.unsqueeze(1) * 20.0 * 400.0**-powers
    return torch.cat([angles.sin(), angles.cos()], 1)


def _conv(inputs: int, outputs: int, *, stride: int = 1, bias: bool = True) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
