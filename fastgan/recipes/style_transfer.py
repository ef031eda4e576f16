"""Exemplar style transfer, unpaired: content pictures take on the style of style pictures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastgan.models.discriminator import Discriminator, DiscriminatorConfig
from fastgan.models.features import VGG19_LAYERS, RandomFeatures, VGG19Features, grey
from fastgan.models.style_transfer import BASE, LITE, StyleTransferConfig, StyleTransferGAN
from fastgan.ops.gan_loss import (
    DiscriminatorStats,
    discriminator_loss_with_stats,
    generator_loss,
)
from fastgan.ops.gram import content_loss, gram_matrix, style_loss
from fastgan.ops.instance_norm import (
    InstanceStats,
    adain_style_loss,
    instance_norm,
    instance_stats,
)
from fastgan.recipes.recipe import AdamSettings, Batch, Preset, Recipe, RecipeConfig, Style
from fastgan.reference import widen


@dataclasses.dataclass(frozen=True)
class StyleTransferRecipeConfig(RecipeConfig):
    """Networks, losses and learning rates of style transfer."""

    width: int = LITE.width
    """Channels of the generator at the picture's own resolution."""
    encoder_blocks: int = LITE.encoder_blocks
    """Residual blocks of the content encoder."""
    decoder_blocks: int = LITE.decoder_blocks
    """Residual blocks of the decoder."""
    discriminator_width: int = 16
    """Channels of the discriminator's first layer."""
    discriminator_layers: int = 3
    """Layers of stride 2 per scale of the discriminator."""
    discriminator_scales: int = 2
    """Scales the discriminator looks at."""

    objective: Literal["default", "textbook"] = "default"
    """textbook: content, style and adversarial loss alone, literally: content summed over feature
    maps and divided by their number, absolute Gram loss, minimax cross-entropy. It decides all
    options below but the extractor's, the layers and the weights of these three."""
    extractor: Literal["random", "vgg19"] = "random"
    """Whose features content and style are compared in."""
    extractor_weights: str = ""
    """File with torchvision's VGG19 weights; without one, torch hub's cache. Kept as an absolute
    path."""
    extractor_levels: int = 4
    """Scales of the random extractor."""
    extractor_seed: int = 0
    """Decides the filters of the random extractor."""
    content_layers: tuple[int, ...] = (1, 2)
    """Which of the extractor's maps the content loss compares, from 0."""
    content_features: Literal["extractor", "encoder"] = "extractor"
    """Where content is compared: in the extractor's maps, or in the content encoder's,
    instance-normalised."""
    content_grey: bool = True
    """Show the extractor grey pictures of one brightness and contrast, so that the content loss
    leaves the colours to the style."""
    content_reduction: Literal["mean", "channels"] = "mean"
    """mean: squared error; channels: summed over feature maps and divided by their number."""
    style_scale: Literal["absolute", "relative"] = "relative"
    """relative: each layer's squared distance is divided by the squared norm of its targets."""
    gan_mode: Literal["bce", "lsgan", "hinge", "wgan"] = "bce"
    """Form of the adversarial losses; wgan comes without clipping or penalty of the critic."""
    saturating: bool = False
    """bce: the generator minimises log(1 - D), which has small gradients where D is sure."""
    label_smoothing: float = 0.0
    """bce: what the discriminator's target for real pictures lacks to 1."""

    weight_content: float = 1.0
    """Weight of the content loss."""
    weight_style: float = 5.0
    """Weight of the Gram loss."""
    weight_texture: float = 2.0
    """Weight of the Gram loss of grey pictures of one brightness and contrast, where the style's
    colours gain nothing."""
    weight_adversarial: float = 0.5
    """Weight of the generator's adversarial loss."""
    weight_reconstruction: float = 5.0
    """Weight of L1 between a content picture and its own features, decoded."""
    weight_identity: float = 0.0
    """Weight of L1 between a style picture and itself in its own style."""
    weight_strength: float = 0.0
    """Weight of L1 between a result of random strength and the cross-fade, by that strength, of the
    picture into its full result, which lets the strength act evenly."""
    weight_statistics: float = 0.0
    """Weight of AdaIN's style loss: means and deviations of the extractor's maps."""
    weight_variation: float = 0.0
    """Weight of the total variation: mean absolute difference between neighbouring pixels."""

    lr: float = 1e-3
    """Learning rate of the generator."""
    lr_discriminator: float = 4e-4
    """Learning rate of the discriminator."""
    lr_hold: int = 0
    """Steps before the learning rates begin to fall."""
    lr_decay: float = 0.0
    """From then on they are divided by 1 + lr_decay · steps."""
    beta1: float = 0.5
    """Adam's decay of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extractor_weights:  # a training may go on from another folder
            object.__setattr__(self, "extractor_weights", os.path.abspath(self.extractor_weights))
        self._require(1, "width", "extractor_levels")
        self._require(1, "discriminator_width", "discriminator_layers", "discriminator_scales")
        self._require(0, "encoder_blocks", "decoder_blocks")
        maps = self.extractor_levels if self.extractor == "random" else len(VGG19_LAYERS)
        fits = self.content_layers and all(0 <= layer < maps for layer in self.content_layers)
        read = self.content_features == "extractor" or self.objective == "textbook"
        if read and not fits:
            raise ValueError(
                f"content_layers must be among the extractor's {maps} maps, 0 to {maps - 1}, "
                f"got {self.content_layers}"
            )
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        decided = self.objective == "textbook"  # which overrides all three
        for name in ("label_smoothing", "saturating"):
            if getattr(self, name) and self.gan_mode != "bce" and not decided:
                raise ValueError(f"{name} needs gan_mode bce, got {self.gan_mode}")

    @property
    def sees_grey(self) -> bool:
        """Whether the extractor is shown grey results."""
        content = self.content_grey and self.content_features == "extractor"
        return content or self.weight_texture > 0


_TEXTBOOK: dict[str, Any] = {
    "content_features": "extractor",
    "content_grey": False,
    "content_reduction": "channels",
    "style_scale": "absolute",
    "gan_mode": "bce",
    "saturating": True,
    "label_smoothing": 0.0,
    "weight_texture": 0.0,
    "weight_reconstruction": 0.0,
    "weight_identity": 0.0,
    "weight_strength": 0.0,
    "weight_statistics": 0.0,
    "weight_variation": 0.0,
}


@dataclasses.dataclass
class Scratch:
    """What a step's phases share."""

    fake: Tensor
    stats: DiscriminatorStats | None = None


