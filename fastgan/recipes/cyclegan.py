"""CycleGAN: unpaired translation held together by the way there and back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.models.patchgan import PatchGAN
from fastgan.models.resnet import ResnetGenerator, load_cyclegan_generator
from fastgan.ops.gan_loss import (
    DiscriminatorStats,
    discriminator_loss_with_stats,
    generator_loss,
)
from fastgan.recipes.pool import ImagePool
from fastgan.recipes.recipe import AdamSettings, Batch, Preset, RecipeConfig
from fastgan.recipes.two_domains import TwoDomainRecipe, discriminator_metrics, judge

ResultT = TypeVar("ResultT")

PUBLIC_GENERATORS = ("latest_net_G_A.pth", "latest_net_G_B.pth")
"""What the public code calls its generators, AtoB and BtoA."""


@dataclasses.dataclass(frozen=True)
class CycleGANConfig(RecipeConfig):
    """Networks, losses and learning rates of CycleGAN, by default those of its public code."""

    width: int = 64
    """Channels of the generators at full resolution."""
    residual_blocks: int = 9
    """Residual blocks of each generator."""
    discriminator_width: int = 64
    """Channels of the discriminators' first layer."""
    discriminator_layers: int = 3
    """Stride-2 layers of the discriminators; 3 judge patches of 70 pixels."""
    pool_size: int = 50
    """Earlier fakes of each domain kept for its discriminator; 0 shows it the newest only."""
    gan_mode: Literal["bce", "lsgan", "hinge", "wgan"] = "lsgan"
    """Form of the adversarial losses; wgan comes without clipping or penalty of the critic."""

    weight_adversarial: float = 1.0
    """Weight of the generators' adversarial losses."""
    weight_cycle: float = 10.0
    """Weight of L1 between a picture and its translation to the other domain and back."""
    weight_identity: float = 0.5
    """Weight of L1 between a picture and its translation into its own domain, in units of
    weight_cycle; 0 saves its computation."""

    lr: float = 2e-4
    """Learning rate of all networks."""
    beta1: float = 0.5
    """Adam's decay of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient."""
    epochs: int = 100
    """Epochs at the full learning rate."""
    epochs_decay: int = 100
    """Epochs after them in which it falls, linearly; then it is 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "width", "residual_blocks", "discriminator_width", "discriminator_layers")
        self._require(0, "pool_size", "epochs", "epochs_decay")


@dataclasses.dataclass
class _Translations:
    """What a step's phases share; every value by domain."""

    fakes: dict[str, Tensor]
    """Pictures of the other domain, translated into this one."""
    identities: dict[str, Tensor]
    """Pictures of this domain, translated into this one; empty where they have no weight."""
    stats: dict[str, DiscriminatorStats] = dataclasses.field(default_factory=dict)


