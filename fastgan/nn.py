"""Drop-in modules over the ops."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgan import reference
from fastgan.ops import _checks
from fastgan.ops._dispatch import without_autocast
from fastgan.ops.gan_loss import (
    MODES,
    SCALE_REDUCTIONS,
    check_logits,
    discriminator_loss,
    generator_loss,
)
from fastgan.ops.gram import gram_matrix, style_loss
from fastgan.ops.instance_norm import (
    ACTIVATIONS,
    InstanceStats,
    adain,
    instance_norm,
    reflection_pad2d,
)


class InstanceNorm2d(nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` with what usually follows it.

    One :func:`fastgan.instance_norm`; same arguments, parameters, buffers and state-dict keys as
    torch's. Keeps channels_last, accepts planes of one position. With ``track_running_stats=True``
    the normalisation is torch's.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch's; so are
            options that only some versions of torch have, such as ``bias``.
        activation: None, ``"relu"`` or ``"leaky_relu"`` (with ``negative_slope``), applied after
            the norm.
        reflect_pad: pads the result by reflection, for the convolution that follows.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        reflect_pad: int = 0,
        **options: Any,
    ) -> None:
        _checks.one_of("InstanceNorm2d", "activation", activation, ACTIVATIONS)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **options
        )
        self.activation = activation
        self.negative_slope = negative_slope
        self.reflect_pad = reflect_pad

    def forward(self, input: Tensor) -> Tensor:
        if self.track_running_stats:
            out = self._activated(super().forward(input))
            return reflection_pad2d(out, (self.reflect_pad,) * 4) if self.reflect_pad else out
        self._check_input_dim(input)
        if input.ndim == 3:
            return self.forward(input[None])[0]
        return instance_norm(
            input,
            weight=self.weight,
            bias=self.bias,
            activation=self.activation,
            negative_slope=self.negative_slope,
            reflect_pad=self.reflect_pad,
            eps=self.eps,
        )

    def _activated(self, x: Tensor) -> Tensor:
        if self.activation == "relu":
            return x.relu()
        if self.activation == "leaky_relu":
            return nn.functional.leaky_relu(x, self.negative_slope)
        return x

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation:
            text += f", activation={self.activation!r}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        if self.reflect_pad:
            text += f", reflect_pad={self.reflect_pad}"
        return text


class ReflectionPad2d(nn.ReflectionPad2d):
    """:class:`torch.nn.ReflectionPad2d` as :func:`fastgan.ops.instance_norm.reflection_pad2d`.

    Keeps channels_last, is deterministic in the backward and saves nothing for it. What that op
    does not know (integers, negative padding) is torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        padding = self.padding
        if not input.is_floating_point() or min(padding) < 0 or input.ndim not in (3, 4):
            return super().forward(input)
        if input.ndim == 3:
            return self.forward(input[None])[0]
        return reflection_pad2d(input, padding)


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
    targets are buffers: they move with the module, are saved with it and loaded into another.

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
        self._keep([gram_matrix(layer, normalize=self.normalize) for layer in layers])

    def _keep(self, targets: list[Tensor]) -> None:
        for index in range(len(targets), self._layers):
            delattr(self, f"target{index}")
        self._layers = len(targets)
        for index, target in enumerate(targets):
            self.register_buffer(f"target{index}", target)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Make room for the targets of the style that was saved, whatever is kept now."""
        targets: list[Tensor] = []
        while (name := f"{prefix}target{len(targets)}") in state_dict:
            targets.append(torch.empty_like(state_dict[name]))
        if targets:
            self._keep(targets)
        super()._load_from_state_dict(state_dict, prefix, *rest)

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
        scales = check_logits("GANLoss", "prediction", prediction)
        with without_autocast(scales[0].device):
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


# --- Conversion ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` does to one module, or why it leaves it alone."""

    name: str
    """Where the module is, as in ``model.named_modules()``; empty for the model itself."""
    module: str
    """What it is."""
    becomes: str | None
    """What it becomes; None if it stays."""
    reason: str | None = None
    """Why it stays."""

    def __str__(self) -> str:
        change = f"-> {self.becomes}" if self.becomes else f"stays: {self.reason}"
        return f"{self.name or '(the model)'}: {self.module} {change}"


class ConversionReport(tuple[Conversion, ...]):
    """What :func:`conversion_report` returns: a tuple that prints as one line per module."""

    def __str__(self) -> str:
        swaps = sum(entry.becomes is not None for entry in self)
        summary = f"{swaps} modules swapped, {len(self) - swaps} left alone"
        return "\n".join([summary, *map(str, self)])


