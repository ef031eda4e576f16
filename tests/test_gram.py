"""The Triton kernels for Gram matrices and the style loss, against the fp64 reference.

They run on the GPU where there is one, else in Triton's interpreter.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgan as fg
from tolerances import assert_close

pytest.importorskip("triton")
from fastgan.kernels import gram as kernels
from fastgan.ops import gram as ops
from triton_harness import (
    INTERPRETED,
    counted_launches,
    counted_traffic,
    poisoned_buffers,
    shuffled_programs,
)

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "of more channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "channels_last of more": lambda x: torch.cat([x.movedim(1, 3)] * 2, 3)[
        ..., : x.shape[1]
    ].movedim(3, 1),
    "of more rows": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "every second column": lambda x: torch.stack([x, x], -1).flatten(3)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "one image for all": lambda x: x[:1].expand(x.shape),
    "shifted by one element": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}
BOTH_LAYOUTS = ("contiguous", "channels_last")


def features(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, layout: str = "contiguous"
) -> Tensor:
    """Channels of different means, as after a ReLU."""
    x = torch.randn(*shape) + torch.rand(shape[1]).view(-1, *[1] * (len(shape) - 2))
    return LAYOUTS[layout](x.to(device, dtype)).detach().requires_grad_()


def exactly(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def loss_scale(grads: Sequence[Tensor]) -> float:
    """What brings gradients into the range of fp16."""
    largest = max((g.abs().max().item() for g in grads if g.numel()), default=0.0)
    return 1 / largest if largest else 1.0


def check_gram(x: Tensor, normalize: str = "chw") -> None:
    """Values and gradients, from buffers that held NaN, for an upstream that is not symmetric."""
    (exact_x,) = exactly([x])
    exact = fg.gram_matrix(exact_x, normalize=normalize, impl="reference")
    upstream = torch.randn_like(exact)
    upstream *= loss_scale(torch.autograd.grad(exact, exact_x, upstream, retain_graph=True))
    upstream = upstream.float().double()
    (exact_grad,) = torch.autograd.grad(exact, exact_x, upstream)
    with poisoned_buffers():
        gram = fg.gram_matrix(x, normalize=normalize, impl="triton")
        (grad,) = torch.autograd.grad(gram, x, upstream.float())
    assert_close(gram, exact, what="Gram matrix")
    assert torch.equal(gram, gram.mT)
    assert grad.stride() == torch.empty_like(x).stride()
    assert_close(grad, exact_grad, x.dtype, what="gradient")


def check_style_loss(layers: Sequence[Tensor], targets: Sequence[Tensor], **options: Any) -> None:
    """Value and gradients of all layers and of the targets that require them."""
    exact_layers, exact_targets = exactly(layers), exactly(targets)
    exact = fg.style_loss(exact_layers, exact_targets, impl="reference", **options)
    differentiable = [x for x in (*exact_layers, *exact_targets) if x.requires_grad]
    scale = loss_scale(torch.autograd.grad(exact, differentiable, retain_graph=True))
    exact_grads = torch.autograd.grad(scale * exact, differentiable)
    with poisoned_buffers():
        loss = fg.style_loss(layers, targets, impl="triton", **options)
        differentiable = [x for x in (*layers, *targets) if x.requires_grad]
        grads = torch.autograd.grad(scale * loss, differentiable)
    assert loss.dtype == torch.float32
    assert_close(loss, exact, what="loss")
    for i, (x, grad, exact_grad) in enumerate(zip(differentiable, grads, exact_grads, strict=True)):
        assert grad.stride() == torch.empty_like(x).stride()
        assert_close(grad, exact_grad, x.dtype, what=f"gradient {i}")


def targets_for(layers: Sequence[Tensor], batch: int | None = None) -> list[Tensor]:
    """Any matrices, not only symmetric ones, of the size of the layers' Gram matrices."""
    return [
        0.3 * torch.randn(len(x) if batch is None else batch, x.shape[1], x.shape[1]).to(x.device)
        for x in layers
    ]


