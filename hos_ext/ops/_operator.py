"""One differentiable operator behind two doors to the same kernel.

Eager calls go straight to the kernel, or through one autograd.Function where a gradient or a
torch.func transform is at work; torch.compile, fake tensors and dispatch modes go through an
operator registered with torch.library. The second door costs several times the first and has no
forward mode (it raises): hence both, made by one helper from one description.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_PLAIN = (Tensor, torch.nn.Parameter)
# The vmap of torch.autograd.grad(is_grads_batched=True), which torch.func knows nothing of.
_LEGACY_VMAP: Any = torch._C._parse_dispatch_key("Batched")
LIBRARY = torch.library.Library("hos_ext", "DEF")


def functorch_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp) is at work."""
    return bool(torch._C._are_functorch_transforms_active())


def _levels(kind: Any) -> int:
    """How many torch.func transforms of a kind are at work."""
    levels = torch._C._functorch.get_interpreter_stack() if functorch_active() else None
    return sum(level.key() == kind for level in levels or ())


def vmap_active() -> bool:
    """Whether a torch.func.vmap is at work."""
    return _levels(torch._C._functorch.TransformType.Vmap) > 0


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


def dense_like(t: Tensor) -> Tensor:
    """Dense memory for a gradient: a factor `(..., D, r)` keeps its memory order."""
    if t.is_contiguous():
        return torch.empty_like(t)
    if t.dim() >= 3 and t.stride(-2) == 1 and t.shape[-1] > 1 and t.stride(-1) != 1:
        return t.new_empty(*t.mT.shape).mT
    return t.new_empty(*t.shape)


def _gradient_like(name: str, t: Tensor) -> Tensor:
    """The memory that a backward gives its gradient: dense, in the order of a factor."""
    return dense_like(t) if name == "factor" else t.new_empty(t.shape)


