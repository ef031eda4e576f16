"""Registration of a custom op: schema, kernel, exact fake and gradient in one place.

``torch.library.register_autograd`` does the same for every kind of schema; this covers only
positional tensors, lists of tensors and numbers and costs about half as much per call, which
matters where the kernel behind the op takes microseconds.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.ops._dispatch import without_autocast

_LIBRARY = torch.library.Library("fastgan", "FRAGMENT")


def define(
    schema: str,
    *,
    allocate: Callable[..., Any],
    fill: Callable[..., None],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Register ``fastgan::<schema>`` and return the op.

    ``allocate(*inputs)`` makes the outputs; it is the op's fake as well, so that the two cannot
    differ in shape, dtype or strides. ``fill(outputs, *inputs)`` computes them.
    ``setup_context(ctx, inputs, outputs)`` and ``backward(ctx, *grads)`` are those of
    ``register_autograd``; gradients that nobody asked for arrive as None, those of a list of
    outputs one by one.
    """
    name = schema.split("(")[0]
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _LIBRARY.define(schema, tags=tags)
    op = getattr(torch.ops.fastgan, name).default

    def kernel(*inputs: Any) -> Any:
        outputs = allocate(*inputs)
        fill(outputs, *inputs)
        return outputs

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgan::{name}", allocate, lib=_LIBRARY)

    # Lengths of lists come last: without lists, ctx.needs_input_grad has the order of the inputs.
    lists = [str(argument.type) == "List[Tensor]" for argument in op._schema.arguments]
    returns_list = str(op._schema.returns[0].type) == "List[Tensor]"

    class Function(torch.autograd.Function):  # which sees tensors only outside of lists
        @staticmethod
        def forward(ctx: Any, *flat_and_lengths: Any) -> Any:
            *flat, lengths = flat_and_lengths
            inputs = _nest(flat, lists, lengths)
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op(*inputs)
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, outputs)
            return tuple(outputs) if returns_list else outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if all(grad is None for grad in grads):  # where a second-order gradient is zero
                return (None,) * len(ctx.needs_input_grad)
            return *_flatten(backward(ctx, *grads), lists), None

    def differentiable(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            lengths = [len(x) for x, is_list in zip(inputs, lists, strict=True) if is_list]
            outputs = Function.apply(*_flatten(inputs, lists), lengths)
            return list(outputs) if returns_list else outputs
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    Function.__name__ = Function.__qualname__ = name
    _LIBRARY.impl(name, differentiable, "Autograd")
    return op


def _flatten(values: Sequence[Any], lists: Sequence[bool]) -> list[Any]:
    flat: list[Any] = []
    for value, is_list in zip(values, lists, strict=True):
        if is_list:
            flat += value
        else:
            flat.append(value)
    return flat


def _nest(flat: Sequence[Any], lists: Sequence[bool], lengths: Sequence[int]) -> tuple[Any, ...]:
    values, sizes = iter(flat), iter(lengths)
    return tuple(
        list(itertools.islice(values, next(sizes))) if is_list else next(values)
        for is_list in lists
    )


def second_order(
    formula: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of a first-order backward, by differentiating the reference formula twice.

    The first-order backward maps ``inputs`` and the ``grads`` of ``formula(*inputs)`` to the
    gradients of the inputs; ``grad_grads`` are the gradients of those. Returns the gradients of
    ``grads`` and of ``inputs``, with a graph of their own where one is being recorded.
    """
    create_graph = torch.is_grad_enabled()
    device = next(x.device for x in (*grads, *inputs) if x is not None)

    def apart(x: Tensor | None) -> Tensor | None:
        """The tensor as a variable of its own: grads may have been computed from inputs."""
        if x is None:
            return None
        return x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()

    with torch.enable_grad(), without_autocast(device):
        inputs, grads = [apart(x) for x in inputs], [apart(g) for g in grads]
        outputs = formula(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        first = _gradients(
            [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None], inputs, True
        )
        pairs = [
            (f, g)
            for f, g in zip(first, grad_grads, strict=True)
            if f is not None and g is not None
        ]
        second = _gradients(pairs, [*grads, *inputs], create_graph)
    return second[: len(grads)], second[len(grads) :]


def _gradients(
    pairs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None], create_graph: bool
) -> list[Tensor | None]:
    """torch.autograd.grad that lets inputs be None and outputs be constant."""
    pairs = [(output, grad) for output, grad in pairs if output.requires_grad]
    present = [x for x in inputs if x is not None]
    if not pairs or not present:
        return [None] * len(inputs)
    outputs, grads = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(outputs, present, grads, create_graph=create_graph, allow_unused=True)
    )
    return [None if x is None else next(found) for x in inputs]
