"""GAN losses over the logits of PatchGANs: a few thousand numbers, so launches and dispatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgan
from fastgan import reference
from harness import Case, Report, compiled, eager, fused

# Logits of one image pair by scale. Three PatchGANs at 256 pixels, one at 512, and what only
# bandwidth limits.
THREE_SCALES = ((8, 1, 30, 30), (8, 1, 14, 14), (8, 1, 6, 6))
SHAPES = {
    "tiny": [((2, 1, 5, 7), (2, 1, 2, 3))],
    "cpu": [THREE_SCALES, ((8, 1, 512, 512),)],
    "gpu": [
        THREE_SCALES,
        ((1, 1, 30, 30), (1, 1, 14, 14), (1, 1, 6, 6)),
        ((8, 1, 62, 62), (8, 1, 30, 30), (8, 1, 14, 14)),
        ((8, 1, 512, 512),),
    ],
}
LOSSES = {
    "tiny": ["bce", "lsgan", "hinge"],
    "cpu": ["bce", "lsgan", "hinge", "wgan"],
    "gpu": ["bce", "lsgan", "hinge"],
}
DTYPES = {"tiny": [torch.float32], "cpu": [torch.float32], "gpu": [torch.bfloat16]}
MODES = ("forward", "forward+backward")


def cases(sizes: str) -> Iterator[Case]:
    for scales in SHAPES[sizes]:
        for loss in LOSSES[sizes]:
            for dtype in DTYPES[sizes]:
                for mode in MODES:
                    yield discriminator_case(scales, dtype, loss, mode)
    for dtype in DTYPES[sizes]:
        for mode in MODES:
            yield generator_case(SHAPES[sizes][0], dtype, "bce", mode)


def test_gan_loss(record: Report, case: Case, variant: str) -> None:
    record(case, variant)


# --- Discriminator ------------------------------------------------------------------------------


def discriminator_case(
    scales: Sequence[Sequence[int]], dtype: torch.dtype, loss: str, mode: str
) -> Case:
    """The sum over the scales; gradients to the logits of real and generated images."""
    count = len(scales)

    def over_scales(one_scale: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def total(*logits: Tensor) -> Tensor:
            pairs = zip(logits[:count], logits[count:], strict=True)
            return torch.stack([one_scale(real, fake) for real, fake in pairs]).sum()

        return total

    def fastgan_loss(*logits: Tensor) -> Tensor:
        return fastgan.discriminator_loss(logits[:count], logits[count:], mode=loss)

    exact = over_scales(partial(reference.discriminator_loss, mode=loss))
    return _case(
        f"discriminator_loss {loss}",
        [*scales, *scales],
        scales,
        dtype,
        mode,
        exact,
        public=over_scales(PUBLIC_DISCRIMINATOR[loss]),
        own=fastgan_loss,
    )


def _public_bce(real: Tensor, fake: Tensor) -> Tensor:
    """Public code's form: labels expanded to the prediction, a loss each for real and fake."""
    real_loss = F.binary_cross_entropy_with_logits(real.float(), torch.ones_like(real).float())
    return real_loss + F.binary_cross_entropy_with_logits(
        fake.float(), torch.zeros_like(fake).float()
    )


def _public_lsgan(real: Tensor, fake: Tensor) -> Tensor:
    real_loss = F.mse_loss(real.float(), torch.ones_like(real).float())
    return real_loss + F.mse_loss(fake.float(), torch.zeros_like(fake).float())


def _public_hinge(real: Tensor, fake: Tensor) -> Tensor:
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def _public_wgan(real: Tensor, fake: Tensor) -> Tensor:
    return fake.float().mean() - real.float().mean()


PUBLIC_DISCRIMINATOR = {
    "bce": _public_bce,
    "lsgan": _public_lsgan,
    "hinge": _public_hinge,
    "wgan": _public_wgan,
}


# --- Generator ----------------------------------------------------------------------------------


def generator_case(
    scales: Sequence[Sequence[int]], dtype: torch.dtype, loss: str, mode: str
) -> Case:
    """The generator's side, non-saturating."""

    def over_scales(one_scale: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda *logits: torch.stack([one_scale(fake) for fake in logits]).sum()

    def public(fake: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(fake.float(), torch.ones_like(fake).float())

    return _case(
        f"generator_loss {loss}",
        scales,
        scales,
        dtype,
        mode,
        over_scales(partial(reference.generator_loss, mode=loss)),
        public=over_scales(public),
        own=lambda *logits: fastgan.generator_loss(logits, mode=loss),
    )


# --- Both ---------------------------------------------------------------------------------------


def _case(
    op: str,
    shapes: Sequence[Sequence[int]],
    scales: Sequence[Sequence[int]],
    dtype: torch.dtype,
    mode: str,
    exact: Callable[..., Tensor],
    *,
    public: Callable[..., Tensor],
    own: Callable[..., Tensor],
) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        logits = (torch.randn(shape, device=device, generator=generator) for shape in shapes)
        return tuple((2 * x).to(dtype).requires_grad_() for x in logits)

    variants = (eager("reference", exact), eager("public", public), compiled(exact), fused(own))
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    first = "x".join(map(str, scales[0]))
    return Case(
        op=op,
        shape=first if len(scales) == 1 else f"{len(scales)} scales from {first}",
        dtype=str(dtype).removeprefix("torch."),
        layout="",
        mode=mode,
        inputs=inputs,
        exact=exact,
        variants=variants,
        bytes=elements * dtype.itemsize * (1 if mode == "forward" else 3),
        rotate=elements * dtype.itemsize > 2**20,  # logits are fresh in the cache when used
    )