# --- Values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 16, 48, 64, 65, 128, 130])
def test_channels(channels: int, layout: str, device: torch.device) -> None:
    check_gram(features((2, channels, 5, 8), torch.bfloat16, device, layout))


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    for channels in (24, 136):
        check_gram(features((1, channels, 4, 8), dtype, device, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3, 5), (14, 14)], ids=str)
def test_positions(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    for layout in BOTH_LAYOUTS:
        check_gram(features((2, 20, *size), dtype, device, layout))


def test_1023_positions(device: torch.device) -> None:
    for layout in BOTH_LAYOUTS:
        check_gram(features((1, 20, 31, 33), torch.float16, device, layout))


@pytest.mark.parametrize("normalize", ["chw", "hw", "none"])
def test_normalizations(normalize: str, device: torch.device) -> None:
    x = features((2, 6, 4, 5), torch.float32, device)
    check_gram(x, normalize)
    check_style_loss([x], targets_for([x]), normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    check_gram(features((3, 16, 4, 6), dtype, device, layout))


def test_sequences_of_positions(device: torch.device) -> None:
    check_gram(features((2, 5, 77), torch.float32, device))
    x = features((2, 77, 5), torch.float32, device).detach().mT.requires_grad_()
    check_gram(x)


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few positions are shared out among many programs, as many positions are."""
    monkeypatch.setattr(kernels, "MIN_RUN", 1)
    kernels.plan.cache_clear()
    yield
    kernels.plan.cache_clear()


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 16, 33), (1, 65, 17, 17), (1, 132, 9, 9)], ids=str)
def test_shares_of_positions(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    check_gram(features(shape, dtype, device, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_65537_positions(dtype: torch.dtype, device: torch.device) -> None:
    x = features((1, 3, 1, 65537), dtype, device)
    gram = fg.gram_matrix(x, impl="triton")
    assert_close(gram, fg.gram_matrix(x.double(), impl="reference"))


def test_512_channels(device: torch.device) -> None:
    x = features((1, 512, 5, 5), torch.bfloat16, device)
    check_style_loss([x], targets_for([x]))


def test_a_large_batch(device: torch.device) -> None:
    x = features((32, 3, 2, 3), torch.float32, device)
    check_gram(x)
    check_style_loss([x], targets_for([x], batch=1))


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (0, 3, 0), (1, 1, 1)], ids=str
)
def test_nothing_in_some_axis(shape: tuple[int, ...], device: torch.device) -> None:
    x = features(shape, torch.float32, device)
    check_gram(x)
    check_style_loss([x], [t.requires_grad_() for t in targets_for([x])])


SIZES = st.sampled_from([0, 1, 2, 3, 5, 8, 13, 17])
SHAPES = st.tuples(
    st.sampled_from([0, 1, 2, 3]), st.sampled_from([0, 1, 2, 7, 16, 31, 66, 129]), SIZES, SIZES
)
EXAMPLES = settings(max_examples=20, deadline=None, derandomize=True, database=None)


@interpreted
@EXAMPLES
@given(
    SHAPES, st.sampled_from(DTYPES), st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(["chw", "hw", "none"]),
)  # fmt: skip
def test_any_feature_map(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, normalize: str
) -> None:
    check_gram(features(shape, dtype, torch.device("cpu"), layout), normalize)


@interpreted
@EXAMPLES
@given(
    st.lists(st.tuples(SHAPES, st.sampled_from(sorted(LAYOUTS)), st.booleans()), min_size=1,
             max_size=3),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_layers(layers: list[tuple[tuple[int, ...], str, bool]], dtype: torch.dtype) -> None:
    maps = [features(shape, dtype, torch.device("cpu"), layout) for shape, layout, _ in layers]
    targets = [
        targets_for([x], batch=1 if shared and len(x) else None)[0]
        for x, (_, _, shared) in zip(maps, layers, strict=True)
    ]
    check_style_loss(maps, targets)


# --- The style loss over several layers ---------------------------------------------------------


def pyramid(dtype: torch.dtype, device: torch.device, layout: str = "contiguous") -> list[Tensor]:
    """Layers that take different tiles, splits and alignments."""
    shapes = [(2, 16, 16, 16), (1, 66, 9, 9), (1, 130, 8, 8), (1, 20, 1, 3), (1, 20, 5, 5)]
    return [features(shape, dtype, device, layout) for shape in shapes]


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    layers = pyramid(dtype, device, layout)
    check_style_loss(layers, targets_for(layers), weights=[1.0, 0.5, 2.0, 0.0, 1.0])


def test_layers_of_different_kinds(device: torch.device) -> None:
    """Layouts, batches and ranks differ; a layer without images adds nothing."""
    shapes = {(2, 20, 6, 6): "channels_last", (3, 4, 9): "contiguous", (0, 5, 4, 4): "contiguous"}
    layers = [features(s, torch.float32, device, layout) for s, layout in shapes.items()]
    check_style_loss(layers, targets_for(layers))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_targets(batch: int, dtype: torch.dtype, device: torch.device) -> None:
    layers = [features((2, c, 4, 4), torch.float32, device) for c in (3, 20)]
    targets = [t.to(dtype).requires_grad_() for t in targets_for(layers, batch)]
    check_style_loss(layers, targets, weights=[1.0, 3.0])
    targets[0].requires_grad_(False)
    check_style_loss(layers, targets)
    check_style_loss([x.detach() for x in layers], targets)


def test_targets_of_any_strides_and_dtype(device: torch.device) -> None:
    x = features((2, 6, 4, 4), torch.float32, device)
    (target,) = targets_for([x])
    check_style_loss([x], [target.mT])
    check_style_loss([x], [target[:1].expand(2, 6, 6)])
    loss = fg.style_loss(x, target.double(), impl="triton")
    assert loss.dtype == torch.float32


def test_features_equal_to_the_style_have_no_loss(device: torch.device) -> None:
    x = features((2, 20, 9, 9), torch.bfloat16, device)
    target = fg.gram_matrix(x.detach(), impl="triton")
    loss = fg.style_loss(x, target, impl="triton")
    (grad,) = torch.autograd.grad(loss, x)
    assert loss == 0
    assert not grad.any()


# --- Range --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [1e-4, 1e3])
def test_16_bits_neither_overflow_nor_underflow(
    magnitude: float, dtype: torch.dtype, device: torch.device
) -> None:
    x = (magnitude * torch.randn(1, 8, 64, 64)).to(device, dtype).requires_grad_()
    gram = fg.gram_matrix(x, impl="triton")
    assert gram.isfinite().all()
    assert (gram.diagonal(dim1=1, dim2=2) > 0).all()
    assert_close(gram, fg.gram_matrix(x.double(), impl="reference"))
    check_style_loss([x], [torch.zeros_like(gram)])


def test_gradients_of_faint_channels_keep_their_precision(device: torch.device) -> None:
    """Rows of the gradient far below the largest one, in fp16."""
    faintness = torch.logspace(0, -3, 8).view(1, 8, 1, 1)
    x = (torch.randn(1, 8, 16, 16) * faintness).half().to(device).requires_grad_()
    upstream = torch.randn(1, 8, 8).to(device) * faintness.view(1, 8, 1).to(device)
    upstream = 1e3 * (upstream + upstream.mT)
    (exact_x,) = exactly([x])
    (exact,) = torch.autograd.grad(fg.gram_matrix(exact_x), exact_x, upstream.double())
    (grad,) = torch.autograd.grad(fg.gram_matrix(x, impl="triton"), x, upstream)
    for channel in range(8):
        assert_close(grad[:, channel], exact[:, channel], what=f"channel {channel}")


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_stays_so(device: torch.device) -> None:
    for value in (math.nan, math.inf):
        x = features((1, 4, 5, 5), torch.float16, device).detach()
        x[0, 1, 2, 2] = value
        x.requires_grad_()
        loss = fg.style_loss(x, torch.zeros(1, 4, 4, device=device), impl="triton")
        assert not loss.isfinite()
        (grad,) = torch.autograd.grad(loss, x)
        assert not grad.isfinite().all()


# --- Reproducible, and cheap --------------------------------------------------------------------


@interpreted
@pytest.mark.usefixtures("short_runs")
def test_program_order_changes_no_bit() -> None:
    layers = pyramid(torch.bfloat16, torch.device("cpu"))
    targets = targets_for(layers)

    def bits() -> list[Tensor]:
        loss = fg.style_loss(layers, targets, impl="triton")
        gram = fg.gram_matrix(layers[1], impl="triton")
        return [loss, gram, *torch.autograd.grad(loss, layers)]

    expected = bits()
    for seed in range(2):
        with shuffled_programs(seed), counted_traffic() as traffic:
            assert all(torch.equal(a, b) for a, b in zip(bits(), expected, strict=True))
        assert traffic.atomics == 0


@interpreted
@pytest.mark.parametrize("layers", [1, 5])
def test_launches_do_not_grow_with_layers(layers: int) -> None:
    maps = pyramid(torch.bfloat16, torch.device("cpu"))[:layers]
    targets = targets_for(maps)
    with counted_launches() as forward:
        loss = fg.style_loss(maps, targets, impl="triton")
    with counted_launches() as backward:
        torch.autograd.grad(loss, maps, torch.ones_like(loss))
    assert forward == ["gram_partial_kernel", "gram_finish_kernel", "sum"]
    assert [name for name in backward if name != "ones_like"] == [
        "gram_symmetrize_kernel",
        "gram_bwd_kernel",
    ]


@interpreted
def test_features_are_read_once() -> None:
    B, C, P = 2, 64, 64 * 64
    x = features((B, C, 64, 64), torch.bfloat16, torch.device("cpu"))
    target = torch.zeros(B, C, C)
    F, matrices = x.nbytes, B * C * C * 4
    with counted_traffic() as forward:
        loss = fg.style_loss(x, target, impl="triton")
    with counted_traffic() as backward:
        torch.autograd.grad(loss, x)
    shares = kernels.splits([P // 128], [1], [B], 2, 132, 2)[0]
    assert shares > 1
    lower = C * (C + 32) // 2 * B * 4  # what is added up, in blocks of 32
    programs = B * 2 * 3 // 2
    assert forward.loaded == F + shares * lower + matrices
    assert forward.stored == shares * matrices + matrices + programs * 4
    steps = math.ceil(P / 256)  # each reads the factor and the scales of its rows
    row_scales = B * C * 4
    assert backward.stored == F + matrices // 2 + row_scales
    assert backward.loaded == F + 2 * matrices + steps * (matrices // 2 + row_scales) + B * 4 * 4


@interpreted
def test_one_launch_where_the_positions_are_not_shared_out() -> None:
    x = features((2, 20, 5, 5), torch.float32, torch.device("cpu"))
    with counted_launches() as launches, torch.no_grad():
        fg.gram_matrix(x, impl="triton")
    assert launches == ["gram_partial_kernel"]


@interpreted
def test_the_graph_holds_only_features_targets_and_differences() -> None:
    layers = pyramid(torch.bfloat16, torch.device("cpu"))
    targets = targets_for(layers)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fg.style_loss(layers, targets, impl="triton")
    given = {x.data_ptr() for x in (*layers, *targets)}
    extra = [x for x in saved if x.data_ptr() not in given]
    assert sum(x.nbytes for x in extra) == sum(len(x) * x.shape[1] ** 2 * 4 for x in layers)


def test_splits_fill_the_device_with_equal_programs() -> None:
    for batch in (1, 2, 8, 32):
        for steps in ([512], [2048, 512, 64], [16], [64, 8]):
            shares = kernels.splits(steps, [1] * len(steps), [batch] * len(steps), 8, 132)
            assert all(1 <= n <= kernels.MAX_SPLITS for n in shares)
            for n, share in zip(steps, shares, strict=True):
                run = math.ceil(n / share)
                assert share == 1 or run >= kernels.MIN_RUN / 2
                assert run * (share - 1) < n  # no share is empty
            assert batch * sum(shares) <= max(4 * 132, batch * len(steps))
    assert kernels.splits([512], [1], [1], 8, 132)[0] > 32
    assert kernels.splits([512], [1], [4000], 8, 132) == (1,)
    assert kernels.splits([0], [1], [1], 8, 132) == (1,)


def test_splits_weigh_what_the_sums_cost() -> None:
    assert kernels.splits([256], [1], [8], 8, 132) == (16,)  # one program of each multiprocessor
    assert kernels.splits([256], [1], [8], 0, 132, 2) == (32,)  # two, which cost nothing
    assert kernels.splits([16], [2], [80], 8, 132) == (1,)
    assert kernels.splits([64], [2], [80], 8, 132) == (3,)  # 160 programs would not fit evenly


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_fp32_products_follow_torchs_setting(precision: str, device: torch.device) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x = features((2, 130, 8, 8), torch.float32, device)
        exact = fg.gram_matrix(x.double(), impl="reference")
        gram = fg.gram_matrix(x, impl="triton")
        # TF32 keeps as many bits as fp16.
        assert_close(gram, exact, torch.float32 if precision == "highest" else torch.float16)
        block_c = kernels._planned([x])[1].tiling.block_c
        assert block_c == ((64,) if precision == "highest" else (128,))
    finally:
        torch.set_float32_matmul_precision(before)


# --- Autograd, compile, autocast, dispatch ------------------------------------------------------


def test_second_order_gradients(device: torch.device) -> None:
    """Of fp32 calls, against fp64: through features, targets and the upstream gradient."""

    def penalties(tensors: list[Tensor], impl: str) -> tuple[Tensor, ...]:
        layers, targets, factor = tensors[:2], tensors[2:4], tensors[4]
        loss = factor * fg.style_loss(layers, targets, weights=[1.0, 2.0], impl=impl)
        gram = fg.gram_matrix(layers[0], impl=impl)
        first = torch.autograd.grad(loss + gram.sin().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(
            sum((g.sin() * g).sum() for g in first), tensors, create_graph=True
        )
        return torch.autograd.grad(sum((g.sin() * g).sum() for g in second), tensors)

    layers = [features((2, c, 4, 3), torch.float32, device) for c in (3, 5)]
    targets = [t.requires_grad_() for t in targets_for(layers, batch=1)]
    factor = torch.tensor(2.0, device=device, requires_grad=True)
    tensors = [*layers, *targets, factor]
    exact = penalties(exactly(tensors), "reference")
    for actual, expected in zip(penalties(tensors, "triton"), exact, strict=True):
        assert_close(actual, expected, torch.float32)


def test_second_order_gradients_of_features_alone(device: torch.device) -> None:
    """Frozen targets: a gradient penalty on the loss."""
    layers = [features((2, c, 4, 3), torch.float32, device) for c in (3, 5)]
    targets = targets_for(layers)

    def penalty(layers: list[Tensor], impl: str) -> tuple[Tensor, ...]:
        loss = fg.style_loss(layers, [t.to(layers[0].dtype) for t in targets], impl=impl)
        first = torch.autograd.grad(loss, layers, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), layers, allow_unused=True)

    exact, exact_none = penalty(exactly(layers), "reference")
    actual, none = penalty(layers, "triton")
    assert_close(actual, exact)
    assert exact_none is None
    assert none is None or not none.any()


def test_opcheck(device: torch.device) -> None:
    layers = [features((2, c, 4, 3), torch.float32, device) for c in (3, 20)]
    layers[1] = features((2, 20, 4, 3), torch.float32, device, "channels_last")
    targets = [t.requires_grad_() for t in targets_for(layers, batch=1)]
    registered = torch.ops.fastgan
    torch.library.opcheck(registered.gram_matrix.default, (layers[1], "chw"))
    grad = torch.randn(2, 20, 20, device=device, requires_grad=True)
    torch.library.opcheck(registered.gram_matrix_backward.default, (grad, layers[1], "chw"))
    options = ("hw", [1.0, 2.0])
    torch.library.opcheck(registered.style_loss.default, (layers, targets, *options))
    _, differences = registered.style_loss(layers, targets, *options)
    upstream = torch.tensor(2.0, device=device, requires_grad=True)
    for of_targets in (True, False):
        arguments = (upstream, differences, layers, targets, of_targets, *options)
        torch.library.opcheck(registered.style_loss_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool, device: torch.device) -> None:
    def loss(layers: list[Tensor], targets: list[Tensor]) -> Tensor:
        return (
            fg.style_loss(layers, targets, impl="triton")
            + fg.gram_matrix(layers[0], impl="triton").sum()
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (4, 7):
        layers = [features((2, 3, size, 5), torch.float32, device, "channels_last")]
        layers.append(features((2, 20, size, size), torch.float32, device))
        targets = [t.requires_grad_() for t in targets_for(layers, batch=1)]
        tensors = [*layers, *targets]
        value, expected = compiled(layers, targets), loss(layers, targets)
        assert torch.equal(value, expected)
        grads = torch.autograd.grad(value, tensors)
        for a, b in zip(grads, torch.autograd.grad(expected, tensors), strict=True):
            assert a.stride() == b.stride()
            assert torch.equal(a, b)


class Properties(NamedTuple):
    """What the choice asks of a GPU."""

    major: int


@pytest.mark.skipif(
    torch.__version__ < "2.14", reason="older TorchDynamo knows the properties of real GPUs only"
)
def test_the_automatic_choice_compiles(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """The query of the capability, which decides it on a GPU, breaks no graph."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "_get_device_properties", lambda _: Properties(7), raising=False
    )

    def flag(x: Tensor) -> Tensor:
        return x + (ops._why_slower(torch.device("cuda", 0)) is not None)

    zero = torch.zeros((), device=device)
    assert torch.compile(flag, fullgraph=True, backend="eager")(zero) == 1
    x = features((2, 3, 4, 4), torch.float32, device)
    automatic = torch.compile(fg.gram_matrix, fullgraph=True, backend="aot_eager")
    assert_close(automatic(x), fg.gram_matrix(x.double()))


def test_capability_decides_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4, device="cuda")
        target = torch.empty(1, 3, 3, device="cuda")
    for major, chosen in {7: "reference", 8: "triton", 9: "triton"}.items():
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, major=major: Properties(major)
        )
        for explanation in (fg.explain(fg.gram_matrix, x), fg.explain(fg.style_loss, x, target)):
            assert explanation.impl == chosen
            assert ("8.0" in explanation.reasons.get("triton", "")) == (chosen == "reference")
        assert fg.explain(fg.gram_matrix, x, impl="triton").impl == "triton"


