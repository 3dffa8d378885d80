"""A multilayer perceptron with the three heads of `Scores`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..scores import Scores
from .base import (
    NOISE_FEATURES,
    Network,
    activation_named,
    c_head,
    check_common,
    check_input,
    check_whole,
    level_features,
    noise_features,
)


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
        check_common("MLP", dims, rank, sigma_data, c_min, trunk)
        for name, size in (
            ("width", width),
            ("depth", depth),
            ("head_width", head_width),
            ("head_depth", head_depth),
        ):
            check_whole("MLP", name, size, 1)
        self.activation = activation
        function, activation_name = activation_named(activation)
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
        check_input("MLP", x, self.dims, self.c.weight, score, self.given_score)
        level = level_features("MLP", x, sigma, self.sigma_data)
        flat = x.flatten(1)
        features = noise_features(level)
        inputs = flat * level.inverse_std.unsqueeze(-1)
        if score is not None:
            inputs = torch.cat([inputs, score.flatten(1)], -1)
        hidden = [self._hidden(body, inputs, features) for body in self.bodies]
        skip, k = level.skip.unsqueeze(-1), level.k.unsqueeze(-1)
        if score is None:
            score = (k * self.score(hidden[0]) - skip * flat).reshape(x.shape)
        # From the end: [score, c, factor], [c, factor], [score, c], [c] or the shared trunk.
        second_to_last = len(hidden) - 2 if self.rank and len(hidden) > 1 else len(hidden) - 1
        c = c_head(self.c(hidden[second_to_last]), k, self.constrained, self.c_min)
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


class _Body(nn.Module):
    """Hidden layers, each of which sees the noise features beside its input."""

    def __init__(
        self, size: int, width: int, depth: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        sizes = [size] + [width] * (depth - 1)
        self.layers = nn.ModuleList(nn.Linear(n + NOISE_FEATURES, width) for n in sizes)
        self.activation = activation

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(torch.cat([x, features], -1)))
        return x