class CycleGAN(TwoDomainRecipe):
    """Translates pictures of A into pictures of B and back, and minds that they come back the same.

    The generators are updated first, then the discriminators, on fakes of this and of earlier
    steps. Pictures that meet the same network meet it in one call: a generator makes a fake and an
    identity picture, a discriminator judges real and fake pictures. As instance norm keeps the
    pictures of a batch apart, that changes nothing but the number of calls, eight instead of
    twelve.

    Source: Zhu et al., "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
    Networks", 2017.
    """

    name: ClassVar[str] = "cyclegan"
    phases: ClassVar[tuple[str, ...]] = ("generator", "discriminator")
    config_class: ClassVar[type[RecipeConfig]] = CycleGANConfig
    presets: ClassVar[Mapping[str, Preset]] = {
        "base": Preset(CycleGANConfig(), size=256, batch_size=1, resize=286),
        "lite": Preset(
            CycleGANConfig(
                width=24,
                residual_blocks=4,
                discriminator_width=24,
                lr=4e-4,
                epochs=500,  # of a small folder, which has few steps each
                epochs_decay=500,
            ),
            size=128,
            batch_size=2,
            resize=143,
        ),
    }

    config: CycleGANConfig

    def __init__(self, config: CycleGANConfig) -> None:
        super().__init__(config)
        generators = [
            ResnetGenerator(config.width, config.residual_blocks) for _ in self.directions
        ]
        discriminators = [
            PatchGAN(config.discriminator_width, config.discriminator_layers) for _ in self.domains
        ]
        self.size_multiple = 4
        self.smallest = discriminators[0].smallest
        self.generators = nn.ModuleDict(dict(zip(self.directions, generators, strict=True)))
        self.discriminators = nn.ModuleDict(dict(zip(self.domains, discriminators, strict=True)))

    @classmethod
    def from_public_code(cls, folder: str | os.PathLike[str]) -> CycleGAN:
        """With the generators that the public CycleGAN code left in `folder`.

        They are ``latest_net_G_A.pth`` (AtoB) and ``latest_net_G_B.pth`` (BtoA), see
        :func:`fastgan.models.load_cyclegan_generator`; the discriminators are new.

        Raises:
            OSError: one of the files cannot be read.
            ValueError: one of them holds something else.
        """
        generators = [load_cyclegan_generator(Path(folder) / name) for name in PUBLIC_GENERATORS]
        width, blocks = generators[0].head.in_channels, len(generators[0].blocks)
        recipe = cls(CycleGANConfig(width=width, residual_blocks=blocks))
        for direction, generator in zip(cls.directions, generators, strict=True):
            recipe.generators[direction] = generator
        return recipe

    def begin_training(self, size: int) -> None:
        super().begin_training(size)
        self.pools = nn.ModuleDict(
            {domain: ImagePool(self.config.pool_size, (3, size, size)) for domain in self.domains}
        )

    def training_state(self) -> Mapping[str, Tensor]:
        return {f"pools.{name}": value for name, value in self.pools.state_dict().items()}

    def networks(self, phase: str) -> Sequence[nn.Module]:
        return [self.generators if phase == "generator" else self.discriminators]

    def optimizer(self, phase: str) -> AdamSettings:
        return AdamSettings(lr=self.config.lr, betas=(self.config.beta1, self.config.beta2))

    def lr_factor(self, phase: str, step: int, steps_per_epoch: int) -> float:
        decays = max(0, step // steps_per_epoch + 1 - self.config.epochs)
        return max(0.0, 1.0 - decays / (self.config.epochs_decay + 1))

    def default_steps(self, steps_per_epoch: int) -> int:
        return (self.config.epochs + self.config.epochs_decay) * steps_per_epoch

    def draw(self, step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        pools = cast(Mapping[str, ImagePool], self.pools)
        return {f"pool_{domain}": pools[domain].draw(batch_size, generator) for domain in pools}

    def begin_step(self, batch: Batch) -> _Translations:
        translated = self._for_each_domain(lambda domain: self._into(domain, batch))
        return _Translations(
            fakes={domain: pictures[0] for domain, pictures in translated.items()},
            identities={
                domain: pictures[1] for domain, pictures in translated.items() if len(pictures) > 1
            },
        )

    def _into(self, domain: str, batch: Batch) -> Sequence[Tensor]:
        """The fake of a domain and, where it has weight, the identity picture."""
        generator, other = self._generator(domain), batch[self._other(domain)]
        if self.config.weight_identity == 0:
            return (generator(other),)
        translated: Tensor = generator(torch.cat([other, batch[domain]]))
        return translated.chunk(2)

    def losses(self, phase: str, batch: Batch, scratch: _Translations) -> dict[str, Tensor]:
        terms = self._generator_terms if phase == "generator" else self._discriminator_terms
        by_domain = self._for_each_domain(lambda domain: terms(domain, batch, scratch))
        return {
            f"{name}_{domain}": term
            for domain, of_domain in by_domain.items()
            for name, term in of_domain.items()
        }

    def _generator_terms(
        self, domain: str, batch: Batch, scratch: _Translations
    ) -> dict[str, Tensor]:
        config, picture = self.config, batch[domain]
        logits = self.discriminators[domain](scratch.fakes[domain])
        cycle = self._generator(domain)(scratch.fakes[self._other(domain)])
        terms = {
            "adversarial": config.weight_adversarial * generator_loss(logits, mode=config.gan_mode),
            "cycle": config.weight_cycle * F.l1_loss(cycle, picture),
        }
        if scratch.identities:
            weight = config.weight_cycle * config.weight_identity
            terms["identity"] = weight * F.l1_loss(scratch.identities[domain], picture)
        return terms

    def _discriminator_terms(
        self, domain: str, batch: Batch, scratch: _Translations
    ) -> dict[str, Tensor]:
        pooled = self.pools[domain](scratch.fakes[domain], batch[f"pool_{domain}"])
        real, fake = judge(self.discriminators[domain], batch[domain], pooled)
        loss, scratch.stats[domain] = discriminator_loss_with_stats(
            real, fake, mode=self.config.gan_mode
        )
        return {"discriminator": 0.5 * loss}

    def _for_each_domain(self, work: Callable[[str], ResultT]) -> dict[str, ResultT]:
        """`work` of both domains; neither needs anything of the other's."""
        return {domain: work(domain) for domain in self.domains}

    def _other(self, domain: str) -> str:
        return self.domains[1 - self.domains.index(domain)]

    def _generator(self, domain: str) -> nn.Module:
        """The one that makes pictures of a domain."""
        return self.generators[f"{self._other(domain)}to{domain}"]

    def metrics(self, batch: Batch, scratch: _Translations) -> dict[str, Tensor]:
        return discriminator_metrics(scratch.stats)

    def translator(self, direction: str) -> nn.Module:
        return self.generators[direction]
