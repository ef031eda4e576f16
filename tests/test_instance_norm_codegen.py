"""Every configuration that the tables for image planes hold, compiled without a GPU.

The rows are found by asking the tables about sizes from tiny to large, so that a new row is
compiled, too. A test run compiles each kernel for sm_90 and one other capability, and leaves out
float16, shifted addresses and tiles that are not full; `make codegen` compiles all for all.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton_harness import CAPABILITIES, COMPLETE, Compiled, compile_launches

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
BATCHES = (1, 2, 8, 32)
# Accesses can be of 16 bytes ("aligned"), or not for the sizes ("odd") or the address ("shifted").
CHANNELS = {
    "aligned": (1, 4, 8, 16, 32, 64, 128, 256, 512),
    "odd": (1, 3, 7, 15, 31, 65, 129, 511),
    "shifted": (16, 32, 64, 512),
}
EVEN_SIZES = [(2 ** (k // 2), 2 ** (k - k // 2)) for k in range(20)]
SIZES = {
    "aligned": EVEN_SIZES,
    "odd": [(2 ** (k // 2) - 1, 2 ** (k - k // 2) - 1) for k in range(2, 20)],
    "shifted": EVEN_SIZES,
}
OPS = ("stats", "norm", "padded_norm", "adain", "reflection_pad2d")
# How many feature maps each kernel reads and writes, tile by tile.
MAPS = {
    "instance_stats_fwd_kernel": (1, 0),
    "instance_stats_bwd_kernel": (1, 1),
    "adain_moments_kernel": (1, 0),
    "instance_norm_fwd_kernel": (1, 1),
    "instance_norm_sums_kernel": (2, 0),
    "instance_norm_bwd_kernel": (2, 1),
    "reflection_pad2d_fwd_kernel": (1, 1),
    "reflection_pad2d_bwd_kernel": (1, 1),
}
OF_STATISTICS = {
    "instance_stats_merge_kernel",
    "stats_distance_fwd_kernel",
    "stats_distance_bwd_kernel",
}


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)[not COMPLETE :]
    alignments = ("aligned", "odd", "shifted")[: 2 + COMPLETE]
    for op, layout, dtype, alignment in itertools.product(OPS, FORMATS, dtypes, alignments):
        for shape in rows(op, layout, dtype, alignment):
            x = feature_map(shape, layout, dtype, alignment)
            accesses = "wide" if wide(op, x) else "narrow"
            name = f"{op} {accesses} {shape} {str(dtype)[6:]} {layout} {alignment}"
            yield name, partial(globals()[op], x)
    for dtype, layout, of_style in itertools.product(dtypes, FORMATS, FORMATS):
        x = feature_map((1, 32, 256, 256), layout, dtype)
        style = feature_map((1, 32, 31, 33), of_style, dtype)
        name = f"adain {str(dtype)[6:]} {layout}, small style {of_style}"
        yield name, partial(adain, x, style)
    yield "distance", partial(distance, torch.empty(8, 256, device="meta"))


def wide(op: str, x: Tensor) -> bool:
    """Whether all of a map is accessed 16 bytes at a time: not where rows are read at an offset."""
    from fastgan.kernels import _common, _tiling

    strides = _common.walk(x)
    assert strides is not None
    return _tiling.wide(x, strides) and (strides.channels_last or "pad" not in op)


def rows(op: str, layout: str, dtype: torch.dtype, alignment: str) -> list[tuple[int, ...]]:
    """A shape for each row of the tables that an op uses, that with the most splits."""
    found: dict[tuple[Any, ...], tuple[int, tuple[int, ...]]] = {}
    for B, C, (H, W) in itertools.product(BATCHES, CHANNELS[alignment], SIZES[alignment]):
        shape = (B, C, H, W)
        x = feature_map(shape, layout, dtype, alignment)
        tilings = used(op, x)
        splits = max((t.splits for t in tilings if hasattr(t, "splits")), default=1)
        smallest = 4096 if alignment == "aligned" else 2048
        if tilings and (COMPLETE or all(t.block_c * t.block_p >= smallest for t in tilings)):
            key = tuple(code(t) for t in tilings)
            if splits > found.get(key, (0, ()))[0]:
                found[key] = splits, shape
    return [shape for _, shape in found.values()]


def used(op: str, x: Tensor) -> list[Any]:
    """The rows that decide how an op runs on x; none where it cannot or others run the same."""
    from fastgan.kernels import _common, _tiling, reflection_pad

    strides = _common.walk(x)
    assert strides is not None
    stats = _tiling.stats_tiling_of(x, strides)
    norm = _tiling.norm_tiling_of(x, strides, x, x)
    if op == "stats":
        return [stats, _tiling.map_tiling_of(x, strides.channels_last, _tiling.wide(x, strides))]
    if op == "norm":
        return [norm]
    if op == "adain":
        return [norm, stats] if norm.splits > 1 else [norm] if COMPLETE else []
    if min(x.shape[2:]) <= 3:  # too small to be padded
        return []
    if op == "reflection_pad2d":
        return [reflection_pad._tiling(x, x, strides.channels_last)]
    y = padded(x, 1)
    return [
        _tiling.norm_tiling_of(x, strides, x, y),
        _tiling.norm_tiling_of(x, strides, y, x),
    ]


def code(tiling: Any) -> tuple[Any, ...]:
    """What of a tiling is a constant of the code, the number of splits aside."""
    if not hasattr(tiling, "splits"):
        return tiling[:4]
    return *tiling[:5], tiling.splits > 1, tiling.run == tiling.block_p


def feature_map(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, alignment: str = "aligned"
) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=FORMATS[layout])
    if alignment == "shifted":
        return torch.empty(x.numel() + 1, dtype=dtype, device="meta").as_strided(
            shape, x.stride(), 1
        )
    return x


def padded(x: Tensor, pad: int) -> Tensor:
    B, C, H, W = x.shape
    layout = "nchw" if x.is_contiguous() else "channels_last"
    return feature_map((B, C, H + 2 * pad, W + 2 * pad), layout, x.dtype)


def stats(x: Tensor) -> None:
    from fastgan.ops import _triton as kernels

    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    kernels.instance_stats_fwd(x, mean, mean, 1e-5, 1)
    kernels.instance_stats_bwd(x, torch.empty_like(x), mean, mean, mean, mean, 1)


def norm(x: Tensor, pad: int = 0) -> None:
    """With everything that takes registers."""
    from fastgan.ops import _triton as kernels

    y = padded(x, pad)
    plane = x.new_empty(x.shape[:2], dtype=torch.float32)
    alpha, sums = plane[:, 0], x.new_empty((2, *plane.shape), dtype=torch.float32)
    kernels.instance_norm_fwd(x, y, plane, plane, plane, plane, x, alpha, 0.2, pad, 1e-5, 0)
    grad_x = torch.empty_like(x)
    kernels.instance_norm_bwd(y, x, grad_x, sums, plane, plane, plane, plane, alpha, 0.2, pad, 0)


def padded_norm(x: Tensor) -> None:
    norm(x, pad=1)


def adain(x: Tensor, style: Tensor | None = None) -> None:
    from fastgan.ops import _triton as kernels

    style = x if style is None else style
    plane = x.new_empty(x.shape[:2], dtype=torch.float32)
    y, alpha = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    kernels.adain_fwd(x, style, y, plane, plane, plane, plane, alpha, 1e-5, 1)
    sums = x.new_empty((2, *plane.shape), dtype=torch.float32)
    kernels.instance_norm_bwd(
        y, x, torch.empty_like(x), sums, plane, plane, plane, plane, alpha, 1.0, 0, 1
    )


def reflection_pad2d(x: Tensor) -> None:
    from fastgan.ops import _triton as kernels

    y = padded(x, 3)
    kernels.reflection_pad2d_fwd(x, y, (3, 3, 3, 3))
    kernels.reflection_pad2d_bwd(y, torch.empty_like(x), (3, 3, 3, 3))


def distance(plane: Tensor) -> None:
    from fastgan.ops import _triton as kernels

    scalar = plane.new_empty(())
    kernels.stats_distance_fwd(scalar, plane, plane, plane, plane, scalar, 1.0)
    kernels.stats_distance_bwd(scalar, plane, plane, plane, plane, plane, plane, 1.0)


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compile_launches(__file__, spread=not COMPLETE)


@pytest.mark.slow
def test_no_spills_and_shared_memory_within_limits(compiled: list[Compiled]) -> None:
    problems = [problem for c in compiled for problem in c.problems()]
    assert not problems, "\n".join(problems)
    assert {c.kernel for c in compiled} == {*MAPS, *OF_STATISTICS}
    assert {c.capability for c in compiled} == set(CAPABILITIES)


@pytest.mark.slow
def test_maps_are_accessed_16_bytes_at_a_time(compiled: list[Compiled]) -> None:
    """Not some of their accesses but those of whole tiles."""
    from fastgan.kernels._tiling import STAGES

    wide = [c for c in compiled if " wide " in c.launch and c.kernel in MAPS]
    assert {c.kernel for c in wide} == set(MAPS)
    for c in wide:
        itemsize = 4 if "float32" in c.launch else 2
        tile = c.constants["BLOCK_C"] * c.constants["BLOCK_P"] * itemsize // (32 * c.warps)
        read, written = (maps * tile for maps in MAPS[c.kernel])
        # A loop that reads ahead is preceded by the reads of its first tiles.
        ahead = c.moved("cp.async", 16) / STAGES.value
        assert c.moved("ld.global", 16) + ahead >= read, (str(c), c.accesses)
        assert c.moved("st.global", 16) >= written, (str(c), c.accesses)
