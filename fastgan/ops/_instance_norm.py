"""The custom ops behind instance_norm.py: allocation, kernels and gradients.

Each op's last argument names the implementation whose functions fill its outputs; its backward
inherits it. First-order gradients are kernels, gradients of those follow the reference formulas.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastgan import reference
from fastgan.ops import _library

Padding = tuple[int, int, int, int]  # left, right, top, bottom


def _kernels(impl: str) -> ModuleType:
    """The module whose functions fill the outputs of the ops below."""
    if impl == "native":
        from fastgan.ops import _native  # imports fastgan._C, which may not be built

        return _native
    from fastgan.ops import _triton  # imports Triton, so not before the first call

    return _triton


def _new_stats(x: Tensor) -> Tensor:
    """[B, C], in the precision of statistics."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:2], dtype=dtype)


def _sum_to(grad: Tensor, shape: torch.Size) -> Tensor:
    """[B, C] -> the gradient of what was broadcast from [C] or [1, C]."""
    if grad.shape == shape:
        return grad
    return (grad if len(grad) == 1 else grad.sum(0)).reshape(shape)


def _gradient_of(values: Tensor | None, grad: Tensor | None, sign: int = 1) -> Tensor | None:
    """[B, C] -> the gradient of [C], [1, C] or [B, C] in its dtype; None where there is none."""
    if values is None or grad is None:
        return None
    grad = _sum_to(grad, values.shape).to(values.dtype)
    return grad if sign == 1 else -grad


# --- Statistics ---------------------------------------------------------------------------------


