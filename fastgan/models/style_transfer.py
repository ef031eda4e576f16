"""The style transfer network: content encoder, style encoder, AdaIN, decoder.

Every part is constructed without arguments (the `LITE` sizes) or from a `StyleTransferConfig`, and
takes pictures of any size: features of a side of H pixels have ⌈H/4⌉ rows, which the decoder turns
into 4·⌈H/4⌉ pixels; `StyleTransferGAN` cuts what exceeds H.
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.models.blocks import NormedResidual, conv
from fastgan.nn import ReflectionPad2d
from fastgan.ops.instance_norm import InstanceStats, adain, instance_stats

MIN_SIDE = 8
"""Pictures with a shorter side than this, in pixels, are extended by repeating their border."""


@dataclasses.dataclass(frozen=True)
class StyleTransferConfig:
    """Sizes of the networks; features have 4·width channels."""

    width: int = 24
    """Channels at the picture's own resolution."""
    encoder_blocks: int = 2
    """Residual blocks at the end of the content encoder."""
    decoder_blocks: int = 2
    """Residual blocks at the beginning of the decoder."""


LITE = StyleTransferConfig()
"""For CPUs and phones: 0.9 million parameters."""
BASE = StyleTransferConfig(width=64, encoder_blocks=4, decoder_blocks=4)
"""For GPUs: 11 million parameters."""


class ContentEncoder(nn.Module):
    """Picture [B,3,H,W] -> content features [B, 4·width, ⌈H/4⌉, ⌈W/4⌉].

    Instance norm inside the residual blocks only: the features keep the picture's own statistics,
    so that decoding them as they are gives the picture back, and AdaIN has something to replace.
    """

    def __init__(self, config: StyleTransferConfig = LITE) -> None:
        super().__init__()
        width = config.width
        self.net = nn.Sequential(
            *_stem(width),
            *[NormedResidual(4 * width) for _ in range(config.encoder_blocks)],
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(_at_least_min_side(images))


class StyleEncoder(nn.Module):
    """Picture [B,3,h,w] -> style features [B, 4·width, ⌈h/4⌉, ⌈w/4⌉].

    No norm: mean and deviation of each channel are what these features are computed for.
    """

    def __init__(self, config: StyleTransferConfig = LITE) -> None:
        super().__init__()
        width = config.width
        self.net = nn.Sequential(
            *_stem(width),
            ReflectionPad2d(1),
            conv(4 * width, 4 * width, 3),
            nn.ReLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(_at_least_min_side(images))


class StyleTransferModule(nn.Module):
    """Gives content features the mean and deviation of the style's: :func:`fastgan.adain`.

    `style` is a feature map or its `InstanceStats`, `alpha` the strength, a float or a tensor [B].
    It has no parameters.

    Source: Huang, Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance
    Normalization", 2017.
    """

    def forward(
        self, content: Tensor, style: Tensor | InstanceStats, alpha: float | Tensor = 1.0
    ) -> Tensor:
        return adain(content, style, alpha=alpha)


class Decoder(nn.Module):
    """Features [B, 4·width, h, w] -> picture [B, 3, 4h, 4w] in [-1, 1].

    No norm, which would undo what AdaIN did. Enlarged by interpolation and then convolved: a
    transposed convolution leaves a checkerboard (Odena et al., "Deconvolution and Checkerboard
    Artifacts", 2016).
    """

    def __init__(self, config: StyleTransferConfig = LITE) -> None:
        super().__init__()
        width = config.width
        self.net = nn.Sequential(
            *[_Residual(4 * width) for _ in range(config.decoder_blocks)],
            _Enlarge(4 * width, 2 * width),
            _Enlarge(2 * width, width),
            ReflectionPad2d(2),
            conv(width, 3, 5, gain=0.5),
            nn.Tanh(),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features)


class StyleTransferGAN(nn.Module):
    """The generator: ``StyleTransferGAN()(content, style, alpha=1.0)`` gives the stylised content.

    `content` [B,3,H,W] and `style` [B or 1,3,h,w] are RGB in [-1, 1] of any size; the result is
    [B,3,H,W]. Statistics of style features may stand in for `style`, computed once
    (`encode_style`) or mixed. At `alpha` 0 the content's own features are decoded, at 1 they have
    the style's statistics.
    """

    def __init__(self, config: StyleTransferConfig = LITE) -> None:
        super().__init__()
        self.content_encoder = ContentEncoder(config)
        self.style_encoder = StyleEncoder(config)
        self.style_transfer = StyleTransferModule()
        self.decoder = Decoder(config)

    def encode_style(self, style: Tensor) -> InstanceStats:
        """All that AdaIN takes from style pictures [B,3,h,w]: two tensors [B, 4·width]."""
        return instance_stats(self.style_encoder(style))

    def forward(
        self, content: Tensor, style: Tensor | InstanceStats, alpha: float | Tensor = 1.0
    ) -> Tensor:
        features = self.style_transfer(
            self.content_encoder(content),
            self.style_encoder(style) if isinstance(style, Tensor) else style,
            alpha,
        )
        return self.decoder(features)[..., : content.shape[2], : content.shape[3]]


def _stem(width: int) -> list[nn.Module]:
    """Picture -> 4·width channels at a quarter of its side."""
    return [
        ReflectionPad2d(2),
        conv(3, width, 5),
        nn.ReLU(),
        ReflectionPad2d(1),
        conv(width, 2 * width, 3, stride=2),
        nn.ReLU(),
        ReflectionPad2d(1),
        conv(2 * width, 4 * width, 3, stride=2),
        nn.ReLU(),
    ]


class _Residual(nn.Module):
    """x + conv(relu(conv(x))), at constant size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            ReflectionPad2d(1),
            conv(channels, channels, 3),
            nn.ReLU(),
            ReflectionPad2d(1),
            conv(channels, channels, 3, gain=0.2),  # begins near x
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class _Enlarge(nn.Module):
    """Twice the side by bilinear interpolation, then a convolution and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pad = ReflectionPad2d(1)
        self.conv = conv(in_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        return F.relu(self.conv(self.pad(x)))


def _at_least_min_side(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    if min(height, width) >= MIN_SIDE:
        return images
    missing = (0, max(0, MIN_SIDE - width), 0, max(0, MIN_SIDE - height))
    return F.pad(images, missing, mode="replicate")
