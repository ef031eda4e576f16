"""Gram matrices and style loss over VGG-like features: few channels, many positions.

First of all this answers whether cuBLAS splits K for such products, batched 64 x 64 x 65536: the
`split-K bmm` variant beside `baddbmm`, and the names of the kernels both launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgan
from fastgan import reference
from harness import Case, Report, Variant, compiled, eager, feature_map, fused, library

# Features of VGG-19 after the first convolution of each block, [C, H, W], at 256 and 512 pixels.
VGG_256 = [(64, 256, 256), (128, 128, 128), (256, 64, 64), (512, 32, 32)]
VGG_512 = [(64, 512, 512), (512, 64, 64)]
AWKWARD = [(65, 31, 33), (130, 61, 77)]
CPU_SHAPES = {"tiny": [(2, 3, 5, 7)], "cpu": [(4, 64, 256, 256), (4, 512, 32, 32)]}
FORWARD, BOTH = "forward", "forward+backward"


def cases(sizes: str) -> Iterator[Case]:
    if sizes == "gpu":
        for features, batch, layout, dtype in gpu_inputs():
            yield gram_case((batch, *features), dtype, layout, gpu=True)
            yield style_case([(batch, *features)], dtype, layout, gpu=True)
        for layout in ("nchw", "channels_last"):
            layers = [(4, *features) for features in VGG_256]
            yield style_case(layers, torch.bfloat16, layout, gpu=True)
        return
    for shape in CPU_SHAPES[sizes]:
        yield gram_case(shape, torch.float32, "nchw")
        yield style_case([shape], torch.float32, "nchw")


def gpu_inputs() -> Iterator[tuple[tuple[int, int, int], int, str, torch.dtype]]:
    """Features [C, H, W], batch, layout, dtype."""
    for features in VGG_256 + VGG_512:
        for batch, layout in ((1, "nchw"), (8, "nchw"), (8, "channels_last")):
            yield features, batch, layout, torch.bfloat16
    for features in AWKWARD:
        for layout in ("nchw", "channels_last"):
            yield features, 3, layout, torch.bfloat16
    yield (64, 256, 256), 32, "nchw", torch.bfloat16
    for features in ((64, 256, 256), (512, 64, 64)):
        for dtype in (torch.float16, torch.float32):
            yield features, 8, "nchw", dtype


def test_gram(record: Report, case: Case, variant: str) -> None:
    record(case, variant)


# --- Gram matrix --------------------------------------------------------------------------------


def gram_case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, *, gpu: bool = False
) -> Case:
    """The forward, as for a style's targets."""

    def inputs(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (feature_map(shape, dtype, layout, device, generator),)

    variants = [
        eager("reference", reference.gram_matrix),
        eager("public", gram_public),
        library("baddbmm", gram_in_one_product),
        library("split-K bmm", gram_of_shares),
        compiled(reference.gram_matrix),
        *_for_gpus(gpu, compiled(reference.gram_matrix, tune=True), *symmetric_peer(dtype)),
    ]
    return Case(
        op="gram_matrix",
        shape="x".join(map(str, shape)),
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        mode=FORWARD,
        inputs=inputs,
        exact=reference.gram_matrix,
        variants=(*variants, fused(fastgan.gram_matrix)),
        bytes=_feature_bytes(shape, dtype) + _gram_bytes(shape),
        flops=_gram_flops(shape),
    )


def gram_public(features: Tensor) -> Tensor:
    """As public code writes it: the product in the dtype of the features, then the division."""
    batch, channels, height, width = features.shape
    flat = features.reshape(batch, channels, height * width)
    return torch.bmm(flat, flat.transpose(1, 2)) / (channels * height * width)


def gram_in_one_product(features: Tensor) -> Tensor:
    """One call of cuBLAS that divides in its epilogue, where nothing overflows or underflows."""
    batch, channels, height, width = features.shape
    flat = features.flatten(2)
    nothing = features.new_empty(batch, channels, channels)
    scale = 1.0 / (channels * height * width)
    return torch.baddbmm(nothing, flat, flat.mT, beta=0, alpha=scale)


def gram_of_shares(features: Tensor) -> Tensor:
    """The positions shared out by hand, one more product of the batch each.

    Where this beats a single product, cuBLAS does not split K well enough by itself; the kernels'
    names in the stored records say whether it does at all.
    """
    batch, channels, height, width = features.shape
    positions = height * width
    shares = 1
    while batch * shares < 256 and positions % (2 * shares) == 0 and positions > 1024 * shares:
        shares *= 2
    runs = features.flatten(2).unflatten(2, (shares, -1)).movedim(2, 1)  # [B, shares, C, run]
    if batch == 1 or features.is_contiguous(memory_format=torch.channels_last):
        flat = runs.flatten(0, 1)  # a view
        partials = torch.bmm(flat, flat.mT).unflatten(0, (batch, shares))
    else:
        partials = torch.stack([torch.bmm(image, image.mT) for image in runs])
    return partials.sum(1, dtype=torch.float32) / (channels * positions)


def symmetric_peer(dtype: torch.dtype) -> list[Variant]:
    """quack's symmetric product, where it is installed."""
    try:
        from quack.gemm_interface import gemm_symmetric
    except ImportError:
        return []

    def gram(features: Tensor) -> Tensor:
        batch, channels, height, width = features.shape
        flat = features.flatten(2)
        out = features.new_empty(batch, channels, channels)
        gemm_symmetric(flat, flat.mT, out=out, alpha=1.0 / (channels * height * width))
        return out

    takes = dtype in (torch.bfloat16, torch.float16)
    return [Variant("quack", "peer", lambda: gram)] if takes else []


# --- Style loss ---------------------------------------------------------------------------------


def style_case(
    shapes: Sequence[tuple[int, int, int, int]],
    dtype: torch.dtype,
    layout: str,
    *,
    gpu: bool = False,
) -> Case:
    """The loss against cached targets, over one layer or several; gradients to the features."""
    count = len(shapes)

    def inputs(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        make = partial(feature_map, dtype=dtype, layout=layout, device=device, generator=generator)
        features = [make(shape, requires_grad=True) for shape in shapes]
        styles = [make((1, *shape[1:])) for shape in shapes]
        return *features, *(reference.gram_matrix(style) for style in styles)

    def over_layers(one_layer, *tensors: Tensor) -> Tensor:
        pairs = zip(tensors[:count], tensors[count:], strict=True)
        losses = [one_layer(features, target) for features, target in pairs]
        return losses[0] if count == 1 else torch.stack(losses).sum()

    def fastgan_loss(*tensors: Tensor) -> Tensor:
        return fastgan.style_loss(tensors[:count], tensors[count:])

    exact = partial(over_layers, reference.style_loss)
    variants = [
        eager("reference", exact),
        eager("public", partial(over_layers, style_public)),
        eager("baddbmm", partial(over_layers, style_in_one_product)),
        compiled(exact),
        *_for_gpus(gpu, compiled(exact, tune=True)),
    ]
    return Case(
        op="style_loss",
        shape=", ".join("x".join(map(str, shape)) for shape in shapes),
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        mode=BOTH,
        inputs=inputs,
        exact=exact,
        variants=(*variants, fused(fastgan_loss)),
        bytes=sum(3 * _feature_bytes(s, dtype) + _gram_bytes((1, *s[1:])) for s in shapes),
        flops=sum(_gram_flops(s) + 2 * s[0] * s[1] ** 2 * s[2] * s[3] for s in shapes),
    )


def style_public(features: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of Gram matrices, times C²/4 to be the same loss as ours."""
    channels = features.shape[1]
    gram = gram_public(features).float()
    return F.mse_loss(gram, target.expand_as(gram)) * (channels**2 / 4)


def style_in_one_product(features: Tensor, target: Tensor) -> Tensor:
    channels = features.shape[1]
    gram = gram_in_one_product(features).float()
    return F.mse_loss(gram, target.expand_as(gram)) * (channels**2 / 4)


# --- Counts -------------------------------------------------------------------------------------


def _feature_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _gram_bytes(shape: Sequence[int]) -> int:
    return shape[0] * shape[1] ** 2 * 4


def _gram_flops(shape: Sequence[int]) -> int:
    """One triangle: a Gram matrix is symmetric."""
    batch, channels, height, width = shape
    return batch * channels * (channels + 1) * height * width


def _for_gpus(gpu: bool, *variants: Variant) -> tuple[Variant, ...]:
    return variants if gpu else ()
