"""What the networks share: features of the noise level, heads, checks, and files of one network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_like, show
from .weights import HOLD, WEIGHTS, arguments_of, read_weights, write_weights

_Model = TypeVar("_Model", bound="Network")
NETWORKS: dict[str, type[Network]] = {}  # by class name; each class enters itself

# Angular frequencies in log(sigma / sigma_data). The slowest has a period of e^25 in sigma, so all
# levels differ; the fastest resolves a factor of two.
_FREQUENCIES = (0.25, 0.5, 1.0, 2.0)
NOISE_FEATURES = 2 * len(_FREQUENCIES)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "softplus": functional.softplus,
}
KINK = "twice differentiable: at a kink variance reduction fails"


class _Level(NamedTuple):
    """Per-sample constants of a noise level, each `(B,)`: log(sigma / sigma_data), 1 / sqrt(v),
    sigma / v and k = sigma_data / sqrt(v)."""

    log_ratio: Tensor
    inverse_std: Tensor
    skip: Tensor
    k: Tensor


class Network(nn.Module):
    """What MLP and UNet share: a config of plain JSON, and files made by it."""

    config: dict[str, Any]
    activation: Any  # as it was given

    def __init_subclass__(cls) -> None:
        NETWORKS[cls.__name__] = cls

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


def c_head(raw: Tensor, k: Tensor, constrained: bool, c_min: float) -> Tensor:
    """c from its raw output; k broadcasts against it.

    raw = 0 is the Gaussian value k^2 if free, k^2 + c_min if constrained.
    """
    square = k.square()
    if not constrained:
        return square * (1 + raw)
    return c_min + functional.softplus(raw + square.expm1().log())


def noise_features(level: _Level) -> Tensor:
    """Sines and cosines of log(sigma / sigma_data), `(B, features)`: smooth, bounded."""
    frequencies = torch.tensor(_FREQUENCIES, dtype=level.k.dtype, device=level.k.device)
    angle = level.log_ratio.unsqueeze(-1) * frequencies
    return torch.cat([angle.sin(), angle.cos()], -1)


def level_features(name: str, x: Tensor, sigma: Tensor | float, sigma_data: float) -> _Level:
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


def activation_named(value: Any) -> tuple[Callable[[Tensor], Tensor], str | None]:
    """The function, and its name where it has one."""
    if isinstance(value, str):
        if value not in ACTIVATIONS:
            names = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(
                f"MLP: activation must be one of {names}, or a function ({KINK}), got {value!r}"
            )
        return ACTIVATIONS[value], value
    if not callable(value):
        raise TypeError(f"MLP: activation must be a name or a function, got {value!r}")
    return value, next((name for name, known in ACTIVATIONS.items() if known is value), None)


def check_common(
    name: str, dims: Sequence[int], rank: int, sigma_data: float, c_min: float, trunk: str
) -> None:
    if not isinstance(dims, Sequence):
        raise TypeError(f"{name}: dims must be a sequence of sizes, got {dims!r}")
    if not dims or any(n < 1 for n in dims):
        raise ValueError(f"{name}: dims must be positive sizes, got {tuple(dims)}")
    for size in dims:
        check_whole(name, "dims", size, 1)
    check_whole(name, "rank", rank, 0)
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"{name}: sigma_data must be positive and finite, got {sigma_data}")
    if not 0 <= c_min < math.inf:
        raise ValueError(f"{name}: c_min must be at least 0 and finite, got {c_min}")
    if trunk not in ("separate", "shared"):
        raise ValueError(f"{name}: trunk must be 'separate' or 'shared', got {trunk!r}")


def check_whole(name: str, what: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {what} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: {what} must be at least {minimum}, got {value}")


def check_input(
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
    if not isinstance(model, Network):
        raise TypeError(
            f"save_model: model must be MLP or UNet (unwrapped), got {type(model).__name__}"
        )
    if model.config.get("activation", "") is None:
        raise ValueError(
            "save_model: activation of the model must be given by name to be saved, got "
            f"{model.activation!r}"
        )
    return model.config


def load_network(
    folder: Path | str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    *,
    device: torch.device | str,
) -> Network:
    """The model of a config, with these weights in their own dtype. In eval mode."""
    path = Path(folder) / WEIGHTS
    name = config["_class_name"]
    dtypes = sorted({str(value.dtype) for value in state.values()})
    if len(dtypes) != 1 or not all(value.is_floating_point() for value in state.values()):
        raise ValueError(f"{HOLD} weights of one floating dtype, got {', '.join(dtypes)} in {path}")
    try:
        with torch.random.fork_rng(devices=[]):  # the first weights are overwritten
            model = NETWORKS[name](**arguments_of(config))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{HOLD} the arguments of {name}, got {path}: {error}") from None
    model.to(next(iter(state.values())).dtype)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{HOLD} the weights of its model, got {path}: {reason}") from None
    return model.to(device).eval()
