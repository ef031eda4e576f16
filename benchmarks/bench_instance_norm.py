"""Instance norm with what follows it, and AdaIN: activations of generators and discriminators."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgan
from fastgan import reference
from harness import Case, Report, compiled, eager, feature_map, fused, product

EPS = 1e-5

# [B, C, H, W]: what is inside a ResNet-9 generator (64 to 256 channels), a PatchGAN (31 x 31 is
# its last), and AdaIN's own setting (512 channels of VGG-19 at 256 and 512 pixels).
ADAIN_SHAPES = {
    "tiny": [(2, 3, 5, 7)],
    "cpu": [(4, 64, 256, 256), (4, 512, 32, 32)],
    "gpu": [
        (8, 64, 256, 256),
        (1, 64, 256, 256),
        (8, 256, 64, 64),
        (8, 512, 32, 32),
        (1, 512, 32, 32),
        (4, 64, 512, 512),
        (3, 130, 61, 77),
    ],
}
NORM_SHAPES = {
    "tiny": [(2, 3, 5, 7)],
    "cpu": [(4, 64, 256, 256), (4, 512, 32, 32)],
    "gpu": [
        (8, 64, 256, 256),
        (8, 128, 128, 128),
        (8, 256, 64, 64),
        (1, 256, 64, 64),
        (4, 64, 512, 512),
        (8, 512, 31, 31),
        (3, 130, 61, 77),
    ],
}
PADDED_SHAPES = {
    "tiny": [(2, 3, 5, 7)],
    "cpu": [(4, 256, 64, 64)],
    "gpu": [(8, 256, 64, 64), (1, 256, 64, 64)],
}
LAYOUTS = ("nchw", "channels_last")
MODES = ("forward", "forward+backward")


def cases(sizes: str) -> Iterator[Case]:
    gpu = sizes == "gpu"
    axes = {"layout": LAYOUTS, "mode": MODES, "dtype": [torch.bfloat16 if gpu else torch.float32]}
    for options in product(shape=ADAIN_SHAPES[sizes], **axes):
        yield adain_case(**options, gpu=gpu)
    for options in product(shape=NORM_SHAPES[sizes], **axes):
        yield norm_case("instance_norm+relu", **options, gpu=gpu)
    for options in product(shape=PADDED_SHAPES[sizes], **axes):
        yield norm_case("instance_norm+relu+reflect_pad", **options, gpu=gpu, pad=1)
    for options in product(shape=ADAIN_SHAPES[sizes][:2], **axes):
        yield style_loss_case(**options)
    if gpu:
        axes |= {"dtype": [torch.float16, torch.float32], "mode": ["forward+backward"]}
        for options in product(shape=[(8, 64, 256, 256)], **axes):
            yield adain_case(**options, gpu=gpu)
            yield norm_case("instance_norm+relu", **options, gpu=gpu)


def test_instance_norm(record: Report, case: Case, variant: str) -> None:
    record(case, variant)


# --- AdaIN --------------------------------------------------------------------------------------


def adain_case(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, mode: str, gpu: bool
) -> Case:
    """Content and style feature maps of one size, gradients to both."""

    def inputs(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        make = partial(feature_map, shape, dtype, layout, device, generator)
        return make(requires_grad=True), make(requires_grad=True)

    variants = [
        eager("reference", adain_reference),
        eager("public", adain_public),
        eager("batch_norm", adain_as_batch_norm),
        compiled(adain_reference),
        fused(fastgan.adain),
    ]
    if gpu:
        variants.insert(-1, compiled(adain_reference, tune=True))
    features = torch.Size(shape).numel() * dtype.itemsize
    return Case(
        op="adain",
        shape="x".join(map(str, shape)),
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        mode=mode,
        inputs=inputs,
        exact=adain_reference,
        variants=tuple(variants),
        bytes=features * (3 if mode == "forward" else 3 + 5),
    )


def adain_reference(content: Tensor, style: Tensor) -> Tensor:
    return reference.adain(content, *reference.instance_stats(style))


def adain_public(content: Tensor, style: Tensor) -> Tensor:
    """As in most public implementations: mean and variance by themselves, then four passes."""

    def mean_and_std(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(2)
        std = (flat.var(dim=2) + EPS).sqrt()
        return flat.mean(dim=2)[..., None, None], std[..., None, None]

    content_mean, content_std = mean_and_std(content)
    style_mean, style_std = mean_and_std(style)
    return (content - content_mean) / content_std * style_std + style_mean


def adain_as_batch_norm(content: Tensor, style: Tensor) -> Tensor:
    """The fastest that PyTorch's own kernels do: AdaIN as the batch norm of B·C channels."""
    batch, channels, height, width = content.shape
    positions = height * width
    style_variance, style_mean = torch.var_mean(style.float(), dim=(2, 3))
    biased = (positions - 1) / positions  # batch_norm divides by the biased variance
    scale = ((style_variance + EPS) * biased).sqrt()
    out = F.batch_norm(
        content.reshape(1, batch * channels, height, width),
        running_mean=None,
        running_var=None,
        weight=scale.flatten(),
        bias=style_mean.flatten(),
        training=True,
        eps=EPS * biased,
    )
    return out.view(batch, channels, height, width)


