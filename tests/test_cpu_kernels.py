"""The C++ kernels for instance statistics, instance norm and AdaIN on the CPU."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgan as fg
from fastgan.ops import _dispatch
from norm_cases import (
    ALL_CASES,
    CASES,
    CASES_IN_CHANNELS_LAST_OR_BOTH,
    LAYOUTS,
    Case,
    affine,
    check,
    features,
    flat,
)
from tolerances import assert_close

if _dispatch.missing("native", "cpu"):
    pytest.skip("fastgan._C is not live", allow_module_level=True)

CPU = torch.device("cpu")
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.mark.parametrize("layout", LAYOUTS)
@ALL_CASES
def test_values_and_gradients(case: Case, layout: str) -> None:
    check(case, features((2, 5, 9, 11), torch.float32, CPU, layout), "native")


@pytest.mark.parametrize(
    "shape",
    [
        (0, 3, 4, 5),
        (2, 0, 4, 5),
        (3, 2, 1, 1),
        (1, 9, 1, 3),
        (2, 1, 7, 4),
        (2, 70, 13, 11),  # more channels than a tile of channels_last
        (1, 3, 70, 65),  # more positions than a block of a plane
    ],
    ids=str,
)
@both_layouts
@ALL_CASES
def test_odd_shapes(case: Case, layout: str, shape: tuple[int, ...]) -> None:
    if min(shape[2:]) < case.smallest:
        shape = (*shape[:2], case.smallest, case.smallest)
    check(case, features(shape, torch.float32, CPU, layout), "native")


@pytest.mark.parametrize("shape", [(3, 130, 80, 90), (40, 64, 30, 31)], ids=str)
@both_layouts
@pytest.mark.parametrize("name", ["stats", "norm, affine, leaky, residual", "norm, relu, pad"])
def test_several_chunks_and_groups(name: str, layout: str, shape: tuple[int, ...]) -> None:
    """Channels_last images that are cut into chunks, and more of them than go together."""
    check(CASES[name], features(shape, torch.float32, CPU, layout), "native")


@both_layouts
def test_statistics_keep_their_precision(layout: str) -> None:
    """Means of 1000 deviations and more, and a plane whose first pixel is far from all others."""
    x = torch.randn(1, 3, 140, 150, dtype=torch.float64)
    x[:, 0] += 1000
    x[:, 1] = 0.1 * x[:, 1] - 1000
    x[:, 2, 0, 0] = 1e5
    x = LAYOUTS[layout](x.float())
    stats = fg.instance_stats(x, eps=0.0, impl="native")
    exact = fg.instance_stats(x.double(), eps=0.0, impl="reference")
    error = (stats.std.double().square() / exact.std.square() - 1).abs()
    assert error.max() < 1e-5
    assert ((stats.mean - exact.mean).abs() / x.abs().amax((2, 3))).max() < 1e-6


@both_layouts
@pytest.mark.parametrize("scale", [1e-23, 2e-23, 3e18, 1e20])
def test_squares_beyond_the_range_of_fp32_make_no_nan(layout: str, scale: float) -> None:
    steps = torch.ones(2, 3, 64, 64)
    steps[:, :, :8] = 0
    steps[1, :, :, ::9] = 0
    for x in (steps, torch.randn(2, 3, 64, 64)):
        _, std = fg.instance_stats(LAYOUTS[layout](x * scale), eps=0.0, impl="native")
        assert not std.isnan().any()


@both_layouts
def test_the_gradient_of_a_shifted_plane_keeps_its_precision(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(1, 4, 24, 24) + 1000).requires_grad_()
    check(CASES["norm, relu"], x, "native")
    check(CASES["adain"], x, "native")


@CASES_IN_CHANNELS_LAST_OR_BOTH
def test_second_order_gradients(case: Case, layout: str) -> None:
    def penalty(inputs: list[Tensor], impl: str) -> tuple[Tensor, ...]:
        outputs = flat(case.run(*inputs, impl=impl))
        first = torch.autograd.grad(sum(o.sin().sum() for o in outputs), inputs, create_graph=True)
        return torch.autograd.grad(sum((g.sin() * g).sum() for g in first), inputs)

    inputs = case.inputs(features((2, 3, 4, 5), torch.float32, CPU, layout))
    exact = penalty([i.detach().double().requires_grad_() for i in inputs], "reference")
    for actual, expected in zip(penalty(inputs, "native"), exact, strict=True):
        assert_close(actual, expected, torch.float32)


@both_layouts
def test_the_ops_keep_torchs_rules(layout: str) -> None:
    x = features((2, 3, 4, 5), torch.float32, CPU, layout)
    grad = features((2, 3, 6, 7), torch.float32, CPU, layout)
    ops = torch.ops.fastgan
    mean, std = (s.detach().requires_grad_() for s in fg.instance_stats(x))
    plane = mean.detach()
    weight, bias = (v.requires_grad_() for v in affine(x, 3))
    for op, arguments in [
        (ops.instance_stats, (x, 1e-5, 1)),
        (ops.instance_stats_backward, (mean, std, x, plane, plane, 1e-5, 1)),
        (ops.instance_norm, (x, weight, bias, x, None, 1.0, 0.2, 1, 1e-5, 0)),
        (ops.instance_norm, (x, std, mean, None, torch.rand(2), 1.0, 1.0, 0, 1e-5, 1)),
        (
            ops.instance_norm_backward,
            (grad / 100, x, weight, bias, None, plane, plane + 1, 1.0, 0.2, 1, 1e-5, 0),
        ),
        (ops.adain, (x, x, None, 0.5, 1e-5, 1)),
        (ops.reflection_pad2d, (x, 1, 2, 0, 3)),
    ]:
        torch.library.opcheck(op.default, (*arguments, "native"))


@CASES_IN_CHANNELS_LAST_OR_BOTH
def test_compiles_without_a_graph_break(case: Case, layout: str) -> None:
    torch._dynamo.reset()
    inputs = case.inputs(features((2, 3, 4, 5), torch.float32, CPU, layout))
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    outputs = flat(compiled(*inputs, impl="native"))
    expected = flat(case.run(*inputs, impl="native"))
    grads = torch.autograd.grad(outputs, inputs, [o.detach() for o in outputs])
    expected_grads = torch.autograd.grad(expected, inputs, [o.detach() for o in expected])
    for a, b in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


# --- Threads ------------------------------------------------------------------------------------


def bits(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    outputs = flat(case.run(*inputs, impl="native"))
    return [*outputs, *torch.autograd.grad(outputs, inputs, [o.detach() for o in outputs])]


@both_layouts
@pytest.mark.parametrize("name", ["stats", "norm, relu, pad", "adain"])
def test_same_bits_whatever_the_threads(name: str, layout: str) -> None:
    case = CASES[name]
    inputs = case.inputs(features((3, 130, 40, 41), torch.float32, CPU, layout))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = bits(case, inputs)
        for count in (2, 3, 4):
            torch.set_num_threads(count)
            assert all(map(torch.equal, bits(case, inputs), expected))
    finally:
        torch.set_num_threads(before)


def test_called_from_several_threads_at_once() -> None:
    problems = [
        (CASES[name], CASES[name].inputs(features((2, 70, 40, 41), torch.float32, CPU, layout)))
        for name in ("norm, relu, pad", "adain", "stats")
        for layout in ("contiguous", "channels_last")
    ]
    expected = [bits(*problem) for problem in problems]
    right: list[int] = []

    def work(i: int) -> None:
        results = [bits(*problems[i]) for _ in range(5)]
        if all(all(map(torch.equal, result, expected[i])) for result in results):
            right.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(right) == list(range(len(problems)))


# --- Which calls take them ----------------------------------------------------------------------


def test_they_are_the_automatic_choice_for_fp32() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert fg.explain(fg.instance_norm, x).impl == "native"
    assert fg.explain(fg.adain, x, x).impl == "native"
    assert_close(fg.instance_norm(x), F.instance_norm(x.double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_take_the_reference_path(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 5)
    explanation = fg.explain(fg.instance_norm, x.to(dtype))
    assert explanation.impl == "reference"
    assert f"CPU kernels take float32, got {dtype}" in explanation.reasons["native"]
    with pytest.raises(fg.ImplUnavailableError, match="CPU kernels take float32"):
        fg.adain(x, x.to(dtype), impl="native")
