"""Every shipped configuration of the instance-norm kernels, compiled for every capability."""

from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton")
from triton_harness import SHARED_LIMIT, compile_launches

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# A size for each way the tables cover an image: many small planes, planes that fill a tile or
# more, planes split between programs.
SHAPES = [(8, 512, 16, 16), (8, 256, 64, 64), (1, 64, 256, 256)]


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from fastgan.kernels import instance_norm as kernels

    def stats(x: torch.Tensor) -> None:
        mean = x.new_empty(x.shape[:2], dtype=torch.float32)
        kernels.instance_stats_fwd(x, mean, mean, 1e-5, 1)
        kernels.instance_stats_bwd(x, torch.empty_like(x), mean, mean, mean, mean, 1)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layout, memory_format in FORMATS.items():
            for shape in SHAPES:
                x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
                yield f"{dtype} {layout} {shape}", lambda x=x: stats(x)


def test_no_spills_wide_accesses_and_shared_memory_within_limits() -> None:
    compiled = compile_launches(__file__)
    assert {c.kernel for c in compiled} == {
        "instance_stats_fwd_kernel",
        "instance_stats_merge_kernel",
        "instance_stats_bwd_kernel",
    }
    problems = []
    for c in compiled:
        if c.stack:
            problems.append(f"{c}: {c.stack} bytes of spills, {c.registers} registers")
        if c.shared > SHARED_LIMIT[c.capability]:
            problems.append(f"{c}: {c.shared} bytes of shared memory")
        if c.widest("ld.global") < 16 and c.kernel != "instance_stats_merge_kernel":
            problems.append(f"{c}: loads of {c.widest('ld.global')} bytes")
        if c.kernel.endswith("bwd_kernel") and c.widest("st.global") < 16:
            problems.append(f"{c}: stores of {c.widest('st.global')} bytes")
    assert not problems, "\n".join(problems)
