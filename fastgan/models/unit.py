"""The networks of UNIT: autoencoders of two domains that meet in one latent space.

Source: Liu, Breuel, Kautz, "Unsupervised Image-to-Image Translation Networks", 2017. The layers are
those of its authors' second implementation (stride-2 4x4 downsampling, 5x5 convolutions after
upsampling, layer norm in the decoder). A convolution whose bias instance norm would take away
again has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.models.init import kaiming_init, normal_init
from fastgan.models.resnet import ResidualBlocks
from fastgan.nn import ReflectionPad2d
from fastgan.ops.instance_norm import instance_norm, instance_stats


class LayerNorm(nn.Module):
    r"""Normalises each image over channels and positions, scales and shifts each channel.

    .. math:: y = \mathrm{act}\Bigl(\frac{x - \mu}{\sigma + \epsilon} \gamma_c + \beta_c\Bigr)

    with the mean and the unbiased standard deviation of a whole [C, H, W], as MUNIT and UNIT define
    it. Runs as one :func:`fastgan.instance_norm` with a weight and a bias per plane, which undo
    each plane's own statistics in favour of the image's.

    Args:
        channels: C.
        activation, reflect_pad: as in :func:`fastgan.instance_norm`.
    """

    _EPS = 1e-5

    def __init__(
        self, channels: int, *, activation: str | None = None, reflect_pad: int = 0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.activation = activation
        self.reflect_pad = reflect_pad

    def forward(self, x: Tensor) -> Tensor:
        mean, std = instance_stats(x, eps=self._EPS, correction=0)  # [B, C], of planes
        own_mean = mean.mean(1, keepdim=True)  # [B, 1], of images
        offset = mean - own_mean
        biased = (std.square() - self._EPS + offset.square()).mean(1, keepdim=True)
        count = x[0].numel()
        # An image of one value has no slope to follow: the bound keeps its gradient finite.
        own_std = (biased * (count / (count - 1))).clamp_min(1e-12).sqrt()
        scale = self.weight / (own_std + self._EPS)
        return instance_norm(
            x,
            weight=scale * std,
            bias=scale * offset + self.bias,
            activation=self.activation,
            reflect_pad=self.reflect_pad,
            eps=self._EPS,
        )


class Encoder(nn.Module):
    """Pictures to the mean of their latent distribution, whose standard deviation is 1.

    [B,3,H,W] -> [B, width·2^n, H/2^n, W/2^n] with n downsamplings; H and W are multiples of 2^n
    and at least 2·2^n.
    """

    def __init__(self, width: int = 64, downsamplings: int = 2, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(ReflectionPad2d(3), nn.Conv2d(3, width, 7, bias=False))
        self.down = nn.ModuleList(
            nn.Conv2d(width << i, width << i + 1, 4, stride=2, bias=False)
            for i in range(downsamplings)
        )
        self.blocks = ResidualBlocks(width << downsamplings, blocks)
        self.apply(kaiming_init)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.stem(pictures)
        for down in self.down:
            x = down(instance_norm(x, activation="relu", reflect_pad=1))
        return self.blocks(instance_norm(x, activation="relu", reflect_pad=1))


class Decoder(nn.Module):
    """Latents to pictures: the way of `Encoder` back.

    [B, width·2^n, h, w] -> [B,3,h·2^n,w·2^n] in [-1, 1], with n upsamplings, at least 1.
    """

    def __init__(self, width: int = 64, upsamplings: int = 2, blocks: int = 4) -> None:
        super().__init__()
        self.pad = ReflectionPad2d(1)
        self.blocks = ResidualBlocks(width << upsamplings, blocks)
        up: list[nn.Module] = []
        for i in reversed(range(upsamplings)):
            up += [
                nn.Upsample(scale_factor=2),
                ReflectionPad2d(2),
                nn.Conv2d(width << i + 1, width << i, 5),
                LayerNorm(width << i, activation="relu", reflect_pad=0 if i else 3),
            ]
        self.up = nn.Sequential(*up)
        self.head = nn.Conv2d(width, 3, 7)
        self.apply(kaiming_init)

    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(self.head(self.up(self.blocks(self.pad(latents)))))


class Discriminator(nn.Module):
    """The same judge, with weights of its own, at several scales of the picture.

    Each is a stack of stride-2 4x4 convolutions without norm and a 1x1 convolution to logits;
    average pooling halves the picture from one scale to the next. [B,3,H,W] -> list of logits
    [B,1,h,w], finest first.

    Raises:
        ValueError: the picture is too small for the last convolution of the coarsest scale.
    """

    def __init__(self, width: int = 64, layers: int = 4, scales: int = 3) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_judge(width, layers) for _ in range(scales))
        self.smallest = 2 ** (layers + scales - 1)
        """Height and width of the smallest pictures it can judge."""
        self.apply(normal_init)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        if min(pictures.shape[2:]) < self.smallest:
            raise ValueError(
                f"Discriminator: pictures must be at least {self.smallest} px high and wide for "
                f"its layers and {len(self.scales)} scales, got {list(pictures.shape)}"
            )
        logits = [self.scales[0](pictures)]
        for judge in self.scales[1:]:
            pictures = F.avg_pool2d(pictures, 3, 2, padding=1, count_include_pad=False)
            logits.append(judge(pictures))
        return logits


def _judge(width: int, layers: int) -> nn.Sequential:
    """One scale of `Discriminator`."""
    channels, blocks = 3, list[nn.Module]()
    for i in range(layers):
        convolution = nn.Conv2d(channels, width << i, 4, stride=2)
        blocks += [ReflectionPad2d(1), convolution, nn.LeakyReLU(0.2, inplace=True)]
        channels = width << i
    return nn.Sequential(*blocks, nn.Conv2d(channels, 1, 1))


def share_latent(encoders: Sequence[Encoder], decoders: Sequence[Decoder]) -> None:
    """Makes the last block of every encoder one block, and the first one of every decoder.

    That is the paper's assumption of a shared latent space as weights.
    """
    for encoder in encoders[1:]:
        encoder.blocks[-1] = encoders[0].blocks[-1]
    for decoder in decoders[1:]:
        decoder.blocks[0] = decoders[0].blocks[0]
