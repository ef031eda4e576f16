"""The C++/CUDA GAN losses against the fp64 reference: on a GPU where there is one, else on CPU."""

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

import fastgan as fg
from fastgan import reference
from fastgan.ops import _dispatch
from tolerances import assert_close

if _dispatch.missing("native", "cuda" if torch.cuda.is_available() else "cpu"):
    pytest.skip("fastgan._C is not live", allow_module_level=True)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MODES = ["bce", "lsgan", "hinge", "wgan"]
SCALES = {
    "one": [(4, 1, 6, 6)],
    "three": [(8, 1, 30, 30), (8, 1, 15, 15), (8, 1, 7, 7)],
    "five": [(3,), (1, 1), (2, 3, 5, 7), (129,), (1, 2, 3, 4, 5)],
}
BEYOND_ONE_BLOCK = [(200, 300), (3, 1, 170, 171), (17,)]  # of a CUDA kernel; several chunks on CPU
BEYOND_ONE_TABLE = [(i % 5 + 1,) for i in range(70)]

losses = pytest.mark.parametrize(
    ("mode", "smoothing", "saturating"),
    [*((mode, 0.0, False) for mode in MODES), ("bce", 0.1, True)],
    ids=[*MODES, "bce smoothed, saturating"],
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh buffers hold NaN, so that an output that is not written fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def logits(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("fp64 has no CUDA kernel")
    return [(4 * torch.randn(*s) + 0.5).to(device, dtype).requires_grad_() for s in shapes]


def exact(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def check_gradients(
    loss: Tensor, inputs: list[Tensor], expected: Tensor, exacts: list[Tensor]
) -> None:
    # As in fp16 training, where the share of one logit in the mean may underflow.
    scaler = float(min(max(x.numel() for x in inputs), 4096))
    grads = torch.autograd.grad(scaler * loss, inputs)
    expected_grads = torch.autograd.grad(scaler * expected, exacts)
    for x, grad, expected_grad in zip(inputs, grads, expected_grads, strict=True):
        assert grad.dtype == x.dtype
        assert grad.stride() == torch.empty_like(x).stride()
        assert_close(grad, expected_grad)


def check_discriminator(real: list[Tensor], fake: list[Tensor], **options: object) -> None:
    wide = torch.float64 if real[0].dtype == torch.float64 else torch.float32
    exact_real, exact_fake = exact(real), exact(fake)
    loss, stats = fg.discriminator_loss_with_stats(real, fake, impl="native", **options)
    expected, expected_stats = fg.discriminator_loss_with_stats(
        exact_real, exact_fake, impl="reference", **options
    )
    assert loss.dtype == wide
    assert loss.shape == ()
    assert_close(loss, expected)
    for name in stats._fields:
        value = getattr(stats, name)
        assert value.dtype == torch.float32
        assert not value.requires_grad
        assert_close(value, getattr(expected_stats, name), what=name)
    assert torch.equal(loss, fg.discriminator_loss(real, fake, impl="native", **options))
    check_gradients(loss, real + fake, expected, exact_real + exact_fake)


def check_generator(fake: list[Tensor], **options: object) -> None:
    exact_fake = exact(fake)
    loss = fg.generator_loss(fake, impl="native", **options)
    expected = fg.generator_loss(exact_fake, impl="reference", **options)
    assert loss.dtype == (torch.float64 if fake[0].dtype == torch.float64 else torch.float32)
    assert_close(loss, expected)
    check_gradients(loss, fake, expected, exact_fake)


# --- Values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@losses
def test_against_the_formulas(
    mode: str,
    smoothing: float,
    saturating: bool,
    dtype: torch.dtype,
    scales: str,
    reduction: str,
    device: torch.device,
) -> None:
    real, fake = logits(SCALES[scales], dtype, device), logits(SCALES[scales][::-1], dtype, device)
    options = {"mode": mode, "scale_reduction": reduction}
    check_discriminator(real, fake, label_smoothing=smoothing, **options)
    check_generator(fake, saturating=saturating, **options)


@pytest.mark.sanitize
@pytest.mark.parametrize("shapes", [BEYOND_ONE_BLOCK, BEYOND_ONE_TABLE], ids=["large", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_and_many(
    dtype: torch.dtype, shapes: list[tuple[int, ...]], device: torch.device
) -> None:
    real, fake = logits(shapes, dtype, device), logits(shapes, dtype, device)
    check_discriminator(real, fake, scale_reduction="mean")
    check_generator(fake, mode="lsgan")


@pytest.mark.sanitize
def test_a_single_tensor(device: torch.device) -> None:
    (real,), (fake,) = (
        logits([(2, 1, 9, 9)], torch.float32, device),
        logits([(2, 1, 9, 9)], torch.float32, device),
    )
    one = fg.discriminator_loss(real, fake, impl="native")
    assert torch.equal(one, fg.discriminator_loss([real], [fake], impl="native"))
    assert torch.equal(
        fg.generator_loss(fake, impl="native"), fg.generator_loss([fake], impl="native")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [30.0, 1e4])
@losses
def test_extreme_logits_have_exact_limits(
    mode: str,
    smoothing: float,
    saturating: bool,
    magnitude: float,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    def extreme() -> list[Tensor]:
        x = torch.tensor([magnitude, -magnitude, 0.0], device=device)
        return [x.to(dtype).requires_grad_()]

    check_discriminator(extreme(), extreme(), mode=mode, label_smoothing=smoothing)
    check_generator(extreme(), mode=mode, saturating=saturating)


def test_confident_logits_have_exact_zeros(device: torch.device) -> None:
    real = torch.full((5,), 1e4, device=device, requires_grad=True)
    fake = torch.full((5,), -1e4, device=device, requires_grad=True)
    loss = fg.discriminator_loss(real, fake, impl="native")
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, [real, fake]):
        assert torch.equal(grad, torch.zeros_like(grad))
    wrong = fg.discriminator_loss(fake, real, impl="native")
    assert wrong.item() == 2e4


def test_bce_is_exact_to_rounding_for_every_logit(device: torch.device) -> None:
    """Each element by itself: torch's own gradient is off by 0.9 % at logit 12."""
    x = torch.linspace(-80, 80, 3201, device=device)
    x64 = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(reference.softplus(x64).sum(), x64)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(fg.generator_loss(-x, impl="native") * len(x), x)
    relative = ((grad.double() - slope) / slope).abs().max().item()
    assert relative < (2e-6 if device.type == "cuda" else 5e-7), relative

    values = torch.stack([fg.generator_loss(-v, impl="native") for v in x.detach()[::20]])
    expected = reference.softplus(x64.detach()[::20])
    relative = ((values.double() - expected) / expected).abs().max().item()
    assert relative < (2e-6 if device.type == "cuda" else 5e-7), relative


def test_not_a_number_is_not_hidden(device: torch.device) -> None:
    for mode in MODES:
        x = torch.tensor([0.0, float("nan")], device=device, requires_grad=True)
        loss = fg.generator_loss(x, mode=mode, impl="native")
        assert loss.isnan()


# --- Layouts ------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT,
    "sliced": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "half of a batch": lambda x: x.flatten()[7:],
    "flipped": lambda x: x.flip(0),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    (x,) = logits([(6, 3, 8, 10)], dtype, device)
    view = layout(x.detach()).requires_grad_()
    check_discriminator([view], [layout(x.detach() + 1).requires_grad_()])
    check_generator([view], mode="hinge")


def test_gradients_flow_through_views(device: torch.device) -> None:
    """The two halves of one batch through a discriminator."""
    (both,) = logits([(8, 1, 7, 7)], torch.float32, device)
    (both64,) = exact([both])
    loss = fg.discriminator_loss(both[:4], both[4:], impl="native")
    expected = fg.discriminator_loss(both64[:4], both64[4:], impl="reference")
    check_gradients(loss, [both], expected, [both64])


# --- Autograd -----------------------------------------------------------------------------------


def test_only_what_requires_grad_gets_one(device: torch.device) -> None:
    real, fake = (
        logits(SCALES["three"], torch.float32, device),
        logits(SCALES["three"], torch.float32, device),
    )
    detached = [x.detach() for x in real]
    loss = fg.discriminator_loss(detached, fake, impl="native")
    exact_fake = exact(fake)
    expected = fg.discriminator_loss(exact(real), exact_fake, impl="reference")
    check_gradients(loss, fake, expected, exact_fake)
    assert not fg.discriminator_loss(detached, detached, impl="native").requires_grad
    with torch.no_grad():
        assert not fg.discriminator_loss(real, fake, impl="native").requires_grad


def test_retain_graph(device: torch.device) -> None:
    real, fake = (
        logits(SCALES["one"], torch.float32, device),
        logits(SCALES["one"], torch.float32, device),
    )
    loss = fg.discriminator_loss(real, fake, impl="native")
    loss.backward(retain_graph=True)
    first = real[0].grad.clone()
    loss.backward()
    assert torch.equal(real[0].grad, 2 * first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_gradscalers_upstream_gradient(dtype: torch.dtype, device: torch.device) -> None:
    real, fake = logits(SCALES["three"], dtype, device), logits(SCALES["three"], dtype, device)
    exact_real, exact_fake = exact(real), exact(fake)
    loss = fg.discriminator_loss(real, fake, impl="native")
    expected = fg.discriminator_loss(exact_real, exact_fake, impl="reference")
    grads = torch.autograd.grad(65536 * loss, [*real, *fake])
    exact_grads = torch.autograd.grad(65536 * expected, [*exact_real, *exact_fake])
    for grad, expected_grad in zip(grads, exact_grads, strict=True):
        assert_close(grad, expected_grad)


def test_numerical_gradients_of_the_cpu_kernels() -> None:
    shapes = [(2, 1, 3, 3), (5,)]
    cpu = torch.device("cpu")
    real, fake = logits(shapes, torch.float64, cpu), logits(shapes, torch.float64, cpu)
    for mode in MODES:

        def loss(*x: Tensor, mode: str = mode) -> Tensor:
            return fg.discriminator_loss(list(x[:2]), list(x[2:]), mode=mode, impl="native")

        assert torch.autograd.gradcheck(loss, [*real, *fake])
        assert torch.autograd.gradgradcheck(loss, [*real, *fake])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@losses
def test_second_order_gradients_are_the_references(
    mode: str, smoothing: float, saturating: bool, dtype: torch.dtype, device: torch.device
) -> None:
    def second_order(x: list[Tensor], impl: str) -> tuple[Tensor, ...]:
        real, fake = x[:1], x[1:]
        loss = fg.discriminator_loss(
            real, fake, mode=mode, label_smoothing=smoothing, impl=impl
        ) + fg.generator_loss(fake, mode=mode, saturating=saturating, impl=impl)
        first = torch.autograd.grad(loss.square(), x, create_graph=True)
        penalty = sum(100 * (g.to(loss.dtype)).square().sum() for g in first)
        return torch.autograd.grad(penalty, x)

    x = logits([(3, 1, 5, 5), (4, 7)], dtype, device)
    for actual, expected in zip(
        second_order(x, "native"), second_order(exact(x), "reference"), strict=True
    ):
        # The first-order gradients that enter the penalty are rounded to the dtype of the logits.
        assert_close(actual, expected)


def test_third_order_gradients(device: torch.device) -> None:
    (x,) = logits([(7,)], torch.float32, device)
    (x64,) = exact([x])
    for mode in ("bce", "lsgan"):
        actual, expected = (
            fg.generator_loss(v, mode=mode, impl=impl).square()
            for v, impl in ((x, "native"), (x64, "reference"))
        )
        for _ in range(3):
            (actual,) = torch.autograd.grad(actual.sum(), x, create_graph=True)
            (expected,) = torch.autograd.grad(expected.sum(), x64, create_graph=True)
        assert_close(actual, expected.detach())


# --- Determinism, threads -----------------------------------------------------------------------


def test_same_input_same_bits_whatever_the_threads(device: torch.device) -> None:
    x = logits(BEYOND_ONE_BLOCK, torch.float32, device)

    def run() -> list[Tensor]:
        loss, stats = fg.discriminator_loss_with_stats(x, x[::-1], impl="native")
        return [loss, *stats, *torch.autograd.grad(loss, x)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.sanitize
def test_called_from_several_threads_at_once(device: torch.device) -> None:
    problems = [
        (logits(shapes, torch.float32, device), mode)
        for shapes in (SCALES["three"], BEYOND_ONE_BLOCK)
        for mode in MODES
    ]

    def run(x: list[Tensor], mode: str) -> list[Tensor]:
        loss, stats = fg.discriminator_loss_with_stats(x, x[::-1], mode=mode, impl="native")
        return [loss, *stats, *torch.autograd.grad(loss, x)]

    expected = [run(*problem) for problem in problems]
    right: list[int] = []

    def work(i: int) -> None:
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.cuda.stream(stream):
            results = [run(*problems[i]) for _ in range(5)]
            if all(all(map(torch.equal, result, expected[i])) for result in results):
                right.append(i)

    if device.type == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(right) == list(range(len(problems)))


# --- Registration -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_ops_keep_torchs_rules(mode: str, device: torch.device) -> None:
    real, fake = (
        logits([(2, 1, 3, 3), (4,)], torch.float32, device),
        logits([(5,), (2, 2)], torch.float32, device),
    )
    arguments = (real, fake, mode, 0.1, 0.5)
    torch.library.opcheck(torch.ops.fastgan.gan_loss, arguments)
    grad = torch.ones((), device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.fastgan.gan_loss_backward, (grad, *arguments))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_without_a_graph_break(
    dtype: torch.dtype, dynamic: bool, device: torch.device
) -> None:
    torch._dynamo.reset()

    def both(real: list[Tensor], fake: list[Tensor]) -> Tensor:
        loss, stats = fg.discriminator_loss_with_stats(real, fake, mode="bce", impl="native")
        return loss + stats.real_mean + fg.generator_loss(fake, mode="hinge", impl="native")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (5, 6):
        real, fake = (logits([(2, 1, size, size), (9,)], dtype, device) for _ in range(2))
        loss, expected = compiled(real, fake), both(real, fake)
        assert torch.equal(loss, expected)
        grads = torch.autograd.grad(loss, [*real, *fake])
        for grad, want in zip(grads, torch.autograd.grad(expected, [*real, *fake]), strict=True):
            assert torch.equal(grad, want)


@pytest.mark.slow
def test_inductor_keeps_the_values(device: torch.device) -> None:
    torch._dynamo.reset()

    def step(x: Tensor) -> Tensor:
        return fg.generator_loss([2 * x, x[:, :, ::2].tanh()], impl="native")

    (x,) = logits([(2, 1, 8, 8)], torch.float32, device)
    loss = torch.compile(step, fullgraph=True)(x)
    assert_close(loss, step(x).double())
    (grad,) = torch.autograd.grad(loss, x)
    (expected,) = torch.autograd.grad(step(x), x)
    assert_close(grad, expected.double())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda op, x: op([x], [x], "ls", 0.0, 1.0), ValueError, "mode must be one of .* got 'ls'"),
        (
            lambda op, x: op([x], [x, x.double()], "bce", 0.0, 1.0),
            TypeError,
            r"fake_logits\[1\] must be Float like the other logits, got Double",
        ),
        (
            lambda op, x: op([x], [x[:0]], "bce", 0.0, 1.0),
            ValueError,
            r"fake_logits\[0\] must have elements, got \[0, 3\]",
        ),
    ],
)
def test_the_bare_op_checks_too(
    call: Callable[..., object], error: type[Exception], message: str, device: torch.device
) -> None:
    with pytest.raises(error, match=message):
        call(torch.ops.fastgan.gan_loss, torch.zeros(2, 3, device=device))


def test_it_is_the_automatic_choice(device: torch.device) -> None:
    x = torch.zeros(3, device=device)
    assert fg.explain(fg.discriminator_loss, x, x).impl == "native"
    assert fg.explain(fg.generator_loss, x).impl == "native"


# --- On a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_fp64_takes_the_reference_path_on_a_gpu() -> None:
    x = torch.randn(3, dtype=torch.float64, device="cuda")
    explanation = fg.explain(fg.generator_loss, x)
    assert explanation.impl == "reference"
    assert "fp16, bf16 and fp32" in explanation.reasons["native"]
    with pytest.raises(fg.ImplUnavailableError, match="fp16, bf16 and fp32"):
        fg.generator_loss(x, impl="native")


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    real, fake = (logits(SCALES["three"], torch.float32, torch.device("cuda")) for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = fg.discriminator_loss_with_stats(real, fake, impl="native")
        torch.autograd.grad(loss, [*real, *fake])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shapes", "forward_launches"), [(SCALES["three"], 1), (BEYOND_ONE_BLOCK, 2)]
)
def test_launches(shapes: list[tuple[int, ...]], forward_launches: int) -> None:
    torch.use_deterministic_algorithms(False)  # no fills of fresh buffers
    real, fake = (logits(shapes, torch.float32, torch.device("cuda")) for _ in range(2))
    upstream = torch.ones((), device="cuda")

    def launches(work: Callable[[], object]) -> list[str]:
        work()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        return [e.name for e in profile.events() if "kernel" in e.name or "Mem" in e.name]

    def forward() -> Tensor:
        return fg.discriminator_loss_with_stats(real, fake, impl="native")[0]

    loss = forward()
    assert len(launches(forward)) == forward_launches
    backward = launches(
        lambda: torch.autograd.grad(loss, [*real, *fake], upstream, retain_graph=True)
    )
    assert len(backward) == 1, backward


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", [SCALES["three"], BEYOND_ONE_BLOCK], ids=["one block", "more"])
def test_graph_capture_replays_the_same_bits(shapes: list[tuple[int, ...]]) -> None:
    torch.use_deterministic_algorithms(False)
    real, fake = (logits(shapes, torch.float16, torch.device("cuda")) for _ in range(2))

    def run() -> list[Tensor]:
        loss, stats = fg.discriminator_loss_with_stats(real, fake, impl="native")
        return [loss, *stats, *torch.autograd.grad(loss, [*real, *fake])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for x in (*real, *fake):
            x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(map(torch.equal, captured, run()))


@pytest.mark.gpu
def test_the_device_of_the_logits_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(100, device="cuda:1", requires_grad=True)
    loss = fg.generator_loss(x, impl="native")
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.device == grad.device == x.device
    assert_close(loss, reference.generator_loss(x.detach().double()))
