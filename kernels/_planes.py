"""Device functions over image planes: where they lie and what a tile of them covers.

A plane is one channel of one image. Every kernel works on tiles [BLOCK_C planes, BLOCK_P
positions] and takes a stride per axis, so that one source serves NCHW, where positions are
contiguous and a tile holds few planes, and channels_last, where channels are and it holds many.
"""

import triton
import triton.language as tl


@triton.jit
def plane_block(block, planes, C, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
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
def begin_strided(b, c, stride_b, stride_c):
    """Where planes begin in a tensor given by strides."""
    return b.to(tl.int64) * stride_b + c.to(tl.int64) * stride_c


@triton.jit
def begin_dense(plane, b, c, C, HW, CHANNELS_LAST: tl.constexpr):
    """Where planes begin in a dense tensor of this memory format, and its positions' stride."""
    if CHANNELS_LAST:
        return b.to(tl.int64) * HW * C + c, C
    else:
        return plane.to(tl.int64) * HW, 1


@triton.jit
def tile(begin, p, stride_p):
    """Offsets of a tile: planes [BLOCK_C] by positions [BLOCK_P]."""
    return begin[:, None] + p.to(tl.int64)[None, :] * stride_p


@triton.jit
def per_plane(values, b, c, exists, stride, default: tl.constexpr):
    """[C] (stride 0) or [B, C] (stride C) -> [BLOCK_C]; the default where there are none."""
    if values is None:
        return tl.full(exists.shape, default, tl.float32)
    else:
        return tl.load(values + b * stride + c, mask=exists, other=0).to(tl.float32)
