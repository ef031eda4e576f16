"""InstanceNorm2d and ReflectionPad2d in place of torch's."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fastgan
from tolerances import assert_close

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def features(*shape: int, layout: str = "nchw") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_is_torchs(affine: bool, track: bool, training: bool, layout: str) -> None:
    theirs = nn.InstanceNorm2d(4, affine=affine, track_running_stats=track).double()
    ours = fastgan.nn.InstanceNorm2d(4, affine=affine, track_running_stats=track).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    if affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    theirs.train(training)
    ours.train(training)
    x = features(2, 4, 5, 6, layout=layout)
    for y in (x, x[0], x):  # running statistics move in training
        assert_close(ours(y), theirs(y))
    assert ours.eval()(x).is_contiguous(memory_format=LAYOUTS[layout]) or track
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_instance_norm_with_what_follows() -> None:
    fused = fastgan.nn.InstanceNorm2d(
        4, affine=True, activation="leaky_relu", negative_slope=0.2, reflect_pad=2
    ).double()
    plain = nn.Sequential(
        nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.2), nn.ReflectionPad2d(2)
    )
    x = features(2, 4, 5, 6)
    assert_close(fused(x), plain.double()(x))
    assert "activation='leaky_relu', negative_slope=0.2, reflect_pad=2" in repr(fused)
    tracking = fastgan.nn.InstanceNorm2d(
        4, track_running_stats=True, activation="relu", reflect_pad=1
    )
    expected = nn.ReflectionPad2d(1)(
        nn.InstanceNorm2d(4, track_running_stats=True)(x.float()).relu()
    )
    assert_close(tracking(x.float()), expected.double())


def test_instance_norm_checks_its_input() -> None:
    with pytest.raises(ValueError, match="activation must be one of None, 'relu', 'leaky_relu'"):
        fastgan.nn.InstanceNorm2d(4, activation="gelu")
    with pytest.raises(ValueError, match="expected 3D or 4D input"):
        fastgan.nn.InstanceNorm2d(4)(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"weight must be \[5\] or \[2, 5\] to match x, got \[4\]"):
        fastgan.nn.InstanceNorm2d(4, affine=True)(torch.ones(2, 5, 3, 3))


def test_one_position_is_no_error() -> None:
    norm = fastgan.nn.InstanceNorm2d(4, affine=True)
    out = norm(torch.randn(2, 4, 1, 1, requires_grad=True))
    out.sum().backward()
    assert_close(out, norm.bias[None, :, None, None].expand(2, 4, 1, 1).double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [2, (1, 0, 2, 3), 0])
def test_reflection_pad_is_torchs(padding: int | tuple[int, ...], layout: str) -> None:
    ours, theirs = fastgan.nn.ReflectionPad2d(padding), nn.ReflectionPad2d(padding)
    x = features(2, 3, 5, 6, layout=layout).requires_grad_()
    out = ours(x)
    assert torch.equal(out, theirs(x))
    assert out.is_contiguous(memory_format=LAYOUTS[layout])
    assert torch.equal(ours(x[0]), theirs(x[0]))
    weights = torch.randn_like(out)
    (actual,) = torch.autograd.grad((out * weights).sum(), x)
    (expected,) = torch.autograd.grad((theirs(x) * weights).sum(), x)
    assert_close(actual, expected)


def test_reflection_pad_leaves_the_rest_to_torch() -> None:
    x = torch.arange(24).view(1, 1, 4, 6)
    assert torch.equal(fastgan.nn.ReflectionPad2d(2)(x), nn.ReflectionPad2d(2)(x))
    crop = fastgan.nn.ReflectionPad2d((-1, 0, 0, -1))(x.float())
    assert torch.equal(crop, nn.ReflectionPad2d((-1, 0, 0, -1))(x.float()))
    with pytest.raises(ValueError, match=r"less than width \(left, right\) and height"):
        fastgan.nn.ReflectionPad2d(4)(x.float())


@pytest.mark.parametrize(
    "module",
    [
        fastgan.nn.InstanceNorm2d(3, affine=True, activation="relu", reflect_pad=1),
        fastgan.nn.ReflectionPad2d(1),
        fastgan.nn.AdaIN(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_modules_are_copied_and_pickled(module: nn.Module) -> None:
    x = torch.randn(2, 3, 4, 4)
    inputs = (x, x) if isinstance(module, fastgan.nn.AdaIN) else (x,)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*inputs), module(*inputs))


def test_adain_module() -> None:
    content, style = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 5, 5)
    actual = fastgan.nn.AdaIN(eps=1e-3, correction=0)(content, style, 0.5)
    assert torch.equal(actual, fastgan.adain(content, style, alpha=0.5, eps=1e-3, correction=0))
    assert repr(fastgan.nn.AdaIN()) == "AdaIN(eps=1e-05, correction=1)"