def _allocate_stats(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _new_stats(x), _new_stats(x)


def _fill_stats(
    outputs: tuple[Tensor, Tensor], x: Tensor, eps: float, correction: int, impl: str
) -> None:
    _kernels(impl).instance_stats_fwd(x, *outputs, eps, correction)


def _save_stats(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x, *outputs)


def _stats_backward(ctx: Any, grad_mean: Tensor | None, grad_std: Tensor | None) -> Any:
    grad_x = stats_backward(grad_mean, grad_std, *ctx.saved_tensors, *ctx.options)
    return grad_x, None, None, None


stats = _library.define(
    "instance_stats(Tensor x, float eps, int correction, str impl) -> (Tensor mean, Tensor std)",
    allocate=_allocate_stats,
    fill=_fill_stats,
    setup_context=_save_stats,
    backward=_stats_backward,
)


def _allocate_stats_backward(_: Any, __: Any, x: Tensor, *___: Any) -> Tensor:
    return torch.empty_like(x)


def _fill_stats_backward(
    grad_x: Tensor,
    grad_mean: Tensor | None,
    grad_std: Tensor | None,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    eps: float,
    correction: int,
    impl: str,
) -> None:
    grads = (None if g is None else g.contiguous() for g in (grad_mean, grad_std))
    _kernels(impl).instance_stats_bwd(x, grad_x, *grads, mean, std, correction)


def _save_stats_backward(ctx: Any, inputs: tuple[Any, ...], grad_x: Tensor) -> None:
    grad_mean, grad_std, x, _, _, ctx.eps, ctx.correction, _ = inputs
    ctx.save_for_backward(grad_mean, grad_std, x)


def _stats_double_backward(ctx: Any, grad_grad_x: Tensor) -> Any:
    *grads, x = ctx.saved_tensors
    images = next(len(g) for g in grads if g is not None)

    def formula(x: Tensor) -> list[Tensor]:
        stats = reference.instance_stats(x, ctx.eps, ctx.correction)
        return [s.expand(images, -1) for s in stats]

    (grad_mean, grad_std), (grad_x,) = _library.second_order(formula, [x], grads, [grad_grad_x])
    return grad_mean, grad_std, grad_x, None, None, None, None, None


# The gradients may be of [B, C] for an x of [1, C, ...]: those of B uses of it, to be summed.
stats_backward = _library.define(
    "instance_stats_backward(Tensor? grad_mean, Tensor? grad_std, Tensor x, Tensor mean, "
    "Tensor std, float eps, int correction, str impl) -> Tensor",
    allocate=_allocate_stats_backward,
    fill=_fill_stats_backward,
    setup_context=_save_stats_backward,
    backward=_stats_double_backward,
)


# --- Instance norm, and AdaIN with given statistics ---------------------------------------------
# y = pad(act(alpha (normalised x * weight + bias) + (1 - alpha) x) + residual); weight and bias are
# [C], [1, C] or [B, C], the slope of the activation below zero is 1 where there is none. AdaIN is
# weight = style std, bias = style mean. alphas, [B], stand in for alpha where they are given.


def _allocate_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    alphas: Tensor | None,
    alpha: float,
    slope: float,
    pad: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_padded(x, (pad,) * 4), _new_stats(x), _new_stats(x)


def _fill_norm(
    outputs: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    alphas: Tensor | None,
    alpha: float,
    slope: float,
    pad: int,
    eps: float,
    correction: int,
    impl: str,
) -> None:
    blend = alpha if alphas is None else alphas.contiguous()
    _kernels(impl).instance_norm_fwd(
        x, *outputs, weight, bias, residual, blend, slope, pad, eps, correction
    )


def _save_norm(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, alphas, *ctx.options = inputs
    _, centre, rstd = outputs
    ctx.mark_non_differentiable(centre, rstd)
    ctx.save_for_backward(x, weight, bias, alphas, centre, rstd)


def _norm_backward(ctx: Any, grad: Tensor | None, _: None, __: None) -> Any:
    x, weight, bias, alphas, centre, rstd = ctx.saved_tensors
    pad, impl = ctx.options[2], ctx.options[-1]
    grad_weight = grad_bias = grad_residual = None
    grad_x, sums = norm_backward(grad, x, weight, bias, alphas, centre, rstd, *ctx.options)
    _, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    if needs_weight and needs_bias and weight.ndim == bias.ndim == 1 and len(x) > 1:
        sums = sums.sum(1, keepdim=True)  # of both in one launch
    if needs_weight:
        grad_weight = _gradient_of(weight, sums[1])
    if needs_bias:
        grad_bias = _gradient_of(bias, sums[0])
    if needs_residual:
        grad_residual = grad
        if pad:
            grad_residual = reflection_pad2d_backward(
                grad, pad, pad, pad, pad, _is_channels_last(x), impl
            )
    return grad_x, grad_weight, grad_bias, grad_residual, *[None] * 7


norm = _library.define(
    "instance_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? alphas, "
    "float alpha, float slope, int pad, float eps, int correction, str impl) "
    "-> (Tensor y, Tensor centre, Tensor rstd)",
    allocate=_allocate_norm,
    fill=_fill_norm,
    setup_context=_save_norm,
    backward=_norm_backward,
)


def _allocate_norm_backward(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, C = x.shape[:2]
    return torch.empty_like(x), _new_stats(x).new_empty(2, B, C)


def _fill_norm_backward(
    outputs: tuple[Tensor, Tensor],
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    alphas: Tensor | None,
    centre: Tensor,
    rstd: Tensor,
    alpha: float,
    slope: float,
    pad: int,
    eps: float,
    correction: int,
    impl: str,
) -> None:
    blend = alpha if alphas is None else alphas.contiguous()
    _kernels(impl).instance_norm_bwd(
        grad, x, *outputs, centre, rstd, weight, bias, blend, slope, pad, correction
    )


def _save_norm_backward(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    grad, x, weight, bias, alphas, _, _, *ctx.options = inputs
    ctx.save_for_backward(grad, x, weight, bias, alphas)


def _norm_double_backward(ctx: Any, grad_grad_x: Tensor | None, grad_sums: Tensor | None) -> Any:
    grad, x, weight, bias, alphas = ctx.saved_tensors
    alpha, slope, pad, eps, correction, _ = ctx.options
    shape = x.shape[:2]

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if slope == 1.0 and pad == 0:
            blend = alpha if alphas is None else alphas
            return reference.adain(x, bias, weight, blend, eps, correction)
        return reference.instance_norm(x, weight, bias, None, "leaky_relu", slope, pad, eps)

    # One weight and bias per plane, whose gradients are what the kernel returns as sums.
    ones, zeros = _new_stats(x).fill_(1), _new_stats(x).fill_(0)
    inputs = [
        x,
        ones if weight is None else weight.expand(shape),
        zeros if bias is None else bias.expand(shape),
    ]
    grad_bias, grad_weight = (None, None) if grad_sums is None else grad_sums
    (grad_grad,), (grad_x, plane_weight, plane_bias) = _library.second_order(
        formula, inputs, [grad], [grad_grad_x, grad_weight, grad_bias]
    )
    grad_weight, grad_bias = _gradient_of(weight, plane_weight), _gradient_of(bias, plane_bias)
    return grad_grad, grad_x, grad_weight, grad_bias, *[None] * 9


norm_backward = _library.define(
    "instance_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? alphas, "
    "Tensor centre, Tensor rstd, float alpha, float slope, int pad, float eps, int correction, "
    "str impl) -> (Tensor grad_x, Tensor sums)",
    allocate=_allocate_norm_backward,
    fill=_fill_norm_backward,
    setup_context=_save_norm_backward,
    backward=_norm_double_backward,
)


# --- AdaIN with a style feature map -------------------------------------------------------------


def _allocate_adain(content: Tensor, style: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(content),
        _new_stats(content),
        _new_stats(content),
        _new_stats(style),
        _new_stats(style),
    )


def _fill_adain(
    outputs: tuple[Tensor, ...],
    content: Tensor,
    style: Tensor,
    alphas: Tensor | None,
    alpha: float,
    eps: float,
    correction: int,
    impl: str,
) -> None:
    blend = alpha if alphas is None else alphas.contiguous()
    _kernels(impl).adain_fwd(content, style, *outputs, blend, eps, correction)


def _save_adain(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    content, style, alphas, *ctx.options = inputs
    _, *statistics = outputs
    ctx.mark_non_differentiable(*statistics[:2])
    ctx.save_for_backward(content, style, alphas, *statistics)


def _adain_backward(
    ctx: Any,
    grad: Tensor | None,
    _: None,
    __: None,
    grad_mean: Tensor | None,
    grad_std: Tensor | None,
) -> Any:
    """The style's statistics have gradients of their own only in a backward of this backward."""
    content, style, alphas, centre, rstd, mean, std = ctx.saved_tensors
    alpha, eps, correction, impl = ctx.options
    grad_content = grad_style = None
    if grad is not None:
        grad_content, sums = norm_backward(
            grad, content, std, mean, alphas, centre, rstd, alpha, 1.0, 0, eps, correction, impl
        )
        if grad_mean is None and grad_std is None:
            grad_mean, grad_std = sums.unbind()
        else:
            of_mean, of_std = (_sum_to(s, mean.shape) for s in sums)
            grad_mean = of_mean if grad_mean is None else of_mean + grad_mean
            grad_std = of_std if grad_std is None else of_std + grad_std
    if ctx.needs_input_grad[1]:
        grad_style = stats_backward(grad_mean, grad_std, style, mean, std, eps, correction, impl)
    return grad_content, grad_style, *[None] * 5


adain = _library.define(
    "adain(Tensor content, Tensor style, Tensor? alphas, float alpha, float eps, int correction, "
    "str impl) -> (Tensor y, Tensor centre, Tensor rstd, Tensor style_mean, Tensor style_std)",
    allocate=_allocate_adain,
    fill=_fill_adain,
    setup_context=_save_adain,
    backward=_adain_backward,
)


# --- Distance of statistics ---------------------------------------------------------------------
# total + weight (sum (mean - target_mean)^2 + sum (std - target_std)^2)


def _allocate_distance(_: Any, mean: Tensor, *__: Any) -> Tensor:
    return mean.new_empty(())


def _fill_distance(
    out: Tensor,
    total: Tensor | None,
    mean: Tensor,
    std: Tensor,
    target_mean: Tensor,
    target_std: Tensor,
    weight: float,
    impl: str,
) -> None:
    _kernels(impl).stats_distance_fwd(
        total, mean, std, target_mean.contiguous(), target_std.contiguous(), out, weight
    )


def _save_distance(ctx: Any, inputs: tuple[Any, ...], out: Tensor) -> None:
    _, *tensors, ctx.weight, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _distance_backward(ctx: Any, grad: Tensor) -> Any:
    mean, std, target_mean, target_std = ctx.saved_tensors
    grad_mean, grad_std = distance_backward(
        grad, mean, std, target_mean, target_std, ctx.weight, ctx.impl
    )
    targets: list[Tensor | None] = [None, None]
    if ctx.needs_input_grad[3]:
        targets[0] = _gradient_of(target_mean, grad_mean, sign=-1)
    if ctx.needs_input_grad[4]:
        targets[1] = _gradient_of(target_std, grad_std, sign=-1)
    grad_total = grad if ctx.needs_input_grad[0] else None
    return grad_total, grad_mean, grad_std, *targets, None, None


distance = _library.define(
    "stats_distance(Tensor? total, Tensor mean, Tensor std, Tensor target_mean, "
    "Tensor target_std, float weight, str impl) -> Tensor",
    allocate=_allocate_distance,
    fill=_fill_distance,
    setup_context=_save_distance,
    backward=_distance_backward,
)


def _allocate_distance_backward(_: Tensor, mean: Tensor, *__: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def _fill_distance_backward(
    outputs: tuple[Tensor, Tensor],
    grad: Tensor,
    mean: Tensor,
    std: Tensor,
    target_mean: Tensor,
    target_std: Tensor,
    weight: float,
    impl: str,
) -> None:
    targets = target_mean.contiguous(), target_std.contiguous()
    _kernels(impl).stats_distance_bwd(grad, mean, std, *targets, *outputs, weight)


def _save_distance_backward(
    ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]
) -> None:
    *tensors, ctx.weight, _ = inputs
    ctx.save_for_backward(*tensors)


def _distance_double_backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
    grad, *inputs = ctx.saved_tensors

    def formula(mean: Tensor, std: Tensor, target_mean: Tensor, target_std: Tensor) -> Tensor:
        squares = (mean - target_mean).square() + (std - target_std).square()
        return ctx.weight * squares.sum()

    (grad_grad,), grads = _library.second_order(formula, inputs, [grad], [*grad_grads, None, None])
    return grad_grad, *grads, None, None


distance_backward = _library.define(
    "stats_distance_backward(Tensor grad, Tensor mean, Tensor std, Tensor target_mean, "
    "Tensor target_std, float weight, str impl) -> (Tensor grad_mean, Tensor grad_std)",
    allocate=_allocate_distance_backward,
    fill=_fill_distance_backward,
    setup_context=_save_distance_backward,
    backward=_distance_double_backward,
)


# --- Reflection padding -------------------------------------------------------------------------


def _is_channels_last(x: Tensor) -> bool:
    """Whether torch.empty_like(x) is, and not contiguous as well."""
    if x.is_contiguous():
        return False
    return torch.empty_like(x).is_contiguous(memory_format=torch.channels_last)


def _new_padded(x: Tensor, padding: Padding) -> Tensor:
    """An image padded on four sides, in the memory format of torch.empty_like(x)."""
    if not any(padding):
        return torch.empty_like(x)
    left, right, top, bottom = padding
    B, C, H, W = x.shape
    return torch.empty(
        (B, C, H + top + bottom, W + left + right),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format,
    )


def _allocate_pad(x: Tensor, left: int, right: int, top: int, bottom: int, impl: str) -> Tensor:
    return _new_padded(x, (left, right, top, bottom))


def _fill_pad(
    y: Tensor, x: Tensor, left: int, right: int, top: int, bottom: int, impl: str
) -> None:
    _kernels(impl).reflection_pad2d_fwd(x, y, (left, right, top, bottom))


def _save_pad(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    x, *ctx.padding, ctx.impl = inputs
    ctx.channels_last = _is_channels_last(x)


def _pad_backward(ctx: Any, grad: Tensor) -> Any:
    grad_x = reflection_pad2d_backward(grad, *ctx.padding, ctx.channels_last, ctx.impl)
    return grad_x, *[None] * 5


reflection_pad2d = _library.define(
    "reflection_pad2d(Tensor x, int left, int right, int top, int bottom, str impl) -> Tensor",
    allocate=_allocate_pad,
    fill=_fill_pad,
    setup_context=_save_pad,
    backward=_pad_backward,
)


def _allocate_pad_backward(
    grad: Tensor, left: int, right: int, top: int, bottom: int, channels_last: bool, impl: str
) -> Tensor:
    B, C, H, W = grad.shape
    return torch.empty(
        (B, C, H - top - bottom, W - left - right),
        dtype=grad.dtype,
        device=grad.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _fill_pad_backward(
    grad_x: Tensor,
    grad: Tensor,
    left: int,
    right: int,
    top: int,
    bottom: int,
    channels_last: bool,
    impl: str,
) -> None:
    _kernels(impl).reflection_pad2d_bwd(grad, grad_x, (left, right, top, bottom))


def _save_pad_backward(ctx: Any, inputs: tuple[Any, ...], grad_x: Tensor) -> None:
    _, *ctx.padding, _, ctx.impl = inputs


def _pad_double_backward(ctx: Any, grad_grad_x: Tensor) -> Any:
    return reflection_pad2d(grad_grad_x, *ctx.padding, ctx.impl), *[None] * 6


# Padding is linear: its backward needs nothing of x but its memory format.
reflection_pad2d_backward = _library.define(
    "reflection_pad2d_backward(Tensor grad, int left, int right, int top, int bottom, "
    "bool channels_last, str impl) -> Tensor",
    allocate=_allocate_pad_backward,
    fill=_fill_pad_backward,
    setup_context=_save_pad_backward,
    backward=_pad_double_backward,
)