class Operator:
    """One operator, two doors: `function` (autograd.Function) and `library` (torch.library).

    forward(*args) -> outputs; the first is differentiable, the others are what backward needs.
    backward(needs, grad, *args, *saved) -> a gradient for each argument in `differentiable`.
    jvp(tangents, *args, *saved) -> the tangent of the first output.
    batch_axis(position, args) -> the batch axis of an argument, or None where it has none.
    label(args) -> the name of the public function, for messages.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        returns: int,
        *,
        forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., tuple[Tensor | None, ...]],
        jvp: Callable[..., Tensor],
        fake: Callable[..., tuple[Tensor, ...]],
        differentiable: Sequence[int],
        batch_axis: Callable[[int, Sequence[Any]], int | None],
        scalars: dict[int, torch.dtype],
        label: Callable[[Sequence[Any]], str] | None = None,
    ) -> None:
        self.name, self.forward = name, forward
        self.jvp = _without_autocast(jvp)
        self.backward = _without_autocast(  # a lazy minus sign is not in memory
            lambda needs, grad, *args: backward(needs, grad.resolve_neg(), *args)
        )
        self.differentiable, self.batch_axis, self.scalars = differentiable, batch_axis, scalars
        self.label = label or (lambda args: name)
        self.arguments = [declared.split()[-1] for declared in schema.split(", ")]
        self.function = _make_function(self)
        # Without transforms: Function.apply would bind the signature first, in 20 us.
        self.apply = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]
        self.backward_function = _make_backward_function(self)
        _register(self, schema, returns, fake)
        self.library = getattr(torch.ops.hos_ext, name)
        self.library_backward = getattr(torch.ops.hos_ext, name + "_backward")

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if needs_library(tensors):
            outputs = self.library(*self.as_tensors(args))
            return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        if functorch_active() or forward_ad._current_level >= 0:
            return self.function.apply(*args)  # type: ignore[no-any-return]
        return self.apply(*args) if _tracked(tensors) else self.forward(*args)

    def call_backward(self, needs: Sequence[bool], grad: Tensor, *args: Any) -> tuple[Any, ...]:
        """The gradients of the differentiable arguments, None where not needed."""
        tensors = [grad, *(a for a in args if isinstance(a, Tensor))]
        if needs_library(tensors) or torch._C._dispatch_keys(grad).has(_LEGACY_VMAP):
            grads = self.library_backward(list(needs), grad, *self.as_tensors(args))
        elif functorch_active() or forward_ad._current_level >= 0 or _tracked(tensors):
            grads = self.backward_function.apply(tuple(needs), grad, *args)
        else:
            grads = self.backward(needs, grad, *args)
        return tuple([g if n else None for g, n in zip(grads, needs, strict=True)])

    def as_tensors(self, args: Sequence[Any]) -> list[Any]:
        """Python scalars as 0-d tensors: as constants in a schema they would recompile.

        A product is what torch.compile turns into tensor arithmetic; torch.full would guard on
        the value of a float and recompile for each.
        """
        out = list(args)
        for position, dtype in self.scalars.items():
            value = out[position]
            if isinstance(value, (float, torch.SymFloat)):
                out[position] = torch.ones((), dtype=dtype, device="cpu") * value  # type: ignore[operator]
            elif not isinstance(value, Tensor):
                out[position] = torch.full((), value, dtype=dtype, device="cpu")
        return out

    def scatter(self, grads: Sequence[Any], n: int) -> list[Any]:
        """Gradients in the positions of the arguments."""
        out: list[Any] = [None] * n
        for position, grad in zip(self.differentiable, grads, strict=True):
            out[position] = grad
        return out

    def fold(self, size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[list[Any], int]:
        """vmap's axis folded into the batch axis of every argument; also the inner batch size."""
        lead = next(
            p
            for p, a in enumerate(args)
            if isinstance(a, Tensor) and self.batch_axis(p, args) is not None
        )
        shape = list(args[lead].shape)
        if in_dims[lead] is not None:
            shape.pop(in_dims[lead])
        inner = shape[self.batch_axis(lead, args) or 0]
        out = []
        for position, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
            axis = self.batch_axis(position, args)
            if not isinstance(arg, Tensor):
                out.append(arg)
                continue
            if axis is None:
                if dim is not None:
                    raise RuntimeError(
                        f"{self.label(args)}: {self.arguments[position]} must be the same in all"
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
        return out, inner

    def vmap(self, call: Any, info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
        """One call of the operator for all lanes: outputs, and the axes of the lanes in them."""
        folded, inner = self.fold(info.batch_size, in_dims, args)
        outputs = call(*folded)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        lanes = tuple(o.unflatten(0, (info.batch_size, inner)) for o in outputs)
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
            folded, inner = self.fold(info.batch_size, in_dims[1:], args)
            axes = [
                self.batch_axis(p, args) or 0 if n else None
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
        if functorch_active() or forward_ad._current_level >= 0:
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
                " hos_ext.reference for second derivatives"
            )
        for position, tangent in enumerate(tangents):
            if tangent is not None and position not in op.differentiable:
                raise ValueError(
                    f"{op.label(args)}: {op.arguments[position]} must not carry a tangent, got one"
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
        " gradient; use hos_ext.reference for second derivatives"
    )


def _refuse_forward_mode(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        f"{ctx.label}: forward-mode differentiation does not reach compiled, fake or dispatched"
        " tensors, got a tangent; call it outside torch.compile and dispatch modes"
    )


def _register(op: Operator, schema: str, returns: int, fake: Callable[..., Any]) -> None:
    """Registers the operator and its backward with torch.library."""
    name, count = op.name, len(op.differentiable)
    outputs = ", ".join(["Tensor"] * returns)
    grads = ", ".join(["Tensor"] * count)
    saved = "".join(f", Tensor saved{i}" for i in range(returns - 1))
    # The kernels rely on rows that are dense in memory, as `ops` made them.
    tags = (torch.Tag.needs_fixed_stride_order,)
    LIBRARY.define(
        f"{name}({schema}) -> ({outputs})" if returns > 1 else f"{name}({schema}) -> Tensor",
        tags=tags,
    )
    LIBRARY.define(
        f"{name}_backward(bool[] needs, Tensor grad, {schema}{saved}) -> ({grads})", tags=tags
    )

    def pack(outputs: tuple[Tensor, ...]) -> Any:
        return outputs if returns > 1 else outputs[0]

    def forward(*args: Any) -> Any:
        return pack(op.forward(*args))

    def forward_fake(*args: Any) -> Any:
        return pack(fake(*args))

    def backward(needs: list[bool], grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        grads = op.backward(needs, grad, *args)
        return tuple(
            g if n and g is not None else grad.new_empty(0)
            for g, n in zip(grads, needs, strict=True)
        )

    def backward_fake(needs: list[bool], grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(
            _gradient_like(op.arguments[p], args[p]) if n else grad.new_empty(0)
            for p, n in zip(op.differentiable, needs, strict=True)
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        args = inputs[1:]
        tensors, ctx.others = _split(args)
        ctx.count, ctx.label = len(args), op.label(args)
        extra = output[1:] if returns > 1 else ()
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

    def setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.label = op.label(inputs[3:])

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        outputs, axes = op.vmap(op.library, info, in_dims, args)
        return pack(outputs), pack(axes)

    def vmap_backward(
        info: Any, in_dims: tuple[Any, ...], needs: Any, grad: Tensor, *args: Any
    ) -> Any:
        return op.vmap_backward(op.library_backward, info, in_dims[1:], needs, grad, args)

    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(name + "_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hos_ext::{name}", forward_fake, lib=LIBRARY)
    torch.library.register_fake(f"hos_ext::{name}_backward", backward_fake, lib=LIBRARY)
    _register_autograd(name, setup_context, formula, _refuse_forward_mode)
    _register_autograd(name + "_backward", setup_backward_context, _refuse, _refuse)
    torch.library.register_vmap(f"hos_ext::{name}", vmap, lib=LIBRARY)
    torch.library.register_vmap(f"hos_ext::{name}_backward", vmap_backward, lib=LIBRARY)


def _register_autograd(name: str, setup_context: Any, backward: Any, jvp: Any) -> None:
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

    def autograd(keys: Any, *args: Any) -> Any:
        # torch.func's transforms are at work already when they reach this kernel: one level each.
        with enable_single_level_autograd_function():
            return function.apply((keys, torch.is_grad_enabled()), *args)

    function = _function_class(
        name + "_library",
        _SingleLevelFunction,
        forward=forward,
        setup_context=setup_context,
        backward=backward,
        jvp=jvp,
    )
    operator = getattr(torch.ops.hos_ext, name).default
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