# --- AdaIN style loss ---------------------------------------------------------------------------


def style_loss_case(shape: tuple[int, ...], dtype: torch.dtype, layout: str, mode: str) -> Case:
    """One layer against the statistics of one style."""

    def inputs(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        x = feature_map(shape, dtype, layout, device, generator, requires_grad=True)
        statistics = torch.rand(2, 1, shape[1], device=device, generator=generator)
        return (x, *statistics)

    def with_fastgan(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return fastgan.adain_style_loss(x, fastgan.InstanceStats(mean, std))

    features = torch.Size(shape).numel() * dtype.itemsize
    return Case(
        op="adain_style_loss",
        shape="x".join(map(str, shape)),
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        mode=mode,
        inputs=inputs,
        exact=reference.adain_style_loss,
        variants=(
            eager("reference", reference.adain_style_loss),
            eager("public", style_loss_public),
            compiled(reference.adain_style_loss),
            fused(with_fastgan),
        ),
        bytes=features * (1 if mode == "forward" else 1 + 2),
        precision=dtype,
    )


def style_loss_public(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """As in most public implementations: two mean squared errors of two reductions."""
    flat = x.flatten(2)
    own_mean, own_std = flat.mean(dim=2), (flat.var(dim=2) + EPS).sqrt()
    mean, std = mean.expand_as(own_mean), std.expand_as(own_std)
    return F.mse_loss(own_mean.float(), mean) + F.mse_loss(own_std.float(), std)


# --- Instance norm ------------------------------------------------------------------------------


def norm_case(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    mode: str,
    gpu: bool,
    pad: int = 0,
) -> Case:
    """Norm, ReLU and reflection padding, as before every convolution of a residual block."""

    def inputs(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        x = off_the_kink(feature_map(shape, dtype, layout, device, generator))
        return (x.requires_grad_(),)

    exact = partial(reference.instance_norm, activation="relu", reflect_pad=pad)
    variants = [
        eager("reference", exact),
        eager("public", partial(norm_public, pad=pad)),
        eager("group_norm", partial(norm_as_group_norm, pad=pad)),
        compiled(partial(norm_public, pad=pad)),
        fused(partial(fastgan.instance_norm, activation="relu", reflect_pad=pad)),
    ]
    if gpu:
        variants.insert(-1, compiled(partial(norm_public, pad=pad), tune=True))
    batch, channels, height, width = shape
    plain = batch * channels * height * width * dtype.itemsize
    padded = batch * channels * (height + 2 * pad) * (width + 2 * pad) * dtype.itemsize
    return Case(
        op=op,
        shape="x".join(map(str, shape)),
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        mode=mode,
        inputs=inputs,
        exact=exact,
        variants=tuple(variants),
        bytes=plain + padded + (0 if mode == "forward" else 2 * plain + padded),
    )


def off_the_kink(x: Tensor) -> Tensor:
    """Moves what ReLU is about to switch: there rounding decides the gradient of every form."""
    std, mean = torch.std_mean(x.double(), dim=(2, 3), keepdim=True)
    normalised = (x - mean) / std
    return torch.where(normalised.abs() < 1e-3, x + 1e-2 * std * normalised.sign(), x).to(x)


def norm_public(x: Tensor, pad: int) -> Tensor:
    """The three modules of the public generators."""
    out = F.relu(F.instance_norm(x))
    return F.pad(out, (pad,) * 4, mode="reflect") if pad else out


def norm_as_group_norm(x: Tensor, pad: int) -> Tensor:
    """Group norm of one channel each, which knows channels_last where instance norm does not."""
    out = F.group_norm(x, x.shape[1]).relu_()
    return F.pad(out, (pad,) * 4, mode="reflect") if pad else out
