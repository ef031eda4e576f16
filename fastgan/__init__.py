"""Fused kernels and mixed-precision training for style-transfer GANs in PyTorch."""

from fastgan import models, nn, reference
from fastgan.ops._dispatch import ImplUnavailableError, explain, use_impl
from fastgan.ops.gan_loss import (
    DiscriminatorStats,
    discriminator_loss,
    discriminator_loss_with_stats,
    generator_loss,
)
from fastgan.ops.gram import content_loss, gram_matrix, style_loss
from fastgan.ops.instance_norm import (
    InstanceStats,
    adain,
    adain_style_loss,
    instance_norm,
    instance_stats,
)

__version__ = "0.1.0"

__all__ = [
    "DiscriminatorStats",
    "ImplUnavailableError",
    "InstanceStats",
    "__version__",
    "adain",
    "adain_style_loss",
    "content_loss",
    "discriminator_loss",
    "discriminator_loss_with_stats",
    "explain",
    "generator_loss",
    "gram_matrix",
    "instance_norm",
    "instance_stats",
    "models",
    "nn",
    "reference",
    "style_loss",
    "use_impl",
]
