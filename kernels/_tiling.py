"""How programs cover planes: heuristic tables by memory format, size, dtype and device."""

import functools
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from fastgan.kernels._common import Walk, cdiv, multiprocessors, next_power_of_2

# A kernel that reduces a plane and then writes it comes by the reduction in one of three ways:
# RESIDENT holds the plane in registers, SWEEP passes over it twice, the second time backwards to
# meet what is still in cache, SPLIT merges what programs of an earlier launch found.
RESIDENT = tl.constexpr(0)
SWEEP = tl.constexpr(1)
SPLIT = tl.constexpr(2)

# Elements of a tile. A plane of up to RESIDENT_TILE stays in registers, small ones share a program
# of TILE. Kernels that loop over tiles of TILE keep accumulators for every element. Where accesses
# are not wide, each element takes an address of its own, and only half as many fit in registers.
# Tiles below SMALLEST_TILE would save nothing and be more code to compile.
TILE = 4096
RESIDENT_TILE = 16384
SMALLEST_TILE = 1024
# Loops over tiles read two ahead into shared memory, where accesses are wide, from capability 80.
STAGES = tl.constexpr(3)
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
    maxnreg: int | None  # registers of a thread; None: ptxas weighs them against programs
    blocks: int  # programs that cover all planes
    run: int  # positions that one program reduces
    splits: int  # programs that reduce one plane
    chunk: int  # positions that one program writes
    chunks: int  # programs that write one plane


def wide(x: Tensor, strides: Walk) -> bool:
    """Whether every plane or pixel begins at 16 bytes, as far as a kernel is told."""
    stride = strides.position if strides.channels_last else strides.channel
    return x.data_ptr() % 16 == 0 and stride % 16 == 0 and strides.batch % 16 == 0