class StyleTransfer(Recipe):
    """Renders content pictures in the style of any style picture.

    The discriminator learns to tell style pictures from results; the generator minimises content,
    style and adversarial losses and what else has a weight.
    """

    name = "style_transfer"
    domains = ("content", "style")
    phases = ("discriminator", "generator")
    config_class = StyleTransferRecipeConfig
    presets: ClassVar = {
        "lite": Preset(StyleTransferRecipeConfig(), size=128, batch_size=4, resize=256),
        "base": Preset(
            StyleTransferRecipeConfig(
                width=BASE.width,
                encoder_blocks=BASE.encoder_blocks,
                decoder_blocks=BASE.decoder_blocks,
                discriminator_width=64,
                discriminator_scales=3,
                lr=2e-4,
                lr_discriminator=2e-4,
                lr_decay=5e-5,
            ),
            size=256,
            batch_size=8,
            resize=512,
        ),
    }
    config: StyleTransferRecipeConfig

    def __init__(self, config: StyleTransferRecipeConfig) -> None:
        super().__init__(config)
        self.generator = StyleTransferGAN(
            StyleTransferConfig(
                width=config.width,
                encoder_blocks=config.encoder_blocks,
                decoder_blocks=config.decoder_blocks,
            )
        )
        self.discriminator = Discriminator(
            DiscriminatorConfig(
                width=config.discriminator_width,
                layers=config.discriminator_layers,
                scales=config.discriminator_scales,
            )
        )
        textbook = config.objective == "textbook"
        self._goal = dataclasses.replace(config, **_TEXTBOOK) if textbook else config

    def begin_training(self, size: int) -> None:
        if size < self.discriminator.smallest:
            raise ValueError(
                f"size: {self.name} needs at least {self.discriminator.smallest} px for this "
                f"discriminator, got {size}"
            )
        config = self.config
        self.extractor: nn.Module
        if config.extractor == "vgg19":
            self.extractor = VGG19Features(weights=config.extractor_weights or None)
        else:
            self.extractor = RandomFeatures(
                levels=config.extractor_levels, seed=config.extractor_seed
            )

    def networks(self, phase: str) -> Sequence[nn.Module]:
        return [self.get_submodule(phase)]

    def optimizer(self, phase: str) -> AdamSettings:
        config = self.config
        lr = config.lr if phase == "generator" else config.lr_discriminator
        return AdamSettings(lr=lr, betas=(config.beta1, config.beta2))

    def lr_factor(self, phase: str, step: int, steps_per_epoch: int) -> float:
        return 1 / (1 + self.config.lr_decay * max(0, step - self.config.lr_hold))

    def default_steps(self, steps_per_epoch: int) -> int:
        return 10_000

    def draw(self, step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self._goal.weight_strength == 0:
            return {}
        return {"strength": torch.rand(batch_size, generator=generator)}

    def begin_step(self, batch: Batch) -> Scratch:
        return Scratch(fake=self.generator(batch["content"], batch["style"]))

    def losses(self, phase: str, batch: Batch, scratch: Scratch) -> dict[str, Tensor]:
        content, style, fake = batch["content"], batch["style"], scratch.fake
        goal = self._goal
        if phase == "discriminator":
            loss, scratch.stats = discriminator_loss_with_stats(
                self.discriminator(style),
                self.discriminator(fake.detach()),
                mode=goal.gan_mode,
                label_smoothing=goal.label_smoothing,
            )
            return {"discriminator": loss}
        features = self.extractor(fake)
        grey_features = self.extractor(grey(fake)) if goal.sees_grey else []
        with torch.no_grad():
            style_features = self.extractor(style)
        seen = grey_features if goal.content_grey else features
        terms = {
            "content": goal.weight_content * self._content_loss(content, fake, seen),
            "style": goal.weight_style * self._style_loss(features, style_features),
            "adversarial": goal.weight_adversarial
            * generator_loss(
                self.discriminator(fake), mode=goal.gan_mode, saturating=goal.saturating
            ),
        }
        if goal.weight_texture > 0:
            with torch.no_grad():
                grey_style_features = self.extractor(grey(style))
            texture = self._style_loss(grey_features, grey_style_features)
            terms["texture"] = goal.weight_texture * texture
        if goal.weight_reconstruction > 0:
            corner = _corner(content)
            decoded = self.generator.decoder(self.generator.content_encoder(corner))
            terms["reconstruction"] = goal.weight_reconstruction * _l1(decoded, corner)
        if goal.weight_identity > 0:
            corner = _corner(style)
            identity = _l1(self.generator(corner, corner), corner)
            terms["identity"] = goal.weight_identity * identity
        if goal.weight_strength > 0:
            strength = self._strength_loss(_corner(content), _corner(style), batch["strength"])
            terms["strength"] = goal.weight_strength * strength
        if goal.weight_statistics > 0:
            statistics = adain_style_loss(features, [instance_stats(f) for f in style_features])
            terms["statistics"] = goal.weight_statistics * statistics
        if goal.weight_variation > 0:
            terms["variation"] = goal.weight_variation * _total_variation(fake)
        return terms

    def _strength_loss(self, content: Tensor, style: Tensor, strength: Tensor) -> Tensor:
        with torch.no_grad():
            full = widen(self.generator(content, style))
            target = content + strength[:, None, None, None] * (full - content)
        return _l1(self.generator(content, style, strength), target)

    def _content_loss(self, content: Tensor, fake: Tensor, features: list[Tensor]) -> Tensor:
        goal = self._goal
        if goal.content_features == "encoder":
            encode = self.generator.content_encoder
            with torch.no_grad():
                target = instance_norm(encode(content))
            return content_loss(
                instance_norm(encode(fake)), target, reduction=goal.content_reduction
            )
        with torch.no_grad():
            targets = self.extractor(grey(content) if goal.content_grey else content)
        return content_loss(
            [features[layer] for layer in goal.content_layers],
            [targets[layer] for layer in goal.content_layers],
            reduction=goal.content_reduction,
        )

    def _style_loss(self, features: list[Tensor], style_features: list[Tensor]) -> Tensor:
        with torch.no_grad():
            grams = [gram_matrix(f) for f in style_features]
        if self._goal.style_scale == "absolute":
            return style_loss(features, grams)
        scales = [gram.square().sum() / (4 * gram.shape[0]) for gram in grams]
        losses = [style_loss(f, g) / s for f, g, s in zip(features, grams, scales, strict=True)]
        return torch.stack(losses).sum()

    def metrics(self, batch: Batch, scratch: Scratch) -> dict[str, Tensor]:
        assert scratch.stats is not None
        return {f"discriminator/{k}": v for k, v in scratch.stats._asdict().items()}

    def samples(self, batch: Batch) -> dict[str, Tensor]:
        content, style = batch["content"], batch["style"]
        return {"content": content, "style": style, "result": self.generator(content, style)}

    def encode_style(self, style: Tensor) -> InstanceStats:
        return self.generator.encode_style(style)

    def mix_styles(self, styles: Sequence[Style], weights: Sequence[float]) -> InstanceStats:
        """Interpolates feature maps, as the AdaIN paper does.

        AdaIN is linear in the statistics, so the weighted sum of the maps it gives for several
        styles is the map it gives for the weighted sums of their means and deviations.
        """
        weighted = [
            [weight * x for x in statistics]
            for weight, statistics in zip(weights, styles, strict=True)
        ]
        return InstanceStats(
            *(torch.stack(torch.broadcast_tensors(*x)).sum(0) for x in zip(*weighted, strict=True))
        )

    def stylize(
        self,
        content: Tensor,
        style: Style | None = None,
        *,
        alpha: float = 1.0,
        direction: str | None = None,
    ) -> Tensor:
        if style is None:
            raise ValueError("style: style_transfer needs a style picture")
        result: Tensor = self.generator(content, style, alpha)
        return result


def _corner(images: Tensor) -> Tensor:
    """The upper left quarter: as good to learn reconstruction from, at a quarter of the cost."""
    return images[..., : (images.shape[2] + 1) // 2, : (images.shape[3] + 1) // 2]


def _l1(images: Tensor, targets: Tensor) -> Tensor:
    height, width = targets.shape[2:]  # a decoder gives multiples of 4
    return (widen(images[..., :height, :width]) - widen(targets)).abs().mean()


def _total_variation(images: Tensor) -> Tensor:
    images = widen(images)
    down = images[..., 1:, :] - images[..., :-1, :]
    right = images[..., 1:] - images[..., :-1]
    return down.abs().mean() + right.abs().mean()
