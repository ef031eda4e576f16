"""Gram matrices, the style loss over them, and their gradient.

Every kernel serves all layers of a loss in one launch: layers arrive as tuples, each has its own
run of programs and, because its sizes are constants, its own code. A Gram matrix takes two
launches: the first multiplies tiles of the lower triangle over a share of the positions each
(split K), the second adds up the shares in a fixed order. So does the gradient: the first
symmetrises the gradient of the Gram matrix, the second multiplies it with the features.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from fastgan.kernels._common import (
    Walk,
    cdiv,
    multiprocessors,
    next_power_of_2,
    on_device_of,
    readable,
    walk,
)

PROGRAMS_PER_SM = 2  # that keep memory busy; of those of 128 channels, one does
MIN_RUN = 8  # blocks of features per program, so that its pipeline fills
MAX_SPLITS = 128  # shares that the second launch adds up
SYMMETRIZED_ROWS = 16  # per program of the backward's first launch

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


# --- Device functions ---------------------------------------------------------------------------


@triton.constexpr_function
def _tiles(C, BLOCK):
    """Tiles of the lower triangle of a [C, C] matrix."""
    rows = -(-C // BLOCK)
    return rows * (rows + 1) // 2


@triton.jit
def _triangle(t):
    """Row and column of the t-th tile of a lower triangle, in row order."""
    row = ((tl.sqrt_rn(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)  # exact: 8t + 1 < 2^24
    return row, t - row * (row + 1) // 2


@triton.jit
def _multiple(n, ALIGN: tl.constexpr):
    """n, of which the compiler now knows that it is a multiple of ALIGN."""
    return n // ALIGN * ALIGN


@triton.jit
def _axes(P, stride, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Positions and the strides of both axes, with what is known of their divisors."""
    stride = _multiple(stride, ALIGN)
    if CHANNELS_LAST:
        return P, 1, stride
    else:
        return _multiple(P, ALIGN), stride, 1


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED and a.dtype == tl.bfloat16:  # whose product is garbage in the interpreter
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.constexpr_function
def _reads_shared_memory(BLOCK_C):
    """Whether the tensor cores take both factors from shared memory, as those of sm_90 do."""
    return cuda_capability_geq(9) and not cuda_capability_geq(12) and BLOCK_C >= 64


# There TF32 has to lie with the summed axis contiguous. Copied straight into that order, global
# memory is read 4 bytes at a time where another axis is contiguous in it; by way of registers it is
# 16, and the numbers are rounded there, which the tensor cores would truncate.
@triton.jit
def _round_to_tf32(x):
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _store_block(
    gram,  # [rows, columns] of the lower triangle
    i,  # [rows, 1]
    j,  # [1, columns]
    out,  # [C, C]
    target,  # [C, C] or None
    C: tl.constexpr,
):
    """Stores a block and its mirror image, entry by entry, less the target; returns |out|^2."""
    in_lower = (j <= i) & (i < C)
    in_upper = (j < i) & (i < C)
    below = gram
    loss = 0.0
    if target is not None:
        below -= tl.load(target + i * C + j, mask=in_lower, other=0).to(tl.float32)
        loss += tl.sum(tl.where(in_lower, below * below, 0.0))
    tl.store(out + i * C + j, below, mask=in_lower)
    above = gram
    if target is not None:
        above -= tl.load(target + j * C + i, mask=in_upper, other=0).to(tl.float32)
        loss += tl.sum(tl.where(in_upper, above * above, 0.0))
    tl.store(out + j * C + i, above, mask=in_upper)
    return loss