def convert(model: nn.Module) -> nn.Module:
    """Swap instance norms and reflection pads of any model for the fused modules, in place.

    Every ``torch.nn.InstanceNorm2d`` becomes an :class:`InstanceNorm2d` and takes in the ReLU or
    LeakyReLU and the ``ReflectionPad2d`` that directly follow it in an ``nn.Sequential``, which
    leave an ``nn.Identity`` behind; every other ``torch.nn.ReflectionPad2d`` becomes a
    :class:`ReflectionPad2d`. Parameters are the same objects, state-dict keys do not change,
    results agree to rounding in training and evaluation. Norms with running statistics,
    subclasses and modules with hooks or a replaced ``forward`` stay; :func:`conversion_report`
    tells which and why.

    The memory format does not change; on a GPU use ``model.to(memory_format=torch.channels_last)``
    beside this. Code that reads the output of single layers of an ``nn.Sequential`` finds
    activation and padding already applied where the norm was.

    Returns:
        The same model, unless it is itself a module to be swapped.
    """
    for swap in list(_swaps(model)):
        if swap.replacement is None:
            continue
        if swap.parent is None:
            return swap.replacement
        swap.parent._modules[swap.slot] = swap.replacement
        for slot in swap.absorbed:
            swap.parent._modules[slot] = nn.Identity()
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What :func:`convert` would do to a model: each swap, and each module left alone with why."""
    return ConversionReport(swap.entry for swap in _swaps(model))


@dataclass(frozen=True)
class _Swap:
    entry: Conversion
    parent: nn.Module | None
    slot: str
    replacement: nn.Module | None
    absorbed: tuple[str, ...] = ()


def _swaps(model: nn.Module) -> Iterator[_Swap]:
    """Every norm and pad, wherever a module holds it; one held in two places comes twice."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    replacements: dict[Any, nn.Module] = {}  # one for each module and what it takes in
    if isinstance(model, nn.InstanceNorm2d | nn.ReflectionPad2d):
        yield _swap(replacements, "", None, "", model, {})
    for name, parent in model.named_modules():
        absorbed: set[str] = set()
        slots = list(parent._modules.items())
        for i, (slot, module) in enumerate(slots):
            if slot in absorbed or not isinstance(module, nn.InstanceNorm2d | nn.ReflectionPad2d):
                continue
            following = dict(slots[i + 1 :]) if _runs_in_order(parent) else {}
            full_name = f"{name}.{slot}" if name else slot
            swap = _swap(replacements, full_name, parent, slot, module, following)
            absorbed.update(swap.absorbed)
            yield swap


def _swap(
    replacements: dict[Any, nn.Module],
    name: str,
    parent: nn.Module | None,
    slot: str,
    module: nn.Module,
    following: dict[str, nn.Module | None],
) -> _Swap:
    kind = type(module).__name__
    reason = _obstacle(module)
    if reason is not None:
        return _Swap(Conversion(name, kind, None, reason), parent, slot, None)
    taken: list[tuple[str, nn.Module]] = []
    if isinstance(module, nn.InstanceNorm2d):
        taken = list(_absorbable(following))
    key = (module, *(type(m) for _, m in taken), *(m.extra_repr() for _, m in taken))
    if key not in replacements:
        replacements[key] = _replacement(module, [m for _, m in taken])
    becomes = " + ".join([f"fastgan.nn.{kind}", *(type(m).__name__ for _, m in taken)])
    slots = tuple(slot for slot, _ in taken)
    return _Swap(Conversion(name, kind, becomes), parent, slot, replacements[key], slots)


def _obstacle(module: nn.Module) -> str | None:
    """Why a norm or pad must stay as it is."""
    if type(module) in (InstanceNorm2d, ReflectionPad2d):
        return "is fused already"
    if type(module) not in (nn.InstanceNorm2d, nn.ReflectionPad2d):
        return "a subclass may do something else"
    if _has_hooks(module):
        return "has hooks, which see its input or output"
    if _has_own_forward(module):
        return "has a forward of its own"
    if isinstance(module, nn.InstanceNorm2d) and module.track_running_stats:
        return "tracks running statistics"
    return None


def _runs_in_order(parent: nn.Module) -> bool:
    """Whether its modules run one after the other, which only an ``nn.Sequential`` promises."""
    return type(parent).forward is nn.Sequential.forward and not _has_own_forward(parent)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a library has put something else in the place of this one module's forward."""
    return "forward" in vars(module)


def _has_hooks(module: nn.Module) -> bool:
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def _is_plain(module: nn.Module) -> bool:
    return not (_has_hooks(module) or _has_own_forward(module))


def _absorbable(following: dict[str, nn.Module | None]) -> Iterator[tuple[str, nn.Module]]:
    """An activation and a pad, or one of them, right after a norm."""
    pairs = [(slot, m) for slot, m in following.items() if m is not None][:2]
    if pairs and type(pairs[0][1]) in (nn.ReLU, nn.LeakyReLU) and _is_plain(pairs[0][1]):
        yield pairs.pop(0)
    if pairs and type(pairs[0][1]) is nn.ReflectionPad2d and _is_plain(pairs[0][1]):
        left, *others = pairs[0][1].padding
        if left >= 0 and all(other == left for other in others):
            yield pairs[0]


def _replacement(module: nn.Module, taken: Sequence[nn.Module]) -> nn.Module:
    """The fused module, with the parameters of the module it replaces."""
    if isinstance(module, nn.ReflectionPad2d):
        return ReflectionPad2d(module.padding).train(module.training)
    assert isinstance(module, nn.InstanceNorm2d)
    fused = InstanceNorm2d(module.num_features, module.eps)
    fused.momentum = module.momentum
    for other in taken:
        if isinstance(other, nn.ReLU):
            fused.activation = "relu"
        elif isinstance(other, nn.LeakyReLU):
            fused.activation, fused.negative_slope = "leaky_relu", other.negative_slope
        elif isinstance(other, nn.ReflectionPad2d):
            fused.reflect_pad = other.padding[0]
    fused.affine, fused.weight, fused.bias = module.affine, module.weight, module.bias
    return fused.train(module.training)
