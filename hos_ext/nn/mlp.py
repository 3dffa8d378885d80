"""A multilayer perceptron with the three heads of `Scores`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..checks import check
from .base import KINK, Network, NoiseLevel, check_size

# Angular frequencies in log(sigma / sigma_data). The slowest has a period of e^25 in sigma, so all
# levels differ; the fastest resolves a factor of two.
_FREQUENCIES = (0.25, 0.5, 1.0, 2.0)
_NOISE_FEATURES = 2 * len(_FREQUENCIES)
_CLASS_FEATURES = 16

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "softplus": functional.softplus,
}


class MLP(Network):
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
        given_score: a second-order head for a score that is known (see `SecondOrderHead`). There is
            no score network: `model(x, sigma, scaled_score)` sees it beside x, and returns
            it with c and the factor. width and depth are then those of the shared trunk only.
        num_classes: classes of a conditional model, called with `label=`. Each hidden layer then
            sees an embedding of the class. None: no condition.
        device: of the weights; torch's default.
        dtype: of the weights, floating; torch's default.

    The score and c start at the values for Gaussian data, the constrained c at c_min more than
    that. The factor starts small but not at zero. The loss depends on U U^T and its gradient 4 R U
    vanishes at U = 0: a factor that starts there stays there.

    Attributes:
        config: these arguments as plain JSON, with "_class_name".
        gradient_checkpointing: set it to True to keep only the inputs of each hidden stack for
            backward and compute the rest again: less memory, the same gradients.

    Raises:
        ValueError: a size, rank, sigma_data, c_min, trunk or activation breaks the rules above.
        TypeError: dims is not a sequence, a size or rank not an int, or activation not callable.

    References:
        Meng et al. 2021, arXiv:2111.04726, section 5 (widths) and Eq. 13 (diag + U U^T).

    Example:
        >>> import hos_ext, torch
        >>> model = hos_ext.MLP((2, 3), rank=4)
        >>> scores = model(torch.zeros(5, 2, 3), 0.5)
        >>> scores.scaled_score.shape, scores.factor.shape
        (torch.Size([5, 2, 3]), torch.Size([5, 6, 4]))
    """

    class_name = "MLP"

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
        rank = self.rank
        sizes = {
            "width": width,
            "depth": depth,
            "head_width": head_width,
            "head_depth": head_depth,
        }
        sizes = {name: check_size("MLP", name, size) for name, size in sizes.items()}
        width, depth, head_width, head_depth = sizes.values()
        self.activation = activation
        function, name_of_function = _activation(activation)
        self.gradient_checkpointing = False
        self.config = self._make_config(**sizes, trunk=trunk, activation=name_of_function)
        size = self._size
        self._shape = (size,)
        inputs = 2 * size if given_score else size
        told = _NOISE_FEATURES + (_CLASS_FEATURES if self.num_classes else 0)
        bodies = []
        if trunk == "shared" or not given_score:
            bodies.append(_Body(inputs, told, width, depth, function))
        if trunk == "separate":
            heads = 1 if rank == 0 else 2
            bodies += [_Body(inputs, told, head_width, head_depth, function) for _ in range(heads)]
        else:
            head_width = width
        self.bodies = nn.ModuleList(bodies)
        self._set_heads(
            None if given_score else nn.Linear(width, size),
            nn.Linear(head_width, size),
            nn.Linear(head_width + 1, size * rank, bias=False) if rank else None,
        )
        if self.num_classes:
            self.classes = nn.Embedding(self.num_classes + 1, _CLASS_FEATURES)
        self._place(device, dtype)

    def _features(
        self, inputs: Tensor, level: NoiseLevel, label: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        told = _noise_features(level)
        if label is not None:
            told = torch.cat([told, self.classes(label).to(told.dtype)], -1)
        hidden = [self._hidden(body, inputs, told) for body in self.bodies]
        # From the end: [score, c, factor], [c, factor], [score, c], [c] or the shared trunk.
        of_c = len(hidden) - 2 if self.rank and len(hidden) > 1 else len(hidden) - 1
        return hidden[0], hidden[of_c], hidden[-1]

    def _raw_score(self, features: Tensor, k: Tensor) -> Tensor:
        score: Tensor = self.score(features)
        return k * score  # the bias fades too

    def _factor(self, features: Tensor, k: Tensor) -> Tensor:
        # k enters before the last layer (the column of ones is its bias), not after it: that
        # would be one more pass over the (B, D, r) factor, as dear as the loss itself.
        scaled = k * functional.pad(features, (0, 1), value=1.0)
        factor: Tensor = self.factor(scaled)
        return factor.reshape(features.shape[0], self._size, self.rank)

    def _hidden(self, body: nn.Module, inputs: Tensor, told: Tensor) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            hidden: Tensor = body(inputs, told)
            return hidden
        hidden = checkpoint(body, inputs, told, use_reentrant=False, preserve_rng_state=False)
        return hidden

    def saved_config(self) -> dict[str, Any]:
        named = self.config["activation"] is not None
        rule = "activation of the model must be given by name to be saved"
        check("save_model", named, rule, f"{self.activation!r}")
        return self.config


class _Body(nn.Module):
    """Hidden layers, each of which is told the noise level and the class beside its input."""

    def __init__(
        self, size: int, told: int, width: int, depth: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        sizes = [size] + [width] * (depth - 1)
        self.layers = nn.ModuleList(nn.Linear(n + told, width) for n in sizes)
        self.activation = activation

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(torch.cat([x, told], -1)))
        return x


def _noise_features(level: NoiseLevel) -> Tensor:
    """Sines and cosines of log(sigma / sigma_data), `(B, features)`: smooth, bounded."""
    frequencies = torch.tensor(_FREQUENCIES, dtype=level.k.dtype, device=level.k.device)
    angle = level.log_ratio.unsqueeze(-1) * frequencies
    return torch.cat([angle.sin(), angle.cos()], -1)


def _activation(value: Any) -> tuple[Callable[[Tensor], Tensor], str | None]:
    """The function, and its name where it has one."""
    if isinstance(value, str):
        names = ", ".join(repr(name) for name in _ACTIVATIONS)
        rule = f"activation must be one of {names}, or a function ({KINK})"
        check("MLP", value in _ACTIVATIONS, rule, f"{value!r}")
        return _ACTIVATIONS[value], value
    rule = "activation must be a name or a function"
    check("MLP", callable(value), rule, f"{value!r}", TypeError)
    return value, next((name for name, known in _ACTIVATIONS.items() if known is value), None)
