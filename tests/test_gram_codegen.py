"""Every shipped configuration of the Gram kernels, compiled for every capability it serves."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton_harness import CAPABILITIES, SHARED_LIMIT, Compiled, compile_launches

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Channels and sizes. A tile per layer and several, tiles narrower than the tensor cores of sm_90
# take, and a size at which no copy is wider than one element.
TILES = [(64, 256), (128, 128), (256, 64)]
NARROW = [(3, 256), (32, 64)]
UNALIGNED = [(65, 33)]

# What ptxas may park on the stack, in bytes: a value or two, outside of the loops, where that
# lets one more program onto a multiprocessor.
PARKED = 16

PRODUCTS = ("gram_partial_kernel", "gram_bwd_kernel")
SUMS = ("gram_finish_kernel", "gram_symmetrize_kernel")


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for layout in FORMATS:
        yield f"bfloat16 {layout} tiles", both_ways(torch.bfloat16, layout, TILES)
        yield f"bfloat16 {layout} unaligned", both_ways(torch.bfloat16, layout, UNALIGNED)
        for precision in ("tf32", "ieee"):
            name = f"float32 {precision} {layout} tiles"
            yield name, both_ways(torch.float32, layout, TILES[2:], precision)
    yield "float32 ieee nchw unaligned", both_ways(torch.float32, "nchw", UNALIGNED, "ieee")
    yield "bfloat16 nchw narrow", both_ways(torch.bfloat16, "nchw", NARROW)
    yield "bfloat16 nchw tiles, whole", whole


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    capabilities = [c for c in CAPABILITIES if c >= 80]  # below, torch.bmm is used
    return compile_launches(__file__, capabilities, sass=(80, 90, 100))


def both_ways(
    dtype: torch.dtype, layout: str, layers: Sequence[tuple[int, int]], precision: str = "tf32"
) -> Callable[[], None]:
    """The launches of a style loss, forward and backward."""

    def launch() -> None:
        from fastgan.kernels import gram as kernels

        torch.backends.cuda.matmul.fp32_precision = precision
        features = [feature_map((8, c, size, size), dtype, layout) for c, size in layers]
        targets = [x.new_empty(1, x.shape[1], x.shape[1], dtype=torch.float32) for x in features]
        size = sum(len(x) * x.shape[1] ** 2 for x in features)
        differences = targets[0].new_empty(size)
        loss = differences.new_empty(())
        numbers = [1.0] * len(layers)
        kernels.style_loss_fwd(features, targets, numbers, numbers, loss, differences)
        grads = [torch.empty_like(x) for x in features]
        kernels.gram_bwd(features, loss, differences, numbers, grads)

    return launch


def whole() -> None:
    """A Gram matrix in one launch."""
    from fastgan.kernels import gram as kernels

    x = feature_map((32, 512, 32, 32), torch.bfloat16, "nchw")
    kernels.gram_matrix_fwd(x, 1.0, x.new_empty(32, 512, 512, dtype=torch.float32))


def feature_map(shape: Sequence[int], dtype: torch.dtype, layout: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=FORMATS[layout])


def test_no_spills_and_shared_memory_within_limits(compiled: list[Compiled]) -> None:
    problems = [f"{c}: {c.stack} bytes of stack" for c in compiled if c.stack > PARKED]
    problems += [
        f"{c}: {c.shared} bytes of shared memory"
        for c in compiled
        if c.shared > SHARED_LIMIT[c.capability]
    ]
    assert not problems, "\n".join(problems)
    assert {c.kernel for c in compiled} == {*PRODUCTS, *SUMS}


def test_features_are_copied_16_bytes_at_a_time(compiled: list[Compiled]) -> None:
    """Without passing registers, where alignment allows it."""
    for c in products(compiled, "tiles"):
        # sm_90 and up multiply TF32 only with positions contiguous in shared memory.
        transposes = "float32 tf32 channels_last" in c.launch and c.capability in (90, 100)
        if not transposes or c.kernel == "gram_bwd_kernel":
            assert c.widest("cp.async") == 16, c
    for c in compiled:
        if c.kernel == "gram_bwd_kernel" and "tiles" in c.launch:
            assert c.widest("st.global") == 16, c
        if c.kernel == "gram_finish_kernel":
            assert c.widest("ld.global") == 16, c


def test_tensor_cores_multiply(compiled: list[Compiled]) -> None:
    own = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    for c in products(compiled, ""):
        if c.instructions:
            expected = "HMMA" if "narrow" in c.launch else own[c.capability]
            assert any(name.startswith(expected) for name in c.instructions), c


def products(compiled: list[Compiled], launch: str) -> list[Compiled]:
    return [c for c in compiled if c.kernel in PRODUCTS and launch in c.launch]
