"""Networks and feature extractors: shapes, sizes, determinism, what they refuse."""

import pickle

import pytest
import torch
from torch import Tensor, nn

from fastgan.models import (
    BASE,
    LITE,
    ContentEncoder,
    Decoder,
    Discriminator,
    DiscriminatorConfig,
    RandomFeatures,
    StyleEncoder,
    StyleTransferConfig,
    StyleTransferGAN,
    StyleTransferModule,
    VGG19Features,
)
from fastgan.models.features import _natural_noise, _vgg19, grey
from fastgan.ops.instance_norm import instance_stats

SMALL = StyleTransferConfig(width=4, encoder_blocks=1, decoder_blocks=1)


def picture(*shape: int) -> Tensor:
    return torch.rand(shape) * 2 - 1


# --- Style transfer -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "style"),
    [((32, 32), (32, 32)), ((37, 53), (20, 31)), ((8, 9), (64, 8)), ((1, 1), (2, 3))],
)
def test_result_has_the_size_of_the_content(content: tuple[int, int], style: tuple[int, int]):
    model = StyleTransferGAN(SMALL)
    result = model(picture(2, 3, *content), picture(2, 3, *style))
    assert result.shape == (2, 3, *content)
    assert result.abs().max() <= 1


def test_result_does_not_depend_on_how_far_it_had_to_be_cut():
    """A strip that the encoder rounds up sees the same pixels as one that needs no rounding."""
    model = StyleTransferGAN(StyleTransferConfig(width=4, encoder_blocks=0, decoder_blocks=0))
    content = picture(1, 3, 40, 40)
    features = model.content_encoder(content)
    narrower = model.content_encoder(content[..., :37])
    torch.testing.assert_close(features[..., :8], narrower[..., :8])
    decoded, narrower_decoded = model.decoder(features), model.decoder(narrower)
    torch.testing.assert_close(decoded[..., :24], narrower_decoded[..., :24])


