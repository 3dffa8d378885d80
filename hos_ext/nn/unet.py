"""A U-Net of diffusers with the three heads of `Scores`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import require
from ..scores import Scores
from .base import KINK, Network, c_head, check_common, check_input, check_whole, level_features

# What diffusers takes as act_fn, without "relu".
_UNET_ACTIVATIONS = ("silu", "swish", "mish", "gelu")
# Block types of diffusers that `_one_dimensional` can turn into blocks for signals.
_SIGNAL_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")


class UNet(Network):
    """The U-Net of diffusers (`UNet2DModel`) with the three heads of a second-order model.

    Args:
        dims: shape of one sample: (C, H, W), or (H, W) for one channel; with spatial=1 (C, T), or
            (T,). D is the product. Any H, W and T: padded with zeros to multiples of
            2^(levels - 1) inside, and cropped before the heads.
        rank: columns r of the factor, >= 0. With 0 the factor is None (a diagonal model).
        spatial: 2 for images, or 1 for signals: the same network, its convolutions along T only.
        trunk: "shared": one network with three heads; or "separate": one for the score and one for
            c and the factor, as in the paper.
        channels: channels of each level, fine to coarse. The first must be even.
        head_channels: the same of the network for c and the factor if separate; None is channels.
        layers_per_block: residual blocks per level.
        norm_num_groups: groups of the group normalisations; divides every entry of channels.
        sigma_data: standard deviation of the data (mean 0 is assumed), > 0. Units of the data.
        constrained: as in `MLP`: c >= c_min by construction, or the paper's free c.
        c_min: least value of c when constrained, >= 0.
        given_score: as in `MLP`: a second-order head for a known score, always of one network.
        options: further arguments of `UNet2DModel`, such as down_block_types and up_block_types
            (default: no attention but in the middle). Refused: dropout, whose masks differ between
            the points of a variance-reduced loss, an act_fn with a kink, and class embeddings.
            `time_embedding_type` is fixed: "fourier" divides by the timestep, here
            250 log(sigma / sigma_data).

    Initial values are those of `MLP`.

    Attributes:
        config: these arguments as plain JSON, with "_class_name".
        gradient_checkpointing: set it to True to keep only the inputs of each residual block for
            backward and compute the rest again: less memory, the same gradients.

    Raises:
        RuntimeError: diffusers is not installed.
        ValueError: a size breaks the rules above, or an option is refused.
        TypeError: dims is not a sequence, or a size or rank not an int.

    Reference:
        Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, arXiv:2006.11239.
    """

    def __init__(
        self,
        dims: Sequence[int],
        rank: int,
        *,
        spatial: Literal[1, 2] = 2,
        trunk: Literal["separate", "shared"] = "shared",
        channels: Sequence[int] = (32, 64, 64),
        head_channels: Sequence[int] | None = None,
        layers_per_block: int = 2,
        norm_num_groups: int = 8,
        sigma_data: float = 1.0,
        constrained: bool = True,
        c_min: float = 1e-3,
        given_score: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        check_common("UNet", dims, rank, sigma_data, c_min, trunk)
        if spatial not in (1, 2):
            raise ValueError(f"UNet: spatial must be 1 or 2, got {spatial!r}")
        if len(dims) not in (spatial, spatial + 1):
            rule = "(C, H, W) or (H, W)" if spatial == 2 else "(C, T) or (T,) for spatial=1"
            raise ValueError(f"UNet: dims must be {rule}, got {tuple(dims)}")
        check_whole("UNet", "layers_per_block", layers_per_block, 1)
        check_whole("UNet", "norm_num_groups", norm_num_groups, 1)
        _check_channels("channels", channels, norm_num_groups)
        if head_channels is not None:
            _check_channels("head_channels", head_channels, norm_num_groups)
            if trunk == "shared" or given_score:
                raise ValueError(
                    "UNet: head_channels must be None but with trunk='separate' and a score of its "
                    f"own, got {tuple(head_channels)}"
                )
        _check_options(options, spatial)
        # Wider heads than channels would make attention of no heads at all.
        width = options.get("attention_head_dim", 8)
        coarsest = min(list(channels)[-1], list(head_channels or channels)[-1])
        if options.get("add_attention", True) and width is not None and width > coarsest:
            raise ValueError(
                f"UNet: attention_head_dim must be at most the coarsest channels, {coarsest}, got "
                f"{width}"
            )
        self.dims = tuple(dims)
        self.rank = rank
        self.spatial = spatial
        self.sigma_data = sigma_data
        self.constrained = constrained
        self.c_min = c_min
        self.given_score = given_score
        self._checkpointing = False
        self.config = {
            "_class_name": "UNet",
            "dims": list(dims),
            "rank": rank,
            "spatial": spatial,
            "trunk": trunk,
            "channels": list(channels),
            "head_channels": None if head_channels is None else list(head_channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "sigma_data": float(sigma_data),
            "constrained": bool(constrained),
            "c_min": float(c_min),
            "given_score": bool(given_score),
        } | {key: list(v) if isinstance(v, tuple) else v for key, v in options.items()}

        # As (C, H, W); a signal has H = 1.
        depth = dims[0] if len(dims) > spatial else 1
        self._image = (depth, *([1] if spatial == 1 else []), *dims[-spatial:])
        widths = [tuple(channels)]
        if trunk == "separate" and not given_score:
            widths.append(tuple(head_channels or channels))
        common = {"layers_per_block": layers_per_block, "norm_num_groups": norm_num_groups}
        inputs = 2 * depth if given_score else depth
        self.bodies = nn.ModuleList(
            _unet(inputs, width, spatial, **(common | options)) for width in widths
        )
        coarse = [2 ** (len(width) - 1) for width in widths]
        self._multiples = [(1 if spatial == 1 else n, n) for n in coarse]
        if not given_score:
            self.score = _head(widths[0][0], depth, spatial)
            nn.init.zeros_(self.score.weight)
        self.c = _head(widths[-1][0], depth, spatial, bias=True)
        nn.init.zeros_(self.c.weight)
        nn.init.zeros_(self.c.bias)  # type: ignore[arg-type]
        if rank:
            self.factor = _head(widths[-1][0], depth * rank, spatial)
            with torch.no_grad():  # columns of norm a few tenths, whatever D
                self.factor.weight.mul_(math.prod(dims) ** -0.5)

    @property
    def gradient_checkpointing(self) -> bool:
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for body in self.bodies:
            switch: Any = body
            if value:
                switch.enable_gradient_checkpointing()
            else:
                switch.disable_gradient_checkpointing()
        self._checkpointing = bool(value)

    def forward(self, x: Tensor, sigma: Tensor | float, score: Tensor | None = None) -> Scores:
        """Scaled scores at noise level sigma.

        Args:
            x: noisy samples. Shape (B, *dims), dtype and device of the parameters. Data units.
            sigma: noise standard deviation, > 0 (a tensor is not checked for it, and gives NaN).
                Float or shape (B,). Data units.
            score: the known sigma * s1, as x, for a model with given_score. No units.

        Returns:
            Scores: score sigma * s1 and c, shape (B, *dims); factor sigma * U, shape (B, D, r), a
            view of the convolution's channels (D fastest in memory), or None. No units.

        Raises:
            TypeError: x or score is not a tensor.
            ValueError: x, sigma or score has another shape, dtype or device, a float sigma is not
                > 0, or score is given where it must not be, or the other way round.
        """
        check_input("UNet", x, self.dims, self.c.weight, score, self.given_score)
        level = level_features("UNet", x, sigma, self.sigma_data)
        inverse_std, skip, k = (value.view(-1, 1, 1, 1) for value in level[1:])
        image = x.reshape(-1, *self._image)
        inputs = image * inverse_std
        if score is not None:
            inputs = torch.cat([inputs, score.reshape(-1, *self._image)], 1)
        timestep = 250 * level.log_ratio
        features = [
            _features(body, inputs, timestep, multiples)
            for body, multiples in zip(self.bodies, self._multiples, strict=True)
        ]
        # The crop and the factor k act on the few channels before the heads and never on the
        # (B, D, r) factor.
        if score is None:
            score = (self.score(k * features[0]) - skip * image).reshape(x.shape)
        c = c_head(self.c(features[-1]), k, self.constrained, self.c_min).reshape(x.shape)
        factor = None
        if self.rank:  # channel = column * C + c, so that D = C H W is row-major for each column
            raw = self.factor(k * features[-1])
            factor = raw.reshape(x.shape[0], self.rank, -1).transpose(1, 2)
        return Scores(score, c, factor)


def _unet(inputs: int, channels: tuple[int, ...], spatial: int, **options: Any) -> nn.Module:
    """A UNet2DModel that returns the features before its last convolution."""
    blocks = {
        "down_block_types": ("DownBlock2D",) * len(channels),
        "up_block_types": ("UpBlock2D",) * len(channels),
    }
    unet: nn.Module = require("UNet", "diffusers").UNet2DModel(
        in_channels=inputs,
        out_channels=inputs,
        block_out_channels=channels,
        time_embedding_type="positional",
        **(blocks | options),
    )
    unet.conv_out = nn.Identity()
    if spatial == 1:
        _one_dimensional(unet)
    return unet


def _one_dimensional(unet: nn.Module) -> None:
    """Turns every 3 x 3 convolution into 1 x 3, and doubles and halves along the last axis alone.

    At H = 1 the rows above and below are padding: two thirds of the weights would do nothing.
    """
    for module in list(unet.modules()):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            with torch.no_grad():  # sqrt(3): a third of the inputs, the same variance
                module.weight = nn.Parameter(module.weight[:, :, 1:2].clone() * 3**0.5)
            module.kernel_size = (1, 3)
            module.padding = (0, int(module.padding[1]))
            module.stride = (1, module.stride[1])
        samplers = getattr(module, "upsamplers", None)
        if samplers is not None:
            module.upsamplers = nn.ModuleList(_Doubling(sampler.conv) for sampler in samplers)


class _Doubling(nn.Module):
    """Each value twice along the last axis, then a convolution."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, size: None = None) -> Tensor:
        doubled: Tensor = self.conv(x.repeat_interleave(2, -1))
        return doubled


