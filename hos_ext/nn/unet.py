"""A U-Net of diffusers with the three heads of `Scores`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check, require, show
from .base import KINK, Network, NoiseLevel, check_size, check_sizes

# What diffusers takes as act_fn, without "relu".
_UNET_ACTIVATIONS = ("silu", "swish", "mish", "gelu")
# Arguments of `UNet2DModel` that follow from ours.
_SET_BY_US = (
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "time_embedding_type",
    "class_embed_type",
    "num_class_embeds",
)
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
        norm_num_groups: groups of the group normalisations; divides every entry of channels. With
            as many groups as channels a block does not see the noise level, and a warning says so.
        sigma_data: standard deviation of the data (mean 0 is assumed), > 0. Units of the data.
        constrained: as in `MLP`: c >= c_min by construction, or the paper's free c.
        c_min: least value of c when constrained, >= 0.
        given_score: as in `MLP`: a second-order head for a known score, always of one network.
        num_classes: as in `MLP`: classes of a conditional model, whose embedding is added to that
            of the noise level.
        device, dtype: as in `MLP`.
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

    References:
        Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, arXiv:2006.11239.

    Example:
        >>> import hos_ext, torch
        >>> model = hos_ext.UNet((1, 8, 8), rank=2, channels=(16, 16))
        >>> scores = model(torch.zeros(5, 1, 8, 8), 0.5)
        >>> scores.c.shape, scores.factor.shape
        (torch.Size([5, 1, 8, 8]), torch.Size([5, 64, 2]))
    """

    class_name = "UNet"

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
        num_classes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
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
        dims, rank = self.dims, self.rank
        _check_shape(dims, spatial)
        norm_num_groups = check_size("UNet", "norm_num_groups", norm_num_groups)
        one_body = trunk == "shared" or given_score
        channels, head_channels = _checked_channels(
            channels, head_channels, norm_num_groups, one_body
        )
        layers_per_block = check_size("UNet", "layers_per_block", layers_per_block)
        _check_options(options, spatial, min([*channels][-1], [*(head_channels or channels)][-1]))
        self.spatial = spatial
        self._checkpointing = False
        blocks = {"layers_per_block": layers_per_block, "norm_num_groups": norm_num_groups}
        self.config = self._make_config(
            spatial=spatial,
            trunk=trunk,
            channels=list(channels),
            head_channels=None if head_channels is None else list(head_channels),
            **blocks,
        ) | {key: list(v) if isinstance(v, tuple) else v for key, v in options.items()}

        # As (C, H, W); a signal has H = 1.
        depth = dims[0] if len(dims) > spatial else 1
        self._shape = (depth, *([1] if spatial == 1 else []), *dims[-spatial:])
        widths = [tuple(channels)]
        if trunk == "separate" and not given_score:
            widths.append(tuple(head_channels or channels))
        inputs = 2 * depth if given_score else depth
        classes = {} if self.num_classes is None else {"num_class_embeds": self.num_classes + 1}
        self.bodies = nn.ModuleList(
            _unet(inputs, width, spatial, **(blocks | classes | options)) for width in widths
        )
        coarse = [2 ** (len(width) - 1) for width in widths]
        self._multiples = [(1 if spatial == 1 else n, n) for n in coarse]
        fine = widths[-1][0]
        self._set_heads(
            None if given_score else _last_layer(widths[0][0], depth, spatial),
            _last_layer(fine, depth, spatial, bias=True),
            _last_layer(fine, depth * rank, spatial) if rank else None,
        )
        self._place(device, dtype)

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

    def _features(
        self, inputs: Tensor, level: NoiseLevel, label: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        timestep = 250 * level.log_ratio
        features = [
            _padded(body, inputs, timestep, label, multiples)
            for body, multiples in zip(self.bodies, self._multiples, strict=True)
        ]
        return features[0], features[-1], features[-1]

    # The crop and the factor k act on the few channels before the last layers and never on the
    # (B, D, r) factor.

    def _raw_score(self, features: Tensor, k: Tensor) -> Tensor:
        score: Tensor = self.score(k * features)
        return score

    def _factor(self, features: Tensor, k: Tensor) -> Tensor:
        # channel = column * C + c, so that D = C H W is row-major for each column
        raw: Tensor = self.factor(k * features)
        return raw.reshape(raw.shape[0], self.rank, self._size).transpose(1, 2)


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


def _last_layer(channels: int, outputs: int, spatial: int, *, bias: bool = False) -> nn.Conv2d:
    kernel, padding = ((3, 3), (1, 1)) if spatial == 2 else ((1, 3), (0, 1))
    return nn.Conv2d(channels, outputs, kernel, padding=padding, bias=bias)


def _padded(
    body: nn.Module,
    image: Tensor,
    timestep: Tensor,
    label: Tensor | None,
    multiples: tuple[int, int],
) -> Tensor:
    """Output of a U-Net: padded to multiples of its coarsest cell, and cropped again."""
    height, width = image.shape[-2:]
    extra_h, extra_w = -height % multiples[0], -width % multiples[1]
    top, left = extra_h // 2, extra_w // 2
    padded = functional.pad(image, (left, extra_w - left, top, extra_h - top))
    features: Tensor = body(padded, timestep, class_labels=label).sample
    return features[:, :, top : top + height, left : left + width]


def _check_shape(dims: Sequence[int], spatial: int) -> None:
    known = isinstance(spatial, int) and spatial in (1, 2)
    check("UNet", known, "spatial must be 1 or 2", lambda: show(spatial))
    rule = "(C, H, W) or (H, W)" if spatial == 2 else "(C, T) or (T,) for spatial=1"
    check("UNet", len(dims) in (spatial, spatial + 1), f"dims must be {rule}", tuple(dims))


def _checked_channels(
    channels: Sequence[int], head_channels: Sequence[int] | None, groups: int, one_body: bool
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Both as plain ints."""

    def checked(name: str, given: Sequence[int]) -> tuple[int, ...]:
        each = check_sizes("UNet", name, given)
        fine = each[0] % 2 == 0 and all(n % groups == 0 for n in each)
        rule = f"{name} must be multiples of norm_num_groups = {groups}, the first even"
        check("UNet", fine, rule, each)
        if groups in each:
            # A norm over one channel takes away what the embeddings add to all of its pixels.
            warnings.warn(
                f"UNet: norm_num_groups should leave each group two channels or more, got {groups} "
                f"groups for {name} {list(each)}: blocks of {groups} channels do not see the noise "
                "level or the class",
                stacklevel=4,
            )
        return each

    found = checked("channels", channels)
    if head_channels is None:
        return found, None
    heads = checked("head_channels", head_channels)
    rule = "head_channels must be None but with trunk='separate' and a score of its own"
    check("UNet", not one_body, rule, heads)
    return found, heads


def _check_options(options: dict[str, Any], spatial: int, coarsest: int) -> None:
    dropout = options.get("dropout", 0.0)
    rule = "dropout must be 0 (its masks differ between the points of a variance-reduced loss)"
    check("UNet", not dropout, rule, dropout)
    activation = options.get("act_fn", "silu")
    rule = f"act_fn must be one of {_names(_UNET_ACTIVATIONS)} ({KINK})"
    check("UNet", activation in _UNET_ACTIVATIONS, rule, f"{activation!r}")
    for name in _SET_BY_US:
        check(
            "UNet", name not in options, f"{name} is set by the adapter", f"{options.get(name)!r}"
        )
    # A wider head than the coarsest channels would make attention of no heads at all.
    width = options.get("attention_head_dim", 8)
    fine = not options.get("add_attention", True) or width is None or width <= coarsest
    rule = f"attention_head_dim must be at most the coarsest channels, {coarsest}"
    check("UNet", fine, rule, width)
    if spatial == 2:
        return
    rule = f"blocks must be of {_names(_SIGNAL_BLOCKS)} for spatial=1"
    for name in (*options.get("down_block_types", ()), *options.get("up_block_types", ())):
        check("UNet", name in _SIGNAL_BLOCKS, rule, f"{name!r}")
    for key in ("downsample_type", "upsample_type"):
        value = options.get(key, "conv")
        check("UNet", value == "conv", f"{key} must be 'conv' for spatial=1", f"{value!r}")


def _names(known: Sequence[str]) -> str:
    return ", ".join(map(repr, known))
