"""Reflection padding: alone, and the device functions by which other kernels do it in passing."""

import triton
import triton.language as tl
from torch import Tensor

from fastgan.kernels._common import dense, is_dense, on_device_of, readable, walk, writable
from fastgan.kernels._planes import begin_dense, begin_strided, plane_block, tile
from fastgan.kernels._tiling import MapTiling, map_tiling_of, wide

# --- Within other kernels -----------------------------------------------------------------------


@triton.jit
def padded_positions(HW, W, PAD: tl.constexpr):
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
def source_positions(q, HW, W, PAD: tl.constexpr):
    """The position of x that position q of the padded image shows."""
    if PAD == 0:
        return q
    else:
        padded = W + 2 * PAD
        return _reflected(q // padded - PAD, HW // W) * W + _reflected(q % padded - PAD, W)


@triton.jit
def folded_gradient(grad, begin, p, mask, HW, W, stride, PAD: tl.constexpr):
    """The gradient of position p: that of every position of the padded image that shows it.

    A row or column has at most one mirror image: the launcher sees to H, W > 2 PAD + 1.
    """
    if PAD == 0:
        return tl.load(grad + tile(begin, p, stride), mask=mask, other=0).to(tl.float32)
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
        total = tl.load(grad + tile(begin, row + column, stride), mask=mask, other=0)
        total = total.to(tl.float32)
        in_row = mask & column_mirrored[None, :]
        in_column = mask & row_mirrored[None, :]
        total += tl.load(grad + tile(begin, row + mirror_column, stride), mask=in_row, other=0)
        total += tl.load(grad + tile(begin, mirror_row + column, stride), mask=in_column, other=0)
        return total + tl.load(
            grad + tile(begin, mirror_row + mirror_column, stride),
            mask=in_row & in_column,
            other=0,
        )


# --- Alone --------------------------------------------------------------------------------------


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
    plane, b, c, exists = plane_block(block, planes, C, CHANNELS_LAST, BLOCK_C)
    mask = exists[:, None] & (q < padded_HW)[None, :]
    p = _reflected(q // padded_W - top, H) * W + _reflected(q % padded_W - left, W)
    value = tl.load(x + tile(begin_strided(b, c, stride_b, stride_c), p, stride_p), mask=mask)
    begin, stride = begin_dense(plane, b, c, C, padded_HW, CHANNELS_LAST)
    tl.store(y + tile(begin, q, stride), value, mask=mask)


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
    plane, b, c, exists = plane_block(block, planes, C, CHANNELS_LAST, BLOCK_C)
    mask = exists[:, None] & (p < H * W)[None, :]
    begin, stride = begin_dense(plane, b, c, C, padded_HW, CHANNELS_LAST)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for i in tl.static_range(3):
        row, in_row = _shown(p // W, H, top, bottom, i)
        for j in tl.static_range(3):
            column, in_column = _shown(p % W, W, left, right, j)
            q = row * padded_W + column
            shown = mask & (in_row & in_column)[None, :]
            total += tl.load(grad + tile(begin, q, stride), mask=shown, other=0).to(tl.float32)
    begin, stride = begin_dense(plane, b, c, C, H * W, CHANNELS_LAST)
    tl.store(grad_x + tile(begin, p, stride), total.to(grad_x.dtype.element_ty), mask=mask)


# --- Launchers ----------------------------------------------------------------------------------


def reflection_pad2d_fwd(x: Tensor, y: Tensor, padding: tuple[int, int, int, int]) -> None:
    """x: [B, C, H, W] -> y, larger by padding: left, right, top, bottom."""
    if y.numel() == 0:
        return
    x, strides = readable(x)
    out = writable(y, strides.channels_last)
    (B, C, H, W), left, top = x.shape, padding[0], padding[2]
    tiling = _tiling(x, out, strides.channels_last)
    with on_device_of(x):
        reflection_pad2d_fwd_kernel[(tiling.blocks * tiling.chunks,)](
            x, out, B * C, C, H, W, y.shape[3], y.shape[2:].numel(), left, top, tiling.chunks,
            *strides[1:], CHANNELS_LAST=strides.channels_last, BLOCK_C=tiling.block_c,
            BLOCK_P=tiling.block_p, num_warps=tiling.num_warps, maxnreg=tiling.maxnreg,
        )  # fmt: skip
    if out is not y:
        y.copy_(out)


def _tiling(x: Tensor, out: Tensor, channels_last: bool) -> MapTiling:
    """Of a kernel that gathers out from x: rows of NCHW at any offset, so never wide."""
    strides = walk(x)
    return map_tiling_of(
        out, channels_last, channels_last and strides is not None and wide(x, strides)
    )


def reflection_pad2d_bwd(grad: Tensor, grad_x: Tensor, padding: tuple[int, int, int, int]) -> None:
    """grad: like y of the forward -> grad_x, the sum over what shows each position."""
    if grad_x.numel() == 0:
        return
    channels_last = not is_dense(grad_x, False)
    grad, out = dense(grad, channels_last), writable(grad_x, channels_last)
    (B, C, H, W) = out.shape
    tiling = _tiling(grad, out, channels_last)
    with on_device_of(grad):
        reflection_pad2d_bwd_kernel[(tiling.blocks * tiling.chunks,)](
            grad, out, B * C, C, H, W, grad.shape[3], grad.shape[2:].numel(), *padding,
            tiling.chunks, CHANNELS_LAST=channels_last, BLOCK_C=tiling.block_c,
            BLOCK_P=tiling.block_p, num_warps=tiling.num_warps, maxnreg=tiling.maxnreg,
        )  # fmt: skip
    if out is not grad_x:
        grad_x.copy_(out)
