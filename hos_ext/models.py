"""Score networks: `model(x, sigma) -> Scores(sigma * s1, c = 1 + sigma^2 diag, sigma * U)`.

All three outputs are O(1) at every noise level. With v = sigma_data^2 + sigma^2 and
k = sigma_data / sqrt(v), isotropic Gaussian data of standard deviation sigma_data have
sigma * s1 = -(sigma / v) x and c = k^2; the score residual that then is left to fit has standard
deviation k. Networks start at these values and learn what differs, F being their raw outputs:
    sigma * s1 = -(sigma / v) x + k F1,     sigma * U = k F3,
    c = c_min + softplus(F2 + log(e^{k^2} - 1))  (constrained)    or    c = k^2 (1 + F2)  (free).
The constrained c thus starts at k^2 + c_min.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .checks import check_like, require, show
from .tweedie import Scores
from .weights import HOLD, WEIGHTS, arguments_of, read_weights, write_weights

_Model = TypeVar("_Model", bound="_Network")

# Angular frequencies in log(sigma / sigma_data). The slowest has a period of e^25 in sigma, so all
# levels differ; the fastest resolves a factor of two.
_FREQUENCIES = (0.25, 0.5, 1.0, 2.0)
_NOISE_FEATURES = 2 * len(_FREQUENCIES)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "softplus": functional.softplus,
}
# What diffusers takes as act_fn, without "relu".
_UNET_ACTIVATIONS = ("silu", "swish", "mish", "gelu")
_KINK = "twice differentiable: at a kink variance reduction fails"
# Block types of diffusers that `_one_dimensional` can turn into blocks for signals.
_SIGNAL_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")


class _Level(NamedTuple):
    """Per-sample constants of a noise level, each `(B,)`: log(sigma / sigma_data), 1 / sqrt(v),
    sigma / v and k = sigma_data / sqrt(v)."""

    log_ratio: Tensor
    inverse_std: Tensor
    skip: Tensor
    k: Tensor


class _Network(nn.Module):
    """What MLP and UNet share: a config of plain JSON, and files made by it."""

    config: dict[str, Any]

    def save_pretrained(self, folder: Path | str, **extra: Any) -> str:
        """config.json and model.safetensors, as `save_model` writes them. Returns the folder."""
        write_weights(folder, saved_config(self), self.state_dict(), extra)
        return str(folder)

    @classmethod
    def from_pretrained(
        cls: type[_Model], folder: Path | str, *, device: torch.device | str = "cpu"
    ) -> _Model:
        """Reads what `save_pretrained` wrote. The model is in eval mode.

        Raises:
            ValueError: the folder holds a model of another class, or what `load_model` refuses.
        """
        config, state = read_weights(folder)
        if config["_class_name"] != cls.__name__:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: folder must hold {cls.__name__}, got "
                f"{config['_class_name']} in {folder}"
            )
        return cast(_Model, load_network(folder, config, state, device=device))


class MLP(_Network):
    """Fully connected score networks, by default three separate ones of the paper's widths.

    Args:
        dims: shape of one sample, without the batch; D is its product.
        rank: columns r of the factor, >= 0. With 0 the factor is None (a diagonal model).
        width: hidden width of the score network (128 in the paper), or of the shared trunk.
        depth: hidden layers of the score network, or of the shared trunk. The output layer comes
            on top.
        head_width: hidden width of the networks for c and for the factor (32 in the paper). The
            factor has at most head_width + 1 independent coefficients per sample: raise it with D.
        head_depth: hidden layers of these two networks.
        trunk: "separate" networks, or "shared": one trunk with three linear heads (head_width and
            head_depth are then not used).
        activation: "tanh", "silu", "gelu", "softplus", or an elementwise function (with which the
            model cannot be saved). Twice differentiable, or variance reduction fails: at a
            kink psi+ + psi- - 2 psi0 is O(sigma), not O(sigma^2).
        sigma_data: standard deviation of the data (mean 0 is assumed), > 0. Units of the data.
        constrained: True: c >= c_min, so that the posterior covariance is positive definite by
            construction. False: the paper's head, c free.
        c_min: least value of c when constrained, >= 0. c is the posterior variance over sigma^2.
        given_score: a second-order head for a score that is known (`frozen.SecondOrderHead`): no
            score network; `model(x, sigma, score)` sees the scaled score beside x, and returns it
            with c and the factor. width and depth are then those of the shared trunk only.

    The score and c start at the values for Gaussian data, the constrained c at c_min more than
    that. The factor starts small but not at zero:
    the loss depends on U U^T, its gradient 4 R U vanishes at U = 0, and a factor that starts there
    stays there.

    Attributes:
        config: these arguments as plain JSON, with "_class_name".
        gradient_checkpointing: set it to True to keep only the inputs of each hidden stack for
            backward and compute the rest again: less memory, the same gradients.

    Raises:
        ValueError: a size, rank, sigma_data, c_min, trunk or activation breaks the rules above.
        TypeError: dims is not a sequence, a size or rank not an int, or activation not callable.

    Reference:
        Meng et al. 2021, arXiv:2111.04726, section 5 (widths) and Eq. 13 (diag + U U^T).
    """

    def __init__(
        self,
        dims: Sequence[int],
        rank: int,
        *,
        width: int = 128,
        depth: int = 3,
        head_width: int = 32,
        head_depth: int = 3,
        trunk: Literal["separate", "shared"] = "separate",
        activation: str | Callable[[Tensor], Tensor] = "tanh",
        sigma_data: float = 1.0,
        constrained: bool = True,
        c_min: float = 1e-3,
        given_score: bool = False,
    ) -> None:
        super().__init__()
        _check_common("MLP", dims, rank, sigma_data, c_min, trunk)
        for name, size in (
            ("width", width),
            ("depth", depth),
            ("head_width", head_width),
            ("head_depth", head_depth),
        ):
            _check_whole("MLP", name, size, 1)
        function, activation_name = _activation(activation)
        self.dims = tuple(dims)
        self.rank = rank
        self.sigma_data = sigma_data
        self.constrained = constrained
        self.c_min = c_min
        self.given_score = given_score
        self.gradient_checkpointing = False
        self.config = {
            "_class_name": "MLP",
            "dims": list(dims),
            "rank": rank,
            "width": width,
            "depth": depth,
            "head_width": head_width,
            "head_depth": head_depth,
            "trunk": trunk,
            "activation": activation_name,
            "sigma_data": float(sigma_data),
            "constrained": bool(constrained),
            "c_min": float(c_min),
            "given_score": bool(given_score),
        }
        size = math.prod(dims)
        inputs = 2 * size if given_score else size
        bodies = []
        if trunk == "shared" or not given_score:
            bodies.append(_Body(inputs, width, depth, function))
        if trunk == "separate":
            heads = 1 if rank == 0 else 2
            bodies += [_Body(inputs, head_width, head_depth, function) for _ in range(heads)]
        else:
            head_width = width
        self.bodies = nn.ModuleList(bodies)
        if not given_score:
            self.score = nn.Linear(width, size)
        self.c = nn.Linear(head_width, size)
        for layer in [self.c] if given_score else [self.score, self.c]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if rank:
            self.factor = nn.Linear(head_width + 1, size * rank, bias=False)
            with torch.no_grad():  # columns of norm a few tenths, whatever D
                self.factor.weight.mul_(size**-0.5)

    def forward(self, x: Tensor, sigma: Tensor | float, score: Tensor | None = None) -> Scores:
        """Scaled scores at noise level sigma.

        Args:
            x: noisy samples. Shape (B, *dims), dtype and device of the parameters. Data units.
            sigma: noise standard deviation, > 0 (a tensor is not checked for it, and gives NaN).
                Float or shape (B,). Data units.
            score: the known sigma * s1, as x, for a model with given_score. No units.

        Returns:
            Scores: score sigma * s1 and c, shape (B, *dims); factor sigma * U, shape (B, D, r)
            with r fastest in memory, or None. No units.

        Raises:
            TypeError: x or score is not a tensor.
            ValueError: x, sigma or score has another shape, dtype or device, a float sigma is not
                > 0, or score is given where it must not be, or the other way round.
        """
        _check_input("MLP", x, self.dims, self.c.weight, score, self.given_score)
        level = _level("MLP", x, sigma, self.sigma_data)
        flat = x.flatten(1)
        features = _noise_features(level)
        inputs = flat * level.inverse_std.unsqueeze(-1)
        if score is not None:
            inputs = torch.cat([inputs, score.flatten(1)], -1)
        hidden = [self._hidden(body, inputs, features) for body in self.bodies]
        skip, k = level.skip.unsqueeze(-1), level.k.unsqueeze(-1)
        if score is None:
            score = (k * self.score(hidden[0]) - skip * flat).reshape(x.shape)
        # From the end: [score, c, factor], [c, factor], [score, c], [c] or the shared trunk.
        second_to_last = len(hidden) - 2 if self.rank and len(hidden) > 1 else len(hidden) - 1
        c = _c_head(self.c(hidden[second_to_last]), k, self.constrained, self.c_min)
        factor = None
        if self.rank:
            # k enters before the last layer (the column of ones is its bias), not after it: that
            # would be one more pass over the (B, D, r) factor, as dear as the loss itself.
            scaled = k * functional.pad(hidden[-1], (0, 1), value=1.0)
            factor = self.factor(scaled).reshape(*flat.shape, self.rank)
        return Scores(score, c.reshape(x.shape), factor)

    def _hidden(self, body: nn.Module, inputs: Tensor, features: Tensor) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            hidden: Tensor = body(inputs, features)
            return hidden
        hidden = checkpoint(body, inputs, features, use_reentrant=False, preserve_rng_state=False)
        return hidden


class UNet(_Network):
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
        _check_common("UNet", dims, rank, sigma_data, c_min, trunk)
        if spatial not in (1, 2):
            raise ValueError(f"UNet: spatial must be 1 or 2, got {spatial!r}")
        if len(dims) not in (spatial, spatial + 1):
            rule = "(C, H, W) or (H, W)" if spatial == 2 else "(C, T) or (T,) for spatial=1"
            raise ValueError(f"UNet: dims must be {rule}, got {tuple(dims)}")
        _check_whole("UNet", "layers_per_block", layers_per_block, 1)
        _check_whole("UNet", "norm_num_groups", norm_num_groups, 1)
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
        _check_input("UNet", x, self.dims, self.c.weight, score, self.given_score)
        level = _level("UNet", x, sigma, self.sigma_data)
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
        c = _c_head(self.c(features[-1]), k, self.constrained, self.c_min).reshape(x.shape)
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


class _Body(nn.Module):
    """Hidden layers, each of which sees the noise features beside its input."""

    def __init__(
        self, size: int, width: int, depth: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        sizes = [size] + [width] * (depth - 1)
        self.layers = nn.ModuleList(nn.Linear(n + _NOISE_FEATURES, width) for n in sizes)
        self.activation = activation

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(torch.cat([x, features], -1)))
        return x


def _c_head(raw: Tensor, k: Tensor, constrained: bool, c_min: float) -> Tensor:
    """c from its raw output; k broadcasts against it.

    raw = 0 is the Gaussian value k^2 if free, k^2 + c_min if constrained.
    """
    square = k.square()
    if not constrained:
        return square * (1 + raw)
    return c_min + functional.softplus(raw + square.expm1().log())


def _noise_features(level: _Level) -> Tensor:
    """Sines and cosines of log(sigma / sigma_data), `(B, features)`: smooth, bounded."""
    frequencies = torch.tensor(_FREQUENCIES, dtype=level.k.dtype, device=level.k.device)
    angle = level.log_ratio.unsqueeze(-1) * frequencies
    return torch.cat([angle.sin(), angle.cos()], -1)


def _level(name: str, x: Tensor, sigma: Tensor | float, sigma_data: float) -> _Level:
    """Constants of the noise level in the dtype of x, computed in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(sigma, Tensor):
        if sigma.shape not in ((), x.shape[:1]):
            raise ValueError(
                f"{name}: sigma must be a float or have shape ({x.shape[0]},), "
                f"got shape {tuple(sigma.shape)}"
            )
        if sigma.device != x.device:
            raise ValueError(f"{name}: sigma must be on {x.device} like x, got {sigma.device}")
        value = sigma.to(wide).expand(x.shape[0])
    elif 0 < sigma < math.inf:
        value = torch.full((x.shape[0],), sigma, dtype=wide, device=x.device)
    else:
        raise ValueError(f"{name}: sigma must be positive and finite, got {sigma}")
    variance = value.square() + sigma_data**2
    inverse_std = variance.rsqrt()
    return _Level(
        (value / sigma_data).log().to(x.dtype),
        inverse_std.to(x.dtype),
        (value / variance).to(x.dtype),
        (sigma_data * inverse_std).to(x.dtype),
    )


