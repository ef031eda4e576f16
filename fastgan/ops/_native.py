"""The CPU kernels of fastgan._C, behind the same functions as _triton."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastgan.ops._instance_norm import Padding

_C: Any = importlib.import_module("fastgan._C")


def instance_stats_fwd(x: Tensor, mean: Tensor, std: Tensor, eps: float, correction: int) -> None:
    """x: [B, C, ...] -> mean, std: [B, C]."""
    if mean.numel() > 0:
        _C.instance_stats_fwd(x, mean, std, eps, correction)


def instance_stats_bwd(
    x: Tensor,
    grad_x: Tensor,
    grad_mean: Tensor | None,
    grad_std: Tensor | None,
    mean: Tensor,
    std: Tensor,
    correction: int,
) -> None:
    """grad_x: like x; the gradients [k B, C], of k copies of x, to be summed."""
    if grad_x.numel() > 0:
        summed = (
            g if g is None or g.shape == mean.shape else g.view(-1, *mean.shape).sum(0)
            for g in (grad_mean, grad_std)
        )
        _C.instance_stats_bwd(x, grad_x, *summed, mean, std, correction)


def instance_norm_fwd(
    x: Tensor,
    y: Tensor,
    centre: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: float | Tensor,
    slope: float,
    pad: int,
    eps: float,
    correction: int,
) -> None:
    """x, residual: [B, C, H, W] -> y: [B, C, padded H, padded W]; centre, rstd: [B, C]."""
    if y.numel() > 0:
        _C.instance_norm_fwd(
            x, y, centre, rstd, weight, bias, residual, *_blend(alpha), slope, pad, eps, correction
        )


def instance_norm_bwd(
    grad: Tensor,
    x: Tensor,
    grad_x: Tensor,
    sums: Tensor,
    centre: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: float | Tensor,
    slope: float,
    pad: int,
    correction: int,
) -> None:
    """grad: like y; grad_x: like x; sums: [2, B, C], the gradients of bias and weight."""
    if grad_x.numel() > 0:
        _C.instance_norm_bwd(
            grad, x, grad_x, sums, centre, rstd, weight, bias, *_blend(alpha), slope, pad,
            correction,
        )  # fmt: skip


def _blend(alpha: float | Tensor) -> tuple[Tensor | None, float]:
    """Alpha of each image, or else of all."""
    return (alpha, 1.0) if isinstance(alpha, Tensor) else (None, alpha)


def adain_fwd(
    content: Tensor,
    style: Tensor,
    y: Tensor,
    centre: Tensor,
    rstd: Tensor,
    style_mean: Tensor,
    style_std: Tensor,
    alpha: float | Tensor,
    eps: float,
    correction: int,
) -> None:
    """content: [B, C, H, W], style: [B or 1, C, h, w] -> y: [B, C, H, W] and all statistics."""
    instance_stats_fwd(style, style_mean, style_std, eps, correction)
    instance_norm_fwd(
        content, y, centre, rstd, style_std, style_mean, None, alpha, 1.0, 0, eps, correction
    )


def reflection_pad2d_fwd(x: Tensor, y: Tensor, padding: Padding) -> None:
    """x: [B, C, H, W] -> y, larger by the padding."""
    if y.numel() > 0:
        _C.reflection_pad2d_fwd(x, y, padding)


def reflection_pad2d_bwd(grad: Tensor, grad_x: Tensor, padding: Padding) -> None:
    """grad: like y of the forward -> grad_x, the sum over what shows each position."""
    if grad_x.numel() > 0:
        _C.reflection_pad2d_bwd(grad, grad_x, padding)


# The distance is of [B, C] numbers and takes microseconds: not worth a loop of our own.


def stats_distance_fwd(
    total: Tensor | None,
    mean: Tensor,
    std: Tensor,
    target_mean: Tensor,
    target_std: Tensor,
    out: Tensor,
    weight: float,
) -> None:
    """mean, std: [B, C]; targets: [B or 1, C] -> out: [], added to total."""
    squares = (mean - target_mean).square().sum() + (std - target_std).square().sum()
    out.copy_(weight * squares if total is None else total + weight * squares)


def stats_distance_bwd(
    grad: Tensor,
    mean: Tensor,
    std: Tensor,
    target_mean: Tensor,
    target_std: Tensor,
    grad_mean: Tensor,
    grad_std: Tensor,
    weight: float,
) -> None:
    """grad: [] -> grad_mean, grad_std: [B, C]."""
    scale = 2 * weight * grad
    torch.mul(mean - target_mean, scale, out=grad_mean)
    torch.mul(std - target_std, scale, out=grad_std)
