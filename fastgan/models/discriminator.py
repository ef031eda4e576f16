"""Multi-scale PatchGAN: is each patch of a picture real, at several scales?"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.models.blocks import ConvNorm
from fastgan.nn import ReflectionPad2d


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminator."""

    width: int = 24
    """Channels after the first layer; doubled by each further one, up to eightfold."""
    layers: int = 3
    """Layers of stride 2 per scale; 3 judge patches of 38 pixels."""
    scales: int = 2
    """Scales: the picture, its half, its quarter, ..."""


class Discriminator(nn.Module):
    """Picture [B,3,H,W] -> logits, a list of maps [B,1,h,w], one per scale, finest first.

    D(x) = sigmoid(logits). The scales have networks of the same form and weights of their own.

    Raises:
        ValueError: the picture is too small for the last convolution of the coarsest scale.

    Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017
    (patches); Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with
    Conditional GANs", 2018 (scales).
    """

    def __init__(self, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        config = config or DiscriminatorConfig()
        self.scales = nn.ModuleList(_patch_network(config) for _ in range(config.scales))
        self.smallest = 2 ** (config.layers + config.scales)
        """Height and width of the smallest pictures it can judge."""

    def forward(self, images: Tensor) -> list[Tensor]:
        if min(images.shape[2:]) < self.smallest:
            raise ValueError(
                f"Discriminator: images must be at least {self.smallest} px high and wide for "
                f"its layers and {len(self.scales)} scales, got {list(images.shape)}"
            )
        logits = []
        for index, network in enumerate(self.scales):
            if index > 0:
                images = F.avg_pool2d(images, 2)
            logits.append(network(images))
        return logits


def _patch_network(config: DiscriminatorConfig) -> nn.Sequential:
    width = config.width
    layers: list[nn.Module] = [
        ReflectionPad2d(1),
        nn.Conv2d(3, width, 4, stride=2),
        nn.LeakyReLU(0.2),
        ReflectionPad2d(1),
    ]
    channels = width
    for index in range(1, config.layers):
        wider = width * min(2**index, 8)
        layers.append(
            ConvNorm(channels, wider, 4, stride=2, activation="leaky_relu", reflect_pad=1)
        )
        channels = wider
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 3))