def test_what_triton_cannot_run_is_refused_with_the_reason(device: torch.device) -> None:
    x = torch.randn(1, 2, 3, 3, device=device)
    with pytest.raises(fg.ImplUnavailableError, match="float64 runs on the reference path"):
        fg.gram_matrix(x.double(), impl="triton")
    assert fg.explain(fg.gram_matrix, x.double()).impl == "reference"
    target = torch.zeros(1, 2, 2, device=device)
    with pytest.raises(fg.ImplUnavailableError, match="layers of one dtype"):
        fg.style_loss([x, x.half()], [target, target], impl="triton")
    assert fg.style_loss([x, x.half()], [target, target]).dtype == torch.float32
    if not INTERPRETED:
        with pytest.raises(fg.ImplUnavailableError, match="TRITON_INTERPRET=1"):
            fg.gram_matrix(x.cpu(), impl="triton")


def test_autocast_changes_nothing(device: torch.device) -> None:
    layers = [features((2, 5, 4, 4), torch.float16, device)]
    targets = targets_for(layers)

    def everything() -> list[Tensor]:
        loss = fg.style_loss(layers, targets, impl="triton")
        gram = fg.gram_matrix(layers[0], impl="triton")
        (first,) = torch.autograd.grad(loss + gram.sum(), layers, create_graph=True)
        return [loss, gram, first, *torch.autograd.grad(first.float().square().sum(), layers)]

    expected = everything()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under_autocast = everything()
    assert [x.dtype for x in under_autocast] == [torch.float32] * 2 + [torch.float16] * 2
    assert all(torch.equal(a, b) for a, b in zip(under_autocast, expected, strict=True))


