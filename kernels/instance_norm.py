"""Statistics of image planes and what is normalised by them.

A plane is one channel of one image. Every kernel works on tiles [BLOCK_C planes, BLOCK_P
positions] and takes a stride per axis, so that one source serves NCHW, where positions are
contiguous and a tile holds few planes, and channels_last, where channels are and it holds many.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels._common import (
    Walk,
    cdiv,
    dense,
    is_dense,
    multiprocessors,
    next_power_of_2,
    on_device_of,
    readable,
    writable,
)

# --- Device functions ---------------------------------------------------------------------------


@triton.jit
def _planes(block, planes, C, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """The planes b·C + c of a block, their b and c, and which of them exist."""
    if CHANNELS_LAST:  # neighbouring channels of one image
        groups = tl.cdiv(C, BLOCK_C)
        b = block // groups
        c = (block % groups) * BLOCK_C + tl.arange(0, BLOCK_C)
        return b * C + c, b, c, c < C
    else:
        plane = block * BLOCK_C + tl.arange(0, BLOCK_C)
        return plane, plane // C, plane % C, plane < planes


@triton.jit
def _strided(b, c, stride_b, stride_c):
    """Where planes begin in a tensor given by strides."""
    return b.to(tl.int64) * stride_b + c.to(tl.int64) * stride_c


@triton.jit
def _dense(plane, b, c, C, HW, CHANNELS_LAST: tl.constexpr):
    """Where planes begin in a dense tensor of this memory format, and its positions' stride."""
    if CHANNELS_LAST:
        return b.to(tl.int64) * HW * C + c, C
    else:
        return plane.to(tl.int64) * HW, 1


@triton.jit
def _tile(begin, p, stride_p):
    """Offsets of a tile: planes [BLOCK_C] by positions [BLOCK_P]."""
    return begin[:, None] + p.to(tl.int64)[None, :] * stride_p


@triton.jit
def _tile_moments(value, mask, n):
    """Mean and sum of squared deviations of a tile's n positions in each plane, in two passes."""
    mean = tl.sum(value, 1) / n
    deviation = tl.where(mask, value - mean[:, None], 0.0)
    return mean, tl.sum(deviation * deviation, 1)


