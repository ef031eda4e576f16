"""UNIT: unpaired translation through a latent space that two domains share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.models.unit import Decoder, Discriminator, Encoder, share_latent
from fastgan.ops.gan_loss import (
    DiscriminatorStats,
    discriminator_loss_with_stats,
    generator_loss,
)
from fastgan.recipes.recipe import AdamSettings, Batch, Preset, RecipeConfig
from fastgan.recipes.two_domains import TwoDomainRecipe, discriminator_metrics, judge
from fastgan.reference import widen


@dataclasses.dataclass(frozen=True)
class UNITConfig(RecipeConfig):
    """Networks, losses and learning rates of UNIT, by default those of the authors' public code.

    Only `share_latent` follows the paper; the public code shares nothing.
    """

    width: int = 64
    """Channels of encoders and decoders at full resolution; they double with each halving."""
    downsamplings: int = 2
    """Halvings of the picture on the way to its latent."""
    residual_blocks: int = 4
    """Residual blocks of each encoder and of each decoder."""
    share_latent: bool = True
    """Share the last block of the encoders and the first of the decoders, as the paper does."""
    discriminator_width: int = 64
    """Channels of the discriminators' first layer; they double with each layer."""
    discriminator_layers: int = 4
    """Stride-2 layers of the discriminators."""
    discriminator_scales: int = 3
    """Scales of the picture that are judged, each half the one before."""
    latent_noise: float = 1.0
    """Standard deviation of the noise on the latents in training; 0 is none."""
    gan_mode: Literal["bce", "lsgan", "hinge", "wgan"] = "lsgan"
    """Form of the adversarial losses; wgan comes without clipping or penalty of the critic."""

    weight_adversarial: float = 1.0
    """Weight of the adversarial losses."""
    weight_reconstruction: float = 10.0
    """Weight of L1 between a picture and its own reconstruction."""
    weight_kl: float = 0.01
    """Weight of the mean square of a picture's latent means."""
    weight_cycle: float = 10.0
    """Weight of L1 between a picture and its translation to the other domain and back."""
    weight_kl_cycle: float = 0.01
    """Weight of the mean square of a translated picture's latent means."""

    lr: float = 1e-4
    """Learning rate of all networks."""
    beta1: float = 0.5
    """Adam's decay of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient."""
    weight_decay: float = 1e-4
    """What Adam adds to the gradient of a weight, times that weight."""
    lr_decay: float = 0.5
    """What the learning rate is multiplied with every lr_decay_every steps."""
    lr_decay_every: int = 100_000
    """Steps between decays of the learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "width", "downsamplings", "residual_blocks", "lr_decay_every")
        self._require(1, "discriminator_width", "discriminator_layers", "discriminator_scales")
        self._require(0, "latent_noise")


@dataclasses.dataclass
class _Translations:
    """What a step's phases share; every value by domain."""

    means: dict[str, Tensor]
    """Latent means of the pictures."""
    reconstructions: dict[str, Tensor]
    fakes: dict[str, Tensor]
    """Pictures of the other domain, translated into this one."""
    stats: dict[str, DiscriminatorStats] = dataclasses.field(default_factory=dict)