def test_one_style_serves_a_batch_of_content():
    model = StyleTransferGAN(SMALL).eval()
    content, style = picture(3, 3, 16, 16), picture(1, 3, 24, 24)
    together = model(content, style)
    one_by_one = torch.cat([model(c, style) for c in content.split(1)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)


def test_alpha_runs_from_the_decoded_content_to_the_full_style():
    model = StyleTransferGAN(SMALL)
    content, style = picture(2, 3, 16, 16), picture(2, 3, 16, 16)
    decoded = model.decoder(model.content_encoder(content))
    torch.testing.assert_close(model(content, style, 0.0), decoded)
    assert not torch.allclose(model(content, style, 1.0), decoded)
    mixed = model(content, style, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(mixed[:1], decoded[:1])
    torch.testing.assert_close(mixed[1:], model(content, style)[1:])


def test_style_transfer_module_takes_cached_statistics():
    content, style = picture(2, 8, 5, 5), picture(1, 8, 7, 3)
    module = StyleTransferModule()
    transferred = module(content, style)
    torch.testing.assert_close(transferred, module(content, instance_stats(style)))
    got, wanted = instance_stats(transferred), instance_stats(style)
    torch.testing.assert_close(got.mean, wanted.mean.expand(2, -1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.std, wanted.std.expand(2, -1), rtol=1e-3, atol=1e-4)


def test_content_encoder_keeps_what_distinguishes_two_brightnesses():
    """Else nothing could be reconstructed from its features."""
    encoder = ContentEncoder(SMALL)
    dark = picture(1, 3, 16, 16) * 0.2 - 0.7
    assert not torch.allclose(encoder(dark), encoder(dark + 1.2), atol=1e-2)


def test_every_part_is_built_without_arguments_and_learns():
    parts = [ContentEncoder(), StyleEncoder(), StyleTransferModule(), Decoder()]
    encode, encode_style, transfer, decode = parts
    fake = decode(transfer(encode(picture(1, 3, 16, 16)), encode_style(picture(1, 3, 16, 16))))
    sum(logits.sum() for logits in Discriminator()(fake.repeat(1, 1, 4, 4))).backward()
    for part in parts:
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_lite_fits_in_three_megabytes_of_16_bit_numbers():
    count = sum(p.numel() for p in StyleTransferGAN(LITE).parameters())
    assert 2 * count < 3e6
    assert count < sum(p.numel() for p in StyleTransferGAN(BASE).parameters())


def test_no_convolution_before_a_norm_has_a_bias():
    for network in (ContentEncoder(SMALL), Discriminator()):
        norms = [module for module in network.modules() if hasattr(module, "reflect_pad")]
        assert norms
        assert all(module.conv.bias is None for module in norms)


def test_memory_format_is_kept():
    model = StyleTransferGAN(SMALL).to(memory_format=torch.channels_last)
    content = picture(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    result = model(content, content)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        result, model(content.contiguous(), content.contiguous()), rtol=1e-4, atol=1e-5
    )


# --- Discriminator ------------------------------------------------------------------------------


def test_discriminator_gives_logits_per_patch_and_scale():
    logits = Discriminator(DiscriminatorConfig(width=4, layers=3, scales=3))(picture(2, 3, 96, 80))
    assert [tuple(scale.shape) for scale in logits] == [
        (2, 1, 12, 10),
        (2, 1, 6, 5),
        (2, 1, 3, 2),
    ]


def test_discriminator_patch_is_as_wide_as_documented():
    config = DiscriminatorConfig(width=2, layers=3, scales=1)
    network = Discriminator(config).scales[0]
    for module in network.modules():  # without norms, which see everything
        if hasattr(module, "reflect_pad"):
            module.forward = lambda x, module=module: nn.functional.pad(
                module.conv(x), [module.reflect_pad] * 4
            )
    image = picture(1, 3, 128, 128).requires_grad_()
    network(image)[0, 0, 8, 8].backward()
    seen = image.grad.abs().sum((0, 1)).sum(0).nonzero()
    assert seen.max() - seen.min() + 1 == 38


@pytest.mark.parametrize(("layers", "scales"), [(1, 1), (2, 3), (3, 2)])
def test_discriminator_says_what_it_cannot_judge(layers: int, scales: int):
    network = Discriminator(DiscriminatorConfig(width=2, layers=layers, scales=scales))
    smallest = network.smallest
    assert network(picture(1, 3, smallest, smallest + 7))[-1].shape[2] == 2
    with pytest.raises(ValueError, match=f"at least {smallest} px .* {scales} scales, got"):
        network(picture(1, 3, smallest + 7, smallest - 1))


# --- Extractors ---------------------------------------------------------------------------------


def test_random_features_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = RandomFeatures()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = RandomFeatures()
    assert torch.equal(torch.get_rng_state(), state)
    image = picture(1, 3, 32, 32)
    for a, b in zip(first(image), second(image), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(first(image)[0], RandomFeatures(seed=1)(image)[0])


def test_random_features_are_a_pyramid_of_maps():
    maps = RandomFeatures(levels=3, channels=8, kernel_size=3)(picture(2, 3, 20, 13))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 20, 13), (2, 8, 10, 7), (2, 8, 5, 4)]
    assert RandomFeatures()(picture(1, 3, 1, 1))[-1].shape == (1, 48, 1, 1)


def test_random_features_are_normalised_on_natural_noise():
    noise = _natural_noise(256, torch.Generator().manual_seed(5))
    spectrum = torch.fft.rfft2(noise).abs().mean((0, 1))
    assert 3 < spectrum[0, 4:8].mean() / spectrum[0, 16:32].mean() < 6  # amplitude 1/f: 4
    for features in RandomFeatures()(noise):
        std, mean = torch.std_mean(features, dim=(0, 2, 3))
        assert std.median() == pytest.approx(1, abs=0.3)
        assert mean.median() == pytest.approx(0, abs=0.3)


def test_most_random_filters_do_not_see_a_plain_colour():
    features = RandomFeatures(channels=16)
    black, orange = torch.zeros(1, 3, 16, 16), torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    for a, b in zip(features(black), features(orange.expand(1, 3, 16, 16)), strict=True):
        changed = (a - b).abs().amax((0, 2, 3)) > 1e-3
        assert not changed[4:].any()
        assert changed[:4].any()


def test_extractors_take_gradients_to_pictures_and_none_to_weights():
    features = RandomFeatures(channels=4)
    assert not list(features.parameters())
    image = picture(1, 3, 16, 16).requires_grad_()
    sum(m.sum() for m in features(image)).backward()
    assert image.grad.abs().sum() > 0


def test_features_are_16_bit_under_autocast():
    image = picture(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = RandomFeatures()(image)
    for ours, wide in zip(narrow, RandomFeatures()(image), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), wide, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "arguments", [{"levels": 0}, {"channels": 0}, {"kernel_size": 4}, {"kernel_size": -1}]
)
def test_random_features_refuse_sizes_that_make_no_sense(arguments: dict[str, int]):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RandomFeatures(**arguments)


def test_grey_pictures_differ_in_structure_alone():
    image = picture(2, 3, 16, 16)
    brighter = image * 0.3 + 0.5
    torch.testing.assert_close(grey(image), grey(brighter), rtol=1e-3, atol=1e-3)
    brightness = grey(image)
    assert brightness.shape == image.shape
    torch.testing.assert_close(brightness.mean((2, 3)), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        brightness.std((2, 3), correction=0), torch.full((2, 3), 0.5), rtol=1e-3, atol=0
    )
    assert grey(torch.zeros(1, 3, 4, 4)).isfinite().all()


@pytest.fixture(scope="module")
def vgg19_weights(tmp_path_factory: pytest.TempPathFactory):
    """A file with torchvision's keys and random weights."""
    torch.manual_seed(0)
    network, _ = _vgg19()
    state = {f"features.{name}": value for name, value in network.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg19-dcbb9e9d.pth"
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.mark.slow
def test_vgg19_features_are_those_of_torchvision(vgg19_weights):
    vgg19 = pytest.importorskip("torchvision").models.vgg19
    theirs = vgg19().features
    state = torch.load(vgg19_weights, weights_only=True)
    theirs.load_state_dict(
        {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
    )
    image = picture(1, 3, 32, 32)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    x = ((image + 1) / 2 - mean) / std
    expected = {}
    for index, layer in enumerate(theirs):
        x = layer(x.clone())
        expected[index] = x
    features = VGG19Features(weights=vgg19_weights, layers=("relu4_1", "relu1_1", "relu2_2"))
    maps = features(image)
    assert [m.shape[1] for m in maps] == [64, 128, 512]
    for ours, index in zip(maps, (1, 8, 20), strict=True):
        torch.testing.assert_close(ours, expected[index])
    assert not any(p.requires_grad for p in features.parameters())
    assert len(features.features) == 21


def test_vgg19_without_weights_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"vgg19-dcbb9e9d.pth.*download") as caught:
        VGG19Features()
    in_python_or_on_the_command_line = (
        "weights=FILE (--extractor-weights FILE), or use RandomFeatures (--extractor random)"
    )
    assert in_python_or_on_the_command_line in str(caught.value)


def test_vgg19_refuses_other_files(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("evil.pth", "other.pth"):
        with pytest.raises(ValueError, match=f"no VGG19 weights of torchvision in .*{name}"):
            VGG19Features(weights=tmp_path / name, layers=["relu1_1"])
    with pytest.raises(ValueError, match=r"layers must be among relu1_1, .*, got \['conv1'\]"):
        VGG19Features(layers=["conv1"])