@triton.jit
def _moments(
    x,
    begin,
    exists,
    first,
    run,
    HW,
    stride_p,
    ONE_TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Per plane: its first pixel, and of positions [first, first + run) the mean, less that pixel,
    and the sum of squared deviations.

    Several tiles take Welford's update in every lane, then Chan's merge of the lanes. Relative
    errors stay near 1e-7 whatever means and outliers.
    """
    lanes = tl.arange(0, BLOCK_P)
    shift = tl.load(x + begin, mask=exists, other=0).to(tl.float32)
    n = tl.minimum(HW - first, run)
    if ONE_TILE:
        mask = exists[:, None] & (first + lanes < HW)[None, :]
        value = tl.load(x + _tile(begin, first + lanes, stride_p), mask=mask, other=0)
        value = tl.where(mask, value.to(tl.float32) - shift[:, None], 0.0)
        total, m2 = _tile_moments(value, mask, n)
    else:
        mean = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        lane_m2 = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        count = 0.0
        for i in range(0, run, BLOCK_P):
            p = first + i + lanes
            mask = exists[:, None] & (p < HW)[None, :]
            value = tl.load(x + _tile(begin, p, stride_p), mask=mask, other=0).to(tl.float32)
            value -= shift[:, None]
            count += 1.0
            delta = tl.where(mask, value - mean, 0.0)
            mean += delta * (1.0 / count)
            lane_m2 += delta * (value - mean)
        per_lane = tl.maximum((n - lanes + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[None, :]
        total = tl.sum(mean * per_lane, 1) / n
        deviation = mean - total[:, None]
        m2 = tl.sum(lane_m2 + per_lane * deviation * deviation, 1)
    return shift, total, m2


@triton.jit
def _store_partials(partials, plane, exists, planes, split, shift, mean, m2):
    """What _moments returned for one split; all splits have the same first pixel."""
    if split == 0:
        tl.store(partials + plane, shift, mask=exists)
    row = 1 + 2 * split.to(tl.int64)
    tl.store(partials + row * planes + plane, mean, mask=exists)
    tl.store(partials + (row + 1) * planes + plane, m2, mask=exists)


@triton.jit
def _merged_moments(partials, plane, exists, planes, HW, run, splits, SPLITS: tl.constexpr):
    """What _moments returns, for all positions: Chan's merge of the splits in fixed order."""
    split = tl.arange(0, SPLITS)
    row = 1 + 2 * split.to(tl.int64)[:, None]
    mask = (split < splits)[:, None] & exists[None, :]
    mean = tl.load(partials + row * planes + plane[None, :], mask=mask, other=0)
    m2 = tl.load(partials + (row + 1) * planes + plane[None, :], mask=mask, other=0)
    n = tl.minimum(tl.maximum(HW - split * run, 0), run).to(tl.float32)[:, None]
    total = tl.sum(mean * n, 0) / HW
    deviation = mean - total[None, :]
    shift = tl.load(partials + plane, mask=exists, other=0)
    return shift, total, tl.sum(m2 + n * deviation * deviation, 0)


# --- Statistics ---------------------------------------------------------------------------------


@triton.jit
def instance_stats_fwd_kernel(
    x,  # [B, C, HW] by strides
    mean,  # [planes], or if PARTIAL [1 + 2 splits, planes]: shift, (mean, m2)...
    std,  # [planes]
    planes,
    C,
    HW,
    run,  # positions per program
    splits,
    stride_b,
    stride_c,
    stride_p,
    eps,
    dof,
    PARTIAL: tl.constexpr,
    ONE_TILE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    plane, b, c, exists = _planes(block, planes, C, CHANNELS_LAST, BLOCK_C)
    begin = _strided(b, c, stride_b, stride_c)
    shift, m, m2 = _moments(
        x, begin, exists, split * run, run, HW, stride_p, ONE_TILE, BLOCK_C, BLOCK_P
    )
    if PARTIAL:
        _store_partials(mean, plane, exists, planes, split, shift, m, m2)
    else:
        tl.store(mean + plane, shift + m, mask=exists)
        tl.store(std + plane, tl.sqrt(m2 / dof + eps), mask=exists)


@triton.jit
def instance_stats_merge_kernel(
    partials,  # [1 + 2 splits, planes]
    mean,  # [planes]
    std,  # [planes]
    planes,
    HW,
    run,
    splits,
    eps,
    dof,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    plane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = plane < planes
    shift, m, m2 = _merged_moments(partials, plane, exists, planes, HW, run, splits, SPLITS)
    tl.store(mean + plane, shift + m, mask=exists)
    tl.store(std + plane, tl.sqrt(m2 / dof + eps), mask=exists)


@triton.jit
def _summed(values, plane, exists, planes, copies, BLOCK_C: tl.constexpr):
    """[copies, planes] -> [BLOCK_C], summed in order."""
    total = tl.zeros([BLOCK_C], tl.float32)
    for i in range(copies):
        total += tl.load(values + i * planes + plane, mask=exists, other=0)
    return total


@triton.jit
def instance_stats_bwd_kernel(
    x,  # [B, C, HW] by strides
    grad_x,  # the same, dense
    grad_mean,  # [copies, planes] or None
    grad_std,  # [copies, planes] or None
    mean,  # [planes]
    std,  # [planes]
    planes,
    copies,  # of x, whose gradients are summed
    C,
    HW,
    chunks,
    stride_b,
    stride_c,
    stride_p,
    dof,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``grad_mean / HW + grad_std (x - mean) / (std dof)``."""
    block = tl.program_id(0) // chunks
    p = (tl.program_id(0) % chunks) * BLOCK_P + tl.arange(0, BLOCK_P)
    plane, b, c, exists = _planes(block, planes, C, CHANNELS_LAST, BLOCK_C)
    mask = exists[:, None] & (p < HW)[None, :]
    grad = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    if grad_mean is not None:
        grad += (_summed(grad_mean, plane, exists, planes, copies, BLOCK_C) / HW)[:, None]
    if grad_std is not None:
        offsets = _tile(_strided(b, c, stride_b, stride_c), p, stride_p)
        deviation = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
        deviation -= tl.load(mean + plane, mask=exists, other=0)[:, None]
        slope = _summed(grad_std, plane, exists, planes, copies, BLOCK_C)
        slope /= tl.load(std + plane, mask=exists, other=1) * dof
        grad += slope[:, None] * deviation
    begin, stride = _dense(plane, b, c, C, HW, CHANNELS_LAST)
    tl.store(grad_x + _tile(begin, p, stride), grad.to(grad_x.dtype.element_ty), mask=mask)


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
    if program < programs:
        split = program % splits
        plane, b, c, exists = _planes(program // splits, planes, C, CHANNELS_LAST, BLOCK_C)
        begin = _strided(b, c, stride_b, stride_c)
        shift, mean, m2 = _moments(
            content, begin, exists, split * run, run, HW, stride_p, False, BLOCK_C, BLOCK_P
        )
        _store_partials(partials, plane, exists, planes, split, shift, mean, m2)
    else:
        program -= programs
        split = program % style_splits
        plane, b, c, exists = _planes(
            program // style_splits, style_planes, C, STYLE_CHANNELS_LAST, STYLE_BLOCK_C
        )
        begin = _strided(b, c, style_stride_b, style_stride_c)
        shift, mean, m2 = _moments(
            style, begin, exists, split * style_run, style_run, style_HW, style_stride_p, False,
            STYLE_BLOCK_C, STYLE_BLOCK_P,
        )  # fmt: skip
        _store_partials(style_partials, plane, exists, style_planes, split, shift, mean, m2)


# --- Normalisation ------------------------------------------------------------------------------
# Each kernel reduces a plane and then writes it, and comes by the reduction in one of three ways:
# RESIDENT holds the plane in registers, SWEEP passes over it twice, the second time backwards to
# meet what is still in cache, SPLIT merges what programs of an earlier launch found.

RESIDENT = tl.constexpr(0)
SWEEP = tl.constexpr(1)
SPLIT = tl.constexpr(2)


@triton.jit
def _padded(HW, W, PAD: tl.constexpr):
    """Positions of an image padded on four sides."""
    if PAD == 0:
        return HW
    else:
        return (HW // W + 2 * PAD) * (W + 2 * PAD)


@triton.jit
def _reflected(i, n):
    """An index beyond an edge of [0, n), mirrored there."""
    return n - 1 - tl.abs(n - 1 - tl.abs(i))


@triton.jit
def _source(q, HW, W, PAD: tl.constexpr):
    """The position of x that position q of the padded image shows."""
    if PAD == 0:
        return q
    else:
        padded = W + 2 * PAD
        return _reflected(q // padded - PAD, HW // W) * W + _reflected(q % padded - PAD, W)


@triton.jit
def _folded(grad, begin, p, mask, HW, W, stride, PAD: tl.constexpr):
    """The gradient of position p: that of every position of the padded image that shows it.

    A row or column has at most one mirror image: the launcher sees to H, W > 2 PAD + 1.
    """
    if PAD == 0:
        return tl.load(grad + _tile(begin, p, stride), mask=mask, other=0).to(tl.float32)
    else:
        H = HW // W
        h = p // W
        w = p % W
        padded = W + 2 * PAD
        top = (h >= 1) & (h <= PAD)
        left = (w >= 1) & (w <= PAD)
        row_mirrored = top | ((h >= H - 1 - PAD) & (h <= H - 2))
        column_mirrored = left | ((w >= W - 1 - PAD) & (w <= W - 2))
        row = (h + PAD) * padded
        column = w + PAD
        mirror_row = tl.where(top, PAD - h, PAD + 2 * (H - 1) - h) * padded
        mirror_column = tl.where(left, PAD - w, PAD + 2 * (W - 1) - w)
        total = tl.load(grad + _tile(begin, row + column, stride), mask=mask, other=0)
        total = total.to(tl.float32)
        in_row = mask & column_mirrored[None, :]
        in_column = mask & row_mirrored[None, :]
        total += tl.load(grad + _tile(begin, row + mirror_column, stride), mask=in_row, other=0)
        total += tl.load(grad + _tile(begin, mirror_row + column, stride), mask=in_column, other=0)
        return total + tl.load(
            grad + _tile(begin, mirror_row + mirror_column, stride),
            mask=in_row & in_column,
            other=0,
        )


@triton.jit
def _per_plane(values, b, c, exists, stride, default: tl.constexpr):
    """[C] (stride 0) or [B, C] (stride C) -> [BLOCK_C]; the default where there are none."""
    if values is None:
        return tl.full(exists.shape, default, tl.float32)
    else:
        return tl.load(values + b * stride + c, mask=exists, other=0).to(tl.float32)


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
    plane, b, c, exists = _planes(block, planes, C, CHANNELS_LAST, BLOCK_C)
    begin = _strided(b, c, stride_b, stride_c)
    if MODE == RESIDENT:
        mask = exists[:, None] & (lanes < HW)[None, :]
        shift = tl.load(x + begin, mask=exists, other=0).to(tl.float32)
        value = tl.load(x + _tile(begin, lanes, stride_p), mask=mask, other=0)
        centred = tl.where(mask, value.to(tl.float32) - shift[:, None], 0.0)
        mean, m2 = _tile_moments(centred, mask, HW)
        centred -= mean[:, None]
    elif MODE == SWEEP:
        shift, mean, m2 = _moments(x, begin, exists, 0, run, HW, stride_p, False, BLOCK_C, BLOCK_P)
    else:
        shift, mean, m2 = _merged_moments(partials, plane, exists, planes, HW, run, splits, SPLITS)
    r = 1.0 / tl.sqrt(m2 / dof + eps)
    if first == 0:
        tl.store(centre + plane, mean, mask=exists)
        tl.store(rstd + plane, r, mask=exists)
    if style_partials is None:
        gain = r * _per_plane(weight, b, c, exists, weight_stride, 1.0)
        offset = _per_plane(bias, b, c, exists, bias_stride, 0.0)
    else:
        style = plane % style_planes  # one style for all images, or one for each
        style_shift, offset, style_m2 = _merged_moments(
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

    padded_HW = _padded(HW, W, PAD)
    y_begin, y_stride = _dense(plane, b, c, C, padded_HW, CHANNELS_LAST)
    r_begin, r_stride = _dense(plane, b, c, C, HW, CHANNELS_LAST)
    if MODE == RESIDENT:
        out = _normalised(centred, gain, offset, slope, ACTIVATED)
        if residual is not None:
            out += tl.load(residual + _tile(r_begin, lanes, r_stride), mask=mask, other=0)
        tl.store(y + _tile(y_begin, lanes, y_stride), out.to(y.dtype.element_ty), mask=mask)
    else:
        for i in range(0, chunk, BLOCK_P):
            q = first + chunk - BLOCK_P - i + lanes
            mask = exists[:, None] & (q < padded_HW)[None, :]
            p = _source(q, HW, W, PAD)
            value = tl.load(x + _tile(begin, p, stride_p), mask=mask, other=0).to(tl.float32)
            centred = value - shift[:, None] - mean[:, None]
            out = _normalised(centred, gain, offset, slope, ACTIVATED)
            if residual is not None:
                out += tl.load(residual + _tile(r_begin, p, r_stride), mask=mask, other=0)
            tl.store(y + _tile(y_begin, q, y_stride), out.to(y.dtype.element_ty), mask=mask)


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
    for i in range(0, run, BLOCK_P):
        q = first + i + tl.arange(0, BLOCK_P)
        mask = exists[:, None] & (q < padded_HW)[None, :]
        g = tl.load(grad + _tile(grad_begin, q, grad_stride), mask=mask, other=0).to(tl.float32)
        p = _source(q, HW, W, PAD)
        centred = tl.load(x + _tile(begin, p, stride_p), mask=mask, other=0).to(tl.float32)
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
    plane, b, c, exists = _planes(block, planes, C, CHANNELS_LAST, BLOCK_C)
    begin = _strided(b, c, stride_b, stride_c)
    shift = tl.load(x + begin, mask=exists, other=0).to(tl.float32)
    mean = tl.load(centre + plane, mask=exists, other=0)
    gain = tl.load(rstd + plane, mask=exists, other=0)
    gain *= _per_plane(weight, b, c, exists, weight_stride, 1.0)
    offset = _per_plane(bias, b, c, exists, bias_stride, 0.0)
    padded_HW = _padded(HW, W, PAD)
    grad_begin, grad_stride = _dense(plane, b, c, C, padded_HW, CHANNELS_LAST)
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
    plane, b, c, exists = _planes(block, planes, C, CHANNELS_LAST, BLOCK_C)
    begin = _strided(b, c, stride_b, stride_c)
    shift = tl.load(x + begin, mask=exists, other=0).to(tl.float32)
    mean = tl.load(centre + plane, mask=exists, other=0)
    r = tl.load(rstd + plane, mask=exists, other=0)
    gain = r * _per_plane(weight, b, c, exists, weight_stride, 1.0)
    offset = _per_plane(bias, b, c, exists, bias_stride, 0.0)
    padded_HW = _padded(HW, W, PAD)
    grad_begin, grad_stride = _dense(plane, b, c, C, padded_HW, CHANNELS_LAST)
    out_begin, out_stride = _dense(plane, b, c, C, HW, CHANNELS_LAST)

    if MODE == RESIDENT:
        mask = exists[:, None] & (lanes < HW)[None, :]
        g = tl.load(grad + _tile(grad_begin, lanes, grad_stride), mask=mask, other=0).to(tl.float32)
        centred = tl.load(x + _tile(begin, lanes, stride_p), mask=mask, other=0).to(tl.float32)
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
        tl.store(grad_x + _tile(out_begin, lanes, out_stride), out, mask=mask)
    else:
        for i in range(0, chunk, BLOCK_P):
            p = first + chunk - BLOCK_P - i + lanes
            mask = exists[:, None] & (p < HW)[None, :]
            g = _folded(grad, grad_begin, p, mask, HW, W, grad_stride, PAD)
            centred = tl.load(x + _tile(begin, p, stride_p), mask=mask, other=0).to(tl.float32)
            centred = centred - shift[:, None] - mean[:, None]
            g = _before_activation(g, centred, gain, offset, slope, ACTIVATED)
            out = direct[:, None] * g + constant[:, None] + linear[:, None] * centred
            out = out.to(grad_x.dtype.element_ty)
            tl.store(grad_x + _tile(out_begin, p, out_stride), out, mask=mask)


# --- Reflection padding -------------------------------------------------------------------------


@triton.jit
def reflection_pad2d_fwd_kernel(
    x,  # [B, C, HW] by strides
    y,  # [B, C, padded_HW], dense
    planes,
    C,
    H,
    W,
    padded_W,
    padded_HW,
    left,
    top,
    chunks,
    stride_b,
    stride_c,
    stride_p,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    q = (tl.program_id(0) % chunks) * BLOCK_P + tl.arange(0, BLOCK_P)
    block = tl.program_id(0) // chunks
    plane, b, c, exists = _planes(block, planes, C, CHANNELS_LAST, BLOCK_C)
    mask = exists[:, None] & (q < padded_HW)[None, :]
    p = _reflected(q // padded_W - top, H) * W + _reflected(q % padded_W - left, W)
    value = tl.load(x + _tile(_strided(b, c, stride_b, stride_c), p, stride_p), mask=mask)
    begin, stride = _dense(plane, b, c, C, padded_HW, CHANNELS_LAST)
    tl.store(y + _tile(begin, q, stride), value, mask=mask)


@triton.jit
def _shown(i, n, before, after, k: tl.constexpr):
    """The k-th of the at most three padded indices that show index i, and whether there is one."""
    if k == 0:
        return i + before, i >= 0
    elif k == 1:
        return before - i, (i >= 1) & (i <= before)
    else:
        return before + 2 * (n - 1) - i, (i >= n - 1 - after) & (i <= n - 2)


@triton.jit
def reflection_pad2d_bwd_kernel(
    grad,  # [B, C, padded_HW], dense
    grad_x,  # [B, C, HW], dense
    planes,
    C,
    H,
    W,
    padded_W,
    padded_HW,
    left,
    right,
    top,
    bottom,
    chunks,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    p = (tl.program_id(0) % chunks) * BLOCK_P + tl.arange(0, BLOCK_P)
    block = tl.program_id(0) // chunks
    plane, b, c, exists = _planes(block, planes, C, CHANNELS_LAST, BLOCK_C)
    mask = exists[:, None] & (p < H * W)[None, :]
    begin, stride = _dense(plane, b, c, C, padded_HW, CHANNELS_LAST)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for i in tl.static_range(3):
        row, in_row = _shown(p // W, H, top, bottom, i)
        for j in tl.static_range(3):
            column, in_column = _shown(p % W, W, left, right, j)
            q = row * padded_W + column
            shown = mask & (in_row & in_column)[None, :]
            total += tl.load(grad + _tile(begin, q, stride), mask=shown, other=0).to(tl.float32)
    begin, stride = _dense(plane, b, c, C, H * W, CHANNELS_LAST)
    tl.store(grad_x + _tile(begin, p, stride), total.to(grad_x.dtype.element_ty), mask=mask)


# --- Distance of statistics ---------------------------------------------------------------------


@triton.jit
def stats_distance_fwd_kernel(
    total,  # [] or None
    mean,  # [planes]
    std,  # [planes]
    target_mean,  # [target_planes]
    target_std,  # [target_planes]
    out,  # []
    planes,
    target_planes,
    weight,
    BLOCK: tl.constexpr,
):
    """``total + weight (sum (mean - target_mean)^2 + sum (std - target_std)^2)``, one program."""
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, planes, BLOCK):
        plane = first + tl.arange(0, BLOCK)
        exists = plane < planes
        target = plane % target_planes
        of_mean = tl.load(mean + plane, mask=exists, other=0)
        of_mean -= tl.load(target_mean + target, mask=exists, other=0)
        of_std = tl.load(std + plane, mask=exists, other=0)
        of_std -= tl.load(target_std + target, mask=exists, other=0)
        squares += of_mean * of_mean + of_std * of_std
    loss = weight * tl.sum(squares)
    if total is not None:
        loss += tl.load(total)
    tl.store(out, loss)


@triton.jit
def stats_distance_bwd_kernel(
    grad,  # []
    mean,  # [planes]
    std,  # [planes]
    target_mean,  # [target_planes]
    target_std,  # [target_planes]
    grad_mean,  # [planes]
    grad_std,  # [planes]
    planes,
    target_planes,
    weight,
    BLOCK: tl.constexpr,
):
    plane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = plane < planes
    target = plane % target_planes
    scale = 2.0 * weight * tl.load(grad)
    of_mean = tl.load(mean + plane, mask=exists) - tl.load(target_mean + target, mask=exists)
    of_std = tl.load(std + plane, mask=exists) - tl.load(target_std + target, mask=exists)
    tl.store(grad_mean + plane, scale * of_mean, mask=exists)
    tl.store(grad_std + plane, scale * of_std, mask=exists)


# --- Tilings ------------------------------------------------------------------------------------

# Elements of a tile. A plane of up to RESIDENT_TILE stays in registers, small ones share a program
# of TILE. Kernels that loop over tiles of TILE keep accumulators for every element.
TILE = 4096
RESIDENT_TILE = 16384
# A reduction is split until a multiprocessor has this many programs, which keeps enough reads in
# flight, but not below MIN_RUN elements a program, nor at all where one would reduce few elements:
# another launch costs more.
PROGRAMS = 4
MIN_RUN = 8192
UNSPLIT_RUN = 32768
MAX_SPLITS = 64


class Tiling(NamedTuple):
    """How the programs of a kernel cover [B, C, positions]."""

    mode: int
    block_c: int
    block_p: int
    num_warps: int
    blocks: int  # programs that cover all planes
    run: int  # positions that one program reduces
    splits: int  # programs that reduce one plane
    chunk: int  # positions that one program writes
    chunks: int  # programs that write one plane


def tile_shape(
    channels_last: bool, planes: int, C: int, positions: int, itemsize: int
) -> tuple[int, int]:
    """Planes and positions of a tile: up to a 128-byte line of channels, or whole rows."""
    if channels_last:
        block_c = min(128 // itemsize, next_power_of_2(C))
        return block_c, min(max(TILE // block_c, 1), next_power_of_2(positions))
    block_p = min(TILE, next_power_of_2(positions))
    return min(TILE // block_p, next_power_of_2(planes)), block_p


def plane_blocks(channels_last: bool, B: int, C: int, block_c: int) -> int:
    return B * cdiv(C, block_c) if channels_last else cdiv(B * C, block_c)


def warps(tile: int, per_thread: int) -> int:
    """Warps that hold a tile, so many elements in each thread; four where it is small."""
    return min(max(tile // (32 * per_thread), 4), 16)


@functools.lru_cache(maxsize=4096)
def stats_tiling(
    channels_last: bool, B: int, C: int, HW: int, itemsize: int, processors: int
) -> Tiling:
    """One program per block of planes, or several where these would be few and large."""
    block_c, block_p = tile_shape(channels_last, B * C, C, HW, itemsize)
    blocks, work = plane_blocks(channels_last, B, C, block_c), HW * block_c
    splits = 1
    if blocks < PROGRAMS * processors and work > UNSPLIT_RUN:
        splits = min(cdiv(PROGRAMS * processors, blocks), cdiv(work, MIN_RUN), MAX_SPLITS)
    run = cdiv(cdiv(HW, splits), block_p) * block_p
    splits = cdiv(HW, run)
    mode, num_warps = SPLIT if splits > 1 else SWEEP, warps(block_c * block_p, 16)
    return Tiling(mode.value, block_c, block_p, num_warps, blocks, run, splits, run, splits)


@functools.lru_cache(maxsize=4096)
def norm_tiling(
    channels_last: bool,
    B: int,
    C: int,
    reduced: int,
    written: int,
    itemsize: int,
    processors: int,
) -> Tiling:
    """For kernels that reduce and then write planes, whose sizes differ where they pad."""
    if reduced == written:  # a padded image is gathered, which registers cannot
        block_c, block_p = resident_shape(channels_last, B * C, C, reduced, itemsize)
        if block_c * block_p <= RESIDENT_TILE:
            blocks = plane_blocks(channels_last, B, C, block_c)
            num_warps = warps(block_c * block_p, 32)
            return Tiling(
                RESIDENT.value, block_c, block_p, num_warps, blocks, block_p, 1, block_p, 1
            )
    tiling = stats_tiling(channels_last, B, C, reduced, itemsize, processors)
    block_c, block_p, blocks = tiling.block_c, tiling.block_p, tiling.blocks
    enough = processors if reduced <= RESIDENT_TILE else 2 * processors
    if blocks >= enough or tiling.splits == 1:
        run, chunk = (cdiv(n, block_p) * block_p for n in (reduced, written))
        num_warps = warps(block_c * block_p, 8)
        return Tiling(SWEEP.value, block_c, block_p, num_warps, blocks, run, 1, chunk, 1)
    chunks = min(cdiv(PROGRAMS * processors, blocks), cdiv(written, block_p))
    chunk = cdiv(cdiv(written, chunks), block_p) * block_p
    return tiling._replace(chunk=chunk, chunks=cdiv(written, chunk))


def resident_shape(
    channels_last: bool, planes: int, C: int, positions: int, itemsize: int
) -> tuple[int, int]:
    """A tile of whole planes: rows, or channels in channels_last, at least a 32-byte sector."""
    block_p = next_power_of_2(positions)
    if not channels_last:
        return min(max(TILE // block_p, 1), next_power_of_2(planes)), block_p
    block_c = 128 // itemsize
    while block_c * block_p > RESIDENT_TILE // 2 and block_c * itemsize > 32:
        block_c //= 2
    return min(block_c, next_power_of_2(C)), block_p


# --- Launchers ----------------------------------------------------------------------------------


def instance_stats_fwd(x: Tensor, mean: Tensor, std: Tensor, eps: float, correction: int) -> None:
    """x: [B, C, ...] -> mean, std: [B, C] fp32."""
    B, C = mean.shape
    if mean.numel() == 0:
        return
    x, strides = readable(x)
    HW, planes, dof = x.shape[2:].numel(), B * C, float(x.shape[2:].numel() - correction)
    tiling = stats_tiling(
        strides.channels_last, B, C, HW, x.element_size(), multiprocessors(x.device)
    )
    split = tiling.splits > 1
    out = mean.new_empty(1 + 2 * tiling.splits, planes) if split else mean
    with on_device_of(x):
        instance_stats_fwd_kernel[(tiling.blocks * tiling.splits,)](
            x, out, std, planes, C, HW, tiling.run, tiling.splits, *strides[1:], eps, dof,
            PARTIAL=split, ONE_TILE=tiling.run == tiling.block_p,
            CHANNELS_LAST=strides.channels_last, BLOCK_C=tiling.block_c, BLOCK_P=tiling.block_p,
            num_warps=tiling.num_warps,
        )  # fmt: skip
        if split:
            instance_stats_merge_kernel[(cdiv(planes, 32),)](
                out, mean, std, planes, HW, tiling.run, tiling.splits, eps, dof,
                SPLITS=next_power_of_2(tiling.splits), BLOCK=32, num_warps=4,
            )  # fmt: skip


def instance_stats_bwd(
    x: Tensor,
    grad_x: Tensor,
    grad_mean: Tensor | None,
    grad_std: Tensor | None,
    mean: Tensor,
    std: Tensor,
    correction: int,
) -> None:
    """grad_x: like x; the others as in the forward, contiguous.

    The gradients may be of [k B, C]: those of k copies of x, to be summed.
    """
    B, C = mean.shape
    if grad_x.numel() == 0:
        return
    copies = next(len(g) for g in (grad_mean, grad_std) if g is not None) // B
    x, strides = readable(x)
    out = writable(grad_x, strides.channels_last)
    HW = x.shape[2:].numel()
    block_c, block_p, blocks, chunks = _map_tiling(out, strides.channels_last)
    with on_device_of(x):
        instance_stats_bwd_kernel[(blocks * chunks,)](
            x, out, grad_mean, grad_std, mean, std, B * C, copies, C, HW, chunks, *strides[1:],
            float(HW - correction), CHANNELS_LAST=strides.channels_last, BLOCK_C=block_c,
            BLOCK_P=block_p, num_warps=4,
        )  # fmt: skip
    if out is not grad_x:
        grad_x.copy_(out)


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
    tiling = _norm_tiling(x, y, strides.channels_last)
    (B, C), HW, dof = x.shape[:2], x.shape[2:].numel(), float(x.shape[2:].numel() - correction)
    partials = None
    with on_device_of(x):
        if tiling.splits > 1:
            partials = rstd.new_empty(1 + 2 * tiling.splits, B * C)
            instance_stats_fwd_kernel[(tiling.blocks * tiling.splits,)](
                x, partials, None, B * C, C, HW, tiling.run, tiling.splits, *strides[1:], eps, dof,
                PARTIAL=True, ONE_TILE=tiling.run == tiling.block_p,
                CHANNELS_LAST=strides.channels_last, BLOCK_C=tiling.block_c,
                BLOCK_P=tiling.block_p, num_warps=tiling.num_warps,
            )  # fmt: skip
        _normalise(
            x, strides, tiling, y, residual, weight, bias, alpha, partials, centre, rstd,
            slope=slope, pad=pad, eps=eps, dof=dof,
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
    tiling = _norm_tiling(x, y, strides.channels_last)
    dof = float(x.shape[2:].numel() - correction)
    if tiling.splits == 1:
        instance_stats_fwd(style, style_mean, style_std, eps, correction)
        with on_device_of(x):
            _normalise(
                x, strides, tiling, y, None, style_std, style_mean, alpha, None, centre, rstd,
                eps=eps, dof=dof,
            )  # fmt: skip
        return
    style, style_strides = readable(style)
    (B, C), HW = x.shape[:2], x.shape[2:].numel()
    style_planes, style_HW = len(style) * C, style.shape[2:].numel()
    style_tiling = stats_tiling(
        style_strides.channels_last, len(style), C, style_HW, style.element_size(),
        multiprocessors(x.device),
    )  # fmt: skip
    partials = rstd.new_empty(1 + 2 * tiling.splits, B * C)
    style_partials = rstd.new_empty(1 + 2 * style_tiling.splits, style_planes)
    programs = tiling.blocks * tiling.splits
    with on_device_of(x):
        adain_moments_kernel[(programs + style_tiling.blocks * style_tiling.splits,)](
            x, style, partials, style_partials, programs, C,
            B * C, HW, tiling.run, tiling.splits, *strides[1:],
            style_planes, style_HW, style_tiling.run, style_tiling.splits, *style_strides[1:],
            CHANNELS_LAST=strides.channels_last, BLOCK_C=tiling.block_c, BLOCK_P=tiling.block_p,
            STYLE_CHANNELS_LAST=style_strides.channels_last, STYLE_BLOCK_C=style_tiling.block_c,
            STYLE_BLOCK_P=style_tiling.block_p, num_warps=tiling.num_warps,
        )  # fmt: skip
        _normalise(
            x, strides, tiling, y, None, None, None, alpha, partials, centre, rstd,
            style_partials, style_mean, style_std, style_planes, style_HW, style_tiling.run,
            style_tiling.splits, float(style_HW - correction), eps=eps, dof=dof,
        )  # fmt: skip


def _norm_tiling(x: Tensor, y: Tensor, channels_last: bool) -> Tiling:
    """Of a kernel that reduces planes of x and writes planes of y."""
    (B, C, *_), itemsize, processors = x.shape, x.element_size(), multiprocessors(x.device)
    return norm_tiling(
        channels_last, B, C, x.shape[2:].numel(), y.shape[2:].numel(), itemsize, processors
    )


def _normalise(
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
        num_warps=tiling.num_warps,
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
    tiling = _norm_tiling(grad, grad_x, strides.channels_last)
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
            )  # fmt: skip
        instance_norm_bwd_kernel[(tiling.blocks * tiling.chunks,)](
            x, grad, out, weight, bias, alpha, partials, sums, centre, rstd, planes, C, HW, W,
            tiling.run, tiling.splits, tiling.chunk, tiling.chunks, weight_stride,
            bias_stride, *strides[1:], float(HW - correction), slope,
            MODE=tiling.mode, SPLITS=next_power_of_2(tiling.splits),
            BLEND=per_image or alpha != 1.0, ALPHA_PER_IMAGE=per_image, ACTIVATED=slope != 1.0,
            PAD=pad, CHANNELS_LAST=strides.channels_last, BLOCK_C=tiling.block_c,
            BLOCK_P=tiling.block_p, num_warps=tiling.num_warps,
        )  # fmt: skip
    if out is not grad_x:
        grad_x.copy_(out)


def reflection_pad2d_fwd(x: Tensor, y: Tensor, padding: tuple[int, int, int, int]) -> None:
    """x: [B, C, H, W] -> y, larger by padding: left, right, top, bottom."""
    if y.numel() == 0:
        return
    x, strides = readable(x)
    out = writable(y, strides.channels_last)
    (B, C, H, W), left, top = x.shape, padding[0], padding[2]
    block_c, block_p, blocks, chunks = _map_tiling(out, strides.channels_last)
    with on_device_of(x):
        reflection_pad2d_fwd_kernel[(blocks * chunks,)](
            x, out, B * C, C, H, W, y.shape[3], y.shape[2:].numel(), left, top, chunks,
            *strides[1:], CHANNELS_LAST=strides.channels_last, BLOCK_C=block_c, BLOCK_P=block_p,
            num_warps=warps(block_c * block_p, 8),
        )  # fmt: skip
    if out is not y:
        y.copy_(out)


def reflection_pad2d_bwd(grad: Tensor, grad_x: Tensor, padding: tuple[int, int, int, int]) -> None:
    """grad: like y of the forward -> grad_x, the sum over what shows each position."""
    if grad_x.numel() == 0:
        return
    channels_last = not is_dense(grad_x, False)
    grad, out = dense(grad, channels_last), writable(grad_x, channels_last)
    (B, C, H, W) = out.shape
    block_c, block_p, blocks, chunks = _map_tiling(out, channels_last)
    with on_device_of(grad):
        reflection_pad2d_bwd_kernel[(blocks * chunks,)](
            grad, out, B * C, C, H, W, grad.shape[3], grad.shape[2:].numel(), *padding, chunks,
            CHANNELS_LAST=channels_last, BLOCK_C=block_c, BLOCK_P=block_p,
            num_warps=warps(block_c * block_p, 8),
        )  # fmt: skip
    if out is not grad_x:
        grad_x.copy_(out)


def _map_tiling(out: Tensor, channels_last: bool) -> tuple[int, int, int, int]:
    """Of a kernel that writes one tile per program: its shape, blocks of planes, and chunks."""
    B, C = out.shape[:2]
    positions = out.shape[2:].numel()
    block_c, block_p = tile_shape(channels_last, B * C, C, positions, out.element_size())
    return block_c, block_p, plane_blocks(channels_last, B, C, block_c), cdiv(positions, block_p)


def stats_distance_fwd(
    total: Tensor | None,
    mean: Tensor,
    std: Tensor,
    target_mean: Tensor,
    target_std: Tensor,
    out: Tensor,
    weight: float,
) -> None:
    """mean, std: [B, C]; targets: [B or 1, C]; all contiguous -> out: []."""
    with on_device_of(mean):
        stats_distance_fwd_kernel[(1,)](
            total, mean, std, target_mean, target_std, out, mean.numel(), target_mean.numel(),
            weight, BLOCK=min(next_power_of_2(mean.numel()), 2048), num_warps=4,
        )  # fmt: skip


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
    if mean.numel() == 0:
        return
    with on_device_of(mean):
        stats_distance_bwd_kernel[(cdiv(mean.numel(), 512),)](
            grad, mean, std, target_mean, target_std, grad_mean, grad_std, mean.numel(),
            target_mean.numel(), weight, BLOCK=512, num_warps=4,
        )  # fmt: skip