# --- The module ---------------------------------------------------------------------------------


def test_a_kept_style_is_saved_and_loaded(device: torch.device) -> None:
    layers = [features((1, c, 4, 4), torch.float32, device).detach() for c in (3, 5)]
    saved = fg.nn.GramStyleLoss()
    saved.set_style(layers)
    fresh, other = fg.nn.GramStyleLoss(), fg.nn.GramStyleLoss()
    other.set_style([layers[1], layers[1], layers[0]])
    for module in (fresh, other):
        holder = torch.nn.ModuleDict({"style": module})
        holder.load_state_dict(torch.nn.ModuleDict({"style": saved}).state_dict())
        assert torch.equal(module([x * 2 for x in layers]), saved([x * 2 for x in layers]))
    assert set(other.state_dict()) == {"target0", "target1"}


def test_the_module_passes_gradients_to_features_alone(device: torch.device) -> None:
    x = features((2, 3, 4, 4), torch.float32, device)
    module = fg.nn.GramStyleLoss().to(device)
    module.set_style(x)
    assert not module.get_buffer("target0").requires_grad
    with fg.use_impl(gram="triton"):
        (grad,) = torch.autograd.grad(module(2 * x), x)
    (exact_x,) = exactly([x])
    exact = fg.style_loss(2 * exact_x, module.get_buffer("target0").double())
    assert_close(grad, torch.autograd.grad(exact, exact_x)[0])