def tile_shape(
    channels_last: bool, planes: int, C: int, positions: int, itemsize: int, tile: int
) -> tuple[int, int]:
    """Planes and positions of a tile: up to a 128-byte line of channels, or whole rows."""
    if channels_last:
        block_c = min(128 // itemsize, next_power_of_2(C))
        return block_c, _side(next_power_of_2(positions), block_c, tile)
    block_p = min(tile, next_power_of_2(positions))
    return _side(next_power_of_2(planes), block_p, tile), block_p


def _side(wanted: int, other: int, tile: int) -> int:
    """A side of a tile, brought within what the other side leaves of its bounds."""
    return max(min(wanted, tile // other), SMALLEST_TILE // other, 1)


def _parts(blocks: int, processors: int) -> int:
    """How many programs share a block of planes; a few more than fit at once would run alone."""
    return max(round(PROGRAMS * processors / blocks), 1)


def plane_blocks(channels_last: bool, B: int, C: int, block_c: int) -> int:
    return B * cdiv(C, block_c) if channels_last else cdiv(B * C, block_c)


def warps(tile: int, per_thread: int) -> int:
    """Warps that hold a tile, so many elements in each thread; four where it is small."""
    return min(max(tile // (32 * per_thread), 4), 16)


def registers(num_warps: int, many_addresses: bool) -> int | None:
    """All that a thread can have, where ptxas would spill a few to run more programs at once."""
    return min(65536 // (32 * num_warps), 255) if many_addresses else None


@functools.lru_cache(maxsize=4096)
def stats_tiling(
    channels_last: bool, B: int, C: int, HW: int, itemsize: int, wide: bool, processors: int
) -> Tiling:
    """One program per block of planes, or several where these would be few and large."""
    tile, per_thread = (TILE, 16) if wide else (TILE // 2, 8)
    block_c, block_p = tile_shape(channels_last, B * C, C, HW, itemsize, tile)
    blocks, work = plane_blocks(channels_last, B, C, block_c), HW * block_c
    splits = 1
    if blocks < PROGRAMS * processors and work > UNSPLIT_RUN:
        # Fewer channels at a time, down to a 32-byte sector, where MAX_SPLITS would leave
        # multiprocessors idle; what a program reads of other programs' results falls with them.
        while (
            channels_last
            and blocks * MAX_SPLITS < PROGRAMS * processors
            and work > MAX_SPLITS * MIN_RUN
            and block_c * itemsize > 32
        ):
            block_c, block_p = block_c // 2, 2 * block_p
            blocks, work = plane_blocks(channels_last, B, C, block_c), HW * block_c
        splits = min(_parts(blocks, processors), cdiv(work, MIN_RUN), MAX_SPLITS)
    run = cdiv(cdiv(HW, splits), block_p) * block_p
    splits = cdiv(HW, run)
    mode, num_warps = SPLIT if splits > 1 else SWEEP, warps(block_c * block_p, per_thread)
    maxnreg = registers(num_warps, not wide)
    return Tiling(
        mode.value, block_c, block_p, num_warps, maxnreg, blocks, run, splits, run, splits
    )


@functools.lru_cache(maxsize=4096)
def norm_tiling(
    channels_last: bool,
    B: int,
    C: int,
    reduced: int,
    written: int,
    itemsize: int,
    wide: bool,
    processors: int,
) -> Tiling:
    """For kernels that reduce and then write planes, whose sizes differ where they pad."""
    if reduced == written:  # a padded image is gathered, which registers cannot
        block_c, block_p = resident_shape(channels_last, B * C, C, reduced, itemsize)
        resident = block_c * block_p
        if resident <= (RESIDENT_TILE if wide else RESIDENT_TILE // 2):
            blocks = plane_blocks(channels_last, B, C, block_c)
            # Those of many channels beside the tile itself, or one for each element.
            addresses = not wide or (channels_last and resident > TILE)
            if not wide:  # of 16 warps a thread can have but 128 registers
                per_thread = 8 if resident < TILE else 16
            elif block_c > 1 and resident <= TILE:  # each plane takes an address, too
                per_thread = 16
            else:
                per_thread = 32
            num_warps = warps(resident, per_thread)
            maxnreg = registers(num_warps, addresses)
            return Tiling(
                RESIDENT.value, block_c, block_p, num_warps, maxnreg, blocks, block_p, 1, block_p, 1
            )
    elif not channels_last:  # whose rows are read at an offset
        wide = False
    tiling = stats_tiling(channels_last, B, C, reduced, itemsize, wide, processors)
    block_c, block_p, blocks = tiling.block_c, tiling.block_p, tiling.blocks
    enough = processors if reduced <= RESIDENT_TILE else 2 * processors
    if blocks >= enough or tiling.splits == 1:
        run, chunk = (cdiv(n, block_p) * block_p for n in (reduced, written))
        # Twice as much of fp32, as ptxas spills in sixteen warps of it.
        num_warps = warps(block_c * block_p, 16 if wide and itemsize == 4 else 8)
        maxnreg = registers(num_warps, not wide)
        return Tiling(SWEEP.value, block_c, block_p, num_warps, maxnreg, blocks, run, 1, chunk, 1)
    chunks = min(_parts(blocks, processors), cdiv(written, block_p))
    chunk = cdiv(cdiv(written, chunks), block_p) * block_p
    return tiling._replace(chunk=chunk, chunks=cdiv(written, chunk))


def resident_shape(
    channels_last: bool, planes: int, C: int, positions: int, itemsize: int
) -> tuple[int, int]:
    """A tile of whole planes: rows, or channels in channels_last, at least a 32-byte sector."""
    block_p = next_power_of_2(positions)
    if not channels_last:
        return _side(next_power_of_2(planes), block_p, TILE), block_p
    block_c = 128 // itemsize
    while block_c * block_p > RESIDENT_TILE // 2 and block_c * itemsize > 32:
        block_c //= 2
    block_c = min(block_c, next_power_of_2(C))
    return block_c, max(block_p, SMALLEST_TILE // block_c)


def stats_tiling_of(x: Tensor, strides: Walk) -> Tiling:
    """Of a kernel that reduces planes of x."""
    (B, C), HW, processors = x.shape[:2], x.shape[2:].numel(), multiprocessors(x.device)
    return stats_tiling(
        strides.channels_last, B, C, HW, x.element_size(), wide(x, strides), processors
    )


def norm_tiling_of(x: Tensor, strides: Walk, reduced: Tensor, written: Tensor) -> Tiling:
    """Of a kernel that reads x so, reduces planes of one dense tensor and writes another's."""
    (B, C), processors = x.shape[:2], multiprocessors(x.device)
    sizes = [t.shape[2:].numel() for t in (reduced, written)]
    rows = [C] if strides.channels_last else sizes
    every_wide = (
        wide(x, strides) and reduced.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in rows)
    )
    return norm_tiling(
        strides.channels_last, B, C, *sizes, x.element_size(), every_wide, processors
    )


class MapTiling(NamedTuple):
    """How the programs of a kernel that writes one tile each cover [B, C, positions]."""

    block_c: int
    block_p: int
    num_warps: int
    maxnreg: int | None
    blocks: int  # programs that cover all planes
    chunks: int  # programs that write one plane


def map_tiling_of(out: Tensor, channels_last: bool, wide: bool) -> MapTiling:
    """Of a kernel that writes out."""
    (B, C), positions = out.shape[:2], out.shape[2:].numel()
    tile, per_thread = (TILE, 16) if wide else (TILE // 2, 4)
    block_c, block_p = tile_shape(channels_last, B * C, C, positions, out.element_size(), tile)
    blocks, chunks = plane_blocks(channels_last, B, C, block_c), cdiv(positions, block_p)
    num_warps = warps(block_c * block_p, per_thread)
    return MapTiling(block_c, block_p, num_warps, registers(num_warps, not wide), blocks, chunks)
