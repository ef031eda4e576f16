"""Networks: style transfer, discriminator, and the frozen extractors losses compare features in."""

from fastgan.models.discriminator import Discriminator, DiscriminatorConfig
from fastgan.models.features import RandomFeatures, VGG19Features
from fastgan.models.style_transfer import (
    BASE,
    LITE,
    ContentEncoder,
    Decoder,
    StyleEncoder,
    StyleTransferConfig,
    StyleTransferGAN,
    StyleTransferModule,
)

__all__ = [
    "BASE",
    "LITE",
    "ContentEncoder",
    "Decoder",
    "Discriminator",
    "DiscriminatorConfig",
    "RandomFeatures",
    "StyleEncoder",
    "StyleTransferConfig",
    "StyleTransferGAN",
    "StyleTransferModule",
    "VGG19Features",
]