def _head(channels: int, outputs: int, spatial: int, *, bias: bool = False) -> nn.Conv2d:
    kernel, padding = ((3, 3), (1, 1)) if spatial == 2 else ((1, 3), (0, 1))
    return nn.Conv2d(channels, outputs, kernel, padding=padding, bias=bias)


def _features(
    body: nn.Module, image: Tensor, timestep: Tensor, multiples: tuple[int, int]
) -> Tensor:
    """Output of a U-Net: padded to multiples of its coarsest cell, and cropped again."""
    height, width = image.shape[-2:]
    extra_h, extra_w = -height % multiples[0], -width % multiples[1]
    top, left = extra_h // 2, extra_w // 2
    padded = functional.pad(image, (left, extra_w - left, top, extra_h - top))
    features: Tensor = body(padded, timestep).sample
    return features[:, :, top : top + height, left : left + width]


def _check_channels(name: str, channels: Sequence[int], groups: int) -> None:
    if not channels or channels[0] % 2 or any(n < 1 or n % groups for n in channels):
        raise ValueError(
            f"UNet: {name} must be multiples of norm_num_groups = {groups}, the first even, got "
            f"{tuple(channels)}"
        )


def _check_options(options: dict[str, Any], spatial: int) -> None:
    if options.get("dropout", 0.0):
        raise ValueError(
            "UNet: dropout must be 0 (its masks differ between the points of a "
            f"variance-reduced loss), got {options['dropout']}"
        )
    activation = options.get("act_fn", "silu")
    if activation not in _UNET_ACTIVATIONS:
        names = ", ".join(repr(name) for name in _UNET_ACTIVATIONS)
        raise ValueError(f"UNet: act_fn must be one of {names} ({KINK}), got {activation!r}")
    for name in (
        "sample_size",
        "in_channels",
        "out_channels",
        "block_out_channels",
        "time_embedding_type",
        "class_embed_type",
        "num_class_embeds",
    ):
        if name in options:
            raise ValueError(f"UNet: {name} is set by the adapter, got {options[name]!r}")
    if spatial == 2:
        return
    blocks = (*options.get("down_block_types", ()), *options.get("up_block_types", ()))
    for name in blocks:
        if name not in _SIGNAL_BLOCKS:
            names = ", ".join(repr(known) for known in _SIGNAL_BLOCKS)
            raise ValueError(f"UNet: blocks must be of {names} for spatial=1, got {name!r}")
    for key in ("downsample_type", "upsample_type"):
        if options.get(key, "conv") != "conv":
            raise ValueError(f"UNet: {key} must be 'conv' for spatial=1, got {options[key]!r}")
