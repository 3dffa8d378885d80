"""One differentiable operator behind two doors to the same kernel.

Eager calls go straight to the kernel, or through one autograd.Function where a gradient or a
torch.func transform is at work; torch.compile, fake tensors and dispatch modes go through an
operator registered with torch.library. The second door costs several times the first and has no
forward mode (it raises): hence both, made by one helper from one description.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_PLAIN = (Tensor, torch.nn.Parameter)
# The vmap of torch.autograd.grad(is_grads_batched=True), which torch.func knows nothing of.
_LEGACY_VMAP: Any = torch._C._parse_dispatch_key("Batched")
LIBRARY = torch.library.Library("hos_ext", "DEF")


# -------------------------------------------------------------------------- what is at work here


def functorch_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp) is at work."""
    return bool(torch._C._are_functorch_transforms_active())


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation is at work."""
    return forward_ad._current_level >= 0


def native_may_judge() -> bool:
    """Whether the native module may see for itself what is at work.

    It knows of torch.func, dispatch modes and tracing, but not of these two.
    """
    return not (torch.compiler.is_compiling() or forward_ad._current_level >= 0)


def derivative_wanted(*tensors: Tensor) -> bool:
    """Whether anything may differentiate with respect to the tensors."""
    return functorch_active() or forward_mode_active() or _tracked(tensors)


def _levels(kind: Any) -> int:
    """How many torch.func transforms of a kind are at work."""
    levels = torch._C._functorch.get_interpreter_stack() if functorch_active() else None
    return sum(level.key() == kind for level in levels or ())


def vmap_active() -> bool:
    """Whether a torch.func.vmap is at work."""
    return _levels(torch._C._functorch.TransformType.Vmap) > 0


def outside_transforms() -> Any:
    """A context in which torch.func transforms see nothing."""
    return torch._C._DisableFuncTorch()


def is_plain(t: Tensor) -> bool:
    """Whether a tensor's values may be read here and now."""
    return type(t) in _PLAIN and not t.is_meta


