"""Bad input to each op: the message names the argument, what was expected and what came."""
# ruff: noqa: E501 - a table reads best with one case per line

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastgan as fg
from fastgan.ops.instance_norm import reflection_pad2d

x = torch.randn(2, 3, 4, 5)
gram = torch.randn(2, 3, 3)
logits = torch.randn(2, 1, 4, 4)
stats = fg.InstanceStats(torch.zeros(2, 3), torch.ones(2, 3))

CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fg.gram_matrix([1, 2]), TypeError, "gram_matrix: features must be a tensor, got list"),
    (lambda: fg.gram_matrix(x.int()), TypeError, "features must be float16, .* got torch.int32"),
    (lambda: fg.gram_matrix(x[0, 0]), ValueError, r"features must be \[B, C, H, W\] or .* \[4, 5\]"),
    (lambda: fg.gram_matrix(x, normalize="c"), ValueError, "normalize must be one of 'chw', .* 'c'"),
    (lambda: fg.gram_matrix(x, impl="cuda"), ValueError, "impl must be one of .* got 'cuda'"),
    (
        lambda: fg.style_loss([x, x, x], [gram, gram, gram[:, :2, :2]]),
        ValueError,
        r"style_loss: targets\[2\] must be \[2 or 1, 3, 3\] to match features\[2\], got \[2, 2, 2\]",
    ),
    (lambda: fg.style_loss(x[:1], gram), ValueError, r"targets must be \[1, 3, 3\] to match features"),
    (lambda: fg.style_loss(x, x), ValueError, r"targets must be .*; pass gram_matrix\(style_fea"),
    (lambda: fg.style_loss([], []), ValueError, "features must not be an empty list"),
    (lambda: fg.style_loss([x], [gram, gram]), ValueError, "targets must be as many as features, 1"),
    (lambda: fg.style_loss("x", gram), TypeError, "features must be a tensor or a list, got str"),
    (lambda: fg.style_loss([x], [gram], weights=[1, 2]), ValueError, "weights must be as many .* 2"),
    (lambda: fg.style_loss(x, gram, weights=2.0), TypeError, "weights must be a list, .* got 2.0"),
    (lambda: fg.style_loss(x, gram, weights=torch.ones(1)), TypeError, "weights must be a list, .* got tensor"),
    (lambda: fg.style_loss(x, gram, weights=["2"]), TypeError, r"weights\[0\] must be a number, got str"),
    (lambda: fg.gram_matrix(x.to_sparse()), TypeError, "features must be a dense tensor, got .*sparse"),
    (lambda: fg.style_loss(x, gram.to("meta")), ValueError, "targets must be on the device of feat"),
    (lambda: fg.content_loss(x, x[:1]), ValueError, r"targets must be .* \[2, 3, 4, 5\], got \[1, 3"),
    (lambda: fg.content_loss(x, x, reduction="sum"), ValueError, "reduction must be one of 'mean'"),
    (lambda: fg.instance_stats(x[:, :, :1, :1]), ValueError, "x must have more than 1 positions"),
    (lambda: fg.instance_stats(x, eps=-1), ValueError, "eps must be non-negative, got -1"),
    (lambda: fg.instance_stats(x, eps="0"), TypeError, "eps must be a number, got str"),
    (lambda: fg.instance_stats(x, correction=1.5), TypeError, "correction must be an integer, got 1.5"),
    (lambda: fg.instance_norm(x[0]), ValueError, r"x must be \[B, C, H, W\], got \[3, 4, 5\]"),
    (lambda: fg.instance_norm(x, activation="gelu"), ValueError, "activation must be one of None"),
    (lambda: fg.instance_norm(x, weight=x[0, 0]), ValueError, r"weight must be \[3\] or \[2, 3\]"),
    (lambda: fg.instance_norm(x, bias=torch.ones(4)), ValueError, r"bias must be .* got \[4\]"),
    (lambda: fg.instance_norm(x, residual=x[:1]), ValueError, "residual must have the shape of x"),
    (lambda: fg.instance_norm(x, residual=x.double()), TypeError, "residual must have the dtype"),
    (lambda: fg.instance_norm(x, reflect_pad=4), ValueError, "reflect_pad must be .* got 4"),
    (lambda: fg.instance_norm(x, reflect_pad=-1), ValueError, "reflect_pad must be .* got -1"),
    (lambda: fg.instance_norm(x, reflect_pad=(1, 1)), TypeError, r"reflect_pad must be an integer, got"),
    (lambda: fg.instance_norm(x, negative_slope="0"), TypeError, "negative_slope must be a number"),
    (lambda: fg.adain(x, x, alpha="1"), TypeError, "alpha must be a number, got str"),
    (lambda: fg.adain(x, x[:, :2]), ValueError, r"style must be \[2 or 1, 3, h, w\] .* \[2, 2, 4, 5\]"),
    (lambda: fg.adain(x[:1], x), ValueError, r"style must be \[1, 3, h, w\] to match content, got"),
    (lambda: fg.adain(x, 1.0), TypeError, r"style must be InstanceStats \(fastgan.instance_stats"),
    (lambda: fg.adain(x, stats._replace(std=torch.ones(3))), ValueError, r"style.std must be \[2 or 1"),
    (lambda: fg.adain(x[..., :1, :1], x), ValueError, "content must have more than 1 positions"),
    (lambda: fg.adain(x, x[..., :1, :1]), ValueError, "style must have more than 1 positions"),
    (lambda: fg.adain(x, x, alpha=torch.ones(3)), ValueError, r"alpha must be .* tensor \[2\], got"),
    (
        lambda: fg.adain(x, x, alpha=torch.ones(2, requires_grad=True)),
        ValueError,
        "alpha takes no gradient",
    ),
    (lambda: fg.adain_style_loss([x], [stats, stats]), ValueError, "target_stats must be as many"),
    (lambda: fg.adain_style_loss(x, x), TypeError, "target_stats must be InstanceStats"),
    (
        lambda: fg.discriminator_loss(logits, logits, mode="gan"),
        ValueError,
        "discriminator_loss: mode must be one of 'bce', 'lsgan', 'hinge', 'wgan', got 'gan'",
    ),
    (lambda: fg.discriminator_loss(logits[:0], logits), ValueError, "real_logits must have elements"),
    (lambda: fg.discriminator_loss([logits], [logits] * 2), ValueError, "fake_logits must be as many"),
    (lambda: fg.discriminator_loss(logits, logits.double()), TypeError, "fake_logits must have the dt"),
    (
        lambda: fg.discriminator_loss(logits, [logits, logits.half()]),
        TypeError,
        r"fake_logits\[1\] must have the dtype of fake_logits\[0\]",
    ),
    (
        lambda: fg.discriminator_loss(logits, logits, label_smoothing=1.0),
        ValueError,
        r"label_smoothing must be in \[0, 1\), got 1.0",
    ),
    (
        lambda: fg.discriminator_loss(logits, logits, label_smoothing=None),
        TypeError,
        "label_smoothing must be a number, got NoneType",
    ),
    (
        lambda: fg.discriminator_loss(logits, logits, mode="hinge", label_smoothing=0.1),
        ValueError,
        "label_smoothing needs mode='bce', got 'hinge'",
    ),
    (
        lambda: fg.discriminator_loss(logits, logits, scale_reduction="max"),
        ValueError,
        "scale_reduction must be one of 'sum', 'mean', got 'max'",
    ),
    (lambda: fg.discriminator_loss_with_stats(logits, None), TypeError, "fake_logits must be a tensor"),
    (lambda: fg.generator_loss(logits.long()), TypeError, "fake_logits must be float16"),
    (lambda: fg.generator_loss(logits, mode="lsgan", saturating=True), ValueError, "saturating needs"),
    (lambda: fg.nn.GANLoss("ls"), ValueError, "mode must be one of .*'vanilla', 'wgangp', got 'ls'"),
    (lambda: fg.nn.GANLoss()(logits[:0], True), ValueError, "GANLoss: prediction must have elements"),
    (lambda: fg.nn.GANLoss()([logits, 1], True), TypeError, r"prediction\[1\] must be a tensor, got int"),
    (lambda: fg.nn.convert(x), TypeError, r"model must be a torch.nn.Module, got Tensor"),
    (lambda: reflection_pad2d(x, (1.0, 1, 1, 1)), TypeError, "padding left must be an integer, got 1.0"),
    (lambda: reflection_pad2d(x, (1, 1)), TypeError, r"padding must be \(left, .*, got \(1, 1\)"),
    (lambda: fg.nn.GramStyleLoss()(x), ValueError, r"call set_style\(style_features\) first"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
