"""Every configuration that the Gram kernels' table holds, compiled without a GPU.

The rows are found by asking the table about every number of channels, so that a new row is
compiled, too. A test run compiles each kernel for sm_90 and one other of the capabilities that it
serves, and leaves out float16 and part of the narrow accesses; `make codegen` compiles all for all.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton_harness import COMPLETE, Compiled, access_width, compile_launches

CAPABILITIES = (80, 86, 89, 90, 100, 120)  # below, torch.bmm is used
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "ieee": torch.float32,
}
PRODUCTS = ("gram_partial_kernel", "gram_bwd_kernel")
SUMS = ("gram_finish_kernel", "gram_symmetrize_kernel")


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for mode, layout in itertools.product(MODES, FORMATS):
        if mode == "float16" and not COMPLETE:  # as bfloat16, but for a letter in each instruction
            continue
        for x in rows(mode, layout):
            name = f"{mode} {layout} {tuple(x.shape)} align {width(x)}"
            yield name, both_ways(mode, [x])
            if width(x) < 16 and not COMPLETE:
                continue
            yield f"{name} whole", whole(mode, x)
            yield f"{name} of one image", both_ways(mode, [x[:1]])
            if x.shape[1] <= 64:  # which take the warps and stages of wider ones among them
                wider = feature_map((8, 128, 64, 64), mode, layout)
                yield f"{name} and a wider layer", both_ways(mode, [x, wider])


def width(x: Tensor) -> int:
    """Bytes that the kernels copy at a time."""
    from fastgan.kernels import _common
    from fastgan.kernels import gram as kernels

    strides = _common.walk(x)
    assert strides is not None
    return kernels.view(x, strides).align * x.element_size()


def rows(mode: str, layout: str) -> list[Tensor]:
    """A feature map for each row of the table, of each alignment."""
    from fastgan.kernels import gram as kernels

    found: dict[tuple[Any, ...], Tensor] = {}
    positions = [(64, 64), (1, 4100), (1, 4098), (1, 4097)] if layout == "nchw" else [(64, 64)]
    for size, channels in itertools.product(positions, range(1, 513)):
        x = feature_map((8, channels, *size), mode, layout)
        align = width(x) // x.element_size()
        precision = "tf32x3" if mode == "ieee" else "tf32"
        row = kernels.tiling(channels, x.element_size(), align, precision)
        tiles, ragged = row.padded // row.block_c, row.padded > channels
        found.setdefault((align, row._replace(padded=min(tiles, 2)), ragged), x)
    return list(found.values())


def feature_map(shape: Sequence[int], mode: str, layout: str) -> Tensor:
    return torch.empty(shape, dtype=MODES[mode], device="meta", memory_format=FORMATS[layout])


def both_ways(mode: str, features: Sequence[Tensor]) -> Callable[[], None]:
    """The launches of a style loss, forward and backward."""

    def launch() -> None:
        from fastgan.kernels import gram as kernels

        torch.backends.cuda.matmul.fp32_precision = "ieee" if mode == "ieee" else "tf32"
        targets = [x.new_empty(1, x.shape[1], x.shape[1], dtype=torch.float32) for x in features]
        size = sum(len(x) * x.shape[1] ** 2 for x in features)
        differences = targets[0].new_empty(size)
        loss = differences.new_empty(())
        numbers = [1.0] * len(features)
        kernels.style_loss_fwd(features, targets, numbers, numbers, loss, differences)
        grads = [torch.empty_like(x) for x in features]
        kernels.gram_bwd(features, loss, differences, numbers, grads)

    return launch


def whole(mode: str, x: Tensor) -> Callable[[], None]:
    """A Gram matrix in one launch: of many images, whose positions are not shared out."""

    def launch() -> None:
        from fastgan.kernels import gram as kernels

        torch.backends.cuda.matmul.fp32_precision = "ieee" if mode == "ieee" else "tf32"
        B, C = 4096, x.shape[1]
        many = torch.empty_like(x[:1]).expand(B, *x.shape[1:])
        kernels.gram_matrix_fwd(many, 1.0, x.new_empty(B, C, C, dtype=torch.float32))

    return launch


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    largest = r"\(8, (64|128|256), 64, 64\) align 16$"
    return compile_launches(__file__, CAPABILITIES, spread=not COMPLETE, sass=largest)


@pytest.mark.slow
def test_no_spills_and_shared_memory_within_limits(compiled: list[Compiled]) -> None:
    problems = [problem for c in compiled for problem in c.problems()]
    assert not problems, "\n".join(problems)
    assert {c.kernel for c in compiled} == {*PRODUCTS, *SUMS}
    assert {c.capability for c in compiled} == set(CAPABILITIES)


@pytest.mark.slow
def test_features_are_accessed_16_bytes_at_a_time(compiled: list[Compiled]) -> None:
    """Or as many as their alignment and the share of a thread in the tile allow; none narrower."""
    for c in compiled:
        if c.kernel not in PRODUCTS:
            continue
        align = int(c.launch.split("align ")[1].split()[0])
        itemsize = 2 if "float16" in c.launch else 4
        channels, positions = c.constants["BLOCK_C"][0], c.constants["BLOCK_P"][0]
        share = channels * positions * itemsize // (32 * c.warps)
        copies = {access_width(name) for name in c.accesses if name.startswith("cp.async")}
        assert copies <= {min(align, share), 16}, (str(c), c.accesses)
        if c.kernel == "gram_partial_kernel":
            assert copies or align < 4, (str(c), c.accesses)
        elif align == 16:
            depth = c.constants["BLOCK_K"][0] * positions * itemsize // (32 * c.warps)
            read = c.moved("cp.async", 16) + c.moved("ld.global", 16)
            assert read >= depth, (str(c), c.accesses)
            assert c.moved("st.global", 16) >= share, (str(c), c.accesses)


@pytest.mark.slow
def test_tensor_cores_multiply(compiled: list[Compiled]) -> None:
    """The own ones of sm_90 and sm_100 where a tile is as large as they take."""
    own = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
    opcodes = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    disassembled = set()
    for c in compiled:
        if c.kernel in PRODUCTS:
            tiles = c.constants["BLOCK_C"]
            expected = {own.get(c.capability, "mma.sync") if n >= 64 else "mma.sync" for n in tiles}
            assert set(c.products) == expected, c
            if c.instructions and c.capability in opcodes:
                opcode = opcodes[c.capability]
                assert any(name.startswith(opcode) for name in c.instructions), c
                disassembled.add(opcode)
    assert disassembled
