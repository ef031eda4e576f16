"""Inference: pictures of one size through the networks of a recipe, without autograd.

On a GPU in bf16 throughout, weights included. The results are compared with fp64.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastgan
from bench_training import TINY_CYCLEGAN, TINY_STYLE, seeded
from fastgan.recipes import recipe_class
from harness import Case, Report, Variant
from plain_cyclegan import Generator, initialise

Model = torch.nn.Module
CPU, BF16 = torch.float32, torch.bfloat16
# batch and side of the pictures, dtype
SETTINGS = {
    "tiny": [(1, 24, CPU)],
    "cpu": [(1, 256, CPU)],
    "gpu": [(1, 256, BF16), (8, 256, BF16), (1, 1024, BF16)],
}


def cases(sizes: str) -> Iterator[Case]:
    tiny = sizes == "tiny"
    for batch, size, dtype in SETTINGS[sizes]:
        shape = (batch, 3, size, size)
        yield cyclegan_case(shape, dtype, **(TINY_CYCLEGAN if tiny else {}))
        yield style_transfer_case(shape, dtype, **(TINY_STYLE if tiny else {}))


def test_inference(record: Report, case: Case, variant: str) -> None:
    record(case, variant)


def cyclegan_case(shape: tuple[int, ...], dtype: torch.dtype, **config: int) -> Case:
    """The plain ResNet generator, as a user of CycleGAN has it, and with one line of fastgan's."""
    with seeded():
        plain = Generator(**config)
        initialise(plain)

    def model() -> Model:
        return copy.deepcopy(plain)

    def tuned() -> Model:
        return model().to(memory_format=torch.channels_last)

    def compiled() -> Model:
        network = tuned()
        network.compile(dynamic=False, fullgraph=True)
        return network

    return inference_case(
        "cyclegan generator",
        shape,
        dtype,
        pictures=1,
        exact=model,
        variants={
            "public": ("eager", model),
            "public channels_last": ("eager", tuned),
            "torch.compile": ("compile", compiled),
            "convert()": ("fastgan", lambda: fastgan.nn.convert(tuned())),
        },
    )


def style_transfer_case(shape: tuple[int, ...], dtype: torch.dtype, **config: int) -> Case:
    """A content picture in the style of a style picture."""
    kind = recipe_class("style_transfer")
    first = next(iter(kind.presets.values())).config
    with seeded():
        generator = kind(dataclasses.replace(first, **config)).generator

    def model() -> Model:
        return copy.deepcopy(generator).to(memory_format=torch.channels_last)

    return inference_case(
        "style_transfer generator",
        shape,
        dtype,
        pictures=2,
        exact=model,
        variants={
            "reference path": ("eager", lambda: OnReferencePath(model())),
            "fastgan": ("fastgan", model),
        },
    )


class OnReferencePath(torch.nn.Module):
    """A network whose calls of fastgan's ops are plain PyTorch."""

    def __init__(self, network: Model) -> None:
        super().__init__()
        self.network = network

    def forward(self, *images: Tensor) -> Tensor:
        with fastgan.use_impl("reference"):
            return self.network(*images)


def inference_case(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    pictures: int,
    exact: Callable[[], Model],
    variants: dict[str, tuple[str, Callable[[], Model]]],
) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        images = 2 * torch.rand((pictures, *shape), device=device, generator=generator) - 1
        images = images.to(dtype)
        return tuple(x.contiguous(memory_format=torch.channels_last) for x in images)

    def prepared(build: Callable[[], Model]) -> Callable[..., Tensor]:
        network = build().eval()
        ready = False

        def call(*images: Tensor) -> Tensor:
            nonlocal ready
            if not ready:  # the harness decides where, and for the exact result in which dtype
                network.to(images[0].device, images[0].dtype)
                ready = True
            return network(*images)

        return call

    return Case(
        op=op,
        shape="x".join(map(str, shape)),
        dtype=str(dtype).removeprefix("torch."),
        layout="channels_last",
        mode="forward",
        inputs=inputs,
        exact=prepared(lambda: OnReferencePath(exact())),
        variants=tuple(
            Variant(name, kind, lambda build=build: prepared(build))
            for name, (kind, build) in variants.items()
        ),
        rotate=False,
        deep=True,
    )
