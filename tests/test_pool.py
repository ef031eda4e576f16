"""The image pool against the rule written with a plain list."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fastgan.recipes.pool import ImagePool


class ListPool:
    """The rule, picture after picture."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.stored: list[Tensor] = []

    def query(self, images: Tensor, drawn: Tensor) -> Tensor:
        returned = []
        for image, swap, slot in zip(images, *drawn.tolist(), strict=True):
            if len(self.stored) < self.capacity:
                self.stored.append(image)
                returned.append(image)
            elif self.capacity and swap:
                returned.append(self.stored[slot])
                self.stored[slot] = image
            else:
                returned.append(image)
        return torch.stack(returned)


def numbered(start: int, count: int, device: torch.device) -> Tensor:
    """Pictures [count,2,2,3] that are all different."""
    first = torch.arange(start, start + count, dtype=torch.float32, device=device)
    return first[:, None, None, None] + torch.arange(12, device=device).view(2, 2, 3) / 16


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(0, 6),
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
)
def test_the_pool_is_the_rule(capacity: int, sizes: list[int], seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    pool, expected = ImagePool(capacity, (2, 2, 3)).to(device), ListPool(capacity)
    seen = 0
    for size in sizes:
        images = numbered(seen, size, device)
        drawn = pool.draw(size, generator)
        assert torch.equal(pool(images, drawn.to(device)), expected.query(images, drawn))
        seen += size
    assert pool.count == len(expected.stored)
    for mine, theirs in zip(pool.images, expected.stored, strict=False):
        assert torch.equal(mine, theirs)


def test_a_restored_pool_goes_on_in_the_same_bits() -> None:
    device = torch.device("cpu")

    def run(pool: ImagePool, steps: range) -> list[Tensor]:
        generators = (torch.Generator().manual_seed(step) for step in steps)
        return [
            pool(numbered(2 * step, 2, device), pool.draw(2, generator))
            for step, generator in zip(steps, generators, strict=True)
        ]

    whole = run(ImagePool(5, (2, 2, 3)), range(12))
    for cut in (1, 2, 3, 8):  # while it fills, and after
        pool, resumed = ImagePool(5, (2, 2, 3)), ImagePool(5, (2, 2, 3))
        run(pool, range(cut))
        resumed.load_state_dict(pool.state_dict())
        for actual, expected in zip(run(resumed, range(cut, 12)), whole[cut:], strict=True):
            assert torch.equal(actual, expected)


def test_chance_is_even_and_follows_from_the_generator() -> None:
    pool = ImagePool(50, (3, 4, 4))
    swap, slot = pool.draw(20_000, torch.Generator().manual_seed(0))
    assert abs(swap.double().mean().item() - 0.5) < 0.02
    assert slot.bincount(minlength=50).min() > 300  # 400 expected
    assert len(slot.unique()) == 50
    again = pool.draw(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(again, torch.stack([swap, slot]))


def test_fakes_come_out_detached_in_their_own_dtype_and_layout() -> None:
    pool = ImagePool(2, (3, 4, 5)).to(memory_format=torch.channels_last)
    fakes = torch.randn(4, 3, 4, 5).to(torch.bfloat16, memory_format=torch.channels_last)
    out = pool(fakes.requires_grad_(), torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0]]))
    assert out.dtype == torch.bfloat16
    assert not out.requires_grad
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, fakes[[0, 1, 1, 3]])
    assert torch.equal(pool.images, fakes[[0, 2]].float())


def test_what_the_pool_holds_is_a_copy() -> None:
    pool = ImagePool(1, (2, 2, 3))
    images = numbered(3, 1, torch.device("cpu"))
    pool(images, torch.zeros(2, 1, dtype=torch.int64))
    images.zero_()
    assert torch.equal(pool.images, numbered(3, 1, torch.device("cpu")))


def test_wrong_shapes_are_named() -> None:
    pool = ImagePool(2, (3, 4, 4))
    drawn = pool.draw(1, torch.Generator())
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 4, 4\] .* got \[1, 3, 5, 4\]"):
        pool(torch.zeros(1, 3, 5, 4), drawn)
    with pytest.raises(ValueError, match=r"drawn \[2, B\], got \[2, 3, 4, 4\] and \[2, 1\]"):
        pool(torch.zeros(2, 3, 4, 4), drawn)
    with pytest.raises(ValueError, match="capacity must be at least 0, got -1"):
        ImagePool(-1, (3, 4, 4))


@pytest.mark.gpu
def test_a_captured_pool_is_the_rule() -> None:
    device = torch.device("cuda")
    pool, expected = ImagePool(4, (2, 2, 3)).to(device), ListPool(4)
    generator = torch.Generator().manual_seed(0)
    images = numbered(0, 3, device)
    drawn = pool.draw(3, torch.Generator()).to(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ImagePool(4, (2, 2, 3)).to(device)(images, drawn)  # warm-up on another pool
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = pool(images, drawn)
    for step in range(10):
        chance = pool.draw(3, generator)
        images.copy_(numbered(3 * step, 3, device))
        drawn.copy_(chance)
        graph.replay()
        assert torch.equal(out, expected.query(images.clone(), chance))
