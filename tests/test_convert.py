"""convert(): models written with torch.nn alone compute the same with the fused modules."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastgan
from fastgan.nn import conversion_report, convert
from plain_cyclegan import ResidualBlock
from tolerances import assert_close
from triton_harness import INTERPRETED


def resnet_generator(width: int = 4, blocks: int = 9) -> nn.Module:
    """The generator of CycleGAN."""
    layers = [
        nn.ReflectionPad2d(3),
        nn.Conv2d(3, width, 7),
        nn.InstanceNorm2d(width),
        nn.ReLU(True),
    ]
    for i in (1, 2):
        layers += [nn.Conv2d(i * width, 2 * i * width, 3, stride=2, padding=1)]
        layers += [nn.InstanceNorm2d(2 * i * width), nn.ReLU(True)]
    layers += [ResidualBlock(4 * width) for _ in range(blocks)]
    for i in (4, 2):
        layers += [nn.ConvTranspose2d(i * width, i * width // 2, 3, 2, 1, output_padding=1)]
        layers += [nn.InstanceNorm2d(i * width // 2), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())


class ConvBlock(nn.Module):
    """A convolution with padding, norm and activation in attributes, as in MUNIT."""

    def __init__(
        self, i: int, o: int, size: int, stride: int, pad: int, activation: nn.Module
    ) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(pad)
        self.conv = nn.Conv2d(i, o, size, stride)
        self.norm = nn.InstanceNorm2d(o, affine=True)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(self.pad(x))))


def residual_autoencoder() -> nn.Module:
    """Encoder and decoder in the manner of UNIT and MUNIT; all blocks share one activation."""
    relu = nn.ReLU()
    return nn.Sequential(
        ConvBlock(3, 4, 7, 1, 3, relu),
        ConvBlock(4, 8, 4, 2, 1, relu),
        ResidualBlock(8),
        nn.Upsample(scale_factor=2),
        nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(8, 4, 5), nn.InstanceNorm2d(4), relu),
        nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(4, 3, 7), nn.Tanh()),
    )


def patch_gan() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for i, stride in ((4, 2), (8, 1)):
        layers += [nn.Conv2d(i, 2 * i, 4, stride, 1), nn.InstanceNorm2d(2 * i)]
        layers += [nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(16, 1, 4, 1, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet generator": resnet_generator,
    "residual autoencoder": residual_autoencoder,
    "PatchGAN": patch_gan,
}
ALL_MODELS = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    loss = model(x).square().mean()
    return torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@ALL_MODELS
def test_the_same_outputs_and_gradients(
    model: Callable[[], nn.Module], memory_format: torch.memory_format
) -> None:
    plain = model().double().to(memory_format=memory_format)
    fused = convert(copy.deepcopy(plain))
    report = conversion_report(plain)
    norms = sum(isinstance(m, nn.InstanceNorm2d) for m in plain.modules())
    assert len(report) >= norms > 0
    assert all(entry.becomes for entry in report)
    remaining = [m for m in fused.modules() if type(m) in (nn.InstanceNorm2d, nn.ReflectionPad2d)]
    assert not remaining
    x = torch.randn(2, 3, 32, 24, dtype=torch.float64).contiguous(memory_format=memory_format)
    x.requires_grad_()
    for training in (True, False):
        plain.train(training)
        fused.train(training)
        assert_close(fused(x), plain(x))
        for actual, expected in zip(gradients(fused, x), gradients(plain, x), strict=True):
            assert (actual - expected).abs().max() < 1e-12  # absolute: an idle bias has gradient 0


@ALL_MODELS
def test_checkpoints_from_before_load_after(model: Callable[[], nn.Module]) -> None:
    plain = model()
    saved = io.BytesIO()
    torch.save(plain.state_dict(), saved)
    parameters = dict(plain.named_parameters())
    fused = convert(plain)
    assert fused is plain
    assert all(p is parameters[name] for name, p in fused.named_parameters())
    fresh = convert(model())
    saved.seek(0)
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fresh(x), fused(x))
    assert list(fused.state_dict()) == list(model().state_dict())


def test_what_follows_in_a_sequence_is_taken_in() -> None:
    model = nn.Sequential(
        nn.InstanceNorm2d(3, eps=1e-3, affine=True),
        nn.LeakyReLU(0.3),
        nn.ReflectionPad2d(2),
        nn.ReflectionPad2d(1),
        nn.InstanceNorm2d(3),
        nn.ReflectionPad2d((1, 2, 1, 1)),
        nn.InstanceNorm2d(3),
        nn.Dropout(),
        nn.ReLU(),
    ).eval()
    x = torch.randn(2, 3, 6, 5).double()
    expected = copy.deepcopy(model).double()(x)
    report = conversion_report(model)
    assert [str(entry) for entry in report] == [
        "0: InstanceNorm2d -> fastgan.nn.InstanceNorm2d + LeakyReLU + ReflectionPad2d",
        "3: ReflectionPad2d -> fastgan.nn.ReflectionPad2d",
        "4: InstanceNorm2d -> fastgan.nn.InstanceNorm2d",
        "5: ReflectionPad2d -> fastgan.nn.ReflectionPad2d",
        "6: InstanceNorm2d -> fastgan.nn.InstanceNorm2d",
    ]
    assert str(report).splitlines()[0] == "5 modules swapped, 0 left alone"
    assert type(model[0]) is nn.InstanceNorm2d  # the report changed nothing
    fused = convert(model)
    norm = fused[0]
    assert isinstance(norm, fastgan.nn.InstanceNorm2d)
    assert (norm.activation, norm.negative_slope, norm.reflect_pad) == ("leaky_relu", 0.3, 2)
    assert (norm.eps, norm.training) == (1e-3, False)
    assert [type(fused[i]) for i in (1, 2, 8)] == [nn.Identity, nn.Identity, nn.ReLU]
    assert_close(fused.double()(x), expected)


def test_what_must_stay_stays() -> None:
    class Norm(nn.InstanceNorm2d):
        pass

    class Dense(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, *(layer(x) for layer in self)], 1)

    hooked, hooked_relu = nn.InstanceNorm2d(3), nn.ReLU()
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    hooked_relu.register_forward_pre_hook(lambda module, inputs: None)
    model = nn.Sequential(
        nn.InstanceNorm2d(3, track_running_stats=True),
        Norm(3),
        hooked,
        nn.Sequential(nn.InstanceNorm2d(3), hooked_relu),
        Dense(nn.InstanceNorm2d(3), nn.ReLU()),
        fastgan.nn.InstanceNorm2d(3, activation="relu"),
    )
    x = torch.randn(2, 3, 5, 5)
    expected = copy.deepcopy(model).eval()(x)
    assert [str(entry) for entry in conversion_report(model)] == [
        "0: InstanceNorm2d stays: tracks running statistics",
        "1: Norm stays: a subclass may do something else",
        "2: InstanceNorm2d stays: has hooks, which see its input or output",
        "5: InstanceNorm2d stays: is fused already",
        "3.0: InstanceNorm2d -> fastgan.nn.InstanceNorm2d",
        "4.0: InstanceNorm2d -> fastgan.nn.InstanceNorm2d",
    ]
    kept = [model[i] for i in (0, 1, 2, 5)] + [hooked_relu, model[4][1]]
    fused = convert(model)
    assert [fused[i] for i in (0, 1, 2, 5)] + [fused[3][1], fused[4][1]] == kept
    assert_close(fused.eval()(x), expected.double())
    assert all(entry.becomes is None for entry in conversion_report(fused))


def test_a_forward_put_in_place_of_the_modules_own_is_kept() -> None:
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.Sequential(nn.InstanceNorm2d(3), nn.ReLU()))
    plain, backwards = model[0].forward, model[1]
    model[0].forward = lambda x: plain(x) + 1
    backwards.forward = lambda x: backwards[0](backwards[1](x))
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert [str(entry) for entry in conversion_report(model)] == [
        "0: InstanceNorm2d stays: has a forward of its own",
        "1.0: InstanceNorm2d -> fastgan.nn.InstanceNorm2d",
    ]
    assert_close(convert(model)(x), expected.double())


@pytest.mark.parametrize("follower", [nn.ReLU(), nn.LeakyReLU(0.2), nn.ReflectionPad2d(1)])
def test_a_follower_with_another_forward_is_not_absorbed(follower: nn.Module) -> None:
    model = nn.Sequential(nn.InstanceNorm2d(3), follower)
    follower.forward = lambda x: x + 100
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert_close(convert(model)(x), expected.double())


def test_shared_modules_stay_shared() -> None:
    norm, relu = nn.InstanceNorm2d(3, affine=True), nn.ReLU()
    model = nn.Sequential(
        nn.Sequential(norm, relu), nn.Sequential(norm, relu), nn.Sequential(norm, nn.Tanh(), relu)
    )
    x = torch.randn(2, 3, 5, 5)
    expected = copy.deepcopy(model)(x)
    keys = list(model.state_dict())
    fused = convert(model)
    assert fused[0][0] is fused[1][0]
    assert fused[2][0] is not fused[0][0]
    assert all(m[0].weight is norm.weight for m in fused)
    assert fused[2][2] is relu
    assert (list(fused.state_dict()), len(list(fused.parameters()))) == (keys, 2)
    assert_close(fused(x), expected.double())


@pytest.mark.parametrize("module", [nn.InstanceNorm2d(3), nn.ReflectionPad2d(1)])
def test_a_module_that_is_itself_swapped(module: nn.Module) -> None:
    x = torch.randn(2, 3, 5, 5)
    assert str(conversion_report(module)[0]).startswith("(the model): ")
    fused = convert(module)
    assert type(fused) in (fastgan.nn.InstanceNorm2d, fastgan.nn.ReflectionPad2d)
    assert_close(fused(x), module(x).double())
    assert convert(fused) is fused


def test_gradient_penalties_through_the_fused_norm() -> None:
    """R1 and WGAN-GP differentiate a gradient: the same with either norm."""

    def penalties(critic: nn.Module, real: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        (of_real,) = torch.autograd.grad(critic(real).sum(), real, create_graph=True)
        (of_mixed,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        r1 = of_real.square().flatten(1).sum(1).mean()
        wgan_gp = (of_mixed.flatten(1).norm(dim=1) - 1).square().mean()
        return r1, wgan_gp

    plain = patch_gan()
    fused = convert(copy.deepcopy(plain))
    exact = copy.deepcopy(plain).double()
    real, mixed = (torch.randn(2, 3, 32, 32, requires_grad=True) for _ in range(2))
    impl = "triton" if INTERPRETED else "reference"
    with fastgan.use_impl(instance_norm=impl):
        actual = penalties(fused, real, mixed)
        actual_grads = torch.autograd.grad(sum(actual), list(fused.parameters()), allow_unused=True)
    expected = penalties(exact, *(x.detach().double().requires_grad_() for x in (real, mixed)))
    expected_grads = torch.autograd.grad(sum(expected), list(exact.parameters()), allow_unused=True)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)
    largest = max(e.abs().max() for e in expected_grads if e is not None)
    for a, e in zip(actual_grads, expected_grads, strict=True):
        assert (a is None) == (e is None)
        assert a is None or (a - e).abs().max() < 1e-4 * largest


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps from a forward, each storage once, parameters and input aside."""
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del out
    return total


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_a_resnet_keeps_less_for_its_backward() -> None:
    plain = resnet_generator(width=4, blocks=9)
    x = torch.randn(1, 3, 64, 64)
    before = saved_bytes(plain, x)
    with fastgan.use_impl(instance_norm="triton"):
        after = saved_bytes(convert(plain), x)
    assert after <= 0.78 * before
