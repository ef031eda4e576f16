"""Statistics of image planes and what is normalised by them.

A plane is one channel of one image. Every kernel works on tiles [BLOCK_C planes, BLOCK_P
positions] and takes a stride per axis, so that one source serves NCHW, where positions are
contiguous and a tile holds few planes, and channels_last, where channels are and it holds many.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels._common import (
    cdiv,
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
    """Each plane's first pixel; the mean, less that pixel, and the sum of squared deviations of its
    positions [first, first + run).

    More than one tile: Welford's update in every
    lane, then Chan's merge of the lanes. Relative errors stay near 1e-7 whatever means and
    outliers.
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
def _merged_moments(partials, plane, exists, planes, HW, run, splits, SPLITS: tl.constexpr):
    """Mean and sum of squared deviations: Chan's merge of all splits, in fixed order."""
    split = tl.arange(0, SPLITS)
    row = 1 + 2 * split.to(tl.int64)[:, None]
    mask = (split < splits)[:, None] & exists[None, :]
    mean = tl.load(partials + row * planes + plane[None, :], mask=mask, other=0)
    m2 = tl.load(partials + (row + 1) * planes + plane[None, :], mask=mask, other=0)
    n = tl.minimum(tl.maximum(HW - split * run, 0), run).to(tl.float32)[:, None]
    total = tl.sum(mean * n, 0) / HW
    deviation = mean - total[None, :]
    shift = tl.load(partials + plane, mask=exists, other=0)
    return shift + total, tl.sum(m2 + n * deviation * deviation, 0)


# --- Statistics ---------------------------------------------------------------------------------


@triton.jit
def instance_stats_fwd_kernel(
    x,  # [B, C, HW] by strides
    mean,  # [planes], or with SPLIT the partials [1 + 2 splits, planes]: shift, (mean, m2)...
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
    SPLIT: tl.constexpr,
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
    if SPLIT:
        if split == 0:
            tl.store(mean + plane, shift, mask=exists)
        row = 1 + 2 * split.to(tl.int64)
        tl.store(mean + row * planes + plane, m, mask=exists)
        tl.store(mean + (row + 1) * planes + plane, m2, mask=exists)
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
    m, m2 = _merged_moments(partials, plane, exists, planes, HW, run, splits, SPLITS)
    tl.store(mean + plane, m, mask=exists)
    tl.store(std + plane, tl.sqrt(m2 / dof + eps), mask=exists)


@triton.jit
def instance_stats_bwd_kernel(
    x,  # [B, C, HW] by strides
    grad_x,  # the same, dense
    grad_mean,  # [planes] or None
    grad_std,  # [planes] or None
    mean,  # [planes]
    std,  # [planes]
    planes,
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
        grad += (tl.load(grad_mean + plane, mask=exists, other=0) / HW)[:, None]
    if grad_std is not None:
        offsets = _tile(_strided(b, c, stride_b, stride_c), p, stride_p)
        deviation = tl.load(x + offsets, mask=mask, other=0).to(tl.float32)
        deviation -= tl.load(mean + plane, mask=exists, other=0)[:, None]
        slope = tl.load(grad_std + plane, mask=exists, other=0)
        slope /= tl.load(std + plane, mask=exists, other=1) * dof
        grad += slope[:, None] * deviation
    begin, stride = _dense(plane, b, c, C, HW, CHANNELS_LAST)
    tl.store(grad_x + _tile(begin, p, stride), grad.to(grad_x.dtype.element_ty), mask=mask)


# --- Launchers ----------------------------------------------------------------------------------

# Elements of a tile by kind of kernel, for four warps. 16 per thread keep the registers of
# Welford's two accumulators low enough for several programs per multiprocessor.
STATS_TILE = 2048
APPLY_TILE = 4096
MAX_SPLITS = 64
# Positions times planes below which a program is not split further: a launch costs more.
MIN_RUN = 8192


class Tiling(NamedTuple):
    """How a kernel covers [B, C, HW]."""

    block_c: int
    block_p: int
    blocks: int  # programs that cover all planes
    run: int  # positions per program
    splits: int  # programs that cover all positions


def tile_shape(
    channels_last: bool, planes: int, C: int, HW: int, itemsize: int, tile: int
) -> tuple[int, int]:
    """Planes and positions of a tile: whole 128-byte lines of the contiguous axis."""
    if channels_last:
        block_c = min(128 // itemsize, next_power_of_2(C))
        return block_c, min(tile // block_c, next_power_of_2(HW))
    block_p = min(tile, next_power_of_2(HW))
    return min(tile // block_p, next_power_of_2(planes)), block_p


@functools.lru_cache(maxsize=4096)
def stats_tiling(
    channels_last: bool, B: int, C: int, HW: int, itemsize: int, processors: int
) -> Tiling:
    block_c, block_p = tile_shape(channels_last, B * C, C, HW, itemsize, STATS_TILE)
    blocks = B * cdiv(C, block_c) if channels_last else cdiv(B * C, block_c)
    splits = 1
    if blocks < processors:
        splits = min(cdiv(2 * processors, blocks), cdiv(HW * block_c, MIN_RUN), MAX_SPLITS)
    run = cdiv(cdiv(HW, splits), block_p) * block_p
    return Tiling(block_c, block_p, blocks, run, cdiv(HW, run))


def instance_stats_fwd(x: Tensor, mean: Tensor, std: Tensor, eps: float, correction: int) -> None:
    """x: [B, C, ...] -> mean, std: [B, C] fp32."""
    B, C = mean.shape
    if mean.numel() == 0:
        return
    x, strides = readable(x)
    HW, planes = x.shape[2:].numel(), B * C
    tiling = stats_tiling(
        strides.channels_last, B, C, HW, x.element_size(), multiprocessors(x.device)
    )
    split = tiling.splits > 1
    out = mean.new_empty(1 + 2 * tiling.splits, planes) if split else mean
    with on_device_of(x):
        instance_stats_fwd_kernel[(tiling.blocks * tiling.splits,)](
            x, out, std, planes, C, HW, tiling.run, tiling.splits,
            strides.batch, strides.channel, strides.position, eps, float(HW - correction),
            SPLIT=split, ONE_TILE=tiling.run == tiling.block_p, CHANNELS_LAST=strides.channels_last,
            BLOCK_C=tiling.block_c, BLOCK_P=tiling.block_p, num_warps=4,
        )  # fmt: skip
        if split:
            instance_stats_merge_kernel[(cdiv(planes, 32),)](
                out, mean, std, planes, HW, tiling.run, tiling.splits, eps, float(HW - correction),
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
    """grad_x: like x, dense; the others as in the forward, contiguous."""
    B, C = mean.shape
    if grad_x.numel() == 0:
        return
    x, strides = readable(x)
    out = writable(grad_x, strides.channels_last)
    HW, planes = x.shape[2:].numel(), B * C
    block_c, block_p = tile_shape(
        strides.channels_last, planes, C, HW, x.element_size(), APPLY_TILE
    )
    blocks = B * cdiv(C, block_c) if strides.channels_last else cdiv(planes, block_c)
    chunks = cdiv(HW, block_p)
    with on_device_of(x):
        instance_stats_bwd_kernel[(blocks * chunks,)](
            x, out, grad_mean, grad_std, mean, std, planes, C, HW, chunks,
            strides.batch, strides.channel, strides.position, float(HW - correction),
            CHANNELS_LAST=strides.channels_last, BLOCK_C=block_c, BLOCK_P=block_p, num_warps=4,
        )  # fmt: skip
    if out is not grad_x:
        grad_x.copy_(out)