def _activation(value: Any) -> tuple[Callable[[Tensor], Tensor], str | None]:
    """The function, and its name where it has one."""
    if isinstance(value, str):
        if value not in ACTIVATIONS:
            names = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(
                f"MLP: activation must be one of {names}, or a function ({_KINK}), got {value!r}"
            )
        return ACTIVATIONS[value], value
    if not callable(value):
        raise TypeError(f"MLP: activation must be a name or a function, got {value!r}")
    return value, next((name for name, known in ACTIVATIONS.items() if known is value), None)


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
        raise ValueError(f"UNet: act_fn must be one of {names} ({_KINK}), got {activation!r}")
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


def _check_common(
    name: str, dims: Sequence[int], rank: int, sigma_data: float, c_min: float, trunk: str
) -> None:
    if not isinstance(dims, Sequence):
        raise TypeError(f"{name}: dims must be a sequence of sizes, got {dims!r}")
    if not dims or any(n < 1 for n in dims):
        raise ValueError(f"{name}: dims must be positive sizes, got {tuple(dims)}")
    for size in dims:
        _check_whole(name, "dims", size, 1)
    _check_whole(name, "rank", rank, 0)
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"{name}: sigma_data must be positive and finite, got {sigma_data}")
    if not 0 <= c_min < math.inf:
        raise ValueError(f"{name}: c_min must be at least 0 and finite, got {c_min}")
    if trunk not in ("separate", "shared"):
        raise ValueError(f"{name}: trunk must be 'separate' or 'shared', got {trunk!r}")


