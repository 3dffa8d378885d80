"""The Jacobian of a row-wise function by automatic differentiation: products, and what they need.

`Jacobian` multiplies forward (jvp) and transposed (vjp). Before it does, it refuses networks that
have no derivative row by row, and while it does, it keeps torch to operators that have forward
derivatives. `ScoreHessian` builds the interface of a matrix on it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..checks import DROPOUT, check_tensor
from ..ops.noise import draw_normal
from ..random import STREAM_START, Key
from ..scores import FirstOrderScore

CHUNK = 32
_GAP = 0.04  # what rounding may be between jvp and vjp; bfloat16 networks have 2^-8 an operation
_COUPLING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Jacobian:
    """J = d score / d x, per sample.

    Args:
        score_fn: maps points (B, *dims) to scores of the same shape, each row to its own.
        x: the points. Shape (B, *dims), float32 or float64.
        chunk_size: vectors multiplied at once, > 0; None is all at once.

    Attributes:
        x: the points, detached and contiguous.
        score: the scores there.
        forward_mode: whether `forward` is a jvp, else a double vjp. `check` finds out.

    Errors name `ScoreHessian`, whose user brought score_fn.

    Example:
        >>> import torch
        >>> from hos_ext.linalg.autodiff import Jacobian
        >>> jacobian = Jacobian(lambda x: -x * x, torch.tensor([[1.0, 2.0]]))
        >>> jacobian.forward(torch.ones(1, 2, 1)).squeeze(-1)
        tensor([[-2., -4.]])
    """

    def __init__(self, score_fn: FirstOrderScore, x: Tensor, chunk_size: int | None = CHUNK):
        _refuse_training(score_fn)
        self.score_fn = score_fn
        self.x = x.detach().contiguous()  # jvp refuses expanded memory
        self.chunk_size = chunk_size
        self.forward_mode = True
        with torch.no_grad(), differentiable():
            self.score = score_fn(self.x)
        check_tensor("ScoreHessian", "score_fn(x)", self.score, like=x, shape=tuple(x.shape))

    def forward(self, v: Tensor) -> Tensor:
        """J v for v (B, D, k)."""
        if self.forward_mode:
            return self._map(lambda t: jvp(self.score_fn, (self.x,), (t,))[1], v)
        with torch.no_grad(), differentiable():
            # u -> J^T u is linear, so that its own transpose is J.
            pull = vjp(self.score_fn, self.x)[1]
            push = vjp(lambda u: pull(u)[0], torch.zeros_like(self.x))[1]
        return self._map(lambda t: push(t)[0], v)

    def transposed(self, v: Tensor) -> Tensor:
        """J^T v for v (B, D, k)."""
        with torch.no_grad(), differentiable():
            pull = vjp(self.score_fn, self.x)[1]
        return self._map(lambda t: pull(t)[0], v)

    @torch.no_grad()
    def _map(self, product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """A product with points (B, *dims), applied to the columns of v (B, D, k)."""
        if v.numel() == 0:
            return torch.zeros_like(v)
        points = v.movedim(-1, 0).reshape(-1, *self.x.shape)
        with differentiable():
            if self.chunk_size == 1 or len(points) == 1:
                out = torch.stack([product(t) for t in points])
            else:
                out = vmap(product, chunk_size=self.chunk_size)(points)
        return out.flatten(2).movedim(0, -1)

    # ------------------------------------------------------------------------------- the check

    def check(self) -> None:
        """Compare a jvp with a vjp: <u, J v> = <J^T u, v>.

        u is in row 0 alone, where J^T u must then be too. It is along J v: for any other both sides
        would be small, about 1 / sqrt(D) of |u| |J v|.

        Raises:
            ValueError: the scores are random, couple rows, have no gradient, or have a forward
                derivative that does not fit it.
            RuntimeError: torch cannot differentiate score_fn.
        """
        v = self._start(0)
        forward, again = self._try_forward(v)
        length = forward[0].norm()
        u = torch.zeros_like(v)
        u[0] = self._start(1)[0] if length == 0 else forward[:1].mT / length
        gap = (again - self.score).abs().max()
        if bool(gap > 0.01 * self.score.abs().max()):
            raise ValueError(
                "ScoreHessian: score_fn must give the same score twice, got two that differ by"
                f" {float(gap):.3g}"
            )
        backward = self._try_backward(u)
        if not bool(backward.any()):
            raise ValueError(
                "ScoreHessian: score_fn must be differentiable in x (no detach, no_grad or .data in"
                " it), got a zero gradient"
            )
        if bool(backward[1:].abs().sum() > 1e-6 * backward[0].abs().sum()):
            raise ValueError(
                "ScoreHessian: score_fn must treat each row by itself, got a score of row 0 that"
                " depends on other rows"
            )
        one, other = u[0, :, 0].dot(forward[0]), backward[0].dot(v[0, :, 0])
        if bool((one - other).abs() > _GAP * torch.maximum(one.abs(), other.abs())):
            raise ValueError(
                "ScoreHessian: score_fn must have a forward derivative that fits its gradient, got"
                f" <u, J v> = {float(one):.6g} and <J^T u, v> = {float(other):.6g}"
            )

    def _start(self, offset: int) -> Tensor:
        """A standard normal column (B, D, 1), the same in every call."""
        shape = (*self.x.flatten(1).shape, 1)
        return draw_normal(Key(0, offset), STREAM_START, shape, self.x)

    def _try_backward(self, u: Tensor) -> Tensor:
        """J^T u (B, D) for u (B, D, 1)."""
        try:
            return self.transposed(u).squeeze(-1)
        except RuntimeError as error:
            raise RuntimeError(
                "ScoreHessian: score_fn must be differentiable by torch.func.vjp (check=False with"
                f" symmetrize=False does without), got: {error}"
            ) from error

    def _try_forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """J v (B, D) for v (B, D, 1) and the score, by jvp or else, from now on, by double vjp."""
        points = v.reshape(self.x.shape)
        try:
            with torch.no_grad(), differentiable():
                both = jvp(self.score_fn, (self.x,), (points,))
            return both[1].flatten(1), both[0]
        except RuntimeError as refusal:  # NotImplementedError is one
            reason = refusal
        self.forward_mode = False
        try:
            forward = self.forward(v).squeeze(-1)
        except RuntimeError as error:
            raise RuntimeError(
                "ScoreHessian: score_fn must be differentiable by torch.func.jvp, or twice by"
                f" torch.func.vjp, got: {reason}"
            ) from error
        warnings.warn(
            "ScoreHessian: products by double vjp, for want of a forward derivative:"
            f" {str(reason).splitlines()[0]}",
            stacklevel=4,
        )
        return forward, self.score


# --------------------------------------------------------------------------------------- networks


class _DenseGroupNorm(TorchFunctionMode):
    """group_norm with its input made contiguous: its forward derivative fails for transposed
    memory, which is what the attention blocks of U-Nets return."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.group_norm and args:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def differentiable() -> Iterator[None]:
    """Keeps a network to what torch can differentiate forward: not so fused attention."""
    with sdpa_kernel(SDPBackend.MATH), _DenseGroupNorm():
        yield


def _held_modules(score_fn: FirstOrderScore) -> Iterator[nn.Module]:
    """The modules that a callable shows: itself, its object, closure, defaults, partial parts."""
    left: list[Any] = [score_fn]
    seen: dict[int, Any] = {}  # keeps what it names alive, so that no id comes twice
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, partial):
            left += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            left += [value.__func__, value.__self__]
        elif isinstance(value, FunctionType):
            left += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            for cell in value.__closure__ or ():
                try:
                    left.append(cell.cell_contents)
                except ValueError:  # a variable without a value yet
                    continue


def _refuse_training(score_fn: FirstOrderScore) -> None:
    """Raises for batch normalisation or dropout in training mode, where modules can be seen."""
    for module in (m for root in _held_modules(score_fn) for m in root.modules()):
        random = isinstance(module, DROPOUT) and module.p > 0
        if module.training and (random or isinstance(module, _COUPLING)):
            raise ValueError(
                "ScoreHessian: score_fn must be in eval mode, got"
                f" {type(module).__name__} in training mode"
            )
