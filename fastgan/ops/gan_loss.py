"""The losses of discriminator and generator, over one or several scales."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan import reference
from fastgan.ops import _checks, _dispatch

MODES = ("bce", "lsgan", "hinge", "wgan")
SCALE_REDUCTIONS = ("sum", "mean")

Logits = Tensor | Sequence[Tensor]


class DiscriminatorStats(NamedTuple):
    """How a discriminator fares, over all elements of all scales; fp32 scalars on the device.

    The accuracies are the shares of real logits above and of fake logits below the decision
    point, which is 0, for ``lsgan`` 0.5. No gradients.
    """

    real_mean: Tensor
    fake_mean: Tensor
    real_accuracy: Tensor
    fake_accuracy: Tensor


def discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    *,
    mode: str = "bce",
    label_smoothing: float = 0.0,
    scale_reduction: str = "sum",
    impl: str | None = None,
) -> Tensor:
    r"""Loss of a discriminator from its logits on real and on generated images.

    For one scale, with means over the elements of r and of f:

    ========= =========================================================
    ``bce``   mean softplus(-r) + s·r, plus mean softplus(f)
    ``lsgan`` mean (r - 1)², plus mean f²
    ``hinge`` mean max(0, 1 - r), plus mean max(0, 1 + f)
    ``wgan``  -mean r, plus mean f
    ========= =========================================================

    ``bce`` is the cross-entropy :math:`-\log D(x) - \log(1 - D(G(z)))` with D = sigmoid(logits);
    s is ``label_smoothing``, which makes the real label 1 - s and leaves the fake label 0.

    Args:
        real_logits: a tensor of any shape, or a list of them (scales); fp16, bf16, fp32 or fp64.
        fake_logits: the same; a list is as long as that of ``real_logits``, shapes may differ.
        mode: ``"bce"``, ``"lsgan"``, ``"hinge"`` or ``"wgan"``.
        label_smoothing: in [0, 1), ``bce`` only.
        scale_reduction: ``"sum"`` or ``"mean"`` over the scales.
        impl: ``"reference"``, ``"native"`` or None for the fastest that supports the call.

    Returns:
        fp32 scalar (fp64 for fp64 logits), also under autocast.

    Differentiable twice with respect to the logits; the second derivative of ``hinge`` and
    ``wgan``, which are piecewise linear, is zero, as PyTorch's own would be.

    Raises:
        TypeError: logits that are no floating-point tensors or not alike, or an option of the wrong
            type.
        ValueError: a scale without elements, unequal lists, an unknown mode or reduction.
        ImplUnavailableError: the implementation asked for cannot run this call.

    Source: Goodfellow et al., "Generative Adversarial Nets", 2014 (bce); Mao et al., "Least
    Squares Generative Adversarial Networks", 2017; Lim, Ye, "Geometric GAN", 2017 (hinge);
    Arjovsky, Chintala, Bottou, "Wasserstein GAN", 2017; one-sided label smoothing: Salimans et
    al., "Improved Techniques for Training GANs", 2016.
    """
    op = "discriminator_loss"
    real, fake = _check_discriminator(op, real_logits, fake_logits, mode, label_smoothing)
    _checks.one_of(op, "scale_reduction", scale_reduction, SCALE_REDUCTIONS)
    if _choose(op, impl, real[0]) == "native":
        return _native_loss(real, fake, mode, label_smoothing, scale_reduction)[0]
    return _reference_discriminator_loss(real, fake, mode, label_smoothing, scale_reduction)


def discriminator_loss_with_stats(
    real_logits: Logits,
    fake_logits: Logits,
    *,
    mode: str = "bce",
    label_smoothing: float = 0.0,
    scale_reduction: str = "sum",
    impl: str | None = None,
) -> tuple[Tensor, DiscriminatorStats]:
    """:func:`discriminator_loss` and, from the same pass, statistics worth logging.

    Arguments, gradients, errors and sources are those of :func:`discriminator_loss`.

    Returns:
        The loss and :class:`DiscriminatorStats`: fp32 scalars on the device of the logits, so
        that reading them is the caller's only synchronisation.
    """
    op = "discriminator_loss_with_stats"
    real, fake = _check_discriminator(op, real_logits, fake_logits, mode, label_smoothing)
    _checks.one_of(op, "scale_reduction", scale_reduction, SCALE_REDUCTIONS)
    if _choose(op, impl, real[0]) == "native":
        loss, values = _native_loss(real, fake, mode, label_smoothing, scale_reduction)
        return loss, DiscriminatorStats(*values.unbind())
    loss = _reference_discriminator_loss(real, fake, mode, label_smoothing, scale_reduction)
    with torch.no_grad():
        stats = reference.discriminator_stats(real, fake, mode)
    return loss, DiscriminatorStats(*(value.float() for value in stats))


def generator_loss(
    fake_logits: Logits,
    *,
    mode: str = "bce",
    saturating: bool = False,
    scale_reduction: str = "sum",
    impl: str | None = None,
) -> Tensor:
    r"""Adversarial loss of a generator from the discriminator's logits on its images.

    For one scale, with means over the elements of f: ``bce`` softplus(-f), or with ``saturating``
    -softplus(f), the minimax form :math:`\log(1 - D(G(z)))`; ``lsgan`` (f - 1)²; ``hinge`` and
    ``wgan`` -f.

    Args:
        fake_logits: a tensor of any shape, or a list of them (scales); fp16, bf16, fp32 or fp64.
        mode: ``"bce"``, ``"lsgan"``, ``"hinge"`` or ``"wgan"``.
        saturating: the minimax form, ``bce`` only (else ValueError).
        scale_reduction: ``"sum"`` or ``"mean"`` over the scales.
        impl: ``"reference"``, ``"native"`` or None for the fastest that supports the call.

    Returns:
        fp32 scalar (fp64 for fp64 logits), also under autocast.

    Differentiable twice with respect to the logits. Errors and sources: see
    :func:`discriminator_loss`.
    """
    op = "generator_loss"
    fake = check_logits(op, "fake_logits", fake_logits)
    _checks.one_of(op, "mode", mode, MODES)
    if saturating and mode != "bce":
        raise ValueError(f"{op}: saturating needs mode='bce', got {mode!r}")
    _checks.one_of(op, "scale_reduction", scale_reduction, SCALE_REDUCTIONS)
    if _choose(op, impl, fake[0]) == "native":
        # A generator wants its fakes judged real; the minimax form is the discriminator's, negated.
        if saturating:
            return -_native_loss([], fake, mode, 0.0, scale_reduction)[0]
        mode = "wgan" if mode == "hinge" else mode
        return _native_loss(fake, [], mode, 0.0, scale_reduction)[0]
    with _dispatch.without_autocast(fake[0].device):
        losses = [reference.generator_loss(f, mode, saturating) for f in fake]
        return _over_scales(losses, scale_reduction)


def _check_discriminator(
    op: str, real_logits: Logits, fake_logits: Logits, mode: str, label_smoothing: float
) -> tuple[list[Tensor], list[Tensor]]:
    real = check_logits(op, "real_logits", real_logits)
    fake = check_logits(op, "fake_logits", fake_logits)
    _checks.equally_long(op, "fake_logits", fake, "real_logits", real)
    _checks.same_device(op, "fake_logits", fake[0], "real_logits", real[0])
    if real[0].dtype != fake[0].dtype:
        raise TypeError(
            f"{op}: fake_logits must have the dtype of real_logits, {real[0].dtype}, "
            f"got {fake[0].dtype}"
        )
    _checks.one_of(op, "mode", mode, MODES)
    _checks.number(op, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing!r}")
    if label_smoothing and mode != "bce":
        raise ValueError(f"{op}: label_smoothing needs mode='bce', got {mode!r}")
    return real, fake


def check_logits(op: str, name: str, logits: Logits) -> list[Tensor]:
    """Logits as a list of scales that have elements, one dtype and one device."""
    scales = _checks.layers(op, name, logits)
    for i, x in enumerate(scales):
        own = _checks.label(name, i, len(scales))
        _checks.floating(op, own, x)
        if x.numel() == 0:
            raise ValueError(f"{op}: {own} must have elements, got {_checks.shape(x)}")
        _checks.same_device(op, own, x, f"{name}[0]", scales[0])
        if x.dtype != scales[0].dtype:
            raise TypeError(
                f"{op}: {own} must have the dtype of {name}[0], {scales[0].dtype}, got {x.dtype}"
            )
    return scales


def _choose(op: str, impl: str | None, logits: Tensor) -> str:
    reason = None
    if logits.is_cuda and logits.dtype == torch.float64:
        reason = "the CUDA kernels take fp16, bf16 and fp32 logits, got torch.float64"
    return _dispatch.choose(op, "gan_loss", impl, logits.device, cannot={"native": reason})


def _native_loss(
    real: list[Tensor], fake: list[Tensor], mode: str, label_smoothing: float, scale_reduction: str
) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and the statistics, fp32 [4]."""
    scale = 1 / max(len(real), len(fake)) if scale_reduction == "mean" else 1.0
    return torch.ops.fastgan.gan_loss(real, fake, mode, label_smoothing, scale)


def _reference_discriminator_loss(
    real: list[Tensor], fake: list[Tensor], mode: str, label_smoothing: float, scale_reduction: str
) -> Tensor:
    with _dispatch.without_autocast(real[0].device):
        losses = [
            reference.discriminator_loss(r, f, mode, label_smoothing)
            for r, f in zip(real, fake, strict=True)
        ]
        return _over_scales(losses, scale_reduction)


def _over_scales(losses: list[Tensor], scale_reduction: str) -> Tensor:
    total = torch.stack(losses)
    return total.mean() if scale_reduction == "mean" else total.sum()
