"""The harness sees what it is there to see: each test would pass vacuously otherwise."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from triton_harness import (
    INTERPRETED,
    compile_launches,
    counted_launches,
    counted_traffic,
    poisoned_buffers,
    shuffled_programs,
)

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@triton.jit
def double_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def last_program_kernel(y):
    tl.store(y, tl.program_id(0))


@triton.jit
def all_at_once_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i)
    tl.store(y + i, a / tl.sum(a))


def double(x: torch.Tensor, n: int) -> torch.Tensor:
    y = torch.empty_like(x)
    double_kernel[(triton.cdiv(n, 16),)](x, y, n, BLOCK=16)
    return y


def launches():
    yield "aligned", lambda: double_kernel[(1,)](*torch.empty(2, 64, device="meta"), 64, BLOCK=512)
    x = torch.empty(65, device="meta")
    yield "unaligned", lambda: double_kernel[(1,)](x[1:], x, 63, BLOCK=512)
    x = torch.empty(65536, device="meta")
    yield "too large", lambda: all_at_once_kernel[(1,)](x, x, BLOCK=65536, num_warps=4)


@interpreted
def test_unwritten_elements_are_nan():
    with poisoned_buffers():
        y = double(torch.ones(40), n=37)
    assert torch.equal(y[:37], torch.full((37,), 2.0))
    assert y[37:].isnan().all()


@interpreted
def test_programs_are_shuffled():
    y = torch.zeros(1, dtype=torch.int32)
    last_program_kernel[(64,)](y)
    assert y.item() == 63
    seen = set()
    for seed in range(4):
        with shuffled_programs(seed):
            last_program_kernel[(8, 2, 4)](y)
            seen.add(y.item())
            assert torch.equal(double(torch.ones(40), n=40), torch.full((40,), 2.0))
    assert len(seen) > 1


@interpreted
def test_traffic_and_launches_are_counted():
    x = torch.ones(40, dtype=torch.float16)
    with counted_traffic() as traffic, counted_launches() as launched:
        double(x.view(4, 10).t().contiguous(), n=37)
    assert (traffic.loaded, traffic.stored, traffic.atomics) == (74, 74, 0)
    assert launched == ["clone", "double_kernel"]


def test_compiled_offline():
    compiled = {
        (c.launch, c.capability): c for c in compile_launches(__file__, (80, 90), sass="^aligned")
    }
    for capability in (80, 90):
        aligned = compiled["aligned", capability]
        assert aligned.stack == 0
        assert 8 <= aligned.registers <= 64
        assert aligned.widest("ld.global") == aligned.widest("st.global") == 16
        assert compiled["unaligned", capability].widest("ld.global") == 4
        assert compiled["too large", capability].stack > 0
    assert compiled["aligned", 90].instructions["LDG.E.128"] == 1
