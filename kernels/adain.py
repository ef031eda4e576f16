"""Adaptive instance normalisation: the moments of two feature maps, then one normalisation."""

import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels._common import on_device_of, readable
from fastgan.kernels._planes import begin_strided, plane_block
from fastgan.kernels._tiling import norm_tiling_of, registers, stats_tiling_of
from fastgan.kernels.instance_norm import normalise
from fastgan.kernels.instance_stats import instance_stats_fwd, moments, store_partials


@triton.jit
def _store_moments(
    x,
    partials,
    program,
    planes,
    C,
    HW,
    run,
    splits,
    stride_b,
    stride_c,
    stride_p,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The partial moments of a block of planes and a run of positions."""
    split = program % splits
    plane, b, c, exists = plane_block(program // splits, planes, C, CHANNELS_LAST, BLOCK_C)
    begin = begin_strided(b, c, stride_b, stride_c)
    shift, mean, m2 = moments(
        x, begin, exists, split * run, run, HW, stride_p, False, BLOCK_C, BLOCK_P
    )
    store_partials(partials, plane, exists, planes, split, shift, mean, m2)


@triton.jit
def adain_moments_kernel(
    content,  # [B, C, HW] by strides
    style,  # [B or 1, C, style_HW] by strides
    partials,  # [1 + 2 splits, planes]
    style_partials,  # [1 + 2 style_splits, style_planes]
    programs,  # for the content; the rest are for the style
    C,
    planes,
    HW,
    run,
    splits,
    stride_b,
    stride_c,
    stride_p,
    style_planes,
    style_HW,
    style_run,
    style_splits,
    style_stride_b,
    style_stride_c,
    style_stride_p,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STYLE_CHANNELS_LAST: tl.constexpr,
    STYLE_BLOCK_C: tl.constexpr,
    STYLE_BLOCK_P: tl.constexpr,
):
    """The partial moments of two feature maps in one launch."""
    program = tl.program_id(0)
    # By calls: what a branch itself assigns must have the same shape in the other.
    if program < programs:
        _store_moments(
            content, partials, program, planes, C, HW, run, splits, stride_b, stride_c, stride_p,
            CHANNELS_LAST, BLOCK_C, BLOCK_P,
        )  # fmt: skip
    else:
        _store_moments(
            style, style_partials, program - programs, style_planes, C, style_HW, style_run,
            style_splits, style_stride_b, style_stride_c, style_stride_p,
            STYLE_CHANNELS_LAST, STYLE_BLOCK_C, STYLE_BLOCK_P,
        )  # fmt: skip


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
    if y.numel() == 0:
        return
    x, strides = readable(content)
    tiling = norm_tiling_of(x, strides, x, y)
    dof = float(x.shape[2:].numel() - correction)
    if tiling.splits == 1:
        instance_stats_fwd(style, style_mean, style_std, eps, correction)
        with on_device_of(x):
            normalise(
                x, strides, tiling, y, None, style_std, style_mean, alpha, None, centre, rstd,
                eps=eps, dof=dof,
            )  # fmt: skip
        return
    style, style_strides = readable(style)
    (B, C), HW = x.shape[:2], x.shape[2:].numel()
    style_planes, style_HW = len(style) * C, style.shape[2:].numel()
    style_tiling = stats_tiling_of(style, style_strides)
    partials = rstd.new_empty(1 + 2 * tiling.splits, B * C)
    style_partials = rstd.new_empty(1 + 2 * style_tiling.splits, style_planes)
    programs = tiling.blocks * tiling.splits
    # One kernel walks over both; addresses of two layouts take more registers than those of one.
    alike = style_strides.channels_last == strides.channels_last
    maxnreg = tiling.maxnreg if alike else registers(tiling.num_warps, many_addresses=True)
    with on_device_of(x):
        adain_moments_kernel[(programs + style_tiling.blocks * style_tiling.splits,)](
            x, style, partials, style_partials, programs, C,
            B * C, HW, tiling.run, tiling.splits, *strides[1:],
            style_planes, style_HW, style_tiling.run, style_tiling.splits, *style_strides[1:],
            CHANNELS_LAST=strides.channels_last, BLOCK_C=tiling.block_c, BLOCK_P=tiling.block_p,
            STYLE_CHANNELS_LAST=style_strides.channels_last, STYLE_BLOCK_C=style_tiling.block_c,
            STYLE_BLOCK_P=style_tiling.block_p, num_warps=tiling.num_warps, maxnreg=maxnreg,
        )  # fmt: skip
        normalise(
            x, strides, tiling, y, None, None, None, alpha, partials, centre, rstd,
            style_partials, style_mean, style_std, style_planes, style_HW, style_tiling.run,
            style_tiling.splits, float(style_HW - correction), eps=eps, dof=dof,
        )  # fmt: skip