def _check_whole(name: str, what: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {what} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: {what} must be at least {minimum}, got {value}")


def _check_input(
    name: str,
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor,
    score: Tensor | None,
    given_score: bool,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {show(x)}")
    if tuple(x.shape[1:]) != dims or x.dim() == 0:
        rule = ", ".join(["B", *map(str, dims)])
        raise ValueError(f"{name}: x must have shape ({rule}), got {tuple(x.shape)}")
    # Autocast brings x and the parameters to one dtype itself.
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name}: x must be {weight.dtype} like the parameters, got {x.dtype}")
    if given_score != (score is not None):
        rule = "given (the model has given_score=True)" if given_score else "None"
        raise ValueError(f"{name}: score must be {rule}, got {show(score)}")
    if score is not None:
        check_like(name, "score", score, x)


# ------------------------------------------------------------------------------------------- files


def saved_config(model: nn.Module) -> dict[str, Any]:
    """The config of an MLP or a UNet that can be made again from it."""
    if not isinstance(model, (MLP, UNet)):
        raise TypeError(
            f"save_model: model must be MLP or UNet (unwrapped), got {type(model).__name__}"
        )
    if model.config.get("activation", "") is None:
        raise ValueError(
            "save_model: activation of the model must be given by name to be saved, got "
            f"{model.bodies[0].activation!r}"
        )
    return model.config


def load_network(
    folder: Path | str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    *,
    device: torch.device | str,
) -> MLP | UNet:
    """The model of a config, with these weights in their own dtype. In eval mode."""
    path = Path(folder) / WEIGHTS
    name = config["_class_name"]
    kinds: dict[str, type[MLP] | type[UNet]] = {"MLP": MLP, "UNet": UNet}
    dtypes = sorted({str(value.dtype) for value in state.values()})
    if len(dtypes) != 1 or not all(value.is_floating_point() for value in state.values()):
        raise ValueError(f"{HOLD} weights of one floating dtype, got {', '.join(dtypes)} in {path}")
    try:
        with torch.random.fork_rng(devices=[]):  # the first weights are overwritten
            model = kinds[name](**arguments_of(config))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{HOLD} the arguments of {name}, got {path}: {error}") from None
    model.to(next(iter(state.values())).dtype)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{HOLD} the weights of its model, got {path}: {reason}") from None
    return model.to(device).eval()
