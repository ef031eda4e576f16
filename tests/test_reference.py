"""Every formula of fastgan.reference against NumPy fp64, written from the definitions."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastgan
from fastgan import reference

Array = NDArray[np.float64]
rng = np.random.default_rng(0)


def features(*shape: int, mean: float = 0.3) -> tuple[Array, Tensor]:
    values = rng.standard_normal(shape) + mean
    return values, torch.from_numpy(values)


def close(actual: Tensor, expected: Array | float) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-14)


def gram(values: Array) -> Array:
    """Unnormalised Gram matrix of one image [C, H, W], entry by entry."""
    channels = values.shape[0]
    return np.array(
        [[(values[i] * values[j]).sum() for j in range(channels)] for i in range(channels)]
    )


@pytest.mark.parametrize(("normalize", "divisor"), [("chw", 3 * 5 * 7), ("hw", 5 * 7), ("none", 1)])
def test_gram_matrix(normalize: str, divisor: int) -> None:
    values, x = features(2, 3, 5, 7)
    expected = np.stack([gram(image) for image in values]) / divisor
    close(reference.gram_matrix(x, normalize), expected)


def test_style_loss_is_the_textbook_form_of_unnormalised_grams() -> None:
    """1/(4 N^2 M^2) ||G - T||^2 with N channels and M positions, averaged over the batch."""
    values, x = features(2, 3, 5, 7)
    style_values, style = features(1, 3, 5, 7, mean=-1.0)
    n, m = 3, 5 * 7
    target = gram(style_values[0])
    per_image = [((gram(image) - target) ** 2).sum() / (4 * n**2 * m**2) for image in values]
    loss = fastgan.style_loss(x, fastgan.gram_matrix(style))
    close(loss, np.mean(per_image))


def test_style_loss_sums_weighted_layers() -> None:
    layers = [features(2, 3, 5, 7), features(2, 4, 3, 3)]
    targets = [features(1, 3, 3), features(2, 4, 4)]
    expected = 0.0
    for (values, _), (target, _), weight in zip(layers, targets, (0.5, 2.0), strict=True):
        grams = np.stack([gram(image) for image in values]) / values[0].size
        expected += weight * 0.25 * ((grams - target) ** 2).sum(axis=(1, 2)).mean()
    tensors, wanted = [x for _, x in layers], [t for _, t in targets]
    close(fastgan.style_loss(tensors, wanted, weights=(0.5, 2.0)), expected)


def test_content_loss() -> None:
    values, x = features(2, 3, 5, 7)
    other, y = features(2, 3, 5, 7)
    close(fastgan.content_loss(x, y), ((values - other) ** 2).mean())
    per_image = [((a - b) ** 2).sum() / 3 for a, b in zip(values, other, strict=True)]
    close(fastgan.content_loss(x, y, reduction="channels"), np.mean(per_image))
    layers = fastgan.content_loss([x, x], [y, x], weights=(3.0, 5.0))
    close(layers, 3 * ((values - other) ** 2).mean())


@pytest.mark.parametrize("correction", [0, 1])
def test_instance_stats(correction: int) -> None:
    values, x = features(2, 3, 5, 7)
    mean, std = reference.instance_stats(x, eps=1e-3, correction=correction)
    close(mean, values.mean(axis=(2, 3)))
    close(std, np.sqrt(values.var(axis=(2, 3), ddof=correction) + 1e-3))


def normalised(values: Array, eps: float = 1e-5) -> Array:
    mean = values.mean(axis=(2, 3), keepdims=True)
    return (values - mean) / np.sqrt(values.var(axis=(2, 3), keepdims=True) + eps)


def test_instance_norm() -> None:
    values, x = features(2, 3, 5, 7)
    close(reference.instance_norm(x), normalised(values))
    close(reference.instance_norm(x, eps=0.5), normalised(values, 0.5))


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_instance_norm_with_everything_that_follows(
    activation: str | None, conditional: bool
) -> None:
    values, x = features(2, 3, 5, 7)
    shape = (2, 3) if conditional else (3,)
    weight, w = features(*shape)
    bias, b = features(*shape)
    residual, r = features(2, 3, 5, 7)
    expected = normalised(values) * weight[..., None, None] + bias[..., None, None]
    slope = {None: 1.0, "relu": 0.0, "leaky_relu": 0.2}[activation]
    expected = np.where(expected > 0, expected, slope * expected) + residual
    expected = np.pad(expected, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    out = reference.instance_norm(x, w, b, r, activation, negative_slope=0.2, reflect_pad=2)
    close(out, expected)


def test_instance_norm_of_one_position_is_its_bias() -> None:
    _, x = features(2, 3, 1, 1)
    x.requires_grad_()
    bias, b = features(3)
    out = fastgan.instance_norm(x, bias=b)
    close(out.detach(), np.broadcast_to(bias[:, None, None], (2, 3, 1, 1)))
    out.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_reflection_pad2d() -> None:
    values, x = features(2, 3, 5, 7)
    expected = np.pad(values, ((0, 0), (0, 0), (3, 4), (1, 2)), mode="reflect")
    close(reference.reflection_pad2d(x, (1, 2, 3, 4)), expected)


def adain(values: Array, style: Array, alpha: float, eps: float = 1e-5, ddof: int = 1) -> Array:
    def stats(maps: Array) -> tuple[Array, Array]:
        variance = maps.var(axis=(2, 3), ddof=ddof, keepdims=True)
        return maps.mean(axis=(2, 3), keepdims=True), np.sqrt(variance + eps)

    (mean, std), (style_mean, style_std) = stats(values), stats(style)
    return alpha * (style_std * (values - mean) / std + style_mean) + (1 - alpha) * values


@pytest.mark.parametrize("style_batch", [1, 2])
def test_adain(style_batch: int) -> None:
    values, x = features(2, 3, 5, 7)
    style_values, style = features(style_batch, 3, 4, 4, mean=2.0)
    close(fastgan.adain(x, style, alpha=0.3), adain(values, style_values, 0.3))
    expected = adain(values, style_values, 1.0, eps=0.1, ddof=0)
    close(fastgan.adain(x, style, eps=0.1, correction=0), expected)
    stats = fastgan.instance_stats(style)
    close(fastgan.adain(x, stats), adain(values, style_values, 1.0))


def test_adain_takes_one_strength_per_image() -> None:
    values, x = features(2, 3, 5, 7)
    style_values, style = features(1, 3, 4, 4)
    out = fastgan.adain(x, style, alpha=torch.tensor([0.0, 0.5]))
    close(out[0], values[0])
    close(out[1], adain(values, style_values, 0.5)[1])


def test_adain_style_loss() -> None:
    values, x = features(2, 3, 5, 7)
    mean, m = features(1, 3)
    std, s = features(1, 3, mean=2.0)
    own_std = np.sqrt(values.var(axis=(2, 3), ddof=1) + 1e-5)
    expected = ((values.mean(axis=(2, 3)) - mean) ** 2).mean() + ((own_std - std) ** 2).mean()
    stats = fastgan.InstanceStats(m, s)
    close(fastgan.adain_style_loss(x, stats), expected)
    close(fastgan.adain_style_loss([x, x], [stats, stats], weights=(1.0, 2.0)), 3 * expected)


def bce(logit: float, label: float) -> float:
    """Cross-entropy of sigmoid(logit) against a label, from the definition."""
    p = 1 / (1 + np.exp(-logit))
    return float(-label * np.log(p) - (1 - label) * np.log(1 - p))


DISCRIMINATOR = {
    "bce": (lambda r: bce(r, 1.0), lambda f: bce(f, 0.0)),
    "lsgan": (lambda r: (r - 1) ** 2, lambda f: f**2),
    "hinge": (lambda r: max(0.0, 1 - r), lambda f: max(0.0, 1 + f)),
    "wgan": (lambda r: -r, lambda f: f),
}


@pytest.mark.parametrize("scale_reduction", ["sum", "mean"])
@pytest.mark.parametrize("mode", DISCRIMINATOR)
def test_discriminator_loss(mode: str, scale_reduction: str) -> None:
    on_real, on_fake = DISCRIMINATOR[mode]
    reals = [features(2, 1, 5, 7), features(2, 1, 3, 3)]
    fakes = [features(3, 1, 5, 7), features(2, 1, 2, 2)]
    per_scale = [
        np.mean([on_real(v) for v in r.ravel()]) + np.mean([on_fake(v) for v in f.ravel()])
        for (r, _), (f, _) in zip(reals, fakes, strict=True)
    ]
    loss, stats = fastgan.discriminator_loss_with_stats(
        [x for _, x in reals], [x for _, x in fakes], mode=mode, scale_reduction=scale_reduction
    )
    close(loss, np.sum(per_scale) / (2 if scale_reduction == "mean" else 1))
    threshold = 0.5 if mode == "lsgan" else 0.0
    r = np.concatenate([v.ravel() for v, _ in reals])
    f = np.concatenate([v.ravel() for v, _ in fakes])
    expected = (r.mean(), f.mean(), (r > threshold).mean(), (f < threshold).mean())
    np.testing.assert_allclose([float(s) for s in stats], expected, rtol=1e-6)


def test_label_smoothing_moves_the_real_label_only() -> None:
    real, r = features(2, 1, 5, 7)
    fake, f = features(2, 1, 5, 7)
    on_real = np.mean([bce(v, 0.9) for v in real.ravel()])
    expected = on_real + np.mean([bce(v, 0.0) for v in fake.ravel()])
    close(fastgan.discriminator_loss(r, f, label_smoothing=0.1), expected)


@pytest.mark.parametrize(
    ("mode", "saturating", "formula"),
    [
        ("bce", False, lambda f: bce(f, 1.0)),
        ("bce", True, lambda f: -bce(f, 0.0)),
        ("lsgan", False, lambda f: (f - 1) ** 2),
        ("hinge", False, lambda f: -f),
        ("wgan", False, lambda f: -f),
    ],
)
def test_generator_loss(mode: str, saturating: bool, formula: object) -> None:
    assert callable(formula)
    values, f = features(2, 1, 5, 7)
    smaller, g = features(2, 1, 3, 3)
    expected = [np.mean([formula(v) for v in maps.ravel()]) for maps in (values, smaller)]
    close(fastgan.generator_loss([f, g], mode=mode, saturating=saturating), np.sum(expected))
    mean = fastgan.generator_loss([f, g], mode=mode, saturating=saturating, scale_reduction="mean")
    close(mean, np.mean(expected))


@pytest.mark.parametrize("label", [1.0, 0.0, 0.9])
@pytest.mark.parametrize("for_discriminator", [True, False])
@pytest.mark.parametrize("mode", DISCRIMINATOR)
def test_label_loss(mode: str, for_discriminator: bool, label: float) -> None:
    values, x = features(2, 1, 5, 7)
    is_real = label > 0.5
    sign = -1 if is_real else 1
    formula = {
        "bce": lambda v: bce(v, label),
        "lsgan": lambda v: (v - label) ** 2,
        "hinge": lambda v: max(0.0, 1 + sign * v) if for_discriminator else sign * v,
        "wgan": lambda v: sign * v,
    }[mode]
    expected = np.mean([formula(v) for v in values.ravel()])
    close(reference.label_loss(x, label, is_real, mode, for_discriminator), expected)


def test_softplus_and_its_gradient_are_exact_far_out() -> None:
    x = torch.tensor([-1e4, -40.0, -12.0, 0.0, 12.0, 40.0, 1e4], dtype=torch.float64)
    x.requires_grad_()
    out = reference.softplus(x)
    expected = np.logaddexp(0.0, x.detach().numpy())
    close(out.detach(), expected)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    with np.errstate(over="ignore"):
        close(gradient, 1 / (1 + np.exp(-x.detach().numpy())))
