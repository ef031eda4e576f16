"""Planes normalised by their own statistics, with what commonly follows, and the gradient.

Each kernel reduces planes and then writes them, in one of the ways of _tiling.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels._common import Walk, dense, next_power_of_2, on_device_of, readable, writable
from fastgan.kernels._planes import begin_dense, begin_strided, per_plane, plane_block, tile
from fastgan.kernels._tiling import RESIDENT, STAGES, SWEEP, Tiling, norm_tiling_of
from fastgan.kernels.instance_stats import (
    instance_stats_fwd_kernel,
    merged_moments,
    moments,
    tile_moments,
)
from fastgan.kernels.reflection_pad import (
    folded_gradient,
    padded_positions,
    reflection_pad2d_bwd,
    source_positions,
)

# --- Forward ------------------------------------------------------------------------------------


@triton.jit
def _alpha(alpha, b, exists, PER_IMAGE: tl.constexpr):
    """A number, or [B] -> that of each plane's image."""
    if PER_IMAGE:
        return tl.load(alpha + tl.where(exists, b, 0)).to(tl.float32)
    else:
        return alpha


@triton.jit
def _normalised(centred, gain, offset, slope, ACTIVATED: tl.constexpr):
    z = centred * gain[:, None] + offset[:, None]
    if ACTIVATED:
        z = tl.where(z > 0, z, z * slope)
    return z


@triton.jit
def instance_norm_fwd_kernel(
    x,  # [B, C, HW] by strides
    y,  # [B, C, padded HW], dense
    residual,  # [B, C, HW], dense, or None
    weight,  # [C] or [B, C] by weight_stride, or None
    bias,  # [C] or [B, C] by bias_stride, or None
    alpha,  # a number or [B]; with BLEND alpha of what is normalised and 1 - alpha of x
    partials,  # [1 + 2 splits, planes] with SPLIT, else None
    centre,  # [planes] mean less the plane's first pixel
    rstd,  # [planes]
    style_partials,  # [1 + 2 style_splits, style_planes] or None; else weight and bias come from it
    style_mean,  # [style_planes]
    style_std,  # [style_planes]
    style_planes,
    style_HW,
    style_run,
    style_splits,
    style_dof,
    planes,
    C,
    HW,
    W,
    run,  # positions of x per program that reduced it
    splits,
    chunk,  # positions of y per program
    chunks,
    weight_stride,
    bias_stride,
    stride_b,
    stride_c,
    stride_p,
    eps,
    dof,
    slope,
    MODE: tl.constexpr,
    SPLITS: tl.constexpr,
    STYLE_SPLITS: tl.constexpr,
    BLEND: tl.constexpr,
    ALPHA_PER_IMAGE: tl.constexpr,
    ACTIVATED: tl.constexpr,
    PAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK_P)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # last read, first in cache
    block = program // chunks
    first = (program % chunks) * chunk
    plane, b, c, exists = plane_block(block, planes, C, CHANNELS_LAST, BLOCK_C)
    begin = begin_strided(b, c, stride_b, stride_c)
    if MODE == RESIDENT:
        mask = exists[:, None] & (lanes < HW)[None, :]
        shift = tl.load(x + begin, mask=exists, other=0).to(tl.float32)
        value = tl.load(x + tile(begin, lanes, stride_p), mask=mask, other=0)
        centred = tl.where(mask, value.to(tl.float32) - shift[:, None], 0.0)
        mean, m2 = tile_moments(centred, mask, HW)
        centred -= mean[:, None]
    elif MODE == SWEEP:
        shift, mean, m2 = moments(x, begin, exists, 0, run, HW, stride_p, False, BLOCK_C, BLOCK_P)
    else:
        shift, mean, m2 = merged_moments(partials, plane, exists, planes, HW, run, splits, SPLITS)
    r = 1.0 / tl.sqrt(m2 / dof + eps)
    if first == 0:
        tl.store(centre + plane, mean, mask=exists)
        tl.store(rstd + plane, r, mask=exists)
    if style_partials is None:
        gain = r * per_plane(weight, b, c, exists, weight_stride, 1.0)
        offset = per_plane(bias, b, c, exists, bias_stride, 0.0)
    else:
        style = plane % style_planes  # one style for all images, or one for each
        style_shift, offset, style_m2 = merged_moments(
            style_partials, style, exists, style_planes, style_HW, style_run, style_splits,
            STYLE_SPLITS,
        )  # fmt: skip
        offset += style_shift
        deviation = tl.sqrt(style_m2 / style_dof + eps)
        gain = r * deviation
        if first == 0:
            own = exists & (plane < style_planes)
            tl.store(style_mean + style, offset, mask=own)
            tl.store(style_std + style, deviation, mask=own)
    if BLEND:
        a = _alpha(alpha, b, exists, ALPHA_PER_IMAGE)
        gain = a * gain + (1.0 - a)
        offset = a * offset + (1.0 - a) * (shift + mean)

    padded_HW = padded_positions(HW, W, PAD)
    y_begin, y_stride = begin_dense(plane, b, c, C, padded_HW, CHANNELS_LAST)
    r_begin, r_stride = begin_dense(plane, b, c, C, HW, CHANNELS_LAST)
    if MODE == RESIDENT:
        out = _normalised(centred, gain, offset, slope, ACTIVATED)
        if residual is not None:
            out += tl.load(residual + tile(r_begin, lanes, r_stride), mask=mask, other=0)
        tl.store(y + tile(y_begin, lanes, y_stride), out.to(y.dtype.element_ty), mask=mask)
    else:
        for i in tl.range(0, chunk, BLOCK_P, num_stages=STAGES):
            q = first + chunk - BLOCK_P - i + lanes
            mask = exists[:, None] & (q < padded_HW)[None, :]
            p = source_positions(q, HW, W, PAD)
            value = tl.load(x + tile(begin, p, stride_p), mask=mask, other=0).to(tl.float32)
            centred = value - shift[:, None] - mean[:, None]
            out = _normalised(centred, gain, offset, slope, ACTIVATED)
            if residual is not None:
                out += tl.load(residual + tile(r_begin, p, r_stride), mask=mask, other=0)
            tl.store(y + tile(y_begin, q, y_stride), out.to(y.dtype.element_ty), mask=mask)


