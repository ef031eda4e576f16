"""The Triton kernels for statistics, instance norm and AdaIN, against the fp64 reference.

They run on the GPU where there is one, else in Triton's interpreter.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgan as fg
from tolerances import assert_close

pytest.importorskip("triton")
from fastgan.kernels import _common
from fastgan.kernels import instance_norm as kernels
from triton_harness import (
    INTERPRETED,
    counted_launches,
    counted_traffic,
    poisoned_buffers,
    shuffled_programs,
)

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@dataclasses.dataclass(frozen=True)
class Case:
    """An op with its options, as a function of x and further differentiable inputs."""

    run: Callable[..., Any]
    extra: Callable[[Tensor], Sequence[Tensor]] = lambda x: ()


CASES: dict[str, Case] = {
    "stats": Case(lambda x, impl: fg.instance_stats(x, correction=0, impl=impl)),
    "stats, unbiased": Case(
        lambda x, impl: fg.instance_stats(x, correction=min(1, x.shape[2:].numel() - 1), impl=impl)
    ),
    "mean": Case(lambda x, impl: fg.instance_stats(x, correction=0, impl=impl).mean),
    "std": Case(lambda x, impl: fg.instance_stats(x, correction=0, impl=impl).std),
}
ALL_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels of more channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "channels_last of more": lambda x: torch.cat([x.movedim(1, 3)] * 2, 3)[
        ..., : x.shape[1]
    ].movedim(3, 1),
    "every second column": lambda x: torch.stack([x, x], -1).flatten(3)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def features(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, layout: str = "contiguous"
) -> Tensor:
    """Planes of different means and deviations, rounded to dtype."""
    B, C = shape[:2]
    scale = torch.rand(B, C, 1, 1) + 0.5
    x = torch.randn(*shape) * scale + 2 * torch.randn(B, C, 1, 1)
    return LAYOUTS[layout](x.to(device, dtype)).detach().requires_grad_()


def flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def check(case: Case, x: Tensor) -> None:
    """Values and all gradients, from buffers that held NaN."""
    inputs = [x, *case.extra(x)]
    exact_inputs = [i.detach().double().requires_grad_() for i in inputs]
    exact = flat(case.run(*exact_inputs, impl="reference"))
    grads = [torch.randn_like(e) for e in exact]
    exact_grads = torch.autograd.grad(exact, exact_inputs, grads)
    with poisoned_buffers():
        outputs = flat(case.run(*inputs, impl="triton"))
        grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        input_grads = torch.autograd.grad(outputs, inputs, grads)
    for i, (actual, expected) in enumerate(zip(outputs, exact, strict=True)):
        assert_close(actual, expected, what=f"output {i}")
    for i, (given, actual, expected) in enumerate(
        zip(inputs, input_grads, exact_grads, strict=True)
    ):
        assert actual.stride() == torch.empty_like(given).stride()
        assert_close(actual, expected, x.dtype, what=f"gradient {i}")


@pytest.fixture(params=["as shipped", "small tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Small tiles send small images through every loop, split and merge."""
    if request.param == "small tiles":
        monkeypatch.setattr(kernels, "STATS_TILE", 64)
        monkeypatch.setattr(kernels, "APPLY_TILE", 64)
        monkeypatch.setattr(kernels, "MIN_RUN", 64)
    kernels.stats_tiling.cache_clear()
    yield request.param
    kernels.stats_tiling.cache_clear()


