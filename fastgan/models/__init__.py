"""Networks: generators, discriminators, and the frozen extractors losses compare features in."""

from fastgan.models.discriminator import Discriminator, DiscriminatorConfig
from fastgan.models.features import RandomFeatures, VGG19Features
from fastgan.models.patchgan import PatchGAN
from fastgan.models.resnet import ResnetGenerator, load_cyclegan_generator
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
    "PatchGAN",
    "RandomFeatures",
    "ResnetGenerator",
    "StyleEncoder",
    "StyleTransferConfig",
    "StyleTransferGAN",
    "StyleTransferModule",
    "VGG19Features",
    "load_cyclegan_generator",
]
