"""Gram matrices, the style loss over them, and the content loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import reference
from fastgan.ops import _checks, _dispatch

NORMALIZATIONS = ("chw", "hw", "none")
REDUCTIONS = ("mean", "channels")


def gram_matrix(features: Tensor, *, normalize: str = "chw", impl: str | None = None) -> Tensor:
    r"""Gram matrix of each feature map: the inner products of its channels.

    .. math:: G_b = \frac{1}{d} F_b F_b^\top, \qquad F_b \in \mathbb{R}^{C \times M}

    with M positions and ``d`` = C·M for ``normalize="chw"``, M for ``"hw"``, 1 for ``"none"``.

    Args:
        features: [B, C, H, W] or [B, C, L]; fp16, bf16, fp32 or fp64, any strides.
        normalize: ``"chw"``, ``"hw"`` or ``"none"``; applied in fp32 before anything is stored,
            so that 16-bit features neither overflow nor underflow.
        impl: ``"reference"``, ``"triton"`` or None for the fastest that supports the call.

    Returns:
        [B, C, C], fp32 (fp64 for fp64 features), also under autocast.

    Differentiable twice with respect to ``features``.

    Raises:
        TypeError: ``features`` is no floating-point tensor.
        ValueError: wrong shape or ``normalize``.
        ImplUnavailableError: the implementation asked for cannot run this call.

    Source: Gatys, Ecker, Bethge, "A Neural Algorithm of Artistic Style", 2015;
    normalised by C·H·W as in Johnson, Alahi, Fei-Fei, "Perceptual Losses for Real-Time Style
    Transfer and Super-Resolution", 2016.
    """
    _checks.feature_map("gram_matrix", "features", features, ranks=(3, 4))
    _checks.one_of("gram_matrix", "normalize", normalize, NORMALIZATIONS)
    _dispatch.choose("gram_matrix", "gram", impl, features.device)
    with torch.autocast(features.device.type, enabled=False):
        return reference.gram_matrix(features, normalize)


def style_loss(
    features: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    normalize: str = "chw",
    weights: Sequence[float] | None = None,
    impl: str | None = None,
) -> Tensor:
    r"""Squared distance between the Gram matrices of features and given target matrices.

    .. math:: \sum_l w_l \cdot \frac14 \cdot \frac1B \sum_b \lVert G_{l,b} - T_{l,b} \rVert_F^2

    With ``normalize="chw"`` this is the :math:`\frac{1}{4 N^2 M^2} \lVert G - T \rVert_F^2` of
    unnormalised Gram matrices of N channels and M positions. All C² entries count; a target need
    not be symmetric. An empty batch has loss 0.

    Args:
        features: one feature map [B, C, H, W] (or [B, C, L]), or a list of them (layers).
        targets: Gram matrices, [B, C, C] or [1, C, C] per layer, normalised alike; compute them
            once per style with :func:`gram_matrix` and keep them.
        normalize: as in :func:`gram_matrix`.
        weights: one number per layer; 1 each by default.
        impl: ``"reference"``, ``"triton"`` or None for the fastest that supports the call.

    Returns:
        fp32 scalar (fp64 for fp64 features), also under autocast.

    Differentiable twice with respect to ``features`` and ``targets``.

    Raises:
        TypeError: an argument is no floating-point tensor or list of them.
        ValueError: shapes, devices or lengths do not fit.
        ImplUnavailableError: the implementation asked for cannot run this call.

    Source: Gatys, Ecker, Bethge, "A Neural Algorithm of Artistic Style", 2015.
    """
    op = "style_loss"
    feature_list = _checks.layers(op, "features", features)
    target_list = _checks.layers(op, "targets", targets)
    _checks.equally_long(op, "targets", target_list, "features", feature_list)
    weight_list = _checks.layer_weights(op, weights, "features", len(feature_list))
    _checks.one_of(op, "normalize", normalize, NORMALIZATIONS)
    for i, (x, target) in enumerate(zip(feature_list, target_list, strict=True)):
        _check_layer(op, i, len(feature_list), x, target)
        _checks.same_device(op, f"features[{i}]", x, "features[0]", feature_list[0])
    device = feature_list[0].device
    _dispatch.choose(op, "gram", impl, device)
    with torch.autocast(device.type, enabled=False):
        losses = [
            weight * reference.style_loss(x, target, normalize)
            for x, target, weight in zip(feature_list, target_list, weight_list, strict=True)
        ]
        return _total(losses)


def _check_layer(op: str, index: int, count: int, x: Tensor, target: Tensor) -> None:
    name = _checks.label("features", index, count)
    target_name = _checks.label("targets", index, count)
    _checks.feature_map(op, name, x, ranks=(3, 4))
    _checks.floating(op, target_name, target)
    _checks.same_device(op, target_name, target, name, x)
    batch, channels = x.shape[:2]
    fits = target.ndim == 3 and target.shape[0] in (1, batch)
    if not (fits and target.shape[1:] == (channels, channels)):
        hint = "; pass gram_matrix(style_features)" if target.ndim == 4 else ""
        raise ValueError(
            f"{op}: {target_name} must be [{batch} or 1, {channels}, {channels}] to match {name}, "
            f"got {_checks.shape(target)}{hint}"
        )


def content_loss(
    features: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    reduction: str = "mean",
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Squared distance between feature maps, summed over layers.

    ``reduction="mean"`` is the mean squared error, ``"channels"`` the textbook's sum over feature
    maps divided by their number, :math:`\frac1B \sum_b \frac1C \sum (F - T)^2`. An empty batch
    has loss 0.

    Args:
        features: one feature map [B, C, ...] or a list of them (layers).
        targets: of the same shapes.
        reduction: ``"mean"`` or ``"channels"``.
        weights: one number per layer; 1 each by default.

    Returns:
        fp32 scalar (fp64 for fp64 features), also under autocast. Plain PyTorch, so
        differentiable to any order.

    Raises:
        TypeError: an argument is no floating-point tensor or list of them.
        ValueError: shapes, devices or lengths do not fit.

    Source: Gatys, Ecker, Bethge, "A Neural Algorithm of Artistic Style", 2015.
    """
    op = "content_loss"
    feature_list = _checks.layers(op, "features", features)
    target_list = _checks.layers(op, "targets", targets)
    _checks.equally_long(op, "targets", target_list, "features", feature_list)
    weight_list = _checks.layer_weights(op, weights, "features", len(feature_list))
    _checks.one_of(op, "reduction", reduction, REDUCTIONS)
    for i, (x, target) in enumerate(zip(feature_list, target_list, strict=True)):
        name = _checks.label("features", i, len(feature_list))
        target_name = _checks.label("targets", i, len(feature_list))
        _checks.floating(op, name, x)
        _checks.floating(op, target_name, target)
        if x.ndim < 2 or target.shape != x.shape:
            raise ValueError(
                f"{op}: {target_name} must be [B, C, ...] of the shape of {name}, "
                f"{_checks.shape(x)}, got {_checks.shape(target)}"
            )
        _checks.same_device(op, target_name, target, name, x)
    with torch.autocast(feature_list[0].device.type, enabled=False):
        losses = [
            weight * reference.content_loss(x, target, reduction)
            for x, target, weight in zip(feature_list, target_list, weight_list, strict=True)
        ]
        return _total(losses)


def _total(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