@pytest.mark.parametrize("layout", LAYOUTS)
@ALL_CASES
def test_layouts(case: Case, layout: str, tiles: str, device: torch.device) -> None:
    check(case, features((2, 5, 9, 11), torch.float32, device, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ALL_CASES
def test_dtypes(case: Case, dtype: torch.dtype, tiles: str, device: torch.device) -> None:
    for layout in ("contiguous", "channels_last"):
        check(case, features((2, 12, 8, 8), dtype, device, layout))


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 0, 4, 5), (3, 2, 1, 1), (1, 9, 1, 3), (2, 1, 7, 1), (1, 3, 33, 65)]
)
@ALL_CASES
def test_odd_shapes(case: Case, shape: tuple[int, ...], tiles: str, device: torch.device) -> None:
    for layout in ("contiguous", "channels_last"):
        check(case, features(shape, torch.float32, device, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_keep_their_precision(layout: str, tiles: str, device: torch.device) -> None:
    """Means of 1000 deviations, and planes whose first pixel is far from all others."""
    x = torch.randn(1, 3, 40, 50, dtype=torch.float64)
    x[:, 0] += 1000
    x[:, 1] = 0.1 * x[:, 1] - 1000
    x[:, 2, 0, 0] = 1e5
    x = LAYOUTS[layout](x.float().to(device))
    stats = fg.instance_stats(x, eps=0.0, impl="triton")
    exact = fg.instance_stats(x.double(), eps=0.0, impl="reference")
    error = (stats.std.double().square() / exact.std.square() - 1).abs()
    assert error.max() < 1e-5
    assert ((stats.mean - exact.mean).abs() / x.abs().amax((2, 3))).max() < 1e-6


@ALL_CASES
def test_constant_planes_have_finite_gradients(case: Case, device: torch.device) -> None:
    x = torch.full((2, 3, 4, 4), 3.0, device=device, requires_grad=True)
    outputs = flat(case.run(x, *case.extra(x), impl="triton"))
    (grad,) = torch.autograd.grad(sum(o.sum() for o in outputs), x)
    assert grad.isfinite().all()


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@ALL_CASES
def test_program_order_changes_no_bit(case: Case, layout: str, tiles: str) -> None:
    x = features((2, 5, 9, 16), torch.float32, torch.device("cpu"), layout)
    inputs = [x, *case.extra(x)]

    def bits() -> list[Tensor]:
        outputs = flat(case.run(*inputs, impl="triton"))
        return [*outputs, *torch.autograd.grad(outputs, inputs, [o.detach() for o in outputs])]

    expected = bits()
    for seed in range(2):
        with shuffled_programs(seed), counted_traffic() as traffic:
            assert all(torch.equal(a, b) for a, b in zip(bits(), expected, strict=True))
        assert traffic.atomics == 0


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_read_once_and_write_once(layout: str, tiles: str) -> None:
    x = features((2, 16, 16, 16), torch.bfloat16, torch.device("cpu"), layout)
    with counted_traffic() as forward, counted_launches() as launches:
        stats = fg.instance_stats(x, impl="triton")
    with counted_traffic() as backward, counted_launches() as backward_launches:
        torch.autograd.grad(stats, x, [s.detach() for s in stats])
    F = x.nbytes
    planes = 2 * 16
    splits = kernels.stats_tiling(layout == "channels_last", 2, 16, 256, 2, 132).splits
    assert (splits > 1) == (tiles == "small tiles")
    shifts, result = splits * planes * x.element_size(), 2 * planes * 4
    partials = planes * 4 * (1 + 2 * splits) if splits > 1 else 0
    assert forward.loaded == F + shifts + partials
    assert forward.stored == result + partials
    tile = kernels.tile_shape(layout == "channels_last", planes, 16, 256, 2, kernels.APPLY_TILE)
    assert backward.loaded == F + F // 2 // (tile[0] * tile[1]) * tile[0] * 4 * 4
    assert backward.stored == F
    merge = ["instance_stats_merge_kernel"] if splits > 1 else []
    assert launches == ["instance_stats_fwd_kernel", *merge]
    assert backward_launches == ["instance_stats_bwd_kernel"]


def grad_check_input(device: torch.device, layout: str) -> Tensor:
    return features((2, 3, 4, 5), torch.float32, device, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@ALL_CASES
def test_second_order_gradients(case: Case, layout: str, device: torch.device) -> None:
    """Of fp32 calls, against fp64: the gradient of a gradient penalty."""

    def penalty(inputs: list[Tensor], impl: str) -> tuple[Tensor, ...]:
        outputs = flat(case.run(*inputs, impl=impl))
        loss = sum((o.square() * (i + 1)).sum() for i, o in enumerate(outputs))
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        assert all(g.requires_grad for g in first)
        return torch.autograd.grad(sum((g.sin() * g).sum() for g in first), inputs)

    x = grad_check_input(device, layout)
    inputs = [x, *case.extra(x)]
    exact = penalty([i.detach().double().requires_grad_() for i in inputs], "reference")
    for actual, expected in zip(penalty(inputs, "triton"), exact, strict=True):
        assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str, device: torch.device) -> None:
    x = grad_check_input(device, layout)
    torch.library.opcheck(torch.ops.fastgan.instance_stats.default, (x, 1e-5, 1, "triton"))
    mean, std = (s.detach().requires_grad_() for s in fg.instance_stats(x))
    arguments = (mean, std, x, mean, std, 1e-5, 1, "triton")
    torch.library.opcheck(torch.ops.fastgan.instance_stats_backward.default, arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every second column"])
@ALL_CASES
def test_compiles_without_a_graph_break(case: Case, layout: str, device: torch.device) -> None:
    x = features((2, 3, 4, 5), torch.float32, device, layout)
    inputs = [x, *case.extra(x)]
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    outputs, expected = (
        flat(compiled(*inputs, impl="triton")),
        flat(case.run(*inputs, impl="triton")),
    )
    grads = torch.autograd.grad(outputs, inputs, [o.detach() for o in outputs])
    expected_grads = torch.autograd.grad(expected, inputs, [o.detach() for o in expected])
    for a, b in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def test_walk_reads_what_it_can_in_place() -> None:
    x = torch.randn(2, 6, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    in_place = [
        x,
        last,
        x[:, :3],
        last[:, :3],
        x[:1],
        last[:, :, 1:],
        x.flatten(2),
        x[:, :, :1, :1],
    ]
    assert all(_common.readable(t)[0] is t for t in in_place)
    assert all(_common.readable(t)[0] is not t for t in (x[..., 1:], last[..., 1:], x.mT))


def test_float64_and_cpu_are_refused_with_the_reason(device: torch.device) -> None:
    x = torch.randn(1, 2, 3, 3, device=device)
    with pytest.raises(fg.ImplUnavailableError, match="float64 runs on the reference path"):
        fg.instance_stats(x.double(), impl="triton")
    assert fg.explain(fg.instance_stats, x.double()).impl == "reference"
    if not INTERPRETED:
        with pytest.raises(fg.ImplUnavailableError, match="TRITON_INTERPRET=1"):
            fg.instance_stats(x.cpu(), impl="triton")
