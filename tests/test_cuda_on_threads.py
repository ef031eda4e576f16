"""The extension's CUDA kernels, run by host threads where there is no GPU to run them."""

import ctypes
import multiprocessing
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

import fastgan as fg
from tolerances import assert_close

ROOT = Path(__file__).parent.parent
LAUNCH = re.compile(r"(\w+(?:<[^<>]*>)?)\s*<<<([^>]+)>>>\(")
MODES = ["bce", "lsgan", "hinge", "wgan"]  # in the order of gan_loss.h
SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}  # c10::ScalarType
NAN = float("nan")

SCALES = [7200, 1800, 450]
# Logits of either label, launches of the forward and of the backward.
SIZES = {
    "one logit": ([1], 1, 1),
    "three scales": (SCALES, 1, 1),
    "as many as one block takes": ([32768], 1, 1),
    "one more": ([32768, 1], 2, 1),
    "several chunks": ([20000, 8192, 8193], 2, 1),
    "as many tensors as a table takes": ([13] * 32, 1, 1),
    "three tables": ([9] * 65, 4, 3),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_threads")
    source = (ROOT / "csrc/gan_loss_cuda.cu").read_text()
    source = re.sub(r"#include <c10/cuda/.*>\n", "", source)
    source, launches = LAUNCH.subn(r"launch(\1, \2, ", source)
    assert launches == source.count("C10_CUDA_KERNEL_LAUNCH_CHECK") + 1  # one of two is chosen
    (folder / "kernels.h").write_text(source)
    library = folder / "kernels.so"
    command = [compiler, "-std=c++20", "-O1", "-pthread", "-shared", "-fPIC"]
    command += [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    command += [f'-DKERNELS="{folder / "kernels.h"}"', f"{ROOT}/tests/cuda_on_threads.cpp"]
    command += [*(f"-L{path}" for path in library_paths()), "-lc10", "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "the C++ library has no barriers" in built.stderr:
        pytest.skip("the C++ library has no barriers")
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(library))


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))


class Run:
    """Forward and backward of the kernels, for the loss 0.5 * (sum of all means)."""

    def __init__(
        self,
        kernels: ctypes.CDLL,
        mode: str,
        real: Sequence[Tensor],
        fake: Sequence[Tensor],
        label_smoothing: float = 0.0,
        upstream: float = 1.0,
    ) -> None:
        logits = [*real, *fake]
        count = len(logits)
        settings = (
            SCALAR_TYPES[logits[0].dtype],
            MODES.index(mode),
            ctypes.c_double(label_smoothing),
            ctypes.c_double(0.5),
            count,
            pointers(logits),
            (ctypes.c_int64 * count)(*(x.numel() for x in logits)),
            (ctypes.c_bool * count)(*([True] * len(real) + [False] * len(fake))),
        )
        self.loss = torch.full((), NAN).share_memory_()
        self.stats = torch.full((4,), NAN).share_memory_()
        launches = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.grads = [shifted(torch.full_like(x, NAN), int(x.storage_offset())) for x in logits]

        def run() -> None:
            launches[0] = kernels.forward(*settings, pointer(self.loss), pointer(self.stats))
            launches[1] = kernels.backward(
                *settings, pointers(self.grads), ctypes.c_float(upstream)
            )

        in_a_child(run)
        self.launches = launches.tolist()


def in_a_child(run: Callable[[], None]) -> None:
    """A wrong kernel may wait at a barrier for ever; results come back in shared memory."""
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(100)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs, "a kernel does not end"
    assert child.exitcode == 0


def shifted(x: Tensor, offset: int) -> Tensor:
    """A copy that starts ``offset`` elements into its memory, with NaN before and behind it."""
    padded = torch.full((offset + x.numel() + 8,), NAN, dtype=x.dtype).share_memory_()
    padded[offset : offset + x.numel()] = x
    return padded[offset : offset + x.numel()]


def logits(sizes: Sequence[int], dtype: torch.dtype, offset: int) -> list[Tensor]:
    return [shifted(3 * torch.randn(size).to(dtype), offset) for size in sizes]


def check(run: Run, mode: str, real: list[Tensor], fake: list[Tensor], smoothing: float) -> None:
    """Against the fp64 formulas; ``run`` had an upstream gradient of 1000."""
    exact = [[x.double().requires_grad_() for x in side] for side in (real, fake)]
    with fg.use_impl("reference"):
        loss, stats = fg.discriminator_loss_with_stats(*exact, mode=mode, label_smoothing=smoothing)
    assert_close(run.loss, 0.5 * loss)
    assert_close(run.stats, torch.stack(stats))
    expected = torch.autograd.grad(500 * loss, exact[0] + exact[1])
    for grad, expected_grad in zip(run.grads, expected, strict=True):
        assert_close(grad, expected_grad)
        assert grad._base is not None
        assert grad._base.isnan().sum() == grad._base.numel() - grad.numel()  # wrote nothing else


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", SCALAR_TYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_against_the_formulas(
    kernels: ctypes.CDLL, mode: str, dtype: torch.dtype, offset: int
) -> None:
    smoothing = 0.1 if mode == "bce" else 0.0
    real, fake = logits(SCALES, dtype, offset), logits(SCALES, dtype, offset)
    run = Run(kernels, mode, real, fake, smoothing, upstream=1000)
    check(run, mode, real, fake, smoothing)


@pytest.mark.parametrize("sizes", SIZES)
def test_every_split_into_blocks_and_launches(kernels: ctypes.CDLL, sizes: str) -> None:
    numels, *launches = SIZES[sizes]
    real, fake = logits(numels, torch.float32, 0), logits(numels[::-1], torch.float32, 0)
    run = Run(kernels, "lsgan", real, fake, upstream=1000)
    check(run, "lsgan", real, fake, smoothing=0.0)
    assert run.launches == launches


def test_one_label_alone(kernels: ctypes.CDLL) -> None:
    """A generator's loss: its fakes as reals, no fakes; their statistics are zeros."""
    fake = logits(SCALES, torch.float32, 0)
    run = Run(kernels, "bce", fake, [])
    assert_close(run.loss, 0.5 * fg.generator_loss([x.double() for x in fake], impl="reference"))
    assert run.stats[1] == 0
    assert run.stats[3] == 0


def test_the_same_bits_again(kernels: ctypes.CDLL) -> None:
    real, fake = logits([20000, 8193], torch.float32, 0), logits([70000, 3], torch.float32, 0)
    first, second = (Run(kernels, "bce", real, fake) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.stats, second.stats)
