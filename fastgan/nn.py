"""Drop-in modules over the ops."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgan import reference
from fastgan.ops import _checks
from fastgan.ops.gan_loss import MODES, SCALE_REDUCTIONS, discriminator_loss, generator_loss
from fastgan.ops.gram import gram_matrix, style_loss
from fastgan.ops.instance_norm import InstanceStats, adain


class AdaIN(nn.Module):
    """:func:`fastgan.adain` as a module: ``AdaIN()(content, style, alpha=1.0)``."""

    def __init__(self, *, eps: float = 1e-5, correction: int = 1) -> None:
        super().__init__()
        self.eps = eps
        self.correction = correction

    def forward(
        self, content: Tensor, style: Tensor | InstanceStats, alpha: float | Tensor = 1.0
    ) -> Tensor:
        return adain(content, style, alpha=alpha, eps=self.eps, correction=self.correction)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, correction={self.correction}"


class GramStyleLoss(nn.Module):
    """:func:`fastgan.style_loss` that keeps the Gram matrices of a style.

    ``loss = GramStyleLoss(); loss.set_style(extractor(style)); loss(extractor(image))``. The
    targets are buffers: they move with the module and are saved with it.

    Args:
        normalize: as in :func:`fastgan.gram_matrix`.
        weights: one number per layer; 1 each by default.
    """

    def __init__(self, *, normalize: str = "chw", weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.normalize = normalize
        self.weights = weights
        self._layers = 0

    @torch.no_grad()
    def set_style(self, features: Tensor | Sequence[Tensor]) -> None:
        """Compute and keep the targets from the style's features, one map or a list of layers."""
        layers = _checks.layers("GramStyleLoss.set_style", "features", features)
        for index in range(len(layers), self._layers):
            delattr(self, f"target{index}")
        self._layers = len(layers)
        for index, layer in enumerate(layers):
            target = gram_matrix(layer, normalize=self.normalize)
            self.register_buffer(f"target{index}", target)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        if self._layers == 0:
            raise ValueError("GramStyleLoss: call set_style(style_features) first")
        targets = [self.get_buffer(f"target{index}") for index in range(self._layers)]
        layers = _checks.layers("GramStyleLoss", "features", features)
        return style_loss(layers, targets, normalize=self.normalize, weights=self.weights)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}, weights={self.weights}"


class GANLoss(nn.Module):
    """GAN losses behind the call that CycleGAN-family code uses.

    ``loss = GANLoss("lsgan"); loss(prediction, True)`` compares logits, a tensor or a list of
    scales, with one label; :meth:`discriminator` and :meth:`generator` are the fused losses of
    :func:`fastgan.discriminator_loss` and :func:`fastgan.generator_loss`.

    Args:
        mode: ``"bce"``, ``"lsgan"``, ``"hinge"`` or ``"wgan"``; that code's names ``"vanilla"``
            (bce) and ``"wgangp"`` (wgan; the penalty is yours to add) are known too.
        target_real_label, target_fake_label: labels of ``bce`` and ``lsgan``.
        scale_reduction: ``"sum"`` or ``"mean"`` over a list of scales.
    """

    _ALIASES: ClassVar = {"vanilla": "bce", "wgangp": "wgan"}

    def __init__(
        self,
        mode: str = "bce",
        target_real_label: float = 1.0,
        target_fake_label: float = 0.0,
        *,
        scale_reduction: str = "sum",
    ) -> None:
        super().__init__()
        _checks.one_of("GANLoss", "mode", mode, (*MODES, *self._ALIASES))
        _checks.one_of("GANLoss", "scale_reduction", scale_reduction, SCALE_REDUCTIONS)
        self.mode = self._ALIASES.get(mode, mode)
        self.target_real_label = target_real_label
        self.target_fake_label = target_fake_label
        self.scale_reduction = scale_reduction

    def forward(
        self,
        prediction: Tensor | Sequence[Tensor],
        target_is_real: bool,
        for_discriminator: bool = True,
    ) -> Tensor:
        """Loss of one prediction; ``for_discriminator`` matters to ``hinge`` alone."""
        label = self.target_real_label if target_is_real else self.target_fake_label
        scales = _checks.layers("GANLoss", "prediction", prediction)
        with torch.autocast(scales[0].device.type, enabled=False):
            losses = [
                reference.label_loss(x, label, target_is_real, self.mode, for_discriminator)
                for x in scales
            ]
            total = torch.stack(losses)
            return total.mean() if self.scale_reduction == "mean" else total.sum()

    def discriminator(
        self, real: Tensor | Sequence[Tensor], fake: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """``forward(real, True) + forward(fake, False)``, fused for the usual labels."""
        smoothing = 1.0 - self.target_real_label
        usual = smoothing == 0.0 or (self.mode == "bce" and 0.0 < smoothing < 1.0)
        if self.mode in ("bce", "lsgan") and not (usual and self.target_fake_label == 0.0):
            return self(real, True) + self(fake, False)
        return discriminator_loss(
            real,
            fake,
            mode=self.mode,
            label_smoothing=smoothing if self.mode == "bce" else 0.0,
            scale_reduction=self.scale_reduction,
        )

    def generator(self, fake: Tensor | Sequence[Tensor]) -> Tensor:
        """``forward(fake, True, for_discriminator=False)``, fused for the usual label."""
        if self.mode in ("bce", "lsgan") and self.target_real_label != 1.0:
            return self(fake, True, for_discriminator=False)
        return generator_loss(fake, mode=self.mode, scale_reduction=self.scale_reduction)

    def extra_repr(self) -> str:
        return f"{self.mode!r}, {self.target_real_label}, {self.target_fake_label}"
