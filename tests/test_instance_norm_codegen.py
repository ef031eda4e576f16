"""Every shipped configuration of the instance-norm kernels, compiled for every capability."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton_harness import SHARED_LIMIT, compile_launches

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# A size for each way the tables cover an image, and the ops that do it differently from others.
# fp32 differs from bf16 in the width of a tile, not in what is done with it.
SHAPES: dict[str, dict[tuple[int, ...], dict[str, str]]] = {
    "nchw": {
        (8, 512, 16, 16): {"bfloat16": "norm"},  # planes that share a program
        (8, 256, 64, 64): {"bfloat16": "norm padded_norm"},  # resident, or swept where padded
        (8, 128, 128, 128): {"bfloat16": "norm adain", "float32": "norm"},  # largest resident
        (8, 64, 256, 256): {"bfloat16": "norm", "float32": "norm"},  # swept
        (1, 64, 256, 256): {  # split
            "bfloat16": "stats norm padded_norm adain reflection_pad2d",
            "float32": "padded_norm reflection_pad2d",
        },
    },
    "channels_last": {
        (8, 512, 16, 16): {"bfloat16": "norm adain"},  # resident
        (8, 512, 32, 32): {"bfloat16": "norm", "float32": "norm"},  # largest resident
        (8, 256, 64, 64): {  # split
            "bfloat16": "stats norm padded_norm adain reflection_pad2d",
            "float16": "norm",
            "float32": "padded_norm",
        },
    },
}


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for layout, shapes in SHAPES.items():
        for shape, dtypes in shapes.items():
            for dtype, ops in dtypes.items():
                x = torch.empty(
                    shape,
                    dtype=getattr(torch, dtype),
                    device="meta",
                    memory_format=FORMATS[layout],
                )
                for op in ops.split():
                    yield f"{op} {shape} {dtype} {layout}", partial(globals()[op], x)
    yield "distance", partial(distance, torch.empty(8, 256, device="meta"))


def stats(x: Tensor) -> None:
    from fastgan.ops import _triton as kernels

    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    kernels.instance_stats_fwd(x, mean, mean, 1e-5, 1)
    kernels.instance_stats_bwd(x, torch.empty_like(x), mean, mean, mean, mean, 1)


def norm(x: Tensor, pad: int = 0) -> None:
    """With everything that takes registers, or with padding alone."""
    from fastgan.ops import _triton as kernels

    B, C = x.shape[:2]
    y = torch.empty_like(x)
    if pad:
        y = torch.nn.functional.pad(x, (pad,) * 4)
        y = torch.empty_like(
            y, memory_format=FORMATS["nchw" if x.is_contiguous() else "channels_last"]
        )
    plane = x.new_empty((B, C), dtype=torch.float32)
    affine, residual, slope = (None, None, 0.0) if pad else (plane, x, 0.2)
    kernels.instance_norm_fwd(
        x, y, plane, plane, affine, affine, residual, 1.0, slope, pad, 1e-5, 0
    )
    sums = x.new_empty((2, B, C), dtype=torch.float32)
    kernels.instance_norm_bwd(
        y, x, torch.empty_like(x), sums, plane, plane, affine, affine, 1.0, slope, pad, 0
    )


def padded_norm(x: Tensor) -> None:
    norm(x, pad=1)


def adain(x: Tensor) -> None:
    from fastgan.ops import _triton as kernels

    plane = x.new_empty(x.shape[:2], dtype=torch.float32)
    y, alpha = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    kernels.adain_fwd(x, x, y, plane, plane, plane, plane, alpha, 1e-5, 1)
    sums = x.new_empty((2, *plane.shape), dtype=torch.float32)
    kernels.instance_norm_bwd(
        y, x, torch.empty_like(x), sums, plane, plane, plane, plane, alpha, 1.0, 0, 1
    )


def reflection_pad2d(x: Tensor) -> None:
    from fastgan.ops import _triton as kernels

    layout = "nchw" if x.is_contiguous() else "channels_last"
    y = x.new_empty(x.shape[0], x.shape[1], x.shape[2] + 6, x.shape[3] + 6)
    y = y.contiguous(memory_format=FORMATS[layout])
    kernels.reflection_pad2d_fwd(x, y, (3, 3, 3, 3))
    kernels.reflection_pad2d_bwd(y, torch.empty_like(x), (3, 3, 3, 3))


def distance(plane: Tensor) -> None:
    from fastgan.ops import _triton as kernels

    scalar = plane.new_empty(())
    kernels.stats_distance_fwd(scalar, plane, plane, plane, plane, scalar, 1.0)
    kernels.stats_distance_bwd(scalar, plane, plane, plane, plane, plane, plane, 1.0)


def wide(kernel: str, launch: str) -> tuple[bool, bool]:
    """Whether loads and stores should be of 16 bytes: all but padded rows and statistics."""
    if "distance" in kernel or "merge" in kernel or ("nchw" in launch and "pad" in launch):
        return False, False
    return True, not ("stats_fwd" in kernel or "sums" in kernel or "moments" in kernel)


@pytest.mark.slow
def test_no_spills_wide_accesses_and_shared_memory_within_limits() -> None:
    problems = []
    for c in compile_launches(__file__):
        if c.stack:
            problems.append(f"{c}: {c.stack} bytes of spills, {c.registers} registers")
        if c.shared > SHARED_LIMIT[c.capability]:
            problems.append(f"{c}: {c.shared} bytes of shared memory")
        for kind, expected in zip(
            ("ld.global", "st.global"), wide(c.kernel, c.launch), strict=True
        ):
            if expected and c.widest(kind) != 16:
                problems.append(f"{c}: widest {kind} is of {c.widest(kind)} bytes")
    assert not problems, "\n".join(problems)
