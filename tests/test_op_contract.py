"""What every op promises whatever runs it: dtypes, strides, autocast, empty batches, compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgan as fg
from tolerances import assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def other(x: Tensor) -> Tensor:
    """Features of the shape of ``x``, the same in every dtype, that do not depend on its values."""
    count = torch.arange(x.numel(), dtype=torch.float64, device=x.device)
    return (3 * count).sin().bfloat16().reshape(x.shape).to(x.dtype)


def stats(x: Tensor) -> fg.InstanceStats:
    return fg.instance_stats(other(x))


# Ops on a feature map: those that return a map like it, and those that return wide values.
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "instance_norm": lambda x: fg.instance_norm(x, activation="relu", residual=x),
    "adain": lambda x: fg.adain(x, x.flip(0), alpha=0.7),
    "adain from statistics": lambda x: fg.adain(x, stats(x)),
}
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "gram_matrix": lambda x: fg.gram_matrix(x),
    "style_loss": lambda x: fg.style_loss([x, x], [fg.gram_matrix(other(x))] * 2),
    "content_loss": lambda x: fg.content_loss(x, other(x)),
    "instance_stats": lambda x: torch.cat(fg.instance_stats(x)),
    "adain_style_loss": lambda x: fg.adain_style_loss(x, stats(x)),
}
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "discriminator_loss": lambda x: fg.discriminator_loss([x, x[:1]], [x.flip(0), x]),
    "generator_loss": lambda x: fg.generator_loss(x, mode="hinge"),
    "GANLoss": lambda x: fg.nn.GANLoss("lsgan", target_real_label=0.9)(x, True),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch of a larger batch": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


def named(ops: dict[str, Callable[[Tensor], Tensor]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("op", ops.values(), ids=ops.keys())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(MAPS)
def test_maps_keep_dtype(op: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64).to(dtype)
    out = op(x)
    assert out.dtype == dtype
    assert_close(out, op(x.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(VALUES | LOSSES)
def test_values_are_wide(op: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64).to(dtype)
    out = op(x)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(out, op(x.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@named(MAPS | VALUES | LOSSES)
def test_autocast_changes_nothing(op: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 7).to(dtype).requires_grad_()
    plain = op(x)
    (gradient,) = torch.autograd.grad(plain.float().square().sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = op(x)
        loss = inside.float().square().sum()
    (inside_gradient,) = torch.autograd.grad(loss, x)
    assert inside.dtype == plain.dtype
    assert torch.equal(inside, plain)
    assert torch.equal(inside_gradient, gradient)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@named(MAPS)
def test_maps_have_the_strides_of_empty_like(
    op: Callable[[Tensor], Tensor], layout: Callable[[Tensor], Tensor]
) -> None:
    plain = torch.randn(2, 3, 5, 7)
    x = layout(plain)
    out = op(x)
    assert out.stride() == torch.empty_like(x).stride()
    assert_close(out, op(plain.double()))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@named(MAPS | VALUES)
def test_any_strides_same_gradient(
    op: Callable[[Tensor], Tensor], layout: Callable[[Tensor], Tensor]
) -> None:
    plain = torch.randn(2, 3, 5, 7)
    exact = plain.double().requires_grad_()
    x = layout(plain).requires_grad_()
    for tensor in (x, exact):
        weight = torch.linspace(-1, 1, op(plain).numel(), dtype=tensor.dtype)
        (op(tensor).flatten() * weight).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert_close(x.grad, exact.grad)


def test_padding_keeps_the_memory_format() -> None:
    x = torch.randn(2, 3, 5, 7)
    last = x.contiguous(memory_format=torch.channels_last)
    assert fg.instance_norm(x, reflect_pad=1).is_contiguous()
    padded = fg.instance_norm(last, reflect_pad=1)
    assert padded.is_contiguous(memory_format=torch.channels_last)
    assert_close(padded, fg.instance_norm(x.double(), reflect_pad=1))


@named(MAPS | VALUES)
def test_an_empty_batch(op: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(0, 3, 5, 7, requires_grad=True)
    out = op(x)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@named(MAPS | VALUES | LOSSES)
def test_compiles_without_a_graph_break(op: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 3, 5, 7, requires_grad=True)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert_close(out, op(x.double()))
    assert out.stride() == op(x).stride()
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(op(x).square().sum(), x)
    assert_close(gradient, expected.double())


@named(MAPS | VALUES | LOSSES)
def test_two_orders_of_gradients(op: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(op, (x,))
    assert torch.autograd.gradgradcheck(op, (x,))


@named(MAPS | VALUES)
def test_constant_planes_have_finite_gradients(op: Callable[[Tensor], Tensor]) -> None:
    x = torch.full((2, 3, 5, 7), 3.0, requires_grad=True)
    op(x).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@named({**MAPS, **VALUES, **LOSSES})
def test_meta_tensors_give_shape_and_dtype(op: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 5, 7)
    expected, out = op(x), op(x.to("meta"))
    assert (out.device.type, out.shape, out.dtype) == ("meta", expected.shape, expected.dtype)


def _jvp(op: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(op, (x,), (x.flip(0),))[1]


def _grad(op: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: op(x).square().sum())(x)


def _vmap(op: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.vmap(op)(torch.stack([x, x.flip(0)]))


def _vmap_of_grad(op: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.vmap(lambda x: _grad(op, x))(torch.stack([x, x.flip(0)]))


@named({**MAPS, **VALUES, **LOSSES})
@pytest.mark.parametrize("transform", [_jvp, _grad, _vmap, _vmap_of_grad])
def test_function_transforms_take_the_reference_path(
    transform: Callable[..., Tensor], op: Callable[[Tensor], Tensor]
) -> None:
    """No kernel has rules for torch.func, and none drops a tangent silently."""
    x = torch.randn(2, 3, 5, 7)
    found = transform(op, x)
    with fg.use_impl("reference"):
        expected = transform(op, x)
    assert expected.abs().sum() > 0
    assert_close(found, expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_a_chosen_kernel_refuses_function_transforms(transform: Callable[..., Any]) -> None:
    x = torch.randn(2, 3, 5, 7)
    if fg.explain(fg.generator_loss, x).impl == "reference":
        pytest.skip("no kernel here")
    with pytest.raises(fg.ImplUnavailableError, match=r"torch\.func"):
        transform(lambda x: fg.generator_loss(x, impl="native"))(x)


def test_compiled_function_transforms() -> None:
    x = torch.randn(2, 3, 5, 7)
    grad = torch.func.grad(lambda x: fg.instance_norm(x).pow(3).sum())
    assert_close(torch.compile(grad, fullgraph=True)(x), grad(x))
