"""GANLoss and GramStyleLoss: the calls that existing training code makes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgan as fg
from tolerances import assert_close


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("target_is_real", [True, False])
def test_gan_loss_equals_the_torch_losses_it_replaces(target_is_real: bool) -> None:
    x = logits(2, 1, 6, 6)
    label = torch.full_like(x, float(target_is_real))
    expected = F.binary_cross_entropy_with_logits(x, label)
    assert_close(fg.nn.GANLoss("vanilla")(x, target_is_real), expected)
    assert_close(fg.nn.GANLoss("lsgan")(x, target_is_real), F.mse_loss(x, label))
    assert_close(
        fg.nn.GANLoss("wgangp")(x, target_is_real), -x.mean() if target_is_real else x.mean()
    )


def test_gan_loss_with_labels_of_its_own() -> None:
    x = logits(2, 1, 6, 6)
    loss = fg.nn.GANLoss("lsgan", target_real_label=0.9, target_fake_label=0.1)
    assert_close(loss(x, True), (x - 0.9).square().mean())
    assert_close(loss(x, False), (x - 0.1).square().mean())
    assert_close(loss.discriminator(x, -x), loss(x, True) + loss(-x, False))
    assert_close(loss.generator(x), loss(x, True))


def test_hinge_knows_whom_it_trains() -> None:
    x = logits(2, 1, 6, 6)
    loss = fg.nn.GANLoss("hinge")
    assert_close(loss(x, True), (1 - x).relu().mean())
    assert_close(loss(x, False), (1 + x).relu().mean())
    assert_close(loss(x, True, for_discriminator=False), -x.mean())


@pytest.mark.parametrize("smooth", [1.0, 0.9])
@pytest.mark.parametrize("mode", ["vanilla", "bce", "lsgan", "hinge", "wgan"])
def test_the_fused_calls_equal_the_single_ones(mode: str, smooth: float) -> None:
    real, fake = [logits(2, 1, 6, 6), logits(2, 1, 3, 3)], [logits(2, 1, 6, 6), logits(1, 1, 2, 2)]
    for reduction in ("sum", "mean"):
        loss = fg.nn.GANLoss(mode, target_real_label=smooth, scale_reduction=reduction)
        assert_close(loss.discriminator(real, fake), loss(real, True) + loss(fake, False))
        single = loss(fake, True, for_discriminator=False)
        assert_close(loss.generator(fake), single)


def test_gan_loss_under_autocast_is_fp32() -> None:
    x = torch.randn(2, 1, 6, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fg.nn.GANLoss()(x, True)
    assert loss.dtype == torch.float32
    assert_close(loss, fg.nn.GANLoss()(x.double(), True))


def test_gram_style_loss_keeps_the_style() -> None:
    style = [torch.randn(1, 4, 5, 5), torch.randn(1, 6, 3, 3)]
    features = [torch.randn(2, 4, 7, 7), torch.randn(2, 6, 3, 3)]
    module = fg.nn.GramStyleLoss(weights=(1.0, 3.0))
    module.set_style(style)
    targets = [fg.gram_matrix(s) for s in style]
    expected = fg.style_loss(features, targets, weights=(1.0, 3.0))
    torch.testing.assert_close(module(features), expected, rtol=0, atol=0)
    assert set(module.state_dict()) == {"target0", "target1"}
    assert module.double().get_buffer("target1").dtype == torch.float64


def test_gram_style_loss_takes_another_style_with_fewer_layers() -> None:
    module = fg.nn.GramStyleLoss(normalize="hw")
    module.set_style([torch.randn(1, 4, 5, 5), torch.randn(1, 6, 3, 3)])
    style = torch.randn(1, 2, 5, 5)
    module.set_style(style)
    assert set(module.state_dict()) == {"target0"}
    features = torch.randn(2, 2, 4, 4)
    expected = fg.style_loss(
        features.double(), fg.gram_matrix(style.double(), normalize="hw"), normalize="hw"
    )
    assert_close(module(features), expected)
