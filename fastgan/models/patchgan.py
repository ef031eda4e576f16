"""The discriminator of pix2pix and CycleGAN."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.models.init import normal_init
from fastgan.ops.instance_norm import instance_norm


class PatchGAN(nn.Module):
    """Judges overlapping patches: [B,3,H,W] -> logits [B,1,h,w]; 70x70 px by default.

    4x4 convolutions with zero padding: `layers` of stride 2, from `width` channels on twice as many
    each, at most eightfold, then two of stride 1; instance norm and leaky ReLU between them, but
    for the first, which has no norm. A convolution before a norm has no bias. Initial weights are
    N(0, 0.02²).

    Raises:
        ValueError: the picture is too small for the last convolution.

    Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        channels = [width * min(1 << i, 8) for i in range(layers + 1)]
        self.first = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.middle = nn.ModuleList(
            nn.Conv2d(
                channels[i],
                channels[i + 1],
                4,
                stride=2 if i + 1 < layers else 1,
                padding=1,
                bias=False,
            )
            for i in range(layers)
        )
        self.last = nn.Conv2d(channels[-1], 1, 4, padding=1)
        self.smallest = 3 << layers
        """Height and width of the smallest pictures it can judge."""
        self.apply(normal_init)

    def forward(self, pictures: Tensor) -> Tensor:
        if min(pictures.shape[2:]) < self.smallest:
            raise ValueError(
                f"PatchGAN: pictures must be at least {self.smallest} px high and wide for its "
                f"{len(self.middle)} layers, got {list(pictures.shape)}"
            )
        x = F.leaky_relu(self.first(pictures), 0.2)
        for convolution in self.middle:
            x = instance_norm(convolution(x), activation="leaky_relu", negative_slope=0.2)
        logits: Tensor = self.last(x)
        return logits
