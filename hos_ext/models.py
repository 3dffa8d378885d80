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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checks import require, show
from .tweedie import Scores

# Angular frequencies in log(sigma / sigma_data). The slowest has a period of e^25 in sigma, so all
# levels differ; the fastest resolves a factor of two.
_FREQUENCIES = (0.25, 0.5, 1.0, 2.0)
_NOISE_FEATURES = 2 * len(_FREQUENCIES)


class _Level(NamedTuple):
    """Per-sample constants of a noise level, each `(B,)`: log(sigma / sigma_data), 1 / sqrt(v),
    sigma / v and k = sigma_data / sqrt(v)."""

    log_ratio: Tensor
    inverse_std: Tensor
    skip: Tensor
    k: Tensor


class MLP(nn.Module):
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
        activation: elementwise function. Twice differentiable, or variance reduction fails: at a
            kink psi+ + psi- - 2 psi0 is O(sigma), not O(sigma^2).
        sigma_data: standard deviation of the data (mean 0 is assumed), > 0. Units of the data.
        constrained: True: c >= c_min, so that the posterior covariance is positive definite by
            construction. False: the paper's head, c free.
        c_min: least value of c when constrained, >= 0. c is the posterior variance over sigma^2.

    The score and c start at the values for Gaussian data, the constrained c at c_min more than
    that. The factor starts small but not at zero:
    the loss depends on U U^T, its gradient 4 R U vanishes at U = 0, and a factor that starts there
    stays there.

    Raises:
        ValueError: a size, rank, sigma_data, c_min or trunk breaks the rules above.
        TypeError: dims is not a sequence, or a size or rank not an int.

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
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        sigma_data: float = 1.0,
        constrained: bool = True,
        c_min: float = 1e-3,
    ) -> None:
        super().__init__()
        _check_common("MLP", dims, rank, sigma_data, c_min)
        for name, size in (
            ("width", width),
            ("depth", depth),
            ("head_width", head_width),
            ("head_depth", head_depth),
        ):
            _check_whole("MLP", name, size, 1)
        if trunk not in ("separate", "shared"):
            raise ValueError(f"MLP: trunk must be 'separate' or 'shared', got {trunk!r}")
        self.dims = tuple(dims)
        self.rank = rank
        self.sigma_data = sigma_data
        self.constrained = constrained
        self.c_min = c_min
        size = math.prod(dims)
        bodies = [_Body(size, width, depth, activation)]
        if trunk == "separate":
            heads = 1 if rank == 0 else 2
            bodies += [_Body(size, head_width, head_depth, activation) for _ in range(heads)]
        else:
            head_width = width
        self.bodies = nn.ModuleList(bodies)
        self.score = nn.Linear(width, size)
        self.c = nn.Linear(head_width, size)
        for layer in (self.score, self.c):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if rank:
            self.factor = nn.Linear(head_width + 1, size * rank, bias=False)
            with torch.no_grad():  # columns of norm a few tenths, whatever D
                self.factor.weight.mul_(size**-0.5)

    def forward(self, x: Tensor, sigma: Tensor | float) -> Scores:
        """Scaled scores at noise level sigma.

        Args:
            x: noisy samples. Shape (B, *dims), dtype and device of the parameters. Data units.
            sigma: noise standard deviation, > 0 (a tensor is not checked for it, and gives NaN).
                Float or shape (B,). Data units.

        Returns:
            Scores: score sigma * s1 and c, shape (B, *dims); factor sigma * U, shape (B, D, r)
            with r fastest in memory, or None. No units.

        Raises:
            TypeError: x is not a tensor.
            ValueError: x or sigma has another shape, dtype or device, or a float sigma is not > 0.
        """
        _check_input("MLP", x, self.dims, self.score.weight)
        level = _level("MLP", x, sigma, self.sigma_data)
        flat = x.flatten(1)
        features = _noise_features(level)
        inputs = flat * level.inverse_std.unsqueeze(-1)
        hidden = [body(inputs, features) for body in self.bodies]
        skip, k = level.skip.unsqueeze(-1), level.k.unsqueeze(-1)
        score = k * self.score(hidden[0]) - skip * flat
        c = _c_head(self.c(hidden[min(1, len(hidden) - 1)]), k, self.constrained, self.c_min)
        factor = None
        if self.rank:
            # k enters before the last layer (the column of ones is its bias), not after it: that
            # would be one more pass over the (B, D, r) factor, as dear as the loss itself.
            scaled = k * functional.pad(hidden[-1], (0, 1), value=1.0)
            factor = self.factor(scaled).reshape(*flat.shape, self.rank)
        return Scores(score.reshape(x.shape), c.reshape(x.shape), factor)