# --- On a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_small_layers_for_the_sanitizer(layout: str, device: torch.device) -> None:
    layers = pyramid(torch.bfloat16, device, layout)
    check_style_loss(layers, [t.requires_grad_() for t in targets_for(layers, batch=1)])
    check_gram(layers[1])


@pytest.mark.gpu
def test_same_bits_twice_and_from_a_graph_without_a_wait(device: torch.device) -> None:
    layers = [
        features((4, c, s, s), torch.bfloat16, device, "channels_last")
        for c, s in ((64, 128), (128, 64), (512, 32))
    ]
    targets = targets_for(layers, batch=1)

    def step() -> list[Tensor]:
        loss = fg.style_loss(layers, targets)
        return [loss, *torch.autograd.grad(loss, layers)]

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.detach().fill_(math.nan)
    for _ in range(2):
        graph.replay()
    for a, b, c in zip(again, captured, expected, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Features of 4.3 billion bytes: the last channels lie beyond 2^31 elements."""
    if torch.cuda.get_device_properties(device).total_memory < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    x = torch.zeros(1, 16, 1, 2**27 + 2**24, dtype=torch.bfloat16, device=device)
    x[0, 15, 0, -1000:] = 1
    x[0, 0, 0, -500:] = 1
    x.requires_grad_()
    gram = fg.gram_matrix(x, normalize="none", impl="triton")
    assert gram[0, 15, 15] == 1000
    assert gram[0, 15, 0] == gram[0, 0, 15] == 500
    (grad,) = torch.autograd.grad(gram[0, 15, 0], x)
    assert grad[0, 15, 0].float().sum() == 500
    assert grad[0, 0, 0].float().sum() == 1000
    assert not grad[0, 1:15].any()
