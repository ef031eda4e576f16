"""The Triton kernels for statistics, instance norm and AdaIN, against the fp64 reference.

They run on the GPU where there is one, else in Triton's interpreter.
"""

import dataclasses
import functools
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import fastgan as fg
from tolerances import assert_close

pytest.importorskip("triton")
from fastgan.kernels import _common, _tiling
from norm_cases import (
    ALL_CASES,
    CASES,
    CASES_IN_CHANNELS_LAST_OR_BOTH,
    LAYOUTS,
    Case,
    affine,
    features,
    flat,
)
from norm_cases import check as check_implementation
from triton_harness import INTERPRETED, counted_launches, counted_traffic, shuffled_programs

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
check = functools.partial(check_implementation, impl="triton")
# Together they launch every kernel.
SANITIZED = ("stats", "norm, per image, pad, residual", "adain", "style loss", "reflection pad")


SMALL_TILES = {
    "TILE": 64,
    "RESIDENT_TILE": 0,
    "SMALLEST_TILE": 1,
    "PROGRAMS": 1,
    "MIN_RUN": 64,
    "UNSPLIT_RUN": 64,
}


@pytest.fixture(params=["resident", "sweep", "split"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Sends small images through each way to cover a large one."""
    if request.param != "resident":
        for name, value in SMALL_TILES.items():
            monkeypatch.setattr(_tiling, name, value)
    processors = 1 if request.param == "sweep" else 132
    monkeypatch.setattr(_tiling, "multiprocessors", lambda device: processors)
    clear_tilings()
    yield request.param
    clear_tilings()


def clear_tilings() -> None:
    _tiling.stats_tiling.cache_clear()
    _tiling.norm_tiling.cache_clear()


@pytest.mark.parametrize(
    ("shape", "channels", "programs"),
    [
        ((1, 64, 256 * 256), 16, 256),  # of 64 channels at a time, MAX_SPLITS would allow 64
        ((4, 64, 256 * 256), 16, 512),
        ((1, 256, 64 * 64), 64, 128),  # too small for more
        ((32, 64, 256 * 256), 64, 512),  # enough as it is
    ],
)
def test_few_channels_of_few_images_fill_the_device(
    shape: tuple[int, int, int], channels: int, programs: int
) -> None:
    tiling = _tiling.stats_tiling(True, *shape, 2, True, 132)
    assert (tiling.block_c, tiling.blocks * tiling.splits) == (channels, programs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.sanitize] * (name in SANITIZED))
        for name, case in CASES.items()
    ],
)
def test_every_way_to_cover_an_image(
    case: Case, layout: str, tiles: str, device: torch.device
) -> None:
    check(case, features((2, 3, 7, 9), torch.float32, device, layout))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "contiguous" not in name])
@pytest.mark.parametrize(
    "name", ["stats", "norm, affine, leaky, residual", "norm, relu, pad", "adain", "reflection pad"]
)
def test_layouts(name: str, layout: str, device: torch.device) -> None:
    check(CASES[name], features((2, 5, 6, 7), torch.float32, device, layout))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@ALL_CASES
def test_dtypes(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    for layout in ("contiguous", "channels_last"):
        check(case, features((2, 12, 8, 8), dtype, device, layout))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (3, 2, 1, 1), (1, 9, 1, 3)], ids=str)
@ALL_CASES
def test_odd_shapes(case: Case, shape: tuple[int, ...], device: torch.device) -> None:
    if min(shape[2:]) < case.smallest:
        shape = (*shape[:2], case.smallest, case.smallest)
    for layout in ("contiguous", "channels_last"):
        check(case, features(shape, torch.float32, device, layout))


@interpreted
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(sorted(CASES)),
    st.tuples(
        st.sampled_from([0, 1, 2, 5]), st.sampled_from([0, 1, 2, 7, 16, 33]),
        st.sampled_from([1, 2, 3, 5, 8, 16, 27]), st.sampled_from([1, 2, 3, 5, 8, 16, 27]),
    ),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(sorted(LAYOUTS)),
)  # fmt: skip
def test_any_feature_map(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    size = [max(n, CASES[name].smallest) for n in shape[2:]]
    check(CASES[name], features((*shape[:2], *size), dtype, torch.device("cpu"), layout))


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
    outputs = flat(case.run(*case.inputs(x), impl="triton"))
    (grad,) = torch.autograd.grad(sum(o.sum() for o in outputs), x)
    assert grad.isfinite().all()


@interpreted
@pytest.mark.parametrize("tiles", ["split"], indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@ALL_CASES
def test_program_order_changes_no_bit(case: Case, layout: str, tiles: str) -> None:
    inputs = case.inputs(features((2, 3, 5, 16), torch.float32, torch.device("cpu"), layout))

    def bits() -> list[Tensor]:
        outputs = flat(case.run(*inputs, impl="triton"))
        return [*outputs, *torch.autograd.grad(outputs, inputs, [o.detach() for o in outputs])]

    expected = bits()
    with shuffled_programs(seed=0), counted_traffic() as traffic:
        assert all(torch.equal(a, b) for a, b in zip(bits(), expected, strict=True))
    assert traffic.atomics == 0


@dataclasses.dataclass(frozen=True)
class Cost:
    """In sizes of x: read and written in the forward, then in the backward."""

    forward: tuple[float, float]
    backward: tuple[float, float]
    launches: int


PADDED = 34 * 34 / 32**2
STYLE = 31 / 32  # its size
# What is read again by a sweep or after a split, is read from cache where it fits there.
COSTS: dict[tuple[str, str], Cost] = {
    ("stats", "resident"): Cost((1, 0), (1, 1), 2),
    ("stats", "split"): Cost((1, 0), (1, 1), 3),
    ("norm, relu", "resident"): Cost((1, 1), (2, 1), 2),
    ("norm, relu", "sweep"): Cost((2, 1), (4, 1), 2),
    ("norm, relu", "split"): Cost((2, 1), (4, 1), 4),
    ("norm, relu, pad", "resident"): Cost((1 + PADDED, PADDED), (1 + 3 * PADDED, 1), 2),
    ("norm, relu, pad", "split"): Cost((1 + PADDED, PADDED), (1 + 3 * PADDED, 1), 4),
    ("adain", "resident"): Cost((1 + STYLE, 1), (2 + STYLE, 1 + STYLE), 4),
    ("adain", "split"): Cost((2 + STYLE, 1), (4 + STYLE, 1 + STYLE), 5),
    ("adain, style detached", "resident"): Cost((1 + STYLE, 1), (2, 1), 3),
    ("style loss, one layer", "resident"): Cost((1, 0), (1, 1), 4),
    ("reflection pad", "resident"): Cost((35 * 35 / 32**2,) * 2, (35 * 35 / 32**2, 1), 2),
}


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("name", "tiles"), COSTS, indirect=["tiles"], ids=str)
def test_bytes_and_launches(
    name: str, layout: str, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiles != "resident":
        monkeypatch.setattr(_tiling, "TILE", 512)
    if tiles == "split" and layout == "channels_last":  # whose blocks are few
        monkeypatch.setattr(_tiling, "multiprocessors", lambda device: 8)
    cost, case = COSTS[name, tiles], CASES[name.removesuffix(", style detached")]
    x = features((1, 8, 32, 32), torch.bfloat16, torch.device("cpu"), layout)
    inputs = [i.detach() if i.ndim == 2 else i for i in case.inputs(x)]  # given statistics
    if name.endswith("detached"):
        inputs[1] = inputs[1].detach()
    with counted_traffic() as forward, counted_launches() as launches:
        outputs = flat(case.run(*inputs, impl="triton"))
    grads = [o.detach() for o in outputs]
    with counted_traffic() as backward, counted_launches() as backward_launches:
        torch.autograd.grad(outputs, [i for i in inputs if i.requires_grad], grads)
    counted = {
        "read": (forward.loaded, cost.forward[0]),
        "written": (forward.stored, cost.forward[1]),
        "read backward": (backward.loaded, cost.backward[0]),
        "written backward": (backward.stored, cost.backward[1]),
    }
    for what, (actual, expected) in counted.items():
        statistics = actual / x.nbytes - expected  # of planes and tiles, and partial ones
        assert 0 <= statistics < (0.05 if tiles == "resident" else 0.7), (what, actual / x.nbytes)
    assert len(launches + backward_launches) <= cost.launches
    assert all(k.endswith("_kernel") for k in launches + backward_launches)


@CASES_IN_CHANNELS_LAST_OR_BOTH
def test_second_order_gradients(case: Case, layout: str, device: torch.device) -> None:
    """Of fp32 calls, against fp64: the gradient of a gradient penalty."""

    def penalty(inputs: list[Tensor], impl: str) -> tuple[Tensor, ...]:
        outputs = flat(case.run(*inputs, impl=impl))
        loss = sum(
            (o.sin() * torch.linspace(-1, 1, o.numel()).to(o).view(o.shape)).sum() for o in outputs
        )
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        assert all(g.requires_grad for g in first)
        return torch.autograd.grad(sum((g.sin() * g).sum() for g in first), inputs)

    inputs = case.inputs(features((2, 3, 4, 5), torch.float32, device, layout))
    exact = penalty([i.detach().double().requires_grad_() for i in inputs], "reference")
    for actual, expected in zip(penalty(inputs, "triton"), exact, strict=True):
        assert_close(actual, expected, torch.float32)


@ALL_CASES
def test_gradcheck_of_the_reference(case: Case) -> None:
    x = features((2, 2, 4, 4), torch.float64, torch.device("cpu"))
    inputs = [i.detach().double().requires_grad_() for i in case.inputs(x)]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(case.run(*inputs, impl="reference")))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", ["channels_last"])
def test_opcheck(layout: str, device: torch.device) -> None:
    x = features((2, 3, 4, 5), torch.float32, device, layout)
    grad = features((2, 3, 6, 7), torch.float32, device, layout)
    ops = torch.ops.fastgan
    mean, std = (s.detach().requires_grad_() for s in fg.instance_stats(x))
    plane, scalar = mean.detach(), torch.ones((), device=device, requires_grad=True)
    weight, bias = (v.requires_grad_() for v in affine(x, 3))
    alphas = torch.rand(2, device=device)
    for op, arguments in [
        (ops.instance_stats, (x, 1e-5, 1)),
        (ops.instance_stats_backward, (mean, std, x, plane, plane, 1e-5, 1)),
        (ops.instance_norm, (x, weight, bias, x, None, 1.0, 0.2, 1, 1e-5, 0)),
        (ops.instance_norm, (x, std, mean, None, alphas, 1.0, 1.0, 0, 1e-5, 1)),
        (
            ops.instance_norm_backward,
            (grad / 100, x, weight, bias, None, plane, plane + 1, 1.0, 0.2, 1, 1e-5, 0),
        ),
        (ops.adain, (x, x, None, 0.5, 1e-5, 1)),
        (ops.stats_distance, (scalar, mean, std, std, mean, 0.5)),
        (ops.stats_distance_backward, (scalar, mean, std, std, mean, 0.5)),
        (ops.reflection_pad2d, (x, 1, 2, 0, 3)),
        (ops.reflection_pad2d_backward, (grad, 1, 1, 1, 1, layout == "channels_last")),
    ]:
        torch.library.opcheck(op.default, (*arguments, "triton"))


@CASES_IN_CHANNELS_LAST_OR_BOTH
def test_compiles_without_a_graph_break(case: Case, layout: str, device: torch.device) -> None:
    inputs = case.inputs(features((2, 3, 4, 5), torch.float32, device, layout))
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    outputs = flat(compiled(*inputs, impl="triton"))
    expected = flat(case.run(*inputs, impl="triton"))
    grads = torch.autograd.grad(outputs, inputs, [o.detach() for o in outputs])
    expected_grads = torch.autograd.grad(expected, inputs, [o.detach() for o in expected])
    for a, b in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_leaves_features_alone(dtype: torch.dtype, device: torch.device) -> None:
    x = features((2, 3, 4, 5), dtype, device)
    weight, bias = affine(x, 3)
    with torch.autocast(device.type, dtype=dtype):
        y = fg.instance_norm(x, weight=weight, bias=bias, impl="triton")
        stats = fg.instance_stats(x, impl="triton")
        loss = fg.adain_style_loss(x, stats, impl="triton")
    assert (y.dtype, stats.mean.dtype, loss.dtype) == (dtype, torch.float32, torch.float32)


def test_the_gradient_of_a_shifted_plane_keeps_its_precision(device: torch.device) -> None:
    """A mean of 1000 deviations: what is kept for the backward is the mean less a pixel."""
    x = (torch.randn(1, 4, 24, 24) + 1000).to(device).requires_grad_()
    check(CASES["norm, relu"], x)
    check(CASES["adain"], x)


def test_walk_reads_what_it_can_in_place() -> None:
    x = torch.randn(2, 6, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    planes = [x, x[:, :3], x[:1], x.flatten(2), x[:, :, :1, :1], x[:, :, 1:]]
    pixels = [last, last[:, :3], last[:, :, 1:], last[..., :1], last.flatten(2)]
    for t in planes + pixels:
        assert _common.readable(t)[0] is t
    for t in (x[..., 1:], last[..., 1:], x.mT):
        assert _common.readable(t)[0] is not t


def test_explain_names_a_copy(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 6, device=device)
    copied = fg.explain(fg.instance_norm, x[..., 1:], impl="triton")
    assert copied.note == "copies an input once: [2, 3, 4, 5], strides (72, 24, 6, 1)"
    assert str(copied).endswith(copied.note)
    assert fg.explain(fg.adain, x, x[:, :, 1:], impl="triton").note is None
    assert fg.explain(fg.instance_norm, x[..., 1:], impl="reference").note is None


def test_float64_and_cpu_are_refused_with_the_reason(device: torch.device) -> None:
    x = torch.randn(1, 2, 3, 3, device=device)
    with pytest.raises(fg.ImplUnavailableError, match="float64 runs on the reference path"):
        fg.instance_stats(x.double(), impl="triton")
    assert fg.explain(fg.instance_stats, x.double()).impl == "reference"
    if not INTERPRETED:
        with pytest.raises(fg.ImplUnavailableError, match="TRITON_INTERPRET=1"):
            fg.instance_stats(x.cpu(), impl="triton")