class UNet(nn.Module):
    """The U-Net of diffusers (`UNet2DModel`) with the three heads of a second-order model.

    Args:
        dims: (C, H, W) of one sample; D = C H W. Any H, W: padded with zeros to multiples of
            2^(levels - 1) inside, and cropped before the heads.
        rank: columns r of the factor, >= 0. With 0 the factor is None (a diagonal model).
        channels: channels of each level, fine to coarse. The first must be even.
        layers_per_block: residual blocks per level.
        norm_num_groups: groups of the group normalisations; divides every entry of channels.
        sigma_data: standard deviation of the data (mean 0 is assumed), > 0. Units of the data.
        constrained: as in `MLP`: c >= c_min by construction, or the paper's free c.
        c_min: least value of c when constrained, >= 0.
        options: further arguments of `UNet2DModel`, such as down_block_types and up_block_types
            (default: no attention but in the middle). Dropout is refused: its masks differ between
            the points of a variance-reduced loss. `time_embedding_type` is fixed: "fourier" divides
            by the timestep, here 250 log(sigma / sigma_data).

    Initial values are those of `MLP`.

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
        channels: Sequence[int] = (32, 64, 64),
        layers_per_block: int = 2,
        norm_num_groups: int = 8,
        sigma_data: float = 1.0,
        constrained: bool = True,
        c_min: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_common("UNet", dims, rank, sigma_data, c_min)
        if len(dims) != 3:
            raise ValueError(f"UNet: dims must be (C, H, W), got {tuple(dims)}")
        if not channels or channels[0] % 2 or any(n % norm_num_groups for n in channels):
            raise ValueError(
                f"UNet: channels must be multiples of norm_num_groups = {norm_num_groups}, "
                f"the first even, got {tuple(channels)}"
            )
        if options.get("dropout", 0.0):
            raise ValueError(
                "UNet: dropout must be 0 (its masks differ between the points of a "
                f"variance-reduced loss), got {options['dropout']}"
            )
        for name in ("sample_size", "in_channels", "out_channels", "time_embedding_type"):
            if name in options:
                raise ValueError(f"UNet: {name} is set by the adapter, got {options[name]!r}")
        unet = require("UNet", "diffusers").UNet2DModel
        self.dims = tuple(dims)
        self.rank = rank
        self.sigma_data = sigma_data
        self.constrained = constrained
        self.c_min = c_min
        self.multiple = 2 ** (len(channels) - 1)
        blocks = {
            "down_block_types": ("DownBlock2D",) * len(channels),
            "up_block_types": ("UpBlock2D",) * len(channels),
        }
        self.unet: nn.Module = unet(
            in_channels=dims[0],
            out_channels=dims[0],
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            time_embedding_type="positional",
            **(blocks | options),
        )
        # Its last convolution makes way for ours: the crop and the factor k then act on its few
        # input channels and never on the (B, D, r) factor.
        self.unet.conv_out = nn.Identity()
        self.linear = nn.Conv2d(channels[0], dims[0] * (1 + rank), 3, padding=1, bias=False)
        self.c = nn.Conv2d(channels[0], dims[0], 3, padding=1)
        with torch.no_grad():
            self.linear.weight[: dims[0]].zero_()
            self.linear.weight[dims[0] :].mul_(math.prod(dims) ** -0.5)
        nn.init.zeros_(self.c.weight)
        nn.init.zeros_(self.c.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, sigma: Tensor | float) -> Scores:
        """Scaled scores at noise level sigma.

        Args:
            x: noisy samples. Shape (B, C, H, W), dtype and device of the parameters. Data units.
            sigma: noise standard deviation, > 0 (a tensor is not checked for it, and gives NaN).
                Float or shape (B,). Data units.

        Returns:
            Scores: score sigma * s1 and c, shape (B, C, H, W); factor sigma * U, shape (B, D, r), a
            view of the convolution's channels (D fastest in memory), or None. No units.

        Raises:
            TypeError: x is not a tensor.
            ValueError: x or sigma has another shape, dtype or device, or a float sigma is not > 0.
        """
        _check_input("UNet", x, self.dims, self.c.weight)
        level = _level("UNet", x, sigma, self.sigma_data)
        columns = [value.view(-1, 1, 1, 1) for value in level]
        _, inverse_std, skip, k = columns
        channels, height, width = self.dims
        extra_h, extra_w = -height % self.multiple, -width % self.multiple
        top, left = extra_h // 2, extra_w // 2
        padded = functional.pad(x * inverse_std, (left, extra_w - left, top, extra_h - top))
        timestep = 250 * level.log_ratio
        features = self.unet(padded, timestep).sample[:, :, top : top + height, left : left + width]
        # split, not slices: backward of each slice fills a whole gradient (15 times slower).
        raw_score, raw_factor = torch.split(
            self.linear(k * features), [channels, channels * self.rank], dim=1
        )
        score = raw_score - skip * x
        c = _c_head(self.c(features), k, self.constrained, self.c_min)
        factor = None
        if self.rank:  # channel = column * C + c, so that D = C H W is row-major for each column
            size = math.prod(self.dims)
            factor = raw_factor.reshape(x.shape[0], self.rank, size).transpose(1, 2)
        return Scores(score, c, factor)


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


def _check_common(
    name: str, dims: Sequence[int], rank: int, sigma_data: float, c_min: float
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


def _check_whole(name: str, what: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {what} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: {what} must be at least {minimum}, got {value}")


def _check_input(name: str, x: Tensor, dims: tuple[int, ...], weight: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {show(x)}")
    if tuple(x.shape[1:]) != dims or x.dim() == 0:
        rule = ", ".join(["B", *map(str, dims)])
        raise ValueError(f"{name}: x must have shape ({rule}), got {tuple(x.shape)}")
    # Autocast brings x and the parameters to one dtype itself.
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name}: x must be {weight.dtype} like the parameters, got {x.dtype}")