class UNIT(TwoDomainRecipe):
    """Translates pictures of A into pictures of B and back, through latents that both share.

    Each domain has a variational autoencoder whose posterior has the standard deviation 1; the
    encoder of one domain and the decoder of the other translate. The discriminators are updated
    first, on the fakes that the autoencoders are then updated with.

    Source: Liu, Breuel, Kautz, "Unsupervised Image-to-Image Translation Networks", 2017.
    """

    name: ClassVar[str] = "unit"
    phases: ClassVar[tuple[str, ...]] = ("discriminator", "generator")
    config_class: ClassVar[type[RecipeConfig]] = UNITConfig
    presets: ClassVar[Mapping[str, Preset]] = {
        "base": Preset(UNITConfig(), size=256, batch_size=1),
        "lite": Preset(
            UNITConfig(
                width=16,
                residual_blocks=2,
                discriminator_width=16,
                discriminator_layers=3,
                discriminator_scales=2,
                lr=4e-4,
            ),
            size=128,
            batch_size=4,
        ),
    }

    config: UNITConfig

    def __init__(self, config: UNITConfig) -> None:
        super().__init__(config)
        network = (config.width, config.downsamplings, config.residual_blocks)
        encoders = [Encoder(*network) for _ in self.domains]
        decoders = [Decoder(*network) for _ in self.domains]
        if config.share_latent:
            share_latent(encoders, decoders)
        discriminators = [
            Discriminator(
                config.discriminator_width,
                config.discriminator_layers,
                config.discriminator_scales,
            )
            for _ in self.domains
        ]
        self.size_multiple = 1 << config.downsamplings
        self.smallest = discriminators[0].smallest
        self.encoders = nn.ModuleDict(dict(zip(self.domains, encoders, strict=True)))
        self.decoders = nn.ModuleDict(dict(zip(self.domains, decoders, strict=True)))
        self.discriminators = nn.ModuleDict(dict(zip(self.domains, discriminators, strict=True)))

    def networks(self, phase: str) -> Sequence[nn.Module]:
        if phase == "discriminator":
            return [self.discriminators]
        return [self.encoders, self.decoders]

    def optimizer(self, phase: str) -> AdamSettings:
        config = self.config
        return AdamSettings(
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )

    def lr_factor(self, phase: str, step: int, steps_per_epoch: int) -> float:
        return self.config.lr_decay ** (step // self.config.lr_decay_every)

    def default_steps(self, steps_per_epoch: int) -> int:
        return 1_000_000

    def begin_step(self, batch: Batch) -> _Translations:
        means = {domain: self.encoders[domain](batch[domain]) for domain in self.domains}
        latents = torch.cat([self._sample(means[domain]) for domain in self.domains])
        recon_a, fake_a = self.decoders["A"](latents).chunk(2)
        fake_b, recon_b = self.decoders["B"](latents).chunk(2)
        return _Translations(
            means=means,
            reconstructions={"A": recon_a, "B": recon_b},
            fakes={"A": fake_a, "B": fake_b},
        )

    def losses(self, phase: str, batch: Batch, scratch: _Translations) -> dict[str, Tensor]:
        if phase == "discriminator":
            return self._discriminator_losses(batch, scratch)
        return self._generator_losses(batch, scratch)

    def _discriminator_losses(self, batch: Batch, scratch: _Translations) -> dict[str, Tensor]:
        config = self.config
        terms = {}
        for domain in self.domains:
            real, fake = judge(
                self.discriminators[domain], batch[domain], scratch.fakes[domain].detach()
            )
            loss, scratch.stats[domain] = discriminator_loss_with_stats(
                real, fake, mode=config.gan_mode
            )
            terms[f"discriminator_{domain}"] = config.weight_adversarial * loss
        return terms

    def _generator_losses(self, batch: Batch, scratch: _Translations) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        for domain, other in (self.domains, self.domains[::-1]):
            picture, fake = batch[domain], scratch.fakes[domain]
            # The picture's way to the other domain and back.
            cycle_means = self.encoders[other](scratch.fakes[other])
            cycle = self.decoders[domain](self._sample(cycle_means))
            adversarial = generator_loss(self.discriminators[domain](fake), mode=config.gan_mode)
            reconstruction = F.l1_loss(scratch.reconstructions[domain], picture)
            terms |= {
                f"adversarial_{domain}": config.weight_adversarial * adversarial,
                f"reconstruction_{domain}": config.weight_reconstruction * reconstruction,
                f"kl_{domain}": config.weight_kl * _kl(scratch.means[domain]),
                f"cycle_{domain}": config.weight_cycle * F.l1_loss(cycle, picture),
                f"kl_cycle_{domain}": config.weight_kl_cycle * _kl(cycle_means),
            }
        return terms

    def metrics(self, batch: Batch, scratch: _Translations) -> dict[str, Tensor]:
        return discriminator_metrics(scratch.stats)

    def translator(self, direction: str) -> nn.Module:
        source, target = direction.split("to")
        return nn.Sequential(self.encoders[source], self.decoders[target])

    def _sample(self, means: Tensor) -> Tensor:
        """Latents around their means; from the device's own generator, for a host draws too slowly.

        A captured step draws anew at each replay, and a checkpoint holds the generator's state.
        """
        if self.config.latent_noise == 0.0:
            return means
        return torch.add(means, torch.randn_like(means), alpha=self.config.latent_noise)


def _kl(means: Tensor) -> Tensor:
    """Divergence of N(means, 1) from N(0, 1) but for the factor 1/2: the mean square."""
    return widen(means).square().mean()
