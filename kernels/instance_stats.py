"""Mean and standard deviation of image planes, and the distance between statistics."""

import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels._common import cdiv, next_power_of_2, on_device_of, readable, writable
from fastgan.kernels._planes import begin_dense, begin_strided, plane_block, tile
from fastgan.kernels._tiling import STAGES, map_tiling_of, stats_tiling_of, wide

# --- Moments ------------------------------------------------------------------------------------


@triton.jit
def tile_moments(value, mask, n):
    """Mean and sum of squared deviations of a tile's n positions in each plane, in two passes."""
    mean = tl.sum(value, 1) / n
    deviation = tl.where(mask, value - mean[:, None], 0.0)
    return mean, tl.sum(deviation * deviation, 1)


@triton.jit
def moments(
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
        value = tl.load(x + tile(begin, first + lanes, stride_p), mask=mask, other=0)
        value = tl.where(mask, value.to(tl.float32) - shift[:, None], 0.0)
        total, m2 = tile_moments(value, mask, n)
    else:
        mean = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        lane_m2 = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        count = 0.0
        for i in tl.range(0, run, BLOCK_P, num_stages=STAGES):
            p = first + i + lanes
            mask = exists[:, None] & (p < HW)[None, :]
            value = tl.load(x + tile(begin, p, stride_p), mask=mask, other=0).to(tl.float32)
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
def store_partials(partials, plane, exists, planes, split, shift, mean, m2):
    """What moments returned for one split; all splits have the same first pixel."""
    if split == 0:
        tl.store(partials + plane, shift, mask=exists)
    row = 1 + 2 * split.to(tl.int64)
    tl.store(partials + row * planes + plane, mean, mask=exists)
    tl.store(partials + (row + 1) * planes + plane, m2, mask=exists)


@triton.jit
def merged_moments(partials, plane, exists, planes, HW, run, splits, SPLITS: tl.constexpr):
    """What moments returns, for all positions: Chan's merge of the splits in fixed order."""
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
    plane, b, c, exists = plane_block(block, planes, C, CHANNELS_LAST, BLOCK_C)
    begin = begin_strided(b, c, stride_b, stride_c)
    shift, m, m2 = moments(
        x, begin, exists, split * run, run, HW, stride_p, ONE_TILE, BLOCK_C, BLOCK_P
    )
    if PARTIAL:
        store_partials(mean, plane, exists, planes, split, shift, m, m2)
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
    shift, m, m2 = merged_moments(partials, plane, exists, planes, HW, run, splits, SPLITS)
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
    plane, b, c, exists = plane_block(block, planes, C, CHANNELS_LAST, BLOCK_C)
    mask = exists[:, None] & (p < HW)[None, :]
    grad = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    if grad_mean is not None:
        grad += (_summed(grad_mean, plane, exists, planes, copies, BLOCK_C) / HW)[:, None]
    if grad_std is not None:
        offsets = tile(begin_strided(b, c, stride_b, stride_c), p, stride_p)
        deviation = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
        deviation -= tl.load(mean + plane, mask=exists, other=0)[:, None]
        slope = _summed(grad_std, plane, exists, planes, copies, BLOCK_C)
        slope /= tl.load(std + plane, mask=exists, other=1) * dof
        grad += slope[:, None] * deviation
    begin, stride = begin_dense(plane, b, c, C, HW, CHANNELS_LAST)
    tl.store(grad_x + tile(begin, p, stride), grad.to(grad_x.dtype.element_ty), mask=mask)


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


# --- Launchers ----------------------------------------------------------------------------------


def instance_stats_fwd(x: Tensor, mean: Tensor, std: Tensor, eps: float, correction: int) -> None:
    """x: [B, C, ...] -> mean, std: [B, C] fp32."""
    B, C = mean.shape
    if mean.numel() == 0:
        return
    x, strides = readable(x)
    HW, planes, dof = x.shape[2:].numel(), B * C, float(x.shape[2:].numel() - correction)
    tiling = stats_tiling_of(x, strides)
    split = tiling.splits > 1
    out = mean.new_empty(1 + 2 * tiling.splits, planes) if split else mean
    with on_device_of(x):
        instance_stats_fwd_kernel[(tiling.blocks * tiling.splits,)](
            x, out, std, planes, C, HW, tiling.run, tiling.splits, *strides[1:], eps, dof,
            PARTIAL=split, ONE_TILE=tiling.run == tiling.block_p,
            CHANNELS_LAST=strides.channels_last, BLOCK_C=tiling.block_c, BLOCK_P=tiling.block_p,
            num_warps=tiling.num_warps, maxnreg=tiling.maxnreg,
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
    tiling = map_tiling_of(out, strides.channels_last, wide(x, strides))
    with on_device_of(x):
        instance_stats_bwd_kernel[(tiling.blocks * tiling.chunks,)](
            x, out, grad_mean, grad_std, mean, std, B * C, copies, C, HW, tiling.chunks,
            *strides[1:], float(HW - correction), CHANNELS_LAST=strides.channels_last,
            BLOCK_C=tiling.block_c, BLOCK_P=tiling.block_p, num_warps=tiling.num_warps,
            maxnreg=tiling.maxnreg,
        )  # fmt: skip
    if out is not grad_x:
        grad_x.copy_(out)


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