@triton.jit
def _partial_tile(
    x,  # [B, C, P] by strides
    out,  # [B, splits, TILES, BLOCK_C, BLOCK_C], or [B, C, C] if WHOLE
    program,
    splits,
    P,
    stride_b,
    stride,  # of the axis that is not contiguous
    scale,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of F F^T over one share of the positions, or the WHOLE sum in its place."""
    TILES: tl.constexpr = _tiles(C, BLOCK_C)
    # One tile in shared memory serves as both factors; channels_last is pipelined that way only
    # where the tensor cores read both from there.
    READS_SHARED: tl.constexpr = _reads_shared_memory(BLOCK_C)
    SHARED: tl.constexpr = TILES == 1 and (READS_SHARED or not CHANNELS_LAST)
    TF32: tl.constexpr = x.dtype.element_ty == tl.float32 and PRECISION == "tf32"
    ROUND: tl.constexpr = TF32 and READS_SHARED and CHANNELS_LAST
    P, stride_c, stride_p = _axes(P, stride, CHANNELS_LAST, ALIGN)
    row, column = _triangle(program % TILES)
    split = program // TILES % splits
    b = (program // (TILES * splits)).to(tl.int64)
    run = tl.cdiv(tl.cdiv(P, BLOCK_P), splits) * BLOCK_P
    first = split * run
    x += b * _multiple(stride_b, ALIGN) + first.to(tl.int64) * stride_p
    p = tl.arange(0, BLOCK_P)
    i = row * BLOCK_C + tl.arange(0, BLOCK_C)
    j = column * BLOCK_C + tl.arange(0, BLOCK_C)
    lhs_pointers = x + i.to(tl.int64)[:, None] * stride_c + p.to(tl.int64)[None, :] * stride_p
    rhs_pointers = x + j.to(tl.int64)[None, :] * stride_c + p.to(tl.int64)[:, None] * stride_p
    acc = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for begin in range(first, tl.minimum(first + run, P), BLOCK_P):
        in_image = begin + p < P
        lhs = tl.load(lhs_pointers, mask=(i < C)[:, None] & in_image[None, :], other=0)
        if ROUND:
            lhs = _round_to_tf32(lhs)
        if SHARED:
            rhs = lhs.T
        else:
            rhs = tl.load(rhs_pointers, mask=(j < C)[None, :] & in_image[:, None], other=0)
            if ROUND:
                rhs = _round_to_tf32(rhs)
        acc = _dot(lhs, rhs, acc, PRECISION)
        lhs_pointers += BLOCK_P * stride_p
        rhs_pointers += BLOCK_P * stride_p
    if WHOLE:
        _store_block(acc * scale, i[:, None], j[None, :], out + b * (C * C), None, C)
    else:
        entry = tl.arange(0, BLOCK_C)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        tl.store(out + program.to(tl.int64) * (BLOCK_C * BLOCK_C) + entry, acc)


@triton.jit
def _finish_block(
    partials,  # [B, splits, TILES, BLOCK_C, BLOCK_C]
    out,  # [B, C, C]: Gram matrices, or with a target their differences from it
    target,  # [B or 1, C, C] or None
    program,
    splits,
    target_stride,
    scale,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Adds up a block of the lower triangle, scales and mirrors it; returns |difference|^2."""
    TILES: tl.constexpr = _tiles(C, BLOCK_C)
    BLOCKS: tl.constexpr = _tiles(C, BLOCK)
    PER_TILE: tl.constexpr = BLOCK_C // BLOCK
    SIZE: tl.constexpr = BLOCK_C * BLOCK_C
    row, column = _triangle(program % BLOCKS)
    b = (program // BLOCKS).to(tl.int64)
    tile = (row // PER_TILE) * (row // PER_TILE + 1) // 2 + column // PER_TILE
    r = tl.arange(0, BLOCK)
    entry = (row % PER_TILE * BLOCK + r)[:, None] * BLOCK_C
    entry += (column % PER_TILE * BLOCK + r)[None, :]
    partials += b * splits * (TILES * SIZE) + tile * SIZE
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for begin in range(0, splits, CHUNK):
        split = begin + tl.arange(0, CHUNK)
        pointers = partials + (split * (TILES * SIZE))[:, None, None] + entry[None, :, :]
        acc += tl.sum(tl.load(pointers, mask=(split < splits)[:, None, None], other=0), 0)
    i = (row * BLOCK + r)[:, None]
    j = (column * BLOCK + r)[None, :]
    target_of_image = None if target is None else target + b * target_stride
    return _store_block(acc * scale, i, j, out + b * (C * C), target_of_image, C)


@triton.jit
def _symmetrize_rows(
    grad,  # [B, C, C]
    factor,  # [B, PADDED, PADDED]
    row_scales,  # [B, PADDED]
    program,
    coefficient,
    C: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """row_scales * factor = coefficient * (grad + grad^T), entries of factor at most 1.

    The first BLOCK columns stay in registers between the search for the peak and the division.
    """
    rows = program % (PADDED // ROWS) * ROWS + tl.arange(0, ROWS)
    b = (program // (PADDED // ROWS)).to(tl.int64)
    grad += b * (C * C)
    factor += b * (PADDED * PADDED)
    i = rows[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    first = _plus_transposed(grad, i, j, C)
    peak = tl.max(tl.abs(first), 1)
    for begin in range(BLOCK, C, BLOCK):
        peak = tl.maximum(peak, tl.max(tl.abs(_plus_transposed(grad, i, begin + j, C)), 1))
    peak = tl.where(peak > 0, peak, 1.0)
    tl.store(row_scales + b * PADDED + rows, peak * coefficient)
    factor += i * PADDED
    tl.store(factor + j, (first / peak[:, None]).to(factor.dtype.element_ty), mask=j < PADDED)
    for begin in range(BLOCK, PADDED, BLOCK):
        total = _plus_transposed(grad, i, begin + j, C) / peak[:, None]
        total = total.to(factor.dtype.element_ty)
        tl.store(factor + begin + j, total, mask=begin + j < PADDED)


@triton.jit
def _plus_transposed(matrix, i, j, C: tl.constexpr):
    mask = (i < C) & (j < C)
    return tl.load(matrix + i * C + j, mask=mask, other=0) + tl.load(
        matrix + j * C + i, mask=mask, other=0
    )


@triton.jit
def _bwd_tile(
    x,  # [B, C, P] by strides
    grad_x,  # [B, C, P] by strides
    factor,  # [B, PADDED, PADDED]
    row_scales,  # [B, PADDED]
    program,
    P,
    stride_b,
    stride,  # of the axis that is not contiguous
    grad_stride_b,
    grad_stride,
    C: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of row_scales * (factor F)."""
    ROWS: tl.constexpr = PADDED // BLOCK_C
    TF32: tl.constexpr = x.dtype.element_ty == tl.float32 and PRECISION == "tf32"
    ROUND: tl.constexpr = TF32 and _reads_shared_memory(BLOCK_C) and not CHANNELS_LAST
    blocks = tl.cdiv(P, BLOCK_P)
    _, grad_stride_c, grad_stride_p = _axes(P, grad_stride, GRAD_CHANNELS_LAST, ALIGN)
    P, stride_c, stride_p = _axes(P, stride, CHANNELS_LAST, ALIGN)
    i = program % ROWS * BLOCK_C + tl.arange(0, BLOCK_C)
    p = program // ROWS % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (program // (ROWS * blocks)).to(tl.int64)
    factor += b * (PADDED * PADDED)
    x += b * _multiple(stride_b, ALIGN)
    grad_x += b * _multiple(grad_stride_b, ALIGN)
    acc = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for begin in range(0, C, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        lhs = tl.load(factor + i[:, None] * PADDED + k[None, :])
        pointers = x + k.to(tl.int64)[:, None] * stride_c + p.to(tl.int64)[None, :] * stride_p
        rhs = tl.load(pointers, mask=(k < C)[:, None] & (p < P)[None, :], other=0)
        if ROUND:
            rhs = _round_to_tf32(rhs)
        acc = _dot(lhs, rhs, acc, PRECISION)
    acc *= tl.load(row_scales + b * PADDED + i)[:, None]
    pointers = i.to(tl.int64)[:, None] * grad_stride_c + p.to(tl.int64)[None, :] * grad_stride_p
    mask = (i < C)[:, None] & (p < P)[None, :]
    tl.store(grad_x + pointers, acc.to(grad_x.dtype.element_ty), mask=mask)


# --- Kernels ------------------------------------------------------------------------------------
# Tuples have one entry per layer. Triton specialises the numbers in them like any others, as ones
# (which arrive as constants, without methods), multiples of 16 or neither.


@triton.jit
def gram_partial_kernel(
    features,  # [B, C, P] by strides
    out,  # [B, splits, tiles, BLOCK_C, BLOCK_C], layer after layer; [B, C, C] if WHOLE
    batches,
    splits,
    positions,
    batch_strides,
    strides,
    scales,  # for WHOLE sums
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    program = tl.program_id(0)
    for layer in tl.static_range(len(features)):
        programs = batches[layer] * splits[layer] * _tiles(C[layer], BLOCK_C[layer])
        if (program >= 0) & (program < programs):
            _partial_tile(
                features[layer],
                out,
                program,
                splits[layer],
                positions[layer],
                batch_strides[layer],
                strides[layer],
                scales[layer],
                C[layer],
                BLOCK_C[layer],
                BLOCK_P[layer],
                CHANNELS_LAST[layer],
                ALIGN[layer],
                PRECISION,
                WHOLE,
            )
        program -= programs
        out += tl.cast(programs, tl.int64) * (BLOCK_C[layer] * BLOCK_C[layer])


@triton.jit
def gram_finish_kernel(
    partials,  # [B, splits, tiles, BLOCK_C, BLOCK_C], layer after layer
    out,  # [B, C, C], layer after layer: Gram matrices, or their differences from targets
    targets,  # [B or 1, C, C]
    losses,  # [programs], or None: no targets
    batches,
    splits,
    target_strides,
    scales,
    weights,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    for layer in tl.static_range(len(batches)):
        programs = batches[layer] * _tiles(C[layer], BLOCK[layer])
        if (program >= 0) & (program < programs):
            loss = _finish_block(
                partials,
                out,
                targets[layer],
                program,
                splits[layer],
                target_strides[layer],
                scales[layer],
                C[layer],
                BLOCK_C[layer],
                BLOCK[layer],
                CHUNK[layer],
            )
            if losses is not None:
                tl.store(losses + tl.program_id(0), weights[layer] * loss)
        program -= programs
        b = tl.cast(batches[layer], tl.int64)
        tiles = b * splits[layer] * _tiles(C[layer], BLOCK_C[layer])
        partials += tiles * (BLOCK_C[layer] * BLOCK_C[layer])
        out += b * (C[layer] * C[layer])


@triton.jit
def gram_symmetrize_kernel(
    upstream,  # [] or None
    grads,  # [B, C, C], layer after layer
    factors,  # [B, PADDED, PADDED], layer after layer
    row_scales,  # [B, PADDED], layer after layer
    batches,
    coefficients,
    C: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    for layer in tl.static_range(len(batches)):
        programs = batches[layer] * (PADDED[layer] // ROWS)
        if (program >= 0) & (program < programs):
            coefficient = coefficients[layer]
            if upstream is not None:
                coefficient *= tl.load(upstream)
            _symmetrize_rows(
                grads,
                factors,
                row_scales,
                program,
                coefficient,
                C[layer],
                PADDED[layer],
                ROWS,
                BLOCK[layer],
            )
        program -= programs
        b = tl.cast(batches[layer], tl.int64)
        grads += b * (C[layer] * C[layer])
        factors += b * (PADDED[layer] * PADDED[layer])
        row_scales += b * PADDED[layer]


@triton.jit
def gram_bwd_kernel(
    features,  # [B, C, P] by strides
    grads,  # [B, C, P] by strides
    factors,  # [B, PADDED, PADDED], layer after layer
    row_scales,  # [B, PADDED], layer after layer
    batches,
    positions,
    batch_strides,
    strides,
    grad_batch_strides,
    grad_strides,
    C: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    for layer in tl.static_range(len(features)):
        blocks = tl.cdiv(positions[layer], BLOCK_P[layer])
        programs = batches[layer] * (PADDED[layer] // BLOCK_C[layer]) * blocks
        if (program >= 0) & (program < programs):
            _bwd_tile(
                features[layer],
                grads[layer],
                factors,
                row_scales,
                program,
                positions[layer],
                batch_strides[layer],
                strides[layer],
                grad_batch_strides[layer],
                grad_strides[layer],
                C[layer],
                PADDED[layer],
                BLOCK_C[layer],
                BLOCK_P[layer],
                BLOCK_K[layer],
                CHANNELS_LAST[layer],
                GRAD_CHANNELS_LAST[layer],
                ALIGN[layer],
                PRECISION,
            )
        program -= programs
        b = tl.cast(batches[layer], tl.int64)
        factors += b * (PADDED[layer] * PADDED[layer])
        row_scales += b * PADDED[layer]


# --- How layers are cut -------------------------------------------------------------------------


class View(NamedTuple):
    """A feature map [B, C, P] as the kernels see it."""

    batch: int
    channels: int
    positions: int
    channels_last: bool
    batch_stride: int
    stride: int  # of the axis that is not contiguous
    align: int  # elements per 16-byte access, or as many as addresses and strides allow


class Tiling(NamedTuple):
    """How the kernels cut it."""

    block_c: int
    block_p: int  # per step of the forward
    padded: int  # channels in whole tiles
    symmetrize_block: int
    bwd_block_p: int
    bwd_block_k: int


class Plan(NamedTuple):
    """The launches of one call."""

    views: Any  # a View and a Tiling of tuples, which have one entry per layer
    tiling: Any
    splits: tuple[int, ...]
    finish_blocks: tuple[int, ...]
    finish_chunks: tuple[int, ...]  # shares added up at a time
    precision: str  # of products of fp32 numbers
    partial_programs: int
    finish_programs: int
    bwd_programs: int
    partials: int  # elements
    factors: int
    row_scales: int
    options: dict[str, int]  # of the first launch of the forward
    bwd_options: dict[str, int]  # of the second launch of the backward


def view(x: Tensor, strides: Walk) -> View:
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
    stride = strides.position if strides.channels_last else strides.channel
    run = 0 if strides.channels_last else positions  # channels are constants
    align = 1 if x.data_ptr() % 16 else 16 // x.element_size()
    while any(n % align for n in (run, stride, strides.batch)):
        align //= 2
    return View(batch, channels, positions, strides.channels_last, strides.batch, stride, align)


def tiling(channels: int, itemsize: int, align: int, precision: str) -> Tiling:
    """Tiles of about 16 KB per operand; fewer positions where registers would run out.

    Narrow copies take more registers: each has an address of its own.
    """
    thirds = precision == "tf32x3"
    block_c = min(64 if thirds else 128, max(16, next_power_of_2(channels)))
    small = block_c <= 64
    block_p = 32 if thirds else (256 if small else 128) // itemsize
    bwd_block_p = 64 if thirds else (512 if small else 256) // itemsize
    bwd_block_k = min(block_c, 128 // itemsize)
    if align * itemsize < 16:
        block_p //= 2
        bwd_block_p //= 2
    if align * itemsize < 4:  # too narrow for asynchronous copies
        block_p = 32
        bwd_block_p = 64 if small else 32
        bwd_block_k = min(block_c, 32)
    padded = cdiv(channels, block_c) * block_c
    return Tiling(
        block_c=block_c,
        block_p=block_p,
        padded=padded,
        symmetrize_block=min(next_power_of_2(padded), 512),
        bwd_block_p=bwd_block_p,
        bwd_block_k=bwd_block_k,
    )


def splits(
    steps: Sequence[int],
    reads: Sequence[int],
    tiles: Sequence[int],
    partial: int,
    sms: int,
    at_once: int = 1,
) -> tuple[int, ...]:
    """Shares of each layer's positions that leave the busiest multiprocessor least to move.

    ``tiles`` of the result take ``steps`` each, and a step ``reads`` one or two blocks of features;
    ``partial`` is what a program's sum takes to be stored and read again, in such blocks. Fewer
    programs than ``at_once`` take a multiprocessor as long.
    """
    layers = list(zip(steps, reads, tiles, strict=True))

    def shares(run: int) -> tuple[int, ...]:
        return tuple(max(cdiv(n, max(run // r, 1)), 1) for n, r, _ in layers)

    def busiest(run: int) -> int:
        programs = sum(n * t for n, t in zip(shares(run), tiles, strict=True))
        return max(cdiv(programs, sms), at_once) * (1 + run + partial)  # 1 to start

    least = max(MIN_RUN, *(cdiv(n, MAX_SPLITS) * r for n, r, _ in layers))
    runs = {max(least, cdiv(n, s) * r) for n, r, _ in layers for s in range(1, MAX_SPLITS + 1)}
    return shares(min(sorted(runs, reverse=True), key=busiest))


@functools.lru_cache(maxsize=1024)
def plan(views: tuple[View, ...], itemsize: int, precision: str, sms: int) -> Plan:
    tilings = [tiling(x.channels, itemsize, x.align, precision) for x in views]
    layers = list(zip(views, tilings, strict=True))
    tiles = [x.batch * _triangular(t.padded // t.block_c) for x, t in layers]
    large = any(t.block_c == 128 for t in tilings)
    wide = all(x.align * itemsize == 16 for x in views)
    # Three products for one take the registers of eight warps.
    thirds = precision == "tf32x3" and any(t.block_c == 64 for t in tilings)
    options = {"num_warps": 8 if large or thirds else 4, "num_stages": 3 if large else 4}
    shares = splits(
        [cdiv(x.positions, t.block_p) for x, t in layers],
        [1 if t.padded == t.block_c else 2 for t in tilings],
        tiles,
        max(2 * 4 * t.block_c // (t.block_p * itemsize) for t in tilings),
        sms,
        1 if large else PROGRAMS_PER_SM,
    )
    programs = [n * share for n, share in zip(tiles, shares, strict=True)]
    # A program adds up 64 numbers of each thread at a time: all shares, if there are few.
    finish_blocks = tuple(
        min(t.block_c, 32 if n <= 8 else 16) for t, n in zip(tilings, shares, strict=True)
    )
    if not (large and wide and all(t.padded == x.channels for x, t in layers)):
        # ptxas puts values on the stack to run more programs at once. Shared memory limits that
        # for small tiles; large ones have no value to spare, save at ragged edges.
        options["maxnreg"] = 255
    # Nor have they where numbers are rounded in registers.
    bwd_options = options if itemsize == 2 else {**options, "maxnreg": 255}
    return Plan(
        views=View(*zip(*views, strict=True)),
        tiling=Tiling(*zip(*tilings, strict=True)),
        splits=shares,
        finish_blocks=finish_blocks,
        finish_chunks=tuple(8192 // n**2 for n in finish_blocks),
        precision=precision,
        partial_programs=sum(programs),
        finish_programs=sum(
            x.batch * _triangular(cdiv(x.channels, n))
            for x, n in zip(views, finish_blocks, strict=True)
        ),
        bwd_programs=sum(
            x.batch * (t.padded // t.block_c) * cdiv(x.positions, t.bwd_block_p) for x, t in layers
        ),
        partials=sum(n * t.block_c**2 for n, t in zip(programs, tilings, strict=True)),
        factors=sum(x.batch * t.padded**2 for x, t in layers),
        row_scales=sum(x.batch * t.padded for x, t in layers),
        options=options,
        bwd_options=bwd_options,
    )


def _triangular(rows: int) -> int:
    return rows * (rows + 1) // 2


def _planned(features: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Plan]:
    """The features as the kernels can read them, and what to launch."""
    tensors, walks = zip(*map(readable, features), strict=True)
    first = features[0]
    # As torch's own matrix products have it; three TF32 products keep 22 bits of 24.
    exact = first.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return tensors, plan(
        tuple(map(view, tensors, walks)),
        first.element_size(),
        "tf32x3" if exact else "tf32",
        multiprocessors(first.device),
    )


def _without_empty(*columns: Sequence[Any]) -> list[Any]:
    """The columns without the layers that have no images or no channels."""
    rows = [row for row in zip(*columns, strict=True) if row[0].shape[:2].numel()]
    return list(zip(*rows, strict=True))


# --- Launchers ----------------------------------------------------------------------------------


def gram_matrix_fwd(features: Tensor, scale: float, gram: Tensor) -> None:
    """gram = scale * F F^T. [B, C, ...] -> [B, C, C]"""
    _gram_fwd([features], [None], [scale], [0.0], gram)


def style_loss_fwd(
    features: Sequence[Tensor],  # [B, C, ...]
    targets: Sequence[Tensor],  # [B or 1, C, C], dense
    scales: Sequence[float],
    weights: Sequence[float],
    loss: Tensor,  # []
    differences: Tensor,  # [B, C, C], layer after layer
) -> None:
    """loss = sum of weights * |D|^2, where D = scales * F F^T - T are the differences."""
    losses = _gram_fwd(features, targets, scales, weights, differences)
    torch.sum(losses, 0, out=loss)


def _gram_fwd(
    features: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    scales: Sequence[float],
    weights: Sequence[float],
    out: Tensor,
) -> Tensor | None:
    """Fills out; returns the losses of all programs, if there are targets."""
    columns = _without_empty(features, targets, scales, weights)
    if not columns:
        return out.new_zeros(1)
    features, targets, scales, weights = columns
    features, p = _planned(features)
    losses = None if targets[0] is None else out.new_empty(p.finish_programs)
    # With targets, registers for the difference would cost the first launch half its programs;
    # with a large tile that channels do not fill, those for the masks would spill.
    fills = p.tiling.block_c[0] < 128 or p.tiling.padded[0] == p.views.channels[0]
    whole = losses is None and p.splits == (1,) and fills
    partials = out if whole else out.new_empty(p.partials)
    with on_device_of(out):
        gram_partial_kernel[(p.partial_programs,)](
            features,
            partials,
            p.views.batch,
            p.splits,
            p.views.positions,
            p.views.batch_stride,
            p.views.stride,
            scales,
            C=p.views.channels,
            BLOCK_C=p.tiling.block_c,
            BLOCK_P=p.tiling.block_p,
            CHANNELS_LAST=p.views.channels_last,
            ALIGN=p.views.align,
            PRECISION=p.precision,
            WHOLE=whole,
            **p.options,
        )
        if whole:
            return losses
        gram_finish_kernel[(p.finish_programs,)](
            partials,
            out,
            targets,
            losses,
            p.views.batch,
            p.splits,
            tuple(0 if t is None or len(t) == 1 else t.stride(0) for t in targets),
            scales,
            weights,
            C=p.views.channels,
            BLOCK_C=p.tiling.block_c,
            BLOCK=p.finish_blocks,
            CHUNK=p.finish_chunks,
            maxnreg=255,  # rather than what lets more programs run at once: there are few
        )
    return losses


def gram_bwd(
    features: Sequence[Tensor],  # [B, C, ...]
    upstream: Tensor | None,  # []
    grads: Tensor,  # [B, C, C], layer after layer
    coefficients: Sequence[float],
    grad_features: Sequence[Tensor],  # [B, C, ...]
) -> None:
    """grad_features = upstream * coefficients * (grads + grads^T) F"""
    columns = _without_empty(features, coefficients, grad_features)
    if not columns:
        return
    features, coefficients, grad_features = columns
    features, p = _planned(features)
    outs = tuple(map(_writable, grad_features))
    out_views: Any = View(*zip(*(view(x, walk(x)) for x in outs), strict=True))
    factors = features[0].new_empty(p.factors)
    row_scales = grads.new_empty(p.row_scales)
    with on_device_of(grads):
        gram_symmetrize_kernel[(p.row_scales // SYMMETRIZED_ROWS,)](
            upstream,
            grads,
            factors,
            row_scales,
            p.views.batch,
            coefficients,
            C=p.views.channels,
            PADDED=p.tiling.padded,
            ROWS=SYMMETRIZED_ROWS,
            BLOCK=p.tiling.symmetrize_block,
            maxnreg=255,  # as in the forward's last launch
        )
        gram_bwd_kernel[(p.bwd_programs,)](
            features,
            outs,
            factors,
            row_scales,
            p.views.batch,
            p.views.positions,
            p.views.batch_stride,
            p.views.stride,
            out_views.batch_stride,
            out_views.stride,
            C=p.views.channels,
            PADDED=p.tiling.padded,
            BLOCK_C=p.tiling.block_c,
            BLOCK_P=p.tiling.bwd_block_p,
            BLOCK_K=p.tiling.bwd_block_k,
            CHANNELS_LAST=p.views.channels_last,
            GRAD_CHANNELS_LAST=out_views.channels_last,
            ALIGN=tuple(min(pair) for pair in zip(p.views.align, out_views.align, strict=True)),
            PRECISION=p.precision,
            **p.bwd_options,
        )
    for grad, out in zip(grad_features, outs, strict=True):
        if out is not grad:
            grad.copy_(out)


def _writable(x: Tensor) -> Tensor:
    """The tensor, if the kernels can walk over it, else a buffer of its shape."""
    return x if walk(x) else torch.empty_like(x, memory_format=torch.contiguous_format)