def needs_library(tensors: Sequence[Tensor]) -> bool:
    """Compiled, traced, fake, meta or otherwise dispatched tensors go through torch.library."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace
        return True
    return not all(map(is_plain, tensors))


def is_readable(*tensors: Tensor | None) -> bool:
    """Whether values and addresses of the tensors may be looked at here and now."""
    return not needs_library([t for t in tensors if t is not None]) and not functorch_active()


def dense_like(t: Tensor) -> Tensor:
    """Dense memory for a gradient: a factor `(..., D, r)` keeps its memory order."""
    if t.is_contiguous():
        return torch.empty_like(t)
    if t.dim() >= 3 and t.stride(-2) == 1 and t.shape[-1] > 1 and t.stride(-1) != 1:
        return t.new_empty(*t.mT.shape).mT
    return t.new_empty(*t.shape)


# ----------------------------------------------------------------------------------- the operator

Named = Mapping[str, Any]  # the arguments of a call, by name


class Argument(NamedTuple):
    """An argument of an operator.

    Attributes:
        name: its name in the operator's functions and in messages.
        type: its type in the schema of torch.library: "Tensor", "Tensor?", "int", "SymInt".
        batch: the axis of samples, which vmap folds its lanes into; a function of all arguments
            where it depends on them; None where all samples share the argument.
        differentiable: whether backward gives its gradient.
        either_order: whether its last two axes may lie in either memory order; its gradient
            then keeps that order.
        scalar: the dtype of the 0-d tensor that torch.library is given for a Python number, which
            as a constant of a graph would recompile.
    """

    name: str
    type: str = "Tensor"
    batch: int | Callable[[Named], int | None] | None = None
    differentiable: bool = False
    either_order: bool = False
    scalar: torch.dtype | None = None


class Operator:
    """One operator, two doors: `function` (autograd.Function) and `library` (torch.library).

    Called with its arguments in their order, it returns its outputs: the first is differentiable,
    the others are what backward needs.

    Args:
        name: in torch.ops.hos_ext; "space::name" is torch.ops.space.name.
        arguments: what each argument is. All else here takes them in this order.
        forward: forward(*arguments) -> outputs. Its parameters have the names of the arguments.
        backward: backward(needs, grad, *arguments, *saved) -> for each differentiable argument its
            gradient, or None. `needs` says which of them are wanted, `grad` is that of the first
            output, `saved` are the other outputs.
        jvp: jvp(tangents, *arguments, *saved) -> the tangent of the first output. `tangents` holds
            one for each differentiable argument, or None.
        fake: fake(*arguments) -> empty outputs, of the shapes and strides of forward's.
        saved: how many outputs follow the first.
        label: label(arguments by name) -> the public function, for messages; the name if None.

    Raises:
        TypeError: forward has other parameters than `arguments` says.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[Argument],
        *,
        forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., tuple[Tensor | None, ...]],
        jvp: Callable[..., Tensor],
        fake: Callable[..., tuple[Tensor, ...]],
        saved: int = 0,
        label: Callable[[Named], str] | None = None,
    ) -> None:
        space, _, self.name = name.rpartition("::")
        self.space = space or "hos_ext"
        self.names = tuple(a.name for a in arguments)
        if self.names != tuple(inspect.signature(forward).parameters):
            raise TypeError(f"Operator: forward of {name} must take {', '.join(self.names)}")
        self.arguments, self.forward, self.saved = tuple(arguments), forward, saved
        self.jvp = _without_autocast(jvp)
        self.backward = _without_autocast(  # a lazy minus sign is not in memory
            lambda needs, grad, *args: backward(needs, grad.resolve_neg(), *args)
        )
        self.differentiable = [i for i, a in enumerate(arguments) if a.differentiable]
        self._label = label
        self.function = _make_function(self)
        # Without transforms: Function.apply would bind the signature first, in 20 us.
        self.apply = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]
        self.backward_function = _make_backward_function(self)
        self.registry = torch.library.Library(space, "FRAGMENT") if space else LIBRARY
        self.schema = ", ".join(f"{a.type} {a.name}" for a in arguments)
        self.library = _register_forward(self, fake)
        self.library_backward = _register_backward(self)

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if needs_library(tensors):
            return self.library(*self.as_tensors(args))  # type: ignore[no-any-return]
        if functorch_active() or forward_mode_active():
            return self.function.apply(*args)  # type: ignore[no-any-return]
        return self.apply(*args) if _tracked(tensors) else self.forward(*args)

    def call_backward(self, needs: Sequence[bool], grad: Tensor, *args: Any) -> tuple[Any, ...]:
        """The gradients of the differentiable arguments, None where not needed."""
        tensors = [grad, *(a for a in args if isinstance(a, Tensor))]
        if needs_library(tensors) or torch._C._dispatch_keys(grad).has(_LEGACY_VMAP):
            grads = self.library_backward(list(needs), grad, *self.as_tensors(args))
        elif functorch_active() or forward_mode_active() or _tracked(tensors):
            grads = self.backward_function.apply(tuple(needs), grad, *args)
        else:
            grads = self.backward(needs, grad, *args)
        return tuple([g if n else None for g, n in zip(grads, needs, strict=True)])

    def named(self, args: Sequence[Any]) -> Named:
        """The arguments by name; saved outputs after them are left out."""
        return dict(zip(self.names, args, strict=False))

    def label(self, args: Sequence[Any]) -> str:
        """The public function that a message names."""
        return self._label(self.named(args)) if self._label else self.name

    def batch_axes(self, args: Sequence[Any]) -> list[int | None]:
        """The axis of samples of each argument, and of each saved output after them."""
        named = self.named(args)
        axes = [a.batch(named) if callable(a.batch) else a.batch for a in self.arguments]
        return axes + [0] * (len(args) - len(axes))

    def gradient_like(self, position: int, t: Tensor) -> Tensor:
        """The memory that backward gives a gradient: dense, in the argument's order of axes."""
        return dense_like(t) if self.arguments[position].either_order else t.new_empty(t.shape)

    def as_tensors(self, args: Sequence[Any]) -> list[Any]:
        """Python scalars as 0-d tensors: as constants in a schema they would recompile.

        A product is what torch.compile turns into tensor arithmetic; torch.full would guard on
        the value of a float and recompile for each.
        """
        out = list(args)
        for position, argument in enumerate(self.arguments):
            value, dtype = out[position], argument.scalar
            if dtype is None or isinstance(value, Tensor):
                continue
            if isinstance(value, (float, torch.SymFloat)):
                out[position] = torch.ones((), dtype=dtype, device="cpu") * value  # type: ignore[operator]
            else:
                out[position] = torch.full((), value, dtype=dtype, device="cpu")
        return out

    def scatter(self, grads: Sequence[Any], n: int) -> list[Any]:
        """Gradients in the positions of the arguments."""
        out: list[Any] = [None] * n
        for position, grad in zip(self.differentiable, grads, strict=True):
            out[position] = grad
        return out

    def fold(
        self, size: int, in_dims: Sequence[Any], args: Sequence[Any]
    ) -> tuple[list[Any], list[int | None], int]:
        """vmap's axis folded into the batch axis of every argument; the axes; inner batch size."""
        axes = self.batch_axes(args)
        lead = next(p for p, a in enumerate(args) if isinstance(a, Tensor) and axes[p] is not None)
        shape = list(args[lead].shape)
        if in_dims[lead] is not None:
            shape.pop(in_dims[lead])
        inner = shape[axes[lead] or 0]
        out = []
        for position, (arg, dim, axis) in enumerate(zip(args, in_dims, axes, strict=True)):
            if not isinstance(arg, Tensor):
                out.append(arg)
                continue
            if axis is None:
                if dim is not None:
                    raise RuntimeError(
                        f"{self.label(args)}: {self.names[position]} must be the same in all"
                        " lanes of vmap, got a batch of it"
                    )
                out.append(arg)
                continue
            if arg.dim() - (dim is not None) == 0:  # a scalar for each sample, or for all
                out.append(arg if dim is None else arg.repeat_interleave(inner))
                continue
            if dim is None:
                arg = arg.unsqueeze(axis).expand(*arg.shape[:axis], size, *arg.shape[axis:])
            else:
                arg = arg.movedim(dim, axis)
            out.append(arg.flatten(axis, axis + 1))
        return out, axes, inner

    def vmap(self, call: Any, info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
        """One call of the operator for all lanes: outputs, and the axes of the lanes in them."""
        folded, _, inner = self.fold(info.batch_size, in_dims, args)
        lanes = tuple(o.unflatten(0, (info.batch_size, inner)) for o in call(*folded))
        return lanes, (0,) * len(lanes)

    def vmap_backward(
        self,
        call: Any,
        info: Any,
        in_dims: Sequence[Any],
        needs: Sequence[bool],
        grad: Tensor,
        args: Sequence[Any],
    ) -> Any:
        """As `vmap`; in_dims begins at grad. Gradients not needed are empty."""
        if in_dims[0] is None:
            lead = grad.expand(info.batch_size, *grad.shape)
        else:
            lead = grad.movedim(in_dims[0], 0)
        if all(dim is None for dim in in_dims[1:]):  # jacrev: nothing but the gradient differs
            each = zip(*(call(needs, g, *args) for g in lead.unbind(0)), strict=True)
            axes = [0 if n else None for n in needs]
            grads = [torch.stack(g) if n else None for g, n in zip(each, needs, strict=True)]
        else:
            folded, folds, inner = self.fold(info.batch_size, in_dims[1:], args)
            axes = [
                folds[p] or 0 if n else None
                for p, n in zip(self.differentiable, needs, strict=True)
            ]
            grads = [
                None if axis is None else g.unflatten(axis, (info.batch_size, inner))
                for g, axis in zip(call(needs, lead.flatten(0, 1), *folded), axes, strict=True)
            ]
        return tuple(grad.new_empty(0) if g is None else g for g in grads), tuple(axes)


def _tracked(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd records what happens to the tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _split(args: Sequence[Any]) -> tuple[list[Tensor | None], list[Any]]:
    """Tensors to save, and the other arguments in their places."""
    tensors = [a if isinstance(a, Tensor) else None for a in args]
    others = [None if isinstance(a, Tensor) else a for a in args]
    return tensors, others


def _merge(tensors: Sequence[Tensor | None], others: Sequence[Any]) -> list[Any]:
    return [o if t is None else t for t, o in zip(tensors, others, strict=True)]


def _make_function(op: Operator) -> Any:
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return op.forward(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.others = _split(inputs)
        ctx.count = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])
        if functorch_active() or forward_mode_active():
            ctx.save_for_forward(*tensors, *output[1:])

    def saved(ctx: Any) -> list[Any]:
        tensors = ctx.saved_tensors
        return [*_merge(tensors[: ctx.count], ctx.others), *tensors[ctx.count :]]

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * ctx.count
        wanted = ctx.needs_input_grad
        needs = [wanted[p] for p in op.differentiable]
        return tuple(op.scatter(op.call_backward(needs, grad, *saved(ctx)), ctx.count))

    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        args = saved(ctx)
        if _levels(torch._C._functorch.TransformType.Jvp) > 1:
            # The outer tangents of what follows would be lost without a word.
            raise RuntimeError(
                f"{op.label(args)}: forward mode twice is not supported, got jvp inside jvp; use"
                " hos_ext.ops.reference for second derivatives"
            )
        for position, tangent in enumerate(tangents):
            if tangent is not None and position not in op.differentiable:
                raise ValueError(
                    f"{op.label(args)}: {op.names[position]} must not carry a tangent, got one"
                )
        chosen = [tangents[p] for p in op.differentiable]
        return (op.jvp(chosen, *args), *(None for _ in args[ctx.count :]))

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return op.vmap(op, info, in_dims, args)

    return _function_class(
        op.name,
        torch.autograd.Function,
        forward=forward,
        setup_context=setup_context,
        backward=backward,
        jvp=jvp,
        vmap=vmap,
    )


def _make_backward_function(op: Operator) -> Any:
    """The backward operator as a Function whose own derivatives raise instead of reading zero."""

    def forward(needs: tuple[bool, ...], grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        grads = op.backward(needs, grad, *args)
        return tuple(grad.new_empty(0) if g is None else g for g in grads)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.label = op.label(inputs[2:])

    def vmap(info: Any, in_dims: tuple[Any, ...], needs: Any, grad: Tensor, *args: Any) -> Any:
        return op.vmap_backward(op.call_backward, info, in_dims[1:], needs, grad, args)

    return _function_class(
        op.name + "_backward",
        torch.autograd.Function,
        forward=forward,
        setup_context=setup_context,
        backward=_refuse,
        jvp=_refuse,
        vmap=vmap,
    )


def _function_class(name: str, base: Any, **methods: Any) -> Any:
    return type(name, (base,), {key: staticmethod(method) for key, method in methods.items()})


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Derivatives in the precision of their arguments: autocast would round matrix products."""

    def call(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*args)
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return call


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        f"{ctx.label}: double backward is not supported, got a request for the derivative of its"
        " gradient; use hos_ext.ops.reference for second derivatives"
    )


def _refuse_forward_mode(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        f"{ctx.label}: forward-mode differentiation does not reach compiled, fake or dispatched"
        " tensors, got a tangent; call it outside torch.compile and dispatch modes"
    )


# ------------------------------------------------------------------------------ the second door

# The kernels rely on rows that are dense in memory, as the public functions made them.
_TAGS = (torch.Tag.needs_fixed_stride_order,)
Methods = dict[str, Callable[..., Any]]


def _pack(values: tuple[Tensor, ...]) -> Any:
    """As torch.library wants them: one value alone is no tuple."""
    return values if len(values) > 1 else values[0]


def _unpack(values: Any) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


def _register_forward(op: Operator, fake: Callable[..., Any]) -> Any:
    """The operator, registered with torch.library."""

    def forward(*args: Any) -> Any:
        return _pack(op.forward(*args))

    def forward_fake(*args: Any) -> Any:
        return _pack(fake(*args))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        args = inputs[1:]
        tensors, ctx.others = _split(args)
        ctx.count, ctx.label = len(args), op.label(args)
        extra = _unpack(output)[1:]
        ctx.mark_non_differentiable(*extra)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *extra)

    def formula(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * (ctx.count + 1)
        tensors = ctx.saved_tensors
        args = [*_merge(tensors[: ctx.count], ctx.others), *tensors[ctx.count :]]
        needs = [ctx.needs_input_grad[p + 1] for p in op.differentiable]
        grads = op.library_backward(needs, grad, *args)
        kept = [g if n else None for g, n in zip(grads, needs, strict=True)]
        return (None, *op.scatter(kept, ctx.count))

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        outputs, axes = op.vmap(op.library, info, in_dims, args)
        return _pack(outputs), _pack(axes)

    signature = f"{op.schema} -> {_returns(1 + op.saved)}"
    methods: Methods = {
        "setup_context": setup_context,
        "backward": formula,
        "jvp": _refuse_forward_mode,
    }
    return _define(op, op.name, signature, forward, forward_fake, vmap, methods)


def _register_backward(op: Operator) -> Any:
    """Its backward, whose derivatives raise; gradients that are not needed are empty."""

    def backward(needs: list[bool], grad: Tensor, *args: Any) -> Any:
        grads = zip(op.backward(needs, grad, *args), needs, strict=True)
        return _pack(tuple(g if n and g is not None else grad.new_empty(0) for g, n in grads))

    def backward_fake(needs: list[bool], grad: Tensor, *args: Any) -> Any:
        wanted = zip(op.differentiable, needs, strict=True)
        return _pack(
            tuple(op.gradient_like(p, args[p]) if n else grad.new_empty(0) for p, n in wanted)
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.label = op.label(inputs[3:])

    def vmap(info: Any, in_dims: tuple[Any, ...], needs: Any, grad: Tensor, *args: Any) -> Any:
        grads, axes = op.vmap_backward(op.library_backward, info, in_dims[1:], needs, grad, args)
        return _pack(grads), _pack(axes)

    saved = "".join(f", Tensor saved{i}" for i in range(op.saved))
    returns = _returns(len(op.differentiable))
    signature = f"bool[] needs, Tensor grad, {op.schema}{saved} -> {returns}"
    methods: Methods = {"setup_context": setup_context, "backward": _refuse, "jvp": _refuse}
    return _define(op, op.name + "_backward", signature, backward, backward_fake, vmap, methods)


def _returns(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _define(
    op: Operator,
    name: str,
    signature: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
    methods: Methods,
) -> Any:
    """Registers one function with torch.library; what calls it, its outputs in a tuple."""
    arguments, returns = signature.split(" -> ")
    registry, full = op.registry, f"{op.space}::{name}"
    registry.define(f"{name}({arguments}) -> {returns}", tags=_TAGS)
    registry.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(full, fake, lib=registry)
    packet = getattr(getattr(torch.ops, op.space), name)
    kernel = _autograd_kernel(name, packet.default, methods)
    registry.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(full, vmap, lib=registry)
    return packet if returns != "Tensor" else lambda *args: (packet(*args),)


def _autograd_kernel(name: str, operator: Any, methods: Methods) -> Callable[..., Any]:
    """The autograd kernel of a library operator; its function has one leading argument more.

    torch.library.register_autograd cannot be used: under torch.func.grad (in torch.compile) it
    raises, and under forward mode it reads as zero.
    """

    def forward(state: tuple[Any, bool], *args: Any) -> Any:
        keys, grad_enabled = state
        # A Function turns both modes of differentiation off: outer transforms still need them.
        with (
            torch.set_grad_enabled(grad_enabled),
            forward_ad._set_fwd_grad_enabled(True),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    function = _function_class(name + "_library", _SingleLevelFunction, forward=forward, **methods)

    def autograd(keys: Any, *args: Any) -> Any:
        # torch.func's transforms are at work already when they reach this kernel: one level each.
        with enable_single_level_autograd_function():
            return function.apply((keys, torch.is_grad_enabled()), *args)

    return autograd