# --- Backward -----------------------------------------------------------------------------------


@triton.jit
def _before_activation(g, centred, gain, offset, slope, ACTIVATED: tl.constexpr):
    """The gradient before the activation, whose branch is found again from x."""
    if ACTIVATED:
        return tl.where(centred * gain[:, None] + offset[:, None] > 0, g, g * slope)
    else:
        return g


@triton.jit
def _grad_sums(
    x,
    grad,
    begin,
    grad_begin,
    grad_stride,
    exists,
    shift,
    mean,
    gain,
    offset,
    first,
    run,
    HW,
    padded_HW,
    W,
    stride_p,
    slope,
    ACTIVATED: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sums of g and of g (x - mean) over positions [first, first + run) of y, per plane."""
    sum_g = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_gx = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for i in tl.range(0, run, BLOCK_P, num_stages=STAGES):
        q = first + i + tl.arange(0, BLOCK_P)
        mask = exists[:, None] & (q < padded_HW)[None, :]
        g = tl.load(grad + tile(grad_begin, q, grad_stride), mask=mask, other=0).to(tl.float32)
        p = source_positions(q, HW, W, PAD)
        centred = tl.load(x + tile(begin, p, stride_p), mask=mask, other=0).to(tl.float32)
        centred = centred - shift[:, None] - mean[:, None]
        g = _before_activation(g, centred, gain, offset, slope, ACTIVATED)
        sum_g += g
        sum_gx += g * centred  # g is 0 where masked
    return tl.sum(sum_g, 1), tl.sum(sum_gx, 1)


@triton.jit
def instance_norm_sums_kernel(
    x,  # [B, C, HW] by strides
    grad,  # [B, C, padded HW], dense
    weight,  # [C] or [B, C] by weight_stride, or None
    bias,  # [C] or [B, C] by bias_stride, or None
    centre,  # [planes]
    rstd,  # [planes]
    partials,  # [splits, 2, planes]: sums of g and of g (x - mean)
    planes,
    C,
    HW,
    W,
    run,  # positions of y per program
    splits,
    weight_stride,
    bias_stride,
    stride_b,
    stride_c,
    stride_p,
    slope,
    ACTIVATED: tl.constexpr,
    PAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    plane, b, c, exists = plane_block(block, planes, C, CHANNELS_LAST, BLOCK_C)
    begin = begin_strided(b, c, stride_b, stride_c)
    shift = tl.load(x + begin, mask=exists, other=0).to(tl.float32)
    mean = tl.load(centre + plane, mask=exists, other=0)
    gain = tl.load(rstd + plane, mask=exists, other=0)
    gain *= per_plane(weight, b, c, exists, weight_stride, 1.0)
    offset = per_plane(bias, b, c, exists, bias_stride, 0.0)
    padded_HW = padded_positions(HW, W, PAD)
    grad_begin, grad_stride = begin_dense(plane, b, c, C, padded_HW, CHANNELS_LAST)
    sum_g, sum_gx = _grad_sums(
        x, grad, begin, grad_begin, grad_stride, exists, shift, mean, gain, offset, split * run,
        run, HW, padded_HW, W, stride_p, slope, ACTIVATED, PAD, BLOCK_C, BLOCK_P,
    )  # fmt: skip
    row = 2 * split.to(tl.int64)
    tl.store(partials + row * planes + plane, sum_g, mask=exists)
    tl.store(partials + (row + 1) * planes + plane, sum_gx, mask=exists)


@triton.jit
def instance_norm_bwd_kernel(
    x,  # [B, C, HW] by strides
    grad,  # [B, C, padded HW], dense
    grad_x,  # [B, C, HW], dense
    weight,  # [C] or [B, C] by weight_stride, or None
    bias,  # [C] or [B, C] by bias_stride, or None
    alpha,  # as in the forward
    partials,  # [splits, 2, planes] with SPLIT, else None
    sums,  # [2, planes]: sum of g and of g (x - mean) rstd, times alpha
    centre,  # [planes]
    rstd,  # [planes]
    planes,
    C,
    HW,
    W,
    run,  # positions of y per program that reduced it
    splits,
    chunk,  # positions of x per program
    chunks,
    weight_stride,
    bias_stride,
    stride_b,
    stride_c,
    stride_p,
    dof,
    slope,
    MODE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLEND: tl.constexpr,
    ALPHA_PER_IMAGE: tl.constexpr,
    ACTIVATED: tl.constexpr,
    PAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``w rstd (g - mean g - (x - mean) rstd^2 sum(g (x - mean)) / dof)``."""
    lanes = tl.arange(0, BLOCK_P)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # last read, first in cache
    block = program // chunks
    first = (program % chunks) * chunk
    plane, b, c, exists = plane_block(block, planes, C, CHANNELS_LAST, BLOCK_C)
    begin = begin_strided(b, c, stride_b, stride_c)
    shift = tl.load(x + begin, mask=exists, other=0).to(tl.float32)
    mean = tl.load(centre + plane, mask=exists, other=0)
    r = tl.load(rstd + plane, mask=exists, other=0)
    gain = r * per_plane(weight, b, c, exists, weight_stride, 1.0)
    offset = per_plane(bias, b, c, exists, bias_stride, 0.0)
    padded_HW = padded_positions(HW, W, PAD)
    grad_begin, grad_stride = begin_dense(plane, b, c, C, padded_HW, CHANNELS_LAST)
    out_begin, out_stride = begin_dense(plane, b, c, C, HW, CHANNELS_LAST)

    if MODE == RESIDENT:
        mask = exists[:, None] & (lanes < HW)[None, :]
        g = tl.load(grad + tile(grad_begin, lanes, grad_stride), mask=mask, other=0).to(tl.float32)
        centred = tl.load(x + tile(begin, lanes, stride_p), mask=mask, other=0).to(tl.float32)
        centred = centred - shift[:, None] - mean[:, None]
        g = _before_activation(g, centred, gain, offset, slope, ACTIVATED)
        sum_g = tl.sum(g, 1)
        sum_gx = tl.sum(g * centred, 1)  # g is 0 where masked
    elif MODE == SWEEP:
        sum_g, sum_gx = _grad_sums(
            x, grad, begin, grad_begin, grad_stride, exists, shift, mean, gain, offset, 0,
            run, HW, padded_HW, W, stride_p, slope, ACTIVATED, PAD, BLOCK_C, BLOCK_P,
        )  # fmt: skip
    else:
        split = tl.arange(0, SPLITS)
        offsets = 2 * split.to(tl.int64)[:, None] * planes + plane[None, :]
        present = (split < splits)[:, None] & exists[None, :]
        sum_g = tl.sum(tl.load(partials + offsets, mask=present, other=0), 0)
        sum_gx = tl.sum(tl.load(partials + offsets + planes, mask=present, other=0), 0)

    # grad_x = direct g + constant + linear (x - mean)
    direct = gain
    scale = tl.full([BLOCK_C], 1.0, tl.float32)
    if BLEND:
        scale *= _alpha(alpha, b, exists, ALPHA_PER_IMAGE)
        direct = scale * gain + (1.0 - scale)
    constant = -scale * gain * sum_g / HW
    linear = -scale * gain * r * r * sum_gx / dof
    if first == 0:
        tl.store(sums + plane, scale * sum_g, mask=exists)
        tl.store(sums + planes + plane, scale * r * sum_gx, mask=exists)
    if MODE == RESIDENT:
        out = direct[:, None] * g + constant[:, None] + linear[:, None] * centred
        out = out.to(grad_x.dtype.element_ty)
        tl.store(grad_x + tile(out_begin, lanes, out_stride), out, mask=mask)
    else:
        # Folded, a gradient is read four times: more than shared memory has room for.
        for i in tl.range(0, chunk, BLOCK_P, num_stages=1 if PAD else STAGES):
            p = first + chunk - BLOCK_P - i + lanes
            mask = exists[:, None] & (p < HW)[None, :]
            g = folded_gradient(grad, grad_begin, p, mask, HW, W, grad_stride, PAD)
            centred = tl.load(x + tile(begin, p, stride_p), mask=mask, other=0).to(tl.float32)
            centred = centred - shift[:, None] - mean[:, None]
            g = _before_activation(g, centred, gain, offset, slope, ACTIVATED)
            out = direct[:, None] * g + constant[:, None] + linear[:, None] * centred
            out = out.to(grad_x.dtype.element_ty)
            tl.store(grad_x + tile(out_begin, p, out_stride), out, mask=mask)


# --- Launchers ----------------------------------------------------------------------------------


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
    """x, residual: [B, C, H, W] -> y: [B, C, padded H, padded W]; centre, rstd: [B, C] fp32.

    weight, bias: [C], [1, C] or [B, C]. alpha: a number or [B]. slope: of the activation below
    zero, 1 for none. centre is the mean less the plane's first pixel.
    """
    if y.numel() == 0:
        return
    x, strides = readable(x)
    tiling = norm_tiling_of(x, strides, x, y)
    (B, C), HW, dof = x.shape[:2], x.shape[2:].numel(), float(x.shape[2:].numel() - correction)
    partials = None
    with on_device_of(x):
        if tiling.splits > 1:
            partials = rstd.new_empty(1 + 2 * tiling.splits, B * C)
            instance_stats_fwd_kernel[(tiling.blocks * tiling.splits,)](
                x, partials, None, B * C, C, HW, tiling.run, tiling.splits, *strides[1:], eps, dof,
                PARTIAL=True, ONE_TILE=tiling.run == tiling.block_p,
                CHANNELS_LAST=strides.channels_last, BLOCK_C=tiling.block_c,
                BLOCK_P=tiling.block_p, num_warps=tiling.num_warps, maxnreg=tiling.maxnreg,
            )  # fmt: skip
        normalise(
            x, strides, tiling, y, residual, weight, bias, alpha, partials, centre, rstd,
            slope=slope, pad=pad, eps=eps, dof=dof,
        )  # fmt: skip


def normalise(
    x: Tensor,
    strides: Walk,
    tiling: Tiling,
    y: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: float | Tensor,
    partials: Tensor | None,
    centre: Tensor,
    rstd: Tensor,
    style_partials: Tensor | None = None,
    style_mean: Tensor | None = None,
    style_std: Tensor | None = None,
    style_planes: int = 0,
    style_HW: int = 0,
    style_run: int = 0,
    style_splits: int = 1,
    style_dof: float = 0.0,
    *,
    slope: float = 1.0,
    pad: int = 0,
    eps: float,
    dof: float,
) -> None:
    B, C, H, W = x.shape
    out = writable(y, strides.channels_last)
    if residual is not None:
        residual = dense(residual, strides.channels_last)
    weight, weight_stride = _by_image(weight)
    bias, bias_stride = _by_image(bias)
    per_image = isinstance(alpha, Tensor)
    instance_norm_fwd_kernel[(tiling.blocks * tiling.chunks,)](
        x, out, residual, weight, bias, alpha, partials, centre, rstd,
        style_partials, style_mean, style_std, style_planes, style_HW, style_run, style_splits,
        style_dof, B * C, C, H * W, W, tiling.run, tiling.splits, tiling.chunk, tiling.chunks,
        weight_stride, bias_stride, *strides[1:], eps, dof, slope,
        MODE=tiling.mode, SPLITS=next_power_of_2(tiling.splits),
        STYLE_SPLITS=next_power_of_2(style_splits), BLEND=per_image or alpha != 1.0,
        ALPHA_PER_IMAGE=per_image, ACTIVATED=slope != 1.0, PAD=pad,
        CHANNELS_LAST=strides.channels_last, BLOCK_C=tiling.block_c, BLOCK_P=tiling.block_p,
        num_warps=tiling.num_warps, maxnreg=tiling.maxnreg,
    )  # fmt: skip
    if out is not y:
        y.copy_(out)


def _by_image(values: Tensor | None) -> tuple[Tensor | None, int]:
    """Weight or bias, [C], [1, C] or [B, C], and its stride over images: 0 where they share it."""
    if values is None:
        return None, 0
    if values.stride(-1) != 1:
        values = values.contiguous()
    return values, values.stride(0) if values.ndim == 2 and len(values) > 1 else 0


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
    """grad: like y; grad_x: like x, dense; sums: [2, B, C], the gradients of bias and weight."""
    if grad_x.numel() == 0:
        return
    B, C, H, W = x.shape
    x, strides = readable(x)
    out = writable(grad_x, strides.channels_last)
    if pad and min(H, W) <= 2 * pad + 1:  # too narrow for the kernel's way of folding
        folded = torch.empty_like(out)
        reflection_pad2d_bwd(grad, folded, (pad,) * 4)
        grad, pad = folded, 0
    grad = dense(grad, strides.channels_last)
    tiling = norm_tiling_of(x, strides, grad, grad_x)
    HW, planes = H * W, B * C
    weight, weight_stride = _by_image(weight)
    bias, bias_stride = _by_image(bias)
    split = tiling.splits > 1
    partials = rstd.new_empty(tiling.splits, 2, planes) if split else None
    per_image = isinstance(alpha, Tensor)
    with on_device_of(x):
        if split:
            instance_norm_sums_kernel[(tiling.blocks * tiling.splits,)](
                x, grad, weight, bias, centre, rstd, partials, planes, C, HW, W, tiling.run,
                tiling.splits, weight_stride, bias_stride, *strides[1:], slope,
                ACTIVATED=slope != 1.0, PAD=pad, CHANNELS_LAST=strides.channels_last,
                BLOCK_C=tiling.block_c, BLOCK_P=tiling.block_p, num_warps=tiling.num_warps,
                maxnreg=tiling.maxnreg,
            )  # fmt: skip
        instance_norm_bwd_kernel[(tiling.blocks * tiling.chunks,)](
            x, grad, out, weight, bias, alpha, partials, sums, centre, rstd, planes, C, HW, W,
            tiling.run, tiling.splits, tiling.chunk, tiling.chunks, weight_stride,
            bias_stride, *strides[1:], float(HW - correction), slope,
            MODE=tiling.mode, SPLITS=next_power_of_2(tiling.splits),
            BLEND=per_image or alpha != 1.0, ALPHA_PER_IMAGE=per_image, ACTIVATED=slope != 1.0,
            PAD=pad, CHANNELS_LAST=strides.channels_last, BLOCK_C=tiling.block_c,
            BLOCK_P=tiling.block_p, num_warps=tiling.num_warps, maxnreg=tiling.maxnreg,
        )  # fmt: skip
    if out is not grad_x:
        grad_x.copy_(out)
